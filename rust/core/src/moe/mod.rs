//! Mixture of experts.
//!
//! * [`route`]: routers: logits to (expert ids, weights); [`route_backward`]: their gradients;
//! * `largest`: exact top-k; `score`: rows of scores of any floating type;
//! * [`rounding`]: token rounding; [`rounding_rules`]: how many tokens an expert gets; [`rounding_backward`];
//! * [`routing`]: [`Routing`](routing::Routing), the one form in which every other part sees a routing;
//! * [`problem`]: the expert layer's arguments, checked;
//! * [`forward`]: the layer; `panels` for experts with many rows, `lines` for those with few;
//! * `weight`: an expert's weight of x's type, or bytes with scales; [`quantise`] makes those;
//! * [`backward`]: its gradients; `slopes` back to the input, `outer` for the weights;
//! * `aggregate`: the sum over a token's rows, last stage of both directions.

mod aggregate;
pub mod backward;
pub mod forward;
#[cfg(test)]
mod int8_tests;
pub(crate) mod largest;
mod lines;
mod outer;
mod panels;
pub mod problem;
pub mod quantise;
pub mod rounding;
pub mod rounding_backward;
pub mod rounding_rules;
#[cfg(test)]
mod rounding_tests;
pub mod route;
pub mod route_backward;
#[cfg(test)]
mod route_tests;
pub mod routing;
mod score;
mod slopes;
#[cfg(test)]
mod tests;
mod weight;

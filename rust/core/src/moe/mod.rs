//! Mixture of experts.
//!
//! * [`route`]: routers: logits to (expert ids, weights);
//! * [`routing`]: [`Routing`](routing::Routing), the one form in which every other part sees a routing;
//! * [`problem`]: the expert layer's arguments, checked;
//! * [`forward`]: the layer; `panels` for experts with many rows, `lines` for those with few;
//! * [`backward`]: its gradients; `slopes` back to the input, `outer` for the weights;
//! * `aggregate`: the sum over a token's rows, last stage of both directions.

mod aggregate;
pub mod backward;
pub mod forward;
mod lines;
mod outer;
mod panels;
pub mod problem;
pub mod route;
pub mod routing;
mod slopes;
#[cfg(test)]
mod tests;

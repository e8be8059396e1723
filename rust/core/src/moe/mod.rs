//! Mixture of experts, forward.
//!
//! * [`route`]: routers: logits to (expert ids, weights); [`route_backward`]: their gradients;
//! * `largest`: exact top-k; `score`: rows of scores of any floating type;
//! * [`rounding`]: token rounding; [`rounding_rules`]: how many tokens an expert gets; [`rounding_backward`];
//! * [`routing`]: [`Routing`](routing::Routing), the one form in which every other part sees a routing;
//! * [`layer`]: the expert layer, validated and dispatched;
//! * `panels`: experts with many rows (packed panels);
//! * `lines`: experts with few rows (bound by reading their weights once).

mod largest;
pub mod layer;
mod lines;
mod panels;
pub mod rounding;
pub mod rounding_backward;
pub mod rounding_rules;
pub mod route;
pub mod route_backward;
pub mod routing;
mod score;
#[cfg(test)]
mod tests;

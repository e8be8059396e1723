//! Mixture of experts, forward.
//!
//! * [`route`]: routers: logits to (expert ids, weights);
//! * [`routing`]: [`Routing`](routing::Routing), the one form in which every other part sees a routing;
//! * [`layer`]: the expert layer, validated and dispatched;
//! * `panels`: experts with many rows (packed panels);
//! * `lines`: experts with few rows (bound by reading their weights once).

pub mod layer;
mod lines;
mod panels;
pub mod route;
pub mod routing;
#[cfg(test)]
mod tests;

//! Algorithms on registers, written once over [`Vector`](super::vector::Vector) and
//! [`Dot`](super::vector::Dot); `table.rs` instantiates them for each instruction set.
//!
//! * [`tile`]: one operand broadcast, the other by lanes, accumulators in registers (matrix product);
//! * [`rows`]: both operands along the reduction (matrix times few rows, bound by memory);
//! * [`softmax`]: one block of the online softmax over a score tile;
//! * [`slopes`]: the step back through it;
//! * [`pack`]: transposition into panels and back, rows stacked into units;
//! * [`activation`]: the function between an expert's two products, and its derivative;
//! * [`rank`]: which elements of a row are large, and the scores they are ranked by (routers, token rounding);
//! * [`pointwise`]: small row operations;
//! * [`laws`]: rows of logits and of probabilities, in plain Rust (speculation);
//! * [`lanes`]: the operations of expressions over slices, in plain Rust; [`elementary`]: their functions of one number.

pub(super) mod activation;
pub(super) mod elementary;
pub(super) mod lanes;
#[cfg(test)]
mod lanes_tests;
pub(crate) mod laws;
pub(super) mod pack;
pub(super) mod pointwise;
pub(super) mod rank;
pub(super) mod rows;
pub(super) mod slopes;
pub(super) mod softmax;
pub(super) mod tile;

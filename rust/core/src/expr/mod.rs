//! Programs that modify attention: a score from a score, whether a query attends a key, and their gradients.
//!
//! * [`table`]: the one table of operations: name, classes, scalar meaning, derivative;
//! * [`program`]: a checked program and its text, the one form in which a mod crosses languages; [`graph`]: its nodes;
//! * `simplify`: the canonical form; `gradient`: reverse-mode derivative;
//! * [`bounds`]: interval arithmetic over boxes of elements; `extremes`: what captures hold over ranges;
//! * [`bind`]: a program with its captured arrays; `lower`: rewrites that need extents; [`plan`]: steps, sorted by what
//!   they depend on;
//! * [`tile`]: the interpreter over blocks of elements;
//! * [`verdict`]: whether a block of a mask is empty, full or partial;
//! * [`grid`]: block masks, torch's lists of partial and full blocks, and their transposes;
//! * [`dense`]: every element, for tests and for masks that are wanted whole.

pub mod bind;
pub mod bounds;
pub mod dense;
mod extremes;
mod gradient;
pub mod graph;
pub mod grid;
mod lower;
pub mod plan;
pub mod program;
mod simplify;
pub mod table;
#[cfg(test)]
mod tests;
pub mod tile;
pub mod verdict;

pub use bind::{Bound, Extents};
pub use bounds::Region;
pub use program::{CaptureSpec, Kind, Program};
pub use table::Class;
pub use tile::{CaptureGradient, Evaluator, Side};
pub use verdict::{Classifier, Verdict};

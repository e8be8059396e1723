//! Criterion benchmarks of the core's kernels.
fn main() {}

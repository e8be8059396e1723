//! The binding: one thin file per room, and the two modules they all go through.
//!
//! * [`arrays`]: arrays in and out (DLPack), nothing else knows the layout of foreign memory;
//! * [`door`]: the one way into the core (detach, catch panics and Ctrl-C, map errors);
//! * [`cuda`]: device sources, embedded and flattened, for Python to compile;
//! * the rooms: convert arguments, enter, return. No mathematics and no defaults live here.
//!
//! The core's buffers never become user-visible arrays: callers allocate outputs.

mod arrays;
mod attention;
mod confidence;
mod config;
mod cuda;
mod door;
mod expr;
mod gemm;
mod moe;
mod scheduler;
mod speculation;
mod speculation_cache;
mod speculation_drafts;

use pyo3::prelude::*;

/// The native part of tilewise. Private: use the `tilewise` package.
#[pymodule(gil_used = false)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    config::register(module)?;
    cuda::register(module)?;
    expr::register(module)?;
    gemm::register(module)?;
    attention::register(module)?;
    moe::register(module)?;
    scheduler::register(module)?;
    speculation::register(module)?;
    speculation_cache::register(module)?;
    speculation_drafts::register(module)?;
    confidence::register(module)?;
    Ok(())
}

//! What this build is and how it is set: versions, instruction sets, threads.

use pyo3::prelude::*;
use pyo3::types::PyDict;
use tilewise_core::arch::{self, Level};
use tilewise_core::threads;

/// How this extension was built: version, git commit, rustc, instruction sets compiled in.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("commit", env!("TILEWISE_COMMIT"))?;
    info.set_item("rustc", env!("TILEWISE_RUSTC"))?;
    info.set_item("target", env!("TILEWISE_TARGET"))?;
    info.set_item("profile", env!("TILEWISE_PROFILE"))?;
    info.set_item("isa_compiled", Level::COMPILED.iter().map(|level| level.name()).collect::<Vec<_>>())?;
    Ok(info)
}

/// Instruction-set levels that this machine can run, weakest first.
#[pyfunction]
fn isa_detected() -> Vec<&'static str> {
    Level::COMPILED.iter().filter(|level| level.is_available()).map(|level| level.name()).collect()
}

/// The level that kernels use now.
#[pyfunction]
fn isa_chosen() -> &'static str {
    arch::level().name()
}

/// Forces a level for the whole process; `None` goes back to the best one (or to `TILEWISE_CPU_ISA`).
#[pyfunction]
fn force_isa(py: Python<'_>, name: Option<&str>) -> PyResult<()> {
    arch::force(name).map_err(|error| crate::door::to_python(py, &error))
}

/// Number of threads that parallel work uses.
#[pyfunction]
fn num_threads() -> usize {
    threads::threads()
}

/// Overrides the number of threads; 0 goes back to the environment's.
#[pyfunction]
fn set_num_threads(count: usize) {
    threads::set_threads(count);
}

/// Ten rounds of Philox4x32 over one counter block.
#[pyfunction]
fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    tilewise_core::rng::philox4x32(counter, key)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(build_info, module)?)?;
    module.add_function(wrap_pyfunction!(isa_detected, module)?)?;
    module.add_function(wrap_pyfunction!(isa_chosen, module)?)?;
    module.add_function(wrap_pyfunction!(force_isa, module)?)?;
    module.add_function(wrap_pyfunction!(num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(set_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(philox4x32, module)?)
}

//! The mixture-of-experts room: `routers`, token `rounding` and the expert `layer`.

mod layer;
mod rounding;
mod routers;

use crate::door::to_python;
use pyo3::prelude::*;
use tilewise_core::error::Error;

fn unknown(py: Python<'_>, name: &str, allowed: &str, got: &str) -> PyErr {
    to_python(py, &Error::value(name, format!("one of {allowed}"), format!("'{got}'")))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    routers::register(module)?;
    rounding::register(module)?;
    layer::register(module)
}

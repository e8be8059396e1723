//! The one door into the core: detach from the interpreter, run, watch for Ctrl-C, catch panics, map errors.

use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tilewise_core::error::{Error, Result};
use tilewise_core::threads;

/// Runs `work` without the interpreter lock. A panic becomes `InternalError`, Ctrl-C a `KeyboardInterrupt`.
pub fn enter<R: Send>(py: Python<'_>, work: impl FnOnce() -> Result<R> + Send) -> PyResult<R> {
    let outcome = py.detach(|| {
        let check = Box::new(|| Python::attach(|py| py.check_signals().is_err()));
        threads::with_interrupt(check, || catch_unwind(AssertUnwindSafe(work)))
    });
    match outcome {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(to_python(py, &error)),
        Err(panic) => Err(to_python(py, &Error::Internal(panic_text(panic.as_ref())))),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("panic without a message").to_string()
}

/// The exception of `tilewise.errors` that stands for a core error.
pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    static CLASSES: PyOnceLock<[Py<PyType>; 5]> = PyOnceLock::new();
    let class = match error {
        Error::Interrupted => return PyKeyboardInterrupt::new_err(()),
        Error::Shape { .. } => 0,
        Error::Dtype { .. } => 1,
        Error::Value { .. } => 2,
        Error::Device { .. } => 3,
        Error::Internal(_) => 4,
    };
    let load = || -> PyResult<[Py<PyType>; 5]> {
        let module = py.import("tilewise.errors")?;
        let get = |name| -> PyResult<Py<PyType>> { Ok(module.getattr(name)?.cast_into::<PyType>()?.unbind()) };
        Ok([get("ShapeError")?, get("DtypeError")?, get("ArgumentError")?, get("DeviceError")?, get("InternalError")?])
    };
    match CLASSES.get_or_try_init(py, load) {
        Ok(classes) => PyErr::from_type(classes[class].bind(py).clone(), error.to_string()),
        Err(failure) => failure,
    }
}

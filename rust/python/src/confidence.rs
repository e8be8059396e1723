//! The scheduler room: confidence of reasoning traces.

use crate::arrays::{hold, hold_optional};
use crate::door::enter;
use pyo3::prelude::*;
use std::sync::{Mutex, PoisonError};
use tilewise_core::scheduler::confidence::{self, Monitor, Outputs, Rules};

/// logits [N, V] -> out [N, 1], float64.
#[pyfunction]
fn confidence_tokens(py: Python<'_>, logits: &Bound<'_, PyAny>, top_k: usize, out: &Bound<'_, PyAny>) -> PyResult<()> {
    let (logits, mut out) = (hold("logits", logits)?, hold("out", out)?);
    let (logits, out) = (logits.array()?, out.array_mut()?);
    enter(py, || confidence::tokens(&logits, top_k, out))
}

/// values [N, T, k] or [N, T], lengths [N] -> metrics [N, 4] and, if given, tokens [N, T] and groups, float64.
#[pyfunction]
#[pyo3(signature = (values, lengths, window, tail, fraction, metrics, tokens=None, groups=None))]
fn confidence_traces<'py>(
    py: Python<'py>,
    values: &Bound<'py, PyAny>,
    lengths: Option<&Bound<'py, PyAny>>,
    window: usize,
    tail: usize,
    fraction: f64,
    metrics: &Bound<'py, PyAny>,
    tokens: Option<&Bound<'py, PyAny>>,
    groups: Option<&Bound<'py, PyAny>>,
) -> PyResult<()> {
    let (values, lengths) = (hold("values", values)?, hold_optional("lengths", lengths)?);
    let (mut metrics, mut tokens) = (hold("metrics", metrics)?, hold_optional("tokens", tokens)?);
    let mut groups = hold_optional("groups", groups)?;
    let values = values.array()?;
    let lengths = lengths.as_ref().map(|lengths| lengths.array()).transpose()?;
    let outputs = Outputs {
        metrics: metrics.array_mut()?,
        tokens: tokens.as_mut().map(|tokens| tokens.array_mut()).transpose()?,
        groups: groups.as_mut().map(|groups| groups.array_mut()).transpose()?,
    };
    enter(py, || confidence::traces(&values, lengths.as_ref(), Rules { window, tail, fraction }, outputs))
}

/// Windows of the rows of a running batch.
#[pyclass(frozen)]
struct ConfidenceWindows(Mutex<Monitor>);

#[pymethods]
impl ConfidenceWindows {
    #[new]
    fn new(py: Python<'_>, rows: usize, window: usize) -> PyResult<Self> {
        enter(py, || Monitor::new(rows, window)).map(|monitor| Self(Mutex::new(monitor)))
    }

    /// One token (float64 [R]) to each of `rows` [R]; None adds none. Fills out [R, 4]: group, lowest, mean, tokens.
    fn update(
        &self,
        py: Python<'_>,
        rows: &Bound<'_, PyAny>,
        values: Option<&Bound<'_, PyAny>>,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (rows, values, mut out) = (hold("rows", rows)?, hold_optional("confidence", values)?, hold("out", out)?);
        let (rows, out) = (rows.array()?, out.array_mut()?);
        let values = values.as_ref().map(|values| values.array()).transpose()?;
        enter(py, || {
            let mut monitor = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let rows = monitor.rows(&rows)?;
            monitor.update(&rows, values.as_ref(), out)
        })
    }

    /// Forgets what `rows` [R] have seen.
    fn reset(&self, py: Python<'_>, rows: &Bound<'_, PyAny>) -> PyResult<()> {
        let rows = hold("rows", rows)?;
        let rows = rows.array()?;
        enter(py, || {
            let mut monitor = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let rows = monitor.rows(&rows)?;
            monitor.reset(&rows);
            Ok(())
        })
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<ConfidenceWindows>()?;
    module.add_function(wrap_pyfunction!(confidence_tokens, module)?)?;
    module.add_function(wrap_pyfunction!(confidence_traces, module)?)
}

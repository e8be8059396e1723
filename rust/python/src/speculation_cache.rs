//! The speculation room's small state: the outcome cache, rank curves, fan-out.

use crate::door::to_python;
use pyo3::prelude::*;
use tilewise_core::error::Error;
use tilewise_core::speculation::{self, Outcome, RankCurve, fanout};

/// What was drafted ahead, by the outcome it was drafted for. Values are any objects.
#[pyclass(module = "tilewise._core", name = "OutcomeCache")]
pub struct PyOutcomeCache(speculation::OutcomeCache<Py<PyAny>>);

#[pymethods]
impl PyOutcomeCache {
    #[new]
    fn new() -> Self {
        Self(speculation::OutcomeCache::new())
    }

    fn insert(&mut self, stream: u32, round: u64, accepted: u32, token: u32, entry: Py<PyAny>) -> Option<Py<PyAny>> {
        self.0.insert(Outcome { stream, round, accepted, token }, entry)
    }

    fn take(&mut self, stream: u32, round: u64, accepted: u32, token: u32) -> Option<Py<PyAny>> {
        self.0.take(&Outcome { stream, round, accepted, token })
    }

    fn get(&self, py: Python<'_>, stream: u32, round: u64, accepted: u32, token: u32) -> Option<Py<PyAny>> {
        self.0.get(&Outcome { stream, round, accepted, token }).map(|entry| entry.clone_ref(py))
    }

    fn retire(&mut self, stream: u32, round: u64) -> Vec<Py<PyAny>> {
        self.0.retire(stream, round)
    }

    fn forget(&mut self, stream: u32) -> Vec<Py<PyAny>> {
        self.0.forget(stream)
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }
}

fn refuse(py: Python<'_>, wrong: bool, name: &str, allowed: &str, got: impl std::fmt::Display) -> PyResult<()> {
    if wrong { Err(to_python(py, &Error::value(name, allowed, got))) } else { Ok(()) }
}

/// P(the rank of the true token < F), learnt online.
#[pyclass(module = "tilewise._core", name = "RankCurve")]
pub struct PyRankCurve(RankCurve);

#[pymethods]
impl PyRankCurve {
    #[new]
    fn new(py: Python<'_>, exponent: f64, prior_weight: f64, memory: f64) -> PyResult<Self> {
        refuse(py, !(exponent >= 0.0 && exponent.is_finite()), "exponent", "a finite number >= 0", exponent)?;
        let weight = prior_weight > 0.0 && prior_weight.is_finite();
        refuse(py, !weight, "prior_weight", "a finite number > 0, in observations", prior_weight)?;
        // A NaN is no memory either.
        refuse(py, memory.is_nan() || memory <= 0.0, "memory", "a number > 0, in observations", memory)?;
        Ok(Self(RankCurve::new(exponent).with_prior_weight(prior_weight).with_memory(memory)))
    }

    fn observe(&mut self, rank: Option<usize>) {
        self.0.observe(rank);
    }

    fn hit(&self, guesses: usize) -> f64 {
        self.0.hit(guesses)
    }

    fn gain(&self, guesses: usize) -> f64 {
        self.0.gain(guesses)
    }

    fn observations(&self) -> f64 {
        self.0.observations()
    }
}

fn refuse_model(py: Python<'_>, acceptance: f64, exponent: f64) -> PyResult<()> {
    refuse(py, !(0.0..=1.0).contains(&acceptance), "acceptance", "a number in [0, 1]", acceptance)?;
    refuse(py, !(exponent >= 0.0 && exponent.is_finite()), "exponent", "a finite number >= 0", exponent)
}

/// The closed form: length + 1 real numbers that add up to the budget.
#[pyfunction]
fn speculation_geometric(
    py: Python<'_>,
    acceptance: f64,
    exponent: f64,
    length: usize,
    budget: f64,
) -> PyResult<Vec<f64>> {
    refuse_model(py, acceptance, exponent)?;
    refuse(py, !(budget >= 0.0 && budget.is_finite()), "budget", "a finite number >= 0", budget)?;
    Ok(fanout::geometric(acceptance, exponent, length, budget))
}

/// The closed form's probability of a miss at any fan-out.
#[pyfunction]
fn speculation_geometric_miss(py: Python<'_>, acceptance: f64, exponent: f64, fan_out: Vec<f64>) -> PyResult<f64> {
    refuse_model(py, acceptance, exponent)?;
    Ok(fanout::geometric_miss(acceptance, exponent, &fan_out))
}

/// Integers that add up to min(budget, sum of most), each where it adds most.
#[pyfunction]
fn speculation_water_fill(
    py: Python<'_>,
    outcome_weights: Vec<f64>,
    curves: Vec<PyRef<'_, PyRankCurve>>,
    budget: usize,
    most: Vec<usize>,
) -> PyResult<Vec<usize>> {
    let places = outcome_weights.len();
    refuse(py, curves.len() != places, "curves", &format!("{places}, one a weight"), curves.len())?;
    refuse(py, most.len() != places, "most", &format!("{places}, one a weight"), most.len())?;
    let curves: Vec<&RankCurve> = curves.iter().map(|curve| &curve.0).collect();
    Ok(fanout::water_fill(&outcome_weights, &curves, budget, &most))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyOutcomeCache>()?;
    module.add_class::<PyRankCurve>()?;
    module.add_function(wrap_pyfunction!(speculation_geometric, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_geometric_miss, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_water_fill, module)?)
}

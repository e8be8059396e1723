//! Token rounding. How many pairs there are is known after the fact, so it is done in two calls: round, then write into
//! arrays of that length.

use super::unknown;
use crate::arrays::{hold, hold_optional};
use crate::door::enter;
use pyo3::prelude::*;
use tilewise_core::moe::rounding::{self, Rounded};
use tilewise_core::moe::rounding_backward::{self, Pairs};
use tilewise_core::moe::rounding_rules::{self, Rule};

/// A rounded routing that waits to be written.
#[pyclass(frozen)]
struct Rounding(Rounded);

#[pymethods]
impl Rounding {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// Fills int32 `expert_ids`, `token_ids`, `slots` and floating `weights`, each as long as this.
    fn write(
        &self,
        py: Python<'_>,
        expert_ids: &Bound<'_, PyAny>,
        token_ids: &Bound<'_, PyAny>,
        slots: &Bound<'_, PyAny>,
        weights: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (mut ids, mut tokens) = (hold("expert_ids", expert_ids)?, hold("token_ids", token_ids)?);
        let (mut slots, mut weights) = (hold("slots", slots)?, hold("weights", weights)?);
        let (ids, tokens, slots, weights) =
            (ids.array_mut()?, tokens.array_mut()?, slots.array_mut()?, weights.array_mut()?);
        enter(py, || self.0.write(ids, tokens, slots, weights))
    }
}

/// Rounds a routing.
#[pyfunction]
#[pyo3(signature = (scores, expert_ids, weights, *, tile, rule, seed, step, renormalise))]
fn round_tokens(
    py: Python<'_>,
    scores: &Bound<'_, PyAny>,
    expert_ids: &Bound<'_, PyAny>,
    weights: Option<&Bound<'_, PyAny>>,
    tile: usize,
    rule: &str,
    seed: u64,
    step: u64,
    renormalise: bool,
) -> PyResult<Rounding> {
    let rule = match rule {
        "nearest" => Rule::Nearest,
        "stochastic" => Rule::Stochastic,
        "nearest_score" => Rule::NearestScore,
        "balance" => Rule::Balance,
        "up" => Rule::Up,
        "down" => Rule::Down,
        other => {
            return Err(unknown(py, "rule", "nearest, stochastic, nearest_score, balance, up or down", other));
        }
    };
    let (scores, ids, weights) =
        (hold("scores", scores)?, hold("expert_ids", expert_ids)?, hold_optional("weights", weights)?);
    let (scores, ids) = (scores.array()?, ids.array()?);
    let weights = weights.as_ref().map(|weights| weights.array()).transpose()?;
    let rounding = rounding_rules::Rounding { tile, rule, seed, step };
    enter(py, || rounding::round_tokens(&rounding, &scores, &ids, weights.as_ref(), renormalise)).map(Rounding)
}

/// The gradients of scores and weights into `score_grad` and `weight_grad`.
#[pyfunction]
#[pyo3(signature = (grad, scores, weights, expert_ids, token_ids, slots, score_grad, weight_grad, *, renormalise))]
fn round_tokens_backward(
    py: Python<'_>,
    grad: &Bound<'_, PyAny>,
    scores: &Bound<'_, PyAny>,
    weights: Option<&Bound<'_, PyAny>>,
    expert_ids: &Bound<'_, PyAny>,
    token_ids: &Bound<'_, PyAny>,
    slots: &Bound<'_, PyAny>,
    score_grad: &Bound<'_, PyAny>,
    weight_grad: Option<&Bound<'_, PyAny>>,
    renormalise: bool,
) -> PyResult<()> {
    let (grad, scores, weights) = (hold("grad", grad)?, hold("scores", scores)?, hold_optional("weights", weights)?);
    let (ids, tokens, slots) = (hold("expert_ids", expert_ids)?, hold("token_ids", token_ids)?, hold("slots", slots)?);
    let (mut score_grad, mut weight_grad) =
        (hold("score_grad", score_grad)?, hold_optional("weight_grad", weight_grad)?);
    let pairs = Pairs { expert_ids: ids.array()?, token_ids: tokens.array()?, slots: slots.array()? };
    let (grad, scores, score_grad) = (grad.array()?, scores.array()?, score_grad.array_mut()?);
    let weights = weights.as_ref().map(|weights| weights.array()).transpose()?;
    let weight_grad = weight_grad.as_mut().map(|weight_grad| weight_grad.array_mut()).transpose()?;
    enter(py, || {
        let weights = weights.as_ref();
        rounding_backward::round_tokens_backward(&pairs, &grad, &scores, weights, renormalise, score_grad, weight_grad)
    })
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Rounding>()?;
    module.add_function(wrap_pyfunction!(round_tokens, module)?)?;
    module.add_function(wrap_pyfunction!(round_tokens_backward, module)?)
}

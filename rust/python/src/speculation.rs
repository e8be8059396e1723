//! The speculation room.

use crate::arrays::{hold, hold_optional};
use crate::door::{enter, to_python};
use pyo3::prelude::*;
use tilewise_core::error::Error;
use tilewise_core::rng::Purpose;
use tilewise_core::speculation::{self, Chains, Streams};

fn purpose_named(py: Python<'_>, name: &str) -> PyResult<Purpose> {
    match name {
        "draft" => Ok(Purpose::Draft),
        "accept" => Ok(Purpose::Accept),
        "residual" => Ok(Purpose::Residual),
        "target" => Ok(Purpose::Target),
        "other" => Ok(Purpose::Other),
        "round" => Ok(Purpose::Round),
        "schedule" => Ok(Purpose::Schedule),
        other => {
            let allowed = "'draft', 'accept', 'residual', 'target', 'other', 'round' or 'schedule'";
            Err(to_python(py, &Error::value("purpose", allowed, format!("'{other}'"))))
        }
    }
}

/// A uniform number in [0, 1).
#[pyfunction]
fn uniform(py: Python<'_>, seed: u64, request: u32, position: u64, purpose: &str) -> PyResult<f64> {
    Ok(tilewise_core::rng::uniform(seed, request, position, purpose_named(py, purpose)?))
}

/// logits [B, V] or [B, N, V], rules [B] -> out of the same shape, float64.
#[pyfunction]
fn speculation_process<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    temperature: &Bound<'py, PyAny>,
    top_k: &Bound<'py, PyAny>,
    top_p: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let (logits, mut out) = (hold("logits", logits)?, hold("out", out)?);
    let (temperature, top_k, top_p) = (hold("temperature", temperature)?, hold("top_k", top_k)?, hold("top_p", top_p)?);
    let (logits, out) = (logits.array()?, out.array_mut()?);
    let (temperature, top_k, top_p) = (temperature.array()?, top_k.array()?, top_p.array()?);
    enter(py, || {
        let rules = speculation::rules(&temperature, &top_k, &top_p, logits.shape().first().copied().unwrap_or(0))?;
        speculation::process(&logits, &rules, out)
    })
}

/// probabilities [B, V], requests and positions [B] -> tokens [B] int64.
#[pyfunction]
fn speculation_sample_laws<'py>(
    py: Python<'py>,
    probabilities: &Bound<'py, PyAny>,
    seed: u64,
    requests: &Bound<'py, PyAny>,
    positions: &Bound<'py, PyAny>,
    purpose: &str,
    tokens: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let purpose = purpose_named(py, purpose)?;
    let (laws, mut tokens) = (hold("probabilities", probabilities)?, hold("tokens", tokens)?);
    let (requests, positions) = (hold("requests", requests)?, hold("positions", positions)?);
    let (laws, tokens, requests, positions) =
        (laws.array()?, tokens.array_mut()?, requests.array()?, positions.array()?);
    enter(py, || {
        let streams = Streams::new(seed, &requests, &positions, laws.shape().first().copied().unwrap_or(0))?;
        speculation::sample_laws(&laws, &streams, purpose, tokens)
    })
}

/// logits [B, V], rules, requests and positions [B] -> tokens [B] int64 and, if given, laws [B, V].
#[pyfunction]
#[pyo3(signature = (logits, temperature, top_k, top_p, seed, requests, positions, purpose, tokens, laws=None))]
fn speculation_sample_logits<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    temperature: &Bound<'py, PyAny>,
    top_k: &Bound<'py, PyAny>,
    top_p: &Bound<'py, PyAny>,
    seed: u64,
    requests: &Bound<'py, PyAny>,
    positions: &Bound<'py, PyAny>,
    purpose: &str,
    tokens: &Bound<'py, PyAny>,
    laws: Option<&Bound<'py, PyAny>>,
) -> PyResult<()> {
    let purpose = purpose_named(py, purpose)?;
    let (logits, mut tokens, mut laws) =
        (hold("logits", logits)?, hold("tokens", tokens)?, hold_optional("laws", laws)?);
    let (temperature, top_k, top_p) = (hold("temperature", temperature)?, hold("top_k", top_k)?, hold("top_p", top_p)?);
    let (requests, positions) = (hold("requests", requests)?, hold("positions", positions)?);
    let (logits, tokens) = (logits.array()?, tokens.array_mut()?);
    let laws = laws.as_mut().map(|laws| laws.array_mut()).transpose()?;
    let (temperature, top_k, top_p) = (temperature.array()?, top_k.array()?, top_p.array()?);
    let (requests, positions) = (requests.array()?, positions.array()?);
    enter(py, || {
        let rows = logits.shape().first().copied().unwrap_or(0);
        let rules = speculation::rules(&temperature, &top_k, &top_p, rows)?;
        let streams = Streams::new(seed, &requests, &positions, rows)?;
        speculation::sample_logits(&logits, &rules, &streams, purpose, tokens, laws)
    })
}

/// One round: draft_tokens [B, K], logits [B, K + 1, V], draft_laws [B, K, V] or None -> accepted [B], tokens [B].
#[pyfunction]
fn speculation_verify<'py>(
    py: Python<'py>,
    draft_tokens: &Bound<'py, PyAny>,
    draft_lengths: Option<&Bound<'py, PyAny>>,
    draft_laws: Option<&Bound<'py, PyAny>>,
    logits: &Bound<'py, PyAny>,
    temperature: &Bound<'py, PyAny>,
    top_k: &Bound<'py, PyAny>,
    top_p: &Bound<'py, PyAny>,
    strict: bool,
    seed: u64,
    requests: &Bound<'py, PyAny>,
    positions: &Bound<'py, PyAny>,
    accepted: &Bound<'py, PyAny>,
    tokens: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let (drafted, lengths) = (hold("draft_tokens", draft_tokens)?, hold_optional("draft_lengths", draft_lengths)?);
    let (laws, logits) = (hold_optional("draft_laws", draft_laws)?, hold("logits", logits)?);
    let (temperature, top_k, top_p) = (hold("temperature", temperature)?, hold("top_k", top_k)?, hold("top_p", top_p)?);
    let (requests, positions) = (hold("requests", requests)?, hold("positions", positions)?);
    let (mut accepted, mut tokens) = (hold("accepted", accepted)?, hold("tokens", tokens)?);
    let (drafted, logits) = (drafted.array()?, logits.array()?);
    let lengths = lengths.as_ref().map(|lengths| lengths.array()).transpose()?;
    let laws = laws.as_ref().map(|laws| laws.array()).transpose()?;
    let (temperature, top_k, top_p) = (temperature.array()?, top_k.array()?, top_p.array()?);
    let (requests, positions) = (requests.array()?, positions.array()?);
    let (accepted, tokens) = (accepted.array_mut()?, tokens.array_mut()?);
    enter(py, || {
        let rows = drafted.shape().first().copied().unwrap_or(0);
        let rules = speculation::rules(&temperature, &top_k, &top_p, rows)?;
        let chains = Chains::new(drafted, lengths.as_ref(), laws, logits, rules, strict)?;
        let streams = Streams::new(seed, &requests, &positions, rows)?;
        speculation::verify(&chains, &streams, accepted, tokens)
    })
}

/// What a round draws from: -> acceptance [B, K], corrections [B, K + 1, V], float64.
#[pyfunction]
fn speculation_law<'py>(
    py: Python<'py>,
    draft_tokens: &Bound<'py, PyAny>,
    draft_lengths: Option<&Bound<'py, PyAny>>,
    draft_laws: Option<&Bound<'py, PyAny>>,
    logits: &Bound<'py, PyAny>,
    temperature: &Bound<'py, PyAny>,
    top_k: &Bound<'py, PyAny>,
    top_p: &Bound<'py, PyAny>,
    strict: bool,
    acceptance: &Bound<'py, PyAny>,
    corrections: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let (drafted, lengths) = (hold("draft_tokens", draft_tokens)?, hold_optional("draft_lengths", draft_lengths)?);
    let (laws, logits) = (hold_optional("draft_laws", draft_laws)?, hold("logits", logits)?);
    let (temperature, top_k, top_p) = (hold("temperature", temperature)?, hold("top_k", top_k)?, hold("top_p", top_p)?);
    let (mut acceptance, mut corrections) = (hold("acceptance", acceptance)?, hold("corrections", corrections)?);
    let (drafted, logits) = (drafted.array()?, logits.array()?);
    let lengths = lengths.as_ref().map(|lengths| lengths.array()).transpose()?;
    let laws = laws.as_ref().map(|laws| laws.array()).transpose()?;
    let (temperature, top_k, top_p) = (temperature.array()?, top_k.array()?, top_p.array()?);
    let (acceptance, corrections) = (acceptance.array_mut()?, corrections.array_mut()?);
    enter(py, || {
        let rules = speculation::rules(&temperature, &top_k, &top_p, drafted.shape().first().copied().unwrap_or(0))?;
        let chains = Chains::new(drafted, lengths.as_ref(), laws, logits, rules, strict)?;
        speculation::verification_law(&chains, acceptance, corrections)
    })
}

/// The random numbers of a run of coupled sampling.
#[pyclass(frozen, module = "tilewise._core")]
struct Races(speculation::Races);

#[pymethods]
impl Races {
    #[new]
    fn new(py: Python<'_>, seed: u64, vocabulary: usize) -> PyResult<Self> {
        speculation::Races::new(seed, vocabulary).map(Self).map_err(|error| to_python(py, &error))
    }

    /// logits [B, V], rules, requests and positions [B] -> out [B, count] int64: the first of each row's race.
    fn rank<'py>(
        &self,
        py: Python<'py>,
        logits: &Bound<'py, PyAny>,
        temperature: &Bound<'py, PyAny>,
        top_k: &Bound<'py, PyAny>,
        top_p: &Bound<'py, PyAny>,
        requests: &Bound<'py, PyAny>,
        positions: &Bound<'py, PyAny>,
        out: &Bound<'py, PyAny>,
    ) -> PyResult<()> {
        let (logits, mut out) = (hold("logits", logits)?, hold("out", out)?);
        let (temperature, top_k, top_p) =
            (hold("temperature", temperature)?, hold("top_k", top_k)?, hold("top_p", top_p)?);
        let (requests, positions) = (hold("requests", requests)?, hold("positions", positions)?);
        let (logits, out) = (logits.array()?, out.array_mut()?);
        let (temperature, top_k, top_p) = (temperature.array()?, top_k.array()?, top_p.array()?);
        let (requests, positions) = (requests.array()?, positions.array()?);
        enter(py, || {
            let rows = logits.shape().first().copied().unwrap_or(0);
            let rules = speculation::rules(&temperature, &top_k, &top_p, rows)?;
            let streams = Streams::new(self.0.seed(), &requests, &positions, rows)?;
            self.0.rank(&logits, &rules, &streams, out)
        })
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Races>()?;
    module.add_function(wrap_pyfunction!(uniform, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_process, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_sample_laws, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_sample_logits, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_verify, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_law, module)?)
}

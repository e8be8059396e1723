//! The speculation room.

use crate::arrays::{Held, hold, hold_optional};
use crate::door::{enter, to_python};
use pyo3::prelude::*;
use tilewise_core::error::Error;
use tilewise_core::rng::Purpose;
use tilewise_core::speculation::scalars::{self, Laws};
use tilewise_core::speculation::{self, Chains, Proposals, Record, SparseLaws, Streams, outcomes};

fn purpose_named(py: Python<'_>, name: &str) -> PyResult<Purpose> {
    match name {
        "draft" => Ok(Purpose::Draft),
        "accept" => Ok(Purpose::Accept),
        "residual" => Ok(Purpose::Residual),
        "target" => Ok(Purpose::Target),
        "other" => Ok(Purpose::Other),
        "round" => Ok(Purpose::Round),
        other => {
            let allowed = "'draft', 'accept', 'residual', 'target', 'other' or 'round'";
            Err(to_python(py, &Error::value("purpose", allowed, format!("'{other}'"))))
        }
    }
}

/// Laws of drafted tokens: none, [..., V], or [..., m] with ids.
fn proposals<'a>(py: Python<'_>, laws: Option<&'a Held<'_>>, ids: Option<&'a Held<'_>>) -> PyResult<Proposals<'a>> {
    Ok(match (laws, ids) {
        (None, _) => Proposals::Points,
        (Some(laws), None) => Proposals::Dense(laws.array()?),
        (Some(laws), Some(ids)) => {
            let lists = SparseLaws::new("draft_laws", ids.array()?, laws.array()?);
            Proposals::Sparse(lists.map_err(|error| to_python(py, &error))?)
        }
    })
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

/// logits [B, V], rules, requests and positions [B] -> tokens [B] int64 and, if given, laws [B, V], or ids (int32) and
/// laws [B, m]. saguaro, fan_out [B]: how laws are reweighed.
#[pyfunction]
#[pyo3(signature = (logits, temperature, top_k, top_p, seed, requests, positions, purpose, tokens, laws=None, ids=None, saguaro=None, fan_out=None))]
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
    ids: Option<&Bound<'py, PyAny>>,
    saguaro: Option<&Bound<'py, PyAny>>,
    fan_out: Option<&Bound<'py, PyAny>>,
) -> PyResult<()> {
    let purpose = purpose_named(py, purpose)?;
    let (logits, mut tokens) = (hold("logits", logits)?, hold("tokens", tokens)?);
    let (mut laws, mut ids) = (hold_optional("laws", laws)?, hold_optional("ids", ids)?);
    let (temperature, top_k, top_p) = (hold("temperature", temperature)?, hold("top_k", top_k)?, hold("top_p", top_p)?);
    let (requests, positions) = (hold("requests", requests)?, hold("positions", positions)?);
    let (saguaro, fan_out) = (hold_optional("saguaro", saguaro)?, hold_optional("fan_out", fan_out)?);
    let (logits, tokens) = (logits.array()?, tokens.array_mut()?);
    let laws = laws.as_mut().map(|laws| laws.array_mut()).transpose()?;
    let ids = ids.as_mut().map(|ids| ids.array_mut()).transpose()?;
    let (temperature, top_k, top_p) = (temperature.array()?, top_k.array()?, top_p.array()?);
    let (requests, positions) = (requests.array()?, positions.array()?);
    let saguaro = saguaro.as_ref().map(|saguaro| saguaro.array()).transpose()?;
    let fan_out = fan_out.as_ref().map(|fan_out| fan_out.array()).transpose()?;
    enter(py, || {
        let rows = logits.shape().first().copied().unwrap_or(0);
        let rules = speculation::rules(&temperature, &top_k, &top_p, rows)?;
        let saguaro = match (saguaro, fan_out) {
            (Some(saguaro), Some(fan_out)) => speculation::saguaro_rules(&saguaro, &fan_out, rows)?,
            _ => Vec::new(),
        };
        let streams = Streams::new(seed, &requests, &positions, rows)?;
        let record = match (ids, laws) {
            (Some(ids), Some(laws)) => Record::Sparse(ids, laws),
            (_, Some(laws)) => Record::Dense(laws),
            _ => Record::None,
        };
        speculation::sample_logits(&logits, &rules, &saguaro, &streams, purpose, tokens, record)
    })
}

/// One round: draft_tokens [B, K], logits [B, K + 1, V], draft_laws [B, K, V] or None -> accepted [B], tokens [B].
#[pyfunction]
fn speculation_verify<'py>(
    py: Python<'py>,
    draft_tokens: &Bound<'py, PyAny>,
    draft_lengths: Option<&Bound<'py, PyAny>>,
    draft_laws: Option<&Bound<'py, PyAny>>,
    draft_ids: Option<&Bound<'py, PyAny>>,
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
    let ids = hold_optional("draft_laws.ids", draft_ids)?;
    let (temperature, top_k, top_p) = (hold("temperature", temperature)?, hold("top_k", top_k)?, hold("top_p", top_p)?);
    let (requests, positions) = (hold("requests", requests)?, hold("positions", positions)?);
    let (mut accepted, mut tokens) = (hold("accepted", accepted)?, hold("tokens", tokens)?);
    let (drafted, logits) = (drafted.array()?, logits.array()?);
    let lengths = lengths.as_ref().map(|lengths| lengths.array()).transpose()?;
    let laws = proposals(py, laws.as_ref(), ids.as_ref())?;
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
    draft_ids: Option<&Bound<'py, PyAny>>,
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
    let ids = hold_optional("draft_laws.ids", draft_ids)?;
    let (temperature, top_k, top_p) = (hold("temperature", temperature)?, hold("top_k", top_k)?, hold("top_p", top_p)?);
    let (mut acceptance, mut corrections) = (hold("acceptance", acceptance)?, hold("corrections", corrections)?);
    let (drafted, logits) = (drafted.array()?, logits.array()?);
    let lengths = lengths.as_ref().map(|lengths| lengths.array()).transpose()?;
    let laws = proposals(py, laws.as_ref(), ids.as_ref())?;
    let (temperature, top_k, top_p) = (temperature.array()?, top_k.array()?, top_p.array()?);
    let (acceptance, corrections) = (acceptance.array_mut()?, corrections.array_mut()?);
    enter(py, || {
        let rules = speculation::rules(&temperature, &top_k, &top_p, drafted.shape().first().copied().unwrap_or(0))?;
        let chains = Chains::new(drafted, lengths.as_ref(), laws, logits, rules, strict)?;
        speculation::verification_law(&chains, acceptance, corrections)
    })
}

/// The target's probabilities of drafted tokens: draft_tokens [B, K], logits [B, K + 1, V] -> out [B, K] float64.
#[pyfunction]
fn speculation_token_probabilities<'py>(
    py: Python<'py>,
    draft_tokens: &Bound<'py, PyAny>,
    draft_lengths: Option<&Bound<'py, PyAny>>,
    logits: &Bound<'py, PyAny>,
    temperature: &Bound<'py, PyAny>,
    top_k: &Bound<'py, PyAny>,
    top_p: &Bound<'py, PyAny>,
    out: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let (drafted, lengths) = (hold("draft_tokens", draft_tokens)?, hold_optional("draft_lengths", draft_lengths)?);
    let (logits, mut out) = (hold("logits", logits)?, hold("out", out)?);
    let (temperature, top_k, top_p) = (hold("temperature", temperature)?, hold("top_k", top_k)?, hold("top_p", top_p)?);
    let (drafted, logits, out) = (drafted.array()?, logits.array()?, out.array_mut()?);
    let lengths = lengths.as_ref().map(|lengths| lengths.array()).transpose()?;
    let (temperature, top_k, top_p) = (temperature.array()?, top_k.array()?, top_p.array()?);
    enter(py, || {
        let rules = speculation::rules(&temperature, &top_k, &top_p, drafted.shape().first().copied().unwrap_or(0))?;
        let chains = Chains::new(drafted, lengths.as_ref(), Proposals::Points, logits, rules, true)?;
        speculation::token_probabilities(&chains, out)
    })
}

/// The first step: probabilities [B, K] of drafted tokens, by the draft and by the target -> accepted [B] int32.
#[pyfunction]
fn speculation_accept<'py>(
    py: Python<'py>,
    draft: &Bound<'py, PyAny>,
    target: &Bound<'py, PyAny>,
    draft_lengths: Option<&Bound<'py, PyAny>>,
    seed: u64,
    requests: &Bound<'py, PyAny>,
    positions: &Bound<'py, PyAny>,
    accepted: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let (draft, target) = (hold("draft_probabilities", draft)?, hold("target_probabilities", target)?);
    let lengths = hold_optional("draft_lengths", draft_lengths)?;
    let (requests, positions) = (hold("requests", requests)?, hold("positions", positions)?);
    let mut accepted = hold("accepted", accepted)?;
    let (draft, target, accepted) = (draft.array()?, target.array()?, accepted.array_mut()?);
    let lengths = lengths.as_ref().map(|lengths| lengths.array()).transpose()?;
    let (requests, positions) = (requests.array()?, positions.array()?);
    enter(py, || {
        let streams = Streams::new(seed, &requests, &positions, draft.shape().first().copied().unwrap_or(0))?;
        scalars::accept(&draft, &target, lengths.as_ref(), &streams, accepted)
    })
}

/// The second step: one law a row on each side -> tokens [B] int64. With rules the target's are logits.
#[pyfunction]
fn speculation_correct<'py>(
    py: Python<'py>,
    target: &Bound<'py, PyAny>,
    rules: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    accepted: &Bound<'py, PyAny>,
    refused: &Bound<'py, PyAny>,
    draft_laws: Option<&Bound<'py, PyAny>>,
    draft_ids: Option<&Bound<'py, PyAny>>,
    seed: u64,
    requests: &Bound<'py, PyAny>,
    positions: &Bound<'py, PyAny>,
    tokens: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let target = hold("target", target)?;
    let rules = rules
        .map(|(t, k, p)| -> PyResult<_> { Ok((hold("temperature", &t)?, hold("top_k", &k)?, hold("top_p", &p)?)) })
        .transpose()?;
    let (accepted, refused) = (hold("accepted", accepted)?, hold("refused", refused)?);
    let (laws, ids) = (hold_optional("draft_laws", draft_laws)?, hold_optional("draft_laws.ids", draft_ids)?);
    let (requests, positions) = (hold("requests", requests)?, hold("positions", positions)?);
    let mut tokens = hold("tokens", tokens)?;
    let (target, accepted, refused, tokens) =
        (target.array()?, accepted.array()?, refused.array()?, tokens.array_mut()?);
    let rules =
        rules.as_ref().map(|(t, k, p)| -> PyResult<_> { Ok((t.array()?, k.array()?, p.array()?)) }).transpose()?;
    let laws = proposals(py, laws.as_ref(), ids.as_ref())?;
    let (requests, positions) = (requests.array()?, positions.array()?);
    enter(py, || {
        let rows = target.shape().first().copied().unwrap_or(0);
        let streams = Streams::new(seed, &requests, &positions, rows)?;
        let target = match rules {
            Some((temperature, top_k, top_p)) => {
                Laws::Logits(target, speculation::rules(&temperature, &top_k, &top_p, rows)?)
            }
            None => Laws::Probabilities(target),
        };
        scalars::correct(&target, &accepted, &refused, &laws, &streams, tokens)
    })
}

/// The most probable tokens of each row of logits [B, V]: counts [B], exclude [B] -> ids [B, W] int32, -1 tail.
#[pyfunction]
fn speculation_predict<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    exclude: Option<&Bound<'py, PyAny>>,
    counts: &Bound<'py, PyAny>,
    ids: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let (logits, exclude) = (hold("logits", logits)?, hold_optional("exclude", exclude)?);
    let (counts, mut ids) = (hold("counts", counts)?, hold("ids", ids)?);
    let (logits, counts, ids) = (logits.array()?, counts.array()?, ids.array_mut()?);
    let exclude = exclude.as_ref().map(|exclude| exclude.array()).transpose()?;
    enter(py, || outcomes::predict(&logits, exclude.as_ref(), &counts, ids))
}

/// Where tokens [B] stand among the rows of logits [B, V], exclude [B] left out -> ranks [B] int64.
#[pyfunction]
fn speculation_rank<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    tokens: &Bound<'py, PyAny>,
    exclude: Option<&Bound<'py, PyAny>>,
    ranks: &Bound<'py, PyAny>,
) -> PyResult<()> {
    let (logits, exclude) = (hold("logits", logits)?, hold_optional("exclude", exclude)?);
    let (tokens, mut ranks) = (hold("tokens", tokens)?, hold("ranks", ranks)?);
    let (logits, tokens, ranks) = (logits.array()?, tokens.array()?, ranks.array_mut()?);
    let exclude = exclude.as_ref().map(|exclude| exclude.array()).transpose()?;
    enter(py, || outcomes::rank(&logits, &tokens, exclude.as_ref(), ranks))
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

    /// logits [B, V], rules, requests and positions [B] -> out [B, count] int64: the first of each row's race; and
    /// scores [B, count] float64, or None: how far ahead they are.
    #[allow(clippy::too_many_arguments)]
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
        scores: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let (logits, mut out) = (hold("logits", logits)?, hold("out", out)?);
        let mut scores = scores.map(|scores| hold("scores", scores)).transpose()?;
        let (temperature, top_k, top_p) =
            (hold("temperature", temperature)?, hold("top_k", top_k)?, hold("top_p", top_p)?);
        let (requests, positions) = (hold("requests", requests)?, hold("positions", positions)?);
        let (logits, out) = (logits.array()?, out.array_mut()?);
        let scores = scores.as_mut().map(|scores| scores.array_mut()).transpose()?;
        let (temperature, top_k, top_p) = (temperature.array()?, top_k.array()?, top_p.array()?);
        let (requests, positions) = (requests.array()?, positions.array()?);
        enter(py, || {
            let rows = logits.shape().first().copied().unwrap_or(0);
            let rules = speculation::rules(&temperature, &top_k, &top_p, rows)?;
            let streams = Streams::new(self.0.seed(), &requests, &positions, rows)?;
            self.0.rank(&logits, &rules, &streams, out, scores)
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
    module.add_function(wrap_pyfunction!(speculation_law, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_token_probabilities, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_accept, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_correct, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_predict, module)?)?;
    module.add_function(wrap_pyfunction!(speculation_rank, module)?)
}

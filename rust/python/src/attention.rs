//! The attention room.

use crate::arrays::{Held, hold, hold_optional};
use crate::door::{enter, to_python};
use crate::expr::{hold_captures, parsed};
use pyo3::prelude::*;
use tilewise_core::attention::backward::{Gradients, Upstream};
use tilewise_core::attention::blocks::Lists;
use tilewise_core::attention::mods::Mod;
use tilewise_core::attention::problem::{Problem, Rules};
use tilewise_core::view::{Array, ArrayMut};

/// The attributes of a `tilewise.attention.rules.Rules`.
#[derive(FromPyObject)]
struct RulesObject<'py> {
    scale: f64,
    causal: bool,
    left: Option<usize>,
    right: Option<usize>,
    mask: Option<Bound<'py, PyAny>>,
    sinks: Option<Bound<'py, PyAny>>,
    block_indices: Option<Bound<'py, PyAny>>,
    block_size: usize,
    kv_num_blocks: Option<Bound<'py, PyAny>>,
    kv_indices: Option<Bound<'py, PyAny>>,
    full_kv_num_blocks: Option<Bound<'py, PyAny>>,
    full_kv_indices: Option<Bound<'py, PyAny>>,
    query_block: usize,
    key_block: usize,
    dropout: f64,
    seed: u64,
    sequences: Option<Bound<'py, PyAny>>,
    block_table: Option<Bound<'py, PyAny>>,
    splits: usize,
    threshold: f64,
    score_mod: Option<String>,
    score_captures: Vec<Bound<'py, PyAny>>,
    mask_mod: Option<String>,
    mask_captures: Vec<Bound<'py, PyAny>>,
}

/// The arrays of [`RulesObject`], held for the length of a call.
struct HeldRules<'py> {
    plain: RulesObject<'py>,
    mask: Option<Held<'py>>,
    sinks: Option<Held<'py>>,
    block_indices: Option<Held<'py>>,
    lists: [Option<Held<'py>>; 4],
    sequences: Option<Held<'py>>,
    table: Option<Held<'py>>,
    score_captures: Vec<Held<'py>>,
    mask_captures: Vec<Held<'py>>,
}

/// A program and its captures. Programs are parsed once per text.
fn program<'h>(py: Python<'_>, text: Option<&str>, captures: &'h [Held<'_>]) -> PyResult<Option<Mod<'h>>> {
    let Some(text) = text else { return Ok(None) };
    let program = parsed(py, text)?;
    Ok(Some(Mod { program, captures: captures.iter().map(Held::array).collect::<PyResult<_>>()? }))
}

fn optional<'h>(held: &'h Option<Held<'_>>) -> PyResult<Option<Array<'h>>> {
    held.as_ref().map(Held::array).transpose()
}

impl<'py> HeldRules<'py> {
    fn new(rules: &Bound<'py, PyAny>) -> PyResult<Self> {
        let plain: RulesObject<'py> = rules.extract()?;
        Ok(Self {
            mask: hold_optional("mask", plain.mask.as_ref())?,
            sinks: hold_optional("sinks", plain.sinks.as_ref())?,
            block_indices: hold_optional("block_indices", plain.block_indices.as_ref())?,
            lists: [
                hold_optional("kv_num_blocks", plain.kv_num_blocks.as_ref())?,
                hold_optional("kv_indices", plain.kv_indices.as_ref())?,
                hold_optional("full_kv_num_blocks", plain.full_kv_num_blocks.as_ref())?,
                hold_optional("full_kv_indices", plain.full_kv_indices.as_ref())?,
            ],
            sequences: hold_optional("sequences", plain.sequences.as_ref())?,
            table: hold_optional("block_table", plain.block_table.as_ref())?,
            score_captures: hold_captures(&plain.score_captures)?,
            mask_captures: hold_captures(&plain.mask_captures)?,
            plain,
        })
    }

    fn rules(&self, py: Python<'_>) -> PyResult<Rules<'_>> {
        let plain = &self.plain;
        let [num, indices, full_num, full_indices] = &self.lists;
        let full = optional(full_num)?.zip(optional(full_indices)?);
        let lists = optional(num)?.zip(optional(indices)?).map(|(partial_num, partial_indices)| Lists {
            partial_num,
            partial_indices,
            full,
            query_block: plain.query_block,
            key_block: plain.key_block,
        });
        Ok(Rules {
            scale: plain.scale,
            causal: plain.causal,
            left: plain.left,
            right: plain.right,
            mask: optional(&self.mask)?,
            block_indices: optional(&self.block_indices)?,
            block_size: plain.block_size,
            lists,
            score_mod: program(py, plain.score_mod.as_deref(), &self.score_captures)?,
            mask_mod: program(py, plain.mask_mod.as_deref(), &self.mask_captures)?,
            sinks: optional(&self.sinks)?,
            dropout: plain.dropout,
            seed: plain.seed,
            sequences: optional(&self.sequences)?,
            table: optional(&self.table)?,
            splits: plain.splits,
            threshold: plain.threshold,
        })
    }
}

fn problem<'a>(
    py: Python<'_>,
    [query, key, value]: [&'a Held<'_>; 3],
    rules: &'a HeldRules<'_>,
) -> PyResult<Problem<'a>> {
    Problem::new(query.array()?, key.array()?, value.array()?, rules.rules(py)?).map_err(|error| to_python(py, &error))
}

/// Forward attention into `out` and `lse`.
#[pyfunction]
fn attention_forward(
    py: Python<'_>,
    query: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    lse: &Bound<'_, PyAny>,
    rules: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (query, key, value) = (hold("query", query)?, hold("key", key)?, hold("value", value)?);
    let (mut out, mut lse) = (hold("out", out)?, hold("lse", lse)?);
    let rules = HeldRules::new(rules)?;
    let problem = problem(py, [&query, &key, &value], &rules)?;
    let (out, lse) = (out.array_mut()?, lse.array_mut()?);
    enter(py, || tilewise_core::attention::forward(&problem, out, lse))
}

/// Gradients of [`attention_forward`], into the arrays that are given.
#[pyfunction]
#[pyo3(signature = (query, key, value, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value, grad_sinks, grad_captures, rules))]
fn attention_backward(
    py: Python<'_>,
    query: &Bound<'_, PyAny>,
    key: &Bound<'_, PyAny>,
    value: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    lse: &Bound<'_, PyAny>,
    grad_out: &Bound<'_, PyAny>,
    grad_lse: Option<&Bound<'_, PyAny>>,
    grad_query: Option<&Bound<'_, PyAny>>,
    grad_key: Option<&Bound<'_, PyAny>>,
    grad_value: Option<&Bound<'_, PyAny>>,
    grad_sinks: Option<&Bound<'_, PyAny>>,
    grad_captures: Vec<Option<Bound<'_, PyAny>>>,
    rules: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (query, key, value) = (hold("query", query)?, hold("key", key)?, hold("value", value)?);
    let rules = HeldRules::new(rules)?;
    let problem = problem(py, [&query, &key, &value], &rules)?;
    let (out, lse, grad_out) = (hold("out", out)?, hold("lse", lse)?, hold("grad_out", grad_out)?);
    let grad_lse = hold_optional("grad_lse", grad_lse)?;
    let upstream =
        Upstream { out: out.array()?, lse: lse.array()?, grad_out: grad_out.array()?, grad_lse: optional(&grad_lse)? };
    let mut query = hold_optional("grad_query", grad_query)?;
    let mut key = hold_optional("grad_key", grad_key)?;
    let mut value = hold_optional("grad_value", grad_value)?;
    let mut sinks = hold_optional("grad_sinks", grad_sinks)?;
    let mut captures = grad_captures
        .iter()
        .map(|array| hold_optional("grad_captures", array.as_ref()))
        .collect::<PyResult<Vec<_>>>()?;
    let gradients = Gradients {
        query: writable(&mut query)?,
        key: writable(&mut key)?,
        value: writable(&mut value)?,
        sinks: writable(&mut sinks)?,
        captures: captures.iter_mut().map(writable).collect::<PyResult<_>>()?,
    };
    enter(py, || tilewise_core::attention::backward::backward(&problem, &upstream, gradients))
}

fn writable<'h>(held: &'h mut Option<Held<'_>>) -> PyResult<Option<ArrayMut<'h>>> {
    held.as_mut().map(Held::array_mut).transpose()
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(attention_forward, module)?)?;
    module.add_function(wrap_pyfunction!(attention_backward, module)?)
}

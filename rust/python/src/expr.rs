//! The expr room.

use crate::arrays::{Held, hold, hold_optional};
use crate::door::{enter, to_python};
use pyo3::prelude::*;
use std::sync::Mutex;
use tilewise_core::arch::lanes::FloatLane;
use tilewise_core::dtype::Dtype;
use tilewise_core::error::{Error, Result};
use tilewise_core::expr::dense::{Lanes, evaluate};
use tilewise_core::expr::grid::{self, Lists};
use tilewise_core::expr::{Bound as Bind, CaptureGradient, Extents, Program};
use tilewise_core::view::{Array, ArrayMut};

fn parse(py: Python<'_>, text: &str) -> PyResult<Program> {
    Program::parse(text).map_err(|error| to_python(py, &error))
}

/// Programs kept by their text: a model calls each of its few mods again and again.
const KEPT: usize = 64;

/// A program in canonical form, read once per text.
pub fn parsed(py: Python<'_>, text: &str) -> PyResult<Program> {
    static PROGRAMS: Mutex<Vec<(String, Program)>> = Mutex::new(Vec::new());
    // Never waits: another thread may hold the list, or held it during a fork.
    if let Ok(list) = PROGRAMS.try_lock()
        && let Some((_, program)) = list.iter().find(|(known, _)| known == text)
    {
        return Ok(program.clone());
    }
    let program = parse(py, text)?.simplified();
    if let Ok(mut list) = PROGRAMS.try_lock() {
        if list.len() == KEPT {
            list.remove(0);
        }
        list.push((text.to_string(), program.clone()));
    }
    Ok(program)
}

/// Raises `ArgumentError` with the line of a text that is no program.
#[pyfunction]
fn expr_check(py: Python<'_>, text: &str) -> PyResult<()> {
    parse(py, text).map(|_| ())
}

/// The canonical form of a program: equal programs give equal texts.
#[pyfunction]
fn expr_simplify(py: Python<'_>, text: &str) -> PyResult<String> {
    Ok(parse(py, text)?.simplified().text())
}

/// The gradient program of a score program.
#[pyfunction]
fn expr_gradient(py: Python<'_>, text: &str) -> PyResult<String> {
    let gradient = parse(py, text)?.gradient().map_err(|error| to_python(py, &error))?;
    Ok(gradient.text())
}

/// Arrays of a list of captures.
pub fn hold_captures<'py>(captures: &[Bound<'py, PyAny>]) -> PyResult<Vec<Held<'py>>> {
    captures.iter().map(|capture| hold("captures", capture)).collect()
}

/// A program over all elements into `out` [batch, heads, queries, keys]; see `dense::evaluate`.
#[pyfunction]
#[pyo3(signature = (text, captures, out, *, batch, heads, queries, keys, score=None, grad=None, grad_captures=None, lanes="queries"))]
fn expr_evaluate(
    py: Python<'_>,
    text: &str,
    captures: Vec<Bound<'_, PyAny>>,
    out: &Bound<'_, PyAny>,
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    score: Option<&Bound<'_, PyAny>>,
    grad: Option<&Bound<'_, PyAny>>,
    grad_captures: Option<Vec<Option<Bound<'_, PyAny>>>>,
    lanes: &str,
) -> PyResult<()> {
    let program = parse(py, text)?;
    let extents = Extents { batch, heads, queries, keys };
    let lanes = match lanes {
        "queries" => Lanes::Queries,
        "keys" => Lanes::Keys,
        other => return Err(to_python(py, &Error::value("lanes", "'queries' or 'keys'", format!("'{other}'")))),
    };
    let (score, grad) = (hold_optional("score", score)?, hold_optional("grad", grad)?);
    let held = hold_captures(&captures)?;
    let mut out = hold("out", out)?;
    let mut sums = Vec::new();
    for sum in grad_captures.iter().flatten() {
        sums.push(hold_optional("grad_captures", sum.as_ref())?);
    }
    let arrays = held.iter().map(Held::array).collect::<PyResult<Vec<_>>>()?;
    let (score, grad) = (score.as_ref().map(Held::array).transpose()?, grad.as_ref().map(Held::array).transpose()?);
    let out = out.array_mut()?;
    let sums = sums.iter_mut().map(|sum| sum.as_mut().map(Held::array_mut).transpose());
    let sums = sums.collect::<PyResult<Vec<_>>>()?;
    enter(py, || {
        if out.dtype() == Dtype::F64 {
            dense::<f64>(&program, arrays, extents, out, score.as_ref(), grad.as_ref(), sums, lanes)
        } else {
            dense::<f32>(&program, arrays, extents, out, score.as_ref(), grad.as_ref(), sums, lanes)
        }
    })
}

fn dense<T: FloatLane>(
    program: &Program,
    captures: Vec<Array<'_>>,
    extents: Extents,
    out: ArrayMut<'_>,
    score: Option<&Array<'_>>,
    grad: Option<&Array<'_>>,
    sums: Vec<Option<ArrayMut<'_>>>,
    lanes: Lanes,
) -> Result<()> {
    let shapes: Vec<Vec<usize>> = captures.iter().map(|capture| capture.shape().to_vec()).collect();
    let bound = Bind::<T>::new("program", program, captures, extents)?;
    let mut gradients: Vec<Option<CaptureGradient<T>>> = Vec::new();
    for (number, sum) in sums.iter().enumerate() {
        let shape = shapes.get(number).map_or(&[][..], Vec::as_slice);
        if let Some(sum) = sum
            && (sum.shape() != shape || sum.dtype() != T::DTYPE)
        {
            let allowed = format!("{} {shape:?}, as the capture", T::DTYPE);
            let error = Error::value("grad_captures", allowed, format!("{} {:?}", sum.dtype(), sum.shape()));
            return Err(error);
        }
        gradients.push(sum.as_ref().map(|_| CaptureGradient::new(shape)));
    }
    evaluate(&bound, out, score, grad, &mut gradients, lanes)?;
    for (sum, gradient) in sums.into_iter().zip(gradients) {
        if let (Some(sum), Some(gradient)) = (sum, gradient) {
            gradient.write(sum);
        }
    }
    Ok(())
}

/// torch's lists of the partial and full blocks of a mask program; see `grid::block_mask`.
#[pyfunction]
#[pyo3(signature = (text, captures, *, batch, heads, queries, keys, query_block, key_block, kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices))]
fn block_mask(
    py: Python<'_>,
    text: &str,
    captures: Vec<Bound<'_, PyAny>>,
    batch: usize,
    heads: usize,
    queries: usize,
    keys: usize,
    query_block: usize,
    key_block: usize,
    kv_num_blocks: &Bound<'_, PyAny>,
    kv_indices: &Bound<'_, PyAny>,
    full_kv_num_blocks: &Bound<'_, PyAny>,
    full_kv_indices: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let program = parse(py, text)?;
    let extents = Extents { batch, heads, queries, keys };
    let held = hold_captures(&captures)?;
    let (mut count, mut indices) = (hold("kv_num_blocks", kv_num_blocks)?, hold("kv_indices", kv_indices)?);
    let mut full_count = hold("full_kv_num_blocks", full_kv_num_blocks)?;
    let mut full_indices = hold("full_kv_indices", full_kv_indices)?;
    let arrays = held.iter().map(Held::array).collect::<PyResult<Vec<_>>>()?;
    let partial = Lists { count: count.array_mut()?, indices: indices.array_mut()? };
    let full = Lists { count: full_count.array_mut()?, indices: full_indices.array_mut()? };
    enter(py, || {
        let bound = Bind::<f32>::new("mask_mod", &program, arrays, extents)?;
        grid::block_mask(&bound, query_block, key_block, partial, full)
    })
}

/// The lists of a block mask by the other axis.
#[pyfunction]
fn block_mask_transpose(
    py: Python<'_>,
    num_blocks: &Bound<'_, PyAny>,
    indices: &Bound<'_, PyAny>,
    out_num_blocks: &Bound<'_, PyAny>,
    out_indices: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (count, list) = (hold("num_blocks", num_blocks)?, hold("indices", indices)?);
    let mut out_count = hold("out_num_blocks", out_num_blocks)?;
    let mut out_list = hold("out_indices", out_indices)?;
    let (count, list) = (count.array()?, list.array()?);
    let out = Lists { count: out_count.array_mut()?, indices: out_list.array_mut()? };
    enter(py, || grid::transpose(&count, &list, out))
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(block_mask, module)?)?;
    module.add_function(wrap_pyfunction!(block_mask_transpose, module)?)?;
    module.add_function(wrap_pyfunction!(expr_check, module)?)?;
    module.add_function(wrap_pyfunction!(expr_simplify, module)?)?;
    module.add_function(wrap_pyfunction!(expr_gradient, module)?)?;
    module.add_function(wrap_pyfunction!(expr_evaluate, module)?)
}

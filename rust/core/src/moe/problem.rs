//! An expert layer's arguments, checked once for every direction.

use super::routing::Routing;
use crate::arch::Activation;
use crate::dtype::{Dtype, Float, Real};
use crate::error::{Error, Result};
use crate::view::Array;
use half::{bf16, f16};

/// Where the gate and up rows of the first weight stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// All gates, then all ups.
    Concatenated,
    /// Gate 0, up 0, gate 1, up 1, ...
    Interleaved,
}

/// Weights of a layer; any strides. `gate_up` and `down` are of x's type, or int8 with a scale for each row.
#[derive(Debug, Clone)]
pub struct Weights<'a> {
    /// [experts, 2n (n for a plain activation), d]
    pub gate_up: Array<'a>,
    /// [experts, d, n]
    pub down: Array<'a>,
    /// [experts, 2n or n] float32: a row of int8 `gate_up` times this is the weight.
    pub gate_up_scale: Option<Array<'a>>,
    /// [experts, d] float32, for an int8 `down`.
    pub down_scale: Option<Array<'a>>,
    /// [experts, 2n or n]
    pub gate_up_bias: Option<Array<'a>>,
    /// [experts, d]
    pub down_bias: Option<Array<'a>>,
    /// Order of gate and up rows.
    pub layout: Layout,
    /// The function between the products.
    pub activation: Activation,
}

/// Who goes where: `ids` and `scores` are [tokens, slots], or [pairs] with `tokens` [pairs] beside them.
#[derive(Debug, Clone)]
pub struct Pairs<'a> {
    /// int32 or int64; outside 0..experts: a sentinel, skipped.
    pub ids: Array<'a>,
    /// Floating: the weight of each pair.
    pub scores: Array<'a>,
    /// int32 or int64, ascending: the token of each pair.
    pub tokens: Option<Array<'a>>,
}

/// A checked problem, as the stages see it.
pub(super) struct Layer<'a> {
    pub x: Array<'a>,
    pub weights: Weights<'a>,
    pub routing: Routing,
    /// d
    pub width: usize,
    /// n
    pub hidden: usize,
}

impl<'a> Layer<'a> {
    /// Checks and groups.
    ///
    /// # Errors
    /// Wrong ranks, extents, types or tokens, by name.
    pub fn new(x: Array<'a>, pairs: &Pairs<'_>, weights: Weights<'a>) -> Result<Self> {
        let (width, hidden) = check(&x, &weights)?;
        let routing = group(pairs, x.shape()[0], weights.gate_up.shape()[0])?;
        Ok(Self { x, weights, routing, width, hidden })
    }

    pub fn experts(&self) -> usize {
        self.weights.gate_up.shape()[0]
    }

    pub fn tokens(&self) -> usize {
        self.x.shape()[0]
    }

    /// Halves of the first product: gates and ups, or one.
    pub fn halves(&self) -> usize {
        1 + usize::from(self.weights.activation.gated())
    }

    /// Row of the first weight that makes feature `j` of gates (`half` 0) or ups (1).
    pub fn feature_row(&self, half: usize, j: usize) -> usize {
        match (self.weights.activation.gated(), self.weights.layout) {
            (false, _) => j,
            (true, Layout::Concatenated) => half * self.hidden + j,
            (true, Layout::Interleaved) => 2 * j + half,
        }
    }

    /// Row of the first weight behind column `i` of the pre-activation, which holds all gates, then all ups.
    pub fn column_row(&self, i: usize) -> usize {
        self.feature_row(i / self.hidden, i % self.hidden)
    }

    /// Rows of the first weight that make features `first..first + count`: gates, then ups (if gated).
    pub fn feature_rows(&self, first: usize, count: usize) -> (Vec<usize>, Vec<usize>) {
        let of = |half: usize| (first..first + count).map(|j| self.feature_row(half, j)).collect();
        (of(0), if self.halves() == 2 { of(1) } else { Vec::new() })
    }

    /// For what needs weights that it can differentiate by.
    ///
    /// # Errors
    /// int8 weights, by name.
    pub fn refuse_int8(&self) -> Result<()> {
        for (name, array) in [("gate_up", &self.weights.gate_up), ("down", &self.weights.down)] {
            if array.dtype() == Dtype::I8 {
                let allowed = format!("{}, as x: int8 weights are for inference", self.x.dtype());
                return Err(Error::dtype(name, allowed, Dtype::I8).hint("dequantise for training"));
            }
        }
        Ok(())
    }

    /// Bias of one row of the first product; 0 without biases.
    pub fn gate_up_bias<S: Float>(&self, expert: usize, row: usize) -> S::Acc {
        self.weights.gate_up_bias.as_ref().map_or(S::Acc::ZERO, |bias| bias.get::<S>(&[expert, row]).widen())
    }

    /// Bias of one output; 0 without biases.
    pub fn down_bias<S: Float>(&self, expert: usize, output: usize) -> S::Acc {
        self.weights.down_bias.as_ref().map_or(S::Acc::ZERO, |bias| bias.get::<S>(&[expert, output]).widen())
    }

    /// The pairs' weights, in pair order.
    ///
    /// # Errors
    /// Not a floating type.
    pub fn scores<A: Real>(pairs: &Pairs<'_>) -> Result<Vec<A>> {
        match pairs.scores.dtype() {
            Dtype::F32 => Ok(read::<f32, A>(&pairs.scores)),
            Dtype::F64 => Ok(read::<f64, A>(&pairs.scores)),
            Dtype::F16 => Ok(read::<f16, A>(&pairs.scores)),
            Dtype::Bf16 => Ok(read::<bf16, A>(&pairs.scores)),
            other => Err(Error::dtype("weights", "a floating type", other)),
        }
    }

    /// Multiplications of one pass over all rows, to judge whether waking threads pays.
    pub fn work(&self) -> usize {
        self.routing.count().saturating_mul(self.width).saturating_mul(self.hidden)
    }
}

fn read<F: Float, A: Real>(array: &Array<'_>) -> Vec<A> {
    let matrix = if array.shape().len() == 1 { array.vector::<F>(&[]) } else { array.matrix::<F>(&[]) };
    let mut values = Vec::with_capacity(matrix.rows() * matrix.cols());
    for i in 0..matrix.rows() {
        values.extend((0..matrix.cols()).map(|j| A::of(matrix.at(i, j).widen().f64())));
    }
    values
}

fn integers(array: &Array<'_>) -> Vec<i64> {
    fn of<T: crate::dtype::Element + Into<i64>>(array: &Array<'_>) -> Vec<i64> {
        let matrix = if array.shape().len() == 1 { array.vector::<T>(&[]) } else { array.matrix::<T>(&[]) };
        let mut values = Vec::with_capacity(matrix.rows() * matrix.cols());
        for i in 0..matrix.rows() {
            values.extend((0..matrix.cols()).map(|j| matrix.at(i, j).into()));
        }
        values
    }
    if array.dtype() == Dtype::I32 { of::<i32>(array) } else { of::<i64>(array) }
}

fn group(pairs: &Pairs<'_>, tokens: usize, experts: usize) -> Result<Routing> {
    let Pairs { ids, scores, tokens: list } = pairs;
    if !matches!(ids.dtype(), Dtype::I32 | Dtype::I64) {
        return Err(Error::dtype("expert_ids", "int32 or int64", ids.dtype()));
    }
    match list {
        None if ids.shape().len() != 2 || ids.shape()[0] != tokens => {
            return Err(Error::shape("expert_ids", format!("[{tokens}, slots], to match x"), ids.shape())
                .hint("a list of pairs [pairs] needs token_ids beside it"));
        }
        Some(_) if ids.shape().len() != 1 => {
            return Err(Error::shape("expert_ids", "[pairs], as token_ids were given", ids.shape()));
        }
        _ => {}
    }
    if scores.shape() != ids.shape() {
        return Err(Error::shape("weights", format!("{:?}, as expert_ids", ids.shape()), scores.shape()));
    }
    let Some(list) = list else {
        return Ok(Routing::new(&integers(ids), ids.shape()[1], experts));
    };
    if !matches!(list.dtype(), Dtype::I32 | Dtype::I64) {
        return Err(Error::dtype("token_ids", "int32 or int64", list.dtype()));
    }
    if list.shape() != ids.shape() {
        return Err(Error::shape("token_ids", format!("{:?}, as expert_ids", ids.shape()), list.shape()));
    }
    let mut last = 0;
    let mut of_pair = Vec::with_capacity(list.len());
    for (pair, token) in integers(list).into_iter().enumerate() {
        let Some(token) = usize::try_from(token).ok().filter(|&token| token < tokens) else {
            let got = format!("{token} at position {pair}");
            return Err(Error::value("token_ids", format!("tokens in 0..{tokens} (the rows of x)"), got));
        };
        if token < last {
            let got = format!("{token} after {last} at position {pair}");
            return Err(Error::value("token_ids", "ascending tokens", got).hint("sort the pairs by token"));
        }
        last = token;
        of_pair.push(token);
    }
    Ok(Routing::general(&integers(ids), &of_pair, tokens, experts))
}

/// (d, n)
fn check(x: &Array<'_>, weights: &Weights<'_>) -> Result<(usize, usize)> {
    let Weights { gate_up, down, gate_up_scale, down_scale, gate_up_bias, down_bias, activation, .. } = weights;
    if x.shape().len() != 2 {
        return Err(Error::shape("x", "rank 2 [tokens, width]", x.shape()).hint("flatten batch and sequence"));
    }
    if !matches!(x.dtype(), Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::Bf16) {
        return Err(Error::dtype("x", "float32, float64, float16 or bfloat16", x.dtype()));
    }
    let width = x.shape()[1];
    if gate_up.shape().len() != 3 || gate_up.shape()[2] != width {
        return Err(Error::shape("gate_up", format!("[experts, features, {width}], to match x"), gate_up.shape()));
    }
    let (experts, features) = (gate_up.shape()[0], gate_up.shape()[1]);
    if activation.gated() && !features.is_multiple_of(2) {
        return Err(Error::shape(
            "gate_up",
            "an even number of features (gates and ups) for a gated activation",
            gate_up.shape(),
        ));
    }
    let hidden = if activation.gated() { features / 2 } else { features };
    if down.shape() != [experts, width, hidden] {
        return Err(Error::shape(
            "down",
            format!("[experts, width, hidden] = [{experts}, {width}, {hidden}]"),
            down.shape(),
        ));
    }
    for (name, vectors, shape) in [
        ("gate_up_bias", gate_up_bias, [experts, features]),
        ("down_bias", down_bias, [experts, width]),
        ("gate_up_scale", gate_up_scale, [experts, features]),
        ("down_scale", down_scale, [experts, width]),
    ] {
        if let Some(vectors) = vectors
            && vectors.shape() != shape
        {
            return Err(Error::shape(name, format!("{shape:?}"), vectors.shape()));
        }
    }
    check_scale(("gate_up", gate_up), ("gate_up_scale", gate_up_scale.as_ref()), x.dtype())?;
    check_scale(("down", down), ("down_scale", down_scale.as_ref()), x.dtype())?;
    let others = [
        ("gate_up", Some(gate_up)),
        ("down", Some(down)),
        ("gate_up_bias", gate_up_bias.as_ref()),
        ("down_bias", down_bias.as_ref()),
    ];
    for (name, array) in others {
        if let Some(array) = array
            && array.dtype() != x.dtype()
            && (array.dtype() != Dtype::I8 || name.ends_with("bias"))
        {
            return Err(Error::dtype(name, format!("{}, as x", x.dtype()), array.dtype()).hint("convert one of them"));
        }
    }
    Ok((width, hidden))
}

/// A scale comes with an int8 weight and with no other.
fn check_scale(
    (name, weight): (&str, &Array<'_>),
    (scale_name, scale): (&str, Option<&Array<'_>>),
    other: Dtype,
) -> Result<()> {
    match (weight.dtype() == Dtype::I8, scale) {
        (true, None) => {
            let error = Error::dtype(name, format!("{other}, as x, where there is no {scale_name}"), Dtype::I8);
            Err(error.hint(format!("pass the {scale_name} that quantise_experts gave")))
        }
        (false, Some(_)) => Err(Error::dtype(name, format!("int8, as {scale_name} was given"), weight.dtype())),
        (true, Some(scale)) if scale.dtype() != Dtype::F32 => Err(Error::dtype(scale_name, "float32", scale.dtype())),
        _ => Ok(()),
    }
}

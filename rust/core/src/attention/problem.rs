//! What is asked: arrays and rules, checked once.

use crate::dtype::{Dtype, Flag};
use crate::error::{Error, Result};
use crate::view::{Array, Matrix};
use half::{bf16, f16};

/// Extents of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Sequences.
    pub batch: usize,
    /// Heads of Q and O.
    pub query_heads: usize,
    /// Heads of K and V; divides `query_heads`.
    pub key_heads: usize,
    /// Queries in a sequence.
    pub queries: usize,
    /// Keys in a sequence.
    pub keys: usize,
    /// Width of a query and a key.
    pub head_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
}

impl Size {
    /// Query heads that share a key/value head.
    pub fn group(&self) -> usize {
        self.query_heads / self.key_heads
    }
}

/// Rules that say which keys a query attends; all of them must agree.
#[derive(Debug, Clone, Default)]
pub struct Rules<'a> {
    /// Keep `j <= i + keys - queries` (aligned to the bottom right corner).
    pub causal: bool,
    /// Keep `j >= i + keys - queries - left`.
    pub left: Option<usize>,
    /// Keep `j <= i + keys - queries + right`.
    pub right: Option<usize>,
    /// Boolean [batch, query heads, queries, keys]; true = keep.
    pub mask: Option<Array<'a>>,
    /// Integer [batch, index heads, queries, slots]: key blocks that may be attended; negative slots are unused.
    pub block_indices: Option<Array<'a>>,
    /// Keys in a block of `block_indices`.
    pub block_size: usize,
}

/// A validated problem.
#[derive(Debug)]
pub struct Problem<'a> {
    /// [batch, query heads, queries, head dim]
    pub query: Array<'a>,
    /// [batch, key heads, keys, head dim]
    pub key: Array<'a>,
    /// [batch, key heads, keys, value dim]
    pub value: Array<'a>,
    /// Factor on the scores.
    pub scale: f64,
    /// Which keys a query attends.
    pub rules: Rules<'a>,
    /// One more logit per query head, without a value.
    pub sinks: Option<Vec<f64>>,
    /// Extents.
    pub size: Size,
    /// Type of the three arrays.
    pub dtype: Dtype,
}

impl<'a> Problem<'a> {
    /// Checks everything.
    ///
    /// # Errors
    /// Wrong ranks, extents that do not fit together, heads that do not divide, head dimensions outside 1..=512,
    /// mixed or unsupported types, a scale that is not finite, block numbers outside the keys.
    pub fn new(
        query: Array<'a>,
        key: Array<'a>,
        value: Array<'a>,
        scale: f64,
        rules: Rules<'a>,
        sinks: Option<&Array<'a>>,
    ) -> Result<Self> {
        let axes = "rank 4 [batch, heads, length, head_dim]";
        for (name, array) in [("query", &query), ("key", &key), ("value", &value)] {
            if array.shape().len() != 4 {
                return Err(
                    Error::shape(name, axes, array.shape()).hint("add the missing axes, for example query[None]")
                );
            }
        }
        let dtype = query.dtype();
        if !matches!(dtype, Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::Bf16) {
            return Err(Error::dtype("query", "float32, float64, float16 or bfloat16", dtype));
        }
        for (name, array) in [("key", &key), ("value", &value)] {
            if array.dtype() != dtype {
                return Err(Error::dtype(name, format!("{dtype}, as query"), array.dtype()).hint("convert one of them"));
            }
        }
        let ([batch, query_heads, queries, head_dim], [_, key_heads, keys, _]) = (four(&query), four(&key));
        let value_dim = value.shape()[3];
        if key.shape()[0] != batch || key.shape()[3] != head_dim {
            return Err(Error::shape(
                "key",
                format!("[{batch}, heads, keys, {head_dim}], to match query"),
                key.shape(),
            ));
        }
        if value.shape()[..3] != [batch, key_heads, keys] {
            return Err(Error::shape(
                "value",
                format!("[{batch}, {key_heads}, {keys}, value_dim], to match key"),
                value.shape(),
            ));
        }
        for (name, dim) in [("query", head_dim), ("value", value_dim)] {
            if !(1..=512).contains(&dim) {
                let got = if name == "query" { query.shape() } else { value.shape() };
                return Err(Error::shape(name, "a head dimension in 1..=512", got));
            }
        }
        if (key_heads == 0 && query_heads > 0) || (key_heads > 0 && !query_heads.is_multiple_of(key_heads)) {
            return Err(Error::shape(
                "key",
                format!("a number of heads that divides query's {query_heads}"),
                key.shape(),
            ));
        }
        if !scale.is_finite() {
            return Err(Error::value("scale", "a finite number", scale));
        }
        let size = Size { batch, query_heads, key_heads: key_heads.max(1), queries, keys, head_dim, value_dim };
        check_rules(&rules, &size)?;
        let sinks = sinks.map(|sinks| read_sinks(sinks, query_heads)).transpose()?;
        Ok(Self { query, key, value, scale, rules, sinks, size, dtype })
    }

    /// The mask's rows for one head, if there is a mask.
    pub(crate) fn mask(&self, batch: usize, head: usize) -> Option<Matrix<'a, Flag>> {
        self.rules.mask.as_ref().map(|mask| mask.matrix::<Flag>(&[batch, head]))
    }

    /// The key range that causality and window leave to query `i`.
    pub(crate) fn range(&self, i: usize) -> std::ops::Range<usize> {
        let keys = self.size.keys as i128;
        let centre = i as i128 + keys - self.size.queries as i128;
        let mut low = 0i128;
        let mut high = keys;
        if let Some(left) = self.rules.left {
            low = low.max(centre - left as i128);
        }
        if self.rules.causal {
            high = high.min(centre + 1);
        }
        if let Some(right) = self.rules.right {
            high = high.min(centre + right as i128 + 1);
        }
        let high = high.clamp(0, keys);
        (low.clamp(0, high) as usize)..(high as usize)
    }
}

fn four(array: &Array<'_>) -> [usize; 4] {
    let shape = array.shape();
    [shape[0], shape[1], shape[2], shape[3]]
}

fn check_rules(rules: &Rules<'_>, size: &Size) -> Result<()> {
    if let Some(mask) = &rules.mask {
        if mask.dtype() != Dtype::Bool {
            return Err(
                Error::dtype("mask", "bool (true = attend)", mask.dtype()).hint("an additive mask m becomes m == 0")
            );
        }
        let expected = [size.batch, size.query_heads, size.queries, size.keys];
        if mask.shape() != expected {
            return Err(Error::shape(
                "mask",
                format!("[batch, query_heads, queries, keys] = {expected:?} (broadcast)"),
                mask.shape(),
            ));
        }
    }
    let Some(blocks) = &rules.block_indices else { return Ok(()) };
    if !matches!(blocks.dtype(), Dtype::I32 | Dtype::I64) {
        return Err(Error::dtype("block_indices", "int32 or int64", blocks.dtype()));
    }
    if rules.block_size == 0 {
        return Err(Error::value("block_size", "at least 1 with block_indices", rules.block_size));
    }
    let shape = blocks.shape();
    let fits = shape.len() == 4
        && shape[0] == size.batch
        && shape[2] == size.queries
        && shape[1] > 0
        && size.query_heads.is_multiple_of(shape[1]);
    if !fits {
        let allowed = format!("[{}, index_heads dividing {}, {}, slots]", size.batch, size.query_heads, size.queries);
        return Err(Error::shape("block_indices", allowed, shape));
    }
    let count = size.keys.div_ceil(rules.block_size) as i64;
    for b in 0..shape[0] {
        for h in 0..shape[1] {
            for i in 0..shape[2] {
                for slot in 0..shape[3] {
                    let block = blocks.integer(&[b, h, i, slot]);
                    if block >= count {
                        let got = format!("{block} at [{b}, {h}, {i}, {slot}]");
                        return Err(Error::value(
                            "block_indices",
                            format!("block numbers below {count} (negative = unused)"),
                            got,
                        ));
                    }
                }
            }
        }
    }
    Ok(())
}

fn read_sinks(sinks: &Array<'_>, heads: usize) -> Result<Vec<f64>> {
    if sinks.shape() != [heads] {
        return Err(Error::shape("sinks", format!("[query_heads] = [{heads}]"), sinks.shape()));
    }
    (0..heads)
        .map(|head| match sinks.dtype() {
            Dtype::F32 => Ok(f64::from(sinks.get::<f32>(&[head]))),
            Dtype::F64 => Ok(sinks.get::<f64>(&[head])),
            Dtype::F16 => Ok(sinks.get::<f16>(&[head]).to_f64()),
            Dtype::Bf16 => Ok(sinks.get::<bf16>(&[head]).to_f64()),
            other => Err(Error::dtype("sinks", "a floating type", other)),
        })
        .collect()
}

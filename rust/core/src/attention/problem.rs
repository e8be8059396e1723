//! What is asked: arrays and rules, checked once.

use super::blocks::{Blocks, Lists};
use super::mods::Mod;
use super::sequence::{self, Accessor, Pages, Sequence};
use crate::dtype::{Dtype, Flag};
use crate::error::{Error, Result};
use crate::view::{Array, Matrix};
use half::{bf16, f16};

/// Extents of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Rows of the query array's first axis.
    pub batch: usize,
    /// Heads of Q and O.
    pub query_heads: usize,
    /// Heads of K and V; divides `query_heads`.
    pub key_heads: usize,
    /// Queries in such a row.
    pub queries: usize,
    /// Keys in a row of the key array; with pages, of the longest sequence.
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

/// Everything but the three arrays. Rules that say which keys a query attends must all agree.
#[derive(Debug, Clone)]
pub struct Rules<'a> {
    /// Factor on the scores.
    pub scale: f64,
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
    /// A block mask.
    pub lists: Option<Lists<'a>>,
    /// What a score becomes.
    pub score_mod: Option<Mod<'a>>,
    /// Which keys a query attends; with a block mask asked in its partial blocks alone.
    pub mask_mod: Option<Mod<'a>>,
    /// [query heads]: one more logit per head, without a value.
    pub sinks: Option<Array<'a>>,
    /// Probability with which a weight is dropped.
    pub dropout: f64,
    /// Seed of the dropped weights.
    pub seed: u64,
    /// [sequences, 6]; one per batch row if absent.
    pub sequences: Option<Array<'a>>,
    /// [sequences, pages]: key and value are [pages, key heads, page size, dim].
    pub table: Option<Array<'a>>,
    /// Decode: number of equal ranges that the keys are cut into; 0 = ranges of a fixed size.
    pub splits: usize,
    /// Growth of the running maximum, in powers of two, before the accumulator is rescaled.
    pub threshold: f64,
}

impl Default for Rules<'_> {
    fn default() -> Self {
        Self {
            scale: 1.0,
            causal: false,
            left: None,
            right: None,
            mask: None,
            block_indices: None,
            block_size: 0,
            lists: None,
            score_mod: None,
            mask_mod: None,
            sinks: None,
            dropout: 0.0,
            seed: 0,
            sequences: None,
            table: None,
            splits: 0,
            threshold: THRESHOLD,
        }
    }
}

/// The usual [`Rules::threshold`]: weights stay below 2^8.
pub const THRESHOLD: f64 = 8.0;

/// A validated problem.
#[derive(Debug)]
pub struct Problem<'a> {
    /// [batch, query heads, queries, head dim]
    pub query: Array<'a>,
    /// [batch, key heads, keys, head dim]; with pages [pages, key heads, page size, head dim]
    pub key: Array<'a>,
    /// As `key`, of width value dim.
    pub value: Array<'a>,
    /// The rest of the question.
    pub rules: Rules<'a>,
    /// One more logit per query head, without a value.
    pub sinks: Option<Vec<f64>>,
    /// Which rows belong together.
    pub sequences: Vec<Sequence>,
    /// Where the keys of a paged cache are.
    pub pages: Option<Pages>,
    /// The block mask.
    pub blocks: Option<Blocks>,
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
    /// mixed or unsupported types, a scale that is not finite, sequences, pages or blocks outside the arrays.
    pub fn new(query: Array<'a>, key: Array<'a>, value: Array<'a>, rules: Rules<'a>) -> Result<Self> {
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
        let paged = rules.table.is_some();
        let free = paged || rules.sequences.is_some();
        if (key.shape()[0] != batch && !free) || key.shape()[3] != head_dim {
            let lead = if free { "any".to_string() } else { batch.to_string() };
            return Err(Error::shape("key", format!("[{lead}, heads, keys, {head_dim}], to match query"), key.shape()));
        }
        if value.shape()[..3] != key.shape()[..3] {
            let [lead, _, keys, _] = four(&key);
            let allowed = format!("[{lead}, {key_heads}, {keys}, value_dim], to match key");
            return Err(Error::shape("value", allowed, value.shape()));
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
        check_numbers(&rules)?;
        let mut size = Size { batch, query_heads, key_heads: key_heads.max(1), queries, keys, head_dim, value_dim };
        if paged && rules.sequences.is_none() {
            return Err(Error::value("block_table", "sequences beside it, which say how many keys are used", "none"));
        }
        let list =
            rules.sequences.as_ref().map(|list| sequence::read(list, &size, key.shape()[0], paged)).transpose()?;
        let sequences = list.unwrap_or_else(|| sequence::whole(&size));
        let mut pages = None;
        if let Some(table) = &rules.table {
            pages = Some(Pages::read(table, &sequences, key.shape()[0], keys)?);
            size.keys = sequences.iter().map(|sequence| sequence.keys).max().unwrap_or(0);
        }
        check_rules(&rules, &size)?;
        check_mods(&rules)?;
        let blocks = rules.lists.as_ref().map(|lists| Blocks::read(lists, &size, sequences.len())).transpose()?;
        let sinks = rules.sinks.as_ref().map(|sinks| read_sinks(sinks, query_heads)).transpose()?;
        Ok(Self { query, key, value, rules, sinks, sequences, pages, blocks, size, dtype })
    }

    /// Whether some query may not attend some key.
    pub(crate) fn hides_keys(&self) -> bool {
        let rules = &self.rules;
        let bounds = rules.causal || rules.left.is_some() || rules.right.is_some();
        bounds
            || rules.mask.is_some()
            || rules.block_indices.is_some()
            || self.blocks.is_some()
            || rules.mask_mod.is_some()
    }

    /// Query heads in a packed row group.
    pub(crate) fn pack(&self) -> usize {
        if self.blocks.as_ref().is_some_and(Blocks::by_head) { 1 } else { self.size.group() }
    }

    /// The rows of `array` (keys or values) that a sequence's head reads.
    pub(crate) fn accessor<'p>(&'p self, array: &'p Array<'a>, sequence: usize, head: usize) -> Accessor<'p, 'a> {
        Accessor { array, pages: self.pages.as_ref(), number: sequence, sequence: self.sequences[sequence], head }
    }

    /// The mask's rows for one head, if there is a mask.
    pub(crate) fn mask(&self, batch: usize, head: usize) -> Option<Matrix<'a, Flag>> {
        self.rules.mask.as_ref().map(|mask| mask.matrix::<Flag>(&[batch, head]))
    }
}

fn four(array: &Array<'_>) -> [usize; 4] {
    let shape = array.shape();
    [shape[0], shape[1], shape[2], shape[3]]
}

fn check_numbers(rules: &Rules<'_>) -> Result<()> {
    if !rules.scale.is_finite() {
        return Err(Error::value("scale", "a finite number", rules.scale));
    }
    if !(0.0..=1.0).contains(&rules.dropout) {
        return Err(Error::value("dropout", "a probability in 0..=1", rules.dropout));
    }
    if !(rules.threshold >= 0.0 && rules.threshold <= 64.0) {
        return Err(Error::value("threshold", "powers of two in 0..=64", rules.threshold));
    }
    let placed = rules.sequences.is_some();
    for (name, array) in [("mask", &rules.mask), ("block_indices", &rules.block_indices)] {
        if array.is_some() && placed {
            return Err(Error::value(name, "none beside sequences", "both").hint("write it as a mask_mod"));
        }
    }
    Ok(())
}

fn check_mods(rules: &Rules<'_>) -> Result<()> {
    for (name, program, mask) in [("score_mod", &rules.score_mod, false), ("mask_mod", &rules.mask_mod, true)] {
        if let Some(program) = program
            && program.program.is_mask() != mask
        {
            let (want, got) = if mask { ("a mask", "a score") } else { ("a score", "a mask") };
            return Err(Error::value(name, format!("{want} program"), format!("{got} program")));
        }
    }
    Ok(())
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

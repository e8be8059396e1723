//! Block lists: which key blocks a block of queries visits, and which of those need no mask (FlexAttention's BlockMask).

use super::problem::Size;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::Array;

/// What a block mask consists of: `*_num` is [masks, heads, query blocks], `*_indices` [masks, heads, query blocks, slots].
#[derive(Debug, Clone)]
pub struct Lists<'a> {
    /// Number of key blocks that need the mask.
    pub partial_num: Array<'a>,
    /// Their numbers, in the first slots.
    pub partial_indices: Array<'a>,
    /// Number of key blocks that are attended whole, and their numbers.
    pub full: Option<(Array<'a>, Array<'a>)>,
    /// Queries in a block.
    pub query_block: usize,
    /// Keys in a block.
    pub key_block: usize,
}

/// A key block of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Its number.
    pub block: usize,
    /// Attended whole.
    pub full: bool,
}

/// Checked lists, ascending.
#[derive(Debug)]
pub struct Blocks {
    /// Queries in a block.
    pub query_block: usize,
    /// Keys in a block.
    pub key_block: usize,
    masks: usize,
    heads: usize,
    query_blocks: usize,
    starts: Vec<usize>,
    entries: Vec<Entry>,
}

impl Blocks {
    /// Reads the slots in use; what lies beyond may be anything.
    ///
    /// # Errors
    /// Wrong shapes or types; counts or numbers outside the blocks; a block listed twice.
    pub fn read(lists: &Lists<'_>, size: &Size, sequences: usize) -> Result<Self> {
        let (query_block, key_block) = (lists.query_block, lists.key_block);
        if query_block == 0 || key_block == 0 {
            return Err(Error::value("block_mask", "blocks of at least 1", format!("({query_block}, {key_block})")));
        }
        let (query_blocks, key_blocks) = (size.queries.div_ceil(query_block), size.keys.div_ceil(key_block));
        let shape = lists.partial_num.shape();
        let fits = shape.len() == 3
            && (shape[0] == 1 || shape[0] == sequences)
            && (shape[1] == 1 || shape[1] == size.query_heads)
            && shape[2] >= query_blocks;
        if !fits {
            let allowed = format!(
                "[1 or {sequences}, 1 or {} heads, at least {query_blocks} blocks of {query_block} queries]",
                size.query_heads
            );
            return Err(Error::shape("kv_num_blocks", allowed, shape)
                .hint("build the block mask for the lengths of query and key"));
        }
        let pairs = [
            ("kv", Some((&lists.partial_num, &lists.partial_indices))),
            ("full_kv", lists.full.as_ref().map(|(n, i)| (n, i))),
        ];
        for (name, (num, indices)) in pairs.iter().filter_map(|(name, pair)| pair.map(|pair| (name, pair))) {
            if num.shape() != shape {
                return Err(Error::shape(
                    &format!("{name}_num_blocks"),
                    format!("{shape:?}, as kv_num_blocks"),
                    num.shape(),
                ));
            }
            if indices.shape().len() != 4 || indices.shape()[..3] != *shape {
                let allowed = format!("{shape:?} and an axis of slots");
                return Err(Error::shape(&format!("{name}_indices"), allowed, indices.shape()));
            }
            for array in [num, indices] {
                if !matches!(array.dtype(), Dtype::I32 | Dtype::I64) {
                    return Err(Error::dtype(&format!("{name}_indices"), "int32 or int64", array.dtype()));
                }
            }
        }
        let (masks, heads) = (shape[0], shape[1]);
        let mut blocks =
            Self { query_block, key_block, masks, heads, query_blocks, starts: vec![0], entries: Vec::new() };
        for mask in 0..masks {
            for head in 0..heads {
                for row in 0..query_blocks {
                    let at = [mask, head, row];
                    blocks.append("kv", &lists.partial_num, &lists.partial_indices, at, key_blocks, false)?;
                    if let Some((num, indices)) = &lists.full {
                        blocks.append("full_kv", num, indices, at, key_blocks, true)?;
                    }
                    let first = blocks.starts.last().copied().unwrap_or(0);
                    let line = &mut blocks.entries[first..];
                    line.sort_unstable();
                    if let Some(twice) = line.windows(2).find(|pair| pair[0].block == pair[1].block) {
                        let got = format!("block {} twice at {at:?}", twice[0].block);
                        return Err(Error::value("kv_indices", "each key block once, partial or full", got));
                    }
                    blocks.starts.push(blocks.entries.len());
                }
            }
        }
        Ok(blocks)
    }

    fn append(
        &mut self,
        name: &str,
        num: &Array<'_>,
        indices: &Array<'_>,
        at: [usize; 3],
        key_blocks: usize,
        full: bool,
    ) -> Result<()> {
        let slots = indices.shape()[3];
        let count = usize::try_from(num.integer(&at)).ok().filter(|&count| count <= slots).ok_or_else(|| {
            let got = format!("{} at {at:?}", num.integer(&at));
            Error::value(&format!("{name}_num_blocks"), format!("counts in 0..={slots}"), got)
        })?;
        for slot in 0..count {
            let value = indices.integer(&[at[0], at[1], at[2], slot]);
            match usize::try_from(value) {
                Ok(block) if block < key_blocks => self.entries.push(Entry { block, full }),
                _ => {
                    let got = format!("{value} at [{}, {}, {}, {slot}]", at[0], at[1], at[2]);
                    let allowed = format!("block numbers in 0..{key_blocks}");
                    return Err(Error::value(&format!("{name}_indices"), allowed, got));
                }
            }
        }
        Ok(())
    }

    /// Whether heads have lists of their own.
    pub fn by_head(&self) -> bool {
        self.heads > 1
    }

    /// Key blocks of a block of queries, ascending.
    pub fn of(&self, sequence: usize, head: usize, row: usize) -> &[Entry] {
        let mask = if self.masks == 1 { 0 } else { sequence };
        let head = if self.heads == 1 { 0 } else { head };
        let at = (mask * self.heads + head) * self.query_blocks + row;
        &self.entries[self.starts[at]..self.starts[at + 1]]
    }
}

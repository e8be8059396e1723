//! Sequences: which rows of the arrays belong together, and where their keys lie.
//!
//! A dense batch, a packed one (varlen), a cache that is partly filled and a paged cache differ in this list alone.

use super::problem::Size;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::{Array, Listed, Matrix};
use std::ops::Range;

/// One sequence. Its queries and keys count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Row of the query, output and LSE arrays' first axis.
    pub query_batch: usize,
    /// First query in that row.
    pub query_start: usize,
    /// Number of queries.
    pub queries: usize,
    /// Row of the key and value arrays' first axis (unused with pages).
    pub key_batch: usize,
    /// First key in that row (unused with pages).
    pub key_start: usize,
    /// Number of keys.
    pub keys: usize,
}

impl Sequence {
    /// The key range that causality and window leave to query `i`: a query stands at `i + keys - queries`.
    pub fn range(&self, i: usize, causal: bool, left: Option<usize>, right: Option<usize>) -> Range<usize> {
        let keys = self.keys as i128;
        let centre = i as i128 + keys - self.queries as i128;
        let (mut low, mut high) = (0i128, keys);
        if let Some(left) = left {
            low = low.max(centre - left as i128);
        }
        if causal {
            high = high.min(centre + 1);
        }
        if let Some(right) = right {
            high = high.min(centre + right as i128 + 1);
        }
        let high = high.clamp(0, keys);
        (low.clamp(0, high) as usize)..(high as usize)
    }
}

/// Columns of the array that describes sequences.
const COLUMNS: [&str; 6] = ["query_batch", "query_start", "query_count", "key_batch", "key_start", "key_count"];

/// One sequence per batch row: everything attends its own row.
pub fn whole(size: &Size) -> Vec<Sequence> {
    let all = |batch| Sequence {
        query_batch: batch,
        query_start: 0,
        queries: size.queries,
        key_batch: batch,
        key_start: 0,
        keys: size.keys,
    };
    (0..size.batch).map(all).collect()
}

/// Reads and checks sequences: [n, 6] integers.
///
/// # Errors
/// Another shape or type; rows outside the arrays; two sequences that share a query.
pub fn read(array: &Array<'_>, size: &Size, key_batches: usize, paged: bool) -> Result<Vec<Sequence>> {
    if array.shape().len() != 2 || array.shape()[1] != COLUMNS.len() {
        return Err(Error::shape("sequences", format!("[sequences, 6]: {}", COLUMNS.join(", ")), array.shape()));
    }
    if !matches!(array.dtype(), Dtype::I32 | Dtype::I64) {
        return Err(Error::dtype("sequences", "int32 or int64", array.dtype()));
    }
    let mut list = Vec::with_capacity(array.shape()[0]);
    for row in 0..array.shape()[0] {
        let mut fields = [0usize; COLUMNS.len()];
        for (column, field) in fields.iter_mut().enumerate() {
            let value = array.integer(&[row, column]);
            *field = usize::try_from(value).map_err(|_| {
                Error::value(
                    "sequences",
                    "numbers of at least 0",
                    format!("{} = {value} in row {row}", COLUMNS[column]),
                )
            })?;
        }
        let [query_batch, query_start, queries, key_batch, key_start, keys] = fields;
        let outside =
            |start: usize, count: usize, extent: usize| start.checked_add(count).is_none_or(|end| end > extent);
        if (queries > 0 && query_batch >= size.batch) || outside(query_start, queries, size.queries) {
            let allowed = format!("queries inside {} rows of {}", size.batch, size.queries);
            let got = format!("query_batch {query_batch}, queries {query_start}..{query_start}+{queries} in row {row}");
            return Err(Error::value("sequences", allowed, got));
        }
        if !paged && ((keys > 0 && key_batch >= key_batches) || outside(key_start, keys, size.keys)) {
            let allowed = format!("keys inside {key_batches} rows of {}", size.keys);
            let got = format!("key_batch {key_batch}, keys {key_start}..{key_start}+{keys} in row {row}");
            return Err(Error::value("sequences", allowed, got));
        }
        list.push(Sequence { query_batch, query_start, queries, key_batch, key_start, keys });
    }
    let mut spans: Vec<_> =
        list.iter().filter(|s| s.queries > 0).map(|s| (s.query_batch, s.query_start, s.queries)).collect();
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if pair[0].0 == pair[1].0 && pair[0].1 + pair[0].2 > pair[1].1 {
            let got = format!("query {} of batch row {} in two of them", pair[1].1, pair[1].0);
            return Err(Error::value("sequences", "sequences that share no query", got));
        }
    }
    Ok(list)
}

/// A paged cache: key and value arrays are [pages, key heads, page size, dim].
#[derive(Debug)]
pub struct Pages {
    /// Keys in a page.
    pub size: usize,
    /// Pages of each sequence, in order.
    table: Vec<Vec<usize>>,
}

impl Pages {
    /// Reads the entries that sequences use; what lies beyond may be anything.
    ///
    /// # Errors
    /// A table that is too short, or entries outside the pages.
    pub fn read(table: &Array<'_>, sequences: &[Sequence], pages: usize, size: usize) -> Result<Self> {
        if table.shape().len() != 2 || table.shape()[0] != sequences.len() {
            let allowed = format!("[sequences, pages] = [{}, at least as many as the longest needs]", sequences.len());
            return Err(Error::shape("block_table", allowed, table.shape()));
        }
        if !matches!(table.dtype(), Dtype::I32 | Dtype::I64) {
            return Err(Error::dtype("block_table", "int32 or int64", table.dtype()));
        }
        let longest = sequences.iter().map(|s| s.keys).max().unwrap_or(0);
        if longest > 0 && size == 0 || longest.div_ceil(size.max(1)) > table.shape()[1] {
            let allowed = format!("room for {longest} keys in pages of {size}");
            return Err(
                Error::shape("block_table", allowed, table.shape()).hint("allocate more pages for the sequence")
            );
        }
        let entry = |row: usize, slot: usize| {
            let value = table.integer(&[row, slot]);
            usize::try_from(value).ok().filter(|&page| page < pages).ok_or_else(|| {
                Error::value("block_table", format!("pages in 0..{pages}"), format!("{value} at [{row}, {slot}]"))
            })
        };
        let row =
            |(row, s): (usize, &Sequence)| (0..s.keys.div_ceil(size.max(1))).map(|slot| entry(row, slot)).collect();
        Ok(Self { size, table: sequences.iter().enumerate().map(row).collect::<Result<_>>()? })
    }

    /// Page number of a sequence's key.
    pub fn of(&self, sequence: usize, key: usize) -> usize {
        self.table[sequence][key / self.size]
    }
}

/// Keys or values of one sequence and head: contiguous, or page by page.
#[derive(Clone, Copy)]
pub struct Accessor<'p, 'a> {
    pub(super) array: &'p Array<'a>,
    pub(super) pages: Option<&'p Pages>,
    pub(super) number: usize,
    pub(super) sequence: Sequence,
    pub(super) head: usize,
}

impl<'a> Accessor<'_, 'a> {
    /// Keys from `start` that lie evenly spaced in memory: at most `count`, at least one.
    pub fn run<T: crate::dtype::Element>(&self, start: usize, count: usize) -> Matrix<'a, T> {
        let all =
            |matrix: Matrix<'a, T>, first: usize, count: usize| matrix.part(first..first + count, 0..matrix.cols());
        match self.pages {
            None => {
                let at = self.sequence.key_start + start;
                all(self.array.matrix(&[self.sequence.key_batch, self.head]), at, count)
            }
            Some(pages) => {
                let (page, at) = (pages.of(self.number, start), start % pages.size);
                all(self.array.matrix(&[page, self.head]), at, count.min(pages.size - at))
            }
        }
    }

    /// Calls `body` with the first key (from `start`) and the memory of each evenly spaced run of `keys`.
    pub fn runs<T: crate::dtype::Element>(&self, keys: Range<usize>, mut body: impl FnMut(usize, Matrix<'a, T>)) {
        let mut key = keys.start;
        while key < keys.end {
            let run = self.run(key, keys.end - key);
            body(key, run);
            key += run.rows();
        }
    }

    /// The rows of `keys` of a paged cache, if elements of a row are adjacent.
    pub fn list<T: crate::dtype::Element>(&self, keys: Range<usize>) -> Option<Listed<'a, T>> {
        let pages = self.pages?;
        let piece = |page: usize| {
            let (start, end) = (page * pages.size, (page + 1) * pages.size);
            let (first, last) = (keys.start.max(start), keys.end.min(end));
            (pages.of(self.number, start), first - start, last - first)
        };
        Listed::new(self.array, self.head, (keys.start / pages.size..keys.end.div_ceil(pages.size)).map(piece))
    }
}

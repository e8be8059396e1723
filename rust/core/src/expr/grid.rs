//! Block masks: which blocks of a mask are partial and which are full, in time and memory O(blocks).
//!
//! ```text
//! for each strip of query-block rows (a task):
//!     visit(strip, all key blocks)
//! visit(box of blocks):
//!     by interval bounds:  empty: nothing;  full: every block of the box is full
//!     one block:           exact evaluation decides
//!     otherwise:           visit both halves of its longer side
//! ```
//! Halves are visited top before bottom and left before right, so each row's lists come out ascending. The layout is
//! that of torch's BlockMask; a ragged last block is never full, since what lies beyond it is not attended.

use super::bind::{Bound, Offence};
use super::bounds::Region;
use super::table::Op;
use super::verdict::{Classifier, Verdict};
use crate::arch::lanes::FloatLane;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::threads;
use crate::view::{Array, ArrayMut, Rows};
use std::ops::Range;

/// Rows of blocks in a task.
const STRIP: usize = 16;

/// Block counts and lists of one kind, to be filled.
pub struct Lists<'a> {
    /// int32 [batch, heads, query blocks]
    pub count: ArrayMut<'a>,
    /// int32 [batch, heads, query blocks, key blocks]; the tail becomes -1
    pub indices: ArrayMut<'a>,
}

/// Two kinds of lists of one row.
#[derive(Default)]
struct Row {
    partial: Vec<i32>,
    full: Vec<i32>,
}

struct Strip<'c, 'p, 'a, T> {
    classifier: &'c mut Classifier<'p, 'a, T>,
    batch: usize,
    head: usize,
    first: usize,
    blocks: [usize; 2],
    extents: [usize; 2],
    rows: Vec<Row>,
}

impl<T: FloatLane> Strip<'_, '_, '_, T> {
    /// Elements of a range of blocks along an axis (0 = queries, 1 = keys).
    fn elements(&self, axis: usize, blocks: &Range<usize>) -> Range<usize> {
        blocks.start * self.blocks[axis]..(blocks.end * self.blocks[axis]).min(self.extents[axis])
    }

    fn visit(&mut self, rows: Range<usize>, columns: Range<usize>) {
        let region = Region {
            batch: self.batch..self.batch + 1,
            heads: self.head..self.head + 1,
            queries: self.elements(0, &rows),
            keys: self.elements(1, &columns),
        };
        let one = rows.len() == 1 && columns.len() == 1;
        match self.classifier.classify(&region, one) {
            Verdict::Empty => {}
            Verdict::Full => {
                for row in rows {
                    for column in columns.clone() {
                        let ragged = (row + 1) * self.blocks[0] > self.extents[0]
                            || (column + 1) * self.blocks[1] > self.extents[1];
                        let lists = &mut self.rows[row - self.first];
                        if ragged { &mut lists.partial } else { &mut lists.full }.push(column as i32);
                    }
                }
            }
            Verdict::Partial if one => self.rows[rows.start - self.first].partial.push(columns.start as i32),
            Verdict::Partial if rows.len() >= columns.len() => {
                let middle = rows.start + rows.len() / 2;
                self.visit(rows.start..middle, columns.clone());
                self.visit(middle..rows.end, columns);
            }
            Verdict::Partial => {
                let middle = columns.start + columns.len() / 2;
                self.visit(rows.clone(), columns.start..middle);
                self.visit(rows, middle..columns.end);
            }
        }
    }
}

/// Whether captures that are indexed by a plain query, key, head or batch hold one for each: bounds may decide on every
/// block without looking at a single element.
fn reaches<T: FloatLane>(bound: &Bound<'_, T>) -> Result<()> {
    let (extents, nodes) = (bound.extents, bound.program.nodes());
    for (number, node) in nodes.iter().enumerate().filter(|(_, node)| node.op == Op::Gather) {
        let shape = bound.captures[node.bits as usize].shape();
        for (axis, (&arg, &extent)) in node.args.iter().zip(shape).enumerate() {
            let count = match nodes[arg as usize].op {
                Op::Batch => extents.batch,
                Op::Head => extents.heads,
                Op::Query => extents.queries,
                Op::Key => extents.keys,
                _ => 0,
            };
            if count > extent {
                let (node, capture) = (number as u32, node.bits as usize);
                bound.record(Offence { node, axis: Some((axis, extent)), capture, index: extent as i64 });
            }
        }
    }
    bound.out_of_range().map_or(Ok(()), Err)
}

/// Fills the lists of a mask's partial and full blocks. The mask's extents are those it was bound for.
///
/// # Errors
/// A block of no elements; outputs of another type or shape; an index that leaves its capture.
pub fn block_mask<T: FloatLane>(
    bound: &Bound<'_, T>,
    query_block: usize,
    key_block: usize,
    partial: Lists<'_>,
    full: Lists<'_>,
) -> Result<()> {
    if !bound.program.is_mask() {
        return Err(Error::value("program", "a mask program", "a program of another kind"));
    }
    for (name, size) in [("query_block", query_block), ("key_block", key_block)] {
        if size == 0 {
            return Err(Error::value(name, "at least 1", size));
        }
    }
    let extents = bound.extents;
    let (across, along) = (extents.queries.div_ceil(query_block), extents.keys.div_ceil(key_block));
    let shape = [extents.batch, extents.heads, across, along];
    let names = ["kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"];
    let arrays = [&partial.count, &partial.indices, &full.count, &full.indices];
    for (i, (name, array)) in names.into_iter().zip(arrays).enumerate() {
        check(name, array.dtype(), array.shape(), &shape[..3 + i % 2])?;
    }
    if i32::try_from(along).is_err() {
        return Err(Error::value("key_block", "a size that leaves fewer than 2^31 blocks", key_block));
    }
    reaches(bound)?;
    let [partial, full] = [partial, full].map(Outputs::new);
    // A mask that does not look at batch or head is classified once and copied.
    let needed = bound.program.needed();
    let reads = |op| bound.program.nodes().iter().zip(&needed).any(|(node, &needed)| needed && node.op == op);
    let batches = if reads(Op::Batch) { extents.batch } else { extents.batch.min(1) };
    let heads = if reads(Op::Head) { extents.heads } else { extents.heads.min(1) };
    let strips = across.div_ceil(STRIP);
    threads::for_each(
        batches * heads * strips,
        false,
        || Classifier::new(bound),
        |task, classifier| {
            let (line, first) = (task / strips, task % strips * STRIP);
            let (batch, head) = (line / heads, line % heads);
            let last = (first + STRIP).min(across);
            let mut strip = Strip {
                classifier,
                batch,
                head,
                first,
                blocks: [query_block, key_block],
                extents: [extents.queries, extents.keys],
                rows: (first..last).map(|_| Row::default()).collect(),
            };
            if along > 0 {
                strip.visit(first..last, 0..along);
            }
            let copies = |own: usize, computed: usize, all: usize| if computed == all { own..own + 1 } else { 0..all };
            for b in copies(batch, batches, extents.batch) {
                for h in copies(head, heads, extents.heads) {
                    for (row, lists) in strip.rows.iter().enumerate() {
                        let number = (b * extents.heads + h) * across + first + row;
                        partial.write(number, &lists.partial);
                        full.write(number, &lists.full);
                    }
                }
            }
        },
    )?;
    bound.out_of_range().map_or(Ok(()), Err)
}

struct Outputs<'a> {
    count: Rows<'a, i32>,
    indices: Rows<'a, i32>,
}

impl<'a> Outputs<'a> {
    fn new(lists: Lists<'a>) -> Self {
        Self { count: lists.count.segments(1), indices: lists.indices.rows() }
    }

    fn write(&self, row: usize, list: &[i32]) {
        self.count.take(row)[0] = list.len() as i32;
        if self.indices.width() > 0 {
            let indices = self.indices.take(row);
            indices[..list.len()].copy_from_slice(list);
            indices[list.len()..].fill(-1);
        }
    }
}

fn check(name: &str, dtype: Dtype, shape: &[usize], expected: &[usize]) -> Result<()> {
    if dtype != Dtype::I32 {
        return Err(Error::dtype(name, "int32", dtype));
    }
    if shape != expected {
        return Err(Error::shape(name, format!("{expected:?}"), shape));
    }
    Ok(())
}

/// The lists by key block from those by query block (or back): `count` [.., rows] and `indices` [.., rows, columns]
/// become [.., columns] and [.., columns, rows].
///
/// # Errors
/// Types or shapes that do not fit; a count or a block number outside.
pub fn transpose(count: &Array<'_>, indices: &Array<'_>, out: Lists<'_>) -> Result<()> {
    let Some((&columns, rest)) = indices.shape().split_last() else {
        return Err(Error::shape("indices", "rank 2 or more [.., rows, columns]", indices.shape()));
    };
    let Some((&rows, lead)) = rest.split_last() else {
        return Err(Error::shape("indices", "rank 2 or more [.., rows, columns]", indices.shape()));
    };
    check("num_blocks", count.dtype(), count.shape(), rest)?;
    check("indices", indices.dtype(), indices.shape(), indices.shape())?;
    let mut shape = [lead, &[columns, rows]].concat();
    check("out indices", out.indices.dtype(), out.indices.shape(), &shape)?;
    shape.pop();
    check("out num_blocks", out.count.dtype(), out.count.shape(), &shape)?;
    let lines: usize = lead.iter().product();
    let Outputs { count: out_count, indices: out_indices } = Outputs::new(out);
    let wrong = std::sync::Mutex::new(None);
    threads::for_each(lines, false, Vec::new, |line, place: &mut Vec<usize>| {
        let mut at = vec![0; lead.len()];
        let mut left = line;
        for (index, &extent) in at.iter_mut().zip(lead).rev() {
            *index = left % extent;
            left /= extent;
        }
        place.clear();
        place.resize(columns, 0);
        let mut lists: Vec<&mut [i32]> =
            if rows == 0 { Vec::new() } else { (0..columns).map(|c| out_indices.take(line * columns + c)).collect() };
        for row in 0..rows {
            let index = [&at[..], &[row]].concat();
            let found = count.get::<i32>(&index);
            let complain = |allowed: String, got: i32| {
                let mut slot = wrong.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                slot.get_or_insert_with(|| Error::value("block mask", allowed, format!("{got} in row {index:?}")));
            };
            let Some(found) = usize::try_from(found).ok().filter(|&found| found <= columns) else {
                complain(format!("counts of 0 to {columns} blocks"), found);
                continue;
            };
            let list = indices.vector::<i32>(&index);
            for slot in 0..found {
                let column = list.at(0, slot);
                let inside = usize::try_from(column).ok().filter(|&column| column < columns && place[column] < rows);
                let Some(inside) = inside else {
                    complain(format!("block numbers of 0 to {}, each once", columns.saturating_sub(1)), column);
                    continue;
                };
                lists[inside][place[inside]] = row as i32;
                place[inside] += 1;
            }
        }
        for (column, &filled) in place.iter().enumerate() {
            out_count.take(line * columns + column)[0] = filled as i32;
            if rows > 0 {
                lists[column][filled..].fill(-1);
            }
        }
    })?;
    wrong.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

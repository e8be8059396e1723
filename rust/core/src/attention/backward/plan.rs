//! Chunks: which tiles of queries share one dK and dV.

use crate::attention::problem::Problem;
use crate::attention::tile::{self, Tile};
use crate::gemm::arithmetic::Arithmetic;
use std::ops::Range;

/// Tasks that a problem is cut into where it has fewer heads.
const TASKS: usize = 16;
/// Most chunks of a head: each has accumulators as long as the keys it visits.
const CHUNKS: usize = 8;
/// Fewest rows in a chunk: adding its sums up must cost little beside computing them.
const ROWS: usize = 512;
/// Panels in a tile.
pub const PANELS: usize = 2;

/// One task.
pub struct Chunk {
    /// (sequence, key/value head): `sequence * key_heads + head`.
    pub place: usize,
    /// Tiles, in order.
    pub tiles: Vec<Tile>,
    /// Keys that they may visit.
    pub keys: Range<usize>,
    /// Estimated pairs of a query and a key.
    pub cost: usize,
    /// Added up with the others of its place by all threads together, at the end.
    pub joined: bool,
}

/// Up to this many places, chunks are added up at the end: with more, places keep all threads busy, and only the sums of
/// those at work take memory.
const FEW_PLACES: usize = 4;
/// Memory that copies of the captures' gradients may take, and how many there are at most.
const COPIES: (usize, usize) = (256 << 20, 16);

/// Tasks: chunks that one thread works through in order. Gradients of captures (`bytes` in all) are added up in a copy for
/// each task, so there are then as many tasks as there may be copies: a number that depends on the problem alone.
pub fn groups(chunks: &[Chunk], bytes: Option<usize>) -> Vec<Vec<usize>> {
    let Some(bytes) = bytes else {
        let mut order: Vec<usize> = (0..chunks.len()).collect();
        // The longest first; with many places one after the other.
        order.sort_by_key(|&n| (if chunks[n].joined { 0 } else { chunks[n].place }, std::cmp::Reverse(chunks[n].cost)));
        return order.into_iter().map(|number| vec![number]).collect();
    };
    let count = (COPIES.0 / bytes.max(1)).clamp(1, COPIES.1).min(chunks.len());
    (0..count).map(|first| (first..chunks.len()).step_by(count).collect()).collect()
}

/// Number of chunks of each place.
pub fn counts(chunks: &[Chunk]) -> Vec<usize> {
    let mut counts = vec![0; chunks.last().map_or(0, |chunk| chunk.place + 1)];
    chunks.iter().for_each(|chunk| counts[chunk.place] += 1);
    counts
}

/// All chunks, by place.
pub fn chunks<S: Arithmetic>(problem: &Problem<'_>) -> Vec<Chunk> {
    let size = problem.size;
    let places = problem.sequences.len() * size.key_heads;
    let mut chunks = Vec::new();
    for place in 0..places {
        let (sequence, head) = (place / size.key_heads, place % size.key_heads);
        let group = size.query_heads / size.key_heads;
        let tiles: Vec<Tile> = (head * group..(head + 1) * group)
            .step_by(problem.pack().max(1))
            .flat_map(|first| tile::cut(problem, sequence, first, PANELS * S::panel()))
            .collect();
        let spans: Vec<Span> = tiles.iter().map(|tile| Span::of(problem, tile)).collect();
        let total: usize = spans.iter().map(|span| span.cost).sum();
        let rows = problem.sequences[sequence].queries * group;
        // Not by sequences: bits must not depend on the batch.
        let count = TASKS.div_ceil(size.key_heads).min(CHUNKS).min(rows / ROWS).max(1);
        let (first, mut done, mut start) = (chunks.len(), 0, 0);
        for number in 0..count {
            let mut end = start;
            while end < tiles.len() && (number + 1 == count || done < total * (number + 1) / count) {
                done += spans[end].cost;
                end += 1;
            }
            let own = &spans[start..end];
            let low = own.iter().filter(|span| !span.keys.is_empty()).map(|span| span.keys.start).min().unwrap_or(0);
            let high = own.iter().map(|span| span.keys.end).max().unwrap_or(0);
            let cost = own.iter().map(|span| span.cost).sum();
            chunks.push(Chunk {
                place,
                tiles: tiles[start..end].to_vec(),
                keys: low..high.max(low),
                cost,
                joined: count > 1 && places <= FEW_PLACES,
            });
            start = end;
        }
        debug_assert!(start == tiles.len() && chunks.len() == first + count);
    }
    chunks
}

/// What a tile may visit.
struct Span {
    keys: Range<usize>,
    cost: usize,
}

impl Span {
    fn of(problem: &Problem<'_>, tile: &Tile) -> Self {
        let (rules, sequence) = (&problem.rules, tile.of(problem));
        let (first, last) = (tile.at(0).0, tile.at(tile.count - 1).0);
        let bounds = |query| sequence.range(query, rules.causal, rules.left, rules.right);
        let (mut low, mut high) = (bounds(first).start, bounds(last).end);
        let mut visited = high.saturating_sub(low);
        if let Some(blocks) = &problem.blocks {
            let entries = blocks.of(tile.sequence, tile.head, first / blocks.query_block);
            let size = blocks.key_block;
            low = low.max(entries.first().map_or(high, |entry| entry.block * size));
            high = high.min(entries.last().map_or(0, |entry| (entry.block + 1) * size));
            visited = visited.min(entries.len() * size);
        }
        // A unit of two keys is visited as a whole.
        let keys = low / 2 * 2..high.next_multiple_of(2).min(sequence.keys);
        Self { keys: if low < high { keys } else { 0..0 }, cost: visited * tile.count }
    }
}

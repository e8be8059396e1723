//! The tile interpreter: a program over blocks of elements, in registers that stay in the first-level cache.
//!
//! ```text
//! lanes(side):  uniform values; values of the lane side, one a lane, repeated over a chunk's rows
//! block(rows):  values of the row side, one a row
//!     for each chunk of rows (about 512 elements):
//!         values of the row side, repeated over the lanes
//!         every step over the chunk's elements
//! ```
//! Repeating a side's values over a chunk makes every operation one flat loop over whole registers.

use super::bind::{Bound, Offence};
use super::plan::{Addition, File, Finish, Rate, Slot, Source, Spread, Step, What};
use super::table::{Op, Value};
use crate::arch::lanes::{
    Addresses, Binary, Compare, FloatLane, Index, IntegerLane, Logic, Mask, Operand, TRUE, Unary,
};
use crate::view::ArrayMut;
use std::mem::take;
use std::ops::{Deref, DerefMut, Range};

/// Elements of a chunk.
const CHUNK: usize = 512;

/// One side of a block of elements.
#[derive(Debug, Clone)]
pub enum Side<'s> {
    /// Adjacent keys.
    Keys(Range<usize>),
    /// One (head, query) each.
    Queries {
        /// Query heads.
        heads: &'s [usize],
        /// Queries within their sequence.
        queries: &'s [usize],
    },
}

impl Side<'_> {
    /// Number of rows or lanes.
    pub fn len(&self) -> usize {
        match self {
            Side::Keys(keys) => keys.len(),
            Side::Queries { queries, .. } => queries.len(),
        }
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn are_keys(&self) -> bool {
        matches!(self, Side::Keys(_))
    }

    /// The number behind a leaf; lanes beyond the last repeat it.
    fn number(&self, op: Op, i: usize) -> usize {
        let i = i.min(self.len().saturating_sub(1));
        match self {
            Side::Keys(keys) => keys.start + i,
            Side::Queries { heads, queries } => *if op == Op::Head { heads } else { queries }.get(i).unwrap_or(&0),
        }
    }
}

/// The gradient of a captured array: row-major sums.
#[derive(Debug, Clone, PartialEq)]
pub struct CaptureGradient<T> {
    /// The capture's extents.
    pub shape: Vec<usize>,
    /// One sum an element.
    pub sums: Vec<T>,
}

impl<T: FloatLane> CaptureGradient<T> {
    /// Zeros.
    pub fn new(shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), sums: vec![T::ZERO; shape.iter().product()] }
    }

    /// Back to zeros.
    pub fn reset(&mut self) {
        self.sums.fill(T::ZERO);
    }

    /// Copies the sums into an array of the same shape and type.
    ///
    /// # Panics
    /// On another shape or type.
    pub fn write(&self, out: ArrayMut<'_>) {
        assert_eq!(self.shape, out.shape());
        if self.shape.is_empty() {
            // A single number is a row of one.
            out.row_of_one::<T>()[0] = self.sums[0];
            return;
        }
        let rows = out.rows::<T>();
        for (i, sums) in self.sums.chunks(rows.width().max(1)).enumerate() {
            rows.take(i).copy_from_slice(sums);
        }
    }

    /// Adds another gradient of the same shape.
    pub fn add(&mut self, other: &Self) {
        assert_eq!(self.shape, other.shape);
        self.sums.iter_mut().zip(&other.sums).for_each(|(sum, &x)| *sum = *sum + x);
    }
}

/// Values that start at a cache line, so that no vector of them straddles two.
#[derive(Debug, Default)]
struct Register<X> {
    values: Vec<X>,
    start: usize,
}

impl<X: Copy + Default> Register<X> {
    /// Makes room for `count` values; what it held may be lost.
    fn reserve(&mut self, count: usize) {
        const LINE: usize = 64;
        let spare = LINE / size_of::<X>();
        if self.values.len() < count + spare {
            self.values.resize(count + spare, X::default());
            self.start = self.values.as_ptr().align_offset(LINE).min(spare);
        }
    }
}

impl<X> Deref for Register<X> {
    type Target = [X];
    fn deref(&self) -> &[X] {
        &self.values[self.start..]
    }
}

impl<X> DerefMut for Register<X> {
    fn deref_mut(&mut self) -> &mut [X] {
        &mut self.values[self.start..]
    }
}

/// Registers.
#[derive(Debug, Default)]
struct Files<T> {
    floats: Vec<Register<T>>,
    shorts: Vec<Register<i32>>,
    longs: Vec<Register<i64>>,
    masks: Vec<Register<Mask>>,
    addresses: Vec<Addresses>,
    offsets: Vec<i64>,
}

/// What steps read beside registers.
#[derive(Clone, Copy)]
struct Elements<'e, T> {
    scores: &'e [T],
    grads: &'e [T],
    /// The block's row at which the chunk begins.
    row: usize,
}

const FILES: [File; 5] = [File::Float, File::Short, File::Long, File::Mask, File::Address];

impl<T: FloatLane> Files<T> {
    fn float<'f>(&'f self, source: Source, count: usize, elements: Elements<'f, T>) -> Operand<'f, T> {
        match source {
            Source::Slice(slot) => Operand::Slice(&self.floats[slot.index][..count]),
            Source::Splat(slot) => Operand::Splat(self.floats[slot.index][0]),
            Source::Score => Operand::Slice(elements.scores),
            Source::Grad => Operand::Slice(elements.grads),
        }
    }

    fn short(&self, source: Source, count: usize) -> Operand<'_, i32> {
        match source {
            Source::Slice(slot) => Operand::Slice(&self.shorts[slot.index][..count]),
            Source::Splat(slot) => Operand::Splat(self.shorts[slot.index][0]),
            other => unreachable!("{other:?} is no integer"),
        }
    }

    fn long(&self, source: Source, count: usize) -> Operand<'_, i64> {
        match source {
            Source::Slice(slot) => Operand::Slice(&self.longs[slot.index][..count]),
            Source::Splat(slot) => Operand::Splat(self.longs[slot.index][0]),
            other => unreachable!("{other:?} is no integer"),
        }
    }

    fn mask(&self, source: Source, count: usize) -> Operand<'_, Mask> {
        match source {
            Source::Slice(slot) => Operand::Slice(&self.masks[slot.index][..count]),
            Source::Splat(slot) => Operand::Splat(self.masks[slot.index][0]),
            other => unreachable!("{other:?} is no truth value"),
        }
    }

    fn indices(&self, sources: &[Source], count: usize) -> Vec<Index<'_>> {
        let index = |&source: &Source| match source.file() {
            File::Short => Index::Short(self.short(source, count)),
            _ => Index::Long(self.long(source, count)),
        };
        sources.iter().map(index).collect()
    }

    /// An integer operand's value at an element.
    fn integer(&self, source: Source, i: usize) -> i64 {
        match source {
            Source::Slice(Slot { file: File::Short, index }) => i64::from(self.shorts[index][i]),
            Source::Splat(Slot { file: File::Short, index }) => i64::from(self.shorts[index][0]),
            Source::Slice(slot) => self.longs[slot.index][i],
            Source::Splat(slot) => self.longs[slot.index][0],
            other => unreachable!("{other:?} is no integer"),
        }
    }

    /// Makes room for `count` values in a slot.
    fn reserve(&mut self, file: File, index: usize, count: usize) {
        match file {
            File::Float => self.floats[index].reserve(count),
            File::Short => self.shorts[index].reserve(count),
            File::Long => self.longs[index].reserve(count),
            File::Mask => self.masks[index].reserve(count),
            File::Address => {}
        }
    }

    fn copy_lanes(&mut self, (from, to): Spread, width: usize, rows: usize) {
        fn repeat<X: Copy + Default>(values: &mut [Register<X>], from: usize, to: usize, width: usize, rows: usize) {
            let mut out = take(&mut values[to]);
            for row in out[..rows * width].chunks_exact_mut(width) {
                row.copy_from_slice(&values[from][..width]);
            }
            values[to] = out;
        }
        match from.file {
            File::Float => repeat(&mut self.floats, from.index, to.index, width, rows),
            File::Short => repeat(&mut self.shorts, from.index, to.index, width, rows),
            File::Long => repeat(&mut self.longs, from.index, to.index, width, rows),
            File::Mask => repeat(&mut self.masks, from.index, to.index, width, rows),
            File::Address => {}
        }
    }

    fn spread_rows(&mut self, (from, to): Spread, width: usize, rows: Range<usize>) {
        let count = rows.len() * width;
        match from.file {
            File::Float => {
                let mut out = take(&mut self.floats[to.index]);
                T::floats().spread(&self.floats[from.index][rows], width, &mut out[..count]);
                self.floats[to.index] = out;
            }
            File::Short => {
                let mut out = take(&mut self.shorts[to.index]);
                i32::integers().spread(&self.shorts[from.index][rows], width, &mut out[..count]);
                self.shorts[to.index] = out;
            }
            File::Long => {
                let mut out = take(&mut self.longs[to.index]);
                i64::integers().spread(&self.longs[from.index][rows], width, &mut out[..count]);
                self.longs[to.index] = out;
            }
            File::Mask => {
                let mut out = take(&mut self.masks[to.index]);
                Logic::table().spread(&self.masks[from.index][rows], width, &mut out[..count]);
                self.masks[to.index] = out;
            }
            File::Address => {}
        }
    }
}

/// Which elements count: the first `count` of every `period`; the others stand in lanes beyond the last.
#[derive(Clone, Copy)]
struct Valid {
    period: usize,
    count: usize,
}

/// An evaluator of one thread, with its registers.
pub struct Evaluator<'p, 'a, T> {
    bound: &'p Bound<'a, T>,
    files: Files<T>,
    batch: usize,
    /// Lanes that count; the others of the width repeat the last.
    lanes: usize,
    lanes_are_keys: bool,
    width: usize,
    /// The width and orientation for which the lane side is computed; 0 if it is not.
    ready: usize,
    numbers: [Vec<usize>; 2],
    sums: Vec<T>,
}

impl<'p, 'a, T: FloatLane> Evaluator<'p, 'a, T> {
    /// Registers for a program.
    pub fn new(bound: &'p Bound<'a, T>) -> Self {
        let mut files = Files::default();
        let count = |file: File| bound.plan.slots[file as usize].len();
        files.floats.resize_with(count(File::Float), Register::default);
        files.shorts.resize_with(count(File::Short), Register::default);
        files.longs.resize_with(count(File::Long), Register::default);
        files.masks.resize_with(count(File::Mask), Register::default);
        files.addresses.resize_with(count(File::Address), Addresses::default);
        let numbers = [Vec::new(), Vec::new()];
        Self { bound, files, batch: 0, lanes: 0, lanes_are_keys: false, width: 0, ready: 0, numbers, sums: Vec::new() }
    }

    /// Sets the lane side of the blocks that follow, and their batch.
    pub fn lanes(&mut self, batch: usize, lanes: Side<'_>) {
        self.batch = batch;
        self.lanes = lanes.len();
        self.lanes_are_keys = lanes.are_keys();
        self.ready = 0;
        for (kept, op) in self.numbers.iter_mut().zip([Op::Head, Op::Query]) {
            kept.clear();
            // Keys are adjacent: their first is enough.
            let count = if self.lanes_are_keys { 1 } else { lanes.len() };
            kept.extend((0..count).map(|i| lanes.number(op, i)));
        }
    }

    /// Computes what depends on lanes alone, once the width is known.
    fn prepare(&mut self, width: usize) {
        assert!(width >= self.lanes && width > 0, "{} lanes in a width of {width}", self.lanes);
        if self.ready == width {
            return;
        }
        (self.ready, self.width) = (width, width);
        let bound = self.bound;
        let plan = &bound.plan;
        let chunk = self.chunk_rows() * width;
        for (file, rates) in FILES.into_iter().zip(&plan.slots) {
            for (index, &rate) in rates.iter().enumerate() {
                let count = match rate {
                    Rate::Uniform => 1,
                    Rate::Both => chunk,
                    rate if (rate == Rate::Keys) == self.lanes_are_keys => width,
                    _ => 0,
                };
                self.files.reserve(file, index, count);
            }
        }
        if self.files.offsets.len() < chunk {
            self.files.offsets.resize(chunk, 0);
        }
        let numbers = take(&mut self.numbers);
        let nothing = Elements { scores: &[], grads: &[], row: 0 };
        let side = if self.lanes_are_keys {
            Side::Keys(numbers[0][0]..numbers[0][0] + self.lanes)
        } else {
            Side::Queries { heads: &numbers[0], queries: &numbers[1] }
        };
        for step in &plan.uniform {
            self.step(step, &side, 1, Valid { period: 1, count: 1 }, nothing);
        }
        let (steps, spreads) =
            if self.lanes_are_keys { (&plan.keys, &plan.key_spreads) } else { (&plan.queries, &plan.query_spreads) };
        for step in steps {
            self.step(step, &side, width, Valid { period: width, count: self.lanes }, nothing);
        }
        let rows = self.chunk_rows();
        for &spread in spreads {
            self.files.copy_lanes(spread, width, rows);
        }
        self.numbers = numbers;
    }

    fn chunk_rows(&self) -> usize {
        (CHUNK / self.width).max(1)
    }

    /// Calls `body(evaluator, scores, block)` on the part of each chunk after its steps, until it returns false.
    fn chunks(
        &mut self,
        rows: &Side<'_>,
        width: usize,
        scores: Option<&[T]>,
        block: &mut [T],
        mut body: impl FnMut(&mut Self, &[T], &mut [T]) -> bool,
    ) {
        assert!(rows.are_keys() != self.lanes_are_keys, "rows and lanes are one side");
        let count = rows.len();
        assert!(block.len() >= count * width && scores.is_none_or(|scores| scores.len() >= count * width));
        if count == 0 {
            return;
        }
        self.prepare(width);
        let bound = self.bound;
        let plan = &bound.plan;
        let row_rate = if self.lanes_are_keys { Rate::Queries } else { Rate::Keys };
        for (file, rates) in FILES.into_iter().zip(&plan.slots) {
            for (index, _) in rates.iter().enumerate().filter(|&(_, &rate)| rate == row_rate) {
                self.files.reserve(file, index, count);
            }
        }
        if self.files.offsets.len() < count {
            self.files.offsets.resize(count, 0);
        }
        let (steps, spreads) =
            if self.lanes_are_keys { (&plan.queries, &plan.query_spreads) } else { (&plan.keys, &plan.key_spreads) };
        for step in steps {
            self.step(step, rows, count, Valid { period: count, count }, Elements { scores: &[], grads: &[], row: 0 });
        }
        let at_once = self.chunk_rows();
        let mut first = 0;
        while first < count {
            let last = (first + at_once).min(count);
            for &spread in spreads {
                self.files.spread_rows(spread, width, first..last);
            }
            let elements = first * width..last * width;
            let (before, part) = (scores.map(|scores| &scores[elements.clone()]), &mut block[elements]);
            let valid = Valid { period: width, count: self.lanes };
            for (i, step) in plan.both.iter().enumerate() {
                if plan.finish == Finish::Write && i + 1 == plan.both.len() {
                    let elements = Elements { scores: before.unwrap_or(&[]), grads: &[], row: first };
                    self.float_step(step, valid, elements, part);
                    break;
                }
                let elements = match before {
                    Some(scores) => Elements { scores, grads: part, row: first },
                    None => Elements { scores: part, grads: &[], row: first },
                };
                self.step(step, rows, (last - first) * width, valid, elements);
            }
            self.update(plan.finish, before.unwrap_or(&[]), part, first);
            if !body(self, before.unwrap_or(&[]), part) {
                break;
            }
            first = last;
        }
    }

    /// A last operation on the block itself.
    fn update(&self, finish: Finish, scores: &[T], part: &mut [T], row: usize) {
        let elements = Elements { scores, grads: &[], row };
        let operand = |source: Source| self.files.float(source, part.len(), elements);
        match finish {
            Finish::Copy | Finish::Write => {}
            Finish::Update { op, own, other } => {
                T::floats().update(binary(op).unwrap_or(Binary::Add), own, operand(other), part);
            }
            Finish::AddProduct(a, b) => T::floats().add_product(operand(a), operand(b), part),
        }
    }

    /// The modified score in place: `block` [rows, width] holds `scale * q.k`.
    pub fn score(&mut self, rows: Side<'_>, block: &mut [T], width: usize) {
        let result = self.bound.plan.result.unwrap_or(Source::Score);
        if result == Source::Score {
            return;
        }
        self.chunks(&rows, width, None, block, |own, _, part| {
            own.write(result, part);
            true
        });
    }

    fn write(&self, result: Source, part: &mut [T]) {
        match result {
            Source::Slice(_) if self.bound.plan.finish != Finish::Copy => {}
            Source::Slice(slot) => part.copy_from_slice(&self.files.floats[slot.index][..part.len()]),
            Source::Splat(slot) => part.fill(self.files.floats[slot.index][0]),
            Source::Score | Source::Grad => {}
        }
    }

    /// Writes `blank` into the elements of `block` [rows, width] whose mask is false.
    pub fn mask(&mut self, rows: Side<'_>, block: &mut [T], width: usize, blank: T) {
        let result = self.bound.plan.result.unwrap_or(Source::Score);
        self.chunks(&rows, width, None, block, |own, _, part| {
            match own.files.mask(result, part.len()) {
                Operand::Slice(mask) => T::floats().blank(mask, blank, part),
                Operand::Splat(0) => part.fill(blank),
                Operand::Splat(_) => {}
            }
            true
        });
    }

    /// The truth values of a mask by chunks of whole rows, until `seen` returns false. `block` [rows, width] is not read.
    pub(super) fn truths(
        &mut self,
        rows: Side<'_>,
        width: usize,
        block: &mut [T],
        mut seen: impl FnMut(Operand<'_, Mask>, usize) -> bool,
    ) {
        let result = self.bound.plan.result.unwrap_or(Source::Score);
        self.chunks(&rows, width, None, block, |own, _, part| seen(own.files.mask(result, part.len()), part.len()));
    }

    /// A gradient program: `scores` are the unmodified scaled scores, `grads` the derivatives by the modified ones, which
    /// become those by the scores. Gradients of captures are added in the order of the elements; `None` is left out.
    pub fn gradient(
        &mut self,
        rows: Side<'_>,
        scores: &[T],
        grads: &mut [T],
        width: usize,
        captures: &mut [Option<&mut CaptureGradient<T>>],
    ) {
        let bound = self.bound;
        let plan = &bound.plan;
        let result = plan.result.unwrap_or(Source::Grad);
        self.chunks(&rows, width, Some(scores), grads, |own, scores, part| {
            let elements = Elements { scores, grads: part, row: 0 };
            for addition in &plan.additions {
                if let Some(Some(gradient)) = captures.get_mut(addition.capture) {
                    own.add(addition, part.len(), elements, gradient);
                }
            }
            if result == Source::Score {
                part.copy_from_slice(scores);
            }
            own.write(result, part);
            true
        });
    }

    /// Adds a chunk's elements into a capture's gradient: by lanes first where the place depends on the lane alone, by
    /// rows first where it does not depend on the lane, in the order of the elements otherwise.
    fn add(&mut self, addition: &Addition, count: usize, elements: Elements<'_, T>, gradient: &mut CaptureGradient<T>) {
        let (width, lanes) = (self.width, self.lanes);
        let lane_rate = if self.lanes_are_keys { Rate::Keys } else { Rate::Queries };
        let mut offsets = take(&mut self.files.offsets);
        // Every row has the same places, or every element its own.
        let places = if addition.rate == lane_rate { width } else { count };
        let indices = self.files.indices(&addition.index, places);
        if !Logic::table().offsets(&gradient.shape, &indices, &mut offsets[..places]) {
            let index = addition.index.iter().copied().enumerate();
            self.blame(addition.node, addition.capture, index, count, Valid { period: width, count: lanes });
        }
        let mut sums = take(&mut self.sums);
        sums.clear();
        if !gradient.sums.is_empty() {
            let splat;
            let values = match self.files.float(addition.value, count, elements) {
                Operand::Slice(values) => values,
                Operand::Splat(value) => {
                    splat = vec![value; count];
                    &splat
                }
            };
            let mut put = |place: i64, value: T| {
                let sum = &mut gradient.sums[place as usize];
                *sum = *sum + value;
            };
            if addition.rate == lane_rate {
                sums.resize(lanes, T::ZERO);
                for row in values.chunks_exact(width) {
                    sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum = *sum + x);
                }
                sums.iter().zip(&offsets).for_each(|(&sum, &place)| put(place, sum));
            } else if addition.rate == Rate::Both {
                for (row, places) in values.chunks_exact(width).zip(offsets.chunks_exact(width)) {
                    row[..lanes].iter().zip(places).for_each(|(&x, &place)| put(place, x));
                }
            } else {
                for (row, places) in values.chunks_exact(width).zip(offsets.chunks_exact(width)) {
                    put(places[0], total(&row[..lanes]));
                }
            }
        }
        (self.sums, self.files.offsets) = (sums, offsets);
    }

    /// Runs one step over `count` elements.
    fn step(&mut self, step: &Step, side: &Side<'_>, count: usize, valid: Valid, elements: Elements<'_, T>) {
        match step.to.file {
            File::Float => {
                let mut values = take(&mut self.files.floats[step.to.index]);
                self.float_step(step, valid, elements, &mut values[..count]);
                self.files.floats[step.to.index] = values;
            }
            File::Address => self.address_step(step, count, valid),
            File::Short => self.short_step(step, side, count, valid, elements),
            File::Long => self.long_step(step, side, count, valid, elements),
            File::Mask => self.mask_step(step, count, valid, elements),
        }
    }

    /// Addresses of one side.
    fn address_step(&mut self, step: &Step, count: usize, valid: Valid) {
        let What::Address(capture, axes) = step.what else { unreachable!("{:?} makes no address", step.what) };
        let array = &self.bound.captures[capture];
        let mut addresses = take(&mut self.files.addresses[step.to.index]);
        let axes: Vec<usize> = (0..array.shape().len()).filter(|axis| axes >> axis & 1 == 1).collect();
        let indices = axes.iter().copied().zip(self.files.indices(&step.from, count)).collect::<Vec<_>>();
        if !addresses.compute(array, &indices, count) {
            self.blame(step.node, capture, axes.into_iter().zip(step.from.iter().copied()), count, valid);
        }
        self.files.addresses[step.to.index] = addresses;
    }

    /// Row and lane addresses of a gather, and the row at which the chunk begins.
    fn tile_addresses(&self, step: &Step) -> (&Addresses, &Addresses) {
        let [Source::Slice(queries), Source::Slice(keys)] = step.from[..] else {
            unreachable!("a gather by sides reads two addresses")
        };
        let (queries, keys) = (&self.files.addresses[queries.index], &self.files.addresses[keys.index]);
        if self.lanes_are_keys { (queries, keys) } else { (keys, queries) }
    }

    fn float_step(&mut self, step: &Step, valid: Valid, elements: Elements<'_, T>, out: &mut [T]) {
        let count = out.len();
        let (table, files, from) = (T::floats(), &self.files, &step.from);
        let float = |i: usize| files.float(from[i], count, elements);
        match step.what {
            What::GatherTile(capture) => {
                let array = &self.bound.captures[capture];
                if array.is_empty() {
                    out.fill(T::ZERO);
                } else {
                    let (rows, lanes) = self.tile_addresses(step);
                    table.gather_tile(array, rows, elements.row, lanes, out);
                }
            }
            What::Constant(Value::Float(x)) => out.fill(T::of(x)),
            What::Gather(capture) => {
                let mut offsets = take(&mut self.files.offsets);
                let array = &self.bound.captures[capture];
                let inside = if array.is_empty() {
                    out.fill(T::ZERO);
                    false
                } else {
                    let indices = self.files.indices(from, count);
                    table.gather(array, &indices, &mut offsets, out)
                };
                self.files.offsets = offsets;
                if !inside {
                    self.blame(step.node, capture, from.iter().copied().enumerate(), count, valid);
                }
            }
            What::Compute(Op::ToFloat) => match from[0].file() {
                File::Short => table.from_i32(files.short(from[0], count), out),
                File::Long => table.from_i64(files.long(from[0], count), out),
                _ => table.from_mask(files.mask(from[0], count), out),
            },
            What::Compute(Op::Where) => table.select(files.mask(from[0], count), float(1), float(2), out),
            What::Compute(op) => match (unary(op), binary(op)) {
                (Some(op), _) => table.unary(op, float(0), out),
                (_, Some(op)) => table.binary(op, float(0), float(1), out),
                _ => unreachable!("{op:?} makes no float"),
            },
            other => unreachable!("{other:?} makes no float"),
        }
    }

    fn leaf(&self, op: Op, side: &Side<'_>, i: usize) -> usize {
        if op == Op::Batch { self.batch } else { side.number(op, i) }
    }

    fn short_step(&mut self, step: &Step, side: &Side<'_>, count: usize, valid: Valid, elements: Elements<'_, T>) {
        let mut values = take(&mut self.files.shorts[step.to.index]);
        let out = &mut values[..count];
        let (table, from) = (i32::integers(), &step.from);
        match step.what {
            What::Leaf(op) => out.iter_mut().enumerate().for_each(|(i, x)| *x = self.leaf(op, side, i) as i32),
            What::GatherTile(capture) => {
                let array = &self.bound.captures[capture];
                if array.is_empty() {
                    out.fill(0);
                } else {
                    let (rows, lanes) = self.tile_addresses(step);
                    table.gather_tile(array, rows, elements.row, lanes, out);
                }
            }
            What::Constant(Value::Int(x)) => out.fill(x as i32),
            What::Gather(capture) => {
                let mut offsets = take(&mut self.files.offsets);
                let array = &self.bound.captures[capture];
                let inside = if array.is_empty() {
                    out.fill(0);
                    false
                } else {
                    table.gather(array, &self.files.indices(from, count), &mut offsets, out)
                };
                self.files.offsets = offsets;
                if !inside {
                    self.blame(step.node, capture, from.iter().copied().enumerate(), count, valid);
                }
            }
            What::Compute(Op::ToInt) => table.from_mask(self.files.mask(from[0], count), out),
            What::Compute(op) => {
                let short = |i: usize| self.files.short(from[i], count);
                let fine = match (unary(op), binary(op)) {
                    _ if op == Op::Where => {
                        table.select(self.files.mask(from[0], count), short(1), short(2), out);
                        true
                    }
                    (Some(op), _) => {
                        table.unary(op, short(0), out);
                        true
                    }
                    (_, Some(op)) => table.binary(op, short(0), short(1), out),
                    _ => unreachable!("{op:?} makes no integer"),
                };
                if !fine {
                    self.blame_division(step, count, valid);
                }
            }
            other => unreachable!("{other:?} makes no integer"),
        }
        self.files.shorts[step.to.index] = values;
    }

    fn long_step(&mut self, step: &Step, side: &Side<'_>, count: usize, valid: Valid, elements: Elements<'_, T>) {
        let mut values = take(&mut self.files.longs[step.to.index]);
        let out = &mut values[..count];
        let (table, from) = (i64::integers(), &step.from);
        match step.what {
            What::Leaf(op) => out.iter_mut().enumerate().for_each(|(i, x)| *x = self.leaf(op, side, i) as i64),
            What::GatherTile(capture) => {
                let array = &self.bound.captures[capture];
                if array.is_empty() {
                    out.fill(0);
                } else {
                    let (rows, lanes) = self.tile_addresses(step);
                    table.gather_tile(array, rows, elements.row, lanes, out);
                }
            }
            What::Constant(Value::Int(x)) => out.fill(x),
            What::Widen => Logic::table().widen(self.files.short(from[0], count), out),
            What::Gather(capture) => {
                let mut offsets = take(&mut self.files.offsets);
                let array = &self.bound.captures[capture];
                let inside = if array.is_empty() {
                    out.fill(0);
                    false
                } else {
                    table.gather(array, &self.files.indices(from, count), &mut offsets, out)
                };
                self.files.offsets = offsets;
                if !inside {
                    self.blame(step.node, capture, from.iter().copied().enumerate(), count, valid);
                }
            }
            What::Compute(Op::ToInt) => match from[0].file() {
                File::Mask => table.from_mask(self.files.mask(from[0], count), out),
                _ => T::floats().to_i64(self.files.float(from[0], count, elements), out),
            },
            What::Compute(op) => {
                let long = |i: usize| self.files.long(from[i], count);
                let fine = match (unary(op), binary(op)) {
                    _ if op == Op::Where => {
                        table.select(self.files.mask(from[0], count), long(1), long(2), out);
                        true
                    }
                    (Some(op), _) => {
                        table.unary(op, long(0), out);
                        true
                    }
                    (_, Some(op)) => table.binary(op, long(0), long(1), out),
                    _ => unreachable!("{op:?} makes no integer"),
                };
                if !fine {
                    self.blame_division(step, count, valid);
                }
            }
            other => unreachable!("{other:?} makes no integer"),
        }
        self.files.longs[step.to.index] = values;
    }

    fn mask_step(&mut self, step: &Step, count: usize, valid: Valid, elements: Elements<'_, T>) {
        let mut values = take(&mut self.files.masks[step.to.index]);
        let out = &mut values[..count];
        let (table, from) = (Logic::table(), &step.from);
        match step.what {
            What::GatherTile(capture) => {
                let array = &self.bound.captures[capture];
                if array.is_empty() {
                    out.fill(0);
                } else {
                    let (rows, lanes) = self.tile_addresses(step);
                    table.gather_tile(array, rows, elements.row, lanes, out);
                }
            }
            What::Constant(Value::Bool(x)) => out.fill(if x { TRUE } else { 0 }),
            What::Gather(capture) => {
                let mut offsets = take(&mut self.files.offsets);
                let array = &self.bound.captures[capture];
                let inside = if array.is_empty() {
                    out.fill(0);
                    false
                } else {
                    table.gather(array, &self.files.indices(from, count), &mut offsets, out)
                };
                self.files.offsets = offsets;
                if !inside {
                    self.blame(step.node, capture, from.iter().copied().enumerate(), count, valid);
                }
            }
            What::Compute(op) => {
                let mask = |i: usize| self.files.mask(from[i], count);
                match (op, from[from.len() - 1].file()) {
                    (Op::Where, _) => table.select(mask(0), mask(1), mask(2), out),
                    (Op::Not, _) => table.binary(Binary::Xor, mask(0), Operand::Splat(TRUE), out),
                    (Op::Ne, File::Mask) => table.binary(Binary::Xor, mask(0), mask(1), out),
                    (Op::Eq, File::Mask) => {
                        table.binary(Binary::Xor, mask(0), mask(1), out);
                        out.iter_mut().for_each(|x| *x = !*x);
                    }
                    (op, File::Mask) => table.binary(binary(op).unwrap_or(Binary::And), mask(0), mask(1), out),
                    (op, file) => {
                        let (op, zero) = (compare(op).unwrap_or(Compare::Ne), from.len() == 1);
                        match file {
                            File::Float => {
                                let float = |i: usize| self.files.float(from[i], count, elements);
                                let second = if zero { Operand::Splat(T::ZERO) } else { float(1) };
                                T::floats().compare(op, float(0), second, out);
                            }
                            File::Short => {
                                let second = if zero { Operand::Splat(0) } else { self.files.short(from[1], count) };
                                i32::integers().compare(op, self.files.short(from[0], count), second, out);
                            }
                            _ => {
                                let second = if zero { Operand::Splat(0) } else { self.files.long(from[1], count) };
                                i64::integers().compare(op, self.files.long(from[0], count), second, out);
                            }
                        }
                    }
                }
            }
            other => unreachable!("{other:?} makes no truth value"),
        }
        self.files.masks[step.to.index] = values;
    }

    /// Looks for the first index that left its capture among the elements that count; `indices` are (axis, source).
    #[cold]
    fn blame(
        &self,
        node: u32,
        capture: usize,
        indices: impl Iterator<Item = (usize, Source)>,
        count: usize,
        valid: Valid,
    ) {
        for (axis, source) in indices {
            let extent = self.bound.captures[capture].shape()[axis];
            let signed = extent as i64;
            let outside = |&i: &usize| {
                let index = self.files.integer(source, i);
                i % valid.period < valid.count && (index >= signed || index < -signed)
            };
            if let Some(i) = (0..count).find(outside) {
                let index = self.files.integer(source, i);
                self.bound.record(Offence { node, axis: Some((axis, extent)), capture, index });
            }
        }
    }

    #[cold]
    fn blame_division(&self, step: &Step, count: usize, valid: Valid) {
        let zero = |i: usize| self.files.integer(step.from[1], i) == 0;
        if (0..count).any(|i| i % valid.period < valid.count && zero(i)) {
            self.bound.record(Offence { node: step.node, axis: None, capture: 0, index: 0 });
        }
    }
}

/// The sum of a row, in an order that depends on its length alone.
fn total<T: FloatLane>(row: &[T]) -> T {
    let mut sums = [T::ZERO; 8];
    for part in row.chunks(8) {
        sums.iter_mut().zip(part).for_each(|(sum, &x)| *sum = *sum + x);
    }
    sums.into_iter().fold(T::ZERO, |sum, x| sum + x)
}

fn unary(op: Op) -> Option<Unary> {
    Some(match op {
        Op::Neg => Unary::Neg,
        Op::Abs => Unary::Abs,
        Op::Sign => Unary::Sign,
        Op::Floor => Unary::Floor,
        Op::Ceil => Unary::Ceil,
        Op::Round => Unary::Round,
        Op::Trunc => Unary::Trunc,
        Op::Sqrt => Unary::Sqrt,
        Op::Rsqrt => Unary::Rsqrt,
        Op::Reciprocal => Unary::Reciprocal,
        Op::Exp => Unary::Exp,
        Op::Exp2 => Unary::Exp2,
        Op::Expm1 => Unary::Expm1,
        Op::Log => Unary::Log,
        Op::Log2 => Unary::Log2,
        Op::Log1p => Unary::Log1p,
        Op::Sin => Unary::Sin,
        Op::Cos => Unary::Cos,
        Op::Tan => Unary::Tan,
        Op::Tanh => Unary::Tanh,
        Op::Sigmoid => Unary::Sigmoid,
        Op::Erf => Unary::Erf,
        Op::Relu => Unary::Relu,
        Op::Square => Unary::Square,
        _ => return None,
    })
}

fn binary(op: Op) -> Option<Binary> {
    Some(match op {
        Op::Add => Binary::Add,
        Op::Sub => Binary::Sub,
        Op::Mul => Binary::Mul,
        Op::Min => Binary::Min,
        Op::Max => Binary::Max,
        Op::Div => Binary::Div,
        Op::Atan2 => Binary::Atan2,
        Op::Pow => Binary::Pow,
        Op::FloorDiv => Binary::FloorDiv,
        Op::Mod => Binary::Mod,
        Op::TruncDiv => Binary::TruncDiv,
        Op::And => Binary::And,
        Op::Or => Binary::Or,
        Op::Xor => Binary::Xor,
        Op::Shl => Binary::Shl,
        Op::Shr => Binary::Shr,
        _ => return None,
    })
}

fn compare(op: Op) -> Option<Compare> {
    Some(match op {
        Op::Lt => Compare::Lt,
        Op::Le => Compare::Le,
        Op::Gt => Compare::Gt,
        Op::Ge => Compare::Ge,
        Op::Eq => Compare::Eq,
        Op::Ne | Op::ToBool => Compare::Ne,
        _ => return None,
    })
}

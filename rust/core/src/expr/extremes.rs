//! Least and largest elements of a captured array over ranges of its last axis.
//!
//! A pyramid a row: leaves over [`LEAF`] elements, each level above over twice as many. Memory is a fraction of the
//! array's, a query costs the logarithm of its length.

use super::bounds::Span;
use super::table::{Class, Value};
use crate::dtype::{Dtype, Element, Flag, Float};
use crate::view::Array;
use half::{bf16, f16};

/// Elements under a leaf.
const LEAF: usize = 16;
/// Arrays with more elements are not searched: exact evaluation decides sooner.
const MOST: usize = 1 << 22;

/// The pyramids of all rows of an array.
#[derive(Debug)]
pub struct Extremes {
    class: Class,
    lead: Vec<usize>,
    width: usize,
    /// By row; a level's entries one after another, leaves first.
    rows: Vec<Vec<Vec<Span>>>,
    whole: Span,
}

impl Extremes {
    /// Searches an array, unless it is huge.
    pub fn of(array: &Array<'_>) -> Option<Self> {
        if array.len() > MOST {
            return None;
        }
        Some(match array.dtype() {
            Dtype::F32 => Self::build(array, Class::Float, |x: f32| Value::Float(f64::from(x))),
            Dtype::F64 => Self::build(array, Class::Float, Value::Float),
            Dtype::F16 => Self::build(array, Class::Float, |x: f16| Value::Float(f64::from(x.widen()))),
            Dtype::Bf16 => Self::build(array, Class::Float, |x: bf16| Value::Float(f64::from(x.widen()))),
            Dtype::I8 => Self::build(array, Class::Int, |x: i8| Value::Int(i64::from(x))),
            Dtype::I32 => Self::build(array, Class::Int, |x: i32| Value::Int(i64::from(x))),
            Dtype::I64 => Self::build(array, Class::Int, Value::Int),
            Dtype::Bool => Self::build(array, Class::Bool, |x: Flag| Value::Bool(x.get())),
        })
    }

    fn build<S: Element>(array: &Array<'_>, class: Class, value: impl Fn(S) -> Value) -> Self {
        let nothing = Span::nothing(class);
        if array.shape().is_empty() {
            let whole = Span::of(value(array.get::<S>(&[])));
            return Self { class, lead: Vec::new(), width: 1, rows: vec![vec![vec![whole]]], whole };
        }
        let (lead, width) = (array.shape()[..array.shape().len() - 1].to_vec(), array.shape()[array.shape().len() - 1]);
        let mut rows = Vec::new();
        let mut whole = nothing;
        let count = if width == 0 { 0 } else { lead.iter().product() };
        let mut at = vec![0; lead.len()];
        for _ in 0..count {
            let line = array.vector::<S>(&at);
            let span = |range: std::ops::Range<usize>| match line.row(0) {
                Some(row) => row[range].iter().fold(nothing, |span, &x| span.or(Span::of(value(x)))),
                None => range.fold(nothing, |span, i| span.or(Span::of(value(line.at(0, i))))),
            };
            let mut levels = vec![
                (0..width.div_ceil(LEAF)).map(|i| span(i * LEAF..((i + 1) * LEAF).min(width))).collect::<Vec<Span>>(),
            ];
            while levels[levels.len() - 1].len() > 1 {
                let below = &levels[levels.len() - 1];
                levels.push(below.chunks(2).map(|pair| pair.iter().fold(nothing, |span, &x| span.or(x))).collect());
            }
            whole = whole.or(levels[levels.len() - 1][0]);
            rows.push(levels);
            for (index, &extent) in at.iter_mut().zip(&lead).rev() {
                *index += 1;
                if *index < extent {
                    break;
                }
                *index = 0;
            }
        }
        Self { class, lead, width, rows, whole }
    }

    /// Over the whole array.
    pub fn whole(&self) -> Span {
        self.whole
    }

    /// What a gather can read: `indices` says where its indices point, one span an axis. Indices may be outside: those
    /// read anything of the array (the evaluation reports them).
    pub fn over(&self, indices: &[Span]) -> Span {
        let Some((&last, lead)) = indices.split_last() else { return self.whole };
        let mut row = 0;
        for (span, &extent) in lead.iter().zip(&self.lead) {
            match inside(*span, extent) {
                Some((low, high)) if low == high => row = row * extent + low,
                _ => return self.whole,
            }
        }
        match inside(last, self.width) {
            Some((low, high)) => self.row(row, low, high),
            None => self.whole,
        }
    }

    fn row(&self, row: usize, low: usize, high: usize) -> Span {
        // Whole leaves: a little too much at the ends is sound.
        let (mut low, mut high) = (low / LEAF, high / LEAF + 1);
        let mut span = Span::nothing(self.class);
        for level in &self.rows[row] {
            if low >= high {
                break;
            }
            if low % 2 == 1 {
                span = span.or(level[low]);
                low += 1;
            }
            if high % 2 == 1 {
                high -= 1;
                span = span.or(level[high]);
            }
            low /= 2;
            high /= 2;
        }
        span
    }
}

/// A span of indices as a range of elements, negative ones wrapped; `None` unless all of them are elements.
fn inside(span: Span, extent: usize) -> Option<(usize, usize)> {
    let Span::Int { low, high } = span else { return None };
    let extent = i64::try_from(extent).ok()?;
    let (low, high) = if high < 0 { (low.checked_add(extent)?, high + extent) } else { (low, high) };
    (low >= 0 && high < extent && low <= high).then_some((low as usize, high as usize))
}

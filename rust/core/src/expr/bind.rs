//! A program with its captured arrays and the extents it runs over, validated.

use super::bounds::{Region, Span, spans};
use super::extremes::Extremes;
use super::graph::Node;
use super::lower::lowered;
use super::plan::Plan;
use super::program::{CaptureSpec, Program};
use super::table::{Class, Op};
use crate::arch::lanes::FloatLane;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::Array;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Extents of the elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extents {
    /// Batches.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Queries of a sequence.
    pub queries: usize,
    /// Keys of a sequence.
    pub keys: usize,
}

/// Up to this many elements, 64-bit captures are searched for their range when they are bound: it decides whether
/// their integers fit 32 bits.
const SEARCHED: usize = 1 << 20;

/// What an evaluation ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Offence {
    /// The node that was computed.
    pub node: u32,
    /// Axis and extent of the capture; `None` for a division by zero.
    pub axis: Option<(usize, usize)>,
    /// Number of the capture.
    pub capture: usize,
    /// The index.
    pub index: i64,
}

/// A program bound to its arrays.
#[derive(Debug)]
pub struct Bound<'a, T> {
    pub(super) name: String,
    pub(super) program: Program,
    pub(super) captures: Vec<Array<'a>>,
    pub(super) extents: Extents,
    pub(super) plan: Plan,
    extremes: Vec<OnceLock<Option<Extremes>>>,
    offended: AtomicBool,
    offence: Mutex<Option<Offence>>,
    marker: PhantomData<T>,
}

fn accepts(class: Class, dtype: Dtype) -> bool {
    match class {
        Class::Float => matches!(dtype, Dtype::F32 | Dtype::F64 | Dtype::F16 | Dtype::Bf16),
        Class::Int => matches!(dtype, Dtype::I8 | Dtype::I32 | Dtype::I64),
        Class::Bool => dtype == Dtype::Bool,
    }
}

fn check(name: &str, number: usize, spec: &CaptureSpec, array: &Array<'_>) -> Result<()> {
    let argument = format!("{name}, capture {number}");
    if array.shape().len() != spec.rank {
        return Err(Error::shape(
            &argument,
            format!("rank {}, as the program was traced with", spec.rank),
            array.shape(),
        ));
    }
    if accepts(spec.class, array.dtype()) {
        return Ok(());
    }
    let allowed = match spec.class {
        Class::Float => "float32, float64, float16 or bfloat16",
        Class::Int => "int64, int32 or int8",
        Class::Bool => "bool",
    };
    Err(Error::dtype(&argument, format!("{allowed}, as the program was traced with"), array.dtype()))
}

impl<'a, T: FloatLane> Bound<'a, T> {
    /// Checks the arrays and compiles the program. `name` is what errors call it, for example "score_mod".
    ///
    /// # Errors
    /// Another number of captures than the program has; a rank or a type that does not fit.
    pub fn new(name: &str, program: &Program, captures: Vec<Array<'a>>, extents: Extents) -> Result<Self> {
        let specs = program.captures();
        if specs.len() != captures.len() {
            let argument = format!("{name}_captures");
            return Err(Error::value(&argument, format!("{} arrays", specs.len()), captures.len()));
        }
        for (number, (spec, array)) in specs.iter().zip(&captures).enumerate() {
            check(name, number, spec, array)?;
        }
        let extremes = captures.iter().map(|_| OnceLock::new()).collect();
        let mut bound = Self {
            name: name.to_string(),
            program: program.clone(),
            captures,
            extents,
            plan: Plan::default(),
            extremes,
            offended: AtomicBool::new(false),
            offence: Mutex::new(None),
            marker: PhantomData,
        };
        let everything = Region {
            batch: 0..extents.batch.max(1),
            heads: 0..extents.heads.max(1),
            queries: 0..extents.queries.max(1),
            keys: 0..extents.keys.max(1),
        };
        let mut all = Vec::new();
        let gather = |bound: &Self, node: &Node| bound.whole(node.bits as usize);
        spans(bound.program.nodes(), &everything, |node, _| gather(&bound, node), T::rounded, &mut all);
        bound.program = lowered(&bound.program, &all, if size_of::<T>() == 4 { 1 << 24 } else { 1 << 53 });
        spans(bound.program.nodes(), &everything, |node, _| gather(&bound, node), T::rounded, &mut all);
        bound.plan = Plan::new(&bound.program, &all);
        Ok(bound)
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// The extents it was bound for.
    pub fn extents(&self) -> Extents {
        self.extents
    }

    /// Whether a capture is used at all; its gradient is zero otherwise.
    pub fn uses(&self, capture: usize) -> bool {
        self.program.nodes().iter().any(|node| node.op == Op::Gather && node.bits as usize == capture)
    }

    /// What any element of a capture can be, without looking at many.
    fn whole(&self, number: usize) -> Span {
        let array = &self.captures[number];
        match array.dtype() {
            Dtype::I8 => Span::Int { low: i64::from(i8::MIN), high: i64::from(i8::MAX) },
            Dtype::I32 => Span::Int { low: i64::from(i32::MIN), high: i64::from(i32::MAX) },
            Dtype::I64 if array.len() <= SEARCHED => {
                self.extremes(number).map_or(Span::all(Class::Int), Extremes::whole)
            }
            _ => Span::all(self.program.captures()[number].class),
        }
    }

    /// The least and largest elements of a capture by parts, found at the first call; `None` for huge arrays.
    pub(super) fn extremes(&self, number: usize) -> Option<&Extremes> {
        self.extremes[number].get_or_init(|| Extremes::of(&self.captures[number])).as_ref()
    }

    /// Remembers an offence; of several the first by node and index, so that the error does not depend on threads.
    pub(super) fn record(&self, offence: Offence) {
        let mut slot = self.offence.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none_or(|before| offence < before) {
            *slot = Some(offence);
        }
        self.offended.store(true, Ordering::Release);
    }

    /// The error of an index that left its capture, or of a division by zero, if an evaluation met one.
    pub fn out_of_range(&self) -> Option<Error> {
        if !self.offended.load(Ordering::Acquire) {
            return None;
        }
        let offence = (*self.offence.lock().unwrap_or_else(PoisonError::into_inner))?;
        let expression = self.program.show(offence.node);
        Some(match offence.axis {
            Some((axis, extent)) => {
                let allowed = format!("indices of capture {} below {extent} on axis {axis}", offence.capture);
                let shape = self.captures[offence.capture].shape();
                let error = Error::value(&self.name, allowed, format!("{} in {expression}", offence.index));
                error.hint(format!(
                    "the capture has shape {shape:?}, and a mod is computed for every element of a visited block: clamp the index"
                ))
            }
            None => Error::value(&self.name, "divisors other than 0", format!("a division by zero in {expression}"))
                .hint("a mod is computed for every element of a visited block: keep the divisor away from 0"),
        })
    }
}

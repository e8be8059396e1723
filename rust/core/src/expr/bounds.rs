//! Interval arithmetic: what a node can be over a box of (batch, head, query, key).
//!
//! Sound for the type that evaluates: the ends of an interval are rounded as the operation rounds, and rounding keeps
//! order. Functions whose value is only close to the truth get wider ends. An interval that cannot be told is all.

use super::graph::Node;
use super::table::{Class, Op, Value, floor_divide_integers, modulo_integers};
use std::ops::Range;

/// What a value can be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Span {
    /// Numbers from `low` to `high`, and NaN if `nan`.
    Float {
        /// The least.
        low: f64,
        /// The largest.
        high: f64,
        /// Whether NaN is possible.
        nan: bool,
    },
    /// Integers from `low` to `high`.
    Int {
        /// The least.
        low: i64,
        /// The largest.
        high: i64,
    },
    /// Truth values.
    Bool {
        /// Whether false is possible.
        no: bool,
        /// Whether true is possible.
        yes: bool,
    },
}

use Span::{Bool, Float, Int};

/// A box of elements; no range is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Batches.
    pub batch: Range<usize>,
    /// Query heads.
    pub heads: Range<usize>,
    /// Queries.
    pub queries: Range<usize>,
    /// Keys.
    pub keys: Range<usize>,
}

/// The width by which the ends of a transcendental function are moved, relative.
const SLACK: f64 = 1e-5;

impl Span {
    /// Anything of a class.
    pub fn all(class: Class) -> Self {
        match class {
            Class::Float => Float { low: f64::NEG_INFINITY, high: f64::INFINITY, nan: true },
            Class::Int => Int { low: i64::MIN, high: i64::MAX },
            Class::Bool => Bool { no: true, yes: true },
        }
    }

    /// Nothing yet: the neutral element of [`Span::or`].
    pub fn nothing(class: Class) -> Self {
        match class {
            Class::Float => Float { low: f64::INFINITY, high: f64::NEG_INFINITY, nan: false },
            Class::Int => Int { low: i64::MAX, high: i64::MIN },
            Class::Bool => Bool { no: false, yes: false },
        }
    }

    /// One value.
    pub fn of(value: Value) -> Self {
        match value {
            Value::Float(x) if x.is_nan() => Float { low: f64::INFINITY, high: f64::NEG_INFINITY, nan: true },
            Value::Float(x) => Float { low: x, high: x, nan: false },
            Value::Int(x) => Int { low: x, high: x },
            Value::Bool(x) => Bool { no: !x, yes: x },
        }
    }

    /// What one or the other can be.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        match (self, other) {
            (Float { low, high, nan }, Float { low: l, high: h, nan: n }) => {
                Float { low: low.min(l), high: high.max(h), nan: nan | n }
            }
            (Int { low, high }, Int { low: l, high: h }) => Int { low: low.min(l), high: high.max(h) },
            (Bool { no, yes }, Bool { no: n, yes: y }) => Bool { no: no | n, yes: yes | y },
            _ => unreachable!("spans of one class"),
        }
    }

    fn int(low: i128, high: i128) -> Self {
        // Integers wrap around: beyond 64 bits anything may come out.
        match (i64::try_from(low), i64::try_from(high)) {
            (Ok(low), Ok(high)) => Int { low, high },
            _ => Self::all(Class::Int),
        }
    }

    fn ints(self) -> (i128, i128) {
        if let Int { low, high } = self { (i128::from(low), i128::from(high)) } else { (0, 0) }
    }

    fn floats(self) -> (f64, f64, bool) {
        if let Float { low, high, nan } = self { (low, high, nan) } else { (0.0, 0.0, true) }
    }

    fn truths(self) -> (bool, bool) {
        if let Bool { no, yes } = self { (no, yes) } else { (true, true) }
    }

    /// Whether all of it fits 32 bits.
    pub fn is_short(self) -> bool {
        matches!(self, Int { low, high } if low >= i64::from(i32::MIN) && high <= i64::from(i32::MAX))
    }
}

/// The spans of all nodes over a region. `gather` tells what a capture holds where its indices can point; `round` is
/// rounding to the type that evaluates.
pub fn spans(
    nodes: &[Node],
    region: &Region,
    gather: impl Fn(&Node, &[Span]) -> Span,
    round: fn(f64) -> f64,
    out: &mut Vec<Span>,
) {
    out.clear();
    let indices = |range: &Range<usize>| Int { low: range.start as i64, high: range.end as i64 - 1 };
    let mut operands: Vec<Span> = Vec::new();
    for node in nodes {
        operands.clear();
        operands.extend(node.args.iter().map(|&arg| out[arg as usize]));
        out.push(match node.op {
            Op::Batch => indices(&region.batch),
            Op::Head => indices(&region.heads),
            Op::Query => indices(&region.queries),
            Op::Key => indices(&region.keys),
            Op::Score | Op::Grad => Span::all(Class::Float),
            Op::Float => match node.value() {
                Some(Value::Float(x)) => Span::of(Value::Float(round(x))),
                _ => Span::all(Class::Float),
            },
            Op::Int | Op::Bool => node.value().map_or(Span::all(node.class), Span::of),
            Op::Gather => gather(node, &operands),
            op => step(op, node.class, &operands, round),
        });
    }
}

fn step(op: Op, class: Class, a: &[Span], round: fn(f64) -> f64) -> Span {
    if op == Op::Where {
        return match a[0].truths() {
            (false, true) => a[1],
            (true, false) => a[2],
            _ => a[1].or(a[2]),
        };
    }
    // A span without any number (NaN alone) has no ends to reckon with.
    if a.iter().any(|span| matches!(span, Float { low, high, .. } if low > high)) {
        return Span::all(class);
    }
    match (class, a[0]) {
        (Class::Float, Float { .. }) => floats(op, a, round),
        (Class::Float, Int { low, high }) => Float { low: round(low as f64), high: round(high as f64), nan: false },
        (Class::Float, Bool { no, yes }) => {
            Float { low: if no { 0.0 } else { 1.0 }, high: if yes { 1.0 } else { 0.0 }, nan: false }
        }
        (Class::Int, Int { .. }) => integers(op, a),
        (Class::Int, Float { low, high, nan }) => {
            let span = Int { low: low as i64, high: high as i64 };
            if nan { span.or(Int { low: 0, high: 0 }) } else { span }
        }
        (Class::Int, Bool { no, yes }) => Int { low: i64::from(!no), high: i64::from(yes) },
        (Class::Bool, _) => truths(op, a),
    }
}

fn corners(a: Span, b: Span, f: impl Fn(i128, i128) -> i128) -> Span {
    let ((al, ah), (bl, bh)) = (a.ints(), b.ints());
    let all = [f(al, bl), f(al, bh), f(ah, bl), f(ah, bh)];
    Span::int(all.into_iter().min().unwrap_or(0), all.into_iter().max().unwrap_or(0))
}

fn integers(op: Op, a: &[Span]) -> Span {
    let all = Span::all(Class::Int);
    let (low, high) = a[0].ints();
    let Some(&b) = a.get(1) else {
        return match op {
            Op::Neg => Span::int(-high, -low),
            Op::Abs => {
                let least = if low <= 0 && high >= 0 { 0 } else { low.abs().min(high.abs()) };
                Span::int(least, low.abs().max(high.abs()))
            }
            Op::Sign => Span::int(low.signum(), high.signum()),
            _ => all,
        };
    };
    let (bl, bh) = b.ints();
    match op {
        Op::Add => Span::int(low + bl, high + bh),
        Op::Sub => Span::int(low - bh, high - bl),
        Op::Mul => corners(a[0], b, |x, y| x * y),
        Op::Min => Span::int(low.min(bl), high.min(bh)),
        Op::Max => Span::int(low.max(bl), high.max(bh)),
        Op::FloorDiv | Op::TruncDiv if bl > 0 || bh < 0 => corners(a[0], b, |x, y| {
            if op == Op::TruncDiv || x == i128::from(i64::MIN) && y == -1 {
                x / y
            } else {
                i128::from(floor_divide_integers(x as i64, y as i64))
            }
        }),
        Op::Mod if bl == bh && bl > 0 && low.div_euclid(bl) == high.div_euclid(bl) => {
            let ends = [low, high].map(|x| i128::from(modulo_integers(x as i64, bl as i64)));
            Span::int(ends[0], ends[1])
        }
        Op::Mod if bl > 0 => Span::int(0, bh - 1),
        Op::Mod if bh < 0 => Span::int(bl + 1, 0),
        Op::And if low >= 0 && low >> 63 == 0 && bl == bh && (bl + 1) & bl == 0 && bl >= 0 => {
            // A mask of low bits is a remainder.
            if (low / (bl + 1)) == (high / (bl + 1)) { Span::int(low & bl, high & bl) } else { Span::int(0, bl) }
        }
        Op::And if low >= 0 || bl >= 0 => {
            let most = if low >= 0 && bl >= 0 {
                high.min(bh)
            } else if low >= 0 {
                high
            } else {
                bh
            };
            Span::int(0, most)
        }
        Op::Or | Op::Xor if low >= 0 && bl >= 0 => Span::int(0, all_bits(high.max(bh))),
        Op::Shl if bl >= 0 && bh < 63 => corners(a[0], b, |x, y| x << y),
        Op::Shr if bl >= 0 => corners(a[0], b, |x, y| x >> y.min(63)),
        _ => all,
    }
}

fn all_bits(x: i128) -> i128 {
    (x as u128 + 1).next_power_of_two() as i128 - 1
}

fn floats(op: Op, a: &[Span], round: fn(f64) -> f64) -> Span {
    let all = Span::all(Class::Float);
    let (low, high, nan) = a[0].floats();
    let ends = |x: f64, y: f64, nan: bool| Float { low: round(x.min(y)), high: round(x.max(y)), nan };
    let wide = |x: f64, y: f64, nan: bool| {
        let slack = |v: f64| if v.is_finite() { v.abs() * SLACK + 1e-30 } else { 0.0 };
        Float { low: x - slack(x), high: y + slack(y), nan }
    };
    let Some(&b) = a.get(1) else {
        return match op {
            Op::Neg => Float { low: -high, high: -low, nan },
            Op::Abs | Op::Square => {
                let (x, y) = (low.abs().min(high.abs()), low.abs().max(high.abs()));
                let least = if low <= 0.0 && high >= 0.0 { 0.0 } else { x };
                if op == Op::Abs { ends(least, y, nan) } else { ends(least * least, y * y, nan) }
            }
            Op::Sign => Float {
                low: if nan { 0.0f64.min(sign(low)) } else { sign(low) },
                high: if nan { 0.0f64.max(sign(high)) } else { sign(high) },
                nan: false,
            },
            Op::Floor => Float { low: low.floor(), high: high.floor(), nan },
            Op::Ceil => Float { low: low.ceil(), high: high.ceil(), nan },
            Op::Round => Float { low: low.round_ties_even(), high: high.round_ties_even(), nan },
            Op::Trunc => Float { low: low.trunc(), high: high.trunc(), nan },
            Op::Relu => Float { low: low.max(0.0), high: high.max(0.0), nan },
            Op::Sqrt if low >= 0.0 => ends(low.sqrt(), high.sqrt(), nan),
            Op::Reciprocal if low > 0.0 || high < 0.0 => ends(1.0 / low, 1.0 / high, nan),
            // Wide enough for single precision, whose range is smaller: beyond it all is possible.
            Op::Exp if high < 80.0 && low > -80.0 => wide(libm::exp(low), libm::exp(high), nan),
            Op::Exp2 if high < 120.0 && low > -120.0 => wide(libm::exp2(low), libm::exp2(high), nan),
            Op::Exp | Op::Exp2 => Float { low: 0.0, high: f64::INFINITY, nan },
            Op::Log if low > 1e-30 && high < 1e30 => {
                Float { low: libm::log(low) - SLACK, high: libm::log(high) + SLACK, nan }
            }
            Op::Log2 if low > 1e-30 && high < 1e30 => {
                Float { low: libm::log2(low) - SLACK, high: libm::log2(high) + SLACK, nan }
            }
            Op::Tanh | Op::Erf => Float { low: -1.0, high: 1.0, nan },
            Op::Sigmoid => Float { low: 0.0, high: 1.0, nan },
            Op::Sin | Op::Cos => Float { low: -1.0, high: 1.0, nan: nan || !low.is_finite() || !high.is_finite() },
            _ => all,
        };
    };
    let (bl, bh, other) = b.floats();
    let finite = [low, high, bl, bh].iter().all(|x| x.is_finite());
    let maybe = nan || other;
    match op {
        Op::Min if !maybe => Float { low: low.min(bl), high: high.min(bh), nan: false },
        Op::Max if !maybe => Float { low: low.max(bl), high: high.max(bh), nan: false },
        Op::Add if finite => ends(low + bl, high + bh, maybe),
        Op::Sub if finite => ends(low - bh, high - bl, maybe),
        Op::Mul if finite => {
            let all = [low * bl, low * bh, high * bl, high * bh];
            ends(
                all.into_iter().fold(f64::INFINITY, f64::min),
                all.into_iter().fold(f64::NEG_INFINITY, f64::max),
                maybe,
            )
        }
        Op::Div if finite && (bl > 0.0 || bh < 0.0) => {
            let all = [low / bl, low / bh, high / bl, high / bh];
            ends(
                all.into_iter().fold(f64::INFINITY, f64::min),
                all.into_iter().fold(f64::NEG_INFINITY, f64::max),
                maybe,
            )
        }
        Op::Mod if finite && bl > 0.0 => Float { low: 0.0, high: bh, nan: maybe },
        _ => all,
    }
}

fn sign(x: f64) -> f64 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

fn truths(op: Op, a: &[Span]) -> Span {
    let Some(&b) = a.get(1) else {
        return match (op, a[0]) {
            (Op::Not, Bool { no, yes }) => Bool { no: yes, yes: no },
            (_, Int { low, high }) => Bool { no: low <= 0 && high >= 0, yes: low != 0 || high != 0 },
            (_, Float { low, high, nan }) => {
                Bool { no: low <= 0.0 && high >= 0.0, yes: nan || low != 0.0 || high != 0.0 }
            }
            _ => Span::all(Class::Bool),
        };
    };
    match (a[0], b) {
        (Bool { no, yes }, Bool { no: n, yes: y }) => match op {
            Op::And => Bool { no: no | n, yes: yes & y },
            Op::Or => Bool { no: no & n, yes: yes | y },
            Op::Xor | Op::Ne => Bool { no: (no & n) | (yes & y), yes: (no & y) | (yes & n) },
            _ => Bool { no: (no & y) | (yes & n), yes: (no & n) | (yes & y) },
        },
        (Int { low, high }, Int { low: l, high: h }) => ordered(op, (low, high), (l, h), false),
        (Float { low, high, nan }, Float { low: l, high: h, nan: n }) => ordered(op, (low, high), (l, h), nan | n),
        _ => Span::all(Class::Bool),
    }
}

fn ordered<N: PartialOrd + Copy>(op: Op, (al, ah): (N, N), (bl, bh): (N, N), nan: bool) -> Span {
    let overlap = al <= bh && bl <= ah;
    let single = al == ah && bl == bh && al == bl;
    let (no, yes) = match op {
        Op::Lt => (ah >= bl, al < bh),
        Op::Le => (ah > bl, al <= bh),
        Op::Gt => (al <= bh, ah > bl),
        Op::Ge => (al < bh, ah >= bl),
        Op::Eq => (!single, overlap),
        _ => (overlap, !single),
    };
    // With NaN every comparison is false, but for "differs".
    if op == Op::Ne { Bool { no, yes: yes | nan } } else { Bool { no: no | nan, yes } }
}

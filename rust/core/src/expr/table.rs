//! The one table of operations: name, classes, scalar meaning, derivative.
//!
//! The meaning is what everything else is tested against, in double precision. The derivative follows torch autograd:
//! ties of min and max split half and half, relu and abs have slope 0 at 0, steps (floor, sign, ...) have none.

use super::graph::Graph;
use crate::arch::lanes::{floor_divide, modulo};
use std::f64::consts;

/// What a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// The accumulator type.
    Float,
    /// 64-bit integer.
    Int,
    /// Truth value.
    Bool,
}

impl Class {
    /// All of them.
    pub const ALL: [Class; 3] = [Class::Float, Class::Int, Class::Bool];

    /// Its name in program texts.
    pub fn name(self) -> &'static str {
        match self {
            Class::Float => "float",
            Class::Int => "int",
            Class::Bool => "bool",
        }
    }

    fn letter(self) -> char {
        match self {
            Class::Float => 'f',
            Class::Int => 'i',
            Class::Bool => 'b',
        }
    }
}

/// One value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// A number.
    Float(f64),
    /// An integer.
    Int(i64),
    /// A truth value.
    Bool(bool),
}

impl Value {
    /// Its class.
    pub fn class(self) -> Class {
        match self {
            Value::Float(_) => Class::Float,
            Value::Int(_) => Class::Int,
            Value::Bool(_) => Class::Bool,
        }
    }

    fn float(self) -> f64 {
        match self {
            Value::Float(x) => x,
            Value::Int(x) => x as f64,
            Value::Bool(x) => f64::from(u8::from(x)),
        }
    }

    fn int(self) -> i64 {
        match self {
            Value::Float(x) => x as i64,
            Value::Int(x) => x,
            Value::Bool(x) => i64::from(x),
        }
    }

    /// Not zero, not false.
    pub fn truth(self) -> bool {
        match self {
            Value::Float(x) => x != 0.0,
            Value::Int(x) => x != 0,
            Value::Bool(x) => x,
        }
    }
}

/// Operations, in the order of [`TABLE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
#[repr(u8)]
pub enum Op {
    // Leaves.
    Score,
    Grad,
    Batch,
    Head,
    Query,
    Key,
    Float,
    Int,
    Bool,
    // A captured array's element.
    Gather,
    // One operand.
    Neg,
    Abs,
    Sign,
    Floor,
    Ceil,
    Round,
    Trunc,
    Sqrt,
    Rsqrt,
    Reciprocal,
    Exp,
    Exp2,
    Expm1,
    Log,
    Log2,
    Log1p,
    Sin,
    Cos,
    Tan,
    Tanh,
    Sigmoid,
    Erf,
    Relu,
    Square,
    Not,
    ToFloat,
    ToInt,
    ToBool,
    // Two operands.
    Add,
    Sub,
    Mul,
    Min,
    Max,
    Div,
    Atan2,
    Pow,
    FloorDiv,
    Mod,
    TruncDiv,
    And,
    Or,
    Xor,
    Shl,
    Shr,
    Lt,
    Le,
    Gt,
    Ge,
    Eq,
    Ne,
    // Three.
    Where,
}

/// Where a derivative stands: the node's operands, the node, and the derivative of the result by the node.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'n> {
    /// Operands.
    pub args: &'n [u32],
    /// The node itself.
    pub out: u32,
    /// Derivative of the result by the node.
    pub grad: u32,
}

/// Derivatives by operands: (position, node).
pub type Slopes = Vec<(usize, u32)>;

/// A row of the table.
pub struct Entry {
    /// The operation.
    pub op: Op,
    /// Its name in program texts.
    pub name: &'static str,
    /// Allowed classes, "operands>result" in the letters f, i, b; empty for leaves and gathers, which have rules of
    /// their own.
    pub signatures: &'static [&'static str],
    /// What it computes.
    pub meaning: fn(&[Value]) -> Value,
    /// How a derivative passes through it.
    pub derivative: fn(&mut Graph, Chain<'_>) -> Slopes,
}

impl Op {
    /// The operation's row.
    pub fn entry(self) -> &'static Entry {
        &TABLE[self as usize]
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.entry().name
    }

    /// The operation of a name.
    pub fn named(name: &str) -> Option<Op> {
        TABLE.iter().find(|entry| entry.name == name).map(|entry| entry.op)
    }

    /// Whether it has no operands.
    pub fn is_leaf(self) -> bool {
        (self as u8) < Op::Gather as u8
    }

    /// Whether it is a constant.
    pub fn is_constant(self) -> bool {
        matches!(self, Op::Float | Op::Int | Op::Bool)
    }

    /// Number of operands; a gather's depends on its capture.
    pub fn arity(self) -> usize {
        self.entry().signatures.first().map_or(0, |signature| signature.find('>').unwrap_or(0))
    }

    /// The result's class, if the operands' are allowed.
    pub fn result(self, operands: &[Class]) -> Option<Class> {
        let letters: String = operands.iter().map(|class| class.letter()).collect();
        self.entry().signatures.iter().find_map(|signature| {
            let (from, to) = signature.split_once('>')?;
            (from == letters).then(|| Class::ALL.into_iter().find(|class| to.starts_with(class.letter())))?
        })
    }

    /// Whether the operands may change places.
    pub fn commutes(self) -> bool {
        matches!(self, Op::Add | Op::Mul | Op::Min | Op::Max | Op::And | Op::Or | Op::Xor | Op::Eq | Op::Ne)
    }
}

fn none(_: &mut Graph, _: Chain<'_>) -> Slopes {
    Vec::new()
}

fn leaf(_: &[Value]) -> Value {
    unreachable!("a leaf has no meaning of its own")
}

const fn leaf_entry(op: Op, name: &'static str) -> Entry {
    Entry { op, name, signatures: &[], meaning: leaf, derivative: none }
}

/// A float function of one float: its meaning, and grad * slope(x, out).
macro_rules! unary {
    ($op:ident, $name:literal, $meaning:expr, $derivative:expr) => {
        Entry {
            op: Op::$op,
            name: $name,
            signatures: &["f>f"],
            meaning: |a| Value::Float(($meaning)(a[0].float())),
            derivative: |g, c| {
                let slope: fn(&mut Graph, u32, u32, u32) -> u32 = $derivative;
                vec![(0, slope(g, c.grad, c.args[0], c.out))]
            },
        }
    };
    ($op:ident, $name:literal, $meaning:expr) => {
        Entry {
            op: Op::$op,
            name: $name,
            signatures: &["f>f"],
            meaning: |a| Value::Float(($meaning)(a[0].float())),
            derivative: none,
        }
    };
}

macro_rules! compare {
    ($op:ident, $name:literal, $signatures:expr, $operator:tt) => {
        Entry {
            op: Op::$op,
            name: $name,
            signatures: $signatures,
            meaning: |a| {
                Value::Bool(match (a[0], a[1]) {
                    (Value::Float(a), Value::Float(b)) => a $operator b,
                    (Value::Int(a), Value::Int(b)) => a $operator b,
                    (a, b) => a.truth() $operator b.truth(),
                })
            },
            derivative: none,
        }
    };
}

/// Integers by one function, floats by another.
macro_rules! both {
    ($a:expr, $integers:expr, $floats:expr) => {
        match ($a[0], $a[1]) {
            (Value::Int(a), Value::Int(b)) => Value::Int($integers(a, b)),
            (a, b) => Value::Float($floats(a.float(), b.float())),
        }
    };
}

/// Truth values by one function, integers by another.
macro_rules! bits {
    ($a:expr, $operator:tt) => {
        match ($a[0], $a[1]) {
            (Value::Bool(a), Value::Bool(b)) => Value::Bool(a $operator b),
            (a, b) => Value::Int(a.int() $operator b.int()),
        }
    };
}

/// The quotient rounded down; 0 for a divisor of 0 (which an evaluation reports).
pub(super) fn floor_divide_integers(a: i64, b: i64) -> i64 {
    if b == 0 {
        return 0;
    }
    let quotient = a.wrapping_div(b);
    quotient.wrapping_sub(i64::from(a.wrapping_rem(b) != 0 && (a < 0) != (b < 0)))
}

pub(super) fn modulo_integers(a: i64, b: i64) -> i64 {
    if b == 0 { 0 } else { a.wrapping_sub(b.wrapping_mul(floor_divide_integers(a, b))) }
}

pub(super) fn shift_left(a: i64, b: i64) -> i64 {
    if (0..64).contains(&b) { a.wrapping_shl(b as u32) } else { 0 }
}

pub(super) fn shift_right(a: i64, b: i64) -> i64 {
    a >> if (0..63).contains(&b) { b } else { 63 }
}

/// grad split between two operands where they tie: half to each.
fn ties(g: &mut Graph, c: Chain<'_>, loses: Op) -> Slopes {
    let (a, b) = (c.args[0], c.args[1]);
    let (zero, half) = (g.float(0.0), g.float(0.5));
    let halved = g.make(Op::Mul, &[c.grad, half]);
    let tie = g.make(Op::Eq, &[a, b]);
    let shared = g.make(Op::Where, &[tie, halved, c.grad]);
    [(0, a, b), (1, b, a)]
        .into_iter()
        .map(|(position, own, other)| {
            let lost = g.make(loses, &[own, other]);
            (position, g.make(Op::Where, &[lost, zero, shared]))
        })
        .collect()
}

/// Every operation, in the order of [`Op`].
pub static TABLE: &[Entry] = &[
    leaf_entry(Op::Score, "score"),
    leaf_entry(Op::Grad, "grad"),
    leaf_entry(Op::Batch, "batch"),
    leaf_entry(Op::Head, "head"),
    leaf_entry(Op::Query, "query"),
    leaf_entry(Op::Key, "key"),
    leaf_entry(Op::Float, "float"),
    leaf_entry(Op::Int, "int"),
    leaf_entry(Op::Bool, "bool"),
    leaf_entry(Op::Gather, "gather"),
    Entry {
        op: Op::Neg,
        name: "neg",
        signatures: &["f>f", "i>i"],
        meaning: |a| match a[0] {
            Value::Int(a) => Value::Int(a.wrapping_neg()),
            a => Value::Float(-a.float()),
        },
        derivative: |g, c| vec![(0, g.make(Op::Neg, &[c.grad]))],
    },
    Entry {
        op: Op::Abs,
        name: "abs",
        signatures: &["f>f", "i>i"],
        meaning: |a| match a[0] {
            Value::Int(a) => Value::Int(a.wrapping_abs()),
            a => Value::Float(a.float().abs()),
        },
        derivative: |g, c| {
            let sign = g.make(Op::Sign, &[c.args[0]]);
            vec![(0, g.make(Op::Mul, &[c.grad, sign]))]
        },
    },
    Entry {
        op: Op::Sign,
        name: "sign",
        signatures: &["f>f", "i>i"],
        meaning: |a| match a[0] {
            Value::Int(a) => Value::Int(a.signum()),
            a => Value::Float(f64::from(i8::from(a.float() > 0.0) - i8::from(a.float() < 0.0))),
        },
        derivative: none,
    },
    unary!(Floor, "floor", f64::floor),
    unary!(Ceil, "ceil", f64::ceil),
    unary!(Round, "round", f64::round_ties_even),
    unary!(Trunc, "trunc", f64::trunc),
    unary!(Sqrt, "sqrt", f64::sqrt, |g, grad, _, out| {
        let two = g.float(2.0);
        let doubled = g.make(Op::Mul, &[out, two]);
        g.make(Op::Div, &[grad, doubled])
    }),
    unary!(Rsqrt, "rsqrt", |x: f64| 1.0 / x.sqrt(), |g, grad, _, out| {
        let half = g.float(-0.5);
        let scaled = g.make(Op::Mul, &[grad, half]);
        let square = g.make(Op::Square, &[out]);
        let cube = g.make(Op::Mul, &[square, out]);
        g.make(Op::Mul, &[scaled, cube])
    }),
    unary!(Reciprocal, "reciprocal", |x: f64| 1.0 / x, |g, grad, _, out| {
        let square = g.make(Op::Square, &[out]);
        let product = g.make(Op::Mul, &[grad, square]);
        g.make(Op::Neg, &[product])
    }),
    unary!(Exp, "exp", libm::exp, |g, grad, _, out| g.make(Op::Mul, &[grad, out])),
    unary!(Exp2, "exp2", libm::exp2, |g, grad, _, out| {
        let slope = g.scaled(out, consts::LN_2);
        g.make(Op::Mul, &[grad, slope])
    }),
    unary!(Expm1, "expm1", libm::expm1, |g, grad, _, out| {
        let one = g.float(1.0);
        let slope = g.make(Op::Add, &[out, one]);
        g.make(Op::Mul, &[grad, slope])
    }),
    unary!(Log, "log", libm::log, |g, grad, x, _| g.make(Op::Div, &[grad, x])),
    unary!(Log2, "log2", libm::log2, |g, grad, x, _| {
        let scaled = g.scaled(x, consts::LN_2);
        g.make(Op::Div, &[grad, scaled])
    }),
    unary!(Log1p, "log1p", libm::log1p, |g, grad, x, _| {
        let one = g.float(1.0);
        let shifted = g.make(Op::Add, &[x, one]);
        g.make(Op::Div, &[grad, shifted])
    }),
    unary!(Sin, "sin", libm::sin, |g, grad, x, _| {
        let slope = g.make(Op::Cos, &[x]);
        g.make(Op::Mul, &[grad, slope])
    }),
    unary!(Cos, "cos", libm::cos, |g, grad, x, _| {
        let sin = g.make(Op::Sin, &[x]);
        let product = g.make(Op::Mul, &[grad, sin]);
        g.make(Op::Neg, &[product])
    }),
    unary!(Tan, "tan", libm::tan, |g, grad, _, out| {
        let (one, square) = (g.float(1.0), g.make(Op::Square, &[out]));
        let slope = g.make(Op::Add, &[square, one]);
        g.make(Op::Mul, &[grad, slope])
    }),
    unary!(Tanh, "tanh", libm::tanh, |g, grad, _, out| {
        let (one, square) = (g.float(1.0), g.make(Op::Square, &[out]));
        let slope = g.make(Op::Sub, &[one, square]);
        g.make(Op::Mul, &[grad, slope])
    }),
    unary!(Sigmoid, "sigmoid", |x: f64| 1.0 / (1.0 + libm::exp(-x)), |g, grad, _, out| {
        let one = g.float(1.0);
        let rest = g.make(Op::Sub, &[one, out]);
        let slope = g.make(Op::Mul, &[rest, out]);
        g.make(Op::Mul, &[grad, slope])
    }),
    unary!(Erf, "erf", libm::erf, |g, grad, x, _| {
        let square = g.make(Op::Square, &[x]);
        let minus = g.make(Op::Neg, &[square]);
        let bell = g.make(Op::Exp, &[minus]);
        let slope = g.scaled(bell, consts::FRAC_2_SQRT_PI);
        g.make(Op::Mul, &[grad, slope])
    }),
    unary!(Relu, "relu", |x: f64| if x < 0.0 { 0.0 } else { x }, |g, grad, x, _| {
        let zero = g.float(0.0);
        let below = g.make(Op::Le, &[x, zero]);
        g.make(Op::Where, &[below, zero, grad])
    }),
    unary!(Square, "square", |x: f64| x * x, |g, grad, x, _| {
        let doubled = g.scaled(x, 2.0);
        g.make(Op::Mul, &[grad, doubled])
    }),
    Entry { op: Op::Not, name: "not", signatures: &["b>b"], meaning: |a| Value::Bool(!a[0].truth()), derivative: none },
    Entry {
        op: Op::ToFloat,
        name: "to_float",
        signatures: &["i>f", "b>f"],
        meaning: |a| Value::Float(a[0].float()),
        derivative: none,
    },
    Entry {
        op: Op::ToInt,
        name: "to_int",
        signatures: &["f>i", "b>i"],
        meaning: |a| Value::Int(a[0].int()),
        derivative: none,
    },
    Entry {
        op: Op::ToBool,
        name: "to_bool",
        signatures: &["f>b", "i>b"],
        meaning: |a| Value::Bool(a[0].truth()),
        derivative: none,
    },
    Entry {
        op: Op::Add,
        name: "add",
        signatures: &["ff>f", "ii>i"],
        meaning: |a| both!(a, i64::wrapping_add, |a: f64, b: f64| a + b),
        derivative: |_, c| vec![(0, c.grad), (1, c.grad)],
    },
    Entry {
        op: Op::Sub,
        name: "sub",
        signatures: &["ff>f", "ii>i"],
        meaning: |a| both!(a, i64::wrapping_sub, |a: f64, b: f64| a - b),
        derivative: |g, c| vec![(0, c.grad), (1, g.make(Op::Neg, &[c.grad]))],
    },
    Entry {
        op: Op::Mul,
        name: "mul",
        signatures: &["ff>f", "ii>i"],
        meaning: |a| both!(a, i64::wrapping_mul, |a: f64, b: f64| a * b),
        derivative: |g, c| vec![(0, g.make(Op::Mul, &[c.grad, c.args[1]])), (1, g.make(Op::Mul, &[c.grad, c.args[0]]))],
    },
    Entry {
        op: Op::Min,
        name: "min",
        signatures: &["ff>f", "ii>i"],
        meaning: |a| both!(a, i64::min, |a: f64, b: f64| if a < b || a.is_nan() { a } else { b }),
        derivative: |g, c| ties(g, c, Op::Gt),
    },
    Entry {
        op: Op::Max,
        name: "max",
        signatures: &["ff>f", "ii>i"],
        meaning: |a| both!(a, i64::max, |a: f64, b: f64| if a > b || a.is_nan() { a } else { b }),
        derivative: |g, c| ties(g, c, Op::Lt),
    },
    Entry {
        op: Op::Div,
        name: "div",
        signatures: &["ff>f"],
        meaning: |a| Value::Float(a[0].float() / a[1].float()),
        derivative: |g, c| {
            let first = g.make(Op::Div, &[c.grad, c.args[1]]);
            let ratio = g.make(Op::Div, &[c.out, c.args[1]]);
            let product = g.make(Op::Mul, &[c.grad, ratio]);
            vec![(0, first), (1, g.make(Op::Neg, &[product]))]
        },
    },
    Entry {
        op: Op::Atan2,
        name: "atan2",
        signatures: &["ff>f"],
        meaning: |a| Value::Float(libm::atan2(a[0].float(), a[1].float())),
        derivative: |g, c| {
            let (first, second) = (g.make(Op::Square, &[c.args[0]]), g.make(Op::Square, &[c.args[1]]));
            let sum = g.make(Op::Add, &[first, second]);
            // At the origin there is no angle, and torch calls its slope 0.
            let zero = g.float(0.0);
            let (origin, quotient) = (g.make(Op::Eq, &[sum, zero]), g.make(Op::Div, &[c.grad, sum]));
            let scaled = g.make(Op::Where, &[origin, zero, quotient]);
            let other = g.make(Op::Mul, &[scaled, c.args[0]]);
            vec![(0, g.make(Op::Mul, &[scaled, c.args[1]])), (1, g.make(Op::Neg, &[other]))]
        },
    },
    Entry {
        op: Op::Pow,
        name: "pow",
        signatures: &["ff>f"],
        meaning: |a| Value::Float(libm::pow(a[0].float(), a[1].float())),
        derivative: |g, c| {
            let (x, y) = (c.args[0], c.args[1]);
            let (zero, one) = (g.float(0.0), g.float(1.0));
            let less = g.make(Op::Sub, &[y, one]);
            let power = g.make(Op::Pow, &[x, less]);
            let slope = g.make(Op::Mul, &[y, power]);
            let product = g.make(Op::Mul, &[c.grad, slope]);
            let flat = g.make(Op::Eq, &[y, zero]);
            let by_base = g.make(Op::Where, &[flat, zero, product]);
            let log = g.make(Op::Log, &[x]);
            let slope = g.make(Op::Mul, &[c.out, log]);
            let product = g.make(Op::Mul, &[c.grad, slope]);
            let (origin, rising) = (g.make(Op::Eq, &[x, zero]), g.make(Op::Ge, &[y, zero]));
            let corner = g.make(Op::And, &[origin, rising]);
            vec![(0, by_base), (1, g.make(Op::Where, &[corner, zero, product]))]
        },
    },
    Entry {
        op: Op::FloorDiv,
        name: "floor_div",
        signatures: &["ff>f", "ii>i"],
        meaning: |a| both!(a, floor_divide_integers, floor_divide::<f64>),
        derivative: none,
    },
    Entry {
        op: Op::Mod,
        name: "mod",
        signatures: &["ff>f", "ii>i"],
        meaning: |a| both!(a, modulo_integers, modulo::<f64>),
        derivative: |g, c| {
            let quotient = g.make(Op::FloorDiv, c.args);
            let product = g.make(Op::Mul, &[c.grad, quotient]);
            vec![(0, c.grad), (1, g.make(Op::Neg, &[product]))]
        },
    },
    Entry {
        op: Op::TruncDiv,
        name: "trunc_div",
        signatures: &["ii>i"],
        meaning: |a| Value::Int(if a[1].int() == 0 { 0 } else { a[0].int().wrapping_div(a[1].int()) }),
        derivative: none,
    },
    Entry { op: Op::And, name: "and", signatures: &["bb>b", "ii>i"], meaning: |a| bits!(a, &), derivative: none },
    Entry { op: Op::Or, name: "or", signatures: &["bb>b", "ii>i"], meaning: |a| bits!(a, |), derivative: none },
    Entry { op: Op::Xor, name: "xor", signatures: &["bb>b", "ii>i"], meaning: |a| bits!(a, ^), derivative: none },
    Entry {
        op: Op::Shl,
        name: "shl",
        signatures: &["ii>i"],
        meaning: |a| Value::Int(shift_left(a[0].int(), a[1].int())),
        derivative: none,
    },
    Entry {
        op: Op::Shr,
        name: "shr",
        signatures: &["ii>i"],
        meaning: |a| Value::Int(shift_right(a[0].int(), a[1].int())),
        derivative: none,
    },
    compare!(Lt, "lt", &["ff>b", "ii>b"], <),
    compare!(Le, "le", &["ff>b", "ii>b"], <=),
    compare!(Gt, "gt", &["ff>b", "ii>b"], >),
    compare!(Ge, "ge", &["ff>b", "ii>b"], >=),
    compare!(Eq, "eq", &["ff>b", "ii>b", "bb>b"], ==),
    compare!(Ne, "ne", &["ff>b", "ii>b", "bb>b"], !=),
    Entry {
        op: Op::Where,
        name: "where",
        signatures: &["bff>f", "bii>i", "bbb>b"],
        meaning: |a| if a[0].truth() { a[1] } else { a[2] },
        derivative: |g, c| {
            let zero = g.float(0.0);
            vec![(1, g.make(Op::Where, &[c.args[0], c.grad, zero])), (2, g.make(Op::Where, &[c.args[0], zero, c.grad]))]
        },
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_the_order_of_the_operations() {
        for (i, entry) in TABLE.iter().enumerate() {
            assert_eq!(entry.op as usize, i, "{}", entry.name);
            assert_eq!(Op::named(entry.name), Some(entry.op));
            for signature in entry.signatures {
                assert_eq!(signature.len(), entry.op.arity() + 2, "{}", entry.name);
            }
        }
        assert_eq!(Op::Where as usize + 1, TABLE.len());
    }
}

//! Element types and the trait that ties Rust types to them.

use half::{bf16, f16};
use std::fmt;

/// Element types that cross the border.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    F64,
    F16,
    Bf16,
    I8,
    I32,
    I64,
    Bool,
}

impl Dtype {
    /// Size of one element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::I8 | Dtype::Bool => 1,
        }
    }

    /// The name users know it by.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::F64 => "float64",
            Dtype::F16 => "float16",
            Dtype::Bf16 => "bfloat16",
            Dtype::I8 => "int8",
            Dtype::I32 => "int32",
            Dtype::I64 => "int64",
            Dtype::Bool => "bool",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that can be an array element. Every bit pattern the border lets through is valid for it
/// (`bool` crosses as [`Flag`], a byte read as "not zero").
pub trait Element: Copy + Send + Sync + 'static {
    /// The matching tag.
    const DTYPE: Dtype;
}

/// One byte of a boolean array: any non-zero value is true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Flag(pub u8);

impl Flag {
    /// Its truth value.
    pub fn get(self) -> bool {
        self.0 != 0
    }
}

macro_rules! element {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: Dtype = Dtype::$d; })* };
}
element!(f32 => F32, f64 => F64, f16 => F16, bf16 => Bf16, i8 => I8, i32 => I32, i64 => I64, Flag => Bool);

/// Floating types that kernels read: each widens to its accumulator (`f32`, or `f64` for `f64`).
pub trait Float: Element {
    /// Accumulation type.
    type Acc: Real;
    /// Exact widening.
    fn widen(self) -> Self::Acc;
    /// Rounding to nearest even.
    fn narrow(value: Self::Acc) -> Self;
    /// Whether all bits of the exponent are set: infinite, or NaN.
    fn is_special(self) -> bool;
}

/// Accumulator types.
pub trait Real:
    Float<Acc = Self>
    + Default
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + fmt::Debug
    + 'static
{
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Negative infinity.
    const NEG_INFINITY: Self;
    /// Conversion from a constant.
    fn of(value: f64) -> Self;
    /// Conversion to f64.
    fn f64(self) -> f64;
}

macro_rules! float {
    ($t:ty, $acc:ty, $exponent:literal, |$x:ident| $widen:expr, |$y:ident| $narrow:expr) => {
        impl Float for $t {
            type Acc = $acc;
            #[inline(always)]
            fn widen(self) -> $acc {
                let $x = self;
                $widen
            }
            #[inline(always)]
            fn narrow($y: $acc) -> Self {
                $narrow
            }
            #[inline(always)]
            fn is_special(self) -> bool {
                self.to_bits() & $exponent == $exponent
            }
        }
    };
}
float!(f32, f32, 0x7f80_0000, |x| x, |y| y);
float!(f64, f64, 0x7ff0_0000_0000_0000, |x| x, |y| y);
float!(f16, f32, 0x7c00, |x| x.to_f32(), |y| f16::from_f32(y));
float!(bf16, f32, 0x7f80, |x| f32::from_bits((x.to_bits() as u32) << 16), |y| bf16::from_f32(y));

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = <$t>::NEG_INFINITY;
            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn f64(self) -> f64 {
                self as f64
            }
        }
    };
}
real!(f32);
real!(f64);

//! The operations of expressions over whole slices: one loop an operation, which the compiler turns into vectors.
//!
//! A truth value is a word of ones or zeros, as wide as a single-precision lane, so that comparisons, logic and choices
//! need no narrowing. An operand is a slice as long as the result or one value for all of it.

use super::elementary::{Elementary, TURNS};

/// A truth value: [`TRUE`] or 0.
pub type Mask = u32;
/// Every bit set.
pub const TRUE: Mask = u32::MAX;

/// What an operation reads.
#[derive(Debug, Clone, Copy)]
pub enum Operand<'s, X> {
    /// One value an element.
    Slice(&'s [X]),
    /// One value for all.
    Splat(X),
}

/// Functions of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Unary {
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
}

/// Functions of two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Binary {
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
}

/// Comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Compare {
    Lt,
    Le,
    Gt,
    Ge,
    Eq,
    Ne,
}

#[inline(always)]
pub(crate) fn truth(condition: bool) -> Mask {
    0u32.wrapping_sub(u32::from(condition))
}

#[inline(always)]
pub(crate) fn map<X: Copy, Z>(a: Operand<'_, X>, out: &mut [Z], f: impl Fn(X) -> Z) {
    match a {
        Operand::Slice(a) => {
            for (z, &a) in out.iter_mut().zip(a) {
                *z = f(a);
            }
        }
        Operand::Splat(a) => out.iter_mut().for_each(|z| *z = f(a)),
    }
}

#[inline(always)]
pub(crate) fn zip<X: Copy, Y: Copy, Z>(a: Operand<'_, X>, b: Operand<'_, Y>, out: &mut [Z], f: impl Fn(X, Y) -> Z) {
    match (a, b) {
        (Operand::Slice(a), Operand::Slice(b)) => {
            for ((z, &a), &b) in out.iter_mut().zip(a).zip(b) {
                *z = f(a, b);
            }
        }
        (Operand::Slice(a), Operand::Splat(b)) => map(Operand::Slice(a), out, |a| f(a, b)),
        (Operand::Splat(a), b) => map(b, out, |b| f(a, b)),
    }
}

/// `a` where the condition holds, else `b`.
#[inline(always)]
pub(crate) fn select<X: Copy>(c: Operand<'_, Mask>, a: Operand<'_, X>, b: Operand<'_, X>, out: &mut [X]) {
    let Operand::Slice(c) = c else {
        let Operand::Splat(c) = c else { return };
        return map(if c != 0 { a } else { b }, out, |x| x);
    };
    match (a, b) {
        (Operand::Slice(a), Operand::Slice(b)) => {
            for (((z, &c), &a), &b) in out.iter_mut().zip(c).zip(a).zip(b) {
                *z = if c != 0 { a } else { b };
            }
        }
        (Operand::Slice(a), Operand::Splat(b)) => {
            zip(Operand::Slice(c), Operand::Slice(a), out, |c, a| if c != 0 { a } else { b })
        }
        (Operand::Splat(a), b) => zip(Operand::Slice(c), b, out, |c, b| if c != 0 { a } else { b }),
    }
}

/// Numbers that can be compared.
#[inline(always)]
pub(crate) fn compare<X: Copy + PartialOrd>(op: Compare, a: Operand<'_, X>, b: Operand<'_, X>, out: &mut [Mask]) {
    match op {
        Compare::Lt => zip(a, b, out, |a, b| truth(a < b)),
        Compare::Le => zip(a, b, out, |a, b| truth(a <= b)),
        Compare::Gt => zip(a, b, out, |a, b| truth(a > b)),
        Compare::Ge => zip(a, b, out, |a, b| truth(a >= b)),
        Compare::Eq => zip(a, b, out, |a, b| truth(a == b)),
        Compare::Ne => zip(a, b, out, |a, b| truth(a != b)),
    }
}

/// -1, 0 or 1; 0 for NaN, as torch has it.
#[inline(always)]
fn sign<T: Elementary>(x: T) -> T {
    let positive = if x > T::ZERO { T::ONE } else { T::ZERO };
    if x < T::ZERO { -T::ONE } else { positive }
}

#[inline(always)]
fn minimum<T: Elementary>(a: T, b: T) -> T {
    if a < b || a.is_nan() { a } else { b }
}

#[inline(always)]
fn maximum<T: Elementary>(a: T, b: T) -> T {
    if a > b || a.is_nan() { a } else { b }
}

/// The remainder with the sign of the divisor, as Python's.
#[inline(always)]
pub(crate) fn modulo<T: Elementary>(a: T, b: T) -> T {
    let rest = a.fmod(b);
    if rest != T::ZERO && (b < T::ZERO) != (rest < T::ZERO) { rest + b } else { rest }
}

/// The quotient rounded down, as Python's; a division by zero is what `/` makes of it.
#[inline(always)]
pub(crate) fn floor_divide<T: Elementary>(a: T, b: T) -> T {
    if b == T::ZERO {
        return a / b;
    }
    let rest = a.fmod(b);
    let quotient = (a - rest) / b;
    let quotient = if rest != T::ZERO && (b < T::ZERO) != (rest < T::ZERO) { quotient - T::ONE } else { quotient };
    if quotient == T::ZERO {
        return T::ZERO.copysign(a / b);
    }
    let floor = quotient.floor();
    if quotient - floor > T::of(0.5) { floor + T::ONE } else { floor }
}

#[inline(always)]
pub(crate) fn float_unary<T: Elementary, const FUSED: bool>(op: Unary, a: Operand<'_, T>, out: &mut [T]) {
    match op {
        Unary::Neg => map(a, out, |x| -x),
        Unary::Abs => map(a, out, T::abs),
        Unary::Sign => map(a, out, sign),
        Unary::Floor => map(a, out, T::floor),
        Unary::Ceil => map(a, out, T::ceil),
        Unary::Round => map(a, out, T::round),
        Unary::Trunc => map(a, out, T::trunc),
        Unary::Sqrt => map(a, out, T::sqrt),
        Unary::Rsqrt => map(a, out, |x| T::ONE / x.sqrt()),
        Unary::Reciprocal => map(a, out, |x| T::ONE / x),
        Unary::Exp => map(a, out, |x| x.exp::<FUSED>()),
        Unary::Exp2 => map(a, out, |x| x.exp2::<FUSED>()),
        Unary::Expm1 => map(a, out, |x| x.expm1::<FUSED>()),
        Unary::Log => map(a, out, |x| x.log::<FUSED>()),
        Unary::Log2 => map(a, out, |x| x.log2::<FUSED>()),
        Unary::Log1p => map(a, out, |x| x.log1p::<FUSED>()),
        Unary::Sin => circular(a, out, |x| x.sin::<FUSED>(), libm::sin),
        Unary::Cos => circular(a, out, |x| x.cos::<FUSED>(), libm::cos),
        Unary::Tan => circular(a, out, |x| x.tan::<FUSED>(), libm::tan),
        Unary::Tanh => map(a, out, |x| x.tanh::<FUSED>()),
        Unary::Sigmoid => map(a, out, |x| x.sigmoid::<FUSED>()),
        Unary::Erf => map(a, out, |x| x.erf::<FUSED>()),
        Unary::Relu => map(a, out, |x| if x < T::ZERO { T::ZERO } else { x }),
        Unary::Square => map(a, out, |x| x * x),
    }
}

/// A circular function: where the vector form would lose digits, libm in double precision takes over.
#[inline(always)]
fn circular<T: Elementary>(a: Operand<'_, T>, out: &mut [T], near: impl Fn(T) -> T, far: impl Fn(f64) -> f64) {
    map(a, out, &near);
    let limit = T::of(f64::from(TURNS));
    let beyond = |x: T| x.abs() > limit;
    match a {
        Operand::Slice(a) => {
            if size_of::<T>() == 4 && a.iter().fold(false, |any, &x| any | beyond(x)) {
                for (z, &x) in out.iter_mut().zip(a) {
                    if beyond(x) {
                        *z = T::of(far(x.f64()));
                    }
                }
            }
        }
        Operand::Splat(x) => {
            if size_of::<T>() == 4 && beyond(x) {
                out.fill(T::of(far(x.f64())));
            }
        }
    }
}

#[inline(always)]
pub(crate) fn float_binary<T: Elementary>(op: Binary, a: Operand<'_, T>, b: Operand<'_, T>, out: &mut [T]) {
    match op {
        Binary::Add => zip(a, b, out, |a, b| a + b),
        Binary::Sub => zip(a, b, out, |a, b| a - b),
        Binary::Mul => zip(a, b, out, |a, b| a * b),
        Binary::Min => zip(a, b, out, minimum),
        Binary::Max => zip(a, b, out, maximum),
        Binary::Div => zip(a, b, out, |a, b| a / b),
        Binary::Atan2 => zip(a, b, out, T::atan2),
        Binary::Pow => zip(a, b, out, T::pow),
        Binary::FloorDiv => zip(a, b, out, floor_divide),
        Binary::Mod => zip(a, b, out, modulo),
        other => unreachable!("{other:?} is no function of two floats"),
    }
}

/// Which operand of an operation is the output's old value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    /// The first.
    First,
    /// The second.
    Second,
}

/// A function of two floats, one of which is the output's old value.
#[inline(always)]
pub(crate) fn float_update<T: Elementary>(op: Binary, own: Own, other: Operand<'_, T>, out: &mut [T]) {
    #[inline(always)]
    fn each<T: Copy>(other: Operand<'_, T>, out: &mut [T], f: impl Fn(T, T) -> T) {
        match other {
            Operand::Slice(other) => out.iter_mut().zip(other).for_each(|(z, &x)| *z = f(*z, x)),
            Operand::Splat(x) => out.iter_mut().for_each(|z| *z = f(*z, x)),
        }
    }
    match (op, own) {
        (Binary::Add, _) => each(other, out, |z, x| z + x),
        (Binary::Mul, _) => each(other, out, |z, x| z * x),
        (Binary::Sub, Own::First) => each(other, out, |z, x| z - x),
        (Binary::Sub, Own::Second) => each(other, out, |z, x| x - z),
        (Binary::Div, Own::First) => each(other, out, |z, x| z / x),
        (Binary::Div, Own::Second) => each(other, out, |z, x| x / z),
        (Binary::Min, Own::First) => each(other, out, minimum),
        (Binary::Min, Own::Second) => each(other, out, |z, x| minimum(x, z)),
        (Binary::Max, Own::First) => each(other, out, maximum),
        (Binary::Max, Own::Second) => each(other, out, |z, x| maximum(x, z)),
        (other, _) => unreachable!("{other:?} does not update"),
    }
}

/// `out += a * b`, rounded twice.
#[inline(always)]
pub(crate) fn add_product<T: Elementary>(a: Operand<'_, T>, b: Operand<'_, T>, out: &mut [T]) {
    match (a, b) {
        (Operand::Slice(a), Operand::Slice(b)) => {
            out.iter_mut().zip(a).zip(b).for_each(|((z, &a), &b)| *z = *z + a * b);
        }
        (Operand::Slice(a), Operand::Splat(b)) | (Operand::Splat(b), Operand::Slice(a)) => {
            out.iter_mut().zip(a).for_each(|(z, &a)| *z = *z + a * b);
        }
        (Operand::Splat(a), Operand::Splat(b)) => out.iter_mut().for_each(|z| *z = *z + a * b),
    }
}

/// Integer lanes; arithmetic wraps around.
pub(crate) trait Integer: Copy + Ord + Default + 'static {
    const ZERO: Self;
    const ONE: Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// Rounded down; 0 for a divisor of 0.
    fn floor_divide(self, other: Self) -> Self;
    /// Toward zero; 0 for a divisor of 0.
    fn trunc_divide(self, other: Self) -> Self;
    fn and(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;
    fn shl(self, other: Self) -> Self;
    fn shr(self, other: Self) -> Self;
    fn wide(self) -> i64;
    fn from_mask(mask: Mask) -> Self;
}

macro_rules! integer {
    ($t:ty, |$a:ident, $b:ident| $floor:expr, $trunc:expr) => {
        impl Integer for $t {
            const ZERO: $t = 0;
            const ONE: $t = 1;
            #[inline(always)]
            fn add(self, other: $t) -> $t {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn sub(self, other: $t) -> $t {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn mul(self, other: $t) -> $t {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn floor_divide(self, other: $t) -> $t {
                let ($a, $b) = (self, other);
                $floor
            }
            #[inline(always)]
            fn trunc_divide(self, other: $t) -> $t {
                let ($a, $b) = (self, other);
                $trunc
            }
            #[inline(always)]
            fn and(self, other: $t) -> $t {
                self & other
            }
            #[inline(always)]
            fn or(self, other: $t) -> $t {
                self | other
            }
            #[inline(always)]
            fn xor(self, other: $t) -> $t {
                self ^ other
            }
            #[inline(always)]
            fn shl(self, other: $t) -> $t {
                let inside = other >= 0 && other < <$t>::BITS as $t;
                if inside { self.wrapping_shl(other as u32) } else { 0 }
            }
            #[inline(always)]
            fn shr(self, other: $t) -> $t {
                let most = <$t>::BITS as $t - 1;
                let inside = other >= 0 && other < most;
                self.wrapping_shr(if inside { other } else { most } as u32)
            }
            #[inline(always)]
            fn wide(self) -> i64 {
                i64::from(self)
            }
            #[inline(always)]
            fn from_mask(mask: Mask) -> $t {
                <$t>::from(mask != 0)
            }
        }
    };
}
// The quotient of two 32-bit integers in double precision is never rounded across an integer: it is at least 2^-31
// away from one, and 2^31 / 2^53 is less. That makes a division a vector operation.
integer!(
    i32,
    |a, b| {
        let quotient = f64::from(a) / f64::from(if b == 0 { 1 } else { b });
        let toward = quotient as i32;
        let down = toward.wrapping_sub(i32::from(f64::from(toward) > quotient));
        if b == 0 { 0 } else { down }
    },
    {
        let quotient = f64::from(a) / f64::from(if b == 0 { 1 } else { b });
        if b == 0 { 0 } else { quotient as i32 }
    }
);
integer!(
    i64,
    |a, b| {
        if b == 0 {
            0
        } else {
            let quotient = a.wrapping_div(b);
            quotient.wrapping_sub(i64::from(a.wrapping_rem(b) != 0 && (a < 0) != (b < 0)))
        }
    },
    if b == 0 { 0 } else { a.wrapping_div(b) }
);

#[inline(always)]
pub(crate) fn integer_unary<I: Integer>(op: Unary, a: Operand<'_, I>, out: &mut [I]) {
    match op {
        Unary::Neg => map(a, out, |x| I::ZERO.sub(x)),
        Unary::Abs => map(a, out, |x| if x < I::ZERO { I::ZERO.sub(x) } else { x }),
        Unary::Sign => map(a, out, |x| {
            let positive = if x > I::ZERO { I::ONE } else { I::ZERO };
            if x < I::ZERO { I::ZERO.sub(I::ONE) } else { positive }
        }),
        other => unreachable!("{other:?} is no function of an integer"),
    }
}

/// False if some divisor was 0 (its quotient and remainder are 0 then).
#[inline(always)]
pub(crate) fn integer_binary<I: Integer>(op: Binary, a: Operand<'_, I>, b: Operand<'_, I>, out: &mut [I]) -> bool {
    match op {
        Binary::Add => zip(a, b, out, I::add),
        Binary::Sub => zip(a, b, out, I::sub),
        Binary::Mul => zip(a, b, out, I::mul),
        Binary::Min => zip(a, b, out, |a, b| if a < b { a } else { b }),
        Binary::Max => zip(a, b, out, |a, b| if a > b { a } else { b }),
        Binary::FloorDiv => zip(a, b, out, I::floor_divide),
        Binary::TruncDiv => zip(a, b, out, I::trunc_divide),
        Binary::Mod => zip(a, b, out, |a, b| if b == I::ZERO { b } else { a.sub(b.mul(a.floor_divide(b))) }),
        Binary::And => zip(a, b, out, I::and),
        Binary::Or => zip(a, b, out, I::or),
        Binary::Xor => zip(a, b, out, I::xor),
        Binary::Shl => zip(a, b, out, I::shl),
        Binary::Shr => zip(a, b, out, I::shr),
        other => unreachable!("{other:?} is no function of two integers"),
    }
    if !matches!(op, Binary::FloorDiv | Binary::TruncDiv | Binary::Mod) {
        return true;
    }
    match b {
        Operand::Slice(b) => !b[..out.len()].iter().fold(false, |any, &b| any | (b == I::ZERO)),
        Operand::Splat(b) => b != I::ZERO,
    }
}

#[inline(always)]
pub(crate) fn logic(op: Binary, a: Operand<'_, Mask>, b: Operand<'_, Mask>, out: &mut [Mask]) {
    match op {
        Binary::And => zip(a, b, out, |a, b| a & b),
        Binary::Or => zip(a, b, out, |a, b| a | b),
        Binary::Xor => zip(a, b, out, |a, b| a ^ b),
        other => unreachable!("{other:?} is no function of two truth values"),
    }
}

/// Writes `value` where the mask is false.
#[inline(always)]
pub(crate) fn blank<T: Copy>(mask: &[Mask], value: T, block: &mut [T]) {
    for (x, &keep) in block.iter_mut().zip(mask) {
        *x = if keep != 0 { *x } else { value };
    }
}

/// Each value of `from`, `width` times.
#[inline(always)]
pub(crate) fn spread<X: Copy>(from: &[X], width: usize, out: &mut [X]) {
    // Whole registers first: rows are often three of them, less than the unrolled loop of a `fill`.
    for (row, &x) in out.chunks_exact_mut(width).zip(from) {
        let (registers, rest) = row.as_chunks_mut::<16>();
        registers.iter_mut().for_each(|register| *register = [x; 16]);
        rest.fill(x);
    }
}

/// `offsets[i] += index * stride`, the index wrapped once if negative; one that is outside counts as 0. Returns false
/// if there was one.
#[inline(always)]
pub(crate) fn offsets<I: Integer>(index: Operand<'_, I>, extent: usize, stride: isize, offsets: &mut [i64]) -> bool {
    let (extent, stride) = (extent as i64, stride as i64);
    let step = |offset: &mut i64, index: I| {
        let index = index.wide();
        let index = if index < 0 { index.wrapping_add(extent) } else { index };
        let inside = (index as u64) < extent as u64;
        *offset = offset.wrapping_add((if inside { index } else { 0 }).wrapping_mul(stride));
        inside
    };
    match index {
        Operand::Slice(index) => {
            offsets.iter_mut().zip(index).fold(true, |all, (offset, &index)| all & step(offset, index))
        }
        Operand::Splat(index) => offsets.iter_mut().fold(true, |all, offset| all & step(offset, index)),
    }
}

/// Reads `from[offset]` for each offset.
///
/// # Safety
/// Every offset addresses a readable element.
#[inline(always)]
pub(crate) unsafe fn read<S: Copy, X>(from: *const S, offsets: &[i64], out: &mut [X], convert: impl Fn(S) -> X) {
    for (x, &offset) in out.iter_mut().zip(offsets) {
        // SAFETY: see above.
        *x = convert(unsafe { *from.offset(offset as isize) });
    }
}

/// Reads `from[index * stride]`, each index wrapped once if negative; one that is outside reads element 0. Returns false
/// if there was one.
///
/// # Safety
/// Indices below `extent`, which is not 0, address readable elements.
#[inline(always)]
pub(crate) unsafe fn read_line<S: Copy, X>(
    from: *const S,
    index: &[i32],
    extent: i32,
    stride: isize,
    out: &mut [X],
    convert: impl Fn(S) -> X,
) -> bool {
    let mut outside = false;
    for (x, &index) in out.iter_mut().zip(index) {
        let index = if index < 0 { index.wrapping_add(extent) } else { index };
        let inside = (index as u32) < extent as u32;
        outside |= !inside;
        let index = if inside { index } else { 0 };
        // SAFETY: inside now.
        *x = convert(unsafe { *from.offset(index as isize * stride) });
    }
    !outside
}

/// `out[r][l] = from[rows[r] + lanes[l]]`.
///
/// # Safety
/// Every such sum addresses a readable element.
#[inline(always)]
pub(crate) unsafe fn read_tile<S: Copy, X: Copy>(
    from: *const S,
    rows: &[i64],
    lanes: &[i64],
    out: &mut [X],
    convert: impl Fn(S) -> X,
) {
    let width = lanes.len();
    let adjacent = |offsets: &[i64]| offsets.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(1));
    // SAFETY: every address is a sum of a row's and a lane's offset; adjacent offsets start at the first.
    unsafe {
        if adjacent(lanes) {
            for (row, &offset) in out.chunks_exact_mut(width).zip(rows) {
                let line = from.offset((offset + lanes[0]) as isize);
                for (lane, x) in row.iter_mut().enumerate() {
                    *x = convert(*line.add(lane));
                }
            }
        } else {
            // Lane by lane: where rows are adjacent in memory, a lane's are in one cache line.
            for (lane, &offset) in lanes.iter().enumerate() {
                for (row, &own) in rows.iter().enumerate() {
                    out[row * width + lane] = convert(*from.offset((offset + own) as isize));
                }
            }
        }
    }
}

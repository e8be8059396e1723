//! Elementary functions of one lane, free of branches in single precision so that loops over them become vectors.
//!
//! Single precision: own polynomials, a few units in the last place (each function says how many, and a test holds it
//! to that). `FUSED` says whether the machine multiplies and adds in one rounding; without it `mul_add` would be a
//! function call, so the two are rounded one after the other. Double precision goes through libm: exact first, and
//! nobody attends in double precision for speed.

use super::activation::{SCALED_ERFC, SCALED_ERFC_GAIN};
use crate::dtype::Real;

/// The functions that expressions know beyond +, -, *, /.
pub(crate) trait Elementary: Real {
    fn abs(self) -> Self;
    fn sqrt(self) -> Self;
    fn floor(self) -> Self;
    fn ceil(self) -> Self;
    fn trunc(self) -> Self;
    /// To the nearest integer, ties to even.
    fn round(self) -> Self;
    fn exp<const FUSED: bool>(self) -> Self;
    fn exp2<const FUSED: bool>(self) -> Self;
    fn expm1<const FUSED: bool>(self) -> Self;
    fn log<const FUSED: bool>(self) -> Self;
    fn log2<const FUSED: bool>(self) -> Self;
    fn log1p<const FUSED: bool>(self) -> Self;
    fn sin<const FUSED: bool>(self) -> Self;
    fn cos<const FUSED: bool>(self) -> Self;
    fn tan<const FUSED: bool>(self) -> Self;
    fn tanh<const FUSED: bool>(self) -> Self;
    fn sigmoid<const FUSED: bool>(self) -> Self;
    fn erf<const FUSED: bool>(self) -> Self;
    fn atan2(self, other: Self) -> Self;
    fn pow(self, other: Self) -> Self;
    /// The remainder with the sign of the dividend (exact).
    fn fmod(self, other: Self) -> Self;
    /// Toward zero, saturating; 0 for NaN.
    fn to_i64(self) -> i64;
    fn from_i64(value: i64) -> Self;
    fn from_i32(value: i32) -> Self;
    fn is_nan(self) -> bool;
    fn copysign(self, sign: Self) -> Self;
}

/// Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Horner's rule, coefficients from the highest power down.
#[inline(always)]
fn horner<const FUSED: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[0];
    for &coefficient in &coefficients[1..] {
        sum = fma::<FUSED>(sum, x, coefficient);
    }
    sum
}

/// `x` between two bounds; NaN stays NaN.
#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}

/// `2^n` for the integer in the low bits of `shifted = n + ROUND`, n in -126..=127.
#[inline(always)]
fn power(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

#[inline(always)]
fn low_bits(shifted: f32) -> i32 {
    (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32)
}

/// `p * 2^n` for n in -252..=254, in two steps so that subnormal results and 2^128 come out.
#[inline(always)]
fn scaled(p: f32, n: i32) -> f32 {
    let half = n >> 1;
    p * power(half) * power(n.wrapping_sub(half))
}

/// ln 2 in two parts: the first has its low bits zero, so n times it is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// `(e^r - 1 - r) / r^2` on |r| <= ln 2 / 2: a minimax fit, error 3e-9 of e^r - 1.
#[inline(always)]
fn exponential_tail<const FUSED: bool>(r: f32) -> f32 {
    horner::<FUSED, 5>(r, [1.395_053_9e-3, 8.368_918e-3, 0.041_666_206, 0.166_665_18, 0.5])
}

/// n (in the low bits, shifted by [`ROUND`]) and r with x = n ln 2 + r.
#[inline(always)]
fn reduced<const FUSED: bool>(x: f32) -> (f32, f32) {
    let shifted = fma::<FUSED>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    (shifted, fma::<FUSED>(n, -LN2_LOW, fma::<FUSED>(n, -LN2_HIGH, x)))
}

/// f in [sqrt(1/2) - 1, sqrt(2) - 1] and e with x = 2^e (1 + f), for x > 0 and finite.
#[inline(always)]
fn split(x: f32) -> (f32, f32) {
    let subnormal = x < f32::MIN_POSITIVE;
    let bits = (if subnormal { x * 8_388_608.0 } else { x }).to_bits();
    // Taking off the bits of sqrt(1/2) puts the boundary of the exponent there.
    let e = (bits.wrapping_sub(0x3f35_04f3) as i32) >> 23;
    let m = f32::from_bits(bits.wrapping_sub((e as u32) << 23));
    (m - 1.0, e.wrapping_sub(if subnormal { 23 } else { 0 }) as f32)
}

/// `ln(1 + f) = high + low` on the interval of [`split`]: f - f^2 / 2 + f^3 p(f), p a minimax fit (error 8e-10).
#[inline(always)]
fn logarithm<const FUSED: bool>(f: f32) -> (f32, f32) {
    let p = horner::<FUSED, 9>(
        f,
        [
            0.067_467_26,
            -0.116_757_83,
            0.118_881_97,
            -0.124_055_71,
            0.142_195_46,
            -0.166_679_97,
            0.200_021_2,
            -0.250_000_1,
            0.333_333_13,
        ],
    );
    let square = f * f;
    (f, fma::<FUSED>(square, -0.5, square * f * p))
}

/// What a logarithm is outside (0, inf): -inf at 0, NaN below, x itself at +inf and NaN.
#[inline(always)]
fn logarithm_edges(x: f32, inside: f32) -> f32 {
    let outside = if x == 0.0 {
        f32::NEG_INFINITY
    } else if x < 0.0 {
        f32::NAN
    } else {
        x
    };
    if x > 0.0 && x < f32::INFINITY { inside } else { outside }
}

/// sin and cos of r with |r| <= pi / 4, in double precision (series to r^11 and r^12: 7e-12 off at most).
#[inline(always)]
fn sin_cos_inside(r: f64) -> (f64, f64) {
    let s = r * r;
    let sin = r
        * (1.0
            + s * (-1.0 / 6.0
                + s * (1.0 / 120.0 + s * (-1.0 / 5040.0 + s * (1.0 / 362_880.0 - s * (1.0 / 39_916_800.0))))));
    let cos = 1.0
        + s * (-0.5
            + s * (1.0 / 24.0
                + s * (-1.0 / 720.0 + s * (1.0 / 40_320.0 + s * (-1.0 / 3_628_800.0 + s * (1.0 / 479_001_600.0))))));
    (sin, cos)
}

/// Above it, [`quadrant`] would lose digits: 2^22 quarter turns.
pub(crate) const TURNS: f32 = 6_000_000.0;

/// The quarter turns in x (modulo 4) and what is left of it, for |x| <= [`TURNS`].
#[inline(always)]
fn quadrant(x: f32) -> (i32, f64) {
    /// pi / 2 in two parts: the first has 33 bits, so that up to 2^20 times it is exact.
    const HIGH: f64 = 1.570_796_326_734_125_6;
    const LOW: f64 = 6.077_100_506_506_192e-11;
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    let x = f64::from(x);
    let shifted = x * std::f64::consts::FRAC_2_PI + SHIFT;
    let n = shifted - SHIFT;
    (shifted.to_bits() as i32, (x - n * HIGH) - n * LOW)
}

impl Elementary for f32 {
    #[inline(always)]
    fn abs(self) -> f32 {
        f32::from_bits(self.to_bits() & 0x7fff_ffff)
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        self.sqrt()
    }
    #[inline(always)]
    fn floor(self) -> f32 {
        let t = self.trunc();
        if t > self { t - 1.0 } else { t }
    }
    #[inline(always)]
    fn ceil(self) -> f32 {
        -Elementary::floor(-self)
    }
    #[inline(always)]
    fn trunc(self) -> f32 {
        self.trunc()
    }
    #[inline(always)]
    fn round(self) -> f32 {
        self.round_ties_even()
    }

    /// 1 unit in the last place.
    #[inline(always)]
    fn exp<const FUSED: bool>(self) -> f32 {
        let (shifted, r) = reduced::<FUSED>(clamp(self, -105.0, 89.0));
        let p = fma::<FUSED>(r * r, exponential_tail::<FUSED>(r), r) + 1.0;
        scaled(p, low_bits(shifted))
    }
    /// 2 units.
    #[inline(always)]
    fn exp2<const FUSED: bool>(self) -> f32 {
        let x = clamp(self, -151.0, 129.0);
        let shifted = x + ROUND;
        let f = x - (shifted - ROUND);
        let p = horner::<FUSED, 6>(
            f,
            [1.547_636e-4, 1.340_035e-3, 9.618_004e-3, 0.055_503_275, 0.240_226_5, std::f32::consts::LN_2],
        );
        scaled(fma::<FUSED>(p, f, 1.0), low_bits(shifted))
    }
    /// 2 units.
    #[inline(always)]
    fn expm1<const FUSED: bool>(self) -> f32 {
        let (shifted, r) = reduced::<FUSED>(clamp(self, -25.0, 89.0));
        let q = fma::<FUSED>(r * r, exponential_tail::<FUSED>(r), r);
        // Half of 2^n, which is finite for n = 128.
        let half = power(low_bits(shifted).wrapping_sub(1));
        let result = 2.0 * fma::<FUSED>(half, q, half - 0.5);
        let result = if shifted == ROUND { q } else { result };
        if self == 0.0 { self } else { result }
    }
    /// 1 unit.
    #[inline(always)]
    fn log<const FUSED: bool>(self) -> f32 {
        let (f, e) = split(self);
        let (high, low) = logarithm::<FUSED>(f);
        let low = fma::<FUSED>(e, LN2_LOW, low);
        logarithm_edges(self, fma::<FUSED>(e, LN2_HIGH, high + low))
    }
    /// 2 units.
    #[inline(always)]
    fn log2<const FUSED: bool>(self) -> f32 {
        let (f, e) = split(self);
        let (high, low) = logarithm::<FUSED>(f);
        // log2 e = 1 + 0.44269504: the sum of small parts first.
        const REST: f32 = 0.442_695_04;
        let part = fma::<FUSED>(low, REST, fma::<FUSED>(high, REST, low));
        logarithm_edges(self, (part + high) + e)
    }
    /// 2 units: ln(u) + (x - (u - 1)) / u with u = 1 + x rounded.
    #[inline(always)]
    fn log1p<const FUSED: bool>(self) -> f32 {
        let u = 1.0 + self;
        let result = Elementary::log::<FUSED>(u) + (self - (u - 1.0)) / u;
        // u = 0, inf, NaN or below 0: the logarithm alone; a small x is its own logarithm (and keeps a zero's sign).
        let result = if u > 0.0 && u < f32::INFINITY { result } else { Elementary::log::<FUSED>(u) };
        if u == 1.0 { self } else { result }
    }
    /// 1 unit up to [`TURNS`]; beyond it the caller goes another way.
    #[inline(always)]
    fn sin<const FUSED: bool>(self) -> f32 {
        let (turns, r) = quadrant(self);
        let (sin, cos) = sin_cos_inside(r);
        let value = if turns & 1 == 0 { sin } else { cos };
        let value = if turns & 2 == 0 { value } else { -value };
        if self == 0.0 { self } else { value as f32 }
    }
    /// As `sin`.
    #[inline(always)]
    fn cos<const FUSED: bool>(self) -> f32 {
        let (turns, r) = quadrant(self);
        let (sin, cos) = sin_cos_inside(r);
        let value = if turns & 1 == 0 { cos } else { sin };
        (if turns.wrapping_add(1) & 2 == 0 { value } else { -value }) as f32
    }
    /// As `sin`.
    #[inline(always)]
    fn tan<const FUSED: bool>(self) -> f32 {
        let (turns, r) = quadrant(self);
        let (sin, cos) = sin_cos_inside(r);
        let value = if turns & 1 == 0 { sin / cos } else { -cos / sin };
        if self == 0.0 { self } else { value as f32 }
    }
    /// 2 units: x + x^3 p(x^2), a minimax fit (error 7e-9), below 0.625, 1 - 2 / (e^2|x| + 1) beyond.
    #[inline(always)]
    fn tanh<const FUSED: bool>(self) -> f32 {
        let s = self * self;
        let p = horner::<FUSED, 5>(s, [-5.528_634e-3, 0.020_483_316, -0.053_692_97, 0.133_309, -0.333_332_63]);
        let inside = fma::<FUSED>(self * s, p, self);
        let size = Elementary::abs(self);
        let size = if size > 10.0 { 10.0 } else { size };
        // e^2|x| is an ordinary number here: one step of scaling does.
        let (shifted, r) = reduced::<FUSED>(2.0 * size);
        let e = fma::<FUSED>(r * r, exponential_tail::<FUSED>(r), r) + 1.0;
        let outside = 1.0 - 2.0 / fma::<FUSED>(e, power(low_bits(shifted)), 1.0);
        (if size < 0.625 { inside } else { outside }).copysign(self)
    }
    /// 3 units: e^-|x| never overflows, so small results go to 0 through the subnormal numbers.
    #[inline(always)]
    fn sigmoid<const FUSED: bool>(self) -> f32 {
        let z = Elementary::exp::<FUSED>(-Elementary::abs(self));
        (if self < 0.0 { z } else { 1.0 }) / (1.0 + z)
    }
    /// 3 units: a minimax fit of erf(x) / x up to 1 (error 1.2e-9), 1 - erfc(x) beyond.
    #[inline(always)]
    fn erf<const FUSED: bool>(self) -> f32 {
        let size = Elementary::abs(self);
        let inside = self
            * horner::<FUSED, 7>(
                self * self,
                [
                    7.853_855e-5,
                    -8.010_192e-4,
                    5.188_327_5e-3,
                    -0.026_853_811,
                    0.112_835_85,
                    -0.376_126_26,
                    std::f32::consts::FRAC_2_SQRT_PI,
                ],
            );
        let t = 1.0 / fma::<FUSED>(size, SCALED_ERFC_GAIN as f32, 1.0);
        let mut sum = SCALED_ERFC[9] as f32;
        for &coefficient in SCALED_ERFC[..9].iter().rev() {
            sum = fma::<FUSED>(sum, t, coefficient as f32);
        }
        let tail = sum * t * Elementary::exp::<FUSED>(-size * size);
        let outside = (1.0 - tail).copysign(self);
        if size < 1.0 { inside } else { outside }
    }
    #[inline(always)]
    fn atan2(self, other: f32) -> f32 {
        libm::atan2f(self, other)
    }
    #[inline(always)]
    fn pow(self, other: f32) -> f32 {
        libm::powf(self, other)
    }
    #[inline(always)]
    fn fmod(self, other: f32) -> f32 {
        self % other
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        self as i64
    }
    #[inline(always)]
    fn from_i64(value: i64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn from_i32(value: i32) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.is_nan()
    }
    #[inline(always)]
    fn copysign(self, sign: f32) -> f32 {
        f32::copysign(self, sign)
    }
}

impl Elementary for f64 {
    #[inline(always)]
    fn abs(self) -> f64 {
        f64::from_bits(self.to_bits() & (u64::MAX >> 1))
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        self.sqrt()
    }
    #[inline(always)]
    fn floor(self) -> f64 {
        self.floor()
    }
    #[inline(always)]
    fn ceil(self) -> f64 {
        self.ceil()
    }
    #[inline(always)]
    fn trunc(self) -> f64 {
        self.trunc()
    }
    #[inline(always)]
    fn round(self) -> f64 {
        self.round_ties_even()
    }
    fn exp<const FUSED: bool>(self) -> f64 {
        libm::exp(self)
    }
    fn exp2<const FUSED: bool>(self) -> f64 {
        libm::exp2(self)
    }
    fn expm1<const FUSED: bool>(self) -> f64 {
        libm::expm1(self)
    }
    fn log<const FUSED: bool>(self) -> f64 {
        libm::log(self)
    }
    fn log2<const FUSED: bool>(self) -> f64 {
        libm::log2(self)
    }
    fn log1p<const FUSED: bool>(self) -> f64 {
        libm::log1p(self)
    }
    fn sin<const FUSED: bool>(self) -> f64 {
        libm::sin(self)
    }
    fn cos<const FUSED: bool>(self) -> f64 {
        libm::cos(self)
    }
    fn tan<const FUSED: bool>(self) -> f64 {
        libm::tan(self)
    }
    fn tanh<const FUSED: bool>(self) -> f64 {
        libm::tanh(self)
    }
    fn sigmoid<const FUSED: bool>(self) -> f64 {
        let z = libm::exp(-self.abs());
        (if self < 0.0 { z } else { 1.0 }) / (1.0 + z)
    }
    fn erf<const FUSED: bool>(self) -> f64 {
        libm::erf(self)
    }
    fn atan2(self, other: f64) -> f64 {
        libm::atan2(self, other)
    }
    fn pow(self, other: f64) -> f64 {
        libm::pow(self, other)
    }
    fn fmod(self, other: f64) -> f64 {
        self % other
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        self as i64
    }
    #[inline(always)]
    fn from_i64(value: i64) -> f64 {
        value as f64
    }
    #[inline(always)]
    fn from_i32(value: i32) -> f64 {
        f64::from(value)
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.is_nan()
    }
    #[inline(always)]
    fn copysign(self, sign: f64) -> f64 {
        f64::copysign(self, sign)
    }
}

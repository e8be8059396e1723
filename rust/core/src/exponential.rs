//! e^x for x <= 0 in double precision, in plain multiplications and additions.
//!
//! x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series to degree 13 (truncation 4e-18 relative), 2^n by the
//! exponent bits. Rust never contracts a multiplication and an addition into one rounding, so every instruction set
//! gives the same bits, and a run's tokens do not change with the machine; a router's choices do not either. The compiler turns the loop into lanes.

const LOG2_E: f64 = std::f64::consts::LOG2_E;
/// ln 2 in two parts: the first has its low 21 bits zero, so n times it is exact.
const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// Adding 1.5 * 2^52 leaves the nearest integer in the low bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// Below it the result is 0: a probability of 3e-308 is none.
const LOWEST: f64 = -708.0;

/// 1 / k! for k = 13 down to 0.
const INVERSE_FACTORIALS: [f64; 14] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// e^x for x in [-inf, 0]; within 2 units in the last place, exactly 1 at 0, 0 below -708.
#[inline(always)]
pub(crate) fn exponential(x: f64) -> f64 {
    let inside = if x > LOWEST { x } else { LOWEST };
    let shifted = inside * LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (inside - n * LN2_HIGH) - n * LN2_LOW;
    let mut sum = INVERSE_FACTORIALS[0];
    for factor in &INVERSE_FACTORIALS[1..] {
        sum = sum * r + factor;
    }
    let power = f64::from_bits((shifted.to_bits() << 52).wrapping_add(1023 << 52));
    if x > LOWEST { sum * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_libm() {
        let mut worst = 0.0f64;
        for step in 0..200_000 {
            let x = -707.9 * f64::from(step) / 200_000.0;
            let truth = libm::exp(x);
            worst = worst.max(((exponential(x) - truth) / truth).abs());
        }
        assert!(worst < 2.0 * f64::EPSILON, "{worst:e}");
        assert_eq!(exponential(0.0), 1.0);
        assert_eq!(exponential(-0.0), 1.0);
        assert_eq!((exponential(f64::NEG_INFINITY), exponential(-1e300), exponential(-709.0)), (0.0, 0.0, 0.0));
        assert!(exponential(-1e-300) == 1.0);
    }
}

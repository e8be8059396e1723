//! Elementary functions in single precision against libm in double precision, at every level of this machine.

use crate::arch::lanes::{FloatLane, Operand, Unary};
use crate::arch::{Level, force};

/// Distance in units of the last place of the truth.
fn units(got: f32, truth: f64) -> f64 {
    if got.is_nan() || truth.is_nan() {
        return if got.is_nan() == truth.is_nan() { 0.0 } else { f64::INFINITY };
    }
    let near = truth as f32;
    if got == near {
        return 0.0;
    }
    if got.is_infinite() || near.is_infinite() {
        return f64::INFINITY;
    }
    let ulp = f64::from(f32::from_bits(near.abs().to_bits().max(0x0080_0000) & 0x7f80_0000)) * 2f64.powi(-23);
    (f64::from(got) - truth).abs() / ulp
}

/// All numbers in steps through the bit patterns, and the edges.
fn arguments(step: usize) -> Vec<f32> {
    let edges =
        [0.0, -0.0, 1.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, f32::MIN_POSITIVE];
    (0..u32::MAX)
        .step_by(step)
        .map(f32::from_bits)
        .chain(edges)
        .chain([1e-45, -1e-45, 88.72284, 88.7, -103.97, 0.5])
        .collect()
}

#[test]
fn functions_are_accurate_at_every_level() {
    // Functions, their truth, and the most units that they may be off where the result is a normal number.
    let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
    let functions: [(Unary, fn(f64) -> f64, f64); 14] = [
        (Unary::Exp, libm::exp, 1.0),
        (Unary::Exp2, libm::exp2, 2.0),
        (Unary::Expm1, libm::expm1, 2.0),
        (Unary::Log, libm::log, 1.0),
        (Unary::Log2, libm::log2, 2.0),
        (Unary::Log1p, libm::log1p, 2.0),
        (Unary::Sin, libm::sin, 0.6),
        (Unary::Cos, libm::cos, 0.6),
        (Unary::Tan, libm::tan, 0.6),
        (Unary::Tanh, libm::tanh, 2.0),
        (Unary::Sigmoid, sigmoid, 3.0),
        (Unary::Erf, libm::erf, 3.0),
        (Unary::Sqrt, libm::sqrt, 0.6),
        (Unary::Round, libm::rint, 0.0),
    ];
    let arguments = arguments(20_011);
    for level in Level::COMPILED.iter().filter(|level| level.is_available()) {
        force(Some(level.name())).unwrap();
        let mut out = vec![0f32; arguments.len()];
        for (op, truth, most) in functions {
            f32::floats().unary(op, Operand::Slice(&arguments), &mut out);
            let mut worst = (0.0, 0.0);
            for (&x, &got) in arguments.iter().zip(&out) {
                let exact = truth(f64::from(x));
                // Subnormal results may be a unit of theirs off.
                let off = units(got, exact);
                if off > worst.0 {
                    worst = (off, x);
                }
                if exact == 0.0 {
                    assert_eq!(got.is_sign_negative(), exact.is_sign_negative(), "{op:?}({x:e}) = {got:e}");
                }
            }
            assert!(worst.0 <= most, "{} {op:?}: {} units at {:e}", level.name(), worst.0, worst.1);
        }
    }
    force(None).unwrap();
}

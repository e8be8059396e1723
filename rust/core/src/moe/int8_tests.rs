use super::forward::forward;
use super::problem::{Layout, Pairs, Weights};
use super::quantise::quantise;
use crate::arch::Activation;
use crate::dtype::Real;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::tests::{at_every_level, noise};
use crate::view::{Array, ArrayMut};
use half::{bf16, f16};

fn quantised(weight: &[f64], shape: [usize; 3]) -> (Vec<i8>, Vec<f32>) {
    let (mut bytes, mut scale) = (vec![i8::MIN; weight.len()], vec![f32::NAN; shape[0] * shape[1]]);
    let view = Array::from_slice(weight, &shape).unwrap();
    let scales = ArrayMut::from_slice(&mut scale, &shape[..2]).unwrap();
    quantise("w", &view, ArrayMut::from_slice(&mut bytes, &shape).unwrap(), scales).unwrap();
    (bytes, scale)
}

fn check<S: Arithmetic>([tokens, d, n, experts]: [usize; 4], budget: f64) {
    let x: Vec<S> = noise(tokens * d, 1).into_iter().map(|x| S::narrow(S::Acc::of(x))).collect();
    let (up, up_scale) = quantised(&noise(experts * n * d, 2), [experts, n, d]);
    let (down, down_scale) = quantised(&noise(experts * d * n, 3), [experts, d, n]);
    let ids: Vec<i32> = (0..tokens).map(|token| (token * 7 % experts) as i32).collect();
    let scores = vec![0.5f32; tokens];
    let weights = Weights {
        gate_up: Array::from_slice(&up, &[experts, n, d]).unwrap(),
        down: Array::from_slice(&down, &[experts, d, n]).unwrap(),
        gate_up_scale: Some(Array::from_slice(&up_scale, &[experts, n]).unwrap()),
        down_scale: Some(Array::from_slice(&down_scale, &[experts, d]).unwrap()),
        gate_up_bias: None,
        down_bias: None,
        layout: Layout::Concatenated,
        activation: Activation::Relu,
    };
    let pairs = Pairs {
        ids: Array::from_slice(&ids, &[tokens, 1]).unwrap(),
        scores: Array::from_slice(&scores, &[tokens, 1]).unwrap(),
        tokens: None,
    };
    let mut out = vec![S::narrow(S::Acc::of(f64::NAN)); tokens * d];
    let view = ArrayMut::from_slice(&mut out, &[tokens, d]).unwrap();
    forward(Array::from_slice(&x, &[tokens, d]).unwrap(), &pairs, weights, view, None).unwrap();
    let (mut worst, mut size) = (0f64, 0f64);
    for t in 0..tokens {
        let e = ids[t] as usize;
        let weight = |bytes: &[i8], scale: &[f32], row: usize, width: usize, k: usize| {
            f64::from(bytes[row * width + k]) * f64::from(scale[row])
        };
        let feature = |j: usize| {
            let sum: f64 = (0..d).map(|c| weight(&up, &up_scale, e * n + j, d, c) * x[t * d + c].widen().f64()).sum();
            sum.max(0.0)
        };
        let active: Vec<f64> = (0..n).map(feature).collect();
        for c in 0..d {
            let sum: f64 = (0..n).map(|j| weight(&down, &down_scale, e * d + c, n, j) * active[j]).sum();
            worst += (out[t * d + c].widen().f64() - 0.5 * sum).powi(2);
            size += (0.5 * sum).powi(2);
        }
    }
    assert!(worst.sqrt() <= budget * size.sqrt(), "{} {tokens}x{d}x{n}: {}", S::DTYPE, (worst / size).sqrt());
}

#[test]
fn bytes_times_scales_are_weights_at_every_level() {
    at_every_level(|_| {
        for shape in [[1, 1, 1, 1], [3, 33, 17, 2], [40, 20, 50, 2], [30, 129, 66, 7]] {
            check::<f32>(shape, 1e-6);
            check::<f64>(shape, 1e-14);
            check::<f16>(shape, 1e-3);
            check::<bf16>(shape, 8e-3);
        }
    });
}

#[test]
fn a_byte_is_within_half_a_scale() {
    let mut weight = noise(5 * 70 * 9, 4);
    weight[9..18].fill(0.0);
    let (bytes, scale) = quantised(&weight, [5, 70, 9]);
    assert_eq!((scale[1], &bytes[9..18]), (0.0, &[0i8; 9][..]));
    for (at, &value) in weight.iter().enumerate() {
        let step = f64::from(scale[at / 9]);
        assert!((value - step * f64::from(bytes[at])).abs() <= step / 2.0 && bytes[at] != i8::MIN);
    }
    let error = {
        weight[600] = f64::NAN;
        let (mut bytes, mut scale) = (vec![0i8; weight.len()], vec![0f32; 350]);
        let view = Array::from_slice(&weight, &[5, 70, 9]).unwrap();
        let scales = ArrayMut::from_slice(&mut scale, &[5, 70]).unwrap();
        quantise("w", &view, ArrayMut::from_slice(&mut bytes, &[5, 70, 9]).unwrap(), scales).unwrap_err()
    };
    assert_eq!(error.to_string(), "w: expected finite weights, got NaN at expert 0, row 66, column 6");
}

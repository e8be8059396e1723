use super::backward::{Gradients, Inputs, backward};
use super::forward::forward;
use super::problem::{Layout, Pairs, Weights};
use super::routing::{NONE, Routing};
use crate::arch::Activation;
use crate::dtype::Real;
use crate::gemm::arithmetic::Arithmetic;
use crate::gemm::tests::{at_every_level, noise};
use crate::view::{Array, ArrayMut};
use half::{bf16, f16};
use proptest::prelude::*;

fn check<S: Arithmetic>([tokens, d, n, experts, slots]: [usize; 5], layout: Layout, budget: f64) {
    let fill = |count, seed| noise(count, seed).into_iter().map(|x| S::narrow(S::Acc::of(x))).collect::<Vec<S>>();
    let (x, up, down) = (fill(tokens * d, 1), fill(experts * 2 * n * d, 2), fill(experts * d * n, 3));
    // Every third pair is a sentinel.
    let ids: Vec<i32> =
        (0..tokens * slots).map(|p| if p % 3 == 2 { experts as i32 } else { (p * 7 % experts) as i32 }).collect();
    let scores: Vec<f32> = noise(tokens * slots, 5).into_iter().map(|s| s as f32).collect();
    let mut out = vec![S::narrow(S::Acc::of(f64::NAN)); tokens * d];
    let weights = Weights {
        gate_up: Array::from_slice(&up, &[experts, 2 * n, d]).unwrap(),
        down: Array::from_slice(&down, &[experts, d, n]).unwrap(),
        gate_up_scale: None,
        down_scale: None,
        gate_up_bias: None,
        down_bias: None,
        layout,
        activation: Activation::Swiglu,
    };
    let pairs = [tokens, slots];
    let routing = Pairs {
        ids: Array::from_slice(&ids, &pairs).unwrap(),
        scores: Array::from_slice(&scores, &pairs).unwrap(),
        tokens: None,
    };
    let out_view = ArrayMut::from_slice(&mut out, &[tokens, d]).unwrap();
    forward(Array::from_slice(&x, &[tokens, d]).unwrap(), &routing, weights, out_view, None).unwrap();
    let mut worst = 0f64;
    let mut size = 0f64;
    for t in 0..tokens {
        let mut exact = vec![0.0; d];
        for slot in 0..slots {
            let e = ids[t * slots + slot] as usize;
            if e == experts {
                continue;
            }
            let row = |r: usize| {
                (0..d).map(|c| up[(e * 2 * n + r) * d + c].widen().f64() * x[t * d + c].widen().f64()).sum::<f64>()
            };
            let feature = |j: usize| {
                let (g, u) =
                    if layout == Layout::Concatenated { (row(j), row(n + j)) } else { (row(2 * j), row(2 * j + 1)) };
                g / (1.0 + (-g).exp()) * u
            };
            let active: Vec<f64> = (0..n).map(feature).collect();
            for (c, sum) in exact.iter_mut().enumerate() {
                let y: f64 = (0..n).map(|j| down[(e * d + c) * n + j].widen().f64() * active[j]).sum();
                *sum += f64::from(scores[t * slots + slot]) * y;
            }
        }
        for (c, want) in exact.iter().enumerate() {
            worst += (out[t * d + c].widen().f64() - want).powi(2);
            size += want * want;
        }
    }
    assert!(worst.sqrt() <= budget * size.sqrt(), "{}: {}", S::DTYPE, (worst / size).sqrt());
}

#[test]
fn the_layer_matches_the_definition_at_every_level() {
    at_every_level(|_| {
        for shape in [[1, 1, 1, 1, 1], [5, 33, 17, 3, 2], [90, 20, 50, 2, 1], [30, 64, 100, 7, 3]] {
            for layout in [Layout::Concatenated, Layout::Interleaved] {
                check::<f32>(shape, layout, 1e-6);
                check::<f64>(shape, layout, 1e-14);
                // Two roundings of relative size 2^-12 (f16) and 2^-9 (bf16).
                check::<f16>(shape, layout, 1e-3);
                check::<bf16>(shape, layout, 8e-3);
            }
        }
    });
}

/// Directional derivative of <grad, layer> by central differences against the gradients, in double precision.
#[test]
fn gradients_match_differences_at_every_level() {
    let [tokens, d, n, experts, slots] = [9, 6, 5, 3, 2];
    let sizes = [tokens * d, tokens * slots, experts * 2 * n * d, experts * d * n];
    let ids: Vec<i32> = (0..tokens * slots).map(|p| [0, 2, -1, 2][p % 4]).collect(); // expert 1 stays empty
    let point: Vec<Vec<f64>> = sizes.iter().enumerate().map(|(i, &size)| noise(size, i as u32 + 1)).collect();
    let along: Vec<Vec<f64>> = sizes.iter().enumerate().map(|(i, &size)| noise(size, i as u32 + 11)).collect();
    let grad = noise(tokens * d, 21);
    let weights = |p: &[Vec<f64>], f: &mut dyn FnMut(Array<'_>, Pairs<'_>, Weights<'_>)| {
        let view = |data, shape: &[usize]| Array::from_slice::<f64>(data, shape).unwrap();
        let ids = Array::from_slice(&ids, &[tokens, slots]).unwrap();
        let pairs = Pairs { ids, scores: view(&p[1], &[tokens, slots]), tokens: None };
        let weights = Weights {
            gate_up: view(&p[2], &[experts, 2 * n, d]),
            down: view(&p[3], &[experts, d, n]),
            gate_up_scale: None,
            down_scale: None,
            gate_up_bias: None,
            down_bias: None,
            layout: Layout::Interleaved,
            activation: Activation::GegluTanh,
        };
        f(view(&p[0], &[tokens, d]), pairs, weights);
    };
    let run = |p: &[Vec<f64>]| {
        let (mut out, mut pre) = (vec![f64::NAN; tokens * d], vec![f64::NAN; tokens * slots * 2 * n]);
        weights(p, &mut |x, pairs, weights| {
            let pre_view = ArrayMut::from_slice(&mut pre, &[tokens * slots, 2 * n]).unwrap();
            forward(x, &pairs, weights, ArrayMut::from_slice(&mut out, &[tokens, d]).unwrap(), Some(pre_view)).unwrap();
        });
        (out, pre)
    };
    let moved = |step: f64| {
        let shift = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| a + step * b).collect();
        let out = run(&point.iter().zip(&along).map(shift).collect::<Vec<_>>()).0;
        out.iter().zip(&grad).map(|(o, g)| o * g).sum::<f64>()
    };
    at_every_level(|_| {
        let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
        let pre = run(&point).1;
        let mut out: Vec<Vec<f64>> = sizes.iter().map(|&size| vec![f64::NAN; size]).collect();
        weights(&point, &mut |x, pairs, weights| {
            let [gx, gs, gu, gd] = &mut out[..] else { unreachable!() };
            let gradients = Gradients {
                x: Some(ArrayMut::from_slice(gx, &[tokens, d]).unwrap()),
                scores: Some(ArrayMut::from_slice(gs, &[tokens, slots]).unwrap()),
                gate_up: Some(ArrayMut::from_slice(gu, &[experts, 2 * n, d]).unwrap()),
                down: Some(ArrayMut::from_slice(gd, &[experts, d, n]).unwrap()),
                ..Gradients::default()
            };
            let inputs = Inputs {
                grad: Array::from_slice(&grad, &[tokens, d]).unwrap(),
                x,
                pairs,
                weights,
                pre_activation: Array::from_slice(&pre, &[tokens * slots, 2 * n]).unwrap(),
            };
            backward(inputs, gradients).unwrap();
        });
        let product = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let slope: f64 = out.iter().zip(&along).map(product).sum();
        assert!((slope - difference).abs() < 1e-7 * difference.abs().max(1.0), "{slope} {difference}");
        assert!(out[2][2 * n * d..4 * n * d].iter().all(|&w| w == 0.0), "an expert without rows has zero gradients");
    });
}

proptest! {
    #[test]
    fn a_routing_is_a_stable_grouping(ids in proptest::collection::vec(-1i64..6, 0..60), slots in 1usize..4) {
        let ids = &ids[..ids.len() / slots * slots];
        let experts = 5;
        let routing = Routing::new(ids, slots, experts);
        let valid = ids.iter().filter(|id| (0..experts as i64).contains(*id)).count();
        prop_assert_eq!(routing.offsets[0], 0);
        prop_assert_eq!(routing.offsets[experts], valid);
        let mut seen = vec![false; valid];
        let mut last = vec![None; experts];
        for (pair, &id) in ids.iter().enumerate() {
            let row = routing.rows[pair];
            if !(0..experts as i64).contains(&id) {
                prop_assert_eq!(row, NONE);
                continue;
            }
            prop_assert!(routing.of(id as usize).contains(&row) && !seen[row]);
            prop_assert_eq!(routing.tokens[row], pair / slots);
            prop_assert!(last[id as usize].is_none_or(|before| before < row)); // ascending pairs, ascending rows
            seen[row] = true;
            last[id as usize] = Some(row);
        }
    }
}

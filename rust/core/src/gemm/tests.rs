use super::*;
use crate::arch::{self, Level};
use crate::rng::philox4x32;
use std::sync::Mutex;

/// Tests that force a level must not overlap.
pub(crate) static FORCED: Mutex<()> = Mutex::new(());

pub(crate) fn at_every_level(body: impl Fn(Level)) {
    let _guard = FORCED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    for level in Level::COMPILED.iter().copied().filter(|level| level.is_available()) {
        arch::force(Some(level.name())).unwrap();
        body(level);
    }
    arch::force(None).unwrap();
}

pub(crate) fn noise(count: usize, seed: u32) -> Vec<f64> {
    (0..count)
        .map(|i| f64::from(philox4x32([i as u32, 0, 0, 4], [seed, 0])[0]) / f64::from(u32::MAX) * 2.0 - 1.0)
        .collect()
}

fn check<S: Arithmetic>(m: usize, n: usize, k: usize, transpose: bool, gather: bool, budget: f64) {
    let a: Vec<S> = noise(m * k, 1).into_iter().map(|x| S::narrow(S::Acc::of(x))).collect();
    let b: Vec<S> = noise(n * k, 2).into_iter().map(|x| S::narrow(S::Acc::of(x))).collect();
    let rows: Vec<i64> = (0..m as i64).rev().chain(0..m as i64).step_by(2).collect();
    let count = if gather { rows.len() } else { m };
    let mut out = vec![S::Acc::of(f64::NAN); count * n];
    let a_view = Array::from_slice(&a, &[m, k]).unwrap();
    let b_view = if transpose {
        Array::from_slice(&b, &[n, k]).unwrap().permuted(&[1, 0])
    } else {
        Array::from_slice(&b, &[k, n]).unwrap()
    };
    matmul(&a_view, &b_view, gather.then_some(&rows[..]), ArrayMut::from_slice(&mut out, &[count, n]).unwrap())
        .unwrap();
    for i in 0..count {
        for j in 0..n {
            let row = if gather { rows[i] as usize } else { i };
            let exact: f64 = (0..k)
                .map(|t| {
                    a[row * k + t].widen().f64() * (if transpose { b[j * k + t] } else { b[t * n + j] }).widen().f64()
                })
                .sum();
            let error = (out[i * n + j].f64() - exact).abs();
            assert!(error <= budget * (k as f64).max(8.0), "{} m{m} n{n} k{k} ({i},{j}): {error}", S::DTYPE);
        }
    }
}

#[test]
fn products_match_the_definition_at_every_level() {
    at_every_level(|_| {
        for (m, n, k) in [
            (0, 3, 2),
            (3, 0, 2),
            (2, 3, 0),
            (1, 1, 1),
            (1, 50, 33),
            (8, 200, 17),
            (9, 49, 31),
            (97, 193, 65),
            (13, 16, 2049),
        ] {
            for transpose in [false, true] {
                for gather in [false, true] {
                    check::<f32>(m, n, k, transpose, gather, 1e-7);
                    check::<f64>(m, n, k, transpose, gather, 1e-15);
                    check::<bf16>(m, n, k, transpose, gather, 1e-7);
                    check::<f16>(m, n, k, transpose, gather, 1e-7);
                }
            }
        }
    });
}

#[test]
fn wrong_input_is_refused() {
    let data = [0f32; 6];
    let mut out = [0f32; 4];
    let a = Array::from_slice(&data, &[2, 3]).unwrap();
    let b = Array::from_slice(&data, &[2, 3]).unwrap();
    let error = matmul(&a, &b, None, ArrayMut::from_slice(&mut out, &[2, 2]).unwrap()).unwrap_err();
    assert!(error.to_string().contains("b: expected [3, columns]"), "{error}");
    let b = Array::from_slice(&data, &[3, 2]).unwrap();
    let error = matmul(&a, &b, Some(&[0, 2]), ArrayMut::from_slice(&mut out, &[2, 2]).unwrap()).unwrap_err();
    assert!(error.to_string().contains("2 at position 1"), "{error}");
}

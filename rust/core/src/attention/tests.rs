use super::problem::Rules;
use super::*;
use crate::dtype::{Flag, Real};
use crate::gemm::tests::{at_every_level, noise};
use crate::view::Array;

struct Case {
    size: [usize; 7], // batch, query heads, key heads, queries, keys, head dim, value dim
    causal: bool,
    left: Option<usize>,
    masked: bool,
    block_size: usize,
}

fn check<S: Arithmetic>(case: &Case, budget: f64) {
    let [b, hq, hk, sq, sk, d, dv] = case.size;
    let fill = |count, seed| noise(count, seed).into_iter().map(|x| S::narrow(S::Acc::of(x))).collect::<Vec<S>>();
    let (q, k, v) = (fill(b * hq * sq * d, 1), fill(b * hk * sk * d, 2), fill(b * hk * sk * dv, 3));
    let flags: Vec<Flag> = noise(b * hq * sq * sk, 4).into_iter().map(|x| Flag(u8::from(x > -0.3))).collect();
    let blocks = sk.div_ceil(case.block_size.max(1)) as i64;
    let chosen: Vec<i64> =
        (0..b * sq * 2).map(|i| if i % 5 == 0 || blocks == 0 { -1 } else { (i as i64 * 7) % blocks.max(1) }).collect();
    let rules = Rules {
        scale: 0.5,
        causal: case.causal,
        left: case.left,
        right: None,
        mask: case.masked.then(|| Array::from_slice(&flags, &[b, hq, sq, sk]).unwrap()),
        block_indices: (case.block_size > 0).then(|| Array::from_slice(&chosen, &[b, 1, sq, 2]).unwrap()),
        block_size: case.block_size,
        ..Rules::default()
    };
    let mut out = vec![S::narrow(S::Acc::of(f64::NAN)); b * hq * sq * dv];
    let mut lse = vec![S::Acc::of(f64::NAN); b * hq * sq];
    let view = |data, shape: [usize; 4]| Array::from_slice::<S>(data, &shape).unwrap();
    let problem =
        Problem::new(view(&q, [b, hq, sq, d]), view(&k, [b, hk, sk, d]), view(&v, [b, hk, sk, dv]), rules).unwrap();
    let out_view = ArrayMut::from_slice(&mut out, &[b, hq, sq, dv]).unwrap();
    forward(&problem, out_view, ArrayMut::from_slice(&mut lse, &[b, hq, sq]).unwrap()).unwrap();
    for row in 0..b * hq * sq {
        let (batch, head, i) = (row / (hq * sq), row / sq % hq, row % sq);
        let group = hk * batch + head / (hq / hk);
        let keep = |j: usize| {
            let at = i as i64 + sk as i64 - sq as i64;
            (!case.causal || j as i64 <= at)
                && case.left.is_none_or(|left| j as i64 >= at - left as i64)
                && (!case.masked || flags[row * sk + j].get())
                && (case.block_size == 0
                    || (0..2).any(|s| chosen[(batch * sq + i) * 2 + s] == (j / case.block_size) as i64))
        };
        let score = |j: usize| {
            0.5 * (0..d).map(|c| q[row * d + c].widen().f64() * k[(group * sk + j) * d + c].widen().f64()).sum::<f64>()
        };
        let kept: Vec<(usize, f64)> = (0..sk).filter(|&j| keep(j)).map(|j| (j, score(j))).collect();
        let total: f64 = kept.iter().map(|(_, s)| s.exp()).sum();
        let expected = if kept.is_empty() { f64::NEG_INFINITY } else { total.ln() };
        assert!(
            lse[row].f64() == expected || (lse[row].f64() - expected).abs() < 1e-5,
            "lse of row {row}: {:?} {expected}",
            lse[row]
        );
        for c in 0..dv {
            let exact: f64 =
                kept.iter().map(|(j, s)| s.exp() / total * v[(group * sk + j) * dv + c].widen().f64()).sum();
            let error = (out[row * dv + c].widen().f64() - exact).abs();
            assert!(error <= budget, "{} {:?} row {row} column {c}: {error}", S::DTYPE, case.size);
        }
    }
}

#[test]
fn values_match_the_definition_at_every_level() {
    let plain = |size| Case { size, causal: false, left: None, masked: false, block_size: 0 };
    at_every_level(|_| {
        for size in [
            [1, 1, 1, 1, 1, 1, 1],
            [2, 4, 2, 1, 130, 20, 9],
            [1, 6, 2, 20, 33, 17, 40],
            [1, 2, 1, 50, 20, 64, 64],
            [1, 1, 1, 3, 0, 4, 4],
        ] {
            for case in [
                plain(size),
                Case { causal: true, ..plain(size) },
                Case { causal: true, left: Some(7), ..plain(size) },
                Case { masked: true, ..plain(size) },
                Case { block_size: 3, causal: true, ..plain(size) },
            ] {
                check::<f32>(&case, 2e-6);
                check::<f64>(&case, 1e-14);
                // One rounding of the output, and (bf16) one of the weights.
                check::<f16>(&case, 6e-4);
                check::<bf16>(&case, 8e-3);
            }
        }
    });
}

#[test]
fn wrong_input_is_refused() {
    let data = [0f32; 24];
    let four = |shape: [usize; 4]| Array::from_slice(&data[..shape.iter().product()], &shape).unwrap();
    let make = |q, k, v| Problem::new(four(q), four(k), four(v), Rules::default()).unwrap_err().to_string();
    assert!(make([1, 3, 2, 4], [1, 2, 3, 4], [1, 2, 3, 4]).contains("divides query's 3"));
    assert!(make([1, 1, 2, 4], [1, 1, 2, 3], [1, 1, 2, 4]).contains("to match query"));
    assert!(make([1, 1, 2, 4], [1, 1, 2, 4], [1, 1, 3, 4]).contains("to match key"));
}

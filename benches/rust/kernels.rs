//! Criterion benchmarks of the core's rooms, without Python: `cargo bench -p tilewise-core`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use std::hint::black_box;
use tilewise_core::arch::Activation;
use tilewise_core::attention::problem::{Problem, Rules};
use tilewise_core::moe::problem::{Layout, Pairs, Weights};
use tilewise_core::view::{Array, ArrayMut};
use tilewise_core::{attention, gemm, moe, rng};

fn noise(count: usize) -> Vec<f32> {
    (0..count).map(|i| rng::uniform(1, 0, i as u64, rng::Purpose::Other) as f32 - 0.5).collect()
}

fn matmul(c: &mut Criterion) {
    const N: usize = 512;
    let (a, b, mut out) = (noise(N * N), noise(N * N), vec![0f32; N * N]);
    let mut group = c.benchmark_group("matmul 512^3");
    group.throughput(Throughput::Elements(2 * (N * N * N) as u64));
    group.bench_function("f32", |bench| {
        bench.iter(|| {
            let (a, b) = (Array::from_slice(&a, &[N, N]).unwrap(), Array::from_slice(&b, &[N, N]).unwrap());
            gemm::matmul(&a, &b, None, ArrayMut::from_slice(black_box(&mut out), &[N, N]).unwrap()).unwrap();
        });
    });
    let half = |x: &[f32]| x.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
    let (a, b) = (half(&a), half(&b));
    group.bench_function("bf16", |bench| {
        bench.iter(|| {
            let (a, b) = (Array::from_slice(&a, &[N, N]).unwrap(), Array::from_slice(&b, &[N, N]).unwrap());
            gemm::matmul(&a, &b, None, ArrayMut::from_slice(black_box(&mut out), &[N, N]).unwrap()).unwrap();
        });
    });
}

fn attend(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention f32, 4 heads of 64, causal");
    for (name, queries, keys) in [("prefill 512", 512, 512), ("decode 1 over 4096", 1, 4096)] {
        let (q, kv) = (noise(4 * queries * 64), noise(4 * keys * 64));
        let (mut out, mut lse) = (vec![0f32; 4 * queries * 64], vec![0f32; 4 * queries]);
        group.bench_function(name, |bench| {
            bench.iter(|| {
                let view = |data, length| Array::from_slice(data, &[1, 4, length, 64]).unwrap();
                let rules = Rules { scale: 0.125, causal: true, ..Rules::default() };
                let problem = Problem::new(view(&q, queries), view(&kv, keys), view(&kv, keys), rules).unwrap();
                let out = ArrayMut::from_slice(black_box(&mut out), &[1, 4, queries, 64]).unwrap();
                attention::forward(&problem, out, ArrayMut::from_slice(&mut lse, &[1, 4, queries]).unwrap()).unwrap();
            });
        });
    }
}

fn experts(c: &mut Criterion) {
    const EXPERTS: usize = 8;
    const WIDTH: usize = 256;
    const HIDDEN: usize = 128;
    let (up, down) = (noise(EXPERTS * 2 * HIDDEN * WIDTH), noise(EXPERTS * WIDTH * HIDDEN));
    let mut group = c.benchmark_group("experts f32 (d 256, n 128, E 8, K 2)");
    for tokens in [1, 256] {
        let (x, scores) = (noise(tokens * WIDTH), noise(tokens * 2));
        let ids: Vec<i32> = (0..tokens * 2).map(|pair| (pair * 5 % EXPERTS) as i32).collect();
        let mut out = vec![0f32; tokens * WIDTH];
        group.bench_function(format!("{tokens} tokens"), |bench| {
            bench.iter(|| {
                let weights = Weights {
                    gate_up: Array::from_slice(&up, &[EXPERTS, 2 * HIDDEN, WIDTH]).unwrap(),
                    down: Array::from_slice(&down, &[EXPERTS, WIDTH, HIDDEN]).unwrap(),
                    gate_up_scale: None,
                    down_scale: None,
                    gate_up_bias: None,
                    down_bias: None,
                    layout: Layout::Concatenated,
                    activation: Activation::Swiglu,
                };
                let pairs = Pairs {
                    ids: Array::from_slice(&ids, &[tokens, 2]).unwrap(),
                    scores: Array::from_slice(&scores, &[tokens, 2]).unwrap(),
                    tokens: None,
                };
                let out = ArrayMut::from_slice(black_box(&mut out), &[tokens, WIDTH]).unwrap();
                moe::forward::forward(Array::from_slice(&x, &[tokens, WIDTH]).unwrap(), &pairs, weights, out, None)
                    .unwrap();
            });
        });
    }
}

criterion_group!(benches, matmul, attend, experts);
criterion_main!(benches);

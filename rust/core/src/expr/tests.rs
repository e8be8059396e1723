//! Bounds against enumeration, extremes against search, the interpreter's promises to its callers.

use super::bounds::{Region, Span, spans};
use super::extremes::Extremes;
use super::table::{Op, TABLE, Value};
use super::{Bound, CaptureGradient, Evaluator, Extents, Program, Side};
use crate::rng::{Purpose, uniform};
use crate::view::Array;

/// The `i`-th whole number of a stream, in `0..below`.
fn pick(stream: u32, i: u64, below: i64) -> i64 {
    (uniform(7, stream, i, Purpose::Other) * below as f64) as i64
}

fn contains(span: Span, value: Value) -> bool {
    match (span, value) {
        (Span::Int { low, high }, Value::Int(x)) => low <= x && x <= high,
        (Span::Float { nan, .. }, Value::Float(x)) if x.is_nan() => nan,
        (Span::Float { low, high, .. }, Value::Float(x)) => low <= x && x <= high,
        (Span::Bool { no, yes }, Value::Bool(x)) => {
            if x {
                yes
            } else {
                no
            }
        }
        _ => false,
    }
}

/// Evaluates all nodes at one element by the table.
fn values(program: &Program, query: i64, key: i64) -> Vec<Value> {
    let mut values: Vec<Value> = Vec::new();
    for node in program.nodes() {
        let args: Vec<Value> = node.args.iter().map(|&arg| values[arg as usize]).collect();
        values.push(match node.op {
            Op::Query => Value::Int(query),
            Op::Key => Value::Int(key),
            op => node.value().unwrap_or_else(|| (op.entry().meaning)(&args)),
        });
    }
    values
}

#[test]
fn bounds_hold_every_value_of_every_operation() {
    let mut stream = 0;
    for entry in TABLE.iter().filter(|entry| !entry.signatures.is_empty()) {
        for signature in entry.signatures {
            for round in 0..12 {
                stream += 1;
                let number = |i: u64, below: i64| pick(stream, i, below);
                let scale = [1.0, 0.37, -2.5, 1e-3][number(0, 4) as usize];
                let (a, b) = (number(1, 30) - 15, number(2, 30) - 15);
                // Nodes 3, 6, 8: integers, 10, 11: floats, 13, 14: truth values.
                let head = format!(
                    "tilewise-expr 1 mask\nquery\nkey\nint {a}\nadd 0 2\nint {}\nint {b}\nadd 1 5\nfloat {scale:?}\n\
                     to_float 3\nto_float 6\nmul 8 7\nadd 9 7\nint {}\nlt 3 6\nle 6 12\n",
                    number(3, 6),
                    number(4, 9) - 4,
                );
                let operands = signature.chars().take_while(|&letter| letter != '>').enumerate().map(|(i, letter)| {
                    let choices: [i64; 2] = match letter {
                        'i' => {
                            if i == 1 && round % 2 == 0 {
                                [4, 12]
                            } else {
                                [3, 6]
                            }
                        }
                        'f' => [10, 11],
                        _ => [13, 14],
                    };
                    choices[(i + round) % 2].to_string()
                });
                let line = operands.collect::<Vec<_>>().join(" ");
                let text = format!("{head}{} {line}\nreturn 13\n", entry.name);
                let program = Program::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
                let (q, k) = (number(5, 20) as usize, number(6, 20) as usize);
                let region = Region {
                    batch: 0..1,
                    heads: 0..1,
                    queries: q..q + 1 + number(7, 9) as usize,
                    keys: k..k + 1 + number(8, 9) as usize,
                };
                let mut all = Vec::new();
                spans(program.nodes(), &region, |node, _| Span::all(node.class), |x| x, &mut all);
                for query in region.queries.clone() {
                    for key in region.keys.clone() {
                        let values = values(&program, query as i64, key as i64);
                        for (id, (&span, &value)) in all.iter().zip(&values).enumerate() {
                            assert!(contains(span, value), "{}: {value:?} is not in {span:?}", program.show(id as u32));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn extremes_hold_what_a_search_finds() {
    let data: Vec<i64> = (0..3 * 101).map(|i| pick(1, i, 1000) - 500).collect();
    let array = Array::from_slice(&data, &[3, 101]).unwrap();
    let extremes = Extremes::of(&array).unwrap();
    let search = |range: std::ops::Range<usize>| {
        let part = &data[range];
        (*part.iter().min().unwrap(), *part.iter().max().unwrap())
    };
    for i in 0..500u64 {
        let row = pick(2, i, 3) as usize;
        let low = pick(3, i, 101) as usize;
        let high = low + pick(4, i, 101 - low as i64) as usize;
        let index = |low: usize, high: usize| Span::Int { low: low as i64, high: high as i64 };
        let Span::Int { low: least, high: most } = extremes.over(&[index(row, row), index(low, high)]) else {
            panic!("integers")
        };
        // Whole leaves of sixteen.
        let leaves = (low / 16 * 16)..((high / 16 + 1) * 16).min(101);
        assert_eq!((least, most), search(row * 101 + leaves.start..row * 101 + leaves.end));
        assert_eq!(extremes.over(&[index(0, 1), index(low, high)]), extremes.whole());
    }
    // Negative indices wrap; what is outside reads anything.
    let last = Span::Int { low: -101, high: -1 };
    let row = Span::Int { low: -1, high: -1 };
    assert_eq!(extremes.over(&[row, last]), Span::Int { low: search(202..303).0, high: search(202..303).1 });
    assert_eq!(extremes.over(&[row, Span::Int { low: 0, high: 101 }]), extremes.whole());
}

const RELATIVE: &str = "tilewise-expr 1 score\ncapture float 1\ncapture float 1\nscore\nquery\nkey\nsub 1 2\nint 63\n\
                        add 3 4\ngather 0 5\nhead\ngather 1 7\nmul 6 8\nadd 0 9\nreturn 10\n";

#[test]
fn lanes_beyond_the_last_are_harmless_and_any_cut_gives_the_same() {
    let program = Program::parse(RELATIVE).unwrap().simplified();
    let table: Vec<f32> = (0..127).map(|i| i as f32 / 8.0).collect();
    let slopes = [0.5f32, 2.0];
    let arrays = || vec![Array::from_slice(&table, &[127]).unwrap(), Array::from_slice(&slopes, &[2]).unwrap()];
    let extents = Extents { batch: 1, heads: 2, queries: 64, keys: 64 };
    let bound = Bound::<f32>::new("score_mod", &program, arrays(), extents).unwrap();
    let gradient = program.gradient().unwrap();
    let backward = Bound::<f32>::new("score_mod", &gradient, arrays(), extents).unwrap();
    let (heads, queries): (Vec<usize>, Vec<usize>) =
        ((0..13).map(|i| i % 2).collect(), (0..13).map(|i| i / 2 + 50).collect());
    let truth = |lane: usize, key: usize| 1.0 + table[queries[lane] + 63 - key] * slopes[heads[lane]];
    for width in [13, 16, 40] {
        let side = Side::Queries { heads: &heads, queries: &queries };
        let mut evaluator = Evaluator::new(&bound);
        let mut derivative = Evaluator::new(&backward);
        for keys in [0..64, 5..6, 60..64] {
            let mut block = vec![f32::NAN; keys.len() * width];
            for row in block.chunks_mut(width) {
                row[..13].fill(1.0);
            }
            evaluator.lanes(0, side.clone());
            evaluator.score(Side::Keys(keys.clone()), &mut block, width);
            for (row, key) in keys.clone().enumerate() {
                for lane in 0..13 {
                    assert_eq!(block[row * width + lane], truth(lane, key));
                }
            }
            let (mut sums, mut none) = (CaptureGradient::new(&[127]), CaptureGradient::new(&[2]));
            let mut grads = vec![f32::NAN; keys.len() * width];
            grads.chunks_mut(width).for_each(|row| row[..13].fill(0.5));
            let scores = vec![f32::NAN; grads.len()];
            derivative.lanes(0, side.clone());
            derivative.gradient(
                Side::Keys(keys.clone()),
                &scores,
                &mut grads,
                width,
                &mut [Some(&mut sums), Some(&mut none)],
            );
            let mut expected = vec![0f32; 127];
            for key in keys.clone() {
                for lane in 0..13 {
                    expected[queries[lane] + 63 - key] += 0.5 * slopes[heads[lane]];
                }
            }
            assert_eq!(sums.sums, expected);
            assert!(grads.chunks(width).all(|row| row[..13].iter().all(|&x| x == 0.5)));
        }
    }
    assert_eq!(bound.out_of_range().or(backward.out_of_range()), None);
}

#[test]
fn both_orientations_can_take_turns() {
    let program = Program::parse(RELATIVE).unwrap();
    let (table, slopes) = (vec![1f64; 127], [2f64, 3.0]);
    let arrays = vec![Array::from_slice(&table, &[127]).unwrap(), Array::from_slice(&slopes, &[2]).unwrap()];
    let extents = Extents { batch: 1, heads: 2, queries: 64, keys: 64 };
    let bound = Bound::<f64>::new("score_mod", &program, arrays, extents).unwrap();
    let mut evaluator = Evaluator::new(&bound);
    let (heads, queries) = ([0, 1, 1], [5, 6, 63]);
    let side = Side::Queries { heads: &heads, queries: &queries };
    for _ in 0..2 {
        let mut block = vec![0f64; 3 * 7];
        evaluator.lanes(0, Side::Keys(3..10));
        evaluator.score(side.clone(), &mut block, 7);
        assert_eq!(block, [[2.0; 7], [3.0; 7], [3.0; 7]].concat());
        block.fill(0.0);
        evaluator.lanes(0, side.clone());
        evaluator.score(Side::Keys(0..7), &mut block, 3);
        assert_eq!(block, [2.0, 3.0, 3.0].repeat(7));
    }
}

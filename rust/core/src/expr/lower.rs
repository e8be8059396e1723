//! Rewrites that need to know extents.
//!
//! Integers that floats hold exactly are computed as floats:
//! `to_float(query - key)` costs a subtraction and a conversion an element; `to_float(query) - to_float(key)` converts
//! once a query and once a key, and has the same value while every integer in it is exact in the evaluating type.
//!
//! A distance is compared by its ends: `query - key <= 256` is `query - 256 <= key`, one operation an element less, as
//! long as no integer in it can wrap around.

use super::bounds::Span;
use super::graph::{Graph, Node};
use super::program::Program;
use super::table::{Class, Op, Value};

/// The program with conversions moved toward the leaves; `exact` is the largest integer below which all are exact.
pub fn lowered(program: &Program, spans: &[Span], exact: i64) -> Program {
    let nodes = program.nodes();
    let fits = |id: u32| matches!(spans[id as usize], Span::Int { low, high } if low >= -exact && high <= exact);
    // Operations whose float version gives no -0 where the integer's is 0.
    let moves = |id: u32| {
        let node = &nodes[id as usize];
        matches!(node.op, Op::Add | Op::Sub | Op::Abs | Op::Min | Op::Max)
            && fits(id)
            && node.args.iter().all(|&arg| fits(arg))
    };
    let mut graph = Graph::default();
    let mut number: Vec<u32> = Vec::with_capacity(nodes.len());
    // The float version of integer nodes.
    let mut floats: Vec<Option<u32>> = vec![None; nodes.len()];
    for node in nodes {
        if node.op != Op::ToFloat || nodes[node.args[0] as usize].class != Class::Int {
            let args: Vec<u32> = match ends(nodes, spans, node) {
                Some((first, shift, second, swapped)) => {
                    let shift = graph.push(Node::constant(Value::Int(shift)));
                    let moved = graph.make(Op::Add, &[number[first as usize], shift]);
                    let other = number[second as usize];
                    if swapped { vec![other, moved] } else { vec![moved, other] }
                }
                None => node.args.iter().map(|&arg| number[arg as usize]).collect(),
            };
            number.push(graph.push(Node { args, ..node.clone() }));
            continue;
        }
        let mut stack = vec![node.args[0]];
        while let Some(&id) = stack.last() {
            if floats[id as usize].is_some() {
                stack.pop();
                continue;
            }
            let inner = &nodes[id as usize];
            if !moves(id) {
                floats[id as usize] = Some(graph.make(Op::ToFloat, &[number[id as usize]]));
                continue;
            }
            let missing: Vec<u32> = inner.args.iter().copied().filter(|&arg| floats[arg as usize].is_none()).collect();
            if missing.is_empty() {
                let args: Vec<u32> = inner.args.iter().filter_map(|&arg| floats[arg as usize]).collect();
                floats[id as usize] = Some(graph.make(inner.op, &args));
            }
            stack.extend(missing);
        }
        number.push(floats[node.args[0] as usize].unwrap_or_default());
    }
    let mut scatters = program.scatters().to_vec();
    for scatter in &mut scatters {
        scatter.value = number[scatter.value as usize];
        scatter.index.iter_mut().for_each(|id| *id = number[*id as usize]);
    }
    let result = number[program.result as usize];
    Program { nodes: graph.nodes, result, scatters, ..program.clone() }
}

/// `a - b <op> c` as (a, -c, b, false), and `c <op> a - b` as (a, -c, b, true), which stands for `b <op> a - c`.
fn ends(nodes: &[Node], spans: &[Span], node: &Node) -> Option<(u32, i64, u32, bool)> {
    if !matches!(node.op, Op::Lt | Op::Le | Op::Gt | Op::Ge | Op::Eq | Op::Ne) {
        return None;
    }
    for (difference, constant, swapped) in [(node.args[0], node.args[1], false), (node.args[1], node.args[0], true)] {
        let (inner, Some(Value::Int(c))) = (&nodes[difference as usize], nodes[constant as usize].value()) else {
            continue;
        };
        if inner.op != Op::Sub {
            continue;
        }
        let small =
            |id: u32| matches!(spans[id as usize], Span::Int { low, high } if low > -(1 << 61) && high < 1 << 61);
        if inner.args.iter().all(|&arg| small(arg)) && c.unsigned_abs() < 1 << 61 {
            return Some((inner.args[0], -c, inner.args[1], swapped));
        }
    }
    None
}

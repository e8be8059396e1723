//! Rewrites that need to know extents: integers that floats hold exactly are computed as floats.
//!
//! `to_float(query - key)` costs a subtraction and a conversion an element; `to_float(query) - to_float(key)` converts
//! once a query and once a key, and has the same value while every integer in it is exact in the evaluating type.

use super::bounds::Span;
use super::graph::{Graph, Node};
use super::program::Program;
use super::table::{Class, Op};

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
            let args = node.args.iter().map(|&arg| number[arg as usize]).collect();
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

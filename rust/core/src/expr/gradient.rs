//! Reverse-mode derivative: from a score program to the program of its gradient.
//!
//! ```text
//! slope[result] = grad
//! for each node that needs one, last to first:
//!     slope[operand] += what the table's derivative makes of slope[node]
//!     a gathered float: scatter slope[node] to the place it came from
//! return slope[score]
//! ```

use super::graph::{Graph, Node};
use super::program::{Kind, Program, Scatter};
use super::table::{Chain, Class, Op};
use crate::error::{Error, Result};

impl Program {
    /// The gradient program of a score program, simplified: d loss / d score, and a scatter for every float capture.
    ///
    /// # Errors
    /// Only a score program has a gradient.
    pub fn gradient(&self) -> Result<Self> {
        if self.kind != Kind::Score {
            let got = if self.kind == Kind::Mask { "a mask program" } else { "a gradient program" };
            return Err(Error::value("program", "a score program", got));
        }
        let needed = self.needed();
        let mut graph = Graph::default();
        // Equal nodes become one, so numbers change.
        let mut number = Vec::with_capacity(self.nodes.len());
        for node in &self.nodes {
            let args = node.args.iter().map(|&arg| number[arg as usize]).collect();
            number.push(graph.push(Node { args, ..node.clone() }));
        }
        let own: Vec<Node> = graph.nodes.clone();
        let mut slopes: Vec<Option<u32>> = vec![None; own.len()];
        slopes[number[self.result as usize] as usize] = Some(graph.push(Node::leaf(Op::Grad)));
        let mut wanted = vec![false; own.len()];
        number.iter().zip(needed).for_each(|(&id, needed)| wanted[id as usize] |= needed);
        let mut scatters = Vec::new();
        for id in (0..own.len()).rev() {
            let (node, Some(slope)) = (&own[id], slopes[id]) else { continue };
            if !wanted[id] {
                continue;
            }
            if node.op == Op::Gather {
                scatters.push(Scatter { capture: node.bits as usize, value: slope, index: node.args.clone() });
                continue;
            }
            let derivative = node.op.entry().derivative;
            for (position, part) in derivative(&mut graph, Chain { args: &node.args, out: id as u32, grad: slope }) {
                let operand = node.args[position] as usize;
                if own[operand].class == Class::Float {
                    slopes[operand] = Some(match slopes[operand] {
                        Some(before) => graph.make(Op::Add, &[before, part]),
                        None => part,
                    });
                }
            }
        }
        let score = own.iter().position(|node| node.op == Op::Score).and_then(|id| slopes[id]);
        let result = score.unwrap_or_else(|| graph.float(0.0));
        scatters.reverse();
        let program =
            Self { kind: Kind::Gradient, captures: self.captures.clone(), nodes: graph.nodes, result, scatters };
        Ok(program.simplified())
    }
}

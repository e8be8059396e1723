//! Nodes under construction: equal nodes are made once.

use super::table::{Class, Op, Value};
use std::collections::HashMap;

/// A typed operation on earlier nodes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Node {
    /// What it does.
    pub op: Op,
    /// What comes out.
    pub class: Class,
    /// Operands: numbers of earlier nodes.
    pub args: Vec<u32>,
    /// The bits of a constant, the number of a gather's capture.
    pub bits: u64,
}

impl Node {
    /// A constant.
    pub fn constant(value: Value) -> Self {
        let (op, bits) = match value {
            Value::Float(x) => (Op::Float, if x.is_nan() { f64::NAN } else { x }.to_bits()),
            Value::Int(x) => (Op::Int, x as u64),
            Value::Bool(x) => (Op::Bool, u64::from(x)),
        };
        Self { op, class: value.class(), args: Vec::new(), bits }
    }

    /// A leaf that is no constant.
    pub fn leaf(op: Op) -> Self {
        let class = if matches!(op, Op::Score | Op::Grad) { Class::Float } else { Class::Int };
        Self { op, class, args: Vec::new(), bits: 0 }
    }

    /// Its value, if it is a constant.
    pub fn value(&self) -> Option<Value> {
        match self.op {
            Op::Float => Some(Value::Float(f64::from_bits(self.bits))),
            Op::Int => Some(Value::Int(self.bits as i64)),
            Op::Bool => Some(Value::Bool(self.bits != 0)),
            _ => None,
        }
    }
}

/// An arena of nodes without duplicates.
#[derive(Debug, Default)]
pub struct Graph {
    /// Every node after its operands.
    pub nodes: Vec<Node>,
    known: HashMap<Node, u32>,
}

impl Graph {
    /// The number of a node, which is added unless it is there.
    pub fn push(&mut self, node: Node) -> u32 {
        if let Some(&id) = self.known.get(&node) {
            return id;
        }
        let id = self.nodes.len() as u32;
        self.known.insert(node.clone(), id);
        self.nodes.push(node);
        id
    }

    /// A floating-point constant.
    pub fn float(&mut self, value: f64) -> u32 {
        self.push(Node::constant(Value::Float(value)))
    }

    /// An operation on operands whose classes it takes.
    ///
    /// # Panics
    /// If it does not: callers write derivatives and rewrites, not users.
    pub fn make(&mut self, op: Op, args: &[u32]) -> u32 {
        let classes: Vec<Class> = args.iter().map(|&arg| self.nodes[arg as usize].class).collect();
        let class = op.result(&classes).unwrap_or_else(|| panic!("{} of {classes:?}", op.name()));
        self.push(Node { op, class, args: args.to_vec(), bits: 0 })
    }

    /// `x * factor`.
    pub fn scaled(&mut self, x: u32, factor: f64) -> u32 {
        let factor = self.float(factor);
        self.make(Op::Mul, &[x, factor])
    }
}

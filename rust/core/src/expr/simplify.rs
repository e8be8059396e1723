//! The simplifier: constants folded, algebra, equal nodes once, dead nodes gone, one order.
//!
//! Every rewrite keeps every value, NaN, infinities and the sign of zero included, except that constants are folded in
//! double precision. Rewrites run until nothing changes, so the result is a fixed point; nodes then stand in the order
//! in which the result reaches them, so that equal programs have equal texts.

use super::graph::{Graph, Node};
use super::program::{Program, Scatter};
use super::table::{Class, Op, Value};

impl Program {
    /// An equal program in canonical form.
    #[must_use]
    pub fn simplified(&self) -> Self {
        let mut program = self.rewritten();
        // Each rewrite makes the program smaller or moves it toward the canonical form: a handful of rounds.
        for _ in 0..32 {
            let next = program.rewritten();
            if next == program {
                break;
            }
            program = next;
        }
        program
    }

    fn rewritten(&self) -> Self {
        let needed = self.needed();
        let mut rewriter = Rewriter::default();
        let mut number = vec![u32::MAX; self.nodes.len()];
        for (id, node) in self.nodes.iter().enumerate() {
            if needed[id] {
                let args: Vec<u32> = node.args.iter().map(|&arg| number[arg as usize]).collect();
                number[id] = rewriter.node(Node { args, ..node.clone() });
            }
        }
        let at = |id: u32| number[id as usize];
        let scatters = self.scatters.iter().map(|scatter| Scatter {
            capture: scatter.capture,
            value: at(scatter.value),
            index: scatter.index.iter().map(|&id| at(id)).collect(),
        });
        Self {
            result: at(self.result),
            scatters: scatters.collect(),
            nodes: rewriter.graph.nodes,
            kind: self.kind,
            captures: self.captures.clone(),
        }
        .ordered()
    }

    /// Nodes in the order in which the result, then the scatters, reach them; the others dropped.
    fn ordered(self) -> Self {
        let mut number = vec![u32::MAX; self.nodes.len()];
        let mut nodes: Vec<Node> = Vec::new();
        let mut scatters = self.scatters.clone();
        scatters.sort_by_key(|scatter| scatter.capture);
        let roots = scatters.iter().flat_map(|scatter| scatter.index.iter().chain([&scatter.value]));
        for &root in [&self.result].into_iter().chain(roots) {
            // A stack of its own: programs may be deep.
            let mut stack = vec![(root, 0)];
            while let Some((id, next)) = stack.pop() {
                if number[id as usize] != u32::MAX {
                    continue;
                }
                let node = &self.nodes[id as usize];
                if let Some(&arg) = node.args.get(next) {
                    stack.push((id, next + 1));
                    stack.push((arg, 0));
                    continue;
                }
                number[id as usize] = nodes.len() as u32;
                let args = node.args.iter().map(|&arg| number[arg as usize]).collect();
                nodes.push(Node { args, ..node.clone() });
            }
        }
        for scatter in &mut scatters {
            scatter.value = number[scatter.value as usize];
            scatter.index.iter_mut().for_each(|id| *id = number[*id as usize]);
        }
        Self { result: number[self.result as usize], nodes, scatters, ..self }
    }
}

#[derive(Default)]
struct Rewriter {
    graph: Graph,
    /// A number for each node that says what it computes, whatever its place: orders the operands of sums.
    digests: Vec<u64>,
}

impl Rewriter {
    fn push(&mut self, node: Node) -> u32 {
        let id = self.graph.push(node);
        if self.digests.len() < self.graph.nodes.len() {
            let node = &self.graph.nodes[id as usize];
            let words = node.args.iter().map(|&arg| self.digests[arg as usize]);
            let digest =
                [node.op as u64, node.bits].into_iter().chain(words).fold(0xcbf2_9ce4_8422_2325u64, |h, word| {
                    (h ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29)
                });
            self.digests.push(digest);
        }
        id
    }

    fn constant(&mut self, value: Value) -> u32 {
        self.push(Node::constant(value))
    }

    fn make(&mut self, op: Op, args: &[u32]) -> u32 {
        let classes: Vec<Class> = args.iter().map(|&arg| self.class(arg)).collect();
        let class = op.result(&classes).unwrap_or_else(|| unreachable!("{} of {classes:?}", op.name()));
        self.node(Node { op, class, args: args.to_vec(), bits: 0 })
    }

    fn op(&self, id: u32) -> Op {
        self.graph.nodes[id as usize].op
    }

    fn class(&self, id: u32) -> Class {
        self.graph.nodes[id as usize].class
    }

    fn arg(&self, id: u32, position: usize) -> u32 {
        self.graph.nodes[id as usize].args[position]
    }

    fn value(&self, id: u32) -> Option<Value> {
        self.graph.nodes[id as usize].value()
    }

    fn float(&self, id: u32) -> Option<f64> {
        if let Some(Value::Float(x)) = self.value(id) { Some(x) } else { None }
    }

    fn int(&self, id: u32) -> Option<i64> {
        if let Some(Value::Int(x)) = self.value(id) { Some(x) } else { None }
    }

    fn bool(&self, id: u32) -> Option<bool> {
        if let Some(Value::Bool(x)) = self.value(id) { Some(x) } else { None }
    }

    /// Adds a node whose operands are rewritten, or what it is equal to.
    fn node(&mut self, mut node: Node) -> u32 {
        if node.op.is_leaf() || node.op == Op::Gather {
            return self.push(node);
        }
        let constants: Option<Vec<Value>> = node.args.iter().map(|&arg| self.value(arg)).collect();
        if let Some(values) = constants
            && !self.divides_by_zero(&node)
        {
            return self.constant((node.op.entry().meaning)(&values));
        }
        if node.op.commutes() {
            // Constants last, leaves first, then by what they compute.
            node.args.sort_by_key(|&arg| {
                let op = self.op(arg);
                (op.is_constant(), !op.is_leaf(), if op.is_leaf() { op as u64 } else { 0 }, self.digests[arg as usize])
            });
        }
        let rewritten = match node.class {
            Class::Float => self.floats(&node),
            Class::Int => self.integers(&node),
            Class::Bool => self.truths(&node),
        };
        rewritten.or_else(|| self.choice(&node)).unwrap_or_else(|| self.push(node))
    }

    /// An integer division by the constant 0 stays, so that evaluating it is an error.
    fn divides_by_zero(&self, node: &Node) -> bool {
        matches!(node.op, Op::FloorDiv | Op::Mod | Op::TruncDiv) && self.int(node.args[1]) == Some(0)
    }

    fn choice(&mut self, node: &Node) -> Option<u32> {
        if node.op != Op::Where {
            return None;
        }
        let [c, a, b] = node.args[..] else { return None };
        if a == b {
            return Some(a);
        }
        match self.bool(c) {
            Some(true) => Some(a),
            Some(false) => Some(b),
            None if self.op(c) == Op::Not => {
                let c = self.arg(c, 0);
                Some(self.make(Op::Where, &[c, b, a]))
            }
            None => None,
        }
    }

    fn floats(&mut self, node: &Node) -> Option<u32> {
        let a = *node.args.first()?;
        let b = node.args.get(1).copied();
        match node.op {
            Op::Neg if self.op(a) == Op::Neg => Some(self.arg(a, 0)),
            // -(x - y) is y - x but for the sign of a zero: left alone.
            Op::Abs if self.op(a) == Op::Abs => Some(a),
            Op::Abs | Op::Square if self.op(a) == Op::Neg => {
                let x = self.arg(a, 0);
                Some(self.make(node.op, &[x]))
            }
            Op::Relu if self.op(a) == Op::Relu => Some(a),
            Op::Floor | Op::Ceil | Op::Round | Op::Trunc if self.is_whole(a) => Some(a),
            Op::ToFloat if self.op(a) == Op::ToInt && self.class(self.arg(a, 0)) == Class::Bool => {
                let x = self.arg(a, 0);
                Some(self.make(Op::ToFloat, &[x]))
            }
            Op::Add => {
                let b = b?;
                // x + -0 is x; x + 0 is x unless x is -0.
                let zero =
                    self.float(b).is_some_and(|y| y == 0.0 && (y.is_sign_negative() || self.never_minus_zero(a)));
                if zero {
                    return Some(a);
                }
                for (x, y) in [(a, b), (b, a)] {
                    if self.op(y) == Op::Neg {
                        let y = self.arg(y, 0);
                        return Some(self.make(Op::Sub, &[x, y]));
                    }
                }
                None
            }
            Op::Sub => {
                let b = b?;
                if self.op(b) == Op::Neg {
                    let y = self.arg(b, 0);
                    return Some(self.make(Op::Add, &[a, y]));
                }
                if let Some(y) = self.float(b) {
                    if y == 0.0 && y.is_sign_positive() {
                        return Some(a);
                    }
                    let minus = self.constant(Value::Float(-y));
                    return Some(self.make(Op::Add, &[a, minus]));
                }
                None
            }
            Op::Mul => {
                let b = b?;
                if a == b {
                    return Some(self.make(Op::Square, &[a]));
                }
                match self.float(b) {
                    Some(1.0) => Some(a),
                    Some(-1.0) => Some(self.make(Op::Neg, &[a])),
                    Some(y) if self.op(a) == Op::Neg => {
                        let x = self.arg(a, 0);
                        let y = self.constant(Value::Float(-y));
                        Some(self.make(Op::Mul, &[x, y]))
                    }
                    _ => None,
                }
            }
            Op::Div => {
                let b = b?;
                match (self.float(a), self.float(b)) {
                    (_, Some(1.0)) => Some(a),
                    // The reciprocal of a power of two is exact.
                    (_, Some(y)) if is_power_of_two(y) => {
                        let inverse = self.constant(Value::Float(1.0 / y));
                        Some(self.make(Op::Mul, &[a, inverse]))
                    }
                    (Some(1.0), _) => Some(self.make(Op::Reciprocal, &[b])),
                    _ => None,
                }
            }
            Op::Pow => match self.float(b?) {
                Some(1.0) => Some(a),
                Some(2.0) => Some(self.make(Op::Square, &[a])),
                Some(-1.0) => Some(self.make(Op::Reciprocal, &[a])),
                Some(0.0) => Some(self.constant(Value::Float(1.0))),
                _ => None,
            },
            Op::Min | Op::Max if Some(a) == b => Some(a),
            _ => None,
        }
    }

    /// Whether a float is an integer already (or not finite).
    fn is_whole(&self, id: u32) -> bool {
        matches!(self.op(id), Op::Floor | Op::Ceil | Op::Round | Op::Trunc | Op::Sign | Op::ToFloat)
    }

    fn never_minus_zero(&self, id: u32) -> bool {
        matches!(self.op(id), Op::ToFloat | Op::Abs | Op::Exp | Op::Exp2 | Op::Square | Op::Sigmoid)
    }

    fn integers(&mut self, node: &Node) -> Option<u32> {
        let a = *node.args.first()?;
        if node.args.len() == 1 {
            let same = (node.op == Op::Abs || node.op == Op::Neg) && self.op(a) == node.op;
            return same.then(|| if node.op == Op::Neg { self.arg(a, 0) } else { a });
        }
        let b = *node.args.get(1)?;
        let y = self.int(b);
        match (node.op, y) {
            (Op::Add | Op::Or | Op::Xor | Op::Shl | Op::Shr, Some(0)) => Some(a),
            (Op::Mul | Op::FloorDiv | Op::TruncDiv, Some(1)) => Some(a),
            (Op::Mul | Op::And, Some(0)) => Some(b),
            (Op::And, Some(-1)) => Some(a),
            (Op::Mod, Some(1 | -1)) => Some(self.constant(Value::Int(0))),
            (Op::Sub, Some(y)) => {
                let minus = self.constant(Value::Int(y.wrapping_neg()));
                Some(self.make(Op::Add, &[a, minus]))
            }
            (Op::Mul, Some(-1)) => Some(self.make(Op::Neg, &[a])),
            // Constants of a sum together; integers wrap, so the order does not matter.
            (Op::Add, Some(y)) if self.op(a) == Op::Add && self.int(self.arg(a, 1)).is_some() => {
                let (x, first) = (self.arg(a, 0), self.int(self.arg(a, 1)).unwrap_or(0));
                let sum = self.constant(Value::Int(first.wrapping_add(y)));
                Some(self.make(Op::Add, &[x, sum]))
            }
            // Rounding down is what a shift does, and Python's remainder is what a mask leaves.
            (Op::FloorDiv, Some(y)) if y > 1 && y.count_ones() == 1 => {
                let bits = self.constant(Value::Int(i64::from(y.trailing_zeros())));
                Some(self.make(Op::Shr, &[a, bits]))
            }
            (Op::Mod, Some(y)) if y > 1 && y.count_ones() == 1 => {
                let mask = self.constant(Value::Int(y - 1));
                Some(self.make(Op::And, &[a, mask]))
            }
            (Op::Sub | Op::Xor, _) if a == b => Some(self.constant(Value::Int(0))),
            (Op::Min | Op::Max | Op::And | Op::Or, _) if a == b => Some(a),
            (Op::Add, _) => {
                for (x, y) in [(a, b), (b, a)] {
                    if self.op(y) == Op::Neg {
                        let y = self.arg(y, 0);
                        return Some(self.make(Op::Sub, &[x, y]));
                    }
                }
                None
            }
            (Op::Sub, _) if self.op(b) == Op::Neg => {
                let y = self.arg(b, 0);
                Some(self.make(Op::Add, &[a, y]))
            }
            _ => None,
        }
    }

    fn truths(&mut self, node: &Node) -> Option<u32> {
        let a = *node.args.first()?;
        let b = node.args.get(1).copied();
        let known = b.and_then(|b| self.bool(b));
        match node.op {
            Op::Not => self.negated(a),
            Op::Gt => Some(self.make(Op::Lt, &[b?, a])),
            Op::Ge => Some(self.make(Op::Le, &[b?, a])),
            Op::ToBool if self.op(a) == Op::ToInt || self.op(a) == Op::ToFloat => {
                // Whole numbers keep "not zero"; a float is truncated first, so only truth values and integers.
                let x = self.arg(a, 0);
                match self.class(x) {
                    Class::Bool => Some(x),
                    Class::Int => Some(self.make(Op::ToBool, &[x])),
                    Class::Float => None,
                }
            }
            Op::ToBool if self.class(a) == Class::Int => {
                let zero = self.constant(Value::Int(0));
                Some(self.make(Op::Ne, &[a, zero]))
            }
            Op::Eq if self.class(a) == Class::Bool => {
                let differ = self.make(Op::Xor, &[a, b?]);
                Some(self.make(Op::Not, &[differ]))
            }
            Op::Ne if self.class(a) == Class::Bool => Some(self.make(Op::Xor, &[a, b?])),
            Op::Eq | Op::Le if self.class(a) == Class::Int && Some(a) == b => Some(self.constant(Value::Bool(true))),
            Op::Ne | Op::Lt if self.class(a) == Class::Int && Some(a) == b => Some(self.constant(Value::Bool(false))),
            Op::And if known == Some(true) || Some(a) == b => Some(a),
            Op::And if known == Some(false) => b,
            Op::Or if known == Some(false) || Some(a) == b => Some(a),
            Op::Or if known == Some(true) => b,
            Op::And | Op::Or if self.opposite(a, b?) || self.opposite(b?, a) => {
                Some(self.constant(Value::Bool(node.op == Op::Or)))
            }
            Op::Xor if known == Some(false) => Some(a),
            Op::Xor if known == Some(true) => Some(self.make(Op::Not, &[a])),
            Op::Xor if Some(a) == b => Some(self.constant(Value::Bool(false))),
            Op::Where => self.logic(node),
            _ => None,
        }
    }

    /// Whether one is true exactly where the other is false.
    fn opposite(&self, a: u32, b: u32) -> bool {
        let order = |a: u32, b: u32| {
            let whole = self.op(a) == Op::Lt && self.class(self.arg(a, 0)) == Class::Int;
            let turned = |b: u32| self.arg(a, 0) == self.arg(b, 1) && self.arg(a, 1) == self.arg(b, 0);
            whole && self.op(b) == Op::Le && turned(b)
        };
        let equality = self.op(a) == Op::Eq
            && self.op(b) == Op::Ne
            && self.graph.nodes[a as usize].args == self.graph.nodes[b as usize].args;
        let negation = self.op(a) == Op::Not && self.arg(a, 0) == b;
        negation || equality || order(a, b)
    }

    /// `not a` without the `not`; comparisons of floats keep it, since NaN is neither.
    fn negated(&mut self, a: u32) -> Option<u32> {
        let op = self.op(a);
        if op == Op::Not {
            return Some(self.arg(a, 0));
        }
        let of = |rewriter: &Self, i| rewriter.arg(a, i);
        match op {
            Op::Eq | Op::Ne => {
                let other = if op == Op::Eq { Op::Ne } else { Op::Eq };
                let (x, y) = (of(self, 0), of(self, 1));
                (self.class(x) != Class::Bool).then(|| self.make(other, &[x, y]))
            }
            Op::Lt | Op::Le if self.class(of(self, 0)) == Class::Int => {
                let other = if op == Op::Lt { Op::Le } else { Op::Lt };
                let (x, y) = (of(self, 0), of(self, 1));
                Some(self.make(other, &[y, x]))
            }
            _ => None,
        }
    }

    /// A choice between truth values is logic.
    fn logic(&mut self, node: &Node) -> Option<u32> {
        let [c, a, b] = node.args[..] else { return None };
        match (self.bool(a), self.bool(b)) {
            (Some(true), Some(false)) => Some(c),
            (Some(false), Some(true)) => Some(self.make(Op::Not, &[c])),
            (Some(true), None) => Some(self.make(Op::Or, &[c, b])),
            (None, Some(false)) => Some(self.make(Op::And, &[c, a])),
            (Some(false), None) => {
                let other = self.make(Op::Not, &[c]);
                Some(self.make(Op::And, &[other, b]))
            }
            (None, Some(true)) => {
                let other = self.make(Op::Not, &[c]);
                Some(self.make(Op::Or, &[other, a]))
            }
            _ => None,
        }
    }
}

fn is_power_of_two(y: f64) -> bool {
    // Far from the ends of single precision, where a reciprocal would be subnormal.
    y.is_finite() && y.to_bits() << 12 == 0 && (2f64.powi(-100)..=2f64.powi(100)).contains(&y.abs())
}

//! A program as lists of steps, sorted by what they depend on.
//!
//! A tile of elements has two sides: queries (with their heads) and keys. A node that depends on neither is computed
//! once, on one side alone once for that side, on both for every element. Each value lives in a slot of a register file
//! of its type; slots of values by element are used again as soon as their value is dead, so that a chunk of elements
//! stays in the first-level cache.

use super::bounds::Span;
use super::program::{Kind, Program};
use super::table::{Class, Op, Value};
use crate::arch::lanes::Own;
use std::collections::HashMap;

/// A register file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum File {
    /// Floats.
    Float,
    /// 32-bit integers: values that are proven to fit.
    Short,
    /// 64-bit integers.
    Long,
    /// Truth values.
    Mask,
    /// Where elements of captures are, as far as one side says.
    Address,
}

/// A register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Its file.
    pub file: File,
    /// Its number there.
    pub index: usize,
}

/// What a value depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// Neither side.
    Uniform,
    /// The queries (and heads).
    Queries,
    /// The keys.
    Keys,
    /// Both: one value an element.
    Both,
}

impl Rate {
    fn join(self, other: Rate) -> Rate {
        match (self, other) {
            (Rate::Uniform, rate) | (rate, Rate::Uniform) => rate,
            (a, b) if a == b => a,
            _ => Rate::Both,
        }
    }
}

/// An operand of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A value an element.
    Slice(Slot),
    /// The first value of a slot for all.
    Splat(Slot),
    /// The scores themselves.
    Score,
    /// The derivatives themselves.
    Grad,
}

impl Source {
    /// Its file.
    pub fn file(self) -> File {
        match self {
            Source::Slice(slot) | Source::Splat(slot) => slot.file,
            Source::Score | Source::Grad => File::Float,
        }
    }
}

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum What {
    /// Writes batch, head, query or key numbers.
    Leaf(Op),
    /// Writes a constant.
    Constant(Value),
    /// Reads a captured array.
    Gather(usize),
    /// Computes addresses in a captured array from indices along some axes (one bit each).
    Address(usize, u32),
    /// Reads a captured array at the sums of addresses by query and by key.
    GatherTile(usize),
    /// Widens 32-bit integers.
    Widen,
    /// Computes.
    Compute(Op),
}

/// One step.
#[derive(Debug, Clone)]
pub struct Step {
    /// What it does.
    pub what: What,
    /// The node it computes: errors show it.
    pub node: u32,
    /// Where to.
    pub to: Slot,
    /// From where.
    pub from: Vec<Source>,
}

/// A scatter by sources.
#[derive(Debug, Clone)]
pub struct Addition {
    /// Number of the capture.
    pub capture: usize,
    /// The value's node: errors show it.
    pub node: u32,
    /// What is added.
    pub value: Source,
    /// Where.
    pub index: Vec<Source>,
    /// What the place depends on.
    pub rate: Rate,
}

/// How the result of a chunk gets into its block: the last operation writes there if it can.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Finish {
    /// It is copied.
    #[default]
    Copy,
    /// The last step writes it there.
    Write,
    /// An operation on the block's own values.
    Update {
        /// The operation.
        op: Op,
        /// Which operand is the block.
        own: Own,
        /// The other.
        other: Source,
    },
    /// The block plus a product.
    AddProduct(Source, Source),
}

/// A value of one side that elements need: from, to, one value an element.
pub type Spread = (Slot, Slot);

/// A compiled program.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Once.
    pub uniform: Vec<Step>,
    /// Once a row or lane of queries.
    pub queries: Vec<Step>,
    /// Once a row or lane of keys.
    pub keys: Vec<Step>,
    /// For every element.
    pub both: Vec<Step>,
    /// Values by query that elements read.
    pub query_spreads: Vec<Spread>,
    /// Values by key that elements read.
    pub key_spreads: Vec<Spread>,
    /// What leaves.
    pub result: Option<Source>,
    /// What is added to gradients of captures.
    pub additions: Vec<Addition>,
    /// How the result gets into the block.
    pub finish: Finish,
    /// The rate of every slot, by file.
    pub slots: [Vec<Rate>; 5],
}

struct Compiler<'p> {
    program: &'p Program,
    plan: Plan,
    rate: Vec<Rate>,
    source: Vec<Option<Source>>,
    widened: HashMap<Slot, Slot>,
    spread: HashMap<Slot, Slot>,
}

impl Plan {
    /// Compiles a program; `spans` says what each node can be, which is how integers get their width.
    pub fn new(program: &Program, spans: &[Span]) -> Self {
        let count = program.nodes().len();
        let mut compiler = Compiler {
            program,
            plan: Plan::default(),
            rate: vec![Rate::Uniform; count],
            source: vec![None; count],
            widened: HashMap::new(),
            spread: HashMap::new(),
        };
        let needed = program.needed();
        for id in 0..count {
            if needed[id] {
                compiler.node(id, spans[id]);
            }
        }
        let result = compiler.element(program.result);
        let additions = program.scatters().iter().map(|scatter| Addition {
            capture: scatter.capture,
            node: scatter.value,
            value: compiler.element(scatter.value),
            index: scatter.index.iter().map(|&id| compiler.element(id)).collect(),
            rate: scatter.index.iter().fold(Rate::Uniform, |rate, &id| rate.join(compiler.rate[id as usize])),
        });
        let additions = additions.collect();
        let mut plan = compiler.plan;
        (plan.result, plan.additions) = (Some(result), additions);
        plan.share_slots();
        plan.shorten(if program.kind() == Kind::Gradient { Source::Grad } else { Source::Score });
        plan
    }

    /// Takes the last step out of the list if it can work on the block itself.
    fn shorten(&mut self, block: Source) {
        let Some(last) = self.both.last() else { return };
        let fits = Some(Source::Slice(last.to)) == self.result && last.to.file == File::Float;
        if !fits || !self.additions.is_empty() {
            return;
        }
        let (what, from) = (last.what, last.from.clone());
        if !from.contains(&block) {
            self.finish = Finish::Write;
            return;
        }
        let (What::Compute(op @ (Op::Add | Op::Sub | Op::Mul | Op::Div | Op::Min | Op::Max)), [a, b]) =
            (what, &from[..])
        else {
            return;
        };
        if a == b {
            return;
        }
        let (own, other) = if *a == block { (Own::First, *b) } else { (Own::Second, *a) };
        self.both.pop();
        self.finish = Finish::Update { op, own, other };
        if let Some(product) = self.both.last()
            && (op, product.what) == (Op::Add, What::Compute(Op::Mul))
            && other == Source::Slice(product.to)
            && !product.from.contains(&block)
        {
            self.finish = Finish::AddProduct(product.from[0], product.from[1]);
            self.both.pop();
        }
    }

    /// Gives values by element that are never alive together one slot.
    fn share_slots(&mut self) {
        let mut last: HashMap<Slot, usize> = HashMap::new();
        for (at, step) in self.both.iter().enumerate() {
            for source in &step.from {
                if let Source::Slice(slot) = source {
                    last.insert(*slot, at);
                }
            }
        }
        let leaving = self.additions.iter().flat_map(|add| add.index.iter().chain([&add.value]));
        for source in leaving.chain(&self.result) {
            if let Source::Slice(slot) = source {
                last.insert(*slot, usize::MAX);
            }
        }
        // Slots of other rates keep their place; those by element move to new ones behind them.
        let mut places: HashMap<Slot, Slot> = HashMap::new();
        let mut free: HashMap<File, Vec<usize>> = HashMap::new();
        let mut made: Vec<Slot> = Vec::new();
        for (at, step) in self.both.iter_mut().enumerate() {
            let old = step.to;
            let reused = free.entry(old.file).or_default().pop();
            let index = reused.unwrap_or_else(|| {
                made.push(old);
                old.index
            });
            let place = Slot { file: old.file, index };
            places.insert(old, place);
            step.to = place;
            let mut dying: Vec<Slot> = Vec::new();
            for source in &mut step.from {
                if let Source::Slice(slot) = source
                    && let Some(place) = places.get(slot)
                {
                    if last.get(slot) == Some(&at) && !dying.contains(place) {
                        dying.push(*place);
                    }
                    *slot = *place;
                }
            }
            for slot in dying {
                free.entry(slot.file).or_default().push(slot.index);
            }
        }
        let leaving = self.additions.iter_mut().flat_map(|add| add.index.iter_mut().chain([&mut add.value]));
        for source in leaving.chain(&mut self.result) {
            if let Source::Slice(slot) = source
                && let Some(place) = places.get(slot)
            {
                *slot = *place;
            }
        }
        // Slots that were given up need no memory.
        let kept: std::collections::HashSet<Slot> = places.values().copied().collect();
        for old in places.keys() {
            if !kept.contains(old) {
                self.slots[old.file as usize][old.index] = Rate::Uniform;
            }
        }
    }
}

impl Compiler<'_> {
    fn slot(&mut self, file: File, rate: Rate) -> Slot {
        let slots = &mut self.plan.slots[file as usize];
        slots.push(rate);
        Slot { file, index: slots.len() - 1 }
    }

    fn emit(&mut self, rate: Rate, step: Step) {
        match rate {
            Rate::Uniform => self.plan.uniform.push(step),
            Rate::Queries => self.plan.queries.push(step),
            Rate::Keys => self.plan.keys.push(step),
            Rate::Both => self.plan.both.push(step),
        }
    }

    fn file(&self, id: u32) -> File {
        self.source[id as usize].map_or(File::Float, Source::file)
    }

    fn node(&mut self, id: usize, span: Span) {
        let node = &self.program.nodes()[id];
        let rate = match node.op {
            Op::Score | Op::Grad => Rate::Both,
            Op::Head | Op::Query => Rate::Queries,
            Op::Key => Rate::Keys,
            _ => node.args.iter().fold(Rate::Uniform, |rate, &arg| rate.join(self.rate[arg as usize])),
        };
        self.rate[id] = rate;
        if matches!(node.op, Op::Score | Op::Grad) {
            self.source[id] = Some(if node.op == Op::Score { Source::Score } else { Source::Grad });
            return;
        }
        // A float may be any integer's size, whatever its bounds say about the result.
        let from_float = node.op == Op::ToInt && self.file(node.args[0]) == File::Float;
        let long = from_float || node.op != Op::Gather && node.args.iter().any(|&arg| self.file(arg) == File::Long);
        let file = match node.class {
            Class::Float => File::Float,
            Class::Bool => File::Mask,
            Class::Int if span.is_short() && !long => File::Short,
            Class::Int => File::Long,
        };
        if node.op == Op::Gather
            && rate == Rate::Both
            && node.args.iter().all(|&arg| self.rate[arg as usize] != Rate::Both)
        {
            return self.gather_tile(id, file);
        }
        let what = match node.op {
            Op::Batch | Op::Head | Op::Query | Op::Key => What::Leaf(node.op),
            Op::Gather => What::Gather(node.bits as usize),
            op => node.value().map_or(What::Compute(op), What::Constant),
        };
        // All integers of one step have one width, but for the indices of a gather.
        let widen = (long || file == File::Long) && node.op != Op::Gather;
        let from = node.args.iter().map(|&arg| self.operand(arg, rate, widen)).collect();
        let to = self.slot(file, rate);
        self.emit(rate, Step { what, node: id as u32, to, from });
        self.source[id] = Some(if rate == Rate::Uniform { Source::Splat(to) } else { Source::Slice(to) });
    }

    /// A gather whose indices depend on one side each: addresses are computed once a side.
    fn gather_tile(&mut self, id: usize, file: File) {
        let node = &self.program.nodes()[id];
        let capture = node.bits as usize;
        let by_keys = |own: &Self, arg: u32| own.rate[arg as usize] == Rate::Keys;
        let mut sides = Vec::new();
        for (rate, keys) in [(Rate::Queries, false), (Rate::Keys, true)] {
            let axes = node.args.iter().enumerate().filter(|&(_, &arg)| by_keys(self, arg) == keys);
            let axes: Vec<(usize, u32)> = axes.map(|(axis, &arg)| (axis, arg)).collect();
            let bits = axes.iter().fold(0, |bits, (axis, _)| bits | 1 << axis);
            let from = axes.iter().map(|&(_, arg)| self.operand(arg, rate, false)).collect();
            let to = self.slot(File::Address, rate);
            self.emit(rate, Step { what: What::Address(capture, bits), node: id as u32, to, from });
            sides.push(Source::Slice(to));
        }
        let to = self.slot(file, Rate::Both);
        self.emit(Rate::Both, Step { what: What::GatherTile(capture), node: id as u32, to, from: sides });
        self.source[id] = Some(Source::Slice(to));
    }

    /// A node as an operand of a step of some rate.
    fn operand(&mut self, id: u32, rate: Rate, widen: bool) -> Source {
        let own = self.rate[id as usize];
        let source = self.source[id as usize].unwrap_or(Source::Score);
        let (Source::Slice(mut slot) | Source::Splat(mut slot)) = source else { return source };
        if widen && slot.file == File::Short {
            slot = match self.widened.get(&slot) {
                Some(&wide) => wide,
                None => {
                    let wide = self.slot(File::Long, own);
                    let from = vec![if own == Rate::Uniform { Source::Splat(slot) } else { Source::Slice(slot) }];
                    self.emit(own, Step { what: What::Widen, node: id, to: wide, from });
                    self.widened.insert(slot, wide);
                    wide
                }
            };
        }
        if own == Rate::Uniform {
            return Source::Splat(slot);
        }
        if own == rate {
            return Source::Slice(slot);
        }
        // One side's value, wanted by element.
        if let Some(&spread) = self.spread.get(&slot) {
            return Source::Slice(spread);
        }
        let spread = self.slot(slot.file, Rate::Both);
        let list = if own == Rate::Queries { &mut self.plan.query_spreads } else { &mut self.plan.key_spreads };
        list.push((slot, spread));
        self.spread.insert(slot, spread);
        Source::Slice(spread)
    }

    /// A node as a value by element.
    fn element(&mut self, id: u32) -> Source {
        self.operand(id, Rate::Both, false)
    }
}

//! A checked program, and its text: the one form in which a mod crosses languages.
//!
//! ```text
//! tilewise-expr 1 score          kind: score | mask | gradient
//! capture float 1                class and rank of each captured array, numbered from 0
//! score                          node 0
//! head                           node 1
//! gather 0 1                     node 2: capture 0 at [node 1]
//! add 0 2
//! return 3
//! ```
//! A gradient program may go on with lines `scatter C V I0 ..`: add node V to the gradient of capture C at [I0, ..].
//! `#` starts a comment.

use super::graph::Node;
use super::table::{Class, Op, TABLE, Value};
use crate::error::{Error, Result};
use std::fmt::Write;

/// The first word of a program text, and its version.
const MAGIC: [&str; 2] = ["tilewise-expr", "1"];
/// The most nodes of a program.
pub const MOST_NODES: usize = 1 << 16;
/// The most captured arrays of a program.
pub const MOST_CAPTURES: usize = 256;
/// The highest rank of a captured array.
pub const HIGHEST_RANK: usize = 16;

/// What a program computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A score from a score.
    Score,
    /// Whether a query attends a key.
    Mask,
    /// The derivative of a loss by the score from its derivative by the modified score.
    Gradient,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Score => "score",
            Kind::Mask => "mask",
            Kind::Gradient => "gradient",
        }
    }
}

/// A captured array, as a program sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaptureSpec {
    /// Class of its elements.
    pub class: Class,
    /// Number of axes.
    pub rank: usize,
}

/// An addition into the gradient of a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scatter {
    /// Number of the capture.
    pub capture: usize,
    /// What is added.
    pub value: u32,
    /// Where: one node an axis.
    pub index: Vec<u32>,
}

/// A parsed, checked, immutable program.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    pub(super) kind: Kind,
    pub(super) captures: Vec<CaptureSpec>,
    pub(super) nodes: Vec<Node>,
    pub(super) result: u32,
    pub(super) scatters: Vec<Scatter>,
}

/// One line of a text.
struct Line<'t> {
    number: usize,
    words: Vec<&'t str>,
}

impl Line<'_> {
    fn error(&self, allowed: impl Into<String>, got: impl std::fmt::Display) -> Error {
        Error::value(&format!("program, line {}", self.number), allowed, got)
    }

    fn shown(&self) -> String {
        // A line may be anything, of any length.
        let text = self.words.join(" ");
        let short: String = text.chars().take(60).collect();
        if short.len() < text.len() { format!("'{short}...'") } else { format!("'{short}'") }
    }

    fn count(&self, words: usize, form: &str) -> Result<()> {
        if self.words.len() == words { Ok(()) } else { Err(self.error(format!("'{form}'"), self.shown())) }
    }

    fn number<N: std::str::FromStr>(&self, word: &str, what: &str) -> Result<N> {
        word.parse().map_err(|_| self.error(what, self.shown()))
    }

    fn class(&self, word: &str) -> Result<Class> {
        let class = Class::ALL.into_iter().find(|class| class.name() == word);
        class.ok_or_else(|| self.error("a class: float, int or bool", self.shown()))
    }
}

impl Program {
    /// Reads a text.
    ///
    /// # Errors
    /// A `Value` error that names the line and what is wrong with it.
    pub fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines().enumerate().filter_map(|(i, line)| {
            let words: Vec<&str> = line.split('#').next().unwrap_or("").split_ascii_whitespace().collect();
            (!words.is_empty()).then_some(Line { number: i + 1, words })
        });
        let form = "tilewise-expr 1 score|mask|gradient";
        let head = lines.next().unwrap_or(Line { number: 1, words: Vec::new() });
        head.count(3, form)?;
        let kind = [Kind::Score, Kind::Mask, Kind::Gradient].into_iter().find(|kind| kind.name() == head.words[2]);
        let (true, Some(kind)) = (head.words[..2] == MAGIC, kind) else {
            return Err(head.error(format!("'{form}'"), head.shown()));
        };
        let mut program = Self { kind, captures: Vec::new(), nodes: Vec::new(), result: 0, scatters: Vec::new() };
        let mut returned = false;
        let mut last = head.number;
        for line in lines {
            last = line.number;
            match (line.words[0], returned) {
                ("capture", false) => program.read_capture(&line)?,
                ("return", false) => {
                    program.read_return(&line)?;
                    returned = true;
                }
                ("scatter", true) => program.read_scatter(&line)?,
                (_, true) => return Err(line.error("nothing but scatter lines after return", line.shown())),
                ("scatter", false) => return Err(line.error("'scatter' after 'return'", line.shown())),
                _ => program.read_node(&line)?,
            }
        }
        if !returned {
            let end = Line { number: last + 1, words: Vec::new() };
            return Err(end.error("'return N'", "the end of the text"));
        }
        Ok(program)
    }

    fn read_capture(&mut self, line: &Line<'_>) -> Result<()> {
        line.count(3, "capture CLASS RANK")?;
        if !self.nodes.is_empty() {
            return Err(line.error("captures before nodes", line.shown()));
        }
        let class = line.class(line.words[1])?;
        let what = format!("a rank of at most {HIGHEST_RANK}");
        let rank = line.number::<usize>(line.words[2], &what)?;
        if rank > HIGHEST_RANK {
            return Err(line.error(what, rank));
        }
        if self.captures.len() == MOST_CAPTURES {
            return Err(line.error(format!("at most {MOST_CAPTURES} captures"), line.shown()));
        }
        self.captures.push(CaptureSpec { class, rank });
        Ok(())
    }

    fn operand(&self, line: &Line<'_>, word: &str) -> Result<u32> {
        let id = line.number::<u32>(word, "operands that are numbers of nodes")?;
        if id as usize >= self.nodes.len() {
            let allowed = match self.nodes.len() {
                0 => "an operation without operands as the first node".to_string(),
                count => format!("numbers of earlier nodes, 0 to {}", count - 1),
            };
            return Err(line.error(allowed, line.shown()));
        }
        Ok(id)
    }

    fn read_node(&mut self, line: &Line<'_>) -> Result<()> {
        if self.nodes.len() == MOST_NODES {
            return Err(line.error(format!("at most {MOST_NODES} nodes"), "more"));
        }
        let name = line.words[0];
        let Some(op) = Op::named(name) else {
            let names: Vec<&str> = TABLE.iter().map(|entry| entry.name).collect();
            return Err(line.error(format!("an operation ({})", names.join(", ")), line.shown()));
        };
        let node = match op {
            Op::Float => {
                line.count(2, "float X")?;
                Node::constant(Value::Float(line.number(line.words[1], "a decimal number, inf, -inf or nan")?))
            }
            Op::Int => {
                line.count(2, "int N")?;
                Node::constant(Value::Int(line.number(line.words[1], "a 64-bit integer")?))
            }
            Op::Bool => {
                line.count(2, "bool 0|1")?;
                let bit = line.number::<u8>(line.words[1], "0 or 1")?;
                if bit > 1 {
                    return Err(line.error("0 or 1", bit));
                }
                Node::constant(Value::Bool(bit == 1))
            }
            Op::Gather => self.read_gather(line)?,
            op if op.is_leaf() => {
                line.count(1, name)?;
                let allowed = match op {
                    Op::Score => self.kind != Kind::Mask,
                    Op::Grad => self.kind == Kind::Gradient,
                    _ => true,
                };
                if !allowed {
                    let got = format!("'{name}' in a {} program", self.kind.name());
                    return Err(line.error("batch, head, query, key (a score program: score too)", got));
                }
                Node::leaf(op)
            }
            op => {
                let operands: Vec<&str> = ["A", "B", "C"][..op.arity()].to_vec();
                line.count(op.arity() + 1, &format!("{name} {}", operands.join(" ")))?;
                let args = line.words[1..].iter().map(|word| self.operand(line, word)).collect::<Result<Vec<_>>>()?;
                let classes: Vec<Class> = args.iter().map(|&arg| self.nodes[arg as usize].class).collect();
                let Some(class) = op.result(&classes) else {
                    return Err(line.error(wanted(op), given(name, &classes)));
                };
                Node { op, class, args, bits: 0 }
            }
        };
        self.nodes.push(node);
        Ok(())
    }

    fn capture(&self, line: &Line<'_>, word: &str, extra: usize) -> Result<usize> {
        let number = line.number::<usize>(word, "the number of a capture")?;
        let Some(spec) = self.captures.get(number) else {
            return Err(line.error(format!("the number of one of {} captures", self.captures.len()), line.shown()));
        };
        if line.words.len() != 2 + extra + spec.rank {
            let allowed = format!("{} indices, one for each axis of capture {number}", spec.rank);
            return Err(line.error(allowed, line.shown()));
        }
        Ok(number)
    }

    fn index(&self, line: &Line<'_>, words: &[&str]) -> Result<Vec<u32>> {
        let index = words.iter().map(|word| self.operand(line, word)).collect::<Result<Vec<_>>>()?;
        match index.iter().find(|&&id| self.nodes[id as usize].class != Class::Int) {
            Some(&id) => {
                let got = format!("node {id}, which is {}", self.nodes[id as usize].class.name());
                Err(line.error("indices that are int", got))
            }
            None => Ok(index),
        }
    }

    fn read_gather(&self, line: &Line<'_>) -> Result<Node> {
        if line.words.len() < 2 {
            return Err(line.error("'gather CAPTURE I0 ..'", line.shown()));
        }
        let number = self.capture(line, line.words[1], 0)?;
        let args = self.index(line, &line.words[2..])?;
        Ok(Node { op: Op::Gather, class: self.captures[number].class, args, bits: number as u64 })
    }

    fn read_return(&mut self, line: &Line<'_>) -> Result<()> {
        line.count(2, "return N")?;
        self.result = self.operand(line, line.words[1])?;
        let class = self.nodes[self.result as usize].class;
        let wanted = if self.kind == Kind::Mask { Class::Bool } else { Class::Float };
        if class == wanted {
            return Ok(());
        }
        let got = format!("node {}, which is {}", self.result, class.name());
        let error = line.error(format!("a {} for a {} program", wanted.name(), self.kind.name()), got);
        Err(error.hint(if wanted == Class::Bool { "compare it, or use to_bool" } else { "use to_float" }))
    }

    fn read_scatter(&mut self, line: &Line<'_>) -> Result<()> {
        if self.kind != Kind::Gradient {
            return Err(line.error("scatter in gradient programs alone", format!("a {} program", self.kind.name())));
        }
        if line.words.len() < 3 {
            return Err(line.error("'scatter CAPTURE VALUE I0 ..'", line.shown()));
        }
        let capture = self.capture(line, line.words[1], 1)?;
        let value = self.operand(line, line.words[2])?;
        if self.captures[capture].class != Class::Float || self.nodes[value as usize].class != Class::Float {
            return Err(line.error("a float added into a float capture", line.shown()));
        }
        if self.scatters.len() == MOST_NODES {
            return Err(line.error(format!("at most {MOST_NODES} scatters"), "more"));
        }
        let index = self.index(line, &line.words[3..])?;
        self.scatters.push(Scatter { capture, value, index });
        Ok(())
    }

    /// The program as text.
    pub fn text(&self) -> String {
        let mut text = format!("{} {} {}\n", MAGIC[0], MAGIC[1], self.kind.name());
        let join = |ids: &[u32]| ids.iter().map(|id| format!(" {id}")).collect::<String>();
        for spec in &self.captures {
            _ = writeln!(text, "capture {} {}", spec.class.name(), spec.rank);
        }
        for node in &self.nodes {
            _ = match (node.op, node.value()) {
                (Op::Gather, _) => writeln!(text, "gather {}{}", node.bits, join(&node.args)),
                (_, Some(value)) => writeln!(text, "{} {}", node.op.name(), number(value)),
                (op, None) => writeln!(text, "{}{}", op.name(), join(&node.args)),
            };
        }
        _ = writeln!(text, "return {}", self.result);
        for scatter in &self.scatters {
            _ = writeln!(text, "scatter {} {}{}", scatter.capture, scatter.value, join(&scatter.index));
        }
        text
    }

    /// What it computes.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether it is a mask.
    pub fn is_mask(&self) -> bool {
        self.kind == Kind::Mask
    }

    /// Its captured arrays.
    pub fn captures(&self) -> &[CaptureSpec] {
        &self.captures
    }

    /// Its nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// What it adds to the gradients of captures.
    pub fn scatters(&self) -> &[Scatter] {
        &self.scatters
    }

    /// Which nodes the result and the scatters need.
    pub(super) fn needed(&self) -> Vec<bool> {
        let mut needed = vec![false; self.nodes.len()];
        for id in self.roots() {
            needed[id as usize] = true;
        }
        for id in (0..self.nodes.len()).rev() {
            if needed[id] {
                self.nodes[id].args.iter().for_each(|&arg| needed[arg as usize] = true);
            }
        }
        needed
    }

    /// The nodes that leave the program.
    pub(super) fn roots(&self) -> Vec<u32> {
        let scattered = self.scatters.iter().flat_map(|scatter| scatter.index.iter().chain([&scatter.value]));
        scattered.chain([&self.result]).copied().collect()
    }

    /// Whether the result depends on the score.
    pub fn reads_score(&self) -> bool {
        let needed = self.needed();
        self.nodes.iter().zip(needed).any(|(node, needed)| needed && node.op == Op::Score)
    }

    /// The same gradient program without the scatters into captures whose gradient nobody wants.
    #[must_use]
    pub fn wanting(&self, captures: &[bool]) -> Self {
        let wanted = |scatter: &&Scatter| captures.get(scatter.capture).copied().unwrap_or(false);
        let scatters = self.scatters.iter().filter(wanted).cloned().collect();
        Self { scatters, ..self.clone() }.simplified()
    }

    /// A node as people write it: `capture1[(query - key)]`. Long expressions are cut.
    pub fn show(&self, id: u32) -> String {
        let mut text = String::new();
        self.write(id, 0, &mut text);
        text
    }

    fn write(&self, id: u32, depth: usize, out: &mut String) {
        let node = &self.nodes[id as usize];
        if depth > 8 || out.len() > 200 {
            out.push_str("..");
            return;
        }
        let list = |ids: &[u32], out: &mut String| {
            for (i, &arg) in ids.iter().enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                self.write(arg, depth + 1, out);
            }
        };
        let infix = match node.op {
            Op::Add => " + ",
            Op::Sub => " - ",
            Op::Mul => " * ",
            Op::Div => " / ",
            Op::FloorDiv => " // ",
            Op::Mod => " % ",
            Op::And => " & ",
            Op::Or => " | ",
            Op::Xor => " ^ ",
            Op::Lt => " < ",
            Op::Le => " <= ",
            Op::Gt => " > ",
            Op::Ge => " >= ",
            Op::Eq => " == ",
            Op::Ne => " != ",
            _ => "",
        };
        if let Some(value) = node.value() {
            out.push_str(&number(value));
        } else if node.op == Op::Gather {
            _ = write!(out, "capture{}[", node.bits);
            list(&node.args, out);
            out.push(']');
        } else if !infix.is_empty() {
            out.push('(');
            self.write(node.args[0], depth + 1, out);
            out.push_str(infix);
            self.write(node.args[1], depth + 1, out);
            out.push(')');
        } else {
            out.push_str(node.op.name());
            if !node.args.is_empty() {
                out.push('(');
                list(&node.args, out);
                out.push(')');
            }
        }
    }
}

fn number(value: Value) -> String {
    match value {
        Value::Float(x) if x.is_nan() => "nan".into(),
        Value::Float(x) => format!("{x:?}"),
        Value::Int(x) => x.to_string(),
        Value::Bool(x) => u8::from(x).to_string(),
    }
}

fn wanted(op: Op) -> String {
    let words = |letters: &str| {
        let names = letters.chars().map(|letter| match letter {
            'f' => "float",
            'i' => "int",
            _ => "bool",
        });
        names.collect::<Vec<_>>().join(", ")
    };
    let forms: Vec<String> = op
        .entry()
        .signatures
        .iter()
        .map(|signature| format!("{}({})", op.name(), words(signature.split('>').next().unwrap_or(""))))
        .collect();
    forms.join(" or ")
}

fn given(name: &str, classes: &[Class]) -> String {
    format!("{name}({})", classes.iter().map(|class| class.name()).collect::<Vec<_>>().join(", "))
}

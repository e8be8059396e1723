//! Laws as short lists of tokens: what crosses between processes instead of a vocabulary of probabilities.

use super::sample::NORMALISED;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::{Array, Matrix};

/// A batch of laws: `ids [..., m]` (int32 or int64), ascending and without duplicates, -1 where a row has fewer than m;
/// `probabilities [..., m]` (float32 or float64) of the same shape.
#[derive(Debug, Clone)]
pub struct SparseLaws<'a> {
    name: &'static str,
    ids: Array<'a>,
    probabilities: Array<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Ids<'a> {
    Short(Matrix<'a, i32>),
    Long(Matrix<'a, i64>),
}

#[derive(Debug, Clone, Copy)]
enum Weights<'a> {
    Single(Matrix<'a, f32>),
    Double(Matrix<'a, f64>),
}

/// One checked law.
#[derive(Debug, Clone, Copy)]
pub(super) struct List<'a> {
    ids: Ids<'a>,
    weights: Weights<'a>,
    count: usize,
    total: f64,
}

impl<'a> SparseLaws<'a> {
    /// Checks types, and that the shapes are the same.
    ///
    /// # Errors
    /// Anything else.
    pub fn new(name: &'static str, ids: Array<'a>, probabilities: Array<'a>) -> Result<Self> {
        if !matches!(ids.dtype(), Dtype::I32 | Dtype::I64) {
            return Err(Error::dtype(&format!("{name}.ids"), "int32 or int64", ids.dtype()));
        }
        super::sample::laws_dtype(&format!("{name}.probabilities"), &probabilities)?;
        if probabilities.shape() != ids.shape() {
            let allowed = format!("the shape of the ids, {:?}", ids.shape());
            return Err(Error::shape(&format!("{name}.probabilities"), allowed, probabilities.shape()));
        }
        Ok(Self { name, ids, probabilities })
    }

    /// Refuses laws that are not one for each of `lead`.
    ///
    /// # Errors
    /// As said.
    pub(super) fn shaped(&self, lead: &[usize]) -> Result<()> {
        let shape = self.ids.shape();
        if shape.len() == lead.len() + 1 && shape.starts_with(lead) {
            return Ok(());
        }
        let lead: Vec<_> = lead.iter().map(usize::to_string).collect();
        Err(Error::shape(&format!("{}.ids", self.name), format!("[{}, m]", lead.join(", ")), shape))
    }

    /// The law at `at`, whose tokens must lie in `[0, vocabulary)`.
    ///
    /// # Errors
    /// Ids that are out of range or do not ascend; weights that are no law.
    pub(super) fn list(&self, at: &[usize], vocabulary: usize) -> Result<List<'a>> {
        let ids = match self.ids.dtype() {
            Dtype::I32 => Ids::Short(self.ids.vector(at)),
            _ => Ids::Long(self.ids.vector(at)),
        };
        let weights = match self.probabilities.dtype() {
            Dtype::F32 => Weights::Single(self.probabilities.vector(at)),
            _ => Weights::Double(self.probabilities.vector(at)),
        };
        let place = || at.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        let most = self.ids.shape().last().copied().unwrap_or(0);
        let mut list = List { ids, weights, count: most, total: 0.0 };
        let mut before = -1;
        for index in 0..most {
            let id = list.id(index);
            if id == -1 {
                list.count = index;
                break;
            }
            if id < 0 || id >= vocabulary as i64 {
                let allowed = format!("token ids in [0, V = {vocabulary}), then -1");
                return Err(Error::value(&format!("{}.ids[{}, {index}]", self.name, place()), allowed, id));
            }
            if id <= before {
                return Err(Error::value(
                    &format!("{}.ids[{}, {index}]", self.name, place()),
                    "ids that ascend, then -1",
                    format!("{id} after {before}"),
                )
                .hint("sort a row's ids, and its probabilities with them"));
            }
            before = id;
        }
        let mut negative = false;
        let mut lanes = [0.0f64; 8];
        for index in 0..list.count {
            let weight = list.weight(index);
            negative |= weight < 0.0;
            lanes[index % 8] += weight;
        }
        list.total = ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
        let near = (list.total - 1.0).abs() <= NORMALISED; // not if it is NaN
        if negative || !near {
            let got = if negative { "a negative entry".to_string() } else { format!("a sum of {}", list.total) };
            let allowed = format!("probabilities >= 0 that add up to 1 within {NORMALISED}");
            return Err(Error::value(&format!("{}.probabilities[{}]", self.name, place()), allowed, got)
                .hint("pass the law the token was drawn from, renormalised over its ids"));
        }
        Ok(list)
    }
}

impl List<'_> {
    fn id(&self, index: usize) -> i64 {
        match self.ids {
            Ids::Short(ids) => i64::from(ids.at(0, index)),
            Ids::Long(ids) => ids.at(0, index),
        }
    }

    fn weight(&self, index: usize) -> f64 {
        match self.weights {
            Weights::Single(weights) => f64::from(weights.at(0, index)),
            Weights::Double(weights) => weights.at(0, index),
        }
    }

    /// The sum of the weights.
    pub(super) fn total(&self) -> f64 {
        self.total
    }

    /// Tokens and weights, by rising token.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, f64)> + '_ {
        (0..self.count).map(|index| (self.id(index) as usize, self.weight(index)))
    }

    /// The weight of a token.
    pub(super) fn get(&self, token: usize) -> f64 {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = (low + high) / 2;
            match self.id(middle).cmp(&(token as i64)) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return self.weight(middle),
            }
        }
        0.0
    }
}

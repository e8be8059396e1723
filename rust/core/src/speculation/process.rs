//! From logits to the law that is sampled: temperature, then top-k, then top-p, in double precision.
//!
//! The order and the sets are those of Hugging Face transformers (`TemperatureLogitsWarper`, `TopKLogitsWarper`,
//! `TopPLogitsWarper`):
//! * top-k keeps every token whose logit is at least the k-th largest, so ties with it all stay;
//! * top-p keeps the smallest set of most probable tokens whose mass reaches p, the crossing token included.
//!
//! Where it differs, on purpose: everything is computed in double precision (there: in the logits' own, so at
//! boundaries that fall into its rounding the sets may differ); tokens that tie at the edge of the nucleus enter by
//! rising id (there: in the order an unstable sort leaves them); temperature 0 means greedy (there: an error);
//! +inf is the limit, a law shared evenly by the tokens that have it (there: NaN); NaN and a row whose tokens are all
//! masked are errors (there: NaN spreads).

use super::input::{Results, floating, shaped, widen};
use super::law::{Law, total};
use super::saguaro::Saguaro;
use super::select::{candidates, kth_largest, nucleus, reach};
use crate::arch::laws::{Lawful, Laws, ROUGH};
use crate::arch::ranking::Ranked;
use crate::dtype::{Dtype, Real};
use crate::error::{Error, Result};
use crate::exponential::exponential;
use crate::threads;
use crate::view::{Array, ArrayMut};

/// Elements below which a batch is not worth waking threads for.
pub(super) const SERIAL: usize = 1 << 15;

/// How one row is sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    temperature: f64,
    /// 0 = off.
    top_k: usize,
    /// 1 = off.
    top_p: f64,
}

impl Sampling {
    /// Always the most probable token (ties: the lowest id).
    pub const GREEDY: Self = Self { temperature: 0.0, top_k: 0, top_p: 1.0 };

    /// A checked rule; `row` names it in errors.
    ///
    /// # Errors
    /// A temperature that is negative or not finite, a negative top_k, a top_p outside (0, 1].
    pub fn new(row: usize, temperature: f64, top_k: i64, top_p: f64) -> Result<Self> {
        if !(temperature >= 0.0 && temperature.is_finite()) {
            return Err(Error::value(&format!("temperature[{row}]"), "a finite number >= 0", temperature)
                .hint("0 is greedy, 1 samples the model's own law"));
        }
        let Ok(top_k) = usize::try_from(top_k) else {
            return Err(Error::value(&format!("top_k[{row}]"), "an integer >= 0", top_k).hint("0 keeps every token"));
        };
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(Error::value(&format!("top_p[{row}]"), "a number in (0, 1]", top_p)
                .hint("1 keeps every token; for the most probable one alone use temperature 0"));
        }
        Ok(Self { temperature, top_k, top_p })
    }

    /// Whether all mass goes to the largest logit.
    pub fn is_greedy(self) -> bool {
        self.temperature == 0.0
    }

    /// Whether every token keeps a share.
    fn is_plain(self) -> bool {
        self.top_k == 0 && self.top_p == 1.0
    }
}

/// Evaluates `$body` with `$row` bound to the last axis of `$array` at `$at` as a slice of its own type; `None` if that
/// axis is not contiguous.
macro_rules! on_row {
    ($array:expr, $at:expr, |$row:ident| $body:expr) => {
        match $array.dtype() {
            Dtype::F32 => $crate::speculation::process::on_row!(@ f32, $array, $at, |$row| $body),
            Dtype::F64 => $crate::speculation::process::on_row!(@ f64, $array, $at, |$row| $body),
            Dtype::F16 => $crate::speculation::process::on_row!(@ half::f16, $array, $at, |$row| $body),
            Dtype::Bf16 => $crate::speculation::process::on_row!(@ half::bf16, $array, $at, |$row| $body),
            other => unreachable!("checked by floating(): {other}"),
        }
    };
    (@ $t:ty, $array:expr, $at:expr, |$row:ident| $body:expr) => {
        match $array.vector::<$t>($at).row(0) {
            Some($row) => Some($body),
            None => None,
        }
    };
}
pub(super) use on_row;

fn laws_of<T: Lawful>(_row: &[T]) -> &'static Laws<T> {
    T::laws()
}

/// The largest logit of a row, checked; +0 for -0.
fn checked_top<T: Lawful>(row: &[T], at: &[usize]) -> Result<f64> {
    let (top, ordered) = T::laws().largest(row);
    let name = || {
        let at: Vec<_> = at.iter().map(usize::to_string).collect();
        format!("logits[{}]", at.join(", "))
    };
    if !ordered {
        let token = row.iter().position(|value| value.widen().f64().is_nan()).unwrap_or_default();
        return Err(Error::value(&name(), "numbers", format!("NaN at token {token}")).hint("-inf masks a token"));
    }
    if top == f64::NEG_INFINITY {
        return Err(Error::value(&name(), "at least one token above -inf", "a row whose tokens are all masked"));
    }
    Ok(top + 0.0)
}

impl Law {
    /// All mass on one token.
    fn set_point(&mut self, token: usize) {
        self.dense = false;
        self.ids.clear();
        self.ids.push(token);
        self.weights.clear();
        self.weights.push(1.0);
        self.total = 1.0;
    }

    /// Becomes the law of a row of logits at a positive temperature. `z` holds the logits, `top` is their largest; `z` is
    /// used up. Where they are `listed`, `z` holds those of `self.ids` alone, and top-k leaves no others.
    fn set(&mut self, z: &mut Vec<f64>, mut top: f64, sampling: Sampling, listed: bool, spare: &mut Spare) {
        if !listed {
            self.ids.clear();
        }
        self.weights.clear();
        if top == f64::INFINITY {
            // The limit of growing logits: those at +inf share everything.
            for value in z.iter_mut() {
                *value = if *value == top { 0.0 } else { f64::NEG_INFINITY };
            }
            top = 0.0;
        }
        self.dense = !listed;
        if sampling.top_k > 0 && sampling.top_k < z.len() {
            let bar = kth_largest(z, sampling.top_k, &mut spare.buffer).max(f64::MIN);
            if self.dense {
                self.ids.extend(0..z.len());
                self.dense = false;
            }
            let mut kept = 0;
            for index in 0..z.len() {
                if z[index] >= bar {
                    self.ids[kept] = self.ids[index];
                    z[kept] = z[index];
                    kept += 1;
                }
            }
            self.ids.truncate(kept);
            z.truncate(kept);
        }
        self.weights.resize(z.len(), 0.0);
        self.total = f64::laws().weigh(z, top, sampling.temperature, &mut self.weights);
        if sampling.top_p < 1.0 {
            let (bar, last) = nucleus(z, &self.weights, self.total, sampling.top_p, &mut spare.order);
            if self.dense {
                self.ids.extend(0..z.len());
                self.dense = false;
            }
            let mut kept = 0;
            for index in 0..z.len() {
                if z[index] > bar || (z[index] == bar && index <= last) {
                    self.ids[kept] = self.ids[index];
                    self.weights[kept] = self.weights[index];
                    kept += 1;
                }
            }
            self.ids.truncate(kept);
            self.weights.truncate(kept);
            self.total = total(&self.weights);
        }
    }
}

#[derive(Debug, Default)]
struct Spare {
    buffer: Vec<f64>,
    order: Vec<usize>,
    found: Vec<u32>,
    singles: Vec<f32>,
    doubles: Vec<f64>,
}

/// What one thread needs to turn rows of logits into laws.
#[derive(Debug, Default)]
pub struct Processor {
    z: Vec<f64>,
    spare: Spare,
}

/// A row's law where nothing is cut off: a token's weight is e^((logit - top) / temperature).
#[derive(Debug, Clone, Copy)]
pub(super) struct Softmax {
    top: f64,
    temperature: f64,
    /// The sum of the weights, within the relative error `within`.
    total: f64,
    within: f64,
}

impl Softmax {
    /// Bounds of the probability of a token with this logit; equal, and the bits of [`Law::probability`], where the total
    /// is exact.
    pub(super) fn probability(self, logit: f64) -> (f64, f64) {
        let share = exponential((logit - self.top) / self.temperature) / self.total;
        (share * (1.0 - self.within), share * (1.0 + self.within))
    }
}

impl Processor {
    /// `law` becomes the law of the row of `logits` at `at` (all axes but the last).
    ///
    /// # Errors
    /// NaN, and rows without any token above -inf.
    pub fn law(&mut self, logits: &Array<'_>, at: &[usize], sampling: Sampling, law: &mut Law) -> Result<()> {
        let plain = on_row!(logits, at, |row| {
            let top = checked_top(row, at)?;
            if sampling.temperature == 0.0 {
                law.set_point(laws_of(row).position(row, top).unwrap_or_default());
                true
            } else if sampling.is_plain() && top < f64::INFINITY {
                law.ids.clear();
                law.dense = true;
                law.weights.resize(row.len(), 0.0);
                law.total = laws_of(row).weigh(row, top, sampling.temperature, &mut law.weights);
                true
            } else {
                false
            }
        });
        if plain != Some(true) && !self.short_list(logits, at, sampling, law) {
            widen(logits, at, &mut self.z);
            let top = checked_top(&self.z, at)?;
            if sampling.temperature == 0.0 {
                law.set_point(f64::laws().position(&self.z, top).unwrap_or_default());
            } else {
                law.set(&mut self.z, top, sampling, false, &mut self.spare);
            }
        }
        Ok(())
    }

    /// [`Processor::law`] where top-k leaves few tokens of a row that was checked: the others are not even widened. False:
    /// this is another case.
    fn short_list(&mut self, logits: &Array<'_>, at: &[usize], sampling: Sampling, law: &mut Law) -> bool {
        fn list<T: Lawful + Ranked>(
            row: Option<&[T]>,
            sampling: Sampling,
            tops: &mut Vec<T>,
            found: &mut Vec<u32>,
            z: &mut Vec<f64>,
            law: &mut Law,
        ) -> Option<f64> {
            let row = row.filter(|row| (1..row.len().min(reach::<T>() + 1)).contains(&sampling.top_k))?;
            let count = candidates(row, sampling.top_k, found, tops);
            law.ids.clear();
            law.ids.extend(found[..count].iter().map(|token| *token as usize));
            z.clear();
            z.extend(law.ids.iter().map(|token| row[*token].widen().f64() + 0.0));
            Some(z.iter().copied().fold(f64::NEG_INFINITY, f64::max))
        }
        if sampling.temperature == 0.0 || sampling.top_k == 0 {
            return false;
        }
        let Spare { singles, doubles, found, .. } = &mut self.spare;
        let top = match logits.dtype() {
            Dtype::F32 => list::<f32>(logits.vector(at).row(0), sampling, singles, found, &mut self.z, law),
            Dtype::F64 => list::<f64>(logits.vector(at).row(0), sampling, doubles, found, &mut self.z, law),
            _ => None,
        };
        let Some(top) = top else { return false };
        law.set(&mut self.z, top, sampling, true, &mut self.spare);
        true
    }

    /// The law of a row in short, where it has a short form (`None`: ask [`Processor::law`]); its total may be `rough`.
    ///
    /// # Errors
    /// As [`Processor::law`].
    pub(super) fn softmax(
        &self,
        logits: &Array<'_>,
        at: &[usize],
        sampling: Sampling,
        rough: bool,
    ) -> Result<Option<Softmax>> {
        if !sampling.is_plain() || sampling.temperature == 0.0 {
            return Ok(None);
        }
        let temperature = sampling.temperature;
        let found = on_row!(logits, at, |row| {
            let top = checked_top(row, at)?;
            let laws = laws_of(row);
            let quick = if rough { laws.rough_mass(row, top, temperature) } else { None };
            let (total, within) = match quick {
                _ if top == f64::INFINITY => return Ok(None),
                Some(total) => (total, ROUGH),
                None => (laws.mass(row, top, temperature), 0.0),
            };
            Softmax { top, temperature, total, within }
        });
        Ok(found)
    }

    /// `law`, reweighed and cut to the `support` most probable tokens (0: all), as a draft draws from it.
    ///
    /// # Errors
    /// As [`Processor::law`].
    pub(super) fn draft_law(
        &mut self,
        logits: &Array<'_>,
        at: &[usize],
        mut sampling: Sampling,
        saguaro: Saguaro,
        support: usize,
        law: &mut Law,
    ) -> Result<()> {
        if support > 0 && sampling.top_p == 1.0 {
            // Nothing beyond these can matter, and a short list has few exponentials.
            let reach = support.saturating_add(saguaro.reach());
            sampling.top_k = if sampling.top_k == 0 { reach } else { sampling.top_k.min(reach) };
        }
        self.law(logits, at, sampling, law)?;
        if sampling.temperature > 0.0 {
            law.reweigh(saguaro, &mut self.spare.buffer);
        }
        if support > 0 {
            law.cut(support, &mut self.spare.buffer);
        }
        Ok(())
    }

    /// The errors that [`Processor::law`] would have, without the work.
    ///
    /// # Errors
    /// As [`Processor::law`].
    pub fn check(&mut self, logits: &Array<'_>, at: &[usize]) -> Result<()> {
        if on_row!(logits, at, |row| checked_top(row, at)?).is_none() {
            widen(logits, at, &mut self.z);
            checked_top(&self.z, at)?;
        }
        Ok(())
    }
}

/// The laws of a batch: logits `[B, V]` or `[B, N, V]` and one rule per row to probabilities of that shape (float64).
///
/// # Errors
/// Wrong ranks, extents or types; NaN or wholly masked rows.
pub fn process(logits: &Array<'_>, rules: &[Sampling], out: ArrayMut<'_>) -> Result<()> {
    floating("logits", logits)?;
    let deep = logits.shape().len() != 2;
    if deep {
        shaped("logits", logits, "[B, V] or [B, N, V]", &[Some(rules.len()), None, None])?;
    } else {
        shaped("logits", logits, "[B, V] or [B, N, V]", &[Some(rules.len()), None])?;
    }
    let depth = if deep { logits.shape()[1] } else { 1 };
    let laws = rules.len() * depth;
    if logits.shape().ends_with(&[0]) && laws > 0 {
        return Err(Error::shape("logits", "[B, V] or [B, N, V] with V >= 1", logits.shape()));
    }
    if out.shape() != logits.shape() {
        return Err(Error::shape("out", format!("the shape of logits, {:?}", logits.shape()), out.shape()));
    }
    if out.dtype() != Dtype::F64 {
        return Err(Error::dtype("out", "float64", out.dtype()));
    }
    let out = out.rows::<f64>();
    let results = Results::new(laws);
    let serial = logits.len() < SERIAL;
    threads::for_each(laws, serial, Default::default, |task, (processor, law): &mut (Processor, Law)| {
        let at = [task / depth, task % depth];
        let at = if deep { &at[..] } else { &at[..1] };
        let result = processor.law(logits, at, rules[at[0]], law);
        results.put(task, result.map(|()| law.write(out.take(task))));
    })?;
    results.collect().map(|_: Vec<()>| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn law(logits: &[f64], temperature: f64, top_k: i64, top_p: f64) -> Result<Vec<f64>> {
        let array = Array::from_slice(logits, &[1, logits.len()]).unwrap();
        let mut law = Law::default();
        Processor::default().law(&array, &[0], Sampling::new(0, temperature, top_k, top_p)?, &mut law)?;
        let mut out = vec![f64::NAN; logits.len()];
        law.write(&mut out);
        for (token, &probability) in out.iter().enumerate() {
            assert_eq!(law.probability(token), probability);
        }
        Ok(out)
    }

    fn near(a: &[f64], b: &[f64]) {
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-15), "{a:?} {b:?}");
    }

    const MASKED: f64 = f64::NEG_INFINITY;

    #[test]
    fn temperature() {
        let ln2 = std::f64::consts::LN_2;
        near(&law(&[0.0, ln2, MASKED, 0.0], 1.0, 0, 1.0).unwrap(), &[0.25, 0.5, 0.0, 0.25]);
        near(&law(&[0.0, ln2, MASKED, 0.0], 0.5, 0, 1.0).unwrap(), &[1.0 / 6.0, 4.0 / 6.0, 0.0, 1.0 / 6.0]);
        near(&law(&[0.0, 3.0, 3.0], 0.0, 0, 0.3).unwrap(), &[0.0, 1.0, 0.0]); // ties: the lowest id
        near(&law(&[0.0, 3.0, 2.0], 1e-310, 0, 1.0).unwrap(), &[0.0, 1.0, 0.0]);
        near(&law(&[1e300, -1e300, 1e300], 1.0, 0, 1.0).unwrap(), &[0.5, 0.0, 0.5]);
    }

    #[test]
    fn top_k_keeps_ties() {
        near(&law(&[1.0, 2.0, 1.0, 0.0], 1.0, 1, 1.0).unwrap(), &[0.0, 1.0, 0.0, 0.0]);
        let e = (-1.0f64).exp();
        let z = 1.0 + 2.0 * e;
        near(&law(&[1.0, 2.0, 1.0, 0.0], 1.0, 2, 1.0).unwrap(), &[e / z, 1.0 / z, e / z, 0.0]);
        near(&law(&[5.0, MASKED, MASKED], 1.0, 2, 1.0).unwrap(), &[1.0, 0.0, 0.0]);
        assert_eq!(law(&[1.0, 2.0], 1.0, 9, 1.0).unwrap(), law(&[1.0, 2.0], 1.0, 0, 1.0).unwrap());
    }

    #[test]
    fn top_p_takes_the_crossing_token_and_low_ids_first() {
        // Four equal tokens: half the mass is two of them, the next hair of it a third.
        near(&law(&[0.0; 4], 1.0, 0, 0.5).unwrap(), &[0.5, 0.5, 0.0, 0.0]);
        near(&law(&[0.0; 4], 1.0, 0, 0.500_001).unwrap(), &[1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.0]);
        near(&law(&[0.0, 1.0, 0.0], 1.0, 0, 1e-9).unwrap(), &[0.0, 1.0, 0.0]);
        // After top-k: the mass is that of what top-k left.
        near(&law(&[0.0, 1.0, 1.0], 1.0, 2, 0.5).unwrap(), &[0.0, 1.0, 0.0]);
    }

    #[test]
    fn infinities() {
        near(&law(&[f64::INFINITY, 1.0, f64::INFINITY], 0.7, 0, 1.0).unwrap(), &[0.5, 0.0, 0.5]);
        near(&law(&[1.0, f64::INFINITY, f64::INFINITY], 0.0, 0, 1.0).unwrap(), &[0.0, 1.0, 0.0]);
        near(&law(&[1.0, f64::INFINITY, 2.0], 1.0, 2, 1.0).unwrap(), &[0.0, 1.0, 0.0]);
    }

    #[test]
    fn bad_rows_are_named() {
        let text = law(&[0.0, f64::NAN], 1.0, 0, 1.0).unwrap_err().to_string();
        assert!(text.contains("logits[0]") && text.contains("NaN at token 1"), "{text}");
        let text = law(&[MASKED; 9], 0.0, 0, 1.0).unwrap_err().to_string();
        assert!(text.contains("masked"), "{text}");
        for (temperature, top_k, top_p) in [
            (-1.0, 0, 1.0),
            (f64::NAN, 0, 1.0),
            (f64::INFINITY, 0, 1.0),
            (1.0, -1, 1.0),
            (1.0, 0, 0.0),
            (1.0, 0, 1.5),
            (1.0, 0, f64::NAN),
        ] {
            assert!(Sampling::new(0, temperature, top_k, top_p).is_err());
        }
    }

    #[test]
    fn every_row_has_its_rule() {
        let logits: Vec<f32> = (0..24).map(|x| ((x * 7) % 5) as f32).collect();
        let array = Array::from_slice(&logits, &[2, 3, 4]).unwrap();
        let mut out = vec![f64::NAN; 24];
        let rules = [Sampling::GREEDY, Sampling::new(1, 1.0, 0, 1.0).unwrap()];
        process(&array, &rules, ArrayMut::from_slice(&mut out, &[2, 3, 4]).unwrap()).unwrap();
        assert!(out[..12].iter().all(|&p| p == 0.0 || p == 1.0));
        assert!(out[12..].iter().all(|&p| p > 0.0 && p < 1.0));
        assert!(out.chunks(4).all(|row| (row.iter().sum::<f64>() - 1.0).abs() < 1e-15));
    }
}

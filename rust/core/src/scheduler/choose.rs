//! The choices: chain length, budget, guesses, and what to do on a miss. All from times, acceptance and ranks; none looks
//! at what was drafted, so none can bias what is sampled.

use super::latency::Latency;
use super::learn::{Class, Learner, expected, law};
use super::settings::{Fallback, Settings};
use crate::speculation::fanout::{most, water_fill};

/// How rounds are run until something better is known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// Tokens of a chain; 0: plain steps.
    pub length: u32,
    /// Branches of one stream's build.
    pub budget: u32,
    /// Most tokens of a fast chain.
    pub fast: u32,
    /// Tokens per second that are expected of all rows together; 0 if nothing is known.
    pub rate: f64,
    /// The batch size up to which waiting for the draft model is the better fallback.
    pub critical: f64,
}

/// What is known, and what is asked.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// Times.
    pub latency: &'a Latency,
    /// Acceptance and ranks.
    pub learner: &'a Learner,
    /// Settings.
    pub settings: &'a Settings,
    /// Streams that are verified together.
    pub rows: f64,
    /// Of them on one worker; 0 if there is no worker.
    pub per_worker: f64,
    /// Tokens per second of them all, as it went lately; none before enough was seen.
    pub pace: Option<f64>,
}

/// A plan has to promise this much more than the present one to replace it.
const HYSTERESIS: f64 = 1.03;

/// Theorem 17's critical batch size in closed form, times in units of one verification: the draft model is the better
/// fallback as long as (1 - p^b) T < R - 1, where R is the ratio of tokens per round with it and with the fast one.
pub fn critical_batch(hit: f64, on_hit: f64, neural: f64, fast: f64, time: f64) -> f64 {
    let ratio = (hit * on_hit + (1.0 - hit) * neural) / (hit * on_hit + (1.0 - hit) * fast);
    if ratio - 1.0 >= time || hit >= 1.0 {
        f64::INFINITY
    } else if hit <= 0.0 {
        0.0
    } else {
        ((1.0 - (ratio - 1.0) / time).ln() / hit.ln()).max(0.0)
    }
}

impl Known<'_> {
    /// Guesses after each accepted length of a chain of `length` tokens; `remaining`: tokens still wanted of the stream
    /// before the chain. After outcomes that leave no place for another chain nothing is guessed.
    pub fn fan_out(&self, rates: &[f64], class: Class, budget: u32, remaining: u64) -> Vec<u32> {
        let length = rates.len();
        let mut most = most(self.settings.vocabulary as usize, length);
        for (accepted, most) in most.iter_mut().enumerate() {
            // accepted + 1 tokens leave; a chain and the token after it need two more.
            if (accepted as u64) + 3 > remaining {
                *most = 0;
            }
        }
        let spread = water_fill(&law(rates), &self.learner.curves(class, length as u32), budget as usize, &most);
        spread.into_iter().map(|guesses| guesses as u32).collect()
    }

    /// How often outcomes after chains of this class are found: as guessed evenly, or where branches take turns (then no
    /// budget says how many there will be) as they were found lately.
    fn found(&self, rates: &[f64], class: Class, budget: u32) -> f64 {
        let evenly = self.hit(rates, class, budget);
        if self.settings.ordered { self.learner.hit_rate_or(class, evenly) } else { evenly }
    }

    /// P(the outcome is among `budget` guesses) after a chain with these rates.
    pub fn hit(&self, rates: &[f64], class: Class, budget: u32) -> f64 {
        let fan_out = self.fan_out(rates, class, budget, u64::MAX);
        let curves = self.learner.curves(class, rates.len() as u32);
        let law = law(rates);
        let hits = law.iter().zip(&fan_out).zip(curves).map(|((p, f), curve)| p * curve.hit(*f as usize));
        hits.sum::<f64>().clamp(0.0, 1.0)
    }

    /// The length of fast chains that emits most per second by itself.
    fn fast_length(&self) -> u32 {
        // A driver that knows what its tokens are worth ends its chains by itself.
        let ends = self.settings.ordered && self.learner.answered_fast().is_some();
        if !self.settings.adaptive || ends || !self.latency.target.is_known() {
            return self.settings.draft_length;
        }
        let rates = self.learner.rates(None, Class::Fast, self.settings.draft_length);
        let rate = |length: usize| expected(&rates[..length]) / self.verify(Class::Fast, length as u32);
        (0..=rates.len()).max_by(|&a, &b| rate(a).total_cmp(&rate(b)).then(b.cmp(&a))).unwrap_or(0) as u32
    }

    /// Seconds to verify chains of which `length` tokens were asked for, in every row.
    fn verify(&self, class: Class, length: u32) -> f64 {
        self.latency.verify(self.rows * (self.learner.extent(class, 0, length) + 1.0), self.rows)
    }

    /// Tokens per second of all rows (and the critical batch size) with chains of `length` and builds of `budget`.
    pub fn rate(&self, length: u32, budget: u32, fast: u32) -> (f64, f64) {
        let depth = length.min(self.settings.depth);
        let verify = self.verify(Class::Model, length);
        let fast_rates = self.learner.rates(None, Class::Fast, fast);
        let fast_tokens = expected(&fast_rates);
        let quick = self.verify(Class::Fast, fast);
        if length == 0 || self.per_worker == 0.0 {
            let plain = self.rows / self.latency.verify(self.rows, self.rows);
            let by_fast = self.rows * fast_tokens / quick;
            let plainly = fast == 0 || settings_forbid_fast(self.settings);
            return (if plainly { plain } else { by_fast }, 0.0);
        }
        let rates = self.learner.rates(None, Class::Model, depth);
        let tokens = expected(&rates);
        let drafted_rates = self.learner.rates(None, Class::Drafted, depth);
        let drafted = expected(&drafted_rates);
        let hit = if budget > 0 { self.found(&rates, Class::Model, budget) } else { 0.0 };
        let after_fast = if budget > 0 { self.found(&fast_rates, Class::Fast, budget) } else { 0.0 };
        let extent = self.learner.extent(Class::Model, 0, depth);
        let branches = f64::from(budget) * self.per_worker;
        let build = if budget > 0 { self.latency.build(extent, branches) } else { 0.0 };
        let wait = self.latency.fallback(self.learner.extent(Class::Drafted, 0, depth));
        let all_hit = hit.powf(self.rows);
        let share = after_fast / (1.0 - hit + after_fast).max(1e-9); // hits in the long run, Markov
        // Either a build that takes longer than a verification is waited for, or its branches are used as far as they are.
        let whole = |slot: f64, ahead: f64| {
            let neural = self.rows * (hit * ahead + (1.0 - hit) * drafted)
                / (all_hit * slot.max(verify) + (1.0 - all_hit) * (verify + wait));
            let fast_slot = (share * verify + (1.0 - share) * quick).max(slot);
            (neural, self.rows * (share * ahead + (1.0 - share) * fast_tokens) / fast_slot)
        };
        let (mut neural, mut by_fast) = whole(build, tokens);
        if build > verify {
            let cut = self.latency.depth_within(verify, branches).min(f64::from(depth)) as u32;
            let (cut_neural, cut_fast) = whole(0.0, expected(&rates[..cut as usize]));
            (neural, by_fast) = (neural.max(cut_neural), by_fast.max(cut_fast));
        }
        // Where the driver says what its own drafts are worth, some misses are answered fast and some are not.
        let mixed = self.learner.answered_fast().map_or(0.0, |fast_share| {
            let after_drafted = if budget > 0 { self.found(&drafted_rates, Class::Drafted, budget) } else { 0.0 };
            let after_miss = fast_share * after_fast + (1.0 - fast_share) * after_drafted;
            let hits = after_miss / (1.0 - hit + after_miss).max(1e-9);
            let (by_fast, by_draft) = ((1.0 - hits) * fast_share, (1.0 - hits) * (1.0 - fast_share));
            let waits = 1.0 - (1.0 - by_draft).powf(self.rows);
            let slot = if self.settings.ordered { 0.0 } else { build };
            let time = ((1.0 - by_fast) * verify + by_fast * quick + waits * wait).max(slot);
            self.rows * (hits * tokens + by_fast * fast_tokens + by_draft * drafted) / time
        });
        let critical = critical_batch(hit, tokens, drafted, fast_tokens, wait / verify);
        match self.settings.fallback {
            Fallback::Neural => (neural, critical),
            Fallback::Fast => (by_fast, critical),
            Fallback::Adaptive => (neural.max(by_fast).max(mixed), critical),
        }
    }

    /// Chain length and budget that promise most tokens per second; the present ones unless something is clearly better.
    /// `explore`: not plain steps, so that what drafts are worth stays known.
    pub fn plan(&self, present: Option<Plan>, explore: bool) -> Plan {
        let settings = self.settings;
        let usual = self.fast_length();
        let mut fast = usual;
        if explore || self.learner.tried(Class::Fast) < 16.0 {
            fast = fast.max(settings.draft_length.min(4)); // what fast chains give is only known from trying
        }
        let scored = |length: u32, budget: u32| {
            let (rate, critical) = self.rate(length, budget, usual);
            Plan { length, budget, fast, rate, critical }
        };
        let known = self.latency.target.is_known() && (self.per_worker == 0.0 || self.latency.drafts_known());
        if !known {
            return Plan { length: settings.draft_length, budget: settings.budget, fast, rate: 0.0, critical: 0.0 };
        }
        // Branches that take turns use time that would be idle, and where they do not help there are fast chains.
        let free = settings.ordered && self.per_worker > 0.0 && settings.fallback != Fallback::Neural;
        if !settings.adaptive || free {
            return scored(settings.draft_length, settings.budget);
        }
        let mut best = if explore { scored(1.min(settings.draft_length), 0) } else { scored(0, 0) };
        let shortest = if settings.ordered { settings.draft_length } else { 1 };
        for length in shortest..=settings.draft_length {
            if self.per_worker == 0.0 {
                break;
            }
            let depth = self.learner.extent(Class::Model, 0, length.min(settings.depth));
            let verify = self.verify(Class::Model, length);
            let most = (f64::from(settings.budget) * self.per_worker).ceil() as u32;
            // The build fits into one verification; smaller if it does not, and the whole budget in case lateness pays.
            let fits = f64::from(self.latency.branches_within(verify, depth, most)) / self.per_worker;
            let fits = (fits as u32).min(settings.budget);
            for budget in [0, fits, (fits + settings.budget) / 2, settings.budget] {
                if settings.ordered && budget != settings.budget {
                    continue;
                }
                let plan = scored(length, budget);
                if plan.rate > best.rate {
                    best = plan;
                }
            }
        }
        match present.filter(|plan| plan.rate > 0.0 && !(explore && plan.length == 0)) {
            Some(present) => {
                let stay = scored(present.length, present.budget);
                if best.rate > HYSTERESIS * stay.rate { best } else { stay }
            }
            None => best,
        }
    }
}

/// Neural alone: where the draft model is of no use, steps are plain.
fn settings_forbid_fast(settings: &Settings) -> bool {
    settings.fallback == Fallback::Neural
}

/// The rows of one decision.
#[derive(Debug, Clone, Copy, Default)]
pub struct Group {
    /// Rows with a chain, and the tokens expected of them.
    pub ready: f64,
    /// Rows without.
    pub missing: f64,
    /// Seconds until those have a chain if the draft model makes it.
    pub wait: f64,
    /// Seconds that it takes to draft a chain.
    pub draft: f64,
    /// Tokens of a round with a fast chain in each of the rows without, if the driver told; otherwise as learnt.
    pub fast: Option<f64>,
}

impl Known<'_> {
    /// What one row's chain of a class is worth: tokens of a round with it, and how often the next is a hit.
    fn promise(&self, plan: &Plan, class: Class) -> (f64, f64) {
        let length = if class == Class::Fast { plan.fast } else { plan.length.min(self.settings.depth) };
        let rates = self.learner.rates(None, class, length);
        let hit = self.learner.hit_rate(class).unwrap_or_else(|| self.hit(&rates, class, plan.budget));
        (expected(&rates), hit)
    }

    /// Tokens that a second is worth: those of the last ones, or what the plan promises.
    fn price(&self, plan: &Plan) -> f64 {
        self.pace.unwrap_or(plan.rate)
    }

    /// The value of waiting for the missing rows, of going ahead without them, and of fast chains for them.
    ///
    /// Tokens of this round, plus what a chain at the next is worth (`chain`) times the chance to have one, minus the
    /// tokens that the time would have given at the present rate: the relative values of an average-reward decision
    /// process. There, a chain is worth what the best answer to a miss costs: all wait for a draft; or a fast chain now,
    /// and a next miss as probable as after one; or the row alone sits a verification out.
    pub fn values(&self, plan: &Plan, group: &Group) -> [f64; 3] {
        let (tokens, hit) = self.promise(plan, Class::Model);
        let (drafted, after_drafted) = self.promise(plan, Class::Drafted);
        let (fast, after_fast) = self.promise(plan, Class::Fast);
        let fast = group.fast.unwrap_or(fast);
        let rows = group.ready + group.missing;
        let per_row = self.learner.extent(Class::Model, 0, plan.length) + 1.0;
        let per_fast = self.learner.extent(Class::Fast, 0, plan.fast) + 1.0;
        let whole = self.latency.verify(rows * per_row, rows);
        let part = self.latency.verify(group.ready * per_row, group.ready);
        let quick = self.latency.verify(group.ready * per_row + group.missing * per_fast, rows);
        let price = self.price(plan);
        let sits_out = price / rows * whole;
        let lost = self.learner.lost().unwrap_or((drafted - fast).max(0.0));
        let falls_back = lost / (1.0 - hit + after_fast).max(1e-9);
        let chain = (price * group.draft).min(falls_back).min(sits_out);
        let in_time = if group.wait > part { part / group.wait } else { 1.0 };
        let here = group.ready * tokens + group.ready * hit * chain;
        let wait = here + group.missing * (drafted + after_drafted * chain) - price * (group.wait + whole);
        let ahead =
            if group.ready > 0.0 { here + group.missing * in_time * chain - price * part } else { f64::NEG_INFINITY };
        let quickly = here + group.missing * (fast + after_fast * chain) - price * quick;
        [wait, ahead, quickly]
    }

    /// Whether a branch of `have` tokens is worth finishing to `want` while `rows` rows wait for it.
    pub fn worth_finishing(&self, plan: &Plan, have: u32, want: u32) -> bool {
        let rates = self.learner.rates(None, Class::Drafted, want);
        let gain = expected(&rates) - expected(&rates[..have.min(want) as usize]);
        gain > self.price(plan) * self.latency.fallback(self.learner.extent(Class::Drafted, have, want))
    }

    /// What decides whether a token is drafted and verified, at the present rate; before there is one, what it usually is.
    pub fn worth(&self, plan: &Plan) -> Worth {
        if plan.rate == 0.0 || !self.latency.is_known() {
            return Worth::default();
        }
        let per_stream = self.price(plan) / self.rows;
        let [_, token, _] = *self.latency.target.coefficients();
        let [_, step] = *self.latency.chains.coefficients();
        let [_, branch] = *self.latency.builds.coefficients();
        let depth = plan.length.min(self.settings.depth);
        let rates = self.learner.rates(None, Class::Drafted, depth);
        let fast = self.learner.rates(None, Class::Fast, plan.fast);
        let wait = per_stream * self.latency.fallback(self.learner.extent(Class::Drafted, 0, depth));
        let instead = match self.settings.fallback {
            Fallback::Neural => f64::INFINITY,
            Fallback::Fast => expected(&rates) - expected(&fast),
            Fallback::Adaptive => self.learner.lost().unwrap_or(expected(&rates) - expected(&fast)),
        };
        let of = |seconds: f64| (per_stream * seconds).clamp(0.01, 0.5);
        let miss = if self.settings.fallback == Fallback::Fast { instead } else { wait.min(instead) };
        Worth { verified: of(token), drafted: of(token + step), branch: of(branch), hit: 1.0 + miss.max(0.0) }
    }
}

/// Probabilities and tokens that a draft weighs where it may choose by content.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Worth {
    /// A token drafted ahead is worth verifying if all up to it are kept with this probability.
    pub verified: f64,
    /// A token is worth drafting while the target waits.
    pub drafted: f64,
    /// A token of a branch is worth its part of a step, where that is not idle time anyway.
    pub branch: f64,
    /// Tokens that the first token of a branch is worth: it, and what a miss costs.
    pub hit: f64,
}

impl Default for Worth {
    fn default() -> Self {
        Self { verified: 0.1, drafted: 0.3, branch: 0.02, hit: 3.0 }
    }
}

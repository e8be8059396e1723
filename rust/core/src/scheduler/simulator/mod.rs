//! The rounds in virtual time: targets, draft devices and links around the same state machine that the engine drives.
//!
//! * [`process`]: what the models say; [`toy`]: models of few tokens with real verification;
//! * [`devices`]: a draft device, step by step;
//! * `world`: the queue of events, and the targets.
//!
//! Times are in any unit (one verification, or seconds). Everything is a function of the configuration and its seed.

pub mod devices;
pub mod process;
pub mod toy;
mod world;

use super::settings::Settings;
use super::stats::Stats;
use crate::error::{Error, Result};
use process::Process;

/// How long things take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Times {
    /// A verification of n tokens of b rows takes `target[0] + target[1] n + target[2] b`.
    pub target: [f64; 3],
    /// A step of the draft over m branches takes `draft[0] + draft[1] m`.
    pub draft: [f64; 2],
    /// The forward over a chain, before a build.
    pub glue: f64,
    /// A message takes `link[0]`, and `link[1]` a drafted token that it carries.
    pub link: [f64; 2],
}

/// What is simulated.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Of every target's machine; `workers` counts the draft devices of one target.
    pub settings: Settings,
    /// Targets, each with its own streams.
    pub targets: u32,
    /// Draft devices of all targets together.
    pub drafts: u32,
    /// Streams of a target.
    pub streams: u32,
    /// Tokens to emit before the simulation ends, over all streams.
    pub tokens: u64,
    /// Times.
    pub times: Times,
    /// The models.
    pub process: Process,
    /// Guess only what follows a whole chain (PEARL).
    pub whole_only: bool,
    /// Keep a record of every verification.
    pub log: bool,
}

/// One row of a logged verification.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoggedRow {
    /// The stream.
    pub stream: u32,
    /// The round.
    pub round: u64,
    /// Index of the source of the chain.
    pub source: u8,
    /// Tokens of the chain, accepted ones, emitted ones.
    pub counts: [u32; 3],
    /// When the chain was there.
    pub ready: f64,
}

/// One verification.
#[derive(Debug, Clone, PartialEq)]
pub struct Logged {
    /// Of which target.
    pub target: u32,
    /// When that target was free, when it began, when it ended.
    pub times: [f64; 3],
    /// The rows.
    pub rows: Vec<LoggedRow>,
}

/// What came out.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Time from the first verification to the end.
    pub elapsed: f64,
    /// Tokens emitted in it.
    pub tokens: u64,
    /// Busy time of the draft devices.
    pub draft_busy: f64,
    /// The machines' counters.
    pub stats: Vec<Stats>,
    /// Draft length and budget at the end, by target.
    pub plans: Vec<(u32, u32)>,
    /// Verifications, if they were asked for.
    pub log: Vec<Logged>,
    /// Rounds in which all rows of a batch hit, and batches that looked all their rows up.
    pub all_hit: (u64, u64),
    /// The tokens of the first stream (toy models only).
    pub text: Vec<u32>,
}

/// Runs a simulation; `interrupted` is asked now and then whether to stop.
///
/// # Errors
/// Settings or numbers out of their ranges; [`Error::Interrupted`].
pub fn simulate(config: &Config, interrupted: impl Fn() -> bool) -> Result<Outcome> {
    let times = &config.times;
    let all = times.target.iter().chain(&times.draft).chain(&times.link).chain([&times.glue]);
    if all.clone().any(|seconds| !(*seconds >= 0.0 && seconds.is_finite())) {
        return Err(Error::value("times", "numbers >= 0", format!("{times:?}")));
    }
    if times.target[0] + times.target[1] <= 0.0 {
        return Err(Error::value("target", "a verification that takes time", format!("{:?}", times.target)));
    }
    for (name, value) in [("targets", config.targets), ("streams", config.streams)] {
        if value == 0 || value > 1 << 12 {
            return Err(Error::value(name, "an integer in [1, 4096]", value));
        }
    }
    world::World::new(config)?.run(interrupted)
}

#[cfg(test)]
mod tests;

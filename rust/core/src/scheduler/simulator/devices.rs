//! A draft device: all builds and all drafts that somebody waits for advance together, a step at a time.
//!
//! ```text
//! next step:   new builds, and no draft is waited for: the forward over their chains (glue)
//!              otherwise one token on each branch of each job: draft[0] + draft[1] (branches of all),
//!              and glue for new builds on top
//! ```
//! A step that runs is never broken off; a job that was cancelled in it just does not report.

use super::Times;
use super::toy::Content;

/// One guessed outcome, and what was drafted for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Branch {
    /// The guess.
    pub accepted: u32,
    /// The guess.
    pub token: u32,
    /// Tokens of the stream up to the guess (toy models).
    pub context: Vec<u32>,
    /// Drafted.
    pub content: Content,
    /// The name of that content at the driver; 0 before it was sent.
    pub handle: u64,
}

/// A build or a draft.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Of which target's stream, and that target's number of this device.
    pub target: usize,
    /// See `target`.
    pub worker: u32,
    /// The stream.
    pub stream: u32,
    /// The round whose outcomes are guessed, or that came out.
    pub round: u64,
    /// Whether somebody waits for it.
    pub wanted: bool,
    /// Branches; of a draft one.
    pub branches: Vec<Branch>,
    /// Tokens to draft, and drafted.
    pub depth: u32,
    /// See `depth`.
    pub done: u32,
    /// Tokens that were drafted before it was wanted.
    pub held: u32,
    /// Whether the chain was read.
    pub glued: bool,
    /// Time spent on it.
    pub spent: f64,
}

/// A draft device.
#[derive(Debug, Clone, Default)]
pub struct Device {
    /// Jobs in the order of arrival.
    pub jobs: Vec<Job>,
    /// Jobs of the step that runs, and how long it takes.
    running: Option<(Vec<(usize, u32, u64, bool)>, f64)>,
    /// Time it worked.
    pub busy: f64,
}

fn name(job: &Job) -> (usize, u32, u64, bool) {
    (job.target, job.stream, job.round, job.wanted)
}

impl Device {
    /// Starts the next step, if there is work and none runs; how long it takes.
    pub fn start(&mut self, times: &Times) -> Option<f64> {
        if self.running.is_some() || self.jobs.is_empty() {
            return None;
        }
        let wanted = self.jobs.iter().any(|job| job.wanted);
        let new = self.jobs.iter().any(|job| !job.glued);
        let token: usize = self.jobs.iter().filter(|job| job.glued).map(|job| job.branches.len()).sum();
        let only_glue = new && !wanted;
        let mut seconds = if new { times.glue } else { 0.0 };
        if !only_glue {
            seconds += times.draft[0] + times.draft[1] * token as f64;
        }
        let jobs: Vec<&Job> = self.jobs.iter().filter(|job| !job.glued || !only_glue).collect();
        self.running = Some((jobs.into_iter().map(name).collect(), seconds));
        self.busy += seconds;
        Some(seconds)
    }

    /// The step that runs is over; the jobs that it advanced by a token (their places).
    pub fn step(&mut self) -> Vec<usize> {
        let Some((names, seconds)) = self.running.take() else { return Vec::new() };
        let mut advanced = Vec::new();
        for (place, job) in self.jobs.iter_mut().enumerate() {
            if !names.contains(&name(job)) {
                continue;
            }
            job.spent += seconds;
            if job.glued {
                job.done += 1;
                advanced.push(place);
            }
            job.glued = true;
        }
        advanced
    }

    /// Takes a stream's jobs off the device.
    pub fn cancel(&mut self, target: usize, stream: u32, round: Option<u64>) -> Vec<Job> {
        let its = |job: &Job| job.target == target && job.stream == stream && round.is_none_or(|r| job.round == r);
        let (gone, kept) = std::mem::take(&mut self.jobs).into_iter().partition(|job| its(job));
        self.jobs = kept;
        gone
    }
}

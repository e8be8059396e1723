//! Who runs when, as state machines without I/O: events with times go in, commands come out. The real engine, the
//! simulator (virtual time) and the tests (adversarial orders) drive the same machine. Nothing here reads a clock,
//! sleeps, spawns or touches a file.
//!
//! Rounds of speculative decoding with drafts that are made ahead ("speculative speculative decoding", Kumar, Dao, May,
//! 2026), [`Rounds`]:
//! * [`event`], what goes in and what comes out; [`settings`];
//! * [`rounds`], the transitions, in four files: streams, target, drafts, misses;
//! * [`stream`], [`workers`], [`handles`]: what is remembered of streams, draft workers and contents;
//! * [`batch`], who is verified together, and whether to wait for a draft;
//! * [`choose`], chain length, budget, guesses, fallback, from [`latency`] (times), [`learn`] (acceptance, ranks)
//!   and [`pace`] (what a second brings);
//! * [`stats`], counters;
//! * [`simulator`], targets, draft devices and links in virtual time around the same machine.
//!
//! Reasoning traces: [`confidence`], how sure a model was along each, at once (in parallel) and step by step.
//!
//! Why no choice biases what is sampled: the machine never sees a drafted token or its law, only lengths, outcomes,
//! ranks, times, and what the text so far lets the driver expect of its own draft. An entry is found by its whole outcome, which the target drew; it is used at most once.

pub mod batch;
pub mod choose;
pub mod confidence;
pub mod event;
pub mod handles;
pub mod latency;
pub mod learn;
pub mod pace;
pub mod rounds;
pub mod settings;
pub mod simulator;
pub mod stats;
pub mod stream;
pub mod workers;

pub use event::{Command, Event};
pub use rounds::Rounds;
pub use settings::{Fallback, Settings};

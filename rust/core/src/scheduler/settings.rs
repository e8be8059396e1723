//! What the rounds are told before they start.

use crate::error::{Error, Result};

/// What a row does that has no cached chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Whichever is measured to be better: it depends on how many rows wait.
    Adaptive,
    /// The draft model drafts now.
    Neural,
    /// The driver's own draft without delay.
    Fast,
}

impl Fallback {
    /// By its name.
    ///
    /// # Errors
    /// Other names.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "adaptive" => Ok(Fallback::Adaptive),
            "neural" => Ok(Fallback::Neural),
            "fast" => Ok(Fallback::Fast),
            other => Err(Error::value("fallback", "'adaptive', 'neural' or 'fast'", format!("'{other}'"))),
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Fallback::Adaptive => "adaptive",
            Fallback::Neural => "neural",
            Fallback::Fast => "fast",
        }
    }
}

/// Settings of [`super::Rounds`].
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Most tokens of a chain (K); 0 decodes plainly.
    pub draft_length: u32,
    /// Most branches of one stream's build.
    pub budget: u32,
    /// Most tokens a branch is drafted ahead.
    pub depth: u32,
    /// What rows without a cached chain do.
    pub fallback: Fallback,
    /// Most rows of a verification.
    pub max_batch: u32,
    /// Seconds to wait for a draft before going on without; none: several times what one takes.
    pub patience: Option<f64>,
    /// Whether chain length and budget are chosen from what is measured (otherwise they are as set).
    pub adaptive: bool,
    /// Whether drafts end by themselves where more is not worth it, and branches grow in order of their probability as far
    /// as time permits. Then chain length and budget bound them and are not chosen.
    pub ordered: bool,
    /// Whether the first token is guessed, and drafted behind, while the target reads the prompt.
    pub guess_first: bool,
    /// Whether all streams are always verified together: nobody goes ahead while another waits for a draft.
    pub together: bool,
    /// Number of draft workers that may come.
    pub workers: u32,
    /// Number of different tokens.
    pub vocabulary: u32,
    /// Of the few random choices (when to try what is not known well enough).
    pub seed: u64,
}

/// Chains, batches and budgets above these are mistakes.
const MOST: u32 = 1 << 16;

impl Settings {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the setting that is out of its range.
    pub fn check(&self) -> Result<()> {
        for (name, value, least, most) in [
            ("draft_length", self.draft_length, 0, 1024),
            ("budget", self.budget, 0, MOST),
            ("depth", self.depth, 0, 1024),
            ("max_batch", self.max_batch, 1, MOST),
            ("workers", self.workers, 0, MOST),
            ("vocabulary", self.vocabulary, 1, u32::MAX),
        ] {
            if !(least..=most).contains(&value) {
                return Err(Error::value(name, format!("an integer in [{least}, {most}]"), value));
            }
        }
        match self.patience {
            Some(seconds) if !(seconds > 0.0 && seconds.is_finite()) => {
                Err(Error::value("patience", "a positive number of seconds", seconds)
                    .hint("None measures how long drafts take and waits for several times that"))
            }
            _ => Ok(()),
        }
    }
}

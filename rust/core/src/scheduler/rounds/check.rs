//! Numbers that cannot be are refused before anything changes.

use super::Rounds;
use crate::error::{Error, Result};
use crate::scheduler::event::{Event, Verdict};
use crate::scheduler::stream::State;

fn duration(name: &str, seconds: f64) -> Result<()> {
    if seconds >= 0.0 && seconds.is_finite() {
        return Ok(());
    }
    Err(Error::value(name, "a number of seconds >= 0", seconds))
}

impl Rounds {
    pub(super) fn check(&self, now: f64, event: &Event) -> Result<()> {
        if !now.is_finite() {
            return Err(Error::value("now", "a finite number of seconds", now));
        }
        match event {
            Event::Join { limit: 0, stream } => {
                Err(Error::value("limit", format!("at least 1 token for stream {stream}"), 0))
            }
            Event::Prefilled { token, fast, .. } => {
                expectation("fast", *fast)?;
                match token.filter(|token| *token >= self.settings.vocabulary) {
                    Some(token) => {
                        let allowed = format!("a token below the vocabulary of {}", self.settings.vocabulary);
                        Err(Error::value("token", allowed, token))
                    }
                    None => Ok(()),
                }
            }
            Event::Verified { batch, seconds, rows } => {
                duration("seconds", *seconds)?;
                self.check_rows(*batch, rows)
            }
            Event::Built { seconds, .. } => duration("seconds", *seconds),
            Event::Drafted { seconds, length, held, .. } => {
                duration("seconds", *seconds)?;
                if held > length {
                    return Err(Error::value("held", format!("at most the chain's {length} tokens"), held));
                }
                Ok(())
            }
            Event::Entries { entries, .. } => {
                for (i, entry) in entries.iter().enumerate() {
                    if entry.length == 0 {
                        return Err(Error::value(
                            &format!("entries[{i}]"),
                            "a continuation of at least one token",
                            "length 0",
                        ));
                    }
                    if entry.token >= self.settings.vocabulary {
                        let allowed = format!("a token below the vocabulary of {}", self.settings.vocabulary);
                        return Err(Error::value(&format!("entries[{i}]"), allowed, entry.token));
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn check_rows(&self, batch: u64, rows: &[Verdict]) -> Result<()> {
        let Some(batch) = self.target.batch.as_ref().filter(|out| out.id == batch) else { return Ok(()) };
        for (i, verdict) in rows.iter().enumerate() {
            let name = format!("rows[{i}]");
            let Some((row, life)) = batch.rows.iter().find(|(row, _)| row.stream == verdict.stream) else {
                let allowed = format!("a stream of batch {}", batch.id);
                return Err(Error::value(&name, allowed, format!("stream {}", verdict.stream)));
            };
            if rows[..i].iter().any(|other| other.stream == verdict.stream) {
                return Err(Error::value(&name, "every stream once", format!("stream {} again", verdict.stream)));
            }
            let Some(stream) = self.streams.get(&verdict.stream).filter(|stream| stream.life == *life) else {
                continue; // aborted meanwhile: nobody reads its row
            };
            let length = stream.verified_length(row);
            if verdict.accepted > length {
                let allowed = format!("at most {length} accepted tokens, the length of the chain");
                return Err(Error::value(&name, allowed, verdict.accepted));
            }
            let whole = verdict.accepted + 1;
            let fits = if verdict.finished { (1..=whole).contains(&verdict.emitted) } else { verdict.emitted == whole };
            if !fits {
                let allowed = format!("{whole} emitted tokens, fewer (at least 1) only where the stream finished");
                return Err(Error::value(&name, allowed, verdict.emitted));
            }
            expectation(&name, verdict.fast)?;
            if verdict.token >= self.settings.vocabulary {
                let allowed = format!("a token below the vocabulary of {}", self.settings.vocabulary);
                return Err(Error::value(&name, allowed, verdict.token));
            }
        }
        for (row, life) in &batch.rows {
            let lives = self.streams.get(&row.stream).is_some_and(|stream| stream.life == *life);
            if lives && !rows.iter().any(|verdict| verdict.stream == row.stream) {
                let allowed = format!("a row for stream {} of batch {}", row.stream, batch.id);
                return Err(Error::value("rows", allowed, "none"));
            }
        }
        Ok(())
    }

    /// Whether the stream is in the verification that is out (maybe preempted meanwhile).
    pub(super) fn is_out(&self, id: u32) -> bool {
        let Some(stream) = self.streams.get(&id) else { return false };
        matches!(stream.state, State::Verifying { .. })
            || self
                .target
                .batch
                .as_ref()
                .is_some_and(|batch| batch.rows.iter().any(|(row, life)| row.stream == id && *life == stream.life))
    }
}

/// Tokens that the driver expects of its own draft.
fn expectation(name: &str, fast: Option<f64>) -> Result<()> {
    match fast.filter(|fast| !(0.0..f64::INFINITY).contains(fast)) {
        Some(fast) => {
            Err(Error::value(name, "a finite number >= 0 of tokens of the driver's own draft, or none", fast))
        }
        None => Ok(()),
    }
}

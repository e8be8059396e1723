//! Who is verified together, and when not to wait for the others.

use super::choose::{Group, Known, Plan};
use super::event::StreamId;
use super::stream::{State, Stream};
use std::collections::BTreeMap;

/// What the free target should do.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// Nothing can be verified now.
    Nothing,
    /// Verify these.
    Verify(Vec<StreamId>),
    /// Wait for drafts that are about to come, but not beyond this time.
    Hold(f64),
}

/// A draft that takes this many times longer than expected is not waited for by others.
const OVERDUE: f64 = 2.0;

/// Chooses among the streams that have a chain: all of them, those that have waited longest if there are too many.
///
/// Streams whose draft is on its way may be worth waiting for: together they cost one verification instead of two.
/// Who is left behind has its chain when the target is free again, and its turn is then among the first.
pub fn next(
    streams: &BTreeMap<StreamId, Stream>,
    max_batch: u32,
    known: &Known<'_>,
    plan: &Plan,
    together: bool,
    now: f64,
) -> Next {
    let mut ready: Vec<(u64, StreamId)> = (streams.values())
        .filter_map(|stream| match stream.state {
            State::Ready { turn, .. } => Some((turn, stream.id)),
            _ => None,
        })
        .collect();
    if ready.is_empty() {
        return Next::Nothing;
    }
    ready.sort_unstable();
    let whole = ready.len() >= max_batch as usize;
    ready.truncate(max_batch as usize);
    let go = || Next::Verify(ready.iter().map(|&(_, id)| id).collect());
    if whole {
        return go();
    }
    // Only drafts of prompt workers are in `Awaiting`; overdue ones do not hold others up.
    let mut group = Group { ready: ready.len() as f64, ..Group::default() };
    let mut until = f64::INFINITY;
    for stream in streams.values() {
        if let State::Awaiting { since, expected, deadline, .. } = stream.state {
            let overdue = (since + OVERDUE * expected).min(deadline);
            if now < overdue {
                group.missing += 1.0;
                let left = since + expected - now;
                // Just in time it may be here in the next moment; late, nobody knows.
                let left = if left > -0.05 * expected { left.max(0.0) } else { 0.25 * expected };
                group.wait = group.wait.max(left);
                group.draft = group.draft.max(expected);
                until = until.min(overdue);
            }
        }
    }
    if group.missing == 0.0 {
        return go();
    }
    let [wait, ahead, _] = known.values(plan, &group);
    if together || wait > ahead { Next::Hold(until) } else { go() }
}

//! Single cases, by the names of the properties and edge cases they stand for.

use crate::scheduler::event::{Command, Entry, Event, Row, Source, Verdict};
use crate::scheduler::{Fallback, Rounds, Settings};

fn settings() -> Settings {
    Settings {
        draft_length: 3,
        budget: 6,
        depth: 3,
        fallback: Fallback::Neural,
        max_batch: 4,
        patience: Some(1.0),
        adaptive: false,
        ordered: false,
        guess_first: false,
        together: false,
        workers: 1,
        vocabulary: 50,
        seed: 0,
    }
}

/// Stream 5 of `limit` tokens with a worker, up to its first verification; returns the row and the build's fan-out.
fn started(settings: Settings, limit: u64) -> (Rounds, Row, Vec<u32>) {
    let mut machine = Rounds::new(settings).unwrap();
    machine.handle(0.0, Event::WorkerReady { worker: 0 }).unwrap();
    let commands = machine.handle(0.0, Event::Join { stream: 5, limit }).unwrap();
    assert_eq!(commands, [Command::Open { worker: 0, stream: 5 }, Command::Prefill { stream: 5 }]);
    machine.handle(0.1, Event::Opened { worker: 0, stream: 5 }).unwrap();
    let commands =
        machine.handle(0.2, Event::Prefilled { stream: 5, finished: false, token: None, fast: None }).unwrap();
    let [Command::Draft { round: 0, accepted: 0, token: None, length, .. }] = commands[..] else {
        panic!("{commands:?}")
    };
    let drafted = Event::Drafted { worker: 0, stream: 5, round: 0, length, handle: 1, seconds: 0.01, held: 0 };
    let commands = machine.handle(0.3, drafted).unwrap();
    let Command::Verify { rows, .. } = &commands[0] else { panic!("{commands:?}") };
    let fan_out = match commands.get(1) {
        Some(Command::Build { fan_out, .. }) => fan_out.clone(),
        _ => Vec::new(),
    };
    (machine, rows[0], fan_out)
}

fn entry(accepted: u32, token: u32, length: u32, handle: u64) -> Entry {
    Entry { accepted, token, length, handle, ended: false }
}

fn verified(batch: u64, accepted: u32, token: u32) -> Event {
    let rows = vec![Verdict { stream: 5, accepted, token, emitted: accepted + 1, finished: false, fast: None }];
    Event::Verified { batch, seconds: 0.1, rows }
}

fn row_of(commands: &[Command]) -> Option<Row> {
    commands.iter().find_map(|command| match command {
        Command::Verify { rows, .. } => Some(rows[0]),
        _ => None,
    })
}

#[test]
fn p6_a_hit_serves_exactly_its_entry_at_once_and_the_rest_is_given_back() {
    let (mut machine, row, fan_out) = started(settings(), 100);
    assert_eq!((row.round, row.source, row.length, fan_out.len()), (1, Source::Drafted, 3, 4));
    assert_eq!(fan_out.iter().sum::<u32>(), 6);
    let entries = vec![entry(2, 7, 3, 10), entry(1, 7, 3, 11), entry(2, 8, 3, 12)];
    machine.handle(0.35, Event::Entries { worker: 0, stream: 5, round: 1, entries }).unwrap();
    let commands = machine.handle(0.4, verified(1, 2, 7)).unwrap();
    // E7: the same token after another number of accepted ones is another outcome.
    let next = row_of(&commands).unwrap();
    assert_eq!((next.round, next.source, next.handle, next.length), (2, Source::Cached, Some(10), 3));
    assert!(commands.contains(&Command::Stop { worker: 0, stream: 5, round: 1 }));
    assert_eq!(commands.last(), Some(&Command::Discard { handles: vec![11, 12, 1] }));
    assert_eq!(machine.stats().hits[2], 1);
}

#[test]
fn e3_the_next_step_is_the_same_whatever_the_contents_are_called() {
    // Two runs that differ in handles only: the machine cannot tell contents apart.
    let run = |offset: u64| {
        let (mut machine, _, _) = started(settings(), 100);
        let entries = (0..4).map(|i| entry(i, 3, 1 + i % 3, offset + u64::from(i))).collect();
        machine.handle(0.35, Event::Entries { worker: 0, stream: 5, round: 1, entries }).unwrap();
        let commands = machine.handle(0.4, verified(1, 1, 3)).unwrap();
        commands.iter().map(std::mem::discriminant).collect::<Vec<_>>()
    };
    assert_eq!(run(100), run(7000));
}

#[test]
fn e6_nothing_is_asked_for_beyond_the_limit() {
    for limit in 1..8 {
        let mut machine = Rounds::new(Settings { workers: 0, fallback: Fallback::Fast, ..settings() }).unwrap();
        machine.handle(0.0, Event::Join { stream: 5, limit }).unwrap();
        let mut commands =
            machine.handle(0.1, Event::Prefilled { stream: 5, finished: false, token: None, fast: None }).unwrap();
        let (mut emitted, mut batch) = (1, 0);
        while let Some(row) = row_of(&commands) {
            batch += 1;
            assert!(emitted + u64::from(row.length) < limit);
            emitted += u64::from(row.length) + 1;
            commands = machine.handle(0.2, verified(batch, row.length, 1)).unwrap();
        }
        assert_eq!(emitted, limit);
        assert!(matches!(commands[0], Command::Finish { reason: crate::scheduler::event::Reason::Limit, .. }));
    }
}

#[test]
fn e6_a_stop_in_the_middle_of_a_chain_ends_the_stream() {
    let (mut machine, _, _) = started(settings(), 100);
    let rows = vec![Verdict { stream: 5, accepted: 3, token: 9, emitted: 2, finished: true, fast: None }];
    let commands = machine.handle(0.4, Event::Verified { batch: 1, seconds: 0.1, rows }).unwrap();
    assert!(matches!(
        commands[..],
        [Command::Stop { .. }, Command::Forget { .. }, Command::Finish { .. }, Command::Discard { .. }]
    ));
    assert_eq!((machine.stats().tokens, machine.active(), machine.held()), (3, 0, 0));
}

#[test]
fn e8_a_number_used_again_starts_beyond_the_rounds_of_its_last_owner() {
    let (mut machine, row, _) = started(settings(), 100);
    let late = Event::Entries { worker: 0, stream: 5, round: row.round, entries: vec![entry(0, 1, 3, 20)] };
    machine.handle(0.4, Event::Abort { stream: 5 }).unwrap();
    machine.handle(0.4, verified(1, 0, 1)).unwrap();
    machine.handle(0.5, Event::Join { stream: 5, limit: 9 }).unwrap();
    machine.handle(0.6, Event::Prefilled { stream: 5, finished: false, token: None, fast: None }).unwrap();
    assert_eq!(machine.handle(0.6, late).unwrap(), [Command::Discard { handles: vec![20] }]);
    let commands = machine.handle(0.7, Event::Opened { worker: 0, stream: 5 }).unwrap();
    assert!(matches!(commands[0], Command::Draft { round, .. } if round > row.round));
}

#[test]
fn e9_preempted_and_aborted_streams_leave_nothing_behind() {
    for abort in [false, true] {
        let (mut machine, row, _) = started(settings(), 100);
        let entries = vec![entry(0, 1, 2, 20)];
        machine.handle(0.31, Event::Entries { worker: 0, stream: 5, round: row.round, entries }).unwrap();
        let event = if abort { Event::Abort { stream: 5 } } else { Event::Preempt { stream: 5 } };
        let commands = machine.handle(0.32, event).unwrap();
        assert!(commands.contains(&Command::Stop { worker: 0, stream: 5, round: row.round }));
        assert!(commands.contains(&Command::Forget { worker: 0, stream: 5 }));
        assert!(commands.contains(&Command::Discard { handles: vec![20] }), "the chain stays: the target reads it");
        let entries = vec![entry(0, 1, 3, 21)];
        let late = machine.handle(0.33, Event::Entries { worker: 0, stream: 5, round: row.round, entries }).unwrap();
        assert_eq!(late, [Command::Discard { handles: vec![21] }]);
        let commands = machine.handle(0.4, verified(1, 2, 1)).unwrap();
        assert_eq!(commands, [Command::Discard { handles: vec![1] }]);
        assert_eq!(machine.held(), 0);
        // What was verified meanwhile counts where the stream lives on.
        assert_eq!(machine.stats().tokens, if abort { 1 } else { 4 });
        if !abort {
            let commands = machine.handle(0.5, Event::Resume { stream: 5 }).unwrap();
            assert_eq!(commands, [Command::Open { worker: 0, stream: 5 }, Command::Prefill { stream: 5 }]);
        }
    }
}

#[test]
fn e10_small_budgets_small_vocabularies_and_short_chains() {
    for (draft_length, budget, vocabulary, limit) in
        [(0, 6, 50, 9), (1, 1, 2, 9), (3, 1, 2, 9), (3, 60, 2, 90), (3, 6, 50, 2)]
    {
        let settings = Settings { draft_length, depth: draft_length, budget, vocabulary, ..settings() };
        if draft_length == 0 || limit < 3 {
            continue;
        }
        let (_, row, fan_out) = started(settings, limit);
        assert_eq!(fan_out.len(), row.length as usize + 1);
        let most: u32 = (0..=row.length).map(|k| if k < row.length { vocabulary - 1 } else { vocabulary }).sum();
        assert_eq!(fan_out.iter().sum::<u32>(), budget.min(most));
        assert!(fan_out[..row.length as usize].iter().all(|guesses| *guesses < vocabulary));
    }
    let mut plain = Rounds::new(Settings { draft_length: 0, depth: 0, ..settings() }).unwrap();
    plain.handle(0.0, Event::WorkerReady { worker: 0 }).unwrap();
    assert_eq!(plain.handle(0.0, Event::Join { stream: 5, limit: 3 }).unwrap(), [Command::Prefill { stream: 5 }]);
    let commands = plain.handle(0.1, Event::Prefilled { stream: 5, finished: false, token: None, fast: None }).unwrap();
    assert_eq!(commands.len(), 1);
    assert_eq!(row_of(&commands).map(|row| (row.source, row.length)), Some((Source::Empty, 0)));
}

#[test]
fn e12_a_row_that_never_hits_does_not_redraft_the_others() {
    let mut machine = Rounds::new(settings()).unwrap();
    machine.handle(0.0, Event::WorkerReady { worker: 0 }).unwrap();
    let mut now = 0.0;
    let mut at = || {
        now += 0.01;
        now
    };
    for stream in [1, 2] {
        machine.handle(at(), Event::Join { stream, limit: 100 }).unwrap();
        machine.handle(at(), Event::Opened { worker: 0, stream }).unwrap();
    }
    machine.handle(at(), Event::Prefilled { stream: 1, finished: false, token: None, fast: None }).unwrap();
    let _ = machine.handle(at(), Event::Prefilled { stream: 2, finished: false, token: None, fast: None });
    let draft =
        |stream, handle| Event::Drafted { worker: 0, stream, round: 0, length: 3, handle, seconds: 0.01, held: 0 };
    let first = machine.handle(at(), draft(1, 1)).unwrap();
    let mut batch = first;
    if row_of(&batch).is_none() {
        batch = machine.handle(at(), draft(2, 2)).unwrap();
    }
    let Some(Command::Verify { batch: id, rows }) = batch.iter().find(|c| matches!(c, Command::Verify { .. })) else {
        panic!("{batch:?}")
    };
    if rows.len() < 2 {
        return; // stream 1 went ahead alone: then nobody waits for anybody
    }
    machine.handle(at(), Event::Entries { worker: 0, stream: 1, round: 1, entries: vec![entry(0, 4, 3, 30)] }).unwrap();
    let rows = [1, 2]
        .map(|stream| Verdict { stream, accepted: 0, token: 4, emitted: 1, finished: false, fast: None })
        .to_vec();
    let commands = machine.handle(at(), Event::Verified { batch: *id, seconds: 0.1, rows }).unwrap();
    let drafts: Vec<u32> = commands
        .iter()
        .filter_map(|command| match command {
            Command::Draft { stream, .. } => Some(*stream),
            _ => None,
        })
        .collect();
    assert_eq!(drafts, [2]);
}

#[test]
fn p15_a_worker_that_dies_or_sleeps_is_done_without() {
    for dies in [true, false] {
        let (mut machine, _, _) = started(settings(), 100);
        let commands = machine.handle(0.4, verified(1, 0, 1)).unwrap();
        assert!(matches!(commands[1], Command::Draft { .. }), "{commands:?}");
        let deadline = machine.next_deadline().unwrap();
        let commands = if dies {
            machine.handle(0.45, Event::WorkerLost { worker: 0 }).unwrap()
        } else {
            assert!((deadline - 1.4).abs() < 1e-9);
            machine.handle(deadline, Event::Tick).unwrap()
        };
        assert_eq!(row_of(&commands).map(|row| (row.source, row.length)), Some((Source::Fast, 3)));
        assert!(
            !commands.iter().any(|command| matches!(command, Command::Build { .. })),
            "nothing for who is not there"
        );
        // The answer that comes after all is given back.
        let late = Event::Drafted { worker: 0, stream: 5, round: 1, length: 3, handle: 40, seconds: 0.01, held: 0 };
        assert_eq!(machine.handle(3.0, late).unwrap(), [Command::Discard { handles: vec![40] }]);
    }
}

#[test]
fn a_short_hit_is_used_or_finished_by_length_and_time_alone() {
    // Unknown times: used as it is. A late entry of the outcome that is awaited is taken when it is long enough.
    let (mut machine, _, _) = started(settings(), 100);
    machine.handle(0.31, Event::Entries { worker: 0, stream: 5, round: 1, entries: vec![entry(3, 9, 1, 50)] }).unwrap();
    let commands = machine.handle(0.4, verified(1, 3, 9)).unwrap();
    let next = row_of(&commands);
    let finishing = commands.iter().any(|command| matches!(command, Command::Draft { length: 3, .. }));
    assert!(next.is_some_and(|row| row.handle == Some(50) && row.length == 1) != finishing);
    if finishing {
        let commands = machine
            .handle(0.45, Event::Entries { worker: 0, stream: 5, round: 1, entries: vec![entry(3, 9, 3, 51)] })
            .unwrap();
        assert_eq!(row_of(&commands).map(|row| (row.handle, row.length)), Some((Some(51), 3)));
        assert_eq!(machine.stats().late_hits, 1);
    }
}

#[test]
fn numbers_that_cannot_be_change_nothing() {
    let (mut machine, _, _) = started(settings(), 100);
    let before = format!("{machine:?}");
    let verdict = Verdict { stream: 5, accepted: 1, token: 1, emitted: 2, finished: false, fast: None };
    let rows = |rows| Event::Verified { batch: 1, seconds: 0.1, rows };
    for event in [
        Event::Join { stream: 1, limit: 0 },
        rows(vec![]),
        rows(vec![verdict, verdict]),
        rows(vec![Verdict { accepted: 4, emitted: 5, ..verdict }]),
        rows(vec![Verdict { emitted: 1, ..verdict }]),
        rows(vec![Verdict { emitted: 0, finished: true, ..verdict }]),
        rows(vec![Verdict { token: 50, ..verdict }]),
        rows(vec![Verdict { stream: 6, ..verdict }]),
        Event::Verified { batch: 1, seconds: f64::NAN, rows: vec![verdict] },
        Event::Entries { worker: 0, stream: 5, round: 1, entries: vec![entry(0, 1, 0, 9)] },
        Event::Entries { worker: 0, stream: 5, round: 1, entries: vec![entry(0, 50, 1, 9)] },
        Event::Built { worker: 0, stream: 5, round: 1, seconds: -1.0, steps: 1, branches: 1 },
        Event::Drafted { worker: 0, stream: 5, round: 1, length: 1, handle: 9, seconds: 0.1, held: 2 },
    ] {
        assert!(machine.handle(0.5, event.clone()).is_err(), "{event:?}");
        assert_eq!(format!("{machine:?}"), before, "{event:?}");
    }
    assert!(machine.handle(f64::NAN, Event::Tick).is_err());
}

//! A driver that does everything wrong that may go wrong, and checks all it is told to do.
//!
//! ```text
//! a schedule: random settings, then some hundred random steps:
//!     deliver any pending answer (any order), twice, or never; let time pass, stand still or go back;
//!     join, abort, preempt, resume, join with a number that was used; kill and revive workers
//! then nothing new happens; in half of the schedules workers never answer again: every stream must finish
//! checked at every command: see `World::obey`
//! ```

use crate::rng::philox4x32;
use crate::scheduler::event::{Command, Entry, Event, Handle, Reason, Row, Source, Verdict};
use crate::scheduler::{Fallback, Rounds, Settings};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What a content was made for.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Content {
    life: u64,
    round: u64,
    /// None: drafted on demand, for whatever came out.
    outcome: Option<(u32, u32)>,
    length: u32,
}

#[derive(Debug)]
struct Stream {
    life: u64,
    limit: u64,
    emitted: u64,
    paused: bool,
    /// The last outcome.
    round: Option<u64>,
    outcome: (u32, Option<u32>),
    /// The token that its prefill will emit.
    first: u32,
    stopped: bool,
}

/// How often the interesting things happened.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen([u64; 8]);

impl Seen {
    pub fn add(&mut self, other: &Seen) {
        for (sum, count) in self.0.iter_mut().zip(other.0) {
            *sum += count;
        }
    }
    pub fn counts(&self) -> [u64; 8] {
        self.0
    }
}

struct World {
    seed: u64,
    draws: u32,
    settings: Settings,
    machine: Rounds,
    now: f64,
    streams: BTreeMap<u32, Stream>,
    /// Rounds that a number has used, whatever its life.
    last_round: HashMap<u32, u64>,
    finished: u64,
    lives: u64,
    reused: u64,
    up: Vec<bool>,
    opened: BTreeSet<(u32, u32)>,
    /// The verification that is out, with its outcomes; prefills that are out, with the lives they are for.
    batch: Option<(u64, Vec<Row>, Vec<(Verdict, u64)>)>,
    prefills: Vec<(u32, u64)>,
    /// Answers of workers that are on their way.
    pending: Vec<Event>,
    contents: HashMap<Handle, Content>,
    told: BTreeSet<Handle>,
    used: BTreeSet<Handle>,
    freed: BTreeSet<Handle>,
    handles: Handle,
    silent: bool,
}

impl World {
    fn below(&mut self, n: u64) -> u64 {
        self.draws += 1;
        let [a, ..] = philox4x32([self.draws, 0, 0, 7], [self.seed as u32, (self.seed >> 32) as u32]);
        (u64::from(a) * n) >> 32
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn new(seed: u64) -> Self {
        let settings = Settings {
            draft_length: 3,
            budget: 8,
            depth: 3,
            fallback: Fallback::Adaptive,
            max_batch: 2,
            patience: None,
            adaptive: true,
            ordered: false,
            guess_first: false,
            together: false,
            workers: 1,
            vocabulary: 4,
            seed,
        };
        let machine = Rounds::new(settings.clone()).unwrap();
        let mut world = Self {
            seed,
            draws: 0,
            settings,
            machine,
            now: 0.0,
            streams: BTreeMap::new(),
            last_round: HashMap::new(),
            finished: 0,
            lives: 0,
            reused: 0,
            up: Vec::new(),
            opened: BTreeSet::new(),
            batch: None,
            prefills: Vec::new(),
            pending: Vec::new(),
            contents: HashMap::new(),
            told: BTreeSet::new(),
            used: BTreeSet::new(),
            freed: BTreeSet::new(),
            handles: 0,
            silent: false,
        };
        let fallbacks = [Fallback::Adaptive, Fallback::Neural, Fallback::Fast];
        world.settings = Settings {
            draft_length: world.below(5) as u32,
            budget: world.below(10) as u32,
            depth: 1 + world.below(4) as u32,
            fallback: fallbacks[world.below(3) as usize],
            max_batch: 1 + world.below(4) as u32,
            patience: [None, Some(0.01), Some(1.0)][world.below(3) as usize],
            adaptive: world.chance(50),
            ordered: world.chance(30),
            guess_first: world.chance(50),
            together: world.chance(30),
            workers: world.below(4) as u32,
            vocabulary: 2 + world.below(4) as u32,
            seed,
        };
        world.up = vec![false; world.settings.workers as usize];
        world.machine = Rounds::new(world.settings.clone()).unwrap();
        world
    }

    fn seconds(&mut self) -> f64 {
        match self.below(10) {
            0 => 0.0,
            1 => 0.3,
            _ => 0.001 * (1 + self.below(20)) as f64,
        }
    }

    fn give(&mut self, event: Event) {
        let seconds = self.seconds();
        self.now += if self.below(12) == 0 { -0.001 } else { seconds };
        let event_text = format!("{event:?}");
        let commands = self.machine.handle(self.now, event).unwrap_or_else(|error| panic!("{event_text}: {error}"));
        for command in commands {
            self.obey(command);
        }
        self.check_alive();
    }

    /// Liveness: whoever is not finished nor paused is waited for with a deadline, or the target is busy.
    fn check_alive(&self) {
        let unfinished = self.streams.values().any(|stream| !stream.paused);
        let busy = self.batch.is_some() || !self.prefills.is_empty();
        assert!(!unfinished || busy || self.machine.next_deadline().is_some(), "nothing goes on, seed {}", self.seed);
        assert_eq!(self.machine.active(), self.streams.len());
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Prefill { stream } => {
                assert!(self.batch.is_none(), "one thing at a time");
                let its = &self.streams[&stream];
                assert!(!its.paused);
                assert!(!self.prefills.iter().any(|(id, _)| *id == stream), "two prefills of one stream");
                self.prefills.push((stream, its.life));
                let first = self.below(u64::from(self.settings.vocabulary)) as u32;
                self.streams.get_mut(&stream).unwrap().first = first;
            }
            Command::Verify { batch, rows } => self.verify(batch, rows),
            Command::Open { worker, stream } => {
                self.check_worker(worker, stream);
                assert!(self.opened.insert((worker, stream)), "opened twice");
                self.pending.push(Event::Opened { worker, stream });
            }
            Command::Forget { worker, stream } => {
                assert!(self.up[worker as usize], "a command to a dead worker");
                assert!(self.opened.remove(&(worker, stream)), "forgets what was never opened");
            }
            Command::Stop { worker, stream, round } => {
                assert!(self.up[worker as usize], "a command to a dead worker");
                if self.chance(50) {
                    self.pending.retain(|event| {
                        !matches!(event, Event::Entries { worker: w, stream: s, round: r, .. }
                            if (*w, *s, *r) == (worker, stream, round))
                    });
                }
            }
            Command::Build { worker, stream, round, source: _, handle: _, fan_out, depth } => {
                self.check_worker(worker, stream);
                self.build(worker, stream, round, &fan_out, depth);
            }
            Command::Draft { worker, stream, round, accepted, token, length } => {
                self.check_worker(worker, stream);
                let its = &self.streams[&stream];
                assert_eq!((its.round, its.outcome), (Some(round), (accepted, token)), "drafts for what came out");
                assert!(length >= 1 && u64::from(length) < its.limit - its.emitted);
                let life = its.life;
                let length = if self.chance(85) { length } else { self.below(u64::from(length) + 1) as u32 };
                let handle = self.make(Content { life, round, outcome: None, length });
                let (held, seconds) = (self.below(u64::from(length) + 1) as u32, self.seconds());
                self.pending.push(Event::Drafted { worker, stream, round, length, handle, seconds, held });
            }
            Command::Outcome { worker, stream, round, accepted, token, handle } => {
                self.check_worker(worker, stream);
                let its = &self.streams[&stream];
                assert_eq!((its.round, its.outcome), (Some(round), (accepted, Some(token))));
                if let Some(handle) = handle {
                    assert_eq!(self.contents[&handle].outcome, Some((accepted, token)));
                }
                if self.chance(70) {
                    let rank = if self.chance(30) { None } else { Some(self.below(5) as u32) };
                    self.pending.push(Event::Rank { worker, stream, round, rank });
                }
            }
            Command::Discard { handles } => {
                for handle in handles {
                    assert!(self.told.contains(&handle), "frees what it was never given");
                    assert!(self.freed.insert(handle), "frees {handle} twice");
                    let out = self.batch.iter().flat_map(|(_, rows, _)| rows).any(|row| row.handle == Some(handle));
                    assert!(!out, "frees what the target reads");
                }
            }
            Command::Finish { stream, reason } => {
                let its = self.streams.remove(&stream).expect("finishes once");
                match reason {
                    Reason::Limit => assert!(its.emitted == its.limit && !its.stopped),
                    Reason::Stopped => assert!(its.stopped),
                    Reason::Aborted => {}
                }
                assert!(its.emitted <= its.limit);
                self.finished += 1;
            }
        }
    }

    fn check_worker(&self, worker: u32, stream: u32) {
        assert!(self.up[worker as usize], "a command to a dead worker");
        assert!(!self.streams[&stream].paused, "a command for a paused stream");
    }

    fn make(&mut self, content: Content) -> Handle {
        self.handles += 1;
        self.contents.insert(self.handles, content);
        self.handles
    }

    fn verify(&mut self, batch: u64, rows: Vec<Row>) {
        assert!(self.batch.is_none() && self.prefills.is_empty(), "one thing at a time");
        assert!((1..=self.settings.max_batch as usize).contains(&rows.len()));
        let mut verdicts = Vec::new();
        for row in &rows {
            let its = &self.streams[&row.stream];
            let (life, remaining) = (its.life, its.limit - its.emitted);
            assert!(!its.paused && !its.stopped);
            assert!(u64::from(row.length) < remaining, "a chain beyond the limit");
            assert!(row.length <= self.settings.draft_length);
            assert!(its.round.is_some_and(|last| row.round > last), "rounds go on");
            assert!(self.last_round.insert(row.stream, row.round).is_none_or(|last| row.round > last), "a round again");
            let model = matches!(row.source, Source::Cached | Source::Drafted);
            assert_eq!(model, row.handle.is_some());
            assert_eq!(row.source == Source::Empty, row.length == 0);
            if let Some(handle) = row.handle {
                let content = self.contents[&handle];
                assert!(self.told.contains(&handle) && !self.freed.contains(&handle), "used after it was freed");
                assert!(self.used.insert(handle), "a content used twice");
                assert_eq!((content.life, Some(content.round)), (life, its.round), "made for another round");
                assert!(row.length <= content.length);
                let (accepted, token) = its.outcome;
                match row.source {
                    Source::Cached => assert_eq!(content.outcome, Some((accepted, token.unwrap())), "a stale entry"),
                    _ => assert!(content.outcome.is_none() || content.outcome == token.map(|token| (accepted, token))),
                }
            }
            let length = if row.source == Source::Fast && self.chance(50) {
                let length = self.below(u64::from(row.length) + 1) as u32;
                let event = Event::Fast { stream: row.stream, round: row.round, length };
                self.pending.push(event);
                0 // in case the report is late
            } else {
                let most = (remaining - 1).min(u64::from(row.length) + 3) as u32;
                if model && most > row.length && self.chance(20) {
                    // Tokens of the driver's own behind the draft's; in case the report is late, none is accepted.
                    self.pending.push(Event::Fast { stream: row.stream, round: row.round, length: most });
                }
                row.length
            };
            let accepted = self.below(u64::from(length) + 1) as u32;
            let token = self.below(u64::from(self.settings.vocabulary)) as u32;
            let finished = self.chance(3);
            let emitted = if finished { 1 + self.below(u64::from(accepted) + 1) as u32 } else { accepted + 1 };
            let fast = self.chance(50).then(|| self.below(80) as f64 / 10.0);
            verdicts.push((Verdict { stream: row.stream, accepted, token, emitted, finished, fast }, life));
        }
        let mut sorted: Vec<u32> = rows.iter().map(|row| row.stream).collect();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), rows.len(), "a stream twice in a batch");
        self.batch = Some((batch, rows, verdicts));
    }

    /// A worker guesses: often the true outcome, in pieces, sometimes twice, sometimes in one content that grows.
    fn build(&mut self, worker: u32, stream: u32, round: u64, fan_out: &[u32], depth: u32) {
        let its = &self.streams[&stream];
        let (life, remaining) = (its.life, its.limit - its.emitted);
        // Builds go with a verification or a prefill.
        let reads = self.prefills.iter().any(|(id, of)| (*id, *of) == (stream, life));
        let (length, truth) = if reads {
            assert!(self.settings.guess_first);
            assert_eq!(self.machine.round_of(stream), Some(round));
            (0, (0, its.first))
        } else {
            let (_, rows, verdicts) = self.batch.as_ref().expect("a verification is out");
            let row = rows.iter().find(|row| row.stream == stream).expect("of a row that is out");
            assert_eq!(row.round, round);
            let truth = verdicts.iter().find(|(verdict, _)| verdict.stream == stream).unwrap().0;
            (row.length, (truth.accepted, truth.token))
        };
        assert_eq!(fan_out.len(), length as usize + 1);
        let branches: u32 = fan_out.iter().sum();
        assert!((1..=self.settings.budget).contains(&branches));
        assert!(depth >= 1 && depth <= self.settings.depth.min(self.settings.draft_length));
        assert!(u64::from(depth) + 2 <= remaining, "drafts beyond the limit");
        let mut keys: Vec<(u32, u32)> = Vec::new();
        for (accepted, &guesses) in fan_out.iter().enumerate() {
            assert!(guesses <= self.settings.vocabulary);
            assert!(guesses == 0 || accepted as u64 + 3 <= remaining, "guesses beyond the limit");
            let start = self.below(u64::from(self.settings.vocabulary)) as u32;
            keys.extend((0..guesses).map(|i| (accepted as u32, (start + i) % self.settings.vocabulary)));
        }
        if self.chance(60) && !keys.contains(&truth) {
            let place = self.below(keys.len() as u64) as usize;
            keys[place] = truth;
        }
        let grows = self.chance(30);
        let mut known: HashMap<(u32, u32), Handle> = HashMap::new();
        for length in 1..=depth {
            let mut entries = Vec::new();
            for &(accepted, token) in &keys {
                let handle = match known.get(&(accepted, token)) {
                    Some(handle) if grows => *handle,
                    _ => self.make(Content { life, round, outcome: Some((accepted, token)), length: depth }),
                };
                known.insert((accepted, token), handle);
                let ended = self.chance(10);
                entries.push(Entry { accepted, token, length, handle, ended });
            }
            self.pending.push(Event::Entries { worker, stream, round, entries });
        }
        let (seconds, steps) = (self.seconds(), self.below(u64::from(depth) + 1) as u32);
        self.pending.push(Event::Built { worker, stream, round, seconds, steps, branches });
    }

    fn deliver(&mut self, event: Event) {
        match &event {
            Event::Entries { entries, .. } => self.told.extend(entries.iter().map(|entry| entry.handle)),
            Event::Drafted { handle, .. } => {
                self.told.insert(*handle);
            }
            _ => {}
        }
        self.give(event);
    }

    /// One answer of a worker, in any order; maybe again later.
    fn answer(&mut self, silent: bool) {
        if self.pending.is_empty() {
            return;
        }
        // Mostly in order; sometimes any.
        let place = if self.chance(60) { 0 } else { self.below(self.pending.len() as u64) as usize };
        let event = self.pending.remove(place);
        if silent {
            return;
        }
        if self.chance(8) {
            self.pending.push(event.clone());
        }
        if self.chance(92) {
            self.deliver(event);
        }
    }

    /// The target is done with what it was given.
    fn target(&mut self) {
        if !self.prefills.is_empty() {
            let place = self.below(self.prefills.len() as u64) as usize;
            let (id, life) = self.prefills.remove(place);
            let finished = self.chance(2);
            // Of a driver that guesses; now and then it keeps the token to itself all the same.
            let says = self.settings.guess_first && self.chance(90);
            let token = self.streams.get(&id).filter(|stream| says && stream.life == life).map(|stream| stream.first);
            if let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.life == life) {
                let next = stream.round.map_or(0, |round| round + 1).max(self.last_round.get(&id).map_or(0, |r| r + 1));
                stream.emitted += 1;
                stream.stopped = finished;
                // The machine numbers prefills itself: the next draft or verification tells; see `sync`.
                stream.round = Some(next);
                stream.outcome = (0, token);
            }
            self.give_prefilled(id, life, finished, token);
        } else if let Some((id, rows, verdicts)) = self.batch.take() {
            let seconds = self.seconds();
            for (verdict, life) in &verdicts {
                let row = rows.iter().find(|row| row.stream == verdict.stream).unwrap();
                if let Some(stream) = self.streams.get_mut(&verdict.stream).filter(|stream| stream.life == *life) {
                    stream.emitted += u64::from(verdict.emitted);
                    stream.stopped = verdict.finished;
                    stream.round = Some(row.round);
                    stream.outcome = (verdict.accepted, Some(verdict.token));
                }
            }
            let event =
                Event::Verified { batch: id, seconds, rows: verdicts.iter().map(|(verdict, _)| *verdict).collect() };
            self.give(event.clone());
            self.check_kept();
            if self.chance(10) {
                self.pending.push(event); // a second copy, some time
            }
        }
    }

    /// Nothing is kept that can be of no use: what is not freed belongs to the round that is out, or to the last outcome.
    fn check_kept(&self) {
        for handle in self.told.difference(&self.freed) {
            let content = self.contents[handle];
            let out = self.batch.iter().flat_map(|(_, rows, _)| rows).find(|row| row.handle == Some(*handle));
            let of = self.streams.iter().find(|(_, stream)| stream.life == content.life);
            let guess =
                of.and_then(|(id, _)| self.machine.round_of(*id)).is_some_and(|round| content.round + 1 >= round);
            assert!(out.is_some() || guess, "{content:?} is kept, seed {}", self.seed);
        }
    }

    fn give_prefilled(&mut self, id: u32, life: u64, finished: bool, token: Option<u32>) {
        // Which number the machine gave this round: that of the stream, which counts on.
        if let (Some(stream), Some(round)) = (self.streams.get_mut(&id), self.machine.round_of(id))
            && stream.life == life
        {
            stream.round = Some(round);
        }
        let fast = self.chance(50).then(|| self.below(80) as f64 / 10.0);
        self.give(Event::Prefilled { stream: id, finished, token, fast });
    }

    fn join(&mut self) {
        let id = self.below(6) as u32;
        if self.streams.contains_key(&id) {
            return self.give(Event::Join { stream: id, limit: 5 }); // ignored
        }
        self.lives += 1;
        self.reused += u64::from(self.last_round.contains_key(&id));
        let limit = 1 + self.below(14);
        let stream = Stream {
            life: self.lives,
            limit,
            emitted: 0,
            paused: false,
            round: None,
            outcome: (0, None),
            first: 0,
            stopped: false,
        };
        self.streams.insert(id, stream);
        self.give(Event::Join { stream: id, limit });
    }

    fn trouble(&mut self) {
        let id = self.below(6) as u32;
        match self.below(6) {
            0 => self.give(Event::Abort { stream: id }),
            1 => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.paused = true;
                }
                self.give(Event::Preempt { stream: id });
            }
            2 | 3 => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.paused = false;
                }
                self.give(Event::Resume { stream: id });
            }
            _ if self.up.is_empty() => self.give(Event::WorkerReady { worker: 3 }),
            4 => {
                let worker = self.below(self.up.len() as u64) as u32;
                self.up[worker as usize] = false;
                self.opened.retain(|(of, _)| *of != worker);
                if self.chance(50) {
                    self.pending.clear();
                }
                self.give(Event::WorkerLost { worker });
            }
            _ => {
                let worker = self.below(self.up.len() as u64) as u32;
                self.up[worker as usize] = true;
                self.give(Event::WorkerReady { worker });
            }
        }
    }

    fn tick(&mut self) {
        if let Some(deadline) = self.machine.next_deadline() {
            self.now = self.now.max(deadline);
        }
        self.give(Event::Tick);
    }
}

/// One schedule; panics where something is wrong.
pub fn explore(seed: u64) -> Seen {
    let mut world = World::new(seed);
    for worker in 0..world.up.len() {
        if world.chance(80) {
            world.up[worker] = true;
            world.give(Event::WorkerReady { worker: worker as u32 });
        }
    }
    world.join();
    let steps = 20 + world.below(60);
    for _ in 0..steps {
        match world.below(100) {
            0..=5 => world.join(),
            6..=9 => world.trouble(),
            10..=12 => world.tick(),
            13..=40 => world.target(),
            _ => world.answer(false),
        }
    }
    // Nothing new. Paused streams go on; workers answer, or are silent for good.
    world.silent = world.chance(50);
    for id in world.streams.keys().copied().collect::<Vec<_>>() {
        world.streams.get_mut(&id).unwrap().paused = false;
        world.give(Event::Resume { stream: id });
    }
    let mut left = 2000;
    while !world.streams.is_empty() {
        left -= 1;
        assert!(left > 0, "streams do not finish, seed {seed}");
        match world.below(3) {
            0 => world.answer(world.silent),
            1 => world.target(),
            _ if world.batch.is_none() && world.prefills.is_empty() => world.tick(),
            _ => {}
        }
    }
    while world.batch.is_some() || !world.prefills.is_empty() {
        world.target();
    }
    while !world.pending.is_empty() {
        world.answer(false);
    }
    assert_eq!(world.machine.held(), 0, "contents are left");
    assert_eq!(world.told, world.freed, "contents that were never given back");
    let stats = world.machine.stats();
    assert_eq!(stats.finished, world.finished);
    let by = |source: Source| stats.by_source[source.index()].0;
    Seen([
        by(Source::Cached),
        by(Source::Fast),
        by(Source::Drafted),
        stats.timeouts,
        stats.lost_workers,
        stats.ignored,
        world.reused,
        stats.short_used,
    ])
}

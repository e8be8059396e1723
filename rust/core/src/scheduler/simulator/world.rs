//! The queue of events in virtual time, the targets, and the driver's side of every command.

use super::devices::{Branch, Device, Job};
use super::process::{Process, TRUE_TOKEN, Truth};
use super::toy::Content;
use super::{Config, Logged, LoggedRow, Outcome};
use crate::error::{Error, Result};
use crate::rng::{Purpose, uniform};
use crate::scheduler::event::{Command, Entry, Event, Handle, Row, Source, Verdict};
use crate::scheduler::{Rounds, Settings};
use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

/// Something that will happen.
#[derive(Debug)]
enum Item {
    /// A machine is told.
    Tell(usize, Event),
    /// A command reaches a device.
    Arrive(usize, Job),
    /// A device is told that a build is of no use; none: that a stream is.
    Cancel(usize, usize, u32, Option<u64>),
    /// A device starts its next step: after all that reaches it at the same moment.
    Begin(usize),
    /// A device finishes a step.
    Step(usize),
}

#[derive(Debug)]
struct Due {
    time: f64,
    order: u64,
    item: Item,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    /// The earliest is the greatest; of equal times the one that was planned first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.time.total_cmp(&self.time).then(other.order.cmp(&self.order))
    }
}

/// A stream as the driver sees it.
#[derive(Debug, Default)]
struct Stream {
    context: Vec<u32>,
    /// The chain in verification, and how that will come out.
    chain: Vec<u32>,
    truth: Option<Truth>,
    /// When its next chain was there.
    ready: f64,
    draws: u64,
}

pub struct World<'a> {
    config: &'a Config,
    now: f64,
    order: u64,
    queue: BinaryHeap<Due>,
    machines: Vec<Rounds>,
    streams: Vec<Vec<Stream>>,
    free: Vec<f64>,
    out: Vec<Option<Logged>>,
    devices: Vec<Device>,
    contents: HashMap<Handle, Content>,
    handles: Handle,
    tokens: u64,
    began: Option<(f64, u64)>,
    log: Vec<Logged>,
    all_hit: (u64, u64),
}

impl<'a> World<'a> {
    pub fn new(config: &'a Config) -> Result<Self> {
        let workers = if config.drafts == 0 { 0 } else { (config.drafts / config.targets).max(1) };
        let mut machines = Vec::new();
        for target in 0..config.targets {
            let seed = config.settings.seed.wrapping_add(u64::from(target) << 32);
            machines.push(Rounds::new(Settings { workers, seed, ..config.settings.clone() })?);
        }
        let streams = || (0..config.streams).map(|_| Stream::default()).collect();
        Ok(Self {
            config,
            now: 0.0,
            order: 0,
            queue: BinaryHeap::new(),
            machines,
            streams: (0..config.targets).map(|_| streams()).collect(),
            free: vec![0.0; config.targets as usize],
            out: vec![None; config.targets as usize],
            devices: vec![Device::default(); config.drafts as usize],
            contents: HashMap::new(),
            handles: 0,
            tokens: 0,
            began: None,
            log: Vec::new(),
            all_hit: (0, 0),
        })
    }

    /// Where a target's worker runs. Targets take turns over the devices; more targets than devices share them.
    fn device(&self, target: usize, worker: u32) -> usize {
        (target + worker as usize * self.config.targets as usize) % self.config.drafts as usize
    }

    fn at(&mut self, time: f64, item: Item) {
        self.order += 1;
        self.queue.push(Due { time, order: self.order, item });
    }

    fn link(&self, tokens: usize) -> f64 {
        self.config.times.link[0] + self.config.times.link[1] * tokens as f64
    }

    fn number(&mut self, target: usize, stream: u32) -> f64 {
        let its = &mut self.streams[target][stream as usize];
        its.draws += 1;
        uniform(self.config.settings.seed, stream + ((target as u32) << 16), its.draws, Purpose::Other)
    }

    pub fn run(mut self, interrupted: impl Fn() -> bool) -> Result<Outcome> {
        for target in 0..self.machines.len() {
            for worker in 0..self.machines[target].settings().workers {
                self.at(0.0, Item::Tell(target, Event::WorkerReady { worker }));
            }
            for stream in 0..self.config.streams {
                self.at(0.0, Item::Tell(target, Event::Join { stream, limit: 1 << 60 }));
            }
        }
        let mut count = 0u64;
        while self.tokens < self.config.tokens {
            count += 1;
            if count.is_multiple_of(1 << 15) && interrupted() {
                return Err(Error::Interrupted);
            }
            let ticks = self.machines.iter().enumerate().filter_map(|(i, m)| m.next_deadline().map(|time| (time, i)));
            let tick = ticks.min_by(|a, b| a.0.total_cmp(&b.0));
            match (self.queue.peek().map(|due| due.time), tick) {
                (Some(time), Some((deadline, target))) if deadline < time => self.tick(deadline, target)?,
                (None, Some((deadline, target))) => self.tick(deadline, target)?,
                (Some(_), _) => {
                    let Some(due) = self.queue.pop() else { break };
                    self.now = self.now.max(due.time);
                    self.happen(due.item)?;
                }
                (None, None) => return Err(Error::Internal("the simulation stands still".into())),
            }
        }
        let (since, before) = self.began.unwrap_or((0.0, 0));
        Ok(Outcome {
            elapsed: self.now - since,
            tokens: self.tokens - before,
            draft_busy: self.devices.iter().map(|device| device.busy).sum(),
            stats: self.machines.iter().map(|machine| machine.stats().clone()).collect(),
            plans: self.machines.iter().map(|machine| (machine.plan().length, machine.plan().budget)).collect(),
            log: self.log,
            all_hit: self.all_hit,
            text: std::mem::take(&mut self.streams[0][0].context),
        })
    }

    fn tick(&mut self, deadline: f64, target: usize) -> Result<()> {
        self.now = self.now.max(deadline);
        self.tell(target, Event::Tick)
    }

    fn happen(&mut self, item: Item) -> Result<()> {
        match item {
            Item::Tell(target, event) => return self.tell(target, event),
            Item::Arrive(device, job) => self.arrive(device, job),
            Item::Cancel(device, target, stream, round) => {
                for job in self.devices[device].cancel(target, stream, round) {
                    self.report_built(&job);
                }
            }
            Item::Begin(device) => self.begin(device),
            Item::Step(device) => self.step(device),
        }
        Ok(())
    }

    fn tell(&mut self, target: usize, event: Event) -> Result<()> {
        let over = match &event {
            Event::Verified { rows, .. } => Some(rows.len() as u64),
            _ => None,
        };
        if over.is_some()
            && let Event::Verified { rows, .. } = &event
        {
            self.settle(target, rows);
        }
        if let Event::Prefilled { .. } = &event {
            self.tokens += 1;
            self.free[target] = self.now;
        }
        if let Event::Drafted { stream, .. } = &event {
            self.streams[target][*stream as usize].ready = self.now;
        }
        let sums = |m: &Rounds| (m.stats().lookups.iter().sum::<u64>(), m.stats().hits.iter().sum::<u64>());
        let before = sums(&self.machines[target]);
        let commands = self.machines[target].handle(self.now, event)?;
        if let Some(rows) = over {
            let after = sums(&self.machines[target]);
            if after.0 - before.0 == rows {
                self.all_hit.1 += 1;
                self.all_hit.0 += u64::from(after.1 - before.1 == rows);
            }
        }
        for command in commands {
            self.obey(target, command);
        }
        Ok(())
    }

    /// A verification is over: the streams grow.
    fn settle(&mut self, target: usize, rows: &[Verdict]) {
        self.free[target] = self.now;
        for verdict in rows {
            let stream = &mut self.streams[target][verdict.stream as usize];
            let kept = &stream.chain[..(verdict.accepted as usize).min(stream.chain.len())];
            if matches!(self.config.process, Process::Toy(_)) {
                stream.context.extend_from_slice(kept);
                stream.context.push(verdict.token);
            }
            stream.ready = self.now;
            self.tokens += u64::from(verdict.emitted);
        }
        if let Some(mut logged) = self.out[target].take() {
            logged.times[2] = self.now;
            self.log.push(logged);
        }
    }

    fn obey(&mut self, target: usize, command: Command) {
        match command {
            Command::Prefill { stream } => {
                if let Process::Toy(toy) = &self.config.process {
                    let token = toy.plain(&[], uniform(self.config.settings.seed, stream, 0, Purpose::Target));
                    self.streams[target][stream as usize].context.push(token);
                }
                let [t0, t1, t2] = self.config.times.target;
                self.at(
                    self.now + t0 + t1 + t2,
                    Item::Tell(target, Event::Prefilled { stream, finished: false, token: None, fast: None }),
                );
            }
            Command::Open { worker, stream } => {
                self.at(self.now + self.link(0), Item::Tell(target, Event::Opened { worker, stream }));
            }
            Command::Verify { batch, rows } => self.verify(target, batch, &rows),
            Command::Build { worker, stream, round, fan_out, depth, .. } => {
                let branches = self.branches(target, stream, &fan_out);
                if branches.is_empty() {
                    return;
                }
                let job = Job {
                    target,
                    worker,
                    stream,
                    round,
                    wanted: false,
                    branches,
                    depth,
                    done: 0,
                    held: 0,
                    glued: self.config.times.glue == 0.0,
                    spent: 0.0,
                };
                self.at(self.now + self.link(0), Item::Arrive(self.device(target, worker), job));
            }
            Command::Draft { worker, stream, round, accepted, token, length } => {
                let context = self.streams[target][stream as usize].context.clone();
                let token = token.unwrap_or(u32::MAX);
                let branches = vec![Branch { accepted, token, context, content: Content::default(), handle: 0 }];
                let job = Job {
                    target,
                    worker,
                    stream,
                    round,
                    wanted: true,
                    branches,
                    depth: length,
                    done: 0,
                    held: 0,
                    glued: true,
                    spent: 0.0,
                };
                self.at(self.now + self.link(0), Item::Arrive(self.device(target, worker), job));
            }
            Command::Outcome { worker, stream, round, .. } => {
                let rank = self.streams[target][stream as usize].truth.as_ref().and_then(|truth| truth.rank);
                // Coins know hits, but no ranks.
                if !matches!(self.config.process, Process::Coins(_)) {
                    let event = Event::Rank { worker, stream, round, rank };
                    self.at(self.now + 2.0 * self.link(0), Item::Tell(target, event));
                }
            }
            Command::Stop { worker, stream, round } => {
                let item = Item::Cancel(self.device(target, worker), target, stream, Some(round));
                self.at(self.now + self.link(0), item);
            }
            Command::Forget { worker, stream } => {
                let item = Item::Cancel(self.device(target, worker), target, stream, None);
                self.at(self.now + self.link(0), item);
            }
            Command::Discard { handles } => {
                for handle in handles {
                    self.contents.remove(&handle);
                }
            }
            Command::Finish { .. } => {}
        }
    }

    fn verify(&mut self, target: usize, batch: u64, rows: &[Row]) {
        if self.began.is_none() {
            self.began = Some((self.now, self.tokens));
        }
        let mut verdicts = Vec::with_capacity(rows.len());
        let (mut tokens, mut logged) = (0, Vec::new());
        for row in rows {
            let fast = matches!(row.source, Source::Fast | Source::Empty);
            let context = std::mem::take(&mut self.streams[target][row.stream as usize].context);
            let content = match (&self.config.process, row.handle) {
                (Process::Toy(toy), None) => toy.fast(&context, row.length),
                (_, Some(handle)) => self.contents.get(&handle).cloned().unwrap_or_default(),
                _ => Content::default(),
            };
            let config = self.config;
            let mut number = || self.number(target, row.stream);
            let truth = config.process.verify(&context, &content, row.length, fast, &mut number);
            let stream = &mut self.streams[target][row.stream as usize];
            stream.context = context;
            stream.chain = content.tokens;
            stream.chain.truncate(row.length as usize);
            tokens += row.length + 1;
            let (accepted, token) = (truth.accepted, truth.token);
            verdicts.push(Verdict {
                stream: row.stream,
                accepted,
                token,
                emitted: accepted + 1,
                finished: false,
                fast: None,
            });
            if self.config.log {
                let counts = [row.length, accepted, accepted + 1];
                let (source, ready) = (row.source.index() as u8, stream.ready);
                logged.push(LoggedRow { stream: row.stream, round: row.round, source, counts, ready });
            }
            stream.truth = Some(truth);
        }
        let [t0, t1, t2] = self.config.times.target;
        let seconds = t0 + t1 * f64::from(tokens) + t2 * rows.len() as f64;
        if self.config.log {
            let times = [self.free[target], self.now, 0.0];
            self.out[target] = Some(Logged { target: target as u32, times, rows: logged });
        }
        self.at(self.now + seconds, Item::Tell(target, Event::Verified { batch, seconds, rows: verdicts }));
    }

    /// What a worker guesses of the round that is being verified.
    fn branches(&self, target: usize, stream: u32, fan_out: &[u32]) -> Vec<Branch> {
        let its = &self.streams[target][stream as usize];
        let last = fan_out.len() - 1;
        let mut branches = Vec::new();
        for (accepted, &count) in fan_out.iter().enumerate() {
            if self.config.whole_only && accepted < last {
                continue;
            }
            let mut context = Vec::new();
            let tokens: Vec<u32> = match &self.config.process {
                Process::Toy(toy) => {
                    context.extend_from_slice(&its.context);
                    context.extend_from_slice(&its.chain[..accepted]);
                    toy.guesses(&context, its.chain.get(accepted).copied(), count)
                }
                _ => {
                    let truth = its.truth.as_ref().filter(|truth| truth.accepted as usize == accepted);
                    let hit = truth.and_then(|truth| truth.rank).is_some_and(|rank| rank < count);
                    let others = TRUE_TOKEN + 1..;
                    if hit {
                        (TRUE_TOKEN..).take(count as usize).collect()
                    } else {
                        others.take(count as usize).collect()
                    }
                }
            };
            for token in tokens {
                let mut context = context.clone();
                context.push(token);
                let accepted = accepted as u32;
                branches.push(Branch { accepted, token, context, content: Content::default(), handle: 0 });
            }
        }
        branches
    }

    /// A command reaches a device. A draft that is wanted takes over what its branch has.
    fn arrive(&mut self, device: usize, mut job: Job) {
        if job.wanted {
            let (accepted, token) = (job.branches[0].accepted, job.branches[0].token);
            for build in self.devices[device].cancel(job.target, job.stream, None) {
                self.report_built(&build);
                let same = |branch: &&Branch| (branch.accepted, branch.token) == (accepted, token);
                if build.round == job.round
                    && let Some(branch) = build.branches.iter().find(same)
                {
                    job.held = build.done.min(job.depth);
                    job.done = job.held;
                    job.branches[0].content = branch.content.clone();
                }
            }
            if job.done >= job.depth {
                return self.report_drafted(job);
            }
        }
        self.devices[device].jobs.push(job);
        self.at(self.now, Item::Begin(device));
    }

    fn begin(&mut self, device: usize) {
        if let Some(seconds) = self.devices[device].start(&self.config.times) {
            self.at(self.now + seconds, Item::Step(device));
        }
    }

    /// A device finished a step: the branches are longer, and their driver is told.
    fn step(&mut self, device: usize) {
        let advanced = self.devices[device].step();
        let mut jobs = std::mem::take(&mut self.devices[device].jobs);
        for place in &advanced {
            self.extend(&mut jobs[*place]);
        }
        let (over, rest) = jobs.into_iter().partition::<Vec<Job>, _>(|job| job.done >= job.depth);
        self.devices[device].jobs = rest;
        for job in over {
            if job.wanted { self.report_drafted(job) } else { self.report_built(&job) }
        }
        self.at(self.now, Item::Begin(device));
    }

    fn extend(&mut self, job: &mut Job) {
        let mut entries = Vec::new();
        let toy = match &self.config.process {
            Process::Toy(toy) => Some(toy),
            _ => None,
        };
        for branch in &mut job.branches {
            if let Some(toy) = toy {
                let number = self.number(job.target, job.stream);
                toy.extend(&branch.context, &mut branch.content, number);
            }
            if job.wanted {
                continue;
            }
            if branch.handle == 0 {
                self.handles += 1;
                branch.handle = self.handles;
            } else if !self.contents.contains_key(&branch.handle) {
                continue; // given back already
            }
            self.contents.insert(branch.handle, branch.content.clone());
            let (accepted, token) = (branch.accepted, branch.token);
            entries.push(Entry { accepted, token, length: job.done, handle: branch.handle, ended: false });
        }
        if !entries.is_empty() {
            let (worker, stream, round) = (job.worker, job.stream, job.round);
            let time = self.now + self.link(entries.len());
            self.at(time, Item::Tell(job.target, Event::Entries { worker, stream, round, entries }));
        }
    }

    fn report_built(&mut self, job: &Job) {
        if job.wanted {
            return;
        }
        let branches = job.branches.len() as u32;
        let (worker, stream, round, seconds, steps) = (job.worker, job.stream, job.round, job.spent, job.done);
        let event = Event::Built { worker, stream, round, seconds, steps, branches };
        self.at(self.now + self.link(0), Item::Tell(job.target, event));
    }

    fn report_drafted(&mut self, mut job: Job) {
        self.handles += 1;
        let content = std::mem::take(&mut job.branches[0].content);
        self.contents.insert(self.handles, content);
        let (worker, stream, round, length, held) = (job.worker, job.stream, job.round, job.depth, job.held);
        let event = Event::Drafted { worker, stream, round, length, handle: self.handles, seconds: job.spent, held };
        self.at(self.now + self.link(length as usize), Item::Tell(job.target, event));
    }
}

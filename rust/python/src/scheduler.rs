//! The scheduler room: events come in as tuples, commands go out as tuples.

use crate::door::{enter, to_python};
use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{PyAny, PyDict, PyList, PyString, PyTuple};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tilewise_core::error::Error;
use tilewise_core::scheduler::choose::critical_batch;
use tilewise_core::scheduler::event::{Command, Entry, Event, Handle, Source, Verdict};
use tilewise_core::scheduler::learn::Class;
use tilewise_core::scheduler::simulator::process::{Coins, Curve, Places, Process, Ranks};
use tilewise_core::scheduler::simulator::toy::Toy;
use tilewise_core::scheduler::simulator::{Config, Times, simulate};
use tilewise_core::scheduler::stats::Cause;
use tilewise_core::scheduler::{Fallback, Rounds as Core, Settings};

/// A tuple with the names of its fields, read one after the other.
struct Fields<'a, 'py> {
    tuple: &'a Bound<'py, PyTuple>,
    form: &'static str,
    next: usize,
}

impl<'a, 'py> Fields<'a, 'py> {
    fn new(tuple: &'a Bound<'py, PyTuple>, form: &'static str, next: usize) -> PyResult<Self> {
        let fields = Self { tuple, form, next };
        if tuple.len() == 1 + form.matches(',').count() { Ok(fields) } else { Err(fields.wrong()) }
    }

    fn wrong(&self) -> PyErr {
        let got = self.tuple.repr().map_or_else(|_| "another tuple".to_string(), |text| text.to_string());
        to_python(self.tuple.py(), &Error::value("event", self.form, got))
    }

    fn item(&mut self) -> PyResult<Bound<'py, PyAny>> {
        let item = self.tuple.get_item(self.next)?;
        self.next += 1;
        Ok(item)
    }

    fn get<T: for<'x> FromPyObject<'x, 'py>>(&mut self) -> PyResult<T> {
        self.item()?.extract::<T>().map_err(|_| self.wrong())
    }

    /// A number, or -1 for none.
    fn option(&mut self) -> PyResult<Option<u32>> {
        match self.get::<i64>()? {
            -1 => Ok(None),
            value => u32::try_from(value).map(Some).map_err(|_| self.wrong()),
        }
    }

    fn list<T>(&mut self, form: &'static str, read: impl Fn(&mut Fields<'_, 'py>) -> PyResult<T>) -> PyResult<Vec<T>> {
        let item = self.item()?;
        let mut all = Vec::new();
        for row in item.try_iter().map_err(|_| self.wrong())? {
            let row = row?.cast_into::<PyTuple>().map_err(|_| self.wrong())?;
            all.push(read(&mut Fields::new(&row, form, 0)?)?);
        }
        Ok(all)
    }
}

const KINDS: &str = "a tuple that starts with 'join', 'abort', 'preempt', 'resume', 'prefilled', 'opened', 'fast', \
                     'verified', 'entries', 'built', 'drafted', 'rank', 'worker_ready', 'worker_lost' or 'tick'";

fn event_of(event: &Bound<'_, PyAny>) -> PyResult<Event> {
    let py = event.py();
    let unknown = || {
        let got = event.repr().map_or_else(|_| "something else".to_string(), |text| text.to_string());
        to_python(py, &Error::value("event", KINDS, got))
    };
    let tuple = event.cast::<PyTuple>().map_err(|_| unknown())?;
    let kind = tuple.get_item(0).map_err(|_| unknown())?;
    let kind = kind.cast::<PyString>().map_err(|_| unknown())?;
    let read = |form| Fields::new(tuple, form, 1);
    Ok(match kind.to_str()? {
        "join" => {
            let mut f = read("('join', stream, limit)")?;
            Event::Join { stream: f.get()?, limit: f.get()? }
        }
        "abort" => Event::Abort { stream: read("('abort', stream)")?.get()? },
        "preempt" => Event::Preempt { stream: read("('preempt', stream)")?.get()? },
        "resume" => Event::Resume { stream: read("('resume', stream)")?.get()? },
        "prefilled" => {
            let mut f = read("('prefilled', stream, finished, token, fast)")?;
            Event::Prefilled { stream: f.get()?, finished: f.get()?, token: f.get()?, fast: f.get()? }
        }
        "opened" => {
            let mut f = read("('opened', worker, stream)")?;
            Event::Opened { worker: f.get()?, stream: f.get()? }
        }
        "fast" => {
            let mut f = read("('fast', stream, round, length)")?;
            Event::Fast { stream: f.get()?, round: f.get()?, length: f.get()? }
        }
        "verified" => {
            let mut f = read("('verified', batch, seconds, rows)")?;
            Event::Verified {
                batch: f.get()?,
                seconds: f.get()?,
                rows: f.list("(stream, accepted, token, emitted, finished, fast)", |f| {
                    Ok(Verdict {
                        stream: f.get()?,
                        accepted: f.get()?,
                        token: f.get()?,
                        emitted: f.get()?,
                        finished: f.get()?,
                        fast: f.get()?,
                    })
                })?,
            }
        }
        "entries" => {
            let mut f = read("('entries', worker, stream, round, entries)")?;
            Event::Entries {
                worker: f.get()?,
                stream: f.get()?,
                round: f.get()?,
                entries: f.list("(accepted, token, length, handle, ended)", |f| {
                    Ok(Entry {
                        accepted: f.get()?,
                        token: f.get()?,
                        length: f.get()?,
                        handle: f.get()?,
                        ended: f.get()?,
                    })
                })?,
            }
        }
        "built" => {
            let mut f = read("('built', worker, stream, round, seconds, steps, branches)")?;
            Event::Built {
                worker: f.get()?,
                stream: f.get()?,
                round: f.get()?,
                seconds: f.get()?,
                steps: f.get()?,
                branches: f.get()?,
            }
        }
        "drafted" => {
            let mut f = read("('drafted', worker, stream, round, length, handle, seconds, held)")?;
            Event::Drafted {
                worker: f.get()?,
                stream: f.get()?,
                round: f.get()?,
                length: f.get()?,
                handle: f.get()?,
                seconds: f.get()?,
                held: f.get()?,
            }
        }
        "rank" => {
            let mut f = read("('rank', worker, stream, round, rank)")?;
            Event::Rank { worker: f.get()?, stream: f.get()?, round: f.get()?, rank: f.option()? }
        }
        "worker_ready" => Event::WorkerReady { worker: read("('worker_ready', worker)")?.get()? },
        "worker_lost" => Event::WorkerLost { worker: read("('worker_lost', worker)")?.get()? },
        "tick" => {
            read("('tick')")?;
            Event::Tick
        }
        _ => return Err(unknown()),
    })
}

fn handle_of(handle: Option<Handle>) -> i64 {
    handle.map_or(-1, |handle| handle as i64)
}

fn command_of<'py>(py: Python<'py>, command: Command) -> PyResult<Bound<'py, PyAny>> {
    match command {
        Command::Prefill { stream } => ("prefill", stream).into_bound_py_any(py),
        Command::Open { worker, stream } => ("open", worker, stream).into_bound_py_any(py),
        Command::Verify { batch, rows } => {
            let rows: Vec<_> = (rows.iter())
                .map(|row| (row.stream, row.round, row.source.name(), handle_of(row.handle), row.length))
                .collect();
            ("verify", batch, rows).into_bound_py_any(py)
        }
        Command::Build { worker, stream, round, source, handle, fan_out, depth } => {
            ("build", worker, stream, round, source.name(), handle_of(handle), fan_out, depth).into_bound_py_any(py)
        }
        Command::Draft { worker, stream, round, accepted, token, length } => {
            let token = token.map_or(-1, i64::from);
            ("draft", worker, stream, round, accepted, token, length).into_bound_py_any(py)
        }
        Command::Outcome { worker, stream, round, accepted, token, handle } => {
            ("outcome", worker, stream, round, accepted, token, handle_of(handle)).into_bound_py_any(py)
        }
        Command::Stop { worker, stream, round } => ("stop", worker, stream, round).into_bound_py_any(py),
        Command::Forget { worker, stream } => ("forget", worker, stream).into_bound_py_any(py),
        Command::Discard { handles } => ("discard", handles).into_bound_py_any(py),
        Command::Finish { stream, reason } => ("finish", stream, reason.name()).into_bound_py_any(py),
    }
}

/// The rounds' state machine.
#[pyclass(frozen, name = "Rounds", module = "tilewise._core")]
struct Rounds(Mutex<Core>);

impl Rounds {
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Rounds {
    #[new]
    #[pyo3(signature = (*, draft_length, budget, depth, fallback, max_batch, patience, adaptive, workers, vocabulary, seed, together=false, ordered=false, guess_first=false))]
    fn new(
        py: Python<'_>,
        draft_length: u32,
        budget: u32,
        depth: Option<u32>,
        fallback: &str,
        max_batch: u32,
        patience: Option<f64>,
        adaptive: bool,
        workers: u32,
        vocabulary: u32,
        seed: u64,
        together: bool,
        ordered: bool,
        guess_first: bool,
    ) -> PyResult<Self> {
        enter(py, || {
            let fallback = Fallback::named(fallback)?;
            let depth = depth.unwrap_or(draft_length);
            let settings = Settings {
                draft_length,
                budget,
                depth,
                fallback,
                max_batch,
                patience,
                adaptive,
                together,
                ordered,
                guess_first,
                workers,
                vocabulary,
                seed,
            };
            Ok(Self(Mutex::new(Core::new(settings)?)))
        })
    }

    /// An event at a time -> commands.
    fn handle<'py>(&self, py: Python<'py>, now: f64, event: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyList>> {
        let event = event_of(event)?;
        let commands = enter(py, || self.lock().handle(now, event))?;
        let out = PyList::empty(py);
        for command in commands {
            out.append(command_of(py, command)?)?;
        }
        Ok(out)
    }

    /// When a tick is due.
    fn next_deadline(&self) -> Option<f64> {
        self.lock().next_deadline()
    }

    /// A machine in the same state that goes its own way.
    fn copy(&self) -> Self {
        Self(Mutex::new(self.lock().clone()))
    }

    /// Counters and estimates.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let core = self.lock();
        let (stats, plan, latency, learner) = (core.stats(), core.plan(), core.latency(), core.learner());
        let out = PyDict::new(py);
        for (name, value) in [
            ("rounds", stats.rounds),
            ("batches", stats.batches),
            ("prefills", stats.prefills),
            ("tokens", stats.tokens),
            ("finished", stats.finished),
            ("drafted", stats.drafted),
            ("accepted", stats.accepted),
            ("short_used", stats.short_used),
            ("short_finished", stats.short_finished),
            ("late_hits", stats.late_hits),
            ("neural", stats.neural),
            ("fast", stats.fast),
            ("timeouts", stats.timeouts),
            ("lost_workers", stats.lost_workers),
            ("builds", stats.builds),
            ("branches", stats.branches),
            ("discarded", stats.discarded),
            ("ignored", stats.ignored),
            ("active", core.active() as u64),
            ("held", core.held() as u64),
            ("workers", core.workers() as u64),
        ] {
            out.set_item(name, value)?;
        }
        let (rounds, tokens, waits) = (PyDict::new(py), PyDict::new(py), PyDict::new(py));
        for source in Source::ALL {
            let (count, emitted) = stats.by_source[source.index()];
            rounds.set_item(source.name(), count)?;
            tokens.set_item(source.name(), emitted)?;
        }
        for cause in Cause::ALL {
            waits.set_item(cause.name(), stats.waits[cause as usize])?;
        }
        let (lookups, hits) = (PyDict::new(py), PyDict::new(py));
        for (place, name) in ["after_hit", "after_miss", "first"].into_iter().enumerate() {
            lookups.set_item(name, stats.lookups[place])?;
            hits.set_item(name, stats.hits[place])?;
        }
        out.set_item("rounds_by_source", rounds)?;
        out.set_item("tokens_by_source", tokens)?;
        out.set_item("lookups", lookups)?;
        out.set_item("hits", hits)?;
        out.set_item("histogram", &stats.histogram)?;
        out.set_item("busy_seconds", stats.busy)?;
        out.set_item("wait_seconds", waits)?;
        let chosen = PyDict::new(py);
        chosen.set_item("draft_length", plan.length)?;
        chosen.set_item("budget", plan.budget)?;
        chosen.set_item("fast_length", plan.fast)?;
        chosen.set_item("tokens_per_second", plan.rate)?;
        chosen.set_item("critical_batch", plan.critical)?;
        out.set_item("plan", chosen)?;
        let worth = core.worth();
        let weighed = PyDict::new(py);
        for (name, value) in
            [("verified", worth.verified), ("drafted", worth.drafted), ("branch", worth.branch), ("hit", worth.hit)]
        {
            weighed.set_item(name, value)?;
        }
        out.set_item("worth", weighed)?;
        let times = PyDict::new(py);
        times.set_item("target", latency.target.is_known().then(|| latency.target.coefficients().to_vec()))?;
        times.set_item("build", latency.builds.is_known().then(|| latency.builds.coefficients().to_vec()))?;
        times.set_item("draft", latency.chains.is_known().then(|| latency.chains.coefficients().to_vec()))?;
        times.set_item("link", (latency.link.seen() > 0).then(|| latency.link.get(0.0)))?;
        times.set_item("stretch", (latency.stretch.seen() > 0).then(|| latency.stretch.get(1.0)))?;
        out.set_item("times", times)?;
        let learnt = PyDict::new(py);
        for (class, name) in [(Class::Model, "model"), (Class::Drafted, "drafted"), (Class::Fast, "fast")] {
            let about = PyDict::new(py);
            about.set_item("acceptance", learner.rates(None, class, core.settings().draft_length))?;
            about.set_item("hit_rate", learner.hit_rate(class))?;
            for (whole, which) in [(false, "rank_curve_refused"), (true, "rank_curve_whole")] {
                let curve = learner.curve(class, whole);
                about.set_item(which, (0..=32).map(|guesses| curve.hit(guesses)).collect::<Vec<f64>>())?;
            }
            learnt.set_item(name, about)?;
        }
        out.set_item("learnt", learnt)?;
        Ok(out)
    }
}

/// The batch size up to which the draft model is the better fallback; times in units of one verification.
#[pyfunction]
fn scheduler_critical_batch(hit: f64, on_hit: f64, neural: f64, fast: f64, time: f64) -> f64 {
    critical_batch(hit, on_hit, neural, fast, time)
}

fn two<T>(py: Python<'_>, name: &str, values: Vec<T>) -> PyResult<[T; 2]> {
    let got = values.len();
    values.try_into().map_err(|_| to_python(py, &Error::value(name, "two: of the model's chains, of fast ones", got)))
}

/// A simulation. `process` is ("coins", [acceptance, fast acceptance], [hit, hit after fast]),
/// ("ranks", [acceptance, fast acceptance], [curve, curve after fast]) with a curve an exponent or a list of hits, or
/// ("toy", seed, vocabulary, sharpness, error, temperature, saguaro, guesses).
#[pyfunction]
#[pyo3(signature = (*, draft_length, budget, depth, fallback, max_batch, adaptive, vocabulary, seed, targets, drafts,
                    streams, tokens, target, draft, glue, link, process, whole_only, together, log))]
fn scheduler_simulate<'py>(
    py: Python<'py>,
    draft_length: u32,
    budget: u32,
    depth: u32,
    fallback: &str,
    max_batch: u32,
    adaptive: bool,
    vocabulary: u32,
    seed: u64,
    targets: u32,
    drafts: u32,
    streams: u32,
    tokens: u64,
    target: [f64; 3],
    draft: [f64; 2],
    glue: f64,
    link: [f64; 2],
    process: &Bound<'py, PyTuple>,
    whole_only: bool,
    together: bool,
    log: bool,
) -> PyResult<Bound<'py, PyDict>> {
    let kind: String = process.get_item(0)?.extract()?;
    let places = |at: usize| -> PyResult<[Places; 2]> {
        let all: Vec<Vec<f64>> = process.get_item(at)?.extract()?;
        two(py, "acceptance", all.into_iter().map(Places).collect())
    };
    let process = match kind.as_str() {
        "coins" => {
            let hit = two(py, "hit", process.get_item(2)?.extract::<Vec<f64>>()?)?;
            Process::Coins(Coins { acceptance: places(1)?, hit })
        }
        "ranks" => {
            let mut curves = Vec::new();
            for curve in process.get_item(2)?.try_iter()? {
                let curve = curve?;
                curves.push(match curve.extract::<f64>() {
                    Ok(exponent) => Curve::Power(exponent),
                    Err(_) => Curve::Measured(curve.extract()?),
                });
            }
            Process::Ranks(Ranks { acceptance: places(1)?, curves: two(py, "rank_curve", curves)? })
        }
        "toy" => {
            let (_, seed, tokens, sharpness, error, temperature, saguaro, guesses): (
                String,
                u64,
                usize,
                f64,
                f64,
                f64,
                f64,
                usize,
            ) = process.extract()?;
            Process::Toy(Toy::random(seed, tokens, sharpness, error, temperature, saguaro, guesses))
        }
        other => return Err(to_python(py, &Error::value("process", "'coins', 'ranks' or 'toy'", other))),
    };
    let toy_acceptance = match &process {
        Process::Toy(toy) => Some(toy.acceptance()),
        _ => None,
    };
    let found = enter(py, || {
        let settings = Settings {
            draft_length,
            budget,
            depth,
            fallback: Fallback::named(fallback)?,
            max_batch,
            patience: None,
            adaptive,
            together,
            ordered: false,
            guess_first: false,
            workers: 0,
            vocabulary,
            seed,
        };
        let times = Times { target, draft, glue, link };
        let config = Config { settings, targets, drafts, streams, tokens, times, process, whole_only, log };
        simulate(&config, || Python::attach(|py| py.check_signals().is_err()))
    })?;
    let out = PyDict::new(py);
    out.set_item("elapsed", found.elapsed)?;
    out.set_item("tokens", found.tokens)?;
    out.set_item("draft_busy", found.draft_busy)?;
    out.set_item("all_hit", found.all_hit)?;
    out.set_item("plans", found.plans)?;
    out.set_item("toy_acceptance", toy_acceptance)?;
    let mut histogram = Vec::new();
    let (mut lookups, mut hits, mut waits, mut sources) = ([0; 3], [0; 3], [0.0; 4], [(0, 0); 4]);
    let mut sums = [0u64; 9];
    for stats in &found.stats {
        if histogram.len() < stats.histogram.len() {
            histogram.resize(stats.histogram.len(), 0);
        }
        for (sum, count) in histogram.iter_mut().zip(&stats.histogram) {
            *sum += count;
        }
        for i in 0..3 {
            lookups[i] += stats.lookups[i];
            hits[i] += stats.hits[i];
        }
        for i in 0..4 {
            waits[i] += stats.waits[i];
            sources[i].0 += stats.by_source[i].0;
            sources[i].1 += stats.by_source[i].1;
        }
        let counts = [
            stats.rounds,
            stats.batches,
            stats.drafted,
            stats.accepted,
            stats.neural,
            stats.fast,
            stats.discarded,
            stats.branches,
            stats.late_hits,
        ];
        for (sum, count) in sums.iter_mut().zip(counts) {
            *sum += count;
        }
    }
    let names = ["rounds", "batches", "drafted", "accepted", "neural", "fast", "discarded", "branches", "late_hits"];
    for (name, value) in names.into_iter().zip(sums) {
        out.set_item(name, value)?;
    }
    out.set_item("histogram", histogram)?;
    out.set_item("lookups", lookups)?;
    out.set_item("hits", hits)?;
    let (wait, rounds, emitted) = (PyDict::new(py), PyDict::new(py), PyDict::new(py));
    for cause in Cause::ALL {
        wait.set_item(cause.name(), waits[cause as usize])?;
    }
    for source in Source::ALL {
        rounds.set_item(source.name(), sources[source.index()].0)?;
        emitted.set_item(source.name(), sources[source.index()].1)?;
    }
    out.set_item("wait", wait)?;
    out.set_item("rounds_by_source", rounds)?;
    out.set_item("tokens_by_source", emitted)?;
    let records = PyList::empty(py);
    for logged in &found.log {
        let rows: Vec<_> = (logged.rows.iter())
            .map(|row| {
                let [length, accepted, emitted] = row.counts;
                let source = Source::ALL[row.source as usize].name();
                (row.stream, row.round, source, length, accepted, emitted, row.ready)
            })
            .collect();
        let [free, began, ended] = logged.times;
        records.append((logged.target, free, began, ended, rows))?;
    }
    out.set_item("log", records)?;
    out.set_item("text", found.text)?;
    Ok(out)
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Rounds>()?;
    module.add_function(wrap_pyfunction!(scheduler_simulate, module)?)?;
    module.add_function(wrap_pyfunction!(scheduler_critical_batch, module)?)
}

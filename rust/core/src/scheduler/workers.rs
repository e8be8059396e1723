//! The draft workers: who is there, who serves whom, who has stopped answering.

use super::event::WorkerId;

/// One draft worker.
#[derive(Debug, Clone, Copy, Default)]
struct Worker {
    ready: bool,
    streams: u32,
    /// Drafts in a row that did not come in time.
    late: u32,
    /// When a worker that is late is tried again.
    probe: f64,
}

/// All workers.
#[derive(Debug, Clone, Default)]
pub struct Workers {
    all: Vec<Worker>,
}

impl Workers {
    /// `count` workers, none of which is there yet.
    pub fn new(count: u32) -> Self {
        Self { all: vec![Worker::default(); count as usize] }
    }

    fn get(&self, id: WorkerId) -> Option<&Worker> {
        self.all.get(id as usize)
    }

    /// Whether the worker is there.
    pub fn is_ready(&self, id: WorkerId) -> bool {
        self.get(id).is_some_and(|worker| worker.ready)
    }

    /// The worker runs; whether that is news.
    pub fn ready(&mut self, id: WorkerId) -> bool {
        match self.all.get_mut(id as usize) {
            Some(worker) if !worker.ready => {
                *worker = Worker { ready: true, ..Worker::default() };
                true
            }
            _ => false,
        }
    }

    /// The worker is gone; whether that is news.
    pub fn lost(&mut self, id: WorkerId) -> bool {
        match self.all.get_mut(id as usize) {
            Some(worker) if worker.ready => {
                *worker = Worker::default();
                true
            }
            _ => false,
        }
    }

    /// Workers that are there.
    pub fn count(&self) -> usize {
        self.all.iter().filter(|worker| worker.ready).count()
    }

    /// The worker for one more stream: of those in time the one with the fewest streams, of equal ones the first.
    pub fn assign(&mut self) -> Option<WorkerId> {
        let ready = self.all.iter().enumerate().filter(|(_, worker)| worker.ready);
        let id = ready.min_by_key(|(_, worker)| (worker.late > 0, worker.streams))?.0;
        self.all[id].streams += 1;
        Some(id as WorkerId)
    }

    /// A stream left the worker.
    pub fn release(&mut self, id: WorkerId) {
        if let Some(worker) = self.all.get_mut(id as usize) {
            worker.streams = worker.streams.saturating_sub(1);
        }
    }

    /// Streams of the worker.
    pub fn streams(&self, id: WorkerId) -> u32 {
        self.get(id).map_or(0, |worker| worker.streams)
    }

    /// It answered something: it is in time again.
    pub fn heard(&mut self, id: WorkerId) {
        if let Some(worker) = self.all.get_mut(id as usize) {
            worker.late = 0;
        }
    }

    /// It did not answer for `patience` seconds. It is left alone for that long, twice that long the next time, ...
    pub fn missed(&mut self, id: WorkerId, now: f64, patience: f64) {
        if let Some(worker) = self.all.get_mut(id as usize) {
            worker.late += 1;
            worker.probe = now + patience * f64::from(1u32 << worker.late.min(6));
        }
    }

    /// Whether it is worth waiting for: there, and in time so far.
    pub fn is_prompt(&self, id: WorkerId) -> bool {
        self.get(id).is_some_and(|worker| worker.ready && worker.late == 0)
    }

    /// Whether to send it work that nobody waits for: a late one is tried now and then.
    pub fn is_worth_trying(&mut self, id: WorkerId, now: f64, patience: f64) -> bool {
        match self.all.get_mut(id as usize) {
            Some(worker) if worker.ready && worker.late == 0 => true,
            Some(worker) if worker.ready && now >= worker.probe => {
                worker.probe = now + patience * f64::from(1u32 << worker.late.min(6));
                true
            }
            _ => false,
        }
    }
}

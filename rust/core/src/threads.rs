//! One rayon pool per process id, and the one parallel loop everything uses.
//!
//! A pool's threads do not survive `fork`: a child that used its parent's pool would wait for ever. So the
//! pool is built lazily, remembered together with the process id, and a child builds its own (the parent's
//! is leaked there: its threads do not exist, joining them would hang).
//!
//! Size: `TILEWISE_NUM_THREADS`, then `OMP_NUM_THREADS`, then the CPUs this process may run on.

use crate::arch::Subnormals;
use crate::error::{Error, Result};
use std::cell::RefCell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

struct Owned {
    pid: u32,
    threads: usize,
    pool: &'static rayon::ThreadPool,
}

/// One pool for each (process, size) that was asked for; there are few.
static POOLS: Mutex<Vec<Owned>> = Mutex::new(Vec::new());
/// 0 = not set by `set_threads`.
static REQUESTED: AtomicUsize = AtomicUsize::new(0);
/// Between two looks at the interrupt check.
const POLL: Duration = Duration::from_millis(50);

type Check = Box<dyn Fn() -> bool>;
thread_local! {
    static INTERRUPT: RefCell<Option<Check>> = const { RefCell::new(None) };
}

fn from_environment() -> usize {
    for name in ["TILEWISE_NUM_THREADS", "OMP_NUM_THREADS"] {
        if let Some(count) = std::env::var(name).ok().and_then(|text| text.trim().parse::<usize>().ok())
            && count > 0
        {
            return count;
        }
    }
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Number of threads that parallel work uses.
pub fn threads() -> usize {
    match REQUESTED.load(Ordering::Relaxed) {
        0 => {
            static CACHED: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
            *CACHED.get_or_init(from_environment)
        }
        count => count,
    }
}

/// Overrides the number of threads for this process; 0 goes back to the environment's.
pub fn set_threads(count: usize) {
    REQUESTED.store(count, Ordering::Relaxed);
}

fn pool(count: usize) -> Result<&'static rayon::ThreadPool> {
    let pid = std::process::id();
    // A fork can happen while another thread holds the lock; the child then finds it locked for ever. `try_lock`
    // with a bounded wait turns that into an error instead of a hang.
    let deadline = Instant::now() + Duration::from_secs(1);
    let mut guard = loop {
        match POOLS.try_lock() {
            Ok(guard) => break guard,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) if Instant::now() > deadline => {
                return Err(Error::Internal("the thread pool's lock was lost in a fork".into()));
            }
            Err(std::sync::TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    };
    if let Some(owned) = guard.iter().find(|owned| owned.pid == pid && owned.threads == count) {
        return Ok(owned.pool);
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(count)
        .thread_name(|index| format!("tilewise-{index}"))
        .build()
        .map_err(|error| Error::Internal(format!("could not start {count} threads: {error}")))?;
    let pool: &'static rayon::ThreadPool = Box::leak(Box::new(pool));
    guard.push(Owned { pid, threads: count, pool });
    Ok(pool)
}

/// Runs `work` while `check` is asked about every 50 ms, on the calling thread, whether to stop.
pub fn with_interrupt<R>(check: Check, work: impl FnOnce() -> R) -> R {
    let before = INTERRUPT.with(|slot| slot.replace(Some(check)));
    struct Restore(Option<Check>);
    impl Drop for Restore {
        fn drop(&mut self) {
            let before = self.0.take();
            INTERRUPT.with(|slot| *slot.borrow_mut() = before);
        }
    }
    let _restore = Restore(before);
    work()
}

/// Calls `body(task, scratch)` for every task in `0..tasks`, on the pool.
///
/// Tasks are taken in ascending order by whichever thread is free, so put the longest first. `scratch` is made
/// once per thread. What a task computes must depend on its number alone: then results do not depend on the
/// number of threads. `serial` asks for the calling thread only (work too small to wake anybody for).
///
/// # Errors
/// [`Error::Interrupted`] if the interrupt check of [`with_interrupt`] asked to stop.
pub fn for_each<S>(
    tasks: usize,
    serial: bool,
    scratch: impl Fn() -> S + Sync,
    body: impl Fn(usize, &mut S) + Sync,
) -> Result<()> {
    let count = threads().min(tasks);
    if count <= 1 || serial {
        let _subnormals = Subnormals::kept();
        let mut local = scratch();
        let mut seen = Instant::now();
        for task in 0..tasks {
            body(task, &mut local);
            if interrupted(&mut seen) {
                return Err(Error::Interrupted);
            }
        }
        return Ok(());
    }
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let run = |poll: bool| {
        let _subnormals = Subnormals::kept();
        let mut local = None;
        let mut seen = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            body(task, local.get_or_insert_with(&scratch));
            if poll && interrupted(&mut seen) {
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    // The calling thread works too, so the pool lends the others. `in_place_scope` propagates panics.
    pool(threads())?.in_place_scope(|scope| {
        for _ in 1..count {
            scope.spawn(|_| run(false));
        }
        run(true);
    });
    if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
}

fn interrupted(seen: &mut Instant) -> bool {
    if seen.elapsed() < POLL {
        return false;
    }
    *seen = Instant::now();
    INTERRUPT.with(|slot| slot.borrow().as_ref().is_some_and(|check| check()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_task_runs_once() {
        let sum = AtomicU64::new(0);
        for_each(
            1000,
            false,
            || (),
            |task, ()| {
                sum.fetch_add(task as u64, Ordering::Relaxed);
            },
        )
        .unwrap();
        assert_eq!(sum.into_inner(), 499_500);
    }

    #[test]
    fn an_interrupt_stops_between_tasks() {
        let done = AtomicU64::new(0);
        let result = with_interrupt(Box::new(|| true), || {
            for_each(
                1000,
                false,
                || (),
                |_, ()| {
                    done.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(5));
                },
            )
        });
        assert_eq!(result, Err(Error::Interrupted));
        assert!(done.into_inner() < 1000);
    }

    #[test]
    fn a_panic_reaches_the_caller() {
        let result = std::panic::catch_unwind(|| for_each(8, false, || (), |task, ()| assert!(task != 5, "task five")));
        assert!(result.is_err());
    }
}

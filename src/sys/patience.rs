//! Work that is waited for so long at most, because the disk below it may hang for ever.
//!
//! It is done by a thread of its own, and left to that when the time is over. Until it returns
//! after all, no other is begun: each would only cost the same time again, and one more thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded, unbounded};
use parking_lot::Mutex;

type Job = Box<dyn FnOnce() + Send>;

const RUNNING: u8 = 0;
const DONE: u8 = 1;
/// Whoever waited has given up.
const LEFT: u8 = 2;

/// What the work on one disk has in common.
pub struct Patience {
    timeout_ms: AtomicU64,
    /// Threads with nothing to do. They end when this is dropped.
    idle: Mutex<Vec<Sender<Job>>>,
    overdue: Arc<AtomicUsize>,
}

impl Patience {
    /// No work is waited for longer than `timeout`.
    pub fn new(timeout: Duration) -> Patience {
        let patience = Patience {
            timeout_ms: AtomicU64::new(0),
            idle: Mutex::default(),
            overdue: Arc::default(),
        };
        patience.set_timeout(timeout);
        patience
    }

    /// Waits so long from now on.
    pub fn set_timeout(&self, timeout: Duration) {
        let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.timeout_ms.store(millis, Ordering::Relaxed);
    }

    /// Whether something that was given up has not returned.
    pub fn is_over(&self) -> bool {
        self.overdue.load(Ordering::Acquire) > 0
    }

    /// Does work and waits for it; `None` if it hangs, or other work does. What comes of it too
    /// late is dropped.
    pub fn call<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.is_over() {
            return None;
        }
        let thread = self.idle.lock().pop().or_else(begin)?;
        let (tell, answer) = bounded(1);
        let (stage, overdue) = (Arc::new(AtomicU8::new(RUNNING)), self.overdue.clone());
        let own = stage.clone();
        let job: Job = Box::new(move || {
            let result = work();
            match own.compare_exchange(RUNNING, DONE, Ordering::AcqRel, Ordering::Acquire) {
                // There is room for it.
                Ok(_) => drop(tell.send(result)),
                Err(_) => drop(overdue.fetch_sub(1, Ordering::AcqRel)),
            }
        });
        thread.send(job).ok()?;
        let timeout = Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed));
        let found = match answer.recv_timeout(timeout) {
            Ok(found) => Some(found),
            // It panicked, and its thread with it.
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) => {
                // Counted first, so that it is never counted off before.
                self.overdue.fetch_add(1, Ordering::AcqRel);
                let left =
                    stage.compare_exchange(RUNNING, LEFT, Ordering::AcqRel, Ordering::Acquire);
                if left.is_ok() {
                    // Its thread ends with it.
                    return None;
                }
                // It came in this instant.
                self.overdue.fetch_sub(1, Ordering::AcqRel);
                answer.recv().ok()
            }
        };
        self.idle.lock().push(thread);
        found
    }
}

/// Does one piece of work on a thread of its own; `None` if it takes longer than `timeout`, or
/// cannot be begun. What comes of it too late is dropped.
pub fn within<T: Send + 'static>(
    timeout: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    each_within(timeout, [work]).pop().flatten()
}

/// Likewise several pieces of work, at one time.
pub fn each_within<T: Send + 'static, W: FnOnce() -> T + Send + 'static>(
    timeout: Duration,
    works: impl IntoIterator<Item = W>,
) -> Vec<Option<T>> {
    let deadline = Instant::now() + timeout;
    let start = |work: W| {
        let (tell, answer) = bounded(1);
        begin()?.send(Box::new(move || drop(tell.send(work())))).ok()?;
        Some(answer)
    };
    let begun: Vec<_> = works.into_iter().map(start).collect();
    begun.into_iter().map(|answer| answer?.recv_deadline(deadline).ok()).collect()
}

/// A new thread, if there can be one.
fn begin() -> Option<Sender<Job>> {
    let (give, jobs) = unbounded::<Job>();
    let run = move || {
        super::affinity::go_anywhere();
        jobs.into_iter().for_each(|job| job());
    };
    let started = std::thread::Builder::new().name("rv-patience".into()).spawn(run);
    started.is_ok().then_some(give)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hangs_is_left_and_nothing_else_is_begun_until_it_returns() {
        let patience = Patience::new(Duration::from_millis(100));
        assert_eq!(patience.call(|| 1), Some(1));
        assert_eq!(patience.call(|| 2), Some(2));
        assert_eq!(patience.idle.lock().len(), 1, "one thread did both");
        let (go_on, resume) = unbounded::<()>();
        assert_eq!(patience.call(move || resume.recv().is_ok()), None);
        assert!(patience.is_over());
        patience.set_timeout(Duration::from_secs(1000));
        assert_eq!(patience.call(|| 3), None, "it is not even begun");
        drop(go_on);
        let until = Instant::now() + Duration::from_secs(20);
        while patience.is_over() {
            assert!(Instant::now() < until, "it has returned");
            std::thread::yield_now();
        }
        assert_eq!(patience.call(|| 4), Some(4));
    }

    #[test]
    fn one_piece_of_work_is_waited_for_so_long() {
        assert_eq!(within(Duration::from_secs(1000), || 1), Some(1));
        let (go_on, resume) = unbounded::<()>();
        assert_eq!(within(Duration::from_millis(50), move || resume.recv().is_ok()), None);
        drop(go_on);
    }

    #[test]
    fn work_that_panics_costs_its_thread_alone() {
        let patience = Patience::new(Duration::from_secs(1000));
        let nothing: Option<()> = patience.call(|| std::panic::resume_unwind(Box::new(())));
        assert_eq!(nothing, None);
        assert_eq!(patience.call(|| 1), Some(1));
    }
}

//! The threads that write the replicas' databases, one for each.
//!
//! A call on a dead disk can hang for ever, so whoever commits waits for so long at most. A
//! database that hangs is left to its thread, and the replica is out; should the call return after
//! all, the thread closes the database and ends.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded, unbounded};
use parking_lot::Mutex;

use crate::sys::device::{Alive, Device, Signs};
use crate::types::{ReplicaId, ReplicaMap};

/// How long a database may take for a commit, unless told otherwise.
pub(super) const TIMEOUT: Duration = Duration::from_secs(30);

type Work = Box<dyn FnOnce() + Send>;

/// All threads, each begun when it is first needed.
pub(super) struct Lanes {
    threads: ReplicaMap<Mutex<Option<Sender<Work>>>>,
    timeout_ms: AtomicU64,
}

/// Work that is under way.
pub(super) struct Turn<T> {
    answer: Receiver<T>,
    /// When it has to have ended, or to show that it goes on.
    deadline: Instant,
    /// A sync takes as long as there is data.
    signs: Signs,
}

impl<T> Turn<T> {
    /// Whether it may take longer, as its deadline has come.
    fn goes_on(&mut self, timeout: Duration) -> bool {
        self.deadline = Instant::now() + timeout;
        self.signs.goes_on()
    }
}

impl Lanes {
    pub(super) fn new() -> Lanes {
        Lanes {
            threads: ReplicaMap::for_all(|_| Mutex::default()),
            timeout_ms: AtomicU64::new(TIMEOUT.as_millis() as u64),
        }
    }

    pub(super) fn set_timeout(&self, timeout: Duration) {
        let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.timeout_ms.store(millis, Ordering::Relaxed);
    }

    /// Hands work over. `device` is the one whose progress counts.
    pub(super) fn begin<T: Send + 'static>(
        &self,
        replica: ReplicaId,
        device: Option<Device>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Turn<T> {
        self.begin_alive(replica, device, |_| work())
    }

    /// Likewise work that can show that it goes on.
    pub(super) fn begin_alive<T: Send + 'static>(
        &self,
        replica: ReplicaId,
        device: Option<Device>,
        work: impl FnOnce(&Alive) -> T + Send + 'static,
    ) -> Turn<T> {
        let (tell, answer) = bounded(1);
        let alive = Alive::default();
        let own = alive.clone();
        let work: Work = Box::new(move || {
            // Nobody listens any more to what came too late: it is dropped here.
            let _ = tell.send(work(&own));
        });
        let mut thread = self.threads[replica].lock();
        if thread.is_none() {
            let (give, works) = unbounded::<Work>();
            let run = move || {
                crate::sys::affinity::go_anywhere();
                works.into_iter().for_each(|work| work());
            };
            // Without a thread the work is dropped, which counts as a failure.
            let started = std::thread::Builder::new().name("rv-catalog".into()).spawn(run);
            *thread = started.is_ok().then_some(give);
        }
        if let Some(give) = &*thread {
            let _ = give.send(work);
        }
        let deadline = Instant::now() + self.timeout();
        Turn { answer, deadline, signs: Signs::new(device, alive) }
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed))
    }

    /// The answer, if the work has ended by now: as [`Lanes::wait`] has it. `None` if it goes on.
    pub(super) fn ended<T>(&self, replica: ReplicaId, turn: &mut Turn<T>) -> Option<Option<T>> {
        match turn.answer.try_recv() {
            Ok(answer) => return Some(Some(answer)),
            Err(TryRecvError::Empty) if Instant::now() < turn.deadline => return None,
            Err(TryRecvError::Empty) if turn.goes_on(self.timeout()) => return None,
            Err(_) => {}
        }
        self.leave(replica);
        Some(None)
    }

    /// Leaves a thread to what it does, for good.
    pub(super) fn leave(&self, replica: ReplicaId) {
        *self.threads[replica].lock() = None;
    }

    /// Waits for work; `None` if it hangs or could not be done at all. Then the next work of this
    /// replica gets a thread of its own.
    pub(super) fn wait<T>(&self, replica: ReplicaId, mut turn: Turn<T>) -> Option<T> {
        loop {
            match turn.answer.recv_deadline(turn.deadline) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Timeout) if turn.goes_on(self.timeout()) => {}
                Err(_) => break,
            }
        }
        self.leave(replica);
        None
    }

    /// Drops on the replica's thread what may hang while it is closed.
    pub(super) fn discard<T: Send + 'static>(&self, replica: ReplicaId, what: T) {
        let _ = self.begin(replica, None, move || drop(what));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_hangs_is_left_and_the_next_has_a_thread_of_its_own() {
        let lanes = Lanes::new();
        lanes.set_timeout(Duration::from_millis(200));
        let id = ReplicaId::all().next().expect("the first");
        let (go_on, resume) = unbounded::<()>();
        let (ended, end) = unbounded::<()>();
        let hung = lanes.begin(id, None, move || {
            let _ = resume.recv();
            ended.send(()).expect("the test listens");
        });
        let waits = lanes.begin(id, None, || 1);
        assert_eq!(lanes.wait(id, hung), None);
        assert_eq!(lanes.wait(id, waits), None, "it is behind the one that hangs");
        let next = lanes.begin(id, None, || 2);
        assert_eq!(lanes.wait(id, next), Some(2));
        let (_kept, never) = unbounded::<()>();
        let mut hung = lanes.begin(id, None, move || _ = never.recv());
        assert!(lanes.ended(id, &mut hung).is_none(), "it has time");
        let is_given_up = || matches!(lanes.ended(id, &mut hung), Some(None));
        assert!(std::iter::repeat_with(is_given_up).any(|is_given_up| is_given_up));
        let mut next = lanes.begin(id, None, || 3);
        let answer =
            std::iter::repeat_with(|| lanes.ended(id, &mut next)).find_map(|answer| answer);
        assert_eq!(answer, Some(Some(3)));
        go_on.send(()).expect("it hangs");
        end.recv_timeout(Duration::from_secs(20)).expect("it goes on in its thread");
    }
}

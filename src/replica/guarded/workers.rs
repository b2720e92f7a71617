//! The threads that make a replica's calls.
//!
//! A caller takes an idle worker, the one that was used last, whose stack and state are still in
//! the processor's caches; where none is idle, a new one begins. So there are as many as there ever
//! were calls at once.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;

use super::checked::Checked;
use super::directly::OwnCalls;
use super::flag::Flag;
use crate::replica::backing::{Backing, CLOSE_TIMEOUT};
use crate::sys::device::Device;
use crate::sys::{self, patience};

/// The most threads of one replica: callers are fewer, unless calls hang.
const WORKERS_MAX: usize = 256;

/// Work; it calls its argument when it is done, before it tells whoever waits.
type Job = Box<dyn FnOnce(&dyn Fn()) + Send>;

/// The workers of one opening of a backing. They end when it is dropped.
pub(super) struct Workers {
    /// Always there but while it is dropped.
    shared: Option<Arc<Shared>>,
    alive: Arc<Alive>,
}

/// What the workers of a backing share with whoever hands them work.
pub(super) struct Shared {
    pub(super) inner: Checked,
    idle: Mutex<Vec<Arc<Worker>>>,
    overdue: AtomicUsize,
    ended: AtomicBool,
    /// Of threads that do without workers.
    pub(super) own_calls: OwnCalls,
}

/// How many threads there are, and the signal that one has ended and holds nothing any more.
#[derive(Default)]
struct Alive {
    count: Mutex<usize>,
    ended: Condvar,
}

/// A thread and what it is to do next.
#[derive(Default)]
struct Worker {
    job: Mutex<Option<Job>>,
    /// It has something to do, or is to look whether it is to end.
    called: Flag,
    thread: OnceLock<Thread>,
}

/// A call that was handed over.
#[must_use]
pub(super) struct Pending<T> {
    call: Arc<Call<T>>,
    shared: Arc<Shared>,
}

struct Call<T> {
    caller: Thread,
    stage: Mutex<Stage<T>>,
    done: Flag,
}

enum Stage<T> {
    Running,
    Done(io::Result<T>),
    /// The caller has given up, or has the answer.
    Left,
}

impl Workers {
    pub(super) fn new(inner: Checked) -> Workers {
        let shared = Shared {
            inner,
            idle: Mutex::default(),
            overdue: AtomicUsize::new(0),
            ended: AtomicBool::new(false),
            own_calls: OwnCalls::default(),
        };
        Workers { shared: Some(Arc::new(shared)), alive: Arc::default() }
    }

    /// The backing, for what is at hand.
    pub(super) fn inner(&self) -> &Checked {
        &self.shared().inner
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        self.shared.as_ref().expect("taken by drop alone")
    }

    pub(super) fn overdue_count(&self) -> usize {
        self.shared().overdue_count()
    }

    /// Hands a call to a worker. What cannot be begun is answered at once.
    pub(super) fn begin<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Backing) -> io::Result<T> + Send + 'static,
    ) -> Pending<T> {
        let pending = Pending { call: Arc::new(Call::new()), shared: self.shared().clone() };
        if self.overdue_count() > 0 {
            pending.call.finish(Err(Errno::TIMEDOUT.into()));
            return pending;
        }
        let (own, shared) = (pending.call.clone(), self.shared().clone());
        let job: Job = Box::new(move |done| {
            let answer = shared.run(call);
            done();
            if !own.finish(answer) {
                shared.returned();
            }
            shared.close_left();
        });
        if let Err(error) = self.give(job) {
            pending.call.finish(Err(error));
        }
        pending
    }

    /// Makes a call at once, by the caller's own thread.
    pub(super) fn make<T>(
        &self,
        op: &'static str,
        call: impl FnOnce(&dyn Backing) -> io::Result<T>,
    ) -> io::Result<T> {
        self.on_record(op, None, |_| {
            let answer = self.shared().run(call);
            self.shared().close_left();
            answer
        })
    }

    /// Does something that may hang in the caller's own thread. It is told how to show that it goes
    /// on; `watched` as in [`OwnCalls::begin`].
    pub(super) fn on_record<T>(
        &self,
        op: &'static str,
        watched: Option<Option<Device>>,
        work: impl FnOnce(&dyn Fn()) -> io::Result<T>,
    ) -> io::Result<T> {
        if self.overdue_count() > 0 {
            return Err(Errno::TIMEDOUT.into());
        }
        let calls = &self.shared().own_calls;
        let number = calls.begin(op, watched);
        // A panic ends the call as well: on record for ever, it would count as hanging.
        let answer = catch_unwind(AssertUnwindSafe(|| work(&|| calls.renew(number))));
        let in_time = calls.end(number);
        if !in_time {
            self.shared().returned();
        }
        let answer = answer.unwrap_or_else(|panic| resume_unwind(panic));
        if in_time { answer } else { Err(Errno::TIMEDOUT.into()) }
    }

    /// Hands work to a worker.
    pub(super) fn give(&self, job: Job) -> io::Result<()> {
        let idle = self.shared().idle.lock().pop();
        let Some(worker) = idle else { return self.start(job) };
        *worker.job.lock() = Some(job);
        worker.call();
        Ok(())
    }

    /// Starts one more worker, with its first job.
    fn start(&self, job: Job) -> io::Result<()> {
        let mut count = self.alive.count.lock();
        if *count >= WORKERS_MAX {
            return Err(Errno::TIMEDOUT.into());
        }
        let worker = Arc::new(Worker { job: Mutex::new(Some(job)), ..Worker::default() });
        let (shared, alive) = (self.shared().clone(), self.alive.clone());
        let run = move || {
            crate::sys::affinity::go_anywhere();
            shared.work(&worker);
            drop((worker, shared));
            *alive.count.lock() -= 1;
            alive.ended.notify_all();
        };
        let started = std::thread::Builder::new().name("rv-replica".into()).spawn(run);
        started.map_err(|_| io::Error::from(Errno::AGAIN))?;
        *count += 1;
        Ok(())
    }
}

impl Drop for Workers {
    /// Returns when the threads are gone and the backing is closed, but for those that hang.
    fn drop(&mut self) {
        let Some(shared) = self.shared.take() else { return };
        shared.ended.store(true, Ordering::SeqCst);
        let idle = std::mem::take(&mut *shared.idle.lock());
        idle.iter().for_each(|worker| worker.call());
        // They only have to wake up.
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        let mut count = self.alive.count.lock();
        while *count > shared.overdue_count() {
            if self.alive.ended.wait_until(&mut count, deadline).timed_out() {
                break;
            }
        }
        drop(count);
        // The last to let go of it closes it.
        patience::within(CLOSE_TIMEOUT, move || drop(shared));
    }
}

impl Shared {
    pub(super) fn overdue_count(&self) -> usize {
        self.overdue.load(Ordering::Acquire)
    }

    /// Counts a call on which somebody has given up.
    pub(super) fn gave_up(&self) {
        self.overdue.fetch_add(1, Ordering::AcqRel);
    }

    /// Such a call has returned.
    pub(super) fn returned(&self) {
        self.overdue.fetch_sub(1, Ordering::AcqRel);
    }

    /// Makes a call, on a worker.
    pub(super) fn run<T>(&self, call: impl FnOnce(&dyn Backing) -> io::Result<T>) -> io::Result<T> {
        let answer = catch_unwind(AssertUnwindSafe(|| {
            // Whose ids the thread had last must not decide whether a write clears a file's setuid
            // bit: the volume does what the caller is due.
            sys::regain_fsetid()?;
            call(&self.inner)
        }));
        // A panic has been logged by its hook.
        answer.unwrap_or_else(|_| Err(Errno::IO.into()))
    }

    /// Closes what was left to be closed, on a worker.
    pub(super) fn close_left(&self) {
        drop(self.inner.keeper.take());
    }

    /// The life of a worker.
    fn work(&self, worker: &Arc<Worker>) {
        let _ = worker.thread.set(std::thread::current());
        loop {
            worker.called.clear();
            let job = worker.job.lock().take();
            match job {
                Some(job) => {
                    // Idle before the caller goes on, whose next call comes at once.
                    job(&|| self.idle.lock().push(worker.clone()));
                }
                None if self.ended.load(Ordering::SeqCst) => return,
                None => _ = worker.called.wait(None),
            }
        }
    }
}

impl Worker {
    /// Has it look for what it is to do.
    fn call(&self) {
        if let Some(thread) = self.thread.get() {
            self.called.set(thread);
        }
    }
}

impl<T> Call<T> {
    fn new() -> Call<T> {
        Call {
            caller: std::thread::current(),
            stage: Mutex::new(Stage::Running),
            done: Flag::default(),
        }
    }

    /// Gives the answer; `false` if nobody waits for it any more.
    fn finish(&self, answer: io::Result<T>) -> bool {
        let mut stage = self.stage.lock();
        if matches!(*stage, Stage::Left) {
            return false;
        }
        *stage = Stage::Done(answer);
        drop(stage);
        self.done.set(&self.caller);
        true
    }
}

impl<T> Pending<T> {
    /// Waits for the answer, `ETIMEDOUT` after so long.
    pub(super) fn wait(self, timeout: Duration) -> io::Result<T> {
        self.wait_while(timeout, 1, || false)
    }

    /// Waits for so long; whether the answer is there.
    pub(super) fn ends_within(&self, time: Duration) -> bool {
        self.call.done.wait(Some(time))
    }

    /// As [`Pending::wait`]; as long as `moving` says so it waits again, `turns` times in all.
    pub(super) fn wait_while(
        self,
        timeout: Duration,
        turns: u32,
        mut moving: impl FnMut() -> bool,
    ) -> io::Result<T> {
        for turn in 1..=turns {
            if self.call.done.wait(Some(timeout)) || turn == turns || !moving() {
                break;
            }
        }
        match std::mem::replace(&mut *self.call.stage.lock(), Stage::Left) {
            Stage::Done(answer) => answer,
            Stage::Running | Stage::Left => {
                self.shared.gave_up();
                Err(Errno::TIMEDOUT.into())
            }
        }
    }
}

//! The queue of changes and the thread that commits them.
//!
//! **Order.** [`Catalog::push`] numbers a group and puts it into the open batch under one lock, and
//! a batch is committed whole, so what a database holds is always a prefix of history.
//!
//! **When.** A batch is committed when somebody waits for it, when it holds [`BATCH_CHANGES`], or
//! [`COMMIT_MS`] after its first change. Commits are not synced, except one that carries a
//! durability barrier: in WAL mode its sync covers all that were before it. If we die, the
//! process's commits stay; if the machine dies, the database falls back to some earlier commit
//! after the last barrier.
//!
//! **Failure.** A replica whose database fails is dropped and remembered. When the last one fails
//! the queue latches: no push and no flush succeeds any more, and what is pending stays readable.
//!
//! Locks: `writers` is taken before `queue`; neither is held while waiting for the other.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rusqlite::Connection;

use super::actor::{self, Actor, Known};
use super::apply::{Committed, apply};
use super::overlay::{Batch, Plan};
use super::schema::{BUSY_MS, NextIds};
use super::{Catalog, Change, Durability, Shared};
use crate::error::{Error, Result};
use crate::types::{Generation, ReplicaId, Timestamp};

/// Changes in one batch: enough to spread a transaction's cost, few enough to commit in about 50
/// ms.
const BATCH_CHANGES: usize = 8192;
/// Changes that may wait in the open batch while another is committed; then pushes block.
const WAITING_CHANGES_MAX: usize = 4 * BATCH_CHANGES;
/// How long a change waits for a commit that nobody asked for, in milliseconds.
const COMMIT_MS: u64 = 250;
/// How long after the last commit the WAL is emptied into the database, in milliseconds.
const IDLE_MS: u64 = 2_000;
/// Changes after which a busy writer copies its WAL into the database: 10 to 30 MiB of it.
const WAL_CHANGES_MAX: usize = 65_536;
/// Batches below this many changes are written to one replica after another: threads would cost
/// more.
const PARALLEL_CHANGES_MIN: usize = 64;
/// Times of generations are kept this exactly, in nanoseconds.
const TICK_NANOS: i64 = 10_000_000;

/// A replica's database, open for writing.
pub(super) struct Writer {
    pub db: Connection,
    /// Whether `synchronous` is FULL at the moment.
    pub full: bool,
    /// Changes since the WAL was last copied into the database.
    pub in_wal: usize,
    /// The WAL holds something.
    pub dirty: bool,
}

/// What waits, and what was done. Protected by [`Shared::queue`].
pub(super) struct Queue {
    pub open: Batch,
    /// The batch that is being written: still part of the overlay.
    pub committing: Option<Arc<Batch>>,
    pub generation: Generation,
    /// States born up to here are fixed.
    pub frozen: Generation,
    pub committed: Generation,
    pub durable: Generation,
    pub sequence: u64,
    pub chain: [u8; 32],
    pub clock: TickClock,
    pub actors: Known,
    /// When the open batch got its first change.
    opened_at: Option<Instant>,
    wanted: bool,
    wanted_durable: bool,
    stop: bool,
    /// Pushes are over: closed, or opened for reading.
    pub closed: Option<&'static str>,
    /// Why nothing can be committed any more.
    pub failed: Option<String>,
}

impl Queue {
    /// The queue after opening: nothing waits. What an earlier mount wrote may not be durable yet.
    pub fn new(generation: Generation, next: NextIds, clock: TickClock) -> Queue {
        Queue {
            open: Batch::new(generation, next),
            committing: None,
            generation,
            frozen: generation,
            committed: generation,
            durable: Generation(0),
            sequence: 0,
            chain: [0; 32],
            clock,
            actors: Known::new(1),
            opened_at: None,
            wanted: false,
            wanted_durable: false,
            stop: false,
            closed: None,
            failed: None,
        }
    }

    fn check(&self) -> Result<()> {
        if let Some(detail) = &self.failed {
            return Err(Error::Damaged {
                what: "the catalog".into(),
                detail: format!("it could not be written on any replica: {detail}"),
                remedy: "Free space or repair the disks, then unmount and mount again",
            });
        }
        Ok(())
    }
}

/// Decides when a generation gets a time of its own. Ticks ascend strictly, whatever the wall clock
/// does.
#[derive(Clone, Copy, Debug)]
pub(super) struct TickClock {
    /// The last tick.
    last: i64,
    /// What the wall clock said then.
    wall: i64,
    /// The past was looked at by time: the next generation must not share the last tick.
    due: bool,
}

impl TickClock {
    /// A clock that goes on after the tick `last`.
    pub fn new(last: i64) -> TickClock {
        TickClock { last, wall: last, due: true }
    }

    /// The time for a generation that begins now, if it gets one.
    fn tick(&mut self, now: i64) -> Option<i64> {
        if !self.due && (now.saturating_sub(self.wall)).abs() < TICK_NANOS {
            return None;
        }
        // Behind the last tick (the clock was set back, or was ahead once): ascend by microseconds
        // until the clock has caught up.
        self.last = now.max(self.last.saturating_add(1000));
        self.wall = now;
        self.due = false;
        Some(self.last)
    }

    /// Gives the next generation a tick of its own.
    pub fn fence(&mut self) {
        self.due = true;
    }

    /// The time of the last tick.
    pub fn last(&self) -> Timestamp {
        Timestamp::from_nanos(self.last)
    }
}

/// The queue with its signals.
pub(super) struct Waiting {
    pub queue: Mutex<Queue>,
    /// The committer has something to do.
    wake: Condvar,
    /// A batch was committed, or nothing will be any more.
    done: Condvar,
}

impl Waiting {
    /// Wraps the queue.
    pub fn new(queue: Queue) -> Waiting {
        Waiting { queue: Mutex::new(queue), wake: Condvar::new(), done: Condvar::new() }
    }
}

impl Catalog {
    /// [`Catalog::push_by`] of what no process asked for.
    pub fn push(&self, changes: Vec<Change>) -> Result<Generation> {
        self.push_by(None, changes)
    }

    /// Appends one group of changes, the work of `by`, to history and gives it the next
    /// generation. Fails once a commit failed on every replica. Blocks while too much is waiting.
    pub fn push_by(&self, by: Option<&Actor>, changes: Vec<Change>) -> Result<Generation> {
        let shared = &*self.shared;
        let now = (shared.now)().as_nanos();
        let mut queue = shared.waiting.queue.lock();
        while queue.open.count >= WAITING_CHANGES_MAX && queue.failed.is_none() {
            shared.waiting.done.wait(&mut queue);
        }
        queue.check()?;
        if let Some(why) = queue.closed {
            return Err(Error::Refused(why.into()));
        }
        let queue = &mut *queue;
        queue.generation.0 += 1;
        let at = queue.generation;
        if let Some(time) = queue.clock.tick(now) {
            queue.open.ticks.push((at, time));
        }
        if changes.iter().any(actor::is_seen) {
            queue.open.acts.note(at, by, &mut queue.actors);
        }
        for change in changes {
            if matches!(change, Change::Pack(_) | Change::Forget(_) | Change::SnapshotRemove(_)) {
                shared.epoch.fetch_add(1, Ordering::Relaxed);
            }
            shared.ids.reach(&change);
            queue.open.apply(change, at, queue.frozen);
        }
        queue.open.last = at;
        if queue.opened_at.is_none() {
            queue.opened_at = Some(Instant::now());
            shared.waiting.wake.notify_one();
        } else if queue.open.count >= BATCH_CHANGES {
            shared.waiting.wake.notify_one();
        }
        Ok(at)
    }

    /// Ends the open burst: no later change is folded into a state that this generation shows.
    pub fn freeze(&self) -> Generation {
        if self.shared.read_only {
            return self.generation();
        }
        let mut queue = self.shared.waiting.queue.lock();
        queue.frozen = queue.generation;
        queue.generation
    }

    /// Commits all that was pushed, and waits.
    pub fn flush(&self, durability: Durability) -> Result<()> {
        if self.shared.read_only {
            return Ok(());
        }
        let waiting = &self.shared.waiting;
        let mut queue = waiting.queue.lock();
        let target = queue.generation;
        loop {
            let reached = match durability {
                Durability::Written => queue.committed,
                Durability::Durable => queue.durable,
            };
            if reached >= target {
                return Ok(());
            }
            queue.check()?;
            if queue.stop {
                return Err(Error::Refused("the catalog is closed".into()));
            }
            match durability {
                Durability::Written => queue.wanted = true,
                Durability::Durable => queue.wanted_durable = true,
            }
            waiting.wake.notify_one();
            waiting.done.wait(&mut queue);
        }
    }

    /// Stops writing to a replica's catalog: the replica is out of the store until it is resynced.
    pub fn detach(&self, replica: ReplicaId) {
        self.shared.detach(replica, None);
        // A commit that is running on it ends first; the committer then drops the connection
        // itself.
        if let Some(mut writers) = self.shared.writers.try_lock() {
            writers[replica] = None;
        }
    }

    /// The replicas whose catalogs failed and are written no more, with the reason.
    pub fn failed_replicas(&self) -> Vec<(ReplicaId, String)> {
        self.shared.failures.lock().clone()
    }
}

impl Shared {
    /// Answers from the overlay, newest batch first.
    pub fn overlay<T>(&self, mut find: impl FnMut(&Batch) -> Option<T>) -> Option<T> {
        let queue = self.waiting.queue.lock();
        find(&queue.open).or_else(|| queue.committing.as_deref().and_then(find))
    }

    /// Tells the committer to commit what waits and to end.
    pub fn stop(&self) {
        self.waiting.queue.lock().stop = true;
        self.waiting.wake.notify_one();
    }

    /// The committer thread.
    pub fn run(&self) {
        while let Some((batch, durable)) = self.next_batch() {
            let outcome = self.commit(&batch, durable);
            let mut queue = self.waiting.queue.lock();
            match outcome {
                Ok(committed) => {
                    queue.committing = None;
                    queue.committed = batch.last;
                    if durable {
                        queue.durable = batch.last;
                    }
                    queue.sequence = committed.sequence;
                    queue.chain = committed.chain;
                }
                Err(detail) => {
                    log::error!("the catalog cannot be written any more: {detail}");
                    queue.failed = Some(detail);
                }
            }
            let failed = queue.failed.is_some();
            drop(queue);
            self.waiting.done.notify_all();
            if failed {
                return;
            }
            self.checkpoint(false);
        }
        self.waiting.done.notify_all();
    }

    /// Waits until there is a batch to commit; `None` when stopped and all is committed.
    fn next_batch(&self) -> Option<(Arc<Batch>, bool)> {
        let mut queue = self.waiting.queue.lock();
        let mut idle = false;
        loop {
            let pending = queue.generation > queue.committed;
            let durable = queue.wanted_durable && queue.durable < queue.generation;
            if durable || (pending && (queue.wanted || queue.stop)) {
                break;
            }
            if queue.stop {
                return None;
            }
            if queue.open.count >= BATCH_CHANGES {
                break;
            }
            // What was wanted has been done meanwhile.
            (queue.wanted, queue.wanted_durable) = (false, false);
            match queue.opened_at {
                Some(since) => {
                    let due = since + Duration::from_millis(COMMIT_MS);
                    if Instant::now() >= due {
                        break;
                    }
                    self.waiting.wake.wait_until(&mut queue, due);
                }
                None if idle => self.waiting.wake.wait(&mut queue),
                None => {
                    let wait = Duration::from_millis(IDLE_MS);
                    if self.waiting.wake.wait_for(&mut queue, wait).timed_out() {
                        idle = true;
                        parking_lot::MutexGuard::unlocked(&mut queue, || self.checkpoint(true));
                    }
                }
            }
        }
        let queue = &mut *queue;
        let durable = std::mem::take(&mut queue.wanted_durable);
        queue.wanted = false;
        queue.opened_at = None;
        let next = self.ids.next();
        let mut batch = std::mem::replace(&mut queue.open, Batch::new(queue.generation, next));
        queue.open.acts = batch.acts.next();
        batch.next = next;
        let batch = Arc::new(batch);
        queue.committing = Some(batch.clone());
        Some((batch, durable))
    }

    /// Writes a batch to all replicas; fails only if none is left.
    fn commit(&self, batch: &Batch, durable: bool) -> Result<Committed, String> {
        let plan = batch.plan();
        let mut writers = self.writers.lock();
        let mut jobs = Vec::new();
        for id in writers.ids() {
            if let Some(writer) = writers[id].take()
                && !self.is_detached(id)
            {
                jobs.push((id, writer));
            }
        }
        let mut committed: Option<Committed> = None;
        let mut last_error = "no replica is attached".to_string();
        for (id, writer, result) in write_all(jobs, &plan, durable) {
            match result {
                Ok(own) if committed.as_ref().is_some_and(|first| *first != own) => {
                    self.detach(id, Some("its hash chain differs from the others'".into()));
                }
                Ok(own) => {
                    committed = Some(own);
                    writers[id] = Some(writer);
                }
                Err(error) => {
                    last_error.clone_from(&error);
                    self.detach(id, Some(error));
                }
            }
        }
        committed.ok_or(last_error)
    }

    /// Moves the WAL into the database: all of it when idle, else when it has grown large. A
    /// failure costs the replica its place, as a failed commit does.
    pub fn checkpoint(&self, idle: bool) {
        let mut writers = self.writers.lock();
        for id in writers.ids() {
            let Some(writer) = &mut writers[id] else { continue };
            let result = match idle {
                true if writer.dirty => checkpoint_one(writer, "PRAGMA wal_checkpoint(TRUNCATE)"),
                false if writer.in_wal >= WAL_CHANGES_MAX => {
                    checkpoint_one(writer, "PRAGMA wal_checkpoint(PASSIVE)")
                }
                _ => Ok(()),
            };
            if let Err(error) = result {
                writers[id] = None;
                self.detach(id, Some(error.to_string()));
            }
        }
    }
}

/// Writes a batch by each writer, at once where that pays.
fn write_all(
    mut jobs: Vec<(ReplicaId, Writer)>,
    plan: &Plan<'_>,
    durable: bool,
) -> Vec<(ReplicaId, Writer, Result<Committed, String>)> {
    let write = |(id, mut writer): (ReplicaId, Writer)| {
        let result = write_one(&mut writer, plan, durable).map_err(|error| error.to_string());
        (id, writer, result)
    };
    if jobs.len() < 2 || !(durable || plan.batch.count >= PARALLEL_CHANGES_MIN) {
        return jobs.into_iter().map(write).collect();
    }
    let others = jobs.split_off(1);
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            others.into_iter().map(|job| scope.spawn(move || write(job))).collect();
        let mut results: Vec<_> = jobs.into_iter().map(write).collect();
        results.extend(
            threads.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }),
        );
        results
    })
}

fn write_one(writer: &mut Writer, plan: &Plan<'_>, durable: bool) -> rusqlite::Result<Committed> {
    if writer.full != durable {
        // Outside of a transaction, else SQLite ignores it.
        let level = if durable { "FULL" } else { "NORMAL" };
        writer.db.execute_batch(&format!("PRAGMA synchronous = {level}"))?;
        writer.full = durable;
    }
    writer.dirty = true;
    writer.in_wal += plan.batch.count + 1;
    apply(&mut writer.db, plan)
}

fn checkpoint_one(writer: &mut Writer, how: &str) -> rusqlite::Result<()> {
    // A reader that is in the way is no error: the row says "busy", and the next time will do. It
    // is not waited for either: commits wait meanwhile.
    writer.db.busy_timeout(Duration::ZERO)?;
    let busy: rusqlite::Result<i64> = writer.db.query_row(how, [], |row| row.get(0));
    writer.db.busy_timeout(Duration::from_millis(BUSY_MS))?;
    let busy = busy?;
    writer.in_wal = 0;
    writer.dirty = writer.dirty && (busy != 0 || how.contains("PASSIVE"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_ascend_through_a_clock_that_is_set_back() {
        let hour = 3_600_000_000_000;
        let mut clock = TickClock::new(0);
        let mut last = 0;
        for now in [hour, hour + TICK_NANOS, 0, TICK_NANOS, 2 * TICK_NANOS, 2 * hour] {
            let tick = clock.tick(now).unwrap();
            assert!(tick > last);
            last = tick;
        }
        assert_eq!(last, 2 * hour);
        assert_eq!(clock.tick(2 * hour + TICK_NANOS - 1), None);
    }
}

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
//! **Failure.** A replica whose database fails, or hangs (`lane`), is dropped and remembered. When
//! the last one fails the queue latches: no push and no flush succeeds any more, and what is
//! pending stays readable.
//!
//! Locks: `writers` is taken before `queue`; neither is held while waiting for the other.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::actor::{self, Actor, Known};
use super::apply::{Committed, apply};
use super::database::Db;
use super::failure::Failure;
use super::overlay::{Batch, Plan};
use super::schema::NextIds;
use super::scratch::Looks;
use super::sums::Sums;
use super::wal::IDLE;
use super::{Catalog, Change, Durability, Shared};
use crate::error::{Error, Result};
use crate::sys::device::Device;
use crate::types::{Generation, ReplicaId, Timestamp};

/// Changes in one batch: enough to spread a transaction's cost, few enough to commit in about 50
/// ms.
const BATCH_CHANGES: usize = 8192;
/// Changes that may wait in the open batch while another is committed; then pushes block.
const WAITING_CHANGES_MAX: usize = 4 * BATCH_CHANGES;
/// How long a change waits for a commit that nobody asked for, in milliseconds.
const COMMIT_MS: u64 = 250;
/// Times of generations are kept this exactly, in nanoseconds.
const TICK_NANOS: i64 = 10_000_000;

/// A replica's database, open for writing.
pub(super) struct Writer {
    // Closed before the sums' own descriptor of it is.
    pub db: Db,
    pub sums: Option<Sums>,
    /// The WAL is being copied beside the commits.
    pub copying: bool,
    /// Whether `synchronous` is FULL at the moment.
    pub full: bool,
    /// Copies beside the commits since the WAL was last whole in the database.
    pub copies: u32,
    /// Pages that the WAL got since it was last copied into the database.
    pub in_wal: usize,
    /// Changes since it was opened.
    pub written: usize,
    /// The WAL holds something.
    pub dirty: bool,
    /// What the WAL takes is wanted: its disk is nearly full.
    pub is_short_of_room: bool,
    /// What it is on.
    pub device: Option<Device>,
}

impl Writer {
    /// Takes a database that was opened for writing.
    pub fn new(db: Db) -> Writer {
        let device = Device::of(db.dir());
        let sums = Sums::of(&db).ok();
        Writer {
            db,
            sums,
            copying: false,
            full: false,
            copies: 0,
            in_wal: 0,
            written: 0,
            dirty: true,
            is_short_of_room: false,
            device,
        }
    }
}

/// What waits, and what was done. Protected by [`Shared::queue`].
pub(super) struct Queue {
    pub open: Batch,
    /// The batch that is being written: still part of the overlay.
    pub committing: Option<Arc<Batch>>,
    pub generation: Generation,
    /// States born up to here are fixed.
    pub frozen: Generation,
    pub looks: Looks,
    pub committed: Generation,
    pub durable: Generation,
    pub sequence: u64,
    /// How many of these batches are durable at least.
    pub durable_sequence: u64,
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
    /// Answers from the overlay, newest batch first.
    pub fn overlay<T>(&self, mut find: impl FnMut(&Batch) -> Option<T>) -> Option<T> {
        find(&self.open).or_else(|| self.committing.as_deref().and_then(find))
    }

    /// The queue after opening: nothing waits. What an earlier mount wrote may not be durable yet.
    pub fn new(generation: Generation, next: NextIds, clock: TickClock) -> Queue {
        Queue {
            open: Batch::new(generation, next),
            committing: None,
            generation,
            frozen: generation,
            looks: Looks::new(generation),
            committed: generation,
            durable: Generation(0),
            sequence: 0,
            durable_sequence: 0,
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
        self.push_groups(by, [changes])
    }

    /// Appends groups of changes, each with a generation of its own, as if at one moment: no query
    /// of the live tree sees what is between them. Returns the last generation.
    pub fn push_groups<const N: usize>(
        &self,
        by: Option<&Actor>,
        groups: [Vec<Change>; N],
    ) -> Result<Generation> {
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
        for (index, changes) in groups.into_iter().enumerate() {
            if index > 0 {
                // Each is to be seen by its time.
                queue.clock.fence();
            }
            shared.append(queue, by, now, changes);
        }
        let at = queue.generation;
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
        self.freeze_and(|_| ())
    }

    /// As [`Catalog::freeze`], and gives the next generation a time of its own.
    pub(super) fn freeze_time(&self) -> Generation {
        self.freeze_and(TickClock::fence)
    }

    fn freeze_and(&self, and: fn(&mut TickClock)) -> Generation {
        if self.shared.read_only {
            return self.generation();
        }
        let mut queue = self.shared.waiting.queue.lock();
        and(&mut queue.clock);
        queue.frozen = queue.generation;
        let newest = queue.generation;
        queue.looks.note(newest);
        newest
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

    /// The last committed generation, and how many batches were committed by this mount and before.
    pub fn committed(&self) -> (Generation, u64) {
        let queue = self.shared.waiting.queue.lock();
        (queue.committed, queue.sequence)
    }

    /// How many batches, of those that [`committed`](Self::committed) counts, are durable at least.
    pub fn durable_sequence(&self) -> u64 {
        self.shared.waiting.queue.lock().durable_sequence
    }

    /// Stops writing to a replica's catalog: the replica is out of the store until it is resynced.
    pub fn detach(&self, replica: ReplicaId) {
        self.shared.detach(replica, None);
        // A commit that is running on it ends first; the committer then drops the connection
        // itself.
        if let Some(mut writers) = self.shared.writers.try_lock()
            && let Some(writer) = writers[replica].take()
        {
            self.shared.lanes.discard(replica, writer);
        }
    }

    /// How long a replica's database may take for a commit, and for what a query reads at once.
    pub fn set_timeout(&self, timeout: Duration) {
        self.shared.lanes.set_timeout(timeout);
        self.shared.copies.lock().set_timeout(timeout);
        self.shared.readers.set_timeout(timeout);
    }

    /// The replicas whose catalogs failed and are written no more, with the reason.
    pub fn failed_replicas(&self) -> Vec<(ReplicaId, Failure)> {
        self.shared.failures.lock().clone()
    }
}

impl Shared {
    fn append(&self, queue: &mut Queue, by: Option<&Actor>, now: i64, changes: Vec<Change>) {
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
                self.epoch.fetch_add(1, Ordering::Relaxed);
            }
            if matches!(change, Change::SnapshotPut(_) | Change::SnapshotRemove(_)) {
                self.snapshot_changes.fetch_add(1, Ordering::Release);
            }
            self.ids.reach(&change);
            queue.open.apply(change, at, queue.frozen);
        }
        queue.open.last = at;
    }

    /// Answers from the overlay, newest batch first.
    pub fn overlay<T>(&self, find: impl FnMut(&Batch) -> Option<T>) -> Option<T> {
        self.waiting.queue.lock().overlay(find)
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
                        queue.durable_sequence = committed.sequence;
                    }
                    queue.sequence = committed.sequence;
                    queue.chain = committed.chain;
                }
                Err(detail) => {
                    log::error!("the catalog cannot be written any more: {detail}");
                    queue.failed = Some(detail.to_string());
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
        let mut idle = Some(IDLE);
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
                None => match idle {
                    Some(wait) if self.waiting.wake.wait_for(&mut queue, wait).timed_out() => {
                        let checkpoint = || self.checkpoint(true);
                        idle = parking_lot::MutexGuard::unlocked(&mut queue, checkpoint);
                    }
                    Some(_) => {}
                    None => self.waiting.wake.wait(&mut queue),
                },
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
    fn commit(&self, batch: &Arc<Batch>, durable: bool) -> Result<Committed, Failure> {
        let mut writers = self.writers.lock();
        let mut turns = Vec::new();
        for id in writers.ids() {
            let Some(mut writer) = writers[id].take() else { continue };
            if self.is_detached(id) {
                self.lanes.discard(id, writer);
                continue;
            }
            let (batch, device) = (batch.clone(), writer.device);
            let work = move || {
                let result = write_one(&mut writer, &batch.plan(), durable);
                (writer, result.map_err(Failure::from))
            };
            turns.push((id, self.lanes.begin(id, device, work)));
        }
        let mut committed: Option<Committed> = None;
        let mut last_error = Failure::Other("no replica is attached".into());
        for (id, turn) in turns {
            let Some((writer, result)) = self.lanes.wait(id, turn) else {
                last_error = Failure::Hangs;
                self.detach(id, Some(last_error.clone()));
                continue;
            };
            let failure = match result {
                Ok(own) if committed.as_ref().is_some_and(|first| *first != own) => {
                    Failure::Other("its hash chain differs from the others'".into())
                }
                // It was taken out while it wrote.
                Ok(own) => {
                    committed = Some(own);
                    match self.is_detached(id) {
                        true => self.lanes.discard(id, writer),
                        false => writers[id] = Some(writer),
                    }
                    continue;
                }
                Err(error) => {
                    last_error.clone_from(&error);
                    error
                }
            };
            self.detach(id, Some(failure));
            self.lanes.discard(id, writer);
        }
        if let Some(committed) = &committed {
            self.keep(committed, batch);
        }
        committed.ok_or(last_error)
    }
}

fn write_one(writer: &mut Writer, plan: &Plan<'_>, durable: bool) -> rusqlite::Result<Committed> {
    if writer.full != durable {
        // Outside of a transaction, else SQLite ignores it.
        let level = if durable { "FULL" } else { "NORMAL" };
        writer.db.execute_batch(&format!("PRAGMA synchronous = {level}"))?;
        writer.full = durable;
    }
    writer.written += plan.batch.count;
    let committed = match apply(&mut writer.db, plan) {
        // A full disk, and nothing of it was done. The WAL is by far the larger part of what is
        // written and holds what earlier commits wrote: its room is that of this one.
        Err(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull) => {
            writer.empty_wal()?;
            apply(&mut writer.db, plan)?
        }
        committed => committed?,
    };
    // After all else: a WAL that was emptied in between holds this commit.
    writer.dirty = true;
    writer.note_pages(plan.batch.count);
    writer.look_for_room();
    Ok(committed)
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

//! Checkpoints: from time to time all that was dirtied becomes durable everywhere and counts no
//! more, so that recovery never has to look at much.
//!
//! Nobody is stopped. What operations dirty while a checkpoint runs counts in the next interval of
//! the intent log; what was dirtied before is first written out while it still counts, so that the
//! final sync of the backings, during which first touches wait, finds little to do.
//!
//! What is not sealed or not recorded yet at a checkpoint counts on in the next interval.
//!
//! Once an operation may have been done in part and differently on the replicas
//! ([`crate::replica::ReplicaSet::is_doubtful`]), all that was dirtied counts on until the next
//! mount has compared it: checkpoints still make durable, and close nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use crate::error::Result;
use crate::replica::intent::{Base, Dirty};
use crate::types::ReplicaId;

use super::Volume;

/// What is known of the last checkpoint.
pub(super) struct Checkpoints {
    /// Held while one runs.
    running: Mutex<()>,
    book: Mutex<Book>,
}

struct Book {
    ended: Instant,
    /// Records of the log when it had ended: what was only carried on.
    carried: u64,
    /// Records of the log at the last look, and since when there are so many.
    seen: (u64, Instant),
    /// An error of the last one, so that it is told once.
    told: Option<String>,
}

impl Checkpoints {
    pub(super) fn new() -> Checkpoints {
        let now = Instant::now();
        let book = Book { ended: now, carried: 0, seen: (0, now), told: None };
        Checkpoints { running: Mutex::new(()), book: Mutex::new(book) }
    }
}

impl Volume {
    /// Makes all that was done before the call durable on every replica in use.
    pub fn checkpoint(&self) -> Result<()> {
        let _running = self.checkpoints.running.lock();
        let intents = &self.store.intents;
        if intents.is_clean() {
            return self.barrier();
        }
        self.sync_replicas()?;
        if self.replicas().is_doubtful() {
            return self.checkpoint_in_doubt();
        }
        let epoch = intents.turn(|| self.catalog().upcoming_node());
        intents.drain(epoch);
        self.carry_on()?;
        // All records before this one have rows that are pushed, and with the commit below they are
        // durable.
        let undo_from = self.history.undo().first_open();
        // The bytes of all contents that this generation shows are written: the sync makes them
        // durable. What is sealed meanwhile is younger.
        let generation = self.catalog().freeze();
        self.sync_replicas()?;
        self.barrier()?;
        // An operation of the epoch that ends, or making it durable, failed everywhere meanwhile.
        if self.replicas().is_doubtful() {
            self.end_checkpoint();
            return Ok(());
        }
        // Not what was committed since the barrier: a replica can lose that.
        let sequence = self.catalog().durable_sequence();
        intents.close(self.replicas(), Base { generation: generation.0, sequence, undo_from })?;
        self.end_checkpoint();
        Ok(())
    }

    /// Makes durable what there is, and closes nothing of the intent log.
    fn checkpoint_in_doubt(&self) -> Result<()> {
        self.barrier()?;
        self.end_checkpoint();
        Ok(())
    }

    fn end_checkpoint(&self) {
        let mut book = self.checkpoints.book.lock();
        book.ended = Instant::now();
        book.carried = self.store.intents.recorded();
        book.told = None;
    }

    /// Waits until no checkpoint runs; none begins before the guard is dropped.
    pub(super) fn hold_checkpoints(&self) -> MutexGuard<'_, ()> {
        self.checkpoints.running.lock()
    }

    /// What is changed and not sealed, or a directory's new times, will be recorded by a later
    /// commit: it counts on.
    fn carry_on(&self) -> Result<()> {
        let unsealed: Vec<Dirty> = self.unsealed.lock().keys().map(|&id| Dirty::File(id)).collect();
        let dirs: Vec<Dirty> = self.stale_dirs.lock().iter().map(|&id| Dirty::Dir(id)).collect();
        if !unsealed.is_empty() || !dirs.is_empty() {
            drop(self.intend_own(&[unsealed, dirs].concat())?);
        }
        Ok(())
    }

    /// Makes the filesystems of all replicas in use durable, all at once.
    fn sync_replicas(&self) -> Result<()> {
        let replicas = self.replicas();
        let begun = (self.nodes.replaced.now(), self.nodes.emptied.now());
        let ids: Vec<ReplicaId> = replicas.online().collect();
        let sync = |id: ReplicaId| {
            crate::sys::affinity::go_anywhere();
            replicas.get(id).backing().sync_all()
        };
        let mut synced: Vec<(ReplicaId, std::io::Result<()>)> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                ids.iter().map(|&id| (id, scope.spawn(move || sync(id)))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(|(id, thread)| (id, join(thread))).collect()
        });
        replicas.apply("syncfs", |id, b| {
            match synced.iter().position(|(synced, _)| *synced == id) {
                Some(at) => synced.swap_remove(at).1,
                None => b.sync_all(),
            }
        })?;
        self.nodes.replaced.settle(begun.0);
        self.nodes.emptied.settle(begun.1);
        Ok(())
    }

    fn checkpoint_if_due(&self) -> Result<()> {
        let intents = &self.store.intents;
        if intents.is_clean() {
            return Ok(());
        }
        let recorded = intents.recorded();
        let activity = intents.activity();
        let due = {
            let mut book = self.checkpoints.book.lock();
            if book.seen.0 != activity {
                book.seen = (activity, Instant::now());
            }
            let idle = book.seen.1.elapsed() >= self.options.checkpoint_idle;
            // In doubt the log stays long: its last record then says that all may be dirty.
            intents.is_long() && !self.replicas().is_doubtful()
                || book.ended.elapsed() >= self.options.checkpoint_every
                || idle && recorded > book.carried
        };
        if due { self.checkpoint() } else { Ok(()) }
    }
}

/// The thread that makes checkpoints when they are due.
pub(super) fn run(volume: &std::sync::Weak<Volume>, stopped: &crossbeam_channel::Receiver<()>) {
    let every = volume
        .upgrade()
        .map_or(Duration::from_secs(1), |volume: Arc<Volume>| volume.options.housekeeping);
    // A disconnect is the signal to stop; nothing is ever sent.
    while let Err(crossbeam_channel::RecvTimeoutError::Timeout) = stopped.recv_timeout(every) {
        let Some(volume) = volume.upgrade() else { return };
        let Err(error) = volume.checkpoint_if_due() else { continue };
        let mut book = volume.checkpoints.book.lock();
        let text = error.to_string();
        if book.told.as_ref() != Some(&text) {
            log::error!("no checkpoint: {text}");
            book.told = Some(text);
        }
    }
}

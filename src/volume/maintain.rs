//! What is done in the background, at idle priority: packing, sweeping, repacking, healing packs.
//!
//! All of it runs under one lock, `maintenance`, which no operation of the live tree takes. So
//! whoever packs or forgets does so alone, and nothing in the foreground waits for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;
use rustix::io::Errno;

use crate::catalog::{Unused, WaitingContent};
use crate::error::{Error, Result};
use crate::history::packer::{Claim, ENDS, Packed, Packer, Step};
use crate::types::{ContentId, Generation, NodeId};

use super::Volume;

/// Bytes of packs that one pass copies at most.
const REPACK_BYTES: u64 = 64 << 20;
/// How long one pass counts what deleting snapshots would free.
const COUNT_TIME: Duration = Duration::from_millis(200);
/// How long one pass takes digests.
const DIGEST_TIME: Duration = Duration::from_millis(500);
/// Likewise, while the mount is in use: idle priority does not keep it off the disks.
const DIGEST_TIME_BUSY: Duration = Duration::from_millis(50);
/// How long a write that finds no room waits for packing to make some, before history yields.
const PACK_TIME_URGENT: Duration = Duration::from_secs(5);
/// How long one pass sweeps.
const SWEEP_TIME: Duration = Duration::from_millis(500);
/// Steps of a sweep between two durable commits, after which files are removed.
const STEPS_MAX: usize = 64;

/// What the background work remembers.
pub(super) struct Maintenance {
    /// When it packed last.
    packed: Instant,
    /// What had been asked of the mount at the end of the last pass.
    activity: u64,
    /// When it applied the store's policy.
    policy: Option<Instant>,
    /// The catalog's epoch when it last looked for undo segments of no use.
    segments: Option<u64>,
    /// An error of the last pass, so that it is told once.
    told: Option<String>,
}

impl Maintenance {
    pub(super) fn new() -> Maintenance {
        Maintenance {
            packed: Instant::now(),
            activity: 0,
            policy: None,
            segments: None,
            told: None,
        }
    }
}

impl Volume {
    /// One pass of the background work: what is due.
    pub(super) fn maintain(&self) {
        // Not under the lock: a snapshot waits for operations, which may wait for the lock.
        match self.snapshot_if_due() {
            Ok(Some(snapshot)) => log::info!("automatic snapshot '{}'", snapshot.name),
            Ok(None) => {}
            Err(error) => log::error!("no automatic snapshot: {error}"),
        }
        let Some(mut state) = self.maintenance.try_lock() else { return };
        // First, and whatever else fails: it needs no room, and may make some.
        let removed = self.remove_segments_if_any(&mut state);
        let outcome = self.maintain_due(&mut state).and(removed);
        match outcome {
            Err(Error::Interrupted) | Ok(()) => state.told = None,
            Err(error) => {
                let text = error.to_string();
                if state.told.as_ref() != Some(&text) {
                    log::error!("work on the history is put off: {text}");
                }
                state.told = Some(text);
            }
        }
    }

    fn maintain_due(&self, state: &mut Maintenance) -> Result<()> {
        if state.policy.is_none_or(|at| at.elapsed() >= self.options.policy_every) {
            state.policy = Some(Instant::now());
            self.apply_policy()?;
        }
        self.sweep(Some(SWEEP_TIME), &|| self.check_stop())?;
        let totals = self.catalog().totals()?;
        let waiting = totals.preserved_bytes + totals.undo_bytes > 0;
        if waiting && state.packed.elapsed() >= self.options.pack_after {
            state.packed = Instant::now();
            self.pack(&|step| self.check_stop_after(step))?;
        }
        self.packer(&|step| self.check_stop_after(step)).repack(REPACK_BYTES)?;
        let busy = self.resyncs.activity() != state.activity;
        let time = if busy { DIGEST_TIME_BUSY } else { DIGEST_TIME };
        self.take_digests(time, &|| self.check_stop())?;
        // So that the list of snapshots finds it counted.
        self.count_freed(COUNT_TIME)?;
        self.history.packs().heal(self.replicas())?;
        // Our own passes count as well, so only what comes between them tells of others.
        state.activity = self.resyncs.activity();
        // Last, for it may find no room.
        self.finish_purges()
    }

    /// Removes undo segments of no use, if any may have become so since the last time.
    fn remove_segments_if_any(&self, state: &mut Maintenance) -> Result<()> {
        let epoch = self.catalog().history_epoch();
        if state.segments != Some(epoch) {
            self.remove_segments()?;
            state.segments = Some(epoch);
        }
        Ok(())
    }

    /// Removes the undo segments in which nothing lies that history needs, the open one as well.
    pub(super) fn remove_segments(&self) -> Result<()> {
        let undo = self.history.undo();
        if let Some(open) = undo.open_segment()
            && !self.catalog().needs_segment(open)?
        {
            // If a row is on its way to the catalog, its segment is not complete until it is there.
            undo.rotate(self.replicas())?;
        }
        self.packer(&|_| Ok(())).unneeded_segments()
    }

    /// Does all the background work there is, now: sweeps every gap, packs everything that waits,
    /// frees packs that nobody uses.
    pub fn tidy_history(&self) -> Result<Packed> {
        let _alone = self.maintenance.lock();
        self.sweep(None, &|| self.check_stop())?;
        let packed = self.pack(&|step| self.check_stop_after(step))?;
        while self.packer(&|step| self.check_stop_after(step)).repack(REPACK_BYTES)? > 0 {}
        self.finish_purges()?;
        Ok(packed)
    }

    /// Applies the store's own policy, then does all the background work there is.
    pub fn prune_by_policy(&self) -> Result<()> {
        {
            let _alone = self.maintenance.lock();
            self.apply_policy()?;
        }
        self.tidy_history().map(|_| ())
    }

    /// Sweeps, and removes undo segments and packs that nobody uses: what frees space and needs
    /// none. `stop` fails when it is to end early.
    pub(super) fn free_unused(&self, stop: &(dyn Fn() -> Result<()> + Sync)) -> Result<()> {
        self.sweep(None, stop)?;
        self.remove_segments()?;
        // To its end, which is near: what was recorded as removed must go.
        self.packer(&|_| Ok(())).repack(0)?;
        Ok(())
    }

    /// Makes a pack smaller that has parts which nobody uses; `false` if there is none, or no room
    /// for its copy.
    pub(super) fn squeeze(&self) -> Result<bool> {
        match self.packer(&|_| Ok(())).squeeze() {
            Err(error) if error.is(Errno::NOSPC) => Ok(false),
            squeezed => Ok(squeezed? > 0),
        }
    }

    /// Packs everything that waits, as far as there is room for packs.
    pub(super) fn pack_where_there_is_room(&self) -> Result<()> {
        match self.pack(&|step| self.check_stop_after(step)) {
            Err(error) if error.is(Errno::NOSPC) => Ok(()),
            packed => packed.map(|_| ()),
        }
    }

    /// Where a write waits for room: packs what waits, in pieces for which there is room, until
    /// `enough` says so, for a limited time. What deleting preserved is not compressed until then.
    pub(super) fn pack_for_room(&self, enough: &dyn Fn() -> bool) -> Result<()> {
        let begin = Instant::now();
        self.forget_scratch(&|_| Ok(()))?;
        let is_over = || enough() || begin.elapsed() >= PACK_TIME_URGENT;
        self.pack_in_pieces(&|_| Ok(()), &is_over)?;
        if is_over() {
            return Ok(());
        }
        self.history.undo().rotate(self.replicas())?;
        match self.packer(&|_| Ok(())).until(&is_over).segments() {
            Err(error) if error.is(Errno::NOSPC) => Ok(()),
            packed => packed.map(|_| ()),
        }
    }

    /// Packs those preserved contents for which there is room, in pieces, until `is_over` says so.
    fn pack_in_pieces(&self, step: Step<'_>, is_over: &dyn Fn() -> bool) -> Result<()> {
        let mut after = ContentId::EMPTY;
        while !is_over() {
            // The copy and the originals both lie there for a moment; what is left is the reserve.
            let space = self.replicas().space()?;
            let piece = space.available.saturating_mul(space.block_bytes) / 2;
            let mut fits = |content: &WaitingContent| match content.size <= piece {
                true => self.claim(content),
                false => Ok(Claim::Wait),
            };
            let mut packer = self.packer(step).in_runs_of(piece.max(1));
            let (last, run) = match packer.contents(after, &mut fits) {
                Err(error) if error.is(Errno::NOSPC) => return Ok(()),
                packed => packed?,
            };
            after = last;
            if run.done {
                break;
            }
        }
        Ok(())
    }

    /// Sweeps, packs everything that waits and copies packs, with a call of `step` after each step
    /// of the latter two.
    #[doc(hidden)]
    pub fn pack_in_steps(&self, step: Step<'_>) -> Result<Packed> {
        let _alone = self.maintenance.lock();
        self.sweep(None, &|| Ok(()))?;
        let packed = self.pack(step)?;
        self.packer(step).repack(REPACK_BYTES)?;
        Ok(packed)
    }

    pub(super) fn packer<'a>(&'a self, step: Step<'a>) -> Packer<'a> {
        Packer::new(&self.history, self.replicas(), self.catalog(), step)
    }

    fn pack(&self, step: Step<'_>) -> Result<Packed> {
        self.forget_scratch(step)?;
        let is_over = || self.check_stop().is_err();
        let mut all = Packed::default();
        let contents = self.pack_contents(step, &is_over, &mut all);
        let full = match contents {
            Err(error) if error.is(Errno::NOSPC) => Some(error),
            packed => packed.map(|()| None)?,
        };
        if full.is_some() {
            // One that does not fit keeps neither the smaller ones waiting nor the segments, which
            // may be large and have little in them.
            self.pack_in_pieces(step, &is_over)?;
            self.check_stop()?;
        }
        if self.history.undo().open_bytes() > 0 {
            self.history.undo().rotate(self.replicas())?;
        }
        // Not the packer of the contents: it may hold chunks for which there was no room.
        let images = self.packer(step).until(&is_over).segments()?;
        self.check_stop()?;
        all.count += images.count;
        all.bytes += images.bytes;
        all.done = true;
        full.map_or(Ok(all), Err)
    }

    /// Packs all preserved contents, and adds to `all` what it did.
    fn pack_contents(
        &self,
        step: Step<'_>,
        is_over: &dyn Fn() -> bool,
        all: &mut Packed,
    ) -> Result<()> {
        let mut packer = self.packer(step).until(is_over);
        let mut after = ContentId::EMPTY;
        loop {
            let (last, run) = packer.contents(after, &mut |content| self.claim(content))?;
            self.check_stop()?;
            all.count += run.count;
            all.bytes += run.bytes;
            after = last;
            if run.done {
                return Ok(());
            }
        }
    }

    /// What is to be done with a preserved content.
    fn claim(&self, content: &WaitingContent) -> Result<Claim> {
        // The preserved file of an orphan that somebody can still reach is the orphan.
        if self.is_open_orphan(content.node) {
            return Ok(Claim::Wait);
        }
        Ok(if self.same_as_live(content)? { Claim::Same } else { Claim::Pack })
    }

    /// Whether a node is nameless and still in use.
    pub(super) fn is_open_orphan(&self, id: NodeId) -> bool {
        let Some(node) = self.nodes.get(id) else { return false };
        let orphan = node.try_lock().is_none_or(|state| state.orphan);
        self.nodes.let_go(node);
        orphan
    }

    /// Sweeps the gaps that retention left, for about as long as `time` allows. What is removed on
    /// the backings is durably forgotten before.
    fn sweep(&self, time: Option<Duration>, stop: &dyn Fn() -> Result<()>) -> Result<()> {
        let begin = Instant::now();
        let deleted_since = self.deleted_since()?;
        let mut steps = 0;
        let mut finished = false;
        while let Some(sweep) = self.catalog().next_sweep()? {
            let step = self.catalog().sweep_on(&sweep, deleted_since)?;
            self.history.note_useless(step.unpreserved);
            finished |= step.done;
            steps += 1;
            if steps % STEPS_MAX == 0 {
                self.remove_useless()?;
            }
            stop()?;
            if time.is_some_and(|time| begin.elapsed() >= time) {
                return self.remove_useless();
            }
        }
        self.remove_useless()?;
        let mut looked = finished.then(Unused::default);
        while let Some(from) = looked {
            looked = self.catalog().forget_unused(from)?;
            stop()?;
        }
        Ok(())
    }

    /// Removes the files of contents that were forgotten, once that is durable.
    pub(super) fn remove_useless(&self) -> Result<()> {
        self.history.remove_useless(self.replicas(), self.catalog(), &|_| Ok(()))
    }

    /// Deletions from this generation on keep their last state.
    pub(super) fn deleted_since(&self) -> Result<Generation> {
        let stored = self.catalog().meta("deleted_since")?;
        Ok(stored.and_then(|text| text.parse().ok()).map_or(Generation(0), Generation))
    }

    /// The lock of the background work, which ends at its next step for it.
    pub(super) fn maintenance_at_once(&self) -> MutexGuard<'_, Maintenance> {
        self.urgent.fetch_add(1, Ordering::Relaxed);
        let alone = self.maintenance.lock();
        self.urgent.fetch_sub(1, Ordering::Relaxed);
        alone
    }

    /// Whether the volume is to be closed.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Background work ends at the next step once the volume is to be closed, or somebody waits for
    /// it: a write for room, a replica for its admission.
    pub(super) fn check_stop(&self) -> Result<()> {
        let urgent = self.urgent.load(Ordering::Relaxed) > 0;
        match urgent || self.is_stopping() {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    /// The same for the packer, which ends only where nothing is half done.
    pub(super) fn check_stop_after(&self, step: &str) -> Result<()> {
        if ENDS.contains(&step) { self.check_stop() } else { Ok(()) }
    }
}

/// The thread of the background work.
pub(super) fn run(volume: &std::sync::Weak<Volume>, stopped: &crossbeam_channel::Receiver<()>) {
    crate::sys::be_idle();
    let every = volume
        .upgrade()
        .map_or(Duration::from_secs(1), |volume: Arc<Volume>| volume.options.housekeeping);
    // A disconnect is the signal to stop; nothing is ever sent.
    while let Err(crossbeam_channel::RecvTimeoutError::Timeout) = stopped.recv_timeout(every) {
        let Some(volume) = volume.upgrade() else { return };
        volume.maintain();
    }
}

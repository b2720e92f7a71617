//! What the operations of the live tree are about to change: see [`crate::replica::intent`].

use std::sync::Arc;

use crate::error::Result;
use crate::replica::Handles;
use crate::replica::intent::{Dirty, DirtySet, Epoch, Intent, MovedDir};
use crate::types::{EntryName, Kind, ReplicaId};

use super::Volume;
use super::nodes::Node;

impl Volume {
    /// To be called at the start of every operation that changes something on the replicas, before
    /// anything is changed on any of them. What comes of it counts in the epoch of the intent until
    /// that is dropped.
    pub(super) fn intend(&self, what: &[Dirty]) -> Result<Intent<'_>> {
        self.replicas().check_writable()?;
        self.intend_own(what)
    }

    /// [`Volume::intend`] of what no program asks for: it finishes what was begun, also when fewer
    /// replicas are in use than a change would need.
    pub(super) fn intend_own(&self, what: &[Dirty]) -> Result<Intent<'_>> {
        self.store.intents.begin(self.replicas(), what)
    }

    /// To be called before a directory gets another name.
    pub(super) fn intend_move(
        &self,
        intent: &Intent<'_>,
        node: &Node,
        (dir, name): (&Arc<Handles>, &EntryName),
    ) -> Result<()> {
        if node.kind != Kind::Dir {
            return Ok(());
        }
        let replicas = self.replicas();
        let stats = replicas.apply("stat", |id, b| b.stat_at(dir.get(id)?, name))?;
        let known: Vec<MovedDir> = stats
            .iter()
            .map(|(id, stat)| MovedDir {
                node: node.id,
                replica: replicas.get(id).short_id(),
                ino: stat.ino,
                birth: stat.btime.as_nanos(),
            })
            .collect();
        intent.moves(node.id, &known)
    }

    /// Opens a new epoch, in which later operations count, and stops nobody. Returns the new one;
    /// the sets from it on are kept until [`Volume::forget_epochs`].
    pub fn open_epoch(&self) -> Epoch {
        self.store.intents.open(|| self.catalog().upcoming_node())
    }

    /// What was dirtied in an epoch so far: all of it once operations before the next epoch have
    /// ended ([`Volume::drain_epochs`]).
    pub fn epoch_set(&self, epoch: Epoch) -> DirtySet {
        self.store.intents.dirty_in(epoch)
    }

    /// What was dirtied in this epoch and later ones so far.
    pub fn dirty_since(&self, epoch: Epoch) -> DirtySet {
        self.store.intents.dirty_since(epoch)
    }

    /// Waits until all operations that began before this epoch have ended. Not to be called with a
    /// lock that an operation takes.
    pub fn drain_epochs(&self, before: Epoch) {
        self.store.intents.drain(before);
    }

    /// Nobody asks any more what was dirtied before this epoch; with `None`, nobody asks at all.
    pub fn forget_epochs(&self, before: Option<Epoch>) {
        self.store.intents.forget_before(before);
    }

    /// Gives a replica that comes into use the intent log that the others have: to be called under
    /// the last cut, before it is admitted.
    pub fn join_log(&self, id: ReplicaId) -> Result<()> {
        let replica = self.replicas().get(id);
        let joined = self.store.intents.join(self.replicas(), id, replica.backing());
        joined.map_err(crate::error::Error::from_io)
    }
}

/// Tells again and again what was dirtied since the last time.
pub(super) struct Tracker<'a> {
    volume: &'a Volume,
    epoch: Epoch,
}

impl Drop for Tracker<'_> {
    fn drop(&mut self) {
        self.volume.forget_epochs(None);
    }
}

impl Volume {
    /// A tracker of what is dirtied from now on: what was dirtied before is done. One at a time.
    pub(super) fn track_dirty(&self) -> Tracker<'_> {
        let epoch = self.open_epoch();
        self.drain_epochs(epoch);
        Tracker { volume: self, epoch }
    }
}

impl Tracker<'_> {
    /// What was dirtied since the last call, by operations that have ended. Not to be called with a
    /// lock that an operation takes, unless none can be running.
    pub fn next(&mut self) -> DirtySet {
        let next = self.volume.open_epoch();
        self.volume.drain_epochs(next);
        let set = self.volume.dirty_since(self.epoch);
        self.volume.forget_epochs(Some(next));
        self.epoch = next;
        set
    }
}

/// What a change of a node's attributes dirties.
pub(super) fn dirty(node: &Node) -> Dirty {
    match node.kind {
        Kind::Dir => Dirty::Dir(node.id),
        _ => Dirty::File(node.id),
    }
}

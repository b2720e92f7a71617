//! What the operations of the live tree are about to change: see [`crate::replica::intent`].

use crate::error::Result;
use crate::replica::intent::{Dirty, DirtySet, Epoch, Intent};
use crate::types::Kind;

use super::Volume;
use super::nodes::Node;

impl Volume {
    /// To be called at the start of every operation that changes something on the replicas, before
    /// anything is changed on any of them. What comes of it counts in the epoch of the intent until
    /// that is dropped.
    pub(super) fn intend(&self, what: &[Dirty]) -> Result<Intent<'_>> {
        Ok(self.intents.begin(what))
    }

    /// Opens a new epoch, in which later operations count, and stops nobody. Returns the new one;
    /// the sets from it on are kept until [`Volume::forget_epochs`].
    pub fn open_epoch(&self) -> Epoch {
        self.intents.open(|| self.catalog().upcoming_node())
    }

    /// What was dirtied in an epoch so far: all of it once operations before the next epoch have
    /// ended ([`Volume::drain_epochs`]).
    pub fn epoch_set(&self, epoch: Epoch) -> DirtySet {
        self.intents.dirty_in(epoch)
    }

    /// What was dirtied in this epoch and later ones so far.
    pub fn dirty_since(&self, epoch: Epoch) -> DirtySet {
        self.intents.dirty_since(epoch)
    }

    /// Waits until all operations that began before this epoch have ended. Not to be called with a
    /// lock that an operation takes.
    pub fn drain_epochs(&self, before: Epoch) {
        self.intents.drain(before);
    }

    /// Nobody asks any more what was dirtied before this epoch.
    pub fn forget_epochs(&self, before: Epoch) {
        self.intents.forget_before(before);
    }
}

/// What a change of a node's attributes dirties.
pub(super) fn dirty(node: &Node) -> Dirty {
    match node.kind {
        Kind::Dir => Dirty::Dir(node.id),
        _ => Dirty::File(node.id),
    }
}

//! The locks of operations.
//!
//! # Lock order
//! 1. `cut`, shared by operations, exclusive while a moment is cut;
//! 2. `dirs`, the stripes of directories whose entries change, in ascending order;
//! 3. the nodes' own, in ascending order of node ids;
//! 4. `tree`, shared while a directory is opened by its path, exclusive while a directory moves;
//! 5. what is deferred of a node, then the list of those of which anything is;
//! 6. the leaf locks: the node table's shards, places, the replicas' and the catalog's own.
//!
//! No lock is held while waiting for a commit, except a node's own in its fsync.

use parking_lot::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

use crate::types::NodeId;

use super::nodes::{Node, State};
use super::{DIR_STRIPES, Volume};

impl Volume {
    /// The very start of an operation that changes something: no moment is cut before the guard is
    /// dropped. Where a resync cannot keep up, it is waited for a moment first.
    pub(super) fn begin_change(&self) -> RwLockReadGuard<'_, ()> {
        self.resyncs.brake.wait();
        self.cut.read()
    }

    /// Likewise of a write. It waits for nobody where the file is not sealed: that one is copied in
    /// every round, whatever is written to it, and who saves a file is to wait once.
    pub(super) fn begin_write(&self, node: &Node) -> RwLockReadGuard<'_, ()> {
        if self.resyncs.brake.is_on() && !self.unsealed.lock().contains_key(&node.id) {
            self.resyncs.brake.wait();
        }
        self.cut.read()
    }

    /// Locks a node for an operation. Its content is what programs have written to it.
    pub(super) fn lock<'a>(&self, node: &'a Node) -> MutexGuard<'a, State> {
        let mut state = node.lock_as_is();
        self.carry_out(node, &mut state);
        state
    }

    /// Stops all operations that change something until the guard is dropped: nothing is deferred
    /// then.
    pub(super) fn stop_changes(&self) -> RwLockWriteGuard<'_, ()> {
        // Most of it while nobody has to wait.
        self.carry_out_all();
        let cut = self.cut.write();
        self.carry_out_all();
        cut
    }

    /// Locks the entries of a directory.
    pub(super) fn lock_dir(&self, dir: NodeId) -> MutexGuard<'_, ()> {
        self.dirs[dir.0 as usize % DIR_STRIPES].lock()
    }

    /// Locks the entries of two directories.
    pub(super) fn lock_dirs(
        &self,
        a: NodeId,
        b: NodeId,
    ) -> (MutexGuard<'_, ()>, Option<MutexGuard<'_, ()>>) {
        let (low, high) = {
            let stripes = (a.0 as usize % DIR_STRIPES, b.0 as usize % DIR_STRIPES);
            (stripes.0.min(stripes.1), stripes.0.max(stripes.1))
        };
        let first = self.dirs[low].lock();
        (first, (low != high).then(|| self.dirs[high].lock()))
    }

    /// Locks one or two nodes in ascending order of their ids.
    pub(super) fn lock_nodes<'a>(
        &self,
        first: &'a Node,
        second: Option<&'a Node>,
    ) -> (MutexGuard<'a, State>, Option<MutexGuard<'a, State>>) {
        match second {
            Some(second) if second.id < first.id => {
                let second = self.lock(second);
                (self.lock(first), Some(second))
            }
            Some(second) => {
                let first = self.lock(first);
                (first, Some(self.lock(second)))
            }
            None => (self.lock(first), None),
        }
    }
}

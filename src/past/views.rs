//! Views: one directory at one generation, with everything below it.
//!
//! A view is a tree of its own in the kernel's eyes: its objects have the inode numbers `slot |
//! node`. The same directory at the same generation, entered by two ways, is two views, so that no
//! directory ever has two paths. Views are rows of a bounded table, never trees in memory.

use rustix::io::Errno;

use crate::catalog::Snapshot;
use crate::error::Result;
use crate::past::ino::{STABLE_SLOTS, Target};
use crate::past::{Entry, Past};
use crate::types::{EntryName, Generation, Kind, NodeId, SnapshotId};

/// One directory at one generation, and how it was entered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct View {
    /// The moment.
    pub generation: Generation,
    /// The topmost directory.
    pub anchor: NodeId,
    /// The live directory whose `.snapshots` was entered.
    pub dir: NodeId,
    /// By which name.
    pub way: Way,
}

/// The name below `.snapshots` by which a view was entered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// `<snapshot>`.
    Snapshot(SnapshotId),
    /// `@GMT-…` of a snapshot.
    Gmt(SnapshotId),
    /// `.at/<time>`.
    At(EntryName),
    /// `.deleted/<name>`.
    Deleted(EntryName),
}

impl Past {
    /// The view in `slot`. `ESTALE` if it is forgotten, its snapshot is deleted, or its instant was
    /// thinned out: what is left of that is no whole tree.
    pub(super) fn view(&self, slot: u64) -> Result<View> {
        if slot < STABLE_SLOTS {
            let id = SnapshotId(slot);
            let snapshot = self.snapshot_by_id(id)?.ok_or(Errno::STALE)?;
            return Ok(View {
                generation: snapshot.generation,
                anchor: NodeId::ROOT,
                dir: NodeId::ROOT,
                way: Way::Snapshot(id),
            });
        }
        let view = self.tables.lock().views.get(slot - STABLE_SLOTS).ok_or(Errno::STALE)?;
        if let Way::Snapshot(id) | Way::Gmt(id) = view.way
            && self.snapshot_by_id(id)?.is_none()
        {
            return Err(Errno::STALE.into());
        }
        if let Way::At(_) = view.way
            && !self.catalog().is_visible(view.generation)?
        {
            return Err(Errno::STALE.into());
        }
        Ok(view)
    }

    /// The slot of a view, a new one if it has none.
    pub(super) fn slot(&self, view: &View) -> u64 {
        match stable_slot(view) {
            Some(slot) => slot,
            None => STABLE_SLOTS + self.tables.lock().views.id(view),
        }
    }

    /// The inode number of a view's topmost directory, if it was entered before.
    pub(super) fn known_view_ino(&self, view: &View) -> Option<u64> {
        let slot = match stable_slot(view) {
            Some(slot) => slot,
            None => STABLE_SLOTS + self.tables.lock().views.known_id(view)?,
        };
        Some(Target::Object { slot, node: view.anchor }.encode())
    }

    /// Enters a view: its topmost directory. `ENOENT` if that did not live then.
    pub(super) fn enter_view(&self, view: View) -> Result<Entry> {
        let row = self.catalog().node_at(view.generation, view.anchor)?.ok_or(Errno::NOENT)?;
        if row.kind != Kind::Dir {
            return Err(Errno::NOENT.into());
        }
        let ino = Target::Object { slot: self.slot(&view), node: row.id }.encode();
        // What a name means can change (a snapshot deleted, `.at/10m` moving on). The kernel is
        // told of snapshots that lose their names in the root.
        let lasting = stable_slot(&view).is_some();
        Ok(self.known_entry(ino, row, 1, lasting))
    }

    /// The snapshot of this id, remembered as of the epoch at which it was asked for.
    pub(super) fn snapshot_by_id(&self, id: SnapshotId) -> Result<Option<Snapshot>> {
        let epoch = self.catalog().snapshot_epoch();
        if let Some((at, snapshot)) = self.tables.lock().snapshots.get(&id)
            && *at == epoch
        {
            return Ok(Some(snapshot.clone()));
        }
        let found = self.catalog().snapshot_of(id)?;
        match &found {
            Some(snapshot) => self.remember(epoch, snapshot),
            None => drop(self.tables.lock().snapshots.pop(&id)),
        }
        Ok(found)
    }

    /// Keeps a snapshot at hand that was asked for after the epoch was.
    pub(super) fn remember(&self, epoch: u64, snapshot: &Snapshot) {
        self.tables.lock().snapshots.put(snapshot.id, (epoch, snapshot.clone()));
    }
}

/// Snapshots entered from the root have their id as slot, in every mount the same.
fn stable_slot(view: &View) -> Option<u64> {
    match view.way {
        Way::Snapshot(id) if view.dir == NodeId::ROOT && id.0 < STABLE_SLOTS => Some(id.0),
        _ => None,
    }
}

//! Sealing: the moment at which a file's present state becomes a version.

use std::sync::{Arc, OnceLock};

use crate::catalog::{Change, NodeRow};
use crate::error::Result;
use crate::history::ranges::ByteRange;
use crate::replica::Handles;
use crate::replica::backing::{SetTime, Stat};
use crate::replica::intent::Dirty;
use crate::store::row_of;
use crate::types::{ContentId, Generation, Kind, NodeId, XattrSetId, Xattrs};

use super::nodes::{Changer, Node, Open, State};
use super::{Caller, Volume};

impl Volume {
    /// Records the present state of a file if it changed since the last seal, and makes its times
    /// equal on all replicas. From here on its bytes are preserved before they change.
    ///
    /// If we die before the push is committed, the live files hold the new state and the catalog
    /// the old one, whose overwritten bytes are in the undo log: recovery seals again.
    pub(super) fn seal(&self, node: &Arc<Node>, state: &mut State) -> Result<()> {
        let Some(open) = state.open.as_mut() else { return Ok(()) };
        if !open.dirty {
            return Ok(());
        }
        if state.orphan {
            // No name shows it: there is no version to make. That it was written to stays known: a
            // replica that was away then has an older file (`open_orphan`).
            open.dirty = false;
            self.unsealed.lock().remove(&node.id);
            return Ok(());
        }
        let Some(handles) = open.write.clone() else { return Ok(()) };
        let (stat, xattrs) = self.level_times("seal", &handles)?;
        let mut row = row_of(node.id, &stat, xattrs, ContentId::EMPTY);
        let mut changes = Vec::with_capacity(2);
        row.btime = open.sealed.btime;
        let standing = self.standing(node, stat.nlink)?;
        let (known, written) = (open.sealed.content, open.written);
        if written && !standing.versioned && known != ContentId::EMPTY {
            // The last version that history shows must not rely on the file any more.
            let whole = ByteRange { start: 0, end: open.sealed.size };
            self.preserve(node, state, &[whole])?;
        }
        let known = if written { ContentId::EMPTY } else { known };
        row.content = self.content_shown(standing.versioned, &row, known, &mut changes);
        self.put(&standing, row.clone(), &mut changes)?;
        let by = state.open.as_ref().and_then(|open| open.by.as_ref());
        self.catalog().push_by(by.and_then(|by| by.actor.as_ref()), changes)?;
        if self.excludes.any()
            && let Some((_, name)) = node.place(self.catalog())?
        {
            self.rules_changed(&name);
        }
        let Some(open) = state.open.as_mut() else { return Ok(()) };
        open.sealed = row;
        open.saved.clear();
        open.dirty = false;
        open.written = false;
        open.emptied = false;
        open.attributed = false;
        self.unsealed.lock().remove(&node.id);
        if open.opens == 0 {
            state.open = None;
        }
        Ok(())
    }

    /// Notes that `caller` changed a file: it will be sealed. Its lock is held.
    pub(super) fn mark_unsealed(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        written: bool,
        caller: &Caller,
    ) {
        let Some(open) = state.open.as_mut() else { return };
        // At the first write a shell that opened the file has become the command that writes it.
        if !open.dirty || (written && (!open.written || open.emptied)) {
            open.by = self.changer(caller, open.by.take());
        } else {
            self.note_changer(open, caller);
        }
        open.touched = std::time::Instant::now();
        open.written |= written;
        open.emptied &= !written;
        if !open.dirty {
            open.dirty = true;
            self.unsealed.lock().insert(node.id, node.clone());
        }
    }

    /// Notes who changes, or may change, an open file. Where the kernel asks for itself, as when it
    /// writes a memory map back, it is whoever was noted last.
    pub(super) fn note_changer(&self, open: &mut Open, caller: &Caller) {
        let same = |by: &Changer| (by.thread, by.uid) == (caller.pid, caller.creds.uid);
        if !open.by.as_ref().is_some_and(same) {
            open.by = self.changer(caller, open.by.take());
        }
    }

    /// Who `caller` is; where that is the kernel itself, `last`.
    pub(super) fn changer(&self, caller: &Caller, last: Option<Changer>) -> Option<Changer> {
        if caller.pid == 0 {
            return last;
        }
        let actor = self.actors.of(caller);
        Some(Changer { thread: caller.pid, uid: caller.creds.uid, actor })
    }

    /// Pushes what `caller` did.
    pub(super) fn push_by(&self, caller: &Caller, changes: Vec<Change>) -> Result<Generation> {
        self.catalog().push_by(self.actors.of(caller).as_ref(), changes)
    }

    /// Records the directories whose times changed, with times equal on all replicas. One that
    /// cannot be recorded is tried again the next time. Returns whether any was.
    pub(super) fn settle_dirs(&self) -> bool {
        let stale: Vec<NodeId> = self.stale_dirs.lock().iter().copied().collect();
        if stale.is_empty() {
            return false;
        }
        let what: Vec<Dirty> = stale.iter().map(|&dir| Dirty::Dir(dir)).collect();
        let _intent = match self.intend_own(&what) {
            Ok(intent) => intent,
            Err(error) => {
                log::warn!("directories are not recorded yet: {error}");
                return false;
            }
        };
        let mut settled = false;
        for dir in stale {
            match self.settle_stale_dir(dir) {
                Ok(()) => settled = true,
                Err(error) => log::warn!("directory {dir} is not recorded yet: {error}"),
            }
            self.nodes.drop_unused(dir);
        }
        settled
    }

    fn settle_stale_dir(&self, dir: NodeId) -> Result<()> {
        let _entries = self.lock_dir(dir);
        let node = self.nodes.load(dir, Kind::Dir);
        // A directory that was removed meanwhile is not recorded again: its remover held this lock.
        let _state = self.lock(&node);
        // Whoever holds these locks finds it marked, or recorded: a scrub would take what is not
        // recorded yet for damage.
        self.stale_dirs.lock().remove(&dir);
        let record = || {
            if dir != NodeId::ROOT && node.place(self.catalog())?.is_none() {
                return Ok(());
            }
            let row = self.settle_dir(dir)?;
            let mut changes = Vec::with_capacity(1);
            self.put(&self.standing(&node, 1)?, row, &mut changes)?;
            self.catalog().push(changes)?;
            Ok(())
        };
        record().inspect_err(|_| self.mark_dir(dir))
    }

    /// The record of a directory, after its times were made equal on all replicas.
    pub(super) fn settle_dir(&self, dir: NodeId) -> Result<NodeRow> {
        let handles = self.dir(dir)?;
        let (stat, xattrs) = self.level_times("settle", &handles)?;
        debug_assert_eq!(stat.kind, Kind::Dir);
        Ok(row_of(dir, &stat, xattrs, ContentId::EMPTY))
    }

    /// Gives an object on all replicas the primary's time of change, and returns the primary's
    /// attributes.
    fn level_times(&self, op: &'static str, object: &Arc<Handles>) -> Result<(Stat, XattrSetId)> {
        let first = Arc::<OnceLock<(Stat, Xattrs)>>::default();
        let (object, looks) = (object.clone(), first.clone());
        self.replicas().change(op, move |id, b| {
            let object = object.get(id)?;
            match looks.get() {
                None => {
                    let _ = looks.set((b.stat(object)?, b.xattrs(object)?));
                    Ok(())
                }
                Some((stat, _)) => b.set_times(object, SetTime::Omit, SetTime::To(stat.mtime)),
            }
        })?;
        let (stat, xattrs) = first.get().cloned().expect("one replica answered");
        Ok((stat, self.catalog().intern_xattrs(&xattrs)?))
    }
}

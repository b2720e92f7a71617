//! The last round: with operations stopped, what little differs is made equal, the catalog joins,
//! and the replica is in use.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::catalog::{Durability, Joining};
use crate::error::{Error, Result};
use crate::history::{OWN, preserved_dir, preserved_name};
use crate::replica::Handles;
use crate::replica::backing::{Access, Backing, Handle};
use crate::types::{ContentId, EntryName};

use super::super::nodes::{Node, State};
use super::mirror::Mirror;
use super::rounds::{Due, Rounds};
use crate::replica::PrivateDir;

/// How long the last round waits for running operations before it lets others pass again; twice
/// that the next time.
const CUT_WAIT: Duration = Duration::from_millis(500);
/// Before the last round what differs is made equal so often at most.
const CATCH_UPS_MAX: usize = 20;
/// If more objects than this were dirtied meanwhile, operations are let go on once more.
const LAST_OBJECTS: usize = 16;
/// That is done so often at most.
const TRIES_MAX: u32 = 20;
/// An orphan that no replica's tree has is copied in pieces of this size.
const ORPHAN_BYTES: usize = 1 << 20;

impl Rounds<'_> {
    /// Does the last round and takes the replica into use.
    pub(super) fn finish(&mut self, joining: Joining<'_>) -> Result<()> {
        let (volume, id) = (self.volume, self.arrival.id);
        self.hurry();
        self.catch_up(CATCH_UPS_MAX)?;
        self.last_round(joining)?;
        // If we die before its marker says so, it is no whole copy and is resynced again.
        self.sync_all()?;
        volume.catalog().flush(Durability::Durable)?;
        volume.store.joined(id)
    }

    /// Stops operations as soon as little differs, and admits the replica.
    fn last_round(&mut self, mut joining: Joining<'_>) -> Result<()> {
        let volume = self.volume;
        self.last = true;
        let (mut tries, mut wait) = (0, CUT_WAIT);
        loop {
            // What history may have to yield for is done while it can.
            volume.carry_out_all();
            // Nothing is packed, swept, healed or checkpointed meanwhile. These come before `cut`:
            // who has `cut` waits for them for a while only.
            let _alone = volume.maintenance_at_once();
            let _no_checkpoint = volume.hold_checkpoints();
            volume.history.undo().rotate(volume.replicas())?;
            self.catch_up(2)?;
            joining.catch_up()?;
            self.progress.advance(0, 0)?;
            let Some(cut) = volume.cut.try_write_for(wait) else {
                // Where every operation takes long, one is waited for in the end.
                wait *= 2;
                continue;
            };
            let begun = Instant::now();
            volume.carry_out_all();
            let due = self.next_due();
            tries += 1;
            if due.dirtied > LAST_OBJECTS && tries < TRIES_MAX {
                // Nobody is to wait so long.
                drop(cut);
                self.pace.press();
                self.round(Some(&due))?;
                continue;
            }
            let outcome = self.admit(joining, &due);
            drop(cut);
            let waited = begun.elapsed().as_millis();
            log::info!("operations waited {waited} ms for the end of a resync");
            return outcome;
        }
    }

    /// With `cut` and `maintenance` held.
    fn admit(&mut self, joining: Joining<'_>, due: &Due) -> Result<()> {
        let (volume, id) = (self.volume, self.arrival.id);
        self.last_copy(due)?;
        let opened = volume.open_on_newcomer(id)?;
        volume.history.join(volume.replicas(), id)?;
        volume.join_log(id)?;
        joining.attach()?;
        // From here on nothing can fail.
        volume.replicas().admit(id);
        for (node, handle) in opened {
            if let Some(open) = node.lock_as_is().open.as_mut()
                && let Some(write) = &open.write
            {
                open.write = Some(Arc::new(write.with(id, handle)));
            }
        }
        Ok(())
    }

    fn last_copy(&mut self, due: &Due) -> Result<()> {
        let source = self.source()?;
        let sides = (&source, &self.target);
        let since = self.arrival.apart_since;
        let mut mirror = Mirror::new(self.volume, sides, &mut self.places, self.progress, since)?;
        mirror.due(due)?;
        mirror.clear_aside()?;
        let copied = mirror.copier.bytes_written();
        self.gauge.copied.fetch_add(copied, Ordering::Relaxed);
        self.history(false)
    }
}

impl super::Volume {
    /// Opens what is open for writing on a replica that is about to join.
    fn open_on_newcomer(&self, id: crate::types::ReplicaId) -> Result<Vec<(Arc<Node>, Handle)>> {
        let replica = self.replicas().get(id);
        let backing = replica.backing();
        let mut opened = Vec::new();
        for node in self.nodes.open_ones() {
            let state = node.lock_as_is();
            let write = state.open.as_ref().and_then(|open| open.write.clone());
            let Some(write) = write else { continue };
            let handle = match state.orphan {
                true => self.open_orphan(&node, &state, &write, backing)?,
                false => {
                    let Some((parent, name)) = node.place(self.catalog())? else { continue };
                    let path = self.path_of(parent)?;
                    open_at(backing, &path, &name)?
                }
            };
            drop(state);
            opened.push((node, handle));
        }
        Ok(opened)
    }

    /// An orphan lies in `preserved/`, or in no directory at all: then it is copied. So is one that
    /// was written to since it lost its name: no round did that, and what a replica that left
    /// cleanly has of it is older.
    fn open_orphan(
        &self,
        node: &Node,
        state: &State,
        write: &Handles,
        backing: &dyn Backing,
    ) -> Result<Handle> {
        let content = state.open.as_ref().map_or(ContentId::EMPTY, |open| open.sealed.content);
        let (dir, name) = (preserved_dir(node.id).path(), preserved_name(node.id, content));
        let kept = match content {
            ContentId::EMPTY => None,
            _ => open_at(backing, &dir, &name).ok(),
        };
        let size = || self.replicas().read("stat", |id, b| Ok(b.stat(write.get(id)?)?.size));
        if let Some(kept) = &kept
            && state.open.as_ref().is_some_and(|open| !open.written && !open.dirty)
            && backing.stat(kept).map_err(Error::from_io)?.size == size()?
        {
            return Ok(kept.clone());
        }
        let own = EntryName::new("orphan").expect("letters");
        let make = || -> std::io::Result<Handle> {
            let tmp = backing.open_dir(&PrivateDir::Tmp.path())?;
            let _ = backing.unlink(&tmp, &own);
            let file = backing.create(&tmp, &own, 0o600, OWN)?;
            backing.unlink(&tmp, &own)?;
            Ok(file)
        };
        let file = kept.map_or_else(make, Ok).map_err(Error::from_io)?;
        let mut buffer = vec![0; ORPHAN_BYTES];
        let mut offset = 0;
        loop {
            let read = |id, b: &dyn Backing| b.read_at(write.get(id)?, &mut buffer, offset);
            let got = self.replicas().read("read", read)?;
            backing.write_at(&file, &buffer[..got], offset).map_err(Error::from_io)?;
            offset += got as u64;
            if got < ORPHAN_BYTES {
                backing.truncate(&file, offset).map_err(Error::from_io)?;
                return Ok(file);
            }
        }
    }
}

fn open_at(
    backing: &dyn Backing,
    path: &crate::types::RelPath,
    name: &EntryName,
) -> Result<Handle> {
    let opened =
        backing.open_dir(path).and_then(|dir| backing.open_file(&dir, name, Access::ReadWrite));
    opened.map_err(Error::from_io)
}

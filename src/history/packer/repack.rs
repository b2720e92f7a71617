//! Repacking: what is still used of packs that are mostly unused, or small, goes into new ones.
//!
//! The order is the packer's: the copy is written and synced, the catalog learns where the chunks
//! lie from then on, and only then the pack that they lay in goes.

use std::collections::{HashMap, HashSet};

use super::{Groups, Packer};
use crate::catalog::{Change, ChunkRow, PackChange, PackRow};
use crate::error::{Error, Result};
use crate::history::pack::{PACK_BYTES_REFUSED, PackBuilder};
use crate::types::PackId;

/// A pack is copied when so much of it is unused: in percent, and in bytes.
const REPACK_PERCENT: u64 = 40;
const REPACK_BYTES_MIN: u64 = 64 << 10;
/// Where space is short, a pack is copied for less, in percent, before history yields.
const SQUEEZE_PERCENT: u64 = 10;
/// Packs smaller than this are joined when there are [`JOIN_COUNT`] of them.
const JOIN_BYTES: u64 = 1 << 20;
const JOIN_COUNT: usize = 16;

impl Packer<'_> {
    /// Removes packs that nobody uses, and copies what is used out of those that are mostly unused,
    /// or many and small; at most `bytes_max` bytes of them. Returns how many packs went.
    pub fn repack(&mut self, bytes_max: u64) -> Result<u64> {
        let packs = self.catalog.packs()?;
        let small = packs.iter().filter(|pack| pack.bytes < JOIN_BYTES).count() >= JOIN_COUNT;
        let mut due = Vec::new();
        for pack in packs {
            let is_joined = small && pack.bytes < JOIN_BYTES;
            if pack.live == 0 || is_joined || self.saving(&pack, REPACK_PERCENT)? > 0 {
                due.push(pack);
            }
        }
        self.copy_out(due, bytes_max)
    }

    /// The bytes that a copy of a pack saves, or 0 if that is less than `percent` of it: those of
    /// chunks that nobody uses. Its journal the copy may have as well; a pack of tiny chunks, which
    /// consists of that mostly, would be copied for ever.
    fn saving(&self, pack: &PackRow, percent: u64) -> Result<u64> {
        let is_worth = |bytes: u64| {
            bytes >= REPACK_BYTES_MIN
                && bytes.saturating_mul(100) >= pack.bytes.saturating_mul(percent)
        };
        // It cannot be more than this. To count them takes a while in a store of many packs.
        if !is_worth(pack.bytes.saturating_sub(pack.live)) {
            return Ok(0);
        }
        let saving = self.catalog.unused_bytes(pack.id)?;
        Ok(if is_worth(saving) { saving } else { 0 })
    }

    /// Copies what is used out of every pack of which something fell out of use since they were as
    /// `before` has them, however little that saves. One after the other, so that there need be
    /// room for one only.
    pub fn repack_since(&mut self, before: &HashMap<PackId, u64>) -> Result<u64> {
        let fell = |pack: &PackRow| before.get(&pack.id).is_some_and(|&live| pack.live < live);
        let mut packs = self.catalog.packs()?;
        packs.retain(fell);
        // What costs least makes room for the rest.
        packs.sort_by_key(|pack| pack.live);
        let mut count = 0;
        for pack in packs {
            if (self.is_over)() {
                return Err(Error::Interrupted);
            }
            count += self.copy_out(vec![pack], u64::MAX)?;
        }
        Ok(count)
    }

    /// Where space is short: copies what is used out of the pack with the most that is not, if that
    /// is worth it. Returns how many packs went. `ENOSPC` if there is no room for the copy.
    pub fn squeeze(&mut self) -> Result<u64> {
        let mut loosest = None;
        for pack in self.catalog.packs()? {
            let saving = self.saving(&pack, SQUEEZE_PERCENT)?;
            if saving > loosest.map_or(0, |(most, _)| most) {
                loosest = Some((saving, pack));
            }
        }
        self.copy_out(loosest.into_iter().map(|(_, pack)| pack).collect(), u64::MAX)
    }

    /// Copies what is used out of these packs, at most `bytes_max` bytes of it, and removes them.
    pub(super) fn copy_out(&mut self, packs: Vec<PackRow>, bytes_max: u64) -> Result<u64> {
        let mut changes = Groups::new();
        let copied = match self.copy_all(packs, bytes_max, &mut changes) {
            Ok(copied) => copied,
            Err(error) => {
                self.discard(changes, &error);
                return Err(error);
            }
        };
        if copied.is_empty() {
            return Ok(0);
        }
        changes.extend(copied.iter().map(|&id| vec![Change::Pack(PackChange::PackRemove(id))]));
        self.record(changes)?;
        let left: HashSet<_> = self.catalog.packs()?.into_iter().map(|pack| pack.id).collect();
        let mut count = 0;
        for id in copied {
            if !left.contains(&id) {
                self.history.packs.remove(self.replicas, id)?;
                count += 1;
                (self.step)("a pack was removed")?;
            }
        }
        Ok(count)
    }

    /// Writes packs of what is used of these; `changes` are to make the catalog know them. Returns
    /// which are of no use then.
    fn copy_all(
        &mut self,
        packs: Vec<PackRow>,
        bytes_max: u64,
        changes: &mut Groups,
    ) -> Result<Vec<PackId>> {
        let mut done = Vec::new();
        let mut copied = 0;
        for pack in packs {
            if pack.live > 0 {
                if copied >= bytes_max {
                    continue;
                }
                copied += pack.live;
                // Its journal stays with its chunks.
                let begun = self.builder.as_ref().map_or(0, PackBuilder::stored_bytes);
                if begun + pack.bytes > PACK_BYTES_REFUSED {
                    self.finish_copy(changes)?;
                }
                for row in self.catalog.pack_chunks(pack.id)? {
                    let bytes = self.history.packs.read_chunk(self.replicas, &row)?;
                    self.copy(&row, &bytes, changes)?;
                }
            }
            self.keep_journal(pack.id)?;
            done.push(pack.id);
        }
        if !done.is_empty() {
            self.finish_copy(changes)?;
        }
        Ok(done)
    }

    /// Removes the packs that were written and are not to be recorded: their copying failed, for
    /// want of room mostly. Where a step ended the work, as death would, they are recovery's.
    fn discard(&self, changes: Groups, error: &Error) {
        if matches!(error, Error::Interrupted) {
            return;
        }
        for change in changes.into_iter().flatten() {
            if let Change::Pack(PackChange::PackAdd { id, .. }) = change
                && let Err(error) = self.history.packs.remove(self.replicas, id)
            {
                log::error!("the unfinished pack {id} cannot be removed: {error}");
            }
        }
    }

    fn copy(&mut self, row: &ChunkRow, bytes: &[u8], changes: &mut Groups) -> Result<()> {
        if self.is_full() {
            self.finish_copy(changes)?;
        }
        self.building.push(row.id);
        self.builder().add(row.hash, bytes);
        Ok(())
    }

    /// Writes the pack of copies; the chunks move when the changes are pushed.
    fn finish_copy(&mut self, changes: &mut Groups) -> Result<()> {
        let Some((chunks, added)) = self.write_pack()? else { return Ok(()) };
        changes.push(vec![added]);
        changes.extend(chunks.into_iter().map(|(id, chunk)| {
            let (place, stored) = (chunk.place, chunk.stored);
            vec![Change::Pack(PackChange::ChunkMove { id, place, stored })]
        }));
        Ok(())
    }
}

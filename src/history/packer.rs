//! The packer: what is preserved becomes chunks in packs.
//!
//! The order is the contract. Chunks are collected into a pack, which is written to every replica
//! and synced; the catalog learns of the pack and its chunks; once it also knows, durably, the
//! recipes that use them, and only then, the originals are removed. Dead at any step, either the
//! originals count and the packs are orphans or hold chunks that nobody uses, or the recipes count
//! and the originals are leftovers. Recovery and the sweep remove either.
//!
//! What is recorded is committed in small pieces, each true by itself: a content with its recipe, a
//! pack before its chunks, a stream before what moves into it. Nothing is read from the new places
//! unless the rest follows, and after a death in between the rest is packed again.
//!
//! One thread at a time packs, repacks and sweeps: a chunk that is found stays while it is wanted.

use std::collections::{HashMap, VecDeque};

use super::chunker::Chunker;
use super::journal::{PARTS_MAX, Parts, Record};
use super::pack::{PackBuilder, PackedChunk, scan};
use super::{Extents, History, Place, run_at};
use crate::catalog::digest::first_half;
use crate::catalog::{
    Base, Catalog, Change, ChunkRow, Durability, ForgetChange, PackChange, UndoRow, WaitingContent,
};
use crate::error::{Error, Result};
use crate::replica::ReplicaSet;
use crate::types::{ChunkId, ContentId, NodeId, PackId};

mod repack;
mod segments;

/// Contents are packed in runs of about this many bytes; after each the originals go.
const RUN_BYTES: u64 = 64 << 20;
/// Contents that one run takes at most.
const RUN_CONTENTS: usize = 4096;
/// The longest hole that one part of a recipe stands for.
const HOLE_BYTES_MAX: u64 = 1 << 30;
/// Rows that one commit of ours writes, about: whoever waits for the commit of something else waits
/// for ours as well. One recipe of many chunks is more.
const COMMIT_ROWS: usize = 64;

/// Called after each step of the order above, by its name. An error ends the work there, as death
/// would: tests use it.
pub type Step<'a> = &'a (dyn Fn(&str) -> Result<()> + Sync);

/// Steps by their names: see [`ENDS`].
const PACK_RECORDED: &str = "a pack was recorded";
const SEGMENT_REMOVED: &str = "a segment was removed";
/// The step of whoever forgets scratch files before packing.
pub const SCRATCH_FORGOTTEN: &str = "scratch files were forgotten";
/// The steps after which nothing is half done: who ends the work there leaves nothing that only
/// recovery would remove.
pub const ENDS: [&str; 3] = [PACK_RECORDED, SEGMENT_REMOVED, SCRATCH_FORGOTTEN];

/// What is to be done with a preserved content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is to be packed.
    Pack,
    /// Its file is in use as such.
    Wait,
    /// The catalog was told that it has the bytes of another content.
    Same,
}

/// Changes that are pushed together, in their order.
type Groups = Vec<Vec<Change>>;

/// A pack's chunks with their ids, and what is to be recorded of the pack itself.
type Written = (Vec<(ChunkId, PackedChunk)>, Change);

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packed {
    /// How many contents and before-images are packed now.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Nothing more waits.
    pub done: bool,
}

/// The work on one store.
pub struct Packer<'a> {
    history: &'a History,
    replicas: &'a ReplicaSet,
    catalog: &'a Catalog,
    step: Step<'a>,
    builder: Option<PackBuilder>,
    /// The chunks of the pack that is being built, in its order.
    building: Vec<ChunkId>,
    /// Records for the journal of the next pack.
    notes: VecDeque<Record>,
    /// The chunks of this run by their hashes: the catalog may not know them yet.
    fresh: HashMap<[u8; 32], ChunkId>,
    /// The bytes of contents that one run takes, about.
    run_bytes: u64,
    /// Whether it is to end early.
    is_over: &'a dyn Fn() -> bool,
}

impl<'a> Packer<'a> {
    /// Begins work on a store.
    pub fn new(
        history: &'a History,
        replicas: &'a ReplicaSet,
        catalog: &'a Catalog,
        step: Step<'a>,
    ) -> Packer<'a> {
        Packer {
            history,
            replicas,
            catalog,
            step,
            builder: None,
            building: Vec::new(),
            notes: VecDeque::new(),
            fresh: HashMap::new(),
            run_bytes: RUN_BYTES,
            is_over: &|| false,
        }
    }

    /// The same, in runs that end once they have taken `bytes`, where there is little room for what
    /// a run writes: the originals go after it only. Runs of no bytes would get nowhere.
    pub fn in_runs_of(mut self, bytes: u64) -> Packer<'a> {
        self.run_bytes = bytes.min(RUN_BYTES);
        self
    }

    /// The same; once `is_over` says so it takes up no more contents, and finishes what it has.
    /// Beside writers each of them waits for a commit, and there may be a hundred thousand.
    pub fn until(mut self, is_over: &'a dyn Fn() -> bool) -> Packer<'a> {
        self.is_over = is_over;
        self
    }

    /// Packs preserved contents after `after`, one run of them, as far as `claim` lets it. Returns
    /// where the next run goes on, and what was done; unless it was to end early, which leaves some
    /// of the run as they were.
    pub fn contents(
        &mut self,
        after: ContentId,
        claim: &mut dyn FnMut(&WaitingContent) -> Result<Claim>,
    ) -> Result<(ContentId, Packed)> {
        let waiting = self.catalog.waiting_contents(after, RUN_CONTENTS)?;
        let mut packed = Packed { done: waiting.len() < RUN_CONTENTS, ..Packed::default() };
        let mut run = Vec::new();
        let mut last = after;
        for content in waiting {
            if packed.bytes >= self.run_bytes || (self.is_over)() {
                packed.done = false;
                break;
            }
            last = content.id;
            match claim(&content)? {
                Claim::Wait => {}
                Claim::Same => self.history.note_useless([(content.node, content.id)]),
                Claim::Pack => {
                    packed.bytes += content.size;
                    run.push(content);
                }
            }
        }
        self.remove_originals()?;
        // Versions of one file beside each other compress together.
        run.sort_unstable_by_key(|content| (content.node, content.id));
        let mut changes = Groups::new();
        let mut originals = Vec::new();
        for content in &run {
            if (self.is_over)() {
                packed.done = false;
                break;
            }
            match self.content(content, &mut changes) {
                Ok(()) => originals.push(*content),
                Err(Error::Interrupted) => return Err(Error::Interrupted),
                Err(error) if error.is(rustix::io::Errno::NOSPC) => return Err(error),
                Err(error) => {
                    let (id, node) = (content.id, content.node);
                    log::error!("content {id} of node {node} cannot be packed: {error}");
                }
            }
        }
        packed.count = originals.len() as u64;
        packed.bytes = originals.iter().map(|content| content.size).sum();
        self.record(changes)?;
        self.history.note_useless(originals.iter().map(|content| (content.node, content.id)));
        self.remove_originals()?;
        Ok((last, packed))
    }

    /// Removes preserved files whose contents durably lie elsewhere.
    fn remove_originals(&self) -> Result<()> {
        self.history.remove_useless(self.replicas, self.catalog, self.step)
    }

    /// Cuts and adds one content.
    fn content(&mut self, content: &WaitingContent, changes: &mut Groups) -> Result<()> {
        let sources = self.catalog.sources(content.node, content.id)?;
        let of = Base::Preserved { node: content.node, content: content.id };
        if sources.base != of {
            return Err(Error::Refused("it lies elsewhere".into()));
        }
        let own: Vec<UndoRow> = sources.undo.clone();
        let extents = Extents::resolve(content.size, sources);
        let (on, file) = super::open_whole(self.replicas, content.node, content.id)?;
        let (history, replicas, catalog) = (self.history, self.replicas, self.catalog);
        let read_file = |at: u64, buffer: &mut [u8]| -> Result<()> {
            replicas.read("read", |id, b| {
                let other;
                let file = if id == on {
                    &file
                } else {
                    other = super::open_whole_on(replicas, id, content.node, content.id)?;
                    &other
                };
                match b.read_at(file, buffer, at)? {
                    got if got < buffer.len() => Err(std::io::Error::from_raw_os_error(libc::EIO)),
                    _ => Ok(()),
                }
            })
        };
        let mut parts = Cut::default();
        let mut at = 0;
        while at < extents.size {
            let run = extents.run(at, extents.size);
            let (data, end) = match run.place {
                Place::Hole => (false, run.range.end),
                Place::Undo(_) => (true, run.range.end),
                Place::Base => replicas.read("seek", |id, b| match id == on {
                    true => run_at(b, &file, at, run.range.end),
                    false => Ok((true, run.range.end)),
                })?,
            };
            if !data {
                parts.hole(end - at);
                at = end;
                continue;
            }
            let read = |offset: u64, buffer: &mut [u8]| -> Result<usize> {
                let from = at + offset;
                match run.place {
                    Place::Undo(place) => {
                        let place = place.further(offset);
                        history.read_undo(replicas, catalog, place, buffer)?;
                    }
                    _ => read_file(from, buffer)?,
                }
                Ok(buffer.len())
            };
            for chunk in Chunker::new(end - at, read) {
                let (_, bytes) = chunk?;
                parts.chunk(self.chunk(&bytes)?, bytes.len() as u32);
                // Beside its chunks, for the journal of one pack may have no room for all.
                if parts.parts.len() >= PARTS_MAX {
                    self.note_recipe(content.id, &mut parts);
                }
            }
            at = end;
        }
        self.note_version(content.node, content.id)?;
        self.note_recipe(content.id, &mut parts);
        let chunks = parts.chunks;
        let mut group = vec![
            Change::Pack(PackChange::RecipeAdd { id: content.id, chunks }),
            Change::Pack(PackChange::ContentPacked(content.id)),
        ];
        // An orphan that was overwritten while it was open: the recipe has the old bytes.
        group.extend(own.iter().map(|row| {
            let (node, content, offset) = (row.node, row.content, row.offset);
            Change::Forget(ForgetChange::Undo { node, content, offset })
        }));
        changes.push(group);
        Ok(())
    }

    /// The id and hash of a chunk with these bytes, new or known.
    fn chunk(&mut self, bytes: &[u8]) -> Result<(ChunkId, [u8; 32])> {
        let hash = *blake3::hash(bytes).as_bytes();
        if let Some(id) = self.fresh.get(&hash) {
            return Ok((*id, hash));
        }
        if let Some(row) = self.catalog.chunk(&hash)? {
            return Ok((row.id, hash));
        }
        let id = self.catalog.next_chunk();
        self.fresh.insert(hash, id);
        self.add(id, hash, bytes)?;
        Ok((id, hash))
    }

    /// The pack that is being built. Its journal begins with what waits for it.
    fn builder(&mut self) -> &mut PackBuilder {
        let builder = self
            .builder
            .get_or_insert_with(|| PackBuilder::new(self.history.store, self.catalog.next_pack()));
        while !builder.is_full()
            && let Some(record) = self.notes.pop_front()
        {
            builder.note(&record);
        }
        builder
    }

    /// Whether the pack that is being built takes no more chunks.
    fn is_full(&self) -> bool {
        self.builder.as_ref().is_some_and(PackBuilder::is_full)
    }

    /// Adds a record to the journal: of the pack that is being built, or else of the next one. What
    /// waits when the work ends is in no journal: all its bytes were stored before.
    fn note(&mut self, record: Record) {
        match &mut self.builder {
            Some(builder) if !builder.is_overfull() => builder.note(&record),
            _ => self.notes.push_back(record),
        }
    }

    fn note_version(&mut self, node: NodeId, content: ContentId) -> Result<()> {
        if let Some(version) = self.catalog.version_record(node, content)? {
            self.note(Record::Version(version));
        }
        Ok(())
    }

    /// Notes the parts that were added since the last time.
    fn note_recipe(&mut self, id: ContentId, cut: &mut Cut) {
        for parts in std::mem::take(&mut cut.parts).chunks(PARTS_MAX) {
            self.note(Record::Recipe { id, first: cut.noted, parts: parts.to_vec() });
            cut.noted += parts.len() as u64;
        }
    }

    /// Notes again what the journal of a pack that is to go has of contents that stay.
    fn keep_journal(&mut self, pack: PackId) -> Result<()> {
        let bytes = match self.history.packs.bytes(self.replicas, pack) {
            Ok(bytes) => bytes,
            // Whoever reads its chunks hears of the damage.
            Err(_) => return Ok(()),
        };
        let Ok(scanned) = scan(&bytes) else { return Ok(()) };
        for record in scanned.records {
            let stays = match &record {
                Record::Version(version) => self.catalog.content_size(version.content)?.is_some(),
                _ => self.catalog.has_recipe(record.id())?,
            };
            if stays {
                self.note(record);
            }
        }
        Ok(())
    }

    fn add(&mut self, id: ChunkId, hash: [u8; 32], bytes: &[u8]) -> Result<()> {
        // Not as soon as it is: what is noted of its chunks is to be in its journal.
        if self.is_full() {
            self.finish_pack()?;
        }
        self.building.push(id);
        self.builder().add(hash, bytes);
        Ok(())
    }

    /// Writes the pack that is being built, if there is one.
    fn write_pack(&mut self) -> Result<Option<Written>> {
        let Some(builder) = self.builder.take() else { return Ok(None) };
        let building = std::mem::take(&mut self.building);
        let pack = builder.finish();
        self.history.packs.write(self.replicas, &pack)?;
        (self.step)("a pack was written")?;
        let (id, bytes, hash) = (pack.id, pack.bytes.len() as u64, pack.hash);
        let added = Change::Pack(PackChange::PackAdd { id, bytes, hash });
        Ok(Some((building.into_iter().zip(pack.chunks).collect(), added)))
    }

    /// Writes the pack that is being built and makes the catalog know it.
    fn finish_pack(&mut self) -> Result<()> {
        let Some((chunks, added)) = self.write_pack()? else { return Ok(()) };
        let mut changes = vec![vec![added]];
        changes.extend(chunks.into_iter().map(|(id, chunk)| {
            vec![Change::Pack(PackChange::ChunkAdd(ChunkRow {
                id,
                hash: chunk.hash,
                place: chunk.place,
                length: chunk.length,
                stored: chunk.stored,
            }))]
        }));
        self.push(changes)?;
        (self.step)(PACK_RECORDED)
    }

    /// Pushes groups in their order, each whole, a few with each commit.
    fn push(&self, groups: Groups) -> Result<()> {
        let rows = |change: &Change| match change {
            Change::Pack(PackChange::RecipeAdd { chunks, .. }) => 1 + chunks.len(),
            _ => 1,
        };
        let (mut piece, mut count) = (Vec::new(), 0);
        for group in groups {
            let more: usize = group.iter().map(rows).sum();
            if count > 0 && count + more > COMMIT_ROWS {
                self.catalog.push(std::mem::take(&mut piece))?;
                self.catalog.flush(Durability::Written)?;
                count = 0;
            }
            piece.extend(group);
            count += more;
        }
        if !piece.is_empty() {
            self.catalog.push(piece)?;
        }
        Ok(())
    }

    /// Finishes the packs and records, durably, what uses them.
    fn record(&mut self, changes: Groups) -> Result<()> {
        self.finish_pack()?;
        self.fresh.clear();
        if !changes.is_empty() {
            self.push(changes)?;
            (self.step)("recipes were recorded")?;
        }
        self.catalog.flush(Durability::Durable)?;
        self.history.forget_maps();
        (self.step)("recipes were made durable")
    }
}

/// A content as it is cut: its chunks by their ids, and by their hashes.
#[derive(Default)]
struct Cut {
    chunks: Vec<(ChunkId, u32)>,
    /// Those that are in no journal yet, and how many are.
    parts: Parts,
    noted: u64,
}

impl Cut {
    fn chunk(&mut self, (id, hash): (ChunkId, [u8; 32]), length: u32) {
        self.chunks.push((id, length));
        self.parts.push((Some(first_half(&hash)), length));
    }

    fn hole(&mut self, length: u64) {
        let mut left = length;
        while left > 0 {
            let part = left.min(HOLE_BYTES_MAX) as u32;
            self.chunks.push((ChunkId::HOLE, part));
            self.parts.push((None, part));
            left -= u64::from(part);
        }
    }
}

#[cfg(test)]
mod tests;

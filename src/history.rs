//! What was overwritten or deleted: kept before it is gone, and read back.
//!
//! A sealed content of a file is *chained* or *whole*. Whole: its bytes lie in
//! `.rearview/preserved/<hh>/<node>.<content>` (a file that was moved aside or cloned). Chained:
//! its bytes are its own before-images, then those of the node's later contents, and so on up to
//! the first whole content, or else the live file. A before-image is written once for each byte
//! range of a sealed content, before the live file's bytes are changed for the first time since the
//! seal.
//!
//! Deliberately not here: when to preserve (the volume's write path), what a path was (the
//! catalog).

pub mod chunker;
mod extents;
pub mod journal;
pub mod pack;
pub mod packer;
pub mod packs;
pub mod ranges;
pub mod recover;
mod shared;
pub mod undo;
mod useless;

use std::collections::{HashMap, VecDeque};
use std::num::{NonZeroU64, NonZeroUsize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lru::LruCache;
use parking_lot::Mutex;
use rustix::io::Errno;

pub use extents::{Extent, Extents, Place};

use crate::catalog::{Base, Catalog, Change, UndoFile, UndoPlace};
use crate::error::{Error, Result};
use crate::replica::backing::{Access, Backing, Creds, DirEntry, Handle, RenameMode, Seek};
use crate::replica::{Handles, PrivateDir, ReplicaSet};
use crate::types::{ContentId, EntryName, NodeId, ReplicaId};

use packs::{PackStore, PlacedRecipe};
use ranges::ByteRange;
use undo::{Image, UndoLog};

/// Owner of what the daemon makes for itself: root's, or the mounter's own, with no umask.
pub const OWN: Creds = Creds::DAEMON;
/// Clones of at least this size stay as they are: they share the blocks that did not change since,
/// which no pack could.
const CLONE_BYTES_MIN: u64 = 1 << 20;
/// A file that lies in more runs of blocks than this is not cloned: that takes 17 µs for each on
/// XFS and 10 on btrfs, and every write to the file waits for it.
const CLONE_RUNS_MAX: u32 = 256;
/// Resolved extent maps kept in memory. One of a database with many changed pages is some MiB.
const EXTENT_MAPS_MAX: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");
/// Recipes kept in memory. One of a content of 1 GiB is some MiB.
const RECIPES_MAX: NonZeroUsize = NonZeroUsize::new(32).expect("not zero");
/// Before-images are taken in blocks of this size: what filesystems and databases write at least.
const BLOCK_BYTES: u64 = 4096;
/// The most bytes of a before-image.
const COPY_BYTES: u64 = 1 << 20;
/// So few bytes are in the kernel's cache, mostly, and where their holes are is not: they are read
/// before that is asked, for only zeros can be one.
const PEEK_BYTES: u64 = 64 << 10;
/// So many small ranges are read together: at most 8 MiB, in far less time than a call may take.
const READ_TOGETHER: usize = 128;
/// Fewer are not worth it.
const READ_TOGETHER_MIN: usize = 8;
/// Before-images are appended so many bytes at a time: what is held in memory meanwhile.
const APPEND_BYTES: u64 = 8 << 20;

/// An extent map with the node's stamp at its making.
type StampedMap = (u64, Arc<Extents>);

/// The preserved contents and before-images of a mounted store.
pub struct History {
    store: uuid::Uuid,
    undo: UndoLog,
    packs: PackStore,
    recipes: Mutex<LruCache<ContentId, Arc<PlacedRecipe>>>,
    maps: Mutex<LruCache<(NodeId, ContentId), StampedMap>>,
    /// Preserved files that are to go.
    useless: Mutex<VecDeque<(NodeId, ContentId)>>,
    /// Whether all replicas can share blocks.
    reflink: AtomicBool,
}

/// The name of a whole content in its shard of `preserved/`.
pub fn preserved_name(node: NodeId, content: ContentId) -> EntryName {
    EntryName::new(format!("{:016x}.{:016x}", node.0, content.0)).expect("hex digits and a dot")
}

/// The shard of `preserved/` that a node's contents lie in.
pub fn preserved_dir(node: NodeId) -> PrivateDir {
    PrivateDir::Preserved((node.0 & 0xff) as u8)
}

/// What the file must have in which a content is preserved ([`Extents::parts_in_base`]).
pub fn parts_preserved(
    catalog: &Catalog,
    (node, content): (NodeId, ContentId),
    size: u64,
) -> Result<Vec<ByteRange>> {
    Ok(Extents::resolve(size, catalog.sources(node, content)?).parts_in_base())
}

/// The inverse of [`preserved_name`]; `None` for a name that is not ours.
pub fn parse_preserved_name(name: &EntryName) -> Option<(NodeId, ContentId)> {
    let (node, content) = std::str::from_utf8(name.as_bytes()).ok()?.split_once('.')?;
    let node = NodeId(u64::from_str_radix(node, 16).ok()?);
    let content = ContentId(u64::from_str_radix(content, 16).ok()?);
    (preserved_name(node, content) == *name).then_some((node, content))
}

impl History {
    /// Opens the history of the store `store`, whose replicas agree.
    pub fn open(replicas: &ReplicaSet, store: uuid::Uuid) -> Result<History> {
        Ok(History {
            store,
            undo: UndoLog::open(replicas)?,
            packs: PackStore::new(store),
            recipes: Mutex::new(LruCache::new(RECIPES_MAX)),
            maps: Mutex::new(LruCache::new(EXTENT_MAPS_MAX)),
            useless: Mutex::default(),
            reflink: AtomicBool::new(all_can_reflink(replicas)?),
        })
    }

    /// A replica is about to join; nothing of history is changed meanwhile. It has all files of it.
    pub fn join(&self, replicas: &ReplicaSet, id: ReplicaId) -> Result<()> {
        let replica = replicas.get(id);
        let backing = replica.backing();
        let dir = backing.open_dir(&PrivateDir::Tmp.path()).map_err(Error::from_io)?;
        if try_reflink(backing, &dir).is_err() {
            self.reflink.store(false, Ordering::Relaxed);
        }
        self.packs.replica_changed(id);
        self.undo.join(replicas, id)
    }

    /// Preserves what the sealed content has in these ranges, which `file` still has there. When it
    /// returns, the bytes are durable on every replica, and the live ones may be overwritten. If we
    /// die before the caller's overwrite, a before-image that equals the live bytes is left:
    /// harmless.
    pub fn before_overwrite(
        &self,
        replicas: &ReplicaSet,
        catalog: &Catalog,
        of: (NodeId, ContentId),
        file: &Arc<Handles>,
        ranges: &[ByteRange],
    ) -> Result<()> {
        let _pin = self.undo.pin();
        let mut rows = Vec::new();
        let (mut images, mut bytes) = (Vec::new(), 0);
        let mut read = HashMap::new();
        for (index, range) in ranges.iter().enumerate() {
            if index % READ_TOGETHER == 0 {
                let some = &ranges[index..ranges.len().min(index + READ_TOGETHER)];
                // Where one of them cannot be read, each is, from wherever it can.
                read = read_together(replicas, file, some).unwrap_or_default();
            }
            let mut at = range.start;
            while at < range.end {
                let piece = ByteRange { start: at, end: range.end.min(at + COPY_BYTES) };
                let image = read_image(replicas, file, piece, range.end, read.remove(&at))?;
                match &image {
                    Image::Bytes(_, data) => {
                        at += data.len() as u64;
                        bytes += data.len() as u64;
                    }
                    Image::Hole(hole) => at = hole.end,
                }
                images.push(image);
                if bytes >= APPEND_BYTES {
                    rows.extend(self.undo.append(replicas, of, &images)?);
                    (images, bytes) = (Vec::new(), 0);
                }
            }
        }
        rows.extend(self.undo.append(replicas, of, &images)?);
        self.undo.sync(replicas)?;
        catalog.push(rows.into_iter().map(Change::UndoAdd).collect())?;
        Ok(())
    }

    /// Whether contents are preserved whole by sharing their blocks.
    pub fn shares_blocks(&self) -> bool {
        self.reflink.load(Ordering::Relaxed)
    }

    /// Preserves a sealed content whole by sharing its blocks, where every replica can, and in a
    /// moment; `false` where not, and nothing was done. Durable when it returns: btrfs persists
    /// only the file that is fsynced next, so without the clone's own sync an fsync of the live
    /// file would lose it.
    pub fn clone_whole(
        &self,
        replicas: &ReplicaSet,
        catalog: &Catalog,
        of: (NodeId, ContentId),
        size: u64,
        file: &Arc<Handles>,
    ) -> Result<bool> {
        if !self.shares_blocks() {
            return Ok(false);
        }
        let own = file.clone();
        let looked = move |id, b: &dyn Backing| b.is_fragmented(own.get(id)?, CLONE_RUNS_MAX);
        if replicas.change("extents", looked)?.iter().any(|(_, &fragmented)| fragmented) {
            return Ok(false);
        }
        let (node, content) = of;
        let dir = replicas.private(preserved_dir(node))?;
        let name = preserved_name(node, content);
        let tmp = replicas.private(PrivateDir::Tmp)?;
        replicas.apply("clone", |id, b| {
            let scratch = tmp.get(id)?;
            // A leftover of a mount that died here.
            let _ = b.unlink(scratch, &name);
            let clone = b.create(scratch, &name, 0o600, OWN)?;
            let made = (|| {
                b.clone_file(file.get(id)?, &clone)?;
                if !b.orders_names() {
                    // btrfs' log can bring the name to the disk with what the file was before.
                    b.sync(&clone, false)?;
                }
                // Whole when it gets its name: recovery takes what lies under that for the content.
                b.rename(scratch, &name, dir.get(id)?, &name, RenameMode::Replace)
            })();
            if made.is_err() {
                let _ = b.unlink(scratch, &name);
            }
            made?;
            b.sync(&clone, false)
        })?;
        // A small one is packed as any other: it costs less so than as a file.
        let cloned = size >= CLONE_BYTES_MIN;
        catalog.push(vec![Change::ContentPreserved { id: content, cloned }])?;
        Ok(true)
    }

    /// The extent map of a content. `stamp` changes whenever the node's before-images do, and is
    /// how a kept map is known to be current; the caller holds the node's lock.
    pub fn extents(
        &self,
        catalog: &Catalog,
        of: (NodeId, ContentId),
        stamp: u64,
    ) -> Result<Arc<Extents>> {
        if let Some((kept, map)) = self.maps.lock().get(&of)
            && *kept == stamp
        {
            return Ok(map.clone());
        }
        let (node, content) = of;
        let size = catalog.content_size(content)?.unwrap_or(0);
        let map = Arc::new(Extents::resolve(size, catalog.sources(node, content)?));
        self.maps.lock().put(of, (stamp, map.clone()));
        Ok(map)
    }

    /// The node whose live file the kept extent map of a content relies on, if there is such a map.
    pub fn kept_base(&self, of: (NodeId, ContentId)) -> Option<Base> {
        self.maps.lock().peek(&of).map(|(_, map)| map.base)
    }

    /// Forgets the extent maps: what they point at has moved.
    pub fn forget_maps(&self) {
        self.maps.lock().clear();
        self.recipes.lock().clear();
    }

    /// The chunk store.
    pub fn packs(&self) -> &PackStore {
        &self.packs
    }

    /// The undo log.
    pub fn undo(&self) -> &UndoLog {
        &self.undo
    }

    /// The recipe of a packed content or stream.
    fn recipe(&self, catalog: &Catalog, id: ContentId) -> Result<Arc<PlacedRecipe>> {
        if let Some(recipe) = self.recipes.lock().get(&id) {
            return Ok(recipe.clone());
        }
        let recipe = catalog.recipe(id)?.ok_or(Error::Posix(Errno::IO))?;
        let recipe = Arc::new(PlacedRecipe::from(recipe));
        self.recipes.lock().put(id, recipe.clone());
        Ok(recipe)
    }

    /// Reads a piece of a before-image.
    pub fn read_undo(
        &self,
        replicas: &ReplicaSet,
        catalog: &Catalog,
        place: UndoPlace,
        buffer: &mut [u8],
    ) -> Result<()> {
        match place.file {
            UndoFile::Segment(number) => self.undo.read(replicas, (number, place.offset), buffer),
            UndoFile::Stream(id) => self.read_packed(replicas, catalog, id, place.offset, buffer),
        }
    }

    /// Reads a piece of a packed content or stream of before-images.
    pub fn read_packed(
        &self,
        replicas: &ReplicaSet,
        catalog: &Catalog,
        id: ContentId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<()> {
        self.packs.read(replicas, &*self.recipe(catalog, id)?, offset, buffer)
    }

    /// Whether data or a hole begins at `at` of a packed content, and where it ends (at most
    /// `limit`).
    pub fn packed_run(
        &self,
        catalog: &Catalog,
        id: ContentId,
        at: u64,
        limit: u64,
    ) -> Result<(bool, u64)> {
        Ok(self.recipe(catalog, id)?.run(at, limit))
    }
}

/// Removes the shards of `preserved/` in which nothing waits: of a small store they would be most
/// of what history takes. They are made again when they are needed, so nothing has to be durable
/// here; to be called when nobody preserves or packs any more.
pub fn remove_empty_shards(replicas: &ReplicaSet) -> Result<()> {
    for shard in preserved_shards(replicas)? {
        let path = PrivateDir::Preserved(shard).path();
        let Some((above, name)) = path.split_last() else { continue };
        replicas.apply("remove", |_, b| {
            // One that is not empty stays, and any other that does not go is no harm.
            let _ = b.open_dir(&above).and_then(|above| b.rmdir(&above, name));
            Ok(())
        })?;
    }
    Ok(())
}

/// The shards of `preserved/` that there are.
fn preserved_shards(replicas: &ReplicaSet) -> Result<Vec<u8>> {
    let Some((above, _)) = PrivateDir::Preserved(0).path().split_last() else {
        return Ok(Vec::new());
    };
    let entries = replicas.read("list", |_, b| match b.open_dir(&above) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        dir => b.list(&dir?),
    })?;
    let shard = |entry: &DirEntry| {
        let name = std::str::from_utf8(entry.name.as_bytes()).ok()?;
        u8::from_str_radix(name, 16).ok()
    };
    Ok(entries.iter().filter_map(shard).collect())
}

fn remove_leftover(replicas: &ReplicaSet, dir: &Handles, name: &EntryName) -> Result<()> {
    replicas.apply("remove", |id, b| match b.unlink(dir.get(id)?, name) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        answer => answer,
    })?;
    Ok(())
}

/// Reads small ranges, by where they begin, all at the same time: one after the other each would
/// wait for the disk.
fn read_together(
    replicas: &ReplicaSet,
    file: &Arc<Handles>,
    ranges: &[ByteRange],
) -> Result<HashMap<u64, Vec<u8>>> {
    let small = |range: &&ByteRange| (1..=PEEK_BYTES).contains(&range.len());
    let mut ranges: Vec<ByteRange> = ranges.iter().filter(small).copied().collect();
    if ranges.len() < READ_TOGETHER_MIN {
        return Ok(HashMap::new());
    }
    ranges.sort_unstable_by_key(|range| range.start);
    let file = file.clone();
    replicas.read_whole("read", move |id, b| {
        let file = file.get(id)?;
        let place = |range: &ByteRange| Some((range.start, NonZeroU64::new(range.len())?));
        b.will_need(file, &ranges.iter().filter_map(place).collect::<Vec<_>>());
        let read = |range: &ByteRange| Ok((range.start, read_padded(b, file, *range)?));
        ranges.iter().map(read).collect()
    })
}

/// Reads a range. A file that is shorter than its sealed size was damaged behind our back; what is
/// missing reads as zeros, as it would from the live file.
fn read_padded(b: &dyn Backing, file: &Handle, range: ByteRange) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; range.len() as usize];
    let read = b.read_at(file, &mut bytes, range.start)?;
    bytes[read..].fill(0);
    Ok(bytes)
}

/// Reads what a file has in `piece`, or from its start on as far as there is data; or the hole that
/// begins there, which may be longer: up to `limit`. `known` is what was read of it before.
fn read_image(
    replicas: &ReplicaSet,
    file: &Handles,
    piece: ByteRange,
    limit: u64,
    known: Option<Vec<u8>>,
) -> Result<Image> {
    let ByteRange { start, mut end } = piece;
    // One image of a hole, however long: a file can be one of exabytes.
    let run = || replicas.read("seek", |id, b| run_at(b, file.get(id)?, start, limit));
    let is_small = piece.len() <= PEEK_BYTES;
    if !is_small {
        let (data, to) = run()?;
        if !data {
            return Ok(Image::Hole(ByteRange { start, end: to }));
        }
        end = end.min(to);
    }
    let range = ByteRange { start, end };
    let mut bytes = match known {
        Some(bytes) => bytes,
        None => replicas.read("read", |id, b| read_padded(b, file.get(id)?, range))?,
    };
    let is_zero = |block: &[u8]| block.iter().all(|&byte| byte == 0);
    if is_small && bytes.chunks(BLOCK_BYTES as usize).any(is_zero) {
        let (data, to) = run()?;
        if !data {
            return Ok(Image::Hole(ByteRange { start, end: to }));
        }
        bytes.truncate(bytes.len().min((to - start) as usize));
    }
    Ok(Image::Bytes(start, bytes))
}

/// Whether data or a hole begins at `at`, and where it ends (at most `limit`). Past the last data
/// everything is hole.
pub fn run_at(b: &dyn Backing, file: &Handle, at: u64, limit: u64) -> std::io::Result<(bool, u64)> {
    let data = match b.seek(file, at, Seek::Data) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok((false, limit)),
        other => other?,
    };
    if data > at {
        return Ok((false, data.min(limit)));
    }
    let hole = match b.seek(file, at, Seek::Hole) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => limit,
        other => other?,
    };
    Ok((true, hole.min(limit)))
}

/// The blocks that a change of `range` touches, as far as the sealed content reaches.
pub fn touched(range: ByteRange, sealed_size: u64) -> ByteRange {
    if range.start >= sealed_size {
        // What is appended was no part of it: a log that grows costs nothing.
        return ByteRange { start: range.start, end: range.start };
    }
    let start = range.start / BLOCK_BYTES * BLOCK_BYTES;
    let end = range.end.div_ceil(BLOCK_BYTES).saturating_mul(BLOCK_BYTES).min(sealed_size);
    ByteRange { start: start.min(end), end }
}

/// Tries a clone of a small file on every replica. Only where all can is it used: history is the
/// same on each.
fn all_can_reflink(replicas: &ReplicaSet) -> Result<bool> {
    let dir = replicas.private(PrivateDir::Tmp)?;
    for id in replicas.online().collect::<Vec<_>>() {
        let replica = replicas.get(id);
        if dir.get(id).and_then(|dir| try_reflink(replica.backing(), dir)).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Tries whether files in this directory can share blocks.
fn try_reflink(backing: &dyn Backing, dir: &Handle) -> std::io::Result<()> {
    let names = [probe_name(0), probe_name(1)];
    let outcome = (|| {
        let _ = names.iter().try_for_each(|name| backing.unlink(dir, name));
        let from = backing.create(dir, &names[0], 0o600, OWN)?;
        backing.write_at(&from, &[1; BLOCK_BYTES as usize], 0)?;
        let to = backing.create(dir, &names[1], 0o600, OWN)?;
        backing.clone_file(&from, &to)
    })();
    for name in &names {
        let _ = backing.unlink(dir, name);
    }
    outcome
}

fn probe_name(number: u32) -> EntryName {
    EntryName::new(format!("reflink-probe-{number}")).expect("a plain name")
}

/// Opens a whole content on the primary for reading, failing over.
pub fn open_whole(
    replicas: &ReplicaSet,
    node: NodeId,
    content: ContentId,
) -> Result<(ReplicaId, Handle)> {
    replicas.read("open", |id, _| Ok((id, open_whole_on(replicas, id, node, content)?)))
}

/// Opens a whole content on one replica for reading.
pub fn open_whole_on(
    replicas: &ReplicaSet,
    id: ReplicaId,
    node: NodeId,
    content: ContentId,
) -> std::io::Result<Handle> {
    let dir = replicas.private(preserved_dir(node)).map_err(|e| e.to_errno())?;
    let name = preserved_name(node, content);
    let replica = replicas.get(id);
    let backing = replica.backing();
    backing.open_file(dir.get(id)?, &name, Access::Read).map_err(missing)
}

/// A file of ours that is not there is the device's fault, not an answer: another replica has it.
fn missing(error: std::io::Error) -> std::io::Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        return std::io::Error::from_raw_os_error(libc::EIO);
    }
    error
}

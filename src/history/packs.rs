//! The pack files of a store: written to every replica, read from whichever has them whole.
//!
//! Promises that a pack has its name only when all its bytes are durable on that replica, and that
//! no byte is given out whose BLAKE3 is not the catalog's. What a read finds missing or damaged on
//! one replica it takes from the next, notes it, and leaves the repair to [`PackStore::heal`]; a
//! damaged pack never puts its replica out of use. Does not decide what is packed or forgotten.
//!
//! Lock order: `changes`, then any one of the others; none of those is held during I/O.

mod cache;
mod heal;
mod load;
mod prefetch;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::Mutex;
use rustix::io::Errno;

use crate::catalog::{ChunkRow, Recipe};
use crate::error::{Error, Result};
use crate::history::OWN;
use crate::history::pack::{Flaw, Frame, Pack};
use crate::replica::backing::{Backing, Handle, RenameMode};
use crate::replica::{PrivateDir, ReplicaSet};
use crate::types::{ChunkId, EntryName, PackId, ReplicaId};

use cache::{Found, FrameCache};
use heal::Damage;
use prefetch::Prefetcher;

/// Memory for decoded frames unless it is set otherwise, in bytes.
const CACHE_BYTES: u64 = 64 << 20;
/// The most pack files held open.
const OPEN_FILES_MAX: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");
/// The most recipes whose last read is remembered.
const READS_MAX: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");
/// A read that begins so near to the last one's end goes on from it: the kernel's readahead runs
/// on several threads, whose reads overtake each other.
const SEQUENTIAL_BYTES: u64 = 256 << 10;
/// Frames decoded ahead of a sequential reader.
const AHEAD_FRAMES: usize = 2;

/// The chunks of a content in order, with the places at which they end.
pub struct PlacedRecipe {
    /// Tells it from all others of this process.
    id: u64,
    chunks: Vec<ChunkRow>,
    /// For each chunk the offset in the content at which it ends.
    ends: Vec<u64>,
}

impl From<Recipe> for PlacedRecipe {
    fn from(recipe: Recipe) -> PlacedRecipe {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let add = |end: &mut u64, chunk: &ChunkRow| {
            *end += u64::from(chunk.length);
            Some(*end)
        };
        let ends = recipe.chunks.iter().scan(0, add).collect();
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        PlacedRecipe { id, chunks: recipe.chunks, ends }
    }
}

impl PlacedRecipe {
    /// Bytes of the content.
    pub fn size(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether data or a hole begins at `at`, and where it ends (at most `limit`).
    pub fn run(&self, at: u64, limit: u64) -> (bool, u64) {
        let first = self.index_at(at);
        let is_data = |index: usize| self.chunks[index].id != ChunkId::HOLE;
        let Some(data) = (first < self.chunks.len()).then(|| is_data(first)) else {
            return (false, limit);
        };
        let same = (first..self.chunks.len()).take_while(|&index| is_data(index) == data);
        let mut end = at;
        for index in same {
            end = self.ends[index];
            if end >= limit {
                break;
            }
        }
        (data, end.min(limit))
    }

    /// The index of the chunk that has the byte at `offset`.
    fn index_at(&self, offset: u64) -> usize {
        self.ends.partition_point(|&end| end <= offset)
    }
}

/// The packs of a mounted store.
pub struct PackStore {
    store: uuid::Uuid,
    frames: Arc<FrameCache>,
    files: Mutex<LruCache<(ReplicaId, PackId), Arc<Handle>>>,
    damages: Mutex<BTreeMap<(ReplicaId, PackId), Damage>>,
    /// Where the last read of a recipe ended.
    reads: Mutex<LruCache<u64, u64>>,
    prefetcher: Prefetcher,
    /// Held while pack files come or go, so that none is healed that is being removed.
    changes: Mutex<()>,
}

/// The directory of a pack.
pub fn pack_dir(id: PackId) -> PrivateDir {
    PrivateDir::Packs((id.0 & 0xff) as u8)
}

/// The name of a pack in its directory.
pub fn pack_name(id: PackId) -> EntryName {
    EntryName::new(format!("{:016x}.pack", id.0)).expect("hex digits and a suffix")
}

/// The inverse of [`pack_name`]; `None` for a name that is not ours.
pub fn parse_pack_name(name: &EntryName) -> Option<PackId> {
    let hex = std::str::from_utf8(name.as_bytes()).ok()?.strip_suffix(".pack")?;
    if hex.len() != 16 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    u64::from_str_radix(hex, 16).ok().map(PackId)
}

/// Where a pack lies below a backing's root, for people.
fn pack_path(id: PackId) -> String {
    pack_dir(id).path().join(&pack_name(id)).to_string().split_off(1)
}

/// Bytes of a pack that are written at once. The replicas' threads do that at the priority of
/// everybody's calls: between two pieces the others come first, for the packer is idle work.
const PIECE_BYTES: usize = 256 << 10;

/// Makes a pack file on one replica. If we die before the rename, the leftover is in `tmp/`, which
/// is emptied at mount; after it, the file is whole.
fn put_file(
    b: &dyn Backing,
    tmp: &Handle,
    dir: &Handle,
    id: PackId,
    bytes: &[u8],
) -> io::Result<()> {
    let name = pack_name(id);
    let _ = b.unlink(tmp, &name);
    let made = (|| {
        let file = b.create(tmp, &name, 0o600, OWN)?;
        for (index, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
            b.write_at(&file, piece, (index * PIECE_BYTES) as u64)?;
        }
        b.sync(&file, false)?;
        // A file that has the name already is the orphan of a mount that died before its commit.
        b.rename(tmp, &name, dir, &name, RenameMode::Replace)
    })();
    if made.is_err() {
        let _ = b.unlink(tmp, &name);
    }
    made?;
    b.sync(dir, false)
}

impl PackStore {
    /// The packs of the store `store`, none of them read yet.
    pub fn new(store: uuid::Uuid) -> PackStore {
        PackStore {
            store,
            frames: FrameCache::new(CACHE_BYTES),
            files: Mutex::new(LruCache::new(OPEN_FILES_MAX)),
            damages: Mutex::default(),
            reads: Mutex::new(LruCache::new(READS_MAX)),
            prefetcher: Prefetcher::new(),
            changes: Mutex::new(()),
        }
    }

    /// Sets how much memory decoded frames may take, in bytes.
    pub fn set_cache_bytes(&self, bytes: u64) {
        self.frames.set_limit(bytes);
    }

    /// Writes a pack to every replica; durable when it returns. `ENOSPC` if it does not fit
    /// everywhere. If we die before the catalog knows it, the file is an orphan:
    /// [`PackStore::list`] has it, the catalog does not.
    pub fn write(&self, replicas: &ReplicaSet, pack: &Pack) -> Result<()> {
        let _alone = self.changes.lock();
        // What lies elsewhere for as much goes as soon as this is recorded.
        replicas.ensure_room_for_a_while(pack.bytes.len() as u64)?;
        let tmp = replicas.private(PrivateDir::Tmp)?;
        let dir = replicas.private(pack_dir(pack.id))?;
        self.forget(pack.id);
        replicas.apply("write pack", |id, b| {
            put_file(b, tmp.get(id)?, dir.get(id)?, pack.id, &pack.bytes)
        })?;
        Ok(())
    }

    /// Removes a pack from every replica; one that is not there is fine. Not synced: a file that a
    /// power cut brings back is an orphan.
    pub fn remove(&self, replicas: &ReplicaSet, id: PackId) -> Result<()> {
        let _alone = self.changes.lock();
        let dir = replicas.private(pack_dir(id))?;
        let name = pack_name(id);
        self.forget(id);
        replicas.apply("remove pack", |replica, b| match b.unlink(dir.get(replica)?, &name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            answer => answer,
        })?;
        Ok(())
    }

    /// The packs on any online replica, in order. A replica that cannot be listed is passed over,
    /// unless none can.
    pub fn list(&self, replicas: &ReplicaSet) -> Result<Vec<PackId>> {
        let mut all = BTreeSet::new();
        let mut listed = false;
        for id in replicas.online() {
            let replica = replicas.get(id);
            match list_on(replica.backing()) {
                Ok(packs) => {
                    all.extend(packs);
                    listed = true;
                }
                Err(error) => {
                    log::warn!("{}: cannot list the packs: {error}", replica.path.display());
                }
            }
        }
        if listed { Ok(all.into_iter().collect()) } else { Err(Errno::IO.into()) }
    }

    /// Fills `buffer` from the bytes of a recipe that begin at `offset`. The caller guarantees that
    /// they lie within it; else `EINVAL`. [`Error::Damaged`] if no replica has them.
    pub fn read(
        &self,
        replicas: &ReplicaSet,
        recipe: &PlacedRecipe,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<()> {
        let end = offset.saturating_add(buffer.len() as u64);
        if end > recipe.size() {
            return Err(Errno::INVAL.into());
        }
        let mut index = recipe.index_at(offset);
        let mut filled = 0;
        while filled < buffer.len() {
            let row = &recipe.chunks[index];
            if row.id == ChunkId::HOLE {
                let count =
                    ((recipe.ends[index] - offset) as usize - filled).min(buffer.len() - filled);
                buffer[filled..filled + count].fill(0);
                filled += count;
                index += 1;
                continue;
            }
            let frame = self.frame(replicas, row)?;
            let chunk = self.chunk(&frame, row)?;
            let begin = recipe.ends[index] - u64::from(row.length);
            let from = (offset + filled as u64 - begin) as usize;
            let count = (chunk.len() - from).min(buffer.len() - filled);
            buffer[filled..filled + count].copy_from_slice(&chunk[from..from + count]);
            filled += count;
            index += 1;
        }
        if self.is_sequential(recipe, offset, end) {
            self.prefetch(replicas, recipe, end);
        }
        Ok(())
    }

    /// The bytes of one chunk. [`Error::Damaged`] if no replica has them.
    pub fn read_chunk(&self, replicas: &ReplicaSet, row: &ChunkRow) -> Result<Vec<u8>> {
        let frame = self.frame(replicas, row)?;
        Ok(self.chunk(&frame, row)?.to_vec())
    }

    fn chunk<'a>(&self, frame: &'a Frame, row: &ChunkRow) -> Result<&'a [u8]> {
        frame.chunk(row).map_err(|flaw| damaged(row.place.pack, flaw.to_string()))
    }

    /// The decoded frame of a chunk, which is in it.
    fn frame(&self, replicas: &ReplicaSet, row: &ChunkRow) -> Result<Arc<Frame>> {
        let key = (row.place.pack, row.place.frame);
        let claim = match self.frames.get(key) {
            Found::Frame(frame) if frame.chunk(row).is_ok() => return Ok(frame),
            Found::Frame(_) => {
                // One replica's file is not the catalog's; another's may be.
                self.frames.forget(key);
                None
            }
            Found::Claim(claim) => Some(claim),
        };
        let frame = Arc::new(self.load(replicas, row)?);
        if let Some(claim) = claim {
            claim.fill(&frame);
        }
        Ok(frame)
    }

    /// Whether a read goes on from the last one of its recipe; remembers its end.
    fn is_sequential(&self, recipe: &PlacedRecipe, offset: u64, end: u64) -> bool {
        let last = self.reads.lock().push(recipe.id, end);
        // `push` also gives back another recipe that had to leave.
        last.is_some_and(|(id, last)| id == recipe.id && last.abs_diff(offset) <= SEQUENTIAL_BYTES)
    }

    /// Has the frames after `offset` decoded in the background. Their stored bytes are read here
    /// and now, which the kernel has mostly done already. Failures are left to the read that needs
    /// the frame.
    fn prefetch(&self, replicas: &ReplicaSet, recipe: &PlacedRecipe, offset: u64) {
        let mut keys = Vec::with_capacity(AHEAD_FRAMES);
        for row in &recipe.chunks[recipe.index_at(offset)..] {
            let key = (row.place.pack, row.place.frame);
            if row.id == ChunkId::HOLE || keys.contains(&key) {
                continue;
            }
            if keys.len() == AHEAD_FRAMES {
                return;
            }
            keys.push(key);
            let Some(claim) = self.frames.claim(key) else { continue };
            let intact = |id: &ReplicaId| !self.is_damaged(*id, row.place.pack);
            let Some(id) = replicas.online().find(intact) else { return };
            let Ok(bytes) = self.fetch(replicas, id, row.place) else { return };
            self.prefetcher.decode(claim, bytes, row.clone());
        }
    }

    /// Forgets what is kept open and known of a pack whose file was replaced.
    pub fn reopen(&self, id: PackId) {
        self.forget(id);
    }

    /// Forgets all that is known of a pack, which comes or goes.
    fn forget(&self, id: PackId) {
        self.frames.forget_pack(id);
        self.damages.lock().retain(|(_, pack), _| *pack != id);
        self.close(|_, pack| pack == id);
    }

    /// Another backing stands for this replica from here on.
    pub fn replica_changed(&self, id: ReplicaId) {
        self.damages.lock().retain(|(replica, _), _| *replica != id);
        self.close(|replica, _| replica == id);
    }

    /// Closes kept files.
    fn close(&self, which: impl Fn(ReplicaId, PackId) -> bool) {
        let mut files = self.files.lock();
        let keys = files.iter().map(|(key, _)| *key).filter(|&(id, pack)| which(id, pack));
        let keys: Vec<_> = keys.collect();
        let closed: Vec<_> = keys.iter().filter_map(|key| files.pop(key)).collect();
        drop(files);
        // Closed without the lock.
        drop(closed);
    }
}

/// The packs on one backing.
fn list_on(b: &dyn Backing) -> io::Result<Vec<PackId>> {
    let mut packs = Vec::new();
    for shard in 0..=255 {
        let dir = match b.open_dir(&PrivateDir::Packs(shard).path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            dir => dir?,
        };
        let names = b.list(&dir)?;
        let ids = names.iter().filter_map(|entry| parse_pack_name(&entry.name));
        packs.extend(ids.filter(|id| id.0 & 0xff == u64::from(shard)));
    }
    Ok(packs)
}

/// The error of a pack that no replica has whole.
fn damaged(id: PackId, detail: String) -> Error {
    Error::Damaged {
        what: format!("the pack {}", pack_path(id)),
        detail,
        remedy: "No replica in use has it whole; bring one back that has it, or copy the file from \
                 a backup of a backing",
    }
}

/// Why a pack could not be read on one replica.
enum Trouble {
    /// The system's answer.
    Io(io::Error),
    /// Its bytes are wrong.
    Flaw(Flaw),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Trouble {
        Trouble::Io(error)
    }
}

impl From<Flaw> for Trouble {
    fn from(flaw: Flaw) -> Trouble {
        Trouble::Flaw(flaw)
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trouble::Io(error) if error.kind() == io::ErrorKind::NotFound => {
                f.write_str("the file is missing")
            }
            Trouble::Io(error) => error.fmt(f),
            Trouble::Flaw(flaw) => flaw.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests;

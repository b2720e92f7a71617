//! Packs on two replicas: reading, failover, healing, the cache.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tempfile::TempDir;

use super::*;
use crate::history::chunker;
use crate::history::pack::tests::{noise, row};
use crate::history::pack::{PackBuilder, scan};
use crate::replica::Replica;
use crate::replica::dir_backing::DirBacking;
use crate::replica::faulty::{Faulty, Injected};

const ID: PackId = PackId(0x1_0007);

/// A backing's calls that fail from now on.
type Failing = Arc<Mutex<Option<(&'static str, Errno)>>>;

struct Rig {
    set: ReplicaSet,
    dirs: Vec<TempDir>,
    failing: Vec<Failing>,
    store: PackStore,
    content: Vec<u8>,
    chunks: Vec<ChunkRow>,
}

/// A pack of a content's chunks.
fn pack_of(store: uuid::Uuid, id: PackId, content: &[u8]) -> Pack {
    let mut builder = PackBuilder::new(store, id);
    for range in chunker::cut(content) {
        builder.add(*blake3::hash(&content[range.clone()]).as_bytes(), &content[range]);
    }
    builder.finish()
}

impl Rig {
    /// Two replicas that have a content of 1.5 MiB in a pack.
    fn new() -> Rig {
        let dirs: Vec<_> = (0..2).map(|_| TempDir::new().expect("a directory")).collect();
        let failing: Vec<Failing> = (0..2).map(|_| Arc::default()).collect();
        let replicas = dirs.iter().zip(&failing).map(|(dir, failing)| {
            let inner = Box::new(DirBacking::open(dir.path()).expect("open"));
            let failing = failing.clone();
            let plan = Arc::new(move |call: crate::replica::faulty::Call<'_>| {
                let fails = failing.lock().filter(|(op, _)| *op == call.op);
                fails.map(|(_, errno)| Injected::Error(errno))
            });
            let faulty = Box::new(Faulty::new(inner, plan));
            Replica::new(uuid::Uuid::new_v4(), "r", dir.path(), faulty)
        });
        let set = ReplicaSet::new(replicas.collect());
        let uuid = uuid::Uuid::new_v4();
        let store = PackStore::new(uuid);
        let mut content = noise(1, 1 << 20);
        content.extend(b"a text that compresses. ".iter().cycle().take(1 << 19));
        let pack = pack_of(uuid, ID, &content);
        store.write(&set, &pack).expect("write");
        let chunks = pack.chunks.iter().map(row).collect();
        Rig { set, dirs, failing, store, content, chunks }
    }

    fn recipe(&self) -> PlacedRecipe {
        PlacedRecipe::from(Recipe { chunks: self.chunks.clone() })
    }

    fn file(&self, replica: usize) -> PathBuf {
        self.dirs[replica].path().join(pack_path(ID))
    }

    fn bytes(&self, replica: usize) -> Vec<u8> {
        std::fs::read(self.file(replica)).expect("read the pack")
    }

    fn read(&self) -> Result<Vec<u8>> {
        let mut buffer = vec![0; self.content.len()];
        self.store.read(&self.set, &self.recipe(), 0, &mut buffer)?;
        Ok(buffer)
    }

    fn quarantined(&self, replica: usize) -> usize {
        let dir = self.dirs[replica].path().join(".rearview/quarantine");
        std::fs::read_dir(dir).map_or(0, Iterator::count)
    }

    fn key(&self, chunk: usize) -> cache::Key {
        (ID, self.chunks[chunk].place.frame)
    }

    /// What must hold after any damage to the first replica's pack.
    fn read_and_heal(&self, quarantined: usize) {
        let good = self.bytes(1);
        assert!(self.read().expect("the other has it") == self.content);
        assert_eq!(self.store.damages.lock().len(), 1);
        assert_eq!(self.set.online().count(), 2, "nobody is out of use");
        assert_eq!(self.store.heal(&self.set).expect("heal"), 1);
        assert!(self.bytes(0) == good);
        assert_eq!(self.quarantined(0), quarantined);
        assert_eq!(self.store.verify(&self.set, ID).expect("verify"), 0);
        assert_eq!(self.store.heal(&self.set).expect("nothing left"), 0);
    }
}

/// Overwrites a byte where the pack's first frame has its data.
fn flip(path: &std::path::Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 0x10], at).expect("write");
}

#[test]
fn what_is_written_is_on_every_replica_and_read_back() {
    let rig = Rig::new();
    assert!(rig.bytes(0) == rig.bytes(1));
    assert!(scan(&rig.bytes(0)).is_ok());
    assert_eq!(rig.store.list(&rig.set).expect("list"), [ID]);
    let recipe = rig.recipe();
    assert_eq!(recipe.size(), rig.content.len() as u64);
    assert!(rig.read().expect("read") == rig.content);
    for (offset, length) in [(0, 1), (65_535, 2), (100_000, 700_000), (1_500_000, 72_864)] {
        let mut buffer = vec![0; length];
        rig.store.read(&rig.set, &recipe, offset, &mut buffer).expect("read");
        assert!(buffer == rig.content[offset as usize..offset as usize + length]);
    }
    let chunk = rig.store.read_chunk(&rig.set, &rig.chunks[1]).expect("read");
    assert_eq!(blake3::hash(&chunk), rig.chunks[1].hash);
}

#[test]
fn a_read_past_the_end_is_refused() {
    let rig = Rig::new();
    let outside = rig.store.read(&rig.set, &rig.recipe(), recipe_end(&rig), &mut [0]);
    assert!(outside.is_err_and(|error| error.is(Errno::INVAL)));
    rig.store.read(&rig.set, &rig.recipe(), recipe_end(&rig), &mut []).expect("nothing to read");
}

fn recipe_end(rig: &Rig) -> u64 {
    rig.content.len() as u64
}

#[test]
fn a_removed_pack_is_gone_and_removing_it_again_is_fine() {
    let rig = Rig::new();
    rig.read().expect("read");
    rig.store.remove(&rig.set, ID).expect("remove");
    rig.store.remove(&rig.set, ID).expect("again");
    assert_eq!(rig.store.list(&rig.set).expect("list"), []);
    assert!(!rig.file(0).exists() && !rig.file(1).exists());
    assert!(matches!(rig.read(), Err(Error::Damaged { .. })));
}

#[test]
fn only_packs_are_listed() {
    let rig = Rig::new();
    let dir = rig.file(1).parent().expect("a shard").to_owned();
    for name in
        ["00000000000000ff.pack", "0000000000000107.pack.part", "x", "000000000000010G.pack"]
    {
        std::fs::write(dir.join(name), b"").expect("write");
    }
    std::fs::write(dir.join("0000000000000107.pack"), b"").expect("an orphan");
    assert_eq!(rig.store.list(&rig.set).expect("list"), [PackId(0x107), ID]);
}

#[test]
fn a_deleted_file_is_healed() {
    let rig = Rig::new();
    std::fs::remove_file(rig.file(0)).expect("remove");
    rig.read_and_heal(0);
}

#[test]
fn a_truncated_file_is_healed() {
    let rig = Rig::new();
    let file = std::fs::OpenOptions::new().write(true).open(rig.file(0)).expect("open");
    file.set_len(70_000).expect("truncate");
    rig.read_and_heal(1);
}

#[test]
fn a_flipped_bit_is_healed() {
    let rig = Rig::new();
    flip(&rig.file(0), 5000);
    rig.read_and_heal(1);
    let health = rig.set.health(rig.set.primary().expect("one"));
    assert_eq!((health.read_errors, health.checksum_errors), (0, 1));
}

#[test]
fn another_packs_bytes_are_healed() {
    let rig = Rig::new();
    let other = pack_of(rig.store.store, ID, &noise(9, 1 << 20));
    std::fs::write(rig.file(0), &other.bytes).expect("write");
    rig.read_and_heal(1);
}

#[test]
fn a_device_that_cannot_read_is_passed_over_and_found_well_again() {
    let rig = Rig::new();
    *rig.failing[0].lock() = Some(("read_at", Errno::IO));
    assert!(rig.read().expect("the other has it") == rig.content);
    assert_eq!(rig.set.online().count(), 2);
    let health = rig.set.health(rig.set.primary().expect("one"));
    assert!(health.read_errors > 0);
    assert_eq!(health.checksum_errors, 0);
    *rig.failing[0].lock() = None;
    assert_eq!(rig.store.heal(&rig.set).expect("heal"), 0);
    assert!(rig.store.damages.lock().is_empty());
    assert_eq!(rig.quarantined(0), 0);
}

#[test]
fn a_device_that_stays_unreadable_gets_the_pack_anew() {
    let rig = Rig::new();
    *rig.failing[0].lock() = Some(("read_at", Errno::IO));
    rig.read().expect("the other has it");
    assert_eq!(rig.store.heal(&rig.set).expect("heal"), 1);
    assert_eq!(rig.quarantined(0), 1);
    assert!(rig.bytes(0) == rig.bytes(1));
}

#[test]
fn what_cannot_be_healed_is_kept_for_later() {
    let rig = Rig::new();
    flip(&rig.file(0), 5000);
    rig.read().expect("the other has it");
    *rig.failing[0].lock() = Some(("create", Errno::NOSPC));
    assert_eq!(rig.store.heal(&rig.set).expect("heal"), 0);
    assert!(!rig.file(0).exists(), "the damaged file is in quarantine");
    *rig.failing[0].lock() = None;
    assert_eq!(rig.store.heal(&rig.set).expect("heal"), 1);
    assert!(rig.bytes(0) == rig.bytes(1));
}

#[test]
fn a_chunk_that_no_replica_has_is_an_error_that_names_the_pack() {
    let rig = Rig::new();
    flip(&rig.file(0), 5000);
    std::fs::remove_file(rig.file(1)).expect("remove");
    let error = rig.read().expect_err("no replica has it");
    let text = error.to_string();
    assert!(text.contains(".rearview/packs/07/0000000000010007.pack"), "{text}");
    assert!(text.contains("hash") && text.contains("missing"), "{text}");
    assert_eq!(error.to_errno(), Errno::IO);
    assert_eq!(rig.store.heal(&rig.set).expect("heal"), 0);
    assert_eq!(rig.store.damages.lock().len(), 2);
}

#[test]
fn each_replica_gives_what_the_other_lacks() {
    let rig = Rig::new();
    let last = rig.chunks.iter().max_by_key(|row| row.place.frame).expect("chunks");
    flip(&rig.file(0), 5000);
    flip(&rig.file(1), last.place.frame + 60);
    assert!(rig.read().expect("read") == rig.content);
}

#[test]
fn verify_finds_what_no_read_has_touched() {
    let rig = Rig::new();
    assert_eq!(rig.store.verify(&rig.set, ID).expect("verify"), 0);
    let trailer = rig.bytes(1).len() as u64 - 1;
    flip(&rig.file(1), trailer);
    assert_eq!(rig.store.verify(&rig.set, ID).expect("verify"), 1);
    assert_eq!(rig.store.heal(&rig.set).expect("heal"), 1);
    assert!(rig.bytes(0) == rig.bytes(1));
}

#[test]
fn a_failed_write_leaves_nothing() {
    let rig = Rig::new();
    *rig.failing[0].lock() = Some(("rename", Errno::NOSPC));
    let pack = pack_of(rig.store.store, PackId(8), &noise(2, 1000));
    assert!(rig.store.write(&rig.set, &pack).is_err_and(|error| error.is(Errno::NOSPC)));
    assert_eq!(rig.store.list(&rig.set).expect("list"), [ID]);
    let tmp = rig.dirs[0].path().join(".rearview/tmp");
    assert_eq!(std::fs::read_dir(tmp).expect("list").count(), 0);
}

#[test]
fn the_cache_keeps_its_limit() {
    let rig = Rig::new();
    rig.store.set_cache_bytes(300_000);
    rig.read().expect("read");
    assert!((1..=300_000).contains(&rig.store.frames.bytes()));
    rig.store.set_cache_bytes(0);
    assert_eq!(rig.store.frames.bytes(), 0);
    assert!(rig.read().expect("read") == rig.content);
    assert_eq!(rig.store.frames.bytes(), 0);
}

#[test]
fn a_cached_frame_needs_no_replica() {
    let rig = Rig::new();
    rig.read().expect("read");
    *rig.failing[0].lock() = Some(("read_at", Errno::IO));
    *rig.failing[1].lock() = Some(("read_at", Errno::IO));
    assert!(rig.read().expect("from memory") == rig.content);
}

#[test]
fn a_sequential_read_finds_the_next_frames_decoded() {
    let rig = Rig::new();
    let recipe = rig.recipe();
    let end = u64::from(rig.chunks[0].length);
    let mut buffer = vec![0; 4096];
    rig.store.read(&rig.set, &recipe, 0, &mut buffer).expect("read");
    assert!(!rig.store.frames.has(rig.key(1)), "one read is no sequence");
    rig.store.read(&rig.set, &recipe, end - 4096, &mut buffer).expect("read");
    let deadline = Instant::now() + Duration::from_secs(20);
    while !(rig.store.frames.has(rig.key(1)) && rig.store.frames.has(rig.key(2))) {
        assert!(Instant::now() < deadline, "nothing was decoded ahead");
        std::thread::yield_now();
    }
    assert!(!rig.store.frames.has(rig.key(3)), "two frames ahead and no more");
}

#[test]
fn many_readers_at_once_get_the_right_bytes() {
    let rig = Rig::new();
    let recipe = rig.recipe();
    std::thread::scope(|scope| {
        for reader in 0..8u64 {
            let (rig, recipe) = (&rig, &recipe);
            scope.spawn(move || {
                for round in 0..50u64 {
                    let offset = (reader * 37 + round * 7919 * 13) % 1_500_000;
                    let mut buffer = vec![0; 5000];
                    rig.store.read(&rig.set, recipe, offset, &mut buffer).expect("read");
                    assert!(buffer == rig.content[offset as usize..][..5000]);
                }
            });
        }
    });
    let cached = rig.store.frames.bytes();
    assert!(cached <= rig.content.len() as u64 + 4096, "{cached}");
    assert!(rig.store.frames.claim(rig.key(0)).is_none(), "it is there");
}

#[test]
fn a_claim_that_is_given_up_passes_on() {
    let cache = FrameCache::new(1 << 20);
    let key = (ID, 32);
    let Found::Claim(claim) = cache.get(key) else { panic!("the cache is empty") };
    assert!(cache.claim(key).is_none());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| matches!(cache.get(key), Found::Claim(_)));
        drop(claim);
        assert!(waiting.join().expect("no panic"));
    });
    assert!(cache.claim(key).is_some());
}

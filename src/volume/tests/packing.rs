//! The packer when somebody waits for it.

use std::cell::Cell;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::history::packer::{Claim, Packer};
use crate::history::packs::{pack_dir, pack_name};
use crate::types::ContentId;

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };
/// Deleted files, each with bytes of its own, that wait to be packed.
const DELETED: usize = 60;
/// So many of them may still be taken up once it is to end.
const FEW: usize = 2;

fn volume_with_deleted_files(dirs: &[tempfile::TempDir], count: usize) -> Arc<Volume> {
    let volume = open_volume(open_store(dirs));
    let names = (0..count).map(|n| EntryName::new(format!("f{n}")).unwrap());
    for name in names.clone() {
        let (node, _) = volume.create(NodeId::ROOT, &name, 0o644, true, &CALLER).unwrap();
        volume.write(&node, 0, name.as_bytes(), false, &CALLER).unwrap();
        volume.release(&node, true).unwrap();
        let id = node.id;
        drop(node);
        volume.forget(id, 1);
    }
    volume.create_snapshot("one", false, &[]).unwrap();
    names.for_each(|name| volume.unlink(NodeId::ROOT, &name, &CALLER).unwrap());
    assert_eq!(waiting(&volume), count);
    volume
}

fn waiting(volume: &Volume) -> usize {
    volume.catalog().waiting_contents(ContentId::EMPTY, usize::MAX).unwrap().len()
}

/// What the snapshot has is read back, wherever it lies.
fn all_is_there(volume: &Volume) {
    let at = volume.catalog().snapshot("one").unwrap().unwrap().generation;
    for n in 0..DELETED {
        let name = EntryName::new(format!("f{n}")).unwrap();
        let row = volume.catalog().lookup_at(at, NodeId::ROOT, &name).unwrap().unwrap();
        let mut bytes = [0; 8];
        let got = volume.read_content(row.id, row.content, 0, &mut bytes).unwrap();
        assert_eq!(&bytes[..got], name.as_bytes());
    }
}

#[test]
fn a_packer_that_is_to_end_takes_up_few_contents_more_and_finishes_what_it_has() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = volume_with_deleted_files(&dirs, DELETED);
    let (looks, end) = (Cell::new(0), Cell::new(usize::MAX));
    let is_over = || {
        looks.set(looks.get() + 1);
        looks.get() > end.get()
    };
    let replicas = volume.replicas();
    let mut packer = Packer::new(&volume.history, replicas, volume.catalog(), &|_| Ok(()));
    packer = packer.until(&is_over);
    // While it still looks what there is.
    let mut claims = 0;
    let mut claim = |_: &_| {
        claims += 1;
        if claims == 5 {
            end.set(looks.get());
        }
        Ok(Claim::Pack)
    };
    let (_, run) = packer.contents(ContentId::EMPTY, &mut claim).unwrap();
    assert!(!run.done);
    assert!(claims <= 5 + FEW, "{claims}");
    assert!(run.count <= FEW as u64, "{run:?}");
    // While it packs, after as many looks as there are contents, and ten.
    let left = waiting(&volume);
    looks.set(0);
    end.set(left + 10);
    let (_, run) = packer.contents(ContentId::EMPTY, &mut |_| Ok(Claim::Pack)).unwrap();
    assert!(!run.done);
    assert!((10 - FEW..=10 + FEW).contains(&(run.count as usize)), "{run:?} of {left}");
    assert_eq!(waiting(&volume), left - run.count as usize, "what it has is finished");
    all_is_there(&volume);
    volume.close().unwrap();
}

#[test]
fn who_waits_for_the_background_work_gets_it_from_the_packer() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = volume_with_deleted_files(&dirs, DELETED);
    volume.urgent.fetch_add(1, Ordering::Relaxed);
    let packed = volume.pack_in_steps(&|_| Ok(()));
    assert!(matches!(packed, Err(Error::Interrupted)), "{packed:?}");
    assert_eq!(waiting(&volume), DELETED);
    volume.urgent.fetch_sub(1, Ordering::Relaxed);
    assert_eq!(volume.pack_in_steps(&|_| Ok(())).unwrap().count, DELETED as u64);
    assert_eq!(waiting(&volume), 0);
    all_is_there(&volume);
    volume.close().unwrap();
}

/// The names in all shards of `preserved/`.
fn preserved_files(dir: &tempfile::TempDir) -> usize {
    let shards = std::fs::read_dir(dir.path().join(".rearview/preserved")).unwrap();
    shards.map(|shard| std::fs::read_dir(shard.unwrap().path()).unwrap().count()).sum()
}

#[test]
fn what_is_forgotten_leaves_no_file_when_whoever_forgets_it_is_stopped() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    for pass_after in [true, false] {
        let volume = volume_with_deleted_files(&dirs, DELETED);
        volume.catalog().delete_snapshot("one").unwrap();
        let now = volume.catalog().generation();
        volume.catalog().thin(now, &std::collections::BTreeSet::new()).unwrap();
        volume.forget_deletions(now).unwrap();
        while waiting(&volume) == DELETED {
            let stopped = volume.free_unused(&|| Err(Error::Interrupted));
            assert!(matches!(stopped, Err(Error::Interrupted)), "{stopped:?}");
        }
        if pass_after {
            volume.free_unused(&|| Ok(())).unwrap();
            assert_eq!(waiting(&volume), 0);
        }
        let left = waiting(&volume);
        volume.close().unwrap();
        for dir in &dirs {
            assert_eq!(preserved_files(dir), left, "{pass_after}");
        }
    }
}

/// Bytes that no codec makes smaller.
fn noise(seed: u8, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn a_copy_of_packs_that_fails_midway_leaves_no_pack_that_nobody_knows() {
    // So many small ones are joined, and become more than one.
    const PACKS: u8 = 18;
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = open_volume(open_store(&dirs));
    let name = EntryName::new("file").unwrap();
    for seed in 0..PACKS {
        let (node, _) = volume.create(NodeId::ROOT, &name, 0o644, true, &CALLER).unwrap();
        volume.write(&node, 0, &noise(seed, 1000 << 10), false, &CALLER).unwrap();
        volume.release(&node, true).unwrap();
        let id = node.id;
        drop(node);
        volume.forget(id, 1);
        volume.create_snapshot(&format!("s{seed}"), false, &[]).unwrap();
        volume.unlink(NodeId::ROOT, &name, &CALLER).unwrap();
        let (history, replicas) = (&volume.history, volume.replicas());
        let mut packer = Packer::new(history, replicas, volume.catalog(), &|_| Ok(()));
        packer.contents(ContentId::EMPTY, &mut |_| Ok(Claim::Pack)).unwrap();
    }
    let known = || volume.catalog().packs().unwrap().len();
    let on_disk = || volume.history.packs().list(volume.replicas()).unwrap().len();
    assert_eq!((known(), on_disk()), (PACKS.into(), PACKS.into()));
    // The last one cannot be read.
    let last = volume.catalog().packs().unwrap().last().unwrap().id;
    for dir in &dirs {
        let path = pack_dir(last).path().join(&pack_name(last)).to_bytes();
        std::fs::write(dir.path().join(OsStr::from_bytes(&path)), b"no pack").unwrap();
    }
    let (history, replicas) = (&volume.history, volume.replicas());
    let written = AtomicUsize::new(0);
    let step = |step: &str| {
        written.fetch_add((step == "a pack was written").into(), Ordering::Relaxed);
        Ok(())
    };
    Packer::new(history, replicas, volume.catalog(), &step).repack(u64::MAX).unwrap_err();
    assert_eq!(written.into_inner(), 1);
    assert_eq!((known(), on_disk()), (PACKS.into(), PACKS.into()));
    volume.close().unwrap();
}

/// A file of `count` bytes that were overwritten in place.
fn overwritten_file(volume: &Volume, name: &str, seed: u8, count: usize) -> NodeId {
    let name = EntryName::new(name).unwrap();
    let (node, _) = volume.create(NodeId::ROOT, &name, 0o644, true, &CALLER).unwrap();
    volume.write(&node, 0, &noise(seed, count), false, &CALLER).unwrap();
    volume.create_snapshot(&format!("before-{seed}"), false, &[]).unwrap();
    volume.write(&node, 0, &noise(seed + 1, count), false, &CALLER).unwrap();
    volume.release(&node, true).unwrap();
    let id = node.id;
    drop(node);
    volume.forget(id, 1);
    volume.settle().unwrap();
    id
}

fn undo_segments(dir: &tempfile::TempDir) -> usize {
    std::fs::read_dir(dir.path().join(".rearview/undo")).unwrap().count()
}

#[test]
fn a_segment_of_which_nothing_is_left_goes_with_the_next_pass_whatever_else_waits() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = volume_with_deleted_files(&dirs, DELETED);
    let node = overwritten_file(&volume, "a", 1, 1 << 20);
    volume.history.undo().rotate(volume.replicas()).unwrap();
    let b = overwritten_file(&volume, "b", 3, 64 << 10);
    volume.maintain();
    assert_eq!(dirs.each_ref().map(undo_segments), [2, 2]);
    volume.forget_nodes(&[node]).unwrap();
    // Nothing is packed in this volume by itself, so what was deleted goes on waiting.
    volume.maintain();
    assert_eq!(dirs.each_ref().map(undo_segments), [1, 1]);
    assert_eq!(waiting(&volume), DELETED);
    // The one that is appended to is no exception.
    let late = overwritten_file(&volume, "c", 5, 64 << 10);
    volume.forget_nodes(&[late, b]).unwrap();
    volume.maintain();
    assert_eq!(dirs.each_ref().map(undo_segments), [0, 0]);
    assert_eq!(waiting(&volume), DELETED);
    all_is_there(&volume);
    volume.close().unwrap();
}

#[test]
fn contents_for_which_there_is_no_room_keep_no_segment_from_being_packed() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = volume_with_deleted_files(&dirs, DELETED);
    overwritten_file(&volume, "a", 1, 1 << 20);
    assert_eq!(dirs.each_ref().map(undo_segments), [1, 1]);
    // No pack of contents has room: the first try, and the one in pieces.
    let tries = AtomicUsize::new(0);
    let step = |step: &str| match step {
        "a pack was written" if tries.fetch_add(1, Ordering::Relaxed) < 2 => {
            Err(Error::Posix(rustix::io::Errno::NOSPC))
        }
        _ => Ok(()),
    };
    let packed = volume.pack_in_steps(&step);
    assert!(matches!(&packed, Err(error) if error.is(rustix::io::Errno::NOSPC)), "{packed:?}");
    assert_eq!(tries.into_inner(), 3);
    assert_eq!(waiting(&volume), DELETED);
    assert_eq!(dirs.each_ref().map(undo_segments), [0, 0]);
    all_is_there(&volume);
    volume.close().unwrap();
}

/// Whether some of these bytes lie in a pack.
fn is_packed(dir: &tempfile::TempDir, bytes: &[u8]) -> bool {
    let packs = files_below(&dir.path().join(".rearview/packs"));
    packs.iter().any(|pack| {
        let all = std::fs::read(pack).unwrap();
        all.windows(64).any(|window| window == &bytes[1000..1064])
    })
}

/// All files below a directory.
fn files_below(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn a_purge_that_is_ended_midway_is_finished_in_the_background() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = open_volume(open_store(&dirs));
    // In one stream, for they lie in one segment.
    let a = overwritten_file(&volume, "a", 1, 64 << 10);
    overwritten_file(&volume, "b", 3, 64 << 10);
    volume.tidy_history().unwrap();
    let packed = |seed| dirs.each_ref().map(|dir| is_packed(dir, &noise(seed, 64 << 10)));
    assert_eq!((packed(1), packed(3)), ([true; 2], [true; 2]));
    volume.urgent.fetch_add(1, Ordering::Relaxed);
    let ended = volume.purge(&[a], Vec::new());
    assert!(
        matches!(&ended, Err(Error::Refused(text)) if text.contains("tried again")),
        "{ended:?}"
    );
    volume.urgent.fetch_sub(1, Ordering::Relaxed);
    assert_eq!(packed(1), [true; 2]);
    volume.close().unwrap();
    drop(volume);
    let volume = open_volume(open_store(&dirs));
    volume.maintain();
    assert_eq!((packed(1), packed(3)), ([false; 2], [true; 2]));
    volume.close().unwrap();
}

/// Of a pack of tiny chunks most is its journal. Once the disk was full, such a one was
/// copied again and again, and whoever made a file waited for ever.
#[test]
fn a_pack_of_tiny_chunks_is_not_copied_for_what_its_copy_has_as_well() {
    const TINY: usize = 2500;
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = volume_with_deleted_files(&dirs, TINY);
    volume.tidy_history().unwrap();
    let packs = volume.catalog().packs().unwrap();
    let &[pack] = &packs[..] else { panic!("one pack, not {packs:?}") };
    let beside = pack.bytes - pack.live;
    assert!(beside > 64 << 10 && beside * 100 > pack.bytes * 40, "{pack:?}");
    assert!(!volume.squeeze().unwrap());
    assert_eq!(volume.packer(&|_| Ok(())).repack(u64::MAX).unwrap(), 0);
    assert_eq!(volume.catalog().packs().unwrap(), packs);
    volume.close().unwrap();
}

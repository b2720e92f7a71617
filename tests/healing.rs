//! Damage to packs while the mount is in use: every read of the past is right all the same, and the
//! packs are whole again without anybody asking for it.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Mounted, wait_until};

const FILES: u64 = 12;
const FILE_BYTES: usize = 2 << 20;

/// Bytes that no codec makes smaller, different for each seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// The pack files below a backing.
fn packs(backing: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for shard in fs::read_dir(backing.join(".rearview/packs")).unwrap().flatten() {
        found.extend(fs::read_dir(shard.path()).unwrap().flatten().map(|entry| entry.path()));
    }
    found.sort();
    found
}

fn quarantined(backing: &Path) -> usize {
    fs::read_dir(backing.join(".rearview/quarantine")).map_or(0, |list| list.flatten().count())
}

/// A store with two versions of each file in its past, packed, and none of it in any cache.
fn with_packed_past() -> Mounted {
    let mut store = Mounted::new();
    for round in 0..2 {
        for file in 0..FILES {
            let bytes = noise(round * FILES + file, FILE_BYTES);
            fs::write(store.path(&format!("f{file}")), bytes).unwrap();
        }
        store.snapshot(&format!("round{round}"));
    }
    for file in 0..FILES {
        fs::write(store.path(&format!("f{file}")), "small").unwrap();
    }
    store.rearview(&["prune"]).ok();
    store.remount();
    store
}

/// Bytes in the midst become others, the last third is cut off, or the whole file is gone.
fn damage(pack: &Path, how: usize) {
    let length = fs::metadata(pack).unwrap().len();
    match how % 3 {
        0 => {
            use std::os::unix::fs::FileExt;
            let file = fs::OpenOptions::new().write(true).open(pack).unwrap();
            // In each frame: those are decoded one by one.
            for at in (100..length).step_by(32 << 10) {
                file.write_all_at(&[0xa5; 16], at).unwrap();
            }
        }
        1 => fs::OpenOptions::new().write(true).open(pack).unwrap().set_len(length / 3).unwrap(),
        _ => fs::remove_file(pack).unwrap(),
    }
}

#[test]
fn packs_that_are_damaged_under_load_are_read_right_and_healed() {
    let store = with_packed_past();
    let whole: BTreeMap<PathBuf, Vec<u8>> = packs(&store.backings[0])
        .into_iter()
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    assert!(whole.len() >= 3, "{:?}", whole.keys());
    let (ready, done) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        // Who writes meanwhile: what is overwritten is preserved, and is to be packed in its turn.
        scope.spawn(|| {
            let mut number = 0u64;
            while !done.load(Ordering::SeqCst) {
                let bytes = noise(1000 + number, 64 << 10);
                fs::write(store.path(&format!("live{}", number % 7)), &bytes).unwrap();
                assert!(fs::read(store.path(&format!("live{}", number % 7))).unwrap() == bytes);
                number += 1;
                ready.store(number > 7, Ordering::SeqCst);
            }
        });
        wait_until("somebody writes", 60, || ready.load(Ordering::SeqCst));
        for (index, pack) in whole.keys().enumerate() {
            damage(pack, index);
        }
        let readers: Vec<_> = (0..3u64)
            .map(|reader| {
                let store = &store;
                scope.spawn(move || {
                    for turn in 0..2 * FILES {
                        let turn = (turn + reader * 5) % (2 * FILES);
                        let (round, file) = (turn / FILES, turn % FILES);
                        let path = store.past(&format!("round{round}")).join(format!("f{file}"));
                        let bytes = fs::read(&path).unwrap();
                        assert!(bytes == noise(turn, FILE_BYTES), "{}", path.display());
                    }
                })
            })
            .collect();
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        done.store(true, Ordering::SeqCst);
    });
    wait_until("every pack is whole again", 60, || {
        whole.iter().all(|(path, bytes)| fs::read(path).is_ok_and(|found| found == *bytes))
    });
    // What was there is kept for whoever wants to know what became of it; a file that was gone
    // leaves nothing.
    let there = (0..whole.len()).filter(|index| index % 3 != 2).count();
    assert_eq!(quarantined(&store.backings[0]), there);
    assert_eq!(quarantined(&store.backings[1]), 0);
    let log = fs::read_to_string(store.backings[0].join(".rearview/log")).unwrap();
    for words in ["the file is missing", "replaced by the copy of"] {
        assert!(log.contains(words), "no '{words}' in {log}");
    }
    for pack in whole.keys() {
        let name = pack.file_name().unwrap().to_str().unwrap();
        assert!(log.contains(name), "nothing of {name} in {log}");
    }
    store.rearview(&["status"]).ok();
    store.finish();
}

//! Space that runs out: history yields before a write is refused, what is held or protected never
//! does, and both are told. On small filesystems of their own.

mod common;

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use common::json::{parsed, texts};
use common::{Mounted, disk::LoopFs, wait_until};
use serde_json::Value;

/// Of a store whose history is not protected by its youth.
const UNPROTECTED: &str = "every = \"0\"\nprotect = \"0\"\n";

/// Bytes that no codec makes smaller, different for each seed.
fn noise(seed: u64, mebibytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; mebibytes << 20];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// A mounted store on two small disks.
struct Small {
    store: Mounted,
    _disks: [LoopFs; 2],
}

/// A store on two disks of `mebibytes` each, with this policy.
fn small(mebibytes: u64, policy: &str) -> Small {
    let disks = [LoopFs::ext4(mebibytes), LoopFs::ext4(mebibytes)];
    let backings: Vec<PathBuf> = disks.iter().map(|disk| disk.root().join("b")).collect();
    let mut store = Mounted::over(backings);
    store.set_policy(policy);
    Small { store, _disks: disks }
}

fn status(store: &Mounted) -> Value {
    parsed(store.rearview(&["status", "--json"]))
}

fn warning(store: &Mounted) -> String {
    status(store)["warning"].as_str().unwrap_or_default().to_string()
}

fn history_bytes(store: &Mounted) -> u64 {
    let totals = &status(store)["totals"];
    ["undo_bytes", "preserved_bytes", "packed_bytes"]
        .iter()
        .map(|name| totals[name].as_u64().unwrap_or_else(|| panic!("{name}: {totals}")))
        .sum()
}

fn log_of(store: &Mounted) -> String {
    fs::read_to_string(store.backings[0].join(".rearview/log")).unwrap()
}

fn snapshots(store: &Mounted) -> Vec<String> {
    texts(&parsed(store.rearview(&["snapshot", "list", "--json"])), "name")
}

#[test]
fn a_full_disk_refuses_no_write_while_history_may_yield_and_what_is_held_stays() {
    let Small { mut store, _disks } = small(96, UNPROTECTED);
    fs::write(store.path("kept"), noise(0, 8)).unwrap();
    store.snapshot("held");
    store.rearview(&["snapshot", "hold", "held"]).ok();
    fs::remove_file(store.path("kept")).unwrap();
    // Three times what the disks hold, in snapshots and between them.
    for round in 1..25u64 {
        let bytes = noise(round, 12);
        fs::write(store.path("f"), &bytes).unwrap_or_else(|error| panic!("{round}: {error}"));
        assert!(fs::read(store.path("f")).unwrap() == bytes, "{round}");
        if round % 2 == 0 {
            store.snapshot(&format!("round{round}"));
        }
    }
    let left = snapshots(&store);
    assert_eq!(left[0], "held");
    assert!(!left.contains(&"round2".to_string()), "{left:?}");
    assert!(fs::read(store.past("held").join("kept")).unwrap() == noise(0, 8));
    // The youngest stays longest, and what a snapshot shows is whole.
    for name in &left[1..] {
        let round: u64 = name.strip_prefix("round").unwrap().parse().unwrap();
        assert!(fs::read(store.past(name).join("f")).unwrap() == noise(round, 12), "{name}");
    }
    let log = log_of(&store);
    for words in ["the oldest history that is not held yields", "'round2' yielded its space"] {
        assert!(log.contains(words), "no '{words}' in {log}");
    }
    store.remount();
    assert!(fs::read(store.past("held").join("kept")).unwrap() == noise(0, 8));
    store.finish();
}

#[test]
fn a_disk_that_has_no_inodes_for_more_history_refuses_no_file() {
    let disks = [0, 1].map(|_| LoopFs::ext4_of_inodes(64, 2048));
    let backings: Vec<PathBuf> = disks.iter().map(|disk| disk.root().join("b")).collect();
    let mut store = Mounted::over(backings);
    store.set_policy(UNPROTECTED);
    fs::write(store.path("kept"), "kept").unwrap();
    store.snapshot("held");
    store.rearview(&["snapshot", "hold", "held"]).ok();
    fs::remove_file(store.path("kept")).unwrap();
    // Each is preserved as a file of its own until it is packed.
    for number in 0..4000 {
        let path = store.path(&format!("f{}", number % 7));
        fs::write(&path, format!("{number}\n")).unwrap_or_else(|error| panic!("{number}: {error}"));
        fs::remove_file(&path).unwrap();
    }
    assert!(fs::read(store.past("held").join("kept")).unwrap() == b"kept");
    // What is live may take all that history does not need.
    let made = (0..3000).find_map(|number| fs::write(store.path(&format!("l{number}")), "").err());
    assert_eq!(made.expect("they are few").raw_os_error(), Some(libc::ENOSPC));
    let told = warning(&store);
    assert!(told.contains("no inodes are left; new files are refused"), "{told}");
    // No name needs one of its own, nor does what takes another's place or is emptied.
    fs::rename(store.path("l0"), store.path("renamed")).unwrap();
    fs::hard_link(store.path("renamed"), store.path("linked")).unwrap();
    store.remount();
    for number in 1..600 {
        let path = store.path(&format!("l{number}"));
        fs::write(&path, format!("{number}\n")).unwrap_or_else(|error| panic!("{number}: {error}"));
    }
    store.snapshot("full");
    for number in 1..600 {
        let path = store.path(&format!("l{number}"));
        match number % 3 {
            0 => fs::write(&path, "other\n").unwrap(),
            1 => fs::rename(&path, store.path("renamed")).unwrap(),
            _ => fs::remove_file(&path).unwrap(),
        }
    }
    assert!(fs::read(store.past("full").join("l500")).unwrap() == b"500\n");
    store.remount();
    assert!(fs::read(store.past("held").join("kept")).unwrap() == b"kept");
    store.finish();
}

#[test]
fn where_nothing_may_yield_writes_are_refused_and_status_says_why() {
    let Small { mut store, _disks } = small(64, "every = \"0\"\nprotect = \"1h\"\n");
    fs::write(store.path("old"), noise(0, 8)).unwrap();
    store.snapshot("young");
    fs::write(store.path("old"), noise(1, 8)).unwrap();
    assert_eq!(warning(&store), "");
    let mut file = fs::File::create(store.path("big")).unwrap();
    let refused = (2..80).find_map(|seed| file.write_all(&noise(seed, 1)).err());
    let refused = refused.expect("the disk is full at last");
    assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC), "{refused}");
    drop(file);
    let told = warning(&store);
    for words in ["full; writes are refused", "held or younger than 1h", "free space"] {
        assert!(told.contains(words), "no '{words}' in {told}");
    }
    // Nothing is held, so the one thing left to do is said.
    assert!(told.contains("`rearview purge PATH`") && !told.contains("release"), "{told}");
    assert!(log_of(&store).contains("writes are refused"));
    assert!(fs::read(store.past("young").join("old")).unwrap() == noise(0, 8));
    // Reading and the past go on; once something may yield, so does writing.
    assert!(fs::read(store.path("old")).unwrap() == noise(1, 8));
    store.set_policy(UNPROTECTED);
    fs::write(store.path("new"), noise(99, 4)).unwrap();
    assert!(fs::read(store.path("new")).unwrap() == noise(99, 4));
    assert!(!warning(&store).contains("refused"));
    store.finish();
}

/// Bytes of the undo segments on each backing.
fn undo_bytes(store: &Mounted) -> Vec<u64> {
    let bytes = |backing: &PathBuf| {
        let segments = fs::read_dir(backing.join(".rearview/undo")).unwrap().flatten();
        segments.map(|segment| segment.metadata().unwrap().len()).sum()
    };
    store.backings.iter().map(bytes).collect()
}

#[test]
fn a_purge_on_a_full_disk_makes_room_at_once_though_something_else_finds_none_to_be_packed() {
    let Small { mut store, _disks } = small(64, "every = \"0\"\nprotect = \"1h\"\n");
    for (seed, (name, mebibytes)) in (0..).zip([("kept", 12), ("f", 13), ("g", 1)]) {
        fs::write(store.path(name), noise(seed, mebibytes)).unwrap();
    }
    store.snapshot("young");
    for (name, mebibytes) in [("f", 13), ("g", 1)] {
        let file = fs::OpenOptions::new().write(true).open(store.path(name)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &noise(9, mebibytes), 0).unwrap();
    }
    fs::remove_file(store.path("kept")).unwrap();
    let mut file = fs::File::create(store.path("big")).unwrap();
    let refused = (10..80).find_map(|seed| file.write_all(&noise(seed, 1)).err());
    assert_eq!(refused.expect("it is full").raw_os_error(), Some(libc::ENOSPC));
    let before = undo_bytes(&store);
    assert!(before.iter().all(|&bytes| bytes >= 14 << 20), "{before:?}");
    store.rearview(&["purge", "--yes", "f"]).ok();
    // What lies beside it in its segment was packed.
    assert_eq!(undo_bytes(&store), [0, 0]);
    assert!(status(&store)["totals"]["preserved_bytes"].as_u64() >= Some(12 << 20));
    for seed in 80..88 {
        file.write_all(&noise(seed, 1)).unwrap();
    }
    drop(file);
    store.remount();
    assert!(!store.past("young").join("f").exists());
    assert!(fs::read(store.past("young").join("kept")).unwrap() == noise(0, 12));
    assert!(fs::read(store.past("young").join("g")).unwrap() == noise(2, 1));
    store.finish();
}

#[test]
fn history_keeps_to_its_limits() {
    let Small { mut store, _disks } = small(96, UNPROTECTED);
    let fill = |store: &Mounted| {
        for round in 0..5 {
            fs::write(store.path("f"), noise(round, 6)).unwrap();
            store.snapshot(&format!("s{round}"));
        }
    };
    fill(&store);
    store.rearview(&["prune"]).ok();
    assert_eq!(warning(&store), "");
    assert_eq!(snapshots(&store), ["s0", "s1", "s2", "s3", "s4"]);
    assert!(history_bytes(&store) > 20 << 20);
    store.unmount();
    store.set_options(&["--history-limit", "14MiB"]);
    store.mount().ok();
    store.rearview(&["prune"]).ok();
    assert!(history_bytes(&store) <= 14 << 20, "{}", status(&store));
    let left = snapshots(&store);
    assert_eq!(left.last().map(String::as_str), Some("s4"), "the oldest yield first: {left:?}");
    assert!(!left.contains(&"s0".to_string()), "{left:?}");
    assert!(log_of(&store).contains("of the 14 MiB that it may"), "{}", log_of(&store));
    assert!(fs::read(store.past("s4").join("f")).unwrap() == noise(4, 6));
    store.unmount();
    // More is to be free than can be: all of history that may yield does, and that is told.
    store.set_options(&["--free-limit", "90%"]);
    store.mount().ok();
    fs::write(store.path("f"), noise(77, 6)).unwrap();
    store.snapshot("held");
    store.rearview(&["snapshot", "hold", "held"]).ok();
    fs::write(store.path("f"), noise(78, 6)).unwrap();
    store.rearview(&["prune"]).ok();
    assert_eq!(snapshots(&store), ["held"]);
    assert!(fs::read(store.past("held").join("f")).unwrap() == noise(77, 6));
    let told = warning(&store);
    for words in ["are to be kept free", "no history left that may yield", "release"] {
        assert!(told.contains(words), "no '{words}' in {told}");
    }
    assert!(store.rearview(&["status"]).stdout.contains("are to be kept free"));
    wait_until("the log tells it", 20, || log_of(&store).contains("no history left"));
    store.finish();
}

//! Mounts without one of the disks: it is missing, read-only, or was never one of the store's.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::disk::LoopFs;
use common::mounted::word;
use common::run::{Done, binary, rearview};
use common::{Mounted, run};

/// A store of two, unmounted, with a file in it.
fn store() -> Mounted {
    let mut store = Mounted::new();
    fs::write(store.path("file"), "kept").unwrap();
    store.unmount();
    store
}

/// Calls the program as fstab does.
fn as_fstab(store: &Mounted, backings: &[PathBuf]) -> Done {
    let helper = store.beside("mount.fuse.rearview");
    let _ = std::os::unix::fs::symlink(binary(), &helper);
    let backings: Vec<String> = backings.iter().map(|path| word(path)).collect();
    let mut command = Command::new(helper);
    run(command.arg(backings.join(":")).arg(&store.mnt).args(["-o", "snapshot_every=0"]))
}

/// The degraded status of the mount.
fn degraded(store: &Mounted) -> String {
    let status = store.rearview(&["status"]);
    assert_eq!(status.code, 20, "{}", status.told());
    status.stdout
}

fn nothing_made(path: &Path) {
    assert!(fs::read_dir(path).map_or(true, |mut entries| entries.next().is_none()), "{path:?}");
}

#[test]
fn a_disk_that_is_missing_at_boot_is_left_out_and_comes_when_it_is_there() {
    let mut store = store();
    let (backing, away) = (store.backings[1].clone(), store.beside("away"));
    fs::rename(&backing, &away).unwrap();
    for is_empty_directory in [false, true] {
        if is_empty_directory {
            fs::create_dir(&backing).unwrap();
        }
        let done = as_fstab(&store, &store.backings);
        let why = if is_empty_directory { "no store marker" } else { "does not exist" };
        let done = done.fails(0, &[&word(&backing), why, "runs without it"]);
        assert!(!done.stderr.contains("--init"), "{}", done.told());
        assert!(degraded(&store).contains(&word(&backing)));
        assert_eq!(fs::read(store.path("file")).unwrap(), b"kept");
        let log = fs::read_to_string(store.backings[0].join(".rearview/log")).unwrap();
        assert!(log.contains(&format!("{} was left out", backing.display())), "{log}");
        nothing_made(&backing);
        assert_eq!(backing.exists(), is_empty_directory);
        if !is_empty_directory {
            store.unmount();
        }
    }
    fs::write(store.path("late"), "while it was away").unwrap();
    fs::remove_dir(&backing).unwrap();
    fs::rename(&away, &backing).unwrap();
    store.rearview(&["resync", "--wait"]).ok();
    store.rearview(&["status"]).ok();
    assert_eq!(fs::read(backing.join("late")).unwrap(), b"while it was away");
    store.finish();
}

#[test]
fn what_the_store_does_not_miss_is_not_left_out() {
    let mut store = store();
    let other = Mounted::unmounted(1);
    let (first, second) = (store.backings[0].clone(), store.backings[1].clone());
    let typo = store.beside("typo");
    let all = [first.clone(), second.clone(), typo.clone()];
    as_fstab(&store, &all).fails(1, &["typo", "does not exist", "--existing-only"]);
    // Below a directory that does not exist either, as where a disk is not mounted.
    let all = [first.clone(), second, typo.join("b")];
    as_fstab(&store, &all).fails(1, &["typo", "does not exist", "--existing-only"]);
    // One is missing, and two are given.
    let all = [first.clone(), typo.clone(), store.beside("typo2")];
    as_fstab(&store, &all).fails(1, &["typo", "misses 1"]);
    as_fstab(&store, &[typo.clone(), store.beside("typo2")]).fails(10, &["no store"]);
    rearview(["mount", &word(&other.backings[0]), &word(&other.mnt)]).ok();
    rearview(["umount", &word(&other.mnt)]).ok();
    let all = [first, other.backings[0].clone()];
    as_fstab(&store, &all).fails(1, &["belongs to another store"]);
    assert!(!typo.exists() && !store.beside("typo2").exists());
    store.mount().ok();
    store.finish();
}

#[test]
fn a_new_replica_of_an_old_store_is_told_of() {
    let mut store = store();
    let typo = store.beside("typo");
    let done = store.mount_only(&[store.backings[0].clone(), typo.clone()]);
    done.fails(0, &["typo did not exist", "new to this store", "rearview replica remove typo"]);
    assert!(degraded(&store).contains("rearview replica remove NAME"));
    store.rearview(&["resync", "--wait"]);
    store.rearview(&["replica", "remove", "typo"]).ok();
    store.rearview(&["replica", "remove", "backing1"]).ok();
    assert_eq!(store.rearview(&["status"]).code, 0);
    store.unmount();
}

#[test]
fn a_disk_that_is_read_only_is_left_out_and_comes_back() {
    for bad in [0, 1] {
        let disks = [LoopFs::ext4(64), LoopFs::ext4(64)];
        let backings = disks.iter().map(|disk| disk.root().join("b"));
        let mut store = Mounted::over(backings.collect());
        fs::write(store.path("file"), "kept").unwrap();
        store.unmount();
        disks[bad].read_only();
        let name = word(&store.backings[bad]);
        let mount = store.mount();
        mount.fails(0, &[&name, ".rearview/lock: Read-only", "remount it read-write"]);
        let status = degraded(&store);
        assert!(status.contains(".rearview/lock: Read-only"), "{status}");
        assert!(status.contains("remount it read-write"), "{status}");
        fs::write(store.path("late"), "without it").unwrap();
        run(Command::new("mount").args(["-o", "remount,rw"]).arg(disks[bad].root())).ok();
        store.rearview(&["resync", "--wait"]);
        common::wait_until("it is brought in", 60, || store.rearview(&["status"]).code == 0);
        assert_eq!(fs::read(store.backings[bad].join("late")).unwrap(), b"without it");
        store.finish();
    }
}

#[test]
fn a_disk_that_is_read_only_and_alone_or_ahead_is_an_error_that_tells_what_to_do() {
    let (disk, plain) = (LoopFs::ext4(64), common::scratch());
    let mut store = Mounted::over(vec![disk.root().into(), plain.path().join("copy")]);
    store.unmount();
    let only = [disk.root().to_path_buf()];
    let words = ["Read-only file system", "remount it read-write", "-o ro"];
    disk.read_only();
    store.mount_only(&only).fails(1, &words);
    let new = store.beside("new");
    store.mount_only(&[only[0].clone(), new.clone()]).fails(1, &words[..2]);
    assert!(!new.exists());
    // What the other one has is old: that must not be shown as if it were the store.
    run(Command::new("mount").args(["-o", "remount,rw"]).arg(disk.root())).ok();
    store.mount_only(&only).ok();
    fs::write(store.path("file"), "new").unwrap();
    store.unmount();
    disk.read_only();
    store.mount().fails(1, &["miss changes", "remount it read-write"]);
    // In use elsewhere is an error of the whole mount, as ever.
    run(Command::new("mount").args(["-o", "remount,rw"]).arg(disk.root())).ok();
    store.mount().ok();
    let elsewhere = store.beside("elsewhere");
    let both = store.backings.iter().map(|path| word(path)).collect::<Vec<_>>().join(":");
    rearview(["mount", &both, &word(&elsewhere)]).fails(11, &["in use"]);
    store.unmount();
}

#[test]
fn what_may_be_behind_is_not_mounted_at_boot_without_the_disk_that_may_be_ahead() {
    let mut store = store();
    store.mount().ok();
    fs::write(store.path("late"), "written").unwrap();
    store.kill();
    let _ = run(Command::new("umount").arg("-l").arg(&store.mnt));
    let (backing, away) = (store.backings[1].clone(), store.beside("away"));
    fs::rename(&backing, &away).unwrap();
    as_fstab(&store, &store.backings).fails(1, &[&word(&backing), "did not end cleanly"]);
    nothing_made(&backing);
    // By hand it is gone on with, and from then on that is known.
    let words = ["mount".as_ref(), store.backings[0].as_os_str(), store.mnt.as_os_str()];
    rearview(words.map(std::ffi::OsString::from).to_vec()).ok();
    assert_eq!(fs::read(store.path("late")).unwrap(), b"written");
    store.kill();
    let _ = run(Command::new("umount").arg("-l").arg(&store.mnt));
    as_fstab(&store, &store.backings).fails(0, &["runs without it"]);
    store.unmount();
}

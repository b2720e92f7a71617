//! Bad input and bad luck: full disks, damaged files of ours, hostile names, impossible times.
//! Each gives a clear error, never a panic, and leaves the live tree and the history intact.

mod common;

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use common::disk::LoopFs;
use common::fixture::rich_tree;
use common::json::{parsed, texts};
use common::run::{rearview, run_shell};
use common::tree::{Tree, assert_trees, read_tree};
use common::user::{ordinary_user, public_binary};
use common::{Mounted, shell};

/// A store whose backings are disks of these sizes in MiB.
fn on_disks(sizes: &[u64]) -> (Mounted, Vec<LoopFs>) {
    let disks: Vec<LoopFs> = sizes.iter().map(|size| LoopFs::ext4(*size)).collect();
    let backings: Vec<PathBuf> = disks.iter().map(|disk| disk.root().join("backing")).collect();
    (Mounted::over(backings), disks)
}

/// Writes files until the disk is full; gives how many were written whole.
fn fill(store: &Mounted, folder: &str) -> usize {
    let folder = store.path(folder);
    fs::create_dir_all(&folder).unwrap();
    for count in 0..4_000 {
        let path = folder.join(format!("fill{count}"));
        if let Err(error) = fs::write(&path, vec![count as u8; 256 << 10]) {
            assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSPC), "{error}");
            return count;
        }
    }
    panic!("the disk never filled");
}

#[test]
fn a_full_disk_on_all_replicas_is_enospc_and_harms_nothing() {
    let (mut store, _disks) = on_disks(&[48, 48]);
    rich_tree(&store.path("work"));
    store.snapshot("before");
    let was = read_tree(&store.path("work"));
    let count = fill(&store, "fill");
    assert!(count > 20, "{count}");
    // Every operation answers; none panics, none hangs, none lies.
    let outcome = run_shell(
        &store.mnt,
        "set +e; mkdir more; ln work/src/file1.rs more/ln; mv work/src/file9.rs work/moved; \
         setfattr -n user.big -v \"$(head -c 3000 /dev/zero | tr '\\0' x)\" work/docs; \
         chmod 700 work; truncate -s 100 work/src/file8.rs; rm work/docs/empty; true",
    );
    assert!(!outcome.stderr.contains("Input/output"), "{}", outcome.told());
    assert!(!outcome.stderr.contains("not connected"), "{}", outcome.told());
    for i in 0..count {
        let bytes = fs::read(store.path(&format!("fill/fill{i}"))).unwrap();
        assert!(bytes == vec![i as u8; 256 << 10], "fill{i} is whole");
    }
    let before = |store: &Mounted| read_tree(&store.past("before").join("work"));
    assert_trees("the snapshot while full", &was, &before(&store));
    // Deleting makes room again (what no snapshot holds may go), and life goes on.
    fs::remove_dir_all(store.path("fill")).unwrap();
    store.remount();
    assert_trees("the snapshot after", &was, &before(&store));
    shell(&store.mnt, "echo after > after");
    assert_eq!(fs::read_to_string(store.path("after")).unwrap(), "after\n");
    store.finish();
}

#[test]
fn a_full_disk_on_one_replica_is_enospc_or_degraded_but_never_wrong() {
    let (mut store, _disks) = on_disks(&[32, 128]);
    rich_tree(&store.path("work"));
    store.snapshot("before");
    let was = read_tree(&store.path("work"));
    let folder = store.path("fill");
    fs::create_dir(&folder).unwrap();
    let mut whole = Vec::new();
    for i in 0..200_u32 {
        let path = folder.join(format!("fill{i}"));
        match fs::write(&path, vec![i as u8; 256 << 10]) {
            Ok(()) => whole.push((path, i as u8)),
            Err(error) => assert_eq!(Errno::from_io_error(&error), Some(Errno::NOSPC), "{error}"),
        }
    }
    let check = |store: &Mounted| {
        for (path, byte) in &whole {
            assert!(fs::read(path).unwrap() == vec![*byte; 256 << 10], "{path:?}");
        }
        assert_trees("snapshot", &was, &read_tree(&store.past("before").join("work")));
    };
    check(&store);
    store.remount();
    check(&store);
    store.unmount();
}

/// A store with a snapshot, unmounted; with what was live and in the snapshot.
fn settled() -> (Mounted, Tree) {
    let mut store = Mounted::new();
    rich_tree(&store.path("work"));
    store.snapshot("s");
    let was = read_tree(&store.path("work"));
    common::fixture::wreck(&store.path("work"));
    store.unmount();
    (store, was)
}

fn damage(path: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let len = file.metadata().unwrap().len();
    let garbage: Vec<u8> = (0..len.min(64 << 10)).map(|i| (i * 131 % 251) as u8).collect();
    file.write_all_at(&garbage, 0).unwrap();
}

#[test]
fn garbage_in_one_catalog_is_survived_by_the_other() {
    let (mut store, was) = settled();
    damage(&store.backings[0].join(".rearview/catalog.db"));
    let live = read_tree(&store.backings[1]);
    let done = store.mount();
    assert!(!done.stderr.contains("panicked"), "{}", done.told());
    if done.code == 0 {
        assert_trees("the snapshot", &was, &read_tree(&store.past("s").join("work")));
        assert_trees("live", &live, &read_tree(&store.mnt));
        store.unmount();
    } else {
        assert!([1, 21].contains(&done.code), "{}", done.told());
        assert!(done.stderr.contains("catalog"), "{}", done.told());
        // The healthy one alone still serves everything.
        let healthy = store.backings[1].clone();
        store.mount_only(&[healthy]).ok();
        assert_trees("the snapshot", &was, &read_tree(&store.past("s").join("work")));
        store.unmount();
    }
    assert_trees("the live files", &live, &read_tree(&store.backings[1]));
}

#[test]
fn garbage_in_every_catalog_is_refused_by_name_and_nothing_is_touched() {
    let (mut store, _) = settled();
    let live = read_tree(&store.backings[0]);
    for backing in &store.backings {
        damage(&backing.join(".rearview/catalog.db"));
    }
    let done = store.mount();
    assert!([1, 21].contains(&done.code), "{}", done.told());
    let code = done.code;
    done.fails(code, &["catalog.db"]);
    for backing in &store.backings {
        assert_trees("the live files", &live, &read_tree(backing));
    }
}

#[test]
fn truncated_and_empty_files_of_ours_never_panic() {
    for name in ["store.toml", "catalog.db", "lock"] {
        for len in [0, 10] {
            let (mut store, _) = settled();
            let live = read_tree(&store.backings[1]);
            let path = store.backings[0].join(".rearview").join(name);
            if path.metadata().is_ok_and(|meta| meta.len() > len) {
                OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
            }
            let done = store.mount();
            assert!([0, 1, 10, 21].contains(&done.code), "{name} at {len}: {}", done.told());
            assert!(!done.stderr.contains("panicked"), "{name} at {len}: {}", done.told());
            if done.code == 0 {
                assert_trees(name, &live, &read_tree(&store.mnt));
                store.unmount();
            } else {
                assert!(
                    done.stderr.contains(name) || done.stderr.contains("marker"),
                    "{}",
                    done.told()
                );
            }
            assert_trees("the other backing", &live, &read_tree(&store.backings[1]));
        }
    }
}

#[test]
fn truncated_history_on_one_replica_is_read_from_the_other() {
    let (mut store, was) = settled();
    for folder in ["preserved", "undo"] {
        let folder = store.backings[0].join(".rearview").join(folder);
        shell(&folder, "find . -type f -exec truncate -s 10 {} +");
    }
    store.mount().ok();
    let past = store.past("s").join("work");
    let done = run_shell(&past, "find . -type f -exec cat {} + > /dev/null");
    assert!(!done.stderr.contains("panicked"));
    if done.code == 0 {
        assert_trees("the snapshot", &was, &read_tree(&past));
    } else {
        assert!(
            done.stderr.contains("Input/output error"),
            "never silently wrong: {}",
            done.told()
        );
    }
    assert!(store.is_mounted());
    store.unmount();
}

#[test]
fn hostile_names_are_shown_escaped() {
    let store = Mounted::new();
    let hostile: &[u8] = b"bad\n\x1b[31mred\x07\r+ forged\xff";
    fs::write(store.mnt.join(OsStr::from_bytes(hostile)), "1").unwrap();
    store.snapshot("a");
    fs::write(store.mnt.join(OsStr::from_bytes(hostile)), "22").unwrap();
    store.snapshot("b");
    let text = store.rearview(&["diff", "a", "b"]).ok();
    assert_eq!(text.trim_end().lines().count(), 1, "one change is one line: {text:?}");
    assert!(!text.contains('\x1b') && !text.contains('\x07') && !text.contains('\r'), "{text:?}");
    parsed(store.rearview(&["diff", "--json", "a", "b"]));
    let log = common::run::run(
        std::process::Command::new(common::run::binary())
            .arg("log")
            .arg(OsStr::from_bytes(hostile))
            .current_dir(&store.mnt),
    )
    .ok();
    assert!(!log.contains('\x1b') && !log.contains('\x07'), "{log:?}");
    fs::remove_file(store.mnt.join(OsStr::from_bytes(hostile))).unwrap();
    let mut missing = std::process::Command::new(common::run::binary());
    missing.arg("log").arg(OsStr::from_bytes(b"no\x1b[31m\n")).current_dir(&store.mnt);
    let said = common::run::run(&mut missing).stderr;
    assert!(!said.contains('\x1b'), "{said:?}");
    store.finish();
}

#[test]
fn snapshot_names_that_cannot_be_folders_are_refused() {
    let store = Mounted::new();
    let mnt = store.mnt.to_str().unwrap().to_owned();
    let long = "n".repeat(256);
    for name in ["a/b", "", ".", "..", ".at", ".versions", ".deleted", "latest", long.as_str()] {
        let done = rearview(["snapshot", "create", &mnt, name]);
        assert!([1, 2].contains(&done.code), "{name:?}: {}", done.told());
        assert!(!done.stderr.contains("panicked"), "{}", done.told());
    }
    for name in [".at", ".versions", ".deleted", "latest", "@GMT-2026.11.22-19.30.00"] {
        assert!(fs::create_dir(store.past(name)).is_err(), "{name}");
    }
    let list = texts(&parsed(store.rearview(&["snapshot", "list", "--json"])), "name");
    assert_eq!(list, Vec::<String>::new());
    // Odd but possible names work.
    for name in ["with space", "ünïcödé", "-dash"] {
        fs::create_dir(store.past(name)).unwrap();
        assert!(store.past(name).is_dir(), "{name:?}");
    }
    // A name that would break lines is refused, or else shown escaped.
    let _ = fs::create_dir(store.past("new\nline"));
    let text = store.rearview(&["snapshot", "list"]).ok();
    assert!(!text.lines().any(|line| line.starts_with("line")), "escaped: {text:?}");
    store.finish();
}

#[test]
fn times_in_the_future_are_not_there() {
    let store = Mounted::new();
    fs::write(store.path("f"), "x").unwrap();
    let at = store.path(".snapshots/.at");
    for time in ["2999-01-01T00:00:00Z", "@99999999999", "@99999999999999999999", "9999999999y"] {
        let error = fs::metadata(at.join(time)).expect_err(time);
        assert_eq!(Errno::from_io_error(&error), Some(Errno::NOENT), "{time}: {error}");
    }
    store.rearview(&["diff", "2999-01-01T00:00:00Z", "now"]).fails(1, &["2999"]);
    // Before the store was born nothing was there either.
    let early = fs::metadata(at.join("1999-01-01T00:00:00Z/f")).expect_err("before birth");
    assert_eq!(Errno::from_io_error(&early), Some(Errno::NOENT));
    // File times in the future are just times.
    shell(&store.mnt, "touch -d '2200-01-01T00:00:00Z' f");
    store.snapshot("s");
    let was = read_tree(&store.mnt);
    assert_trees("snapshot", &was, &read_tree(&store.past("s")));
    store.finish();
}

#[test]
fn unreadable_backings_are_refused_with_their_name() {
    let store = Mounted::unmounted(0);
    let user = ordinary_user();
    let (_folder, copy) = public_binary();
    fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
    let home = store.beside("home");
    fs::create_dir(&home).unwrap();
    shell(&home, &format!("mkdir a mine mnt; chown {0}:{0} a mnt; chmod 700 mine", user.uid));
    let done = user.shell(&format!("cd {home:?}; {copy:?} mount a mine mnt"));
    done.fails(1, &["mine", "permission"]);
}

#[test]
fn garbage_on_the_control_socket_harms_nobody() {
    use std::io::{Read, Write};
    let store = Mounted::new();
    let socket = store.backings[0].join(".rearview/control.sock");
    for garbage in
        [&b"\xff\xff\xff\xff\xff\xff\xff\xff"[..], b"{\"nonsense\": 1}\n", b"", b"\0\0\0\x02{}"]
    {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read(&mut [0; 4096]);
    }
    store.rearview(&["status"]).ok();
    store.finish();
}

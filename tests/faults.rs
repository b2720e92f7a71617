//! Backings that fail while they are in use: the mount goes on with the others, every operation
//! ends in time, and `status` says what happened.

mod common;
#[allow(dead_code)] // Used in part.
mod crash {
    pub mod dice;
    pub mod rig;
}

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::disk::LoopFs;

use common::{Mounted, run, wait_until};
use crash::rig::LoggedFs;

/// What `-o timeout=` is set to where something is to hang.
const TIMEOUT_SECS: u64 = 2;
/// An operation that meets a hung disk ends within this: a timeout or two, on a busy machine.
const BOUND: Duration = Duration::from_secs(TIMEOUT_SECS * 10);

/// A store on a directory and a disk, in that order or the other.
fn over(first: &Path, second: &Path) -> Mounted {
    let mut store = Mounted::unmounted(0);
    store.backings = vec![first.to_path_buf(), second.to_path_buf()];
    store.set_options(&["-o", &format!("snapshot_every=0,timeout={TIMEOUT_SECS}")]);
    store.mount().ok();
    store
}

/// The state of a replica, and the text of its error.
fn state(store: &Mounted, index: usize) -> (String, String) {
    let done = store.rearview(&["status", "--json"]);
    assert!(matches!(done.code, 0 | 20), "{}", done.told());
    let status: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    let path = store.backings[index].to_str().unwrap();
    let replicas = status["replicas"].as_array().unwrap();
    let own = replicas.iter().find(|replica| replica["path"] == path).unwrap();
    let text = |key: &str| own[key].as_str().unwrap_or_default().to_owned();
    (text("state"), text("error"))
}

fn await_offline(store: &Mounted, index: usize) -> String {
    wait_until("the replica is out of use", 60, || state(store, index).0 != "online");
    state(store, index).1
}

/// Does everything a program might, in one directory of the mount.
fn work(store: &Mounted, name: &str) {
    let dir = store.path(name);
    fs::create_dir(&dir).unwrap();
    for index in 0..10 {
        fs::write(dir.join(format!("f{index}")), vec![index; 50_000]).unwrap();
    }
    fs::rename(dir.join("f0"), dir.join("f1")).unwrap();
    fs::remove_file(dir.join("f2")).unwrap();
    fs::File::open(dir.join("f3")).unwrap().sync_all().unwrap();
    assert_eq!(fs::read(dir.join("f1")).unwrap(), vec![0; 50_000]);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 8);
}

/// The kernel's own way to make an ext4 believe that it is damaged, which makes it read-only.
fn break_ext4(disk: &LoopFs) {
    let root = disk.root();
    run(Command::new("mount").args(["-o", "remount,errors=remount-ro"]).arg(root)).ok();
    let source = run(Command::new("findmnt").args(["-no", "SOURCE"]).arg(root)).ok();
    let device = source.trim().trim_start_matches("/dev/").to_owned();
    fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "1").unwrap();
}

#[test]
fn a_disk_that_becomes_read_only_costs_its_replica_and_no_operation() {
    for bad in [0, 1] {
        let disks = [LoopFs::ext4(64), LoopFs::ext4(64)];
        let mut store = over(disks[0].root(), disks[1].root());
        work(&store, "before");
        break_ext4(&disks[bad]);
        work(&store, "after");
        let error = await_offline(&store, bad);
        assert!(error.contains("Read-only") || error.contains("I/O error"), "{error}");
        assert_eq!(state(&store, 1 - bad).0, "online");
        let text = store.rearview(&["status"]);
        assert_eq!(text.code, 20, "{}", text.told());
        for part in ["DEGRADED", "READ", "WRITE", "CKSUM", "LAG", "what failed on"] {
            assert!(text.stdout.contains(part), "{part} in\n{}", text.told());
        }
        store.unmount();
    }
}

#[test]
fn a_disk_that_hangs_is_out_of_use_in_time_and_no_operation_waits_longer() {
    let disks = [LoopFs::ext4(64), LoopFs::ext4(64)];
    let mut store = over(disks[0].root(), disks[1].root());
    work(&store, "before");
    let frozen = disks[0].root().to_path_buf();
    run(Command::new("fsfreeze").arg("-f").arg(&frozen)).ok();
    // Whatever goes wrong, what is frozen is let go: else not even the test could be ended.
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let thaw = frozen.clone();
    let thawing = std::thread::spawn(move || {
        let _ = is_done.recv_timeout(BOUND * 5);
        run(Command::new("fsfreeze").arg("-u").arg(&thaw)).ok();
    });
    let begun = Instant::now();
    let outcome = std::panic::catch_unwind(|| {
        work(&store, "during");
        let elapsed = begun.elapsed();
        let error = await_offline(&store, 0);
        let told = begun.elapsed();
        // Once it is out, nobody waits for it any more.
        let again = Instant::now();
        work(&store, "after");
        (elapsed, told, again.elapsed(), error)
    });
    let unmounting = Instant::now();
    let closed = common::run(Command::new(common::run::binary()).arg("umount").arg(&store.mnt));
    let unmounted = unmounting.elapsed();
    drop(done);
    thawing.join().unwrap();
    let (elapsed, told, again, error) = outcome.unwrap_or_else(|p| std::panic::resume_unwind(p));
    assert!(elapsed < BOUND && told < BOUND * 2, "{elapsed:?}, status after {told:?}");
    assert!(again < BOUND && unmounted < BOUND, "{again:?}, unmounted in {unmounted:?}");
    assert!(error.contains("timed out"), "{error}");
    assert!(matches!(closed.code, 0 | 3), "{}", closed.told());
    store.ended_elsewhere();
}

/// A query of the catalog runs where it was asked for, and the disk hangs in the midst of it.
#[test]
fn a_disk_that_hangs_within_a_query_is_out_of_use_in_time_and_another_answers() {
    let (disk, plain) = (LoggedFs::new("ext4"), common::scratch());
    let backing = disk.root().join("backing");
    fs::create_dir(&backing).unwrap();
    let mut store = over(&backing, plain.path());
    let program = "for d in $(seq 40); do mkdir d$d; for f in $(seq 25); do echo $d$f > d$d/f$f; \
                   done; done";
    common::shell(&store.mnt, program);
    store.snapshot("s");
    common::shell(&store.mnt, "rm -r d*");
    // So that SQLite has nothing of it in its own memory.
    store.remount();
    disk.hang(&backing.join(".rearview").join(rearviewfs::store::CATALOG_FILE));
    let begun = Instant::now();
    for dir in 1..=40 {
        let listed = fs::read_dir(store.past("s").join(format!("d{dir}"))).unwrap();
        assert_eq!(listed.count(), 25);
    }
    let elapsed = begun.elapsed();
    let error = await_offline(&store, 0);
    assert_eq!(state(&store, 1).0, "online");
    disk.resume();
    assert!(elapsed < BOUND, "{elapsed:?}");
    assert!(error.contains("catalog failed") && error.contains("timed out"), "{error}");
    let gone = backing.to_str().unwrap();
    store.rearview(&["replica", "online", "--wait", gone]).ok();
    store.finish();
}

/// What the disk was asked for last is not in memory, so that the mount waits for it.
#[test]
fn a_disk_that_hangs_while_it_is_mounted_is_left_out_in_time_and_comes_back() {
    let (disk, plain) = (LoggedFs::new("ext4"), common::scratch());
    let backing = disk.root().join("backing");
    fs::create_dir(&backing).unwrap();
    let mut store = over(plain.path(), &backing);
    work(&store, "before");
    store.unmount();
    disk.hang(&backing.join(".rearview/store.toml"));
    let begun = Instant::now();
    let mounted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        store.mount().ok();
        let elapsed = begun.elapsed();
        work(&store, "during");
        let told = store.rearview(&["status"]);
        (elapsed, told)
    }));
    disk.resume();
    let (elapsed, told) = mounted.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    assert!(elapsed < BOUND, "{elapsed:?}");
    assert_eq!(told.code, 20, "{}", told.told());
    assert!(told.stdout.contains(backing.to_str().unwrap()), "{}", told.told());
    let why = format!("did not answer within {TIMEOUT_SECS} s, as of 20");
    assert!(told.stdout.contains(&why), "{}", told.told());
    // It is brought in by itself; asked for it is at once.
    wait_until("it is current again", 60, || {
        store.rearview(&["resync", "--wait"]);
        store.rearview(&["status"]).code == 0
    });
    store.finish();
}

#[test]
fn a_backing_whose_directory_is_deleted_is_out_of_use() {
    for bad in [0, 1] {
        let mut store = Mounted::new();
        work(&store, "before");
        fs::remove_dir_all(&store.backings[bad]).unwrap();
        work(&store, "after");
        await_offline(&store, bad);
        assert_eq!(fs::read(store.path("before/f1")).unwrap(), vec![0; 50_000]);
        store.unmount();
        let well = store.backings[1 - bad].join("after/f1");
        assert_eq!(fs::read(well).unwrap(), vec![0; 50_000]);
    }
}

#[test]
fn a_backing_that_is_unmounted_under_us_still_gets_everything() {
    let disks = [LoopFs::ext4(64), LoopFs::ext4(64)];
    let mut store = over(disks[0].root(), disks[1].root());
    work(&store, "before");
    run(Command::new("umount").arg("-l").arg(disks[1].root())).ok();
    work(&store, "after");
    store.unmount();
    disks[1].mount();
    let fine = |disk: &LoopFs| fs::read(disk.root().join("before/f1")).unwrap().len();
    assert_eq!((fine(&disks[0]), fine(&disks[1])), (50_000, 50_000));
}

#[test]
fn below_the_fewest_replicas_asked_for_nothing_is_written_and_all_is_read() {
    let mut store = Mounted::unmounted(2);
    store.set_options(&["-o", "snapshot_every=0", "--min-replicas", "2"]);
    store.mount().ok();
    work(&store, "before");
    let gone = store.backings[1].to_str().unwrap().to_owned();
    store.rearview(&["replica", "offline", &gone]).ok();
    let refused = fs::write(store.path("new"), "x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    let refused = fs::remove_file(store.path("before/f1")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    assert_eq!(fs::read(store.path("before/f1")).unwrap(), vec![0; 50_000]);
    let text = store.rearview(&["status"]);
    assert!(text.stdout.contains("state: READ-ONLY"), "{}", text.told());
    store.rearview(&["replica", "online", "--wait", &gone]).ok();
    fs::write(store.path("new"), "x").unwrap();
    store.unmount();
}

/// Somebody else fills one disk. Whoever writes is told so, or the replica is out of use: in both
/// cases what was said to be written is, and when there is room again all is as before.
#[test]
fn a_disk_that_others_fill_costs_its_replica_at_most() {
    for small in [0, 1] {
        let (disk, large) = (LoopFs::ext4(64), common::scratch());
        let inside = disk.root().join("backing");
        fs::create_dir(&inside).unwrap();
        let backings = [&*inside, large.path()];
        let mut store = over(backings[small], backings[1 - small]);
        work(&store, "before");
        let hog = disk.root().join("hog");
        fill(&hog, 4);
        let mut written = Vec::new();
        for index in 0..200u8 {
            let path = store.path(&format!("new{index}"));
            match fs::write(&path, vec![index; 200_000]) {
                Ok(()) => written.push(index),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}"),
            }
        }
        assert_eq!(fs::read(store.path("before/f1")).unwrap(), vec![0; 50_000]);
        if state(&store, small).0 == "online" {
            assert!(written.len() < 200, "there was no room for all of them");
        } else {
            assert!(state(&store, small).1.contains("No space left"), "{:?}", state(&store, small));
        }
        fs::remove_file(&hog).unwrap();
        // Its catalog may have met the full disk, too, and put it out of use a moment later.
        store.remount();
        wait_until("the replica is current", 120, || store.rearview(&["status"]).code == 0);
        work(&store, "after");
        for index in written {
            assert!(fs::read(store.path(&format!("new{index}"))).unwrap() == [index; 200_000]);
        }
        store.finish();
    }
}

#[test]
fn on_a_full_disk_the_catalog_goes_on_in_the_room_of_its_wal() {
    let disks = [LoopFs::ext4(64), LoopFs::ext4(64)];
    let backings = disks.each_ref().map(|disk| disk.root().join("backing"));
    let store = over(&backings[0], &backings[1]);
    work(&store, "before");
    store.snapshot("s");
    // Others leave it less than the many durable commits that follow would write.
    for disk in &disks {
        let hog = disk.root().join("hog");
        fill(&hog, 1);
    }
    let file = fs::File::open(store.path("before/f1")).unwrap();
    for round in 0..400 {
        let mode = fs::Permissions::from_mode(if round % 2 == 0 { 0o600 } else { 0o640 });
        fs::set_permissions(store.path("before/f1"), mode).unwrap();
        file.sync_all().unwrap();
    }
    drop(file);
    assert_eq!([state(&store, 0).0, state(&store, 1).0], ["online", "online"]);
    store.finish();
}

/// Takes the room of a filesystem but for so many MiB, less than a store keeps back for itself.
fn fill(hog: &Path, left: u64) {
    use std::io::Write;
    let mut file = fs::File::create(hog).unwrap();
    while file.write_all(&vec![1; 1 << 20]).is_ok() {}
    let size = file.metadata().unwrap().len();
    file.set_len(size - (left << 20)).unwrap();
    file.sync_all().unwrap();
}

/// The backing is itself on a mount whose daemon is killed: another store's.
#[test]
fn a_backing_on_a_mount_that_dies_is_out_of_use_and_comes_back() {
    let mut inner = Mounted::new();
    let plain = common::scratch();
    for first in [true, false] {
        let inside = inner.path(if first { "first" } else { "second" });
        let beside = plain.path().join(inside.file_name().unwrap());
        fs::create_dir(&inside).unwrap();
        fs::create_dir(&beside).unwrap();
        let backings = if first { [&inside, &beside] } else { [&beside, &inside] };
        let store = over(backings[0], backings[1]);
        let bad = usize::from(!first);
        work(&store, "before");
        inner.kill();
        work(&store, "after");
        let error = await_offline(&store, bad);
        let told = ["not connected", "connection abort", "I/O error"];
        assert!(told.iter().any(|told| error.contains(told)), "{error}");
        assert_eq!(state(&store, 1 - bad).0, "online");
        inner.mount().ok();
        let gone = store.backings[bad].to_str().unwrap();
        store.rearview(&["replica", "online", "--wait", gone]).ok();
        store.finish();
    }
    inner.finish();
}

/// The barrier of a snapshot waited for what the same daemon was to write: killed then, it never
/// ended, and held the store's lock.
#[test]
fn a_daemon_killed_while_it_waits_for_its_own_mount_is_ended_by_the_next_mount() {
    let disk = LoopFs::ext4(64);
    let plain = common::scratch();
    let inside = disk.root().join("backing");
    fs::create_dir(&inside).unwrap();
    let mut store = Mounted::over(vec![inside, plain.path().to_path_buf()]);
    fs::write(store.path("mapped"), [1; 4096]).unwrap();
    // What no version has is not deferred.
    let program = "import mmap, os\nfd = os.open('mapped', os.O_RDWR)\nos.ftruncate(fd, 8192)\n\
                   memory = mmap.mmap(fd, 8192)\nmemory[4096:4100] = b'mine'\n\
                   os.write(1, b'x')\nos.read(0, 1)";
    let mut holder = Command::new("python3")
        .args(["-c", program])
        .current_dir(&store.mnt)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let said = holder.stdout.as_mut().unwrap();
    std::io::Read::read_exact(said, &mut [0]).unwrap();
    run(Command::new("fsfreeze").arg("-f").arg(disk.root())).ok();
    let daemon = store.daemon();
    let mut asking = Command::new(common::run::binary())
        .args(["snapshot", "create", "never"])
        .current_dir(&store.mnt)
        .spawn()
        .unwrap();
    let tasks = format!("/proc/{daemon}/task");
    let waits = || {
        let tasks = fs::read_dir(&tasks).map(|tasks| tasks.flatten().collect::<Vec<_>>());
        tasks.unwrap_or_default().iter().any(|task| {
            let call = fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
            call.starts_with(&format!("{} ", libc::SYS_sync_file_range))
        })
    };
    let outcome = std::panic::catch_unwind(|| {
        wait_until("the barrier waits", 20, waits);
        store.kill_at_once();
    });
    run(Command::new("fsfreeze").arg("-u").arg(disk.root())).ok();
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    // It would wait as long as the socket's other end is open.
    asking.kill().unwrap();
    asking.wait().unwrap();
    let only = |count| fs::read_dir(&tasks).is_ok_and(|tasks| tasks.count() <= count);
    wait_until("but for the waiting thread all is over", 20, || only(2));
    let done = store.mount();
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert_eq!(done.code, 0, "{}", done.told());
    assert!(done.stderr.contains("waits for its own mount"), "{}", done.told());
    work(&store, "after");
    store.finish();
}

/// An XFS that shut itself down gave no page for a store to the index of a catalog's WAL, which
/// SQLite maps by itself, and the daemon ended by SIGBUS. A file that was cut short gives none
/// either.
#[test]
fn a_daemon_needs_no_page_of_a_mapped_file() {
    let store = Mounted::new();
    work(&store, "before");
    for backing in &store.backings {
        // What another process, as a command that looks, may leave.
        fs::write(backing.join(".rearview/catalog.db-shm"), "").unwrap();
    }
    let daemon = store.daemon();
    let maps = fs::read_to_string(format!("/proc/{daemon}/maps")).unwrap();
    assert!(!maps.contains("catalog.db"), "{maps}");
    work(&store, "after");
    store.rearview(&["check", "."]).ok();
    store.finish();
}

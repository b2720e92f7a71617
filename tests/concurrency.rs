//! Many programs at once on the same few names, through a real mount: the replicas stay equal and
//! healthy, an open reaches the file that its name means, and a killed daemon forgets no version.

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use common::Mounted;

/// Sub-directories of each of two directories: together more than directory handles are kept.
const SUBDIRS: usize = 700;
/// Rounds of the busier threads: some seconds of work.
const ROUNDS: usize = 1500;

fn exchange(a: &Path, b: &Path) {
    renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).expect("exchange");
}

/// Runs `often` again and again until `work` is done.
fn while_doing(work: impl FnOnce() + Send, often: impl Fn() + Sync) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                often();
            }
        });
        work();
        done.store(true, Ordering::Relaxed);
    });
}

/// A directory opened by its path while one above it moved was another one on each replica.
#[test]
fn files_made_below_moving_directories_land_in_the_same_place_everywhere() {
    let store = Mounted::new();
    let (first, second) = (store.path("d1"), store.path("d2"));
    for parent in [&first, &second] {
        for number in 0..SUBDIRS {
            fs::create_dir_all(parent.join(format!("s{number}"))).unwrap();
        }
    }
    while_doing(
        || {
            for round in 0..ROUNDS {
                let parent = if round % 2 == 0 { &first } else { &second };
                let path = parent.join(format!("s{}/x{round}", round * 7 % SUBDIRS));
                fs::write(path, "new").unwrap();
            }
        },
        || exchange(&first, &second),
    );
    store.rearview(&["status", store.mnt.to_str().unwrap()]).ok();
    store.finish();
}

/// The source was read for one replica, then written to, then read for the next.
#[test]
fn a_copy_of_a_file_that_is_being_written_is_the_same_everywhere() {
    let store = Mounted::new();
    let open = |name: &str| {
        let path = store.path(name);
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    };
    let (source, writer, target) = (open("source"), open("source"), open("target"));
    source.write_all_at(&vec![1; 1 << 20], 0).unwrap();
    while_doing(
        || {
            for _ in 0..60 {
                let (mut from, mut to) = (0, 0);
                let copied = rustix::fs::copy_file_range(
                    &source,
                    Some(&mut from),
                    &target,
                    Some(&mut to),
                    1 << 20,
                );
                copied.unwrap();
                let copies = [0, 1].map(|at| fs::read(store.backings[at].join("target")).unwrap());
                assert!(copies[0] == copies[1], "the replicas of the copy differ");
            }
        },
        || {
            let fill = rand_byte(&writer);
            writer.write_all_at(&vec![fill; 1 << 16], u64::from(fill % 15) << 16).unwrap();
            writer.set_len(1000 + u64::from(fill) * 4096).unwrap();
        },
    );
    store.rearview(&["status", store.mnt.to_str().unwrap()]).ok();
    drop((source, writer, target));
    store.finish();
}

/// A byte that differs from call to call.
fn rand_byte(file: &File) -> u8 {
    (file.metadata().unwrap().mtime_nsec() / 1000) as u8
}

/// A rename changed the backing first and the node's name later: an open in between reached the
/// other file.
#[test]
fn an_open_reaches_the_file_that_its_name_means() {
    let store = Mounted::new();
    let (p, q) = (store.path("p"), store.path("q"));
    fs::write(&p, "p").unwrap();
    fs::write(&q, "q").unwrap();
    let ino_p = fs::metadata(&p).unwrap().ino();
    while_doing(
        || {
            for _ in 0..ROUNDS {
                let file = OpenOptions::new().read(true).write(true).open(&p).unwrap();
                // The kernel must ask the filesystem, not its cache.
                let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
                let mut byte = [0];
                file.read_exact_at(&mut byte, 0).unwrap();
                let expected = if file.metadata().unwrap().ino() == ino_p { b'p' } else { b'q' };
                assert_eq!(byte[0], expected);
            }
        },
        || exchange(&p, &q),
    );
    store.finish();
}

fn kill_and_remount(store: &mut Mounted) {
    store.kill();
    store.mount().ok();
}

/// The content sealed at the close was not committed yet, and its before-image was thrown away.
#[test]
fn a_version_survives_what_was_overwritten_just_before_a_kill() {
    let mut store = Mounted::new();
    let old = vec![b'o'; 1 << 16];
    fs::write(store.path("f"), &old).unwrap();
    store.snapshot("s1");
    let open = |store: &Mounted| OpenOptions::new().write(true).open(store.path("f")).unwrap();
    open(&store).write_all_at(b"A", 0).unwrap();
    let second = open(&store);
    second.write_all_at(&vec![b'B'; 4096], 32768).unwrap();
    kill_and_remount(&mut store);
    drop(second);
    assert!(fs::read(store.past("s1").join("f")).unwrap() == old);
    store.finish();
}

/// The content's size was taken from its before-image alone, and an older one relied on the rest.
#[test]
fn a_version_survives_what_was_written_to_its_deleted_file_just_before_a_kill() {
    let mut store = Mounted::new();
    let old = vec![b'o'; 1 << 20];
    fs::write(store.path("f"), &old).unwrap();
    store.snapshot("s1");
    let open = || OpenOptions::new().write(true).open(store.path("f")).unwrap();
    let (first, second) = (open(), open());
    first.write_all_at(b"A", 900_000).unwrap();
    drop(first);
    fs::remove_file(store.path("f")).unwrap();
    second.write_all_at(&vec![b'B'; 100_000], 0).unwrap();
    kill_and_remount(&mut store);
    drop(second);
    let is_kept = |store: &Mounted| fs::read(store.past("s1").join("f")).unwrap() == old;
    assert!(is_kept(&store));
    store.rearview(&["prune", "--keep-last", "9"]).ok();
    assert!(is_kept(&store), "packed");
    store.finish();
}

/// The preserved file bore the id of a content that was not committed yet.
#[test]
fn a_version_survives_a_deletion_just_before_a_kill() {
    let mut store = Mounted::new();
    let old = vec![b'o'; 1 << 16];
    fs::write(store.path("f"), &old).unwrap();
    store.snapshot("s1");
    OpenOptions::new().write(true).open(store.path("f")).unwrap().write_all_at(b"A", 0).unwrap();
    fs::remove_file(store.path("f")).unwrap();
    kill_and_remount(&mut store);
    assert!(fs::read(store.past("s1").join("f")).unwrap() == old);
    assert!(!store.path("f").exists());
    store.finish();
}

//! The content of files behaves as POSIX says, through a real mount: mappings, locks, appends,
//! holes, allocation, copies, sizes; afterwards the mount and all backings are identical.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{IoSlice, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use common::disk::LoopFs;
use common::run::python;
use common::{Mounted, need};

#[test]
fn two_processes_share_one_mmap() {
    need(&["python3"]);
    let store = Mounted::new();
    // Pipes order the two: each sees through its own mapping what the other wrote through its.
    python(
        &store.mnt,
        r#"
import mmap, os
with open("shared", "wb") as f: f.truncate(3 * 4096)
to_child, to_parent = os.pipe(), os.pipe()
pid = os.fork()
fd = os.open("shared", os.O_RDWR)
m = mmap.mmap(fd, 3 * 4096, mmap.MAP_SHARED)
if pid == 0:
    assert os.read(to_child[0], 1) == b"g"
    assert m[4096:4101] == b"hello", m[4096:4101]
    m[8192:8197] = b"child"
    os.write(to_parent[1], b"d")
    os._exit(0)
m[4096:4101] = b"hello"
os.write(to_child[1], b"g")
assert os.read(to_parent[0], 1) == b"d"
assert os.waitpid(pid, 0)[1] == 0
assert m[8192:8197] == b"child"
m.flush()
m.close()
os.close(fd)
"#,
    );
    let bytes = fs::read(store.path("shared")).unwrap();
    assert_eq!((&bytes[4096..4101], &bytes[8192..8197]), (&b"hello"[..], &b"child"[..]));
    store.finish();
}

/// A program that only writes does so past the page cache that readers have filled.
#[test]
fn readers_and_maps_see_what_a_program_writes_that_only_writes() {
    need(&["python3"]);
    let store = Mounted::new();
    python(
        &store.mnt,
        r#"
import mmap, os, random
pages, chance = 40, random.Random(20261126)
expected = bytearray(chance.randbytes(pages * 4096 + 77))
writer = os.open("file", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
assert os.write(writer, expected) == len(expected)
reader = os.open("file", os.O_RDONLY)
shown = mmap.mmap(reader, pages * 4096, mmap.MAP_SHARED, mmap.PROT_READ)
assert shown[:] == expected[:pages * 4096]
for number in range(300):
    at, size = chance.randrange(pages * 4096), chance.choice((1, 100, 4096, 9000, 70000))
    bytes_ = chance.randbytes(size)
    if number % 50 == 49:
        # Others open and close it meanwhile, for writing and for both.
        os.close(os.open("file", chance.choice((os.O_WRONLY, os.O_RDWR))))
        os.close(writer)
        writer = os.open("file", os.O_WRONLY)
    assert os.pwrite(writer, bytes_, at) == size
    expected[len(expected):at] = bytes(max(0, at - len(expected)))
    expected[at:at + size] = bytes_
    assert shown[:] == expected[:pages * 4096], number
    assert os.pread(reader, size + 10, at) == expected[at:at + size + 10], number
    assert os.fstat(reader).st_size == len(expected), number
appender = os.open("file", os.O_WRONLY | os.O_APPEND)
for number in range(20):
    os.write(appender, b"%d\n" % number)
    expected += b"%d\n" % number
    assert os.pread(reader, 100, len(expected) - 100) == expected[-100:], number
os.ftruncate(writer, 5000)
os.pwrite(writer, b"end", 6000)
expected[5000:] = bytes(1000) + b"end"
assert os.pread(reader, 10000, 0) == expected
open("expected", "wb").write(expected)
"#,
    );
    let bytes = fs::read(store.path("file")).unwrap();
    assert!(bytes == fs::read(store.path("expected")).unwrap(), "they differ");
    store.finish();
}

#[test]
fn stores_to_a_map_take_nothing_from_a_program_that_only_writes() {
    need(&["python3"]);
    let store = Mounted::new();
    python(
        &store.mnt,
        r#"
import mmap, os, random
pages, chance = 16, random.Random(20261126)
with open("shared", "wb") as f: f.write(bytes(pages * 4096))
mapped, done = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    m = mmap.mmap(os.open("shared", os.O_RDWR), 0, mmap.MAP_SHARED)
    os.set_blocking(done[0], False)
    os.write(mapped[1], b"m")
    while True:
        for at in range(0, len(m), 4096): m[at] = (m[at] + 1) % 256
        try: os._exit(0 if os.read(done[0], 1) == b"d" else 1)
        except BlockingIOError: pass
assert os.read(mapped[0], 1) == b"m"
writer = os.open("shared", os.O_WRONLY)
expected = bytearray(pages * 4096)
for _ in range(3000):
    at, bytes_ = chance.randrange(pages) * 4096 + 100, chance.randbytes(50)
    assert os.pwrite(writer, bytes_, at) == 50
    expected[at:at + 50] = bytes_
os.write(done[1], b"d")
assert os.waitpid(pid, 0)[1] == 0
found = bytearray(open("shared", "rb").read())
for at in range(0, len(found), 4096): found[at] = 0
assert found == expected
"#,
    );
    store.finish();
}

/// What somebody reads while it is written past the kernel's cache must not stay in that.
#[test]
fn a_reader_beside_a_writer_leaves_nothing_old_in_the_cache() {
    const PAGE: usize = 4096;
    const PAGES: usize = 8;
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let mut store = Mounted::new();
    let path = store.path("log");
    fs::write(&path, vec![0; PAGES * PAGE]).unwrap();
    // The kernel ends the open of who made it some time after.
    store.remount();
    let (writer, done) =
        (OpenOptions::new().write(true).open(&path).unwrap(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (reader, mut page) = (File::open(&path).unwrap(), [0; 2 * PAGE]);
                while !done.load(Ordering::Relaxed) {
                    for number in 0..PAGES {
                        reader.read_at(&mut page, (number * PAGE) as u64).unwrap();
                    }
                    let end = reader.metadata().unwrap().len();
                    reader.read_at(&mut page, end - 100).unwrap();
                }
            });
        }
        // Whatever goes wrong here, the others end.
        let _end = Ends(&done);
        let begun = Instant::now();
        for number in (0..6000_usize).take_while(|_| begun.elapsed() < Duration::from_secs(10)) {
            let bytes = vec![number as u8 | 1; 300 + number % 3000];
            let at = match number % 3 {
                0 => fs::metadata(&path).unwrap().len(),
                _ => (number % PAGES * PAGE + 100) as u64,
            };
            writer.write_all_at(&bytes, at).unwrap();
            let mut found = vec![0; bytes.len()];
            File::open(&path).unwrap().read_exact_at(&mut found, at).unwrap();
            assert!(found == bytes, "old bytes are shown after write {number}, at {at}");
        }
    });
    drop(writer);
    store.finish();
}

/// Who only writes does so past the kernel's cache, and the kernel asks for no sync then.
#[test]
fn a_synchronous_write_is_on_all_disks_when_it_returns() {
    const BYTES: usize = 1 << 20;
    need(&["mkfs.ext4"]);
    let disks = [LoopFs::ext4(64), LoopFs::ext4(64)];
    let store = Mounted::over(disks.iter().map(|disk| disk.root().join("backing")).collect());
    let ways = [
        (libc::O_SYNC, ReadWriteFlags::empty()),
        (libc::O_DSYNC, ReadWriteFlags::empty()),
        (libc::O_DSYNC | libc::O_APPEND, ReadWriteFlags::empty()),
        (0, ReadWriteFlags::DSYNC),
        (0, ReadWriteFlags::SYNC),
    ];
    for (number, (flags, each)) in ways.into_iter().enumerate() {
        for reads in [false, true] {
            let path = store.path(&format!("file{number}-{reads}"));
            let mut options = OpenOptions::new();
            options.read(reads).write(true).create(true).custom_flags(flags);
            let file = options.open(&path).unwrap();
            let before = disks.each_ref().map(|disk| {
                rustix::fs::syncfs(File::open(disk.root()).unwrap()).unwrap();
                disk.written()
            });
            let bytes = vec![number as u8 + 1; BYTES];
            let wrote = rustix::io::pwritev2(&file, &[IoSlice::new(&bytes)], 0, each).unwrap();
            // Before the close, with which a file's bytes may go out as well.
            let after = disks.each_ref().map(LoopFs::written);
            assert_eq!(wrote, BYTES);
            for (before, after) in before.iter().zip(after) {
                let written = after - before;
                assert!(written >= BYTES as u64, "{flags:o} {each:?} {reads}: {written} bytes");
            }
        }
    }
    store.finish();
}

#[test]
fn fcntl_locks_exclude_other_processes_by_range() {
    need(&["python3"]);
    let store = Mounted::new();
    python(
        &store.mnt,
        r#"
import fcntl, os, subprocess, sys
f = open("locked", "w+b"); f.write(b"x" * 100); f.flush()
fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)
probe = '''
import fcntl, sys
f = open("locked", "r+b")
start = int(sys.argv[1])
try:
    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, start)
except OSError:
    sys.exit(7)
'''
def other(start): return subprocess.run([sys.executable, "-c", probe, str(start)]).returncode
assert other(0) == 7 and other(5) == 7, "a locked range is refused"
assert other(20) == 0, "another range is free"
fcntl.lockf(f, fcntl.LOCK_UN, 10, 0)
assert other(0) == 0, "an unlocked range is free"
"#,
    );
    store.finish();
}

#[test]
fn flock_excludes_other_opens() {
    let store = Mounted::new();
    let path = store.path("locked");
    let first = File::create(&path).unwrap();
    let second = File::open(&path).unwrap();
    rustix::fs::flock(&first, FlockOperation::LockExclusive).unwrap();
    let refused = rustix::fs::flock(&second, FlockOperation::NonBlockingLockShared);
    assert_eq!(refused, Err(Errno::WOULDBLOCK));
    drop(first);
    rustix::fs::flock(&second, FlockOperation::NonBlockingLockShared).unwrap();
    drop(second);
    store.finish();
}

#[test]
fn appends_of_several_writers_do_not_overwrite_each_other() {
    let store = Mounted::new();
    let path = store.path("log");
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let path = &path;
            scope.spawn(move || {
                let mut log = OpenOptions::new().append(true).create(true).open(path).unwrap();
                for line in 0..500 {
                    log.write_all(format!("writer {writer} line {line:04}\n").as_bytes()).unwrap();
                }
            });
        }
    });
    let text = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2000);
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), 2000, "every line is there exactly once");
    store.finish();
}

/// The data ranges of a file as SEEK_DATA and SEEK_HOLE tell them.
fn data_ranges(file: &File) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(file, SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data)).unwrap();
        ranges.push((data, hole));
        at = hole;
    }
    ranges
}

#[test]
fn holes_are_seen_and_kept() {
    let store = Mounted::new();
    let path = store.path("sparse");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all_at(&[1; 4096], 1 << 20).unwrap();
    file.write_all_at(&[2; 4096], 5 << 20).unwrap();
    file.set_len(8 << 20).unwrap();
    let wanted = vec![(1 << 20, (1 << 20) + 4096), (5 << 20, (5 << 20) + 4096)];
    assert_eq!(data_ranges(&file), wanted);
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Data(8 << 20)), Err(Errno::NXIO));
    assert!(file.metadata().unwrap().blocks() * 512 < 1 << 20, "holes take no space");
    for backing in &store.backings {
        let copy = File::open(backing.join("sparse")).unwrap();
        assert_eq!(data_ranges(&copy), wanted);
    }
    drop(file);
    store.finish();
}

#[test]
fn fallocate_reserves_punches_zeroes_and_keeps_size() {
    // tmpfs has no FALLOC_FL_ZERO_RANGE: this needs real disks.
    let disks = [common::disk::LoopFs::ext4(64), common::disk::LoopFs::ext4(64)];
    let backings = disks.iter().map(|disk| disk.root().join("b")).collect();
    let store = Mounted::over(backings);
    let path = store.path("file");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(&[7; 64 << 10]).unwrap();
    let call = |mode, offset, len| rustix::fs::fallocate(&file, mode, offset, len);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    call(punch, 4096, 8192).unwrap();
    call(FallocateFlags::ZERO_RANGE, 20_000, 1000).unwrap();
    call(FallocateFlags::empty(), 60 << 10, 16 << 10).unwrap();
    assert_eq!(file.metadata().unwrap().size(), 76 << 10);
    call(FallocateFlags::KEEP_SIZE, 76 << 10, 1 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().size(), 76 << 10);
    assert!(file.metadata().unwrap().blocks() * 512 >= 1 << 20, "reserved blocks are counted");
    assert_eq!(call(FallocateFlags::COLLAPSE_RANGE, 0, 4096), Err(Errno::OPNOTSUPP));
    let mut wanted = vec![7_u8; 64 << 10];
    wanted.resize(76 << 10, 0);
    wanted[4096..4096 + 8192].fill(0);
    wanted[20_000..21_000].fill(0);
    assert!(fs::read(&path).unwrap() == wanted, "the bytes are as the calls left them");
    drop(file);
    store.finish();
}

#[test]
fn copy_file_range_copies_within_and_between_files() {
    let store = Mounted::new();
    let bytes: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
    fs::write(store.path("from"), &bytes).unwrap();
    let from = File::open(store.path("from")).unwrap();
    let to =
        OpenOptions::new().read(true).write(true).create_new(true).open(store.path("to")).unwrap();
    let copy = |mut source: u64, mut target: u64, mut left: usize| {
        while left > 0 {
            let done =
                rustix::fs::copy_file_range(&from, Some(&mut source), &to, Some(&mut target), left)
                    .unwrap();
            assert!(done > 0, "a copy makes progress");
            left -= done;
        }
    };
    copy(0, 0, bytes.len());
    copy(100_001, 7, 50_003);
    let mut wanted = bytes.clone();
    wanted[7..50_010].copy_from_slice(&bytes[100_001..150_004]);
    assert!(fs::read(store.path("to")).unwrap() == wanted);
    drop((from, to));
    store.finish();
}

#[test]
fn files_beyond_four_gibibytes_work() {
    let disk = common::disk::LoopFs::ext4(64);
    let store = Mounted::over(vec![disk.root().join("a"), disk.root().join("b")]);
    let path = store.path("huge");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    let far = (5_u64 << 30) + 123;
    file.write_all_at(b"far away", far).unwrap();
    file.set_len(1 << 40).unwrap();
    let mut read = [0; 10];
    file.read_exact_at(&mut read, far - 1).unwrap();
    assert_eq!(&read, b"\0far away\0");
    assert_eq!(file.metadata().unwrap().size(), 1 << 40);
    file.set_len(far + 3).unwrap();
    drop(file);
    store.snapshot("huge");
    assert_eq!(fs::metadata(store.past("huge").join("huge")).unwrap().size(), far + 3);
    // Hashing terabytes of holes tells nothing more: compare the far bytes, then drop the file.
    for backing in &store.backings {
        let copy = File::open(backing.join("huge")).unwrap();
        let mut read = [0; 3];
        copy.read_exact_at(&mut read, far).unwrap();
        assert_eq!(&read, b"far");
    }
    fs::remove_file(&path).unwrap();
    store.finish();
}

#[test]
fn truncating_opens_and_sparse_overwrites_read_back() {
    let store = Mounted::new();
    let path = store.path("file");
    fs::write(&path, vec![1_u8; 200_000]).unwrap();
    fs::write(&path, "short").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "short");
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(100_000).unwrap();
    file.write_all_at(b"end", 99_997).unwrap();
    file.set_len(50_000).unwrap();
    file.set_len(100_000).unwrap();
    drop(file);
    let bytes = fs::read(&path).unwrap();
    assert_eq!(&bytes[..5], b"short");
    assert!(bytes[5..].iter().all(|byte| *byte == 0), "what was cut off does not come back");
    store.finish();
}

//! Requests over io_uring: what programs see is what they see when the kernel's device is read.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use common::{Mounted, fixture, run, shell, tree, wait_until};
use rustix::fs::{CWD, FallocateFlags, RenameFlags, SeekFrom, XattrFlags, renameat_with};

/// Whether the kernel offers them to what is mounted from then on.
const ALLOWED: &str = "/sys/module/fuse/parameters/enable_uring";
/// Whether nobody may use io_uring.
const DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";

/// Settings of the kernel's for the length of a mount, given back at the end. One test at a time
/// has any, and those that must not be disturbed have them to their end.
struct Settings {
    before: Vec<(&'static str, String)>,
    _alone: MutexGuard<'static, ()>,
}

impl Settings {
    fn new(wanted: &[(&'static str, &str)]) -> Settings {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut settings = Settings { before: Vec::new(), _alone: alone };
        for &(path, value) in wanted {
            let before = fs::read_to_string(path).expect("the setting can be read");
            fs::write(path, value).expect("the setting can be changed");
            settings.before.push((path, before));
        }
        settings
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        for (path, before) in &self.before {
            fs::write(path, before.trim()).expect("the setting can be given back");
        }
    }
}

/// Whether this kernel has FUSE over io_uring (since Linux 6.14, if built with it).
fn is_known_here() -> bool {
    let known = Path::new(ALLOWED).exists();
    if !known {
        eprintln!("this kernel has no FUSE over io_uring: nothing to test");
    }
    known
}

fn mounted_with(options: &str) -> Mounted {
    let all = format!("allow_other,dev,suid,snapshot_every=0,{options}");
    Mounted::with_options(all.trim_end_matches(','))
}

fn over_rings() -> (Mounted, Settings) {
    let allowed = Settings::new(&[(ALLOWED, "Y"), (DISABLED, "0")]);
    let store = mounted_with("");
    assert!(ring_threads(&store) > 0, "it is not served over io_uring");
    (store, allowed)
}

fn ring_threads(store: &Mounted) -> usize {
    let tasks = fs::read_dir(format!("/proc/{}/task", store.daemon())).unwrap();
    let names =
        tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.starts_with("rv-ring")).count()
}

#[test]
fn rings_are_used_where_they_are_allowed_and_not_switched_off() {
    if !is_known_here() {
        return;
    }
    over_rings().0.finish();
    for (allowed, disabled, options) in [("N", "0", ""), ("Y", "0", "io_uring=off"), ("Y", "2", "")]
    {
        let _settings = Settings::new(&[(ALLOWED, allowed), (DISABLED, disabled)]);
        let store = mounted_with(options);
        assert_eq!(ring_threads(&store), 0, "{allowed} {disabled} {options}");
        fs::write(store.path("f"), "served all the same").unwrap();
        store.finish();
    }
}

/// The kernel holds all requests back once rings were agreed on, until it is told of none.
#[test]
fn where_a_thread_for_rings_cannot_be_had_the_device_serves() {
    if !is_known_here() {
        return;
    }
    let _settings = Settings::new(&[(ALLOWED, "Y"), (DISABLED, "0")]);
    let folder = common::scratch();
    // The kernel has no queues for so many.
    fs::write(folder.path().join("possible"), "0-50\n").unwrap();
    let script = format!(
        r#"
mount --bind possible /sys/devices/system/cpu/possible
mkdir a b mnt && {rearview} mount a b mnt 2>told
echo served > mnt/f && cat a/f && ls mnt
{rearview} umount mnt
cat told
"#,
        rearview = run::binary().display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "bash", "-e", "-c", &script]).current_dir(folder.path());
    let told = run::run_within(&mut command, 60).ok();
    assert!(told.starts_with("served\nf\n"), "{told}");
    assert!(told.contains("instead of io_uring"), "{told}");
}

/// All kinds of objects, changed by all means, and as they were: each with everything that a
/// program can ask of it.
#[test]
fn trees_are_the_same_over_rings_as_over_the_device() {
    if !is_known_here() {
        return;
    }
    let (store, _allowed) = over_rings();
    let stores = [store, mounted_with("io_uring=off")];
    let seen = stores.each_ref().map(|store| {
        let folder = store.path("tree");
        fixture::rich_tree(&folder);
        // Random otherwise.
        fs::write(folder.join("src/deep/blob.bin"), [5; 300_000]).unwrap();
        ages_ago(&folder);
        store.snapshot("rich");
        fixture::wreck(&folder);
        let many = folder.join("many");
        fs::create_dir(&many).unwrap();
        (0..3000).for_each(|n| fs::write(many.join(format!("file number {n}")), "x").unwrap());
        ages_ago(&folder);
        let past = store.past("rich").join("tree");
        (tree::read_tree(&folder), tree::names_in(&many), tree::read_tree(&past))
    });
    let [(live, many, past), (live_of_device, many_of_device, past_of_device)] = seen;
    assert_eq!(many, many_of_device);
    assert_eq!(many.len(), 3000);
    tree::assert_trees("the live trees", &live, &live_of_device);
    tree::assert_trees("trees of the past", &past, &past_of_device);
    for store in stores {
        store.finish();
    }
}

/// Gives all objects one time, whenever they were made.
fn ages_ago(folder: &Path) {
    shell(folder, "find . -exec touch -h -d 1960-01-01T00:00:00.25Z {} +");
}

/// What each call answers, good or bad.
#[test]
fn calls_are_answered_over_rings_as_over_the_device() {
    if !is_known_here() {
        return;
    }
    let (store, _allowed) = over_rings();
    let stores = [store, mounted_with("io_uring=off")];
    let [rings, device] = stores.each_ref().map(answers);
    assert_eq!(rings, device);
    for store in stores {
        store.finish();
    }
}

fn answers(store: &Mounted) -> Vec<String> {
    let at = |name: &str| store.path(name);
    let mut told = Vec::new();
    let mut tell =
        |call: &str, answer: Result<String, i32>| told.push(format!("{call}: {answer:?}"));
    let text = |error: io::Error| error.raw_os_error().unwrap_or(-1);
    let unix = |error: rustix::io::Errno| error.raw_os_error();

    tell("open what is not there", File::open(at("none")).map(|_| String::new()).map_err(text));
    fs::write(at("a"), "0123456789").unwrap();
    fs::create_dir(at("dir")).unwrap();
    tell("mkdir again", fs::create_dir(at("dir")).map(|()| String::new()).map_err(text));
    let long = "n".repeat(256);
    tell("a name too long", fs::write(at(&long), "").map(|()| String::new()).map_err(text));
    tell("unlink a directory", fs::remove_file(at("dir")).map(|()| String::new()).map_err(text));
    tell("rmdir a file", fs::remove_dir(at("a")).map(|()| String::new()).map_err(text));
    fs::write(at("dir/b"), "b").unwrap();
    tell("rmdir what is full", fs::remove_dir(at("dir")).map(|()| String::new()).map_err(text));
    for (how, flags) in [
        ("no replace", RenameFlags::NOREPLACE),
        ("exchange", RenameFlags::EXCHANGE),
        ("whiteout", RenameFlags::WHITEOUT),
        ("replace", RenameFlags::empty()),
    ] {
        let done = renameat_with(CWD, at("a"), CWD, at("dir/b"), flags);
        tell(how, done.map(|()| String::new()).map_err(unix));
        tell("after it", fs::read_to_string(at("dir/b")).map_err(text));
    }
    fs::hard_link(at("dir/b"), at("link")).unwrap();
    tell("links", fs::metadata(at("link")).map(|m| m.nlink().to_string()).map_err(text));
    std::os::unix::fs::symlink("to/where", at("symlink")).unwrap();
    let target = fs::read_link(at("symlink")).map(|to| to.display().to_string());
    tell("readlink", target.map_err(text));

    let file = OpenOptions::new().read(true).write(true).open(at("link")).unwrap();
    file.set_len(0).unwrap();
    file.write_all_at(&[7; 100_000], 1 << 20).unwrap();
    for (whence, from) in [
        ("data", SeekFrom::Data(0)),
        ("hole", SeekFrom::Hole(1 << 20)),
        ("data past the end", SeekFrom::Data(1 << 30)),
    ] {
        tell(whence, rustix::fs::seek(&file, from).map(|at| at.to_string()).map_err(unix));
    }
    let keep = FallocateFlags::KEEP_SIZE;
    for (what, mode) in [
        ("allocate", FallocateFlags::empty()),
        ("punch", keep | FallocateFlags::PUNCH_HOLE),
        ("collapse", FallocateFlags::COLLAPSE_RANGE),
    ] {
        let done = rustix::fs::fallocate(&file, mode, 1 << 20, 8192);
        tell(what, done.map(|()| file.metadata().unwrap().len().to_string()).map_err(unix));
    }
    let copy = File::create(at("copy")).unwrap();
    let copied = rustix::fs::copy_file_range(&file, Some(&mut (1 << 20)), &copy, None, 50_000);
    tell("copied", copied.map(|bytes| bytes.to_string()).map_err(unix));
    let bytes = fs::read(at("copy")).unwrap();
    tell("its sum", Ok(bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>().to_string()));
    // Longer than one request is.
    let large: Vec<u8> = (0..3_000_001_u32).map(|n| (n % 251) as u8).collect();
    fs::write(at("large"), &large).unwrap();
    tell("a large file", Ok((fs::read(at("large")).unwrap() == large).to_string()));
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(at("large"));
    let mut buffer = vec![0; 2 << 20];
    let got = direct.and_then(|file| file.read_at(&mut buffer, 4096));
    tell(
        "read past the cache",
        got.map(|n| (buffer[..n] == large[4096..][..n]).to_string()).map_err(text),
    );

    let value = vec![b'v'; 2000];
    for (how, flags) in [
        ("replace", XattrFlags::REPLACE),
        ("create", XattrFlags::CREATE),
        ("create again", XattrFlags::CREATE),
    ] {
        let done = rustix::fs::setxattr(at("link"), "user.x", &value, flags);
        tell(how, done.map(|()| String::new()).map_err(unix));
    }
    for (what, name, room) in [
        ("size", "user.x", 0),
        ("value", "user.x", 4000),
        ("short", "user.x", 10),
        ("no", "user.y", 9),
    ] {
        let mut room = vec![0_u8; room];
        let got = rustix::fs::getxattr(at("link"), name, room.as_mut_slice());
        tell(what, got.map(|bytes| format!("{bytes} {room:?}")).map_err(unix));
    }
    let mut names = vec![0_u8; 100];
    let got = rustix::fs::listxattr(at("link"), names.as_mut_slice());
    tell("names", got.map(|bytes| format!("{:?}", &names[..bytes])).map_err(unix));
    let removed = rustix::fs::removexattr(at("link"), "user.x");
    tell("remove", removed.map(|()| String::new()).map_err(unix));

    tell(
        "statfs",
        rustix::fs::statvfs(store.mnt.as_path())
            .map_err(unix)
            .map(|told| format!("{} {} {}", told.f_bsize, told.f_namemax, told.f_blocks > 0)),
    );
    tell("fsync", file.sync_all().map(|()| String::new()).map_err(text));
    let dir = File::open(store.path("dir")).unwrap();
    tell("fsync of a directory", dir.sync_all().map(|()| String::new()).map_err(text));
    store.snapshot("then");
    let past = store.past("then");
    tell(
        "write to the past",
        fs::write(past.join("copy"), "").map_err(text).map(|()| String::new()),
    );
    tell("read the past", fs::read(past.join("copy")).map_err(text).map(|b| b.len().to_string()));
    tell(
        "a name of the past",
        fs::metadata(past.join("none")).map_err(text).map(|_| String::new()),
    );
    told
}

/// Each waits for the files that programs have mapped, which the kernel sends to the queue of the
/// same processor: more than it has threads, all on that processor. In `.snapshots` of one
/// directory the kernel would make one after the other.
#[test]
fn snapshots_that_are_made_at_once_leave_threads_for_what_they_wait_for() {
    const AT_ONCE: usize = 12;
    if !is_known_here() {
        return;
    }
    let (store, _allowed) = over_rings();
    let before = ring_threads(&store);
    let writer = r#"
import mmap, os, threading
os.sched_setaffinity(0, {0})
files = [open(f"mapped{n}", "w+b") for n in range(8)]
[file.truncate(1 << 20) for file in files]
maps = [mmap.mmap(file.fileno(), 1 << 20) for file in files]
for number in range(12):
    os.mkdir(f"d{number}")
    os.stat(f"d{number}/.snapshots")
all_ready = threading.Barrier(12)
def make(number):
    for m in maps:
        m[number * 4096:number * 4096 + 4] = b"here"
    all_ready.wait()
    os.mkdir(f"d{number}/.snapshots/s{number}")
threads = [threading.Thread(target=make, args=(n,)) for n in range(12)]
[t.start() for t in threads]
[t.join() for t in threads]
"#;
    let mut python = Command::new("python3");
    run::run_within(python.arg("-c").arg(writer).current_dir(&store.mnt), 60).ok();
    for number in 0..AT_ONCE {
        let name = format!("s{number}");
        let mapped = fs::read(store.past(&name).join("mapped7")).unwrap();
        assert_eq!(&mapped[number * 4096..][..4], b"here", "snapshot {name}");
    }
    assert!(ring_threads(&store) >= before, "none of the threads is gone");
    store.finish();
}

#[test]
fn a_killed_daemon_leaves_nobody_waiting_and_nothing_lost() {
    if !is_known_here() {
        return;
    }
    let (mut store, _allowed) = over_rings();
    fs::create_dir(store.path("d")).unwrap();
    let programs: Vec<_> = (0..4)
        .map(|number| {
            let path = store.path(&format!("d/f{number}"));
            std::thread::spawn(move || {
                let mut acknowledged = 0_u64;
                while fs::write(&path, acknowledged.to_string()).is_ok()
                    && fs::read_to_string(&path).is_ok()
                {
                    acknowledged += 1;
                }
                acknowledged
            })
        })
        .collect();
    wait_until("all are at work", 20, || {
        (0..4).all(|number| store.path(&format!("d/f{number}")).exists())
    });
    store.kill();
    let acknowledged: Vec<u64> = programs.into_iter().map(|p| p.join().unwrap()).collect();
    shell(Path::new("/"), &format!("umount -l '{}'", store.mnt.display()));
    store.ended_elsewhere();
    store.mount().ok();
    for (number, acknowledged) in acknowledged.into_iter().enumerate() {
        let text = fs::read_to_string(store.path(&format!("d/f{number}"))).unwrap();
        // The last one may have been emptied for the next.
        let is_kept = text.is_empty() || text.parse::<u64>().unwrap() + 1 >= acknowledged;
        assert!(is_kept, "f{number} has {text}, of {acknowledged}");
    }
    store.finish();
}

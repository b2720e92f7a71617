//! The directory backing on real directories; what needs root is passed over without it.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;

use super::*;
use crate::types::Timestamp;

const USER: Creds = Creds { uid: 65534, gid: 65534, umask: 0o022 };

struct Rig {
    dir: TempDir,
    backing: DirBacking,
    root: Handle,
}

fn rig() -> Rig {
    let dir = TempDir::new().expect("a temporary directory");
    let backing = DirBacking::open(dir.path()).expect("open");
    let root = backing.open_dir(&RelPath::root()).expect("open the root");
    Rig { dir, backing, root }
}

fn name(text: impl AsRef<[u8]>) -> EntryName {
    EntryName::new(text).expect("a valid name")
}

fn path(text: &str) -> RelPath {
    RelPath::parse(text).expect("a valid path")
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.expect_err("it fails").raw_os_error().expect("an errno")
}

impl Rig {
    fn file(&self, text: &str) -> Handle {
        self.backing.create(&self.root, &name(text), 0o644, Creds::DAEMON).expect("create")
    }

    fn node(&self, text: &str) -> Handle {
        self.backing.open_node(&self.root, &name(text)).expect("open the node")
    }
}

#[test]
fn content_is_read_back_across_holes_and_ends() {
    let Rig { backing, root, .. } = &rig();
    let file = backing.create(root, &name("f"), 0o644, Creds::DAEMON).expect("create");
    backing.write_at(&file, b"hello", 1 << 20).expect("write");
    let mut buffer = [9; 8];
    assert_eq!(backing.read_at(&file, &mut buffer, (1 << 20) + 2).expect("read"), 3);
    assert_eq!(&buffer[..3], b"llo");
    assert_eq!(backing.read_at(&file, &mut buffer, 0).expect("read"), 8);
    assert_eq!(buffer, [0; 8]);
    assert_eq!(backing.seek(&file, 0, Seek::Data).expect("seek"), 1 << 20);
    assert_eq!(backing.seek(&file, 0, Seek::Hole).expect("seek"), 0);
    assert_eq!(errno(backing.seek(&file, 1 << 21, Seek::Data)), libc::ENXIO);
    backing.truncate(&file, 3).expect("truncate");
    assert_eq!(backing.stat(&file).expect("stat").size, 3);
    backing.fallocate(&file, 0, 0, 8192).expect("fallocate");
    assert_eq!(backing.stat(&file).expect("stat").size, 8192);
    let again = backing.open_file(root, &name("f"), Access::Read).expect("open");
    assert_eq!(errno(backing.write_at(&again, b"x", 0)), libc::EBADF);
}

#[test]
fn ranges_are_copied_and_clones_are_made_or_refused() {
    let rig = rig();
    let (from, to) = (rig.file("from"), rig.file("to"));
    rig.backing.write_at(&from, &[7; 10_000], 0).expect("write");
    assert_eq!(rig.backing.copy_range(&from, 100, &to, 50, 5000).expect("copy"), 5000);
    assert_eq!(rig.backing.stat(&to).expect("stat").size, 5050);
    match rig.backing.clone_file(&from, &to) {
        Ok(()) => assert_eq!(rig.backing.stat(&to).expect("stat").size, 10_000),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP)),
    }
}

#[test]
fn a_file_of_another_mode_of_access_is_not_content() {
    let rig = rig();
    let Rig { backing, root, .. } = &rig;
    backing.mkdir(root, &name("d"), 0o755, Creds::DAEMON).expect("mkdir");
    backing.mknod(root, &name("p"), Kind::Fifo, 0o644, 0, Creds::DAEMON).expect("mkfifo");
    backing.symlink(root, &name("l"), b"nowhere", Creds::DAEMON).expect("symlink");
    assert_eq!(errno(backing.open_file(root, &name("d"), Access::Read)), libc::EISDIR);
    assert_eq!(errno(backing.open_file(root, &name("p"), Access::Read)), libc::EINVAL);
    assert_eq!(errno(backing.open_file(root, &name("l"), Access::Read)), libc::ELOOP);
    assert_eq!(
        errno(backing.mknod(root, &name("x"), Kind::Dir, 0, 0, Creds::DAEMON)),
        libc::EINVAL
    );
    assert_eq!(errno(backing.create(root, &name("l"), 0o644, Creds::DAEMON)), libc::EEXIST);
}

#[test]
fn every_kind_and_every_name_is_listed() {
    let rig = rig();
    let Rig { backing, root, .. } = &rig;
    let long = name([b'n'; 255]);
    let wild = name(b"\xff\xfe\n\x01");
    rig.file("f");
    backing.mkdir(root, &long, 0o755, Creds::DAEMON).expect("mkdir");
    backing.symlink(root, &wild, b"/etc/passwd", Creds::DAEMON).expect("symlink");
    backing.mknod(root, &name("p"), Kind::Fifo, 0o600, 0, Creds::DAEMON).expect("mkfifo");
    backing.mknod(root, &name("s"), Kind::Socket, 0o600, 0, Creds::DAEMON).expect("mksock");
    let mut kinds: Vec<_> = backing.list(root).expect("list");
    kinds.sort_by(|a, b| a.name.cmp(&b.name));
    let kinds: Vec<_> = kinds.into_iter().map(|entry| (entry.name, entry.kind)).collect();
    let expected = [
        (name("f"), Kind::File),
        (long, Kind::Dir),
        (name("p"), Kind::Fifo),
        (name("s"), Kind::Socket),
        (wild, Kind::Symlink),
    ];
    assert_eq!(kinds, expected);
}

#[test]
fn a_listing_longer_than_its_buffer_is_whole() {
    let rig = rig();
    (0..3000).for_each(|n| drop(rig.file(&format!("a file with number {n}"))));
    assert_eq!(rig.backing.list(&rig.root).expect("list").len(), 3000);
}

#[test]
fn names_are_linked_moved_exchanged_and_removed() {
    let rig = rig();
    let Rig { backing, root, .. } = &rig;
    let (a, b, c) = (&name("a"), &name("b"), &name("c"));
    let ino = |which: &EntryName| backing.stat_at(root, which).expect("stat").ino;
    rig.file("a");
    backing.link(root, a, root, b).expect("link");
    assert_eq!((ino(a), backing.stat_at(root, a).expect("stat").nlink), (ino(b), 2));
    rig.file("c");
    let (of_a, of_c) = (ino(a), ino(c));
    assert_eq!(errno(backing.rename(root, a, root, c, RenameMode::NoReplace)), libc::EEXIST);
    backing.rename(root, a, root, c, RenameMode::Exchange).expect("exchange");
    assert_eq!((ino(a), ino(c)), (of_c, of_a));
    backing.rename(root, a, root, b, RenameMode::Replace).expect("rename");
    assert_eq!(ino(b), of_c);
    backing.unlink(root, b).expect("unlink");
    assert_eq!(errno(backing.stat_at(root, b)), libc::ENOENT);
    backing.mkdir(root, a, 0o755, Creds::DAEMON).expect("mkdir");
    assert_eq!(errno(backing.unlink(root, a)), libc::EISDIR);
    backing.rmdir(root, a).expect("rmdir");
}

#[test]
fn a_handle_follows_its_object_through_rename_and_unlink() {
    let rig = rig();
    rig.file("f");
    let node = rig.node("f");
    let backing = &rig.backing;
    backing.rename(&rig.root, &name("f"), &rig.root, &name("g"), RenameMode::Replace).expect("mv");
    backing.chmod(&node, 0o604).expect("chmod");
    backing.unlink(&rig.root, &name("g")).expect("unlink");
    backing.chmod(&node, 0o640).expect("chmod of the unlinked");
    let stat = backing.stat(&node).expect("stat");
    assert_eq!((stat.mode, stat.nlink), (0o640, 0));
}

#[test]
fn attributes_of_a_symlink_are_its_own() {
    let rig = rig();
    let backing = &rig.backing;
    rig.file("target");
    backing.symlink(&rig.root, &name("l"), b"target", Creds::DAEMON).expect("symlink");
    let link = rig.node("l");
    assert_eq!(backing.readlink(&link).expect("readlink"), b"target");
    assert_eq!(errno(backing.readlink(&rig.node("target"))), libc::EINVAL);
    let time = Timestamp { secs: -5, nanos: 123_456_789 };
    backing.set_times(&link, SetTime::To(time), SetTime::To(time)).expect("times");
    assert_eq!(backing.stat(&link).expect("stat").mtime.secs, -5);
    assert!(backing.stat(&rig.node("target")).expect("stat").mtime.secs > 0);
    assert!(backing.chmod(&link, 0o600).is_err());
    assert_eq!(backing.stat(&rig.node("target")).expect("stat").mode, 0o644);
    if sys::is_root() {
        backing.chown(&link, Some(7), Some(8)).expect("chown");
        assert_eq!(backing.stat(&link).expect("stat").uid, 7);
        assert_eq!(backing.stat(&rig.node("target")).expect("stat").uid, 0);
    }
    assert_eq!(errno(backing.set_xattr(&link, OsStr::new("user.x"), b"v", 0)), libc::EPERM);
}

#[test]
fn times_are_set_omitted_and_read_to_the_nanosecond() {
    let rig = rig();
    let file = rig.file("f");
    let time = Timestamp { secs: 1_000_000_000, nanos: 1 };
    rig.backing.set_times(&file, SetTime::To(time), SetTime::To(time)).expect("times");
    rig.backing.set_times(&rig.node("f"), SetTime::Now, SetTime::Omit).expect("times");
    let stat = rig.backing.stat(&file).expect("stat");
    assert_eq!(stat.mtime, time);
    assert!(stat.atime > time);
}

#[test]
fn xattrs_of_any_size_are_kept_and_our_own_are_hidden() {
    let rig = rig();
    let backing = &rig.backing;
    rig.file("f");
    let node = rig.node("f");
    let set =
        |key: &str, value: &[u8], flags| backing.set_xattr(&node, OsStr::new(key), value, flags);
    if set("user.empty", b"", 0).is_err_and(|e| e.raw_os_error() == Some(libc::EOPNOTSUPP)) {
        return;
    }
    set("user.big", &[1; 3000], 0).expect("set");
    if sys::is_root() {
        set("trusted.rearview.x", b"own", 0).expect("set");
    }
    assert_eq!(errno(set("user.big", b"", libc::XATTR_CREATE)), libc::EEXIST);
    assert_eq!(errno(set("user.none", b"", libc::XATTR_REPLACE)), libc::ENODATA);
    assert_eq!(backing.get_xattr(&node, OsStr::new("user.big")).expect("get"), [1; 3000]);
    assert_eq!(errno(backing.get_xattr(&node, OsStr::new("user.none"))), libc::ENODATA);
    let all = backing.xattrs(&node).expect("all").0;
    let keys: Vec<_> = all.keys().filter(|key| !key.starts_with(b"security.")).collect();
    assert_eq!(keys, [&b"user.big"[..], b"user.empty"]);
    backing.remove_xattr(&node, OsStr::new("user.big")).expect("remove");
    assert!(!backing.xattrs(&node).expect("all").0.contains_key(&b"user.big"[..]));
}

#[test]
fn everything_can_be_made_durable() {
    let rig = rig();
    let backing = &rig.backing;
    let file = rig.file("f");
    backing.mknod(&rig.root, &name("p"), Kind::Fifo, 0o600, 0, Creds::DAEMON).expect("mkfifo");
    backing.sync(&file, true).expect("a file");
    backing.sync(&rig.node("f"), false).expect("a node");
    backing.sync(&rig.node("p"), false).expect("a pipe, without opening it");
    backing.sync(&rig.root, false).expect("a directory");
    backing.sync_all().expect("all");
    let space = backing.space().expect("space");
    assert!(space.blocks >= space.free && space.free >= space.available);
}

#[test]
fn paths_longer_than_the_kernel_takes_are_opened() {
    let rig = rig();
    let part = name([b'd'; 200]);
    let mut path = RelPath::root();
    let mut dir = rig.backing.open_dir(&path).expect("open");
    for _ in 0..45 {
        rig.backing.mkdir(&dir, &part, 0o755, Creds::DAEMON).expect("mkdir");
        path = path.join(&part);
        dir = rig.backing.open_dir(&path).expect("open");
    }
    assert!(path.to_bytes().len() > 9000);
}

#[test]
fn a_symlink_or_a_mount_in_the_path_is_refused() {
    let rig = rig();
    std::fs::create_dir_all(rig.dir.path().join("real/sub")).expect("mkdir");
    std::os::unix::fs::symlink("real", rig.dir.path().join("soft")).expect("symlink");
    std::os::unix::fs::symlink("/", rig.dir.path().join("out")).expect("symlink");
    for (bad, expected) in [
        ("soft", libc::ENOTDIR),
        ("soft/sub", libc::ELOOP),
        ("out", libc::ENOTDIR),
        ("out/etc", libc::ELOOP),
    ] {
        assert_eq!(errno(rig.backing.open_dir(&path(bad))), expected, "{bad}");
    }
    rig.backing.open_dir(&path("real/sub")).expect("open");
    let system = DirBacking::open(Path::new("/")).expect("open");
    assert_eq!(errno(system.open_dir(&path("proc/self"))), libc::EXDEV);
}

#[test]
fn a_directory_swapped_for_a_symlink_never_leads_out() {
    let rig = rig();
    let outside = TempDir::new().expect("a temporary directory");
    std::fs::create_dir(outside.path().join("sub")).expect("mkdir");
    let forbidden = std::fs::metadata(outside.path().join("sub")).expect("stat").ino();
    let at = |text: &str| rig.dir.path().join(text);
    std::fs::create_dir_all(at("d/sub")).expect("mkdir");
    std::os::unix::fs::symlink(outside.path(), at("evil")).expect("symlink");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let flags = RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(CWD, at("d"), CWD, at("evil"), flags).expect("swap");
            }
        });
        let (mut opened, mut refused) = (0, 0);
        while opened < 300 || refused < 300 {
            match rig.backing.open_dir(&path("d/sub")) {
                Ok(dir) => {
                    assert_ne!(rig.backing.stat(&dir).expect("stat").ino, forbidden);
                    opened += 1;
                }
                Err(_) => refused += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_user_s_objects_are_the_user_s_even_in_a_closed_directory() {
    if !sys::is_root() {
        return;
    }
    let rig = rig();
    let Rig { dir, backing, root } = &rig;
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o700)).expect("chmod");
    drop(backing.create(root, &name("f"), 0o666, USER).expect("create"));
    backing.mkdir(root, &name("d"), 0o777, Creds { umask: 0o077, ..USER }).expect("mkdir");
    backing.symlink(root, &name("l"), b"f", USER).expect("symlink");
    backing.mknod(root, &name("p"), Kind::Fifo, 0o666, 0, USER).expect("mknod");
    backing.mknod(root, &name("c"), Kind::CharDev, 0o666, 0x0103, USER).expect("a device");
    for (entry, mode) in [("f", 0o644), ("d", 0o700), ("p", 0o644), ("c", 0o644)] {
        let stat = backing.stat_at(root, &name(entry)).expect("stat");
        assert_eq!((stat.uid, stat.gid, stat.mode), (65534, 65534, mode), "{entry}");
    }
    assert_eq!(backing.stat_at(root, &name("l")).expect("stat").uid, 65534);
    assert_eq!(backing.stat_at(root, &name("c")).expect("stat").rdev, 0x0103);
    // The thread is still the user; what follows needs root's rights all the same.
    std::fs::write(dir.path().join("foreign"), b"x").expect("as the thread is");
    let node = rig.node("foreign");
    backing.chown(&node, Some(0), Some(0)).expect("chown");
    backing.chmod(&node, 0o000).expect("chmod");
    backing.set_xattr(&node, OsStr::new("trusted.x"), b"", 0).expect("a trusted attribute");
    drop(backing.open_file(root, &name("foreign"), Access::ReadWrite).expect("open"));
    backing.link(root, &name("foreign"), root, &name("hard")).expect("link");
    let (from, to) = (&name("foreign"), &name("moved"));
    backing.rename(root, from, root, to, RenameMode::Replace).expect("rename");
    backing.unlink(root, to).expect("unlink");
    assert_eq!(backing.list(root).expect("list").len(), 6);
    backing.sync(&rig.node("hard"), false).expect("sync");
}

#[test]
fn suid_bits_fall_by_a_user_s_write_and_stay_by_root_s() {
    if !sys::is_root() {
        return;
    }
    let rig = rig();
    let backing = &rig.backing;
    let file = rig.file("f");
    let mode = || backing.stat(&file).expect("stat").mode;
    backing.chmod(&file, 0o6755).expect("chmod");
    backing.write_at(&file, b"x", 0).expect("write");
    assert_eq!(mode(), 0o6755);
    sys::assume(USER);
    backing.write_at(&file, b"x", 0).expect("write");
    assert_eq!(mode(), 0o755);
    backing.chmod(&file, 0o6755).expect("a chmod with a foreign group keeps what it is told");
    assert_eq!(mode(), 0o6755);
    sys::assume(USER);
    backing.truncate(&file, 0).expect("truncate");
    assert_eq!(mode(), 0o755);
    sys::assume_daemon();
}

#[test]
fn a_setgid_directory_gives_its_group_on() {
    if !sys::is_root() {
        return;
    }
    let rig = rig();
    let backing = &rig.backing;
    backing.chown(&rig.root, None, Some(100)).expect("chown");
    backing.chmod(&rig.root, 0o2777).expect("chmod");
    drop(backing.create(&rig.root, &name("f"), 0o2775, USER).expect("create"));
    backing.mkdir(&rig.root, &name("d"), 0o755, USER).expect("mkdir");
    let file = backing.stat_at(&rig.root, &name("f")).expect("stat");
    let dir = backing.stat_at(&rig.root, &name("d")).expect("stat");
    assert_eq!((file.gid, file.mode), (100, 0o2755));
    assert_eq!((dir.gid, dir.mode), (100, 0o2755));
}

#[test]
fn a_default_acl_takes_the_place_of_the_umask() {
    let rig = rig();
    let mut set = Command::new("setfacl");
    set.args(["-d", "-m", "u::rwx,g::rwx,o::---"]);
    if !set.arg(rig.dir.path()).status().is_ok_and(|status| status.success()) {
        return;
    }
    let by = Creds { umask: 0o077, ..Creds::DAEMON };
    drop(rig.backing.create(&rig.root, &name("f"), 0o666, by).expect("create"));
    assert_eq!(rig.backing.stat_at(&rig.root, &name("f")).expect("stat").mode, 0o660);
    let acls = rig.backing.xattrs(&rig.root).expect("xattrs").0;
    assert!(acls.contains_key(&b"system.posix_acl_default"[..]));
}

#[test]
fn an_ordinary_user_opens_what_is_his_own_whatever_its_mode() {
    if sys::is_root() {
        // Once more, as nobody. Where nobody may not run this program, there is nothing to see.
        use std::os::unix::process::CommandExt;
        let program = std::env::current_exe().expect("this program");
        let this = std::thread::current().name().expect("the test's name").to_owned();
        let mut again = Command::new(program);
        again.args(["--exact", &this, "--test-threads=2"]).uid(65534).gid(65534);
        if let Ok(done) = again.output() {
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
        }
        return;
    }
    let rig = rig();
    let Rig { backing, root, .. } = &rig;
    backing.write_at(&rig.file("f"), b"kept", 0).expect("write");
    backing.chmod(&rig.node("f"), 0o000).expect("chmod");
    backing.mkdir(root, &name("d"), 0o300, Creds { umask: 0o077, ..USER }).expect("mkdir");
    let file = backing.open_file(root, &name("f"), Access::ReadWrite).expect("open");
    backing.write_at(&file, b"K", 0).expect("write");
    backing.sync(&rig.node("f"), false).expect("sync");
    let dir = backing.open_dir(&path("d")).expect("open");
    assert!(backing.list(&dir).expect("list").is_empty());
    assert_eq!(backing.stat(&file).expect("stat").mode, 0o000);
    assert_eq!(backing.stat(&dir).expect("stat").mode, 0o300);
    assert_eq!(errno(backing.chown(&file, Some(0), None)), libc::EPERM);
}

#[test]
fn what_cannot_go_past_the_page_cache_goes_through_it() {
    let rig = rig();
    let Rig { backing, root, .. } = &rig;
    drop(backing.create(root, &name("f"), 0o600, Creds::DAEMON).expect("create"));
    let file = backing.open_file(root, &name("f"), Access::Direct).expect("open");
    backing.write_at(&file, &[1; 5], 3).expect("of no block's size, at no block's begin");
    let read = backing.open_file(root, &name("f"), Access::Read).expect("open");
    let mut bytes = [9; 10];
    assert_eq!(backing.read_at(&read, &mut bytes, 0).expect("read"), 8);
    assert_eq!(bytes, [0, 0, 0, 1, 1, 1, 1, 1, 9, 9]);
}

#[test]
fn what_will_be_needed_is_in_memory_soon() {
    let rig = rig();
    let file = rig.file("f");
    rig.backing.write_at(&file, &[1; 1 << 20], 0).expect("write");
    rig.backing.sync(&file, true).expect("sync");
    rig.backing.forget_cached(&file);
    let mut bytes = [0; 4096];
    let places = [0, 64 << 10, 512 << 10, 1 << 40];
    let length = NonZeroU64::new(4096).expect("not zero");
    rig.backing.will_need(&file, &places.map(|at| (at, length)));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    for at in &places[..3] {
        while rig.backing.read_at_hand(&file, &mut bytes, *at) != Some(4096) {
            assert!(std::time::Instant::now() < deadline, "nothing of it at {at}");
            std::thread::yield_now();
        }
    }
}

mod refusing;

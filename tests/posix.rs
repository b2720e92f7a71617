//! The live tree behaves as a POSIX filesystem, seen through a real mount; afterwards the mount
//! and all backings are identical.

mod common;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, XattrFlags,
};
use rustix::io::Errno;

use common::user::{ordinary_user, other_user};
use common::{Mounted, need, run, shell};

fn rename(from: &Path, to: &Path, flags: RenameFlags) -> Result<(), Errno> {
    rustix::fs::renameat_with(CWD, from, CWD, to, flags)
}

fn errno(error: &io::Error) -> Option<Errno> {
    Errno::from_io_error(error)
}

#[test]
fn rename_noreplace_refuses_and_exchange_swaps() {
    let store = Mounted::new();
    let (a, b) = (store.path("a"), store.path("b"));
    fs::write(&a, "was a").unwrap();
    fs::write(&b, "was b").unwrap();
    assert_eq!(rename(&a, &b, RenameFlags::NOREPLACE), Err(Errno::EXIST));
    rename(&a, &b, RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read_to_string(&a).unwrap(), "was b");
    assert_eq!(fs::read_to_string(&b).unwrap(), "was a");
    // A directory and a file trade places too, with what is below.
    fs::create_dir_all(store.path("dir/sub")).unwrap();
    fs::write(store.path("dir/sub/leaf"), "leaf").unwrap();
    rename(&store.path("dir"), &b, RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read_to_string(store.path("b/sub/leaf")).unwrap(), "leaf");
    assert_eq!(fs::read_to_string(store.path("dir")).unwrap(), "was a");
    rename(&a, &store.path("new"), RenameFlags::NOREPLACE).unwrap();
    assert_eq!(rename(&a, &b, RenameFlags::EXCHANGE), Err(Errno::NOENT));
    store.finish();
}

#[test]
fn an_unlinked_but_open_file_keeps_working() {
    let store = Mounted::new();
    let path = store.path("gone");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(b"before ").unwrap();
    fs::remove_file(&path).unwrap();
    file.write_all(b"after").unwrap();
    file.sync_all().unwrap();
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before after");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.set_len(3).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(file.metadata().unwrap().size(), 3);
    // The same after a rename over it.
    fs::write(&path, "old").unwrap();
    let old = File::open(&path).unwrap();
    fs::write(store.path("new"), "new").unwrap();
    fs::rename(store.path("new"), &path).unwrap();
    let mut kept = [0; 3];
    old.read_exact_at(&mut kept, 0).unwrap();
    assert_eq!(&kept, b"old");
    assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    drop((file, old));
    assert_eq!(common::tree::names_in(&store.mnt), ["gone"]);
    store.finish();
}

#[test]
fn hard_links_are_one_file() {
    let store = Mounted::new();
    fs::create_dir(store.path("d")).unwrap();
    fs::write(store.path("a"), "one").unwrap();
    fs::hard_link(store.path("a"), store.path("d/b")).unwrap();
    fs::hard_link(store.path("d/b"), store.path("c")).unwrap();
    OpenOptions::new().append(true).open(store.path("c")).unwrap().write_all(b" two").unwrap();
    let a = fs::metadata(store.path("a")).unwrap();
    let b = fs::metadata(store.path("d/b")).unwrap();
    assert_eq!((a.ino(), a.nlink()), (b.ino(), 3));
    assert_eq!(fs::read_to_string(store.path("d/b")).unwrap(), "one two");
    fs::remove_file(store.path("a")).unwrap();
    assert_eq!(fs::metadata(store.path("c")).unwrap().nlink(), 2);
    // Renaming one name of a file over another of its names does nothing.
    fs::rename(store.path("c"), store.path("d/b")).unwrap();
    assert!(store.path("c").exists() && store.path("d/b").exists());
    store.finish();
}

/// pjdfstest cannot ask libc for the limit on a FUSE mount and skips this: ext4 allows 65,000
/// links.
#[test]
fn links_are_refused_at_the_backings_limit() {
    let disks = [common::disk::LoopFs::ext4(96), common::disk::LoopFs::ext4(96)];
    let backings = disks.iter().map(|disk| disk.root().join("backing")).collect();
    let store = Mounted::over(backings);
    fs::write(store.path("file"), "one").unwrap();
    for number in 1..65_000 {
        fs::hard_link(store.path("file"), store.path(&format!("link{number}"))).unwrap();
    }
    let refused = fs::hard_link(store.path("file"), store.path("one-more")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(Errno::MLINK.raw_os_error()));
    assert_eq!(fs::metadata(store.path("file")).unwrap().nlink(), 65_000);
    store.finish();
}

#[test]
fn inode_numbers_survive_rename_and_remount() {
    let mut store = Mounted::new();
    fs::create_dir(store.path("d")).unwrap();
    fs::write(store.path("f"), "x").unwrap();
    let numbers = |store: &Mounted, file: &str| {
        let of = |name: &str| fs::metadata(store.path(name)).unwrap().ino();
        (of(""), of("d"), of(file))
    };
    let before = numbers(&store, "f");
    fs::rename(store.path("f"), store.path("d/g")).unwrap();
    assert_eq!(numbers(&store, "d/g"), before);
    store.remount();
    assert_eq!(numbers(&store, "d/g"), before);
    store.finish();
}

#[test]
fn fifos_sockets_and_devices_are_kept() {
    let store = Mounted::new();
    let mode = Mode::from_raw_mode(0o640);
    let make = |name: &str, kind, dev| {
        rustix::fs::mknodat(CWD, store.path(name), kind, mode, dev).unwrap();
    };
    make("fifo", FileType::Fifo, 0);
    make("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    make("block", FileType::BlockDevice, rustix::fs::makedev(7, 200));
    make("plain", FileType::RegularFile, 0);
    let socket = std::os::unix::net::UnixListener::bind(store.path("socket")).unwrap();
    assert_eq!(fs::metadata(store.path("null")).unwrap().rdev(), rustix::fs::makedev(1, 3));
    // A FIFO carries bytes between processes, a socket connects them, a device is that device.
    assert_eq!(shell(&store.mnt, "echo through > fifo & cat fifo; wait"), "through\n");
    let _peer = std::os::unix::net::UnixStream::connect(store.path("socket")).unwrap();
    fs::write(store.path("null"), "swallowed").unwrap();
    drop(socket);
    store.finish();
}

#[test]
fn xattrs_of_all_namespaces_are_kept() {
    let store = Mounted::new();
    let path = store.path("file");
    fs::write(&path, "x").unwrap();
    let set = |name: &str, value: &[u8], flags| rustix::fs::lsetxattr(&path, name, value, flags);
    set("user.a", b"one", XattrFlags::empty()).unwrap();
    set("user.binary", &[0, 255, 10, 0], XattrFlags::CREATE).unwrap();
    set("trusted.t", b"t", XattrFlags::empty()).unwrap();
    set("security.s", b"s", XattrFlags::empty()).unwrap();
    assert_eq!(set("user.a", b"two", XattrFlags::CREATE), Err(Errno::EXIST));
    assert_eq!(set("user.none", b"x", XattrFlags::REPLACE), Err(Errno::NODATA));
    set("user.a", b"two", XattrFlags::REPLACE).unwrap();
    set("user.empty", b"", XattrFlags::empty()).unwrap();
    let mut small = [0_u8; 1];
    assert_eq!(rustix::fs::lgetxattr(&path, "user.a", &mut small[..]).unwrap_err(), Errno::RANGE);
    rustix::fs::lremovexattr(&path, "user.binary").unwrap();
    assert_eq!(rustix::fs::lremovexattr(&path, "user.binary"), Err(Errno::NODATA));
    let names: Vec<Vec<u8>> = common::tree::xattrs_of(&path).into_keys().collect();
    let wanted: [&[u8]; 4] = [b"security.s", b"trusted.t", b"user.a", b"user.empty"];
    assert_eq!(names, wanted);
    fs::create_dir(store.path("dir")).unwrap();
    rustix::fs::lsetxattr(store.path("dir"), "user.d", b"d", XattrFlags::empty()).unwrap();
    std::os::unix::fs::symlink("file", store.path("link")).unwrap();
    let on_link = rustix::fs::lsetxattr(store.path("link"), "trusted.l", b"l", XattrFlags::empty());
    on_link.unwrap();
    store.finish();
}

#[test]
fn acls_are_enforced_and_default_acls_inherited() {
    need(&["setfacl", "getfacl"]);
    let store = Mounted::new();
    let user = ordinary_user();
    shell(
        &store.mnt,
        &format!(
            "mkdir d; echo secret > d/f; chmod 600 d/f; setfacl -m u:{0}:r d/f; \
             setfacl -d -m u:{0}:rwx,g::r-x,o::- d; echo inherited > d/new; mkdir d/sub",
            user.name
        ),
    );
    let path = store.path("d/f");
    assert_eq!(user.shell(&format!("cat {path:?}")).ok(), "secret\n");
    assert_ne!(user.shell(&format!("echo x >> {path:?}")).code, 0);
    let inherited = shell(&store.mnt, "getfacl -cn d/new d/sub 2>/dev/null");
    assert!(inherited.contains(&format!("user:{}:rwx", user.uid)), "{inherited}");
    assert!(inherited.contains(&format!("default:user:{}:rwx", user.uid)), "{inherited}");
    assert_ne!(other_user().shell(&format!("cat {:?}", store.path("d/new"))).code, 0);
    shell(&store.mnt, "chmod 640 d/f; setfacl -b d/f");
    assert_ne!(user.shell(&format!("cat {path:?}")).code, 0);
    store.finish();
}

#[test]
fn names_of_255_bytes_and_of_any_bytes_work() {
    let store = Mounted::new();
    let long = "n".repeat(255);
    let odd: &[u8] = b"\xff\xfe not utf-8 \n\t\x1b[31m \\ \"'*";
    fs::create_dir(store.path(&long)).unwrap();
    fs::write(store.path(&long).join(&long), "long").unwrap();
    fs::write(store.mnt.join(OsStr::from_bytes(odd)), "odd").unwrap();
    fs::rename(store.mnt.join(OsStr::from_bytes(odd)), store.path("plain")).unwrap();
    fs::rename(store.path("plain"), store.mnt.join(OsStr::from_bytes(odd))).unwrap();
    let names = common::tree::names_in(&store.mnt);
    assert!(names.iter().any(|name| name.as_bytes() == odd), "{names:?}");
    let too_long = File::create(store.path(&"n".repeat(256))).unwrap_err();
    assert_eq!(errno(&too_long), Some(Errno::NAMETOOLONG));
    std::os::unix::fs::symlink(OsStr::from_bytes(b"\xfftarget"), store.path("link")).unwrap();
    store.finish();
}

#[test]
fn times_keep_nanoseconds_and_years_before_1970() {
    // tmpfs and ext4 with 256-byte inodes both hold such times.
    let mut store = Mounted::new();
    let at = |sec, nsec| Timespec { tv_sec: sec, tv_nsec: nsec };
    let cases = [
        ("now", at(1_700_000_000, 123_456_789)),
        ("old", at(-1_000_000_000, 987_654_321)),
        ("just_before", at(-1, 999_999_999)),
        ("later", at(4_500_000_000, 1)),
        ("epoch", at(0, 0)),
    ];
    for (name, time) in cases {
        fs::write(store.path(name), "x").unwrap();
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, store.path(name), &times, AtFlags::empty()).unwrap();
    }
    std::os::unix::fs::symlink("now", store.path("link")).unwrap();
    let times = Timestamps { last_access: cases[1].1, last_modification: cases[1].1 };
    rustix::fs::utimensat(CWD, store.path("link"), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    store.remount();
    for (name, time) in cases {
        let meta = fs::metadata(store.path(name)).unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (time.tv_sec, time.tv_nsec), "{name}");
    }
    assert_eq!(fs::symlink_metadata(store.path("link")).unwrap().mtime(), -1_000_000_000);
    store.finish();
}

/// So many that the kernel lists them in hundreds of calls while they go.
const ENTRIES: usize = 50_000;

#[test]
fn rm_rf_of_50_000_entries_leaves_none() {
    let store = Mounted::new();
    store.assert_no_open_file_leak(|_| {
        let many = store.path("many");
        fs::create_dir(&many).unwrap();
        for i in 0..ENTRIES {
            if i % 10 == 0 {
                fs::create_dir(many.join(format!("entry{i}"))).unwrap();
            } else {
                File::create(many.join(format!("entry{i}"))).unwrap();
            }
        }
        assert_eq!(fs::read_dir(&many).unwrap().count(), ENTRIES);
        shell(&store.mnt, "rm -rf many");
        assert!(!many.exists());
    });
    store.finish();
}

/// Threads that only list are given other answers than those that look at what they list.
#[test]
fn a_listing_is_whole_and_right_whoever_lists() {
    let store = Mounted::new();
    let sizes = [0, 1, 31, 32, 33, 1500];
    for size in sizes {
        let dir = store.path(&format!("dir{size}"));
        fs::create_dir(&dir).unwrap();
        for number in 0..size {
            fs::write(dir.join(format!("file{number}")), vec![b'x'; number % 7]).unwrap();
        }
        fs::create_dir(dir.join("below")).unwrap();
    }
    (0..3).for_each(|number| store.snapshot(&format!("held{number}")));
    let list = |root: &Path, size: usize, looks: bool| {
        let (mut found, dir) = (Vec::new(), root.join(format!("dir{size}")));
        // The kernel's own listing is dropped at the next change.
        if *root == *store.mnt {
            fs::remove_dir(dir.join("below")).unwrap();
            fs::create_dir(dir.join("below")).unwrap();
        }
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let is_dir = name == "below";
            assert_eq!(entry.file_type().unwrap().is_dir(), is_dir, "{name}");
            if looks && !is_dir {
                let number: usize = name.strip_prefix("file").unwrap().parse().unwrap();
                assert_eq!(entry.metadata().unwrap().len(), number as u64 % 7, "{name}");
            }
            found.push(name);
        }
        let mut expected: Vec<String> = (0..size).map(|number| format!("file{number}")).collect();
        expected.push("below".into());
        found.sort();
        expected.sort();
        assert_eq!(found, expected, "of {size}, looks: {looks}");
    };
    for (number, manners) in [[false, false], [true, true], [false, true]].iter().enumerate() {
        // Of the past the kernel keeps its listing, so each snapshot is listed in one manner.
        for root in [store.mnt.clone(), store.past(&format!("held{number}"))] {
            for first in sizes {
                // Each is a thread of its own, of which nothing is known.
                std::thread::scope(|scope| {
                    let (root, list) = (&root, &list);
                    scope.spawn(move || {
                        list(root, first, manners[0]);
                        sizes.iter().for_each(|size| list(root, *size, manners[1]));
                    });
                });
            }
        }
    }
    store.finish();
}

#[test]
fn a_listing_stays_whole_while_entries_are_removed() {
    let store = Mounted::new();
    for i in 0..5_000 {
        File::create(store.path(&format!("f{i:05}"))).unwrap();
    }
    // Every second entry is removed as soon as it is seen: the others must each be seen once.
    let mut seen = Vec::new();
    for entry in fs::read_dir(&store.mnt).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if seen.len() % 2 == 0 {
            fs::remove_file(store.path(&name)).unwrap();
        }
        seen.push(name);
    }
    seen.sort();
    let count = seen.len();
    seen.dedup();
    assert_eq!((seen.len(), count), (5_000, 5_000));
    store.finish();
}

#[test]
fn statfs_shows_the_tightest_replica() {
    let (small, large) = (common::disk::LoopFs::ext4(32), common::disk::LoopFs::ext4(96));
    let store = Mounted::over(vec![large.root().join("b"), small.root().join("b")]);
    let shown = rustix::fs::statvfs(&store.mnt).unwrap();
    let tight = rustix::fs::statvfs(small.root()).unwrap();
    let free = |stat: &rustix::fs::StatVfs| stat.f_bavail * stat.f_frsize;
    assert!(free(&shown) <= free(&tight) && free(&shown) > free(&tight) / 2);
    assert_eq!(shown.f_namemax, 255);
    assert!(shown.f_blocks * shown.f_frsize <= tight.f_blocks * tight.f_frsize);
    store.finish();
}

#[test]
fn the_private_folder_is_neither_reachable_nor_creatable() {
    let store = Mounted::new();
    let private = store.path(".rearview");
    assert_eq!(errno(&fs::metadata(&private).unwrap_err()), Some(Errno::NOENT));
    assert!(fs::read_dir(&private).is_err());
    assert!(File::create(&private).is_err());
    assert!(fs::create_dir(&private).is_err());
    fs::write(store.path("file"), "x").unwrap();
    assert!(fs::rename(store.path("file"), &private).is_err());
    assert!(fs::hard_link(store.path("file"), &private).is_err());
    assert!(std::os::unix::fs::symlink("file", &private).is_err());
    assert!(File::open(private.join("catalog.db")).is_err());
    assert_eq!(common::tree::names_in(&store.mnt), ["file"]);
    // Only in the root: deeper it is a name like any other.
    fs::create_dir(store.path("dir")).unwrap();
    fs::write(store.path("dir/.rearview"), "mine").unwrap();
    store.finish();
}

#[test]
fn o_tmpfile_works_or_is_refused_cleanly() {
    let store = Mounted::new();
    let tmp =
        OpenOptions::new().write(true).custom_flags(OFlags::TMPFILE.bits() as i32).open(&store.mnt);
    if let Err(error) = tmp {
        assert_eq!(errno(&error), Some(Errno::OPNOTSUPP), "programs fall back on this answer");
    }
    store.finish();
}

#[test]
fn setgid_directories_umask_and_sticky_bits_behave() {
    let store = Mounted::new();
    let (user, other) = (ordinary_user(), other_user());
    shell(&store.mnt, &format!("mkdir team; chgrp {} team; chmod 2777 team", other.gid));
    let team = store.path("team");
    user.shell(&format!("cd {team:?}; umask 027; mkdir sub; echo x > file")).ok();
    let sub = fs::metadata(team.join("sub")).unwrap();
    let file = fs::metadata(team.join("file")).unwrap();
    assert_eq!((sub.mode() & 0o7777, sub.uid(), sub.gid()), (0o2750, user.uid, other.gid));
    assert_eq!((file.mode() & 0o7777, file.uid(), file.gid()), (0o640, user.uid, other.gid));
    // In a sticky directory only its owner removes a file.
    shell(&store.mnt, "mkdir shared; chmod 1777 shared");
    let shared = store.path("shared");
    user.shell(&format!("echo mine > {shared:?}/file")).ok();
    assert_ne!(other.shell(&format!("rm -f {shared:?}/file")).code, 0);
    user.shell(&format!("rm {shared:?}/file")).ok();
    // A write by another clears the suid and sgid bits, as the kernel does on any filesystem.
    shell(&store.mnt, "echo x > tool; chmod 6777 tool");
    user.shell(&format!("echo y >> {:?}", store.path("tool"))).ok();
    assert_eq!(fs::metadata(store.path("tool")).unwrap().mode() & 0o7777, 0o777);
    store.finish();
}

/// The kernel must not run it by the mode that it had: nobody asks for the new one in between.
#[test]
fn a_setuid_program_that_another_writes_to_does_not_run_as_its_owner() {
    need(&["python3"]);
    let store = Mounted::new();
    shell(&store.mnt, "cp /usr/bin/id id && cp /usr/bin/id gid && chmod 4777 id && chmod 2777 gid");
    let user = ordinary_user();
    let told = |program: &str, words: &str| {
        format!(
            "import os\nos.chdir({:?})\nfd = os.open('{program}', os.O_WRONLY)\n\
             part = open('/usr/bin/id', 'rb').read(4096)\n\
             for _ in range(2): assert os.pwrite(fd, part, 0) == 4096\nos.close(fd)\n\
             os.execv('./{program}', ['id', '{words}'])",
            store.mnt
        )
    };
    for (program, words, own) in [("id", "-u", user.uid), ("gid", "-g", user.gid)] {
        let run_it = || user.shell(&format!("{:?} {words}", store.path(program))).ok();
        assert_eq!(run_it(), "0\n", "the mount has suid");
        let mut python = user.command("python3");
        assert_eq!(run(python.args(["-c", &told(program, words)])).ok(), format!("{own}\n"));
    }
    store.finish();
}

#[test]
fn a_stranger_is_refused_as_the_mode_says() {
    let store = Mounted::new();
    let (user, other) = (ordinary_user(), other_user());
    shell(
        &store.mnt,
        &format!("mkdir -m 700 home; echo private > home/f; chown -R {}:{0} home", user.uid),
    );
    let home = store.path("home");
    assert_eq!(user.shell(&format!("cat {home:?}/f")).ok(), "private\n");
    assert_ne!(other.shell(&format!("cat {home:?}/f")).code, 0);
    assert_ne!(other.shell(&format!("ls {home:?}")).code, 0);
    assert_ne!(other.shell(&format!("chown {} {home:?}", other.uid)).code, 0);
    user.shell(&format!("touch -d 2001-01-01T00:00:00Z {home:?}/f")).ok();
    assert_ne!(other.shell(&format!("touch {home:?}/f")).code, 0);
    store.finish();
}

#[test]
fn a_full_walk_and_rename_storm_leaves_identical_replicas() {
    let store = Mounted::new();
    for d in 0..20 {
        fs::create_dir(store.path(&format!("d{d}"))).unwrap();
        for f in 0..20 {
            fs::write(store.path(&format!("d{d}/f{f}")), format!("{d} {f}")).unwrap();
        }
    }
    store.assert_no_open_file_leak(|_| {
        std::thread::scope(|scope| {
            for worker in 0..4_usize {
                let store = &store;
                scope.spawn(move || {
                    for round in 0..300_usize {
                        let from = (worker * 7 + round * 3) % 20;
                        let to = (worker * 5 + round * 11) % 20;
                        let name = format!("f{}", (round + worker) % 20);
                        // Others move the same files: not finding one is fine, anything else not.
                        let source = store.path(&format!("d{from}/{name}"));
                        if let Err(e) = fs::rename(source, store.path(&format!("d{to}/{name}"))) {
                            assert_eq!(e.kind(), io::ErrorKind::NotFound, "{e}");
                        }
                    }
                });
            }
        });
    });
    run(Command::new("find").arg(&store.mnt)).ok();
    store.finish();
}

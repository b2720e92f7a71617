//! Others on the same machine, through a real mount: what is ours stays closed to them, what was
//! private stays private, no symlink in a backing leads us astray, and no name of theirs reaches a
//! terminal raw.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use common::json::parsed;
use common::run::{binary, run, run_shell, run_within};
use common::tree::{assert_trees, names_in, read_tree};
use common::user::{ordinary_user, other_user, public_binary};
use common::{Mounted, shell};

/// How long the race against someone who swaps directories is run.
const RACE: Duration = Duration::from_secs(6);
/// Escape sequences of 7 and 8 bits, a bell, a forged line, a bidirectional override, and bytes
/// that are no text.
const HOSTILE: &[u8] = b"e\x1b[31mv\x07i\rl\n+ forged\xc2\x9b2J\xe2\x80\xae\x7f\xff";

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Fails if a terminal would obey any of it.
#[track_caller]
fn assert_tame(what: &str, text: &str) {
    let bad = |c: &char| {
        let bidi = matches!(*c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}');
        // Tabs part our own columns; those in names are escaped, as all else.
        bidi || (c.is_control() && !matches!(*c, '\n' | '\t'))
    };
    assert_eq!(text.chars().find(bad), None, "{what}: {text:?}");
    assert!(!text.lines().any(|line| line.starts_with("+ forged")), "{what}: {text:?}");
}

#[test]
fn an_open_private_folder_is_closed_and_a_strangers_is_refused() {
    let mut store = Mounted::with_replicas(1);
    store.unmount();
    let private = store.backings[0].join(".rearview");
    fs::set_permissions(&private, fs::Permissions::from_mode(0o777)).unwrap();
    let said = store.mount();
    assert_eq!(mode(&private), 0o700);
    assert!(said.stderr.contains("was open"), "{}", said.told());
    said.ok();
    store.unmount();
    let stranger = ordinary_user();
    let give = |path: &Path| {
        std::os::unix::fs::chown(path, Some(stranger.uid), Some(stranger.gid)).unwrap();
    };
    give(&private);
    store.mount().fails(1, &[".rearview", "belongs to user"]);
    // The owner of the backing could have put anything there anyhow: root takes it over.
    give(&store.backings[0]);
    let said = store.mount();
    assert!(said.stderr.contains("belonged to user"), "{}", said.told());
    said.ok();
    assert_eq!((fs::metadata(&private).unwrap().uid(), mode(&private)), (0, 0o700));
    store.unmount();
    // A symlink in its place is no private folder, whoever made it.
    let elsewhere = store.beside("elsewhere");
    fs::rename(&private, &elsewhere).unwrap();
    symlink(&elsewhere, &private).unwrap();
    let before = read_tree(&elsewhere);
    let said = store.mount();
    assert_ne!(said.code, 0, "{}", said.told());
    assert_trees("behind the symlink", &before, &read_tree(&elsewhere));
}

#[test]
fn the_private_folder_is_in_no_view_of_the_past() {
    let store = Mounted::new();
    fs::write(store.path("file"), "x").unwrap();
    store.snapshot("s");
    let snapshots = store.path(".snapshots");
    for view in ["s", "latest", ".at/1s", ".versions", ".deleted"] {
        let view = snapshots.join(view);
        assert!(fs::symlink_metadata(view.join(".rearview")).is_err(), "{view:?}");
        assert!(fs::read(view.join(".rearview/store.toml")).is_err(), "{view:?}");
    }
    assert!(!names_in(&store.past("s")).contains(&".rearview".into()));
    let exchange = |a: &Path, b: &Path| renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE);
    assert!(exchange(&store.path("file"), &store.path(".rearview")).is_err());
    assert!(fs::rename(store.path(".rearview"), store.path("stolen")).is_err());
    assert!(fs::remove_dir_all(store.path(".rearview")).is_err());
    store.finish();
}

#[test]
fn the_socket_answers_only_root_and_the_mounter() {
    let store = Mounted::new();
    fs::write(store.path("secret"), "x").unwrap();
    let stranger = ordinary_user();
    let (_folder, copy) = public_binary();
    let status = format!("{copy:?} status {:?}", store.mnt);
    stranger.shell(&status).fails(1, &["only by root"]);
    // Even with both doors open the peer's credentials count.
    for backing in &store.backings {
        let private = backing.join(".rearview");
        fs::set_permissions(&private, fs::Permissions::from_mode(0o755)).unwrap();
        let socket = private.join("control.sock");
        fs::set_permissions(socket, fs::Permissions::from_mode(0o777)).unwrap();
    }
    stranger.shell(&status).fails(1, &["only root and the user who mounted"]);
    let raw = format!(
        "python3 - <<'END'\nimport socket, struct\nfor length in (0, 5, 1 << 20, 0xffffffff):\n    \
         s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect({:?})\n    \
         try: s.sendall(struct.pack('<I', length) + b'{{\"request\": \"status\"}}' * 9)\n    \
         except OSError: pass\n    \
         got = s.recv(4096)\n    assert b'secret' not in got and b'replicas' not in got, got\nEND",
        store.backings[0].join(".rearview/control.sock")
    );
    stranger.shell(&raw).ok();
    store.rearview(&["snapshot", "list"]).ok();
    for backing in &store.backings {
        let private = backing.join(".rearview");
        fs::set_permissions(private, fs::Permissions::from_mode(0o700)).unwrap();
    }
    store.finish();
}

/// What lies outside of the backing, and must stay as it is.
fn canary(store: &Mounted) -> PathBuf {
    let canary = store.beside("canary");
    fs::create_dir(&canary).unwrap();
    shell(
        &canary,
        "mkdir -m 755 sub preserved undo packs tmp quarantine; for i in 0 1 2 3; do
         echo canary-$i > f$i; echo canary-$i > sub/f$i; done; setfattr -n user.c -v 1 f0
         echo canary > store.toml; echo canary > catalog.db; echo canary > log",
    );
    canary
}

/// One of everything that can be done to a file or directory, by paths in the directory that is
/// swapped. Failing is right; touching what is outside is not.
fn attack(dir: &Path, round: u64, leaks: &AtomicU64) {
    let file = |name: &str| dir.join(name);
    let number = round % 4;
    let named = file(&format!("f{number}"));
    let check = |path: &Path| {
        if fs::read(path).is_ok_and(|bytes| bytes.starts_with(b"canary")) {
            leaks.fetch_add(1, Ordering::Relaxed);
        }
    };
    check(&named);
    check(&file(&format!("sub/f{number}")));
    let _ = fs::write(&named, format!("ours {round}"));
    let _ = fs::write(file(&format!("new{number}")), "ours");
    let _ = fs::set_permissions(&named, fs::Permissions::from_mode(0o600 + (round as u32 % 8)));
    let _ = std::os::unix::fs::chown(&named, Some(number as u32 + 1), Some(1));
    let _ = rustix::fs::setxattr(&named, "user.ours", b"1", rustix::fs::XattrFlags::empty());
    let _ = fs::OpenOptions::new().write(true).open(&named).and_then(|f| f.set_len(round % 9));
    let _ = fs::hard_link(&named, file(&format!("link{number}")));
    let _ = symlink("x", file(&format!("symlink{number}")));
    let _ = fs::create_dir(file(&format!("dir{number}")));
    let _ = fs::rename(file(&format!("new{number}")), file("sub/moved"));
    let _ = renameat_with(CWD, &named, CWD, file("f0"), RenameFlags::EXCHANGE);
    let _ = fs::read_dir(dir).map(Iterator::count);
    if round.is_multiple_of(3) {
        let _ = fs::remove_file(file("f1"));
        let _ = fs::remove_file(file(&format!("link{number}")));
        let _ = fs::remove_file(file(&format!("symlink{number}")));
        let _ = fs::remove_dir(file(&format!("dir{number}")));
        let _ = fs::remove_file(file("sub/moved"));
    }
}

/// Swaps `place` with a symlink to `canary` again and again while `work` is done.
fn swapping(place: &Path, canary: &Path, mut work: impl FnMut(u64)) -> u64 {
    let done = AtomicBool::new(false);
    let swaps = AtomicU64::new(0);
    let link = place.with_file_name("swapped-link");
    symlink(canary, &link).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for _ in 0..2 {
                    let swapped = renameat_with(CWD, place, CWD, &link, RenameFlags::EXCHANGE);
                    swaps.fetch_add(u64::from(swapped.is_ok()), Ordering::Relaxed);
                    // A yield, so that operations begin in both states.
                    std::thread::yield_now();
                }
            }
        });
        let begun = Instant::now();
        let mut round = 0;
        while begun.elapsed() < RACE {
            work(round);
            round += 1;
        }
        done.store(true, Ordering::Relaxed);
    });
    fs::remove_file(&link).unwrap();
    swaps.into_inner()
}

#[test]
fn a_directory_swapped_for_a_symlink_leads_nowhere() {
    let store = Mounted::with_replicas(1);
    let canary = canary(&store);
    let dir = store.path("dir");
    shell(&store.mnt, "mkdir -p dir/sub; for i in 0 1 2 3; do echo $i > dir/f$i; done");
    store.snapshot("before");
    let was = read_tree(&canary);
    let leaks = AtomicU64::new(0);
    let past = store.past("before").join("dir");
    let swaps = swapping(&store.backings[0].join("dir"), &canary, |round| {
        attack(&dir, round, &leaks);
        if round.is_multiple_of(16) {
            // Names are looked up anew, not answered by the kernel.
            let _ = fs::write("/proc/sys/vm/drop_caches", "2");
            attack(&past, round, &leaks);
            let _ = fs::create_dir(store.past(&format!("s{round}")));
        }
    });
    assert!(swaps > 100, "{swaps} swaps");
    assert_eq!(leaks.into_inner(), 0, "nothing outside was read");
    assert_trees("outside", &was, &read_tree(&canary));
    // A bind mount is no part of the backing either.
    let mount = |words: &[&OsStr]| run(Command::new("mount").args(words)).ok();
    let sub = store.backings[0].join("dir/sub");
    mount(&[OsStr::new("--bind"), canary.as_os_str(), sub.as_os_str()]);
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    let leaks = AtomicU64::new(0);
    for round in 0..8 {
        attack(&store.path("dir/sub"), round, &leaks);
    }
    run(Command::new("umount").arg(&sub)).ok();
    assert_eq!(leaks.into_inner(), 0, "nothing of another mount was read");
    assert_trees("another mount", &was, &read_tree(&canary));
    assert!(store.is_mounted());
}

#[test]
fn a_private_folder_swapped_for_a_symlink_leads_nowhere() {
    let store = Mounted::with_replicas(1);
    let canary = canary(&store);
    shell(&store.mnt, "mkdir -p dir/sub; for i in 0 1 2 3; do echo $i > dir/f$i; done");
    store.snapshot("before");
    let was = read_tree(&canary);
    let leaks = AtomicU64::new(0);
    let (dir, past) = (store.path("dir"), store.past("before").join("dir"));
    let swaps = swapping(&store.backings[0].join(".rearview"), &canary, |round| {
        attack(&dir, round, &leaks);
        attack(&past, round, &leaks);
        let _ = fs::create_dir(store.past(&format!("s{round}")));
        let _ = run_within(Command::new(binary()).arg("status").arg(&store.mnt), 60);
    });
    assert!(swaps > 20, "{swaps} swaps");
    assert_eq!(leaks.into_inner(), 0, "nothing outside was read");
    assert_trees("outside", &was, &read_tree(&canary));
}

#[test]
fn what_was_private_stays_private_in_every_view_of_the_past() {
    let store = Mounted::new();
    let (owner, stranger) = (ordinary_user(), other_user());
    let (uid, other) = (owner.uid, stranger.uid);
    shell(
        &store.mnt,
        &format!(
            "mkdir -m 755 open; mkdir -m 700 home; echo secret > home/f; echo secret > open/plain
             echo secret > open/acl; chmod 600 open/*; chown -R {uid}:{uid} home open
             setfacl -m u:{other}:r open/acl; echo public > open/gone; chmod 644 open/gone"
        ),
    );
    store.snapshot("then");
    // What was closed is open since, and the reverse.
    shell(
        &store.mnt,
        "echo later > home/f; echo later > open/plain; setfacl -b open/acl; sleep 1.1
         chmod 755 home; chmod 644 home/f open/plain; chmod 600 open/gone; rm open/gone home/f",
    );
    store.snapshot("later");
    let reads = |path: &Path| stranger.shell(&format!("cat {path:?}")).stdout;
    let then = store.past("then");
    assert_eq!(reads(&then.join("home/f")), "", "its directory was closed");
    assert_eq!(reads(&then.join("open/plain")), "", "it was closed itself");
    assert_eq!(reads(&then.join("open/acl")), "secret\n", "the ACL of then lets it");
    assert_eq!(reads(&store.past("later").join("open/acl")), "", "the ACL of later does not");
    assert_eq!(reads(&then.join("open/gone")), "public\n");
    // Each version is guarded by the mode it had, in a directory by the mode that it has.
    let versions = store.path("open/.snapshots/.versions/plain");
    let seen = stranger.shell(&format!("cat {versions:?}/* 2>/dev/null || true")).stdout;
    assert!(!seen.contains("secret"), "{seen}");
    let deleted = store.path("open/.snapshots/.deleted/gone");
    assert_eq!(reads(&deleted), "", "it was closed when it was removed");
    let instant = store.path(".snapshots/.at/0s/home/f");
    assert_eq!(reads(&instant), "");
    // Nobody else may ask the daemon to restore, and nobody may write the past.
    let (_folder, copy) = public_binary();
    let open = store.path("open");
    for words in ["undelete gone", "restore then plain", "purge -f plain", "snapshot create mine"] {
        let done = stranger.shell(&format!("cd {open:?}; {copy:?} {words}"));
        assert_ne!(done.code, 0, "{}", done.told());
        assert!(!done.stdout.contains("secret"), "{}", done.told());
    }
    let done = stranger.shell(&format!("mkdir {:?}", store.past("mine")));
    assert_ne!(done.code, 0, "only the mounter takes snapshots: {}", done.told());
    store.finish();
}

/// The mounts of tests are made with `suid`; without it the kernel sees to it.
#[test]
fn an_old_setuid_program_runs_without_its_rights_or_not_at_all() {
    let store = Mounted::new();
    let program = store.path("id");
    fs::copy("/usr/bin/id", &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    fs::copy("/usr/bin/id", store.path("plain")).unwrap();
    fs::set_permissions(store.path("plain"), fs::Permissions::from_mode(0o755)).unwrap();
    store.snapshot("s");
    let stranger = ordinary_user();
    let runs = |path: &Path| stranger.shell(&format!("{path:?} -u"));
    assert_eq!(runs(&program).ok(), "0\n", "the mount has suid");
    let past = store.past("s");
    assert_ne!(runs(&past.join("id")).code, 0);
    assert_eq!(runs(&past.join("plain")).ok(), format!("{}\n", stranger.uid));
    assert_eq!(mode(&past.join("id")), 0o4755, "it can be restored");
    store.finish();
}

#[test]
fn no_output_carries_control_characters() {
    let mut store = Mounted::new();
    let name = OsStr::from_bytes(HOSTILE);
    let (folder, file) = (store.mnt.join(name), store.mnt.join(name).join(name));
    fs::create_dir(&folder).unwrap();
    fs::write(&file, "1").unwrap();
    store.snapshot("a");
    // The name of the program is hostile as well.
    let program = store.beside("bin").join(OsStr::from_bytes(b"x\n+ f\x1b[31m"));
    fs::create_dir(store.beside("bin")).unwrap();
    fs::copy("/usr/bin/tee", &program).unwrap();
    run(Command::new(&program).arg(&file)).ok();
    let _ = fs::create_dir(store.past("sn\u{1b}[31map\u{9b}\u{202e}"));
    store.snapshot("b");
    fs::remove_file(&file).unwrap();
    store.snapshot("c");
    let hostile = [folder.as_os_str(), file.as_os_str()];
    let plain: [&[&str]; 7] = [
        &["status"],
        &["snapshot", "list"],
        &["diff", "a", "c"],
        &["diff", "a", "b"],
        &["prune", "-n", "--keep-last", "1"],
        &["restore", "-n", "a"],
        &["undo", "-n", "--uid", "0", "--since", "a"],
    ];
    let named: [&[&str]; 6] = [
        &["log"],
        &["restore", "-n", "a"],
        &["restore", "no\u{1b}[31m"],
        &["undelete", "-n"],
        &["purge", "-n"],
        &["undelete"],
    ];
    let ask = |words: &[&str], path: Option<&OsStr>, json: bool| {
        let mut command = Command::new(binary());
        command.args(words).args(path).current_dir(&store.mnt);
        if json {
            command.arg("--json");
        }
        let done = run(&mut command);
        let what = format!("{words:?} {path:?} (json: {json})");
        assert_tame(&what, &done.stdout);
        assert_tame(&what, &done.stderr);
        assert!(!done.stderr.contains("panicked"), "{}", done.told());
        if json && done.code == 0 {
            parsed(done);
        }
    };
    for json in [false, true] {
        plain.iter().for_each(|words| ask(words, None, json));
        for path in hostile {
            named.iter().for_each(|words| ask(words, Some(path), json));
        }
        let missing = store.mnt.join(OsStr::from_bytes(b"no\x1b]0;title\x07\n+ forged"));
        named.iter().for_each(|words| ask(words, Some(missing.as_os_str()), json));
        ask(&["status"], Some(missing.as_os_str()), json);
    }
    // What scrub and check find has such names as well, and so has what lies beside it.
    let [kept, extra] =
        [&b"k\x1b[31m\n+ forged"[..], b"x\x9b\x07\r+ forged"].map(OsStr::from_bytes);
    fs::write(folder.join(kept), "as it was").unwrap();
    store.snapshot("d");
    let backing = store.backings[1].join(name);
    let damage = || {
        fs::remove_file(backing.join(kept)).unwrap();
        fs::create_dir(backing.join(extra)).unwrap();
        fs::write(backing.join(extra).join(kept), "foreign").unwrap();
    };
    damage();
    ask(&["scrub", "start", "--all", "--wait"], None, false);
    let said = store.rearview(&["scrub", "status"]).ok();
    assert!(said.contains("found, all healed"), "{said}");
    ask(&["scrub", "status"], None, true);
    store.unmount();
    damage();
    for json in [false, true] {
        let mut command = Command::new(binary());
        command.arg("check").args(json.then_some("--json")).args(&store.backings);
        let done = run(&mut command);
        assert_ne!(done.code, 0, "{}", done.told());
        assert_tame("check", &done.stdout);
        assert_tame("check", &done.stderr);
    }
    // What a recovery tells of such names goes to standard error and into the log.
    fs::write(store.backings[1].join(name).join("foreign"), "x").unwrap();
    fs::write(store.backings[1].join(OsStr::from_bytes(b"f\x1b[31m\n+ forged")), "x").unwrap();
    let private = store.backings[0].join(".rearview");
    fs::remove_file(store.backings[1].join(".rearview/catalog.db")).unwrap();
    let said = store.mount();
    assert_tame("mount", &said.stderr);
    said.ok();
    let log = fs::read(private.join("log")).unwrap();
    assert_tame("the log", &String::from_utf8_lossy(&log));
    store.unmount();
}

#[test]
fn a_program_that_asks_for_too_much_gets_errors_and_the_mount_lives() {
    let store = Mounted::new();
    let done = run_shell(
        &store.mnt,
        r#"
python3 - <<'END'
import errno, os, resource
def refused(f):
    try: f()
    except OSError as e: return e.errno
    return 0
open('f', 'w').close()
# Attributes: too long, too many, odd names.
refused(lambda: os.setxattr('f', 'user.long', b'x' * 65536))
refused(lambda: os.setxattr('f', 'user.longer', b'x' * 65537))
refused(lambda: os.setxattr('f', 'user.' + 'n' * 250, b'x'))
refused(lambda: os.setxattr('f', 'user.' + 'n' * 251, b'x'))
refused(lambda: os.setxattr('f', 'user.\n\x1b[31m', b'x'))
open('g', 'w').close()
for i in range(200):
    if refused(lambda: os.setxattr('g', 'user.%d' % i, b'x' * 1000)): break
assert i < 100, 'the set of attributes is bounded'
assert not refused(lambda: os.removexattr('g', 'user.0'))
assert not refused(lambda: os.setxattr('g', 'user.0', b'small'))
assert len(os.listxattr('g')) == i
# A tree deeper than any path is long.
top = os.open('.', os.O_RDONLY)
depth, name = 0, 'd' * 200
while depth < 60 and not refused(lambda: (os.mkdir(name), os.chdir(name))):
    depth += 1
assert depth * 200 > 4096, depth
open('bottom', 'w').write('deep')
assert open('bottom').read() == 'deep'
os.fchdir(top)
for depth in range(600): os.mkdir('n'); os.chdir('n')
os.fchdir(top)
# Sizes and offsets beyond all bounds.
fd = os.open('big', os.O_RDWR | os.O_CREAT)
for size in (1 << 62, (1 << 63) - 1):
    refused(lambda: os.ftruncate(fd, size)); refused(lambda: os.pwrite(fd, b'x', size - 1))
    refused(lambda: os.posix_fallocate(fd, 0, size)); refused(lambda: os.pread(fd, 9, size - 9))
os.ftruncate(fd, 0)
# More open files than anybody needs, and many opens one after another.
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = []
for i in range(3000):
    try: held.append(os.open('many%d' % (i % 1500), os.O_RDWR | os.O_CREAT))
    except OSError as e:
        assert e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM), e
        break
assert len(held) > 500, len(held)
for fd in held: os.close(fd)
for i in range(5000): os.close(os.open('f', os.O_RDONLY))
END
"#,
    );
    done.ok();
    fs::write(store.path("after"), "well").unwrap();
    assert_eq!(fs::read_to_string(store.path("after")).unwrap(), "well");
    store.snapshot("with-all-that");
    shell(&store.mnt, "rm -rf dddd* many* n; rm -f f g big");
    // A tree that is deeper than a stack or a path is told all the same.
    for words in [&["diff", "with-all-that", "now"][..], &["status"], &["log", "n"]] {
        store.rearview(words).ok();
    }
    store.rearview(&["undo", "-n", "--uid", "0", "--since", "with-all-that"]);
    assert!(store.is_mounted());
    store.finish();
}

//! The past as folders: what `.snapshots` shows is what was live, bit for bit, whatever happened
//! since, on every backing alone, and read-only.

mod common;

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use rustix::io::Errno;

use common::fixture::{delete_all, rich_tree, wreck};
use common::tree::{Tree, assert_same, assert_trees, names_in, read_tree};
use common::user::{ordinary_user, other_user};
use common::{Mounted, need, run, shell, wait_until};

fn errno(error: &std::io::Error) -> Option<Errno> {
    Errno::from_io_error(error)
}

/// Waits until the wall clock has passed into a later second than any change made so far, twice,
/// so that a time written in whole seconds lies clearly between what came before and what follows.
fn a_moment_between() -> Timestamp {
    let start = SystemTime::now();
    let passed = |millis| move || start.elapsed().is_ok_and(|e| e > Duration::from_millis(millis));
    wait_until("the clock moves", 10, passed(2100));
    let between = Timestamp::now();
    wait_until("the clock moves", 10, passed(4200));
    between
}

/// The store used by most tests: a rich tree with a snapshot `one` and what was live then.
fn with_snapshot() -> (Mounted, Tree) {
    let store = Mounted::new();
    rich_tree(&store.path("work"));
    store.snapshot("one");
    let was = read_tree(&store.path("work"));
    (store, was)
}

fn assert_shows(store: &Mounted, snapshot: &str, was: &Tree) {
    assert_trees(snapshot, was, &read_tree(&store.past(snapshot).join("work")));
}

#[test]
fn a_snapshot_equals_what_was_live_after_every_kind_of_change() {
    let (mut store, was) = with_snapshot();
    assert_shows(&store, "one", &was);
    wreck(&store.path("work"));
    assert_shows(&store, "one", &was);
    store.snapshot("two");
    let second = read_tree(&store.path("work"));
    delete_all(&store.mnt);
    assert_shows(&store, "one", &was);
    assert_shows(&store, "two", &second);
    store.remount();
    assert_shows(&store, "one", &was);
    assert_shows(&store, "two", &second);
    // New files under the old names do not shine through.
    rich_tree(&store.path("work"));
    wreck(&store.path("work"));
    assert_shows(&store, "one", &was);
    assert_shows(&store, "two", &second);
    store.finish();
}

#[test]
fn every_single_backing_shows_every_snapshot() {
    let mut store = Mounted::unmounted(3);
    store.mount().ok();
    rich_tree(&store.path("work"));
    store.snapshot("one");
    let first = read_tree(&store.path("work"));
    wreck(&store.path("work"));
    store.snapshot("two");
    let second = read_tree(&store.path("work"));
    delete_all(&store.path("work"));
    store.unmount();
    for backing in store.backings.clone() {
        store.mount_only(&[backing]).ok();
        assert_shows(&store, "one", &first);
        assert_shows(&store, "two", &second);
        store.unmount();
    }
}

#[test]
fn cp_rsync_and_tar_out_of_a_snapshot_reproduce_the_original() {
    need(&["rsync", "tar", "cp"]);
    let (store, was) = with_snapshot();
    wreck(&store.path("work"));
    delete_all(&store.path("work"));
    let past = store.past("one").join("work");
    let out = |name: &str| {
        let folder = store.beside(name);
        fs::create_dir(&folder).unwrap();
        folder
    };
    let by_cp = out("cp");
    run(Command::new("cp").arg("-a").arg(past.join(".")).arg(&by_cp)).ok();
    assert_trees("cp -a", &was, &read_tree(&by_cp));
    let by_rsync = out("rsync");
    let rsync = |more: &[&str], to: &Path| {
        let mut from = past.clone().into_os_string();
        from.push("/");
        run(Command::new("rsync")
            .args(["-aHAXS", "--checksum", "--modify-window=-1"])
            .args(more)
            .arg(from)
            .arg(to))
        .ok()
    };
    rsync(&[], &by_rsync);
    assert_trees("rsync", &was, &read_tree(&by_rsync));
    assert_eq!(rsync(&["-n", "-i", "--delete"], &by_rsync), "", "nothing is left to transfer");
    let by_tar = out("tar");
    shell(
        &past,
        &format!(
            "tar --format=posix --xattrs --xattrs-include='user.*' --xattrs-include='trusted.*' \
             --acls -S -cf - . | tar --xattrs --xattrs-include='*' --acls -C {by_tar:?} -xpf -"
        ),
    );
    assert_trees("tar", &was, &read_tree(&by_tar));
    // Holes stay holes on the way out.
    use std::os::unix::fs::MetadataExt;
    let sparse = fs::metadata(past.join("docs/sparse")).unwrap();
    assert!(sparse.blocks() * 512 < 1 << 20, "{} blocks", sparse.blocks());
    let copied = fs::metadata(by_cp.join("docs/sparse")).unwrap();
    assert!(copied.blocks() * 512 < 1 << 20, "{} blocks", copied.blocks());
    store.finish();
}

#[test]
fn the_past_is_read_only_for_everybody() {
    let (store, _) = with_snapshot();
    let past = store.past("one").join("work");
    let refused = |what: &str, result: std::io::Result<()>| {
        let error = result.expect_err(what);
        assert_eq!(errno(&error), Some(Errno::ROFS), "{what}: {error}");
    };
    let file = past.join("src/file9.rs");
    refused("open for writing", OpenOptions::new().write(true).open(&file).map(drop));
    refused("create", File::create(past.join("new")).map(drop));
    refused("mkdir", fs::create_dir(past.join("new")));
    refused("unlink", fs::remove_file(&file));
    refused("rmdir", fs::remove_dir(past.join("with space")));
    refused("rename", fs::rename(&file, past.join("src/other")));
    refused("symlink", std::os::unix::fs::symlink("x", past.join("new")));
    refused("chmod", {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o777))
    });
    refused("chown", std::os::unix::fs::chown(&file, Some(1), None));
    refused("truncate", {
        fs::OpenOptions::new().write(true).truncate(true).open(&file).map(drop)
    });
    let xattr = rustix::fs::setxattr(&file, "user.x", b"x", rustix::fs::XattrFlags::empty());
    assert_eq!(xattr, Err(Errno::ROFS));
    let across = fs::hard_link(&file, store.path("link")).expect_err("link out of the past");
    assert!(matches!(errno(&across), Some(Errno::XDEV | Errno::ROFS)), "{across}");
    let moved = fs::rename(store.path("work/fifo"), past.join("fifo2")).expect_err("move into");
    assert!(matches!(errno(&moved), Some(Errno::XDEV | Errno::ROFS)), "{moved}");
    store.finish();
}

#[test]
fn snapshots_are_made_renamed_and_removed_as_folders() {
    let store = Mounted::new();
    fs::write(store.path("file"), "first").unwrap();
    let all = store.path(".snapshots");
    fs::create_dir(all.join("by-mkdir")).unwrap();
    fs::write(store.path("file"), "second").unwrap();
    assert_eq!(fs::read_to_string(all.join("by-mkdir/file")).unwrap(), "first");
    let twice = fs::create_dir(all.join("by-mkdir")).expect_err("a name is taken once");
    assert_eq!(errno(&twice), Some(Errno::EXIST));
    fs::rename(all.join("by-mkdir"), all.join("renamed")).unwrap();
    assert_eq!(fs::read_to_string(all.join("renamed/file")).unwrap(), "first");
    assert!(!all.join("by-mkdir").exists());
    store.snapshot("by-command");
    fs::rename(all.join("renamed"), all.join("by-command")).expect_err("not over another one");
    let names = names_in(&all);
    assert!(names.contains(&OsString::from("renamed")), "{names:?}");
    assert!(names.contains(&OsString::from("by-command")), "{names:?}");
    assert_eq!(fs::read_to_string(all.join("latest/file")).unwrap(), "second");
    assert!(fs::symlink_metadata(all.join("latest")).unwrap().is_symlink());
    fs::remove_dir(all.join("renamed")).unwrap();
    assert!(!all.join("renamed").exists());
    assert!(!names_in(&all).contains(&OsString::from("renamed")));
    // A snapshot made from a sub-directory is the same snapshot of the whole tree.
    fs::create_dir(store.path("dir")).unwrap();
    fs::create_dir(store.path("dir/.snapshots/from-below")).unwrap();
    assert_eq!(fs::read_to_string(all.join("from-below/file")).unwrap(), "second");
    store.finish();
}

/// Ends what runs beside a test, also if that fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_name_that_a_snapshot_lost_is_gone_at_once_whoever_took_it() {
    let store = Mounted::new();
    fs::create_dir(store.path("dir")).unwrap();
    let (all, below) = (store.path(".snapshots"), store.path("dir/.snapshots"));
    let shown = |name: &str| fs::read_to_string(all.join(name).join("file"));
    let command = |words: &[&str]| drop(store.rearview(words).ok());
    let ways: [(&str, &dyn Fn()); 6] = [
        ("delete", &|| command(&["snapshot", "delete", "a"])),
        ("rename", &|| command(&["snapshot", "rename", "a", "b"])),
        ("prune", &|| command(&["prune", "--keep-last", "1"])),
        ("rmdir", &|| fs::remove_dir(all.join("a")).unwrap()),
        ("mv", &|| fs::rename(all.join("a"), all.join("b")).unwrap()),
        ("mv below", &|| fs::rename(below.join("a"), below.join("b")).unwrap()),
    ];
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Those who look meanwhile have the kernel ask, and hold the directory's lock as it does.
        for place in [&all, &below] {
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    for name in ["a", "b", "last"] {
                        let _ = fs::metadata(place.join(name).join("file"));
                    }
                    let _ = fs::read_dir(place).map(Iterator::count);
                }
            });
        }
        let end = SetOnDrop(&over);
        for round in 0..3 {
            for (way, take) in &ways {
                let text = format!("{way} {round}");
                fs::write(store.path("file"), &text).unwrap();
                fs::create_dir(all.join("a")).unwrap();
                assert_eq!(shown("a").unwrap(), text);
                store.snapshot("last");
                take();
                let gone = shown("a").expect_err(&text);
                assert_eq!(errno(&gone), Some(Errno::NOENT), "{text}");
                let newest = fs::metadata(&all).unwrap().modified().unwrap();
                command(&["snapshot", "delete", "last"]);
                let older = fs::metadata(&all).unwrap().modified().unwrap();
                assert!(older < newest, "{text}");
                if let Ok(renamed) = shown("b") {
                    assert_eq!(renamed, text);
                    fs::remove_dir(all.join("b")).unwrap();
                }
            }
        }
        drop(end);
    });
    store.finish();
}

#[test]
fn every_directory_shows_its_own_past() {
    let store = Mounted::new();
    fs::create_dir_all(store.path("a/b")).unwrap();
    fs::write(store.path("a/b/file"), "then").unwrap();
    store.snapshot("s");
    fs::write(store.path("a/b/file"), "now").unwrap();
    let below = store.path("a/b/.snapshots/s");
    assert_eq!(fs::read_to_string(below.join("file")).unwrap(), "then");
    assert_eq!(names_in(&below), ["file"]);
    let at_root = store.past("s").join("a/b");
    assert_same("the two ways in", &at_root, &below);
    // The directory keeps its past when it moves.
    fs::rename(store.path("a/b"), store.path("moved")).unwrap();
    let moved = store.path("moved/.snapshots/s/file");
    assert_eq!(fs::read_to_string(moved).unwrap(), "then");
    // One that was not there then has nothing to show.
    fs::create_dir(store.path("young")).unwrap();
    let young = fs::metadata(store.path("young/.snapshots/s")).expect_err("it was not born");
    assert_eq!(errno(&young), Some(Errno::NOENT));
    // The folder is hidden from listings, and `find` and `du` do not walk into it.
    assert!(!names_in(&store.mnt).contains(&OsString::from(".snapshots")));
    assert!(!shell(&store.mnt, "find .").contains(".snapshots"));
    store.finish();
}

#[test]
fn any_instant_is_a_folder() {
    let store = Mounted::new();
    fs::write(store.path("file"), "first").unwrap();
    fs::write(store.path("gone"), "gone").unwrap();
    let between = a_moment_between();
    fs::write(store.path("file"), "second").unwrap();
    fs::remove_file(store.path("gone")).unwrap();
    let at = store.path(".snapshots/.at");
    let utc = between.to_zoned(jiff::tz::TimeZone::UTC);
    for time in [
        between.to_string(),
        utc.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        utc.strftime("%Y-%m-%d_%H-%M-%S").to_string(),
        format!("@{}", between.as_second()),
    ] {
        let folder = at.join(&time);
        let file = fs::read_to_string(folder.join("file"))
            .unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        assert_eq!(file, "first", "{time}");
        assert_eq!(names_in(&folder), ["file", "gone"], "{time}");
    }
    let seconds = Timestamp::now().as_second() - between.as_second();
    let ago = fs::read_to_string(at.join(format!("{seconds}s")).join("file")).unwrap();
    assert_eq!(ago, "first");
    assert_eq!(fs::read_to_string(at.join("now/file")).unwrap(), "second");
    let nonsense = fs::metadata(at.join("no such time")).expect_err("not a time");
    assert_eq!(errno(&nonsense), Some(Errno::NOENT));
    store.finish();
}

#[test]
fn versions_lists_every_version_of_a_file() {
    let store = Mounted::new();
    let path = store.path("notes.txt");
    for text in ["one", "one two", "three"] {
        fs::write(&path, text).unwrap();
        store.snapshot(&format!("s{}", text.len() + text.matches(' ').count()));
        a_moment_between();
    }
    fs::rename(&path, store.path("renamed.txt")).unwrap();
    let folder = store.path(".snapshots/.versions/renamed.txt");
    let texts: Vec<String> = names_in(&folder)
        .iter()
        .map(|name| {
            let name = name.to_str().unwrap();
            assert!(name.ends_with(".txt"), "opens by its extension: {name}");
            fs::read_to_string(folder.join(name)).unwrap()
        })
        .collect();
    for text in ["one", "one two", "three"] {
        assert!(texts.iter().any(|one| one == text), "{text:?} is not in {texts:?}");
    }
    let order: Vec<usize> =
        ["one", "three"].iter().map(|t| texts.iter().position(|one| one == t).unwrap()).collect();
    assert!(order[0] < order[1], "names sort by time: {texts:?}");
    store.finish();
}

#[test]
fn deleted_shows_what_a_directory_once_had() {
    let store = Mounted::new();
    fs::create_dir_all(store.path("dir/sub")).unwrap();
    fs::write(store.path("dir/file"), "last words").unwrap();
    fs::write(store.path("dir/sub/leaf"), "leaf").unwrap();
    fs::write(store.path("dir/stays"), "stays").unwrap();
    store.snapshot("s");
    fs::remove_file(store.path("dir/file")).unwrap();
    fs::remove_dir_all(store.path("dir/sub")).unwrap();
    let deleted = store.path("dir/.snapshots/.deleted");
    let names = names_in(&deleted);
    assert!(names.contains(&OsString::from("file")), "{names:?}");
    assert!(names.contains(&OsString::from("sub")), "{names:?}");
    assert!(!names.contains(&OsString::from("stays")), "{names:?}");
    assert_eq!(fs::read_to_string(deleted.join("file")).unwrap(), "last words");
    store.finish();
}

#[test]
fn samba_finds_snapshots_by_their_gmt_name() {
    let store = Mounted::new();
    fs::write(store.path("file"), "then").unwrap();
    let start = Timestamp::now().as_second();
    store.snapshot("s");
    let end = Timestamp::now().as_second();
    fs::write(store.path("file"), "now").unwrap();
    let found = (start..=end).any(|second| {
        let time = Timestamp::from_second(second).unwrap().to_zoned(jiff::tz::TimeZone::UTC);
        let name = time.strftime("@GMT-%Y.%m.%d-%H.%M.%S").to_string();
        fs::read_to_string(store.past(&name).join("file")).is_ok_and(|text| text == "then")
    });
    assert!(found, "no @GMT name of the snapshot's second is there");
    store.finish();
}

#[test]
fn a_snapshot_cuts_an_open_file_exactly() {
    let store = Mounted::new();
    let path = store.path("open");
    let mut file = File::create(&path).unwrap();
    let mut live = Vec::new();
    let mut cuts = Vec::new();
    for round in 0..5_u8 {
        let piece = vec![round; 100_000 + usize::from(round)];
        file.write_all(&piece).unwrap();
        live.extend(piece);
        store.snapshot(&format!("cut{round}"));
        cuts.push(live.clone());
    }
    // Overwriting in place after the last cut reaches none of them.
    use std::os::unix::fs::FileExt;
    file.write_all_at(&[9; 250_000], 50_000).unwrap();
    live[50_000..300_000].fill(9);
    for (round, wanted) in cuts.iter().enumerate() {
        let past = fs::read(store.past(&format!("cut{round}")).join("open")).unwrap();
        assert!(&past == wanted, "cut {round} has {} bytes of {}", past.len(), wanted.len());
    }
    drop(file);
    assert!(fs::read(&path).unwrap() == live);
    store.finish();
}

#[test]
fn a_snapshot_cuts_mmap_writes_exactly() {
    need(&["python3"]);
    let store = Mounted::new();
    let program = r#"
import mmap, os, subprocess, sys
binary, mnt = sys.argv[1], sys.argv[2]
with open("mapped", "wb") as f: f.truncate(64 * 4096)
fd = os.open("mapped", os.O_RDWR)
m = mmap.mmap(fd, 64 * 4096, mmap.MAP_SHARED)
def snap(name): subprocess.run([binary, "snapshot", "create", mnt, name], check=True)
for page in range(64): m[page * 4096] = 1
snap("one")
for page in range(0, 64, 2): m[page * 4096] = 2
snap("two")
for page in range(64): m[page * 4096] = 3
m.close()
"#;
    let mut command = Command::new("python3");
    command.args(["-c", program]).arg(common::run::binary()).arg(&store.mnt);
    run(command.current_dir(&store.mnt)).ok();
    let first_bytes = |path: PathBuf| -> Vec<u8> {
        fs::read(path).unwrap().chunks(4096).map(|page| page[0]).collect()
    };
    assert_eq!(first_bytes(store.past("one").join("mapped")), vec![1; 64]);
    let two: Vec<u8> = (0..64).map(|page| if page % 2 == 0 { 2 } else { 1 }).collect();
    assert_eq!(first_bytes(store.past("two").join("mapped")), two);
    assert_eq!(first_bytes(store.path("mapped")), vec![3; 64]);
    store.finish();
}

#[test]
fn an_unlinked_open_file_stays_in_the_snapshot_that_had_it() {
    let store = Mounted::new();
    let path = store.path("f");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(b"was here").unwrap();
    store.snapshot("had");
    fs::remove_file(&path).unwrap();
    file.write_all(b" and more").unwrap();
    store.snapshot("had-not");
    drop(file);
    assert_eq!(fs::read_to_string(store.past("had").join("f")).unwrap(), "was here");
    assert!(!store.past("had-not").join("f").exists());
    store.finish();
}

#[test]
fn hard_links_in_a_snapshot_are_one_file_with_one_history() {
    let store = Mounted::new();
    fs::write(store.path("a"), "first").unwrap();
    fs::hard_link(store.path("a"), store.path("b")).unwrap();
    store.snapshot("s");
    fs::remove_file(store.path("a")).unwrap();
    fs::write(store.path("b"), "second").unwrap();
    let was = read_tree(&store.past("s"));
    let entry = |name: &str| &was[Path::new(name)];
    assert_eq!(entry("a").link_group, entry("b").link_group);
    assert_eq!((entry("a").links, entry("b").links), (2, 2));
    assert_eq!(fs::read_to_string(store.past("s").join("a")).unwrap(), "first");
    assert_eq!(fs::read_to_string(store.past("s").join("b")).unwrap(), "first");
    store.finish();
}

#[test]
fn the_snapshot_folder_is_shown_as_the_option_says() {
    let snapshots = OsString::from(".snapshots");
    for (mode, in_root, below, reachable) in [
        ("hidden", false, false, true),
        ("root", true, false, true),
        ("visible", true, true, true),
        ("disabled", false, false, false),
    ] {
        let store = Mounted::with_options(&format!("allow_other,snapdir={mode}"));
        fs::create_dir(store.path("dir")).unwrap();
        assert_eq!(names_in(&store.mnt).contains(&snapshots), in_root, "{mode}");
        assert_eq!(names_in(&store.path("dir")).contains(&snapshots), below, "{mode}");
        assert_eq!(store.path(".snapshots").exists(), reachable, "{mode}");
        // The name cannot be taken while it means something.
        if reachable {
            assert!(fs::create_dir(store.path(".snapshots")).is_err(), "{mode}");
            assert!(File::create(store.path("dir/.snapshots")).is_err(), "{mode}");
        }
        drop(store);
    }
}

#[test]
fn historic_permissions_protect_historic_content() {
    let store = Mounted::new();
    let (owner, stranger) = (ordinary_user(), other_user());
    shell(
        &store.mnt,
        &format!("mkdir -m 700 home; echo secret > home/f; chown -R {}:{0} home", owner.uid),
    );
    store.snapshot("private");
    shell(&store.mnt, "chmod 755 home; chmod 644 home/f");
    store.snapshot("public");
    let read = |who: &common::user::User, snapshot: &str| {
        who.shell(&format!("cat {:?}", store.past(snapshot).join("home/f"))).code
    };
    assert_eq!(read(&owner, "private"), 0);
    assert_ne!(read(&stranger, "private"), 0, "opening it later opens nothing of before");
    assert_eq!(read(&stranger, "public"), 0);
    shell(&store.mnt, "chmod 700 home");
    assert_eq!(read(&stranger, "public"), 0, "closing it later closes nothing of before");
    store.finish();
}

#[test]
fn walking_the_past_opens_no_files_for_ever() {
    let (store, was) = with_snapshot();
    wreck(&store.path("work"));
    for round in 0..20 {
        store.snapshot(&format!("more{round}"));
    }
    store.assert_no_open_file_leak(|_| {
        for round in 0..20 {
            read_tree(&store.past(&format!("more{round}")));
        }
        assert_shows(&store, "one", &was);
    });
    store.finish();
}

#[test]
fn metadata_of_a_snapshot_stays_when_only_metadata_changes() {
    let (store, was) = with_snapshot();
    shell(
        &store.path("work"),
        "chmod -R a+rwX . ; chown -R 0:0 . ; find . -exec touch -h -d @5 {} + ; \
         find . -type f -exec setfattr -n user.new -v new {} + ; setfacl -R -b .",
    );
    assert_shows(&store, "one", &was);
    store.finish();
}

#[test]
fn emptying_a_tree_forgets_no_snapshot() {
    for mode in ["root", "visible", "hidden"] {
        let store = Mounted::with_options(&format!("allow_other,snapdir={mode}"));
        fs::create_dir(store.path("e")).unwrap();
        store.snapshot("s");
        let script = "find . -mindepth 1 -delete; rm -rf e/.snapshots e; rmdir .snapshots; true";
        common::run::run_shell(&store.mnt, script);
        assert!(store.past("s/e").is_dir(), "{mode}");
        let removed = fs::remove_dir(store.past("s"));
        assert_eq!(removed.is_ok(), mode == "hidden", "{mode}: {removed:?}");
        if mode != "hidden" {
            store.rearview(&["snapshot", "delete", "s"]).ok();
        }
        assert!(!store.past("s").exists());
        drop(store);
    }
}

//! The commands, end to end: what they do, what they say, what they end with.

mod common;

use std::fs;
use std::path::Path;

use common::json::{all, parsed, texts};
use common::mounted::word;
use common::run::{rearview, rearview_in};
use common::tree::{assert_trees, read_tree};
use common::{Mounted, need, shell, wait_until};

fn names(store: &Mounted) -> Vec<String> {
    texts(&parsed(store.rearview(&["snapshot", "list", "--json"])), "name")
}

#[test]
fn snapshots_are_created_listed_renamed_held_and_deleted() {
    let store = Mounted::new();
    let mnt = word(&store.mnt);
    fs::write(store.path("f"), "1").unwrap();
    rearview(["snapshot", "create", &mnt, "one"]).ok();
    rearview(["snapshot", "create", &mnt, "two"]).ok();
    let listed = rearview(["snapshot", "list", &mnt]).ok();
    assert!(listed.contains("one") && listed.contains("two"), "{listed}");
    assert_eq!(names(&store), ["one", "two"]);
    rearview(["snapshot", "rename", &mnt, "two", "three"]).ok();
    assert_eq!(names(&store), ["one", "three"]);
    rearview(["snapshot", "hold", &mnt, "three"]).ok();
    let held = rearview(["snapshot", "delete", &mnt, "three"]);
    assert_ne!(held.code, 0);
    assert!(held.stderr.contains("held") || held.stderr.contains("hold"), "{}", held.told());
    let busy = fs::remove_dir(store.past("three")).expect_err("held");
    assert_eq!(rustix::io::Errno::from_io_error(&busy), Some(rustix::io::Errno::BUSY));
    rearview(["snapshot", "release", &mnt, "three"]).ok();
    rearview(["snapshot", "delete", &mnt, "three"]).ok();
    assert_eq!(names(&store), ["one"]);
    assert!(!store.past("three").exists());
    rearview(["snapshot", "create", &mnt, "one"]).fails(1, &["'one'", "already"]);
    store.finish();
}

#[test]
fn a_wrong_name_is_answered_with_the_nearest() {
    let store = Mounted::new();
    let mnt = word(&store.mnt);
    rearview(["snapshot", "create", &mnt, "before-cleanup"]).ok();
    let missing = rearview(["snapshot", "delete", &mnt, "before-cleenup"]);
    missing.fails(1, &["no snapshot", "before-cleenup", "nearest", "before-cleanup"]);
    store.finish();
}

#[test]
fn commands_find_the_mount_from_any_path_inside() {
    let store = Mounted::new();
    fs::create_dir_all(store.path("a/b")).unwrap();
    fs::write(store.path("a/b/f"), "x").unwrap();
    store.snapshot("s");
    let below = store.path("a/b");
    assert!(rearview_in(&below, ["snapshot", "list"]).ok().contains('s'));
    rearview_in(&below, ["status"]).ok();
    rearview_in(&below, ["log", "f"]).ok();
    rearview_in(Path::new("/"), ["log", word(&below.join("f")).as_str()]).ok();
    rearview_in(Path::new("/"), ["status"]).fails(10, &[]);
    store.finish();
}

#[test]
fn diff_names_what_was_added_removed_changed_and_renamed() {
    let store = Mounted::new();
    shell(&store.mnt, "mkdir d; echo 1 > same; echo 1 > changed; echo 1 > gone; echo 1 > d/old");
    store.snapshot("before");
    shell(&store.mnt, "echo 22 > changed; rm gone; mv d/old d/new; echo new > added");
    store.snapshot("after");
    for (to, wanted) in [("after", true), ("now", true), ("before", false)] {
        let text = store.rearview(&["diff", "before", to]).ok();
        let has = |letter: char, parts: &[&str]| {
            text.lines().any(|line| {
                line.starts_with(letter) && parts.iter().all(|part| line.contains(part))
            })
        };
        assert_eq!(has('+', &["added"]), wanted, "{text}");
        assert_eq!(has('-', &["gone"]), wanted, "{text}");
        assert_eq!(has('M', &["changed"]), wanted, "{text}");
        assert_eq!(has('R', &["d/old", "d/new"]), wanted, "{text}");
        assert!(!text.contains("same"), "{text}");
    }
    // Whichever is named first: the story is told from the earlier to the later.
    let back = store.rearview(&["diff", "after", "before"]).ok();
    assert_eq!(back, store.rearview(&["diff", "before", "after"]).ok());
    // Below one path only.
    let below = store.rearview(&["diff", "before", "after", "d"]).ok();
    assert!(below.contains("d/new") && !below.contains("changed"), "{below}");
    parsed(store.rearview(&["diff", "--json", "before", "after"]));
    store.rearview(&["diff", "before", "aftre"]).fails(1, &["after"]);
    store.finish();
}

#[test]
fn log_follows_a_file_through_renames() {
    let store = Mounted::new();
    fs::write(store.path("draft"), "one").unwrap();
    store.snapshot("s1");
    fs::write(store.path("draft"), "two two").unwrap();
    store.snapshot("s2");
    fs::rename(store.path("draft"), store.path("final")).unwrap();
    store.snapshot("s3");
    fs::write(store.path("final"), "three three three").unwrap();
    store.snapshot("s4");
    let text = store.rearview(&["log", "final"]).ok();
    assert!(text.contains("draft"), "the old name is told: {text}");
    assert!(text.lines().count() >= 3, "every version is there: {text}");
    let value = parsed(store.rearview(&["log", "--json", "final"]));
    let sizes: Vec<u64> = all(&value, "size").iter().filter_map(|v| v.as_u64()).collect();
    for size in [3, 7, 17] {
        assert!(sizes.contains(&size), "{value}");
    }
    store.rearview(&["log", "never-was"]).fails(1, &["never-was"]);
    store.finish();
}

#[test]
fn restore_brings_back_a_file_a_folder_and_everything() {
    let store = Mounted::new();
    shell(
        &store.mnt,
        "mkdir -p d/sub; echo one > d/f; echo leaf > d/sub/leaf; ln d/f d/g; \
                       setfattr -n user.k -v v d/f; chmod 640 d/f; touch -d @1234567 d/sub/leaf",
    );
    store.snapshot("s");
    let was = read_tree(&store.mnt);
    shell(&store.mnt, "rm -r d");
    let dry = store.rearview(&["restore", "-n", "s", "d"]).ok();
    assert!(dry.contains('d') && !store.path("d").exists(), "a dry run changes nothing: {dry}");
    store.rearview(&["restore", "s", "d"]).ok();
    let now = read_tree(&store.path("d"));
    let wanted = read_tree(&store.past("s").join("d"));
    assert_trees("the restored folder", &wanted, &now);
    // One file, changed since.
    fs::write(store.path("d/sub/leaf"), "changed").unwrap();
    store.snapshot("changed");
    store.rearview(&["restore", "s", "d/sub/leaf"]).ok();
    assert_eq!(fs::read_to_string(store.path("d/sub/leaf")).unwrap(), "leaf\n");
    // Restoring is itself undone by restoring.
    store.rearview(&["restore", "changed", "d/sub/leaf"]).ok();
    assert_eq!(fs::read_to_string(store.path("d/sub/leaf")).unwrap(), "changed");
    // Elsewhere, also outside the mount.
    let out = store.beside("out");
    fs::create_dir(&out).unwrap();
    store.rearview(&["restore", "s", "d", "--to", word(&out).as_str()]).ok();
    assert_eq!(fs::read_to_string(out.join("d/sub/leaf")).unwrap(), "leaf\n");
    drop(was);
    store.rearview(&["restore", "s", "no/such"]).fails(1, &["no/such"]);
    store.finish();
}

#[test]
fn restore_overwrites_only_as_told() {
    let store = Mounted::new();
    let write = |text: &str| fs::write(store.path("f"), text).unwrap();
    let read = || fs::read_to_string(store.path("f")).unwrap();
    write("old");
    store.snapshot("s");
    write("new");
    store.rearview(&["restore", "--overwrite", "never", "s", "f"]);
    assert_eq!(read(), "new");
    store.rearview(&["restore", "--overwrite", "if-newer", "s", "f"]);
    assert_eq!(read(), "new", "what is in the snapshot is older");
    store.rearview(&["restore", "--overwrite", "if-changed", "s", "f"]).ok();
    assert_eq!(read(), "old");
    write("new");
    store.rearview(&["restore", "--overwrite", "always", "s", "f"]).ok();
    assert_eq!(read(), "old");
    store.rearview(&["restore", "--overwrite", "maybe", "s", "f"]).fails(2, &["maybe"]);
    store.finish();
}

#[test]
fn restore_takes_a_time() {
    let store = Mounted::new();
    fs::write(store.path("f"), "then").unwrap();
    let clock = |millis: u128| {
        let start = std::time::Instant::now();
        wait_until("the clock moves", 10, move || start.elapsed().as_millis() > millis);
    };
    clock(2100);
    let time = jiff::Timestamp::now().to_string();
    clock(2100);
    fs::write(store.path("f"), "now").unwrap();
    store.rearview(&["restore", &time, "f"]).ok();
    assert_eq!(fs::read_to_string(store.path("f")).unwrap(), "then");
    store.rearview(&["restore", "2100-01-01T00:00:00Z", "f"]).fails(1, &["future"]);
    store.finish();
}

#[test]
fn undelete_brings_back_what_is_gone() {
    let store = Mounted::new();
    shell(&store.mnt, "mkdir d; echo last > d/f; echo kept > d/g");
    store.snapshot("s");
    shell(&store.mnt, "rm d/f");
    store.rearview(&["undelete", "d/f"]).ok();
    assert_eq!(fs::read_to_string(store.path("d/f")).unwrap(), "last\n");
    shell(&store.mnt, "rm -r d");
    store.rearview(&["undelete", "d"]).ok();
    assert_eq!(fs::read_to_string(store.path("d/g")).unwrap(), "kept\n");
    store.rearview(&["undelete", "never-was"]).fails(1, &["never-was"]);
    store.finish();
}

#[test]
fn status_tells_state_replicas_and_history() {
    let mut store = Mounted::new();
    fs::write(store.path("f"), "x").unwrap();
    store.snapshot("s");
    let text = store.rearview(&["status"]).ok();
    for backing in &store.backings {
        assert!(text.contains(&word(backing)), "every replica is named: {text}");
    }
    let value = parsed(store.rearview(&["status", "--json"]));
    let replicas = all(&value, "replicas");
    assert!(replicas.iter().any(|r| r.as_array().is_some_and(|r| r.len() == 2)), "{value}");
    store.unmount();
    // Unmounted, the store still tells what it knows; the path is a backing.
    let backing = word(&store.backings[1]);
    rearview(["status", &backing]).ok();
    assert!(rearview(["snapshot", "list", &backing]).ok().contains('s'));
    let file = format!("{backing}/f");
    rearview(["log", &file]).ok();
    // With a replica missing it is degraded, and says so by its exit code.
    let only = store.backings[0].clone();
    store.mount_only(&[only]).ok();
    assert_eq!(store.rearview(&["status"]).code, 20);
    store.unmount();
    store.mount().ok();
    wait_until("the replica is back", 30, || store.rearview(&["status"]).code == 0);
    store.finish();
}

#[test]
fn wrong_usage_ends_with_2_and_no_store_with_10() {
    need(&[]);
    rearview(["no-such-command"]).fails(2, &["usage"]);
    rearview(["snapshot"]).fails(2, &["usage"]);
    rearview(["diff"]).fails(2, &["usage"]);
    rearview(["status", "/"]).fails(10, &["/"]);
    rearview(["snapshot", "list", "/proc"]).fails(10, &[]);
    let help = rearview(["--help"]).ok();
    for command in ["mount", "umount", "snapshot", "log", "diff", "restore", "undelete", "status"] {
        assert!(help.contains(command), "{command} is not in the help: {help}");
        rearview([command, "--help"]).ok();
    }
    assert!(rearview(["--version"]).ok().starts_with("rearview "));
}

#[test]
fn a_closed_output_is_no_panic() {
    let store = Mounted::new();
    for i in 0..300 {
        fs::write(store.path(&format!("f{i}")), "x").unwrap();
    }
    let binary = common::run::binary();
    let script = format!("set +o pipefail; {binary:?} diff @0 now 2>err | head -c 1; cat err >&2");
    let done = common::run::run_shell(&store.mnt, &script);
    assert!(!done.stderr.contains("panicked"), "{}", done.told());
    fs::remove_file(store.path("err")).unwrap();
    store.finish();
}

#[test]
fn one_bad_path_does_not_keep_the_others_from_their_restore() {
    let store = Mounted::new();
    shell(&store.mnt, "echo a > a; echo b > b; touch -d @5 b");
    store.snapshot("s");
    shell(&store.mnt, "rm a; touch b");
    let done = store.rearview(&["restore", "--json", "s", "no/such", "a", "b", "/no-store"]);
    assert_eq!(done.code, 3, "{}", done.told());
    let value: serde_json::Value = serde_json::from_str(&done.stdout).unwrap();
    let failed = value.get("failed").and_then(|f| f.as_array()).map(Vec::len);
    assert_eq!(failed, Some(2), "{value}");
    assert_eq!(texts(&value, "deed"), ["created", "adjusted"]);
    let none = store.rearview(&["restore", "s", "no/such"]);
    assert!(!none.stdout.contains("nothing"), "{}", none.told());
    none.fails(1, &["no/such"]);
    store.rearview(&["restore", "s", "/no-store"]).fails(10, &[]);
    shell(&store.mnt, "rm a b");
    let done = store.rearview(&["undelete", "never-was", "a", "b"]);
    assert_eq!(done.code, 3, "{}", done.told());
    assert_eq!(fs::read_to_string(store.path("b")).unwrap(), "b\n");
    assert_eq!(names(&store), ["s"], "no helper is left");
    let log = store.rearview(&["log", "a"]).ok();
    assert!(!log.contains("restoring"), "{log}");
    store.finish();
}

#[test]
fn attributes_bytes_and_links_are_restored_in_a_mount() {
    let store = Mounted::new();
    shell(
        &store.mnt,
        "mkdir d; echo one > d/f; ln d/f d/g; echo x > d/x; setfattr -n user.k -v v d",
    );
    store.snapshot("s");
    let wanted = read_tree(&store.past("s").join("d"));
    store.rearview(&["restore", "s", "d"]).ok();
    assert!(store.rearview(&["restore", "s", "d"]).ok().contains("nothing to restore"));
    shell(
        &store.mnt,
        "rm d/g; cp -p d/x keep; echo y > d/x; touch -r keep d/x; rm keep; \
         setfattr -x user.k d; touch d/f; setfacl -m u:1:r d/f",
    );
    store.rearview(&["restore", "s", "d"]).ok();
    assert_trees("the restored folder", &wanted, &read_tree(&store.path("d")));
    assert!(store.rearview(&["restore", "s", "d"]).ok().contains("nothing to restore"));
    store.rearview(&["restore", "s", "."]).ok();
    assert!(store.rearview(&["restore", "s", "."]).ok().contains("nothing to restore"));
    store.finish();
}

#[test]
fn what_became_a_file_is_asked_for_by_its_old_paths() {
    let store = Mounted::new();
    shell(&store.mnt, "mkdir -p d/e; echo old > d/e/f");
    store.snapshot("s");
    shell(&store.mnt, "rm -r d; echo file > d");
    assert!(store.rearview(&["log", "d/e/f"]).ok().contains("created"));
    let out = store.beside("out");
    store.rearview(&["restore", "s", "d/e/f", "--to", word(&out).as_str()]).ok();
    assert_eq!(fs::read_to_string(out.join("f")).unwrap(), "old\n");
    store.rearview(&["restore", "s", "d/e/f"]).fails(1, &["/d"]);
    store.finish();
}

#[test]
fn names_that_mean_a_path_or_a_time_are_refused() {
    let store = Mounted::new();
    store.rearview(&["snapshot", "create", "a/b"]).fails(1, &["a/b"]);
    for name in ["now", "today", "yesterday", "2h"] {
        store.rearview(&["snapshot", "create", name]).fails(1, &[name, "time"]);
        assert!(fs::create_dir(store.past(name)).is_err(), "{name}");
    }
    store.rearview(&["snapshot", "create", "2026-11-22_19-30-00"]).ok();
    store.rearview(&["snapshot", "rename", "2026-11-22_19-30-00", "2h"]).fails(1, &["2h"]);
    assert_eq!(names(&store), ["2026-11-22_19-30-00"]);
    store.finish();
}

#[test]
fn a_mount_of_another_kind_leaves_no_helper_and_takes_no_changes() {
    let mut store = Mounted::with_options("allow_other,snapdir=disabled");
    fs::write(store.path("f"), "x").unwrap();
    store.snapshot("s");
    fs::remove_file(store.path("f")).unwrap();
    store.rearview(&["undelete", "f"]).fails(1, &["snapdir=disabled"]);
    assert_eq!(names(&store), ["s"]);
    store.unmount();
    store.set_options(&["-o", "ro"]);
    store.mount().ok();
    for words in [
        &["create", "new"][..],
        &["delete", "s"],
        &["rename", "s", "t"],
        &["hold", "s"],
        &["release", "s"],
    ] {
        let words: Vec<&str> = ["snapshot"].iter().chain(words).copied().collect();
        store.rearview(&words).fails(1, &["Read-only file system"]);
    }
    store.rearview(&["undelete", "f"]).fails(1, &["Read-only file system"]);
    assert_eq!(names(&store), ["s"]);
    store.finish();
}

#[test]
fn mistakes_in_the_words_of_a_mount_end_with_2() {
    let store = Mounted::unmounted(1);
    let (backing, mnt) = (word(&store.backings[0]), word(&store.mnt));
    for bad in ["frobnicate", "threads=abc", "snapdir=zzz"] {
        rearview(["mount", "-o", bad, &backing, &mnt]).fails(2, &[bad.split('=').next().unwrap()]);
    }
    let many = [backing.as_str(); 9].join(":");
    rearview(["mount", &many, &mnt]).fails(2, &["at most 8"]);
    assert!(!store.backings[0].join(".rearview").exists());
}

#[test]
fn the_helper_of_fstab_makes_no_store() {
    let mut store = Mounted::unmounted(1);
    let helper = store.beside("mount.fuse.rearview");
    std::os::unix::fs::symlink(common::run::binary(), &helper).unwrap();
    let (backing, mnt) = (word(&store.backings[0]), word(&store.mnt));
    let mut command = std::process::Command::new(&helper);
    let done = common::run(command.args([&backing, &mnt, "-o", "rw"]));
    done.fails(10, &[&backing, "rearview mount"]);
    assert!(!store.backings[0].join(".rearview").exists());
    store.mount().ok();
    store.unmount();
    common::run(&mut command).ok();
    store.unmount();
    // What is no mountpoint of ours says what it is.
    let text = |path: &str| rearview(["umount", path]).fails(10, &[path]).stderr.clone();
    assert!(text("/proc").contains("proc"));
    assert!(text(&mnt).contains("no store is mounted"));
    assert!(text(&format!("{mnt}/none")).contains("does not exist"));
    // A store of a newer format is none that any command may read.
    let marker = store.backings[0].join(".rearview/store.toml");
    let old = fs::read_to_string(&marker).unwrap();
    let new: Vec<String> = old
        .lines()
        .map(|line| if line.starts_with("format = ") { "format = 99" } else { line }.to_string())
        .collect();
    fs::write(&marker, new.join("\n")).unwrap();
    let mount = store.mount();
    rearview(["log", &backing]).fails(mount.code, &["newer format 99"]);
    rearview(["diff", "@0", "now", &backing]).fails(mount.code, &["newer format 99"]);
    fs::write(&marker, old).unwrap();
}

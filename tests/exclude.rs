//! Excluded paths are mirrored and have no history: whatever is done to them, no snapshot shows
//! them and nothing of them is kept, while all else keeps its history to the last byte.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};

use common::json::parsed;
use common::tree::{Tree, assert_trees, names_in, read_tree};
use common::{Mounted, run, shell};

/// Bytes and versions that history holds.
fn history(store: &Mounted) -> (u64, u64) {
    let status = parsed(store.rearview(&["status", "--json"]));
    let total = |name: &str| status["totals"][name].as_u64().expect("a number");
    let bytes = ["undo_bytes", "preserved_bytes", "cloned_bytes", "packed_bytes"];
    (bytes.iter().map(|name| total(name)).sum(), total("past_versions"))
}

/// A tree without what lies at or below these paths, and without what the directories' times and
/// link counts tell of it.
fn without(mut tree: Tree, gone: &[&str]) -> Vec<String> {
    tree.retain(|path, _| !gone.iter().any(|gone| Path::new(path).starts_with(gone)));
    tree.keys().map(|path| path.to_string_lossy().into_owned()).collect()
}

fn shown(store: &Mounted, snapshot: &str) -> Vec<String> {
    without(read_tree(&store.past(snapshot)), &[])
}

fn text(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn kill_and_remount(store: &mut Mounted) {
    let pid = i32::try_from(store.daemon()).ok().and_then(Pid::from_raw).expect("a process");
    kill_process(pid, Signal::KILL).unwrap();
    run(Command::new("umount").arg("-l").arg(&store.mnt));
    store.ended_elsewhere();
    store.mount().ok();
}

#[test]
fn a_build_directory_costs_no_history() {
    let store = Mounted::new();
    fs::write(store.path(".rearviewignore"), "target/\n*.o\n").unwrap();
    fs::create_dir(store.path("src")).unwrap();
    fs::write(store.path("src/main.c"), "int main;").unwrap();
    store.snapshot("one");
    let before = history(&store);
    shell(
        &store.mnt,
        r#"
mkdir -p target/debug/deps
for round in 1 2 3; do
    for i in 1 2 3 4 5 6 7 8; do
        head -c 100000 /dev/urandom > target/debug/deps/lib$i.rlib
        head -c 5000 /dev/urandom > src/$i.o
        ln -f target/debug/deps/lib$i.rlib target/debug/lib$i.rlib
        ln -sfn deps/lib$i.rlib target/debug/latest
    done
    printf x | dd of=target/debug/deps/lib1.rlib bs=1 seek=500 conv=notrunc status=none
    truncate -s 10 target/debug/deps/lib2.rlib
    mv target/debug/deps/lib3.rlib target/debug/deps/lib4.rlib
    chmod 700 target/debug; touch target/debug/deps/lib5.rlib
done
rm -r target/debug
mkdir target/release; echo x > target/release/x
"#,
    );
    store.snapshot("two");
    let after = history(&store);
    assert_eq!(after.0, before.0, "bytes of history");
    let files = [".rearviewignore", "src", "src/main.c"];
    assert_eq!(shown(&store, "one")[1..], files);
    assert_eq!(shown(&store, "two")[1..], files);
    assert_eq!(names_in(&store.past("two")).len(), 2);
    let differing = store.rearview(&["diff", "one", "two"]).ok();
    assert!(!differing.contains("target") && !differing.contains(".o"), "{differing}");
    assert!(!store.path("src/.snapshots/.deleted/1.o").exists());
    assert!(!store.path(".snapshots/.versions/target").exists());
    let listed = names_in(&store.path("src/.snapshots/.versions"));
    assert_eq!(listed, ["main.c"]);
    store.finish();
}

#[test]
fn what_becomes_excluded_keeps_its_old_versions_and_makes_no_new_ones() {
    let mut store = Mounted::new();
    fs::write(store.path("log"), "first ".repeat(3000)).unwrap();
    fs::write(store.path("kept"), "kept").unwrap();
    fs::write(store.path("gone"), "gone ".repeat(3000)).unwrap();
    fs::write(store.path("grown"), "grown ".repeat(3000)).unwrap();
    let snapshot = read_tree(&store.mnt);
    store.snapshot("one");
    fs::write(store.path(".rearviewignore"), "log\ngone\ngrown\n").unwrap();
    store.snapshot("two");
    assert_eq!(text(store.past("two").join("log")), "first ".repeat(3000));
    // Overwritten in the middle, in several turns, each with a close.
    for round in 0..4 {
        let script = format!("printf '{round}' | dd of=log bs=1 seek={round}00 conv=notrunc");
        shell(&store.mnt, &format!("{script} status=none; printf more >> grown"));
    }
    let (bytes, _) = history(&store);
    assert!(bytes >= 15_000, "the last version is kept: {bytes}");
    shell(&store.mnt, "echo new > log; head -c 50000 /dev/zero > log; rm gone");
    let (after, _) = history(&store);
    assert!(after <= bytes + 15_000, "{after} after {bytes}");
    shell(&store.mnt, "echo again > log; echo more >> grown; rm grown; rm log; echo anew > log");
    store.snapshot("three");
    assert_eq!(history(&store).0, after, "nothing more");
    assert_trees("one", &snapshot, &read_tree(&store.past("one")));
    assert_eq!(text(store.past("two").join("grown")), "grown ".repeat(3000));
    assert!(!store.past("three").join("log").exists());
    let log = store.rearview(&["log", "log"]).ok();
    assert!(log.contains("excluded") && log.contains("created"), "{log}");
    let log = parsed(store.rearview(&["log", "--json", "log"]));
    assert_eq!(log["excluded"], true);
    // A rule that is taken back counts from the next change on.
    fs::write(store.path(".rearviewignore"), "").unwrap();
    shell(&store.mnt, "echo shown >> log");
    store.snapshot("four");
    assert_eq!(text(store.past("four").join("log")), "anew\nshown\n");
    shell(&store.mnt, "echo overwritten > log");
    assert_eq!(text(store.past("four").join("log")), "anew\nshown\n");
    store.remount();
    assert_trees("one", &snapshot, &read_tree(&store.past("one")));
    assert_eq!(text(store.past("four").join("log")), "anew\nshown\n");
    store.finish();
}

#[test]
fn an_editor_that_saves_by_a_rename_makes_versions_of_the_file_it_saves() {
    let mut store = Mounted::unmounted(2);
    store.set_options(&["-o", "allow_other,exclude=*.tmp,exclude=*~"]);
    store.mount().ok();
    for round in 1..4 {
        shell(
            &store.mnt,
            &format!(
                "echo {round} > doc.tmp; sync doc.tmp; [ ! -e doc ] || ln -f doc doc~; \
                 mv doc.tmp doc"
            ),
        );
        store.snapshot(&format!("s{round}"));
    }
    // With the file still open for writing while it is renamed, as rsync and sqlite do not do.
    shell(&store.mnt, "exec 5> doc.tmp; echo 4 >&5; mv doc.tmp doc; echo 5 >&5; exec 5>&-");
    store.snapshot("s4");
    fs::write(store.path("doc"), "6").unwrap();
    for (round, expected) in [(1, "1\n"), (2, "2\n"), (3, "3\n"), (4, "4\n5\n")] {
        let past = store.past(&format!("s{round}"));
        assert_eq!(names_in(&past), ["doc"]);
        assert_eq!(text(past.join("doc")), expected);
    }
    assert_eq!(text(store.path("doc~")), "2\n");
    let versions = store.path(".snapshots/.versions/doc");
    assert!(names_in(&versions).len() >= 5, "{:?}", names_in(&versions));
    let log = store.rearview(&["log", "doc"]).ok();
    assert!(log.contains("replaced") && !log.contains(".tmp"), "{log}");
    store.finish();
}

#[test]
fn a_rename_out_of_history_and_into_it_counts_by_the_new_name() {
    let store = Mounted::with_options("allow_other,exclude=/out/,exclude=*.bak");
    shell(
        &store.mnt,
        "mkdir in out in/dir out/sub; echo a > in/a; echo b > out/b; echo c > out/sub/c",
    );
    shell(&store.mnt, "echo d > in/dir/d");
    store.snapshot("one");
    shell(&store.mnt, "mv in/a in/a.bak; mv out/b in/b; mv out/sub in/sub; mv in/dir out/dir");
    store.snapshot("two");
    let names = |snapshot: &str| without(read_tree(&store.past(snapshot)), &[])[1..].to_vec();
    assert_eq!(names("one"), ["in", "in/a", "in/dir", "in/dir/d"]);
    assert_eq!(names("two"), ["in", "in/b", "in/sub"]);
    // What lies in a renamed directory is taken up with its next change.
    shell(&store.mnt, "echo more >> in/sub/c; echo more >> out/dir/d; echo more >> in/a.bak");
    store.snapshot("three");
    assert_eq!(names("three"), ["in", "in/b", "in/sub", "in/sub/c"]);
    shell(&store.mnt, "echo x > in/b; echo x > in/sub/c; rm -r out; rm in/a.bak");
    assert_eq!(text(store.past("two").join("in/b")), "b\n");
    assert_eq!(text(store.past("three").join("in/sub/c")), "c\nmore\n");
    assert_eq!(text(store.past("one").join("in/a")), "a\n");
    assert_eq!(text(store.past("one").join("in/dir/d")), "d\n");
    // Exchanged names, one excluded.
    shell(&store.mnt, "echo e > in/e; echo f > in/f.bak");
    let dir = rustix::fs::open(store.path("in"), rustix::fs::OFlags::PATH, 0.into()).unwrap();
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    rustix::fs::renameat_with(&dir, "e", &dir, "f.bak", exchange).unwrap();
    drop(dir);
    store.snapshot("four");
    shell(&store.mnt, "echo y > in/e; echo y > in/f.bak");
    assert_eq!(text(store.past("four").join("in/e")), "f\n");
    assert!(!store.past("four").join("in/f.bak").exists());
    store.finish();
}

#[test]
fn a_file_with_an_included_name_has_history_whatever_its_other_names() {
    let store = Mounted::with_options("allow_other,exclude=*.bak");
    shell(&store.mnt, "echo 1 > x.bak; ln x.bak x; echo 2 > y; ln y y.bak");
    store.snapshot("one");
    shell(&store.mnt, "echo 11 > x.bak; echo 22 > y.bak");
    store.snapshot("two");
    shell(&store.mnt, "rm x y; echo 111 > x.bak");
    store.snapshot("three");
    shell(&store.mnt, "rm x.bak; echo 222 > y.bak; ln y.bak y");
    store.snapshot("four");
    shell(&store.mnt, "echo 2222 > y");
    let read =
        |snapshot: &str, name: &str| fs::read_to_string(store.past(snapshot).join(name)).ok();
    let seen = |snapshot| [read(snapshot, "x"), read(snapshot, "y")];
    let both = |x: &str, y: &str| [Some(format!("{x}\n")), Some(format!("{y}\n"))];
    assert_eq!(seen("one"), both("1", "2"));
    assert_eq!(seen("two"), both("11", "22"));
    assert_eq!(seen("three"), [None, None]);
    assert_eq!(seen("four"), [None, Some("222\n".into())]);
    for snapshot in ["one", "two", "three", "four"] {
        assert!(
            names_in(&store.past(snapshot))
                .iter()
                .all(|name| !name.display().to_string().ends_with(".bak"))
        );
    }
    store.finish();
}

#[test]
fn rules_further_down_and_negations_count_as_in_git() {
    let store = Mounted::new();
    fs::write(store.path(".rearviewignore"), "*.log\n!keep.log\n/top\nbuild/\n[bad\n").unwrap();
    shell(
        &store.mnt,
        r#"
mkdir -p a/b a/build/deep c
printf '!wanted.log\n*.tmp\n/only\n' > a/.rearviewignore
for dir in . a a/b a/build a/build/deep c; do
    for name in x.log keep.log wanted.log x.tmp top only; do echo $dir > $dir/$name; done
done
"#,
    );
    store.snapshot("one");
    let expected = [
        ".rearviewignore",
        "a",
        "a/.rearviewignore",
        "a/b",
        "a/b/keep.log",
        "a/b/only",
        "a/b/top",
        "a/b/wanted.log",
        "a/keep.log",
        "a/top",
        "a/wanted.log",
        "c",
        "c/keep.log",
        "c/only",
        "c/top",
        "c/x.tmp",
        "keep.log",
        "only",
        "x.tmp",
    ];
    assert_eq!(shown(&store, "one")[1..], expected);
    // The rules move with their directory, and end with their file.
    shell(
        &store.mnt,
        "mv a/.rearviewignore c/; echo 2 > a/x.tmp; echo 2 > c/x.tmp; mv c d; echo 2 > d/only",
    );
    store.snapshot("two");
    let two = shown(&store, "two");
    assert!(two.contains(&"a/x.tmp".into()) && !two.contains(&"d/x.tmp".into()), "{two:?}");
    assert!(!two.contains(&"d/only".into()), "{two:?}");
    store.finish();
}

#[test]
fn an_adopted_tree_and_a_killed_mount_follow_the_rules() {
    let mut store = Mounted::unmounted(2);
    shell(
        &store.backings[0],
        "mkdir -p src target/x; echo 1 > src/a; echo 1 > target/x/o; echo 1 > src/a.tmp
         echo 1 > b.bak; ln b.bak b; echo target/ > .rearviewignore",
    );
    store.set_options(&["--exclude", "*.tmp", "--exclude=*.bak"]);
    store.mount().ok();
    store.snapshot("one");
    let files = [".rearviewignore", "b", "src", "src/a"];
    assert_eq!(shown(&store, "one")[1..], files);
    let (bytes, _) = history(&store);
    shell(&store.mnt, "echo 22 > target/x/o; echo 22 > src/a.tmp; echo 22 > target/y");
    kill_and_remount(&mut store);
    shell(&store.mnt, "echo 333 > target/x/o; echo 333 > target/new");
    kill_and_remount(&mut store);
    assert_eq!(history(&store).0, bytes);
    // Saved by a rename just before the end: it is a version all the same.
    shell(&store.mnt, "echo saved > src/a.tmp; sync src/a.tmp; mv src/a.tmp src/a");
    kill_and_remount(&mut store);
    store.snapshot("two");
    assert_eq!(shown(&store, "two")[1..], files);
    shell(&store.mnt, "echo later > src/a; echo 44 > b; rm -r target");
    assert_eq!(text(store.past("one").join("src/a")), "1\n");
    assert_eq!(text(store.past("two").join("src/a")), "saved\n");
    assert_eq!(text(store.past("two").join("b")), "1\n");
    // Without the option its files are taken up with their next change, those of the tree are not.
    store.unmount();
    store.set_options(&[]);
    store.mount().ok();
    shell(&store.mnt, "mkdir target; echo 5 > target/z; echo 5 > src/n.tmp; echo 5 > b.bak");
    store.snapshot("three");
    let three = shown(&store, "three");
    assert_eq!(three[1..], [".rearviewignore", "b", "b.bak", "src", "src/a", "src/n.tmp"]);
    store.finish();
}

#[test]
fn an_open_file_without_history_outlives_its_name() {
    let store = Mounted::with_options("allow_other,exclude=*.tmp");
    let before = history(&store).0;
    common::run::python(
        &store.mnt,
        r#"
import os
f = open("x.tmp", "w+b"); f.write(b"a" * 100000); f.flush(); os.fsync(f.fileno())
os.unlink("x.tmp")
f.seek(10); f.write(b"b" * 10); f.flush(); f.truncate(50000)
f.seek(0); assert f.read() == b"a" * 10 + b"b" * 10 + b"a" * 49980
assert os.fstat(f.fileno()).st_nlink == 0
r = open("y.tmp", "wb"); r.write(b"y" * 9); r.close(); r = open("y.tmp", "rb")
os.rename("y.tmp", "z.tmp"); open("y.tmp", "w").write("other"); os.replace("y.tmp", "z.tmp")
assert r.read() == b"y" * 9
"#,
    );
    assert_eq!(history(&store).0, before);
    store.finish();
}

#[test]
fn a_bad_pattern_is_refused_at_the_mount_and_told_of_in_a_file() {
    let mut store = Mounted::unmounted(1);
    for words in [&["--exclude", "[z"][..], &["-o", "exclude=a[b"]] {
        store.set_options(words);
        store.mount().fails(2, &["pattern", words[1].trim_start_matches("exclude=")]);
    }
    assert!(!store.is_mounted());
    fs::create_dir(store.backings[0].join("d")).unwrap();
    fs::write(store.backings[0].join("d/.rearviewignore"), "ok\n[broken\n").unwrap();
    fs::write(store.backings[0].join("d/ok"), "").unwrap();
    store.set_options(&["-f"]);
    let log = store.beside("log");
    let mut words: Vec<std::ffi::OsString> = vec!["mount".into(), "-f".into()];
    words.extend([store.backings[0].clone().into(), store.mnt.clone().into()]);
    let file = fs::File::create(&log).unwrap();
    let mut daemon = Command::new(common::run::binary()).args(words).stderr(file).spawn().unwrap();
    common::wait_until("it is mounted", 20, || store.is_mounted() && store.path("d/ok").exists());
    fs::write(store.path("d/.rearviewignore"), "\n\n[also\n").unwrap();
    fs::write(store.path("d/more"), "x").unwrap();
    common::run::rearview([std::ffi::OsString::from("umount"), store.mnt.clone().into()]).ok();
    assert!(daemon.wait().unwrap().success());
    let said = text(&log);
    for words in
        [["d/.rearviewignore", "line 2", "[broken"], ["d/.rearviewignore", "line 3", "[also"]]
    {
        let told = said.lines().any(|line| words.iter().all(|word| line.contains(word)));
        assert!(told, "{said}");
    }
}

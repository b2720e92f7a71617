//! Programs people live with work on the mount unchanged, and leave identical replicas.

mod common;

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use common::fixture::rich_tree;
use common::tree::{assert_same, assert_trees, read_tree};
use common::{Mounted, need, run, shell};

/// A stream for `git fast-import`: `commits` commits, each changing a few of 200 files.
fn history(commits: usize) -> String {
    let mut stream = String::new();
    for commit in 0..commits {
        let message = format!("commit {commit}");
        let _ = writeln!(stream, "commit refs/heads/main");
        let _ =
            writeln!(stream, "committer Test <test@example.org> {} +0000", 1_600_000_000 + commit);
        let _ = writeln!(stream, "data {}\n{message}", message.len());
        for part in 0..3 {
            let file = (commit * 7 + part * 31) % 200;
            let text = format!("file {file} as of commit {commit}\n").repeat(20 + commit % 50);
            let _ = writeln!(stream, "M 644 inline dir{}/file{file}.txt", file % 14);
            let _ = writeln!(stream, "data {}\n{text}", text.len());
        }
    }
    stream.push_str("done\n");
    stream
}

#[test]
fn git_clones_checks_and_packs_2000_commits() {
    need(&["git"]);
    let store = Mounted::new();
    let origin = store.beside("origin.git");
    shell(&store.beside(""), &format!("git init -q --bare -b main {origin:?}"));
    let mut import = Command::new("git")
        .args(["fast-import", "--quiet", "--done"])
        .current_dir(&origin)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    import.stdin.take().unwrap().write_all(history(2_000).as_bytes()).unwrap();
    assert!(import.wait().unwrap().success());
    let text = shell(
        &store.mnt,
        &format!(
            "export HOME=$PWD GIT_CONFIG_NOSYSTEM=1
             git clone -q --no-hardlinks {origin:?} clone
             cd clone
             git config user.email t@example.org; git config user.name t
             git config core.fsyncMethod fsync; git config core.fsync all
             git fsck --full --strict
             test -z \"$(git status --porcelain)\"
             git checkout -q HEAD~1000
             git checkout -q main
             echo more > dir0/new; git add -A; git commit -q -m more
             git repack -q -a -d -f
             git gc -q --aggressive --prune=now
             git fsck --full --strict
             test -z \"$(git status --porcelain)\"
             git rev-list --count HEAD"
        ),
    );
    assert_eq!(text.lines().last(), Some("2001"), "{text}");
    store.finish();
}

fn sqlite(folder: &Path, script: &str) -> String {
    // A writer that finds the database locked waits, as programs do.
    run(Command::new("sqlite3")
        .args(["-bail", "-cmd", ".timeout 60000", "db", script])
        .current_dir(folder))
    .ok()
}

fn concurrent_writers(journal: &str) {
    need(&["sqlite3"]);
    let store = Mounted::new();
    let folder = store.path("data");
    fs::create_dir(&folder).unwrap();
    sqlite(
        &folder,
        &format!(
            "PRAGMA journal_mode={journal}; CREATE TABLE t(writer INT, n INT, pad TEXT); \
             CREATE INDEX i ON t(n);"
        ),
    );
    std::thread::scope(|scope| {
        for writer in 0..4 {
            let folder = &folder;
            scope.spawn(move || {
                let mut script = String::new();
                for n in 0..40 {
                    let _ = write!(
                        script,
                        "BEGIN IMMEDIATE; \
                         INSERT INTO t VALUES({writer}, {n}, hex(randomblob(200))); \
                         UPDATE t SET pad = hex(randomblob(300)) WHERE n = {n} - 3; COMMIT;"
                    );
                }
                sqlite(folder, &script);
            });
        }
        for _ in 0..10 {
            sqlite(&folder, "SELECT count(*), sum(length(pad)) FROM t;");
        }
    });
    assert_eq!(sqlite(&folder, "SELECT count(*), count(DISTINCT writer) FROM t;"), "160|4\n");
    assert_eq!(sqlite(&folder, "PRAGMA integrity_check;"), "ok\n");
    // What a snapshot holds of it opens and is whole, too.
    store.snapshot("s");
    sqlite(&folder, "DELETE FROM t; VACUUM;");
    let out = store.beside("out");
    run(Command::new("cp").arg("-a").arg(store.past("s").join("data")).arg(&out)).ok();
    assert_eq!(sqlite(&out, "SELECT count(*) FROM t; PRAGMA integrity_check;"), "160\nok\n");
    store.finish();
}

#[test]
fn sqlite_with_a_write_ahead_log_survives_concurrent_writers() {
    concurrent_writers("WAL");
}

#[test]
fn sqlite_with_a_rollback_journal_survives_concurrent_writers() {
    concurrent_writers("DELETE");
}

#[test]
fn rsync_both_ways_leaves_nothing_to_transfer() {
    need(&["rsync"]);
    let store = Mounted::new();
    let outside = store.beside("outside");
    rich_tree(&outside);
    let rsync = |more: &[&str], from: &Path, to: &Path| {
        let mut from = from.to_owned().into_os_string();
        from.push("/");
        run(Command::new("rsync")
            .args(["-aHAXS", "--checksum", "--modify-window=-1"])
            .args(more)
            .arg(from)
            .arg(to))
        .ok()
    };
    let inside = store.path("inside");
    rsync(&[], &outside, &inside);
    assert_eq!(rsync(&["-n", "-i", "--delete"], &outside, &inside), "");
    assert_same("outside and inside", &outside, &inside);
    let back = store.beside("back");
    rsync(&[], &inside, &back);
    assert_eq!(rsync(&["-n", "-i", "--delete"], &inside, &back), "");
    assert_same("outside and back", &outside, &back);
    // In place, with temporary files renamed over the old, after changes.
    common::fixture::wreck(&outside);
    rsync(&["--delete"], &outside, &inside);
    assert_same("after changes", &outside, &inside);
    store.finish();
}

#[test]
fn tar_there_and_back_keeps_everything() {
    need(&["tar"]);
    let store = Mounted::new();
    let outside = store.beside("outside");
    rich_tree(&outside);
    let archive = store.path("archive.tar");
    let include = "--xattrs-include='user.*' --xattrs-include='trusted.*'";
    shell(&outside, &format!("tar --format=posix --xattrs {include} --acls -S -cf {archive:?} ."));
    shell(&store.mnt, &format!("mkdir out; tar --xattrs {include} --acls -C out -xpf {archive:?}"));
    assert_same("the unpacked tree", &outside, &store.path("out"));
    store.finish();
}

#[test]
fn cargo_builds_and_rebuilds_a_crate() {
    need(&["cargo"]);
    let store = Mounted::new();
    let project = store.path("hello");
    fs::create_dir_all(project.join("src")).unwrap();
    let manifest =
        "[package]\nname = \"hello\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[workspace]\n";
    fs::write(project.join("Cargo.toml"), manifest).unwrap();
    let main = "mod a;\nfn main() { println!(\"{}\", a::text()); }\n";
    fs::write(project.join("src/main.rs"), main).unwrap();
    let build = |text: &str| {
        let module = format!("pub fn text() -> &'static str {{ {text:?} }}\n");
        fs::write(project.join("src/a.rs"), module).unwrap();
        let mut cargo = Command::new("cargo");
        cargo.args(["run", "-q", "--offline"]).current_dir(&project);
        // Another cargo runs us: its settings are not this project's.
        cargo.env_remove("CARGO_TARGET_DIR").env_remove("RUSTFLAGS");
        run(&mut cargo).ok()
    };
    assert_eq!(build("one"), "one\n");
    store.snapshot("one");
    let was = read_tree(&store.mnt);
    assert_eq!(build("two"), "two\n");
    assert_trees("the snapshot of the build", &was, &read_tree(&store.past("one")));
    let old = store.past("one").join("hello/target/debug/hello");
    assert_eq!(run(&mut Command::new(old)).ok(), "one\n");
    store.finish();
}

#[test]
fn editors_that_save_by_rename_leave_the_old_version_in_history() {
    let store = Mounted::new();
    let script = "echo one > f; sed -i s/one/two/ f; cp f f~; echo three > .f.tmp; mv .f.tmp f";
    shell(&store.mnt, "echo zero > f");
    store.snapshot("s");
    shell(&store.mnt, script);
    assert_eq!(fs::read_to_string(store.path("f")).unwrap(), "three\n");
    assert_eq!(fs::read_to_string(store.past("s").join("f")).unwrap(), "zero\n");
    store.finish();
}

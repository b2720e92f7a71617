//! A purged path is in no snapshot, no version and no log any more, and everything else is as it
//! was: the live file, all other paths, and what is changed afterwards.

mod common;

use std::fs;
use std::path::Path;

use common::json::{parsed, texts};
use common::tree::{assert_trees, names_in, read_tree};
use common::{Mounted, run, shell};

/// Bytes that no codec makes smaller, so that they can be found wherever they lie.
fn noise(seed: u8, kibibytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; kibibytes << 10];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// The files of history on all backings, but for the catalogs, in which some of these bytes lie.
fn history_with(store: &Mounted, bytes: &[u8]) -> String {
    let pieces = bytes.chunks(64 << 10).map(|chunk| {
        let whole = |piece: &&[u8]| !piece.contains(&b'\n');
        let piece = chunk.windows(16).find(whole).expect("most have no line end");
        piece.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>()
    });
    let pattern = pieces.collect::<Vec<_>>().join("|");
    let mut grep = std::process::Command::new("grep");
    grep.env("LC_ALL", "C").args(["-rlaP", "--exclude=catalog*", &pattern]);
    run(grep.args(store.backings.iter().map(|backing| backing.join(".rearview")))).stdout
}

/// A store with a history of secrets between other things, and what two snapshots should show.
fn with_secrets() -> Mounted {
    let store = Mounted::new();
    shell(
        &store.mnt,
        r#"
mkdir -p docs old/deep
for i in 1 2 3; do seq $i 3000 > docs/other$i; done
echo "TOPSECRET one" > docs/secret; seq 20000 | sed s/^/TOPSECRET/ > old/deep/dump
echo x > old/x; cp docs/secret docs/copy
"#,
    );
    store.snapshot("one");
    shell(
        &store.mnt,
        r#"
echo "TOPSECRET two" > docs/secret; echo changed > docs/other1; printf X >> docs/other2
printf Y | dd of=old/deep/dump bs=1 seek=5000 conv=notrunc status=none
mv old/x docs/x
"#,
    );
    store.snapshot("two");
    shell(&store.mnt, "rm -r old; echo three > docs/secret; rm docs/other3");
    store
}

fn text(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The files below `.rearview` of a backing whose names show that contents lie in them whole, and
/// that contain the word.
fn preserved_with(backing: &Path, word: &str) -> String {
    let folder = backing.join(".rearview/preserved");
    let found = run(std::process::Command::new("grep").args(["-rl", word]).arg(folder));
    found.stdout
}

#[test]
fn what_is_purged_is_in_no_snapshot_and_all_else_is_as_it_was() {
    let mut store = with_secrets();
    let seen = fs::File::open(store.past("one").join("docs/other1")).unwrap();
    // Somebody stands in a directory, whose listing the kernel has in memory.
    let standing = fs::File::open(store.past("one").join("docs")).unwrap();
    assert!(names_in(&store.past("one").join("docs")).contains(&"secret".into()));
    let expected: Vec<_> = ["one", "two"]
        .iter()
        .map(|snapshot| {
            let mut tree = read_tree(&store.past(snapshot));
            tree.retain(|path, _| !path.starts_with("docs/secret") && !path.starts_with("old"));
            tree.remove(Path::new("docs/x"));
            tree
        })
        .collect();
    let live = read_tree(&store.mnt);
    let planned = store.rearview(&["purge", "-n", "docs/secret", "old"]).ok();
    for words in ["would purge", "old/deep/dump", "docs/secret", "stays as it is", "docs/x"] {
        assert!(planned.contains(words), "{words}: {planned}");
    }
    assert!(!planned.contains("docs/other") && !planned.contains("copy"), "{planned}");
    store.rearview(&["purge", "docs/secret", "old"]).fails(1, &["--yes", "-n"]);
    let before = parsed(store.rearview(&["status", "--json"]));
    let report = parsed(store.rearview(&["purge", "--yes", "--json", "docs/secret", "old"]));
    assert_eq!(report["done"], true);
    assert!(report["versions"].as_u64() >= Some(8), "{report}");
    assert_trees("live", &live, &read_tree(&store.mnt));
    for (snapshot, expected) in ["one", "two"].iter().zip(&expected) {
        let mut shown = read_tree(&store.past(snapshot));
        // The directories themselves are as they were, times and all, but for `old`.
        shown.remove(Path::new(""));
        let mut expected = expected.clone();
        expected.remove(Path::new(""));
        assert_trees(snapshot, &expected, &shown);
    }
    let after = parsed(store.rearview(&["status", "--json"]));
    let total = |status: &serde_json::Value, name: &str| status["totals"][name].as_u64();
    assert!(total(&after, "past_versions") < total(&before, "past_versions"));
    assert!(!store.path(".snapshots/.deleted/old").exists());
    // What the kernel had seen of it is no exception; what is open goes on.
    assert!(!store.past("one").join("docs/secret").exists());
    assert!(!store.past("one").join("old/deep/dump").exists());
    assert!(!names_in(&store.past("one").join("docs")).contains(&"secret".into()));
    drop(standing);
    assert!(std::io::read_to_string(seen).unwrap().starts_with("1\n"));
    assert_eq!(names_in(&store.path("docs/.snapshots/.versions/secret")).len(), 1);
    let log = store.rearview(&["log", "docs/secret"]).ok();
    assert!(log.contains("purged at") && log.contains("versions"), "{log}");
    assert_eq!(log.lines().filter(|line| line.contains("written")).count(), 0, "{log}");
    let log = store.rearview(&["log", "old/deep/dump"]).ok();
    assert!(log.contains("with old"), "{log}");
    for backing in &store.backings {
        assert_eq!(preserved_with(backing, "TOPSECRET two"), "");
    }
    // History goes on, for what was purged too.
    store.snapshot("three");
    shell(&store.mnt, "echo four > docs/secret; mkdir old; echo new > old/x; echo y > docs/x");
    store.snapshot("four");
    assert_eq!(text(store.past("three").join("docs/secret")), "three\n");
    assert_eq!(text(store.past("three").join("docs/x")), "x\n");
    store.remount();
    assert_eq!(text(store.past("three").join("docs/secret")), "three\n");
    assert_eq!(text(store.past("four").join("old/x")), "new\n");
    assert_eq!(text(store.past("one").join("docs/copy")), "TOPSECRET one\n");
    assert!(!store.past("two").join("docs/secret").exists());
    store.finish();
}

#[test]
fn a_held_snapshot_keeps_a_purge_away_until_it_is_said_to_go_too() {
    let store = with_secrets();
    store.rearview(&["snapshot", "hold", "two"]).ok();
    let planned = store.rearview(&["purge", "-n", "old"]).ok();
    assert!(planned.contains("held snapshots show it: two"), "{planned}");
    store.rearview(&["purge", "--yes", "old"]).fails(1, &["two", "--even-held"]);
    assert!(store.past("two").join("old/deep/dump").exists());
    store.rearview(&["purge", "--yes", "docs/never"]).fails(1, &["not in history"]);
    store.rearview(&["purge", "--yes", "."]).fails(1, &["root"]);
    store.rearview(&["purge", "--yes", "--even-held", "old"]).ok();
    assert!(!store.past("one").join("old").exists());
    store.finish();
}

#[test]
fn what_other_files_rely_on_stays_and_names_of_the_same_file_go() {
    let store = Mounted::new();
    shell(
        &store.mnt,
        "mkdir tmp; seq 5000 > a; ln a b; seq 7000 > c; mkdir tmp/project; echo 1 > tmp/project/f
         mv tmp/project project; echo 2 > project/later; echo mine > tmp/mine",
    );
    store.snapshot("one");
    shell(&store.mnt, "cp c c2; echo 2 > a; rm c; echo 3 > project/f; echo 3 > project/later");
    store.snapshot("two");
    let plan = parsed(store.rearview(&["purge", "-n", "--json", "b", "tmp"]));
    let paths = texts(&plan, "path");
    for path in ["a", "project", "tmp/project/f", "tmp/mine", "tmp/project", "b"] {
        assert!(paths.iter().any(|shown| shown == path), "{path} in {paths:?}");
    }
    assert!(!paths.iter().any(|path| path.contains("later")), "never lay there: {paths:?}");
    store.rearview(&["purge", "--yes", "b", "c", "tmp/mine"]).ok();
    let one = store.past("one");
    assert!(!one.join("a").exists() && !one.join("c").exists() && !one.join("b").exists());
    assert_eq!(text(one.join("project/f")), "1\n");
    assert_eq!(text(store.path("a")), "2\n");
    assert_eq!(text(store.past("two").join("c2")).lines().count(), 7000);
    shell(&store.mnt, "rm c2; echo 4 > b");
    assert_eq!(text(store.past("two").join("c2")).lines().count(), 7000);
    store.finish();
}

#[test]
fn a_purge_whose_files_cannot_be_removed_says_so_and_they_go_later() {
    let mut store = with_secrets();
    let kept = || store.backings.iter().map(|backing| preserved_with(backing, "TOPSECRET"));
    let files: Vec<String> = kept().collect::<String>().lines().map(String::from).collect();
    assert!(files.len() >= 4, "{files:?}");
    let immutable = |flag: &str| shell(&store.mnt, &format!("chattr {flag} {}", files.join(" ")));
    immutable("+i");
    let purge = ["purge", "--yes", "docs/secret", "old"];
    store.rearview(&purge).fails(1, &["preserved files cannot be removed", "rearview check"]);
    let status = store.rearview(&["status"]).ok();
    assert!(!status.contains("OFFLINE") && !status.contains("DEGRADED"), "{status}");
    assert_eq!(kept().collect::<String>().lines().count(), files.len());
    immutable("-i");
    store.unmount();
    for backing in &store.backings {
        assert_eq!(preserved_with(backing, "TOPSECRET"), "");
    }
    store.mount().ok();
    store.finish();
}

#[test]
fn the_bytes_of_what_is_purged_are_in_no_file_of_history_when_it_returns() {
    let mut store = Mounted::new();
    let marker = b"SECRETMARKER ".repeat(240 << 10);
    let (packed, gone, beside) = (noise(1, 2048), noise(2, 1024), noise(3, 1024));
    let other = noise(4, 2048);
    let files = [("marker", &marker), ("packed", &packed), ("gone", &gone), ("beside", &beside)];
    let around = [("first", noise(5, 256)), ("last", noise(6, 256))];
    fs::write(store.path("first"), &around[0].1).unwrap();
    for (name, bytes) in files.into_iter().chain([("other", &other)]) {
        fs::write(store.path(name), bytes).unwrap();
    }
    fs::write(store.path("last"), &around[1].1).unwrap();
    store.snapshot("s");
    let overwrite = |name: &str, kibibytes: usize| {
        let bytes = vec![b'n'; kibibytes << 10];
        let file = fs::OpenOptions::new().write(true).open(store.path(name)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
    };
    // Some of it is in packs, beside what stays.
    // In one stream with those of others.
    for name in ["packed", "first", "last"] {
        overwrite(name, 256);
    }
    shell(&store.mnt, "rm gone beside");
    store.rearview(&["prune"]).ok();
    let found = history_with(&store, &gone);
    assert!(found.contains("/packs/") && !found.contains("/preserved/"), "{found}");
    assert!(history_with(&store, &packed).contains("/packs/"));
    // And some in the segment that is appended to, beside what stays as well.
    overwrite("marker", 2048);
    overwrite("other", 1024);
    for bytes in [&marker, &other] {
        let found = history_with(&store, bytes);
        assert!(found.contains("/undo/"), "{found}");
    }
    let live = read_tree(&store.mnt);
    store.rearview(&["purge", "--yes", "marker", "packed", "gone"]).ok();
    for (name, bytes) in [("marker", &marker), ("packed", &packed), ("gone", &gone)] {
        assert_eq!(history_with(&store, bytes), "", "{name}");
    }
    assert_trees("live", &live, &read_tree(&store.mnt));
    let others_are_there = |store: &Mounted| {
        assert_eq!(names_in(&store.past("s")), ["beside", "first", "last", "other"]);
        for (name, bytes) in &around {
            assert!(fs::read(store.past("s").join(name)).unwrap() == *bytes, "{name}");
        }
        for (name, bytes) in [("beside", &beside), ("other", &other)] {
            assert!(fs::read(store.past("s").join(name)).unwrap() == *bytes, "{name}");
        }
    };
    others_are_there(&store);
    // What is overwritten next is history as ever.
    store.snapshot("t");
    overwrite("other", 2048);
    shell(&store.mnt, "echo later > marker");
    store.remount();
    others_are_there(&store);
    assert!(
        fs::read(store.past("t").join("marker")).unwrap()[2048 << 10..] == marker[2048 << 10..]
    );
    assert!(fs::read(store.past("t").join("other")).unwrap()[1024 << 10..] == other[1024 << 10..]);
    store.finish();
}

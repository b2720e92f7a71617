//! Who changed what: the log names the process, and what one program did is taken back.

mod common;

use std::fs;
use std::path::Path;

use common::json::{all, parsed, texts};
use common::run::python;
use common::tree::{assert_trees, read_tree};
use common::{Mounted, need, shell};

/// Runs a program of the given name in the mount.
#[track_caller]
fn script_named(store: &Mounted, name: &str, program: &str) {
    let named = format!("open('/proc/self/comm', 'w').write('{name}')");
    python(&store.mnt, &format!("import os, shutil\n{named}\n{program}"));
}

fn words<'a>(by: &'a str, since: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut words = vec!["undo", "--by", by, "--since", since];
    words.extend(more);
    words
}

/// A time after all that was done so far.
fn now(store: &Mounted, name: &'static str) -> &'static str {
    store.snapshot(name);
    name
}

#[test]
fn the_log_names_the_process_and_the_user() {
    need(&["python3"]);
    let store = Mounted::new();
    shell(&store.mnt, "echo one > f");
    python(&store.mnt, "open('f', 'a').write('two')");
    shell(&store.mnt, "chmod 600 f; mv f g; cat g > by-cat; sort g > by-sort");
    shell(&store.mnt, "cp g copy; (cat g; cat g) >> copy; truncate -s 3 copy; rm copy");
    let events = |path: &str| -> Vec<(String, String)> {
        let value = parsed(store.rearview(&["log", "--json", path]));
        let entries = value["entries"].as_array().unwrap().clone();
        let event = |entry: &serde_json::Value| {
            let events = entry["events"].as_array().unwrap();
            let events: Vec<_> = events.iter().filter_map(|one| one.as_str()).collect();
            let by = entry["by"]["command"].as_str().unwrap_or("-").to_owned();
            (events.join(","), by)
        };
        entries.iter().map(event).collect()
    };
    let told = events("g");
    let expected =
        [("created", "bash"), ("written", "python3"), ("mode", "chmod"), ("renamed", "mv")];
    for (event, by) in expected {
        assert!(told.contains(&(event.into(), by.into())), "{event} by {by}: {told:?}");
    }
    // The shell makes the file. What the program writes is one version with that, unless a commit,
    // of which there are four a second, comes between the two.
    for (path, by) in [("by-cat", "cat"), ("by-sort", "sort")] {
        let told = events(path);
        let (whole, parted) = ([("created", by)], [("created", "bash"), ("written", by)]);
        let is = |expected: &[(&str, &str)]| {
            told.iter().map(|(event, by)| (&event[..], &by[..])).eq(expected.iter().copied())
        };
        assert!(is(&whole) || is(&parted), "{path}: {told:?}");
    }
    let copy = events("copy");
    assert_eq!(copy[0], ("created".into(), "cp".into()));
    assert_eq!(copy[copy.len() - 2], ("written".into(), "truncate".into()), "{copy:?}");
    assert_eq!(copy[copy.len() - 1], ("removed".into(), "rm".into()));
    let text = store.rearview(&["log", "g"]).ok();
    assert!(text.contains("mv[") && text.contains("] root"), "{text}");
    for (by, count) in [("mv", 1), ("python3", 1), ("user:root", 4), ("uid:12345", 0)] {
        let filtered = parsed(store.rearview(&["log", "--json", "--by", by, "g"]));
        assert_eq!(all(&filtered, "generation").len(), count, "{by}: {filtered}");
    }
    store.rearview(&["log", "--by", "user:nobody-at-all", "g"]).fails(1, &["no user"]);
    store.finish();
}

#[test]
fn a_thread_is_named_by_its_process_and_a_map_by_who_opened_it() {
    need(&["python3"]);
    let store = Mounted::new();
    python(
        &store.mnt,
        "import mmap, threading\n\
         def work():\n    open('by-thread', 'w').write('x')\n\
         t = threading.Thread(target=work); t.start(); t.join()\n\
         f = open('mapped', 'w+b'); f.truncate(4096); f.close()\n\
         f = open('mapped', 'r+b'); m = mmap.mmap(f.fileno(), 4096); m[0] = 65; m.flush()",
    );
    for path in ["by-thread", "mapped"] {
        let value = parsed(store.rearview(&["log", "--json", path]));
        let commands = texts(&value, "command");
        assert!(!commands.is_empty(), "{value}");
        assert!(commands.iter().all(|one| one == "python3"), "{value}");
    }
    store.finish();
}

/// What a bad script finds, made by others.
const BEFORE: &str = "\
mkdir -p docs/deep/er src gone/sub names
echo one > docs/a; echo two > docs/b; echo 3 > docs/deep/er/c
echo int > src/main.c; echo leaf > gone/sub/leaf; ln docs/a docs/a-link; ln -s docs/a link
echo x > names/x; echo y > names/y; echo z > names/z; setfattr -n user.k -v v docs/b
chmod 640 docs/b; echo keep > untouched; mkdir moved; echo in > moved/in; mkfifo pipe";
/// What it does: edits, creates, deletes, renames, replaces, in circles and across directories.
const BAD: &str = "
open('docs/a', 'w').write('BAD')
open('docs/b', 'a').write('more')
os.chmod('docs/b', 0o777)
os.makedirs('made/by/script'); open('made/by/script/f', 'w').write('new'); open('made/g', 'w')
shutil.rmtree('gone')
os.remove('link'); os.remove('pipe')
os.rename('names/x', 'names/t'); os.rename('names/y', 'names/x'); os.rename('names/t', 'names/y')
open('names/.z', 'w').write('by a temporary file'); os.rename('names/.z', 'names/z')
os.rename('moved', 'src/moved-here'); open('src/moved-here/in', 'w').write('BAD')
os.rename('docs/deep', 'deep'); os.rename('src/main.c', 'made/main.c')
open('fleeting', 'w').write('x'); os.remove('fleeting')
os.chmod('src', 0o700)
os.remove('untouched'); os.mkdir('untouched')
";

#[test]
fn what_a_bad_script_did_is_taken_back_and_nothing_else() {
    need(&["python3", "setfattr"]);
    let store = Mounted::new();
    shell(&store.mnt, BEFORE);
    let before = read_tree(&store.mnt);
    let since = now(&store, "before");
    script_named(&store, "bad-script", BAD);
    let after = read_tree(&store.mnt);
    assert!(before != after);
    // -n tells and does nothing.
    let told = store.rearview(&words("bad-script", since, &["-n"])).ok();
    for line in ["would restore docs/a", "would remove made/g", "would bring back gone"] {
        assert!(told.contains(line), "{line}: {told}");
    }
    assert!(told.lines().any(|line| line.starts_with("would rename src/moved-here -> moved")));
    assert_trees("after -n", &after, &read_tree(&store.mnt));
    // Nobody of that name, nothing to do.
    let none = store.rearview(&words("nobody", since, &[])).ok();
    assert!(none.contains("nothing to take back"), "{none}");
    let done = store.rearview(&words("bad-script", since, &[])).ok();
    assert!(done.contains("restored docs/a"), "{done}");
    assert_trees("after the undo", &before, &read_tree(&store.mnt));
    let again = store.rearview(&words("bad-script", since, &[])).ok();
    assert!(again.contains("nothing to take back"), "{again}");
    let list = store.rearview(&["snapshot", "list"]).ok();
    assert!(!list.contains("undo-"), "{list}");
    // The undo itself can be undone.
    let since = now(&store, "after-undo");
    let _ = since;
    store.rearview(&words("rearview", "before", &[])).ok();
    let mut twice = read_tree(&store.mnt);
    let mut wanted = after.clone();
    // Times of what was written anew differ by nothing; the directories' follow their entries.
    for tree in [&mut twice, &mut wanted] {
        tree.values_mut().filter(|one| one.kind == "dir").for_each(|one| one.mtime = (0, 0));
    }
    assert_trees("after the undo of the undo", &wanted, &twice);
    store.finish();
}

#[test]
fn what_others_changed_since_is_left_unless_forced() {
    need(&["python3"]);
    let store = Mounted::new();
    shell(&store.mnt, "mkdir d; echo 1 > mine; echo 1 > both; echo 1 > d/gone; echo 1 > moved");
    let before = read_tree(&store.mnt);
    let since = now(&store, "before");
    script_named(
        &store,
        "bad-script",
        "for name in ['mine', 'both', 'moved']:\n    open(name, 'a').write('bad')\n\
         os.mkdir('new'); open('new/f', 'w').write('x'); os.remove('d/gone')",
    );
    shell(&store.mnt, "echo good >> both; echo mine > new/other; mv moved away; echo new > d/gone");
    let after = read_tree(&store.mnt);
    let refused = store.rearview(&words("bad-script", since, &["-n", "--json"]));
    assert_eq!(refused.code, 3, "{}", refused.told());
    assert_trees("after -n", &after, &read_tree(&store.mnt));
    let done = store.rearview(&words("bad-script", since, &[])).fails(
        3,
        &["both: changed since by bash[", "d/gone: changed since", "moved: changed since", "new: "],
    );
    assert!(done.stdout.contains("restored mine"), "{}", done.told());
    assert_eq!(fs::read(store.path("mine")).unwrap(), b"1\n");
    assert_eq!(fs::read(store.path("both")).unwrap(), b"1\nbadgood\n");
    assert_eq!(fs::read(store.path("new/other")).unwrap(), b"mine\n");
    assert!(!store.path("new/f").exists());
    let only = store.rearview(&words("bad-script", since, &[])).fails(1, &["both"]);
    assert!(only.stdout.is_empty(), "{}", only.told());
    fs::remove_file(store.path("new/other")).unwrap();
    store.rearview(&words("bad-script", since, &["--force"])).ok();
    let mut now = read_tree(&store.mnt);
    assert_eq!(now.remove(Path::new("away")).map(|one| one.kind), Some("file"));
    let mut wanted = before;
    for tree in [&mut now, &mut wanted] {
        tree.values_mut().filter(|one| one.kind == "dir").for_each(|one| one.mtime = (0, 0));
    }
    assert_trees("after --force", &wanted, &now);
    store.finish();
}

#[test]
fn an_undo_keeps_to_its_path_and_needs_the_mount() {
    need(&["python3"]);
    let mut store = Mounted::new();
    shell(&store.mnt, "mkdir a b; echo 1 > a/f; echo 1 > b/f");
    now(&store, "before");
    script_named(&store, "bad-script", "open('a/f', 'w'); open('b/f', 'w')");
    store.rearview(&["undo", "a", "--by", "bad-script", "--since", "10d"]).ok();
    assert_eq!(fs::read(store.path("a/f")).unwrap(), b"1\n");
    assert_eq!(fs::read(store.path("b/f")).unwrap(), b"");
    store.rearview(&["undo", "--by", "x", "--since", "nonsense"]).fails(1, &["no snapshot"]);
    store.rearview(&["undo", "--by", "x"]).fails(2, &["--since"]);
    store.unmount();
    let backing = store.backings[0].to_str().unwrap().to_owned();
    let words = ["undo", backing.as_str(), "--by", "bad-script", "--since", "10d"];
    store.rearview(&words).fails(10, &["rearview mount"]);
    // Who made it is known without a mount as well.
    let file = format!("{backing}/b/f");
    assert!(store.rearview(&["log", &file]).ok().contains("bad-script["));
    store.mount().ok();
    store.finish();
}

#[test]
fn what_one_program_made_and_deleted_again_is_not_packed() {
    need(&["python3"]);
    let store = Mounted::new();
    let noise = "open('journal', 'wb').write(os.urandom(300000)); os.remove('journal')";
    python(&store.mnt, &format!("import os\n{noise}"));
    shell(&store.mnt, "head -c 1000 /dev/urandom > by-hand; rm by-hand");
    assert!(store.path(".snapshots/.deleted/journal").exists(), "until it would be packed");
    store.rearview(&["prune"]).ok();
    let status = parsed(store.rearview(&["status", "--json"]));
    assert_eq!(all(&status, "preserved_bytes")[0], 0, "{status}");
    let packed = all(&status, "packed_bytes")[0].as_u64().unwrap();
    assert!((1000..20_000).contains(&packed), "{status}");
    assert!(!store.path(".snapshots/.deleted/journal").exists());
    let kept = fs::read(store.path(".snapshots/.deleted/by-hand")).unwrap();
    assert_eq!(kept.len(), 1000);
    store.rearview(&["log", "journal"]).fails(1, &["never was"]);
    store.finish();
}

#[test]
fn what_is_renamed_and_saved_again_unchanged_costs_no_bytes() {
    need(&["python3"]);
    let store = Mounted::new();
    fs::write(store.path("1.jpg"), vec![7; 100_000]).unwrap();
    store.snapshot("s1");
    for step in 1..4 {
        let (old, new) = (format!("{step}.jpg"), format!("{}.jpg", step + 1));
        let save = format!("cp {new} saved~; sync; mv saved~ {new}");
        shell(&store.mnt, &format!("mv {old} {new}; {save}"));
        store.snapshot(&format!("s{}", step + 1));
    }
    store.rearview(&["prune"]).ok();
    let status = parsed(store.rearview(&["status", "--json"]));
    for places in ["packed_bytes", "preserved_bytes", "undo_bytes"] {
        assert_eq!(all(&status, places)[0], 0, "{status}");
    }
    for step in 1..4 {
        let past = fs::read(store.past(&format!("s{step}")).join(format!("{step}.jpg"))).unwrap();
        assert_eq!(past, vec![7; 100_000]);
    }
    store.finish();
}

//! Each rule and the text by which it is refused.

use super::*;

/// The refusal's text has all these words, and nothing was made or changed.
fn refused(result: Result<Store>, words: &[&str]) -> Error {
    let error = result.err().expect("it must be refused");
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "'{word}' is missing in: {text}");
    }
    error
}

#[test]
fn no_backing_and_too_many() {
    let bench = Bench::new();
    refused(bench.open(&[]), &["1 to 8"]);
    refused(bench.open(&["1", "2", "3", "4", "5", "6", "7", "8", "9"]), &["1 to 8", "9 are given"]);
}

#[test]
fn the_same_directory_twice() {
    let bench = Bench::new();
    fs::create_dir(bench.path("a")).unwrap();
    symlink(bench.path("a"), bench.path("l")).unwrap();
    refused(bench.open(&["a", "a"]), &["same directory"]);
    refused(bench.open(&["a", "l"]), &["same directory"]);
    refused(bench.open(&["x", "x"]), &["same directory"]);
    assert!(!bench.path("a/.rearview").exists() && !bench.path("x").exists());
}

#[test]
fn one_backing_inside_another() {
    let bench = Bench::new();
    fs::create_dir_all(bench.path("a/deep")).unwrap();
    refused(bench.open(&["a", "a/deep"]), &["inside", "/a/deep"]);
    refused(bench.open(&["a/deep/new", "a"]), &["inside", "/a/deep/new"]);
}

#[test]
fn what_is_no_directory_or_not_there() {
    let bench = Bench::new();
    fs::write(bench.path("file"), b"").unwrap();
    refused(bench.open(&["file"]), &["not a directory", "/file"]);
    refused(bench.open(&["no/such"]), &["no/such", "is its disk mounted"]);
    symlink("gone", bench.path("dangling")).unwrap();
    refused(bench.open(&["dangling"]), &["leads nowhere"]);
}

#[test]
fn another_store() {
    let bench = Bench::new();
    bench.settle(&["a"]);
    bench.settle(&["b"]);
    refused(bench.open(&["a", "b"]), &["another store", "/a", "/b"]);
}

#[test]
fn a_plain_copy_of_a_replica() {
    let bench = Bench::new();
    bench.settle(&["a"]);
    fs::create_dir_all(bench.path("b/.rearview")).unwrap();
    fs::copy(bench.path("a/.rearview/store.toml"), bench.path("b/.rearview/store.toml")).unwrap();
    refused(bench.open(&["a", "b"]), &["plain copy", "/a", "/b"]);
}

#[test]
fn two_with_different_files() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"1");
    write(&bench.path("b/f"), b"22");
    refused(bench.open(&["a", "b"]), &["differ", "neither", "/a", "/b"]);
    assert!(!bench.path("a/.rearview").exists() && !bench.path("b/.rearview").exists());
}

#[test]
fn two_with_equal_files_are_adopted() {
    let bench = Bench::new();
    write(&bench.path("a/d/f"), b"1");
    write(&bench.path("b/d/f"), b"1");
    let modified = fs::metadata(bench.path("a/d/f")).unwrap().modified().unwrap();
    let times = fs::FileTimes::new().set_modified(modified);
    fs::File::options().write(true).open(bench.path("b/d/f")).unwrap().set_times(times).unwrap();
    bench.settle(&["a", "b"]);
}

#[test]
fn a_disk_that_is_not_mounted() {
    let bench = Bench::new();
    bench.settle(&["a", "b"]);
    fs::rename(bench.path("b"), bench.path("b-elsewhere")).unwrap();
    refused(bench.open(&["a", "b"]), &["is its disk mounted", "'b'", "/b "]);
    assert!(!bench.path("b").exists(), "a mountpoint is not made");
    fs::create_dir(bench.path("b")).unwrap();
    refused(bench.open(&["a", "b"]), &["is its disk mounted"]);
    write(&bench.path("b/f"), b"");
    refused(bench.open(&["b", "a"]), &["is its disk mounted"]);
    // Known by its identity wherever it is mounted.
    bench.settle(&["a", "b-elsewhere"]);
}

#[test]
fn files_where_an_empty_directory_is_needed() {
    let bench = Bench::new();
    bench.settle(&["a"]);
    write(&bench.path("b/f"), b"");
    refused(bench.open(&["a", "b"]), &["has files", "empty directory", "/b"]);
}

#[test]
fn a_store_in_use() {
    let bench = Bench::new();
    let options = OpenOptions { mountpoint: Some("/mnt/x".into()), ..OpenOptions::default() };
    let silent = Progress::silent();
    let store = open_with(&bench.paths(&["a", "b"]), &options, &silent).unwrap();
    let error = refused(bench.open(&["b"]), &["in use", "/mnt/x", "umount"]);
    assert!(matches!(error, Error::InUse(_)));
    let info = inspect(&bench.path("a")).unwrap();
    assert_eq!(info.owner.unwrap().pid, std::process::id());
    store.close().unwrap();
    drop(store);
    bench.settle(&["a", "b"]);
}

#[test]
fn init_on_a_store() {
    let bench = Bench::new();
    let init = OpenOptions { init: true, ..OpenOptions::default() };
    let silent = Progress::silent();
    let store = open_with(&bench.paths(&["a"]), &init, &silent).unwrap();
    store.close().unwrap();
    drop(store);
    refused(open_with(&bench.paths(&["a"]), &init, &silent), &["already holds a store", "--init"]);
}

#[test]
fn a_newer_format_and_a_damaged_marker() {
    let bench = Bench::new();
    bench.settle(&["a"]);
    let marker = bench.path("a/.rearview/store.toml");
    let text = fs::read_to_string(&marker).unwrap();
    fs::write(&marker, text.replace("format = 1", "format = 9")).unwrap();
    refused(bench.open(&["a"]), &["newer format 9", "/a/.rearview/store.toml"]);
    fs::write(&marker, &text[..text.len() / 2]).unwrap();
    let error = refused(bench.open(&["a"]), &["store.toml", "damaged"]);
    assert!(matches!(error, Error::Damaged { .. }));
    fs::remove_file(&marker).unwrap();
    refused(bench.open(&["a"]), &["missing", "catalog.db"]);
    fs::write(&marker, text).unwrap();
    bench.settle(&["a"]);
}

#[test]
fn two_that_changed_separately() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"x");
    bench.settle(&["a", "b"]);
    for name in ["a", "b"] {
        let store = bench.open(&[name]).unwrap();
        let mut row = store.catalog.node(id_of(&store.catalog, "f")).unwrap().unwrap();
        row.mode = 0o400;
        store.catalog.push(vec![crate::catalog::Change::NodePut(row)]).unwrap();
        store.close().unwrap();
    }
    refused(bench.open(&["a", "b"]), &["used separately", "/a", "/b", "Nothing was touched"]);
    assert!(bench.open(&["b"]).is_ok());
}

#[test]
fn a_backing_that_cannot_be_written() {
    let bench = Bench::new();
    fs::create_dir(bench.path("a")).unwrap();
    if is_root() {
        // Root may write anywhere; /proc is a directory that nobody can.
        let silent = Progress::silent();
        let result = open_with(&["/proc/self".into()], &OpenOptions::default(), &silent);
        refused(result, &["/proc/"]);
    } else {
        fs::set_permissions(bench.path("a"), fs::Permissions::from_mode(0o500)).unwrap();
        refused(bench.open(&["a"]), &["/a", "denied"]);
    }
}

#[test]
fn fewer_backings_than_known_go_on_degraded() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"x");
    bench.settle(&["a", "b", "c"]);
    let store = bench.open(&["c", "a"]).unwrap();
    assert_eq!(store.replicas.ids().count(), 2);
    let marker = Marker::read(&Site::open(&bench.path("a")).unwrap()).unwrap().unwrap();
    let absent = marker.peers.iter().find(|peer| peer.label == "b").unwrap();
    assert_eq!(absent.state, PeerState::Stale, "noted before the first write");
}

#[test]
fn with_init_an_empty_directory_takes_the_place_of_a_replica_that_is_gone() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"x");
    bench.settle(&["a", "b"]);
    fs::rename(bench.path("b"), bench.path("old")).unwrap();
    fs::create_dir(bench.path("b")).unwrap();
    refused(bench.open(&["a", "b"]), &["is its disk mounted", "--init"]);
    let init = OpenOptions { init: true, ..OpenOptions::default() };
    let store = open_with(&bench.paths(&["a", "b"]), &init, &Progress::silent()).unwrap();
    store.close().unwrap();
    drop(store);
    bench.assert_equal(&["a", "b"]);
    for name in ["a", "b"] {
        let marker = inspect(&bench.path(name)).unwrap().marker;
        assert_eq!(marker.peers.len(), 1, "the old one is forgotten by {name}");
        assert_eq!(marker.peers[0].state, PeerState::Ok);
    }
    // Without `init`, and with it only where something is missing.
    bench.settle(&["a", "b"]);
    refused(open_with(&bench.paths(&["a", "b"]), &init, &Progress::silent()), &["already holds"]);
    // The old one comes back: it is behind, whatever it says, and never the winner.
    bench.settle(&["old", "a", "b"]);
}

#[test]
fn a_mount_that_fails_leaves_clean_backings_clean() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"x");
    bench.settle(&["a", "b"]);
    // The marker of `b` cannot be written: its successor's name is taken.
    let spare = bench.path("b/.rearview/store.toml.new");
    fs::remove_file(&spare).unwrap();
    fs::create_dir(&spare).unwrap();
    assert!(bench.open(&["a", "b"]).is_err());
    for name in ["a", "b"] {
        assert!(inspect(&bench.path(name)).unwrap().clean, "{name}");
    }
    fs::remove_dir(&spare).unwrap();
    let in_use = bench.open(&["a"]).unwrap();
    refused(bench.open(&["b", "a"]), &["in use"]);
    assert!(inspect(&bench.path("b")).unwrap().clean);
    in_use.close().unwrap();
    drop(in_use);
    bench.settle(&["a", "b"]);
}

//! Interrupted at every step, the next mount gives an equal result.

use super::*;

#[test]
fn adoption_and_fill_can_be_stopped_anywhere() {
    let mut stops = 0;
    // Every early step, then every fifth: a different one of a file's steps each time.
    for number in (1..12).chain((12..).step_by(5)) {
        let bench = Bench::new();
        fs::create_dir(bench.path("a")).unwrap();
        make_tree(&bench.path("a"));
        let paths = bench.paths(&["a", "b"]);
        match open_with(&paths, &OpenOptions::default(), &stopping_at(number)) {
            Err(Error::Interrupted) => stops += 1,
            Err(error) => panic!("stopped at {number}: {error}"),
            Ok(_) => break,
        }
        let store = bench.open(&["a", "b"]).unwrap_or_else(|error| panic!("{number}: {error}"));
        assert_recorded(&store.catalog, &bench.path("a"));
        store.close().unwrap();
        drop(store);
        bench.assert_equal(&["a", "b"]);
        assert_eq!(fs::read_dir(bench.path("b/.rearview/tmp")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(bench.path("b/.rearview/quarantine")).unwrap().count(), 0);
    }
    assert!(stops > 15, "{stops}");
}

#[test]
fn a_resync_can_be_stopped_anywhere_and_the_copy_is_not_used_alone() {
    for number in 1.. {
        let bench = Bench::new();
        write(&bench.path("a/f"), b"one");
        write(&bench.path("a/g"), b"two");
        bench.settle(&["a", "b"]);
        drop(bench.open(&["a"]).unwrap());
        bench.lose_logs();
        write(&bench.path("a/f"), b"changed");
        fs::remove_file(bench.path("a/g")).unwrap();
        let paths = bench.paths(&["a", "b"]);
        match open_with(&paths, &OpenOptions::default(), &stopping_at(number)) {
            Err(Error::Interrupted) => {}
            Err(error) => panic!("stopped at {number}: {error}"),
            Ok(_) => {
                assert!(number > 3);
                break;
            }
        }
        if inspect(&bench.path("b")).unwrap().marker.phase == Phase::Filling {
            let error = bench.open(&["b"]).err().unwrap();
            assert!(error.to_string().contains("not a whole copy"), "{error}");
        }
        bench.settle(&["a", "b"]);
        assert_eq!(fs::read(bench.path("b/f")).unwrap(), b"changed");
        assert!(!bench.path("b/g").exists());
    }
}

#[test]
fn a_creation_that_died_between_two_markers_goes_on() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"one");
    let candidates =
        identify::look_all(&bench.paths(&["a", "b"]), false, &Between::default()).unwrap().0;
    let members = create(&candidates, 0, &OpenOptions::default()).unwrap();
    drop(members);
    fs::remove_file(bench.path("b/.rearview/store.toml")).unwrap();
    bench.settle(&["a", "b"]);
}

#[test]
fn markers_alone_are_enough_to_go_on() {
    let bench = Bench::new();
    write(&bench.path("a/f"), b"one");
    let candidates =
        identify::look_all(&bench.paths(&["a", "b"]), false, &Between::default()).unwrap().0;
    drop(create(&candidates, 0, &OpenOptions::default()).unwrap());
    let options = OpenOptions { init: true, ..OpenOptions::default() };
    let store = open_with(&bench.paths(&["a", "b"]), &options, &Progress::silent()).unwrap();
    store.close().unwrap();
    drop(store);
    bench.assert_equal(&["a", "b"]);
}

//! Backings that hang while a store is opened.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use rustix::io::Errno;

use super::*;
use crate::replica::faulty::{Call, Faulty, Injected};
use crate::replica::intent::Dirty;

/// Short enough to wait for, long enough for a busy machine to make a call that does not hang.
const TIMEOUT: Duration = Duration::from_millis(300);
/// What meets one that hangs has ended by then.
const BOUND: Duration = Duration::from_secs(10);

/// Options by which the backing at `bad` hangs in the call of this name, or before any, until the
/// sender is dropped.
fn hanging(bad: PathBuf, op: Option<&'static str>) -> (OpenOptions, Sender<()>) {
    let (go_on, resume) = unbounded();
    let wait = |resume: &Receiver<()>| {
        let _ = resume.recv();
    };
    let between = Between::new(move |path, inner| {
        let resume = resume.clone();
        match op {
            _ if path != bad => inner,
            None => {
                wait(&resume);
                inner
            }
            Some(op) => Box::new(Faulty::new(
                inner,
                Arc::new(move |call: Call<'_>| {
                    (call.op == op).then(|| wait(&resume)).map(|()| Injected::Delay(Duration::ZERO))
                }),
            )),
        }
    });
    let between = between.with_timeout(TIMEOUT);
    (OpenOptions { between, resync_later: true, ..OpenOptions::default() }, go_on)
}

#[test]
fn a_backing_that_hangs_is_left_out_in_time_and_taken_in_when_it_answers() {
    for op in [None, Some("read_at"), Some("mkdir"), Some("sync"), Some("write_at")] {
        for bad in ["a", "b"] {
            let bench = Bench::in_memory();
            write(&bench.path("a/file"), b"content");
            bench.settle(&["a", "b"]);
            let (options, go_on) = hanging(bench.path(bad), op);
            let begun = Instant::now();
            let paths = bench.paths(&["a", "b"]);
            let store = open_with(&paths, &options, &Progress::silent()).unwrap();
            assert!(begun.elapsed() < BOUND, "{op:?}: {:?}", begun.elapsed());
            assert_eq!(store.silent(), [bench.path(bad)], "{op:?}");
            assert_eq!(store.replicas.ids().count(), 1);
            let marker = store.current_marker().unwrap();
            assert_eq!(marker.peers.len(), 1);
            assert_eq!(marker.peers[0].state, PeerState::Stale);
            let reason = &marker.peers[0].reason;
            assert!(reason.contains("did not answer within 0.3 s, as of 20"), "{reason}");
            // It is still looked at in time, and not taken in.
            let begun = Instant::now();
            assert_eq!(store.spoke(&bench.path(bad)).unwrap_err().to_errno(), Errno::TIMEDOUT);
            assert!(begun.elapsed() < BOUND, "{op:?}: {:?}", begun.elapsed());
            assert_eq!(store.silent(), [bench.path(bad)]);
            drop(go_on);
            store.spoke(&bench.path(bad)).unwrap();
            assert_eq!(store.silent(), [] as [PathBuf; 0]);
            assert_eq!(store.waiting().len(), 1, "it waits for its resync");
            store.close().unwrap();
            drop(store);
            bench.settle(&["a", "b"]);
        }
    }
}

#[test]
fn no_store_is_made_without_a_backing_that_hangs() {
    let bench = Bench::in_memory();
    write(&bench.path("a/file"), b"content");
    fs::create_dir(bench.path("b")).unwrap();
    let (options, _go_on) = hanging(bench.path("b"), None);
    for names in [&["a", "b"][..], &["b"]] {
        let refused = open_with(&bench.paths(names), &options, &Progress::silent());
        let Err(Error::Refused(text)) = refused else { panic!("it is not refused") };
        assert!(text.contains("did not answer within 0.3 s"), "{text}");
    }
    assert!(!bench.path("a/.rearview").exists());
}

#[test]
fn what_is_known_not_to_answer_is_not_looked_at() {
    let bench = Bench::in_memory();
    bench.settle(&["a", "b"]);
    let (options, _go_on) = hanging(bench.path("b"), None);
    let options = OpenOptions { silent: bench.paths(&["b"]), ..options };
    let begun = Instant::now();
    let store = open_with(&bench.paths(&["a", "b"]), &options, &Progress::silent()).unwrap();
    assert!(begun.elapsed() < TIMEOUT * 3, "{:?}", begun.elapsed());
    assert_eq!(store.silent(), bench.paths(&["b"]));
    store.close().unwrap();
}

/// Options by which the backing at `bad` hangs from its call of this number on, until the sender is
/// dropped; and the count of its calls.
fn hanging_from(bad: PathBuf, number: u64) -> (OpenOptions, Arc<AtomicU64>, Sender<()>) {
    let (go_on, resume) = unbounded::<()>();
    let count = Arc::new(AtomicU64::new(0));
    let counted = count.clone();
    let between = Between::new(move |path, inner| {
        if path != bad {
            return inner;
        }
        let (resume, counted) = (resume.clone(), counted.clone());
        let plan = move |_: Call<'_>| {
            if counted.fetch_add(1, Ordering::SeqCst) >= number {
                let _ = resume.recv();
            }
            None
        };
        Box::new(Faulty::new(inner, Arc::new(plan)))
    });
    let between = between.with_timeout(TIMEOUT);
    (OpenOptions { between, ..OpenOptions::default() }, count, go_on)
}

/// Hangs at some calls of a mount of what `prepare` makes, from the first to the last, each time
/// with a store of its own: the mount is over in time, without the backing that is bad, and all is
/// well when that answers.
fn hangs_anywhere(bad: &str, prepare: impl Fn(&Bench) + Sync) {
    const POINTS: u64 = 12;
    let paths = |bench: &Bench| bench.paths(&["a", "b"]);
    let all = {
        let bench = Bench::in_memory();
        prepare(&bench);
        let (options, count, _go_on) = hanging_from(bench.path(bad), u64::MAX);
        let store = open_with(&paths(&bench), &options, &Progress::silent()).unwrap();
        store.close().unwrap();
        count.load(Ordering::SeqCst)
    };
    let try_at = |number: u64| {
        let bench = Bench::in_memory();
        prepare(&bench);
        let (options, _, go_on) = hanging_from(bench.path(bad), number);
        let begun = Instant::now();
        let opened = open_with(&paths(&bench), &options, &Progress::silent());
        assert!(begun.elapsed() < BOUND, "call {number} of {all}: {:?}", begun.elapsed());
        match opened {
            Ok(store) => {
                let fell = store.silent() == [bench.path(bad)];
                // Its last calls are those of the end.
                assert!(fell || number > all / 2, "call {number} of {all}");
                store.close().unwrap();
            }
            // The other was being made equal to it.
            Err(error) => {
                let (text, bad_path) = (error.to_string(), bench.path(bad));
                let told = text.starts_with(&*bad_path.to_string_lossy());
                assert!(bad == "a" && told && text.contains("not a whole copy"), "{text}");
            }
        }
        assert!(begun.elapsed() < BOUND, "call {number} of {all}: {:?}", begun.elapsed());
        drop(go_on);
        bench.settle(&["a", "b"]);
    };
    std::thread::scope(|scope| {
        for point in 0..POINTS {
            scope.spawn(move || try_at(all * point / POINTS));
        }
    });
}

/// A store that died while two files were changed.
fn died(bench: &Bench) {
    make_tree(&bench.path("a"));
    bench.settle(&["a", "b"]);
    let store = bench.open(&["a", "b"]).unwrap();
    let node = id_of(&store.catalog, "a.txt");
    let intent =
        store.intents.begin(&store.replicas, &[Dirty::File(node), Dirty::Dir(NodeId::ROOT)]);
    drop(intent.unwrap());
    fs::write(bench.path("a/a.txt"), b"other").unwrap();
    fs::write(bench.path("b/a.txt"), b"another").unwrap();
}

#[test]
fn a_backing_that_hangs_while_a_recovery_looks_at_what_was_changed_is_left_out() {
    for bad in ["a", "b"] {
        hangs_anywhere(bad, died);
    }
}

#[test]
fn a_backing_that_hangs_while_all_is_compared_is_left_out() {
    for bad in ["a", "b"] {
        hangs_anywhere(bad, |bench| {
            died(bench);
            bench.lose_logs();
        });
    }
}

#[test]
fn a_backing_whose_disk_fails_while_the_store_is_opened_is_left_out() {
    for errno in [Errno::IO, Errno::STALE, Errno::NOTCONN, Errno::ROFS] {
        for (op, bad) in [("open_dir", "a"), ("open_dir", "b"), ("mkdir", "b"), ("sync", "a")] {
            let bench = Bench::in_memory();
            write(&bench.path("a/file"), b"content");
            bench.settle(&["a", "b"]);
            let (broken, place) = (Arc::new(AtomicBool::new(true)), bench.path(bad));
            let fails = broken.clone();
            let between = Between::new(move |path, inner| {
                let fails = fails.clone();
                let plan = move |call: Call<'_>| {
                    let fails = call.op == op && fails.load(Ordering::Relaxed);
                    fails.then_some(Injected::Error(errno))
                };
                match path == place {
                    true => Box::new(Faulty::new(inner, Arc::new(plan))),
                    false => inner,
                }
            });
            let options = OpenOptions { between, resync_later: true, ..OpenOptions::default() };
            // Alone it is an error, which tells what to do.
            let alone = open_with(&bench.paths(&[bad]), &options, &Progress::silent());
            let Err(Error::Refused(text)) = alone else { panic!("{op} {errno}: not refused") };
            assert!(
                text.contains(if errno == Errno::ROFS { "remount" } else { "check" }),
                "{text}"
            );
            let paths = bench.paths(&["a", "b"]);
            let store = open_with(&paths, &options, &Progress::silent()).unwrap();
            assert_eq!(store.silent(), [bench.path(bad)], "{op} {errno}");
            let reason = &store.current_marker().unwrap().peers[0].reason;
            assert!(reason.contains(&std::io::Error::from(errno).to_string()), "{reason}");
            broken.store(false, Ordering::Relaxed);
            store.spoke(&bench.path(bad)).unwrap();
            store.close().unwrap();
            drop(store);
            bench.settle(&["a", "b"]);
        }
    }
}

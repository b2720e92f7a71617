//! Backings that hang while a store is opened.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::*;
use crate::replica::faulty::{Call, Faulty, Injected};

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
            let bench = Bench::new();
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
    let bench = Bench::new();
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
    let bench = Bench::new();
    bench.settle(&["a", "b"]);
    let (options, _go_on) = hanging(bench.path("b"), None);
    let options = OpenOptions { silent: bench.paths(&["b"]), ..options };
    let begun = Instant::now();
    let store = open_with(&bench.paths(&["a", "b"]), &options, &Progress::silent()).unwrap();
    assert!(begun.elapsed() < TIMEOUT * 3, "{:?}", begun.elapsed());
    assert_eq!(store.silent(), bench.paths(&["b"]));
    store.close().unwrap();
}

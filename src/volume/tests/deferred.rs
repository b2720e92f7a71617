//! Writes that are carried out later: nobody can tell, and no history is lost by it.

use proptest::prelude::*;
use std::ffi::OsStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::faults::put_between;
use super::*;
use crate::replica::faulty::{Call, Injected};
use crate::types::ContentId;

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };
const BLOCK: usize = 4096;

/// A file of four blocks that a version holds, open for writing.
struct Bench {
    volume: Arc<Volume>,
    node: Arc<Node>,
    dirs: Vec<tempfile::TempDir>,
    /// Syncs of segments of the undo log.
    syncs: Arc<AtomicUsize>,
    /// Writes to the live file fail.
    fails: Arc<AtomicBool>,
    /// The next write to the live file tells that it has come, and waits.
    gate: Arc<Mutex<Option<Gate>>>,
}

struct Gate {
    came: crossbeam_channel::Sender<()>,
    go: crossbeam_channel::Receiver<()>,
}

impl Bench {
    fn new() -> Bench {
        let dirs: Vec<_> = (0..2).map(|_| tempfile::tempdir_in("/dev/shm").unwrap()).collect();
        let store = open_store(&dirs);
        let (syncs, fails) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let gate = Arc::<Mutex<Option<Gate>>>::default();
        for index in 0..2 {
            let (syncs, fails, gate) = (syncs.clone(), fails.clone(), gate.clone());
            let plan = move |call: Call<'_>| {
                if call.op == "sync" && index == 0 {
                    syncs.fetch_add(1, Ordering::SeqCst);
                }
                // Records of the undo log are longer. The others are made equal after it.
                let hit = index == 0 && call.op == "write_at" && call.len == BLOCK as u64;
                if let Some(gate) = hit.then(|| gate.lock().take()).flatten() {
                    gate.came.send(()).unwrap();
                    gate.go.recv_timeout(Duration::from_secs(20)).unwrap();
                }
                let fails = hit && fails.load(Ordering::SeqCst);
                fails.then_some(Injected::Error(Errno::NOSPC))
            };
            put_between(&store, index, Arc::new(plan));
        }
        let volume = open_volume(store);
        let name = EntryName::new("file").unwrap();
        let (node, _) = volume.create(NodeId::ROOT, &name, 0o644, true, &CALLER).unwrap();
        volume.write(&node, 0, &[1; 4 * BLOCK], false, &CALLER).unwrap();
        volume.flush(&node).unwrap();
        Bench { volume, node, dirs, syncs, fails, gate }
    }

    fn write(&self, block: usize, byte: u8) -> Result<()> {
        let offset = (block * BLOCK) as u64;
        self.volume.write(&self.node, offset, &[byte; BLOCK], false, &CALLER).map(drop)
    }

    /// What the live file reads as, the first byte of each block.
    fn live(&self) -> Vec<u8> {
        let mut bytes = vec![0; 5 * BLOCK];
        let read = self.volume.read(&self.node, 0, &mut bytes).unwrap();
        bytes[..read].iter().step_by(BLOCK).copied().collect()
    }

    /// The same of the past.
    fn past(&self, content: ContentId) -> Vec<u8> {
        let mut bytes = vec![0; 4 * BLOCK];
        self.volume.read_content(self.node.id, content, 0, &mut bytes).unwrap();
        bytes.iter().step_by(BLOCK).copied().collect()
    }

    /// The same on a backing.
    fn on_disk(&self, index: usize) -> Vec<u8> {
        let bytes = std::fs::read(self.dirs[index].path().join("file")).unwrap();
        bytes.iter().step_by(BLOCK).copied().collect()
    }

    fn sealed(&self) -> ContentId {
        self.volume.catalog().node(self.node.id).unwrap().unwrap().content
    }
}

#[test]
fn many_overwrites_wait_for_one_sync() {
    let bench = Bench::new();
    let sealed = bench.sealed();
    let before = bench.syncs.load(Ordering::SeqCst);
    for block in [2, 0, 3] {
        bench.write(block, 2).unwrap();
    }
    assert_eq!(bench.syncs.load(Ordering::SeqCst), before, "nobody waits");
    assert_eq!(bench.on_disk(0), [1, 1, 1, 1], "nothing is overwritten before it is preserved");
    bench.volume.carry_out_all();
    // The segment's name, and what is in it.
    assert_eq!(bench.syncs.load(Ordering::SeqCst), before + 2);
    for index in [0, 1] {
        assert_eq!(bench.on_disk(index), [2, 1, 2, 2]);
    }
    assert_eq!(bench.past(sealed), [1, 1, 1, 1]);
    bench.volume.release(&bench.node, true).unwrap();
    bench.volume.close().unwrap();
}

#[test]
fn a_write_that_takes_privileges_is_deferred_where_there_are_none() {
    let bench = Bench::new();
    let (volume, before) = (&bench.volume, bench.syncs.load(Ordering::SeqCst));
    let write = |block: usize, byte: u8| {
        let offset = (block * BLOCK) as u64;
        volume.write(&bench.node, offset, &[byte; BLOCK], true, &CALLER).unwrap()
    };
    assert!(!write(0, 2) && !write(1, 2));
    assert_eq!(bench.syncs.load(Ordering::SeqCst), before, "nobody waits");
    let setuid = Changes { mode: Some(0o4755), ..Changes::default() };
    volume.set_attributes(&bench.node, &setuid, &CALLER).unwrap();
    assert!(write(2, 3));
    assert_eq!(volume.stat(&bench.node).unwrap().mode & 0o7777, 0o755);
    assert!(!write(3, 3));
    // Setgid counts where it means execution, which an access list may add.
    let setgid = Changes { mode: Some(0o2664), ..Changes::default() };
    volume.set_attributes(&bench.node, &setgid, &CALLER).unwrap();
    assert!(!write(0, 4));
    let entry = |tag: u8, bits: u8| [tag, 0, bits, 0, 0xff, 0xff, 0xff, 0xff];
    let acl = [&[2, 0, 0, 0][..], &entry(1, 6), &entry(4, 7), &entry(0x20, 4)].concat();
    let name = OsStr::new("system.posix_acl_access");
    volume.set_xattr(&bench.node, name, &acl, 0, &CALLER).unwrap();
    assert!(write(1, 4));
    assert_eq!(volume.stat(&bench.node).unwrap().mode & 0o7777, 0o674);
    assert_eq!(bench.live(), [4, 4, 3, 3]);
    bench.volume.release(&bench.node, true).unwrap();
    bench.volume.close().unwrap();
}

#[test]
fn whoever_looks_at_the_file_sees_what_was_written() {
    let bench = Bench::new();
    let (sealed, volume) = (bench.sealed(), &bench.volume);
    bench.write(1, 2).unwrap();
    assert_eq!(bench.live(), [1, 2, 1, 1]);
    let old = volume.stat(&bench.node).unwrap();
    // In part beyond the end.
    volume.write(&bench.node, 3 * BLOCK as u64, &[3; 2 * BLOCK], false, &CALLER).unwrap();
    let new = volume.stat(&bench.node).unwrap();
    assert_eq!((old.size, new.size), (4 * BLOCK as u64, 5 * BLOCK as u64));
    bench.write(0, 4).unwrap();
    assert_eq!(bench.past(sealed), [1, 1, 1, 1]);
    bench.write(2, 5).unwrap();
    let snapshot = volume.create_snapshot("one", false, &[]).unwrap();
    let shown = bench.sealed();
    bench.write(2, 6).unwrap();
    let cut = Changes { size: Some(2 * BLOCK as u64), ..Changes::default() };
    volume.set_attributes(&bench.node, &cut, &CALLER).unwrap();
    assert_eq!(bench.live(), [4, 2]);
    assert_eq!(bench.past(shown), [4, 2, 5, 3], "of {}", snapshot.name);
    assert_eq!(bench.past(sealed), [1, 1, 1, 1]);
    volume.release(&bench.node, true).unwrap();
    volume.close().unwrap();
    assert_eq!(bench.on_disk(0), bench.on_disk(1));
}

#[test]
fn a_deferred_write_counts_in_its_epoch_until_it_is_carried_out() {
    let bench = Bench::new();
    bench.write(1, 2).unwrap();
    let epoch = bench.volume.open_epoch();
    let drained = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            bench.volume.drain_epochs(epoch);
            drained.store(true, Ordering::SeqCst);
        });
        assert!(!drained.load(Ordering::SeqCst));
        assert_eq!(bench.on_disk(0), [1, 1, 1, 1]);
        bench.volume.carry_out_all();
        waiting.join().unwrap();
    });
    bench.volume.forget_epochs(None);
    bench.volume.release(&bench.node, true).unwrap();
    bench.volume.close().unwrap();
}

#[test]
fn what_went_wrong_is_told_until_the_last_writer_has_closed_and_costs_nothing_else() {
    let bench = Bench::new();
    let volume = &bench.volume;
    volume.open_file(&bench.node, true, false, &CALLER).unwrap();
    bench.write(0, 2).unwrap();
    volume.write(&bench.node, BLOCK as u64, &[3; BLOCK / 2], false, &CALLER).unwrap();
    // Whole blocks fail.
    bench.fails.store(true, Ordering::SeqCst);
    volume.carry_out_all();
    bench.fails.store(false, Ordering::SeqCst);
    for index in [0, 1] {
        assert_eq!(bench.on_disk(index), [1, 3, 1, 1]);
    }
    // To each who asks, whoever asked before.
    for _ in 0..2 {
        assert!(volume.fsync(&bench.node, false).unwrap_err().is(Errno::NOSPC));
        assert!(volume.flush(&bench.node).unwrap_err().is(Errno::NOSPC));
    }
    bench.write(2, 4).unwrap();
    volume.release(&bench.node, true).unwrap();
    assert!(volume.flush(&bench.node).unwrap_err().is(Errno::NOSPC));
    volume.release(&bench.node, true).unwrap();
    volume.open_file(&bench.node, true, false, &CALLER).unwrap();
    volume.fsync(&bench.node, false).unwrap();
    volume.flush(&bench.node).unwrap();
    volume.release(&bench.node, true).unwrap();
    volume.close().unwrap();
    for index in [0, 1] {
        assert_eq!(bench.on_disk(index), [1, 3, 4, 1]);
    }
}

#[test]
fn so_much_that_memory_would_fill_is_carried_out_by_the_writer() {
    let bench = Bench::new();
    // So many bytes, so many pieces.
    for (length, count) in [(4 * BLOCK, 512), (1, 1024)] {
        let byte = bench.on_disk(0)[0] + 1;
        for number in 1..=count {
            assert_ne!(bench.on_disk(0)[0], byte, "carried out after {number} of {count}");
            bench.volume.write(&bench.node, 0, &vec![byte; length], false, &CALLER).unwrap();
        }
        assert_eq!(bench.on_disk(0)[0], byte, "{count} of {length} bytes");
        bench.volume.flush(&bench.node).unwrap();
    }
    assert_eq!(bench.volume.deferrals.bytes.load(Ordering::SeqCst), 0);
    // A large one is not deferred at all, and comes after those before it.
    bench.write(0, 8).unwrap();
    bench.volume.write(&bench.node, 0, &[9; 100_000], false, &CALLER).unwrap();
    assert_eq!(bench.volume.deferrals.bytes.load(Ordering::SeqCst), 0);
    assert_eq!(bench.on_disk(1)[..2], [9, 9]);
    bench.volume.release(&bench.node, true).unwrap();
    bench.volume.close().unwrap();
}

#[test]
fn more_is_accepted_while_earlier_writes_are_carried_out() {
    let bench = Bench::new();
    let (sealed, volume) = (bench.sealed(), &bench.volume);
    let (came, has_come) = crossbeam_channel::bounded(1);
    let (goes, go) = crossbeam_channel::bounded(1);
    bench.write(0, 2).unwrap();
    *bench.gate.lock() = Some(Gate { came, go });
    let other = Caller { creds: Creds::DAEMON, pid: std::process::id() };
    std::thread::scope(|scope| {
        let carrying = scope.spawn(|| volume.carry_out_unlocked());
        has_come.recv_timeout(Duration::from_secs(20)).unwrap();
        // The file is locked, and nobody waits for it.
        assert!(bench.node.try_lock().is_none());
        bench.write(0, 3).unwrap();
        bench.write(1, 4).unwrap();
        volume.write(&bench.node, 2 * BLOCK as u64, &[5; BLOCK], false, &other).unwrap();
        // What would make the file longer waits for its lock.
        let longer = scope.spawn(|| bench.write(4, 6));
        goes.send(()).unwrap();
        carrying.join().unwrap();
        longer.join().unwrap().unwrap();
    });
    assert_eq!(bench.live(), [3, 4, 5, 1, 6]);
    assert_eq!(volume.deferrals.bytes.load(Ordering::SeqCst), 0);
    assert!(volume.carry_out_unlocked(), "nothing is left");
    volume.flush(&bench.node).unwrap();
    let newer = bench.sealed();
    bench.write(1, 7).unwrap();
    assert_eq!(bench.past(sealed), [1, 1, 1, 1]);
    assert_eq!(bench.past(newer), [3, 4, 5, 1]);
    volume.release(&bench.node, true).unwrap();
    volume.close().unwrap();
    for index in [0, 1] {
        assert_eq!(bench.on_disk(index), [3, 7, 5, 1, 6]);
    }
}

/// A write that was accepted beside others counts until it is carried out itself, also where those
/// fail.
#[test]
fn what_is_accepted_beside_a_write_that_fails_is_carried_out() {
    let bench = Bench::new();
    let volume = &bench.volume;
    let (came, has_come) = crossbeam_channel::bounded(1);
    let (goes, go) = crossbeam_channel::bounded(1);
    bench.write(0, 2).unwrap();
    *bench.gate.lock() = Some(Gate { came, go });
    bench.fails.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let carrying = scope.spawn(|| volume.carry_out_unlocked());
        has_come.recv_timeout(Duration::from_secs(20)).unwrap();
        volume.write(&bench.node, BLOCK as u64, &[3; BLOCK / 2], false, &CALLER).unwrap();
        goes.send(()).unwrap();
        assert!(!carrying.join().unwrap(), "something is left");
    });
    let epoch = volume.open_epoch();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| volume.drain_epochs(epoch));
        assert!(volume.carry_out_unlocked());
        waiting.join().unwrap();
    });
    volume.forget_epochs(None);
    bench.fails.store(false, Ordering::SeqCst);
    for index in [0, 1] {
        assert_eq!(bench.on_disk(index), [1, 3, 1, 1]);
    }
    assert!(volume.fsync(&bench.node, false).unwrap_err().is(Errno::NOSPC));
    volume.release(&bench.node, true).unwrap();
    volume.close().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Whatever is written, in whatever order it is carried out, the file is what was written and
    /// each version is what the file was.
    #[test]
    fn a_file_and_its_versions_are_what_was_written(
        steps in proptest::collection::vec((0usize..6, 0u64..20_000, 1usize..9000), 1..30),
        beside in any::<bool>(),
    ) {
        let bench = Bench::new();
        let ended = Arc::new(AtomicBool::new(!beside));
        let (volume, seen) = (bench.volume.clone(), ended.clone());
        let carrying = std::thread::spawn(move || {
            while !seen.load(Ordering::SeqCst) {
                volume.carry_out_unlocked();
                std::thread::yield_now();
            }
        });
        let mut model = vec![1; 4 * BLOCK];
        let mut versions = vec![(bench.sealed(), model.clone())];
        for (number, (what, at, length)) in steps.into_iter().enumerate() {
            match what {
                0 => bench.volume.carry_out_all(),
                1 => {
                    bench.volume.flush(&bench.node).unwrap();
                    versions.push((bench.sealed(), model.clone()));
                }
                _ => {
                    let data = vec![number as u8 + 2; length];
                    bench.volume.write(&bench.node, at, &data, false, &CALLER).unwrap();
                    let end = at as usize + length;
                    model.resize(model.len().max(end), 0);
                    model[at as usize..end].copy_from_slice(&data);
                }
            }
        }
        ended.store(true, Ordering::SeqCst);
        carrying.join().unwrap();
        let mut read = vec![0; model.len() + 1];
        let got = bench.volume.read(&bench.node, 0, &mut read).unwrap();
        prop_assert!(read[..got] == model);
        for (content, model) in versions {
            let mut read = vec![0; model.len()];
            bench.volume.read_content(bench.node.id, content, 0, &mut read).unwrap();
            prop_assert!(read == model, "{content}");
        }
        bench.volume.release(&bench.node, true).unwrap();
        bench.volume.close().unwrap();
        for dir in &bench.dirs {
            prop_assert!(std::fs::read(dir.path().join("file")).unwrap() == model);
        }
    }
}

//! How long programs wait while what they overwrote and deleted is packed.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::catalog::Change;
use crate::catalog::tests::speed::Waits;

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };
const FILES: u64 = 20_000;
/// Overwritten blocks of the database.
const BLOCKS: u64 = 40_000;
const BLOCK: usize = 4096;

fn name(text: &str) -> EntryName {
    EntryName::new(text).unwrap()
}

/// Bytes that compress to about a half, as programs' data does, and are no other's.
fn bytes_of(number: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![b' '; length];
    blake3::Hasher::new()
        .update(&number.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes[length / 2..]);
    bytes
}

fn save(volume: &Volume, text: &str, bytes: &[u8]) {
    let (node, _) = volume.create(NodeId::ROOT, &name(text), 0o644, true, &CALLER).unwrap();
    volume.write(&node, 0, bytes, false, &CALLER).unwrap();
    volume.release(&node, true).unwrap();
    let id = node.id;
    drop(node);
    // As the kernel does once it has no use for it: else it counted as in use.
    volume.forget(id, 1);
}

/// Does what programs do, until `is_over`.
fn work(volume: &Volume, when: &str, mut is_over: impl FnMut(u64) -> bool) {
    let mut waits = Waits::default();
    let (_never, pause) = crossbeam_channel::bounded::<()>(0);
    let catalog = volume.catalog();
    let past = catalog.snapshot("before").unwrap().unwrap().generation;
    let (database, _) = volume.lookup(NodeId::ROOT, &name("database")).unwrap();
    let mut round = 0;
    while !is_over(round) {
        round += 1;
        let text = format!("{when} {round}");
        let row = catalog.node(NodeId::ROOT).unwrap().unwrap();
        waits.time("push", || catalog.push(vec![Change::NodePut(row)])).unwrap();
        waits.time("lookup", || catalog.lookup(NodeId::ROOT, &name("database"))).unwrap();
        waits.time("past", || catalog.lookup_at(past, NodeId::ROOT, &name("f18"))).unwrap();
        let (node, _) = waits
            .time("create", || volume.create(NodeId::ROOT, &name(&text), 0o644, true, &CALLER))
            .unwrap();
        waits.time("write", || volume.write(&node, 0, b"short", false, &CALLER)).unwrap();
        waits.time("close", || volume.release(&node, true)).unwrap();
        let id = node.id;
        drop(node);
        volume.forget(id, 1);
        waits.time("unlink", || volume.unlink(NodeId::ROOT, &name(&text), &CALLER)).unwrap();
        let mut block = [0; BLOCK];
        waits.time("read", || volume.read(&database, round * 8192, &mut block)).unwrap();
        let _ = pause.recv_timeout(Duration::from_millis(1));
    }
    waits.tell(when);
}

/// `cargo test --release --lib foreground -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn how_long_the_foreground_waits_for_the_packer() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = open_volume(open_store(&dirs));
    for number in 0..FILES {
        save(&volume, &format!("f{number}"), &bytes_of(number, BLOCK));
    }
    save(&volume, "photo", &bytes_of(FILES, 64 << 20));
    let blocks: Vec<u8> = (0..BLOCKS).flat_map(|at| bytes_of(FILES + 1 + at, BLOCK)).collect();
    save(&volume, "database", &blocks);
    volume.create_snapshot("before", false, &[]).unwrap();
    for number in 0..FILES {
        volume.unlink(NodeId::ROOT, &name(&format!("f{number}")), &CALLER).unwrap();
    }
    volume.unlink(NodeId::ROOT, &name("photo"), &CALLER).unwrap();
    let (node, _) = volume.lookup(NodeId::ROOT, &name("database")).unwrap();
    volume.open_file(&node, true, false, &CALLER).unwrap();
    // Every other block, else they were one before-image.
    for at in (0..BLOCKS).step_by(2) {
        volume.write(&node, at * BLOCK as u64, &[1; BLOCK], false, &CALLER).unwrap();
    }
    volume.release(&node, true).unwrap();
    volume.settle().unwrap();
    let waiting = volume.catalog().totals().unwrap();
    work(&volume, "alone", |round| round > 2000);
    let over = AtomicBool::new(false);
    let begin = Instant::now();
    let packed = std::thread::scope(|scope| {
        let packer = scope.spawn(|| {
            crate::sys::be_idle();
            let packed = volume.pack_in_steps(&|_| Ok(()));
            over.store(true, Ordering::Relaxed);
            packed
        });
        work(&volume, "beside the packer", |_| over.load(Ordering::Relaxed));
        packer.join().unwrap().unwrap()
    });
    println!("{packed:?} of {waiting:?} in {:?}", begin.elapsed());
    assert!(packed.bytes >= waiting.preserved_bytes + waiting.undo_bytes);
    volume.close().unwrap();
}

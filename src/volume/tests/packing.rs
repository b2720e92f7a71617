//! The packer when somebody waits for it.

use std::cell::Cell;
use std::sync::atomic::Ordering;

use super::*;
use crate::history::packer::{Claim, Packer};
use crate::types::ContentId;

const CALLER: Caller = Caller { creds: Creds::DAEMON, pid: 0 };
/// Deleted files, each with bytes of its own, that wait to be packed.
const DELETED: usize = 60;
/// So many of them may still be taken up once it is to end.
const FEW: usize = 2;

fn volume_with_deleted_files(dirs: &[tempfile::TempDir]) -> Arc<Volume> {
    let volume = open_volume(open_store(dirs));
    let names = (0..DELETED).map(|n| EntryName::new(format!("f{n}")).unwrap());
    for name in names.clone() {
        let (node, _) = volume.create(NodeId::ROOT, &name, 0o644, true, &CALLER).unwrap();
        volume.write(&node, 0, name.as_bytes(), false, &CALLER).unwrap();
        volume.release(&node, true).unwrap();
        let id = node.id;
        drop(node);
        volume.forget(id, 1);
    }
    volume.create_snapshot("one", false, &[]).unwrap();
    names.for_each(|name| volume.unlink(NodeId::ROOT, &name, &CALLER).unwrap());
    assert_eq!(waiting(&volume), DELETED);
    volume
}

fn waiting(volume: &Volume) -> usize {
    volume.catalog().waiting_contents(ContentId::EMPTY, usize::MAX).unwrap().len()
}

/// What the snapshot has is read back, wherever it lies.
fn all_is_there(volume: &Volume) {
    let at = volume.catalog().snapshot("one").unwrap().unwrap().generation;
    for n in 0..DELETED {
        let name = EntryName::new(format!("f{n}")).unwrap();
        let row = volume.catalog().lookup_at(at, NodeId::ROOT, &name).unwrap().unwrap();
        let mut bytes = [0; 8];
        let got = volume.read_content(row.id, row.content, 0, &mut bytes).unwrap();
        assert_eq!(&bytes[..got], name.as_bytes());
    }
}

#[test]
fn a_packer_that_is_to_end_takes_up_few_contents_more_and_finishes_what_it_has() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = volume_with_deleted_files(&dirs);
    let (looks, end) = (Cell::new(0), Cell::new(usize::MAX));
    let is_over = || {
        looks.set(looks.get() + 1);
        looks.get() > end.get()
    };
    let replicas = volume.replicas();
    let mut packer = Packer::new(&volume.history, replicas, volume.catalog(), &|_| Ok(()));
    packer = packer.until(&is_over);
    // While it still looks what there is.
    let mut claims = 0;
    let mut claim = |_: &_| {
        claims += 1;
        if claims == 5 {
            end.set(looks.get());
        }
        Ok(Claim::Pack)
    };
    let (_, run) = packer.contents(ContentId::EMPTY, &mut claim).unwrap();
    assert!(!run.done);
    assert!(claims <= 5 + FEW, "{claims}");
    assert!(run.count <= FEW as u64, "{run:?}");
    // While it packs, after as many looks as there are contents, and ten.
    let left = waiting(&volume);
    looks.set(0);
    end.set(left + 10);
    let (_, run) = packer.contents(ContentId::EMPTY, &mut |_| Ok(Claim::Pack)).unwrap();
    assert!(!run.done);
    assert!((10 - FEW..=10 + FEW).contains(&(run.count as usize)), "{run:?} of {left}");
    assert_eq!(waiting(&volume), left - run.count as usize, "what it has is finished");
    all_is_there(&volume);
    volume.close().unwrap();
}

#[test]
fn who_waits_for_the_background_work_gets_it_from_the_packer() {
    let dirs = [0, 1].map(|_| tempfile::tempdir_in("/dev/shm").unwrap());
    let volume = volume_with_deleted_files(&dirs);
    volume.urgent.fetch_add(1, Ordering::Relaxed);
    let packed = volume.pack_in_steps(&|_| Ok(()));
    assert!(matches!(packed, Err(Error::Interrupted)), "{packed:?}");
    assert_eq!(waiting(&volume), DELETED);
    volume.urgent.fetch_sub(1, Ordering::Relaxed);
    assert_eq!(volume.pack_in_steps(&|_| Ok(())).unwrap().count, DELETED as u64);
    assert_eq!(waiting(&volume), 0);
    all_is_there(&volume);
    volume.close().unwrap();
}

//! Tests of the catalog as a whole.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::*;
use crate::error::Error;

mod actors;
mod attach;
mod cost;
mod equal;
mod forget;
mod history;
mod lifecycle;
mod model;
pub(crate) mod speed;
mod sums;
mod sweep;

const ROOT: NodeId = NodeId::ROOT;

/// A catalog on some replicas in a scratch folder.
struct Scratch {
    _dir: tempfile::TempDir,
    files: Vec<PathBuf>,
}

impl Scratch {
    fn new(replicas: usize) -> Scratch {
        Scratch::new_in(replicas, std::env::temp_dir())
    }

    fn new_in(replicas: usize, folder: impl AsRef<Path>) -> Scratch {
        let dir = tempfile::tempdir_in(folder).unwrap();
        let store = uuid::Uuid::new_v4();
        let files: Vec<_> =
            (0..replicas).map(|index| dir.path().join(format!("{index}.db"))).collect();
        Catalog::create(&files[0], store).unwrap();
        for file in &files[1..] {
            Catalog::copy(&files[0], file).unwrap();
        }
        Scratch { _dir: dir, files }
    }

    fn map(&self) -> ReplicaMap<Option<PathBuf>> {
        ReplicaMap::new(self.files.iter().cloned().map(Some).collect())
    }

    fn open(&self) -> Catalog {
        Catalog::open(self.map(), true).unwrap()
    }

    fn open_rooted(&self) -> Catalog {
        let catalog = self.open();
        catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
        catalog
    }
}

/// Does all that an idle catalog does: its WAL is in the database, whose sums are known.
fn rest(catalog: &Catalog) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while catalog.shared.checkpoint(true).is_some() {
        assert!(std::time::Instant::now() < deadline, "something is in the way");
        std::thread::yield_now();
    }
}

fn name(text: &str) -> EntryName {
    EntryName::new(text).unwrap()
}

fn path(text: &str) -> RelPath {
    RelPath::parse(text).unwrap()
}

fn row(id: u64, kind: Kind) -> NodeRow {
    NodeRow {
        id: NodeId(id),
        kind,
        mode: 0o644,
        uid: 1000,
        gid: 1000,
        rdev: 0,
        size: 0,
        blocks: 0,
        mtime: Timestamp { secs: 1_700_000_000, nanos: 5 },
        ctime: Timestamp { secs: 1_700_000_000, nanos: 5 },
        btime: Timestamp::default(),
        xattrs: XattrSetId::NONE,
        content: ContentId::EMPTY,
    }
}

fn dir(id: u64) -> NodeRow {
    row(id, Kind::Dir)
}

fn file(id: u64, content: u64) -> NodeRow {
    NodeRow { content: ContentId(content), size: content * 100, ..row(id, Kind::File) }
}

fn add(parent: u64, text: &str, node: u64) -> Change {
    Change::EntryAdd { parent: NodeId(parent), name: name(text), node: NodeId(node) }
}

fn remove(parent: u64, text: &str) -> Change {
    Change::EntryRemove { parent: NodeId(parent), name: name(text) }
}

fn create(parent: u64, text: &str, row: NodeRow) -> Vec<Change> {
    let node = row.id.0;
    vec![Change::NodePut(row), add(parent, text, node)]
}

fn listed(list: Vec<Listed>) -> Vec<(String, u64)> {
    list.into_iter().map(|one| (one.name.to_string(), one.node.0)).collect()
}

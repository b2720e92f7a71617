//! Tests of the volume that need its insides.

use super::*;
use crate::history::History;
use crate::store::{self, OpenOptions};

mod ahead;
mod catalogs;
mod deferred;
mod emptied;
mod faults;
mod growth;
mod hangs;
mod listing;
mod packing;
mod resyncs;
mod waits;

/// A store of these backings, made if there is none.
fn open_store(dirs: &[tempfile::TempDir]) -> Store {
    let paths: Vec<_> = dirs.iter().map(|dir| dir.path().canonicalize().unwrap()).collect();
    let is_new = !paths[0].join(".rearview").exists();
    let options = OpenOptions { init: is_new, ..OpenOptions::default() };
    let recover =
        |replicas: &ReplicaSet, catalog: &Catalog, from| History::recover(replicas, catalog, from);
    store::open(&paths, &options, &recover, &crate::progress::Progress::silent()).unwrap()
}

/// Nothing is done by anybody but the test.
fn open_volume(store: Store) -> Arc<Volume> {
    Volume::open(store, quiet()).unwrap()
}

/// Options by which nothing is done in the background.
fn quiet() -> VolumeOptions {
    let long = Duration::from_secs(3600);
    VolumeOptions {
        idle_seal: long,
        defer_writes: long,
        defer_bytes: usize::MAX,
        housekeeping: long,
        pack_after: long,
        policy_every: long,
        ..VolumeOptions::default()
    }
}

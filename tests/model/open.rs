//! Opening the store that the model is compared with.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rearviewfs::error::Error;
use rearviewfs::excludes::Patterns;
use rearviewfs::fs::{Filesystem, FsOptions, SnapDir};
use rearviewfs::history::History;
use rearviewfs::progress::Progress;
use rearviewfs::store::{self, Between, OpenOptions};
use rearviewfs::volume::{Volume, VolumeOptions};

use super::drive::{Outcome, entry, fail};

/// What has no history, where anything is excluded.
const EXCLUDED: &str = "*.tmp";
/// How long the last holder of a store is waited for.
const FREE_WITHIN: Duration = Duration::from_secs(60);

/// Opens the store in `paths`, which is recovered where the last mount was cut off.
pub(super) fn open(
    paths: &[PathBuf],
    excludes: bool,
    between: &Between,
) -> Outcome<Arc<Filesystem>> {
    let recover = |replicas: &_, catalog: &_, from| History::recover(replicas, catalog, from);
    let globs: &[String] = if excludes { &[EXCLUDED.into()] } else { &[] };
    let exclude = Arc::new(Patterns::of_globs(globs).expect("a pattern"));
    let (own, between) = (exclude.clone(), between.clone());
    let options = OpenOptions { exclude: own, between, ..OpenOptions::default() };
    // A store that was dropped, as death would end it, lives until the pass of its background work
    // ends that was at it, which on a busy machine takes a while.
    let deadline = Instant::now() + FREE_WITHIN;
    let store = loop {
        match store::open(paths, &options, &recover, &Progress::silent()) {
            Err(Error::InUse(_)) if Instant::now() < deadline => std::thread::yield_now(),
            opened => break opened.or_else(fail("opening the store"))?,
        }
    };
    let options = VolumeOptions { exclude, ..VolumeOptions::default() };
    let volume = Volume::open(store, options).or_else(fail("opening the volume"))?;
    let options = FsOptions {
        snapdir: SnapDir::Hidden,
        snapdir_name: entry(".snapshots"),
        mountpoint: PathBuf::from("/nonexistent"),
    };
    Ok(Arc::new(Filesystem::new(volume, options)))
}

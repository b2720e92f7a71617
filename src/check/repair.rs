//! `check --repair`: what a mount and a scrub of everything can mend, without a mount.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::Result;
use crate::history::History;
use crate::progress::Progress;
use crate::store::{self, OpenOptions};
use crate::volume::scrub::{ScrubOptions, ScrubRun};
use crate::volume::{Volume, VolumeOptions};

/// How often the end of the scrub is looked for, and the user's wish to stop.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Opens the store as a mount does, so that what lags or has lost its catalog is made equal, looks
/// at everything and heals what it can, and closes it again.
pub fn repair(backings: &[PathBuf], progress: &Progress) -> Result<ScrubRun> {
    let backings: Vec<PathBuf> = backings
        .iter()
        .map(|path| store::inspect(path).map(|info| info.path))
        .collect::<Result<_>>()?;
    let options = OpenOptions { existing_only: true, ..OpenOptions::default() };
    let recover = |replicas: &_, catalog: &_, from| History::recover(replicas, catalog, from);
    let store = store::open(&backings, &options, &recover, progress)?;
    let volume = Volume::open(store, VolumeOptions::default())?;
    progress.begin("Looking at everything", 0, 0);
    let scrubbed = (|| -> Result<ScrubRun> {
        volume.scrub_start(ScrubOptions { all: true, ..ScrubOptions::default() }, false)?;
        while !volume.scrub_wait(LOOK_EVERY)? {
            progress.advance(0, 0)?;
        }
        Ok(volume.scrub_status()?.last.unwrap_or_default())
    })();
    progress.end();
    let closed = volume.close();
    let run = scrubbed?;
    closed.map(|()| run)
}

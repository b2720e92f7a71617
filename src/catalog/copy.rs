//! Copies of a catalog: made beside the place that they are for, and put there when they are whole.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::backup::{Backup, StepResult};
use rustix::io::Errno;

use super::database::{Db, Place};
use super::lane::TIMEOUT;
use super::open::finish;
use super::schema::{Use, connect, connect_at, name_damage, read_head};
use super::{Catalog, sums};
use crate::error::{IoContext, Result};
use crate::sys::device::Alive;
use crate::sys::patience::Patience;
use crate::sys::sqlite::with_patience;

/// Pages copied per step of a backup: 4 MiB.
pub(super) const BACKUP_PAGES: i32 = 1024;
/// What the name of a copy ends with until it is whole.
const NEW: &str = ".new";

impl Catalog {
    /// Replaces the catalog in `to` by a copy of the one in `from`; neither may be open. `to` is
    /// whole at every moment: the copy is written beside it, made durable and renamed.
    pub fn copy(from: &Path, to: &Path) -> Result<()> {
        Original::open(from, TIMEOUT)?.copy_to(to, &Alive::default())
    }
}

/// A catalog that is open to be copied.
pub struct Original {
    db: Db,
    patience: Arc<Patience>,
}

impl Original {
    /// Opens it. No read of it takes longer than `timeout` from then on.
    pub fn open(file: &Path, timeout: Duration) -> Result<Original> {
        let patience = Arc::new(Patience::new(timeout));
        Ok(Original { db: connect(file, Use::Read)?, patience })
    }

    /// As [`Catalog::copy`].
    pub fn copy_to(&self, to: &Path, alive: &Alive) -> Result<()> {
        let place = Place::of(to)?;
        let mut target = new_beside(&place)?.open_new()?;
        let copied = with_patience(&self.patience, || {
            let backup = Backup::new(&self.db, &mut target)?;
            while backup.step(BACKUP_PAGES)? != StepResult::Done {
                alive.tell();
            }
            Ok(())
        });
        match copied {
            Err(_) if self.patience.is_over() => {
                return Err(Errno::TIMEDOUT).context("read", self.db.file());
            }
            copied => copied.map_err(|error| name_damage(self.db.file(), error))?,
        }
        target.close()?;
        put_in_place(&place)
    }
}

/// The place for a copy of a catalog until it is whole, where nothing lies.
pub(super) fn new_beside(place: &Place) -> Result<Place> {
    for suffix in [NEW, ".new-wal", ".new-shm", ".new-journal"] {
        place.beside(suffix)?.remove()?;
    }
    place.beside(NEW)
}

/// Makes the fresh copy that [`new_beside`] had a place for, and nobody has open, the catalog at
/// `to`, durably.
pub(super) fn put_in_place(to: &Place) -> Result<()> {
    let new = to.beside(NEW)?;
    // Opened once as what it is now, and emptied: no WAL belongs to the copy.
    let copy = connect_at(to.beside(NEW)?, Use::Write)?;
    read_head(&copy).map_err(|error| name_damage(new.shown(), error))?;
    finish(copy)?;
    new.sync()?;
    // A WAL beside the new file must not be taken for its own. What the old WAL holds goes into
    // the old database first, so that this is whole if we die before the rename. If it cannot
    // even be opened, there is nothing to lose.
    if let Ok(old) = connect_at(to.beside("")?, Use::Write) {
        let _ = finish(old);
    }
    to.beside("-wal")?.remove()?;
    to.beside("-shm")?.remove()?;
    to.beside(sums::SUFFIX)?.remove()?;
    to.sync_dir()?;
    // Before the rename `to` is the old catalog, after it the new one; both are complete files.
    new.rename(to)?;
    new.beside("-shm")?.remove()?;
    to.sync_dir()
}

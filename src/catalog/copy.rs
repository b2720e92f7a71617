//! Copies of a catalog: made beside the place that they are for, and put there when they are whole.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::ErrorCode;
use rusqlite::backup::{Backup, StepResult};
use rustix::io::Errno;

use super::database::{Db, Place};
use super::lane::TIMEOUT;
use super::open::finish;
use super::schema::{Use, connect, connect_at, is_whole, name_damage, read_head};
use super::{Catalog, sums};
use crate::error::{Error, IoContext, Result};
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

    /// As [`Catalog::copy`], until it is to end: then it makes no further step, for who gave it up
    /// may have begun another copy to the same place.
    pub fn copy_to(&self, to: &Path, alive: &Alive) -> Result<()> {
        let place = Place::of(to)?;
        go_on(alive, to)?;
        let mut target = new_beside(&place)?.open_new()?;
        let copied = with_patience(&self.patience, || {
            let backup = Backup::new(&self.db, &mut target)?;
            while !alive.is_ended() && backup.step(BACKUP_PAGES)? != StepResult::Done {
                alive.tell();
            }
            Ok(())
        });
        go_on(alive, to)?;
        match copied {
            Err(_) if self.patience.is_over() => {
                return Err(Errno::TIMEDOUT).context("read", self.db.file());
            }
            copied => copied.map_err(|error| self.name_fault(error, to))?,
        }
        target.close()?;
        put_in_place(&place, alive)
    }

    /// What went wrong with a copy, of the one that it is the fault of: SQLite does not say.
    fn name_fault(&self, error: rusqlite::Error, to: &Path) -> Error {
        let cause = match error.sqlite_error_code() {
            Some(ErrorCode::SystemIoFailure) => Errno::IO,
            Some(ErrorCode::DiskFull) => Errno::NOSPC,
            Some(ErrorCode::ReadOnly) => Errno::ROFS,
            _ => return name_damage(self.db.file(), error),
        };
        match with_patience(&self.patience, || is_whole(&self.db, "main")) {
            true => {
                Error::Io { action: "copy a catalog to", path: to.into(), source: cause.into() }
            }
            false => name_damage(self.db.file(), error),
        }
    }
}

/// Fails once nobody waits for the copy to `to` any more.
fn go_on(alive: &Alive, to: &Path) -> Result<()> {
    let ended = if alive.is_ended() { Err(Errno::TIMEDOUT) } else { Ok(()) };
    ended.context("copy a catalog to", to)
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
pub(super) fn put_in_place(to: &Place, alive: &Alive) -> Result<()> {
    let new = to.beside(NEW)?;
    let go_on = || go_on(alive, to.shown());
    go_on()?;
    // Opened once as what it is now, and emptied: no WAL belongs to the copy.
    let copy = connect_at(to.beside(NEW)?, Use::Write)?;
    read_head(&copy).map_err(|error| name_damage(new.shown(), error))?;
    finish(copy)?;
    new.sync()?;
    go_on()?;
    // A WAL beside the new file must not be taken for its own. What the old WAL holds goes into
    // the old database first, so that this is whole if we die before the rename. If it cannot
    // even be opened, there is nothing to lose.
    if let Ok(old) = connect_at(to.beside("")?, Use::Write) {
        let _ = finish(old);
    }
    for suffix in ["-wal", "-shm", sums::SUFFIX] {
        go_on()?;
        to.beside(suffix)?.remove()?;
    }
    to.sync_dir()?;
    go_on()?;
    // Before the rename `to` is the old catalog, after it the new one; both are complete files.
    new.rename(to)?;
    go_on()?;
    new.beside("-shm")?.remove()?;
    to.sync_dir()
}

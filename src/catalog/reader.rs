//! Connections for queries: a few, on the first attached replica, none ever waiting for the writer.
//!
//! A replica whose file cannot be read is detached like one that cannot be written, and the query
//! is asked again of the next.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use rusqlite::{Connection, ErrorCode};

use super::Shared;
use super::database::Db;
use super::schema::{Use, connect};
use crate::error::{Error, Result};
use crate::types::{ReplicaId, ReplicaMap};

/// Idle connections kept, with up to 8 MiB of cache each.
const IDLE_MAX: usize = 4;

/// The pool.
pub(super) struct Readers {
    files: RwLock<ReplicaMap<Option<PathBuf>>>,
    gone: ReplicaMap<AtomicBool>,
    idle: Mutex<Vec<(ReplicaId, Db)>>,
    /// Counts the files that were replaced: a connection from before is of a file that is gone.
    replaced: AtomicU64,
}

impl Readers {
    /// A pool on these files.
    pub fn new(files: ReplicaMap<Option<PathBuf>>) -> Readers {
        let files = ReplicaMap::for_all(|id| files.get(id).cloned().flatten());
        let gone = files.map(|_, file| AtomicBool::new(file.is_none()));
        let files = RwLock::new(files);
        Readers { files, gone, idle: Mutex::new(Vec::new()), replaced: AtomicU64::new(0) }
    }

    /// Closes all idle connections.
    pub fn close(&self) {
        self.idle.lock().clear();
    }

    /// Takes a replica's file into use.
    pub fn join(&self, id: ReplicaId, file: PathBuf) {
        self.files.write()[id] = Some(file);
        self.gone[id].store(false, Ordering::Release);
    }

    /// The file of a replica.
    pub fn file(&self, replica: ReplicaId) -> Option<PathBuf> {
        self.files.read()[replica].clone()
    }

    /// Closes the idle connections to a replica's file, which is replaced.
    pub fn close_on(&self, replica: ReplicaId) {
        let mut idle = self.idle.lock();
        self.replaced.fetch_add(1, Ordering::AcqRel);
        idle.retain(|(id, _)| *id != replica);
    }

    fn is_replaced(&self, since: u64) -> bool {
        self.replaced.load(Ordering::Acquire) != since
    }

    fn take(&self) -> Result<(ReplicaId, Db)> {
        let id = self.gone.iter().find(|(_, gone)| !gone.load(Ordering::Acquire)).map(|(id, _)| id);
        let (id, file) =
            id.and_then(|id| Some((id, self.files.read()[id].clone()?))).ok_or_else(|| {
                Error::Damaged {
                    what: "the catalog".into(),
                    detail: "no replica's copy can be read".into(),
                    remedy: "Repair the disks, then unmount and mount again",
                }
            })?;
        if let Some(found) = self.idle.lock().pop()
            && found.0 == id
        {
            return Ok(found);
        }
        match connect(&file, Use::Read) {
            Ok(db) => Ok((id, db)),
            Err(error) => Err(error),
        }
    }

    fn give_back(&self, id: ReplicaId, db: Db, taken_at: u64) {
        let mut idle = self.idle.lock();
        if !self.is_replaced(taken_at)
            && idle.len() < IDLE_MAX
            && !self.gone[id].load(Ordering::Acquire)
        {
            idle.push((id, db));
        }
    }
}

impl Shared {
    /// Runs a query. It may be run again on another replica if the first one fails.
    pub fn read<T>(&self, mut query: impl FnMut(&Connection) -> rusqlite::Result<T>) -> Result<T> {
        loop {
            let taken_at = self.readers.replaced.load(Ordering::Acquire);
            let (id, db) = self.readers.take()?;
            match query(&db) {
                Ok(answer) => {
                    self.readers.give_back(id, db, taken_at);
                    return Ok(answer);
                }
                // The file was replaced meanwhile: the next try reads the new one.
                Err(error) if is_broken(&error) && self.readers.is_replaced(taken_at) => {}
                Err(error) if !self.read_only && is_broken(&error) && self.others_than(id) => {
                    self.detach(id, Some(error.to_string()));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Runs several queries on one state of the database.
    pub fn read_at_once<T>(
        &self,
        mut query: impl FnMut(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T> {
        self.read(|db| {
            // After an error the connection is dropped, and the transaction with it.
            db.prepare_cached("BEGIN")?.execute([])?;
            let answer = query(db)?;
            db.prepare_cached("COMMIT")?.execute([])?;
            Ok(answer)
        })
    }

    /// Whether a replica is out.
    pub fn is_detached(&self, replica: ReplicaId) -> bool {
        self.readers.gone[replica].load(Ordering::Acquire)
    }

    /// Takes a replica out; with a reason, if it failed.
    pub fn detach(&self, replica: ReplicaId, failure: Option<String>) {
        let was_gone = self.readers.gone[replica].swap(true, Ordering::AcqRel);
        let mut idle = self.readers.idle.lock();
        let (gone, stay) = idle.drain(..).partition::<Vec<_>, _>(|(id, _)| *id == replica);
        *idle = stay;
        drop(idle);
        // Closing can hang as well.
        self.lanes.discard(replica, gone);
        if let Some(reason) = failure
            && !was_gone
        {
            log::error!("the catalog of replica {} failed: {reason}", replica.index());
            self.failures.lock().push((replica, reason));
        }
    }

    /// Takes a replica in again whose file was replaced.
    pub fn attach(&self, replica: ReplicaId) {
        self.failures.lock().retain(|(id, _)| *id != replica);
        self.readers.gone[replica].store(false, Ordering::Release);
    }

    fn others_than(&self, replica: ReplicaId) -> bool {
        self.readers.gone.iter().any(|(id, gone)| id != replica && !gone.load(Ordering::Acquire))
    }
}

/// Whether an error is the file's or the disk's fault.
fn is_broken(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(
            ErrorCode::SystemIoFailure
                | ErrorCode::DatabaseCorrupt
                | ErrorCode::NotADatabase
                | ErrorCode::CannotOpen
        )
    )
}

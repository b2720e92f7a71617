//! Connections for queries: a few, on the first attached replica, none ever waiting for the writer.
//!
//! A replica whose file cannot be read, or not in time, is detached like one that cannot be
//! written, and the query is asked again of the next. A query runs in the thread that asks, for
//! handing it over would cost more than most of them; what it must read from the disk is handed
//! over ([`with_patience`]), and so is the opening of a connection.

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use rusqlite::{Connection, ErrorCode};
use rustix::io::Errno;

use super::Shared;
use super::database::Db;
use super::failure::Failure;
use super::lane::TIMEOUT;
use super::schema::{Use, connect};
use crate::error::{Error, IoContext, Result};
use crate::sys::patience::Patience;
use crate::sys::sqlite::with_patience;
use crate::types::{ReplicaId, ReplicaMap};

/// Idle connections kept, with up to 8 MiB of cache each.
const IDLE_MAX: usize = 4;

/// A replica on which a query has been running for so long is asked only if all are as slow. Of
/// those that have something to read from the disk nearly all take less than this.
const SLOW: Duration = Duration::from_secs(1);

/// The pool.
pub(super) struct Readers {
    files: RwLock<ReplicaMap<Option<PathBuf>>>,
    gone: ReplicaMap<AtomicBool>,
    patience: ReplicaMap<Arc<Patience>>,
    idle: Mutex<Vec<(ReplicaId, Db)>>,
    /// When the queries began that run.
    running: ReplicaMap<Mutex<Vec<Instant>>>,
    /// Counts the files that were replaced: a connection from before is of a file that is gone.
    replaced: AtomicU64,
}

impl Readers {
    /// A pool on these files.
    pub fn new(files: ReplicaMap<Option<PathBuf>>) -> Readers {
        let files = ReplicaMap::for_all(|id| files.get(id).cloned().flatten());
        let gone = files.map(|_, file| AtomicBool::new(file.is_none()));
        let files = RwLock::new(files);
        let running = ReplicaMap::for_all(|_| Mutex::default());
        let patience = ReplicaMap::for_all(|_| Arc::new(Patience::new(TIMEOUT)));
        let (idle, replaced) = (Mutex::default(), AtomicU64::new(0));
        Readers { files, gone, patience, idle, running, replaced }
    }

    /// How long a query waits for the disk at once.
    pub fn set_timeout(&self, timeout: Duration) {
        self.patience.iter().for_each(|(_, patience)| patience.set_timeout(timeout));
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

    /// Which replica is to be asked, of those that are not in `but`.
    fn choose(&self, but: &[ReplicaId]) -> Option<ReplicaId> {
        let is_there =
            |id: ReplicaId, gone: &AtomicBool| !gone.load(Ordering::Acquire) && !but.contains(&id);
        let there = || self.gone.iter().filter(|(id, gone)| is_there(*id, gone));
        let is_slow = |id: ReplicaId| {
            let running = self.running[id].lock();
            running.iter().min().is_some_and(|begun| begun.elapsed() >= SLOW)
        };
        let mut quick = there().map(|(id, _)| id).filter(|id| !is_slow(*id));
        quick.next().or_else(|| there().map(|(id, _)| id).next())
    }

    /// The file of the one that is to be asked, and how long it is waited for.
    pub fn chosen(&self) -> Option<(PathBuf, Arc<Patience>)> {
        self.of(self.choose(&[])?)
    }

    /// A replica's file, and how long it is waited for.
    pub fn of(&self, id: ReplicaId) -> Option<(PathBuf, Arc<Patience>)> {
        Some((self.file(id)?, self.patience[id].clone()))
    }

    /// Notes that a query begins; to be ended by [`Readers::end`].
    fn begin(&self, id: ReplicaId) -> Instant {
        let now = Instant::now();
        self.running[id].lock().push(now);
        now
    }

    fn end(&self, id: ReplicaId, begun: Instant) {
        let mut running = self.running[id].lock();
        if let Some(at) = running.iter().position(|one| *one == begun) {
            running.swap_remove(at);
        }
    }

    /// Notes that a query which takes long still goes on.
    fn renew(&self, id: ReplicaId, begun: Instant) -> Instant {
        self.end(id, begun);
        self.begin(id)
    }

    /// A connection; `None` if it cannot be opened in time.
    fn take(&self, id: ReplicaId) -> Option<Result<Db>> {
        if let Some((on, db)) = self.idle.lock().pop()
            && on == id
        {
            return Some(Ok(db));
        }
        let file = self.files.read()[id].clone().unwrap_or_default();
        self.patience[id].call(move || connect(&file, Use::Read))
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
        self.read_alive(|db, _| query(db))
    }

    /// Likewise, with a function that the query calls again and again to show that it goes on.
    fn read_alive<T>(
        &self,
        mut query: impl FnMut(&Connection, &dyn Fn()) -> rusqlite::Result<T>,
    ) -> Result<T> {
        let (mut unopened, mut why) = (Vec::new(), None);
        loop {
            let taken_at = self.readers.replaced.load(Ordering::Acquire);
            let Some(id) = self.readers.choose(&unopened) else {
                return Err(why.unwrap_or_else(|| Error::Damaged {
                    what: "the catalog".into(),
                    detail: "no replica's copy can be read".into(),
                    remedy: "Repair the disks, then unmount and mount again",
                }));
            };
            let patience = &self.readers.patience[id];
            let begun = Cell::new(self.readers.begin(id));
            let alive = || begun.set(self.readers.renew(id, begun.get()));
            let asked = self.readers.take(id).map(|db| -> Result<_> {
                let db = db?;
                Ok((with_patience(patience, || query(&db, &alive)), db))
            });
            self.readers.end(id, begun.get());
            let others = !self.read_only && self.others_than(id);
            let (outcome, db) = match asked {
                Some(Ok(asked)) => asked,
                // Its disk is bad, or descriptors are short: which one the next commit finds.
                Some(Err(error)) => {
                    unopened.push(id);
                    why = Some(error);
                    continue;
                }
                None if others => {
                    self.detach(id, Some(Failure::Hangs));
                    continue;
                }
                None => return self.hangs(id),
            };
            match outcome {
                Ok(answer) => {
                    self.readers.give_back(id, db, taken_at);
                    return Ok(answer);
                }
                // The file was replaced meanwhile: the next try reads the new one.
                Err(error) if is_broken(&error) && self.readers.is_replaced(taken_at) => {}
                Err(error) if others && is_broken(&error) => {
                    let hangs = patience.is_over();
                    let reason = if hangs { Failure::Hangs } else { error.into() };
                    self.detach(id, Some(reason));
                    self.lanes.discard(id, db);
                }
                Err(_) if patience.is_over() => return self.hangs(id),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Nothing can be read from a replica's file in time, and there is no other.
    fn hangs<T>(&self, id: ReplicaId) -> Result<T> {
        let file = self.readers.file(id).unwrap_or_default();
        Err(Errno::TIMEDOUT).context("read the catalog", file)
    }

    /// Closes all idle connections, each by its replica's thread: that can hang as well.
    pub fn close_readers(&self) {
        let idle = std::mem::take(&mut *self.readers.idle.lock());
        let close = |(id, db)| (id, self.lanes.begin(id, None, move || drop::<Db>(db)));
        let turns: Vec<_> = idle.into_iter().map(close).collect();
        turns.into_iter().for_each(|(id, turn)| _ = self.lanes.wait(id, turn));
    }

    /// Runs several queries on one state of the database.
    pub fn read_at_once<T>(
        &self,
        mut query: impl FnMut(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T> {
        self.read_long(|db, _| query(db))
    }

    /// Likewise what may take longer than a query should ([`SLOW`]): it calls the function again
    /// and again, so that others are not kept off the replica.
    pub fn read_long<T>(
        &self,
        mut query: impl FnMut(&Connection, &dyn Fn()) -> rusqlite::Result<T>,
    ) -> Result<T> {
        self.read_alive(|db, alive| {
            // After an error the connection is dropped, and the transaction with it.
            db.prepare_cached("BEGIN")?.execute([])?;
            let answer = query(db, alive)?;
            db.prepare_cached("COMMIT")?.execute([])?;
            Ok(answer)
        })
    }

    /// Whether a replica is out.
    pub fn is_detached(&self, replica: ReplicaId) -> bool {
        self.readers.gone[replica].load(Ordering::Acquire)
    }

    /// Takes a replica out; with a reason, if it failed.
    pub fn detach(&self, replica: ReplicaId, failure: Option<Failure>) {
        let was_gone = self.readers.gone[replica].swap(true, Ordering::AcqRel);
        self.foreseen.forget();
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

#[cfg(test)]
mod tests {
    use crossbeam_channel::unbounded;

    use super::*;
    use crate::catalog::Catalog;

    fn two(dir: &std::path::Path) -> (Catalog, [PathBuf; 2]) {
        let files = [0, 1].map(|index| dir.join(format!("{index}.db")));
        Catalog::create(&files[0], uuid::Uuid::nil()).unwrap();
        Catalog::copy(&files[0], &files[1]).unwrap();
        let map = ReplicaMap::new(files.iter().cloned().map(Some).collect());
        (Catalog::open(map, true).unwrap(), files)
    }

    #[test]
    fn where_a_catalog_cannot_be_opened_once_more_another_replica_answers() {
        let dir = tempfile::tempdir().unwrap();
        let (catalog, files) = two(dir.path());
        catalog.shared.close_readers();
        let aside = dir.path().join("aside");
        std::fs::rename(&files[0], &aside).unwrap();
        catalog.totals().unwrap();
        let first = ReplicaId::all().next().unwrap();
        assert!(!catalog.shared.is_detached(first), "its writer will tell");
        std::fs::rename(&files[1], dir.path().join("aside too")).unwrap();
        catalog.shared.close_readers();
        catalog.totals().unwrap_err();
        std::fs::rename(dir.path().join("aside too"), &files[1]).unwrap();
        std::fs::rename(&aside, &files[0]).unwrap();
        catalog.totals().unwrap();
        catalog.close().unwrap();
    }

    #[test]
    fn behind_a_query_that_hangs_another_replica_answers() {
        let dir = tempfile::tempdir().unwrap();
        let (catalog, _) = two(dir.path());
        let asked = || catalog.shared.readers.choose(&[]).unwrap().index();
        let (go_on, resume) = unbounded::<()>();
        std::thread::scope(|scope| {
            let shared = &catalog.shared;
            scope.spawn(move || shared.read(|_| Ok(resume.recv().is_err())).unwrap());
            let until = Instant::now() + SLOW * 20;
            while asked() == 0 {
                assert!(Instant::now() < until, "the one that hangs is asked on and on");
                std::thread::yield_now();
            }
            assert_eq!(catalog.generation().0, 0);
            catalog.totals().unwrap();
            drop(go_on);
        });
        assert_eq!(asked(), 0, "it is well again");
        let shared = &catalog.shared;
        let still_asked = shared.read_long(|_, alive| {
            let until = Instant::now() + SLOW * 2;
            while Instant::now() < until && asked() == 0 {
                alive();
            }
            Ok(asked())
        });
        assert_eq!(still_asked.unwrap(), 0, "one that goes on keeps nobody off");
        catalog.close().unwrap();
    }
}

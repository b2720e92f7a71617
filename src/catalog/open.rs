//! The life of a catalog: made, inspected, copied, opened, closed.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::Connection;
use rusqlite::config::DbConfig;
use rustix::io::Errno;

use super::actor::{self, Acts, Known};
use super::commit::{Queue, TickClock, Waiting, Writer};
use super::database::{Db, Place};
use super::failure::Failure;
use super::foreseen::Foreseen;
use super::lane::{Lanes, TIMEOUT};
use super::reader::Readers;
use super::schema::read_head_only;
use super::schema::{
    self, HeadRow, NextIds, Use, connect, connect_alive, damaged, name_damage, read_head,
    while_alive,
};
use super::wal::Copies;
use super::xattr::Interned;
use super::{Catalog, Change, Durability, Head, PackChange, Shared};
use crate::error::{Error, IoContext, Result};
use crate::sys::device::Alive;
use crate::types::{
    ChunkId, ContentId, NodeId, PackId, ReplicaId, ReplicaMap, SnapshotId, Timestamp, XattrSetId,
};

/// Ids skipped after an unclean end. Far more are never handed out between two commits: the queue
/// bounds the changes that wait, and each thread takes ids only for what it is about to push.
const SKIPPED_IDS: u64 = 1 << 20;
/// The largest catalog that is written anew when it is closed: it takes about half a second.
const TIGHTENED_BYTES: u64 = 64 << 20;
/// What one change takes in a catalog, about.
const CHANGE_BYTES: u64 = 64;
/// Catalogs below this size are checked at every mount: it takes well under a second.
const CHECKED_BYTES: u64 = 64 << 20;

/// The ids to hand out next.
pub(super) struct Ids {
    node: AtomicU64,
    content: AtomicU64,
    snapshot: AtomicU64,
    xattrs: AtomicU64,
    chunk: AtomicU64,
    pack: AtomicU64,
}

impl Ids {
    fn new(next: NextIds) -> Ids {
        Ids {
            node: AtomicU64::new(next.node),
            content: AtomicU64::new(next.content),
            snapshot: AtomicU64::new(next.snapshot),
            xattrs: AtomicU64::new(next.xattrs),
            chunk: AtomicU64::new(next.chunk),
            pack: AtomicU64::new(next.pack),
        }
    }

    /// The counters now.
    pub fn next(&self) -> NextIds {
        NextIds {
            node: self.node.load(Ordering::Relaxed),
            content: self.content.load(Ordering::Relaxed),
            snapshot: self.snapshot.load(Ordering::Relaxed),
            xattrs: self.xattrs.load(Ordering::Relaxed),
            chunk: self.chunk.load(Ordering::Relaxed),
            pack: self.pack.load(Ordering::Relaxed),
        }
    }

    /// Keeps the counters above ids that came from elsewhere (a received stream, a rebuilt
    /// catalog).
    pub fn reach(&self, change: &Change) {
        let (counter, id) = match change {
            Change::NodePut(row) | Change::NodeUnversioned(row) => (&self.node, row.id.0),
            Change::ContentAdd { id, .. } => (&self.content, id.0),
            Change::SnapshotPut(snapshot) => (&self.snapshot, snapshot.id.0),
            Change::XattrSetAdd { id, .. } => (&self.xattrs, id.0),
            Change::Pack(PackChange::ChunkAdd(row)) => (&self.chunk, row.id.0),
            Change::Pack(PackChange::PackAdd { id, .. }) => (&self.pack, id.0),
            Change::Pack(PackChange::RecipeAdd { id, .. }) => (&self.content, id.0),
            _ => return,
        };
        if id >= counter.load(Ordering::Relaxed) {
            counter.fetch_max(id + 1, Ordering::Relaxed);
        }
    }
}

impl Shared {
    /// A new id for a set of extended attributes.
    pub fn next_xattrs(&self) -> XattrSetId {
        XattrSetId(self.ids.xattrs.fetch_add(1, Ordering::Relaxed))
    }
}

impl Catalog {
    /// Reads the head of the catalog in `file` without changing anything.
    pub fn inspect(file: &Path) -> Result<Head> {
        let db = connect(file, Use::Read)?;
        read_head_only(&db).map_err(|error| name_damage(file, error))
    }

    /// As [`Catalog::inspect`], after a check of the whole file's structure; its pages are read
    /// once, about a second per 100 MB. A file of 64 MiB or more is checked only if `thorough`.
    /// [`Error::Damaged`] for one that must not be used.
    pub fn verify(file: &Path, thorough: bool) -> Result<Head> {
        Catalog::verify_alive(file, thorough, &Alive::default())
    }

    /// As [`Catalog::verify`], which takes long.
    pub fn verify_alive(file: &Path, thorough: bool, alive: &Alive) -> Result<Head> {
        let mut db = connect(file, Use::Read)?;
        let head = read_head_only(&db).map_err(|error| name_damage(file, error))?;
        let bytes = fs::metadata(file).context("look at", file)?.len();
        if thorough || bytes < CHECKED_BYTES {
            let check = |db: &mut Db| db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0));
            let found: String =
                while_alive(&mut db, alive, check).map_err(|error| name_damage(file, error))?;
            if found != "ok" {
                return Err(damaged(file, found));
            }
        }
        Ok(head)
    }

    /// Makes an empty catalog in `file`: the root directory does not exist yet, generation 0.
    pub fn create(file: &Path, store: uuid::Uuid) -> Result<()> {
        Catalog::create_at(file, store, Timestamp::now())
    }

    /// As [`Catalog::create`], at a time of one's own: nothing in it can be older.
    pub fn create_at(file: &Path, store: uuid::Uuid, time: Timestamp) -> Result<()> {
        if fs::metadata(file).is_ok_and(|meta| meta.len() > 0) {
            let shown = schema::show(file);
            return Err(Error::Refused(format!("there is a catalog at {shown} already")));
        }
        schema::create(file, store, time)?;
        Place::of(file)?.sync_dir()
    }

    /// The file of a replica's catalog, if it has one.
    pub fn file(&self, replica: ReplicaId) -> Option<PathBuf> {
        self.shared.readers.file(replica)
    }

    /// Replaces a replica's catalog by a copy of that of `from`, or of any other replica's, while
    /// they are in use; one that failed is in use again after it. Nothing is committed meanwhile.
    pub fn replace(&self, replica: ReplicaId, from: Option<ReplicaId>) -> Result<()> {
        let mut writers = self.shared.writers.lock();
        let sound = |id: &ReplicaId| *id != replica && writers[*id].is_some();
        let source = from.or_else(|| writers.ids().find(sound)).filter(sound);
        let source = source.and_then(|id| self.file(id));
        let (Some(to), Some(source)) = (self.file(replica), source) else {
            return Err(Error::Refused("no other replica has a catalog in use".into()));
        };
        self.shared.readers.close_on(replica);
        // If we die in between, the file is whole, the old one or the new.
        writers[replica] = None;
        let copied = Catalog::copy(&source, &to).and_then(|()| connect(&to, Use::Write));
        match copied {
            Ok(db) => {
                writers[replica] = Some(Writer::new(db));
                // Whoever opened the old file while it was replaced.
                self.shared.readers.close_on(replica);
                self.shared.foreseen.forget();
                self.shared.attach(replica);
                Ok(())
            }
            Err(error) => {
                self.shared.detach(replica, Some(Failure::from(&error)));
                Err(error)
            }
        }
    }

    /// Opens the replicas' catalogs for a mount; `None` for a replica that has none. All must have
    /// the same [`Head`]. `clean` tells that the last mount ended with [`Catalog::close`];
    /// otherwise ids that may have been handed out but never committed are skipped.
    pub fn open(files: ReplicaMap<Option<PathBuf>>, clean: bool) -> Result<Catalog> {
        Catalog::open_within(files, clean, TIMEOUT)
    }

    /// As [`Catalog::open`], where no call on a catalog may take longer than `timeout`.
    pub fn open_within(
        files: ReplicaMap<Option<PathBuf>>,
        clean: bool,
        timeout: Duration,
    ) -> Result<Catalog> {
        Catalog::open_by(files, clean, timeout, Box::new(Timestamp::now))
    }

    /// As [`Catalog::open`], with a wall clock of one's own.
    pub fn open_with_clock(
        files: ReplicaMap<Option<PathBuf>>,
        clean: bool,
        now: Box<dyn Fn() -> Timestamp + Send + Sync>,
    ) -> Result<Catalog> {
        Catalog::open_by(files, clean, TIMEOUT, now)
    }

    fn open_by(
        files: ReplicaMap<Option<PathBuf>>,
        clean: bool,
        timeout: Duration,
        now: Box<dyn Fn() -> Timestamp + Send + Sync>,
    ) -> Result<Catalog> {
        let lanes = Lanes::new();
        lanes.set_timeout(timeout);
        let mut writers = ReplicaMap::for_all(|_| None);
        let mut first: Option<(HeadRow, &Path, i64)> = None;
        let mut actors = (0, 1);
        for (id, file, opened) in open_all(&files, clean, &lanes)? {
            let head = opened.head;
            match &first {
                Some((other, other_file, _)) if other.head != head.head => {
                    return Err(Error::Refused(format!(
                        "the catalogs {} and {} differ: one must be copied to the other first",
                        schema::show(other_file),
                        schema::show(file)
                    )));
                }
                Some(_) => {}
                None => {
                    actors = opened.actors;
                    first = Some((head, file, opened.tick));
                }
            }
            writers[id] = Some(opened.writer);
        }
        let Some((mut head, _, tick)) = first else {
            return Err(Error::NoStore("no replica has a catalog".into()));
        };
        // A catalog without a batch is that of a store which was never in use: its ids are small.
        if !clean && head.head.sequence > 0 {
            head.next.node += SKIPPED_IDS;
            head.next.content += SKIPPED_IDS;
            head.next.snapshot += 1;
            head.next.xattrs += SKIPPED_IDS;
            head.next.chunk += SKIPPED_IDS;
            head.next.pack += SKIPPED_IDS;
        }
        let shared = Arc::new(new_shared(files, writers, &head, tick, (now, lanes), false));
        {
            let mut queue = shared.waiting.queue.lock();
            queue.sequence = head.head.sequence;
            queue.open.acts = Acts::after_actor(actors.0);
            queue.actors = Known::new(actors.1);
        }
        if clean {
            // A clean end was durable: a mount that changes nothing leaves the head as it is, so
            // that a replica which missed only such mounts has missed nothing.
            let mut queue = shared.waiting.queue.lock();
            queue.durable = head.head.generation;
            queue.durable_sequence = head.head.sequence;
        }
        let committer = std::thread::Builder::new()
            .name("rv-commit".into())
            .spawn({
                let shared = shared.clone();
                move || shared.run()
            })
            .context("start the committer of", "the catalog")?;
        let catalog = Catalog { shared, committer: Mutex::new(Some(committer)), held: None };
        catalog.set_timeout(timeout);
        Ok(catalog)
    }

    /// Opens one catalog for queries only, beside a mount or without one.
    pub fn open_read_only(file: &Path) -> Result<Catalog> {
        let db = connect(file, Use::Read)?;
        schema::refuse_old(&db, file)?;
        let (head, tick) = read_start(&db).map_err(|error| name_damage(file, error))?;
        check_head(file, &head)?;
        let files = ReplicaMap::new(vec![Some(file.to_path_buf())]);
        let writers = ReplicaMap::for_all(|_| None);
        let now = Box::new(Timestamp::now);
        let shared = new_shared(files, writers, &head, tick, (now, Lanes::new()), true);
        let shared = Arc::new(shared);
        Ok(Catalog { shared, committer: Mutex::new(None), held: None })
    }

    /// As [`Catalog::open_read_only`], where no mount has it open and none can meanwhile. A disk
    /// that dies costs an error, and not the process: no file of it is mapped.
    pub fn open_held(file: &Path) -> Result<Catalog> {
        let held = connect(file, Use::Hold)?;
        let mut catalog = Catalog::open_read_only(file)?;
        catalog.held = Some(Mutex::new(held));
        Ok(catalog)
    }

    /// Removes what readers of a catalog left beside it, if nobody has it open.
    pub fn tidy(file: &Path) -> Result<()> {
        let held = connect(file, Use::Hold)?;
        held.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
        held.place().beside("-shm")?.remove()?;
        // SQLite removes the log, which is empty, with the last one who has it open.
        Ok(held.close()?)
    }

    /// Commits all, durably, and ends the committer. Later pushes fail.
    pub fn close(&self) -> Result<()> {
        if self.shared.read_only {
            self.shared.close_readers();
            return Ok(());
        }
        {
            let mut queue = self.shared.waiting.queue.lock();
            queue.closed = Some("the catalog is closed");
        }
        let flushed = match self.committer.lock().take() {
            Some(committer) => {
                let flushed = self.flush(Durability::Durable);
                self.shared.stop();
                let _ = committer.join();
                flushed
            }
            None => Ok(()),
        };
        self.shared.close_readers();
        let mut writers = self.shared.writers.lock();
        self.shared.copies.lock().end();
        let mut turns = Vec::new();
        for id in writers.ids() {
            let Some(mut writer) = writers[id].take() else { continue };
            let turn = self.shared.lanes.begin(id, writer.device, move || {
                if let Err(error) = tighten(&writer.db, writer.written) {
                    // It is as it was: the room is what is missing, most likely.
                    log::info!("the catalog of replica {} is not tightened: {error}", id.index());
                }
                let head = read_head_only(&writer.db)?;
                writer.with_sums(|sums| sums.note(true).map(|_| ()));
                finish(writer.db)?;
                // Torn, lost or not written they say nothing.
                if let Some(mut sums) = writer.sums
                    && let Err(error) = sums.leave(&head.chain)
                {
                    log::info!("the sums of a catalog's pages are not kept: {error}");
                }
                Ok::<_, rusqlite::Error>(head)
            });
            turns.push((id, turn));
        }
        for (id, turn) in turns {
            match self.shared.lanes.wait(id, turn) {
                Some(Ok(head)) => self.shared.ended.lock()[id] = Some(head),
                Some(Err(error)) => self.shared.detach(id, Some(error.into())),
                None => self.shared.detach(id, Some(Failure::Hangs)),
            }
        }
        flushed
    }

    /// The head that a replica's catalog was closed with, if that went well. To read it from the
    /// file would leave files of SQLite's beside it.
    pub fn closed_head(&self, replica: ReplicaId) -> Option<Head> {
        self.shared.ended.lock()[replica].clone()
    }

    /// A new node id.
    pub fn next_node(&self) -> NodeId {
        let id = self.shared.ids.node.fetch_add(1, Ordering::Relaxed);
        debug_assert!(id < NodeId::LIMIT);
        NodeId(id)
    }

    /// The id that the next new node gets.
    pub fn upcoming_node(&self) -> NodeId {
        NodeId(self.shared.ids.node.load(Ordering::Relaxed))
    }

    /// A new content id, greater than all before it.
    pub fn next_content(&self) -> ContentId {
        ContentId(self.shared.ids.content.fetch_add(1, Ordering::Relaxed))
    }

    /// The id that the next new content gets.
    pub fn upcoming_content(&self) -> ContentId {
        ContentId(self.shared.ids.content.load(Ordering::Relaxed))
    }

    /// A new chunk id.
    pub fn next_chunk(&self) -> ChunkId {
        ChunkId(self.shared.ids.chunk.fetch_add(1, Ordering::Relaxed))
    }

    /// A new pack id.
    pub fn next_pack(&self) -> PackId {
        PackId(self.shared.ids.pack.fetch_add(1, Ordering::Relaxed))
    }

    /// A new snapshot id.
    pub fn next_snapshot(&self) -> SnapshotId {
        SnapshotId(self.shared.ids.snapshot.fetch_add(1, Ordering::Relaxed))
    }
}

impl Drop for Catalog {
    /// Commits what waits (not durably) and ends the committer, if [`Catalog::close`] did not.
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(committer) = self.committer.lock().take() {
            let _ = committer.join();
        }
        // Closing can hang as well.
        self.shared.close_readers();
        if let (Some(held), Some(id)) = (self.held.take(), ReplicaId::all().next()) {
            let turn = self.shared.lanes.begin(id, None, move || drop(held));
            self.shared.lanes.wait(id, turn);
        }
    }
}

/// What the opening of one catalog finds.
struct Opened {
    writer: Writer,
    head: HeadRow,
    tick: i64,
    /// See [`actor::read_last`].
    actors: (u64, u64),
}

/// Opens all at once, each by its replica's own thread.
fn open_all<'a>(
    files: &'a ReplicaMap<Option<PathBuf>>,
    clean: bool,
    lanes: &Lanes,
) -> Result<Vec<(ReplicaId, &'a Path, Opened)>> {
    let begin = |(id, file): (ReplicaId, &'a Option<PathBuf>)| {
        let file = file.as_deref()?;
        let own = file.to_path_buf();
        let open = move |alive: &Alive| open_one(&own, clean, alive);
        Some((id, file, lanes.begin_alive(id, None, open)))
    };
    let turns: Vec<_> = files.iter().filter_map(begin).collect();
    let mut opened = Vec::new();
    let mut failure = None;
    for (id, file, turn) in turns {
        let hangs = || Err(Errno::TIMEDOUT).context("open the catalog", file);
        match lanes.wait(id, turn).unwrap_or_else(hangs) {
            Ok(one) => opened.push((id, file, one)),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    let Some(error) = failure else { return Ok(opened) };
    for (id, _, one) in opened {
        let turn = lanes.begin(id, None, move || drop(one));
        lanes.wait(id, turn);
    }
    Err(error)
}

fn open_one(file: &Path, clean: bool, alive: &Alive) -> Result<Opened> {
    let db = connect_alive(Place::of(file)?, Use::Write, alive)?;
    let (head, tick) = read_start(&db).map_err(|error| name_damage(file, error))?;
    check_head(file, &head)?;
    let actors = actor::read_last(&db).map_err(|error| name_damage(file, error))?;
    let mut writer = Writer::new(db);
    let chain = &head.head.chain;
    writer.with_sums(|sums| sums.take_up(clean.then_some(chain)));
    Ok(Opened { writer, head, tick, actors })
}

fn new_shared(
    files: ReplicaMap<Option<PathBuf>>,
    writers: ReplicaMap<Option<Writer>>,
    head: &HeadRow,
    tick: i64,
    (now, lanes): (Box<dyn Fn() -> Timestamp + Send + Sync>, Lanes),
    read_only: bool,
) -> Shared {
    let mut queue = Queue::new(head.head.generation, head.next, TickClock::new(tick));
    if read_only {
        queue.closed = Some("the catalog is open for reading only");
    }
    Shared {
        waiting: Waiting::new(queue),
        writers: Mutex::new(writers),
        lanes,
        copies: Mutex::new(Copies::new()),
        kept: Mutex::new(None),
        readers: Readers::new(files),
        ids: Ids::new(head.next),
        xattrs: Interned::new(),
        foreseen: Foreseen::default(),
        snapshots: Mutex::new(()),
        failures: Mutex::new(Vec::new()),
        ended: Mutex::new(ReplicaMap::for_all(|_| None)),
        read_only,
        epoch: AtomicU64::new(0),
        snapshot_changes: AtomicU64::new(0),
        snapshot_watch: OnceLock::new(),
        snapshot_list: Mutex::default(),
        now,
    }
}

/// The head and the last tick.
fn read_start(db: &Connection) -> rusqlite::Result<(HeadRow, i64)> {
    let tick: Option<i64> =
        db.query_row("SELECT t FROM tick WHERE g = (SELECT max(g) FROM tick)", [], |row| {
            row.get(0)
        })?;
    Ok((read_head(db)?, tick.unwrap_or(0)))
}

/// Refuses counters that would overflow within this mount.
fn check_head(file: &Path, head: &HeadRow) -> Result<()> {
    let next = head.next;
    let far = 1 << 62;
    let bounded = [
        head.head.generation.0,
        head.head.sequence,
        next.content,
        next.snapshot,
        next.xattrs,
        next.chunk,
        next.pack,
    ];
    if next.node >= NodeId::LIMIT - SKIPPED_IDS || bounded.iter().any(|&value| value > far) {
        return Err(damaged(file, "a counter in its head row is beyond all bounds".into()));
    }
    Ok(())
}

/// Writes the database anew, without the room that rows left when they grew or went, if this mount
/// wrote so much that there is some: a tenth of the rows that it may hold. One that would take long
/// stays as it is.
fn tighten(db: &Connection, written: usize) -> rusqlite::Result<()> {
    let pragma = |name: &str| -> rusqlite::Result<u64> {
        let value: i64 = db.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))?;
        Ok(value.max(0) as u64)
    };
    let bytes = pragma("page_count")? * pragma("page_size")?;
    if bytes > TIGHTENED_BYTES || (written as u64) < bytes / CHANGE_BYTES / 10 {
        return Ok(());
    }
    db.execute_batch("VACUUM")
}

/// Moves the WAL into the database and closes it, so that the one file is all there is.
pub(super) fn finish(db: Db) -> rusqlite::Result<()> {
    db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    db.flush_prepared_statement_cache();
    db.close()
}

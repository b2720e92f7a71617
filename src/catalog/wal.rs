//! Copying the WAL into the database.
//!
//! A commit waits for the one before it and whoever flushes waits for a commit, so the copying of a
//! large WAL, with its two syncs, must not stand between two commits. It is done by a connection of
//! its own on a thread of its own, beside the commits (a PASSIVE checkpoint waits for nobody:
//! <https://sqlite.org/pragma.html#pragma_wal_checkpoint>). What was committed meanwhile is copied
//! in the same way, until it is little: that is copied between two commits, for without that the
//! WAL would never be whole in the database, and never begin anew.

use std::time::Duration;

use rusqlite::Connection;

use super::Shared;
use super::commit::Writer;
use super::failure::Failure;
use super::lane::{Lanes, Turn};
use super::schema::{BUSY_MS, Use, connect};
use super::sums::Sums;
use crate::types::{ReplicaId, ReplicaMap};

/// Pages of a busy writer's WAL after which it is copied into the database: 32 MiB, of which it
/// may reach twice as much meanwhile. SQLite cuts a longer file off in the next commit, which takes
/// 12 ms where that frees 110 MiB.
const WAL_PAGES_MAX: usize = 8192;
/// So many may be copied while commits wait: one or two milliseconds.
const REST_PAGES_MAX: usize = 1024;
/// Copies beside the commits, one after another: who commits faster than can be copied is made to
/// wait then.
const COPIES_MAX: u32 = 8;

/// How long after the last commit the WAL is emptied into the database.
pub(super) const IDLE: Duration = Duration::from_secs(2);
/// How long after it was found to run a copy is looked at again where nobody commits.
const COPY_LOOK: Duration = Duration::from_millis(50);

/// A disk with less room than this is nearly full: what is kept free of ours there, and some.
const SHORT_BYTES: u64 = 16 << 20;
/// The largest WAL there, about.
const WAL_BYTES_WHERE_SHORT: u64 = 256 << 10;

/// The copies that run beside the commits.
pub(super) struct Copies {
    lanes: Lanes,
    running: ReplicaMap<Option<Turn<Result<(), Failure>>>>,
}

impl Copies {
    pub fn new() -> Copies {
        Copies { lanes: Lanes::new(), running: ReplicaMap::for_all(|_| None) }
    }

    /// No copy is waited for longer.
    pub fn set_timeout(&self, timeout: Duration) {
        self.lanes.set_timeout(timeout);
    }

    /// Begins to copy a replica's WAL, of which no copy runs.
    fn begin(&mut self, id: ReplicaId, writer: &mut Writer) {
        (writer.in_wal, writer.copying) = (0, true);
        writer.copies += 1;
        let file = writer.db.file().to_path_buf();
        if self.running[id].take().is_some() {
            // Of a catalog that was taken out meanwhile: it may hang.
            self.lanes.leave(id);
        }
        let copy = move || copy(&file).map_err(|error| Failure::from(&error));
        self.running[id] = Some(self.lanes.begin(id, writer.device, copy));
    }

    /// What came of the copy for a writer, if it has ended by now.
    fn ended(&mut self, id: ReplicaId, writer: &Writer) -> Option<Result<(), Failure>> {
        if !writer.copying {
            return None;
        }
        let outcome = match &mut self.running[id] {
            Some(turn) => self.lanes.ended(id, turn)?,
            None => Some(Ok(())),
        };
        self.running[id] = None;
        // It hangs, or there was no thread for it. What is wrong with the disk a commit finds.
        Some(outcome.unwrap_or_else(|| {
            log::warn!("the WAL of replica {} is copied later", id.index());
            Ok(())
        }))
    }

    /// Waits for the copies that run: nothing else may have the databases open when they close.
    pub fn end(&mut self) {
        for id in self.running.ids() {
            if let Some(turn) = self.running[id].take()
                && let Some(Err(error)) = self.lanes.wait(id, turn)
            {
                log::warn!("the WAL of replica {} was not copied: {error}", id.index());
            }
        }
    }
}

fn copy(file: &std::path::Path) -> crate::error::Result<()> {
    // Where processors are few a commit of some rows would wait for its turn as long as a copy of
    // megabytes takes.
    crate::sys::give_way();
    let db = match connect(file, Use::Write) {
        Ok(db) => db,
        // For want of descriptors, perhaps. What is wrong with the file itself a commit finds.
        Err(error) => {
            log::warn!("a WAL is copied later: {error}");
            return Ok(());
        }
    };
    db.busy_timeout(Duration::ZERO)?;
    checkpoint(&db, "PASSIVE")?;
    Ok(())
}

impl Writer {
    /// Copies the WAL into the database. That something is in its way is no error, the next time
    /// will do; `wait` tells how long it is waited for: commits wait meanwhile.
    fn copy_wal(&mut self, how: &str, wait: Duration) -> rusqlite::Result<Copied> {
        self.note_pages(0);
        self.db.busy_timeout(wait)?;
        let copied = checkpoint(&self.db, how);
        self.db.busy_timeout(Duration::from_millis(BUSY_MS))?;
        let copied = copied?;
        (self.in_wal, self.copies, self.is_short_of_room) = (0, 0, false);
        self.dirty = self.dirty && (copied == Copied::Busy || how == "PASSIVE");
        if copied == Copied::Whole {
            self.with_sums(Sums::settle);
        }
        Ok(copied)
    }

    /// Brings an idle catalog to rest, a step at a time. The WAL is emptied last: where it is empty
    /// the database is whole, and any bit of it that turns from then on is known to have turned.
    fn rest(&mut self) -> rusqlite::Result<()> {
        if self.copy_wal("PASSIVE", Duration::ZERO)? != Copied::Whole {
            return Ok(());
        }
        self.with_sums(Sums::sum_some);
        if !self.has_copied() {
            self.copy_wal("TRUNCATE", Duration::ZERO)?;
        }
        Ok(())
    }

    /// Whether sums of pages have to be taken.
    fn has_copied(&self) -> bool {
        self.sums.as_ref().is_some_and(Sums::has_copied)
    }

    /// Notes the pages that a commit of so many changes has put into the WAL.
    pub fn note_pages(&mut self, changes: usize) {
        let (quiet, mut pages) = (!self.copying, changes);
        self.with_sums(|sums| {
            pages = sums.note(quiet)?;
            Ok(())
        });
        self.in_wal += pages;
    }

    /// Looks whether the WAL takes more than it should on a disk that is nearly full: commits are
    /// not to fail for what those before them left.
    pub fn look_for_room(&mut self) {
        let free = rustix::fs::fstatvfs(self.db.dir());
        let few = free.is_ok_and(|free| free.f_bavail.saturating_mul(free.f_frsize) < SHORT_BYTES);
        let wal = || self.db.place().beside("-wal").map_or(0, |wal| wal.size());
        self.is_short_of_room = few && wal() > WAL_BYTES_WHERE_SHORT;
    }

    /// Gives the blocks of the WAL back where the disk is full: what is in it becomes part of the
    /// database, most of whose pages have their blocks already.
    pub fn empty_wal(&mut self) -> rusqlite::Result<()> {
        self.copy_wal("TRUNCATE", Duration::from_millis(BUSY_MS)).map(|_| ())
    }
}

impl Shared {
    /// Moves the WAL into the database: all of it when idle or where its disk is nearly full, else
    /// when it has grown large. A failure costs the replica its place, as a failed commit does.
    /// Tells after how long something is left to do, if nobody commits meanwhile.
    pub fn checkpoint(&self, idle: bool) -> Option<Duration> {
        let mut writers = self.writers.lock();
        let mut copies = self.copies.lock();
        let mut turns = Vec::new();
        for id in writers.ids() {
            let Some(writer) = &mut writers[id] else { continue };
            let ended = copies.ended(id, writer);
            writer.copying &= ended.is_none();
            let is_little = writer.in_wal <= REST_PAGES_MAX || writer.copies >= COPIES_MAX;
            let is_due = writer.in_wal >= WAL_PAGES_MAX || (idle && writer.dirty);
            let step = match ended {
                Some(Err(error)) => {
                    self.detach(id, Some(error));
                    continue;
                }
                None if writer.copying => continue,
                _ if writer.dirty && writer.is_short_of_room => Step::Copy("TRUNCATE"),
                // The rest of it.
                Some(Ok(())) if is_little && !idle => Step::Copy("PASSIVE"),
                _ if idle && writer.dirty && is_little => Step::Empty,
                Some(Ok(())) if writer.dirty => Step::Begin,
                None if is_due => Step::Begin,
                _ if writer.has_copied() => Step::Sum,
                _ => continue,
            };
            if matches!(step, Step::Begin) {
                copies.begin(id, writer);
                continue;
            }
            let Some(mut writer) = writers[id].take() else { continue };
            let device = writer.device;
            let work = move || {
                let done = match step {
                    Step::Copy(how) => writer.copy_wal(how, Duration::ZERO).map(|_| ()),
                    Step::Empty => writer.rest(),
                    _ => {
                        writer.with_sums(Sums::sum_some);
                        Ok(())
                    }
                };
                (writer, done)
            };
            turns.push((id, self.lanes.begin(id, device, work)));
        }
        drop(copies);
        for (id, turn) in turns {
            match self.lanes.wait(id, turn) {
                Some((writer, Ok(()))) => writers[id] = Some(writer),
                Some((writer, Err(error))) => {
                    self.detach(id, Some(error.into()));
                    self.lanes.discard(id, writer);
                }
                None => self.detach(id, Some(Failure::Hangs)),
            }
        }
        let left = writers.iter().filter_map(|(_, writer)| {
            let writer = writer.as_ref()?;
            match () {
                () if writer.copying => Some(COPY_LOOK),
                () if writer.has_copied() => Some(Duration::ZERO),
                // A reader is in the way.
                () => writer.dirty.then_some(IDLE),
            }
        });
        left.min()
    }
}

/// What is done for a WAL between two commits.
enum Step {
    /// Begins to copy it beside the commits.
    Begin,
    /// Copies it.
    Copy(&'static str),
    /// Copies it, takes sums and empties it.
    Empty,
    /// Takes sums of pages that it was copied into.
    Sum,
}

/// What a checkpoint has done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copied {
    /// All of the WAL is in the database.
    Whole,
    /// A part of it is.
    Part,
    /// A reader or writer was in its way.
    Busy,
}

/// Runs a checkpoint, which waits for what is in its way as long as `db` is told to.
fn checkpoint(db: &Connection, how: &str) -> rusqlite::Result<Copied> {
    let (busy, frames, copied): (i64, i64, i64) =
        db.query_row(&format!("PRAGMA wal_checkpoint({how})"), [], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
    Ok(match busy {
        0 if frames == copied => Copied::Whole,
        0 => Copied::Part,
        _ => Copied::Busy,
    })
}

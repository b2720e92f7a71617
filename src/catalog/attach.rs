//! A replica's catalog joins while the others go on being written.
//!
//! A copy of one moment is taken from a replica in use. The batches committed from before that
//! moment on are kept in memory and applied to the copy until it has caught up; the last of them
//! while no commit runs, and from then on the copy is written as the others are. Every batch is
//! checked: the copy must arrive at the same hash chain.
//!
//! Not durable by itself: the caller makes the replica's filesystem durable before it calls the
//! replica whole.

use std::collections::VecDeque;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};
use rustix::io::Errno;

use super::apply::{Committed, apply};
use super::commit::Writer;
use super::copy::{BACKUP_PAGES, new_beside, put_in_place};
use super::database::{self, Db, Place};
use super::open::finish;
use super::overlay::Batch;
use super::schema::{Use, connect, is_whole, name_damage, read_head, read_head_only, while_alive};
use super::{Catalog, Durability, Shared};
use crate::error::{Error, IoContext, Result};
use crate::sys::device::Alive;
use crate::sys::patience::Patience;
use crate::sys::sqlite::with_patience_but_on;
use crate::types::{Kind, NodeId, ReplicaId};

/// Changes kept for a copy in the making: some 100 MB. A copy that cannot keep up within them is
/// given up, and made anew by whoever wants it.
const KEPT_CHANGES_MAX: usize = 1 << 20;

/// The batches kept for a copy.
#[derive(Default)]
pub(super) struct Kept {
    batches: VecDeque<(Committed, Arc<Batch>)>,
    changes: usize,
    /// More was committed than may be kept.
    overrun: bool,
}

impl Shared {
    /// Keeps a batch that was committed, if a copy is in the making. To be called before the next
    /// commit can begin.
    pub(super) fn keep(&self, committed: &Committed, batch: &Arc<Batch>) {
        if let Some(kept) = &mut *self.kept.lock() {
            kept.changes += batch.count + 1;
            kept.overrun |= kept.changes > KEPT_CHANGES_MAX;
            if kept.overrun {
                kept.batches.clear();
            } else {
                kept.batches.push_back((committed.clone(), batch.clone()));
            }
        }
    }
}

/// A copy of the catalog that is to join. Dropped, it is a catalog of an earlier moment.
///
/// What is written to it is written by the replica's own thread: where its disk hangs, whoever
/// waits is told in time.
pub struct Joining<'a> {
    catalog: &'a Catalog,
    replica: ReplicaId,
    file: PathBuf,
    writer: Option<Writer>,
    sequence: u64,
}

impl Drop for Joining<'_> {
    fn drop(&mut self) {
        *self.catalog.shared.kept.lock() = None;
        let _ = self.write(|writer| finish(writer.db));
    }
}

/// What differs between the live trees of two catalogs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differing {
    /// Nodes that are no directories, with another state.
    pub files: Vec<NodeId>,
    /// Directories with another state or other entries.
    pub dirs: Vec<NodeId>,
    /// Bytes of the files.
    pub bytes: u64,
}

impl Catalog {
    /// To compare the live tree with that of the catalog in `older`, an earlier one of this store
    /// that nobody writes.
    pub fn comparing(&self, older: &Path) -> Result<Comparing> {
        self.flush(Durability::Written)?;
        let (own, patience) = self.shared.readers.chosen().ok_or(Errno::IO)?;
        Ok(Comparing { own, older: older.to_path_buf(), patience })
    }

    /// Replaces the catalog in `to`, which is not open, by a copy of the present one, while that
    /// goes on being written, for `replica`. `step` is called now and then and may end the work.
    /// One copy at a time.
    pub fn copy_live(
        &self,
        replica: ReplicaId,
        to: &Path,
        step: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Joining<'_>> {
        {
            let mut kept = self.shared.kept.lock();
            if kept.is_some() {
                return Err(Error::InUse("another replica's catalog is being copied".into()));
            }
            *kept = Some(Kept::default());
        }
        let file = to.to_path_buf();
        // From here on its drop ends the keeping.
        let mut joining = Joining { catalog: self, replica, file, writer: None, sequence: 0 };
        let place = Place::of(to)?;
        let mut ended = Ok(());
        // Pinned for the length of the copy, which is then the state of one commit.
        self.shared.read_at_once(|db| {
            let Ok(new) = new_beside(&place) else {
                return Err(rusqlite::Error::InvalidPath(to.to_path_buf()));
            };
            joining.sequence = read_head(db)?.head.sequence;
            let mut target = new.open_new()?;
            let backup = Backup::new(db, &mut target)?;
            loop {
                ended = step();
                if ended.is_err() || backup.step(BACKUP_PAGES)? == StepResult::Done {
                    break;
                }
            }
            drop(backup);
            target.close()
        })?;
        ended?;
        put_in_place(&place, &Alive::default())?;
        let db = connect(to, Use::Write)?;
        joining.writer = Some(Writer::new(db));
        joining.catch_up()?;
        Ok(joining)
    }
}

/// What compares two catalogs, by whatever thread.
pub struct Comparing {
    own: PathBuf,
    older: PathBuf,
    /// For the own one.
    patience: Arc<Patience>,
}

impl Comparing {
    /// What the live tree has otherwise. Bounded by whoever looks after the disk of the older one:
    /// what is read of the other is waited for no longer than a query would. Neither is taken to be
    /// at fault for what is wrong with the other.
    pub fn run(self, alive: &Alive) -> Result<Differing> {
        let mut found = Differing::default();
        let mut is_own = false;
        let mut db = connect(&self.own, Use::Read)?;
        let ask = |db: &mut Db| {
            database::attach(db, &self.older, || {
                collect_differing(db, &mut found).inspect_err(|_| is_own = is_whole(db, "old"))
            })
        };
        let device = std::fs::metadata(&self.older).context("look at", &self.older)?.dev();
        let ask = || while_alive(&mut db, alive, ask);
        let compared = with_patience_but_on(device, &self.patience, ask);
        match compared {
            Ok(()) => Ok(found),
            Err(_) if self.patience.is_over() => Err(Errno::TIMEDOUT).context("read", self.own),
            Err(error) if is_own => Err(name_damage(&self.own, error)),
            Err(error) => Err(name_damage(&self.older, error)),
        }
    }
}

fn collect_differing(db: &Connection, found: &mut Differing) -> rusqlite::Result<()> {
    let mut nodes = db.prepare(
        "SELECT n.id, n.kind, n.size FROM node n LEFT JOIN old.node o ON o.id = n.id \
         WHERE (n.kind, n.mode, n.uid, n.gid, n.rdev, n.size, n.mtime, n.xattrs, n.content) \
         IS NOT (o.kind, o.mode, o.uid, o.gid, o.rdev, o.size, o.mtime, o.xattrs, o.content)",
    )?;
    let mut rows = nodes.query([])?;
    while let Some(row) = rows.next()? {
        match row.get(1)? {
            Kind::Dir => found.dirs.push(row.get(0)?),
            kind => {
                found.files.push(row.get(0)?);
                found.bytes += if kind == Kind::File { row.get::<_, i64>(2)? as u64 } else { 0 };
            }
        }
    }
    let mut parents = db.prepare(
        "SELECT DISTINCT e.parent FROM entry e LEFT JOIN old.entry o \
         ON o.parent = e.parent AND o.name = e.name WHERE o.node IS NOT e.node \
         UNION SELECT DISTINCT o.parent FROM old.entry o LEFT JOIN entry e \
         ON e.parent = o.parent AND e.name = o.name WHERE e.node IS NULL",
    )?;
    let mut rows = parents.query([])?;
    while let Some(row) = rows.next()? {
        found.dirs.push(row.get(0)?);
    }
    found.dirs.sort_unstable();
    found.dirs.dedup();
    Ok(())
}

impl Joining<'_> {
    /// Applies what was committed before the call. What is committed while it runs is the next
    /// call's: beside commits that are faster than we are, this would never end.
    pub fn catch_up(&mut self) -> Result<()> {
        let waiting = self.catalog.shared.kept.lock().as_ref().map_or(0, |kept| kept.batches.len());
        for turn in 0..=waiting {
            let next = {
                let mut kept = self.catalog.shared.kept.lock();
                let Some(kept) = &mut *kept else { return Ok(()) };
                if kept.overrun {
                    let text = "the catalog grows faster than it can be copied: it is tried again";
                    return Err(Error::Refused(text.into()));
                }
                if turn == waiting {
                    return Ok(());
                }
                let next = kept.batches.pop_front();
                kept.changes -= next.as_ref().map_or(0, |(_, batch)| batch.count + 1);
                next
            };
            let Some((committed, batch)) = next else { return Ok(()) };
            if committed.sequence > self.sequence {
                self.take(&committed, batch)?;
            }
        }
        Ok(())
    }

    /// Does something with the copy, which is given up where that hangs; `None` if there is none.
    fn write<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(Writer) -> T + Send + 'static,
    ) -> Result<Option<T>> {
        let Some(writer) = self.writer.take() else { return Ok(None) };
        let lanes = &self.catalog.shared.lanes;
        let turn = lanes.begin(self.replica, writer.device, move || work(writer));
        match lanes.wait(self.replica, turn) {
            Some(answer) => Ok(Some(answer)),
            None => Err(Errno::TIMEDOUT).context("write", &self.file),
        }
    }

    fn take(&mut self, committed: &Committed, batch: Arc<Batch>) -> Result<()> {
        let done = self.write(move |mut writer| {
            writer.in_wal += batch.count + 1;
            (apply(&mut writer.db, &batch.plan()), writer)
        })?;
        let Some((applied, writer)) = done else { return Ok(()) };
        self.writer = Some(writer);
        let own = applied.map_err(|error| name_damage(&self.file, error))?;
        if own != *committed {
            return Err(self.differs());
        }
        self.sequence = own.sequence;
        Ok(())
    }

    fn differs(&self) -> Error {
        Error::Damaged {
            what: format!("the catalog {}", self.file.display()),
            detail: "its copy does not arrive at the state of the original".into(),
            remedy: "It is copied again; if that repeats, check the disk",
        }
    }

    /// From here on the copy is the catalog of its replica, and every commit goes to it too.
    pub fn attach(mut self) -> Result<()> {
        let (shared, replica) = (&self.catalog.shared, self.replica);
        // No commit runs while this is held, and what was committed before is kept already.
        let mut writers = shared.writers.lock();
        self.catch_up()?;
        let asked = self.write(|writer| (read_head_only(&writer.db), writer))?;
        let Some((own, writer)) = asked else { return Ok(()) };
        let own = own?;
        if let Some(other) = writers.iter().find_map(|(_, writer)| writer.as_ref())
            && read_head_only(&other.db)? != own
        {
            return Err(self.differs());
        }
        writers[replica] = Some(writer);
        shared.failures.lock().retain(|(id, _)| *id != replica);
        shared.readers.join(replica, self.file.clone());
        Ok(())
    }
}

//! Snapshots: named generations.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::retain::visible;
use super::schema::{Time, read_head};
use super::{Catalog, Change, Durability, ForgetChange, Snapshot};
use crate::error::{Error, Result};
use crate::types::{EntryName, Generation, SnapshotId, escape};

/// The place of what [`Catalog::durable_to`] tells.
const DURABLE_TO: &str = "durable_to";
/// The longest name, in bytes: room for what the snapshot folder adds to it.
const NAME_BYTES_MAX: usize = 200;
/// Names told when one is not found.
const NEAREST_MAX: usize = 3;
/// Snapshots that go with one commit.
const DELETED_MAX: usize = 128;
const COLUMNS: &str = "id, name, g, time, automatic, held, tags";

/// Is told whenever snapshots are made, renamed or removed, with those whose names mean nothing any
/// more. Called by whoever did it, under locks: it must not wait for anything.
pub type SnapshotWatch = Box<dyn Fn(&[&Snapshot]) + Send + Sync>;

impl Catalog {
    /// All snapshots, oldest first (by generation, then id). The list is kept until it changes: a
    /// hundred thousand of them take longer to read than to show.
    pub fn snapshots(&self) -> Result<Arc<Vec<Snapshot>>> {
        // Counted before the list is read: what changes meanwhile makes it an old one.
        let changes = self.snapshot_epoch();
        if let Some((at, list)) = &*self.shared.snapshot_list.lock()
            && *at == changes
            && !self.shared.read_only
        {
            return Ok(list.clone());
        }
        let list = Arc::new(self.read_snapshots()?);
        *self.shared.snapshot_list.lock() = Some((changes, list.clone()));
        Ok(list)
    }

    /// Grows with every change of the snapshots. Asked before a snapshot is, it tells later whether
    /// the answer still holds.
    pub fn snapshot_epoch(&self) -> u64 {
        self.shared.snapshot_changes.load(Ordering::Acquire)
    }

    /// Has every change of the snapshots told from now on; once.
    pub fn watch_snapshots(&self, watch: SnapshotWatch) {
        let _ = self.shared.snapshot_watch.set(watch);
    }

    fn tell_watch(&self, nameless: &[&Snapshot]) {
        if let Some(watch) = self.shared.snapshot_watch.get() {
            watch(nameless);
        }
    }

    fn read_snapshots(&self) -> Result<Vec<Snapshot>> {
        self.settle_snapshots()?;
        self.shared.read(|db| {
            // In the order of the table, which is nearly theirs: by an index each would be looked
            // for.
            let sql = format!("SELECT {COLUMNS} FROM snapshot ORDER BY id");
            let mut statement = db.prepare_cached(&sql)?;
            let rows = statement.query_map([], snapshot_row)?;
            let mut list = rows.collect::<rusqlite::Result<Vec<Snapshot>>>()?;
            list.sort_by_key(|snapshot| (snapshot.generation, snapshot.id));
            Ok(list)
        })
    }

    /// The snapshot of this name.
    pub fn snapshot(&self, name: &str) -> Result<Option<Snapshot>> {
        self.settle_snapshots()?;
        self.shared.read(|db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM snapshot WHERE name = ?1"))?
                .query_row(params![name], snapshot_row)
                .optional()
        })
    }

    /// The snapshot of this id.
    pub fn snapshot_of(&self, id: SnapshotId) -> Result<Option<Snapshot>> {
        self.settle_snapshots()?;
        self.shared.read(|db| {
            db.prepare_cached(&format!("SELECT {COLUMNS} FROM snapshot WHERE id = ?1"))?
                .query_row(params![id], snapshot_row)
                .optional()
        })
    }

    /// The newest snapshot.
    pub fn latest_snapshot(&self) -> Result<Option<Snapshot>> {
        self.settle_snapshots()?;
        self.shared.read(|db| {
            let sql = format!("SELECT {COLUMNS} FROM snapshot ORDER BY g DESC, id DESC LIMIT 1");
            db.prepare_cached(&sql)?.query_row([], snapshot_row).optional()
        })
    }

    /// The newest snapshot that was made by a schedule.
    pub fn latest_automatic(&self) -> Result<Option<Snapshot>> {
        self.settle_snapshots()?;
        self.shared.read(|db| {
            let sql = format!(
                "SELECT {COLUMNS} FROM snapshot WHERE automatic ORDER BY g DESC, id DESC LIMIT 1"
            );
            db.prepare_cached(&sql)?.query_row([], snapshot_row).optional()
        })
    }

    /// Names the generation `at`. `Refused` for a name that is taken or not allowed. Durable when
    /// it returns, by one commit with all that was pushed before.
    pub fn create_snapshot(
        &self,
        name: &str,
        at: Generation,
        automatic: bool,
        tags: &[String],
    ) -> Result<Snapshot> {
        self.make_snapshot(name, at, automatic, tags, Vec::new())
    }

    /// The same where all that the catalog knows of at `at` is durable on every replica in use,
    /// which is recorded with it: see [`Catalog::durable_to`].
    pub fn create_durable_snapshot(
        &self,
        name: &str,
        at: Generation,
        automatic: bool,
        tags: &[String],
    ) -> Result<Snapshot> {
        let durable = Change::MetaPut { key: DURABLE_TO, value: at.0.to_string() };
        self.make_snapshot(name, at, automatic, tags, vec![durable])
    }

    /// Up to this generation all bytes and names were durable when the last snapshot of that kind
    /// was made.
    pub fn durable_to(&self) -> Result<Generation> {
        let text = self.meta(DURABLE_TO)?;
        Ok(Generation(text.and_then(|text| text.parse().ok()).unwrap_or(0)))
    }

    fn make_snapshot(
        &self,
        name: &str,
        at: Generation,
        automatic: bool,
        tags: &[String],
        mut changes: Vec<Change>,
    ) -> Result<Snapshot> {
        check_name(name)?;
        let _names = self.shared.snapshots.lock();
        self.check_free(name)?;
        let newest = self.generation();
        // What is not committed yet is frozen, and goes with the snapshot's own commit.
        let at = if at <= self.committed().0 { at } else { at.min(self.freeze()) };
        self.settle_late()?;
        // What became invisible since the caller chose it does not become visible again. What is
        // visible below the horizon was committed with it, or before.
        let generation = self.shared.read_at_once(|db| visible(db, at))?;
        let now = (self.shared.now)();
        // The newest tree is the tree of now, however long ago its last change was.
        let time = if generation >= newest {
            now.max(self.shared.waiting.queue.lock().clock.last())
        } else {
            self.time_of(generation)?
        };
        let id = self.next_snapshot();
        let held = false;
        let tags = tags.to_vec();
        let name = name.into();
        let snapshot = Snapshot { id, name, generation, time, automatic, held, tags };
        changes.push(Change::SnapshotPut(snapshot.clone()));
        let made = self.push(changes).and_then(|_| self.flush(Durability::Durable));
        self.tell_watch(&[]);
        made.map(|()| snapshot)
    }

    /// Forgets a snapshot. `NotFound` names the nearest names; `InUse` if it is held.
    pub fn delete_snapshot(&self, name: &str) -> Result<Snapshot> {
        let deleted = self.delete_snapshots(&[name])?.into_iter().next();
        deleted.unwrap_or_else(|| Err(Error::NotFound(format!("no snapshot '{name}'"))))
    }

    /// Forgets snapshots, many with one commit, and tells of each what
    /// [`Catalog::delete_snapshot`] would.
    pub fn delete_snapshots(&self, names: &[&str]) -> Result<Vec<Result<Snapshot>>> {
        let mut outcomes = Vec::with_capacity(names.len());
        for names in names.chunks(DELETED_MAX) {
            let _names = self.shared.snapshots.lock();
            let first = outcomes.len();
            outcomes.extend(names.iter().map(|name| self.deletable(name)));
            let going: Vec<&Snapshot> = outcomes[first..].iter().flatten().collect();
            let mut changes: Vec<_> =
                going.iter().map(|snapshot| Change::SnapshotRemove(snapshot.id)).collect();
            let gaps = self.gaps_without(&going)?.into_iter();
            changes.extend(
                gaps.map(|(after, until)| Change::Forget(ForgetChange::SweepAdd { after, until })),
            );
            if !changes.is_empty() {
                self.push(changes)?;
                // They are gone for whoever asks from now on, written or not.
                self.tell_watch(&going);
            }
        }
        self.flush(Durability::Written)?;
        Ok(outcomes)
    }

    fn deletable(&self, name: &str) -> Result<Snapshot> {
        let snapshot = self.existing(name)?;
        if snapshot.held {
            let shown = escape(name.as_bytes());
            return Err(Error::InUse(format!("snapshot '{shown}' is held: release it first")));
        }
        Ok(snapshot)
    }

    /// Renames a snapshot.
    pub fn rename_snapshot(&self, from: &str, to: &str) -> Result<Snapshot> {
        check_name(to)?;
        let _names = self.shared.snapshots.lock();
        let snapshot = self.existing(from)?;
        if from == to {
            return Ok(snapshot);
        }
        self.check_free(to)?;
        let new = Snapshot { name: to.into(), ..snapshot.clone() };
        let renamed = self.put_snapshot(new);
        self.tell_watch(&[&snapshot]);
        renamed
    }

    /// Holds or releases a snapshot.
    pub fn hold_snapshot(&self, name: &str, held: bool) -> Result<Snapshot> {
        let _names = self.shared.snapshots.lock();
        let snapshot = self.existing(name)?;
        if snapshot.held == held {
            return Ok(snapshot);
        }
        self.put_snapshot(Snapshot { held, ..snapshot })
    }

    /// The gap that a snapshot leaves, unless its generation is visible without it.
    pub(super) fn gap_without(
        &self,
        snapshot: &Snapshot,
    ) -> Result<Option<(Generation, Generation)>> {
        Ok(self.gaps_without(&[snapshot])?.into_iter().next())
    }

    /// The gaps that snapshots leave that go together, ascending.
    fn gaps_without(&self, going: &[&Snapshot]) -> Result<Vec<(Generation, Generation)>> {
        self.settle_late()?;
        let ids: HashSet<SnapshotId> = going.iter().map(|snapshot| snapshot.id).collect();
        let points: BTreeSet<Generation> =
            going.iter().map(|snapshot| snapshot.generation).collect();
        self.shared.read_at_once(|db| {
            let horizon = read_head(db)?.horizon;
            let mut gaps: Vec<(Generation, Generation)> = Vec::new();
            for &g in points.iter().filter(|g| **g < horizon) {
                if is_kept_without(db, g, &ids)? {
                    continue;
                }
                let (after, until) = db
                    .prepare_cached(
                        "SELECT max(coalesce((SELECT max(g) FROM moment WHERE g < ?1), 0), \
                         coalesce((SELECT max(g) FROM snapshot WHERE g < ?1), 0)), \
                         min(coalesce((SELECT min(g) FROM moment WHERE g > ?1), ?2), \
                         coalesce((SELECT min(g) FROM snapshot WHERE g > ?1), ?2), ?2)",
                    )?
                    .query_row(params![g, horizon], |row| Ok((row.get(0)?, row.get(1)?)))?;
                match gaps.last_mut() {
                    // What lies between is going too.
                    Some(last) if after < last.1 => last.1 = until,
                    _ => gaps.push((after, until)),
                }
            }
            Ok(gaps)
        })
    }

    fn put_snapshot(&self, snapshot: Snapshot) -> Result<Snapshot> {
        self.push(vec![Change::SnapshotPut(snapshot.clone())])?;
        self.flush(Durability::Written)?;
        Ok(snapshot)
    }

    fn check_free(&self, name: &str) -> Result<()> {
        if self.snapshot(name)?.is_some() {
            let shown = escape(name.as_bytes());
            return Err(Error::Refused(format!("there is a snapshot '{shown}' already")));
        }
        Ok(())
    }

    fn existing(&self, name: &str) -> Result<Snapshot> {
        if let Some(snapshot) = self.snapshot(name)? {
            return Ok(snapshot);
        }
        let mut near: Vec<_> = self
            .snapshots()?
            .iter()
            .map(|other| (strsim::damerau_levenshtein(name, &other.name), other.name.clone()))
            .collect();
        near.sort();
        let near: Vec<_> =
            near.iter().take(NEAREST_MAX).map(|(_, name)| escape(name.as_bytes())).collect();
        let hint = match near.is_empty() {
            true => "there are no snapshots".to_string(),
            false => format!("nearest names: {}", near.join(", ")),
        };
        Err(Error::NotFound(format!("no snapshot '{}'; {hint}", escape(name.as_bytes()))))
    }

    /// Commits changes of snapshots that wait. Others may go on waiting: a lookup below
    /// `.snapshots` must not cost a busy store a commit.
    fn settle_snapshots(&self) -> Result<()> {
        match self.shared.overlay(|batch| (!batch.snapshots.is_empty()).then_some(())) {
            Some(()) => self.settle_pending(),
            None => Ok(()),
        }
    }
}

/// Whether a generation below the horizon is visible without these snapshots.
fn is_kept_without(
    db: &Connection,
    g: Generation,
    going: &HashSet<SnapshotId>,
) -> rusqlite::Result<bool> {
    let mut statement = db.prepare_cached("SELECT id FROM snapshot WHERE g = ?1")?;
    let mut rows = statement.query(params![g])?;
    while let Some(row) = rows.next()? {
        if !going.contains(&row.get(0)?) {
            return Ok(true);
        }
    }
    db.prepare_cached("SELECT 1 FROM moment WHERE g = ?1")?.exists(params![g])
}

/// Refuses names that would be hidden, ambiguous or unprintable in the snapshot folder.
fn check_name(name: &str) -> Result<()> {
    let bad = if name.len() > NAME_BYTES_MAX {
        "it is longer than 200 bytes"
    } else if name.starts_with(['.', '@']) {
        "it begins with '.' or '@'"
    } else if name == "latest" {
        "'latest' always means the newest snapshot"
    } else if name.chars().any(char::is_control) {
        "it has a control character in it"
    } else if EntryName::new(name).is_err() {
        "it is empty or has a '/' in it"
    } else {
        return Ok(());
    };
    Err(Error::Refused(format!(
        "a snapshot cannot be named '{}': {bad}. Allowed are 1 to 200 bytes of text without '/' \
         and \
         control characters, not beginning with '.' or '@', and not 'latest'",
        escape(name.as_bytes())
    )))
}

fn split_tags(text: &str) -> Vec<String> {
    text.split(',').filter(|tag| !tag.is_empty()).map(String::from).collect()
}

fn snapshot_row(row: &Row<'_>) -> rusqlite::Result<Snapshot> {
    Ok(Snapshot {
        id: row.get(0)?,
        name: row.get(1)?,
        generation: row.get(2)?,
        time: row.get::<_, Time>(3)?.0,
        automatic: row.get(4)?,
        held: row.get(5)?,
        tags: split_tags(&row.get::<_, String>(6)?),
    })
}

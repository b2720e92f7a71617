//! What retention takes out of the catalog, and what it leaves visible.
//!
//! From the *horizon* on every generation is visible. Below it only *kept points* are: the
//! snapshots and the moments. A row of history, an interval `[born, died)`, is needed if and only
//! if it has a kept point in it or reaches beyond the horizon. When a kept point goes, a *gap*
//! between its neighbours is entered into `sweep`; the sweep ([`super::sweep`]) removes the rows
//! that lie within the gap altogether, in small steps.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use rusqlite::{Connection, OptionalExtension, params};

use super::apply::write_undo;
use super::overlay::Bytes;
use super::query::tick_at;
use super::schema::{ContentState, HeadRow, Time, read_head};
use super::{Catalog, Change, ForgetChange, Sweep, SweepPlace, packed, touched};
use crate::error::Result;
use crate::types::{EntryName, Generation, NodeId, Timestamp};

impl Catalog {
    /// From this generation on every one is visible.
    pub fn horizon(&self) -> Result<Generation> {
        self.settle_late()?;
        self.shared.read(|db| Ok(read_head(db)?.horizon))
    }

    /// Grows whenever something is packed or forgotten.
    pub fn history_epoch(&self) -> u64 {
        self.shared.epoch.load(Ordering::Relaxed)
    }

    /// The visible generations below the horizon, and the horizon itself.
    pub fn kept_points(&self) -> Result<BTreeSet<Generation>> {
        self.settle_late()?;
        self.shared.read_at_once(kept_points)
    }

    /// The generations below the horizon that are kept beside the snapshots.
    pub fn moments(&self) -> Result<BTreeSet<Generation>> {
        self.settle_late()?;
        self.shared.read(|db| {
            db.prepare_cached("SELECT g FROM moment")?.query_map([], |row| row.get(0))?.collect()
        })
    }

    /// Makes `horizon` the horizon, unless it is further already, and of the generations below it
    /// only those in `keep` visible, beside the snapshots. Returns how many gaps that leaves to be
    /// swept. What is not visible any more cannot become so again.
    pub fn thin(&self, horizon: Generation, keep: &BTreeSet<Generation>) -> Result<usize> {
        let _names = self.shared.snapshots.lock();
        self.settle_late()?;
        let (old, moments, old_horizon) = self.shared.read_at_once(|db| {
            let moments: BTreeSet<Generation> = db
                .prepare_cached("SELECT g FROM moment")?
                .query_map([], |row| row.get(0))?
                .collect::<rusqlite::Result<_>>()?;
            Ok((kept_points(db)?, moments, read_head(db)?.horizon))
        })?;
        let horizon = horizon.max(old_horizon).min(self.generation());
        let snapshots: Vec<Generation> =
            self.snapshots()?.iter().map(|snapshot| snapshot.generation).collect();
        let visible = |g: &Generation| *g >= old_horizon || old.contains(g);
        let keep: BTreeSet<Generation> =
            keep.iter().copied().filter(|g| *g < horizon && visible(g)).collect();
        let mut changes = Vec::new();
        changes.extend(keep.difference(&moments).map(|&g| ForgetChange::MomentPut(g)));
        changes.extend(moments.difference(&keep).map(|&g| ForgetChange::MomentRemove(g)));
        if horizon > old_horizon {
            changes.push(ForgetChange::Horizon(horizon));
        }
        let mut points = keep;
        points.extend(snapshots.into_iter().filter(|g| *g < horizon));
        points.insert(horizon);
        points.remove(&Generation(0));
        let mut after = Generation(0);
        let mut gaps = 0;
        for &until in &points {
            // Was anything between the two visible until now? Above the old horizon nothing was
            // ever swept, not even what no generation shows any more.
            let point = old.range(Generation(after.0 + 1)..until).next().is_some();
            if point || until > old_horizon {
                changes.push(ForgetChange::SweepAdd { after, until });
                gaps += 1;
            }
            after = until;
        }
        if !changes.is_empty() {
            self.push(changes.into_iter().map(Change::Forget).collect())?;
        }
        Ok(gaps)
    }

    /// Enters the gaps between `from` and `to` again: what was kept in them is kept no longer.
    pub fn sweep_again(&self, from: Generation, to: Generation) -> Result<()> {
        let _names = self.shared.snapshots.lock();
        let points = self.kept_points()?;
        let mut after = Generation(0);
        let mut changes = Vec::new();
        for until in points {
            // What died with `from` is in the gap that ends there.
            if until >= from && after < to && until > after {
                changes.push(Change::Forget(ForgetChange::SweepAdd { after, until }));
            }
            after = until;
        }
        if !changes.is_empty() {
            self.push(changes)?;
        }
        Ok(())
    }

    /// The oldest gap that is to be swept.
    pub fn next_sweep(&self) -> Result<Option<Sweep>> {
        self.settle_late()?;
        self.shared.read(|db| {
            db.prepare_cached(
                "SELECT after, until, at_g, at_node FROM sweep ORDER BY after, until LIMIT 1",
            )?
            .query_row([], |row| {
                let until = row.get(1)?;
                let at = SweepPlace::from_columns(until, (row.get(2)?, row.get(3)?));
                Ok(Sweep { after: row.get(0)?, until, at })
            })
            .optional()
        })
    }

    /// The beginnings of generations from `from` on, as (generation, time), ascending, up to the
    /// first one after `until`.
    pub fn ticks(
        &self,
        from: Generation,
        until: Timestamp,
    ) -> Result<Vec<(Generation, Timestamp)>> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let last = tick_at(db, until)?.map_or(-1, |last| last.0 as i64);
            let mut statement = db.prepare_cached(
                "SELECT g, t FROM tick WHERE g >= ?1 \
                 AND g <= coalesce((SELECT min(g) FROM tick WHERE g > ?2), ?3) ORDER BY g",
            )?;
            let rows = statement.query_map(params![from, last, i64::MAX], |row| {
                Ok((row.get(0)?, Timestamp::from_nanos(row.get(1)?)))
            })?;
            rows.collect()
        })
    }

    /// Whether anything of the tree changed after `at`.
    pub fn changed_since(&self, at: Generation) -> Result<bool> {
        self.settle_pending()?;
        self.shared.read(|db| Ok(touched::next(db, at)?.is_some()))
    }

    /// Commits what changes the visibility of generations.
    pub(super) fn settle_late(&self) -> Result<()> {
        match self
            .shared
            .overlay(|batch| (!batch.late.is_empty() || !batch.snapshots.is_empty()).then_some(()))
        {
            Some(()) => self.settle_pending(),
            None => Ok(()),
        }
    }
}

/// See [`Catalog::kept_points`].
pub(super) fn kept_points(db: &Connection) -> rusqlite::Result<BTreeSet<Generation>> {
    let horizon = read_head(db)?.horizon;
    let mut points: BTreeSet<Generation> = db
        .prepare_cached("SELECT g FROM moment UNION SELECT g FROM snapshot")?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    points.retain(|&point| point < horizon);
    points.insert(horizon);
    Ok(points)
}

/// The visible generation that stands for `at`: itself from the horizon on; below it the last kept
/// point at or before it, or else the first one.
pub(super) fn visible(db: &Connection, at: Generation) -> rusqlite::Result<Generation> {
    let horizon = read_head(db)?.horizon;
    if at >= horizon {
        return Ok(at);
    }
    let before: Option<Generation> = db
        .prepare_cached(
            "SELECT max((SELECT coalesce(max(g), -1) FROM moment WHERE g <= ?1), \
             (SELECT coalesce(max(g), -1) FROM snapshot WHERE g <= ?1))",
        )?
        .query_row(params![at], |row| row.get::<_, i64>(0))
        .map(|g| u64::try_from(g).ok().map(Generation))?;
    match before {
        Some(before) => Ok(before),
        None => visible_from(db, at),
    }
}

/// The first visible generation at or after `at`.
pub(super) fn visible_from(db: &Connection, at: Generation) -> rusqlite::Result<Generation> {
    let horizon = read_head(db)?.horizon;
    if at >= horizon {
        return Ok(at);
    }
    visible_below(db, at, horizon)
}

/// As [`visible_from`], below the horizon.
pub(super) fn visible_below(
    db: &Connection,
    at: Generation,
    horizon: Generation,
) -> rusqlite::Result<Generation> {
    db.prepare_cached(
        "SELECT min(?2, (SELECT coalesce(min(g), ?2) FROM moment WHERE g >= ?1), \
         (SELECT coalesce(min(g), ?2) FROM snapshot WHERE g >= ?1))",
    )?
    .query_row(params![at, horizon], |row| row.get(0))
}

/// Writes one change.
pub(super) fn apply(
    db: &Connection,
    change: &ForgetChange,
    head: &mut HeadRow,
) -> rusqlite::Result<()> {
    match change {
        ForgetChange::State { node, died } => {
            let gone = db
                .prepare_cached("DELETE FROM node_h WHERE id = ?1 AND died = ?2")?
                .execute(params![node, died])?;
            head.past_versions -= gone as i64;
        }
        ForgetChange::Entry { parent, name, born, died } => {
            db.prepare_cached(
                "DELETE FROM entry_h WHERE parent = ?1 AND died = ?2 AND name = ?3 AND born = ?4",
            )?
            .execute(params![parent, died, name, born])?;
        }
        ForgetChange::Content(id) => {
            db.prepare_cached("DELETE FROM digest WHERE content = ?1")?.execute(params![id])?;
            let gone: Option<(i64, i64)> = db
                .prepare_cached("DELETE FROM content WHERE id = ?1 RETURNING state, size")?
                .query_row(params![id], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?;
            match gone {
                Some((state, size)) if state == ContentState::Preserved as i64 => {
                    head.preserved_bytes -= size;
                }
                Some((state, size)) if state == ContentState::Cloned as i64 => {
                    head.cloned_bytes -= size;
                }
                _ => {}
            }
        }
        ForgetChange::Undo { node, content, offset } => {
            let gone: Option<(Option<i64>, i64)> = db
                .prepare_cached(
                    "DELETE FROM undo WHERE node = ?1 AND content = ?2 AND offset = ?3 \
                     RETURNING segment, length",
                )?
                .query_row(params![node, content, *offset as i64], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })
                .optional()?;
            match gone {
                Some((Some(segment), length)) if segment > 0 => head.undo_bytes -= length,
                Some((Some(stream), _)) => packed::forget_empty_stream(db, stream)?,
                _ => {}
            }
        }
        ForgetChange::UndoPut(row) => head.undo_bytes += write_undo(db, row.clone())?,
        ForgetChange::Recipe(id) => packed::forget_recipe(db, *id)?,
        ForgetChange::RecipeCut { id, keep } => packed::cut_recipe(db, *id, *keep)?,
        ForgetChange::Symlink(node) => {
            db.prepare_cached("DELETE FROM symlink WHERE node = ?1")?.execute(params![node])?;
        }
        ForgetChange::MomentPut(g) => {
            db.prepare_cached("INSERT OR IGNORE INTO moment(g) VALUES(?1)")?.execute(params![g])?;
        }
        ForgetChange::MomentRemove(g) => {
            db.prepare_cached("DELETE FROM moment WHERE g = ?1")?.execute(params![g])?;
        }
        ForgetChange::Horizon(g) => head.horizon = head.horizon.max(*g),
        ForgetChange::SweepAdd { after, until } => add_sweep(db, *after, *until)?,
        ForgetChange::SweepAt { after, until, from, at } => {
            let (from, at) = (from.columns(), at.columns());
            db.prepare_cached(
                "UPDATE sweep SET at_g = ?3, at_node = ?4 WHERE after = ?1 AND until = ?2 \
                 AND at_g = ?5 AND at_node = ?6",
            )?
            .execute(params![after, until, at.0, at.1, from.0, from.1])?;
        }
        ForgetChange::SweepEnd { after, until, from } => {
            let from = from.columns();
            db.prepare_cached(
                "DELETE FROM sweep WHERE after = ?1 AND until = ?2 AND at_g = ?3 AND at_node = ?4",
            )?
            .execute(params![after, until, from.0, from.1])?;
        }
        ForgetChange::Untouched { node, at } => {
            touched::remove(db, (*at, *node))?;
        }
        ForgetChange::Touched { node, at } => {
            touched::add(db, (*at, *node))?;
        }
        ForgetChange::Tick(g) => {
            db.prepare_cached("DELETE FROM tick WHERE g = ?1")?.execute(params![g])?;
        }
        ForgetChange::Act(g) => {
            db.prepare_cached("DELETE FROM act WHERE g = ?1")?.execute(params![g])?;
        }
        ForgetChange::Actor(id) => {
            db.prepare_cached("DELETE FROM actor WHERE id = ?1")?.execute(params![*id as i64])?;
        }
        ForgetChange::XattrSet(id) => {
            db.prepare_cached("DELETE FROM xattr_set WHERE id = ?1")?.execute(params![id])?;
        }
        ForgetChange::Purged(row) => {
            db.prepare_cached(
                "INSERT INTO purged(time, path, versions, bytes) VALUES(?1, ?2, ?3, ?4)",
            )?
            .execute(params![
                Time(row.time),
                row.path.to_bytes(),
                row.versions as i64,
                row.bytes as i64,
            ])?;
        }
    }
    Ok(())
}

/// Enters a gap, in place of those that lie in it. One that is there is swept again from its
/// beginning.
fn add_sweep(db: &Connection, after: Generation, until: Generation) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM sweep WHERE after >= ?1 AND after < ?2 AND until <= ?2")?
        .execute(params![after, until])?;
    let at = SweepPlace::begin(until).columns();
    db.prepare_cached("INSERT INTO sweep(after, until, at_g, at_node) VALUES(?1, ?2, ?3, ?4)")?
        .execute(params![after, until, at.0, at.1])?;
    Ok(())
}

/// Adds a change to the batch's hash.
pub(super) fn digest(change: &ForgetChange, out: &mut Bytes) {
    let entry = |out: &mut Bytes, parent: &NodeId, name: &EntryName| {
        out.numbers(&[41, parent.0]);
        out.blob(name.as_bytes());
    };
    match change {
        ForgetChange::State { node, died } => out.numbers(&[40, node.0, died.0]),
        ForgetChange::Entry { parent, name, born, died } => {
            entry(out, parent, name);
            out.numbers(&[born.0, died.0]);
        }
        ForgetChange::Content(id) => out.numbers(&[42, id.0]),
        ForgetChange::Undo { node, content, offset } => {
            out.numbers(&[43, node.0, content.0, *offset]);
        }
        ForgetChange::UndoPut(row) => {
            out.numbers(&[44]);
            out.undo(row);
        }
        ForgetChange::Recipe(id) => out.numbers(&[45, id.0]),
        ForgetChange::Symlink(node) => out.numbers(&[46, node.0]),
        ForgetChange::MomentPut(g) => out.numbers(&[47, g.0]),
        ForgetChange::MomentRemove(g) => out.numbers(&[48, g.0]),
        ForgetChange::Horizon(g) => out.numbers(&[49, g.0]),
        ForgetChange::SweepAdd { after, until } => out.numbers(&[50, after.0, until.0]),
        ForgetChange::SweepAt { after, until, from, at } => {
            let (from, at) = (from.columns(), at.columns());
            out.numbers(&[51, after.0, until.0, from.0.0, from.1.0, at.0.0, at.1.0]);
        }
        ForgetChange::SweepEnd { after, until, from } => {
            let from = from.columns();
            out.numbers(&[52, after.0, until.0, from.0.0, from.1.0]);
        }
        ForgetChange::RecipeCut { id, keep } => out.numbers(&[54, id.0, *keep as u64]),
        ForgetChange::Untouched { node, at } => out.numbers(&[55, node.0, at.0]),
        ForgetChange::Touched { node, at } => out.numbers(&[56, node.0, at.0]),
        ForgetChange::Tick(g) => out.numbers(&[57, g.0]),
        ForgetChange::Act(g) => out.numbers(&[58, g.0]),
        ForgetChange::Actor(id) => out.numbers(&[59, *id]),
        ForgetChange::XattrSet(id) => out.numbers(&[60, id.0]),
        ForgetChange::Purged(row) => {
            out.numbers(&[53, row.time.secs as u64, row.time.nanos.into()]);
            out.numbers(&[row.versions, row.bytes]);
            out.blob(&row.path.to_bytes());
        }
    }
}

//! What deleting a snapshot would free, without doing it: the plan of the sweep, counted.

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, OptionalExtension, params};

use super::packed::recipe_parts;
use super::schema::ContentState;
use super::sweep::{Plan, next_touched};
use super::{Catalog, ForgetChange, Snapshot, Sweep, SweepPlace};
use crate::error::Result;
use crate::types::{ChunkId, ContentId, Generation};

/// Touched nodes that are looked up at once.
const ROWS_MAX: usize = 1024;

impl Catalog {
    /// The bytes of history that would go if this snapshot alone were deleted: exact, at a cost of
    /// what changed between its visible neighbours, which of the first one is the whole store.
    /// Chunks count when nothing uses them any more, clones do not. `None` once `go_on` says no.
    pub fn freed_without(
        &self,
        snapshot: &Snapshot,
        deleted_since: Generation,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<u64>> {
        let Some((after, until)) = self.gap_without(snapshot)? else { return Ok(Some(0)) };
        self.settle_pending()?;
        self.shared.read_long(|db, alive| {
            let mut plan = Plan::new(db, usize::MAX);
            let mut freed = Freed::default();
            let mut seen = HashSet::new();
            let mut sweep = Sweep { after, until, at: SweepPlace::begin(until) };
            while !matches!(sweep.at, SweepPlace::Times(_)) {
                let (places, next) = next_touched(db, &sweep, ROWS_MAX)?;
                alive();
                for (g, node) in places {
                    if !go_on() {
                        return Ok(None);
                    }
                    sweep.at = match sweep.at {
                        SweepPlace::End(..) => SweepPlace::End(g, node),
                        _ => SweepPlace::Within(g, node),
                    };
                    if seen.insert(node) {
                        plan.sweep_node(node, &sweep, deleted_since)?;
                        freed.take(db, &mut plan)?;
                    }
                }
                sweep.at = next.unwrap_or(sweep.at);
            }
            for (&stream, _) in plan.streams.iter().filter(|(_, left)| **left <= 0) {
                freed.use_less(db, stream)?;
            }
            freed.bytes(db, go_on)
        })
    }
}

/// What a plan would free, counted without being done.
#[derive(Default)]
struct Freed {
    /// Bytes of preserved files and of before-images in segments.
    raw: i64,
    /// How often chunks would be used less.
    chunks: HashMap<ChunkId, i64>,
}

impl Freed {
    /// Counts what is planned so far, and takes it off the plan.
    fn take(&mut self, db: &Connection, plan: &mut Plan<'_>) -> rusqlite::Result<()> {
        for (_, content) in plan.unpreserved.drain(..) {
            let size: Option<i64> = db
                .prepare_cached("SELECT size FROM content WHERE id = ?1 AND state = ?2")?
                .query_row(params![content, ContentState::Preserved as i64], |row| row.get(0))
                .optional()?;
            self.raw += size.unwrap_or(0);
        }
        for change in plan.changes.drain(..) {
            if let ForgetChange::Recipe(id) = change {
                self.use_less(db, id)?;
            }
        }
        plan.taken.clear();
        self.raw += std::mem::take(&mut plan.segment_bytes);
        Ok(())
    }

    /// A recipe would go.
    fn use_less(&mut self, db: &Connection, recipe: ContentId) -> rusqlite::Result<()> {
        for (chunk, _) in recipe_parts(db, recipe)?.unwrap_or_default() {
            *self.chunks.entry(chunk).or_default() += 1;
        }
        Ok(())
    }

    /// The bytes: of chunks only those that nothing else uses.
    fn bytes(&self, db: &Connection, go_on: &dyn Fn() -> bool) -> rusqlite::Result<Option<u64>> {
        let mut bytes = self.raw;
        let mut statement = db.prepare_cached("SELECT refs, stored FROM chunk WHERE id = ?1")?;
        for (chunk, uses) in &self.chunks {
            if !go_on() {
                return Ok(None);
            }
            let found: Option<(i64, i64)> = statement
                .query_row(params![chunk], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?;
            if let Some((refs, stored)) = found
                && refs <= *uses
            {
                bytes += stored;
            }
        }
        Ok(Some(bytes.max(0) as u64))
    }
}

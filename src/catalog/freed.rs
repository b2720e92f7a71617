//! What deleting a snapshot would free, without doing it: the plan of the sweep, counted.

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, OptionalExtension, params};

use super::packed::recipe_parts;
use super::retain::Sweep;
use super::sweep::{Plan, touched};
use super::{Catalog, ForgetChange, Snapshot, UndoFile};
use crate::error::Result;
use crate::types::{ChunkId, Generation, NodeId};

impl Catalog {
    /// The bytes of history that would go if this snapshot alone were deleted: exact, at a cost of
    /// what changed between its visible neighbours.
    pub fn freed_without(&self, snapshot: &Snapshot, deleted_since: Generation) -> Result<u64> {
        let Some((after, until)) = self.gap_without(snapshot)? else { return Ok(0) };
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut plan = Plan::new(db);
            let mut freed = Freed::default();
            let mut seen = HashSet::new();
            let mut sweep = Sweep { after, until, at: (until, NodeId(0)) };
            loop {
                let (batches, last) = touched(db, &sweep)?;
                for place in batches {
                    sweep.at = place;
                    if seen.insert(place.1) {
                        plan.sweep_node(place.1, &sweep, deleted_since)?;
                        freed.take(db, &mut plan)?;
                    }
                }
                if last && sweep.at.0 >= until {
                    sweep.at = (after, NodeId(0));
                } else if last {
                    break;
                }
            }
            plan.use_streams()?;
            freed.take(db, &mut plan)?;
            freed.bytes(db)
        })
    }
}

/// What a plan would free, counted without being done.
#[derive(Default)]
struct Freed {
    /// Bytes of preserved files and of before-images in segments.
    raw: u64,
    /// How often chunks would be used less.
    chunks: HashMap<ChunkId, i64>,
}

impl Freed {
    /// Counts what is planned so far, and takes it off the plan.
    fn take(&mut self, db: &Connection, plan: &mut Plan<'_>) -> rusqlite::Result<()> {
        for (node, content) in plan.unpreserved.drain(..) {
            let size: Option<i64> = db
                .prepare_cached("SELECT size FROM content WHERE id = ?1 AND node = ?2")?
                .query_row(params![content, node], |row| row.get(0))
                .optional()?;
            self.raw += size.unwrap_or(0).max(0) as u64;
        }
        for change in plan.changes.drain(..) {
            match change {
                ForgetChange::Recipe(id) => {
                    for (chunk, _) in recipe_parts(db, id)?.unwrap_or_default() {
                        *self.chunks.entry(chunk).or_default() += 1;
                    }
                }
                ForgetChange::Undo { node, content, offset } => {
                    let length: Option<i64> = db
                        .prepare_cached(
                            "SELECT length FROM undo WHERE node = ?1 AND content = ?2 \
                             AND offset = ?3 AND segment > 0",
                        )?
                        .query_row(params![node, content, offset as i64], |row| row.get(0))
                        .optional()?;
                    self.raw += length.unwrap_or(0).max(0) as u64;
                }
                ForgetChange::UndoPut(row)
                    if row.at.is_some_and(|at| matches!(at.file, UndoFile::Segment(_))) =>
                {
                    self.raw = self.raw.saturating_sub(row.length);
                }
                _ => {}
            }
        }
        plan.clear();
        Ok(())
    }

    /// The bytes: of chunks only those that nothing else uses.
    fn bytes(&self, db: &Connection) -> rusqlite::Result<u64> {
        let mut bytes = self.raw;
        let mut statement = db.prepare_cached("SELECT refs, stored FROM chunk WHERE id = ?1")?;
        for (chunk, uses) in &self.chunks {
            let found: Option<(i64, i64)> = statement
                .query_row(params![chunk], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?;
            if let Some((refs, stored)) = found
                && refs <= *uses
            {
                bytes += stored.max(0) as u64;
            }
        }
        Ok(bytes)
    }
}

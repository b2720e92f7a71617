//! Which files were only scratch files of a program.

use std::collections::VecDeque;

use rusqlite::{Connection, OptionalExtension, params};

use super::Catalog;
use super::actor::OURSELVES;
use super::query::time_of;
use super::schema::unsigned;
use crate::error::Result;
use crate::types::{Generation, NodeId};

/// A file that lives longer is no scratch file.
const LIFE_SECS_MAX: i64 = 30;
/// Looks that are remembered.
const LOOKS_MAX: usize = 4096;

/// The generations that somebody looked at while they were the newest.
pub(super) struct Looks {
    /// Up to here nothing is known: each may have been looked at.
    unknown: Generation,
    /// Those after it, ascending.
    seen: VecDeque<Generation>,
}

impl Looks {
    /// What came before this mount may have been looked at.
    pub fn new(newest: Generation) -> Looks {
        Looks { unknown: newest, seen: VecDeque::new() }
    }

    /// The newest generation is looked at.
    pub fn note(&mut self, newest: Generation) {
        if self.seen.back().is_some_and(|last| *last >= newest) || newest <= self.unknown {
            return;
        }
        self.seen.push_back(newest);
        if self.seen.len() > LOOKS_MAX {
            self.unknown = self.seen.pop_front().unwrap_or(newest);
        }
    }

    /// Whether a generation in the interval may have been looked at.
    fn any_in(&self, born: Generation, died: Generation) -> bool {
        let next = self.seen.partition_point(|look| *look < born);
        born <= self.unknown || self.seen.get(next).is_some_and(|look| *look < died)
    }
}

impl Catalog {
    /// Whether a node is gone and was one process's own from its birth to its end, for at most 30
    /// seconds, under one name, and no kept moment shows it. What somebody looked at stays.
    pub fn is_scratch(&self, node: NodeId) -> Result<bool> {
        self.shared.read_at_once(|db| {
            if db.prepare_cached("SELECT 1 FROM node WHERE id = ?1")?.exists(params![node])? {
                return Ok(false);
            }
            let Some((born, died)) = only_name(db, node)? else { return Ok(false) };
            let life = time_of(db, died)?.secs - time_of(db, born)?.secs;
            let seen = self.shared.waiting.queue.lock().looks.any_in(born, died);
            if seen || life > LIFE_SECS_MAX || is_kept(db, born, died)? {
                return Ok(false);
            }
            let maker = actor_at(db, born)?;
            Ok(maker != OURSELVES && maker == actor_at(db, died)?)
        })
    }
}

/// The interval of the only name that a node ever had.
fn only_name(db: &Connection, node: NodeId) -> rusqlite::Result<Option<(Generation, Generation)>> {
    db.prepare_cached("SELECT count(*), min(born), max(died) FROM entry_h WHERE node = ?1")?
        .query_row(params![node], |row| match row.get(0)? {
            1i64 => Ok(Some((row.get(1)?, row.get(2)?))),
            _ => Ok(None),
        })
}

/// Whether a generation in the interval is a snapshot's or stays visible otherwise.
fn is_kept(db: &Connection, born: Generation, died: Generation) -> rusqlite::Result<bool> {
    db.prepare_cached(
        "SELECT 1 FROM snapshot WHERE g >= ?1 AND g < ?2 \
         UNION ALL SELECT 1 FROM moment WHERE g >= ?1 AND g < ?2",
    )?
    .exists(params![born, died])
}

/// Who made a generation, by his id.
fn actor_at(db: &Connection, at: Generation) -> rusqlite::Result<u64> {
    let found = db
        .prepare_cached("SELECT actor FROM act WHERE g <= ?1 ORDER BY g DESC LIMIT 1")?
        .query_row(params![at], |row| unsigned(row, 0))
        .optional()?;
    Ok(found.unwrap_or(OURSELVES))
}

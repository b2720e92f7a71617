//! Which files were only scratch files of a program.

use rusqlite::{Connection, OptionalExtension, params};

use super::Catalog;
use super::actor::OURSELVES;
use super::query::time_of;
use super::schema::unsigned;
use crate::error::Result;
use crate::types::{Generation, NodeId};

/// A file that lives longer is no scratch file.
const LIFE_SECS_MAX: i64 = 30;

impl Catalog {
    /// Whether a node is gone and was one process's own from its birth to its end, for at most 30
    /// seconds, under one name, and no kept moment shows it.
    pub fn is_scratch(&self, node: NodeId) -> Result<bool> {
        self.shared.read_at_once(|db| {
            if db.prepare_cached("SELECT 1 FROM node WHERE id = ?1")?.exists(params![node])? {
                return Ok(false);
            }
            let Some((born, died)) = only_name(db, node)? else { return Ok(false) };
            let life = time_of(db, died)?.secs - time_of(db, born)?.secs;
            if life > LIFE_SECS_MAX || is_kept(db, born, died)? {
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

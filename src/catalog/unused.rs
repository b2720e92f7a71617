//! What nothing refers to any more, since its history was swept out: sets of extended attributes
//! and actors. What this mount gave out is not looked at: it may be in use before it is in a row.

use rusqlite::{Connection, params};

use super::{Catalog, Change, ForgetChange};
use crate::error::Result;
use crate::types::XattrSetId;

/// Rows that one step looks at, at most.
const ROWS_MAX: i64 = 256;

/// How far the look at everything that may be unused is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unused {
    sets: XattrSetId,
    actors: u64,
}

impl Catalog {
    /// Forgets what nothing refers to, one step on from `from`; nothing after the last one.
    pub fn forget_unused(&self, from: Unused) -> Result<Option<Unused>> {
        self.settle_pending()?;
        let first = self.shared.waiting.queue.lock().actors.first();
        let (sets, actors) = self.shared.read_at_once(|db| {
            let sets = unused(
                db,
                "SELECT id, EXISTS(SELECT 1 FROM node WHERE xattrs = set_.id AND xattrs > 0) \
                 OR EXISTS(SELECT 1 FROM node_h WHERE xattrs = set_.id AND xattrs > 0) \
                 FROM xattr_set set_ WHERE id > ?1 AND id < ?2 ORDER BY id LIMIT ?3",
                (from.sets.0, i64::MAX as u64),
            )?;
            let actors = unused(
                db,
                "SELECT id, EXISTS(SELECT 1 FROM act WHERE actor = known.id) FROM actor known \
                 WHERE id > ?1 AND id < ?2 ORDER BY id LIMIT ?3",
                (from.actors, first),
            )?;
            Ok((sets, actors))
        })?;
        let last = |rows: &[(u64, bool)]| rows.last().map(|(id, _)| *id);
        let next = Unused {
            sets: last(&sets).map_or(from.sets, XattrSetId),
            actors: last(&actors).unwrap_or(from.actors),
        };
        let of = |rows: Vec<(u64, bool)>| rows.into_iter().filter(|row| !row.1).map(|row| row.0);
        self.forget_sets(of(sets).map(XattrSetId).collect())?;
        let actors: Vec<_> = of(actors).map(|id| Change::Forget(ForgetChange::Actor(id))).collect();
        if !actors.is_empty() {
            self.push(actors)?;
        }
        Ok((next != from).then_some(next))
    }
}

/// Rows between two ids, with whether something refers to them.
fn unused(
    db: &Connection,
    sql: &str,
    (from, until): (u64, u64),
) -> rusqlite::Result<Vec<(u64, bool)>> {
    let mut statement = db.prepare_cached(sql)?;
    let values = params![from as i64, until as i64, ROWS_MAX];
    let rows = statement.query_map(values, |row| {
        let id: i64 = row.get(0)?;
        Ok((id.max(0) as u64, row.get(1)?))
    })?;
    rows.collect()
}

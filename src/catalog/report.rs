//! What history tells of one node, one name, one directory, and of the whole.

use rusqlite::{Connection, OptionalExtension, Params, Row, params};

use super::query::time_of;
use super::retain::visible_below;
use super::schema::{NODE_COLUMNS, Time, end, node_row, read_head, unsigned};
use super::{Catalog, NEVER, NameInterval, PurgeRow, Totals, Version};
use crate::error::Result;
use crate::types::{EntryName, NodeId, RelPath};

impl Catalog {
    /// All states of a node, oldest first.
    pub fn versions(&self, node: NodeId) -> Result<Vec<Version>> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut statement = db.prepare_cached(&format!(
                "SELECT {NODE_COLUMNS}, born, died FROM node_h WHERE id = ?1 UNION ALL \
                 SELECT {NODE_COLUMNS}, born, NULL FROM node WHERE id = ?1 AND born < ?2"
            ))?;
            let horizon = read_head(db)?.horizon;
            let rows = statement.query_map(params![node, NEVER], |row| {
                let born = row.get(13)?;
                // A version that began between two visible generations is first seen at the later.
                let seen = if born >= horizon { born } else { visible_below(db, born, horizon)? };
                let time = time_of(db, seen)?;
                Ok(Version { row: node_row(row, 0)?, born, died: end(row, 14)?, time })
            })?;
            let mut versions = rows.collect::<rusqlite::Result<Vec<_>>>()?;
            versions.sort_by_key(|version| version.born);
            Ok(versions)
        })
    }

    /// All names that a node ever had, oldest first.
    pub fn name_history(&self, node: NodeId) -> Result<Vec<NameInterval>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            intervals(
                db,
                "SELECT parent, name, node, born, died FROM entry_h WHERE node = ?1 UNION ALL \
                 SELECT parent, name, node, born, NULL FROM entry WHERE node = ?1 AND born < ?2",
                params![node, NEVER],
            )
        })
    }

    /// All nodes that a name in a directory ever meant, oldest first.
    pub fn entry_history(&self, parent: NodeId, name: &EntryName) -> Result<Vec<NameInterval>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            intervals(
                db,
                "SELECT parent, name, node, born, died FROM entry_h \
                 WHERE parent = ?1 AND name = ?2 UNION ALL \
                 SELECT parent, name, node, born, NULL FROM entry \
                 WHERE parent = ?1 AND name = ?2 AND born < ?3",
                params![parent, name, NEVER],
            )
        })
    }

    /// All entries that a directory ever had, as far as history shows them, oldest first.
    pub fn entries_ever(&self, parent: NodeId) -> Result<Vec<NameInterval>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            intervals(
                db,
                "SELECT parent, name, node, born, died FROM entry_h WHERE parent = ?1 UNION ALL \
                 SELECT parent, name, node, born, NULL FROM entry WHERE parent = ?1 AND born < ?2",
                params![parent, NEVER],
            )
        })
    }

    /// What was removed from all history on request, oldest first.
    pub fn purges(&self) -> Result<Vec<PurgeRow>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let mut statement =
                db.prepare_cached("SELECT time, path, versions, bytes FROM purged ORDER BY id")?;
            let rows = statement.query_map([], |row| {
                let path: Vec<u8> = row.get(1)?;
                Ok(PurgeRow {
                    time: row.get::<_, Time>(0)?.0,
                    // What is no path was never written by us: it is nobody's record.
                    path: RelPath::parse(path).unwrap_or_default(),
                    versions: unsigned(row, 2)?,
                    bytes: unsigned(row, 3)?,
                })
            })?;
            rows.collect()
        })
    }

    /// For each name that a directory had and has no more, its last interval, ordered by name.
    pub fn deleted(&self, parent: NodeId) -> Result<Vec<NameInterval>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            // Bare columns beside max() are those of the row that has the maximum.
            let mut intervals = intervals(
                db,
                "SELECT parent, name, node, born, max(died) FROM entry_h h WHERE parent = ?1 \
                 AND NOT EXISTS( \
                   SELECT 1 FROM entry e WHERE e.parent = h.parent AND e.name = h.name) \
                 GROUP BY name",
                params![parent],
            )?;
            intervals.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(intervals)
        })
    }

    /// The names in a live directory that history does not show, in order.
    pub fn unversioned(&self, parent: NodeId) -> Result<Vec<EntryName>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            db.prepare_cached(
                "SELECT name FROM entry WHERE parent = ?1 AND born >= ?2 ORDER BY name",
            )?
            .query_map(params![parent, NEVER], |row| row.get(0))?
            .collect()
        })
    }

    /// Totals for status.
    pub fn totals(&self) -> Result<Totals> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let head = read_head(db)?;
            let snapshots: i64 =
                db.query_row("SELECT count(*) FROM snapshot", [], |row| row.get(0))?;
            let count = |value: i64| value.max(0) as u64;
            Ok(Totals {
                live_nodes: count(head.live_nodes.0),
                live_bytes: count(head.live_bytes.0),
                past_versions: count(head.past_versions.0),
                snapshots: count(snapshots),
                undo_bytes: count(head.undo_bytes.0),
                preserved_bytes: count(head.preserved_bytes.0),
                cloned_bytes: count(head.cloned_bytes.0),
                packed_bytes: count(head.packed_bytes.0),
            })
        })
    }

    /// A setting of the store.
    pub fn meta(&self, key: &str) -> Result<Option<String>> {
        if let Some(value) = self.shared.overlay(|batch| batch.meta.get(key).cloned()) {
            return Ok(Some(value));
        }
        self.shared.read(|db| {
            db.prepare_cached("SELECT value FROM meta WHERE key = ?1")?
                .query_row(params![key], |row| row.get(0))
                .optional()
        })
    }
}

fn intervals(
    db: &Connection,
    sql: &str,
    values: impl Params,
) -> rusqlite::Result<Vec<NameInterval>> {
    let interval = |row: &Row<'_>| {
        Ok(NameInterval {
            parent: row.get(0)?,
            name: row.get(1)?,
            node: row.get(2)?,
            born: row.get(3)?,
            died: end(row, 4)?,
        })
    };
    let rows = db.prepare_cached(sql)?.query_map(values, interval)?.collect::<Result<Vec<_>, _>>();
    let mut intervals: Vec<NameInterval> = rows?;
    intervals.sort_by(|a, b| a.born.cmp(&b.born).then_with(|| a.name.cmp(&b.name)));
    Ok(intervals)
}

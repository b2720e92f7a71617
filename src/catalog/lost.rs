//! What recovery asks about contents whose bytes an unclean end may have taken.

use rusqlite::params;

use super::query::path_at;
use super::schema::{NODE_COLUMNS, node_row, unsigned};
use super::{Catalog, NEVER, NodeRow};
use crate::error::Result;
use crate::types::{ContentId, EntryName, Generation, NodeId, RelPath};

/// A content that is not the live file's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastContent {
    /// Which.
    pub id: ContentId,
    /// Its bytes.
    pub size: u64,
    /// It is recorded to lie in `preserved/`.
    pub preserved: bool,
    /// It is recorded to have the bytes of another one.
    pub same: bool,
    /// The first generation that shows it; one of the far future where none does.
    pub born: Generation,
    /// The newest state that shows it.
    pub row: Option<NodeRow>,
}

impl Catalog {
    /// Nodes of which a state or a name began or ended after `since`, in order.
    pub fn touched_since(&self, since: Generation) -> Result<Vec<NodeId>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let mut statement =
                db.prepare_cached("SELECT DISTINCT node FROM touched WHERE g > ?1 ORDER BY node")?;
            statement.query_map(params![since], |row| row.get(0))?.collect()
        })
    }

    /// The contents of a node but the one that its live file has, newest first.
    pub fn past_contents(&self, node: NodeId) -> Result<Vec<PastContent>> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut contents = db.prepare_cached(
                "SELECT id, size, state, (SELECT min(born) FROM node_h h WHERE h.id = ?1 \
                 AND h.content = c.id) FROM content c WHERE node = ?1 AND NOT EXISTS(SELECT 1 \
                 FROM node n WHERE n.id = ?1 AND n.content = c.id) ORDER BY id DESC",
            )?;
            let mut newest = db.prepare_cached(&format!(
                "SELECT {NODE_COLUMNS} FROM node_h WHERE id = ?1 AND content = ?2 \
                 ORDER BY died DESC LIMIT 1"
            ))?;
            let rows = contents.query_map(params![node], |row| {
                let state: i64 = row.get(2)?;
                let born: Option<Generation> = row.get(3)?;
                Ok(PastContent {
                    id: row.get(0)?,
                    size: unsigned(row, 1)?,
                    preserved: matches!(state, 1 | 3),
                    same: state == 4,
                    born: born.unwrap_or(NEVER),
                    row: None,
                })
            })?;
            let mut found: Vec<PastContent> = rows.collect::<rusqlite::Result<_>>()?;
            for content in &mut found {
                let mut rows = newest.query(params![node, content.id])?;
                content.row = rows.next()?.map(|row| node_row(row, 0)).transpose()?;
            }
            Ok(found)
        })
    }

    /// The first generations that show the contents which have the bytes of this one.
    pub fn relying_on(&self, content: ContentId) -> Result<Vec<Generation>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT coalesce((SELECT min(born) FROM node_h h WHERE h.id = c.node \
                 AND h.content = c.id), ?2) FROM content c WHERE same = ?1",
            )?;
            statement.query_map(params![content, NEVER], |row| row.get(0))?.collect()
        })
    }

    /// The directories and names by which a node was reached at any time after `since`.
    pub fn names_since(
        &self,
        node: NodeId,
        since: Generation,
    ) -> Result<Vec<(RelPath, EntryName)>> {
        self.settle_pending()?;
        let newest = self.generation();
        self.shared.read_at_once(|db| {
            let mut statement = db.prepare_cached(
                "SELECT parent, name, died FROM entry_h WHERE node = ?1 AND died > ?2 \
                 UNION ALL SELECT parent, name, ?3 FROM entry WHERE node = ?1",
            )?;
            let rows = statement.query_map(params![node, since, NEVER], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })?;
            let mut found = Vec::new();
            for row in rows {
                let (parent, name, died): (NodeId, EntryName, Generation) = row?;
                let last = Generation(died.0.saturating_sub(1)).min(newest);
                // The directory, too, may lie where it was before.
                for at in [last, since] {
                    if let Some(dir) = path_at(db, at, parent)? {
                        found.push((dir, name.clone()));
                    }
                }
            }
            found.sort_unstable();
            found.dedup();
            Ok(found)
        })
    }
}

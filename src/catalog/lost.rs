//! What recovery asks about contents whose bytes an unclean end may have taken.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use rusqlite::{Connection, OptionalExtension, params};

use super::query::path_at;
use super::schema::{ContentState, NODE_COLUMNS, node_row, unsigned};
use super::{Catalog, NEVER, NodeRow, touched};
use crate::error::Result;
use crate::types::{ContentId, EntryName, Generation, NodeId, RelPath, Timestamp};

/// A content that history shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PastContent {
    /// Which.
    pub id: ContentId,
    /// Its bytes.
    pub size: u64,
    /// It is recorded to lie in `preserved/`.
    pub preserved: bool,
    /// It is reached through others.
    pub chained: bool,
    /// The first generation that shows it, unless that is an old one.
    pub born: Generation,
    /// The newest state that shows it.
    pub row: NodeRow,
    /// The times of modification of all states that show it.
    pub mtimes: Vec<Timestamp>,
    last: Generation,
    is_live: bool,
}

/// A name by which a node was reached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PastName {
    /// The directory that it was in, by a path which that had.
    pub dir: RelPath,
    /// The name.
    pub name: EntryName,
    /// No other node had it, and the directory stayed where it is: what lies there is the node's.
    pub is_own: bool,
}

impl Catalog {
    /// Nodes of which a state or a name began or ended after `since`, in order.
    pub fn touched_since(&self, since: Generation) -> Result<Vec<NodeId>> {
        self.settle_pending()?;
        let until = self.generation();
        let nodes = self.shared.read(|db| touched::nodes(db, since, until))?;
        Ok(nodes.into_iter().collect())
    }

    /// The contents of a node that a state showed which ended after `since`, or is the newest one;
    /// newest first. The live file's own content is among them only if it lies in `preserved/`.
    pub fn contents_since(&self, node: NodeId, since: Generation) -> Result<Vec<PastContent>> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut known = db.prepare_cached("SELECT size, state FROM content WHERE id = ?1")?;
            let mut states = db.prepare_cached(&format!(
                "SELECT {NODE_COLUMNS}, born, 1 FROM node WHERE id = ?1 AND content > 0 \
                 UNION ALL SELECT {NODE_COLUMNS}, born, 0 FROM node_h WHERE id = ?1 \
                 AND died > ?2 AND content > 0"
            ))?;
            let mut found: BTreeMap<ContentId, PastContent> = BTreeMap::new();
            let mut rows = states.query(params![node, since])?;
            while let Some(row) = rows.next()? {
                let (state, born, is_live) = (node_row(row, 0)?, row.get(13)?, row.get(14)?);
                if let Some(content) = found.get_mut(&state.content) {
                    content.is_live |= is_live;
                    content.mtimes.push(state.mtime);
                    // The newest state of all tells how the file was last.
                    if born > content.last {
                        (content.last, content.row) = (born, state);
                    }
                    content.born = content.born.min(born);
                    continue;
                }
                let whole = known.query_row(params![state.content], |row| {
                    Ok((unsigned(row, 0)?, row.get::<_, i64>(1)?))
                });
                let Some((size, place)) = whole.optional()? else { continue };
                let preserved = [ContentState::Preserved, ContentState::Cloned];
                let id = state.content;
                let content = PastContent {
                    id,
                    size,
                    preserved: preserved.iter().any(|state| *state as i64 == place),
                    chained: place == 0,
                    born,
                    mtimes: vec![state.mtime],
                    last: born,
                    row: state,
                    is_live,
                };
                found.insert(id, content);
            }
            let past = found.into_values().rev();
            Ok(past.filter(|content| content.preserved || !content.is_live).collect())
        })
    }

    /// Whether it has anything of a node: that it lives, a past state of it, or a content.
    pub fn knows_node(&self, node: NodeId) -> Result<bool> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT 1 FROM node WHERE id = ?1 UNION ALL SELECT 1 FROM node_h WHERE id = ?1 \
                 UNION ALL SELECT 1 FROM content WHERE node = ?1 LIMIT 1",
            )?;
            statement.exists(params![node])
        })
    }

    /// The first generation known to show a content of a node.
    pub fn shown_from(&self, node: NodeId, content: ContentId) -> Result<Option<Generation>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT min(born) FROM (SELECT born FROM node WHERE id = ?1 AND content = ?2 \
                 UNION ALL SELECT born FROM node_h WHERE id = ?1 AND content = ?2)",
            )?;
            statement.query_row(params![node, content], |row| row.get(0))
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

    /// The names by which a node was reached at any time after `since`, in order. One whose
    /// directory moved is told for each of its places.
    pub fn names_since(&self, node: NodeId, since: Generation) -> Result<Vec<PastName>> {
        self.settle_pending()?;
        let newest = self.generation();
        self.shared.read_at_once(|db| {
            let mut statement = db.prepare_cached(
                "SELECT parent, name, died FROM entry_h WHERE node = ?1 AND died > ?2 \
                 UNION ALL SELECT parent, name, ?3 FROM entry WHERE node = ?1",
            )?;
            let mut others = db.prepare_cached(
                "SELECT 1 FROM entry_h WHERE parent = ?1 AND name = ?2 AND died > ?3 \
                 AND node <> ?4 \
                 UNION ALL SELECT 1 FROM entry WHERE parent = ?1 AND name = ?2 AND node <> ?4",
            )?;
            let rows = statement.query_map(params![node, since, NEVER], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })?;
            let mut found = Vec::new();
            // A name can have been a node's many times.
            let mut own: HashMap<(NodeId, EntryName), bool> = HashMap::new();
            for row in rows {
                let (parent, name, died): (NodeId, EntryName, Generation) = row?;
                let is_own = match own.entry((parent, name.clone())) {
                    Entry::Occupied(known) => *known.get(),
                    Entry::Vacant(unknown) => {
                        let others = others.exists(params![parent, name, since, node])?;
                        *unknown.insert(!others && has_stayed(db, parent, since)?)
                    }
                };
                let last = Generation(died.0.saturating_sub(1)).min(newest);
                // The directory, too, may lie where it was before.
                for at in [last, since] {
                    if let Some(dir) = path_at(db, at, parent)? {
                        found.push(PastName { dir, name: name.clone(), is_own });
                    }
                }
            }
            found.sort_unstable();
            found.dedup();
            Ok(found)
        })
    }

    /// The nodes that lost a name after `since`, as they were last.
    pub fn held_since(
        &self,
        (parent, name): (NodeId, &EntryName),
        since: Generation,
    ) -> Result<Vec<NodeRow>> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut holders = db.prepare_cached(
                "SELECT DISTINCT node FROM entry_h WHERE parent = ?1 AND name = ?2 AND died > ?3",
            )?;
            let mut states = db.prepare_cached(&format!(
                "SELECT {NODE_COLUMNS}, ?2 AS died FROM node WHERE id = ?1 \
                 UNION ALL SELECT {NODE_COLUMNS}, died FROM node_h WHERE id = ?1 \
                 ORDER BY died DESC LIMIT 1"
            ))?;
            let nodes = holders.query_map(params![parent, name, since], |row| row.get(0))?;
            let nodes = nodes.collect::<rusqlite::Result<Vec<NodeId>>>()?;
            let last = nodes.into_iter().map(|node| {
                states.query_row(params![node, NEVER], |row| node_row(row, 0)).optional()
            });
            Ok(last.collect::<rusqlite::Result<Vec<_>>>()?.into_iter().flatten().collect())
        })
    }
}

/// Whether neither a directory nor one above it got or lost a name after `since`.
fn has_stayed(db: &Connection, dir: NodeId, since: Generation) -> rusqlite::Result<bool> {
    let mut moved = db.prepare_cached("SELECT 1 FROM entry_h WHERE node = ?1 AND died > ?2")?;
    let mut own = db.prepare_cached("SELECT parent, born FROM entry WHERE node = ?1")?;
    let mut at = dir;
    while at != NodeId::ROOT {
        let place = own.query_row(params![at], |row| Ok((row.get(0)?, row.get(1)?)));
        let Some((parent, born)): Option<(NodeId, Generation)> = place.optional()? else {
            return Ok(false);
        };
        if born > since || moved.exists(params![at, since])? {
            return Ok(false);
        }
        at = parent;
    }
    Ok(true)
}

//! Queries of the live tree: the overlay first, then the database.
//!
//! A batch leaves the overlay only after its commit. So what the overlay does not know at one
//! moment, a database state read later knows: single answers need no more than that order. Answers
//! of many rows pin the state of the database while they look at the overlay; what both know of a
//! name is the same, or the overlay's is newer.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, params};

use super::overlay::Batch;
use super::schema::{NODE_COLUMNS, node_row};
use super::{Catalog, Listed, NEVER, NodeRow, Shared};
use crate::error::Result;
use crate::types::{EntryName, Generation, Kind, NodeId};

impl Catalog {
    /// The node that `name` in `parent` means, and its kind.
    pub fn lookup(&self, parent: NodeId, name: &EntryName) -> Result<Option<(NodeId, Kind)>> {
        match self.shared.foreseen_entry(parent, name) {
            (Some(None), _) => Ok(None),
            (Some(Some(node)), _) => Ok(self.shared.kind(node)?.map(|kind| (node, kind))),
            (None, Some(foreseen)) => Ok(Some(foreseen)),
            (None, None) => self.shared.read(|db| stored_entry(db, parent, name)),
        }
    }

    /// As [`Catalog::lookup`], of several names in one directory: one transaction for all.
    pub fn lookup_all(
        &self,
        parent: NodeId,
        names: &[EntryName],
    ) -> Result<Vec<Option<(NodeId, Kind)>>> {
        let pending = |name| self.shared.overlay(|batch| batch.entry(parent, name));
        let pending: Vec<_> = names.iter().map(pending).collect();
        let known = pending.iter().map(|pending| match pending {
            Some(Some(node)) => Ok(self.shared.kind(*node)?.map(|kind| (*node, kind))),
            Some(None) | None => Ok(None),
        });
        let mut found = known.collect::<Result<Vec<_>>>()?;
        if pending.iter().all(Option::is_some) {
            return Ok(found);
        }
        self.shared.read_at_once(|db| {
            let stored = found.iter_mut().zip(names).zip(&pending);
            for ((found, name), _) in stored.filter(|(_, pending)| pending.is_none()) {
                *found = stored_entry(db, parent, name)?;
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// A live node's newest state.
    pub fn node(&self, node: NodeId) -> Result<Option<NodeRow>> {
        if let Some(known) = self.shared.overlay(|batch| batch.node(node).map(Option::<&_>::cloned))
        {
            return Ok(known);
        }
        self.shared.read(|db| {
            db.prepare_cached(&format!("SELECT {NODE_COLUMNS} FROM node WHERE id = ?1"))?
                .query_row(params![node], |row| node_row(row, 0))
                .optional()
        })
    }

    /// Whether history shows the newest state of a live node; `false` for one that is gone.
    pub fn is_versioned(&self, node: NodeId) -> Result<bool> {
        let pending = self.shared.overlay(|batch| {
            let delta = batch.nodes.get(&node)?;
            Some(delta.current.as_ref().map(|(born, _)| *born))
        });
        let born = match pending {
            Some(born) => born,
            None => self.shared.read(|db| {
                db.prepare_cached("SELECT born FROM node WHERE id = ?1")?
                    .query_row(params![node], |row| row.get::<_, Generation>(0))
                    .optional()
            })?,
        };
        Ok(born.is_some_and(|born| born < NEVER))
    }

    /// Whether history shows a live entry; `None` where there is none.
    pub fn entry_is_versioned(&self, parent: NodeId, name: &EntryName) -> Result<Option<bool>> {
        let pending = self.shared.overlay(|batch| {
            let delta = batch.entries.get(&parent)?.get(name)?;
            Some(delta.current.map(|(_, born)| born))
        });
        let born = match pending {
            Some(born) => born,
            None => self.shared.read(|db| {
                db.prepare_cached("SELECT born FROM entry WHERE parent = ?1 AND name = ?2")?
                    .query_row(params![parent, name], |row| row.get::<_, Generation>(0))
                    .optional()
            })?,
        };
        Ok(born.map(|born| born < NEVER))
    }

    /// All entries of a live directory, ordered by name.
    pub fn list(&self, parent: NodeId) -> Result<Vec<Listed>> {
        self.shared.read_with_overlay(
            |batches| {
                let mut names: BTreeMap<EntryName, Option<(NodeId, Option<Kind>)>> =
                    BTreeMap::new();
                for batch in batches {
                    for (name, delta) in batch.entries.get(&parent).into_iter().flatten() {
                        let current = delta.current.map(|(node, _)| {
                            (node, batches.iter().rev().find_map(|batch| batch.kind(node)))
                        });
                        names.insert(name.clone(), current);
                    }
                }
                names
            },
            |db, names| list_merged(db, parent, names),
        )
    }

    /// All live names of a node.
    pub fn names(&self, node: NodeId) -> Result<Vec<(NodeId, EntryName)>> {
        self.shared.read(|db| {
            // The database is asked under the lock: a node has few names, and none may slip from
            // the one to the other between the two looks.
            let queue = self.shared.waiting.queue.lock();
            let batches = [Some(&queue.open), queue.committing.as_deref()];
            let newest = |(parent, name): &(NodeId, EntryName)| {
                batches.iter().flatten().find_map(|batch| batch.entry(*parent, name))
            };
            let mut names: Vec<(NodeId, EntryName)> = db
                .prepare_cached("SELECT parent, name FROM entry WHERE node = ?1")?
                .query_map(params![node], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect::<rusqlite::Result<_>>()?;
            names.retain(|key| newest(key).is_none_or(|to| to == Some(node)));
            let named = batches.iter().flatten().flat_map(|batch| batch.named.get(&node));
            names.extend(named.flatten().filter(|key| newest(key) == Some(Some(node))).cloned());
            drop(queue);
            names.sort_unstable();
            names.dedup();
            Ok(names)
        })
    }

    /// Calls `f` for every live directory but the root that is in the database, with where it lies.
    pub fn live_dirs(&self, f: &mut dyn FnMut(NodeId, NodeId, EntryName)) -> Result<()> {
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT e.node, e.parent, e.name FROM entry e JOIN node n ON n.id = e.node \
                 WHERE n.kind = ?1",
            )?;
            let mut rows = statement.query(params![Kind::Dir])?;
            while let Some(row) = rows.next()? {
                f(row.get(0)?, row.get(1)?, row.get(2)?);
            }
            Ok(())
        })
    }

    /// A symlink's target.
    pub fn symlink_target(&self, node: NodeId) -> Result<Option<Vec<u8>>> {
        if let Some(target) = self.shared.overlay(|batch| batch.symlinks.get(&node).cloned()) {
            return Ok(Some(target));
        }
        self.shared.read(|db| {
            db.prepare_cached("SELECT target FROM symlink WHERE node = ?1")?
                .query_row(params![node], |row| row.get(0))
                .optional()
        })
    }
}

impl Batch {
    /// The kind of a node that this batch has a state of.
    fn kind(&self, node: NodeId) -> Option<Kind> {
        let delta = self.nodes.get(&node)?;
        let current = delta.current.as_ref().map(|(_, row)| row.kind);
        current.or_else(|| delta.past.last().map(|(_, _, row)| row.kind))
    }
}

impl Shared {
    fn kind(&self, node: NodeId) -> Result<Option<Kind>> {
        match self.overlay(|batch| batch.kind(node)) {
            Some(kind) => Ok(Some(kind)),
            None => self.read(|db| stored_kind(db, node)),
        }
    }

    /// Looks at the pending batches (older first) and pins the database's state in the same moment,
    /// then queries that state.
    fn read_with_overlay<P, T>(
        &self,
        pending: impl Fn(&[&Batch]) -> P,
        query: impl Fn(&Connection, &P) -> rusqlite::Result<T>,
    ) -> Result<T> {
        self.read_at_once(|db| {
            let known = {
                let queue = self.waiting.queue.lock();
                // A transaction's state is that of its first read.
                db.prepare_cached("SELECT sequence FROM head WHERE one = 1")?
                    .query_row([], |row| row.get::<_, i64>(0))?;
                match queue.committing.as_deref() {
                    Some(committing) => pending(&[committing, &queue.open]),
                    None => pending(&[&queue.open]),
                }
            };
            query(db, &known)
        })
    }
}

fn stored_entry(
    db: &Connection,
    parent: NodeId,
    name: &EntryName,
) -> rusqlite::Result<Option<(NodeId, Kind)>> {
    db.prepare_cached(
        "SELECT e.node, n.kind FROM entry e JOIN node n ON n.id = e.node \
         WHERE e.parent = ?1 AND e.name = ?2",
    )?
    .query_row(params![parent, name], |row| Ok((row.get(0)?, row.get(1)?)))
    .optional()
}

type Names = BTreeMap<EntryName, Option<(NodeId, Option<Kind>)>>;

fn list_merged(db: &Connection, parent: NodeId, names: &Names) -> rusqlite::Result<Vec<Listed>> {
    let mut list = Vec::new();
    for (name, known) in names {
        let Some((node, kind)) = *known else { continue };
        let kind = match kind {
            Some(kind) => Some(kind),
            None => stored_kind(db, node)?,
        };
        list.extend(kind.map(|kind| Listed { name: name.clone(), node, kind }));
    }
    let mut statement =
        db.prepare_cached("SELECT name, node, kind FROM entry WHERE parent = ?1 ORDER BY name")?;
    let mut rows = statement.query(params![parent])?;
    while let Some(row) = rows.next()? {
        let name: EntryName = row.get(0)?;
        if !names.contains_key(&name) {
            let kind = row.get::<_, Option<Kind>>(2)?.unwrap_or(Kind::File);
            list.push(Listed { name, node: row.get(1)?, kind });
        }
    }
    if !names.is_empty() {
        list.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    }
    Ok(list)
}

/// The kind of a node, live or gone.
fn stored_kind(db: &Connection, node: NodeId) -> rusqlite::Result<Option<Kind>> {
    db.prepare_cached(
        "SELECT kind FROM node WHERE id = ?1 \
         UNION ALL SELECT kind FROM node_h WHERE id = ?1 LIMIT 1",
    )?
    .query_row(params![node], |row| row.get(0))
    .optional()
}

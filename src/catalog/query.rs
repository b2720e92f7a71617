//! Queries of the past: what one generation shows, where contents are, and what time it was.
//!
//! A generation that is asked for is first made final: its burst is ended and it is committed.
//! Every query is one statement or one transaction, so a commit in between cannot move a row past
//! it.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::retain::{visible, visible_from};
use super::schema::{ContentState, NODE_COLUMNS, node_row, read_head_only, undo_row, unsigned};
use super::{Base, Catalog, Durability, Listed, NodeRow, Sources};
use crate::error::Result;
use crate::types::{ContentId, EntryName, Generation, Kind, NodeId, RelPath, Timestamp};

/// Directories deeper than this do not exist; only a damaged catalog leads further.
const DEPTH_MAX: usize = 1 << 16;

impl Catalog {
    /// The newest generation.
    pub fn generation(&self) -> Generation {
        if self.shared.read_only {
            let stored = self.shared.read(|db| Ok(read_head_only(db)?.generation));
            let mut queue = self.shared.waiting.queue.lock();
            // An unreadable head does not take back what is known.
            queue.generation = queue.generation.max(stored.unwrap_or_default());
            queue.committed = queue.generation;
            return queue.generation;
        }
        self.shared.waiting.queue.lock().generation
    }

    /// Makes `at` final and clamps it to the newest generation.
    pub(super) fn settled(&self, at: Generation) -> Result<Generation> {
        if at <= self.shared.waiting.queue.lock().committed {
            return Ok(at);
        }
        let newest = self.freeze();
        self.flush(Durability::Written)?;
        Ok(at.min(newest))
    }

    /// Commits what waits, if anything does.
    pub(super) fn settle_pending(&self) -> Result<()> {
        self.flush(Durability::Written)
    }

    /// The state of a node, if it lived then.
    pub fn node_at(&self, at: Generation, node: NodeId) -> Result<Option<NodeRow>> {
        let at = self.settled(at)?;
        self.shared.read(|db| node_at(db, at, node))
    }

    /// The state of what `name` in `parent` meant.
    pub fn lookup_at(
        &self,
        at: Generation,
        parent: NodeId,
        name: &EntryName,
    ) -> Result<Option<NodeRow>> {
        let at = self.settled(at)?;
        self.shared.read_at_once(|db| match entry_at(db, at, parent, name)? {
            Some(node) => node_at(db, at, node),
            None => Ok(None),
        })
    }

    /// As [`Catalog::lookup_at`], and how many names a file had.
    pub fn find_at(
        &self,
        at: Generation,
        parent: NodeId,
        name: &EntryName,
    ) -> Result<Option<(NodeRow, u32)>> {
        let at = self.settled(at)?;
        self.shared.read_at_once(|db| match entry_at(db, at, parent, name)? {
            Some(node) => state_at(db, at, node),
            None => Ok(None),
        })
    }

    /// The states of several nodes, and how many names each had: one transaction for all.
    pub fn states_at(
        &self,
        at: Generation,
        nodes: &[NodeId],
    ) -> Result<Vec<Option<(NodeRow, u32)>>> {
        let at = self.settled(at)?;
        self.shared.read_at_once(|db| nodes.iter().map(|node| state_at(db, at, *node)).collect())
    }

    /// The entries of a directory, ordered by name.
    pub fn list_at(&self, at: Generation, parent: NodeId) -> Result<Vec<Listed>> {
        let at = self.settled(at)?;
        self.shared.read_at_once(|db| {
            let mut statement = db.prepare_cached(
                "SELECT name, node, kind FROM entry WHERE parent = ?1 AND born <= ?2 \
                 UNION ALL SELECT name, node, kind FROM entry_h \
                 WHERE parent = ?1 AND died > ?2 AND born <= ?2",
            )?;
            let rows = statement.query_map(params![parent, at], |row| {
                let kind = row.get::<_, Option<Kind>>(2)?.unwrap_or(Kind::File);
                Ok(Listed { name: row.get(0)?, node: row.get(1)?, kind })
            })?;
            let mut list = rows.collect::<rusqlite::Result<Vec<_>>>()?;
            list.sort_unstable_by(|a, b| a.name.cmp(&b.name));
            Ok(list)
        })
    }

    /// How many names a node had.
    pub fn links_at(&self, at: Generation, node: NodeId) -> Result<u32> {
        let at = self.settled(at)?;
        self.shared.read(|db| links_at(db, at, node))
    }

    /// One path of a node (the first by parent and name), root-relative; `None` if it had none.
    pub fn path_at(&self, at: Generation, node: NodeId) -> Result<Option<RelPath>> {
        let at = self.settled(at)?;
        self.shared.read_at_once(|db| path_at(db, at, node))
    }

    /// The state of what `path` meant, from the root.
    pub fn resolve_at(&self, at: Generation, path: &RelPath) -> Result<Option<NodeRow>> {
        let at = self.settled(at)?;
        self.shared.read_at_once(|db| {
            let mut node = NodeId::ROOT;
            for name in path.names() {
                match entry_at(db, at, node, name)? {
                    Some(child) => node = child,
                    None => return Ok(None),
                }
            }
            node_at(db, at, node)
        })
    }

    /// Where the bytes of `content` are.
    pub fn sources(&self, node: NodeId, content: ContentId) -> Result<Sources> {
        let mut settled = Vec::new();
        let mut fresh = vec![(node, content)];
        loop {
            // Only what waits of these very nodes matters: a busy store is not flushed for every
            // open. What does not wait before the query, the query sees.
            if fresh.iter().any(|&(node, content)| self.has_pending(node, content)) {
                self.settle_pending()?;
            }
            settled.append(&mut fresh);
            let (sources, seen) = self.shared.read_at_once(|db| {
                let mut seen = Vec::new();
                Ok((sources(db, node, content, &mut seen)?, seen))
            })?;
            fresh.extend(seen.into_iter().filter(|part| !settled.contains(part)));
            if fresh.is_empty() {
                return Ok(sources);
            }
        }
    }

    /// Whether something waits that says where a content or a later one of its node is.
    fn has_pending(&self, node: NodeId, content: ContentId) -> bool {
        let pending = self.shared.overlay(|batch| {
            let undo = batch.undo.iter().any(|row| row.node == node);
            let own = batch.contents.range(content..).any(|(_, (owner, _))| *owner == node);
            let whole = batch.preserved.iter().any(|(id, _)| *id >= content);
            (undo || own || whole).then_some(())
        });
        pending.is_some()
    }

    /// The size of a sealed content.
    pub fn content_size(&self, content: ContentId) -> Result<Option<u64>> {
        if content == ContentId::EMPTY {
            return Ok(Some(0));
        }
        let pending = self.shared.overlay(|batch| batch.contents.get(&content).copied());
        if let Some((_, size)) = pending {
            return Ok(Some(size));
        }
        self.shared.read(|db| {
            db.prepare_cached("SELECT size FROM content WHERE id = ?1")?
                .query_row(params![content], |row| unsigned(row, 0))
                .optional()
        })
    }

    /// The newest generation at `time` that is still visible; `None` before the first of them.
    pub fn generation_at(&self, time: Timestamp) -> Result<Option<Generation>> {
        // What comes after this answer must not belong to a moment that it has spoken for.
        let newest = self.freeze_time();
        self.settle_pending()?;
        let found = self.shared.read_at_once(|db| {
            let Some(tick) = tick_at(db, time)? else { return Ok(None) };
            let last =
                tick_after(db, tick)?.map_or(newest, |after| Generation(after.0.saturating_sub(1)));
            let at = last.min(newest);
            // Where nothing so old is kept, the oldest that is would be no answer.
            Ok(Some(visible(db, at)?).filter(|visible| *visible <= at))
        })?;
        // Generation 0 is the store before its root directory.
        Ok(found.map(|at| at.min(newest)).filter(|at| *at > Generation(0)))
    }

    /// The first generation that was later than `time`, visible or not; one that is still to come,
    /// if none was. `None` if the store has no generation that was not later.
    pub fn recorded_after(&self, time: Timestamp) -> Result<Option<Generation>> {
        // Before what is pending is written: what comes later may have a time that is not.
        let newest = self.generation();
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let Some(tick) = tick_at(db, time)? else { return Ok(None) };
            let next = tick_after(db, tick)?;
            Ok(Some(next.unwrap_or(Generation(newest.0 + 1))))
        })
    }

    /// Whether a generation can still be looked at: retention may have taken it out meanwhile.
    pub fn is_visible(&self, at: Generation) -> Result<bool> {
        self.shared.read_at_once(|db| Ok(visible(db, at)? == at))
    }

    /// When a generation began, to about 10 ms.
    pub fn time_of(&self, generation: Generation) -> Result<Timestamp> {
        let generation = self.settled(generation)?;
        self.shared.read(|db| time_of(db, generation))
    }

    /// The oldest generation whose tree is still known.
    pub fn oldest(&self) -> Result<Generation> {
        let oldest = self.shared.read_at_once(|db| visible_from(db, Generation(1)))?;
        Ok(oldest.min(self.generation()))
    }
}

/// The first generation of the next time on record after that of `tick`.
fn tick_after(db: &Connection, tick: Generation) -> rusqlite::Result<Option<Generation>> {
    db.prepare_cached("SELECT g FROM tick WHERE g > ?1 ORDER BY g LIMIT 1")?
        .query_row(params![tick], |row| row.get(0))
        .optional()
}

/// The first generation of the last time on record that is not later than `time`. Both columns of
/// `tick` ascend, so an index by time is not needed: it is found by halving.
pub(super) fn tick_at(db: &Connection, time: Timestamp) -> rusqlite::Result<Option<Generation>> {
    let ends = |row: &Row<'_>| Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, Option<i64>>(1)?));
    let (first, last) = db
        .prepare_cached("SELECT (SELECT min(g) FROM tick), (SELECT max(g) FROM tick)")?
        .query_row([], ends)?;
    let (Some(mut low), Some(mut high)) = (first, last) else { return Ok(None) };
    let mut before =
        db.prepare_cached("SELECT g, t FROM tick WHERE g <= ?1 ORDER BY g DESC LIMIT 1")?;
    let mut found = None;
    while low <= high {
        let middle = low + (high - low) / 2;
        // There is one: the lower bound of the search has or had a tick before it.
        let (g, t): (i64, i64) =
            before.query_row(params![middle], |row| Ok((row.get(0)?, row.get(1)?)))?;
        if t <= time.as_nanos() {
            found = Some(Generation(g.unsigned_abs()));
            low = middle + 1;
        } else {
            high = g - 1;
        }
    }
    Ok(found)
}

/// A content that has another's bytes leads to no third one: see [`super::PackChange`].
const SAME_MAX: usize = 64;

/// See [`Catalog::sources`]. `seen` gets every content whose chain was followed.
pub(super) fn sources(
    db: &Connection,
    node: NodeId,
    content: ContentId,
    seen: &mut Vec<(NodeId, ContentId)>,
) -> rusqlite::Result<Sources> {
    let mut undo = Vec::new();
    let (mut node, mut content) = (node, content);
    for _ in 0..SAME_MAX {
        seen.push((node, content));
        let whole: Option<(ContentId, i64, Option<ContentId>)> = db
            .prepare_cached(
                "SELECT id, state, same FROM content WHERE node = ?1 AND id >= ?2 AND state <> 0 \
                 ORDER BY id LIMIT 1",
            )?
            .query_row(params![node, content], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            .optional()?;
        let last = whole.map_or(ContentId(i64::MAX as u64), |(id, ..)| id);
        let mut statement = db.prepare_cached(
            "SELECT content, offset, length, segment, segment_offset FROM undo \
             WHERE node = ?1 AND content >= ?2 AND content <= ?3 ORDER BY content, offset",
        )?;
        let rows = statement.query_map(params![node, content, last], |row| undo_row(row, node))?;
        for row in rows {
            undo.push(row?);
        }
        let base = match whole {
            None => Base::Live(node),
            Some((id, state, _)) if state == ContentState::Packed as i64 => Base::Packed(id),
            Some((_, _, Some(same))) => {
                let owner = "SELECT node FROM content WHERE id = ?1";
                node = db.prepare_cached(owner)?.query_row(params![same], |row| row.get(0))?;
                content = same;
                continue;
            }
            Some((id, ..)) => Base::Preserved { node, content: id },
        };
        return Ok(Sources { undo, base });
    }
    Err(rusqlite::Error::QueryReturnedNoRows)
}

/// The time of the tick that a generation belongs to.
pub(super) fn time_of(db: &Connection, generation: Generation) -> rusqlite::Result<Timestamp> {
    let nanos: Option<i64> = db
        .prepare_cached("SELECT t FROM tick WHERE g <= ?1 ORDER BY g DESC LIMIT 1")?
        .query_row(params![generation], |row| row.get(0))
        .optional()?;
    Ok(Timestamp::from_nanos(nanos.unwrap_or(0)))
}

/// How many names a node had at a settled generation.
fn links_at(db: &Connection, at: Generation, node: NodeId) -> rusqlite::Result<u32> {
    db.prepare_cached(
        "SELECT (SELECT count(*) FROM entry WHERE node = ?1 AND born <= ?2) + \
         (SELECT count(*) FROM entry_h WHERE node = ?1 AND died > ?2 AND born <= ?2)",
    )?
    .query_row(params![node, at], |row| row.get(0))
}

/// The state of a node at a settled generation, and how many names it had; one for a directory.
fn state_at(
    db: &Connection,
    at: Generation,
    node: NodeId,
) -> rusqlite::Result<Option<(NodeRow, u32)>> {
    let Some(row) = node_at(db, at, node)? else { return Ok(None) };
    let links = if row.kind == Kind::Dir { 1 } else { links_at(db, at, node)? };
    Ok(Some((row, links)))
}

/// The state of a node at a settled generation. Live first: rows only ever move to history.
pub(super) fn node_at(
    db: &Connection,
    at: Generation,
    node: NodeId,
) -> rusqlite::Result<Option<NodeRow>> {
    let live = db
        .prepare_cached(&format!("SELECT {NODE_COLUMNS} FROM node WHERE id = ?1 AND born <= ?2"))?
        .query_row(params![node, at], |row| node_row(row, 0))
        .optional()?;
    if live.is_some() {
        return Ok(live);
    }
    let past: Option<(NodeRow, Generation)> = db
        .prepare_cached(&format!(
            "SELECT {NODE_COLUMNS}, born FROM node_h WHERE id = ?1 AND died > ?2 \
             ORDER BY died LIMIT 1"
        ))?
        .query_row(params![node, at], |row| Ok((node_row(row, 0)?, row.get(13)?)))
        .optional()?;
    Ok(past.filter(|(_, born)| *born <= at).map(|(row, _)| row))
}

/// What a name meant at a settled generation.
pub(super) fn entry_at(
    db: &Connection,
    at: Generation,
    parent: NodeId,
    name: &EntryName,
) -> rusqlite::Result<Option<NodeId>> {
    let live = db
        .prepare_cached("SELECT node FROM entry WHERE parent = ?1 AND name = ?2 AND born <= ?3")?
        .query_row(params![parent, name, at], |row| row.get(0))
        .optional()?;
    if live.is_some() {
        return Ok(live);
    }
    let past: Option<(NodeId, Generation)> = db
        .prepare_cached(
            "SELECT node, born FROM entry_h WHERE parent = ?1 AND name = ?2 AND died > ?3 \
             ORDER BY died LIMIT 1",
        )?
        .query_row(params![parent, name, at], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    Ok(past.filter(|(_, born)| *born <= at).map(|(node, _)| node))
}

/// See [`Catalog::path_at`]; at a settled generation.
pub(super) fn path_at(
    db: &Connection,
    at: Generation,
    node: NodeId,
) -> rusqlite::Result<Option<RelPath>> {
    let mut names = Vec::new();
    let mut node = node;
    while node != NodeId::ROOT {
        let Some((parent, name)) = names_at(db, at, node)?.into_iter().min() else {
            return Ok(None);
        };
        names.push(name);
        node = parent;
        if names.len() > DEPTH_MAX {
            return Ok(None);
        }
    }
    names.reverse();
    Ok(node_at(db, at, NodeId::ROOT)?.map(|_| RelPath::from(names)))
}

/// The names of a node at a settled generation.
pub(super) fn names_at(
    db: &Connection,
    at: Generation,
    node: NodeId,
) -> rusqlite::Result<Vec<(NodeId, EntryName)>> {
    let mut statement = db.prepare_cached(
        "SELECT parent, name FROM entry WHERE node = ?1 AND born <= ?2 UNION ALL \
         SELECT parent, name FROM entry_h WHERE node = ?1 AND died > ?2 AND born <= ?2",
    )?;
    statement.query_map(params![node, at], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
}

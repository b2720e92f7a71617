//! Writes one batch into one replica's database, in one transaction.
//!
//! Every replica gets the same batch, and what is written depends on the batch and the database
//! alone, so databases that were equal stay equal.

use rusqlite::{CachedStatement, Connection, OptionalExtension, Row, params};

use super::overlay::{Batch, EntryDelta, Late, NodeDelta, Plan, SnapshotChange};
use super::schema::{ContentState, HeadRow, Time, place_columns, read_head, write_head};
use super::touched::{self, Touch};
use super::{NEVER, NodeRow, UndoRow, digest, packed, retain, xattr};
use crate::types::{ContentId, EntryName, Generation, Kind, NodeId};

/// What a commit leaves behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Committed {
    pub sequence: u64,
    pub chain: [u8; 32],
}

/// Writes `plan`. If we die before the end, the database is as it was: the commit is one
/// transaction.
pub(super) fn apply(db: &mut Connection, plan: &Plan<'_>) -> rusqlite::Result<Committed> {
    let transaction = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let mut head = read_head(&transaction)?;
    let mut touched = Touched::with_capacity(plan.nodes.len() * 2);
    let mut nodes = Nodes::prepare(&transaction)?;
    nodes.write(&plan.nodes, &mut head, &mut touched)?;
    let never_shown = std::mem::take(&mut nodes.never_shown);
    drop(nodes);
    Entries::prepare(&transaction)?.write(&plan.entries, &mut touched)?;
    write_rest(&transaction, plan.batch, &mut head)?;
    for node in never_shown {
        transaction
            .prepare_cached(
                "DELETE FROM symlink WHERE node = ?1 \
                 AND NOT EXISTS(SELECT 1 FROM node_h WHERE id = ?1)",
            )?
            .execute(params![node])?;
    }
    touched.sort_unstable();
    touched.dedup();
    touched::add_all(&transaction, &touched)?;
    advance(&mut head, plan);
    write_head(&transaction, &head)?;
    transaction.commit()?;
    Ok(Committed { sequence: head.head.sequence, chain: head.head.chain })
}

fn advance(head: &mut HeadRow, plan: &Plan<'_>) {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head.head.chain);
    hasher.update(&plan.digest);
    head.head.chain = *hasher.finalize().as_bytes();
    head.head.sequence += 1;
    head.head.generation = plan.batch.last;
    head.next = plan.batch.next;
}

/// What is touched, in no order.
type Touched = Vec<Touch>;

/// The statements that write nodes.
struct Nodes<'c> {
    base: CachedStatement<'c>,
    retire: CachedStatement<'c>,
    past: CachedStatement<'c>,
    put: CachedStatement<'c>,
    update: CachedStatement<'c>,
    delete: CachedStatement<'c>,
    /// Nodes that are gone and of which nothing was ever seen, unless by an earlier mount.
    never_shown: Vec<NodeId>,
}

impl<'c> Nodes<'c> {
    fn prepare(db: &'c Connection) -> rusqlite::Result<Nodes<'c>> {
        Ok(Nodes {
            base: db.prepare_cached("SELECT kind, size, born, content FROM node WHERE id = ?1")?,
            retire: db.prepare_cached(
                "INSERT INTO node_h(id, died, kind, mode, uid, gid, rdev, size, blocks, mtime, \
                 ctime, \
                 btime, xattrs, content, born) SELECT id, ?2, kind, mode, uid, gid, rdev, size, \
                 blocks, mtime, ctime, btime, xattrs, content, born FROM node WHERE id = ?1",
            )?,
            past: db.prepare_cached(
                "INSERT INTO node_h(id, kind, mode, uid, gid, rdev, size, blocks, mtime, \
                 ctime, \
                 btime, xattrs, content, born, died) \
                 VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
            )?,
            put: db.prepare_cached(
                "INSERT OR REPLACE INTO node(id, kind, mode, uid, gid, rdev, size, blocks, mtime, \
                 ctime, btime, xattrs, content, born) \
                 VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
            )?,
            update: db.prepare_cached(
                "UPDATE node SET kind = ?2, mode = ?3, uid = ?4, gid = ?5, rdev = ?6, size = ?7, \
                 blocks = ?8, mtime = ?9, ctime = ?10, btime = ?11, xattrs = ?12, content = ?13, \
                 born = ?14 WHERE id = ?1",
            )?,
            delete: db.prepare_cached("DELETE FROM node WHERE id = ?1")?,
            never_shown: Vec::new(),
        })
    }

    fn write(
        &mut self,
        nodes: &[(NodeId, &NodeDelta)],
        head: &mut HeadRow,
        touched: &mut Touched,
    ) -> rusqlite::Result<()> {
        for &(id, delta) in nodes {
            let mut was_live = false;
            let mut shown = !delta.past.is_empty();
            if !delta.newborn {
                let base = self
                    .base
                    .query_row(params![id], |row| {
                        let state = (row.get::<_, Generation>(2)?, row.get::<_, ContentId>(3)?);
                        Ok((row.get::<_, Kind>(0)?, row.get::<_, i64>(1)?, state))
                    })
                    .optional()?;
                if let Some((kind, size, (born, content))) = base {
                    was_live = true;
                    if born < NEVER {
                        self.retire.execute(params![id, delta.base_died])?;
                        head.past_versions += 1;
                        shown = true;
                    }
                    if born < NEVER || content != ContentId::EMPTY {
                        // Its bytes may be what an older version is read from.
                        touched.push((delta.base_died, id));
                        shown = true;
                    }
                    head.live_nodes -= 1;
                    head.live_bytes -= live_bytes(kind, size);
                }
            }
            for (born, died, row) in &delta.past {
                bind_node(&mut self.past, row, *born)?;
                self.past.raw_bind_parameter(15, died)?;
                self.past.raw_execute()?;
                head.past_versions += 1;
                touched.extend([(*born, id), (*died, id)]);
            }
            match &delta.current {
                Some((born, row)) => {
                    let write = if was_live { &mut self.update } else { &mut self.put };
                    bind_node(write, row, *born)?;
                    write.raw_execute()?;
                    head.live_nodes += 1;
                    head.live_bytes += live_bytes(row.kind, row.size as i64);
                }
                None if was_live => {
                    self.delete.execute(params![id])?;
                }
                None => {}
            }
            match &delta.current {
                Some((born, _)) if *born < NEVER => touched.push((*born, id)),
                None if !shown => self.never_shown.push(id),
                _ => {}
            }
        }
        Ok(())
    }
}

/// What a live node adds to the total of bytes.
fn live_bytes(kind: Kind, size: i64) -> i64 {
    if kind == Kind::File { size } else { 0 }
}

fn bind_node(
    to: &mut CachedStatement<'_>,
    row: &NodeRow,
    born: Generation,
) -> rusqlite::Result<()> {
    to.raw_bind_parameter(1, row.id)?;
    to.raw_bind_parameter(2, row.kind)?;
    to.raw_bind_parameter(3, row.mode)?;
    to.raw_bind_parameter(4, row.uid)?;
    to.raw_bind_parameter(5, row.gid)?;
    to.raw_bind_parameter(6, row.rdev as i64)?;
    to.raw_bind_parameter(7, row.size as i64)?;
    to.raw_bind_parameter(8, row.blocks as i64)?;
    to.raw_bind_parameter(9, Time(row.mtime))?;
    to.raw_bind_parameter(10, Time::beside(row.ctime, row.mtime))?;
    to.raw_bind_parameter(11, Time::beside(row.btime, row.mtime))?;
    to.raw_bind_parameter(12, row.xattrs)?;
    to.raw_bind_parameter(13, row.content)?;
    to.raw_bind_parameter(14, born)
}

/// The statements that write directory entries. The states of the nodes are written before.
struct Entries<'c> {
    kind: CachedStatement<'c>,
    add: CachedStatement<'c>,
    remove: CachedStatement<'c>,
    past: CachedStatement<'c>,
}

impl<'c> Entries<'c> {
    fn prepare(db: &'c Connection) -> rusqlite::Result<Entries<'c>> {
        Ok(Entries {
            kind: db.prepare_cached(
                "SELECT nullif(coalesce((SELECT kind FROM node WHERE id = ?1), \
                 (SELECT kind FROM node_h WHERE id = ?1 LIMIT 1)), 8)",
            )?,
            add: db.prepare_cached(
                "INSERT INTO entry(parent, name, node, born, kind) VALUES(?1, ?2, ?3, ?4, ?5) \
                 ON CONFLICT DO NOTHING",
            )?,
            remove: db.prepare_cached(
                "DELETE FROM entry WHERE parent = ?1 AND name = ?2 RETURNING node, born, kind",
            )?,
            past: db.prepare_cached(
                "INSERT INTO entry_h(parent, name, node, born, died, kind) \
                 VALUES(?1, ?2, ?3, ?4, ?5, ?6)",
            )?,
        })
    }

    /// What an entry's `kind` is to be.
    fn kind(&mut self, node: NodeId) -> rusqlite::Result<Option<i64>> {
        self.kind.query_row(params![node], |row| row.get(0))
    }

    fn write(
        &mut self,
        entries: &[(NodeId, &EntryName, &EntryDelta)],
        touched: &mut Touched,
    ) -> rusqlite::Result<()> {
        for &(parent, name, delta) in entries {
            if !delta.added_first {
                self.retire(parent, name, delta.base_died, touched)?;
            }
            for &(node, born, died) in &delta.past {
                let kind = self.kind(node)?;
                self.past.execute(params![parent, name, node, born, died, kind])?;
                touched.extend([(born, node), (died, node)]);
            }
            if let Some((node, born)) = delta.current {
                if born < NEVER {
                    touched.push((born, node));
                }
                let kind = self.kind(node)?;
                if self.add.execute(params![parent, name, node, born, kind])? == 0 {
                    // The name was not free after all: history keeps what it meant.
                    self.retire(parent, name, delta.base_died, touched)?;
                    self.add.execute(params![parent, name, node, born, kind])?;
                }
            }
        }
        Ok(())
    }

    fn retire(
        &mut self,
        parent: NodeId,
        name: &EntryName,
        died: Generation,
        touched: &mut Touched,
    ) -> rusqlite::Result<()> {
        type Parts = (NodeId, Generation, Option<i64>);
        let parts = |row: &Row<'_>| -> rusqlite::Result<Parts> {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        };
        let removed = self.remove.query_row(params![parent, name], parts).optional()?;
        if let Some((node, born, kind)) = removed
            && born < NEVER
        {
            self.past.execute(params![parent, name, node, born, died, kind])?;
            touched.push((died, node));
        }
        Ok(())
    }
}

fn write_rest(db: &Connection, batch: &Batch, head: &mut HeadRow) -> rusqlite::Result<()> {
    for &(at, time) in &batch.ticks {
        db.prepare_cached("INSERT OR REPLACE INTO tick(g, t) VALUES(?1, ?2)")?
            .execute(params![at, time])?;
    }
    batch.acts.write(db)?;
    for (node, target) in &batch.symlinks {
        db.prepare_cached("INSERT OR REPLACE INTO symlink(node, target) VALUES(?1, ?2)")?
            .execute(params![node, target])?;
    }
    if !batch.contents.is_empty() {
        let mut insert = db.prepare_cached(
            "INSERT INTO content(id, node, size, state) VALUES(?1, ?2, ?3, 0) \
             ON CONFLICT(id) DO UPDATE SET node = ?2, size = ?3",
        )?;
        for (id, (node, size)) in &batch.contents {
            insert.execute(params![id, node, *size as i64])?;
        }
    }
    for &(id, cloned) in &batch.preserved {
        let state = if cloned { ContentState::Cloned } else { ContentState::Preserved };
        let size: Option<i64> = db
            .prepare_cached(
                "UPDATE content SET state = ?2 WHERE id = ?1 AND state = 0 RETURNING size",
            )?
            .query_row(params![id, state as i64], |row| row.get(0))
            .optional()?;
        match cloned {
            true => head.cloned_bytes += size.unwrap_or(0),
            false => head.preserved_bytes += size.unwrap_or(0),
        }
    }
    for row in &batch.undo {
        if is_of_use(db, row)? {
            head.undo_bytes += write_undo(db, row.clone())?;
        }
    }
    digest::write(db, &batch.digests)?;
    for (id, set) in &batch.xattrs {
        let body = xattr::encode(set);
        db.prepare_cached("INSERT OR REPLACE INTO xattr_set(id, hash, body) VALUES(?1, ?2, ?3)")?
            .execute(params![id, blake3::hash(&body).as_bytes(), body])?;
    }
    for change in &batch.snapshots {
        write_snapshot(db, change)?;
    }
    for (key, value) in &batch.meta {
        db.prepare_cached("INSERT OR REPLACE INTO meta(key, value) VALUES(?1, ?2)")?
            .execute(params![key, value])?;
    }
    for late in &batch.late {
        match late {
            Late::Pack(change) => packed::apply(db, change, head)?,
            Late::Forget(change) => retain::apply(db, change, head)?,
        }
    }
    if !batch.late.is_empty() {
        // What is forgotten here may be what one of these was written for.
        for row in &batch.undo {
            if !is_of_use(db, row)? {
                head.undo_bytes -= remove_undo(db, row)?;
            }
        }
    }
    Ok(())
}

/// Whether anything may need a before-image: not where somebody still writes a file that is gone,
/// and whose content was forgotten. The content of a live file may be unknown after an unclean end.
fn is_of_use(db: &Connection, row: &UndoRow) -> rusqlite::Result<bool> {
    db.prepare_cached(
        "SELECT EXISTS(SELECT 1 FROM content WHERE id = ?1) \
         OR EXISTS(SELECT 1 FROM node WHERE id = ?2)",
    )?
    .query_row(params![row.content, row.node], |row| row.get(0))
}

/// Removes all before-images of a content that is forgotten, and tells how many bytes in segments
/// they hold.
fn remove_undo(db: &Connection, of: &UndoRow) -> rusqlite::Result<i64> {
    let mut statement = db.prepare_cached(
        "DELETE FROM undo WHERE node = ?1 AND content = ?2 RETURNING segment, length",
    )?;
    let removed = statement.query_map(params![of.node, of.content], |row| {
        Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, i64>(1)?))
    })?;
    removed.map(|row| row.map(|(at, length)| if at > Some(0) { length } else { 0 })).sum()
}

/// Adds a before-image and tells how many bytes it holds. Where an older one begins at the same
/// byte, that one counts, and only what reaches beyond it is added.
pub(super) fn write_undo(db: &Connection, mut row: UndoRow) -> rusqlite::Result<i64> {
    loop {
        let (segment, offset) = place_columns(row.at);
        let added = db
            .prepare_cached(
                "INSERT INTO undo(node, content, offset, length, segment, segment_offset) \
                 VALUES(?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO NOTHING",
            )?
            .execute(params![
                row.node,
                row.content,
                row.offset as i64,
                row.length as i64,
                segment,
                offset,
            ])?;
        if added == 1 {
            return Ok(if segment.is_some_and(|segment| segment > 0) {
                row.length as i64
            } else {
                0
            });
        }
        let older: i64 = db
            .prepare_cached(
                "SELECT length FROM undo WHERE node = ?1 AND content = ?2 AND offset = ?3",
            )?
            .query_row(params![row.node, row.content, row.offset as i64], |row| row.get(0))?;
        let older = older.max(0) as u64;
        if older == 0 || older >= row.length {
            return Ok(0);
        }
        row.offset += older;
        row.length -= older;
        row.at = row.at.map(|at| at.further(older));
    }
}

fn write_snapshot(db: &Connection, change: &SnapshotChange) -> rusqlite::Result<()> {
    match change {
        SnapshotChange::Put(snapshot) => db
            .prepare_cached(
                "INSERT OR REPLACE INTO snapshot(id, name, g, time, automatic, held, tags) \
                 VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?
            .execute(params![
                snapshot.id,
                snapshot.name,
                snapshot.generation,
                Time(snapshot.time),
                snapshot.automatic,
                snapshot.held,
                snapshot.tags.join(","),
            ])?,
        SnapshotChange::Remove(id) => {
            db.prepare_cached("DELETE FROM snapshot WHERE id = ?1")?.execute(params![id])?
        }
    };
    Ok(())
}

//! Which files of history there must be: for whoever looks whether they are there and whole.

use std::collections::{BTreeSet, HashMap};

use rusqlite::{Connection, OptionalExtension, params};

use super::digest::Digest;
use super::packed::rows_in;
use super::query::{path_at, time_of};
use super::schema::{NODE_COLUMNS, Time, node_row, unsigned};
use super::{Catalog, NodeRow, UndoRow, WaitingContent};
use crate::error::Result;
use crate::types::{ContentId, Generation, Kind, NodeId, RelPath, Timestamp};

/// A live object, as whoever goes through all of them needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveNode {
    /// Which.
    pub node: NodeId,
    /// A file's bytes, else 0.
    pub size: u64,
    /// When its content or its attributes changed last.
    pub changed: Timestamp,
}

/// One version of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionRecord {
    /// The file.
    pub node: NodeId,
    /// Its content.
    pub content: ContentId,
    /// Bytes of it.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of content.
    pub mtime: Timestamp,
    /// When it became the file's content.
    pub born: Timestamp,
    /// When it was that no more; `None` while it is.
    pub died: Option<Timestamp>,
    /// Of its bytes, if known.
    pub digest: Option<Digest>,
    /// Where the file was then.
    pub path: RelPath,
}

impl Catalog {
    /// Contents that lie whole in `preserved/`, clones among them, after `after` in the order of
    /// their ids; at most `count`.
    pub fn preserved_contents(
        &self,
        after: ContentId,
        count: usize,
    ) -> Result<Vec<WaitingContent>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT id, node, size FROM content WHERE state IN (1, 3) AND id > ?1 \
                 ORDER BY id LIMIT ?2",
            )?;
            let rows = statement.query_map(params![after, count as i64], |row| {
                Ok(WaitingContent { id: row.get(0)?, node: row.get(1)?, size: unsigned(row, 2)? })
            })?;
            rows.collect()
        })
    }

    /// Live objects after `after` in the order of their ids; at most `count`.
    pub fn live_nodes(&self, after: NodeId, count: usize) -> Result<Vec<LiveNode>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT id, kind, size, mtime, ctime FROM node WHERE id > ?1 ORDER BY id LIMIT ?2",
            )?;
            let rows = statement.query_map(params![after, count as i64], |row| {
                let mtime = row.get::<_, Time>(3)?.0;
                let ctime = Time::read_beside(row, 4, mtime)?;
                let kind: Kind = row.get(1)?;
                let size = if kind == Kind::File { unsigned(row, 2)? } else { 0 };
                Ok(LiveNode { node: row.get(0)?, size, changed: mtime.max(ctime) })
            })?;
            rows.collect()
        })
    }

    /// Whether a content that lies whole in `preserved/` still does.
    pub fn is_preserved(&self, content: ContentId) -> Result<bool> {
        self.settle_pending()?;
        self.shared.read(|db| {
            db.prepare_cached("SELECT 1 FROM content WHERE id = ?1 AND state IN (1, 3)")?
                .exists(params![content])
        })
    }

    /// Whether there is a recipe of this id.
    pub fn has_recipe(&self, id: ContentId) -> Result<bool> {
        self.settle_pending()?;
        self.shared
            .read(|db| db.prepare_cached("SELECT 1 FROM recipe WHERE id = ?1")?.exists(params![id]))
    }

    /// What a journal says of a content: the newest state that shows it, and where it was then.
    /// `None` if no state does, or it had no path.
    pub fn version_record(
        &self,
        node: NodeId,
        content: ContentId,
    ) -> Result<Option<VersionRecord>> {
        self.settle_pending()?;
        let digest = self.digest(content)?;
        self.shared.read_at_once(|db| {
            let past: Option<(NodeRow, Generation, Generation)> = db
                .prepare_cached(&format!(
                    "SELECT {NODE_COLUMNS}, (SELECT min(born) FROM node_h WHERE id = ?1 \
                     AND content = ?2), died FROM node_h WHERE id = ?1 AND content = ?2 \
                     ORDER BY died DESC LIMIT 1"
                ))?
                .query_row(params![node, content], |row| {
                    Ok((node_row(row, 0)?, row.get(13)?, row.get(14)?))
                })
                .optional()?;
            let Some((row, born, died)) = past else { return Ok(None) };
            let last = Generation(died.0.saturating_sub(1));
            let Some(path) = path_at(db, last, node)? else { return Ok(None) };
            Ok(Some(VersionRecord {
                node,
                content,
                size: row.size,
                mode: row.mode,
                uid: row.uid,
                gid: row.gid,
                mtime: row.mtime,
                born: time_of(db, born)?,
                died: Some(time_of(db, died)?),
                digest,
                path,
            }))
        })
    }

    /// The undo segments in which before-images lie, in order.
    pub fn segments(&self) -> Result<Vec<u64>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT DISTINCT segment FROM undo WHERE segment > 0 ORDER BY segment",
            )?;
            statement.query_map([], |row| unsigned(row, 0))?.collect()
        })
    }

    /// The packed streams in which before-images of these nodes lie, each with the bytes of all
    /// before-images in it.
    pub fn streams_of(&self, nodes: &[NodeId]) -> Result<HashMap<ContentId, u64>> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut statement = db.prepare_cached(
                "SELECT DISTINCT segment FROM undo WHERE node = ?1 AND segment < 0",
            )?;
            let mut streams = BTreeSet::new();
            for node in nodes {
                for segment in statement.query_map(params![node], |row| row.get::<_, i64>(0))? {
                    streams.insert(ContentId(segment?.unsigned_abs()));
                }
            }
            let with_bytes = |stream| Ok((stream, stream_bytes(db, stream)?));
            streams.into_iter().map(with_bytes).collect()
        })
    }

    /// The bytes of all before-images in a packed stream.
    pub fn stream_bytes(&self, stream: ContentId) -> Result<u64> {
        self.settle_pending()?;
        self.shared.read(|db| stream_bytes(db, stream))
    }

    /// The before-images in a packed stream, ordered by node, content and offset.
    pub fn stream_rows(&self, stream: ContentId) -> Result<Vec<UndoRow>> {
        self.settle_pending()?;
        self.shared.read(|db| rows_in(db, -(stream.0 as i64)))
    }

    /// The bytes of the before-images in each undo segment that has any.
    pub fn segment_bytes(&self) -> Result<HashMap<u64, u64>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT segment, sum(length) FROM undo WHERE segment > 0 GROUP BY segment",
            )?;
            statement.query_map([], |row| Ok((unsigned(row, 0)?, unsigned(row, 1)?)))?.collect()
        })
    }
}

fn stream_bytes(db: &Connection, stream: ContentId) -> rusqlite::Result<u64> {
    db.prepare_cached("SELECT coalesce(sum(length), 0) FROM undo WHERE segment = ?1")?
        .query_row(params![-(stream.0 as i64)], |row| unsigned(row, 0))
}

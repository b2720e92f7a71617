//! Which files of history there must be: for whoever looks whether they are there and whole.

use rusqlite::{OptionalExtension, params};

use super::schema::{Time, unsigned};
use super::{Catalog, WaitingContent};
use crate::error::Result;
use crate::types::{ContentId, Kind, NodeId, Timestamp};

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
                let ctime = row.get::<_, Option<Time>>(4)?.map_or(mtime, |time| time.0);
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

    /// Whether a content has before-images of its own: then its file, if it lies whole in one, need
    /// not have its bytes there.
    pub fn has_images(&self, node: NodeId, content: ContentId) -> Result<bool> {
        self.settle_pending()?;
        self.shared.read(|db| {
            db.prepare_cached("SELECT 1 FROM undo WHERE node = ?1 AND content = ?2 LIMIT 1")?
                .exists(params![node, content])
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

    /// A packed content whose bytes have this digest and size, if any has.
    pub fn packed_like(
        &self,
        digest: &super::digest::Digest,
        size: u64,
    ) -> Result<Option<ContentId>> {
        self.shared.read(|db| {
            db.prepare_cached(
                "SELECT c.id FROM content c JOIN digest d ON d.content = c.id \
                 WHERE c.state = 2 AND c.size = ?2 AND d.hash = ?1 LIMIT 1",
            )?
            .query_row(params![digest, size as i64], |row| row.get(0))
            .optional()
        })
    }
}

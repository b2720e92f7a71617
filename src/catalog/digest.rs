//! Digests of contents: by which rot is told from what was written.
//!
//! A digest is the first half of the BLAKE3 of a content's bytes. 16 bytes are enough against rot:
//! that a damaged file has the recorded digest by chance happens once in 2^128 times, and who can
//! write into a backing on purpose can write into its catalog as well. They cost half of a whole
//! hash in a table that has a row for every file.
//!
//! A content gets its digest when its file has been quiet for a while, and keeps it wherever its
//! bytes come to lie. One without a digest was not quiet long enough before it was replaced.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, params};

use super::{Catalog, NEVER};
use crate::error::Result;
use crate::types::{ContentId, Kind, NodeId};

/// The digest of a content's bytes.
pub type Digest = [u8; 16];

/// The digest of what a hasher was given.
pub fn digest_of(hasher: &blake3::Hasher) -> Digest {
    let mut digest = [0; 16];
    hasher.finalize_xof().fill(&mut digest);
    digest
}

/// The digest in a whole hash.
pub fn first_half(hash: &[u8; 32]) -> Digest {
    let mut digest = Digest::default();
    let length = digest.len();
    digest.copy_from_slice(&hash[..length]);
    digest
}

/// A live file's content without a digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undigested {
    /// The file.
    pub node: NodeId,
    /// Its content.
    pub content: ContentId,
}

impl Catalog {
    /// The digest of a content, if it has one.
    pub fn digest(&self, content: ContentId) -> Result<Option<Digest>> {
        if let Some(digest) = self.shared.overlay(|batch| batch.digests.get(&content).copied()) {
            return Ok(Some(digest));
        }
        self.shared.read(|db| {
            db.prepare_cached("SELECT hash FROM digest WHERE content = ?1")?
                .query_row(params![content], |row| row.get(0))
                .optional()
        })
    }

    /// Live files after `after`, in the order of their ids, whose contents have no digest; at most
    /// `count`. What waits to be committed is not among them.
    pub fn undigested(&self, after: NodeId, count: usize) -> Result<Vec<Undigested>> {
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT id, content FROM node WHERE id > ?1 AND kind = ?2 AND content > 0 \
                 AND born < ?3 AND NOT EXISTS(SELECT 1 FROM digest WHERE content = node.content) \
                 ORDER BY id LIMIT ?4",
            )?;
            let values = params![after, Kind::File, NEVER, count as i64];
            let rows = statement.query_map(values, |row| {
                Ok(Undigested { node: row.get(0)?, content: row.get(1)? })
            })?;
            rows.collect()
        })
    }
}

/// Writes the digests of a batch. A content that was forgotten meanwhile gets none.
pub(super) fn write(
    db: &Connection,
    digests: &BTreeMap<ContentId, Digest>,
) -> rusqlite::Result<()> {
    if digests.is_empty() {
        return Ok(());
    }
    let mut insert = db.prepare_cached(
        "INSERT OR REPLACE INTO digest(content, hash) SELECT id, ?2 FROM content WHERE id = ?1",
    )?;
    for (content, digest) in digests {
        insert.execute(params![content, digest])?;
    }
    Ok(())
}

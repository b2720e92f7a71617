//! Digests of contents: by which rot is told from what was written.
//!
//! A digest is the first half of the BLAKE3 of a content's bytes. 16 bytes are enough against rot:
//! that a damaged file has the recorded digest by chance happens once in 2^128 times, and who can
//! write into a backing on purpose can write into its catalog as well. They cost half of a whole
//! hash in a table that has a row for every file.
//!
//! A content gets its digest when its file has been quiet for a while, and keeps it wherever its
//! bytes come to lie. One without a digest was not quiet long enough before it was replaced.
//!
//! What is packed as one chunk has the chunk's hash, and what has the bytes of another content has
//! that one's digest: a digest that says the same is not stored. One that says something else is,
//! for then the bytes are not those that were written.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, params};

use super::packed::{lone_chunk, lone_recipe};
use super::schema::ContentState;
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
        self.shared.read_at_once(|db| recorded(db, content))
    }

    /// A packed content whose bytes have this digest and size, if any has.
    pub fn packed_like(&self, digest: &Digest, size: u64) -> Result<Option<ContentId>> {
        self.shared.read_at_once(|db| {
            let stored = db
                .prepare_cached(
                    "SELECT c.id FROM content c JOIN digest d ON d.content = c.id \
                     WHERE c.state = 2 AND c.size = ?2 AND d.hash = ?1 LIMIT 1",
                )?
                .query_row(params![digest, size as i64], |row| row.get(0))
                .optional()?;
            match stored {
                Some(content) => Ok(Some(content)),
                None => implied_like(db, digest, size),
            }
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

/// The digest that is stored, or else the one that follows from where the bytes lie.
fn recorded(db: &Connection, content: ContentId) -> rusqlite::Result<Option<Digest>> {
    match stored(db, content)? {
        None => implied(db, content),
        stored => Ok(stored),
    }
}

fn stored(db: &Connection, content: ContentId) -> rusqlite::Result<Option<Digest>> {
    db.prepare_cached("SELECT hash FROM digest WHERE content = ?1")?
        .query_row(params![content], |row| row.get(0))
        .optional()
}

/// The digest that follows from where the bytes of a content lie. Not where it has before-images:
/// then it has other bytes than what lies there.
fn implied(db: &Connection, content: ContentId) -> rusqlite::Result<Option<Digest>> {
    let place: Option<(i64, Option<ContentId>)> = db
        .prepare_cached(
            "SELECT state, same FROM content c WHERE id = ?1 AND state IN (2, 4) AND NOT EXISTS( \
             SELECT 1 FROM undo WHERE node = c.node AND content = c.id)",
        )?
        .query_row(params![content], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    match place {
        Some((_, Some(same))) => match stored(db, same)? {
            None => packed_hash(db, same),
            stored => Ok(stored),
        },
        Some(_) => packed_hash(db, content),
        None => Ok(None),
    }
}

/// The digest of a content that is packed as one chunk and has no before-images.
fn packed_hash(db: &Connection, content: ContentId) -> rusqlite::Result<Option<Digest>> {
    let packed = db
        .prepare_cached(
            "SELECT 1 FROM content c WHERE id = ?1 AND state = ?2 AND NOT EXISTS( \
             SELECT 1 FROM undo WHERE node = c.node AND content = c.id)",
        )?
        .exists(params![content, ContentState::Packed as i64])?;
    Ok(match packed {
        true => lone_chunk(db, content)?.map(|hash| first_half(&hash)),
        false => None,
    })
}

/// Removes the digest of a content that came to lie elsewhere, if it says no more than that place.
pub(super) fn forget_implied(db: &Connection, content: ContentId) -> rusqlite::Result<()> {
    let Some(digest) = stored(db, content)? else { return Ok(()) };
    if implied(db, content)? == Some(digest) {
        db.prepare_cached("DELETE FROM digest WHERE content = ?1")?.execute(params![content])?;
    }
    Ok(())
}

/// A content of this digest and size that is packed as one chunk.
fn implied_like(
    db: &Connection,
    digest: &Digest,
    size: u64,
) -> rusqlite::Result<Option<ContentId>> {
    let Some(body) = lone_recipe(db, digest, size)? else { return Ok(None) };
    db.prepare_cached(
        "SELECT c.id FROM recipe r JOIN content c ON c.id = r.id WHERE r.body = ?1 \
         AND c.state = 2 AND c.size = ?2 AND NOT EXISTS( \
         SELECT 1 FROM undo WHERE node = c.node AND content = c.id) LIMIT 1",
    )?
    .query_row(params![body, size as i64], |row| row.get(0))
    .optional()
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
    let mut same = db.prepare_cached("SELECT id FROM content WHERE same = ?1")?;
    for (content, digest) in digests {
        insert.execute(params![content, digest])?;
        // What has its bytes had a digest of its own as long as this one had none.
        let others = same.query_map(params![content], |row| row.get(0))?;
        for other in others.collect::<rusqlite::Result<Vec<ContentId>>>()? {
            forget_implied(db, other)?;
        }
    }
    Ok(())
}

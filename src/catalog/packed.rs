//! What is packed: recipes, chunks and packs in the catalog.
//!
//! A chunk counts its uses in recipes, and a pack the bytes of its chunks that are in use. Both
//! change only here, in the transaction that adds or forgets a recipe, so they are as exact as the
//! recipes; `check` and a property test count them anew.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::leb128;
use super::overlay::Bytes;
use super::schema::{ContentState, HeadRow, read_head, undo_row, unsigned};
use super::{Catalog, ChunkPlace, ChunkRow, PackChange, Recipe, UndoRow, digest as digests};
use crate::error::Result;
use crate::types::{ChunkId, ContentId, EntryName, Generation, Kind, NodeId, PackId};

/// A pack as the catalog knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackRow {
    /// Its id.
    pub id: PackId,
    /// Bytes of its file.
    pub bytes: u64,
    /// Those of them that belong to chunks in use.
    pub live: u64,
    /// BLAKE3 of the file, without its trailer's own hash.
    pub hash: [u8; 32],
}

/// Where a content lies as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// Nowhere: it is reached through others.
    Chained,
    /// In `preserved/`.
    Preserved,
    /// Packed, or it is the same as another.
    Elsewhere,
    /// It was forgotten: newer ones are known.
    Forgotten,
    /// It was never recorded.
    Unknown,
}

/// A preserved content that waits to be packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitingContent {
    /// Its id.
    pub id: ContentId,
    /// Whose content it is.
    pub node: NodeId,
    /// Its bytes.
    pub size: u64,
}

/// A file that was saved more often than this since a content was its own is not looked for.
const HEIRS_MAX: usize = 64;
const CHUNK_COLUMNS: &str = "id, hash, pack, frame, at, length, stored";

impl Catalog {
    /// The recipe of a packed content or stream.
    pub fn recipe(&self, id: ContentId) -> Result<Option<Recipe>> {
        self.shared.read_at_once(|db| {
            let Some(parts) = recipe_parts(db, id)? else { return Ok(None) };
            let sql = format!("SELECT {CHUNK_COLUMNS} FROM chunk WHERE id = ?1");
            let mut statement = db.prepare_cached(&sql)?;
            let chunks = parts.iter().map(|&(id, length)| match id {
                ChunkId::HOLE => Ok(hole(length)),
                id => statement.query_row(params![id], chunk_row),
            });
            Ok(Some(Recipe { chunks: chunks.collect::<rusqlite::Result<_>>()? }))
        })
    }

    /// The stored chunk with these bytes' hash.
    pub fn chunk(&self, hash: &[u8; 32]) -> Result<Option<ChunkRow>> {
        self.shared.read(|db| {
            let sql = format!(
                "SELECT {CHUNK_COLUMNS} FROM chunk WHERE substr(hash, 1, 5) = substr(?1, 1, 5) \
                 AND hash = ?1 LIMIT 1"
            );
            db.prepare_cached(&sql)?.query_row(params![hash], chunk_row).optional()
        })
    }

    /// Preserved contents that wait to be packed, after `after` in the order of their ids.
    pub fn waiting_contents(
        &self,
        after: ContentId,
        count_max: usize,
    ) -> Result<Vec<WaitingContent>> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(
                "SELECT id, node, size FROM content WHERE state = 1 AND id > ?1 ORDER BY id \
                 LIMIT ?2",
            )?;
            let rows = statement.query_map(params![after, count_max as i64], |row| {
                Ok(WaitingContent { id: row.get(0)?, node: row.get(1)?, size: unsigned(row, 2)? })
            })?;
            rows.collect()
        })
    }

    /// The live file that took a preserved content's place and has its size: the node's own, or
    /// that which came to the node's last name after it, wherever it is called now; with its
    /// content.
    pub fn successor(&self, of: &WaitingContent) -> Result<Option<(NodeId, ContentId)>> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut node = of.node;
            for _ in 0..HEIRS_MAX {
                if db.prepare_cached("SELECT 1 FROM node WHERE id = ?1")?.exists(params![node])? {
                    return live_file(db, node, of);
                }
                match heir(db, node)? {
                    Some(next) => node = next,
                    None => return Ok(None),
                }
            }
            Ok(None)
        })
    }

    /// The before-images that lie in an undo segment, ordered by node, content and offset.
    pub fn segment_rows(&self, segment: u64) -> Result<Vec<UndoRow>> {
        self.settle_pending()?;
        self.shared.read(|db| rows_in(db, segment as i64))
    }

    /// Whether any before-image lies in an undo segment.
    pub fn needs_segment(&self, segment: u64) -> Result<bool> {
        self.settle_pending()?;
        self.shared.read(|db| {
            db.prepare_cached("SELECT 1 FROM undo WHERE segment = ?1 LIMIT 1")?
                .exists(params![segment as i64])
        })
    }

    /// All packs.
    pub fn packs(&self) -> Result<Vec<PackRow>> {
        self.shared.read(|db| {
            let mut statement =
                db.prepare_cached("SELECT id, bytes, live, hash FROM pack ORDER BY id")?;
            let rows = statement.query_map([], |row| {
                Ok(PackRow {
                    id: row.get(0)?,
                    bytes: unsigned(row, 1)?,
                    live: unsigned(row, 2)?,
                    hash: row.get(3)?,
                })
            })?;
            rows.collect()
        })
    }

    /// The bytes of a pack that belong to chunks which are not in use.
    pub fn unused_bytes(&self, pack: PackId) -> Result<u64> {
        self.shared.read(|db| {
            db.prepare_cached(
                "SELECT coalesce(sum(stored), 0) FROM chunk WHERE pack = ?1 AND refs = 0",
            )?
            .query_row(params![pack], |row| unsigned(row, 0))
        })
    }

    /// All packs that were ever made have smaller ids than this.
    pub fn packs_end(&self) -> Result<PackId> {
        self.shared.read(|db| Ok(PackId(read_head(db)?.next.pack)))
    }

    /// The chunks of a pack that are in use, in the order of the pack.
    pub fn pack_chunks(&self, pack: PackId) -> Result<Vec<ChunkRow>> {
        self.shared.read(|db| {
            let mut statement = db.prepare_cached(&format!(
                "SELECT {CHUNK_COLUMNS} FROM chunk WHERE pack = ?1 AND refs > 0 ORDER BY frame, at"
            ))?;
            statement.query_map(params![pack], chunk_row)?.collect()
        })
    }

    /// Where the catalog takes a content to lie as a whole.
    pub fn whereabouts(&self, content: ContentId) -> Result<Whereabouts> {
        self.settle_pending()?;
        self.shared.read(|db| {
            let state: Option<i64> = db
                .prepare_cached("SELECT state FROM content WHERE id = ?1")?
                .query_row(params![content], |row| row.get(0))
                .optional()?;
            let newest: Option<ContentId> =
                db.query_row("SELECT max(id) FROM content", [], |row| row.get(0))?;
            let is = |state: i64, other: ContentState| state == other as i64;
            Ok(match state {
                None if newest.is_some_and(|newest| content < newest) => Whereabouts::Forgotten,
                None => Whereabouts::Unknown,
                Some(0) => Whereabouts::Chained,
                Some(state)
                    if is(state, ContentState::Preserved) || is(state, ContentState::Cloned) =>
                {
                    Whereabouts::Preserved
                }
                Some(_) => Whereabouts::Elsewhere,
            })
        })
    }
}

/// The before-images in a segment, or in a stream by its negative number as `undo.segment` has it,
/// ordered by node, content and offset.
pub(super) fn rows_in(db: &Connection, segment: i64) -> rusqlite::Result<Vec<UndoRow>> {
    db.prepare_cached(
        "SELECT content, offset, length, segment, segment_offset, node FROM undo \
         WHERE segment = ?1 ORDER BY node, content, offset",
    )?
    .query_map(params![segment], |row| undo_row(row, row.get(5)?))?
    .collect()
}

/// The content of a live file that has the size of a preserved one.
fn live_file(
    db: &Connection,
    node: NodeId,
    of: &WaitingContent,
) -> rusqlite::Result<Option<(NodeId, ContentId)>> {
    db.prepare_cached(
        "SELECT id, content FROM node WHERE id = ?1 AND size = ?2 AND kind = ?3 \
         AND content > 0 AND content <> ?4",
    )?
    .query_row(params![node, of.size as i64, Kind::File, of.id], |row| {
        Ok((row.get(0)?, row.get(1)?))
    })
    .optional()
}

/// The node that was the next to have the last name of one that is gone.
fn heir(db: &Connection, node: NodeId) -> rusqlite::Result<Option<NodeId>> {
    let last: Option<(NodeId, EntryName, Generation)> = db
        .prepare_cached(
            "SELECT parent, name, died FROM entry_h WHERE node = ?1 ORDER BY died DESC LIMIT 1",
        )?
        .query_row(params![node], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .optional()?;
    let Some((parent, name, died)) = last else { return Ok(None) };
    let past = db
        .prepare_cached(
            "SELECT node FROM entry_h WHERE parent = ?1 AND name = ?2 AND died > ?3 \
             ORDER BY died LIMIT 1",
        )?
        .query_row(params![parent, name, died], |row| row.get(0))
        .optional()?;
    if past.is_some() {
        return Ok(past);
    }
    db.prepare_cached("SELECT node FROM entry WHERE parent = ?1 AND name = ?2")?
        .query_row(params![parent, name], |row| row.get(0))
        .optional()
}

/// Writes one change.
pub(super) fn apply(
    db: &Connection,
    change: &PackChange,
    head: &mut HeadRow,
) -> rusqlite::Result<()> {
    match change {
        PackChange::PackAdd { id, bytes, hash } => {
            db.prepare_cached("INSERT INTO pack(id, bytes, live, hash) VALUES(?1, ?2, 0, ?3)")?
                .execute(params![id, *bytes as i64, hash])?;
            head.packed_bytes += *bytes as i64;
        }
        PackChange::PackRemove(id) => remove_pack(db, *id, head)?,
        PackChange::ChunkAdd(row) => {
            db.prepare_cached(
                "INSERT INTO chunk(id, hash, pack, frame, at, length, stored, refs) \
                 VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, 0)",
            )?
            .execute(params![
                row.id,
                row.hash,
                row.place.pack,
                row.place.frame as i64,
                row.place.at,
                row.length,
                row.stored,
            ])?;
        }
        PackChange::ChunkMove { id, place, stored } => move_chunk(db, *id, *place, *stored)?,
        PackChange::RecipeAdd { id, chunks } => {
            let added = db
                .prepare_cached(
                    "INSERT INTO recipe(id, body) VALUES(?1, ?2) ON CONFLICT DO NOTHING",
                )?
                .execute(params![id, encode(chunks)])?;
            if added == 1 {
                for (chunk, _) in chunks {
                    count_use(db, *chunk, 1)?;
                }
            }
        }
        PackChange::ContentPacked(id) => {
            leave_preserved(db, *id, ContentState::Packed, None, head)?;
            digests::forget_implied(db, *id)?;
        }
        PackChange::ContentSame { id, to } => {
            leave_preserved(db, *id, ContentState::Same, Some(*to), head)?;
            // Chains of equal contents stay one link long. But where this one has before-images,
            // only with them it has the bytes that the others rely on.
            db.prepare_cached(
                "UPDATE content SET same = ?2 WHERE same = ?1 AND NOT EXISTS(SELECT 1 FROM undo \
                 WHERE node = (SELECT node FROM content WHERE id = ?1) AND content = ?1)",
            )?
            .execute(params![id, to])?;
            digests::forget_implied(db, *id)?;
        }
        PackChange::UndoMove { node, content, offset, stream, at } => {
            let length: Option<i64> = db
                .prepare_cached(
                    "UPDATE undo SET segment = ?4, segment_offset = ?5 WHERE node = ?1 \
                     AND content = ?2 AND offset = ?3 AND segment > 0 RETURNING length",
                )?
                .query_row(
                    params![node, content, *offset as i64, -(stream.0 as i64), *at as i64],
                    |row| row.get(0),
                )
                .optional()?;
            head.undo_bytes -= length.unwrap_or(0);
        }
    }
    Ok(())
}

/// A content that lay in `preserved/` lies elsewhere now.
fn leave_preserved(
    db: &Connection,
    id: ContentId,
    state: ContentState,
    same: Option<ContentId>,
    head: &mut HeadRow,
) -> rusqlite::Result<()> {
    let old: Option<(i64, i64)> = db
        .prepare_cached("SELECT state, size FROM content WHERE id = ?1")?
        .query_row(params![id], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    match old {
        Some((state, size)) if state == ContentState::Preserved as i64 => {
            head.preserved_bytes -= size;
        }
        Some((state, size)) if state == ContentState::Cloned as i64 => head.cloned_bytes -= size,
        _ => {}
    }
    db.prepare_cached("UPDATE content SET state = ?2, same = ?3 WHERE id = ?1")?
        .execute(params![id, state as i64, same])?;
    Ok(())
}

/// Removes a pack unless one of its chunks is in use.
fn remove_pack(db: &Connection, id: PackId, head: &mut HeadRow) -> rusqlite::Result<()> {
    let used = db
        .prepare_cached("SELECT 1 FROM chunk WHERE pack = ?1 AND refs > 0 LIMIT 1")?
        .exists(params![id])?;
    if used {
        return Ok(());
    }
    db.prepare_cached("DELETE FROM chunk WHERE pack = ?1")?.execute(params![id])?;
    let bytes: Option<i64> = db
        .prepare_cached("DELETE FROM pack WHERE id = ?1 RETURNING bytes")?
        .query_row(params![id], |row| row.get(0))
        .optional()?;
    head.packed_bytes -= bytes.unwrap_or(0);
    Ok(())
}

fn move_chunk(
    db: &Connection,
    id: ChunkId,
    place: ChunkPlace,
    stored: u32,
) -> rusqlite::Result<()> {
    let (pack, old, refs): (PackId, i64, i64) = db
        .prepare_cached("SELECT pack, stored, refs FROM chunk WHERE id = ?1")?
        .query_row(params![id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    if refs > 0 {
        add_live(db, pack, -old)?;
        add_live(db, place.pack, stored.into())?;
    }
    db.prepare_cached(
        "UPDATE chunk SET pack = ?2, frame = ?3, at = ?4, stored = ?5 WHERE id = ?1",
    )?
    .execute(params![id, place.pack, place.frame as i64, place.at, stored])?;
    Ok(())
}

/// Forgets a recipe; its chunks are used once less.
pub(super) fn forget_recipe(db: &Connection, id: ContentId) -> rusqlite::Result<()> {
    for (chunk, _) in recipe_parts(db, id)?.unwrap_or_default() {
        count_use(db, chunk, -1)?;
    }
    db.prepare_cached("DELETE FROM recipe WHERE id = ?1")?.execute(params![id])?;
    Ok(())
}

/// Takes the end off a recipe that nobody reads any more; its chunks are used once less.
pub(super) fn cut_recipe(db: &Connection, id: ContentId, keep: usize) -> rusqlite::Result<()> {
    let mut parts = recipe_parts(db, id)?.unwrap_or_default();
    for (chunk, _) in parts.drain(keep.min(parts.len())..) {
        count_use(db, chunk, -1)?;
    }
    db.prepare_cached("UPDATE recipe SET body = ?2 WHERE id = ?1")?
        .execute(params![id, encode(&parts)])?;
    Ok(())
}

/// Forgets a stream, by its negative number as `undo.segment` has it, if no before-image lies in
/// it any more.
pub(super) fn forget_empty_stream(db: &Connection, stream: i64) -> rusqlite::Result<()> {
    let used =
        db.prepare_cached("SELECT 1 FROM undo WHERE segment = ?1 LIMIT 1")?.exists([stream])?;
    match used {
        true => Ok(()),
        false => forget_recipe(db, ContentId(stream.unsigned_abs())),
    }
}

fn count_use(db: &Connection, chunk: ChunkId, by: i64) -> rusqlite::Result<()> {
    if chunk == ChunkId::HOLE {
        return Ok(());
    }
    let (refs, pack, stored): (i64, PackId, i64) = db
        .prepare_cached(
            "UPDATE chunk SET refs = refs + ?2 WHERE id = ?1 RETURNING refs, pack, stored",
        )?
        .query_row(params![chunk, by], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    match (by, refs) {
        (1, 1) => add_live(db, pack, stored),
        (-1, 0) => add_live(db, pack, -stored),
        _ => Ok(()),
    }
}

fn add_live(db: &Connection, pack: PackId, bytes: i64) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE pack SET live = live + ?2 WHERE id = ?1")?
        .execute(params![pack, bytes])?;
    Ok(())
}

/// The chunks and lengths of a recipe.
pub(super) fn recipe_parts(
    db: &Connection,
    id: ContentId,
) -> rusqlite::Result<Option<Vec<(ChunkId, u32)>>> {
    let body: Option<Vec<u8>> = db
        .prepare_cached("SELECT body FROM recipe WHERE id = ?1")?
        .query_row(params![id], |row| row.get(0))
        .optional()?;
    let Some(body) = body else { return Ok(None) };
    let parts = decode(&body).ok_or_else(|| {
        rusqlite::Error::FromSqlConversionFailure(
            0,
            rusqlite::types::Type::Blob,
            format!("the recipe {id} is malformed").into(),
        )
    })?;
    Ok(Some(parts))
}

/// The hash of the chunk that a recipe consists of, if it is only one.
pub(super) fn lone_chunk(db: &Connection, id: ContentId) -> rusqlite::Result<Option<[u8; 32]>> {
    let parts = recipe_parts(db, id)?.unwrap_or_default();
    let [(chunk, _)] = parts.as_slice() else { return Ok(None) };
    db.prepare_cached("SELECT hash FROM chunk WHERE id = ?1")?
        .query_row(params![chunk], |row| row.get(0))
        .optional()
}

/// The body of a recipe that consists of a chunk whose hash begins like this.
pub(super) fn lone_recipe(
    db: &Connection,
    hash: &[u8; 16],
    size: u64,
) -> rusqlite::Result<Option<Vec<u8>>> {
    let chunk: Option<ChunkId> = db
        .prepare_cached(
            "SELECT id FROM chunk WHERE substr(hash, 1, 5) = substr(?1, 1, 5) \
             AND substr(hash, 1, 16) = ?1 AND length = ?2",
        )?
        .query_row(params![hash, size as i64], |row| row.get(0))
        .optional()?;
    let length = u32::try_from(size).ok();
    Ok(chunk.zip(length).map(|part| encode(&[part])))
}

/// Chunk ids and lengths as LEB128.
fn encode(chunks: &[(ChunkId, u32)]) -> Vec<u8> {
    let mut body = Vec::with_capacity(chunks.len() * 5);
    for (id, length) in chunks {
        leb128::push(&mut body, id.0);
        leb128::push(&mut body, u64::from(*length));
    }
    body
}

fn decode(body: &[u8]) -> Option<Vec<(ChunkId, u32)>> {
    let mut bytes = body.iter();
    let mut chunks = Vec::new();
    while let Some(id) = leb128::next(&mut bytes) {
        chunks.push((ChunkId(id), u32::try_from(leb128::next(&mut bytes)?).ok()?));
    }
    (encode(&chunks) == body).then_some(chunks)
}

/// What stands for a hole in a recipe.
fn hole(length: u32) -> ChunkRow {
    let place = ChunkPlace { pack: PackId(0), frame: 0, at: 0 };
    ChunkRow { id: ChunkId::HOLE, hash: [0; 32], place, length, stored: 0 }
}

fn chunk_row(row: &Row<'_>) -> rusqlite::Result<ChunkRow> {
    Ok(ChunkRow {
        id: row.get(0)?,
        hash: row.get(1)?,
        place: ChunkPlace { pack: row.get(2)?, frame: unsigned(row, 3)?, at: row.get(4)? },
        length: row.get(5)?,
        stored: row.get(6)?,
    })
}

/// Adds a change to the batch's hash.
pub(super) fn digest(change: &PackChange, out: &mut Bytes) {
    match change {
        PackChange::PackAdd { id, bytes, hash } => {
            out.numbers(&[20, id.0, *bytes]);
            out.blob(hash);
        }
        PackChange::PackRemove(id) => out.numbers(&[21, id.0]),
        PackChange::ChunkAdd(row) => {
            out.numbers(&[22, row.id.0, row.place.pack.0, row.place.frame, row.place.at.into()]);
            out.numbers(&[row.length.into(), row.stored.into()]);
            out.blob(&row.hash);
        }
        PackChange::ChunkMove { id, place, stored } => {
            out.numbers(&[23, id.0, place.pack.0, place.frame, place.at.into(), (*stored).into()]);
        }
        PackChange::RecipeAdd { id, chunks } => {
            out.numbers(&[24, id.0]);
            out.blob(&encode(chunks));
        }
        PackChange::ContentPacked(id) => out.numbers(&[25, id.0]),
        PackChange::ContentSame { id, to } => out.numbers(&[26, id.0, to.0]),
        PackChange::UndoMove { node, content, offset, stream, at } => {
            out.numbers(&[27, node.0, content.0, *offset, stream.0, *at]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_recipe_comes_back(
            parts in proptest::collection::vec((0..u64::MAX, any::<u32>()), 0..50),
        ) {
            let parts: Vec<_> = parts.into_iter().map(|(id, n)| (ChunkId(id), n)).collect();
            prop_assert_eq!(decode(&encode(&parts)), Some(parts));
        }

        #[test]
        fn garbage_is_no_recipe_or_a_whole_one(
            body in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            if let Some(parts) = decode(&body) {
                prop_assert_eq!(encode(&parts), body);
            }
        }
    }
}

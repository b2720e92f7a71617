//! Contents that no state shows any more may still be what others rely on:
//! - an older *chained* content of its node takes from it the bytes that it has no before-images
//!   of. Before-images move to that older content; a content that lies whole stays as a mere base
//!   until the older one goes;
//! - a content of equal bytes refers to it. It stays until that one goes.

use rusqlite::{OptionalExtension, Row, params};

use super::super::packed::recipe_parts;
use super::super::schema::{ContentState, undo_row, unsigned};
use super::super::{ForgetChange, UndoFile, UndoRow};
use super::Sweep;
use super::plan::Plan;
use crate::types::{ContentId, NodeId};

/// No before-image is longer: where one begins that reaches a byte.
const IMAGE_BYTES_MAX: u64 = 1 << 20;

/// A content as the plan sees it.
#[derive(Clone, Copy, Debug)]
struct Content {
    id: ContentId,
    size: u64,
    state: i64,
    same: Option<ContentId>,
}

impl Content {
    fn from_row(row: &Row<'_>) -> rusqlite::Result<Content> {
        let (id, state, same) = (row.get(0)?, row.get(2)?, row.get(3)?);
        Ok(Content { id, size: unsigned(row, 1)?, state, same })
    }

    fn is(&self, state: ContentState) -> bool {
        self.state == state as i64
    }

    /// Its bytes are reached through others.
    fn is_chained(&self) -> bool {
        self.state == 0
    }
}

impl Plan<'_> {
    /// Plans the end of the contents of a node that no state shows and nothing relies on, of those
    /// between what was shown before the gap and what is shown after it: the contents of a node
    /// ascend with its states. `false` if some are left.
    pub(super) fn sweep_contents(&mut self, node: NodeId, sweep: &Sweep) -> rusqlite::Result<bool> {
        let (low, high) = (self.shown_before(node, sweep)?, self.shown_after(node, sweep)?);
        let mut statement = self.db.prepare_cached(
            "SELECT id, size, state, same FROM content WHERE node = ?1 AND id > ?2 AND id < ?3 \
             ORDER BY id",
        )?;
        let mut rows = statement.query(params![node, low, high])?;
        let mut shown = None;
        while let Some(row) = rows.next()? {
            let content = Content::from_row(row)?;
            if self.gone.contains(&content.id) {
                continue;
            }
            let shown = match &mut shown {
                Some(shown) => shown,
                none => none.insert(self.shown_between(node, low, high)?),
            };
            if shown.contains(&content.id) {
                continue;
            }
            // The newer ones come anyway.
            if self.is_full() || !self.forget(node, content, false)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The content shown last at the beginning of a gap.
    fn shown_before(&self, node: NodeId, sweep: &Sweep) -> rusqlite::Result<ContentId> {
        let found: Option<ContentId> = self
            .db
            .prepare_cached(
                "SELECT content FROM node WHERE id = ?1 AND born <= ?2 AND content > 0 UNION ALL \
                 SELECT content FROM (SELECT content, born FROM node_h \
                 WHERE id = ?1 AND died > ?2 ORDER BY died LIMIT 1) \
                 WHERE content > 0 AND born <= ?2 UNION ALL \
                 SELECT * FROM (SELECT content FROM node_h WHERE id = ?1 AND died <= ?2 \
                 AND content > 0 ORDER BY died DESC LIMIT 1) LIMIT 1",
            )?
            .query_row(params![node, sweep.after], |row| row.get(0))
            .optional()?;
        Ok(found.unwrap_or(ContentId::EMPTY))
    }

    /// The content shown first after the end of a gap.
    fn shown_after(&self, node: NodeId, sweep: &Sweep) -> rusqlite::Result<ContentId> {
        let found: Option<ContentId> = self
            .db
            .prepare_cached(
                "SELECT * FROM (SELECT content FROM node_h WHERE id = ?1 AND died > ?2 \
                 AND content > 0 ORDER BY died LIMIT 1) UNION ALL \
                 SELECT content FROM node WHERE id = ?1 AND content > 0 LIMIT 1",
            )?
            .query_row(params![node, sweep.until], |row| row.get(0))
            .optional()?;
        Ok(found.unwrap_or(ContentId(i64::MAX as u64)))
    }

    /// Plans the end of a content that no state shows, unless something relies on it. `false` if
    /// something of it is left for another step. With `follow`, a newer content goes with it that
    /// was there for it alone.
    fn forget(&mut self, node: NodeId, content: Content, follow: bool) -> rusqlite::Result<bool> {
        if self.is_same_of_another(content.id)? {
            return Ok(true);
        }
        let older = self.neighbour(
            "SELECT id, size, state, same FROM content WHERE node = ?1 AND id < ?2 \
             ORDER BY id DESC",
            node,
            content.id,
        )?;
        let older = older.filter(Content::is_chained);
        match older {
            // It stays as the base of the older one.
            Some(_) if !content.is_chained() => return Ok(true),
            Some(older) if !self.inherit(node, content.id, &older)? => return Ok(false),
            None if !self.drop_images(node, content.id)? => return Ok(false),
            _ => {}
        }
        if content.is(ContentState::Packed) && !self.cut_recipe(content.id)? {
            return Ok(false);
        }
        self.gone.insert(content.id);
        // It goes last, for by it the rest is found again.
        let follow = follow && older.is_none();
        if !self.forget_reliance(node, content, follow)? {
            self.gone.remove(&content.id);
            return Ok(false);
        }
        if content.is(ContentState::Preserved) || content.is(ContentState::Cloned) {
            self.unpreserved.push((node, content.id));
        }
        self.images.remove(&content.id);
        self.add(ForgetChange::Content(content.id));
        Ok(true)
    }

    /// Plans the end of what was there for a content that goes.
    fn forget_reliance(
        &mut self,
        node: NodeId,
        content: Content,
        follow: bool,
    ) -> rusqlite::Result<bool> {
        if let Some(same) = content.same {
            let owner: Option<(NodeId, Content)> = self
                .db
                .prepare_cached("SELECT id, size, state, same, node FROM content WHERE id = ?1")?
                .query_row(params![same], |row| Ok((row.get(4)?, Content::from_row(row)?)))
                .optional()?;
            if let Some((owner, same)) = owner.filter(|_| !self.gone.contains(&same))
                && !self.is_shown(owner, same.id)?
                && (self.is_full() || !self.forget(owner, same, true)?)
            {
                return Ok(false);
            }
        }
        let newer = match follow {
            true => self.neighbour(
                "SELECT id, size, state, same FROM content WHERE node = ?1 AND id > ?2 ORDER BY id",
                node,
                content.id,
            )?,
            false => None,
        };
        match newer.filter(|newer| !newer.is_chained()) {
            Some(newer) if !self.is_shown(node, newer.id)? => {
                Ok(!self.is_full() && self.forget(node, newer, true)?)
            }
            _ => Ok(true),
        }
    }

    /// The nearest content that stays.
    fn neighbour(
        &self,
        sql: &str,
        node: NodeId,
        content: ContentId,
    ) -> rusqlite::Result<Option<Content>> {
        let mut statement = self.db.prepare_cached(sql)?;
        let mut rows = statement.query(params![node, content])?;
        while let Some(row) = rows.next()? {
            let found = Content::from_row(row)?;
            if !self.gone.contains(&found.id) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Whether a content that stays has its bytes from this one.
    fn is_same_of_another(&self, content: ContentId) -> rusqlite::Result<bool> {
        let mut statement = self.db.prepare_cached("SELECT id FROM content WHERE same = ?1")?;
        let mut rows = statement.query(params![content])?;
        while let Some(row) = rows.next()? {
            if !self.gone.contains(&row.get(0)?) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes as many chunks off the end of a recipe as there is room for; `false` if some are left.
    fn cut_recipe(&mut self, id: ContentId) -> rusqlite::Result<bool> {
        let count = recipe_parts(self.db, id)?.map_or(0, |parts| parts.len());
        if count > self.room() {
            if self.is_full() {
                return Ok(false);
            }
            self.changes.push(ForgetChange::RecipeCut { id, keep: count - self.room() });
            self.cost += self.room();
            return Ok(false);
        }
        self.cost += count;
        self.add(ForgetChange::Recipe(id));
        Ok(true)
    }

    /// Plans the end of the before-images of a content; `false` if some are left.
    fn drop_images(&mut self, node: NodeId, content: ContentId) -> rusqlite::Result<bool> {
        for row in self.images(node, content, 0, u64::MAX)? {
            if self.is_full() {
                return Ok(false);
            }
            self.forget_image(&row)?;
        }
        Ok(true)
    }

    /// Gives the before-images of a content to the older one that relies on it, as far as that has
    /// none of its own; `false` if some are left. The older one has its bytes all the time.
    fn inherit(
        &mut self,
        node: NodeId,
        content: ContentId,
        older: &Content,
    ) -> rusqlite::Result<bool> {
        let rows = self.images(node, content, 0, u64::MAX)?;
        let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return Ok(true) };
        let start = first.offset.saturating_sub(IMAGE_BYTES_MAX);
        let own = self.images(node, older.id, start, last.offset + last.length)?;
        // Where two before-images overlap, the first one counts.
        let (mut done, mut passed) = (0, 0);
        for row in rows {
            if self.is_full() {
                return Ok(false);
            }
            let start = row.offset.max(done);
            let end = (row.offset + row.length).min(older.size);
            passed +=
                own[passed..].iter().take_while(|own| own.offset + own.length <= start).count();
            // Added first, so that a stream that holds both never is without any.
            for (start, end) in uncovered(&own[passed..], start, end) {
                self.add_image(UndoRow {
                    node,
                    content: older.id,
                    offset: start,
                    length: end - start,
                    at: row.at.map(|at| at.further(start - row.offset)),
                })?;
            }
            self.forget_image(&row)?;
            done = done.max(end);
        }
        Ok(true)
    }

    fn add_image(&mut self, row: UndoRow) -> rusqlite::Result<()> {
        self.use_file(&row, 1)?;
        self.images.entry(row.content).or_default().insert(row.offset, Some(row.clone()));
        self.add(ForgetChange::UndoPut(row));
        Ok(())
    }

    fn forget_image(&mut self, row: &UndoRow) -> rusqlite::Result<()> {
        self.use_file(row, -1)?;
        self.images.entry(row.content).or_default().insert(row.offset, None);
        let (node, content, offset) = (row.node, row.content, row.offset);
        self.add(ForgetChange::Undo { node, content, offset });
        Ok(())
    }

    /// Counts what lies in segments, and the before-images of a stream, which goes with the last
    /// one.
    fn use_file(&mut self, row: &UndoRow, by: i64) -> rusqlite::Result<()> {
        let stream = match row.at.map(|at| at.file) {
            None => return Ok(()),
            Some(UndoFile::Segment(_)) => {
                self.segment_bytes -= by * row.length as i64;
                return Ok(());
            }
            Some(UndoFile::Stream(stream)) => stream,
        };
        if !self.streams.contains_key(&stream) {
            let rows: i64 = self
                .db
                .prepare_cached("SELECT count(*) FROM undo WHERE segment = ?1")?
                .query_row(params![-(stream.0 as i64)], |row| row.get(0))?;
            self.streams.insert(stream, rows);
        }
        let left = self.streams.entry(stream).or_default();
        *left += by;
        if *left == 0 {
            self.cost += recipe_parts(self.db, stream)?.map_or(0, |parts| parts.len());
        }
        Ok(())
    }

    /// The before-images of a content that begin in a range, ordered by offset, with what is
    /// planned; of all of them as many as there is room for, and one more.
    fn images(
        &self,
        node: NodeId,
        content: ContentId,
        start: u64,
        end: u64,
    ) -> rusqlite::Result<Vec<UndoRow>> {
        let planned = self.images.get(&content);
        let count_max = match end {
            u64::MAX => self.rows_max().saturating_add(planned.map_or(0, |all| all.len() as i64)),
            _ => i64::MAX,
        };
        let end = end.min(i64::MAX as u64);
        let mut statement = self.db.prepare_cached(
            "SELECT content, offset, length, segment, segment_offset FROM undo \
             WHERE node = ?1 AND content = ?2 AND offset >= ?3 AND offset < ?4 ORDER BY offset \
             LIMIT ?5",
        )?;
        let values = params![node, content, start as i64, end as i64, count_max];
        let mut rows = statement
            .query_map(values, |row| undo_row(row, node))?
            .collect::<rusqlite::Result<Vec<_>>>()?;
        if let Some(planned) = planned {
            rows.retain(|row| !planned.contains_key(&row.offset));
            rows.extend(planned.range(start..end).filter_map(|(_, row)| row.clone()));
            rows.sort_unstable_by_key(|row| row.offset);
        }
        Ok(rows)
    }
}

/// The parts of `[start, end)` that none of the before-images, ordered by offset, covers.
fn uncovered(rows: &[UndoRow], start: u64, end: u64) -> Vec<(u64, u64)> {
    let mut parts = Vec::new();
    let mut at = start;
    for row in rows {
        let row_end = row.offset + row.length;
        if row.offset >= end {
            break;
        }
        if row_end <= at {
            continue;
        }
        if row.offset > at {
            parts.push((at, row.offset));
        }
        at = at.max(row_end);
    }
    if at < end {
        parts.push((at, end));
    }
    parts
}

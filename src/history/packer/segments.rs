//! Before-images: out of the undo log into streams, and segments that are of no use away.

use std::collections::HashMap;

use super::{COMMIT_ROWS, Cut, Groups, Packed, Packer, SEGMENT_REMOVED};
use crate::catalog::{Change, Durability, ForgetChange, PackChange, UndoFile, UndoPlace, UndoRow};
use crate::error::{Error, Result};
use crate::history::chunker::cut_fixed;
use crate::history::journal::{ImageRecord, Record};
use crate::types::ContentId;

/// Streams of before-images end at about this many bytes: what is to stay of one keeps all of it.
const STREAM_BYTES: u64 = 1 << 20;

impl Packer<'_> {
    /// Removes the complete segments in which no before-image lies any more. That takes no room.
    /// If we die on the way, those that are left are found again by what the catalog has in them.
    pub fn unneeded_segments(&mut self) -> Result<()> {
        let mut unneeded = Vec::new();
        for segment in self.history.undo.complete(self.replicas)? {
            if !self.catalog.needs_segment(segment)? {
                unneeded.push(segment);
            }
        }
        if unneeded.is_empty() {
            return Ok(());
        }
        // That their rows were forgotten, and the rows of holes, which point nowhere and could be
        // made again only of the records in them.
        self.catalog.flush(Durability::Durable)?;
        self.history.forget_maps();
        for segment in unneeded {
            self.history.undo.remove(self.replicas, segment)?;
            (self.step)(SEGMENT_REMOVED)?;
        }
        Ok(())
    }

    /// Packs the before-images of all segments that are complete, and removes these. Where there is
    /// no room for all, those go that free the most for the least.
    pub fn segments(&mut self) -> Result<Packed> {
        self.unneeded_segments()?;
        let bytes = self.catalog.segment_bytes()?;
        let mut segments = self.history.undo.complete(self.replicas)?;
        segments.sort_by_key(|segment| bytes.get(segment).copied().unwrap_or(0));
        let mut packed = Packed::default();
        for segment in segments {
            if (self.is_over)() {
                return Ok(packed);
            }
            let rows = self.catalog.segment_rows(segment)?;
            let mut changes = Groups::new();
            let images = self.history.undo.load(self.replicas, segment, &rows)?;
            let mut first = 0;
            while first < rows.len() {
                let mut bytes = Vec::new();
                let mut end = first;
                while end < rows.len() && (bytes.len() as u64) < STREAM_BYTES {
                    if let Some(image) = &images[end] {
                        bytes.extend_from_slice(image);
                    }
                    end += 1;
                }
                let part = rows[first..end].iter().zip(&images[first..end]);
                self.stream(&bytes, part, &mut changes)?;
                packed.count += (end - first) as u64;
                packed.bytes += bytes.len() as u64;
                first = end;
            }
            // Also where nothing lies in it: rows of holes point nowhere, and must not go with it.
            self.record(changes)?;
            // What no replica has whole stays where it is.
            if !self.catalog.needs_segment(segment)? {
                self.history.undo.remove(self.replicas, segment)?;
                (self.step)(SEGMENT_REMOVED)?;
            }
        }
        packed.done = true;
        Ok(packed)
    }

    /// Copies what is left of streams that have lost before-images since they had so many bytes of
    /// them: what was lost would stay in their packs as long as they do. If we die on the way, some
    /// before-images lie in the copy and the others where they were.
    pub fn restream(&mut self, before: &HashMap<ContentId, u64>) -> Result<()> {
        for (&old, &bytes) in before {
            let left = self.catalog.stream_bytes(old)?;
            if left == 0 || left >= bytes {
                continue;
            }
            if (self.is_over)() {
                return Err(Error::Interrupted);
            }
            let rows = self.catalog.stream_rows(old)?;
            let mut images = Vec::with_capacity(rows.len());
            for row in &rows {
                let mut image = vec![0; row.length as usize];
                if let Some(place) = row.at {
                    self.history.read_undo(self.replicas, self.catalog, place, &mut image)?;
                }
                images.push(Some(image));
            }
            let all: Vec<u8> = images.iter().flatten().flatten().copied().collect();
            let mut changes = Groups::new();
            self.stream(&all, rows.iter().zip(&images), &mut changes)?;
            self.record(changes)?;
        }
        Ok(())
    }

    fn stream<'r>(
        &mut self,
        bytes: &[u8],
        rows: impl Iterator<Item = (&'r UndoRow, &'r Option<Vec<u8>>)>,
        changes: &mut Groups,
    ) -> Result<()> {
        let stream = self.catalog.next_content();
        let mut parts = Cut::default();
        for range in cut_fixed(bytes) {
            let chunk = &bytes[range];
            parts.chunk(self.chunk(chunk)?, chunk.len() as u32);
        }
        self.note_recipe(stream, &mut parts);
        let chunks = parts.chunks;
        let mut group = vec![Change::Pack(PackChange::RecipeAdd { id: stream, chunks })];
        let mut at = 0;
        let mut told = None;
        for (row, image) in rows {
            if image.is_none() {
                continue;
            }
            let (node, content, offset, length) = (row.node, row.content, row.offset, row.length);
            if told.replace((node, content)) != Some((node, content)) {
                self.note_version(node, content)?;
            }
            self.note(Record::Image(ImageRecord { stream, node, content, offset, length, at }));
            if matches!(row.at, Some(UndoPlace { file: UndoFile::Stream(_), .. })) {
                let place = UndoPlace { file: UndoFile::Stream(stream), offset: at };
                group.push(Change::Forget(ForgetChange::Undo { node, content, offset }));
                let row = UndoRow { at: Some(place), ..row.clone() };
                group.push(Change::Forget(ForgetChange::UndoPut(row)));
            } else {
                let moved = PackChange::UndoMove { node, content, offset, stream, at };
                group.push(Change::Pack(moved));
            }
            at += row.length;
            // The first group has at least one image, by which the stream is known.
            if group.len() >= COMMIT_ROWS {
                changes.push(std::mem::take(&mut group));
            }
        }
        changes.push(group);
        Ok(())
    }
}

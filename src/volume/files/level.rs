//! Writes that leave the replicas equal, whatever becomes of them.

use std::sync::Arc;

use super::super::Volume;
use crate::error::Result;
use crate::history::ranges::ByteRange;
use crate::replica::{Handles, Piece};

impl Volume {
    /// Writes all pieces on every replica. Where that fails, the replicas have the same parts.
    pub(in crate::volume) fn write_all(
        &self,
        handles: &Arc<Handles>,
        pieces: &Arc<[Piece]>,
    ) -> Result<()> {
        self.replicas().write(handles, pieces).or_else(|error| {
            for piece in pieces.iter() {
                self.level(handles, ByteRange::new(piece.offset, piece.bytes.len() as u64))?;
            }
            Err(error)
        })
    }

    /// After a write that failed on the primary, as on a full disk, a part of the data may be there
    /// and nowhere else: the others get the same bytes and size, so that the replicas stay equal.
    pub(super) fn level(&self, handles: &Handles, range: ByteRange) -> Result<()> {
        let replicas = self.replicas();
        let (size, bytes) = replicas.read("read", |id, b| {
            let file = handles.get(id)?;
            let size = b.stat(file)?.size;
            let end = range.end.min(size).max(range.start);
            let mut bytes = vec![0; (end - range.start) as usize];
            let got = b.read_at(file, &mut bytes, range.start)?;
            bytes.truncate(got);
            Ok((size, bytes))
        })?;
        let mut first = true;
        replicas.apply("level", |id, b| {
            let file = handles.get(id)?;
            if !std::mem::replace(&mut first, false) {
                if !bytes.is_empty() {
                    b.write_at(file, &bytes, range.start)?;
                }
                b.truncate(file, size)?;
            }
            Ok(())
        })?;
        Ok(())
    }
}

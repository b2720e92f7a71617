//! The live tree of a store: every operation, mirrored, preserved and recorded.

use crate::catalog::{Catalog, Snapshot};
use crate::error::Result;
use crate::replica::backing::Seek;
use crate::types::{ContentId, Generation, NodeId};

/// A mounted store's live tree and the access to its history.
pub struct Volume {
    _todo: (),
}

#[allow(unused_variables)]
impl Volume {
    /// The catalog.
    pub fn catalog(&self) -> &Catalog {
        todo!()
    }

    /// Seals every file that is open for writing, records what is due, and returns the generation that
    /// shows exactly what was live. Later changes do not reach it.
    pub fn settle(&self) -> Result<Generation> {
        todo!()
    }

    /// [`Volume::settle`] and names that generation.
    pub fn create_snapshot(&self, name: &str, automatic: bool) -> Result<Snapshot> {
        todo!()
    }

    /// Reads a past content of a node; the count is short only at the content's end.
    pub fn read_content(
        &self,
        node: NodeId,
        content: ContentId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        todo!()
    }

    /// Finds data or a hole in a past content; `ENXIO` at or past its end.
    pub fn seek_content(
        &self,
        node: NodeId,
        content: ContentId,
        offset: u64,
        to: Seek,
    ) -> Result<u64> {
        todo!()
    }
}

//! The map from the bytes of one past content to the places that hold them.

use std::collections::BTreeMap;

use crate::catalog::{Base, Sources, UndoPlace};

use super::ranges::{ByteRange, RangeSet};

/// Where a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// With the before-images, from here on.
    Undo(UndoPlace),
    /// Nowhere: they are zero.
    Hole,
    /// In the base: [`Extents::base`].
    Base,
}

/// A run of bytes and their place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which bytes of the content.
    pub range: ByteRange,
    /// Where they are.
    pub place: Place,
}

/// The extents of one content. What no before-image covers is in the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extents {
    /// Bytes of the content.
    pub size: u64,
    /// What has all bytes that no before-image has.
    pub base: Base,
    overlay: BTreeMap<u64, (u64, Option<UndoPlace>)>,
}

impl Extents {
    /// Lays the before-images over one another: for each byte the oldest content that has one
    /// counts.
    pub fn resolve(size: u64, sources: Sources) -> Extents {
        let mut extents = Extents { size, base: sources.base, overlay: BTreeMap::new() };
        let mut covered = RangeSet::default();
        for row in sources.undo {
            let range = ByteRange::new(row.offset, row.length);
            let range = ByteRange { start: range.start, end: range.end.min(size) };
            for part in covered.missing(range) {
                let place = row.at.map(|at| at.further(part.start - row.offset));
                extents.overlay.insert(part.start, (part.end, place));
            }
            covered.insert(range);
        }
        extents
    }

    /// The parts that the base must have, in order; in the rest of it may be anything, another on
    /// each replica.
    ///
    /// A file that was written to after it had lost its last name, by who had it open still, is
    /// preserved with what was written: before-images cover that, or it lies behind the content.
    pub fn parts_in_base(&self) -> Vec<ByteRange> {
        let covered = self.overlay.iter().map(|(&start, &(end, _))| ByteRange { start, end });
        let mut parts = Vec::new();
        let mut at = 0;
        for ByteRange { start, end } in covered {
            parts.push(ByteRange { start: at, end: start });
            at = end;
        }
        parts.push(ByteRange { start: at, end: self.size });
        parts.retain(|part| !part.is_empty());
        parts
    }

    /// The run that begins at `at`, cut at `limit` and at the content's end. `at` lies before both.
    pub fn run(&self, at: u64, limit: u64) -> Extent {
        let limit = limit.min(self.size);
        debug_assert!(at < limit);
        if let Some((&start, &(end, place))) = self.overlay.range(..=at).next_back()
            && at < end
        {
            let place = match place {
                None => Place::Hole,
                Some(undo) => Place::Undo(undo.further(at - start)),
            };
            return Extent { range: ByteRange { start: at, end: end.min(limit) }, place };
        }
        let next = self.overlay.range(at..).next().map_or(limit, |(&start, _)| start.min(limit));
        Extent { range: ByteRange { start: at, end: next }, place: Place::Base }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{UndoFile, UndoRow};
    use crate::types::{ContentId, NodeId};

    const LIVE: Base = Base::Live(NodeId(2));

    fn place(segment: u64, offset: u64) -> Place {
        Place::Undo(UndoPlace { file: UndoFile::Segment(segment), offset })
    }

    fn row(content: u64, offset: u64, length: u64, segment: u64) -> UndoRow {
        UndoRow {
            node: NodeId(2),
            content: ContentId(content),
            offset,
            length,
            at: Some(UndoPlace { file: UndoFile::Segment(segment), offset: 1000 }),
        }
    }

    #[test]
    fn the_oldest_before_image_of_a_byte_counts() {
        let sources = Sources { undo: vec![row(1, 10, 10, 1), row(2, 0, 30, 2)], base: LIVE };
        let extents = Extents::resolve(25, sources);
        let first = extents.run(0, 100);
        assert_eq!(first.range, ByteRange { start: 0, end: 10 });
        assert_eq!(first.place, place(2, 1000));
        let second = extents.run(12, 100);
        assert_eq!(second.range, ByteRange { start: 12, end: 20 });
        assert_eq!(second.place, place(1, 1002));
        let third = extents.run(20, 100);
        assert_eq!(third.range, ByteRange { start: 20, end: 25 });
        assert_eq!(third.place, place(2, 1020));
    }

    #[test]
    fn what_no_before_image_covers_is_in_the_base() {
        let sources = Sources { undo: vec![row(1, 10, 10, 1)], base: LIVE };
        let extents = Extents::resolve(40, sources);
        assert_eq!(extents.run(0, 40).range, ByteRange { start: 0, end: 10 });
        assert_eq!(extents.run(0, 40).place, Place::Base);
        assert_eq!(extents.run(20, 30).range, ByteRange { start: 20, end: 30 });
    }

    #[test]
    fn the_base_must_have_what_no_before_image_covers() {
        let part = |start, end| ByteRange { start, end };
        let parts =
            |size, undo| Extents::resolve(size, Sources { undo, base: LIVE }).parts_in_base();
        assert_eq!(parts(0, vec![]), vec![]);
        assert_eq!(parts(40, vec![]), vec![part(0, 40)]);
        let covered = vec![row(1, 0, 10, 1), row(1, 10, 5, 1), row(1, 20, 10, 1)];
        assert_eq!(parts(40, covered), vec![part(15, 20), part(30, 40)]);
        assert_eq!(parts(40, vec![row(1, 0, 100, 1)]), vec![]);
    }
}

//! The journal in packs: by what packed history can be known again when every catalog is lost.
//!
//! A pack holds, beside its chunks, a record of each content that was packed into it: whose it was,
//! under which path and when, and of which chunks it consists. The catalog has all of it and more;
//! nobody reads a journal while there is one.
//!
//! # Format of a record
//! A kind (1 byte), then numbers as LEB128 and byte strings with their length before them:
//!
//! | kind | fields |
//! |--|--|
//! | 1 version | node, content, size, mode, user, group, three times, flags, digest, path |
//! | 2 recipe | content or stream, count of parts, of each its length, then 0 for a hole or 1 and \
//! the first 16 bytes of the chunk's BLAKE3 |
//! | 3 before-image | stream, node, content, offset, length, offset in the stream |
//! | 4 further parts | content or stream, number of the first of them, then as a recipe |
//!
//! A time is seconds (as an unsigned number of the same bits) and nanoseconds. Flags: 1 it has
//! ended, 2 a digest follows. The records of one recipe may lie in several journals, and in one
//! more than once: that of a file of a hundred gigabytes is longer than a pack.

use crate::catalog::VersionRecord;
use crate::catalog::digest::Digest;
use crate::types::{ContentId, EntryName, NodeId, RelPath, Timestamp};

/// Parts of a recipe in one record, at most: so that a record stays far below a frame.
pub const PARTS_MAX: usize = 4096;
const VERSION: u8 = 1;
const RECIPE: u8 = 2;
const IMAGE: u8 = 3;
const FURTHER: u8 = 4;
const ENDED: u64 = 1;
const DIGESTED: u64 = 2;

/// Parts of a recipe: the first half of a chunk's hash, or a hole, and the length.
pub type Parts = Vec<(Option<Digest>, u32)>;

/// A before-image in a packed stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageRecord {
    /// The stream.
    pub stream: ContentId,
    /// Whose bytes.
    pub node: NodeId,
    /// Of which content.
    pub content: ContentId,
    /// First byte.
    pub offset: u64,
    /// How many.
    pub length: u64,
    /// Where they begin in the stream.
    pub at: u64,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Of a version.
    Version(VersionRecord),
    /// Of some parts of a recipe.
    Recipe {
        /// The content or stream.
        id: ContentId,
        /// How many parts come before these.
        first: u64,
        /// At most [`PARTS_MAX`].
        parts: Parts,
    },
    /// Of a before-image.
    Image(ImageRecord),
}

impl Record {
    /// The content or stream that it tells of.
    pub fn id(&self) -> ContentId {
        match self {
            Record::Version(version) => version.content,
            Record::Recipe { id, .. } => *id,
            Record::Image(image) => image.stream,
        }
    }

    /// Appends the record.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Record::Version(version) => {
                out.push(VERSION);
                for id in [version.node.0, version.content.0, version.size] {
                    put(out, id);
                }
                for number in [version.mode, version.uid, version.gid] {
                    put(out, number.into());
                }
                let died = version.died.unwrap_or_default();
                for time in [version.mtime, version.born, died] {
                    put(out, time.secs as u64);
                    put(out, time.nanos.into());
                }
                let ended = if version.died.is_some() { ENDED } else { 0 };
                let digested = if version.digest.is_some() { DIGESTED } else { 0 };
                put(out, ended | digested);
                out.extend(version.digest.iter().flatten());
                let path = version.path.to_bytes();
                put(out, path.len() as u64);
                out.extend(path);
            }
            Record::Recipe { id, first, parts } => {
                out.push(if *first == 0 { RECIPE } else { FURTHER });
                put(out, id.0);
                if *first > 0 {
                    put(out, *first);
                }
                put(out, parts.len() as u64);
                for (chunk, length) in parts {
                    put(out, (*length).into());
                    put(out, chunk.is_some().into());
                    out.extend(chunk.iter().flatten());
                }
            }
            Record::Image(image) => {
                out.push(IMAGE);
                let ids = [image.stream.0, image.node.0, image.content.0];
                ids.into_iter().chain([image.offset, image.length, image.at]).for_each(|number| {
                    put(out, number);
                });
            }
        }
    }
}

/// All records of a journal; `None` if it is not one. What is read is hostile: nothing is allocated
/// for what is not there.
pub fn decode(bytes: &[u8]) -> Option<Vec<Record>> {
    let mut reader = Reader(bytes);
    let mut records = Vec::new();
    while let Some(kind) = reader.bytes(1) {
        records.push(match kind[0] {
            VERSION => Record::Version(reader.version()?),
            kind @ (RECIPE | FURTHER) => {
                let id = ContentId(reader.id()?);
                let first = if kind == FURTHER { reader.id()? } else { 0 };
                let count = usize::try_from(reader.number()?).ok()?;
                let mut parts = Vec::new();
                for _ in 0..count {
                    let length = u32::try_from(reader.number()?).ok()?;
                    let chunk = match reader.number()? {
                        0 => None,
                        1 => Some(reader.digest()?),
                        _ => return None,
                    };
                    parts.push((chunk, length));
                }
                Record::Recipe { id, first, parts }
            }
            IMAGE => Record::Image(ImageRecord {
                stream: ContentId(reader.id()?),
                node: NodeId(reader.id()?),
                content: ContentId(reader.id()?),
                offset: reader.id()?,
                length: reader.id()?,
                at: reader.id()?,
            }),
            _ => return None,
        });
    }
    Some(records)
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.bytes(1)?[0];
            number |= u64::from(byte & 0x7f).checked_shl(shift)?;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    /// An id, an offset or a length: no database can hold a greater one.
    fn id(&mut self) -> Option<u64> {
        self.number().filter(|number| *number < 1 << 61)
    }

    fn small(&mut self) -> Option<u32> {
        u32::try_from(self.number()?).ok()
    }

    fn time(&mut self) -> Option<Timestamp> {
        let secs = self.number()? as i64;
        let nanos = self.small().filter(|nanos| *nanos < 1_000_000_000)?;
        Some(Timestamp { secs, nanos })
    }

    fn digest(&mut self) -> Option<Digest> {
        self.bytes(size_of::<Digest>())?.try_into().ok()
    }

    fn version(&mut self) -> Option<VersionRecord> {
        let (node, content, size) = (NodeId(self.id()?), ContentId(self.id()?), self.id()?);
        let (mode, uid, gid) = (self.small()? & 0o7777, self.small()?, self.small()?);
        let (mtime, born, died) = (self.time()?, self.time()?, self.time()?);
        let flags = self.number()?;
        let digest = if flags & DIGESTED != 0 { Some(self.digest()?) } else { None };
        let length = usize::try_from(self.number()?).ok()?;
        let names = self.bytes(length)?.split(|byte| *byte == b'/').map(EntryName::new);
        let path = RelPath::from(names.collect::<Result<Vec<_>, _>>().ok()?);
        let died = (flags & ENDED != 0).then_some(died);
        (node.0 < NodeId::LIMIT).then_some(())?;
        Some(VersionRecord { node, content, size, mode, uid, gid, mtime, born, died, digest, path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record() -> impl Strategy<Value = Record> {
        let time =
            (any::<i64>(), 0u32..1_000_000_000).prop_map(|(secs, nanos)| Timestamp { secs, nanos });
        let id = 0u64..1 << 40;
        let version = (
            (id.clone(), id.clone(), id.clone(), 0u32..0o10000, any::<u32>()),
            (time.clone(), time.clone(), proptest::option::of(time)),
            proptest::option::of(any::<Digest>()),
            "[a-z]{1,9}(/[a-z]{1,9}){0,4}",
        );
        let version = version.prop_map(|(ids, times, digest, path)| {
            Record::Version(VersionRecord {
                node: NodeId(ids.0),
                content: ContentId(ids.1),
                size: ids.2,
                mode: ids.3,
                uid: ids.4,
                gid: !ids.4,
                mtime: times.0,
                born: times.1,
                died: times.2,
                digest,
                path: RelPath::parse(path).expect("a path"),
            })
        });
        let part = (proptest::option::of(any::<Digest>()), any::<u32>());
        let recipe = (id.clone(), 0u64..3, proptest::collection::vec(part, 0..20))
            .prop_map(|(id, first, parts)| Record::Recipe { id: ContentId(id), first, parts });
        let image = (id.clone(), id.clone(), id).prop_map(|(a, b, c)| {
            let (stream, node, content) = (ContentId(a), NodeId(b), ContentId(c));
            Record::Image(ImageRecord { stream, node, content, offset: a, length: b, at: c })
        });
        prop_oneof![version, recipe, image]
    }

    proptest! {
        #[test]
        fn records_come_back(records in proptest::collection::vec(record(), 0..20)) {
            let mut bytes = Vec::new();
            records.iter().for_each(|record| record.encode(&mut bytes));
            prop_assert_eq!(decode(&bytes), Some(records));
        }

        #[test]
        fn hostile_bytes_are_no_journal_or_a_whole_one(
            records in proptest::collection::vec(record(), 1..4),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
        ) {
            let mut bytes = Vec::new();
            records.iter().for_each(|record| record.encode(&mut bytes));
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let _ = decode(&bytes);
            let _ = decode(&bytes[..at]);
        }
    }
}

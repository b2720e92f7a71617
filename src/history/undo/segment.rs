//! What a segment of the undo log consists of.
//!
//! # Format of a segment, version 1
//! `.rearview/undo/<number, 16 hex digits>.seg` is a sequence of records, each at a multiple of 64:
//!
//! | bytes | what |
//! |--|--|
//! | 0..4 | magic `RVU1`, or `RVUH` for a hole |
//! | 4..8 | length of the data, little endian |
//! | 8..16 | node |
//! | 16..24 | content |
//! | 24..32 | offset of the data in the content |
//! | 32..64 | BLAKE3 of bytes 0..32 and the data |
//! | 64.. | the data, then zeros up to a multiple of 64 |
//!
//! The data of a hole is its length, 8 bytes. A catalog row points at the data of a before-image;
//! that of a hole says all itself and points nowhere. If we die before the row is committed, the
//! record tells all that the row would say, and recovery adds the row.
//!
//! Where a segment was written ahead it ends with zeros, which are no record.

use std::collections::BTreeMap;

use crate::catalog::UndoRow;
use crate::replica::Buffer;
use crate::types::{ContentId, NodeId};

use super::super::ranges::ByteRange;

pub(super) const MAGIC: [u8; 4] = *b"RVU1";
pub(super) const MAGIC_HOLE: [u8; 4] = *b"RVUH";
pub(super) const HEADER_BYTES: usize = 64;
pub(super) const RECORD_ALIGN: u64 = 64;
/// No record's data is longer; a longer length in a header is garbage.
pub(super) const DATA_BYTES_MAX: u32 = 4 << 20;

/// What a record has before its data.
pub(super) fn header(
    magic: [u8; 4],
    of: (NodeId, ContentId),
    offset: u64,
    data: &[u8],
) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[0..4].copy_from_slice(&magic);
    header[4..8].copy_from_slice(&(data.len() as u32).to_le_bytes());
    header[8..16].copy_from_slice(&of.0.0.to_le_bytes());
    header[16..24].copy_from_slice(&of.1.0.to_le_bytes());
    header[24..32].copy_from_slice(&offset.to_le_bytes());
    let mut hash = blake3::Hasher::new();
    hash.update(&header[..32]).update(data);
    header[32..64].copy_from_slice(hash.finalize().as_bytes());
    header
}

/// Bytes that a content has, or that it has none there.
pub enum Image {
    /// At an offset, these; not empty.
    Bytes(u64, Vec<u8>),
    /// A hole.
    ///
    /// Its row alone would not do: one that was not committed when we died would be lost, and the
    /// content would show what was written into the hole.
    Hole(ByteRange),
}

impl Image {
    /// Bytes of its record.
    pub(super) fn record_bytes(&self) -> u64 {
        let data = match self {
            Image::Bytes(_, bytes) => bytes.len(),
            Image::Hole(_) => size_of::<u64>(),
        };
        (HEADER_BYTES + data) as u64
    }

    /// Adds its record to others.
    pub(super) fn encode(&self, of: (NodeId, ContentId), records: &mut Buffer) {
        match self {
            Image::Bytes(offset, bytes) => {
                assert!(!bytes.is_empty() && bytes.len() <= DATA_BYTES_MAX as usize);
                records.extend(&header(MAGIC, of, *offset, bytes));
                records.extend(bytes);
            }
            Image::Hole(range) => {
                let length = (range.end - range.start).to_le_bytes();
                records.extend(&header(MAGIC_HOLE, of, range.start, &length));
                records.extend(&length);
            }
        }
    }
}

/// A record of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    /// What its row says but for the place.
    pub(super) row: UndoRow,
    /// Whether it is of a hole, whose row has no place.
    pub(super) is_hole: bool,
    /// Bytes of the record.
    pub(super) bytes: usize,
}

/// Reads a record that begins at `bytes[0]`; `None` where there is no whole, valid one.
pub(super) fn decode(bytes: &[u8]) -> Option<Record> {
    let header = bytes.get(..HEADER_BYTES)?;
    let is_hole = header[..4] == MAGIC_HOLE;
    if !is_hole && header[..4] != MAGIC {
        return None;
    }
    let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
    let length = u32::from_le_bytes(header[4..8].try_into().expect("4 bytes"));
    if length == 0 || length > DATA_BYTES_MAX {
        return None;
    }
    let data = bytes.get(HEADER_BYTES..HEADER_BYTES + length as usize)?;
    let mut hash = blake3::Hasher::new();
    hash.update(&header[..32]).update(data);
    if hash.finalize().as_bytes() != &header[32..64] {
        return None;
    }
    let extent = match is_hole {
        true => u64::from_le_bytes(data.try_into().ok()?),
        false => u64::from(length),
    };
    // No byte of a file is farther out, and the catalog's numbers are signed.
    word(24).checked_add(extent).filter(|&end| extent > 0 && i64::try_from(end).is_ok())?;
    let row = UndoRow {
        node: NodeId(word(8)),
        content: ContentId(word(16)),
        offset: word(24),
        length: extent,
        at: None,
    };
    Some(Record { row, is_hole, bytes: HEADER_BYTES + length as usize })
}

/// The whole records of a segment: by where their data begins, where it ends and what it is. A torn
/// one is passed over; the scan goes on at the next multiple of 64.
pub(super) fn records(bytes: &[u8]) -> BTreeMap<u64, (u64, Record)> {
    let mut whole = BTreeMap::new();
    let mut at = 0;
    while at < bytes.len() {
        let Some(record) = decode(&bytes[at..]) else {
            at += RECORD_ALIGN as usize;
            continue;
        };
        let end = at + record.bytes;
        whole.insert((at + HEADER_BYTES) as u64, (end as u64, record));
        at = end.next_multiple_of(RECORD_ALIGN as usize);
    }
    whole
}

/// Puts whole records of `other` in the place of those that `bytes` lacks for these rows.
pub fn complete_from(bytes: &mut Vec<u8>, other: &[u8], rows: &[UndoRow]) {
    let missing = missing(bytes, rows);
    if missing.is_empty() {
        return;
    }
    let whole = records(other);
    for row in missing {
        let Some(at) = row.at else { continue };
        let Some((&data, &(end, _))) = whole.range(..=at.offset).next_back() else { continue };
        let (from, to) = (data as usize - HEADER_BYTES, end as usize);
        if bytes.len() < to {
            bytes.resize(to, 0);
        }
        bytes[from..to].copy_from_slice(&other[from..to]);
    }
}

/// The before-images that are in no whole record of a segment's bytes.
pub fn missing(bytes: &[u8], rows: &[UndoRow]) -> Vec<UndoRow> {
    let whole = records(bytes);
    let lies_within = |row: &UndoRow| {
        let Some(at) = row.at else { return true };
        let range = ByteRange::new(at.offset, row.length);
        let record = whole.range(..=range.start).next_back();
        record.is_some_and(|(_, (end, _))| range.end <= *end)
    };
    rows.iter().filter(|row| !lies_within(row)).cloned().collect()
}

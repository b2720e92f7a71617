//! The undo log: before-images, appended to segments that are equal on every replica.
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
//! record tells all that the row would say, and [`recover`] adds the row.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::catalog::{Catalog, Change, UndoFile, UndoPlace, UndoRow};
use crate::error::{Error, Result};
use crate::replica::backing::{Access, Backing, Handle};
use crate::replica::{Handles, Piece, PrivateDir, ReplicaSet};
use crate::types::{ContentId, EntryName, NodeId, ReplicaId};

use super::ranges::ByteRange;

const MAGIC: [u8; 4] = *b"RVU1";
const MAGIC_HOLE: [u8; 4] = *b"RVUH";
const HEADER_BYTES: usize = 64;
const RECORD_ALIGN: u64 = 64;
/// A new segment is begun at this size, so that space can be given back by removing whole files.
const SEGMENT_BYTES_MAX: u64 = 16 << 20;
/// No segment has this number or a greater one.
const SEGMENT_MAX: u64 = 1 << 62;
/// No segment is longer: its last record began before it was full.
const SEGMENT_BYTES_BOUND: u64 = SEGMENT_BYTES_MAX + (HEADER_BYTES as u64) + DATA_BYTES_MAX as u64;
/// No record's data is longer; a longer length in a header is garbage.
const DATA_BYTES_MAX: u32 = 4 << 20;

/// The open end of the undo log.
pub struct UndoLog {
    tail: Mutex<Tail>,
    synced: Mutex<Synced>,
    synced_more: Condvar,
    /// By segment, how many appenders began with it whose rows are not in the catalog yet.
    pins: Mutex<BTreeMap<u64, usize>>,
}

/// While it lives, no segment that the appender may have written to is complete.
pub struct Pin<'a> {
    log: &'a UndoLog,
    segment: u64,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        let mut pins = self.log.pins.lock();
        if let Some(count) = pins.get_mut(&self.segment) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.segment);
            }
        }
    }
}

struct Tail {
    segment: u64,
    /// Where the next record goes.
    end: u64,
    files: Option<Arc<Handles>>,
    /// Bytes appended since the mount: the log's position for group syncs.
    position: u64,
}

#[derive(Default)]
struct Synced {
    position: u64,
    running: bool,
}

/// The name of a segment in its directory.
pub fn segment_name(segment: u64) -> EntryName {
    EntryName::new(format!("{segment:016x}.seg")).expect("hex digits and a suffix")
}

/// The number of a segment by its file's name; `None` for a name that is not ours.
pub fn parse_segment_name(name: &EntryName) -> Option<u64> {
    let hex = std::str::from_utf8(name.as_bytes()).ok()?.strip_suffix(".seg")?;
    let number = u64::from_str_radix(hex, 16).ok()?;
    // The catalog holds it as a signed number, and there is always a next one.
    (number < SEGMENT_MAX && segment_name(number) == *name).then_some(number)
}

/// The segments on any replica, in order.
fn segments(replicas: &ReplicaSet) -> Result<Vec<u64>> {
    let dir = replicas.private(PrivateDir::Undo)?;
    let mut all = std::collections::BTreeSet::new();
    for id in replicas.online().collect::<Vec<_>>() {
        let listed = dir.get(id).and_then(|dir| replicas.get(id).backing().list(dir));
        for entry in listed.map_err(Error::from_io)? {
            all.extend(parse_segment_name(&entry.name));
        }
    }
    Ok(all.into_iter().collect())
}

/// The number of the segment that the next mount begins.
pub fn next_segment(replicas: &ReplicaSet) -> Result<u64> {
    Ok(segments(replicas)?.last().map_or(1, |last| last + 1))
}

/// What a record has before its data.
fn header(magic: [u8; 4], of: (NodeId, ContentId), offset: u64, data: &[u8]) -> [u8; HEADER_BYTES] {
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
    /// Adds its record to others.
    fn encode(&self, of: (NodeId, ContentId), records: &mut Vec<u8>) {
        match self {
            Image::Bytes(offset, bytes) => {
                assert!(!bytes.is_empty() && bytes.len() <= DATA_BYTES_MAX as usize);
                records.extend(header(MAGIC, of, *offset, bytes));
                records.extend(bytes);
            }
            Image::Hole(range) => {
                let length = (range.end - range.start).to_le_bytes();
                records.extend(header(MAGIC_HOLE, of, range.start, &length));
                records.extend(length);
            }
        }
    }
}

/// A record of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    /// What its row says but for the place.
    row: UndoRow,
    /// Whether it is of a hole, whose row has no place.
    is_hole: bool,
    /// Bytes of the record.
    bytes: usize,
}

/// Reads a record that begins at `bytes[0]`; `None` where there is no whole, valid one.
fn decode(bytes: &[u8]) -> Option<Record> {
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

impl UndoLog {
    /// Begins after the last segment there is: a segment is written by one mount only.
    pub fn open(replicas: &ReplicaSet) -> Result<UndoLog> {
        let tail = Tail { segment: next_segment(replicas)?, end: 0, files: None, position: 0 };
        Ok(UndoLog {
            tail: Mutex::new(tail),
            synced: Mutex::default(),
            synced_more: Condvar::new(),
            pins: Mutex::default(),
        })
    }

    /// To be held from before an append until its row is pushed.
    pub fn pin(&self) -> Pin<'_> {
        let mut pins = self.pins.lock();
        let segment = self.tail.lock().segment;
        *pins.entry(segment).or_default() += 1;
        Pin { log: self, segment }
    }

    /// Ends the open segment, so that it can be packed. Later appends begin a new one.
    pub fn rotate(&self, replicas: &ReplicaSet) -> Result<()> {
        let mut tail = self.tail.lock();
        if let Some(full) = &tail.files {
            replicas.sync(full, true)?;
            tail.files = None;
            tail.segment += 1;
            tail.end = 0;
        }
        Ok(())
    }

    /// A replica joined, and has the open segment: it is opened there too. Nobody appends.
    pub fn join(&self, replicas: &ReplicaSet, id: ReplicaId) -> Result<()> {
        let mut tail = self.tail.lock();
        if let Some(files) = tail.files.clone() {
            let b = replicas.get(id);
            let dir = b.backing().open_dir(&PrivateDir::Undo.path()).map_err(Error::from_io)?;
            let file = b.backing().open_file(&dir, &segment_name(tail.segment), Access::ReadWrite);
            tail.files = Some(Arc::new(files.with(id, file.map_err(Error::from_io)?)));
        }
        Ok(())
    }

    /// Bytes in the open segment.
    pub fn open_bytes(&self) -> u64 {
        self.tail.lock().end
    }

    /// The segments that nobody appends to any more, all of whose rows are in the catalog.
    pub fn complete(&self, replicas: &ReplicaSet) -> Result<Vec<u64>> {
        let first = self.first_open();
        let mut all = segments(replicas)?;
        all.retain(|&segment| segment < first);
        Ok(all)
    }

    /// The first segment that may have records whose rows are not pushed yet.
    pub fn first_open(&self) -> u64 {
        // Whoever begins to append after this look does so to the tail or a later segment.
        let tail = self.tail.lock().segment;
        self.pins.lock().keys().next().copied().unwrap_or(tail).min(tail)
    }

    /// Removes a segment that no row points to.
    pub fn remove(&self, replicas: &ReplicaSet, segment: u64) -> Result<()> {
        let dir = replicas.private(PrivateDir::Undo)?;
        let name = segment_name(segment);
        replicas.apply("remove", |id, b| match b.unlink(dir.get(id)?, &name) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            answer => answer,
        })?;
        Ok(())
    }

    /// The bytes of before-images in a segment, each from a replica on which its record is whole;
    /// `None` for one that no replica has so.
    pub fn load(
        &self,
        replicas: &ReplicaSet,
        segment: u64,
        rows: &[UndoRow],
    ) -> Result<Vec<Option<Vec<u8>>>> {
        let mut images = vec![None; rows.len()];
        for id in replicas.online().collect::<Vec<_>>() {
            if images.iter().all(Option::is_some) {
                break;
            }
            let replica = replicas.get(id);
            let backing = replica.backing();
            let read = || -> std::io::Result<Vec<u8>> {
                let dir = replicas.private(PrivateDir::Undo).map_err(|e| e.to_errno())?;
                read_segment(backing, dir.get(id)?, segment)
            };
            let path = replica.path.display();
            let bytes = match read() {
                Ok(bytes) => bytes,
                Err(error) => {
                    log::warn!("{path}: undo segment {segment} cannot be read: {error}");
                    continue;
                }
            };
            let whole = records(&bytes);
            for (row, image) in rows.iter().zip(&mut images).filter(|(_, image)| image.is_none()) {
                let Some(at) = row.at else { continue };
                let range = ByteRange::new(at.offset, row.length);
                let record = whole.range(..=range.start).next_back();
                if record.is_some_and(|(_, (end, _))| range.end <= *end) {
                    *image = Some(bytes[range.start as usize..range.end as usize].to_vec());
                }
            }
            if images.iter().any(Option::is_none) {
                log::warn!("{path}: undo segment {segment} is damaged");
            }
        }
        Ok(images)
    }

    /// Appends, on every replica, what a content has, and returns the rows that tell so. Not
    /// durable yet.
    pub fn append(
        &self,
        replicas: &ReplicaSet,
        of: (NodeId, ContentId),
        images: &[Image],
    ) -> Result<Vec<UndoRow>> {
        let mut tail = self.tail.lock();
        let mut rows = Vec::with_capacity(images.len());
        let mut images = images.iter().peekable();
        while images.peek().is_some() {
            if tail.files.is_none() || tail.end >= SEGMENT_BYTES_MAX {
                self.begin_segment(replicas, &mut tail)?;
            }
            let files = tail.files.clone().expect("a segment was begun");
            // As many records as the segment takes, with one write.
            let mut records = Vec::new();
            let mut end = tail.end;
            while end < SEGMENT_BYTES_MAX
                && let Some(image) = images.next()
            {
                records.resize((end - tail.end) as usize, 0);
                image.encode(of, &mut records);
                let file = UndoFile::Segment(tail.segment);
                let place = UndoPlace { file, offset: end + HEADER_BYTES as u64 };
                let (offset, length, at) = match image {
                    Image::Bytes(offset, bytes) => (*offset, bytes.len() as u64, Some(place)),
                    Image::Hole(range) => (range.start, range.end - range.start, None),
                };
                rows.push(UndoRow { node: of.0, content: of.1, offset, length, at });
                end = (tail.end + records.len() as u64).next_multiple_of(RECORD_ALIGN);
            }
            tail.position += records.len() as u64;
            let at = std::mem::replace(&mut tail.end, end);
            if let Err(error) =
                replicas.write(&files, &Arc::from([Piece { offset: at, bytes: records }]))
            {
                // The next record takes the place of what may be there in part.
                tail.end = at;
                return Err(error);
            }
        }
        Ok(rows)
    }

    fn begin_segment(&self, replicas: &ReplicaSet, tail: &mut Tail) -> Result<()> {
        if let Some(full) = &tail.files {
            // Its last records must not be forgotten by later group syncs of the next segment. It
            // stays the open one until then: where there is none, nothing is left to sync.
            replicas.sync(full, true)?;
            tail.files = None;
            tail.segment += 1;
            tail.end = 0;
        }
        let dir = replicas.private(PrivateDir::Undo)?;
        let name = segment_name(tail.segment);
        let files = replicas.apply("create", |id, b| {
            let file = b.create(dir.get(id)?, &name, 0o600, super::OWN)?;
            // The name must be there when its records are looked for after a power cut.
            b.sync(dir.get(id)?, false)?;
            Ok(file)
        })?;
        tail.files = Some(Arc::new(Handles::from(files)));
        tail.end = 0;
        Ok(())
    }

    /// Makes all that was appended before the call durable on every replica. Callers that come
    /// while a sync runs share the next one.
    pub fn sync(&self, replicas: &ReplicaSet) -> Result<()> {
        let target = self.tail.lock().position;
        let mut synced = self.synced.lock();
        loop {
            if synced.position >= target {
                return Ok(());
            }
            if !synced.running {
                break;
            }
            self.synced_more.wait(&mut synced);
        }
        synced.running = true;
        drop(synced);
        let (position, files) = {
            let tail = self.tail.lock();
            (tail.position, tail.files.clone())
        };
        let outcome = match files {
            Some(files) => replicas.sync(&files, true),
            None => Ok(()),
        };
        let mut synced = self.synced.lock();
        synced.running = false;
        if outcome.is_ok() {
            synced.position = position;
        }
        self.synced_more.notify_all();
        outcome
    }

    /// Fills `buffer` from a place in a segment.
    pub fn read(
        &self,
        replicas: &ReplicaSet,
        (segment, offset): (u64, u64),
        buffer: &mut [u8],
    ) -> Result<()> {
        let dir = replicas.private(PrivateDir::Undo)?;
        let name = segment_name(segment);
        replicas.read("undo", |id, b| {
            let file = b.open_file(dir.get(id)?, &name, Access::Read).map_err(super::missing)?;
            // A segment that ends too early is damaged here and may be whole elsewhere.
            if b.read_at(&file, buffer, offset)? < buffer.len() {
                return Err(std::io::Error::from_raw_os_error(libc::EIO));
            }
            Ok(())
        })
    }
}

/// All of a segment on one replica, as far as one can reach.
fn read_segment(b: &dyn Backing, dir: &Handle, segment: u64) -> std::io::Result<Vec<u8>> {
    let file = b.open_file(dir, &segment_name(segment), Access::Read)?;
    let mut bytes = vec![0; b.stat(&file)?.size.min(SEGMENT_BYTES_BOUND) as usize];
    let got = b.read_at(&file, &mut bytes, 0)?;
    bytes.truncate(got);
    Ok(bytes)
}

/// The whole records of a segment: by where their data begins, where it ends and what it is. A torn
/// one is passed over; the scan goes on at the next multiple of 64.
fn records(bytes: &[u8]) -> BTreeMap<u64, (u64, Record)> {
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

/// A segment is never longer: it ends at the first record that reaches its size.
pub const SEGMENT_BYTES_READ_MAX: u64 = SEGMENT_BYTES_MAX + 2 * DATA_BYTES_MAX as u64;

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

/// Adds the rows of records that no commit knows. A torn record is one whose overwrite never began.
/// Segments before `from` have none of them.
pub fn recover(replicas: &ReplicaSet, catalog: &Catalog, from: u64) -> Result<()> {
    let dir = replicas.private(PrivateDir::Undo)?;
    let mut found: BTreeMap<ContentId, Vec<UndoRow>> = BTreeMap::new();
    for segment in segments(replicas)?.into_iter().filter(|&segment| segment >= from) {
        let bytes = replicas.read("undo", |id, b| read_segment(b, dir.get(id)?, segment))?;
        for (offset, (_, Record { mut row, is_hole, .. })) in records(&bytes) {
            let place = UndoPlace { file: UndoFile::Segment(segment), offset };
            row.at = (!is_hole).then_some(place);
            let own = found.get(&row.content);
            if !own.is_some_and(|own| has(own, &row)) && needs_row(catalog, &row)? {
                found.entry(row.content).or_default().push(row);
            }
        }
    }
    let mut changes = Vec::new();
    for (&id, rows) in &found {
        // The seal was not committed any more. No state shows it, but older contents of its node
        // rely on it.
        if catalog.content_size(id)?.is_none() {
            let size = rows.iter().map(|row| row.offset + row.length).max().unwrap_or(0);
            changes.extend(rows.first().map(|row| Change::ContentAdd { id, node: row.node, size }));
        }
        changes.extend(rows.iter().cloned().map(Change::UndoAdd));
    }
    if !changes.is_empty() {
        // All at once: if only rows were committed when we die, no recovery would look for what
        // their content is.
        let count: usize = found.values().map(Vec::len).sum();
        catalog.push(changes)?;
        log::info!("history: found {count} before-images not yet recorded");
    }
    Ok(())
}

/// Whether one of the rows of a content says what this one does.
fn has(rows: &[UndoRow], row: &UndoRow) -> bool {
    rows.iter().any(|known| {
        known.content == row.content
            && known.offset <= row.offset
            && known.offset + known.length >= row.offset + row.length
    })
}

/// Whether this is a before-image that history needs and the catalog does not know.
fn needs_row(catalog: &Catalog, row: &UndoRow) -> Result<bool> {
    if catalog.content_size(row.content)?.is_none()
        && !super::is_uncommitted(catalog, row.node, row.content)?
    {
        return Ok(false);
    }
    Ok(!has(&catalog.sources(row.node, row.content)?.undo, row))
}

#[cfg(test)]
mod tests;

//! The undo log: before-images, appended to segments that are equal on every replica.
//!
//! What is appended goes past the page cache, in whole blocks: it is synced at once and read
//! seldom, and a copy to new pages of the cache takes several times as long as the disks do. The
//! last block is written again with what is added to it; what it had is the same, so that a torn
//! write of it loses nothing. Behind small appends some blocks of zeros are written ahead, over
//! which the next ones go: a sync of them has no metadata to write, and takes half as long.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::catalog::{Catalog, Change, UndoFile, UndoPlace, UndoRow};
use crate::error::{Error, Result};
use crate::replica::backing::{Access, BLOCK_BYTES, Backing, Handle};
use crate::replica::{Buffer, Handles, Piece, PrivateDir, ReplicaSet};
use crate::types::{ContentId, EntryName, NodeId, ReplicaId};

use super::ranges::ByteRange;
use super::{preserved_dir, preserved_name};
use segment::{DATA_BYTES_MAX, HEADER_BYTES, RECORD_ALIGN, Record, records};

mod segment;

pub use segment::{Image, complete_from, missing};

/// A new segment is begun at this size, so that space can be given back by removing whole files.
const SEGMENT_BYTES_MAX: u64 = 16 << 20;
/// No segment has this number or a greater one.
const SEGMENT_MAX: u64 = 1 << 62;
/// No segment is longer: its last record began before it was full.
const SEGMENT_BYTES_BOUND: u64 = SEGMENT_BYTES_MAX + (HEADER_BYTES as u64) + DATA_BYTES_MAX as u64;
/// So much is written with zeros behind appends that are smaller.
const AHEAD_BYTES: u64 = 64 << 10;
const BLOCK: u64 = BLOCK_BYTES as u64;

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

#[derive(Default)]
struct Tail {
    segment: u64,
    /// Where the next record goes.
    end: u64,
    /// What the block has before that.
    begun: Vec<u8>,
    /// Up to where the file was written, with zeros from `end` on.
    written: u64,
    files: Option<Arc<Handles>>,
    /// Bytes appended since the mount: the log's position for group syncs.
    position: u64,
}

impl Tail {
    /// Ends the open segment. Its last records must not be forgotten by later group syncs of the
    /// next one, so it stays the open one until they are durable: where there is none, nothing is
    /// left to sync.
    fn end_segment(&mut self, replicas: &ReplicaSet) -> Result<()> {
        if let Some(full) = &self.files {
            replicas.sync(full, true)?;
            self.go_on();
        }
        Ok(())
    }

    /// The next record is the first one of the next segment.
    fn go_on(&mut self) {
        *self = Tail { segment: self.segment + 1, position: self.position, ..Tail::default() };
    }
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

impl UndoLog {
    /// Begins after the last segment there is: a segment is written by one mount only.
    pub fn open(replicas: &ReplicaSet) -> Result<UndoLog> {
        let tail = Tail { segment: next_segment(replicas)?, ..Tail::default() };
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
        self.tail.lock().end_segment(replicas)
    }

    /// A replica joined, and has the open segment: it is opened there too. Nobody appends.
    pub fn join(&self, replicas: &ReplicaSet, id: ReplicaId) -> Result<()> {
        let mut tail = self.tail.lock();
        if let Some(files) = tail.files.clone() {
            let b = replicas.get(id);
            let dir = b.backing().open_dir(&PrivateDir::Undo.path()).map_err(Error::from_io)?;
            let file = b.backing().open_file(&dir, &segment_name(tail.segment), Access::Direct);
            tail.files = Some(Arc::new(files.with(id, file.map_err(Error::from_io)?)));
        }
        Ok(())
    }

    /// The segment that is appended to, if one was begun.
    pub fn open_segment(&self) -> Option<u64> {
        let tail = self.tail.lock();
        tail.files.is_some().then_some(tail.segment)
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
                read_segment(backing, dir.get(id)?, &segment_name(segment))
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
            let (mut places, mut end) = (Vec::new(), tail.end);
            while end < SEGMENT_BYTES_MAX
                && let Some(image) = images.next()
            {
                places.push((end, image));
                end = (end + image.record_bytes()).next_multiple_of(RECORD_ALIGN);
            }
            let start = tail.end - tail.end % BLOCK;
            let mut until = end.next_multiple_of(BLOCK);
            if until > tail.written && until - start < AHEAD_BYTES && replicas.has_room(AHEAD_BYTES)
            {
                until = (until + AHEAD_BYTES).min(SEGMENT_BYTES_MAX.max(until));
            }
            let mut bytes = Buffer::aligned((until - start) as usize);
            bytes.extend(&tail.begun);
            for (at, image) in places {
                bytes.pad_to((at - start) as usize);
                image.encode(of, &mut bytes);
                let file = UndoFile::Segment(tail.segment);
                let place = UndoPlace { file, offset: at + HEADER_BYTES as u64 };
                let (offset, length, at) = match image {
                    Image::Bytes(offset, bytes) => (*offset, bytes.len() as u64, Some(place)),
                    Image::Hole(range) => (range.start, range.end - range.start, None),
                };
                rows.push(UndoRow { node: of.0, content: of.1, offset, length, at });
            }
            bytes.pad_to((until - start) as usize);
            let last = (end - end % BLOCK - start) as usize;
            let begun = bytes[last..(end - start) as usize].to_vec();
            // After an error the next records take the place of what may be there in part.
            replicas.write(&files, &Arc::from([Piece { offset: start, bytes }]))?;
            tail.position += end - tail.end;
            (tail.end, tail.begun) = (end, begun);
            tail.written = tail.written.max(until);
        }
        Ok(rows)
    }

    fn begin_segment(&self, replicas: &ReplicaSet, tail: &mut Tail) -> Result<()> {
        tail.end_segment(replicas)?;
        let dir = replicas.private(PrivateDir::Undo)?;
        let name = segment_name(tail.segment);
        let files = replicas.apply("create", |id, b| {
            match b.create(dir.get(id)?, &name, 0o600, super::OWN) {
                // Of a try that ended before the file could be opened, for want of descriptors.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => _ = made?,
            }
            let file = b.open_file(dir.get(id)?, &name, Access::Direct)?;
            if b.stat(&file)?.size > 0 {
                return Err(std::io::ErrorKind::AlreadyExists.into());
            }
            // The name must be there when its records are looked for after a power cut.
            b.sync(dir.get(id)?, false)?;
            Ok(file)
        });
        match files {
            Ok(files) => tail.files = Some(Arc::new(Handles::from(files))),
            Err(error) => {
                // What there is of it is in nobody's way: the next one has another name.
                tail.go_on();
                return Err(error);
            }
        }
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

/// Whose bytes the whole records of a segment hold.
pub fn overwritten(bytes: &[u8]) -> impl Iterator<Item = (NodeId, ContentId)> {
    records(bytes).into_values().map(|(_, record)| (record.row.node, record.row.content))
}

/// The newest content of each node of which these segments hold whole records.
pub fn newest(replicas: &ReplicaSet, from: u64) -> Result<BTreeMap<NodeId, ContentId>> {
    let dir = replicas.private(PrivateDir::Undo)?;
    let mut newest = BTreeMap::<NodeId, ContentId>::new();
    for segment in segments(replicas)?.into_iter().filter(|&segment| segment >= from) {
        let bytes =
            replicas.read("undo", |id, b| read_segment(b, dir.get(id)?, &segment_name(segment)))?;
        for (node, content) in overwritten(&bytes) {
            let known = newest.entry(node).or_insert(content);
            *known = content.max(*known);
        }
    }
    Ok(newest)
}

/// All of a segment on one replica, as far as one can reach.
pub fn read_segment(b: &dyn Backing, dir: &Handle, name: &EntryName) -> std::io::Result<Vec<u8>> {
    let file = b.open_file(dir, name, Access::Read)?;
    let mut bytes = vec![0; b.stat(&file)?.size.min(SEGMENT_BYTES_BOUND) as usize];
    let got = b.read_at(&file, &mut bytes, 0)?;
    bytes.truncate(got);
    Ok(bytes)
}

/// A segment is never longer: it ends at the first record that reaches its size.
pub const SEGMENT_BYTES_READ_MAX: u64 = SEGMENT_BYTES_MAX + 2 * DATA_BYTES_MAX as u64;

/// Adds the rows of records that no commit knows. A torn record is one whose overwrite never began.
/// Segments before `from` have none of them.
pub fn recover(replicas: &ReplicaSet, catalog: &Catalog, from: u64) -> Result<()> {
    let dir = replicas.private(PrivateDir::Undo)?;
    let mut found: BTreeMap<ContentId, Vec<UndoRow>> = BTreeMap::new();
    for segment in segments(replicas)?.into_iter().filter(|&segment| segment >= from) {
        let bytes =
            replicas.read("undo", |id, b| read_segment(b, dir.get(id)?, &segment_name(segment)))?;
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
        if let (None, Some(&UndoRow { node, .. })) = (catalog.content_size(id)?, rows.first()) {
            let covered = rows.iter().map(|row| row.offset + row.length).max().unwrap_or(0);
            // Where it lies in a file of its own (it had lost its last name, and was written to
            // after that), they rely on the rest of that file as well.
            let size = covered.max(preserved_size(replicas, node, id)?);
            changes.push(Change::ContentAdd { id, node, size });
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

/// The size of the file in which a content is preserved; nothing if there is none.
fn preserved_size(replicas: &ReplicaSet, node: NodeId, content: ContentId) -> Result<u64> {
    let dir = replicas.private(preserved_dir(node))?;
    let name = preserved_name(node, content);
    replicas.read("stat", |id, b| match b.stat_at(dir.get(id)?, &name) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        stat => Ok(stat?.size),
    })
}

/// Gives every replica the whole records that another has and it lacks, durably. To be called after
/// an unclean end for replicas whose catalogs get rows at once, before rows are made of what one of
/// them has: whichever catalog is ahead when we die, its replica has the bytes. What was appended
/// is the same on all, as far as it came.
pub fn complete(replicas: &ReplicaSet, from: u64) -> Result<()> {
    let dir = replicas.private(PrivateDir::Undo)?;
    for segment in segments(replicas)?.into_iter().filter(|&segment| segment >= from) {
        let name = segment_name(segment);
        let copies =
            replicas.apply("undo", |id, b| match read_segment(b, dir.get(id)?, &name) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
                other => other,
            })?;
        let mut whole: BTreeMap<usize, &[u8]> = BTreeMap::new();
        for (_, bytes) in copies.iter() {
            for (data, (end, _)) in records(bytes) {
                let from = data as usize - HEADER_BYTES;
                whole.insert(from, &bytes[from..end as usize]);
            }
        }
        let lacking = |own: &[u8]| {
            let lacks = |&(from, record): &(&usize, &&[u8])| {
                own.get(*from..from + record.len()) != Some(*record)
            };
            whole.iter().filter(lacks).map(|(from, record)| (*from, *record)).collect::<Vec<_>>()
        };
        let lacking: Vec<_> = copies.iter().map(|(id, own)| (id, lacking(own))).collect();
        if lacking.iter().all(|(_, records)| records.is_empty()) {
            continue;
        }
        replicas.apply("complete", |id, b| {
            let dir = dir.get(id)?;
            let own = lacking.iter().find(|(of, records)| *of == id && !records.is_empty());
            let Some((_, records)) = own else { return Ok(()) };
            let file = match b.open_file(dir, &name, Access::ReadWrite) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    b.create(dir, &name, 0o600, super::OWN)?
                }
                other => other?,
            };
            records
                .iter()
                .try_for_each(|(from, record)| b.write_at(&file, record, *from as u64))?;
            b.sync(&file, false)?;
            b.sync(dir, false)
        })?;
        log::info!("history: before-images that one replica lacked were completed from another");
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
        && !super::recover::is_uncommitted(catalog, row.node, row.content)?
    {
        return Ok(false);
    }
    Ok(!has(&catalog.sources(row.node, row.content)?.undo, row))
}

#[cfg(test)]
mod tests;

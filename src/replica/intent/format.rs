//! The form of `.rearview/intent.log`, and reading one that an unclean end left.
//!
//! ```text
//! 0      header A      4096 bytes, of which 128 are used
//! 4096   header B
//! 8192   half 0        32768 records of 64 bytes
//! ...    half 1
//!
//! header: magic "RVIL", version u32, number u64, mount i64, closed u64, generation u64,
//!         sequence u64, undo segment u64, zeros; at 96 the BLAKE3 hash of what is before it
//! record: epoch u64, kind u8 (1 file, 2 directory, 3 moved directory, 4 everything), 7 zeros,
//!         node u64, born from u64 (moved: first half of the replica's uuid),
//!         inode number u64, birth i64 (both of a moved directory on that replica);
//!         at 48 the first 16 bytes of the BLAKE3 hash of mount and what is before it
//! ```
//! All numbers are little-endian. The headers are written in turn; the valid one with the greater
//! number counts. `mount` is when the mount began, as the marker has it: records of another mount
//! have other hashes, so nothing has to be cleared. What epochs up to `closed` dirtied is durable
//! on every replica that was in use, up to `generation` and `sequence` of the catalog, and undo
//! segments before the noted one have all their rows in it. Records of later epochs count. A torn
//! one belongs to an operation that never began.

use std::io;

use crate::replica::backing::{Access, Backing, Handle};
use crate::replica::handles::PrivateDir;
use crate::types::{EntryName, NodeId};

use super::{Dirty, DirtySet, Epoch};

/// The log's name in the private directory.
pub const LOG_FILE: &str = "intent.log";
/// Records in a half.
pub(super) const HALF_RECORDS: u32 = 32 * 1024;
pub(super) const RECORD_BYTES: usize = 64;
const HEADER_BYTES: usize = 128;
const HEADER_SLOT_BYTES: u64 = 4096;
const RECORDS_AT: u64 = 2 * HEADER_SLOT_BYTES;
const HALF_BYTES: u64 = HALF_RECORDS as u64 * RECORD_BYTES as u64;
/// All of the file.
pub(super) const LOG_BYTES: u64 = RECORDS_AT + 2 * HALF_BYTES;
const MAGIC: [u8; 4] = *b"RVIL";
const VERSION: u32 = 1;
/// No header has this number: there is always a next one.
const NUMBER_MAX: u64 = 1 << 62;
const HASH_AT: usize = 96;
const RECORD_HASH_AT: usize = 48;

/// What was durable when a checkpoint ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Base {
    /// Up to this generation the bytes of all contents were durable, too.
    pub generation: u64,
    /// The catalog's batches.
    pub sequence: u64,
    /// The first undo segment that may have records without rows.
    pub undo_from: u64,
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub number: u64,
    pub mount: i64,
    pub closed: Epoch,
    pub base: Base,
}

/// A directory as one replica knows it: it may have moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MovedDir {
    /// Which.
    pub node: NodeId,
    /// The first half of the replica's uuid.
    pub replica: u64,
    /// Its inode number there.
    pub ino: u64,
    /// Its birth there, in nanoseconds; 0 where the filesystem does not tell.
    pub birth: i64,
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    Dirty(Dirty, NodeId),
    Moved(MovedDir),
    Everything,
}

/// What a log of an unclean end says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// When its mount began.
    pub mount: i64,
    /// What was durable at the last checkpoint.
    pub base: Base,
    /// What may differ from that.
    pub dirty: DirtySet,
    /// The directories of it that may have moved.
    pub moved: Vec<MovedDir>,
    /// Too much was dirtied to say what.
    pub everything: bool,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
        let words = [
            self.number,
            self.mount as u64,
            self.closed.0,
            self.base.generation,
            self.base.sequence,
            self.base.undo_from,
        ];
        for (index, value) in words.into_iter().enumerate() {
            bytes[8 + index * 8..16 + index * 8].copy_from_slice(&value.to_le_bytes());
        }
        let hash = blake3::hash(&bytes[..HASH_AT]);
        bytes[HASH_AT..].copy_from_slice(hash.as_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Option<Header> {
        let bytes = bytes.get(..HEADER_BYTES)?;
        let version = u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes"));
        if bytes[..4] != MAGIC
            || version != VERSION
            || word(bytes, 8) >= NUMBER_MAX
            || blake3::hash(&bytes[..HASH_AT]).as_bytes() != &bytes[HASH_AT..]
        {
            return None;
        }
        Some(Header {
            number: word(bytes, 8),
            mount: word(bytes, 16) as i64,
            closed: Epoch(word(bytes, 24)),
            base: Base {
                generation: word(bytes, 32),
                sequence: word(bytes, 40),
                undo_from: word(bytes, 48),
            },
        })
    }

    /// Where this header is written.
    pub fn at(&self) -> u64 {
        self.number % 2 * HEADER_SLOT_BYTES
    }
}

/// Where a record is written.
pub(super) fn record_at(half: u64, index: u32) -> u64 {
    RECORDS_AT + half % 2 * HALF_BYTES + u64::from(index) * RECORD_BYTES as u64
}

fn record_hash(mount: i64, bytes: &[u8]) -> [u8; 16] {
    let mut hash = blake3::Hasher::new();
    hash.update(&mount.to_le_bytes()).update(bytes);
    hash.finalize().as_bytes()[..16].try_into().expect("16 of 32 bytes")
}

pub(super) fn encode(mount: i64, epoch: Epoch, said: Said) -> [u8; RECORD_BYTES] {
    let (kind, words) = match said {
        Said::Dirty(Dirty::File(node), born) => (1, [node.0, born.0, 0, 0]),
        Said::Dirty(Dirty::Dir(node) | Dirty::Moved(node), born) => (2, [node.0, born.0, 0, 0]),
        Said::Moved(dir) => (3, [dir.node.0, dir.replica, dir.ino, dir.birth as u64]),
        Said::Everything => (4, [0; 4]),
    };
    let mut bytes = [0; RECORD_BYTES];
    bytes[0..8].copy_from_slice(&epoch.0.to_le_bytes());
    bytes[8] = kind;
    for (index, value) in words.into_iter().enumerate() {
        bytes[16 + index * 8..24 + index * 8].copy_from_slice(&value.to_le_bytes());
    }
    let hash = record_hash(mount, &bytes[..RECORD_HASH_AT]);
    bytes[RECORD_HASH_AT..].copy_from_slice(&hash);
    bytes
}

pub(super) fn decode(mount: i64, bytes: &[u8]) -> Option<(Epoch, Said)> {
    let bytes = bytes.get(..RECORD_BYTES)?;
    if bytes[RECORD_HASH_AT..] != record_hash(mount, &bytes[..RECORD_HASH_AT]) {
        return None;
    }
    let node = NodeId(word(bytes, 16));
    let born = NodeId(word(bytes, 24));
    let said = match bytes[8] {
        1 => Said::Dirty(Dirty::File(node), born),
        2 => Said::Dirty(Dirty::Dir(node), born),
        3 => Said::Moved(MovedDir {
            node,
            replica: word(bytes, 24),
            ino: word(bytes, 32),
            birth: word(bytes, 40) as i64,
        }),
        4 => Said::Everything,
        _ => return None,
    };
    Some((Epoch(word(bytes, 0)), said))
}

impl Past {
    fn take(&mut self, said: Said) {
        match said {
            Said::Dirty(what, born) => {
                self.dirty.insert(what);
                let known = self.dirty.born_from;
                self.dirty.born_from = Some(known.map_or(born, |known| known.min(born)));
            }
            Said::Moved(dir) => {
                self.dirty.moved.insert(dir.node);
                self.moved.push(dir);
            }
            Said::Everything => self.everything = true,
        }
    }

    /// Adds what the log of another replica says of the same mount.
    pub fn join(&mut self, other: &Past) {
        self.dirty.join(&other.dirty);
        for dir in &other.moved {
            if !self.moved.contains(dir) {
                self.moved.push(*dir);
            }
        }
        self.everything |= other.everything;
        self.base.generation = self.base.generation.min(other.base.generation);
        self.base.sequence = self.base.sequence.min(other.base.sequence);
        self.base.undo_from = self.base.undo_from.min(other.base.undo_from);
    }
}

/// The name as an entry.
pub(super) fn log_name() -> EntryName {
    EntryName::new(LOG_FILE).expect("the names of our own files are entry names")
}

/// The valid header that was written last.
pub(super) fn newest(file: &[u8]) -> Option<Header> {
    let second = file.get(HEADER_SLOT_BYTES as usize..)?;
    let headers = [Header::decode(file), Header::decode(second)];
    headers.into_iter().flatten().max_by_key(|header| header.number)
}

/// All bytes of a log; fewer for a file that is too short.
pub(super) fn load(backing: &dyn Backing, file: &Handle) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; LOG_BYTES as usize];
    let got = backing.read_at(file, &mut bytes, 0)?;
    bytes.truncate(got);
    Ok(bytes)
}

/// What the log of a backing says; `None` if there is none, or none that can be believed.
pub fn read(backing: &dyn Backing) -> io::Result<Option<Past>> {
    let opened = backing
        .open_dir(&PrivateDir::Root.path())
        .and_then(|dir| backing.open_file(&dir, &log_name(), Access::Read));
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    Ok(parse(&load(backing, &file)?))
}

/// What the bytes of a log say.
pub fn parse(bytes: &[u8]) -> Option<Past> {
    if bytes.len() as u64 != LOG_BYTES {
        return None;
    }
    let header = newest(bytes)?;
    let mut past = Past { mount: header.mount, base: header.base, ..Past::default() };
    for record in bytes[RECORDS_AT as usize..].chunks_exact(RECORD_BYTES) {
        // Most of a log was never written, or by an earlier mount.
        if record[..RECORD_HASH_AT].iter().all(|&byte| byte == 0) {
            continue;
        }
        if let Some((epoch, said)) = decode(header.mount, record)
            && epoch > header.closed
        {
            past.take(said);
        }
    }
    Some(past)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn log(header: Header, records: &[(Epoch, Said)]) -> Vec<u8> {
        let mut bytes = vec![0; LOG_BYTES as usize];
        let at = header.at() as usize;
        bytes[at..at + HEADER_BYTES].copy_from_slice(&header.encode());
        for (index, (epoch, said)) in records.iter().enumerate() {
            let at = record_at(epoch.0, index as u32) as usize;
            bytes[at..at + RECORD_BYTES].copy_from_slice(&encode(header.mount, *epoch, *said));
        }
        bytes
    }

    fn header() -> Header {
        let base = Base { generation: 3, sequence: 4, undo_from: 5 };
        Header { number: 7, mount: 99, closed: Epoch(1), base }
    }

    fn dir(id: u64) -> Said {
        Said::Dirty(Dirty::Dir(NodeId(id)), NodeId(50))
    }

    #[test]
    fn open_epochs_count_and_closed_ones_do_not() {
        let moved = MovedDir { node: NodeId(8), replica: 1, ino: 2, birth: 3 };
        let file = Said::Dirty(Dirty::File(NodeId(6)), NodeId(40));
        let records = [
            (Epoch(1), dir(5)),
            (Epoch(2), file),
            (Epoch(3), dir(7)),
            (Epoch(3), Said::Moved(moved)),
        ];
        let past = parse(&log(header(), &records)).unwrap();
        assert_eq!((past.mount, past.base), (99, header().base));
        assert_eq!(past.dirty.files, [NodeId(6)].into());
        assert_eq!(past.dirty.dirs, [NodeId(7)].into());
        assert_eq!((past.dirty.born_from, past.moved), (Some(NodeId(40)), vec![moved]));
        assert!(!past.everything);
    }

    #[test]
    fn records_of_another_mount_and_torn_ones_are_nothing() {
        let mut bytes = log(header(), &[(Epoch(2), dir(5)), (Epoch(2), dir(6))]);
        let at = record_at(2, 1) as usize;
        bytes[at + 20] ^= 1;
        assert_eq!(parse(&bytes).unwrap().dirty.dirs, [NodeId(5)].into());
        let next = Header { number: 8, mount: 100, ..header() };
        bytes[..HEADER_BYTES].copy_from_slice(&next.encode());
        assert!(parse(&bytes).unwrap().dirty.is_empty());
    }

    #[test]
    fn a_torn_header_leaves_the_one_before_it() {
        let mut bytes = log(header(), &[(Epoch(2), dir(5))]);
        let next = Header { number: 8, closed: Epoch(2), ..header() };
        bytes[..HEADER_BYTES].copy_from_slice(&next.encode());
        assert!(parse(&bytes).unwrap().dirty.is_empty());
        bytes[40] ^= 1;
        assert!(!parse(&bytes).unwrap().dirty.is_empty());
        bytes[4096 + 40] ^= 1;
        assert_eq!(parse(&bytes), None);
        assert_eq!(parse(&bytes[..100]), None);
    }

    proptest! {
        #[test]
        fn a_changed_record_is_never_taken(at in 0usize..RECORD_BYTES, flip in 1u8..=255) {
            let mut record = encode(1, Epoch(2), dir(5));
            record[at] ^= flip;
            prop_assert!(decode(1, &record).is_none());
        }

        /// Whoever can write a log can also write its hashes.
        #[test]
        fn headers_and_records_of_any_numbers_are_taken_or_not(
            words in any::<[u64; 7]>(), kind in any::<u8>(),
        ) {
            let [number, closed, generation, sequence, undo_from, node, epoch] = words;
            let base = Base { generation, sequence, undo_from };
            let header = Header { number, mount: 1, closed: Epoch(closed), base };
            let read = Header::decode(&header.encode());
            prop_assert_eq!(read.is_some(), number < NUMBER_MAX);
            let mut record = encode(1, Epoch(epoch), dir(node));
            record[8] = kind;
            let hash = record_hash(1, &record[..RECORD_HASH_AT]);
            record[RECORD_HASH_AT..].copy_from_slice(&hash);
            let mut past = Past::default();
            if let Some((_, said)) = decode(1, &record) {
                past.take(said);
                let copy = past.clone();
                past.join(&copy);
            }
        }

        #[test]
        fn garbage_is_no_log(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(parse(&bytes).is_none());
            prop_assert!(decode(0, &bytes).is_none());
        }
    }
}

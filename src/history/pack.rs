//! Pack files: many chunks of history in one immutable file, the same on every replica.
//!
//! # Format of a pack, versions 1 to 3
//! `.rearview/packs/<low byte of the id, 2 hex digits>/<id, 16 hex digits>.pack`. Numbers are
//! little endian. A header, frames, a trailer:
//!
//! | bytes of the header | what |
//! |--|--|
//! | 0..4 | magic `RVP1` |
//! | 4..8 | version of the format: 1, with a journal 3 (2: before records told further parts) |
//! | 8..24 | UUID of the store |
//! | 24..32 | id of the pack |
//!
//! | bytes of a frame | what |
//! |--|--|
//! | 0..4 | magic `RVPF` |
//! | 4..8 | codec: 0 stored raw, 1 zstd |
//! | 8..12 | decoded length, at most 1 MiB: the sum of the chunks' lengths |
//! | 12..16 | stored length |
//! | 16..20 | count of chunks, 1 to 4096 |
//! | 20.. | of each chunk its length (4 bytes) and the BLAKE3 of its bytes (32 bytes) |
//! | then | the stored bytes: the chunks one after another, compressed together |
//!
//! A journal frame ([`super::journal`]) has no chunks and may come between the others, or alone:
//!
//! | bytes of a journal frame | what |
//! |--|--|
//! | 0..4 | magic `RVPJ` |
//! | 4..20 | as a frame has them; the count is that of the records |
//! | 20.. | the stored bytes: the records one after another |
//!
//! | bytes of the trailer | what |
//! |--|--|
//! | 0..4 | magic `RVPE` |
//! | 4..8 | count of frames, those of the journal too |
//! | 8..40 | BLAKE3 of all bytes of the file before this field |
//!
//! A chunk is found by its frame's offset in the file and its own in the decoded frame, which a
//! catalog row holds. A lost catalog learns all of it again by [`scan`].
//!
//! A chunk of 32 KiB or more has a frame of its own. Smaller ones share frames of up to 128 KiB in
//! the order in which they were added, so that neighbouring versions of a file cost little more
//! than their differences.
//!
//! What is read here is hostile: every length is bounded before anything is allocated, and no byte
//! is given out whose BLAKE3 was not checked.

use super::journal::Record;
use crate::catalog::{ChunkPlace, ChunkRow};
use crate::types::PackId;

const PACK_MAGIC: [u8; 4] = *b"RVP1";
const FRAME_MAGIC: [u8; 4] = *b"RVPF";
const TRAILER_MAGIC: [u8; 4] = *b"RVPE";
/// Of a pack without a journal.
const VERSION: u32 = 1;
/// Of one with a journal.
const VERSION_JOURNAL: u32 = 3;
const JOURNAL_MAGIC: [u8; 4] = *b"RVPJ";
/// A journal frame ends at this size, decoded.
const JOURNAL_BYTES: usize = 256 << 10;
const CODEC_RAW: u32 = 0;
const CODEC_ZSTD: u32 = 1;
const HEADER_BYTES: usize = 32;
/// What precedes the chunk table of a frame.
const FRAME_HEADER_BYTES: usize = 20;
/// One chunk in the table of a frame.
const ENTRY_BYTES: usize = 36;
const TRAILER_BYTES: usize = 40;

/// A pack of so many stored bytes is full.
const PACK_BYTES_FULL: u64 = 16 << 20;
/// The journal of a full pack may still grow to this; what is still collected fits then.
pub const PACK_BYTES_REFUSED: u64 = 24 << 20;
/// No pack is longer; whoever reads one whole allocates no more.
pub const PACK_BYTES_MAX: u64 = 32 << 20;
/// No frame is longer when decoded, and no chunk.
const DECODED_BYTES_MAX: usize = 1 << 20;
/// Smaller chunks share frames.
const OWN_FRAME_BYTES: usize = 32 << 10;
/// Decoded bytes of a shared frame, at most.
const SHARED_FRAME_BYTES: usize = 128 << 10;
const FRAME_CHUNKS_MAX: usize = 4096;
const _: () = assert!(super::chunker::CHUNK_BYTES_MAX <= DECODED_BYTES_MAX);
/// Measured on 60 MiB of Rust source in frames as above, one core (ratio, MiB/s in; out is
/// 1200 MiB/s at any level): level 1 4.94, 434; level 3 5.22, 391; level 6 5.77, 120.
const ZSTD_LEVEL: i32 = 3;
/// A frame is stored raw unless zstd saves this fraction of it (1/32, 3 %): decoding costs time.
const SAVING_DIVISOR: usize = 32;

/// What is wrong with a pack, as the end of a sentence about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// It ends within something.
    #[error("it ends too early")]
    Short,
    /// It is longer than a pack can be.
    #[error("it is longer than a pack can be")]
    Long,
    /// A magic number is another one.
    #[error("there is no {0} where one should be")]
    Magic(&'static str),
    /// A later version of the format, or garbage.
    #[error("its format version is {0}, and 1 and 2 are known")]
    Version(u32),
    /// It says that it is another pack, or another store's.
    #[error("it is another pack")]
    Other,
    /// Lengths that contradict each other or the format's bounds.
    #[error("the lengths in a frame are wrong")]
    Lengths,
    /// A journal that is none.
    #[error("its journal cannot be read")]
    Journal,
    /// A frame that cannot be decompressed.
    #[error("a frame cannot be decompressed")]
    Compression,
    /// A chunk's bytes are not those that were stored.
    #[error("the BLAKE3 hash of a chunk is wrong")]
    ChunkHash,
    /// The file's bytes are not those that were stored.
    #[error("the BLAKE3 hash of the file is wrong")]
    FileHash,
    /// A whole frame without the chunk that the catalog looks for in it.
    #[error("a chunk is not the one that the catalog knows")]
    OtherChunk,
}

/// A chunk in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedChunk {
    /// BLAKE3 of its bytes.
    pub hash: [u8; 32],
    /// Where it lies.
    pub place: ChunkPlace,
    /// Bytes of it.
    pub length: u32,
    /// Its share of the bytes of its frame, headers included. The shares of a frame's chunks sum up
    /// to the frame.
    pub stored: u32,
}

/// A finished pack.
pub struct Pack {
    /// Its id.
    pub id: PackId,
    /// The file, byte for byte.
    pub bytes: Vec<u8>,
    /// BLAKE3 of `bytes`.
    pub hash: [u8; 32],
    /// Its chunks in the order in which they were added.
    pub chunks: Vec<PackedChunk>,
}

/// Collects chunks into a pack. Holds all of it in memory.
pub struct PackBuilder {
    id: PackId,
    bytes: Vec<u8>,
    frames: u32,
    decoded_bytes: u64,
    chunks: Vec<PackedChunk>,
    /// The shared frame that is being filled: its bytes and which of `chunks` they are.
    shared: Vec<u8>,
    shared_chunks: Vec<usize>,
    /// The journal frame that is being filled, and its records.
    journal: Vec<u8>,
    records: u32,
    /// `None` if zstd could not be set up: all is stored raw then.
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl PackBuilder {
    /// Begins the pack `id` of a store.
    pub fn new(store: uuid::Uuid, id: PackId) -> PackBuilder {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(&PACK_MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(store.as_bytes());
        bytes.extend_from_slice(&id.0.to_le_bytes());
        PackBuilder {
            id,
            bytes,
            frames: 0,
            decoded_bytes: 0,
            chunks: Vec::new(),
            shared: Vec::new(),
            shared_chunks: Vec::new(),
            journal: Vec::new(),
            records: 0,
            zstd: zstd::bulk::Compressor::new(ZSTD_LEVEL).ok(),
        }
    }

    /// Adds a chunk with its BLAKE3 hash; at most 1 MiB. Chunks that resemble each other belong one
    /// after another.
    pub fn add(&mut self, hash: [u8; 32], data: &[u8]) {
        assert!(data.len() <= DECODED_BYTES_MAX, "a chunk is at most 1 MiB");
        assert!(!self.is_overfull(), "a full pack is to be finished");
        self.decoded_bytes += data.len() as u64;
        let index = self.chunks.len();
        let place = ChunkPlace { pack: self.id, frame: 0, at: 0 };
        self.chunks.push(PackedChunk { hash, place, length: data.len() as u32, stored: 0 });
        if data.len() >= OWN_FRAME_BYTES {
            self.put_frame(data, &[index]);
            return;
        }
        if self.shared.len() + data.len() > SHARED_FRAME_BYTES
            || self.shared_chunks.len() == FRAME_CHUNKS_MAX
        {
            self.flush();
        }
        self.shared.extend_from_slice(data);
        self.shared_chunks.push(index);
    }

    /// Adds a record to the journal.
    pub fn note(&mut self, record: &Record) {
        record.encode(&mut self.journal);
        self.records += 1;
        if self.journal.len() >= JOURNAL_BYTES {
            self.flush_journal();
        }
    }

    fn flush_journal(&mut self) {
        let data = std::mem::take(&mut self.journal);
        let count = std::mem::take(&mut self.records);
        if count > 0 {
            self.bytes[4..8].copy_from_slice(&VERSION_JOURNAL.to_le_bytes());
            self.put(JOURNAL_MAGIC, &data, count, &[]);
        }
    }

    /// Bytes of the chunks added so far.
    pub fn decoded_bytes(&self) -> u64 {
        self.decoded_bytes
    }

    /// Whether the pack has reached its size: no more chunks are to be added.
    pub fn is_full(&self) -> bool {
        self.stored_bytes() >= PACK_BYTES_FULL
    }

    /// Whether no more records are to be added either.
    pub fn is_overfull(&self) -> bool {
        self.stored_bytes() >= PACK_BYTES_REFUSED
    }

    /// Bytes of the pack so far, but for what is still collected for a frame.
    pub fn stored_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether no chunk was added.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The finished pack.
    pub fn finish(mut self) -> Pack {
        self.flush();
        self.flush_journal();
        let mut bytes = self.bytes;
        bytes.extend_from_slice(&TRAILER_MAGIC);
        bytes.extend_from_slice(&self.frames.to_le_bytes());
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        let hash = *blake3::hash(&bytes).as_bytes();
        Pack { id: self.id, bytes, hash, chunks: self.chunks }
    }

    /// Ends the shared frame that is being filled.
    fn flush(&mut self) {
        let data = std::mem::take(&mut self.shared);
        let indexes = std::mem::take(&mut self.shared_chunks);
        if !indexes.is_empty() {
            self.put_frame(&data, &indexes);
        }
        // Their room is kept for the next one.
        (self.shared, self.shared_chunks) = (data, indexes);
        self.shared.clear();
        self.shared_chunks.clear();
    }

    fn put_frame(&mut self, data: &[u8], indexes: &[usize]) {
        let mut table = Vec::with_capacity(indexes.len() * ENTRY_BYTES);
        for &index in indexes {
            let chunk = &self.chunks[index];
            table.extend_from_slice(&chunk.length.to_le_bytes());
            table.extend_from_slice(&chunk.hash);
        }
        let frame = self.put(FRAME_MAGIC, data, indexes.len() as u32, &table);
        let mut shares = Shares::new(self.bytes.len() - frame, data.len(), indexes.len());
        let mut at = 0;
        for &index in indexes {
            let chunk = &mut self.chunks[index];
            chunk.place = ChunkPlace { pack: self.id, frame: frame as u64, at };
            chunk.stored = shares.next(chunk.length);
            at += chunk.length;
        }
    }

    /// Writes a frame of any kind; where it begins.
    fn put(&mut self, magic: [u8; 4], data: &[u8], count: u32, table: &[u8]) -> usize {
        let packed = self.zstd.as_mut().and_then(|zstd| zstd.compress(data).ok());
        let saves = |packed: &Vec<u8>| packed.len() < data.len() - data.len() / SAVING_DIVISOR;
        let packed = packed.filter(saves);
        let (codec, stored) = match &packed {
            Some(packed) => (CODEC_ZSTD, packed.as_slice()),
            None => (CODEC_RAW, data),
        };
        let frame = self.bytes.len();
        self.bytes.extend_from_slice(&magic);
        for number in [codec, data.len() as u32, stored.len() as u32, count] {
            self.bytes.extend_from_slice(&number.to_le_bytes());
        }
        self.bytes.extend_from_slice(table);
        self.bytes.extend_from_slice(stored);
        self.frames += 1;
        frame
    }
}

/// Divides the bytes of a frame among its chunks by their lengths, each with its table entry.
struct Shares {
    total: u64,
    weights: u64,
    passed: u64,
}

impl Shares {
    fn new(total: usize, decoded: usize, count: usize) -> Shares {
        Shares { total: total as u64, weights: (decoded + count * ENTRY_BYTES) as u64, passed: 0 }
    }

    fn next(&mut self, length: u32) -> u32 {
        let before = self.total * self.passed / self.weights;
        self.passed += u64::from(length) + ENTRY_BYTES as u64;
        (self.total * self.passed / self.weights - before) as u32
    }
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// What a frame's first bytes say, within the format's bounds.
struct FrameHeader {
    codec: u32,
    decoded: usize,
    stored: usize,
    count: usize,
}

impl FrameHeader {
    fn parse(bytes: &[u8]) -> Result<FrameHeader, Flaw> {
        FrameHeader::parse_as(FRAME_MAGIC, FRAME_CHUNKS_MAX, bytes)
    }

    fn parse_as(magic: [u8; 4], count_max: usize, bytes: &[u8]) -> Result<FrameHeader, Flaw> {
        let header = bytes.get(..FRAME_HEADER_BYTES).ok_or(Flaw::Short)?;
        if header[..4] != magic {
            return Err(Flaw::Magic("frame"));
        }
        let [decoded, stored, count] = [8, 12, 16].map(|at| number(header, at) as usize);
        let header = FrameHeader { codec: number(header, 4), decoded, stored, count };
        let codec_fits = match header.codec {
            CODEC_RAW => stored == decoded,
            CODEC_ZSTD => stored < decoded,
            _ => false,
        };
        let fits = decoded <= DECODED_BYTES_MAX && (1..=count_max).contains(&count);
        if codec_fits && fits { Ok(header) } else { Err(Flaw::Lengths) }
    }

    /// Bytes of the header with the chunk table.
    fn table_end(&self) -> usize {
        FRAME_HEADER_BYTES + self.count * ENTRY_BYTES
    }

    fn frame_bytes(&self) -> usize {
        self.table_end() + self.stored
    }

    /// The decoded bytes.
    fn unpack(&self, stored: &[u8]) -> Result<Vec<u8>, Flaw> {
        if self.codec == CODEC_RAW {
            return Ok(stored.to_vec());
        }
        // zstd writes no more than the capacity, whatever the bytes say of their size.
        let mut data = Vec::with_capacity(self.decoded);
        let got = zstd::bulk::Decompressor::new()
            .and_then(|mut zstd| zstd.decompress_to_buffer(stored, &mut data));
        if got.ok() == Some(self.decoded) { Ok(data) } else { Err(Flaw::Compression) }
    }
}

/// The records of the journal frame that `bytes` begins with, and how long it is.
fn journal_frame(bytes: &[u8]) -> Result<(Vec<Record>, usize), Flaw> {
    let header = FrameHeader::parse_as(JOURNAL_MAGIC, DECODED_BYTES_MAX, bytes)?;
    let end = FRAME_HEADER_BYTES + header.stored;
    let stored = bytes.get(FRAME_HEADER_BYTES..end).ok_or(Flaw::Short)?;
    let records = super::journal::decode(&header.unpack(stored)?).ok_or(Flaw::Journal)?;
    if records.len() == header.count { Ok((records, end)) } else { Err(Flaw::Journal) }
}

/// How long the frame is that begins with `bytes`, of which a few suffice.
pub fn frame_bytes(bytes: &[u8]) -> Result<usize, Flaw> {
    FrameHeader::parse(bytes).map(|header| header.frame_bytes())
}

/// A decoded frame; every chunk of it was checked.
pub struct Frame {
    data: Vec<u8>,
    chunks: Vec<FrameChunk>,
}

struct FrameChunk {
    at: u32,
    length: u32,
    hash: [u8; 32],
}

impl Frame {
    /// Decodes the frame that `bytes` begins with.
    pub fn decode(bytes: &[u8]) -> Result<Frame, Flaw> {
        let header = FrameHeader::parse(bytes)?;
        let table = bytes.get(FRAME_HEADER_BYTES..header.table_end()).ok_or(Flaw::Short)?;
        let stored = bytes.get(header.table_end()..header.frame_bytes()).ok_or(Flaw::Short)?;
        let mut chunks = Vec::with_capacity(header.count);
        let mut end = 0;
        for entry in table.chunks_exact(ENTRY_BYTES) {
            let length = number(entry, 0);
            let hash = entry[4..].try_into().expect("32 bytes");
            chunks.push(FrameChunk { at: end as u32, length, hash });
            end += length as usize;
            // Checked at each step, so that no sum overflows.
            if end > header.decoded {
                return Err(Flaw::Lengths);
            }
        }
        if end != header.decoded {
            return Err(Flaw::Lengths);
        }
        let data = header.unpack(stored)?;
        let frame = Frame { data, chunks };
        let intact =
            |chunk: &FrameChunk| *blake3::hash(frame.bytes_of(chunk)).as_bytes() == chunk.hash;
        if frame.chunks.iter().all(intact) { Ok(frame) } else { Err(Flaw::ChunkHash) }
    }

    fn bytes_of(&self, chunk: &FrameChunk) -> &[u8] {
        &self.data[chunk.at as usize..chunk.at as usize + chunk.length as usize]
    }

    /// The bytes of a chunk, if it is the one that the catalog knows.
    pub fn chunk(&self, row: &ChunkRow) -> Result<&[u8], Flaw> {
        let from = self.chunks.partition_point(|chunk| chunk.at < row.place.at);
        // An empty chunk lies where the next one does.
        let mut here = self.chunks[from..].iter().take_while(|chunk| chunk.at == row.place.at);
        here.find(|chunk| chunk.length == row.length && chunk.hash == row.hash)
            .map(|chunk| self.bytes_of(chunk))
            .ok_or(Flaw::OtherChunk)
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> u64 {
        (self.data.len() + self.chunks.len() * size_of::<FrameChunk>()) as u64
    }
}

/// What a whole pack consists of.
pub struct Scanned {
    /// The store that it belongs to.
    pub store: uuid::Uuid,
    /// Its id.
    pub id: PackId,
    /// Its chunks in the order in which they lie in it. Every one was decoded and checked.
    pub chunks: Vec<PackedChunk>,
    /// Its journal.
    pub records: Vec<Record>,
}

/// Checks a whole pack, every byte and every chunk. Holds one decoded frame at a time.
pub fn scan(bytes: &[u8]) -> Result<Scanned, Flaw> {
    if bytes.len() as u64 > PACK_BYTES_MAX {
        return Err(Flaw::Long);
    }
    if bytes.len() < HEADER_BYTES + TRAILER_BYTES {
        return Err(Flaw::Short);
    }
    let (header, rest) = bytes.split_at(HEADER_BYTES);
    if header[..4] != PACK_MAGIC {
        return Err(Flaw::Magic("pack"));
    }
    if !(VERSION..=VERSION_JOURNAL).contains(&number(header, 4)) {
        return Err(Flaw::Version(number(header, 4)));
    }
    let store = uuid::Uuid::from_bytes(header[8..24].try_into().expect("16 bytes"));
    let id = PackId(u64::from_le_bytes(header[24..32].try_into().expect("8 bytes")));
    let (frames, trailer) = rest.split_at(rest.len() - TRAILER_BYTES);
    if trailer[..4] != TRAILER_MAGIC {
        return Err(Flaw::Magic("trailer"));
    }
    if blake3::hash(&bytes[..bytes.len() - 32]).as_bytes() != &trailer[8..] {
        return Err(Flaw::FileHash);
    }
    let (mut chunks, mut records) = (Vec::new(), Vec::new());
    let (mut at, mut count) = (0, 0);
    while at < frames.len() {
        if frames[at..].starts_with(&JOURNAL_MAGIC) {
            let (more, length) = journal_frame(&frames[at..])?;
            records.extend(more);
            at += length;
            count += 1;
            continue;
        }
        let length = frame_bytes(&frames[at..])?;
        let frame = Frame::decode(&frames[at..])?;
        let mut shares = Shares::new(length, frame.data.len(), frame.chunks.len());
        for chunk in &frame.chunks {
            let place = ChunkPlace { pack: id, frame: (HEADER_BYTES + at) as u64, at: chunk.at };
            let (hash, length, stored) = (chunk.hash, chunk.length, shares.next(chunk.length));
            chunks.push(PackedChunk { hash, place, length, stored });
        }
        at += length;
        count += 1;
    }
    if count != number(trailer, 4) {
        return Err(Flaw::Lengths);
    }
    Ok(Scanned { store, id, chunks, records })
}

#[cfg(test)]
pub(super) mod tests;

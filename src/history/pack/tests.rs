//! Round trips, the price of small versions, and hostile bytes.

use super::*;
use crate::types::{ChunkId, ContentId};
use proptest::prelude::*;

const STORE: uuid::Uuid = uuid::Uuid::from_u128(0x1234_5678_9abc_def0_1122_3344_5566_7788);
const ID: PackId = PackId(0x2a);

fn pack(chunks: &[Vec<u8>]) -> Pack {
    let mut builder = PackBuilder::new(STORE, ID);
    for chunk in chunks {
        builder.add(*blake3::hash(chunk).as_bytes(), chunk);
    }
    builder.finish()
}

/// The row of a packed chunk.
pub fn row(chunk: &PackedChunk) -> ChunkRow {
    let PackedChunk { hash, place, length, stored } = *chunk;
    ChunkRow { id: ChunkId(1), hash, place, length, stored }
}

fn decode(bytes: &[u8], place: ChunkPlace) -> Result<Frame, Flaw> {
    Frame::decode(bytes.get(place.frame as usize..).ok_or(Flaw::Short)?)
}

/// Bytes that do not compress, the same for ever.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// A chunk of the given length that compresses well or not at all.
fn chunk(seed: u64, length: usize, compressible: bool) -> Vec<u8> {
    match compressible {
        true => noise(seed, 64).into_iter().cycle().take(length).collect(),
        false => noise(seed, length),
    }
}

/// Chunks of all the sizes that matter: none, tiny, shared frames, own frames.
fn chunks() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let length = prop_oneof![0usize..200, 0usize..40_000, 30_000usize..300_000];
    let one = (any::<u64>(), length, any::<bool>());
    proptest::collection::vec(one.prop_map(|(seed, length, good)| chunk(seed, length, good)), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_goes_in_comes_out(chunks in chunks()) {
        let pack = pack(&chunks);
        prop_assert_eq!(pack.hash, *blake3::hash(&pack.bytes).as_bytes());
        prop_assert_eq!(pack.chunks.len(), chunks.len());
        for (packed, chunk) in pack.chunks.iter().zip(&chunks) {
            let frame = decode(&pack.bytes, packed.place).expect("a good frame");
            prop_assert!(frame.chunk(&row(packed)) == Ok(chunk.as_slice()));
        }
        let scanned = scan(&pack.bytes).expect("a good pack");
        prop_assert_eq!((scanned.store, scanned.id), (STORE, ID));
        let mut by_place = pack.chunks.clone();
        by_place.sort_by_key(|chunk| (chunk.place.frame, chunk.place.at, chunk.length));
        prop_assert_eq!(&scanned.chunks, &by_place);
        let shares: u64 = pack.chunks.iter().map(|chunk| u64::from(chunk.stored)).sum();
        prop_assert_eq!(shares, (pack.bytes.len() - HEADER_BYTES - TRAILER_BYTES) as u64);
    }

    #[test]
    fn a_changed_pack_gives_no_wrong_bytes(
        chunks in chunks(), at in any::<prop::sample::Index>(), flips in any::<[u8; 4]>(),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let pack = pack(&chunks);
        let mut bytes = pack.bytes.clone();
        let at = at.index(bytes.len());
        for (byte, flip) in bytes[at..].iter_mut().zip(flips) {
            *byte ^= flip;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        prop_assert!(bytes == pack.bytes || scan(&bytes).is_err());
        for (packed, chunk) in pack.chunks.iter().zip(&chunks) {
            if let Ok(frame) = decode(&bytes, packed.place)
                && let Ok(found) = frame.chunk(&row(packed))
            {
                prop_assert!(found == chunk.as_slice());
            }
        }
    }
}

proptest! {
    /// Headers that are nearly right reach further than garbage does.
    #[test]
    fn a_changed_frame_header_never_panics(
        word in 0usize..5, number in prop_oneof![0u32..40, any::<u32>(), 1u32 << 20..1 << 21],
        tail in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        let pack = pack(&[chunk(1, 1000, true), chunk(2, 500, false)]);
        let mut bytes = pack.bytes[HEADER_BYTES..].to_vec();
        bytes[word * 4..word * 4 + 4].copy_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&tail);
        let _ = frame_bytes(&bytes);
        if let Ok(frame) = Frame::decode(&bytes) {
            prop_assert!(frame.data == [chunk(1, 1000, true), chunk(2, 500, false)].concat());
        }
    }

    /// Whoever can write a pack can also write its hash.
    #[test]
    fn a_changed_pack_with_a_right_hash_never_panics(
        at in any::<prop::sample::Index>(), flips in any::<[u8; 4]>(),
    ) {
        let mut bytes = pack(&[chunk(1, 1000, true), chunk(2, 500, false)]).bytes;
        let body = bytes.len() - 32;
        let at = at.index(body - 4);
        bytes[at..at + 4].iter_mut().zip(flips).for_each(|(byte, flip)| *byte ^= flip);
        let hash = blake3::hash(&bytes[..body]);
        bytes[body..].copy_from_slice(hash.as_bytes());
        if let Ok(scanned) = scan(&bytes) {
            prop_assert!(scanned.chunks.len() <= bytes.len() / ENTRY_BYTES);
        }
    }

    #[test]
    fn garbage_is_no_pack(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(scan(&bytes).is_err());
        prop_assert!(Frame::decode(&bytes).is_err());
    }
}

#[test]
fn the_format_does_not_change() {
    let pack = pack(&[b"one".to_vec(), noise(7, 40_000), b"two".to_vec()]);
    let magic = [&pack.bytes[..4], &pack.bytes[32..36], &pack.bytes[pack.bytes.len() - 40..][..4]];
    assert_eq!(magic, [b"RVP1", b"RVPF", b"RVPE"]);
    // The big chunk has the first frame, as the small ones are still being collected.
    let places: Vec<_> = pack.chunks.iter().map(|c| (c.place.frame, c.place.at)).collect();
    assert_eq!(places, [(40_088, 0), (32, 0), (40_088, 3)]);
    assert_eq!(blake3::Hash::from(pack.hash).to_hex().as_str(), GOLDEN);
}

#[test]
fn a_journal_comes_back_between_the_chunks() {
    let parts = |id: u64| vec![(Some([id as u8; 16]), 7); 100];
    let record = |id| Record::Recipe { id: ContentId(id), first: 0, parts: parts(id) };
    let mut builder = PackBuilder::new(STORE, ID);
    // More than one frame of records, with chunks before and after.
    let chunks: Vec<Vec<u8>> = (0..3).map(|seed| noise(seed, 40_000)).collect();
    for (index, chunk) in chunks.iter().enumerate() {
        builder.add(*blake3::hash(chunk).as_bytes(), chunk);
        (0..200).for_each(|id| builder.note(&record(1000 * index as u64 + id)));
    }
    let pack = builder.finish();
    assert_eq!(pack.bytes[4], 3, "the version of packs with a journal");
    let scanned = scan(&pack.bytes).expect("a good pack");
    assert_eq!(scanned.chunks, pack.chunks);
    assert_eq!(scanned.records.len(), 600);
    assert_eq!(scanned.records[401], record(2001));
    for (packed, chunk) in pack.chunks.iter().zip(&chunks) {
        let frame = decode(&pack.bytes, packed.place).expect("a good frame");
        assert_eq!(frame.chunk(&row(packed)), Ok(chunk.as_slice()));
    }
    for at in (0..pack.bytes.len()).step_by(997) {
        let mut bytes = pack.bytes.clone();
        bytes[at] ^= 1;
        assert!(scan(&bytes).is_err(), "a flipped bit at {at}");
    }
}

#[test]
fn an_empty_pack_is_a_pack() {
    let builder = PackBuilder::new(STORE, ID);
    assert!(builder.is_empty() && !builder.is_full() && builder.decoded_bytes() == 0);
    assert!(scan(&builder.finish().bytes).is_ok_and(|scanned| scanned.chunks.is_empty()));
}

#[test]
fn a_pack_is_full_at_its_size() {
    let mut builder = PackBuilder::new(STORE, ID);
    let mut added = 0;
    while !builder.is_full() {
        let chunk = noise(added, 256 << 10);
        builder.add(*blake3::hash(&chunk).as_bytes(), &chunk);
        added += 1;
    }
    assert_eq!(builder.decoded_bytes(), added << 18);
    let pack = builder.finish();
    assert!((PACK_BYTES_FULL..PACK_BYTES_MAX).contains(&(pack.bytes.len() as u64)));
    assert_eq!(scan(&pack.bytes).map(|scanned| scanned.chunks.len()), Ok(added as usize));
}

#[test]
fn a_frame_takes_so_many_chunks_and_no_more() {
    let tiny: Vec<Vec<u8>> = (0..5000u32).map(|n| n.to_le_bytes().to_vec()).collect();
    let pack = pack(&tiny);
    let frames: std::collections::BTreeSet<_> = pack.chunks.iter().map(|c| c.place.frame).collect();
    assert_eq!(frames.len(), 2);
    assert_eq!(scan(&pack.bytes).expect("a good pack").chunks, pack.chunks);
}

/// A frame that claims to be short and decompresses to a lot.
#[test]
fn a_bomb_is_refused() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).expect("compresses");
    let mut bytes = FRAME_MAGIC.to_vec();
    for number in [CODEC_ZSTD, 1 << 20, bomb.len() as u32, 1] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&(1u32 << 20).to_le_bytes());
    bytes.extend_from_slice(blake3::hash(&vec![0; 1 << 20]).as_bytes());
    bytes.extend_from_slice(&bomb);
    assert_eq!(Frame::decode(&bytes).err(), Some(Flaw::Compression));
}

#[test]
fn versions_of_a_small_file_cost_little() {
    let mut text = include_bytes!("../chunker.rs")[..3072].to_vec();
    let mut builder = PackBuilder::new(STORE, ID);
    for version in 0..2000u64 {
        let random = noise(version, 12);
        let at = u16::from_le_bytes([random[0], random[1]]) as usize % (text.len() - 16);
        let edit = random[2..].iter().map(|byte| b'a' + byte % 26);
        text.splice(at..at + 8, edit);
        text.truncate(3072);
        builder.add(*blake3::hash(&text).as_bytes(), &text);
    }
    let raw = builder.decoded_bytes();
    let stored = builder.finish().bytes.len() as u64;
    println!(
        "2,000 versions: {raw} bytes in {stored} ({:.1} %)",
        100.0 * stored as f64 / raw as f64
    );
    assert!(stored * 100 < raw * 15, "{stored} of {raw} bytes");
}

/// BLAKE3 of the pack in [`the_format_does_not_change`], whose frames are not compressed.
const GOLDEN: &str = "e4f1a5108a5691a791f9a771d6dc338017ce32d478eb9351783535e023a061b2";

//! Where a content is cut into chunks.
//!
//! Cuts depend on the bytes around them alone, so an insertion changes the chunks near it and no
//! others, and versions of a file share the rest. The cut points are part of the format: another
//! algorithm or other sizes would read everything, but share nothing with what is stored already.
//! A content of at most 64 KiB is one chunk. A longer one is cut by FastCDC (v2020, normalization
//! level 1) into chunks of 16 to 256 KiB, 64 KiB on average. Streams of before-images, which are
//! made of blocks, are cut every 64 KiB.

use std::ops::Range;

use fastcdc::v2020::{FastCDC, Normalization};
use rustix::io::Errno;

use crate::error::Result;

/// A longer content is cut.
const WHOLE_BYTES_MAX: u64 = 64 << 10;
const CHUNK_BYTES_MIN: usize = 16 << 10;
const CHUNK_BYTES_AVERAGE: usize = 64 << 10;
/// The most bytes of one chunk.
pub const CHUNK_BYTES_MAX: usize = 256 << 10;
/// Bytes of a chunk of a stream of before-images.
const FIXED_BYTES: usize = 64 << 10;
/// The most bytes read by one call.
const STEP_BYTES: usize = 1 << 20;

/// How a content is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cutting {
    Whole,
    ByContent,
    Fixed,
}

impl Cutting {
    fn of_content(size: u64) -> Cutting {
        if size <= WHOLE_BYTES_MAX { Cutting::Whole } else { Cutting::ByContent }
    }

    /// Length of the chunk that `window` begins with. `window` is not empty and has
    /// [`CHUNK_BYTES_MAX`] bytes, or all that are left.
    fn first(self, window: &[u8]) -> usize {
        match self {
            Cutting::Whole => window.len(),
            Cutting::Fixed => window.len().min(FIXED_BYTES),
            Cutting::ByContent => {
                let level = Normalization::Level1;
                let (min, average) = (CHUNK_BYTES_MIN, CHUNK_BYTES_AVERAGE);
                FastCDC::with_level(window, min, average, CHUNK_BYTES_MAX, level)
                    .next()
                    .map_or(window.len(), |chunk| chunk.length)
            }
        }
    }
}

/// The chunks of a content that is in memory. None for an empty one.
pub fn cut(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    ranges(bytes, Cutting::of_content(bytes.len() as u64))
}

/// The chunks of a stream of before-images that is in memory: 64 KiB each but the last.
pub fn cut_fixed(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    ranges(bytes, Cutting::Fixed)
}

fn ranges(bytes: &[u8], cutting: Cutting) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let window = &bytes[at..bytes.len().min(at + CHUNK_BYTES_MAX)];
        if window.is_empty() {
            return None;
        }
        let start = at;
        at += cutting.first(window);
        Some(start..at)
    })
}

/// Cuts a content that is read in steps; at most about 1 MiB of it is in memory. Gives each chunk's
/// offset and bytes, at the same places as [`cut`] and [`cut_fixed`]. Ends after an error.
pub struct Chunker<R> {
    read: R,
    cutting: Cutting,
    /// Bytes of the content.
    size: u64,
    /// How many of them were given away.
    given: u64,
    /// Bytes that were read; those from `used` on are still to be given.
    buffer: Vec<u8>,
    used: usize,
}

impl<R: FnMut(u64, &mut [u8]) -> Result<usize>> Chunker<R> {
    /// Cuts a content of `size` bytes as [`cut`] does. `read` fills a buffer from an offset on and
    /// tells how many bytes it read; none before the end is `EIO`.
    pub fn new(size: u64, read: R) -> Chunker<R> {
        Chunker::with(Cutting::of_content(size), size, read)
    }

    /// Cuts a stream of before-images of `size` bytes as [`cut_fixed`] does.
    pub fn fixed(size: u64, read: R) -> Chunker<R> {
        Chunker::with(Cutting::Fixed, size, read)
    }

    fn with(cutting: Cutting, size: u64, read: R) -> Chunker<R> {
        Chunker { read, cutting, size, given: 0, buffer: Vec::new(), used: 0 }
    }

    /// Reads until the next chunk is certain to be in the buffer.
    fn fill(&mut self) -> Result<()> {
        let left = self.size - self.given;
        let wanted = left.min(CHUNK_BYTES_MAX as u64) as usize;
        if self.buffer.len() - self.used >= wanted {
            return Ok(());
        }
        self.buffer.drain(..self.used);
        self.used = 0;
        let mut filled = self.buffer.len();
        self.buffer.resize(left.min(STEP_BYTES as u64) as usize, 0);
        while filled < self.buffer.len() {
            let got = (self.read)(self.given + filled as u64, &mut self.buffer[filled..])?;
            if got == 0 {
                return Err(Errno::IO.into());
            }
            filled += got;
        }
        Ok(())
    }
}

impl<R: FnMut(u64, &mut [u8]) -> Result<usize>> Iterator for Chunker<R> {
    type Item = Result<(u64, Vec<u8>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.given >= self.size {
            return None;
        }
        if let Err(error) = self.fill() {
            self.given = self.size;
            return Some(Err(error));
        }
        let unused = &self.buffer[self.used..];
        let length = self.cutting.first(&unused[..unused.len().min(CHUNK_BYTES_MAX)]);
        let chunk = unused[..length].to_vec();
        let offset = self.given;
        self.used += length;
        self.given += length as u64;
        Some(Ok((offset, chunk)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::pack::tests::noise;
    use proptest::prelude::*;

    fn stream(bytes: &[u8], fixed: bool, step: usize) -> Vec<(u64, Vec<u8>)> {
        let read = |offset: u64, buffer: &mut [u8]| {
            let rest = &bytes[offset as usize..];
            let count = rest.len().min(buffer.len()).min(step);
            buffer[..count].copy_from_slice(&rest[..count]);
            Ok(count)
        };
        let size = bytes.len() as u64;
        let chunker = if fixed { Chunker::fixed(size, read) } else { Chunker::new(size, read) };
        chunker.collect::<Result<_>>().expect("reads never fail")
    }

    fn whole(bytes: &[u8], fixed: bool) -> Vec<(u64, Vec<u8>)> {
        let at = |range: Range<usize>| (range.start as u64, bytes[range].to_vec());
        if fixed { cut_fixed(bytes).map(at).collect() } else { cut(bytes).map(at).collect() }
    }

    #[test]
    fn the_cut_points_are_a_format() {
        let ends: Vec<usize> = cut(&noise(1, 1 << 20)).map(|range| range.end).collect();
        assert_eq!(ends, GOLDEN);
    }

    #[test]
    fn a_short_content_is_one_chunk() {
        assert_eq!(cut(&[]).count(), 0);
        assert!(cut(&noise(2, 1)).eq(std::iter::once(0..1)));
        assert!(cut(&noise(2, 65536)).eq(std::iter::once(0..65536)));
        assert!(cut(&noise(1, 262_144)).count() > 1);
    }

    #[test]
    fn an_insertion_changes_few_chunks() {
        let old = noise(3, 4 << 20);
        let mut new = old.clone();
        new.splice(1_000_000..1_000_000, *b"inserted");
        let known: std::collections::HashSet<_> = cut(&old).map(|range| &old[range]).collect();
        let fresh = cut(&new).filter(|range| !known.contains(&new[range.clone()])).count();
        assert!(fresh <= 3, "{fresh} new chunks");
    }

    #[test]
    fn a_read_that_falls_short_is_an_error_and_the_end() {
        let mut chunker = Chunker::new(300_000, |offset, buffer: &mut [u8]| {
            Ok(if offset < 100_000 { buffer.len().min(50_000) } else { 0 })
        });
        assert!(chunker.next().is_some_and(|chunk| chunk.is_err_and(|e| e.is(Errno::IO))));
        assert!(chunker.next().is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_stream_is_cut_as_the_whole(
            seed: u64, length in 0usize..3_000_000, step in 1000usize..400_000,
            fixed: bool, flat in 0usize..1_000_000,
        ) {
            let mut bytes = noise(seed, length);
            let from = length.saturating_sub(flat) / 2;
            bytes[from..(from + flat).min(length)].fill(7);
            let cut = whole(&bytes, fixed);
            prop_assert!(cut.iter().all(|(_, chunk)| chunk.len() <= CHUNK_BYTES_MAX));
            prop_assert_eq!(cut.iter().map(|(_, chunk)| chunk.len()).sum::<usize>(), length);
            prop_assert!(stream(&bytes, fixed, step) == cut);
        }
    }

    const GOLDEN: &[usize] = &[
        76660, 236593, 425069, 491972, 532537, 604528, 683707, 766197, 783617, 867728, 934206,
        1048576,
    ];
}

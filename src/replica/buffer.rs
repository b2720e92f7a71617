//! Bytes on their way to the replicas.

use std::ops::Deref;

use super::backing::BLOCK_BYTES;

/// Bytes to be written, in memory that nobody else can change meanwhile: mirrors that are written
/// from shared memory diverge.
#[derive(Clone, Debug)]
pub struct Buffer {
    memory: Vec<u8>,
    /// Where the bytes begin in it.
    start: usize,
}

impl Buffer {
    /// Room for so many bytes, which can go past a page cache as far as they are whole blocks. With
    /// more, or cloned, they are copied to where they cannot, and are still right.
    pub fn aligned(capacity: usize) -> Buffer {
        let mut memory: Vec<u8> = Vec::with_capacity(capacity + BLOCK_BYTES);
        let start = memory.as_ptr().align_offset(BLOCK_BYTES).min(BLOCK_BYTES);
        memory.resize(start, 0);
        Buffer { memory, start }
    }

    /// Adds bytes.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.memory.extend_from_slice(bytes);
    }

    /// Adds zeros until there are so many bytes.
    pub fn pad_to(&mut self, length: usize) {
        self.memory.resize(self.memory.len().max(self.start + length), 0);
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(memory: Vec<u8>) -> Buffer {
        Buffer { memory, start: 0 }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..]
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Buffer) -> bool {
        **self == **other
    }
}

impl Eq for Buffer {}

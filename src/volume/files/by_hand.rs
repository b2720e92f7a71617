//! What a backing's filesystem cannot do by itself, done by reading and writing.

use crate::history::ranges::ByteRange;
use crate::replica::backing::{Backing, Handle};

use super::FALLOCATE_DESTROYS;

/// Zeros are written in pieces of this size.
const STEP_BYTES: usize = 1 << 20;

/// Does what `fallocate` would, where the backing's filesystem cannot.
pub(super) fn emulate_fallocate(
    b: &dyn Backing,
    file: &Handle,
    mode: u32,
    range: ByteRange,
) -> std::io::Result<()> {
    let size = b.stat(file)?.size;
    let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE as u32 != 0;
    if mode & FALLOCATE_DESTROYS != 0 {
        let zeros = vec![0; STEP_BYTES];
        let mut at = range.start;
        let end = range.end.min(size);
        while at < end {
            let step = (end - at).min(zeros.len() as u64);
            b.write_at(file, &zeros[..step as usize], at)?;
            at += step;
        }
    }
    if !keep_size && range.end > size {
        b.truncate(file, range.end)?;
    }
    Ok(())
}

//! What a backing's filesystem cannot do by itself, done by reading and writing.

use crate::history::ranges::ByteRange;
use crate::replica::backing::{Backing, Handle};

use super::FALLOCATE_DESTROYS;

/// Zeros are written, and bytes copied, in pieces of this size.
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

/// Copies all of a range within one backing, by reading and writing where it must.
pub(super) fn copy_all(
    b: &dyn Backing,
    (from, from_offset): (&Handle, u64),
    (to, to_offset): (&Handle, u64),
    length: u64,
) -> std::io::Result<()> {
    let mut done = 0;
    while done < length {
        match b.copy_range(from, from_offset + done, to, to_offset + done, length - done) {
            Ok(0) => break,
            Ok(copied) => done += copied,
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EXDEV | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
                ) =>
            {
                break;
            }
            Err(error) => return Err(error),
        }
    }
    let mut buffer = vec![0; STEP_BYTES.min((length - done) as usize)];
    while done < length {
        let step = buffer.len().min((length - done) as usize);
        let got = b.read_at(from, &mut buffer[..step], from_offset + done)?;
        if got == 0 {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        b.write_at(to, &buffer[..got], to_offset + done)?;
        done += got as u64;
    }
    Ok(())
}

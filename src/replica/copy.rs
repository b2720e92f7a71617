//! Copying between two files of one backing.

use super::backing::{Backing, Handle};

/// Bytes are copied by hand in pieces of this size.
const STEP_BYTES: usize = 1 << 20;

/// Copies all of a range within one backing, by reading and writing where it must.
pub fn copy_all(
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

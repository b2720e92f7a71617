//! Extended attributes through a handle's magic link, tolerant of change between two calls.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;

use rustix::buffer::spare_capacity;
use rustix::fs::XattrFlags;
use rustix::io::{Errno, retry_on_intr};

use crate::types::Xattrs;

/// The first guess of a value's or list's size: most fit, and need one call then.
const FIRST_BYTES: usize = 512;
/// No value and no list is longer (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const BYTES_MAX: usize = 64 * 1024;
/// The names of our own bookkeeping, which is no attribute of the file.
const OWN_PREFIX: &[u8] = b"trusted.rearview.";

/// Calls `fill` with ever larger buffers until the answer fits.
fn grow(mut fill: impl FnMut(&mut Vec<u8>) -> rustix::io::Result<usize>) -> io::Result<Vec<u8>> {
    let mut capacity = FIRST_BYTES;
    loop {
        let mut buffer = Vec::with_capacity(capacity);
        match fill(&mut buffer) {
            Ok(_) => return Ok(buffer),
            Err(Errno::INTR) => {}
            Err(Errno::RANGE) if capacity < BYTES_MAX => capacity = BYTES_MAX.min(capacity * 8),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// One value.
pub(super) fn get(path: &[u8], name: &OsStr) -> io::Result<Vec<u8>> {
    grow(|buffer| rustix::fs::getxattr(path, name, spare_capacity(buffer)))
}

/// Sets one.
pub(super) fn set(path: &[u8], name: &OsStr, value: &[u8], flags: i32) -> io::Result<()> {
    let flags = XattrFlags::from_bits_retain(flags as u32);
    Ok(retry_on_intr(|| rustix::fs::setxattr(path, name, value, flags))?)
}

/// Removes one.
pub(super) fn remove(path: &[u8], name: &OsStr) -> io::Result<()> {
    Ok(retry_on_intr(|| rustix::fs::removexattr(path, name))?)
}

/// All but our own. One that is removed between the listing and the reading is left out.
pub(super) fn all(path: &[u8]) -> io::Result<Xattrs> {
    let list = match grow(|buffer| rustix::fs::listxattr(path, spare_capacity(buffer))) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            return Ok(Xattrs::default());
        }
        other => other?,
    };
    let mut found = Xattrs::default();
    let names = list.split(|&byte| byte == 0);
    for name in names.filter(|name| !name.is_empty() && !name.starts_with(OWN_PREFIX)) {
        match get(path, OsStr::from_bytes(name)) {
            Ok(value) => {
                found.0.insert(name.to_vec(), value);
            }
            Err(error) if error.raw_os_error() == Some(libc::ENODATA) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

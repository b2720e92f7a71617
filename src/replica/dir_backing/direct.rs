//! Files that are written to past the page cache, and those that cannot be.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::OFlags;

/// Whether that is how a filesystem says that it cannot.
pub(super) fn is_invalid(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS))
}

/// Has the page cache in between again; `false` if it was.
pub(super) fn give_up(file: BorrowedFd<'_>) -> io::Result<bool> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    if !flags.contains(OFlags::DIRECT) {
        return Ok(false);
    }
    rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT)?;
    Ok(true)
}

//! A part of a directory's listing, without the attributes of each entry or with them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use fuser::{Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::convert::{attr, dot, file_type, ttl};
use crate::error::Result;
use crate::fs::{Fh, Filesystem, Found, Line};

/// Entries that are looked up at once. An answer of 32 KiB holds some 190: those of the last ones
/// that do not fit were looked up in vain.
const PLUS_BATCH: usize = 64;

/// `.` and `..`, with which every listing begins: the kernel takes no attributes of them.
const DOTS: usize = 2;

/// Adds the lines of a directory from `offset` on. `add` adds one, after which the kernel goes on
/// at that number, and tells whether the answer was full before.
pub(super) fn list(
    fs: &Filesystem,
    ino: u64,
    fh: Fh,
    offset: usize,
    mut add: impl FnMut(&Line, u64) -> bool,
) -> Result<()> {
    let lines = fs.list(ino, fh, offset == 0)?;
    let most = fs.lines_max(fh, offset);
    if offset >= lines.len() {
        fs.listing_ended(ino);
    }
    for (index, line) in lines.iter().enumerate().skip(offset).take(most) {
        if add(line, index as u64 + 1) {
            break;
        }
    }
    Ok(())
}

/// Adds the entries of a directory from `offset` on. The kernel begins every listing with such a
/// request: for a thread that has no use for the attributes it is answered with the first two
/// lines, and the kernel asks for the others without. `add` is as for [`list`], and has attributes
/// but for `.` and `..`.
pub(super) fn list_plus(
    fs: &Filesystem,
    ino: u64,
    fh: Fh,
    offset: usize,
    mut add: impl FnMut(&Line, Option<&Found>, u64) -> bool,
) -> Result<()> {
    let lines = fs.list(ino, fh, offset == 0)?;
    let all = offset > 0 || fs.begins_with_attributes(ino, fh).unwrap_or(true);
    let end = if all { lines.len() } else { DOTS.min(lines.len()) };
    let mut next = offset as u64;
    for part in lines[offset.min(end)..end].chunks(PLUS_BATCH) {
        let found = match fs.listed(ino, part) {
            Ok(found) => found,
            Err(error) if next == offset as u64 => return Err(error),
            // What was found before is told; the next request meets the error.
            Err(_) => break,
        };
        let mut full = false;
        for (line, found) in part.iter().zip(found) {
            next += 1;
            // One that was removed since the listing began is passed over.
            let is_there = found.is_some() || line.is_dot();
            full = full || is_there && add(line, found.as_ref(), next);
            if let (true, Some(found)) = (full, found) {
                // The kernel never saw it, so it will not forget it either.
                fs.forget(found.stat.ino, 1);
            }
        }
        if full {
            break;
        }
    }
    Ok(())
}

/// Adds a line to an answer of the library's; whether it was full before.
pub(super) fn add_line(reply: &mut ReplyDirectory, line: &Line, next: u64) -> bool {
    let name = OsStr::from_bytes(&line.name);
    reply.add(INodeNo(line.ino), next, file_type(line.kind), name)
}

/// The same with attributes.
pub(super) fn add_line_plus(
    reply: &mut ReplyDirectoryPlus,
    line: &Line,
    found: Option<&Found>,
    next: u64,
) -> bool {
    let (ino, incarnation, valid, attr) = match found {
        Some(found) => (found.stat.ino, found.incarnation, ttl(found.keep), attr(&found.stat)),
        None => (line.ino, 0, Duration::ZERO, dot(line)),
    };
    let (ino, name) = (INodeNo(ino), OsStr::from_bytes(&line.name));
    reply.add(ino, next, name, &valid, &attr, Generation(incarnation))
}

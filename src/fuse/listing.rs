//! A part of a directory's listing, without the attributes of each entry or with them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use fuser::{Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use super::convert::{attr, dot, file_type, ttl};
use super::wire::Out;
use crate::error::Result;
use crate::fs::{Fh, Filesystem, Found, Line};

/// Entries that are looked up at once. An answer of 32 KiB holds some 190: those of the last ones
/// that do not fit were looked up in vain.
const PLUS_BATCH: usize = 64;

/// `.` and `..`, with which every listing begins: the kernel takes no attributes of them.
const DOTS: usize = 2;

/// An answer that lines are added to until one does not fit.
pub(super) trait Lines {
    /// Adds a line, after which the kernel goes on at `next`; whether it was full before.
    fn add(&mut self, line: &Line, next: u64) -> bool;
}

/// The same with attributes; `.` and `..` have none.
pub(super) trait LinesPlus {
    /// Adds a line, after which the kernel goes on at `next`; whether it was full before.
    fn add(&mut self, line: &Line, found: Option<&Found>, next: u64) -> bool;
}

/// Adds the lines of a directory from `offset` on.
pub(super) fn list(
    fs: &Filesystem,
    ino: u64,
    fh: Fh,
    offset: usize,
    answer: &mut impl Lines,
) -> Result<()> {
    let lines = fs.list(ino, fh, offset == 0)?;
    let most = fs.lines_max(fh, offset);
    if offset >= lines.len() {
        fs.listing_ended(ino);
    }
    for (index, line) in lines.iter().enumerate().skip(offset).take(most) {
        if answer.add(line, index as u64 + 1) {
            break;
        }
    }
    Ok(())
}

/// Adds the entries of a directory from `offset` on. The kernel begins every listing with such a
/// request: for a thread that has no use for the attributes it is answered with the first two
/// lines, and the kernel asks for the others without.
pub(super) fn list_plus(
    fs: &Filesystem,
    ino: u64,
    fh: Fh,
    offset: usize,
    answer: &mut impl LinesPlus,
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
            full = full || is_there && answer.add(line, found.as_ref(), next);
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

impl Lines for ReplyDirectory {
    fn add(&mut self, line: &Line, next: u64) -> bool {
        let name = OsStr::from_bytes(&line.name);
        ReplyDirectory::add(self, INodeNo(line.ino), next, file_type(line.kind), name)
    }
}

impl LinesPlus for ReplyDirectoryPlus {
    fn add(&mut self, line: &Line, found: Option<&Found>, next: u64) -> bool {
        let (ino, incarnation, valid, attr) = match found {
            Some(found) => (found.stat.ino, found.incarnation, ttl(found.keep), attr(&found.stat)),
            None => (line.ino, 0, Duration::ZERO, dot(line)),
        };
        let (ino, name) = (INodeNo(ino), OsStr::from_bytes(&line.name));
        ReplyDirectoryPlus::add(self, ino, next, name, &valid, &attr, Generation(incarnation))
    }
}

impl Lines for Out<'_> {
    fn add(&mut self, line: &Line, next: u64) -> bool {
        self.line(line, next)
    }
}

impl LinesPlus for Out<'_> {
    fn add(&mut self, line: &Line, found: Option<&Found>, next: u64) -> bool {
        self.line_plus(line, found, next)
    }
}

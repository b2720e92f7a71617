//! A part of a directory's listing with the attributes of each entry.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use fuser::{Generation, INodeNo, ReplyDirectoryPlus};

use super::convert::{attr, dot, errno, ttl};
use crate::fs::{Fh, Filesystem, Found, Line};

/// Entries that are looked up at once. An answer of 32 KiB holds some 190: those of the last ones
/// that do not fit were looked up in vain.
const PLUS_BATCH: usize = 64;

/// `.` and `..`, with which every listing begins: the kernel takes no attributes of them.
const DOTS: usize = 2;

/// Answers with the entries of a directory from `offset` on. The kernel begins every
/// listing with such a request: for a thread that has no use for the attributes it is answered with
/// the first two lines, and the kernel asks for the others without.
pub(super) fn list_plus(
    fs: &Filesystem,
    ino: INodeNo,
    fh: Fh,
    offset: usize,
    mut reply: ReplyDirectoryPlus,
) {
    let lines = match fs.list(ino.0, fh, offset == 0) {
        Ok(lines) => lines,
        Err(error) => return reply.error(errno(&error)),
    };
    let all = offset > 0 || fs.begins_with_attributes(ino.0, fh).unwrap_or(true);
    let end = if all { lines.len() } else { DOTS.min(lines.len()) };
    let mut next = offset as u64;
    for part in lines[offset.min(end)..end].chunks(PLUS_BATCH) {
        let found = match fs.listed(ino.0, part) {
            Ok(found) => found,
            Err(error) if next == offset as u64 => return reply.error(errno(&error)),
            // What was found before is told; the next request meets the error.
            Err(_) => break,
        };
        let mut full = false;
        for (line, found) in part.iter().zip(found) {
            next += 1;
            full = full || add(line, found.as_ref(), next, &mut reply);
            if let (true, Some(found)) = (full, found) {
                // The kernel never saw it, so it will not forget it either.
                fs.forget(found.stat.ino, 1);
            }
        }
        if full {
            break;
        }
    }
    reply.ok();
}

/// Adds an entry; whether the answer was full before. One that was removed since the listing began
/// is passed over.
fn add(line: &Line, found: Option<&Found>, next: u64, reply: &mut ReplyDirectoryPlus) -> bool {
    let name = OsStr::from_bytes(&line.name);
    match found {
        Some(found) => {
            let (ino, incarnation) = (INodeNo(found.stat.ino), Generation(found.incarnation));
            reply.add(ino, next, name, &ttl(found.keep), &attr(&found.stat), incarnation)
        }
        None if line.is_dot() => {
            let none = Duration::ZERO;
            reply.add(INodeNo(line.ino), next, name, &none, &dot(line), Generation(0))
        }
        None => false,
    }
}

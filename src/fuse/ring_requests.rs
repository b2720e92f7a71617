//! Requests that come over a ring, one call each on [`Filesystem`]: the twin of the library's
//! trait, in the kernel's own words.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;

use super::convert::{
    XattrAnswer, absence, handle_flags, listing_flags, names_of, rename_mode, seek_to, xattr_answer,
};
use super::listing::{list, list_plus};
use super::wire::{Head, Out, Texts, Words, changes};
use crate::error::{Error, Result};
use crate::fs::{Fh, Filesystem, Found, Wish, Writing};
use crate::past::Past;
use crate::sys::fuse_ring::Slot;
use crate::types::Kind;
use crate::volume::Newborn;

/// `enum fuse_opcode`.
mod op {
    pub const LOOKUP: u32 = 1;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
}

/// `FUSE_WRITE_KILL_SUIDGID`.
const WRITE_STRIPS: u32 = 1 << 2;
/// `FUSE_FSYNC_FDATASYNC`.
const DATA_ONLY: u32 = 1;

/// Whether a request changes the names of snapshots, and may wait for others of the kernel's
/// ([`guarded_at`](super::session::guarded_at)).
pub(super) fn is_long(slot: &Slot<'_>) -> bool {
    let head = Head::read(slot.head);
    let makes_or_ends = matches!(head.opcode, op::MKDIR | op::RMDIR | op::RENAME | op::RENAME2);
    makes_or_ends && Past::owns(head.ino)
}

/// Serves one request; the bytes of its answer's data. What we do not know is answered with
/// `ENOSYS`, after which the kernel does without.
pub(super) fn serve(fs: &Filesystem, slot: &mut Slot<'_>) -> Result<usize> {
    let head = Head::read(slot.head);
    let (ino, by) = (head.ino, head.caller(0));
    let mut words = Words::of(slot);
    let mut texts = Texts::of(slot);
    let done = match head.opcode {
        op::LOOKUP => {
            let found = texts.name().and_then(|name| fs.lookup(ino, &name));
            match (found, absence(ino)) {
                (Ok(found), _) => {
                    fs.looked_up(ino, &found);
                    return entry(slot, &found);
                }
                (Err(error), Some(keep)) if error.is(Errno::NOENT) => {
                    return Ok(Out::new(slot).absence(keep).bytes());
                }
                (Err(error), _) => return Err(error),
            }
        }
        op::GETATTR => return Ok(Out::new(slot).attributes(&fs.stat(ino)?).bytes()),
        op::SETATTR => {
            let found = fs.set_attributes(ino, &changes(words), &by)?;
            return Ok(Out::new(slot).attributes(&found).bytes());
        }
        op::READLINK => return data(slot, &fs.readlink(ino)?),
        op::SYMLINK => {
            let name = texts.name()?;
            let what = Newborn::Symlink(texts.text()?);
            let found = fs.make(ino, &name, &what, 0o777, &by)?;
            return entry(slot, &found);
        }
        op::MKNOD => {
            let (mode, rdev, umask) = (words.u32(), words.u32(), words.u32());
            let kind = Kind::from_mode(mode).unwrap_or(Kind::File);
            let what = Newborn::Special(kind, u64::from(rdev));
            let found = fs.make(ino, &texts.name()?, &what, mode, &head.caller(umask))?;
            return entry(slot, &found);
        }
        op::MKDIR => {
            let (mode, umask) = (words.u32(), words.u32());
            let by = head.caller(umask);
            let found = fs.make(ino, &texts.name()?, &Newborn::Dir, mode, &by)?;
            return entry(slot, &found);
        }
        op::CREATE => {
            let (flags, mode, umask) = (words.u32() as i32, words.u32(), words.u32());
            let wish = Wish::from_flags(flags);
            let by = head.caller(umask);
            let (found, fh) = fs.create(ino, &texts.name()?, mode, wish, &by)?;
            let flags = handle_flags(fs, fh, true).bits();
            return Ok(Out::new(slot).entry(&found).opened(fh.0, flags).bytes());
        }
        op::LINK => {
            let found = fs.link(words.u64(), ino, &texts.name()?, &by)?;
            return entry(slot, &found);
        }
        op::UNLINK => fs.unlink(ino, &texts.name()?, &by),
        op::RMDIR => fs.rmdir(ino, &texts.name()?, &by),
        op::RENAME | op::RENAME2 => {
            let to_dir = words.u64();
            let flags = if head.opcode == op::RENAME2 { words.u32() } else { 0 };
            let (mode, from, to) = (rename_mode(flags)?, texts.name()?, texts.name()?);
            fs.rename(ino, &from, to_dir, &to, mode, &by)
        }
        op::OPEN => {
            let wish = Wish::from_flags(words.u32() as i32);
            let fh = fs.open(ino, wish, &by)?;
            let flags = handle_flags(fs, fh, wish.writable).bits();
            return Ok(Out::new(slot).opened(fh.0, flags).bytes());
        }
        op::READ => {
            let (fh, offset, size) = (Fh(words.u64()), words.u64(), words.u32() as usize);
            let buffer = slot.payload.get_mut(..size).ok_or(Error::Posix(Errno::INVAL))?;
            return fs.read(ino, fh, offset, buffer);
        }
        op::WRITE => {
            let (fh, offset, size) = (Fh(words.u64()), words.u64(), words.u32());
            let (write_flags, _lock_owner) = (words.u32(), words.u64());
            let how = Writing::from_flags(write_flags & WRITE_STRIPS != 0, words.u32() as i32);
            fs.write(fh, offset, texts.bytes(size)?, how, &by)?;
            return Ok(Out::new(slot).count(size).bytes());
        }
        op::FLUSH => fs.flush(Fh(words.u64())),
        op::RELEASE => fs.release(Fh(words.u64())),
        op::FSYNC => fs.fsync(Fh(words.u64()), words.u32() & DATA_ONLY != 0),
        op::OPENDIR => {
            let fh = fs.open_dir(head.pid, ino);
            let flags = listing_flags(fs, ino, fh).bits();
            return Ok(Out::new(slot).opened(fh.0, flags).bytes());
        }
        op::READDIR | op::READDIRPLUS => {
            let (fh, offset, size) = (Fh(words.u64()), words.u64(), words.u32() as usize);
            let mut out = Out::within(slot, size);
            let from = offset as usize;
            match head.opcode {
                op::READDIR => list(fs, ino, fh, from, |line, next| out.line(line, next))?,
                _ => list_plus(fs, ino, fh, from, |line, found, next| {
                    out.line_plus(line, found, next)
                })?,
            }
            return Ok(out.bytes());
        }
        op::RELEASEDIR => {
            fs.release_dir(Fh(words.u64()));
            Ok(())
        }
        op::FSYNCDIR => fs.fsync_dir(ino),
        op::STATFS => return Ok(Out::new(slot).space(&fs.space()?).bytes()),
        op::SETXATTR => {
            let (size, flags) = (words.u32(), words.u32() as i32);
            let name = OsStr::from_bytes(texts.text()?);
            fs.set_xattr(ino, name, texts.bytes(size)?, flags, &by)
        }
        op::GETXATTR => {
            let value = fs.xattr(ino, OsStr::from_bytes(texts.text()?));
            let size = words.u32();
            return xattr(slot, size, value?);
        }
        op::LISTXATTR => {
            let size = words.u32();
            return xattr(slot, size, names_of(fs.xattrs(ino)?.as_ref()));
        }
        op::REMOVEXATTR => fs.remove_xattr(ino, OsStr::from_bytes(texts.text()?), &by),
        op::FALLOCATE => {
            let (fh, offset, length) = (Fh(words.u64()), words.u64(), words.u64());
            fs.fallocate(fh, words.u32(), offset, length, &by)
        }
        op::LSEEK => {
            let (fh, offset, whence) = (Fh(words.u64()), words.u64(), words.u32());
            let (to, offset) = seek_to(whence as i32, offset as i64)?;
            let found = fs.seek(ino, fh, offset, to)?;
            return Ok(Out::new(slot).offset(found).bytes());
        }
        op::COPY_FILE_RANGE => {
            let from = (Fh(words.u64()), words.u64());
            let _to_ino = words.u64();
            let (to, length) = ((Fh(words.u64()), words.u64()), words.u64());
            let copied = fs.copy_range(from, to, length, &by)?;
            return Ok(Out::new(slot).count(copied as u32).bytes());
        }
        _ => Err(Error::Posix(Errno::NOSYS)),
    };
    done.map(|()| 0)
}

fn entry(slot: &mut Slot<'_>, found: &Found) -> Result<usize> {
    Ok(Out::new(slot).entry(found).bytes())
}

fn data(slot: &mut Slot<'_>, data: &[u8]) -> Result<usize> {
    Ok(Out::new(slot).put(data).bytes())
}

fn xattr(slot: &mut Slot<'_>, size: u32, value: Vec<u8>) -> Result<usize> {
    match xattr_answer(size, value)? {
        XattrAnswer::Size(size) => Ok(Out::new(slot).count(size).bytes()),
        XattrAnswer::Value(value) => data(slot, &value),
    }
}

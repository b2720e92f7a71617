//! The kernel's words for requests and answers, for those that come over a ring: the library reads
//! its own only (`include/uapi/linux/fuse.h`; all numbers are the machine's).

use std::time::Duration;

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::fs::{Found, Keep, Line};
use crate::replica::backing::{SetTime, Space, Stat};
use crate::sys::fuse_ring::Slot;
use crate::types::{EntryName, Kind, Timestamp};
use crate::volume::{Caller, Changes};

use super::convert::{caller_of, ttl};

/// What `struct fuse_in_header` says.
#[derive(Clone, Copy)]
pub(super) struct Head {
    pub opcode: u32,
    pub ino: u64,
    uid: u32,
    gid: u32,
    pub pid: u32,
}

impl Head {
    pub(super) fn read(bytes: &[u8]) -> Head {
        let mut words = Words(bytes);
        let (_len, opcode, _unique) = (words.u32(), words.u32(), words.u64());
        Head { opcode, ino: words.u64(), uid: words.u32(), gid: words.u32(), pid: words.u32() }
    }

    /// Who asks.
    pub(super) fn caller(&self, umask: u32) -> Caller {
        caller_of((self.uid, self.gid), self.pid, umask)
    }
}

/// A structure of the kernel's, read from its beginning.
pub(super) struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    pub(super) fn of(slot: &'a Slot<'_>) -> Words<'a> {
        Words(slot.operation)
    }

    pub(super) fn u32(&mut self) -> u32 {
        self.take().map_or(0, u32::from_ne_bytes)
    }

    pub(super) fn u64(&mut self) -> u64 {
        self.take().map_or(0, u64::from_ne_bytes)
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*word)
    }
}

/// Names and data that came with a request, one after the other.
pub(super) struct Texts<'a>(&'a [u8]);

impl<'a> Texts<'a> {
    pub(super) fn of(slot: &'a Slot<'_>) -> Texts<'a> {
        Texts(&slot.payload[..slot.received])
    }

    /// Up to the next zero.
    pub(super) fn text(&mut self) -> Result<&'a [u8]> {
        let end = self.0.iter().position(|&byte| byte == 0).ok_or(Error::Posix(Errno::INVAL))?;
        let (text, rest) = self.0.split_at(end);
        self.0 = &rest[1..];
        Ok(text)
    }

    /// A name.
    pub(super) fn name(&mut self) -> Result<EntryName> {
        Ok(EntryName::new(self.text()?)?)
    }

    /// So many bytes.
    pub(super) fn bytes(&self, count: u32) -> Result<&'a [u8]> {
        self.0.get(..count as usize).ok_or(Error::Posix(Errno::INVAL))
    }
}

/// `struct fuse_setattr_in`.
pub(super) fn changes(mut words: Words<'_>) -> Changes {
    let (valid, _padding, _fh) = (words.u32(), words.u32(), words.u64());
    let (size, _lock_owner) = (words.u64(), words.u64());
    let (atime, mtime, _ctime) = (words.u64(), words.u64(), words.u64());
    let (atime_nanos, mtime_nanos, _ctime_nanos) = (words.u32(), words.u32(), words.u32());
    let (mode, _unused, uid, gid) = (words.u32(), words.u32(), words.u32(), words.u32());
    let has = |bit: u32| valid & 1 << bit != 0;
    let time = |bit: u32, now: u32, secs: u64, nanos: u32| {
        let to = SetTime::To(Timestamp { secs: secs as i64, nanos });
        has(bit).then_some(if has(now) { SetTime::Now } else { to })
    };
    Changes {
        mode: has(0).then_some(mode),
        uid: has(1).then_some(uid),
        gid: has(2).then_some(gid),
        size: has(3).then_some(size),
        atime: time(4, 7, atime, atime_nanos),
        mtime: time(5, 8, mtime, mtime_nanos),
    }
}

/// An answer's data, as it grows.
pub(super) struct Out<'a> {
    to: &'a mut [u8],
    bytes: usize,
}

impl<'a> Out<'a> {
    /// Into the first `most` bytes of a slot's payload.
    pub(super) fn within(slot: &'a mut Slot<'_>, most: usize) -> Out<'a> {
        let most = most.min(slot.payload.len());
        Out { to: &mut slot.payload[..most], bytes: 0 }
    }

    pub(super) fn new(slot: &'a mut Slot<'_>) -> Out<'a> {
        Out { to: slot.payload, bytes: 0 }
    }

    /// How long it is.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn put(mut self, bytes: &[u8]) -> Self {
        self.push(bytes);
        self
    }

    fn push(&mut self, bytes: &[u8]) {
        self.to[self.bytes..][..bytes.len()].copy_from_slice(bytes);
        self.bytes += bytes.len();
    }

    fn push_u32(&mut self, words: &[u32]) {
        words.iter().for_each(|word| self.push(&word.to_ne_bytes()));
    }

    fn push_u64(&mut self, words: &[u64]) {
        words.iter().for_each(|word| self.push(&word.to_ne_bytes()));
    }

    /// A number and its padding: `struct fuse_write_out`, `fuse_getxattr_out`.
    pub(super) fn count(mut self, count: u32) -> Self {
        self.push_u32(&[count, 0]);
        self
    }

    /// `struct fuse_lseek_out`.
    pub(super) fn offset(mut self, offset: u64) -> Self {
        self.push_u64(&[offset]);
        self
    }

    /// `struct fuse_open_out`.
    pub(super) fn opened(mut self, fh: u64, flags: u32) -> Self {
        self.push_u64(&[fh]);
        self.push_u32(&[flags, 0]);
        self
    }

    /// `struct fuse_attr_out`.
    pub(super) fn attributes(mut self, found: &Found) -> Self {
        let valid = ttl(found.keep);
        self.push_u64(&[valid.as_secs()]);
        self.push_u32(&[valid.subsec_nanos(), 0]);
        self.push_stat(&found.stat);
        self
    }

    /// `struct fuse_entry_out`.
    pub(super) fn entry(mut self, found: &Found) -> Self {
        self.push_entry(found.stat.ino, found.incarnation, ttl(found.keep), Some(&found.stat));
        self
    }

    /// That there is no such name, for the kernel to keep.
    pub(super) fn absence(mut self, keep: Keep) -> Self {
        self.push_entry(0, 0, ttl(keep), None);
        self
    }

    fn push_entry(&mut self, ino: u64, incarnation: u64, valid: Duration, stat: Option<&Stat>) {
        self.push_u64(&[ino, incarnation, valid.as_secs(), valid.as_secs()]);
        self.push_u32(&[valid.subsec_nanos(), valid.subsec_nanos()]);
        match stat {
            Some(stat) => self.push_stat(stat),
            None => self.push(&[0; ATTR_BYTES]),
        }
    }

    /// `struct fuse_attr`.
    fn push_stat(&mut self, stat: &Stat) {
        let (atime, mtime, ctime) = (stat.atime, stat.mtime, stat.ctime);
        self.push_u64(&[stat.ino, stat.size, stat.blocks]);
        self.push_u64(&[atime.secs as u64, mtime.secs as u64, ctime.secs as u64]);
        self.push_u32(&[atime.nanos, mtime.nanos, ctime.nanos]);
        self.push_u32(&[stat.kind.mode_bits() | stat.mode & 0o7777, stat.nlink]);
        // The kernel's encoding of a device equals the low 32 bits of makedev's.
        self.push_u32(&[stat.uid, stat.gid, stat.rdev as u32, 4096, 0]);
    }

    /// `struct fuse_statfs_out`.
    pub(super) fn space(mut self, space: &Space) -> Self {
        self.push_u64(&[space.blocks, space.free, space.available]);
        self.push_u64(&[space.files, space.files_free]);
        let (block, name) = (space.block_bytes as u32, crate::types::NAME_BYTES_MAX as u32);
        self.push_u32(&[block, name, block, 0]);
        self.push_u32(&[0; 6]);
        self
    }

    /// `struct fuse_dirent`; whether the answer was full before.
    pub(super) fn line(&mut self, line: &Line, next: u64) -> bool {
        self.named(&line.name, line.ino, line.kind, next)
    }

    fn named(&mut self, name: &[u8], ino: u64, kind: Kind, next: u64) -> bool {
        let padding = name.len().next_multiple_of(8) - name.len();
        let is_full = self.bytes + DIRENT_BYTES + name.len() + padding > self.to.len();
        if !is_full {
            self.push_u64(&[ino, next]);
            self.push_u32(&[name.len() as u32, kind.mode_bits() >> 12]);
            self.push(name);
            self.push(&[0; 8][..padding]);
        }
        is_full
    }

    /// `struct fuse_direntplus`; whether the answer was full before. Of `.` and `..` the kernel
    /// takes no attributes; what else is there may be another than the line says by now.
    pub(super) fn line_plus(&mut self, line: &Line, found: Option<&Found>, next: u64) -> bool {
        let before = self.bytes;
        if self.bytes + ENTRY_BYTES > self.to.len() {
            return true;
        }
        let (ino, kind) = found.map_or((line.ino, line.kind), |it| (it.stat.ino, it.stat.kind));
        match found {
            Some(Found { stat, keep, incarnation }) => {
                self.push_entry(stat.ino, *incarnation, ttl(*keep), Some(stat));
            }
            None => self.push_entry(0, 0, Duration::ZERO, None),
        }
        let is_full = self.named(&line.name, ino, kind, next);
        if is_full {
            self.bytes = before;
        }
        is_full
    }
}

/// `struct fuse_attr`.
const ATTR_BYTES: usize = 88;
/// `struct fuse_entry_out`.
const ENTRY_BYTES: usize = 40 + ATTR_BYTES;
/// `struct fuse_dirent` without its name.
const DIRENT_BYTES: usize = 24;

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls `work` with a slot that has these bytes of an operation and of a payload.
    fn with_slot<T>(operation: &[u8], payload: &[u8], work: impl FnOnce(&mut Slot<'_>) -> T) -> T {
        let (head, mut fixed, mut room) = ([0; 128], [0; 128], vec![0; 4096]);
        fixed[..operation.len()].copy_from_slice(operation);
        room[..payload.len()].copy_from_slice(payload);
        let (payload, received) = (room.as_mut_slice(), payload.len());
        work(&mut Slot { head: &head, operation: &fixed, payload, received })
    }

    fn found() -> Found {
        let time = Timestamp { secs: -1, nanos: 5 };
        let stat = Stat {
            kind: Kind::Dir,
            mode: 0o1755,
            uid: 1,
            gid: 2,
            rdev: 0,
            nlink: 3,
            size: 4,
            blocks: 5,
            ino: 6,
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
        };
        Found { stat, keep: Keep::WhileMounted, incarnation: 7 }
    }

    /// The kernel refuses an answer of another length than its structure has.
    #[test]
    fn answers_are_as_long_as_the_kernels_structures() {
        let lengths = with_slot(&[], &[], |slot| {
            let space =
                Space { block_bytes: 1, blocks: 2, free: 3, available: 4, files: 5, files_free: 6 };
            [
                Out::new(slot).entry(&found()).bytes(),
                Out::new(slot).absence(Keep::Always).bytes(),
                Out::new(slot).attributes(&found()).bytes(),
                Out::new(slot).opened(1, 2).bytes(),
                Out::new(slot).entry(&found()).opened(1, 2).bytes(),
                Out::new(slot).count(1).bytes(),
                Out::new(slot).offset(1).bytes(),
                Out::new(slot).space(&space).bytes(),
            ]
        });
        assert_eq!(lengths, [128, 128, 104, 16, 144, 8, 8, 80]);
    }

    #[test]
    fn attributes_are_where_the_kernel_looks_for_them() {
        let bytes = with_slot(&[], &[], |slot| {
            let length = Out::new(slot).attributes(&found()).bytes();
            slot.payload[..length].to_vec()
        });
        let u64_at = |at: usize| u64::from_ne_bytes(bytes[at..][..8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_ne_bytes(bytes[at..][..4].try_into().unwrap());
        assert_eq!((u64_at(16), u64_at(24), u64_at(32)), (6, 4, 5));
        assert_eq!((u64_at(48) as i64, u32_at(68)), (-1, 5));
        assert_eq!(u32_at(76), libc::S_IFDIR | 0o1755);
        assert_eq!([80, 84, 88].map(u32_at), [3, 1, 2]);
    }

    /// Lines that do not fit whole are left for the next request.
    #[test]
    fn a_full_listing_takes_no_part_of_a_line() {
        let line = Line { name: b"123456789".to_vec(), ino: 1, kind: Kind::File };
        with_slot(&[], &[], |slot| {
            // A line is 24 bytes and its name, up to a multiple of 8.
            let mut out = Out::within(slot, 2 * 40 + 39);
            let full = [1, 2, 3].map(|next| out.line(&line, next));
            assert_eq!((full, out.bytes()), ([false, false, true], 80));
            let mut out = Out::within(slot, 2 * 168 - 1);
            let full = [1, 2].map(|next| out.line_plus(&line, Some(&found()), next));
            assert_eq!((full, out.bytes()), ([false, true], 168));
        });
    }

    #[test]
    fn names_and_data_come_one_after_another() {
        with_slot(&[], b"from\0to\0data", |slot| {
            let mut texts = Texts::of(slot);
            assert_eq!(texts.name().unwrap().as_bytes(), b"from");
            assert_eq!(texts.text().unwrap(), b"to");
            assert_eq!(texts.bytes(4).unwrap(), b"data");
            assert!(texts.bytes(5).is_err() && texts.text().is_err());
        });
    }

    #[test]
    fn only_what_a_setattr_names_is_changed() {
        let mut operation = [0; 88];
        let mut put = |at: usize, word: &[u8]| operation[at..][..word.len()].copy_from_slice(word);
        // Owner, size and the time of the last change to the content; the last access: now.
        put(0, &(1_u32 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 7).to_ne_bytes());
        put(16, &9_u64.to_ne_bytes());
        put(40, &(-2_i64).to_ne_bytes());
        put(60, &7_u32.to_ne_bytes());
        put(76, &1000_u32.to_ne_bytes());
        let changes = with_slot(&operation, &[], |slot| changes(Words::of(slot)));
        assert_eq!((changes.mode, changes.uid, changes.gid), (None, Some(1000), None));
        assert_eq!((changes.size, changes.atime), (Some(9), Some(SetTime::Now)));
        assert_eq!(changes.mtime, Some(SetTime::To(Timestamp { secs: -2, nanos: 7 })));
    }
}

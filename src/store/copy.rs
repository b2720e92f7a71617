//! Copying one object from a backing to another: whole under a scratch name, then into place.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;

use crate::error::{Error, IoContext, Result};
use crate::progress::Progress;
use crate::replica::backing::{Access, Handle, RenameMode, Seek, SetTime};
use crate::store::fill::kept_xattrs;
use crate::store::site::{Object, Site, ignore_missing, own_creds, own_name, private};
use crate::types::{EntryName, Kind, RelPath};

/// Bytes moved at a time: large enough for any disk, small enough to report progress and to stop.
const COPY_BYTES: usize = 1 << 20;
/// What scratch names begin with.
const SCRATCH: &str = "fill-";

/// Copies objects from one backing to another.
pub struct Copier<'a> {
    source: &'a Site,
    target: &'a Site,
    progress: &'a Progress,
    /// The source is in use: a file may shrink under our hands.
    changing: bool,
    /// `None` where objects are made under their own names.
    scratch: Option<Handle>,
    number: u64,
    bytes_written: u64,
    buffer: Vec<u8>,
    other: Vec<u8>,
}

impl<'a> Copier<'a> {
    /// Takes the two backings and clears the scratch files of a copier that was killed.
    pub fn new(source: &'a Site, target: &'a Site, progress: &'a Progress) -> Result<Copier<'a>> {
        let scratch = target.dir(&private("tmp"))?;
        let path = target.private_path("tmp");
        for entry in target.backing.list(&scratch).context("list", &path)? {
            if entry.name.as_bytes().starts_with(SCRATCH.as_bytes()) {
                ignore_missing(target.backing.unlink(&scratch, &entry.name))
                    .context("remove a scratch file of", &path)?;
            }
        }
        Ok(Copier {
            source,
            target,
            progress,
            changing: false,
            scratch: Some(scratch),
            number: 0,
            bytes_written: 0,
            buffer: vec![0; COPY_BYTES],
            other: Vec::new(),
        })
    }

    /// For a target that is no backing, but a mount: objects are made under their own names by the
    /// caller, and only filled here.
    pub fn direct(source: &'a Site, target: &'a Site, progress: &'a Progress) -> Copier<'a> {
        Copier {
            source,
            target,
            progress,
            changing: false,
            scratch: None,
            number: 0,
            bytes_written: 0,
            buffer: vec![0; COPY_BYTES],
            other: Vec::new(),
        }
    }

    fn scratch(&self) -> Result<&Handle> {
        self.scratch.as_ref().ok_or(Error::Posix(Errno::INVAL))
    }

    /// Writes the bytes of a file of the source, `size` of them, to an empty one.
    pub fn write_into(
        &mut self,
        from: &Handle,
        dir: &RelPath,
        name: &EntryName,
        size: u64,
        to: &Handle,
    ) -> Result<()> {
        self.copy_content(from, &dir.join(name), name, size, to)
    }

    /// Whether a file of the source and an open one have different bytes.
    pub fn bytes_differ(&mut self, from: &Handle, name: &EntryName, with: &Handle) -> Result<bool> {
        let a = self.source.backing.open_file(from, name, Access::Read);
        let a = a.map_err(Error::from_io)?;
        self.other.resize(COPY_BYTES, 0);
        let mut offset = 0;
        loop {
            let count = self.source.backing.read_at(&a, &mut self.buffer, offset);
            let count = count.map_err(Error::from_io)?;
            let other = self.target.backing.read_at(with, &mut self.other, offset);
            if other.map_err(Error::from_io)? != count
                || self.buffer[..count] != self.other[..count]
            {
                return Ok(true);
            }
            if count < COPY_BYTES {
                return Ok(false);
            }
            offset += count as u64;
        }
    }

    /// For a source that is in use: what changes meanwhile is told by [`has_changed`].
    pub fn of_changing(mut self) -> Copier<'a> {
        self.changing = true;
        self
    }

    /// Bytes of file contents written so far.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// Makes a copy of an object that is no directory, with all its attributes, under a scratch
    /// name.
    pub fn make(
        &mut self,
        from: &Handle,
        dir: &RelPath,
        name: &EntryName,
        object: &Object,
    ) -> Result<EntryName> {
        self.number += 1;
        let made = own_name(&format!("{SCRATCH}{}", self.number));
        let result = self.make_as(&made, from, dir, name, object);
        if result.is_err() {
            let _ = self.target.backing.unlink(self.scratch()?, &made);
        }
        result.map(|()| made)
    }

    fn make_as(
        &mut self,
        made: &EntryName,
        from: &Handle,
        dir: &RelPath,
        name: &EntryName,
        object: &Object,
    ) -> Result<()> {
        let path = dir.join(name);
        let target = self.target;
        let fail = |error| blame(target, "make", &path, error);
        let creds = own_creds();
        let backing = &target.backing;
        let node = match object.stat.kind {
            Kind::File => {
                let file = backing.create(self.scratch()?, made, 0o600, creds).map_err(fail)?;
                self.copy_content(from, &path, name, object.stat.size, &file)?;
                file
            }
            Kind::Symlink => {
                backing.symlink(self.scratch()?, made, &object.target, creds).map_err(fail)?;
                backing.open_node(self.scratch()?, made).map_err(fail)?
            }
            kind => {
                let rdev = object.stat.rdev;
                backing.mknod(self.scratch()?, made, kind, 0o600, rdev, creds).map_err(fail)?;
                backing.open_node(self.scratch()?, made).map_err(fail)?
            }
        };
        self.set_attributes(&node, &path, object)
    }

    /// Renames a made copy into its place, which is free.
    pub fn place(
        &self,
        made: &EntryName,
        to: &Handle,
        path: &RelPath,
        name: &EntryName,
    ) -> Result<()> {
        self.target
            .backing
            .rename(self.scratch()?, made, to, name, RenameMode::NoReplace)
            .map_err(|error| blame(self.target, "move the copy to", path, error))
    }

    /// Copies data where there is data; what the source has as holes stays a hole.
    fn copy_content(
        &mut self,
        from: &Handle,
        path: &RelPath,
        name: &EntryName,
        size: u64,
        to: &Handle,
    ) -> Result<()> {
        let (source, target) = (self.source, self.target);
        let shown = source.at(path);
        let file = source.backing.open_file(from, name, Access::Read).context("open", &shown)?;
        let mut offset = 0;
        while offset < size {
            let data = match source.backing.seek(&file, offset, Seek::Data) {
                Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => break,
                other => other.context("find data in", &shown)?,
            };
            let hole = source.backing.seek(&file, data, Seek::Hole);
            let end = hole.context("find holes in", &shown)?.min(size);
            offset = data;
            while offset < end {
                let length = self.buffer.len().min((end - offset) as usize);
                let buffer = &mut self.buffer[..length];
                let count =
                    source.backing.read_at(&file, buffer, offset).context("read", &shown)?;
                if count == 0 {
                    // It shrank under our hands; the size below shows what is there.
                    return self.changed(path);
                }
                target
                    .backing
                    .write_at(to, &buffer[..count], offset)
                    .map_err(|error| blame(target, "write", path, error))?;
                offset += count as u64;
                self.bytes_written += count as u64;
                self.progress.advance(0, count as u64)?;
            }
        }
        target.backing.truncate(to, size).map_err(|error| blame(target, "extend", path, error))
    }

    fn changed<T>(&self, path: &RelPath) -> Result<T> {
        if self.changing {
            return Err(io::Error::from(Errno::STALE)).context("copy", self.source.at(path));
        }
        Err(Error::Refused(format!(
            "{} is being changed by another program while it is copied: close that program and \
             mount again",
            self.source.at(path).display()
        )))
    }

    /// Sets everything but content: owner, extended attributes, rights and times, in this order,
    /// for a change of owner clears set-id bits and capabilities, and all of them move the times.
    pub fn set_attributes(&self, node: &Handle, path: &RelPath, object: &Object) -> Result<()> {
        let backing = &self.target.backing;
        let stat = &object.stat;
        let present = self.target.object_of(node, path)?;
        let fail = |action| move |error| blame(self.target, action, path, error);
        if (present.stat.uid, present.stat.gid) != (stat.uid, stat.gid) {
            let uid = (present.stat.uid != stat.uid).then_some(stat.uid);
            let gid = (present.stat.gid != stat.gid).then_some(stat.gid);
            backing.chown(node, uid, gid).map_err(fail("set the owner of"))?;
        }
        let present = self.target.object_of(node, path)?;
        let (wanted, have) = (kept_xattrs(object), kept_xattrs(&present));
        for name in have.keys().filter(|name| !wanted.contains_key(*name)) {
            backing
                .remove_xattr(node, OsStr::from_bytes(name))
                .map_err(|error| self.blame_xattr(path, name, error))?;
        }
        for (name, value) in wanted.iter().filter(|(name, value)| have.get(*name) != Some(value)) {
            backing
                .set_xattr(node, OsStr::from_bytes(name), value, 0)
                .map_err(|error| self.blame_xattr(path, name, error))?;
        }
        if stat.kind != Kind::Symlink {
            backing.chmod(node, stat.mode).map_err(fail("set the mode of"))?;
        }
        backing
            .set_times(node, SetTime::To(stat.atime), SetTime::To(stat.mtime))
            .map_err(fail("set the times of"))
    }

    fn blame_xattr(&self, path: &RelPath, name: &[u8], error: io::Error) -> Error {
        Error::Refused(format!(
            "{} cannot hold the extended attribute {} of {path}: {error}. Use a backing whose \
             filesystem and rights allow it, or remove the attribute from {}",
            self.target.path.display(),
            crate::types::escape(name),
            self.source.at(path).display()
        ))
    }

    /// Whether a file has the same bytes on both backings.
    pub fn same_bytes(
        &mut self,
        (from, from_name): (&Handle, &EntryName),
        (to, to_name): (&Handle, &EntryName),
        dir: &RelPath,
    ) -> Result<bool> {
        let path = dir.join(from_name);
        let (source, target) = (self.source, self.target);
        let a = source.begin_reading(from, from_name, COPY_BYTES, false);
        let (a, first) = a.context("open", source.at(&path))?;
        // After a write that failed the kernel may have in memory what the disk has not.
        let b = target.begin_reading(to, to_name, COPY_BYTES, true);
        let (b, other) = b.context("open", target.at(&path))?;
        let first = first.context("read", source.at(&path))?;
        // What cannot be read is replaced by what can.
        let unreadable = |error| log::warn!("read {}: {error}", target.at(&path).display());
        if other.map_err(unreadable).ok().as_ref() != Some(&first) {
            return Ok(false);
        }
        let mut offset = first.len() as u64;
        if first.len() < COPY_BYTES {
            return Ok(true);
        }
        self.other.resize(COPY_BYTES, 0);
        loop {
            let count = source.backing.read_at(&a, &mut self.buffer, offset);
            let count = count.context("read", source.at(&path))?;
            let other = match target.backing.read_at(&b, &mut self.other, offset) {
                Ok(other) => other,
                Err(error) => {
                    unreadable(error);
                    return Ok(false);
                }
            };
            if self.buffer[..count] != self.other[..other] {
                return Ok(false);
            }
            if count < COPY_BYTES {
                return Ok(true);
            }
            offset += count as u64;
            self.progress.advance(0, 0)?;
        }
    }
}

/// An error of the target as its user must read it.
pub fn blame(target: &Site, action: &'static str, path: &RelPath, error: io::Error) -> Error {
    let shown = target.at(path);
    let errno = Errno::from_io_error(&error);
    if matches!(errno, Some(Errno::NOSPC | Errno::DQUOT)) {
        return Error::Refused(format!(
            "{} is full: {error} at {}. Free some space, or give a larger disk; the next mount \
             goes on from here",
            target.path.display(),
            shown.display()
        ));
    }
    if matches!(errno, Some(Errno::PERM)) && action == "set the owner of" {
        return Error::Refused(format!(
            "{}: its owner cannot be kept as an ordinary user: mount as root, or give the files to \
             yourself first",
            shown.display()
        ));
    }
    Error::Io { action, path: shown, source: error }
}

/// Whether an error only says that something of `source`, which is in use, went or was changed
/// while it was looked at.
pub fn has_changed(source: &Site, error: &Error) -> bool {
    let gone = |errno| matches!(errno, Some(Errno::NOENT | Errno::STALE | Errno::NOTDIR));
    match error {
        Error::Posix(errno) => gone(Some(*errno)),
        Error::Io { path, source: error, .. } => {
            let changed = gone(Errno::from_io_error(error))
                || matches!(
                    Errno::from_io_error(error),
                    Some(Errno::LOOP | Errno::INVAL | Errno::ISDIR)
                );
            path.starts_with(&source.path) && changed
        }
        _ => false,
    }
}

//! The copies on disks of a filesystem that does nothing beside them: no catalog, no checks, no
//! waiting for a disk that hangs. What is deleted is kept by one rename, as ours keeps it. So what
//! this takes is the least of a mirror that keeps what was, served through FUSE.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid};
use rustix::io::Result;

const ANY: Mode = Mode::from_raw_mode(0o7777);
const DIR: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::CLOEXEC);
const FILE: OFlags = OFlags::RDWR.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const KEPT: &str = ".kept";

/// Where a name is: the directory's number and the name.
pub type Place<'a> = (u64, &'a OsStr);

/// The disks, none of them if all is kept in memory alone. Nodes are known by their numbers.
pub struct Disks {
    count: usize,
    /// Of directories always, of files as long as they are open: one descriptor a disk.
    open: HashMap<u64, Vec<OwnedFd>>,
    /// How often a file is open.
    opens: HashMap<u64, usize>,
    /// Where what was deleted is kept.
    kept: Vec<OwnedFd>,
}

impl Disks {
    /// Empty directories, one a disk; `root` is the number of the root.
    pub fn new<'p>(paths: impl IntoIterator<Item = &'p Path>, root: u64) -> Result<Disks> {
        let mut roots = Vec::new();
        let mut kept = Vec::new();
        for path in paths {
            let opened = rustix::fs::openat(CWD, path, DIR, Mode::empty())?;
            assert_eq!(Dir::read_from(&opened)?.count(), 2, "{path:?} is empty");
            rustix::fs::mkdirat(&opened, KEPT, Mode::RWXU)?;
            kept.push(rustix::fs::openat(&opened, KEPT, DIR, Mode::empty())?);
            roots.push(opened);
        }
        let count = roots.len();
        Ok(Disks { count, open: HashMap::from([(root, roots)]), opens: HashMap::new(), kept })
    }

    pub fn is_none(&self) -> bool {
        self.count == 0
    }

    fn dirs(&self, ino: u64) -> &[OwnedFd] {
        self.open.get(&ino).map_or(&[], Vec::as_slice)
    }

    pub fn mkdir(&mut self, (parent, name): Place<'_>, ino: u64, mode: u32) -> Result<()> {
        let make = |dir: &OwnedFd| {
            rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(mode))?;
            rustix::fs::openat(dir, name, DIR, Mode::empty())
        };
        let made = self.dirs(parent).iter().map(make).collect::<Result<_>>()?;
        self.open.insert(ino, made);
        Ok(())
    }

    pub fn symlink(&self, (parent, name): Place<'_>, target: &[u8]) -> Result<()> {
        self.dirs(parent).iter().try_for_each(|dir| rustix::fs::symlinkat(target, dir, name))
    }

    /// Makes a file, and opens it.
    pub fn create(&mut self, (parent, name): Place<'_>, ino: u64, mode: u32) -> Result<()> {
        let flags = FILE | OFlags::CREATE | OFlags::EXCL;
        let make = |dir: &OwnedFd| rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(mode));
        let made = self.dirs(parent).iter().map(make).collect::<Result<_>>()?;
        self.open.insert(ino, made);
        self.opens.insert(ino, 1);
        Ok(())
    }

    /// Opens a file: on one disk, if it is only to be read.
    pub fn open(&mut self, (parent, name): Place<'_>, ino: u64, to_write: bool) -> Result<()> {
        let wanted = if to_write { self.count } else { self.count.min(1) };
        let mut files = self.open.remove(&ino).unwrap_or_default();
        for dir in self.dirs(parent).iter().take(wanted).skip(files.len()) {
            files.push(rustix::fs::openat(dir, name, FILE, Mode::empty())?);
        }
        self.open.insert(ino, files);
        *self.opens.entry(ino).or_default() += 1;
        Ok(())
    }

    pub fn release(&mut self, ino: u64) {
        let Some(left) = self.opens.get_mut(&ino) else { return };
        *left -= 1;
        if *left == 0 {
            self.opens.remove(&ino);
            self.open.remove(&ino);
        }
    }

    pub fn read(&self, ino: u64, offset: u64, size: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; size];
        let file = self.dirs(ino).first().ok_or(rustix::io::Errno::BADF)?;
        let count = rustix::io::pread(file, &mut bytes, offset)?;
        bytes.truncate(count);
        Ok(bytes)
    }

    pub fn write(&self, ino: u64, offset: u64, bytes: &[u8]) -> Result<()> {
        self.dirs(ino).iter().try_for_each(|file| {
            let mut done = 0;
            while done < bytes.len() {
                done += rustix::io::pwrite(file, &bytes[done..], offset + done as u64)?;
            }
            Ok(())
        })
    }

    /// Makes a file durable, on all disks at once.
    pub fn sync(&self, ino: u64) -> Result<()> {
        let files = self.dirs(ino);
        std::thread::scope(|scope| {
            let sync = |file| scope.spawn(move || rustix::fs::fsync(file));
            let others: Vec<_> = files.iter().skip(1).map(sync).collect();
            files.first().map_or(Ok(()), rustix::fs::fsync)?;
            others.into_iter().try_for_each(|other| other.join().expect("no panic"))
        })
    }

    pub fn resize(&mut self, place: Place<'_>, ino: u64, size: u64) -> Result<()> {
        self.open(place, ino, true)?;
        let done = self.dirs(ino).iter().try_for_each(|file| rustix::fs::ftruncate(file, size));
        self.release(ino);
        done
    }

    pub fn chmod(&self, (parent, name): Place<'_>, mode: u32) -> Result<()> {
        let mode = Mode::from_raw_mode(mode) & ANY;
        let chmod = |dir| rustix::fs::chmodat(dir, name, mode, AtFlags::empty());
        self.dirs(parent).iter().try_for_each(chmod)
    }

    pub fn chown(
        &self,
        (parent, name): Place<'_>,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        let chown = |dir| rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW);
        self.dirs(parent).iter().try_for_each(chown)
    }

    pub fn set_mtime(&self, (parent, name): Place<'_>, time: Timespec) -> Result<()> {
        let omitted = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let times = Timestamps { last_access: omitted, last_modification: time };
        let set = |dir| rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW);
        self.dirs(parent).iter().try_for_each(set)
    }

    /// Takes a name away and keeps what it meant.
    pub fn unlink(&self, (parent, name): Place<'_>, ino: u64) -> Result<()> {
        let keep = |(dir, kept)| rustix::fs::renameat(dir, name, kept, format!("{ino:x}"));
        self.dirs(parent).iter().zip(&self.kept).try_for_each(keep)
    }

    pub fn rmdir(&mut self, (parent, name): Place<'_>, ino: u64) -> Result<()> {
        let remove = |dir| rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR);
        self.dirs(parent).iter().try_for_each(remove)?;
        self.open.remove(&ino);
        Ok(())
    }

    pub fn rename(&self, (from, name): Place<'_>, (to, new_name): Place<'_>) -> Result<()> {
        let rename = |(from, to)| rustix::fs::renameat(from, name, to, new_name);
        self.dirs(from).iter().zip(self.dirs(to)).try_for_each(rename)
    }
}

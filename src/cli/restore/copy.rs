//! Copying a past tree into a live one: new files are written beside their place and renamed into
//! it, so that a name always means the whole old or the whole new file.
//!
//! Nothing is ever removed: what the past did not have stays. A failure of one item is noted and
//! the others go on.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::attributes::{self, Place, show};
use crate::cli::Overwrite;
use crate::progress::Progress;

/// Bytes per read and write.
const BLOCK_BYTES: usize = 1 << 20;

/// What was done, or would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Deed {
    /// It was not there.
    Created,
    /// It was there and differed.
    Replaced,
    /// It was there with the same content; owner, mode, times or attributes were set.
    Adjusted,
}

/// What is to be done with an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// It is as it should be, or is to be left.
    Nothing,
    /// Only its attributes are not as they should be.
    Attributes,
    /// It is to be put in place anew.
    Whole,
}

/// Where a file with several names was restored, or found unchanged.
struct Placed {
    path: PathBuf,
    /// Which file it is there; `None` in a dry run that would make it.
    identity: Option<(u64, u64)>,
}

/// One thing that was done, or failed.
#[derive(Clone, Debug)]
pub struct Item {
    /// Where.
    pub path: PathBuf,
    /// What was done, or why not.
    pub outcome: Result<Deed, String>,
}

/// A restore under way.
pub struct Copier<'a> {
    /// What to do with files that are there.
    pub overwrite: Overwrite,
    /// Change nothing.
    pub dry_run: bool,
    /// Told of every object and its bytes.
    pub progress: &'a Progress,
    /// What was done.
    pub items: Vec<Item>,
    /// How many objects were as they should be, or were to be left.
    pub unchanged: u64,
    /// Files with several names that are in their place, by their number in the past.
    links: HashMap<(u64, u64), Placed>,
}

/// Why an item was not restored: a failed call, or the user's wish to stop.
enum Trouble {
    Call(Errno),
    Text(String),
    Stop(crate::error::Error),
}

impl From<Errno> for Trouble {
    fn from(errno: Errno) -> Trouble {
        Trouble::Call(errno)
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Trouble {
        match Errno::from_io_error(&error) {
            Some(errno) => Trouble::Call(errno),
            None => Trouble::Text(error.to_string()),
        }
    }
}

/// Opens a directory for naming things in it.
pub fn open_dir(dir: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

impl<'a> Copier<'a> {
    /// A restore that has not begun.
    pub fn new(overwrite: Overwrite, dry_run: bool, progress: &'a Progress) -> Copier<'a> {
        let (items, links) = (Vec::new(), HashMap::new());
        Copier { overwrite, dry_run, progress, items, unchanged: 0, links }
    }

    /// Restores `from` and all below it as `to`, which is shown as `path`. `to` is `None` where a
    /// dry run has not made the directory. Fails only when the user stops it.
    pub fn restore(
        &mut self,
        from: Place<'_>,
        to: Option<Place<'_>>,
        path: &Path,
    ) -> crate::error::Result<()> {
        let done = self.restore_one(from, to, path);
        self.note(path, done)
    }

    fn note(
        &mut self,
        path: &Path,
        done: Result<Option<Deed>, Trouble>,
    ) -> crate::error::Result<()> {
        let outcome = match done {
            Ok(None) => {
                self.unchanged += 1;
                return Ok(());
            }
            Ok(Some(deed)) => Ok(deed),
            Err(Trouble::Stop(error)) => return Err(error),
            Err(Trouble::Call(errno)) => Err(std::io::Error::from(errno).to_string()),
            Err(Trouble::Text(text)) => Err(text),
        };
        self.items.push(Item { path: path.to_path_buf(), outcome });
        Ok(())
    }

    fn restore_one(
        &mut self,
        from: Place<'_>,
        to: Option<Place<'_>>,
        path: &Path,
    ) -> Result<Option<Deed>, Trouble> {
        let stat = from.stat()?;
        let present = match to.map(|to| to.stat()) {
            None | Some(Err(Errno::NOENT)) => None,
            Some(found) => Some(found?),
        };
        let kind = FileType::from_raw_mode(stat.st_mode);
        let bytes = if kind == FileType::RegularFile { stat.st_size as u64 } else { 0 };
        if kind == FileType::Directory {
            self.progress.advance(1, 0).map_err(Trouble::Stop)?;
            return self.restore_dir(from, &stat, to, present.as_ref(), path);
        }
        if let Some(present) = &present
            && FileType::from_raw_mode(present.st_mode) == FileType::Directory
        {
            return Err(Trouble::Text("a directory is in its place; move that away first".into()));
        }
        let done = self.restore_object(from, &stat, to, present.as_ref(), path);
        self.progress.advance(1, bytes).map_err(Trouble::Stop)?;
        done
    }

    /// Restores what is no directory.
    fn restore_object(
        &mut self,
        from: Place<'_>,
        stat: &Stat,
        to: Option<Place<'_>>,
        present: Option<&Stat>,
        path: &Path,
    ) -> Result<Option<Deed>, Trouble> {
        let need = self.need(from, stat, to, present)?;
        if let (Some(to), false) = (to, self.dry_run) {
            match need {
                Need::Nothing => {}
                Need::Attributes => attributes::copy(from, stat, to)?,
                Need::Whole => self.put(from, stat, to)?,
            }
        }
        if stat.st_nlink > 1 && !self.links.contains_key(&identity(stat)) {
            self.note_link(from, stat, to, present.filter(|_| need != Need::Whole), need, path)?;
        }
        Ok(match need {
            Need::Nothing => None,
            Need::Attributes => Some(Deed::Adjusted),
            Need::Whole => Some(deed(present)),
        })
    }

    /// Notes where the first name of a file with several is, so that the others become its links.
    /// One that was left alone counts only if it has the content of the past.
    fn note_link(
        &mut self,
        from: Place<'_>,
        stat: &Stat,
        to: Option<Place<'_>>,
        kept: Option<&Stat>,
        need: Need,
        path: &Path,
    ) -> Result<(), Trouble> {
        let found = match (need, to, kept) {
            (Need::Whole, Some(to), _) if !self.dry_run => Some(identity(&to.stat()?)),
            (Need::Whole, ..) => None,
            (_, Some(to), Some(kept)) if !content_differs(from, stat, to, kept)? => {
                Some(identity(kept))
            }
            _ => return Ok(()),
        };
        let placed = Placed { path: path.to_path_buf(), identity: found };
        self.links.insert(identity(stat), placed);
        Ok(())
    }

    /// What is to be done with what is there.
    fn need(
        &self,
        from: Place<'_>,
        stat: &Stat,
        to: Option<Place<'_>>,
        present: Option<&Stat>,
    ) -> Result<Need, Trouble> {
        let (Some(present), Some(to)) = (present, to) else { return Ok(Need::Whole) };
        let newer = mtime(stat) > mtime(present);
        match self.overwrite {
            Overwrite::Never => return Ok(Need::Nothing),
            Overwrite::IfNewer if !newer => return Ok(Need::Nothing),
            Overwrite::Always | Overwrite::IfNewer | Overwrite::IfChanged => {}
        }
        // The other names of a file must mean the one file again.
        if let Some(placed) = self.links.get(&identity(stat)).filter(|_| stat.st_nlink > 1) {
            let same = placed.identity == Some(identity(present));
            return Ok(if same { Need::Nothing } else { Need::Whole });
        }
        if self.overwrite != Overwrite::IfChanged || content_differs(from, stat, to, present)? {
            return Ok(Need::Whole);
        }
        if !attributes_differ(stat, present) && attributes::same_xattrs(from, to)? {
            return Ok(Need::Nothing);
        }
        // In place only where no name sees it that had nothing to do with this file then.
        let alone = present.st_nlink == 1 || stat.st_nlink > 1;
        Ok(if alone { Need::Attributes } else { Need::Whole })
    }

    fn restore_dir(
        &mut self,
        from: Place<'_>,
        stat: &Stat,
        to: Option<Place<'_>>,
        present: Option<&Stat>,
        path: &Path,
    ) -> Result<Option<Deed>, Trouble> {
        if let Some(present) = present
            && FileType::from_raw_mode(present.st_mode) != FileType::Directory
        {
            return Err(Trouble::Text("something else is in the directory's place".into()));
        }
        let is_new = present.is_none();
        if let (true, Some(to), false) = (is_new, to, self.dry_run) {
            rustix::fs::mkdirat(to.dir, to.name, Mode::from_raw_mode(0o700))?;
        }
        let source = open_dir(from.dir, from.name)?;
        let target = match to {
            Some(to) if !(is_new && self.dry_run) => Some(open_dir(to.dir, to.name)?),
            _ => None,
        };
        let before = self.items.len();
        self.restore_entries(source.as_fd(), target.as_ref().map(AsFd::as_fd), path)?;
        let changed_within = self.items.len() > before;
        let differs = match (present, to) {
            (Some(present), Some(to)) => {
                rights_differ(stat, present)
                    || !attributes::same_xattrs(from, to)?
                    // Of one that only got entries back the time was bound to change.
                    || (!changed_within && mtime(stat) != mtime(present))
            }
            _ => true,
        };
        let wanted = is_new || (self.overwrite != Overwrite::Never && (differs || changed_within));
        if let (true, Some(to), false) = (wanted, to, self.dry_run) {
            // Last: entries made in it change its times, and its mode may forbid making them.
            attributes::copy(from, stat, to)?;
        }
        // A directory that only got entries back is not itself worth a line.
        let deed = if is_new { Deed::Created } else { Deed::Adjusted };
        Ok((is_new || (wanted && differs)).then_some(deed))
    }

    /// Restores all entries of a directory.
    pub fn restore_entries(
        &mut self,
        source: BorrowedFd<'_>,
        target: Option<BorrowedFd<'_>>,
        path: &Path,
    ) -> Result<(), Stopped> {
        for name in names(source)? {
            let from = Place { dir: source, name: &name };
            let to = target.map(|dir| Place { dir, name: &name });
            self.restore(from, to, &path.join(&name)).map_err(Stopped::By)?;
        }
        Ok(())
    }

    /// Puts one object that is no directory in its place, whatever is there.
    fn put(&mut self, from: Place<'_>, stat: &Stat, to: Place<'_>) -> Result<(), Trouble> {
        let temporary = temporary_name(to.name);
        let beside = Place { dir: to.dir, name: &temporary };
        // One of an earlier restore that was killed.
        let _ = rustix::fs::unlinkat(to.dir, &temporary, AtFlags::empty());
        let linked = match self.links.get(&identity(stat)) {
            Some(first) if stat.st_nlink > 1 => {
                let cwd = rustix::fs::CWD;
                rustix::fs::linkat(cwd, &first.path, to.dir, &temporary, AtFlags::empty()).is_ok()
            }
            _ => false,
        };
        let made = if linked { Ok(()) } else { make(from, stat, beside) };
        // If we die before the rename, the old file is whole and the temporary one is litter that
        // the next restore of this name clears; after it, the new one is whole.
        let placed =
            made.and_then(|()| Ok(rustix::fs::renameat(to.dir, &temporary, to.dir, to.name)?));
        if placed.is_err() || linked {
            // A rename between two names of one file does nothing and leaves both.
            let _ = rustix::fs::unlinkat(to.dir, &temporary, AtFlags::empty());
        }
        placed
    }
}

/// Why the entries of a directory were not all restored.
pub enum Stopped {
    /// The directory cannot be read.
    Unreadable(Errno),
    /// The user stopped the work.
    By(crate::error::Error),
}

impl From<Errno> for Stopped {
    fn from(errno: Errno) -> Stopped {
        Stopped::Unreadable(errno)
    }
}

impl From<Stopped> for Trouble {
    fn from(stopped: Stopped) -> Trouble {
        match stopped {
            Stopped::Unreadable(errno) => Trouble::Call(errno),
            Stopped::By(error) => Trouble::Stop(error),
        }
    }
}

fn deed(present: Option<&Stat>) -> Deed {
    if present.is_some() { Deed::Replaced } else { Deed::Created }
}

fn names(dir: BorrowedFd<'_>) -> rustix::io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsStr::from_bytes(name).to_os_string());
        }
    }
    names.sort();
    Ok(names)
}

/// Beside its target, hidden, and short enough for the longest name.
fn temporary_name(name: &OsStr) -> OsString {
    let mut bytes = crate::report::log::RESTORING_PREFIX.to_vec();
    let hash = blake3::hash(name.as_bytes());
    bytes.extend_from_slice(&hash.to_hex().as_bytes()[..16]);
    OsStr::from_bytes(&bytes).to_os_string()
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn mtime(stat: &Stat) -> (i64, u64) {
    (stat.st_mtime, stat.st_mtime_nsec)
}

fn rights_differ(a: &Stat, b: &Stat) -> bool {
    (a.st_mode, a.st_uid, a.st_gid) != (b.st_mode, b.st_uid, b.st_gid)
}

fn attributes_differ(a: &Stat, b: &Stat) -> bool {
    rights_differ(a, b) || mtime(a) != mtime(b)
}

/// Whether two objects differ in kind or content. Programs can set the time of modification, but
/// not that of change: where all are the same, so is the content; else it is looked at byte by
/// byte.
fn content_differs(
    from: Place<'_>,
    stat: &Stat,
    to: Place<'_>,
    present: &Stat,
) -> Result<bool, Trouble> {
    let kind = FileType::from_raw_mode(stat.st_mode);
    if kind != FileType::from_raw_mode(present.st_mode) || stat.st_size != present.st_size {
        return Ok(true);
    }
    Ok(match kind {
        FileType::RegularFile => {
            let ctime = |stat: &Stat| (stat.st_ctime, stat.st_ctime_nsec);
            let proved = mtime(stat) == mtime(present) && ctime(stat) == ctime(present);
            !proved && !same_bytes(from, to)?
        }
        FileType::Symlink => read_link(from)? != read_link(to)?,
        _ => stat.st_rdev != present.st_rdev,
    })
}

fn read_link(place: Place<'_>) -> rustix::io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(place.dir, place.name, Vec::new())?.into_bytes())
}

fn open_file(place: Place<'_>) -> rustix::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(place.dir, place.name, flags, Mode::empty())?))
}

fn same_bytes(a: Place<'_>, b: Place<'_>) -> Result<bool, Trouble> {
    let (a, b) = (open_file(a)?, open_file(b)?);
    let (mut left, mut right) = (vec![0; BLOCK_BYTES], vec![0; BLOCK_BYTES]);
    let mut offset = 0;
    loop {
        let count = read_full(&a, &mut left, offset)?;
        if read_full(&b, &mut right, offset)? != count || left[..count] != right[..count] {
            return Ok(false);
        }
        if count < BLOCK_BYTES {
            return Ok(true);
        }
        offset += count as u64;
    }
}

fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Makes a copy of an object under a name that is free.
fn make(from: Place<'_>, stat: &Stat, to: Place<'_>) -> Result<(), Trouble> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mode = Mode::from_raw_mode(0o600);
            let target = File::from(rustix::fs::openat(to.dir, to.name, flags, mode)?);
            copy_content(&open_file(from)?, &target, stat.st_size as u64)?;
            attributes::copy(from, stat, to)?;
            target.sync_all()?;
            return Ok(());
        }
        FileType::Symlink => {
            let target = read_link(from)?;
            rustix::fs::symlinkat(OsStr::from_bytes(&target), to.dir, to.name)?;
        }
        kind @ (FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice) => {
            let mode = Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(to.dir, to.name, kind, mode, stat.st_rdev)?;
        }
        FileType::Directory | FileType::Unknown => {
            return Err(Trouble::Text(format!("{} is of an unknown kind", show(from.name))));
        }
    }
    attributes::copy(from, stat, to)?;
    Ok(())
}

/// Copies the data and leaves the holes.
fn copy_content(from: &File, to: &File, size: u64) -> Result<(), Trouble> {
    to.set_len(size)?;
    let mut buffer = vec![0; BLOCK_BYTES.min(size as usize)];
    let mut offset = 0;
    while offset < size {
        let start = match rustix::fs::seek(from, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            // A filesystem that knows no holes: all is data.
            Err(_) => offset,
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start)).unwrap_or(size).min(size);
        offset = start;
        while offset < end {
            let length = buffer.len().min((end - offset) as usize);
            let count = read_full(from, &mut buffer[..length], offset)?;
            if count == 0 {
                return Err(Trouble::Text("it is shorter than it says".into()));
            }
            to.write_all_at(&buffer[..count], offset)?;
            offset += count as u64;
        }
    }
    Ok(())
}

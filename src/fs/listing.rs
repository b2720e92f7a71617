//! Listings of directories.
//!
//! The kernel asks for a listing in parts, with the attributes of each entry or without. What the
//! entries of one part are is looked up for all of them at once.

use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::{Fh, Filesystem, Found, Opened, SnapDir, found_live, found_past};
use crate::error::{Error, Result};
use crate::past::Past;
use crate::past::ino::is_settled;
use crate::types::{EntryName, Kind, NodeId};

/// One line of a directory listing.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its name; `.` and `..` come first.
    pub name: Vec<u8>,
    /// Its inode number.
    pub ino: u64,
    /// What it is.
    pub kind: Kind,
}

impl Line {
    /// Whether it is `.` or `..`.
    pub fn is_dot(&self) -> bool {
        self.name == b"." || self.name == b".."
    }
}

impl Filesystem {
    /// Opens a directory for listing, by a thread.
    pub fn open_dir(&self, thread: u32, ino: u64) -> Fh {
        let manner = self.habits.open(thread, ino);
        self.keep_open(Opened::Dir { thread, manner, lines: Mutex::new(None) })
    }

    /// Whether the kernel may keep the listing of a directory until it is told, or changes it.
    pub fn keeps_listing(&self, ino: u64) -> bool {
        !Past::owns(ino) || (is_settled(ino) && self.past.is_whole())
    }

    /// The listing of an open directory; `fresh` reads it anew, as `rewinddir(3)` wants.
    pub fn list(&self, ino: u64, fh: Fh, fresh: bool) -> Result<Arc<Vec<Line>>> {
        let opened = self.opened(fh)?;
        let Opened::Dir { lines, .. } = &*opened else { return Err(Error::Posix(Errno::NOTDIR)) };
        let mut listing = lines.lock();
        match listing.as_ref() {
            Some(lines) if !fresh => Ok(lines.clone()),
            _ => {
                let lines = Arc::new(self.lines(ino)?);
                *listing = Some(lines.clone());
                Ok(lines)
            }
        }
    }

    fn lines(&self, ino: u64) -> Result<Vec<Line>> {
        let dots = |above: u64| {
            [(&b"."[..], ino), (b"..", above)].map(|(name, ino)| Line {
                name: name.to_vec(),
                ino,
                kind: Kind::Dir,
            })
        };
        if Past::owns(ino) {
            let mut lines = Vec::from(dots(self.past.parent(ino)));
            lines.extend(self.past.list(ino)?.into_iter().map(|entry| Line {
                name: entry.name.as_bytes().to_vec(),
                ino: entry.ino,
                kind: entry.kind,
            }));
            return Ok(lines);
        }
        let node = self.live(ino)?;
        let (entries, above) = self.volume.list(&node)?;
        let mut lines = Vec::from(dots(above.0));
        let door = match self.options.snapdir {
            SnapDir::Visible => true,
            SnapDir::Root => node.id == NodeId::ROOT,
            SnapDir::Hidden | SnapDir::Disabled => false,
        };
        if door {
            let ino = self.past.enter(node.id)?.stat.ino;
            let name = self.options.snapdir_name.as_bytes().to_vec();
            lines.push(Line { name, ino, kind: Kind::Dir });
        }
        lines.extend(entries.into_iter().map(|entry| Line {
            name: entry.name.as_bytes().to_vec(),
            ino: entry.node.0,
            kind: entry.kind,
        }));
        Ok(lines)
    }

    /// What these lines in the listing of a directory mean; `None` for `.` and `..`, and for what
    /// was removed since. Each counts as one lookup of the kernel: what it is not told of is to be
    /// forgotten ([`Filesystem::forget`]).
    pub fn listed(&self, dir: u64, lines: &[Line]) -> Result<Vec<Option<Found>>> {
        if is_settled(dir) {
            let listed = lines.iter().filter(|line| !line.is_dot());
            self.past.expect(dir, &listed.map(|line| line.ino).collect::<Vec<_>>())?;
            // A line is what it was, so its name need not be looked for.
            let found = |line: &Line| match line.is_dot() {
                true => None,
                false => self.past.stat(line.ino).ok().map(found_past),
            };
            return Ok(lines.iter().map(found).collect());
        }
        let (mut names, mut places) = (Vec::new(), Vec::new());
        let mut all = vec![None; lines.len()];
        for (place, line) in lines.iter().enumerate().filter(|(_, line)| !line.is_dot()) {
            let name = EntryName::new(&line.name)?;
            if Past::owns(dir) || self.is_snapdir(&name) {
                all[place] = self.lookup(dir, &name).ok();
            } else {
                names.push(name);
                places.push(place);
            }
        }
        if !names.is_empty() {
            let found = self.volume.lookup_all(NodeId(dir), &names)?;
            for (place, found) in places.into_iter().zip(found) {
                all[place] = found.map(|(_, stat)| found_live(stat));
            }
        }
        Ok(all)
    }

    /// Ends the listing of a directory.
    pub fn release_dir(&self, fh: Fh) {
        self.opened.lock().remove(&fh.0);
    }

    /// Makes a directory's entries durable.
    pub fn fsync_dir(&self, ino: u64) -> Result<()> {
        if Past::owns(ino) {
            return Ok(());
        }
        self.volume.fsync_dir(&self.live(ino)?)
    }
}

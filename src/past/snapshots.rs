//! `.snapshots` itself: the names in it, and making, forgetting and renaming snapshots with
//! `mkdir`, `rmdir` and `mv`.
//!
//! A directory's `.snapshots` shows the snapshots in which the directory existed. A snapshot is
//! always one of the whole store: made in one directory, it appears in all of them.

use rustix::io::Errno;

use crate::catalog::Snapshot;
use crate::error::Result;
use crate::past::ino::{self, Target};
use crate::past::views::{View, Way};
use crate::past::{Entry, Past, PastListed, target};
use crate::time::gmt_name;
use crate::types::{EntryName, Generation, Kind, NodeId};

const LATEST: &str = "latest";
const AT: &str = ".at";
const VERSIONS: &str = ".versions";
const DELETED: &str = ".deleted";
const GMT_PREFIX: &str = "@GMT-";

impl Past {
    pub(super) fn lookup_snapshots(&self, dir: NodeId, name: &EntryName) -> Result<Entry> {
        let epoch = self.catalog().snapshot_epoch();
        // Every name here is UTF-8.
        let text = std::str::from_utf8(name.as_bytes()).map_err(|_| Errno::NOENT)?;
        let target = match text {
            AT => Target::At(dir),
            VERSIONS => Target::Versions(dir),
            DELETED => Target::Deleted(dir),
            LATEST => {
                self.newest_snapshot(dir)?.ok_or(Errno::NOENT)?;
                Target::Latest(dir)
            }
            _ if text.starts_with(GMT_PREFIX) => {
                let snapshots = self.catalog().snapshots()?;
                let mut newest = snapshots.iter().rev();
                let snapshot = newest.find(|s| gmt_name(s.time) == text).ok_or(Errno::NOENT)?;
                self.remember(epoch, snapshot);
                return self.enter_view(view(dir, snapshot, Way::Gmt(snapshot.id)));
            }
            _ => {
                let snapshot = self.catalog().snapshot(text)?.ok_or(Errno::NOENT)?;
                self.remember(epoch, &snapshot);
                return self.enter_view(view(dir, &snapshot, Way::Snapshot(snapshot.id)));
            }
        };
        self.virtual_entry(target, &self.live(dir)?)
    }

    /// The snapshots in which `dir` existed, oldest first, and `latest`. The rest is hidden.
    pub(super) fn list_snapshots(&self, dir: NodeId) -> Result<Vec<PastListed>> {
        self.live(dir)?;
        let born = self.birth(dir)?;
        let snapshots = self.catalog().snapshots()?;
        let mut listed: Vec<PastListed> = snapshots
            .iter()
            .filter(|snapshot| born <= snapshot.generation)
            .filter_map(|snapshot| {
                let view = view(dir, snapshot, Way::Snapshot(snapshot.id));
                let ino = self.known_view_ino(&view).unwrap_or(ino::UNKNOWN);
                let name = EntryName::new(&snapshot.name).ok()?;
                Some(PastListed { name, ino, kind: Kind::Dir })
            })
            .collect();
        if !listed.is_empty() {
            let name = EntryName::new(LATEST)?;
            let ino = Target::Latest(dir).encode();
            listed.push(PastListed { name, ino, kind: Kind::Symlink });
        }
        Ok(listed)
    }

    /// The newest snapshot in which a live directory existed.
    pub(super) fn newest_snapshot(&self, dir: NodeId) -> Result<Option<Snapshot>> {
        // A directory that lives now existed in the newest snapshot or in none.
        match self.catalog().latest_snapshot()? {
            Some(newest) if self.birth(dir)? <= newest.generation => Ok(Some(newest)),
            _ => Ok(None),
        }
    }

    /// The first generation of a live directory. It never was nameless since.
    fn birth(&self, dir: NodeId) -> Result<Generation> {
        if dir == NodeId::ROOT {
            return Ok(Generation(0));
        }
        if let Some(&born) = self.tables.lock().births.get(&dir) {
            return Ok(born);
        }
        let names = self.catalog().name_history(dir)?;
        let born = names.iter().map(|name| name.born).min().ok_or(Errno::STALE)?;
        self.tables.lock().births.put(dir, born);
        Ok(born)
    }

    /// Checks that a `mkdir` of `name` in `parent` means "take a snapshot" and that the name is
    /// allowed; returns the name. `EROFS` where nothing can be made, `EEXIST` and `EINVAL` for the
    /// name.
    pub fn snapshot_to_create(&self, parent: u64, name: &EntryName) -> Result<String> {
        self.snapshots_dir(parent)?;
        let text = allowed_name(name)?;
        if self.catalog().snapshot(text)?.is_some() {
            return Err(Errno::EXIST.into());
        }
        Ok(text.to_owned())
    }

    /// The entry of a snapshot just made by a `mkdir` in `parent`.
    pub fn created(&self, parent: u64, snapshot: &Snapshot) -> Result<Entry> {
        let dir = self.snapshots_dir(parent)?;
        self.enter_view(view(dir, snapshot, Way::Snapshot(snapshot.id)))
    }

    /// Forgets the snapshot `name` (`rmdir`). `EBUSY` if it is held, `EROFS` where nothing can be
    /// removed, `EPERM` where a program that empties a tree could come by: below the root of the
    /// mount, and everywhere if some directory lists its `.snapshots`.
    pub fn remove_snapshot(&self, parent: u64, name: &EntryName) -> Result<()> {
        let dir = self.snapshots_dir(parent)?;
        let snapshot = self.snapshot_named(name)?;
        if self.options.listed || dir != NodeId::ROOT {
            return Err(Errno::PERM.into());
        }
        if snapshot.held {
            return Err(Errno::BUSY.into());
        }
        self.catalog().delete_snapshot(&snapshot.name)?;
        Ok(())
    }

    /// Renames a snapshot (`mv`). `EXDEV` out of its `.snapshots`, `EEXIST` if the new name is
    /// taken.
    pub fn rename_snapshot(
        &self,
        parent: u64,
        name: &EntryName,
        new_parent: u64,
        new_name: &EntryName,
    ) -> Result<()> {
        self.snapshots_dir(parent)?;
        if parent != new_parent {
            return Err(Errno::XDEV.into());
        }
        let snapshot = self.snapshot_named(name)?;
        let new_name = allowed_name(new_name)?;
        if new_name == snapshot.name {
            return Ok(());
        }
        if self.catalog().snapshot(new_name)?.is_some() {
            return Err(Errno::EXIST.into());
        }
        self.catalog().rename_snapshot(&snapshot.name, new_name)?;
        Ok(())
    }

    fn snapshot_named(&self, name: &EntryName) -> Result<Snapshot> {
        let text = std::str::from_utf8(name.as_bytes()).map_err(|_| Errno::NOENT)?;
        match text {
            // They are part of the place and not snapshots.
            AT | VERSIONS | DELETED | LATEST => Err(Errno::PERM.into()),
            _ if text.starts_with(GMT_PREFIX) => Err(Errno::PERM.into()),
            _ => Ok(self.catalog().snapshot(text)?.ok_or(Errno::NOENT)?),
        }
    }

    /// The live directory whose `.snapshots` is `ino`; `EROFS` for every other place of the past.
    fn snapshots_dir(&self, ino: u64) -> Result<NodeId> {
        match target(ino)? {
            Target::Snapshots(dir) => Ok(dir),
            _ => Err(Errno::ROFS.into()),
        }
    }
}

fn view(dir: NodeId, snapshot: &Snapshot, way: Way) -> View {
    View { generation: snapshot.generation, anchor: dir, dir, way }
}

/// A snapshot's name is shown, typed and stored in many places: printable UTF-8, not one of our own
/// names.
fn allowed_name(name: &EntryName) -> Result<&str> {
    let text = std::str::from_utf8(name.as_bytes()).map_err(|_| Errno::INVAL)?;
    if matches!(text, AT | VERSIONS | DELETED | LATEST) {
        return Err(Errno::EXIST.into());
    }
    // A name that commands take for a time could not be asked for.
    if crate::time::is_relative(text) {
        return Err(Errno::INVAL.into());
    }
    if text.starts_with(['.', '@']) || text.chars().any(char::is_control) {
        return Err(Errno::INVAL.into());
    }
    Ok(text)
}

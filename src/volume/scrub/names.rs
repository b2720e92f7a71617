//! Healing what has a name: symlinks and special files, directories, hard links, and entries that
//! nobody knows. All of it runs under the locks of an operation on the object.

use std::sync::Arc;

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::replica::backing::{Access, Creds, SetTime};
use crate::store::compare::Aspect;
use crate::types::{EntryName, Kind, RelPath, ReplicaId};
use crate::volume::nodes::Node;

use super::heal::{set_attributes, trouble_of};
use super::live::{Copy, Looked, Standing, find};
use super::{Outcome, Trouble, Work};

impl Work<'_> {
    /// Makes symlinks and special files as they are recorded, where they are missing or others.
    pub(super) fn heal_special(&mut self, standing: &Standing, copies: &[Copy]) -> Result<()> {
        let wrong = |copy: &&Copy| match &copy.object {
            None => true,
            Some(object) => standing
                .record
                .differences(object)
                .iter()
                .any(|aspect| matches!(aspect, Aspect::Kind | Aspect::Target | Aspect::Device)),
        };
        let count = copies.iter().filter(wrong).count();
        for copy in copies.iter().filter(wrong) {
            let place = self.volume.place_on(copy.on, &standing.path);
            let trouble = trouble_of(standing, copy);
            // A target and a device number are in the catalog: but if no replica has them, who is
            // right?
            if count == copies.len() {
                self.note(copy.on, &place, trouble, Outcome::Unhealed, "so on all replicas");
                continue;
            }
            match self.make_special(standing, copy) {
                Ok(()) => self.note(copy.on, &place, trouble, Outcome::Healed, ""),
                Err(error) => {
                    self.note(copy.on, &place, trouble, Outcome::Unhealed, error.to_string());
                }
            }
        }
        Ok(())
    }

    fn make_special(&mut self, standing: &Standing, copy: &Copy) -> Result<()> {
        let b = self.volume.replicas().backing(copy.on);
        let Some((parent, name)) = standing.path.split_last() else {
            return Err(Error::Posix(Errno::ISDIR));
        };
        let dir = b.open_dir(&parent)?;
        let times = b.stat(&dir)?;
        if copy.object.is_some() {
            self.set_aside(copy.on, &dir, name)?;
        }
        let row = &standing.record.row;
        match row.kind {
            Kind::Symlink => b.symlink(&dir, name, &standing.record.target, Creds::DAEMON)?,
            kind => b.mknod(&dir, name, kind, 0o600, row.rdev, Creds::DAEMON)?,
        }
        set_attributes(&*b, &b.open_node(&dir, name)?, &standing.record)?;
        b.set_times(&dir, SetTime::To(times.atime), SetTime::To(times.mtime))?;
        Ok(())
    }

    /// Makes a directory where it is missing, or where something else has its name.
    pub(super) fn make_dirs(
        &mut self,
        node: &Arc<Node>,
        standing: &Standing,
        copies: &[&Copy],
    ) -> Result<Looked> {
        let volume = self.volume;
        let _cut = volume.cut.read();
        let _entries = volume.lock_parent(node)?;
        let state = volume.lock(node);
        let _tree = volume.tree.read();
        if self.standing(node, &state)?.as_ref() != Some(standing) {
            return Ok(Looked::Busy);
        }
        for copy in copies {
            let b = volume.replicas().backing(copy.on);
            let place = volume.place_on(copy.on, &standing.path);
            let trouble = trouble_of(standing, copy);
            let made = (|| {
                let Some((parent, name)) = standing.path.split_last() else { return Ok(()) };
                let dir = b.open_dir(&parent)?;
                let times = b.stat(&dir)?;
                if copy.object.is_some() {
                    self.set_aside(copy.on, &dir, name)?;
                }
                b.mkdir(&dir, name, 0o700, Creds::DAEMON)?;
                set_attributes(&*b, &b.open_node(&dir, name)?, &standing.record)?;
                b.set_times(&dir, SetTime::To(times.atime), SetTime::To(times.mtime))?;
                Ok::<(), Error>(())
            })();
            match made {
                Ok(()) => self.note(copy.on, &place, trouble, Outcome::Healed, ""),
                Err(error) => {
                    self.note(copy.on, &place, trouble, Outcome::Unhealed, error.to_string());
                }
            }
        }
        // The kept handles of it are those of what is gone.
        volume.replicas().forget_dir(node.id);
        Ok(Looked::Done)
    }

    /// Gives a file its other names back on the replicas where they are another's or missing.
    pub(super) fn heal_links(
        &mut self,
        node: &Node,
        standing: &Standing,
        copies: &[Copy],
    ) -> Result<()> {
        if standing.record.names < 2 {
            return Ok(());
        }
        let volume = self.volume;
        let names = volume.catalog().names(node.id)?;
        for on in self.broken_links(node, copies)? {
            let b = volume.replicas().backing(on);
            let place = volume.place_on(on, &standing.path);
            let linked = (|| {
                let Some((dir, Some(name), object)) = find(&*b, &standing.path)? else {
                    return Err(Error::Posix(Errno::NOENT));
                };
                for (parent, other) in &names {
                    let path = volume.path_of(*parent)?.join(other);
                    let there = find(&*b, &path)?;
                    if there.as_ref().is_some_and(|(_, _, o)| o.stat.ino == object.stat.ino) {
                        continue;
                    }
                    let to = b.open_dir(&volume.path_of(*parent)?)?;
                    let times = b.stat(&to)?;
                    if there.is_some() {
                        self.set_aside(on, &to, other)?;
                    }
                    b.link(&dir, &name, &to, other)?;
                    b.set_times(&to, SetTime::To(times.atime), SetTime::To(times.mtime))?;
                }
                Ok(())
            })();
            match linked {
                Ok(()) => self.note(on, &place, Trouble::Links, Outcome::Healed, ""),
                Err(error) => {
                    self.note(on, &place, Trouble::Links, Outcome::Unhealed, error.to_string());
                }
            }
        }
        Ok(())
    }

    /// Sets aside an entry that the catalog does not know.
    pub(super) fn set_aside_extra(
        &mut self,
        parent: &Arc<Node>,
        path: &RelPath,
        on: ReplicaId,
        name: &EntryName,
    ) -> Result<()> {
        let volume = self.volume;
        let _cut = volume.cut.read();
        let _entries = volume.lock_dir(parent.id);
        let _tree = volume.tree.read();
        let moved = volume.path_of(parent.id)? != *path;
        if moved || volume.catalog().lookup(parent.id, name)?.is_some() {
            return Ok(());
        }
        let b = volume.replicas().backing(on);
        let Some((dir, _, object)) = find(&*b, &path.join(name))? else { return Ok(()) };
        let place = volume.place_on(on, &path.join(name));
        let aside = (|| {
            let times = b.stat(&dir)?;
            let linked = object.stat.kind == Kind::File && object.stat.nlink > 1;
            let kept = if linked {
                // Another name of a live file would keep its count of names wrong.
                let file = b.open_file(&dir, name, Access::Read)?;
                let kept = self.keep_copy(on, &file, name)?;
                b.unlink(&dir, name)?;
                kept
            } else {
                self.set_aside(on, &dir, name)?
            };
            b.set_times(&dir, SetTime::To(times.atime), SetTime::To(times.mtime))?;
            Ok::<EntryName, Error>(kept)
        })();
        let (outcome, detail) = match aside {
            Ok(kept) => (Outcome::Quarantined, format!("it is in quarantine: {kept}")),
            Err(error) => (Outcome::Unhealed, error.to_string()),
        };
        self.note(on, &place, Trouble::Extra, outcome, detail);
        Ok(())
    }
}

//! What others did to a replica's files while it was away.
//!
//! Its live tree is compared with its own catalog: what differs, and was not in flight when it
//! left, somebody edited. Where the store did not change the same object, the edit is taken over
//! by the volume's ordinary operations, by way of the mount, so that the kernel knows as well.
//! Where both sides changed, the newer by its time of modification stays live and the other becomes
//! a version. Nothing is dropped: what cannot be expressed so is left in the tree, and the resync,
//! which does not know it, moves it to quarantine.
//!
//! If the replica was mounted apart and both sides moved on (a fork, taken on request), what is
//! live here stays live, and all that differs there becomes versions.

use std::collections::BTreeMap;

use rustix::io::Errno;

use crate::catalog::{Catalog, Listed, NodeRow};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::replica::backing::{Access, Handle, Stat};
use crate::replica::intent::DirtySet;
use crate::store::copy::Copier;
use crate::store::site::{Object, Site, is_other_mount, own_creds};
use crate::types::{EntryName, Kind, NodeId, RelPath, Timestamp};

use super::super::Volume;

/// Paths that are told one by one; of the rest their number.
const TOLD_MAX: usize = 100;

/// How often an object is tried that is being changed meanwhile.
const TRIES: u32 = 5;

/// What was found, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForeignReport {
    /// What was found and done, a line for each path.
    pub lines: Vec<String>,
    /// How many paths there were.
    pub count: u64,
}

impl ForeignReport {
    fn tell(&mut self, path: &RelPath, what: &str) {
        self.count += 1;
        if self.lines.len() < TOLD_MAX {
            self.lines.push(format!("{path}: {what}"));
        }
    }
}

/// One object as it is on the replica.
struct Found<'a> {
    dir: &'a Handle,
    dir_path: &'a RelPath,
    name: &'a EntryName,
    object: &'a Object,
}

impl Found<'_> {
    fn path(&self) -> RelPath {
        self.dir_path.join(self.name)
    }
}

/// A name that the replica has no more: its directory, that one's path, the name, what it meant.
type Gone = (NodeId, RelPath, EntryName, NodeId);

/// A look at one replica.
pub(super) struct Foreign<'a> {
    volume: &'a Volume,
    /// What the replica's tree should be like: its own catalog, or the store's for a fork.
    known: &'a Catalog,
    replica: &'a Site,
    mount: &'a Site,
    copier: Copier<'a>,
    progress: &'a Progress,
    /// What was changed before is not looked at.
    apart_since: Timestamp,
    /// What was changed before may have been in flight.
    left: Option<Timestamp>,
    fork: bool,
    /// Names that are gone, directories before what was in them.
    gone: Vec<Gone>,
    /// What was made in the mount only to become history.
    passing: Vec<(RelPath, EntryName, Kind)>,
    pub report: ForeignReport,
    /// Where something was found: the two sides may differ there.
    pub touched: DirtySet,
}

impl<'a> Foreign<'a> {
    pub fn new(
        volume: &'a Volume,
        known: &'a Catalog,
        (replica, mount): (&'a Site, &'a Site),
        progress: &'a Progress,
        (apart_since, left, fork): (Timestamp, Option<Timestamp>, bool),
    ) -> Foreign<'a> {
        Foreign {
            volume,
            known,
            replica,
            mount,
            copier: Copier::direct(replica, mount, progress),
            progress,
            apart_since,
            left,
            fork,
            gone: Vec::new(),
            passing: Vec::new(),
            report: ForeignReport::default(),
            touched: DirtySet::default(),
        }
    }

    /// Looks at all of the tree and takes in what is found.
    pub fn run(&mut self) -> Result<()> {
        let mut waiting = vec![(NodeId::ROOT, RelPath::root())];
        while let Some((node, path)) = waiting.pop() {
            self.dir(node, &path, &mut waiting)?;
        }
        // Children before their directories.
        let gone = std::mem::take(&mut self.gone);
        self.take_removals(gone)?;
        for (dir, name, kind) in std::mem::take(&mut self.passing).into_iter().rev() {
            let handle = self.mount.dir(&dir)?;
            let backing = &self.mount.backing;
            let removed = match kind {
                Kind::Dir => backing.rmdir(&handle, &name),
                _ => backing.unlink(&handle, &name),
            };
            removed.map_err(Error::from_io)?;
        }
        Ok(())
    }

    fn take_removals(&mut self, gone: Vec<Gone>) -> Result<()> {
        for (parent, dir_path, name, node) in gone.into_iter().rev() {
            self.take_removal(parent, &dir_path, &name, node)?;
        }
        Ok(())
    }

    /// Whether a change of this moment is of others.
    fn is_late(&self, ctime: Timestamp) -> bool {
        ctime >= self.apart_since && self.left.is_none_or(|left| ctime > left)
    }

    fn dir(
        &mut self,
        node: NodeId,
        path: &RelPath,
        waiting: &mut Vec<(NodeId, RelPath)>,
    ) -> Result<()> {
        let dir = self.replica.dir(path)?;
        let mut known: BTreeMap<EntryName, Listed> = BTreeMap::new();
        known.extend(self.known.list(node)?.into_iter().map(|one| (one.name.clone(), one)));
        for entry in self.replica.live_entries(&dir, path)? {
            let name = &entry.name;
            let object = match self.replica.object(&dir, path, name) {
                Err(Error::Io { source, .. }) if is_other_mount(&source) => {
                    known.remove(name);
                    continue;
                }
                other => other?,
            };
            let Some(object) = object else { continue };
            let found = Found { dir: &dir, dir_path: path, name, object: &object };
            match known.remove(name) {
                Some(one) if one.kind == object.stat.kind => {
                    if self.is_late(object.stat.ctime) {
                        self.touch(node, &one);
                        self.patiently(&found, |own| own.compare(&found, node, one.node))?;
                    }
                    if one.kind == Kind::Dir {
                        waiting.push((one.node, path.join(name)));
                    }
                }
                other => {
                    self.touched.dirs.insert(node);
                    if self.is_late(object.stat.ctime) {
                        if let Some(one) = other.filter(|_| !self.fork) {
                            let earlier = self.gone.len();
                            self.note_gone(node, path, one.name.clone(), &one)?;
                            let gone = self.gone.split_off(earlier);
                            self.take_removals(gone)?;
                        }
                        self.patiently(&found, |own| {
                            let to = own.dir_in_mount(node)?;
                            own.created(&found, &to)
                        })?;
                    }
                }
            }
            self.progress.advance(0, 0)?;
        }
        let stat = self.replica.backing.stat(&dir).map_err(Error::from_io)?;
        if !known.is_empty() {
            self.touched.dirs.insert(node);
        }
        if self.is_late(stat.ctime) && !self.fork {
            for (name, one) in known {
                self.note_gone(node, path, name, &one)?;
            }
        }
        Ok(())
    }

    /// Does `take`, again if the mount's tree was changed under its hands.
    fn patiently(
        &mut self,
        found: &Found<'_>,
        mut take: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        for _ in 0..TRIES {
            match take(self) {
                Err(error) if is_moved(&error) => {}
                outcome => return outcome,
            }
        }
        self.told(&found.path(), "changed here again and again: what differs goes to quarantine")
    }

    fn touch(&mut self, parent: NodeId, one: &Listed) {
        match one.kind {
            Kind::Dir => self.touched.dirs.extend([parent, one.node]),
            _ => {
                self.touched.dirs.insert(parent);
                self.touched.files.insert(one.node);
            }
        }
    }

    /// A name is gone, with all that was below it.
    fn note_gone(
        &mut self,
        parent: NodeId,
        path: &RelPath,
        name: EntryName,
        one: &Listed,
    ) -> Result<()> {
        let below = path.join(&name);
        self.gone.push((parent, path.clone(), name, one.node));
        if one.kind == Kind::Dir {
            for child in self.known.list(one.node)? {
                let name = child.name.clone();
                self.note_gone(one.node, &below, name, &child)?;
            }
        }
        Ok(())
    }

    /// An object that both the replica and its catalog have.
    fn compare(&mut self, found: &Found<'_>, parent: NodeId, node: NodeId) -> Result<()> {
        let Some(row) = self.known.node(node)? else { return Ok(()) };
        // What programs are writing here is a change of ours, and becomes a version before another
        // takes its place.
        self.volume.seal_written(node)?;
        let same = same_state(&row, &found.object.stat)
            && *self.known.xattrs(row.xattrs)? == found.object.xattrs
            && self.same_target(node, found.object)?;
        if same {
            if !self.has_other_bytes(found, node, &row)? {
                return Ok(());
            }
            // Unless they are others because a program wrote here meanwhile.
            self.volume.seal_written(node)?;
            if self.volume.catalog().node(node)?.as_ref() != Some(&row) {
                return Ok(());
            }
        }
        let own = self.volume.catalog().node(node)?;
        let path = found.path();
        let Some(own) = own else {
            let to = self.dir_in_mount(parent)?;
            return self.created(found, &to);
        };
        if same_state(&own, &found.object.stat)
            && *self.volume.catalog().xattrs(own.xattrs)? == found.object.xattrs
            && !same
        {
            // What an earlier look took in.
            return Ok(());
        }
        let Some((dir, name)) = self.volume.nodes.place(self.volume.catalog(), node)? else {
            return if node == NodeId::ROOT { Ok(()) } else { self.told(&path, "not taken in") };
        };
        if self.fork {
            return self.keep_version(found, (dir, &name));
        }
        let changed_here = own != row;
        if changed_here && own.mtime >= found.object.stat.mtime {
            return self.keep_version(found, (dir, &name));
        }
        let to = self.volume.path_of(dir)?;
        self.put(found, &to, &name)?;
        self.told(
            &path,
            match changed_here {
                true => {
                    "changed there and here; what was changed there is newer and live, what was \
                     changed here is a version"
                }
                false => "changed there; it is live, and what it was is a version",
            },
        )
    }

    fn same_target(&self, node: NodeId, object: &Object) -> Result<bool> {
        Ok(object.stat.kind != Kind::Symlink
            || self.known.symlink_target(node)?.as_deref() == Some(&object.target[..]))
    }

    /// Whether a file that was touched has other bytes, though size and time are the recorded ones.
    fn has_other_bytes(&self, found: &Found<'_>, node: NodeId, row: &NodeRow) -> Result<bool> {
        if row.kind != Kind::File || row.size == 0 || row.size != found.object.stat.size {
            return Ok(false);
        }
        let catalog = self.volume.catalog();
        if catalog.node(node)?.as_ref() != Some(row) {
            return Ok(false);
        }
        let Some((dir, name)) = self.volume.nodes.place(catalog, node)? else { return Ok(false) };
        let path = self.volume.path_of(dir)?;
        let differs = || -> std::io::Result<bool> {
            let dir = self.mount.backing.open_dir(&path)?;
            let own = self.mount.backing.open_file(&dir, &name, Access::Read)?;
            let other = self.replica.backing.open_file(found.dir, found.name, Access::Read)?;
            let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
            let mut at = 0;
            while at < row.size {
                let count = self.mount.backing.read_at(&own, &mut a, at)?;
                if self.replica.backing.read_at(&other, &mut b, at)? != count || count == 0 {
                    return Ok(true);
                }
                if a[..count] != b[..count] {
                    return Ok(true);
                }
                at += count as u64;
            }
            Ok(false)
        };
        match differs().map_err(Error::from_io) {
            // It is being changed here: what there is to compare it with is gone.
            Err(error) if is_moved(&error) => Ok(false),
            outcome => outcome,
        }
    }

    /// An object that somebody made, with all below it.
    fn created(&mut self, found: &Found<'_>, to: &RelPath) -> Result<()> {
        let dir = self.mount.dir(to)?;
        let there = self.mount.object(&dir, to, found.name)?;
        let path = found.path();
        match &there {
            None => {
                self.put(found, to, found.name)?;
                match self.fork {
                    true => {
                        let kind = found.object.stat.kind;
                        self.passing.push((to.clone(), found.name.clone(), kind));
                        self.told(&path, "only there; it is kept as deleted")?;
                    }
                    false => self.told(&path, "new there; it is live")?,
                }
            }
            Some(there) if there.stat.kind == Kind::Dir && found.object.stat.kind == Kind::Dir => {}
            Some(there) if there.stat.kind != found.object.stat.kind => {
                return self.told(&path, "another kind of object there; it goes to quarantine");
            }
            Some(there) => {
                let (own, other) = (&there.stat, &found.object.stat);
                let equal =
                    (own.size, own.mtime, own.mode) == (other.size, other.mtime, other.mode);
                if !equal || there.target != found.object.target {
                    let above = self.node_at(to)?;
                    if self.fork || own.mtime >= other.mtime {
                        return self.keep_version(found, (above, found.name));
                    }
                    self.put(found, to, found.name)?;
                    self.told(&path, "made there and here; what was made there is newer and live")?;
                }
            }
        }
        if found.object.stat.kind == Kind::Dir {
            let to = to.join(found.name);
            let dir = self.replica.dir(&path)?;
            for entry in self.replica.live_entries(&dir, &path)? {
                let name = &entry.name;
                if let Some(object) = self.replica.object(&dir, &path, name)? {
                    let below = Found { dir: &dir, dir_path: &path, name, object: &object };
                    self.created(&below, &to)?;
                }
                self.progress.advance(0, 0)?;
            }
            if there.is_none() {
                let own = self.mount.dir(&to)?;
                self.copier.set_attributes(&own, &to, found.object)?;
            }
        }
        Ok(())
    }

    /// A name that somebody removed.
    fn take_removal(
        &mut self,
        parent: NodeId,
        dir_path: &RelPath,
        name: &EntryName,
        node: NodeId,
    ) -> Result<()> {
        let catalog = self.volume.catalog();
        let path = dir_path.join(name);
        // Gone here as well, or renamed.
        if catalog.lookup(parent, name)?.map(|(own, _)| own) != Some(node) {
            return Ok(());
        }
        self.volume.seal_written(node)?;
        let (Some(row), Some(own)) = (self.known.node(node)?, catalog.node(node)?) else {
            return Ok(());
        };
        if own.kind != Kind::Dir && own != row {
            return self.told(&path, "removed there and changed here; it stays");
        }
        let to = self.volume.path_of(parent)?;
        let dir = self.mount.dir(&to)?;
        let removed = match own.kind {
            Kind::Dir => self.mount.backing.rmdir(&dir, name),
            _ => self.mount.backing.unlink(&dir, name),
        };
        match removed {
            Ok(()) => self.told(&path, "removed there; it is kept as deleted"),
            Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {
                self.told(&path, "removed there; it stays for what was made in it here")
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::from_io(error)),
        }
    }

    /// The path in the mount of a directory that the replica has; made anew if it is gone here.
    fn dir_in_mount(&mut self, node: NodeId) -> Result<RelPath> {
        if node == NodeId::ROOT {
            return Ok(RelPath::root());
        }
        if self.volume.catalog().node(node)?.is_some() {
            return self.volume.path_of(node);
        }
        let names = self.known.names(node)?;
        let Some((parent, name)) = names.into_iter().next() else { return Ok(RelPath::root()) };
        let above = self.dir_in_mount(parent)?;
        let dir = self.mount.dir(&above)?;
        match self.mount.backing.mkdir(&dir, &name, 0o755, own_creds()) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                Err(Error::from_io(error))
            }
            _ => Ok(above.join(&name)),
        }
    }

    fn node_at(&self, path: &RelPath) -> Result<NodeId> {
        let mut at = NodeId::ROOT;
        for name in path.names() {
            let found = self.volume.catalog().lookup(at, name)?;
            at = found.ok_or(Error::Posix(Errno::NOENT))?.0;
        }
        Ok(at)
    }

    /// Copies an object into the mount, over what is there.
    fn put(&mut self, found: &Found<'_>, to: &RelPath, name: &EntryName) -> Result<()> {
        let (backing, object) = (&self.mount.backing, found.object);
        let dir = self.mount.dir(to)?;
        let path = to.join(name);
        let there = backing.stat_at(&dir, name).is_ok();
        let io = Error::from_io;
        let node = match object.stat.kind {
            Kind::File => {
                if there {
                    self.volume.seal_written(self.node_at(&path)?)?;
                }
                let file = match there {
                    true => backing.open_file(&dir, name, Access::ReadWrite).map_err(io)?,
                    false => backing.create(&dir, name, 0o600, own_creds()).map_err(io)?,
                };
                let size = object.stat.size;
                let same = there && backing.stat(&file).map_err(io)?.mtime == object.stat.mtime;
                // With another mode or owner alone no byte has to be written.
                if !same || self.copier.bytes_differ(found.dir, found.name, &file)? {
                    backing.truncate(&file, 0).map_err(io)?;
                    self.copier.write_into(found.dir, found.dir_path, found.name, size, &file)?;
                }
                file
            }
            Kind::Dir => {
                if !there {
                    backing.mkdir(&dir, name, 0o700, own_creds()).map_err(io)?;
                }
                self.mount.dir(&path)?
            }
            kind => {
                if there {
                    backing.unlink(&dir, name).map_err(io)?;
                }
                match kind {
                    Kind::Symlink => backing.symlink(&dir, name, &object.target, own_creds()),
                    kind => backing.mknod(&dir, name, kind, 0o600, object.stat.rdev, own_creds()),
                }
                .map_err(io)?;
                backing.open_node(&dir, name).map_err(io)?
            }
        };
        self.copier.set_attributes(&node, &path, object)
    }

    fn keep_version(&mut self, found: &Found<'_>, place: (NodeId, &EntryName)) -> Result<()> {
        let path = found.path();
        if found.object.stat.kind == Kind::Dir {
            return self.told(&path, "attributes differ there; those here stay");
        }
        let from = (self.replica, found.dir, found.name);
        self.volume.add_passing_version(place, from, found.object)?;
        self.told(
            &path,
            "changed there and here; what is here stays live, what was there is a version",
        )
    }

    fn told(&mut self, path: &RelPath, what: &str) -> Result<()> {
        log::warn!("{}: {path}: {what}", self.replica.path.display());
        self.report.tell(path, what);
        Ok(())
    }
}

/// Whether an error says that what a path led to is elsewhere by now.
fn is_moved(error: &Error) -> bool {
    matches!(error.to_errno(), Errno::NOENT | Errno::STALE | Errno::NOTDIR)
}

/// Whether an object is as it was recorded, by all that a look at its attributes tells. Times of
/// directories change with what is in them.
fn same_state(row: &NodeRow, stat: &Stat) -> bool {
    let mode = |mode| if row.kind == Kind::Symlink { 0 } else { mode };
    (row.kind, mode(row.mode), row.uid, row.gid, row.rdev)
        == (stat.kind, mode(stat.mode), stat.uid, stat.gid, stat.rdev)
        && (row.kind == Kind::Dir
            || row.mtime == stat.mtime && (row.kind != Kind::File || row.size == stat.size))
}

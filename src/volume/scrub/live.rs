//! Looking at live objects: every copy against the record, and which copies are good.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use crate::catalog::digest::{Digest, digest_of};
use crate::error::Result;
use crate::history::ranges::ByteRange;
use crate::replica::backing::{Access, Backing, Handle};
use crate::store::record::Record;
use crate::store::site::Object;
use crate::types::{ContentId, EntryName, Kind, NodeId, PRIVATE_DIR, RelPath, ReplicaId};
use crate::volume::Volume;
use crate::volume::digest::PIECE_BYTES;
use crate::volume::nodes::{Node, State};

use super::{Outcome, Trouble, Work};

/// How looking at an object ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Looked {
    /// It is as it should be, or what could be done about it was.
    Done,
    /// It is being changed.
    Busy,
}

/// What the catalog has of an object that nobody is changing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Standing {
    pub record: Record,
    pub digest: Option<Digest>,
    pub stamp: u64,
    pub path: RelPath,
}

/// One replica's copy of an object.
#[derive(Debug)]
pub(super) struct Copy {
    pub on: ReplicaId,
    /// What is there; `None` if nothing is.
    pub object: Option<Object>,
    /// The digest of a file that was read.
    pub digest: Option<Digest>,
    /// Why it could not be looked at.
    pub error: Option<io::Error>,
}

impl Copy {
    /// Whether nothing but what the record tells, apart from the bytes, is to be seen.
    fn is_recorded(&self, record: &Record) -> bool {
        let stat = self.object.as_ref().map(|object| object.stat);
        stat.is_some_and(|stat| {
            (stat.kind, stat.size, stat.mtime) == (Kind::File, record.row.size, record.row.mtime)
        })
    }
}

/// Which copies of a file have the right bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Those for which it is `true`, in the order of the copies.
    Good(Vec<bool>),
    /// They differ, and nothing tells which is right.
    Conflict,
}

/// Judges the copies of a file.
pub(super) fn judge(standing: &Standing, copies: &[Copy]) -> Verdict {
    if let Some(digest) = standing.digest {
        return Verdict::Good(copies.iter().map(|copy| copy.digest == Some(digest)).collect());
    }
    // No digest: of the copies that look as recorded those with the same bytes stand together.
    let mut groups: HashMap<Digest, usize> = HashMap::new();
    for copy in copies.iter().filter(|copy| copy.is_recorded(&standing.record)) {
        if let Some(digest) = copy.digest {
            *groups.entry(digest).or_default() += 1;
        }
    }
    let winner = match groups.len() {
        1 => groups.keys().next().copied(),
        _ => groups.iter().find(|(_, count)| **count * 2 > copies.len()).map(|(one, _)| *one),
    };
    match winner {
        Some(winner) => Verdict::Good(
            copies
                .iter()
                .map(|copy| copy.digest == Some(winner) && copy.is_recorded(&standing.record))
                .collect(),
        ),
        None if groups.len() > 1 => Verdict::Conflict,
        None => Verdict::Good(vec![false; copies.len()]),
    }
}

/// Opens an object on one replica by its path; `None` where there is none.
pub(super) fn find(
    b: &dyn Backing,
    path: &RelPath,
) -> io::Result<Option<(Handle, Option<EntryName>, Object)>> {
    let absent = |error: &io::Error| {
        matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP))
    };
    let (parent, name) = match path.split_last() {
        Some((parent, name)) => (parent, Some(name.clone())),
        None => (RelPath::root(), None),
    };
    let dir = match b.open_dir(&parent) {
        Err(error) if absent(&error) => return Ok(None),
        dir => dir?,
    };
    let node = match &name {
        None => b.open_dir(path)?,
        Some(name) => match b.open_node(&dir, name) {
            Err(error) if absent(&error) => return Ok(None),
            node => node?,
        },
    };
    let stat = b.stat(&node)?;
    let xattrs = b.xattrs(&node)?;
    let target = if stat.kind == Kind::Symlink { b.readlink(&node)? } else { Vec::new() };
    Ok(Some((dir, name, Object { stat, xattrs, target })))
}

impl Work<'_> {
    /// Looks at one live object, and heals what is wrong with it.
    pub(super) fn node(&mut self, id: NodeId) -> Result<Looked> {
        let volume = self.volume;
        let Ok(node) = volume.node(id) else { return Ok(Looked::Done) };
        let found = self.run.found;
        let looked = match node.kind {
            Kind::Dir => self.dir(&node),
            _ => self.object(&node),
        };
        if self.run.found > found {
            volume.tell_healed(id);
        }
        volume.nodes.let_go(node);
        match looked {
            // Gone meanwhile.
            Err(error) if error.is(Errno::NOENT) => Ok(Looked::Done),
            Err(error) if error.is(Errno::STALE) => Ok(Looked::Done),
            looked => looked,
        }
    }

    /// What the catalog has of a node, if nobody is changing it.
    pub(super) fn standing(&self, node: &Node, state: &State) -> Result<Option<Standing>> {
        let volume = self.volume;
        let dirty = state.open.as_ref().is_some_and(|open| open.dirty);
        let due = node.kind == Kind::Dir && volume.stale_dirs.lock().contains(&node.id);
        if state.orphan || dirty || due {
            return Ok(None);
        }
        let catalog = volume.catalog();
        let Some(row) = catalog.node(node.id)? else { return Err(Errno::NOENT.into()) };
        let digest = match row.content {
            ContentId::EMPTY => None,
            content => catalog.digest(content)?,
        };
        let record = Record {
            xattrs: catalog.xattrs(row.xattrs)?.as_ref().clone(),
            target: catalog.symlink_target(node.id)?.unwrap_or_default(),
            names: catalog.names(node.id)?.len() as u32,
            row,
        };
        Ok(Some(Standing { record, digest, stamp: state.stamp, path: volume.path_of(node.id)? }))
    }

    /// Looks at every copy; with `read` at the bytes of files too, past the page cache.
    pub(super) fn look(&mut self, standing: &Standing, read: bool) -> Result<Vec<Copy>> {
        let volume = self.volume;
        let mut copies = Vec::new();
        for on in volume.replicas().online() {
            let b = volume.replicas().backing(on);
            let mut copy = Copy { on, object: None, digest: None, error: None };
            match find(&*b, &standing.path) {
                Ok(Some((dir, name, object))) => {
                    let is_file = object.stat.kind == Kind::File;
                    copy.object = Some(object);
                    if let (true, true, Some(name)) = (read, is_file, name) {
                        match self.digest_on(&*b, &dir, &name, None)? {
                            Ok(digest) => copy.digest = Some(digest),
                            Err(error) => copy.error = Some(error),
                        }
                    }
                }
                Ok(None) => {}
                Err(error) => copy.error = Some(error),
            }
            copies.push(copy);
        }
        Ok(copies)
    }

    /// The digest of a file on one replica, or of parts of it, all of which it must have.
    pub(super) fn digest_on(
        &mut self,
        b: &dyn Backing,
        dir: &Handle,
        name: &EntryName,
        parts: Option<&[ByteRange]>,
    ) -> Result<io::Result<Digest>> {
        let file = match b.open_file(dir, name, Access::Read) {
            Ok(file) => file,
            Err(error) => return Ok(Err(error)),
        };
        b.forget_cached(&file);
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; PIECE_BYTES];
        for part in parts.unwrap_or(&[ByteRange { start: 0, end: u64::MAX }]) {
            let mut left = *part;
            while !left.is_empty() {
                let wanted = left.len().min(PIECE_BYTES as u64) as usize;
                let count = match b.read_at(&file, &mut buffer[..wanted], left.start) {
                    Ok(count) => count,
                    Err(error) => return Ok(Err(error)),
                };
                hasher.update(&buffer[..count]);
                left.start += count as u64;
                self.took(count as u64)?;
                if count < wanted {
                    break;
                }
            }
            if parts.is_some() && !left.is_empty() {
                return Ok(Err(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Ok(Ok(digest_of(&hasher)))
    }

    /// Whether every copy is as recorded.
    fn is_sound(&self, node: &Node, standing: &Standing, copies: &[Copy]) -> Result<bool> {
        let recorded = |copy: &Copy| {
            copy.error.is_none()
                && copy.object.as_ref().is_some_and(|o| standing.record.differences(o).is_empty())
        };
        if !copies.iter().all(recorded) {
            return Ok(false);
        }
        let bytes = node.kind != Kind::File
            || judge(standing, copies) == Verdict::Good(vec![true; copies.len()]);
        Ok(bytes && (standing.record.names < 2 || self.broken_links(node, copies)?.is_empty()))
    }

    /// The replicas on which the names of a node are not those of one file.
    pub(super) fn broken_links(&self, node: &Node, copies: &[Copy]) -> Result<Vec<ReplicaId>> {
        let mut paths = Vec::new();
        for (parent, name) in self.volume.catalog().names(node.id)? {
            paths.push(self.volume.path_of(parent)?.join(&name));
        }
        let mut broken = Vec::new();
        for copy in copies {
            let Some(object) = &copy.object else { continue };
            let b = self.volume.replicas().backing(copy.on);
            let same = |path: &RelPath| match find(&*b, path) {
                Ok(Some((_, _, other))) => other.stat.ino == object.stat.ino,
                _ => false,
            };
            if !paths.iter().all(same) {
                broken.push(copy.on);
            }
        }
        Ok(broken)
    }

    /// Looks at an object that is no directory.
    fn object(&mut self, node: &Arc<Node>) -> Result<Looked> {
        let volume = self.volume;
        let standing = self.standing(node, &volume.lock(node))?;
        let Some(standing) = standing else { return Ok(Looked::Busy) };
        let copies = self.look(&standing, true)?;
        if self.is_sound(node, &standing, &copies)? {
            let content = standing.record.row.content;
            if let (None, Some(digest)) = (standing.digest, copies.first().and_then(|c| c.digest))
                && content != ContentId::EMPTY
                && self.standing(node, &volume.lock(node))?.as_ref() == Some(&standing)
            {
                // All replicas have the same bytes: nothing can be known better.
                volume.record_digest(content, digest)?;
            }
            return Ok(Looked::Done);
        }
        let edits = {
            let _cut = volume.cut.read();
            let _entries = volume.lock_parent(node)?;
            let mut state = volume.lock(node);
            let _tree = volume.tree.read();
            if self.standing(node, &state)?.as_ref() != Some(&standing) {
                return Ok(Looked::Busy);
            }
            // What was read counts if nothing was touched since.
            let again = self.look(&standing, false)?;
            let untouched = again.len() == copies.len()
                && again.iter().zip(&copies).all(|(a, b)| (a.on, &a.object) == (b.on, &b.object));
            if !untouched {
                return Ok(Looked::Busy);
            }
            self.heal_object(node, &mut state, &standing, &copies)?
        };
        for edit in edits {
            self.adopt(node, edit)?;
        }
        Ok(Looked::Done)
    }

    /// Looks at a directory: its entries on every replica, then its attributes.
    fn dir(&mut self, node: &Arc<Node>) -> Result<Looked> {
        let volume = self.volume;
        let standing = self.standing(node, &volume.lock(node))?;
        let Some(standing) = standing else { return Ok(Looked::Busy) };
        let mut looked = Looked::Done;
        let copies = self.look(&standing, false)?;
        let absent = |copy: &Copy| {
            copy.error.is_none()
                && copy.object.as_ref().is_none_or(|object| object.stat.kind != Kind::Dir)
        };
        if node.id != NodeId::ROOT && copies.iter().any(absent) {
            let copies: Vec<&Copy> = copies.iter().filter(|copy| absent(copy)).collect();
            if self.make_dirs(node, &standing, &copies)? == Looked::Busy {
                return Ok(Looked::Busy);
            }
        }
        for on in volume.replicas().online().collect::<Vec<_>>() {
            if self.entries(node, &standing.path, on)? == Looked::Busy {
                looked = Looked::Busy;
            }
        }
        let _cut = volume.cut.read();
        let _entries = volume.lock_dir(node.id);
        let state = volume.lock(node);
        let _tree = volume.tree.read();
        match self.standing(node, &state)? {
            Some(standing) => {
                let copies = self.look(&standing, false)?;
                self.heal_attributes(&standing, &copies)?;
                Ok(looked)
            }
            None => Ok(Looked::Busy),
        }
    }

    /// Compares the entries of a directory on one replica with the catalog's.
    fn entries(&mut self, node: &Arc<Node>, path: &RelPath, on: ReplicaId) -> Result<Looked> {
        let volume = self.volume;
        let b = volume.replicas().backing(on);
        let place = volume.replicas().get(on).path.join(shown_path(path));
        let listed = match b.open_dir(path).and_then(|dir| b.list(&dir)) {
            Ok(listed) => listed,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Looked::Done),
            Err(error) => {
                let detail = error.to_string();
                self.note(on, &place, Trouble::Unreadable, Outcome::Unhealed, detail);
                return Ok(Looked::Done);
            }
        };
        let there: HashSet<EntryName> = listed.into_iter().map(|entry| entry.name).collect();
        let known = volume.catalog().list(node.id)?;
        let mut looked = Looked::Done;
        for entry in known.iter().filter(|entry| !there.contains(&entry.name)) {
            if self.node(entry.node)? == Looked::Busy {
                looked = Looked::Busy;
            }
        }
        let known: HashSet<EntryName> = known.into_iter().map(|entry| entry.name).collect();
        let is_ours = |name: &EntryName| {
            let name = name.as_bytes();
            node.id == NodeId::ROOT && (name == PRIVATE_DIR.as_bytes() || name == b"lost+found")
        };
        for name in there.iter().filter(|name| !known.contains(*name) && !is_ours(name)) {
            self.set_aside_extra(node, path, on, name)?;
        }
        Ok(looked)
    }

    /// Notes a finding on one replica.
    pub(super) fn note(
        &mut self,
        on: ReplicaId,
        place: &std::path::Path,
        trouble: Trouble,
        outcome: Outcome,
        detail: impl Into<String>,
    ) {
        use std::os::unix::ffi::OsStrExt;
        self.volume.replicas().count_checksum_error(on);
        let place = crate::types::escape(place.as_os_str().as_bytes());
        self.run.note(super::ScrubFinding { place, trouble, outcome, detail: detail.into() });
    }
}

/// A path below a backing as the operating system takes it.
pub(super) fn shown_path(path: &RelPath) -> std::path::PathBuf {
    use std::os::unix::ffi::OsStrExt;
    match path.is_root() {
        true => std::path::PathBuf::new(),
        false => std::path::PathBuf::from(std::ffi::OsStr::from_bytes(&path.to_bytes())),
    }
}

impl Volume {
    /// The full path of a live object on one replica, for people.
    pub(super) fn place_on(&self, on: ReplicaId, path: &RelPath) -> std::path::PathBuf {
        self.replicas().get(on).path.join(shown_path(path))
    }
}

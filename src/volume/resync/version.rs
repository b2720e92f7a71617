//! A state that a path is given for one moment of history, without a change of what is live.

use crate::catalog::Change;
use crate::error::{Error, Result};
use crate::history::{OWN, preserved_dir, preserved_name};
use crate::replica::Handles;
use crate::replica::backing::{Access, Backing, Handle};
use crate::replica::guarded::Directly;
use crate::replica::intent::Dirty;
use crate::store::row_of;
use crate::store::site::{Object, Site};
use crate::types::{ContentId, EntryName, Kind, NodeId};

use super::super::Volume;
use super::super::excludes::entry;

/// Bytes copied at a time.
const COPY_BYTES: usize = 1 << 20;

impl Volume {
    /// Makes a version of what was written to a file and is none yet, though it is open.
    pub(super) fn seal_written(&self, id: NodeId) -> Result<()> {
        let _bounded = Directly::off();
        let _cut = self.cut.read();
        let unsealed = self.unsealed.lock().get(&id).cloned();
        unsealed.map_or(Ok(()), |node| self.seal(&node, &mut self.lock(&node)))
    }

    /// Makes an object of elsewhere a version of the path `name` in `parent`: history shows it
    /// there for one generation, and then again what is live.
    ///
    /// If we die before the push, a file that nobody knows is left in `preserved/`.
    pub(super) fn add_passing_version(
        &self,
        (parent, name): (NodeId, &EntryName),
        (from, from_dir, from_name): (&Site, &Handle, &EntryName),
        object: &Object,
    ) -> Result<()> {
        let _bounded = Directly::off();
        let _cut = self.cut.read();
        let intent = self.intend(&[Dirty::Dir(parent)])?;
        let _entries = self.lock_dir(parent);
        let id = self.catalog().next_node();
        intent.born(id);
        let has_bytes = object.stat.kind == Kind::File && object.stat.size > 0;
        let content = match has_bytes {
            true => self.catalog().next_content(),
            false => ContentId::EMPTY,
        };
        if has_bytes {
            self.ensure_room(object.stat.size)?;
            let file = from.backing.open_file(from_dir, from_name, Access::Read);
            let file = file.map_err(Error::from_io)?;
            self.preserve_copy((from, &file), (id, content), object.stat.size)?;
        }
        let xattrs = self.catalog().intern_xattrs(&object.xattrs)?;
        let row = row_of(id, &object.stat, xattrs, content);
        let live = self.catalog().lookup(parent, name)?;
        let excluded = self.catalog().entry_is_versioned(parent, name)? == Some(false);
        let remove = || Change::EntryRemove { parent, name: name.clone() };
        let mut first = Vec::new();
        let mut then = vec![remove(), Change::NodeGone(id)];
        if live.is_some() {
            first.push(remove());
        }
        first.push(Change::NodePut(row));
        if object.stat.kind == Kind::Symlink {
            first.push(Change::SymlinkTarget { node: id, target: object.target.clone() });
        }
        if has_bytes {
            let size = object.stat.size;
            first.push(Change::ContentAdd { id: content, node: id, size });
            then.push(Change::ContentPreserved { id: content, cloned: false });
        }
        first.push(Change::EntryAdd { parent, name: name.clone(), node: id });
        if let Some((live, _)) = live {
            then.push(entry(parent, name, live, excluded));
        }
        self.catalog().push_groups(None, [first, then])?;
        Ok(())
    }

    /// Copies a file into `preserved/` on every replica; durable when it returns.
    fn preserve_copy(
        &self,
        (from, file): (&Site, &Handle),
        (node, content): (NodeId, ContentId),
        size: u64,
    ) -> Result<()> {
        let replicas = self.replicas();
        let dir = replicas.private(preserved_dir(node))?;
        let name = preserved_name(node, content);
        let made = replicas.apply("create", |id, b| b.create(dir.get(id)?, &name, 0o600, OWN))?;
        let made = Handles::from(made);
        let mut buffer = vec![0; COPY_BYTES];
        let mut at = 0;
        while at < size {
            let length = buffer.len().min((size - at) as usize);
            let got = from.backing.read_at(file, &mut buffer[..length], at);
            let got = got.map_err(Error::from_io)?;
            // What it lost under our hands reads as zeros.
            buffer[got..length].fill(0);
            let data = &buffer[..length];
            replicas.apply("write", |id, b| b.write_at(made.get(id)?, data, at))?;
            at += length as u64;
        }
        let sync = |id, b: &dyn Backing| {
            b.sync(made.get(id)?, false)?;
            b.sync(dir.get(id)?, false)
        };
        replicas.apply("fsync", sync)?;
        Ok(())
    }
}

//! Reading past contents, which may still lie, in part, in live files.

use std::sync::Arc;

use rustix::io::Errno;

use crate::catalog::Base;
use crate::error::{Error, Result};
use crate::history::{self, Extents, Place};
use crate::replica::backing::{Access, Backing, Handle, Seek};
use crate::types::{ContentId, NodeId, ReplicaId, Timestamp};

use super::Volume;
use super::nodes::{Node, State};

/// How often a base is looked for anew because it moved while it was looked for.
const MOVES_MAX: usize = 8;

/// What holds the bytes that no before-image covers, ready for reading.
enum Opened {
    /// A content that lies whole in `preserved/`, open on one replica.
    Preserved { node: NodeId, content: ContentId, on: ReplicaId, file: Handle },
    /// The live file, and its size and time of change where it is known to be as it was sealed.
    Live(Arc<Node>, Option<(u64, Timestamp)>),
    /// A recipe.
    Packed(ContentId),
}

impl Volume {
    /// Reads a past content of a node; the count is short only at the content's end.
    pub fn read_content(
        &self,
        node: NodeId,
        content: ContentId,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize> {
        self.with_content(node, content, |extents, base| {
            let end = offset.saturating_add(buffer.len() as u64).min(extents.size);
            let mut at = offset;
            while at < end {
                let run = extents.run(at, end);
                let part = (run.range.start - offset) as usize..(run.range.end - offset) as usize;
                let part = &mut buffer[part];
                match run.place {
                    Place::Hole => part.fill(0),
                    Place::Undo(place) => {
                        self.history.read_undo(self.replicas(), self.catalog(), place, part)?;
                    }
                    Place::Base => self.read_base(base()?, run.range.start, part)?,
                }
                at = run.range.end;
            }
            Ok(end.saturating_sub(offset) as usize)
        })
    }

    /// Finds data or a hole in a past content; `ENXIO` at or past its end.
    pub fn seek_content(
        &self,
        node: NodeId,
        content: ContentId,
        offset: u64,
        to: Seek,
    ) -> Result<u64> {
        self.with_content(node, content, |extents, base| {
            if offset >= extents.size {
                return Err(Error::Posix(Errno::NXIO));
            }
            let mut at = offset;
            while at < extents.size {
                let run = extents.run(at, extents.size);
                let (data, end) = match run.place {
                    Place::Hole => (false, run.range.end),
                    Place::Undo(_) => (true, run.range.end),
                    Place::Base => self.base_run(base()?, at, run.range.end)?,
                };
                if data == (to == Seek::Data) {
                    return Ok(at);
                }
                at = end;
            }
            // The end of a file counts as a hole.
            match to {
                Seek::Hole => Ok(extents.size),
                Seek::Data => Err(Error::Posix(Errno::NXIO)),
            }
        })
    }

    /// Does `f` with the extent map of a content. What the map points at may be packed and removed
    /// meanwhile: then a new map finds it in its new place.
    fn with_content<T>(
        &self,
        id: NodeId,
        content: ContentId,
        mut f: impl FnMut(&Extents, &mut dyn FnMut() -> Result<Arc<Opened>>) -> Result<T>,
    ) -> Result<T> {
        let failed = |error: &Error| {
            // The name was there when it was looked up: what is missing is our own file.
            let own = error.is(Errno::NOENT) || error.is(Errno::IO);
            own || matches!(error, Error::Damaged { .. })
        };
        match self.try_content(id, content, &mut f) {
            Err(error) if failed(&error) => {
                self.history.forget_maps();
                match self.try_content(id, content, &mut f) {
                    Err(error) if failed(&error) => {
                        log::error!("content {content} of node {id}: {error}");
                        Err(lost(id, content))
                    }
                    outcome => outcome,
                }
            }
            outcome => outcome,
        }
    }

    /// While `f` runs, the node whose live file may be the base is locked, so that no writer
    /// preserves and overwrites bytes between the map and the read.
    fn try_content<T>(
        &self,
        id: NodeId,
        content: ContentId,
        f: &mut impl FnMut(&Extents, &mut dyn FnMut() -> Result<Arc<Opened>>) -> Result<T>,
    ) -> Result<T> {
        let mut holder = match self.history.kept_base((id, content)) {
            Some(Base::Live(other)) => other,
            _ => id,
        };
        for _ in 0..MOVES_MAX {
            let node = match self.nodes.get(holder) {
                Some(node) => Some(node),
                None => self.catalog().node(holder)?.map(|row| self.nodes.load(holder, row.kind)),
            };
            let outcome = {
                let state = node.as_ref().map(|node| self.lock(node));
                // A dead node that nobody has open does not change any more.
                let stamp = state.as_ref().map_or(0, |state| state.stamp);
                let extents = self.history.extents(self.catalog(), (id, content), stamp)?;
                match extents.base {
                    Base::Live(other) if other != holder => Err(other),
                    _ => {
                        let mut opened: Option<Arc<Opened>> = None;
                        let mut base = || -> Result<Arc<Opened>> {
                            if opened.is_none() {
                                let state = state.as_deref();
                                let found = self.open_base(extents.base, &node, state)?;
                                opened = Some(Arc::new(found));
                            }
                            opened.clone().ok_or_else(|| lost(id, content))
                        };
                        Ok(f(&extents, &mut base))
                    }
                }
            };
            if let Some(node) = node {
                self.nodes.let_go(node);
            }
            match outcome {
                Ok(outcome) => return outcome,
                Err(other) => holder = other,
            }
        }
        Err(Error::Posix(Errno::IO))
    }

    /// Opens a base. `node` is the one whose live file it would be, with its locked state.
    fn open_base(
        &self,
        base: Base,
        node: &Option<Arc<Node>>,
        state: Option<&State>,
    ) -> Result<Opened> {
        Ok(match base {
            Base::Packed(id) => Opened::Packed(id),
            Base::Preserved { node, content } => {
                let (on, file) = history::open_whole(self.replicas(), node, content)?;
                Opened::Preserved { node, content, on, file }
            }
            Base::Live(id) => {
                let node = node.clone().ok_or(Error::Posix(Errno::IO))?;
                let open = state.and_then(|state| state.open.as_ref());
                let sealed = match open {
                    Some(open) if open.dirty => None,
                    Some(open) => Some((open.sealed.size, open.sealed.mtime)),
                    None => self.catalog().node(id)?.map(|row| (row.size, row.mtime)),
                };
                Opened::Live(node, sealed)
            }
        })
    }

    /// Fills `part` from byte `at` of a base on. The base has every byte that no before-image has:
    /// one that ends too early is damaged here and may be whole on another replica.
    fn read_base(&self, base: Arc<Opened>, at: u64, part: &mut [u8]) -> Result<()> {
        if let Opened::Packed(id) = *base {
            return self.history.read_packed(self.replicas(), self.catalog(), id, at, part);
        }
        self.on_file(&base, |b, file| match b.read_at(file, part, at)? {
            got if got < part.len() => Err(std::io::Error::from_raw_os_error(libc::EIO)),
            _ => Ok(()),
        })
    }

    /// Whether data or a hole begins at `at` of a base, and where it ends (at most `limit`).
    fn base_run(&self, base: Arc<Opened>, at: u64, limit: u64) -> Result<(bool, u64)> {
        if let Opened::Packed(id) = *base {
            return self.history.packed_run(self.catalog(), id, at, limit);
        }
        self.on_file(&base, |b, file| history::run_at(b, file, at, limit))
    }

    /// Works on the file that a base is. The node's lock is held by the caller.
    fn on_file<T>(
        &self,
        base: &Opened,
        mut f: impl FnMut(&dyn Backing, &Handle) -> std::io::Result<T>,
    ) -> Result<T> {
        match base {
            Opened::Packed(_) => Err(Error::Posix(Errno::IO)),
            Opened::Preserved { node, content, on, file } => {
                self.replicas().read("read", |id, b| {
                    if id == *on {
                        return f(b, file);
                    }
                    f(b, &history::open_whole_on(self.replicas(), id, *node, *content)?)
                })
            }
            Opened::Live(node, sealed) => {
                let (parent, name) =
                    node.place(self.catalog())?.ok_or(Error::Posix(Errno::STALE))?;
                let dir = self.dir(parent)?;
                self.replicas().read("read", |id, b| {
                    let file = b.open_file(dir.get(id)?, &name, Access::Read)?;
                    let stat = b.stat(&file)?;
                    // Somebody edited this backing behind our back: these are not the bytes that
                    // were sealed. Another replica may still have them.
                    if sealed.is_some_and(|sealed| sealed != (stat.size, stat.mtime)) {
                        return Err(std::io::Error::from_raw_os_error(libc::EIO));
                    }
                    f(b, &file)
                })
            }
        }
    }
}

fn lost(node: NodeId, content: ContentId) -> Error {
    Error::Damaged {
        what: format!("content {content} of node {node}"),
        detail: "no replica that is online holds it as it was".into(),
        remedy: "A replica that is offline may: mount it alone and copy the file.",
    }
}

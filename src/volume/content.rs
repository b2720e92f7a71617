//! Reading past contents, which may still lie, in part, in live files.

use std::sync::Arc;

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::history::{self, Extents, Place};
use crate::replica::backing::{Access, Backing, Handle, Seek};
use crate::types::{ContentId, NodeId, ReplicaId, Timestamp};

use super::Volume;
use super::nodes::Node;

/// The file that holds what no before-image covers.
enum Base {
    /// A content that lies whole in `preserved/`, open on one replica.
    Whole { node: NodeId, content: ContentId, on: ReplicaId, file: Handle },
    /// The live file, and its size and time of change where it is known to be as it was sealed.
    Live(Arc<Node>, Option<(u64, Timestamp)>),
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
                    Place::Undo(place) => self.history.read_undo(self.replicas(), place, part)?,
                    Place::Base => self.on_base(base()?, |b, file| {
                        // The base has every byte that no before-image has. One that ends too
                        // early is damaged here and may be whole on another replica.
                        match b.read_at(file, part, run.range.start)? {
                            got if got < part.len() => {
                                Err(std::io::Error::from_raw_os_error(libc::EIO))
                            }
                            _ => Ok(()),
                        }
                    })?,
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
                    Place::Base => self
                        .on_base(base()?, |b, file| history::run_at(b, file, at, run.range.end))?,
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

    /// Does `f` with the extent map of a content. While it runs the node's lock is held, so that no
    /// writer preserves and overwrites bytes between the map and the read.
    fn with_content<T>(
        &self,
        id: NodeId,
        content: ContentId,
        f: impl FnOnce(&Extents, &mut dyn FnMut() -> Result<Arc<Base>>) -> Result<T>,
    ) -> Result<T> {
        let node = match self.nodes.get(id) {
            Some(node) => Some(node),
            None => self.catalog().node(id)?.map(|row| self.nodes.load(id, row.kind)),
        };
        let outcome = {
            let state = node.as_ref().map(|node| node.lock());
            // A dead node that nobody has open does not change any more.
            let stamp = state.as_ref().map_or(0, |state| state.stamp);
            let extents = self.history.extents(self.catalog(), (id, content), stamp)?;
            let mut opened: Option<Arc<Base>> = None;
            let mut base = || -> Result<Arc<Base>> {
                if let Some(base) = &opened {
                    return Ok(base.clone());
                }
                let base = Arc::new(match extents.whole {
                    Some(whole) => {
                        let (on, file) = history::open_whole(self.replicas(), id, whole)?;
                        Base::Whole { node: id, content: whole, on, file }
                    }
                    None => {
                        let node = node.clone().ok_or_else(|| lost(id, content))?;
                        let open = state.as_ref().and_then(|state| state.open.as_ref());
                        let sealed = match open {
                            Some(open) if open.dirty => None,
                            Some(open) => Some((open.sealed.size, open.sealed.mtime)),
                            None => self.catalog().node(id)?.map(|row| (row.size, row.mtime)),
                        };
                        Base::Live(node, sealed)
                    }
                });
                opened = Some(base.clone());
                Ok(base)
            };
            f(&extents, &mut base)
        };
        if let Some(node) = node {
            drop(node);
            self.nodes.drop_unused(id);
        }
        match outcome {
            // The name was there when it was looked up: what is missing is our own file.
            Err(error) if error.is(Errno::NOENT) || error.is(Errno::IO) => Err(lost(id, content)),
            outcome => outcome,
        }
    }

    /// Reads from the base. The node's lock is held by the caller.
    fn on_base<T>(
        &self,
        base: Arc<Base>,
        mut f: impl FnMut(&dyn Backing, &Handle) -> std::io::Result<T>,
    ) -> Result<T> {
        match &*base {
            Base::Whole { node, content, on, file } => self.replicas().read("read", |id, b| {
                if id == *on {
                    return f(b, file);
                }
                f(b, &history::open_whole_on(self.replicas(), id, *node, *content)?)
            }),
            Base::Live(node, sealed) => {
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

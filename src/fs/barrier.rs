//! The barrier before a snapshot: what programs stored in memory maps reaches the volume.
//!
//! `write(2)` is through when it returns, for the live tree is mounted write-through. A store to a
//! shared map stays in the kernel's page cache, and `syncfs(2)` neither sends nor awaits it on FUSE
//! (kernel commit 76f9377cd2ab); `sync_file_range(2)` on the file does both. Only a file that is
//! open for reading and writing can have such a map, and the map keeps it open.

use std::collections::HashSet;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::{Filesystem, Opened};
use crate::types::NodeId;

impl Filesystem {
    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.options.mountpoint
    }

    /// Makes a request of the mount that costs next to nothing.
    pub fn knock(&self) {
        let _ = rustix::fs::statvfs(&self.options.mountpoint);
    }

    /// Flushes the maps of all files that may have any, by way of the mount. Files that cannot be
    /// reached by a path are in no snapshot.
    pub(super) fn flush_maps(&self) {
        let nodes: HashSet<NodeId> = self
            .opened
            .lock()
            .values()
            .filter_map(|opened| match &**opened {
                Opened::File { node, writable: true, readable: true, .. } => Some(node.id),
                _ => None,
            })
            .collect();
        for node in nodes {
            // A rename meanwhile is met by asking for the path once more.
            if let Err(first) = self.flush_map(node)
                && self.flush_map(node).is_err()
            {
                log::warn!(
                    "node {node} could not be flushed: what programs stored in memory maps of it \
                     may be missing in this snapshot: {first}"
                );
            }
        }
    }

    fn flush_map(&self, node: NodeId) -> std::io::Result<()> {
        let Ok(path) = self.volume.path_of(node) else { return Ok(()) };
        let bytes = path.to_bytes();
        let path = self.options.mountpoint.join(std::ffi::OsStr::from_bytes(&bytes));
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = rustix::fs::open(&path, flags, Mode::empty())?;
        crate::sys::flush_pages(&file)
    }
}

//! The session with the kernel: handshake, threads, end.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuser::{Config, INodeNo, SessionACL};

use super::Fuse;
use crate::error::{Error, Result};
use crate::fs::Filesystem;

/// How the kernel's requests are served.
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// Threads; at least two, since a snapshot flushes files by way of the mount.
    pub threads: usize,
}

/// A mount that is being served.
pub struct Session {
    background: fuser::BackgroundSession,
}

/// Serves the mount of an opened `/dev/fuse`. When it returns, the kernel's handshake is done.
pub fn serve(fs: Arc<Filesystem>, device: OwnedFd, options: &ServeOptions) -> Result<Session> {
    let mut config = Config::default();
    config.n_threads = Some(options.threads.max(2));
    config.clone_fd = true;
    // The kernel itself keeps other users out unless the mount allows them. The library's own check
    // would refuse requests that the kernel makes on its own behalf.
    config.acl = SessionACL::All;
    let session = fuser::Session::from_fd(Fuse { fs: fs.clone() }, device, SessionACL::All, config)
        .and_then(fuser::Session::spawn)
        .map_err(|error| Error::Refused(format!("the kernel's FUSE handshake failed: {error}")))?;
    let notifier = session.notifier();
    fs.on_forget(Box::new(move |dir, name| {
        if let Err(error) = notifier.inval_entry(INodeNo(dir), name) {
            log::warn!("the kernel may still show what it has cached: {error}");
        }
    }));
    Ok(Session { background: session })
}

impl Session {
    /// Waits until the filesystem is unmounted and every request is answered.
    pub fn join(self) -> Result<()> {
        self.background.join().map_err(Error::from_io)
    }
}

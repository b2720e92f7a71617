//! The session with the kernel: handshake, threads, end.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{Config, INodeNo, Notifier, SessionACL};

use super::Fuse;
use super::rings::Rings;
use crate::error::{Error, Result};
use crate::fs::{Filesystem, KernelCache};
use crate::past::Past;

/// How the kernel's requests are served.
#[derive(Clone, Copy, Debug)]
pub struct ServeOptions {
    /// Threads; at least two, since a snapshot flushes files by way of the mount.
    pub threads: usize,
    /// Requests may come over io_uring, if the kernel offers that.
    pub over_rings: bool,
}

/// A mount that is being served.
pub struct Session {
    background: fuser::BackgroundSession,
    rings: Option<Rings>,
}

/// Serves the mount of an opened `/dev/fuse`. When it returns, the kernel's handshake is done.
pub fn serve(fs: Arc<Filesystem>, device: OwnedFd, options: &ServeOptions) -> Result<Session> {
    let mut config = Config::default();
    config.n_threads = Some(options.threads.max(2));
    config.clone_fd = true;
    // The kernel itself keeps other users out unless the mount allows them. The library's own check
    // would refuse requests that the kernel makes on its own behalf.
    config.acl = SessionACL::All;
    let rings_device = device.try_clone().map_err(failed)?;
    let are_rings_agreed = Arc::new(AtomicBool::new(false));
    let fuse = Fuse {
        fs: fs.clone(),
        over_rings: options.over_rings,
        are_rings_agreed: are_rings_agreed.clone(),
    };
    let session = fuser::Session::from_fd(fuse, device, SessionACL::All, config).map_err(failed)?;
    // Before the kernel is told of anything that it could have to forget.
    fs.on_forget(Arc::new(Cache { notifier: session.notifier() }))?;
    let background = session.spawn().map_err(failed)?;
    let rings = match are_rings_agreed.load(Ordering::Relaxed) {
        true => Some(Rings::start(&fs, rings_device, options.threads).map_err(failed)?),
        false => None,
    };
    Ok(Session { background, rings })
}

fn failed(error: std::io::Error) -> Error {
    Error::Refused(format!("the kernel's FUSE handshake failed: {error}"))
}

/// Runs a handler so that a panic costs one request, which is to be answered with EIO, and not the
/// thread.
pub(super) fn guarded<T>(handler: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(handler))
        .inspect_err(|_| log::error!("a request failed by a bug of ours; it was answered with EIO"))
        .ok()
}

/// Runs a handler that changes the names of a directory. Those of snapshots are changed in a thread
/// of its own, for meanwhile the kernel may come with other requests that must be served: a
/// snapshot flushes files by way of the same mount, and the kernel is told of the name that one
/// lost. If no thread can be had, the dropped reply answers EIO.
pub(super) fn guarded_at(parent: u64, handler: impl FnOnce() + Send + 'static) {
    if !Past::owns(parent) {
        guarded(handler);
        return;
    }
    let thread = std::thread::Builder::new().name("rv-snapshot".into());
    if let Err(error) = thread.spawn(|| guarded(handler)) {
        log::error!("cannot start a thread for a snapshot: {error}");
    }
}

/// The kernel's memory of the mount.
struct Cache {
    notifier: Notifier,
}

impl KernelCache for Cache {
    fn forget_name(&self, dir: u64, name: &OsStr) {
        warn(self.notifier.inval_entry(INodeNo(dir), name));
    }

    fn forget_attributes(&self, ino: u64) {
        // An offset below 0 leaves alone what is known of the content.
        warn(self.notifier.inval_inode(INodeNo(ino), -1, 0));
    }

    fn forget_object(&self, ino: u64) {
        // A length of 0 means all of it.
        warn(self.notifier.inval_inode(INodeNo(ino), 0, 0));
    }
}

fn warn(told: std::io::Result<()>) {
    if let Err(error) = told {
        log::warn!("the kernel may still show what it has cached: {error}");
    }
}

impl Session {
    /// Waits until the filesystem is unmounted and every request is answered.
    pub fn join(self) -> Result<()> {
        let ended = self.background.join().map_err(Error::from_io);
        self.rings.into_iter().for_each(Rings::join);
        ended
    }
}

//! What is known of a replica's condition: online or not and why, and what its errors mean.
//!
//! Knows nothing of operations; the rule that ejects a replica is in [`crate::replica`].

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::io::Errno;

use crate::types::{RelPath, Timestamp};

/// Why a replica was taken out of use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The operation that failed on it but not on another.
    pub op: &'static str,
    /// How it failed.
    pub errno: Errno,
    /// On what, where that is known.
    pub path: Option<RelPath>,
    /// When.
    pub at: Timestamp,
}

impl Fault {
    /// A fault of this moment on an unknown path.
    pub fn new(op: &'static str, errno: Errno) -> Fault {
        Fault { op, errno, path: None, at: Timestamp::now() }
    }

    /// The same fault, on `path`.
    pub fn on(self, path: RelPath) -> Fault {
        Fault { path: Some(path), ..self }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed", self.op)?;
        if let Some(path) = &self.path {
            write!(f, " on {path}")?;
        }
        write!(f, ": {}", io::Error::from(self.errno))
    }
}

/// Whether a replica takes part.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum State {
    /// It is read and written.
    #[default]
    Online,
    /// It is neither read nor written until it is admitted again after a resync.
    Offline {
        /// Since when.
        since: Timestamp,
        /// Why.
        fault: Fault,
    },
}

/// A replica's condition at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Health {
    /// Whether it takes part.
    pub state: State,
    /// Reads that failed by the device's fault, since the mount.
    pub read_errors: u64,
    /// Objects that were found damaged on it, since the mount.
    pub checksum_errors: u64,
    /// Changes that failed on this replica and not on another, since the mount.
    pub write_errors: u64,
}

/// The condition of one replica, kept up to date.
#[derive(Default)]
pub(super) struct Record {
    state: Mutex<State>,
    read_errors: AtomicU64,
    write_errors: AtomicU64,
    checksum_errors: AtomicU64,
}

impl Record {
    pub(super) fn snapshot(&self) -> Health {
        Health {
            state: self.state.lock().clone(),
            read_errors: self.read_errors.load(Ordering::Relaxed),
            write_errors: self.write_errors.load(Ordering::Relaxed),
            checksum_errors: self.checksum_errors.load(Ordering::Relaxed),
        }
    }

    pub(super) fn set(&self, state: State) {
        *self.state.lock() = state;
    }

    /// Counts a failed read and returns how many there have been.
    pub(super) fn count_read_error(&self) -> u64 {
        self.read_errors.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn count_checksum_error(&self) {
        self.checksum_errors.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_write_error(&self) {
        self.write_errors.fetch_add(1, Ordering::Relaxed);
    }
}

/// What an error of one replica says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The filesystem's proper answer, which any healthy replica would give.
    Answer,
    /// This process lacks something; it says nothing of the replica.
    Shortage,
    /// The replica's device or filesystem is at fault.
    Device,
}

/// Classifies an errno; one that is unknown here is the device's fault.
pub(super) fn meaning(errno: Errno) -> Meaning {
    match errno {
        Errno::NOENT
        | Errno::EXIST
        | Errno::NOTEMPTY
        | Errno::ACCESS
        | Errno::PERM
        | Errno::INVAL
        | Errno::NAMETOOLONG
        | Errno::LOOP
        | Errno::MLINK
        | Errno::NOTDIR
        | Errno::ISDIR
        | Errno::XDEV
        | Errno::NODATA
        | Errno::RANGE
        | Errno::TOOBIG
        | Errno::OPNOTSUPP
        | Errno::FBIG
        | Errno::TXTBSY
        | Errno::BUSY
        | Errno::NOSPC
        | Errno::DQUOT
        | Errno::NXIO
        | Errno::BADF => Meaning::Answer,
        Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::INTR | Errno::AGAIN => {
            Meaning::Shortage
        }
        _ => Meaning::Device,
    }
}

/// The errno of an I/O error; one that the kernel did not give counts as the device's.
pub(super) fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

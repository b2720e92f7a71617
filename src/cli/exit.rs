//! How commands end.

use crate::error::Error;

/// How a command ends. The numbers are an interface for scripts and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All was done.
    Done = 0,
    /// It failed.
    Failed = 1,
    /// The command was not understood.
    Usage = 2,
    /// It finished, but some items failed; each was named.
    Incomplete = 3,
    /// There is no store here.
    NoStore = 10,
    /// The store or the mountpoint is in use.
    InUse = 11,
    /// A replica is missing or not current.
    Degraded = 20,
    /// Damage was found.
    Damaged = 21,
    /// The user stopped it.
    Interrupted = 130,
}

impl From<&Error> for Exit {
    fn from(error: &Error) -> Exit {
        match error {
            Error::Posix(_)
            | Error::Io { .. }
            | Error::Catalog(_)
            | Error::Refused(_)
            | Error::NotFound(_) => Exit::Failed,
            Error::NoStore(_) => Exit::NoStore,
            Error::InUse(_) => Exit::InUse,
            Error::Damaged { .. } => Exit::Damaged,
            Error::Interrupted => Exit::Interrupted,
        }
    }
}

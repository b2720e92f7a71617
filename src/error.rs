//! The one error type of the library and the one place where an error becomes an errno.
//!
//! A plain POSIX answer (`ENOENT` of a lookup, `EEXIST` of a mkdir) is [`Error::Posix`] and costs
//! nothing; everything that a person has to read carries its path, its backing and the remedy.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

/// What can go wrong below the edge.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A plain answer of the filesystem, handed to the caller as it is.
    #[error("{}", io::Error::from(*.0))]
    Posix(Errno),
    /// A system call on a path of ours failed.
    #[error("{action} {}: {source}", crate::types::escape(path_bytes(.path)))]
    Io {
        /// What was being done, as a verb with its object ("open", "write the marker of").
        action: &'static str,
        /// The path it was done to.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The catalog's database failed.
    #[error("catalog: {0}")]
    Catalog(#[from] rusqlite::Error),
    /// Data of ours is not what it must be.
    #[error("{what} is damaged: {detail}. {remedy}")]
    Damaged {
        /// Which object, with its path.
        what: String,
        /// What is wrong with it.
        detail: String,
        /// What the user can do.
        remedy: &'static str,
    },
    /// There is no store where one is needed.
    #[error("{0}")]
    NoStore(String),
    /// The store or the mountpoint is in use by another mount.
    #[error("{0}")]
    InUse(String),
    /// The request cannot be done as asked; the text says why and what to do.
    #[error("{0}")]
    Refused(String),
    /// Something named by the user is not there; the text says what, and what is near.
    #[error("{0}")]
    NotFound(String),
    /// The user asked for the work to stop.
    #[error("interrupted")]
    Interrupted,
}

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn path_bytes(path: &std::path::Path) -> &[u8] {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes()
}

impl Error {
    /// The errno a program sees for this error. The only such choice in the crate.
    pub fn to_errno(&self) -> Errno {
        match self {
            Error::Posix(errno) => *errno,
            Error::Io { source, .. } => Errno::from_io_error(source).unwrap_or(Errno::IO),
            // The caller's data is fine, our own records are not: EIO is what a disk would say.
            Error::Catalog(_) | Error::Damaged { .. } => Errno::IO,
            Error::NoStore(_) | Error::NotFound(_) => Errno::NOENT,
            Error::InUse(_) => Errno::BUSY,
            Error::Refused(_) => Errno::INVAL,
            Error::Interrupted => Errno::INTR,
        }
    }

    /// A bare system error as the plain answer it is.
    pub fn from_io(error: io::Error) -> Error {
        Error::Posix(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    /// Whether this is the plain POSIX answer `errno`.
    pub fn is(&self, errno: Errno) -> bool {
        matches!(self, Error::Posix(own) if *own == errno)
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        Error::from_io(error)
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Error {
        Error::Posix(errno)
    }
}

impl From<crate::types::BadName> for Error {
    fn from(bad: crate::types::BadName) -> Error {
        match bad {
            crate::types::BadName::TooLong => Error::Posix(Errno::NAMETOOLONG),
            crate::types::BadName::Invalid => Error::Posix(Errno::INVAL),
        }
    }
}

/// Attaches the path and the action to an I/O error, so that none leaves without them.
pub trait IoContext<T> {
    /// See the trait.
    fn context(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn context(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|error| Error::Io { action, path: path.into(), source: error.into() })
    }
}

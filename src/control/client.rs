//! The commands' side of the control socket.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use super::{
    REQUEST_BYTES_MAX, RESPONSE_BYTES_MAX, Request, Response, SOCKET_NAME, open_private,
    read_frame, write_frame,
};
use crate::error::{Error, IoContext, Result};
use crate::sys::patience;
use crate::types::PRIVATE_DIR;

/// How long a backing may take to be looked at.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a daemon may work on one request. Long: a diff over years, a snapshot behind a full
/// disk.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);

/// Connects to the daemon that has `backing` mounted. `NotFound` if there is none, or the backing
/// hangs.
pub fn connect(backing: &Path) -> Result<UnixStream> {
    let own = backing.to_path_buf();
    let connected = patience::within(CONNECT_TIMEOUT, move || connect_at(&own));
    connected.unwrap_or_else(|| Err(unreachable_daemon(backing, Errno::TIMEDOUT.into())))
}

fn connect_at(backing: &Path) -> Result<UnixStream> {
    let dir = backing.join(PRIVATE_DIR);
    let private = open_private(backing).map_err(|error| match error {
        Error::Io { source, .. } => unreachable_daemon(&dir, source),
        other => other,
    })?;
    // A socket's path must be short; through the directory's descriptor every path is.
    let path =
        PathBuf::from(format!("/proc/self/fd/{}/{SOCKET_NAME}", private.as_fd().as_raw_fd()));
    let stream = UnixStream::connect(&path)
        .map_err(|error| unreachable_daemon(&dir.join(SOCKET_NAME), error))?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).context("set up", &dir)?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT)).context("set up", &dir)?;
    Ok(stream)
}

fn unreachable_daemon(path: &Path, error: std::io::Error) -> Error {
    use std::io::ErrorKind::{ConnectionRefused, NotFound, PermissionDenied, TimedOut};
    match error.kind() {
        NotFound | ConnectionRefused | TimedOut => {
            Error::NotFound(format!("no daemon answers at {}", crate::mountpoint::show(path)))
        }
        PermissionDenied => Error::Refused(format!(
            "{} may be used only by root and by the user who mounted the store",
            crate::mountpoint::show(path)
        )),
        _ => Error::Io { action: "connect to", path: path.into(), source: error },
    }
}

/// Connects to the daemon behind the first of `backings` that answers.
pub fn connect_any(backings: &[PathBuf]) -> Result<UnixStream> {
    let mut failure = Error::NotFound("the mount names no backing".into());
    for backing in backings {
        match connect(backing) {
            Ok(stream) => return Ok(stream),
            // A refusal says more than an absence.
            Err(error) if matches!(failure, Error::NotFound(_)) => failure = error,
            Err(_) => {}
        }
    }
    Err(failure)
}

/// Asks the daemon behind the first of `backings` that answers.
pub fn ask(backings: &[PathBuf], request: &Request) -> Result<Response> {
    converse(&mut connect_any(backings)?, request)
}

/// One request and its response; a failure on the other side becomes an error here.
pub fn converse(stream: &mut UnixStream, request: &Request) -> Result<Response> {
    // The server may have refused us and closed already: then what it said counts.
    let sent = write_frame(stream, request, REQUEST_BYTES_MAX);
    match read_frame(stream, RESPONSE_BYTES_MAX) {
        Ok(Response::Failed { kind, text }) => Err(kind.into_error(text)),
        Ok(response) => Ok(response),
        Err(error) => Err(sent.err().unwrap_or(error)),
    }
}

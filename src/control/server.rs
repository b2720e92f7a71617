//! The daemon's side of the control socket: a listener for each backing, a few threads for
//! requests.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::AtFlags;
use rustix::io::Errno;

use super::{REQUEST_BYTES_MAX, RESPONSE_BYTES_MAX, Request, Response, SOCKET_NAME};
use super::{open_private, read_frame, write_frame};
use crate::error::{Error, IoContext, Result};
use crate::mountpoint::show;
use crate::replica::backing::Handle;
use crate::types::PRIVATE_DIR;

/// How long the end waits for a socket to be removed.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a client may take to send its request or to take its answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests in work at one time; more are told to come again.
const CONVERSATIONS_MAX: usize = 16;

/// Answers requests.
pub trait Handler: Send + Sync + 'static {
    /// The answer to one request. Called from several threads.
    fn handle(&self, request: Request) -> Result<Response>;
}

/// A running control server.
pub struct Server {
    listeners: Vec<Listener>,
    conversations: Arc<Conversations>,
}

struct Listener {
    socket: UnixListener,
    /// For texts.
    path: PathBuf,
    /// The private directory, whatever lies at its path meanwhile.
    dir: Handle,
    thread: JoinHandle<()>,
}

/// The threads that are answering.
#[derive(Default)]
struct Conversations {
    threads: Mutex<VecDeque<JoinHandle<()>>>,
}

impl Server {
    /// Listens in every backing of `backings` that can be written. The caller holds the store's
    /// lock, so a socket found there is a dead daemon's. Fails only if no backing can have a
    /// socket.
    pub fn start(backings: &[PathBuf], handler: Arc<dyn Handler>) -> Result<Server> {
        let conversations = Arc::new(Conversations::default());
        let mut listeners = Vec::new();
        let mut failure = None;
        for backing in backings {
            match Listener::start(backing, &handler, &conversations) {
                Ok(listener) => listeners.push(listener),
                Err(error) => {
                    log::warn!("no control socket in {}: {error}", show(backing));
                    failure = Some(error);
                }
            }
        }
        match failure {
            Some(error) if listeners.is_empty() => Err(error),
            _ => Ok(Server { listeners, conversations }),
        }
    }

    /// Stops listening, removes the sockets and waits for the requests in work.
    pub fn stop(self) {
        for listener in self.listeners {
            // Wakes the thread out of accept; it sees the error and ends.
            if let Err(errno) = rustix::net::shutdown(&listener.socket, rustix::net::Shutdown::Both)
            {
                log::warn!("cannot stop listening at {}: {errno}", show(&listener.path));
                continue;
            }
            if listener.thread.join().is_err() {
                log::error!("the control server at {} panicked", show(&listener.path));
            }
            remove(listener.dir, listener.path);
        }
        for thread in self.conversations.threads.lock().drain(..) {
            // A panic was logged by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Removes a socket, without waiting long: its disk may hang.
fn remove(dir: Handle, path: PathBuf) {
    let (end, ended) = crossbeam_channel::bounded(1);
    let shown = show(&path);
    let removing = std::thread::Builder::new().name("control".into()).spawn(move || {
        if let Err(error) = rustix::fs::unlinkat(dir.as_fd(), SOCKET_NAME, AtFlags::empty()) {
            log::warn!("cannot remove {}: {error}", show(&path));
        }
        let _ = end.send(());
    });
    if removing.is_err() || ended.recv_timeout(REMOVE_TIMEOUT).is_err() {
        log::warn!("{shown} is left behind");
    }
}

impl Listener {
    fn start(
        backing: &Path,
        handler: &Arc<dyn Handler>,
        conversations: &Arc<Conversations>,
    ) -> Result<Listener> {
        let path = backing.join(PRIVATE_DIR).join(SOCKET_NAME);
        let dir = open_private(backing)?;
        // A socket's path must be short; through the directory's descriptor every path is.
        let short =
            PathBuf::from(format!("/proc/self/fd/{}/{SOCKET_NAME}", dir.as_fd().as_raw_fd()));
        match rustix::fs::unlinkat(dir.as_fd(), SOCKET_NAME, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error).context("remove the old", path),
        }
        let socket = UnixListener::bind(&short).context("listen at", &path)?;
        // The directory is 0700 already; the mode is the second lock on the door.
        std::fs::set_permissions(&short, std::fs::Permissions::from_mode(0o600))
            .context("protect", &path)?;
        let accepting = socket.try_clone().context("listen at", &path)?;
        let (handler, conversations) = (handler.clone(), conversations.clone());
        let thread = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || accept_all(&accepting, &handler, &conversations))
            .context("start a thread for", &path)?;
        Ok(Listener { socket, path, dir, thread })
    }
}

fn accept_all(
    socket: &UnixListener,
    handler: &Arc<dyn Handler>,
    conversations: &Arc<Conversations>,
) {
    loop {
        match socket.accept() {
            Ok((stream, _)) => conversations.begin(stream, handler.clone()),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            Err(error) => {
                log::warn!("control socket: {error}");
                // Out of descriptors, most likely: give those in work time to end.
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

impl Conversations {
    fn begin(&self, mut stream: UnixStream, handler: Arc<dyn Handler>) {
        let mut threads = self.threads.lock();
        threads.retain(|thread| !thread.is_finished());
        if threads.len() >= CONVERSATIONS_MAX {
            drop(threads);
            let busy = Error::InUse("the daemon is busy with other requests; try again".into());
            refuse(&mut stream, &busy);
            return;
        }
        let spawned = std::thread::Builder::new()
            .name("control-request".into())
            .spawn(move || converse(&mut stream, handler.as_ref()));
        match spawned {
            Ok(thread) => threads.push_back(thread),
            Err(error) => log::warn!("cannot start a thread for a request: {error}"),
        }
    }
}

fn converse(stream: &mut UnixStream, handler: &dyn Handler) {
    if let Err(error) = check_peer(stream) {
        refuse(stream, &error);
        return;
    }
    let response = set_deadlines(stream)
        .and_then(|()| read_frame::<Request>(stream, REQUEST_BYTES_MAX))
        .and_then(|request| {
            log::debug!("control request: {request:?}");
            handler.handle(request)
        })
        .unwrap_or_else(|error| Response::from(&error));
    match write_frame(stream, &response, RESPONSE_BYTES_MAX) {
        Ok(()) => {}
        // Nothing was sent of a response that is too long.
        Err(error @ Error::Refused(_)) => refuse(stream, &error),
        Err(error) => log::debug!("the answer was not taken: {error}"),
    }
}

fn refuse(stream: &mut UnixStream, error: &Error) {
    let sent = set_deadlines(stream)
        .and_then(|()| write_frame(stream, &Response::from(error), RESPONSE_BYTES_MAX));
    if let Err(error) = sent {
        log::debug!("the refusal was not taken: {error}");
    }
}

fn set_deadlines(stream: &UnixStream) -> Result<()> {
    stream
        .set_read_timeout(Some(CLIENT_TIMEOUT))
        .and_then(|()| stream.set_write_timeout(Some(CLIENT_TIMEOUT)))
        .context("set up", SOCKET_NAME)
}

fn check_peer(stream: &UnixStream) -> Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(stream).context("identify", SOCKET_NAME)?;
    if may_speak(peer.uid.as_raw(), rustix::process::geteuid().as_raw()) {
        return Ok(());
    }
    Err(Error::Refused("only root and the user who mounted the store may do this".into()))
}

fn may_speak(peer: u32, own: u32) -> bool {
    peer == 0 || peer == own
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::client;
    use std::io::Write;

    struct Echo;

    impl Handler for Echo {
        fn handle(&self, request: Request) -> Result<Response> {
            match request {
                Request::SnapshotList => Ok(Response::Snapshots(Default::default())),
                _ => Err(Error::NotFound("nothing here".into())),
            }
        }
    }

    fn backing(parent: &Path, name: &str) -> PathBuf {
        let backing = parent.join(name);
        std::fs::create_dir_all(backing.join(PRIVATE_DIR)).unwrap();
        backing
    }

    #[test]
    fn requests_are_answered_and_the_server_stops() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than a socket's path may be.
        let backings = [backing(dir.path(), "a"), backing(dir.path(), &"b".repeat(200))];
        let server = Server::start(&backings, Arc::new(Echo)).unwrap();
        for backing in &backings {
            let backing = std::slice::from_ref(backing);
            let answer = client::ask(backing, &Request::SnapshotList).unwrap();
            assert_eq!(answer, Response::Snapshots(Default::default()));
            let error = client::ask(backing, &Request::Ping).unwrap_err();
            assert!(matches!(error, Error::NotFound(text) if text == "nothing here"));
        }
        server.stop();
        assert!(!backings[0].join(PRIVATE_DIR).join(SOCKET_NAME).exists());
        assert!(matches!(client::ask(&backings, &Request::Ping), Err(Error::NotFound(_))));
    }

    #[test]
    fn garbage_is_answered_with_an_error_and_a_dead_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let backing = backing(dir.path(), "a");
        drop(UnixListener::bind(backing.join(PRIVATE_DIR).join(SOCKET_NAME)).unwrap());
        let server = Server::start(std::slice::from_ref(&backing), Arc::new(Echo)).unwrap();
        let mut stream = client::connect(&backing).unwrap();
        stream.write_all(&[255; 64]).unwrap();
        let answer: Response = read_frame(&mut stream, RESPONSE_BYTES_MAX).unwrap();
        assert!(matches!(answer, Response::Failed { .. }));
        // One that connects and says nothing does not keep the others from being served.
        let silent = client::connect(&backing).unwrap();
        assert!(client::ask(&[backing], &Request::SnapshotList).is_ok());
        drop(silent);
        server.stop();
    }

    #[test]
    fn only_root_and_the_owner_may_speak() {
        assert!(may_speak(0, 1000) && may_speak(1000, 1000) && may_speak(0, 0));
        assert!(!may_speak(1001, 1000) && !may_speak(1000, 0));
    }
}

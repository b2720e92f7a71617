//! The control socket: how commands speak to the daemon of a mounted store.
//!
//! Every backing has the socket `.rearview/control.sock`. Only root and the user that the daemon
//! runs as may speak; both the directory's mode and the peer's credentials see to it. One
//! connection carries one request and one response. Each is a frame: four bytes of length,
//! little-endian, then that many bytes of JSON with the protocol's version. Both lengths have a
//! limit, all waiting a deadline, and a frame that is not understood is answered with an error,
//! never acted upon.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::check::CheckReport;
use crate::error::{Error, IoContext, Result};
use crate::replica::PrivateDir;
use crate::replica::backing::{Backing, Handle};
use crate::replica::dir_backing::DirBacking;
use crate::report::log::LogReport;
use crate::report::prune::PruneReport;
use crate::report::purge::PurgeReport;
use crate::report::undo::UndoPlan;
use crate::report::who::Who;
use crate::report::{DiffReport, MomentText, PathText, SnapshotList, SnapshotReport, StatusReport};
use crate::retention::Policy;
use crate::types::PRIVATE_DIR;
use crate::volume::scrub::{ScrubOptions, ScrubStatus};

pub mod client;
mod prune;
mod replica;
pub mod server;
pub mod service;

/// The socket's name in `.rearview`.
pub const SOCKET_NAME: &str = "control.sock";
/// The protocol's version; both sides must have the same.
pub const PROTOCOL_VERSION: u32 = 6;
/// The longest request: a path and a few names.
pub const REQUEST_BYTES_MAX: u32 = 64 * 1024;
/// The longest response: a diff of some million paths.
pub const RESPONSE_BYTES_MAX: u32 = 1 << 30;

/// Opens the private directory of a backing. A symlink in its place is not followed.
pub fn open_private(backing: &Path) -> Result<Handle> {
    DirBacking::open(backing)?
        .open_dir(&PrivateDir::Root.path())
        .context("open", backing.join(PRIVATE_DIR))
}

/// What a command asks of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Who are you?
    Ping,
    /// The store's state.
    Status,
    /// Makes a snapshot of now, or of the moment `at`; without a name it gets its time's.
    SnapshotCreate {
        /// The name.
        name: Option<String>,
        /// The moment.
        at: Option<MomentText>,
        /// Made by a schedule.
        automatic: bool,
        /// Its tags.
        tags: Vec<String>,
    },
    /// All snapshots.
    SnapshotList,
    /// Forgets a snapshot.
    SnapshotDelete {
        /// The name.
        name: String,
    },
    /// Renames a snapshot.
    SnapshotRename {
        /// The name it has.
        from: String,
        /// The name it gets.
        to: String,
    },
    /// Holds or releases a snapshot.
    SnapshotHold {
        /// The name.
        name: String,
        /// Whether it is to be held.
        held: bool,
    },
    /// Removes the snapshots that a policy does not keep.
    Prune {
        /// The policy, for all snapshots that are not held; without one the store applies its own.
        policy: Option<Box<Policy>>,
        /// Only tell what would be removed.
        dry_run: bool,
        /// To keep nothing is what is wanted.
        allow_none: bool,
        /// Make the policy the store's own.
        save: bool,
    },
    /// The history of a path.
    Log {
        /// Root-relative.
        path: PathText,
        /// Of versions that more snapshots show than so many, only the first and the last are told.
        names_max: Option<usize>,
    },
    /// The differences between two moments.
    Diff {
        /// A snapshot, `now` or a time.
        a: MomentText,
        /// Likewise.
        b: MomentText,
        /// Root-relative; only what lies below it.
        path: PathText,
    },
    /// The moment that a word names.
    Moment {
        /// A snapshot, `now` or a time.
        moment: MomentText,
    },
    /// How what a program changed can be taken back.
    UndoPlan {
        /// Root-relative; only what lies below it.
        path: PathText,
        /// Which program.
        who: Who,
        /// Its changes after this moment.
        since: MomentText,
        /// Also where others changed the same after it.
        force: bool,
    },
    /// Makes a snapshot that shows a generation.
    SnapshotView {
        /// The snapshot's name.
        name: String,
        /// The generation.
        generation: u64,
    },
    /// Makes a snapshot of the last moment at which a path that is gone was whole.
    SnapshotLastSeen {
        /// The snapshot's name.
        name: String,
        /// Root-relative.
        path: PathText,
    },
    /// Brings a replica back.
    ReplicaOnline {
        /// Its label, or the path of its backing.
        replica: PathText,
        /// What is mounted stays live where both were changed apart.
        take: bool,
    },
    /// Takes a replica out of use.
    ReplicaOffline {
        /// Its label, or the path of its backing.
        replica: PathText,
    },
    /// Fills an empty directory in the place of a replica.
    ReplicaReplace {
        /// The label of the old one, or the path of its backing.
        old: PathText,
        /// The directory.
        new: PathText,
    },
    /// Fills an empty directory as one more replica.
    ReplicaAdd {
        /// The directory.
        new: PathText,
    },
    /// Gives a replica up.
    ReplicaRemove {
        /// Its label, or the path of its backing.
        replica: PathText,
    },
    /// Looks now at every replica that failed.
    Resync,
    /// Checks the catalogs.
    Check,
    /// Begins, steers or shows the scrub.
    Scrub(ScrubRequest),
    /// Removes paths from all history, or tells what that would do.
    Purge {
        /// Root-relative.
        paths: Vec<PathText>,
        /// Only tell.
        dry_run: bool,
        /// Also what held snapshots show.
        even_held: bool,
    },
}

/// What is asked of the scrub.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "scrub", rename_all = "snake_case")]
pub enum ScrubRequest {
    /// Begin.
    Start(ScrubOptions),
    /// Stop for a while.
    Pause,
    /// Go on.
    Resume,
    /// End.
    Stop,
    /// Tell how it stands.
    Status,
}

impl Request {
    /// Whether it changes what the store holds.
    pub fn is_change(&self) -> bool {
        match self {
            Request::SnapshotCreate { .. }
            | Request::SnapshotDelete { .. }
            | Request::SnapshotRename { .. }
            | Request::SnapshotHold { .. }
            | Request::SnapshotView { .. }
            | Request::SnapshotLastSeen { .. } => true,
            Request::Prune { dry_run, .. } => !dry_run,
            Request::Purge { dry_run, .. } => !dry_run,
            // What the store holds is the same on how many replicas ever.
            Request::ReplicaOnline { .. }
            | Request::ReplicaOffline { .. }
            | Request::ReplicaReplace { .. }
            | Request::ReplicaAdd { .. }
            | Request::ReplicaRemove { .. }
            | Request::Resync => true,
            Request::Scrub(request) => *request != ScrubRequest::Status,
            Request::Ping
            | Request::Status
            | Request::SnapshotList
            | Request::Check
            | Request::Log { .. }
            | Request::Diff { .. }
            | Request::UndoPlan { .. }
            | Request::Moment { .. } => false,
        }
    }
}

/// What the daemon answers. The tag stands beside the content, not in it: what is long is read as
/// it comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "response", content = "content", rename_all = "snake_case")]
pub enum Response {
    /// To [`Request::Ping`].
    Pong(DaemonInfo),
    /// To [`Request::Status`].
    Status(StatusReport),
    /// To the requests that make or change one snapshot.
    Snapshot(SnapshotReport),
    /// To [`Request::SnapshotList`].
    Snapshots(SnapshotList),
    /// To [`Request::Prune`].
    Pruned(PruneReport),
    /// To [`Request::Log`].
    Log(LogReport),
    /// To [`Request::Diff`].
    Diff(DiffReport),
    /// To [`Request::UndoPlan`].
    UndoPlan(UndoPlan),
    /// To [`Request::Moment`].
    Moment(crate::report::MomentReport),
    /// To [`Request::Check`].
    Checked(CheckReport),
    /// To [`Request::Scrub`].
    Scrub(ScrubStatus),
    /// To [`Request::Purge`].
    Purge(PurgeReport),
    /// The request failed.
    Failed {
        /// Which error.
        kind: FailureKind,
        /// Its text for people.
        text: String,
    },
}

/// What a daemon says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonInfo {
    /// Its process id.
    pub pid: u32,
    /// Where it is mounted.
    pub mountpoint: PathText,
    /// What `.snapshots` is called in this mount.
    pub snapdir_name: PathText,
    /// Whether the past is shown in this mount at all.
    pub snapdir_enabled: bool,
}

/// The kinds of errors that cross the socket, so that a command ends with the same exit code as if
/// it had done the work itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// [`Error::NoStore`]
    NoStore,
    /// [`Error::InUse`]
    InUse,
    /// [`Error::Refused`]
    Refused,
    /// [`Error::NotFound`]
    NotFound,
    /// [`Error::Damaged`]
    Damaged,
    /// [`Error::Interrupted`]
    Interrupted,
    /// Any other.
    Other,
}

impl From<&Error> for Response {
    fn from(error: &Error) -> Response {
        let kind = match error {
            Error::NoStore(_) => FailureKind::NoStore,
            Error::InUse(_) => FailureKind::InUse,
            Error::Refused(_) => FailureKind::Refused,
            Error::NotFound(_) => FailureKind::NotFound,
            Error::Damaged { .. } => FailureKind::Damaged,
            Error::Interrupted => FailureKind::Interrupted,
            Error::Posix(_) | Error::Io { .. } | Error::Catalog(_) => FailureKind::Other,
        };
        Response::Failed { kind, text: error.to_string() }
    }
}

impl FailureKind {
    /// The error on the command's side.
    pub fn into_error(self, text: String) -> Error {
        match self {
            FailureKind::NoStore => Error::NoStore(text),
            FailureKind::InUse => Error::InUse(text),
            FailureKind::NotFound => Error::NotFound(text),
            FailureKind::Interrupted => Error::Interrupted,
            FailureKind::Damaged => Error::Damaged {
                what: "the store".into(),
                detail: text,
                remedy: "See 'rearview status'.",
            },
            FailureKind::Refused | FailureKind::Other => Error::Refused(text),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    body: T,
}

/// An envelope whose body is not looked at.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Writes one frame.
pub fn write_frame<T: Serialize>(to: &mut impl Write, body: &T, bytes_max: u32) -> Result<()> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, &Envelope { version: PROTOCOL_VERSION, body })
        .map_err(|error| Error::Refused(format!("cannot write the message: {error}")))?;
    let bytes = frame.len() - 4;
    let length = u32::try_from(bytes).ok().filter(|length| *length <= bytes_max);
    let Some(length) = length else {
        return Err(Error::Refused(format!(
            "the message of {bytes} bytes is longer than the control socket carries; ask for less"
        )));
    };
    frame[..4].copy_from_slice(&length.to_le_bytes());
    to.write_all(&frame).and_then(|()| to.flush()).context("write to", socket_label())
}

/// Reads one frame.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read, bytes_max: u32) -> Result<T> {
    let mut length = [0u8; 4];
    from.read_exact(&mut length).context("read from", socket_label())?;
    let length = u32::from_le_bytes(length);
    if length > bytes_max {
        return Err(Error::Refused(format!("a message of {length} bytes is too long")));
    }
    // Grown as the bytes come, so that a lie about the length costs no memory.
    let mut json = Vec::new();
    let read = from.take(u64::from(length)).read_to_end(&mut json);
    read.context("read from", socket_label())?;
    if json.len() < length as usize {
        return Err(Error::Refused("the message ends early".into()));
    }
    // What another version's body means is not for us to say, whether or not it looks like ours.
    let read = serde_json::from_slice::<Envelope<T>>(&json);
    let version = match &read {
        Ok(envelope) => envelope.version,
        Err(_) => serde_json::from_slice::<Version>(&json).map_or(PROTOCOL_VERSION, |v| v.version),
    };
    if version != PROTOCOL_VERSION {
        return Err(Error::Refused(format!(
            "the daemon and this command are of different releases (protocol {version} and \
             {PROTOCOL_VERSION}): unmount and mount anew"
        )));
    }
    read.map(|envelope| envelope.body)
        .map_err(|error| Error::Refused(format!("the message is not understood: {error}")))
}

fn socket_label() -> PathBuf {
    PathBuf::from(SOCKET_NAME)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_request_survives_the_frame() {
        let request = Request::Log { path: PathText::new(b"a\xff\n/b"), names_max: Some(8) };
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &request, REQUEST_BYTES_MAX).unwrap();
        let back: Request = read_frame(&mut bytes.as_slice(), REQUEST_BYTES_MAX).unwrap();
        assert_eq!(back, request);
    }

    #[test]
    fn a_policy_survives_the_frame_and_a_dry_run_changes_nothing() {
        let policy: Policy =
            serde_json::from_str(r#"{"daily":7,"weekly":"1y","tags":["a,b"]}"#).unwrap();
        let prune = |dry_run| Request::Prune {
            policy: Some(Box::new(policy.clone())),
            dry_run,
            allow_none: false,
            save: false,
        };
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &prune(true), REQUEST_BYTES_MAX).unwrap();
        let back: Request = read_frame(&mut bytes.as_slice(), REQUEST_BYTES_MAX).unwrap();
        assert_eq!(back, prune(true));
        assert!(!prune(true).is_change() && prune(false).is_change());
    }

    #[test]
    fn garbage_is_an_error_and_no_memory() {
        let mut huge = u32::MAX.to_le_bytes().to_vec();
        huge.extend_from_slice(b"{}");
        let mut wrong = Vec::new();
        write_frame(&mut wrong, &"hello", REQUEST_BYTES_MAX).unwrap();
        let early = [9, 0, 0, 0, b'{'].to_vec();
        let noise = [4, 0, 0, 0, 1, 2, 3, 4].to_vec();
        for bytes in [vec![], vec![1], huge, wrong, early, noise] {
            let read: Result<Request> = read_frame(&mut bytes.as_slice(), REQUEST_BYTES_MAX);
            assert!(read.is_err(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn a_changed_frame_is_an_error_or_a_request(
            path in proptest::collection::vec(any::<u8>(), 0..40),
            at in any::<prop::sample::Index>(), flips in any::<[u8; 4]>(),
            splice in proptest::collection::vec(any::<u8>(), 0..8),
        ) {
            let path = PathText::new(&path);
            let since = MomentText::new("yesterday");
            let who = Who::Command("tar".into());
            let requests = [
                Request::Log { path: path.clone(), names_max: None },
                Request::UndoPlan { path, who, since, force: true },
            ];
            for request in requests {
                let mut bytes = Vec::new();
                write_frame(&mut bytes, &request, REQUEST_BYTES_MAX).unwrap();
                let at = at.index(bytes.len());
                bytes[at..].iter_mut().zip(flips).for_each(|(byte, flip)| *byte ^= flip);
                bytes.splice(at..at, splice.iter().copied());
                let read: Result<Request> = read_frame(&mut bytes.as_slice(), REQUEST_BYTES_MAX);
                if let Ok(request) = read {
                    let mut again = Vec::new();
                    prop_assert!(write_frame(&mut again, &request, REQUEST_BYTES_MAX).is_ok());
                }
                // A client is told by somebody, too.
                let _ = read_frame::<Response>(&mut bytes.as_slice(), RESPONSE_BYTES_MAX);
            }
        }
    }

    #[test]
    fn another_version_is_told_by_name() {
        let json = br#"{"version":99,"body":{"request":"new_thing"}}"#;
        let mut bytes = (json.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(json);
        let read: Result<Request> = read_frame(&mut bytes.as_slice(), REQUEST_BYTES_MAX);
        assert!(read.unwrap_err().to_string().contains("different releases"));
    }

    #[test]
    fn errors_keep_their_kind_across_the_socket() {
        for error in [Error::NoStore("x".into()), Error::InUse("x".into()), Error::Interrupted] {
            let Response::Failed { kind, text } = Response::from(&error) else { panic!() };
            let back = kind.into_error(text);
            assert_eq!(std::mem::discriminant(&back), std::mem::discriminant(&error));
        }
    }
}

//! Backings that hang, fail or are missing while a store is opened: it is opened without them, and
//! they come when they answer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use uuid::Uuid;

use super::identify::{self, Candidate, Found};
use super::marker::{Marker, Peer, PeerState, Phase};
use super::settle::holds_stale;
use super::site::Site;
use super::{Arrival, Between, Fork, Member, Store};
use crate::error::{Error, IoContext, Result};
use crate::sys::patience;
use crate::types::PRIVATE_DIR;

/// A backing that a store is opened without.
#[derive(Debug)]
pub(super) struct Out {
    pub(super) path: PathBuf,
    /// What is with it, said of it.
    pub(super) why: String,
    /// What a person can do.
    pub(super) remedy: &'static str,
    /// Its disk is there, and failed.
    failed: bool,
    /// What it says of the others, where that can be read.
    marker: Option<Box<Marker>>,
}

impl Out {
    /// One on which a call hangs.
    pub(super) fn silent(path: &Path, between: &Between) -> Out {
        let limit = between.timeout.as_secs_f64();
        Out {
            path: path.into(),
            why: format!("did not answer within {limit} s"),
            remedy: "check the disk",
            failed: true,
            marker: None,
        }
    }

    /// What `status` tells of it; `None` for one that is merely absent.
    pub(super) fn reason(&self) -> Option<String> {
        let (why, now) = (&self.why, jiff::Timestamp::now());
        self.failed.then(|| format!("it {why}, as of {now}: {}", self.remedy))
    }
}

/// What to do about an error that tells of a disk, and not of what lies on it.
fn remedy(error: &Error) -> Option<&'static str> {
    let Error::Io { source, .. } = error else { return None };
    match Errno::from_io_error(source)? {
        Errno::ROFS => Some("remount it read-write"),
        Errno::IO | Errno::STALE | Errno::NOTCONN => Some("check the disk, and mount it anew"),
        _ => None,
    }
}

/// Whether a backing failed with `error` because of its disk.
pub fn is_of_disk(error: &Error) -> bool {
    remedy(error).is_some()
}

/// The error of an opening that nothing else is left for.
pub(super) fn with_remedy(error: Error) -> Error {
    match remedy(&error) {
        // With `-o ro` too: what the last mount left has to be finished, and nobody else to write.
        Some(remedy) if error.to_errno() == Errno::ROFS => Error::Refused(format!(
            "{error}: a store that is mounted, also with -o ro, writes to its backings: {remedy}, \
             or copy it elsewhere"
        )),
        Some(remedy) => Error::Refused(format!("{error}: {remedy}")),
        None => error,
    }
}

/// Those of `paths`, but for those that are `out` already, without which an opening that ended with
/// `error` can go on.
pub(super) fn failed(paths: &[PathBuf], out: &[Out], error: &Error, between: &Between) -> Vec<Out> {
    let known: Vec<PathBuf> = out.iter().map(|one| one.path.clone()).collect();
    if error.to_errno() == Errno::TIMEDOUT {
        let hung = among(paths, &known, error, between);
        return hung.iter().map(|path| Out::silent(path, between)).collect();
    }
    let mut rest = paths.iter().filter(|path| !known.contains(path));
    let (Some(remedy), Error::Io { path: at, .. }) = (remedy(error), error) else {
        return Vec::new();
    };
    let Some(path) = rest.clone().find(|path| at.starts_with(path)) else { return Vec::new() };
    if rest.all(|other| other == path) {
        return Vec::new();
    }
    let marker = match identify::look(path, between).map(|candidate| candidate.found) {
        Ok(Found::Replica(marker)) => Some(marker),
        // It was to become a replica: that it cannot is no fault of the store's.
        Ok(_) => return Vec::new(),
        Err(_) => None,
    };
    let why = format!("failed: {error}");
    vec![Out { path: path.clone(), why, remedy, failed: true, marker }]
}

/// Takes out those that hold no replica, where another does: their disks are missing. Refused if
/// the store misses fewer, for then one was never a replica; and if no replica at hand ended
/// cleanly, while one that is missing may have gone on: one that failed in use does not know it.
pub(super) fn take_missing(candidates: &mut Vec<Candidate>, out: &[Out]) -> Result<Vec<Out>> {
    let markers = candidates.iter().filter_map(|one| match &one.found {
        Found::Replica(marker) => Some(marker.as_ref()),
        _ => None,
    });
    let present: Vec<Uuid> = markers.clone().map(|marker| marker.replica).collect();
    if present.is_empty() {
        return Ok(Vec::new());
    }
    let is_out = |peer: &&Peer| {
        out.iter().any(|one| one.failed && identify::record_path(&one.path) == peer.path)
    };
    let is_clean = markers.clone().any(|marker| marker.clean.is_some());
    let absent: BTreeSet<Uuid> = markers
        .clone()
        .flat_map(|marker| &marker.peers)
        .filter(|peer| !present.contains(&peer.replica) && !is_out(peer))
        .map(|peer| peer.replica)
        .collect();
    let peers = markers.flat_map(|marker| &marker.peers);
    let behind: BTreeSet<Uuid> =
        peers.filter(|peer| peer.state == PeerState::Stale).map(|peer| peer.replica).collect();
    let missing = candidates.extract_if(.., |one| !matches!(one.found, Found::Replica(_)));
    let missing: Vec<Out> = missing
        .map(|one| Out {
            why: match one.found {
                Found::Absent => "does not exist".into(),
                _ => "has no store marker (is its disk mounted?)".into(),
            },
            path: one.path,
            remedy: "mount its disk",
            failed: false,
            marker: None,
        })
        .collect();
    let before = out.iter().filter(|one| !one.failed).count();
    match missing.last() {
        Some(one) if missing.len() + before > absent.len() => Err(Error::Refused(format!(
            "{} {}, and the store misses {} of its replicas: with --existing-only no new one is \
             made (mount once without it, if it is to become one)",
            one.path.display(),
            one.why,
            absent.len()
        ))),
        Some(one) if !is_clean && !absent.is_subset(&behind) => Err(Error::Refused(format!(
            "{} {}, and what is at hand did not end cleanly, so that it may miss changes which \
             that has: {}, or give the others alone, to go on with what they have",
            one.path.display(),
            one.why,
            one.remedy
        ))),
        _ => Ok(missing),
    }
}

/// Refuses to go on with what is known to be old: a disk that failed, but can be read, says that it
/// has changes that those at hand missed.
pub(super) fn check_current(out: &[Out], members: &[Member]) -> Result<()> {
    for one in out {
        let Some(marker) = &one.marker else { continue };
        // One that is new, or was not filled to its end, has nothing of its own.
        let mut whole = members.iter().filter(|one| one.marker.phase == Phase::Ok).peekable();
        let any = whole.peek().is_some();
        if any && whole.all(|member| holds_stale(marker, &member.marker)) {
            return Err(Error::Refused(format!(
                "{} {}, and the other replicas miss changes that it has: {} (or give the others \
                 alone, to go on with what they have)",
                one.path.display(),
                one.why,
                one.remedy
            )));
        }
    }
    Ok(())
}

/// Those of `paths`, but for `known`, that are why an opening hung, which ended with `error`.
fn among(paths: &[PathBuf], known: &[PathBuf], error: &Error, between: &Between) -> Vec<PathBuf> {
    let rest: Vec<&PathBuf> = paths.iter().filter(|path| !known.contains(path)).collect();
    let told =
        |path: &&PathBuf| matches!(error, Error::Io { path: at, .. } if at.starts_with(path));
    if let Some(one) = rest.iter().copied().find(told) {
        return vec![one.clone()];
    }
    // Not every error tells on which it was.
    let probes = rest.iter().map(|path| {
        let path = path.to_path_buf();
        move || try_write(&path)
    });
    let answers = patience::each_within(between.timeout, probes);
    rest.into_iter()
        .zip(answers)
        .filter(|(_, it)| it.is_none())
        .map(|(path, _)| path.clone())
        .collect()
}

/// The error of an opening, as one of the backing on which a call hangs, if there is one: not every
/// error tells on which it was, or that it came of that.
pub(super) fn blame(error: Error, sites: &[Site]) -> Error {
    let is_told = |path: &Path| sites.iter().any(|site| path.starts_with(&site.path));
    let hangs = error.to_errno() == Errno::TIMEDOUT;
    if hangs && matches!(&error, Error::Io { path, .. } if is_told(path)) {
        return error;
    }
    let hung = sites.iter().find_map(|site| {
        let guard = site.guard.as_ref().filter(|guard| guard.overdue_count() > 0)?;
        let fault = guard.last_failure()?;
        let at = fault.path.map_or_else(|| site.path.clone(), |path| site.at(&path));
        Some(Error::Io { action: fault.op, path: at, source: Errno::TIMEDOUT.into() })
    });
    hung.unwrap_or(error)
}

/// Tells of a refusal that it came to that because backings are left out.
pub(super) fn explain(error: Error, out: &[Out]) -> Error {
    let told = |one: &Out| format!("{} {} ({})", one.path.display(), one.why, one.remedy);
    let told: Vec<String> = out.iter().map(told).collect();
    match error {
        Error::Refused(why) if !out.is_empty() => {
            Error::Refused(format!("{}, and {why}", told.join(", ")))
        }
        Error::NoStore(why) if !out.is_empty() => {
            Error::NoStore(format!("{}, and {why}", told.join(", ")))
        }
        error => error,
    }
}

/// Whether the disk of a replica takes a write.
fn try_write(backing: &Path) -> Result<()> {
    let dir = backing.join(PRIVATE_DIR).join("tmp");
    let file = dir.join("probe");
    let tried = std::fs::write(&file, b"probe")
        .and_then(|()| std::fs::File::open(&file)?.sync_all())
        .and_then(|()| std::fs::remove_file(&file));
    tried.context("write to", dir)
}

impl Store {
    /// Whether the disk of a replica answers, and takes a write, in time. The look may hang, and is
    /// left alone then.
    pub fn answers(&self, backing: &Path) -> Result<()> {
        let own = backing.to_path_buf();
        self.between.within(backing, move || try_write(&own))
    }

    /// The backings that were left out when the store was opened, and have not come since.
    pub fn silent(&self) -> Vec<PathBuf> {
        let present: Vec<PathBuf> =
            self.replicas.ids().map(|id| self.replicas.get(id).path.clone()).collect();
        let mut silent = self.silent.lock();
        // Somebody brought it by hand.
        silent.retain(|path| !present.contains(path));
        silent.clone()
    }

    /// Takes in one of them, which answers. Unless it still hangs it is none of them any more.
    pub fn spoke(&self, backing: &Path) -> Result<Arrival> {
        let arrived = self.arrived(backing, None, Fork::Refuse);
        if !matches!(&arrived, Err(error) if error.to_errno() == Errno::TIMEDOUT) {
            self.silent.lock().retain(|path| path != backing);
        }
        arrived
    }
}

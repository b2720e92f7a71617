//! What the commands report, in the form that scripts get (`--json`) and the control socket
//! carries; and the questions to a catalog behind the reports, the same for a mounted and an
//! unmounted store.
//!
//! Paths are bytes. In a report a path is text where it is UTF-8; where it is not, the text is
//! escaped and the bytes stand beside it in hexadecimal.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::catalog::{Catalog, DiffKind, Difference, Snapshot, Totals};
use crate::error::{Error, Result};
use crate::store::marker::{Marker, Peer, PeerState};
use crate::time::{Zone, local, parse_instant};
use crate::types::{Generation, Kind, RelPath, Timestamp, escape};
use crate::volume::scrub::ScrubStatus;
use crate::volume::{Extent, Progressing};
use condition::{AffectedReport, LagReport};

pub use list::{SnapshotLine, SnapshotList, SnapshotsReport};

pub mod condition;
mod list;
pub mod log;
pub mod lost;
pub mod prune;
pub mod purge;
pub mod undo;
pub mod who;

/// The version of all `--json` forms. The first number grows when a field changes its meaning or
/// goes away, the second when one is added.
pub const OUTPUT_VERSION: (u32, u32) = (1, 2);

/// How many names an error offers when the asked one is not there.
const NEAREST_MAX: usize = 3;
/// Names less alike than this (0 to 1) are not offered.
const NEAREST_LIKENESS_MIN: f64 = 0.5;

/// A path in a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathText {
    /// The path as text; escaped if `path_bytes` is there.
    pub path: String,
    /// The path's bytes in hexadecimal, where they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_bytes: Option<String>,
}

impl PathText {
    /// Takes a path's bytes.
    pub fn new(bytes: &[u8]) -> PathText {
        match std::str::from_utf8(bytes) {
            Ok(text) => PathText { path: text.to_string(), path_bytes: None },
            Err(_) => PathText { path: escape(bytes), path_bytes: Some(to_hex(bytes)) },
        }
    }

    /// The path for a terminal.
    pub fn shown(&self) -> String {
        match &self.path_bytes {
            Some(_) => self.path.clone(),
            None => escape(self.path.as_bytes()),
        }
    }

    /// The path's bytes; `None` if the hexadecimal form is not one.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        match &self.path_bytes {
            Some(hex) => from_hex(hex),
            None => Some(self.path.clone().into_bytes()),
        }
    }
}

impl From<&RelPath> for PathText {
    fn from(path: &RelPath) -> PathText {
        PathText::new(&path.to_bytes())
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let value = |digit: u8| char::from(digit).to_digit(16);
    digits.chunks(2).map(|pair| Some((value(pair[0])? * 16 + value(pair[1])?) as u8)).collect()
}

/// A time in reports: RFC 3339 in UTC.
pub fn time_text(time: Timestamp) -> String {
    match jiff::Timestamp::new(time.secs, time.nanos as i32) {
        Ok(time) => time.to_string(),
        // Beyond the years that a calendar is written for.
        Err(_) => format!("@{}", time.secs),
    }
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// Its name.
    pub name: String,
    /// The moment it shows.
    pub time: String,
    /// That moment as a generation.
    pub generation: u64,
    /// Made by a schedule.
    pub automatic: bool,
    /// Cannot be deleted.
    pub held: bool,
    /// Bytes of history that would go if it alone were deleted; nothing where not counted yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freed_bytes: Option<u64>,
    /// Its tags.
    #[serde(default)]
    pub tags: Vec<String>,
}

impl From<&Snapshot> for SnapshotReport {
    fn from(snapshot: &Snapshot) -> SnapshotReport {
        SnapshotReport {
            name: snapshot.name.clone(),
            time: time_text(snapshot.time),
            generation: snapshot.generation.0,
            automatic: snapshot.automatic,
            held: snapshot.held,
            freed_bytes: None,
            tags: snapshot.tags.clone(),
        }
    }
}

/// One difference between two moments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DifferenceReport {
    /// How it differs.
    pub change: DiffKind,
    /// What kind of node it is.
    pub kind: Kind,
    /// Where: in the older tree for what was removed or renamed, else in the newer.
    #[serde(flatten)]
    pub path: PathText,
    /// Where a renamed one is in the newer tree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<PathText>,
}

/// The differences between two moments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffReport {
    /// The earlier moment.
    pub from: MomentReport,
    /// The later moment.
    pub to: MomentReport,
    /// What differs, by path.
    pub differences: Vec<DifferenceReport>,
}

/// A moment that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MomentReport {
    /// The snapshot's name, `now`, or nothing for a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The time.
    pub time: String,
    /// The generation that shows it.
    pub generation: u64,
}

/// One replica in a status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// Its label.
    pub label: String,
    /// Where the backing is.
    #[serde(flatten)]
    pub path: PathText,
    /// Its UUID.
    pub uuid: String,
    /// Its state: `online`, or what is wrong.
    pub state: String,
    /// Whether it is current and in use.
    pub healthy: bool,
    /// Since when it is in this state; where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// The error that led to this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Reads that failed since the mount.
    pub read_errors: u64,
    /// Writes that failed since the mount.
    pub write_errors: u64,
    /// Pieces of data whose checksum was wrong on it since the mount.
    #[serde(default)]
    pub checksum_errors: u64,
    /// How far it is behind, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag: Option<LagReport>,
    /// What failed by its fault, the newest last; no more than some 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub affected: Vec<AffectedReport>,
    /// How its resync stands, if it is to have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync: Option<ResyncReport>,
    /// What others had changed on it while it was away, a line for each path up to a number.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub foreign: Vec<String>,
    /// How many paths those were.
    #[serde(default)]
    pub foreign_count: u64,
    /// Bytes of the backing's filesystem; 0 where unknown.
    pub space_bytes: u64,
    /// Bytes available on it.
    pub available_bytes: u64,
}

/// How a resync stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncReport {
    /// `waiting`, `running`, `retry` or `parked`.
    pub stage: String,
    /// Bytes that were compared or copied.
    pub bytes: u64,
    /// All there are, about.
    pub bytes_total: u64,
    /// Bytes that were copied.
    pub copied_bytes: u64,
    /// Hundredths that are done.
    pub percent: u64,
    /// Since how many seconds it runs.
    pub elapsed_secs: u64,
    /// After how many seconds it will end, or is tried again; where that can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_secs: Option<u64>,
}

impl From<Progressing> for ResyncReport {
    fn from(progressing: Progressing) -> ResyncReport {
        let (stage, extent, elapsed, left) = match progressing {
            Progressing::Waiting => ("waiting", Extent::default(), Duration::ZERO, None),
            Progressing::Running { extent, elapsed } => {
                ("running", extent, elapsed, extent.left(elapsed))
            }
            Progressing::Retry(after) => ("retry", Extent::default(), Duration::ZERO, Some(after)),
            Progressing::Parked => ("parked", Extent::default(), Duration::ZERO, None),
        };
        ResyncReport {
            stage: stage.into(),
            bytes: extent.bytes,
            bytes_total: extent.bytes_total,
            copied_bytes: extent.copied,
            percent: extent.percent(),
            elapsed_secs: elapsed.as_secs(),
            left_secs: left.map(|left| left.as_secs()),
        }
    }
}

impl ReplicaReport {
    /// Whether it is being made equal to the others, or waits for it.
    pub fn is_resyncing(&self) -> bool {
        let stage = self.resync.as_ref().map(|resync| resync.stage.as_str());
        matches!(stage, Some("waiting" | "running"))
    }
}

/// The replicas that a store knows of beside those in `present`: what one of its markers says.
pub fn absent_replicas(marker: &Marker, present: &[ReplicaReport]) -> Vec<ReplicaReport> {
    let missing = |peer: &&Peer| {
        let uuid = peer.replica.to_string();
        present.iter().all(|replica| replica.uuid != uuid)
    };
    let report = |peer: &Peer| ReplicaReport {
        label: peer.label.clone(),
        path: PathText { path: peer.path.clone(), path_bytes: None },
        uuid: peer.replica.to_string(),
        state: match peer.state {
            PeerState::Ok => "absent",
            PeerState::Stale => "stale",
            PeerState::Filling => "filling",
        }
        .into(),
        healthy: false,
        since: None,
        error: (!peer.reason.is_empty()).then(|| peer.reason.clone()),
        read_errors: 0,
        write_errors: 0,
        checksum_errors: 0,
        lag: None,
        affected: Vec::new(),
        resync: None,
        foreign: Vec::new(),
        foreign_count: 0,
        space_bytes: 0,
        available_bytes: 0,
    };
    marker.peers.iter().filter(missing).map(report).collect()
}

/// The state of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// The store's UUID.
    pub store: String,
    /// Where it is mounted, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mountpoint: Option<PathText>,
    /// Whether a replica is missing or not current.
    pub degraded: bool,
    /// Fewer replicas are in use than the mount asks for: nothing can be changed.
    #[serde(default)]
    pub read_only: bool,
    /// The replicas; for an unmounted store the one that was looked at.
    pub replicas: Vec<ReplicaReport>,
    /// Sums over the catalog.
    pub totals: Totals,
    /// The oldest moment that can be seen.
    pub oldest: String,
    /// The newest generation.
    pub generation: u64,
    /// What is to be known of space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
    /// What a scrub does and found.
    #[serde(default)]
    pub scrub: Box<ScrubStatus>,
}

/// A moment of history that a user named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moment {
    /// The snapshot's name or `now`; `None` for a time.
    pub name: Option<String>,
    /// Its time.
    pub time: Timestamp,
    /// The generation that shows it.
    pub generation: Generation,
}

impl From<&Moment> for MomentReport {
    fn from(moment: &Moment) -> MomentReport {
        MomentReport {
            name: moment.name.clone(),
            time: time_text(moment.time),
            generation: moment.generation.0,
        }
    }
}

/// A moment as a user wrote it. What the text means as a time is found on the user's side, where
/// the user's time zone is known; what it means as a name, where the snapshots are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MomentText {
    /// A snapshot, `latest`, `now`, or a time.
    pub text: String,
    /// The time, if the text is one.
    #[serde(default)]
    pub instant: Option<Timestamp>,
}

impl MomentText {
    /// Takes what a user wrote here and now.
    pub fn new(text: &str) -> MomentText {
        let instant = parse_instant(text, Timestamp::now(), Zone::Local).ok();
        MomentText { text: text.to_string(), instant }
    }
}

/// Finds the moment that is meant. `newest` gives the generation of `now`; on a mounted store it
/// settles what is being written first.
pub fn resolve_moment(
    catalog: &Catalog,
    wanted: &MomentText,
    newest: impl FnOnce() -> Result<Generation>,
) -> Result<Moment> {
    let now = Timestamp::now();
    let text = wanted.text.as_str();
    if text == "now" {
        return Ok(Moment { name: Some(text.into()), time: now, generation: newest()? });
    }
    let named = match catalog.snapshot(text)? {
        None if text == "latest" => catalog.latest_snapshot()?,
        named => named,
    };
    if let Some(snapshot) = named {
        let Snapshot { name, time, generation, .. } = snapshot;
        return Ok(Moment { name: Some(name), time, generation });
    }
    match wanted.instant {
        Some(time) => moment_at(catalog, time, now),
        None => {
            let snapshots = catalog.snapshots()?;
            Err(no_snapshot(text, snapshots.iter().map(|snapshot| snapshot.name.as_str())))
        }
    }
}

/// The moment since which an undo is asked for: a time before the beginning is the beginning.
pub fn undo_moment(catalog: &Catalog, wanted: &MomentText) -> Result<Moment> {
    let newest = || Ok(catalog.generation());
    match (resolve_moment(catalog, wanted, newest), wanted.instant) {
        (Err(Error::NotFound(_)), Some(time)) => {
            Ok(Moment { name: None, time, generation: catalog.oldest()? })
        }
        (found, _) => found,
    }
}

/// The moment of a wall-clock time.
pub fn moment_at(catalog: &Catalog, time: Timestamp, now: Timestamp) -> Result<Moment> {
    if time > now {
        return Err(Error::Refused(format!("{} lies in the future", local(time))));
    }
    match catalog.generation_at(time)? {
        Some(generation) => Ok(Moment { name: None, time, generation }),
        None => {
            let oldest = catalog.time_of(catalog.oldest()?)?;
            Err(Error::NotFound(format!(
                "{} is before the beginning of this history, {}",
                local(time),
                local(oldest)
            )))
        }
    }
}

/// The error for a word that names neither a snapshot nor a time.
pub fn no_snapshot<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Error {
    let shown = escape(wanted.as_bytes());
    let near = nearest(wanted, names);
    if near.is_empty() {
        return Error::NotFound(format!(
            "no snapshot '{shown}', and it is not a time either (2h, yesterday, \
             2026-11-22 19:30, @1795375800)"
        ));
    }
    let near: Vec<String> = near.iter().map(|name| escape(name.as_bytes())).collect();
    Error::NotFound(format!("no snapshot '{shown}'; nearest names: {}", near.join(", ")))
}

/// The names most like the wanted one, best first.
pub fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut scored: Vec<(f64, &str)> = names
        .map(|name| (strsim::jaro_winkler(wanted, name), name))
        .filter(|(likeness, _)| *likeness >= NEAREST_LIKENESS_MIN)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.into_iter().take(NEAREST_MAX).map(|(_, name)| name).collect()
}

/// The differences between two moments below `under`, told from the earlier to the later, whichever
/// was named first.
pub fn diff(catalog: &Catalog, a: &Moment, b: &Moment, under: &RelPath) -> Result<DiffReport> {
    let (from, to) = if a.generation <= b.generation { (a, b) } else { (b, a) };
    let differences = catalog.diff(from.generation, to.generation, under)?;
    let report = |difference: &Difference| DifferenceReport {
        change: difference.kind,
        kind: difference.node_kind,
        path: PathText::from(&difference.path),
        to: difference.to.as_ref().map(PathText::from),
    };
    Ok(DiffReport {
        from: from.into(),
        to: to.into(),
        differences: differences.iter().map(report).collect(),
    })
}

/// All snapshots and the totals, for an unmounted store: what deleting them would free is counted
/// within `time`.
pub fn snapshots(catalog: &Catalog, time: Duration) -> Result<SnapshotList> {
    let begin = Instant::now();
    let stored = catalog.meta("deleted_since")?;
    let since = stored.and_then(|text| text.parse().ok()).map_or(Generation(0), Generation);
    let snapshots = catalog.snapshots()?;
    let in_time = || begin.elapsed() < time;
    let freed = snapshots
        .iter()
        .map(|snapshot| match in_time() {
            true => catalog.freed_without(snapshot, since, &in_time),
            false => Ok(None),
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(SnapshotList::new(&snapshots, freed, catalog.totals()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_are_not_text_keep_their_bytes() {
        for bytes in [&b"plain"[..], b"new\nline", b"\xff\\x", "gr\u{fc}n".as_bytes()] {
            let text = PathText::new(bytes);
            let json = serde_json::to_string(&text).unwrap();
            let back: PathText = serde_json::from_str(&json).unwrap();
            assert_eq!(back.bytes().unwrap(), bytes);
            assert!(!back.shown().contains('\n'));
        }
        assert_eq!(PathText::new(b"a\xff").path_bytes.as_deref(), Some("61ff"));
        assert_eq!(from_hex("6"), None);
        assert_eq!(from_hex("zz"), None);
    }

    #[test]
    fn a_wrong_name_is_answered_with_the_nearest() {
        let names = ["before-cleanup", "after-cleanup", "monday"];
        let text = no_snapshot("before-claenup", names.into_iter()).to_string();
        assert!(text.contains("nearest names: before-cleanup"), "{text}");
        assert!(no_snapshot("q\u{1b}", [].into_iter()).to_string().contains("'q\\x1b'"));
    }
}

//! The history of one path: what it was, when it changed, and how it came and went.
//!
//! A path's history follows the name first (an editor that saves by renaming a new file over the
//! old one makes a new node each time), and the oldest node that had the name back through its
//! renames.

use serde::{Deserialize, Serialize};

use super::who::ByReport;
use super::{PathText, time_text};
use crate::catalog::{Catalog, NameInterval, NodeRow, Snapshot, Version};
use crate::error::{Error, Result};
use crate::types::{Generation, Kind, NodeId, RelPath};

/// How the names begin that a restore gives its files before they take their places. Those are no
/// part of a path's history.
pub const RESTORING_PREFIX: &[u8] = b".restoring-";

/// What happened to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// It came into being.
    Created,
    /// It got this name.
    Renamed,
    /// Another object took the name over.
    Replaced,
    /// Its content changed.
    Written,
    /// Its mode changed.
    Mode,
    /// Its owner or group changed.
    Owner,
    /// Its extended attributes or ACLs changed.
    Xattrs,
    /// Only its times changed.
    Times,
    /// It went away, or got another name.
    Removed,
}

/// One moment in the history of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// When.
    pub time: String,
    /// The first generation that shows it.
    pub generation: u64,
    /// What happened.
    pub events: Vec<Event>,
    /// The path at that moment.
    #[serde(flatten)]
    pub path: PathText,
    /// What it was.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of content, as the object itself says.
    pub mtime: String,
    /// Who made it so; nothing where no process asked for it, or it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<ByReport>,
    /// The snapshots that show this state.
    pub snapshots: Vec<String>,
    /// How many of them, between the last two, are not told.
    #[serde(default, skip_serializing_if = "is_none")]
    pub snapshots_left_out: usize,
}

fn is_none(count: &usize) -> bool {
    *count == 0
}

/// The history of a path, oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogReport {
    /// The path that was asked for.
    #[serde(flatten)]
    pub path: PathText,
    /// Its history.
    pub entries: Vec<LogEntry>,
    /// It is there, and excluded from history: later changes of it make no versions.
    #[serde(default)]
    pub excluded: bool,
    /// When it, or a directory that it lay in, was removed from history, oldest first.
    #[serde(default)]
    pub purges: Vec<PurgeEntry>,
}

/// A removal from all history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeEntry {
    /// When.
    pub time: String,
    /// What was asked to be removed.
    #[serde(flatten)]
    pub path: PathText,
    /// How many versions went with it.
    pub versions: u64,
    /// How many bytes those had.
    pub bytes: u64,
}

/// The history of `path`, which need not exist any more. Of versions that more than `names_max`
/// snapshots show only the first and the last of these are told.
pub fn log(catalog: &Catalog, path: &RelPath, names_max: Option<usize>) -> Result<LogReport> {
    let snapshots = &*catalog.snapshots()?;
    let shown = Shown { snapshots, names_max: names_max.unwrap_or(usize::MAX) };
    let mut entries = Vec::new();
    for span in spans(catalog, path)? {
        entries.extend(lifetime(catalog, &span, &shown)?);
    }
    let excluded = is_excluded(catalog, path)?;
    let purges = purges(catalog, path)?;
    if entries.is_empty() && !excluded && purges.is_empty() {
        return Err(Error::NotFound(format!("{path} is not there and never was")));
    }
    Ok(LogReport { path: PathText::from(path), entries, excluded, purges })
}

fn purges(catalog: &Catalog, path: &RelPath) -> Result<Vec<PurgeEntry>> {
    let purges = catalog.purges()?.into_iter();
    let own = purges.filter(|row| path.names().starts_with(row.path.names()));
    let entry = |row: crate::catalog::PurgeRow| PurgeEntry {
        time: time_text(row.time),
        path: PathText::from(&row.path),
        versions: row.versions,
        bytes: row.bytes,
    };
    Ok(own.map(entry).collect())
}

/// Whether a live path, or a directory that it lies in, has no history.
fn is_excluded(catalog: &Catalog, path: &RelPath) -> Result<bool> {
    let mut parent = NodeId::ROOT;
    let mut excluded = false;
    for name in path.names() {
        let Some((node, _)) = catalog.lookup(parent, name)? else { return Ok(false) };
        excluded |= catalog.entry_is_versioned(parent, name)? == Some(false);
        parent = node;
    }
    Ok(excluded)
}

/// All snapshots, ordered by generation, and how many of them are told of one version.
struct Shown<'a> {
    snapshots: &'a [Snapshot],
    names_max: usize,
}

impl Shown<'_> {
    /// The names of those that show what was from one generation until another, and how many of
    /// them are left out.
    fn between(&self, from: Generation, until: Option<Generation>) -> (Vec<String>, usize) {
        let count_before = |g: Generation| self.snapshots.partition_point(|s| s.generation < g);
        let end = until.map_or(self.snapshots.len(), count_before);
        let shown = &self.snapshots[count_before(from).min(end)..end];
        let name = |snapshot: &Snapshot| snapshot.name.clone();
        match shown {
            [first, between @ .., last] if shown.len() > self.names_max => {
                (vec![name(first), name(last)], between.len())
            }
            _ => (shown.iter().map(name).collect(), 0),
        }
    }
}

/// An interval in which one node had one name.
struct Span {
    node: NodeId,
    born: Generation,
    died: Option<Generation>,
    /// How the interval began.
    first: Event,
    /// Whether nothing had the name after it.
    gone: bool,
    path: RelPath,
}

/// The intervals of a path, oldest first.
fn spans(catalog: &Catalog, path: &RelPath) -> Result<Vec<Span>> {
    let Some((parent, name)) = path.split_last() else {
        return Ok(vec![Span {
            node: NodeId::ROOT,
            born: Generation(0),
            died: None,
            first: Event::Created,
            gone: false,
            path: path.clone(),
        }]);
    };
    let mut intervals = Vec::new();
    for parent in nodes_of(catalog, &parent)? {
        intervals.extend(catalog.entry_history(parent, name)?);
    }
    intervals.sort_by_key(|interval| (interval.born, interval.node));
    // An object that came to the name by a rename had a life before: it belongs to the path's.
    if let Some(first) = intervals.first().cloned() {
        let earlier = catalog.name_history(first.node)?.into_iter();
        let earlier = earlier.filter(|old| old.died.is_some_and(|died| died <= first.born));
        let earlier = earlier.filter(|old| !old.name.as_bytes().starts_with(RESTORING_PREFIX));
        intervals.splice(0..0, earlier);
    }
    let mut spans: Vec<Span> = Vec::new();
    for (index, interval) in intervals.iter().enumerate() {
        let before = index.checked_sub(1).map(|before| &intervals[before]);
        let next = intervals.get(index + 1);
        let follows = next.is_some_and(|next| Some(next.born) == interval.died);
        spans.push(Span {
            node: interval.node,
            born: interval.born,
            died: interval.died,
            first: first_event(before, interval),
            gone: interval.died.is_some() && !follows,
            path: path_of(catalog, interval, path)?,
        });
    }
    Ok(spans)
}

fn first_event(before: Option<&NameInterval>, interval: &NameInterval) -> Event {
    match before {
        Some(before) if before.died != Some(interval.born) => Event::Created,
        Some(before) if before.node == interval.node => Event::Renamed,
        Some(_) => Event::Replaced,
        None => Event::Created,
    }
}

/// The path that an interval's name had at its beginning.
fn path_of(catalog: &Catalog, interval: &NameInterval, asked: &RelPath) -> Result<RelPath> {
    if let Some((parent, name)) = asked.split_last()
        && interval.name == *name
        && catalog.resolve_at(interval.born, &parent)?.map(|row| row.id) == Some(interval.parent)
    {
        return Ok(asked.clone());
    }
    let parent = catalog.path_at(interval.born, interval.parent)?.unwrap_or_default();
    Ok(parent.join(&interval.name))
}

/// All nodes that a directory path ever meant.
pub(super) fn nodes_of(catalog: &Catalog, path: &RelPath) -> Result<Vec<NodeId>> {
    let mut nodes = vec![NodeId::ROOT];
    for name in path.names() {
        let mut below = Vec::new();
        for node in nodes {
            for interval in catalog.entry_history(node, name)? {
                if !below.contains(&interval.node) {
                    below.push(interval.node);
                }
            }
        }
        nodes = below;
    }
    Ok(nodes)
}

/// The entries of one interval: its beginning, each version in it, its end.
fn lifetime(catalog: &Catalog, span: &Span, shown: &Shown<'_>) -> Result<Vec<LogEntry>> {
    let versions = catalog.versions(span.node)?;
    let within = |version: &&Version| {
        span.died.is_none_or(|died| version.born < died)
            && version.died.is_none_or(|died| died > span.born)
    };
    let mut entries = Vec::new();
    let mut before: Option<&NodeRow> = None;
    for version in versions.iter().filter(within) {
        let from = version.born.max(span.born);
        let until = [version.died, span.died].into_iter().flatten().min();
        let events = match before {
            Some(old) => changes(old, &version.row),
            None => vec![span.first],
        };
        let time = if from == version.born { version.time } else { catalog.time_of(from)? };
        let mut entry = entry(span, &version.row, events, time_text(time), from);
        (entry.snapshots, entry.snapshots_left_out) = shown.between(from, until);
        entries.push(entry);
        before = Some(&version.row);
    }
    if let (Some(row), Some(died), true) = (before, span.died, span.gone) {
        let time = time_text(catalog.time_of(died)?);
        entries.push(entry(span, row, vec![Event::Removed], time, died));
    }
    let generations: Vec<_> = entries.iter().map(|entry| Generation(entry.generation)).collect();
    for (entry, by) in entries.iter_mut().zip(catalog.actors_of(&generations)?) {
        entry.by = by.as_ref().map(ByReport::from);
    }
    Ok(entries)
}

fn entry(
    span: &Span,
    row: &NodeRow,
    events: Vec<Event>,
    time: String,
    generation: Generation,
) -> LogEntry {
    LogEntry {
        time,
        generation: generation.0,
        events,
        path: PathText::from(&span.path),
        kind: row.kind,
        size: row.size,
        mode: row.mode,
        uid: row.uid,
        gid: row.gid,
        mtime: time_text(row.mtime),
        by: None,
        snapshots: Vec::new(),
        snapshots_left_out: 0,
    }
}

/// What differs between two states of one node.
fn changes(old: &NodeRow, new: &NodeRow) -> Vec<Event> {
    let mut events = Vec::new();
    if old.content != new.content || (old.kind == Kind::File && old.size != new.size) {
        events.push(Event::Written);
    }
    if old.mode != new.mode {
        events.push(Event::Mode);
    }
    if (old.uid, old.gid) != (new.uid, new.gid) {
        events.push(Event::Owner);
    }
    if old.xattrs != new.xattrs {
        events.push(Event::Xattrs);
    }
    if events.is_empty() {
        events.push(Event::Times);
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ContentId, EntryName, Timestamp, XattrSetId};

    fn row() -> NodeRow {
        let time = Timestamp::default();
        NodeRow {
            id: NodeId(2),
            kind: Kind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 1,
            blocks: 8,
            mtime: time,
            ctime: time,
            btime: time,
            xattrs: XattrSetId::NONE,
            content: ContentId(3),
        }
    }

    #[test]
    fn a_change_is_named_by_what_differs() {
        let old = row();
        let written = NodeRow { content: ContentId(4), ..row() };
        assert_eq!(changes(&old, &written), [Event::Written]);
        let owned = NodeRow { mode: 0o600, uid: 1, ..row() };
        assert_eq!(changes(&old, &owned), [Event::Mode, Event::Owner]);
        assert_eq!(changes(&old, &row()), [Event::Times]);
    }

    #[test]
    fn of_many_snapshots_the_first_and_the_last_are_told() {
        let snapshot = |id: u64| Snapshot {
            id: crate::types::SnapshotId(id),
            name: format!("s{id}"),
            generation: Generation(id * 10),
            time: Timestamp::default(),
            automatic: false,
            held: false,
            tags: Vec::new(),
        };
        let snapshots: Vec<Snapshot> = (1..=20).map(snapshot).collect();
        let told = |from, until: u64, names_max| {
            let shown = Shown { snapshots: &snapshots, names_max };
            shown.between(Generation(from), Some(Generation(until)))
        };
        assert_eq!(told(10, 11, 2), (vec!["s1".into()], 0));
        assert_eq!(told(11, 31, 2), (vec!["s2".into(), "s3".into()], 0));
        assert_eq!(told(11, 32, 1), (vec!["s2".into(), "s3".into()], 0));
        assert_eq!(told(5, 1000, 2), (vec!["s1".into(), "s20".into()], 18));
        assert_eq!(told(31, 32, 2), (vec![], 0));
        assert_eq!(told(0, 1000, usize::MAX).0.len(), 20);
    }

    #[test]
    fn an_interval_begins_by_creation_rename_or_replacement() {
        let interval = |node, born, died| NameInterval {
            parent: NodeId::ROOT,
            name: EntryName::new("x").unwrap(),
            node: NodeId(node),
            born: Generation(born),
            died: Some(Generation(died)),
        };
        let old = interval(2, 1, 5);
        assert_eq!(first_event(None, &old), Event::Created);
        assert_eq!(first_event(Some(&old), &interval(2, 5, 9)), Event::Renamed);
        assert_eq!(first_event(Some(&old), &interval(3, 5, 9)), Event::Replaced);
        assert_eq!(first_event(Some(&old), &interval(3, 6, 9)), Event::Created);
    }
}

//! What a purge of paths takes out of history: every object that ever had one of the paths or lay
//! below it, with all its past states and names, the ones at other paths as well.

use std::collections::{BTreeSet, HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::PathText;
use crate::catalog::{Catalog, NameInterval, PurgeRow, Version};
use crate::error::{Error, Result};
use crate::types::{ContentId, EntryName, Generation, Kind, NodeId, RelPath, Timestamp};

/// What goes of one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeItem {
    /// The path by which it was found.
    #[serde(flatten)]
    pub path: PathText,
    /// What it is.
    pub kind: Kind,
    /// How many states of it go: of a live one the present one too, as far as it lies in the past.
    pub versions: u64,
    /// Bytes of the contents that go.
    pub bytes: u64,
    /// Whether it is there now, and stays.
    pub live: bool,
}

/// What a purge does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeReport {
    /// What was asked for.
    pub paths: Vec<PathText>,
    /// Each object, ordered by path.
    pub items: Vec<PurgeItem>,
    /// Other paths that the same objects have or had: their history goes as well.
    pub also: Vec<PathText>,
    /// How many states go.
    pub versions: u64,
    /// Bytes of their contents.
    pub bytes: u64,
    /// Held snapshots that show any of it.
    pub held: Vec<String>,
    /// It was done, not only planned.
    pub done: bool,
}

/// A purge before it is done.
pub struct Plan {
    /// What it does.
    pub report: PurgeReport,
    /// The objects.
    pub nodes: Vec<NodeId>,
    /// The records of it.
    pub rows: Vec<PurgeRow>,
}

/// An interval of generations: from, and up to but without.
type Span = (Generation, Generation);

/// Plans the purge of `paths`. Fails where a path never was.
pub fn plan(catalog: &Catalog, paths: &[RelPath], now: Timestamp) -> Result<Plan> {
    let mut found =
        Found { catalog, nodes: HashMap::new(), order: Vec::new(), names: HashSet::new() };
    let mut ends = Vec::new();
    for path in paths {
        if path.is_root() {
            return Err(Error::Refused(
                "the root cannot be purged: name files or directories in it".into(),
            ));
        }
        let begin = found.order.len();
        found.take(path)?;
        if found.order.len() == begin && !paths.iter().any(|above| is_below(path, above)) {
            return Err(Error::NotFound(format!("{path} is not in history")));
        }
        ends.push(found.order.len());
    }
    let snapshots = catalog.snapshots()?;
    let held: Vec<_> = snapshots.iter().filter(|snapshot| snapshot.held).collect();
    let mut shows: BTreeSet<String> = BTreeSet::new();
    let mut items = Vec::new();
    for node in &found.order {
        let (item, versions) = item(catalog, *node, &found.nodes[node].0)?;
        for snapshot in &held {
            let at = snapshot.generation;
            if versions.iter().any(|one| one.born <= at && one.died.is_none_or(|died| at < died)) {
                shows.insert(snapshot.name.clone());
            }
        }
        items.push(item);
    }
    let sums = |items: &[PurgeItem]| {
        let versions = items.iter().map(|item| item.versions).sum::<u64>();
        (versions, items.iter().map(|item| item.bytes).sum::<u64>())
    };
    let mut begin = 0;
    let mut rows = Vec::new();
    for (path, end) in paths.iter().zip(ends) {
        let (versions, bytes) = sums(&items[begin..end]);
        rows.push(PurgeRow { time: now, path: path.clone(), versions, bytes });
        begin = end;
    }
    let (versions, bytes) = sums(&items);
    let also = found.other_names()?;
    items.sort_by(|a, b| a.path.path.cmp(&b.path.path));
    let report = PurgeReport {
        paths: paths.iter().map(PathText::from).collect(),
        items,
        also: also.iter().map(PathText::from).collect(),
        versions,
        bytes,
        held: shows.into_iter().collect(),
        done: false,
    };
    Ok(Plan { report, nodes: found.order, rows })
}

/// What goes of one object, and all its versions.
fn item(catalog: &Catalog, node: NodeId, path: &RelPath) -> Result<(PurgeItem, Vec<Version>)> {
    let versions = catalog.versions(node)?;
    let live = catalog.node(node)?;
    let keeps = live.as_ref().map_or(ContentId::EMPTY, |row| row.content);
    let kind = versions.last().map(|version| version.row.kind);
    let contents: HashMap<ContentId, u64> = versions
        .iter()
        .filter(|version| version.row.kind == Kind::File && version.row.content != keeps)
        .map(|version| (version.row.content, version.row.size))
        .collect();
    let item = PurgeItem {
        path: PathText::from(path),
        kind: kind.or(live.as_ref().map(|row| row.kind)).unwrap_or(Kind::File),
        versions: versions.len() as u64,
        bytes: contents.values().sum(),
        live: live.is_some(),
    };
    Ok((item, versions))
}

fn is_below(path: &RelPath, above: &RelPath) -> bool {
    path != above && path.names().starts_with(above.names())
}

/// The objects found so far.
struct Found<'c> {
    catalog: &'c Catalog,
    /// A path of each, and when it was there.
    nodes: HashMap<NodeId, (RelPath, Vec<Span>)>,
    order: Vec<NodeId>,
    /// The names by which they were found.
    names: HashSet<(NodeId, EntryName)>,
}

impl Found<'_> {
    fn take(&mut self, path: &RelPath) -> Result<()> {
        let always = (Generation(0), Generation(u64::MAX));
        let mut at = vec![(NodeId::ROOT, always)];
        let mut waiting = Vec::new();
        let depth = path.names().len();
        for (index, name) in path.names().iter().enumerate() {
            let mut below = Vec::new();
            for (dir, span) in at {
                for interval in self.catalog.entry_history(dir, name)? {
                    let Some(span) = meet(span, &interval) else { continue };
                    if index + 1 == depth {
                        self.names.insert((dir, name.clone()));
                    }
                    below.push((interval.node, span));
                }
            }
            at = below;
        }
        waiting.extend(at.into_iter().map(|(node, span)| (node, span, path.clone())));
        // What lay in a directory while that had the path.
        while let Some((node, span, path)) = waiting.pop() {
            let (_, spans) = self.nodes.entry(node).or_insert_with(|| {
                self.order.push(node);
                (path.clone(), Vec::new())
            });
            if spans.iter().any(|known| known.0 <= span.0 && span.1 <= known.1) {
                continue;
            }
            spans.push(span);
            for interval in self.catalog.entries_ever(node)? {
                if let Some(span) = meet(span, &interval) {
                    self.names.insert((node, interval.name.clone()));
                    waiting.push((interval.node, span, path.join(&interval.name)));
                }
            }
        }
        Ok(())
    }

    /// The paths of what was found that do not lie where it was looked for.
    fn other_names(&self) -> Result<BTreeSet<RelPath>> {
        let mut others = BTreeSet::new();
        for &node in &self.order {
            for name in self.catalog.name_history(node)? {
                if self.names.contains(&(name.parent, name.name.clone())) {
                    continue;
                }
                if let Some(above) = self.catalog.path_at(name.born, name.parent)? {
                    others.insert(above.join(&name.name));
                }
            }
        }
        Ok(others)
    }
}

/// What two intervals have in common.
fn meet(span: Span, interval: &NameInterval) -> Option<Span> {
    let begin = span.0.max(interval.born);
    let end = interval.died.map_or(span.1, |died| span.1.min(died));
    (begin < end).then_some((begin, end))
}

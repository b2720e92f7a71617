//! Finding the last moment at which something that was deleted was still whole.
//!
//! `rm -r dir` empties a directory before it removes it, so the last state of `dir` is an empty
//! one. What a user wants back is the tree as it was before the removing began: the newest moment
//! at which anything in it was still added or changed. After that moment there were only removals.

use super::log::nodes_of;
use crate::catalog::{Catalog, NameInterval};
use crate::error::{Error, Result};
use crate::types::{Generation, Kind, NodeId, RelPath};

/// How many deleted objects are looked at for one moment; beyond, what was found by then counts.
const LOOKED_AT_MAX: usize = 1_000_000;

/// The newest generation at which `path`, which is gone, was whole.
pub fn last_seen(catalog: &Catalog, path: &RelPath) -> Result<Generation> {
    let never = || Error::NotFound(format!("{path} was never there, so it cannot be brought back"));
    let Some((parent, name)) = path.split_last() else {
        return Err(Error::Refused("the root of the mount is never deleted".into()));
    };
    if catalog.resolve_at(catalog.generation(), path)?.is_some() {
        return Err(Error::Refused(format!(
            "{path} is there; 'rearview log' shows its versions and 'rearview restore' brings \
             one back"
        )));
    }
    let mut last: Option<NameInterval> = None;
    for parent in nodes_of(catalog, &parent)? {
        for interval in catalog.entry_history(parent, name)? {
            let later = |best: &NameInterval| interval.born > best.born;
            if last.as_ref().is_none_or(later) {
                last = Some(interval);
            }
        }
    }
    let last = last.ok_or_else(never)?;
    let whole = newest_change(catalog, &last)?;
    // The name may have gone because a directory above it went or was renamed: then the change lies
    // before that, and the path is there at that moment all the same.
    if catalog.resolve_at(whole, path)?.is_none() {
        return Err(Error::NotFound(format!(
            "{path} was there, but under another name of its directory; 'rearview log' shows where"
        )));
    }
    Ok(whole)
}

/// The newest generation at which the object of `name`, or anything below it, was added or changed
/// while it had that name.
fn newest_change(catalog: &Catalog, name: &NameInterval) -> Result<Generation> {
    let end = name.died.unwrap_or_else(|| Generation(catalog.generation().0 + 1));
    let mut newest = name.born;
    let mut waiting: Vec<(NodeId, Generation)> = vec![(name.node, name.born)];
    let mut looked_at = 0;
    while let Some((node, since)) = waiting.pop() {
        looked_at += 1;
        if looked_at > LOOKED_AT_MAX {
            break;
        }
        newest = newest.max(since);
        let versions = catalog.versions(node)?;
        let is_dir = versions.first().is_some_and(|version| version.row.kind == Kind::Dir);
        if !is_dir {
            // A directory's times change by the removals themselves; a file's change by its
            // writers. Its link count, too, is no change of ours: only content and rights count.
            let within = versions.iter().filter(|version| version.born < end);
            newest = within.map(|version| version.born).fold(newest, Generation::max);
            continue;
        }
        for entry in catalog.deleted(node)? {
            if entry.born < end {
                waiting.push((entry.node, entry.born));
            }
        }
        for entry in catalog.list_at(Generation(end.0 - 1), node)? {
            waiting.push((entry.node, since));
        }
    }
    Ok(newest)
}

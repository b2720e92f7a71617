//! The plan by which everything that one program changed is taken back, and nothing else.
//!
//! What a program did is known by the generations that it made. They give the *slots* it touched
//! (a slot is a name in a directory): those where it added or removed an entry, and those that
//! meant a node which it changed. A slot is to mean again what it meant just before the program's
//! first change of it, in that state. Where somebody else changed the slot or its node after that
//! first change, it is a conflict, and is left as it is.
//!
//! The plan is a list of steps by path, done one after another by whoever asked, with plain system
//! calls in the mount. The directories are put in order first ([`order`]), so that each step finds
//! the paths as it names them.

mod order;
mod slots;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::who::{ByReport, Who};
use super::{Moment, MomentReport, PathText};
use crate::catalog::Catalog;
use crate::error::Result;
use crate::types::{Generation, NodeId, RelPath};

/// What is done with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UndoAction {
    /// Something that was made goes.
    Remove,
    /// A directory that was made goes, if nothing is in it.
    RemoveDir,
    /// A directory that was removed comes back, empty.
    MakeDir,
    /// Something that was renamed gets its old name.
    Rename,
    /// Two objects change places.
    Exchange,
    /// What is there becomes what was there.
    Restore,
    /// What was deleted comes back.
    Recreate,
    /// A file gets back another name that it had.
    Link,
    /// A directory gets its owner, mode and attributes back.
    Attributes,
    /// A directory with the same names in it as before gets its time back; not told to people.
    Times,
}

/// One step of an undo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoStep {
    /// What is done.
    pub action: UndoAction,
    /// With which path, as it is when all steps before are done.
    #[serde(flatten)]
    pub path: PathText,
    /// The path that a renamed one gets; of a link the path of the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<PathText>,
    /// Where the earlier state is: which of the views, and the path in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<(usize, PathText)>,
}

/// A path that is left as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoConflict {
    /// Which.
    #[serde(flatten)]
    pub path: PathText,
    /// Why.
    pub why: String,
    /// Who else changed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<ByReport>,
    /// When, where somebody else did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
}

/// How a program's changes are taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UndoPlan {
    /// Its changes after this moment.
    pub since: MomentReport,
    /// Generations that show the earlier states.
    pub views: Vec<u64>,
    /// What is to be done, in this order.
    pub steps: Vec<UndoStep>,
    /// What is left as it is.
    pub conflicts: Vec<UndoConflict>,
}

/// An earlier state: where it was, and the generations that show it.
#[derive(Clone, Debug)]
struct Source {
    /// `None`: in the root itself.
    slot: Option<slots::Slot>,
    from: Generation,
    until: Generation,
}

/// A step whose source is not in a view yet.
struct Draft {
    action: UndoAction,
    path: RelPath,
    to: Option<RelPath>,
    source: Option<Source>,
}

/// Plans to take back what `who` changed below `under` after the moment `since`. With `force` also
/// where others changed the same after it.
pub fn plan(
    catalog: &Catalog,
    since: &Moment,
    who: &Who,
    under: &RelPath,
    force: bool,
) -> Result<UndoPlan> {
    let ranges = catalog.made_by(since.generation, |actor| who.is(&ByReport::from(actor)))?;
    let mut look = slots::Look::new(catalog, ranges);
    let (works, mut conflicts) = look.works(under, force)?;
    let (drafts, blocked) = order::order(&mut look, works)?;
    conflicts.extend(blocked);
    let (views, steps) = assign_views(&mut look, drafts)?;
    conflicts.sort_by(|a, b| a.path.path.cmp(&b.path.path));
    Ok(UndoPlan { since: since.into(), views, steps, conflicts })
}

/// Finds the fewest generations that show all sources: each one that is needed is the last at which
/// some source is still seen.
fn assign_views(
    look: &mut slots::Look<'_>,
    drafts: Vec<Draft>,
) -> Result<(Vec<u64>, Vec<UndoStep>)> {
    let mut spans: Vec<(Generation, Generation)> = drafts
        .iter()
        .filter_map(|draft| draft.source.as_ref().map(|source| (source.until, source.from)))
        .collect();
    spans.sort_unstable();
    let mut points: Vec<Generation> = Vec::new();
    for (until, from) in spans {
        if points.last().is_none_or(|last| *last < from) {
            points.push(until);
        }
    }
    let indexes: BTreeMap<Generation, usize> =
        points.iter().enumerate().map(|(index, point)| (*point, index)).collect();
    let mut dirs: HashMap<(usize, NodeId), Option<RelPath>> = HashMap::new();
    let mut steps = Vec::with_capacity(drafts.len());
    for draft in drafts {
        let source = match &draft.source {
            None => None,
            Some(Source { slot: None, from, until }) => {
                let (_, &index) =
                    indexes.range(*from..=*until).next().expect("a point lies in each span");
                Some((index, PathText::from(&RelPath::root())))
            }
            Some(Source { slot: Some((parent, name)), from, until }) => {
                let (&point, &index) =
                    indexes.range(*from..=*until).next().expect("a point lies in each span");
                let dir = match dirs.get(&(index, *parent)) {
                    Some(known) => known.clone(),
                    None => {
                        let found = look.catalog.path_at(point, *parent)?;
                        dirs.entry((index, *parent)).or_insert(found).clone()
                    }
                };
                dir.map(|dir| (index, PathText::from(&dir.join(name))))
            }
        };
        steps.push(UndoStep {
            action: draft.action,
            path: PathText::from(&draft.path),
            to: draft.to.as_ref().map(PathText::from),
            source,
        });
    }
    Ok((points.into_iter().map(|point| point.0).collect(), steps))
}

//! Where the directories of a replica that is being resynced lie, by node: so that one which was
//! renamed meanwhile is renamed there too, and not copied.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::error::{IoContext, Result};
use crate::store::site::Site;
use crate::types::{EntryName, NodeId, RelPath, Timestamp};

use super::super::nodes::DEPTH_MAX;

/// Stands for the private directory where directories lie that are on their way: no node.
pub(super) const ON_THE_WAY: NodeId = NodeId(0);

/// A file's state when it was compared last.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    /// The source's time of change.
    pub ctime: Timestamp,
    /// Which object of the target was equal to it.
    pub ino: u64,
}

/// What is known of the replica's tree.
#[derive(Default)]
pub(super) struct Places {
    dirs: HashMap<NodeId, (NodeId, EntryName)>,
    below: HashMap<NodeId, BTreeMap<EntryName, NodeId>>,
    /// Directories all of whose entries have been compared once.
    pub done: HashSet<NodeId>,
    /// Files that were compared, and did not change just then.
    pub seen: HashMap<NodeId, Seen>,
    /// Objects of the replica that this resync made.
    pub made: HashSet<u64>,
}

impl Places {
    /// Notes where a directory lies.
    pub fn put(&mut self, node: NodeId, parent: NodeId, name: &EntryName) {
        self.forget(node);
        self.dirs.insert(node, (parent, name.clone()));
        self.below.entry(parent).or_default().insert(name.clone(), node);
    }

    /// The directory is no more, or it is not known where.
    pub fn forget(&mut self, node: NodeId) {
        if let Some((parent, name)) = self.dirs.remove(&node)
            && let Some(names) = self.below.get_mut(&parent)
            && names.get(&name) == Some(&node)
        {
            names.remove(&name);
        }
    }

    /// Whatever is known of directories holds for all that is in them.
    pub fn all_done(&mut self) {
        self.done = self.dirs.keys().copied().chain([NodeId::ROOT]).collect();
    }

    /// Whether a directory lies under this name.
    pub fn is_at(&self, node: NodeId, parent: NodeId, name: &EntryName) -> bool {
        self.dirs.get(&node).is_some_and(|(own, known)| *own == parent && known == name)
    }

    /// The directory above.
    pub fn parent(&self, node: NodeId) -> Option<NodeId> {
        self.dirs.get(&node).map(|(parent, _)| *parent)
    }

    /// The directory that lies under a name.
    pub fn at(&self, parent: NodeId, name: &EntryName) -> Option<NodeId> {
        self.below.get(&parent)?.get(name).copied()
    }

    /// The path of a directory, or of [`ON_THE_WAY`].
    pub fn path(&self, node: NodeId) -> Option<RelPath> {
        let mut names = Vec::new();
        let mut at = node;
        while at != NodeId::ROOT {
            if at == ON_THE_WAY {
                let tmp = crate::store::site::private("tmp");
                names.extend(tmp.names().iter().rev().cloned());
                break;
            }
            let (parent, name) = self.dirs.get(&at)?;
            names.push(name.clone());
            at = *parent;
            if names.len() > DEPTH_MAX {
                return None;
            }
        }
        names.reverse();
        Some(RelPath::from(names))
    }
}

/// The name under which a directory lies that is on its way.
pub(super) fn aside_name(node: NodeId) -> EntryName {
    EntryName::new(format!("aside-{:016x}", node.0)).expect("hex digits and letters")
}

pub(super) fn aside_node(name: &EntryName) -> Option<NodeId> {
    let hex = std::str::from_utf8(name.as_bytes()).ok()?.strip_prefix("aside-")?;
    u64::from_str_radix(hex, 16).ok().map(NodeId)
}

/// The directories that an earlier, interrupted resync left on their way.
pub(super) fn find_aside(target: &Site, places: &mut Places) -> Result<()> {
    let Some(path) = places.path(ON_THE_WAY) else { return Ok(()) };
    let dir = target.dir(&path)?;
    for entry in target.backing.list(&dir).context("list", target.at(&path))? {
        if let Some(node) = aside_node(&entry.name) {
            places.put(node, ON_THE_WAY, &entry.name);
        }
    }
    Ok(())
}

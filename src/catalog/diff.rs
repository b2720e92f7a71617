//! The differences between two generations, found from what was touched between them.
//!
//! A node is the same node under all its names: a changed name of a living node is a rename, of a
//! directory too, whose children are not mentioned for it. Of hard links, names are paired as far
//! as they go; the rest are added or removed.

use std::collections::{BTreeSet, HashMap, HashSet};

use rusqlite::Connection;

use super::query::{names_at, node_at};
use super::{Catalog, DiffKind, Difference, NodeRow, touched};
use crate::error::Result;
use crate::types::{EntryName, Generation, Kind, NodeId, RelPath};

/// Directories deeper than this do not exist; only a damaged catalog leads further.
const DEPTH_MAX: usize = 4096;

impl Catalog {
    /// The differences between the trees of two generations below `under`, ordered by path. Costs
    /// what changed between them, not the size of the trees.
    pub fn diff(
        &self,
        from: Generation,
        to: Generation,
        under: &RelPath,
    ) -> Result<Vec<Difference>> {
        let (from, to) = (self.settled(from)?, self.settled(to)?);
        self.shared.read_at_once(|db| {
            let mut found = Found {
                old: Tree { db, at: from, paths: HashMap::new() },
                new: Tree { db, at: to, paths: HashMap::new() },
                modified: HashSet::new(),
                renamed: HashMap::new(),
                differences: Vec::new(),
            };
            for node in touched_between(db, from.min(to), from.max(to))? {
                found.compare(node)?;
            }
            found.finish(under)
        })
    }
}

/// The nodes touched in (from, to], and a few more: older stores have touches by batch, and the
/// batch that follows may have begun before `to`.
pub(super) fn touched_between(
    db: &Connection,
    from: Generation,
    to: Generation,
) -> rusqlite::Result<BTreeSet<NodeId>> {
    if from == to {
        return Ok(BTreeSet::new());
    }
    touched::nodes(db, from, touched::next(db, to)?.unwrap_or(to))
}

/// One of the two trees.
struct Tree<'c> {
    db: &'c Connection,
    at: Generation,
    /// Paths of directories.
    paths: HashMap<NodeId, Option<RelPath>>,
}

impl Tree<'_> {
    fn path(&mut self, parent: NodeId, name: &EntryName) -> rusqlite::Result<Option<RelPath>> {
        Ok(self.dir_path(parent)?.map(|path| path.join(name)))
    }

    /// The path of a directory. Not by recursion: a tree may be deeper than a stack.
    fn dir_path(&mut self, dir: NodeId) -> rusqlite::Result<Option<RelPath>> {
        let mut below = Vec::new();
        let mut at = dir;
        let mut path = loop {
            if at == NodeId::ROOT {
                break Some(RelPath::root());
            }
            if let Some(known) = self.paths.get(&at) {
                break known.clone();
            }
            match names_at(self.db, self.at, at)?.into_iter().min() {
                Some((parent, name)) if below.len() < DEPTH_MAX => {
                    below.push((at, name));
                    at = parent;
                }
                _ => break None,
            }
        };
        for (node, name) in below.into_iter().rev() {
            path = path.map(|path| path.join(&name));
            self.paths.insert(node, path.clone());
        }
        Ok(path)
    }
}

/// What was found so far.
struct Found<'c> {
    old: Tree<'c>,
    new: Tree<'c>,
    /// Living nodes whose state or entries differ.
    modified: HashSet<NodeId>,
    /// New paths of renamed nodes; those may be modified too.
    renamed: HashMap<NodeId, RelPath>,
    differences: Vec<Difference>,
}

impl Found<'_> {
    fn compare(&mut self, node: NodeId) -> rusqlite::Result<()> {
        let old = node_at(self.old.db, self.old.at, node)?;
        let new = node_at(self.new.db, self.new.at, node)?;
        let Some(kind) = new.as_ref().or(old.as_ref()).map(|row| row.kind) else { return Ok(()) };
        let mut lost = names_at(self.old.db, self.old.at, node)?;
        let mut won = names_at(self.new.db, self.new.at, node)?;
        let kept: HashSet<_> = lost.iter().filter(|name| won.contains(name)).cloned().collect();
        lost.retain(|name| !kept.contains(name));
        won.retain(|name| !kept.contains(name));
        lost.sort();
        won.sort();
        for (parent, _) in lost.iter().chain(&won) {
            self.modified.insert(*parent);
        }
        let (mut lost, mut won) = (lost.into_iter(), won.into_iter());
        let both = lost.len().min(won.len());
        for ((old_dir, old_name), (new_dir, new_name)) in lost.by_ref().zip(won.by_ref()).take(both)
        {
            let path = self.old.path(old_dir, &old_name)?;
            let to = self.new.path(new_dir, &new_name)?;
            if let (Some(path), Some(to)) = (path, to) {
                self.renamed.insert(node, to.clone());
                self.add(DiffKind::Renamed, kind, path, Some(to));
            }
        }
        for (dir, name) in lost {
            if let Some(path) = self.old.path(dir, &name)? {
                self.add(DiffKind::Removed, kind, path, None);
            }
        }
        for (dir, name) in won {
            if let Some(path) = self.new.path(dir, &name)? {
                self.add(DiffKind::Added, kind, path, None);
            }
        }
        if let (Some(old), Some(new)) = (old, new)
            && differs(&old, &new)
        {
            self.modified.insert(node);
        }
        Ok(())
    }

    fn add(&mut self, kind: DiffKind, node_kind: Kind, path: RelPath, to: Option<RelPath>) {
        self.differences.push(Difference { kind, node_kind, path, to });
    }

    fn finish(mut self, under: &RelPath) -> rusqlite::Result<Vec<Difference>> {
        for node in std::mem::take(&mut self.modified) {
            let old = node_at(self.old.db, self.old.at, node)?;
            let (Some(_), Some(new)) = (old, node_at(self.new.db, self.new.at, node)?) else {
                continue;
            };
            let path = match (node, self.renamed.remove(&node)) {
                (NodeId::ROOT, _) => Some(RelPath::root()),
                (_, Some(path)) => Some(path),
                _ => match names_at(self.new.db, self.new.at, node)?.into_iter().min() {
                    Some((dir, name)) => self.new.path(dir, &name)?,
                    None => None,
                },
            };
            if let Some(path) = path {
                self.add(DiffKind::Modified, new.kind, path, None);
            }
        }
        let below = |path: &RelPath| path.names().starts_with(under.names());
        self.differences.retain(|one| below(&one.path) || one.to.as_ref().is_some_and(below));
        self.differences.sort_by(|a, b| {
            a.path.cmp(&b.path).then((a.kind as u8).cmp(&(b.kind as u8))).then(a.to.cmp(&b.to))
        });
        Ok(self.differences)
    }
}

/// Whether somebody who looks at a node can tell the two states apart. The time of the last change
/// of attributes alone is no difference: a rename or a new link sets it too.
fn differs(old: &NodeRow, new: &NodeRow) -> bool {
    let seen = |row: &NodeRow| {
        (row.mode, row.uid, row.gid, row.rdev, row.size, row.mtime, row.xattrs, row.content)
    };
    seen(old) != seen(new)
}

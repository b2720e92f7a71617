//! Names in the catalog with nothing on the backing, or with something else.
//!
//! A node that loses its name to another may lie elsewhere. Until all is looked at it is parked: it
//! has a name that nothing on a backing has and that history does not show, and keeps all below it.
//! A run that is stopped leaves it so; the next one finds the parked name missing, as any other.

use super::{Import, Pending};
use crate::catalog::Change;
use crate::error::Result;
use crate::store::site::own_name;
use crate::types::{ContentId, EntryName, Kind, NodeId, RelPath};

/// What the name of a node begins with that lost its own to another.
const PARKED: &str = ".rearview-parked-";

/// A name in the catalog with nothing on the backing.
pub(super) struct Missing {
    pub(super) dir: RelPath,
    pub(super) parent: NodeId,
    pub(super) name: EntryName,
    pub(super) node: NodeId,
    pub(super) kind: Kind,
}

impl Import<'_> {
    /// Frees a name that means something else on the backing than in the catalog.
    pub(super) fn replace(
        &mut self,
        dir: &Pending,
        name: &EntryName,
        known: Option<(NodeId, Kind)>,
    ) -> Result<()> {
        let Some((node, kind)) = known else { return Ok(()) };
        let (dir_path, name) = (dir.path.clone(), name.clone());
        self.park(Missing { dir: dir_path, parent: dir.node, name, node, kind })
    }

    /// Takes its name from a node that may lie elsewhere. Until that is known it has a name that
    /// nothing on a backing has, and that history does not show, so that it and all below it are
    /// never without one.
    pub(super) fn park(&mut self, gone: Missing) -> Result<()> {
        let (parent, name, node) = (gone.parent, gone.name.clone(), gone.node);
        let mut all = self.with_descendants(gone)?;
        // A link of the node may be parked there as well, or one that a stopped run left.
        let mut number = self.parked.len();
        let parked = loop {
            let parked = own_name(&format!("{PARKED}{:x}-{number:x}", node.0));
            match self.catalog.lookup(parent, &parked)? {
                None => break parked,
                Some(_) => number += 1,
            }
        };
        self.changes.push(Change::EntryRemove { parent, name: name.clone() });
        self.changes.push(Change::EntryUnversioned { parent, name: parked.clone(), node });
        self.push()?;
        all[0].name = parked.clone();
        self.parked.insert((parent, parked), name);
        self.missing.extend(all.into_iter().map(Some));
        Ok(())
    }

    /// A name with all that the catalog has below it, parents first.
    pub(super) fn with_descendants(&mut self, missing: Missing) -> Result<Vec<Missing>> {
        let mut all = vec![missing];
        let mut next = 0;
        while let Some(Missing { dir, name, node, kind, .. }) = all.get(next) {
            next += 1;
            if *kind == Kind::Dir {
                let (dir, parent) = (dir.join(name), *node);
                for entry in self.catalog.list(parent)? {
                    let (dir, name) = (dir.clone(), entry.name);
                    all.push(Missing { dir, parent, name, node: entry.node, kind: entry.kind });
                }
            }
        }
        Ok(all)
    }

    /// Removes one name if the node still has it, and the node with its last one.
    pub(super) fn drop_name(
        &mut self,
        parent: NodeId,
        name: &EntryName,
        node: NodeId,
        dir: &RelPath,
    ) -> Result<()> {
        // `names` sees what was pushed: with nothing waiting its answer is exact.
        self.push()?;
        let names = self.catalog.names(node)?;
        if !names.iter().any(|(dir, own)| (*dir, own) == (parent, name)) {
            return Ok(());
        }
        let last = names.len() == 1;
        self.changes.push(Change::EntryRemove { parent, name: name.clone() });
        let shown = self.parked.get(&(parent, name.clone())).cloned();
        let name = shown.as_ref().unwrap_or(name);
        self.report.removed += 1;
        if last {
            if let Some(row) = self.catalog.node(node)?
                && row.kind == Kind::File
                && row.content != ContentId::EMPTY
                && !self.catalog.sources(node, row.content)?.is_whole()
                && !self.rescue(&row, dir, name)?
            {
                self.report.lost.push(dir.join(name));
            }
            self.changes.push(Change::NodeGone(node));
        } else {
            self.hide_unnamed(parent, name, node)?;
        }
        Ok(())
    }
}

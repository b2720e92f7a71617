//! An import that looks only at what the last mount may have left unrecorded.
//!
//! Directories that moved get their new places first, by what the intent log knows of them, and
//! nothing below them is looked at for that. Then the entries of dirty directories are taken as by
//! a whole import, with all that was born in them, and dirty files in other directories singly. A
//! name that is gone belongs, perhaps, to a file that has others: those are looked at first, so
//! that it is recognised under a new one.

use std::collections::HashSet;

use super::{Import, Missing, Pending};
use crate::catalog::Change;
use crate::error::{IoContext, Result};
use crate::excludes::{RULES_FILE, Scope};
use crate::replica::backing::{DirEntry, Handle};
use crate::store::bounds::{Bounds, Found, Seat, Survey};
use crate::store::site::own_name;
use crate::types::{EntryName, NodeId, RelPath};

impl Import<'_> {
    pub(super) fn run_within(&mut self, bounds: &Bounds, replica: u64) -> Result<()> {
        let survey = Survey::new(self.site, replica, self.catalog, bounds)?;
        self.strays = survey.strays(bounds);
        self.settle_moved_dirs(bounds, &survey)?;
        let dirs: HashSet<NodeId> = survey.dirs.iter().map(|(_, dir)| *dir).collect();
        for file in bounds.files() {
            self.take_names(file, bounds, &survey, &dirs)?;
        }
        for (path, dir) in &survey.dirs {
            for file in self.gone_from(path, *dir)? {
                self.take_names(file, bounds, &survey, &dirs)?;
            }
        }
        for (path, dir) in survey.dirs {
            self.take_attributes(&path, dir)?;
            let scope = self.scope_above(&path)?;
            self.pending.push(Pending { path, node: dir, fresh: false, doubtful: false, scope });
        }
        self.take_pending()
    }

    /// Gives every directory that moved its new name. All old names go first and all new ones come
    /// after, in one push: they may form chains and rings, and none is without a name in between.
    fn settle_moved_dirs(&mut self, bounds: &Bounds, survey: &Survey) -> Result<()> {
        let mut moved: Vec<(&NodeId, &Found)> = survey.moved.iter().collect();
        moved.sort_unstable_by_key(|(_, found)| found.above.names().len());
        let (mut removes, mut adds) = (Vec::new(), Vec::new());
        for (&node, found) in moved {
            let old = self.catalog.names(node)?.into_iter().next();
            if let (Some((parent, name)), Seat::Known(at)) = (&old, &found.seat)
                && (parent, name) == (at, &found.name)
            {
                continue;
            }
            let Some((parent, name)) = old else { continue };
            let to = match found.seat {
                Seat::Known(dir) => dir,
                Seat::Unknown => self.take_newborn(&found.above, bounds, survey, &mut adds)?,
            };
            self.free_name(to, &found.name, &found.above, bounds, survey)?;
            removes.push(Change::EntryRemove { parent, name });
            let name = found.name.clone();
            adds.push(match self.catalog.is_versioned(node)? {
                true => Change::EntryAdd { parent: to, name, node },
                false => Change::EntryUnversioned { parent: to, name, node },
            });
            self.report.moved += 1;
        }
        self.push()?;
        self.changes = removes;
        self.changes.append(&mut adds);
        self.push()
    }

    /// What had a name that a moved directory has goes, unless that moved as well.
    fn free_name(
        &mut self,
        dir: NodeId,
        name: &EntryName,
        path: &RelPath,
        bounds: &Bounds,
        survey: &Survey,
    ) -> Result<()> {
        let Some((node, kind)) = self.catalog.lookup(dir, name)? else { return Ok(()) };
        if bounds.moved().contains(&node) && survey.moved.contains_key(&node) {
            return Ok(());
        }
        let (dir_path, name) = (path.clone(), name.clone());
        self.park(Missing { dir: dir_path, parent: dir, name, node, kind })
    }

    /// The node of a directory that the catalog does not know, and those above it: added to `adds`
    /// unless they are there already.
    fn take_newborn(
        &mut self,
        path: &RelPath,
        bounds: &Bounds,
        survey: &Survey,
        adds: &mut Vec<Change>,
    ) -> Result<NodeId> {
        if let Some(node) = self.newborn.get(path) {
            return Ok(*node);
        }
        let Some((above, name)) = path.split_last() else { return Ok(NodeId::ROOT) };
        let searched = survey.dirs.iter().find(|(own, _)| *own == above).map(|(_, dir)| *dir);
        let parent = match searched {
            Some(dir) => dir,
            None => self.take_newborn(&above, bounds, survey, adds)?,
        };
        if let Some((node, kind)) = self.catalog.lookup(parent, name)?
            && kind == crate::types::Kind::Dir
            && !bounds.moved().contains(&node)
        {
            return Ok(node);
        }
        self.free_name(parent, name, &above, bounds, survey)?;
        let handle = self.site.dir(path)?;
        let object = self.site.object_of(&handle, path)?;
        let xattrs = self.catalog.intern_xattrs(&object.xattrs)?;
        self.push()?;
        let excluded = !self.catalog.is_versioned(parent)? && !self.newborn.contains_key(&above);
        let node = self.add_node((parent, name.clone(), excluded), &object.stat, xattrs, &[]);
        // It is met again, and known then.
        self.claimed.remove(node);
        adds.append(&mut self.changes);
        self.newborn.insert(path.clone(), node);
        Ok(node)
    }

    /// Takes all names of a file that lie in directories which are not looked through.
    fn take_names(
        &mut self,
        file: NodeId,
        bounds: &Bounds,
        survey: &Survey,
        dirs: &HashSet<NodeId>,
    ) -> Result<()> {
        let Some(row) = self.catalog.node(file)? else { return Ok(()) };
        for (parent, name) in self.catalog.names(file)? {
            if dirs.contains(&parent) || bounds.born(parent) || self.claimed.contains(file) {
                continue;
            }
            let Some(path) = survey.locate(self.catalog, bounds.moved(), parent)? else { continue };
            let handle = self.site.dir(&path)?;
            let found = self.site.backing.stat_at(&handle, &name);
            let scope = self.scope_above(&path)?;
            let mut dir =
                Pending { path: path.clone(), node: parent, fresh: false, doubtful: false, scope };
            let entries = self.rules_in(&handle);
            dir.scope = self.scope_of(&dir, &handle, &entries);
            match found {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    let missing = Missing { dir: path, parent, name, node: file, kind: row.kind };
                    self.missing.push(Some(missing));
                }
                other => {
                    other.context("look at", self.site.at(&path.join(&name)))?;
                    let found = self.site.object(&handle, &path, &name);
                    self.take_entry(&dir, name, found, Some((file, row.kind)))?;
                    // A file that was emptied took the place of another, which moves these times.
                    self.take_attributes(&path, parent)?;
                }
            }
        }
        Ok(())
    }

    /// Files that lost a name in this directory and have others.
    fn gone_from(&mut self, path: &RelPath, dir: NodeId) -> Result<Vec<NodeId>> {
        let handle = self.site.dir(path)?;
        let entries = self.site.live_entries(&handle, path)?;
        let mut gone = Vec::new();
        for known in self.catalog.list(dir)? {
            let there = entries.binary_search_by(|entry| entry.name.cmp(&known.name)).is_ok();
            if !there && self.catalog.names(known.node)?.len() > 1 {
                gone.push(known.node);
            }
        }
        Ok(gone)
    }

    fn take_attributes(&mut self, path: &RelPath, dir: NodeId) -> Result<()> {
        let handle = self.site.dir(path)?;
        let object = self.site.object_of(&handle, path)?;
        self.push()?;
        match self.catalog.node(dir)? {
            Some(row) => self.refresh(&row, &object),
            None => Ok(()),
        }
    }

    /// The entry of a directory that has rules, if there is one.
    fn rules_in(&self, dir: &Handle) -> Vec<DirEntry> {
        let name = own_name(RULES_FILE);
        match self.site.backing.stat_at(dir, &name) {
            Ok(stat) if self.any_rules => vec![DirEntry { name, kind: stat.kind, ino: stat.ino }],
            _ => Vec::new(),
        }
    }

    /// The rules of the directory above this one.
    fn scope_above(&mut self, path: &RelPath) -> Result<std::sync::Arc<Scope>> {
        let mut scope = Scope::root(self.exclude.clone(), None);
        let Some((above, _)) = path.split_last() else { return Ok(scope) };
        if !self.any_rules {
            return Ok(scope);
        }
        let mut at = RelPath::root();
        let names: Vec<Option<EntryName>> =
            std::iter::once(None).chain(above.names().iter().cloned().map(Some)).collect();
        for name in names {
            if let Some(name) = name {
                at = at.join(&name);
            }
            let handle = self.site.dir(&at)?;
            let entries = self.rules_in(&handle);
            let (path, node) = (at.clone(), NodeId::ROOT);
            let dir = Pending { path, node, fresh: false, doubtful: false, scope };
            scope = self.scope_of(&dir, &handle, &entries);
        }
        Ok(scope)
    }
}

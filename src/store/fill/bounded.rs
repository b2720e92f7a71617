//! A fill that looks only at what the last mount may have left different.
//!
//! Directories that moved on one backing and not on the other are first put aside on the target,
//! deepest first, and taken from there when their place is made: so moves of any kind, chains and
//! rings among them, are renames, and nothing below a moved directory is looked at for that. If we
//! die meanwhile, the next fill finds them there.

use std::collections::{HashMap, HashSet};

use super::{Fill, FillReport};
use crate::catalog::Catalog;
use crate::error::{IoContext, Result};
use crate::progress::Progress;
use crate::replica::backing::{Handle, RenameMode};
use crate::store::bounds::{Bounds, Seat, Survey, path_in};
use crate::store::site::{Site, own_name, private};
use crate::types::{EntryName, Kind, NodeId, RelPath};

/// What the names of directories begin with that are put aside.
const ASIDE: &str = "moved-";

/// The part that may differ.
pub(super) struct Within<'a> {
    pub bounds: &'a Bounds,
    catalog: &'a Catalog,
    aside: HashMap<NodeId, EntryName>,
    /// Directories that may have moved on the target and are not recognised there.
    strays: HashSet<NodeId>,
}

/// Makes `target` equal to `source` as [`super::fill`] does, where nothing can differ but what is
/// within `bounds`. `catalog` agrees with `source`; `replica` tells which one the target is.
pub fn fill_within(
    (source, target): (&Site, &Site),
    replica: u64,
    catalog: &Catalog,
    bounds: &Bounds,
    progress: &Progress,
) -> Result<FillReport> {
    progress.begin(&format!("Recovering {}", target.path.display()), 0, 0);
    let result = Fill::new(source, target, None, progress).and_then(|mut fill| {
        let (aside, strays) = (HashMap::new(), HashSet::new());
        fill.within = Some(Within { bounds, catalog, aside, strays });
        fill.run_within(replica)
    });
    progress.end();
    result
}

impl Fill<'_> {
    fn run_within(mut self, replica: u64) -> Result<FillReport> {
        let Some(Within { bounds, catalog, strays, .. }) = &mut self.within else {
            return self.run();
        };
        let (bounds, catalog) = (*bounds, *catalog);
        let survey = Survey::new(self.target, replica, catalog, bounds)?;
        *strays = survey.strays(bounds);
        self.put_aside(&survey, catalog)?;
        // On the source every directory lies where the catalog has it.
        let mut dirs: Vec<RelPath> = Vec::new();
        for dir in bounds.searched() {
            dirs.extend(path_in(catalog, dir)?);
        }
        dirs.sort_by_key(|path| path.names().len());
        // All directories are in their places before any file is: one may be a link to another that
        // lies in a directory which moves.
        let (mut entered, mut seen) = (Vec::new(), HashSet::new());
        for dir in dirs {
            let mut waiting = vec![(dir, false)];
            while let Some((path, doubtful)) = waiting.pop() {
                let first = seen.insert(path.clone());
                if (first || doubtful) && self.is_on_both(&path)? {
                    let below = self.place_dirs(&path, doubtful)?;
                    waiting.extend(below.into_iter().map(|(name, all)| (path.join(&name), all)));
                    if first {
                        entered.push(path);
                    }
                }
            }
        }
        for path in &entered {
            self.fill_dir(path)?;
        }
        for file in bounds.files() {
            for (parent, name) in catalog.names(file)? {
                if bounds.is_searched(parent) {
                    continue;
                }
                let Some(path) = path_in(catalog, parent)? else { continue };
                let handles = (self.source.dir(&path)?, self.target.dir(&path)?);
                if let Some(object) = self.source.object(&handles.0, &path, &name)? {
                    let at = (&handles.0, &handles.1);
                    self.fill_entry(at, &path, &name, &object, Some(file))?;
                    entered.push(path);
                }
            }
        }
        for path in entered.iter().rev() {
            self.finish_dir(path)?;
        }
        self.drop_aside()?;
        self.finish()
    }

    fn is_on_both(&self, path: &RelPath) -> Result<bool> {
        for site in [self.source, self.target] {
            match site.backing.open_dir(path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
                other => drop(other.context("open the directory", site.at(path))?),
            }
        }
        Ok(true)
    }

    /// Takes every moved directory away that does not lie where the catalog has it.
    fn put_aside(&mut self, survey: &Survey, catalog: &Catalog) -> Result<()> {
        let Some(within) = &mut self.within else { return Ok(()) };
        let scratch = self.target.dir(&private("tmp"))?;
        let path = self.target.private_path("tmp");
        for entry in self.target.backing.list(&scratch).context("list", &path)? {
            let node = std::str::from_utf8(entry.name.as_bytes())
                .ok()
                .and_then(|name| name.strip_prefix(ASIDE))
                .and_then(|hex| u64::from_str_radix(hex, 16).ok());
            within.aside.extend(node.map(|node| (NodeId(node), entry.name)));
        }
        let mut moved: Vec<_> = survey.moved.iter().collect();
        moved.sort_by_key(|(_, found)| std::cmp::Reverse(found.above.names().len()));
        for (&node, found) in moved {
            let place = catalog.names(node)?.into_iter().next();
            let seated = match (&place, &found.seat) {
                (Some((parent, name)), Seat::Known(seat)) => (parent, name) == (seat, &found.name),
                _ => false,
            };
            if seated {
                continue;
            }
            let from = self.target.dir(&found.above)?;
            let aside = own_name(&format!("{ASIDE}{:016x}", node.0));
            self.target
                .backing
                .rename(&from, &found.name, &scratch, &aside, RenameMode::NoReplace)
                .context("move aside", self.target.at(&found.path()))?;
            within.aside.insert(node, aside);
        }
        Ok(())
    }

    /// Makes the sub-directories that the source has; returns those to be gone into, and whether
    /// all below them is: so it is where `doubtful` says it of this one.
    fn place_dirs(&mut self, path: &RelPath, doubtful: bool) -> Result<Vec<(EntryName, bool)>> {
        let nodes = self.nodes_in(path)?;
        let from = self.source.dir(path)?;
        let to = self.target.dir(path)?;
        let mut below = Vec::new();
        for entry in self.source.live_entries(&from, path)? {
            if entry.kind != Kind::Dir || self.is_mount(path, &entry.name) {
                continue;
            }
            let node = nodes.get(&entry.name).copied();
            let made = self.make_dir(&to, path, &entry.name, node)?;
            let doubtful = doubtful || node.is_some_and(|node| self.is_stray(node));
            if made || doubtful || self.goes_into(node) {
                below.push((entry.name, doubtful));
            }
        }
        Ok(below)
    }

    /// Puts a directory in its place that was put aside; `false` if it was not.
    pub(super) fn take_from_aside(
        &mut self,
        to: &Handle,
        dir: &RelPath,
        name: &EntryName,
        node: Option<NodeId>,
    ) -> Result<bool> {
        let Some(within) = &mut self.within else { return Ok(false) };
        let Some(aside) = node.and_then(|node| within.aside.remove(&node)) else {
            return Ok(false);
        };
        let backing = &self.target.backing;
        if backing.stat_at(to, name).is_ok() {
            self.quarantine.take(to, dir, name)?;
        }
        let scratch = self.target.dir(&private("tmp"))?;
        backing
            .rename(&scratch, &aside, to, name, RenameMode::NoReplace)
            .context("move to its place", self.target.at(&dir.join(name)))?;
        Ok(true)
    }

    /// What has no place any more goes to quarantine.
    fn drop_aside(&mut self) -> Result<()> {
        let Some(within) = &mut self.within else { return Ok(()) };
        let scratch = self.target.dir(&private("tmp"))?;
        for aside in std::mem::take(&mut within.aside).into_values() {
            self.quarantine.take(&scratch, &RelPath::root(), &aside)?;
        }
        Ok(())
    }

    /// The nodes of a directory's entries; empty where all is compared anyway.
    pub(super) fn nodes_in(&self, path: &RelPath) -> Result<HashMap<EntryName, NodeId>> {
        let Some(Within { catalog, .. }) = &self.within else { return Ok(HashMap::new()) };
        let mut dir = NodeId::ROOT;
        for name in path.names() {
            let Some((node, _)) = catalog.lookup(dir, name)? else { return Ok(HashMap::new()) };
            dir = node;
        }
        Ok(catalog.list(dir)?.into_iter().map(|entry| (entry.name, entry.node)).collect())
    }

    fn is_stray(&self, node: NodeId) -> bool {
        self.within.as_ref().is_some_and(|within| within.strays.contains(&node))
    }

    /// Whether a directory that is there on both sides has to be gone into.
    pub(super) fn goes_into(&self, node: Option<NodeId>) -> bool {
        match &self.within {
            Some(within) => node.is_none_or(|node| within.bounds.born(node)),
            None => true,
        }
    }

    /// Another name of a hard-linked object that is sure to be right on the target.
    pub(super) fn name_elsewhere(&self, node: Option<NodeId>) -> Result<Option<RelPath>> {
        let (Some(Within { bounds, catalog, .. }), Some(node)) = (&self.within, node) else {
            return Ok(None);
        };
        if bounds.may_differ(node) {
            return Ok(None);
        }
        for (parent, name) in catalog.names(node)? {
            if !bounds.is_searched(parent)
                && let Some(path) = path_in(catalog, parent)?
            {
                return Ok(Some(path.join(&name)));
            }
        }
        Ok(None)
    }
}

//! Which file a lost one must be, where it was written to and its birth does not tell.
//!
//! What was there at the last checkpoint, has no file under its name and is not preserved lies
//! under another name, as one of the files that no node is known for. Which of them can be it:
//!
//! - one that was born with it. Where none was, as on a backing whose births are not the recorded
//!   ones, one that was there when the catalog was last told of anything: a later one is new;
//! - one of another size or time only if the intent log has it as written to;
//! - one that has all bytes of its contents of which there are no before-images: these are durable
//!   before a file gets shorter. A content that was not durable itself may have lost its end.
//!
//! If it can be one alone, it is. What was born after the checkpoint, and is in no snapshot made
//! since, need not be there at all: such a one is that file only if no other can be it.

use std::collections::{HashMap, HashSet};

use super::moves::{MoveKey, Origin, Pairs, born_together};
use super::{Deferred, Doubt, Import};
use crate::catalog::{NodeRow, Sources};
use crate::error::{Error, Result};
use crate::replica::backing::Stat;
use crate::store::bounds::Bounds;
use crate::types::{ContentId, NodeId, Timestamp};

/// What a file has to be to be a lost one.
struct Demand {
    key: MoveKey,
    /// It was not written to.
    is_untouched: bool,
    /// Its contents that were durable, with their sizes.
    durable: Vec<(Sources, u64)>,
    /// Its newest content, if it was born after the last checkpoint.
    newest: Option<(Sources, u64)>,
}

impl Demand {
    /// Whether nothing has to be there of it.
    fn is_young(&self) -> bool {
        self.newest.is_some() && self.durable.is_empty()
    }

    /// Whether a file has what was durable.
    fn allows(&self, stat: &Stat) -> bool {
        let untouched = MoveKey::of(stat) == self.key;
        untouched || !self.is_untouched && self.durable.iter().all(|one| is_there(one, stat))
    }

    /// Whether a file has also what was written since.
    fn fits(&self, stat: &Stat) -> bool {
        let has_newest = || self.newest.as_ref().is_none_or(|one| is_there(one, stat));
        MoveKey::of(stat) == self.key || self.allows(stat) && has_newest()
    }
}

/// Whether a file has the bytes of a content of which there are no before-images.
fn is_there((sources, size): &(Sources, u64), stat: &Stat) -> bool {
    stat.size >= *size || sources.covers(stat.size, *size)
}

/// A lost file, and those that it can be.
struct Lost {
    origin: usize,
    /// It was durable, at the last checkpoint or in a snapshot since.
    is_old: bool,
    files: Vec<usize>,
}

impl Import<'_> {
    /// Adds the lost files that can only be one of the `strangers`.
    pub(super) fn pair_lost(
        &self,
        bounds: &Bounds,
        strangers: &[bool],
        is_missing: &dyn Fn(&Origin) -> bool,
        pairs: &mut Pairs<'_>,
    ) -> Result<()> {
        let (files, origins) = (pairs.files, pairs.origins);
        let is_left = |&index: &usize| {
            strangers[index] && files[index].doubt == Doubt::Changed && pairs.is_open(index)
        };
        let left: Vec<usize> = (0..files.len()).filter(is_left).collect();
        let paired: HashSet<usize> = pairs.found.values().copied().collect();
        let mut lost = Vec::new();
        for (index, origin) in origins.iter().enumerate() {
            if is_missing(origin) && !paired.contains(&index) {
                let demand = self.demand(&origin.row, bounds)?;
                let those = |meets: &dyn Fn(&Stat) -> bool| {
                    let those = left.iter().copied().filter(|&file| meets(&files[file].stat));
                    born_with(origin, files, those.collect(), bounds.told())
                };
                let mut files = those(&|stat| demand.fits(stat));
                // Of what a snapshot shows only that has to be there: what grew since may be lost.
                if files.is_empty() && !demand.is_young() {
                    files = those(&|stat| demand.allows(stat));
                }
                lost.push(Lost { origin: index, is_old: !demand.is_young(), files });
            }
        }
        while let Some((file, origin)) = sure_pair(&lost) {
            pairs.found.insert(file, origin);
            lost.retain(|one| one.origin != origin);
            lost.iter_mut().for_each(|one| one.files.retain(|other| *other != file));
        }
        Ok(())
    }

    fn demand(&self, row: &NodeRow, bounds: &Bounds) -> Result<Demand> {
        let (since, node) = (bounds.since(), row.id);
        let place =
            |content: ContentId, size| Ok::<_, Error>((self.catalog.sources(node, content)?, size));
        let shown = self.catalog.shown_from(node, row.content)?;
        let mut durable = Vec::new();
        if shown.is_some_and(|from| from <= since) {
            durable.push(place(row.content, row.size)?);
        }
        for older in self.catalog.contents_since(node, since)? {
            if older.chained && older.born <= since {
                durable.push(place(older.id, older.size)?);
            }
        }
        let newest = match bounds.born(node) {
            true => Some(place(row.content, row.size)?),
            false => None,
        };
        let is_untouched = !bounds.may_differ(node);
        Ok(Demand { key: MoveKey::of_row(row), is_untouched, durable, newest })
    }

    /// Nodes whose names have files that are others: too short, or as one was that had the name at
    /// the last checkpoint or later. For the catalog can be durable without the rename that it
    /// tells of.
    pub(super) fn displaced(&self, bounds: &Bounds, files: &[Deferred]) -> Result<HashSet<NodeId>> {
        let mut displaced = HashSet::new();
        for file in files {
            let Some(row) = &file.over else { continue };
            if file.doubt != Doubt::Changed || file.is_own() || row.content == ContentId::EMPTY {
                continue;
            }
            let held = self.catalog.held_since((file.parent, &file.name), bounds.since())?;
            let key = MoveKey::of(&file.stat);
            let is_other = |one: &NodeRow| one.id != row.id && MoveKey::of_row(one) == key;
            if held.iter().any(is_other) || !self.demand(row, bounds)?.fits(&file.stat) {
                displaced.insert(row.id);
            }
        }
        Ok(displaced)
    }

    /// Adds the lost files that have a name which they had at the last checkpoint or later: that
    /// they got others is recorded, and did not come to the disk. Not one that may well be the node
    /// that has the name: nothing would be left of that.
    pub(super) fn pair_unmoved(
        &self,
        bounds: &Bounds,
        displaced: &HashSet<NodeId>,
        has_lost: &dyn Fn(&Origin) -> bool,
        pairs: &mut Pairs<'_>,
    ) -> Result<()> {
        let told = bounds.told();
        let paired: HashSet<usize> = pairs.found.values().copied().collect();
        let moved: HashSet<NodeId> =
            paired.iter().map(|&index| pairs.origins[index].row.id).collect();
        let may_go = |file: &Deferred| match &file.over {
            Some(row) if displaced.contains(&row.id) || moved.contains(&row.id) => Ok(true),
            Some(row) => self.needs_no_file(row),
            None => Ok(true),
        };
        let mut had: HashMap<usize, Vec<usize>> = HashMap::new();
        for (index, origin) in pairs.origins.iter().enumerate() {
            if !has_lost(origin) || paired.contains(&index) {
                continue;
            }
            let names = self.catalog.names_since(origin.row.id, bounds.since())?;
            let demand = self.demand(&origin.row, bounds)?;
            let own = |file: &Deferred| {
                let has_name =
                    names.iter().any(|one| (&one.dir, &one.name) == (&file.dir, &file.name));
                let node = file.over.as_ref().map(|row| row.id);
                let is_other = node != Some(origin.row.id);
                has_name && is_other && demand.allows(&file.stat) && was_there(origin, file, told)
            };
            let mut files = Vec::new();
            for (file, one) in pairs.files.iter().enumerate() {
                let is_left =
                    pairs.is_open(file) && one.doubt == Doubt::Changed && !one.is_own() && own(one);
                let is_twin = || born_together(&origin.row, &one.stat) == Some(true);
                if is_left && (is_twin() || may_go(one)?) {
                    files.push(file);
                }
            }
            if let [file] = files[..] {
                had.entry(file).or_default().push(index);
            }
        }
        for (file, origins) in had {
            if let [origin] = origins[..] {
                pairs.found.insert(file, origin);
            }
        }
        Ok(())
    }
}

/// Those of the files that were born with a lost one; if none was, those that are not new.
fn born_with(origin: &Origin, files: &[Deferred], fit: Vec<usize>, told: Timestamp) -> Vec<usize> {
    let is_twin = |file: &usize| born_together(&origin.row, &files[*file].stat) != Some(false);
    match fit.iter().any(is_twin) {
        true => fit.into_iter().filter(is_twin).collect(),
        false => fit.into_iter().filter(|&file| files[file].stat.btime <= told).collect(),
    }
}

/// Whether a file that the disk has as it was before the catalog was last told of anything is a
/// lost one, or was there then.
fn was_there(origin: &Origin, file: &Deferred, told: Timestamp) -> bool {
    match born_together(&origin.row, &file.stat) {
        Some(is_twin) => is_twin || file.stat.btime <= told,
        None => file.stat.mtime <= told,
    }
}

/// A file, and the lost one that it must be.
fn sure_pair(lost: &[Lost]) -> Option<(usize, usize)> {
    let mut wanted: HashMap<usize, Vec<&Lost>> = HashMap::new();
    for one in lost {
        one.files.iter().for_each(|&file| wanted.entry(file).or_default().push(one));
    }
    lost.iter().find_map(|one| {
        let &[file] = &one.files[..] else { return None };
        let others = wanted[&file].iter().filter(|other| other.origin != one.origin);
        let mut others = others.filter(|other| !one.is_old || other.files.len() == 1);
        others.next().is_none().then_some((file, one.origin))
    })
}

//! Which slots a program touched, what they meant before and mean now, and what is to be done.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::rc::Rc;

use super::{Source, UndoConflict};
use crate::catalog::{Catalog, NameInterval, NodeRow, Version};
use crate::error::Result;
use crate::report::{PathText, time_text, who};
use crate::types::{EntryName, Generation, Kind, NodeId, RelPath};

/// No directory lies deeper.
pub const DEPTH_MAX: usize = 4096;

/// A name in a directory.
pub type Slot = (NodeId, EntryName);

/// What was a slot's meaning, or a node's state.
struct Life {
    versions: Vec<Version>,
    names: Vec<NameInterval>,
}

impl Life {
    fn is_live(&self) -> bool {
        self.names.iter().any(|name| name.died.is_none())
    }
}

/// A node in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Which.
    pub node: NodeId,
    /// Whether it is a directory.
    pub is_dir: bool,
}

/// What is to be done with one slot or between two.
pub enum Work {
    /// The slot is to mean nothing again.
    Remove { slot: Slot, tenant: Tenant },
    /// The tenant goes back from the one slot to the other.
    Rename { tenant: Tenant, from: Slot, to: Slot },
    /// A directory that is gone comes back.
    MakeDir { slot: Slot, node: NodeId, source: Source },
    /// What is no directory is to be as it was: in the place of `there`, if there is one.
    Restore { slot: Slot, there: Option<NodeId>, source: Source },
    /// A file that has lost this one of its names gets it back.
    Link { slot: Slot, node: NodeId, source: Source },
    /// A directory's attributes are to be as they were.
    Attributes { node: NodeId, source: Source },
    /// The names in a directory change, by which its time does.
    Touched { node: NodeId, source: Source },
}

/// A slot that is not as it was.
struct Found {
    before: Option<(Tenant, NodeRow, Source)>,
    now: Option<Tenant>,
    /// When the present tenant got the slot.
    since: Generation,
}

/// The catalog as the plan looks at it.
pub struct Look<'c> {
    /// The catalog.
    pub catalog: &'c Catalog,
    ranges: Vec<Range<Generation>>,
    lives: HashMap<NodeId, Rc<Life>>,
}

impl<'c> Look<'c> {
    /// Looks for what was done in `ranges`, which ascend.
    pub fn new(catalog: &'c Catalog, ranges: Vec<Range<Generation>>) -> Look<'c> {
        Look { catalog, ranges, lives: HashMap::new() }
    }

    fn is_meant(&self, at: Generation) -> bool {
        let after = self.ranges.partition_point(|range| range.start <= at);
        after > 0 && self.ranges[after - 1].contains(&at)
    }

    fn life(&mut self, node: NodeId) -> Result<Rc<Life>> {
        if let Some(known) = self.lives.get(&node) {
            return Ok(known.clone());
        }
        let (versions, names) = (self.catalog.versions(node)?, self.catalog.name_history(node)?);
        let life = Rc::new(Life { versions, names });
        self.lives.insert(node, life.clone());
        Ok(life)
    }

    /// All names of a live node.
    pub fn names(&mut self, node: NodeId) -> Result<Vec<Slot>> {
        let life = self.life(node)?;
        let live = life.names.iter().filter(|name| name.died.is_none());
        Ok(live.map(|name| (name.parent, name.name.clone())).collect())
    }

    /// A live node's slot; `None` for the root and what is gone.
    pub fn place(&mut self, node: NodeId) -> Result<Option<Slot>> {
        Ok(self.names(node)?.into_iter().min())
    }

    /// The slots that were touched, with the generation of the first touch.
    fn touched(&mut self) -> Result<BTreeMap<Slot, Generation>> {
        let mut slots: BTreeMap<Slot, Generation> = BTreeMap::new();
        for node in self.catalog.touched_in(&self.ranges)? {
            let life = self.life(node)?;
            let changed = self.first_change(node)?;
            for name in &life.names {
                let ends = [Some(name.born), name.died].into_iter().flatten();
                let mut at: Vec<Generation> = ends.filter(|end| self.is_meant(*end)).collect();
                let had_it = |born: &Generation| {
                    name.born < *born && name.died.is_none_or(|died| died >= *born)
                };
                at.extend(changed.filter(had_it));
                let Some(first) = at.into_iter().min() else { continue };
                let slot = slots.entry((name.parent, name.name.clone())).or_insert(first);
                *slot = first.min(*slot);
            }
        }
        Ok(slots)
    }

    /// When a node was changed first. Its first state is part of its birth, which its name tells.
    fn first_change(&mut self, node: NodeId) -> Result<Option<Generation>> {
        let life = self.life(node)?;
        let changed = life.versions.iter().skip(1).map(|version| version.born);
        Ok(changed.filter(|born| self.is_meant(*born)).min())
    }

    /// What is to be done below `under`, and what cannot be.
    pub fn works(
        &mut self,
        under: &RelPath,
        force: bool,
    ) -> Result<(Vec<Work>, Vec<UndoConflict>)> {
        let (mut found, mut conflicts) = (BTreeMap::new(), Vec::new());
        let below = |path: &Option<RelPath>| {
            path.as_ref().is_some_and(|path| path.names().starts_with(under.names()))
        };
        let mut inside: BTreeSet<Slot> = BTreeSet::new();
        let mut dirs: BTreeMap<NodeId, Generation> = BTreeMap::new();
        for (slot, first) in self.touched()? {
            let (before, now) = self.paths(&slot, first)?;
            if below(&before) || below(&now) {
                inside.insert(slot.clone());
                // A state of its own within the same burst has the times of the burst's end.
                let own = self.first_change(slot.0)?;
                let known = dirs.entry(slot.0).or_insert(own.unwrap_or(first));
                *known = first.min(*known);
            }
            let is_inside = inside.contains(&slot);
            let Some(one) = self.compare(&slot, first)? else { continue };
            let conflict = self.conflict(&slot, first, &one, force)?;
            match conflict {
                None => {
                    found.insert(slot, one);
                }
                Some(conflict) if is_inside => {
                    let path = now.or(before).unwrap_or_default();
                    conflicts.push(UndoConflict { path: PathText::from(&path), ..conflict });
                }
                Some(_) => {}
            }
        }
        let mut works = self.pair(found, &inside, force, &mut conflicts)?;
        for (node, first) in dirs {
            let source = self.dir_source(node, first)?;
            works.extend(source.map(|source| Work::Touched { node, source }));
        }
        Ok((works, conflicts))
    }

    /// The paths of a slot just before `first` and now.
    fn paths(
        &mut self,
        (parent, name): &Slot,
        first: Generation,
    ) -> Result<(Option<RelPath>, Option<RelPath>)> {
        let before = self.catalog.path_at(Generation(first.0 - 1), *parent)?;
        let now = self.catalog.path_at(self.catalog.generation(), *parent)?;
        Ok((before.map(|dir| dir.join(name)), now.map(|dir| dir.join(name))))
    }

    /// What a slot meant before and means now, if that differs.
    fn compare(&mut self, slot: &Slot, first: Generation) -> Result<Option<Found>> {
        let until = Generation(first.0 - 1);
        let history = self.catalog.entry_history(slot.0, &slot.1)?;
        let shows = |born: Generation, died: Option<Generation>| {
            born <= until && died.is_none_or(|died| died > until)
        };
        let mut before = None;
        if let Some(interval) = history.iter().find(|one| shows(one.born, one.died)) {
            let life = self.life(interval.node)?;
            if let Some(version) = life.versions.iter().find(|one| shows(one.born, one.died)) {
                let tenant = tenant(interval.node, &version.row);
                let from = interval.born.max(version.born);
                let source = Source { slot: Some(slot.clone()), from, until };
                before = Some((tenant, version.row.clone(), source));
            }
        }
        let live = history.iter().find(|one| one.died.is_none());
        let mut now = None;
        let mut differs = true;
        if let Some(interval) = live {
            let life = self.life(interval.node)?;
            let Some(version) = life.versions.last() else { return Ok(None) };
            now = Some(tenant(interval.node, &version.row));
            if let Some((tenant, row, _)) = &before {
                differs = match tenant.node == interval.node {
                    true => is_other(row, &version.row),
                    // Somebody may have brought it back already.
                    false => self.is_meant(interval.born) || is_unlike(row, &version.row),
                };
            }
        } else if let Some((_, row, _)) = &before {
            differs = !self.is_back_elsewhere(slot, row)?;
        } else {
            return Ok(None);
        }
        let since = live.map_or(first, |interval| interval.born);
        Ok(differs.then_some(Found { before, now, since }))
    }

    /// Whether a slot of a directory that is gone has the like of `row` again, in the directory
    /// that took the place of the gone one, and by somebody else's doing.
    fn is_back_elsewhere(&mut self, (dir, name): &Slot, row: &NodeRow) -> Result<bool> {
        let Some(heir) = self.heir(*dir)? else { return Ok(false) };
        let Some((node, _)) = self.catalog.lookup(heir, name)? else { return Ok(false) };
        let life = self.life(node)?;
        let mut lives = life.names.iter().filter(|one| one.died.is_none());
        let by_others = lives.all(|one| !self.is_meant(one.born));
        let state = life.versions.last();
        Ok(by_others && state.is_some_and(|version| !is_unlike(row, &version.row)))
    }

    /// The directory that now has the last place of one that is gone.
    fn heir(&mut self, dir: NodeId) -> Result<Option<NodeId>> {
        // Not by recursion: a tree may be deeper than a stack.
        let mut names = Vec::new();
        let mut at = dir;
        let mut found = loop {
            let life = self.life(at)?;
            let last = life.names.iter().max_by_key(|name| name.died);
            let Some(last) = last.filter(|_| !life.is_live() && names.len() <= DEPTH_MAX) else {
                return Ok(None);
            };
            let parent = last.parent;
            names.push(last.name.clone());
            if self.catalog.node(parent)?.is_some() {
                break parent;
            }
            at = parent;
        };
        for name in names.iter().rev() {
            match self.catalog.lookup(found, name)? {
                Some((node, Kind::Dir)) => found = node,
                _ => return Ok(None),
            }
        }
        Ok(Some(found))
    }

    /// Why a slot cannot be made what it was; the path is the caller's to tell.
    fn conflict(
        &mut self,
        slot: &Slot,
        first: Generation,
        found: &Found,
        force: bool,
    ) -> Result<Option<UndoConflict>> {
        let conflict = |why: &str| UndoConflict {
            path: PathText::new(b""),
            why: why.into(),
            by: None,
            time: None,
        };
        if let Some((_, _, source)) = &found.before
            && self.seen_until(source)?.is_none()
        {
            return Ok(Some(conflict("its earlier state is not kept any more")));
        }
        if force {
            return Ok(None);
        }
        let mut times = Vec::new();
        for interval in self.catalog.entry_history(slot.0, &slot.1)? {
            times.extend([Some(interval.born), interval.died].into_iter().flatten());
        }
        let before = found.before.as_ref().map(|(tenant, ..)| *tenant);
        for tenant in [before, found.now].into_iter().flatten().filter(|one| !one.is_dir) {
            times.extend(self.life(tenant.node)?.versions.iter().map(|version| version.born));
        }
        let other = times.into_iter().filter(|at| *at > first && !self.is_meant(*at)).max();
        let Some(at) = other else { return Ok(None) };
        Ok(Some(UndoConflict {
            by: who::by(self.catalog, at)?,
            time: Some(time_text(self.catalog.time_of(at)?)),
            ..conflict("somebody else changed it since")
        }))
    }

    /// The last visible generation that shows a source.
    fn seen_until(&self, source: &Source) -> Result<Option<Generation>> {
        if source.until >= self.catalog.horizon()? {
            return Ok(Some(source.until));
        }
        let points = self.catalog.kept_points()?;
        Ok(points.range(source.from..=source.until).next_back().copied())
    }

    /// Makes works of the slots: a node that lost one and won another is renamed.
    fn pair(
        &mut self,
        mut found: BTreeMap<Slot, Found>,
        inside: &BTreeSet<Slot>,
        force: bool,
        conflicts: &mut Vec<UndoConflict>,
    ) -> Result<Vec<Work>> {
        for one in found.values_mut() {
            if let Some((_, _, source)) = &mut one.before
                && let Some(until) = self.seen_until(source)?
            {
                source.until = until;
            }
        }
        let (mut renames, removed) = loop {
            let (renames, mut removed) = pairs(&found);
            removed.retain(|slot| inside.contains(slot));
            let foreign = match force {
                true => Vec::new(),
                false => self.foreign(&found, &removed)?,
            };
            if foreign.is_empty() {
                break (renames, removed);
            }
            // Without these slots others pair otherwise.
            for (slot, node) in foreign {
                found.remove(&slot);
                conflicts.push(self.not_its_own(&slot, node)?);
            }
        };
        let back: BTreeSet<Slot> = renames.iter().map(|one| one.to.clone()).collect();
        renames.retain(|one| inside.contains(&one.from) || inside.contains(&one.to));
        renames.sort_by(|a, b| (a.since, &a.from).cmp(&(b.since, &b.from)));
        let renamed = renames.into_iter();
        let mut works: Vec<Work> = renamed
            .map(|Pair { tenant, from, to, .. }| Work::Rename { tenant, from, to })
            .collect();
        for (slot, one) in &found {
            if !inside.contains(slot) {
                continue;
            }
            if !self.work(slot, one, (&back, &removed), &mut works)? {
                let path = self.shown_path(slot)?;
                let why = "others moved it since".into();
                conflicts.push(UndoConflict { path, why, by: None, time: None });
            }
        }
        Ok(works)
    }

    /// The slots that are to mean nothing again, though what they mean would be lost by that and is
    /// not the program's own: it only moved it there.
    fn foreign(
        &mut self,
        found: &BTreeMap<Slot, Found>,
        removed: &BTreeSet<Slot>,
    ) -> Result<Vec<(Slot, NodeId)>> {
        let mut foreign = Vec::new();
        for slot in removed {
            let Some(now) = found.get(slot).and_then(|one| one.now) else { continue };
            let life = self.life(now.node)?;
            // A directory's later states are its entries' matter.
            let states = if now.is_dir { 1 } else { life.versions.len() };
            let its_own =
                life.versions.iter().take(states).all(|version| self.is_meant(version.born));
            let stays = self.names(now.node)?.iter().any(|name| !removed.contains(name));
            if !its_own && !stays {
                foreign.push((slot.clone(), now.node));
            }
        }
        Ok(foreign)
    }

    fn shown_path(&self, (dir, name): &Slot) -> Result<PathText> {
        let dir = self.catalog.path_at(self.catalog.generation(), *dir)?.unwrap_or_default();
        Ok(PathText::from(&dir.join(name)))
    }

    /// Why something is left where the program put it.
    fn not_its_own(&mut self, slot: &Slot, node: NodeId) -> Result<UndoConflict> {
        let path = self.shown_path(slot)?;
        let life = self.life(node)?;
        let others = life.versions.iter().map(|version| version.born);
        let at = others.filter(|born| !self.is_meant(*born)).max();
        Ok(UndoConflict {
            path,
            why: "others made it, and where it was is taken".into(),
            by: at.map(|at| who::by(self.catalog, at)).transpose()?.flatten(),
            time: None,
        })
    }

    /// What is to be done with one slot, beside renames; `false` if that cannot be: the directory
    /// that it meant is elsewhere, where others put it.
    fn work(
        &mut self,
        slot: &Slot,
        one: &Found,
        (back, removed): (&BTreeSet<Slot>, &BTreeSet<Slot>),
        works: &mut Vec<Work>,
    ) -> Result<bool> {
        let slot = slot.clone();
        let is_removed = removed.contains(&slot);
        let Some((tenant, row, source)) = &one.before else {
            if let (Some(tenant), true) = (one.now, is_removed) {
                works.push(Work::Remove { slot, tenant });
            }
            return Ok(true);
        };
        let source = source.clone();
        let same = one.now.filter(|now| now.node == tenant.node);
        let comes_back = back.contains(&slot);
        let life = self.life(tenant.node)?;
        let other = life.versions.last().is_some_and(|version| is_other(row, &version.row));
        let lives_on = !other && life.is_live();
        if tenant.is_dir && same.is_none() && !comes_back && life.is_live() {
            return Ok(false);
        }
        let links = same.is_none() && !comes_back && !tenant.is_dir && lives_on;
        if let (Some(now), true) = (one.now, is_removed) {
            // What is no directory is replaced in one step by what is none either.
            if comes_back || links || now.is_dir || tenant.is_dir {
                works.push(Work::Remove { slot: slot.clone(), tenant: now });
            }
        }
        if same.is_some() || comes_back {
            match (other, tenant.is_dir) {
                (false, _) => {}
                (true, true) => works.push(Work::Attributes { node: tenant.node, source }),
                (true, false) => {
                    works.push(Work::Restore { slot, there: Some(tenant.node), source })
                }
            }
        } else if links {
            works.push(Work::Link { slot, node: tenant.node, source });
        } else if tenant.is_dir {
            works.push(Work::MakeDir { slot, node: tenant.node, source });
        } else {
            let there = one.now.filter(|now| is_removed && !now.is_dir).map(|now| now.node);
            works.push(Work::Restore { slot, there, source });
        }
        Ok(true)
    }

    /// Where the state is that a directory had before one of its slots was touched at `first`.
    fn dir_source(&mut self, dir: NodeId, first: Generation) -> Result<Option<Source>> {
        let until = Generation(first.0 - 1);
        let shows = |born: Generation, died: Option<Generation>| {
            born <= until && died.is_none_or(|died| died > until)
        };
        let life = self.life(dir)?;
        let version = life.versions.iter().find(|one| shows(one.born, one.died));
        let name = life.names.iter().find(|one| shows(one.born, one.died));
        let Some(version) = version else { return Ok(None) };
        let mut source = Source { slot: None, from: version.born, until };
        match name {
            Some(name) => {
                source.slot = Some((name.parent, name.name.clone()));
                source.from = source.from.max(name.born);
            }
            None if dir == NodeId::ROOT => {}
            None => return Ok(None),
        }
        let seen = self.seen_until(&source)?;
        Ok(seen.map(|until| Source { until, ..source }))
    }
}

/// A node that goes back from one slot to another.
struct Pair {
    /// The newest goes back first.
    since: Reverse<Generation>,
    tenant: Tenant,
    from: Slot,
    to: Slot,
}

/// The nodes that go back, and the slots that mean what has nowhere to go.
fn pairs(found: &BTreeMap<Slot, Found>) -> (Vec<Pair>, BTreeSet<Slot>) {
    let mut lost: BTreeMap<NodeId, Vec<Slot>> = BTreeMap::new();
    for (slot, one) in found {
        if let Some((tenant, ..)) = &one.before
            && one.now.is_none_or(|now| now.node != tenant.node)
        {
            lost.entry(tenant.node).or_default().push(slot.clone());
        }
    }
    let (mut renames, mut removed) = (Vec::new(), BTreeSet::new());
    for (slot, one) in found {
        let Some(tenant) = one.now else { continue };
        if one.before.as_ref().is_some_and(|(before, ..)| before.node == tenant.node) {
            continue;
        }
        match lost.get_mut(&tenant.node).and_then(Vec::pop) {
            Some(to) => {
                let (since, from) = (Reverse(one.since), slot.clone());
                renames.push(Pair { since, tenant, from, to });
            }
            None => {
                removed.insert(slot.clone());
            }
        }
    }
    (renames, removed)
}

fn tenant(node: NodeId, row: &NodeRow) -> Tenant {
    Tenant { node, is_dir: row.kind == Kind::Dir }
}

/// Whether two objects differ as far as can be told without reading them.
fn is_unlike(a: &NodeRow, b: &NodeRow) -> bool {
    let seen = |row: &NodeRow| (row.kind, row.mode, row.uid, row.gid, row.rdev, row.xattrs);
    let bytes = |row: &NodeRow| (row.size, row.mtime);
    seen(a) != seen(b) || (a.kind != Kind::Dir && bytes(a) != bytes(b))
}

/// Whether two states of a node differ in what an undo brings back. A directory's times follow its
/// entries.
fn is_other(a: &NodeRow, b: &NodeRow) -> bool {
    let seen = |row: &NodeRow| (row.mode, row.uid, row.gid, row.xattrs);
    let bytes = |row: &NodeRow| (row.content, row.size, row.mtime);
    seen(a) != seen(b) || (a.kind != Kind::Dir && bytes(a) != bytes(b))
}

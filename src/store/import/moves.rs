//! Which of the files without a sure node are renamed ones.
//!
//! A renamed file keeps size, modification time, mode and owner. Among several that agree in these,
//! its birth tells, where the backing knows births; the change time does not, for the rename sets
//! it. What stays ambiguous is left as it is: a file that lost its name, and another that is new.
//!
//! Where only our own work can be unrecorded, a file that is gone was renamed, for what is removed
//! is preserved. So one that was also written to is known by its birth alone or, among the files
//! that cannot be those which had their names, by its size, or because it can be no other
//! ([`super::lost`]).

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use super::{Deferred, Doubt, Import, Missing, PUSH_CHANGES, content_differs};
use crate::catalog::{Change, NodeRow};
use crate::error::Result;
use crate::replica::backing::Stat;
use crate::types::{ContentId, EntryName, Kind, NodeId, Timestamp};

/// What a renamed file keeps.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct MoveKey {
    mtime: Timestamp,
    size: u64,
    mode: u32,
    uid: u32,
}

impl MoveKey {
    pub(super) fn of(stat: &Stat) -> MoveKey {
        MoveKey { mtime: stat.mtime, size: stat.size, mode: stat.mode, uid: stat.uid }
    }

    pub(super) fn of_row(row: &NodeRow) -> MoveKey {
        MoveKey { mtime: row.mtime, size: row.size, mode: row.mode, uid: row.uid }
    }

    /// What it keeps if it is also written to in place, and got another mode.
    fn of_written(self) -> MoveKey {
        MoveKey { mtime: Timestamp::default(), mode: 0, ..self }
    }
}

/// A node whose file may lie under another name now.
pub(super) struct Origin {
    parent: NodeId,
    name: EntryName,
    pub(super) row: NodeRow,
    /// Its place in the list of missing names; `None` if a file lies under its name.
    pub(super) missing: Option<usize>,
}

impl Deferred {
    /// Whether it was born when the node was that had its name: it is that one.
    pub(super) fn is_own(&self) -> bool {
        self.over.as_ref().and_then(|row| born_together(row, &self.stat)) == Some(true)
    }

    /// Whether it was made when the empty node was that had its name, and was never read: the
    /// access time tells it where births do not.
    fn is_filled(&self) -> bool {
        let is_node = |row: &NodeRow| row.size == 0 && row.mtime == self.stat.atime;
        self.over.as_ref().is_some_and(is_node)
    }

    /// How much speaks for its being the node that had its name.
    fn likeness(&self) -> u8 {
        match &self.over {
            Some(_) if self.is_own() => 3,
            Some(row) if MoveKey::of_row(row) == MoveKey::of(&self.stat) => 2,
            Some(row) if row.content != ContentId::EMPTY => 1,
            _ => 0,
        }
    }
}

/// The nodes of which a name has a file that was born with them.
fn unmoved(files: &[Deferred]) -> HashSet<NodeId> {
    let own = files.iter().filter(|file| file.is_own());
    own.filter_map(|file| Some(file.over.as_ref()?.id)).collect()
}

/// The nodes of which a name has a file that may be theirs, and what speaks against it. One that
/// agrees in all but its birth is theirs, unless it agrees in all with another.
fn held(pairs: &Pairs<'_>, displaced: &HashSet<NodeId>) -> HashMap<NodeId, Doubt> {
    let mut held = HashMap::new();
    for (index, file) in pairs.files.iter().enumerate() {
        let is_other = |row: &NodeRow| {
            let found = pairs.found.get(&index);
            found.is_some_and(|&origin| pairs.origins[origin].row.id != row.id)
        };
        if let Some(row) = &file.over
            && !displaced.contains(&row.id)
            && !is_other(row)
            && held.get(&row.id) != Some(&Doubt::Born)
        {
            held.insert(row.id, file.doubt);
        }
    }
    held
}

/// Whether an object was born when a node was; `None` where that is not known.
pub(in crate::store) fn born_together(row: &NodeRow, stat: &Stat) -> Option<bool> {
    let is_known = |birth| birth != Timestamp::default();
    (is_known(row.btime) && is_known(stat.btime)).then_some(row.btime == stat.btime)
}

impl Import<'_> {
    /// Gives every deferred file its node.
    pub(super) fn settle_deferred(&mut self) -> Result<()> {
        let mut files = self.take_other_links()?;
        // Of several names of one file the surest tells which one it is.
        files.sort_by_key(|file| Reverse(file.likeness()));
        let mut origins = self.origins(&files)?;
        let moves = self.pairs(&files, &origins)?;
        let moved: HashSet<NodeId> = moves.values().map(|&index| origins[index].row.id).collect();
        moved.iter().for_each(|&node| self.claimed.insert(node));
        // First the names that renamed files took from others.
        for index in moves.keys() {
            let file = &files[*index];
            if let Some(over) = &file.over
                && !moved.contains(&over.id)
            {
                self.drop_name(file.parent, &file.name, over.id, &file.dir)?;
            }
        }
        self.push()?;
        // All old names, then all new ones, in one push: they may form chains and rings, and no
        // node is without a name in between.
        for &index in moves.values() {
            let origin = &mut origins[index];
            if let Some(missing) = origin.missing {
                self.missing[missing] = None;
            }
            let (parent, name) = (origin.parent, origin.name.clone());
            self.changes.push(Change::EntryRemove { parent, name });
        }
        for (&index, &origin) in &moves {
            let (file, row) = (&files[index], &origins[origin].row);
            let (parent, name) = (file.parent, file.name.clone());
            self.changes.push(match file.excluded {
                true => Change::EntryUnversioned { parent, name, node: row.id },
                false => Change::EntryAdd { parent, name, node: row.id },
            });
            self.note_links(file, row.id);
            if content_differs(row, &file.stat) {
                self.keep_recorded(row, &file.dir, &file.name, file.stat.size)?;
            }
            self.refresh_with(row, &file.stat, file.xattrs, !file.excluded)?;
            self.report.moved += 1;
        }
        self.push()?;
        for (index, file) in files.into_iter().enumerate() {
            if !moves.contains_key(&index) {
                self.settle_in_place(file)?;
            }
            if self.changes.len() >= PUSH_CHANGES {
                self.push()?;
            }
            self.progress.advance(0, 0)?;
        }
        Ok(())
    }

    /// The renamed files, each with its origin.
    fn pairs(&self, files: &[Deferred], origins: &[Origin]) -> Result<HashMap<usize, usize>> {
        let mut pairs = Pairs::new(files, origins);
        let born = |birth| (birth != Timestamp::default()).then_some(birth);
        pairs.find(
            |_, file| Some((MoveKey::of(&file.stat), born(file.stat.btime)?)),
            |origin| Some((MoveKey::of_row(&origin.row), born(origin.row.btime)?)),
        );
        let is_loose = |file: &Deferred| file.doubt == Doubt::Changed && !file.is_own();
        let key = |file: &Deferred| is_loose(file).then(|| MoveKey::of(&file.stat));
        let displaced = match &self.bounds {
            Some(bounds) => self.displaced(bounds, files)?,
            None => HashSet::new(),
        };
        let held = held(&pairs, &displaced);
        let is_missing =
            |origin: &Origin| origin.missing.is_some() && !held.contains_key(&origin.row.id);
        let has_lost = |origin: &Origin| is_missing(origin) || displaced.contains(&origin.row.id);
        pairs.find(
            |_, file| key(file),
            |origin| has_lost(origin).then(|| MoveKey::of_row(&origin.row)),
        );
        if let Some(bounds) = &self.bounds {
            let mut lost = self.lost_births(files, origins)?;
            lost.retain(|node, _| held.get(node) != Some(&Doubt::Born));
            // Where births are not the recorded ones, files that are alike can each have the birth
            // of the next.
            let sure = pairs.found.keys().copied();
            let sure: HashSet<usize> = sure.filter(|&file| is_loose(&files[file])).collect();
            let file_birth = |file: &Deferred| born(file.stat.btime).filter(|_| is_loose(file));
            let lost_birth = |origin: &Origin| lost.get(&origin.row.id).copied();
            pairs.find(
                |_, file| Some((file_birth(file)?, file.stat.size)),
                |origin| Some((lost_birth(origin)?, origin.row.size)),
            );
            pairs.find(|_, file| file_birth(file), lost_birth);
            self.drop_impossible(&sure, &mut pairs)?;
            self.pair_unmoved(bounds, &displaced, &has_lost, &mut pairs)?;
            let missed = |origin: &Origin| is_missing(origin).then(|| MoveKey::of_row(&origin.row));
            let strangers = self.strangers(&pairs)?;
            pairs.find(
                |index, file| key(file).filter(|_| strangers[index]).map(MoveKey::of_written),
                |origin| missed(origin).map(MoveKey::of_written),
            );
            self.pair_lost(bounds, &strangers, &is_missing, &mut pairs)?;
        }
        // A file that is its own origin was renamed nowhere.
        let mut found = pairs.found;
        found.retain(|&file, &mut origin| {
            let over = files[file].over.as_ref().map(|row| row.id);
            over != Some(origins[origin].row.id)
        });
        Ok(found)
    }

    /// Takes back pairs that are not `sure` and would leave nothing of a node whose name the file
    /// has. A replica that was filled, or a file that was healed, has births of its own, which can
    /// be those of others.
    fn drop_impossible(&self, sure: &HashSet<usize>, pairs: &mut Pairs<'_>) -> Result<()> {
        // A linked one may have another name by which it is known.
        let own = unmoved(pairs.files);
        loop {
            let node_of = |origin: usize| pairs.origins[origin].row.id;
            let moved: HashSet<NodeId> = pairs.found.values().map(|&one| node_of(one)).collect();
            let mut wrong = None;
            for (&file, _) in pairs.found.iter().filter(|(file, _)| !sure.contains(file)) {
                if let Some(row) = &pairs.files[file].over
                    && !moved.contains(&row.id)
                    && !own.contains(&row.id)
                    && !self.needs_no_file(row)?
                {
                    wrong = Some(file);
                    break;
                }
            }
            match wrong {
                Some(file) => pairs.found.remove(&file),
                None => return Ok(()),
            };
        }
    }

    /// Whether nothing of a node is lost if a file that has its name is another's: it was empty,
    /// has its file, or is preserved.
    pub(super) fn needs_no_file(&self, row: &NodeRow) -> Result<bool> {
        let is_met = row.content == ContentId::EMPTY || self.claimed.contains(row.id);
        Ok(is_met || self.is_preserved(row)?)
    }

    /// When the nodes were born that have no file, or another one, under their names: those that
    /// nothing else was born with. A clock's tick is some milliseconds, and an empty file is no
    /// origin.
    fn lost_births(
        &self,
        files: &[Deferred],
        origins: &[Origin],
    ) -> Result<HashMap<NodeId, Timestamp>> {
        let changed: HashSet<NodeId> = files
            .iter()
            .filter(|file| file.doubt == Doubt::Changed && !file.is_own())
            .filter_map(|file| Some(file.over.as_ref()?.id))
            .collect();
        let mut taken = HashSet::new();
        for missing in self.missing.iter().flatten() {
            if missing.kind == Kind::File
                && !self.claimed.contains(missing.node)
                && let Some(row) = self.catalog.node(missing.node)?
                && row.content == ContentId::EMPTY
            {
                taken.insert(row.btime);
            }
        }
        let lost = origins
            .iter()
            .filter(|origin| origin.missing.is_some() || changed.contains(&origin.row.id))
            .filter(|origin| !taken.contains(&origin.row.btime))
            .filter(|origin| origin.row.btime != Timestamp::default());
        Ok(lost.map(|origin| (origin.row.id, origin.row.btime)).collect())
    }

    /// Which files need not be the ones that had their names: none had it, or that one was empty,
    /// or was preserved, or was met under another name, or may be the one under another name.
    fn strangers(&self, pairs: &Pairs<'_>) -> Result<Vec<bool>> {
        let mut claims: HashMap<NodeId, u32> = HashMap::new();
        let files = pairs.files.iter().enumerate();
        let first_names = files.filter(|(index, _)| !pairs.links.contains(index));
        let rows = first_names.filter_map(|(_, file)| file.over.as_ref());
        rows.for_each(|row| *claims.entry(row.id).or_default() += 1);
        let has_several = |row: &NodeRow| claims.get(&row.id).is_some_and(|&count| count > 1);
        let is_stranger = |file: &Deferred| match &file.over {
            Some(_) if file.is_own() || file.is_filled() => Ok(false),
            Some(row) => Ok(has_several(row) || self.needs_no_file(row)?),
            None => Ok(true),
        };
        pairs.files.iter().map(is_stranger).collect()
    }

    /// Of the deferred files, takes those that turned out to be further names of an object that
    /// has its node; returns the others.
    fn take_other_links(&mut self) -> Result<Vec<Deferred>> {
        let mut rest = Vec::new();
        for mut file in std::mem::take(&mut self.deferred) {
            let linked = file.link_key.and_then(|key| self.links.get(&key).copied());
            let Some(node) = linked else {
                rest.push(file);
                continue;
            };
            if let Some(over) = file.over.take_if(|over| over.id != node) {
                // It may lie under another name.
                let (dir, parent, name) = (file.dir.clone(), file.parent, file.name.clone());
                self.park(Missing { dir, parent, name, node: over.id, kind: over.kind })?;
            }
            self.take_link(file, node)?;
        }
        Ok(rest)
    }

    fn take_link(&mut self, file: Deferred, node: NodeId) -> Result<()> {
        if let Some(over) = &file.over {
            self.push()?;
            let known = self.catalog.lookup(file.parent, &file.name)?;
            if over.id == node && known.is_some_and(|(known, _)| known == node) {
                return Ok(());
            }
            self.drop_name(file.parent, &file.name, over.id, &file.dir)?;
        }
        self.add_link(file.parent, file.name, node, file.excluded)
    }

    fn note_links(&mut self, file: &Deferred, node: NodeId) {
        if let Some(key) = file.link_key {
            self.links.insert(key, node);
        }
    }

    /// The nodes that may have been renamed: those without a file, and those whose name has a file
    /// that is perhaps another. What was preserved died, and was not renamed.
    fn origins(&mut self, files: &[Deferred]) -> Result<Vec<Origin>> {
        self.push()?;
        let mut origins = Vec::new();
        // One that lost a name and lies under another of its own was renamed nowhere.
        let own = unmoved(files);
        for (index, missing) in self.missing.iter().enumerate() {
            if let Some(missing) = missing
                && missing.kind == Kind::File
                && !self.claimed.contains(missing.node)
                && !own.contains(&missing.node)
                && let Some(row) = self.catalog.node(missing.node)?
                && row.size > 0
                && !self.is_preserved(&row)?
            {
                let (parent, name) = (missing.parent, missing.name.clone());
                origins.push(Origin { parent, name, row, missing: Some(index) });
            }
        }
        for file in files {
            if let Some(row) = &file.over
                && !self.claimed.contains(row.id)
                && row.content != ContentId::EMPTY
                && !self.is_preserved(row)?
            {
                let (parent, name, row) = (file.parent, file.name.clone(), row.clone());
                origins.push(Origin { parent, name, row, missing: None });
            }
        }
        // A node with several names is moved by one of them only if it has lost all.
        let mut names: HashMap<NodeId, usize> = HashMap::new();
        origins.iter().for_each(|one| *names.entry(one.row.id).or_default() += 1);
        let mut of_several = HashMap::new();
        for (&node, &count) in names.iter().filter(|(_, count)| **count > 1) {
            of_several.insert(node, self.catalog.names(node)?.len() == count);
        }
        origins.retain(|one| match of_several.get_mut(&one.row.id) {
            // The first one stands for all.
            Some(has_lost_all) => std::mem::take(has_lost_all),
            None => true,
        });
        Ok(origins)
    }

    fn settle_in_place(&mut self, file: Deferred) -> Result<()> {
        if let Some(node) = file.link_key.and_then(|key| self.links.get(&key).copied()) {
            return self.take_link(file, node);
        }
        let place = (file.parent, file.name.clone(), file.excluded);
        let node = match &file.over {
            Some(row) if !self.claimed.contains(row.id) => {
                self.claimed.insert(row.id);
                self.note_links(&file, row.id);
                if content_differs(row, &file.stat) {
                    self.keep_recorded(row, &file.dir, &file.name, file.stat.size)?;
                }
                let versioned = self.is_versioned(row.id)?;
                return self.refresh_with(row, &file.stat, file.xattrs, versioned);
            }
            // The node was met meanwhile under another name.
            Some(row) => {
                self.drop_name(file.parent, &file.name, row.id, &file.dir)?;
                self.add_node(place, &file.stat, file.xattrs, &[])
            }
            None => self.add_node(place, &file.stat, file.xattrs, &[]),
        };
        self.note_links(&file, node);
        Ok(())
    }
}

/// What was found of which file was which.
pub(super) struct Pairs<'a> {
    pub(super) files: &'a [Deferred],
    pub(super) origins: &'a [Origin],
    /// Origins, by the file that each is.
    pub(super) found: HashMap<usize, usize>,
    /// Files that are met before under another name: they are what that is.
    links: HashSet<usize>,
}

impl<'a> Pairs<'a> {
    fn new(files: &'a [Deferred], origins: &'a [Origin]) -> Pairs<'a> {
        let mut met = HashSet::new();
        let is_link = |file: &Deferred| file.link_key.is_some_and(|key| !met.insert(key));
        let links = files.iter().map(is_link).collect::<Vec<_>>();
        let links = (0..files.len()).filter(|&index| links[index]).collect();
        Pairs { files, origins, found: HashMap::new(), links }
    }

    /// Whether it is still to be found what a file is.
    pub(super) fn is_open(&self, file: usize) -> bool {
        !self.found.contains_key(&file) && !self.links.contains(&file)
    }

    /// Adds the pairs of one file and one origin that agree in a key, where no other that is left
    /// has it. What has no key takes no part.
    fn find<K: Eq + Hash>(
        &mut self,
        file_key: impl Fn(usize, &Deferred) -> Option<K>,
        origin_key: impl Fn(&Origin) -> Option<K>,
    ) {
        let paired: HashSet<usize> = self.found.values().copied().collect();
        let mut alike: HashMap<K, (Vec<usize>, Vec<usize>)> = HashMap::new();
        for (index, origin) in self.origins.iter().enumerate() {
            if !paired.contains(&index)
                && let Some(key) = origin_key(origin)
            {
                alike.entry(key).or_default().0.push(index);
            }
        }
        for (index, file) in self.files.iter().enumerate() {
            if self.is_open(index)
                && let Some(key) = file_key(index, file)
                && let Some((_, files)) = alike.get_mut(&key)
            {
                files.push(index);
            }
        }
        for (origins, files) in alike.into_values() {
            if let (&[origin], &[file]) = (&origins[..], &files[..]) {
                self.found.insert(file, origin);
            }
        }
    }
}

//! Which of the files without a sure node are renamed ones.
//!
//! A renamed file keeps size, modification time, mode and owner. Among several that agree in these,
//! its birth tells, where the backing knows births; the change time does not, for the rename sets
//! it. What stays ambiguous is left as it is: a file that lost its name, and another that is new.
//!
//! Where only our own work can be unrecorded, a file that is gone was renamed, for what is removed
//! is preserved. So one that also got other times or another mode is known by its size, among the
//! files that cannot be those which had their names.

use std::collections::{HashMap, HashSet};

use super::{Deferred, Doubt, Import, PUSH_CHANGES, content_differs};
use crate::catalog::{Change, NodeRow};
use crate::error::Result;
use crate::replica::backing::Stat;
use crate::types::{ContentId, EntryName, Kind, NodeId, Timestamp};

/// What a renamed file keeps.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct MoveKey {
    mtime: Timestamp,
    size: u64,
    mode: u32,
    uid: u32,
}

impl MoveKey {
    fn of(stat: &Stat) -> MoveKey {
        MoveKey { mtime: stat.mtime, size: stat.size, mode: stat.mode, uid: stat.uid }
    }

    fn of_row(row: &NodeRow) -> MoveKey {
        MoveKey { mtime: row.mtime, size: row.size, mode: row.mode, uid: row.uid }
    }
}

/// A node whose file may lie under another name now.
struct Origin {
    parent: NodeId,
    name: EntryName,
    row: NodeRow,
    /// Its place in the list of missing names; `None` if a file lies under its name.
    missing: Option<usize>,
}

impl Import<'_> {
    /// Gives every deferred file its node.
    pub(super) fn settle_deferred(&mut self) -> Result<()> {
        let files = self.take_other_links()?;
        let mut origins = self.origins(&files)?;
        let mut moves = by_birth(&files, &origins);
        by_uniqueness(&files, &origins, &mut moves, |_, key| Some(key));
        if self.bounds.is_some() {
            let strange = |file: &Deferred| match &file.over {
                Some(row) => self.is_preserved(row),
                None => Ok(true),
            };
            let strange = files.iter().map(strange).collect::<Result<Vec<bool>>>()?;
            let blurred = |file: Option<usize>, key| {
                let meant = file.is_none_or(|index| strange[index]);
                meant.then_some(MoveKey { mtime: Timestamp::default(), mode: 0, ..key })
            };
            by_uniqueness(&files, &origins, &mut moves, blurred);
        }
        // A file that is its own origin was renamed nowhere.
        for (index, file) in files.iter().enumerate() {
            let own = |origin: &usize| {
                file.over.as_ref().is_some_and(|row| row.id == origins[*origin].row.id)
            };
            if moves.get(&index).is_some_and(own) {
                moves.remove(&index);
            }
        }
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

    /// Of the deferred files, takes those that turned out to be further names of an object that
    /// has its node; returns the others.
    fn take_other_links(&mut self) -> Result<Vec<Deferred>> {
        let mut rest = Vec::new();
        for file in std::mem::take(&mut self.deferred) {
            let linked = file.link_key.and_then(|key| self.links.get(&key).copied());
            match linked {
                Some(node) => self.take_link(file, node)?,
                None => rest.push(file),
            }
        }
        Ok(rest)
    }

    fn take_link(&mut self, file: Deferred, node: NodeId) -> Result<()> {
        if let Some(over) = &file.over {
            if over.id == node {
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
        for (index, missing) in self.missing.iter().enumerate() {
            if let Some(missing) = missing
                && missing.kind == Kind::File
                && !self.claimed.contains(missing.node)
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
        // A node with several names cannot be moved by one of them.
        let mut names: HashMap<NodeId, u32> = HashMap::new();
        origins.iter().for_each(|one| *names.entry(one.row.id).or_default() += 1);
        origins.retain(|one| names[&one.row.id] == 1);
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
                self.push()?;
                let known = self.catalog.lookup(file.parent, &file.name)?;
                if known.is_some_and(|(node, _)| node == row.id) {
                    self.drop_name(file.parent, &file.name, row.id, &file.dir)?;
                }
                self.add_node(place, &file.stat, file.xattrs, &[])
            }
            None => self.add_node(place, &file.stat, file.xattrs, &[]),
        };
        self.note_links(&file, node);
        Ok(())
    }
}

/// Pairs of file and origin that agree in all and were born at the same moment.
fn by_birth(files: &[Deferred], origins: &[Origin]) -> HashMap<usize, usize> {
    let mut found: HashMap<(MoveKey, Timestamp), (Vec<usize>, Vec<usize>)> = HashMap::new();
    let known = |time: Timestamp| time != Timestamp::default();
    for (index, origin) in origins.iter().enumerate().filter(|(_, one)| known(one.row.btime)) {
        let key = (MoveKey::of_row(&origin.row), origin.row.btime);
        found.entry(key).or_default().0.push(index);
    }
    for (index, file) in files.iter().enumerate() {
        if let Some((_, own)) = found.get_mut(&(MoveKey::of(&file.stat), file.stat.btime)) {
            own.push(index);
        }
    }
    found
        .into_values()
        .filter_map(|(origins, files)| match (&origins[..], &files[..]) {
            (&[origin], &[file]) => Some((file, origin)),
            _ => None,
        })
        .collect()
}

/// Of what is left, pairs of one changed file and one lost name that agree in a key, where no other
/// of either does. `key` makes it of what they keep, for a file by its index or an origin, or
/// `None`.
fn by_uniqueness(
    files: &[Deferred],
    origins: &[Origin],
    moves: &mut HashMap<usize, usize>,
    key: impl Fn(Option<usize>, MoveKey) -> Option<MoveKey>,
) {
    let paired: HashSet<usize> = moves.values().copied().collect();
    let mut found: HashMap<MoveKey, (Vec<usize>, Vec<usize>)> = HashMap::new();
    for (index, origin) in origins.iter().enumerate() {
        if origin.missing.is_some()
            && !paired.contains(&index)
            && let Some(key) = key(None, MoveKey::of_row(&origin.row))
        {
            found.entry(key).or_default().0.push(index);
        }
    }
    for (index, file) in files.iter().enumerate() {
        if file.doubt == Doubt::Changed
            && !moves.contains_key(&index)
            && let Some(key) = key(Some(index), MoveKey::of(&file.stat))
            && let Some((_, own)) = found.get_mut(&key)
        {
            own.push(index);
        }
    }
    for (origins, files) in found.into_values() {
        if let (&[origin], &[file]) = (&origins[..], &files[..]) {
            moves.insert(file, origin);
        }
    }
}

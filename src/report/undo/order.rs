//! The order in which an undo is done, found by doing it in the mind.
//!
//! First what was made goes, then directories come back and renames are turned round, each as soon
//! as the way is free, the newest rename first; then the directories that were made go, which are
//! empty now; then files come back, and last, from the deepest up, the directories get their
//! attributes, which all this has changed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::slots::{DEPTH_MAX, Look, Slot, Tenant, Work};
use super::{Draft, Source, UndoAction, UndoConflict};
use crate::error::Result;
use crate::report::PathText;
use crate::report::log::RESTORING_PREFIX;
use crate::types::{EntryName, NodeId, RelPath};

const NOT_EMPTY: &str = "something is in it that others made";
const NO_DIR: &str = "its directory is gone";
const IN_THE_WAY: &str = "something else is in its place";

/// The live tree as it is after some steps.
struct Tree<'l, 'c> {
    look: &'l mut Look<'c>,
    /// What names mean now, where steps changed it.
    names: HashMap<NodeId, BTreeMap<EntryName, Option<NodeId>>>,
    /// Where directories are now, where steps changed it.
    places: HashMap<NodeId, Slot>,
    gone: HashSet<NodeId>,
    /// How many were put aside.
    asides: usize,
    steps: Vec<Draft>,
    blocked: Vec<UndoConflict>,
}

impl Tree<'_, '_> {
    fn path(&mut self, dir: NodeId) -> Result<Option<RelPath>> {
        let (mut names, mut at) = (Vec::new(), dir);
        while at != NodeId::ROOT {
            if self.gone.contains(&at) || names.len() > DEPTH_MAX {
                return Ok(None);
            }
            let place = match self.places.get(&at) {
                Some(place) => Some(place.clone()),
                None => self.look.place(at)?,
            };
            let Some((parent, name)) = place else { return Ok(None) };
            names.push(name);
            at = parent;
        }
        names.reverse();
        Ok(Some(RelPath::from(names)))
    }

    fn slot_path(&mut self, slot: &Slot) -> Result<Option<RelPath>> {
        Ok(self.path(slot.0)?.map(|dir| dir.join(&slot.1)))
    }

    fn tenant(&self, (dir, name): &Slot) -> Result<Option<NodeId>> {
        if let Some(known) = self.names.get(dir).and_then(|names| names.get(name)) {
            return Ok(*known);
        }
        Ok(self.look.catalog.lookup(*dir, name)?.map(|(node, _)| node))
    }

    fn set(&mut self, (dir, name): &Slot, node: Option<NodeId>) {
        self.names.entry(*dir).or_default().insert(name.clone(), node);
    }

    fn names_in(&self, dir: NodeId) -> Result<BTreeSet<EntryName>> {
        let listed = self.look.catalog.list(dir)?.into_iter();
        let mut names: BTreeSet<EntryName> = listed.map(|one| one.name).collect();
        for (name, node) in self.names.get(&dir).into_iter().flatten() {
            match node {
                Some(_) => names.insert(name.clone()),
                None => names.remove(name),
            };
        }
        Ok(names)
    }

    fn step(&mut self, action: UndoAction, path: RelPath, source: Option<Source>) {
        self.steps.push(Draft { action, path, to: None, source });
    }

    fn block(&mut self, slot: &Slot, why: &str) -> Result<()> {
        let path = match self.slot_path(slot)? {
            Some(path) => path,
            None => RelPath::from(vec![slot.1.clone()]),
        };
        let path = PathText::from(&path);
        self.blocked.push(UndoConflict { path, why: why.into(), by: None, time: None });
        Ok(())
    }

    /// Removes what can be removed; gives the directories that are not empty yet.
    fn remove(&mut self, slots: Vec<(Slot, Tenant)>) -> Result<Vec<(Slot, Tenant)>> {
        let mut dirs = Vec::new();
        for (slot, tenant) in slots {
            let Some(path) = self.slot_path(&slot)? else { continue };
            if tenant.is_dir {
                dirs.push((Reverse(path.names().len()), path, slot, tenant));
            } else {
                self.step(UndoAction::Remove, path, None);
                self.set(&slot, None);
            }
        }
        dirs.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        let mut left = Vec::new();
        for (_, path, slot, tenant) in dirs {
            if self.names_in(tenant.node)?.is_empty() {
                self.step(UndoAction::RemoveDir, path, None);
                self.set(&slot, None);
                self.gone.insert(tenant.node);
            } else {
                left.push((slot, tenant));
            }
        }
        Ok(left)
    }

    /// Does a move if the way is free.
    fn try_move(&mut self, one: &Move) -> Result<bool> {
        let to = one.to();
        let Some(path) = self.slot_path(to)? else { return Ok(false) };
        if self.tenant(to)?.is_some() {
            return Ok(false);
        }
        match one {
            Move::Make { node, .. } => {
                self.step(UndoAction::MakeDir, path, None);
                self.set(to, Some(*node));
                self.places.insert(*node, to.clone());
                self.gone.remove(node);
            }
            Move::Rename { node, from, .. } => {
                let Some(old) = self.slot_path(from)? else { return Ok(false) };
                if path.names().starts_with(old.names()) {
                    return Ok(false);
                }
                let (action, to_path) = (UndoAction::Rename, Some(path));
                self.steps.push(Draft { action, path: old, to: to_path, source: None });
                self.set(from, None);
                self.set(to, Some(*node));
                self.places.insert(*node, to.clone());
            }
        }
        Ok(true)
    }

    /// A name by which a file can be reached.
    fn name_of(&mut self, node: NodeId) -> Result<Option<Slot>> {
        let mut names = self.look.names(node)?;
        names.extend(self.places.get(&node).cloned());
        for slot in names {
            if self.tenant(&slot)? == Some(node) && self.path(slot.0)?.is_some() {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    /// Gives a file another name.
    fn link(&mut self, slot: &Slot, name: &Slot) -> Result<()> {
        let Some(path) = self.slot_path(slot)? else { return self.block(slot, NO_DIR) };
        if self.tenant(slot)?.is_some() {
            return self.block(slot, IN_THE_WAY);
        }
        let to = self.slot_path(name)?;
        self.steps.push(Draft { action: UndoAction::Link, path, to, source: None });
        let node = self.tenant(name)?;
        self.set(slot, node);
        Ok(())
    }

    /// Does all moves whose way is free, or becomes free by another. `doomed` are directories that
    /// are to be removed when they are empty.
    fn moves(&mut self, mut waiting: Vec<Move>, doomed: &mut [(Slot, Tenant)]) -> Result<()> {
        loop {
            let before = waiting.len();
            let mut left = Vec::new();
            for one in waiting {
                if !self.try_move(&one)? {
                    left.push(one);
                }
            }
            waiting = left;
            if waiting.len() < before {
                continue;
            }
            let is_freed = self.exchange(&mut waiting)?
                || self.put_doomed_aside(&waiting, doomed)?
                || self.put_waiting_aside(&mut waiting)?;
            if !is_freed {
                break;
            }
        }
        for one in waiting {
            let why = if self.path(one.to().0)?.is_none() { NO_DIR } else { IN_THE_WAY };
            self.block(one.to(), why)?;
        }
        Ok(())
    }

    /// A directory that is to be removed, but for what a move takes out of it, is in the way of
    /// such a move: it gets another name until it is empty.
    fn put_doomed_aside(
        &mut self,
        waiting: &[Move],
        doomed: &mut [(Slot, Tenant)],
    ) -> Result<bool> {
        for index in 0..doomed.len() {
            let (slot, tenant) = doomed[index].clone();
            let is_in_way = waiting.iter().any(|one| *one.to() == slot);
            if !is_in_way || self.tenant(&slot)? != Some(tenant.node) {
                continue;
            }
            let mut all_leave = true;
            for name in self.names_in(tenant.node)? {
                let inner = self.tenant(&(tenant.node, name))?;
                let leaves = waiting
                    .iter()
                    .any(|one| matches!(one, Move::Rename { node, .. } if Some(*node) == inner));
                all_leave &= leaves || doomed.iter().any(|(_, one)| Some(one.node) == inner);
            }
            if !all_leave {
                continue;
            }
            if let Some(aside) = self.put_aside(&slot, tenant.node)? {
                doomed[index].0 = aside;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What is to be moved itself is in the way of another move, and cannot change places with it
    /// because the one lies in the other: it gets another name until its own way is free. So no
    /// move waits for ever: of all that wait, the one whose place is the least deep goes into a
    /// directory that is where it belongs already.
    fn put_waiting_aside(&mut self, waiting: &mut [Move]) -> Result<bool> {
        for index in 0..waiting.len() {
            let Move::Rename { node, from, .. } = waiting[index].clone() else { continue };
            let is_in_way = waiting.iter().any(|one| *one.to() == from);
            if !is_in_way || self.tenant(&from)? != Some(node) {
                continue;
            }
            if let Some(aside) = self.put_aside(&from, node)? {
                if let Move::Rename { from, .. } = &mut waiting[index] {
                    *from = aside;
                }
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Gives a node another name in its directory, which nothing wants; `None` if it has no path.
    fn put_aside(&mut self, slot: &Slot, node: NodeId) -> Result<Option<Slot>> {
        let aside = [RESTORING_PREFIX, self.asides.to_string().as_bytes()].concat();
        let Ok(aside) = EntryName::new(&aside) else { return Ok(None) };
        let aside = (slot.0, aside);
        let (Some(path), to) = (self.slot_path(slot)?, self.slot_path(&aside)?) else {
            return Ok(None);
        };
        self.asides += 1;
        self.steps.push(Draft { action: UndoAction::Rename, path, to, source: None });
        self.set(slot, None);
        self.set(&aside, Some(node));
        self.places.insert(node, aside.clone());
        Ok(Some(aside))
    }

    /// Breaks a circle of renames: one of them changes places with what is in its way.
    fn exchange(&mut self, waiting: &mut Vec<Move>) -> Result<bool> {
        for index in 0..waiting.len() {
            let Move::Rename { node, from, to } = waiting[index].clone() else { continue };
            let Some(other) = self.tenant(&to)? else { continue };
            let is_in_way = |one: &Move| match one {
                Move::Rename { node, from, .. } => *node == other && *from == to,
                Move::Make { .. } => false,
            };
            let in_way = waiting.iter().position(is_in_way);
            let (Some(in_way), Some(old), Some(new)) =
                (in_way, self.slot_path(&from)?, self.slot_path(&to)?)
            else {
                continue;
            };
            if old.names().starts_with(new.names()) || new.names().starts_with(old.names()) {
                continue;
            }
            self.steps.push(Draft {
                action: UndoAction::Exchange,
                path: old,
                to: Some(new),
                source: None,
            });
            self.set(&from, Some(other));
            self.set(&to, Some(node));
            self.places.insert(other, from.clone());
            self.places.insert(node, to);
            let mut done = vec![index];
            if let Move::Rename { from: its_from, to: its_to, .. } = &mut waiting[in_way] {
                *its_from = from;
                if its_from == its_to {
                    done.push(in_way);
                }
            }
            let mut at = 0;
            waiting.retain(|_| {
                at += 1;
                !done.contains(&(at - 1))
            });
            return Ok(true);
        }
        Ok(false)
    }
}

/// A directory that comes back, or a rename that is turned round.
#[derive(Clone)]
enum Move {
    Make { node: NodeId, to: Slot },
    Rename { node: NodeId, from: Slot, to: Slot },
}

impl Move {
    fn to(&self) -> &Slot {
        match self {
            Move::Make { to, .. } | Move::Rename { to, .. } => to,
        }
    }
}

/// The steps of all works, and what cannot be done.
pub fn order(look: &mut Look<'_>, works: Vec<Work>) -> Result<(Vec<Draft>, Vec<UndoConflict>)> {
    let (mut removals, mut made, mut renames) = (Vec::new(), Vec::new(), Vec::new());
    let (mut restores, mut links) = (Vec::new(), Vec::new());
    let (mut attributes, mut touched) = (Vec::new(), Vec::new());
    for work in works {
        match work {
            Work::Remove { slot, tenant } => removals.push((slot, tenant)),
            Work::Rename { tenant, from, to } => {
                renames.push(Move::Rename { node: tenant.node, from, to });
            }
            Work::MakeDir { slot, node, source } => {
                let depth = look.catalog.path_at(source.until, node)?.unwrap_or_default();
                made.push((depth, Move::Make { node, to: slot }));
                attributes.push((node, source));
            }
            Work::Restore { slot, there, source } => restores.push((slot, there, source)),
            Work::Link { slot, node, source } => links.push((slot, node, source)),
            Work::Attributes { node, source } => attributes.push((node, source)),
            Work::Touched { node, source } => touched.push((node, source)),
        }
    }
    made.sort_by(|a, b| a.0.cmp(&b.0));
    let mut tree = Tree {
        look,
        names: HashMap::new(),
        places: HashMap::new(),
        gone: HashSet::new(),
        asides: 0,
        steps: Vec::new(),
        blocked: Vec::new(),
    };
    let left = tree.remove(removals)?;
    let mut left = left;
    tree.moves(made.into_iter().map(|(_, one)| one).chain(renames).collect(), &mut left)?;
    for (slot, _) in tree.remove(left)? {
        tree.block(&slot, NOT_EMPTY)?;
    }
    for (slot, node, source) in links {
        // If none of its names is left after all, it comes back as what was deleted.
        match tree.name_of(node)? {
            Some(name) => tree.link(&slot, &name)?,
            None => restores.push((slot, None, source)),
        }
    }
    let mut files = Vec::new();
    for (slot, there, source) in restores {
        let Some(path) = tree.slot_path(&slot)? else {
            tree.block(&slot, NO_DIR)?;
            continue;
        };
        // A step that was blocked may have left something there that is not to go.
        if tree.tenant(&slot)? != there {
            tree.block(&slot, IN_THE_WAY)?;
            continue;
        }
        tree.set(&slot, Some(NodeId(0)));
        let action = if there.is_some() { UndoAction::Restore } else { UndoAction::Recreate };
        files.push(Draft { action, path, to: None, source: Some(source) });
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    tree.steps.append(&mut files);
    let first_touch: HashMap<NodeId, Source> = touched.iter().cloned().collect();
    let mut last = BTreeMap::new();
    for (node, source) in touched {
        let before = tree.look.catalog.list_at(source.until, node)?.into_iter();
        let before: BTreeSet<EntryName> = before.map(|one| one.name).collect();
        if before == tree.names_in(node)?
            && let Some(path) = tree.path(node)?
        {
            last.insert(path, (UndoAction::Times, source));
        }
    }
    for (node, mut source) in attributes {
        // It may have lost entries, and with that its time, before it was itself touched.
        if let Some(earlier) = first_touch.get(&node)
            && earlier.until < source.until
        {
            source = earlier.clone();
        }
        if let Some(path) = tree.path(node)? {
            last.insert(path, (UndoAction::Attributes, source));
        }
    }
    // The order of paths has each directory after the one it lies in.
    for (path, (action, source)) in last.into_iter().rev() {
        tree.step(action, path, Some(source));
    }
    Ok((tree.steps, tree.blocked))
}

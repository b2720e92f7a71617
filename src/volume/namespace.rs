//! Names of the live tree: create, link, rename, remove.

use std::sync::{Arc, OnceLock};

use rustix::io::Errno;

use crate::catalog::{Change, Listed, NodeRow};
use crate::error::{Error, Result};
use crate::history::{preserved_dir, preserved_name};
use crate::replica::Handles;
use crate::replica::backing::{RenameMode, SetTime, Stat};
use crate::replica::intent::{Dirty, Intent};
use crate::store::row_of;
use crate::types::{ContentId, EntryName, Kind, NodeId, Xattrs};

use super::excludes::{Turn, entry};
use super::files::link_anew;
use super::intend::dirty;
use super::nodes::{Node, Open, State};
use super::{Caller, ROOM_FOR_A_FILE, ROOM_FOR_A_NAME, Volume};

/// What [`Volume::make`] makes.
pub enum Newborn<'a> {
    /// A directory.
    Dir,
    /// A symlink with this target.
    Symlink(&'a [u8]),
    /// A FIFO, socket, device or empty file.
    Special(Kind, u64),
}

impl Volume {
    /// Makes a file and opens it for reading and writing.
    pub fn create(
        &self,
        parent: NodeId,
        name: &EntryName,
        mode: u32,
        writable: bool,
        caller: &Caller,
    ) -> Result<(Arc<Node>, Stat)> {
        let _cut = self.begin_change();
        self.check_name(parent, name)?;
        self.ensure_room(ROOM_FOR_A_FILE)?;
        let intent = self.intend(&[Dirty::Dir(parent)])?;
        let _entries = self.lock_dir(parent);
        let dir = self.dir(parent)?;
        let (own, by) = (name.clone(), caller.creds);
        let first = Arc::<OnceLock<(Stat, Xattrs)>>::default();
        let looks = first.clone();
        let made = self.replicas().change("create", move |id, b| {
            let file = b.create(dir.get(id)?, &own, mode & 0o7777, by)?;
            if looks.get().is_none() {
                let _ = looks.set((b.stat(&file)?, b.xattrs(&file)?));
            }
            Ok(file)
        })?;
        let (mut stat, xattrs) = first.get().cloned().expect("one replica answered");
        let handles = Handles::from(made);
        let row = self.born(&intent, (parent, name), (&stat, &xattrs), Vec::new(), caller)?;
        stat.ino = row.id.0;
        let node = self.nodes.insert(row.id, Kind::File, parent, name);
        node.looked_up();
        {
            let mut state = self.lock(&node);
            let mut open = Open::new(row);
            open.write = Some(Arc::new(handles));
            open.opens = 1;
            open.writers = u32::from(writable);
            state.open = Some(Box::new(open));
            // Its times are made equal on all replicas when it is sealed.
            self.mark_unsealed(&node, &mut state, false, caller);
        }
        Ok((node, stat))
    }

    /// Records a birth and returns the first state.
    fn born(
        &self,
        intent: &Intent<'_>,
        (parent, name): (NodeId, &EntryName),
        (stat, xattrs): (&Stat, &Xattrs),
        mut more: Vec<Change>,
        caller: &Caller,
    ) -> Result<NodeRow> {
        let id = self.catalog().next_node();
        intent.born(id);
        let xattrs = self.catalog().intern_xattrs(xattrs)?;
        let row = row_of(id, stat, xattrs, ContentId::EMPTY);
        self.meets_rules(name)?;
        let excluded = self.is_excluded(parent, name, row.kind == Kind::Dir)?;
        for change in &mut more {
            if let Change::SymlinkTarget { node, .. } = change {
                *node = id;
            }
        }
        more.push(match excluded {
            true => Change::NodeUnversioned(row.clone()),
            false => Change::NodePut(row.clone()),
        });
        more.push(entry(parent, name, id, excluded));
        self.push_by(caller, more)?;
        self.rules_changed(name);
        self.mark_dir(parent);
        Ok(row)
    }

    /// Makes a directory, symlink or special file.
    pub fn make(
        &self,
        parent: NodeId,
        name: &EntryName,
        what: &Newborn<'_>,
        mode: u32,
        caller: &Caller,
    ) -> Result<(Arc<Node>, Stat)> {
        let _cut = self.begin_change();
        self.check_name(parent, name)?;
        self.ensure_room(ROOM_FOR_A_FILE)?;
        let intent = self.intend(&[Dirty::Dir(parent)])?;
        let _entries = self.lock_dir(parent);
        let dir = self.dir(parent)?;
        let mut first: Option<(Stat, Xattrs)> = None;
        self.replicas().apply("make", |id, b| {
            let dir = dir.get(id)?;
            match what {
                Newborn::Dir => b.mkdir(dir, name, mode & 0o7777, caller.creds)?,
                Newborn::Symlink(target) => b.symlink(dir, name, target, caller.creds)?,
                Newborn::Special(kind, rdev) => {
                    b.mknod(dir, name, *kind, mode & 0o7777, *rdev, caller.creds)?;
                }
            }
            match &first {
                None => {
                    let object = b.open_node(dir, name)?;
                    first = Some((b.stat(&object)?, b.xattrs(&object)?));
                    Ok(())
                }
                // A directory's times are made equal when they are settled.
                Some(_) if matches!(what, Newborn::Dir) => Ok(()),
                Some((stat, _)) => {
                    let object = b.open_node(dir, name)?;
                    b.set_times(&object, SetTime::Omit, SetTime::To(stat.mtime))
                }
            }
        })?;
        let (mut stat, xattrs) = first.expect("one replica answered");
        let more = match what {
            Newborn::Symlink(target) => {
                let node = NodeId(0);
                vec![Change::SymlinkTarget { node, target: target.to_vec() }]
            }
            _ => Vec::new(),
        };
        let row = self.born(&intent, (parent, name), (&stat, &xattrs), more, caller)?;
        stat.ino = row.id.0;
        let node = self.nodes.insert(row.id, stat.kind, parent, name);
        if stat.kind == Kind::Dir {
            self.mark_dir(row.id);
        }
        node.looked_up();
        Ok((node, stat))
    }

    /// Gives a file another name.
    pub fn link(
        &self,
        node: &Arc<Node>,
        parent: NodeId,
        name: &EntryName,
        caller: &Caller,
    ) -> Result<(Arc<Node>, Stat)> {
        let _cut = self.begin_change();
        self.check_name(parent, name)?;
        self.ensure_room(ROOM_FOR_A_NAME)?;
        let _intent = self.intend(&[Dirty::Dir(parent), dirty(node)])?;
        let _entries = self.lock_dir(parent);
        let to = self.dir(parent)?;
        let mut state = self.lock(node);
        if state.orphan {
            return Err(Error::Posix(Errno::NOENT));
        }
        self.meets_rules(name)?;
        let excluded = self.is_excluded(parent, name, false)?;
        let turn = self.turn(node, &mut state, None, Some(excluded))?;
        let (from, from_name) = self.location(node, &state)?;
        self.replicas()
            .apply("link", |id, b| b.link(from.get(id)?, &from_name, to.get(id)?, name))?;
        self.note_replaced(&[node.id, parent]);
        let mut changes = vec![entry(parent, name, node.id, excluded)];
        self.take_turn(turn, node, &mut state, &mut changes)?;
        self.push_by(caller, changes)?;
        self.rules_changed(name);
        self.mark_dir(parent);
        let stat = self.stat_locked(node, &state)?;
        drop(state);
        node.looked_up();
        Ok((node.clone(), stat))
    }

    /// Removes a name that is no directory's. The last name's removal keeps the file in history by
    /// one rename.
    pub fn unlink(&self, parent: NodeId, name: &EntryName, caller: &Caller) -> Result<()> {
        let _cut = self.begin_change();
        let _intent = self.intend(&[Dirty::Dir(parent)])?;
        let _entries = self.lock_dir(parent);
        let node = self.named(parent, name)?;
        if node.kind == Kind::Dir {
            return Err(Error::Posix(Errno::ISDIR));
        }
        let mut state = self.lock(&node);
        let dir = self.dir(parent)?;
        let stat = self.replicas().read("stat", |id, b| b.stat_at(dir.get(id)?, name))?;
        let mut changes = Vec::with_capacity(3);
        let last = stat.nlink <= 1;
        if last {
            self.seal(&node, &mut state)?;
        }
        let content = if last { self.content_of(&node, &state)? } else { ContentId::EMPTY };
        let turn = match last {
            true => Turn::None,
            false => self.turn(&node, &mut state, Some((parent, name)), None)?,
        };
        // If we die after the rename and before the commit, recovery finds the preserved file.
        self.remove_name(&node, &dir, name, content)?;
        changes.push(Change::EntryRemove { parent, name: name.clone() });
        if last {
            changes.append(&mut self.bury(&node, &mut state, stat, content));
        }
        self.take_turn(turn, &node, &mut state, &mut changes)?;
        self.push_by(caller, changes)?;
        self.rules_changed(name);
        self.mark_dir(parent);
        node.lost_name(parent, name, last);
        drop(state);
        drop(node);
        Ok(())
    }

    /// The sealed content of a file.
    fn content_of(&self, node: &Arc<Node>, state: &State) -> Result<ContentId> {
        if node.kind != Kind::File {
            return Ok(ContentId::EMPTY);
        }
        if let Some(open) = &state.open {
            return Ok(open.sealed.content);
        }
        Ok(self.catalog().node(node.id)?.map_or(ContentId::EMPTY, |row| row.content))
    }

    /// Takes a name away on every replica: into `preserved/` if there is content to keep.
    fn remove_name(
        &self,
        node: &Arc<Node>,
        dir: &Arc<Handles>,
        name: &EntryName,
        content: ContentId,
    ) -> Result<()> {
        let replicas = self.replicas();
        let (dir, name) = (dir.clone(), name.clone());
        if content == ContentId::EMPTY {
            replicas.change("unlink", move |id, b| b.unlink(dir.get(id)?, &name))?;
            return Ok(());
        }
        let kept = replicas.private(preserved_dir(node.id))?;
        let kept_name = preserved_name(node.id, content);
        replicas.change("unlink", move |id, b| {
            b.rename(dir.get(id)?, &name, kept.get(id)?, &kept_name, RenameMode::Replace)
        })?;
        Ok(())
    }

    /// A node lost its last name: what is to be recorded of that.
    fn bury(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        mut stat: Stat,
        content: ContentId,
    ) -> Vec<Change> {
        state.orphan = true;
        state.stamp = self.nodes.next_stamp();
        self.unsealed.lock().remove(&node.id);
        self.forget_digest(node.id);
        if node.is_known() {
            stat.nlink = 0;
            state.ghost = Some(Box::new(stat));
        }
        let mut changes = vec![Change::NodeGone(node.id)];
        if content != ContentId::EMPTY {
            changes.push(Change::ContentPreserved { id: content, cloned: false });
        }
        changes
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: NodeId, name: &EntryName, caller: &Caller) -> Result<()> {
        let _cut = self.begin_change();
        let _intent = self.intend(&[Dirty::Dir(parent)])?;
        let _entries = self.lock_dir(parent);
        let node = self.named(parent, name)?;
        if node.kind != Kind::Dir {
            return Err(Error::Posix(Errno::NOTDIR));
        }
        let mut state = self.lock(&node);
        let dir = self.dir(parent)?;
        let stat = self.replicas().read("stat", |id, b| b.stat_at(dir.get(id)?, name))?;
        let _tree = self.tree.write();
        self.replicas().apply("rmdir", |id, b| b.rmdir(dir.get(id)?, name))?;
        let mut changes = vec![Change::EntryRemove { parent, name: name.clone() }];
        changes.append(&mut self.bury(&node, &mut state, stat, ContentId::EMPTY));
        self.push_by(caller, changes)?;
        self.mark_dir(parent);
        self.replicas().forget_dir(node.id);
        node.lost_name(parent, name, true);
        Ok(())
    }

    /// Renames. What is replaced keeps its history.
    pub fn rename(
        &self,
        parent: NodeId,
        name: &EntryName,
        new_parent: NodeId,
        new_name: &EntryName,
        mode: RenameMode,
        caller: &Caller,
    ) -> Result<()> {
        let _cut = self.begin_change();
        self.check_name(parent, name)?;
        self.check_name(new_parent, new_name)?;
        self.ensure_room(ROOM_FOR_A_NAME)?;
        let intent = self.intend(&[Dirty::Dir(parent), Dirty::Dir(new_parent)])?;
        let _entries = self.lock_dirs(parent, new_parent);
        let source = self.named(parent, name)?;
        let target = match self.named(new_parent, new_name) {
            Ok(target) => Some(target),
            Err(error) if error.is(Errno::NOENT) => None,
            Err(error) => return Err(error),
        };
        if target.as_ref().is_some_and(|target| target.id == source.id) {
            return match mode {
                RenameMode::NoReplace => Err(Error::Posix(Errno::EXIST)),
                _ => Ok(()),
            };
        }
        if let (RenameMode::Replace, Some(target)) = (mode, &target) {
            match (source.kind == Kind::Dir, target.kind == Kind::Dir) {
                (true, false) => return Err(Error::Posix(Errno::NOTDIR)),
                (false, true) => return Err(Error::Posix(Errno::ISDIR)),
                _ => {}
            }
        }
        let from = self.dir(parent)?;
        let to = self.dir(new_parent)?;
        // Whoever reaches one of them by its name waits until the name is what the node says.
        let (mut source_state, mut target_state) = self.lock_nodes(&source, target.as_deref());
        self.meets_rules(new_name)?;
        let excluded = self.is_excluded(new_parent, new_name, source.kind == Kind::Dir)?;
        let lost = Some((parent, name));
        let turn = self.turn(&source, &mut source_state, lost, Some(excluded))?;
        let moves_dir =
            [Some(&source), target.as_ref()].iter().flatten().any(|node| node.kind == Kind::Dir);
        self.intend_move(&intent, &source, (&from, name))?;
        if let (RenameMode::Exchange, Some(target)) = (mode, &target) {
            self.intend_move(&intent, target, (&to, new_name))?;
        }
        let entry_remove =
            |parent: NodeId, name: &EntryName| Change::EntryRemove { parent, name: name.clone() };
        // What the other one of an exchange becomes, by the name that it gets.
        let exchanged = match (mode, &target, &mut target_state) {
            (RenameMode::Exchange, Some(target), Some(state)) => {
                let excluded = self.is_excluded(parent, name, target.kind == Kind::Dir)?;
                let lost = Some((new_parent, new_name));
                Some((excluded, self.turn(target, state, lost, Some(excluded))?))
            }
            _ => None,
        };
        let _tree = moves_dir.then(|| self.tree.write());
        let mut changes = Vec::with_capacity(5);
        let mut replaced_last = false;
        match (mode, &target) {
            (RenameMode::NoReplace, Some(_)) => return Err(Error::Posix(Errno::EXIST)),
            (RenameMode::Exchange, None) => return Err(Error::Posix(Errno::NOENT)),
            (RenameMode::Exchange, Some(target)) => {
                self.replicas().apply("rename", |id, b| {
                    b.rename(from.get(id)?, name, to.get(id)?, new_name, mode)
                })?;
                let (other, turn) = exchanged.unwrap_or((false, Turn::None));
                let state = target_state.as_mut().expect("the target is locked");
                changes.push(entry_remove(parent, name));
                changes.push(entry_remove(new_parent, new_name));
                changes.push(entry(parent, name, target.id, other));
                self.take_turn(turn, target, state, &mut changes)?;
            }
            (_, None) => {
                self.replicas().apply("rename", |id, b| {
                    b.rename(from.get(id)?, name, to.get(id)?, new_name, mode)
                })?;
                changes.push(entry_remove(parent, name));
            }
            (RenameMode::Replace, Some(target)) => {
                let state = target_state.as_mut().expect("the target is locked");
                let (last, mut ended) =
                    self.replace((&from, name), (&to, new_parent, new_name), target, state)?;
                replaced_last = last;
                changes.append(&mut ended);
                changes.push(entry_remove(parent, name));
            }
        }
        self.note_replaced(&[source.id, new_parent]);
        if let (RenameMode::Exchange, Some(target)) = (mode, &target) {
            self.note_replaced(&[target.id, parent]);
        }
        changes.push(entry(new_parent, new_name, source.id, excluded));
        self.take_turn(turn, &source, &mut source_state, &mut changes)?;
        self.push_by(caller, changes)?;
        match &target {
            Some(target) if mode == RenameMode::Exchange => target.moved(parent, name),
            Some(target) => target.lost_name(new_parent, new_name, replaced_last),
            None => {}
        }
        source.moved(new_parent, new_name);
        self.rules_changed(name);
        self.rules_changed(new_name);
        if moves_dir {
            self.scopes_moved();
        }
        self.mark_dir(parent);
        self.mark_dir(new_parent);
        if source.kind == Kind::Dir && parent != new_parent {
            // Its own `..` changed, and with it its change time.
            self.mark_dir(source.id);
        }
        Ok(())
    }

    /// Renames over an existing object. Returns whether that was its last name, and what is to be
    /// recorded of its end.
    fn replace(
        &self,
        (from, name): (&Handles, &EntryName),
        (to, new_parent, new_name): (&Handles, NodeId, &EntryName),
        target: &Arc<Node>,
        state: &mut State,
    ) -> Result<(bool, Vec<Change>)> {
        let replicas = self.replicas();
        let stat = replicas.read("stat", |id, b| b.stat_at(to.get(id)?, new_name))?;
        let last = target.kind == Kind::Dir || stat.nlink <= 1;
        if last {
            self.seal(target, state)?;
        }
        let content = if last { self.content_of(target, state)? } else { ContentId::EMPTY };
        let turn = match last {
            true => Turn::None,
            false => self.turn(target, state, Some((new_parent, new_name)), None)?,
        };
        let rename = || {
            replicas.apply("rename", |id, b| {
                b.rename(from.get(id)?, name, to.get(id)?, new_name, RenameMode::Replace)
            })
        };
        if content == ContentId::EMPTY {
            rename()?;
        } else {
            // Linked first, so that the name is never missing. If we die in between, recovery drops
            // the second link.
            let kept = replicas.private(preserved_dir(target.id))?;
            let kept_name = preserved_name(target.id, content);
            replicas.apply("link", |id, b| {
                link_anew(b, (to.get(id)?, new_name), (kept.get(id)?, &kept_name))
            })?;
            if let Err(error) = rename() {
                replicas.apply("unlink", |id, b| b.unlink(kept.get(id)?, &kept_name))?;
                return Err(error);
            }
        }
        let mut changes = vec![Change::EntryRemove { parent: new_parent, name: new_name.clone() }];
        if last {
            changes.append(&mut self.bury(target, state, stat, content));
            if target.kind == Kind::Dir {
                replicas.forget_dir(target.id);
            }
        }
        self.take_turn(turn, target, state, &mut changes)?;
        Ok((last, changes))
    }

    /// The entries of a live directory, and the directory above it.
    pub fn list(&self, node: &Arc<Node>) -> Result<(Vec<Listed>, NodeId)> {
        if node.kind != Kind::Dir {
            return Err(Error::Posix(Errno::NOTDIR));
        }
        let above = node.place(self.catalog())?.map_or(NodeId::ROOT, |(parent, _)| parent);
        Ok((self.catalog().list(node.id)?, above))
    }

    /// Makes a directory's entries durable on every replica, together with its history.
    pub fn fsync_dir(&self, node: &Arc<Node>) -> Result<()> {
        if !self.lock(node).orphan {
            let dir = self.dir(node.id)?;
            let syncing = self.begin_sync_of(node.id, &dir, false);
            let recorded = self.barrier();
            syncing.wait()?;
            return recorded;
        }
        self.barrier()
    }
}

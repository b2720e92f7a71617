//! Making the live tree of one replica equal to that of another, while operations go on.
//!
//! What is to be there is known from the catalog, what it is like from the replica in use that it
//! is copied from. A directory is compared by its node, never by its path alone. Nothing here locks
//! out an operation: what changes while it is looked at is in the set of the next round, and the
//! last round has the volume for itself.
//!
//! Nothing of others is lost: an object that goes or is replaced is deleted only if the store had
//! it as it is; else it is moved to quarantine.

use std::collections::{BTreeMap, HashMap};
use std::io;

use crate::catalog::{Catalog, Listed};
use crate::error::{Error, IoContext, Result};
use crate::progress::Progress;
use crate::replica::backing::{DirEntry, Handle, RenameMode, Stat};
use crate::replica::guarded::Directly;
use crate::replica::intent::DirtySet;
use crate::store::copy::{Copier, blame, has_changed};
use crate::store::fill::{same_attributes, same_content};
use crate::store::quarantine::Quarantine;
use crate::store::site::{Object, Site, is_other_mount, own_creds};
use crate::types::{EntryName, Kind, NodeId, RelPath, Timestamp};

use super::super::Volume;
use super::places::{ON_THE_WAY, Places, Seen, aside_name, aside_node};
use super::rounds::Due;

/// A file that was changed this recently may change again without a new time of change: the
/// kernel's clock for these has a grain of up to 10 ms.
const GRAIN_NANOS: i64 = 100_000_000;

/// One directory that is being compared.
struct Pair {
    node: NodeId,
    /// On the source, and its path there.
    from: Handle,
    from_path: RelPath,
    /// On the target.
    to: Handle,
    to_path: RelPath,
}

/// One round.
pub(super) struct Mirror<'a> {
    pub volume: &'a Volume,
    pub source: &'a Site,
    pub target: &'a Site,
    pub places: &'a mut Places,
    pub progress: &'a Progress,
    pub copier: Copier<'a>,
    pub quarantine: Quarantine<'a>,
    /// What the target's own catalog tells, while that is believed.
    pub own: Option<&'a Catalog>,
    /// What was changed since may differ though size and times are the same.
    pub apart_since: Timestamp,
    /// Nodes from here on, in the directories of the set, were born meanwhile.
    pub born_from: Option<NodeId>,
    /// The object that every name of a hard-linked node is given in this round.
    pub links: HashMap<NodeId, RelPath>,
    /// Which node an object of the target with several names stands for.
    pub taken: HashMap<u64, NodeId>,
}

impl<'a> Mirror<'a> {
    pub fn new(
        volume: &'a Volume,
        (source, target): (&'a Site, &'a Site),
        places: &'a mut Places,
        progress: &'a Progress,
        apart_since: Timestamp,
    ) -> Result<Mirror<'a>> {
        Ok(Mirror {
            volume,
            source,
            target,
            places,
            progress,
            copier: Copier::new(source, target, progress)?.of_changing(),
            quarantine: Quarantine::new(target),
            own: None,
            apart_since,
            born_from: None,
            links: HashMap::new(),
            taken: HashMap::new(),
        })
    }

    /// Compares the whole tree.
    pub fn tree(&mut self) -> Result<()> {
        self.walk(NodeId::ROOT, true)
    }

    /// Compares what is due.
    pub fn due(&mut self, due: &Due) -> Result<()> {
        self.set(&due.set)?;
        for &dir in &due.stale {
            if let Some(pair) = unless_changed(self.source, self.pair(dir))?.flatten() {
                unless_changed(self.source, self.dir_attributes(&pair))?;
            }
        }
        Ok(())
    }

    fn set(&mut self, set: &DirtySet) -> Result<()> {
        self.born_from = set.born_from;
        let mut dirs: Vec<(usize, NodeId)> = Vec::new();
        for &dir in &set.dirs {
            // One that is gone was an entry of another that is dirty.
            if let Ok(path) = self.volume.path_of(dir) {
                dirs.push((path.names().len(), dir));
            }
        }
        // Those above first: where a directory lies is settled before what is in it.
        dirs.sort_unstable();
        for (_, dir) in dirs {
            self.walk(dir, false)?;
        }
        for &file in &set.files {
            self.file(file)?;
        }
        Ok(())
    }

    fn walk(&mut self, dir: NodeId, deep: bool) -> Result<()> {
        let mut waiting = vec![(dir, deep)];
        while let Some((dir, deep)) = waiting.pop() {
            unless_changed(self.source, self.dir(dir, deep, &mut waiting))?;
        }
        Ok(())
    }

    /// Opens a directory on both sides; `None` if the target does not have it (yet).
    fn pair(&self, node: NodeId) -> Result<Option<Pair>> {
        let (from_path, from) = {
            // Were a directory above renamed meanwhile, the path would lead to another one.
            let _still = self.volume.tree.read();
            let _bounded = Directly::off();
            let path = self.volume.path_of(node)?;
            let from = self.source.dir(&path)?;
            (path, from)
        };
        let Some(to_path) = self.places.path(node) else { return Ok(None) };
        match self.target.backing.open_dir(&to_path) {
            Ok(to) => Ok(Some(Pair { node, from, from_path, to, to_path })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).context("open the directory", self.target.at(&to_path)),
        }
    }

    /// Makes one directory's entries and attributes equal, and adds to `waiting` which of its
    /// sub-directories are to be compared.
    fn dir(&mut self, node: NodeId, deep: bool, waiting: &mut Vec<(NodeId, bool)>) -> Result<()> {
        let Some(pair) = self.pair(node)? else { return Ok(()) };
        let wanted = self.volume.catalog().list(node)?;
        let listed = self.target.live_entries(&pair.to, &pair.to_path)?;
        let mut present: BTreeMap<EntryName, DirEntry> =
            listed.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        let keep = |name: &EntryName| wanted.binary_search_by(|one| one.name.cmp(name)).is_ok();
        let gone: Vec<EntryName> = present.keys().filter(|name| !keep(name)).cloned().collect();
        for name in gone {
            present.remove(&name);
            self.displace(&pair, &name)?;
        }
        for entry in &wanted {
            let there = present.get(&entry.name);
            if entry.kind == Kind::Dir {
                self.sub_dir(&pair, entry, there, deep, waiting)?;
                self.progress.advance(1, 0)?;
                continue;
            }
            unless_changed(self.source, self.entry(&pair, entry))?;
        }
        self.dir_attributes(&pair)?;
        self.places.done.insert(node);
        Ok(())
    }

    fn dir_attributes(&self, pair: &Pair) -> Result<()> {
        let object = self.source.object_of(&pair.from, &pair.from_path)?;
        let present = self.target.object_of(&pair.to, &pair.to_path)?;
        match same_attributes(&object, &present) {
            true => Ok(()),
            false => self.copier.set_attributes(&pair.to, &pair.to_path, &object),
        }
    }

    /// Brings the right directory to a name.
    fn sub_dir(
        &mut self,
        pair: &Pair,
        entry: &Listed,
        there: Option<&DirEntry>,
        deep: bool,
        waiting: &mut Vec<(NodeId, bool)>,
    ) -> Result<()> {
        let (name, node) = (&entry.name, entry.node);
        if self.is_mount(pair, name) {
            return Ok(());
        }
        let is_dir = there.is_some_and(|there| there.kind == Kind::Dir);
        let here = is_dir && self.places.is_at(node, pair.node, name);
        let mut fresh = false;
        if !here {
            let stranger = is_dir && self.places.at(pair.node, name).is_none();
            if stranger && self.places.path(node).is_none() {
                // Nothing is known of either: it is taken for what it is called.
                fresh = true;
            } else {
                if there.is_some() {
                    self.displace(pair, name)?;
                }
                if !self.bring(pair, name, node)? {
                    let made = self.target.backing.mkdir(&pair.to, name, 0o700, own_creds());
                    let path = pair.to_path.join(name);
                    made.map_err(|error| blame(self.target, "make the directory", &path, error))?;
                    fresh = true;
                }
            }
            self.places.put(node, pair.node, name);
        }
        let born = self.born_from.is_some_and(|from| node >= from);
        let below = deep || fresh || born || !self.places.done.contains(&node);
        if below {
            waiting.push((node, true));
        }
        Ok(())
    }

    /// Renames a directory that the target has elsewhere. `false` if it does not have it.
    fn bring(&mut self, pair: &Pair, name: &EntryName, node: NodeId) -> Result<bool> {
        let Some(old) = self.places.path(node) else { return Ok(false) };
        let Some((above, old_name)) = old.split_last() else { return Ok(false) };
        let Ok(from) = self.target.backing.open_dir(&above) else { return Ok(false) };
        match self.target.backing.stat_at(&from, old_name) {
            Ok(stat) if stat.kind == Kind::Dir => {}
            _ => return Ok(false),
        }
        let left = self.places.parent(node);
        let backing = &self.target.backing;
        match backing.rename(&from, old_name, &pair.to, name, RenameMode::NoReplace) {
            Ok(()) => {}
            // It would come to lie in itself: the tree is being changed just now.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(false),
            Err(error) => {
                let path = pair.to_path.join(name);
                return Err(blame(self.target, "move the directory", &path, error));
            }
        }
        // The directory that it left has new times.
        if let Some(left) = left.filter(|&left| left != ON_THE_WAY && left != pair.node)
            && let Ok(Some(pair)) = self.pair(left)
        {
            self.dir_attributes(&pair)?;
        }
        Ok(true)
    }

    /// Frees a name of the target. A directory that lives on elsewhere is put aside until it is
    /// asked for.
    fn displace(&mut self, pair: &Pair, name: &EntryName) -> Result<()> {
        if let Some(node) = self.places.at(pair.node, name) {
            if self.volume.catalog().node(node)?.is_some() {
                return self.put_aside(&pair.to, &pair.to_path, name, node);
            }
            self.places.forget(node);
            return self.discard(&pair.to, &pair.to_path, name, Some(node));
        }
        self.discard_from(&pair.to, &pair.to_path, name, Some(pair.node))
    }

    fn put_aside(
        &mut self,
        dir: &Handle,
        path: &RelPath,
        name: &EntryName,
        node: NodeId,
    ) -> Result<()> {
        let aside = aside_name(node);
        let Some(tmp_path) = self.places.path(ON_THE_WAY) else { return Ok(()) };
        let tmp = self.target.dir(&tmp_path)?;
        self.target
            .backing
            .rename(dir, name, &tmp, &aside, RenameMode::NoReplace)
            .map_err(|error| blame(self.target, "move the directory", &path.join(name), error))?;
        self.places.put(node, ON_THE_WAY, &aside);
        Ok(())
    }

    /// What was put aside and is asked for no more goes.
    pub fn clear_aside(&mut self) -> Result<()> {
        let Some(path) = self.places.path(ON_THE_WAY) else { return Ok(()) };
        let dir = self.target.dir(&path)?;
        let listed = self.target.backing.list(&dir).context("list", self.target.at(&path))?;
        for entry in listed.iter().filter(|entry| entry.kind == Kind::Dir) {
            if let Some(node) = aside_node(&entry.name) {
                if self.volume.catalog().node(node)?.is_some() {
                    continue;
                }
                self.places.forget(node);
                self.discard(&dir, &path, &entry.name, Some(node))?;
            }
        }
        Ok(())
    }

    fn discard_from(
        &mut self,
        dir: &Handle,
        path: &RelPath,
        name: &EntryName,
        parent: Option<NodeId>,
    ) -> Result<()> {
        let stat = match self.target.backing.stat_at(dir, name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.context("look at", self.target.at(&path.join(name)))?,
        };
        if stat.kind == Kind::Dir {
            return self.discard(dir, path, name, None);
        }
        if self.is_kept_elsewhere(&stat, parent, name)? {
            let removed = self.target.backing.unlink(dir, name);
            return removed.map_err(|error| blame(self.target, "remove", &path.join(name), error));
        }
        self.quarantine.take(dir, path, name)
    }

    /// Whether the store had this object as it is: then its bytes are in history, or were to have
    /// none.
    fn is_kept_elsewhere(
        &self,
        stat: &Stat,
        parent: Option<NodeId>,
        name: &EntryName,
    ) -> Result<bool> {
        if stat.ctime < self.apart_since || self.places.made.contains(&stat.ino) {
            return Ok(true);
        }
        let (Some(own), Some(parent)) = (self.own, parent) else { return Ok(false) };
        let Some((node, _)) = own.lookup(parent, name)? else { return Ok(false) };
        let row = own.node(node)?;
        Ok(row.is_some_and(|row| {
            (row.kind, row.size, row.mtime) == (stat.kind, stat.size, stat.mtime)
                || row.kind == stat.kind && !matches!(row.kind, Kind::File | Kind::Dir)
        }))
    }

    /// Removes a directory with all below it, but for what lives on elsewhere and what is others'.
    fn discard(
        &mut self,
        dir: &Handle,
        path: &RelPath,
        name: &EntryName,
        node: Option<NodeId>,
    ) -> Result<()> {
        let own_path = path.join(name);
        let own = match self.target.backing.open_dir(&own_path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.context("open the directory", self.target.at(&own_path))?,
        };
        let listed = self.target.backing.list(&own).context("list", self.target.at(&own_path))?;
        for entry in listed {
            let below = node.and_then(|node| self.places.at(node, &entry.name));
            match below {
                Some(below) if self.volume.catalog().node(below)?.is_some() => {
                    self.put_aside(&own, &own_path, &entry.name, below)?;
                }
                Some(below) => {
                    self.places.forget(below);
                    self.discard(&own, &own_path, &entry.name, Some(below))?;
                }
                None => self.discard_from(&own, &own_path, &entry.name, node)?,
            }
            self.progress.advance(0, 0)?;
        }
        self.target
            .backing
            .rmdir(dir, name)
            .map_err(|error| blame(self.target, "remove the directory", &own_path, error))
    }

    fn is_mount(&self, pair: &Pair, name: &EntryName) -> bool {
        let opened = self.source.backing.open_dir(&pair.from_path.join(name));
        opened.is_err_and(|error| is_other_mount(&error))
    }

    /// Compares a node that is no directory, by one of its names.
    fn file(&mut self, node: NodeId) -> Result<()> {
        for (parent, name) in self.volume.catalog().names(node)? {
            let pair = unless_changed(self.source, self.pair(parent))?.flatten();
            let Some(pair) = pair else { continue };
            let Some((found, kind)) = self.volume.catalog().lookup(parent, &name)? else {
                continue;
            };
            let entry = Listed { name, node: found, kind };
            unless_changed(self.source, self.entry(&pair, &entry))?;
            // Its directory got new times if it was copied.
            unless_changed(self.source, self.dir_attributes(&pair))?;
        }
        Ok(())
    }

    fn entry(&mut self, pair: &Pair, entry: &Listed) -> Result<()> {
        let object = match self.source.object(&pair.from, &pair.from_path, &entry.name) {
            // Nothing of another mount belongs to the tree.
            Err(Error::Io { source, .. }) if is_other_mount(&source) => return Ok(()),
            other => other?,
        };
        // It is gone, or another kind of thing: the next round knows.
        let Some(object) = object.filter(|object| object.stat.kind == entry.kind) else {
            return Ok(());
        };
        let before = self.copier.bytes_written();
        let bytes = if object.stat.kind == Kind::File { object.stat.size } else { 0 };
        match object.stat.nlink > 1 {
            true => self.linked(pair, entry, &object)?,
            false => {
                let present = self.target.object(&pair.to, &pair.to_path, &entry.name)?;
                let single = present.as_ref().filter(|present| present.stat.nlink <= 1);
                match single {
                    Some(present)
                        if self.is_equal(pair, &entry.name, entry.node, &object, present)? =>
                    {
                        self.adjust(pair, &entry.name, &object, present)?;
                    }
                    _ => self.replace(pair, entry, &object, present.is_some())?,
                }
            }
        }
        let copied = self.copier.bytes_written() - before;
        self.progress.advance(1, bytes.saturating_sub(copied))
    }

    /// Whether the target's object has the bytes of the source's.
    fn is_equal(
        &mut self,
        pair: &Pair,
        name: &EntryName,
        node: NodeId,
        object: &Object,
        present: &Object,
    ) -> Result<bool> {
        self.is_equal_as(pair, name, (&pair.to, name), node, (object, present))
    }

    fn is_equal_as(
        &mut self,
        pair: &Pair,
        name: &EntryName,
        to: (&Handle, &EntryName),
        node: NodeId,
        (object, present): (&Object, &Object),
    ) -> Result<bool> {
        if !same_content(object, present) {
            return Ok(false);
        }
        let (a, b) = (&object.stat, &present.stat);
        let seen = Seen { ctime: a.ctime, ino: b.ino };
        let suspect = a.kind == Kind::File
            && a.size > 0
            && (a.ctime >= self.apart_since || b.ctime >= self.apart_since)
            && self.places.seen.get(&node) != Some(&seen);
        if suspect {
            let begun = Timestamp::now();
            if !self.copier.same_bytes((&pair.from, name), to, &pair.from_path)? {
                return Ok(false);
            }
            self.note_seen(node, seen, begun);
        }
        Ok(true)
    }

    fn note_seen(&mut self, node: NodeId, seen: Seen, begun: Timestamp) {
        if seen.ctime.as_nanos().saturating_add(GRAIN_NANOS) < begun.as_nanos() {
            self.places.seen.insert(node, seen);
        } else {
            self.places.seen.remove(&node);
        }
    }

    fn adjust(
        &self,
        pair: &Pair,
        name: &EntryName,
        object: &Object,
        present: &Object,
    ) -> Result<()> {
        self.adjust_at(&pair.to, &pair.to_path, name, object, present)
    }

    fn adjust_at(
        &self,
        dir: &Handle,
        path: &RelPath,
        name: &EntryName,
        object: &Object,
        present: &Object,
    ) -> Result<()> {
        if same_attributes(object, present) {
            return Ok(());
        }
        let path = path.join(name);
        let node = self.target.backing.open_node(dir, name);
        let node = node.context("open", self.target.at(&path))?;
        self.copier.set_attributes(&node, &path, object)
    }

    /// Copies an object to its name.
    fn replace(
        &mut self,
        pair: &Pair,
        entry: &Listed,
        object: &Object,
        is_there: bool,
    ) -> Result<()> {
        let name = &entry.name;
        let begun = Timestamp::now();
        let made = self.copier.make(&pair.from, &pair.from_path, name, object)?;
        if is_there {
            self.displace(pair, name)?;
        }
        self.copier.place(&made, &pair.to, &pair.to_path.join(name), name)?;
        let placed = self.target.backing.stat_at(&pair.to, name);
        let ino = placed.context("look at", self.target.at(&pair.to_path.join(name)))?.ino;
        self.places.made.insert(ino);
        self.note_seen(entry.node, Seen { ctime: object.stat.ctime, ino }, begun);
        Ok(())
    }

    /// Gives all names of a hard-linked node one object.
    fn linked(&mut self, pair: &Pair, entry: &Listed, object: &Object) -> Result<()> {
        if !self.links.contains_key(&entry.node) {
            let first = self.first_name(pair, entry, object)?;
            self.links.insert(entry.node, first);
        }
        let first = self.links[&entry.node].clone();
        self.link(pair, &entry.name, &first)
    }

    /// Finds or makes the object that all names get; returns its path.
    fn first_name(&mut self, pair: &Pair, entry: &Listed, object: &Object) -> Result<RelPath> {
        for (parent, name) in self.volume.catalog().names(entry.node)? {
            let Some(path) = self.places.path(parent) else { continue };
            let Ok(dir) = self.target.backing.open_dir(&path) else { continue };
            let Some(present) = self.target.object(&dir, &path, &name)? else { continue };
            let free = self.taken.get(&present.stat.ino).is_none_or(|node| *node == entry.node);
            let sides = (object, &present);
            if free
                && present.stat.kind == object.stat.kind
                && self.is_equal_as(pair, &entry.name, (&dir, &name), entry.node, sides)?
            {
                self.taken.insert(present.stat.ino, entry.node);
                self.adjust_at(&dir, &path, &name, object, &present)?;
                return Ok(path.join(&name));
            }
        }
        let there = self.target.backing.stat_at(&pair.to, &entry.name).is_ok();
        self.replace(pair, entry, object, there)?;
        let path = pair.to_path.join(&entry.name);
        let stat = self.target.backing.stat_at(&pair.to, &entry.name);
        self.taken.insert(stat.context("look at", self.target.at(&path))?.ino, entry.node);
        Ok(path)
    }

    fn link(&mut self, pair: &Pair, name: &EntryName, first: &RelPath) -> Result<()> {
        let Some((first_dir, first_name)) = first.split_last() else { return Ok(()) };
        let from = self.target.dir(&first_dir)?;
        let stat = self.target.backing.stat_at(&from, first_name);
        let ino = stat.context("look at", self.target.at(first))?.ino;
        match self.target.backing.stat_at(&pair.to, name) {
            Ok(present) if present.ino == ino => return Ok(()),
            Ok(_) => self.displace(pair, name)?,
            Err(_) => {}
        }
        let linked = self.target.backing.link(&from, first_name, &pair.to, name);
        linked.map_err(|error| blame(self.target, "link", &pair.to_path.join(name), error))
    }
}

/// `None` where something of the source was changed while it was looked at: the next round knows.
fn unless_changed<T>(source: &Site, outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Err(error) if has_changed(source, &error) => Ok(None),
        other => other.map(Some),
    }
}

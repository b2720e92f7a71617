//! Attributes of live objects: stat, mode, owner, times, size, extended attributes.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::replica::Handles;
use crate::replica::backing::{Access, Backing, Handle, SetTime, Stat};
use crate::store::row_of;
use crate::types::{ContentId, EntryName, Kind, NodeId, Timestamp, XattrSetId, Xattrs};

use super::intend::dirty;
use super::nodes::{Node, State};
use super::{Caller, Volume, is_private};

/// The extended attribute that holds a file's access ACL.
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
/// The attributes of one object, names and values, as long as the longest value that there can be
/// and some more. ext4 has 4 KiB.
const XATTRS_BYTES_MAX: usize = 80 << 10;
/// How long the attributes of many objects are asked for at once: far less than a single call may
/// take.
const AT_ONCE_MAX: Duration = Duration::from_millis(200);
/// Names with these prefixes are in the list of an object's attributes if it has them; others may
/// be made up when they are asked for.
const LISTED_XATTRS: [&[u8]; 4] = [b"user.", b"security.", b"trusted.", b"system.posix_acl_"];
/// Names with this prefix are ours and never shown.
const OUR_XATTRS: &[u8] = b"trusted.rearview.";

/// The changes of one `setattr`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    /// New permission bits.
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New size.
    pub size: Option<u64>,
    /// New access time.
    pub atime: Option<SetTime>,
    /// New modification time.
    pub mtime: Option<SetTime>,
}

/// A live object that a name means, and its attributes.
pub type LookedUp = (Arc<Node>, Stat);

/// What a caller without `CAP_FSETID` loses from a mode when content or owner change.
pub struct Privileges;

impl Privileges {
    /// The mode without setuid, and without setgid where that means execution
    /// (`setattr_should_drop_sgid` in the kernel's fs/attr.c).
    pub fn stripped(mode: u32) -> u32 {
        let mode = mode & !libc::S_ISUID;
        if mode & libc::S_IXGRP != 0 { mode & !libc::S_ISGID } else { mode }
    }
}

impl Volume {
    /// The live object that a name means, counted as one lookup of the kernel.
    pub fn lookup(&self, parent: NodeId, name: &EntryName) -> Result<LookedUp> {
        let node = self.named(parent, name)?;
        let stat = (|| {
            let state = self.lock(&node);
            match state.open.as_ref().and_then(|open| open.any().cloned()) {
                Some(_) => self.stat_locked(&node, &state),
                None => {
                    let dir = self.dir(parent)?;
                    let stat = self.replicas().read("stat", |id, b| {
                        let at = dir.get(id)?;
                        let stat = b.stat_name_at_hand(at, name).unwrap_or_else(|| {
                            self.look_ahead(id, parent, at, name);
                            b.stat_at(at, name)
                        })?;
                        of_kind(node.kind, stat)
                    })?;
                    Ok(self.shown(&node, &state, stat))
                }
            }
        })();
        match stat {
            Ok(stat) => {
                node.looked_up();
                Ok((node, stat))
            }
            Err(error) => {
                self.nodes.let_go(node);
                Err(error)
            }
        }
    }

    /// As [`Volume::lookup`], of several names in one directory; `None` for one that means nothing
    /// any more. All that is asked of a backing is asked by one hand-over.
    pub fn lookup_all(&self, parent: NodeId, names: &[EntryName]) -> Result<Vec<Option<LookedUp>>> {
        let found = self.catalog().lookup_all(parent, names)?;
        let closed = found.iter().zip(names).filter_map(|(found, name)| {
            let (id, _) = (*found)?;
            let is_open = self.nodes.get(id).is_some_and(|node| node.lock_as_is().open.is_some());
            (!is_open && !is_private(parent, name)).then(|| name.clone())
        });
        let (closed, dir): (Vec<EntryName>, _) = (closed.collect(), self.dir(parent)?);
        let stats = self.replicas().read_whole("stat", move |id, b| {
            let (dir, begun) = (dir.get(id)?, Instant::now());
            let in_time = closed.iter().take_while(|_| begun.elapsed() < AT_ONCE_MAX);
            in_time.map(|name| Ok((name.clone(), b.stat_at(dir, name)?))).collect()
        });
        // Where one of them failed, each is asked for alone, and so is what is left.
        let stats: HashMap<EntryName, Stat> = stats.unwrap_or_default();
        let entry = |(found, name): (Option<(NodeId, Kind)>, &EntryName)| {
            let (id, kind) = found?;
            let Some(stat) = stats.get(name).filter(|stat| stat.kind == kind) else {
                return self.lookup(parent, name).ok();
            };
            let node = self.nodes.load(id, kind);
            node.looked_up();
            Some((node, Stat { ino: id.0, ..*stat }))
        };
        Ok(found.into_iter().zip(names).map(entry).collect())
    }

    /// Attributes of a live node; `ino` is its node id.
    pub fn stat(&self, node: &Arc<Node>) -> Result<Stat> {
        let state = self.lock(node);
        self.stat_locked(node, &state)
    }

    pub(super) fn stat_locked(&self, node: &Arc<Node>, state: &State) -> Result<Stat> {
        if let Some(handles) = state.open.as_ref().and_then(|open| open.any()) {
            let stat = self.replicas().read("stat", |id, b| b.stat(handles.get(id)?));
            if stat.is_ok() || state.orphan {
                return stat.map(|stat| self.shown(node, state, stat));
            }
        }
        if state.orphan {
            let ghost = state.ghost.as_deref().ok_or(Error::Posix(Errno::STALE))?;
            return Ok(self.shown(node, state, *ghost));
        }
        // The kernel asks for a directory's attributes again after every change of its entries.
        let kept = match node.kind {
            Kind::Dir if node.id == NodeId::ROOT => Some(self.dir(node.id)?),
            Kind::Dir => self.replicas().kept_dir(node.id),
            _ => None,
        };
        let stat = if let Some(dir) = kept {
            self.replicas().read("stat", |id, b| b.stat(dir.get(id)?))?
        } else {
            let (dir, name) = self.location(node, state)?;
            self.replicas()
                .read("stat", |id, b| of_kind(node.kind, b.stat_at(dir.get(id)?, &name)?))?
        };
        Ok(self.shown(node, state, stat))
    }

    /// The backing's attributes as the mount shows them.
    fn shown(&self, node: &Arc<Node>, state: &State, mut stat: Stat) -> Stat {
        stat.ino = node.id.0;
        if state.orphan {
            // The one link it still has is ours, in `preserved/`.
            stat.nlink = 0;
        } else if node.id == NodeId::ROOT {
            // Our private directory is not shown.
            stat.nlink = stat.nlink.saturating_sub(1).max(2);
        }
        stat
    }

    /// Does `f` on every replica with a handle of the object, for attribute calls.
    fn on_object<T>(
        &self,
        op: &'static str,
        node: &Arc<Node>,
        state: &State,
        f: impl Fn(&dyn Backing, &Handle) -> std::io::Result<T> + Send + Sync + 'static,
    ) -> Result<T>
    where
        T: Send + 'static,
    {
        let replicas = self.replicas();
        if let Some(handles) = state.open.as_ref().and_then(|open| open.write.clone()) {
            return Ok(replicas.change(op, move |id, b| f(b, handles.get(id)?))?.primary());
        }
        if state.orphan {
            // No replica's live tree has it any more: only the open handle counts.
            let handles = state.open.as_ref().and_then(|open| open.read.clone());
            let handles = handles.ok_or(Error::Posix(Errno::STALE))?;
            return replicas.read(op, |id, b| f(b, handles.get(id)?));
        }
        if node.kind == Kind::Dir {
            let dir = self.dir(node.id)?;
            return Ok(replicas.change(op, move |id, b| f(b, dir.get(id)?))?.primary());
        }
        let (dir, name): (Arc<Handles>, _) = self.location(node, state)?;
        let answers = replicas.change(op, move |id, b| {
            let object = b.open_node(dir.get(id)?, &name)?;
            f(b, &object)
        })?;
        Ok(answers.primary())
    }

    /// Changes attributes and returns the new ones. All fields empty is the kernel's way to say
    /// that setuid, setgid and capabilities must go before a write (`FUSE_HANDLE_KILLPRIV_V2`).
    pub fn set_attributes(
        &self,
        node: &Arc<Node>,
        changes: &Changes,
        caller: &Caller,
    ) -> Result<Stat> {
        let _cut = self.begin_change();
        let _intent = self.intend(&[dirty(node)])?;
        let entries = if changes.size == Some(0) { self.lock_parent(node)? } else { None };
        let mut state = self.lock(node);
        if let Some(size) = changes.size {
            if node.kind != Kind::File {
                return Err(Error::Posix(Errno::INVAL));
            }
            self.open_state(node, &mut state)?;
            self.open_handles(node, &mut state, Access::ReadWrite)?;
            self.truncate_locked(node, &mut state, size, entries.as_ref(), caller)?;
            self.clear_privileges(node, &mut state, caller)?;
        }
        if changes.uid.is_some() || changes.gid.is_some() {
            let (uid, gid) = (changes.uid, changes.gid);
            self.on_object("chown", node, &state, move |b, o| b.chown(o, uid, gid))?;
        }
        if let Some(mode) = changes.mode {
            node.set_unprivileged(false);
            self.on_object("chmod", node, &state, move |b, o| b.chmod(o, mode & 0o7777))?;
        }
        if changes.atime.is_some() || changes.mtime.is_some() {
            self.set_times(node, &state, changes)?;
        }
        let kill = changes.mode.is_none()
            && changes.uid.is_none()
            && changes.gid.is_none()
            && changes.size.is_none()
            && changes.atime.is_none()
            && changes.mtime.is_none();
        if kill {
            self.strip_privileges(node, &mut state)?;
        }
        self.record(node, &mut state, caller)?;
        // A truncate of a file that nobody has open is a version at once.
        if state.open.as_ref().is_some_and(|open| open.writers == 0) {
            self.seal(node, &mut state)?;
        }
        let stat = self.stat_locked(node, &state)?;
        if state.open.as_ref().is_some_and(|open| open.opens == 0 && !open.dirty) {
            state.open = None;
        }
        Ok(stat)
    }

    /// Sets times: "now" is the primary's, and the others get the same.
    fn set_times(&self, node: &Arc<Node>, state: &State, changes: &Changes) -> Result<()> {
        let asked = (changes.atime, changes.mtime);
        let asked = (asked.0.unwrap_or(SetTime::Omit), asked.1.unwrap_or(SetTime::Omit));
        let present = OnceLock::<Stat>::new();
        self.on_object("utimens", node, state, move |b, object| {
            let fixed = |time, of: fn(&Stat) -> Timestamp| match (time, present.get()) {
                (SetTime::Now, Some(stat)) => SetTime::To(of(stat)),
                (time, _) => time,
            };
            let (atime, mtime) =
                (fixed(asked.0, |stat| stat.atime), fixed(asked.1, |stat| stat.mtime));
            b.set_times(object, atime, mtime)?;
            if atime == SetTime::Now || mtime == SetTime::Now {
                let _ = present.set(b.stat(object)?);
            }
            Ok(())
        })
    }

    /// Removes setuid, setgid and capabilities if the caller may not keep them.
    pub(super) fn clear_privileges(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        caller: &Caller,
    ) -> Result<()> {
        if caller.creds.uid == 0 { Ok(()) } else { self.strip_privileges(node, state) }
    }

    /// Whether a write has setuid or setgid to take away.
    pub(super) fn is_privileged(&self, node: &Arc<Node>, state: &State) -> Result<bool> {
        let mode = self.stat_locked(node, state)?.mode;
        Ok(Privileges::stripped(mode) != mode)
    }

    /// Removes setuid and setgid. Capabilities went with the backing's own write.
    pub(super) fn strip_privileges(&self, node: &Arc<Node>, state: &mut State) -> Result<()> {
        let mode = self.stat_locked(node, state)?.mode;
        let stripped = Privileges::stripped(mode);
        if stripped != mode {
            self.on_object("chmod", node, state, move |b, object| b.chmod(object, stripped))?;
        }
        Ok(())
    }

    /// Records a node's attributes. A file that is not sealed yet is recorded when it is.
    fn record(&self, node: &Arc<Node>, state: &mut State, caller: &Caller) -> Result<()> {
        if state.orphan || state.open.as_ref().is_some_and(|open| open.dirty) {
            return Ok(());
        }
        if node.kind == Kind::Dir {
            let row = self.settle_dir(node.id)?;
            let mut changes = Vec::with_capacity(1);
            self.put(&self.standing(node, 1)?, row, &mut changes)?;
            self.push_by(caller, changes)?;
            return Ok(());
        }
        let (stat, xattrs) = self.look(node, state)?;
        let known = match state.open.as_ref() {
            Some(open) => open.sealed.clone(),
            None => self.catalog().node(node.id)?.ok_or(Error::Posix(Errno::STALE))?,
        };
        let xattrs = self.catalog().intern_xattrs(&xattrs)?;
        let mut row = row_of(node.id, &stat, xattrs, ContentId::EMPTY);
        let mut changes = Vec::with_capacity(1);
        let standing = self.standing(node, stat.nlink)?;
        row.content = self.content_shown(standing.versioned, &row, known.content, &mut changes);
        row.btime = known.btime;
        self.put(&standing, row.clone(), &mut changes)?;
        self.push_by(caller, changes)?;
        if let Some(open) = state.open.as_mut() {
            open.sealed = row;
            open.attributed = false;
        }
        Ok(())
    }

    /// The primary's attributes of an object, with its extended ones.
    fn look(&self, node: &Arc<Node>, state: &State) -> Result<(Stat, Xattrs)> {
        let open = state.open.as_ref().and_then(|open| open.any().cloned());
        if let Some(handles) = open {
            return self.replicas().read("stat", |id, b| {
                let file = handles.get(id)?;
                Ok((b.stat(file)?, b.xattrs(file)?))
            });
        }
        let (dir, name) = self.location(node, state)?;
        self.replicas().read("stat", |id, b| {
            let object = b.open_node(dir.get(id)?, &name)?;
            Ok((b.stat(&object)?, b.xattrs(&object)?))
        })
    }

    /// A symlink's target.
    pub fn readlink(&self, node: &Arc<Node>) -> Result<Vec<u8>> {
        if let Some(target) = self.catalog().symlink_target(node.id)? {
            return Ok(target);
        }
        let state = self.lock(node);
        let (dir, name) = self.location(node, &state)?;
        self.replicas().read("readlink", |id, b| b.readlink(&b.open_node(dir.get(id)?, &name)?))
    }

    /// Does `f` on the primary with a handle of the object.
    fn read_object<T>(
        &self,
        op: &'static str,
        node: &Arc<Node>,
        mut f: impl FnMut(&dyn Backing, &Handle) -> std::io::Result<T>,
    ) -> Result<T> {
        let state = self.lock(node);
        if let Some(handles) = state.open.as_ref().and_then(|open| open.any().cloned()) {
            return self.replicas().read(op, |id, b| f(b, handles.get(id)?));
        }
        if state.orphan {
            return Err(Error::Posix(Errno::NODATA));
        }
        if node.kind == Kind::Dir {
            let dir = self.dir(node.id)?;
            return self.replicas().read(op, |id, b| f(b, dir.get(id)?));
        }
        let (dir, name) = self.location(node, &state)?;
        self.replicas().read(op, |id, b| f(b, &b.open_node(dir.get(id)?, &name)?))
    }

    /// Whether it is known, without asking a backing, that there are no extended attributes. The
    /// kernel asks for some with every file that is made, listed or written.
    fn lacks_xattrs(&self, node: &Arc<Node>) -> Result<bool> {
        let state = self.lock(node);
        let known = match state.open.as_deref() {
            Some(open) => (!open.attributed).then_some(open.sealed.xattrs),
            None => self.catalog().node(node.id)?.map(|row| row.xattrs),
        };
        Ok(known == Some(XattrSetId::NONE))
    }

    /// One extended attribute.
    pub fn get_xattr(&self, node: &Arc<Node>, name: &OsStr) -> Result<Vec<u8>> {
        let bytes = name.as_bytes();
        let listed = LISTED_XATTRS.iter().any(|prefix| bytes.starts_with(prefix));
        if bytes.starts_with(OUR_XATTRS) || (listed && self.lacks_xattrs(node)?) {
            return Err(Error::Posix(Errno::NODATA));
        }
        self.read_object("getxattr", node, |b, object| b.get_xattr(object, name))
    }

    /// The names of all extended attributes.
    pub fn list_xattrs(&self, node: &Arc<Node>) -> Result<Xattrs> {
        if self.lacks_xattrs(node)? {
            return Ok(Xattrs::default());
        }
        self.read_object("listxattr", node, |b, object| b.xattrs(object))
    }

    /// Sets an extended attribute.
    pub fn set_xattr(
        &self,
        node: &Arc<Node>,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        caller: &Caller,
    ) -> Result<()> {
        if name.as_bytes().starts_with(OUR_XATTRS) {
            return Err(Error::Posix(Errno::PERM));
        }
        let _cut = self.begin_change();
        let _intent = self.intend(&[dirty(node)])?;
        let mut state = self.lock(node);
        // An access list can make setgid mean execution.
        node.set_unprivileged(false);
        self.check_room(node, name, value)?;
        let (key, own) = (name.to_owned(), value.to_vec());
        note_attributed(&mut state);
        self.on_object("setxattr", node, &state, move |b, o| b.set_xattr(o, &key, &own, flags))?;
        if name.as_bytes() == ACCESS_ACL {
            self.drop_foreign_setgid(node, &mut state, caller)?;
        }
        self.record(node, &mut state, caller)
    }

    /// Refuses an attribute that would make the set of them too large: each change of one cuts a
    /// version, and has the whole set written to the catalog.
    fn check_room(&self, node: &Arc<Node>, name: &OsStr, value: &[u8]) -> Result<()> {
        let row = self.catalog().node(node.id)?.map_or(XattrSetId::NONE, |row| row.xattrs);
        let set = self.catalog().xattrs(row)?;
        let size = |(name, value): (&Vec<u8>, &Vec<u8>)| name.len() + value.len();
        let now: usize = set.0.iter().map(size).sum();
        let old = set.0.get_key_value(name.as_bytes()).map_or(0, size);
        let new = name.len() + value.len();
        // What an adopted file has may be more; it may shrink.
        match new > old && now - old + new > XATTRS_BYTES_MAX {
            true => Err(Error::Posix(Errno::NOSPC)),
            false => Ok(()),
        }
    }

    /// Setting an ACL drops setgid for a caller outside the file's group, as
    /// `posix_acl_update_mode` does; the kernel's flag that would tell us is not passed on by the
    /// FUSE library.
    fn drop_foreign_setgid(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        caller: &Caller,
    ) -> Result<()> {
        let stat = self.stat_locked(node, state)?;
        if caller.creds.uid == 0 || stat.mode & libc::S_ISGID == 0 {
            return Ok(());
        }
        if stat.gid == caller.creds.gid || groups_of(caller.pid).contains(&stat.gid) {
            return Ok(());
        }
        let mode = stat.mode & !libc::S_ISGID;
        self.on_object("chmod", node, state, move |b, object| b.chmod(object, mode))
    }

    /// Removes an extended attribute.
    pub fn remove_xattr(&self, node: &Arc<Node>, name: &OsStr, caller: &Caller) -> Result<()> {
        if name.as_bytes().starts_with(OUR_XATTRS) {
            return Err(Error::Posix(Errno::NODATA));
        }
        let _cut = self.begin_change();
        let _intent = self.intend(&[dirty(node)])?;
        let mut state = self.lock(node);
        node.set_unprivileged(false);
        let key = name.to_owned();
        note_attributed(&mut state);
        self.on_object("removexattr", node, &state, move |b, o| b.remove_xattr(o, &key))?;
        self.record(node, &mut state, caller)
    }
}

/// To be called before an extended attribute changes: what was sealed tells nothing of them then.
fn note_attributed(state: &mut State) {
    if let Some(open) = state.open.as_mut() {
        open.attributed = true;
    }
}

/// The supplementary groups of a process (`Groups:` of proc_pid_status(5)); none if it is gone.
fn groups_of(pid: u32) -> Vec<u32> {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else {
        return Vec::new();
    };
    status
        .lines()
        .find_map(|line| line.strip_prefix("Groups:"))
        .map(|groups| groups.split_whitespace().filter_map(|group| group.parse().ok()).collect())
        .unwrap_or_default()
}

/// What a replica has must be what was recorded. Somebody who put a symlink in the place of a
/// directory would have the kernel follow it: then this is no copy of the object.
fn of_kind(kind: Kind, stat: Stat) -> std::io::Result<Stat> {
    if stat.kind == kind { Ok(stat) } else { Err(Errno::IO.into()) }
}

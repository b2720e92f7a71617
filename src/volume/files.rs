//! Content of live files: open, read, write, allocate, copy, make durable.

mod by_hand;
mod level;

use std::sync::Arc;

use parking_lot::MutexGuard;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::history::ranges::{ByteRange, RangeSet};
use crate::history::{self, preserved_dir, preserved_name};
use crate::replica::backing::{Access, Backing, Handle, RenameMode, Seek, SetTime};
use crate::replica::copy::copy_all;
use crate::replica::{Handles, Piece, PrivateDir};
use crate::types::{ContentId, EntryName, NodeId, ReplicaId};

use super::deferred::deferred_error;
use super::intend::dirty;
use by_hand::emulate_fallocate;

use super::nodes::{Node, Open, State};
use super::sync::Syncing;
use super::{Caller, ROOM_FOR_A_FILE, Volume};

/// Allocation modes that change or remove bytes (`fallocate(2)`).
const FALLOCATE_DESTROYS: u32 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) as u32;
/// A copy within a file system is done in steps of this size, so that none holds the locks for
/// long.
const COPY_BYTES_MAX: u64 = 64 << 20;

/// A directory whose entries are locked.
pub(super) struct LockedParent<'a> {
    id: NodeId,
    _entries: MutexGuard<'a, ()>,
}

impl Volume {
    /// Opens a file; `truncate` also empties it. Every open is ended by [`Volume::release`].
    pub fn open_file(
        &self,
        node: &Arc<Node>,
        writable: bool,
        truncate: bool,
        caller: &Caller,
    ) -> Result<()> {
        let _cut = if truncate { self.begin_change() } else { self.cut.read() };
        let _intent = if truncate { Some(self.intend(&[dirty(node)])?) } else { None };
        let entries = if truncate { self.lock_parent(node)? } else { None };
        let mut state = self.lock(node);
        node.set_unprivileged(false);
        self.open_state(node, &mut state)?;
        let access = if writable || truncate { Access::ReadWrite } else { Access::Read };
        self.open_handles(node, &mut state, access)?;
        if truncate {
            self.truncate_locked(node, &mut state, 0, entries.as_ref(), caller)?;
            self.clear_privileges(node, &mut state, caller)?;
        }
        let open = state.open.as_mut().expect("opened above");
        open.opens += 1;
        open.writers += u32::from(writable);
        if writable && !open.dirty {
            self.note_changer(open, caller);
        }
        Ok(())
    }

    /// How often a file is open for writing.
    pub fn writers(&self, node: &Node) -> u32 {
        self.lock(node).open.as_ref().map_or(0, |open| open.writers)
    }

    /// Makes sure that the open state of a file is there, with what the catalog knows of it.
    pub(super) fn open_state(&self, node: &Node, state: &mut State) -> Result<()> {
        if state.open.is_none() {
            let sealed = self.catalog().node(node.id)?.ok_or(Error::Posix(Errno::STALE))?;
            state.open = Some(Box::new(Open::new(sealed)));
        }
        Ok(())
    }

    /// Makes sure that a file with open state has handles for `access`.
    pub(super) fn open_handles(
        &self,
        node: &Node,
        state: &mut State,
        access: Access,
    ) -> Result<()> {
        self.resyncs.note_activity();
        let open = state.open.as_mut().expect("the caller made the open state");
        match access {
            Access::ReadWrite if open.write.is_none() => {
                let (dir, name) = self.location(node, state)?;
                let handles = self
                    .replicas()
                    .open("open", |id, b| b.open_file(dir.get(id)?, &name, Access::ReadWrite))?;
                let open = state.open.as_mut().expect("as above");
                open.write = Some(Arc::new(Handles::from(handles)));
                open.read = None;
            }
            Access::Read if open.any().is_none() => {
                let (dir, name) = self.location(node, state)?;
                let (id, handle) = self.replicas().read("open", |id, b| {
                    Ok((id, b.open_file(dir.get(id)?, &name, Access::Read)?))
                })?;
                let open = state.open.as_mut().expect("as above");
                open.read = Some(Arc::new(self.single_handle(id, handle)));
            }
            _ => {}
        }
        Ok(())
    }

    /// Handles of an object that is open on one replica only.
    fn single_handle(&self, on: ReplicaId, handle: Handle) -> Handles {
        let mut handle = Some(handle);
        Handles::new(self.replicas().map_ids(|id| if id == on { handle.take() } else { None }))
    }

    /// The directory and the name by which a file is reached on every replica: its own, or for an
    /// orphan the ones under which it is preserved.
    pub(super) fn location(&self, node: &Node, state: &State) -> Result<(Arc<Handles>, EntryName)> {
        if state.orphan {
            let content = state.open.as_ref().map_or(ContentId::EMPTY, |open| open.sealed.content);
            let dir = self.replicas().private(preserved_dir(node.id))?;
            return Ok((dir, preserved_name(node.id, content)));
        }
        let (parent, name) = node.place(self.catalog())?.ok_or(Error::Posix(Errno::STALE))?;
        Ok((self.dir(parent)?, name))
    }

    /// Ends one open. The last writer's end seals the file.
    pub fn release(&self, node: &Arc<Node>, writable: bool) -> Result<()> {
        let _cut = self.cut.read();
        let mut state = self.lock(node);
        let Some(open) = state.open.as_mut() else { return Ok(()) };
        open.opens -= 1;
        open.writers -= u32::from(writable);
        let mut outcome = Ok(());
        if open.writers == 0 {
            open.failed = None;
            outcome = self.seal(node, &mut state);
        }
        if let Some(open) = state.open.as_ref()
            && open.opens == 0
            && !open.dirty
        {
            state.open = None;
        }
        outcome
    }

    /// A descriptor of the file was closed: what it wrote becomes a version.
    ///
    /// A shell's `>` empties a file and closes a duplicate of its descriptor before anything is
    /// written. So a file that was emptied and not written yet waits for its last writer's end.
    pub fn flush(&self, node: &Arc<Node>) -> Result<()> {
        let _cut = self.cut.read();
        let mut state = self.lock(node);
        deferred_error(&state)?;
        if state.open.as_ref().is_some_and(|open| open.emptied) {
            return Ok(());
        }
        self.seal(node, &mut state)
    }

    /// Reads from an open file; short only at its end.
    pub fn read(&self, node: &Arc<Node>, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let handles = {
            let mut state = self.lock(node);
            self.open_state(node, &mut state)?;
            self.open_handles(node, &mut state, Access::Read)?;
            state.open.as_ref().and_then(|open| open.any().cloned()).expect("opened above")
        };
        let opened = handles.clone();
        self.replicas().read("read", |id, b| {
            let read = match opened.get(id) {
                Ok(file) => b.read_at(file, buffer, offset),
                // The replica that it was open on failed: another one is asked.
                Err(_) => self.with_other(node, id, b, |file| b.read_at(file, buffer, offset)),
            };
            // What is bad here and good elsewhere is healed in the background.
            read.inspect_err(|_| self.suspect(node.id))
        })
    }

    /// Does `f` with a file that is not open on the replica `id`.
    fn with_other<T>(
        &self,
        node: &Arc<Node>,
        id: ReplicaId,
        b: &dyn Backing,
        f: impl FnOnce(&Handle) -> std::io::Result<T>,
    ) -> std::io::Result<T> {
        let state = self.lock(node);
        let (dir, name) =
            self.location(node, &state).map_err(|error| std::io::Error::from(error.to_errno()))?;
        f(&b.open_file(dir.get(id)?, &name, Access::Read)?)
    }

    /// Writes to a file that is open for writing; `strip` also takes its privileges away, and tells
    /// whether it had any. It may be [deferred](super::deferred).
    pub fn write(
        &self,
        node: &Arc<Node>,
        offset: u64,
        data: &[u8],
        strip: bool,
        caller: &Caller,
    ) -> Result<bool> {
        if data.is_empty() {
            return Ok(false);
        }
        let _cut = self.begin_write(node);
        self.ensure_room(data.len() as u64)?;
        let mut intent = self.intend(&[dirty(node)])?;
        let mut strip = strip && !node.is_unprivileged();
        if !strip {
            match self.defer_beside(node, (offset, data), intent, caller) {
                Ok(()) => return Ok(false),
                Err(own) => intent = own,
            }
        }
        let mut state = node.lock_as_is();
        self.writable(node, &mut state)?;
        if strip && !self.is_privileged(node, &state)? {
            // As nearly every file: the kernel asks for it with each write that is not root's.
            node.set_unprivileged(true);
            strip = false;
        }
        let range = ByteRange::new(offset, data.len() as u64);
        let piece = Piece { offset, bytes: data.to_vec().into() };
        if !strip && self.is_to_be_deferred(node, &state, range) {
            self.mark_unsealed(node, &mut state, true, caller);
            self.defer(node, &mut state, piece, intent);
            return Ok(false);
        }
        self.carry_out(node, &mut state);
        let handles = self.before_change(node, &mut state, &[range])?;
        let written = self.write_all(&handles, &Arc::from([piece]));
        self.mark_unsealed(node, &mut state, true, caller);
        written?;
        if strip {
            self.strip_privileges(node, &mut state)?;
        }
        Ok(strip)
    }

    /// Gets a file ready for a change of these ranges: open for writing everywhere, and what the
    /// sealed content has there preserved. Returns the handles to change it by.
    pub(super) fn before_change(
        &self,
        node: &Node,
        state: &mut State,
        ranges: &[ByteRange],
    ) -> Result<Arc<Handles>> {
        // What must lose its setuid bit is told so; the thread's last caller must not decide it.
        crate::sys::regain_fsetid().map_err(Error::from_io)?;
        self.writable(node, state)?;
        self.preserve(node, state, ranges)?;
        let open = state.open.as_ref().expect("opened above");
        Ok(open.write.clone().expect("opened above"))
    }

    /// Preserves what the sealed content has in these ranges and is not preserved yet.
    pub(super) fn preserve(
        &self,
        node: &Node,
        state: &mut State,
        ranges: &[ByteRange],
    ) -> Result<()> {
        let open = state.open.as_mut().expect("the caller opened the file");
        if open.sealed.content == ContentId::EMPTY {
            return Ok(());
        }
        let mut lost = RangeSet::default();
        for &range in ranges {
            let touched = history::touched(range, open.sealed.size);
            open.saved.missing(touched).into_iter().for_each(|part| lost.insert(part));
        }
        let mut lost: Vec<ByteRange> = lost.iter().collect();
        if lost.is_empty() {
            return Ok(());
        }
        self.settle_emptied(node.id)?;
        let of = (node.id, open.sealed.content);
        let whole = ByteRange { start: 0, end: open.sealed.size };
        let untouched = open.is_untouched();
        let handles = open.write.clone().expect("the caller opened the file");
        let replicas = self.replicas();
        state.stamp = self.nodes.next_stamp();
        // An orphan is itself the file under which its last content is preserved.
        let cloned = untouched
            && !state.orphan
            && replicas.ensure_room(ROOM_FOR_A_FILE).is_ok()
            && self.history.clone_whole(replicas, self.catalog(), of, whole.end, &handles)?;
        if !cloned {
            self.ensure_room(lost.iter().map(ByteRange::len).sum::<u64>())?;
            // Each call waits until it is durable, so who overwrites a file from end to end, with
            // a sync now and then, has what comes next preserved with it. History yields for what
            // is needed only, not for what may be.
            let open = state.open.as_mut().expect("as above");
            let next = lost.iter().fold(None, |_, &part| open.run.took(part));
            let next = next.map(|next| history::touched(next, open.sealed.size));
            if let Some(next) = next.filter(|next| replicas.ensure_room(next.len()).is_ok()) {
                for part in open.saved.missing(next) {
                    open.run.took(part);
                    lost.push(part);
                }
            }
            self.history.before_overwrite(replicas, self.catalog(), of, &handles, &lost)?;
        }
        let saved = &mut state.open.as_mut().expect("as above").saved;
        match cloned {
            true => saved.insert(whole),
            false => lost.into_iter().for_each(|part| saved.insert(part)),
        }
        Ok(())
    }

    /// Locks the entries of the directory by which a file is reached, before the file itself.
    pub(super) fn lock_parent(&self, node: &Arc<Node>) -> Result<Option<LockedParent<'_>>> {
        let Some((parent, _)) = node.place(self.catalog())? else { return Ok(None) };
        Ok(Some(LockedParent { id: parent, _entries: self.lock_dir(parent) }))
    }

    /// Sets a file's size. The caller locked its directory's entries if it is to be emptied, then
    /// the node, and opened the file for writing.
    pub(super) fn truncate_locked(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        size: u64,
        entries: Option<&LockedParent<'_>>,
        caller: &Caller,
    ) -> Result<()> {
        if size == 0 && self.move_aside(node, state, entries)? {
            self.mark_unsealed(node, state, true, caller);
            state.open.as_mut().expect("the caller opened the file").emptied = true;
            return Ok(());
        }
        let lost = ByteRange { start: size, end: u64::MAX };
        let handles = self.before_change(node, state, &[lost])?;
        self.replicas().apply("truncate", |id, b| b.truncate(handles.get(id)?, size))?;
        self.mark_unsealed(node, state, true, caller);
        state.open.as_mut().expect("the caller opened the file").emptied = size == 0;
        Ok(())
    }

    /// Empties a file without copying it: the old one is moved into `preserved/` and an empty one
    /// with the same attributes takes its name, which is never missing. The directory's times stay,
    /// for no program made an entry. `false` where that cannot be done.
    fn move_aside(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        entries: Option<&LockedParent<'_>>,
    ) -> Result<bool> {
        let Some(parent) = entries.map(|entries| entries.id) else { return Ok(false) };
        if node.place(self.catalog())?.is_none_or(|(own, _)| own != parent) {
            return Ok(false);
        }
        let open = state.open.as_ref().expect("the caller opened the file");
        if state.orphan || open.sealed.content == ContentId::EMPTY || open.sealed.size == 0 {
            return Ok(false);
        }
        let whole = ByteRange { start: 0, end: open.sealed.size };
        if open.saved.missing(whole).is_empty() {
            // All of it is preserved already; what the file has now belongs to no sealed content.
            return Ok(false);
        }
        let content = open.sealed.content;
        let old = open.write.clone().expect("the caller opened the file");
        match self.ensure_room(ROOM_FOR_A_FILE) {
            // Its bytes may have room where another file has none.
            Err(error) if error.is(Errno::NOSPC) => return Ok(false),
            answer => answer?,
        }
        let replicas = self.replicas();
        let (stat, xattrs) = replicas.read("stat", |id, b| {
            let file = old.get(id)?;
            Ok((b.stat(file)?, b.xattrs(file)?))
        })?;
        if stat.nlink != 1 {
            return Ok(false);
        }
        let (dir, name) = self.location(node, state)?;
        let tmp = replicas.private(PrivateDir::Tmp)?;
        let kept = replicas.private(preserved_dir(node.id))?;
        let kept_name = preserved_name(node.id, content);
        let times = replicas.read("stat", |id, b| b.stat(dir.get(id)?))?;
        let made = replicas.apply("replace", |id, b| {
            let tmp = tmp.get(id)?;
            // A leftover of a mount that died here.
            let _ = b.unlink(tmp, &kept_name);
            let file = b.create(tmp, &kept_name, 0o600, history::OWN)?;
            b.chown(&file, Some(stat.uid), Some(stat.gid))?;
            for (key, value) in &xattrs.0 {
                use std::os::unix::ffi::OsStrExt;
                b.set_xattr(&file, std::ffi::OsStr::from_bytes(key), value, 0)?;
            }
            b.chmod(&file, stat.mode)?;
            if !b.orders_names() {
                // btrfs' log can bring the end of the old file's name to the disk, when anything is
                // synced, without the new file that took it.
                b.sync(&file, false)?;
            }
            // Dead before the link: nothing happened. After it: recovery drops the second link.
            // After the rename: recovery finds the preserved file and an empty live one.
            link_anew(b, (dir.get(id)?, &name), (kept.get(id)?, &kept_name))?;
            b.rename(tmp, &kept_name, dir.get(id)?, &name, RenameMode::Replace)?;
            b.set_times(dir.get(id)?, SetTime::To(times.atime), SetTime::To(times.mtime))?;
            Ok(file)
        });
        self.nodes.emptied.note(&[node.id]);
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                // The live file keeps its one name, else its end would not be seen as such. Where
                // another has its name already, what is kept is all that there is of it.
                let _ = replicas.apply("unlink", |id, b| {
                    let _ = b.unlink(tmp.get(id)?, &kept_name);
                    let live = b.stat_at(dir.get(id)?, &name).map(|stat| stat.ino);
                    let linked = b.stat_at(kept.get(id)?, &kept_name).map(|stat| stat.ino);
                    if matches!((live, linked), (Ok(live), Ok(linked)) if live == linked) {
                        let _ = b.unlink(kept.get(id)?, &kept_name);
                    }
                    Ok(())
                });
                return Err(error);
            }
        };
        self.note_replaced(&[node.id, parent]);
        state.stamp = self.nodes.next_stamp();
        let changes = vec![crate::catalog::Change::ContentPreserved { id: content, cloned: false }];
        self.catalog().push(changes)?;
        // The node keeps its birth: what lived long is kept longer after its deletion.
        let open = state.open.as_mut().expect("as above");
        open.write = Some(Arc::new(Handles::from(made)));
        open.saved.insert(whole);
        Ok(true)
    }

    /// Allocates, punches or zeroes (`fallocate(2)`; the kernel passes no other modes).
    pub fn fallocate(
        &self,
        node: &Arc<Node>,
        mode: u32,
        offset: u64,
        length: u64,
        caller: &Caller,
    ) -> Result<()> {
        let _cut = self.begin_change();
        let _intent = self.intend(&[dirty(node)])?;
        let mut state = self.lock(node);
        let range = ByteRange::new(offset, length);
        let destroys = mode & FALLOCATE_DESTROYS != 0;
        if !destroys {
            self.ensure_room(length)?;
        }
        let lost = if destroys { range } else { ByteRange { start: 0, end: 0 } };
        let handles = self.before_change(node, &mut state, &[lost])?;
        let mut first = true;
        let allocated = self.replicas().apply("fallocate", |id, b| {
            let file = handles.get(id)?;
            let answer = b.fallocate(file, mode, offset, length);
            let unsupported =
                answer.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EOPNOTSUPP));
            // The first backing's answer is the program's; the others must do the same, by hand if
            // their filesystem cannot.
            if unsupported && !first {
                return emulate_fallocate(b, file, mode, range);
            }
            first = false;
            answer
        });
        // A filesystem that cannot do it has done nothing; any other failure may come halfway.
        if !allocated.as_ref().is_err_and(|error| error.is(Errno::OPNOTSUPP)) {
            self.mark_unsealed(node, &mut state, true, caller);
        }
        allocated.map(|_| ())
    }

    /// Finds data or a hole in a live file.
    pub fn seek(&self, node: &Arc<Node>, offset: u64, to: Seek) -> Result<u64> {
        let mut state = self.lock(node);
        self.open_state(node, &mut state)?;
        self.open_handles(node, &mut state, Access::Read)?;
        let handles =
            state.open.as_ref().and_then(|open| open.any().cloned()).expect("opened above");
        self.replicas().read("seek", |id, b| b.seek(handles.get(id)?, offset, to))
    }

    /// Copies a range between two live files, or within one, on every replica by itself, so that a
    /// backing that can share blocks does. Returns how much was copied.
    pub fn copy_range(
        &self,
        (from, from_offset): (&Arc<Node>, u64),
        (to, to_offset): (&Arc<Node>, u64),
        length: u64,
        caller: &Caller,
    ) -> Result<u64> {
        let _cut = self.begin_change();
        let _intent = self.intend(&[dirty(to)])?;
        let other = (from.id != to.id).then_some(&**from);
        let (mut state, mut from_state) = self.lock_nodes(to, other);
        let source = match from_state.as_mut() {
            Some(from_state) => self.writable(from, from_state)?,
            None => self.writable(to, &mut state)?,
        };
        let size = self.replicas().read("stat", |id, b| Ok(b.stat(source.get(id)?)?.size))?;
        let length = length.min(size.saturating_sub(from_offset)).min(COPY_BYTES_MAX);
        if length == 0 {
            return Ok(0);
        }
        self.ensure_room(length)?;
        let range = ByteRange::new(to_offset, length);
        let handles = self.before_change(to, &mut state, &[range])?;
        let copied = self.replicas().apply("copy", |id, b| {
            copy_all(b, (source.get(id)?, from_offset), (handles.get(id)?, to_offset), length)
        });
        self.mark_unsealed(to, &mut state, true, caller);
        if let Err(error) = copied {
            self.level(&handles, range)?;
            return Err(error);
        }
        Ok(length)
    }

    /// Handles of a file for reading and writing on every replica.
    fn writable(&self, node: &Node, state: &mut State) -> Result<Arc<Handles>> {
        self.open_state(node, state)?;
        self.open_handles(node, state, Access::ReadWrite)?;
        Ok(state.open.as_ref().and_then(|open| open.write.clone()).expect("opened above"))
    }

    /// Makes a file durable on every replica, together with its history.
    pub fn fsync(&self, node: &Arc<Node>, data_only: bool) -> Result<()> {
        let handles = {
            let state = self.lock(node);
            deferred_error(&state)?;
            match state.open.as_ref().and_then(|open| open.write.clone()) {
                None if state.orphan => None,
                // Who wrote it may have closed it without a sync: reading does not make it durable.
                None => {
                    let (dir, name) = self.location(node, &state)?;
                    let opened = self
                        .replicas()
                        .open("open", |id, b| b.open_file(dir.get(id)?, &name, Access::Read))?;
                    Some(Arc::new(Handles::from(opened)))
                }
                open => open,
            }
        };
        // All backings and the catalogs at once. If we die between, the catalog may know of
        // bytes that are not there yet, as after any crash: the file's intent tells to look.
        let syncing = handles.as_deref().map(|file| self.begin_sync_of(node.id, file, data_only));
        let recorded = self.barrier();
        syncing.map_or(Ok(()), Syncing::wait)?;
        recorded
    }
}

/// Links a file into `preserved/`. A leftover of the same content gives way.
pub(super) fn link_anew(
    b: &dyn Backing,
    (from, from_name): (&Handle, &EntryName),
    (to, to_name): (&Handle, &EntryName),
) -> std::io::Result<()> {
    match b.link(from, from_name, to, to_name) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            b.unlink(to, to_name)?;
            b.link(from, from_name, to, to_name)
        }
        other => other,
    }
}

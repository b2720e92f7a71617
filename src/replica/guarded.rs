//! A backing whose calls end in time, whatever its device does.
//!
//! A call on a dead disk or a silent server can hang for ever, in a state in which not even a signal
//! ends it, and with it would hang every lock that the caller holds. So each call is handed to a
//! worker thread of the replica, with arguments of its own, and the caller waits for so long at
//! most. After that the answer is `ETIMEDOUT`, which costs the replica its place, and the worker is
//! left alone with what it has; should the call return after all, its result is dropped.
//!
//! While a call is overdue no other is begun: each would only cost the same time again, and a thread
//! more. So also the last replica, which is never ejected, answers at once instead of hanging.
//!
//! What certainly does not touch the device (`*_at_hand`: attributes of an open file, pages and
//! names that are in the kernel's caches) is done by the caller itself.
//!
//! A sync takes as long as there is data to write. One that is overdue is waited for as long as the
//! device goes on writing, but no more than [`SYNC_PATIENCE`] times the timeout.
//!
//! Handles belong to one opening of a backing: those that were opened through another [`Guarded`]
//! count as not open here. A replica that comes back after it missed changes is opened anew, so that
//! nothing can be read through what was open before.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::backing::{
    Access, Backing, Creds, DirEntry, Handle, Keeper, RenameMode, Seek, SetTime, Space, Stat,
};
use crate::types::{EntryName, Kind, RelPath, Xattrs};
use workers::{Pending, Workers};

mod progress;
mod workers;

/// How long a call may take, unless the mount says otherwise.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How many times the timeout a sync may take on a device that goes on writing.
const SYNC_PATIENCE: u32 = 20;

/// A backing with worker threads.
pub struct Guarded {
    workers: Arc<Workers>,
    keeper: Arc<Keeper>,
    timeout: Duration,
}

impl Guarded {
    /// Guards `inner`: no call takes longer than `timeout`.
    pub fn new(inner: Box<dyn Backing>, timeout: Duration) -> Guarded {
        let keeper = Arc::<Keeper>::default();
        Guarded { workers: Arc::new(Workers::new(inner, keeper.clone())), keeper, timeout }
    }

    /// How many calls are overdue: they were given up, and have not returned. They may still change
    /// the backing when they do, so it must not be made equal to others before.
    pub fn overdue_count(&self) -> usize {
        self.workers.overdue_count()
    }

    /// Begins to make an object durable; the rest is [`Syncing::wait`].
    pub fn begin_sync(&self, object: &Handle, data_only: bool) -> io::Result<Syncing> {
        object.check(&self.keeper)?;
        let object = object.clone();
        Ok(self.syncing(move |inner| inner.sync(&object, data_only)))
    }

    /// Begins to make all of the backing's filesystem durable.
    pub fn begin_sync_all(&self) -> Syncing {
        self.syncing(|inner| inner.sync_all())
    }

    /// Begins to write all of `data`.
    pub fn begin_write(&self, file: &Handle, data: &Arc<[u8]>, offset: u64) -> io::Result<Writing> {
        file.check(&self.keeper)?;
        let (file, data) = (file.clone(), data.clone());
        let pending = self.workers.begin(move |inner| inner.write_at(&file, &data, offset));
        Ok(Writing { pending, timeout: self.timeout })
    }

    fn syncing(
        &self,
        call: impl FnOnce(&dyn Backing) -> io::Result<()> + Send + 'static,
    ) -> Syncing {
        let pending = self.workers.begin(call);
        Syncing { pending, workers: self.workers.clone(), timeout: self.timeout }
    }

    /// Hands a call to a worker and waits for its answer.
    fn call<T: Answer>(
        &self,
        call: impl FnOnce(&dyn Backing) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let answer = self.workers.begin(call).wait(self.timeout)?;
        Ok(answer.kept_by(&self.keeper))
    }
}

/// A sync that is under way.
#[must_use]
pub struct Syncing {
    pending: Pending<()>,
    workers: Arc<Workers>,
    timeout: Duration,
}

impl Syncing {
    /// Waits for its end.
    pub fn wait(self) -> io::Result<()> {
        let mut watch = progress::Watch::new(self.workers.inner());
        self.pending.wait_while(self.timeout, SYNC_PATIENCE, || watch.has_moved())
    }
}

/// A write that is under way.
#[must_use]
pub struct Writing {
    pending: Pending<()>,
    timeout: Duration,
}

impl Writing {
    /// Waits for its end.
    pub fn wait(self) -> io::Result<()> {
        self.pending.wait(self.timeout)
    }
}

/// An argument that a call takes by reference.
trait Argument {
    /// Fails for a handle of another opening.
    fn check(&self, _keeper: &Arc<Keeper>) -> io::Result<()> {
        Ok(())
    }
}

impl Argument for Handle {
    fn check(&self, keeper: &Arc<Keeper>) -> io::Result<()> {
        if self.is_of(keeper) { Ok(()) } else { Err(super::handles::not_open()) }
    }
}

impl Argument for EntryName {}
impl Argument for RelPath {}
impl Argument for OsStr {}
impl Argument for [u8] {}

/// What a call gives: handles among it belong to this opening.
trait Answer: Send + Sized + 'static {
    fn kept_by(self, _keeper: &Arc<Keeper>) -> Self {
        self
    }
}

impl Answer for Handle {
    fn kept_by(self, keeper: &Arc<Keeper>) -> Handle {
        Handle::kept_by(self, keeper)
    }
}

impl Answer for () {}
impl Answer for u64 {}
impl Answer for Stat {}
impl Answer for Space {}
impl Answer for Xattrs {}
impl Answer for Vec<u8> {}
impl Answer for Vec<DirEntry> {}
impl Answer for (Vec<u8>, usize) {}

/// Methods whose arguments are first the borrowed ones, which are copied for the worker, then the
/// plain ones.
macro_rules! hand_over {
    ($(
        fn $op:ident(&self $(, $lent:ident: &$type:ty)* $(; $($plain:ident: $copy:ty),*)?)
            -> $answer:ty;
    )*) => {
        $(fn $op(&self $(, $lent: &$type)* $($(, $plain: $copy)*)?) -> io::Result<$answer> {
            $($lent.check(&self.keeper)?;)*
            $(let $lent = $lent.to_owned();)*
            self.call(move |inner| inner.$op($(&$lent,)* $($($plain),*)?))
        })*
    };
}

impl Backing for Guarded {
    hand_over! {
        fn open_file(&self, dir: &Handle, name: &EntryName; access: Access) -> Handle;
        fn create(&self, dir: &Handle, name: &EntryName; mode: u32, by: Creds) -> Handle;
        fn mkdir(&self, dir: &Handle, name: &EntryName; mode: u32, by: Creds) -> ();
        fn mknod(
            &self, dir: &Handle, name: &EntryName; kind: Kind, mode: u32, rdev: u64, by: Creds
        ) -> ();
        fn symlink(&self, dir: &Handle, name: &EntryName, target: &[u8]; by: Creds) -> ();
        fn link(
            &self, from: &Handle, from_name: &EntryName, to: &Handle, to_name: &EntryName
        ) -> ();
        fn rename(
            &self, from: &Handle, from_name: &EntryName, to: &Handle, to_name: &EntryName;
            mode: RenameMode
        ) -> ();
        fn unlink(&self, dir: &Handle, name: &EntryName) -> ();
        fn rmdir(&self, dir: &Handle, name: &EntryName) -> ();
        fn list(&self, dir: &Handle) -> Vec<DirEntry>;
        fn stat_at(&self, dir: &Handle, name: &EntryName) -> Stat;
        fn readlink(&self, object: &Handle) -> Vec<u8>;
        fn chmod(&self, object: &Handle; mode: u32) -> ();
        fn chown(&self, object: &Handle; uid: Option<u32>, gid: Option<u32>) -> ();
        fn set_times(&self, object: &Handle; atime: SetTime, mtime: SetTime) -> ();
        fn get_xattr(&self, object: &Handle, name: &OsStr) -> Vec<u8>;
        fn set_xattr(&self, object: &Handle, name: &OsStr, value: &[u8]; flags: i32) -> ();
        fn remove_xattr(&self, object: &Handle, name: &OsStr) -> ();
        fn xattrs(&self, object: &Handle) -> Xattrs;
        fn write_at(&self, file: &Handle, data: &[u8]; offset: u64) -> ();
        fn truncate(&self, file: &Handle; size: u64) -> ();
        fn fallocate(&self, file: &Handle; mode: u32, offset: u64, length: u64) -> ();
        fn seek(&self, file: &Handle; offset: u64, to: Seek) -> u64;
        fn clone_file(&self, from: &Handle, to: &Handle) -> ();
        fn space(&self) -> Space;
    }

    fn open_dir(&self, path: &RelPath) -> io::Result<Handle> {
        if let Some(answer) = self.workers.inner().open_dir_at_hand(path) {
            return Ok(answer?.kept_by(&self.keeper));
        }
        let path = path.clone();
        self.call(move |inner| inner.open_dir(&path))
    }

    fn open_node(&self, dir: &Handle, name: &EntryName) -> io::Result<Handle> {
        dir.check(&self.keeper)?;
        if let Some(answer) = self.workers.inner().open_node_at_hand(dir, name) {
            return Ok(answer?.kept_by(&self.keeper));
        }
        let (dir, name) = (dir.clone(), name.clone());
        self.call(move |inner| inner.open_node(&dir, &name))
    }

    fn stat(&self, object: &Handle) -> io::Result<Stat> {
        object.check(&self.keeper)?;
        if let Some(answer) = self.workers.inner().stat_at_hand(object) {
            return answer;
        }
        let object = object.clone();
        self.call(move |inner| inner.stat(&object))
    }

    fn read_at(&self, file: &Handle, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        file.check(&self.keeper)?;
        if let Some(count) = self.workers.inner().read_at_hand(file, buffer, offset) {
            return Ok(count);
        }
        let (file, mut own) = (file.clone(), vec![0; buffer.len()]);
        let (own, count) = self.call(move |inner| {
            let count = inner.read_at(&file, &mut own, offset)?;
            Ok((own, count))
        })?;
        buffer[..count].copy_from_slice(&own[..count]);
        Ok(count)
    }

    fn copy_range(
        &self,
        from: &Handle,
        from_offset: u64,
        to: &Handle,
        to_offset: u64,
        length: u64,
    ) -> io::Result<u64> {
        from.check(&self.keeper)?;
        to.check(&self.keeper)?;
        let (from, to) = (from.clone(), to.clone());
        self.call(move |inner| inner.copy_range(&from, from_offset, &to, to_offset, length))
    }

    fn sync(&self, object: &Handle, data_only: bool) -> io::Result<()> {
        self.begin_sync(object, data_only)?.wait()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.begin_sync_all().wait()
    }
}

#[cfg(test)]
mod tests;

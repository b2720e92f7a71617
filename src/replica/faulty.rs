//! A backing whose calls fail, fall short, take long or lie as a plan says. For tests only: it is
//! the way to see what a dying disk would do to us.

use std::ffi::OsStr;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::backing::{
    Access, Backing, Creds, DirEntry, Handle, RenameMode, Seek, SetTime, Space, Stat,
};
use crate::types::{EntryName, Kind, RelPath, Xattrs};

/// A call about to be made on the backing.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The method's name.
    pub op: &'static str,
    /// The entry it is about, where it has one; of two, the first.
    pub name: Option<&'a EntryName>,
    /// Where it transfers data to or from, in bytes; 0 for other calls.
    pub offset: u64,
    /// How much data it transfers, in bytes; 0 for other calls.
    pub len: u64,
}

/// What happens to a call instead of what should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// It fails and does nothing.
    Error(Errno),
    /// A `write_at` writes so many bytes and then fails; any other call fails.
    ShortWrite(usize, Errno),
    /// It is done after a while.
    Delay(Duration),
    /// A `write_at` writes so many bytes, and says that it wrote all: a torn write. Any other call
    /// is done.
    Torn(usize),
    /// A `write_at`, `sync` or `sync_all` does nothing, and says that it was done: a dropped write.
    /// Any other call is done.
    Dropped,
}

/// Decides about every call; `None` lets it pass.
pub type Plan = Arc<dyn Fn(Call<'_>) -> Option<Injected> + Send + Sync>;

/// A backing that follows a [`Plan`].
pub struct Faulty {
    inner: Box<dyn Backing>,
    plan: Plan,
    looked_ahead_on: bool,
}

impl Faulty {
    /// Wraps `inner`.
    pub fn new(inner: Box<dyn Backing>, plan: Plan) -> Faulty {
        Faulty { inner, plan, looked_ahead_on: false }
    }

    /// The same; calls that nobody waits for are made on it as well. Where every call is counted
    /// that would be in the way.
    pub fn looked_ahead_on(mut self) -> Faulty {
        self.looked_ahead_on = true;
        self
    }

    fn decide(&self, call: Call<'_>) -> io::Result<()> {
        match (self.plan)(call) {
            None => Ok(()),
            Some(Injected::Error(errno) | Injected::ShortWrite(_, errno)) => Err(errno.into()),
            Some(Injected::Delay(time)) => {
                std::thread::sleep(time);
                Ok(())
            }
            Some(Injected::Torn(_) | Injected::Dropped) => Ok(()),
        }
    }
}

impl Faulty {
    fn synced(&self, op: &'static str, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match (self.plan)(Call { op, name: None, offset: 0, len: 0 }) {
            Some(Injected::Dropped) => return Ok(()),
            Some(Injected::Error(errno) | Injected::ShortWrite(_, errno)) => {
                return Err(errno.into());
            }
            Some(Injected::Delay(time)) => std::thread::sleep(time),
            Some(Injected::Torn(_)) | None => {}
        }
        sync()
    }
}

/// Forwards methods; each may say which argument is its entry name, its offset and its length.
macro_rules! forward {
    ($(
        fn $op:ident(&self $(, $arg:ident: $type:ty)*) -> $answer:ty
        $([name $name:ident])? $([at $offset:expr, $len:expr])?;
    )*) => {
        $(fn $op(&self $(, $arg: $type)*) -> io::Result<$answer> {
            #[allow(unused_mut)]
            let mut call = Call { op: stringify!($op), name: None, offset: 0, len: 0 };
            $(call.name = Some($name);)?
            $((call.offset, call.len) = ($offset, $len);)?
            self.decide(call)?;
            self.inner.$op($($arg),*)
        })*
    };
}

impl Backing for Faulty {
    forward! {
        fn open_dir(&self, path: &RelPath) -> Handle;
        fn open_node(&self, dir: &Handle, name: &EntryName) -> Handle [name name];
        fn open_file(&self, dir: &Handle, name: &EntryName, access: Access) -> Handle [name name];
        fn create(&self, dir: &Handle, name: &EntryName, mode: u32, by: Creds) -> Handle
            [name name];
        fn mkdir(&self, dir: &Handle, name: &EntryName, mode: u32, by: Creds) -> () [name name];
        fn mknod(
            &self, dir: &Handle, name: &EntryName, kind: Kind, mode: u32, rdev: u64, by: Creds
        ) -> () [name name];
        fn symlink(&self, dir: &Handle, name: &EntryName, target: &[u8], by: Creds) -> ()
            [name name];
        fn link(
            &self, from: &Handle, from_name: &EntryName, to: &Handle, to_name: &EntryName
        ) -> () [name from_name];
        fn rename(
            &self, from: &Handle, from_name: &EntryName, to: &Handle, to_name: &EntryName,
            mode: RenameMode
        ) -> () [name from_name];
        fn unlink(&self, dir: &Handle, name: &EntryName) -> () [name name];
        fn rmdir(&self, dir: &Handle, name: &EntryName) -> () [name name];
        fn list(&self, dir: &Handle) -> Vec<DirEntry>;
        fn stat(&self, object: &Handle) -> Stat;
        fn stat_at(&self, dir: &Handle, name: &EntryName) -> Stat [name name];
        fn readlink(&self, object: &Handle) -> Vec<u8>;
        fn chmod(&self, object: &Handle, mode: u32) -> ();
        fn chown(&self, object: &Handle, uid: Option<u32>, gid: Option<u32>) -> ();
        fn set_times(&self, object: &Handle, atime: SetTime, mtime: SetTime) -> ();
        fn get_xattr(&self, object: &Handle, name: &OsStr) -> Vec<u8>;
        fn set_xattr(&self, object: &Handle, name: &OsStr, value: &[u8], flags: i32) -> ();
        fn remove_xattr(&self, object: &Handle, name: &OsStr) -> ();
        fn xattrs(&self, object: &Handle) -> Xattrs;
        fn read_at(&self, file: &Handle, buffer: &mut [u8], offset: u64) -> usize
            [at offset, buffer.len() as u64];
        fn truncate(&self, file: &Handle, size: u64) -> () [at size, 0];
        fn fallocate(&self, file: &Handle, mode: u32, offset: u64, length: u64) -> ()
            [at offset, length];
        fn seek(&self, file: &Handle, offset: u64, to: Seek) -> u64 [at offset, 0];
        fn copy_range(
            &self, from: &Handle, from_offset: u64, to: &Handle, to_offset: u64, length: u64
        ) -> u64 [at to_offset, length];
        fn clone_file(&self, from: &Handle, to: &Handle) -> ();
        fn is_fragmented(&self, file: &Handle, most: u32) -> bool;
        fn space(&self) -> Space;
    }

    fn orders_names(&self) -> bool {
        self.inner.orders_names()
    }

    fn is_gone(&self) -> bool {
        self.inner.is_gone()
    }

    fn forget_cached(&self, file: &Handle) {
        let _ = self.decide(Call { op: "forget_cached", name: None, offset: 0, len: 0 });
        self.inner.forget_cached(file);
    }

    fn knows_what_is_at_hand(&self) -> bool {
        self.looked_ahead_on
    }

    fn will_need(&self, file: &Handle, ranges: &[(u64, NonZeroU64)]) {
        let _ = self.decide(Call { op: "will_need", name: None, offset: 0, len: 0 });
        self.inner.will_need(file, ranges);
    }

    fn path_of(&self, object: &Handle) -> Option<RelPath> {
        self.inner.path_of(object)
    }

    fn write_at(&self, file: &Handle, data: &[u8], offset: u64) -> io::Result<()> {
        let call = Call { op: "write_at", name: None, offset, len: data.len() as u64 };
        match (self.plan)(call) {
            None => {}
            Some(Injected::Error(errno)) => return Err(errno.into()),
            Some(Injected::ShortWrite(count, errno)) => {
                self.inner.write_at(file, &data[..count.min(data.len())], offset)?;
                return Err(errno.into());
            }
            Some(Injected::Torn(count)) => {
                return self.inner.write_at(file, &data[..count.min(data.len())], offset);
            }
            Some(Injected::Dropped) => return Ok(()),
            Some(Injected::Delay(time)) => std::thread::sleep(time),
        }
        self.inner.write_at(file, data, offset)
    }

    fn sync(&self, object: &Handle, data_only: bool) -> io::Result<()> {
        self.synced("sync", || self.inner.sync(object, data_only))
    }

    fn sync_all(&self) -> io::Result<()> {
        self.synced("sync_all", || self.inner.sync_all())
    }
}

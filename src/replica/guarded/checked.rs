//! The calls as a worker makes them: only with handles of this opening of the backing, and with a
//! note of what failed on what.

use std::ffi::OsStr;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;

use rustix::io::Errno;

use super::failures::Failures;
use super::methods;
use crate::replica::backing::{
    Access, Backing, Creds, DirEntry, Handle, Keeper, RenameMode, Seek, SetTime, Space, Stat,
};
use crate::replica::handles::not_open;
use crate::sys::device::Device;
use crate::types::{EntryName, Kind, RelPath, Xattrs};

/// One opening of a backing.
pub(in crate::replica) struct Checked {
    inner: Box<dyn Backing>,
    pub(super) keeper: Arc<Keeper>,
    pub(super) failures: Failures,
}

impl Checked {
    pub(super) fn new(inner: Box<dyn Backing>) -> Checked {
        Checked { inner, keeper: Arc::default(), failures: Failures::default() }
    }

    /// Looks at a name for nobody: if that fails it is nobody's fault.
    pub(super) fn glance(&self, dir: &Handle, name: &EntryName) {
        if dir.check(&self.keeper).is_ok() {
            let _ = self.inner.stat_at(dir, name);
        }
    }

    /// Notes a failed call.
    pub(super) fn note(&self, op: &'static str, on: On<'_>, error: &io::Error) {
        self.failures.note(&*self.inner, op, on, error);
    }

    fn judged<T: Answer>(
        &self,
        op: &'static str,
        on: On<'_>,
        answer: io::Result<T>,
    ) -> io::Result<T> {
        match answer {
            Ok(answer) => Ok(answer.kept_by(&self.keeper)),
            Err(error) => {
                let lost = error.kind() == io::ErrorKind::NotFound && self.inner.is_gone();
                let error = if lost { Errno::STALE.into() } else { error };
                self.note(op, on, &error);
                Err(error)
            }
        }
    }
}

/// What a call is about, where it tells: an open object, and a name in it.
pub(super) type On<'a> = (Option<&'a Handle>, Option<&'a EntryName>);

/// An argument that a call takes by reference.
pub(super) trait Argument {
    /// Fails for a handle of another opening.
    fn check(&self, _keeper: &Arc<Keeper>) -> io::Result<()> {
        Ok(())
    }

    fn handle(&self) -> Option<&Handle> {
        None
    }

    fn name(&self) -> Option<&EntryName> {
        None
    }
}

impl Argument for Handle {
    fn check(&self, keeper: &Arc<Keeper>) -> io::Result<()> {
        if self.is_of(keeper) { Ok(()) } else { Err(not_open()) }
    }

    fn handle(&self) -> Option<&Handle> {
        Some(self)
    }
}

impl Argument for EntryName {
    fn name(&self) -> Option<&EntryName> {
        Some(self)
    }
}

impl Argument for RelPath {}
impl Argument for OsStr {}
impl Argument for [u8] {}

/// What a call gives: handles among it belong to this opening.
trait Answer: Sized {
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
impl Answer for bool {}
impl Answer for u64 {}
impl Answer for usize {}
impl Answer for Stat {}
impl Answer for Space {}
impl Answer for Xattrs {}
impl Answer for Vec<u8> {}
impl Answer for Vec<DirEntry> {}

macro_rules! check {
    ($(
        fn $op:ident(&self $(, $lent:ident: &$type:ty)* $(; $($plain:ident: $copy:ty),*)?)
            -> $answer:ty;
    )*) => {
        $(fn $op(&self $(, $lent: &$type)* $($(, $plain: $copy)*)?) -> io::Result<$answer> {
            $($lent.check(&self.keeper)?;)*
            let on: On<'_> = (None$(.or($lent.handle()))*, None$(.or($lent.name()))*);
            self.judged(stringify!($op), on, self.inner.$op($($lent,)* $($($plain),*)?))
        })*
    };
}

impl Backing for Checked {
    methods! { check }

    fn read_at(&self, file: &Handle, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        file.check(&self.keeper)?;
        self.judged("read_at", (Some(file), None), self.inner.read_at(file, buffer, offset))
    }

    fn forget_cached(&self, file: &Handle) {
        if file.check(&self.keeper).is_ok() {
            self.inner.forget_cached(file);
        }
    }

    fn will_need(&self, file: &Handle, ranges: &[(u64, NonZeroU64)]) {
        if file.check(&self.keeper).is_ok() {
            self.inner.will_need(file, ranges);
        }
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
        let copied = self.inner.copy_range(from, from_offset, to, to_offset, length);
        self.judged("copy_range", (Some(to), None), copied)
    }

    fn sync(&self, object: &Handle, data_only: bool) -> io::Result<()> {
        object.check(&self.keeper)?;
        self.judged("sync", (Some(object), None), self.inner.sync(object, data_only))
    }

    fn sync_all(&self) -> io::Result<()> {
        self.judged("sync_all", (None, None), self.inner.sync_all())
    }

    fn orders_names(&self) -> bool {
        self.inner.orders_names()
    }

    fn device(&self) -> Option<Device> {
        self.inner.device()
    }

    fn path_of(&self, object: &Handle) -> Option<RelPath> {
        self.inner.path_of(object)
    }

    fn open_dir_at_hand(&self, path: &RelPath) -> Option<io::Result<Handle>> {
        Some(self.inner.open_dir_at_hand(path)?.map(|dir| dir.kept_by(&self.keeper)))
    }

    fn open_node_at_hand(&self, dir: &Handle, name: &EntryName) -> Option<io::Result<Handle>> {
        dir.check(&self.keeper).ok()?;
        Some(self.inner.open_node_at_hand(dir, name)?.map(|node| node.kept_by(&self.keeper)))
    }

    fn stat_at_hand(&self, object: &Handle) -> Option<io::Result<Stat>> {
        object.check(&self.keeper).ok()?;
        self.inner.stat_at_hand(object)
    }

    fn knows_what_is_at_hand(&self) -> bool {
        self.inner.knows_what_is_at_hand()
    }

    fn stat_name_at_hand(&self, dir: &Handle, name: &EntryName) -> Option<io::Result<Stat>> {
        dir.check(&self.keeper).ok()?;
        self.inner.stat_name_at_hand(dir, name)
    }

    fn read_at_hand(&self, file: &Handle, buffer: &mut [u8], offset: u64) -> Option<usize> {
        file.check(&self.keeper).ok()?;
        self.inner.read_at_hand(file, buffer, offset)
    }
}

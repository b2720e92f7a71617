//! A backing whose calls end in time, whatever its device does.
//!
//! A call on a dead disk or a silent server can hang for ever, in a state in which not even a
//! signal ends it, and with it would hang every lock that the caller holds. So each call is handed
//! to a worker thread of the replica, with arguments of its own, and the caller waits for so long
//! at most. After that the answer is `ETIMEDOUT`, which costs the replica its place, and the
//! worker is left alone with what it has; should the call return after all, its result is dropped.
//!
//! While a call is overdue no other is begun: each would only cost the same time again, and one
//! more thread. So also the last replica, which is never ejected, answers at once.
//!
//! Handing over costs two switches between threads, some 5 µs where one processor does both, and
//! ten times that where an idle one is woken. Paid for every call on every replica it was 17 times
//! for each small file of an untar, and `rm -r` took about twice as long. So an operation goes over
//! once as a whole (`relay`), many looks together ([`Guarded::batch`]), calls one by one only where
//! they are rare, and whoever waits stays awake for a moment (`flag`).
//!
//! Whoever nobody waits for may make its calls itself ([`Directly`]): those are given up by whoever
//! looks after it ([`Guarded::give_up`]).
//!
//! What certainly does not touch the device (`*_at_hand`: attributes of an open file, pages and
//! names that are in the kernel's caches) is done by the caller itself.
//!
//! A sync takes as long as there is data to write. One that is overdue is waited for as long as
//! the device goes on writing, but no more than [`TURNS`] times the timeout.
//!
//! Handles belong to one opening of a backing: those that were opened through another [`Guarded`]
//! count as not open here. A replica that comes back after it missed changes is opened anew, so
//! that nothing can be read through what was open before.

use std::ffi::OsStr;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::backing::{
    Access, Backing, Creds, DirEntry, Handle, RenameMode, Seek, SetTime, Space, Stat,
};
use super::health::Fault;
use super::together::{Piece, write_pieces};
use crate::sys::device::{Alive, SOON, Signs, TURNS, Watch};
use crate::types::{EntryName, Kind, RelPath, Xattrs};
use checked::{Argument, Checked, On};
use workers::{Pending, Workers};

mod checked;
mod directly;
mod failures;
mod flag;
mod relay;
mod workers;

pub use directly::Directly;
pub(super) use relay::relay;

/// How long a call may take, unless the mount says otherwise.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// How many workers look at what nobody waits for at most. If the device hangs, so do they.
const AHEAD_MAX: usize = 4;
/// How long one of them looks.
const AHEAD_TIME: Duration = Duration::from_secs(2);

/// A backing with worker threads.
pub struct Guarded {
    workers: Arc<Workers>,
    timeout_ms: AtomicU64,
    /// How many workers look at what nobody waits for.
    ahead: Arc<AtomicUsize>,
}

impl Guarded {
    /// Guards `inner`: no call takes longer than `timeout`.
    pub fn new(inner: Box<dyn Backing>, timeout: Duration) -> Guarded {
        let guarded = Guarded {
            workers: Arc::new(Workers::new(Checked::new(inner))),
            timeout_ms: AtomicU64::new(0),
            ahead: Arc::default(),
        };
        guarded.set_timeout(timeout);
        guarded
    }

    /// Gives every call so long from now on.
    pub fn set_timeout(&self, timeout: Duration) {
        let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.timeout_ms.store(millis, Ordering::Relaxed);
    }

    /// How long every call has.
    pub fn timeout(&self) -> Duration {
        Duration::from_millis(self.timeout_ms.load(Ordering::Relaxed))
    }

    /// How many calls are overdue: they were given up, and have not returned. They may still change
    /// the backing when they do, so it must not be made equal to others before.
    pub fn overdue_count(&self) -> usize {
        self.workers.overdue_count()
    }

    /// The calls that failed by the backing's fault, the oldest first.
    pub fn failures(&self) -> Vec<Fault> {
        self.workers.inner().failures.all()
    }

    /// The last of them.
    pub fn last_failure(&self) -> Option<Fault> {
        self.workers.inner().failures.last()
    }

    /// Closes what was dropped and not closed yet.
    pub fn close_left(&self) -> io::Result<()> {
        let shared = self.workers.shared().clone();
        self.call("close", (None, None), move |_| {
            shared.close_left();
            Ok(())
        })
    }

    /// Begins to make an object durable; the rest is [`UnderWay::wait`].
    pub fn begin_sync(&self, object: &Handle, data_only: bool) -> UnderWay {
        let own = object.clone();
        let call = move |inner: &dyn Backing| inner.sync(&own, data_only);
        self.begin("sync", Some(object), TURNS, call)
    }

    /// Begins to make all of the backing's filesystem durable.
    pub fn begin_sync_all(&self) -> UnderWay {
        self.begin("sync_all", None, TURNS, |inner| inner.sync_all())
    }

    /// Begins to write all pieces in their order.
    pub fn begin_write(&self, file: &Handle, pieces: &Arc<[Piece]>) -> UnderWay {
        let (own, pieces) = (file.clone(), pieces.clone());
        let call = move |inner: &dyn Backing| write_pieces(inner, &own, &pieces);
        self.begin("write_at", Some(file), 1, call)
    }

    fn begin(
        &self,
        op: &'static str,
        subject: Option<&Handle>,
        patience: u32,
        call: impl FnOnce(&dyn Backing) -> io::Result<()> + Send + 'static,
    ) -> UnderWay {
        UnderWay {
            op,
            subject: subject.cloned(),
            pending: self.workers.begin(call),
            workers: self.workers.clone(),
            timeout: self.timeout(),
            patience,
        }
    }

    /// Does something else that touches the backing's device. A worker does it, as if it were one
    /// call, and that goes on for as long as the device works on it.
    pub fn within<T: Send + 'static>(
        &self,
        op: &'static str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        self.within_alive(op, |_| work())
    }

    /// Likewise, and for as long as it shows that it goes on.
    pub fn within_alive<T: Send + 'static>(
        &self,
        op: &'static str,
        work: impl FnOnce(&Alive) -> T + Send + 'static,
    ) -> io::Result<T> {
        self.in_time(op, |_, alive| Ok(work(alive)))
    }

    /// Does something else that touches the backing's device, in the caller's own thread, which may
    /// hang ([`Directly`]). It is told how to show that it goes on, and need not while the device
    /// works.
    pub fn directly<T>(
        &self,
        op: &'static str,
        work: impl FnOnce(&dyn Fn()) -> T,
    ) -> io::Result<T> {
        let device = self.workers.inner().device();
        self.workers.on_record(op, Some(device), |alive| Ok(work(alive)))
    }

    /// Whether a call hangs that a thread makes itself ([`Directly`]).
    pub fn hangs(&self) -> bool {
        self.workers.shared().own_calls.hangs(self.timeout())
    }

    /// Gives up such calls; whether there were any.
    pub fn give_up(&self) -> bool {
        let shared = self.workers.shared();
        let hung = shared.own_calls.give_up(self.timeout(), || shared.gave_up());
        for op in &hung {
            note_timeout(&self.workers, op, (None, None), &Errno::TIMEDOUT.into());
        }
        !hung.is_empty()
    }

    /// Has one worker make many calls, which show together that they go on.
    pub fn batch<T: Send + 'static>(
        &self,
        op: &'static str,
        calls: impl FnOnce(&dyn Backing, &dyn Fn()) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if directly::is_on() {
            let shared = self.workers.shared();
            let make = |alive: &dyn Fn()| shared.run(|inner| calls(inner, alive));
            return self.workers.on_record(op, None, make);
        }
        self.in_time(op, |inner, alive| calls(inner, &|| alive.tell()))
    }

    /// Whether it can tell that something is not at hand: for some filesystems nothing ever is.
    pub fn knows_what_is_at_hand(&self) -> bool {
        self.workers.inner().knows_what_is_at_hand()
    }

    /// Has a worker look at these names in a directory, for nobody: so that their attributes are in
    /// memory. Whether one does: not if enough of them are at such things.
    pub fn look_ahead(&self, dir: &Handle, names: Vec<EntryName>) -> bool {
        let shared = self.workers.shared().clone();
        let busy = self.ahead.clone();
        let free = |busy| (busy < AHEAD_MAX).then_some(busy + 1);
        let (set, fetch) = (Ordering::AcqRel, Ordering::Acquire);
        if shared.overdue_count() > 0 || busy.fetch_update(set, fetch, free).is_err() {
            return false;
        }
        let dir = dir.clone();
        let job = Box::new(move |done: &dyn Fn()| {
            let begun = Instant::now();
            let _ = shared.run(|_| {
                let in_time = names.iter().take_while(|_| begun.elapsed() < AHEAD_TIME);
                in_time.for_each(|name| shared.inner.glance(&dir, name));
                Ok(())
            });
            drop(dir);
            busy.fetch_sub(1, Ordering::AcqRel);
            done();
        });
        let given = self.workers.give(job).is_ok();
        if !given {
            self.ahead.fetch_sub(1, Ordering::AcqRel);
        }
        given
    }

    /// Has a worker do something that is waited for as long as it, or the device, goes on.
    fn in_time<T: Send + 'static>(
        &self,
        op: &'static str,
        work: impl FnOnce(&dyn Backing, &Alive) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let alive = Alive::default();
        let (own, shown) = (alive.clone(), alive.clone());
        let pending = self.workers.begin(move |inner| work(inner, &own));
        let mut signs =
            (!pending.ends_within(SOON)).then(|| Signs::new(self.workers.inner().device(), shown));
        let goes_on = || signs.as_mut().is_some_and(Signs::goes_on);
        let answer = pending.wait_while(self.timeout(), u32::MAX, goes_on);
        // Should it return after all, it does nothing more on a disk that others may use by then.
        alive.end();
        answer.inspect_err(|error| note_timeout(&self.workers, op, (None, None), error))
    }

    /// Has one worker make all the calls of an operation.
    pub(super) fn whole<T: Send + 'static>(
        &self,
        op: &'static str,
        operation: impl FnOnce(&dyn Backing) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.call(op, (None, None), operation)
    }

    /// Hands a call to a worker and waits for its answer.
    fn call<T: Send + 'static>(
        &self,
        op: &'static str,
        on: On<'_>,
        call: impl FnOnce(&dyn Backing) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        if directly::is_on() {
            return self.workers.make(op, call);
        }
        let answer = self.workers.begin(call).wait(self.timeout());
        answer.inspect_err(|error| note_timeout(&self.workers, op, on, error))
    }
}

/// What the worker itself cannot note, who is still at it.
fn note_timeout(workers: &Workers, op: &'static str, on: On<'_>, error: &io::Error) {
    if error.raw_os_error() == Some(Errno::TIMEDOUT.raw_os_error()) {
        workers.inner().note(op, on, error);
    }
}

/// A call that is under way.
#[must_use]
pub struct UnderWay {
    op: &'static str,
    subject: Option<Handle>,
    pending: Pending<()>,
    workers: Arc<Workers>,
    timeout: Duration,
    patience: u32,
}

impl UnderWay {
    /// Waits for its end.
    pub fn wait(self) -> io::Result<()> {
        let mut watch =
            (!self.pending.ends_within(SOON)).then(|| Watch::new(self.workers.inner().device()));
        let moving = || watch.as_mut().is_some_and(Watch::has_moved);
        let answer = self.pending.wait_while(self.timeout, self.patience, moving);
        let on = (self.subject.as_ref(), None);
        answer.inspect_err(|error| note_timeout(&self.workers, self.op, on, error))
    }
}

/// The methods of [`Backing`] that are forwarded alike, with their borrowed arguments first.
macro_rules! methods {
    ($forward:ident) => {
        $forward! {
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
            fn open_dir(&self, path: &RelPath) -> Handle;
            fn open_node(&self, dir: &Handle, name: &EntryName) -> Handle;
            fn stat(&self, object: &Handle) -> Stat;
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
            fn is_fragmented(&self, file: &Handle; most: u32) -> bool;
            fn space(&self) -> Space;
        }
    };
}
use methods;

/// What is at hand is answered by the caller; all else goes to a worker, with arguments of its own.
macro_rules! hand_over {
    ($(
        fn $op:ident(&self $(, $lent:ident: &$type:ty)* $(; $($plain:ident: $copy:ty),*)?)
            -> $answer:ty;
    )*) => {
        $(fn $op(&self $(, $lent: &$type)* $($(, $plain: $copy)*)?) -> io::Result<$answer> {
            if let Some(answer) = at_hand!($op, self.workers.inner() $(, $lent)*) {
                return answer;
            }
            let on: On<'_> = (None$(.or($lent.handle()))*, None$(.or($lent.name()))*);
            $(let $lent = $lent.to_owned();)*
            let call = move |inner: &dyn Backing| inner.$op($(&$lent,)* $($($plain),*)?);
            self.call(stringify!($op), on, call)
        })*
    };
}

/// The answer at hand, of the methods that have one.
macro_rules! at_hand {
    (open_dir, $inner:expr, $path:ident) => {
        $inner.open_dir_at_hand($path)
    };
    (open_node, $inner:expr, $dir:ident, $name:ident) => {
        $inner.open_node_at_hand($dir, $name)
    };
    (stat, $inner:expr, $object:ident) => {
        $inner.stat_at_hand($object)
    };
    (stat_at, $inner:expr, $dir:ident, $name:ident) => {
        $inner.stat_name_at_hand($dir, $name)
    };
    ($other:ident, $($rest:tt)*) => {
        None
    };
}

impl Backing for Guarded {
    methods! { hand_over }

    fn orders_names(&self) -> bool {
        self.workers.inner().orders_names()
    }

    fn read_at(&self, file: &Handle, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        if let Some(count) = self.workers.inner().read_at_hand(file, buffer, offset) {
            return Ok(count);
        }
        let on = (Some(file), None);
        let (file, mut own) = (file.clone(), vec![0; buffer.len()]);
        let (own, count) = self.call("read_at", on, move |inner| {
            let count = inner.read_at(&file, &mut own, offset)?;
            Ok((own, count))
        })?;
        buffer[..count].copy_from_slice(&own[..count]);
        Ok(count)
    }

    fn stat_name_at_hand(&self, dir: &Handle, name: &EntryName) -> Option<io::Result<Stat>> {
        self.workers.inner().stat_name_at_hand(dir, name)
    }

    fn forget_cached(&self, file: &Handle) {
        let file = file.clone();
        // Where that hangs, so does what is read next.
        let _ = self.call("forget_cached", (None, None), move |inner| {
            inner.forget_cached(&file);
            Ok(())
        });
    }

    fn will_need(&self, file: &Handle, ranges: &[(u64, NonZeroU64)]) {
        let (file, ranges) = (file.clone(), ranges.to_vec());
        let _ = self.call("will_need", (None, None), move |inner| {
            inner.will_need(&file, &ranges);
            Ok(())
        });
    }

    fn copy_range(
        &self,
        from: &Handle,
        from_offset: u64,
        to: &Handle,
        to_offset: u64,
        length: u64,
    ) -> io::Result<u64> {
        let on = (Some(to), None);
        let (from, to) = (from.clone(), to.clone());
        let call =
            move |inner: &dyn Backing| inner.copy_range(&from, from_offset, &to, to_offset, length);
        self.call("copy_range", on, call)
    }

    fn sync(&self, object: &Handle, data_only: bool) -> io::Result<()> {
        self.begin_sync(object, data_only).wait()
    }

    fn sync_all(&self) -> io::Result<()> {
        self.begin_sync_all().wait()
    }
}

#[cfg(test)]
mod tests;

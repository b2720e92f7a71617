//! The replicas of a store and the rule by which their answers become one answer.
//!
//! Owns which replicas are online, the handles kept open on them, and their error counts. Promises
//! that a replica which missed a change is ejected before that change is acknowledged to anybody,
//! and that the last online replica is never ejected. Does not repair: that is resync's and
//! scrub's.
//!
//! **The rule** ([`ReplicaSet::apply`]). The first online replica, the primary, goes first. If it
//! gives a proper answer (`ENOENT`, `ENOSPC`), that is the answer, and no other is asked. If its
//! device fails, the next one takes its place. Once one has succeeded, the change has happened, and
//! every other must succeed as well or is ejected, whatever its error. If none succeeds, the error
//! is the answer and nobody is ejected.
//!
//! A write is the one operation that can fail in part: the answer `ENOSPC` may leave the primary
//! with some of its bytes. [`ReplicaSet::ensure_room`] before it makes that an exception; whoever
//! writes still has to level the replicas after a failed write.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, ReentrantMutex, RwLock};
use rustix::io::Errno;

use crate::error::Result;
use crate::types::{NodeId, REPLICAS_MAX, RelPath, ReplicaId, ReplicaMap, Timestamp};

use backing::{Backing, Handle, Space};
use guarded::{CALL_TIMEOUT, Guarded};
use handles::DirCache;
use health::{Meaning, Record, errno_of, is_out_of_files, meaning};
use room::Room;
use verdict::{Nature, Verdict};

pub mod backing;
mod buffer;
pub mod copy;
pub mod dir_backing;
pub mod faulty;
pub mod guarded;
pub mod handles;
pub mod health;
mod held;
pub mod intent;
mod room;
mod together;
mod verdict;

pub use buffer::Buffer;
pub use handles::{Handles, PrivateDir};
pub use health::{Fault, Health, State};
pub use room::Need;
pub use together::{Piece, SyncAll};

/// The unit in which [`ReplicaSet::space`] counts blocks, in bytes.
const SPACE_BLOCK_BYTES: u64 = 4096;

/// One backing and what identifies our copy in it.
pub struct Replica {
    /// Identifies the replica wherever it is mounted.
    pub uuid: uuid::Uuid,
    /// Its name for people.
    pub label: String,
    /// The backing directory.
    pub path: PathBuf,
    backing: Arc<Guarded>,
}

impl Replica {
    /// Takes an opened backing, whose calls are given [`CALL_TIMEOUT`].
    pub fn new(
        uuid: uuid::Uuid,
        label: impl Into<String>,
        path: impl Into<PathBuf>,
        backing: Box<dyn Backing>,
    ) -> Replica {
        Replica::sharing(uuid, label, path, Arc::new(Guarded::new(backing, CALL_TIMEOUT)))
    }

    /// Takes a backing that is guarded already, and also used by others.
    pub fn sharing(
        uuid: uuid::Uuid,
        label: impl Into<String>,
        path: impl Into<PathBuf>,
        backing: Arc<Guarded>,
    ) -> Replica {
        Replica { uuid, label: label.into(), path: path.into(), backing }
    }

    /// The first half of its uuid, by which the intent log tells replicas apart.
    pub fn short_id(&self) -> u64 {
        self.uuid.as_u64_pair().0
    }

    /// The backing, for work on this replica alone.
    pub fn backing(&self) -> &dyn Backing {
        &*self.backing
    }

    /// How many calls were given up on and have not returned: while there are any, they may still
    /// change the backing.
    pub fn overdue_count(&self) -> usize {
        self.backing.overdue_count()
    }

    /// The backing, for whoever looks after those who make their calls themselves.
    pub fn guard(&self) -> &Guarded {
        &self.backing
    }
}

/// What every replica that took part answered; at least one did.
#[derive(Debug)]
pub struct Answers<T>(ReplicaMap<Option<T>>);

impl<T> Answers<T> {
    /// The answer of the first replica that gave one.
    pub fn primary(mut self) -> T {
        let first = self.0.ids().find(|&id| self.0[id].is_some());
        first.and_then(|id| self.0[id].take()).expect("at least one replica answered")
    }

    /// All answers.
    pub fn iter(&self) -> impl Iterator<Item = (ReplicaId, &T)> {
        self.0.iter().filter_map(|(id, answer)| Some((id, answer.as_ref()?)))
    }

    /// The answers by replica; `None` for those that did not take part.
    pub fn into_map(self) -> ReplicaMap<Option<T>> {
        self.0
    }
}

impl From<Answers<Handle>> for Handles {
    fn from(opened: Answers<Handle>) -> Handles {
        Handles::new(opened.0)
    }
}

type FaultHook = Box<dyn Fn(ReplicaId, &Fault) + Send + Sync>;

/// All replicas of a store, in order of preference.
pub struct ReplicaSet {
    /// By id; a slot that was never filled is `None`.
    slots: RwLock<ReplicaMap<Option<Arc<Replica>>>>,
    records: ReplicaMap<Record>,
    /// Bit `n` is set while replica `n` belongs to the set, online or not.
    members: AtomicU8,
    /// Bit `n` is set while replica `n` is online.
    online: AtomicU8,
    /// Held while a replica is being ejected, hooks included. Innermost but for what the hooks
    /// take.
    ejecting: ReentrantMutex<()>,
    /// How many ejections are under way: see [`ReplicaSet::settle`].
    ejections: AtomicUsize,
    hooks: RwLock<Vec<FaultHook>>,
    /// See [`ReplicaSet::is_doubtful`].
    doubtful: AtomicBool,
    /// The fewest replicas in use with which anything is changed.
    required: AtomicUsize,
    /// How long calls may take, once that was said.
    timeout: Mutex<Option<Duration>>,
    dirs: Arc<DirCache>,
    room: Room,
    inodes: Room,
}

impl ReplicaSet {
    /// Takes the replicas in order of preference, all online.
    pub fn new(replicas: Vec<Replica>) -> ReplicaSet {
        let count = replicas.len();
        assert!(count <= REPLICAS_MAX, "a store has at most {REPLICAS_MAX} replicas");
        let mut replicas = replicas.into_iter();
        let mut present = 0;
        let slots = ReplicaMap::for_all(|id| {
            let replica = replicas.next().map(Arc::new);
            present |= if replica.is_some() { bit(id) } else { 0 };
            replica
        });
        ReplicaSet {
            slots: RwLock::new(slots),
            records: ReplicaMap::for_all(|_| Record::default()),
            members: AtomicU8::new(present),
            online: AtomicU8::new(present),
            ejecting: ReentrantMutex::new(()),
            ejections: AtomicUsize::new(0),
            hooks: RwLock::default(),
            doubtful: AtomicBool::new(false),
            required: AtomicUsize::new(1),
            timeout: Mutex::default(),
            dirs: Arc::new(DirCache::new(count)),
            room: Room::new(),
            inodes: Room::new(),
        }
    }

    /// The first online replica; `None` only for a set of none.
    pub fn primary(&self) -> Option<ReplicaId> {
        self.online().next()
    }

    /// The online replicas in order of preference, as they are at the call.
    pub fn online(&self) -> impl Iterator<Item = ReplicaId> + use<> {
        ids_of(self.online.load(Ordering::Acquire))
    }

    /// Whether that replica is online.
    pub fn is_online(&self, id: ReplicaId) -> bool {
        self.online.load(Ordering::Acquire) & bit(id) != 0
    }

    /// All replicas, online or not.
    pub fn ids(&self) -> impl Iterator<Item = ReplicaId> + use<> {
        ids_of(self.members.load(Ordering::Acquire))
    }

    /// One replica, as it is at the call: [`ReplicaSet::replace`] can put another in its place.
    pub fn get(&self, id: ReplicaId) -> Arc<Replica> {
        self.slots.read()[id].clone().expect("an id is given out with its replica")
    }

    /// Adds a replica, which is not in use until it is admitted. `None` if there is no place left.
    pub fn add(&self, replica: Replica) -> Option<ReplicaId> {
        let _ejecting = self.ejecting.lock();
        let members = self.members.load(Ordering::Acquire);
        let id = ReplicaId::all().find(|&id| members & bit(id) == 0)?;
        self.records[id].renew();
        self.slots.write()[id] = Some(self.timed(replica));
        self.members.fetch_or(bit(id), Ordering::SeqCst);
        Some(id)
    }

    /// Puts another replica, or the same one with its backing opened anew, in the place of one that
    /// is offline; `false` if that is online. It stays offline until it is admitted. Whoever comes
    /// back comes back this way: what was open on the old backing, which missed changes, is not
    /// open on the new one.
    pub fn replace(&self, id: ReplicaId, replica: Replica) -> bool {
        let _ejecting = self.ejecting.lock();
        if self.is_online(id) {
            return false;
        }
        let replica = self.timed(replica);
        let before = self.slots.write()[id].replace(replica);
        drop(before);
        true
    }

    /// Notes that a replica which is offline is being made equal to the others.
    pub fn resyncing(&self, id: ReplicaId) {
        let _ejecting = self.ejecting.lock();
        if !self.is_online(id) {
            self.records[id].set(State::Resyncing { since: Timestamp::now() });
        }
    }

    /// Notes why a replica that was being made equal to the others is offline still.
    pub fn resync_failed(&self, id: ReplicaId, fault: Fault) {
        let _ejecting = self.ejecting.lock();
        if !self.is_online(id) {
            self.records[id].set(State::Offline { since: fault.at, fault });
        }
    }

    /// Takes a replica that is offline out of the set; `false` if it is online. Its id may be given
    /// to another one.
    pub fn remove(&self, id: ReplicaId) -> bool {
        let _ejecting = self.ejecting.lock();
        let removed = !self.is_online(id);
        if removed {
            self.members.fetch_and(!bit(id), Ordering::SeqCst);
        }
        removed
    }

    /// Calls `hook` once for every replica that is ejected, before any change that it missed is
    /// acknowledged: the place to record durably who is left. It runs under whatever locks the
    /// failing operation holds, so it must not wait for another thread's operation on this set.
    pub fn on_fault(&self, hook: FaultHook) {
        self.hooks.write().push(hook);
    }

    /// Runs a changing operation on every online replica by the rule at the top of this file.
    pub fn apply<T>(
        &self,
        op: &'static str,
        f: impl FnMut(ReplicaId, &dyn Backing) -> io::Result<T>,
    ) -> Result<Answers<T>> {
        self.run(op, Nature::Change, f)
    }

    /// [`ReplicaSet::apply`] of an operation that owns what it needs. It is handed over as a whole,
    /// which for what is done often is a multiple faster.
    pub fn change<T: Send + 'static>(
        &self,
        op: &'static str,
        f: impl Fn(ReplicaId, &dyn Backing) -> io::Result<T> + Send + Sync + 'static,
    ) -> Result<Answers<T>> {
        let online: Vec<_> = self.online().map(|id| (id, self.get(id))).collect();
        let verdict = Verdict::new(Nature::Change);
        self.judge(op, guarded::relay(op, &online, verdict, &self.dirs, f)?)
    }

    /// Runs an operation that changes nothing but must work on every online replica, as opening a
    /// file. As [`ReplicaSet::apply`], except that running out of file descriptors or memory at any
    /// of them is the answer and ejects nobody.
    pub fn open<T>(
        &self,
        op: &'static str,
        f: impl FnMut(ReplicaId, &dyn Backing) -> io::Result<T>,
    ) -> Result<Answers<T>> {
        self.run(op, Nature::Open, f)
    }

    fn run<T>(
        &self,
        op: &'static str,
        nature: Nature,
        mut f: impl FnMut(ReplicaId, &dyn Backing) -> io::Result<T>,
    ) -> Result<Answers<T>> {
        let mut verdict = Verdict::new(nature);
        for id in self.online() {
            let replica = self.get(id);
            let mut result = f(id, replica.backing());
            if result.as_ref().is_err_and(is_out_of_files) {
                // Rather than lose a replica to our own thrift, we give back what is only kept.
                self.dirs.shrink();
                let _ = replica.backing.close_left();
                result = f(id, replica.backing());
            }
            verdict.take(id, result)?;
        }
        self.judge(op, verdict)
    }

    /// Takes those out of use that failed where another succeeded, and gives the answer.
    fn judge<T>(&self, op: &'static str, verdict: Verdict<T>) -> Result<Answers<T>> {
        let failed = verdict.failed().inspect_err(|_| {
            log::error!("{op} failed on every replica");
            // It may have been done in part, and differently.
            self.doubtful.store(true, Ordering::Relaxed);
        })?;
        for &(id, errno) in failed {
            self.records[id].count_write_error();
            self.eject(id, self.fault(id, op, errno));
        }
        self.settle();
        // Another thread may have lost the very replica that succeeded here, and left us with one
        // that did not: nobody online has the change then.
        let answers = Answers(verdict.answers);
        if !answers.iter().any(|(id, _)| self.is_online(id)) {
            log::error!("{op}: the only replica it succeeded on is out of use");
            self.doubtful.store(true, Ordering::Relaxed);
            return Err(Errno::IO.into());
        }
        Ok(answers)
    }

    /// A fault of this moment, with the path on which that replica failed last.
    fn fault(&self, id: ReplicaId, op: &'static str, errno: Errno) -> Fault {
        let fault = Fault::new(op, errno);
        match self.get(id).backing.last_failure() {
            Some(Fault { errno: last, path: Some(path), .. }) if last == errno => fault.on(path),
            _ => fault,
        }
    }

    /// Whether an operation may have been done in part on the replicas that are in use, so that
    /// only a comparison can tell whether they are equal: the store must not be called clean, nor
    /// anything that was dirtied be forgotten.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful.load(Ordering::Relaxed)
    }

    /// Gives every call on a backing so long, also of those that join later.
    pub fn set_timeout(&self, timeout: Duration) {
        *self.timeout.lock() = Some(timeout);
        self.slots.read().iter().for_each(|(_, replica)| {
            replica.iter().for_each(|replica| replica.backing.set_timeout(timeout));
        });
    }

    fn timed(&self, replica: Replica) -> Arc<Replica> {
        self.timeout.lock().iter().for_each(|&timeout| replica.backing.set_timeout(timeout));
        Arc::new(replica)
    }

    /// Asks for so many replicas in use, below which nothing is changed any more.
    pub fn require(&self, count: usize) {
        self.required.store(count, Ordering::Relaxed);
    }

    /// Fails with `EROFS` while fewer replicas are in use than required. To be asked before a
    /// change begins; one that has begun when a replica is lost is finished on the others.
    pub fn check_writable(&self) -> Result<()> {
        if self.online().count() < self.required.load(Ordering::Relaxed) {
            return Err(Errno::ROFS.into());
        }
        Ok(())
    }

    /// The calls that failed by a replica's fault, the oldest first: the last ones for each path.
    pub fn failures(&self, id: ReplicaId) -> Vec<Fault> {
        self.get(id).backing.failures()
    }

    /// Counts an object, or a piece of data, that is damaged on a replica: its checksum differs.
    pub fn count_checksum_error(&self, id: ReplicaId) {
        self.records[id].count_checksum_error();
    }

    /// Waits until nobody is being ejected. An operation that began after a replica was struck off
    /// the list does not reach it, and must not be acknowledged before the loss is on record.
    fn settle(&self) {
        if self.ejections.load(Ordering::SeqCst) != 0 {
            drop(self.ejecting.lock());
        }
    }

    /// Runs a reading operation on the primary; on an error of its device on the next one. Replicas
    /// on which the object is not open ([`Handles::get`]) are passed over; `EIO` if none is left.
    pub fn read<T>(
        &self,
        op: &'static str,
        mut f: impl FnMut(ReplicaId, &dyn Backing) -> io::Result<T>,
    ) -> Result<T> {
        for id in self.online() {
            let errno = match f(id, self.get(id).backing()) {
                Ok(answer) => return Ok(answer),
                // Not open there, which is no fault of the replica's.
                Err(error) if error.raw_os_error().is_none() => continue,
                Err(error) => errno_of(&error),
            };
            if meaning(errno) != Meaning::Device {
                return Err(errno.into());
            }
            let count = self.records[id].count_read_error();
            // A dying disk fails often: the log hears of every doubling.
            if count.is_power_of_two() {
                let (path, error) = (&self.get(id).path, io::Error::from(errno));
                log::warn!("{op} failed on {}: {error} ({count} read errors)", path.display());
            }
        }
        Err(Errno::IO.into())
    }

    /// A map of all ids, also of those not given out yet, made from each.
    pub fn map_ids<T>(&self, f: impl FnMut(ReplicaId) -> T) -> ReplicaMap<T> {
        ReplicaMap::for_all(f)
    }

    /// Handles of the directory `node` on all online replicas, for use as a parent. `path` tells
    /// where it is and is asked only when the handles are not at hand.
    pub fn dir(
        &self,
        node: NodeId,
        path: impl FnOnce() -> Result<RelPath>,
    ) -> Result<Arc<Handles>> {
        if let Some(handles) = self.dirs.dir(node) {
            return Ok(handles);
        }
        let path = path()?;
        loop {
            let opened = self.open("open_dir", |_, backing| backing.open_dir(&path))?;
            let handles = Arc::new(Handles::from(opened));
            self.dirs.keep_dir(node, &handles);
            // One that was admitted meanwhile may have cleared what is kept before this came.
            if self.online().all(|id| handles.has(id)) {
                return Ok(handles);
            }
            self.dirs.forget_dir(node);
        }
    }

    /// The handles of a directory if they are at hand.
    pub fn kept_dir(&self, node: NodeId) -> Option<Arc<Handles>> {
        self.dirs.dir(node)
    }

    /// Closes the handles of a directory, which is removed.
    pub fn forget_dir(&self, node: NodeId) {
        self.dirs.forget_dir(node);
    }

    /// Handles of one of our own directories, made where missing.
    pub fn private(&self, dir: PrivateDir) -> Result<Arc<Handles>> {
        if let Some(handles) = self.dirs.private(dir) {
            return Ok(handles);
        }
        loop {
            let opened =
                self.open("open_private", |_, backing| handles::open_private(backing, dir))?;
            let handles = Arc::new(Handles::from(opened));
            self.dirs.keep_private(dir, &handles);
            // As above.
            if self.online().all(|id| handles.has(id)) {
                return Ok(handles);
            }
            self.dirs.forget_private(dir);
        }
    }

    /// Takes a replica out of use, unless it is out already or is the last one. Returns when the
    /// hooks have run.
    pub fn eject(&self, id: ReplicaId, fault: Fault) {
        // Counted before the bit is cleared, so that whoever misses the bit sees the count.
        self.ejections.fetch_add(1, Ordering::SeqCst);
        let ejecting = self.ejecting.lock();
        let mask = self.online.load(Ordering::Acquire);
        let replica = self.get(id);
        if mask == bit(id) {
            self.doubtful.store(true, Ordering::Relaxed);
            log::error!(
                "{}: {fault}. It is the last replica and stays in use; check its disk at once",
                replica.path.display()
            );
        } else if mask & bit(id) != 0 {
            self.records[id].set(State::Offline { since: fault.at, fault: fault.clone() });
            self.online.store(mask & !bit(id), Ordering::SeqCst);
            self.room.forget();
            self.inodes.forget();
            log::error!(
                "{}: {fault}. The replica '{}' is out of use from now on; check its \
                 disk, then bring it back with `rearview replica online` or exchange it with \
                 `rearview replica replace`",
                replica.path.display(),
                replica.label
            );
            self.hooks.read().iter().for_each(|hook| hook(id, &fault));
        }
        drop(ejecting);
        self.ejections.fetch_sub(1, Ordering::SeqCst);
    }

    /// One of our own files could not be written: if by its device, a replica is out of use.
    pub fn blame(&self, id: ReplicaId, op: &'static str, path: RelPath, errno: Errno) {
        if meaning(errno) == Meaning::Device {
            self.records[id].count_write_error();
            self.eject(id, Fault::new(op, errno).on(path));
        }
    }

    /// Takes a replica into use again, once it has been made equal to the others. Kept handles are
    /// dropped, as they lack it; those of open files must be opened anew by their owners.
    pub fn admit(&self, id: ReplicaId) {
        let _ejecting = self.ejecting.lock();
        self.records[id].set(State::Online);
        self.online.fetch_or(bit(id), Ordering::SeqCst);
        self.dirs.clear();
        self.room.forget();
        self.inodes.forget();
    }

    /// A replica's condition at this moment.
    pub fn health(&self, id: ReplicaId) -> Health {
        self.records[id].snapshot()
    }

    /// The space of the tightest online replica, in blocks of 4096 bytes.
    pub fn space(&self) -> Result<Space> {
        let mut tightest: Option<Space> = None;
        for space in self.spaces()? {
            let space = room::in_blocks_of(&space, SPACE_BLOCK_BYTES);
            tightest = Some(match tightest {
                Some(other) if other.available <= space.available => other,
                _ => space,
            });
        }
        tightest.ok_or(Errno::IO.into())
    }

    /// The space of every online replica that tells it; `EIO` if none does.
    fn spaces(&self) -> Result<Vec<Space>> {
        let spaces: Vec<Space> =
            self.online().filter_map(|id| self.get(id).backing().space().ok()).collect();
        if spaces.is_empty() { Err(Errno::IO.into()) } else { Ok(spaces) }
    }
}

/// A replica's bit in a mask.
fn bit(id: ReplicaId) -> u8 {
    1 << id.index()
}

/// The ids in a mask.
fn ids_of(mask: u8) -> impl Iterator<Item = ReplicaId> + use<> {
    ReplicaId::all().filter(move |&id| mask & bit(id) != 0)
}

#[cfg(test)]
mod tests;

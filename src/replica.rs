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
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use parking_lot::{ReentrantMutex, RwLock};
use rustix::io::Errno;

use crate::error::Result;
use crate::types::{NodeId, RelPath, ReplicaId, ReplicaMap};

use backing::{Backing, Handle, Space};
use handles::DirCache;
use health::{Meaning, Record, errno_of, meaning};
use room::Room;

pub mod backing;
pub mod dir_backing;
pub mod faulty;
pub mod handles;
pub mod health;
mod room;

pub use handles::{Handles, PrivateDir};
pub use health::{Fault, Health, State};

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
    backing: Box<dyn Backing>,
}

impl Replica {
    /// Takes an opened backing.
    pub fn new(
        uuid: uuid::Uuid,
        label: impl Into<String>,
        path: impl Into<PathBuf>,
        backing: Box<dyn Backing>,
    ) -> Replica {
        Replica { uuid, label: label.into(), path: path.into(), backing }
    }

    /// The backing, for work on this replica alone.
    pub fn backing(&self) -> &dyn Backing {
        &*self.backing
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
    replicas: ReplicaMap<Replica>,
    records: ReplicaMap<Record>,
    /// Bit `n` is set while replica `n` is online.
    online: AtomicU8,
    /// Held while a replica is being ejected, hooks included. Innermost but for what the hooks
    /// take.
    ejecting: ReentrantMutex<()>,
    /// How many ejections are under way: see [`ReplicaSet::settle`].
    ejections: AtomicUsize,
    hooks: RwLock<Vec<FaultHook>>,
    dirs: DirCache,
    room: Room,
}

/// How the failure of a later replica is judged once an earlier one has succeeded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nature {
    /// The backing has changed: whoever did not follow is out.
    Change,
    /// Nothing has changed: a shortage of ours is the answer and nobody's fault.
    Open,
}

impl ReplicaSet {
    /// Takes the replicas in order of preference, all online.
    pub fn new(replicas: Vec<Replica>) -> ReplicaSet {
        let replicas = ReplicaMap::new(replicas);
        let online = replicas.ids().fold(0, |mask, id| mask | bit(id));
        ReplicaSet {
            records: replicas.map(|_, _| Record::default()),
            online: AtomicU8::new(online),
            ejecting: ReentrantMutex::new(()),
            ejections: AtomicUsize::new(0),
            hooks: RwLock::default(),
            dirs: DirCache::new(replicas.count()),
            room: Room::new(),
            replicas,
        }
    }

    /// The first online replica; `None` only for a set of none.
    pub fn primary(&self) -> Option<ReplicaId> {
        self.online().next()
    }

    /// The online replicas in order of preference, as they are at the call.
    pub fn online(&self) -> impl Iterator<Item = ReplicaId> + use<> {
        let mask = self.online.load(Ordering::Acquire);
        self.replicas.ids().filter(move |&id| mask & bit(id) != 0)
    }

    /// Whether that replica is online.
    pub fn is_online(&self, id: ReplicaId) -> bool {
        self.online.load(Ordering::Acquire) & bit(id) != 0
    }

    /// All replicas, online or not.
    pub fn ids(&self) -> impl Iterator<Item = ReplicaId> + use<> {
        self.replicas.ids()
    }

    /// One replica.
    pub fn get(&self, id: ReplicaId) -> &Replica {
        &self.replicas[id]
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
        let mut answers = self.replicas.map(|_, _| None);
        let mut succeeded = false;
        let mut failed: Vec<(ReplicaId, Errno)> = Vec::new();
        for id in self.online() {
            let mut result = f(id, self.get(id).backing());
            if result.as_ref().is_err_and(|error| out_of_files(errno_of(error))) {
                // Rather than lose a replica to our own thrift, we give back what is only kept.
                self.dirs.shrink();
                result = f(id, self.get(id).backing());
            }
            let errno = match result {
                Ok(answer) => {
                    answers[id] = Some(answer);
                    succeeded = true;
                    continue;
                }
                Err(error) => errno_of(&error),
            };
            match (meaning(errno), nature) {
                (Meaning::Answer | Meaning::Shortage, _) if !succeeded => return Err(errno.into()),
                (Meaning::Shortage, Nature::Open) => return Err(errno.into()),
                _ => failed.push((id, errno)),
            }
        }
        if !succeeded {
            log::error!("{op} failed on every replica");
            return Err(Errno::IO.into());
        }
        for (id, errno) in failed {
            self.records[id].count_write_error();
            self.eject(id, Fault::new(op, errno));
        }
        self.settle();
        // Another thread may have lost the very replica that succeeded here, and left us with one
        // that did not: nobody online has the change then.
        if !answers.iter().any(|(id, answer)| answer.is_some() && self.is_online(id)) {
            log::error!("{op}: the only replica it succeeded on is out of use");
            return Err(Errno::IO.into());
        }
        Ok(Answers(answers))
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

    /// A map of all replicas, online or not, made from each id.
    pub fn map_ids<T>(&self, mut f: impl FnMut(ReplicaId) -> T) -> ReplicaMap<T> {
        self.replicas.map(|id, _| f(id))
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
        let opened = self.open("open_dir", |_, backing| backing.open_dir(&path))?;
        let handles = Arc::new(Handles::from(opened));
        self.dirs.keep_dir(node, &handles);
        Ok(handles)
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
        let opened = self.open("open_private", |_, backing| handles::open_private(backing, dir))?;
        let handles = Arc::new(Handles::from(opened));
        self.dirs.keep_private(dir, &handles);
        Ok(handles)
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
            log::error!(
                "{}: {fault}. It is the last replica and stays in use; check its disk at once",
                replica.path.display()
            );
        } else if mask & bit(id) != 0 {
            self.records[id].set(State::Offline { since: fault.at, fault: fault.clone() });
            self.online.store(mask & !bit(id), Ordering::SeqCst);
            self.room.forget();
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

    /// Takes a replica into use again, once it has been made equal to the others. Kept handles are
    /// dropped, as they lack it; those of open files must be opened anew by their owners.
    pub fn admit(&self, id: ReplicaId) {
        let _ejecting = self.ejecting.lock();
        self.records[id].set(State::Online);
        self.online.fetch_or(bit(id), Ordering::SeqCst);
        self.dirs.clear();
        self.room.forget();
    }

    /// Counts an object that was found damaged on a replica.
    pub fn count_damage(&self, id: ReplicaId) {
        self.records[id].count_checksum_error();
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

    /// Fails with `ENOSPC` unless every online replica has room for `bytes` more and its reserve.
    pub fn ensure_room(&self, bytes: u64) -> Result<()> {
        let slack = || -> Result<u64> {
            Ok(self.spaces()?.iter().map(room::slack_bytes).min().unwrap_or(0))
        };
        match self.room.take(bytes, slack)? {
            true => Ok(()),
            false => Err(Errno::NOSPC.into()),
        }
    }

    /// The space of every online replica that tells it; `EIO` if none does.
    fn spaces(&self) -> Result<Vec<Space>> {
        let spaces: Vec<Space> =
            self.online().filter_map(|id| self.get(id).backing().space().ok()).collect();
        if spaces.is_empty() { Err(Errno::IO.into()) } else { Ok(spaces) }
    }
}

fn out_of_files(errno: Errno) -> bool {
    matches!(errno, Errno::MFILE | Errno::NFILE)
}

/// A replica's bit in the mask of those online.
fn bit(id: ReplicaId) -> u8 {
    1 << id.index()
}

#[cfg(test)]
mod tests;

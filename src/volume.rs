//! The live tree of a store: every operation, mirrored, preserved and recorded.
//!
//! The steps of every mutating operation are the same: say what is about to change (`intend`),
//! lock, preserve what would be lost (`history`), apply to every replica (`replica`), push to the
//! catalog, answer. What the kernel was told is thus in the catalog's queue, and a snapshot that
//! waits for the queue contains it. A write that would wait for what it overwrites is answered
//! first (`deferred`).
//!
//! The order among all locks is in `locks`.

mod actors;
mod ahead;
mod attributes;
mod checkpoint;
mod content;
mod deferred;
mod digest;
mod excludes;
mod files;
mod intend;
mod locks;
mod maintain;
mod namespace;
pub mod nodes;
mod purge;
mod resync;
mod retain;
mod same;
mod scratch;
pub mod scrub;
mod seal;
mod sync;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock, RwLockWriteGuard};
use rustix::io::Errno;

use crate::catalog::{Catalog, Durability, Failure, Snapshot, Totals};
use crate::error::{Error, Result};
use crate::excludes::{META_KEY, Patterns};
use crate::history::{self, History};
use crate::replica::backing::{Creds, Space};
use crate::replica::guarded::CALL_TIMEOUT;
use crate::replica::{Fault, Handles, Health, Need, ReplicaSet};
use crate::retention::StorePolicy;
use crate::store::Store;
use crate::store::marker::Marker;
use crate::types::{EntryName, Generation, NodeId, PRIVATE_DIR, RelPath, ReplicaId, Timestamp};

use actors::Actors;
pub use attributes::{Changes, LookedUp, Privileges};
use checkpoint::Checkpoints;
use deferred::Deferrals;
use excludes::Excludes;
use maintain::Maintenance;
pub use namespace::Newborn;
use nodes::{Node, Nodes};
use resync::Resyncs;
pub use resync::{Extent, ForeignReport, Progressing};
use scrub::ScrubStatus;

/// Stripes of directory locks: more than threads.
const DIR_STRIPES: usize = 64;
/// Room that an operation which makes a name asks for, in bytes: a directory block and our records.
const ROOM_FOR_A_NAME: u64 = 64 << 10;
/// And what one asks for that makes a file or directory.
const ROOM_FOR_A_FILE: Need = Need { bytes: ROOM_FOR_A_NAME, files: 1 };

/// How many times as long as a call may take the end of a housekeeper is waited for: it may be in
/// the midst of several.
const END_PATIENCE: u32 = 4;
/// How often that is looked for.
const END_POLL: Duration = Duration::from_millis(2);

/// How a volume behaves.
#[derive(Clone, Debug)]
pub struct VolumeOptions {
    /// A file that stays open for writing is sealed when it was not written for this long.
    pub idle_seal: Duration,
    /// How long a write is deferred at most, but for what is under way then.
    pub defer_writes: Duration,
    /// When so many bytes of a file are deferred, no more are waited for.
    pub defer_bytes: usize,
    /// How often the housekeeping looks.
    pub housekeeping: Duration,
    /// What is preserved is packed at least so long after the last packing.
    pub pack_after: Duration,
    /// How often the store's own policy is applied.
    pub policy_every: Duration,
    /// A checkpoint is made at least so often while anything changes.
    pub checkpoint_every: Duration,
    /// A checkpoint is made when nothing has changed for so long.
    pub checkpoint_idle: Duration,
    /// A file gets its digest when it was not changed for this long.
    pub digest_after: Duration,
    /// Patterns of what is to have no history, counted from the root.
    pub exclude: Arc<Patterns>,
    /// The fewest replicas in use with which anything is changed.
    pub replicas_min: usize,
    /// How long a call on a backing may take.
    pub call_timeout: Duration,
    /// It will be mounted, and told where ([`Volume::serving_at`]).
    pub mounted: bool,
}

impl Default for VolumeOptions {
    fn default() -> VolumeOptions {
        VolumeOptions {
            idle_seal: Duration::from_secs(30),
            defer_writes: Duration::from_millis(10),
            defer_bytes: 1 << 20,
            housekeeping: Duration::from_secs(1),
            pack_after: Duration::from_secs(60),
            policy_every: Duration::from_secs(300),
            checkpoint_every: Duration::from_secs(30),
            checkpoint_idle: Duration::from_secs(5),
            digest_after: Duration::from_secs(5),
            exclude: Arc::default(),
            replicas_min: 1,
            call_timeout: CALL_TIMEOUT,
            mounted: false,
        }
    }
}

/// Who asks for an operation.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Filesystem ids and umask.
    pub creds: Creds,
    /// The thread that asks, by its id; 0 where the kernel itself asks.
    pub pid: u32,
}

/// A mounted store's live tree and the access to its history.
pub struct Volume {
    store: Store,
    history: History,
    nodes: Nodes,
    excludes: Excludes,
    actors: Actors,
    options: VolumeOptions,
    cut: RwLock<()>,
    deferrals: Deferrals,
    dirs: Vec<Mutex<()>>,
    tree: RwLock<()>,
    /// Files with changes that are not sealed yet. They stay in the table until they are.
    unsealed: Mutex<HashMap<NodeId, Arc<Node>>>,
    /// Directories whose times changed since they were recorded.
    stale_dirs: Mutex<HashSet<NodeId>>,
    housekeepers: Mutex<Vec<Housekeeper>>,
    maintenance: Mutex<Maintenance>,
    checkpoints: Checkpoints,
    resyncs: Resyncs,
    stopping: AtomicBool,
    /// How many writes wait for history to yield.
    urgent: AtomicUsize,
    /// What status says of space.
    space: Mutex<retain::SpaceBook>,
    /// Who walks through directories.
    walks: ahead::Walks,
    /// Told of objects that were healed, or changed behind our back: see [`Volume::on_healed`].
    healed: OnceLock<Box<dyn Fn(NodeId) + Send + Sync>>,
    /// Files that have no digest yet.
    undigested: Mutex<digest::Waiting>,
    scrub: scrub::Scrub,
}

struct Housekeeper {
    stop: crossbeam_channel::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

/// State and counters of one replica, for status.
#[derive(Clone, Debug)]
pub struct ReplicaStatus {
    /// Its label.
    pub label: String,
    /// Where its backing is.
    pub path: std::path::PathBuf,
    /// Its identity.
    pub uuid: uuid::Uuid,
    /// How it is.
    pub health: Health,
    /// Generations that it lacks, and since when; `None` where that is not known.
    pub lag: Option<(u64, Duration)>,
    /// The calls that failed by its fault.
    pub failures: Vec<Fault>,
    /// How its resync stands, if it is to have one.
    pub resync: Option<Progressing>,
    /// What others had done to it when it came back.
    pub foreign: Option<ForeignReport>,
    /// Space of its filesystem; `None` where that cannot be told.
    pub space: Option<Space>,
}

/// What `status` shows of a mounted store.
#[derive(Clone, Debug)]
pub struct VolumeStatus {
    /// The store.
    pub uuid: uuid::Uuid,
    /// Its mounted replicas.
    pub replicas: Vec<ReplicaStatus>,
    /// Totals of live tree and history.
    pub totals: Totals,
    /// The newest generation.
    pub generation: Generation,
    /// The oldest moment that can be looked at.
    pub oldest: Timestamp,
    /// What is to be known of space.
    pub warning: Option<String>,
    /// The record of a replica in use: it knows those that are not here.
    pub marker: Option<Marker>,
    /// Whether as many replicas are in use as are asked for.
    pub writable: bool,
    /// What a scrub does and found.
    pub scrub: ScrubStatus,
}

impl Volume {
    /// Takes a store that was opened and begins to serve it.
    pub fn open(store: Store, options: VolumeOptions) -> Result<Arc<Volume>> {
        let history = History::open(&store.replicas, store.uuid)?;
        let known = store.catalog.meta(META_KEY)?.is_some();
        let excludes = Excludes::new(options.exclude.clone(), known);
        let volume = Arc::new(Volume {
            history,
            nodes: Nodes::with_root(),
            excludes,
            actors: Actors::new(),
            options,
            cut: RwLock::new(()),
            deferrals: Deferrals::new(),
            dirs: (0..DIR_STRIPES).map(|_| Mutex::new(())).collect(),
            tree: RwLock::new(()),
            unsealed: Mutex::default(),
            stale_dirs: Mutex::default(),
            housekeepers: Mutex::default(),
            maintenance: Mutex::new(Maintenance::new()),
            checkpoints: Checkpoints::new(),
            resyncs: Resyncs::new(),
            stopping: AtomicBool::new(false),
            urgent: AtomicUsize::new(0),
            space: Mutex::default(),
            walks: ahead::Walks::new(),
            healed: OnceLock::new(),
            undigested: Mutex::default(),
            scrub: scrub::Scrub::default(),
            store,
        });
        // Before a change that a replica missed is acknowledged, the others have it on record that
        // the replica must not be believed any more.
        let weak = Arc::downgrade(&volume);
        volume.replicas().on_fault(Box::new(move |replica, fault| {
            let Some(volume) = weak.upgrade() else { return };
            volume.catalog().detach(replica);
            if let Err(error) = volume.store.mark_stale(replica, &fault.to_string()) {
                log::error!("cannot record that a replica is stale: {error}");
            }
        }));
        volume.replicas().set_timeout(volume.options.call_timeout);
        volume.catalog().set_timeout(volume.options.call_timeout);
        volume.ensure_root()?;
        // What opening itself records is no change of a program's.
        volume.replicas().require(volume.options.replicas_min);
        if !volume.options.exclude.is_empty() {
            volume.note_rules()?;
        }
        let housekeepers = [
            Housekeeper::start(&volume, "rv-housekeeping", housekeep)?,
            Housekeeper::start(&volume, "rv-maintenance", maintain::run)?,
            Housekeeper::start(&volume, "rv-checkpoint", checkpoint::run)?,
            Housekeeper::start(&volume, "rv-scrub", scrub::run)?,
        ];
        volume.housekeepers.lock().extend(housekeepers);
        volume.enter_waiting()?;
        let resyncs = Housekeeper::start(&volume, "rv-resync", resync::run)?;
        volume.resyncs.set_kick(Some(resyncs.stop.clone()));
        // The last to end: the others may wait for what it does.
        let deferred = Housekeeper::start(&volume, "rv-deferred", deferred::run)?;
        volume.housekeepers.lock().extend([resyncs, deferred]);
        Ok(volume)
    }

    /// Seals and commits everything, durably, and marks the store clean. The volume is of no use
    /// after.
    pub fn close(&self) -> Result<()> {
        self.resyncs.finish_short();
        self.stopping.store(true, Ordering::Relaxed);
        self.scrub_end_look();
        self.resyncs.stop();
        for housekeeper in std::mem::take(&mut *self.housekeepers.lock()) {
            housekeeper.end(self.options.call_timeout * END_PATIENCE);
        }
        self.settle()?;
        self.remove_useless()?;
        self.checkpoint()?;
        if let Err(error) = history::remove_empty_shards(self.replicas()) {
            log::info!("empty directories of preserved/ stay: {error}");
        }
        self.catalog().close()?;
        self.store.close()
    }

    /// The catalog.
    pub fn catalog(&self) -> &Catalog {
        &self.store.catalog
    }

    /// The replicas.
    pub fn replicas(&self) -> &ReplicaSet {
        &self.store.replicas
    }

    /// What the store keeps.
    pub fn policy(&self) -> StorePolicy {
        self.store.policy()
    }

    /// Changes what the store keeps, durably. `Refused` for a policy that cannot be meant.
    pub fn set_policy(&self, policy: &StorePolicy) -> Result<()> {
        self.store.set_policy(policy)
    }

    /// Records the root of a store that was made empty.
    fn ensure_root(&self) -> Result<()> {
        if self.catalog().node(NodeId::ROOT)?.is_none() {
            self.mark_dir(NodeId::ROOT);
            self.settle()?;
        }
        Ok(())
    }

    /// Seals every file that is open for writing, records what is due, and returns the generation
    /// that shows exactly what was live. Later changes do not reach it.
    pub fn settle(&self) -> Result<Generation> {
        let cut = self.stop_changes();
        self.settle_in(&cut);
        Ok(self.catalog().freeze())
    }

    /// Seals and records all that is due, while no operation runs.
    fn settle_in(&self, _cut: &RwLockWriteGuard<'_, ()>) {
        let unsealed: Vec<Arc<Node>> = self.unsealed.lock().values().cloned().collect();
        for node in unsealed {
            // One file that cannot be sealed must not keep all others from being in a snapshot.
            if let Err(error) = self.seal(&node, &mut self.lock(&node)) {
                log::error!("{}: not sealed, its last version stands: {error}", self.told(&node));
            }
        }
        // A directory that was excluded and is shown again brings up the one above it.
        while self.settle_dirs() && self.excludes.any() {}
    }

    /// [`Volume::settle`] and names that generation. What it shows is durable on every replica in
    /// use when this returns. If we die between the two, the intent log still has what was dirtied,
    /// as after every commit.
    ///
    /// Files first, and the catalog after them: what the catalog has of it then tells recovery that
    /// no byte of the snapshot was ever in doubt ([`Catalog::durable_to`]).
    pub fn create_snapshot(
        &self,
        name: &str,
        automatic: bool,
        tags: &[String],
    ) -> Result<Snapshot> {
        let at = self.settle()?;
        self.replicas().begin_sync_all().wait()?;
        let catalog = self.catalog();
        let snapshot = match self.replicas().is_doubtful() {
            true => catalog.create_snapshot(name, at, automatic, tags),
            false => catalog.create_durable_snapshot(name, at, automatic, tags),
        };
        self.barrier()?;
        snapshot
    }

    /// State of the replicas and totals.
    pub fn status(&self) -> Result<VolumeStatus> {
        let replicas = self.replicas();
        Ok(VolumeStatus {
            uuid: self.store.uuid,
            replicas: replicas
                .ids()
                .map(|id| {
                    let replica = replicas.get(id);
                    ReplicaStatus {
                        label: replica.label.clone(),
                        path: replica.path.clone(),
                        uuid: replica.uuid,
                        lag: self.lag(id),
                        failures: replicas.failures(id),
                        health: replicas.health(id),
                        resync: self.resync_of(id),
                        foreign: self.foreign_report(id),
                        space: replica.backing().space().ok(),
                    }
                })
                .collect(),
            totals: self.catalog().totals()?,
            generation: self.catalog().generation(),
            oldest: self.catalog().time_of(self.catalog().oldest()?)?,
            warning: self.space_warning(),
            marker: self.store.current_marker(),
            writable: replicas.check_writable().is_ok(),
            scrub: self.scrub_status()?,
        })
    }

    /// How many generations a replica lacks, and the time since.
    fn lag(&self, id: ReplicaId) -> Option<(u64, Duration)> {
        let health = self.replicas().health(id);
        if health.state == crate::replica::State::Online {
            return Some((0, Duration::ZERO));
        }
        let since = health.behind_since?;
        let had = self.catalog().generation_at(since).ok().flatten()?;
        let lacks = self.catalog().generation().0.saturating_sub(had.0);
        let nanos = Timestamp::now().as_nanos().saturating_sub(since.as_nanos());
        let time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
        Some((lacks, if lacks == 0 { Duration::ZERO } else { time }))
    }

    /// Space: the tightest replica's.
    pub fn space(&self) -> Result<Space> {
        self.replicas().space()
    }

    /// A live node's path from the root.
    pub fn path_of(&self, node: NodeId) -> Result<RelPath> {
        self.nodes.path(self.catalog(), node)
    }

    /// The kernel forgot `count` lookups of a node.
    pub fn forget(&self, node: NodeId, count: u64) {
        self.nodes.forget(node, count);
    }

    // --- helpers of the operations

    /// Handles of a directory on every online replica.
    fn dir(&self, dir: NodeId) -> Result<Arc<Handles>> {
        self.resyncs.note_activity();
        if let Some(handles) = self.replicas().kept_dir(dir) {
            return Ok(handles);
        }
        // Were a directory above renamed meanwhile, each replica would open another one.
        let _still = self.tree.read();
        self.replicas().dir(dir, || self.nodes.path(self.catalog(), dir))
    }

    /// The directory's times changed: they are recorded, and made equal on all replicas, at the
    /// next settling.
    fn mark_dir(&self, dir: NodeId) {
        self.stale_dirs.lock().insert(dir);
    }

    /// Refuses names that cannot be made in `parent`: our private directory in the root.
    fn check_name(&self, parent: NodeId, name: &EntryName) -> Result<()> {
        if is_private(parent, name) {
            return Err(Error::Posix(Errno::PERM));
        }
        Ok(())
    }

    /// The live node that a name means.
    fn named(&self, parent: NodeId, name: &EntryName) -> Result<Arc<Node>> {
        if is_private(parent, name) {
            return Err(Error::Posix(Errno::NOENT));
        }
        match self.catalog().lookup(parent, name)? {
            Some((id, kind)) => Ok(self.nodes.load(id, kind)),
            None => Err(Error::Posix(Errno::NOENT)),
        }
    }

    /// A node by its id: in use, or alive.
    pub(crate) fn node(&self, id: NodeId) -> Result<Arc<Node>> {
        if let Some(node) = self.nodes.get(id) {
            return Ok(node);
        }
        let row = self.catalog().node(id)?.ok_or(Error::Posix(Errno::STALE))?;
        Ok(self.nodes.load(id, row.kind))
    }

    /// A catalog that failed is replaced by another replica's. Where that fails too, the replica is
    /// out of use as a whole.
    fn eject_failed_catalogs(&self) {
        for (replica, reason) in self.catalog().failed_replicas() {
            if self.replicas().is_online(replica) {
                self.replicas().count_checksum_error(replica);
                let path = &self.replicas().get(replica).path;
                // A disk that fails would fail again: only what the file holds is mended so.
                let corrupt = matches!(reason, Failure::Corrupt(_));
                if corrupt && self.catalog().replace(replica, None).is_ok() {
                    log::warn!("{}: its catalog failed and was replaced: {reason}", path.display());
                    continue;
                }
                log::error!("the catalog of a replica failed: {reason}");
                let errno = if reason == Failure::Hangs { Errno::TIMEDOUT } else { Errno::IO };
                self.replicas().eject(replica, Fault::new("catalog", errno));
            }
        }
    }

    /// What is done now and then: sealing what is idle, recording directories, sweeping.
    fn housekeep(&self) -> Result<()> {
        self.nodes.sweep();
        self.eject_failed_catalogs();
        self.give_up_hung();
        let idle: Vec<Arc<Node>> = self.unsealed.lock().values().cloned().collect();
        for node in idle {
            let _cut = self.cut.read();
            let mut state = self.lock(&node);
            let quiet = state
                .open
                .as_ref()
                .is_some_and(|open| open.touched.elapsed() >= self.options.idle_seal);
            if quiet && let Err(error) = self.seal(&node, &mut state) {
                log::error!("{}: not sealed: {error}", self.told(&node));
            }
        }
        {
            let _cut = self.cut.read();
            self.settle_dirs();
        }
        Ok(())
    }

    /// A node's path as a person is told of it.
    fn told(&self, node: &Node) -> String {
        self.path_of(node.id).map_or_else(|_| format!("node {}", node.id), |path| path.to_string())
    }

    /// Commits durably what was pushed. A replica whose catalog could not follow is out before
    /// anybody is told.
    fn barrier(&self) -> Result<()> {
        self.catalog().flush(Durability::Durable)?;
        self.eject_failed_catalogs();
        Ok(())
    }
}

impl Housekeeper {
    /// Ends the thread. One that hangs on a disk, looking whether it is well again, is left alone.
    fn end(self, patience: Duration) {
        drop(self.stop);
        let deadline = Instant::now() + patience;
        while !self.thread.is_finished() && Instant::now() < deadline {
            std::thread::park_timeout(END_POLL);
        }
        match self.thread.is_finished() {
            true => drop(self.thread.join()),
            false => log::error!("a thread hangs and is left alone"),
        }
    }

    /// Starts a thread that works until its channel is disconnected.
    fn start(
        volume: &Arc<Volume>,
        name: &str,
        work: fn(&Weak<Volume>, &crossbeam_channel::Receiver<()>),
    ) -> Result<Housekeeper> {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let weak = Arc::downgrade(volume);
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || work(&weak, &stopped))
            .map_err(Error::from_io)?;
        Ok(Housekeeper { stop, thread })
    }
}

/// The thread of what is done now and then.
fn housekeep(volume: &Weak<Volume>, stopped: &crossbeam_channel::Receiver<()>) {
    let Some(every) = volume.upgrade().map(|volume| volume.options.housekeeping) else { return };
    // A disconnect is the signal to stop; nothing is ever sent.
    while let Err(crossbeam_channel::RecvTimeoutError::Timeout) = stopped.recv_timeout(every) {
        let Some(volume) = volume.upgrade() else { return };
        if let Err(error) = volume.housekeep() {
            log::error!("housekeeping: {error}");
        }
    }
}

/// Whether this is our own directory, which the mount does not show.
pub fn is_private(parent: NodeId, name: &EntryName) -> bool {
    parent == NodeId::ROOT && name.as_bytes() == PRIVATE_DIR.as_bytes()
}

#[cfg(test)]
mod tests;

//! Bringing replicas back while the mount is in use.
//!
//! A replica that missed changes, or is new, is made equal to the others in rounds. The first
//! compares the whole tree; each later one what was dirtied during the one before
//! ([`crate::replica::intent`]). When little is left, operations are stopped for the last round:
//! with it the replica's catalog joins the others and the replica is admitted. Killed anywhere, the
//! next resync finds what was copied and does not copy it again.
//!
//! One thread does it, at idle priority, one replica after another. It also looks after those that
//! failed: a replica whose disk answers again is brought back by itself, later and later if it
//! fails again.

mod admit;
mod foreign;
mod gauge;
mod mirror;
mod places;
mod version;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use parking_lot::Mutex;
use rustix::io::Errno;

use crate::catalog::Catalog;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::replica::Fault;
use crate::replica::health::State;
use crate::replica::intent::DirtySet;
use crate::store::fill::history::{History as HistoryFiles, Seen};
use crate::store::quarantine::Quarantine;
use crate::store::site::Site;
use crate::store::{Arrival, Fork};
use crate::types::{ReplicaId, Timestamp};

use super::Volume;
use foreign::Foreign;
pub use foreign::ForeignReport;
pub use gauge::Extent;
use gauge::Gauge;
use mirror::Mirror;
use places::Places;

/// How long after a failure a replica is looked at again; each further failure doubles it.
const RETRY_FIRST: Duration = Duration::from_secs(30);
/// The longest time between two looks.
const RETRY_MAX: Duration = Duration::from_secs(600);
/// What was in flight when a replica left was at most so much later than its last commit.
const IN_FLIGHT_NANOS: i64 = 2_000_000_000;
/// How often it is looked whether the mount answers.
const MOUNT_POLL: Duration = Duration::from_millis(20);
/// How long a disk may take to answer the look.
const PROBE_TIMEOUT: Duration = Duration::from_secs(30);
/// A round that dirtied no more objects than this is short enough to be followed by the last one.
const LAST_OBJECTS: usize = 64;
/// Likewise in bytes copied.
const LAST_BYTES: u64 = 16 << 20;
/// After so many rounds the last one comes, however much is dirtied meanwhile.
const ROUNDS_MAX: usize = 12;

/// The resyncs of a mounted store.
pub(super) struct Resyncs {
    jobs: Mutex<BTreeMap<ReplicaId, Job>>,
    /// Wakes the thread.
    kick: Mutex<Option<Sender<()>>>,
    /// Counts what is asked of the mount.
    activity: Arc<AtomicU64>,
    /// Where the mount is, once it answers.
    mount: Mutex<Option<PathBuf>>,
    /// What others had done to the replicas that came back.
    reports: Mutex<BTreeMap<ReplicaId, ForeignReport>>,
}

/// What is to be done for a replica that is not in use.
struct Job {
    stage: Stage,
    stop: Arc<AtomicBool>,
    /// How long the next failure is waited for.
    wait: Duration,
    fork: Fork,
}

enum Stage {
    /// Its backing was recognised and is open.
    Ready(Arrival),
    /// It is being made equal.
    Running(Arc<Gauge>),
    /// It is looked at again then.
    Failed(Instant),
    /// It was taken offline by hand and stays so.
    Parked,
    /// It is in use again, since then.
    Done(Instant),
}

/// How a resync stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progressing {
    /// It waits for its turn.
    Waiting,
    /// It runs.
    #[allow(missing_docs)]
    Running { extent: Extent, elapsed: Duration },
    /// It failed, or the disk does not answer; so long from now it is tried again.
    Retry(Duration),
    /// The replica was taken offline by hand.
    Parked,
}

impl Resyncs {
    pub fn new() -> Resyncs {
        Resyncs {
            jobs: Mutex::default(),
            kick: Mutex::new(None),
            activity: Arc::default(),
            mount: Mutex::default(),
            reports: Mutex::default(),
        }
    }

    /// Something is asked of the mount: a resync steps aside.
    pub fn note_activity(&self) {
        self.activity.fetch_add(1, Ordering::Relaxed);
    }

    pub fn set_kick(&self, kick: Option<Sender<()>>) {
        *self.kick.lock() = kick;
    }

    fn wake(&self) {
        if let Some(kick) = &*self.kick.lock() {
            // If it is not waiting it looks anyway before it waits again.
            let _ = kick.try_send(());
        }
    }

    /// Ends what runs.
    pub fn stop(&self) {
        self.jobs.lock().values().for_each(|job| job.stop.store(true, Ordering::Relaxed));
        self.set_kick(None);
    }
}

impl Volume {
    /// Enters the replicas that wait since the store was opened.
    pub(super) fn enter_waiting(&self) -> Result<()> {
        for id in self.store.waiting() {
            let arrival = self.store.arrival(id)?;
            self.enter(arrival, Fork::Refuse);
        }
        Ok(())
    }

    fn enter(&self, arrival: Arrival, fork: Fork) {
        self.replicas().resyncing(arrival.id);
        let mut jobs = self.resyncs.jobs.lock();
        let wait = jobs.get(&arrival.id).map_or(RETRY_FIRST, |job| job.wait);
        let (id, stage) = (arrival.id, Stage::Ready(arrival));
        jobs.insert(id, Job { stage, stop: Arc::default(), wait, fork });
        drop(jobs);
        self.resyncs.wake();
    }

    /// How the resync of a replica stands; `None` for one that is in use.
    pub fn resync_of(&self, id: ReplicaId) -> Option<Progressing> {
        let jobs = self.resyncs.jobs.lock();
        match &jobs.get(&id)?.stage {
            Stage::Ready(_) => Some(Progressing::Waiting),
            Stage::Running(gauge) => Some(Progressing::Running {
                extent: gauge.extent(),
                elapsed: gauge.begun.elapsed(),
            }),
            Stage::Failed(at) => {
                Some(Progressing::Retry(at.saturating_duration_since(Instant::now())))
            }
            Stage::Parked => Some(Progressing::Parked),
            Stage::Done(_) => None,
        }
    }

    /// Takes a replica out of use until it is brought back by hand.
    pub fn replica_offline(&self, name: &str) -> Result<ReplicaId> {
        let id = self.store.named(name)?;
        self.refuse_last(id, "taken offline")?;
        self.stop_resync(id);
        if self.replicas().is_online(id) {
            self.replicas().eject(id, Fault::by_hand());
        }
        let (stop, wait) = (Arc::default(), RETRY_FIRST);
        let job = Job { stage: Stage::Parked, stop, wait, fork: Fork::Refuse };
        self.resyncs.jobs.lock().insert(id, job);
        Ok(id)
    }

    fn refuse_last(&self, id: ReplicaId, what: &str) -> Result<()> {
        let others = self.replicas().online().any(|other| other != id);
        if others || !self.replicas().is_online(id) {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "{} is the last current replica and cannot be {what}",
            self.replicas().get(id).path.display()
        )))
    }

    fn stop_resync(&self, id: ReplicaId) {
        let stop = self.resyncs.jobs.lock().get(&id).map(|job| job.stop.clone());
        let Some(stop) = stop else { return };
        stop.store(true, Ordering::Relaxed);
        let running = || {
            let jobs = self.resyncs.jobs.lock();
            matches!(jobs.get(&id).map(|job| &job.stage), Some(Stage::Running(_)))
        };
        while running() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Brings a replica back: one of this mount by its name or path, or an absent one by its path.
    pub fn replica_online(&self, name: &str, fork: Fork) -> Result<ReplicaId> {
        let known = match self.store.named(name) {
            Ok(id) => Some(id),
            Err(Error::NotFound(text)) => match Path::new(name).is_dir() {
                true => None,
                false => return Err(Error::NotFound(text)),
            },
            Err(error) => return Err(error),
        };
        if let Some(id) = known
            && self.replicas().is_online(id)
        {
            return Ok(id);
        }
        let arrival = match known {
            Some(id) => {
                self.stop_resync(id);
                self.store.returned(id, fork)?
            }
            None if !crate::store::is_replica(Path::new(name))? => {
                return Err(Error::Refused(format!(
                    "{} is no replica: to make it one, rearview replica add {}",
                    crate::types::escape(name.as_bytes()),
                    crate::types::escape(name.as_bytes())
                )));
            }
            None => self.store.arrived(Path::new(name), None, fork)?,
        };
        let id = arrival.id;
        self.enter(arrival, fork);
        Ok(id)
    }

    /// Adds an empty directory as a replica.
    pub fn replica_add(&self, path: &Path) -> Result<ReplicaId> {
        let arrival = self.store.arrived(path, None, Fork::Refuse)?;
        let id = arrival.id;
        self.enter(arrival, Fork::Refuse);
        Ok(id)
    }

    /// Fills an empty directory in the place of a replica, which is given up.
    pub fn replica_replace(&self, old: &str, path: &Path) -> Result<ReplicaId> {
        let id = match self.store.named(old) {
            Ok(id) => id,
            Err(Error::NotFound(text)) => {
                // One that is not here has no place in this mount.
                if !self.store.forget_absent(old)? {
                    return Err(Error::NotFound(text));
                }
                return self.replica_add(path);
            }
            Err(error) => return Err(error),
        };
        self.refuse_last(id, "replaced: add the new one first, then remove the old one")?;
        crate::store::check_empty(path)?;
        self.replica_offline(old)?;
        let arrival = self.store.arrived(path, Some(id), Fork::Refuse)?;
        self.enter(arrival, Fork::Refuse);
        Ok(id)
    }

    /// Gives a replica up. Its files stay where they are.
    pub fn replica_remove(&self, name: &str) -> Result<()> {
        match self.store.named(name) {
            Ok(id) => {
                self.refuse_last(id, "removed")?;
                self.replica_offline(name)?;
                self.store.remove(id)?;
                self.resyncs.jobs.lock().remove(&id);
                Ok(())
            }
            Err(Error::NotFound(text)) => match self.store.forget_absent(name)? {
                true => Ok(()),
                false => Err(Error::NotFound(text)),
            },
            Err(error) => Err(error),
        }
    }

    /// Has every replica that failed looked at now.
    pub fn resync_now(&self) {
        for job in self.resyncs.jobs.lock().values_mut() {
            if let Stage::Failed(at) = &mut job.stage {
                *at = Instant::now();
            }
        }
        self.resyncs.wake();
    }

    /// Notes replicas that went out of use since the last look.
    fn enter_failed(&self) {
        let mut jobs = self.resyncs.jobs.lock();
        for id in self.replicas().ids() {
            if !matches!(self.replicas().health(id).state, State::Offline { .. }) {
                continue;
            }
            let wait = match jobs.get(&id) {
                None => RETRY_FIRST,
                // One that soon fails again is waited for longer.
                Some(Job { stage: Stage::Done(since), wait, .. }) => {
                    if since.elapsed() > RETRY_MAX { RETRY_FIRST } else { *wait }
                }
                Some(_) => continue,
            };
            let stage = Stage::Failed(Instant::now() + wait);
            let wait = (wait * 2).min(RETRY_MAX);
            jobs.insert(id, Job { stage, stop: Arc::default(), wait, fork: Fork::Refuse });
        }
    }

    /// Looks at the replicas whose time has come.
    fn probe_failed(&self) {
        let due: Vec<ReplicaId> = {
            let jobs = self.resyncs.jobs.lock();
            let is_due = |job: &Job| matches!(job.stage, Stage::Failed(at) if at <= Instant::now());
            jobs.iter().filter(|(_, job)| is_due(job)).map(|(id, _)| *id).collect()
        };
        for id in due {
            let path = self.replicas().get(id).path.clone();
            let returned = match answers(&path) {
                Ok(()) => self.store.returned(id, Fork::Refuse),
                Err(error) => Err(error),
            };
            match returned {
                Ok(arrival) => {
                    log::info!("{}: it answers again and is brought back", path.display());
                    self.enter(arrival, Fork::Refuse);
                }
                Err(error) => self.put_off(id, &error),
            }
        }
    }

    fn put_off(&self, id: ReplicaId, error: &Error) {
        log::warn!("{}: not brought back: {error}", self.replicas().get(id).path.display());
        let mut jobs = self.resyncs.jobs.lock();
        if let Some(job) = jobs.get_mut(&id) {
            job.stage = Stage::Failed(Instant::now() + job.wait);
            job.wait = (job.wait * 2).min(RETRY_MAX);
            job.stop = Arc::default();
        }
    }

    /// Does the next resync that waits; `false` if none does.
    fn resync_next(&self) -> bool {
        let gauge = Arc::new(Gauge::new(self.resyncs.activity.clone()));
        let (arrival, stop, fork) = {
            let mut jobs = self.resyncs.jobs.lock();
            let next = jobs.values_mut().find(|job| matches!(job.stage, Stage::Ready(_)));
            let Some(job) = next else { return false };
            let running = Stage::Running(gauge.clone());
            let Stage::Ready(arrival) = std::mem::replace(&mut job.stage, running) else {
                return false;
            };
            (arrival, job.stop.clone(), job.fork)
        };
        let id = arrival.id;
        let path = self.replicas().get(id).path.clone();
        let progress = Progress::new(gauge.clone(), stop.clone());
        match self.resync(&arrival, fork, &gauge, &progress) {
            Ok(()) => {
                let copied = gauge.extent().copied;
                let took = gauge.begun.elapsed().as_secs_f64();
                log::info!(
                    "{}: resynced in {took:.1} s, {copied} bytes copied; it is in use",
                    path.display()
                );
                if let Some(job) = self.resyncs.jobs.lock().get_mut(&id) {
                    job.stage = Stage::Done(Instant::now());
                }
            }
            Err(error) => {
                let errno = match &error {
                    Error::Interrupted => Errno::CANCELED,
                    error => error.to_errno(),
                };
                if !self.replicas().is_online(id) {
                    self.replicas().resync_failed(id, Fault::new("resync", errno));
                }
                self.put_off(id, &error);
            }
        }
        true
    }

    fn resync(
        &self,
        arrival: &Arrival,
        fork: Fork,
        gauge: &Arc<Gauge>,
        progress: &Progress,
    ) -> Result<()> {
        let id = arrival.id;
        let target = self.store.site(id);
        let own = match arrival.was_whole {
            true => Catalog::open_read_only(&self.store.catalog_file(id)).ok(),
            false => None,
        };
        if arrival.was_whole && (own.is_some() || fork == Fork::Take) {
            self.take_foreign(arrival, own.as_ref(), fork, &target, progress)?;
        }
        self.store.begin_resync(arrival)?;
        // A fork's catalog tells nothing of this store.
        let own = own.filter(|_| fork == Fork::Refuse);
        if fork == Fork::Take {
            set_history_aside(&target)?;
        }
        let mut places = Places::default();
        match &own {
            Some(own) => {
                own.live_dirs(&mut |node, parent, name| places.put(node, parent, &name))?;
            }
            None => places::find_aside(&target, &mut places)?,
        }
        let totals = self.catalog().totals()?;
        progress.begin("", totals.live_nodes, totals.live_bytes + totals.history_bytes());
        let mut rounds = Rounds {
            volume: self,
            arrival,
            target,
            places,
            own,
            gauge,
            progress,
            dirty: Some(self.track_dirty()),
            history_seen: Seen::new(),
        };
        rounds.run()
    }
}

impl Volume {
    /// What others had changed on a replica that came back in this mount.
    pub fn foreign_report(&self, id: ReplicaId) -> Option<ForeignReport> {
        self.resyncs.reports.lock().get(&id).cloned()
    }

    /// Takes in what others changed on a replica while it was away.
    fn take_foreign(
        &self,
        arrival: &Arrival,
        own: Option<&Catalog>,
        fork: Fork,
        target: &Site,
        progress: &Progress,
    ) -> Result<()> {
        let take = fork == Fork::Take;
        let known = match own {
            Some(own) if !take => own,
            _ => self.catalog(),
        };
        let left = match arrival.was_clean || take {
            true => None,
            // What was in flight when it left came soon after the last that its catalog has.
            false => {
                let last = known.time_of(known.generation())?.as_nanos();
                Some(Timestamp::from_nanos(last.saturating_add(IN_FLIGHT_NANOS)))
            }
        };
        // A fork may have been changed at any time.
        let since = if take { Timestamp::from_nanos(i64::MIN) } else { arrival.apart_since };
        let Some(mount) = self.mount_site(progress)? else { return Ok(()) };
        let mut foreign =
            Foreign::new(self, known, (target, &mount), progress, (since, left, take));
        foreign.run()?;
        if foreign.report.count > 0 {
            self.resyncs.reports.lock().insert(arrival.id, foreign.report);
        }
        Ok(())
    }

    /// The mount, as something to work in; `None` for a volume that is not mounted.
    fn mount_site(&self, progress: &Progress) -> Result<Option<Site>> {
        if !self.options.mounted {
            return Ok(None);
        }
        loop {
            let mount = self.resyncs.mount.lock().clone();
            if let Some(mount) = mount {
                return Site::open(&mount).map(Some);
            }
            progress.advance(0, 0)?;
            std::thread::sleep(MOUNT_POLL);
        }
    }
}

/// Moves a fork's history to quarantine: its ids mean other things than the store's.
fn set_history_aside(target: &Site) -> Result<()> {
    let mut quarantine = Quarantine::new(target);
    let path = crate::store::site::private("");
    let dir = target.dir(&path)?;
    for entry in target.backing.list(&dir).map_err(Error::from_io)? {
        let name = entry.name.as_bytes();
        let history = matches!(name, b"preserved" | b"undo" | b"packs");
        if history || name.starts_with(b"catalog.db") {
            quarantine.take(&dir, &path, &entry.name)?;
        }
    }
    target.make_private()?;
    if let Some(place) = quarantine.place() {
        log::warn!("{}: its own history was moved to {}", target.path.display(), place.display());
    }
    Ok(())
}

/// What lasts over the rounds of one resync.
struct Rounds<'a> {
    volume: &'a Volume,
    arrival: &'a Arrival,
    target: Site,
    places: Places,
    own: Option<Catalog>,
    gauge: &'a Arc<Gauge>,
    progress: &'a Progress,
    dirty: Option<super::intend::Tracker<'a>>,
    history_seen: Seen,
}

impl Rounds<'_> {
    fn run(&mut self) -> Result<()> {
        self.round(None)?;
        self.history(true)?;
        // The copy of the catalog takes its time as well: what it makes dirty comes after it.
        let mut round = 0;
        loop {
            let set = self.next_set();
            let objects = set.files.len() + set.dirs.len();
            let copied = self.round(Some(&set))?;
            round += 1;
            if objects <= LAST_OBJECTS && copied <= LAST_BYTES || round >= ROUNDS_MAX {
                break;
            }
        }
        // What the target's catalog told is used up, and the catalog is replaced.
        self.own = None;
        let file = self.volume.store.catalog_file(self.arrival.id);
        let progress = self.progress.clone();
        let mut joining = self.volume.catalog().copy_live(&file, &mut || progress.advance(0, 0))?;
        self.history(true)?;
        let set = self.next_set();
        self.round(Some(&set))?;
        self.sync_all()?;
        joining.catch_up()?;
        self.finish(joining)
    }

    /// The replica that is copied from: one in use.
    fn source(&self) -> Result<Site> {
        let id = self.volume.replicas().primary().ok_or(Error::Posix(Errno::IO))?;
        Ok(self.volume.store.site(id))
    }

    /// What was dirtied since the last call, and what is not settled yet.
    fn next_set(&mut self) -> DirtySet {
        let mut set = self.dirty.as_mut().map(super::intend::Tracker::next).unwrap_or_default();
        set.files.extend(self.volume.unsealed.lock().keys());
        set.dirs.extend(self.volume.stale_dirs.lock().iter());
        set
    }

    /// One round over a set, or over everything. Returns how many bytes were copied.
    fn round(&mut self, set: Option<&DirtySet>) -> Result<u64> {
        let source = self.source()?;
        let since = self.arrival.apart_since;
        let sides = (&source, &self.target);
        let mut mirror = Mirror::new(self.volume, sides, &mut self.places, self.progress, since)?;
        mirror.own = self.own.as_ref();
        match set {
            Some(set) => mirror.set(set)?,
            None => mirror.tree()?,
        }
        let copied = mirror.copier.bytes_written();
        if let Some(place) = mirror.quarantine.place() {
            log::warn!(
                "{}: {} files or folders that the store did not know were moved to {}",
                self.target.path.display(),
                mirror.quarantine.count(),
                place.display()
            );
        }
        self.gauge.copied.fetch_add(copied, Ordering::Relaxed);
        Ok(copied)
    }

    fn history(&mut self, changing: bool) -> Result<()> {
        let source = self.source()?;
        let mut copier =
            crate::store::copy::Copier::new(&source, &self.target, self.progress)?.of_changing();
        let mut quarantine = Quarantine::new(&self.target);
        let catalog = Some(self.volume.catalog());
        let mut files = HistoryFiles {
            source: &source,
            target: &self.target,
            catalog,
            changing,
            bounds: None,
            seen: &mut self.history_seen,
        };
        files.fill(&mut copier, &mut quarantine)?;
        self.gauge.copied.fetch_add(copier.bytes_written(), Ordering::Relaxed);
        Ok(())
    }

    fn sync_all(&self) -> Result<()> {
        use crate::error::IoContext;
        self.target.backing.sync_all().context("make durable", &self.target.path)
    }
}

/// Whether a disk answers, and takes a write, in time. The look may hang, and is left alone then.
fn answers(path: &Path) -> Result<()> {
    let (sender, receiver) = crossbeam_channel::bounded(1);
    let dir = path.join(crate::types::PRIVATE_DIR).join("tmp");
    let shown = dir.clone();
    let probe = move || {
        let file = dir.join("probe");
        let tried = std::fs::write(&file, b"probe")
            .and_then(|()| std::fs::File::open(&file)?.sync_all())
            .and_then(|()| std::fs::remove_file(&file));
        let _ = sender.send(tried);
    };
    std::thread::Builder::new().name("rv-probe".into()).spawn(probe).map_err(Error::from_io)?;
    match receiver.recv_timeout(PROBE_TIMEOUT) {
        Ok(tried) => {
            use crate::error::IoContext;
            tried.context("write to", shown)
        }
        Err(_) => Err(Error::Posix(Errno::TIMEDOUT)),
    }
}

/// The thread.
pub(super) fn run(volume: &Weak<Volume>, stopped: &Receiver<()>) {
    crate::sys::be_idle();
    let Some(every) = volume.upgrade().map(|volume| volume.options.housekeeping) else { return };
    loop {
        {
            let Some(volume) = volume.upgrade() else { return };
            volume.enter_failed();
            volume.probe_failed();
            while !volume.stopping.load(Ordering::Relaxed) {
                if !volume.resync_next() {
                    break;
                }
            }
        }
        match stopped.recv_timeout(every) {
            Ok(()) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

//! Bringing replicas back while the mount is in use.
//!
//! A replica that missed changes, or is new, is made equal to the others in rounds. The first
//! compares where the two can differ: where their catalogs do, and what was dirtied on the replica
//! since its last checkpoint if it failed while it was in use; or the whole tree where that is not
//! known. Each later one compares what was dirtied during the one before
//! ([`crate::replica::intent`]). When little is left, operations are stopped for the last round:
//! with it the replica's catalog joins the others and the replica is admitted. Killed anywhere, the
//! next resync finds what was copied and does not copy it again.
//!
//! One thread does it, at idle priority, one replica after another. It also looks after those that
//! failed: a replica whose disk answers again is brought back by itself, later and later if it
//! fails again.

mod admit;
mod brake;
mod commands;
mod foreign;
mod gauge;
mod mirror;
mod places;
mod rounds;
mod taking;
mod version;

use std::collections::BTreeMap;
use std::path::PathBuf;
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
use crate::replica::guarded::Directly;
use crate::replica::health::State;
use crate::replica::intent::DirtySet;
use crate::store::fill::history::{Seen, seen_by};
use crate::store::{Arrival, Fork};
use crate::sys::device::Alive;
use crate::types::ReplicaId;

use super::Volume;
use brake::{Brake, Pace};
pub use foreign::ForeignReport;
pub use gauge::Extent;
use gauge::Gauge;
use places::Places;
use rounds::Rounds;

/// How long after a failure a replica is looked at again; each further failure doubles it.
const RETRY_FIRST: Duration = Duration::from_secs(30);
/// The longest time between two looks.
const RETRY_MAX: Duration = Duration::from_secs(600);
/// A resync that takes no longer is waited for at the end of a mount.
const SHORT_RESYNC: Duration = Duration::from_secs(3);
/// How often it is looked whether it has ended.
const SHORT_POLL: Duration = Duration::from_millis(5);
/// The resyncs of a mounted store.
pub(super) struct Resyncs {
    jobs: Mutex<BTreeMap<ReplicaId, Job>>,
    /// Wakes the thread.
    kick: Mutex<Option<Sender<()>>>,
    /// Counts what is asked of the mount.
    activity: Arc<AtomicU64>,
    /// Slows changes down where a resync cannot keep up with them.
    pub(super) brake: Brake,
    /// Where the mount is, once it answers.
    mount: Mutex<Option<PathBuf>>,
    /// What others had done to the replicas that came back.
    reports: Mutex<BTreeMap<ReplicaId, ForeignReport>>,
    /// When those that did not answer at the beginning are looked at again, and how long is waited
    /// after that.
    silent: Mutex<(Instant, Duration)>,
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
            brake: Brake::default(),
            mount: Mutex::default(),
            reports: Mutex::default(),
            silent: Mutex::new((Instant::now() + RETRY_FIRST, RETRY_FIRST)),
        }
    }

    /// Something is asked of the mount: a resync steps aside.
    pub fn note_activity(&self) {
        self.activity.fetch_add(1, Ordering::Relaxed);
    }

    /// A number that grows with what is asked of the mount.
    pub fn activity(&self) -> u64 {
        self.activity.load(Ordering::Relaxed)
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

    /// The mount is over: a resync that needs no longer than a moment more ends well.
    pub fn finish_short(&self) {
        *self.mount.lock() = None;
        let begun = Instant::now();
        let is_busy = |job: &Job| matches!(job.stage, Stage::Ready(_) | Stage::Running(_));
        while self.jobs.lock().values().any(is_busy) && begun.elapsed() < SHORT_RESYNC {
            std::thread::sleep(SHORT_POLL);
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

    pub(super) fn enter(&self, arrival: Arrival, fork: Fork) {
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
            Stage::Failed(at) if *at <= Instant::now() => Some(Progressing::Waiting),
            Stage::Failed(at) => {
                Some(Progressing::Retry(at.saturating_duration_since(Instant::now())))
            }
            Stage::Parked => Some(Progressing::Parked),
            Stage::Done(_) => None,
        }
    }

    /// Notes replicas that went out of use since the last look.
    pub(super) fn enter_failed(&self) {
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
            let returned = match self.store.answers(&path) {
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

    /// Looks at those that did not answer when the store was opened, if it is time.
    fn probe_silent(&self) {
        let due = {
            let (next, wait) = &mut *self.resyncs.silent.lock();
            let due = *next <= Instant::now();
            if due {
                // Whoever else comes now leaves it to us.
                *next = Instant::now() + *wait;
            }
            due
        };
        let silent = if due { self.store.silent() } else { Vec::new() };
        for path in &silent {
            match self.store.answers(path).and_then(|()| self.store.spoke(path)) {
                Ok(arrival) => {
                    log::info!("{}: it answers and is brought in", path.display());
                    self.enter(arrival, Fork::Refuse);
                }
                // Its disk is not mounted yet.
                Err(error) if error.to_errno() == Errno::NOENT => {
                    log::debug!("{}: not brought in: {error}", path.display());
                }
                Err(error) => log::warn!("{}: not brought in: {error}", path.display()),
            }
        }
        if !silent.is_empty() {
            let (next, wait) = &mut *self.resyncs.silent.lock();
            (*next, *wait) = (Instant::now() + *wait, (*wait * 2).min(RETRY_MAX));
        }
    }

    /// A resync makes its calls itself and may hang in one ([`Directly`]): then it has failed, and
    /// what it hangs on is out of use. Its thread learns of it when the call returns, and does no
    /// other resync before.
    pub(super) fn give_up_hung(&self) {
        let hangs = |id: &ReplicaId| self.replicas().get(*id).guard().hangs();
        let hung: Vec<ReplicaId> = self.replicas().ids().filter(hangs).collect();
        if hung.is_empty() {
            return;
        }
        let jobs = self.resyncs.jobs.lock();
        let running = jobs.iter().filter(|(_, job)| matches!(job.stage, Stage::Running(_)));
        let running: Vec<(ReplicaId, Arc<AtomicBool>)> =
            running.map(|(id, job)| (*id, job.stop.clone())).collect();
        drop(jobs);
        // First: what returns just now must not go on as if nothing had been.
        running.iter().for_each(|(_, stop)| stop.store(true, Ordering::Relaxed));
        // Nobody is slowed down for a resync that there is no longer.
        self.resyncs.brake.release();
        let fault = || Fault::new("resync", Errno::TIMEDOUT);
        let gave_up = |id: &ReplicaId| self.replicas().get(*id).guard().give_up();
        let hung: Vec<ReplicaId> = hung.into_iter().filter(gave_up).collect();
        for id in hung.iter().filter(|id| self.replicas().is_online(**id)) {
            self.replicas().eject(*id, fault());
        }
        // Once, whether it hangs on one side or on both.
        for (id, _) in running.iter().filter(|_| !hung.is_empty()) {
            self.replicas().resync_failed(*id, fault());
            self.put_off(*id, &Errno::TIMEDOUT.into());
        }
    }

    fn put_off(&self, id: ReplicaId, error: &Error) {
        let path = self.replicas().get(id).path.clone();
        match error {
            Error::Interrupted => {
                log::info!("{}: its resync was stopped and goes on later", path.display());
            }
            error => log::warn!("{}: not brought back: {error}", path.display()),
        }
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
                let Extent { items, copied, .. } = gauge.extent();
                let took = gauge.begun.elapsed().as_secs_f64();
                log::info!(
                    "{}: resynced in {took:.1} s, {items} objects compared, {copied} bytes copied; \
                     it is in use",
                    path.display()
                );
                if let Some(job) = self.resyncs.jobs.lock().get_mut(&id) {
                    job.stage = Stage::Done(Instant::now());
                }
            }
            Err(error) if !self.is_of(id, &stop) => {
                log::info!("{}: the resync that hung has ended: {error}", path.display());
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

    /// Whether the job of a replica is the one with this signal, and was not put off meanwhile.
    fn is_of(&self, id: ReplicaId, stop: &Arc<AtomicBool>) -> bool {
        let jobs = self.resyncs.jobs.lock();
        jobs.get(&id).is_some_and(|job| Arc::ptr_eq(&job.stop, stop))
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
        let file = self.store.catalog_file(id);
        let own = match arrival.was_whole {
            true => {
                let file = file.clone();
                target.within("open the catalog in", move || Catalog::open_held(&file)).ok()
            }
            false => None,
        };
        if let Some(own) = &own {
            own.set_timeout(self.options.call_timeout);
        }
        let mut touched = DirtySet::default();
        if arrival.was_whole && (own.is_some() || fork == Fork::Take) {
            let _directly = Directly::on();
            touched = self.take_foreign(arrival, own.as_ref(), fork, &target, progress)?;
        }
        self.store.begin_resync(arrival)?;
        // A fork's catalog tells nothing of this store.
        let own = own.filter(|_| fork == Fork::Refuse);
        if fork == Fork::Take {
            taking::set_history_aside(&target)?;
        }
        // What is dirtied from here on is none of the first round's.
        let dirty = self.track_dirty();
        let mut places = Places::default();
        match &own {
            Some(own) => {
                own.live_dirs(&mut |node, parent, name| places.put(node, parent, &name))?;
            }
            None => places::find_aside(&target, &mut places)?,
        }
        let mut differing = None;
        if let (Some(doubtful), true) = (&arrival.doubtful, own.is_some()) {
            // But for what is doubtful its catalog tells its tree exactly: only that, and where the
            // store's differs, is to be looked at.
            let comparing = self.catalog().comparing(&file)?;
            let compare = move |alive: &Alive| comparing.run(alive);
            let found = target.within_alive("compare the catalog in", compare)?;
            places.all_done();
            progress.begin("", (found.files.len() + found.dirs.len()) as u64, found.bytes);
            touched.files.extend(found.files);
            touched.dirs.extend(found.dirs);
            touched.join(doubtful);
            differing = Some(touched);
        } else {
            let totals = self.catalog().totals()?;
            progress.begin("", totals.live_nodes, totals.live_bytes + totals.history_bytes());
        }
        let history_seen = match &own {
            Some(own) if arrival.was_clean => seen_by(own)?,
            _ => Seen::new(),
        };
        let mut rounds = Rounds {
            volume: self,
            arrival,
            target,
            places,
            own,
            differing,
            gauge,
            progress,
            dirty,
            history_seen,
            pace: Pace::new(&self.resyncs.brake),
            last: false,
        };
        rounds.run()
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
            volume.probe_silent();
            while !volume.is_stopping() {
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

//! Scrub: reading every copy of everything while the store is in use, and healing what is damaged.
//!
//! A run looks at the catalogs and our other small files, then at preserved contents, packs and
//! live objects, each in the order of their ids, going on where the last run ended. So what was
//! looked at longest ago comes first, without a record for every file. The default plan is
//! SnapRAID's: a part of each per run, and nothing live that is younger than ten days; `all` looks
//! at everything.
//!
//! **What is good** is what the catalog says: attributes as recorded, bytes with the recorded
//! digest. Where no digest is known yet the majority of the replicas counts; of two that differ
//! neither is touched. Nothing is healed from a copy that is not proven good, and what healing
//! replaces goes to `quarantine/`. Bytes that differ while the time of change is later than
//! recorded are no rot but an edit behind our back: they become a version.
//!
//! Whatever a run looks at, it looks at without locks first. What seems damaged is looked at again
//! under the locks of an operation on it, and healed there. What is being changed is passed over
//! and looked at once more at the end.
//!
//! If we die in between, the run goes on from its last saved position when the store is mounted
//! again; each step of healing leaves either the damage or the good copy, and the replaced bytes in
//! quarantine.

mod heal;
mod kept;
mod live;
mod names;
mod pace;
mod report;

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::catalog::{Change, Totals};
use crate::error::{Error, Result};
use crate::sys::device::Alive;
use crate::types::{NodeId, Timestamp};

pub use report::{Outcome, ScrubFinding, ScrubOptions, ScrubRun, ScrubStatus, Trouble};

use super::Volume;
use live::Looked;
use pace::Pace;
use report::{Plan, Position, Stage};

/// The plan's place in the catalog.
const META_KEY: &str = "scrub";
/// A run looks at so much of it all unless told otherwise (SnapRAID's default), in percent.
const PERCENT_DEFAULT: u8 = 8;
/// What is younger is left out unless all is asked for (SnapRAID's default).
const YOUNG: Duration = Duration::from_secs(10 * 24 * 3600);
/// What looking at an object costs beside its bytes, in bytes: so that small files count.
const OBJECT_BYTES: u64 = 4096;
/// Objects that are fetched from the catalog at a time.
const BATCH: usize = 256;
/// How often it is looked whether the policy asks for a run.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// How often the position is saved, and told to whoever asks.
const SAVE_EVERY: Duration = Duration::from_secs(10);
const TELL_EVERY: Duration = Duration::from_millis(200);
/// How often objects that were being changed are looked at again before they are given up.
const BUSY_ROUNDS: usize = 5;

/// The scrub of a volume.
#[derive(Default)]
pub(super) struct Scrub {
    inner: Mutex<Inner>,
    wake: Condvar,
    /// Files of which a copy could not be read.
    suspects: Mutex<BTreeSet<NodeId>>,
}

#[derive(Default)]
struct Inner {
    /// The plan as it is now; `None` until it was read.
    plan: Option<Plan>,
    /// A run is to end or to pause.
    halt: bool,
    /// The thread works on a run.
    working: bool,
    /// By it a look ends that takes long.
    looking: Alive,
    /// When it was last looked whether a run is due.
    looked: Option<Instant>,
}

impl Volume {
    /// Begins a run, or lets a paused one go on. `InUse` if one is under way.
    pub fn scrub_start(&self, options: ScrubOptions, automatic: bool) -> Result<()> {
        let goal = self.scrub_goal(&options)?;
        self.change_plan(|plan| {
            if plan.run.as_ref().is_some_and(|run| !run.paused) {
                return Err(Error::InUse(
                    "a scrub is under way: 'rearview scrub status' shows it, 'rearview scrub stop' \
                     ends it"
                        .into(),
                ));
            }
            if options.all {
                (plan.at, plan.lap_began) = (Position::default(), Timestamp::now().as_nanos());
            }
            plan.run = Some(ScrubRun::new(options, automatic, goal));
            Ok(())
        })
    }

    /// Pauses the run that is under way; it stays so over a remount.
    pub fn scrub_pause(&self) -> Result<()> {
        self.change_run("pause", |plan| {
            if let Some(run) = &mut plan.run {
                run.paused = true;
            }
        })
    }

    /// Lets a paused run go on.
    pub fn scrub_resume(&self) -> Result<()> {
        self.change_run("resume", |plan| {
            if let Some(run) = &mut plan.run {
                run.paused = false;
            }
        })
    }

    /// Ends the run that is under way. The next one goes on from there.
    pub fn scrub_stop(&self) -> Result<()> {
        self.change_run("stop", |plan| plan.end_run(true, true))
    }

    /// How the scrub stands.
    pub fn scrub_status(&self) -> Result<ScrubStatus> {
        let mut inner = self.scrub.inner.lock();
        Ok(self.plan(&mut inner)?.status())
    }

    /// Waits until no run is under way, or `time` is over; whether none is.
    pub fn scrub_wait(&self, time: Duration) -> Result<bool> {
        let until = Instant::now() + time;
        let mut inner = self.scrub.inner.lock();
        loop {
            let idle = self.plan(&mut inner)?.run.as_ref().is_none_or(|run| run.paused);
            if idle && !inner.working {
                return Ok(true);
            }
            if self.scrub.wake.wait_until(&mut inner, until).timed_out() {
                return Ok(false);
            }
        }
    }

    /// Says who is told of objects that are not what they were, although nobody changed them by way
    /// of the volume: what was read of them before may be wrong. Called without any lock.
    pub fn on_healed(&self, told: Box<dyn Fn(NodeId) + Send + Sync>) {
        let _ = self.healed.set(told);
    }

    fn tell_healed(&self, node: NodeId) {
        if let Some(told) = self.healed.get() {
            told(node);
        }
    }

    /// Ends what the scrub looks at; once the volume is to be closed.
    pub(super) fn scrub_end_look(&self) {
        self.scrub.inner.lock().looking.end();
    }

    /// Notes a file of which a copy could not be read: it is looked at soon.
    pub(super) fn suspect(&self, node: NodeId) {
        self.scrub.suspects.lock().insert(node);
    }

    fn change_run(&self, what: &str, change: impl FnOnce(&mut Plan)) -> Result<()> {
        self.change_plan(|plan| {
            if plan.run.is_none() {
                return Err(Error::NotFound(format!("there is no scrub to {what}")));
            }
            change(plan);
            Ok(())
        })
    }

    fn change_plan(&self, change: impl FnOnce(&mut Plan) -> Result<()>) -> Result<()> {
        let mut inner = self.scrub.inner.lock();
        change(self.plan(&mut inner)?)?;
        inner.halt = true;
        inner.looking.end();
        self.save(&inner)?;
        self.scrub.wake.notify_all();
        Ok(())
    }

    fn plan<'a>(&self, inner: &'a mut Inner) -> Result<&'a mut Plan> {
        if inner.plan.is_none() {
            let stored = self.catalog().meta(META_KEY)?;
            let known = stored.and_then(|text| serde_json::from_str(&text).ok());
            inner.plan = Some(known.unwrap_or_default());
        }
        inner.plan.as_mut().ok_or(Error::Interrupted)
    }

    fn save(&self, inner: &Inner) -> Result<()> {
        let Some(plan) = &inner.plan else { return Ok(()) };
        let value = serde_json::to_string(plan)
            .map_err(|error| Error::Refused(format!("cannot write the scrub's plan: {error}")))?;
        self.catalog().push(vec![Change::MetaPut { key: META_KEY, value }])?;
        Ok(())
    }

    /// What a run has to look at, in bytes.
    fn scrub_goal(&self, options: &ScrubOptions) -> Result<u64> {
        let totals = self.catalog().totals()?;
        Ok([live_units(&totals), totals.whole_bytes(), totals.packed_bytes]
            .iter()
            .map(|all| share(options, *all))
            .sum())
    }

    /// Begins a run if the store's policy asks for one.
    fn scrub_by_policy(&self) -> Result<()> {
        let every = self.policy().scrub;
        {
            let mut inner = self.scrub.inner.lock();
            if inner.looked.is_some_and(|at| at.elapsed() < LOOK_EVERY) || every.is_zero() {
                return Ok(());
            }
            inner.looked = Some(Instant::now());
            let now = Timestamp::now().as_nanos();
            let plan = self.plan(&mut inner)?;
            if plan.since == 0 {
                plan.since = now;
                return self.save(&inner);
            }
            let due = every.even_before(Timestamp::from_nanos(now)).as_nanos();
            if plan.run.is_some() || plan.last_began() > due {
                return Ok(());
            }
        }
        log::info!("scrub: begun by the store's policy");
        self.scrub_start(ScrubOptions::default(), true)
    }

    /// One look of the thread: suspects first, then the run that is under way.
    fn scrub_due(&self) -> Result<()> {
        self.scrub_by_policy()?;
        // What a person wanted to end before has ended.
        self.scrub.inner.lock().halt = false;
        let mut suspects = std::mem::take(&mut *self.scrub.suspects.lock()).into_iter();
        let mut work = Work::new(self, ScrubRun::default());
        let mut failed = None;
        while let Some(node) = suspects.next() {
            let looked = work.node(node);
            if !looked.as_ref().is_ok_and(|looked| *looked != Looked::Busy) {
                self.suspect(node);
            }
            if let Err(error) = looked {
                self.scrub.suspects.lock().extend(suspects);
                failed = Some(error);
                break;
            }
        }
        if work.run.found > 0 {
            let mut inner = self.scrub.inner.lock();
            if self.plan(&mut inner)?.note_damage(&work.run) {
                self.save(&inner)?;
            }
        }
        match failed {
            Some(Error::Interrupted) => return Ok(()),
            Some(error) => return Err(error),
            None => {}
        }
        let run = {
            let mut inner = self.scrub.inner.lock();
            inner.halt = false;
            let run = self.plan(&mut inner)?.run.clone().filter(|run| !run.paused);
            inner.working = run.is_some();
            run
        };
        let Some(run) = run else { return Ok(()) };
        let mut work = Work::new(self, run);
        let outcome = work.run();
        let mut inner = self.scrub.inner.lock();
        inner.working = false;
        work.merge(self.plan(&mut inner)?, outcome.is_ok());
        let saved = self.save(&inner);
        self.scrub.wake.notify_all();
        drop(inner);
        match outcome {
            Err(Error::Interrupted) => saved,
            outcome => outcome.and(saved),
        }
    }
}

/// What looking at the whole live tree costs, in bytes.
fn live_units(totals: &Totals) -> u64 {
    totals.live_bytes + totals.live_nodes * OBJECT_BYTES
}

/// How much of it a run looks at.
fn share(options: &ScrubOptions, all: u64) -> u64 {
    let percent = match options.all {
        true => 100,
        false => options.percent.unwrap_or(PERCENT_DEFAULT).clamp(1, 100),
    };
    // Of little there is a part as well, or it would never be looked at.
    (u128::from(all) * u128::from(percent)).div_ceil(100) as u64
}

/// One run, or a part of it.
struct Work<'a> {
    volume: &'a Volume,
    run: ScrubRun,
    at: Position,
    lap_began: i64,
    pace: Pace,
    saved: Instant,
    told: Instant,
    /// Numbers what goes to quarantine within one nanosecond.
    quarantined: u64,
}

impl<'a> Work<'a> {
    fn new(volume: &'a Volume, run: ScrubRun) -> Work<'a> {
        let pace = Pace::new(run.options.rate);
        let inner = volume.scrub.inner.lock();
        let plan = inner.plan.as_ref();
        let (at, lap_began) = plan.map(|plan| (plan.at, plan.lap_began)).unwrap_or_default();
        let now = Instant::now();
        Work { volume, run, at, lap_began, pace, saved: now, told: now, quarantined: 0 }
    }

    /// Goes on with the part that is under way.
    fn run(&mut self) -> Result<()> {
        loop {
            self.run.stage = match self.run.stage {
                Stage::Own => {
                    self.catalogs()?;
                    self.own_files()?;
                    self.segments()?;
                    Stage::Preserved
                }
                Stage::Preserved => {
                    self.preserved()?;
                    Stage::Packs
                }
                Stage::Packs => {
                    self.packs()?;
                    Stage::Live
                }
                Stage::Live => return self.live(),
            };
            self.run.stage_units = 0;
            self.save()?;
        }
    }

    /// Whether the part that is under way, of so much in all, is to go on.
    fn goes_on(&self, all: u64) -> bool {
        self.run.options.all || self.run.stage_units < share(&self.run.options, all)
    }

    /// So much of the part that is under way, of so much in all, was looked at, up to what
    /// `self.at` tells.
    fn did(&mut self, units: u64, all: u64) -> Result<()> {
        // The last object may be larger than what was left to do.
        let left = share(&self.run.options, all).saturating_sub(self.run.stage_units);
        self.run.units += units.min(left);
        self.run.stage_units += units;
        if self.saved.elapsed() >= SAVE_EVERY {
            self.save()?;
        } else if self.told.elapsed() >= TELL_EVERY {
            let mut inner = self.volume.scrub.inner.lock();
            self.tell(self.volume.plan(&mut inner)?);
        }
        self.check_halt()
    }

    /// Looks at live objects from the position on, until the goal is reached.
    fn live(&mut self) -> Result<()> {
        let mut busy = Vec::new();
        let mut wrapped = false;
        // What busy programs make meanwhile is the next run's: else this one might never end.
        let until = self.volume.catalog().upcoming_node();
        let all = live_units(&self.volume.catalog().totals()?);
        while self.goes_on(all) {
            let mut batch = self.volume.catalog().live_nodes(self.at.node, BATCH)?;
            batch.retain(|object| object.node < until);
            if batch.is_empty() {
                // What is looked at once more before ten days are over teaches nothing.
                let young = self.is_young(self.lap_began);
                if self.run.options.all || wrapped || young {
                    break;
                }
                (self.at.node, self.lap_began, wrapped) =
                    (NodeId(0), Timestamp::now().as_nanos(), true);
                continue;
            }
            for object in batch {
                if !self.goes_on(all) {
                    break;
                }
                if self.run.options.all || !self.is_young(object.changed.as_nanos()) {
                    if self.node(object.node)? == Looked::Busy {
                        busy.push(object.node);
                    }
                    self.run.objects += 1;
                }
                self.at.node = object.node;
                self.did(object.size + OBJECT_BYTES, all)?;
            }
        }
        self.look_again(busy)
    }

    /// What was being changed is looked at once more, and given up where it is changed on and on.
    fn look_again(&mut self, mut busy: Vec<NodeId>) -> Result<()> {
        for round in 0..BUSY_ROUNDS {
            if busy.is_empty() {
                return Ok(());
            }
            if round > 0 {
                self.pause(self.volume.options.housekeeping)?;
            }
            let mut left = Vec::new();
            for node in busy {
                if self.node(node)? == Looked::Busy {
                    left.push(node);
                }
            }
            busy = left;
        }
        self.run.busy += busy.len() as u64;
        Ok(())
    }

    fn is_young(&self, nanos: i64) -> bool {
        let age = Timestamp::now().as_nanos().saturating_sub(nanos);
        age < i64::try_from(YOUNG.as_nanos()).unwrap_or(i64::MAX)
    }

    /// Makes the run's state known, and durable with the next commit.
    fn save(&mut self) -> Result<()> {
        self.saved = Instant::now();
        let mut inner = self.volume.scrub.inner.lock();
        self.tell(self.volume.plan(&mut inner)?);
        self.volume.save(&inner)
    }

    /// Makes the run's state known; not if a person has ended it meanwhile, and may have begun
    /// another.
    fn tell(&mut self, plan: &mut Plan) {
        self.told = Instant::now();
        if let Some(run) = plan.run.as_mut().filter(|run| run.began == self.run.began) {
            let paused = run.paused;
            run.clone_from(&self.run);
            run.paused = paused;
            (plan.at, plan.lap_began) = (self.at, self.lap_began);
        }
    }

    /// Takes what was done into the plan, which a person may have changed meanwhile.
    fn merge(&mut self, plan: &mut Plan, done: bool) {
        let same = |run: &ScrubRun| run.began == self.run.began;
        // One that was begun since has a position of its own.
        if plan.run.as_ref().is_none_or(same) {
            (plan.at, plan.lap_began) = (self.at, self.lap_began);
        }
        if plan.run.as_ref().is_some_and(same) {
            let paused = plan.run.as_ref().is_some_and(|run| run.paused);
            self.run.paused = paused;
            plan.run = Some(self.run.clone());
            if done {
                let replicas = self.volume.replicas();
                plan.end_run(false, !replicas.ids().all(|id| replicas.is_online(id)));
            }
        } else if plan.last.as_ref().is_some_and(same) {
            let ended = plan.last.as_ref().and_then(|run| run.ended);
            plan.note_damage(&self.run);
            plan.last = Some(ScrubRun { ended, stopped: true, ..self.run.clone() });
        }
    }

    /// Bytes were read: waits as the rate asks for, and ends where the run is to end.
    fn took(&mut self, bytes: u64) -> Result<()> {
        self.run.bytes += bytes;
        let wait = self.pace.took(bytes);
        if wait.is_zero() { self.check_halt() } else { self.pause(wait) }
    }

    fn check_halt(&self) -> Result<()> {
        let halt = self.volume.scrub.inner.lock().halt || self.volume.is_stopping();
        if halt { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Sleeps, unless the run is to end.
    fn pause(&self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        let mut inner = self.volume.scrub.inner.lock();
        while !inner.halt && Instant::now() < until {
            // In steps, for the end of the mount does not wake us.
            let step = (Instant::now() + Duration::from_millis(100)).min(until);
            self.volume.scrub.wake.wait_until(&mut inner, step);
            if self.volume.is_stopping() {
                break;
            }
        }
        drop(inner);
        self.check_halt()
    }
}

/// The thread of the scrub.
pub(super) fn run(volume: &Weak<Volume>, stopped: &crossbeam_channel::Receiver<()>) {
    crate::sys::be_idle();
    let every = volume
        .upgrade()
        .map_or(Duration::from_secs(1), |volume: Arc<Volume>| volume.options.housekeeping);
    let mut told = None;
    // A disconnect is the signal to stop; nothing is ever sent.
    while let Err(crossbeam_channel::RecvTimeoutError::Timeout) =
        stopped.recv_timeout(every.min(Duration::from_millis(200)))
    {
        let Some(volume) = volume.upgrade() else { return };
        let outcome = volume.scrub_due().map_err(|error| error.to_string()).err();
        if outcome.is_some() && outcome != told {
            log::error!("scrub: {}", outcome.as_deref().unwrap_or_default());
        }
        told = outcome;
    }
}

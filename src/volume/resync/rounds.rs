//! The rounds of one resync.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::super::Volume;
use super::super::intend::Tracker;
use super::brake::Pace;
use super::gauge::Gauge;
use super::mirror::Mirror;
use super::places::Places;
use crate::catalog::Catalog;
use crate::error::{Error, IoContext, Result};
use crate::progress::Progress;
use crate::replica::guarded::Directly;
use crate::replica::intent::DirtySet;
use crate::store::Arrival;
use crate::store::copy::Copier;
use crate::store::fill::history::{Doubt, History as HistoryFiles, Seen};
use crate::store::quarantine::Quarantine;
use crate::store::site::Site;
use crate::types::NodeId;

/// After so many rounds the catalog is copied, however much is dirtied meanwhile.
const ROUNDS_MAX: usize = 12;

/// After a round that took no longer the rest is no idle work any more.
const SHORT: Duration = Duration::from_secs(30);

/// What one round is to make equal.
#[derive(Default)]
pub(super) struct Due {
    pub set: DirtySet,
    /// Directories whose times alone may differ: what happened in them was looked at.
    pub stale: Vec<NodeId>,
    /// How many objects were dirtied.
    pub dirtied: usize,
}

/// What lasts over the rounds of one resync.
pub(super) struct Rounds<'a> {
    pub volume: &'a Volume,
    pub arrival: &'a Arrival,
    pub target: Site,
    pub places: Places,
    /// What the replica's own catalog tells, while that is believed.
    pub own: Option<Catalog>,
    /// All that can differ, if that is known.
    pub differing: Option<DirtySet>,
    pub gauge: &'a Arc<Gauge>,
    pub progress: &'a Progress,
    pub dirty: Tracker<'a>,
    pub history_seen: Seen,
    pub pace: Pace<'a>,
    /// The last round has begun: others wait for us.
    pub last: bool,
}

impl Rounds<'_> {
    /// Does all of them.
    pub fn run(&mut self) -> Result<()> {
        let outcome = self.do_all();
        crate::sys::be_idle();
        outcome
    }

    fn do_all(&mut self) -> Result<()> {
        let differing = self.differing.take();
        let differing = differing.map(|set| Due { set, ..Due::default() });
        let begun = Instant::now();
        self.round(differing.as_ref())?;
        if differing.is_some() {
            // Of a new replica, and of one that is compared as a whole, history can be by far the
            // larger part.
            self.hurry_after(begun);
        }
        self.history(true)?;
        self.pace.round_took(begun.elapsed());
        self.hurry_after(begun);
        // The copy of the catalog takes its time as well: what it makes dirty comes after it.
        self.catch_up(ROUNDS_MAX)?;
        // What the target's catalog told is used up, and the catalog is replaced.
        self.own = None;
        self.pace.anew();
        let file = self.volume.store.catalog_file(self.arrival.id);
        let (progress, catalog) = (self.progress.clone(), self.volume.catalog());
        let copy = |alive: &dyn Fn()| {
            let step = &mut || {
                alive();
                progress.advance(0, 0)
            };
            catalog.copy_live(self.arrival.id, &file, step)
        };
        let mut joining = self.target.directly("copy the catalog to", copy)?;
        self.catch_up(1)?;
        self.sync_all()?;
        joining.catch_up()?;
        self.finish(joining)
    }

    /// Makes equal what differs, until so little does that it takes no time, or `most` times.
    pub fn catch_up(&mut self, most: usize) -> Result<()> {
        for _ in 0..most {
            let begun = Instant::now();
            self.history(true)?;
            let due = self.next_due();
            self.round(Some(&due))?;
            if self.pace.round_took(begun.elapsed()) {
                break;
            }
            self.hurry_after(begun);
        }
        Ok(())
    }

    /// Where programs leave no processor idle, an idle thread never catches up with them. Once a
    /// round is short, or they are slowed down for it, it is better over soon.
    fn hurry_after(&self, begun: Instant) {
        if self.pace.is_braking() || begun.elapsed() < SHORT {
            self.hurry();
        }
    }

    /// As long as nobody waits for us, nobody else makes our calls.
    fn directly(&self) -> Option<Directly> {
        (!self.last).then(Directly::on)
    }

    /// From here on others wait for us, and we for nobody.
    pub fn hurry(&self) {
        if !self.gauge.hurry.swap(true, Ordering::Relaxed) {
            crate::sys::be_normal();
        }
    }

    /// The replica that is copied from: one in use.
    pub fn source(&self) -> Result<Site> {
        let id = self.volume.replicas().primary().ok_or(Error::Posix(Errno::IO))?;
        Ok(self.volume.store.site(id))
    }

    /// What was dirtied since the last call, and what is not settled yet.
    pub fn next_due(&mut self) -> Due {
        let mut set = self.dirty.next();
        let dirtied = set.files.len() + set.dirs.len();
        set.files.extend(self.volume.unsealed.lock().keys());
        let stale = self.volume.stale_dirs.lock().difference(&set.dirs).copied().collect();
        Due { set, stale, dirtied }
    }

    /// One round over what is due, or over everything.
    pub fn round(&mut self, due: Option<&Due>) -> Result<()> {
        let _directly = self.directly();
        let source = self.source()?;
        let since = self.arrival.apart_since;
        let sides = (&source, &self.target);
        let mut mirror = Mirror::new(self.volume, sides, &mut self.places, self.progress, since)?;
        mirror.own = self.own.as_ref();
        match due {
            Some(due) => mirror.due(due)?,
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
        Ok(())
    }

    /// Makes the history files equal; `changing` while operations run.
    pub fn history(&mut self, changing: bool) -> Result<()> {
        let _directly = self.directly();
        let source = self.source()?;
        let mut copier = Copier::new(&source, &self.target, self.progress)?;
        if changing {
            copier = copier.of_changing();
        }
        let mut quarantine = Quarantine::new(&self.target);
        let mut files = HistoryFiles {
            source: &source,
            target: &self.target,
            catalog: Some(self.volume.catalog()),
            changing,
            doubt: match &self.arrival {
                Arrival { was_clean: true, .. } => Doubt::Undo,
                Arrival { doubtful: Some(dirty), .. } => Doubt::Dirty(dirty),
                _ => Doubt::All,
            },
            sealed_before: self.volume.history.undo().first_open(),
            seen: &mut self.history_seen,
        };
        files.fill(&mut copier, &mut quarantine)?;
        self.gauge.copied.fetch_add(copier.bytes_written(), Ordering::Relaxed);
        Ok(())
    }

    /// Makes all of the replica durable.
    pub fn sync_all(&self) -> Result<()> {
        self.target.backing.sync_all().context("make durable", &self.target.path)
    }
}

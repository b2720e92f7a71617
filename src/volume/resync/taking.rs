//! Before a replica is resynced: what others changed on it, taken in.

use std::path::PathBuf;
use std::time::Duration;

use super::super::Volume;
use super::foreign::{Foreign, ForeignReport};
use crate::catalog::Catalog;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::replica::intent::DirtySet;
use crate::store::quarantine::Quarantine;
use crate::store::site::{Site, private};
use crate::store::{Arrival, Fork};
use crate::types::{ReplicaId, Timestamp};

/// What was in flight when a replica left was at most so much later than its last commit.
const IN_FLIGHT_NANOS: i64 = 2_000_000_000;
/// `FUSE_SUPER_MAGIC` of statfs(2).
const FUSE_MAGIC: i64 = 0x6573_5546;
/// How often it is looked whether the mount answers.
const MOUNT_POLL: Duration = Duration::from_millis(20);

impl Volume {
    /// What others had changed on a replica that came back in this mount.
    pub fn foreign_report(&self, id: ReplicaId) -> Option<ForeignReport> {
        self.resyncs.reports.lock().get(&id).cloned()
    }

    /// Tells where the mount is, once it answers: what others changed on a replica is taken in by
    /// way of it.
    pub fn serving_at(&self, mountpoint: PathBuf) {
        *self.resyncs.mount.lock() = Some(mountpoint);
    }

    /// Takes in what others changed on a replica while it was away. Returns where it was found.
    pub(super) fn take_foreign(
        &self,
        arrival: &Arrival,
        own: Option<&Catalog>,
        fork: Fork,
        target: &Site,
        progress: &Progress,
    ) -> Result<DirtySet> {
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
        let Some(mount) = self.mount_site(progress)? else { return Ok(DirtySet::default()) };
        let mut foreign =
            Foreign::new(self, known, (target, &mount), progress, (since, left, take));
        foreign.run()?;
        if foreign.report.count > 0 {
            self.resyncs.reports.lock().insert(arrival.id, foreign.report);
        }
        Ok(foreign.touched)
    }

    /// The mount, as something to work in; `None` for a volume that is not mounted.
    fn mount_site(&self, progress: &Progress) -> Result<Option<Site>> {
        if !self.options.mounted {
            return Ok(None);
        }
        loop {
            {
                // Held, so that the end of the mount is not missed; what is open keeps it from
                // ending.
                let mount = self.resyncs.mount.lock();
                if let Some(mount) = &*mount {
                    let site = Site::open(mount)?;
                    let kind = rustix::fs::statfs(mount).map_err(Error::Posix)?.f_type;
                    // What lies below the mountpoint is not ours.
                    if kind == FUSE_MAGIC {
                        return Ok(Some(site));
                    }
                }
            }
            progress.advance(0, 0)?;
            std::thread::sleep(MOUNT_POLL);
        }
    }
}

/// Moves a fork's history to quarantine: its ids mean other things than the store's.
pub(super) fn set_history_aside(target: &Site) -> Result<()> {
    let mut quarantine = Quarantine::new(target);
    let path = private("");
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

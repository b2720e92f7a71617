//! What a person asks for: replicas that are to leave, return, come and be given up.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::super::Volume;
use super::{Job, RETRY_FIRST, Stage};
use crate::catalog::Durability;
use crate::error::{Error, Result};
use crate::replica::Fault;
use crate::store::Fork;
use crate::types::ReplicaId;

impl Volume {
    /// Takes a replica out of use until it is brought back by hand.
    pub fn replica_offline(&self, name: &str) -> Result<ReplicaId> {
        let id = self.store.named(name)?;
        self.refuse_last(id, "taken offline")?;
        self.stop_resync(id);
        if self.replicas().is_online(id) {
            self.let_go(id)?;
        }
        let (stop, wait) = (Arc::default(), RETRY_FIRST);
        let job = Job { stage: Stage::Parked, stop, wait, fork: Fork::Refuse };
        self.resyncs.jobs.lock().insert(id, job);
        Ok(id)
    }

    /// Takes a replica out of use with all that was done so far whole on it and in its catalog, so
    /// that what it misses is known exactly when it returns.
    fn let_go(&self, id: ReplicaId) -> Result<()> {
        // Most is sealed before anybody has to wait.
        self.settle()?;
        self.catalog().flush(Durability::Durable)?;
        let head = {
            let cut = self.stop_changes();
            self.settle_in(&cut);
            self.catalog().flush(Durability::Durable)?;
            self.replicas().eject(id, Fault::by_hand());
            self.store.head_of(id)
        };
        match head.and_then(|head| self.store.left(id, &head)) {
            Ok(()) => {}
            Err(error) => {
                let path = self.replicas().get(id).path.clone();
                log::warn!("{}: taken offline, but not cleanly: {error}", path.display());
            }
        }
        Ok(())
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
            None if !self.store.is_replica_at(Path::new(name))? => {
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
        self.store.check_empty(path)?;
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

    /// Backings that did not answer when the store was opened: they come when they do.
    pub fn silent(&self) -> Vec<PathBuf> {
        self.store.silent()
    }

    /// Has every replica that failed, or did not answer, looked at now.
    pub fn resync_now(&self) {
        self.enter_failed();
        self.resyncs.silent.lock().0 = Instant::now();
        // Here, so that whoever waits for the resyncs knows of theirs.
        self.probe_silent();
        for job in self.resyncs.jobs.lock().values_mut() {
            if let Stage::Failed(at) = &mut job.stage {
                *at = Instant::now();
            }
        }
        self.resyncs.wake();
    }
}

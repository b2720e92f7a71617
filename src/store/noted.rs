//! What the replicas in use have on record of the store while it is in use: their markers, and the
//! other files by which one is known.
//!
//! A replica whose device does not take its marker is out of use like one on which an operation
//! failed, and the others have that on record before anything else is.

use std::path::PathBuf;

use parking_lot::MutexGuard;

use super::Store;
use super::lock::LOCK_FILE;
use super::marker::{MARKER_FILE, Marker, PeerState};
use super::member::Member;
use super::site::private;
use crate::error::{Error, Result};
use crate::replica::intent::format::LOG_FILE;
use crate::retention::StorePolicy;
use crate::types::{ReplicaId, Timestamp};

impl Store {
    /// The record of a replica in use.
    pub fn current_marker(&self) -> Option<Marker> {
        let members = self.members.lock();
        members.iter().find(|member| !member.stale).map(|member| member.marker.clone())
    }

    /// What the store keeps.
    pub fn policy(&self) -> StorePolicy {
        let members = self.members.lock();
        let current = members.iter().find(|member| !member.stale);
        current.map(|member| member.marker.policy.clone()).unwrap_or_default()
    }

    /// Changes what the store keeps, durably in the markers of all replicas in use. If we die
    /// midway, the next mount gives all of them the same again, the old or the new one. `Refused`
    /// for a policy that cannot be meant; fails otherwise only if no replica can note it.
    pub fn set_policy(&self, policy: &StorePolicy) -> Result<()> {
        policy.check()?;
        let members = self.members.lock();
        let before = members.iter().filter_map(|member| member.marker.policy_changed).max();
        // Later than the last change, whatever the clock says.
        let changed = Timestamp::now().as_nanos().max(before.map_or(0, |at| at.saturating_add(1)));
        self.note(members, &mut |marker| {
            marker.policy.clone_from(policy);
            marker.policy_changed = Some(changed);
        })
    }

    /// Notes, durably in the markers of the others, that the store goes on without this replica.
    /// Fails only if no other can note it.
    pub fn mark_stale(&self, replica: ReplicaId, reason: &str) -> Result<()> {
        let mut members = self.members.lock();
        let stale = &mut members[replica.index()];
        stale.stale = true;
        let stale = stale.marker.replica;
        self.note(members, &mut |marker| {
            if let Some(peer) = marker.peers.iter_mut().find(|peer| peer.replica == stale) {
                peer.state = PeerState::Stale;
                peer.reason = crate::types::escape(reason.as_bytes()).chars().take(1000).collect();
            }
        })
    }

    /// Changes the markers of all current members, durably. Fails only if none can note it.
    pub(super) fn note(
        &self,
        mut members: MutexGuard<'_, Vec<Member>>,
        change: &mut dyn FnMut(&mut Marker),
    ) -> Result<()> {
        let mut failed = Vec::new();
        let mut noted = false;
        for (id, member) in ReplicaId::all().zip(&mut *members).filter(|(_, one)| !one.stale) {
            change(&mut member.marker);
            match member.write_marker() {
                Ok(()) => noted = true,
                Err(error) => failed.push((id, error)),
            }
        }
        // Whoever is taken out of use is noted by the others.
        drop(members);
        for (id, error) in &failed {
            self.blame(*id, MARKER_FILE, error);
        }
        match failed.pop() {
            Some((_, error)) if !noted => Err(error),
            _ => Ok(()),
        }
    }

    /// One of our own files cannot be written on a replica.
    fn blame(&self, id: ReplicaId, name: &str, error: &Error) {
        log::error!("replica {}: {error}", id.index());
        self.replicas.blame(id, "write", private(name), error.to_errno());
    }

    /// Reads the markers and locks of all replicas in use, and the intent logs, and writes those
    /// anew that are not what we wrote. Returns those, and how that went.
    pub fn check_own_files(&self) -> Vec<(ReplicaId, PathBuf, Result<()>)> {
        let mut members = self.members.lock();
        let mut found = Vec::new();
        for id in self.replicas.online() {
            let Some(member) = members.get_mut(id.index()).filter(|member| !member.stale) else {
                continue;
            };
            let written = Marker::read(&member.site);
            if !written.is_ok_and(|written| written.as_ref() == Some(&member.marker)) {
                found.push((id, MARKER_FILE, member.write_marker()));
            }
            if let Some(healed) = member.lock.as_mut().and_then(|lock| lock.heal(&member.site)) {
                found.push((id, LOCK_FILE, healed));
            }
            if let Some(healed) = self.intents.heal(&self.replicas, id) {
                found.push((id, LOG_FILE, healed.map_err(Error::from_io)));
            }
        }
        let path = |id: ReplicaId, name| members[id.index()].site.private_path(name);
        let paths: Vec<PathBuf> = found.iter().map(|(id, name, _)| path(*id, name)).collect();
        drop(members);
        let told = found.into_iter().zip(paths).map(|((id, name, healed), path)| {
            healed.as_ref().err().iter().for_each(|error| self.blame(id, name, error));
            (id, path, healed)
        });
        told.collect()
    }
}

//! One replica of an open store: its backing, its marker, its lock.

use std::path::PathBuf;

use rustix::io::Errno;
use uuid::Uuid;

use super::lock::StoreLock;
use super::marker::{CleanMark, Marker, Peer, PeerState, Phase};
use super::site::Site;
use super::{CATALOG_FILE, identify};
use crate::catalog::{Catalog, Head};
use crate::error::{Error, Result};
use crate::replica::Replica;
use crate::sys::device::Alive;

/// One replica of an open store.
pub(super) struct Member {
    pub(super) site: Site,
    pub(super) marker: Marker,
    /// `None` once the replica was taken out of the store.
    pub(super) lock: Option<StoreLock>,
    /// Absent peers that were current before this mount: they still are if it changes nothing.
    pub(super) left_behind: Vec<Uuid>,
    /// Not current: its marker is left as it is.
    pub(super) stale: bool,
}

impl Member {
    pub(super) fn catalog_file(&self) -> PathBuf {
        self.site.private_path(CATALOG_FILE)
    }

    pub(super) fn write_marker(&self) -> Result<()> {
        self.marker.write(&self.site)
    }

    /// The head of this replica's catalog; `None` if it has no whole one of its store. After an
    /// unclean end all of it is read, unless the mount kept an intent log.
    pub(super) fn head(&self, logged: bool) -> Result<Option<Head>> {
        let thorough = self.marker.clean.is_none() && !logged;
        let file = self.catalog_file();
        let verify = move |alive: &Alive| Catalog::verify_alive(&file, thorough, alive);
        let whole = self.site.within_alive("read the catalog in", verify);
        Ok(match whole {
            Ok(head) if head.store == self.marker.store => Some(head),
            Ok(head) => {
                log::error!(
                    "{}: the catalog belongs to another store ({})",
                    self.site.path.display(),
                    head.store
                );
                None
            }
            // Nothing is known of it: it is not lost.
            Err(error) if error.to_errno() == Errno::TIMEDOUT => return Err(error),
            Err(error) => {
                if self.marker.phase == Phase::Ok {
                    log::error!("{}: {error}", self.catalog_file().display());
                }
                None
            }
        })
    }

    /// Marks the clean end. `behind` are members that did not reach it.
    pub(super) fn close(&mut self, head: &Head, opened_at: &Head, behind: &[Uuid]) -> Result<()> {
        for peer in &mut self.marker.peers {
            if behind.contains(&peer.replica) && peer.state == PeerState::Ok {
                peer.state = PeerState::Stale;
                peer.reason = "the last mount did not end cleanly on it".into();
            }
            // Nothing happened without them: they are as good as those that were here.
            if head == opened_at && self.left_behind.contains(&peer.replica) {
                peer.state = PeerState::Ok;
                peer.reason.clear();
            }
        }
        self.marker.clean = Some(CleanMark::of(head));
        self.marker.opened = None;
        self.write_marker()
    }

    /// Its backing, in use.
    pub(super) fn as_replica(&self) -> Result<Replica> {
        let (marker, path) = (&self.marker, &self.site.path);
        let guard =
            self.site.guard.clone().ok_or_else(|| {
                Error::Refused(format!("{} was not opened for use", path.display()))
            })?;
        Ok(Replica::sharing(marker.replica, marker.label.clone(), path, guard))
    }

    /// What the others have to note of it while the store is in use.
    pub(super) fn as_present(&self) -> Peer {
        match (self.stale, self.marker.phase) {
            (false, _) => self.as_peer(PeerState::Ok),
            (true, Phase::Ok) => {
                let reason = "it missed changes and waits for its resync".into();
                Peer { reason, ..self.as_peer(PeerState::Stale) }
            }
            (true, _) => self.as_peer(PeerState::Filling),
        }
    }

    pub(super) fn as_peer(&self, state: PeerState) -> Peer {
        Peer {
            replica: self.marker.replica,
            label: self.marker.label.clone(),
            path: identify::record_path(&self.site.path),
            state,
            reason: String::new(),
        }
    }
}

//! Replicas that come, go and come back while the store is in use.
//!
//! A directory is recognised by its marker, never by its path. What is refused is what a mount
//! refuses, with the same words. Who is taken in stays out of use until it was made equal to the
//! others and [`Store::joined`] says so; if we die before that, its marker (`phase = filling`) and
//! the others' tell the next mount that it is no whole copy.

use std::path::{Path, PathBuf};

use rustix::io::Errno;
use uuid::Uuid;

use super::identify::{self, Candidate, Found};
use super::marker::{CleanMark, MARKER_FILE, Marker, Peer, PeerState, Phase};
use super::settle::{holds_stale, past_of};
use super::site::Site;
use super::{Member, Store, lock};
use crate::catalog::Head;
use crate::error::{Error, IoContext, Result};
use crate::replica::health::State;
use crate::replica::intent::DirtySet;
use crate::sys::patience;
use crate::types::{PRIVATE_DIR, ReplicaId, Timestamp};

/// How far clocks and the grain of a filesystem's times may be apart, in nanoseconds.
const CLOCK_SLACK_NANOS: i64 = 2_000_000_000;

/// What a replica that is to be resynced is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Which.
    pub id: ReplicaId,
    /// It was whole once, and was not resynced halfway since: what its tree has beside its own
    /// catalog was made by others.
    pub was_whole: bool,
    /// It ended cleanly: its catalog told its tree exactly.
    pub was_clean: bool,
    /// Where its catalog may not tell its tree exactly; `None` if that is not known.
    pub doubtful: Option<DirtySet>,
    /// What was changed on either side before this moment was changed before they were apart.
    pub apart_since: Timestamp,
}

/// How two that were changed apart are brought together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// Not at all.
    Refuse,
    /// What the mounted store has stays; the other's changes become versions.
    Take,
}

impl Store {
    /// The replicas that wait for a resync.
    pub fn waiting(&self) -> Vec<ReplicaId> {
        let online = |id: &ReplicaId| self.replicas.is_online(*id);
        self.replicas.ids().filter(|id| !online(id)).collect()
    }

    /// The backing of a replica, as a store is opened by.
    pub(crate) fn site(&self, id: ReplicaId) -> Site {
        self.members.lock()[id.index()].site.clone()
    }

    /// The catalog of a replica.
    pub(crate) fn catalog_file(&self, id: ReplicaId) -> PathBuf {
        self.members.lock()[id.index()].catalog_file()
    }

    /// The head of a replica's catalog, as that lies there.
    pub(crate) fn head_of(&self, id: ReplicaId) -> Result<Head> {
        self.site(id).catalog_head()
    }

    /// The replica that was meant by its label or by its path. `NotFound` names those there are.
    pub fn named(&self, text: &str) -> Result<ReplicaId> {
        let given = PathBuf::from(text);
        let look = move || std::fs::canonicalize(&given).ok();
        let path = patience::within(self.between.timeout, look).flatten();
        let members = self.members.lock();
        let fits = |id: &ReplicaId| {
            let member = &members[id.index()];
            let own = &member.site.path;
            member.marker.label == text || own == Path::new(text) || path.as_ref() == Some(own)
        };
        let found: Vec<ReplicaId> = self.replicas.ids().filter(fits).collect();
        match found[..] {
            [one] => Ok(one),
            [] => {
                let all = self.replicas.ids().map(|id| told(&members[id.index()]));
                let all: Vec<String> = all.collect();
                Err(Error::NotFound(format!(
                    "no replica of this mount is called {}: there are {}",
                    crate::types::escape(text.as_bytes()),
                    all.join(", ")
                )))
            }
            _ => Err(Error::Refused(format!(
                "{} replicas are called {}: name one by its path",
                found.len(),
                crate::types::escape(text.as_bytes())
            ))),
        }
    }

    /// Opens the backing of a replica that is out of use anew, at the path where it was: the disk
    /// may have come back. Refused, by name, if something else is there.
    pub fn returned(&self, id: ReplicaId, fork: Fork) -> Result<Arrival> {
        let path = self.members.lock()[id.index()].site.path.clone();
        self.returned_at(id, &path, fork)
    }

    fn returned_at(&self, id: ReplicaId, path: &Path, fork: Fork) -> Result<Arrival> {
        if self.replicas.is_online(id) {
            return Err(Error::Refused(format!("{} is in use already", path.display())));
        }
        let known = {
            let mut members = self.members.lock();
            // Of one process, too, the lock is held once only.
            members[id.index()].lock = None;
            members[id.index()].marker.clone()
        };
        let candidate = identify::look(path, &self.between)?;
        let marker = match &candidate.found {
            Found::Replica(marker) => marker.as_ref().clone(),
            _ => {
                return Err(Error::Refused(format!(
                    "{} has no store marker, but replica '{}' was there: is its disk mounted? (to \
                     fill another directory in its place: rearview replica replace)",
                    path.display(),
                    crate::types::escape(known.label.as_bytes())
                )));
            }
        };
        let mut members = self.members.lock();
        self.check_marker(&members, &marker, &candidate.path)?;
        if marker.replica != known.replica {
            return Err(Error::Refused(format!(
                "{} holds another replica of this store ('{}') than '{}', which was there: the \
                 disks may have been exchanged. Bring it in with: rearview replica add {}",
                path.display(),
                crate::types::escape(marker.label.as_bytes()),
                crate::types::escape(known.label.as_bytes()),
                path.display()
            )));
        }
        let site = identify::make(&candidate, &self.between)?;
        let lock = lock::acquire(&site, &self.owner)?;
        // Under the lock nobody else changes it.
        let marker = Marker::read(&site)?.unwrap_or(marker);
        self.check_fork(&members, &marker, &site, fork)?;
        let arrival = arrival(id, &site, &marker)?;
        let member = &mut members[id.index()];
        member.site = site;
        member.marker = marker;
        member.lock = Some(lock);
        member.stale = true;
        self.replicas.replace(id, member.as_replica()?);
        Ok(arrival)
    }

    /// Takes in a directory: a replica that was absent, or an empty one that becomes a new replica,
    /// in the place of `instead` if that is given.
    pub fn arrived(&self, path: &Path, instead: Option<ReplicaId>, fork: Fork) -> Result<Arrival> {
        let candidate = identify::look(path, &self.between)?;
        let found = match &candidate.found {
            Found::Replica(marker) => Some(marker.as_ref().clone()),
            _ => None,
        };
        if let Some(marker) = &found {
            let members = self.members.lock();
            let known = self.replicas.ids().find(|id| {
                members[id.index()].marker.replica == marker.replica
                    && members[id.index()].marker.store == marker.store
            });
            drop(members);
            match known {
                Some(id) if !self.replicas.is_online(id) => {
                    return self.returned_at(id, &candidate.path, fork);
                }
                _ => {}
            }
        }
        if instead.is_some_and(|id| self.replicas.is_online(id)) {
            return Err(Error::Refused(
                "the replica to be replaced is in use: take it offline first (rearview replica \
                 offline)"
                    .into(),
            ));
        }
        let mut members = self.members.lock();
        self.check_place(&members, &candidate, instead)?;
        if let Some(marker) = &found {
            self.check_marker(&members, marker, &candidate.path)?;
        } else if matches!(candidate.found, Found::Files) {
            return Err(Error::Refused(format!(
                "{} has files and is no replica of this store: give an empty directory, which is \
                 then filled, or move the files away first",
                candidate.path.display()
            )));
        }
        let site = identify::make(&candidate, &self.between)?;
        site.make_private()?;
        let lock = lock::acquire(&site, &self.owner)?;
        let marker = match Marker::read(&site)? {
            Some(marker) => {
                self.check_fork(&members, &marker, &site, fork)?;
                marker
            }
            None => {
                site.probe()?;
                self.new_marker(&members, &site)?
            }
        };
        let arrival = |id| arrival(id, &site, &marker);
        let member = Member {
            site: site.clone(),
            marker: marker.clone(),
            lock: Some(lock),
            left_behind: Vec::new(),
            stale: true,
        };
        let replica = member.as_replica()?;
        let gone = instead.map(|id| members[id.index()].marker.replica);
        let id = match instead {
            Some(id) => {
                self.replicas.replace(id, replica);
                id
            }
            None => self.replicas.add(replica).ok_or_else(|| {
                let most = crate::types::REPLICAS_MAX;
                Error::Refused(format!("a store has at most {most} replicas: remove one first"))
            })?,
        };
        match members.get_mut(id.index()) {
            Some(place) => *place = member,
            None => members.push(member),
        }
        // Its own marker is there already: were it named before, and we died, its disk would be
        // missed.
        let peer = members[id.index()].as_present();
        self.note(members, &mut |marker| {
            marker.peers.retain(|own| Some(own.replica) != gone && own.replica != peer.replica);
            marker.peers.push(peer.clone());
        })?;
        arrival(id)
    }

    /// The marker of a new replica, written.
    fn new_marker(&self, members: &[Member], site: &Site) -> Result<Marker> {
        use std::os::unix::ffi::OsStrExt;
        let current = members.iter().find(|member| !member.stale).ok_or_else(no_current)?;
        let label = site.path.file_name().unwrap_or_default();
        let label = crate::types::escape(label.as_bytes());
        let created = current.marker.created.clone();
        let mut marker = Marker::new(self.uuid, label, created, Phase::Filling);
        marker.opened = Some(Timestamp::now().as_nanos());
        marker.peers = self.current_peers(members);
        marker.write(site)?;
        Ok(marker)
    }

    fn current_peers(&self, members: &[Member]) -> Vec<Peer> {
        let current = members.iter().filter(|member| !member.stale);
        current.map(|member| member.as_peer(PeerState::Ok)).collect()
    }

    /// A directory beside those of the others, or in the place of one of them. One that does not
    /// answer is taken to lie apart.
    fn check_place(
        &self,
        members: &[Member],
        candidate: &Candidate,
        instead: Option<ReplicaId>,
    ) -> Result<()> {
        let others = self.replicas.ids().filter(|id| Some(*id) != instead);
        let works = others.map(|id| {
            let (own, other) = (candidate.path.clone(), members[id.index()].site.path.clone());
            move || {
                identify::check_apart(&own, &other)?;
                identify::check_apart(&other, &own)
            }
        });
        patience::each_within(self.between.timeout, works).into_iter().flatten().collect()
    }

    /// Whether a marker is one of this store, and of no replica that is in use.
    fn check_marker(&self, members: &[Member], marker: &Marker, path: &Path) -> Result<()> {
        if marker.store != self.uuid {
            return Err(Error::Refused(format!(
                "{} belongs to another store ({}) than this mount ({}): it is left as it is",
                path.display(),
                marker.store,
                self.uuid
            )));
        }
        let online = |id: &ReplicaId| self.replicas.is_online(*id);
        let twin = self.replicas.ids().filter(online).map(|id| &members[id.index()]);
        let twin = twin.into_iter().find(|member| member.marker.replica == marker.replica);
        if let Some(twin) = twin {
            return Err(Error::Refused(format!(
                "{} is a plain copy of the backing {} and has the same identity: give an empty \
                 directory instead, which is then filled",
                path.display(),
                twin.site.path.display()
            )));
        }
        let current = members.iter().find(|member| !member.stale).ok_or_else(no_current)?;
        let is_own =
            self.replicas.ids().any(|id| members[id.index()].marker.replica == marker.replica);
        if current.marker.peer(marker.replica).is_none() && !is_own {
            return Err(Error::Refused(format!(
                "{} was a replica of this store and was given up ('{}'): to make it one again, \
                 move all that is in it, {PRIVATE_DIR} too, elsewhere and add the empty directory",
                path.display(),
                crate::types::escape(marker.label.as_bytes())
            )));
        }
        Ok(())
    }

    /// Whether the store and this replica both moved on without the other.
    fn check_fork(
        &self,
        members: &[Member],
        marker: &Marker,
        site: &Site,
        fork: Fork,
    ) -> Result<()> {
        let current = members.iter().filter(|member| !member.stale);
        let left = current.map(|member| &member.marker).find(|own| holds_stale(marker, own));
        let forked = marker.phase == Phase::Ok && left.is_some();
        if !forked || fork == Fork::Take {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "{} was used separately, and this store too was changed meanwhile: neither can replace \
             the other unasked, and nothing was touched. To keep what is mounted here live and \
             turn what differs there into versions: rearview replica online --take {}",
            site.path.display(),
            site.path.display()
        )))
    }

    /// A replica went out of use with all that was done so far, up to `head` of its catalog.
    pub fn left(&self, id: ReplicaId, head: &Head) -> Result<()> {
        let mut members = self.members.lock();
        let member = &mut members[id.index()];
        let synced = member.site.backing.sync_all();
        synced.context("make durable", &member.site.path)?;
        member.marker.clean = Some(CleanMark::of(head));
        member.marker.opened = None;
        member.write_marker()
    }

    /// From here on the replica is no whole copy, until [`Store::joined`].
    pub fn begin_resync(&self, arrival: &Arrival) -> Result<()> {
        let mut members = self.members.lock();
        let peers = self.current_peers(&members);
        let member = &mut members[arrival.id.index()];
        if member.marker.phase != Phase::Filling || member.marker.opened.is_none() {
            member.marker.phase = Phase::Filling;
            member.marker.clean = None;
            member.marker.opened = Some(arrival.apart_since.as_nanos());
            member.marker.peers = peers;
            member.write_marker()?;
        }
        super::empty_tmp(&member.site)
    }

    /// The replica has all that the others have, durably, and is in use: it is whole from here on.
    pub fn joined(&self, id: ReplicaId) -> Result<()> {
        let mut members = self.members.lock();
        let current = members.iter().find(|member| !member.stale).ok_or_else(no_current)?;
        let mut marker = current.marker.clone();
        let own = members[id.index()].marker.replica;
        marker.peers.retain(|peer| peer.replica != own);
        marker.peers.push(current.as_peer(PeerState::Ok));
        let member = &mut members[id.index()];
        member.marker.phase = Phase::Ok;
        member.marker.clean = None;
        // The mount that it belongs to from here on, by which its intent log is known.
        member.marker.opened = marker.opened;
        member.marker.policy = marker.policy;
        member.marker.policy_changed = marker.policy_changed;
        member.marker.peers = marker.peers;
        // First its own: were it called current before it says so itself, and we died, nothing
        // would be lost, but the other order needs no thought.
        member.write_marker()?;
        member.stale = false;
        member.left_behind.clear();
        let peer = member.as_peer(PeerState::Ok);
        self.note(members, &mut |marker| {
            if marker.replica != peer.replica {
                marker.peers.retain(|own| own.replica != peer.replica);
                marker.peers.push(peer.clone());
            }
        })
    }

    /// Takes a replica out of the store for good: the others forget it.
    pub fn remove(&self, id: ReplicaId) -> Result<()> {
        if self.replicas.is_online(id) {
            return Err(Error::Refused("it is in use".into()));
        }
        let members = self.members.lock();
        let gone = members[id.index()].marker.replica;
        self.note(members, &mut |marker| marker.peers.retain(|peer| peer.replica != gone))?;
        let mut members = self.members.lock();
        members[id.index()].stale = true;
        members[id.index()].lock = None;
        self.replicas.remove(id);
        Ok(())
    }

    /// Forgets an absent replica, by its label, path or identity. `false` if there is none such.
    pub fn forget_absent(&self, text: &str) -> Result<bool> {
        let members = self.members.lock();
        let path = identify::record_path(Path::new(text));
        let present: Vec<Uuid> =
            self.replicas.ids().map(|id| members[id.index()].marker.replica).collect();
        let current = members.iter().find(|member| !member.stale).ok_or_else(no_current)?;
        let fits = |peer: &&Peer| {
            let named = peer.label == text || peer.path == path;
            !present.contains(&peer.replica) && (named || peer.replica.to_string() == text)
        };
        let Some(gone) = current.marker.peers.iter().find(fits).map(|peer| peer.replica) else {
            return Ok(false);
        };
        self.note(members, &mut |marker| marker.peers.retain(|peer| peer.replica != gone))?;
        Ok(true)
    }

    /// Whether there is a replica of any store at `path`.
    pub fn is_replica_at(&self, path: &Path) -> Result<bool> {
        Ok(matches!(identify::look(path, &self.between)?.found, Found::Replica(_)))
    }

    /// Refuses a directory that cannot become a new replica: it must be empty, or not be there yet.
    pub fn check_empty(&self, path: &Path) -> Result<()> {
        let candidate = identify::look(path, &self.between)?;
        match candidate.found {
            Found::Absent | Found::Empty => Ok(()),
            Found::Files | Found::Replica(_) => Err(Error::Refused(format!(
                "{} is not empty: give an empty directory, which is then filled",
                candidate.path.display()
            ))),
        }
    }

    /// What is known of a replica whose backing is open for its resync already.
    pub fn arrival(&self, id: ReplicaId) -> Result<Arrival> {
        let members = self.members.lock();
        let member = &members[id.index()];
        arrival(id, &member.site, &member.marker)
    }

    /// Whether the replica went out of use by a fault, and is not waiting or being resynced.
    pub fn is_offline(&self, id: ReplicaId) -> bool {
        matches!(self.replicas.health(id).state, State::Offline { .. })
    }
}

fn arrival(id: ReplicaId, site: &Site, marker: &Marker) -> Result<Arrival> {
    let apart = match (marker.phase, marker.opened) {
        (Phase::Filling, Some(since)) => since,
        _ => {
            // It was written last when its last mount ended, or before.
            let path = site.private_path(MARKER_FILE);
            let dir = site.dir(&super::site::private(""))?;
            let stat = site.backing.stat_at(&dir, &super::site::own_name(MARKER_FILE));
            let written = stat.context("look at", path)?.mtime.as_nanos();
            marker.opened.map_or(written, |opened| opened.min(written))
        }
    };
    let head = match site.catalog_head() {
        // Nothing is known of it.
        Err(error) if error.to_errno() == Errno::TIMEDOUT => return Err(error),
        head => head.ok(),
    };
    let fits = |mark: &CleanMark| head.as_ref().is_some_and(|head| mark.fits(head));
    let was_whole = marker.phase == Phase::Ok && head.is_some();
    let was_clean = marker.phase == Phase::Ok && marker.clean.as_ref().is_some_and(fits);
    Ok(Arrival {
        id,
        was_whole,
        was_clean,
        doubtful: if was_clean { Some(DirtySet::default()) } else { doubtful(site, marker, &head) },
        apart_since: Timestamp::from_nanos(apart.saturating_sub(CLOCK_SLACK_NANOS)),
    })
}

/// What may differ from the catalog on a replica that did not end cleanly: all that its intent log
/// has since its last checkpoint. What came after it failed is in the others' catalogs only.
fn doubtful(site: &Site, marker: &Marker, head: &Option<Head>) -> Option<DirtySet> {
    let past = past_of(site, marker)?;
    // Commits that were durable are gone: nothing that the disk has can be relied on.
    let lost = head.as_ref().is_none_or(|head| head.sequence < past.base.sequence);
    (!lost && !past.everything).then_some(past.dirty)
}

/// Orders the members of a store that is being opened: who is to be resynced comes last, for the
/// first of the others is read from. Tells where the winner is then.
pub(super) fn current_first(
    members: Vec<Member>,
    winner: usize,
    behind: &[bool],
) -> (Vec<Member>, usize) {
    let mut places: Vec<(usize, Member)> = members.into_iter().enumerate().collect();
    places.iter_mut().for_each(|(index, member)| member.stale = behind[*index]);
    places.sort_by_key(|(index, _)| behind[*index]);
    let winner = places.iter().position(|(index, _)| *index == winner).unwrap_or(0);
    (places.into_iter().map(|(_, member)| member).collect(), winner)
}

fn told(member: &Member) -> String {
    let label = crate::types::escape(member.marker.label.as_bytes());
    format!("'{label}' ({})", member.site.path.display())
}

fn no_current() -> Error {
    Error::Refused("no replica of the store can note it: check the disks".into())
}

//! Opening, creating, adopting and filling a store.
//!
//! Owns the markers and locks of a mounted store's backings and the order in which a mount comes
//! up: look at all paths ([`identify`]), lock, judge which replica wins ([`lineage`]), finish what
//! the last mount left ([`import`]), make the others equal to the winner ([`fill`]), note durably
//! who takes part, and open the catalog. A clean store scans nothing. Whatever step a mount dies
//! in, the next one finishes it:
//!
//! - `phase = adopting` until the tree of the first replica is in its catalog and both are durable;
//! - `phase = filling` until a copy is whole and durable: it is never the source of anything;
//! - no `clean` mark while mounted, so that an unclean end is seen as such;
//! - absent replicas are noted as stale before the first write without them.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::catalog::{Catalog, Head};
use crate::error::{Error, IoContext, Result};
use crate::excludes::Patterns;
use crate::history;
use crate::progress::Progress;
use crate::replica::ReplicaSet;
use crate::replica::intent::{Base, Intents};
use crate::types::{ReplicaId, ReplicaMap, Timestamp};

use identify::{Candidate, Found, Plan};
use lock::StoreLock;
use marker::{Marker, Peer, PeerState, Phase};
use member::Member;
use settle::Settled;
use silent::Out;
use site::Site;

mod between;
mod bounds;
pub mod compare;
pub(crate) mod copy;
pub mod fill;
mod identify;
mod idset;
mod import;
mod inspect;
mod join;
mod lineage;
pub mod lock;
pub mod marker;
mod member;
mod noted;
pub(crate) mod quarantine;
pub mod record;
mod regain;
mod settle;
mod silent;
pub mod site;
#[cfg(test)]
mod tests;

pub use between::Between;
pub use fill::FillReport;
pub use import::{ImportReport, row_of};
pub use inspect::{StoreInfo, inspect, inspect_within, open_catalog};
pub use join::{Arrival, Fork};
pub use lock::Owner;
pub use settle::import_tree;
pub use silent::is_of_disk;

/// The catalog's file name in the private directory.
pub const CATALOG_FILE: &str = "catalog.db";

/// How a store is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// A new store is meant, or a new replica where one that is gone was: refuse what is neither.
    pub init: bool,
    /// Make no store where there is none, and no replica: the disks may not be there yet. Those
    /// that are missing are left out.
    pub existing_only: bool,
    /// Name of the replicas that are made, instead of their directories' names.
    pub label: Option<String>,
    /// Where it will be mounted: for those who find it in use.
    pub mountpoint: Option<PathBuf>,
    /// Patterns of what is to have no history, counted from the root.
    pub exclude: Arc<Patterns>,
    /// Leave replicas that are new, or missed changes, out of use: they are resynced while the
    /// store is in use. Otherwise they are made equal before it is opened.
    pub resync_later: bool,
    /// What stands between us and the backings.
    pub between: Between,
    /// Backings that are known not to answer.
    pub silent: Vec<PathBuf>,
}

/// Recovers the history files of the replica that goes on, after an unclean end and before the live
/// tree is compared with the catalog. Given from outside, for history stands beside us, not below.
/// The number is that of the first undo segment that has to be looked at.
pub type Recover<'a> = &'a dyn Fn(&ReplicaSet, &Catalog, u64) -> Result<()>;

/// A store that is open: its locks are held, and its markers say so.
pub struct Store {
    /// Its identity.
    pub uuid: Uuid,
    /// Its replicas: the current ones in the order given, then those to be resynced.
    pub replicas: ReplicaSet,
    /// Its catalog.
    pub catalog: Catalog,
    /// What operations are about to change.
    pub intents: Intents,
    /// By the index of the replica.
    members: Mutex<Vec<Member>>,
    /// Of the catalog, before anything was recovered: who was absent then is as good as the others
    /// only if nothing was.
    opened_at: Head,
    owner: Owner,
    /// How backings that come are opened.
    between: Between,
    /// Backings that do not answer, or are not there, and are no replicas of this mount before.
    silent: Mutex<Vec<PathBuf>>,
}

/// Opens the store in `paths`, or makes one there. See the module for what it goes through, and
/// [`identify`] for what is refused.
pub fn open(
    paths: &[PathBuf],
    options: &OpenOptions,
    recover: Recover<'_>,
    progress: &Progress,
) -> Result<Store> {
    let silent = options.silent.iter();
    let mut out: Vec<Out> = silent.map(|path| Out::silent(path, &options.between)).collect();
    loop {
        let opened = open_answering(paths, &mut out, options, recover, progress);
        let error = match opened {
            Err(error) => error,
            opened => return opened,
        };
        // Some that failed meanwhile; whatever step it was in is finished by its next mount.
        let failed = silent::failed(paths, &out, &error, &options.between);
        if failed.is_empty() {
            return Err(silent::explain(silent::with_remedy(error), &out));
        }
        for one in &failed {
            log::error!(
                "{error}: {} is left out of this mount, and taken in when it answers: {}",
                one.path.display(),
                one.remedy
            );
        }
        out.extend(failed);
    }
}

/// Opens the store in those of `paths` that answer; `out` are the others.
fn open_answering(
    paths: &[PathBuf],
    out: &mut Vec<Out>,
    options: &OpenOptions,
    recover: Recover<'_>,
    progress: &Progress,
) -> Result<Store> {
    let is_out = |path: &PathBuf| out.iter().any(|one| one.path == *path);
    let paths: Vec<_> = paths.iter().filter(|path| !is_out(path)).cloned().collect();
    let between = &options.between;
    let (mut candidates, found) = identify::look_all(&paths, options.existing_only, between)?;
    out.extend(found.iter().map(|path| Out::silent(path, between)));
    if candidates.is_empty() {
        return Err(Error::Refused("no other backing is given".into()));
    }
    if options.existing_only {
        let missing = silent::take_missing(&mut candidates, out)?;
        out.extend(missing);
    }
    let mut members = match identify::decide(&candidates, options.init)? {
        Plan::Create { .. } if options.existing_only => return Err(no_store(&paths)),
        Plan::Create { .. } if !out.is_empty() => {
            return Err(Error::Refused("no store is made without it".into()));
        }
        Plan::Create { source } => create(&candidates, source, options)?,
        Plan::Open => join(&candidates, options)?,
    };
    silent::check_current(out, &members)?;
    let sites: Vec<Site> = members.iter().map(|member| member.site.clone()).collect();
    let settled = settle::settle(&mut members, recover, options, progress);
    let opened = settled.and_then(|Settled { winner, behind, found }| {
        let (members, winner) = join::current_first(members, winner, &behind);
        finish_open(members, (winner, found), out, options)
    });
    opened.map_err(|error| silent::blame(error, &sites))
}

fn no_store(paths: &[PathBuf]) -> Error {
    use std::os::unix::ffi::OsStrExt;
    let paths: Vec<String> =
        paths.iter().map(|path| crate::types::escape(path.as_os_str().as_bytes())).collect();
    Error::NoStore(format!(
        "there is no store in {}: is the disk missing? A new store is created once with \
         'rearview mount {} MOUNTPOINT'",
        paths.join(", "),
        paths.join(" ")
    ))
}

/// Locks a candidate, which may still have to be made, and reads its marker anew under the lock.
fn enlist(
    candidate: &Candidate,
    options: &OpenOptions,
) -> Result<(Site, StoreLock, Option<Marker>)> {
    let site = identify::make(candidate, &options.between)?;
    let is_new = !matches!(candidate.found, Found::Replica(_));
    site.make_private()?;
    let owner = Owner::this(options.mountpoint.as_deref());
    let lock = lock::acquire(&site, &owner)?;
    let marker = Marker::read(&site)?;
    if is_new != marker.is_none() {
        return Err(Error::InUse(format!(
            "{} is being set up by another mount just now: try again",
            site.path.display()
        )));
    }
    if is_new {
        site.probe()?;
    }
    Ok((site, lock, marker))
}

fn label_of(site: &Site, options: &OpenOptions) -> String {
    options.label.clone().unwrap_or_else(|| {
        use std::os::unix::ffi::OsStrExt;
        let name = site.path.file_name().unwrap_or_default();
        crate::types::escape(name.as_bytes())
    })
}

/// Makes the markers of a new store.
fn create(candidates: &[Candidate], source: usize, options: &OpenOptions) -> Result<Vec<Member>> {
    let store = Uuid::new_v4();
    let created = jiff::Timestamp::now().to_string();
    let mut members = Vec::new();
    for (index, candidate) in candidates.iter().enumerate() {
        let (site, lock, _) = enlist(candidate, options)?;
        let phase = if index == source { Phase::Adopting } else { Phase::Filling };
        let marker = Marker::new(store, label_of(&site, options), created.clone(), phase);
        members.push(Member {
            site,
            marker,
            lock: Some(lock),
            left_behind: Vec::new(),
            stale: false,
        });
    }
    // First the source's marker, without peers: were one of them named before it has its own
    // marker, a mount that dies between would look like a disk that is not there.
    members[source].write_marker()?;
    for index in (0..members.len()).filter(|&index| index != source) {
        members[index].marker.peers = vec![members[source].as_peer(PeerState::Ok)];
        members[index].write_marker()?;
    }
    Ok(members)
}

/// Takes the replicas of an existing store, and new ones that join it.
fn join(candidates: &[Candidate], options: &OpenOptions) -> Result<Vec<Member>> {
    let mut members = Vec::new();
    let any = candidates.iter().find_map(|candidate| match &candidate.found {
        Found::Replica(marker) => Some(marker),
        _ => None,
    });
    let store = any.expect("a store is opened where a replica was found");
    // What is asked for, or was when a mount that died began to make the store.
    let is_meant = options.init || store.phase == Phase::Adopting;
    let (store, created) = (store.store, store.created.clone());
    // The replicas are locked before anything new is made.
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by_key(|&index| !matches!(candidates[index].found, Found::Replica(_)));
    for index in order {
        let (site, lock, marker) = enlist(&candidates[index], options)?;
        let marker = match marker {
            Some(marker) if marker.store != store => {
                return Err(Error::InUse(format!(
                    "{} is being set up by another mount just now: try again",
                    site.path.display()
                )));
            }
            Some(marker) => marker,
            None => {
                let label = label_of(&site, options);
                if !is_meant {
                    tell_new(&candidates[index], &label);
                }
                let marker = Marker::new(store, label, created.clone(), Phase::Filling);
                marker.write(&site)?;
                marker
            }
        };
        let member =
            Member { site, marker, lock: Some(lock), left_behind: Vec::new(), stale: false };
        members.push((index, member));
    }
    members.sort_by_key(|(index, _)| *index);
    Ok(members.into_iter().map(|(_, member)| member).collect())
}

/// A path that was mistyped must not become a replica unnoticed.
fn tell_new(candidate: &Candidate, label: &str) {
    let path = identify::record_path(&candidate.path);
    if matches!(candidate.found, Found::Absent) {
        log::warn!("{path} did not exist: made");
    }
    log::warn!(
        "{path} is new to this store: it becomes one more replica, '{label}', and is filled; \
         'rearview replica remove {label}' takes it out again"
    );
}

/// Notes durably who takes part, and opens the catalog; `found` is what the winner's was before it
/// was recovered.
fn finish_open(
    mut members: Vec<Member>,
    (winner, found): (usize, Option<Head>),
    out: &[Out],
    options: &OpenOptions,
) -> Result<Store> {
    let head = members[winner].site.catalog_head()?;
    let uuid = members[winner].marker.store;
    let now = Timestamp::now().as_nanos();
    let absent = absent_peers(&members, winner);
    let out_at = |peer: &Peer| out.iter().find(|one| identify::record_path(&one.path) == peer.path);
    let present: Vec<Peer> = members.iter().map(Member::as_present).collect();
    let left_behind: Vec<Uuid> =
        absent.iter().filter(|peer| peer.state == PeerState::Ok).map(|peer| peer.replica).collect();
    for peer in &absent {
        log::warn!(
            "replica '{}' (last at {}) {}: the store runs without it",
            crate::types::escape(peer.label.as_bytes()),
            peer.path,
            out_at(peer).map_or("is absent", |one| &one.why)
        );
    }
    let is_known =
        |path: &PathBuf| absent.iter().any(|peer| peer.path == identify::record_path(path));
    for one in out.iter().filter(|one| !is_known(&one.path)) {
        log::warn!("{} {}: the store runs without it", one.path.display(), one.why);
    }
    let absent: Vec<Peer> = absent
        .into_iter()
        .map(|mut peer| {
            if peer.state == PeerState::Ok {
                peer.state = PeerState::Stale;
                peer.reason = format!("absent since {}", jiff::Timestamp::now());
            }
            if let Some(reason) = out_at(&peer).and_then(Out::reason) {
                peer.reason = reason;
            }
            peer
        })
        .collect();
    // The markers come last: a mount that is refused up to here leaves a clean store clean.
    let replicas = replica_set(&members)?;
    let files = members.iter().map(|member| (!member.stale).then(|| member.catalog_file()));
    let files = files.collect();
    // Recovery is done: as far as ids go, this is a clean start.
    let timeout = options.between.timeout;
    let catalog = Catalog::open_within(ReplicaMap::new(files), true, timeout)?;
    // Before the markers: with a log of this mount and the old markers the store is what it was.
    let base = Base {
        generation: head.generation.0,
        sequence: head.sequence,
        undo_from: history::undo::next_segment(&replicas)?,
    };
    let intents = Intents::begin_log(&replicas, now, catalog.upcoming_node(), base)?;
    // Who was away, or is new, takes over what the store keeps. The winner need not be the one who
    // knows: who was away and missed no change of the tree can win as well.
    let latest =
        members.iter().map(|member| &member.marker).max_by_key(|marker| marker.policy_changed);
    let latest = latest.expect("a store has a member");
    let (policy, policy_changed) = (latest.policy.clone(), latest.policy_changed);
    let before: Vec<Marker> = members.iter().map(|member| member.marker.clone()).collect();
    let noted = members.iter_mut().filter(|member| !member.stale).try_for_each(|member| {
        let own = member.marker.replica;
        let others = present.iter().filter(|peer| peer.replica != own);
        member.marker.peers = others.chain(&absent).cloned().collect();
        member.marker.clean = None;
        member.marker.opened = Some(now);
        member.marker.policy.clone_from(&policy);
        member.marker.policy_changed = policy_changed;
        member.left_behind.clone_from(&left_behind);
        member.write_marker()?;
        empty_tmp(&member.site)
    });
    if let Err(error) = noted {
        // Nothing was changed: what was clean is so again.
        catalog.close()?;
        for (member, marker) in members.iter().zip(before).filter(|(member, _)| !member.stale) {
            if marker.clean.is_some()
                && let Err(error) = marker.write(&member.site)
            {
                log::warn!("{}: {error}", member.site.path.display());
            }
        }
        return Err(error);
    }
    Ok(Store {
        uuid,
        replicas,
        catalog,
        intents,
        members: Mutex::new(members),
        opened_at: found.unwrap_or(head),
        owner: Owner::this(options.mountpoint.as_deref()),
        between: options.between.clone(),
        silent: Mutex::new(out.iter().map(|one| one.path.clone()).collect()),
    })
}

/// The peers that any present replica knows and that are not present, without those that a new
/// replica replaces at their place. The winner's word counts first.
fn absent_peers(members: &[Member], winner: usize) -> Vec<Peer> {
    let mut absent: BTreeMap<Uuid, Peer> = BTreeMap::new();
    let others = (0..members.len()).filter(|&index| index != winner);
    for index in std::iter::once(winner).chain(others) {
        for peer in &members[index].marker.peers {
            if members.iter().all(|member| member.marker.replica != peer.replica) {
                absent.entry(peer.replica).or_insert_with(|| peer.clone());
            }
        }
    }
    // What has no peers of its own and did not win was made just now.
    for index in (0..members.len()).filter(|&index| index != winner) {
        let member = &members[index];
        if member.marker.peers.is_empty() {
            let place = identify::record_path(&member.site.path);
            absent.retain(|_, peer| peer.path != place);
        }
    }
    absent.into_values().collect()
}

/// Removes what was not finished when the last mount ended.
fn empty_tmp(site: &Site) -> Result<()> {
    let dir = site.dir(&site::private("tmp"))?;
    let path = site.private_path("tmp");
    for entry in site.backing.list(&dir).context("list", &path)? {
        let removed = match entry.kind {
            crate::types::Kind::Dir => site.backing.rmdir(&dir, &entry.name),
            _ => site.backing.unlink(&dir, &entry.name),
        };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            other => site::ignore_missing(other).context("empty", &path)?,
        }
    }
    Ok(())
}

fn replica_set(members: &[Member]) -> Result<ReplicaSet> {
    let current = members.iter().filter(|member| !member.stale);
    let set = ReplicaSet::new(current.map(Member::as_replica).collect::<Result<Vec<_>>>()?);
    for behind in members.iter().filter(|member| member.stale) {
        set.add(behind.as_replica()?);
    }
    Ok(set)
}

impl Store {
    /// Ends the mount cleanly: everything durable, then the markers say so. After it only dropping
    /// the store, which releases the locks, is left. A replica on which that fails is noted as
    /// stale by the others; it is an error only if it fails on all. Idempotent.
    ///
    /// Where an operation may have been done in part and differently, the markers do not say so:
    /// the next mount then compares what the intent log names.
    pub fn close(&self) -> Result<()> {
        self.catalog.close()?;
        for (replica, reason) in self.catalog.failed_replicas() {
            self.mark_stale(replica, &reason.to_string())?;
        }
        let mut members = self.members.lock();
        if self.replicas.is_doubtful() {
            log::warn!(
                "an operation failed on every replica and may have been done in part: what was \
                 being changed is compared at the next mount"
            );
            members.iter_mut().for_each(|member| member.lock = None);
            return Ok(());
        }
        // First all data of all replicas, then the first mark: a mark never outruns its data.
        let mut heads = Vec::new();
        let mut failure = None;
        for (id, member) in ReplicaId::all().zip(&*members).filter(|(_, member)| !member.stale) {
            let synced = member.site.backing.sync_all().context("make durable", &member.site.path);
            let closed = self.catalog.closed_head(id);
            let head = || closed.map_or_else(|| member.site.catalog_head(), Ok);
            match synced.and_then(|()| head()) {
                Ok(head) => heads.push((id.index(), head)),
                Err(error) => {
                    log::error!("{}: {error}", member.site.path.display());
                    failure = Some(error);
                }
            }
        }
        let Some(head) = heads.iter().map(|(_, head)| head).max_by_key(|head| head.sequence) else {
            return failure.map_or(Ok(()), Err);
        };
        let head = head.clone();
        let whole: Vec<usize> =
            heads.iter().filter(|(_, own)| *own == head).map(|(index, _)| *index).collect();
        let behind: Vec<Uuid> = (0..members.len())
            .filter(|index| !whole.contains(index))
            .map(|index| members[index].marker.replica)
            .collect();
        let mut closed = false;
        for index in whole {
            match members[index].close(&head, &self.opened_at, &behind) {
                Ok(()) => closed = true,
                // All it has is durable, but it does not say so: it is looked at by the next mount.
                Err(error) => {
                    log::error!("{error}");
                    failure = Some(error);
                }
            }
            // At once: a call that hangs on another disk can keep the process from ending.
            members[index].lock = None;
        }
        match failure {
            Some(error) if !closed => Err(error),
            _ => Ok(()),
        }
    }
}

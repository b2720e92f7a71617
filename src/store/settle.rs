//! Which replica goes on, and making it and the others whole: the part of a mount between the locks
//! and the markers.
//!
//! The judgement itself is pure ([`lineage`]); here it is fed and carried out. A catalog whose
//! damage shows only on the way loses its say, and it is judged again: as long as one replica is
//! whole, there is a winner. Killed anywhere, the next mount does the rest.
//!
//! After an unclean end the intent logs of the last mount tell what may differ, and only that is
//! looked at. Where the winner has no log that can be believed, all is compared. What was dirtied
//! stays on record in the logs until the next mount begins, so every replica can recover by itself
//! whatever becomes of the others meanwhile.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustix::io::Errno;

use super::bounds::Bounds;
use super::lineage::{self, Standing, Verdict};
use super::marker::{CleanMark, Marker, PeerState, Phase};
use super::site::{self, Site};
use super::{CATALOG_FILE, Member, OpenOptions, Recover, fill, import, regain, replica_set};
use crate::catalog::{Catalog, Durability, Failure, Head};
use crate::error::{Error, IoContext, Result};
use crate::excludes::Patterns;
use crate::history;
use crate::progress::Progress;
use crate::replica::ReplicaSet;
use crate::replica::intent::{self, Past};
use crate::types::{ContentId, Generation, NodeId, ReplicaMap, Timestamp};

fn judge(members: &[Member], heads: &[Option<Head>]) -> Verdict {
    let standings: Vec<Standing> = members
        .iter()
        .zip(heads)
        .map(|(member, head)| Standing {
            phase: member.marker.phase,
            clean: member.marker.clean.clone(),
            head: head.clone(),
            says_stale: (0..members.len())
                .filter(|&other| holds_stale(&member.marker, &members[other].marker))
                .collect(),
        })
        .collect();
    lineage::judge(&standings)
}

/// Whether a replica went on without another: it says so, or it has given the other up, which still
/// knows it. For a peer is forgotten only when another takes its place.
pub(super) fn holds_stale(own: &Marker, other: &Marker) -> bool {
    match own.peer(other.replica) {
        Some(peer) => peer.state == PeerState::Stale,
        None => {
            let whole = own.phase == Phase::Ok && other.phase == Phase::Ok;
            whole && !own.peers.is_empty() && other.peer(own.replica).is_some()
        }
    }
}

/// What [`settle`] came to.
pub(super) struct Settled {
    /// Who goes on.
    pub(super) winner: usize,
    /// Who is to be resynced later.
    pub(super) behind: Vec<bool>,
    /// What the winner's catalog was before: who recovered by itself may come to another one.
    pub(super) found: Option<Head>,
}

/// Finds the winner, finishes what the last mount left of it, and makes the others equal to it,
/// unless they are to be resynced later.
pub(super) fn settle(
    members: &mut [Member],
    recover: Recover<'_>,
    options: &OpenOptions,
    progress: &Progress,
) -> Result<Settled> {
    let pasts: Vec<Option<Past>> =
        members.iter().map(|member| past_of(&member.site, &member.marker)).collect();
    let judged = members.iter().zip(&pasts);
    let mut heads: Vec<Option<Head>> =
        judged.map(|(member, past)| member.head(past.is_some())).collect::<Result<_>>()?;
    loop {
        let verdict = judge(members, &heads);
        let winner = match &verdict {
            Verdict::Winner { winner, .. } => Some(*winner),
            _ => None,
        };
        let known = Known { heads: &heads, pasts: &pasts };
        match (settle_by(members, verdict, &known, recover, options, progress), winner) {
            // Damage that shows only now: whoever else has a whole catalog wins instead.
            (Err(error), Some(winner))
                if is_catalog_damage(&error) && has_other_head(members, &heads, winner) =>
            {
                log::error!("{}: {error}", members[winner].site.path.display());
                heads[winner] = None;
            }
            (result, _) => {
                let (winner, behind) = result?;
                return Ok(Settled { winner, behind, found: heads.swap_remove(winner) });
            }
        }
    }
}

/// What is known of the members beside their markers.
struct Known<'a> {
    heads: &'a [Option<Head>],
    /// What their intent logs say of the last mount.
    pasts: &'a [Option<Past>],
}

/// What a recovery looks at, and on which replicas nothing else can differ.
struct Bounded {
    bounds: Bounds,
    replicas: Vec<bool>,
}

/// What the intent log of a replica says of its last mount, if that did not end cleanly.
pub(super) fn past_of(site: &Site, marker: &Marker) -> Option<Past> {
    let mount = marker.opened.filter(|_| marker.phase == Phase::Ok && marker.clean.is_none())?;
    let shown = site.private_path(intent::format::LOG_FILE);
    match intent::format::read(&*site.backing) {
        Ok(Some(past)) if past.mount == mount => return Some(past),
        // As an older version leaves it, which knows of no log.
        Ok(Some(_)) => log::warn!("{} is not of the last mount", shown.display()),
        Ok(None) => log::warn!("{} is missing or damaged", shown.display()),
        Err(error) => log::warn!("{}: {error}", shown.display()),
    }
    None
}

/// What a recovery that goes on with `winner` has to look at; `None` if that is everything.
fn bounds_of(members: &[Member], winner: usize, known: &Known<'_>) -> Option<Bounded> {
    let mut past = known.pasts[winner].clone()?;
    let head = known.heads[winner].as_ref()?;
    let mount = past.mount;
    let of_mount = |index: usize| known.pasts[index].as_ref().filter(|own| own.mount == mount);
    // What one log calls durable was so on every replica in use. One that lacks it lost what it had
    // acknowledged, and no log names that any more.
    let durable = (0..members.len()).filter_map(of_mount).map(|own| own.base.sequence).max();
    let has_lost = |index: usize| {
        let head = known.heads[index].as_ref();
        let lost = head.is_some_and(|head| Some(head.sequence) < durable);
        if lost {
            let file = members[index].catalog_file();
            log::error!("{}: commits that were durable are gone", file.display());
        }
        lost
    };
    if has_lost(winner) {
        return None;
    }
    let mut replicas = Vec::new();
    for (index, member) in members.iter().enumerate() {
        let marker = &member.marker;
        let ended = known.heads[index].as_ref() == Some(head)
            && marker.clean.as_ref().is_some_and(|mark| mark.fits(head));
        let stale = members.iter().any(|other| holds_stale(&other.marker, marker));
        let whole = marker.phase == Phase::Ok && known.heads[index].is_some() && !stale;
        let own = of_mount(index).filter(|_| whole && !has_lost(index));
        if let Some(own) = own {
            past.join(own);
        }
        replicas.push(whole && (own.is_some() || ended));
    }
    if past.everything {
        log::warn!("more was being changed than the intent log can hold");
        return None;
    }
    let bounds = Bounds::new(past);
    let covered = |index: usize| bounds.covers(short_id(&members[index]));
    if !covered(winner) {
        return None;
    }
    let replicas = (0..members.len()).map(|index| replicas[index] && covered(index)).collect();
    Some(Bounded { bounds, replicas })
}

/// Recovers the winner and those replicas that took part in its last mount to the end; returns
/// which are current then.
fn recover_within(
    members: &mut [Member],
    winner: usize,
    known: &Known<'_>,
    bounded: &Bounded,
    (recover, exclude): (Recover<'_>, &Arc<Patterns>),
    progress: &Progress,
) -> Result<Vec<bool>> {
    let begin = std::time::Instant::now();
    let bounds = &bounded.bounds;
    // Equal catalogs stay equal: only one that lags is copied whole.
    let equal = |index: usize| known.heads[index] == known.heads[winner];
    let others = || (0..bounded.replicas.len()).filter(|&i| bounded.replicas[i] && i != winner);
    let which: Vec<usize> = std::iter::once(winner).chain(others().filter(|&i| equal(i))).collect();
    let peers = other_sites(members, winner);
    let within = (Some(bounds), Some(bounds.since()));
    take_in(members, &which, &peers, Some(recover), exclude, within, progress)?;
    let source = members[winner].site.clone();
    for index in others() {
        let member = &members[index];
        let catalog = source.open_catalog()?;
        let sites = (&source, &member.site);
        let report = fill::fill_within(sites, short_id(member), &catalog, bounds, progress)?;
        catalog.close()?;
        if !report.is_nothing() {
            log::info!("{}: {report}", member.site.path.display());
        }
        if member.site.catalog_head().ok() != Some(source.catalog_head()?) {
            member.site.copy_catalog(&source)?;
        }
        member.site.backing.sync_all().context("make durable", &member.site.path)?;
    }
    log::info!("recovered in {} ms", begin.elapsed().as_millis());
    Ok(bounded.replicas.clone())
}

fn has_other_head(members: &[Member], heads: &[Option<Head>], winner: usize) -> bool {
    let whole = |index: usize| members[index].marker.phase == Phase::Ok && heads[index].is_some();
    (0..members.len()).any(|index| index != winner && whole(index))
}

fn is_catalog_damage(error: &Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    match error {
        Error::Damaged { what, .. } => what.starts_with("the catalog"),
        Error::Catalog(error) => {
            matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
        }
        _ => false,
    }
}

/// Does what the judgement asks for; returns the winner.
fn settle_by(
    members: &mut [Member],
    verdict: Verdict,
    known: &Known<'_>,
    recover: Recover<'_>,
    options: &OpenOptions,
    progress: &Progress,
) -> Result<(usize, Vec<bool>)> {
    let exclude = &options.exclude;
    let shown = |index: usize| members[index].site.path.display();
    let (winner, current) = match verdict {
        Verdict::Winner { winner, current, clean: true } => (winner, current),
        Verdict::Winner { winner, current, clean: false } => {
            let bounded = bounds_of(members, winner, known);
            log::warn!(
                "{}: the last mount did not end cleanly; recovering{}",
                shown(winner),
                if bounded.is_some() { " what it was changing" } else { " by comparing all" }
            );
            match bounded {
                Some(bounded) => {
                    let done = recover_within(
                        members,
                        winner,
                        known,
                        &bounded,
                        (recover, exclude),
                        progress,
                    )?;
                    (winner, done)
                }
                None => {
                    let peers = other_sites(members, winner);
                    let past = known.pasts[winner].as_ref();
                    let since = past.map(|past| Generation(past.base.generation));
                    let within = (None, since);
                    take_in(members, &[winner], &peers, Some(recover), exclude, within, progress)?;
                    // Recovery went on in the winner alone.
                    (winner, (0..current.len()).map(|index| index == winner).collect())
                }
            }
        }
        Verdict::Adopting(source) => {
            adopt(members, source, exclude, progress)?;
            (source, (0..members.len()).map(|index| index == source).collect())
        }
        Verdict::Fork(a, b) => {
            return Err(Error::Refused(format!(
                "{} and {} were used separately and both changed: neither can replace the other \
                 unasked. Nothing was touched. Mount the one to keep live alone, then bring in the \
                 other, whose changes become versions: rearview replica online --take BACKING",
                shown(a),
                shown(b)
            )));
        }
        Verdict::OnlyPartial => {
            return Err(Error::Refused(format!(
                "{} is not a whole copy: filling it was interrupted. Mount it together with a \
                 whole backing of the store",
                shown(0)
            )));
        }
        Verdict::NoCatalog => {
            return Err(Error::Damaged {
                what: format!("the catalog {}", members[0].catalog_file().display()),
                detail:
                    "it is missing or unreadable here, and no other given backing has a good one"
                        .into(),
                remedy: "Mount with another backing of the store if there is one. If all have lost \
                         theirs, 'rearview check --rebuild-catalog BACKING...' makes a new one \
                         from the live tree, the preserved files and the packs",
            });
        }
    };
    let mut behind = vec![false; members.len()];
    let mut equal = current.clone();
    if options.resync_later {
        for index in (0..members.len()).filter(|&index| !current[index]) {
            behind[index] =
                is_behind(&members[winner].marker, &members[index], &known.heads[index]);
            equal[index] = behind[index];
        }
    }
    fill_others(members, winner, &equal, known.heads, progress)?;
    Ok((winner, behind))
}

/// Whether a replica missed changes, so that it has to be resynced; otherwise it took part until
/// the store's last end and differs by what was in flight then.
fn is_behind(winner: &Marker, member: &Member, head: &Option<Head>) -> bool {
    member.marker.phase != Phase::Ok || head.is_none() || holds_stale(winner, &member.marker)
}

/// The backings of all members but one.
fn other_sites(members: &[Member], but: usize) -> Vec<Site> {
    let others = (0..members.len()).filter(|&index| index != but);
    others.map(|index| members[index].site.clone()).collect()
}

/// Makes the catalog of a replica, the first of `which`, agree with its live tree; the catalogs of
/// the others, which are equal to it, follow. Durable when it returns.
fn take_in(
    members: &[Member],
    which: &[usize],
    peers: &[Site],
    recover: Option<Recover<'_>>,
    exclude: &Arc<Patterns>,
    (bounds, checkpoint): (Option<&Bounds>, Option<Generation>),
    progress: &Progress,
) -> Result<()> {
    let files = which.iter().map(|&index| Some(members[index].catalog_file())).collect();
    let member = &members[which[0]];
    let catalog = Catalog::open_within(ReplicaMap::new(files), false, member.site.timeout())?;
    let result = (|| {
        let told = catalog.time_of(catalog.generation())?;
        let promised = catalog.durable_to()?;
        let bounds = bounds.map(|bounds| bounds.clone().told_at(told).durable_to(promised));
        let bounds = bounds.as_ref();
        if let Some(recover) = recover {
            let from = bounds.map_or(0, Bounds::undo_from);
            complete_history(members, which, &catalog, from, progress)?;
            let own = replica_set(std::slice::from_ref(member))?;
            if bounds.is_some() {
                // The logs tell that no commit which was durable is gone.
                history::recover::remove_strays(&own, &catalog)?;
            }
            recover(&own, &catalog, from)?;
        }
        let files = bounds.map_or_else(Vec::new, Bounds::files);
        let search = checkpoint.filter(|_| recover.is_some()).map(|checkpoint| regain::Search {
            site: &member.site,
            peers,
            catalog: &catalog,
            checkpoint,
            since: checkpoint.max(promised),
            files,
            progress,
        });
        search.as_ref().map_or(Ok(()), regain::regain)?;
        let within = bounds.map(|bounds| (bounds, short_id(member)));
        let report = import::import(&member.site, peers, &catalog, exclude, within, progress)?;
        if !report.is_nothing() {
            log::info!("{}: {report}", member.site.path.display());
        }
        search.as_ref().map_or(Ok(()), regain::settle)?;
        // What the last mount wrote and died before it was durable is relied on from here on.
        member.site.backing.sync_all().context("make durable", &member.site.path)?;
        catalog.flush(Durability::Durable)
    })();
    // Closed in any case, so that what was read before an interruption is kept.
    let closed = catalog.close();
    // Whatever was done on the others: it is not to be recovered from, nor to.
    match catalog.failed_replicas().iter().find(|(_, failure)| *failure == Failure::Hangs) {
        Some((id, _)) => {
            let path = &members[which[id.index()]].site.path;
            Err(Errno::TIMEDOUT).context("write the catalog in", path)
        }
        None => result.and(closed),
    }
}

/// Brings what history has unrecorded to each of these replicas, before all their catalogs get rows
/// of it: whichever is ahead when we die, its replica has the bytes.
fn complete_history(
    members: &[Member],
    which: &[usize],
    catalog: &Catalog,
    undo_from: u64,
    progress: &Progress,
) -> Result<()> {
    let alone = |&index: &usize| {
        let member = &members[index];
        Ok((&member.site, replica_set(std::slice::from_ref(member))?))
    };
    let each = which.iter().map(alone).collect::<Result<Vec<_>>>()?;
    let [(site, own), others @ ..] = &each[..] else { return Ok(()) };
    if others.is_empty() {
        return Ok(());
    }
    // Whole contents first: images of what came after one was moved aside, on a replica where it
    // was not, would be taken for its own.
    let mut newest = BTreeMap::<NodeId, ContentId>::new();
    for (_, replica) in &each {
        for (node, content) in history::undo::newest(replica, undo_from)? {
            let known = newest.entry(node).or_insert(content);
            *known = content.max(*known);
        }
    }
    for (other, theirs) in others {
        let aside = history::recover::overwritten_since(theirs, catalog, &newest)?;
        regain::complete((other, site), &aside, true, progress)?;
    }
    let aside = history::recover::unrecorded(own, catalog)?;
    for (other, _) in others {
        regain::complete((site, other), &aside, false, progress)?;
    }
    let all = which.iter().map(|&index| members[index].as_replica());
    history::undo::complete(&ReplicaSet::new(all.collect::<Result<Vec<_>>>()?), undo_from)
}

/// Takes the live tree of a backing into a catalog that was made anew. Pushed, not flushed.
pub fn import_tree(
    site: &Site,
    catalog: &Catalog,
    exclude: &Arc<Patterns>,
    progress: &Progress,
) -> Result<()> {
    import::import(site, &[], catalog, exclude, None, progress).map(|_| ())
}

fn short_id(member: &Member) -> u64 {
    member.marker.replica.as_u64_pair().0
}

fn adopt(
    members: &mut [Member],
    source: usize,
    exclude: &Arc<Patterns>,
    progress: &Progress,
) -> Result<()> {
    let member = &members[source];
    if !member.site.catalog_head().is_ok_and(|head| head.store == member.marker.store) {
        let (site, store) = (member.site.clone(), member.marker.store);
        member.site.within("make the catalog in", move || {
            // An unfinished catalog has no history yet: nothing is lost with it.
            for name in [CATALOG_FILE, "catalog.db-wal", "catalog.db-shm"] {
                let path = site.private_path(name);
                site::ignore_missing(std::fs::remove_file(&path)).context("remove", &path)?;
            }
            Catalog::create(&site.private_path(CATALOG_FILE), store)
        })?;
    }
    take_in(members, &[source], &[], None, exclude, (None, None), progress)?;
    let member = &mut members[source];
    let head = member.site.catalog_head()?;
    member.marker.phase = Phase::Ok;
    member.marker.clean = Some(CleanMark::of(&head));
    member.write_marker()
}

/// Fills all replicas but the current ones from the winner.
fn fill_others(
    members: &mut [Member],
    winner: usize,
    current: &[bool],
    heads: &[Option<Head>],
    progress: &Progress,
) -> Result<()> {
    let source = members[winner].site.clone();
    let since = |member: &Member| member.marker.opened.map(Timestamp::from_nanos);
    let winner_since = since(&members[winner]);
    for index in (0..members.len()).filter(|&index| !current[index]) {
        let member = &mut members[index];
        let lost_catalog = member.marker.phase == Phase::Ok && heads[index].is_none();
        let since = [winner_since, since(member)].into_iter().flatten().min();
        let target = member.site.clone();
        let mut begin = || {
            // From here on until the end it is no whole copy, whatever its catalog says.
            if member.marker.phase != Phase::Filling {
                member.marker.phase = Phase::Filling;
                member.marker.clean = None;
                member.write_marker()?;
            }
            Ok(())
        };
        let report = fill::fill(&source, &target, since, &mut begin, progress)?;
        if !report.is_nothing() {
            log::info!("{}: {report}", target.path.display());
        }
        member.site.copy_catalog(&source)?;
        if lost_catalog {
            let (healed, from) = (member.site.path.display(), source.path.display());
            log::warn!(
                "{healed}: its catalog was damaged and was made anew from the one in {from}"
            );
        }
        member.site.backing.sync_all().context("make durable", &member.site.path)?;
        member.marker.phase = Phase::Ok;
    }
    Ok(())
}

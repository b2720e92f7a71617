//! Which replica goes on, and making it and the others whole: the part of a mount between the locks
//! and the markers.
//!
//! The judgement itself is pure ([`lineage`]); here it is fed and carried out. A catalog whose
//! damage shows only on the way loses its say, and it is judged again: as long as one replica is
//! whole, there is a winner. Killed anywhere, the next mount does the rest.

use std::sync::Arc;

use super::lineage::{self, Standing, Verdict};
use super::marker::{CleanMark, Marker, PeerState, Phase};
use super::site::{self, Site};
use super::{CATALOG_FILE, Member, Recover, fill, import, replica_set};
use crate::catalog::{Catalog, Durability, Head};
use crate::error::{Error, IoContext, Result};
use crate::excludes::Patterns;
use crate::progress::Progress;
use crate::types::{ReplicaMap, Timestamp};

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
fn holds_stale(own: &Marker, other: &Marker) -> bool {
    match own.peer(other.replica) {
        Some(peer) => peer.state == PeerState::Stale,
        None => {
            let whole = own.phase == Phase::Ok && other.phase == Phase::Ok;
            whole && !own.peers.is_empty() && other.peer(own.replica).is_some()
        }
    }
}

/// Finds the winner, finishes what the last mount left of it, and makes the others equal to it.
pub(super) fn settle(
    members: &mut [Member],
    recover: Recover<'_>,
    exclude: &Arc<Patterns>,
    progress: &Progress,
) -> Result<usize> {
    let mut heads: Vec<Option<Head>> = members.iter().map(Member::head).collect();
    loop {
        let verdict = judge(members, &heads);
        let winner = match &verdict {
            Verdict::Winner { winner, .. } => Some(*winner),
            _ => None,
        };
        match (settle_by(members, verdict, &heads, recover, exclude, progress), winner) {
            // Damage that shows only now: whoever else has a whole catalog wins instead.
            (Err(error), Some(winner))
                if is_catalog_damage(&error) && has_other_head(members, &heads, winner) =>
            {
                log::error!("{}: {error}", members[winner].site.path.display());
                heads[winner] = None;
            }
            (result, _) => return result,
        }
    }
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
    heads: &[Option<Head>],
    recover: Recover<'_>,
    exclude: &Arc<Patterns>,
    progress: &Progress,
) -> Result<usize> {
    let shown = |index: usize| members[index].site.path.display();
    let (winner, current) = match verdict {
        Verdict::Winner { winner, current, clean: true } => (winner, current),
        Verdict::Winner { winner, current, clean: false } => {
            log::warn!("{}: the last mount did not end cleanly; recovering", shown(winner));
            let peers = other_sites(members, winner);
            take_in(&members[winner], &peers, Some(recover), exclude, progress)?;
            // Recovery went on in the winner alone.
            (winner, (0..current.len()).map(|index| index == winner).collect())
        }
        Verdict::Adopting(source) => {
            adopt(&mut members[source], exclude, progress)?;
            (source, (0..members.len()).map(|index| index == source).collect())
        }
        Verdict::Fork(a, b) => {
            return Err(Error::Refused(format!(
                "{} and {} were used separately and both changed: neither can replace the other \
                 unasked. Nothing was touched. Mount the one to keep alone; for the other, move \
                 all that is in it, .rearview too, elsewhere, and mount both with --init: the \
                 empty directory is then filled",
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
    fill_others(members, winner, &current, heads, progress)?;
    Ok(winner)
}

/// The backings of all members but one.
fn other_sites(members: &[Member], but: usize) -> Vec<Site> {
    let others = (0..members.len()).filter(|&index| index != but);
    others.map(|index| members[index].site.clone()).collect()
}

/// Makes the catalog of a replica agree with its live tree. Durable when it returns.
fn take_in(
    member: &Member,
    peers: &[Site],
    recover: Option<Recover<'_>>,
    exclude: &Arc<Patterns>,
    progress: &Progress,
) -> Result<()> {
    let files = ReplicaMap::new(vec![Some(member.catalog_file())]);
    let catalog = Catalog::open(files, false)?;
    let result = (|| {
        if let Some(recover) = recover {
            recover(&replica_set(std::slice::from_ref(member))?, &catalog)?;
        }
        let report = import::import(&member.site, peers, &catalog, exclude, progress)?;
        if !report.is_nothing() {
            log::info!("{}: {report}", member.site.path.display());
        }
        catalog.flush(Durability::Durable)
    })();
    // Closed in any case, so that what was read before an interruption is kept.
    let closed = catalog.close();
    result.and(closed)
}

/// Takes the live tree of a backing into a catalog that was made anew. Pushed, not flushed.
pub fn import_tree(
    site: &Site,
    catalog: &Catalog,
    exclude: &Arc<Patterns>,
    progress: &Progress,
) -> Result<()> {
    import::import(site, &[], catalog, exclude, progress).map(|_| ())
}

fn adopt(member: &mut Member, exclude: &Arc<Patterns>, progress: &Progress) -> Result<()> {
    let file = member.catalog_file();
    if !Catalog::inspect(&file).is_ok_and(|head| head.store == member.marker.store) {
        // An unfinished catalog has no history yet: nothing is lost with it.
        for name in [CATALOG_FILE, "catalog.db-wal", "catalog.db-shm"] {
            let path = member.site.private_path(name);
            site::ignore_missing(std::fs::remove_file(&path)).context("remove", &path)?;
        }
        Catalog::create(&file, member.marker.store)?;
    }
    take_in(member, &[], None, exclude, progress)?;
    member.site.backing.sync_all().context("make durable", &member.site.path)?;
    let head = Catalog::inspect(&file)?;
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
        Catalog::copy(&source.private_path(CATALOG_FILE), &member.catalog_file())?;
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

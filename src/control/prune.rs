//! `prune` on a mounted store: the plan carried out.

use crate::error::{Error, Result};
use crate::report::prune::{PruneReport, plan};
use crate::retention::{Policy, StorePolicy};
use crate::volume::Volume;

/// What is asked for: see [`super::Request::Prune`].
pub(super) struct Wanted {
    pub policy: Option<Box<Policy>>,
    pub dry_run: bool,
    pub allow_none: bool,
    pub save: bool,
}

/// Removes what the policy does not keep; with `dry_run` it only tells what.
pub(super) fn prune(volume: &Volume, wanted: Wanted) -> Result<PruneReport> {
    let Wanted { policy, dry_run, allow_none, save } = wanted;
    let own = volume.policy();
    let mut report = plan(volume.catalog(), policy.as_deref(), allow_none, &own)?;
    if dry_run {
        return Ok(report);
    }
    report.dry_run = false;
    // First, so that nothing is gone if it fails.
    if let (true, Some(policy)) = (save, &policy) {
        volume.set_policy(&StorePolicy { snapshots: Policy::clone(policy), ..own.clone() })?;
        report.saved = true;
    }
    remove(volume, &mut report)?;
    report.freed_bytes = reclaim(volume, policy.is_none().then_some(&own))?;
    Ok(report)
}

/// Removes the snapshots that are to go. Between the plan and now somebody may have removed one of
/// them, or held it: that one is told of last.
fn remove(volume: &Volume, report: &mut PruneReport) -> Result<()> {
    let planned = std::mem::take(&mut report.dropped);
    let names: Vec<&str> = planned.iter().map(|item| item.name.as_str()).collect();
    let outcomes = volume.catalog().delete_snapshots(&names)?;
    for (mut item, outcome) in planned.into_iter().zip(outcomes) {
        match outcome {
            Ok(_) | Err(Error::NotFound(_)) => report.dropped.push(item),
            Err(Error::InUse(_)) => {
                item.held = true;
                item.reasons = vec!["held".into()];
                report.kept.push(item);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Gives back what nothing shows any more, and tells how many bytes that were. With the store's
/// `own` policy, its tiers of versions and its limits on space are applied first.
fn reclaim(volume: &Volume, own: Option<&StorePolicy>) -> Result<u64> {
    let before = volume.catalog().totals()?.history_bytes();
    match own {
        Some(_) => volume.prune_by_policy()?,
        None => drop(volume.tidy_history()?),
    }
    Ok(before.saturating_sub(volume.catalog().totals()?.history_bytes()))
}

//! What a prune keeps and removes, with the reasons.

use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use super::time_text;
use crate::catalog::{Catalog, Snapshot};
use crate::error::Result;
use crate::retention::{Asked, Decision, Item, Policy, Span, StorePolicy, decide};
use crate::types::Timestamp;

/// A snapshot, and why it is kept or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneItem {
    /// Its name.
    pub name: String,
    /// The moment it shows.
    pub time: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// Made by a schedule.
    pub automatic: bool,
    /// Cannot be deleted.
    pub held: bool,
    /// Each rule that keeps it; of one that is removed, why each rule does not.
    pub reasons: Vec<String>,
}

/// What a prune does, or would do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneReport {
    /// The snapshots that stay, oldest first.
    pub kept: Vec<PruneItem>,
    /// The snapshots that go, oldest first.
    pub dropped: Vec<PruneItem>,
    /// Nothing was removed, this is what would be.
    pub dry_run: bool,
    /// It was the store's own policy that was applied, not one given for this time.
    pub own_policy: bool,
    /// The given policy is the store's own from now on.
    pub saved: bool,
    /// Bytes that this gave back on each backing.
    pub freed_bytes: u64,
}

/// Decides on all snapshots. A `given` policy is a person's word and may remove any snapshot that
/// is not held, as young as it may be; without one the store's `own` policy decides on the
/// automatic snapshots. Removes nothing.
pub fn plan(
    catalog: &Catalog,
    given: Option<&Policy>,
    allow_none: bool,
    own: &StorePolicy,
) -> Result<PruneReport> {
    let asked = match given {
        Some(policy) => Asked { policy, automatic_only: false, protect: Span::ZERO, allow_none },
        None => Asked {
            policy: &own.snapshots,
            automatic_only: true,
            protect: own.protect,
            allow_none: false,
        },
    };
    let snapshots = catalog.snapshots()?;
    let items: Vec<Item> = snapshots.iter().map(Item::from).collect();
    let decisions = decide(&asked, &items, Timestamp::now(), &TimeZone::system())?;
    let mut report = PruneReport {
        kept: Vec::new(),
        dropped: Vec::new(),
        dry_run: true,
        own_policy: given.is_none(),
        saved: false,
        freed_bytes: 0,
    };
    for (snapshot, decision) in snapshots.iter().zip(decisions) {
        let list = if decision.keep { &mut report.kept } else { &mut report.dropped };
        list.push(line(snapshot, decision));
    }
    Ok(report)
}

fn line(snapshot: &Snapshot, decision: Decision) -> PruneItem {
    PruneItem {
        name: snapshot.name.clone(),
        time: time_text(snapshot.time),
        tags: snapshot.tags.clone(),
        automatic: snapshot.automatic,
        held: snapshot.held,
        reasons: decision.reasons,
    }
}

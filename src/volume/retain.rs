//! Retention: what the store does by itself so that history stays useful and small.
//!
//! Automatic snapshots, their pruning, the thinning of versions by age, and the yielding of history
//! where space runs short: the oldest first, never what is held, never what is younger than the
//! protected window. All of it only decides what stays visible; the sweep then removes what
//! nothing shows.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use rustix::io::Errno;

use crate::catalog::{Change, Snapshot};
use crate::error::{Error, Result};
use crate::replica::Need;
use crate::retention::{self, Asked, Item, StorePolicy, moments, seen};
use crate::types::{ContentId, Generation, ReplicaId, SnapshotId, Timestamp};

use super::Volume;

/// How long a write that finds no room waits for history to yield.
const ROOM_WAIT: Duration = Duration::from_secs(20);
/// Names tried for an automatic snapshot of one second.
const NAMES_MAX: usize = 1000;
/// Part of the time between horizon and protected window by which the horizon moves where space
/// is short.
const YIELD_PART: i64 = 4;

/// What is known of space between two looks at it.
#[derive(Debug, Default)]
pub(super) struct SpaceBook {
    /// What a person should know; nothing where space is no matter.
    pub warning: Option<String>,
    /// A change that needs so much was refused, and there was no room for it since.
    refused: Option<Need>,
    /// What deleting snapshots would free, as of this epoch of the catalog.
    freed: HashMap<SnapshotId, u64>,
    epoch: u64,
    /// All of them are.
    counted: bool,
}

impl From<&Snapshot> for Item {
    fn from(snapshot: &Snapshot) -> Item {
        Item {
            name: snapshot.name.clone(),
            time: snapshot.time,
            tags: snapshot.tags.clone(),
            held: snapshot.held,
            automatic: snapshot.automatic,
        }
    }
}

impl Volume {
    /// Applies the store's own policy now: automatic snapshots that are too many, versions that are
    /// too old, space that is short. What that leaves is swept by the background work.
    pub(super) fn apply_policy(&self) -> Result<()> {
        let policy = self.policy();
        let now = Timestamp::now();
        self.prune_automatic(&policy, now)?;
        self.thin_versions(&policy, now)?;
        self.yield_history(&policy, now)
    }

    /// Makes the automatic snapshot that is due, if anything changed since the last one.
    pub(super) fn snapshot_if_due(&self) -> Result<Option<Snapshot>> {
        let every = i64::try_from(self.policy().every.even_secs()).unwrap_or(i64::MAX);
        if every == 0 {
            return Ok(None);
        }
        let now = Timestamp::now();
        let last = self.catalog().latest_automatic()?;
        let since = match &last {
            Some(last) => last.time,
            None => self.catalog().time_of(self.catalog().oldest()?)?,
        };
        // On the hour, not an hour after the last one: so that those of many days match.
        if now.secs.div_euclid(every) <= since.secs.div_euclid(every) {
            return Ok(None);
        }
        let generation = last.map_or(Generation(0), |last| last.generation);
        if !self.catalog().changed_since(generation)? {
            return Ok(None);
        }
        let stem = crate::time::snapshot_name(now);
        let mut name = stem.clone();
        for number in 2..NAMES_MAX {
            if self.catalog().snapshot(&name)?.is_none() {
                break;
            }
            name = format!("{stem}_{number}");
        }
        self.create_snapshot(&name, true, &[]).map(Some)
    }

    /// For each snapshot the bytes that would go if it alone were deleted, exact; `None` for those
    /// that are not counted within `time`. Counted ones are remembered until history changes.
    pub fn freed_by(&self, snapshots: &[Snapshot], time: Duration) -> Result<Vec<Option<u64>>> {
        let end = Instant::now() + time;
        self.count(snapshots, end, &|| Instant::now() < end)
    }

    /// Counts until the time is over; what is begun is counted to its end while `go_on` says so.
    fn count(
        &self,
        snapshots: &[Snapshot],
        end: Instant,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<u64>>> {
        let epoch = self.catalog().history_epoch();
        let horizon = self.catalog().horizon()?;
        let deleted_since = self.deleted_since()?;
        // What is continuous shows all of it without the snapshot.
        let nothing = |snapshot: &Snapshot| (snapshot.generation >= horizon).then_some(0);
        let mut freed: Vec<Option<u64>> = {
            let mut book = self.space.lock();
            if book.epoch != epoch {
                book.epoch = epoch;
                book.freed.clear();
                book.counted = false;
            }
            let known = |one: &Snapshot| nothing(one).or_else(|| book.freed.get(&one.id).copied());
            snapshots.iter().map(known).collect()
        };
        let uncounted = snapshots.iter().zip(&mut freed).filter(|(_, freed)| freed.is_none());
        for (snapshot, freed) in uncounted {
            if Instant::now() >= end {
                break;
            }
            let counted = self.catalog().freed_without(snapshot, deleted_since, go_on)?;
            let Some(bytes) = counted else { break };
            let mut book = self.space.lock();
            if book.epoch == epoch {
                book.freed.insert(snapshot.id, bytes);
            }
            *freed = Some(bytes);
        }
        let mut book = self.space.lock();
        book.counted = book.epoch == epoch && freed.iter().all(Option::is_some);
        Ok(freed)
    }

    /// Counts in the background what deleting each snapshot would free, unless it is counted. Each
    /// is counted to its end, however long that takes: else the one that takes longest never was.
    pub(super) fn count_freed(&self, time: Duration) -> Result<()> {
        let epoch = self.catalog().history_epoch();
        {
            let book = self.space.lock();
            if book.counted && book.epoch == epoch {
                return Ok(());
            }
        }
        let end = Instant::now() + time;
        let go_on = || self.check_stop().is_ok();
        self.count(&self.catalog().snapshots()?, end, &go_on).map(drop)
    }

    fn prune_automatic(&self, policy: &StorePolicy, now: Timestamp) -> Result<()> {
        let snapshots = self.catalog().snapshots()?;
        let items: Vec<Item> = snapshots.iter().map(Item::from).collect();
        let asked = Asked {
            policy: &policy.snapshots,
            automatic_only: true,
            protect: policy.protect,
            allow_none: true,
        };
        let decisions = retention::decide(&asked, &items, now, &TimeZone::system())?;
        let decided = snapshots.iter().zip(decisions);
        let going: Vec<&str> = decided
            .filter(|(_, decision)| !decision.keep)
            .map(|(snapshot, _)| snapshot.name.as_str())
            .collect();
        for outcome in self.catalog().delete_snapshots(&going)? {
            match outcome {
                // Somebody held or removed it meanwhile.
                Err(Error::InUse(_) | Error::NotFound(_)) => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    fn thin_versions(&self, policy: &StorePolicy, now: Timestamp) -> Result<()> {
        let catalog = self.catalog();
        let tiers = &policy.versions;
        let horizon = catalog.horizon()?;
        let known: Vec<(Generation, Timestamp)> = catalog
            .moments()?
            .into_iter()
            .map(|g| Ok((g, catalog.time_of(g)?)))
            .collect::<Result<_>>()?;
        let until = tiers.all.even_before(now).min(policy.protect.even_before(now));
        let at = (horizon, catalog.time_of(horizon)?);
        if at.1 >= until {
            // Nothing is old enough.
            return Ok(());
        }
        let ticks = catalog.ticks(horizon, until)?;
        let seen = seen(&known, at, &ticks, catalog.generation());
        let zone = TimeZone::system();
        let thinning = moments(tiers, policy.protect, seen.into_iter(), &zone, now);
        // A clock that was set back takes nothing.
        if thinning.horizon >= horizon {
            catalog.thin(thinning.horizon, &thinning.keep.into_iter().collect())?;
        }
        let forget = tiers.deleted.even_before(now);
        // Not what is visible of that time: that may be a much later generation. Nor where that
        // time began on record: what was deleted last, before a store was left alone, is no later
        // than that and would stay for as long as nothing else happened.
        if let Some(since) = catalog.recorded_after(forget)? {
            self.forget_deletions(since)?;
        }
        Ok(())
    }

    /// What was deleted before `since` is kept no longer for that.
    pub(super) fn forget_deletions(&self, since: Generation) -> Result<()> {
        let before = self.deleted_since()?;
        if since <= before {
            return Ok(());
        }
        self.catalog().sweep_again(before, since)?;
        let (key, value) = ("deleted_since", since.0.to_string());
        self.catalog().push(vec![Change::MetaPut { key, value }])?;
        Ok(())
    }

    /// Lets history yield where it takes more space than it may.
    fn yield_history(&self, policy: &StorePolicy, now: Timestamp) -> Result<()> {
        let mut dropped = false;
        let mut packed = false;
        loop {
            let Some(short) = self.shortage(policy)? else {
                let mut book = self.space.lock();
                if book.refused.is_none() {
                    book.warning = None;
                }
                return Ok(());
            };
            // What nobody uses goes first.
            if self.squeeze()? {
                continue;
            }
            if !packed {
                packed = true;
                self.pack_where_there_is_room()?;
                continue;
            }
            if !dropped {
                log::warn!("{short}: the oldest history that is not held yields");
            }
            dropped = true;
            if !self.yield_oldest(policy, now)? {
                let mut warning = self.space.lock();
                let remedy = self.remedy();
                let text = format!(
                    "{short}, and there is no history left that may yield: {remedy}, or change \
                     the limits"
                );
                if warning.warning.as_ref() != Some(&text) {
                    log::warn!("{text}");
                }
                warning.warning = Some(text);
                return Ok(());
            }
            self.space.lock().warning = Some(format!("{short}: the oldest history yields"));
            self.free_unused(&|| self.check_stop())?;
        }
    }

    /// Which limit of the policy is broken, in words.
    fn shortage(&self, policy: &StorePolicy) -> Result<Option<String>> {
        let totals = self.catalog().totals()?;
        let history = totals.history_bytes();
        for id in self.replicas().online() {
            let replica = self.replicas().get(id);
            let Ok(space) = replica.backing().space() else { continue };
            let path = crate::types::escape(replica.path.display().to_string().as_bytes());
            let size = space.blocks.saturating_mul(space.block_bytes);
            let free = space.available.saturating_mul(space.block_bytes);
            let wanted = policy.free_limit.of(size);
            // History that takes nothing has nothing to give.
            if free < wanted && history > 0 {
                return Ok(Some(format!(
                    "{path}: {} MiB are free, {} MiB are to be kept free",
                    free >> 20,
                    wanted >> 20
                )));
            }
            if let Some(limit) = policy.history_limit
                && history > limit.of(size)
            {
                return Ok(Some(format!(
                    "{path}: history takes {} MiB of the {} MiB that it may",
                    history >> 20,
                    limit.of(size) >> 20
                )));
            }
        }
        Ok(None)
    }

    /// Makes the oldest visible generation that may go invisible; `false` if there is none.
    fn yield_oldest(&self, policy: &StorePolicy, now: Timestamp) -> Result<bool> {
        let catalog = self.catalog();
        let horizon = catalog.horizon()?;
        let protected = policy.protect.even_before(now);
        let snapshots = catalog.snapshots()?;
        let moments = catalog.moments()?;
        // Without a snapshot that lies in what is continuous not a byte would be free.
        let oldest = snapshots.iter().find(|snapshot| {
            !snapshot.held && snapshot.time < protected && snapshot.generation < horizon
        });
        let moment = moments.first().copied();
        match (oldest, moment) {
            (Some(snapshot), moment) if moment.is_none_or(|g| snapshot.generation <= g) => {
                catalog.delete_snapshot(&snapshot.name)?;
                log::warn!("snapshot '{}' yielded its space", snapshot.name);
                self.forget_deletions(snapshot.generation.min(horizon))?;
                return Ok(true);
            }
            (_, Some(moment)) => {
                let rest: BTreeSet<Generation> =
                    moments.into_iter().filter(|g| *g != moment).collect();
                catalog.thin(horizon, &rest)?;
                self.forget_deletions(moment)?;
                return Ok(true);
            }
            _ => {}
        }
        // Only what is still continuous is left, as far as it is not protected.
        let begin = catalog.time_of(horizon)?;
        let span = protected.as_nanos().saturating_sub(begin.as_nanos());
        if span <= 0 {
            return Ok(false);
        }
        let target = Timestamp::from_nanos(begin.as_nanos().saturating_add(span / YIELD_PART + 1));
        let mut next = catalog.generation_at(target)?.unwrap_or(horizon);
        if next <= horizon {
            next = catalog.generation_at(protected)?.unwrap_or(horizon);
        }
        if next <= horizon {
            return Ok(false);
        }
        catalog.thin(next, &moments)?;
        self.forget_deletions(next)?;
        Ok(true)
    }

    /// Fails with `ENOSPC` unless there is room on every backing; before that, history yields.
    pub(super) fn ensure_room(&self, need: impl Into<Need>) -> Result<()> {
        let need = need.into();
        match self.replicas().ensure_room(need) {
            Err(error) if error.is(Errno::NOSPC) => {}
            answer => return answer,
        }
        // What runs in the background stops at its next step.
        self.urgent.fetch_add(1, Ordering::SeqCst);
        let outcome = self.yield_until_room(need);
        self.urgent.fetch_sub(1, Ordering::SeqCst);
        outcome
    }

    fn yield_until_room(&self, need: Need) -> Result<()> {
        let Some(_alone) = self.maintenance.try_lock_for(ROOM_WAIT) else {
            return Err(Errno::NOSPC.into());
        };
        let policy = self.policy();
        let mut told = false;
        let mut packed = false;
        self.remove_segments()?;
        let (mut waiting, begun) = (usize::MAX, Instant::now());
        loop {
            match self.replicas().ensure_room(need) {
                Err(error) if error.is(Errno::NOSPC) => {}
                answer => return answer,
            }
            // A smaller pack gives no inode.
            let lacks_bytes = self.replicas().ensure_room(need.bytes).is_err();
            if lacks_bytes && self.squeeze()? {
                continue;
            }
            if !packed {
                packed = true;
                self.pack_for_room(&|| self.replicas().ensure_room(need).is_ok())?;
                continue;
            }
            if !lacks_bytes {
                // Inodes are short. What is packed has none to give; packing is limited in time.
                let left =
                    self.catalog().waiting_contents(ContentId::EMPTY, usize::MAX >> 1)?.len();
                packed = std::mem::replace(&mut waiting, left) <= left;
                if packed || begun.elapsed() >= ROOM_WAIT {
                    self.note_refusal(need, &policy);
                    return Err(Errno::NOSPC.into());
                }
                continue;
            }
            if !told {
                log::warn!("a backing is full: the oldest history that is not held yields");
                told = true;
            }
            if !self.yield_oldest(&policy, Timestamp::now())? {
                self.note_refusal(need, &policy);
                return Err(Errno::NOSPC.into());
            }
            self.free_unused(&|| Ok(()))?;
        }
    }

    /// A change is refused for want of room: status is to say why.
    fn note_refusal(&self, need: Need, policy: &StorePolicy) {
        let lacks_inodes = self.replicas().ensure_room(need.bytes).is_ok();
        let free = |id: &ReplicaId| {
            let space = self.replicas().get(*id).backing().space();
            space.map_or(u64::MAX, |space| match lacks_inodes {
                true if space.files == 0 => u64::MAX,
                true => space.files_free,
                false => space.available.saturating_mul(space.block_bytes),
            })
        };
        let fullest = self.replicas().online().min_by_key(free);
        let path = fullest.map(|id| self.replicas().get(id).path.display().to_string());
        let path = crate::types::escape(path.unwrap_or_default().as_bytes());
        let text = match lacks_inodes {
            true => format!(
                "{path}: no inodes are left; new files are refused, because what is left of \
                 history is packed: remove files"
            ),
            false => format!(
                "{path}: full; writes are refused, because what is left of history is held or \
                 younger than {}: {}",
                policy.protect,
                self.remedy()
            ),
        };
        let mut book = self.space.lock();
        if book.refused.is_none() {
            log::warn!("{text}");
        }
        book.refused = Some(need);
        book.warning = Some(text);
    }

    /// What frees space where no history may yield by itself.
    fn remedy(&self) -> &'static str {
        let snapshots = self.catalog().snapshots();
        match snapshots.is_ok_and(|all| all.iter().any(|snapshot| snapshot.held)) {
            true => {
                "free space, release snapshots that are held, or take files out of history with \
                 `rearview purge PATH`"
            }
            false => "free space, or take files out of history with `rearview purge PATH`",
        }
    }

    /// What is to be known of space. That a write was refused is over once there is room for it.
    pub(super) fn space_warning(&self) -> Option<String> {
        let refused = self.space.lock().refused;
        if refused.is_some_and(|need| self.replicas().ensure_room(need).is_ok()) {
            let mut book = self.space.lock();
            book.refused = None;
            book.warning = None;
        }
        self.space.lock().warning.clone()
    }
}

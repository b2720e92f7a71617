//! Sweeping a gap: what only generations showed that are visible no more.
//!
//! A sweep has three parts, each done in small steps: the nodes touched at the gap's end, those
//! touched within it, and the times and actors of what is gone. A step is planned from the database
//! and pushed as ordinary changes, so it is atomic, the same on every replica, and repeated without
//! harm after a crash. Nothing else removes history, a gap never becomes visible again, and rows of
//! history do not change by themselves: a plan stays true until it is committed, without a lock.
//!
//! **Steps.** What a step changes is bounded by [`COST_MAX`], so that whoever waits for the commit
//! of something else meanwhile waits for little: a node with a thousand states, a content with a
//! hundred thousand before-images and a recipe of many chunks go piece by piece. States go first,
//! so that nobody sees what is taken apart.
//!
//! **Touched.** Behind the sweep, a node counts as touched exactly where rows that stay begin or
//! end. By that it is found again when a greater gap is swept, and a tick or an act stays where
//! something is touched before the next one.

mod contents;
mod plan;

use std::collections::HashSet;

use rusqlite::{Connection, params};

use super::touched::{self, Touch};
use super::{Catalog, Change, ForgetChange};
use crate::error::Result;
use crate::types::{ContentId, Generation, NodeId};

pub(super) use self::plan::Plan;

/// What a step may cost: about so many rows are looked at, and written, which takes a few
/// milliseconds. It is exceeded by the chunks of one stream at most.
pub(super) const COST_MAX: usize = 64;

/// A gap between two visible generations, and how far its sweep is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// The visible generation before it.
    pub after: Generation,
    /// The visible generation that ends it.
    pub until: Generation,
    /// How far it is.
    pub at: SweepPlace,
}

/// How far a sweep is. The parts follow each other in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SweepPlace {
    /// This node, touched at the end of the gap, was looked at last.
    End(Generation, NodeId),
    /// This node, touched in the gap, was looked at last.
    Within(Generation, NodeId),
    /// Times and actors were looked at up to this generation.
    Times(Generation),
}

/// What stands in `at_g` for the part of the times, whose generation then is in `at_node`.
const TIMES: Generation = Generation(i64::MAX as u64);

impl SweepPlace {
    /// Where the sweep of a gap begins.
    pub(super) fn begin(until: Generation) -> SweepPlace {
        SweepPlace::End(until, NodeId(0))
    }

    /// From the columns `at_g` and `at_node`, for a gap that ends at `until`.
    pub(super) fn from_columns(until: Generation, at: (Generation, NodeId)) -> SweepPlace {
        match at {
            (TIMES, NodeId(g)) => SweepPlace::Times(Generation(g)),
            (g, node) if g >= until => SweepPlace::End(g, node),
            (g, node) => SweepPlace::Within(g, node),
        }
    }

    /// The inverse of [`SweepPlace::from_columns`].
    pub(super) fn columns(self) -> (Generation, NodeId) {
        match self {
            SweepPlace::End(g, node) | SweepPlace::Within(g, node) => (g, node),
            SweepPlace::Times(g) => (TIMES, NodeId(g.0)),
        }
    }
}

/// One step of a sweep, or of another removal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SweepStep {
    /// To be pushed at once.
    pub changes: Vec<Change>,
    /// Contents whose files in `preserved/` are of no use once the changes are durable.
    pub unpreserved: Vec<(NodeId, ContentId)>,
    /// The sweep is at its end with this step.
    pub done: bool,
}

impl Catalog {
    /// Does the next step of a sweep. What was deleted at or after `deleted_since` keeps its last
    /// state. The caller is the only one who removes history or moves preserved bytes.
    pub fn sweep_on(&self, sweep: &Sweep, deleted_since: Generation) -> Result<SweepStep> {
        self.sweep_within(sweep, deleted_since, COST_MAX)
    }

    /// As [`Catalog::sweep_on`], by steps of another size.
    pub(super) fn sweep_within(
        &self,
        sweep: &Sweep,
        deleted_since: Generation,
        cost_max: usize,
    ) -> Result<SweepStep> {
        self.settle_pending()?;
        let plan = |db: &Connection| plan_step(Plan::new(db, cost_max), sweep, deleted_since);
        let step = self.shared.read_at_once(plan)?;
        self.push(step.changes.clone())?;
        Ok(step)
    }

    /// Plans the removal of past states of a node, whatever shows them. `done` when none is left.
    pub fn plan_purge(&self, node: NodeId) -> Result<SweepStep> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut plan = Plan::new(db, COST_MAX);
            let (after, until) = (Generation(0), Generation(i64::MAX as u64));
            let all = Sweep { after, until, at: SweepPlace::begin(until) };
            let done = plan.sweep_node(node, &all, all.until)?;
            plan.untouch(node, &all)?;
            Ok(plan.finish(done))
        })
    }
}

fn plan_step(
    mut plan: Plan<'_>,
    sweep: &Sweep,
    deleted_since: Generation,
) -> rusqlite::Result<SweepStep> {
    let (after, until) = (sweep.after, sweep.until);
    let next = match sweep.at {
        SweepPlace::Times(from) => forget_times(&mut plan, sweep, from)?,
        _ => sweep_nodes(&mut plan, sweep, deleted_since)?,
    };
    let done = next.is_none();
    let from = sweep.at;
    plan.add(match next {
        Some(at) => ForgetChange::SweepAt { after, until, from, at },
        None => ForgetChange::SweepEnd { after, until, from },
    });
    Ok(plan.finish(done))
}

/// Plans what goes of the next touched nodes; returns how far that is.
fn sweep_nodes(
    plan: &mut Plan<'_>,
    sweep: &Sweep,
    deleted_since: Generation,
) -> rusqlite::Result<Option<SweepPlace>> {
    let (places, next) = next_touched(plan.db(), sweep, plan.cost_max())?;
    let mut at = sweep.at;
    let mut seen = HashSet::new();
    for (g, node) in places {
        if plan.is_full() {
            return Ok(Some(at));
        }
        if seen.insert(node) {
            if !plan.sweep_node(node, sweep, deleted_since)? {
                return Ok(Some(at));
            }
            plan.note_ends(node, sweep)?;
        }
        plan.touch_exactly(g, node, sweep)?;
        at = match at {
            SweepPlace::End(..) => SweepPlace::End(g, node),
            _ => SweepPlace::Within(g, node),
        };
    }
    Ok(Some(next.unwrap_or(at)))
}

/// The next touched nodes of a sweep, and where it goes on after them if they are the last ones of
/// their part. Stores that older versions wrote have touches by batch, under the batch's last
/// generation: the end of the gap comes with the one that may reach over it.
pub(super) fn next_touched(
    db: &Connection,
    sweep: &Sweep,
    count_max: usize,
) -> rusqlite::Result<(Vec<Touch>, Option<SweepPlace>)> {
    let (g, node) = sweep.at.columns();
    let (until, next) = match sweep.at {
        SweepPlace::End(..) => {
            let over = touched::next(db, sweep.until)?;
            (over.unwrap_or(sweep.until), SweepPlace::Within(sweep.after, NodeId(i64::MAX as u64)))
        }
        _ => (Generation(sweep.until.0.saturating_sub(1)), SweepPlace::Times(sweep.after)),
    };
    let touches = touched::following(db, (g, node), until, count_max)?;
    let last = touches.len() < count_max;
    Ok((touches, last.then_some(next)))
}

/// Plans the end of ticks and acts between which nothing begins or ends any more; returns how far
/// that is, nothing at the end. Those that a visible generation lies in stay.
fn forget_times(
    plan: &mut Plan<'_>,
    sweep: &Sweep,
    from: Generation,
) -> rusqlite::Result<Option<SweepPlace>> {
    let count_max = plan.cost_max();
    let ticks = intervals(
        plan.db(),
        "SELECT g, (SELECT min(n.g) FROM tick n WHERE n.g > tick.g) FROM tick \
         WHERE g > ?1 AND g < ?2 ORDER BY g LIMIT ?3",
        (from, sweep.until, count_max),
    )?;
    let acts = intervals(
        plan.db(),
        "SELECT g, (SELECT min(n.g) FROM act n WHERE n.g > act.g) FROM act \
         WHERE g > ?1 AND g < ?2 ORDER BY g LIMIT ?3",
        (from, sweep.until, count_max),
    )?;
    let end = |rows: &[(Generation, Option<Generation>)]| match rows.last() {
        Some((last, _)) if rows.len() == count_max => *last,
        _ => sweep.until,
    };
    let to = end(&ticks).min(end(&acts));
    let is_useless = |plan: &Plan<'_>, (g, next): (Generation, Option<Generation>)| {
        let Some(next) = next.filter(|next| g <= to && *next <= sweep.until) else {
            return Ok::<_, rusqlite::Error>(false);
        };
        let before = Generation(g.0.saturating_sub(1));
        let used = touched::next(plan.db(), before)?.is_some_and(|at| at < next);
        Ok(!used)
    };
    for tick in ticks {
        if is_useless(plan, tick)? {
            plan.add(ForgetChange::Tick(tick.0));
        }
    }
    for act in acts {
        if is_useless(plan, act)? {
            plan.add(ForgetChange::Act(act.0));
        }
    }
    Ok((to < sweep.until).then_some(SweepPlace::Times(to)))
}

/// Rows that count from a generation on until the next one.
fn intervals(
    db: &Connection,
    sql: &str,
    (from, until, count_max): (Generation, Generation, usize),
) -> rusqlite::Result<Vec<(Generation, Option<Generation>)>> {
    let mut statement = db.prepare_cached(sql)?;
    statement
        .query_map(params![from, until, count_max as i64], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect()
}

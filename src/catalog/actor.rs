//! Who made which generation.
//!
//! An actor is a process as it was when it changed something: user, number, command. Actors are
//! interned in `actor`, and a row of `act` says whose the generations are from there on, until the
//! next row: a process that makes a thousand files costs one row of each. Generations before the
//! first row and those of actor 0 are nobody's but our own: housekeeping, recovery, import.
//!
//! Only a generation in which a version or a name begins or ends counts. Where preserved bytes lie
//! and what snapshots are called is no version: such a push leaves the actor as he was.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroUsize;
use std::ops::Range;

use lru::LruCache;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::diff::touched_between;
use super::overlay::Bytes;
use super::schema::unsigned;
use super::{Catalog, Change};
use crate::error::Result;
use crate::types::{Generation, NodeId};

/// Actors whose ids are kept in memory. One that comes back after so many others gets a new id.
const KNOWN_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// The actor of what no process asked for. It has no row in `actor`.
pub(super) const OURSELVES: u64 = 0;

/// A process that changed something.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Actor {
    /// The user as whom it did so.
    pub uid: u32,
    /// Its process id at that time.
    pub pid: u32,
    /// Its command as the kernel calls it, at most 15 bytes; empty where it was gone already.
    pub command: Vec<u8>,
}

/// The actors of this mount and their ids.
pub(super) struct Known {
    ids: LruCache<Actor, u64>,
    /// The first id that this mount gives out.
    first: u64,
    next: u64,
}

impl Known {
    /// Nobody is known; ids go on at `next`.
    pub fn new(next: u64) -> Known {
        Known { ids: LruCache::new(KNOWN_MAX), first: next, next }
    }

    /// Actors from this id on may make something at any time, whatever the rows say.
    pub fn first(&self) -> u64 {
        self.first
    }
}

/// Who made the generations of one batch.
#[derive(Debug, Default)]
pub(super) struct Acts {
    /// Who made the last one before the batch.
    before: u64,
    /// From which generation on who did, ascending.
    rows: Vec<(Generation, u64)>,
    /// Actors that are named for the first time.
    actors: Vec<(u64, Actor)>,
}

impl Acts {
    /// Of the first batch of a mount.
    pub fn after_actor(before: u64) -> Acts {
        Acts { before, ..Acts::default() }
    }

    /// Of the batch that follows this one.
    pub fn next(&self) -> Acts {
        Acts::after_actor(self.last())
    }

    /// The generation `at`, newer than all before, is the work of `by`.
    pub fn note(&mut self, at: Generation, by: Option<&Actor>, known: &mut Known) {
        let id = match by {
            None => OURSELVES,
            Some(actor) => match known.ids.get(actor) {
                Some(&id) => id,
                None => {
                    let id = known.next;
                    known.next += 1;
                    known.ids.put(actor.clone(), id);
                    self.actors.push((id, actor.clone()));
                    id
                }
            },
        };
        if id != self.last() {
            self.rows.push((at, id));
        }
    }

    /// Who made the newest generation.
    pub fn last(&self) -> u64 {
        self.rows.last().map_or(self.before, |(_, id)| *id)
    }

    /// Who made a generation of this batch.
    fn at(&self, at: Generation) -> u64 {
        match self.rows.partition_point(|(g, _)| *g <= at) {
            0 => self.before,
            after => self.rows[after - 1].1,
        }
    }

    /// Whether a change by the newest actor may be folded into a state of the generation `born`: it
    /// is his own, or he is ourselves, who only make times equal.
    pub fn may_fold(&self, born: Generation) -> bool {
        self.last() == OURSELVES || self.last() == self.at(born)
    }

    /// A generation of this batch counts as the newest actor's, unless that is ourselves: he wrote
    /// the file that another only made, as a program does whose output a shell redirects.
    pub fn take_over(&mut self, at: Generation) {
        let (by, was) = (self.last(), self.at(at));
        if by == OURSELVES || by == was {
            return;
        }
        // What follows stays whose it is.
        let after = Generation(at.0 + 1);
        if let Err(index) = self.rows.binary_search_by_key(&after, |(g, _)| *g) {
            self.rows.insert(index, (after, was));
        }
        match self.rows.binary_search_by_key(&at, |(g, _)| *g) {
            Ok(index) => self.rows[index].1 = by,
            Err(index) => self.rows.insert(index, (at, by)),
        }
    }

    /// Adds all of it to the batch's hash.
    pub fn digest(&self, out: &mut Bytes) {
        out.numbers(&[self.rows.len() as u64, self.actors.len() as u64]);
        for (at, id) in &self.rows {
            out.numbers(&[at.0, *id]);
        }
        for (id, actor) in &self.actors {
            out.numbers(&[*id, actor.uid.into(), actor.pid.into()]);
            out.blob(&actor.command);
        }
    }

    /// Writes all of it.
    pub fn write(&self, db: &Connection) -> rusqlite::Result<()> {
        for (id, actor) in &self.actors {
            db.prepare_cached(
                "INSERT OR REPLACE INTO actor(id, uid, pid, command) VALUES(?1, ?2, ?3, ?4)",
            )?
            .execute(params![*id as i64, actor.uid, actor.pid, actor.command])?;
        }
        for (at, id) in &self.rows {
            db.prepare_cached("INSERT OR REPLACE INTO act(g, actor) VALUES(?1, ?2)")?
                .execute(params![at, *id as i64])?;
        }
        Ok(())
    }
}

/// Whether a version or a name begins or ends by a change.
pub(super) fn is_seen(change: &Change) -> bool {
    matches!(
        change,
        Change::NodePut(_)
            | Change::NodeGone(_)
            | Change::EntryAdd { .. }
            | Change::EntryRemove { .. }
    )
}

/// Who made the newest generation of a database, and the id that the next new actor gets. Ids that
/// were handed out but never committed are in no row, so they are free again.
pub(super) fn read_last(db: &Connection) -> rusqlite::Result<(u64, u64)> {
    let last = db
        .prepare_cached("SELECT actor FROM act WHERE g = (SELECT max(g) FROM act)")?
        .query_row([], |row| unsigned(row, 0))
        .optional()?;
    let highest = db
        .prepare_cached("SELECT coalesce(max(id), 0) FROM actor")?
        .query_row([], |row| unsigned(row, 0))?;
    Ok((last.unwrap_or(OURSELVES), highest + 1))
}

impl Catalog {
    /// Who made what began or ended with a generation; `None` where no process asked for it, and
    /// where it is not known.
    pub fn actor_of(&self, generation: Generation) -> Result<Option<Actor>> {
        Ok(self.actors_of(&[generation])?.pop().flatten())
    }

    /// As [`Catalog::actor_of`], for many generations.
    pub fn actors_of(&self, generations: &[Generation]) -> Result<Vec<Option<Actor>>> {
        let settled: Vec<Generation> =
            generations.iter().map(|at| self.settled(*at)).collect::<Result<_>>()?;
        self.shared.read_at_once(|db| {
            let mut of = db.prepare_cached(
                "SELECT uid, pid, command FROM actor WHERE id = \
                 (SELECT actor FROM act WHERE g <= ?1 ORDER BY g DESC LIMIT 1)",
            )?;
            let actor = |row: &Row<'_>| {
                Ok(Actor { uid: row.get(0)?, pid: row.get(1)?, command: row.get(2)? })
            };
            settled.iter().map(|at| of.query_row(params![at], actor).optional()).collect()
        })
    }

    /// The generations after `since` that were made by actors that `is_meant` accepts, as ascending
    /// ranges that do not touch. Costs what changed hands since then.
    pub fn made_by(
        &self,
        since: Generation,
        is_meant: impl Fn(&Actor) -> bool,
    ) -> Result<Vec<Range<Generation>>> {
        let newest = self.settled(self.generation())?;
        self.shared.read_at_once(|db| {
            let mut meant: HashMap<i64, bool> = HashMap::new();
            let mut actor =
                db.prepare_cached("SELECT uid, pid, command FROM actor WHERE id = ?1")?;
            let mut acts = db.prepare_cached(
                "SELECT g, actor FROM act WHERE g >= \
                 (SELECT coalesce(max(g), 0) FROM act WHERE g <= ?1) AND g <= ?2 ORDER BY g",
            )?;
            let mut rows = acts.query(params![since, newest])?;
            let mut ranges: Vec<Range<Generation>> = Vec::new();
            let mut begun: Option<Generation> = None;
            let mut end = |begun: &mut Option<Generation>, at: Generation| {
                if let Some(start) = begun.take()
                    && start < at
                {
                    ranges.push(start..at);
                }
            };
            while let Some(row) = rows.next()? {
                let (at, id): (Generation, i64) = (row.get(0)?, row.get(1)?);
                let known = match meant.get(&id) {
                    Some(&known) => known,
                    None => {
                        let found = actor
                            .query_row(params![id], |row| {
                                Ok(is_meant(&Actor {
                                    uid: row.get(0)?,
                                    pid: row.get(1)?,
                                    command: row.get(2)?,
                                }))
                            })
                            .optional()?;
                        *meant.entry(id).or_insert(found.unwrap_or(false))
                    }
                };
                match (known, begun) {
                    (true, None) => begun = Some(at.max(Generation(since.0 + 1))),
                    (false, Some(_)) => end(&mut begun, at),
                    _ => {}
                }
            }
            end(&mut begun, Generation(newest.0 + 1));
            Ok(ranges)
        })
    }

    /// The nodes touched in these ranges of generations, and a few more.
    pub fn touched_in(&self, ranges: &[Range<Generation>]) -> Result<BTreeSet<NodeId>> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut nodes = BTreeSet::new();
            for range in ranges.iter().filter(|range| !range.is_empty()) {
                let (from, to) = (range.start.0.saturating_sub(1), range.end.0 - 1);
                nodes.extend(touched_between(db, Generation(from), Generation(to))?);
            }
            Ok(nodes)
        })
    }
}

//! What is planned of a removal: which states, names and touches of a node go.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use rusqlite::{Connection, OptionalExtension, params};

use super::super::query::time_of;
use super::super::schema::Time;
use super::super::{Change, ForgetChange, UndoRow, touched};
use super::{Sweep, SweepStep};
use crate::types::{ContentId, EntryName, Generation, NodeId};

/// A file that lived shorter is no deletion that anybody would undo.
const SHORT_LIFE_NANOS: i64 = 30_000_000_000;
/// Names of one node of which it is looked up where they begin and end. Of a node that had more,
/// touches stay.
const NAMES_MAX: usize = 4096;

/// What is planned so far. It knows its own effects, which the database does not show yet.
pub(in crate::catalog) struct Plan<'c> {
    pub(super) db: &'c Connection,
    pub changes: Vec<ForgetChange>,
    pub unpreserved: Vec<(NodeId, ContentId)>,
    /// How many rows are written, about, and when that is enough.
    pub(super) cost: usize,
    cost_max: usize,
    /// Where rows begin and end that go.
    pub taken: BTreeSet<Generation>,
    /// States that go.
    states: HashSet<(NodeId, Generation)>,
    /// Contents that go.
    pub(super) gone: HashSet<ContentId>,
    /// Before-images by content and offset that come, or go.
    pub(super) images: HashMap<ContentId, BTreeMap<u64, Option<UndoRow>>>,
    /// Bytes of before-images in segments that go.
    pub segment_bytes: i64,
    /// How many before-images are left in the streams that lose or win some.
    pub streams: HashMap<ContentId, i64>,
    /// Where rows of the nodes that were looked at begin and end that stay; `None`: anywhere.
    ends: HashMap<NodeId, Option<HashSet<Generation>>>,
    /// Where the last state ends of the node looked at last, if that is kept for its deletion.
    death: Option<Generation>,
}

impl<'c> Plan<'c> {
    /// Nothing is planned; a node is planned only as far as `cost_max` allows.
    pub fn new(db: &'c Connection, cost_max: usize) -> Plan<'c> {
        Plan {
            db,
            changes: Vec::new(),
            unpreserved: Vec::new(),
            cost: 0,
            cost_max,
            taken: BTreeSet::new(),
            states: HashSet::new(),
            gone: HashSet::new(),
            images: HashMap::new(),
            segment_bytes: 0,
            streams: HashMap::new(),
            ends: HashMap::new(),
            death: None,
        }
    }

    pub fn db(&self) -> &'c Connection {
        self.db
    }

    /// Plans one change.
    pub fn add(&mut self, change: ForgetChange) {
        self.cost += 1;
        self.changes.push(change);
    }

    /// How many rows one step looks at.
    pub fn cost_max(&self) -> usize {
        self.cost_max
    }

    /// Whether the rest is for another step.
    pub fn is_full(&self) -> bool {
        self.cost >= self.cost_max
    }

    /// How many more rows may be written.
    pub(super) fn room(&self) -> usize {
        self.cost_max.saturating_sub(self.cost)
    }

    /// How many rows a query is to give so that one more than there is room for is noticed.
    pub(super) fn rows_max(&self) -> i64 {
        i64::try_from(self.room().saturating_add(1)).unwrap_or(i64::MAX)
    }

    pub fn finish(self, done: bool) -> SweepStep {
        SweepStep {
            changes: self.changes.into_iter().map(Change::Forget).collect(),
            unpreserved: self.unpreserved,
            done,
        }
    }

    /// Plans what goes of one node; `false` if more is left for another step.
    pub fn sweep_node(
        &mut self,
        node: NodeId,
        sweep: &Sweep,
        deleted_since: Generation,
    ) -> rusqlite::Result<bool> {
        self.death = self.kept_deletion(node, deleted_since)?;
        // States first: nobody sees what is taken apart after that.
        if !self.sweep_states(node, sweep)? || !self.sweep_entries(node, sweep)? {
            return Ok(false);
        }
        if !self.sweep_contents(node, sweep)? {
            return Ok(false);
        }
        self.forget_symlink(node)?;
        Ok(true)
    }

    /// Looks up where rows of the node that was just planned begin and end.
    pub fn note_ends(&mut self, node: NodeId, sweep: &Sweep) -> rusqlite::Result<()> {
        let ends = self.ends_within(node, sweep)?;
        self.ends.insert(node, ends);
        Ok(())
    }

    /// When a node died, if its last state is to be kept for that.
    fn kept_deletion(
        &self,
        node: NodeId,
        since: Generation,
    ) -> rusqlite::Result<Option<Generation>> {
        if self.is_live(node)? {
            return Ok(None);
        }
        let last: Option<(Generation, i64)> = self
            .db
            .prepare_cached(
                "SELECT died, mtime, btime FROM node_h WHERE id = ?1 \
                 ORDER BY died DESC LIMIT 1",
            )?
            .query_row(params![node], |row| {
                let mtime = row.get::<_, Time>(1)?.0;
                Ok((row.get(0)?, Time::read_beside(row, 2, mtime)?.as_nanos()))
            })
            .optional()?;
        let Some((died, birth)) = last.filter(|(died, _)| *died >= since) else {
            return Ok(None);
        };
        let lived = time_of(self.db, died)?.as_nanos().saturating_sub(birth);
        Ok((lived >= SHORT_LIFE_NANOS).then_some(died))
    }

    fn is_live(&self, node: NodeId) -> rusqlite::Result<bool> {
        self.db.prepare_cached("SELECT 1 FROM node WHERE id = ?1")?.exists(params![node])
    }

    /// The states that lie within the gap, oldest first.
    fn sweep_states(&mut self, node: NodeId, sweep: &Sweep) -> rusqlite::Result<bool> {
        let mut statement = self.db.prepare_cached(
            "SELECT born, died FROM node_h WHERE id = ?1 AND died > ?2 AND died <= ?3 \
             AND born > ?2 AND died IS NOT ?4 ORDER BY died LIMIT ?5",
        )?;
        let values = params![node, sweep.after, sweep.until, self.death, self.rows_max()];
        let mut rows = statement.query(values)?;
        while let Some(row) = rows.next()? {
            if self.is_full() {
                return Ok(false);
            }
            let (born, died): (Generation, Generation) = (row.get(0)?, row.get(1)?);
            if self.states.insert((node, died)) {
                self.taken.extend([born, died]);
                self.add(ForgetChange::State { node, died });
            }
        }
        Ok(true)
    }

    /// The names that a node bore within the gap only. Those that it lost by its deletion are kept
    /// with its last state.
    fn sweep_entries(&mut self, node: NodeId, sweep: &Sweep) -> rusqlite::Result<bool> {
        let mut statement = self.db.prepare_cached(
            "SELECT parent, name, born, died FROM entry_h WHERE node = ?1 AND died > ?2 \
             AND died <= ?3 AND born > ?2 AND died IS NOT ?4 ORDER BY died LIMIT ?5",
        )?;
        let values = params![node, sweep.after, sweep.until, self.death, self.rows_max()];
        let mut rows = statement.query(values)?;
        while let Some(row) = rows.next()? {
            if self.is_full() {
                return Ok(false);
            }
            let (parent, name): (NodeId, EntryName) = (row.get(0)?, row.get(1)?);
            let (born, died) = (row.get(2)?, row.get(3)?);
            self.taken.extend([born, died]);
            self.add(ForgetChange::Entry { parent, name, born, died });
        }
        Ok(true)
    }

    /// Whether a state that stays shows a content.
    pub(super) fn is_shown(&self, node: NodeId, content: ContentId) -> rusqlite::Result<bool> {
        let mut statement =
            self.db.prepare_cached("SELECT died FROM node_h WHERE id = ?1 AND content = ?2")?;
        let mut rows = statement.query(params![node, content])?;
        while let Some(row) = rows.next()? {
            if !self.states.contains(&(node, row.get(0)?)) {
                return Ok(true);
            }
        }
        self.db
            .prepare_cached("SELECT 1 FROM node WHERE id = ?1 AND content = ?2")?
            .exists(params![node, content])
    }

    /// The contents between two that states which stay show.
    pub(super) fn shown_between(
        &self,
        node: NodeId,
        low: ContentId,
        high: ContentId,
    ) -> rusqlite::Result<HashSet<ContentId>> {
        let mut shown = HashSet::new();
        let mut statement = self.db.prepare_cached(
            "SELECT died, content FROM node_h WHERE id = ?1 AND content > ?2 AND content < ?3",
        )?;
        let mut rows = statement.query(params![node, low, high])?;
        while let Some(row) = rows.next()? {
            if !self.states.contains(&(node, row.get(0)?)) {
                shown.insert(row.get(1)?);
            }
        }
        let live: Option<ContentId> = self
            .db
            .prepare_cached("SELECT content FROM node WHERE id = ?1")?
            .query_row(params![node], |row| row.get(0))
            .optional()?;
        shown.extend(live);
        Ok(shown)
    }

    /// The target of a symlink that nothing shows any more.
    fn forget_symlink(&mut self, node: NodeId) -> rusqlite::Result<()> {
        let is_one = self
            .db
            .prepare_cached("SELECT 1 FROM symlink WHERE node = ?1")?
            .exists(params![node])?;
        if !is_one || self.is_live(node)? {
            return Ok(());
        }
        let mut statement = self.db.prepare_cached("SELECT died FROM node_h WHERE id = ?1")?;
        let mut rows = statement.query(params![node])?;
        while let Some(row) = rows.next()? {
            if !self.states.contains(&(node, row.get(0)?)) {
                return Ok(());
            }
        }
        self.add(ForgetChange::Symlink(node));
        Ok(())
    }

    /// Takes the touches of a purged node away, where rows of it began and ended.
    pub fn untouch(&mut self, node: NodeId, all: &Sweep) -> rusqlite::Result<()> {
        let Some(left) = self.ends_within(node, all)? else { return Ok(()) };
        for at in std::mem::take(&mut self.taken) {
            if !left.contains(&at) {
                self.add(ForgetChange::Untouched { node, at });
            }
        }
        Ok(())
    }

    /// Makes a touch of a node that was looked at exact: it stays if a row that stays begins or
    /// ends at `g`, or beyond the gap. If not, it may be that of a batch: then the ends themselves
    /// are touched.
    pub fn touch_exactly(
        &mut self,
        g: Generation,
        node: NodeId,
        sweep: &Sweep,
    ) -> rusqlite::Result<()> {
        let Some(Some(ends)) = self.ends.get(&node) else { return Ok(()) };
        if ends.contains(&g) {
            return Ok(());
        }
        let mut missing = Vec::new();
        for &end in ends {
            if !touched::has(self.db, (end, node))? {
                missing.push(end);
            }
        }
        missing.sort_unstable();
        for at in missing {
            self.add(ForgetChange::Touched { node, at });
        }
        if g <= sweep.until {
            self.add(ForgetChange::Untouched { node, at: g });
        }
        Ok(())
    }

    /// Where in (after, until] rows of a node that stay begin or end; `None` if those are too many
    /// to look at.
    fn ends_within(
        &self,
        node: NodeId,
        sweep: &Sweep,
    ) -> rusqlite::Result<Option<HashSet<Generation>>> {
        let mut ends = HashSet::new();
        let within = |g: &Generation| *g > sweep.after && *g <= sweep.until;
        let mut states = self.db.prepare_cached(
            "SELECT born, died FROM node_h WHERE id = ?1 AND died > ?2 ORDER BY died",
        )?;
        let mut rows = states.query(params![node, sweep.after])?;
        while let Some(row) = rows.next()? {
            let (born, died): (Generation, Generation) = (row.get(0)?, row.get(1)?);
            if !self.states.contains(&(node, died)) {
                ends.extend([born, died].into_iter().filter(within));
            }
            // States follow each other: the next one begins where this one ends, or later.
            if died > sweep.until {
                break;
            }
        }
        let mut names = self.db.prepare_cached(
            "SELECT born, died FROM entry_h WHERE node = ?1 AND died > ?2 ORDER BY died LIMIT ?3",
        )?;
        let mut rows = names.query(params![node, sweep.after, NAMES_MAX as i64])?;
        let mut count = 0;
        while let Some(row) = rows.next()? {
            count += 1;
            let (born, died): (Generation, Generation) = (row.get(0)?, row.get(1)?);
            let goes = born > sweep.after && died <= sweep.until && Some(died) != self.death;
            if !goes {
                ends.extend([born, died].into_iter().filter(within));
            }
        }
        let mut live = self.db.prepare_cached(
            "SELECT born FROM node WHERE id = ?1 \
             UNION ALL SELECT * FROM (SELECT born FROM entry WHERE node = ?1 LIMIT ?2)",
        )?;
        let mut rows = live.query(params![node, NAMES_MAX as i64])?;
        let mut live_count = 0;
        while let Some(row) = rows.next()? {
            live_count += 1;
            ends.extend(Some(row.get(0)?).filter(within));
        }
        Ok((count < NAMES_MAX && live_count < NAMES_MAX).then_some(ends))
    }
}

//! Sweeping a gap: what only generations showed that are visible no more.
//!
//! A sweep goes through the nodes that were touched in its gap, in small steps. A step is planned
//! from the database and pushed as ordinary changes, so it is atomic, the same on every replica,
//! and repeated without harm after a crash. Nothing else removes history, and rows of history do
//! not change by themselves, so a plan stays true until it is committed.
//!
//! **Contents.** A content that no state shows any more may still be what others rely on:
//! - an older *chained* content of its node takes from it the bytes that it has no before-images
//!   of. Before-images move to that older content; a content that lies whole stays as a mere base
//!   until the older one goes;
//! - a content of equal bytes refers to it. It stays until that one goes.

use std::collections::{BTreeMap, HashMap, HashSet};

use rusqlite::{Connection, OptionalExtension, params};

use super::query::time_of;
use super::retain::Sweep;
use super::schema::{ContentState, Time, undo_row, unsigned};
use super::{Catalog, Change, ForgetChange, UndoFile, UndoRow};
use crate::error::Result;
use crate::types::{ContentId, EntryName, Generation, Kind, NodeId};

/// Touched nodes that one step looks at, at most.
const NODES_MAX: usize = 256;
/// States and entries of one node that one step takes out, at most.
const ROWS_MAX: i64 = 512;
/// A step ends with the node that makes it longer than this.
const CHANGES_MAX: usize = 1024;
/// A file that lived shorter is no deletion that anybody would undo.
const SHORT_LIFE_NANOS: i64 = 30_000_000_000;

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
        // No generation becomes visible between the plan and the push.
        let _names = self.shared.snapshots.lock();
        let step = self.plan_sweep(sweep, deleted_since)?;
        self.push(step.changes.clone())?;
        Ok(step)
    }

    fn plan_sweep(&self, sweep: &Sweep, deleted_since: Generation) -> Result<SweepStep> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut plan = Plan::new(db);
            let (after, until) = (sweep.after, sweep.until);
            let within: Option<Generation> = db
                .prepare_cached(
                    "SELECT g FROM snapshot WHERE g > ?1 AND g < ?2 \
                     UNION ALL SELECT g FROM moment WHERE g > ?1 AND g < ?2 LIMIT 1",
                )?
                .query_row(params![after, until], |row| row.get(0))
                .optional()?;
            if let Some(at) = within {
                // Somebody named a generation in the gap meanwhile.
                plan.changes.push(ForgetChange::SweepSplit { after, until, at });
                return plan.finish(false);
            }
            let (batches, last) = touched(db, sweep)?;
            let mut seen = HashSet::new();
            let mut at = sweep.at;
            let mut all = true;
            for place in batches {
                if plan.changes.len() >= CHANGES_MAX {
                    all = false;
                    break;
                }
                if seen.insert(place.1) && !plan.sweep_node(place.1, sweep, deleted_since)? {
                    all = false;
                    break;
                }
                at = place;
            }
            let tail = sweep.at.0 >= until;
            let end = match (all && last, tail) {
                (false, _) => ForgetChange::SweepAt { after, until, from: sweep.at, at },
                // The gap's end is looked at first, then what lies within.
                (true, true) => {
                    ForgetChange::SweepAt { after, until, from: sweep.at, at: (after, NodeId(0)) }
                }
                (true, false) => ForgetChange::SweepEnd { after, until },
            };
            let done = matches!(end, ForgetChange::SweepEnd { .. });
            plan.changes.push(end);
            plan.finish(done)
        })
    }

    /// Plans the removal of past states of a node, whatever shows them. `done` when none is left.
    pub fn plan_purge(&self, node: NodeId) -> Result<SweepStep> {
        self.settle_pending()?;
        self.shared.read_at_once(|db| {
            let mut plan = Plan::new(db);
            let all = Sweep {
                after: Generation(0),
                until: Generation(i64::MAX as u64),
                at: (Generation(0), NodeId(0)),
            };
            let done = plan.sweep_node(node, &all, all.until)?;
            plan.finish(done)
        })
    }
}

/// The next touched nodes of a sweep, and whether they are the last ones of its part. The first
/// part is the end of the gap with the batch that reaches over it; the second what lies within.
pub(super) fn touched(
    db: &Connection,
    sweep: &Sweep,
) -> rusqlite::Result<(Vec<(Generation, NodeId)>, bool)> {
    let until = match sweep.at.0 >= sweep.until {
        true => db
            .prepare_cached("SELECT min(g) FROM touched WHERE g > ?1")?
            .query_row(params![sweep.until], |row| row.get::<_, Option<Generation>>(0))?
            .unwrap_or(sweep.until),
        false => Generation(sweep.until.0.saturating_sub(1)),
    };
    let mut statement = db.prepare_cached(
        "SELECT g, node FROM touched WHERE (g, node) > (?1, ?2) AND g <= ?3 ORDER BY g, node \
         LIMIT ?4",
    )?;
    let rows = statement
        .query_map(params![sweep.at.0, sweep.at.1, until, NODES_MAX as i64], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let last = rows.len() < NODES_MAX;
    Ok((rows, last))
}

/// A content as the plan sees it.
#[derive(Clone, Copy, Debug)]
struct Content {
    size: u64,
    state: i64,
    same: Option<ContentId>,
}

/// A past state of a node.
struct Past {
    born: Generation,
    died: Generation,
    content: ContentId,
}

/// What is planned so far. It knows its own effects, which the database does not show yet.
pub(super) struct Plan<'c> {
    db: &'c Connection,
    pub changes: Vec<ForgetChange>,
    pub unpreserved: Vec<(NodeId, ContentId)>,
    /// Contents of the nodes that were looked at, with what is planned.
    contents: HashMap<NodeId, BTreeMap<ContentId, Content>>,
    /// Their before-images.
    undo: HashMap<(NodeId, ContentId), Vec<UndoRow>>,
    /// By how many rows the uses of streams change.
    streams: HashMap<ContentId, i64>,
    /// Contents that go.
    gone: HashSet<ContentId>,
}

impl<'c> Plan<'c> {
    pub fn new(db: &'c Connection) -> Plan<'c> {
        Plan {
            db,
            changes: Vec::new(),
            unpreserved: Vec::new(),
            contents: HashMap::new(),
            undo: HashMap::new(),
            streams: HashMap::new(),
            gone: HashSet::new(),
        }
    }

    /// Plans the end of the streams that no before-image lies in any more.
    pub fn use_streams(&mut self) -> rusqlite::Result<()> {
        for (stream, by) in std::mem::take(&mut self.streams) {
            let rows: i64 = self
                .db
                .prepare_cached("SELECT count(*) FROM undo WHERE segment = ?1")?
                .query_row(params![-(stream.0 as i64)], |row| row.get(0))?;
            if rows + by <= 0 {
                self.changes.push(ForgetChange::Recipe(stream));
            }
        }
        Ok(())
    }

    /// Forgets the nodes that were looked at, not what is planned of them.
    pub fn clear(&mut self) {
        self.contents.clear();
        self.undo.clear();
    }

    fn finish(mut self, done: bool) -> rusqlite::Result<SweepStep> {
        self.use_streams()?;
        Ok(SweepStep {
            changes: self.changes.into_iter().map(Change::Forget).collect(),
            unpreserved: self.unpreserved,
            done,
        })
    }

    /// Plans what goes of one node; `false` if more is left for another step.
    pub fn sweep_node(
        &mut self,
        node: NodeId,
        sweep: &Sweep,
        deleted_since: Generation,
    ) -> rusqlite::Result<bool> {
        let death = self.kept_deletion(node, deleted_since)?;
        let mut states = self.past_states(node, sweep)?;
        let all_states = (states.len() as i64) < ROWS_MAX;
        states.retain(|state| Some(state.died) != death);
        let entries = self.past_entries(node, sweep)?;
        let all_entries = (entries.len() as i64) < ROWS_MAX;
        for (parent, name, born, died) in entries {
            if Some(died) != death {
                self.changes.push(ForgetChange::Entry { parent, name, born, died });
            }
        }
        for state in &states {
            self.changes.push(ForgetChange::State { node, died: state.died });
        }
        if let (Some(first), Some(last)) = (states.first(), states.last()) {
            let around = [self.before(node, first.born)?, self.after(node, last.died)?];
            let mut contents: Vec<ContentId> = states.iter().map(|state| state.content).collect();
            contents.retain(|content| {
                *content != ContentId::EMPTY && !around.contains(&Some(*content))
            });
            contents.sort_unstable();
            contents.dedup();
            for content in contents {
                self.forget_content(node, content, around[1])?;
            }
            self.forget_symlink(node, &states, death)?;
        }
        Ok(all_states && all_entries)
    }

    /// When a node died, if its last state is to be kept for that.
    fn kept_deletion(
        &self,
        node: NodeId,
        since: Generation,
    ) -> rusqlite::Result<Option<Generation>> {
        let live =
            self.db.prepare_cached("SELECT 1 FROM node WHERE id = ?1")?.exists(params![node])?;
        if live {
            return Ok(None);
        }
        let last: Option<(Generation, i64)> = self
            .db
            .prepare_cached(
                "SELECT died, coalesce(btime, mtime) FROM node_h WHERE id = ?1 \
                 ORDER BY died DESC LIMIT 1",
            )?
            .query_row(params![node], |row| Ok((row.get(0)?, row.get::<_, Time>(1)?.0.as_nanos())))
            .optional()?;
        let Some((died, birth)) = last.filter(|(died, _)| *died >= since) else {
            return Ok(None);
        };
        let lived = time_of(self.db, died)?.as_nanos().saturating_sub(birth);
        Ok((lived >= SHORT_LIFE_NANOS).then_some(died))
    }

    /// The states of a node that lie within the gap, oldest first.
    fn past_states(&self, node: NodeId, sweep: &Sweep) -> rusqlite::Result<Vec<Past>> {
        let mut statement = self.db.prepare_cached(
            "SELECT born, died, content FROM node_h WHERE id = ?1 AND died > ?2 AND died <= ?3 \
             AND born > ?2 ORDER BY died LIMIT ?4",
        )?;
        let rows = statement
            .query_map(params![node, sweep.after, sweep.until, ROWS_MAX], |row| {
                Ok(Past { born: row.get(0)?, died: row.get(1)?, content: row.get(2)? })
            })?;
        rows.collect()
    }

    /// The names that a node bore within the gap only.
    #[allow(clippy::type_complexity)]
    fn past_entries(
        &self,
        node: NodeId,
        sweep: &Sweep,
    ) -> rusqlite::Result<Vec<(NodeId, EntryName, Generation, Generation)>> {
        let mut statement = self.db.prepare_cached(
            "SELECT parent, name, born, died FROM entry_h WHERE node = ?1 AND died > ?2 \
             AND died <= ?3 AND born > ?2 ORDER BY died LIMIT ?4",
        )?;
        let rows = statement
            .query_map(params![node, sweep.after, sweep.until, ROWS_MAX], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
            })?;
        rows.collect()
    }

    /// The content of the state before a generation. The states that show one content follow each
    /// other, so the neighbours of a run of states tell which of its contents stay.
    fn before(&self, node: NodeId, born: Generation) -> rusqlite::Result<Option<ContentId>> {
        self.db
            .prepare_cached(
                "SELECT content FROM node_h WHERE id = ?1 AND died <= ?2 \
                 ORDER BY died DESC LIMIT 1",
            )?
            .query_row(params![node, born], |row| row.get(0))
            .optional()
    }

    /// The content of the state after a generation.
    fn after(&self, node: NodeId, died: Generation) -> rusqlite::Result<Option<ContentId>> {
        let past = self
            .db
            .prepare_cached(
                "SELECT content FROM node_h WHERE id = ?1 AND died > ?2 ORDER BY died LIMIT 1",
            )?
            .query_row(params![node, died], |row| row.get(0))
            .optional()?;
        if past.is_some() {
            return Ok(past);
        }
        self.db
            .prepare_cached("SELECT content FROM node WHERE id = ?1")?
            .query_row(params![node], |row| row.get(0))
            .optional()
    }

    /// The target of a symlink that nothing shows any more.
    fn forget_symlink(
        &mut self,
        node: NodeId,
        states: &[Past],
        death: Option<Generation>,
    ) -> rusqlite::Result<()> {
        let kind: Option<Kind> = self
            .db
            .prepare_cached("SELECT kind FROM node_h WHERE id = ?1 LIMIT 1")?
            .query_row(params![node], |row| row.get(0))
            .optional()?;
        if kind != Some(Kind::Symlink) || death.is_some() {
            return Ok(());
        }
        let left: i64 = self
            .db
            .prepare_cached(
                "SELECT (SELECT count(*) FROM node_h WHERE id = ?1) + \
                 (SELECT count(*) FROM node WHERE id = ?1)",
            )?
            .query_row(params![node], |row| row.get(0))?;
        if left == states.len() as i64 {
            self.changes.push(ForgetChange::Symlink(node));
        }
        Ok(())
    }

    /// Plans the end of a content that no state shows. `next` is the content of the state after
    /// those that showed it.
    fn forget_content(
        &mut self,
        node: NodeId,
        content: ContentId,
        next: Option<ContentId>,
    ) -> rusqlite::Result<()> {
        self.load_contents(node, content)?;
        let known = self.contents.get(&node);
        let Some(info) = known.and_then(|known| known.get(&content)).copied() else {
            return Ok(());
        };
        if self.is_same_of_another(content)? {
            return Ok(());
        }
        let older = known
            .and_then(|known| known.range(..content).next_back())
            .map(|(id, older)| (*id, *older))
            .filter(|(_, older)| older.state == 0);
        if let Some((older_id, older)) = older {
            if info.state != 0 {
                // It stays as the base of the older one.
                return Ok(());
            }
            self.inherit(node, content, older_id, older.size)?;
        } else {
            for row in self.undo_of(node, content)?.clone() {
                self.forget_undo(&row);
            }
        }
        self.drop_content(node, content, &info)?;
        if older.is_none() {
            self.forget_base(node, content, next)?;
        }
        Ok(())
    }

    fn drop_content(
        &mut self,
        node: NodeId,
        content: ContentId,
        info: &Content,
    ) -> rusqlite::Result<()> {
        self.changes.push(ForgetChange::Content(content));
        self.gone.insert(content);
        self.undo.remove(&(node, content));
        if let Some(known) = self.contents.get_mut(&node) {
            known.remove(&content);
        }
        let is = |state: ContentState| info.state == state as i64;
        if is(ContentState::Packed) {
            self.changes.push(ForgetChange::Recipe(content));
        } else if is(ContentState::Preserved) || is(ContentState::Cloned) {
            self.unpreserved.push((node, content));
        } else if let Some(same) = info.same {
            self.forget_if_unused(same)?;
        }
        Ok(())
    }

    /// The next newer content may have stayed only as the base of one that goes.
    fn forget_base(
        &mut self,
        node: NodeId,
        content: ContentId,
        next: Option<ContentId>,
    ) -> rusqlite::Result<()> {
        let newer = self.contents.get(&node).and_then(|known| known.range(content..).next());
        let Some((&newer, info)) = newer else { return Ok(()) };
        if info.state == 0 || Some(newer) == next {
            return Ok(());
        }
        self.forget_if_unused(newer)
    }

    /// Plans the end of a content if no state shows it.
    fn forget_if_unused(&mut self, content: ContentId) -> rusqlite::Result<()> {
        let node: Option<NodeId> = self
            .db
            .prepare_cached("SELECT node FROM content WHERE id = ?1")?
            .query_row(params![content], |row| row.get(0))
            .optional()?;
        let Some(node) = node.filter(|_| !self.gone.contains(&content)) else { return Ok(()) };
        let planned: HashSet<Generation> = self
            .changes
            .iter()
            .filter_map(|change| match change {
                ForgetChange::State { node: of, died } if *of == node => Some(*died),
                _ => None,
            })
            .collect();
        let mut statement =
            self.db.prepare_cached("SELECT died FROM node_h WHERE id = ?1 AND content = ?2")?;
        let mut shown = statement.query_map(params![node, content], |row| row.get(0))?;
        if shown.any(|died| died.is_ok_and(|died: Generation| !planned.contains(&died))) {
            return Ok(());
        }
        let live = self
            .db
            .prepare_cached("SELECT 1 FROM node WHERE id = ?1 AND content = ?2")?
            .exists(params![node, content])?;
        if live {
            return Ok(());
        }
        self.forget_content(node, content, None)
    }

    /// Whether a content that stays has its bytes from this one.
    fn is_same_of_another(&self, content: ContentId) -> rusqlite::Result<bool> {
        let mut statement = self.db.prepare_cached("SELECT id FROM content WHERE same = ?1")?;
        let mut others = statement.query_map(params![content], |row| row.get(0))?;
        Ok(others.any(|other| other.is_ok_and(|other: ContentId| !self.gone.contains(&other))))
    }

    /// Gives the before-images of a content to the older one that relies on it, as far as that has
    /// none of its own.
    fn inherit(
        &mut self,
        node: NodeId,
        content: ContentId,
        older: ContentId,
        older_size: u64,
    ) -> rusqlite::Result<()> {
        let mut own = self.undo_of(node, older)?.clone();
        let mut inherited = Vec::new();
        // Where two before-images overlap, the first one counts.
        let mut done = 0;
        for row in self.undo_of(node, content)?.clone() {
            self.forget_undo(&row);
            let end = (row.offset + row.length).min(older_size);
            for part in uncovered(&own, row.offset.max(done), end) {
                let moved = UndoRow {
                    node,
                    content: older,
                    offset: part.0,
                    length: part.1 - part.0,
                    at: row.at.map(|at| at.further(part.0 - row.offset)),
                };
                self.use_stream(&moved, 1);
                inherited.push(moved.clone());
                self.changes.push(ForgetChange::UndoPut(moved));
            }
            done = done.max(end);
        }
        own.append(&mut inherited);
        own.sort_unstable_by_key(|row| row.offset);
        self.undo.insert((node, older), own);
        Ok(())
    }

    fn forget_undo(&mut self, row: &UndoRow) {
        self.use_stream(row, -1);
        self.changes.push(ForgetChange::Undo {
            node: row.node,
            content: row.content,
            offset: row.offset,
        });
    }

    fn use_stream(&mut self, row: &UndoRow, by: i64) {
        if let Some(at) = row.at
            && let UndoFile::Stream(stream) = at.file
        {
            *self.streams.entry(stream).or_default() += by;
        }
    }

    /// Gets to know a content with its neighbours.
    fn load_contents(&mut self, node: NodeId, content: ContentId) -> rusqlite::Result<()> {
        let mut statement = self.db.prepare_cached(
            "SELECT id, size, state, same FROM content WHERE node = ?1 \
             AND id >= coalesce((SELECT max(id) FROM content WHERE node = ?1 AND id < ?2), ?2) \
             AND id <= coalesce((SELECT min(id) FROM content WHERE node = ?1 AND id > ?2), ?2)",
        )?;
        let rows = statement.query_map(params![node, content], |row| {
            let info = Content { size: unsigned(row, 1)?, state: row.get(2)?, same: row.get(3)? };
            Ok((row.get::<_, ContentId>(0)?, info))
        })?;
        let known = self.contents.entry(node).or_default();
        for row in rows {
            let (id, info) = row?;
            if !self.gone.contains(&id) {
                known.entry(id).or_insert(info);
            }
        }
        Ok(())
    }

    /// The before-images of a content, ordered by offset, with what is planned.
    fn undo_of(&mut self, node: NodeId, content: ContentId) -> rusqlite::Result<&mut Vec<UndoRow>> {
        if !self.undo.contains_key(&(node, content)) {
            let mut statement = self.db.prepare_cached(
                "SELECT content, offset, length, segment, segment_offset FROM undo \
                 WHERE node = ?1 AND content = ?2 ORDER BY offset",
            )?;
            let rows = statement
                .query_map(params![node, content], |row| undo_row(row, node))?
                .collect::<rusqlite::Result<Vec<_>>>()?;
            self.undo.insert((node, content), rows);
        }
        Ok(self.undo.entry((node, content)).or_default())
    }
}

/// The parts of `[start, end)` that none of the before-images, ordered by offset, covers.
fn uncovered(rows: &[UndoRow], start: u64, end: u64) -> Vec<(u64, u64)> {
    let mut parts = Vec::new();
    let mut at = start;
    let first = rows.partition_point(|row| row.offset + row.length <= start);
    for row in &rows[first..] {
        let row_end = row.offset + row.length;
        if row.offset >= end {
            break;
        }
        if row.offset > at {
            parts.push((at, row.offset));
        }
        at = at.max(row_end);
    }
    if at < end {
        parts.push((at, end));
    }
    parts
}

//! `.deleted`: what a directory once had and has no more, in its last state.
//!
//! A file is shown as it was when it was removed. A directory is shown as a view of one moment:
//! before the removal of its contents began, for a directory is emptied entry by entry before it
//! can be removed itself, and what a person misses is what `rm -r` found. What was renamed is not
//! deleted and not shown.

use rustix::io::Errno;

use crate::catalog::{NameInterval, NodeRow};
use crate::error::Result;
use crate::past::ino::{self, Target};
use crate::past::views::{View, Way};
use crate::past::{Entry, Moment, Past, PastListed};
use crate::types::{EntryName, Generation, Kind, NodeId};

/// Removals in a directory that follow each other within this time belong to one sweep.
const SWEEP_GAP_NANOS: i64 = 10_000_000_000;
/// How many directories deep the beginning of a sweep is looked for; deeper ones begin at their
/// removal.
const SWEEP_DEPTH_MAX: usize = 256;

/// An entry that a directory has no more.
pub(super) struct Gone {
    pub(super) name: EntryName,
    /// Its last state.
    pub(super) row: NodeRow,
    /// The last generation that has it.
    pub(super) last: Generation,
}

impl Past {
    /// What `dir` once had and has no more, ordered by name.
    pub(super) fn gone(&self, dir: NodeId) -> Result<Vec<Gone>> {
        self.catch_up()?;
        let mut gone = Vec::new();
        for interval in self.catalog().deleted(dir)? {
            gone.extend(self.gone_entry(interval)?);
        }
        Ok(gone)
    }

    /// The last state of an entry, if it was deleted and is still known.
    fn gone_entry(&self, interval: NameInterval) -> Result<Option<Gone>> {
        let Some(died) = interval.died else { return Ok(None) };
        let last = Generation(died.0.saturating_sub(1));
        let names = self.catalog().name_history(interval.node)?;
        // A rename ends one name and begins another in one step.
        if names.iter().any(|name| name.born == died) {
            return Ok(None);
        }
        let row = self.catalog().node_at(last, interval.node)?;
        Ok(row.map(|row| Gone { name: interval.name, row, last }))
    }

    pub(super) fn lookup_deleted(&self, dir: NodeId, name: &EntryName) -> Result<Entry> {
        self.catch_up()?;
        let interval = self.catalog().entry_history(dir, name)?.pop().ok_or(Errno::NOENT)?;
        let gone = self.gone_entry(interval)?.ok_or(Errno::NOENT)?;
        if gone.row.kind != Kind::Dir {
            return Ok(self.moment_entry(gone.last, gone.row));
        }
        let moment = Moment { node: gone.row.id, generation: gone.last };
        let swept = self.tables.lock().swept.get(&moment).copied();
        let generation = match swept {
            Some(generation) => generation,
            None => {
                let died = Generation(gone.last.0 + 1);
                let begun = self.sweep_begin(moment.node, died, SWEEP_DEPTH_MAX)?;
                let before = Generation(begun.0.saturating_sub(1));
                self.tables.lock().swept.put(moment, before);
                before
            }
        };
        let way = Way::Deleted(name.clone());
        self.enter_view(View { generation, anchor: gone.row.id, dir, way })
    }

    pub(super) fn list_deleted(&self, dir: NodeId) -> Result<Vec<PastListed>> {
        let gone = self.gone(dir)?;
        let tables = self.tables.lock();
        Ok(gone
            .into_iter()
            .map(|Gone { name, row, last }| {
                let moment = Moment { node: row.id, generation: last };
                let id = tables.moments.known_id(&moment);
                let ino = id.map_or(ino::UNKNOWN, |id| Target::Moment(id).encode());
                PastListed { name, ino, kind: row.kind }
            })
            .collect())
    }

    /// The first generation of the sweep that emptied and removed `dir`, which was gone at `died`.
    /// What was made during the sweep ends it: a moment before it would not show that.
    fn sweep_begin(&self, dir: NodeId, died: Generation, depth: usize) -> Result<Generation> {
        let mut removed = self.catalog().deleted(dir)?;
        removed.retain(|entry| entry.died.is_some_and(|gone| gone <= died));
        removed.sort_by_key(|entry| std::cmp::Reverse(entry.died));
        let mut begun = died;
        let mut newest_birth = Generation(0);
        let mut earliest: Option<&NameInterval> = None;
        let mut rest = removed.as_slice();
        while !rest.is_empty() && depth > 0 {
            let in_reach = self.count_in_reach(begun, rest)?;
            if in_reach == 0 {
                // The entry removed first may be a directory that took long to empty.
                let Some(first) = earliest.take() else { break };
                begun = self.sweep_begin_of(first, begun, depth)?.max(next(newest_birth));
                continue;
            }
            for entry in &rest[..in_reach] {
                let gone = entry.died.unwrap_or(died);
                if gone <= newest_birth {
                    return Ok(begun);
                }
                begun = begun.min(gone);
                newest_birth = newest_birth.max(entry.born);
                earliest = Some(entry);
            }
            rest = &rest[in_reach..];
        }
        match earliest {
            Some(first) => Ok(self.sweep_begin_of(first, begun, depth)?.max(next(newest_birth))),
            None => Ok(begun),
        }
    }

    /// The sweep of an entry that was removed at `begun`, if it is a directory.
    fn sweep_begin_of(
        &self,
        entry: &NameInterval,
        begun: Generation,
        depth: usize,
    ) -> Result<Generation> {
        let died = entry.died.unwrap_or(begun);
        let row = self.catalog().node_at(Generation(died.0.saturating_sub(1)), entry.node)?;
        match row {
            Some(row) if row.kind == Kind::Dir => {
                Ok(self.sweep_begin(entry.node, died, depth - 1)?.min(begun))
            }
            _ => Ok(begun),
        }
    }

    /// How many of `removed` (latest first) were removed within the gap before `begun`.
    fn count_in_reach(&self, begun: Generation, removed: &[NameInterval]) -> Result<usize> {
        let begun_nanos = self.catalog().time_of(begun)?.as_nanos();
        let (mut low, mut high) = (0, removed.len());
        // Times fall along the slice: halving asks for few of them.
        while low < high {
            let middle = (low + high) / 2;
            let died = removed[middle].died.unwrap_or(begun);
            let gap = begun_nanos - self.catalog().time_of(died)?.as_nanos();
            match gap <= SWEEP_GAP_NANOS {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        Ok(low)
    }
}

/// The generation after `generation`: the first before which it can be seen.
fn next(generation: Generation) -> Generation {
    Generation(generation.0 + 1)
}

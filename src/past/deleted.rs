//! `.deleted`: what a directory once had and has no more, in its last state.
//!
//! A file is shown as it was when it was removed, a directory as a view of the moment before its removal.
//! What was renamed is not deleted and not shown.

use rustix::io::Errno;

use crate::catalog::{NameInterval, NodeRow};
use crate::error::Result;
use crate::past::ino::{self, Target};
use crate::past::views::{View, Way};
use crate::past::{Entry, Moment, Past, PastListed};
use crate::types::{EntryName, Generation, Kind, NodeId};

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
        let way = Way::Deleted(name.clone());
        let generation = gone.last;
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
}

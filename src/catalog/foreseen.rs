//! Entries that are likely to be looked up next, read together: one query for many costs a tenth of
//! one for each.
//!
//! They are those of one state of the database, told by its count of commits, and are believed for
//! as long as that is the newest state. What is not committed yet is in the overlay, which is asked
//! first, as for the database itself.

use std::collections::HashMap;

use parking_lot::Mutex;
use rusqlite::params;

use super::schema::read_head_only;
use super::{Catalog, Shared};
use crate::error::Result;
use crate::types::{EntryName, Kind, NodeId};

/// The most entries that are kept, of some 150 bytes each.
const ENTRIES_MAX: usize = 16 << 10;

/// See above.
#[derive(Default)]
pub(super) struct Foreseen(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// The state that they are of: after so many commits.
    sequence: u64,
    count: usize,
    dirs: HashMap<NodeId, HashMap<EntryName, (NodeId, Kind)>>,
    /// How often all was forgotten.
    forgotten: u64,
}

impl Foreseen {
    /// What a name meant after so many commits, if it is known.
    pub fn entry(&self, sequence: u64, dir: NodeId, name: &EntryName) -> Option<(NodeId, Kind)> {
        let known = self.0.lock();
        (known.sequence == sequence).then(|| known.dirs.get(&dir)?.get(name).copied())?
    }

    /// Forgets all: a database that it may be of is not in use any more.
    pub fn forget(&self) {
        let mut known = self.0.lock();
        *known = Known { forgotten: known.forgotten + 1, ..Known::default() };
    }

    fn forgotten(&self) -> u64 {
        self.0.lock().forgotten
    }

    /// Takes what was read when all had been `forgotten` so often.
    fn take(
        &self,
        forgotten: u64,
        sequence: u64,
        dir: NodeId,
        entries: &[(EntryName, NodeId, Kind)],
    ) {
        let mut known = self.0.lock();
        if known.forgotten != forgotten {
            return;
        }
        if known.sequence != sequence || known.count + entries.len() > ENTRIES_MAX {
            *known = Known { sequence, forgotten, ..Known::default() };
        }
        known.count += entries.len();
        let names = known.dirs.entry(dir).or_default();
        names.extend(entries.iter().map(|(name, node, kind)| (name.clone(), (*node, *kind))));
    }
}

impl Catalog {
    /// So many names of a live directory after one of them, or from the first, in their order, as
    /// far as they are committed. Looking them up costs little until the next commit.
    pub fn foresee(
        &self,
        parent: NodeId,
        name: Option<&EntryName>,
        most: usize,
    ) -> Result<Vec<EntryName>> {
        let after = name.map_or(&b""[..], EntryName::as_bytes);
        let forgotten = self.shared.foreseen.forgotten();
        let (sequence, entries) = self.shared.read_at_once(|db| {
            let sequence = read_head_only(db)?.sequence;
            let entries: Vec<(EntryName, NodeId, Kind)> = db
                .prepare_cached(
                    "SELECT name, node, coalesce(kind, ?4) FROM entry \
                     WHERE parent = ?1 AND name > ?2 ORDER BY name LIMIT ?3",
                )?
                .query_map(params![parent, after, most as i64, Kind::File], |row| {
                    Ok((row.get(0)?, row.get(1)?, row.get(2)?))
                })?
                .collect::<rusqlite::Result<_>>()?;
            Ok((sequence, entries))
        })?;
        if !self.shared.read_only {
            self.shared.foreseen.take(forgotten, sequence, parent, &entries);
        }
        Ok(entries.into_iter().map(|(name, ..)| name).collect())
    }
}

impl Shared {
    /// What a name that is in no pending batch is known to mean; `None` for both where neither
    /// knows it.
    pub(super) fn foreseen_entry(
        &self,
        parent: NodeId,
        name: &EntryName,
    ) -> (Option<Option<NodeId>>, Option<(NodeId, Kind)>) {
        let queue = self.waiting.queue.lock();
        match queue.overlay(|batch| batch.entry(parent, name)) {
            Some(pending) => (Some(pending), None),
            None => (None, self.foreseen.entry(queue.sequence, parent, name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> EntryName {
        EntryName::new(text).unwrap()
    }

    #[test]
    fn what_is_known_counts_for_one_state_and_is_bounded() {
        let foreseen = Foreseen::default();
        let dir = NodeId(7);
        foreseen.take(0, 3, dir, &[(name("a"), NodeId(8), Kind::File)]);
        foreseen.take(0, 3, dir, &[(name("b"), NodeId(9), Kind::Dir)]);
        assert_eq!(foreseen.entry(3, dir, &name("a")), Some((NodeId(8), Kind::File)));
        assert_eq!(foreseen.entry(3, dir, &name("b")), Some((NodeId(9), Kind::Dir)));
        assert_eq!(foreseen.entry(3, NodeId(8), &name("a")), None);
        assert_eq!(foreseen.entry(4, dir, &name("a")), None, "something was committed");
        foreseen.take(0, 4, dir, &[(name("c"), NodeId(9), Kind::Dir)]);
        assert_eq!(foreseen.entry(4, dir, &name("a")), None);
        foreseen.forget();
        assert_eq!(foreseen.entry(4, dir, &name("c")), None);
        foreseen.take(0, 4, dir, &[(name("c"), NodeId(9), Kind::Dir)]);
        assert_eq!(foreseen.entry(4, dir, &name("c")), None, "it was read before that");
        for number in 0..3 * ENTRIES_MAX as u64 {
            foreseen.take(1, 4, NodeId(number), &[(name("a"), NodeId(number), Kind::File)]);
            assert!(foreseen.0.lock().count <= ENTRIES_MAX);
        }
    }
}

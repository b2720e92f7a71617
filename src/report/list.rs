//! Lists of snapshots, of which there may be a hundred thousand.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{SnapshotReport, time_text};
use crate::catalog::{Snapshot, Totals};
use crate::types::{Generation, Timestamp};

/// Snapshots with the totals of the store, oldest first. This is how the control socket carries
/// them, in columns, with times as numbers and names in one text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotList {
    /// Each name ends with a line feed, which no name has in it.
    names: String,
    /// Seconds and nanoseconds.
    times: Vec<(i64, u32)>,
    generations: Vec<u64>,
    /// 1 for an automatic one, and 2 for one that is held.
    flags: Vec<u8>,
    /// What deleting each alone would free; nothing where that is not counted yet.
    freed: Vec<Option<u64>>,
    /// The tags of those that have some, by their place in the list.
    tags: BTreeMap<usize, Vec<String>>,
    /// Sums over the catalog.
    pub totals: Totals,
}

/// One of many snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotLine<'a> {
    /// Its name.
    pub name: &'a str,
    /// The moment it shows.
    pub time: Timestamp,
    /// That moment as a generation.
    pub generation: Generation,
    /// Made by a schedule.
    pub automatic: bool,
    /// Cannot be deleted.
    pub held: bool,
    /// Bytes of history that would go if it alone were deleted; nothing where not counted yet.
    pub freed: Option<u64>,
    /// Its tags.
    pub tags: &'a [String],
}

impl SnapshotList {
    /// Snapshots with what deleting each would free.
    pub fn new(snapshots: &[Snapshot], freed: Vec<Option<u64>>, totals: Totals) -> SnapshotList {
        let mut names = String::with_capacity(snapshots.len() * 24);
        let mut tags = BTreeMap::new();
        for (place, snapshot) in snapshots.iter().enumerate() {
            names.push_str(&snapshot.name);
            names.push('\n');
            if !snapshot.tags.is_empty() {
                tags.insert(place, snapshot.tags.clone());
            }
        }
        let flag = |s: &Snapshot| u8::from(s.automatic) | u8::from(s.held) << 1;
        SnapshotList {
            names,
            times: snapshots.iter().map(|s| (s.time.secs, s.time.nanos)).collect(),
            generations: snapshots.iter().map(|s| s.generation.0).collect(),
            flags: snapshots.iter().map(flag).collect(),
            freed,
            tags,
            totals,
        }
    }

    /// Each snapshot.
    pub fn lines(&self) -> impl Iterator<Item = SnapshotLine<'_>> {
        let columns = self.times.iter().zip(&self.generations).zip(&self.flags).zip(&self.freed);
        let named = self.names.split_terminator('\n').zip(columns).enumerate();
        named.map(|(place, (name, (((time, generation), flags), freed)))| SnapshotLine {
            name,
            time: Timestamp { secs: time.0, nanos: time.1 },
            generation: Generation(*generation),
            automatic: flags & 1 != 0,
            held: flags & 2 != 0,
            freed: *freed,
            tags: self.tags.get(&place).map_or(&[], Vec::as_slice),
        })
    }
}

/// [`SnapshotList`] for scripts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SnapshotsReport {
    /// Oldest first.
    pub snapshots: Vec<SnapshotReport>,
    /// Sums over the catalog.
    pub totals: Totals,
}

impl From<SnapshotList> for SnapshotsReport {
    fn from(list: SnapshotList) -> SnapshotsReport {
        let report = |line: SnapshotLine<'_>| SnapshotReport {
            name: line.name.into(),
            time: time_text(line.time),
            generation: line.generation.0,
            automatic: line.automatic,
            held: line.held,
            freed_bytes: line.freed,
            tags: line.tags.to_vec(),
        };
        SnapshotsReport { snapshots: list.lines().map(report).collect(), totals: list.totals }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_snapshots_is_the_same_behind_the_socket() {
        let snapshot = |id: u64, automatic, held, tags: &[&str]| Snapshot {
            id: crate::types::SnapshotId(id),
            name: format!("snap \u{e9}{id}"),
            generation: Generation(id * 10),
            time: Timestamp { secs: -5, nanos: 7 },
            automatic,
            held,
            tags: tags.iter().map(ToString::to_string).collect(),
        };
        let snapshots = [
            snapshot(1, false, true, &[]),
            snapshot(2, true, false, &["a", "b c"]),
            snapshot(3, true, true, &[]),
        ];
        let freed = vec![Some(0), None, Some(u64::MAX)];
        let list = SnapshotList::new(&snapshots, freed.clone(), Totals::default());
        let json = serde_json::to_string(&list).unwrap();
        let back: SnapshotList = serde_json::from_str(&json).unwrap();
        assert_eq!(back, list);
        let reports = SnapshotsReport::from(back).snapshots;
        let wanted = snapshots.iter().zip(freed).map(|(snapshot, freed_bytes)| SnapshotReport {
            freed_bytes,
            ..SnapshotReport::from(snapshot)
        });
        assert_eq!(reports, wanted.collect::<Vec<_>>());
        // Of a list that somebody else made only what is whole is shown.
        let short = SnapshotList { flags: vec![0], ..list };
        assert_eq!(short.lines().count(), 1);
    }
}

//! Attributes of what is likely to be looked up next.
//!
//! A name that no cache of the kernel has is a place on a disk to be read, and looking it up takes
//! a hand-over to a worker of the replica as well. Whoever walks through a directory (`git status`,
//! a backup, `cp -a`) has its names looked up one after another, in the order in which we list
//! them: that of the names. Where two of them in a row were in no cache, the next ones are asked
//! for by a worker, for nobody: when their turn comes they are at hand. Each time the walk comes to
//! the end of them there are more. Of a small directory, whose files lie close together on most
//! filesystems, the first name is enough.
//!
//! A guess, and only that: nothing waits for it, and a name that is gone meanwhile is no matter.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::Mutex;

use crate::error::Result;
use crate::replica::backing::Handle;
use crate::types::{EntryName, NodeId, ReplicaId};

use super::Volume;

/// Directories that are remembered: walks are few.
const DIRS: NonZeroUsize = NonZeroUsize::new(256).expect("more than 0");
/// Walks through one directory at the same time: `git` has some threads. With more of them, more of
/// who looks here and there in a small one would be taken for a walk.
const WALKS_MAX: usize = 16;
/// A walk passes over so many names at most: some may be at hand, or of no use to it.
const NEAR: usize = 4;
/// Names that are asked for at first, each time twice as many.
const FIRST: usize = 32;
/// And at most.
const MOST: usize = 256;
/// Of a directory of so many names at most all are asked for.
const SMALL: usize = 64;
/// What was asked for so long ago may be in no cache any more.
const FORGOTTEN: Duration = Duration::from_secs(2);

/// The walks that were seen.
pub(super) struct Walks(Mutex<LruCache<NodeId, Vec<Walk>>>);

/// One of them, by the names whose attributes were in no cache.
struct Walk {
    /// The name that was looked up last.
    at: EntryName,
    /// The last of the names that were asked for ahead; the same if there are none.
    until: EntryName,
    /// How many they are.
    count: usize,
    since: Instant,
}

impl Walks {
    pub fn new() -> Walks {
        Walks(Mutex::new(LruCache::new(DIRS)))
    }

    /// A name was looked up that was in no cache. Returns the names to be asked for ahead. `after`
    /// tells so many names of the directory after one, or from the first, in their order.
    fn miss(
        &self,
        dir: NodeId,
        name: &EntryName,
        after: impl Fn(Option<&EntryName>, usize) -> Result<Vec<EntryName>>,
    ) -> Result<Vec<EntryName>> {
        let (is_first, last) = {
            let mut known = self.0.lock();
            let walks = known.get_or_insert_mut(dir, Vec::new);
            walks.retain(|walk| walk.since.elapsed() < FORGOTTEN);
            if walks.iter().any(|walk| walk.count > 0 && walk.at <= *name && *name <= walk.until) {
                // It is on its way.
                return Ok(Vec::new());
            }
            let before = walks.iter().filter(|walk| walk.until < *name);
            (walks.is_empty(), before.map(|walk| walk.until.clone()).max())
        };
        let follows = match &last {
            Some(last) => after(Some(last), NEAR)?.contains(name),
            None => false,
        };
        if is_first {
            let mut all = after(None, SMALL + 1)?;
            if let (2..=SMALL, [first, .., last]) = (all.len(), &*all) {
                self.begin(dir, (first, last), all.len());
                let place = all.partition_point(|other| other <= name);
                all.rotate_left(place);
                return Ok(all);
            }
        }
        // The directory is not held meanwhile: another walk may have come.
        let mut known = self.0.lock();
        let walks = known.get_or_insert_mut(dir, Vec::new);
        let of = last.filter(|_| follows);
        let found = of.and_then(|last| walks.iter().position(|walk| walk.until == last));
        let Some(found) = found else {
            drop(known);
            self.begin(dir, (name, name), 0);
            return Ok(Vec::new());
        };
        let count = walks.swap_remove(found).count;
        drop(known);
        let ahead = after(Some(name), (count * 2).clamp(FIRST, MOST))?;
        self.begin(dir, (name, ahead.last().unwrap_or(name)), ahead.len());
        Ok(ahead)
    }

    /// So many names are asked for, from one to another.
    fn begin(&self, dir: NodeId, (at, until): (&EntryName, &EntryName), count: usize) {
        let mut known = self.0.lock();
        let walks = known.get_or_insert_mut(dir, Vec::new);
        if walks.len() >= WALKS_MAX {
            walks.remove(0);
        }
        let (at, until) = (at.clone(), until.clone());
        walks.push(Walk { at, until, count, since: Instant::now() });
    }
}

impl Volume {
    /// The attributes of a name in a directory were not at hand on a replica: those that are likely
    /// to be needed next are asked for in the background.
    pub(super) fn look_ahead(&self, on: ReplicaId, dir: NodeId, handle: &Handle, name: &EntryName) {
        let replica = self.replicas().get(on);
        if !replica.guard().knows_what_is_at_hand() {
            return;
        }
        let after = |name: Option<&_>, most| self.catalog().foresee(dir, name, most);
        match self.walks.miss(dir, name, after) {
            Ok(names) if names.is_empty() => {}
            Ok(names) => {
                if !replica.guard().look_ahead(handle, names) {
                    // The next one may be more lucky.
                    self.walks.0.lock().pop(&dir);
                }
            }
            // Whoever needs the catalog for more than a guess hears of it.
            Err(error) => log::debug!("no look ahead: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The directory's names: `n000000` to `n009999`.
    const COUNT: usize = 10_000;

    fn name(number: usize) -> EntryName {
        EntryName::new(format!("n{number:06}")).unwrap()
    }

    fn after(last: Option<&EntryName>, most: usize) -> Result<Vec<EntryName>> {
        let number = |name: &EntryName| {
            let digits = std::str::from_utf8(&name.as_bytes()[1..]).unwrap();
            digits.parse::<usize>().unwrap()
        };
        let first = last.map_or(0, |last| number(last) + 1);
        Ok((first..COUNT.min(first + most)).map(name).collect())
    }

    fn miss(walks: &Walks, number: usize) -> usize {
        let ahead = walks.miss(NodeId(7), &name(number), after).unwrap();
        let expected: Vec<_> = (number + 1..COUNT).map(name).take(ahead.len()).collect();
        assert_eq!(ahead, expected);
        ahead.len()
    }

    #[test]
    fn a_walk_is_seen_by_its_second_name_and_then_asked_for_more_and_more_of() {
        let walks = Walks::new();
        assert_eq!(miss(&walks, 10), 0);
        assert_eq!(miss(&walks, 11), FIRST);
        // These are on their way.
        assert_eq!((miss(&walks, 12), miss(&walks, 11 + FIRST)), (0, 0));
        assert_eq!(miss(&walks, 12 + FIRST), 2 * FIRST);
        // What was at hand, or of no use, is passed over.
        assert_eq!(miss(&walks, 14 + 3 * FIRST), 4 * FIRST);
        assert_eq!(miss(&walks, 15 + 7 * FIRST), MOST);
        assert_eq!(miss(&walks, 16 + 15 * FIRST), MOST);
        assert_eq!(miss(&walks, COUNT - 1), 0);
    }

    #[test]
    fn walks_at_the_same_time_do_not_disturb_one_another() {
        let walks = Walks::new();
        for begin in [800, 100, 500] {
            assert_eq!(miss(&walks, begin), 0);
        }
        for begin in [500, 800, 100] {
            assert_eq!(miss(&walks, begin + 1), FIRST);
        }
        for begin in [100, 800, 500] {
            assert_eq!(miss(&walks, begin + 2 + FIRST), 2 * FIRST);
        }
    }

    #[test]
    fn of_a_small_directory_all_are_asked_for_at_once_the_next_ones_first() {
        let walks = Walks::new();
        let after = |last: Option<&_>, most| {
            let names = after(last, COUNT)?.into_iter();
            Ok(names.filter(|each| *each < name(5)).take(most).collect::<Vec<_>>())
        };
        let ahead = walks.miss(NodeId(7), &name(2), after).unwrap();
        assert_eq!(ahead, [3, 4, 0, 1, 2].map(name));
        for number in 0..5 {
            assert!(walks.miss(NodeId(7), &name(number), after).unwrap().is_empty());
        }
    }

    #[test]
    fn who_looks_here_and_there_has_nothing_asked_for() {
        let walks = Walks::new();
        let places = (0..900).map(|step| step * 1117 % COUNT);
        assert_eq!(places.map(|place| miss(&walks, place)).sum::<usize>(), 0);
        // Nor who goes backwards.
        let walks = Walks::new();
        assert_eq!((0..900).rev().map(|place| miss(&walks, place)).sum::<usize>(), 0);
    }
}

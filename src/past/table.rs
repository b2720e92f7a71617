//! Bounded tables that give ids to things on first sight.
//!
//! An id is what an inode number can carry of a thing that is larger than a number. The least
//! recently used entry is forgotten when the table is full; its id then means nothing (`ESTALE`),
//! whereupon the kernel looks the path up again and gets a new one. Ids go round in their range, so
//! the same id comes back only after the whole range was given out; [`Table::rounds`] tells such
//! numbers apart.

use std::collections::HashMap;
use std::hash::Hash;
use std::num::NonZeroUsize;

use lru::LruCache;

/// Things with ids below a bound.
pub struct Table<K> {
    by_id: LruCache<u64, K>,
    ids: HashMap<K, u64>,
    given: u64,
    range: u64,
}

impl<K: Clone + Eq + Hash> Table<K> {
    /// An empty table that holds `entries_max` and gives ids below `range`.
    pub fn new(entries_max: usize, range: u64) -> Table<K> {
        let capacity = NonZeroUsize::new(entries_max).expect("a table holds at least one entry");
        assert!((entries_max as u64) < range, "an id must be free when one is needed");
        Table { by_id: LruCache::new(capacity), ids: HashMap::new(), given: 0, range }
    }

    /// The id of `key`, a new one if it has none.
    pub fn id(&mut self, key: &K) -> u64 {
        if let Some(&id) = self.ids.get(key) {
            self.by_id.promote(&id);
            return id;
        }
        let mut id = self.given % self.range;
        // After a full round an old entry may still be in use under the next id.
        while self.by_id.contains(&id) {
            self.given += 1;
            id = self.given % self.range;
        }
        self.given += 1;
        if let Some((_, forgotten)) = self.by_id.push(id, key.clone()) {
            self.ids.remove(&forgotten);
        }
        self.ids.insert(key.clone(), id);
        id
    }

    /// The id that `key` has already.
    pub fn known_id(&self, key: &K) -> Option<u64> {
        self.ids.get(key).copied()
    }

    /// The thing that has this id; it counts as used.
    pub fn get(&mut self, id: u64) -> Option<K> {
        self.by_id.get(&id).cloned()
    }

    /// How often all ids were given out.
    pub fn rounds(&self) -> u64 {
        self.given.saturating_sub(1) / self.range
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_keeps_its_id_and_the_rest_is_forgotten() {
        let mut table = Table::new(2, 1000);
        let a = table.id(&"a");
        let b = table.id(&"b");
        assert_ne!(a, b);
        assert_eq!(table.get(a), Some("a"));
        let c = table.id(&"c");
        assert_eq!((table.get(a), table.get(b), table.get(c)), (Some("a"), None, Some("c")));
        assert_eq!(table.id(&"a"), a);
        assert_ne!(table.id(&"b"), b, "a forgotten id is not given to the same thing at once");
    }

    #[test]
    fn ids_in_use_are_passed_over_when_the_range_begins_anew() {
        let mut table = Table::new(2, 3);
        let kept = table.id(&100);
        for key in 0..20 {
            let id = table.id(&key);
            assert_ne!(id, kept);
            assert_eq!(table.get(kept), Some(100));
        }
        assert!(table.rounds() > 0);
    }
}

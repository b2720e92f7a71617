//! A set of node ids that takes about a bit for each: ids are handed out densely.

use std::collections::HashMap;

use crate::types::NodeId;

const PAGE_BITS: u64 = 4096;

/// The set.
#[derive(Default)]
pub struct IdSet {
    pages: HashMap<u64, Box<[u64; (PAGE_BITS / 64) as usize]>>,
}

impl IdSet {
    /// Adds an id.
    pub fn insert(&mut self, id: NodeId) {
        let (page, word, bit) = place(id);
        let page = self.pages.entry(page).or_insert_with(|| Box::new([0; 64]));
        page[word] |= bit;
    }

    /// Takes an id out.
    pub fn remove(&mut self, id: NodeId) {
        let (page, word, bit) = place(id);
        if let Some(page) = self.pages.get_mut(&page) {
            page[word] &= !bit;
        }
    }

    /// Whether the id is in the set.
    pub fn contains(&self, id: NodeId) -> bool {
        let (page, word, bit) = place(id);
        self.pages.get(&page).is_some_and(|page| page[word] & bit != 0)
    }
}

fn place(id: NodeId) -> (u64, usize, u64) {
    let within = id.0 % PAGE_BITS;
    (id.0 / PAGE_BITS, (within / 64) as usize, 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_and_only_that_is_in_the_set() {
        let mut set = IdSet::default();
        let ids = [1, 63, 64, 4095, 4096, (1 << 43) - 1];
        ids.iter().for_each(|&id| set.insert(NodeId(id)));
        assert!(ids.iter().all(|&id| set.contains(NodeId(id))));
        set.remove(NodeId(64));
        set.remove(NodeId(1 << 30));
        assert!(!set.contains(NodeId(64)) && set.contains(NodeId(63)));
        assert!(![0, 2, 62, 65, 4094, 4097].iter().any(|&id| set.contains(NodeId(id))));
    }
}

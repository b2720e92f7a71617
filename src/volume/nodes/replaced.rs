//! Which files took a name since their filesystem was last made durable whole.
//!
//! btrfs makes a synced file durable by a log beside its tree. In some 1 of 100 power cuts that log
//! brought back the file which had had the name before, and which had got another name in
//! `preserved/` in between, and did not have the new one at all, though that was synced after it
//! took the name by a rename; or it had the one that took the name, by a link, and the one before
//! was nowhere. A whole transaction (`syncfs`) is always right. So where names are not ordered
//! ([`crate::replica::backing::Backing::orders_names`]) the first sync after a rename or a link, of
//! the file or of its directory, is one of everything: whether another had the name since the last
//! transaction is not known.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::types::NodeId;

/// Files that took names, and the directories that these are in.
#[derive(Default)]
pub struct Replaced {
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    last: Moment,
    taken: HashMap<NodeId, Moment>,
}

/// A point in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl Replaced {
    /// A rename or a link has just given one of these a name. To be called before anybody can ask
    /// for a sync of what it did.
    pub fn note(&self, nodes: &[NodeId]) {
        let mut book = self.book.lock();
        book.last.0 += 1;
        let last = book.last;
        book.taken.extend(nodes.iter().map(|&node| (node, last)));
    }

    /// The present moment: a whole sync that begins after this makes durable what was noted up to
    /// it.
    pub fn now(&self) -> Moment {
        self.book.lock().last
    }

    /// [`Replaced::now`] if a sync of this node must be a whole one; else `None`.
    pub fn concerns(&self, node: NodeId) -> Option<Moment> {
        let book = self.book.lock();
        book.taken.contains_key(&node).then_some(book.last)
    }

    /// A whole sync has ended well that began after `moment`.
    pub fn settle(&self, moment: Moment) {
        self.book.lock().taken.retain(|_, taken| *taken > moment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_took_a_name_while_a_sync_ran_needs_another() {
        let (file, dir, other) = (NodeId(5), NodeId(1), NodeId(6));
        let replaced = Replaced::default();
        replaced.note(&[file, dir]);
        let begun = replaced.concerns(file);
        replaced.note(&[other, dir]);
        replaced.settle(begun.expect("it took a name"));
        assert_eq!(replaced.concerns(file), None);
        assert!(replaced.concerns(other).is_some() && replaced.concerns(dir).is_some());
        replaced.settle(replaced.now());
        assert_eq!((replaced.concerns(other), replaced.concerns(dir)), (None, None));
    }
}

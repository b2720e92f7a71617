//! What is being changed, by epoch: the write intents of a mounted store.
//!
//! Every operation that changes a replica says before what it is about to change
//! ([`Intents::begin`]) and holds an [`Intent`] until it has ended. Intents are counted in
//! *epochs*: a new one can be opened at any time without stopping anybody, and an epoch that is
//! over ([`Intents::drain`]) tells exactly what may differ between the replicas, or between them
//! and the catalog, because of it ([`Intents::dirty_since`]).
//!
//! A node that is born in an epoch is no part of the epoch's set: its directory is, and stands for
//! all that is born in it ([`DirtySet::born_from`]).
//!
//! Does not know what an operation does, nor when an epoch is to end.

use std::collections::{BTreeMap, HashSet};

use parking_lot::{Condvar, Mutex};

use crate::error::Result;
use crate::types::NodeId;

/// What an operation is about to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dirty {
    /// Content and attributes of this node, which is no directory.
    File(NodeId),
    /// Entries and attributes of this directory, and everything born in it.
    Dir(NodeId),
    /// By which name this directory is reached, but nothing in it. Of the directories that it
    /// moves between each is dirty, too.
    Moved(NodeId),
}

/// Numbers epochs in the order of their opening. Never repeats within a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// What was dirtied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtySet {
    /// Nodes whose content and attributes may differ.
    pub files: HashSet<NodeId>,
    /// Directories whose entries and attributes may differ, and all that was born in them.
    pub dirs: HashSet<NodeId>,
    /// Directories that may lie elsewhere; not what is in them.
    pub moved: HashSet<NodeId>,
    /// What lies in such a directory and has this id or a later one was born meanwhile, with all
    /// below it; `None` if nothing was dirtied.
    pub born_from: Option<NodeId>,
}

impl DirtySet {
    /// Whether nothing was dirtied.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.dirs.is_empty() && self.moved.is_empty()
    }

    /// Adds what another set has.
    pub fn join(&mut self, other: &DirtySet) {
        self.files.extend(&other.files);
        self.dirs.extend(&other.dirs);
        self.moved.extend(&other.moved);
        self.born_from = match (self.born_from, other.born_from) {
            (Some(own), Some(other)) => Some(own.min(other)),
            (own, other) => own.or(other),
        };
    }

    fn insert(&mut self, what: Dirty) -> bool {
        match what {
            Dirty::File(node) => self.files.insert(node),
            Dirty::Dir(node) => self.dirs.insert(node),
            Dirty::Moved(node) => self.moved.insert(node),
        }
    }
}

/// One epoch.
struct Span {
    /// Operations that began in it and have not ended.
    running: usize,
    set: DirtySet,
    /// Nodes that were born in it or later have ids from here on.
    born_from: NodeId,
    /// Nodes with such ids that an operation of an earlier epoch made.
    late: HashSet<NodeId>,
}

impl Span {
    fn new(born_from: NodeId) -> Span {
        Span { running: 0, set: DirtySet::default(), born_from, late: HashSet::new() }
    }

    fn add(&mut self, what: Dirty) {
        let (Dirty::File(node) | Dirty::Dir(node) | Dirty::Moved(node)) = what;
        let born = node >= self.born_from && !self.late.contains(&node);
        if !born && self.set.insert(what) {
            self.set.born_from = Some(self.born_from);
        }
    }
}

struct Book {
    spans: BTreeMap<Epoch, Span>,
    current: Epoch,
    /// The sets of epochs from here on are kept for whoever asks.
    kept_from: Epoch,
}

/// The epochs of a mounted store.
pub struct Intents {
    book: Mutex<Book>,
    /// An operation of an epoch that is not the current one has ended.
    ended: Condvar,
}

/// One operation that changes something, counted in its epoch until it is dropped.
#[must_use = "the operation is counted only while this lives"]
pub struct Intent<'a> {
    intents: &'a Intents,
    epoch: Epoch,
}

impl Intents {
    /// The first epoch begins; nodes that are born from now on have ids from `next` on.
    pub fn new(next: NodeId) -> Intents {
        let current = Epoch(1);
        let book = Book {
            spans: BTreeMap::from([(current, Span::new(next))]),
            current,
            kept_from: current,
        };
        Intents { book: Mutex::new(book), ended: Condvar::new() }
    }

    /// An operation is about to change `what`.
    pub fn begin(&self, what: &[Dirty]) -> Intent<'_> {
        let mut book = self.book.lock();
        let epoch = book.current;
        let span = book.span(epoch);
        span.running += 1;
        what.iter().for_each(|&what| span.add(what));
        Intent { intents: self, epoch }
    }

    /// The epoch that operations begin in now.
    pub fn current(&self) -> Epoch {
        self.book.lock().current
    }

    /// Opens a new epoch and returns it. `next` tells the id that the next newborn node gets.
    pub fn open(&self, next: impl FnOnce() -> NodeId) -> Epoch {
        let mut book = self.book.lock();
        let epoch = Epoch(book.current.0 + 1);
        book.spans.insert(epoch, Span::new(next()));
        book.current = epoch;
        epoch
    }

    /// Waits until all operations of epochs before `epoch`, which is open, have ended.
    pub fn drain(&self, epoch: Epoch) {
        let mut book = self.book.lock();
        while book.spans.range(..epoch).any(|(_, span)| span.running > 0) {
            self.ended.wait(&mut book);
        }
    }

    /// What was dirtied in this epoch so far.
    pub fn dirty_in(&self, epoch: Epoch) -> DirtySet {
        self.book.lock().spans.get(&epoch).map(|span| span.set.clone()).unwrap_or_default()
    }

    /// What was dirtied in this epoch and later ones so far.
    pub fn dirty_since(&self, epoch: Epoch) -> DirtySet {
        let mut all = DirtySet::default();
        self.book.lock().spans.range(epoch..).for_each(|(_, span)| all.join(&span.set));
        all
    }

    /// Nobody asks any more what was dirtied before `epoch`.
    pub fn forget_before(&self, epoch: Epoch) {
        let mut book = self.book.lock();
        book.kept_from = book.kept_from.max(epoch);
        book.forget();
    }
}

impl Book {
    fn span(&mut self, epoch: Epoch) -> &mut Span {
        self.spans.get_mut(&epoch).expect("an epoch stays while it is current or has operations")
    }

    fn forget(&mut self) {
        let (from, current) = (self.kept_from, self.current);
        self.spans.retain(|&epoch, span| epoch >= from || epoch == current || span.running > 0);
    }
}

impl Intent<'_> {
    /// The operation is about to change this, too.
    pub fn also(&self, what: Dirty) -> Result<()> {
        self.intents.book.lock().span(self.epoch).add(what);
        Ok(())
    }

    /// The operation has just got this id for what it made. Told before anybody else can know the
    /// node, so that one which is born into an epoch that is over is not taken for the next one's.
    pub fn born(&self, node: NodeId) {
        let mut book = self.intents.book.lock();
        for (_, span) in book.spans.range_mut(Epoch(self.epoch.0 + 1)..) {
            if node >= span.born_from {
                span.late.insert(node);
            }
        }
    }
}

impl Drop for Intent<'_> {
    fn drop(&mut self) {
        let mut book = self.intents.book.lock();
        let span = book.span(self.epoch);
        span.running -= 1;
        if span.running == 0 && self.epoch < book.current {
            book.forget();
            self.intents.ended.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const OLD: NodeId = NodeId(5);
    const NEXT: NodeId = NodeId(100);

    fn dirs(set: &DirtySet) -> Vec<NodeId> {
        let mut dirs: Vec<NodeId> = set.dirs.iter().copied().collect();
        dirs.sort();
        dirs
    }

    #[test]
    fn what_is_born_in_an_epoch_is_told_by_its_directory_alone() {
        let intents = Intents::new(NEXT);
        drop(intents.begin(&[Dirty::Dir(OLD), Dirty::File(NEXT), Dirty::Dir(NodeId(101))]));
        let set = intents.dirty_since(Epoch(1));
        assert_eq!((dirs(&set), set.files.len(), set.born_from), (vec![OLD], 0, Some(NEXT)));
        // In the next epoch it is as old as all others.
        let epoch = intents.open(|| NodeId(102));
        drop(intents.begin(&[Dirty::File(NEXT)]));
        assert!(intents.dirty_in(epoch).files.contains(&NEXT));
        assert!(intents.dirty_in(epoch).dirs.is_empty());
    }

    #[test]
    fn a_birth_that_an_earlier_epoch_began_is_none_of_the_next() {
        let intents = Intents::new(NEXT);
        let creating = intents.begin(&[Dirty::Dir(OLD)]);
        let epoch = intents.open(|| NEXT);
        creating.born(NEXT);
        drop(creating);
        drop(intents.begin(&[Dirty::File(NEXT)]));
        assert!(intents.dirty_in(epoch).files.contains(&NEXT));
    }

    #[test]
    fn an_operation_counts_in_the_epoch_in_which_it_began() {
        let intents = Arc::new(Intents::new(NEXT));
        let early = intents.begin(&[Dirty::Dir(OLD)]);
        let epoch = intents.open(|| NEXT);
        let late = intents.begin(&[]);
        early.also(Dirty::Moved(NodeId(7))).unwrap();
        assert!(intents.dirty_in(epoch).is_empty());
        assert!(intents.dirty_in(Epoch(1)).moved.contains(&NodeId(7)));
        let drained = Arc::new(AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                intents.drain(epoch);
                assert!(drained.swap(true, Ordering::SeqCst), "drained before the operation ended");
            });
            drained.store(true, Ordering::SeqCst);
            drop(early);
        });
        // What began later is not waited for.
        drop(late);
    }

    #[test]
    fn sets_are_kept_until_they_are_forgotten() {
        let intents = Intents::new(NEXT);
        drop(intents.begin(&[Dirty::Dir(OLD)]));
        let epoch = intents.open(|| NEXT);
        drop(intents.begin(&[Dirty::Dir(NodeId(6))]));
        assert_eq!(dirs(&intents.dirty_since(Epoch(1))), [OLD, NodeId(6)]);
        intents.forget_before(epoch);
        assert_eq!(dirs(&intents.dirty_since(Epoch(1))), [NodeId(6)]);
    }
}

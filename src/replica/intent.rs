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
//! What an operation is about to change is on record on every replica, durably, before it goes on
//! ([`log`], [`mod@format`]): so recovery from an unclean end looks only at that.
//!
//! Does not know what an operation does, nor when an epoch is to end.

use std::collections::{BTreeMap, HashSet};

use parking_lot::{Condvar, Mutex};

use crate::error::Result;
use crate::replica::ReplicaSet;
use crate::replica::backing::Backing;
use crate::types::{NodeId, ReplicaId};

use log::Log;

pub mod format;
mod log;

pub use format::{Base, MovedDir, Past};

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

impl Dirty {
    /// Which node it is about.
    pub fn node(self) -> NodeId {
        match self {
            Dirty::File(node) | Dirty::Dir(node) | Dirty::Moved(node) => node,
        }
    }
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

    /// Whether a node's content may differ.
    pub fn may_differ(&self, node: NodeId) -> bool {
        self.born_from.is_some_and(|from| node >= from) || self.files.contains(&node)
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
        let node = what.node();
        let born = node >= self.born_from && !self.late.contains(&node);
        if !born && self.set.insert(what) {
            self.set.born_from = Some(self.born_from);
        }
    }
}

struct Book {
    spans: BTreeMap<Epoch, Span>,
    current: Epoch,
    /// The sets of epochs from here on are kept for whoever asked for them.
    kept_from: Epoch,
    /// Epochs before this one are closed in the log.
    open_from: Epoch,
    /// Operations that have begun.
    begun: u64,
}

/// The epochs of a mounted store.
pub struct Intents {
    book: Mutex<Book>,
    /// An operation of an epoch that is not the current one has ended.
    ended: Condvar,
    log: Log,
}

/// One operation that changes something, counted in its epoch until it is dropped.
#[must_use = "the operation is counted only while this lives"]
pub struct Intent<'a> {
    intents: &'a Intents,
    replicas: &'a ReplicaSet,
    epoch: Epoch,
}

/// An [`Intent`] that outlives the call which began it: to be given to [`Intents::end`].
#[must_use = "its epoch does not end before it does"]
pub struct KeptIntent(Epoch);

impl Intents {
    /// Begins the log of a mount on every replica, and the first epoch; nodes that are born from
    /// now on have ids from `next` on. `mount` is when the mount began, `base` what is durable.
    pub fn begin_log(
        replicas: &ReplicaSet,
        mount: i64,
        next: NodeId,
        base: Base,
    ) -> Result<Intents> {
        let current = Epoch(1);
        let book = Book {
            spans: BTreeMap::from([(current, Span::new(next))]),
            current,
            kept_from: Epoch(u64::MAX),
            open_from: current,
            begun: 0,
        };
        let log = Log::begin(replicas, mount, next, base)?;
        Ok(Intents { book: Mutex::new(book), ended: Condvar::new(), log })
    }

    /// An operation is about to change `what`: that is on record when this returns.
    pub fn begin<'a>(&'a self, replicas: &'a ReplicaSet, what: &[Dirty]) -> Result<Intent<'a>> {
        let mut book = self.book.lock();
        let epoch = book.current;
        book.begun += 1;
        let span = book.span(epoch);
        span.running += 1;
        what.iter().for_each(|&what| span.add(what));
        drop(book);
        let intent = Intent { intents: self, replicas, epoch };
        self.log.ensure(replicas, epoch, what, &[])?;
        Ok(intent)
    }

    /// The epoch that operations begin in now.
    pub fn current(&self) -> Epoch {
        self.book.lock().current
    }

    /// Opens a new epoch and returns it; its set and those of later ones are kept until
    /// [`Intents::forget_before`]. `next` tells the id that the next newborn node gets.
    pub fn open(&self, next: impl FnOnce() -> NodeId) -> Epoch {
        let mut book = self.book.lock();
        let epoch = book.open(next());
        book.kept_from = book.kept_from.min(epoch);
        epoch
    }

    /// As [`Intents::open`], for a checkpoint: what is dirtied from now on is recorded apart, and
    /// what was before counts no more after [`Intents::close`]. Where a checkpoint failed after
    /// this, it is to be gone on with. One checkpoint at a time.
    pub fn turn(&self, next: impl FnOnce() -> NodeId) -> Epoch {
        let mut book = self.book.lock();
        if let Some(epoch) = self.log.turned() {
            return epoch;
        }
        let next = next();
        let epoch = book.open(next);
        self.log.turn(epoch, next);
        epoch
    }

    /// All that was dirtied before the last [`Intents::turn`] is durable everywhere, up to `base`
    /// of the catalog and the undo log.
    pub fn close(&self, replicas: &ReplicaSet, base: Base) -> Result<()> {
        let first = self.log.close(replicas, base)?;
        let mut book = self.book.lock();
        book.open_from = first;
        book.forget();
        Ok(())
    }

    /// What was dirtied before `epoch` and is not closed.
    pub fn dirty_before(&self, epoch: Epoch) -> DirtySet {
        let book = self.book.lock();
        let mut all = DirtySet::default();
        book.spans.range(book.open_from..epoch).for_each(|(_, span)| all.join(&span.set));
        all
    }

    /// Whether so much is recorded that a checkpoint is wanted.
    pub fn is_long(&self) -> bool {
        self.log.is_long()
    }

    /// How many records the log has since the last checkpoint.
    pub fn recorded(&self) -> u64 {
        self.log.count()
    }

    /// Whether nothing was recorded since the last checkpoint.
    pub fn is_clean(&self) -> bool {
        self.recorded() == 0
    }

    /// A number that grows with every operation.
    pub fn activity(&self) -> u64 {
        self.book.lock().begun
    }

    /// Begins the log of a replica that comes into use; see [`Log::join`].
    pub fn join(
        &self,
        replicas: &ReplicaSet,
        id: ReplicaId,
        backing: &dyn Backing,
    ) -> std::io::Result<()> {
        self.log.join(replicas, id, backing)
    }

    /// Looks at a replica's log, and writes it anew if it is not whole; see [`Log::heal`].
    pub fn heal(&self, replicas: &ReplicaSet, id: ReplicaId) -> Option<std::io::Result<()>> {
        self.log.heal(replicas, id, &*replicas.backing(id))
    }

    /// Waits until all operations of epochs before `epoch`, which is open, have ended.
    pub fn drain(&self, epoch: Epoch) {
        let mut book = self.book.lock();
        while book.spans.range(..epoch).any(|(_, span)| span.running > 0) {
            self.ended.wait(&mut book);
        }
    }

    /// An operation has ended.
    pub fn end(&self, KeptIntent(epoch): KeptIntent) {
        let mut book = self.book.lock();
        let span = book.span(epoch);
        span.running -= 1;
        if span.running == 0 && epoch < book.current {
            book.forget();
            self.ended.notify_all();
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

    /// Nobody asks any more what was dirtied before `epoch`; with `None`, nobody asks at all.
    pub fn forget_before(&self, epoch: Option<Epoch>) {
        let mut book = self.book.lock();
        let until = epoch.unwrap_or(Epoch(u64::MAX));
        book.kept_from = book.kept_from.max(until);
        book.forget();
    }
}

impl Book {
    fn open(&mut self, next: NodeId) -> Epoch {
        let epoch = Epoch(self.current.0 + 1);
        self.spans.insert(epoch, Span::new(next));
        self.current = epoch;
        epoch
    }

    fn span(&mut self, epoch: Epoch) -> &mut Span {
        self.spans.get_mut(&epoch).expect("an epoch stays while it is current or has operations")
    }

    fn forget(&mut self) {
        let (from, current) = (self.kept_from.min(self.open_from), self.current);
        self.spans.retain(|&epoch, span| epoch >= from || epoch == current || span.running > 0);
    }
}

impl Intent<'_> {
    /// The operation goes on when this call has returned.
    pub fn keep(self) -> KeptIntent {
        let kept = KeptIntent(self.epoch);
        std::mem::forget(self);
        kept
    }

    /// The operation is about to change this, too.
    pub fn also(&self, what: Dirty) -> Result<()> {
        self.intents.book.lock().span(self.epoch).add(what);
        self.intents.log.ensure(self.replicas, self.epoch, &[what], &[])
    }

    /// The operation is about to move this directory, which each replica knows as told.
    pub fn moves(&self, node: NodeId, known: &[MovedDir]) -> Result<()> {
        let what = Dirty::Moved(node);
        self.intents.book.lock().span(self.epoch).add(what);
        self.intents.log.ensure(self.replicas, self.epoch, &[what], known)
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
        self.intents.log.born(self.epoch, node);
    }
}

impl Drop for Intent<'_> {
    fn drop(&mut self) {
        self.intents.end(KeptIntent(self.epoch));
    }
}

#[cfg(test)]
mod tests;

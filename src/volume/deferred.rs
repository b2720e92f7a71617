//! Deferred writes: accepted, and carried out a few milliseconds later.
//!
//! Before a byte of a sealed content is overwritten, what was there must be durable in the undo
//! log. A program that writes to random places would wait for a sync on every disk with each write,
//! some 0.3 ms. Nothing asks for that: its data is durable after its fsync and no sooner. So such
//! writes are kept in memory until there are many of them, or for as long as the volume's options
//! say; then what they will overwrite is preserved with one sync for all, and they are carried out
//! in their order.
//!
//! While the thread of this module carries them out, it holds the file's lock, and more is accepted
//! beside it: so a program that writes on and on waits for its own requests, and not for the disks
//! as well, unless those are so much slower that too much is deferred.
//!
//! Only the file's times can tell: [`Volume::lock`], by which operations lock a node, carries out
//! what is deferred before anything else is done with the file. The first write's intent is kept
//! until then, so that its epoch does not end before it is done, and whoever stops all changes
//! ([`Volume::stop_changes`]) has nothing deferred.
//!
//! If we die, deferred writes are lost, as what was not synced is when the power fails. Where one
//! cannot be carried out, on a disk that others fill or that fails, every fsync and close of the
//! file is told until its last writer has closed it; the writes beside it are carried out all the
//! same. The kernel does so for its own delayed writes, but tells each descriptor once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::history::{self, ranges::ByteRange};
use crate::replica::Piece;
use crate::replica::intent::{Intent, KeptIntent};
use crate::types::{ContentId, NodeId};

use super::nodes::{Changer, Node, Open, State};
use super::{Caller, Volume};

/// A larger write is not deferred: its sync is little beside the rest of it, and a copy is not.
const PIECE_BYTES_MAX: usize = 64 << 10;
/// So many bytes of one file are carried out by the writer itself: it must not be faster than the
/// disks for long.
const FILE_BYTES_MAX: usize = 8 << 20;
/// And so many pieces: each is a call of its own, and all together must end in time.
const FILE_PIECES_MAX: usize = 1024;
/// The most bytes deferred of all files.
const BYTES_MAX: usize = 64 << 20;

/// What is deferred of a node; a lock that is held for a moment only, and under which nobody waits
/// for a backing.
pub type Slot = Mutex<Option<Box<Deferred>>>;

/// What is deferred of one file.
#[derive(Default)]
pub struct Deferred {
    pieces: Vec<Piece>,
    bytes: usize,
    /// The oldest one's: no later epoch ends before it.
    intent: Option<KeptIntent>,
    /// Set while those before these are carried out: then more is accepted without the file's lock,
    /// which is held. The size of the sealed content.
    beside: Option<u64>,
    /// Who wrote last of those that were accepted so, but for the kernel itself.
    last: Option<Changer>,
}

/// The files of which writes are deferred.
pub(super) struct Deferrals {
    files: Mutex<HashMap<NodeId, Arc<Node>>>,
    pub(super) bytes: AtomicUsize,
    wake: crossbeam_channel::Sender<()>,
    woken: crossbeam_channel::Receiver<()>,
    hurry: crossbeam_channel::Sender<()>,
    hurried: crossbeam_channel::Receiver<()>,
}

impl Deferrals {
    pub(super) fn new() -> Deferrals {
        let (wake, woken) = crossbeam_channel::bounded(1);
        let (hurry, hurried) = crossbeam_channel::bounded(1);
        let bytes = AtomicUsize::new(0);
        Deferrals { files: Mutex::default(), bytes, wake, woken, hurry, hurried }
    }

    fn list(&self) -> Vec<Arc<Node>> {
        self.files.lock().values().cloned().collect()
    }
}

impl Volume {
    /// Carries out all that is deferred.
    pub(super) fn carry_out_all(&self) {
        for node in self.deferrals.list() {
            // Who had it locked meanwhile did so.
            if self.deferrals.files.lock().contains_key(&node.id) {
                drop(self.lock(&node));
            }
            self.nodes.let_go(node);
        }
    }

    /// Carries out what is deferred of files that nobody has locked; `false` if anything is
    /// deferred then. Who has a file locked carries it out with the next lock, or the next call of
    /// this does.
    pub(super) fn carry_out_unlocked(&self) -> bool {
        for node in self.deferrals.list() {
            if let Some(mut state) = node.try_lock() {
                self.carry_out_beside(&node, &mut state);
            }
            self.nodes.let_go(node);
        }
        self.deferrals.files.lock().is_empty()
    }

    /// Carries out what is deferred of a file, while more is accepted, which is deferred then.
    fn carry_out_beside(&self, node: &Arc<Node>, state: &mut State) {
        let Some(open) = state.open.as_ref() else { return };
        let next = Deferred { beside: Some(open.sealed.size), ..Deferred::default() };
        let due = {
            let mut slot = node.deferred.lock();
            let Some(due) = slot.take() else { return };
            *slot = Some(Box::new(next));
            due
        };
        self.carry_out_batch(node, state, *due);
        let last = node.deferred.lock().as_mut().and_then(|deferred| deferred.last.take());
        if let (Some(last), Some(open)) = (last, state.open.as_mut()) {
            // It is marked as unsealed since the first of them.
            (open.touched, open.by) = (Instant::now(), Some(last));
        }
    }

    /// Whether a write to `range` is better deferred: it would have to wait for what it overwrites,
    /// or comes after such a write. The file is open for writing.
    pub(super) fn is_to_be_deferred(&self, node: &Node, state: &State, range: ByteRange) -> bool {
        let Some(open) = state.open.as_ref() else { return false };
        let bytes = range.len() as usize;
        let lost = history::touched(range, open.sealed.size);
        if bytes > PIECE_BYTES_MAX || open.sealed.content == ContentId::EMPTY || lost.is_empty() {
            return false;
        }
        // Where blocks are shared, the first write has all preserved, and no other waits.
        let is_cloned = || self.history.shares_blocks() && !state.orphan && open.is_untouched();
        let waits = || !open.saved.missing(lost).is_empty() && !is_cloned();
        (node.deferred.lock().is_some() || waits()) && self.has_room_for_deferred(bytes)
    }

    /// Whether so many bytes more may be deferred.
    fn has_room_for_deferred(&self, bytes: usize) -> bool {
        // What is deferred is on no disk yet, and needs as much again for its before-images.
        let all = self.deferrals.bytes.load(Ordering::Relaxed) + bytes;
        let room = 2 * all as u64 + super::ROOM_FOR_A_NAME;
        all <= BYTES_MAX && self.replicas().has_room(room)
    }

    /// Defers a write. Where enough is deferred, all of it is carried out at once.
    pub(super) fn defer(&self, node: &Arc<Node>, state: &mut State, piece: Piece, by: Intent<'_>) {
        let is_full = {
            let mut slot = node.deferred.lock();
            let deferred = slot.get_or_insert_default();
            self.add_deferred(node, deferred, piece, by);
            deferred.is_full()
        };
        if is_full {
            self.carry_out(node, state);
        }
    }

    /// Defers a write to a file of which earlier ones are being carried out, without waiting for
    /// those. Gives the intent back where that is not so, or the write is not to be deferred.
    pub(super) fn defer_beside<'a>(
        &self,
        node: &Arc<Node>,
        (offset, data): (u64, &[u8]),
        by: Intent<'a>,
        caller: &Caller,
    ) -> std::result::Result<(), Intent<'a>> {
        let range = ByteRange::new(offset, data.len() as u64);
        let accepts = |deferred: &Deferred| {
            let lost = deferred.beside.map(|sealed_size| history::touched(range, sealed_size));
            lost.is_some_and(|lost| !lost.is_empty()) && !deferred.is_full()
        };
        let same = |by: &Changer| (by.thread, by.uid) == (caller.pid, caller.creds.uid);
        let is_known = match node.deferred.lock().as_deref() {
            Some(deferred) if accepts(deferred) => deferred.last.as_ref().is_some_and(same),
            _ => return Err(by),
        };
        if data.len() > PIECE_BYTES_MAX || !self.has_room_for_deferred(data.len()) {
            return Err(by);
        }
        // Looked up now: the thread that asks may be gone when these are carried out.
        let changer = if is_known { None } else { self.changer(caller, None) };
        let mut slot = node.deferred.lock();
        let Some(deferred) = slot.as_deref_mut().filter(|deferred| accepts(deferred)) else {
            return Err(by);
        };
        deferred.last = changer.or(deferred.last.take());
        self.add_deferred(node, deferred, Piece { offset, bytes: data.to_vec().into() }, by);
        Ok(())
    }

    /// Adds a write to what is deferred of a file, whose slot is locked.
    fn add_deferred(
        &self,
        node: &Arc<Node>,
        deferred: &mut Deferred,
        piece: Piece,
        by: Intent<'_>,
    ) {
        let bytes = piece.bytes.len();
        if deferred.intent.is_none() {
            deferred.intent = Some(by.keep());
            self.deferrals.files.lock().insert(node.id, node.clone());
            // Where this fails the thread is about to look anyway.
            let _ = self.deferrals.wake.try_send(());
        }
        let before = deferred.bytes;
        deferred.pieces.push(piece);
        deferred.bytes += bytes;
        self.deferrals.bytes.fetch_add(bytes, Ordering::Relaxed);
        let enough = self.options.defer_bytes;
        if before / enough != deferred.bytes / enough {
            let _ = self.deferrals.hurry.try_send(());
        }
    }

    /// Carries out what is deferred of a file, in its order. What goes wrong is told by
    /// [`deferred_error`].
    pub(super) fn carry_out(&self, node: &Node, state: &mut State) {
        let due = node.deferred.lock().take();
        if let Some(due) = due {
            self.carry_out_batch(node, state, *due);
        }
    }

    fn carry_out_batch(&self, node: &Node, state: &mut State, due: Deferred) {
        let Deferred { pieces, bytes, intent, .. } = due;
        // Whatever happens, a panic included: else checkpoints would wait for ever.
        let _ended = Ending { volume: self, node, bytes, intent };
        let failed = self.write_pieces(node, state, &pieces.into());
        if let (Err(error), Some(open)) = (failed, state.open.as_mut()) {
            log::error!("{}: what was written to it failed: {error}", self.told(node));
            open.failed = Some(error.to_errno());
        }
    }

    /// Writes what was deferred, in its order; one piece that cannot be written keeps no other from
    /// it. The file's lock is held, and it was open for writing.
    fn write_pieces(&self, node: &Node, state: &mut State, pieces: &Arc<[Piece]>) -> Result<()> {
        let ranges: Vec<ByteRange> = pieces
            .iter()
            .map(|piece| ByteRange::new(piece.offset, piece.bytes.len() as u64))
            .collect();
        let written = self
            .before_change(node, state, &ranges)
            .and_then(|handles| self.write_all(&handles, pieces));
        if written.is_ok() || pieces.len() == 1 {
            return written;
        }
        let mut first = Ok(());
        for piece in pieces.iter() {
            let alone: Arc<[Piece]> = Arc::new([piece.clone()]);
            first = first.and(self.write_pieces(node, state, &alone));
        }
        first
    }
}

/// What was deferred of a file is carried out, or lost, when this is dropped: from then on a
/// checkpoint may count it as done.
struct Ending<'a> {
    volume: &'a Volume,
    node: &'a Node,
    bytes: usize,
    intent: Option<KeptIntent>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        let deferrals = &self.volume.deferrals;
        {
            let mut slot = self.node.deferred.lock();
            // From here on more is accepted under the file's lock alone.
            slot.iter_mut().for_each(|next| next.beside = None);
            if slot.as_ref().is_none_or(|next| next.pieces.is_empty()) {
                *slot = None;
                deferrals.files.lock().remove(&self.node.id);
            }
        }
        deferrals.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Some(intent) = self.intent.take() {
            self.volume.store.intents.end(intent);
        }
    }
}

/// The error of a deferred write to an open file that could not be carried out.
pub(super) fn deferred_error(state: &State) -> Result<()> {
    match state.open.as_ref().and_then(|open| open.failed) {
        Some(errno) => Err(Error::Posix(errno)),
        None => Ok(()),
    }
}

impl Deferred {
    fn is_full(&self) -> bool {
        self.bytes >= FILE_BYTES_MAX || self.pieces.len() >= FILE_PIECES_MAX
    }
}

impl Open {
    /// Whether no byte of the sealed content was preserved yet.
    pub(super) fn is_untouched(&self) -> bool {
        let whole = ByteRange { start: 0, end: self.sealed.size };
        self.saved.missing(whole) == [whole]
    }
}

/// The thread that carries out what has been deferred for long enough.
pub(super) fn run(volume: &Weak<Volume>, stopped: &crossbeam_channel::Receiver<()>) {
    let Some((woken, hurried, age)) = volume.upgrade().map(|volume| {
        let Deferrals { woken, hurried, .. } = &volume.deferrals;
        (woken.clone(), hurried.clone(), volume.options.defer_writes)
    }) else {
        return;
    };
    loop {
        crossbeam_channel::select! {
            recv(woken) -> _ => {}
            recv(stopped) -> _ => return,
        }
        loop {
            // A disconnect is the signal to stop; nothing is ever sent.
            let stop = crossbeam_channel::select! {
                recv(stopped) -> _ => true,
                recv(hurried) -> _ => false,
                default(age) => false,
            };
            let Some(volume) = volume.upgrade() else { return };
            let all = volume.carry_out_unlocked();
            if stop {
                return;
            }
            if all {
                break;
            }
        }
    }
}

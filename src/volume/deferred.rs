//! Deferred writes: accepted, and carried out a few milliseconds later.
//!
//! Before a byte of a sealed content is overwritten, what was there must be durable in the undo
//! log. A program that writes to random places would wait for a sync on every disk with each write,
//! some 0.3 ms. Nothing asks for that: its data is durable after its fsync and no sooner. So such
//! writes are kept in memory until there are many of them, or for as long as the volume's options
//! say; then what they will overwrite is preserved with one sync for all, and they are carried out
//! in their order.
//!
//! Nobody can tell: [`Volume::lock`], by which all operations lock a node, carries out what is
//! deferred before anything else is done with the file. Only [`Volume::write`] looks at it as it
//! is. The write's intent is kept until then, so that its epoch does not end before it is done, and
//! whoever stops all changes ([`Volume::stop_changes`]) has nothing deferred.
//!
//! If we die, deferred writes are lost, as what was not synced is when the power fails. If carrying
//! them out fails, which the room taken for them beforehand makes an exception, the next write,
//! fsync or close of the file is told, as the kernel does it for its own delayed writes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::history::{self, ranges::ByteRange};
use crate::replica::Piece;
use crate::replica::intent::{Intent, KeptIntent};
use crate::types::{ContentId, NodeId};

use super::Volume;
use super::nodes::{Node, Open, State};

/// So many bytes of one file are carried out by the writer itself: it must not be faster than the
/// disks for long.
const FILE_BYTES_MAX: usize = 8 << 20;
/// The most bytes deferred of all files.
const BYTES_MAX: usize = 64 << 20;

/// What is deferred of one file.
pub struct Deferred {
    pieces: Vec<Piece>,
    bytes: usize,
    /// The oldest one's: no later epoch ends before it.
    intent: KeptIntent,
}

/// The files of which writes are deferred.
pub(super) struct Deferrals {
    files: Mutex<HashMap<NodeId, Arc<Node>>>,
    pub(super) bytes: AtomicUsize,
    wake: crossbeam_channel::Sender<()>,
    woken: crossbeam_channel::Receiver<()>,
}

impl Deferrals {
    pub(super) fn new() -> Deferrals {
        let (wake, woken) = crossbeam_channel::bounded(1);
        Deferrals { files: Mutex::default(), bytes: AtomicUsize::new(0), wake, woken }
    }
}

impl Volume {
    /// Carries out all that is deferred.
    pub(super) fn carry_out_all(&self) {
        let files: Vec<Arc<Node>> = self.deferrals.files.lock().values().cloned().collect();
        for node in files {
            drop(self.lock(&node));
            let id = node.id;
            drop(node);
            self.nodes.drop_unused(id);
        }
    }

    /// Whether a write to `range` is better deferred: it would have to wait for what it overwrites,
    /// or comes after such a write. The file is open for writing.
    pub(super) fn is_to_be_deferred(&self, state: &State, range: ByteRange) -> bool {
        let Some(open) = state.open.as_ref() else { return false };
        let bytes = (range.end - range.start) as usize;
        let all = self.deferrals.bytes.load(Ordering::Relaxed) + bytes;
        if bytes > FILE_BYTES_MAX || all > BYTES_MAX {
            return false;
        }
        if open.deferred.is_some() {
            return true;
        }
        let lost = history::touched(range, open.sealed.size);
        if open.sealed.content == ContentId::EMPTY || open.saved.missing(lost).is_empty() {
            return false;
        }
        // Where blocks are shared, the first write has all preserved, and no other waits.
        !self.history.shares_blocks() || state.orphan || !open.is_untouched()
    }

    /// Defers a write. Where there may be no room for what it will need, or enough is deferred, it
    /// is carried out at once, with all before it.
    pub(super) fn defer(&self, node: &Arc<Node>, state: &mut State, piece: Piece, by: Intent<'_>) {
        let Some(open) = state.open.as_mut() else { return };
        let bytes = piece.bytes.len();
        let files = &self.deferrals.files;
        let deferred = open.deferred.get_or_insert_with(|| {
            files.lock().insert(node.id, node.clone());
            // Where this fails the thread is about to look anyway.
            let _ = self.deferrals.wake.try_send(());
            Deferred { pieces: Vec::new(), bytes: 0, intent: by.keep() }
        });
        deferred.pieces.push(piece);
        deferred.bytes += bytes;
        self.deferrals.bytes.fetch_add(bytes, Ordering::Relaxed);
        // As much again for the before-image.
        let room = self.replicas().ensure_room(bytes as u64 + super::ROOM_FOR_A_NAME).is_ok();
        if deferred.bytes >= FILE_BYTES_MAX || !room {
            self.carry_out(node, state);
        }
    }

    /// Carries out what is deferred of a file, in its order. What goes wrong is told by
    /// [`Volume::deferred_error`].
    pub(super) fn carry_out(&self, node: &Node, state: &mut State) {
        let Some(open) = state.open.as_mut() else { return };
        let Some(Deferred { pieces, bytes, intent }) = open.deferred.take() else { return };
        let failed = self.write_pieces(node, state, pieces);
        self.deferrals.files.lock().remove(&node.id);
        self.deferrals.bytes.fetch_sub(bytes, Ordering::Relaxed);
        if let (Err(error), Some(open)) = (failed, state.open.as_mut()) {
            log::error!("{}: what was written to it failed: {error}", self.told(node));
            open.failed = Some(error.to_errno());
        }
        // From here on a checkpoint may count it as done.
        self.store.intents.end(intent);
    }

    /// The error of a deferred write that nobody was told yet.
    pub(super) fn deferred_error(&self, state: &mut State) -> Result<()> {
        match state.open.as_mut().and_then(|open| open.failed.take()) {
            Some(errno) => Err(Error::Posix(errno)),
            None => Ok(()),
        }
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
    let Some((woken, age)) = volume
        .upgrade()
        .map(|volume| (volume.deferrals.woken.clone(), volume.options.defer_writes))
    else {
        return;
    };
    loop {
        crossbeam_channel::select! {
            recv(woken) -> _ => {}
            recv(stopped) -> _ => return,
        }
        // A disconnect is the signal to stop; nothing is ever sent.
        let stop = stopped.recv_timeout(age);
        let Some(volume) = volume.upgrade() else { return };
        volume.carry_out_all();
        if stop != Err(crossbeam_channel::RecvTimeoutError::Timeout) {
            return;
        }
    }
}

//! What all replicas do at the same time: syncs, and writes that are worth it. And what one of
//! them does in one go.

use std::io;
use std::sync::Arc;

use super::backing::{Backing, Handle};
use super::buffer::Buffer;
use super::guarded::{Guarded, UnderWay};
use super::verdict::{Nature, Verdict};
use super::{Handles, Replica, ReplicaSet};
use crate::error::Result;
use crate::types::ReplicaId;

/// From so many bytes on a write goes to all replicas at once. Below it copying costs less than
/// waking a second thread.
const PARALLEL_BYTES_MIN: usize = 32 << 10;

/// Bytes and where in a file they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Of the first byte.
    pub offset: u64,
    /// The bytes.
    pub bytes: Buffer,
}

/// A sync that is under way on all replicas.
#[must_use]
pub struct SyncAll<'a> {
    set: &'a ReplicaSet,
    op: &'static str,
    begun: Vec<(ReplicaId, UnderWay)>,
}

impl SyncAll<'_> {
    /// Waits for all, and judges.
    pub fn wait(self) -> Result<()> {
        let mut verdict = Verdict::new(Nature::Sync);
        for (id, begun) in self.begun {
            verdict.take(id, begun.wait())?;
        }
        self.set.judge(self.op, verdict).map(|_| ())
    }
}

impl ReplicaSet {
    /// [`ReplicaSet::read`] of an operation that owns what it needs. It is handed over as a whole,
    /// instead of each of its calls.
    pub fn read_whole<T: Send + 'static>(
        &self,
        op: &'static str,
        f: impl Fn(ReplicaId, &dyn Backing) -> io::Result<T> + Send + Sync + 'static,
    ) -> Result<T> {
        let f = Arc::new(f);
        self.read(op, |id, _| {
            let own = f.clone();
            self.get(id).backing.whole(op, move |inner| own(id, inner))
        })
    }

    /// Begins to make an object durable on every replica on which it is open, on all at once. One
    /// that took its place after the object was opened is passed over: it was durable then.
    pub fn begin_sync(&self, object: &Handles, data_only: bool) -> SyncAll<'_> {
        self.begin_sync_by(object, |backing, handle| backing.begin_sync(handle, data_only))
    }

    /// As [`ReplicaSet::begin_sync`]; where names are not ordered, all that was ever written
    /// becomes durable with it.
    pub fn begin_sync_whole(&self, object: &Handles, data_only: bool) -> SyncAll<'_> {
        self.begin_sync_by(object, |backing, handle| match backing.orders_names() {
            true => backing.begin_sync(handle, data_only),
            false => backing.begin_sync_all(),
        })
    }

    fn begin_sync_by(
        &self,
        object: &Handles,
        begin: impl Fn(&Guarded, &Handle) -> UnderWay,
    ) -> SyncAll<'_> {
        let begin = |id| Some((id, begin(&self.get(id).backing, object.get(id).ok()?)));
        SyncAll { set: self, op: "fsync", begun: self.online().filter_map(begin).collect() }
    }

    /// Whether names reach the disk in order on every replica in use.
    pub fn order_names(&self) -> bool {
        self.online().all(|id| self.get(id).backing.orders_names())
    }

    /// Makes an object durable on every replica.
    pub fn sync(&self, object: &Handles, data_only: bool) -> Result<()> {
        self.begin_sync(object, data_only).wait()
    }

    /// Begins to make all that was ever written durable on every replica.
    pub fn begin_sync_all(&self) -> SyncAll<'_> {
        let begin = |id| (id, self.get(id).backing.begin_sync_all());
        SyncAll { set: self, op: "syncfs", begun: self.online().map(begin).collect() }
    }

    /// Writes all pieces in their order on every replica, on all at once where it is much. On an
    /// error an unknown part of them may be written on each: whoever writes levels them then.
    pub fn write(&self, file: &Arc<Handles>, pieces: &Arc<[Piece]>) -> Result<()> {
        let online: Vec<(ReplicaId, Arc<Replica>)> =
            self.online().map(|id| (id, self.get(id))).collect();
        let bytes: usize = pieces.iter().map(|piece| piece.bytes.len()).sum();
        if online.len() < 2 || bytes < PARALLEL_BYTES_MIN {
            let (file, pieces) = (file.clone(), pieces.clone());
            let write = move |id, b: &dyn Backing| write_pieces(b, file.get(id)?, &pieces);
            return self.change("write", write).map(|_| ());
        }
        // One copy for all; a call that hangs keeps it.
        let begin = |(id, replica): &(ReplicaId, Arc<Replica>)| {
            (*id, file.get(*id).map(|file| replica.backing.begin_write(file, pieces)))
        };
        let begun: Vec<_> = online.iter().map(begin).collect();
        // All have ended before any is judged: none may be writing when the caller levels them.
        let ended: Vec<_> =
            begun.into_iter().map(|(id, begun)| (id, begun.and_then(UnderWay::wait))).collect();
        let mut verdict = Verdict::new(Nature::Change);
        for (id, result) in ended {
            verdict.take(id, result)?;
        }
        self.judge("write", verdict).map(|_| ())
    }
}

/// Writes all pieces in their order.
pub(super) fn write_pieces(b: &dyn Backing, file: &Handle, pieces: &[Piece]) -> io::Result<()> {
    pieces.iter().try_for_each(|piece| b.write_at(file, &piece.bytes, piece.offset))
}

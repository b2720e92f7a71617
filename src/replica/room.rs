//! Whether there is room for more on every replica, without asking the filesystems each time.
//!
//! A write that one replica takes and another has no room for would cost us that replica, so the
//! room is checked before. A part of what the filesystems had at the last look is granted without
//! asking again, so the answer may be late by that part, never by more. Inodes are counted as bytes
//! are: a small filesystem can run out of those first, for each preserved file takes one.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;

use super::ReplicaSet;
use super::backing::Space;
use crate::error::Result;

/// What stays free on every replica for our own records and for metadata.
const RESERVE_BYTES: u64 = 8 * 1024 * 1024;
/// A filesystem smaller than this keeps a share of its size instead.
const SMALL_FILESYSTEM_BYTES: u64 = 256 * 1024 * 1024;
/// That share's divisor; 1/32 of 256 MiB is [`RESERVE_BYTES`].
const SMALL_RESERVE_DIVISOR: u64 = 32;
/// So much of the slack is granted before the next look: one part in this many.
const GRANT_DIVISOR: u64 = 4;
/// Others use the filesystems too: after this time we look again.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// A filesystem keeps one of so many inodes free, within these bounds: what is deleted may need any
/// of 256 directories to be preserved in, and packing a few files.
const RESERVE_FILES_DIVISOR: u64 = 64;
const RESERVE_FILES: std::ops::RangeInclusive<u64> = 320..=1024;
/// But no more than one of so many.
const RESERVE_FILES_DIVISOR_MIN: u64 = 4;

/// What an operation takes of every replica's filesystem, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub files: u64,
}

impl From<u64> for Need {
    fn from(bytes: u64) -> Need {
        Need { bytes, files: 0 }
    }
}

/// The room still granted since the last look, of bytes or of inodes.
pub(super) struct Room {
    epoch: Instant,
    granted: AtomicI64,
    /// When the grant ends, in milliseconds since `epoch`.
    ends_ms: AtomicU64,
    /// Held while looking, so that many writers look once.
    looking: Mutex<()>,
}

impl Room {
    pub(super) fn new() -> Room {
        Room {
            epoch: Instant::now(),
            granted: AtomicI64::new(0),
            ends_ms: AtomicU64::new(0),
            looking: Mutex::new(()),
        }
    }

    /// Whether `bytes` more may be written. `slack` tells the bytes that the tightest replica has
    /// above its reserve; it is called only when the last look is used up.
    pub(super) fn take<E>(
        &self,
        bytes: u64,
        slack: impl FnOnce() -> Result<u64, E>,
    ) -> Result<bool, E> {
        if self.take_granted(bytes) {
            return Ok(true);
        }
        let _looking = self.looking.lock();
        // Another thread may have looked while we waited.
        if self.take_granted(bytes) {
            return Ok(true);
        }
        let slack = slack()?;
        let granted = (slack / GRANT_DIVISOR).saturating_sub(bytes);
        self.granted.store(i64::try_from(granted).unwrap_or(i64::MAX), Ordering::Relaxed);
        self.ends_ms.store(self.now_ms() + LOOK_AGAIN_AFTER.as_millis() as u64, Ordering::Relaxed);
        Ok(bytes <= slack)
    }

    /// Whether so much is granted still; it stays so. `false` may only mean that a look is due.
    pub(super) fn covers(&self, bytes: u64) -> bool {
        let granted = self.granted.load(Ordering::Relaxed);
        self.now_ms() < self.ends_ms.load(Ordering::Relaxed)
            && i64::try_from(bytes).is_ok_and(|bytes| bytes <= granted)
    }

    /// Makes the next question look again.
    pub(super) fn forget(&self) {
        self.ends_ms.store(0, Ordering::Relaxed);
    }

    fn take_granted(&self, bytes: u64) -> bool {
        let Ok(bytes) = i64::try_from(bytes) else { return false };
        if self.now_ms() >= self.ends_ms.load(Ordering::Relaxed) {
            return false;
        }
        // Going below zero and staying there is fine: the next look sets it anew.
        self.granted.load(Ordering::Relaxed) >= bytes
            && self.granted.fetch_sub(bytes, Ordering::Relaxed) >= bytes
    }

    fn now_ms(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64
    }
}

impl ReplicaSet {
    /// Fails with `ENOSPC` unless every online replica has room for so much more and its reserve.
    pub fn ensure_room(&self, need: impl Into<Need>) -> Result<()> {
        let Need { bytes, files } = need.into();
        let least = |slack: fn(&Space) -> u64| -> Result<u64> {
            Ok(self.spaces()?.iter().map(slack).min().unwrap_or(0))
        };
        let has_bytes = || self.room.take(bytes, || least(|space| slack_bytes(space, 1)));
        let has_files = || self.inodes.take(files, || least(slack_files));
        match has_bytes()? && (files == 0 || has_files()?) {
            true => Ok(()),
            false => Err(Errno::NOSPC.into()),
        }
    }

    /// Whether there is room for `bytes` more, none of which is taken by asking.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.room.covers(bytes) || self.ensure_room(bytes).is_ok()
    }

    /// The same for what soon takes the place of as much: it may use a half of the reserve, so that
    /// a full disk can be made emptier.
    pub fn ensure_room_for_a_while(&self, bytes: u64) -> Result<()> {
        match self.spaces()?.iter().all(|space| bytes <= slack_bytes(space, 2)) {
            true => Ok(()),
            false => Err(Errno::NOSPC.into()),
        }
    }
}

/// The bytes of a filesystem that may be written above one part in `divisor` of its reserve.
pub(super) fn slack_bytes(space: &Space, divisor: u64) -> u64 {
    let bytes = |blocks: u64| blocks.saturating_mul(space.block_bytes);
    let size = bytes(space.blocks);
    let reserve = match size < SMALL_FILESYSTEM_BYTES {
        true => size / SMALL_RESERVE_DIVISOR,
        false => RESERVE_BYTES,
    };
    bytes(space.available).saturating_sub(reserve / divisor)
}

/// How many files may be made above the reserve; no end of them where inodes are not counted.
pub(super) fn slack_files(space: &Space) -> u64 {
    let share = space.files / RESERVE_FILES_DIVISOR;
    let reserve = share
        .clamp(*RESERVE_FILES.start(), *RESERVE_FILES.end())
        .min(space.files / RESERVE_FILES_DIVISOR_MIN);
    if space.files == 0 { u64::MAX } else { space.files_free.saturating_sub(reserve) }
}

/// The same space counted in blocks of `block_bytes`, rounded down.
pub(super) fn in_blocks_of(space: &Space, block_bytes: u64) -> Space {
    let scale = |blocks: u64| {
        let bytes = u128::from(blocks) * u128::from(space.block_bytes);
        u64::try_from(bytes / u128::from(block_bytes)).unwrap_or(u64::MAX)
    };
    Space {
        block_bytes,
        blocks: scale(space.blocks),
        free: scale(space.free),
        available: scale(space.available),
        ..*space
    }
}

//! How far a resync is, and its pace: whoever uses the mount goes first.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::progress::ProgressSink;

/// After so much work the resync looks whether somebody else wants the disks.
const PIECE_BYTES: u64 = 1 << 20;
/// Likewise, in objects.
const PIECE_ITEMS: u64 = 32;
/// The longest that it steps aside at a time.
const ASIDE_MAX: Duration = Duration::from_millis(50);
/// What looking at an object counts for in the estimate of the time left, in bytes.
const ITEM_BYTES: u64 = 16 << 10;
/// Before this nothing is estimated.
const ESTIMATE_AFTER: Duration = Duration::from_secs(2);

/// How far a resync is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Objects that were compared.
    pub items: u64,
    /// All there are, about.
    pub items_total: u64,
    /// Bytes that were compared or copied.
    pub bytes: u64,
    /// All there are, about.
    pub bytes_total: u64,
    /// Bytes that were copied.
    pub copied: u64,
}

impl Extent {
    /// Hundredths that are done; never all of them, for the end is told otherwise.
    pub fn percent(&self) -> u64 {
        let done = self.bytes + self.items * ITEM_BYTES;
        let total = self.bytes_total + self.items_total * ITEM_BYTES;
        (done.saturating_mul(100) / total.max(1)).min(99)
    }

    /// How long the rest will take after `elapsed`, if that can be told yet.
    pub fn left(&self, elapsed: Duration) -> Option<Duration> {
        let done = self.bytes + self.items * ITEM_BYTES;
        let total = (self.bytes_total + self.items_total * ITEM_BYTES).max(done);
        if elapsed < ESTIMATE_AFTER || done == 0 {
            return None;
        }
        Some(elapsed.mul_f64((total - done) as f64 / done as f64))
    }
}

/// Counts, and steps aside.
pub(super) struct Gauge {
    pub begun: Instant,
    items: AtomicU64,
    bytes: AtomicU64,
    pub copied: AtomicU64,
    total: Mutex<(u64, u64)>,
    /// Counts what is asked of the mount.
    activity: Arc<AtomicU64>,
    /// Operations wait for us.
    pub hurry: AtomicBool,
    piece: Mutex<Piece>,
}

struct Piece {
    items: u64,
    bytes: u64,
    begun: Instant,
    activity: u64,
}

impl Gauge {
    pub fn new(activity: Arc<AtomicU64>) -> Gauge {
        let seen = activity.load(Ordering::Relaxed);
        Gauge {
            begun: Instant::now(),
            items: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            copied: AtomicU64::new(0),
            total: Mutex::new((0, 0)),
            activity,
            hurry: AtomicBool::new(false),
            piece: Mutex::new(Piece { items: 0, bytes: 0, begun: Instant::now(), activity: seen }),
        }
    }

    pub fn extent(&self) -> Extent {
        let (items_total, bytes_total) = *self.total.lock();
        Extent {
            items: self.items.load(Ordering::Relaxed),
            items_total,
            bytes: self.bytes.load(Ordering::Relaxed),
            bytes_total,
            copied: self.copied.load(Ordering::Relaxed),
        }
    }

    fn step_aside(&self, items: u64, bytes: u64) {
        let aside = {
            let mut piece = self.piece.lock();
            piece.items += items;
            piece.bytes += bytes;
            if piece.items < PIECE_ITEMS && piece.bytes < PIECE_BYTES {
                return;
            }
            let activity = self.activity.load(Ordering::Relaxed);
            let busy = activity != piece.activity;
            let took = piece.begun.elapsed();
            *piece = Piece { items: 0, bytes: 0, begun: Instant::now(), activity };
            busy.then_some(took.min(ASIDE_MAX))
        };
        if let Some(aside) = aside
            && !self.hurry.load(Ordering::Relaxed)
        {
            std::thread::sleep(aside);
            self.piece.lock().begun = Instant::now();
        }
    }
}

impl ProgressSink for Gauge {
    fn begin(&self, _phase: &str, items: u64, bytes: u64) {
        *self.total.lock() = (items, bytes);
    }

    fn advance(&self, items: u64, bytes: u64) {
        self.items.fetch_add(items, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.step_aside(items, bytes);
    }

    fn end(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_from_what_is_done() {
        let extent = Extent { bytes: 1 << 30, bytes_total: 4 << 30, ..Extent::default() };
        assert_eq!(extent.percent(), 25);
        assert_eq!(extent.left(Duration::from_secs(10)), Some(Duration::from_secs(30)));
        assert_eq!(extent.left(Duration::from_millis(10)), None);
        let over = Extent { bytes: 5 << 30, bytes_total: 4 << 30, ..Extent::default() };
        assert_eq!((over.percent(), over.left(Duration::from_secs(9))), (99, Some(Duration::ZERO)));
    }
}

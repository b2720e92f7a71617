//! How a resync comes to its end though the mount is changed all the time.
//!
//! A round copies what was changed during the one before. As long as copying is faster than
//! changing, each round is shorter than the last. On a machine that has no time left for an idle
//! thread, or on a disk that is slower than the others, it is not, and the rounds would go on for
//! ever. Then whoever changes something is made to wait a moment, longer and longer, until the
//! rounds do get shorter.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A round that took no longer leaves little enough for the last one.
pub(super) const CAUGHT_UP: Duration = Duration::from_millis(30);
/// The first wait of a change where rounds get shorter, but not fast enough.
const WAIT_MIN: Duration = Duration::from_millis(2);
/// The first wait where they get longer.
const WAIT_MUCH: Duration = Duration::from_millis(10);
/// The longest wait of a change: together with a last round it is still hardly seen.
const WAIT_MAX: Duration = Duration::from_millis(40);
/// A round that took a longer part of the last one's time than this gets nowhere.
const SHORTER: f64 = 0.6;

/// How long every change waits before it begins, in microseconds.
#[derive(Default)]
pub(in crate::volume) struct Brake(AtomicU64);

impl Brake {
    /// To be called by whoever is about to change something, with no lock held.
    pub fn wait(&self) {
        let micros = self.0.load(Ordering::Relaxed);
        if micros > 0 {
            std::thread::sleep(Duration::from_micros(micros));
        }
    }

    /// Whether changes wait.
    pub fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// Nobody waits any more, until the next round of a resync that goes on.
    pub fn release(&self) {
        self.set(Duration::ZERO);
    }

    pub(in crate::volume) fn set(&self, wait: Duration) {
        self.0.store(wait.as_micros() as u64, Ordering::Relaxed);
    }
}

/// Watches whether the rounds of one resync get shorter. The brake is off when it is dropped.
pub(super) struct Pace<'a> {
    brake: &'a Brake,
    wait: Duration,
    last: Option<Duration>,
}

impl Drop for Pace<'_> {
    fn drop(&mut self) {
        self.brake.set(Duration::ZERO);
    }
}

impl<'a> Pace<'a> {
    pub fn new(brake: &'a Brake) -> Pace<'a> {
        Pace { brake, wait: Duration::ZERO, last: None }
    }

    /// What comes is no round like those before: nobody is slowed down for it.
    pub fn anew(&mut self) {
        (self.wait, self.last) = (Duration::ZERO, None);
        self.brake.set(self.wait);
    }

    /// A round took so long. Whether it was short enough for the last one to follow.
    pub fn round_took(&mut self, took: Duration) -> bool {
        let last = self.last.replace(took);
        if took <= CAUGHT_UP {
            return true;
        }
        match last {
            Some(last) if took > last => self.brake_by(self.wait * 4, WAIT_MUCH),
            Some(last) if took > last.mul_f64(SHORTER) => self.press(),
            _ => {}
        }
        false
    }

    /// Whether changes are slowed down.
    pub fn is_braking(&self) -> bool {
        !self.wait.is_zero()
    }

    /// Slows changes down, or more than before.
    pub fn press(&mut self) {
        self.brake_by(self.wait * 2, WAIT_MIN);
    }

    fn brake_by(&mut self, wait: Duration, least: Duration) {
        self.wait = wait.clamp(least, WAIT_MAX);
        self.brake.set(self.wait);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rounds of a resync beside three programs whose every change, of 3 ms, costs `cost` of
    /// copying; `None` if they do not end.
    fn rounds(cost: Duration) -> Option<usize> {
        let brake = Brake::default();
        let mut pace = Pace::new(&brake);
        let mut took = Duration::from_secs(10);
        for round in 0..40 {
            if pace.round_took(took) {
                return Some(round);
            }
            let each = Duration::from_millis(3) + pace.wait;
            took = cost.mul_f64(3.0 * took.as_secs_f64() / each.as_secs_f64());
        }
        None
    }

    #[test]
    fn rounds_get_shorter_though_changing_is_faster_than_copying() {
        assert_eq!(rounds(Duration::from_micros(10)), Some(2), "copying is much faster");
        for millis in 1..=8 {
            assert!(rounds(Duration::from_millis(millis)).is_some(), "{millis} ms a change");
        }
    }

    #[test]
    fn nobody_waits_once_it_is_over() {
        let brake = Brake::default();
        let mut pace = Pace::new(&brake);
        assert!(!pace.round_took(Duration::from_secs(1)) && !pace.is_braking());
        assert!(!pace.round_took(Duration::from_secs(1)) && pace.is_braking());
        assert_eq!(brake.0.load(Ordering::Relaxed), WAIT_MIN.as_micros() as u64);
        drop(pace);
        assert_eq!(brake.0.load(Ordering::Relaxed), 0);
    }
}

//! A flag that one thread waits for: awake for a moment, then asleep.
//!
//! Waking a processor that went idle takes as long as most calls on a backing do (some 40 µs in a
//! virtual machine), and an untar waited for it twelve times with each small file. What is waited
//! for mostly comes sooner than that.

use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long the waiting thread looks before it sleeps: about two requests of a program that makes
/// one after another.
const AWAKE: Duration = Duration::from_micros(100);
/// How often it looks before it looks at the clock as well.
const LOOKS: u32 = 32;

const UNSET: u8 = 0;
/// Not set, and the thread that waits for it sleeps, or is about to.
const ASLEEP: u8 = 1;
const SET: u8 = 2;

/// See above.
#[derive(Default)]
pub(super) struct Flag(AtomicU8);

impl Flag {
    /// Sets it, and wakes `waiting`, the one thread that may wait for it, if that sleeps.
    pub fn set(&self, waiting: &Thread) {
        if self.0.swap(SET, Ordering::AcqRel) == ASLEEP {
            waiting.unpark();
        }
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire) == SET
    }

    /// Takes it back; the waiting thread's to call.
    pub fn clear(&self) {
        self.0.store(UNSET, Ordering::Release);
    }

    /// Waits until it is set, or for so long; whether it is.
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        let begun = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if self.is_set() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if begun.elapsed() >= AWAKE {
                break;
            }
            // Where every processor has work, this is theirs.
            std::thread::yield_now();
        }
        let sleeps =
            self.0.compare_exchange(UNSET, ASLEEP, Ordering::AcqRel, Ordering::Acquire).is_ok();
        while sleeps && !self.is_set() {
            match timeout.map(|timeout| timeout.checked_sub(begun.elapsed())) {
                None => std::thread::park(),
                Some(Some(left)) => std::thread::park_timeout(left),
                Some(None) => {
                    let _ =
                        self.0.compare_exchange(ASLEEP, UNSET, Ordering::AcqRel, Ordering::Acquire);
                    return self.is_set();
                }
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_wait_ends_when_it_is_set_or_with_the_time() {
        let flag = Arc::new(Flag::default());
        assert!(!flag.wait(Some(Duration::from_millis(1))));
        let (own, waiting) = (flag.clone(), std::thread::current());
        let setter = std::thread::spawn(move || {
            // Most likely it sleeps by then; if not, that must work as well.
            std::thread::park_timeout(AWAKE * 20);
            own.set(&waiting);
        });
        assert!(flag.wait(None));
        setter.join().unwrap();
        assert!(flag.is_set() && flag.wait(Some(Duration::ZERO)));
        flag.clear();
        assert!(!flag.wait(Some(Duration::ZERO)));
    }

    #[test]
    fn no_signal_is_lost_between_two_threads_in_a_hurry() {
        let flags = Arc::new([Flag::default(), Flag::default()]);
        let (own, first) = (flags.clone(), std::thread::current());
        let second = std::thread::spawn(move || {
            for _ in 0..10_000 {
                assert!(own[1].wait(None));
                own[1].clear();
                own[0].set(&first);
            }
        });
        for _ in 0..10_000 {
            flags[1].set(second.thread());
            assert!(flags[0].wait(None));
            flags[0].clear();
        }
        second.join().unwrap();
    }
}

//! Which threads look at what they list.
//!
//! The kernel begins every listing with a request for the entries and all their attributes, whoever
//! lists. `ls -l` and backups want those, and would have to ask for each by itself; `find` by name,
//! a shell that completes a word and what searches in files do not, and each attribute that nobody
//! had in memory is a place on a disk to be read. So a thread that is not known gets no attributes
//! with its first listing, and is known once it looks up a file in it. The kernel asks for the rest
//! of a listing as it was used so far, so that even the first one of a long directory gets them.

use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;

use super::{Filesystem, Found};
use crate::types::Kind;

/// Threads that are remembered.
const THREADS: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// Entries that a thread which is not known gets with the first part of its first listing: if it
/// looks at them it has asked for few of them by itself.
const TRIAL_LINES: usize = 32;

/// What is known of threads.
pub(super) struct Habits {
    threads: Mutex<LruCache<u32, Habit>>,
}

struct Habit {
    /// The directory whose listing it began last.
    dir: u64,
    manner: Manner,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    /// It has begun one listing.
    Unknown,
    /// It has begun others, and looked at nothing in those before.
    Passes,
    /// It has looked at a file that it had listed.
    Looks,
}

impl Habits {
    pub(super) fn new() -> Habits {
        Habits { threads: Mutex::new(LruCache::new(THREADS)) }
    }

    /// A thread begins to list a directory. Whether it is likely to look at what is in it.
    fn begin(&self, thread: u32, dir: u64) -> bool {
        let mut threads = self.threads.lock();
        let Some(habit) = threads.get_mut(&thread) else {
            threads.put(thread, Habit { dir, manner: Manner::Unknown });
            return false;
        };
        if habit.manner == Manner::Unknown && habit.dir != dir {
            habit.manner = Manner::Passes;
        }
        habit.dir = dir;
        habit.manner == Manner::Looks
    }

    /// A thread looked up a file in a directory.
    fn look(&self, thread: u32, dir: u64) {
        let mut threads = self.threads.lock();
        if let Some(habit) = threads.get_mut(&thread).filter(|habit| habit.dir == dir) {
            habit.manner = Manner::Looks;
        }
    }

    fn is_known(&self, thread: u32) -> bool {
        let threads = self.threads.lock();
        threads.peek(&thread).is_none_or(|habit| habit.manner != Manner::Unknown)
    }
}

impl Filesystem {
    /// Whether the thread that begins to list a directory is to be told the attributes of what is
    /// in it as well. One that has no number in our eyes is.
    pub fn is_to_have_attributes(&self, thread: u32, dir: u64) -> bool {
        thread == 0 || self.habits.begin(thread, dir)
    }

    /// A thread looked up a name by itself. To descend into a directory is not to look at it: who
    /// lists it next needs nothing else of it.
    pub fn looked_up(&self, thread: u32, dir: u64, found: &Found) {
        if found.stat.kind != Kind::Dir {
            self.habits.look(thread, dir);
        }
    }

    /// How many lines without attributes the next part of a listing may have, from `offset` on.
    pub fn lines_max(&self, thread: u32, offset: usize) -> usize {
        let is_trial = offset < TRIAL_LINES && !self.habits.is_known(thread);
        if is_trial { TRIAL_LINES } else { usize::MAX }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: u64 = 10;
    const TWO: u64 = 11;

    #[test]
    fn who_looks_at_a_listed_file_gets_attributes_from_then_on() {
        let habits = Habits::new();
        assert!(!habits.begin(7, ONE) && !habits.is_known(7));
        habits.look(7, TWO);
        assert!(!habits.is_known(7), "that one it did not list");
        habits.look(7, ONE);
        assert!(habits.is_known(7) && habits.begin(7, TWO) && habits.begin(7, ONE));
        assert!(!habits.begin(8, ONE), "another thread");
    }

    #[test]
    fn who_lists_on_and_on_is_known_too_and_may_look_later() {
        let habits = Habits::new();
        habits.begin(7, ONE);
        assert!(!habits.begin(7, ONE) && !habits.is_known(7), "rewound");
        assert!(!habits.begin(7, TWO) && habits.is_known(7));
        habits.look(7, TWO);
        assert!(habits.begin(7, ONE));
    }

    #[test]
    fn old_threads_are_forgotten() {
        let habits = Habits::new();
        (0..2 * THREADS.get() as u32).for_each(|thread| _ = habits.begin(thread, ONE));
        assert_eq!(habits.threads.lock().len(), THREADS.get());
        habits.look(0, ONE);
        assert!(!habits.begin(0, TWO));
    }
}

//! Which threads look at what they list.
//!
//! The kernel begins every listing with a request for the entries and all their attributes, whoever
//! lists. `ls -l` and backups want those, and would have to ask for each by itself; `find` by name
//! and a shell that completes a word do not, and each attribute that nobody had in memory is a
//! place on a disk to be read. So a thread that is not known gets names alone with its first
//! listing. It is known once somebody looks up files that it was told of so, in two directories:
//! programs list in one thread and look in others, and `git` lists its packs to open one before it
//! walks through a tree that it has looked at. The kernel asks for the rest of a listing as it was
//! used so far, so that even the first one of a long directory goes on with attributes.
//!
//! What the kernel keeps of a listing has no attributes where whoever it was made for had no use
//! for them. For a thread that has, such a listing is made anew.

use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;

use super::{Fh, Filesystem, Found, Opened};
use crate::error::Result;
use crate::types::Kind;

/// Threads that are remembered.
const THREADS: NonZeroUsize = NonZeroUsize::new(1024).expect("more than 0");
/// Directories of which names alone were told that are remembered.
const BARE_DIRS: NonZeroUsize = NonZeroUsize::new(16 << 10).expect("more than 0");
/// Entries that a thread which is not known gets with the first part of its first listing: if it
/// looks at them it has asked for few of them by itself.
const TRIAL_LINES: usize = 32;

/// What a thread does with what it lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// It lists for the first time, or for the first time after one listing of it was of use.
    Unknown,
    /// Nobody looked at what it had listed.
    Passes,
    /// Somebody looked up files of which it had been told the names.
    Looks,
}

/// What is remembered of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Habit {
    /// Nobody looked at what it listed.
    None,
    /// Somebody did in this directory, and it has listed no other since.
    Looked(u64),
    /// It has.
    LookedOnce(u64),
    /// And in another.
    Looks,
}

/// What is known of threads.
pub(super) struct Habits {
    known: Mutex<Known>,
}

struct Known {
    threads: LruCache<u32, Habit>,
    /// Directories of which the names alone were told when they were listed last.
    bare: LruCache<u64, Bare>,
}

struct Bare {
    /// The thread for which the last listing of them is.
    thread: u32,
    /// The names were told to the end, so that the kernel has a whole listing.
    whole: bool,
}

impl Habits {
    pub(super) fn new() -> Habits {
        let known = Known { threads: LruCache::new(THREADS), bare: LruCache::new(BARE_DIRS) };
        Habits { known: Mutex::new(known) }
    }

    /// A thread is about to list a directory. One that has no number in our eyes looks.
    pub(super) fn open(&self, thread: u32, dir: u64) -> Manner {
        if thread == 0 {
            return Manner::Looks;
        }
        let Known { threads, bare } = &mut *self.known.lock();
        let manner = match threads.get(&thread) {
            None => Manner::Unknown,
            Some(Habit::Looked(_)) => Manner::Unknown,
            Some(Habit::None | Habit::LookedOnce(_)) => Manner::Passes,
            Some(Habit::Looks) => return Manner::Looks,
        };
        let habit = threads.get_or_insert_mut(thread, || Habit::None);
        if let Habit::Looked(before) = *habit {
            *habit = Habit::LookedOnce(before);
        }
        // It may get what the kernel has of it, and then nobody asks us.
        if let Some(listed) = bare.get_mut(&dir) {
            listed.thread = thread;
        }
        manner
    }

    /// A listing begins for a thread, with the names alone or with all.
    fn begin(&self, thread: u32, dir: u64, with_attributes: bool) {
        let bare = &mut self.known.lock().bare;
        match with_attributes {
            true => _ = bare.pop(&dir),
            false => _ = bare.put(dir, Bare { thread, whole: false }),
        }
    }

    /// A listing has ended.
    fn end(&self, dir: u64) {
        if let Some(listed) = self.known.lock().bare.get_mut(&dir) {
            listed.whole = true;
        }
    }

    /// Whether the kernel has a whole listing of a directory, without attributes. One that was not
    /// told to its end it begins anew by itself.
    fn is_bare(&self, dir: u64) -> bool {
        self.known.lock().bare.peek(&dir).is_some_and(|listed| listed.whole)
    }

    /// Somebody looked up a file in a directory.
    fn look(&self, dir: u64) {
        let Known { threads, bare } = &mut *self.known.lock();
        let lister = bare.peek(&dir).map(|listed| listed.thread);
        if let Some(habit) = lister.and_then(|thread| threads.get_mut(&thread)) {
            *habit = match *habit {
                Habit::None => Habit::Looked(dir),
                Habit::Looked(before) | Habit::LookedOnce(before) if before == dir => *habit,
                Habit::Looked(_) | Habit::LookedOnce(_) | Habit::Looks => Habit::Looks,
            };
        }
    }
}

impl Filesystem {
    /// Whether the kernel has the names alone of an open directory, for a thread that wants more:
    /// then it is to ask anew.
    pub fn is_listed_anew(&self, ino: u64, fh: Fh) -> bool {
        let opened = self.opened(fh);
        let looks = matches!(opened.as_deref(), Ok(Opened::Dir { manner: Manner::Looks, .. }));
        looks && self.habits.is_bare(ino)
    }

    /// Begins a listing with `.` and `..`. Whether it is to go on with attributes.
    pub fn begins_with_attributes(&self, ino: u64, fh: Fh) -> Result<bool> {
        let Opened::Dir { thread, manner, .. } = &*self.opened(fh)? else { return Ok(true) };
        let looks = *manner == Manner::Looks;
        self.habits.begin(*thread, ino, looks);
        Ok(looks)
    }

    /// Somebody looked up a name by itself. To descend into a directory is not to look at it: who
    /// lists it next needs nothing else of it.
    pub fn looked_up(&self, dir: u64, found: &Found) {
        if found.stat.kind != Kind::Dir {
            self.habits.look(dir);
        }
    }

    /// The last line of a listing was told.
    pub fn listing_ended(&self, ino: u64) {
        self.habits.end(ino);
    }

    /// How many lines without attributes the next part of a listing may have, from `offset` on.
    pub fn lines_max(&self, fh: Fh, offset: usize) -> usize {
        let opened = self.opened(fh);
        let is_new = matches!(opened.as_deref(), Ok(Opened::Dir { manner: Manner::Unknown, .. }));
        if is_new && offset < TRIAL_LINES { TRIAL_LINES } else { usize::MAX }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: u64 = 10;
    const TWO: u64 = 11;

    #[test]
    fn whose_listed_files_are_looked_up_gets_attributes_from_then_on() {
        let habits = Habits::new();
        assert_eq!(habits.open(7, ONE), Manner::Unknown);
        habits.begin(7, ONE, false);
        habits.look(TWO);
        assert_eq!(habits.open(7, TWO), Manner::Passes, "that one it did not list");
        habits.look(ONE);
        habits.look(ONE);
        assert_eq!(habits.open(7, TWO), Manner::Unknown, "it may have been that one alone");
        habits.begin(7, TWO, false);
        habits.look(TWO);
        assert_eq!(habits.open(7, ONE), Manner::Looks);
        assert_eq!(habits.open(8, TWO), Manner::Unknown, "another thread");
        assert_eq!(habits.open(0, TWO), Manner::Looks, "no thread of ours");
    }

    #[test]
    fn who_looks_at_what_the_kernel_has_listed_for_another_is_known_as_well() {
        let habits = Habits::new();
        habits.open(7, ONE);
        habits.begin(7, ONE, false);
        habits.end(ONE);
        assert_eq!(habits.open(8, ONE), Manner::Unknown);
        habits.look(ONE);
        assert_eq!((habits.open(8, TWO), habits.open(7, TWO)), (Manner::Unknown, Manner::Passes));
    }

    #[test]
    fn a_listing_with_attributes_takes_the_place_of_a_whole_one_without() {
        let habits = Habits::new();
        habits.open(7, ONE);
        habits.begin(7, ONE, false);
        assert!(!habits.is_bare(ONE), "it goes on");
        habits.end(ONE);
        assert!(habits.is_bare(ONE) && !habits.is_bare(TWO));
        habits.begin(8, ONE, true);
        assert!(!habits.is_bare(ONE));
        habits.look(ONE);
        assert_eq!(habits.open(7, ONE), Manner::Passes, "that was not its listing");
    }

    #[test]
    fn old_threads_and_directories_are_forgotten() {
        let habits = Habits::new();
        for number in 1..=u32::try_from(2 * BARE_DIRS.get()).unwrap() {
            habits.open(number, number.into());
            habits.begin(number, number.into(), false);
        }
        let known = habits.known.lock();
        assert_eq!((known.threads.len(), known.bare.len()), (THREADS.get(), BARE_DIRS.get()));
        assert!(!known.bare.contains(&1) && !known.threads.contains(&1));
    }
}

//! Which processors a thread runs on. A new thread runs where its maker does.

use std::sync::OnceLock;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where the process may run, noted before any thread stays somewhere.
static ANYWHERE: OnceLock<Option<CpuSet>> = OnceLock::new();

/// Keeps this thread on one processor, if it may run there.
pub fn stay_on(processor: usize) {
    ANYWHERE.get_or_init(|| sched_getaffinity(None).ok());
    let mut one = CpuSet::new();
    if processor < CpuSet::MAX_CPU {
        one.set(processor);
        let _ = sched_setaffinity(None, &one);
    }
}

/// Lets this thread run wherever the process may: for one that does work of its own, and may have
/// been made by a thread that stays somewhere.
pub fn go_anywhere() {
    if let Some(Some(anywhere)) = ANYWHERE.get() {
        let _ = sched_setaffinity(None, anywhere);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_thread_that_stays_somewhere_makes_can_go_anywhere() {
        let anywhere = sched_getaffinity(None).unwrap();
        let one = (0..CpuSet::MAX_CPU).find(|&cpu| anywhere.is_set(cpu)).unwrap();
        let stays = std::thread::spawn(move || {
            stay_on(one);
            let here = sched_getaffinity(None).unwrap();
            let made = std::thread::spawn(|| {
                let before = sched_getaffinity(None).unwrap();
                go_anywhere();
                (before, sched_getaffinity(None).unwrap())
            });
            (here, made.join().unwrap())
        });
        let (here, (before, after)) = stays.join().unwrap();
        assert!(here.count() == 1 && here.is_set(one));
        assert!(before == here && after == anywhere);
    }
}

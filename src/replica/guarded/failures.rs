//! The calls that failed by a backing's fault, with the paths they were on, for people.

use std::collections::VecDeque;
use std::io;

use parking_lot::Mutex;
use rustix::io::Errno;

use crate::replica::backing::{Backing, Handle};
use crate::replica::health::{Fault, Meaning, errno_of, meaning};
use crate::types::EntryName;

/// So many are remembered, the newest ones, one for each path.
const FAILURES_MAX: usize = 64;

/// What failed on one backing.
#[derive(Default)]
pub(super) struct Failures(Mutex<VecDeque<Fault>>);

impl Failures {
    /// Notes a failed call, if it says something of the backing. Looking the path up touches no
    /// device: the kernel has the names of what is open in memory.
    pub(super) fn note(
        &self,
        backing: &dyn Backing,
        op: &'static str,
        (subject, name): (Option<&Handle>, Option<&EntryName>),
        error: &io::Error,
    ) {
        let errno = errno_of(error);
        let is_full = matches!(errno, Errno::NOSPC | Errno::DQUOT);
        if meaning(errno) != Meaning::Device && !is_full {
            return;
        }
        let path = subject.and_then(|subject| backing.path_of(subject));
        let path = match name {
            Some(name) => path.map(|path| path.join(name)),
            None => path,
        };
        let fault = Fault { path, ..Fault::new(op, errno) };
        let mut failures = self.0.lock();
        failures.retain(|other| other.path != fault.path);
        if failures.len() >= FAILURES_MAX {
            failures.pop_front();
        }
        failures.push_back(fault);
    }

    pub(super) fn all(&self) -> Vec<Fault> {
        self.0.lock().iter().cloned().collect()
    }

    pub(super) fn last(&self) -> Option<Fault> {
        self.0.lock().back().cloned()
    }
}

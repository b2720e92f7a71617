//! How the answers of several replicas become one: the rule at the top of [`crate::replica`].

use std::io;

use rustix::io::Errno;

use super::health::{Meaning, errno_of, meaning};
use crate::error::Result;
use crate::types::{ReplicaId, ReplicaMap};

/// How the failure of a replica is judged.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Nature {
    /// The backing has changed: whoever did not follow is out.
    Change,
    /// Nothing has changed: a shortage of ours is the answer and nobody's fault.
    Open,
    /// What was changed before is made durable. Whoever cannot is out, whatever its error: what
    /// it was told before may be lost, so that even `ENOSPC` is no mere answer.
    Sync,
}

/// What is known so far of one operation.
pub(super) struct Verdict<T> {
    nature: Nature,
    pub(super) answers: ReplicaMap<Option<T>>,
    succeeded: bool,
    failed: Vec<(ReplicaId, Errno)>,
}

impl<T> Verdict<T> {
    pub(super) fn new(nature: Nature) -> Verdict<T> {
        let answers = ReplicaMap::for_all(|_| None);
        Verdict { nature, answers, succeeded: false, failed: Vec::new() }
    }

    /// Takes the result of one replica, in order of preference. An error is the answer.
    pub(super) fn take(&mut self, id: ReplicaId, result: io::Result<T>) -> Result<()> {
        let errno = match result {
            Ok(answer) => {
                self.answers[id] = Some(answer);
                self.succeeded = true;
                return Ok(());
            }
            Err(error) => errno_of(&error),
        };
        match (meaning(errno), self.nature) {
            (Meaning::Shortage, Nature::Open) => Err(errno.into()),
            (Meaning::Answer | Meaning::Shortage, Nature::Change | Nature::Open)
                if !self.succeeded =>
            {
                Err(errno.into())
            }
            _ => {
                self.failed.push((id, errno));
                Ok(())
            }
        }
    }

    /// Who has to go; or the answer, if it succeeded nowhere.
    pub(super) fn failed(&self) -> Result<&[(ReplicaId, Errno)]> {
        if self.succeeded {
            return Ok(&self.failed);
        }
        // A sync that every replica refuses alike, as of a full disk, is told as it is.
        let alike = self.nature == Nature::Sync
            && self.failed.iter().all(|(_, errno)| meaning(*errno) == Meaning::Answer);
        let first = self.failed.first().filter(|_| alike);
        Err(first.map_or(Errno::IO, |(_, errno)| *errno).into())
    }
}

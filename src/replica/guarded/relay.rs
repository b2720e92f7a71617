//! One operation on several replicas, done by one worker, replica by replica.
//!
//! If it hangs on one of them, that one has failed, and the operation goes on with the next ones on
//! another worker. So handing over costs once what it would cost for each call on each replica.

use std::io;
use std::sync::Arc;
use std::thread::Thread;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::flag::Flag;
use super::workers::Shared;
use crate::error::{Error, Result};
use crate::replica::Replica;
use crate::replica::backing::Backing;
use crate::replica::handles::DirCache;
use crate::replica::health::is_out_of_files;
use crate::replica::verdict::Verdict;
use crate::types::ReplicaId;

/// Does `run` on all `replicas` in their order, and returns what is known of it then; or the answer
/// that ended it.
pub(in crate::replica) fn relay<T: Send + 'static>(
    op: &'static str,
    mut replicas: &[(ReplicaId, Arc<Replica>)],
    mut verdict: Verdict<T>,
    dirs: &Arc<DirCache>,
    run: impl Fn(ReplicaId, &dyn Backing) -> io::Result<T> + Send + Sync + 'static,
) -> Result<Verdict<T>> {
    let run = Arc::new(run);
    while let Some((_, first)) = replicas.first() {
        let leg = Arc::new(Leg::new(verdict));
        let places: Vec<_> = replicas
            .iter()
            .map(|(id, replica)| (*id, replica.backing.workers.shared().clone()))
            .collect();
        let (own, run, dirs) = (leg.clone(), run.clone(), dirs.clone());
        let job = Box::new(move |done: &dyn Fn()| {
            own.work(&*run, &places, &dirs, done);
            places.iter().for_each(|(_, shared)| shared.close_left());
        });
        first.backing.workers.give(job).map_err(Error::from_io)?;
        let dealt = leg.wait(first.backing.timeout(), replicas);
        let mut stage = leg.stage.lock();
        if let Some(answer) = stage.answer.take() {
            return Err(answer);
        }
        verdict = stage.left.take().or_else(|| stage.verdict.take()).expect("in one of them");
        if let Some((id, hung)) = replicas.get(dealt) {
            let error = io::Error::from(Errno::TIMEDOUT);
            hung.backing.workers.inner().note(op, (None, None), &error);
            verdict.take(*id, Err(error))?;
        }
        replicas = replicas.get(dealt + 1..).unwrap_or_default();
    }
    Ok(verdict)
}

/// One worker's part of it: the replicas from one on.
struct Leg<T> {
    caller: Thread,
    stage: Mutex<Stage<T>>,
    done: Flag,
}

struct Stage<T> {
    /// Taken away when the caller gives up.
    verdict: Option<Verdict<T>>,
    /// What was known when the caller gave up.
    left: Option<Verdict<T>>,
    /// The answer that ended it early.
    answer: Option<Error>,
    /// How many replicas of this leg have been dealt with.
    dealt: usize,
}

impl<T> Leg<T> {
    fn new(verdict: Verdict<T>) -> Leg<T> {
        let stage = Stage { verdict: Some(verdict), left: None, answer: None, dealt: 0 };
        Leg { caller: std::thread::current(), stage: Mutex::new(stage), done: Flag::default() }
    }

    /// The worker's side.
    fn work(
        &self,
        run: &(impl Fn(ReplicaId, &dyn Backing) -> io::Result<T> + ?Sized),
        places: &[(ReplicaId, Arc<Shared>)],
        dirs: &DirCache,
        done: &dyn Fn(),
    ) {
        for (id, shared) in places {
            let mut result = match shared.overdue_count() {
                0 => shared.run(|inner| run(*id, inner)),
                _ => Err(Errno::TIMEDOUT.into()),
            };
            if result.as_ref().is_err_and(is_out_of_files) {
                dirs.shrink();
                shared.close_left();
                result = shared.run(|inner| run(*id, inner));
            }
            let mut stage = self.stage.lock();
            let Some(verdict) = stage.verdict.as_mut() else {
                drop(stage);
                shared.returned();
                return done();
            };
            let answer = verdict.take(*id, result).err();
            stage.dealt += 1;
            if answer.is_some() {
                stage.answer = answer;
                break;
            }
        }
        done();
        self.done.set(&self.caller);
    }

    /// The caller's side: returns how many replicas were dealt with when it was done, or hung for
    /// so long on one.
    fn wait(&self, timeout: Duration, replicas: &[(ReplicaId, Arc<Replica>)]) -> usize {
        let mut seen = 0;
        loop {
            let is_done = self.done.wait(Some(timeout));
            let mut stage = self.stage.lock();
            if is_done || stage.answer.is_some() || stage.dealt == replicas.len() {
                return replicas.len();
            }
            if stage.dealt == seen {
                stage.left = stage.verdict.take();
                replicas[seen].1.backing.workers.shared().gave_up();
                return seen;
            }
            seen = stage.dealt;
        }
    }
}

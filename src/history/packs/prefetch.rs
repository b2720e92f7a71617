//! The thread that decodes frames before they are asked for.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};

use super::cache::Claim;
use crate::catalog::ChunkRow;
use crate::history::pack::Frame;

/// Frames that may wait for the thread; more are not taken.
const WAITING_MAX: usize = 8;

struct Job {
    claim: Claim,
    bytes: Vec<u8>,
    row: ChunkRow,
}

/// The thread `rv-prefetch`; it ends when this is dropped.
pub struct Prefetcher {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Prefetcher {
    /// Starts the thread. If there can be none, nothing is decoded ahead.
    pub fn new() -> Prefetcher {
        let (jobs, waiting) = crossbeam_channel::bounded(WAITING_MAX);
        let thread = std::thread::Builder::new().name("rv-prefetch".into());
        match thread.spawn(move || run(&waiting)) {
            Ok(thread) => Prefetcher { jobs: Some(jobs), thread: Some(thread) },
            Err(error) => {
                log::warn!("no thread for reading packs ahead: {error}");
                Prefetcher { jobs: None, thread: None }
            }
        }
    }

    /// Has a frame decoded, in which the chunk `row` must be. Given up if the thread is busy.
    pub fn decode(&self, claim: Claim, bytes: Vec<u8>, row: ChunkRow) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.try_send(Job { claim, bytes, row });
        }
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(waiting: &Receiver<Job>) {
    for job in waiting {
        // A bad frame is left to the read that needs it, which asks another replica.
        if let Ok(frame) = Frame::decode(&job.bytes)
            && frame.chunk(&job.row).is_ok()
        {
            job.claim.fill(&Arc::new(frame));
        }
    }
}

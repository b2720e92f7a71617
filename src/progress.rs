//! Progress of long work: the core reports, the command line draws.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Receives the reports of one piece of long work.
pub trait ProgressSink: Send + Sync {
    /// A new phase begins, with its known totals (0 = unknown).
    fn begin(&self, phase: &str, items: u64, bytes: u64);
    /// Some of the phase is done.
    fn advance(&self, items: u64, bytes: u64);
    /// The phase is over.
    fn end(&self);
}

/// A handle that long work reports to, and by which it is told to stop.
#[derive(Clone)]
pub struct Progress {
    sink: Arc<dyn ProgressSink>,
    stop: Arc<AtomicBool>,
}

struct Silent;

impl ProgressSink for Silent {
    fn begin(&self, _phase: &str, _items: u64, _bytes: u64) {}
    fn advance(&self, _items: u64, _bytes: u64) {}
    fn end(&self) {}
}

impl Progress {
    /// Reports to `sink`; the work ends with [`crate::error::Error::Interrupted`] once `stop` is
    /// set.
    pub fn new(sink: Arc<dyn ProgressSink>, stop: Arc<AtomicBool>) -> Progress {
        Progress { sink, stop }
    }

    /// Reports to nobody and is never stopped.
    pub fn silent() -> Progress {
        Progress { sink: Arc::new(Silent), stop: Arc::default() }
    }

    /// See [`ProgressSink::begin`].
    pub fn begin(&self, phase: &str, items: u64, bytes: u64) {
        self.sink.begin(phase, items, bytes);
    }

    /// See [`ProgressSink::advance`]; fails once the user asked to stop.
    pub fn advance(&self, items: u64, bytes: u64) -> crate::error::Result<()> {
        self.sink.advance(items, bytes);
        if self.stop.load(Ordering::Relaxed) {
            return Err(crate::error::Error::Interrupted);
        }
        Ok(())
    }

    /// See [`ProgressSink::end`].
    pub fn end(&self) {
        self.sink.end();
    }
}

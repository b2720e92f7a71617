//! Progress of long work on standard error: a bar on a terminal, else a line for each tenth.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use super::text;
use crate::progress::{Progress, ProgressSink};
use crate::types::printable;

/// How often work without a known total gives a sign of life.
const UNKNOWN_EVERY: Duration = Duration::from_secs(10);

/// Draws on standard error, and stops the work when `stop` is set.
pub fn on_stderr(stop: Arc<AtomicBool>) -> Progress {
    if std::io::stderr().is_terminal() {
        Progress::new(Arc::new(Bar(Mutex::new(None))), stop)
    } else {
        Progress::new(Arc::new(Lines(Mutex::new(None))), stop)
    }
}

/// As [`on_stderr`], but says nothing where nobody watches.
pub fn on_terminal(stop: Arc<AtomicBool>) -> Progress {
    if std::io::stderr().is_terminal() {
        on_stderr(stop)
    } else {
        Progress::new(Arc::new(Nobody), stop)
    }
}

struct Nobody;

impl ProgressSink for Nobody {
    fn begin(&self, _phase: &str, _items: u64, _bytes: u64) {}
    fn advance(&self, _items: u64, _bytes: u64) {}
    fn end(&self) {}
}

struct Bar(Mutex<Option<Drawn>>);

struct Drawn {
    bar: ProgressBar,
    by_bytes: bool,
}

impl ProgressSink for Bar {
    fn begin(&self, phase: &str, items: u64, bytes: u64) {
        let by_bytes = bytes > 0;
        let (total, form) = match (bytes, items) {
            (0, 0) => (None, "{msg} {spinner} {pos} [{elapsed}]"),
            (0, items) => (Some(items), "{msg} [{bar:30}] {pos}/{len} [{elapsed}, {eta} left]"),
            (bytes, _) => (
                Some(bytes),
                "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} [{elapsed}, {eta} left]",
            ),
        };
        let bar = match total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::new_spinner(),
        };
        let style = ProgressStyle::with_template(form).expect("the forms above are valid");
        bar.set_style(style);
        bar.set_message(printable(phase).into_owned());
        *self.0.lock() = Some(Drawn { bar, by_bytes });
    }

    fn advance(&self, items: u64, bytes: u64) {
        if let Some(drawn) = self.0.lock().as_ref() {
            drawn.bar.inc(if drawn.by_bytes { bytes } else { items });
        }
    }

    fn end(&self) {
        if let Some(drawn) = self.0.lock().take() {
            drawn.bar.finish();
        }
    }
}

struct Lines(Mutex<Option<Counted>>);

struct Counted {
    phase: String,
    /// When a sign of life was last given, where no total is known.
    told_at: Instant,
    by_bytes: bool,
    total: u64,
    done: u64,
    tenths_told: u64,
}

impl Counted {
    /// Adds, and gives the tenth that was reached by it.
    fn add(&mut self, items: u64, bytes: u64) -> Option<u64> {
        self.done = self.done.saturating_add(if self.by_bytes { bytes } else { items });
        let tenths = self.done.saturating_mul(10).checked_div(self.total)?.min(10);
        if tenths <= self.tenths_told {
            return None;
        }
        self.tenths_told = tenths;
        Some(tenths)
    }
}

impl ProgressSink for Lines {
    fn begin(&self, phase: &str, items: u64, bytes: u64) {
        let by_bytes = bytes > 0;
        let total = if by_bytes { bytes } else { items };
        let phase = phase.to_string();
        let told_at = Instant::now();
        let counted = Counted { phase, told_at, by_bytes, total, done: 0, tenths_told: 0 };
        *self.0.lock() = Some(counted);
    }

    fn advance(&self, items: u64, bytes: u64) {
        let mut counted = self.0.lock();
        let Some(counted) = counted.as_mut() else { return };
        if let Some(tenths) = counted.add(items, bytes) {
            text::complain(&format!("{}: {} %", counted.phase, tenths * 10));
        } else if counted.total == 0 && counted.told_at.elapsed() >= UNKNOWN_EVERY {
            counted.told_at = Instant::now();
            text::complain(&format!("{}: {} so far", counted.phase, counted.done));
        }
    }

    fn end(&self) {
        self.0.lock().take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tenth_is_told_once() {
        let phase = String::new();
        let (told_at, by_bytes, total) = (Instant::now(), false, 20);
        let mut counted = Counted { phase, told_at, by_bytes, total, done: 0, tenths_told: 0 };
        let told: Vec<u64> = (0..20).filter_map(|_| counted.add(1, 0)).collect();
        assert_eq!(told, (1..=10).collect::<Vec<_>>());
        assert_eq!(counted.add(100, 0), None);
        counted.total = 0;
        assert_eq!(counted.add(1, 0), None);
    }
}

//! How fast a scrub may read.

use std::time::{Duration, Instant};

/// Waiting is worth a call only from here on.
const WAIT_MIN: Duration = Duration::from_millis(10);

/// Keeps a rate in bytes a second.
pub(super) struct Pace {
    rate: Option<u64>,
    begin: Instant,
    bytes: u64,
}

impl Pace {
    /// At most so many bytes a second; without a limit if `None`.
    pub fn new(rate: Option<u64>) -> Pace {
        Pace { rate: rate.filter(|rate| *rate > 0), begin: Instant::now(), bytes: 0 }
    }

    /// Bytes were read; how long to wait before the next.
    pub fn took(&mut self, bytes: u64) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        self.bytes += bytes;
        let due = Duration::from_secs_f64(self.bytes as f64 / rate as f64);
        let wait = due.saturating_sub(self.begin.elapsed());
        if wait < WAIT_MIN { Duration::ZERO } else { wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_above_the_rate_is_waited_for() {
        let mut pace = Pace::new(Some(1000));
        let wait = pace.took(5000);
        assert!(wait > Duration::from_secs(4) && wait <= Duration::from_secs(5), "{wait:?}");
        assert_eq!(Pace::new(None).took(u64::MAX), Duration::ZERO);
    }
}

//! `.at/<time>`: the directory at any instant.
//!
//! A relative time (`10m`) moves on with the clock, but `cp -a .snapshots/.at/10m/src .` looks the
//! name up again for every file and must not copy a mixture of moments. So a relative time that is
//! in use keeps the moment it meant first: while the pauses between two lookups are short and for
//! no longer than the time itself. An absolute time always means the same, and `now` always means
//! now.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::error::Result;
use crate::past::views::{View, Way};
use crate::past::{Entry, Past};
use crate::time::{Zone, parse_instant};
use crate::types::{EntryName, Generation, NodeId, Timestamp};

/// The longest pause after which a relative time still is in use.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// What a relative time means while it is in use.
#[derive(Clone, Copy, Debug)]
pub(super) struct InUse {
    generation: Generation,
    /// How far back it was when it was looked up first.
    distance: Duration,
    first: Instant,
    last: Instant,
}

impl InUse {
    /// Whether a lookup at `now` still belongs to the same use.
    fn lasts(&self, now: Instant) -> bool {
        let pause = now.saturating_duration_since(self.last);
        pause <= PAUSE_MAX.min(self.distance / 10)
            && now.saturating_duration_since(self.first) <= self.distance
    }
}

impl Past {
    /// The directory at an instant that has come and that the store knows; `ENOENT` for any other
    /// name.
    pub(super) fn lookup_instant(&self, dir: NodeId, name: &EntryName) -> Result<Entry> {
        let now = Timestamp::now();
        let text = std::str::from_utf8(name.as_bytes()).map_err(|_| Errno::NOENT)?;
        // What is no time is no name here either.
        let time = parse_instant(text, now, Zone::Utc).map_err(|_| Errno::NOENT)?;
        if time > now {
            return Err(Errno::NOENT.into());
        }
        let generation = if time == now {
            // Only the present can hold what is not sealed yet; a past instant shows what was
            // recorded.
            self.history.settle()?
        } else if is_relative(text, now, time) {
            let distance = now.as_nanos().saturating_sub(time.as_nanos());
            self.in_use(dir, name, time, Duration::from_nanos(distance.unsigned_abs()))?
        } else {
            self.generation_at(time)?
        };
        if generation < self.catalog().oldest()? {
            return Err(Errno::NOENT.into());
        }
        self.enter_view(View { generation, anchor: dir, dir, way: Way::At(name.clone()) })
    }

    fn generation_at(&self, time: Timestamp) -> Result<Generation> {
        self.catalog().freeze();
        Ok(self.catalog().generation_at(time)?.ok_or(Errno::NOENT)?)
    }

    /// What a relative time means: what it meant before, while it is in use.
    fn in_use(
        &self,
        dir: NodeId,
        name: &EntryName,
        time: Timestamp,
        distance: Duration,
    ) -> Result<Generation> {
        let key = (dir, name.clone());
        let now = Instant::now();
        let known = self.tables.lock().instants.get_mut(&key).and_then(|in_use| {
            in_use.lasts(now).then(|| {
                in_use.last = now;
                in_use.generation
            })
        });
        if let Some(generation) = known
            && self.catalog().is_visible(generation)?
        {
            return Ok(generation);
        }
        let generation = self.generation_at(time)?;
        let in_use = InUse { generation, distance, first: now, last: now };
        self.tables.lock().instants.put(key, in_use);
        Ok(generation)
    }
}

/// Whether `text` means another time a second later.
fn is_relative(text: &str, now: Timestamp, time: Timestamp) -> bool {
    let later = Timestamp { secs: now.secs.saturating_add(1), ..now };
    parse_instant(text, later, Zone::Utc).is_ok_and(|then| then != time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_time_keeps_its_meaning_while_it_is_in_use() {
        let start = Instant::now();
        let after = |secs| start + Duration::from_secs(secs);
        let ten_minutes = InUse {
            generation: Generation(1),
            distance: Duration::from_secs(600),
            first: start,
            last: after(500),
        };
        assert!(ten_minutes.lasts(after(560)));
        assert!(!ten_minutes.lasts(after(561)), "the pause was too long");
        let long_used = InUse { last: after(600), ..ten_minutes };
        assert!(!long_used.lasts(after(601)), "used for longer than it reaches back");
        let second = InUse { distance: Duration::from_secs(1), last: start, ..ten_minutes };
        assert!(!second.lasts(after(1)));
    }

    #[test]
    fn only_amounts_are_relative() {
        let now = Timestamp { secs: 1_795_380_334, nanos: 5 };
        let relative = |text: &str| {
            let time = parse_instant(text, now, Zone::Utc).expect("a time");
            is_relative(text, now, time)
        };
        assert!(relative("10m") && relative("2 hours ago"));
        assert!(!relative("yesterday") && !relative("2026-11-22") && !relative("@5"));
    }
}

//! Byte ranges and sets of them.

use std::collections::BTreeMap;

/// A half-open range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
}

impl ByteRange {
    /// `length` bytes from `start`; ends at the greatest offset there is.
    pub fn new(start: u64, length: u64) -> ByteRange {
        ByteRange { start, end: start.saturating_add(length) }
    }

    /// How many bytes it has.
    pub fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.start >= self.end
    }
}

/// A set of bytes as disjoint, non-touching ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Empties the set.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The parts of `range` that are not in the set, in order.
    pub fn missing(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut missing = Vec::new();
        if range.is_empty() {
            return missing;
        }
        let mut at = range.start;
        let before = self.0.range(..=range.start).next_back();
        if let Some((_, &end)) = before {
            at = at.max(end);
        }
        for (&start, &end) in self.0.range(range.start..range.end) {
            if start > at {
                missing.push(ByteRange { start: at, end: start });
            }
            at = at.max(end);
        }
        if at < range.end {
            missing.push(ByteRange { start: at, end: range.end });
        }
        missing
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = ByteRange> {
        self.0.iter().map(|(&start, &end)| ByteRange { start, end })
    }

    /// Adds a range, joined with those it overlaps or touches.
    pub fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let ByteRange { mut start, mut end } = range;
        if let Some((&before, &before_end)) = self.0.range(..=start).next_back()
            && before_end >= start
        {
            start = before;
            end = end.max(before_end);
        }
        let covered: Vec<u64> = self.0.range(start..=end).map(|(&key, _)| key).collect();
        for key in covered {
            if let Some(other) = self.0.remove(&key) {
                end = end.max(other);
            }
        }
        self.0.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_set_of_ranges_is_a_set_of_bytes(
            ops in proptest::collection::vec((0u64..60, 0u64..20), 1..30)
        ) {
            let mut set = RangeSet::default();
            let mut bytes = [false; 100];
            for (start, length) in ops {
                let range = ByteRange::new(start, length);
                let mut missing = [false; 100];
                for part in set.missing(range) {
                    prop_assert!(!part.is_empty());
                    missing[part.start as usize..part.end as usize].fill(true);
                }
                for at in 0..100u64 {
                    let inside = at >= range.start && at < range.end;
                    prop_assert_eq!(missing[at as usize], inside && !bytes[at as usize]);
                }
                set.insert(range);
                bytes[range.start as usize..range.end as usize].fill(true);
                let ranges: Vec<_> = set.0.iter().collect();
                for pair in ranges.windows(2) {
                    prop_assert!(pair[0].1 < pair[1].0);
                }
            }
        }
    }
}

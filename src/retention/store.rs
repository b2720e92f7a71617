//! The policy that a store applies by itself, as `store.toml` has it:
//! ```toml
//! [policy]
//! every = "1h"            # an automatic snapshot so often; "0" for none
//! protect = "1h"          # what is younger is never removed
//! free_limit = "10%"      # history yields so that this much stays free; or a size: "20GiB"
//! history_limit = "50%"   # history takes no more than this; without it, no limit
//! scrub = "7d"            # a scrub of a part of the store so often; "0" for none
//! [policy.snapshots]      # which automatic snapshots to keep
//! hourly = 24             # a number, "unlimited", or a length of time
//! daily = 30
//! monthly = 12
//! [policy.versions]       # what to keep between the snapshots
//! all = "24h"
//! hourly = "7d"
//! daily = "30d"
//! deleted = "90d"
//! ```

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::moments::Tiers;
use super::policy::{Keep, Policy};
use super::span::Span;
use crate::error::{Error, Result};
use crate::types::escape;

/// With more than this kept free there is no room to work.
const FREE_PERCENT_MAX: u8 = 90;
/// The units of sizes: those of 1024, and the SI ones.
const UNITS: [(&str, u64); 12] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("K", 1 << 10),
    ("M", 1 << 20),
    ("G", 1 << 30),
    ("T", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// A part of a filesystem: `10%`, `20GiB`, or bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Limit {
    /// Of its size, 0 to 100.
    Percent(u8),
    /// As many bytes.
    Bytes(u64),
}

impl Limit {
    /// The limit in bytes on a filesystem of `size` bytes.
    pub fn of(self, size: u64) -> u64 {
        match self {
            // No overflow, and no float: u128 holds the product.
            Limit::Percent(percent) => (u128::from(size) * u128::from(percent) / 100) as u64,
            Limit::Bytes(bytes) => bytes,
        }
    }
}

impl FromStr for Limit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Limit> {
        let parse = || {
            let trimmed = text.trim();
            let digits = trimmed.trim_end_matches(|c: char| !c.is_ascii_digit());
            let unit = trimmed[digits.len()..].trim_start();
            let number: u64 = digits.parse().ok()?;
            if unit == "%" {
                return u8::try_from(number).ok().filter(|n| *n <= 100).map(Limit::Percent);
            }
            let factor = match unit {
                "" | "B" => 1,
                _ => UNITS.iter().find(|(name, _)| *name == unit)?.1,
            };
            number.checked_mul(factor).map(Limit::Bytes)
        };
        parse().ok_or_else(|| {
            Error::Refused(format!(
                "'{}' is not a part of a disk; write a percentage or a size: 10%, 20GiB, 500MB",
                escape(text.as_bytes())
            ))
        })
    }
}

impl TryFrom<String> for Limit {
    type Error = Error;

    fn try_from(text: String) -> Result<Limit> {
        text.parse()
    }
}

impl From<Limit> for String {
    fn from(limit: Limit) -> String {
        limit.to_string()
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Limit::Percent(percent) => write!(f, "{percent}%"),
            Limit::Bytes(bytes) => {
                let whole = |&&(_, factor): &&(&str, u64)| bytes > 0 && bytes % factor == 0;
                match UNITS[..4].iter().rev().find(whole) {
                    Some((name, factor)) => write!(f, "{}{name}", bytes / factor),
                    None => write!(f, "{bytes}B"),
                }
            }
        }
    }
}

/// What a store does by itself. See the module for its form in `store.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StorePolicy {
    /// How often it makes an automatic snapshot, if something changed; zero for never.
    pub every: Span,
    /// Snapshots and versions younger than this are never removed.
    pub protect: Span,
    /// History yields, oldest first, so that this much stays free on every backing.
    pub free_limit: Limit,
    /// History takes no more than this on any backing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub history_limit: Option<Limit>,
    /// How often it scrubs a part of itself; zero for never.
    pub scrub: Span,
    /// Which automatic snapshots are kept. Those that a person made are not its matter.
    pub snapshots: Policy,
    /// Which versions are kept between the snapshots.
    pub versions: Tiers,
}

impl Default for StorePolicy {
    fn default() -> StorePolicy {
        StorePolicy {
            every: Span::hours(1),
            protect: Span::hours(1),
            free_limit: Limit::Percent(10),
            history_limit: None,
            scrub: Span::days(7),
            snapshots: Policy {
                hourly: Keep::Count(24),
                daily: Keep::Count(30),
                monthly: Keep::Count(12),
                ..Policy::default()
            },
            versions: Tiers::default(),
        }
    }
}

impl StorePolicy {
    /// Whether all of it is as in a new store.
    pub fn is_default(&self) -> bool {
        *self == StorePolicy::default()
    }

    /// Refuses what cannot be meant.
    pub fn check(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::Refused(text));
        for (name, span) in
            [("every", self.every), ("protect", self.protect), ("scrub", self.scrub)]
        {
            if span.has_months() {
                return refuse(format!(
                    "{name}: '{span}' counts in months or years; m means months, minutes are \
                     written min: 30min"
                ));
            }
        }
        if self.snapshots.is_empty() {
            return refuse(
                "snapshots: this policy would keep nothing; to keep all, write last = \"unlimited\""
                    .into(),
            );
        }
        self.snapshots.check()?;
        self.versions.check()?;
        if matches!(self.free_limit, Limit::Percent(percent) if percent > FREE_PERCENT_MAX) {
            return refuse(format!(
                "free_limit: {} leaves no room to work; at most {FREE_PERCENT_MAX}%",
                self.free_limit
            ));
        }
        if let Some(limit @ (Limit::Percent(0) | Limit::Bytes(0))) = self.history_limit {
            return refuse(format!(
                "history_limit: {limit} would keep no history at all; leave it out for no limit"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toml_of(policy: &StorePolicy) -> String {
        toml::to_string(policy).expect("a policy is TOML")
    }

    #[test]
    fn the_defaults_are_the_documented_ones_and_survive_toml() {
        let text = "every = \"1h\"\nprotect = \"1h\"\nfree_limit = \"10%\"\nscrub = \"7d\"\n\n\
                    [snapshots]\n\
                    hourly = 24\ndaily = 30\nmonthly = 12\n\n[versions]\nall = \"24h\"\n\
                    hourly = \"7d\"\ndaily = \"30d\"\ndeleted = \"90d\"\n";
        let policy = StorePolicy::default();
        assert_eq!(toml_of(&policy), text);
        assert_eq!(toml::from_str::<StorePolicy>(text).expect("parses"), policy);
        assert_eq!(toml::from_str::<StorePolicy>("").expect("parses"), policy);
        policy.check().expect("the defaults are sound");
        assert!(policy.is_default());
    }

    #[test]
    fn a_policy_of_ones_own_survives_toml() {
        let text = "every = \"0\"\nhistory_limit = \"20GiB\"\n[snapshots]\ndaily = \"1y\"\n\
                    tags = [\"a,b\"]\n[versions]\nall = \"3h\"\n";
        let policy: StorePolicy = toml::from_str(text).expect("parses");
        assert!(policy.every.is_zero());
        assert_eq!(policy.history_limit, Some(Limit::Bytes(20 << 30)));
        assert_eq!(policy.snapshots.hourly, Keep::Nothing, "a table replaces the default one");
        assert_eq!(policy.versions.hourly, Span::days(7));
        policy.check().expect("sound");
        assert_eq!(toml::from_str::<StorePolicy>(&toml_of(&policy)).expect("parses"), policy);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_the_remedy() {
        for (text, part) in [
            ("every = \"30m\"", "minutes are written min"),
            ("protect = \"1y\"", "protect: '1y'"),
            ("[snapshots]", "last = \"unlimited\""),
            ("free_limit = \"95%\"", "at most 90%"),
            ("history_limit = \"0%\"", "leave it out"),
            ("[versions]\nall = \"8d\"", "must follow in this order"),
            ("[versions]\nhourly = \"31d\"", "must follow in this order"),
        ] {
            let policy: StorePolicy = toml::from_str(text).expect(text);
            let error = policy.check().expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        for (text, part) in [
            ("every = 5", "expected a string"),
            ("every = \"5\"", "'5' is not a length of time"),
            ("free_limit = \"x\"", "'x' is not a part of a disk"),
            ("free_limit = \"101%\"", "not a part of a disk"),
            ("keep = \"1h\"", "keep"),
        ] {
            let error = toml::from_str::<StorePolicy>(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn limits_are_read_and_written() {
        for (text, limit, written) in [
            ("10%", Limit::Percent(10), "10%"),
            ("0%", Limit::Percent(0), "0%"),
            ("20GiB", Limit::Bytes(20 << 30), "20GiB"),
            ("20 G", Limit::Bytes(20 << 30), "20GiB"),
            ("1GB", Limit::Bytes(1_000_000_000), "1000000000B"),
            ("2048M", Limit::Bytes(2 << 30), "2GiB"),
            ("512", Limit::Bytes(512), "512B"),
            ("0", Limit::Bytes(0), "0B"),
        ] {
            assert_eq!(text.parse::<Limit>().expect(text), limit);
            assert_eq!(limit.to_string(), written);
            assert_eq!(written.parse::<Limit>().expect(written), limit);
        }
        for text in ["", "%", "-1", "10 %%", "1XB", "99999999999999TiB", "1.5G", "\u{e9}"] {
            assert!(text.parse::<Limit>().is_err(), "{text}");
        }
        assert_eq!(Limit::Percent(10).of(u64::MAX), u64::MAX / 10);
        assert_eq!(Limit::Bytes(7).of(1), 7);
    }
}

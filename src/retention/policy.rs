//! What to keep: the rules that a person writes.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::span::Span;
use crate::error::{Error, Result};
use crate::types::escape;

/// The longest tag, in bytes.
pub const TAG_BYTES_MAX: usize = 64;
/// The most tags that one snapshot, or one rule, may have.
pub const TAGS_MAX: usize = 32;
/// The most rules on tags in one policy.
const TAG_RULES_MAX: usize = 64;

/// How many periods, or how long a time, a rule keeps.
///
/// Written as a number (`7`), `unlimited` (or -1), or a length of time (`14d`, `1y5m7d2h`, `1w`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// There is no such rule.
    #[default]
    Nothing,
    /// The newest of each of so many periods that have one.
    Count(u64),
    /// The newest of every period.
    Unlimited,
    /// The newest of each period that reaches less far back from the newest of all than this.
    Within(Span),
}

impl Keep {
    /// Whether it keeps nothing.
    pub fn is_nothing(&self) -> bool {
        match self {
            Keep::Nothing | Keep::Count(0) => true,
            Keep::Within(span) => span.is_zero(),
            Keep::Count(_) | Keep::Unlimited => false,
        }
    }

    fn count(count: i64) -> Option<Keep> {
        match count {
            -1 => Some(Keep::Unlimited),
            0 => Some(Keep::Nothing),
            _ => u64::try_from(count).ok().map(Keep::Count),
        }
    }
}

impl FromStr for Keep {
    type Err = Error;

    fn from_str(text: &str) -> Result<Keep> {
        let trimmed = text.trim();
        if trimmed == "unlimited" {
            return Ok(Keep::Unlimited);
        }
        let number = trimmed.parse().ok().and_then(Keep::count);
        let length = || match trimmed.parse::<Span>() {
            Ok(span) if span.is_zero() => Ok(Keep::Nothing),
            other => other.map(Keep::Within),
        };
        number.map_or_else(length, Ok).map_err(|_| {
            Error::Refused(format!(
                "'{}' does not say how much to keep; write a number, 'unlimited', or a length of \
                 time with y, m (months), w, d, h, min or s: 7, 14d, 1y5m7d2h",
                escape(text.as_bytes())
            ))
        })
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Keep::Nothing => f.write_str("0"),
            Keep::Count(count) => write!(f, "{count}"),
            Keep::Unlimited => f.write_str("unlimited"),
            Keep::Within(span) => write!(f, "{span}"),
        }
    }
}

/// A number where it is one, else text.
impl Serialize for Keep {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Keep::Nothing => to.serialize_u64(0),
            Keep::Count(count) => to.serialize_u64(*count),
            Keep::Unlimited | Keep::Within(_) => to.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Keep {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Keep, D::Error> {
        struct KeepVisitor;

        impl Visitor<'_> for KeepVisitor {
            type Value = Keep;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, \"unlimited\", or a length of time as \"14d\"")
            }

            fn visit_i64<E: de::Error>(self, count: i64) -> Result<Keep, E> {
                Keep::count(count)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Signed(count), &self))
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<Keep, E> {
                let signed = i64::try_from(count).ok().and_then(Keep::count);
                signed.ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(count), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Keep, E> {
                text.parse().map_err(E::custom)
            }
        }

        from.deserialize_any(KeepVisitor)
    }
}

/// Refuses what cannot be a tag.
pub fn check_tag(tag: &str) -> Result<()> {
    let bad = if tag.is_empty() {
        "it is empty"
    } else if tag.len() > TAG_BYTES_MAX {
        "it is longer than 64 bytes"
    } else if tag.contains(',') {
        "it has a comma in it"
    } else if tag.chars().any(char::is_control) {
        "it has a control character in it"
    } else {
        return Ok(());
    };
    Err(Error::Refused(format!(
        "'{}' cannot be a tag: {bad}. Allowed are 1 to 64 bytes of text without commas and control \
         characters",
        escape(tag.as_bytes())
    )))
}

/// Checks the tags of one snapshot, and leaves out those said twice.
pub fn check_tags(tags: Vec<String>) -> Result<Vec<String>> {
    let mut checked: Vec<String> = Vec::new();
    for tag in tags {
        check_tag(&tag)?;
        if !checked.contains(&tag) {
            checked.push(tag);
        }
    }
    if checked.len() > TAGS_MAX {
        return Err(Error::Refused(format!("a snapshot can have {TAGS_MAX} tags at most")));
    }
    Ok(checked)
}

/// Keeps every snapshot that has all of these tags. Written with commas; the empty text stands for
/// the snapshots without any tag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TagRule(Vec<String>);

impl TagRule {
    /// Whether a snapshot with these tags is kept.
    pub fn fits(&self, tags: &[String]) -> bool {
        match self.0.is_empty() {
            true => tags.is_empty(),
            false => self.0.iter().all(|tag| tags.contains(tag)),
        }
    }
}

impl FromStr for TagRule {
    type Err = Error;

    fn from_str(text: &str) -> Result<TagRule> {
        if text.is_empty() {
            return Ok(TagRule(Vec::new()));
        }
        check_tags(text.split(',').map(String::from).collect()).map(TagRule)
    }
}

impl TryFrom<String> for TagRule {
    type Error = Error;

    fn try_from(text: String) -> Result<TagRule> {
        text.parse()
    }
}

impl From<TagRule> for String {
    fn from(rule: TagRule) -> String {
        rule.0.join(",")
    }
}

impl fmt::Display for TagRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}]", self.0.join(", "))
    }
}

/// Which snapshots to keep. A snapshot is kept if any of the rules keeps it; with no rule at all
/// the policy is *empty*.
///
/// Periods are those of the calendar in local time: hours, days, weeks from Monday, months, years.
/// Of each the newest snapshot is kept; periods without one do not count. Where a rule has not yet
/// as many periods as it may keep, it keeps the oldest snapshot as well.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// The newest ones.
    #[serde(skip_serializing_if = "Keep::is_nothing")]
    pub last: Keep,
    /// The newest of each hour.
    #[serde(skip_serializing_if = "Keep::is_nothing")]
    pub hourly: Keep,
    /// The newest of each day.
    #[serde(skip_serializing_if = "Keep::is_nothing")]
    pub daily: Keep,
    /// The newest of each week.
    #[serde(skip_serializing_if = "Keep::is_nothing")]
    pub weekly: Keep,
    /// The newest of each month.
    #[serde(skip_serializing_if = "Keep::is_nothing")]
    pub monthly: Keep,
    /// The newest of each year.
    #[serde(skip_serializing_if = "Keep::is_nothing")]
    pub yearly: Keep,
    /// All that lie less than this before the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within: Option<Span>,
    /// The newest of each hour, less than this before the newest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within_hourly: Option<Span>,
    /// Likewise of each day.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within_daily: Option<Span>,
    /// Likewise of each week.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within_weekly: Option<Span>,
    /// Likewise of each month.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within_monthly: Option<Span>,
    /// Likewise of each year.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub within_yearly: Option<Span>,
    /// Those with tags.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<TagRule>,
}

impl Policy {
    /// Whether it would keep nothing, whatever there is.
    pub fn is_empty(&self) -> bool {
        let counts = [self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly];
        let spans = [
            self.within,
            self.within_hourly,
            self.within_daily,
            self.within_weekly,
            self.within_monthly,
            self.within_yearly,
        ];
        self.tags.is_empty()
            && counts.iter().all(Keep::is_nothing)
            && spans.iter().flatten().all(|span| span.is_zero())
    }

    /// Refuses more rules than anybody writes.
    pub(super) fn check(&self) -> Result<()> {
        if self.tags.len() > TAG_RULES_MAX {
            return Err(Error::Refused(format!(
                "a policy can have {TAG_RULES_MAX} rules on tags at most"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_much_to_keep_is_read_and_written() {
        for (text, keep) in [
            ("7", Keep::Count(7)),
            ("0", Keep::Nothing),
            ("0d", Keep::Nothing),
            ("unlimited", Keep::Unlimited),
            ("-1", Keep::Unlimited),
            ("14d", Keep::Within(Span::days(14))),
            ("1w", Keep::Within(Span::days(7))),
            ("9223372036854775807", Keep::Count(i64::MAX as u64)),
        ] {
            assert_eq!(text.parse::<Keep>().expect(text), keep);
            assert_eq!(keep.to_string().parse::<Keep>().expect(text), keep);
        }
        for text in ["", "-2", "x", "7.5", "9223372036854775808", "UNLIMITED", "1 d"] {
            let error = text.parse::<Keep>().expect_err(text).to_string();
            assert!(error.contains("1y5m7d2h"), "{error}");
        }
    }

    #[test]
    fn a_policy_survives_toml_and_json() {
        let text = "last = 3\nhourly = -1\ndaily = \"14d\"\nwithin_weekly = \"1m\"\n\
                    tags = [\"a,b\", \"\"]\n";
        let policy: Policy = toml::from_str(text).expect("a policy");
        assert_eq!(policy.hourly, Keep::Unlimited);
        assert_eq!(policy.tags.len(), 2);
        let again: Policy =
            toml::from_str(&toml::to_string(&policy).expect("TOML")).expect("parses");
        assert_eq!(again, policy);
        let json = serde_json::to_string(&policy).expect("JSON");
        assert_eq!(serde_json::from_str::<Policy>(&json).expect("parses"), policy);
        assert_eq!(toml::to_string(&Policy::default()).expect("TOML"), "");
    }

    #[test]
    fn mistakes_in_a_policy_are_told() {
        for (text, part) in [
            ("hourly = -2", "a number, \"unlimited\""),
            ("hourly = true", "a number, \"unlimited\""),
            ("hourly = \"x\"", "'x' does not say how much to keep"),
            ("within = \"5\"", "'5' is not a length of time"),
            ("dayly = 5", "dayly"),
            ("tags = [\"a,,b\"]", "cannot be a tag: it is empty"),
        ] {
            let error = toml::from_str::<Policy>(text).expect_err(text).to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn an_empty_policy_is_known_however_it_is_written() {
        let empty = |text: &str| toml::from_str::<Policy>(text).expect(text).is_empty();
        assert!(
            empty("") && empty("last = 0") && empty("within = \"0d\"") && empty("daily = \"0\"")
        );
        assert!(!empty("last = 1") && !empty("tags = [\"\"]") && !empty("within_daily = \"1s\""));
        assert!(Policy { last: Keep::Count(0), ..Policy::default() }.is_empty());
    }

    #[test]
    fn tags_are_checked() {
        for good in ["a", "two words", "gr\u{fc}n", &"x".repeat(64)] {
            assert!(check_tag(good).is_ok(), "{good}");
        }
        for bad in ["", "a,b", "a\nb", "\u{1b}", &"x".repeat(65)] {
            assert!(check_tag(bad).unwrap_err().to_string().contains("cannot be a tag"), "{bad}");
        }
        let twice = ["b", "a", "b"].map(String::from).to_vec();
        assert_eq!(check_tags(twice).unwrap(), ["b", "a"]);
        assert!(check_tags((0..33).map(|n| n.to_string()).collect()).is_err());
    }

    #[test]
    fn a_rule_on_tags_wants_all_of_them() {
        let tags =
            |text: &str| -> Vec<String> { text.split_whitespace().map(Into::into).collect() };
        let rule: TagRule = "a,b".parse().unwrap();
        assert!(rule.fits(&tags("b c a")) && !rule.fits(&tags("a")) && !rule.fits(&[]));
        let untagged: TagRule = "".parse().unwrap();
        assert!(untagged.fits(&[]) && !untagged.fits(&tags("a")));
        assert_eq!(rule.to_string(), "[a, b]");
    }
}

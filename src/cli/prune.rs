//! `rearview prune`

use std::path::PathBuf;

use clap::Args;

use super::locate::{locate, unexpected};
use super::{Exit, text};
use crate::control::{Request, Response};
use crate::error::Result;
use crate::report::prune::{self, PruneItem, PruneReport};
use crate::retention::{Keep, Policy, Span, TagRule};
use crate::types::escape;

/// What `--help` shows at its end.
pub const EXAMPLES: &str = "\
Examples:
  rearview prune -n --keep-daily 7 --keep-monthly 12     show what would go, and why
  rearview prune --keep-daily 7 --keep-monthly 12        remove it
  rearview prune --keep-within 14d --keep-tag release    all of 14 days, and the releases
  rearview prune --keep-hourly 2d --keep-weekly 1y ~/Rearview
  rearview prune -n                                      what the store's own policy would remove

N is a number, 'unlimited', or a length of time with y, m (months), w, d, h, min, s (14d, 1y6m). \
Hours, days, weeks (from Monday), months and years are those of local time; of each the newest \
snapshot is kept, and those without one do not count. A snapshot is kept if any of the options \
keeps it. Lengths of time reach back from the newest snapshot. Held snapshots always stay.";

/// Arguments of `prune`.
#[derive(Clone, Debug, Args)]
pub struct PruneArgs {
    /// Any path in the mount, or a backing
    #[arg(default_value = ".")]
    pub path: PathBuf,
    /// Print what would be removed, and remove nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// What to keep.
    #[command(flatten)]
    pub keep: KeepArgs,
    /// Let it remove all snapshots, if that is what the options come to (--keep-last 0)
    #[arg(long, requires = "KeepArgs")]
    pub unsafe_allow_remove_all: bool,
    /// Make these options the store's own policy, which it applies to automatic snapshots
    #[arg(long, requires = "KeepArgs", conflicts_with_all = ["dry_run", "unsafe_allow_remove_all"])]
    pub save: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What is to be kept; without any of these the store's own policy says it.
#[derive(Clone, Debug, Default, Args)]
#[group(id = "KeepArgs", multiple = true)]
pub struct KeepArgs {
    /// Keep the newest N snapshots
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub keep_last: Option<Keep>,
    /// Keep the newest of each of the last N hours
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub keep_hourly: Option<Keep>,
    /// Keep the newest of each of the last N days
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub keep_daily: Option<Keep>,
    /// Keep the newest of each of the last N weeks
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub keep_weekly: Option<Keep>,
    /// Keep the newest of each of the last N months
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub keep_monthly: Option<Keep>,
    /// Keep the newest of each of the last N years
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub keep_yearly: Option<Keep>,
    /// Keep all within this time of the newest
    #[arg(long, value_name = "TIME")]
    pub keep_within: Option<Span>,
    /// Keep the newest of each hour within this time of the newest
    #[arg(long, value_name = "TIME")]
    pub keep_within_hourly: Option<Span>,
    /// Keep the newest of each day within this time of the newest
    #[arg(long, value_name = "TIME")]
    pub keep_within_daily: Option<Span>,
    /// Keep the newest of each week within this time of the newest
    #[arg(long, value_name = "TIME")]
    pub keep_within_weekly: Option<Span>,
    /// Keep the newest of each month within this time of the newest
    #[arg(long, value_name = "TIME")]
    pub keep_within_monthly: Option<Span>,
    /// Keep the newest of each year within this time of the newest
    #[arg(long, value_name = "TIME")]
    pub keep_within_yearly: Option<Span>,
    /// Keep those that have all of these tags; may be said several times; '' for those without
    #[arg(long = "keep-tag", value_name = "TAG[,TAG]")]
    pub keep_tags: Vec<TagRule>,
}

impl KeepArgs {
    /// The policy, if any option was given.
    fn policy(self) -> Option<Policy> {
        let counts = [
            self.keep_last,
            self.keep_hourly,
            self.keep_daily,
            self.keep_weekly,
            self.keep_monthly,
            self.keep_yearly,
        ];
        let spans = [
            self.keep_within,
            self.keep_within_hourly,
            self.keep_within_daily,
            self.keep_within_weekly,
            self.keep_within_monthly,
            self.keep_within_yearly,
        ];
        let tags = self.keep_tags;
        if tags.is_empty()
            && counts.iter().all(Option::is_none)
            && spans.iter().all(Option::is_none)
        {
            return None;
        }
        let [last, hourly, daily, weekly, monthly, yearly] = counts.map(Option::unwrap_or_default);
        let [within, within_hourly, within_daily, within_weekly, within_monthly, within_yearly] =
            spans;
        Some(Policy {
            last,
            hourly,
            daily,
            weekly,
            monthly,
            yearly,
            within,
            within_hourly,
            within_daily,
            within_weekly,
            within_monthly,
            within_yearly,
            tags,
        })
    }
}

/// Removes the snapshots that no rule keeps.
pub fn prune(args: PruneArgs) -> Result<Exit> {
    let PruneArgs { path, dry_run, keep, unsafe_allow_remove_all: allow_none, save, json } = args;
    let located = locate(&path)?;
    let policy = keep.policy();
    let request =
        Request::Prune { policy: policy.clone().map(Box::new), dry_run, allow_none, save };
    let response = match dry_run {
        false => located.ask(&request)?,
        true => located.ask_or_look(&request, |catalog| {
            let own = crate::store::inspect(&located.first_backing())?.marker.policy;
            Ok(Response::Pruned(prune::plan(catalog, policy.as_ref(), allow_none, &own)?))
        })?,
    };
    let Response::Pruned(report) = response else { return Err(unexpected()) };
    if json {
        text::print_json(&report)?;
    } else {
        text::print(&prune_text(&report))?;
    }
    Ok(Exit::Done)
}

/// What stays, what goes, and how many that are.
fn prune_text(report: &PruneReport) -> String {
    let PruneReport { kept, dropped, dry_run, saved, freed_bytes, .. } = report;
    let mut out = String::new();
    out.push_str(&section("keep", kept));
    out.push_str(&section(if *dry_run { "would remove" } else { "removed" }, dropped));
    if *saved {
        out.push_str("these options are the store's policy now\n");
    }
    let freed = match freed_bytes {
        0 => String::new(),
        bytes => format!(", {} freed", text::size(*bytes)),
    };
    out.push_str(&match (dry_run, dropped.len()) {
        (false, gone) => format!("{gone} removed, {} kept{freed}\n", kept.len()),
        (true, gone) => {
            format!("{gone} to remove, {} to keep; nothing was removed\n", kept.len())
        }
    });
    out
}

fn section(title: &str, items: &[PruneItem]) -> String {
    if items.is_empty() {
        return String::new();
    }
    let head = ["TIME", "NAME", "TAGS", "REASONS"].map(String::from).to_vec();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(items.iter().map(row)).collect();
    let plural = if items.len() == 1 { "" } else { "s" };
    let mut out = format!("{title} {} snapshot{plural}:\n", items.len());
    for line in text::table(&rows).lines() {
        out.push_str(&format!("  {line}\n"));
    }
    out.push('\n');
    out
}

fn row(item: &PruneItem) -> Vec<String> {
    vec![
        text::local_time(&item.time),
        escape(item.name.as_bytes()),
        text::tags(&item.tags),
        escape(item.reasons.join(", ").as_bytes()),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser;

    fn parse(line: &str) -> Result<PruneArgs, clap::Error> {
        let words = ["rearview", "prune"].into_iter().chain(line.split_whitespace());
        let Command::Prune(args) = Cli::try_parse_from(words)?.command else { panic!() };
        Ok(*args)
    }

    #[test]
    fn keep_options_become_a_policy_and_no_options_become_none() {
        let policy = |line| parse(line).expect(line).keep.policy();
        assert_eq!(policy("-n ~/x --json"), None);
        let given = policy(
            "--keep-last 3 --keep-hourly -1 --keep-daily 14d --keep-within 1y5m7d2h \
             --keep-tag a,b --keep-tag c",
        );
        let expected = "last = 3\nhourly = \"unlimited\"\ndaily = \"14d\"\n\
                        within = \"1y5m7d2h\"\ntags = [\"a,b\", \"c\"]\n";
        assert_eq!(given, Some(toml::from_str(expected).expect("a policy")));
        // Nothing is also an answer; the engine refuses it.
        assert!(policy("--keep-last 0").expect("given").is_empty());
        assert!(policy("--keep-last 0 --unsafe-allow-remove-all").is_some());
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        for line in [
            "--keep-last x",
            "--keep-daily -2",
            "--keep-within 5",
            "--keep-tag a,,b",
            "--save",
            "--unsafe-allow-remove-all",
            "--save -n --keep-last 1",
            "--save --unsafe-allow-remove-all --keep-last 0",
            "a b",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        let error = parse("--keep-weekly 2x").expect_err("no unit").to_string();
        assert!(error.contains("1y5m7d2h"), "{error}");
    }

    fn item(name: &str, tags: &[&str], reasons: &[&str]) -> PruneItem {
        let strings = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        PruneItem {
            name: name.into(),
            time: "@1".into(),
            tags: strings(tags),
            automatic: false,
            held: false,
            reasons: strings(reasons),
        }
    }

    #[test]
    fn the_table_tells_what_stays_and_goes_and_why() {
        let mut report = PruneReport {
            kept: vec![item("new", &["a", "b"], &["last snapshot", "tagged [a]"])],
            dropped: vec![
                item("old\u{1b}", &[], &["last: 1 newer ones are kept"]),
                item("x", &[], &["y"]),
            ],
            dry_run: true,
            own_policy: false,
            saved: false,
            freed_bytes: 0,
        };
        assert_eq!(
            prune_text(&report),
            "keep 1 snapshot:\n  \
               TIME  NAME  TAGS    REASONS\n  \
               @1    new   [a, b]  last snapshot, tagged [a]\n\n\
             would remove 2 snapshots:\n  \
               TIME  NAME     TAGS  REASONS\n  \
               @1    old\\x1b        last: 1 newer ones are kept\n  \
               @1    x              y\n\n\
             2 to remove, 1 to keep; nothing was removed\n"
        );
        report.dry_run = false;
        report.saved = true;
        report.freed_bytes = 2048;
        report.kept.clear();
        let text = prune_text(&report);
        assert!(text.starts_with("removed 2 snapshots:\n"), "{text}");
        let end = "these options are the store's policy now\n2 removed, 0 kept, 2.0 KiB freed\n";
        assert!(text.ends_with(end), "{text}");
    }
}

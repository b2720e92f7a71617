//! `rearview purge`

use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;

use super::locate::{Located, locate, unexpected};
use super::{Exit, text};
use crate::control::{Request, Response};
use crate::error::{Error, IoContext, Result};
use crate::report::PathText;
use crate::report::purge::{PurgeItem, PurgeReport};
use crate::types::{Kind, escape};

/// Other paths that are named before a number stands for the rest.
const ALSO_MAX: usize = 20;

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  rearview purge -n secrets.txt          show what would go
  rearview purge secrets.txt old/dump    remove every version, after asking
Everything goes that ever had the path or lay below it, in every snapshot, also under other names.
A live file keeps its present state, as a version that begins now.";

/// Arguments of `purge`.
#[derive(Clone, Debug, Args)]
pub struct PurgeArgs {
    /// Files and directories in the mount, by the paths they have or had
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Print what would go, and do nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// Also what held snapshots show
    #[arg(long)]
    pub even_held: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `rearview purge`
pub fn purge(args: &PurgeArgs) -> Result<Exit> {
    let (located, paths) = one_store(args)?;
    let ask = |dry_run: bool| {
        let (paths, even_held) = (paths.clone(), args.even_held);
        match located.ask(&Request::Purge { paths, dry_run, even_held })? {
            Response::Purge(report) => Ok(report),
            _ => Err(unexpected()),
        }
    };
    let report = ask(true)?;
    if args.dry_run {
        show(&report, args.json)?;
        return Ok(Exit::Done);
    }
    if !args.yes {
        if !std::io::stdin().is_terminal() {
            return Err(Error::Refused(
                "a purge cannot be undone: look with -n what goes, then add --yes".into(),
            ));
        }
        text::print(&purge_text(&report))?;
        if !confirmed()? {
            return Err(Error::Interrupted);
        }
    }
    show(&ask(false)?, args.json)?;
    Ok(Exit::Done)
}

/// All paths lie in one store.
fn one_store(args: &PurgeArgs) -> Result<(Located, Vec<PathText>)> {
    let mut first: Option<Located> = None;
    let mut paths = Vec::new();
    for path in &args.paths {
        let located = locate(path)?;
        paths.push(PathText::from(&located.path));
        match &first {
            None => first = Some(located),
            Some(first) if first.backings == located.backings => {}
            Some(_) => {
                return Err(Error::Refused("the paths lie in several stores: purge in one".into()));
            }
        }
    }
    let first = first.ok_or_else(|| Error::Refused("name what is to be purged".into()))?;
    Ok((first, paths))
}

fn confirmed() -> Result<bool> {
    let mut out = std::io::stderr();
    write!(out, "This cannot be undone. Type 'yes' to remove it from all history: ")
        .and_then(|()| out.flush())
        .context("write to", "the terminal")?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("read from", "the terminal")?;
    Ok(answer.trim() == "yes")
}

fn show(report: &PurgeReport, json: bool) -> Result<()> {
    if json { text::print_json(report) } else { text::print(&purge_text(report)) }
}

fn purge_text(report: &PurgeReport) -> String {
    let mut shown = match report.done {
        true => String::new(),
        false => text::table(&report.items.iter().map(row).collect::<Vec<_>>()),
    };
    if !report.done && !report.also.is_empty() {
        shown.push_str("the same objects under other paths, whose history goes as well:\n");
        for path in report.also.iter().take(ALSO_MAX) {
            shown.push_str(&format!("  {}\n", path.shown()));
        }
        if report.also.len() > ALSO_MAX {
            shown.push_str(&format!("  and {} more\n", report.also.len() - ALSO_MAX));
        }
    }
    if !report.done && !report.held.is_empty() {
        let names: Vec<String> = report.held.iter().map(|name| escape(name.as_bytes())).collect();
        shown.push_str(&format!("held snapshots show it: {}\n", names.join(", ")));
    }
    shown.push_str(&format!(
        "{} {} of {}, {}\n",
        if report.done { "purged" } else { "would purge" },
        count(report.versions, "version"),
        count(report.items.len() as u64, "object"),
        text::size(report.bytes)
    ));
    shown
}

fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn row(item: &PurgeItem) -> Vec<String> {
    vec![
        count(item.versions, "version"),
        if item.kind == Kind::Dir { "-".into() } else { text::size(item.bytes) },
        item.path.shown(),
        if item.live { "stays as it is now" } else { "" }.into(),
    ]
}

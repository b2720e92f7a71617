//! `rearview check`

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::{Exit, progress, text};
use crate::check::{CheckOptions, CheckReport, Finding};
use crate::error::Result;

/// What `--help` shows at its end.
pub const EXAMPLES: &str = "\
Examples:
  rearview check ~/work /mnt/usb/work-copy
  rearview check --read-data --json /a /b

Exit code 21 when damage is found. What is damaged on one replica and whole on another is healed by
'rearview scrub start --all' on the mounted store.";

/// Arguments of `check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// The backing directories of an unmounted store
    #[arg(required = true, value_name = "BACKING")]
    pub backings: Vec<PathBuf>,
    /// Read every byte, of the live files too, and compare it with what was recorded
    #[arg(long)]
    pub read_data: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `rearview check`
pub fn check(args: &CheckArgs) -> Result<Exit> {
    let options = CheckOptions { read_data: args.read_data };
    let progress = progress::on_terminal(Arc::default());
    let report = crate::check::check(&args.backings, options, &progress)?;
    if args.json {
        text::print_json(&report)?;
    } else {
        text::print(&report_text(&report))?;
    }
    Ok(if report.damage.is_empty() { Exit::Done } else { Exit::Damaged })
}

fn report_text(report: &CheckReport) -> String {
    let mut out = String::new();
    let mut list = |title: &str, findings: &[Finding]| {
        if !findings.is_empty() {
            out.push_str(&format!("{title}:\n"));
            findings.iter().for_each(|finding| out.push_str(&format!("  {finding}\n")));
        }
    };
    list("damage", &report.damage);
    list("left over, harmless", &report.leftovers);
    let verdict = match report.damage.len() {
        0 => "no damage found".to_string(),
        count => format!("damage found: {count}"),
    };
    let read = text::size(report.bytes);
    out.push_str(&format!(
        "{verdict}; {} objects and {} files of history looked at, {read} read\n",
        report.objects, report.history_files
    ));
    out
}

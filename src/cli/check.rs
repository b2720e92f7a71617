//! `rearview check`

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;

use super::locate::{locate, unexpected};
use super::{Exit, progress, text};
use crate::check::{CheckOptions, CheckReport, Finding, RebuildReport};
use crate::control::{Request, Response};
use crate::error::{Error, Result};
use crate::mountpoint::show;

/// What `--help` shows at its end.
pub const EXAMPLES: &str = "\
Examples:
  rearview check ~/work /mnt/usb/work-copy
  rearview check --read-data --json /a /b
  rearview check --read-data --repair /a /b
  rearview check --rebuild-catalog /a /b

Exit code 21 when damage is found and not repaired, 3 when a disk did not answer. A mounted store
is looked at, and healed, by 'rearview scrub start --all'.";

/// Arguments of `check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// The backing directories of an unmounted store; or a mountpoint, whose catalogs are checked
    #[arg(required = true, value_name = "BACKING")]
    pub backings: Vec<PathBuf>,
    /// Read every byte, of the live files too, and compare it with what was recorded
    #[arg(long)]
    pub read_data: bool,
    /// Heal what is damaged on one backing and whole on another, as a mount and a scrub do, then
    /// check anew
    #[arg(long)]
    pub repair: bool,
    /// Make a new catalog on the first backing from live tree, preserved files and packs. Only when
    /// every backing has lost its own: the others are made equal to the first by the next mount
    #[arg(long, conflicts_with_all = ["read_data", "repair"])]
    pub rebuild_catalog: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `rearview check`
pub fn check(args: &CheckArgs) -> Result<Exit> {
    if let [path] = args.backings.as_slice()
        && let Ok(located) = locate(path)
        && let Some(mountpoint) = &located.mountpoint
    {
        if args.repair || args.rebuild_catalog {
            return Err(mounted(mountpoint, &located.backings, args));
        }
        let Response::Checked(report) = located.ask(&Request::Check)? else {
            return Err(unexpected());
        };
        if args.json {
            text::print_json(&report)?;
        } else {
            text::print(&report_text(&report))?;
            let advice = "mounted: only the catalogs were checked; 'rearview scrub start --all' \
                          looks at everything";
            text::print_line(advice)?;
        }
        return Ok(exit_of(&report));
    }
    let options = CheckOptions { read_data: args.read_data, ..CheckOptions::default() };
    let progress = progress::on_terminal(Arc::default());
    if args.rebuild_catalog {
        let report = crate::check::rebuild(&args.backings, &progress)?;
        if args.json {
            text::print_json(&report)?;
        } else {
            text::print(&rebuild_text(&report))?;
        }
        return Ok(Exit::Done);
    }
    let mut report = crate::check::check(&args.backings, options, &progress)?;
    if args.repair && !report.damage.is_empty() {
        let run = crate::check::repair(&args.backings, &progress)?;
        run.findings.iter().for_each(|finding| eprintln!("rearview: {finding}"));
        report = crate::check::check(&args.backings, options, &progress)?;
    }
    if args.json {
        text::print_json(&report)?;
    } else {
        text::print(&report_text(&report))?;
    }
    Ok(exit_of(&report))
}

/// What writes to a store as a whole has to have it alone.
fn mounted(mountpoint: &Path, backings: &[PathBuf], args: &CheckArgs) -> Error {
    let option = if args.repair { "--repair" } else { "--rebuild-catalog" };
    let backings: Vec<String> = backings.iter().map(|path| show(path)).collect();
    let heal = match args.repair {
        true => "; while it is mounted, 'rearview scrub start --all' heals",
        false => "",
    };
    let (mountpoint, backings) = (show(mountpoint), backings.join(" "));
    Error::InUse(format!(
        "the store is mounted on {mountpoint}, and {option} needs it unmounted: 'rearview umount \
         {mountpoint}', then 'rearview check {option} {backings}'{heal}"
    ))
}

fn exit_of(report: &CheckReport) -> Exit {
    match (report.damage.is_empty(), report.silent.is_empty()) {
        (false, _) => Exit::Damaged,
        (true, false) => Exit::Incomplete,
        (true, true) => Exit::Done,
    }
}

fn rebuild_text(report: &RebuildReport) -> String {
    let mut out = String::new();
    if !report.unknown.is_empty() {
        out.push_str("not known any more:\n");
        report.unknown.iter().for_each(|finding| out.push_str(&format!("  {finding}\n")));
    }
    out.push_str(&format!(
        "a new catalog of {} live objects and {} past versions, from {} packs\n\
         names of snapshots, and who made a change, are lost with the old one\n",
        report.live, report.versions, report.packs
    ));
    out
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
    list("not checked", &report.silent);
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

//! `rearview scrub`

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::locate::{Located, locate, unexpected};
use super::{Exit, text};
use crate::control::{Request, Response, ScrubRequest};
use crate::error::{Error, Result};
use crate::report::time_text;
use crate::retention::store::Limit;
use crate::types::Timestamp;
use crate::volume::scrub::{ScrubOptions, ScrubRun, ScrubStatus};

/// What `--help` shows at its end.
pub const EXAMPLES: &str = "\
Examples:
  rearview scrub                         what was not looked at for longest
  rearview scrub start --all --wait      everything, and wait for the end
  rearview scrub start --rate 50MiB      read no more than this a second
  rearview scrub pause
  rearview scrub status --json ~/Rearview

Without --all a run looks at all catalogs, and at 8 % of history and of the live tree, there at \
nothing that is younger than ten days; the next run goes on after it. Exit code 21 when something \
was found that could not be healed.";

/// How often `--wait` asks.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Arguments of `scrub`.
#[derive(Clone, Debug, Args)]
pub struct ScrubArgs {
    /// What to do
    #[arg(value_enum, default_value = "start")]
    pub action: Action,
    /// Any path in the mount, or a backing
    #[arg(default_value = ".")]
    pub path: PathBuf,
    /// Look at everything
    #[arg(long, conflicts_with = "percent")]
    pub all: bool,
    /// Look at so much of history and of the live tree
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub percent: Option<u8>,
    /// Read at most so many bytes a second, as 50MiB
    #[arg(long, value_name = "BYTES")]
    pub rate: Option<String>,
    /// Return when the run has ended
    #[arg(long)]
    pub wait: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Action {
    /// Begin a run, or let a paused one go on with new options
    Start,
    /// Stop for a while; it stays so over a remount
    Pause,
    /// Go on
    Resume,
    /// End the run; the next one goes on from there
    Stop,
    /// Show how it stands, and what the last run found
    Status,
}

/// `rearview scrub`
pub fn scrub(args: &ScrubArgs) -> Result<Exit> {
    let located = locate(&args.path)?;
    let request = match args.action {
        Action::Start => ScrubRequest::Start(options(args)?),
        Action::Pause => ScrubRequest::Pause,
        Action::Resume => ScrubRequest::Resume,
        Action::Stop => ScrubRequest::Stop,
        Action::Status => ScrubRequest::Status,
    };
    let mut status = ask(&located, request)?;
    while args.wait && status.run.as_ref().is_some_and(|run| !run.paused) {
        std::thread::sleep(ASK_EVERY);
        status = ask(&located, ScrubRequest::Status)?;
    }
    if args.json {
        text::print_json(&status)?;
    } else {
        text::print(&status_text(&status))?;
    }
    let shown = status.run.as_ref().or(status.last.as_ref());
    let damaged = shown.is_some_and(|run| run.unhealed > 0);
    Ok(if damaged { Exit::Damaged } else { Exit::Done })
}

fn options(args: &ScrubArgs) -> Result<ScrubOptions> {
    let rate = match args.rate.as_deref().map(str::parse::<Limit>).transpose()? {
        Some(Limit::Bytes(rate)) => Some(rate),
        Some(Limit::Percent(_)) => {
            return Err(Error::Refused("--rate takes bytes a second, as 50MiB".into()));
        }
        None => None,
    };
    Ok(ScrubOptions { all: args.all, percent: args.percent, rate })
}

fn ask(located: &Located, request: ScrubRequest) -> Result<ScrubStatus> {
    match located.ask(&Request::Scrub(request))? {
        Response::Scrub(status) => Ok(status),
        _ => Err(unexpected()),
    }
}

/// How a run stands, in one line.
pub(super) fn run_text(run: &ScrubRun) -> String {
    let local = |nanos: i64| text::local_time(&time_text(Timestamp::from_nanos(nanos)));
    let state = match run.ended {
        None if run.paused => "paused".to_string(),
        None => format!("under way, {} % done", percent_done(run)),
        Some(at) if run.stopped => format!("stopped at {}", local(at)),
        Some(at) => format!("ended at {}", local(at)),
    };
    format!("scrub begun at {}: {state}", local(run.began))
}

fn status_text(status: &ScrubStatus) -> String {
    let Some(run) = status.run.as_ref().or(status.last.as_ref()) else {
        return "no scrub was made yet\n".into();
    };
    let mut out = run_text(run) + "\n";
    out.push_str(&format!(
        "{} objects and {} files of history looked at, {} read\n",
        run.objects,
        run.history_files,
        text::size(run.bytes)
    ));
    if run.busy > 0 {
        out.push_str(&format!("{} objects were being changed all the time\n", run.busy));
    }
    out.push_str(&match (run.found, run.unhealed) {
        (0, _) => "no damage found\n".to_string(),
        (found, 0) => format!("{found} found, all healed\n"),
        (found, unhealed) => format!("{found} found, {unhealed} NOT healed\n"),
    });
    run.findings.iter().for_each(|finding| out.push_str(&format!("  {finding}\n")));
    let more = run.found.saturating_sub(run.findings.len() as u64);
    if more > 0 {
        out.push_str(&format!("  and {more} more: see the log\n"));
    }
    out
}

fn percent_done(run: &ScrubRun) -> u64 {
    (u128::from(run.units) * 100 / u128::from(run.goal.max(1))).min(100) as u64
}

//! `rearview replica` and `rearview resync`

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};

use super::locate::{Located, locate, unexpected};
use super::{Exit, status, text};
use crate::control::{Request, Response, client};
use crate::error::{Error, Result};
use crate::report::{PathText, StatusReport};

/// Shown by `--help`.
pub const EXAMPLES: &str = "\
Examples:
  rearview replica list
  rearview replica offline usb-disk                  before the disk is taken away
  rearview replica online usb-disk                   it is back: resync what it missed
  rearview replica replace usb-disk /mnt/new/copy    a new disk in its place
  rearview replica add /mnt/third                    one copy more
  rearview replica remove usb-disk                   one copy less; its files stay there
The mount stays in use meanwhile. A replica is named by its label or by the path of its backing.";
/// Shown by `--help`.
pub const RESYNC_EXAMPLES: &str = "\
Examples:
  rearview resync           look now at every replica that is not in use
  rearview resync --wait    and return when all of them are current";

/// How often a resync that is waited for is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Likewise at the end of `mount`.
const POLL_SHORT: Duration = Duration::from_millis(10);
/// How often whoever waits is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// A resync that takes no longer is part of `mount`, for who looks at the backings right after it.
const SHORT_RESYNC: Duration = Duration::from_secs(3);

/// The commands on replicas.
#[derive(Clone, Debug, Subcommand)]
pub enum ReplicaCommand {
    /// List the replicas and how they are
    #[command(visible_alias = "ls", after_help = "Example:\n  rearview replica list --json")]
    List(ListArgs),
    /// Bring a replica back; what it missed is resynced while the mount is in use
    #[command(after_help = ONLINE_EXAMPLES)]
    Online {
        /// The replica's label, or the path of its backing
        replica: String,
        /// It was changed apart from this mount: what is mounted stays, and what differs there
        /// becomes versions
        #[arg(long)]
        take: bool,
        #[command(flatten)]
        which: Which,
        /// Return when it is current
        #[arg(long)]
        wait: bool,
    },
    /// Take a replica out of use until it is brought back
    #[command(after_help = "Example:\n  rearview replica offline usb-disk\n\n\
                            All is durable on it then, and the disk can be pulled out. To unmount \
                            it while the store is mounted, use 'umount -l'.")]
    Offline {
        /// The replica's label, or the path of its backing
        replica: String,
        #[command(flatten)]
        which: Which,
    },
    /// Give a replica up and fill an empty directory in its place
    #[command(after_help = "Example:\n  rearview replica replace usb-disk /mnt/new/copy")]
    Replace {
        /// The replica's label, or the path of its backing
        old: String,
        /// The empty directory; its last part is made
        new: PathBuf,
        #[command(flatten)]
        which: Which,
        /// Return when it is current
        #[arg(long)]
        wait: bool,
    },
    /// Fill an empty directory as one more replica
    #[command(after_help = "Example:\n  rearview replica add /mnt/third")]
    Add {
        /// The empty directory; its last part is made
        new: PathBuf,
        #[command(flatten)]
        which: Which,
        /// Return when it is current
        #[arg(long)]
        wait: bool,
    },
    /// Give a replica up; its files stay where they are
    #[command(visible_alias = "rm", after_help = "Example:\n  rearview replica remove usb-disk")]
    Remove {
        /// The replica's label, or the path of its backing
        replica: String,
        #[command(flatten)]
        which: Which,
    },
}

const ONLINE_EXAMPLES: &str = "\
Examples:
  rearview replica online usb-disk
  rearview replica online --wait /mnt/usb/copy
  rearview replica online --take /mnt/usb/copy    both were changed: this mount stays live";

/// Which store is meant.
#[derive(Clone, Debug, Args)]
pub struct Which {
    /// Any path in the mount
    #[arg(long, value_name = "PATH", default_value = ".")]
    pub store: PathBuf,
}

/// Arguments of `replica list`.
#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    /// Any path in the mount
    #[arg(default_value = ".")]
    pub path: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `resync`.
#[derive(Clone, Debug, Args)]
pub struct ResyncArgs {
    /// Any path in the mount
    #[arg(default_value = ".")]
    pub path: PathBuf,
    /// Return when every replica is current, or cannot be made so
    #[arg(long)]
    pub wait: bool,
}

/// `rearview replica`
pub fn replica(command: &ReplicaCommand) -> Result<Exit> {
    match command {
        ReplicaCommand::List(args) => {
            let report = ask(&locate(&args.path)?, &Request::Status)?;
            match args.json {
                true => text::print_json(&report)?,
                false => text::print(&status::replicas_text(&report))?,
            }
            Ok(Exit::Done)
        }
        ReplicaCommand::Online { replica, take, which, wait } => {
            let request = Request::ReplicaOnline { replica: named(replica)?, take: *take };
            change(which, &request, *wait)
        }
        ReplicaCommand::Offline { replica, which } => {
            change(which, &Request::ReplicaOffline { replica: named(replica)? }, false)
        }
        ReplicaCommand::Replace { old, new, which, wait } => {
            let request = Request::ReplicaReplace { old: named(old)?, new: path_text(new)? };
            change(which, &request, *wait)
        }
        ReplicaCommand::Add { new, which, wait } => {
            change(which, &Request::ReplicaAdd { new: path_text(new)? }, *wait)
        }
        ReplicaCommand::Remove { replica, which } => {
            change(which, &Request::ReplicaRemove { replica: named(replica)? }, false)
        }
    }
}

/// `rearview resync`
pub fn resync(args: &ResyncArgs) -> Result<Exit> {
    let located = locate(&args.path)?;
    let report = ask(&located, &Request::Resync)?;
    if args.wait {
        return wait_for(&located);
    }
    text::print(&status::replicas_text(&report))?;
    Ok(Exit::Done)
}

fn change(which: &Which, request: &Request, wait: bool) -> Result<Exit> {
    let located = locate(&which.store)?;
    let report = ask(&located, request)?;
    if wait {
        return wait_for(&located);
    }
    text::print(&status::replicas_text(&report))?;
    Ok(Exit::Done)
}

fn ask(located: &Located, request: &Request) -> Result<StatusReport> {
    match located.ask(request)? {
        Response::Status(report) => Ok(report),
        _ => Err(unexpected()),
    }
}

/// The end of `mount`: a short resync is waited for, of a longer one the user is told.
pub(super) fn after_mount(backings: &[PathBuf]) -> Result<()> {
    let begun = Instant::now();
    loop {
        // The mount is there; whether it can be asked is another matter.
        let Ok(Response::Status(report)) = client::ask(backings, &Request::Status) else {
            return Ok(());
        };
        let behind = report.replicas.iter().filter(|replica| replica.is_resyncing());
        let behind: Vec<String> = behind.map(|replica| replica.path.shown()).collect();
        if behind.is_empty() {
            return Ok(());
        }
        if begun.elapsed() > SHORT_RESYNC {
            text::complain(&format!(
                "mounted; {} is not current yet and is resynced meanwhile: 'rearview \
                 status' tells how far that is",
                behind.join(", ")
            ));
            return Ok(());
        }
        std::thread::sleep(POLL_SHORT);
    }
}

/// Waits until no replica is being resynced, or waits for it. [`Exit::Degraded`] if one is not
/// current then.
fn wait_for(located: &Located) -> Result<Exit> {
    let mut told = Instant::now();
    loop {
        let report = ask(located, &Request::Status)?;
        if !report.replicas.iter().any(|replica| replica.is_resyncing()) {
            text::print(&status::replicas_text(&report))?;
            return Ok(if report.degraded { Exit::Degraded } else { Exit::Done });
        }
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            report.replicas.iter().filter_map(status::scan_text).for_each(|line| {
                text::complain(&line);
            });
        }
        std::thread::sleep(POLL);
    }
}

/// A label as it is; a path as the daemon, which is elsewhere, understands it.
fn named(word: &str) -> Result<PathText> {
    match word.contains('/') {
        true => path_text(Path::new(word)),
        false => Ok(PathText::new(word.as_bytes())),
    }
}

fn path_text(path: &Path) -> Result<PathText> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::path::absolute(path).map_err(Error::from_io)?;
    Ok(PathText::new(path.as_os_str().as_bytes()))
}

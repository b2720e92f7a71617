//! The command line: what can be typed, which command does it, and how it ends.
//!
//! The doc comments of the argument structures are the help texts. A command prints its result on
//! standard output and everything else on standard error; `--json` prints one object that carries
//! the version of its form.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::error::{Error, Result};

mod check;
mod exit;
mod history;
mod locate;
mod mount;
mod progress;
mod prune;
mod purge;
mod replica;
mod restore;
mod scrub;
mod shell;
mod snapshot;
mod status;
mod text;
mod undo;
mod who;

pub use exit::Exit;

const TOP_HELP: &str = "\
Examples:
  rearview mount ~/work /mnt/usb/work-copy ~/Rearview
  rearview snapshot create before-cleanup
  rearview diff before-cleanup
  rearview restore before-cleanup notes.txt
  rearview umount ~/Rearview

Exit codes: 0 done, 1 failed, 2 usage, 3 finished but incomplete, \
    10 no such store, 11 in use, 20 degraded, 21 damage found, 130 interrupted.";

/// A mirrored filesystem that keeps every version of every file.
#[derive(Debug, Parser)]
#[command(name = "rearview", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = TOP_HELP)]
pub struct Cli {
    /// Tell more on standard error; twice for debugging
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mount one to eight backing directories as one filesystem
    #[command(after_help = MOUNT_EXAMPLES)]
    #[command(override_usage = "rearview mount [OPTIONS] BACKING... MOUNTPOINT")]
    Mount(MountArgs),
    /// Unmount, and wait until the backings are complete
    #[command(visible_alias = "unmount", after_help = UMOUNT_EXAMPLES)]
    Umount(UmountArgs),
    /// Show the state of a store and of each replica
    #[command(after_help = "Examples:\n  rearview status\n  rearview status --json ~/Rearview")]
    Status(StatusArgs),
    /// Make, list, delete, rename, hold and release snapshots
    #[command(subcommand, after_help = SNAPSHOTS_EXAMPLES)]
    Snapshot(SnapshotCommand),
    /// Show every version of a file or directory
    #[command(after_help = LOG_EXAMPLES)]
    Log(LogArgs),
    /// Show what differs between two moments: + added, - removed, M modified, R renamed
    #[command(after_help = DIFF_EXAMPLES)]
    Diff(DiffArgs),
    /// Bring files and directories back as they were at a moment
    #[command(after_help = RESTORE_EXAMPLES)]
    Restore(RestoreArgs),
    /// Bring deleted files and directories back in their last state
    #[command(
        after_help = "Examples:\n  rearview undelete src/old\n  rearview undelete -n notes.txt"
    )]
    Undelete(UndeleteArgs),
    /// Remove the snapshots that no rule keeps, and tell why each stays or goes
    #[command(after_help = prune::EXAMPLES)]
    Prune(Box<prune::PruneArgs>),
    /// Remove files and directories from all history, for ever; what is live stays as it is
    #[command(after_help = purge::EXAMPLES)]
    Purge(purge::PurgeArgs),
    /// Read every copy of everything, and heal what is damaged
    #[command(after_help = scrub::EXAMPLES)]
    Scrub(scrub::ScrubArgs),
    /// Look whether an unmounted store holds what it promises
    #[command(after_help = check::EXAMPLES)]
    Check(check::CheckArgs),
    /// Take back what one program changed, and nothing else
    #[command(after_help = undo::EXAMPLES)]
    Undo(undo::UndoArgs),
    /// List, add, remove, replace replicas, take them offline and bring them back
    #[command(subcommand, after_help = replica::EXAMPLES)]
    Replica(replica::ReplicaCommand),
    /// Bring every replica that can be reached up to date
    #[command(after_help = replica::RESYNC_EXAMPLES)]
    Resync(replica::ResyncArgs),
    /// Print the completion script of a shell
    #[command(after_help = COMPLETION_EXAMPLES)]
    Completions(CompletionsArgs),
    /// Print the manual page, or write all manual pages into a directory
    #[command(
        after_help = MAN_EXAMPLES
    )]
    Man(ManArgs),
}

const MOUNT_EXAMPLES: &str = "\
Examples:
  rearview mount ~/work /mnt/usb/work-copy ~/Rearview    adopt ~/work, fill the copy, mount
  rearview mount -f -o allow_other /a:/b /mnt            stay in the foreground
  rearview mount --exclude target/ --exclude '*.tmp' /a /b /mnt    mirrored, but no history
  /a:/b /mnt fuse.rearview allow_other,nofail 0 0        in /etc/fstab

Options for -o: allow_other, snapdir=hidden|root|visible|disabled, snapdirname=NAME, fsname=TEXT,
threads=N, io_uring=auto|off, ro, dev, suid, noexec, nosubtype, nonempty, exclude=GLOB (repeatable;
no comma in it); generic options of mount(8) are accepted. Requests come over io_uring, which is
faster, where the administrator allows it: fuse.enable_uring=1 on the kernel's command line, or Y in
/sys/module/fuse/parameters/enable_uring before the mount.

Files .rearviewignore in the tree exclude as --exclude does, with the syntax of .gitignore.";
const UMOUNT_EXAMPLES: &str = "\
Examples:
  rearview umount ~/Rearview           returns when all is on the disks
  rearview umount --lazy ~/Rearview    when programs still use it";
const DIFF_EXAMPLES: &str = "\
Examples:
  rearview diff before-cleanup           from a snapshot to now
  rearview diff monday friday src        between two snapshots, below src
  rearview diff 2h now                   the last two hours";
const RESTORE_EXAMPLES: &str = "\
Examples:
  rearview restore before-cleanup src/old         bring a directory back
  rearview restore -n yesterday .                 show what would change
  rearview restore 2h notes.txt --to /tmp         put the old version elsewhere
A restore is itself a change with history: the state before it can be restored as well.";
const LOG_EXAMPLES: &str = "\
Examples:
  rearview log notes.txt              every version, and who made it
  rearview log --by git src/main.rs   only what git changed
  rearview log --json src/old";
const COMPLETION_EXAMPLES: &str = "\
Examples:
  rearview completions bash > /etc/bash_completion.d/rearview
  rearview completions zsh > ~/.zfunc/_rearview";
const MAN_EXAMPLES: &str = "\
Examples:
  rearview man | man -l -
  rearview man --dir /usr/local/share/man/man1";
const SNAPSHOTS_EXAMPLES: &str = "\
Examples:
  rearview snapshot create before-cleanup
  rearview snapshot list
  rearview snapshot hold before-cleanup
  rearview snapshot delete monday tuesday";
const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  rearview snapshot create before-cleanup
  rearview snapshot create ~/Rearview before-cleanup
  rearview snapshot create --at yesterday as-it-was
  rearview snapshot create --tag release v1.0
  mkdir ~/Rearview/.snapshots/before-cleanup";

/// Arguments of `mount`.
#[derive(Clone, Debug, Args)]
pub struct MountArgs {
    /// Stay in the foreground and log to standard error
    #[arg(short, long)]
    pub foreground: bool,
    /// Mount options, separated by commas
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Make a new store, or let an empty directory take the place of a replica that is lost
    #[arg(long)]
    pub init: bool,
    /// Make no store where there is none; fstab's mounts are such
    #[arg(long, conflicts_with = "init")]
    pub existing_only: bool,
    /// A label for replicas made by this mount
    #[arg(long)]
    pub label: Option<String>,
    /// Keep no history of what matches, by the rules of gitignore from the root; repeatable
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<String>,
    /// Let history yield so that this much stays free on each backing, as 10% or 20GiB; noted in
    /// the store [default at first: 10%]
    #[arg(long, value_name = "SIZE")]
    pub free_limit: Option<String>,
    /// Let history take no more than this on each backing, as 50% or 200GiB; noted in the store
    #[arg(long, value_name = "SIZE")]
    pub history_limit: Option<String>,
    /// Make automatic snapshots so often, while something changes; 0 for never; noted in the store
    /// [default at first: 1h]
    #[arg(long, value_name = "DURATION")]
    pub snapshot_every: Option<String>,
    /// Answer writes with an error while fewer replicas than this are in use [default: 1]
    #[arg(long, value_name = "NUMBER")]
    pub min_replicas: Option<String>,
    /// Scrub a part of the store so often; 0 for never; noted in the store [default at first: 7d]
    #[arg(long, value_name = "DURATION")]
    pub scrub_every: Option<String>,
    /// The backing directories (also as one argument a:b:c; '\:' is a colon) and the mountpoint
    #[arg(required = true, num_args = 2.., value_names = ["BACKING", "MOUNTPOINT"])]
    pub paths: Vec<PathBuf>,
    /// Set on the process that serves a mount in the background
    #[arg(long, hide = true)]
    pub serve_in_background: bool,
    /// A backing that is known not to answer; repeatable
    #[arg(long, hide = true)]
    pub silent: Vec<PathBuf>,
}

/// Arguments of `umount`.
#[derive(Clone, Debug, Args)]
pub struct UmountArgs {
    /// The mountpoint
    pub mountpoint: PathBuf,
    /// Take the mount away at once and end it when its last file is closed
    #[arg(short, long)]
    pub lazy: bool,
}

/// Arguments of `status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Any path in a mount, or a backing
    #[arg(default_value = ".")]
    pub path: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// The commands on snapshots. PATH is any path in the mount, or a backing.
#[derive(Clone, Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Make a snapshot of now, or of an earlier moment
    #[command(after_help = SNAPSHOT_EXAMPLES)]
    Create {
        /// A PATH if not the current directory, and a NAME; without one it is called by its UTC
        /// time
        #[arg(num_args = 0..=2, value_name = "PATH|NAME")]
        words: Vec<OsString>,
        /// The moment: 2h, yesterday, 2026-11-22 19:30, @1795375800, or a snapshot
        #[arg(long)]
        at: Option<String>,
        /// Give it a tag; may be said several times, or with commas
        #[arg(long = "tag", value_name = "TAG", value_delimiter = ',')]
        tags: Vec<String>,
        /// Mark it as made by a schedule
        #[arg(long, hide = true)]
        automatic: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List the snapshots, oldest first
    #[command(visible_alias = "ls", after_help = "Example:\n  rearview snapshot list --json")]
    List {
        /// Any path in the mount, or a backing
        #[arg(default_value = ".")]
        path: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Forget snapshots; what only they show may go when space is needed
    #[command(visible_alias = "rm", after_help = "Example:\n  rearview snapshot delete monday")]
    Delete {
        /// A PATH if not the current directory, then NAME...
        #[arg(required = true, num_args = 1.., value_name = "PATH|NAME")]
        words: Vec<OsString>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Rename a snapshot
    #[command(
        visible_alias = "mv",
        after_help = "Example:\n  rearview snapshot rename monday start"
    )]
    Rename {
        /// A PATH if not the current directory, then FROM TO
        #[arg(required = true, num_args = 2..=3, value_name = "PATH|NAME")]
        words: Vec<OsString>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Keep snapshots from being deleted
    #[command(after_help = "Example:\n  rearview snapshot hold before-cleanup")]
    Hold {
        /// A PATH if not the current directory, then NAME...
        #[arg(required = true, num_args = 1.., value_name = "PATH|NAME")]
        words: Vec<OsString>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Let held snapshots be deleted again
    #[command(after_help = "Example:\n  rearview snapshot release before-cleanup")]
    Release {
        /// A PATH if not the current directory, then NAME...
        #[arg(required = true, num_args = 1.., value_name = "PATH|NAME")]
        words: Vec<OsString>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Arguments of `log`.
#[derive(Clone, Debug, Args)]
pub struct LogArgs {
    /// A file or directory in the mount or a backing; it need not exist any more
    pub path: PathBuf,
    /// Only what this command changed; also pid:NUMBER, uid:NUMBER and user:NAME
    #[arg(long, value_name = "COMMAND")]
    pub by: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `diff`.
#[derive(Clone, Debug, Args)]
pub struct DiffArgs {
    /// A snapshot, 'now', or a time
    pub a: String,
    /// B and PATH, both optional: the second moment (default: now), and below which path to look
    #[arg(num_args = 0..=2, value_name = "B|PATH")]
    pub rest: Vec<OsString>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What a restore does with a file that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Overwrite {
    /// Replace it
    Always,
    /// Replace it if it differs
    IfChanged,
    /// Replace it if the restored one is newer
    IfNewer,
    /// Leave it
    Never,
}

/// Arguments of `restore`.
#[derive(Clone, Debug, Args)]
pub struct RestoreArgs {
    /// The snapshot, or a time: 2h, yesterday, 2026-11-22 19:30, @1795375800
    #[arg(value_name = "SNAPSHOT|TIME")]
    pub moment: String,
    /// Files and directories in the mount, by the paths they had then
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Restore into this directory instead of where it was
    #[arg(long, value_name = "DIR")]
    pub to: Option<PathBuf>,
    /// Print what would be done, and do nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// What to do with files that are there already
    #[arg(long, value_enum, default_value = "if-changed")]
    pub overwrite: Overwrite,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `undelete`.
#[derive(Clone, Debug, Args)]
pub struct UndeleteArgs {
    /// Files and directories in the mount, by the paths they had
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Print what would be done, and do nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `completions`.
#[derive(Clone, Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}

/// Arguments of `man`.
#[derive(Clone, Debug, Args)]
pub struct ManArgs {
    /// Write a page for each command into this directory
    #[arg(long)]
    pub dir: Option<PathBuf>,
}

/// Parses the process's arguments, does the command, and tells how it ended.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let parsed = match mount::helper_arguments(&arguments) {
        Some(Ok(args)) => Ok(Cli { verbose: 0, command: Command::Mount(args) }),
        Some(Err(error)) => {
            text::complain(&error.to_string());
            return ExitCode::from(Exit::Usage as u8);
        }
        None => Cli::try_parse_from(arguments),
    };
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come as "errors" that belong on standard output.
            let code = if error.use_stderr() { Exit::Usage } else { Exit::Done };
            let _ = error.print();
            return ExitCode::from(code as u8);
        }
    };
    match run(cli) {
        Ok(exit) => ExitCode::from(exit as u8),
        Err(error) => report(&error),
    }
}

fn run(cli: Cli) -> Result<Exit> {
    let verbose = cli.verbose;
    if !matches!(cli.command, Command::Mount(_)) {
        crate::daemon::log::to_stderr(verbose);
    }
    match cli.command {
        Command::Mount(args) => mount::mount(args, verbose),
        Command::Umount(args) => mount::umount(&args),
        Command::Status(args) => status::status(&args),
        Command::Snapshot(command) => snapshot::run(command),
        Command::Log(args) => history::log(&args),
        Command::Diff(args) => history::diff(&args),
        Command::Restore(args) => restore::restore(&args),
        Command::Undelete(args) => restore::undelete(&args),
        Command::Prune(args) => prune::prune(*args),
        Command::Purge(args) => purge::purge(&args),
        Command::Replica(command) => replica::replica(&command),
        Command::Resync(args) => replica::resync(&args),
        Command::Scrub(args) => scrub::scrub(&args),
        Command::Check(args) => check::check(&args),
        Command::Undo(args) => undo::undo(&args),
        Command::Completions(args) => shell::completions(&args),
        Command::Man(args) => shell::man(&args),
    }
}

fn report(error: &Error) -> ExitCode {
    // A reader that has seen enough ("| head") is no failure to speak of.
    if let Error::Io { source, .. } = error
        && source.kind() == std::io::ErrorKind::BrokenPipe
    {
        return ExitCode::from(Exit::Failed as u8);
    }
    text::complain(&error.to_string());
    ExitCode::from(Exit::from(error) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_tree_of_commands_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_error_has_its_exit_code() {
        let table = [
            (Error::Posix(rustix::io::Errno::NOENT), 1),
            (Error::Refused(String::new()), 1),
            (Error::NotFound(String::new()), 1),
            (Error::NoStore(String::new()), 10),
            (Error::InUse(String::new()), 11),
            (Error::Damaged { what: String::new(), detail: String::new(), remedy: "" }, 21),
            (Error::Interrupted, 130),
        ];
        for (error, code) in table {
            assert_eq!(Exit::from(&error) as u8, code, "{error:?}");
        }
        assert_eq!([Exit::Done as u8, Exit::Usage as u8, Exit::Incomplete as u8], [0, 2, 3]);
        assert_eq!(Exit::Degraded as u8, 20);
    }

    #[test]
    fn a_mount_takes_backings_options_and_a_mountpoint() {
        let cli = parse("rearview mount -f -o a,b -o c /x /y /m").unwrap();
        let Command::Mount(args) = cli.command else { panic!() };
        assert!(args.foreground);
        assert_eq!(args.options, ["a,b", "c"]);
        assert_eq!(args.paths.len(), 3);
        assert!(parse("rearview mount /x").is_err());
        assert!(parse("rearview mount").is_err());
    }

    #[test]
    fn commands_and_their_words_are_taken() {
        for line in [
            "rearview status",
            "rearview status --json /m",
            "rearview umount --lazy /m",
            "rearview snapshot create",
            "rearview snapshot create /m x --at 2h --tag a,b --tag c",
            "rearview snapshot rename a b",
            "rearview snapshot rename /m a b --json",
            "rearview snapshot delete a b c",
            "rearview log x",
            "rearview diff a",
            "rearview diff a now src",
            "rearview restore -n --overwrite if-newer 2h x y --to /d",
            "rearview undelete x",
            "rearview log --by cp x",
            "rearview undo --by cp --since 2h",
            "rearview undo src --by pid:3 --since 2h -n --force --json",
            "rearview completions fish",
            "rearview man --dir /d",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
        for line in [
            "rearview",
            "rearview undo --by x",
            "rearview nonsense",
            "rearview diff",
            "rearview restore x",
            "rearview log",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn every_command_has_help_with_an_example() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{} has no help", command.get_name());
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{}", command.get_name());
            command.get_subcommands().filter(|sub| sub.get_name() != "help").for_each(check);
        }
        let mut command = Cli::command();
        command.build();
        let help = command.render_long_help().to_string();
        assert!(help.contains("Exit codes") && help.contains("undelete"));
        command.get_subcommands().filter(|sub| sub.get_name() != "help").for_each(check);
    }
}

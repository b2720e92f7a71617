//! `rearview undo`: takes back what one program changed, by plain system calls in the mount, as the
//! user who asks. So it needs no right that doing it by hand would not need, and is itself a change
//! with history.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use rustix::fs::{AtFlags, Mode, RenameFlags};
use serde::Serialize;

use super::locate::{locate, unexpected};
use super::restore::attributes::{self, Place};
use super::restore::copy::{self, Copier};
use super::restore::{Mount, View, open, stop_on_signals};
use super::who::Users;
use super::{Exit, Overwrite, progress, text};
use crate::control::{Request, Response};
use crate::error::{Error, IoContext, Result};
use crate::report::undo::{UndoAction, UndoConflict, UndoPlan, UndoStep};
use crate::report::{MomentText, PathText};
use crate::types::{RelPath, escape};

/// Of its help.
pub const EXAMPLES: &str = "\
Examples:
  rearview undo -n --by cleanup.sh --since 1h         show what would be taken back
  rearview undo --by cleanup.sh --since 1h            take it back
  rearview undo src --by pid:4711 --since yesterday   of one process, below src
  rearview undo --by user:alice --since before-work   of one user, since a snapshot
What others changed since then is left as it is and named; --force takes that back as well.
An undo is itself a change with history: rearview undo --by rearview takes it back.";

/// Arguments of `undo`.
#[derive(Clone, Debug, Args)]
pub struct UndoArgs {
    /// Below which path in the mount
    #[arg(default_value = ".")]
    pub path: PathBuf,
    /// Whose changes: a command's name as 'rearview log' shows it, pid:NUMBER, uid:NUMBER or
    /// user:NAME
    #[arg(long, value_name = "COMMAND")]
    pub by: String,
    /// Changes after this: 2h, yesterday, 2026-11-22 19:30, @1795375800, or a snapshot
    #[arg(long, value_name = "SNAPSHOT|TIME")]
    pub since: String,
    /// Print what would be done, and do nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Take back as well what others changed since
    #[arg(long)]
    pub force: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct UndoReport<'a> {
    dry_run: bool,
    done: Vec<&'a UndoStep>,
    conflicts: &'a [UndoConflict],
    failed: Vec<Failed<'a>>,
}

#[derive(Serialize)]
struct Failed<'a> {
    #[serde(flatten)]
    path: &'a PathText,
    error: String,
}

/// `rearview undo`
pub fn undo(args: &UndoArgs) -> Result<Exit> {
    let stop = stop_on_signals()?;
    let users = Users::read();
    let who = users.who(&args.by)?;
    let located = locate(&args.path)?;
    let mount = Mount::of(&located)?;
    let request = Request::UndoPlan {
        path: PathText::from(&located.path),
        who,
        since: MomentText::new(&args.since),
        force: args.force,
    };
    let Response::UndoPlan(plan) = located.ask(&request)? else { return Err(unexpected()) };
    let mut outcomes: Vec<std::result::Result<(), String>> = Vec::new();
    let mut interrupted = false;
    if args.dry_run {
        outcomes.extend(plan.steps.iter().map(|_| Ok(())));
    } else if !plan.steps.is_empty() {
        let snapdir = mount.snapdir()?.to_path_buf();
        // They are forgotten when they are dropped, however this function ends.
        let mut views = Vec::new();
        for (number, &generation) in plan.views.iter().enumerate() {
            let request = |name| Request::SnapshotView { name, generation };
            views.push(View::make(located.clone(), ("undo", number), request)?);
        }
        let names = views.iter().map(|view| snapdir.join(view.name()));
        let progress = progress::on_terminal(stop.clone());
        progress.begin("taking back", plan.steps.len() as u64, 0);
        let mut work = Work {
            root: open(&mount.root).context("open", &mount.root)?,
            views: names.map(|path| open(&path).context("open", &path)).collect::<Result<_>>()?,
            copier: Copier::new(Overwrite::IfChanged, false, &progress),
            shown: mount.root.clone(),
            stop,
        };
        for step in &plan.steps {
            match work.step(step) {
                Err(Trouble::Stopped) => {
                    interrupted = true;
                    break;
                }
                Err(Trouble::Failed(text)) => outcomes.push(Err(text)),
                Ok(()) => outcomes.push(Ok(())),
            }
        }
        progress.end();
    }
    let exit = tell(args, &plan, &outcomes, &users)?;
    if interrupted { Err(Error::Interrupted) } else { Ok(exit) }
}

/// Why a step was not done.
enum Trouble {
    Failed(String),
    Stopped,
}

impl From<rustix::io::Errno> for Trouble {
    fn from(errno: rustix::io::Errno) -> Trouble {
        Trouble::Failed(std::io::Error::from(errno).to_string())
    }
}

/// An undo under way.
struct Work<'a> {
    root: OwnedFd,
    views: Vec<OwnedFd>,
    copier: Copier<'a>,
    shown: PathBuf,
    stop: Arc<AtomicBool>,
}

impl Work<'_> {
    fn step(&mut self, step: &UndoStep) -> std::result::Result<(), Trouble> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Trouble::Stopped);
        }
        let path = parsed(&step.path)?;
        let (dir, name) = open_parent(self.root.as_fd(), &path)?;
        let at = Place { dir: dir.as_fd(), name: Path::new(&name).as_os_str() };
        match step.action {
            UndoAction::Remove => rustix::fs::unlinkat(&dir, at.name, AtFlags::empty())?,
            UndoAction::RemoveDir => rustix::fs::unlinkat(&dir, at.name, AtFlags::REMOVEDIR)?,
            // Its own mode comes last: it may forbid what is to be done in it.
            UndoAction::MakeDir => {
                rustix::fs::mkdirat(&dir, at.name, Mode::from_raw_mode(0o700))?;
            }
            UndoAction::Rename | UndoAction::Exchange => {
                let to = step.to.as_ref().ok_or_else(incomplete)?;
                let (to_dir, to_name) = open_parent(self.root.as_fd(), &parsed(to)?)?;
                let flags = match step.action {
                    UndoAction::Exchange => RenameFlags::EXCHANGE,
                    // What came there meanwhile is not replaced.
                    _ => RenameFlags::NOREPLACE,
                };
                rustix::fs::renameat_with(&dir, at.name, &to_dir, &to_name, flags)?;
            }
            UndoAction::Link => {
                let file = step.to.as_ref().ok_or_else(incomplete)?;
                let (of, file) = open_parent(self.root.as_fd(), &parsed(file)?)?;
                rustix::fs::linkat(&of, &file, &dir, at.name, AtFlags::empty())?;
            }
            UndoAction::Restore
            | UndoAction::Recreate
            | UndoAction::Attributes
            | UndoAction::Times => self.copy(step, at, &path)?,
        }
        Ok(())
    }

    fn copy(
        &mut self,
        step: &UndoStep,
        to: Place<'_>,
        path: &RelPath,
    ) -> std::result::Result<(), Trouble> {
        let (view, source) = step.source.as_ref().ok_or_else(incomplete)?;
        let view = self.views.get(*view).ok_or_else(incomplete)?;
        let (dir, name) = open_parent(view.as_fd(), &parsed(source)?)?;
        let from = Place { dir: dir.as_fd(), name: Path::new(&name).as_os_str() };
        match step.action {
            UndoAction::Attributes => attributes::copy(from, &from.stat()?, to)?,
            // Another user's directory keeps the time that the undo gave it.
            UndoAction::Times => {
                let _ = attributes::copy_times(&from.stat()?, to);
            }
            _ => {
                let shown = self.shown.join(std::ffi::OsStr::from_bytes(&path.to_bytes()));
                let before = self.copier.items.len();
                self.copier.restore(from, Some(to), &shown).map_err(|_| Trouble::Stopped)?;
                let items = self.copier.items.iter().skip(before);
                if let Some(error) = items.filter_map(|item| item.outcome.as_ref().err()).next() {
                    return Err(Trouble::Failed(error.clone()));
                }
            }
        }
        Ok(())
    }
}

fn incomplete() -> Trouble {
    Trouble::Failed("its earlier state cannot be found".into())
}

fn parsed(path: &PathText) -> std::result::Result<RelPath, Trouble> {
    path.bytes().and_then(|bytes| RelPath::parse(bytes).ok()).ok_or_else(incomplete)
}

/// The directory that a path lies in, and its name there. No symlink is followed below the root.
fn open_parent(
    root: BorrowedFd<'_>,
    path: &RelPath,
) -> std::result::Result<(OwnedFd, std::ffi::OsString), Trouble> {
    let mut dir = copy::open_dir(root, std::ffi::OsStr::new("."))?;
    let Some((parents, name)) = path.split_last() else { return Ok((dir, ".".into())) };
    for name in parents.names() {
        dir = copy::open_dir(dir.as_fd(), name.as_os_str())?;
    }
    Ok((dir, name.as_os_str().to_os_string()))
}

fn tell(
    args: &UndoArgs,
    plan: &UndoPlan,
    outcomes: &[std::result::Result<(), String>],
    users: &Users,
) -> Result<Exit> {
    let told = |step: &&UndoStep| step.action != UndoAction::Times;
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for (step, outcome) in plan.steps.iter().zip(outcomes) {
        match outcome {
            Ok(()) => done.push(step),
            Err(error) => failed.push(Failed { path: &step.path, error: error.clone() }),
        }
    }
    for Failed { path, error } in &failed {
        text::complain(&format!("{}: {error}", path.shown()));
    }
    for conflict in &plan.conflicts {
        text::complain(&conflict_text(conflict, users));
    }
    let exit = match (failed.is_empty() && plan.conflicts.is_empty(), !done.iter().any(told)) {
        (true, _) => Exit::Done,
        (false, false) => Exit::Incomplete,
        (false, true) => Exit::Failed,
    };
    if args.json {
        let (dry_run, conflicts) = (args.dry_run, plan.conflicts.as_slice());
        text::print_json(&UndoReport { dry_run, done, conflicts, failed })?;
        return Ok(exit);
    }
    let mut lines = String::new();
    done.retain(told);
    for step in &done {
        let would = if args.dry_run { "would " } else { "" };
        let to = step.to.as_ref().filter(|_| step.action != UndoAction::Link);
        let to = to.map(|to| format!(" -> {}", to.shown())).unwrap_or_default();
        let verb = verb(step.action, args.dry_run);
        lines.push_str(&format!("{would}{verb} {}{to}\n", step.path.shown()));
    }
    if done.is_empty() && exit == Exit::Done {
        let by = escape(args.by.as_bytes());
        let since = text::local_time(&plan.since.time);
        lines.push_str(&format!("nothing to take back: {by} left no change since {since}\n"));
    }
    text::print(&lines)?;
    Ok(exit)
}

fn conflict_text(conflict: &UndoConflict, users: &Users) -> String {
    let path = conflict.path.shown();
    match &conflict.time {
        Some(time) => format!(
            "{path}: changed since by {} at {}; left as it is, --force takes that back as well",
            conflict.by.as_ref().map_or("nobody known".into(), |by| users.show(Some(by))),
            text::local_time(time)
        ),
        None => format!("{path}: {}; left as it is", conflict.why),
    }
}

fn verb(action: UndoAction, plain: bool) -> &'static str {
    match (action, plain) {
        (UndoAction::Remove | UndoAction::RemoveDir, true) => "remove",
        (UndoAction::Remove | UndoAction::RemoveDir, false) => "removed",
        (UndoAction::MakeDir | UndoAction::Recreate | UndoAction::Link, true) => "bring back",
        (UndoAction::MakeDir | UndoAction::Recreate | UndoAction::Link, false) => "brought back",
        (UndoAction::Rename, true) => "rename",
        (UndoAction::Rename, false) => "renamed",
        (UndoAction::Exchange, true) => "exchange",
        (UndoAction::Exchange, false) => "exchanged",
        (UndoAction::Restore, true) => "restore",
        (UndoAction::Restore, false) => "restored",
        (UndoAction::Attributes | UndoAction::Times, true) => "adjust",
        (UndoAction::Attributes | UndoAction::Times, false) => "adjusted",
    }
}

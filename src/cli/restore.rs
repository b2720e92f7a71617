//! `rearview restore` and `undelete`: plain copying within the mount, from the folders of the past
//! to the live tree, as the user who asks. So it needs no right that `cp` would not need, and is
//! itself a change with history.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use super::locate::{Located, locate, unexpected};
use super::{Exit, Overwrite, RestoreArgs, UndeleteArgs, progress, text};
use crate::control::Request;
use crate::error::{Error, IoContext, Result};
use crate::mountpoint::show;
use crate::report::{self, PathText};
use crate::time::{Zone, local, parse_instant};
use crate::types::{RelPath, Timestamp};
use attributes::Place;
use copy::{Copier, Deed, Stopped};

pub mod attributes;
pub mod copy;

/// The folder of moments in the folder of snapshots.
const AT_DIR: &str = ".at";
/// The folder of snapshots, where the daemon may not be asked what it is called.
const SNAPDIR_DEFAULT: &str = ".snapshots";

/// What is to be copied whereto.
struct Job {
    /// The root of the past tree.
    past: PathBuf,
    /// The root of the live tree.
    live: PathBuf,
    /// Below both roots.
    path: RelPath,
}

/// A path that was asked for and could not be restored at all.
struct Failure {
    path: PathBuf,
    error: Error,
}

/// `rearview restore`
pub fn restore(args: &RestoreArgs) -> Result<Exit> {
    let stop = stop_on_signals()?;
    let prepare = |path: &PathBuf| -> Result<Job> {
        let located = locate(path)?;
        let mount = Mount::of(&located)?;
        let past = mount.past(&args.moment)?;
        Ok(Job { past, live: mount.root, path: located.path })
    };
    let (jobs, failures) = prepare_all(&args.paths, prepare)?;
    let plan = Plan { to: args.to.as_deref(), dry_run: args.dry_run, overwrite: args.overwrite };
    run(&jobs, failures, &plan, stop, args.json)
}

/// `rearview undelete`
pub fn undelete(args: &UndeleteArgs) -> Result<Exit> {
    let stop = stop_on_signals()?;
    let plan = Plan { to: None, dry_run: args.dry_run, overwrite: Overwrite::Never };
    // They are forgotten when they are dropped, however this function ends.
    let mut views = Vec::new();
    let prepare = |path: &PathBuf| -> Result<Job> {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let located = locate(path)?;
        let mount = Mount::of(&located)?;
        let snapdir = mount.snapdir()?.to_path_buf();
        let path = located.path.clone();
        let request = |name| Request::SnapshotLastSeen { name, path: PathText::from(&path) };
        let view = View::make(located, ("undelete", views.len()), request)?;
        let job = Job { past: snapdir.join(view.name()), live: mount.root, path: path.clone() };
        views.push(view);
        Ok(job)
    };
    let (jobs, failures) = prepare_all(&args.paths, prepare)?;
    run(&jobs, failures, &plan, stop.clone(), args.json)
}

/// Prepares each path; one that cannot be does not keep the others from their restore.
fn prepare_all(
    paths: &[PathBuf],
    mut prepare: impl FnMut(&PathBuf) -> Result<Job>,
) -> Result<(Vec<Job>, Vec<Failure>)> {
    let (mut jobs, mut failures) = (Vec::new(), Vec::new());
    for path in paths {
        match prepare(path) {
            Ok(job) => jobs.push(job),
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(error) => failures.push(Failure { path: path.clone(), error }),
        }
    }
    Ok((jobs, failures))
}

/// A snapshot of the moment before something was changed, for as long as that is brought back.
pub struct View {
    located: Located,
    name: String,
}

impl View {
    /// Makes it by the request that `request` gives for its name: of a purpose and a number.
    pub fn make(
        located: Located,
        (purpose, number): (&str, usize),
        request: impl FnOnce(String) -> Request,
    ) -> Result<View> {
        let time = crate::time::version_name(Timestamp::now(), true);
        let name = format!("{purpose}-{time}-{}-{number}", std::process::id());
        // Before it is asked for: the answer may be lost after the snapshot was made.
        let view = View { located, name };
        view.located.ask(&request(view.name.clone()))?;
        Ok(view)
    }

    /// The snapshot's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for View {
    fn drop(&mut self) {
        match self.located.ask(&Request::SnapshotDelete { name: self.name.clone() }) {
            // It was not made.
            Ok(_) | Err(Error::NotFound(_) | Error::NoStore(_)) => {}
            Err(error) => log::warn!("cannot forget the snapshot {}: {error}", self.name),
        }
    }
}

/// The mount that a restore works in.
pub struct Mount {
    /// Where it is.
    pub root: PathBuf,
    /// The folder of snapshots; `None` if this mount shows none.
    snapdir: Option<PathBuf>,
}

impl Mount {
    /// The mount of what was located.
    pub fn of(located: &Located) -> Result<Mount> {
        let bytes = |text: &PathText| text.bytes().map(std::ffi::OsString::from_vec);
        match located.daemon() {
            Ok(info) => {
                let root = bytes(&info.mountpoint).map(PathBuf::from).ok_or_else(unexpected)?;
                let name = bytes(&info.snapdir_name).ok_or_else(unexpected)?;
                let snapdir = info.snapdir_enabled.then(|| root.join(name));
                Ok(Mount { root, snapdir })
            }
            // Another user's mount: the folders are open to us all the same.
            Err(Error::Refused(_)) if located.mountpoint.is_some() => {
                let root = located.mountpoint.clone().unwrap_or_default();
                let snapdir = Some(root.join(SNAPDIR_DEFAULT));
                Ok(Mount { root, snapdir })
            }
            Err(error) => Err(error),
        }
    }

    /// Its folder of snapshots.
    pub fn snapdir(&self) -> Result<&Path> {
        self.snapdir.as_deref().ok_or_else(|| {
            Error::Refused(format!(
                "{} is mounted with snapdir=disabled, so nothing can be read from the past; \
                 unmount, then mount without that option",
                show(&self.root)
            ))
        })
    }

    /// The tree of a snapshot, or of a time.
    fn past(&self, moment: &str) -> Result<PathBuf> {
        let snapdir = self.snapdir()?;
        let named = snapdir.join(moment);
        let is_name = !moment.contains('/') && !moment.starts_with('.') && !moment.is_empty();
        if is_name && std::fs::metadata(&named).is_ok() {
            return Ok(named);
        }
        let now = Timestamp::now();
        match parse_instant(moment, now, Zone::Local) {
            Ok(time) if time > now => {
                Err(Error::Refused(format!("{} lies in the future", local(time))))
            }
            Ok(time) => {
                let at = snapdir.join(AT_DIR).join(format!("@{}", unix_text(time)));
                std::fs::metadata(&at).map_err(|_| {
                    Error::NotFound(format!(
                        "{} is before the beginning of this history",
                        local(time)
                    ))
                })?;
                Ok(at)
            }
            Err(_) => {
                let names = std::fs::read_dir(snapdir).context("list", snapdir)?;
                let names =
                    names.flatten().filter_map(|entry| entry.file_name().into_string().ok());
                let names: Vec<String> = names.collect();
                Err(report::no_snapshot(moment, names.iter().map(String::as_str)))
            }
        }
    }
}

/// Seconds since 1970 with nine digits, so that no instant is rounded.
fn unix_text(time: Timestamp) -> String {
    if time.secs >= 0 || time.nanos == 0 {
        return format!("{}.{:09}", time.secs, time.nanos);
    }
    // Before 1970 the fraction counts away from zero.
    match time.secs + 1 {
        0 => format!("-0.{:09}", 1_000_000_000 - time.nanos),
        secs => format!("{secs}.{:09}", 1_000_000_000 - time.nanos),
    }
}

/// How the jobs are done.
struct Plan<'a> {
    to: Option<&'a Path>,
    dry_run: bool,
    overwrite: Overwrite,
}

#[derive(Serialize)]
struct RestoreReport {
    dry_run: bool,
    restored: Vec<Restored>,
    unchanged: u64,
    failed: Vec<Failed>,
}

#[derive(Serialize)]
struct Restored {
    #[serde(flatten)]
    path: PathText,
    deed: Deed,
}

#[derive(Serialize)]
struct Failed {
    #[serde(flatten)]
    path: PathText,
    error: String,
}

fn run(
    jobs: &[Job],
    mut failures: Vec<Failure>,
    plan: &Plan<'_>,
    stop: Arc<AtomicBool>,
    json: bool,
) -> Result<Exit> {
    let progress = progress::on_terminal(stop);
    progress.begin(if plan.dry_run { "comparing" } else { "restoring" }, 0, 0);
    let mut copier = Copier::new(plan.overwrite, plan.dry_run, &progress);
    let mut interrupted = false;
    for job in jobs {
        match restore_job(&mut copier, job, plan) {
            Ok(()) => {}
            Err(Error::Interrupted) => {
                interrupted = true;
                break;
            }
            Err(error) => failures.push(Failure { path: live_path(&job.live, &job.path), error }),
        }
    }
    progress.end();
    let exit = tell(&copier, &failures, plan, json, interrupted)?;
    if interrupted { Err(Error::Interrupted) } else { Ok(exit) }
}

fn tell(
    copier: &Copier<'_>,
    failures: &[Failure],
    plan: &Plan<'_>,
    json: bool,
    interrupted: bool,
) -> Result<Exit> {
    let mut report = RestoreReport {
        dry_run: plan.dry_run,
        restored: Vec::new(),
        unchanged: copier.unchanged,
        failed: Vec::new(),
    };
    for Failure { path, error } in failures {
        let path = PathText::new(path.as_os_str().as_bytes());
        let error = error.to_string();
        // Several paths may fail for one reason, such as a moment that is not known.
        if report.failed.last().is_none_or(|last| last.error != error) {
            text::complain(&error.to_string());
        }
        report.failed.push(Failed { path, error });
    }
    for item in &copier.items {
        let path = PathText::new(item.path.as_os_str().as_bytes());
        match &item.outcome {
            Ok(deed) => report.restored.push(Restored { path, deed: *deed }),
            Err(error) => {
                text::complain(&format!("{}: {error}", path.shown()));
                report.failed.push(Failed { path, error: error.clone() });
            }
        }
    }
    if json {
        text::print_json(&report)?;
    } else {
        let mut lines = String::new();
        for restored in &report.restored {
            let verb = match (restored.deed, plan.dry_run) {
                (Deed::Created, false) => "restored",
                (Deed::Replaced, false) => "replaced",
                (Deed::Adjusted, false) => "adjusted",
                (Deed::Adjusted, true) => "would adjust",
                (Deed::Created, true) => "would restore",
                (Deed::Replaced, true) => "would replace",
            };
            lines.push_str(&format!("{verb} {}\n", restored.path.shown()));
        }
        if report.restored.is_empty() && report.failed.is_empty() && !interrupted {
            lines.push_str("nothing to restore: all is as it was\n");
        }
        text::print(&lines)?;
    }
    Ok(match failures.first() {
        _ if report.failed.is_empty() => Exit::Done,
        _ if !report.restored.is_empty() => Exit::Incomplete,
        // What failed as a whole tells its own reason, such as that there is no store.
        Some(failure) => Exit::from(&failure.error),
        None => Exit::Failed,
    })
}

fn restore_job(copier: &mut Copier<'_>, job: &Job, plan: &Plan<'_>) -> Result<()> {
    let Some((parents, name)) = job.path.split_last() else {
        return restore_root(copier, job, plan);
    };
    let parent_path = parents.to_bytes();
    let past_parent = job.past.join(OsStr::from_bytes(&parent_path));
    let source = open(&past_parent).map_err(|_| was_not_there(job))?;
    let from = Place { dir: source.as_fd(), name: name.as_os_str() };
    from.stat().map_err(|_| was_not_there(job))?;
    let (target, shown) = match plan.to {
        Some(dir) => (open_target(dir, plan.dry_run)?, dir.to_path_buf()),
        None => (live_parent(job, &parents, plan.dry_run)?, live_path(&job.live, &parents)),
    };
    let to = target.as_ref().map(|dir| Place { dir: dir.as_fd(), name: name.as_os_str() });
    copier.restore(from, to, &shown.join(name.as_os_str()))
}

fn restore_root(copier: &mut Copier<'_>, job: &Job, plan: &Plan<'_>) -> Result<()> {
    let source = open(&job.past).context("open", &job.past)?;
    let (target, shown) = match plan.to {
        Some(dir) => (open_target(dir, plan.dry_run)?, dir.to_path_buf()),
        None => (Some(open(&job.live).context("open", &job.live)?), job.live.clone()),
    };
    if let (None, Some(target)) = (plan.to, &target) {
        let name = OsStr::new(".");
        let (from, to) = (Place { dir: source.as_fd(), name }, Place { dir: target.as_fd(), name });
        return copier.restore(from, Some(to), &shown);
    }
    match copier.restore_entries(source.as_fd(), target.as_ref().map(AsFd::as_fd), &shown) {
        Ok(()) => Ok(()),
        Err(Stopped::By(error)) => Err(error),
        Err(Stopped::Unreadable(errno)) => Err(errno).context("list", &job.past),
    }
}

fn live_path(root: &Path, path: &RelPath) -> PathBuf {
    path.names().iter().fold(root.to_path_buf(), |path, name| path.join(name.as_os_str()))
}

fn was_not_there(job: &Job) -> Error {
    Error::NotFound(format!("{} was not there then; 'rearview log' shows when it was", job.path))
}

/// Opens a directory for naming things in it.
pub fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// The directory of `--to`, made if need be; `None` if a dry run would make it.
fn open_target(dir: &Path, dry_run: bool) -> Result<Option<OwnedFd>> {
    match open(dir) {
        Err(rustix::io::Errno::NOENT) if dry_run => Ok(None),
        Err(rustix::io::Errno::NOENT) => {
            std::fs::create_dir_all(dir).context("make", dir)?;
            Ok(Some(open(dir).context("open", dir)?))
        }
        opened => Ok(Some(opened.context("open", dir)?)),
    }
}

/// The live directory that a path lies in. Missing ones are made, with the attributes they had.
fn live_parent(job: &Job, parents: &RelPath, dry_run: bool) -> Result<Option<OwnedFd>> {
    let mut live = open(&job.live).context("open", &job.live)?;
    let mut past = open(&job.past).context("open", &job.past)?;
    let mut shown = job.live.clone();
    for name in parents.names() {
        let name = name.as_os_str();
        shown.push(name);
        let past_below = copy::open_dir(past.as_fd(), name).map_err(|_| was_not_there(job))?;
        let below = match copy::open_dir(live.as_fd(), name) {
            Err(rustix::io::Errno::NOENT) if dry_run => return Ok(None),
            Err(rustix::io::Errno::NOENT) => {
                let to = Place { dir: live.as_fd(), name };
                let from = Place { dir: past.as_fd(), name };
                rustix::fs::mkdirat(&live, name, Mode::from_raw_mode(0o700))
                    .and_then(|()| attributes::copy(from, &from.stat()?, to))
                    .context("make", &shown)?;
                copy::open_dir(live.as_fd(), name)
            }
            opened => opened,
        };
        live = below.context("open", &shown)?;
        past = past_below;
    }
    Ok(Some(live))
}

/// Ctrl-C ends a restore between two files: each file is whole, old or new.
pub fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, stop.clone()).context("watch for", "signals")?;
    }
    Ok(stop)
}

#[cfg(test)]
mod tests;

//! `rearview mount` and `umount`, also as the helper that mount(8) and fstab call.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::{Exit, MountArgs, UmountArgs, progress, replica, text};
use crate::daemon::{self, MountPlan};
use crate::error::{Error, IoContext, Result};
use crate::excludes::Patterns;
use crate::mountpoint::options::{MountOptions, parse_replicas_min};
use crate::mountpoint::{self, device, show, table};
use crate::store;
use crate::sys::patience;
use crate::types::{PRIVATE_DIR, REPLICAS_MAX};

/// How often the end of a daemon is looked for.
const CLOSE_POLL: Duration = Duration::from_millis(10);
/// After this the user is told what is being waited for.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);
/// After so long without another backing closed, those that are left hang.
const HANG_PATIENCE: Duration = Duration::from_secs(5);
/// After this waiting is given up: every disk hangs.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(600);

/// If we were called as mount(8)'s helper (`mount.fuse.rearview SOURCE TARGET [-sfnv] [-o OPTIONS]
/// [-t TYPE]`): the arguments of `mount` that this means.
pub fn helper_arguments(arguments: &[OsString]) -> Option<Result<MountArgs>> {
    let own = Path::new(arguments.first()?).file_name()?;
    if own != "mount.fuse.rearview" && own != "mount.rearview" {
        return None;
    }
    Some(parse_helper(&arguments[1..]))
}

fn parse_helper(arguments: &[OsString]) -> Result<MountArgs> {
    let usage = || {
        Error::Refused("usage: mount.fuse.rearview SOURCE TARGET [-sfnv] [-o OPTIONS]".to_string())
    };
    let mut paths = Vec::new();
    let mut options = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        match word.as_bytes() {
            b"-o" => {
                let text = words.next().and_then(|text| text.to_str()).ok_or_else(usage)?;
                options.push(text.to_string());
            }
            b"-t" => {
                words.next().ok_or_else(usage)?;
            }
            flags if flags.len() > 1 && flags[0] == b'-' => {
                // Sloppy, fake, no mtab, verbose: nothing of it changes what we do.
                if !flags[1..].iter().all(|flag| b"sfnv".contains(flag)) {
                    return Err(usage());
                }
            }
            _ => paths.push(PathBuf::from(word)),
        }
    }
    if paths.len() != 2 {
        return Err(usage());
    }
    Ok(MountArgs {
        foreground: false,
        options,
        init: false,
        // At boot a disk may be missing: a store must not come into being in its empty mountpoint.
        existing_only: true,
        label: None,
        exclude: Vec::new(),
        free_limit: None,
        history_limit: None,
        snapshot_every: None,
        min_replicas: None,
        scrub_every: None,
        paths,
        serve_in_background: false,
        silent: Vec::new(),
    })
}

/// `rearview mount`
pub fn mount(args: MountArgs, verbose: u8) -> Result<Exit> {
    let plan = match plan(args.clone()) {
        // What the command line alone tells to be wrong.
        Err(error @ Error::Refused(_)) => {
            text::complain(&error.to_string());
            return Ok(Exit::Usage);
        }
        plan => plan?,
    };
    if args.serve_in_background {
        daemon::background::serve(&plan, verbose, progress::on_stderr);
    }
    if args.foreground {
        daemon::log::for_daemon(verbose, true);
        daemon::serve(&plan, progress::on_stderr, |_, _| Ok(()))?;
        return Ok(Exit::Done);
    }
    daemon::log::to_stderr(verbose);
    daemon::background::start(&background_arguments(&plan, verbose))?;
    replica::after_mount(&plan.backings)?;
    Ok(Exit::Done)
}

fn plan(args: MountArgs) -> Result<MountPlan> {
    let mut options = MountOptions::parse(args.options.iter().map(String::as_str))?;
    options.exclude.extend(args.exclude);
    if let Some(limit) = args.free_limit {
        options.free_limit = Some(limit.parse()?);
    }
    if let Some(limit) = args.history_limit {
        options.history_limit = Some(limit.parse()?);
    }
    if let Some(every) = args.snapshot_every {
        options.snapshot_every = Some(every.parse()?);
    }
    if let Some(count) = args.min_replicas {
        options.replicas_min = parse_replicas_min(&count)?;
    }
    if let Some(every) = args.scrub_every {
        options.scrub_every = Some(every.parse()?);
    }
    Patterns::of_globs(&options.exclude)?;
    let mut paths = args.paths;
    let mountpoint = paths.pop().ok_or_else(|| Error::Refused("name a mountpoint".into()))?;
    let (backings, mut silent) = find_backings(&paths, options.timeout)?;
    silent.extend(args.silent);
    let count = backings.len() + silent.len();
    if count == 0 {
        return Err(Error::Refused("name at least one backing directory".into()));
    }
    if count > REPLICAS_MAX {
        return Err(Error::Refused(format!(
            "{count} backings are too many: a store has at most {REPLICAS_MAX}"
        )));
    }
    Ok(MountPlan {
        backings,
        silent,
        mountpoint: std::path::absolute(&mountpoint).context("find", &mountpoint)?,
        options,
        init: args.init,
        existing_only: args.existing_only,
        label: args.label,
    })
}

/// The backings that are meant, resolved, and apart those that do not answer in time.
fn find_backings(paths: &[PathBuf], timeout: Duration) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let looks = paths.iter().cloned().map(|path| move || path.is_dir());
    let dirs = paths.iter().map(PathBuf::as_path).zip(patience::each_within(timeout, looks));
    let dirs: BTreeMap<&Path, Option<bool>> = dirs.collect();
    let given = split_arguments(paths, |path| dirs.get(path) != Some(&Some(false)));
    let (given, mut silent): (Vec<PathBuf>, Vec<PathBuf>) =
        given.into_iter().partition(|path| dirs.get(path.as_path()) != Some(&None));
    let looks = given.iter().cloned().map(|path| move || mountpoint::resolve_existing(&path));
    let mut backings = Vec::new();
    for (path, found) in given.iter().zip(patience::each_within(timeout, looks)) {
        match found {
            // Whether the store can do without it is not known yet.
            Some(Err(error)) if store::is_of_disk(&error) => {
                backings.push(std::path::absolute(path).context("find", path)?);
            }
            Some(resolved) => backings.push(resolved?),
            None => silent.push(path.clone()),
        }
    }
    let absolute = |path: &PathBuf| std::path::absolute(path).context("find", path);
    Ok((backings, silent.iter().map(absolute).collect::<Result<_>>()?))
}

/// Takes each argument apart at its colons, unless it is, as it stands, an existing directory.
fn split_arguments(paths: &[PathBuf], is_dir: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let mut backings = Vec::new();
    for path in paths {
        if is_dir(path) {
            backings.push(path.clone());
        } else {
            backings.extend(table::split_backings(path.as_os_str().as_bytes()));
        }
    }
    backings
}

/// `rearview umount`
pub fn umount(args: &UmountArgs) -> Result<Exit> {
    let target = mountpoint::resolve(&args.mountpoint)?;
    let mounts = table::read()?;
    let mut found = table::mounted_at(&mounts, &target).cloned().map(|entry| (target, entry));
    if found.is_none()
        && let Ok(target) = std::fs::canonicalize(&args.mountpoint)
    {
        // The path may be a symlink to the mountpoint.
        found = table::mounted_at(&mounts, &target).cloned().map(|entry| (target, entry));
    }
    let Some((target, entry)) = found.filter(|(_, entry)| entry.is_rearview()) else {
        return Err(not_a_mountpoint(&args.mountpoint, &mounts));
    };
    match device::unmount(&target, args.lazy) {
        Ok(()) => {}
        Err(error) if error.is(Errno::BUSY) => return Err(busy(&target)),
        Err(error) => return Err(error),
    }
    if args.lazy {
        log::info!("the daemon ends when the last open file is closed");
        return Ok(Exit::Done);
    }
    wait_until_closed(&entry.backings())
}

/// Why a path cannot be unmounted, and what was perhaps meant.
fn not_a_mountpoint(asked: &Path, mounts: &[table::MountEntry]) -> Error {
    let shown = show(asked);
    let resolved = mountpoint::resolve_existing(asked).unwrap_or_else(|_| asked.to_path_buf());
    if let Some(other) = table::mounted_at(mounts, &resolved) {
        let kind = crate::types::escape(other.fs_type.as_bytes());
        return Error::NoStore(format!("what is mounted on {shown} is {kind}, and not a store"));
    }
    let mut ours = mounts.iter().filter(|entry| entry.is_rearview());
    if let Some(entry) = ours.find(|entry| entry.backings().contains(&resolved)) {
        let target = show(&entry.target);
        return Error::NoStore(format!(
            "{shown} is a backing of the mount on {target}: rearview umount {target}"
        ));
    }
    if let Some(entry) = table::containing(mounts, &resolved) {
        let target = show(&entry.target);
        return Error::NoStore(format!(
            "{shown} lies in the mount on {target}: rearview umount {target}"
        ));
    }
    if std::fs::symlink_metadata(&resolved).is_err() {
        return Error::NoStore(format!("{shown} does not exist, so no store is mounted on it"));
    }
    Error::NoStore(format!("no store is mounted on {shown}"))
}

fn busy(target: &Path) -> Error {
    let holders = device::holders(target);
    let who = match holders.as_slice() {
        [] => "by processes that only root can see, or by a mount within it".to_string(),
        holders => format!("by {}", holders.join(", ")),
    };
    Error::InUse(format!(
        "{} is in use {who}; end them, or take the mount away at once with --lazy",
        show(target)
    ))
}

/// Waits until the daemon has let go of the store: then every backing is complete, and its disk can
/// be taken away. A disk on which a call hangs keeps its lock; it is not waited for once the others
/// are closed.
fn wait_until_closed(backings: &[PathBuf]) -> Result<Exit> {
    let begun = Instant::now();
    let mut told = false;
    let mut last_closed: Option<Instant> = None;
    let open = |backing: &PathBuf| {
        let lock = backing.join(PRIVATE_DIR).join("lock");
        let opened = patience::within(HANG_PATIENCE, move || std::fs::File::open(lock));
        // Not ours to look at, gone, or hanging: there is nothing to wait for that could be seen.
        Some((backing.clone(), opened?.ok()?))
    };
    let mut waiting: Vec<_> = backings.iter().filter_map(open).collect();
    loop {
        let before = waiting.len();
        waiting.retain(|(_, file)| {
            rustix::fs::flock(file, FlockOperation::NonBlockingLockShared).is_err()
        });
        if waiting.len() < before {
            last_closed = Some(Instant::now());
        }
        let Some((backing, _)) = waiting.first() else { return Ok(Exit::Done) };
        if last_closed.is_some_and(|at| at.elapsed() > HANG_PATIENCE) {
            text::complain(&format!(
                "{} hangs: it is left as it is, and the store is closed on the others",
                show(backing)
            ));
            return Ok(Exit::Incomplete);
        }
        if begun.elapsed() > CLOSE_TIMEOUT {
            return Err(Error::InUse(format!(
                "the daemon has not finished writing to {}; do not take the disk away",
                show(backing)
            )));
        }
        if !told && begun.elapsed() > CLOSE_PATIENCE {
            text::complain(&format!("waiting until all is written to {}", show(backing)));
            told = true;
        }
        std::thread::sleep(CLOSE_POLL);
    }
}

/// The command line on which the background process gets the plan.
fn background_arguments(plan: &MountPlan, verbose: u8) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["mount".into(), "--serve-in-background".into()];
    words.extend((0..verbose).map(|_| OsString::from("-v")));
    words.extend(["-o".into(), plan.options.to_text().into()]);
    if plan.init {
        words.push("--init".into());
    }
    if plan.existing_only {
        words.push("--existing-only".into());
    }
    words.extend(plan.options.exclude.iter().map(|glob| format!("--exclude={glob}").into()));
    if let Some(label) = &plan.label {
        words.push(format!("--label={label}").into());
    }
    words.extend(plan.silent.iter().flat_map(|path| ["--silent".into(), path.clone().into()]));
    words.push("--".into());
    // One argument with escaped colons: a backing's name may have some, and may not exist yet.
    words.push(OsStr::from_bytes(&table::join_backings(&plan.backings)).into());
    words.push(plan.mountpoint.clone().into());
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn helper(line: &str) -> Option<Result<MountArgs>> {
        helper_arguments(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn fstab_calls_are_understood() {
        let line = "/sbin/mount.fuse.rearview /a:/b /data -n -v -o rw,nofail -t fuse.rearview";
        let args = helper(line).unwrap().unwrap();
        assert_eq!(args.paths, [Path::new("/a:/b"), Path::new("/data")]);
        assert_eq!(args.options, ["rw,nofail"]);
        let plan = plan(args).unwrap();
        assert_eq!(plan.backings, [Path::new("/a"), Path::new("/b")]);
        assert!(helper("/sbin/mount.rearview /a /m -sfnv").unwrap().is_ok());
        assert!(helper("mount.rearview /a").unwrap().is_err());
        assert!(helper("mount.rearview /a /b -x").unwrap().is_err());
        assert!(helper("/usr/bin/rearview mount /a /b").is_none());
    }

    #[test]
    fn an_argument_is_split_at_its_colons() {
        let paths = |text: &str| split_arguments(&[PathBuf::from(text)], |path| path == "/x:y");
        assert_eq!(paths("/a:/b:/c").len(), 3);
        assert_eq!(paths("/a\\:b"), [Path::new("/a:b")]);
        assert_eq!(paths("/x:y"), [Path::new("/x:y")]);
    }

    #[test]
    fn the_background_process_gets_the_same_plan() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let first = MountPlan {
            backings: vec![dir.join("a:b"), dir.join("c\\d")],
            mountpoint: dir.join("m n"),
            options: MountOptions {
                allow_other: true,
                exclude: vec!["*.{o,a}".into(), "!-x".into()],
                ..MountOptions::default()
            },
            init: false,
            existing_only: true,
            label: Some("usb".into()),
            silent: vec![dir.join("gone")],
        };
        let mut words = vec![OsString::from("rearview")];
        words.extend(background_arguments(&first, 2));
        let cli = crate::cli::Cli::try_parse_from(words).unwrap();
        assert_eq!(cli.verbose, 2);
        let crate::cli::Command::Mount(args) = cli.command else { panic!() };
        assert!(args.serve_in_background);
        assert_eq!(plan(args).unwrap(), first);
    }

    #[test]
    fn too_many_backings_are_refused() {
        let all: Vec<String> = (0..9).map(|index| format!("/b{index}")).collect();
        let args = helper(&format!("mount.rearview {} /m", all.join(":"))).unwrap().unwrap();
        assert!(plan(args).unwrap_err().to_string().contains("at most 8"));
    }
}

//! Where a store is mounted: what a mountpoint must be, and the way from a path to its mount.
//!
//! A mountpoint may be neither a backing, nor contain one, nor lie in one: the daemon would wait
//! for itself. A dead mount (its daemon was killed) is cleared once and only if it is ours; a mount
//! that merely does not answer is left alone, unless its daemon was killed, too ([`dying`]).

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;

use crate::error::{Error, IoContext, Result};
use crate::store::is_of_disk;
use crate::types::escape;

pub mod device;
mod dying;
pub mod options;
pub mod table;

pub use dying::end_connection;

/// How long a mount may take to answer before it counts as hanging.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// A path for people: escaped.
pub fn show(path: &Path) -> String {
    escape(path.as_os_str().as_bytes())
}

/// What a mount says when asked for its root's attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pulse {
    /// It answers.
    Alive,
    /// Its daemon is gone.
    Dead,
    /// It has not answered in time.
    Silent,
}

/// Asks `path` for its attributes, in a thread of its own: a hanging mount must not hang us.
pub fn probe(path: &Path, timeout: Duration) -> Pulse {
    let (sender, receiver) = crossbeam_channel::bounded(1);
    let asked = path.to_path_buf();
    let thread = std::thread::Builder::new().name("probe".into()).spawn(move || {
        // What the kernel remembers of a dead mount's root is no sign of life: the daemon must be
        // asked.
        let flags = AtFlags::STATX_FORCE_SYNC;
        let answer = rustix::fs::statx(CWD, &asked, flags, StatxFlags::BASIC_STATS);
        // The receiver is gone after the timeout; the answer interests nobody then.
        let _ = sender.send(answer.err());
    });
    if thread.is_err() {
        return Pulse::Silent;
    }
    match receiver.recv_timeout(timeout) {
        Ok(Some(Errno::NOTCONN | Errno::CONNABORTED)) => Pulse::Dead,
        Ok(_) => Pulse::Alive,
        Err(_) => Pulse::Silent,
    }
}

/// The absolute path with all symlinks resolved, except that the last name is not looked at: it may
/// be a mount that is dead or hangs.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).context("find", path)?;
    match (absolute.parent(), absolute.components().next_back()) {
        (Some(parent), Some(Component::Normal(name))) => Ok(resolve_existing(parent)?.join(name)),
        _ => absolute.canonicalize().context("find", path),
    }
}

/// Resolves as much of a path as exists, up to the first name that is no directory; the rest, which
/// may not exist yet, is appended as it is.
pub fn resolve_existing(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).context("find", path)?;
    let mut missing: Vec<&OsStr> = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        match existing.canonicalize() {
            Ok(resolved) => {
                let rest = missing.iter().rev();
                return Ok(rest.fold(resolved, |path, name| path.join(name)));
            }
            Err(error) => match (error.kind(), existing.parent(), existing.file_name()) {
                // What lay below something that is a file by now is asked for by its old path.
                (ErrorKind::NotFound | ErrorKind::NotADirectory, Some(parent), Some(name)) => {
                    missing.push(name);
                    existing = parent;
                }
                _ => return Err(error).context("find", path),
            },
        }
    }
}

/// A directory that can be mounted on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The directory, resolved.
    pub target: PathBuf,
    /// Whether it was made for the mount.
    pub made: bool,
}

impl Prepared {
    /// Takes the directory away again if it was made for a mount that did not come about.
    pub fn undo(&self) {
        // It fails if something was put there meanwhile, and that is what it should do.
        if self.made && std::fs::remove_dir(&self.target).is_ok() {
            log::info!("removed the mountpoint {} again", show(&self.target));
        }
    }
}

/// Makes sure that `path` can be mounted on. A missing directory is made if its parent exists; a
/// dead mount of ours is cleared, and a daemon ended that was killed and cannot end.
pub fn prepare(path: &Path, backings: &[PathBuf], nonempty: bool) -> Result<Prepared> {
    dying::end(backings);
    let mut target = resolve(path)?;
    if mounted_ours(&target)? {
        clear_or_refuse(&target)?;
    }
    // Only a path that no dead mount covers is safe to look at, and to follow if it is a symlink.
    target = resolve_existing(&target)?;
    if mounted_ours(&target)? {
        clear_or_refuse(&target)?;
    }
    for backing in backings {
        refuse_overlap(&target, backing)?;
    }
    let mut made = false;
    match std::fs::symlink_metadata(&target) {
        Ok(meta) if !meta.is_dir() => {
            return Err(Error::Refused(format!(
                "the mountpoint {} is not a directory; name an empty one",
                show(&target)
            )));
        }
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {
            std::fs::create_dir(&target).map_err(|error| cannot_make(&target, error))?;
            made = true;
            log::info!("made the mountpoint {}", show(&target));
        }
        Err(error) => return Err(error).context("look at the mountpoint", target),
    }
    if !nonempty {
        refuse_entries(&target)?;
    }
    Ok(Prepared { target, made })
}

fn cannot_make(target: &Path, error: std::io::Error) -> Error {
    if error.kind() == ErrorKind::NotFound {
        return Error::Refused(format!(
            "the mountpoint {} does not exist and neither does the directory that it would be in",
            show(target)
        ));
    }
    Error::Io { action: "make the mountpoint", path: target.into(), source: error }
}

fn mounted_ours(target: &Path) -> Result<bool> {
    let table = table::read()?;
    Ok(table::mounted_at(&table, target).is_some_and(table::MountEntry::is_rearview))
}

fn clear_or_refuse(target: &Path) -> Result<()> {
    match probe(target, PROBE_TIMEOUT) {
        Pulse::Alive => Err(Error::InUse(format!(
            "a store is already mounted on {}; 'rearview umount' ends it",
            show(target)
        ))),
        Pulse::Silent => Err(Error::InUse(format!(
            "the mount on {} does not answer; if its daemon hangs, end it, then run \
             'rearview umount --lazy {}'",
            show(target),
            show(target)
        ))),
        Pulse::Dead => {
            log::warn!("clearing the dead mount on {}: its daemon is gone", show(target));
            device::unmount(target, true)
        }
    }
}

fn refuse_entries(target: &Path) -> Result<()> {
    let mut entries = std::fs::read_dir(target).context("look into the mountpoint", target)?;
    if entries.next().is_none() {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "the mountpoint {} is not empty, and the mount would hide what is in it; use an empty \
         directory, or -o nonempty",
        show(target)
    )))
}

/// Refuses a mountpoint that is, contains or lies in a backing, however the two are spelt: both
/// paths are resolved, and directories are compared by device and inode number all the way up, so
/// that a bind mount is seen through.
pub fn refuse_overlap(target: &Path, backing: &Path) -> Result<()> {
    let resolved = match resolve_existing(backing) {
        // The store may do without it.
        Err(error) if is_of_disk(&error) => backing.to_path_buf(),
        other => other?,
    };
    let same = |a: &Path, b: &Path| match (identity(a), identity(b)) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    };
    let relation = if same(target, &resolved) {
        "is the backing itself"
    } else if target.ancestors().skip(1).any(|dir| same(dir, &resolved)) {
        "lies in the backing"
    } else if resolved.ancestors().skip(1).any(|dir| same(dir, target)) {
        "contains the backing"
    } else {
        return Ok(());
    };
    Err(Error::Refused(format!(
        "the mountpoint {} {relation} {}: the daemon would wait for itself; mount on a directory \
         beside it",
        show(target),
        show(backing)
    )))
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let stat = rustix::fs::lstat(path).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(target: &Path, backing: &Path) -> String {
        prepare(target, &[backing.to_path_buf()], false).unwrap_err().to_string()
    }

    #[test]
    fn a_mountpoint_that_touches_a_backing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let backing = dir.path().join("outer/backing");
        std::fs::create_dir_all(backing.join("inner")).unwrap();
        assert!(refusal(&backing, &backing).contains("is the backing itself"));
        assert!(refusal(&backing.join("inner"), &backing).contains("lies in the backing"));
        assert!(refusal(&backing.join("new"), &backing).contains("lies in the backing"));
        assert!(refusal(&dir.path().join("outer"), &backing).contains("contains the backing"));
        // A backing that does not exist yet is compared by its path.
        let target = dir.path().join("outer");
        assert!(refusal(&target, &target.join("x/y")).contains("contains the backing"));
    }

    #[test]
    fn symlinks_do_not_hide_a_backing() {
        let dir = tempfile::tempdir().unwrap();
        let backing = dir.path().join("backing");
        std::fs::create_dir(&backing).unwrap();
        std::os::unix::fs::symlink(&backing, dir.path().join("link")).unwrap();
        assert!(refusal(&dir.path().join("link"), &backing).contains("is the backing itself"));
        assert!(refusal(&dir.path().join("link/m"), &backing).contains("lies in the backing"));
        assert!(refusal(&backing, &dir.path().join("link")).contains("is the backing itself"));
    }

    #[test]
    fn files_and_directories_with_entries_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let backing = dir.path().join("b");
        std::fs::create_dir(&backing).unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        assert!(refusal(&dir.path().join("file"), &backing).contains("not a directory"));
        std::fs::create_dir(dir.path().join("full")).unwrap();
        std::fs::write(dir.path().join("full/x"), "").unwrap();
        assert!(refusal(&dir.path().join("full"), &backing).contains("nonempty"));
        assert!(prepare(&dir.path().join("full"), &[backing], true).is_ok());
    }

    #[test]
    fn a_missing_mountpoint_is_made_only_in_an_existing_directory() {
        let dir = tempfile::tempdir().unwrap();
        let backing = dir.path().join("b");
        let new = prepare(&dir.path().join("new"), std::slice::from_ref(&backing), false).unwrap();
        assert!(new.target.is_dir() && new.made);
        new.undo();
        assert!(!new.target.exists());
        assert!(refusal(&dir.path().join("x/y"), &backing).contains("neither"));
        assert!(!dir.path().join("x").exists());
    }

    #[test]
    fn old_paths_below_a_file_are_kept_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::write(root.join("file"), "").unwrap();
        assert_eq!(resolve(&root.join("file/old/x")).unwrap(), root.join("file/old/x"));
    }

    #[test]
    fn a_live_directory_answers_the_probe() {
        assert_eq!(probe(Path::new("/"), PROBE_TIMEOUT), Pulse::Alive);
    }
}

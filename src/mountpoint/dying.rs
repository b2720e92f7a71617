//! A daemon that was killed while one of its threads waited for an answer of its own mount.
//!
//! The barrier before a snapshot, and taking in foreign edits, go by way of the mount. Killed in
//! that moment the daemon has nobody left who answers, and the kernel lets the thread wait on: the
//! process neither ends nor gives up its locks. Ending the connection from outside frees it.
//!
//! Nothing is touched of a daemon that lives, and may answer yet.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;

use super::table::{self, MountEntry};
use crate::store::lock::{Owner, peek};
use crate::store::site::Site;

/// How long a process may take to end once nothing keeps it.
const END_TIMEOUT: Duration = Duration::from_secs(10);
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Ends what is left of daemons that were killed and still hold one of these backings.
pub fn end(backings: &[PathBuf]) {
    for backing in backings {
        let Some(owner) = dying_owner(backing) else { continue };
        log::warn!(
            "{}: its daemon, process {}, was killed and waits for its own mount; that is ended",
            super::show(backing),
            owner.pid
        );
        let Ok(table) = table::read() else { continue };
        let own = |entry: &&MountEntry| entry.is_rearview() && entry.backings().contains(backing);
        table.iter().filter(own).for_each(abort);
        let deadline = Instant::now() + END_TIMEOUT;
        while dying_owner(backing).is_some() && Instant::now() < deadline {
            std::thread::sleep(LOOK_PAUSE);
        }
    }
}

/// Who holds a backing, if that process has ended but for threads which cannot.
fn dying_owner(backing: &Path) -> Option<Owner> {
    let owner = peek(&Site::open(backing).ok()?).ok()??;
    is_dying(owner.pid).then_some(owner)
}

/// Whether a process was killed and is not gone yet (proc(5)).
fn is_dying(pid: u32) -> bool {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before it is in brackets, and may itself have some.
    let name_end = stat.iter().rposition(|&byte| byte == b')');
    name_end.and_then(|at| stat.get(at + 2)).is_some_and(|state| matches!(state, b'Z' | b'X'))
}

/// Ends the connection of our mount at `target`: all that waits for an answer gets an error, and
/// its daemon closes the store.
pub fn end_connection(target: &Path) {
    let Ok(table) = table::read() else { return };
    let own = |entry: &&MountEntry| entry.is_rearview() && entry.target == target;
    table.iter().filter(own).for_each(abort);
}

/// Ends a mount's connection: all that waits for an answer gets an error.
fn abort(entry: &MountEntry) {
    let switch = format!("/sys/fs/fuse/connections/{}/abort", entry.minor);
    if std::fs::write(switch, "1").is_err() {
        // Where those are not shown. It may well be busy: what counts is that it is ended.
        let flags = UnmountFlags::FORCE | UnmountFlags::NOFOLLOW;
        let _ = rustix::mount::unmount(&entry.target, flags);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_killed_and_is_not_gone_is_told_from_who_lives() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        assert!(!is_dying(pid));
        child.kill().unwrap();
        let deadline = Instant::now() + END_TIMEOUT;
        while !is_dying(pid) && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(is_dying(pid), "it waits to be asked for its end");
        child.wait().unwrap();
        assert!(!is_dying(pid));
    }
}

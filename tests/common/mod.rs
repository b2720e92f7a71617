//! What the end-to-end tests share: the real binary, real mounts, and a clear word when something
//! they need is missing.
//!
//! A test that cannot run fails and says what to install; it never skips silently.
//! `scripts/test` installs everything named here.

#![allow(dead_code, unused_imports)] // Every test crate uses its own part of this module.

pub mod disk;
pub mod fixture;
pub mod json;
pub mod mounted;
pub mod run;
pub mod scrub;
pub mod tree;
pub mod user;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use mounted::Mounted;
pub use run::{Done, run, shell};

/// Where scratch folders live: memory where there is some, else the temporary folder.
pub fn scratch_root() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() }
}

/// A new scratch folder that any user may enter.
pub fn scratch() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::Builder::new()
        .prefix("rearview-test-")
        .tempdir_in(scratch_root())
        .expect("a scratch folder can be made");
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755))
        .expect("our own folder's mode can be set");
    folder
}

/// Waits until `condition` holds; fails with `what` when it does not within `seconds`.
#[track_caller]
pub fn wait_until(what: &str, seconds: u64, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < deadline, "waited {seconds} s in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Fails with what to install unless every one of `tools` is on the PATH, we are root and
/// `/dev/fuse` is there.
#[track_caller]
pub fn need(tools: &[&str]) {
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests need root: run `sudo -E cargo test` or `scripts/test`"
    );
    assert!(Path::new("/dev/fuse").exists(), "these tests need /dev/fuse: `modprobe fuse`");
    for tool in tools {
        let found = std::env::var_os("PATH").is_some_and(|path| {
            std::env::split_paths(&path)
                .chain([PathBuf::from("/sbin"), PathBuf::from("/usr/sbin")])
                .any(|folder| folder.join(tool).exists())
        });
        assert!(found, "these tests need {tool}: `scripts/test` installs it");
    }
}

/// The mounts under `path` (itself included), as `/proc/self/mountinfo` has them:
/// mount point and filesystem type.
pub fn mounts_at(path: &Path) -> Vec<(PathBuf, String)> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo is readable");
    table
        .lines()
        .filter_map(|line| {
            let point = PathBuf::from(line.split(' ').nth(4)?.replace("\\040", " "));
            let kind = line.split(" - ").nth(1)?.split(' ').next()?.to_owned();
            point.starts_with(path).then_some((point, kind))
        })
        .collect()
}

/// The process that serves the mount at `mount_point`: the one of our binary whose command line
/// names it.
pub fn daemon_of(mount_point: &Path) -> Option<u32> {
    use std::os::unix::ffi::OsStrExt;
    let wanted = mount_point.as_os_str().as_bytes();
    for entry in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        // A daemon in the background was started anew by its path in /proc: its program tells.
        let program = std::fs::read_link(entry.path().join("exe")).unwrap_or_default();
        let program = program.file_name().unwrap_or_default().as_bytes().to_owned();
        let ours = program == b"rearview" || program.starts_with(b"rearview ");
        let serves =
            words.iter().any(|word| *word == b"mount" || word.ends_with(b"mount.fuse.rearview"));
        if ours && serves && words.contains(&wanted) && !has_ended(pid) {
            return Some(pid);
        }
    }
    None
}

/// Whether the process has ended with all its threads, reaped or not: only then has it given back
/// what it had open. A command line is gone before that, and the first thread may be, too.
pub fn has_ended(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    threads.flatten().all(|thread| {
        // A thread whose state cannot be read any more is gone.
        std::fs::read_to_string(thread.path().join("stat"))
            .map(|stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['Z', 'X'])))
            .unwrap_or(true)
    })
}

/// How many files the process has open.
pub fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map(Iterator::count).unwrap_or(0)
}

/// What `pid` has open, for the text of a failure.
pub fn open_file_names(pid: u32) -> Vec<String> {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some(std::fs::read_link(entry.path()).ok()?.display().to_string()))
        .collect()
}

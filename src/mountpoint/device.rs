//! Making and undoing a FUSE mount: mount(2) as root, `fusermount3` as an ordinary user.
//!
//! We mount ourselves and hand the opened device on, so that the table shows the type
//! `fuse.rearview`, the exact source and our own flags. `auto_unmount` is never used: a dead mount
//! must stay visible as a dead mount, or a backup program would take the empty folder beneath it
//! for the truth.

use std::ffi::{CString, OsString};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net;

use super::options::MountOptions;
use crate::error::{Error, IoContext, Result};
use crate::types::escape;

const DEVICE: &str = "/dev/fuse";
const HELPER: &str = "fusermount3";
/// The helper's settings.
const CONFIG: &str = "/etc/fuse.conf";

/// Refuses early what [`mount`] would refuse only after the store was opened and filled.
pub fn check(options: &MountOptions) -> Result<()> {
    rustix::fs::access(DEVICE, Access::READ_OK | Access::WRITE_OK).map_err(missing_device)?;
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    if options.allow_other && !others_allowed(&std::fs::read(CONFIG).unwrap_or_default()) {
        return Err(others_not_allowed());
    }
    let mut version = Command::new(HELPER);
    version.arg("-V").stdout(Stdio::null()).stderr(Stdio::null());
    version.status().map(|_| ()).map_err(missing_helper)
}

/// Whether the helper's settings let ordinary users open their mounts to others.
fn others_allowed(config: &[u8]) -> bool {
    config.split(|&byte| byte == b'\n').any(|line| line.trim_ascii() == b"user_allow_other")
}

fn others_not_allowed() -> Error {
    Error::Refused(format!(
        "the option allow_other is for root only, unless root puts the line 'user_allow_other' \
         into {CONFIG}"
    ))
}

/// Mounts on `target` and returns the connection to the kernel. `source` is what the table shows.
pub fn mount(target: &Path, source: &[u8], options: &MountOptions) -> Result<OwnedFd> {
    if rustix::process::geteuid().is_root() {
        mount_as_root(target, source, options)
    } else {
        mount_by_helper(target, source, options)
    }
}

fn mount_as_root(target: &Path, source: &[u8], options: &MountOptions) -> Result<OwnedFd> {
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(missing_device)?;
    let mut data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions",
        std::os::fd::AsRawFd::as_raw_fd(&device)
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    if options.subtype {
        data.push_str(",subtype=rearview");
    }
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::NOSUID, !options.suid);
    flags.set(MountFlags::NODEV, !options.dev);
    flags.set(MountFlags::NOEXEC, !options.exec);
    flags.set(MountFlags::RDONLY, options.read_only);
    let data = CString::new(data).map_err(|_| Error::Posix(Errno::INVAL))?;
    let fs_type = if options.subtype { "fuse" } else { "fuse.rearview" };
    rustix::mount::mount(source, target, fs_type, flags, data.as_c_str())
        .context("mount on", target)?;
    Ok(device)
}

fn missing_device(errno: Errno) -> Error {
    match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => Error::Refused(format!(
            "{DEVICE} is missing: load the kernel's FUSE with 'modprobe fuse', or, in a \
             container, start it with the device (--device {DEVICE})"
        )),
        Errno::ACCESS | Errno::PERM => Error::Refused(format!(
            "{DEVICE} may not be opened ({errno}): its mode must be 0666, or the container must \
             be allowed to use it"
        )),
        errno => Error::Io { action: "open", path: DEVICE.into(), source: errno.into() },
    }
}

/// The helper is setuid root; it sends the opened device back over the socket that
/// `_FUSE_COMMFD` names.
fn mount_by_helper(target: &Path, source: &[u8], options: &MountOptions) -> Result<OwnedFd> {
    if !Path::new(DEVICE).exists() {
        return Err(missing_device(Errno::NOENT));
    }
    let (ours, theirs) = net::socketpair(
        net::AddressFamily::UNIX,
        net::SocketType::STREAM,
        net::SocketFlags::CLOEXEC,
        None,
    )
    .context("make a socket for", HELPER)?;
    let output = Command::new(HELPER)
        .arg("-o")
        .arg(helper_options(source, options))
        .arg("--")
        .arg(target)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(missing_helper)?;
    if !output.status.success() {
        return Err(helper_failure(target, &output.stderr));
    }
    receive_device(&ours)
}

fn helper_options(source: &[u8], options: &MountOptions) -> OsString {
    let mut text = b"default_permissions,fsname=".to_vec();
    for &byte in source {
        // The helper splits at commas and takes a backslash as an escape.
        if matches!(byte, b',' | b'\\') {
            text.push(b'\\');
        }
        text.push(byte);
    }
    let flags = [
        (options.subtype, ",subtype=rearview"),
        (options.allow_other, ",allow_other"),
        (options.read_only, ",ro"),
        (!options.exec, ",noexec"),
    ];
    for (set, flag) in flags {
        if set {
            text.extend_from_slice(flag.as_bytes());
        }
    }
    OsString::from_vec(text)
}

fn missing_helper(error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        return Error::Refused(format!(
            "{HELPER} is missing, without which only root can mount: apt install fuse3"
        ));
    }
    Error::Io { action: "run", path: HELPER.into(), source: error }
}

fn helper_failure(target: &Path, stderr: &[u8]) -> Error {
    let text = escape(stderr.trim_ascii());
    if text.contains("user_allow_other") {
        return others_not_allowed();
    }
    Error::Refused(format!("cannot mount on {}: {text}", super::show(target)))
}

fn receive_device(socket: &OwnedFd) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = net::RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8; 1];
    net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        net::RecvFlags::CMSG_CLOEXEC,
    )
    .context("receive the FUSE device from", HELPER)?;
    for message in control.drain() {
        if let net::RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(fd);
        }
    }
    Err(Error::Refused(format!("{HELPER} mounted but did not hand the FUSE device over")))
}

/// Undoes the mount on `target`. `lazy` takes it out of the tree at once and lets open files be
/// used until they are closed. The plain answer `EBUSY` tells that it is in use.
pub fn unmount(target: &Path, lazy: bool) -> Result<()> {
    let mut flags = UnmountFlags::NOFOLLOW;
    flags.set(UnmountFlags::DETACH, lazy);
    match rustix::mount::unmount(target, flags) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => Err(Errno::BUSY.into()),
        Err(Errno::PERM) if !rustix::process::geteuid().is_root() => {
            unmount_by_helper(target, lazy)
        }
        Err(errno) => Err(errno).context("unmount", target),
    }
}

fn unmount_by_helper(target: &Path, lazy: bool) -> Result<()> {
    let mut command = Command::new(HELPER);
    command.arg("-u");
    if lazy {
        command.arg("-z");
    }
    // Its messages are read by us, so they must be in the language we know.
    let command = command.arg("--").arg(target).env("LC_ALL", "C").stdin(Stdio::null());
    let output = command.output().map_err(missing_helper)?;
    if output.status.success() {
        return Ok(());
    }
    let text = escape(output.stderr.trim_ascii());
    if text.contains("busy") {
        return Err(Errno::BUSY.into());
    }
    Err(Error::Refused(format!(
        "cannot unmount {}: only root and the user who mounted it may do that ({text})",
        super::show(target)
    )))
}

/// The processes that keep `target` busy, as "name (pid)"; those that may be looked at.
pub fn holders(target: &Path) -> Vec<String> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let own = std::process::id();
    let mut found = Vec::new();
    for process in processes.flatten() {
        let name = process.file_name();
        let pid = std::str::from_utf8(name.as_bytes()).ok().and_then(|name| name.parse().ok());
        let Some(pid) = pid.filter(|pid: &u32| *pid != own) else { continue };
        if holds(&process.path(), target) {
            let comm = std::fs::read(process.path().join("comm")).unwrap_or_default();
            found.push(format!("{} ({pid})", escape(comm.trim_ascii())));
        }
    }
    found.sort();
    found
}

fn holds(process: &Path, target: &Path) -> bool {
    let inside = |link: &Path| std::fs::read_link(link).is_ok_and(|to| to.starts_with(target));
    if ["cwd", "root", "exe"].iter().any(|link| inside(&process.join(link))) {
        return true;
    }
    let Ok(fds) = std::fs::read_dir(process.join("fd")) else { return false };
    fds.flatten().any(|fd| inside(&fd.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_and_backslashes_of_the_source_reach_the_helper_escaped() {
        let options = MountOptions { allow_other: true, ..MountOptions::default() };
        let text = helper_options(b"/a,b:/c\\:d", &options);
        assert_eq!(
            text.to_str(),
            Some("default_permissions,fsname=/a\\,b:/c\\\\:d,subtype=rearview,allow_other")
        );
    }

    #[test]
    fn the_process_that_keeps_a_directory_open_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let mut child =
            Command::new("cat").current_dir(&path).stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let found = holders(&path);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(found.iter().any(|text| text.contains(&format!("({pid})"))), "{found:?}");
    }

    #[test]
    fn a_commented_setting_allows_nothing() {
        assert!(others_allowed(b"# x\n user_allow_other \n"));
        assert!(!others_allowed(b"#user_allow_other\n# user_allow_other\n"));
    }

    #[test]
    fn a_missing_device_names_the_remedy() {
        assert!(missing_device(Errno::NOENT).to_string().contains("modprobe fuse"));
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        assert!(missing_helper(missing).to_string().contains("apt install fuse3"));
        let text = b"fusermount3: option allow_other only allowed if 'user_allow_other' is set";
        assert!(helper_failure(Path::new("/m"), text).to_string().contains("/etc/fuse.conf"));
    }
}

//! System calls that need more care than rustix gives: the identity of a thread, and transfers
//! that must be whole.
//!
//! The only module with `unsafe`. What rustix offers safely (`mount(2)`, `*at` calls, `FICLONE`) is
//! called where it is needed.
//!
//! **Identity.** Every thread has its own filesystem ids, umask and capabilities. [`assume`] makes
//! the backing's own kernel filesystem apply setgid directories, default ACLs and quotas as it
//! would for the caller, and is sticky: requests of one user in a row cost nothing. The thread
//! keeps its capabilities whatever its ids are (`SECBIT_NO_SETUID_FIXUP`), so only the ownership of
//! what it creates depends on them. The one exception is `CAP_FSETID`, which is dropped for
//! ordinary users, so that a write of theirs clears suid and sgid bits.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::Mode;
use rustix::io::{Errno, ReadWriteFlags, retry_on_intr};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags};

use crate::types::Creds;

pub mod affinity;
pub mod device;
pub mod fuse_ring;
pub mod patience;
pub mod sqlite;

/// The version of the running kernel (`uname(2)`); what cannot be read of it is 0.
pub fn kernel_version() -> (u32, u32, u32) {
    parse_version(&rustix::system::uname().release().to_string_lossy())
}

/// `6.18.44-fc-v657`, `6.1.0-18-amd64`, `6.19-rc3`.
fn parse_version(release: &str) -> (u32, u32, u32) {
    let numbers = release.split(|c: char| !c.is_ascii_digit() && c != '.').next();
    let mut parts = numbers.unwrap_or_default().split('.').map(|part| part.parse().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    (next(), next(), next())
}

/// What one thread is at present; the kernel's state, remembered.
#[derive(Clone, Copy)]
struct Identity {
    creds: Creds,
    fsetid: bool,
    /// The thread's capabilities at its first [`assume`]; `None` as an ordinary user.
    full: Option<CapabilitySets>,
}

thread_local! {
    static IDENTITY: Cell<Option<Identity>> = const { Cell::new(None) };
}

/// Whether the process runs as root and can act for other users.
pub fn is_root() -> bool {
    static ROOT: OnceLock<bool> = OnceLock::new();
    *ROOT.get_or_init(|| rustix::process::geteuid().is_root())
}

/// Makes this thread create objects as `creds` says, until the next call. Costs nothing when
/// unchanged. As an ordinary user only the umask is taken. A failure is logged; what creates
/// objects uses [`try_assume`] and fails rather than giving them to the wrong owner.
pub fn assume(creds: Creds) {
    if let Err(error) = try_assume(creds) {
        log::error!("cannot act as uid {} gid {}: {error}", creds.uid, creds.gid);
    }
}

/// Makes this thread the daemon again: uid 0, gid 0, no umask, all its capabilities.
pub fn assume_daemon() {
    assume(Creds::DAEMON);
}

/// [`assume`], telling of a failure.
pub fn try_assume(creds: Creds) -> io::Result<()> {
    let mut now = match IDENTITY.get() {
        Some(identity) => identity,
        None => prepare_thread()?,
    };
    if now.creds.umask != creds.umask {
        rustix::process::umask(Mode::from_bits_truncate(creds.umask));
        now.creds.umask = creds.umask;
        IDENTITY.set(Some(now));
    }
    if now.full.is_none() {
        return Ok(());
    }
    if now.creds.gid != creds.gid {
        set_fs_id(libc::SYS_setfsgid, creds.gid)?;
        now.creds.gid = creds.gid;
        IDENTITY.set(Some(now));
    }
    if now.creds.uid != creds.uid {
        set_fs_id(libc::SYS_setfsuid, creds.uid)?;
        now.creds.uid = creds.uid;
        IDENTITY.set(Some(now));
    }
    set_fsetid(now, creds.uid == 0)
}

/// Gives this thread `CAP_FSETID` back until the next [`assume`]: for setting a mode with sgid that
/// has been granted already, with the caller's supplementary groups that we do not have.
pub fn regain_fsetid() -> io::Result<()> {
    match IDENTITY.get() {
        Some(now) => set_fsetid(now, true),
        None => Ok(()),
    }
}

fn set_fsetid(mut now: Identity, wanted: bool) -> io::Result<()> {
    let Some(full) = now.full else { return Ok(()) };
    if now.fsetid == wanted {
        return Ok(());
    }
    let mut sets = full;
    if !wanted {
        sets.effective.remove(CapabilitySet::FSETID);
    }
    rustix::thread::set_capabilities(None, sets)?;
    now.fsetid = wanted;
    IDENTITY.set(Some(now));
    Ok(())
}

/// Makes the thread's umask its own and its capabilities independent of its filesystem ids.
fn prepare_thread() -> io::Result<Identity> {
    // SAFETY: only `UnshareFlags::FILES` endangers file descriptors; `FS` separates the umask and
    // the working directory, which nothing in this program depends on being shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
    rustix::process::umask(Mode::empty());
    let full = match is_root() {
        false => None,
        true => {
            let bits = rustix::thread::capabilities_secure_bits()?;
            let wanted = bits | CapabilitiesSecureBits::NO_SETUID_FIXUP;
            if bits != wanted {
                rustix::thread::set_capabilities_secure_bits(wanted)?;
            }
            Some(rustix::thread::capabilities(None)?)
        }
    };
    let identity = Identity { creds: Creds::DAEMON, fsetid: true, full };
    IDENTITY.set(Some(identity));
    Ok(identity)
}

/// Sets this thread's (not the process's, as glibc would) filesystem uid or gid.
fn set_fs_id(call: libc::c_long, id: u32) -> io::Result<()> {
    // SAFETY: `setfsuid(2)` and `setfsgid(2)` take one number and touch no memory.
    unsafe { libc::syscall(call, id) };
    // They report no errors: the present id is what the next call gives back, and -1 sets nothing.
    // SAFETY: as above.
    let present = unsafe { libc::syscall(call, u32::MAX) };
    if present as u32 == id { Ok(()) } else { Err(Errno::PERM.into()) }
}

/// Raises the limit of open files as far as the system lets us; returns the limit that holds.
pub fn raise_nofile_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if limit.current != limit.maximum && setrlimit(Resource::Nofile, raised).is_err() {
        return limit.current.unwrap_or(u64::MAX);
    }
    limit.maximum.unwrap_or(u64::MAX)
}

/// Has all threads take memory from so many pools at most. By default there are eight for each
/// processor, and each keeps what its largest answer ever needed.
pub fn limit_memory_pools(pools: u16) {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call sets a number of the allocator's own, under its own lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, libc::c_int::from(pools));
    }
}

/// Makes this thread the last one to get the processor, and with it, unless told otherwise, the
/// disks (`setpriority(2)`, `ioprio_set(2)`: the I/O priority follows the nice value).
pub fn be_idle() {
    // Fails for no reason that matters: the work is then done at normal priority.
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 19);
}

/// Has this thread give way to those that somebody waits for, and get its share all the same
/// where they never rest.
pub fn give_way() {
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 10);
}

/// Gives the calling thread normal priority again, for work that others wait for. Only root may.
pub fn be_normal() {
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 0);
}

/// Reads at `offset` until `buffer` is full or the file ends; the count tells which.
pub fn read_full_at(file: impl AsFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let at = offset + done as u64;
        match retry_on_intr(|| rustix::io::pread(file.as_fd(), &mut buffer[done..], at))? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// [`read_full_at`] out of the page cache alone: `None` if not all of it is there.
pub fn read_cached_at(file: impl AsFd, buffer: &mut [u8], offset: u64) -> Option<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let mut rest = [IoSliceMut::new(&mut buffer[done..])];
        let at = offset + done as u64;
        match rustix::io::preadv2(file.as_fd(), &mut rest, at, ReadWriteFlags::NOWAIT) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(_) => return None,
        }
    }
    Some(done)
}

/// Writes all of `data` at `offset`. A write that takes nothing is an error, not a loop.
pub fn write_all_at(file: impl AsFd, data: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < data.len() {
        let at = offset + done as u64;
        match retry_on_intr(|| rustix::io::pwrite(file.as_fd(), &data[done..], at))? {
            0 => return Err(Errno::IO.into()),
            count => done += count,
        }
    }
    Ok(())
}

/// Has a descriptor lead to what another one does, at once for all who use it.
pub fn replace_fd(fd: BorrowedFd<'_>, by: OwnedFd) -> io::Result<()> {
    loop {
        // SAFETY: both are open. The first stays so, and its owner closes it as before; calls that
        // are under way on what it led to hold that themselves.
        if unsafe { libc::dup3(by.as_raw_fd(), fd.as_raw_fd(), libc::O_CLOEXEC) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Writes back a file's dirty pages and waits for them (`sync_file_range(2)` with all three flags).
/// The file need not be open for writing.
pub fn flush_pages(file: impl AsFd) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the call takes no pointers, and the descriptor is borrowed for its duration.
    let answer = unsafe { libc::sync_file_range(file.as_fd().as_raw_fd(), 0, 0, flags) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether a file lies in more than `most` runs of blocks; `false` where that is not told. What was
/// not written back yet may not count.
pub fn is_fragmented(file: impl AsFd, most: u32) -> io::Result<bool> {
    // `linux/fiemap.h`: a head of four words, and seven for each run that is told.
    const FS_IOC_FIEMAP: u64 = 0xc020_660b;
    const HEAD_WORDS: usize = 4;
    const RUN_WORDS: usize = 7;
    let asked = most + 1;
    let mut map = vec![0u64; HEAD_WORDS + RUN_WORDS * asked as usize];
    // From 0 on, the whole file; no flags; the third and fourth word are of two halves each.
    map[1] = u64::MAX;
    map[3] = u64::from_ne_bytes(halves(asked, 0));
    let (fd, call) = (file.as_fd().as_raw_fd(), FS_IOC_FIEMAP as libc::Ioctl);
    // SAFETY: the buffer has room for the head and as many runs as the head asks for, and both it
    // and the descriptor outlive the call.
    if unsafe { libc::ioctl(fd, call, map.as_mut_ptr()) } != 0 {
        let error = io::Error::last_os_error();
        let untold = [Some(libc::EOPNOTSUPP), Some(libc::ENOTTY)].contains(&error.raw_os_error());
        return if untold { Ok(false) } else { Err(error) };
    }
    let told = u32::from_ne_bytes(map[2].to_ne_bytes()[4..].try_into().expect("4 bytes"));
    Ok(told > most)
}

/// Two halves of a word as they lie in memory.
fn halves(first: u32, second: u32) -> [u8; 8] {
    let mut word = [0; 8];
    word[..4].copy_from_slice(&first.to_ne_bytes());
    word[4..].copy_from_slice(&second.to_ne_bytes());
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs on a thread of its own, so that the test runner's threads keep their identity.
    fn on_own_thread(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().expect("the test passes");
    }

    fn effective() -> CapabilitySet {
        rustix::thread::capabilities(None).expect("capget").effective
    }

    #[test]
    fn capabilities_survive_a_change_of_user_but_fsetid() {
        if !is_root() {
            return;
        }
        on_own_thread(|| {
            let before = effective();
            try_assume(Creds { uid: 65534, gid: 65534, umask: 0o027 }).expect("assume");
            assert_eq!(effective(), before - CapabilitySet::FSETID);
            regain_fsetid().expect("regain");
            assert_eq!(effective(), before);
            try_assume(Creds { uid: 65534, gid: 65534, umask: 0o027 }).expect("assume");
            assert_eq!(effective(), before - CapabilitySet::FSETID);
            assume_daemon();
            assert_eq!(effective(), before);
        });
    }

    #[test]
    fn versions_of_kernels_are_read_as_they_are_written() {
        assert_eq!(parse_version("6.18.44-fc-v657"), (6, 18, 44));
        assert_eq!(parse_version("6.1.0-18-amd64"), (6, 1, 0));
        assert_eq!(parse_version("6.19-rc3"), (6, 19, 0));
        assert_eq!((parse_version("5.15.0+"), parse_version("what")), ((5, 15, 0), (0, 0, 0)));
        assert!(kernel_version() > (4, 0, 0));
    }

    #[test]
    fn the_umask_of_one_thread_is_not_another_s() {
        on_own_thread(|| {
            assume(Creds { uid: 0, gid: 0, umask: 0o077 });
            std::thread::scope(|scope| {
                scope.spawn(|| assume(Creds { uid: 0, gid: 0, umask: 0o011 }));
            });
            assert_eq!(rustix::process::umask(Mode::empty()).bits(), 0o077);
        });
    }

    #[test]
    fn the_limit_of_open_files_becomes_the_hard_one() {
        let raised = raise_nofile_limit();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        assert_eq!(limit.current.unwrap_or(u64::MAX), raised);
    }
}

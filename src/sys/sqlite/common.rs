//! What SQLite does under the lock that all databases of a process have in common, without waiting
//! for a disk.
//!
//! Under that lock it asks, when it opens a database, which file has that path and which one it has
//! opened, and when it closes one, it closes the descriptors. A disk that hangs there would hold up
//! every database on every other disk. So the path is asked for before, of an open file that is
//! told which the kernel has in memory, and descriptors are closed after: all that can hang does so
//! in the thread of whoever wanted it, and without the lock.
//!
//! What has changed a file's size is always in memory: only this machine writes to it.
//!
//! As a descriptor is closed a moment later, so the locks may fall (fcntl(2)) that somebody takes
//! in that moment by opening the same database anew. They keep nobody out but other processes,
//! which the lock of the store does as well.

use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;

use rusqlite::ffi;
use rustix::fs::{AtFlags, StatxFlags};

/// A call of SQLite's that takes that lock.
#[derive(Default)]
struct Call {
    /// What lies at the path that it asks for, or why that is not known.
    path: Option<Result<libc::stat, c_int>>,
    /// Descriptors to be closed.
    left: Vec<c_int>,
}

thread_local! {
    /// What this thread is in.
    static CALL: RefCell<Option<Call>> = const { RefCell::new(None) };
}

/// Makes such a call, and then what waits for the disk.
fn apart<T>(path: Option<Result<libc::stat, c_int>>, work: impl FnOnce() -> T) -> T {
    let outer = CALL.replace(Some(Call { path, ..Call::default() }));
    let answer = work();
    let call = CALL.replace(outer).unwrap_or_default();
    for fd in call.left {
        // SAFETY: SQLite gave it to be closed, and uses it no more.
        unsafe { libc::close(fd) };
    }
    answer
}

/// Has a VFS do so: its system calls are replaced.
///
/// # Safety
/// `vfs` is a copy of SQLite's own for Unix.
pub(super) unsafe fn prepare(vfs: &mut ffi::sqlite3_vfs) -> bool {
    let stat: unsafe extern "C" fn(*const c_char, *mut libc::stat) -> c_int = known_stat;
    let fstat: unsafe extern "C" fn(c_int, *mut libc::stat) -> c_int = fstat_at_hand;
    let close: unsafe extern "C" fn(c_int) -> c_int = close_later;
    let calls = [
        (c"stat", stat as *const ()),
        (c"fstat", fstat as *const ()),
        (c"close", close as *const ()),
    ];
    // SAFETY: the caller's promise; each is of the type that SQLite casts it back to.
    calls.into_iter().all(|(name, call)| unsafe { super::replace_call(vfs, name, call) })
}

/// Opens the file of a database by `open`, so that it is closed likewise.
///
/// # Safety
/// The arguments of a VFS's `xOpen`.
pub(super) unsafe fn open_database(
    open: impl FnOnce() -> c_int,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
) -> c_int {
    let mut found = MaybeUninit::uninit();
    // SAFETY: SQLite gives a path, and the room is ours.
    let path = match unsafe { libc::stat(name, found.as_mut_ptr()) } {
        // SAFETY: it was written.
        0 => Ok(unsafe { found.assume_init() }),
        _ => Err(errno()),
    };
    let opened = apart(Some(path), open);
    if opened == ffi::SQLITE_OK {
        // SAFETY: it was opened, so its methods are a table that lives as long as the process.
        let theirs = unsafe { (*file).pMethods };
        // SAFETY: as above.
        let own = METHODS.get_or_init(|| Methods::over(unsafe { &*theirs }));
        // Another table is that of files without locks, which are not closed under that one either.
        if own.address == theirs.addr() {
            // SAFETY: as above; what is put there is never freed.
            unsafe { (*file).pMethods = &raw const own.ours };
        }
    }
    opened
}

/// What SQLite does with an open database, and what is done instead.
struct Methods {
    address: usize,
    theirs: ffi::sqlite3_io_methods,
    ours: ffi::sqlite3_io_methods,
}

static METHODS: OnceLock<Methods> = OnceLock::new();

impl Methods {
    fn over(theirs: &ffi::sqlite3_io_methods) -> Methods {
        let ours = ffi::sqlite3_io_methods {
            xClose: Some(close),
            xShmMap: Some(map_index),
            xShmUnmap: Some(unmap_index),
            ..*theirs
        };
        Methods { address: std::ptr::from_ref(theirs).addr(), theirs: *theirs, ours }
    }
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    let Some(close) = METHODS.get().and_then(|own| own.theirs.xClose) else {
        return ffi::SQLITE_IOERR_CLOSE;
    };
    // SAFETY: as SQLite gave it, to SQLite's own function.
    apart(None, || unsafe { close(file) })
}

unsafe extern "C" fn map_index(
    file: *mut ffi::sqlite3_file,
    region: c_int,
    bytes: c_int,
    extend: c_int,
    into: *mut *mut c_void,
) -> c_int {
    let Some(map) = METHODS.get().and_then(|own| own.theirs.xShmMap) else {
        return ffi::SQLITE_IOERR_SHMMAP;
    };
    // SAFETY: as above.
    apart(None, || unsafe { map(file, region, bytes, extend, into) })
}

unsafe extern "C" fn unmap_index(file: *mut ffi::sqlite3_file, delete: c_int) -> c_int {
    let Some(unmap) = METHODS.get().and_then(|own| own.theirs.xShmUnmap) else {
        return ffi::SQLITE_IOERR_SHMMAP;
    };
    // SAFETY: as above.
    apart(None, || unsafe { unmap(file, delete) })
}

/// `stat(2)`, or what it said before the lock was taken.
unsafe extern "C" fn known_stat(path: *const c_char, into: *mut libc::stat) -> c_int {
    let known = CALL.with_borrow(|call| call.as_ref().and_then(|call| call.path));
    match known {
        Some(Ok(found)) => {
            // SAFETY: the caller has room for it.
            unsafe { into.write(found) };
            0
        }
        Some(Err(errno)) => fail(errno),
        // SAFETY: the caller's own call, as it is.
        None => unsafe { libc::stat(path, into) },
    }
}

/// `fstat(2)`, with no question to a filesystem that would ask another machine or process.
unsafe extern "C" fn fstat_at_hand(fd: c_int, into: *mut libc::stat) -> c_int {
    if CALL.with_borrow(Option::is_none) {
        // SAFETY: the caller's own call, as it is.
        return unsafe { libc::fstat(fd, into) };
    }
    // SAFETY: the caller has it open.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = match rustix::fs::statx(file, c"", flags, StatxFlags::BASIC_STATS) {
        Ok(found) => found,
        Err(error) => return fail(error.raw_os_error()),
    };
    // SAFETY: the caller has room for it, and it is of numbers only, which may all be 0.
    unsafe {
        let mut stat: libc::stat = MaybeUninit::zeroed().assume_init();
        stat.st_dev = rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor);
        stat.st_ino = found.stx_ino;
        stat.st_mode = found.stx_mode.into();
        stat.st_nlink = found.stx_nlink as libc::nlink_t;
        stat.st_uid = found.stx_uid;
        stat.st_gid = found.stx_gid;
        stat.st_size = found.stx_size as libc::off_t;
        into.write(stat);
    }
    0
}

/// `close(2)`, when the lock is free again.
unsafe extern "C" fn close_later(fd: c_int) -> c_int {
    let is_left = CALL.with_borrow_mut(|call| call.as_mut().map(|call| call.left.push(fd)));
    match is_left {
        Some(()) => 0,
        // SAFETY: the caller's own call, as it is.
        None => unsafe { libc::close(fd) },
    }
}

fn errno() -> c_int {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

fn fail(errno: c_int) -> c_int {
    // SAFETY: it is this thread's own.
    unsafe { *libc::__errno_location() = errno };
    -1
}

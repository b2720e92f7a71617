//! SQLite's way to its files.
//!
//! By itself SQLite resolves a path, symlinks and all, before it opens it, and opens what lies
//! beside a database (`-wal`, `-shm`) by the resolved path. So what it opens is whatever has that
//! path at that moment. Here it takes a path as it is told: one through a descriptor
//! (`/proc/self/fd/N/name`) stays in the directory that the descriptor is of, whatever becomes of
//! the directory's name. The last component is never followed: SQLite opens with `O_NOFOLLOW`.
//!
//! **Reads end in time**, where whoever asks wants that ([`with_patience`]). SQLite reads by
//! `pread`, which can be another function than the system's: what is in the page cache it gives at
//! once, which costs no more than `pread` does; all else is read by another thread, into memory of
//! that thread, and where that takes too long the read fails with `ETIMEDOUT`. So a query runs in
//! the thread that asks, with what it borrows from there, and yet is never left waiting for a disk
//! that hangs. The descriptor may be closed meanwhile: a read that is under way holds the file
//! itself, and one that then begins reads something else for nobody.
//!
//! **No disk that hangs holds up the databases on another** (`common`).
//!
//! **The index of the WAL lies in memory of our own** as long as a writer has the database open. In
//! a mapped file, as SQLite has it by itself, a store into a page that a dead disk cannot take ends
//! the process with SIGBUS. So files are opened as by SQLite's VFS `unix-excl`: connections of one
//! process share the index, and no other process gets in meanwhile. Where only readers have it
//! open, the file is mapped: they are commands on a store that is not mounted, and die alone.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, OnceLock};

use rusqlite::ffi;
use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use super::patience::Patience;

mod common;

/// What SQLite knows it by.
const NAME: &CStr = c"rearview";
/// By this name SQLite knows that only one process has a file open.
const ALONE: &CStr = c"unix-excl";
/// The VFS that opens files for this process alone.
static ALONE_VFS: AtomicPtr<ffi::sqlite3_vfs> = AtomicPtr::new(std::ptr::null_mut());

/// The name of a VFS that opens paths as they are told; `None` if SQLite takes none.
pub fn plain_path_vfs() -> Option<&'static CStr> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    REGISTERED.get_or_init(register).then_some(NAME)
}

fn register() -> bool {
    // SAFETY: what `sqlite3_vfs_find` gives is valid for the life of the process and is only read.
    // The copy is leaked, so it is valid as long, and is written by nobody but SQLite from here on.
    // Its other functions take what they need (`pAppData`) from the structure that they are given,
    // which the copy has as well. `pread` is of the type that SQLite casts it back to.
    unsafe {
        // All allocations were counted under one lock, on which the catalogs of two replicas that
        // get the same batch, and the queries beside them, spent two fifths of their time. Refused,
        // without harm, where a connection was opened before.
        ffi::sqlite3_config(ffi::SQLITE_CONFIG_MEMSTATUS, 0 as c_int);
        if ffi::sqlite3_initialize() != ffi::SQLITE_OK {
            return false;
        }
        let unix = ffi::sqlite3_vfs_find(c"unix".as_ptr());
        if unix.is_null() {
            return false;
        }
        let own = Box::leak(Box::new(*unix));
        let pread: unsafe extern "C" fn(c_int, *mut c_void, usize, i64) -> isize = patient_pread;
        if !replace_call(own, c"pread", pread as *const ()) || !common::prepare(own) {
            return false;
        }
        own.pNext = std::ptr::null_mut();
        own.zName = ALONE.as_ptr();
        own.xFullPathname = Some(plain_path);
        // SQLite tells by the name of the VFS that a file was opened by whether it is alone with
        // it, and has one of that name already: ours is known by another, and opens by this one.
        let known = Box::leak(Box::new(*own));
        known.zName = NAME.as_ptr();
        known.xOpen = Some(open_alone);
        ALONE_VFS.store(own, Ordering::Release);
        ffi::sqlite3_vfs_register(known, 0) == ffi::SQLITE_OK
    }
}

/// Has SQLite make a system call by another function.
///
/// # Safety
/// `vfs` is a copy of SQLite's own for Unix, and `call` of the type of that system call.
unsafe fn replace_call(vfs: &mut ffi::sqlite3_vfs, name: &CStr, call: *const ()) -> bool {
    // SAFETY: SQLite casts it back to the type that it has by the caller's promise.
    unsafe {
        let call = std::mem::transmute::<*const (), unsafe extern "C" fn()>(call);
        let set = vfs.xSetSystemCall;
        set.is_some_and(|set| set(vfs, name.as_ptr(), Some(call)) == ffi::SQLITE_OK)
    }
}

/// Opens a file for this process alone.
unsafe extern "C" fn open_alone(
    _: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    flags_out: *mut c_int,
) -> c_int {
    let alone = ALONE_VFS.load(Ordering::Acquire);
    // SAFETY: it was stored before the VFS that this belongs to was registered, is never freed, and
    // its functions are SQLite's own; the rest is passed on as SQLite gave it.
    unsafe {
        let Some(open) = alone.as_ref().and_then(|vfs| vfs.xOpen) else {
            return ffi::SQLITE_CANTOPEN;
        };
        let open = || open(alone, name, file, flags, flags_out);
        match flags & ffi::SQLITE_OPEN_MAIN_DB {
            0 => open(),
            _ => common::open_database(open, name, file),
        }
    }
}

thread_local! {
    /// How long this thread waits for reads of a file; `None` for ever.
    static PATIENCE: RefCell<Option<Bound>> = const { RefCell::new(None) };
}

/// How long reads of files are waited for.
#[derive(Clone)]
struct Bound {
    patience: Arc<Patience>,
    /// But for those on this device.
    but_on: Option<u64>,
    /// Whether another device is memory.
    in_memory: Cell<Option<(u64, bool)>>,
}

/// Does something in which no read by SQLite is waited for longer than `patience` allows.
pub fn with_patience<T>(patience: &Arc<Patience>, work: impl FnOnce() -> T) -> T {
    bounded(Bound { patience: patience.clone(), but_on: None, in_memory: Cell::default() }, work)
}

/// Likewise, where somebody else bounds what is read from one device.
pub fn with_patience_but_on<T>(
    device: u64,
    patience: &Arc<Patience>,
    work: impl FnOnce() -> T,
) -> T {
    bounded(
        Bound { patience: patience.clone(), but_on: Some(device), in_memory: Cell::default() },
        work,
    )
}

fn bounded<T>(bound: Bound, work: impl FnOnce() -> T) -> T {
    /// Puts back what was, also where the work panics.
    struct Before(Option<Bound>);
    impl Drop for Before {
        fn drop(&mut self) {
            PATIENCE.set(self.0.take());
        }
    }
    let _before = Before(PATIENCE.replace(Some(bound)));
    work()
}

/// `pread(2)`, or as much of it as is there in time.
unsafe extern "C" fn patient_pread(
    fd: c_int,
    buffer: *mut c_void,
    count: libc::size_t,
    offset: libc::off_t,
) -> libc::ssize_t {
    let fail = |errno: Errno| {
        // SAFETY: it is this thread's own.
        unsafe { *libc::__errno_location() = errno.raw_os_error() };
        -1
    };
    PATIENCE.with_borrow(|bound| {
        let is_bound = |bound: &&Bound| bound.but_on.is_none_or(|on| device_of(fd) != Some(on));
        let Some(Bound { patience, in_memory, .. }) = bound.as_ref().filter(is_bound) else {
            // SAFETY: the caller's own call, as it is.
            return unsafe { libc::pread(fd, buffer, count, offset) };
        };
        let into = libc::iovec { iov_base: buffer, iov_len: count };
        // SAFETY: as above; the one vector is on the stack.
        let cached = unsafe { libc::preadv2(fd, &into, 1, offset, libc::RWF_NOWAIT) };
        if cached >= 0 {
            return cached;
        }
        // Said by whatever does not know that question.
        let is_untold = std::io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP);
        if is_untold && is_in_memory(fd, patience, in_memory) {
            // SAFETY: as above.
            return unsafe { libc::pread(fd, buffer, count, offset) };
        }
        let read = move || {
            let mut own = vec![0u8; count];
            // SAFETY: the memory is the vector's, which is as long. A descriptor that was closed
            // meanwhile is `EBADF`, or another file that is only read.
            let read = unsafe { libc::pread(fd, own.as_mut_ptr().cast(), count, offset) };
            match usize::try_from(read) {
                Ok(read) => {
                    own.truncate(read);
                    Ok(own)
                }
                Err(_) => Err(std::io::Error::last_os_error()),
            }
        };
        match patience.call(read) {
            Some(Ok(own)) => {
                // SAFETY: it is no more than was asked for, and the caller has room for that.
                unsafe { std::ptr::copy_nonoverlapping(own.as_ptr(), buffer.cast(), own.len()) };
                own.len() as libc::ssize_t
            }
            Some(Err(error)) => fail(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            None => fail(Errno::TIMEDOUT),
        }
    })
}

/// The device that a file is on, as far as that is known without asking it.
fn device_of(fd: c_int) -> Option<u64> {
    // SAFETY: whoever reads from it has it open.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(file, c"", flags, StatxFlags::empty()).ok()?;
    Some(rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor))
}

/// Whether a file is on a filesystem without a disk; `known` is the last answer, and for which
/// device. To ask may hang as well.
fn is_in_memory(fd: c_int, patience: &Patience, known: &Cell<Option<(u64, bool)>>) -> bool {
    const TMPFS: u32 = 0x0102_1994;
    let Some(device) = device_of(fd) else { return false };
    if let Some((_, answer)) = known.get().filter(|(of, _)| *of == device) {
        return answer;
    }
    let ask = move || {
        // SAFETY: whoever reads from it has it open. If it was closed meanwhile, nobody waits.
        let file = unsafe { BorrowedFd::borrow_raw(fd) };
        rustix::fs::fstatfs(file).is_ok_and(|kind| kind.f_type as u32 == TMPFS)
    };
    let answer = patience.call(ask);
    known.set(answer.map(|answer| (device, answer)));
    answer.unwrap_or(false)
}

/// The path itself.
unsafe extern "C" fn plain_path(
    _: *mut ffi::sqlite3_vfs,
    path: *const c_char,
    room: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: SQLite gives a path that ends in a zero byte, and as much room as it says.
    unsafe {
        let bytes = CStr::from_ptr(path).to_bytes_with_nul();
        if usize::try_from(room).is_ok_and(|room| bytes.len() <= room) {
            std::ptr::copy_nonoverlapping(path, out, bytes.len());
            return ffi::SQLITE_OK;
        }
    }
    ffi::SQLITE_CANTOPEN
}

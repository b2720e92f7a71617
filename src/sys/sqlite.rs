//! SQLite's way to its files.
//!
//! By itself SQLite resolves a path, symlinks and all, before it opens it, and opens what lies
//! beside a database (`-wal`, `-shm`) by the resolved path. So what it opens is whatever has that
//! path at that moment. Here it takes a path as it is told: one through a descriptor
//! (`/proc/self/fd/N/name`) stays in the directory that the descriptor is of, whatever becomes of
//! the directory's name. The last component is never followed: SQLite opens with `O_NOFOLLOW`.

use std::ffi::{CStr, c_char, c_int};
use std::sync::OnceLock;

use rusqlite::ffi;

/// What SQLite knows it by.
const NAME: &CStr = c"rearview";

/// The name of a VFS that opens paths as they are told; `None` if SQLite takes none.
pub fn plain_path_vfs() -> Option<&'static CStr> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    REGISTERED.get_or_init(register).then_some(NAME)
}

fn register() -> bool {
    // SAFETY: what `sqlite3_vfs_find` gives is valid for the life of the process and is only read.
    // The copy is leaked, so it is valid as long, and is written by nobody but SQLite from here on.
    // Its other functions take what they need (`pAppData`) from the structure that they are given,
    // which the copy has as well.
    unsafe {
        if ffi::sqlite3_initialize() != ffi::SQLITE_OK {
            return false;
        }
        let unix = ffi::sqlite3_vfs_find(c"unix".as_ptr());
        if unix.is_null() {
            return false;
        }
        let own = Box::leak(Box::new(*unix));
        own.pNext = std::ptr::null_mut();
        own.zName = NAME.as_ptr();
        own.xFullPathname = Some(plain_path);
        ffi::sqlite3_vfs_register(own, 0) == ffi::SQLITE_OK
    }
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

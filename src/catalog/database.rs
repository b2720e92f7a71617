//! A catalog's file, reached through the directory that it lies in.
//!
//! SQLite opens by path, and what is beside the file (`-wal`, `-shm`) as well. So the directory is
//! opened first, without following a symlink in its place, and SQLite gets a path through that
//! descriptor ([`crate::sys::sqlite`]): whoever renames or exchanges the directory meanwhile leads
//! nobody elsewhere. The descriptor stays open as long as the database, which opens its WAL later.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Write;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ErrorCode, OpenFlags};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags};
use rustix::io::Errno;

use super::schema::show;
use crate::error::{Error, IoContext, Result};
use crate::sys::sqlite::plain_path_vfs;

/// A place for a database, or for what lies beside one: a name in a directory that is held open.
pub(super) struct Place {
    dir: OwnedFd,
    name: OsString,
    /// As people know it.
    file: PathBuf,
}

impl Place {
    /// The place at `file`, whether anything lies there or not; [`Error::NoStore`] if there is no
    /// such directory.
    pub fn of(file: &Path) -> Result<Place> {
        match pin_dir(file) {
            Ok((dir, name)) => Ok(Place { dir, name, file: file.to_path_buf() }),
            Err(error) => Err(not_opened(file, error)),
        }
    }

    /// The place with a longer name.
    pub fn beside(&self, suffix: &str) -> Result<Place> {
        let longer = |name: &OsStr| {
            let mut name = name.to_owned();
            name.push(suffix);
            name
        };
        let dir = self.dir.try_clone().context("hold the directory of", &self.file)?;
        Ok(Place { dir, name: longer(&self.name), file: longer(self.file.as_os_str()).into() })
    }

    /// As people know it.
    pub fn shown(&self) -> &Path {
        &self.file
    }

    /// Its length in bytes; 0 if nothing lies there.
    pub fn size(&self) -> u64 {
        let stat = rustix::fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        stat.map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// Makes a database here, or opens an empty one.
    pub fn open_new(self) -> rusqlite::Result<Db> {
        // Made here, so that it is known which one it is.
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let made = rustix::fs::openat(&self.dir, &self.name, flags, mode);
        let identity = made.and_then(|_| identity(&self.dir, &self.name));
        let identity = identity.map_err(|_| rusqlite::Error::InvalidPath(self.file.clone()))?;
        let connection = self.connect(OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        Ok(Db { connection, place: self, identity })
    }

    fn connect(&self, access: OpenFlags) -> rusqlite::Result<Connection> {
        self.connect_by(self.path(), access)
    }

    fn connect_by(&self, path: PathBuf, access: OpenFlags) -> rusqlite::Result<Connection> {
        let Some(vfs) = plain_path_vfs() else { return Err(rusqlite::Error::InvalidPath(path)) };
        let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        Connection::open_with_flags_and_vfs(path, flags, vfs)
    }

    /// Whether its disk is mounted read-only: then nobody changes what lies here.
    pub fn is_read_only(&self) -> bool {
        let stat = rustix::fs::fstatvfs(&self.dir);
        stat.is_ok_and(|stat| stat.f_flag.contains(StatVfsMountFlags::RDONLY))
    }

    /// By which SQLite reaches it.
    fn path(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.dir.as_raw_fd().to_string()).join(&self.name)
    }

    /// Removes what lies here, if anything does.
    pub fn remove(&self) -> Result<()> {
        match rustix::fs::unlinkat(&self.dir, &self.name, AtFlags::empty()) {
            Err(Errno::NOENT) => Ok(()),
            other => other.context("remove", &self.file),
        }
    }

    /// Renames what lies here to another place in the same directory.
    pub fn rename(&self, to: &Place) -> Result<()> {
        rustix::fs::renameat(&self.dir, &self.name, &to.dir, &to.name).context("rename", &self.file)
    }

    /// Opens what lies here for reading; `None` if nothing does. Where it is a database, closing
    /// it takes SQLite's locks on it away (fcntl(2): they go with the first descriptor that the
    /// process closes).
    pub fn open(&self) -> Result<Option<File>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.dir, &self.name, flags, Mode::empty()) {
            Err(Errno::NOENT) => Ok(None),
            file => Ok(Some(file.context("open", &self.file)?.into())),
        }
    }

    /// Writes a file here anew.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, &self.name, flags, Mode::RUSR | Mode::WUSR);
        let mut file = File::from(file.context("create", &self.file)?);
        file.write_all(bytes).context("write", &self.file)
    }

    /// Makes what lies here durable, which nobody may have open.
    pub fn sync(&self) -> Result<()> {
        let Some(file) = self.open()? else { return Err(not_opened(&self.file, Errno::NOENT)) };
        file.sync_all().context("sync", &self.file)
    }

    /// Makes durable what was made, renamed and removed in the directory.
    pub fn sync_dir(&self) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&self.dir, c".", flags, Mode::empty());
        dir.and_then(rustix::fs::fsync).context("sync the directory of", &self.file)
    }
}

fn not_opened(file: &Path, error: Errno) -> Error {
    match error {
        Errno::NOENT => Error::NoStore(format!("there is no catalog at {}", show(file))),
        Errno::LOOP => Error::Refused(format!(
            "the catalog {} is a symlink or lies in one: that is not followed",
            show(file)
        )),
        error => Error::Io { action: "open", path: file.into(), source: error.into() },
    }
}

/// An open database, with the directory through which it is reached.
pub(super) struct Db {
    // Closed before the directory is: it removes its WAL by that path.
    connection: Connection,
    place: Place,
    identity: (u64, u64),
}

impl Db {
    /// Opens the catalog at a place. [`Db::check`] is to be asked once it was read.
    pub fn open(place: Place, access: OpenFlags) -> Result<Db> {
        let identity = identity(&place.dir, &place.name);
        let identity = identity.map_err(|error| not_opened(&place.file, error))?;
        Ok(Db { connection: place.connect(access)?, place, identity })
    }

    /// Opens for reading a catalog that could not be opened plainly, with `error`, if that came of
    /// a disk that is mounted read-only: SQLite cannot make there what it reads by, and needs none
    /// of it, for nobody changes the file. What is still in a log cannot be read so.
    pub fn open_unchanging(place: Place, error: rusqlite::Error) -> Result<Db> {
        let needs_writing =
            matches!(error.sqlite_error_code(), Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly));
        if !needs_writing || !place.is_read_only() {
            return Err(Error::Catalog(error));
        }
        if place.beside("-wal")?.size() > 0 {
            return Err(Error::Refused(format!(
                "the catalog {} was not closed cleanly and is on a disk that is mounted \
                 read-only: remount it read-write, or copy the backing elsewhere",
                show(&place.file)
            )));
        }
        let identity = identity(&place.dir, &place.name);
        let identity = identity.map_err(|error| not_opened(&place.file, error))?;
        let mut path = OsString::from("file:");
        path.push(place.path());
        path.push("?immutable=1");
        let access = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
        Ok(Db { connection: place.connect_by(path.into(), access)?, place, identity })
    }

    /// Fails if another file than the one that was found has been opened.
    pub fn check(&self) -> Result<()> {
        if identity(&self.place.dir, &self.place.name) == Ok(self.identity) {
            return Ok(());
        }
        let shown = show(&self.place.file);
        Err(Error::Refused(format!("the catalog {shown} was exchanged while it was opened")))
    }

    /// Where it was found.
    pub fn file(&self) -> &Path {
        &self.place.file
    }

    /// The same, for what lies beside it.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The directory that it lies in.
    pub fn dir(&self) -> &OwnedFd {
        &self.place.dir
    }

    /// Closes it, telling of a failure.
    pub fn close(self) -> rusqlite::Result<()> {
        self.connection.close().map_err(|(_, error)| error)
    }
}

impl Deref for Db {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl DerefMut for Db {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }
}

/// Which file has this name; `LOOP` if it is no plain file.
///
/// It is not opened: to close a descriptor of a database would take SQLite's locks on it away.
fn identity(dir: &OwnedFd, name: &OsStr) -> Result<(u64, u64), Errno> {
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok((stat.st_dev, stat.st_ino)),
        _ => Err(Errno::LOOP),
    }
}

/// Opens the directory of a file, and tells the file's name in it. Symlinks are followed above the
/// directory, for whoever names a backing may do so through one, but not in its place.
fn pin_dir(file: &Path) -> Result<(OwnedFd, OsString), Errno> {
    let Some(name) = file.file_name() else { return Err(Errno::NOENT) };
    let dir = match file.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let real = |path: &Path| {
        path.canonicalize().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    };
    let path = match (dir.parent(), dir.file_name()) {
        (Some(above), Some(dir)) if !above.as_os_str().is_empty() => real(above)?.join(dir),
        _ => real(dir)?,
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS);
    match dir {
        // With both flags the kernel says so of a symlink.
        Err(Errno::NOTDIR) => Err(Errno::LOOP),
        dir => Ok((dir?, name.to_owned())),
    }
}

/// Lets a query of `db` ask the catalog at `file` as well, as `old`.
pub(super) fn attach(
    db: &Connection,
    file: &Path,
    ask: impl FnOnce() -> rusqlite::Result<()>,
) -> rusqlite::Result<()> {
    let place = Place::of(file).map_err(|_| rusqlite::Error::InvalidPath(file.to_path_buf()))?;
    db.execute("ATTACH ?1 AS old", [place.path().as_os_str().as_bytes()])?;
    let outcome = ask();
    db.flush_prepared_statement_cache();
    db.execute("DETACH old", [])?;
    outcome
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use rustix::fs::{RenameFlags, renameat_with};

    use super::*;
    use crate::catalog::Catalog;
    use crate::catalog::open::finish;
    use crate::catalog::schema::{Use, connect};

    fn catalog(dir: &Path) -> PathBuf {
        let file = dir.join("catalog.db");
        Catalog::create(&file, uuid::Uuid::nil()).unwrap();
        file
    }

    #[test]
    fn no_symlink_leads_to_another_catalog() {
        let dir = tempfile::tempdir().unwrap();
        let (canary, store) = (dir.path().join("canary"), dir.path().join("store"));
        std::fs::create_dir(&canary).unwrap();
        std::fs::create_dir(&store).unwrap();
        let outside = catalog(&canary);
        let before = std::fs::read(&outside).unwrap();
        let refused = |file: &Path| {
            let error = Catalog::inspect(file).unwrap_err();
            assert!(matches!(error, Error::Refused(_)), "{error}");
            assert!(Catalog::create(&file.with_file_name("dangling"), uuid::Uuid::nil()).is_err());
        };
        std::os::unix::fs::symlink(&outside, store.join("catalog.db")).unwrap();
        std::os::unix::fs::symlink(canary.join("new"), store.join("dangling")).unwrap();
        refused(&store.join("catalog.db"));
        std::os::unix::fs::symlink(canary.join("new"), canary.join("dangling")).unwrap();
        std::os::unix::fs::symlink(&canary, dir.path().join("link")).unwrap();
        refused(&dir.path().join("link/catalog.db"));
        assert_eq!(std::fs::read(&outside).unwrap(), before);
        assert!(!canary.join("new").exists());
    }

    #[test]
    fn a_backing_may_be_named_through_a_symlink() {
        let dir = tempfile::tempdir().unwrap();
        let private = dir.path().join("backing/private");
        std::fs::create_dir_all(&private).unwrap();
        catalog(&private);
        std::os::unix::fs::symlink(dir.path().join("backing"), dir.path().join("named")).unwrap();
        Catalog::inspect(&dir.path().join("named/private/catalog.db")).unwrap();
    }

    /// Whoever may rename the private directory can do so between any two of our steps.
    #[test]
    fn a_directory_exchanged_while_it_is_opened_leads_nowhere() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("canary")).unwrap();
        std::fs::create_dir(path("store")).unwrap();
        let (outside, file) = (catalog(&path("canary")), catalog(&path("store")));
        std::fs::write(path("canary/catalog.db.new"), "ours").unwrap();
        let before = std::fs::read(&outside).unwrap();
        std::os::unix::fs::symlink(path("canary"), path("link")).unwrap();
        let done = AtomicBool::new(false);
        let mut opened = [0; 2];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let flags = RenameFlags::EXCHANGE;
                    renameat_with(CWD, path("store"), CWD, path("link"), flags).unwrap();
                    // So that some of the work begins and ends in one state.
                    (0..1000).for_each(|_| std::hint::spin_loop());
                    std::thread::yield_now();
                }
            });
            let until = Instant::now() + Duration::from_secs(20);
            let enough = |opened: &[i32; 2]| opened.iter().all(|count| *count >= 100);
            for round in 0.. {
                if enough(&opened) || Instant::now() > until {
                    break;
                }
                let written = connect(&file, Use::Write).and_then(|db| {
                    db.execute("INSERT INTO meta VALUES(?1, 'x')", [round])?;
                    if round % 3 == 0 { Ok(finish(db)?) } else { Ok(()) }
                });
                opened[usize::from(written.is_ok())] += 1;
                if round % 5 == 0 {
                    let _ = Catalog::copy(&file, &file.with_file_name("copy.db"));
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(opened.iter().all(|count| *count >= 20), "{opened:?} failed and opened");
        assert_eq!(std::fs::read(&outside).unwrap(), before);
        let names = std::fs::read_dir(path("canary")).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["catalog.db", "catalog.db.new"]);
        assert_eq!(std::fs::read(path("canary/catalog.db.new")).unwrap(), b"ours");
    }
}

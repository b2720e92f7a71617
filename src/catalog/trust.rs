//! What of a catalog's file is believed: where it lies, and its schema to the letter.
//!
//! The file is hostile input. SQLite is robust against wrong bytes, but runs what the schema says:
//! triggers, views, generated columns, expressions in indexes. So only the schema that we write
//! ourselves is accepted. Rows are checked where they are read.
//!
//! SQLite opens by path. No symlink is followed in place of the file or of the directory that it
//! lies in, and the file is the same one before SQLite opened it and after. One gap stays: what is
//! beside it (`-wal`, `-shm`) is opened by path as well, so that whoever may rename the private
//! directory, and does so at that very moment, can have a new file of that name made elsewhere.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::schema::{FORMAT, damaged, make_all, show};
use crate::error::{Error, IoContext, Result};

/// By kind and name, what made it.
type Objects = BTreeMap<(String, String), String>;

/// A file that SQLite is to open, and which one it is.
pub(super) struct Pinned {
    /// Its path, without symlinks.
    pub path: PathBuf,
    identity: (u64, u64),
}

impl Pinned {
    /// The file at `file`; [`Error::NoStore`] if there is none.
    pub fn at(file: &Path) -> Result<Pinned> {
        let missing = || Error::NoStore(format!("there is no catalog at {}", show(file)));
        let path = match without_symlinks(file) {
            Err(Errno::NOENT) => return Err(missing()),
            other => other.context("find", file)?,
        };
        match identity(&path) {
            Ok(identity) => Ok(Pinned { path, identity }),
            Err(Errno::NOENT) => Err(missing()),
            Err(Errno::LOOP) => Err(Error::Refused(format!(
                "the catalog {} is a symlink or lies in one: that is not followed",
                show(file)
            ))),
            Err(error) => Err(error).context("open", file),
        }
    }

    /// Fails if another file lies at the path meanwhile.
    pub fn check(&self) -> Result<()> {
        if identity(&self.path) == Ok(self.identity) {
            return Ok(());
        }
        let shown = show(&self.path);
        Err(Error::Refused(format!("the catalog {shown} was exchanged while it was opened")))
    }
}

/// Which file lies at a path without symlinks; `LOOP` if there is one, or it is no plain file.
///
/// To close a descriptor of a database would take SQLite's locks on it away; not so one that is a
/// path only.
fn identity(path: &Path) -> Result<(u64, u64), Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file: OwnedFd =
        rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    let stat = rustix::fs::fstat(&file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok((stat.st_dev, stat.st_ino)),
        _ => Err(Errno::LOOP),
    }
}

/// The path with symlinks resolved above the directory that the file lies in: whoever names a
/// backing may do so through a symlink.
fn without_symlinks(file: &Path) -> Result<PathBuf, Errno> {
    let Some(name) = file.file_name() else { return Err(Errno::NOENT) };
    let dir = match file.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let real = |path: &Path| {
        path.canonicalize().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    };
    match (dir.parent(), dir.file_name()) {
        (Some(above), Some(dir)) if !above.as_os_str().is_empty() => {
            Ok(real(above)?.join(dir).join(name))
        }
        _ => Ok(real(dir)?.join(name)),
    }
}

/// Opens a database that is to be made.
pub(super) fn open_new(file: &Path) -> rusqlite::Result<Connection> {
    let path = without_symlinks(file);
    let path = path.map_err(|_| rusqlite::Error::InvalidPath(file.to_path_buf()))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    Connection::open_with_flags(path, flags)
}

/// Switches off what we do not use and a hostile schema would.
pub(super) fn restrict(db: &Connection) -> rusqlite::Result<()> {
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, false)?;
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    Ok(())
}

/// Refuses a catalog whose schema is not that of its version.
pub(super) fn check_schema(db: &Connection, file: &Path, format: i32) -> Result<()> {
    let expected = expected(format)?;
    let found = objects(db)?;
    if let Some(((kind, name), _)) = found.iter().find(|(key, sql)| expected.get(key) != Some(sql))
    {
        let name = crate::types::escape(name.as_bytes());
        return Err(damaged(file, format!("its schema has a {kind} '{name}' that is not ours")));
    }
    let is_table = |key: &&(String, String)| key.0 == "table";
    match expected.keys().filter(is_table).find(|key| !found.contains_key(*key)) {
        Some((_, name)) => Err(damaged(file, format!("it has no table '{name}'"))),
        None => Ok(()),
    }
}

/// What a catalog of a version consists of.
fn expected(format: i32) -> rusqlite::Result<Objects> {
    static KNOWN: [OnceLock<Objects>; FORMAT as usize] = [const { OnceLock::new() }; _];
    let known = usize::try_from(format - 1).ok().and_then(|index| KNOWN.get(index));
    if let Some(objects) = known.and_then(OnceLock::get) {
        return Ok(objects.clone());
    }
    let db = Connection::open_in_memory()?;
    make_all(&db, format)?;
    let made = objects(&db)?;
    if let Some(known) = known {
        // Another thread made the same.
        let _ = known.set(made.clone());
    }
    Ok(made)
}

fn objects(db: &Connection) -> rusqlite::Result<Objects> {
    // What has no text belongs to a table's own: the index of a key.
    let mut statement =
        db.prepare("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL")?;
    let rows = statement.query_map([], |row| Ok(((row.get(0)?, row.get(1)?), row.get(2)?)))?;
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Catalog;

    fn catalog(dir: &Path) -> PathBuf {
        let file = dir.join("catalog.db");
        Catalog::create(&file, uuid::Uuid::nil()).unwrap();
        file
    }

    #[test]
    fn a_schema_that_is_not_ours_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for hostile in [
            "CREATE TRIGGER t AFTER INSERT ON node BEGIN DELETE FROM entry; END",
            "CREATE VIEW v AS SELECT 1",
            "CREATE INDEX i ON node(abs(size))",
            "CREATE TABLE extra(a)",
            "ALTER TABLE node ADD COLUMN g AS (size * 2)",
            "DROP TABLE node; CREATE VIEW node AS SELECT * FROM node_h",
            "DROP TABLE tick; CREATE VIRTUAL TABLE tick USING fts5(g, t)",
            "DROP TABLE undo",
        ] {
            let dir = tempfile::tempdir_in(dir.path()).unwrap();
            let file = catalog(dir.path());
            Connection::open(&file).unwrap().execute_batch(hostile).unwrap();
            let error = Catalog::verify(&file, true).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{hostile}: {error}");
            assert!(Catalog::open_read_only(&file).is_err(), "{hostile}");
        }
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
}

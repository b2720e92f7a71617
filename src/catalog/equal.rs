//! Whether the replicas' catalogs say the same: a hash over all rows of each table.
//!
//! Those that are being written are compared as they were at one moment. Each goes through every
//! commit, so whichever is behind begins to read anew until it is where the others are, which keep
//! what they began to read. Nobody is held up by that, and every table is read once, however much
//! is committed meanwhile. (Comparing until no commit came between never ended beside a busy
//! program, and read everything eight times.)

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rusqlite::types::ValueRef;

use super::Catalog;
use super::database::Db;
use super::schema::{Use, connect, name_damage, read_head_only, while_alive};
use crate::error::{Error, Result};
use crate::sys::device::Alive;

/// How long catalogs may take to be at the same commit.
const MEET_WAIT: Duration = Duration::from_secs(10);
/// How often one that is behind is looked at: a commit takes some milliseconds.
const MEET_STEP: Duration = Duration::from_micros(500);
/// Rows between two looks whether the work is to go on.
const ROWS: usize = 4096;

/// A hash over all rows of each table, by its name: equal catalogs have equal ones.
pub type TableHashes = Vec<(String, [u8; 32])>;

impl Catalog {
    /// The hashes of a catalog.
    pub fn table_hashes(file: &Path) -> Result<TableHashes> {
        Catalog::table_hashes_alive(file, &Alive::default())
    }

    /// As [`Catalog::table_hashes`], which takes long.
    pub fn table_hashes_alive(file: &Path, alive: &Alive) -> Result<TableHashes> {
        let mut db = connect(file, Use::Read)?;
        let hashes = while_alive(&mut db, alive, |db| {
            db.execute_batch("BEGIN")?;
            Ok(hash_tables(db, &mut || Ok(())))
        });
        named(file, hashes.unwrap_or_else(|error| Err(error.into())))
    }

    /// The hashes of several catalogs in use, all after the same commit; `None` if they were never
    /// seen there. Ends with the first error of `go_on`, which is asked now and then.
    pub fn table_hashes_at_once(
        files: &[PathBuf],
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<TableHashes>>> {
        let open = |file: &PathBuf| connect(file, Use::Read);
        let dbs = files.iter().map(open).collect::<Result<Vec<Db>>>()?;
        if !meet(&dbs, go_on)? {
            return Ok(None);
        }
        let each = files.iter().zip(&dbs).map(|(file, db)| named(file, hash_tables(db, go_on)));
        each.collect::<Result<_>>().map(Some)
    }
}

/// Tells in which file the damage is.
fn named<T>(file: &Path, answer: Result<T>) -> Result<T> {
    match answer {
        Err(Error::Catalog(error)) => Err(name_damage(file, error)),
        other => other,
    }
}

/// Begins to read all of them after the same commit; whether it could.
fn meet(dbs: &[Db], go_on: &mut dyn FnMut() -> Result<()>) -> Result<bool> {
    let begin = |db: &Db| {
        db.execute_batch("BEGIN")?;
        read_head_only(db).map(|head| head.sequence)
    };
    let mut at = dbs.iter().map(begin).collect::<rusqlite::Result<Vec<u64>>>()?;
    let until = Instant::now() + MEET_WAIT;
    loop {
        let newest = at.iter().copied().max().unwrap_or_default();
        if at.iter().all(|one| *one == newest) {
            return Ok(true);
        }
        go_on()?;
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(MEET_STEP);
        for (db, one) in dbs.iter().zip(&mut at).filter(|(_, one)| **one < newest) {
            db.execute_batch("ROLLBACK")?;
            *one = begin(db)?;
        }
    }
}

/// The hashes of what a transaction that has begun reads.
fn hash_tables(db: &Connection, go_on: &mut dyn FnMut() -> Result<()>) -> Result<TableHashes> {
    let names: Vec<String> = db
        .prepare(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' \
             ORDER BY name",
        )?
        .query_map([], |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    let mut hashes = Vec::new();
    for name in names {
        let mut hasher = blake3::Hasher::new();
        // By the primary key: every table has one, and its order is the table's own.
        let mut statement = db.prepare(&format!("SELECT * FROM \"{name}\""))?;
        let columns = statement.column_count();
        let mut rows = statement.query([])?;
        let mut count = 0usize;
        while let Some(row) = rows.next()? {
            for column in 0..columns {
                hash_value(&mut hasher, row.get_ref(column)?);
            }
            count += 1;
            if count.is_multiple_of(ROWS) {
                go_on()?;
            }
        }
        hashes.push((name, *hasher.finalize().as_bytes()));
    }
    Ok(hashes)
}

fn hash_value(hasher: &mut blake3::Hasher, value: ValueRef<'_>) {
    let mut bytes = |kind: u8, bytes: &[u8]| {
        hasher.update(&[kind]).update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    };
    match value {
        ValueRef::Null => bytes(0, &[]),
        ValueRef::Integer(number) => bytes(1, &number.to_le_bytes()),
        ValueRef::Real(number) => bytes(2, &number.to_le_bytes()),
        ValueRef::Text(text) => bytes(3, text),
        ValueRef::Blob(blob) => bytes(4, blob),
    }
}

//! Whether the replicas' catalogs say the same: a hash over all rows of each table.
//!
//! Those that are being written are compared as they were after one commit: reads of all of them
//! are begun, again and again, until all see the same. After that every table is read once, however
//! much is committed meanwhile. (Comparing until no commit came between never ended beside a busy
//! program, and read everything eight times.)
//!
//! Until a catalog is read its WAL is not emptied, and grows by what is committed. So each is let
//! go of as soon as it was read, nobody waits for one that hangs for longer than for a query, and
//! the caller ends it all where room is short.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rusqlite::types::ValueRef;

use super::Catalog;
use super::database::Db;
use super::schema::{Use, connect, name_damage, read_head_only, while_alive};
use crate::error::{Error, Result};
use crate::sys::device::Alive;
use crate::sys::patience::Patience;
use crate::sys::sqlite::with_patience;
use crate::types::ReplicaId;

/// How long catalogs may take to be at the same commit.
const MEET_WAIT: Duration = Duration::from_secs(10);
/// How often that is tried at once, and how long it is waited between two tries after that: a
/// commit takes some milliseconds.
const MEET_TRIES: u32 = 64;
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

    /// The hashes of these replicas' catalogs, which are in use, all after the same commit; `None`
    /// if they were never seen there, or one cannot be opened in time. Ends with the first error of
    /// `go_on`, which is asked now and then.
    pub fn table_hashes_at_once(
        &self,
        of: &[ReplicaId],
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Vec<TableHashes>>> {
        let mut opened = Vec::with_capacity(of.len());
        for id in of {
            let Some((file, patience)) = self.shared.readers.of(*id) else { return Ok(None) };
            let Some(db) = patience.call(move || connect(&file, Use::Read)) else {
                return Ok(None);
            };
            opened.push((db?, patience));
        }
        if !meet(&opened, go_on)? {
            return Ok(None);
        }
        let hash = |(db, patience): (Db, Arc<Patience>)| {
            named(db.file(), with_patience(&patience, || hash_tables(&db, go_on)))
        };
        opened.into_iter().map(hash).collect::<Result<_>>().map(Some)
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
fn meet(opened: &[(Db, Arc<Patience>)], go_on: &mut dyn FnMut() -> Result<()>) -> Result<bool> {
    let begin = |(db, patience): &(Db, Arc<Patience>)| {
        let head = with_patience(patience, || {
            db.execute_batch("BEGIN")?;
            read_head_only(db)
        });
        named(db.file(), head.map(|head| head.sequence).map_err(Error::from))
    };
    let until = Instant::now() + MEET_WAIT;
    let mut tries = 0;
    loop {
        let at = opened.iter().map(begin).collect::<Result<Vec<u64>>>()?;
        if at.iter().all(|one| *one == at[0]) {
            return Ok(true);
        }
        opened.iter().try_for_each(|(db, _)| db.execute_batch("ROLLBACK"))?;
        go_on()?;
        if Instant::now() >= until {
            return Ok(false);
        }
        tries += 1;
        if tries > MEET_TRIES {
            std::thread::sleep(MEET_STEP);
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

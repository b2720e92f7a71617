//! The catalog's tables: the on-disk format, version 4.
//!
//! One SQLite database in WAL mode, `application_id` "RVFS", `user_version` = [`FORMAT`], pages of
//! 4096 bytes. History is the axis `g` (generation); an interval `[born, died)` is half-open. What
//! is live lies in one table, what has ended in its sibling `*_h`, which only ever grows (until
//! retention deletes from it): a row moves from live to history when it ends, never back, so
//! whoever reads the live table first and then the history cannot miss it.
//!
//! | table | holds |
//! |--|--|
//! | `head` | one row: store, commit sequence, hash chain, generation, next ids, totals |
//! | `meta` | settings by name |
//! | `tick` | generation → time, one row for about 10 ms; both columns strictly ascending |
//! | `snapshot` | named generations |
//! | `entry`, `entry_h` | directory entries; `kind` of what they name, NULL for a file |
//! | `node`, `node_h` | states of nodes |
//! | `symlink` | targets, for ever the same |
//! | `content` | sealed contents; `state` see [`ContentState`]; `same`: has that one's bytes |
//! | `undo` | before-images; `segment` NULL: a hole, negative: in the stream of that recipe |
//! | `recipe` | what is packed: chunk ids and lengths, both as LEB128, one after another |
//! | `chunk` | stored chunks, found by the hash's first 5 bytes; `refs`: uses in recipes |
//! | `pack` | pack files; `live`: bytes of chunks that are in use |
//! | `tally` | one row: next ids, bytes and horizon of what version 2 added |
//! | `moment` | generations below the horizon that stay visible beside the snapshots |
//! | `sweep` | gaps between visible generations, to be swept out, and how far that is |
//! | `actor`, `act` | who made changes: a row of `act` counts until the next one |
//! | `purged` | paths removed from all history on request |
//! | `xattr_set` | interned sets: count, then names and values, each as length (LE u32) and bytes |
//! | `touched` | where states and names of nodes begin and end, see [`super::touched`] |
//! | `digest` | the first 16 bytes of the BLAKE3 of a content's bytes: see [`super::digest`] |
//!
//! What history does not show is in `node` and `entry` with a `born` of 2^62 and never comes into
//! their siblings.
//!
//! Version 1 had none of the tables from `recipe` on. In version 2 each name was in `entry_h`
//! three times, `chunk` had the first 8 bytes of the hash as `key`, `tick` an index by time, and
//! there was no `digest`. In version 3 `touched` had no blocks, and no time was beside another.
//! Opening any of them for writing makes it one of version 4, in which rows of version 3 are as
//! they were. Indexes that came later are made whenever a file that lacks them is opened for
//! writing.
//!
//! Times are nanoseconds since 1970 as an integer where that is exact, else 12 bytes: seconds (BE
//! i64), nanoseconds (BE u32). `ctime` and `btime` are NULL where they equal `mtime`, and 1 to 7
//! bytes where they are near it: how many nanoseconds after it (LE, signed).

use std::num::Wrapping;
use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, Row, params};

use super::database::{Db, Place};
use super::{Head, NodeRow, UndoFile, UndoPlace, UndoRow, trust};
use crate::error::{Error, Result};
use crate::sys::device::Alive;
use crate::types::{ContentId, Generation, NodeId, Timestamp, escape};

#[cfg(test)]
mod tests;
mod time;

pub(super) use time::Time;

/// `application_id`: "RVFS".
const APPLICATION_ID: i32 = 0x5256_4653;
/// `user_version`: the version of the tables.
pub(super) const FORMAT: i32 = 4;
/// The oldest version that is taken over.
const FORMAT_MIN: i32 = 1;
/// Prepared statements kept per connection: all that the catalog has.
const STATEMENTS_MAX: usize = 128;
/// How long a connection waits for another's lock, in milliseconds. Only WAL recovery takes one.
pub(super) const BUSY_MS: u64 = 10_000;
/// Steps of SQLite's after which long work shows that it goes on: milliseconds at most.
const ALIVE_STEPS: i32 = 1000;
/// What a person can do about a damaged catalog.
pub(super) const REMEDY: &str =
    "Mount without this replica, so that it is made anew from another, or rebuild the catalog";

const TABLES: &str = "
CREATE TABLE head(one INTEGER PRIMARY KEY CHECK(one = 1), store BLOB NOT NULL,
    sequence INTEGER NOT NULL, chain BLOB NOT NULL, generation INTEGER NOT NULL,
    next_node INTEGER NOT NULL, next_content INTEGER NOT NULL, next_snapshot INTEGER NOT NULL,
    next_xattrs INTEGER NOT NULL, live_nodes INTEGER NOT NULL, live_bytes INTEGER NOT NULL,
    past_versions INTEGER NOT NULL, undo_bytes INTEGER NOT NULL, preserved_bytes INTEGER NOT NULL);
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE tick(g INTEGER PRIMARY KEY, t INTEGER NOT NULL);
CREATE INDEX tick_time ON tick(t);
CREATE TABLE snapshot(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, g INTEGER NOT NULL,
    time NOT NULL, automatic INTEGER NOT NULL, held INTEGER NOT NULL);
CREATE INDEX snapshot_g ON snapshot(g, id);
CREATE TABLE entry(parent INTEGER NOT NULL, name BLOB NOT NULL, node INTEGER NOT NULL,
    born INTEGER NOT NULL, PRIMARY KEY(parent, name)) WITHOUT ROWID;
CREATE INDEX entry_node ON entry(node);
CREATE TABLE entry_h(parent INTEGER NOT NULL, died INTEGER NOT NULL, name BLOB NOT NULL,
    born INTEGER NOT NULL, node INTEGER NOT NULL,
    PRIMARY KEY(parent, died, name, born)) WITHOUT ROWID;
CREATE INDEX entry_h_name ON entry_h(parent, name, died);
CREATE INDEX entry_h_node ON entry_h(node, died);
CREATE TABLE node(id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, mode INTEGER NOT NULL,
    uid INTEGER NOT NULL, gid INTEGER NOT NULL, rdev INTEGER NOT NULL, size INTEGER NOT NULL,
    blocks INTEGER NOT NULL, mtime NOT NULL, ctime, btime, xattrs INTEGER NOT NULL,
    content INTEGER NOT NULL, born INTEGER NOT NULL);
CREATE TABLE node_h(id INTEGER NOT NULL, died INTEGER NOT NULL, kind INTEGER NOT NULL,
    mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL, rdev INTEGER NOT NULL,
    size INTEGER NOT NULL, blocks INTEGER NOT NULL, mtime NOT NULL, ctime, btime,
    xattrs INTEGER NOT NULL, content INTEGER NOT NULL, born INTEGER NOT NULL,
    PRIMARY KEY(id, died)) WITHOUT ROWID;
CREATE TABLE symlink(node INTEGER PRIMARY KEY, target BLOB NOT NULL);
CREATE TABLE content(id INTEGER PRIMARY KEY, node INTEGER NOT NULL, size INTEGER NOT NULL,
    state INTEGER NOT NULL);
CREATE INDEX content_node ON content(node, id);
CREATE TABLE undo(node INTEGER NOT NULL, content INTEGER NOT NULL, offset INTEGER NOT NULL,
    length INTEGER NOT NULL, segment INTEGER, segment_offset INTEGER,
    PRIMARY KEY(node, content, offset)) WITHOUT ROWID;
CREATE TABLE xattr_set(id INTEGER PRIMARY KEY, hash BLOB NOT NULL, body BLOB NOT NULL);
CREATE INDEX xattr_set_hash ON xattr_set(hash);
CREATE TABLE touched(g INTEGER NOT NULL, node INTEGER NOT NULL, PRIMARY KEY(g, node)) WITHOUT ROWID;
";
/// What version 2 added.
const TABLES_2: &str = "
ALTER TABLE snapshot ADD COLUMN tags TEXT NOT NULL DEFAULT '';
CREATE INDEX snapshot_automatic ON snapshot(g, id) WHERE automatic;
ALTER TABLE content ADD COLUMN same INTEGER;
CREATE INDEX content_same ON content(same) WHERE same IS NOT NULL;
CREATE INDEX content_waiting ON content(id) WHERE state = 1;
CREATE INDEX undo_segment ON undo(segment) WHERE segment IS NOT NULL;
CREATE TABLE recipe(id INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE chunk(id INTEGER PRIMARY KEY, key INTEGER NOT NULL, hash BLOB NOT NULL,
    pack INTEGER NOT NULL, frame INTEGER NOT NULL, at INTEGER NOT NULL, length INTEGER NOT NULL,
    stored INTEGER NOT NULL, refs INTEGER NOT NULL);
CREATE INDEX chunk_key ON chunk(key);
CREATE INDEX chunk_pack ON chunk(pack);
CREATE TABLE pack(id INTEGER PRIMARY KEY, bytes INTEGER NOT NULL, live INTEGER NOT NULL,
    hash BLOB NOT NULL);
CREATE TABLE tally(one INTEGER PRIMARY KEY CHECK(one = 1), next_chunk INTEGER NOT NULL,
    next_pack INTEGER NOT NULL, packed_bytes INTEGER NOT NULL, cloned_bytes INTEGER NOT NULL,
    horizon INTEGER NOT NULL);
INSERT INTO tally VALUES(1, 1, 1, 0, 0, 1);
CREATE TABLE moment(g INTEGER PRIMARY KEY);
CREATE TABLE sweep(after INTEGER NOT NULL, until INTEGER NOT NULL, at_g INTEGER NOT NULL,
    at_node INTEGER NOT NULL, PRIMARY KEY(after, until)) WITHOUT ROWID;
CREATE TABLE actor(id INTEGER PRIMARY KEY, uid INTEGER NOT NULL, pid INTEGER NOT NULL,
    command BLOB NOT NULL);
CREATE TABLE act(g INTEGER PRIMARY KEY, actor INTEGER NOT NULL);
CREATE TABLE purged(id INTEGER PRIMARY KEY, time NOT NULL, path BLOB NOT NULL,
    versions INTEGER NOT NULL, bytes INTEGER NOT NULL);
";
/// What version 3 stores in less room, and the digests of contents that it added. Names of the past
/// lie by directory, once in the table and once in the index by node. A name tells what it is a
/// name of, unless that is a file: a directory is listed without a look at a thousand nodes.
const TABLES_3: &str = "
DROP INDEX tick_time;
DROP INDEX entry_h_name;
DROP INDEX entry_h_node;
ALTER TABLE entry ADD COLUMN kind INTEGER;
UPDATE entry SET kind = (SELECT kind FROM node WHERE id = entry.node)
    WHERE node IN (SELECT id FROM node WHERE kind <> 8);
ALTER TABLE entry_h RENAME TO entry_h_2;
CREATE TABLE entry_h(parent INTEGER NOT NULL, name BLOB NOT NULL, died INTEGER NOT NULL,
    born INTEGER NOT NULL, node INTEGER NOT NULL, kind INTEGER,
    PRIMARY KEY(parent, name, died)) WITHOUT ROWID;
INSERT INTO entry_h(parent, name, died, born, node, kind)
    SELECT parent, name, died, born, node, nullif(coalesce(
        (SELECT kind FROM node WHERE id = entry_h_2.node),
        (SELECT kind FROM node_h WHERE id = entry_h_2.node LIMIT 1)), 8)
    FROM entry_h_2 ORDER BY parent, name, died;
DROP TABLE entry_h_2;
CREATE INDEX entry_h_node ON entry_h(node, died);
DROP INDEX chunk_key;
ALTER TABLE chunk DROP COLUMN key;
CREATE INDEX chunk_hash ON chunk(substr(hash, 1, 5));
CREATE TABLE digest(content INTEGER PRIMARY KEY, hash BLOB NOT NULL);
";
/// What version 4 stores in less room. An index has the row's id anyway.
const TABLES_4: &str = "
ALTER TABLE touched ADD COLUMN body BLOB;
DROP INDEX content_node;
CREATE INDEX content_node ON content(node);
";
/// What finds that nothing refers to a set of attributes, or an actor, any more.
const INDEXES: &str = "
CREATE INDEX IF NOT EXISTS node_xattrs ON node(xattrs) WHERE xattrs > 0;
CREATE INDEX IF NOT EXISTS node_h_xattrs ON node_h(xattrs) WHERE xattrs > 0;
CREATE INDEX IF NOT EXISTS act_actor ON act(actor);
";
/// What makes a catalog of each version from one of the version before.
const VERSIONS: [&str; FORMAT as usize] = [TABLES, TABLES_2, TABLES_3, TABLES_4];

/// The columns of a node's state in `node` and `node_h`, as [`node_row`] takes them; `born` is the
/// next.
pub(super) const NODE_COLUMNS: &str =
    "id, kind, mode, uid, gid, rdev, size, blocks, mtime, ctime, btime, xattrs, content";

/// Where a content lies as a whole, as `content.state` has it; 0: nowhere, it is reached through
/// the node's later contents, or the live file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ContentState {
    /// Whole in `preserved/`, to be packed.
    Preserved = 1,
    /// In the recipe of its id.
    Packed = 2,
    /// Whole in `preserved/`, sharing blocks with the live file: it stays there.
    Cloned = 3,
    /// The same as the content that `same` names.
    Same = 4,
}

/// The head row in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeadRow {
    /// What [`super::Catalog::inspect`] tells.
    pub head: Head,
    /// The ids to hand out next: nodes, contents, snapshots, attribute sets.
    pub next: NextIds,
    /// Totals, kept by the commits. Two sparse files of exabytes are enough to pass any bound: what
    /// is added and taken away again leaves no trace all the same.
    pub live_nodes: Wrapping<i64>,
    pub live_bytes: Wrapping<i64>,
    pub past_versions: Wrapping<i64>,
    pub undo_bytes: Wrapping<i64>,
    pub preserved_bytes: Wrapping<i64>,
    /// From the row of `tally`.
    pub packed_bytes: Wrapping<i64>,
    pub cloned_bytes: Wrapping<i64>,
    /// From here on every generation is visible.
    pub horizon: Generation,
}

/// The ids to hand out next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NextIds {
    pub node: u64,
    pub content: u64,
    pub snapshot: u64,
    pub xattrs: u64,
    pub chunk: u64,
    pub pack: u64,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// The one writer of a file.
    Write,
    /// Queries.
    Read,
    /// Queries of a file that nobody else has open, nor gets while this has.
    Hold,
}

/// Opens an existing catalog and checks that it is one that we can read.
pub(super) fn connect(file: &Path, for_use: Use) -> Result<Db> {
    connect_at(Place::of(file)?, for_use)
}

/// As [`connect`].
pub(super) fn connect_at(place: Place, for_use: Use) -> Result<Db> {
    connect_alive(place, for_use, &Alive::default())
}

/// As [`connect`], which takes long where the catalog is of an older version.
pub(super) fn connect_alive(place: Place, for_use: Use, alive: &Alive) -> Result<Db> {
    let file = &place.shown().to_path_buf();
    let mut opened =
        Db::open(place, access_for(for_use)).and_then(|db| connected(db, file, for_use, alive));
    if let Err(Error::Catalog(error)) = opened {
        opened = match for_use {
            Use::Read => Db::open_unchanging(Place::of(file)?, error)
                .and_then(|db| connected(db, file, for_use, alive)),
            _ => Err(Error::Catalog(error)),
        };
    }
    match opened {
        Err(Error::Catalog(error)) => Err(name_damage(file, error)),
        other => other,
    }
}

/// Does something with a database that shows now and then that it goes on, and fails once it is
/// to end.
pub(super) fn while_alive<T>(
    db: &mut Db,
    alive: &Alive,
    work: impl FnOnce(&mut Db) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    let alive = alive.clone();
    let tell = move || {
        alive.tell();
        alive.is_ended()
    };
    db.progress_handler(ALIVE_STEPS, Some(tell))?;
    let outcome = work(db);
    db.progress_handler(0, None::<fn() -> bool>)?;
    outcome
}

fn access_for(for_use: Use) -> OpenFlags {
    match for_use {
        Use::Write | Use::Hold => OpenFlags::SQLITE_OPEN_READ_WRITE,
        Use::Read => OpenFlags::SQLITE_OPEN_READ_ONLY,
    }
}

fn connected(mut db: Db, file: &Path, for_use: Use, alive: &Alive) -> Result<Db> {
    settle(&db, for_use)?;
    let id: i32 = db.query_row("PRAGMA application_id", [], |row| row.get(0))?;
    let format: i32 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if id != APPLICATION_ID {
        return Err(damaged(file, "it is not a catalog of RearviewFS".into()));
    }
    if format > FORMAT {
        return Err(Error::Refused(format!(
            "this store was written by a newer rearview (format {format}, \
             this one knows {FORMAT}): \
             {}. Use that or a later version",
            show(file)
        )));
    }
    if format < FORMAT_MIN {
        return Err(damaged(file, format!("its format {format} does not exist")));
    }
    trust::check_schema(&db, file, format)?;
    // The files beside it were opened by now as well.
    db.check()?;
    if for_use == Use::Write {
        // Of readers: from here on the index of the WAL lies in memory, and nobody else gets in.
        db.place().beside("-shm")?.remove()?;
    }
    if for_use == Use::Write {
        while_alive(&mut db, alive, |db| {
            if format < FORMAT {
                upgrade(db, format)?;
            }
            db.execute_batch(INDEXES)
        })?;
    }
    Ok(db)
}

/// Adds what the versions after `format` have. An index is sorted in a file: in memory, one of
/// ten million rows would take half a gigabyte. Where there is no room for the file, it does.
fn upgrade(db: &mut Connection, format: i32) -> rusqlite::Result<()> {
    db.execute_batch("PRAGMA temp_store = FILE")?;
    let upgraded = upgrade_at_once(db, format);
    db.execute_batch("PRAGMA temp_store = MEMORY")?;
    upgraded.or_else(|_| upgrade_at_once(db, format))
}

/// In one transaction: if we die before its end, the catalog is of the version that it was.
fn upgrade_at_once(db: &mut Connection, format: i32) -> rusqlite::Result<()> {
    let transaction = db.transaction()?;
    add_tables(&transaction, format, FORMAT)?;
    transaction.execute_batch(&format!("PRAGMA user_version = {FORMAT}"))?;
    transaction.commit()
}

/// Makes the tables of version `to` from those of version `from`; 0 has none.
fn add_tables(db: &Connection, from: i32, to: i32) -> rusqlite::Result<()> {
    VERSIONS[from as usize..to as usize].iter().try_for_each(|sql| db.execute_batch(sql))
}

/// Makes all that a catalog of a version has, in an empty database.
pub(super) fn make_all(db: &Connection, format: i32) -> rusqlite::Result<()> {
    add_tables(db, 0, format)?;
    db.execute_batch(INDEXES)
}

/// Refuses a catalog of an older version, which looking at it cannot upgrade.
pub(super) fn refuse_old(db: &Connection, file: &Path) -> Result<()> {
    let format: i32 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if format < FORMAT {
        return Err(Error::Refused(format!(
            "{} was written by an older rearview (format {format}, this one has {FORMAT}): mount \
             the store once, then it can be looked at unmounted",
            show(file)
        )));
    }
    Ok(())
}

/// The settings of a connection. None is stored in the file.
fn settle(db: &Connection, for_use: Use) -> rusqlite::Result<()> {
    db.busy_timeout(std::time::Duration::from_millis(BUSY_MS))?;
    db.set_prepared_statement_cache_capacity(STATEMENTS_MAX);
    // Plans do not depend on bound values: otherwise each new generation in a range prepares anew.
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    trust::restrict(db)?;
    // No mmap: a page that a dying disk cannot give would be a SIGBUS instead of an error.
    db.execute_batch(
        "PRAGMA mmap_size = 0; PRAGMA trusted_schema = OFF; PRAGMA foreign_keys = OFF; \
         PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY;",
    )?;
    match for_use {
        Use::Read => db.execute_batch("PRAGMA cache_size = -8192; PRAGMA query_only = ON;"),
        Use::Hold => {
            db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
            db.execute_batch("PRAGMA query_only = ON;")
        }
        Use::Write => {
            // A detached replica's file is not touched again, not even by closing it.
            db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
            db.execute_batch(
                "PRAGMA cache_size = -24576; PRAGMA journal_mode = WAL; \
                 PRAGMA synchronous = NORMAL; PRAGMA wal_autocheckpoint = 0; \
                 PRAGMA journal_size_limit = 67108864;",
            )
        }
    }
}

/// Makes an empty catalog. The file may exist only if it is empty.
pub(super) fn create(file: &Path, store: uuid::Uuid, now: Timestamp) -> Result<()> {
    let mut db = Place::of(file)?.open_new()?;
    db.execute_batch(&format!(
        "PRAGMA page_size = 4096; PRAGMA application_id = {APPLICATION_ID}; \
         PRAGMA journal_mode = WAL; \
         PRAGMA synchronous = FULL;"
    ))?;
    let transaction = db.transaction()?;
    add_tables(&transaction, 0, FORMAT)?;
    transaction.execute_batch(INDEXES)?;
    transaction.execute_batch(&format!("PRAGMA user_version = {FORMAT}"))?;
    transaction.execute(
        "INSERT INTO head VALUES(1, ?1, 0, ?2, 0, 2, 1, 1, 1, 0, 0, 0, 0, 0)",
        params![store.as_bytes(), [0u8; 32]],
    )?;
    transaction.execute("INSERT INTO tick VALUES(0, ?1)", params![now.as_nanos()])?;
    transaction.commit()?;
    db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")?;
    db.close()?;
    Ok(())
}

/// Reads what a catalog of any version says of itself.
pub(super) fn read_head_only(db: &Connection) -> rusqlite::Result<Head> {
    db.prepare_cached("SELECT store, sequence, chain, generation FROM head WHERE one = 1")?
        .query_row([], |row| {
            let store: [u8; 16] = row.get(0)?;
            Ok(Head {
                store: uuid::Uuid::from_bytes(store),
                sequence: unsigned(row, 1)?,
                chain: row.get(2)?,
                generation: row.get(3)?,
            })
        })
}

/// Reads the head row.
pub(super) fn read_head(db: &Connection) -> rusqlite::Result<HeadRow> {
    let head = read_head_only(db)?;
    db.prepare_cached(
        "SELECT next_node, next_content, next_snapshot, next_xattrs, live_nodes, live_bytes, \
         past_versions, undo_bytes, preserved_bytes, next_chunk, next_pack, packed_bytes, \
         cloned_bytes, horizon FROM head JOIN tally USING(one) WHERE one = 1",
    )?
    .query_row([], |row| {
        Ok(HeadRow {
            head: head.clone(),
            next: NextIds {
                node: unsigned(row, 0)?,
                content: unsigned(row, 1)?,
                snapshot: unsigned(row, 2)?,
                xattrs: unsigned(row, 3)?,
                chunk: unsigned(row, 9)?,
                pack: unsigned(row, 10)?,
            },
            live_nodes: Wrapping(row.get(4)?),
            live_bytes: Wrapping(row.get(5)?),
            past_versions: Wrapping(row.get(6)?),
            undo_bytes: Wrapping(row.get(7)?),
            preserved_bytes: Wrapping(row.get(8)?),
            packed_bytes: Wrapping(row.get(11)?),
            cloned_bytes: Wrapping(row.get(12)?),
            horizon: row.get(13)?,
        })
    })
}

/// Writes the head row.
pub(super) fn write_head(db: &Connection, row: &HeadRow) -> rusqlite::Result<()> {
    db.prepare_cached(
        "UPDATE head SET sequence = ?1, chain = ?2, generation = ?3, next_node = ?4, \
         next_content = ?5, next_snapshot = ?6, next_xattrs = ?7, live_nodes = ?8, \
         live_bytes = ?9, \
         past_versions = ?10, undo_bytes = ?11, preserved_bytes = ?12 WHERE one = 1",
    )?
    .execute(params![
        row.head.sequence as i64,
        row.head.chain,
        row.head.generation,
        row.next.node as i64,
        row.next.content as i64,
        row.next.snapshot as i64,
        row.next.xattrs as i64,
        row.live_nodes.0,
        row.live_bytes.0,
        row.past_versions.0,
        row.undo_bytes.0,
        row.preserved_bytes.0,
    ])?;
    db.prepare_cached(
        "UPDATE tally SET next_chunk = ?1, next_pack = ?2, packed_bytes = ?3, cloned_bytes = ?4, \
         horizon = ?5 WHERE one = 1",
    )?
    .execute(params![
        row.next.chunk as i64,
        row.next.pack as i64,
        row.packed_bytes.0,
        row.cloned_bytes.0,
        row.horizon,
    ])?;
    Ok(())
}

/// A count or an id: an integer that is not negative.
pub(super) fn unsigned(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    let value: i64 = row.get(column)?;
    u64::try_from(value).map_err(|_| rusqlite::Error::IntegralValueOutOfRange(column, value))
}

/// A node's state from [`NODE_COLUMNS`] beginning at `first`.
pub(super) fn node_row(row: &Row<'_>, first: usize) -> rusqlite::Result<NodeRow> {
    let mtime = row.get::<_, Time>(first + 8)?.0;
    Ok(NodeRow {
        id: row.get(first)?,
        kind: row.get(first + 1)?,
        mode: row.get(first + 2)?,
        uid: row.get(first + 3)?,
        gid: row.get(first + 4)?,
        rdev: row.get::<_, i64>(first + 5)? as u64,
        size: unsigned(row, first + 6)?,
        blocks: unsigned(row, first + 7)?,
        mtime,
        ctime: Time::read_beside(row, first + 9, mtime)?,
        btime: Time::read_beside(row, first + 10, mtime)?,
        xattrs: row.get(first + 11)?,
        content: row.get(first + 12)?,
    })
}

/// The columns `segment` and `segment_offset` of a before-image.
pub(super) fn place_columns(at: Option<UndoPlace>) -> (Option<i64>, Option<i64>) {
    let Some(at) = at else { return (None, None) };
    let segment = match at.file {
        UndoFile::Segment(number) => number as i64,
        UndoFile::Stream(id) => -(id.0 as i64),
    };
    (Some(segment), Some(at.offset as i64))
}

/// A before-image's row from `content, offset, length, segment, segment_offset`.
pub(super) fn undo_row(row: &Row<'_>, node: NodeId) -> rusqlite::Result<UndoRow> {
    let file = match row.get::<_, Option<i64>>(3)? {
        None => None,
        Some(number) if number > 0 => Some(UndoFile::Segment(number as u64)),
        Some(number) => Some(UndoFile::Stream(ContentId(number.unsigned_abs()))),
    };
    let at = match file {
        Some(file) => Some(UndoPlace { file, offset: unsigned(row, 4)? }),
        None => None,
    };
    let (offset, length) = (unsigned(row, 1)?, unsigned(row, 2)?);
    Ok(UndoRow { node, content: row.get(0)?, offset, length, at })
}

/// A generation where a state ended; NULL where it has not.
pub(super) fn end(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<Generation>> {
    row.get(column)
}

/// A path for people.
pub(super) fn show(file: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    escape(file.as_os_str().as_bytes())
}

/// The error for a catalog that cannot be used.
pub(super) fn damaged(file: &Path, detail: String) -> Error {
    Error::Damaged { what: format!("the catalog {}", show(file)), detail, remedy: REMEDY }
}

/// Gives a database error that means damage the name of the file and a remedy.
pub(super) fn name_damage(file: &Path, error: rusqlite::Error) -> Error {
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt | ErrorCode::Unknown) | None => {
            damaged(file, error.to_string())
        }
        Some(_) => Error::Refused(format!("the catalog {} cannot be used: {error}", show(file))),
    }
}

/// Whether one of the databases of a connection is a sound one.
pub(super) fn is_whole(db: &Connection, name: &str) -> bool {
    let check = format!("PRAGMA {name}.quick_check(1)");
    let found = db.query_row(&check, [], |row| row.get::<_, String>(0));
    found.is_ok_and(|found| found == "ok")
}

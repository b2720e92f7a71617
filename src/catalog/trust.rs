//! What of a catalog's file is believed: its schema to the letter.
//!
//! The file is hostile input. SQLite is robust against wrong bytes, but runs what the schema says:
//! triggers, views, generated columns, expressions in indexes. So only the schema that we write
//! ourselves is accepted. Rows are checked where they are read.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use rusqlite::Connection;
use rusqlite::config::DbConfig;

use super::schema::{FORMAT, damaged, make_all};
use crate::error::Result;

/// By kind and name, what made it.
type Objects = BTreeMap<(String, String), String>;

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
    use crate::error::Error;

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
            let file = dir.path().join("catalog.db");
            Catalog::create(&file, uuid::Uuid::nil()).unwrap();
            Connection::open(&file).unwrap().execute_batch(hostile).unwrap();
            let error = Catalog::verify(&file, true).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{hostile}: {error}");
            assert!(Catalog::open_read_only(&file).is_err(), "{hostile}");
        }
    }
}

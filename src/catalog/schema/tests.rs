//! Older versions of the tables are taken over.

use super::super::touched;
use super::*;

#[test]
fn a_catalog_of_version_2_keeps_its_names_and_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("catalog.db");
    let db = Connection::open(&file).unwrap();
    db.execute_batch(&format!(
        "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 2; {TABLES} {TABLES_2}
         INSERT INTO entry_h(parent, died, name, born, node) VALUES(1, 9, x'62', 3, 5);
         INSERT INTO entry_h(parent, died, name, born, node) VALUES(1, 4, x'63', 2, 6);
         INSERT INTO node_h VALUES(5, 9, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3);
         INSERT INTO chunk VALUES(7, 42, x'0102030405060708', 1, 2, 3, 4, 5, 6);"
    ))
    .unwrap();
    drop(db);
    let db = connect(&file, Use::Write).unwrap();
    let names = "SELECT group_concat(hex(name) || node || ' ' || born || ' ' || died || \
                 coalesce(kind, '')) FROM (SELECT * FROM entry_h ORDER BY died)";
    let names: String = db.query_row(names, [], |row| row.get(0)).unwrap();
    assert_eq!(names, "636 2 4,625 3 94");
    let chunk = "SELECT refs FROM chunk WHERE substr(hash, 1, 5) = x'0102030405'";
    assert_eq!(db.query_row(chunk, [], |row| row.get::<_, i64>(0)).unwrap(), 6);
    drop(db);
    connect(&file, Use::Read).unwrap();
}

/// A catalog as version 3 wrote it: five states and names of one directory, each touch a row
/// of its own, times whole.
fn version_3(file: &Path) -> Connection {
    let db = Connection::open(file).unwrap();
    db.execute_batch(&format!(
        "PRAGMA journal_mode = WAL; PRAGMA application_id = {APPLICATION_ID};
         PRAGMA user_version = 3; {TABLES} {TABLES_2} {TABLES_3} {INDEXES}
         INSERT INTO head VALUES(1, zeroblob(16), 5, zeroblob(32), 5, 7, 7, 1, 1, 5, 0, 0, 0, 0);
         INSERT INTO tick VALUES(0, 1000);
         WITH RECURSIVE n(i) AS (VALUES(2) UNION ALL SELECT i + 1 FROM n WHERE i < 6)
         INSERT INTO node SELECT i, 8, 420, 0, 0, 0, 10, 8, 1000, 2000, 500, 0, i, i - 1 FROM n;
         INSERT INTO entry SELECT 1, cast(id AS BLOB), id, born, NULL FROM node;
         INSERT INTO content SELECT id, id, 10, 0, NULL FROM node;
         INSERT INTO touched SELECT born, id FROM node;"
    ))
    .unwrap();
    db
}

fn check_version_3(file: &Path) {
    let db = connect(file, Use::Write).unwrap();
    let format: i32 = db.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    assert_eq!(format, FORMAT);
    let touches: Vec<_> = (2..7).map(|id| (Generation(id - 1), NodeId(id))).collect();
    assert_eq!(touched::all(&db).unwrap(), touches);
    let sql = format!("SELECT {NODE_COLUMNS} FROM node WHERE id = 4");
    let row = db.query_row(&sql, [], |row| node_row(row, 0)).unwrap();
    let times = [row.mtime, row.ctime, row.btime].map(Timestamp::as_nanos);
    assert_eq!(times, [1000, 2000, 500]);
    let content = "SELECT id FROM content WHERE node = 4 AND id >= 4 ORDER BY id";
    assert_eq!(db.query_row(content, [], |row| row.get::<_, i64>(0)).unwrap(), 4);
    // What is touched from here on joins what was.
    touched::add_all(&db, &[(Generation(6), NodeId(2))]).unwrap();
    assert_eq!(touched::all(&db).unwrap().len(), 6);
}

#[test]
fn a_catalog_of_version_3_is_taken_over_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("catalog.db");
    drop(version_3(&file));
    let looked_at = connect(&file, Use::Read).unwrap();
    assert!(refuse_old(&looked_at, &file).is_err());
    drop(looked_at);
    check_version_3(&file);
    connect(&file, Use::Read).unwrap();
}

/// What was begun when we died may lie in the WAL in part; without its commit it never was.
#[test]
fn a_death_before_version_4_is_whole_leaves_version_3() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("catalog.db");
    let mut db = version_3(&file);
    db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE); PRAGMA cache_size = 1").unwrap();
    let transaction = db.transaction().unwrap();
    add_tables(&transaction, 3, 4).unwrap();
    transaction
        .execute_batch(
            "PRAGMA user_version = 4; CREATE TABLE spill(a);
             INSERT INTO spill VALUES(zeroblob(400000)); DROP TABLE spill;",
        )
        .unwrap();
    let wal = |file: &Path| file.with_extension("db-wal");
    let dead = dir.path().join("dead.db");
    std::fs::copy(&file, &dead).unwrap();
    std::fs::copy(wal(&file), wal(&dead)).unwrap();
    assert!(std::fs::metadata(wal(&dead)).unwrap().len() > 4096, "some of it was written");
    let before: i32 = Connection::open(&dead)
        .unwrap()
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .unwrap();
    assert_eq!(before, 3);
    check_version_3(&dead);
    transaction.commit().unwrap();
}

//! Query plans, and a measurement to be run by hand.

use std::time::Instant;

use super::*;

/// All sources of this module, but its tests.
fn sources() -> Vec<String> {
    let mut waiting = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/catalog")];
    let mut sources = Vec::new();
    while let Some(path) = waiting.pop() {
        if path.is_dir() && !path.ends_with("tests") {
            let entries = std::fs::read_dir(path).unwrap();
            waiting.extend(entries.map(|entry| entry.unwrap().path()));
        } else if path.is_file() && !path.ends_with("tests.rs") {
            let source = std::fs::read_to_string(path).unwrap();
            sources.push(source.split("\n#[cfg(test)]\nmod tests {").next().unwrap().into());
        }
    }
    sources
}

/// The SQL in the sources: every string literal that begins with a verb of SQL.
fn statements() -> Vec<String> {
    let sources = sources();
    let mut found = Vec::new();
    for part in sources.iter().flat_map(|source| source.split('"')) {
        if ["SELECT ", "INSERT ", "DELETE ", "UPDATE "].iter().any(|verb| part.starts_with(verb)) {
            let joined: Vec<_> = part.split("\\\n").map(str::trim_start).collect();
            let columns = "id, name, g, time, automatic, held, tags";
            found.push(
                joined
                    .join("")
                    .replace("{NODE_COLUMNS}", schema::NODE_COLUMNS)
                    .replace("{COLUMNS}", columns)
                    .replace("{CHUNK_COLUMNS}", "id, hash, pack, frame, at, length, stored"),
            );
        }
    }
    found
}

#[test]
fn no_query_reads_a_whole_table() {
    let scratch = Scratch::new(1);
    let db = rusqlite::Connection::open(&scratch.files[0]).unwrap();
    let statements = statements();
    assert!(statements.len() > 100, "the sources are searched: {}", statements.len());
    // These list all there is.
    let lists = [
        "FROM sqlite_schema",
        "SELECT count(*) FROM snapshot",
        "FROM snapshot ORDER BY id",
        // The first of an index.
        "FROM snapshot ORDER BY g DESC, id DESC LIMIT 1",
        "FROM purged ORDER BY id",
        "SELECT g FROM moment",
        "FROM sweep ORDER BY after",
        "FROM pack ORDER BY id",
    ];
    for sql in statements {
        let mut statement = db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
        for index in 1..=statement.parameter_count() {
            statement.raw_bind_parameter(index, 1).unwrap();
        }
        let mut rows = statement.raw_query();
        while let Some(row) = rows.next().unwrap() {
            let step: String = row.get(3).unwrap();
            // The few rows of an index that is there for them.
            let few = step.contains("INDEX snapshot_automatic");
            let scan = step.starts_with("SCAN") && !step.contains("CONSTANT") && !few;
            // A subquery's rows are walked as they come.
            let inner = step == "SCAN shown" || step.starts_with("SCAN (");
            assert!(!scan || inner || lists.iter().any(|list| sql.contains(list)), "{sql}: {step}");
        }
    }
}

/// `cargo test --release --lib speed -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn pushes_per_second_and_bytes_per_version() {
    const FILES: u64 = 400_000;
    let dir_path = tempfile::tempdir_in("/dev/shm").unwrap();
    let files: Vec<_> = (0..2).map(|index| dir_path.path().join(format!("{index}.db"))).collect();
    Catalog::create(&files[0], uuid::Uuid::new_v4()).unwrap();
    Catalog::copy(&files[0], &files[1]).unwrap();
    let map = ReplicaMap::new(files.iter().cloned().map(Some).collect());
    let catalog = Catalog::open(map, true).unwrap();
    catalog.push(create(1, "d", dir(1))).unwrap();
    let size = || {
        catalog.shared.checkpoint(true);
        std::fs::metadata(&files[0]).unwrap().len()
    };
    let start = Instant::now();
    let mut parent = 1;
    for index in 0..FILES {
        let id = catalog.next_node().0;
        if index % 50 == 0 {
            catalog.push(create(1, &format!("dir{index}"), dir(id))).unwrap();
            parent = id;
        } else {
            let row = NodeRow { mtime: Timestamp::now(), ..file(id, 1) };
            catalog.push(create(parent, &format!("some-file-{index}.rs"), row)).unwrap();
        }
    }
    let pushed = start.elapsed();
    catalog.flush(Durability::Written).unwrap();
    let took = start.elapsed();
    let born = size();
    println!("create: {:.0} changes/s", 2.0 * FILES as f64 / took.as_secs_f64());
    println!("  pushes alone {pushed:?}, {} bytes a file", born / FILES);
    let start = Instant::now();
    for index in 0..FILES {
        let row = NodeRow { mtime: Timestamp::now(), ..file(2 + index, 2) };
        catalog.push(vec![Change::NodePut(row)]).unwrap();
    }
    catalog.flush(Durability::Written).unwrap();
    println!("new version: {:.0} changes/s", FILES as f64 / start.elapsed().as_secs_f64());
    println!("  {} bytes a version", (size() - born) / FILES);
    let start = Instant::now();
    for index in 0..1000 {
        catalog.push(vec![Change::NodePut(file(2, 3 + index))]).unwrap();
        catalog.flush(Durability::Written).unwrap();
    }
    println!("push and flush: {:?}", start.elapsed() / 1000);
    for at in [FILES / 2, FILES] {
        let start = Instant::now();
        for index in 0..100_000 {
            catalog.node_at(Generation(at), NodeId(2 + index * 3 % FILES)).unwrap();
        }
        println!("node_at {at}: {:?}", start.elapsed() / 100_000);
    }
    let start = Instant::now();
    for index in 0..100_000 {
        catalog.node(NodeId(2 + index * 3 % FILES)).unwrap();
    }
    println!("node: {:?}", start.elapsed() / 100_000);
}

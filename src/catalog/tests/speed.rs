//! Query plans, and a measurement to be run by hand.

use std::time::Instant;

use super::*;

/// All sources of this module, but its tests and the audit, which is to read everything.
fn sources() -> Vec<String> {
    let mut waiting = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/catalog")];
    let mut sources = Vec::new();
    while let Some(path) = waiting.pop() {
        if path.is_dir() && !path.ends_with("tests") {
            let entries = std::fs::read_dir(path).unwrap();
            waiting.extend(entries.map(|entry| entry.unwrap().path()));
        } else if path.is_file() && !path.ends_with("tests.rs") && !path.ends_with("audit.rs") {
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
    // These list all there is, or take the first.
    let lists = [
        "FROM sqlite_schema",
        "SELECT count(*) FROM snapshot",
        "FROM snapshot ORDER BY id",
        // The first of an index.
        "FROM snapshot ORDER BY g DESC, id DESC LIMIT 1",
        "FROM purged ORDER BY id",
        "SELECT g FROM moment",
        "FROM pack ORDER BY id",
        "FROM sweep ORDER BY after, until LIMIT 1",
        // What compares two catalogs, and what lists all directories for a resync.
        "old.node",
        "old.entry",
        "FROM entry e JOIN node n ON n.id = e.node WHERE n.kind = ?1",
        // For healing a file of which no replica has a good copy.
        "FROM content c JOIN digest d",
        "FROM recipe r JOIN content c",
    ];
    // Another catalog, for those that compare two.
    db.execute("ATTACH ?1 AS old", [scratch.files[0].to_str()]).unwrap();
    let mut scans = Vec::new();
    for sql in statements {
        // What is put together at run time cannot be asked as it stands here.
        if sql.ends_with('\\') || sql.contains('{') {
            continue;
        }
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
            if scan && !inner && !lists.iter().any(|list| sql.contains(list)) {
                scans.push(format!("{sql}: {step}"));
            }
        }
    }
    assert!(scans.is_empty(), "{}", scans.join("\n"));
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
        rest(&catalog);
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

/// How long the foreground waits, longest first, for each thing that it does.
#[derive(Default)]
pub(crate) struct Waits(std::collections::BTreeMap<&'static str, Vec<std::time::Duration>>);

impl Waits {
    pub(crate) fn time<T>(&mut self, what: &'static str, work: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let answer = work();
        self.0.entry(what).or_default().push(begin.elapsed());
        answer
    }

    pub(crate) fn tell(mut self, when: &str) {
        for (what, times) in &mut self.0 {
            times.sort_unstable_by(|a, b| b.cmp(a));
            let (count, longest) = (times.len(), times[0]);
            println!(
                "{when}: {what}: {count} times, p99 {:?}, longest {longest:?}",
                times[count / 100]
            );
        }
    }
}

/// Does what programs do, a thousand times a second, until `is_over`.
fn work(catalog: &Catalog, when: &str, mut is_over: impl FnMut(u64) -> bool) {
    let mut waits = Waits::default();
    let (_never, pause) = crossbeam_channel::bounded::<()>(0);
    let past = catalog.generation();
    let mut round = 0;
    while !is_over(round) {
        round += 1;
        let id = catalog.next_node().0;
        let made = create(1, &format!("w{id}"), file(id, 0));
        waits.time("push", || catalog.push(made)).unwrap();
        waits.time("lookup", || catalog.lookup(ROOT, &name("f17"))).unwrap();
        waits.time("past", || catalog.lookup_at(past, ROOT, &name("f18"))).unwrap();
        if round % 8 == 0 {
            waits.time("flush", || catalog.flush(Durability::Written)).unwrap();
        }
        if round % 32 == 0 {
            let (text, at) = (format!("s{id}"), catalog.freeze());
            waits.time("snapshot", || catalog.create_snapshot(&text, at, false, &[])).unwrap();
        }
        let _ = pause.recv_timeout(std::time::Duration::from_millis(1));
    }
    waits.tell(when);
}

/// `cargo test --release --lib foreground -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn how_long_the_foreground_waits_for_a_sweep() {
    const FILES: u64 = 10_000;
    const ROUNDS: u64 = 100;
    let scratch = Scratch::new_in(2, "/dev/shm");
    let catalog = scratch.open_rooted();
    let node = |index: u64| NodeId(10 + index);
    for index in 0..FILES {
        catalog.push(create(1, &format!("f{index}"), file(node(index).0, 0))).unwrap();
    }
    for _ in 0..ROUNDS {
        for first in (0..FILES).step_by(100) {
            let mut changes = Vec::new();
            for index in first..first + 100 {
                let (id, node) = (catalog.next_content(), node(index));
                changes.push(Change::ContentAdd { id, node, size: 4096 });
                let row = row(node.0, Kind::File);
                changes.push(Change::NodePut(NodeRow { content: id, size: 4096, ..row }));
            }
            catalog.push(changes).unwrap();
        }
    }
    // A database of 1 GiB: its first content is kept and inherits what the second has, the third
    // is packed.
    let id = NodeId(5);
    catalog.push(create(1, "database", row(5, Kind::File))).unwrap();
    let mut contents = Vec::new();
    let mut seal = |catalog: &Catalog| {
        let content = catalog.next_content();
        let row = row(5, Kind::File);
        let put = Change::NodePut(NodeRow { content, size: 1 << 30, ..row });
        catalog
            .push(vec![Change::ContentAdd { id: content, node: id, size: 1 << 30 }, put])
            .unwrap();
        contents.push(content);
        content
    };
    seal(&catalog);
    let kept = catalog.freeze();
    for _ in 0..2 {
        let content = seal(&catalog);
        for first in (0..100_000u64).step_by(100) {
            let images = (first..first + 100).map(|at| {
                let at_place = UndoPlace { file: UndoFile::Segment(1), offset: at * 4096 };
                let (node, offset) = (id, at * 8192);
                let at = Some(at_place);
                Change::UndoAdd(UndoRow { node, content, offset, length: 4096, at })
            });
            catalog.push(images.collect()).unwrap();
        }
    }
    let pack = catalog.next_pack();
    let mut changes = vec![PackChange::PackAdd { id: pack, bytes: 1 << 28, hash: [0; 32] }];
    let chunks: Vec<_> = (0..16_384).map(|_| catalog.next_chunk()).collect();
    changes.extend(chunks.iter().map(|&id| {
        let place = ChunkPlace { pack, frame: id.0, at: 0 };
        let hash = *blake3::hash(&id.0.to_le_bytes()).as_bytes();
        PackChange::ChunkAdd(ChunkRow { id, hash, place, length: 1 << 16, stored: 1 << 14 })
    }));
    let packed = catalog.next_content();
    let parts = chunks.into_iter().map(|id| (id, 1 << 16)).collect();
    changes.push(PackChange::RecipeAdd { id: packed, chunks: parts });
    changes.push(PackChange::ContentPacked(packed));
    catalog
        .push(vec![
            Change::NodePut(row(6, Kind::File)),
            add(1, "old", 6),
            Change::ContentAdd { id: packed, node: NodeId(6), size: 1 << 30 },
            Change::NodePut(NodeRow { content: packed, size: 1 << 30, ..row(6, Kind::File) }),
        ])
        .unwrap();
    catalog.freeze();
    catalog.push(changes.into_iter().map(Change::Pack).collect()).unwrap();
    catalog.push(vec![remove(1, "old"), Change::NodeGone(NodeId(6))]).unwrap();
    seal(&catalog);
    catalog.push(vec![Change::NodePut(dir(1))]).unwrap();
    catalog.flush(Durability::Durable).unwrap();
    work(&catalog, "alone", |round| round > 4000);
    let now = catalog.freeze();
    catalog.thin(now, &[kept].into()).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (before, begin) = (catalog.totals().unwrap().past_versions, Instant::now());
    let steps = std::thread::scope(|scope| {
        let sweeper = scope.spawn(|| {
            crate::sys::be_idle();
            let (mut steps, mut plan) = (0, std::time::Duration::ZERO);
            while let Some(sweep) = catalog.next_sweep().unwrap() {
                let begin = Instant::now();
                catalog.sweep_on(&sweep, Generation(i64::MAX as u64)).unwrap();
                plan = plan.max(begin.elapsed());
                steps += 1;
            }
            stop.store(true, Ordering::Relaxed);
            (steps, plan)
        });
        work(&catalog, "beside the sweep", |_| stop.load(Ordering::Relaxed));
        sweeper.join().unwrap()
    });
    let gone = before - catalog.totals().unwrap().past_versions;
    println!("{gone} states in {steps:?} steps, {:?}", begin.elapsed());
}

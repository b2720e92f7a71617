//! Any instant at scale: a store of a million files, ten thousand snapshots and ten million
//! versions, looked at through the real binary and a real mount.
//!
//! `scripts/bench scale` runs the full size, about ten minutes, and fails on a median beyond its
//! target; `SCALE_DIR` names a folder where the store is kept for the next run. The
//! small size in the usual tests shows that all of it works, whatever the time.

mod common;
mod scale {
    pub mod generate;
    pub mod measure;
}

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{Mounted, json, scratch};
use scale::generate::{self, CROWD, DIARY, Dice, Size, snapshot_name};
use scale::measure::{Table, command, drop_names, drop_page_cache, peak_memory, timed};

const SMALL: Size = Size { files: 1500, snapshots: 40, versions: 12_000, crowd: 300, diary: 20 };
/// The full size. `SCALE_PART` divides its files and versions, `SCALE_SNAPSHOTS` names another
/// number of snapshots: less to wait for while something is mended.
fn full() -> Size {
    let number = |name| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let part = number("SCALE_PART").unwrap_or(1);
    Size {
        files: 1_000_000 / part,
        snapshots: number("SCALE_SNAPSHOTS").unwrap_or(10_000),
        versions: 10_000_000 / part,
        crowd: 10_000,
        diary: 1_000,
    }
}
/// Snapshots of the full size's list.
const LIST: usize = 100_000;

/// A generated store and a file in each of its snapshots.
struct Generated {
    backings: Vec<PathBuf>,
    samples: Vec<(usize, PathBuf)>,
}

/// Makes a store below `folder`, or takes the one that an earlier run left there.
fn generated(folder: &Path, size: Size) -> Generated {
    let backings = vec![folder.join("disk1"), folder.join("disk2")];
    let list = folder.join(format!("samples-{}-{}", size.files, size.versions));
    if !list.exists() {
        for backing in &backings {
            fs::create_dir_all(backing).expect("a backing can be made");
        }
        let samples = generate::make(&backings, size);
        let lines = samples.iter().map(|(number, path)| format!("{number} {}\n", path.display()));
        fs::write(&list, lines.collect::<String>()).expect("the list can be written");
    }
    let text = fs::read_to_string(&list).expect("the list is readable");
    let sample = |line: &str| {
        let (number, path) = line.split_once(' ').expect("a number and a path");
        (number.parse().expect("a number"), PathBuf::from(path))
    };
    Generated { backings, samples: text.lines().map(sample).collect() }
}

#[test]
fn a_generated_store_mounts_clean_and_shows_its_past() {
    let folder = scratch();
    let made = generated(folder.path(), SMALL);
    generate::add_snapshots(&made.backings, SMALL.snapshots + 100);
    let store = Mounted::over(made.backings.clone());
    let status = json::parsed(store.rearview(&["status", "--json"]));
    let count = |key: &str| json::all(&status, key)[0].as_u64().expect("a number") as usize;
    assert!(count("past_versions") + count("live_nodes") >= SMALL.versions, "{status}");
    assert_eq!(count("snapshots"), SMALL.snapshots + 100);
    // Nothing was compared or imported: what a past state is read from is where it was.
    for (number, path) in &made.samples {
        let past = store.past(&snapshot_name(*number)).join(path);
        let bytes = fs::read(&past).expect("a past file is readable");
        assert_eq!(bytes, vec![0; bytes.len()]);
    }
    let mut table = Table::new();
    look(&store, &made, SMALL, &mut table);
    list_snapshots(&store, SMALL.snapshots + 100, &mut table);
    println!("{table}");
    store.finish();
}

/// `scripts/bench scale`
#[test]
#[ignore = "a measurement of about ten minutes"]
fn every_query_meets_its_time_at_full_size() {
    let kept = std::env::var_os("SCALE_DIR").map(PathBuf::from);
    let folder = tempfile::tempdir_in(kept.clone().unwrap_or_else(std::env::temp_dir));
    let folder = folder.expect("a scratch folder can be made");
    let place = kept.as_deref().unwrap_or(folder.path());
    let mut table = Table::new();
    let size = full();
    let (making, made) = timed(|| generated(place, size));
    println!("made in {} s, or found", making.as_secs());
    let mut store = Mounted::unmounted(0);
    store.backings = made.backings.clone();
    // On a full disk the generated history would yield, and free nothing by it.
    let options = ["-o", "allow_other,dev,suid,snapshot_every=0", "--free-limit", "0"];
    store.set_options(&options);
    store.mount().ok();
    tell_size(&store, &made);
    for _ in 0..5 {
        store.unmount();
        let (took, _) = timed(|| store.mount().ok());
        table.add("mount after a clean end", took, Some(Duration::from_secs(1)));
    }
    look(&store, &made, size, &mut table);
    for round in 0..5 {
        store.unmount();
        drop_page_cache();
        store.mount().ok();
        let crowd = store.past(&snapshot_name(10 + round)).join(CROWD);
        let (took, count) = timed(|| fs::read_dir(&crowd).expect("it is listed").count());
        assert_eq!(count, size.crowd);
        table.add("ls of 10,000 entries, cold", took, Some(Duration::from_millis(50)));
    }
    walk(&store, &made);
    let daemon = store.daemon();
    let (peak, max) = (peak_memory(daemon), 300 << 20);
    println!("RSS of the daemon at most {} MiB (target 300)", peak >> 20);
    store.unmount();
    generate::add_snapshots(&made.backings, LIST);
    store.mount().ok();
    list_snapshots(&store, LIST, &mut table);
    create_snapshots(&store, "late", &mut table);
    let late = peak_memory(store.daemon());
    println!("with {LIST} snapshots {} MiB\n{table}", late >> 20);
    store.unmount();
    assert!(peak.max(late) < max, "the daemon took {} MiB", peak.max(late) >> 20);
    table.assert_met();
}

/// What is stored, for the record.
fn tell_size(store: &Mounted, made: &Generated) {
    let status = json::parsed(store.rearview(&["status", "--json"]));
    let count = |key: &str| json::all(&status, key)[0].as_u64().expect("a number");
    let versions = count("past_versions") + count("live_nodes");
    let catalog = fs::metadata(made.backings[0].join(".rearview/catalog.db")).expect("a catalog");
    println!(
        "{} live nodes, {versions} versions, {} snapshots, catalog {} MiB, {} bytes a version",
        count("live_nodes"),
        count("snapshots"),
        catalog.len() >> 20,
        catalog.len() / versions
    );
}

/// The questions that a user asks, each some times.
fn look(store: &Mounted, made: &Generated, size: Size, table: &mut Table) {
    create_snapshots(store, "probe", table);
    for _ in 0..11 {
        let path = Path::new(CROWD).join(DIARY);
        let (took, text) = timed(|| command(store, "log", &[&path]));
        assert!(text.lines().count() >= size.diary, "{text}");
        table.add("log of 1,000 versions", took, Some(Duration::from_millis(20)));
    }
    for number in 1..6 {
        let crowd = store.past(&snapshot_name(number)).join(CROWD);
        let (took, count) = timed(|| fs::read_dir(&crowd).expect("it is listed").count());
        assert_eq!(count, size.crowd);
        table.add("ls of 10,000 entries, catalog warm", took, None);
    }
    look_up(store, &made.samples, table);
}

/// Looks paths up three times: the second time the kernel knows their names, the third time it has
/// forgotten them while the catalog's pages are in memory.
fn look_up(store: &Mounted, samples: &[(usize, PathBuf)], table: &mut Table) {
    let mut dice = Dice::new(1);
    let chosen: Vec<_> =
        (0..samples.len().min(2000)).map(|_| &samples[1 + dice.below(samples.len() - 1)]).collect();
    for (number, path) in &chosen {
        let path = store.past(&snapshot_name(*number)).join(path);
        let size = fs::symlink_metadata(&path).expect("a sample is in its snapshot").size();
        let (took, again) = timed(|| fs::symlink_metadata(&path).map(|meta| meta.size()));
        assert_eq!(again.expect("it still is"), size);
        table.add("lookup of a path that the kernel has", took, Some(Duration::from_micros(200)));
    }
    drop_names();
    for (number, path) in &chosen {
        let mut at = store.past(&snapshot_name(*number));
        let (took, found) = timed(|| fs::symlink_metadata(&at));
        found.expect("the snapshot is there");
        table.add("lookup of a snapshot", took, Some(Duration::from_micros(200)));
        let mut whole = Duration::ZERO;
        for name in path {
            at.push(name);
            let (took, found) = timed(|| fs::symlink_metadata(&at));
            found.expect("a sample is in its snapshot");
            table.add("lookup of a name in a snapshot", took, Some(Duration::from_micros(200)));
            whole += took;
        }
        table.add("lookup of a path, all its names", whole, None);
    }
}

fn create_snapshots(store: &Mounted, prefix: &str, table: &mut Table) {
    let goal = Some(Duration::from_millis(5));
    for number in 0..21 {
        // Something to be committed with it.
        fs::write(store.path("scratch.txt"), format!("{prefix}{number}")).expect("it is writable");
        // A kept store has those of the run before.
        let prefix = format!("{prefix}-{}", std::process::id());
        let name = format!("{prefix}-by-command-{number}");
        let (took, _) = timed(|| command(store, "snapshot", &[Path::new("create"), name.as_ref()]));
        table.add("snapshot create", took, goal);
        let name = format!("{prefix}-by-mkdir-{number}");
        let (took, made) = timed(|| fs::create_dir(store.past(&name)));
        made.expect("a snapshot is made by mkdir");
        table.add("mkdir of a snapshot", took, goal);
    }
}

fn list_snapshots(store: &Mounted, count: usize, table: &mut Table) {
    for round in 0..12 {
        let (took, text) = timed(|| command(store, "snapshot", &[Path::new("list")]));
        assert!(text.lines().count() > count, "{} lines", text.lines().count());
        let (what, goal) = match round {
            0 => ("snapshot list, the first after a mount", 200),
            _ => ("snapshot list of 100,000", 100),
        };
        table.add(what, took, Some(Duration::from_millis(goal)));
        let (took, listed) = timed(|| fs::read_dir(store.path(".snapshots")).map(Iterator::count));
        assert!(listed.expect("they are listed") >= count);
        table.add("ls .snapshots of 100,000", took, None);
    }
}

/// Walks through snapshots as `find` does, so that the daemon's memory shows what it holds on to.
fn walk(store: &Mounted, made: &Generated) {
    for (number, path) in made.samples.iter().step_by(50) {
        let mut at = store.past(&snapshot_name(*number));
        for name in path {
            for entry in fs::read_dir(&at).expect("a past directory is listed") {
                entry.expect("its entries are").metadata().expect("an entry has attributes");
            }
            at.push(name);
        }
        assert!(fs::read(&at).is_ok(), "{} is not readable", at.display());
    }
}

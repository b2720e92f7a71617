//! A store of any size, written through the real commit path: what the live tree's operations push
//! for real is pushed here, from a random but fixed sequence, and the backings get the live tree's
//! files.
//!
//! Every state lives through at least one snapshot, and the horizon stands at the newest: history
//! is as retention leaves it, where only snapshots show it and none of it is to be swept. Contents
//! of the past are packed, as recipes of holes: they are read as zeros, and no pack is needed.
//! Live files are sparse.

use std::collections::BTreeSet;
use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rearviewfs::catalog::{
    Actor, Catalog, Change, Durability, ForgetChange, NodeRow, PackChange, Snapshot,
};
use rearviewfs::history::History;
use rearviewfs::progress::Progress;
use rearviewfs::store::{self, OpenOptions, Store};
use rearviewfs::types::{
    ChunkId, ContentId, EntryName, Generation, Kind, NodeId, Timestamp, XattrSetId,
};

/// The directory of many entries.
pub const CROWD: &str = "crowd";
/// The file of many versions, in [`CROWD`].
pub const DIARY: &str = "diary.txt";
/// The generator's seed.
const SEED: u64 = 20_261_125;
/// The clock begins here and a snapshot is made every hour.
const BEGIN_SECS: i64 = 1_700_000_000;
const EXTENSIONS: [&str; 8] = ["rs", "txt", "jpg", "md", "c", "json", "pdf", "log"];
const STEMS: [&str; 8] =
    ["main", "report", "IMG", "notes", "index", "test_case", "invoice-2026", "README"];

/// How much is made.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Live files, about.
    pub files: usize,
    /// Snapshots.
    pub snapshots: usize,
    /// Versions: past states and live nodes.
    pub versions: usize,
    /// Entries of [`CROWD`].
    pub crowd: usize,
    /// Versions of [`DIARY`].
    pub diary: usize,
}

/// A random sequence that is the same everywhere (splitmix64).
pub struct Dice(u64);

impl Dice {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// A number below `bound`, small ones far more often.
    fn skewed(&mut self, bound: usize) -> usize {
        let part = self.below(1 << 20) as f64 / f64::from(1 << 20);
        ((part * part * part) * bound as f64) as usize
    }
}

/// A live file or directory of the generated tree.
struct Object {
    row: NodeRow,
    /// Index of the directory that it lies in.
    parent: usize,
    /// Number in its name.
    label: u32,
    /// The snapshot interval of its last change.
    changed_in: u32,
}

impl Object {
    fn name(&self) -> EntryName {
        let label = self.label as usize;
        let text = match (self.row.kind, label) {
            (Kind::Dir, 0) => CROWD.to_string(),
            (Kind::Dir, _) => format!("dir{label}"),
            (_, 0) => DIARY.to_string(),
            _ => format!("{}-{label}.{}", STEMS[label % 8], EXTENSIONS[label / 8 % 8]),
        };
        EntryName::new(text).expect("generated names are names")
    }
}

/// Makes a store in `backings`, empty directories; returns for each snapshot, by its number, a file
/// in it.
pub fn make(backings: &[PathBuf], size: Size) -> Vec<(usize, PathBuf)> {
    // A catalog of this size is written a hundred times over until it is whole: in memory, and
    // moved to the backings when it is. A store is known by what it is, not by where.
    let memory = crate::common::scratch();
    let places: Vec<PathBuf> =
        (0..backings.len()).map(|index| memory.path().join(format!("{index}"))).collect();
    places.iter().for_each(|place| fs::create_dir(place).expect("a folder can be made"));
    let recover = |replicas: &_, catalog: &_, from| History::recover(replicas, catalog, from);
    let options = OpenOptions { init: true, ..OpenOptions::default() };
    let store = store::open(&places, &options, &recover, &Progress::silent())
        .expect("a store can be made in empty folders");
    let mut maker = Maker::new(&store.catalog, size);
    maker.live_tree();
    maker.history();
    for backing in backings {
        maker.write_files(backing);
    }
    let samples = std::mem::take(&mut maker.samples);
    end(store);
    for (place, backing) in places.iter().zip(backings) {
        crate::common::shell(place, &format!("cp -a .rearview '{}'", backing.display()));
    }
    samples
}

/// Adds snapshots of the newest tree to a store until it has `count`.
pub fn add_snapshots(backings: &[PathBuf], count: usize) {
    let recover = |_: &_, _: &_, _| panic!("the store was closed cleanly");
    let store = store::open(backings, &OpenOptions::default(), &recover, &Progress::silent())
        .expect("the store opens");
    let catalog = &store.catalog;
    let known = catalog.snapshots().expect("the catalog is readable");
    let newest = known.last().expect("there is a snapshot").clone();
    for number in known.len()..count {
        let id = catalog.next_snapshot();
        let (name, time) = (snapshot_name(number), hour(number));
        let next = Snapshot { id, name, time, ..newest.clone() };
        catalog.push(vec![Change::SnapshotPut(next)]).expect("the catalog takes changes");
    }
    end(store);
}

fn end(store: Store) {
    store.catalog.flush(Durability::Durable).expect("the catalog can be made durable");
    store.close().expect("the store closes");
}

/// The name of the snapshot of this number.
pub fn snapshot_name(number: usize) -> String {
    format!("auto-{number:06}")
}

fn hour(number: usize) -> Timestamp {
    Timestamp { secs: BEGIN_SECS + 3600 * number as i64, nanos: 0 }
}

/// The state of a generation run.
struct Maker<'a> {
    catalog: &'a Catalog,
    size: Size,
    dice: Dice,
    actors: Vec<Actor>,
    dirs: Vec<Object>,
    files: Vec<Object>,
    /// Directories whose entries changed since the last snapshot.
    touched: BTreeSet<usize>,
    /// The interval between two snapshots that is being filled.
    interval: u32,
    past: usize,
    labels: u32,
    /// For each snapshot a file in it.
    samples: Vec<(usize, PathBuf)>,
}

impl<'a> Maker<'a> {
    fn new(catalog: &'a Catalog, size: Size) -> Maker<'a> {
        let actor = |(index, command): (usize, &&str)| Actor {
            uid: 1000,
            pid: 4000 + index as u32,
            command: command.as_bytes().to_vec(),
        };
        let actors = ["vim", "cp", "git", "rustc", "sed"].iter().enumerate().map(actor).collect();
        let root = catalog.node(NodeId::ROOT).expect("the catalog is readable");
        let root = Object {
            row: root.expect("a new store has a root"),
            parent: 0,
            label: 0,
            changed_in: 0,
        };
        Maker {
            catalog,
            size,
            dice: Dice::new(SEED),
            actors,
            dirs: vec![root],
            files: Vec::new(),
            touched: BTreeSet::new(),
            interval: 0,
            past: 0,
            labels: 0,
            samples: Vec::new(),
        }
    }

    fn push(&mut self, changes: Vec<Change>) -> Generation {
        let by = self.dice.below(self.actors.len());
        self.catalog.push_by(Some(&self.actors[by]), changes).expect("the catalog takes changes")
    }

    /// The time of an event in the present interval.
    fn time(&mut self) -> Timestamp {
        let nanos = self.dice.below(1_000_000_000) as u32;
        Timestamp { nanos, ..hour(self.interval as usize) }
    }

    fn row(&mut self, kind: Kind) -> NodeRow {
        let mtime = self.time();
        NodeRow {
            id: self.catalog.next_node(),
            kind,
            mode: if kind == Kind::Dir { 0o755 } else { 0o644 },
            uid: 1000,
            gid: 1000,
            rdev: 0,
            size: 0,
            blocks: 0,
            mtime,
            ctime: mtime,
            btime: mtime,
            xattrs: XattrSetId::NONE,
            content: ContentId::EMPTY,
        }
    }

    /// The first tree: [`CROWD`] with its many entries, and directories of all sizes.
    fn live_tree(&mut self) {
        self.add_dir(0);
        let dirs = (self.size.files / 25).max(4);
        for index in 2..dirs {
            // A few directories have most of those below them: paths of 3 to 8 names.
            let parent = if index < 12 { 0 } else { 2 + self.dice.skewed(index - 2) };
            self.add_dir(parent);
        }
        // Low numbers change often. The crowd is old: all of it but the diary changes seldom.
        let crowd_from = self.size.files + 1 - self.size.crowd;
        for index in 0..self.size.files {
            let parent = match index == 0 || index >= crowd_from {
                true => 1,
                false => 2 + self.dice.skewed(self.dirs.len() - 2),
            };
            let file = self.new_file(parent);
            self.files.push(file);
        }
        self.snapshot();
    }

    fn add_dir(&mut self, parent: usize) {
        let row = self.row(Kind::Dir);
        let label = self.dirs.len() as u32 - 1;
        let dir = Object { row, parent, label, changed_in: 0 };
        self.enter(dir.row.clone(), &dir, Vec::new());
        self.dirs.push(dir);
    }

    /// A file with its first content, under a new name.
    fn new_file(&mut self, parent: usize) -> Object {
        let row = self.row(Kind::File);
        let label = self.labels;
        self.labels += 1;
        let mut file = Object { row, parent, label, changed_in: self.interval };
        let mut changes = Vec::new();
        self.write(&mut file, &mut changes);
        self.enter(file.row.clone(), &file, changes);
        file
    }

    fn enter(&mut self, row: NodeRow, object: &Object, mut changes: Vec<Change>) {
        let node = row.id;
        changes.push(Change::NodePut(row));
        changes.push(Change::EntryAdd {
            parent: self.dirs[object.parent].row.id,
            name: object.name(),
            node,
        });
        self.touched.insert(object.parent);
        self.push(changes);
    }

    /// Gives a file a new content.
    fn write(&mut self, file: &mut Object, changes: &mut Vec<Change>) {
        file.row.content = self.catalog.next_content();
        file.row.size = 100 + self.dice.skewed(200_000) as u64;
        (file.row.mtime, file.row.blocks) = (self.time(), file.row.size.div_ceil(4096) * 8);
        file.row.ctime = file.row.mtime;
        let (id, node, size) = (file.row.content, file.row.id, file.row.size);
        changes.push(Change::ContentAdd { id, node, size });
    }

    /// A file's content is past: it comes into a recipe.
    fn pack(file: &Object, changes: &mut Vec<Change>) {
        let chunks = vec![(ChunkId::HOLE, file.row.size as u32)];
        changes.push(Change::Pack(PackChange::RecipeAdd { id: file.row.content, chunks }));
        changes.push(Change::Pack(PackChange::ContentPacked(file.row.content)));
    }

    /// Changes and snapshots, until there are as many as were asked for.
    fn history(&mut self) {
        let live = self.files.len() + self.dirs.len();
        let wanted = self.size.versions.saturating_sub(live);
        let diary_every = (self.size.snapshots / self.size.diary).max(1) as u32;
        while (self.interval as usize) < self.size.snapshots {
            let goal = wanted * self.interval as usize / (self.size.snapshots - 1);
            if self.interval.is_multiple_of(diary_every) {
                self.change(0);
            }
            // The directories' own new states come with the snapshot.
            while self.past + self.touched.len() < goal {
                // What was changed since the last snapshot is not changed again before the next.
                let index = 1 + self.dice.skewed(self.files.len() - 1);
                if self.files[index].changed_in < self.interval {
                    self.change_somehow(index);
                }
            }
            self.snapshot();
        }
        let newest = self.catalog.generation();
        let horizon = Change::Forget(ForgetChange::Horizon(newest));
        self.push(vec![horizon, Change::MetaPut { key: "generated", value: "yes".into() }]);
    }

    fn change_somehow(&mut self, index: usize) {
        match self.dice.below(100) {
            0..70 => self.change(index),
            70..82 => self.replace(index),
            82..88 => self.chmod(index),
            88..94 => self.rename(index),
            _ => self.delete(index),
        }
    }

    /// Takes a file out of the list for a change; it goes back by [`Maker::put`].
    fn take(&mut self, index: usize) -> Object {
        self.past += 1;
        let file = &mut self.files[index];
        file.changed_in = self.interval;
        Object { row: file.row.clone(), ..*file }
    }

    fn put(&mut self, index: usize, file: Object, changes: Vec<Change>) {
        self.files[index] = file;
        self.push(changes);
    }

    /// Written in place.
    fn change(&mut self, index: usize) {
        let mut file = self.take(index);
        let mut changes = Vec::new();
        Maker::pack(&file, &mut changes);
        self.write(&mut file, &mut changes);
        changes.push(Change::NodePut(file.row.clone()));
        self.put(index, file, changes);
    }

    /// Saved by renaming a new file over it.
    fn replace(&mut self, index: usize) {
        let mut file = self.take(index);
        let (parent, name) = (self.dirs[file.parent].row.id, file.name());
        let mut changes =
            vec![Change::EntryRemove { parent, name: name.clone() }, Change::NodeGone(file.row.id)];
        Maker::pack(&file, &mut changes);
        file.row.id = self.catalog.next_node();
        self.write(&mut file, &mut changes);
        changes.push(Change::NodePut(file.row.clone()));
        changes.push(Change::EntryAdd { parent, name, node: file.row.id });
        self.touched.insert(file.parent);
        self.put(index, file, changes);
    }

    fn chmod(&mut self, index: usize) {
        let mut file = self.take(index);
        (file.row.mode, file.row.ctime) = (file.row.mode ^ 0o020, self.time());
        let changes = vec![Change::NodePut(file.row.clone())];
        self.put(index, file, changes);
    }

    fn rename(&mut self, index: usize) {
        let mut file = self.take(index);
        let node = file.row.id;
        let remove =
            Change::EntryRemove { parent: self.dirs[file.parent].row.id, name: file.name() };
        self.touched.insert(file.parent);
        file.label = self.labels;
        self.labels += 1;
        // What lies in the crowd stays there: its size is what is measured.
        if file.parent != 1 {
            file.parent = 2 + self.dice.skewed(self.dirs.len() - 2);
        }
        let (parent, name) = (self.dirs[file.parent].row.id, file.name());
        self.touched.insert(file.parent);
        file.row.ctime = self.time();
        let put = Change::NodePut(file.row.clone());
        self.put(index, file, vec![remove, Change::EntryAdd { parent, name, node }, put]);
    }

    /// Deleted; another file comes into being beside it.
    fn delete(&mut self, index: usize) {
        let file = self.take(index);
        let parent = self.dirs[file.parent].row.id;
        let mut changes =
            vec![Change::EntryRemove { parent, name: file.name() }, Change::NodeGone(file.row.id)];
        Maker::pack(&file, &mut changes);
        self.push(changes);
        self.files[index] = self.new_file(file.parent);
    }

    /// Ends an interval: the directories' times, and the snapshot.
    fn snapshot(&mut self) {
        for index in std::mem::take(&mut self.touched) {
            let time = self.time();
            let dir = &mut self.dirs[index].row;
            (dir.mtime, dir.ctime) = (time, time);
            let put = Change::NodePut(dir.clone());
            // The first tree's directories have no state before.
            self.past += usize::from(self.interval > 0);
            self.push(vec![put]);
        }
        let number = self.interval as usize;
        let snapshot = Snapshot {
            id: self.catalog.next_snapshot(),
            name: snapshot_name(number),
            generation: self.catalog.freeze(),
            time: hour(number),
            automatic: false,
            held: false,
            tags: Vec::new(),
        };
        self.push(vec![Change::SnapshotPut(snapshot)]);
        let index = self.dice.below(self.files.len());
        self.samples.push((number, self.path(index)));
        self.interval += 1;
    }

    /// Where a file is.
    fn path(&self, index: usize) -> PathBuf {
        let file = &self.files[index];
        let mut names = vec![file.name()];
        let mut at = file.parent;
        while at != 0 {
            names.push(self.dirs[at].name());
            at = self.dirs[at].parent;
        }
        names.iter().rev().map(EntryName::as_os_str).collect()
    }

    /// Makes the live tree's files in a backing.
    fn write_files(&self, backing: &Path) {
        let mut paths = vec![backing.to_path_buf()];
        for dir in &self.dirs[1..] {
            let path = paths[dir.parent].join(dir.name().as_os_str());
            fs::DirBuilder::new().mode(dir.row.mode).create(&path).expect("a directory");
            paths.push(path);
        }
        for file in &self.files {
            let made = File::create(paths[file.parent].join(file.name().as_os_str()));
            let made = made.expect("a file can be made");
            made.set_len(file.row.size).expect("a file can be sized");
            made.set_permissions(fs::Permissions::from_mode(file.row.mode)).expect("a mode");
            std::os::unix::fs::fchown(&made, Some(1000), Some(1000)).expect("we are root");
            made.set_times(times(&file.row)).expect("a file's times can be set");
        }
        for (dir, path) in self.dirs.iter().zip(&paths).skip(1) {
            std::os::unix::fs::chown(path, Some(1000), Some(1000)).expect("we are root");
            let opened = File::open(path).expect("a directory can be opened");
            opened.set_times(times(&dir.row)).expect("a directory's times can be set");
        }
    }
}

fn times(row: &NodeRow) -> FileTimes {
    FileTimes::new().set_modified(system_time(row.mtime))
}

fn system_time(time: Timestamp) -> SystemTime {
    UNIX_EPOCH + Duration::new(time.secs as u64, time.nanos)
}

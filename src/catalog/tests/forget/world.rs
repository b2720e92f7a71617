//! A catalog with what lies around it on the disks, and what it should show.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// What one name showed.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    pub row: NodeRow,
    pub bytes: Vec<u8>,
}

/// A live file or symlink.
pub struct Live {
    pub row: NodeRow,
    pub names: BTreeSet<String>,
    pub bytes: Vec<u8>,
    /// Which bytes of the sealed content are preserved.
    pub kept: Vec<bool>,
    /// All of it is.
    pub whole: bool,
    pub dirty: bool,
    pub hidden: bool,
}

/// A past state as the catalog once had it: where it began, and the processes that began and ended
/// it.
pub type Ever = (Generation, Option<i64>, Option<i64>);

pub struct World {
    pub scratch: Scratch,
    pub catalog: Catalog,
    pub clock: Arc<AtomicI64>,
    pub live: BTreeMap<u64, Live>,
    /// Unlinked files that somebody has open: whose content their preserved file is, and which
    /// bytes of that are preserved again.
    pub orphans: Vec<(u64, ContentId, Vec<bool>)>,
    pub contents: BTreeMap<ContentId, Vec<u8>>,
    pub preserved: BTreeMap<(NodeId, ContentId), Vec<u8>>,
    pub segments: BTreeMap<u64, Vec<u8>>,
    pub chunks: BTreeMap<ChunkId, Vec<u8>>,
    /// What generations show that were looked at.
    pub shown: BTreeMap<Generation, BTreeMap<String, Shown>>,
    pub times: BTreeMap<Generation, i64>,
    pub births: BTreeMap<u64, i64>,
    /// Where the history of files ended that were excluded.
    pub turned: BTreeSet<(u64, Generation)>,
    pub since: Generation,
    /// All past states and entries that there ever were.
    pub states: BTreeMap<(u64, Generation), Ever>,
    pub entries: BTreeSet<(u64, Generation, String, Generation, u64)>,
    pub count: u64,
}

const SECOND: i64 = 1_000_000_000;

impl World {
    pub fn new() -> World {
        let scratch = Scratch::new(1);
        let clock = Arc::new(AtomicI64::new(Timestamp::now().as_nanos() + SECOND));
        let catalog = open(&scratch, &clock, true);
        let mut world = World {
            scratch,
            catalog,
            clock,
            live: BTreeMap::new(),
            orphans: Vec::new(),
            contents: BTreeMap::new(),
            preserved: BTreeMap::new(),
            segments: BTreeMap::from([(1, Vec::new())]),
            chunks: BTreeMap::new(),
            shown: BTreeMap::new(),
            times: BTreeMap::new(),
            births: BTreeMap::new(),
            turned: BTreeSet::new(),
            since: Generation(0),
            states: BTreeMap::new(),
            entries: BTreeSet::new(),
            count: 0,
        };
        world.push(vec![Change::NodePut(dir(1))]);
        world
    }

    pub fn push(&mut self, changes: Vec<Change>) -> Generation {
        self.count += 1;
        let actor = Actor { uid: 0, pid: (self.count % 3) as u32, command: b"test".to_vec() };
        let by = (!self.count.is_multiple_of(4)).then_some(&actor);
        let at = self.catalog.push_by(by, changes).unwrap();
        self.times.insert(at, self.clock.load(Ordering::Relaxed));
        at
    }

    pub fn now(&self) -> Timestamp {
        Timestamp::from_nanos(self.clock.load(Ordering::Relaxed))
    }

    fn pick(&self, which: usize) -> Option<u64> {
        self.live.keys().nth(which.checked_rem(self.live.len())?).copied()
    }

    fn pick_file(&self, which: usize) -> Option<u64> {
        self.pick(which).filter(|node| self.live[node].row.kind == Kind::File)
    }

    fn is_free(&self, name: &str) -> bool {
        !self.live.values().any(|one| one.names.contains(name))
    }

    pub fn put(&self, node: u64) -> Change {
        let one = &self.live[&node];
        match one.hidden {
            true => Change::NodeUnversioned(one.row.clone()),
            false => Change::NodePut(one.row.clone()),
        }
    }

    pub fn enter(&self, node: u64, text: &str) -> Change {
        match self.live[&node].hidden {
            true => Change::EntryUnversioned { parent: ROOT, name: name(text), node: NodeId(node) },
            false => add(1, text, node),
        }
    }

    pub fn take(&mut self, step: &Step) {
        match *step {
            Step::Create { name } => self.create(name, Kind::File),
            Step::Symlink { name } => self.create(name, Kind::Symlink),
            Step::Write { which, at, length, fill, seal } => {
                if let Some(node) = self.pick_file(which) {
                    self.write(node, at, length, fill);
                    if seal {
                        self.seal(node);
                    }
                }
            }
            Step::Clone { which, cloned } => self.clone_whole(which, cloned),
            Step::Empty { which } => self.empty(which),
            Step::Resave { which } => self.resave(which),
            Step::WriteOrphan { which, at, length, fill } => {
                self.write_orphan(which, at, length, fill);
            }
            Step::Link { which, name } => {
                let text = format!("n{name}");
                if let Some(node) = self.pick(which).filter(|_| self.is_free(&text)) {
                    self.push(vec![self.enter(node, &text)]);
                    self.live.get_mut(&node).unwrap().names.insert(text);
                }
            }
            Step::Rename { which, name } => {
                let text = format!("n{name}");
                if let Some(node) = self.pick(which).filter(|_| self.is_free(&text)) {
                    let old = self.live[&node].names.first().unwrap().clone();
                    self.push(vec![remove(1, &old), self.enter(node, &text)]);
                    let names = &mut self.live.get_mut(&node).unwrap().names;
                    names.remove(&old);
                    names.insert(text);
                }
            }
            Step::Unlink { which } => self.unlink(which, 1),
            Step::UnlinkAll { which } => self.unlink(which, usize::MAX),
            Step::Chmod { which, mode } => {
                if let Some(node) = self.pick(which) {
                    self.live.get_mut(&node).unwrap().row.mode = mode;
                    self.push(vec![self.put(node)]);
                }
            }
            Step::Attribute { which, value } => {
                let mut set = Xattrs::default();
                if value > 0 {
                    set.0.insert(b"user.a".to_vec(), vec![value]);
                }
                let set = self.catalog.intern_xattrs(&set).unwrap();
                if let Some(node) = self.pick(which) {
                    self.live.get_mut(&node).unwrap().row.xattrs = set;
                    self.push(vec![self.put(node)]);
                }
            }
            Step::Turn { which } => self.turn(which),
            Step::Wait { long } => {
                let by = if long { 40 * SECOND } else { SECOND };
                self.clock.fetch_add(by, Ordering::Relaxed);
            }
            Step::Freeze => self.freeze(),
            Step::Flush => self.catalog.flush(Durability::Written).unwrap(),
            Step::Snapshot => {
                self.freeze();
                self.count += 1;
                let text = format!("s{}", self.count);
                let at = self.catalog.generation();
                self.catalog.create_snapshot(&text, at, false, &[]).unwrap();
            }
            Step::Hold { which } => {
                if let Some(one) = self.snapshot(which) {
                    self.catalog.hold_snapshot(&one.name, !one.held).unwrap();
                }
            }
            Step::DeleteSnapshots { which, more } => {
                let names = [self.snapshot(which), self.snapshot(which + 1).filter(|_| more)];
                let names: BTreeSet<_> = names.into_iter().flatten().map(|one| one.name).collect();
                let names: Vec<_> = names.iter().map(String::as_str).collect();
                self.catalog.delete_snapshots(&names).unwrap();
                self.forget_invisible();
            }
            Step::Thin { horizon, every } => self.thin(horizon, every),
            Step::Expire { which } => {
                let points: Vec<_> = self.times.keys().copied().collect();
                let since = points[which % points.len()].max(self.since);
                self.catalog.sweep_again(self.since, since).unwrap();
                self.since = since;
            }
            Step::Pack { every } => self.pack(every),
            Step::PackImages { count } => self.pack_images(count),
            Step::Same => self.same(),
            Step::Repack => self.repack(),
            Step::Sweep { steps, cost } => {
                self.sweep(steps, cost);
                self.check_shown();
            }
            Step::Purge { which } => self.purge(which),
            Step::Reopen { clean } => self.reopen(clean),
        }
    }

    fn create(&mut self, which: u8, kind: Kind) {
        let text = format!("n{which}");
        if !self.is_free(&text) {
            return;
        }
        let node = self.catalog.next_node().0;
        let row = NodeRow { btime: self.now(), mtime: self.now(), ..row(node, kind) };
        self.births.insert(node, self.now().as_nanos());
        let names = BTreeSet::from([text.clone()]);
        self.live.insert(
            node,
            Live {
                row,
                names,
                bytes: Vec::new(),
                kept: Vec::new(),
                whole: false,
                dirty: false,
                hidden: false,
            },
        );
        let mut changes = vec![self.put(node), self.enter(node, &text)];
        if kind == Kind::Symlink {
            let target = node.to_le_bytes().to_vec();
            changes.push(Change::SymlinkTarget { node: NodeId(node), target });
        }
        self.push(changes);
    }

    /// Puts bytes into the open segment.
    fn append(&mut self, bytes: &[u8]) -> Option<UndoPlace> {
        if bytes.iter().all(|byte| *byte == 0) {
            return None;
        }
        let mut last = self.segments.last_entry().unwrap();
        let (file, offset) = (UndoFile::Segment(*last.key()), last.get().len() as u64);
        last.get_mut().extend(bytes);
        Some(UndoPlace { file, offset })
    }

    /// The before-images of what is not kept yet of a range.
    fn preserve(
        &mut self,
        (node, content): (NodeId, ContentId),
        bytes: &[u8],
        kept: &mut [bool],
        (start, end): (usize, usize),
    ) {
        let mut at = start;
        let end = end.min(kept.len());
        let mut changes = Vec::new();
        while at < end {
            let length = kept[at..end].iter().take_while(|kept| !**kept).count();
            if length == 0 {
                at += 1;
                continue;
            }
            let place = self.append(&bytes[at..at + length]);
            let (offset, length) = (at as u64, length as u64);
            changes.push(Change::UndoAdd(UndoRow { node, content, offset, length, at: place }));
            kept[at..at + length as usize].fill(true);
            at += length as usize;
        }
        if !changes.is_empty() {
            self.push(changes);
        }
    }

    fn write(&mut self, node: u64, at: u64, length: u64, fill: u8) {
        let one = self.live.get_mut(&node).unwrap();
        let of = (NodeId(node), one.row.content);
        let (start, end) = (at as usize, (at + length) as usize);
        if of.1 != ContentId::EMPTY && !one.whole {
            let (bytes, mut kept) = (one.bytes.clone(), std::mem::take(&mut one.kept));
            self.preserve(of, &bytes, &mut kept, (start, end));
            self.live.get_mut(&node).unwrap().kept = kept;
        }
        let one = self.live.get_mut(&node).unwrap();
        if one.bytes.len() < end {
            one.bytes.resize(end, 0);
        }
        one.bytes[start..end].fill(fill);
        one.dirty = true;
    }

    fn seal(&mut self, node: u64) {
        let now = self.now();
        let one = self.live.get_mut(&node).unwrap();
        if !one.dirty {
            return;
        }
        if one.hidden && one.row.content != ContentId::EMPTY && !one.whole {
            // The last version that history shows must not rely on the file any more.
            let of = (NodeId(node), one.row.content);
            let (bytes, mut kept) = (one.bytes.clone(), std::mem::take(&mut one.kept));
            let all = (0, kept.len());
            self.preserve(of, &bytes, &mut kept, all);
        }
        let one = self.live.get_mut(&node).unwrap();
        (one.dirty, one.whole) = (false, false);
        one.row.size = one.bytes.len() as u64;
        one.row.mtime = now;
        one.row.content = ContentId::EMPTY;
        let mut changes = Vec::new();
        if !one.hidden {
            changes.push(self.add_content(node));
        }
        changes.push(self.put(node));
        self.push(changes);
    }

    /// A new content of a file's bytes.
    fn add_content(&mut self, node: u64) -> Change {
        let id = self.catalog.next_content();
        let one = self.live.get_mut(&node).unwrap();
        one.row.content = id;
        one.kept = vec![false; one.bytes.len()];
        self.contents.insert(id, one.bytes.clone());
        Change::ContentAdd { id, node: NodeId(node), size: one.row.size }
    }

    fn clone_whole(&mut self, which: usize, cloned: bool) {
        let Some(node) = self.pick_file(which) else { return };
        let one = self.live.get_mut(&node).unwrap();
        let id = one.row.content;
        if id == ContentId::EMPTY || one.whole || one.dirty {
            return;
        }
        one.whole = true;
        self.preserved.insert((NodeId(node), id), one.bytes.clone());
        self.push(vec![Change::ContentPreserved { id, cloned }]);
    }

    /// A sealed file's content is moved aside, unless it is whole already.
    fn move_aside(&mut self, node: u64) -> Option<Change> {
        let one = &self.live[&node];
        let id = one.row.content;
        if id == ContentId::EMPTY || one.whole {
            return None;
        }
        self.preserved.insert((NodeId(node), id), one.bytes.clone());
        Some(Change::ContentPreserved { id, cloned: false })
    }

    fn empty(&mut self, which: usize) {
        let Some(node) = self.pick_file(which) else { return };
        self.seal(node);
        let mut changes: Vec<_> = self.move_aside(node).into_iter().collect();
        let one = self.live.get_mut(&node).unwrap();
        (one.row.content, one.row.size, one.whole) = (ContentId::EMPTY, 0, false);
        one.bytes.clear();
        one.kept.clear();
        changes.push(self.put(node));
        self.push(changes);
    }

    fn unlink(&mut self, which: usize, count: usize) {
        let Some(node) = self.pick(which) else { return };
        self.seal(node);
        let names: Vec<_> = self.live[&node].names.iter().take(count).cloned().collect();
        let mut changes: Vec<_> = names.iter().map(|name| remove(1, name)).collect();
        let one = self.live.get_mut(&node).unwrap();
        one.names.retain(|name| !names.contains(name));
        if one.names.is_empty() {
            let of = one.row.content;
            let moved = self.move_aside(node);
            let one = self.live.remove(&node).unwrap();
            if moved.is_some() {
                self.orphans.push((node, of, one.kept));
            }
            changes.extend(moved);
            changes.push(Change::NodeGone(NodeId(node)));
        }
        self.push(changes);
    }

    fn resave(&mut self, which: usize) {
        let Some(node) = self.pick_file(which) else { return };
        let (bytes, names) = (self.live[&node].bytes.clone(), self.live[&node].names.clone());
        if names.len() > 1 || bytes.is_empty() {
            return;
        }
        let number = names.first().unwrap()[1..].parse().unwrap();
        self.unlink(self.live.keys().position(|one| *one == node).unwrap(), 1);
        self.create(number, Kind::File);
        let new = *self.live.keys().last().unwrap();
        let one = self.live.get_mut(&new).unwrap();
        (one.bytes, one.dirty) = (bytes, true);
        self.seal(new);
    }

    fn write_orphan(&mut self, which: usize, at: u64, length: u64, fill: u8) {
        let Some(index) = which.checked_rem(self.orphans.len()) else { return };
        let (node, content, mut kept) = self.orphans[index].clone();
        let of = (NodeId(node), content);
        let Some(bytes) = self.preserved.get(&of).cloned() else {
            // It is swept; whoever has it open still writes, which must leave nothing behind.
            let bytes = vec![7; kept.len()];
            self.preserve(of, &bytes, &mut kept, (at as usize, (at + length) as usize));
            return;
        };
        let (start, end) = (at as usize, ((at + length) as usize).min(bytes.len()));
        self.preserve(of, &bytes, &mut kept, (start, end));
        self.orphans[index].2 = kept;
        let file = self.preserved.get_mut(&of).unwrap();
        if start < end {
            file[start..end].fill(fill);
        }
    }

    fn turn(&mut self, which: usize) {
        let Some(node) = self.pick_file(which) else { return };
        self.seal(node);
        let one = self.live.get_mut(&node).unwrap();
        one.hidden = !one.hidden;
        let names = one.names.clone();
        let mut changes = Vec::new();
        if !one.hidden && one.row.content == ContentId::EMPTY && one.row.size > 0 {
            changes.push(self.add_content(node));
        }
        changes.push(self.put(node));
        for name in &names {
            changes.extend([remove(1, name), self.enter(node, name)]);
        }
        let at = self.push(changes);
        self.turned.insert((node, at));
    }

    fn freeze(&mut self) {
        let at = self.catalog.freeze();
        let mut tree = BTreeMap::new();
        for one in self.live.values().filter(|one| !one.hidden) {
            let bytes = self.contents.get(&one.row.content).cloned().unwrap_or_default();
            for name in &one.names {
                tree.insert(name.clone(), Shown { row: one.row.clone(), bytes: bytes.clone() });
            }
        }
        self.shown.insert(at, tree);
    }

    fn snapshot(&self, which: usize) -> Option<Snapshot> {
        let all = self.catalog.snapshots().unwrap();
        all.get(which.checked_rem(all.len())?).cloned()
    }
}

/// The catalog with a clock that only the test moves.
pub fn open(scratch: &Scratch, clock: &Arc<AtomicI64>, clean: bool) -> Catalog {
    let clock = clock.clone();
    let now = Box::new(move || Timestamp::from_nanos(clock.load(Ordering::Relaxed)));
    Catalog::open_with_clock(scratch.map(), clean, now).unwrap()
}

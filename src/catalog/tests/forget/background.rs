//! What is done to history in the background: thinning, packing, purging, sweeping.

use std::collections::{BTreeMap, BTreeSet};

use super::world::{World, open};
use super::*;

impl World {
    pub fn thin(&mut self, horizon: usize, every: usize) {
        let points: Vec<_> = self.shown.keys().copied().collect();
        let Some(index) = horizon.checked_rem(points.len()) else { return };
        let keep = points.iter().copied().enumerate();
        let keep = keep.filter(|(index, _)| index % every == 0).map(|(_, point)| point).collect();
        self.catalog.thin(points[index], &keep).unwrap();
        self.forget_invisible();
    }

    /// Only what was looked at stays visible.
    pub fn thin_all(&mut self) {
        let keep = self.shown.keys().copied().collect();
        self.catalog.thin(self.catalog.generation(), &keep).unwrap();
        self.forget_invisible();
    }

    pub fn forget_invisible(&mut self) {
        let (points, horizon) =
            (self.catalog.kept_points().unwrap(), self.catalog.horizon().unwrap());
        self.shown.retain(|at, _| *at >= horizon || points.contains(at));
    }

    /// Chunks of some bytes; new ones go into a new pack.
    fn cut(&mut self, bytes: &[u8], size: usize) -> Vec<(ChunkId, u32)> {
        let (mut parts, mut fresh) = (Vec::new(), Vec::new());
        for piece in bytes.chunks(size) {
            let hash = *blake3::hash(piece).as_bytes();
            let known = self.catalog.chunk(&hash).unwrap().map(|row| row.id);
            let known = known.or(piece.iter().all(|byte| *byte == 0).then_some(ChunkId::HOLE));
            let id = known.unwrap_or_else(|| {
                let id = self.catalog.next_chunk();
                fresh.push((id, hash, piece.to_vec()));
                id
            });
            parts.push((id, piece.len() as u32));
        }
        if !fresh.is_empty() {
            let pack = self.catalog.next_pack();
            let bytes = fresh.iter().map(|(.., piece)| piece.len() as u64 + 1).sum();
            let mut all = vec![PackChange::PackAdd { id: pack, bytes, hash: [0; 32] }];
            for (id, hash, piece) in fresh {
                let place = ChunkPlace { pack, frame: id.0, at: 0 };
                let (length, stored) = (piece.len() as u32, piece.len() as u32 + 1);
                all.push(PackChange::ChunkAdd(ChunkRow { id, hash, place, length, stored }));
                self.chunks.insert(id, piece);
            }
            self.push(all.into_iter().map(Change::Pack).collect());
            // Else the next piece of the same bytes would become a chunk once more.
            self.catalog.flush(Durability::Written).unwrap();
        }
        parts
    }

    pub fn pack(&mut self, every: u64) {
        for waiting in self.catalog.waiting_contents(ContentId::EMPTY, 100).unwrap() {
            if !waiting.id.0.is_multiple_of(every) {
                continue;
            }
            self.orphans.retain(|(_, content, _)| *content != waiting.id);
            let (id, node) = (waiting.id, waiting.node);
            let bytes = self.contents[&id].clone();
            let own = self.catalog.sources(node, id).unwrap().undo;
            let chunks = self.cut(&bytes, 3);
            let mut changes = vec![Change::Pack(PackChange::RecipeAdd { id, chunks })];
            changes.push(Change::Pack(PackChange::ContentPacked(id)));
            changes.extend(own.iter().map(|row| {
                let (node, content, offset) = (row.node, row.content, row.offset);
                Change::Forget(ForgetChange::Undo { node, content, offset })
            }));
            self.push(changes);
            self.preserved.remove(&(node, id));
        }
    }

    pub fn pack_images(&mut self, count: usize) {
        let next = self.segments.keys().last().unwrap() + 1;
        let complete = std::mem::replace(&mut self.segments, BTreeMap::from([(next, Vec::new())]));
        for (segment, bytes) in complete {
            let rows = self.catalog.segment_rows(segment).unwrap();
            for rows in rows.chunks(count) {
                let stream = self.catalog.next_content();
                let (mut all, mut moves) = (Vec::new(), Vec::new());
                for row in rows {
                    let (node, content, offset) = (row.node, row.content, row.offset);
                    let at = all.len() as u64;
                    moves.push(PackChange::UndoMove { node, content, offset, stream, at });
                    let from = row.at.unwrap().offset as usize;
                    all.extend(&bytes[from..from + row.length as usize]);
                }
                let chunks = self.cut(&all, 4);
                let mut changes = vec![Change::Pack(PackChange::RecipeAdd { id: stream, chunks })];
                changes.extend(moves.into_iter().map(Change::Pack));
                self.push(changes);
            }
            assert!(!self.catalog.needs_segment(segment).unwrap());
        }
    }

    pub fn same(&mut self) {
        for waiting in self.catalog.waiting_contents(ContentId::EMPTY, 100).unwrap() {
            let Some((node, to)) = self.catalog.successor(&waiting).unwrap() else { continue };
            let one = &self.live[&node.0];
            let (id, file) = (waiting.id, &self.preserved[&(waiting.node, waiting.id)]);
            if one.dirty || one.row.content != to || *file != one.bytes {
                continue;
            }
            self.orphans.retain(|(_, content, _)| *content != id);
            self.push(vec![Change::Pack(PackChange::ContentSame { id, to })]);
            self.preserved.remove(&(waiting.node, id));
        }
    }

    pub fn repack(&mut self) {
        self.catalog.flush(Durability::Written).unwrap();
        for old in self.catalog.packs().unwrap().into_iter().filter(|pack| pack.live < pack.bytes) {
            let rows = self.catalog.pack_chunks(old.id).unwrap();
            let id = self.catalog.next_pack();
            let bytes = rows.iter().map(|row| u64::from(row.stored)).sum();
            let mut changes = Vec::new();
            if !rows.is_empty() {
                changes.push(PackChange::PackAdd { id, bytes, hash: [1; 32] });
            }
            changes.extend(rows.into_iter().map(|row| PackChange::ChunkMove {
                id: row.id,
                place: ChunkPlace { pack: id, ..row.place },
                stored: row.stored,
            }));
            changes.push(PackChange::PackRemove(old.id));
            self.push(changes.into_iter().map(Change::Pack).collect());
        }
        self.catalog.flush(Durability::Written).unwrap();
    }

    pub fn purge(&mut self, which: usize) {
        self.note_ever();
        let all: BTreeSet<u64> =
            self.states.keys().map(|(node, _)| *node).chain(self.live.keys().copied()).collect();
        let all: Vec<_> = all.into_iter().filter(|node| *node > 1).collect();
        let Some(index) = which.checked_rem(all.len()) else { return };
        let node = all[index];
        self.catalog.freeze();
        let mut begun = Generation(i64::MAX as u64);
        if self.live.get(&node).is_some_and(|one| !one.hidden) {
            let mut changes = vec![self.put(node)];
            for name in &self.live[&node].names {
                changes.extend([remove(1, name), self.enter(node, name)]);
            }
            begun = self.push(changes);
        }
        loop {
            let step = self.catalog.plan_purge(NodeId(node)).unwrap();
            self.remove_files(&step);
            if !step.changes.is_empty() {
                self.catalog.push(step.changes).unwrap();
            }
            if step.done {
                break;
            }
        }
        self.catalog.sweep_again(Generation(0), self.catalog.generation()).unwrap();
        self.states.retain(|(of, _), _| *of != node);
        self.entries.retain(|(.., of)| *of != node);
        for (at, tree) in &mut self.shown {
            tree.retain(|_, shown| shown.row.id.0 != node || *at >= begun);
        }
    }

    fn remove_files(&mut self, step: &SweepStep) {
        for of in &step.unpreserved {
            self.preserved.remove(of).expect("what is forgotten was there");
        }
    }

    pub fn sweep(&mut self, steps: usize, cost: usize) -> bool {
        self.note_ever();
        for _ in 0..steps {
            let Some(sweep) = self.catalog.next_sweep().unwrap() else { return false };
            let step = self.catalog.sweep_within(&sweep, self.since, cost).unwrap();
            self.remove_files(&step);
        }
        true
    }

    pub fn sweep_all(&mut self, cost: usize) {
        assert!(!self.sweep(5_000, cost), "a sweep ends");
        let mut from = Some(Unused::default());
        while let Some(at) = from {
            from = self.catalog.forget_unused(at).unwrap();
        }
        self.catalog.flush(Durability::Written).unwrap();
    }

    pub fn reopen(&mut self, clean: bool) {
        if clean {
            self.catalog.close().unwrap();
        }
        let other = Scratch::new(1);
        self.catalog = other.open();
        self.catalog = open(&self.scratch, &self.clock, clean);
    }

    /// Takes down which past states and entries there are, before any go.
    pub fn note_ever(&mut self) {
        self.catalog.flush(Durability::Written).unwrap();
        let db = self.db();
        for (node, died, born) in liveness::states(&db) {
            let by = |at| liveness::actor_at(&db, at);
            self.states.entry((node, died)).or_insert_with(|| (born, by(born), by(died)));
        }
        self.entries.extend(liveness::entries(&db));
    }
}

//! `check --rebuild-catalog`: a catalog from what is left when every catalog is lost.
//!
//! Left are the live tree, the files in `preserved/`, and the packs with their journals
//! ([`crate::history::journal`]). From them a new catalog is made, as if what they tell had
//! happened again: every version that lies whole in a pack or in `preserved/` is born and ends at
//! its time and under its path, then the live tree is taken in as at an adoption. A live file under
//! the last path of a node is taken for that node.
//!
//! **What cannot be known** is told: paths of preserved contents that were not packed yet (they are
//! shown under [`UNNAMED`] in the root), what a deleted file had before somebody who had it open
//! wrote to it, versions that consist in part of the live file's bytes, names of snapshots, who
//! made a change, states without content of their own (renames, changes of mode), and what of the
//! journals no replica has whole.
//!
//! Live files are not touched. The lost catalogs, and files of history that mean nothing any more,
//! go to quarantine. One replica gets the catalog; the others are made equal to it by the next
//! mount. If we die before the end, the marker says that there is no whole catalog, and it is to be
//! done again.

mod found;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use serde::{Deserialize, Serialize};

use self::found::Found;
use super::{Finding, Member, finding, open};
use crate::catalog::digest::{Digest, first_half};
use crate::catalog::{Catalog, Change, ChunkRow, Durability, NodeRow, PackChange, VersionRecord};
use crate::error::{IoContext, Result};
use crate::excludes::Patterns;
use crate::history::packs::{pack_dir, parse_pack_name};
use crate::history::{preserved_dir, preserved_name};
use crate::progress::Progress;
use crate::replica::backing::RenameMode;
use crate::replica::guarded::CALL_TIMEOUT;
use crate::store::marker::{CleanMark, Phase};
use crate::store::site::{own_name, private};
use crate::store::{CATALOG_FILE, import_tree};
use crate::types::{
    ChunkId, ContentId, EntryName, Kind, NodeId, PackId, RelPath, ReplicaMap, Timestamp, XattrSetId,
};

/// Where versions are shown whose path is not known.
pub const UNNAMED: &str = "versions-without-a-path";
/// Changes in one push.
const PUSH_CHANGES: usize = 1000;

/// What a rebuilding did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuildReport {
    /// Live objects in the new catalog.
    pub live: u64,
    /// Past versions in it.
    pub versions: u64,
    /// Packs that were read.
    pub packs: u64,
    /// What could not be known, or not be used.
    pub unknown: Vec<Finding>,
}

/// Makes a new catalog on the first of these backings. All of their old catalogs are set aside.
pub fn rebuild(backings: &[PathBuf], progress: &Progress) -> Result<RebuildReport> {
    let mut members = open(backings, CALL_TIMEOUT, |_, opened| opened.map(Some))?;
    let time = Timestamp::now().as_nanos();
    // One that was ended before.
    let again = members[0].marker.phase == Phase::Filling;
    for member in &mut members {
        // From here on until the end no catalog is believed.
        member.marker.clean = None;
        member.marker.phase = Phase::Filling;
        member.marker.write(&member.site)?;
        set_aside_catalog(member, time)?;
    }
    let mut report = RebuildReport::default();
    let found = Found::read(&members[0], again, &mut report, progress)?;
    let file = members[0].catalog_file();
    let clock = Arc::new(AtomicI64::new(found.first_time()));
    let first = Timestamp::from_nanos(clock.load(Ordering::Relaxed) - 1);
    Catalog::create_at(&file, members[0].marker.store, first)?;
    let now = clock.clone();
    let catalog = Catalog::open_with_clock(
        ReplicaMap::new(vec![Some(file.clone())]),
        true,
        Box::new(move || Timestamp::from_nanos(now.load(Ordering::Relaxed))),
    )?;
    let made = (|| {
        let mut history = Past::new(&catalog, &clock);
        history.packs(&found, &mut report)?;
        history.play(&members[0], found, &mut report, progress)?;
        clock.store(Timestamp::now().as_nanos(), Ordering::Relaxed);
        import_tree(&members[0].site, &catalog, &Arc::new(Patterns::default()), progress)?;
        catalog.flush(Durability::Durable)?;
        let totals = catalog.totals()?;
        (report.live, report.versions) = (totals.live_nodes, totals.past_versions);
        set_aside_unused(&members[0], &catalog, time, &mut report)
    })();
    let closed = catalog.close();
    made.and(closed)?;
    let member = &mut members[0];
    member.site.backing.sync_all().context("make durable", &member.site.path)?;
    let head = Catalog::inspect(&file)?;
    member.marker.phase = Phase::Ok;
    member.marker.clean = Some(CleanMark::of(&head));
    member.marker.opened = None;
    member.marker.write(&member.site)?;
    Ok(report)
}

/// Moves what there is of a catalog to quarantine.
fn set_aside_catalog(member: &Member, time: i64) -> Result<()> {
    let from = member.site.dir(&private(""))?;
    let to = member.site.dir(&private("quarantine"))?;
    let names =
        [CATALOG_FILE, "catalog.db-wal", "catalog.db-shm", "catalog.db.new", "catalog.db.sums"];
    for name in names {
        let aside = own_name(&format!("rebuild-{time}-{name}"));
        let moved =
            member.site.backing.rename(&from, &own_name(name), &to, &aside, RenameMode::NoReplace);
        match moved {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            other => other.context("set aside", member.site.private_path(name))?,
        }
    }
    Ok(())
}

/// The past as it is played again.
struct Past<'a> {
    catalog: &'a Catalog,
    clock: &'a AtomicI64,
    changes: Vec<Change>,
    /// Chunks by the first half of their hash.
    chunks: HashMap<Digest, (ChunkId, u32)>,
    /// Packed contents that are whole, with their sizes.
    packed: HashMap<ContentId, u64>,
    dirs: HashMap<RelPath, NodeId>,
    /// What has a path at the moment that is played.
    living: HashMap<RelPath, NodeId>,
    paths: HashMap<NodeId, RelPath>,
    next_node: u64,
}

/// A version that can be shown.
struct Shown {
    version: VersionRecord,
    preserved: bool,
    xattrs: XattrSetId,
}

impl<'a> Past<'a> {
    fn new(catalog: &'a Catalog, clock: &'a AtomicI64) -> Past<'a> {
        Past {
            catalog,
            clock,
            changes: Vec::new(),
            chunks: HashMap::new(),
            packed: HashMap::new(),
            dirs: HashMap::new(),
            living: HashMap::new(),
            paths: HashMap::new(),
            next_node: 2,
        }
    }

    /// Enters the packs, their chunks, and the recipes of which every chunk is there.
    fn packs(&mut self, found: &Found, report: &mut RebuildReport) -> Result<()> {
        let dir = self.dir_row(NodeId::ROOT);
        self.changes.push(Change::NodePut(dir));
        for pack in &found.packs {
            let (id, bytes, hash) = (pack.id, pack.bytes, pack.hash);
            self.changes.push(Change::Pack(PackChange::PackAdd { id, bytes, hash }));
            for chunk in &pack.chunks {
                let digest = first_half(&chunk.hash);
                if self.chunks.contains_key(&digest) {
                    continue;
                }
                let id = self.catalog.next_chunk();
                self.chunks.insert(digest, (id, chunk.length));
                self.changes.push(Change::Pack(PackChange::ChunkAdd(ChunkRow {
                    id,
                    hash: chunk.hash,
                    place: chunk.place,
                    length: chunk.length,
                    stored: chunk.stored,
                })));
            }
            self.push_many()?;
        }
        let wanted: BTreeMap<ContentId, u64> =
            found.versions.values().map(|one| (one.content, one.size)).collect();
        for (&id, parts) in &found.recipes {
            // A stream of before-images alone makes no version.
            let Some(&size) = wanted.get(&id) else { continue };
            let chunk = |part: &(Option<Digest>, u32)| match part {
                (None, length) => Some((ChunkId::HOLE, *length)),
                (Some(digest), length) => {
                    self.chunks.get(digest).filter(|(_, own)| own == length).copied()
                }
            };
            let chunks: Option<Vec<(ChunkId, u32)>> = parts.iter().map(chunk).collect();
            let total: u64 = parts.iter().map(|(_, length)| u64::from(*length)).sum();
            match chunks {
                Some(chunks) if total == size => {
                    self.changes.push(Change::Pack(PackChange::RecipeAdd { id, chunks }));
                    self.packed.insert(id, size);
                }
                _ => {
                    let place = format!("content {id}");
                    let what = "some of its chunks are in no whole pack".to_string();
                    report.unknown.push(Finding { place, what });
                }
            }
            self.push_many()?;
        }
        self.push()
    }

    /// Plays what is known of versions in the order of time.
    fn play(
        &mut self,
        member: &Member,
        found: Found,
        report: &mut RebuildReport,
        progress: &Progress,
    ) -> Result<()> {
        let shown = self.shown(member, found, report)?;
        progress.begin("Making history anew", shown.len() as u64, 0);
        // A node's versions follow each other: each ends no later than the next begins.
        let mut events: BTreeMap<(i64, u8, NodeId, ContentId), usize> = BTreeMap::new();
        for (index, one) in shown.iter().enumerate() {
            let version = &one.version;
            let born = version.born.as_nanos();
            let died = version.died.map_or(i64::MAX, Timestamp::as_nanos).max(born + 1);
            events.insert((born, 1, version.node, version.content), index);
            events.insert((died, 0, version.node, version.content), index);
        }
        let mut last: HashMap<NodeId, ContentId> = HashMap::new();
        for one in &shown {
            let newest = last.entry(one.version.node).or_default();
            *newest = (*newest).max(one.version.content);
        }
        let mut now: HashMap<NodeId, ContentId> = HashMap::new();
        for ((time, born, node, content), index) in events {
            let one = &shown[index];
            self.clock.store(time.min(Timestamp::now().as_nanos()), Ordering::Relaxed);
            if born == 1 {
                self.begin(one)?;
                now.insert(node, content);
                progress.advance(1, 0)?;
            } else if now.get(&node) == Some(&content) && last.get(&node) == Some(&content) {
                // It ends with its last version, unless it lives.
                let path = one.version.path.clone();
                if !is_live_file(member, &path) || self.paths.get(&node) != Some(&path) {
                    self.end(node)?;
                }
            }
            self.push()?;
        }
        progress.end();
        Ok(())
    }

    /// The versions of which all bytes are there.
    fn shown(
        &mut self,
        member: &Member,
        found: Found,
        report: &mut RebuildReport,
    ) -> Result<Vec<Shown>> {
        let mut shown = Vec::new();
        let highest = found.versions.keys().map(|(node, _)| node.0);
        let highest = highest.chain(found.preserved.iter().map(|(node, _)| node.0)).max();
        self.next_node = self.next_node.max(highest.unwrap_or(1) + 1);
        let mut preserved = found.preserved;
        for (key, version) in found.versions {
            let packed = self.packed.contains_key(&version.content);
            let whole = packed || !found.overwritten.contains(&key);
            let kept = whole && preserved.remove(&key);
            if packed || kept {
                let preserved = kept && !packed;
                shown.push(Shown { version, preserved, xattrs: XattrSetId::NONE });
            } else {
                let place = version.path.to_string();
                let when = jiff::Timestamp::from_nanosecond(version.born.as_nanos().into());
                let what = format!(
                    "its version of {} consists of before-images and what came after it",
                    when.map(|at| at.to_string()).unwrap_or_default()
                );
                report.unknown.push(Finding { place, what });
            }
        }
        for (node, content) in preserved {
            let dir = preserved_dir(node).path();
            let name = preserved_name(node, content);
            let handle = member.site.dir(&dir)?;
            let Some(object) = member.site.object(&handle, &dir, &name)? else { continue };
            let stat = object.stat;
            let was_overwritten = found.overwritten.contains(&(node, content));
            if stat.kind != Kind::File || stat.size == 0 && !was_overwritten {
                continue;
            }
            let path = RelPath::from(vec![own_name(UNNAMED), name]);
            let place = member.site.at(&dir.join(&own_name(&format!("{}.{}", node.0, content.0))));
            let what = match was_overwritten {
                true => "its path, and what it had where it was overwritten later",
                false => "its path",
            };
            report.unknown.push(finding(&place, format!("{what}; it is shown as {path}")));
            let version = VersionRecord {
                node,
                content,
                size: stat.size,
                mode: stat.mode,
                uid: stat.uid,
                gid: stat.gid,
                mtime: stat.mtime,
                born: stat.mtime,
                died: Some(stat.ctime),
                digest: None,
                path,
            };
            let xattrs = self.catalog.intern_xattrs(&object.xattrs)?;
            shown.push(Shown { version, preserved: true, xattrs });
        }
        Ok(shown)
    }

    fn begin(&mut self, one: &Shown) -> Result<()> {
        let version = &one.version;
        let path = &version.path;
        let Some((parent, name)) = path.split_last() else { return Ok(()) };
        let name = name.clone();
        if let Some(other) = self.living.get(path).copied()
            && other != version.node
        {
            self.end(other)?;
        }
        let dir = self.dir(&parent)?;
        self.changes.push(Change::ContentAdd {
            id: version.content,
            node: version.node,
            size: version.size,
        });
        let id = version.content;
        if one.preserved {
            self.changes.push(Change::ContentPreserved { id, cloned: false });
        } else {
            self.changes.push(Change::Pack(PackChange::ContentPacked(id)));
        }
        if let Some(digest) = version.digest {
            self.changes.push(Change::DigestAdd { content: id, digest });
        }
        self.changes.push(Change::NodePut(NodeRow {
            id: version.node,
            kind: Kind::File,
            mode: version.mode,
            uid: version.uid,
            gid: version.gid,
            rdev: 0,
            size: version.size,
            blocks: version.size.div_ceil(512),
            mtime: version.mtime,
            ctime: version.mtime,
            btime: Timestamp::default(),
            xattrs: one.xattrs,
            content: id,
        }));
        match self.paths.get(&version.node).cloned() {
            Some(old) if old == *path => {}
            old => {
                if let Some(old) = old {
                    self.remove_name(&old)?;
                }
                let node = version.node;
                self.changes.push(Change::EntryAdd { parent: dir, name, node });
                self.living.insert(path.clone(), version.node);
                self.paths.insert(version.node, path.clone());
            }
        }
        Ok(())
    }

    fn end(&mut self, node: NodeId) -> Result<()> {
        let Some(path) = self.paths.remove(&node) else { return Ok(()) };
        self.remove_name(&path)?;
        self.changes.push(Change::NodeGone(node));
        Ok(())
    }

    fn remove_name(&mut self, path: &RelPath) -> Result<()> {
        let Some((parent, name)) = path.split_last() else { return Ok(()) };
        let name: EntryName = name.clone();
        let parent = self.dir(&parent)?;
        self.living.remove(path);
        self.changes.push(Change::EntryRemove { parent, name });
        Ok(())
    }

    /// The node of a directory, made with those above it where it is new.
    fn dir(&mut self, path: &RelPath) -> Result<NodeId> {
        let Some((parent, name)) = path.split_last() else { return Ok(NodeId::ROOT) };
        if let Some(node) = self.dirs.get(path) {
            return Ok(*node);
        }
        // A file had the name before: it ended without anybody's telling.
        if let Some(file) = self.living.get(path).copied() {
            self.end(file)?;
        }
        let (name, parent) = (name.clone(), self.dir(&parent)?);
        let node = NodeId(self.next_node);
        self.next_node += 1;
        let row = self.dir_row(node);
        self.changes.push(Change::NodePut(row));
        self.changes.push(Change::EntryAdd { parent, name, node });
        self.dirs.insert(path.clone(), node);
        Ok(node)
    }

    fn dir_row(&self, id: NodeId) -> NodeRow {
        let time = Timestamp::from_nanos(self.clock.load(Ordering::Relaxed));
        NodeRow {
            id,
            kind: Kind::Dir,
            mode: 0o700,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 0,
            blocks: 0,
            mtime: time,
            ctime: time,
            btime: Timestamp::default(),
            xattrs: XattrSetId::NONE,
            content: ContentId::EMPTY,
        }
    }

    fn push_many(&mut self) -> Result<()> {
        if self.changes.len() >= PUSH_CHANGES { self.push() } else { Ok(()) }
    }

    fn push(&mut self) -> Result<()> {
        if !self.changes.is_empty() {
            self.catalog.push(std::mem::take(&mut self.changes))?;
        }
        Ok(())
    }
}

/// Whether a live file has this path.
fn is_live_file(member: &Member, path: &RelPath) -> bool {
    let Some((parent, name)) = path.split_last() else { return false };
    let backing = &member.site.backing;
    let stat = backing.open_dir(&parent).and_then(|dir| backing.stat_at(&dir, name));
    stat.is_ok_and(|stat| stat.kind == Kind::File)
}

/// Moves files of history that the new catalog has no use for to quarantine.
fn set_aside_unused(
    member: &Member,
    catalog: &Catalog,
    time: i64,
    report: &mut RebuildReport,
) -> Result<()> {
    let site = &member.site;
    let quarantine = site.dir(&private("quarantine"))?;
    let undo = private("undo");
    let mut dirs = vec![undo.clone()];
    dirs.extend((0..=255).map(|shard| pack_dir(PackId(shard)).path()));
    let known: BTreeSet<PackId> = catalog.packs()?.into_iter().map(|pack| pack.id).collect();
    for dir in dirs {
        let Ok(handle) = site.backing.open_dir(&dir) else { continue };
        for entry in site.backing.list(&handle).context("list", site.at(&dir))? {
            if parse_pack_name(&entry.name).is_some_and(|id| known.contains(&id)) {
                continue;
            }
            let place = site.at(&dir.join(&entry.name));
            let aside = own_name(&format!("rebuild-{time}-{}", entry.name));
            site.backing
                .rename(&handle, &entry.name, &quarantine, &aside, RenameMode::NoReplace)
                .context("set aside", &place)?;
            let what = match dir == undo {
                true => "which versions its before-images belong to",
                false => "it is no whole pack of this store",
            };
            report.unknown.push(finding(&place, what.into()));
        }
    }
    Ok(())
}

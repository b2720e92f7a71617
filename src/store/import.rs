//! Taking a live tree into the catalog: adoption, and what an unclean end left unrecorded.
//!
//! One algorithm for both: the difference between the tree on the backing and the catalog's live
//! tree is pushed as changes. So it can be killed at any time: the next run continues with what is
//! still different.
//!
//! How objects are recognised, in this order: another name of a hard-linked object already met; the
//! node that the catalog has under this name, if its kind fits and nothing speaks against it; for
//! files, a node that lost its name and has the same size, times, mode and owner (`moves`): it was
//! renamed. Everything else is new.
//!
//! Equal size and time alone do not make a file the recorded one: where the node's content was
//! moved aside into `preserved/`, the file under its name is another's or a later content.
//!
//! Not done here: reading file contents (size and modification time tell whether one changed), and
//! history beside the live tree, which was recovered before.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rustix::io::Errno;

use crate::catalog::{Catalog, Change, NodeRow};
use crate::error::{Error, IoContext, Result};
use crate::excludes::{META_KEY, Patterns, Scope};
use crate::progress::Progress;
use crate::replica::backing::Stat;
use crate::store::bounds::Bounds;
use crate::store::idset::IdSet;
use crate::store::site::{Object, Site, is_other_mount};
use crate::types::{ContentId, EntryName, Kind, NodeId, RelPath, Timestamp, XattrSetId};

mod bounded;
mod excluded;
mod lost;
mod missing;
mod moves;
mod report;
mod rescue;

use missing::Missing;
pub(super) use moves::born_together;
pub use report::{ImportReport, count_words};

/// Changes in one push: enough to make a batch worth its commit, little enough to hold.
const PUSH_CHANGES: usize = 1000;
/// The most files kept in memory only because their birth is not the recorded one. On a copy that
/// is so for all files, and tells nothing.
const STRANGERS_MAX: usize = 10_000;
/// Makes the catalog's live tree equal to the one on `source`. The changes are pushed, not flushed.
/// `peers` are other replicas of the store, which may still have what was changed on `source`;
/// `exclude` tells, with the rules that lie in the tree, what gets no history. `within`: nothing
/// else can differ; the number tells which replica it is.
pub fn import(
    source: &Site,
    peers: &[Site],
    catalog: &Catalog,
    exclude: &Arc<Patterns>,
    within: Option<(&Bounds, u64)>,
    progress: &Progress,
) -> Result<ImportReport> {
    let mut import = Import {
        site: source,
        peers,
        catalog,
        progress,
        any_rules: !exclude.is_empty() || catalog.meta(META_KEY)?.is_some(),
        exclude: exclude.clone(),
        changes: Vec::new(),
        claimed: IdSet::default(),
        links: HashMap::new(),
        missing: Vec::new(),
        deferred: Vec::new(),
        strangers: 0,
        pending: Vec::new(),
        fresh_catalog: false,
        bounds: within.map(|(bounds, _)| bounds.clone()),
        strays: HashSet::new(),
        newborn: HashMap::new(),
        parked: HashMap::new(),
        read: IdSet::default(),
        report: ImportReport::default(),
    };
    progress.begin(&format!("Reading {}", source.path.display()), 0, 0);
    let result = match within {
        Some((bounds, replica)) => import.run_within(bounds, replica),
        None => import.take_root().and_then(|()| import.take_pending()),
    };
    // What was read is kept even when the user stops it: the next mount goes on from there.
    let pushed = import.push();
    progress.end();
    result.and(pushed)?;
    let report = import.report;
    for path in &report.skipped {
        log::warn!(
            "{}: another filesystem is mounted there; it is left out",
            source.at(path).display()
        );
    }
    for path in &report.lost {
        log::warn!("{path} is gone, and its last content was not preserved");
    }
    Ok(report)
}

/// What identifies a hard-linked object during one walk. The change time is in it because inode
/// numbers alone repeat across btrfs subvolumes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct LinkKey {
    ino: u64,
    ctime: Timestamp,
    size: u64,
}

/// A file that may turn out to be a renamed one.
struct Deferred {
    dir: RelPath,
    parent: NodeId,
    name: EntryName,
    stat: Stat,
    xattrs: XattrSetId,
    /// The node that had this name, with its recorded state.
    over: Option<NodeRow>,
    /// For a hard-linked one.
    link_key: Option<LinkKey>,
    /// What speaks against its being `over`.
    doubt: Doubt,
    /// Rules keep it out of history.
    excluded: bool,
}

/// Why a file may not be the node that had its name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Doubt {
    /// Nothing speaks against it.
    None,
    /// It was not born when the recorded one was: so it is for another file and for every copy.
    Born,
    /// Its bytes are others, or the recorded ones were moved aside, or no node had its name.
    Changed,
}

/// A directory still to be read.
struct Pending {
    path: RelPath,
    node: NodeId,
    /// The catalog has no entries of it.
    fresh: bool,
    /// It may be another than the catalog says: all below it is read.
    doubtful: bool,
    /// Its rules; before it is read, those of the directory above.
    scope: Arc<Scope>,
}

struct Import<'a> {
    site: &'a Site,
    peers: &'a [Site],
    catalog: &'a Catalog,
    progress: &'a Progress,
    exclude: Arc<Patterns>,
    /// Rules were met, now or by an earlier mount.
    any_rules: bool,
    changes: Vec<Change>,
    /// Nodes that were found on the backing.
    claimed: IdSet,
    /// Nodes of the hard-linked objects met so far.
    links: HashMap<LinkKey, NodeId>,
    /// Names without an object, parents before their children; `None` once found elsewhere.
    missing: Vec<Option<Missing>>,
    deferred: Vec<Deferred>,
    /// How many of the deferred are only doubtful by their birth.
    strangers: usize,
    pending: Vec<Pending>,
    /// The catalog was empty: nothing can have been renamed.
    fresh_catalog: bool,
    /// Nothing else can differ.
    bounds: Option<Bounds>,
    /// Directories that may have moved and are not recognised on the backing.
    strays: HashSet<NodeId>,
    /// Directories that got their nodes before they were met.
    newborn: HashMap<RelPath, NodeId>,
    /// By directory and name what was parked there, and the name that it had.
    parked: HashMap<(NodeId, EntryName), EntryName>,
    /// Directories whose entries were read.
    read: IdSet,
    report: ImportReport,
}

impl Import<'_> {
    fn take_pending(&mut self) -> Result<()> {
        while let Some(dir) = self.pending.pop() {
            if !self.read.contains(dir.node) {
                self.read.insert(dir.node);
                self.take_dir(dir)?;
            }
        }
        self.settle_deferred()?;
        for gone in std::mem::take(&mut self.missing).into_iter().rev().flatten() {
            self.drop_name(gone.parent, &gone.name, gone.node, &gone.dir)?;
            self.progress.advance(0, 0)?;
        }
        self.push()
    }

    fn take_root(&mut self) -> Result<()> {
        let root = RelPath::root();
        let dir = self.site.dir(&root)?;
        let object = self.site.object_of(&dir, &root)?;
        self.claimed.insert(NodeId::ROOT);
        let fresh = match self.catalog.node(NodeId::ROOT)? {
            Some(row) => {
                self.refresh(&row, &object)?;
                false
            }
            None => {
                let xattrs = self.catalog.intern_xattrs(&object.xattrs)?;
                let row = row_of(NodeId::ROOT, &object.stat, xattrs, ContentId::EMPTY);
                self.changes.push(Change::NodePut(row));
                self.fresh_catalog = true;
                true
            }
        };
        let scope = Scope::root(self.exclude.clone(), None);
        self.pending.push(Pending {
            path: root,
            node: NodeId::ROOT,
            fresh,
            doubtful: false,
            scope,
        });
        Ok(())
    }

    fn take_dir(&mut self, mut dir: Pending) -> Result<()> {
        let handle = self.site.dir(&dir.path)?;
        let entries = self.site.live_entries(&handle, &dir.path)?;
        dir.scope = self.scope_of(&dir, &handle, &entries);
        let dir = &dir;
        let mut known: HashMap<EntryName, (NodeId, Kind)> = HashMap::new();
        if !dir.fresh {
            let listed = self.catalog.list(dir.node)?;
            known.extend(listed.into_iter().map(|one| (one.name, (one.node, one.kind))));
        }
        let site = self.site;
        for (found, entry) in site.objects(&handle, &dir.path, &entries).zip(&entries) {
            if dir.path.is_root() && entry.name.as_bytes() == b".snapshots" {
                log::warn!(
                    "{}: this name shows the snapshots in the mount; the entry is kept but hidden",
                    self.site.at(&dir.path.join(&entry.name)).display()
                );
            }
            let known = known.remove(&entry.name);
            self.take_entry(dir, entry.name.clone(), found, known)?;
        }
        for (name, (node, kind)) in known {
            if self.parked.contains_key(&(dir.node, name.clone())) {
                // It was noted when it was parked.
                continue;
            }
            let dir_path = dir.path.clone();
            let missing = Missing { dir: dir_path, parent: dir.node, name, node, kind };
            let all = self.with_descendants(missing)?;
            self.missing.extend(all.into_iter().map(Some));
        }
        Ok(())
    }

    /// Takes an entry as it was found.
    fn take_entry(
        &mut self,
        dir: &Pending,
        name: EntryName,
        found: Result<Option<Object>>,
        known: Option<(NodeId, Kind)>,
    ) -> Result<()> {
        let path = dir.path.join(&name);
        let object = match found {
            Err(Error::Io { source, .. }) if is_other_mount(&source) => {
                self.report.skipped.push(path);
                return Ok(());
            }
            found => found?.ok_or(Errno::NOENT).context("open", self.site.at(&path))?,
        };
        if object.stat.kind == Kind::Dir
            && let Err(error) = self.site.backing.open_dir(&path)
            && is_other_mount(&error)
        {
            self.report.skipped.push(path);
            return Ok(());
        }
        let bytes = if object.stat.kind == Kind::File { object.stat.size } else { 0 };
        self.take_object(dir, path, name, &object, known)?;
        if self.changes.len() >= PUSH_CHANGES {
            self.push()?;
        }
        self.progress.advance(1, bytes)
    }

    fn take_object(
        &mut self,
        dir: &Pending,
        path: RelPath,
        name: EntryName,
        object: &Object,
        known: Option<(NodeId, Kind)>,
    ) -> Result<()> {
        let stat = &object.stat;
        let excluded = dir.scope.excludes(&name, stat.kind == Kind::Dir);
        let link_key = (stat.kind != Kind::Dir && stat.nlink > 1).then_some(LinkKey {
            ino: stat.ino,
            ctime: stat.ctime,
            size: stat.size,
        });
        let linked = link_key.and_then(|key| self.links.get(&key).copied());
        // Another name of an object that has its node already.
        if let Some(linked) = linked {
            match known {
                Some((node, _)) if node == linked => {}
                _ => {
                    self.replace(dir, &name, known)?;
                    self.add_link(dir.node, name, linked, excluded)?;
                }
            }
            return Ok(());
        }
        if let Some((node, kind)) = known
            && kind == stat.kind
            && !self.claimed.contains(node)
            && let Some(row) = self.catalog.node(node)?
            && (kind != Kind::Symlink
                || self.catalog.symlink_target(node)?.as_deref() == Some(&object.target[..]))
        {
            let doubt = self.doubt(&row, stat)?;
            if doubt != Doubt::None {
                // Perhaps another file was renamed over it.
                let xattrs = self.catalog.intern_xattrs(&object.xattrs)?;
                self.defer(dir, name, stat, (xattrs, Some(row), link_key, doubt));
                return Ok(());
            }
            if let Some(key) = link_key {
                self.links.insert(key, node);
            }
            self.claimed.insert(node);
            if kind == Kind::File && content_differs(&row, stat) {
                self.keep_recorded(&row, &dir.path, &name, stat.size)?;
            }
            self.refresh(&row, object)?;
            let doubtful = dir.doubtful || self.strays.contains(&node);
            let born = || self.bounds.as_ref().is_none_or(|bounds| bounds.born(node));
            if kind == Kind::Dir && (doubtful || born()) {
                let scope = dir.scope.clone();
                self.pending.push(Pending { path, node, fresh: false, doubtful, scope });
            }
            return Ok(());
        }
        self.replace(dir, &name, known)?;
        let xattrs = self.catalog.intern_xattrs(&object.xattrs)?;
        // Renamed, perhaps; or another name of a file that is known by one which is met later.
        let perhaps_known = stat.size > 0 || link_key.is_some() || self.bounds.is_some();
        if stat.kind == Kind::File && perhaps_known && !self.fresh_catalog {
            self.defer(dir, name, stat, (xattrs, None, link_key, Doubt::Changed));
            return Ok(());
        }
        let node = self.add_node((dir.node, name, excluded), stat, xattrs, &object.target);
        if let Some(key) = link_key {
            self.links.insert(key, node);
        }
        if stat.kind == Kind::Dir {
            let scope = dir.scope.clone();
            self.pending.push(Pending { path, node, fresh: true, doubtful: false, scope });
        }
        Ok(())
    }

    fn defer(
        &mut self,
        dir: &Pending,
        name: EntryName,
        stat: &Stat,
        (xattrs, over, link_key, doubt): (XattrSetId, Option<NodeRow>, Option<LinkKey>, Doubt),
    ) {
        let excluded = dir.scope.excludes(&name, false);
        let (dir, parent, stat) = (dir.path.clone(), dir.node, *stat);
        self.deferred.push(Deferred {
            dir,
            parent,
            name,
            stat,
            xattrs,
            over,
            link_key,
            doubt,
            excluded,
        });
    }

    /// What speaks against an object's being the node that has its name.
    fn doubt(&mut self, row: &NodeRow, stat: &Stat) -> Result<Doubt> {
        if row.kind != Kind::File {
            return Ok(Doubt::None);
        }
        if content_differs(row, stat) || self.is_preserved(row)? {
            return Ok(Doubt::Changed);
        }
        let differ = moves::born_together(row, stat) == Some(false);
        if differ && row.size > 0 && self.strangers < STRANGERS_MAX {
            self.strangers += 1;
            return Ok(Doubt::Born);
        }
        Ok(Doubt::None)
    }

    /// Whether a node's newest content lies whole in `preserved/`: then its file was moved aside,
    /// or cloned before it was overwritten.
    fn is_preserved(&self, row: &NodeRow) -> Result<bool> {
        Ok(row.content != ContentId::EMPTY && self.catalog.sources(row.id, row.content)?.is_whole())
    }

    /// Records a node's present state if the catalog has another.
    fn refresh(&mut self, row: &NodeRow, object: &Object) -> Result<()> {
        let stat = &object.stat;
        let xattrs = if *self.catalog.xattrs(row.xattrs)? == object.xattrs {
            row.xattrs
        } else {
            self.catalog.intern_xattrs(&object.xattrs)?
        };
        let versioned = self.is_versioned(row.id)?;
        self.refresh_with(row, stat, xattrs, versioned)
    }

    /// Whether before-images of the newest content exist, or a whole copy of it: then it was being
    /// overwritten, and the file's bytes are a later content even where size and time are the old
    /// ones.
    fn is_overwritten(&self, row: &NodeRow) -> Result<bool> {
        if row.content == ContentId::EMPTY {
            return Ok(false);
        }
        let sources = self.catalog.sources(row.id, row.content)?;
        Ok(sources.is_preserved())
    }

    /// A new content for the file's present bytes.
    fn seal(&mut self, node: NodeId, size: u64) -> ContentId {
        if size == 0 {
            return ContentId::EMPTY;
        }
        let id = self.catalog.next_content();
        self.changes.push(Change::ContentAdd { id, node, size });
        id
    }

    fn add_node(
        &mut self,
        (parent, name, excluded): (NodeId, EntryName, bool),
        stat: &Stat,
        xattrs: XattrSetId,
        target: &[u8],
    ) -> NodeId {
        let node = self.catalog.next_node();
        self.claimed.insert(node);
        let content = match stat.kind {
            Kind::File if !excluded => self.seal(node, stat.size),
            _ => ContentId::EMPTY,
        };
        let row = row_of(node, stat, xattrs, content);
        self.changes.push(match excluded {
            true => Change::NodeUnversioned(row),
            false => Change::NodePut(row),
        });
        if stat.kind == Kind::Symlink {
            self.changes.push(Change::SymlinkTarget { node, target: target.to_vec() });
        }
        self.add_entry(parent, name, node, excluded);
        node
    }

    fn add_entry(&mut self, parent: NodeId, name: EntryName, node: NodeId, excluded: bool) {
        self.changes.push(match excluded {
            true => Change::EntryUnversioned { parent, name, node },
            false => Change::EntryAdd { parent, name, node },
        });
        self.report.added += 1;
    }

    fn push(&mut self) -> Result<()> {
        if !self.changes.is_empty() {
            self.catalog.push(std::mem::take(&mut self.changes))?;
        }
        Ok(())
    }
}

fn content_differs(row: &NodeRow, stat: &Stat) -> bool {
    row.size != stat.size || row.size > 0 && row.mtime != stat.mtime
}

/// The catalog's row for an object with these attributes.
pub fn row_of(id: NodeId, stat: &Stat, xattrs: XattrSetId, content: ContentId) -> NodeRow {
    NodeRow {
        id,
        kind: stat.kind,
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        rdev: stat.rdev,
        size: if matches!(stat.kind, Kind::File | Kind::Symlink) { stat.size } else { 0 },
        blocks: stat.blocks,
        mtime: stat.mtime,
        ctime: stat.ctime,
        btime: stat.btime,
        xattrs,
        content,
    }
}

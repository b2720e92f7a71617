//! The history part of a fill: `preserved/`, `undo/` and `packs/`.
//!
//! The files there carry the same names and bytes on every replica. Preserved files and packs never
//! change once they have their name, so equal size means equal, but for [`Doubt`]; undo segments
//! grow and are preallocated, so they are compared byte by byte.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::catalog::{Catalog, Whereabouts};
use crate::error::{IoContext, Result};
use crate::history;
use crate::replica::backing::Handle;
use crate::replica::intent::DirtySet;
use crate::store::bounds::Bounds;
use crate::store::copy::{Copier, blame, has_changed};
use crate::store::quarantine::Quarantine;
use crate::store::site::{Site, own_creds, private};
use crate::types::{ContentId, EntryName, Kind, RelPath, Timestamp};

const UNDO: &str = "undo";
const PACKS: &str = "packs";
/// A directory that was changed this recently may change again without a new time.
const GRAIN_NANOS: i64 = 100_000_000;
/// Contents asked of a catalog at once.
const CONTENTS: usize = 4096;
const DIRS: [&str; 3] = ["preserved", UNDO, PACKS];

/// The history files of two backings, one of which is to get what the other has.
pub struct History<'a> {
    /// What has them all.
    pub source: &'a Site,
    /// What is to get them.
    pub target: &'a Site,
    /// The source's catalog, if it can be asked.
    pub catalog: Option<&'a Catalog>,
    /// The source is in use: files come and go meanwhile.
    pub changing: bool,
    /// What can differ in its bytes although it has the same size.
    pub doubt: Doubt<'a>,
    /// Undo segments before this one grow no more.
    pub sealed_before: u64,
    /// What earlier fills of the same two found equal, which is passed over.
    pub seen: &'a mut Seen,
}

/// Which files may have other bytes of the same size on the target.
///
/// A pack is durable before it has its name, and a sealed segment when the next one begins. A
/// preserved file is what was live: if the target lost its power, what was written just before the
/// file was deleted may never have reached the disk, though its new name has.
#[derive(Clone, Copy)]
pub enum Doubt<'a> {
    /// All undo segments, no preserved file: the target ended cleanly.
    Undo,
    /// Within what a recovery has to look at.
    Within(&'a Bounds),
    /// All undo segments, and the preserved files of what was dirty when the target ended.
    Dirty(&'a DirtySet),
    /// All but packs.
    All,
}

/// What is known of the directories of history files.
pub type Seen = HashMap<RelPath, Look>;

/// What is known of one of them.
#[derive(Default)]
pub struct Look {
    /// When the source's was changed last before it was compared as a whole, unless that was too
    /// short before.
    changed: Option<Timestamp>,
    /// Files that are on both, equal, and never change any more.
    equal: HashSet<EntryName>,
}

/// The preserved files that a replica has by its own catalog, for one of which that is exactly so:
/// they need not be looked at again, and there may be hundreds of thousands.
pub fn seen_by(own: &Catalog) -> Result<Seen> {
    let mut seen = Seen::new();
    let mut after = ContentId::EMPTY;
    loop {
        let contents = own.waiting_contents(after, CONTENTS)?;
        let Some(last) = contents.last() else { return Ok(seen) };
        after = last.id;
        for content in contents {
            let look = seen.entry(history::preserved_dir(content.node).path()).or_default();
            look.equal.insert(history::preserved_name(content.node, content.id));
        }
    }
}

impl History<'_> {
    /// Makes the target's history files equal to the source's. What differs goes to quarantine,
    /// except what the source had too and has packed or forgotten since: the target's catalog is
    /// older than the source's, so nothing is in there that the source does not know of.
    pub fn fill(&mut self, copier: &mut Copier<'_>, quarantine: &mut Quarantine<'_>) -> Result<()> {
        for (path, is_undo) in dirs(self.source, self.target)? {
            let begun = Timestamp::now();
            let from = open_or_make(self.source, &path)?;
            let stat = self.source.backing.stat(&from);
            let changed = stat.context("look at", self.source.at(&path))?.mtime;
            let mut look = self.seen.remove(&path).unwrap_or_default();
            // Its files never change, but those of undo, which grow.
            if is_undo || look.changed != Some(changed) {
                let equal = self.fill_dir(&path, is_undo, &mut look.equal, copier, quarantine)?;
                let settled = changed.as_nanos().saturating_add(GRAIN_NANOS) < begun.as_nanos();
                look.changed = (equal && settled).then_some(changed);
            }
            self.seen.insert(path, look);
        }
        Ok(())
    }

    /// Returns whether the two are equal then, as far as nothing changed meanwhile.
    fn fill_dir(
        &self,
        path: &RelPath,
        is_undo: bool,
        known: &mut HashSet<EntryName>,
        copier: &mut Copier<'_>,
        quarantine: &mut Quarantine<'_>,
    ) -> Result<bool> {
        let mut equal = true;
        let (source, target) = (self.source, self.target);
        let from = open_or_make(source, path)?;
        let to = open_or_make(target, path)?;
        let present = files(target, path, known)?;
        let wanted = files(source, path, known)?;
        for name in present.keys().filter(|name| !wanted.contains_key(*name)) {
            known.remove(name);
            if self.catalog.map_or(Ok(false), |catalog| self.is_over(catalog, name))? {
                let removed = target.backing.unlink(&to, name);
                removed.context("remove", target.at(&path.join(name)))?;
            } else if !self.changing {
                quarantine.take(&to, path, name)?;
            } else {
                equal = false;
            }
        }
        for (name, size) in &wanted {
            if known.contains(name) && present.contains_key(name) {
                continue;
            }
            // Until it is found to be equal and final below.
            known.remove(name);
            let equal_size = present.get(name) == Some(size) && !is_shared(target, &to, name)?;
            let suspect = is_suspect(name, self.doubt, is_undo);
            let same = equal_size && (!suspect || self.same(copier, (&from, &to), path, name)?);
            if same {
                self.note_equal(name, is_undo, known);
                continue;
            }
            let made = source.object(&from, path, name).and_then(|object| {
                object.map(|object| copier.make(&from, path, name, &object)).transpose()
            });
            let made = match made {
                Ok(Some(made)) => made,
                Ok(None) => {
                    equal = false;
                    continue;
                }
                // It was packed or forgotten meanwhile, or it grows: the next look finds it.
                Err(error) if self.changing && has_changed(source, &error) => {
                    equal = false;
                    continue;
                }
                Err(error) => return Err(error),
            };
            match present.contains_key(name) {
                // A segment that grows is copied again and again.
                true if is_undo && self.changing => {
                    let removed = target.backing.unlink(&to, name);
                    removed.context("remove", target.at(&path.join(name)))?;
                }
                true => quarantine.take(&to, path, name)?,
                false => {}
            }
            copier.place(&made, &to, &path.join(name), name)?;
            self.note_equal(name, is_undo, known);
        }
        Ok(equal)
    }

    /// Whether the catalog has no use for a file of the target any more.
    fn is_over(&self, catalog: &Catalog, name: &EntryName) -> Result<bool> {
        // The target was in use to the same end: what the source had of it was removed as well.
        if let (Doubt::Within(_), Some((node, content))) =
            (self.doubt, history::parse_preserved_name(name))
            && history::recover::is_stray(catalog, node, content)?
        {
            return Ok(true);
        }
        is_over(catalog, name)
    }

    fn note_equal(&self, name: &EntryName, is_undo: bool, known: &mut HashSet<EntryName>) {
        let segment = history::undo::parse_segment_name(name);
        if !is_undo || segment.is_some_and(|segment| segment < self.sealed_before) {
            known.insert(name.clone());
        }
    }

    fn same(
        &self,
        copier: &mut Copier<'_>,
        (from, to): (&Handle, &Handle),
        path: &RelPath,
        name: &EntryName,
    ) -> Result<bool> {
        match copier.same_bytes((from, name), (to, name), path) {
            Err(error) if self.changing && has_changed(self.source, &error) => Ok(true),
            other => other,
        }
    }
}

/// Whether a file has other names as well. A power cut can leave a preserved one a live name, by
/// which it would change.
fn is_shared(site: &Site, dir: &Handle, name: &EntryName) -> Result<bool> {
    let stat = site.backing.stat_at(dir, name);
    Ok(stat.context("look at a history file in", &site.path)?.nlink > 1)
}

/// Whether equal size does not prove equal bytes.
fn is_suspect(name: &EntryName, doubt: Doubt<'_>, is_undo: bool) -> bool {
    if is_undo {
        let segment = history::undo::parse_segment_name(name);
        let Doubt::Within(bounds) = doubt else { return true };
        return segment.is_some_and(|segment| segment >= bounds.undo_from());
    }
    let Some((node, _)) = history::parse_preserved_name(name) else { return false };
    match doubt {
        Doubt::Undo => false,
        Doubt::Within(bounds) => bounds.may_differ(node),
        Doubt::Dirty(dirty) => dirty.may_differ(node),
        Doubt::All => true,
    }
}

/// Whether a preserved file, a segment or a pack is one that the catalog has no use for any more.
fn is_over(catalog: &Catalog, name: &EntryName) -> Result<bool> {
    if let Some(segment) = history::undo::parse_segment_name(name) {
        return Ok(!catalog.needs_segment(segment)?);
    }
    if let Some((_, content)) = history::parse_preserved_name(name) {
        let whereabouts = catalog.whereabouts(content)?;
        return Ok(matches!(whereabouts, Whereabouts::Elsewhere | Whereabouts::Forgotten));
    }
    Ok(match history::packs::parse_pack_name(name) {
        Some(pack) => pack < catalog.packs_end()?,
        None => false,
    })
}

/// Bytes of history files, and of the catalog, that the target has to take.
pub fn missing_bytes(source: &Site, target: &Site) -> Result<u64> {
    let (mut bytes, none) = (0, HashSet::new());
    for (path, _) in dirs(source, target)? {
        let present = match target.backing.open_dir(&path) {
            Ok(_) => files(target, &path, &none)?,
            Err(_) => BTreeMap::new(),
        };
        let wanted = match source.backing.open_dir(&path) {
            Ok(_) => files(source, &path, &none)?,
            Err(_) => BTreeMap::new(),
        };
        for (name, size) in wanted {
            if present.get(&name) != Some(&size) {
                bytes += size;
            }
        }
    }
    let catalog = files(source, &private(""), &none)?;
    bytes += catalog
        .iter()
        .filter(|(name, _)| name.as_bytes().starts_with(b"catalog.db"))
        .map(|(_, size)| size)
        .sum::<u64>();
    Ok(bytes)
}

/// The history directories of both, two levels deep, and whether each is for undo segments.
fn dirs(source: &Site, target: &Site) -> Result<Vec<(RelPath, bool)>> {
    let mut found = BTreeMap::new();
    for name in DIRS {
        let path = private(name);
        let is_undo = name == UNDO;
        found.insert(path.clone(), is_undo);
        for site in [source, target] {
            let Ok(dir) = site.dir(&path) else { continue };
            for entry in site.backing.list(&dir).context("list", site.at(&path))? {
                if entry.kind == Kind::Dir {
                    found.insert(path.join(&entry.name), is_undo);
                }
            }
        }
    }
    Ok(found.into_iter().collect())
}

fn open_or_make(site: &Site, path: &RelPath) -> Result<Handle> {
    match site.backing.open_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            make_dir(site, path)?;
            site.dir(path)
        }
        other => other.context("open the directory", site.at(path)),
    }
}

fn make_dir(target: &Site, path: &RelPath) -> Result<()> {
    let Some((above, name)) = path.split_last() else { return Ok(()) };
    let parent = target.dir(&above)?;
    match target.backing.mkdir(&parent, name, 0o700, own_creds()) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(blame(target, "make the directory", path, error))
        }
        _ => Ok(()),
    }
}

/// Names and sizes of what is no directory; the size of what is known does not matter.
fn files(
    site: &Site,
    path: &RelPath,
    known: &HashSet<EntryName>,
) -> Result<BTreeMap<EntryName, u64>> {
    let dir = site.dir(path)?;
    let mut found = BTreeMap::new();
    for entry in site.backing.list(&dir).context("list", site.at(path))? {
        if entry.kind == Kind::Dir {
            continue;
        }
        if known.contains(&entry.name) {
            found.insert(entry.name, 0);
            continue;
        }
        let stat = match site.backing.stat_at(&dir, &entry.name) {
            // It went between the two looks.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.context("look at", site.at(&path.join(&entry.name)))?,
        };
        found.insert(entry.name, stat.size);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Progress;
    use crate::types::{NodeId, PRIVATE_DIR};
    use std::fs;

    /// What the target has in its preserved files of the nodes 7 and 8 after a fill.
    fn filled(doubt: Doubt<'_>) -> [String; 2] {
        let dirs = [0, 1].map(|_| tempfile::tempdir().unwrap());
        let kept = |side: usize, node: u64| {
            let shard = dirs[side].path().join(format!(".rearview/preserved/{node:02x}"));
            fs::create_dir_all(&shard).unwrap();
            shard.join(format!("{node:016x}.{:016x}", 9))
        };
        for (side, text) in ["what it had", "\0\0\0\0\0\0\0\0\0\0\0"].iter().enumerate() {
            [7, 8].iter().for_each(|&node| fs::write(kept(side, node), text).unwrap());
            for own in ["tmp", "quarantine"] {
                fs::create_dir(dirs[side].path().join(PRIVATE_DIR).join(own)).unwrap();
            }
        }
        let sites = [0, 1].map(|side| Site::open(dirs[side].path()).unwrap());
        let progress = Progress::silent();
        let mut files = History {
            source: &sites[0],
            target: &sites[1],
            catalog: None,
            changing: false,
            doubt,
            sealed_before: 0,
            seen: &mut Seen::new(),
        };
        let mut copier = Copier::new(&sites[0], &sites[1], &progress).unwrap();
        files.fill(&mut copier, &mut Quarantine::new(&sites[1])).unwrap();
        [7, 8].map(|node| fs::read_to_string(kept(1, node)).unwrap())
    }

    #[test]
    fn a_preserved_file_of_what_was_dirty_when_the_target_ended_is_compared_by_its_bytes() {
        let (lost, whole) = ("\0\0\0\0\0\0\0\0\0\0\0", "what it had");
        let dirty = DirtySet { files: HashSet::from([NodeId(8)]), ..DirtySet::default() };
        assert_eq!(filled(Doubt::Dirty(&dirty)), [lost, whole]);
        let born = DirtySet { born_from: Some(NodeId(7)), ..DirtySet::default() };
        assert_eq!(filled(Doubt::Dirty(&born)), [whole, whole]);
        assert_eq!(filled(Doubt::All), [whole, whole]);
        assert_eq!(filled(Doubt::Undo), [lost, lost]);
    }
}

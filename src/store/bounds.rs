//! What a recovery has to look at: where the intent logs of the last mount lead to in the tree.
//!
//! A directory that has not moved lies where the catalog has it. One that may have moved is known
//! by its inode number and birth, and lies in a directory whose entries may differ, or in one that
//! was born: so looking through those finds it, with all below it.

use std::collections::{HashMap, HashSet};

use crate::catalog::Catalog;
use crate::error::{IoContext, Result};
use crate::replica::intent::{MovedDir, Past};
use crate::store::site::Site;
use crate::types::{EntryName, Generation, Kind, NodeId, RelPath, Timestamp};

/// No path is deeper; a longer walk means that the catalog's entries form a circle.
const DEPTH_MAX: usize = 4096;
/// So far two times are apart that belong to the same moment: those of births have a tick, and the
/// catalog knows its own no better than by 10 ms.
pub const TICK_NANOS: i64 = 30_000_000;

/// What may differ between the replicas, or between them and the catalog.
#[derive(Clone, Debug)]
pub struct Bounds {
    past: Past,
    born_from: NodeId,
    told: i64,
}

impl Bounds {
    /// From what the logs of all replicas that took part say together.
    pub fn new(past: Past) -> Bounds {
        let born_from = past.dirty.born_from.unwrap_or(NodeId(u64::MAX));
        let told = past.mount;
        Bounds { past, born_from, told }
    }

    /// The catalog of the replica that goes on was told of something last at `time`.
    pub fn told_at(self, time: Timestamp) -> Bounds {
        Bounds { told: self.told.max(time.as_nanos()), ..self }
    }

    /// All bytes that the catalog knows of at `generation` were durable, as after a checkpoint, but
    /// that what was dirtied before counts on.
    pub fn durable_to(mut self, generation: Generation) -> Bounds {
        let base = &mut self.past.base.generation;
        *base = (*base).max(generation.0);
        self
    }

    /// What was born later than this is not known to the catalog.
    pub fn told(&self) -> Timestamp {
        Timestamp::from_nanos(self.told.saturating_add(TICK_NANOS))
    }

    /// The first undo segment that may have records without rows.
    pub fn undo_from(&self) -> u64 {
        self.past.base.undo_from
    }

    /// Up to this generation all bytes that the catalog knows of were durable.
    pub fn since(&self) -> Generation {
        Generation(self.past.base.generation)
    }

    /// Whether a node was born, as far as its id tells.
    pub fn born(&self, node: NodeId) -> bool {
        node >= self.born_from
    }

    /// Whether a node's content may differ.
    pub fn may_differ(&self, node: NodeId) -> bool {
        self.past.dirty.may_differ(node)
    }

    /// Whether all entries of a directory are to be compared.
    pub fn is_searched(&self, dir: NodeId) -> bool {
        self.born(dir) || self.past.dirty.dirs.contains(&dir)
    }

    /// The directories whose entries are to be compared, but for newborn ones, in order.
    pub fn searched(&self) -> Vec<NodeId> {
        let mut dirs: Vec<NodeId> = self.past.dirty.dirs.iter().copied().collect();
        dirs.sort_unstable();
        dirs
    }

    /// The files that may differ, in order.
    pub fn files(&self) -> Vec<NodeId> {
        let mut files: Vec<NodeId> = self.past.dirty.files.iter().copied().collect();
        files.sort_unstable();
        files
    }

    /// Whether it is known how a replica knows every directory that may have moved.
    pub fn covers(&self, replica: u64) -> bool {
        let known: HashSet<NodeId> = self.moved_on(replica).map(|dir| dir.node).collect();
        self.past.dirty.moved.iter().all(|node| known.contains(node))
    }

    fn moved_on(&self, replica: u64) -> impl Iterator<Item = &MovedDir> {
        self.past.moved.iter().filter(move |dir| dir.replica == replica)
    }

    /// The directories that may have moved.
    pub fn moved(&self) -> &HashSet<NodeId> {
        &self.past.dirty.moved
    }
}

/// The directory that a moved one was found in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seat {
    /// One that the catalog knows.
    Known(NodeId),
    /// One that it does not.
    Unknown,
}

/// Where a directory that may have moved lies on a backing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Which directory it lies in.
    pub seat: Seat,
    /// That directory's path.
    pub above: RelPath,
    /// Its name there.
    pub name: EntryName,
}

impl Found {
    /// Its path.
    pub fn path(&self) -> RelPath {
        self.above.join(&self.name)
    }
}

/// Where on a backing the directories of the bounds lie.
#[derive(Debug, Default)]
pub struct Survey {
    /// Directories whose entries are to be compared, those above others before them.
    pub dirs: Vec<(RelPath, NodeId)>,
    /// Directories that may have moved and are still there.
    pub moved: HashMap<NodeId, Found>,
}

/// The path that the catalog has for a directory; `None` if it has none.
pub fn path_in(catalog: &Catalog, dir: NodeId) -> Result<Option<RelPath>> {
    Survey::default().locate(catalog, &HashSet::new(), dir)
}

impl Survey {
    /// Looks through a backing. `replica` tells which one it is.
    pub fn new(site: &Site, replica: u64, catalog: &Catalog, bounds: &Bounds) -> Result<Survey> {
        let moved: HashMap<u64, &MovedDir> =
            bounds.moved_on(replica).map(|dir| (dir.ino, dir)).collect();
        let mut survey = Survey::default();
        let mut waiting: Vec<NodeId> = bounds.past.dirty.dirs.iter().copied().collect();
        // One is found by looking through another, so again until nothing more is found.
        loop {
            let mut rest = Vec::new();
            let before = waiting.len();
            for dir in waiting {
                match survey.locate(catalog, bounds.moved(), dir)? {
                    Some(path) => {
                        if !moved.is_empty() {
                            survey.search(site, catalog, bounds, &moved, (&path, Some(dir)))?;
                        }
                        survey.dirs.push((path, dir));
                    }
                    None => rest.push(dir),
                }
            }
            waiting = rest;
            if waiting.len() == before {
                break;
            }
        }
        // A moved one may have been found after one below it was placed: all are placed again.
        let dirs = std::mem::take(&mut survey.dirs);
        for (_, dir) in dirs {
            if let Some(path) = survey.locate(catalog, bounds.moved(), dir)?
                && survey.is_dir(site, &path)?
            {
                survey.dirs.push((path, dir));
            }
        }
        survey.dirs.sort_by(|a, b| a.0.names().len().cmp(&b.0.names().len()).then(a.1.cmp(&b.1)));
        Ok(survey)
    }

    /// Directories that may have moved and were not recognised. They are gone, or a backing shows
    /// them by other inode numbers than before: what has the name of one may be another, with
    /// anything in it.
    pub fn strays(&self, bounds: &Bounds) -> HashSet<NodeId> {
        let unknown = |node: &&NodeId| !self.moved.contains_key(*node);
        bounds.moved().iter().filter(unknown).copied().collect()
    }

    fn is_dir(&self, site: &Site, path: &RelPath) -> Result<bool> {
        match site.backing.open_dir(path) {
            Ok(_) => Ok(true),
            Err(error) if is_no_dir(&error) => Ok(false),
            Err(error) => Err(error).context("open the directory", site.at(path)),
        }
    }

    /// Where a directory lies; `None` if that is not known, or it has no name.
    pub fn locate(
        &self,
        catalog: &Catalog,
        moved: &HashSet<NodeId>,
        dir: NodeId,
    ) -> Result<Option<RelPath>> {
        let mut names = Vec::new();
        let mut at = dir;
        let mut path = RelPath::root();
        while at != NodeId::ROOT {
            if moved.contains(&at) {
                let Some(found) = self.moved.get(&at) else { return Ok(None) };
                path = found.path();
                break;
            }
            let Some((parent, name)) = catalog.names(at)?.into_iter().next() else {
                return Ok(None);
            };
            names.push(name);
            at = parent;
            if names.len() > DEPTH_MAX {
                return Ok(None);
            }
        }
        names.iter().rev().for_each(|name| path = path.join(name));
        Ok(Some(path))
    }

    /// Looks for moved directories in one directory and in those born below it.
    fn search(
        &mut self,
        site: &Site,
        catalog: &Catalog,
        bounds: &Bounds,
        moved: &HashMap<u64, &MovedDir>,
        (path, dir): (&RelPath, Option<NodeId>),
    ) -> Result<()> {
        let mut waiting = vec![(path.clone(), dir)];
        while let Some((path, dir)) = waiting.pop() {
            let handle = match site.backing.open_dir(&path) {
                Err(error) if is_no_dir(&error) => continue,
                other => other.context("open the directory", site.at(&path))?,
            };
            for entry in site.live_entries(&handle, &path)? {
                if entry.kind != Kind::Dir {
                    continue;
                }
                let known = match dir {
                    Some(dir) => catalog.lookup(dir, &entry.name)?.map(|(node, _)| node),
                    None => None,
                };
                if let Some(own) = moved.get(&entry.ino) {
                    let stat = site.backing.stat_at(&handle, &entry.name);
                    let stat = stat.context("look at", site.at(&path.join(&entry.name)))?;
                    if stat.btime.as_nanos() == own.birth {
                        let seat = dir.map_or(Seat::Unknown, Seat::Known);
                        let (above, name) = (path.clone(), entry.name);
                        self.moved.insert(own.node, Found { seat, above, name });
                        continue;
                    }
                }
                let known = known.filter(|node| !bounds.moved().contains(node));
                if known.is_none_or(|node| bounds.born(node)) {
                    waiting.push((path.join(&entry.name), known));
                }
            }
        }
        Ok(())
    }
}

fn is_no_dir(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

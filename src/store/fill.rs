//! Filling: making the live tree and history of one backing equal to another's.
//!
//! Used for new replicas, for those that lag, and after an unclean end. Objects are compared by
//! their attributes; what is equal stays. A file is written under a scratch name, whole, and then
//! renamed into place, so a fill that is killed leaves only whole files and goes on from there.
//! **Nothing is deleted**: what the target has and the source has not, and what gets replaced, is
//! moved to `.rearview/quarantine/<UTC time>/` under its own path.
//!
//! Durable when it returns; no single file is synced before.
//!
//! Not done here: markers and locks, which tell that the target is no whole copy meanwhile.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::error::{Error, IoContext, Result};
use crate::progress::Progress;
use crate::replica::backing::{Handle, Stat};
use crate::store::copy::{Copier, blame};
use crate::store::import::count_words;
use crate::store::quarantine::Quarantine;
use crate::store::site::{Object, Site, is_other_mount, own_creds};
use crate::types::{EntryName, Kind, NodeId, RelPath, Timestamp};

use bounded::Within;

mod bounded;
mod estimate;
pub(crate) mod history;

pub use bounded::fill_within;
pub use estimate::quick_equal;

/// What a fill did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FillReport {
    /// Objects made.
    pub made: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Objects whose attributes alone were set.
    pub adjusted: u64,
    /// Objects moved to quarantine.
    pub quarantined: u64,
    /// The quarantine's directory, if anything is in it.
    pub quarantine: Option<PathBuf>,
}

impl FillReport {
    /// Whether no object was touched.
    pub fn is_nothing(&self) -> bool {
        self.made + self.adjusted + self.quarantined == 0
    }
}

impl fmt::Display for FillReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quarantined = match &self.quarantine {
            Some(place) => format!("moved to {}", place.display()),
            None => "moved to quarantine".into(),
        };
        let counts = [
            (self.made, format!("copied ({})", human_bytes(self.bytes))),
            (self.adjusted, "adjusted".into()),
            (self.quarantined, quarantined),
        ];
        let counts = counts.each_ref().map(|(count, words)| (*count, words.as_str()));
        f.write_str(&count_words(&counts))
    }
}

/// Makes `target` equal to `source`: the live tree and the history, but not the catalog.
///
/// `changed_since`: a file that was changed on either side after this moment is compared byte by
/// byte, because equal size and times prove nothing for what was being written when the system went
/// down.
///
/// `begin` is called before the first change of the target: not if it has not enough space.
pub fn fill(
    source: &Site,
    target: &Site,
    changed_since: Option<Timestamp>,
    begin: &mut dyn FnMut() -> Result<()>,
    progress: &Progress,
) -> Result<FillReport> {
    let estimate = estimate::estimate(source, target, progress)?;
    let space = target.backing.space().context("ask for the space of", &target.path)?;
    let available = space.available.saturating_mul(space.block_bytes);
    if estimate.bytes > available {
        return Err(Error::Refused(format!(
            "{} has not enough space: {} needed for the copy of {}, {} available: free some, or \
             give a larger disk",
            target.path.display(),
            human_bytes(estimate.bytes),
            source.path.display(),
            human_bytes(available)
        )));
    }
    begin()?;
    let phase = format!("Filling {}", target.path.display());
    progress.begin(&phase, estimate.items, estimate.bytes);
    let result = Fill::new(source, target, changed_since, progress).and_then(Fill::run);
    progress.end();
    result
}

/// Bytes as people read them.
fn human_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", units[unit]),
    }
}

/// Labels that the host's security policy gives by itself: neither compared nor copied.
const HOST_LABELS: [&[u8]; 3] = [b"security.selinux", b"security.ima", b"security.evm"];

/// The attributes that are copied, without the host's own labels.
pub fn kept_xattrs(object: &Object) -> BTreeMap<&[u8], &[u8]> {
    let kept = object.xattrs.0.iter().filter(|(name, _)| !HOST_LABELS.contains(&name.as_slice()));
    kept.map(|(name, value)| (name.as_slice(), value.as_slice())).collect()
}

/// Whether two objects have the same bytes by all that can be known without reading them.
pub fn same_content(a: &Object, b: &Object) -> bool {
    a.stat.kind == b.stat.kind
        && a.stat.rdev == b.stat.rdev
        && a.target == b.target
        && (a.stat.kind != Kind::File
            || a.stat.size == b.stat.size && (a.stat.size == 0 || a.stat.mtime == b.stat.mtime))
}

/// Whether two objects have the same attributes.
pub fn same_attributes(a: &Object, b: &Object) -> bool {
    let mode = |object: &Object| match object.stat.kind {
        Kind::Symlink => 0,
        _ => object.stat.mode,
    };
    (mode(a), a.stat.uid, a.stat.gid, a.stat.mtime)
        == (mode(b), b.stat.uid, b.stat.gid, b.stat.mtime)
        && kept_xattrs(a) == kept_xattrs(b)
}

enum Step {
    Enter(RelPath),
    /// All below the directory is done: its attributes can be set for good.
    Leave(RelPath),
}

struct Fill<'a> {
    source: &'a Site,
    target: &'a Site,
    changed_since: Option<Timestamp>,
    progress: &'a Progress,
    copier: Copier<'a>,
    quarantine: Quarantine<'a>,
    /// For each hard-linked object of the source, its inode number there, the first name it got.
    linked: HashMap<u64, RelPath>,
    /// Inode numbers of the target's hard-linked objects that are taken for one of the source's.
    taken: HashSet<u64>,
    /// Where only a part may differ.
    within: Option<Within<'a>>,
    report: FillReport,
}

impl<'a> Fill<'a> {
    fn new(
        source: &'a Site,
        target: &'a Site,
        changed_since: Option<Timestamp>,
        progress: &'a Progress,
    ) -> Result<Fill<'a>> {
        Ok(Fill {
            source,
            target,
            changed_since,
            progress,
            copier: Copier::new(source, target, progress)?,
            quarantine: Quarantine::new(target),
            linked: HashMap::new(),
            taken: HashSet::new(),
            within: None,
            report: FillReport::default(),
        })
    }

    fn run(mut self) -> Result<FillReport> {
        let mut steps = vec![Step::Enter(RelPath::root())];
        while let Some(step) = steps.pop() {
            match step {
                Step::Enter(path) => {
                    steps.push(Step::Leave(path.clone()));
                    for name in self.fill_dir(&path)? {
                        steps.push(Step::Enter(path.join(&name)));
                    }
                }
                Step::Leave(path) => self.finish_dir(&path)?,
            }
        }
        self.finish()
    }

    /// The history, and all of it durable.
    fn finish(mut self) -> Result<FillReport> {
        let catalog = match self.source.open_catalog() {
            Err(error) if error.to_errno() == Errno::TIMEDOUT => return Err(error),
            // One that cannot be asked (it is of an older version) has forgotten nothing yet.
            opened => opened.ok(),
        };
        let mut seen = history::Seen::new();
        let mut history = history::History {
            source: self.source,
            target: self.target,
            catalog: catalog.as_ref(),
            changing: false,
            doubt: match &self.within {
                Some(within) => history::Doubt::Within(within.bounds),
                None => history::Doubt::All,
            },
            sealed_before: 0,
            seen: &mut seen,
        };
        history.fill(&mut self.copier, &mut self.quarantine)?;
        self.target.backing.sync_all().context("make durable", &self.target.path)?;
        self.report.bytes = self.copier.bytes_written();
        self.report.quarantined = self.quarantine.count();
        self.report.quarantine = self.quarantine.place();
        if let Some(place) = &self.report.quarantine {
            log::warn!(
                "{}: {} files or folders that differed were moved to {}",
                self.target.path.display(),
                self.report.quarantined,
                place.display()
            );
        }
        Ok(self.report)
    }

    /// Makes the entries of one directory equal; returns the sub-directories to be gone into.
    fn fill_dir(&mut self, path: &RelPath) -> Result<Vec<EntryName>> {
        let nodes = self.nodes_in(path)?;
        let from = self.source.dir(path)?;
        let to = self.target.dir(path)?;
        let wanted = self.source.live_entries(&from, path)?;
        let present = self.target.live_entries(&to, path)?;
        for entry in present {
            if wanted.binary_search_by(|other| other.name.cmp(&entry.name)).is_err() {
                self.quarantine.take(&to, path, &entry.name)?;
            }
        }
        let mut dirs = Vec::new();
        let source = self.source;
        for (object, entry) in source.objects(&from, path, &wanted).zip(&wanted) {
            let object = match object {
                // Nothing of another mount belongs to the tree.
                Err(Error::Io { source, .. }) if is_other_mount(&source) => continue,
                other => other?,
            };
            let Some(object) = object else { continue };
            let node = nodes.get(&entry.name).copied();
            if object.stat.kind == Kind::Dir {
                if self.is_mount(path, &entry.name) {
                    continue;
                }
                let made = self.make_dir(&to, path, &entry.name, node)?;
                if made || self.goes_into(node) {
                    dirs.push(entry.name.clone());
                }
            } else {
                self.fill_entry((&from, &to), path, &entry.name, &object, node)?;
            }
            self.progress.advance(1, 0)?;
        }
        Ok(dirs)
    }

    fn is_mount(&self, dir: &RelPath, name: &EntryName) -> bool {
        let opened = self.source.backing.open_dir(&dir.join(name));
        opened.is_err_and(|error| is_other_mount(&error))
    }

    /// Makes sure that there is a directory; `true` if it had to be made.
    fn make_dir(
        &mut self,
        to: &Handle,
        dir: &RelPath,
        name: &EntryName,
        node: Option<NodeId>,
    ) -> Result<bool> {
        if self.take_from_aside(to, dir, name, node)? {
            return Ok(false);
        }
        let path = self.target.at(&dir.join(name));
        match self.target.backing.stat_at(to, name) {
            Ok(stat) if stat.kind == Kind::Dir => return Ok(false),
            Ok(_) => self.quarantine.take(to, dir, name)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("look at", path),
        }
        self.report.made += 1;
        // Closed to others until its final rights are set.
        self.target
            .backing
            .mkdir(to, name, 0o700, own_creds())
            .map_err(|error| blame(self.target, "make the directory", &dir.join(name), error))?;
        Ok(true)
    }

    fn fill_entry(
        &mut self,
        (from, to): (&Handle, &Handle),
        dir: &RelPath,
        name: &EntryName,
        object: &Object,
        node: Option<NodeId>,
    ) -> Result<()> {
        let path = dir.join(name);
        let present = self.target.object(to, dir, name)?;
        let is_linked = object.stat.nlink > 1;
        if is_linked && !self.linked.contains_key(&object.stat.ino) {
            self.linked.extend(self.name_elsewhere(node)?.map(|path| (object.stat.ino, path)));
        }
        if let Some(first) = self.linked.get(&object.stat.ino).filter(|_| is_linked).cloned() {
            return self.fill_link(to, dir, name, &first, present);
        }
        if is_linked {
            self.linked.insert(object.stat.ino, path.clone());
        }
        if let Some(present) = &present {
            // An object of the target stands for one object of the source only.
            let free = present.stat.nlink <= 1 || self.taken.insert(present.stat.ino);
            if free && same_content(object, present) {
                let equal = !self.is_suspect(&object.stat, &present.stat, node)
                    || self.copier.same_bytes((from, name), (to, name), dir)?;
                if equal {
                    return self.adjust(to, &path, name, object, present);
                }
            }
        }
        let made = self.copier.make(from, dir, name, object)?;
        if present.is_some() {
            self.quarantine.take(to, dir, name)?;
        }
        self.copier.place(&made, to, &path, name)?;
        if is_linked {
            let stat = self.target.backing.stat_at(to, name);
            self.taken.insert(stat.context("look at", self.target.at(&path))?.ino);
        }
        self.report.made += 1;
        Ok(())
    }

    /// Whether equal attributes do not prove equal bytes.
    fn is_suspect(&self, a: &Stat, b: &Stat, node: Option<NodeId>) -> bool {
        if let Some(within) = &self.within {
            let differs = node.is_none_or(|node| within.bounds.may_differ(node));
            return a.kind == Kind::File && a.size > 0 && differs;
        }
        a.kind == Kind::File
            && a.size > 0
            && self.changed_since.is_some_and(|since| a.ctime >= since || b.ctime >= since)
    }

    /// Gives an object of the target one more name.
    fn fill_link(
        &mut self,
        to: &Handle,
        dir: &RelPath,
        name: &EntryName,
        first: &RelPath,
        present: Option<Object>,
    ) -> Result<()> {
        let Some((first_dir, first_name)) = first.split_last() else {
            unreachable!("the root has no hard links")
        };
        let first_handle = self.target.dir(&first_dir)?;
        let first_stat = self
            .target
            .backing
            .stat_at(&first_handle, first_name)
            .context("look at", self.target.at(first))?;
        if let Some(present) = present {
            if present.stat.ino == first_stat.ino {
                return Ok(());
            }
            self.quarantine.take(to, dir, name)?;
        }
        self.report.made += 1;
        self.target
            .backing
            .link(&first_handle, first_name, to, name)
            .map_err(|error| blame(self.target, "link", &dir.join(name), error))
    }

    /// Sets the attributes of an object that has the right content.
    fn adjust(
        &mut self,
        to: &Handle,
        path: &RelPath,
        name: &EntryName,
        object: &Object,
        present: &Object,
    ) -> Result<()> {
        if same_attributes(object, present) {
            return Ok(());
        }
        self.report.adjusted += 1;
        let node = self.target.backing.open_node(to, name);
        let node = node.context("open", self.target.at(path))?;
        self.copier.set_attributes(&node, path, object)
    }

    fn finish_dir(&mut self, path: &RelPath) -> Result<()> {
        let from = self.source.dir(path)?;
        let to = self.target.dir(path)?;
        let object = self.source.object_of(&from, path)?;
        let present = self.target.object_of(&to, path)?;
        if same_attributes(&object, &present) {
            return Ok(());
        }
        self.copier.set_attributes(&to, path, &object)
    }
}

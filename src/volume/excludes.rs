//! What is excluded from history, and what that means for the operations.
//!
//! An excluded file is mirrored like any other, but its states and its entry are unversioned in the
//! catalog, and what it contains while it is excluded has no content id: so nothing of it is
//! preserved when it is overwritten or removed. The content that it had when it was last versioned
//! is history, and is preserved whole before an unversioned state forgets it.
//!
//! **When a rule counts.** Rules are asked when an object is born, linked or renamed, and when a
//! new state of it is recorded; until then it stays as it is. So every entry that history shows has
//! a node that history shows, and both turn in one step.
//!
//! **Cost.** A store that never had a rule is asked nothing. Else the rules of a directory are kept
//! until a `.rearviewignore` is sealed, moved or removed, or a directory moves.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lru::LruCache;
use parking_lot::Mutex;

use crate::catalog::{Change, NodeRow};
use crate::error::{Error, Result};
use crate::excludes::{META_KEY, Patterns, RULES_BYTES_MAX, RULES_FILE, Scope, is_rules_file};
use crate::replica::backing::Access;
use crate::types::{ContentId, EntryName, Kind, NodeId};
use rustix::io::Errno;

use super::Volume;
use super::nodes::{Node, State};

/// Directories whose rules are kept.
const SCOPES_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// The rules of a volume.
pub(super) struct Excludes {
    /// Those of `--exclude`.
    given: Arc<Patterns>,
    /// Whether the store ever had a rule.
    any: AtomicBool,
    scopes: Mutex<Scopes>,
}

struct Scopes {
    /// Counts the times that all was forgotten: what was read before that is not kept.
    epoch: u64,
    kept: LruCache<NodeId, Arc<Scope>>,
}

impl Excludes {
    /// The rules `given` with the mount; `any`: the store has had rules before.
    pub fn new(given: Arc<Patterns>, any: bool) -> Excludes {
        let scopes = Scopes { epoch: 0, kept: LruCache::new(SCOPES_MAX) };
        Excludes { any: AtomicBool::new(any), given, scopes: Mutex::new(scopes) }
    }

    /// Whether there is anything to ask.
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    fn forget(&self) {
        let mut scopes = self.scopes.lock();
        scopes.epoch += 1;
        scopes.kept.clear();
    }
}

/// Whether a node has history from now on, with its names.
pub(super) struct Standing {
    pub versioned: bool,
    /// Parent, name, and whether that name is excluded. Empty where no rule is to be asked.
    names: Vec<(NodeId, EntryName, bool)>,
}

/// What a change of a node's names makes of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// It stays what it is.
    None,
    /// It gets a history.
    Show,
    /// Its history ends.
    Hide,
}

impl Volume {
    /// Notes that the store has rules, for good: later mounts look for them.
    pub(super) fn note_rules(&self) -> Result<()> {
        self.excludes.any.store(true, Ordering::Relaxed);
        if self.catalog().meta(META_KEY)?.is_none() {
            self.catalog().push(vec![Change::MetaPut { key: META_KEY, value: "yes".into() }])?;
        }
        Ok(())
    }

    /// To be called before the name of an object is made: is it a file with rules, these count.
    pub(super) fn meets_rules(&self, name: &EntryName) -> Result<()> {
        if is_rules_file(name) && !self.excludes.any() { self.note_rules() } else { Ok(()) }
    }

    /// To be called after a name changed its meaning, or its file's content was sealed.
    pub(super) fn rules_changed(&self, name: &EntryName) {
        if is_rules_file(name) {
            self.excludes.forget();
        }
    }

    /// To be called after a directory moved.
    pub(super) fn scopes_moved(&self) {
        if self.excludes.any() {
            self.excludes.forget();
        }
    }

    /// Whether rules exclude an entry.
    pub(super) fn is_excluded(
        &self,
        parent: NodeId,
        name: &EntryName,
        is_dir: bool,
    ) -> Result<bool> {
        if !self.excludes.any() {
            return Ok(false);
        }
        Ok(self.scope(parent)?.excludes(name, is_dir))
    }

    /// The rules of a directory. The caller does not hold `tree` for writing.
    fn scope(&self, dir: NodeId) -> Result<Arc<Scope>> {
        let mut below = Vec::new();
        let mut at = dir;
        let epoch = self.excludes.scopes.lock().epoch;
        let mut scope = loop {
            if let Some(kept) = self.excludes.scopes.lock().kept.get(&at) {
                break kept.clone();
            }
            if at == NodeId::ROOT {
                let own = self.own_rules(at);
                break self.keep(at, Scope::root(self.excludes.given.clone(), own), epoch);
            }
            let (parent, name) =
                self.nodes.place(self.catalog(), at)?.ok_or(Error::Posix(Errno::NOENT))?;
            below.push((at, name));
            if below.len() > super::nodes::DEPTH_MAX {
                return Err(Error::Posix(Errno::LOOP));
            }
            at = parent;
        };
        for (at, name) in below.into_iter().rev() {
            let own = match scope.excludes(&name, true) {
                true => None,
                false => self.own_rules(at),
            };
            scope = self.keep(at, scope.enter(&name, own), epoch);
        }
        Ok(scope)
    }

    fn keep(&self, dir: NodeId, scope: Arc<Scope>, epoch: u64) -> Arc<Scope> {
        let mut scopes = self.excludes.scopes.lock();
        if scopes.epoch == epoch {
            scopes.kept.put(dir, scope.clone());
        }
        scope
    }

    /// The rules that stand in a directory. Where they cannot be read there are none: rather too
    /// much is kept than too little.
    fn own_rules(&self, dir: NodeId) -> Option<Patterns> {
        let name = EntryName::new(RULES_FILE).expect("a valid name");
        match self.read_rules(dir, &name) {
            Ok(text) => {
                let (patterns, bad) = Patterns::of_file(&text?);
                for (line, why) in bad {
                    log::warn!(
                        "{}, line {line}: {why}; it is passed over",
                        self.told_in(dir, &name)
                    );
                }
                Some(patterns).filter(|patterns| !patterns.is_empty())
            }
            Err(error) => {
                let path = self.told_in(dir, &name);
                log::warn!("{path} cannot be read, so nothing is excluded by it: {error}");
                None
            }
        }
    }

    fn told_in(&self, dir: NodeId, name: &EntryName) -> String {
        self.path_of(dir).unwrap_or_default().join(name).to_string()
    }

    fn read_rules(&self, dir: NodeId, name: &EntryName) -> Result<Option<Vec<u8>>> {
        if !matches!(self.catalog().lookup(dir, name)?, Some((_, Kind::File))) {
            return Ok(None);
        }
        let handles = self.dir(dir)?;
        let text = self.replicas().read("read", |id, b| {
            let file = b.open_file(handles.get(id)?, name, Access::Read)?;
            let mut text = vec![0; RULES_BYTES_MAX.min(b.stat(&file)?.size as usize)];
            let got = b.read_at(&file, &mut text, 0)?;
            text.truncate(got);
            Ok(text)
        })?;
        Ok(Some(text))
    }

    /// What rules say of a node of `links` names. The caller holds its lock, so its names stay.
    pub(super) fn standing(&self, node: &Node, links: u32) -> Result<Standing> {
        let mut names = Vec::new();
        if self.excludes.any() {
            let is_dir = node.kind == Kind::Dir;
            let all = match is_dir || links <= 1 {
                true => node.place(self.catalog())?.into_iter().collect(),
                false => self.catalog().names(node.id)?,
            };
            for (parent, name) in all {
                let excluded = self.is_excluded(parent, &name, is_dir)?;
                names.push((parent, name, excluded));
            }
        }
        let versioned = names.is_empty() || names.iter().any(|(.., excluded)| !excluded);
        Ok(Standing { versioned, names })
    }

    /// Adds a node's new state to `changes`, and what its names become by it.
    pub(super) fn put(
        &self,
        standing: &Standing,
        row: NodeRow,
        changes: &mut Vec<Change>,
    ) -> Result<()> {
        let node = row.id;
        changes.push(match standing.versioned {
            true => Change::NodePut(row),
            false => Change::NodeUnversioned(row),
        });
        for (parent, name, excluded) in &standing.names {
            let shown = self.catalog().entry_is_versioned(*parent, name)?;
            if shown.is_none_or(|shown| shown != *excluded) {
                continue;
            }
            changes.push(Change::EntryRemove { parent: *parent, name: name.clone() });
            changes.push(entry(*parent, name, node, *excluded));
            if !excluded && !self.catalog().is_versioned(*parent)? {
                // It was excluded when it was made, and must show this now.
                self.mark_dir(*parent);
            }
        }
        Ok(())
    }

    /// The content of a node's state: `known`, or a new one where that was not taken down while the
    /// file was excluded.
    pub(super) fn content_shown(
        &self,
        versioned: bool,
        row: &NodeRow,
        known: ContentId,
        changes: &mut Vec<Change>,
    ) -> ContentId {
        if !versioned || row.kind != Kind::File || row.size == 0 || known != ContentId::EMPTY {
            return known;
        }
        let id = self.catalog().next_content();
        changes.push(Change::ContentAdd { id, node: row.id, size: row.size });
        self.want_digest(row.id);
        id
    }

    /// What becomes of a node that loses the name `lost` and gets `won`, which is excluded or not.
    /// If it is to be shown, it is sealed first. The caller holds its lock.
    pub(super) fn turn(
        &self,
        node: &Arc<Node>,
        state: &mut State,
        lost: Option<(NodeId, &EntryName)>,
        won: Option<bool>,
    ) -> Result<Turn> {
        if !self.excludes.any() {
            return Ok(Turn::None);
        }
        let was = self.catalog().is_versioned(node.id)?;
        let mut versioned = won == Some(false);
        for (parent, name) in self.catalog().names(node.id)? {
            versioned |= lost != Some((parent, &name))
                && self.catalog().entry_is_versioned(parent, &name)? == Some(true);
        }
        Ok(match (was, versioned) {
            (false, true) => {
                self.seal(node, state)?;
                Turn::Show
            }
            (true, false) => Turn::Hide,
            _ => Turn::None,
        })
    }

    /// Adds to `changes` what [`Volume::turn`] found.
    pub(super) fn take_turn(
        &self,
        turn: Turn,
        node: &Node,
        state: &mut State,
        changes: &mut Vec<Change>,
    ) -> Result<()> {
        if turn == Turn::None {
            return Ok(());
        }
        let mut row = match state.open.as_ref() {
            Some(open) => open.sealed.clone(),
            None => self.catalog().node(node.id)?.ok_or(Error::Posix(Errno::STALE))?,
        };
        if turn == Turn::Hide {
            changes.push(Change::NodeUnversioned(row));
            return Ok(());
        }
        row.content = self.content_shown(true, &row, row.content, changes);
        if let Some(open) = state.open.as_mut() {
            open.sealed = row.clone();
        }
        changes.push(Change::NodePut(row));
        Ok(())
    }
}

/// A new entry, which is excluded or not.
pub(super) fn entry(parent: NodeId, name: &EntryName, node: NodeId, excluded: bool) -> Change {
    let name = name.clone();
    match excluded {
        true => Change::EntryUnversioned { parent, name, node },
        false => Change::EntryAdd { parent, name, node },
    }
}

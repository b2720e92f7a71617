//! What is excluded from history: new names are taken as the rules say that stand in the tree and
//! were given with the mount, renamed ones likewise. What kept its name stays what it is.

use std::sync::Arc;

use super::{Import, Pending, content_differs, row_of};
use crate::catalog::{Change, NodeRow};
use crate::error::Result;
use crate::excludes::{META_KEY, Patterns, RULES_BYTES_MAX, Scope, is_rules_file};
use crate::replica::backing::{Access, DirEntry, Handle, Stat};
use crate::types::{ContentId, EntryName, Kind, NodeId, XattrSetId};

impl Import<'_> {
    /// The rules of a directory with these entries. `dir` has those of the directory above.
    pub(super) fn scope_of(
        &mut self,
        dir: &Pending,
        handle: &Handle,
        entries: &[DirEntry],
    ) -> Arc<Scope> {
        let rules = entries.iter().find(|entry| is_rules_file(&entry.name));
        let own = rules.and_then(|entry| self.own_rules(dir, handle, &entry.name));
        match dir.path.split_last() {
            None => Scope::root(self.exclude.clone(), own),
            Some((_, name)) => dir.scope.enter(name, own),
        }
    }

    fn own_rules(&mut self, dir: &Pending, handle: &Handle, name: &EntryName) -> Option<Patterns> {
        if !self.any_rules {
            self.any_rules = true;
            self.changes.push(Change::MetaPut { key: META_KEY, value: "yes".into() });
        }
        let shown = self.site.at(&dir.path.join(name));
        let read = || {
            let backing = &self.site.backing;
            let stat = backing.stat_at(handle, name)?;
            if stat.kind != Kind::File {
                return Ok(Vec::new());
            }
            let file = backing.open_file(handle, name, Access::Read)?;
            let mut text = vec![0; RULES_BYTES_MAX.min(stat.size as usize)];
            let got = backing.read_at(&file, &mut text, 0)?;
            text.truncate(got);
            Ok::<_, std::io::Error>(text)
        };
        match read() {
            Ok(text) => {
                let (patterns, bad) = Patterns::of_file(&text);
                for (line, why) in bad {
                    let shown = shown.display();
                    log::warn!("{shown}, line {line}: {why}; it is passed over");
                }
                Some(patterns).filter(|patterns| !patterns.is_empty())
            }
            Err(error) => {
                let shown = shown.display();
                log::warn!("{shown} cannot be read, so nothing is excluded by it: {error}");
                None
            }
        }
    }

    /// Records another name of a node.
    pub(super) fn add_link(
        &mut self,
        parent: NodeId,
        name: EntryName,
        node: NodeId,
        excluded: bool,
    ) -> Result<()> {
        if self.any_rules && !excluded {
            self.push()?;
            if !self.catalog.is_versioned(node)?
                && let Some(mut row) = self.catalog.node(node)?
            {
                if row.kind == Kind::File && row.content == ContentId::EMPTY {
                    row.content = self.seal(node, row.size);
                }
                self.changes.push(Change::NodePut(row));
            }
        }
        self.add_entry(parent, name, node, excluded);
        Ok(())
    }

    /// Ends the history of a node that lost its last name with one. `self.changes` has that.
    pub(super) fn hide_unnamed(
        &mut self,
        parent: NodeId,
        name: &EntryName,
        node: NodeId,
    ) -> Result<()> {
        if !self.any_rules || !self.catalog.is_versioned(node)? {
            return Ok(());
        }
        for (other, own) in self.catalog.names(node)? {
            if (other, &own) != (parent, name)
                && self.catalog.entry_is_versioned(other, &own)? == Some(true)
            {
                return Ok(());
            }
        }
        self.changes.extend(self.catalog.node(node)?.map(Change::NodeUnversioned));
        Ok(())
    }

    /// Records a node's present state if the catalog has another, with a history or without.
    pub(super) fn refresh_with(
        &mut self,
        row: &NodeRow,
        stat: &Stat,
        xattrs: XattrSetId,
        versioned: bool,
    ) -> Result<()> {
        let is_file = row.kind == Kind::File;
        let written = is_file && (content_differs(row, stat) || self.is_overwritten(row)?);
        let bare = is_file && row.content == ContentId::EMPTY;
        // What an excluded file contains has no content of its own.
        let sealed = match versioned {
            true => written || bare && stat.size > 0,
            false => written && !bare,
        };
        let same = !written
            && !sealed
            && row.xattrs == xattrs
            && row.mtime == stat.mtime
            && (row.mode, row.uid, row.gid, row.rdev) == (stat.mode, stat.uid, stat.gid, stat.rdev)
            && (!self.any_rules || self.catalog.is_versioned(row.id)? == versioned);
        if same {
            return Ok(());
        }
        let content = match sealed {
            true => self.seal(row.id, stat.size),
            false => row.content,
        };
        let row = row_of(row.id, stat, xattrs, content);
        self.changes.push(match versioned {
            true => Change::NodePut(row),
            false => Change::NodeUnversioned(row),
        });
        self.report.changed += 1;
        Ok(())
    }

    /// Whether a node has a history.
    pub(super) fn is_versioned(&self, node: NodeId) -> Result<bool> {
        Ok(!self.any_rules || self.catalog.is_versioned(node)?)
    }
}

//! One replica's live tree against its catalog.

use std::collections::HashMap;

use super::{CheckOptions, CheckReport, Common, differs, has_digest};
use crate::catalog::Catalog;
use crate::error::Result;
use crate::progress::Progress;
use crate::replica::backing::{Access, Handle};
use crate::store::record::Record;
use crate::store::site::{Object, Site, is_other_mount};
use crate::types::{EntryName, Kind, NodeId, RelPath};

/// Checks every live object.
pub(super) fn check(
    site: &Site,
    catalog: &Catalog,
    options: CheckOptions,
    common: &mut Common,
    report: &mut CheckReport,
    progress: &Progress,
) -> Result<()> {
    let phase = format!("Checking the live tree of {}", site.path.display());
    progress.begin(&phase, catalog.totals()?.live_nodes, 0);
    let (inodes, names) = (HashMap::new(), HashMap::new());
    let mut tree = Tree { site, catalog, options, common, report, progress, inodes, names };
    let result = tree.run();
    progress.end();
    result
}

struct Tree<'a> {
    site: &'a Site,
    catalog: &'a Catalog,
    options: CheckOptions,
    common: &'a mut Common,
    report: &'a mut CheckReport,
    progress: &'a Progress,
    /// Which inode each hard-linked node is.
    inodes: HashMap<NodeId, u64>,
    /// How many names each hard-linked node has: to be counted once, not once for each name.
    names: HashMap<NodeId, u32>,
}

impl Tree<'_> {
    fn run(&mut self) -> Result<()> {
        let root = RelPath::root();
        let handle = self.site.dir(&root)?;
        let object = self.site.object_of(&handle, &root)?;
        self.object(NodeId::ROOT, &root, &object)?;
        let mut dirs = vec![(NodeId::ROOT, root)];
        while let Some((node, path)) = dirs.pop() {
            self.dir(node, &path, &mut dirs)?;
        }
        Ok(())
    }

    fn dir(
        &mut self,
        node: NodeId,
        path: &RelPath,
        dirs: &mut Vec<(NodeId, RelPath)>,
    ) -> Result<()> {
        let handle = match self.site.backing.open_dir(path) {
            Ok(handle) => handle,
            Err(error) => {
                self.report.damage(self.site.at(path), format!("it cannot be opened: {error}"));
                return Ok(());
            }
        };
        let mut known: HashMap<EntryName, NodeId> =
            self.catalog.list(node)?.into_iter().map(|one| (one.name, one.node)).collect();
        for entry in self.site.live_entries(&handle, path)? {
            let child = path.join(&entry.name);
            let node = known.remove(&entry.name);
            let object = match self.site.object(&handle, path, &entry.name) {
                Ok(Some(object)) => object,
                Ok(None) => continue,
                Err(error) => {
                    let other = matches!(&error, crate::error::Error::Io { source, .. }
                        if is_other_mount(source));
                    if !other {
                        self.report.damage(self.site.at(&child), error.to_string());
                    }
                    continue;
                }
            };
            let Some(node) = node else {
                self.report.damage(self.site.at(&child), "the catalog does not know it");
                continue;
            };
            if self.object(node, &child, &object)? {
                match object.stat.kind {
                    Kind::Dir => dirs.push((node, child)),
                    Kind::File => self.content(node, &child, &handle, &entry.name)?,
                    _ => {}
                }
            }
            self.progress.advance(1, 0)?;
        }
        for name in known.keys() {
            self.report.damage(self.site.at(&path.join(name)), "it is missing");
        }
        Ok(())
    }

    /// Compares an object with its record; whether it is the recorded kind of object.
    fn object(&mut self, node: NodeId, path: &RelPath, object: &Object) -> Result<bool> {
        self.report.objects += 1;
        let Some(row) = self.catalog.node(node)? else {
            self.report.damage(self.site.at(path), format!("its node {node} is not known"));
            return Ok(false);
        };
        let names = match self.names.get(&node) {
            Some(known) => *known,
            None => self.catalog.names(node)?.len() as u32,
        };
        if names > 1 {
            self.names.insert(node, names);
        }
        let record = Record {
            xattrs: self.catalog.xattrs(row.xattrs)?.as_ref().clone(),
            target: self.catalog.symlink_target(node)?.unwrap_or_default(),
            names,
            row,
        };
        for aspect in record.differences(object) {
            self.report.damage(self.site.at(path), format!("{aspect:?} differs from the record"));
        }
        let stat = &object.stat;
        if stat.kind != Kind::Dir
            && stat.nlink > 1
            && *self.inodes.entry(node).or_insert(stat.ino) != stat.ino
        {
            self.report.damage(self.site.at(path), "it is not the same file as its other name");
        }
        Ok(record.row.kind == stat.kind)
    }

    fn content(
        &mut self,
        node: NodeId,
        path: &RelPath,
        dir: &Handle,
        name: &EntryName,
    ) -> Result<()> {
        if !self.options.read_data {
            return Ok(());
        }
        let shown = self.site.at(path);
        let read = (|| {
            let file = self.site.backing.open_file(dir, name, Access::Read)?;
            self.site.hash(&file)
        })();
        let (hash, bytes) = match read {
            Ok(read) => read,
            Err(error) => {
                self.report.damage(shown, format!("it cannot be read: {error}"));
                return Ok(());
            }
        };
        self.report.bytes += bytes;
        let content = self.catalog.node(node)?.map(|row| row.content).unwrap_or_default();
        if !has_digest(self.catalog, content, &hash)? {
            self.report.damage(&shown, "its bytes are not those that were recorded");
        } else if differs(&mut self.common.live, node, hash) {
            self.report.damage(&shown, "its bytes are not those of another replica");
        }
        self.progress.advance(0, bytes)
    }
}

//! A preserved file that has a live name as well, after an unclean end.
//!
//! A file is preserved by a link before something takes its name, and by a rename when its last
//! name goes. So there are two ways to find one with another name. Either we died between the link
//! and what takes the name: then the file is live as it was, and the link is dropped. Or a power
//! cut brought the link to the disk and not the end of another name before it, which btrfs does
//! when something is synced in between: then history needs the file, and the live name shows it by
//! mistake, or a state of its own from now on. Written to, it would change the past, so the
//! preserved file becomes one of its own.

use crate::catalog::Catalog;
use crate::error::Result;
use crate::replica::backing::{Access, Backing, Handle, RenameMode};
use crate::replica::copy::copy_all;
use crate::replica::{Handles, PrivateDir, ReplicaSet};
use crate::types::{ContentId, EntryName, NodeId};

use super::{OWN, remove_leftover};

/// Sees to a preserved file that has other names. `true` if it was only a link of the live file,
/// and is gone; never if it is `known` to be preserved.
pub(super) fn settle(
    replicas: &ReplicaSet,
    catalog: &Catalog,
    of: (NodeId, ContentId),
    known: bool,
    (dir, name): (&Handles, &EntryName),
) -> Result<bool> {
    let stat = replicas.read("stat", |id, b| b.stat_at(dir.get(id)?, name))?;
    if stat.nlink < 2 {
        return Ok(false);
    }
    if !known && is_live(replicas, catalog, of, stat.ino)? {
        remove_leftover(replicas, dir, name)?;
        return Ok(true);
    }
    let tmp = replicas.private(PrivateDir::Tmp)?;
    replicas.apply("separate", |id, b| separate(b, tmp.get(id)?, dir.get(id)?, name))?;
    log::info!("history: the preserved file {name} had a live name and is one of its own again");
    Ok(false)
}

/// Whether a preserved file that is not known to be one is only a link of the live file.
pub(super) fn is_only_link(
    replicas: &ReplicaSet,
    catalog: &Catalog,
    of: (NodeId, ContentId),
    (dir, name): (&Handles, &EntryName),
) -> Result<bool> {
    let stat = replicas.read("stat", |id, b| b.stat_at(dir.get(id)?, name))?;
    Ok(stat.nlink > 1 && is_live(replicas, catalog, of, stat.ino)?)
}

/// Whether every name that the node has, by the catalog, is one of this very file, and the content
/// is its newest one.
fn is_live(
    replicas: &ReplicaSet,
    catalog: &Catalog,
    (node, content): (NodeId, ContentId),
    ino: u64,
) -> Result<bool> {
    let row = catalog.node(node)?;
    // Ids grow: a greater one is of a seal that was not committed any more.
    if row.is_none_or(|row| row.content > content) {
        return Ok(false);
    }
    let names = catalog.names(node)?;
    for (parent, name) in &names {
        let Some(path) = catalog.path_at(catalog.generation(), *parent)? else { return Ok(false) };
        let found = replicas.read("stat", |_, b| b.stat_at(&b.open_dir(&path)?, name));
        if !found.is_ok_and(|stat| stat.ino == ino) {
            return Ok(false);
        }
    }
    Ok(!names.is_empty())
}

/// Puts a copy in the place of a file. If we die midway the next recovery does it again.
fn separate(b: &dyn Backing, tmp: &Handle, dir: &Handle, name: &EntryName) -> std::io::Result<()> {
    let from = b.open_file(dir, name, Access::Read)?;
    let size = b.stat(&from)?.size;
    let _ = b.unlink(tmp, name);
    let to = b.create(tmp, name, 0o600, OWN)?;
    if b.clone_file(&from, &to).is_err() {
        copy_all(b, (&from, 0), (&to, 0), size)?;
        b.truncate(&to, size)?;
    }
    // Before the rename the link is still there, after it the copy is, which is durable.
    b.sync(&to, false)?;
    b.rename(tmp, name, dir, name, RenameMode::Replace)
}

//! Keeping the recorded content of a file that was changed behind our back.
//!
//! Past contents lie in live files as long as these are not overwritten through the mount. Where a
//! file on the backing was changed otherwise, another replica may still have the recorded bytes:
//! they go into `preserved/` before that replica is made equal. Where none has, the user is told.

use std::io;

use super::Import;
use crate::catalog::{Change, NodeRow};
use crate::error::{Error, IoContext, Result};
use crate::history::{preserved_dir, preserved_name};
use crate::replica::PrivateDir;
use crate::replica::backing::RenameMode;
use crate::store::copy::Copier;
use crate::store::site::{Object, Site, own_creds, own_name, private};
use crate::types::{ContentId, EntryName, Kind, RelPath};

impl Import<'_> {
    /// Preserves the recorded content of the file under this name, which is no longer the live
    /// one, from another replica. `false` if nobody has it.
    pub(super) fn rescue(
        &mut self,
        row: &NodeRow,
        dir: &RelPath,
        name: &EntryName,
    ) -> Result<bool> {
        for peer in self.peers {
            let Some(object) = unchanged(peer, row, dir, name) else { continue };
            match preserve(self, peer, (dir, name, &object), row) {
                Ok(()) => {
                    // In place and durable before the catalog says so.
                    self.changes.push(Change::ContentPreserved { id: row.content, cloned: false });
                    log::info!(
                        "{}: changed outside the mount; its recorded content was kept from {}",
                        self.site.at(&dir.join(name)).display(),
                        peer.path.display()
                    );
                    return Ok(true);
                }
                Err(Error::Interrupted) => return Err(Error::Interrupted),
                Err(error) => log::warn!("{error}"),
            }
        }
        Ok(false)
    }

    /// To be called before a changed file gets a new content: keeps the recorded one if nothing of
    /// history covers it.
    pub(super) fn keep_recorded(
        &mut self,
        row: &NodeRow,
        dir: &RelPath,
        name: &EntryName,
        size: u64,
    ) -> Result<()> {
        if row.content == ContentId::EMPTY {
            return Ok(());
        }
        let sources = self.catalog.sources(row.id, row.content)?;
        if sources.is_preserved() || self.rescue(row, dir, name)? {
            return Ok(());
        }
        let shown = self.site.at(&dir.join(name));
        let shown = shown.display();
        // What the last mount appended without recording it looks the same, and harms nothing.
        if size > row.size {
            log::info!("{shown} grew since it was recorded; older versions show its first bytes");
        } else {
            log::warn!(
                "{shown} was changed outside the mount: its older versions may show the changed \
                 bytes"
            );
        }
        Ok(())
    }
}

/// The file under this name, if it is the recorded one.
fn unchanged(peer: &Site, row: &NodeRow, dir: &RelPath, name: &EntryName) -> Option<Object> {
    let handle = peer.backing.open_dir(dir).ok()?;
    let object = peer.object(&handle, dir, name).ok()??;
    let stat = &object.stat;
    let same = stat.kind == Kind::File && (stat.size, stat.mtime) == (row.size, row.mtime);
    same.then_some(object)
}

fn preserve(
    import: &Import<'_>,
    peer: &Site,
    (dir, name, object): (&RelPath, &EntryName, &Object),
    row: &NodeRow,
) -> Result<()> {
    let site = import.site;
    let PrivateDir::Preserved(shard) = preserved_dir(row.id) else {
        unreachable!("preserved contents lie in shards")
    };
    let (above, shard) = (site.dir(&private("preserved"))?, format!("{shard:02x}"));
    let shard_path = site.private_path("preserved").join(&shard);
    match site.backing.mkdir(&above, &own_name(&shard), 0o700, own_creds()) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(error).context("make the directory", shard_path);
        }
        _ => site.backing.sync(&above, false).context("sync the directory above", &shard_path)?,
    }
    let shard = site.dir(&private(&format!("preserved/{shard}")))?;
    let scratch = site.dir(&private("tmp"))?;
    let from = peer.dir(dir)?;
    let made = Copier::new(peer, site, import.progress)?.make(&from, dir, name, object)?;
    let kept = preserved_name(row.id, row.content);
    let backing = &site.backing;
    let node = backing.open_node(&scratch, &made).context("open the copy of", peer.at(dir))?;
    backing
        .sync(&node, false)
        .and_then(|()| backing.rename(&scratch, &made, &shard, &kept, RenameMode::Replace))
        .and_then(|()| backing.sync(&shard, false))
        .context("keep a content in", shard_path)
}

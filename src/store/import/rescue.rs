//! Keeping the recorded content of a file that was changed behind our back.
//!
//! Past contents lie in live files as long as these are not overwritten through the mount. Where a
//! file on the backing was changed otherwise, another replica may still have the recorded bytes:
//! they go into `preserved/` before that replica is made equal. Where none has, the user is told.

use super::Import;
use crate::catalog::{Change, NodeRow};
use crate::error::{Error, Result};
use crate::store::regain::preserve;
use crate::store::site::{Object, Site};
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
            let (sites, of) = ((peer, self.site), (row.id, row.content));
            match preserve(sites, (dir, name, &object), of, self.progress) {
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

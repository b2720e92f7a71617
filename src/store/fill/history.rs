//! The history part of a fill: `preserved/`, `undo/` and `packs/`.
//!
//! The files there carry the same names and bytes on every replica. Preserved files and packs never
//! change once they have their name, so equal size means equal; undo segments grow and are
//! preallocated, so they are compared byte by byte.

use std::collections::BTreeMap;

use crate::error::{IoContext, Result};
use crate::store::copy::{Copier, blame};
use crate::store::quarantine::Quarantine;
use crate::store::site::{Site, own_creds, private};
use crate::types::{EntryName, Kind, RelPath};

const UNDO: &str = "undo";
const DIRS: [&str; 3] = ["preserved", UNDO, "packs"];

/// Makes the target's history files equal to the source's; what differs goes to quarantine.
pub fn fill(
    source: &Site,
    target: &Site,
    copier: &mut Copier<'_>,
    quarantine: &mut Quarantine<'_>,
) -> Result<()> {
    for (path, is_undo) in dirs(source)? {
        make_dir(target, &path)?;
        let from = source.dir(&path)?;
        let to = target.dir(&path)?;
        let present = files(target, &path)?;
        let wanted = files(source, &path)?;
        for name in present.keys().filter(|name| !wanted.contains_key(*name)) {
            quarantine.take(&to, &path, name)?;
        }
        for (name, size) in &wanted {
            let equal_size = present.get(name) == Some(size);
            if equal_size && (!is_undo || copier.same_bytes(&from, &to, &path, name)?) {
                continue;
            }
            let Some(object) = source.object(&from, &path, name)? else { continue };
            let made = copier.make(&from, &path, name, &object)?;
            if present.contains_key(name) {
                quarantine.take(&to, &path, name)?;
            }
            copier.place(&made, &to, &path.join(name), name)?;
        }
    }
    Ok(())
}

/// Bytes of history files, and of the catalog, that the target has to take.
pub fn missing_bytes(source: &Site, target: &Site) -> Result<u64> {
    let mut bytes = 0;
    for (path, _) in dirs(source)? {
        let present = match target.backing.open_dir(&path) {
            Ok(_) => files(target, &path)?,
            Err(_) => BTreeMap::new(),
        };
        for (name, size) in files(source, &path)? {
            if present.get(&name) != Some(&size) {
                bytes += size;
            }
        }
    }
    let catalog = files(source, &private(""))?;
    bytes += catalog
        .iter()
        .filter(|(name, _)| name.as_bytes().starts_with(b"catalog.db"))
        .map(|(_, size)| size)
        .sum::<u64>();
    Ok(bytes)
}

/// The source's history directories, two levels deep, and whether each is for undo segments.
fn dirs(source: &Site) -> Result<Vec<(RelPath, bool)>> {
    let mut found = Vec::new();
    for name in DIRS {
        let path = private(name);
        let is_undo = name == UNDO;
        found.push((path.clone(), is_undo));
        let dir = source.dir(&path)?;
        for entry in source.backing.list(&dir).context("list", source.at(&path))? {
            if entry.kind == Kind::Dir {
                found.push((path.join(&entry.name), is_undo));
            }
        }
    }
    Ok(found)
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

/// Names and sizes of what is no directory.
fn files(site: &Site, path: &RelPath) -> Result<BTreeMap<EntryName, u64>> {
    let dir = site.dir(path)?;
    let mut found = BTreeMap::new();
    for entry in site.backing.list(&dir).context("list", site.at(path))? {
        if entry.kind != Kind::Dir {
            let stat = site.backing.stat_at(&dir, &entry.name);
            let stat = stat.context("look at", site.at(&path.join(&entry.name)))?;
            found.insert(entry.name, stat.size);
        }
    }
    Ok(found)
}

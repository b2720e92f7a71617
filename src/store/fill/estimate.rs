//! What a fill will have to do, found by looking at attributes only.

use std::collections::HashSet;

use crate::error::{Error, IoContext, Result};
use crate::progress::Progress;
use crate::store::fill::{history, same_attributes, same_content};
use crate::store::site::{Site, is_other_mount};
use crate::types::{Kind, RelPath};

/// Totals of a fill.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Objects to look at.
    pub items: u64,
    /// Bytes to be allocated on the target.
    pub bytes: u64,
}

/// Estimates. What has to go to quarantine frees no space, so it is not counted.
pub fn estimate(source: &Site, target: &Site, progress: &Progress) -> Result<Estimate> {
    progress.begin(&format!("Comparing with {}", target.path.display()), 0, 0);
    let mut estimate = Estimate::default();
    let mut linked = HashSet::new();
    let mut dirs = vec![RelPath::root()];
    while let Some(path) = dirs.pop() {
        let Some(from) = open_own(source, &path)? else { continue };
        let to = target.backing.open_dir(&path).ok();
        let entries = source.live_entries(&from, &path)?;
        let mut there = to.as_ref().map(|to| target.stats(to, &entries));
        for (stat, entry) in source.stats(&from, &entries).zip(&entries) {
            let present = there.as_mut().and_then(|there| there.next()?.ok());
            let stat = match stat {
                Err(error) if is_other_mount(&error) => continue,
                other => other.context("look at", source.at(&path.join(&entry.name)))?,
            };
            estimate.items += 1;
            progress.advance(1, 0)?;
            match stat.kind {
                Kind::Dir => dirs.push(path.join(&entry.name)),
                Kind::File if stat.nlink <= 1 || linked.insert(stat.ino) => {
                    let kept = present.is_some_and(|present| {
                        (present.kind, present.size, present.mtime)
                            == (stat.kind, stat.size, stat.mtime)
                    });
                    if !kept {
                        estimate.bytes += stat.size.min(stat.blocks.saturating_mul(512));
                    }
                }
                _ => {}
            }
        }
    }
    estimate.bytes += history::missing_bytes(source, target)?;
    progress.end();
    Ok(estimate)
}

/// Whether two trees are equal by attributes; times of directories are left out.
pub fn quick_equal(a: &Site, b: &Site) -> Result<bool> {
    let mut dirs = vec![RelPath::root()];
    while let Some(path) = dirs.pop() {
        let (Some(a_dir), Some(b_dir)) = (open_own(a, &path)?, open_own(b, &path)?) else {
            return Ok(false);
        };
        let (a_entries, b_entries) =
            (a.live_entries(&a_dir, &path)?, b.live_entries(&b_dir, &path)?);
        if a_entries.len() != b_entries.len() {
            return Ok(false);
        }
        for (one, other) in a_entries.iter().zip(&b_entries) {
            if one.name != other.name {
                return Ok(false);
            }
            let found = (a.object(&a_dir, &path, &one.name)?, b.object(&b_dir, &path, &one.name)?);
            let (Some(one_object), Some(mut other_object)) = found else { return Ok(false) };
            if one_object.stat.kind == Kind::Dir {
                other_object.stat.mtime = one_object.stat.mtime;
                dirs.push(path.join(&one.name));
            }
            if !same_content(&one_object, &other_object)
                || !same_attributes(&one_object, &other_object)
            {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Opens a directory; `None` for the root of another mount.
fn open_own(site: &Site, path: &RelPath) -> Result<Option<crate::replica::backing::Handle>> {
    match site.dir(path) {
        Err(Error::Io { source, .. }) if is_other_mount(&source) => Ok(None),
        other => other.map(Some),
    }
}

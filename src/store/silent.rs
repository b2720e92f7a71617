//! Backings that hang while a store is opened: it is opened without them, and they come when they
//! answer.

use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::site::Site;
use super::{Arrival, Between, Fork, Store};
use crate::error::{Error, IoContext, Result};
use crate::sys::patience;
use crate::types::PRIVATE_DIR;

/// Those of `paths`, but for `known`, that are why an opening failed with `error`.
pub(super) fn among(
    paths: &[PathBuf],
    known: &[PathBuf],
    error: &Error,
    between: &Between,
) -> Vec<PathBuf> {
    let rest: Vec<&PathBuf> = paths.iter().filter(|path| !known.contains(path)).collect();
    let told =
        |path: &&PathBuf| matches!(error, Error::Io { path: at, .. } if at.starts_with(path));
    if let Some(one) = rest.iter().copied().find(told) {
        return vec![one.clone()];
    }
    // Not every error tells on which it was.
    let probes = rest.iter().map(|path| {
        let path = path.to_path_buf();
        move || try_write(&path)
    });
    let answers = patience::each_within(between.timeout, probes);
    rest.into_iter()
        .zip(answers)
        .filter(|(_, it)| it.is_none())
        .map(|(path, _)| path.clone())
        .collect()
}

/// The error of an opening, as one of the backing on which a call hangs, if there is one: not every
/// error tells on which it was, or that it came of that.
pub(super) fn blame(error: Error, sites: &[Site]) -> Error {
    let is_told = |path: &Path| sites.iter().any(|site| path.starts_with(&site.path));
    let hangs = error.to_errno() == Errno::TIMEDOUT;
    if hangs && matches!(&error, Error::Io { path, .. } if is_told(path)) {
        return error;
    }
    let hung = sites.iter().find_map(|site| {
        let guard = site.guard.as_ref().filter(|guard| guard.overdue_count() > 0)?;
        let fault = guard.last_failure()?;
        let at = fault.path.map_or_else(|| site.path.clone(), |path| site.at(&path));
        Some(Error::Io { action: fault.op, path: at, source: Errno::TIMEDOUT.into() })
    });
    hung.unwrap_or(error)
}

/// Tells of a refusal that it came to that because backings do not answer.
pub(super) fn explain(error: Error, silent: &[PathBuf], between: &Between) -> Error {
    let Error::Refused(why) = error else { return error };
    let shown: Vec<String> = silent.iter().map(|path| path.display().to_string()).collect();
    let (paths, limit) = (shown.join(", "), between.timeout.as_secs_f64());
    Error::Refused(match silent {
        [] => why,
        _ => format!("{paths} did not answer within {limit} s (check the disk), and {why}"),
    })
}

/// Whether the disk of a replica takes a write.
fn try_write(backing: &Path) -> Result<()> {
    let dir = backing.join(PRIVATE_DIR).join("tmp");
    let file = dir.join("probe");
    let tried = std::fs::write(&file, b"probe")
        .and_then(|()| std::fs::File::open(&file)?.sync_all())
        .and_then(|()| std::fs::remove_file(&file));
    tried.context("write to", dir)
}

impl Store {
    /// Whether the disk of a replica answers, and takes a write, in time. The look may hang, and is
    /// left alone then.
    pub fn answers(&self, backing: &Path) -> Result<()> {
        let own = backing.to_path_buf();
        self.between.within(backing, move || try_write(&own))
    }

    /// The backings that did not answer when the store was opened, and have not come since.
    pub fn silent(&self) -> Vec<PathBuf> {
        let present: Vec<PathBuf> =
            self.replicas.ids().map(|id| self.replicas.get(id).path.clone()).collect();
        let mut silent = self.silent.lock();
        // Somebody brought it by hand.
        silent.retain(|path| !present.contains(path));
        silent.clone()
    }

    /// Takes in one of them, which answers. Unless it still hangs it is none of them any more.
    pub fn spoke(&self, backing: &Path) -> Result<Arrival> {
        let arrived = self.arrived(backing, None, Fork::Refuse);
        if !matches!(&arrived, Err(error) if error.to_errno() == Errno::TIMEDOUT) {
            self.silent.lock().retain(|path| path != backing);
        }
        arrived
    }
}

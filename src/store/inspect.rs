//! Looking at a store that is not opened.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::lock::{self, Owner};
use super::marker::{Marker, Phase};
use super::{Between, CATALOG_FILE, Site};
use crate::catalog::Catalog;
use crate::error::{Error, IoContext, Result};
use crate::replica::guarded::CALL_TIMEOUT;
use crate::types::escape;

/// What can be known of a store from one of its backings, without mounting it.
#[derive(Clone, Debug)]
pub struct StoreInfo {
    /// The backing that was looked at.
    pub path: PathBuf,
    /// Its marker: identities, labels, peers.
    pub marker: Marker,
    /// Its catalog.
    pub catalog_file: PathBuf,
    /// Who has it mounted, if anybody has.
    pub owner: Option<Owner>,
    /// Whether its last mount ended cleanly.
    pub clean: bool,
}

/// Looks at one backing and changes nothing. `ETIMEDOUT` where its disk hangs.
pub fn inspect(path: &Path) -> Result<StoreInfo> {
    inspect_within(path, CALL_TIMEOUT)
}

/// [`inspect`] with another time for a disk to answer.
pub fn inspect_within(path: &Path, timeout: Duration) -> Result<StoreInfo> {
    let own = path.to_path_buf();
    Between::default().with_timeout(timeout).within(path, move || look(&own))
}

/// Opens the catalog of a store that is not mounted, for queries; each ends in time.
pub fn open_catalog(backing: &Path) -> Result<Catalog> {
    // The marker tells first whether the store is of a format that we know.
    let file = inspect(backing)?.catalog_file;
    let open = move || match file.exists() {
        true => Catalog::open_read_only(&file),
        false => {
            let file = escape(file.as_os_str().as_bytes());
            Err(Error::NoStore(format!("there is no catalog at {file}")))
        }
    };
    let catalog = Between::default().within(backing, open)?;
    catalog.set_timeout(CALL_TIMEOUT);
    Ok(catalog)
}

fn look(path: &Path) -> Result<StoreInfo> {
    let path = std::fs::canonicalize(path).context("look at the backing", path)?;
    let site = Site::open(&path)?;
    site.guard_private(false)?;
    let Some(marker) = Marker::read(&site)? else {
        return Err(Error::NoStore(format!("{} holds no store", path.display())));
    };
    let owner = lock::peek(&site)?;
    let clean = marker.phase == Phase::Ok && marker.clean.is_some();
    let catalog_file = site.private_path(CATALOG_FILE);
    Ok(StoreInfo { path, marker, catalog_file, owner, clean })
}

//! Looking at a store that is not opened.

use std::path::{Path, PathBuf};

use super::lock::{self, Owner};
use super::marker::{Marker, Phase};
use super::{CATALOG_FILE, Site};
use crate::error::{Error, IoContext, Result};

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

/// Looks at one backing and changes nothing.
pub fn inspect(path: &Path) -> Result<StoreInfo> {
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

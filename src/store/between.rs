//! A place for tests between the store and its backings.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::Result;
use crate::replica::backing::Backing;
use crate::replica::dir_backing::DirBacking;
use crate::store::site::Site;

type Wrap = dyn Fn(&Path, Box<dyn Backing>) -> Box<dyn Backing> + Send + Sync;

/// How backings are opened.
#[derive(Clone, Default)]
pub struct Between(Option<Arc<Wrap>>);

impl Between {
    /// `wrap` gets the path and the handle of every backing that is opened.
    pub fn new(
        wrap: impl Fn(&Path, Box<dyn Backing>) -> Box<dyn Backing> + Send + Sync + 'static,
    ) -> Between {
        Between(Some(Arc::new(wrap)))
    }

    /// Opens the backing at `path`.
    pub(super) fn open(&self, path: &Path) -> Result<Box<dyn Backing>> {
        let backing = Box::new(DirBacking::open(path)?);
        Ok(match &self.0 {
            Some(wrap) => wrap(path, backing),
            None => backing,
        })
    }
}

impl fmt::Debug for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Between(a test)" } else { "Between(nothing)" })
    }
}

impl Site {
    /// Opens the backing at `path`, an absolute path without symlinks.
    pub fn open(path: &Path) -> Result<Site> {
        Site::open_between(path, &Between::default())
    }

    /// As [`Site::open`], with something between.
    pub(super) fn open_between(path: &Path, between: &Between) -> Result<Site> {
        let backing = Arc::from(between.open(path)?);
        Ok(Site { path: path.to_path_buf(), backing, between: between.clone() })
    }
}

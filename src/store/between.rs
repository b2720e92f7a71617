//! A place for tests between the store and its backings.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::error::Result;
use crate::replica::backing::Backing;
use crate::replica::dir_backing::DirBacking;

/// What stands between the store and each of its backings: nothing, unless a test wants to see the
/// calls, or to make them fail.
#[derive(Clone, Default)]
pub struct Between(Option<Arc<Wrap>>);

type Wrap = dyn Fn(&Path, Box<dyn Backing>) -> Box<dyn Backing> + Send + Sync;

impl Between {
    /// `wrap` gets the path and the handle of every backing that is opened.
    pub fn new(
        wrap: impl Fn(&Path, Box<dyn Backing>) -> Box<dyn Backing> + Send + Sync + 'static,
    ) -> Between {
        Between(Some(Arc::new(wrap)))
    }

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

//! How the backings of a store that is in use are opened: what stands between us and them.
//!
//! Every call on one ends in time ([`Guarded`]), from the first look at it on. A test may put
//! something of its own below that.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::catalog::{Catalog, Head, Original};
use crate::error::{IoContext, Result};
use crate::replica::backing::Backing;
use crate::replica::dir_backing::DirBacking;
use crate::replica::guarded::{CALL_TIMEOUT, Guarded};
use crate::store::CATALOG_FILE;
use crate::store::site::Site;
use crate::sys::device::Alive;
use crate::sys::patience;

type Wrap = dyn Fn(&Path, Box<dyn Backing>) -> Box<dyn Backing> + Send + Sync;

/// How backings are opened.
#[derive(Clone)]
pub struct Between {
    wrap: Option<Arc<Wrap>>,
    /// How long a call may take.
    pub timeout: Duration,
}

impl Default for Between {
    fn default() -> Between {
        Between { wrap: None, timeout: CALL_TIMEOUT }
    }
}

impl Between {
    /// `wrap` gets the path and the handle of every backing that is opened.
    pub fn new(
        wrap: impl Fn(&Path, Box<dyn Backing>) -> Box<dyn Backing> + Send + Sync + 'static,
    ) -> Between {
        Between { wrap: Some(Arc::new(wrap)), ..Between::default() }
    }

    /// The same, with another time for each call.
    pub fn with_timeout(self, timeout: Duration) -> Between {
        Between { timeout, ..self }
    }

    /// Does what touches `path` and is no call on a backing; `ETIMEDOUT` if that hangs.
    pub(super) fn within<T: Send + 'static>(
        &self,
        path: &Path,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let answer = patience::within(self.timeout, work);
        answer.unwrap_or_else(|| Err(rustix::io::Errno::TIMEDOUT).context("look at", path))
    }
}

impl fmt::Debug for Between {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.wrap.is_some() { "Between(a test)" } else { "Between(nothing)" })
    }
}

impl Site {
    /// Opens the backing at `path`, an absolute path without symlinks, of a store that is not in
    /// use: nothing bounds its calls, and nothing has to be handed over.
    pub fn open(path: &Path) -> Result<Site> {
        let backing = Arc::new(DirBacking::open(path)?);
        Ok(Site { path: path.to_path_buf(), backing, guard: None })
    }

    /// Opens the backing of a store that is looked at: no call on it takes longer than `timeout`.
    pub(crate) fn open_in_time(path: &Path, timeout: Duration) -> Result<Site> {
        let between = Between::default().with_timeout(timeout);
        let (own, by) = (path.to_path_buf(), between.clone());
        between.within(path, move || Site::open_between(&own, &by))
    }

    /// Opens it for use. To be called by whoever may hang.
    pub(super) fn open_between(path: &Path, between: &Between) -> Result<Site> {
        let backing: Box<dyn Backing> = Box::new(DirBacking::open(path)?);
        let backing = match &between.wrap {
            Some(wrap) => wrap(path, backing),
            None => backing,
        };
        let guarded = Arc::new(Guarded::new(backing, between.timeout));
        let guard = Some(guarded.clone());
        Ok(Site { path: path.to_path_buf(), backing: guarded, guard })
    }

    /// How long a call on it may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.guard.as_ref().map_or(CALL_TIMEOUT, |guard| guard.timeout())
    }

    /// Opens its catalog for queries only.
    pub(crate) fn open_catalog(&self) -> Result<Catalog> {
        let file = self.private_path(CATALOG_FILE);
        let catalog = self.within("open the catalog in", move || Catalog::open_read_only(&file))?;
        catalog.set_timeout(self.timeout());
        Ok(catalog)
    }

    /// The head of its catalog, as that lies there.
    pub(crate) fn catalog_head(&self) -> Result<Head> {
        let file = self.private_path(CATALOG_FILE);
        self.within("read the catalog in", move || Catalog::inspect(&file))
    }

    /// Replaces its catalog by a copy of that of `source`; nobody has either open. The error names
    /// the one that hangs.
    pub(crate) fn copy_catalog(&self, source: &Site) -> Result<()> {
        let (from, to) = (source.private_path(CATALOG_FILE), self.private_path(CATALOG_FILE));
        let timeout = source.timeout();
        let open = move || Original::open(&from, timeout);
        let original = source.within("open the catalog in", open)?;
        let (original, copied) = self.within_alive("copy the catalog to", move |alive| {
            let copied = original.copy_to(&to, alive);
            Ok((original, copied))
        })?;
        let close = move || {
            drop(original);
            Ok(())
        };
        let closed = source.within("close the catalog in", close);
        copied.and(closed)
    }

    /// Does what touches the backing's device by another way than its calls; `ETIMEDOUT` if that
    /// hangs, or a call does.
    pub(crate) fn within<T: Send + 'static>(
        &self,
        action: &'static str,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.within_alive(action, |_| work())
    }

    /// Likewise what can show that it goes on, however long it takes.
    pub(crate) fn within_alive<T: Send + 'static>(
        &self,
        action: &'static str,
        work: impl FnOnce(&Alive) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        match &self.guard {
            Some(guard) => guard.within_alive(action, work).context(action, &self.path)?,
            None => work(&Alive::default()),
        }
    }

    /// Likewise in the caller's own thread, which may hang: see [`Guarded::directly`].
    pub(crate) fn directly<T>(
        &self,
        action: &'static str,
        work: impl FnOnce(&dyn Fn()) -> Result<T>,
    ) -> Result<T> {
        match &self.guard {
            Some(guard) => guard.directly(action, work).context(action, &self.path)?,
            None => work(&|| ()),
        }
    }
}

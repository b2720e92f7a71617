//! From a path to its store: the mount it lies in, or the backing.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::catalog::Catalog;
use crate::control::{DaemonInfo, Request, Response, client};
use crate::error::{Error, IoContext, Result};
use crate::mountpoint::table::{self, MountEntry};
use crate::mountpoint::{self, show};
use crate::replica::guarded::CALL_TIMEOUT;
use crate::sys::patience;
use crate::types::{PRIVATE_DIR, RelPath, escape};

/// The file by which a backing is known.
const MARKER: &str = "store.toml";

/// A store that a path leads to.
#[derive(Clone, Debug)]
pub struct Located {
    /// Where it is mounted, if the path lies in a mount.
    pub mountpoint: Option<PathBuf>,
    /// Its backings; the one that the path lies in, if it lies in one.
    pub backings: Vec<PathBuf>,
    /// The path below the root of the live tree.
    pub path: RelPath,
}

/// Finds the store that `path` lies in. The path itself need not exist. `ETIMEDOUT` where a look at
/// it hangs.
pub fn locate(path: &Path) -> Result<Located> {
    let own = path.to_path_buf();
    let located = patience::within(CALL_TIMEOUT, move || look_for(&own));
    located.unwrap_or_else(|| Err(Errno::TIMEDOUT).context("look at", path))
}

fn look_for(path: &Path) -> Result<Located> {
    let resolved = mountpoint::resolve(path)?;
    let table = table::read()?;
    if let Some(located) = locate_in(&table, &resolved)? {
        return Ok(located);
    }
    // The path itself may be a symlink into a mount.
    if let Ok(target) = std::fs::canonicalize(path)
        && target != resolved
        && let Some(located) = locate_in(&table, &target)?
    {
        return Ok(located);
    }
    Err(Error::NoStore(format!("{} lies neither in a mounted store nor in a backing", show(path))))
}

fn locate_in(table: &[MountEntry], path: &Path) -> Result<Option<Located>> {
    if let Some(entry) = table::containing(table, path) {
        let backings = entry.backings();
        if backings.is_empty() || backings.iter().any(|backing| !backing.is_absolute()) {
            return Err(Error::Refused(format!(
                "the mount on {} has the source '{}' (-o fsname), which does not tell its \
                 backings: name a path in a backing instead",
                show(&entry.target),
                escape(&entry.source)
            )));
        }
        return Ok(Some(Located {
            mountpoint: Some(entry.target.clone()),
            backings,
            path: relative(path, &entry.target)?,
        }));
    }
    for dir in path.ancestors() {
        let private = dir.join(PRIVATE_DIR);
        let marker = private.join(MARKER);
        let found = match std::fs::symlink_metadata(&marker) {
            Ok(_) => true,
            // Someone else's backing: that it is one can be seen, no more.
            Err(error) => error.kind() == std::io::ErrorKind::PermissionDenied,
        };
        if found {
            let path = relative(path, dir)?;
            let backings = vec![dir.to_path_buf()];
            return Ok(Some(Located { mountpoint: None, backings, path }));
        }
    }
    Ok(None)
}

fn relative(path: &Path, root: &Path) -> Result<RelPath> {
    let below = path.strip_prefix(root).unwrap_or(Path::new(""));
    Ok(RelPath::parse(below.as_os_str().as_bytes())?)
}

impl Located {
    /// Asks the daemon; `NoStore` with the way to mount if there is none.
    pub fn ask(&self, request: &Request) -> Result<Response> {
        match client::connect_any(&self.backings) {
            Ok(mut stream) => client::converse(&mut stream, request),
            Err(Error::NotFound(_)) => Err(self.not_mounted()),
            Err(error) => Err(error),
        }
    }

    /// Asks the daemon, or, if there is none, the catalog in the backing.
    pub fn ask_or_look(
        &self,
        request: &Request,
        look: impl FnOnce(&Catalog) -> Result<Response>,
    ) -> Result<Response> {
        match client::connect_any(&self.backings) {
            Ok(mut stream) => client::converse(&mut stream, request),
            Err(Error::NotFound(_)) => look(&self.catalog()?),
            Err(error) => Err(error),
        }
    }

    fn not_mounted(&self) -> Error {
        let backings: Vec<String> = self.backings.iter().map(|path| show(path)).collect();
        let backings = backings.join(" ");
        Error::NoStore(match &self.mountpoint {
            Some(mountpoint) => format!(
                "the daemon of the mount on {} is gone; mount again: rearview mount {backings} {}",
                show(mountpoint),
                show(mountpoint)
            ),
            // The backing is one of several, and only the user knows where the others are.
            None => format!(
                "the store in {backings} is not mounted: rearview mount {backings} … MOUNTPOINT"
            ),
        })
    }

    /// The catalog of an unmounted store.
    fn catalog(&self) -> Result<Catalog> {
        crate::store::open_catalog(&self.first_backing())
    }

    /// The backing that errors and offline looks are about.
    pub fn first_backing(&self) -> PathBuf {
        self.backings.first().cloned().unwrap_or_default()
    }

    /// What the daemon says of itself.
    pub fn daemon(&self) -> Result<DaemonInfo> {
        match self.ask(&Request::Ping)? {
            Response::Pong(info) => Ok(info),
            _ => Err(unexpected()),
        }
    }
}

/// The error for an answer that does not fit the request.
pub fn unexpected() -> Error {
    Error::Refused("the daemon's answer does not fit the request: unmount and mount anew".into())
}

/// Whether a word of the command line is meant as a path into a store, rather than as a name: it
/// exists, and lies in a mount or a backing.
pub fn is_store_path(word: &std::ffi::OsStr) -> bool {
    let path = Path::new(word);
    std::fs::symlink_metadata(path).is_ok() && locate(path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
40 22 0:50 / /mnt/rv rw - fuse.rearview /x/a:/x/b rw\n";

    #[test]
    fn a_path_in_a_mount_is_found_with_its_backings() {
        let table = table::parse(TABLE);
        let located = locate_in(&table, Path::new("/mnt/rv/src/gone.txt")).unwrap().unwrap();
        assert_eq!(located.mountpoint.as_deref(), Some(Path::new("/mnt/rv")));
        assert_eq!(located.backings, [Path::new("/x/a"), Path::new("/x/b")]);
        assert_eq!(located.path.to_string(), "/src/gone.txt");
        let root = locate_in(&table, Path::new("/mnt/rv")).unwrap().unwrap();
        assert!(root.path.is_root());
    }

    #[test]
    fn a_mount_with_a_name_of_its_own_says_so() {
        let table = table::parse(b"40 22 0:50 / /m rw - fuse.rearview data rw\n");
        assert!(locate_in(&table, Path::new("/m/x")).unwrap_err().to_string().contains("fsname"));
    }

    #[test]
    fn a_path_in_a_backing_is_found_by_its_marker() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("b").join(PRIVATE_DIR)).unwrap();
        assert!(locate_in(&[], &root.join("b/x")).unwrap().is_none());
        std::fs::write(root.join("b").join(PRIVATE_DIR).join(MARKER), "").unwrap();
        let located = locate(&root.join("b/not/there")).unwrap();
        assert_eq!(located.backings, [root.join("b")]);
        assert_eq!(located.path.to_string(), "/not/there");
        assert!(located.mountpoint.is_none());
        std::os::unix::fs::symlink(root.join("b"), root.join("link")).unwrap();
        assert!(locate(&root.join("link")).unwrap().path.is_root());
        assert!(matches!(locate(&root), Err(Error::NoStore(_))));
        // Not mounted: what needs the daemon says how to mount.
        let error = located.ask(&Request::Status).unwrap_err().to_string();
        assert!(error.contains("not mounted: rearview mount"), "{error}");
    }
}

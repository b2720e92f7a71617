//! The lock of a backing: `.rearview/lock`, one mounter at a time.
//!
//! The lock is the kernel's (`flock(2)`): it ends with its holder, however that ends. The file's
//! content, TOML, only tells who holds it: people, and whoever ends what is left of a killed
//! daemon.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, IoContext, Result};
use crate::replica::backing::{Access, Handle};
use crate::store::site::{Site, own_creds, own_name, private};
use crate::sys::patience;

/// Its name in the private directory.
pub(super) const LOCK_FILE: &str = "lock";
const OWNER_BYTES_MAX: usize = 16 * 1024;
/// A look at the store ([`peek`]) holds the lock for an instant: a mounter tries again that often.
const TRIES: u32 = 20;
const TRY_PAUSE: Duration = Duration::from_millis(10);
/// How long giving it back is waited for.
const UNLOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// Who holds a store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The daemon's process id.
    pub pid: u32,
    /// The computer's name.
    pub host: String,
    /// Where it is mounted, escaped; empty if not known.
    pub mountpoint: String,
    /// Since when, RFC 3339.
    pub started: String,
}

/// A held lock; released when dropped.
#[derive(Debug)]
pub struct StoreLock {
    file: Handle,
    owner: Owner,
}

impl Drop for StoreLock {
    /// At once: the file itself is closed by whoever closes files of the backing.
    fn drop(&mut self) {
        let file = self.file.clone();
        let unlock = move || rustix::fs::flock(&file, FlockOperation::Unlock);
        if patience::within(UNLOCK_TIMEOUT, unlock).is_none() {
            log::warn!("the lock of a backing that hangs is given back when its disk answers");
        }
    }
}

impl StoreLock {
    /// Looks whether the lock is what lies under its name, and tells who holds it; if not, that is
    /// mended. `None` for one that is whole. Without the file a second mounter would get in.
    pub fn heal(&mut self, site: &Site) -> Option<Result<()>> {
        let path = site.private_path(LOCK_FILE);
        let there = site
            .backing
            .open_dir(&private(""))
            .and_then(|dir| site.backing.open_file(&dir, &own_name(LOCK_FILE), Access::Read))
            .and_then(|file| Ok((site.backing.stat(&file)?.ino, read_text(site, &file))));
        let own = site.backing.stat(&self.file).map(|stat| stat.ino);
        match (there, own) {
            (Ok((ino, text)), Ok(own)) if ino == own => {
                let wanted = self.owner.text();
                (text != wanted.as_bytes())
                    .then(|| write_text(site, &self.file, &wanted).context("write", &path))
            }
            // The old one is held until the new one is.
            _ => Some(acquire(site, &self.owner).map(|lock| *self = lock)),
        }
    }
}

impl Owner {
    /// This process.
    pub fn this(mountpoint: Option<&Path>) -> Owner {
        use std::os::unix::ffi::OsStrExt;
        Owner {
            pid: std::process::id(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            mountpoint: mountpoint
                .map(|path| crate::types::escape(path.as_os_str().as_bytes()))
                .unwrap_or_default(),
            started: jiff::Timestamp::now().to_string(),
        }
    }

    fn text(&self) -> String {
        toml::to_string(self).expect("strings and numbers are TOML")
    }

    fn describe(&self) -> String {
        let escape = |text: &str| crate::types::escape(text.as_bytes());
        let mut text = format!("process {} on {}", self.pid, escape(&self.host));
        if !self.mountpoint.is_empty() {
            text.push_str(&format!(", mounted at {}", self.mountpoint));
        }
        if !self.started.is_empty() {
            text.push_str(&format!(", since {}", escape(&self.started)));
        }
        text
    }
}

/// Takes the lock of a backing for somebody who changes nothing there: its disk may be mounted
/// read-only.
pub fn acquire_to_look(site: &Site, owner: &Owner) -> Result<StoreLock> {
    match acquire(site, owner) {
        Err(error) if error.to_errno() == Errno::ROFS => {
            let path = site.private_path(LOCK_FILE);
            let dir = site.dir(&private(""))?;
            let file = site.backing.open_file(&dir, &own_name(LOCK_FILE), Access::Read);
            let file = file.context("open the lock", &path)?;
            take(site, &file)?;
            Ok(StoreLock { file, owner: owner.clone() })
        }
        acquired => acquired,
    }
}

/// Takes the lock of a backing whose private directory exists.
pub fn acquire(site: &Site, owner: &Owner) -> Result<StoreLock> {
    let path = site.private_path(LOCK_FILE);
    let dir = site.dir(&private(""))?;
    let name = own_name(LOCK_FILE);
    let file = match site.backing.open_file(&dir, &name, Access::ReadWrite) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            match site.backing.create(&dir, &name, 0o600, own_creds()) {
                // Another mounter made it meanwhile: its file is the lock.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    site.backing.open_file(&dir, &name, Access::ReadWrite)
                }
                other => other,
            }
        }
        other => other,
    }
    .context("open the lock", &path)?;
    take(site, &file)?;
    // The record is for people: a full disk must not keep the store from being mounted.
    if let Err(error) = write_text(site, &file, &owner.text()) {
        log::warn!("write {}: {error}", path.display());
    }
    Ok(StoreLock { file, owner: owner.clone() })
}

fn take(site: &Site, file: &Handle) -> Result<()> {
    let mut tries = 0;
    loop {
        match flock(site, file, FlockOperation::NonBlockingLockExclusive)? {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if tries < TRIES => {
                tries += 1;
                std::thread::sleep(TRY_PAUSE);
            }
            Err(Errno::WOULDBLOCK) => return Err(in_use(site, file)),
            Err(error) => return Err(error).context("lock", site.private_path(LOCK_FILE)),
        }
    }
}

/// On a disk of another computer this is asked of that.
fn flock(site: &Site, file: &Handle, how: FlockOperation) -> Result<Result<(), Errno>> {
    let file = file.clone();
    site.within("lock", move || Ok(rustix::fs::flock(&file, how)))
}

fn write_text(site: &Site, file: &Handle, text: &str) -> io::Result<()> {
    site.backing.write_at(file, text.as_bytes(), 0)?;
    site.backing.truncate(file, text.len() as u64)
}

fn read_text(site: &Site, file: &Handle) -> Vec<u8> {
    let mut bytes = vec![0; OWNER_BYTES_MAX];
    let count = site.backing.read_at(file, &mut bytes, 0).unwrap_or(0);
    bytes.truncate(count);
    bytes
}

fn in_use(site: &Site, file: &Handle) -> Error {
    let owner = read_owner(site, file);
    Error::InUse(format!(
        "the store in {} is in use by {}: unmount it there first (`rearview umount`)",
        site.path.display(),
        owner.describe()
    ))
}

fn read_owner(site: &Site, file: &Handle) -> Owner {
    std::str::from_utf8(&read_text(site, file))
        .ok()
        .and_then(|text| toml::from_str(text).ok())
        .unwrap_or_default()
}

/// Who holds the backing, if anybody does.
pub fn peek(site: &Site) -> Result<Option<Owner>> {
    let path = site.private_path(LOCK_FILE);
    let opened = site
        .backing
        .open_dir(&private(""))
        .and_then(|dir| site.backing.open_file(&dir, &own_name(LOCK_FILE), Access::Read));
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.context("open the lock", &path)?,
    };
    match flock(site, &file, FlockOperation::NonBlockingLockShared)? {
        Ok(()) => Ok(None),
        Err(Errno::WOULDBLOCK) => Ok(Some(read_owner(site, &file))),
        Err(error) => Err(error).context("lock", &path),
    }
}

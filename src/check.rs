//! `check`: whether an unmounted store holds what it promises.
//!
//! Every invariant that can be seen from outside is looked at: each replica's marker and catalog
//! ([`crate::catalog::Audit`]), the live tree against the catalog, the files of history against the
//! catalog, and the replicas against one another. Nothing is changed. The locks of all backings are
//! held meanwhile, so that no mount comes between.
//!
//! **Damage** is what contradicts a promise; a **leftover** is what nothing uses and nothing has
//! removed yet, as a mount that died leaves it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::catalog::digest::first_half;
use crate::catalog::{Catalog, Head};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::replica::guarded::CALL_TIMEOUT;
use crate::store::lock::{Owner, StoreLock, acquire_to_look};
use crate::store::marker::{CleanMark, Marker, PeerState, Phase};
use crate::store::site::{Site, own_name, private};
use crate::store::{CATALOG_FILE, inspect_within};
use crate::sys::device::Alive;
use crate::types::{ContentId, NodeId};

mod history;
mod rebuild;
mod repair;
mod tree;

pub use rebuild::{RebuildReport, UNNAMED, rebuild};
pub use repair::repair;

/// How thoroughly is looked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckOptions {
    /// Read every byte: live files against their digests, preserved files and packs against theirs.
    /// Otherwise sizes, times and names count.
    pub read_data: bool,
    /// How long a disk may take to answer; `None` for as long as in a mount.
    pub call_timeout: Option<Duration>,
}

impl CheckOptions {
    fn timeout(&self) -> Duration {
        self.call_timeout.unwrap_or(CALL_TIMEOUT)
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Where: a path, escaped.
    pub place: String,
    /// What is wrong there.
    pub what: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// What contradicts a promise.
    pub damage: Vec<Finding>,
    /// What nothing uses.
    pub leftovers: Vec<Finding>,
    /// Backings that did not answer in time: what was not looked at there may be anything.
    #[serde(default)]
    pub silent: Vec<Finding>,
    /// How many live objects were looked at, on all replicas.
    pub objects: u64,
    /// How many files of history.
    pub history_files: u64,
    /// How many bytes were read.
    pub bytes: u64,
}

impl CheckReport {
    fn damage(&mut self, place: impl AsRef<Path>, what: impl Into<String>) {
        self.damage.push(finding(place.as_ref(), what.into()));
    }

    /// Goes on without a backing that hangs.
    fn unless_it_hangs<T>(&mut self, backing: &Path, looked: Result<T>) -> Result<Option<T>> {
        match looked {
            Err(error) if error.to_errno() == Errno::TIMEDOUT => {
                let what = format!("it does not answer, and was not checked to the end: {error}");
                self.silent.push(finding(backing, what));
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    fn leftover(&mut self, place: impl AsRef<Path>, what: impl Into<String>) {
        self.leftovers.push(finding(place.as_ref(), what.into()));
    }
}

fn finding(place: &Path, what: String) -> Finding {
    use std::os::unix::ffi::OsStrExt;
    Finding { place: crate::types::escape(place.as_os_str().as_bytes()), what }
}

/// One replica under the check.
struct Member {
    site: Site,
    marker: Marker,
    /// Nothing lay beside its catalog.
    is_tidy: bool,
    _lock: StoreLock,
}

impl Member {
    fn catalog_file(&self) -> PathBuf {
        self.site.private_path(CATALOG_FILE)
    }

    /// Looks at its catalog.
    fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Path, &Alive) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let file = self.catalog_file();
        self.site.within_alive("check the catalog in", move |alive| look(&file, alive))
    }
}

/// What the replicas are compared by: what the first one had.
#[derive(Default)]
struct Common {
    /// Digests of the contents of live files.
    live: BTreeMap<NodeId, [u8; 32]>,
    /// Digests of the files of history, by their paths below `.rearview`.
    history: BTreeMap<String, [u8; 32]>,
}

/// Checks the store in these backings. `NoStore` where there is none, `InUse` while it is mounted.
/// One whose disk hangs is left out; an error if all do.
pub fn check(
    backings: &[PathBuf],
    options: CheckOptions,
    progress: &Progress,
) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let members = open(backings, options.timeout(), |path, opened| {
        // Somebody has to answer.
        let is_last = report.silent.len() + 1 == backings.len();
        if is_last { opened.map(Some) } else { report.unless_it_hangs(path, opened) }
    })?;
    let mut heads: Vec<(usize, Head)> = Vec::new();
    let mut common = Common::default();
    for (index, member) in members.iter().enumerate() {
        let checked = check_catalog(member, &mut report);
        let head = report.unless_it_hangs(&member.site.path, checked)?;
        heads.extend(head.flatten().map(|head| (index, head)));
    }
    check_members(&members, &heads, &mut report)?;
    for &(index, _) in &heads {
        let member = &members[index];
        if member.marker.clean.is_none() {
            let what = "the last mount did not end cleanly: mount once, then check";
            report.damage(&member.site.path, what);
            continue;
        }
        let checked = check_files(member, options, &mut common, &mut report, progress);
        report.unless_it_hangs(&member.site.path, checked)?;
    }
    members.iter().for_each(|member| leave_tidy(member, &report));
    Ok(report)
}

/// Leaves a backing as it was found: without the files by which SQLite reads. One that hangs is not
/// touched again.
fn leave_tidy(member: &Member, report: &CheckReport) {
    let own = finding(&member.site.path, String::new()).place;
    if !member.is_tidy || report.silent.iter().any(|silent| silent.place == own) {
        return;
    }
    if let Err(error) = member.look(|file, _| Catalog::tidy(file)) {
        // Somebody else looks at it, or its disk is mounted read-only, where nothing was made.
        log::debug!("{}: {error}", member.site.path.display());
    }
}

/// A replica's files against its catalog.
fn check_files(
    member: &Member,
    options: CheckOptions,
    common: &mut Common,
    report: &mut CheckReport,
    progress: &Progress,
) -> Result<()> {
    let catalog = member.site.open_catalog()?;
    tree::check(&member.site, &catalog, options, common, report, progress)?;
    history::check(member, &catalog, options, common, report, progress)
}

/// Checks what can be checked of a store that is mounted: each catalog by itself. The rest is the
/// scrub's. To be asked of the daemon, which has them to itself.
pub fn check_catalogs(files: &[PathBuf]) -> CheckReport {
    let mut report = CheckReport::default();
    for file in files {
        match Catalog::audit(file) {
            Ok(audit) => audit.flaws.into_iter().for_each(|flaw| report.damage(file, flaw)),
            Err(error) => report.damage(file, error.to_string()),
        }
    }
    report
}

/// Locks the backings and reads their markers. `judge` may leave one out.
fn open(
    backings: &[PathBuf],
    timeout: Duration,
    mut judge: impl FnMut(&Path, Result<Member>) -> Result<Option<Member>>,
) -> Result<Vec<Member>> {
    let mut members: Vec<Member> = Vec::new();
    for path in backings {
        let Some(member) = judge(path, open_one(path, timeout))? else { continue };
        let (path, marker) = (&member.site.path, &member.marker);
        if let Some(first) = members.first()
            && first.marker.store != marker.store
        {
            return Err(Error::Refused(format!(
                "{} and {} belong to different stores: check them one after the other",
                first.site.path.display(),
                path.display()
            )));
        }
        members.push(member);
    }
    Ok(members)
}

fn open_one(path: &Path, timeout: Duration) -> Result<Member> {
    let path = inspect_within(path, timeout)?.path;
    let site = Site::open_in_time(&path, timeout)?;
    let lock = acquire_to_look(&site, &Owner::this(None))?;
    let Some(marker) = Marker::read(&site)? else {
        return Err(Error::NoStore(format!("{} holds no store", path.display())));
    };
    let dir = site.dir(&private(""))?;
    let is_tidy = ["-wal", "-shm"].iter().all(|end| {
        let beside = site.backing.stat_at(&dir, &own_name(&format!("{CATALOG_FILE}{end}")));
        beside.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    });
    Ok(Member { site, marker, is_tidy, _lock: lock })
}

/// A replica's catalog by itself; its head if it is sound enough to go on with.
fn check_catalog(member: &Member, report: &mut CheckReport) -> Result<Option<Head>> {
    let file = member.catalog_file();
    if member.marker.phase != Phase::Ok {
        report.damage(&member.site.path, "it is no whole copy yet: its filling was interrupted");
        return Ok(None);
    }
    let audited = member.look(|file, alive| {
        let head = Catalog::inspect(file)?;
        let rotten = Catalog::rotten_at_rest(file, &head.chain, alive)?;
        Ok(((head, Catalog::audit_alive(file, alive)?), rotten))
    });
    let ((head, audit), rotten) = match audited {
        Ok(both) => both,
        Err(error) if error.to_errno() == Errno::TIMEDOUT => return Err(error),
        Err(error) => {
            report.damage(&file, error.to_string());
            return Ok(None);
        }
    };
    // Else the one that was given first would be taken for the good one.
    if let Some(first) = rotten.first() {
        let text = format!("{} pages are not as they were written, first {first}", rotten.len());
        report.damage(&file, text);
    }
    let sound = audit.flaws.is_empty() && rotten.is_empty();
    audit.flaws.into_iter().for_each(|flaw| report.damage(&file, flaw));
    audit.leftovers.into_iter().for_each(|text| report.leftover(&file, text));
    if head.store != member.marker.store {
        report.damage(&file, "it is another store's");
        return Ok(None);
    }
    if member.marker.clean.as_ref().is_some_and(|mark| !mark.fits(&head)) {
        report.damage(&file, "it is not the one that the marker was written for");
    }
    Ok(sound.then_some(head))
}

/// The replicas' marks and catalogs against one another. A replica that the others know to be
/// behind may differ: it is made equal when it is next mounted with them.
fn check_members(
    members: &[Member],
    heads: &[(usize, Head)],
    report: &mut CheckReport,
) -> Result<()> {
    let stale = |index: usize| {
        members.iter().any(|other| {
            let peer = other.marker.peer(members[index].marker.replica);
            peer.is_some_and(|peer| peer.state == PeerState::Stale)
        })
    };
    let current: Vec<&(usize, Head)> = heads.iter().filter(|(index, _)| !stale(*index)).collect();
    let Some((first, head)) = current.first() else { return Ok(()) };
    let mark = members[*first].marker.clean.clone();
    for (index, other) in &current[1..] {
        let file = members[*index].catalog_file();
        if members[*index].marker.clean != mark && mark.as_ref() != Some(&CleanMark::of(other)) {
            report.damage(&members[*index].site.path, "its marker tells of another end");
        }
        if other != head {
            report.damage(&file, "it differs from the other replicas' catalogs");
            continue;
        }
        let mut hashes = |member: &Member| {
            let hashes = member.look(Catalog::table_hashes_alive);
            report.unless_it_hangs(&member.site.path, hashes)
        };
        let (own, others) = (hashes(&members[*index])?, hashes(&members[*first])?);
        let (Some(own), Some(others)) = (own, others) else { continue };
        for (one, other) in own.iter().zip(&others).filter(|(one, other)| one != other) {
            let what =
                format!("the table '{}' differs from '{}' of another replica", one.0, other.0);
            report.damage(&file, what);
        }
    }
    Ok(())
}

/// Compares a digest with the one that another replica had in the same place.
fn differs<K: Ord>(known: &mut BTreeMap<K, [u8; 32]>, key: K, digest: [u8; 32]) -> bool {
    *known.entry(key).or_insert(digest) != digest
}

/// Whether a content's recorded digest, if it has one, is that of the bytes.
fn has_digest(catalog: &Catalog, content: ContentId, hash: &[u8; 32]) -> Result<bool> {
    Ok(catalog.digest(content)?.is_none_or(|digest| digest == first_half(hash)))
}

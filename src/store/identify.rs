//! What the given paths are, and what is to be made of them: the rules by which a store is opened,
//! created, adopted or refused. Looks only; nothing is changed here.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use uuid::Uuid;

use crate::error::{Error, IoContext, Result};
use crate::store::Between;
use crate::store::fill;
use crate::store::marker::{MARKER_FILE, Marker, Phase};
use crate::store::site::{Site, private};
use crate::sys::patience;
use crate::types::{PRIVATE_DIR, REPLICAS_MAX, RelPath};

/// What is at a path.
#[derive(Debug)]
pub enum Found {
    /// Nothing; the directory above is there.
    Absent,
    /// A directory with nothing in it.
    Empty,
    /// A directory with files and no marker.
    Files,
    /// A replica.
    Replica(Box<Marker>),
}

/// A given path and what is there.
pub struct Candidate {
    /// Absolute, symlinks resolved.
    pub path: PathBuf,
    /// Its handle; `None` while it is absent.
    pub site: Option<Site>,
    /// What is there.
    pub found: Found,
}

/// What is to be done with the candidates.
#[derive(Debug, PartialEq, Eq)]
pub enum Plan {
    /// Make a store: the tree of `source` is taken in, the others are filled from it.
    Create {
        /// Index of the candidate with the files, or of the first if all are empty.
        source: usize,
    },
    /// Open the store; those without a marker join it.
    Open,
}

/// Looks at one path; `ETIMEDOUT` if it does not answer.
pub fn look(path: &Path, between: &Between) -> Result<Candidate> {
    let (mut found, _) = look_all(&[path.to_path_buf()], false, between)?;
    found.pop().ok_or(Errno::TIMEDOUT).context("look at", path)
}

/// Looks at the paths, no longer than a call may take, and applies all rules about a path alone and
/// about two of them. Returns apart which do not answer. `may_lack` takes a path that leads nowhere
/// as absent, though it could not be made.
pub fn look_all(
    paths: &[PathBuf],
    may_lack: bool,
    between: &Between,
) -> Result<(Vec<Candidate>, Vec<PathBuf>)> {
    if paths.is_empty() || paths.len() > REPLICAS_MAX {
        return Err(Error::Refused(format!(
            "a store has 1 to {REPLICAS_MAX} backings; {} are given",
            paths.len()
        )));
    }
    let looks = paths.iter().cloned().map(|path| {
        let between = between.clone();
        move || look_at(&path, may_lack, &between)
    });
    let (mut candidates, mut silent) = (Vec::new(), Vec::new());
    for (path, found) in paths.iter().zip(patience::each_within(between.timeout, looks)) {
        match found {
            Some(candidate) => candidates.push(candidate?),
            None => silent.push(path.clone()),
        }
    }
    for (index, one) in candidates.iter().enumerate() {
        for (other_index, other) in candidates.iter().enumerate() {
            if index != other_index {
                check_apart(&one.path, &other.path)?;
            }
        }
    }
    Ok((candidates, silent))
}

fn look_at(given: &Path, may_lack: bool, between: &Between) -> Result<Candidate> {
    let path = match fs::canonicalize(given) {
        Err(error) if may_lack && error.kind() == io::ErrorKind::NotFound => {
            return Ok(Candidate { path: given.into(), site: None, found: Found::Absent });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return absent(given),
        other => other.context("look at the backing", given)?,
    };
    let meta = fs::metadata(&path).context("look at the backing", &path)?;
    if !meta.is_dir() {
        return Err(Error::Refused(format!(
            "{} is not a directory: a backing is a directory",
            path.display()
        )));
    }
    let site = Site::open_between(&path, between)?;
    site.guard_private(false)?;
    let marker = Marker::read(&site)?;
    let found = match marker {
        Some(marker) => Found::Replica(Box::new(marker)),
        None => {
            check_no_remains(&site)?;
            let root = site.dir(&RelPath::root())?;
            match site.live_entries(&root, &RelPath::root())?.is_empty() {
                true => Found::Empty,
                false => Found::Files,
            }
        }
    };
    Ok(Candidate { path, site: Some(site), found })
}

fn absent(given: &Path) -> Result<Candidate> {
    let Some(name) = given.file_name() else {
        return Err(Error::Refused(format!("{} does not exist", given.display())));
    };
    let parent = match given.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let parent = fs::canonicalize(parent).map_err(|_| {
        Error::Refused(format!(
            "{} does not exist, nor does the directory above it: is its disk mounted? \
             (only the last part of a backing's path is made)",
            given.display()
        ))
    })?;
    if fs::symlink_metadata(parent.join(name)).is_ok() {
        return Err(Error::Refused(format!(
            "{} is a symlink that leads nowhere: is its disk mounted?",
            given.display()
        )));
    }
    Ok(Candidate { path: parent.join(name), site: None, found: Found::Absent })
}

/// A private directory without a marker must have nothing of worth in it, or a lost marker would
/// turn a replica with history into "a folder with files".
fn check_no_remains(site: &Site) -> Result<()> {
    let Ok(dir) = site.backing.open_dir(&private("")) else { return Ok(()) };
    let listed = site.backing.list(&dir).context("list", site.private_path(""))?;
    for entry in listed {
        let harmless = match entry.name.as_bytes() {
            b"lock" | b"store.toml.new" | b"intent.log" | b"tmp" => true,
            b"preserved" | b"undo" | b"packs" | b"quarantine" => {
                let inner = private(&String::from_utf8_lossy(entry.name.as_bytes()));
                let inner = site.dir(&inner)?;
                site.backing.list(&inner).context("list", site.private_path(""))?.is_empty()
            }
            _ => false,
        };
        if !harmless {
            return Err(Error::Damaged {
                what: format!("the store in {}", site.path.display()),
                detail: format!(
                    "its marker {PRIVATE_DIR}/{MARKER_FILE} is missing, but {PRIVATE_DIR}/{} is \
                     there",
                    entry.name
                ),
                remedy: "Put the marker back from a backup; or, if another backing of the store is \
                         whole, move this backing's files with .rearview elsewhere and mount \
                         both with --init: the empty directory is filled from the other",
            });
        }
    }
    Ok(())
}

pub(super) fn check_apart(one: &Path, other: &Path) -> Result<()> {
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    let same = one == other || identity(one).is_some_and(|own| identity(other) == Some(own));
    if same {
        return Err(Error::Refused(format!(
            "{} and {} are the same directory: two copies there would be one",
            one.display(),
            other.display()
        )));
    }
    let other_identity = identity(other);
    for above in one.ancestors().skip(1) {
        if above == other || other_identity.is_some() && identity(above) == other_identity {
            return Err(Error::Refused(format!(
                "the backing {} lies inside the backing {}: give directories that lie apart",
                one.display(),
                other.display()
            )));
        }
    }
    Ok(())
}

/// Applies the rules about the store as a whole.
pub fn decide(candidates: &[Candidate], init: bool) -> Result<Plan> {
    let mut replicas = Vec::new();
    for one in candidates {
        if let Found::Replica(marker) = &one.found {
            replicas.push((one, marker.as_ref()));
        }
    }
    let Some(&(first, first_marker)) = replicas.first() else { return decide_new(candidates) };
    for (index, &(one, marker)) in replicas.iter().enumerate() {
        if marker.store != first_marker.store {
            return Err(Error::Refused(format!(
                "{} belongs to another store ({}) than {} ({}): mount them apart, or give an empty \
                 directory instead",
                one.path.display(),
                marker.store,
                first.path.display(),
                first_marker.store
            )));
        }
        if let Some(twin) = replicas[..index].iter().find(|other| other.1.replica == marker.replica)
        {
            return Err(Error::Refused(format!(
                "{} is a plain copy of the backing {} and has the same identity: give one of them, \
                 and an empty directory for the other to be filled",
                one.path.display(),
                twin.0.path.display()
            )));
        }
    }
    let markers: Vec<&Marker> = replicas.iter().map(|(_, marker)| *marker).collect();
    let replacing = check_joining(candidates, &markers, &first.path, init)?;
    let adopting = markers.iter().any(|marker| marker.phase == Phase::Adopting);
    if init && !adopting && !replacing {
        return Err(Error::Refused(format!(
            "{} already holds a store ({}): mount it without --init",
            first.path.display(),
            first_marker.store
        )));
    }
    Ok(Plan::Open)
}

/// Those without a marker may join only if no replica is expected where they are, or if they are
/// meant to take its place (`init`). Tells whether one does.
fn check_joining(
    candidates: &[Candidate],
    markers: &[&Marker],
    store_at: &Path,
    init: bool,
) -> Result<bool> {
    let mut replacing = false;
    let present: BTreeSet<Uuid> = markers.iter().map(|marker| marker.replica).collect();
    for one in candidates {
        if matches!(one.found, Found::Replica(_)) {
            continue;
        }
        let place = record_path(&one.path);
        let expected = markers
            .iter()
            .flat_map(|marker| &marker.peers)
            .find(|peer| peer.path == place && !present.contains(&peer.replica));
        let has_files = matches!(one.found, Found::Files);
        if expected.is_some() && init && !has_files {
            replacing = true;
            continue;
        }
        if let Some(peer) = expected {
            return Err(Error::Refused(format!(
                "{} has no store marker, but replica '{}' of the store in {} was last there: is \
                 its disk mounted? (to give that replica up and fill the empty directory in its \
                 place, mount with --init)",
                one.path.display(),
                crate::types::escape(peer.label.as_bytes()),
                store_at.display()
            )));
        }
        if has_files {
            return Err(Error::Refused(format!(
                "{} has files and is no replica of the store in {}: give an empty directory, which \
                 is then filled, or move the files away first",
                one.path.display(),
                store_at.display()
            )));
        }
    }
    Ok(replacing)
}

fn decide_new(candidates: &[Candidate]) -> Result<Plan> {
    let with_files: Vec<usize> = (0..candidates.len())
        .filter(|&index| matches!(candidates[index].found, Found::Files))
        .collect();
    let Some((&source, others)) = with_files.split_first() else {
        return Ok(Plan::Create { source: 0 });
    };
    for &other in others {
        let (Some(a), Some(b)) = (&candidates[source].site, &candidates[other].site) else {
            unreachable!("a directory with files is open")
        };
        if !fill::quick_equal(a, b)? {
            return Err(Error::Refused(format!(
                "{} and {} both have files, which differ, and neither holds a store: give one with \
                 the files to keep and empty directories for its copies",
                a.path.display(),
                b.path.display()
            )));
        }
    }
    Ok(Plan::Create { source })
}

/// A path as markers record it.
pub fn record_path(path: &Path) -> String {
    crate::types::escape(path.as_os_str().as_bytes())
}

/// Makes the directory of an absent candidate and opens it.
pub fn make(candidate: &Candidate, between: &Between) -> Result<Site> {
    if let Some(site) = &candidate.site {
        return Ok(site.clone());
    }
    let (path, own) = (candidate.path.clone(), between.clone());
    between.within(&candidate.path, move || {
        fs::create_dir(&path).context("make the backing", &path)?;
        let site = Site::open_between(&path, &own)?;
        // The name of the new directory must outlive a power cut as its content does.
        if let Some(parent) = path.parent() {
            let parent = fs::File::open(parent).context("open", parent)?;
            parent.sync_all().context("sync the directory above", &path)?;
        }
        Ok(site)
    })
}

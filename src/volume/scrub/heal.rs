//! Healing live objects. All of it runs under the locks of an operation on the object.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use rustix::io::Errno;

use crate::catalog::digest::{Digest, digest_of};
use crate::error::{Error, Result};
use crate::history::OWN;
use crate::replica::PrivateDir;
use crate::replica::backing::{Access, Backing, Creds, Handle, RenameMode, SetTime};
use crate::store::compare::Aspect;
use crate::store::fill::kept_xattrs;
use crate::store::record::Record;
use crate::store::site::Object;
use crate::types::{ContentId, EntryName, Kind, ReplicaId, Timestamp};
use crate::volume::digest::PIECE_BYTES;
use crate::volume::nodes::{Node, State};
use crate::volume::{Caller, Changes};

use super::live::{Copy, Standing, Verdict, find, judge};
use super::{Outcome, Trouble, Work};

/// Bytes of a name that a name in quarantine keeps.
const NAME_BYTES_KEPT: usize = 150;

/// Where good bytes come from.
pub(super) enum Source {
    /// A file on a replica.
    File(ReplicaId, Handle),
    /// A packed content.
    Packed(ContentId),
}

/// An edited copy in quarantine that is to become a version.
pub(super) struct Edit {
    on: ReplicaId,
    name: EntryName,
    mtime: Timestamp,
    place: std::path::PathBuf,
}

impl Work<'_> {
    /// Heals an object that is no directory. Returns the edits to be taken as versions.
    pub(super) fn heal_object(
        &mut self,
        node: &Arc<Node>,
        state: &mut State,
        standing: &Standing,
        copies: &[Copy],
    ) -> Result<Vec<Edit>> {
        let mut edits = Vec::new();
        // It may be given setuid.
        node.set_unprivileged(false);
        if node.kind == Kind::File {
            match judge(standing, copies) {
                Verdict::Conflict => {
                    for copy in copies {
                        let place = self.volume.place_on(copy.on, &standing.path);
                        self.note(copy.on, &place, Trouble::Conflict, Outcome::Unhealed, "");
                    }
                    return Ok(edits);
                }
                Verdict::Good(good) => {
                    self.heal_content(standing, copies, &good, &mut edits)?;
                }
            }
        } else {
            self.heal_special(standing, copies)?;
        }
        let copies = self.look(standing, false)?;
        self.heal_links(node, standing, &copies)?;
        let copies = self.look(standing, false)?;
        self.heal_attributes(standing, &copies)?;
        // Handles may be of files that were replaced: whoever needs some opens them anew.
        if let Some(open) = state.open.as_mut() {
            open.write = None;
            open.read = None;
        }
        Ok(edits)
    }

    /// Gives every copy that is not good the bytes of one that is.
    fn heal_content(
        &mut self,
        standing: &Standing,
        copies: &[Copy],
        good: &[bool],
        edits: &mut Vec<Edit>,
    ) -> Result<()> {
        if good.iter().all(|good| *good) {
            return Ok(());
        }
        let source = self.source(standing, copies, good)?;
        let expected = standing.digest.or_else(|| {
            copies.iter().zip(good).find(|(_, good)| **good).and_then(|(copy, _)| copy.digest)
        });
        for (copy, _) in copies.iter().zip(good).filter(|(_, good)| !**good) {
            let place = self.volume.place_on(copy.on, &standing.path);
            let trouble = trouble_of(standing, copy);
            let Some(source) = &source else {
                let detail = match standing.digest {
                    Some(_) => "no copy has the recorded bytes",
                    None => "no copy is as recorded",
                };
                self.note(copy.on, &place, trouble, Outcome::Unhealed, detail);
                continue;
            };
            match self.heal_copy(standing, copy, source, expected) {
                Ok(kept) => {
                    let detail = match &kept {
                        Some(name) => format!("the old bytes are in quarantine: {name}"),
                        None => String::new(),
                    };
                    let outcome = match trouble {
                        Trouble::Edited => Outcome::Version,
                        _ => Outcome::Healed,
                    };
                    self.note(copy.on, &place, trouble, outcome, detail);
                    if let (Trouble::Edited, Some(name), Some(object)) =
                        (trouble, kept, &copy.object)
                    {
                        edits.push(Edit { on: copy.on, name, mtime: object.stat.mtime, place });
                    }
                }
                Err(error) => {
                    self.note(copy.on, &place, trouble, Outcome::Unhealed, error.to_string());
                }
            }
        }
        // Of several edits the newest is live in the end.
        edits.sort_by_key(|edit| edit.mtime);
        Ok(())
    }

    /// A proven source of a file's bytes: a good copy, or history.
    fn source(
        &self,
        standing: &Standing,
        copies: &[Copy],
        good: &[bool],
    ) -> Result<Option<Source>> {
        for (copy, _) in copies.iter().zip(good).filter(|(_, good)| **good) {
            let b = self.volume.replicas().backing(copy.on);
            if let Ok(Some((dir, Some(name), _))) = find(&*b, &standing.path)
                && let Ok(file) = b.open_file(&dir, &name, Access::Read)
            {
                return Ok(Some(Source::File(copy.on, file)));
            }
        }
        let Some(digest) = standing.digest else { return Ok(None) };
        let like = self.volume.catalog().packed_like(&digest, standing.record.row.size)?;
        Ok(like.map(Source::Packed))
    }

    /// Heals one copy of a file; the name in quarantine under which the old one lies, if there was
    /// one.
    fn heal_copy(
        &mut self,
        standing: &Standing,
        copy: &Copy,
        source: &Source,
        expected: Option<Digest>,
    ) -> Result<Option<EntryName>> {
        let volume = self.volume;
        let b = volume.replicas().backing(copy.on);
        let size = standing.record.row.size;
        let Some((parent, name)) = standing.path.split_last() else {
            return Err(Error::Posix(Errno::ISDIR));
        };
        let dir = b.open_dir(&parent)?;
        let is_file = copy.object.as_ref().is_some_and(|object| object.stat.kind == Kind::File);
        if is_file {
            // In place, so that it stays the same file for its other names and for who has it open.
            let file = b.open_file(&dir, name, Access::ReadWrite)?;
            let kept = self.keep_copy(copy.on, &file, name)?;
            self.copy_into(source, &*b, &file, size, expected)?;
            b.sync(&file, true)?;
            let node = b.open_node(&dir, name)?;
            set_attributes(&*b, &node, &standing.record)?;
            return Ok(Some(kept));
        }
        let times = b.stat(&dir)?;
        let kept = match &copy.object {
            Some(_) => Some(self.set_aside(copy.on, &dir, name)?),
            None => None,
        };
        let tmp = volume.replicas().private(PrivateDir::Tmp)?;
        let tmp = tmp.get(copy.on)?;
        let made = self.quarantine_name(name);
        let file = b.create(tmp, &made, 0o600, OWN)?;
        let filled = (|| -> Result<()> {
            self.copy_into(source, &*b, &file, size, expected)?;
            b.sync(&file, true)?;
            let node = b.open_node(tmp, &made)?;
            set_attributes(&*b, &node, &standing.record)?;
            Ok(b.rename(tmp, &made, &dir, name, RenameMode::NoReplace)?)
        })();
        if filled.is_err() {
            let _ = b.unlink(tmp, &made);
        }
        filled?;
        b.set_times(&dir, SetTime::To(times.atime), SetTime::To(times.mtime))?;
        Ok(kept)
    }

    /// Makes a file's bytes those of the source, writing only what differs, and checks them: an
    /// error if the source has not the expected ones after all.
    fn copy_into(
        &mut self,
        source: &Source,
        b: &dyn Backing,
        to: &Handle,
        size: u64,
        expected: Option<Digest>,
    ) -> Result<()> {
        let volume = self.volume;
        let mut hasher = blake3::Hasher::new();
        let (mut new, mut old) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
        let mut at = 0;
        while at < size {
            let length = (size - at).min(PIECE_BYTES as u64) as usize;
            let piece = &mut new[..length];
            let got = match source {
                Source::File(on, file) => {
                    volume.replicas().get(*on).backing().read_at(file, piece, at)?
                }
                Source::Packed(id) => {
                    let (replicas, catalog) = (volume.replicas(), volume.catalog());
                    volume.history.read_packed(replicas, catalog, *id, at, piece)?;
                    length
                }
            };
            if got < length {
                return Err(Error::Posix(Errno::IO));
            }
            hasher.update(piece);
            self.run.bytes += length as u64;
            // What is there may be unreadable: then it is written.
            let have = b.read_at(to, &mut old[..length], at).unwrap_or(0);
            let hole = have == 0 && piece.iter().all(|byte| *byte == 0);
            if !hole && (have < length || old[..length] != *piece) {
                b.write_at(to, piece, at)?;
            }
            at += length as u64;
        }
        b.truncate(to, size)?;
        match expected {
            Some(expected) if digest_of(&hasher) != expected => Err(Error::Posix(Errno::IO)),
            _ => Ok(()),
        }
    }

    /// Sets the attributes that differ from the record on some replicas, but not on all of them.
    pub(super) fn heal_attributes(&mut self, standing: &Standing, copies: &[Copy]) -> Result<()> {
        let volume = self.volume;
        let mut differing: Vec<Vec<Aspect>> = copies
            .iter()
            .map(|copy| match &copy.object {
                Some(object) => standing.record.differences(object),
                None => Vec::new(),
            })
            .collect();
        let late = self.is_recorded_late(standing, copies, &differing);
        if late {
            differing.iter_mut().for_each(|all| {
                all.retain(|aspect| *aspect != Aspect::ModificationTime);
            });
            volume.mark_dir(standing.record.row.id);
        }
        let settable = |aspect: &Aspect| {
            matches!(
                aspect,
                Aspect::Mode | Aspect::Owner | Aspect::ModificationTime | Aspect::Xattrs
            )
        };
        for (copy, aspects) in copies.iter().zip(&differing) {
            let mut aspects: Vec<Aspect> = aspects.iter().copied().filter(settable).collect();
            if aspects.is_empty() {
                continue;
            }
            let place = volume.place_on(copy.on, &standing.path);
            let everywhere = |aspect: &Aspect| differing.iter().all(|all| all.contains(aspect));
            let (lost, own): (Vec<_>, Vec<_>) = aspects.drain(..).partition(everywhere);
            if !lost.is_empty() {
                let detail = format!("{lost:?}: on all replicas other than recorded");
                self.note(copy.on, &place, Trouble::Attributes, Outcome::Unhealed, detail);
            }
            if own.is_empty() {
                continue;
            }
            let b = volume.replicas().backing(copy.on);
            let mut wanted = standing.record.clone();
            if let Some(object) = &copy.object {
                keep_aspects(&mut wanted, object, &lost);
                if late {
                    keep_aspects(&mut wanted, object, &[Aspect::ModificationTime]);
                }
            }
            let set = (|| {
                let node = match standing.path.split_last() {
                    Some((parent, name)) => b.open_node(&b.open_dir(&parent)?, name)?,
                    None => b.open_dir(&standing.path)?,
                };
                set_attributes(&*b, &node, &wanted)
            })();
            let (outcome, detail) = match set {
                Ok(()) => (Outcome::Healed, format!("{own:?}")),
                Err(error) => (Outcome::Unhealed, error.to_string()),
            };
            self.note(copy.on, &place, Trouble::Attributes, outcome, detail);
        }
        Ok(())
    }

    /// Whether a directory has another time than the recorded one, the same on all replicas: its
    /// time is recorded a while after it changed.
    fn is_recorded_late(
        &self,
        standing: &Standing,
        copies: &[Copy],
        differing: &[Vec<Aspect>],
    ) -> bool {
        let time = |copy: &Copy| copy.object.as_ref().map(|object| object.stat.mtime);
        standing.record.row.kind == Kind::Dir
            && differing.iter().all(|all| all.contains(&Aspect::ModificationTime))
            && copies.windows(2).all(|pair| time(&pair[0]) == time(&pair[1]))
    }

    /// A name in quarantine that nothing has.
    pub(super) fn quarantine_name(&mut self, name: &EntryName) -> EntryName {
        self.quarantined += 1;
        let mut bytes =
            format!("scrub-{}-{}-", Timestamp::now().as_nanos(), self.quarantined).into_bytes();
        bytes.extend(name.as_bytes().iter().take(NAME_BYTES_KEPT));
        EntryName::new(bytes).expect("a part of a name with digits before it is a name")
    }

    /// Moves an entry to quarantine.
    pub(super) fn set_aside(
        &mut self,
        on: ReplicaId,
        dir: &Handle,
        name: &EntryName,
    ) -> Result<EntryName> {
        self.put_in_quarantine(on, name, |b, quarantine, to| {
            Ok(b.rename(dir, name, quarantine, to, RenameMode::NoReplace)?)
        })
    }

    /// Copies a file to quarantine, as far as it can be read.
    pub(super) fn keep_copy(
        &mut self,
        on: ReplicaId,
        file: &Handle,
        name: &EntryName,
    ) -> Result<EntryName> {
        self.put_in_quarantine(on, name, |b, quarantine, to| {
            let size = b.stat(file)?.size;
            let copy = b.create(quarantine, to, 0o600, OWN)?;
            let mut buffer = vec![0; PIECE_BYTES];
            let mut at = 0;
            while at < size {
                let length = (size - at).min(PIECE_BYTES as u64);
                if let Ok(count) = b.read_at(file, &mut buffer[..length as usize], at)
                    && buffer[..count].iter().any(|byte| *byte != 0)
                {
                    b.write_at(&copy, &buffer[..count], at)?;
                }
                at += length;
            }
            Ok(b.truncate(&copy, size)?)
        })
    }

    /// Lets `put` bring something into the quarantine of a replica, by a name that nothing has.
    fn put_in_quarantine(
        &mut self,
        on: ReplicaId,
        name: &EntryName,
        put: impl FnOnce(&dyn Backing, &Handle, &EntryName) -> Result<()>,
    ) -> Result<EntryName> {
        let to = self.quarantine_name(name);
        let quarantine = self.volume.replicas().private(PrivateDir::Quarantine)?;
        put(self.volume.replicas().get(on).backing(), quarantine.get(on)?, &to)?;
        Ok(to)
    }

    /// Makes an edited copy a version, by the operations that a program would use.
    pub(super) fn adopt(&mut self, node: &Arc<Node>, edit: Edit) -> Result<()> {
        let volume = self.volume;
        let caller = Caller { creds: Creds::DAEMON, pid: 0 };
        let b = volume.replicas().backing(edit.on);
        let adopted = (|| {
            let quarantine = volume.replicas().private(PrivateDir::Quarantine)?;
            let file = b.open_file(quarantine.get(edit.on)?, &edit.name, Access::Read)?;
            volume.open_file(node, true, true, &caller)?;
            let written = (|| {
                let mut buffer = vec![0; PIECE_BYTES];
                let mut at = 0;
                loop {
                    let count = b.read_at(&file, &mut buffer, at)?;
                    volume.write(node, at, &buffer[..count], false, &caller)?;
                    if count < buffer.len() {
                        break;
                    }
                    at += count as u64;
                }
                let mtime = Some(SetTime::To(edit.mtime));
                volume.set_attributes(node, &Changes { mtime, ..Changes::default() }, &caller)?;
                Ok::<(), Error>(())
            })();
            volume.release(node, true)?;
            written
        })();
        if let Err(error) = adopted {
            let detail = format!("it stays in quarantine: {}: {error}", edit.name);
            self.note(edit.on, &edit.place, Trouble::Edited, Outcome::Quarantined, detail);
        }
        Ok(())
    }
}

/// What is wrong with a copy whose bytes are not good.
pub(super) fn trouble_of(standing: &Standing, copy: &Copy) -> Trouble {
    match &copy.object {
        _ if copy.error.is_some() => Trouble::Unreadable,
        None => Trouble::Missing,
        Some(object) if object.stat.kind != standing.record.row.kind => Trouble::Kind,
        Some(object) if object.stat.mtime > standing.record.row.mtime => Trouble::Edited,
        Some(_) => Trouble::Rot,
    }
}

/// Leaves some attributes as they are.
fn keep_aspects(record: &mut Record, object: &Object, aspects: &[Aspect]) {
    for aspect in aspects {
        match aspect {
            Aspect::Mode => record.row.mode = object.stat.mode,
            Aspect::Owner => (record.row.uid, record.row.gid) = (object.stat.uid, object.stat.gid),
            Aspect::ModificationTime => record.row.mtime = object.stat.mtime,
            Aspect::Xattrs => record.xattrs = object.xattrs.clone(),
            _ => {}
        }
    }
}

/// Sets everything but content: owner, extended attributes, mode and time, in this order, for a
/// change of owner clears set-id bits, and all of them move the times.
pub(super) fn set_attributes(b: &dyn Backing, node: &Handle, record: &Record) -> Result<()> {
    let row = &record.row;
    let present = b.stat(node)?;
    if (present.uid, present.gid) != (row.uid, row.gid) {
        b.chown(node, Some(row.uid), Some(row.gid))?;
    }
    let present = Object { stat: b.stat(node)?, xattrs: b.xattrs(node)?, target: Vec::new() };
    let wanted = record.as_object(&present);
    let (wanted, have) = (kept_xattrs(&wanted), kept_xattrs(&present));
    for name in have.keys().filter(|name| !wanted.contains_key(*name)) {
        b.remove_xattr(node, OsStr::from_bytes(name))?;
    }
    for (name, value) in wanted.iter().filter(|(name, value)| have.get(*name) != Some(value)) {
        b.set_xattr(node, OsStr::from_bytes(name), value, 0)?;
    }
    if row.kind != Kind::Symlink {
        b.chmod(node, row.mode)?;
    }
    b.set_times(node, SetTime::Omit, SetTime::To(row.mtime))?;
    Ok(())
}

//! Looking at what is ours: the replicas' catalogs, markers, locks and intent logs, preserved
//! contents, undo segments and packs.
//!
//! While files of history are healed no packing and no sweep runs: what is looked at stays.

use std::io;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;
use rustix::io::Errno;

use crate::catalog::digest::Digest;
use crate::catalog::{Catalog, PackRow, TableHashes, UndoRow, WaitingContent};
use crate::error::{Error, Result};
use crate::history::packs::{pack_dir, pack_name};
use crate::history::ranges::ByteRange;
use crate::history::{OWN, parts_preserved, preserved_dir, preserved_name, undo};
use crate::replica::PrivateDir;
use crate::replica::backing::{Access, Backing, Handle, RenameMode, SetTime};
use crate::sys::device::Alive;
use crate::types::{ContentId, EntryName, ReplicaId};

use super::{Outcome, Trouble, Work};
use crate::volume::maintain::Maintenance;

/// Preserved contents fetched from the catalog at a time.
const BATCH: usize = 1024;
/// How long the packer is waited for, and how often the run's end is looked for meanwhile.
const ALONE_WAIT: Duration = Duration::from_secs(30);
const ALONE_STEP: Duration = Duration::from_millis(100);

/// A segment on one replica: its bytes, and what is wrong with it if they are not whole.
type SegmentCopy = (ReplicaId, Vec<u8>, Trouble);

/// A file of ours on one replica.
struct Kept {
    on: ReplicaId,
    size: Option<u64>,
    digest: Option<Digest>,
    error: Option<io::Error>,
}

impl Kept {
    fn trouble(&self) -> Trouble {
        match (&self.error, self.size) {
            (Some(error), _) if error.kind() != io::ErrorKind::UnexpectedEof => Trouble::Unreadable,
            (None, None) => Trouble::Missing,
            _ => Trouble::Rot,
        }
    }
}

impl<'a> Work<'a> {
    /// The catalogs: each by itself, then against one another. One that is damaged, or stands alone
    /// against two, is replaced by a sound one.
    pub(super) fn catalogs(&mut self) -> Result<()> {
        let volume = self.volume;
        let mut sound = Vec::new();
        let mut damaged = Vec::new();
        for on in volume.replicas().online() {
            let Some(file) = volume.catalog().file(on) else { continue };
            // First the pages as they lie there: then nobody has to guess which copy is right.
            match volume.catalog().rotten_pages(on, &mut |bytes| self.took(bytes)) {
                Err(Error::Interrupted) => return Err(Error::Interrupted),
                Err(error) => {
                    damaged.push((on, file, error.to_string()));
                    continue;
                }
                Ok(pages) if !pages.is_empty() => {
                    let count = pages.len();
                    let text =
                        format!("{count} pages not as they were written, first {}", pages[0]);
                    damaged.push((on, file, text));
                    continue;
                }
                Ok(_) => {}
            }
            let look = self.long_look();
            let audit = Catalog::audit_alive(&file, &look);
            if look.is_ended() {
                return Err(Error::Interrupted);
            }
            self.check_halt()?;
            match audit {
                Ok(audit) if audit.flaws.is_empty() => sound.push((on, file)),
                Ok(audit) => damaged.push((on, file, audit.flaws.join("; "))),
                Err(error) => damaged.push((on, file, error.to_string())),
            }
        }
        if sound.len() > 1 {
            let odd = self.odd_catalogs(&sound)?;
            if let Some(odd) = odd {
                for (on, file) in sound.extract_if(.., |(on, _)| odd.contains(on)) {
                    damaged.push((on, file, "it differs from two other replicas' catalogs".into()));
                }
            } else {
                for (on, file) in &sound {
                    let detail = "the catalogs differ, and each by itself seems sound";
                    self.note(*on, file, Trouble::Conflict, Outcome::Unhealed, detail);
                }
            }
        }
        for (on, file, flaw) in damaged {
            let healed = match sound.first() {
                Some((from, _)) => volume.catalog().replace(on, Some(*from)),
                None => Err(Error::Refused("no replica has a sound catalog".into())),
            };
            let (outcome, detail) = match healed {
                Ok(()) => (Outcome::Healed, flaw),
                Err(error) => (Outcome::Unhealed, format!("{flaw}; {error}")),
            };
            self.note(on, &file, Trouble::Rot, outcome, detail);
        }
        Ok(())
    }

    /// For one look that takes long: it ends when the run does, and then answers nothing.
    fn long_look(&self) -> Alive {
        let alive = Alive::default();
        let mut inner = self.volume.scrub.inner.lock();
        inner.looking = alive.clone();
        if inner.halt || self.volume.is_stopping() {
            alive.end();
        }
        alive
    }

    /// Which of several catalogs differ from the majority: none, some, or `None` if that cannot be
    /// told.
    fn odd_catalogs(
        &mut self,
        sound: &[(ReplicaId, std::path::PathBuf)],
    ) -> Result<Option<Vec<ReplicaId>>> {
        let of: Vec<ReplicaId> = sound.iter().map(|(on, _)| *on).collect();
        // Whoever waits for room may need what the WALs take.
        let mut go_on = || self.check_halt().and_then(|()| self.volume.check_stop());
        let hashes = match self.volume.catalog().table_hashes_at_once(&of, &mut go_on) {
            Ok(Some(hashes)) => hashes,
            other => {
                self.check_halt()?;
                let why = other.err().map(|error| error.to_string()).unwrap_or_default();
                log::info!("scrub: the catalogs were not compared this time: {why}");
                self.run.busy += 1;
                return Ok(Some(Vec::new()));
            }
        };
        let agree = |one: &TableHashes| hashes.iter().filter(|other| *other == one).count();
        let Some(best) = hashes.iter().max_by_key(|one| agree(one)) else {
            return Ok(Some(Vec::new()));
        };
        let odd = sound.iter().zip(&hashes).filter(|(_, one)| *one != best).map(|((on, _), _)| *on);
        let odd: Vec<ReplicaId> = odd.collect();
        let is_known = odd.is_empty() || agree(best) * 2 > hashes.len();
        Ok(is_known.then_some(odd))
    }

    /// Markers, locks and intent logs: what a replica's say is what we wrote.
    pub(super) fn own_files(&mut self) -> Result<()> {
        for (on, path, healed) in self.volume.store.check_own_files() {
            let (outcome, detail) = match healed {
                Ok(()) => (Outcome::Healed, String::new()),
                Err(error) => (Outcome::Unhealed, error.to_string()),
            };
            self.note(on, &path, Trouble::Rot, outcome, detail);
        }
        Ok(())
    }

    /// Preserved contents, from the position on: by their digests, else by the majority.
    pub(super) fn preserved(&mut self) -> Result<()> {
        let catalog = self.volume.catalog();
        let all = catalog.totals()?.whole_bytes();
        // What busy programs overwrite meanwhile is the next run's: else this one might never end.
        let until = catalog.upcoming_content();
        let mut wrapped = false;
        while self.goes_on(all) {
            let mut batch = catalog.preserved_contents(self.at.content, BATCH)?;
            batch.retain(|content| content.id < until);
            if batch.is_empty() {
                if self.run.options.all || wrapped {
                    break;
                }
                (self.at.content, wrapped) = (ContentId::EMPTY, true);
            }
            for content in batch {
                if !self.goes_on(all) {
                    break;
                }
                self.preserved_one(&content)?;
                self.run.history_files += 1;
                self.at.content = content.id;
                self.did(content.size, all)?;
            }
        }
        Ok(())
    }

    fn preserved_one(&mut self, content: &WaitingContent) -> Result<()> {
        let volume = self.volume;
        // The file of an orphan that somebody can still write.
        if volume.is_open_orphan(content.node) {
            self.run.busy += 1;
            return Ok(());
        }
        let dir = preserved_dir(content.node);
        let name = preserved_name(content.node, content.id);
        // The file of an orphan that was changed while it was open may be another, or longer.
        let of = (content.node, content.id);
        let parts = parts_preserved(volume.catalog(), of, content.size)?;
        let all = parts.iter().map(ByteRange::len).sum::<u64>() == content.size;
        let copies = self.read_kept(dir, &name, Some(&parts))?;
        let digest = if all { volume.catalog().digest(content.id)? } else { None };
        let is_good = |copy: &Kept| match digest {
            Some(digest) => copy.digest == Some(digest),
            None => copy.digest.is_some(),
        };
        let good: Vec<&Kept> = copies.iter().filter(|copy| is_good(copy)).collect();
        let agree = good.windows(2).all(|pair| pair[0].digest == pair[1].digest);
        if agree && good.len() == copies.len() {
            return Ok(());
        }
        // Packed or forgotten while it was read.
        if !volume.catalog().is_preserved(content.id)? {
            return Ok(());
        }
        let Some(_alone) = self.alone()? else { return Ok(()) };
        if !volume.catalog().is_preserved(content.id)? {
            return Ok(());
        }
        let winner = match agree {
            true => good.first().map(|copy| (copy.on, copy.digest)),
            // Without a digest more than half of all must agree.
            false => good
                .iter()
                .find(|one| {
                    let same = good.iter().filter(|other| other.digest == one.digest).count();
                    same * 2 > copies.len()
                })
                .map(|copy| (copy.on, copy.digest)),
        };
        for copy in &copies {
            let place = volume.place_on(copy.on, &dir.path().join(&name));
            match winner {
                Some((_, digest)) if copy.digest == digest => {}
                Some((from, _)) => {
                    let healed = self.replace_kept(dir, &name, from, copy.on);
                    self.note_kept(copy.on, &place, copy.trouble(), healed);
                }
                None => {
                    let trouble = if agree { copy.trouble() } else { Trouble::Conflict };
                    self.note(
                        copy.on,
                        &place,
                        trouble,
                        Outcome::Unhealed,
                        "no copy is proven good",
                    );
                }
            }
        }
        Ok(())
    }

    /// Keeps files of history from being packed and removed. `None`, and it counts as busy, where
    /// somebody packs on and on.
    fn alone(&mut self) -> Result<Option<MutexGuard<'a, Maintenance>>> {
        let volume = self.volume;
        let until = Instant::now() + ALONE_WAIT;
        loop {
            if let Some(alone) = volume.maintenance.try_lock_for(ALONE_STEP) {
                return Ok(Some(alone));
            }
            self.check_halt()?;
            if Instant::now() >= until {
                self.run.busy += 1;
                return Ok(None);
            }
        }
    }

    /// Reads a file of ours, or parts of it, on every replica, past the page cache.
    fn read_kept(
        &mut self,
        dir: PrivateDir,
        name: &EntryName,
        parts: Option<&[ByteRange]>,
    ) -> Result<Vec<Kept>> {
        let volume = self.volume;
        let mut copies = Vec::new();
        for on in volume.replicas().online().collect::<Vec<_>>() {
            let b = volume.replicas().backing(on);
            let mut copy = Kept { on, size: None, digest: None, error: None };
            match open_kept(&*b, dir, name) {
                Ok(None) => {}
                Ok(Some((dir, size))) => {
                    copy.size = Some(size);
                    match self.digest_on(&*b, &dir, name, parts)? {
                        Ok(digest) => copy.digest = Some(digest),
                        Err(error) => copy.error = Some(error),
                    }
                }
                Err(error) => copy.error = Some(error),
            }
            copies.push(copy);
        }
        Ok(copies)
    }

    /// Puts another replica's file in the place of one, which goes to quarantine if it is there.
    fn replace_kept(
        &mut self,
        dir: PrivateDir,
        name: &EntryName,
        from: ReplicaId,
        to: ReplicaId,
    ) -> Result<Option<EntryName>> {
        let volume = self.volume;
        let source_replica = volume.replicas().get(from);
        let source = source_replica.backing();
        let (handle, size) = open_kept(source, dir, name)?.ok_or(Error::Posix(Errno::IO))?;
        let file = source.open_file(&handle, name, Access::Read)?;
        let stat = source.stat(&file)?;
        self.put_kept(dir, name, to, |b, made| {
            let mut buffer = vec![0; crate::volume::digest::PIECE_BYTES];
            let mut at = 0;
            while at < size {
                let count = source.read_at(&file, &mut buffer, at)?;
                if count == 0 {
                    return Err(Errno::IO.into());
                }
                if buffer[..count].iter().any(|byte| *byte != 0) {
                    b.write_at(made, &buffer[..count], at)?;
                }
                at += count as u64;
            }
            b.truncate(made, size)?;
            b.chown(made, Some(stat.uid), Some(stat.gid))?;
            b.chmod(made, stat.mode)?;
            b.set_times(made, SetTime::Omit, SetTime::To(stat.mtime))
        })
    }

    /// Makes a file of ours anew on one replica. Dead at any step, either the old one is there, or
    /// it is in quarantine and the next scrub makes the file again.
    fn put_kept(
        &mut self,
        dir: PrivateDir,
        name: &EntryName,
        on: ReplicaId,
        fill: impl FnOnce(&dyn Backing, &Handle) -> io::Result<()>,
    ) -> Result<Option<EntryName>> {
        let volume = self.volume;
        let b = volume.replicas().backing(on);
        let tmp = volume.replicas().private(PrivateDir::Tmp)?;
        let tmp = tmp.get(on)?;
        let _ = b.unlink(tmp, name);
        let file = b.create(tmp, name, 0o600, OWN)?;
        if let Err(error) = fill(&*b, &file).and_then(|()| b.sync(&file, false)) {
            let _ = b.unlink(tmp, name);
            return Err(error.into());
        }
        let there = open_kept(&*b, dir, name)?.is_some();
        // The kept handle may be of a directory that is gone: by its path, made where missing.
        let parent = crate::replica::handles::open_private(&*b, dir)?;
        let kept = if there { Some(self.set_aside(on, &parent, name)?) } else { None };
        b.rename(tmp, name, &parent, name, RenameMode::NoReplace)?;
        b.sync(&parent, false)?;
        Ok(kept)
    }

    fn note_kept(
        &mut self,
        on: ReplicaId,
        place: &std::path::Path,
        trouble: Trouble,
        healed: Result<Option<EntryName>>,
    ) {
        match healed {
            Ok(None) => self.note(on, place, trouble, Outcome::Healed, ""),
            Ok(Some(name)) => {
                let detail = format!("the old one is in quarantine: {name}");
                self.note(on, place, trouble, Outcome::Healed, detail);
            }
            Err(error) => self.note(on, place, trouble, Outcome::Unhealed, error.to_string()),
        }
    }

    /// Undo segments that nobody appends to any more: every before-image that the catalog has in
    /// one lies in a whole record of it, on every replica. Records carry their own hashes, so what
    /// is damaged here and whole there is put together from both.
    pub(super) fn segments(&mut self) -> Result<()> {
        let volume = self.volume;
        if volume.history.undo().open_bytes() > 0 {
            // So that what was appended up to now is looked at as well.
            volume.history.undo().rotate(volume.replicas())?;
        }
        let complete = volume.history.undo().complete(volume.replicas())?;
        let mut segments = volume.catalog().segments()?;
        let open_from = complete.last().copied().unwrap_or(0);
        // A segment that is missing everywhere is in the catalog alone.
        segments.retain(|segment| *segment <= open_from || !complete.is_empty());
        segments.retain(|segment| complete.contains(segment) || *segment < open_from);
        for segment in segments {
            self.segment(segment)?;
            self.run.history_files += 1;
        }
        Ok(())
    }

    fn segment(&mut self, segment: u64) -> Result<()> {
        let (rows, copies) = self.read_segment(segment)?;
        let whole = |bytes: &[u8]| undo::missing(bytes, &rows).is_empty();
        if copies.iter().all(|(_, bytes, _)| whole(bytes) && *bytes == copies[0].1) {
            return Ok(());
        }
        // It may have been packed and removed while it was read.
        match self.alone()? {
            Some(_alone) => self.heal_segment(segment),
            None => Ok(()),
        }
    }

    /// The before-images in a segment, and its bytes on every replica with what is wrong if they
    /// are not whole.
    fn read_segment(&mut self, segment: u64) -> Result<(Vec<UndoRow>, Vec<SegmentCopy>)> {
        let volume = self.volume;
        let rows = volume.catalog().segment_rows(segment)?;
        let mut copies = Vec::new();
        if rows.is_empty() {
            return Ok((rows, copies));
        }
        let name = undo::segment_name(segment);
        for on in volume.replicas().online().collect::<Vec<_>>() {
            let b = volume.replicas().backing(on);
            let read = (|| {
                let Some((dir, size)) = open_kept(&*b, PrivateDir::Undo, &name)? else {
                    return Ok(None);
                };
                let file = b.open_file(&dir, &name, Access::Read)?;
                b.forget_cached(&file);
                let mut bytes = vec![0; size.min(undo::SEGMENT_BYTES_READ_MAX) as usize];
                let got = b.read_at(&file, &mut bytes, 0)?;
                bytes.truncate(got);
                Ok::<_, io::Error>(Some(bytes))
            })();
            let (bytes, trouble) = match read {
                Ok(Some(bytes)) => (bytes, Trouble::Rot),
                Ok(None) => (Vec::new(), Trouble::Missing),
                Err(_) => (Vec::new(), Trouble::Unreadable),
            };
            self.took(bytes.len() as u64)?;
            copies.push((on, bytes, trouble));
        }
        Ok((rows, copies))
    }

    /// As [`Work::segment`], while nothing is packed.
    fn heal_segment(&mut self, segment: u64) -> Result<()> {
        let volume = self.volume;
        let name = undo::segment_name(segment);
        let (rows, copies) = self.read_segment(segment)?;
        let count = |bytes: &[u8]| undo::missing(bytes, &rows).len();
        let best = copies.iter().min_by_key(|(_, bytes, _)| count(bytes));
        let Some(mut whole) = best.map(|(_, bytes, _)| bytes.clone()) else { return Ok(()) };
        for (_, bytes, _) in &copies {
            undo::complete_from(&mut whole, bytes, &rows);
        }
        let lost = count(&whole);
        for (on, bytes, trouble) in &copies {
            let own = count(bytes);
            if own == 0 && (lost > 0 || *bytes == whole) {
                continue;
            }
            let place = volume.place_on(*on, &PrivateDir::Undo.path().join(&name));
            if own == lost && lost > 0 {
                let detail = format!("{lost} before-images are whole on no replica");
                self.note(*on, &place, *trouble, Outcome::Unhealed, detail);
                continue;
            }
            let healed =
                self.put_kept(PrivateDir::Undo, &name, *on, |b, file| b.write_at(file, &whole, 0));
            self.note_kept(*on, &place, *trouble, healed);
        }
        Ok(())
    }

    /// Packs, from the position on.
    pub(super) fn packs(&mut self) -> Result<()> {
        let packs = self.volume.catalog().packs()?;
        let all = self.volume.catalog().totals()?.packed_bytes;
        let (before, after) = packs.split_at(packs.partition_point(|row| row.id <= self.at.pack));
        let before = if self.run.options.all { &[] } else { before };
        for row in after.iter().chain(before) {
            if !self.goes_on(all) {
                break;
            }
            self.pack(row)?;
            self.run.history_files += 1;
            self.at.pack = row.id;
            self.did(row.bytes, all)?;
        }
        Ok(())
    }

    /// One pack: every byte, by the recorded hash of the file.
    fn pack(&mut self, row: &PackRow) -> Result<()> {
        let volume = self.volume;
        let (dir, name) = (pack_dir(row.id), pack_name(row.id));
        let digest = crate::catalog::digest::first_half(&row.hash);
        let copies = self.read_kept(dir, &name, None)?;
        if copies.iter().all(|copy| copy.digest == Some(digest)) {
            return Ok(());
        }
        // It may have been packed anew and removed meanwhile, and before nobody packs as well.
        let is_there = || -> Result<bool> {
            Ok(volume.catalog().packs()?.iter().any(|pack| pack.id == row.id))
        };
        if !is_there()? {
            return Ok(());
        }
        let Some(_alone) = self.alone()? else { return Ok(()) };
        if !is_there()? {
            return Ok(());
        }
        let good = copies.iter().find(|copy| copy.digest == Some(digest)).map(|copy| copy.on);
        for copy in copies.iter().filter(|copy| copy.digest != Some(digest)) {
            let place = volume.place_on(copy.on, &dir.path().join(&name));
            match good {
                Some(from) => {
                    let healed = self.replace_kept(dir, &name, from, copy.on);
                    volume.history.packs().reopen(row.id);
                    self.note_kept(copy.on, &place, copy.trouble(), healed);
                }
                None => {
                    let detail = "no replica has this pack whole";
                    self.note(copy.on, &place, copy.trouble(), Outcome::Unhealed, detail);
                }
            }
        }
        Ok(())
    }
}

/// A directory of ours and a file's size in it; `None` where either is not there.
fn open_kept(
    b: &dyn Backing,
    dir: PrivateDir,
    name: &EntryName,
) -> io::Result<Option<(Handle, u64)>> {
    let dir = match b.open_dir(&dir.path()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        dir => dir?,
    };
    match b.stat_at(&dir, name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        stat => Ok(Some((dir, stat?.size))),
    }
}

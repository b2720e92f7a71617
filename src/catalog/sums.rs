//! Sums of a catalog's pages: by which rot in the database is found, and which copy is the good one
//! is known. SQLite's own check sees broken trees only, not a flipped bit in a value.
//!
//! The database changes only when the WAL is copied into it, and then only in the pages that the
//! WAL has. Every commit's pages are noted from the WAL, and their sums taken anew once it is
//! wholly copied, a few after each commit; those of all others stay, whoever changes them. A page
//! that was changed already when a commit came to it may have been read for it: its old sum stays,
//! so that the copy is known to be doubtful although its pages are as they were written.
//!
//! A page whose sum is not known, as after an unclean end, is believed when it is looked at first.
//!
//! # Format of `catalog.db.sums`, version 1
//! Written at a clean end, when the WAL is empty, and gone while the catalog is open; numbers are
//! little endian.
//!
//! | bytes | what |
//! |--|--|
//! | 0..4 | magic `RVCS` |
//! | 4..8 | version of the format, 1 |
//! | 8..40 | the chain of the catalog's head then: with another one the sums say nothing |
//! | 40.. | of each page of 4 KiB the first 8 bytes of its BLAKE3; 0: not known |
//! | the last 32 | BLAKE3 of all before |

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::commit::Writer;
use super::database::{Db, Place};
use super::failure::Failure;
use crate::error::{IoContext, Result};
use crate::sys::device::Alive;
use crate::types::ReplicaId;

const MAGIC: [u8; 4] = *b"RVCS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
const HASH_BYTES: usize = 32;
const PAGE_BYTES: usize = 4096;
/// What the name of the file with the sums ends with.
pub(super) const SUFFIX: &str = ".sums";
/// Header of a WAL, and of a frame in it (<https://sqlite.org/fileformat2.html>, section 4.1).
const WAL_HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 24;
/// Pages that are looked at between two commits: some 4 ms.
const SLICE_PAGES: usize = 1024;
/// Pages whose sums are taken between two commits: below a millisecond.
const SUMMED_PAGES: usize = 256;

/// The sums of one database that is open for writing.
pub(super) struct Sums {
    place: Place,
    /// Open as long as the database is: closing it takes SQLite's locks on the file away.
    file: File,
    wal: Option<File>,
    /// Which round of the WAL was noted, and up to where.
    noted: ([u8; 8], u64),
    /// 0: not known.
    pages: Vec<u64>,
    /// Pages in the WAL.
    changed: BTreeSet<usize>,
    /// Pages that the WAL was copied into, and whose sums are not known again.
    copied: BTreeSet<usize>,
    /// Pages that were not as they had been written when a commit came to them.
    doubtful: BTreeSet<usize>,
}

/// Never 0.
fn sum(page: &[u8]) -> u64 {
    number(&blake3::hash(page).as_bytes()[..8]).max(1)
}

fn number(eight: &[u8]) -> u64 {
    eight.try_into().map(u64::from_le_bytes).unwrap_or_default()
}

impl Sums {
    /// Sums of an open database, of which none is known.
    pub fn of(db: &Db) -> Result<Sums> {
        let place = db.place().beside("")?;
        let file = place.open()?.ok_or(rustix::io::Errno::NOENT)?;
        Ok(Sums {
            place,
            file,
            wal: None,
            noted: ([0; 8], WAL_HEADER_BYTES as u64),
            pages: Vec::new(),
            changed: BTreeSet::new(),
            copied: BTreeSet::new(),
            doubtful: BTreeSet::new(),
        })
    }

    /// Takes up the sums that the last clean end left, if they are of the catalog with this chain;
    /// with `None` they are of no use.
    pub fn take_up(&mut self, chain: Option<&[u8; 32]>) -> Result<()> {
        let left = self.place.beside(SUFFIX)?;
        if let Some(chain) = chain {
            self.pages = left_sums(&left, self.file.metadata()?.len(), chain)?.unwrap_or_default();
        }
        // From here on the database changes.
        left.remove()
    }

    /// Leaves the sums for the next mount. Torn or lost, they say nothing.
    pub fn leave(&mut self, chain: &[u8; 32]) -> Result<()> {
        self.settle()?;
        while self.has_copied() {
            self.sum_some()?;
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.pages.len() * 8 + HASH_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(chain);
        self.pages.iter().for_each(|page| bytes.extend(page.to_le_bytes()));
        let hash = blake3::hash(&bytes);
        bytes.extend(hash.as_bytes());
        self.place.beside(SUFFIX)?.write(&bytes)
    }

    /// Notes the pages of what was committed since the last time, and tells how many the WAL got.
    /// `quiet` tells that nothing is being copied from it.
    pub fn note(&mut self, quiet: bool) -> Result<usize> {
        if self.wal.is_none() {
            self.wal = self.place.beside("-wal")?.open()?;
        }
        let Some(wal) = &self.wal else { return Ok(0) };
        let mut header = [0; WAL_HEADER_BYTES];
        if wal.read_at(&mut header, 0)? < WAL_HEADER_BYTES {
            return Ok(0);
        }
        let salt: &[u8] = &header[16..24];
        if self.noted.0 != salt {
            self.noted.0.copy_from_slice(salt);
            self.noted.1 = WAL_HEADER_BYTES as u64;
        }
        let mut frame = [0; FRAME_HEADER_BYTES];
        let mut page = vec![0; PAGE_BYTES];
        let mut count = 0;
        while wal.read_at(&mut frame, self.noted.1)? == FRAME_HEADER_BYTES && frame[8..16] == *salt
        {
            let number = frame[..4].try_into().map(u32::from_be_bytes).unwrap_or_default();
            let index = (number as usize).saturating_sub(1);
            let known = self.pages.get(index).copied().unwrap_or(0);
            if self.changed.insert(index) && quiet && known != 0 {
                self.file.read_exact_at(&mut page, (index * PAGE_BYTES) as u64)?;
                if sum(&page) != known {
                    self.doubtful.insert(index);
                }
            }
            self.noted.1 += (FRAME_HEADER_BYTES + PAGE_BYTES) as u64;
            count += 1;
        }
        Ok(count)
    }

    /// The WAL is wholly in the database: the sums of its pages have to be taken anew.
    pub fn settle(&mut self) -> Result<()> {
        let count = (self.file.metadata()?.len() / PAGE_BYTES as u64) as usize;
        self.pages.resize(count, 0);
        let mut copied = std::mem::take(&mut self.changed);
        copied.retain(|index| *index < count && !self.doubtful.contains(index));
        copied.iter().for_each(|&index| self.pages[index] = 0);
        self.copied.append(&mut copied);
        Ok(())
    }

    /// Whether sums have to be taken.
    pub fn has_copied(&self) -> bool {
        !self.copied.is_empty()
    }

    /// Takes the sums of some pages that the WAL was copied into. One that is being changed again
    /// gets a sum that says nothing, and is settled after all others are.
    pub fn sum_some(&mut self) -> Result<()> {
        let mut page = vec![0; PAGE_BYTES];
        for _ in 0..SUMMED_PAGES {
            let Some(index) = self.copied.pop_first() else { break };
            if self.pages.get(index) == Some(&0) {
                self.file.read_exact_at(&mut page, (index * PAGE_BYTES) as u64)?;
                self.pages[index] = sum(&page);
            }
        }
        Ok(())
    }

    /// Looks at some pages from `from` on as the device has them. Tells which are not as they were
    /// written, and how many there were.
    fn look(&mut self, from: usize) -> Result<(Vec<usize>, usize)> {
        let count = (self.file.metadata()?.len() / PAGE_BYTES as u64) as usize;
        let slice = count.saturating_sub(from).min(SLICE_PAGES);
        if slice == 0 && self.pages.len() > count {
            // It was cut off.
            return Ok((vec![count], 0));
        }
        self.pages.resize(count.max(self.pages.len()), 0);
        let mut bytes = vec![0; slice * PAGE_BYTES];
        let at = (from * PAGE_BYTES) as u64;
        let length = std::num::NonZero::new(bytes.len() as u64);
        // What is not on the device yet stays cached.
        let _ = rustix::fs::fadvise(&self.file, at, length, rustix::fs::Advice::DontNeed);
        self.file.read_exact_at(&mut bytes, at).context("read", self.place.shown())?;
        let mut found = Vec::new();
        for (index, page) in (from..).zip(bytes.chunks_exact(PAGE_BYTES)) {
            let known = self.pages[index];
            if self.doubtful.contains(&index) {
                found.push(index);
            } else if self.changed.contains(&index) {
                continue;
            } else if known == 0 {
                self.pages[index] = sum(page);
            } else if sum(page) != known {
                found.push(index);
            }
        }
        Ok((found, slice))
    }
}

/// The sums that lie in a file, if they are of a database of so many bytes and with this chain.
fn left_sums(left: &Place, size: u64, chain: &[u8; 32]) -> Result<Option<Vec<u64>>> {
    let Some(file) = left.open()? else { return Ok(None) };
    let length = file.metadata().context("look at", left.shown())?.len();
    // More than the database has pages is none of ours.
    if length > size / PAGE_BYTES as u64 * 8 + (HEADER_BYTES + HASH_BYTES) as u64 {
        return Ok(None);
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).context("read", left.shown())?;
    Ok(decode(&bytes, chain))
}

fn decode(bytes: &[u8], chain: &[u8; 32]) -> Option<Vec<u64>> {
    let (body, hash) = bytes.split_at_checked(bytes.len().checked_sub(HASH_BYTES)?)?;
    let (header, pages) = body.split_at_checked(HEADER_BYTES)?;
    let known = header[..4] == MAGIC
        && header[4..8] == VERSION.to_le_bytes()
        && header[8..] == chain[..]
        && blake3::hash(body).as_bytes() == hash
        && pages.len().is_multiple_of(8);
    known.then(|| pages.chunks_exact(8).map(number).collect())
}

impl Writer {
    /// Does something with the sums. Where that fails nothing is lost but what was known of rot.
    pub(super) fn with_sums(&mut self, work: impl FnOnce(&mut Sums) -> Result<()>) {
        if let Some(Err(error)) = self.sums.as_mut().map(work) {
            log::warn!("the sums of a catalog's pages are given up: {error}");
            self.sums = None;
        }
    }
}

impl super::Catalog {
    /// The pages, from 0, of the database in `file`, which nobody has open, that are not as they
    /// were written up to its last clean end; none where that left no sums. `chain` is its head's.
    pub fn rotten_at_rest(file: &Path, chain: &[u8; 32], alive: &Alive) -> Result<Vec<usize>> {
        let place = Place::of(file)?;
        let database = place.beside("")?.open()?.ok_or(rustix::io::Errno::NOENT)?;
        let size = database.metadata().context("look at", file)?.len();
        let sums = left_sums(&place.beside(SUFFIX)?, size, chain)?.unwrap_or_default();
        let mut page = vec![0; PAGE_BYTES];
        let mut rotten = Vec::new();
        for (index, known) in sums.into_iter().enumerate().filter(|(_, known)| *known != 0) {
            let there = database.read_exact_at(&mut page, (index * PAGE_BYTES) as u64);
            if there.is_err() || sum(&page) != known {
                rotten.push(index);
            }
            alive.tell();
        }
        Ok(rotten)
    }

    /// The pages of a replica's database, from 0, that are not as they were written. Little is
    /// looked at between two commits; `step` is told how many bytes, and may end the work.
    pub fn rotten_pages(
        &self,
        replica: ReplicaId,
        step: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Vec<usize>> {
        let shared = &self.shared;
        let (mut rotten, mut from) = (Vec::new(), 0);
        loop {
            let looked = {
                let mut writers = shared.writers.lock();
                let Some(mut writer) = writers[replica].take() else { return Ok(rotten) };
                let device = writer.device;
                let turn = shared.lanes.begin(replica, device, move || {
                    let looked = writer.sums.as_mut().map(|sums| sums.look(from));
                    (writer, looked)
                });
                let Some((writer, looked)) = shared.lanes.wait(replica, turn) else {
                    shared.detach(replica, Some(Failure::Hangs));
                    return Ok(rotten);
                };
                writers[replica] = Some(writer);
                looked
            };
            let Some((found, count)) = looked.transpose()? else { return Ok(rotten) };
            rotten.extend(found);
            if count == 0 {
                return Ok(rotten);
            }
            from += count;
            step((count * PAGE_BYTES) as u64)?;
        }
    }
}

//! What is left of history where every catalog is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::{Member, RebuildReport};
use crate::catalog::VersionRecord;
use crate::check::finding;
use crate::error::{IoContext, Result};
use crate::history::journal::{PARTS_MAX, Parts, Record};
use crate::history::pack::{PACK_BYTES_MAX, PackedChunk, scan};
use crate::history::packs::{pack_dir, parse_pack_name};
use crate::history::undo::{overwritten, parse_segment_name, read_segment};
use crate::history::{parse_preserved_name, preserved_dir};
use crate::progress::Progress;
use crate::replica::backing::Access;
use crate::store::site::private;
use crate::types::{ContentId, EntryName, NodeId, PackId, Timestamp};

/// A whole pack and its chunks.
pub(super) struct FoundPack {
    pub id: PackId,
    pub bytes: u64,
    pub hash: [u8; 32],
    pub chunks: Vec<PackedChunk>,
}

/// What is left of history.
#[derive(Default)]
pub(super) struct Found {
    pub packs: Vec<FoundPack>,
    pub versions: BTreeMap<(NodeId, ContentId), VersionRecord>,
    /// As far as no part is missing; which are whole their sizes tell.
    pub recipes: BTreeMap<ContentId, Parts>,
    /// Their parts, by the number of the first one.
    pieces: BTreeMap<ContentId, BTreeMap<u64, Parts>>,
    /// The files in `preserved/`.
    pub preserved: BTreeSet<(NodeId, ContentId)>,
    /// Contents with before-images: what lies in a file of theirs is not all that they had. A
    /// journal does not tell of holes, so they cannot be put together again.
    pub overwritten: BTreeSet<(NodeId, ContentId)>,
}

impl Found {
    pub(super) fn read(
        member: &Member,
        again: bool,
        report: &mut RebuildReport,
        progress: &Progress,
    ) -> Result<Found> {
        let mut found = Found::default();
        progress.begin(&format!("Reading the packs of {}", member.site.path.display()), 0, 0);
        let read = found.read_packs(member, report, progress);
        progress.end();
        read?;
        found.join_recipes();
        found.read_preserved(member)?;
        found.read_segments(member, again, report)?;
        Ok(found)
    }

    fn read_packs(
        &mut self,
        member: &Member,
        report: &mut RebuildReport,
        progress: &Progress,
    ) -> Result<()> {
        let site = &member.site;
        for shard in 0..=255 {
            let dir = pack_dir(PackId(shard)).path();
            let Ok(handle) = site.backing.open_dir(&dir) else { continue };
            let mut names = site.backing.list(&handle).context("list", site.at(&dir))?;
            names.sort_unstable_by(|a, b| a.name.cmp(&b.name));
            for entry in names {
                let Some(id) = parse_pack_name(&entry.name) else { continue };
                let place = site.at(&dir.join(&entry.name));
                let read = (|| {
                    let file = site.backing.open_file(&handle, &entry.name, Access::Read)?;
                    let size = site.backing.stat(&file)?.size.min(PACK_BYTES_MAX + 1);
                    let mut bytes = vec![0; size as usize];
                    let got = site.backing.read_at(&file, &mut bytes, 0)?;
                    bytes.truncate(got);
                    Ok::<_, std::io::Error>(bytes)
                })();
                let bytes = read.context("read", &place)?;
                progress.advance(1, bytes.len() as u64)?;
                match scan(&bytes) {
                    Ok(scanned) if (scanned.store, scanned.id) == (member.marker.store, id) => {
                        report.packs += 1;
                        self.records(scanned.records);
                        let hash = *blake3::hash(&bytes).as_bytes();
                        let (bytes, chunks) = (bytes.len() as u64, scanned.chunks);
                        self.packs.push(FoundPack { id, bytes, hash, chunks });
                    }
                    Ok(_) => report.unknown.push(finding(&place, "it is another pack".into())),
                    Err(flaw) => report.unknown.push(finding(&place, flaw.to_string())),
                }
            }
        }
        self.packs.sort_unstable_by_key(|pack| pack.id);
        Ok(())
    }

    fn records(&mut self, records: Vec<Record>) {
        let mut last = None;
        for record in records {
            match record {
                Record::Version(version) => {
                    self.versions.insert((version.node, version.content), version);
                }
                Record::Recipe { id, first, parts } => {
                    // Before records told it, one without a number continued the one before it.
                    let first = match last {
                        Some((of, end, PARTS_MAX)) if of == id && first == 0 => end,
                        _ => first,
                    };
                    last = Some((id, first + parts.len() as u64, parts.len()));
                    self.pieces.entry(id).or_default().insert(first, parts);
                }
                Record::Image(image) => {
                    self.overwritten.insert((image.node, image.content));
                }
            }
        }
    }

    fn join_recipes(&mut self) {
        for (id, pieces) in std::mem::take(&mut self.pieces) {
            let mut recipe = Parts::new();
            for (first, parts) in pieces {
                if first == recipe.len() as u64 {
                    recipe.extend(parts);
                }
            }
            self.recipes.insert(id, recipe);
        }
    }

    fn read_preserved(&mut self, member: &Member) -> Result<()> {
        let site = &member.site;
        for shard in 0..=255 {
            let dir = preserved_dir(NodeId(shard)).path();
            let Ok(handle) = site.backing.open_dir(&dir) else { continue };
            for entry in site.backing.list(&handle).context("list", site.at(&dir))? {
                self.preserved.extend(parse_preserved_name(&entry.name));
            }
        }
        Ok(())
    }

    /// If this is done `again`, those that were set aside before tell the same.
    fn read_segments(
        &mut self,
        member: &Member,
        again: bool,
        report: &mut RebuildReport,
    ) -> Result<()> {
        let site = &member.site;
        let aside = again.then(|| private("quarantine"));
        for dir in [private("undo")].into_iter().chain(aside) {
            let handle = match site.backing.open_dir(&dir) {
                Ok(handle) => handle,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    let what = format!("which before-images lie there: {error}");
                    report.unknown.push(finding(&site.at(&dir), what));
                    continue;
                }
            };
            for entry in site.backing.list(&handle).context("list", site.at(&dir))? {
                if parse_segment_name(&entry.name).is_none() && !is_segment_set_aside(&entry.name) {
                    continue;
                }
                match read_segment(&*site.backing, &handle, &entry.name) {
                    Ok(bytes) => self.overwritten.extend(overwritten(&bytes)),
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                        return Err(error).context("read", site.at(&dir.join(&entry.name)));
                    }
                    Err(error) => {
                        let what = format!("whose before-images it has: {error}");
                        report.unknown.push(finding(&site.at(&dir.join(&entry.name)), what));
                    }
                }
            }
        }
        Ok(())
    }

    /// The earliest moment that anything tells of.
    pub(super) fn first_time(&self) -> i64 {
        let now = Timestamp::now().as_nanos();
        self.versions.values().map(|version| version.born.as_nanos()).fold(now, i64::min).max(1)
    }
}

/// The name that [`super::set_aside_unused`] gives a segment.
fn is_segment_set_aside(name: &EntryName) -> bool {
    let segment = |text: &str| {
        let (_, own) = text.strip_prefix("rebuild-")?.split_once('-')?;
        parse_segment_name(&EntryName::new(own).ok()?)
    };
    std::str::from_utf8(name.as_bytes()).ok().and_then(segment).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_is_put_together_of_what_several_journals_have() {
        let id = ContentId(7);
        let all: Parts = (0..3 * PARTS_MAX as u32 + 5).map(|length| (None, length)).collect();
        let piece = |number: usize| {
            let parts: Parts =
                all.chunks(PARTS_MAX).nth(number).into_iter().flatten().copied().collect();
            Record::Recipe { id, first: (number * PARTS_MAX) as u64, parts }
        };
        let mut found = Found::default();
        // One of them twice, as after a copy that was interrupted.
        for journal in [vec![piece(1), piece(3)], vec![piece(0), piece(1)], vec![piece(2)]] {
            found.records(journal);
        }
        found.join_recipes();
        assert!(found.recipes[&id] == all);
        // As packs of version 2 have it.
        let unnumbered = (0..4).map(|number| match piece(number) {
            Record::Recipe { id, parts, .. } => Record::Recipe { id, first: 0, parts },
            other => other,
        });
        let mut found = Found::default();
        found.records(unnumbered.collect());
        found.join_recipes();
        assert!(found.recipes[&id] == all);
    }
}

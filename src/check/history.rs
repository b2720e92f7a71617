//! One replica's files of history against its catalog: preserved contents, undo segments, packs,
//! and what lies beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::{CheckOptions, CheckReport, Common, Member, differs, has_digest};
use crate::catalog::{Catalog, UndoRow};
use crate::error::{IoContext, Result};
use crate::history::pack::{PACK_BYTES_MAX, scan};
use crate::history::packs::{pack_dir, parse_pack_name};
use crate::history::ranges::ByteRange;
use crate::history::{parse_preserved_name, parts_preserved, preserved_dir, undo};
use crate::progress::Progress;
use crate::replica::backing::Access;
use crate::store::site::{PRIVATE_DIRS, Site, private};
use crate::types::{ContentId, EntryName, NodeId, PackId, RelPath};

/// Files of ours that may lie beside the directories.
const OWN_FILES: [&str; 12] = [
    "store.toml",
    "store.toml.new",
    "catalog.db",
    "catalog.db-wal",
    "catalog.db-shm",
    "catalog.db.sums",
    "lock",
    "control.sock",
    "log",
    "log.old",
    "log.1",
    "intent.log",
];

/// Checks every file of history.
pub(super) fn check(
    member: &Member,
    catalog: &Catalog,
    options: CheckOptions,
    common: &mut Common,
    report: &mut CheckReport,
    progress: &Progress,
) -> Result<()> {
    let phase = format!("Checking the history in {}", member.site.path.display());
    progress.begin(&phase, 0, 0);
    let mut files = Files { member, site: &member.site, catalog, options, common, report };
    let result = files.run(progress);
    progress.end();
    result
}

struct Files<'a> {
    member: &'a Member,
    site: &'a Site,
    catalog: &'a Catalog,
    options: CheckOptions,
    common: &'a mut Common,
    report: &'a mut CheckReport,
}

impl Files<'_> {
    fn run(&mut self, progress: &Progress) -> Result<()> {
        self.beside()?;
        self.preserved(progress)?;
        self.packs(progress)?;
        self.segments(progress)
    }

    /// Names and sizes of the files in one of our directories; empty where it is not there.
    fn files(&self, dir: &RelPath) -> Result<BTreeMap<EntryName, u64>> {
        let handle = match self.site.backing.open_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(BTreeMap::new());
            }
            other => other.context("open the directory", self.site.at(dir))?,
        };
        let mut found = BTreeMap::new();
        for entry in self.site.backing.list(&handle).context("list", self.site.at(dir))? {
            let stat = self.site.backing.stat_at(&handle, &entry.name);
            let stat = stat.context("look at", self.site.at(&dir.join(&entry.name)))?;
            found.insert(entry.name, stat.size);
        }
        Ok(found)
    }

    /// What lies in `.rearview` itself and is none of ours, and what was not finished.
    fn beside(&mut self) -> Result<()> {
        let root = private("");
        let handle = self.site.dir(&root)?;
        let stat = self.site.backing.stat(&handle).context("look at", self.site.at(&root))?;
        if stat.mode & 0o077 != 0 {
            self.report
                .damage(self.site.at(&root), format!("others may enter it: {:o}", stat.mode));
        }
        for name in self.files(&root)?.into_keys() {
            let text = String::from_utf8_lossy(name.as_bytes()).into_owned();
            let ours = PRIVATE_DIRS.contains(&text.as_str())
                || OWN_FILES.contains(&text.as_str())
                || text.starts_with("log.");
            if !ours {
                self.report.leftover(self.site.at(&root.join(&name)), "it is none of our files");
            }
        }
        for name in self.files(&private("tmp"))?.into_keys() {
            let place = self.site.at(&private("tmp").join(&name));
            self.report.leftover(place, "it was never finished");
        }
        Ok(())
    }

    fn preserved(&mut self, progress: &Progress) -> Result<()> {
        let mut wanted: BTreeMap<(NodeId, ContentId), u64> = self
            .catalog
            .preserved_contents(ContentId::EMPTY, usize::MAX >> 1)?
            .into_iter()
            .map(|content| ((content.node, content.id), content.size))
            .collect();
        for shard in 0..=255 {
            let dir = preserved_dir(NodeId(shard)).path();
            for (name, size) in self.files(&dir)? {
                self.report.history_files += 1;
                let place = self.site.at(&dir.join(&name));
                let known =
                    parse_preserved_name(&name).and_then(|id| Some((id, wanted.remove(&id)?)));
                let Some(((node, content), wanted)) = known else {
                    self.report.leftover(place, "no content lies in it");
                    continue;
                };
                // An orphan that was changed while it was open is its own preserved file: what its
                // content had lies in before-images, and the file may be another, or longer.
                let parts = parts_preserved(self.catalog, (node, content), wanted)?;
                let needed = parts.last().map_or(0, |part| part.end);
                if size < needed {
                    let what = format!("it has {size} bytes of {needed} that it must have");
                    self.report.damage(place, what);
                    continue;
                }
                if self.options.read_data {
                    let all = parts.iter().map(ByteRange::len).sum::<u64>() == wanted;
                    self.preserved_bytes(&dir, &name, &parts, all.then_some(content))?;
                }
                progress.advance(1, 0)?;
            }
        }
        for (node, content) in wanted.into_keys() {
            let dir = preserved_dir(node).path();
            let name = crate::history::preserved_name(node, content);
            self.report.damage(self.site.at(&dir.join(&name)), "it is missing");
        }
        Ok(())
    }

    /// Every byte of a preserved file that counts: against the digest of the content, if they are
    /// all of it and it has one, and the other replicas.
    fn preserved_bytes(
        &mut self,
        dir: &RelPath,
        name: &EntryName,
        parts: &[ByteRange],
        digest_of: Option<ContentId>,
    ) -> Result<()> {
        let place = self.site.at(&dir.join(name));
        let handle = self.site.dir(dir)?;
        let read = (|| {
            let file = self.site.backing.open_file(&handle, name, Access::Read)?;
            self.site.hash_parts(&file, parts)
        })();
        let (hash, bytes) = match read {
            Ok(read) => read,
            // The whole replica counts as hanging.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                return Err(error).context("read", &place);
            }
            Err(error) => {
                self.report.damage(place, format!("it cannot be read: {error}"));
                return Ok(());
            }
        };
        self.report.bytes += bytes;
        let is_recorded = |content| has_digest(self.catalog, content, &hash);
        if !digest_of.map_or(Ok(true), is_recorded)? {
            self.report.damage(place, "its bytes are not those that were recorded");
        } else if differs(&mut self.common.history, format!("preserved/{name}"), hash) {
            self.report.damage(place, "its bytes are not those of another replica");
        }
        Ok(())
    }

    fn packs(&mut self, progress: &Progress) -> Result<()> {
        let rows = self.catalog.packs()?;
        let mut wanted: BTreeMap<PackId, _> = rows.into_iter().map(|row| (row.id, row)).collect();
        for shard in 0..=255 {
            let dir = pack_dir(PackId(shard)).path();
            for (name, size) in self.files(&dir)? {
                self.report.history_files += 1;
                let place = self.site.at(&dir.join(&name));
                let known = parse_pack_name(&name).filter(|id| id.0 & 0xff == shard);
                let Some(row) = known.and_then(|id| wanted.remove(&id)) else {
                    self.report.leftover(place, "the catalog does not know this pack");
                    continue;
                };
                if size != row.bytes {
                    let what = format!("it has {size} bytes, {} are recorded", row.bytes);
                    self.report.damage(place, what);
                } else if self.options.read_data {
                    self.pack(&dir, &name, &row)?;
                }
                progress.advance(1, 0)?;
            }
        }
        for id in wanted.into_keys() {
            let place = self.site.at(&pack_dir(id).path());
            self.report.damage(place, format!("the pack {id} is missing"));
        }
        Ok(())
    }

    /// Every byte of a pack, and every chunk that the catalog has in it.
    fn pack(
        &mut self,
        dir: &RelPath,
        name: &EntryName,
        row: &crate::catalog::PackRow,
    ) -> Result<()> {
        let place = self.site.at(&dir.join(name));
        let bytes = self.bytes(dir, name, row.bytes.min(PACK_BYTES_MAX))?;
        self.report.bytes += bytes.len() as u64;
        if blake3::hash(&bytes).as_bytes() != &row.hash {
            self.report.damage(place, "its bytes are not those that were recorded");
            return Ok(());
        }
        let scanned = match scan(&bytes) {
            Ok(scanned) => scanned,
            Err(flaw) => {
                self.report.damage(place, flaw.to_string());
                return Ok(());
            }
        };
        if (scanned.store, scanned.id) != (self.member.marker.store, row.id) {
            self.report.damage(&place, "it is another pack");
        }
        let chunks: BTreeSet<_> = scanned
            .chunks
            .iter()
            .map(|chunk| (chunk.place.frame, chunk.place.at, chunk.length, chunk.hash))
            .collect();
        for chunk in self.catalog.pack_chunks(row.id)? {
            let key = (chunk.place.frame, chunk.place.at, chunk.length, chunk.hash);
            if !chunks.contains(&key) {
                self.report.damage(&place, format!("it lacks the chunk {}", chunk.id));
            }
        }
        Ok(())
    }

    fn bytes(&self, dir: &RelPath, name: &EntryName, count: u64) -> Result<Vec<u8>> {
        let path = self.site.at(&dir.join(name));
        let handle = self.site.dir(dir)?;
        let file = self.site.backing.open_file(&handle, name, Access::Read);
        let file = file.context("open", &path)?;
        let mut bytes = vec![0; count as usize];
        let got = self.site.backing.read_at(&file, &mut bytes, 0).context("read", &path)?;
        bytes.truncate(got);
        Ok(bytes)
    }

    /// Every before-image that the catalog has in a segment must lie in a whole record there.
    fn segments(&mut self, progress: &Progress) -> Result<()> {
        let dir = private("undo");
        let mut wanted: BTreeSet<u64> = self.catalog.segments()?.into_iter().collect();
        for (name, size) in self.files(&dir)? {
            self.report.history_files += 1;
            let place = self.site.at(&dir.join(&name));
            let Some(segment) = undo::parse_segment_name(&name) else {
                self.report.leftover(place, "it is no undo segment");
                continue;
            };
            if !wanted.remove(&segment) {
                // The packer takes it away when it is next at work.
                continue;
            }
            let bytes = self.bytes(&dir, &name, size)?;
            self.report.bytes += bytes.len() as u64;
            let missing = undo::missing(&bytes, &self.catalog.segment_rows(segment)?);
            for UndoRow { node, content, offset, .. } in missing {
                let what = format!("no whole record of node {node}, content {content} at {offset}");
                self.report.damage(&place, what);
            }
            progress.advance(1, 0)?;
        }
        for segment in wanted {
            let name = undo::segment_name(segment);
            self.report.damage(self.site.at(&dir.join(&name)), "it is missing");
        }
        Ok(())
    }
}

//! Bytes of history that a power cut left elsewhere, or took.
//!
//! A filesystem brings to its disk what it likes, in the order that it likes, as long as nobody
//! asks for more: so after a power cut the catalog can know of contents whose bytes never came to
//! the disk, or lie there under a name of before. Three cases, told apart by when the content was
//! first shown and by what is there:
//!
//! - The bytes are somewhere: in another replica's `preserved/`, or in a file that has again, or
//!   still, one of the names that its node had. btrfs makes the catalog durable, when anything is
//!   synced, and not the rename by which a file went into `preserved/` before that; others when an
//!   fsync of one file commits what the catalog has of all. They are copied to their place
//!   ([`regain`]), before the live tree is looked at.
//! - They are nowhere, and were never promised: the content is younger than the last checkpoint.
//!   What did not come to the disk reads as zeros from then on, as it does in a live file of
//!   several filesystems ([`settle`]), and each such version is told.
//! - They are nowhere and were durable once: that is damage. It is told, and left for `check`.
//!
//! Only what was touched since the last checkpoint is looked at. If we die anywhere here, the next
//! recovery does the same again.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use rustix::io::Errno;

use super::copy::Copier;
use super::import;
use super::site::{Object, Site, own_creds, private};
use crate::catalog::digest::Digest;
use crate::catalog::{Base, Catalog, Change, Durability, NodeRow, PastContent, PastName, digest};
use crate::error::{IoContext, Result};
use crate::history::ranges::ByteRange;
use crate::history::{parts_preserved, preserved_dir, preserved_name};
use crate::progress::Progress;
use crate::replica::backing::{Access, Handle, RenameMode};
use crate::replica::handles::open_private;
use crate::types::{ContentId, EntryName, Generation, Kind, NodeId, RelPath};

/// Births are told by a clock that lags by up to 10 ms, and times of generations to about as much.
const BIRTH_NANOS: i64 = 30_000_000;

/// What is looked at, and where.
pub struct Search<'a> {
    /// The replica that goes on.
    pub site: &'a Site,
    /// Other replicas, which may have what it lacks.
    pub peers: &'a [Site],
    /// Its catalog.
    pub catalog: &'a Catalog,
    /// The last checkpoint: what was not touched after it, and is none of the files, is as it was.
    pub checkpoint: Generation,
    /// Up to this generation, which a snapshot can have made later, all bytes were durable.
    pub since: Generation,
    /// Files that may have changed without a trace in the catalog.
    pub files: Vec<NodeId>,
    /// Copies can be interrupted.
    pub progress: &'a Progress,
}

/// Brings preserved files that are missing or too short to their place, from wherever their bytes
/// are. Durable when it returns.
pub fn regain(search: &Search<'_>) -> Result<()> {
    for node in search.nodes()? {
        for content in search.catalog.contents_since(node, search.since)? {
            if content.preserved && search.left_of(node, &content)?.is_some() {
                search.regain(node, &content)?;
            }
        }
        search.progress.advance(0, 0)?;
    }
    Ok(())
}

/// Settles contents whose bytes are nowhere. To be called when the catalog agrees with the live
/// tree.
pub fn settle(search: &Search<'_>) -> Result<()> {
    for node in search.nodes()? {
        let contents = search.catalog.contents_since(node, search.since)?;
        for (index, content) in contents.iter().enumerate() {
            let Some(left) = search.left_of(node, content)? else { continue };
            if search.was_promised(node, content, &contents[index + 1..], left)? {
                log::error!(
                    "{}: a content that was durable is gone: node {node}, content {}",
                    search.site.path.display(),
                    content.id
                );
                continue;
            }
            search.fill_up(node, content, left)?;
        }
        search.progress.advance(0, 0)?;
    }
    Ok(())
}

impl Search<'_> {
    fn nodes(&self) -> Result<BTreeSet<NodeId>> {
        let mut nodes: BTreeSet<NodeId> = self.files.iter().copied().collect();
        nodes.extend(self.catalog.touched_since(self.checkpoint)?);
        Ok(nodes)
    }

    /// How many bytes are left of a content that has not all of them; `None` for one that is
    /// whole.
    fn left_of(&self, node: NodeId, content: &PastContent) -> Result<Option<u64>> {
        if content.preserved {
            let needed = self.needed_of(node, content)?;
            let size = preserved_object(self.site, node, content.id)?;
            let size = size.map_or(0, |object| object.stat.size);
            return Ok((size < needed).then_some(size));
        }
        if !content.chained {
            return Ok(None);
        }
        let sources = self.catalog.sources(node, content.id)?;
        let Base::Live(base) = sources.base else { return Ok(None) };
        // An empty live file has as little of it as none at all.
        let live = self.catalog.node(base)?.filter(|row| row.content != ContentId::EMPTY);
        let gone = base == node && live.is_none();
        Ok((gone && !sources.covers(0, content.size)).then_some(0))
    }

    /// How long its preserved file must be at least: what an orphan had that was changed while it
    /// was open is in before-images.
    fn needed_of(&self, node: NodeId, content: &PastContent) -> Result<u64> {
        let parts = parts_preserved(self.catalog, (node, content.id), content.size)?;
        Ok(parts.last().map_or(0, |part| part.end))
    }

    /// Takes a preserved content from where it is, if it is anywhere.
    fn regain(&self, node: NodeId, content: &PastContent) -> Result<()> {
        let name = preserved_name(node, content.id);
        let needed = self.needed_of(node, content)?;
        for peer in self.peers {
            let found = preserved_object(peer, node, content.id)?;
            // It may be longer: an orphan that was appended to.
            if let Some(object) = found.filter(|object| object.stat.size >= needed) {
                let dir = preserved_dir(node).path();
                return self.keep(peer, (&dir, &name, &object), (node, content.id));
            }
        }
        let names = self.catalog.names_since(node, self.since)?;
        // Times that were set need not have come to the disk.
        let is_it = |object: &Object| {
            object.stat.size == content.row.size && content.mtimes.contains(&object.stat.mtime)
        };
        for site in std::iter::once(self.site).chain(self.peers) {
            // Where it is there and short, it is that file itself, and another has its name.
            if preserved_object(site, node, content.id)?.is_some() {
                continue;
            }
            let files = files_of(site, &names)?;
            let alike: Vec<&Candidate> = files.iter().filter(|file| is_it(&file.object)).collect();
            if let Some(file) = self.one_of(site, &alike, (node, content))? {
                return self.keep(site, file.place(), (node, content.id));
            }
        }
        self.regain_older(node, content, &names)
    }

    /// The one of some files of a content's size and time that it must be: by its digest, where one
    /// is recorded, else as the only one, or the only one that was born with its node.
    fn one_of<'a>(
        &self,
        site: &Site,
        alike: &[&'a Candidate],
        (node, content): (NodeId, &PastContent),
    ) -> Result<Option<&'a Candidate>> {
        let Some(digest) = self.digest_of_file(node, content)? else {
            return Ok(match alike[..] {
                [file] => Some(file),
                _ => only_twin(alike, &content.row),
            });
        };
        for file in alike {
            let shown = site.at(&file.dir.join(&file.name));
            let opened = site.backing.open_file(&file.handle, &file.name, Access::Read);
            let opened = opened.context("open", &shown)?;
            if hashed(site, (&opened, &shown), content)? == digest {
                return Ok(Some(file));
            }
        }
        Ok(None)
    }

    /// The recorded digest of a content that its file alone is to have. One that has before-images
    /// has another than its file.
    fn digest_of_file(&self, node: NodeId, content: &PastContent) -> Result<Option<Digest>> {
        let whole = [ByteRange { start: 0, end: content.size }];
        let parts = parts_preserved(self.catalog, (node, content.id), content.size)?;
        Ok(self.catalog.digest(content.id)?.filter(|_| parts == whole))
    }

    /// Takes for a preserved content what its file still is under a name of its node: that it was
    /// moved away came to the catalog and not to the disk. It was written to after the content was
    /// sealed, or lacks some of it; but older contents, which snapshots may show, are all there:
    /// before a byte of theirs is overwritten its image is durable.
    fn regain_older(&self, node: NodeId, content: &PastContent, names: &[PastName]) -> Result<()> {
        // Where it is there and short, it is that file itself, and another has its name.
        if preserved_object(self.site, node, content.id)?.is_some() {
            return Ok(());
        }
        // What was durable with another time has images, or it was cloned: overwritten without.
        let images = self.catalog.sources(node, content.id)?.undo;
        if content.born <= self.since && !images.iter().any(|row| row.content == content.id) {
            return Ok(());
        }
        // What others have of these names may be older than our last checkpoint.
        let files = files_of(self.site, names)?;
        let all: Vec<&Candidate> = files.iter().collect();
        let mut those: Vec<&Candidate> = files.iter().filter(|file| file.is_own).collect();
        if those.is_empty() && self.lies_with_what_was_durable(node, content)? {
            those.extend(only_twin(&all, &content.row));
        }
        for file in those {
            if self.may_be(&file.object, node, content)? {
                self.digest_of(file, (node, content))?;
                return self.keep(self.site, file.place(), (node, content.id));
            }
        }
        Ok(())
    }

    /// Whether the file of a content had one before that was durable: then it is on the disk.
    fn lies_with_what_was_durable(&self, node: NodeId, content: &PastContent) -> Result<bool> {
        let mut older = self.catalog.contents_since(node, self.since)?;
        older.retain(|older| older.id < content.id);
        // Of one that is not reached through others the file was moved aside.
        let none_moved = older.iter().all(|older| older.chained);
        Ok(none_moved && older.iter().any(|older| older.born <= self.since))
    }

    /// Whether a file under a name of a node can be the one that a content lay in.
    fn may_be(&self, object: &Object, node: NodeId, content: &PastContent) -> Result<bool> {
        let birth = object.stat.btime.as_nanos();
        let born = self.catalog.time_of(content.born)?.as_nanos();
        // The one that took the name when it was moved away is younger than the content.
        if birth == 0 || birth + BIRTH_NANOS > born {
            return Ok(false);
        }
        for older in self.catalog.contents_since(node, self.since)? {
            if older.chained || older.id >= content.id {
                continue;
            }
            // It is that one's file, if that is packed by now and was not moved away here.
            if !older.preserved {
                return Ok(false);
            }
            // Where an older one is missing, it is that one's; also if a recovery that was ended
            // has taken it already.
            let found = preserved_object(self.site, node, older.id)?;
            let key = |object: &Object| (object.stat.size, object.stat.mtime);
            if found.is_none_or(|found| key(&found) == key(object)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Records the digest of what is to stand for a content that was not durable, if it had one.
    /// Durable before that file is there: else it would be damage if we died in between.
    fn digest_of(&self, file: &Candidate, (node, content): (NodeId, &PastContent)) -> Result<()> {
        if file.object.stat.size < content.size {
            // It is filled up, and gets its digest then.
            return Ok(());
        }
        let shown = self.site.at(&file.dir.join(&file.name));
        let file = self.site.backing.open_file(&file.handle, &file.name, Access::Read);
        let file = file.context("open", &shown)?;
        if let Some(digest) = self.digest_again((&file, &shown), node, content)? {
            self.catalog.push(vec![digest])?;
            self.catalog.flush(Durability::Durable)?;
        }
        Ok(())
    }

    /// The digest of a content that was not durable and is not what it was: that of its file. One
    /// that has before-images keeps its own, which nobody compares with the file alone.
    fn digest_again(
        &self,
        (file, shown): (&Handle, &Path),
        node: NodeId,
        content: &PastContent,
    ) -> Result<Option<Change>> {
        if content.born <= self.since || self.digest_of_file(node, content)?.is_none() {
            return Ok(None);
        }
        let digest = hashed(self.site, (file, shown), content)?;
        Ok(Some(Change::DigestAdd { content: content.id, digest }))
    }

    fn keep(
        &self,
        from: &Site,
        (dir, name, object): (&RelPath, &EntryName, &Object),
        of: (NodeId, ContentId),
    ) -> Result<()> {
        preserve((from, self.site), (dir, name, object), of, self.progress)?;
        let shown = from.at(&dir.join(name));
        log::info!("{}: what it had before the unclean end was preserved again", shown.display());
        Ok(())
    }

    /// Whether anything that was durable at the last checkpoint needs bytes that are gone.
    /// `older` are the contents that may rely on this one.
    fn was_promised(
        &self,
        node: NodeId,
        content: &PastContent,
        older: &[PastContent],
        left: u64,
    ) -> Result<bool> {
        let durable = |born: Generation| born <= self.since;
        if durable(content.born) || self.catalog.relying_on(content.id)?.into_iter().any(durable) {
            return Ok(true);
        }
        for other in older.iter().filter(|other| durable(other.born) && !other.preserved) {
            let sources = self.catalog.sources(node, other.id)?;
            let base = match sources.base {
                Base::Live(base) => base == node,
                Base::Preserved { content: base, .. } => base == content.id,
                Base::Packed(_) => false,
            };
            if base && !sources.covers(left, other.size) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Gives a content a preserved file of its size, in which what is gone is a hole.
    fn fill_up(&self, node: NodeId, content: &PastContent, left: u64) -> Result<()> {
        let (site, name) = (self.site, preserved_name(node, content.id));
        let (shard, path) = shard_of(site, node)?;
        let backing = &site.backing;
        let opened = match backing.open_file(&shard, &name, Access::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                backing.create(&shard, &name, 0o600, own_creds())
            }
            other => other,
        };
        let shown = site.at(&path.join(&name));
        let file = opened.context("open", &shown)?;
        // In place and durable before the catalog says so.
        backing
            .truncate(&file, content.size)
            .and_then(|()| backing.sync(&file, false))
            .and_then(|()| backing.sync(&shard, false))
            .context("extend", &shown)?;
        let mut changes = vec![Change::ContentPreserved { id: content.id, cloned: false }];
        changes.extend(self.digest_again((&file, &shown), node, content)?);
        self.catalog.push(changes)?;
        let last = self.catalog.names_since(node, Generation::default())?;
        let told = last
            .last()
            .map_or_else(|| format!("node {node}"), |one| one.dir.join(&one.name).to_string());
        log::warn!(
            "{told}: a version of {} bytes was not on the disk yet at the unclean end; {} bytes of \
             it are zeros now",
            content.size,
            content.size - left
        );
        Ok(())
    }
}

/// The digest of what a file has of a content.
fn hashed(site: &Site, (file, shown): (&Handle, &Path), content: &PastContent) -> Result<Digest> {
    let whole = [ByteRange { start: 0, end: content.size }];
    let (hash, _) = site.hash_parts(file, &whole).context("read", shown)?;
    Ok(digest::first_half(&hash))
}

/// Gives another replica the preserved files of these contents that it lacks. To be called before
/// both catalogs tell of them: whichever is ahead when we die, its replica has the bytes. With
/// `moved`, one that has another name too, so that it can be the live file, is none.
pub fn complete(
    (from, to): (&Site, &Site),
    contents: &[(NodeId, ContentId)],
    moved: bool,
    progress: &Progress,
) -> Result<()> {
    for &(node, content) in contents {
        let Some(object) = preserved_object(from, node, content)? else { continue };
        let own = preserved_object(to, node, content)?;
        let is_link = |own: &Object| moved && own.stat.nlink > 1 && object.stat.nlink == 1;
        if own.is_none_or(|own| own.stat.size < object.stat.size || is_link(&own)) {
            let (dir, name) = (preserved_dir(node).path(), preserved_name(node, content));
            preserve((from, to), (&dir, &name, &object), (node, content), progress)?;
        }
    }
    Ok(())
}

/// The file in which a site has a content preserved.
fn preserved_object(site: &Site, node: NodeId, content: ContentId) -> Result<Option<Object>> {
    let path = preserved_dir(node).path();
    match site.backing.open_dir(&path) {
        Ok(dir) => site.object(&dir, &path, &preserved_name(node, content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("open the directory", site.at(&path)),
    }
}

/// A file under a name that a node had.
struct Candidate {
    handle: Handle,
    dir: RelPath,
    name: EntryName,
    object: Object,
    /// No other node had the name.
    is_own: bool,
}

impl Candidate {
    fn place(&self) -> (&RelPath, &EntryName, &Object) {
        (&self.dir, &self.name, &self.object)
    }
}

/// The files, each once, that a site has under these names.
fn files_of(site: &Site, names: &[PastName]) -> Result<Vec<Candidate>> {
    let mut found: Vec<Candidate> = Vec::new();
    for past in names {
        let handle = match site.dir(&past.dir) {
            // It may have it all the same.
            Err(error) if error.to_errno() == Errno::TIMEDOUT => return Err(error),
            Err(_) => continue,
            Ok(handle) => handle,
        };
        let Some(object) = site.object(&handle, &past.dir, &past.name)? else { continue };
        if object.stat.kind != Kind::File {
            continue;
        }
        if let Some(known) = found.iter_mut().find(|one| one.object.stat.ino == object.stat.ino) {
            known.is_own |= past.is_own;
            continue;
        }
        let (dir, name, is_own) = (past.dir.clone(), past.name.clone(), past.is_own);
        found.push(Candidate { handle, dir, name, object, is_own });
    }
    Ok(found)
}

/// The only one of some files that was born with a node.
fn only_twin<'a>(files: &[&'a Candidate], row: &NodeRow) -> Option<&'a Candidate> {
    let is_twin = |file: &&&Candidate| import::born_together(row, &file.object.stat) == Some(true);
    let mut twins = files.iter().filter(is_twin);
    let first = *twins.next()?;
    twins.next().is_none().then_some(first)
}

/// Copies a file of `from` into the `preserved/` of `to`, as the content `of`. Durable when it
/// returns.
pub fn preserve(
    (from, to): (&Site, &Site),
    (dir, name, object): (&RelPath, &EntryName, &Object),
    (node, content): (NodeId, ContentId),
    progress: &Progress,
) -> Result<()> {
    let (shard, path) = shard_of(to, node)?;
    let scratch = to.dir(&private("tmp"))?;
    let source = from.dir(dir)?;
    let made = Copier::new(from, to, progress)?.make(&source, dir, name, object)?;
    let kept = preserved_name(node, content);
    let backing = &to.backing;
    let file = backing.open_node(&scratch, &made).context("open the copy of", from.at(dir))?;
    backing
        .sync(&file, false)
        .and_then(|()| backing.rename(&scratch, &made, &shard, &kept, RenameMode::Replace))
        .and_then(|()| backing.sync(&shard, false))
        .context("keep a content in", to.at(&path))
}

/// The directory that a node's preserved files lie in, made where it is missing.
fn shard_of(site: &Site, node: NodeId) -> Result<(Handle, RelPath)> {
    let dir = preserved_dir(node);
    let shard = open_private(&*site.backing, dir);
    Ok((shard.context("open the directory", site.at(&dir.path()))?, dir.path()))
}

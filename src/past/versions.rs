//! `.versions/<name>`: every version of one file as a file of its own, named by its time.
//!
//! The file is the one that `name` means now or last meant; all its contents are shown, also those
//! it had under other names. Programs that save by writing a new file and renaming it over the old
//! one make a new file each time, so the contents that earlier files had *while they bore this
//! name* are shown too. A change of attributes alone is no version here: each content has the last
//! attributes it had.

use std::collections::HashSet;

use rustix::io::Errno;

use crate::catalog::{NameInterval, Version};
use crate::error::Result;
use crate::past::ino::{self, Target};
use crate::past::{Entry, Past, PastListed, VersionDir};
use crate::time::version_name;
use crate::types::{ContentId, EntryName, Generation, Kind, NodeId, Timestamp};

/// A longer extension is none, but a name with dots in it.
const EXTENSION_BYTES_MAX: usize = 32;
/// An empty file that got its content sooner than this is shown with the content only: nobody saved
/// the emptiness, a program was just between creating and writing.
const BIRTH_NANOS: i64 = 1_000_000_000;

/// One content of one file.
struct FileVersion {
    node: NodeId,
    content: ContentId,
    size: u64,
    /// When the name came to show it.
    born: Generation,
    time: Timestamp,
    /// A generation at which it has its last attributes.
    shown_at: Generation,
}

impl Past {
    pub(super) fn lookup_version_dir(&self, dir: NodeId, name: &EntryName) -> Result<Entry> {
        let row = self.live(dir)?;
        if self.file_versions(dir, name)?.is_empty() {
            return Err(Errno::NOENT.into());
        }
        let key = VersionDir { dir, name: name.clone() };
        let id = self.tables.lock().version_dirs.id(&key);
        self.virtual_entry(Target::VersionsOf(id), &row)
    }

    /// The names of the directory's files, live and deleted.
    pub(super) fn list_version_dirs(&self, dir: NodeId) -> Result<Vec<PastListed>> {
        let live = self.catalog().list(dir)?.into_iter();
        let mut names: Vec<EntryName> =
            live.filter(|entry| entry.kind == Kind::File).map(|entry| entry.name).collect();
        // What is excluded from history has versions of an earlier time, or none.
        let mut bare = HashSet::new();
        for name in self.catalog().unversioned(dir)? {
            if self.file_versions(dir, &name)?.is_empty() {
                bare.insert(name);
            }
        }
        names.retain(|name| !bare.contains(name));
        let gone = self.gone(dir)?.into_iter();
        names.extend(gone.filter(|gone| gone.row.kind == Kind::File).map(|gone| gone.name));
        names.sort();
        let tables = self.tables.lock();
        Ok(names
            .into_iter()
            .map(|name| {
                let key = VersionDir { dir, name };
                let id = tables.version_dirs.known_id(&key);
                let ino = id.map_or(ino::UNKNOWN, |id| Target::VersionsOf(id).encode());
                PastListed { name: key.name, ino, kind: Kind::Dir }
            })
            .collect())
    }

    pub(super) fn lookup_version(&self, id: u64, name: &EntryName) -> Result<Entry> {
        let of = self.version_dir(id)?;
        let versions = self.file_versions(of.dir, &of.name)?;
        let names = version_names(&versions, &of.name);
        let index = names.iter().position(|listed| listed == name).ok_or(Errno::NOENT)?;
        let version = &versions[index];
        let row = self.catalog().node_at(version.shown_at, version.node)?.ok_or(Errno::NOENT)?;
        Ok(self.moment_entry(version.shown_at, row))
    }

    pub(super) fn list_versions(&self, id: u64) -> Result<Vec<PastListed>> {
        let of = self.version_dir(id)?;
        let versions = self.file_versions(of.dir, &of.name)?;
        let names = version_names(&versions, &of.name);
        let listed = names.into_iter();
        Ok(listed.map(|name| PastListed { name, ino: ino::UNKNOWN, kind: Kind::File }).collect())
    }

    /// The directory of this id; `ESTALE` once it is forgotten.
    pub(super) fn version_dir(&self, id: u64) -> Result<VersionDir> {
        Ok(self.tables.lock().version_dirs.get(id).ok_or(Errno::STALE)?)
    }

    /// All versions of the file that `name` in `dir` means or last meant, oldest first.
    fn file_versions(&self, dir: NodeId, name: &EntryName) -> Result<Vec<FileVersion>> {
        self.catch_up()?;
        let mut found: Vec<FileVersion> = Vec::new();
        let mut seen = HashSet::new();
        let mut whole = None;
        for interval in self.catalog().entry_history(dir, name)?.iter().rev() {
            if whole == Some(interval.node) {
                // The newest file: all of it is there already.
                continue;
            }
            let rows = self.catalog().versions(interval.node)?;
            if rows.first().is_none_or(|version| version.row.kind != Kind::File) {
                continue;
            }
            let under_name = whole.is_some().then_some(interval);
            whole = whole.or(Some(interval.node));
            for version in self.contents_of(&rows, under_name)? {
                if seen.insert((version.node, version.content, version.born)) {
                    found.push(version);
                }
            }
        }
        found.sort_by_key(|version| (version.born, version.node));
        Ok(found)
    }

    /// The contents of a node, one each for a run of rows with the same content; only those that
    /// showed during `under_name`, if given.
    fn contents_of(
        &self,
        rows: &[Version],
        under_name: Option<&NameInterval>,
    ) -> Result<Vec<FileVersion>> {
        let from = under_name.map_or(Generation(0), |interval| interval.born);
        let until = under_name.and_then(|interval| interval.died);
        let mut contents: Vec<FileVersion> = Vec::new();
        for version in rows {
            let gone_before = version.died.is_some_and(|died| died <= from);
            if gone_before || until.is_some_and(|until| version.born >= until) {
                continue;
            }
            let (content, size) = (version.row.content, version.row.size);
            let shown_at = version.born.max(from);
            match contents.last_mut() {
                Some(last) if (last.content, last.size) == (content, size) => {
                    last.shown_at = shown_at;
                }
                _ => {
                    let time = match version.born < from {
                        true => self.catalog().time_of(from)?,
                        false => version.time,
                    };
                    let node = version.row.id;
                    let born = shown_at;
                    contents.push(FileVersion { node, content, size, born, time, shown_at });
                }
            }
        }
        if let [birth, next, ..] = contents.as_slice()
            && birth.content == ContentId::EMPTY
            && next.time.as_nanos() - birth.time.as_nanos() < BIRTH_NANOS
        {
            contents.remove(0);
        }
        Ok(contents)
    }
}

/// The name of each version: its time, a number where that is not enough, and the file's extension.
fn version_names(versions: &[FileVersion], of: &EntryName) -> Vec<EntryName> {
    let extension = extension(of.as_bytes());
    let mut taken = HashSet::new();
    let named = versions.iter().map(|version| {
        let stem = version_name(version.time, false);
        let mut name = [stem.as_bytes(), extension].concat();
        let mut number = 1;
        while !taken.insert(name.clone()) {
            number += 1;
            name = [stem.as_bytes(), format!("-{number}").as_bytes(), extension].concat();
        }
        EntryName::new(&name).expect("a time and a short extension make a valid name")
    });
    named.collect()
}

/// The extension with its dot, by which a file opens in the right program: `.txt`, `.tar.gz`.
fn extension(name: &[u8]) -> &[u8] {
    let Some(dot) = name.iter().rposition(|&byte| byte == b'.') else { return b"" };
    let stem = &name[..dot];
    let dot = if stem.ends_with(b".tar") { dot - 4 } else { dot };
    match dot == 0 || name.len() - dot > EXTENSION_BYTES_MAX {
        true => b"",
        false => &name[dot..],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_keep_the_extension_by_which_they_open() {
        for (name, expected) in [
            (&b"notes.txt"[..], &b".txt"[..]),
            (b"a.b.c", b".c"),
            (b"Makefile", b""),
            (b".bashrc", b""),
            (b"x.tar.gz", b".tar.gz"),
            (b".tar.gz", b""),
            (b"x.", b"."),
            (b"x.\xff", b".\xff"),
            (b"mail.from.someone.about.a.very-long-subject-that-ends-here-now", b""),
        ] {
            assert_eq!(extension(name), expected, "{}", crate::types::escape(name));
        }
    }

    #[test]
    fn versions_of_one_millisecond_get_numbers() {
        let version = |nanos| FileVersion {
            node: NodeId(2),
            content: ContentId(1),
            size: 1,
            born: Generation(1),
            time: Timestamp { secs: 1_795_380_334, nanos },
            shown_at: Generation(1),
        };
        let versions =
            [version(1_000_000), version(1_500_000), version(1_600_000), version(2_000_000)];
        let name = EntryName::new("a.txt").expect("a name");
        let names: Vec<String> =
            version_names(&versions, &name).iter().map(ToString::to_string).collect();
        assert_eq!(
            names,
            [
                "2026-11-22_20-45-34.001.txt",
                "2026-11-22_20-45-34.001-2.txt",
                "2026-11-22_20-45-34.001-3.txt",
                "2026-11-22_20-45-34.002.txt",
            ]
        );
    }
}

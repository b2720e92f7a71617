//! Compares the live tree, every snapshot and every remembered instant with the reference.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use rearviewfs::fs::Wish;
use rearviewfs::types::{Generation, Kind, NodeId};

use super::drive::{Driver, Outcome, caller, entry, fail};
use super::reference::{Dump, Shown};

/// The kind of a past file whose content cannot be read; the reason stands in its place.
pub const UNREADABLE: char = '!';

impl Driver {
    pub(super) fn compare(&mut self) -> Outcome {
        let live = self.dump(1)?;
        differ("the live tree", &self.reference.dump(false), &live)?;
        let door = self.fs().lookup(1, &entry(".snapshots")).or_else(fail("the snapshots"))?;
        for (name, expected) in &self.snapshots {
            let root = self
                .fs()
                .lookup(door.stat.ino, &entry(name))
                .or_else(fail(&format!("snapshot {name}")))?;
            let shown = self.dump(root.stat.ino)?;
            differ(&format!("snapshot {name}"), expected, &shown)?;
        }
        for moment in &self.moments {
            let shown = self.dump_moment(moment.generation)?;
            differ(&format!("instant {:?}", moment.generation), &moment.dump, &shown)?;
        }
        Ok(())
    }

    /// Whether all that was preserved is in packs, and nothing is left beside them.
    pub(super) fn nothing_unpacked(&self) -> Outcome {
        for backing in self.paths() {
            let private = backing.join(".rearview");
            let mut waiting = vec![private.join("preserved"), private.join("undo")];
            waiting.push(private.join("tmp"));
            while let Some(dir) = waiting.pop() {
                for entry in std::fs::read_dir(&dir).map_err(|error| error.to_string())? {
                    let path = entry.map_err(|error| error.to_string())?.path();
                    match path.is_dir() {
                        true => waiting.push(path),
                        false => return Err(format!("{} was left", path.display())),
                    }
                }
            }
        }
        Ok(())
    }

    /// The tree below an inode, as the filesystem shows it.
    pub fn dump(&self, root: u64) -> Outcome<Dump> {
        let mut dump = Dump::new();
        let mut first = BTreeMap::new();
        self.dump_dir(root, "", &mut dump, &mut first)?;
        Ok(dump)
    }

    fn dump_dir(
        &self,
        dir: u64,
        path: &str,
        dump: &mut Dump,
        first: &mut BTreeMap<u64, String>,
    ) -> Outcome {
        let fs = self.fs();
        let fh = fs.open_dir(0, dir);
        let lines = fs.list(dir, fh, true).or_else(fail("readdir"))?;
        fs.release_dir(fh);
        let mut lines: Vec<_> = lines.iter().skip(2).collect();
        lines.sort_by(|a, b| a.name.cmp(&b.name));
        for line in lines {
            let name = String::from_utf8(line.name.clone()).expect("our names are UTF-8");
            let path = format!("{path}/{name}");
            let found =
                fs.lookup(dir, &entry(&name)).or_else(fail(&format!("lookup of {path:?}")))?;
            let stat = found.stat;
            if stat.ino != line.ino || stat.kind != line.kind {
                return Err(format!("{path:?}: listing and lookup disagree"));
            }
            fs.forget(stat.ino, 1);
            let (kind, content) = match stat.kind {
                Kind::File => ('f', self.read_file(stat.ino, stat.size)?),
                Kind::Dir => ('d', Vec::new()),
                Kind::Symlink => ('l', fs.readlink(stat.ino).or_else(fail("readlink"))?),
                _ => ('p', Vec::new()),
            };
            let xattrs = fs.xattrs(stat.ino).or_else(fail("xattrs"))?;
            let first_link = first.entry(stat.ino).or_insert_with(|| path.clone()).clone();
            dump.insert(
                path.clone(),
                Shown {
                    kind,
                    content,
                    mode: stat.mode,
                    xattrs: user_xattrs(&xattrs),
                    links: if kind == 'd' { 0 } else { stat.nlink },
                    mtime: Some(stat.mtime.secs),
                    first_link,
                },
            );
            if kind == 'd' {
                self.dump_dir(stat.ino, &path, dump, first)?;
            }
        }
        Ok(())
    }

    fn read_file(&self, ino: u64, size: u64) -> Outcome<Vec<u8>> {
        let fs = self.fs();
        let wish = Wish::from_flags(libc::O_RDONLY);
        let fh = fs.open(ino, wish, &caller()).or_else(fail("open for reading"))?;
        let mut bytes = vec![0; size as usize + 10];
        let got = fs.read(ino, fh, 0, &mut bytes).or_else(fail("read"))?;
        fs.release(fh).or_else(fail("release"))?;
        bytes.truncate(got);
        Ok(bytes)
    }

    /// The tree at a generation, from the catalog and the contents.
    pub fn dump_moment(&self, at: Generation) -> Outcome<Dump> {
        let mut dump = Dump::new();
        let mut first = BTreeMap::new();
        self.dump_moment_dir(at, NodeId::ROOT, "", &mut dump, &mut first)?;
        Ok(dump)
    }

    fn dump_moment_dir(
        &self,
        at: Generation,
        dir: NodeId,
        path: &str,
        dump: &mut Dump,
        first: &mut BTreeMap<NodeId, String>,
    ) -> Outcome {
        for line in self.catalog().list_at(at, dir).or_else(fail("list_at"))? {
            let name = String::from_utf8(line.name.as_bytes().to_vec()).expect("UTF-8");
            let path = format!("{path}/{name}");
            let row = self
                .catalog()
                .lookup_at(at, dir, &line.name)
                .or_else(fail("lookup_at"))?
                .ok_or_else(|| format!("{path:?} is listed but not found"))?;
            let (kind, content) = match row.kind {
                Kind::File => {
                    let mut bytes = vec![0; row.size as usize];
                    let volume = self.fs().volume();
                    match volume.read_content(row.id, row.content, 0, &mut bytes) {
                        Ok(got) => {
                            bytes.truncate(got);
                            ('f', bytes)
                        }
                        Err(error) => (UNREADABLE, error.to_string().into_bytes()),
                    }
                }
                Kind::Dir => ('d', Vec::new()),
                Kind::Symlink => {
                    let target = self.catalog().symlink_target(row.id).or_else(fail("target"))?;
                    ('l', target.unwrap_or_default())
                }
                _ => ('p', Vec::new()),
            };
            let xattrs = self.catalog().xattrs(row.xattrs).or_else(fail("xattrs"))?;
            let links = self.catalog().links_at(at, row.id).or_else(fail("links_at"))?;
            let first_link = first.entry(row.id).or_insert_with(|| path.clone()).clone();
            dump.insert(
                path.clone(),
                Shown {
                    kind,
                    content,
                    mode: row.mode,
                    xattrs: user_xattrs(&xattrs),
                    links: if kind == 'd' { 0 } else { links },
                    mtime: Some(row.mtime.secs),
                    first_link,
                },
            );
            if kind == 'd' {
                self.dump_moment_dir(at, row.id, &path, dump, first)?;
            }
        }
        Ok(())
    }
}

fn user_xattrs(all: &rearviewfs::types::Xattrs) -> BTreeMap<String, Vec<u8>> {
    all.0
        .iter()
        .filter(|(name, _)| name.starts_with(b"user."))
        .map(|(name, value)| {
            (OsStr::from_bytes(name).to_string_lossy().into_owned(), value.clone())
        })
        .collect()
}

/// Compares two trees; the reference's unknown times are not compared.
fn differ(what: &str, expected: &Dump, shown: &Dump) -> Outcome {
    for (path, want) in expected {
        let Some(have) = shown.get(path) else {
            return Err(format!("{what}: {path:?} is missing"));
        };
        let mut have = have.clone();
        if want.mtime.is_none() {
            have.mtime = None;
        }
        if &have != want {
            let at = want.content.iter().zip(&have.content).position(|(a, b)| a != b);
            if have.kind == UNREADABLE {
                let reason = String::from_utf8_lossy(&have.content);
                return Err(format!("{what}: {path:?} cannot be read: {reason}"));
            }
            let brief = |shown: &Shown| Shown { content: Vec::new(), ..shown.clone() };
            return Err(format!(
                "{what}: {path:?} differs (first differing byte {at:?}, sizes {} and {})\n\
                 expected {:?}\nshown    {:?}",
                want.content.len(),
                have.content.len(),
                brief(want),
                brief(&have)
            ));
        }
    }
    match shown.keys().find(|path| !expected.contains_key(*path)) {
        Some(path) => Err(format!("{what}: {path:?} is too much")),
        None => Ok(()),
    }
}

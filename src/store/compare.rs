//! Comparing the live trees of two backings, byte for byte.
//!
//! Compared: names, kinds, contents, permission bits, owners, modification times to the nanosecond,
//! device numbers, extended attributes (ACLs are among them), symlink targets, and which names are
//! hard links of one object.
//!
//! **Not compared**, and why: access times (reads are answered by one replica), change and birth
//! times and inode numbers (each filesystem gives its own), link counts of directories and
//! allocated blocks (they differ between filesystems), labels that the host's security policy sets,
//! a filesystem's own `lost+found`, and our private directory.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use crate::error::{IoContext, Result};
use crate::replica::backing::{Access, Handle};
use crate::store::fill::kept_xattrs;
use crate::store::site::{Object, Site};
use crate::types::{Kind, RelPath};

const READ_BYTES: usize = 1 << 20;

/// In what two backings differ at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aspect {
    /// Only the first has the name.
    OnlyFirst,
    /// Only the second has it.
    OnlySecond,
    /// File, directory, symlink or other.
    Kind,
    /// Bytes of the file.
    Content,
    /// Permission bits.
    Mode,
    /// User or group.
    Owner,
    /// Modification time.
    ModificationTime,
    /// Device number.
    Device,
    /// Extended attributes or ACLs.
    Xattrs,
    /// A symlink's target.
    Target,
    /// Of which other names it is a hard link.
    HardLinks,
}

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where.
    pub path: RelPath,
    /// In what.
    pub aspect: Aspect,
    /// Both sides, for people.
    pub detail: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {:?} {}", self.path, self.aspect, self.detail)
    }
}

/// Compares two backings' live trees. Empty when they are equal; ordered by directory.
pub fn compare(a: &Path, b: &Path) -> Result<Vec<Difference>> {
    let mut compare = Compare {
        a: Site::open(a)?,
        b: Site::open(b)?,
        links: HashMap::new(),
        links_back: HashMap::new(),
        found: Vec::new(),
    };
    compare.run()?;
    Ok(compare.found)
}

struct Compare {
    a: Site,
    b: Site,
    /// Which inode of `b` stands for each hard-linked inode of `a`, and the reverse.
    links: HashMap<u64, u64>,
    links_back: HashMap<u64, u64>,
    found: Vec<Difference>,
}

impl Compare {
    fn run(&mut self) -> Result<()> {
        let root = RelPath::root();
        let objects = (self.a.dir(&root)?, self.b.dir(&root)?);
        let (a, b) = (self.a.object_of(&objects.0, &root)?, self.b.object_of(&objects.1, &root)?);
        self.attributes(&root, &a, &b);
        let mut dirs = vec![root];
        while let Some(path) = dirs.pop() {
            self.dir(&path, &mut dirs)?;
        }
        Ok(())
    }

    fn dir(&mut self, path: &RelPath, dirs: &mut Vec<RelPath>) -> Result<()> {
        let (a_dir, b_dir) = (self.a.dir(path)?, self.b.dir(path)?);
        let a_entries = self.a.live_entries(&a_dir, path)?;
        let mut b_names: std::collections::BTreeSet<_> =
            self.b.live_entries(&b_dir, path)?.into_iter().map(|entry| entry.name).collect();
        for entry in a_entries {
            let child = path.join(&entry.name);
            if !b_names.remove(&entry.name) {
                self.note(&child, Aspect::OnlyFirst, String::new());
                continue;
            }
            let a = self.a.object(&a_dir, path, &entry.name)?;
            let b = self.b.object(&b_dir, path, &entry.name)?;
            let (Some(a), Some(b)) = (a, b) else { continue };
            if a.stat.kind != b.stat.kind {
                let detail = format!("{:?} and {:?}", a.stat.kind, b.stat.kind);
                self.note(&child, Aspect::Kind, detail);
                continue;
            }
            self.attributes(&child, &a, &b);
            match a.stat.kind {
                Kind::Dir => dirs.push(child),
                Kind::File => {
                    self.links(&child, &a, &b);
                    self.content(&child, &a_dir, &b_dir, (&a, &b))?;
                }
                _ => self.links(&child, &a, &b),
            }
        }
        for name in b_names {
            self.note(&path.join(&name), Aspect::OnlySecond, String::new());
        }
        Ok(())
    }

    fn attributes(&mut self, path: &RelPath, a: &Object, b: &Object) {
        let (x, y) = (&a.stat, &b.stat);
        if x.mode != y.mode {
            self.note(path, Aspect::Mode, format!("{:o} and {:o}", x.mode, y.mode));
        }
        if (x.uid, x.gid) != (y.uid, y.gid) {
            let detail = format!("{}:{} and {}:{}", x.uid, x.gid, y.uid, y.gid);
            self.note(path, Aspect::Owner, detail);
        }
        if x.mtime != y.mtime {
            let detail = format!("{:?} and {:?}", x.mtime, y.mtime);
            self.note(path, Aspect::ModificationTime, detail);
        }
        if x.rdev != y.rdev {
            self.note(path, Aspect::Device, format!("{:#x} and {:#x}", x.rdev, y.rdev));
        }
        let (xattrs, others) = (kept_xattrs(a), kept_xattrs(b));
        if xattrs != others {
            let differing = xattrs
                .keys()
                .chain(others.keys())
                .filter(|name| xattrs.get(*name) != others.get(*name))
                .map(|name| crate::types::escape(name))
                .collect::<std::collections::BTreeSet<_>>();
            let detail = differing.into_iter().collect::<Vec<_>>().join(" ");
            self.note(path, Aspect::Xattrs, detail);
        }
        if a.target != b.target {
            let (one, other) = (crate::types::escape(&a.target), crate::types::escape(&b.target));
            self.note(path, Aspect::Target, format!("{one} and {other}"));
        }
    }

    /// The pairing of inode numbers must be one-to-one, and the counts equal.
    fn links(&mut self, path: &RelPath, a: &Object, b: &Object) {
        let (a, b) = (&a.stat, &b.stat);
        let paired = a.nlink <= 1
            || *self.links.entry(a.ino).or_insert(b.ino) == b.ino
                && *self.links_back.entry(b.ino).or_insert(a.ino) == a.ino;
        if a.nlink != b.nlink || !paired {
            self.note(path, Aspect::HardLinks, format!("{} and {} names", a.nlink, b.nlink));
        }
    }

    fn content(
        &mut self,
        path: &RelPath,
        a_dir: &Handle,
        b_dir: &Handle,
        objects: (&Object, &Object),
    ) -> Result<()> {
        let sizes = (objects.0.stat.size, objects.1.stat.size);
        if sizes.0 != sizes.1 {
            let detail = format!("{} and {} bytes", sizes.0, sizes.1);
            self.note(path, Aspect::Content, detail);
            return Ok(());
        }
        let Some((_, name)) = path.split_last() else { return Ok(()) };
        let a = self.a.backing.open_file(a_dir, name, Access::Read);
        let a = a.context("open", self.a.at(path))?;
        let b = self.b.backing.open_file(b_dir, name, Access::Read);
        let b = b.context("open", self.b.at(path))?;
        let (mut one, mut other) = (vec![0; READ_BYTES], vec![0; READ_BYTES]);
        let mut offset = 0;
        loop {
            let count = self.a.backing.read_at(&a, &mut one, offset);
            let count = count.context("read", self.a.at(path))?;
            let second = self.b.backing.read_at(&b, &mut other, offset);
            let second = second.context("read", self.b.at(path))?;
            if one[..count] != other[..second] {
                let differing = one[..count].iter().zip(&other[..second]).position(|(x, y)| x != y);
                let at = offset + differing.unwrap_or(count.min(second)) as u64;
                self.note(path, Aspect::Content, format!("from byte {at} on"));
                return Ok(());
            }
            if count < READ_BYTES {
                return Ok(());
            }
            offset += count as u64;
        }
    }

    fn note(&mut self, path: &RelPath, aspect: Aspect, detail: String) {
        self.found.push(Difference { path: path.clone(), aspect, detail });
    }
}

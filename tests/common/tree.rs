//! Comparing two trees: what "identical" means in every test.
//!
//! Compared: names (as bytes), kind, permission bits, owner, group, modification time in
//! nanoseconds, size and content, device numbers, symlink targets, every xattr in user, trusted,
//! security and system.posix_acl_*, which names are hard links of each other, link counts of files.
//!
//! Not compared, and why: access times (reading changes them), change and birth times (no program
//! can set them), inode numbers (each filesystem has its own; their grouping into hard links is
//! compared), the size and link count of directories and the blocks behind a file (how a
//! filesystem stores a thing is its own affair), `.rearview` in the root (the replica's own).

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// One entry of a tree: everything that is compared.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    /// "file", "dir", "link", "fifo", "socket", "block" or "char".
    pub kind: &'static str,
    /// Permission bits with suid, sgid and sticky.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Device number of a device; 0 otherwise.
    pub rdev: u64,
    /// Size of a file; 0 otherwise.
    pub size: u64,
    /// Hash of the content, or the target of a symlink.
    pub content: Vec<u8>,
    /// Xattrs by name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// For a file with several names: the first of them in this tree.
    pub link_group: Option<PathBuf>,
    /// Number of names; 1 for directories.
    pub links: u64,
}

/// A tree by path relative to its root; the root itself is the empty path.
pub type Tree = BTreeMap<PathBuf, Entry>;

/// Reads the tree at `root`.
#[track_caller]
pub fn read_tree(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut groups = HashMap::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(path) = waiting.pop() {
        let full = if path.as_os_str().is_empty() { root.to_owned() } else { root.join(&path) };
        let entry = read_entry(&full);
        if entry.kind == "dir" {
            let list = fs::read_dir(&full).unwrap_or_else(|e| panic!("list {full:?}: {e}"));
            for name in list {
                let name = name.unwrap_or_else(|e| panic!("list {full:?}: {e}")).file_name();
                if !(path.as_os_str().is_empty() && name == ".rearview") {
                    waiting.push(path.join(name));
                }
            }
        }
        if entry.kind != "dir" && entry.links > 1 {
            let meta = fs::symlink_metadata(&full).expect("it was there a moment ago");
            groups.entry((meta.dev(), meta.ino())).or_insert_with(Vec::new).push(path.clone());
        }
        tree.insert(path, entry);
    }
    for mut names in groups.into_values() {
        names.sort();
        for name in &names {
            tree.get_mut(name).expect("just inserted").link_group = Some(names[0].clone());
        }
    }
    tree
}

#[track_caller]
fn read_entry(full: &Path) -> Entry {
    let meta = fs::symlink_metadata(full).unwrap_or_else(|e| panic!("stat {full:?}: {e}"));
    let kind = meta.file_type();
    let (kind, content) = if kind.is_file() {
        ("file", hash_of(full))
    } else if kind.is_dir() {
        ("dir", Vec::new())
    } else if kind.is_symlink() {
        let target = fs::read_link(full).unwrap_or_else(|e| panic!("readlink {full:?}: {e}"));
        ("link", target.into_os_string().into_vec())
    } else if kind.is_fifo() {
        ("fifo", Vec::new())
    } else if kind.is_socket() {
        ("socket", Vec::new())
    } else if kind.is_block_device() {
        ("block", Vec::new())
    } else {
        ("char", Vec::new())
    };
    let device = kind == "block" || kind == "char";
    Entry {
        kind,
        mode: meta.mode() & 0o7777,
        owner: (meta.uid(), meta.gid()),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        rdev: if device { meta.rdev() } else { 0 },
        size: if kind == "file" { meta.size() } else { 0 },
        content,
        xattrs: xattrs_of(full),
        link_group: None,
        links: if kind == "dir" { 1 } else { meta.nlink() },
    }
}

#[track_caller]
fn hash_of(full: &Path) -> Vec<u8> {
    let mut file = fs::File::open(full).unwrap_or_else(|e| panic!("open {full:?}: {e}"));
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).unwrap_or_else(|e| panic!("read {full:?}: {e}"));
        if count == 0 {
            return hasher.finalize().as_bytes().to_vec();
        }
        hasher.update(&buffer[..count]);
    }
}

/// The xattrs of `full` itself (symlinks are not followed).
#[track_caller]
pub fn xattrs_of(full: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0_u8; 64 << 10];
    let count = match rustix::fs::llistxattr(full, &mut names[..]) {
        Ok(count) => count,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => panic!("listxattr {full:?}: {error}"),
    };
    let mut found = BTreeMap::new();
    for name in names[..count].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0_u8; 64 << 10];
        let count = rustix::fs::lgetxattr(full, name, &mut value[..])
            .unwrap_or_else(|e| panic!("getxattr {full:?} {}: {e}", name.escape_ascii()));
        found.insert(name.to_vec(), value[..count].to_vec());
    }
    found
}

/// The differences of two trees as text, one per line; empty if there are none.
pub fn differences(left: &Tree, right: &Tree) -> String {
    let mut text = String::new();
    let mut count = 0;
    let mut say = |line: String| {
        count += 1;
        if count <= 30 {
            let _ = writeln!(text, "{line}");
        }
    };
    for (path, entry) in left {
        let shown = path.as_os_str().as_bytes().escape_ascii();
        match right.get(path) {
            None => say(format!("only left:  {shown}")),
            Some(other) if other != entry => {
                say(format!("{shown}: {}", entry_differences(entry, other)));
            }
            Some(_) => {}
        }
    }
    for path in right.keys().filter(|path| !left.contains_key(*path)) {
        say(format!("only right: {}", path.as_os_str().as_bytes().escape_ascii()));
    }
    if count > 30 {
        let _ = writeln!(text, "... and {} more", count - 30);
    }
    text
}

fn entry_differences(left: &Entry, right: &Entry) -> String {
    let mut parts = Vec::new();
    macro_rules! field {
        ($name:ident) => {
            if left.$name != right.$name {
                parts.push(format!(
                    concat!(stringify!($name), " {:?} / {:?}"),
                    left.$name, right.$name
                ));
            }
        };
    }
    field!(kind);
    field!(mode);
    field!(owner);
    field!(mtime);
    field!(rdev);
    field!(size);
    field!(links);
    field!(link_group);
    if left.content != right.content {
        parts.push("content differs".into());
    }
    if left.xattrs != right.xattrs {
        let shown = |of: &Entry| {
            let names: Vec<String> = of
                .xattrs
                .iter()
                .map(|(name, value)| format!("{}={}", name.escape_ascii(), value.escape_ascii()))
                .collect();
            names.join(",")
        };
        parts.push(format!("xattrs [{}] / [{}]", shown(left), shown(right)));
    }
    parts.join("; ")
}

/// Fails unless the two trees are the same in everything compared.
#[track_caller]
pub fn assert_same(what: &str, left: &Path, right: &Path) {
    assert_trees(what, &read_tree(left), &read_tree(right));
}

/// [`assert_same`] of trees read before.
#[track_caller]
pub fn assert_trees(what: &str, left: &Tree, right: &Tree) {
    let text = differences(left, right);
    assert!(text.is_empty(), "{what}: the trees differ (left / right):\n{text}");
}

/// The names in a directory, sorted.
#[track_caller]
pub fn names_in(folder: &Path) -> Vec<OsString> {
    let mut names: Vec<OsString> = fs::read_dir(folder)
        .unwrap_or_else(|e| panic!("list {folder:?}: {e}"))
        .map(|entry| entry.unwrap_or_else(|e| panic!("list {folder:?}: {e}")).file_name())
        .collect();
    names.sort();
    names
}

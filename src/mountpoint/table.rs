//! The kernel's mount table: which RearviewFS mounts there are, and which one a path lies in.
//!
//! The table is read from `/proc/self/mountinfo`, which never touches the mounts themselves: a dead
//! or hanging mount is found without waiting for it. The source of our mounts is the list of their
//! backings, joined by colons; a colon or backslash within a path is escaped by a backslash.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{IoContext, Result};

/// The filesystem type of our mounts, as the mount table shows it.
pub const FS_TYPE: &str = "fuse.rearview";

/// One line of the mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Where it is mounted.
    pub target: PathBuf,
    /// The minor number of its device, by which the kernel knows the FUSE connection.
    pub minor: u32,
    /// The filesystem's type with its subtype.
    pub fs_type: String,
    /// What the mounter called the source.
    pub source: Vec<u8>,
}

impl MountEntry {
    /// Whether this is one of our mounts.
    pub fn is_rearview(&self) -> bool {
        self.fs_type == FS_TYPE
    }

    /// The backings named by the source.
    pub fn backings(&self) -> Vec<PathBuf> {
        split_backings(&self.source)
    }
}

/// All mounts in the order in which they were made: of two on one target the later one is on top.
pub fn read() -> Result<Vec<MountEntry>> {
    let path = "/proc/self/mountinfo";
    let bytes = std::fs::read(path).context("read the mount table", path)?;
    Ok(parse(&bytes))
}

/// Parses `mountinfo` (proc(5)). Lines of a form not known are passed over.
pub fn parse(bytes: &[u8]) -> Vec<MountEntry> {
    bytes.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let minor = device.split_once(':').and_then(|(_, minor)| minor.parse().ok())?;
    let target = fields.nth(1)?;
    // The number of optional fields varies; a lone dash ends them.
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = rest.next()?;
    let source = rest.next()?;
    Some(MountEntry {
        target: PathBuf::from(OsString::from_vec(unescape_octal(target))),
        minor,
        fs_type: String::from_utf8_lossy(fs_type).into_owned(),
        source: unescape_octal(source),
    })
}

/// The kernel writes space, tab, newline, `#` and backslash as `\ooo`.
fn unescape_octal(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|digits| digits.iter().all(|d| (b'0'..b'8').contains(d)));
        match (first, digits) {
            (b'\\', Some(digits)) => {
                let value =
                    digits.iter().fold(0u32, |sum, digit| sum * 8 + u32::from(digit - b'0'));
                out.push(value as u8);
                rest = &tail[3..];
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

/// The mount that is visible at exactly this target.
pub fn mounted_at<'a>(table: &'a [MountEntry], target: &Path) -> Option<&'a MountEntry> {
    table.iter().rev().find(|entry| entry.target == target)
}

/// The mount of ours that `path` lies in; `None` if it lies in another filesystem.
pub fn containing<'a>(table: &'a [MountEntry], path: &Path) -> Option<&'a MountEntry> {
    let mut best: Option<&MountEntry> = None;
    for entry in table.iter().filter(|entry| path.starts_with(&entry.target)) {
        let longer = |best: &MountEntry| {
            entry.target.components().count() >= best.target.components().count()
        };
        if best.is_none_or(longer) {
            best = Some(entry);
        }
    }
    best.filter(|entry| entry.is_rearview())
}

/// Joins backings into a source.
pub fn join_backings(backings: &[PathBuf]) -> Vec<u8> {
    let mut source = Vec::new();
    for (index, backing) in backings.iter().enumerate() {
        if index > 0 {
            source.push(b':');
        }
        for &byte in backing.as_os_str().as_bytes() {
            if byte == b':' || byte == b'\\' {
                source.push(b'\\');
            }
            source.push(byte);
        }
    }
    source
}

/// Splits a source at its colons; the inverse of [`join_backings`]. Empty parts are passed over.
pub fn split_backings(source: &[u8]) -> Vec<PathBuf> {
    let mut parts = vec![Vec::new()];
    let mut bytes = source.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' if matches!(bytes.peek(), Some(b':' | b'\\')) => {
                let escaped = bytes.next().unwrap_or(byte);
                parts.last_mut().expect("never empty").push(escaped);
            }
            b':' => parts.push(Vec::new()),
            byte => parts.last_mut().expect("never empty").push(byte),
        }
    }
    let parts = parts.into_iter().filter(|part| !part.is_empty());
    parts.map(|part| PathBuf::from(OsString::from_vec(part))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &[u8] = b"\
22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n\
40 22 0:50 / /home/a\\040b rw,nosuid shared:9 master:2 - fuse.rearview /x/a:/x/b\\134:c rw\n\
41 40 0:51 / /home/a\\040b/tmp rw - tmpfs tmpfs rw\n\
42 22 0:52 / /mnt rw - ext4 /dev/sdb rw\n\
43 42 0:53 / /mnt rw - fuse.rearview /y rw\n\
garbage\n";

    #[test]
    fn a_sample_table_is_read() {
        let table = parse(SAMPLE);
        assert_eq!(table.len(), 5);
        assert_eq!(table[1].target, Path::new("/home/a b"));
        assert!(table[1].is_rearview());
        assert_eq!(table[1].backings(), [Path::new("/x/a"), Path::new("/x/b:c")]);
    }

    #[test]
    fn a_path_is_in_the_innermost_mount() {
        let table = parse(SAMPLE);
        let target = |path: &str| containing(&table, Path::new(path)).map(|e| e.target.clone());
        assert_eq!(target("/home/a b/src/x"), Some("/home/a b".into()));
        assert_eq!(target("/home/a b"), Some("/home/a b".into()));
        // Another filesystem mounted inside of ours is not ours.
        assert_eq!(target("/home/a b/tmp/x"), None);
        assert_eq!(target("/home/a bc"), None);
        assert_eq!(target("/etc"), None);
    }

    #[test]
    fn the_later_of_two_mounts_on_one_target_counts() {
        let table = parse(SAMPLE);
        assert!(mounted_at(&table, Path::new("/mnt")).is_some_and(MountEntry::is_rearview));
        assert!(containing(&table, Path::new("/mnt/z")).is_some());
    }

    #[test]
    fn backings_survive_joining_and_splitting() {
        for names in [&["/a"][..], &["/a", "/b c", "/d"], &["/a:b", "/c\\d", "/e\\:f"]] {
            let paths: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
            assert_eq!(split_backings(&join_backings(&paths)), paths);
        }
        assert_eq!(split_backings(b"/a::/b:"), [Path::new("/a"), Path::new("/b")]);
        assert_eq!(split_backings(b"/a\\x:/b"), [Path::new("/a\\x"), Path::new("/b")]);
    }
}

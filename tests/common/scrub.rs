//! Random damage to a backing, as rot, a bad disk or a foreign hand does it.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A kind of damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Damage {
    Flip,
    ZeroBlock,
    Truncate,
    Extend,
    Delete,
    ExtraFile,
    ExtraDir,
    Mode,
    Owner,
    Time,
    Xattr,
    Swap,
    Edit,
    Link,
    Symlink,
    DirGone,
    FileAsDir,
    Pack,
    Preserved,
    Undo,
    Catalog,
    CatalogBit,
    Intents,
    Lock,
    Marker,
}

const ALL: [Damage; 25] = [
    Damage::Flip,
    Damage::ZeroBlock,
    Damage::Truncate,
    Damage::Extend,
    Damage::Delete,
    Damage::ExtraFile,
    Damage::ExtraDir,
    Damage::Mode,
    Damage::Owner,
    Damage::Time,
    Damage::Xattr,
    Damage::Swap,
    Damage::Edit,
    Damage::Link,
    Damage::Symlink,
    Damage::DirGone,
    Damage::FileAsDir,
    Damage::Pack,
    Damage::Preserved,
    Damage::Undo,
    Damage::Catalog,
    Damage::CatalogBit,
    Damage::Intents,
    Damage::Lock,
    Damage::Marker,
];

/// Does damage, the same from the same seed.
pub struct Damager(u64);

impl Damager {
    /// Begins.
    pub fn new(seed: u64) -> Damager {
        Damager(seed | 1)
    }

    fn random(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below.max(1)
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.random(from.len() as u64) as usize]
    }

    /// Does one damage of a random kind to a backing; what it was.
    pub fn damage(&mut self, backing: &Path) -> (Damage, String) {
        let kind = *self.pick(&ALL);
        let (_, what) = self.damage_as(backing, kind);
        (kind, what)
    }

    /// Does damage of one kind; to which file, and what it was.
    pub fn damage_as(&mut self, backing: &Path, kind: Damage) -> (PathBuf, String) {
        let (target, what) = self.inflict(backing, kind);
        let what = format!("{kind:?} of {}: {what}", target.display());
        (target, what)
    }

    fn inflict(&mut self, backing: &Path, kind: Damage) -> (PathBuf, String) {
        let files = files_below(backing, &|name| name != ".rearview");
        let large: Vec<PathBuf> = files.iter().filter(|p| size(p) >= 8).cloned().collect();
        match kind {
            Damage::Flip | Damage::ZeroBlock | Damage::Truncate | Damage::Extend => {
                let target = self.pick(&large).clone();
                let what = keeping_time(&target, || self.spoil(&target, kind));
                (target, what)
            }
            Damage::Delete => {
                let target = self.pick(&files).clone();
                fs::remove_file(&target).unwrap();
                (target, String::new())
            }
            Damage::ExtraFile => {
                let dir = self.pick(&files).parent().unwrap().to_owned();
                let target = dir.join(format!("extra{}", self.random(1000)));
                fs::write(&target, "foreign").unwrap();
                (target, String::new())
            }
            Damage::ExtraDir => {
                let target = backing.join(format!("extra{}", self.random(1000)));
                fs::create_dir_all(target.join("below")).unwrap();
                fs::write(target.join("below/file"), "foreign").unwrap();
                (target, String::new())
            }
            Damage::Mode => {
                let target = self.pick(&files).clone();
                let mode = fs::metadata(&target).unwrap().mode() ^ 0o051;
                fs::set_permissions(&target, fs::Permissions::from_mode(mode)).unwrap();
                (target, format!("{mode:o}"))
            }
            Damage::Owner => {
                let target = self.pick(&files).clone();
                std::os::unix::fs::chown(&target, Some(4242), Some(4343)).unwrap();
                (target, String::new())
            }
            Damage::Time => {
                let target = self.pick(&files).clone();
                let then = SystemTime::UNIX_EPOCH + Duration::from_secs(self.random(1 << 31));
                set_mtime(&target, then);
                (target, format!("{then:?}"))
            }
            Damage::Xattr => {
                let target = self.pick(&files).clone();
                let value = self.random(1000).to_string();
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::setxattr(&target, "user.foreign", value.as_bytes(), flags).unwrap();
                (target, value)
            }
            Damage::Swap => self.swap(&large),
            Damage::Edit => {
                let target = self.pick(&large).clone();
                let bytes = format!("edited {}", self.random(1 << 40));
                fs::write(&target, bytes).unwrap();
                (target, String::new())
            }
            Damage::Link => {
                let linked: Vec<PathBuf> = files
                    .iter()
                    .filter(|path| fs::metadata(path).unwrap().nlink() > 1)
                    .cloned()
                    .collect();
                let target = self.pick(&linked).clone();
                let copy = target.with_extension("copy");
                let mtime = fs::metadata(&target).unwrap().modified().unwrap();
                fs::copy(&target, &copy).unwrap();
                set_mtime(&copy, mtime);
                fs::rename(&copy, &target).unwrap();
                (target, "its own file now".into())
            }
            Damage::Symlink => {
                let target = backing.join(format!("d{}/sym", self.random(4)));
                fs::remove_file(&target).unwrap();
                symlink("elsewhere", &target).unwrap();
                (target, String::new())
            }
            Damage::DirGone => {
                let target = backing.join(*self.pick(&["d0/deep", "d1", "d0"]));
                fs::remove_dir_all(&target).unwrap();
                (target, String::new())
            }
            Damage::FileAsDir => {
                let target = self.pick(&large).clone();
                fs::remove_file(&target).unwrap();
                fs::create_dir(&target).unwrap();
                (target, String::new())
            }
            Damage::Pack => self.spoil_ours(backing, "packs"),
            Damage::Preserved => self.spoil_ours(backing, "preserved"),
            Damage::Undo => self.spoil_ours(backing, "undo"),
            Damage::Catalog => self.spoil_catalog(&backing.join(".rearview/catalog.db")),
            Damage::CatalogBit => {
                let target = backing.join(".rearview/catalog.db");
                await_empty_log(&target);
                let what = self.spoil(&target, Damage::Flip);
                (target, what)
            }
            Damage::Intents => self.spoil_intents(&backing.join(".rearview/intent.log")),
            Damage::Lock => self.spoil_or_remove(&backing.join(".rearview/lock")),
            Damage::Marker => self.spoil_or_remove(&backing.join(".rearview/store.toml")),
        }
    }

    fn swap(&mut self, files: &[PathBuf]) -> (PathBuf, String) {
        loop {
            let (one, other) = (self.pick(files).clone(), self.pick(files).clone());
            let (a, b) = (fs::metadata(&one).unwrap(), fs::metadata(&other).unwrap());
            if fs::read(&one).unwrap() == fs::read(&other).unwrap() || a.nlink() + b.nlink() > 2 {
                continue;
            }
            let aside = one.with_extension("aside");
            fs::rename(&one, &aside).unwrap();
            fs::rename(&other, &one).unwrap();
            fs::rename(&aside, &other).unwrap();
            // As a mixed-up directory block would: each file under the other's time.
            set_mtime(&one, a.modified().unwrap());
            set_mtime(&other, b.modified().unwrap());
            return (one, format!("with {}", other.display()));
        }
    }

    /// Flips a bit of a file and keeps its time.
    pub fn flip_in(&mut self, target: &Path) -> (PathBuf, String) {
        let what = keeping_time(target, || self.spoil(target, Damage::Flip));
        (target.to_owned(), what)
    }

    fn spoil(&mut self, target: &Path, kind: Damage) -> String {
        let file = fs::OpenOptions::new().read(true).write(true).open(target).unwrap();
        let size = file.metadata().unwrap().len();
        let at = self.random(size);
        match kind {
            Damage::Flip => {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                byte[0] ^= 1 << self.random(8);
                file.write_all_at(&byte, at).unwrap();
                format!("a bit at {at}")
            }
            Damage::ZeroBlock => {
                // Bytes that were zero before would be no damage: one of them is not.
                let from = at / 512 * 512;
                let mut block = vec![0; 512.min((size - from) as usize)];
                let mut before = block.clone();
                file.read_exact_at(&mut before, from).unwrap();
                if before == block {
                    block[0] = 1;
                }
                file.write_all_at(&block, from).unwrap();
                format!("the block at {from}")
            }
            Damage::Truncate => {
                file.set_len(at).unwrap();
                format!("to {at}")
            }
            _ => {
                file.set_len(size + 1 + self.random(9000)).unwrap();
                format!("from {size}")
            }
        }
    }

    fn spoil_ours(&mut self, backing: &Path, dir: &str) -> (PathBuf, String) {
        let files = files_below(&backing.join(".rearview").join(dir), &|_| true);
        assert!(!files.is_empty(), "nothing in {dir}");
        let target = self.pick(&files).clone();
        let kinds = [Damage::Flip, Damage::ZeroBlock, Damage::Truncate];
        if self.random(4) == 0 {
            fs::remove_file(&target).unwrap();
            return (target, "removed".into());
        }
        let kind = *self.pick(&kinds);
        let what = self.spoil(&target, kind);
        (target, what)
    }

    fn spoil_or_remove(&mut self, target: &Path) -> (PathBuf, String) {
        if self.random(2) == 0 {
            fs::remove_file(target).unwrap();
            return (target.to_owned(), "removed".into());
        }
        (target.to_owned(), self.spoil(target, Damage::Flip))
    }

    /// What counts of the log is its newest header: records of what is closed, and places that
    /// were never written, may hold anything.
    fn spoil_intents(&mut self, target: &Path) -> (PathBuf, String) {
        let file = fs::OpenOptions::new().read(true).write(true).open(target).unwrap();
        match self.random(4) {
            0 => {
                fs::remove_file(target).unwrap();
                (target.to_owned(), "removed".into())
            }
            1 => {
                file.set_len(self.random(1 << 20)).unwrap();
                (target.to_owned(), "cut short".into())
            }
            _ => {
                let number = |at: u64| {
                    let mut bytes = [0; 8];
                    file.read_exact_at(&mut bytes, at + 8).unwrap();
                    u64::from_le_bytes(bytes)
                };
                let newest = if number(0) > number(4096) { 0 } else { 4096 };
                let at = newest + self.random(128);
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ (1 << self.random(8))], at).unwrap();
                (target.to_owned(), format!("a bit at {at}"))
            }
        }
    }

    /// Garbage over a page that is part of a tree: what is in the log, or free, is no damage.
    fn spoil_catalog(&mut self, target: &Path) -> (PathBuf, String) {
        await_empty_log(target);
        let file = fs::OpenOptions::new().read(true).write(true).open(target).unwrap();
        let pages = file.metadata().unwrap().len() / 4096;
        let mut free = free_pages(&file);
        free.extend(written_pages(target));
        loop {
            let page = self.random(pages);
            let mut first = [0];
            file.read_exact_at(&mut first, page * 4096).unwrap();
            if page == 0 || free.contains(&page) || ![2, 5, 10, 13].contains(&first[0]) {
                continue;
            }
            let garbage: Vec<u8> = (0..4096).map(|_| self.random(256) as u8).collect();
            file.write_all_at(&garbage, page * 4096).unwrap();
            return (target.to_owned(), format!("page {page}"));
        }
    }
}

/// The root pages of tables that every commit writes: a damaged page that is written anew before
/// anybody reads it is none.
fn written_pages(target: &Path) -> Vec<u64> {
    let db = rusqlite::Connection::open(target).unwrap();
    let mut roots = db
        .prepare(
            "SELECT rootpage - 1 FROM sqlite_schema WHERE tbl_name IN \
             ('meta', 'head', 'tally', 'tick', 'touched', 'act', 'digest')",
        )
        .unwrap();
    let pages = roots.query_map([], |row| row.get::<_, i64>(0)).unwrap();
    pages.map(|page| page.unwrap() as u64).collect()
}

/// Waits until the catalog's file has all of it.
fn await_empty_log(catalog: &Path) {
    let log = catalog.with_extension("db-wal");
    super::wait_until("the catalog's log is emptied", 30, || {
        fs::metadata(&log).map_or(0, |meta| meta.len()) == 0
    });
}

/// The free pages of an SQLite database, from 0 (<https://sqlite.org/fileformat2.html>, 1.5).
fn free_pages(file: &fs::File) -> Vec<u64> {
    let number = |at: u64| {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from(u32::from_be_bytes(bytes))
    };
    let mut free = Vec::new();
    let mut trunk = number(32);
    while trunk != 0 {
        let at = (trunk - 1) * 4096;
        free.push(trunk - 1);
        free.extend((0..number(at + 4)).map(|leaf| number(at + 8 + 4 * leaf) - 1));
        trunk = number(at);
    }
    free
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

fn set_mtime(path: &Path, time: SystemTime) {
    let file = fs::File::open(path).unwrap();
    file.set_times(fs::FileTimes::new().set_modified(time)).unwrap();
}

fn keeping_time<T>(path: &Path, f: impl FnOnce() -> T) -> T {
    let before = fs::metadata(path).unwrap().modified().unwrap();
    let done = f();
    set_mtime(path, before);
    done
}

/// The regular files below a folder, in order.
fn files_below(folder: &Path, enter: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let kind = entry.file_type().unwrap();
        let name = String::from_utf8_lossy(entry.file_name().as_bytes()).into_owned();
        if kind.is_dir() && enter(&name) {
            found.extend(files_below(&entry.path(), enter));
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

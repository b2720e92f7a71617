//! Does each operation on the filesystem and on the reference, and compares the two.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;

use rearviewfs::catalog::{Catalog, Durability};
use rearviewfs::check::{CheckOptions, check};
use rearviewfs::error::Error;
use rearviewfs::fs::{Fh, Filesystem, Wish, Writing};
use rearviewfs::progress::Progress;
use rearviewfs::replica::backing::{Creds, SetTime};
use rearviewfs::store::{self, Between};
use rearviewfs::types::{EntryName, Generation, Kind, Timestamp};
use rearviewfs::volume::{Caller, Changes, Newborn};

use super::open::open;
use super::ops::Op;
use super::reference::{Body, Dump, Reference, pattern, put};

pub type Outcome<T = ()> = Result<T, String>;

pub(super) const READ_WRITE: Wish =
    Wish { readable: true, writable: true, truncate: false, synchronous: false, execute: false };

/// A remembered moment with what it must show for ever.
pub struct Moment {
    pub generation: Generation,
    pub dump: Dump,
}

/// The filesystem under test beside its reference.
pub struct Driver {
    paths: Vec<PathBuf>,
    excludes: bool,
    between: Between,
    _dir: Option<tempfile::TempDir>,
    fs: Option<Arc<Filesystem>>,
    pub reference: Reference,
    pub handles: Vec<(Fh, usize)>,
    pub snapshots: BTreeMap<String, Dump>,
    pub moments: Vec<Moment>,
    names: usize,
    /// The steps of packing at which it died.
    pub deaths: Vec<String>,
}

pub(super) fn caller() -> Caller {
    let uid = rustix::process::geteuid().as_raw();
    let gid = rustix::process::getegid().as_raw();
    Caller { creds: Creds { uid, gid, umask: 0 }, pid: std::process::id() }
}

pub(super) fn entry(name: &str) -> EntryName {
    EntryName::new(name).expect("a plain name")
}

fn text(number: u8) -> String {
    // One of the names is not plain.
    if number == 5 { "\u{e4} name\n".to_string() } else { format!("n{number}") }
}

pub(super) fn fail<T>(what: &str) -> impl FnOnce(Error) -> Outcome<T> + '_ {
    move |error| Err(format!("{what}: {error}"))
}

impl Driver {
    /// On a new store, which excludes something or nothing.
    pub fn new(excludes: bool) -> Driver {
        let shm = std::path::Path::new("/dev/shm");
        let base = match std::env::var_os("MODEL_DIR") {
            Some(base) => PathBuf::from(base),
            None if shm.is_dir() => shm.to_path_buf(),
            None => std::env::temp_dir(),
        };
        let dir = tempfile::Builder::new().prefix("rv-model").tempdir_in(base).expect("a folder");
        let paths = vec![dir.path().join("a"), dir.path().join("b")];
        let mut driver =
            Driver::over(paths, excludes, Between::default()).expect("the store opens");
        driver._dir = Some(dir);
        driver
    }

    /// Opens the store in `paths`, or makes one there. The reference is empty.
    pub fn over(paths: Vec<PathBuf>, excludes: bool, between: Between) -> Outcome<Driver> {
        Ok(Driver {
            fs: Some(open(&paths, excludes, &between)?),
            paths,
            excludes,
            between,
            _dir: None,
            reference: Reference::new(),
            handles: Vec::new(),
            snapshots: BTreeMap::new(),
            moments: Vec::new(),
            names: 0,
            deaths: Vec::new(),
        })
    }

    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    pub fn fs(&self) -> &Filesystem {
        self.fs.as_ref().expect("mounted")
    }

    pub fn catalog(&self) -> &Catalog {
        self.fs().volume().catalog()
    }

    pub(super) fn ino(&self, node: usize) -> u64 {
        self.reference.nodes[node].ino
    }

    pub(super) fn pick(&self, from: &[usize], index: usize) -> Option<usize> {
        if from.is_empty() { None } else { Some(from[index % from.len()]) }
    }

    pub(super) fn dir(&self, index: usize) -> usize {
        let dirs = self.reference.dirs();
        dirs[index % dirs.len()]
    }

    pub(super) fn child(&self, dir: usize, name: &str) -> Option<usize> {
        self.reference.entries(dir).get(name).copied()
    }

    pub(super) fn is_dir(&self, node: usize) -> bool {
        matches!(self.reference.nodes[node].now.body, Body::Dir(_))
    }

    /// Opens, does `f`, closes: the file is sealed after.
    pub(super) fn with_open<T>(
        &mut self,
        node: usize,
        wish: Wish,
        f: impl FnOnce(&Filesystem, Fh) -> Result<T, Error>,
    ) -> Outcome<T> {
        let ino = self.ino(node);
        let fh = self.fs().open(ino, wish, &caller()).or_else(fail("open"))?;
        let answer = f(self.fs(), fh).or_else(fail("operation"))?;
        self.fs().flush(fh).or_else(fail("flush"))?;
        self.fs().release(fh).or_else(fail("release"))?;
        Ok(answer)
    }

    pub fn step(&mut self, op: &Op) -> Outcome {
        match op.clone() {
            Op::Create { dir, name, keep_open } => self.create(dir, &text(name), keep_open),
            Op::Mkdir { dir, name } => self.make(dir, &text(name), Body::Dir(BTreeMap::new())),
            Op::Symlink { dir, name } => {
                self.make(dir, &text(name), Body::Symlink(b"../some/where".to_vec()))
            }
            Op::Fifo { dir, name } => self.make(dir, &text(name), Body::Fifo),
            Op::Write { .. }
            | Op::Truncate { .. }
            | Op::OpenTruncate { .. }
            | Op::Punch { .. }
            | Op::Copy { .. } => self.content(op),
            Op::Open { .. }
            | Op::WriteOpen { .. }
            | Op::Flush { .. }
            | Op::Fsync { .. }
            | Op::Close { .. } => self.handle(op),
            Op::Unlink { dir, name } => self.unlink(dir, &text(name)),
            Op::Rmdir { dir, name } => self.rmdir(dir, &text(name)),
            Op::Rename { dir, name, to_dir, to_name, mode } => {
                self.rename((dir, &text(name)), (to_dir, &text(to_name)), mode)
            }
            Op::Link { file, dir, name } => self.link(file, dir, &text(name)),
            Op::Chmod { .. }
            | Op::SetXattr { .. }
            | Op::RemoveXattr { .. }
            | Op::SetTimes { .. } => self.attribute(op),
            Op::Scratch { dir, name, fill, length } => {
                self.scratch(dir, name, &pattern(fill, length as usize))
            }
            Op::Save { dir, name, to } => self.save(dir, name, &text(to)),
            Op::Hide { dir, name, to } => self.hide(dir, &text(name), to),
            Op::Snapshot => self.snapshot(),
            Op::Tidy => self.fs().volume().tidy_history().map(|_| ()).or_else(fail("tidy")),
            Op::Thin { every } => self.thin(every),
            Op::DieWhilePacking { steps } => self.die_while_packing(steps),
            Op::RenameSnapshot { snapshot } => self.rename_snapshot(snapshot),
            Op::DeleteSnapshot { snapshot } => self.delete_snapshot(snapshot),
            Op::Freeze => {
                let generation = self.catalog().freeze();
                let dump = self.reference.dump(true);
                self.moments.push(Moment { generation, dump });
                Ok(())
            }
            Op::Commit => self.catalog().flush(Durability::Written).or_else(fail("commit")),
            Op::Remount => self.remount(),
            Op::Compare => self.compare(),
        }
    }

    pub(super) fn create(&mut self, dir: usize, name: &str, keep_open: bool) -> Outcome {
        let dir = self.dir(dir);
        if self.child(dir, name).is_some() {
            return Ok(());
        }
        let (found, fh) = self
            .fs()
            .create(self.ino(dir), &entry(name), 0o644, READ_WRITE, &caller())
            .or_else(fail("create"))?;
        let node = self.reference.add(dir, name, Body::File(Vec::new()), 0o644, found.stat.ino);
        self.reference.nodes[node].dirty = true;
        if keep_open {
            self.reference.nodes[node].opens += 1;
            self.handles.push((fh, node));
            return Ok(());
        }
        self.fs().flush(fh).or_else(fail("flush"))?;
        self.reference.seal(node);
        self.fs().release(fh).or_else(fail("release"))
    }

    fn make(&mut self, dir: usize, name: &str, body: Body) -> Outcome {
        let dir = self.dir(dir);
        let (what, mode) = match &body {
            Body::Dir(_) => (Newborn::Dir, 0o755),
            Body::Symlink(target) => (Newborn::Symlink(target), 0o777),
            _ => (Newborn::Special(Kind::Fifo, 0), 0o600),
        };
        let made = self.fs().make(self.ino(dir), &entry(name), &what, mode, &caller());
        if self.child(dir, name).is_some() {
            return match made {
                Err(error) if error.is(rustix::io::Errno::EXIST) => Ok(()),
                other => Err(format!("making an existing name answered {other:?}")),
            };
        }
        let ino = made.or_else(fail("make"))?.stat.ino;
        self.reference.add(dir, name, body, mode, ino);
        Ok(())
    }

    fn content(&mut self, op: &Op) -> Outcome {
        let files = self.reference.files();
        let (Op::Write { file, .. }
        | Op::Truncate { file, .. }
        | Op::OpenTruncate { file }
        | Op::Punch { file, .. }
        | Op::Copy { to: file, .. }) = *op
        else {
            return Ok(());
        };
        let Some(node) = self.pick(&files, file) else { return Ok(()) };
        match *op {
            Op::Write { offset, length, fill, .. } => {
                let bytes = pattern(fill, length as usize);
                self.with_open(node, READ_WRITE, |fs, fh| {
                    fs.write(fh, u64::from(offset), &bytes, Writing::default(), &caller())
                })?;
                self.reference.content(node, |content| put(content, offset as usize, &bytes));
            }
            Op::Truncate { size, .. } => {
                let changes = Changes { size: Some(u64::from(size)), ..Changes::default() };
                self.fs()
                    .set_attributes(self.ino(node), &changes, &caller())
                    .or_else(fail("truncate"))?;
                self.reference.truncated(node, size as usize);
                if self.reference.nodes[node].opens > 0 {
                    return Ok(());
                }
            }
            Op::OpenTruncate { .. } => {
                self.with_open(node, Wish { truncate: true, ..READ_WRITE }, |_, _| Ok(()))?;
                self.reference.truncated(node, 0);
            }
            Op::Punch { offset, length, zero, .. } => {
                let mode =
                    if zero { libc::FALLOC_FL_ZERO_RANGE } else { libc::FALLOC_FL_PUNCH_HOLE }
                        | libc::FALLOC_FL_KEEP_SIZE;
                let done = self.with_open(node, READ_WRITE, |fs, fh| {
                    match fs.fallocate(
                        fh,
                        mode as u32,
                        u64::from(offset),
                        u64::from(length),
                        &caller(),
                    ) {
                        Err(error) if error.is(rustix::io::Errno::OPNOTSUPP) => Ok(false),
                        other => other.map(|()| true),
                    }
                })?;
                if !done {
                    self.closed(node);
                    return Ok(());
                }
                self.reference.content(node, |content| {
                    let start = content.len().min(offset as usize);
                    let end = content.len().min((offset + length) as usize);
                    content[start..end].fill(0);
                });
            }
            Op::Copy { from, from_offset, to_offset, length, .. } => {
                let source = self.pick(&files, from).expect("there are files");
                if source == node {
                    return Ok(());
                }
                let from_fh = self
                    .fs()
                    .open(self.ino(source), READ_WRITE, &caller())
                    .or_else(fail("open the source"))?;
                let copied = self.with_open(node, READ_WRITE, |fs, fh| {
                    let (from, to) = (u64::from(from_offset), u64::from(to_offset));
                    fs.copy_range((from_fh, from), (fh, to), u64::from(length), &caller())
                })?;
                self.fs().release(from_fh).or_else(fail("release the source"))?;
                if self.reference.nodes[source].opens == 0 {
                    self.reference.seal(source);
                }
                let Body::File(bytes) = &self.reference.nodes[source].now.body else {
                    return Err("the source is no file".into());
                };
                let start = bytes.len().min(from_offset as usize);
                let end = bytes.len().min(start + length as usize);
                let bytes = bytes[start..end].to_vec();
                if copied != bytes.len() as u64 {
                    return Err(format!("copied {copied} of {} bytes", bytes.len()));
                }
                if !bytes.is_empty() {
                    self.reference
                        .content(node, |content| put(content, to_offset as usize, &bytes));
                }
            }
            _ => {}
        }
        self.closed(node);
        Ok(())
    }

    /// The file was closed by one who opened it.
    fn closed(&mut self, node: usize) {
        if self.reference.nodes[node].opens == 0 {
            self.reference.seal(node);
        } else {
            self.reference.flushed(node);
        }
    }

    fn handle(&mut self, op: &Op) -> Outcome {
        if let Op::Open { file } = *op {
            let Some(node) = self.pick(&self.reference.files(), file) else { return Ok(()) };
            let fh = self.fs().open(self.ino(node), READ_WRITE, &caller()).or_else(fail("open"))?;
            self.reference.nodes[node].opens += 1;
            self.handles.push((fh, node));
            return Ok(());
        }
        let (Op::WriteOpen { handle, .. }
        | Op::Flush { handle }
        | Op::Fsync { handle }
        | Op::Close { handle }) = *op
        else {
            return Ok(());
        };
        if self.handles.is_empty() {
            return Ok(());
        }
        let at = handle % self.handles.len();
        let (fh, node) = self.handles[at];
        match *op {
            Op::WriteOpen { offset, length, fill, .. } => {
                let bytes = pattern(fill, length as usize);
                self.fs()
                    .write(fh, u64::from(offset), &bytes, Writing::default(), &caller())
                    .or_else(fail("write"))?;
                self.reference.content(node, |content| put(content, offset as usize, &bytes));
            }
            Op::Flush { .. } => {
                self.fs().flush(fh).or_else(fail("flush"))?;
                self.reference.flushed(node);
            }
            Op::Fsync { .. } => self.fs().fsync(fh, false).or_else(fail("fsync"))?,
            Op::Close { .. } => {
                self.handles.swap_remove(at);
                self.close(fh, node)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn close(&mut self, fh: Fh, node: usize) -> Outcome {
        let Body::File(expected) = self.reference.nodes[node].now.body.clone() else {
            return Err("a handle of no file".into());
        };
        let mut bytes = vec![0; expected.len() + 10];
        let got = self.fs().read(self.ino(node), fh, 0, &mut bytes).or_else(fail("read"))?;
        if bytes[..got] != expected[..] {
            return Err(format!("an open handle of node {node} reads something else"));
        }
        self.fs().flush(fh).or_else(fail("flush"))?;
        self.fs().release(fh).or_else(fail("release"))?;
        self.reference.nodes[node].opens -= 1;
        self.closed(node);
        Ok(())
    }

    fn attribute(&mut self, op: &Op) -> Outcome {
        let (Op::Chmod { node, .. }
        | Op::SetXattr { node, .. }
        | Op::RemoveXattr { node, .. }
        | Op::SetTimes { node, .. }) = *op
        else {
            return Ok(());
        };
        let usable: Vec<usize> = self
            .reference
            .reachable()
            .into_iter()
            .filter(|&n| !matches!(self.reference.nodes[n].now.body, Body::Symlink(_) | Body::Fifo))
            .collect();
        let Some(node) = self.pick(&usable, node) else { return Ok(()) };
        let ino = self.ino(node);
        match *op {
            Op::Chmod { mode, .. } => {
                let changes = Changes { mode: Some(u32::from(mode)), ..Changes::default() };
                self.fs().set_attributes(ino, &changes, &caller()).or_else(fail("chmod"))?;
                self.reference.attribute(node, |object| object.mode = u32::from(mode));
            }
            Op::SetTimes { secs, .. } => {
                let time = Timestamp { secs: i64::from(secs), nanos: 123_456_789 };
                let changes = Changes { mtime: Some(SetTime::To(time)), ..Changes::default() };
                self.fs().set_attributes(ino, &changes, &caller()).or_else(fail("utimens"))?;
                self.reference.attribute(node, |object| object.mtime = Some(i64::from(secs)));
            }
            Op::SetXattr { name, value, .. } => {
                let name = format!("user.x{name}");
                let value = vec![value; 5];
                match self.fs().set_xattr(ino, OsStr::new(&name), &value, 0, &caller()) {
                    Err(error) if error.is(rustix::io::Errno::OPNOTSUPP) => return Ok(()),
                    other => other.or_else(fail("setxattr"))?,
                }
                self.reference.attribute(node, |object| {
                    object.xattrs.insert(name, value);
                });
            }
            Op::RemoveXattr { name, .. } => {
                let name = format!("user.x{name}");
                let answer = self.fs().remove_xattr(ino, OsStr::new(&name), &caller());
                let had = self.reference.nodes[node].now.xattrs.contains_key(&name);
                if answer.is_ok() != had {
                    return Err(format!("removexattr answered {answer:?}, had: {had}"));
                }
                if had {
                    self.reference.attribute(node, |object| {
                        object.xattrs.remove(&name);
                    });
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn snapshot(&mut self) -> Outcome {
        self.names += 1;
        let name = format!("s{}", self.names);
        self.fs().create_snapshot(&name, false, &[]).or_else(fail("snapshot"))?;
        self.reference.seal_all();
        self.snapshots.insert(name, self.reference.dump(true));
        Ok(())
    }

    fn a_snapshot(&self, index: usize) -> Option<String> {
        let count = self.snapshots.len();
        self.snapshots.keys().nth(index.checked_rem(count)?).cloned()
    }

    fn rename_snapshot(&mut self, index: usize) -> Outcome {
        let Some(name) = self.a_snapshot(index) else { return Ok(()) };
        self.names += 1;
        let to = format!("r{}", self.names);
        self.catalog().rename_snapshot(&name, &to).or_else(fail("rename of a snapshot"))?;
        let dump = self.snapshots.remove(&name).expect("it is there");
        self.snapshots.insert(to, dump);
        Ok(())
    }

    fn delete_snapshot(&mut self, index: usize) -> Outcome {
        let Some(name) = self.a_snapshot(index) else { return Ok(()) };
        self.catalog().delete_snapshot(&name).or_else(fail("delete of a snapshot"))?;
        self.snapshots.remove(&name);
        Ok(())
    }

    fn thin(&mut self, every: usize) -> Outcome {
        let mut index = 0;
        self.moments.retain(|_| {
            index += 1;
            index % every == 0
        });
        let keep = self.moments.iter().map(|moment| moment.generation).collect();
        let volume = self.fs().volume();
        let now = volume.settle().or_else(fail("settle"))?;
        self.reference.seal_all();
        self.catalog().thin(now, &keep).or_else(fail("thin"))?;
        Ok(())
    }

    /// Dies in the midst of packing, with nothing unsealed. What was acknowledged is there again.
    fn die_while_packing(&mut self, steps: usize) -> Outcome {
        while let Some((fh, node)) = self.handles.pop() {
            self.close(fh, node)?;
        }
        self.fs().volume().settle().or_else(fail("settle"))?;
        self.reference.seal_all();
        let left = std::sync::atomic::AtomicUsize::new(steps);
        let died_at = parking_lot::Mutex::new(None);
        let step = |name: &str| match left.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) {
            0 => {
                *died_at.lock() = Some(name.to_string());
                Err(Error::Interrupted)
            }
            _ => Ok(()),
        };
        match self.fs().volume().pack_in_steps(&step) {
            Ok(_) | Err(Error::Interrupted) => {}
            Err(error) => return Err(format!("packing: {error}")),
        }
        self.deaths.extend(died_at.into_inner());
        // Dropped, not closed. A thread of it may hold the store's lock for a moment more.
        self.fs = None;
        let begun = std::time::Instant::now();
        let is_held = |why: &String| why.contains("in use by") && begun.elapsed().as_secs() < 60;
        let mut opened = open(&self.paths, self.excludes, &self.between);
        while opened.as_ref().is_err_and(is_held) {
            opened = open(&self.paths, self.excludes, &self.between);
        }
        self.fs = Some(opened?);
        self.fs().volume().tidy_history().or_else(fail("tidy"))?;
        self.nothing_unpacked()
    }

    fn remount(&mut self) -> Outcome {
        while let Some((fh, node)) = self.handles.pop() {
            self.close(fh, node)?;
        }
        self.unmount()?;
        self.fs = Some(open(&self.paths, self.excludes, &self.between)?);
        Ok(())
    }

    /// Ends the mount cleanly and compares the replicas.
    pub fn unmount(&mut self) -> Outcome {
        let fs = self.fs.take().expect("mounted");
        fs.volume().close().or_else(fail("close"))?;
        self.reference.seal_all();
        drop(fs);
        let paths = &self.paths;
        let differences = store::compare::compare(&paths[0], &paths[1]).or_else(fail("compare"))?;
        if let Some(first) = differences.first() {
            return Err(format!("the replicas differ: {first:?}"));
        }
        let options = CheckOptions { read_data: true, ..CheckOptions::default() };
        let report = check(paths, options, &Progress::silent()).or_else(fail("check"))?;
        match report.damage.first() {
            None => Ok(()),
            Some(first) => Err(format!("the check finds damage: {first}")),
        }
    }

    /// Compares everything, then once more after a remount, and with each replica alone.
    pub fn finish(&mut self) -> Outcome {
        self.compare()?;
        self.remount()?;
        self.compare()?;
        self.unmount()?;
        self.fs = Some(open(&self.paths[1..], self.excludes, &self.between)?);
        self.compare().map_err(|error| format!("with the second replica alone: {error}"))?;
        self.fs.take().expect("mounted").volume().close().or_else(fail("close"))
    }
}

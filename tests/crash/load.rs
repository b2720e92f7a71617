//! A mixed load on a real mount: each worker changes a folder of its own by the operations of the
//! model test, and knows of each what was acknowledged.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::fs::{
    Advice, AtFlags, CWD, FallocateFlags, FileType, Mode, RenameFlags, Timespec, Timestamps,
    XattrFlags,
};

use super::dice::Dice;
use super::sequence::operations;
use super::story::{DISKS, Mark, Story};
use crate::model::ops::Op;
use crate::model::reference::{Body, Dump, Reference, Shown, pattern, put};

/// What all workers share.
#[derive(Default)]
pub struct Shared {
    /// Nothing is expected to succeed any more.
    pub dying: AtomicBool,
    /// The workers are to end, after what they are at.
    pub ending: AtomicBool,
    /// Operations that were acknowledged.
    pub done: AtomicUsize,
}

/// One who changes a folder.
pub struct Worker<'a> {
    root: PathBuf,
    shared: &'a Shared,
    position: &'a (dyn Fn() -> [usize; DISKS] + Sync),
    reference: Reference,
    handles: Vec<(File, usize)>,
    story: Story,
}

/// What a step comes to.
enum Step {
    /// There was nothing to do it to.
    Nothing,
    /// The state after it, and the node that it makes durable.
    Done(Box<Reference>, Option<usize>),
}

impl Worker<'_> {
    /// Works in `root` until everything fails, it is to end, or `seeds` are used up. The last mark
    /// of the story is of what was not acknowledged, if anything was under way.
    pub fn work(
        root: &Path,
        seeds: impl Iterator<Item = u64>,
        shared: &Shared,
        position: &(dyn Fn() -> [usize; DISKS] + Sync),
    ) -> Result<Story, String> {
        let reference = Reference::new();
        let mut worker = Worker {
            root: root.to_path_buf(),
            shared,
            position,
            reference: reference.clone(),
            handles: Vec::new(),
            story: Story::default(),
        };
        fs::create_dir(root).map_err(|error| format!("{}: {error}", root.display()))?;
        File::open(root).and_then(|dir| dir.sync_all()).map_err(|error| error.to_string())?;
        worker.note(reference, None, "creation");
        for op in seeds.flat_map(operations) {
            if shared.ending.load(Ordering::SeqCst) {
                break;
            }
            let told = format!("{op:?}");
            let mut next = worker.reference.clone();
            match worker.step(&op, &mut next) {
                Ok(Step::Nothing) => {}
                Ok(Step::Done(next, synced)) => {
                    worker.reference = (*next).clone();
                    worker.note(*next, synced, &format!("{told} of {synced:?}"));
                    shared.done.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) if shared.dying.load(Ordering::SeqCst) => {
                    worker.note(next, None, &format!("{told}: {error}"));
                    worker.story.marks.last_mut().expect("noted").position = [usize::MAX; DISKS];
                    return Ok(worker.story);
                }
                Err(error) => return Err(format!("{told}: {error}")),
            }
        }
        Ok(worker.story)
    }

    fn note(&mut self, reference: Reference, synced: Option<usize>, what: &str) {
        self.story.marks.push(Mark {
            position: (self.position)(),
            reference,
            synced,
            synced_all: false,
            barrier: synced.is_some(),
            past: Default::default(),
            what: what.into(),
        });
    }

    fn path(&self, of: usize) -> Option<PathBuf> {
        if of == 0 {
            return Some(self.root.clone());
        }
        let paths = self.reference.paths();
        let (path, _) = paths.into_iter().find(|(_, node)| *node == of)?;
        Some(self.root.join(&path[1..]))
    }

    fn dir(&self, index: usize) -> (usize, PathBuf) {
        let dirs = self.reference.dirs();
        let dir = dirs[index % dirs.len()];
        (dir, self.path(dir).expect("a directory has a path"))
    }

    fn file(&self, index: usize) -> Option<(usize, PathBuf)> {
        let files = self.reference.files();
        let node = files[index.checked_rem(files.len())?];
        Some((node, self.path(node)?))
    }

    /// A file or directory.
    fn node(&self, index: usize) -> Option<(usize, PathBuf)> {
        let mut all = self.reference.reachable();
        all.retain(|&n| matches!(self.reference.nodes[n].now.body, Body::File(_) | Body::Dir(_)));
        let node = all[index.checked_rem(all.len())?];
        Some((node, self.path(node)?))
    }

    /// Does an operation; `next` becomes the state after it before it is begun.
    fn step(&mut self, op: &Op, next: &mut Reference) -> io::Result<Step> {
        let mut synced = None;
        let done = match op {
            Op::Create { .. } | Op::Mkdir { .. } | Op::Symlink { .. } | Op::Fifo { .. } => {
                self.make(op, next)?
            }
            Op::Write { .. }
            | Op::Truncate { .. }
            | Op::OpenTruncate { .. }
            | Op::Punch { .. }
            | Op::Copy { .. } => self.content(op, next)?,
            Op::Open { file } => {
                if let Some((node, path)) = self.file(*file) {
                    let file = File::options().read(true).write(true).open(path)?;
                    self.handles.push((file, node));
                }
                false
            }
            Op::WriteOpen { handle, .. } | Op::Fsync { handle } | Op::Close { handle } => {
                let Some(at) = handle.checked_rem(self.handles.len()) else {
                    return Ok(Step::Nothing);
                };
                let (file, node) = &self.handles[at];
                match *op {
                    Op::WriteOpen { offset, length, fill, .. } => {
                        let bytes = pattern(fill, length as usize);
                        next.content(*node, |content| {
                            put(content, offset as usize, &bytes);
                        });
                        file.write_all_at(&bytes, offset.into())?;
                    }
                    Op::Fsync { .. } => {
                        file.sync_all()?;
                        synced = Some(*node);
                    }
                    _ => drop(self.handles.swap_remove(at)),
                }
                true
            }
            Op::Unlink { .. } | Op::Rmdir { .. } | Op::Rename { .. } | Op::Link { .. } => {
                self.names(op, next)?
            }
            Op::Chmod { node, mode } => match self.node(*node) {
                // What its own worker cannot enter, nobody needs to look into; root can.
                Some((node, path)) => {
                    next.attribute(node, |object| object.mode = u32::from(*mode));
                    fs::set_permissions(path, fs::Permissions::from_mode(u32::from(*mode)))?;
                    true
                }
                None => false,
            },
            Op::SetXattr { node, name, value } => match self.node(*node) {
                Some((node, path)) => {
                    let (name, value) = (format!("user.x{name}"), vec![*value; 5]);
                    next.attribute(node, |object| {
                        object.xattrs.insert(name.clone(), value.clone());
                    });
                    rustix::fs::lsetxattr(path, name, &value, XattrFlags::empty())?;
                    true
                }
                None => false,
            },
            // What times the live tree has after a crash is not promised, so nobody is told of it.
            Op::SetTimes { node, secs } => match self.node(*node) {
                Some((_, path)) => {
                    let modified = Timespec { tv_sec: i64::from(*secs), tv_nsec: 0 };
                    let times = Timestamps { last_access: modified, last_modification: modified };
                    rustix::fs::utimensat(CWD, path, &times, AtFlags::empty())?;
                    true
                }
                None => false,
            },
            _ => false,
        };
        Ok(if done { Step::Done(Box::new(next.clone()), synced) } else { Step::Nothing })
    }

    fn make(&mut self, op: &Op, next: &mut Reference) -> io::Result<bool> {
        let (Op::Create { dir, name, .. }
        | Op::Mkdir { dir, name }
        | Op::Symlink { dir, name }
        | Op::Fifo { dir, name }) = *op
        else {
            return Ok(false);
        };
        let ((dir, path), name) = (self.dir(dir), format!("n{name}"));
        if self.reference.entries(dir).contains_key(&name) {
            return Ok(false);
        }
        let at = path.join(&name);
        let mut add = |body, mode| next.add(dir, &name, body, mode, 0);
        match *op {
            Op::Create { keep_open, .. } => {
                let node = add(Body::File(Vec::new()), 0o644);
                let mut options = File::options();
                let file = options.read(true).write(true).create_new(true).mode(0o644).open(at)?;
                if keep_open {
                    self.handles.push((file, node));
                }
            }
            Op::Mkdir { .. } => {
                add(Body::Dir(Default::default()), 0o755);
                fs::create_dir(at)?;
            }
            Op::Symlink { .. } => {
                add(Body::Symlink(b"../some/where".to_vec()), 0o777);
                symlink("../some/where", at)?;
            }
            _ => {
                add(Body::Fifo, 0o600);
                rustix::fs::mknodat(CWD, at, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
            }
        }
        Ok(true)
    }

    fn content(&mut self, op: &Op, next: &mut Reference) -> io::Result<bool> {
        let (Op::Write { file, .. }
        | Op::Truncate { file, .. }
        | Op::OpenTruncate { file }
        | Op::Punch { file, .. }
        | Op::Copy { to: file, .. }) = *op
        else {
            return Ok(false);
        };
        let Some((node, path)) = self.file(file) else { return Ok(false) };
        let open = || File::options().read(true).write(true).open(&path);
        match *op {
            Op::Write { offset, length, fill, .. } => {
                let bytes = pattern(fill, length as usize);
                next.content(node, |content| put(content, offset as usize, &bytes));
                open()?.write_all_at(&bytes, offset.into())?;
            }
            Op::Truncate { size, .. } => {
                next.truncated(node, size as usize);
                open()?.set_len(size.into())?;
            }
            Op::OpenTruncate { .. } => {
                next.truncated(node, 0);
                File::options().write(true).truncate(true).open(&path)?;
            }
            Op::Punch { offset, length, .. } => {
                next.content(node, |content| {
                    let start = content.len().min(offset as usize);
                    let end = content.len().min((offset + length) as usize);
                    content[start..end].fill(0);
                });
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(open()?, mode, offset.into(), length.into())?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn names(&mut self, op: &Op, next: &mut Reference) -> io::Result<bool> {
        let entry = |dir: usize, name: u8| {
            let ((dir, path), name) = (self.dir(dir), format!("n{name}"));
            let at = path.join(&name);
            (dir, self.reference.entries(dir).get(&name).copied(), name, at)
        };
        let is_dir = |node: usize| matches!(self.reference.nodes[node].now.body, Body::Dir(_));
        match *op {
            Op::Unlink { dir, name } => {
                let (dir, Some(node), name, at) = entry(dir, name) else { return Ok(false) };
                if is_dir(node) {
                    return Ok(false);
                }
                next.leave(dir, &name);
                next.nodes[node].links -= 1;
                fs::remove_file(at)?;
            }
            Op::Rmdir { dir, name } => {
                let (dir, Some(node), name, at) = entry(dir, name) else { return Ok(false) };
                if !is_dir(node) || !self.reference.entries(node).is_empty() {
                    return Ok(false);
                }
                next.leave(dir, &name);
                fs::remove_dir(at)?;
            }
            Op::Link { file, dir, name } => {
                let Some((node, path)) = self.file(file) else { return Ok(false) };
                let (dir, None, name, at) = entry(dir, name) else { return Ok(false) };
                next.enter(dir, &name, node);
                next.nodes[node].links += 1;
                fs::hard_link(path, at)?;
            }
            Op::Rename { dir, name, to_dir, to_name, mode } => {
                let (dir, Some(node), name, from) = entry(dir, name) else { return Ok(false) };
                let (to_dir, target, to_name, to) = entry(to_dir, to_name);
                let loops = is_dir(node) && self.reference.contains(node, to_dir);
                let over = target.is_some_and(|target| target == node || is_dir(target));
                let exchange = mode == 1 && target.is_some();
                if loops || over || (target.is_some() && is_dir(node)) {
                    return Ok(false);
                }
                next.leave(dir, &name);
                if let (Some(target), true) = (target, exchange) {
                    next.enter(dir, &name, target);
                } else if let Some(target) = target {
                    next.nodes[target].links -= 1;
                }
                next.enter(to_dir, &to_name, node);
                let flags = if exchange { RenameFlags::EXCHANGE } else { RenameFlags::empty() };
                rustix::fs::renameat_with(CWD, from, CWD, to, flags)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// A tree as the model tells of one.
pub fn dump(root: &Path) -> Result<Dump, String> {
    let mut found = Dump::new();
    let mut first = std::collections::BTreeMap::new();
    dump_dir(root, "", &mut found, &mut first)?;
    Ok(found)
}

fn dump_dir(
    dir: &Path,
    path: &str,
    found: &mut Dump,
    first: &mut std::collections::BTreeMap<u64, String>,
) -> Result<(), String> {
    let told = |at: &Path| {
        let at = at.to_path_buf();
        let ino = fs::symlink_metadata(&at).map_or(0, |meta| meta.ino());
        move |error: io::Error| format!("{} (inode {ino:#x}): {error}", at.display())
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(told(dir))? {
        names.push(entry.map_err(told(dir))?.file_name());
    }
    names.sort();
    for name in names {
        let at = dir.join(&name);
        let path = format!("{path}/{}", name.to_string_lossy());
        let meta = fs::symlink_metadata(&at).map_err(told(&at))?;
        let (kind, content) = match FileType::from_raw_mode(meta.mode()) {
            FileType::RegularFile => ('f', read(&at).map_err(told(&at))?),
            FileType::Directory => ('d', Vec::new()),
            FileType::Symlink => {
                let target = fs::read_link(&at).map_err(told(&at))?;
                ('l', target.into_os_string().into_encoded_bytes())
            }
            _ => ('p', Vec::new()),
        };
        let xattrs = crate::common::tree::xattrs_of(&at).into_iter();
        let user = xattrs.filter(|(name, _)| name.starts_with(b"user."));
        let first_link = first.entry(meta.ino()).or_insert_with(|| path.clone()).clone();
        let shown = Shown {
            kind,
            content,
            mode: meta.mode() & 0o7777,
            xattrs: user.map(|(n, v)| (String::from_utf8_lossy(&n).into_owned(), v)).collect(),
            links: if kind == 'd' { 0 } else { meta.nlink() as u32 },
            mtime: Some(meta.mtime()),
            first_link,
        };
        found.insert(path.clone(), shown);
        if kind == 'd' {
            dump_dir(&at, &path, found, first)?;
        }
    }
    Ok(())
}

/// What the filesystem has of a file, not what the kernel kept of an earlier look.
fn read(at: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(at)?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Seeds of a worker's operations, without end.
pub fn seeds(of: u64) -> impl Iterator<Item = u64> {
    let mut dice = Dice::new(of);
    std::iter::repeat_with(move || dice.roll() >> 8)
}

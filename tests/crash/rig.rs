//! A real filesystem on a disk that logs every block written to it, so that the disk of any earlier
//! moment can be made again.
//!
//! `qemu-storage-daemon` writes the log (the format of Linux' dm-log-writes) and shows the disk as
//! a file by FUSE; a loop device makes a block device of that.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::Advice;
use rustix::process::{Pid, Signal, kill_process};

use super::dice::Dice;
use crate::common::disk::LoopFs;
use crate::common::{self, mounts_at, run, wait_until};

const SECTOR: u64 = 512;
/// A mount reads the first superblock of btrfs only, and refuses one whose sum is wrong.
const BTRFS_BLOCK: u64 = 4096;
const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;

/// A mounted filesystem on a logged disk.
pub struct LoggedFs {
    scratch: tempfile::TempDir,
    kind: &'static str,
    server: Child,
    device: Option<String>,
    root: PathBuf,
    log: File,
}

/// The log of a disk that is not in use any more, with what was on it before.
pub struct BlockLog {
    scratch: tempfile::TempDir,
    pub kind: &'static str,
    entries: Vec<Entry>,
    log: File,
}

struct Entry {
    sector: u64,
    sectors: u64,
    flags: u64,
    data_at: u64,
}

impl LoggedFs {
    /// Makes a filesystem of `kind` and mounts it.
    #[track_caller]
    pub fn new(kind: &'static str) -> LoggedFs {
        common::need(&["qemu-storage-daemon", "losetup", &format!("mkfs.{kind}")]);
        let scratch = common::scratch();
        let at = |name: &str| scratch.path().join(name);
        LoopFs::format(kind, &at("base"), size_mebibytes(kind));
        run(Command::new("cp").arg("--sparse=always").args([at("base"), at("work")])).ok();
        File::create(at("disk")).expect("a file can be made");
        let log = File::create(at("log")).expect("a file can be made");
        log.set_len(4 << 30).expect("a file can be sized");
        let node = |name: &str, file: &str| {
            format!("driver=file,node-name={name},filename={}", at(file).display())
        };
        let top = "driver=raw,node-name=top,file=logged";
        let logged = "driver=blklogwrites,node-name=logged,file=base,log=log,log-sector-size=512,\
                      log-super-update-interval=1";
        let shown = at("disk").display().to_string();
        let export = format!("type=fuse,id=shown,node-name=top,mountpoint={shown},writable=on");
        let server = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node("base", "work"), "--blockdev", &node("log", "log")])
            .args(["--blockdev", logged, "--blockdev", top, "--export", &export])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon starts");
        let root = at("root");
        fs::create_dir(&root).expect("a mountpoint can be made");
        let log = File::open(at("log")).expect("the log is there");
        let mut made = LoggedFs { scratch, kind, server, device: None, root, log };
        let disk = made.scratch.path().join("disk");
        wait_until("the logged disk is shown", 30, || {
            fs::metadata(&disk).is_ok_and(|meta| meta.len() > 0)
        });
        let device = run(Command::new("losetup").args(["-f", "--show"]).arg(&disk)).ok();
        let device = device.trim().to_owned();
        made.device = Some(device.clone());
        run(Command::new("mount").args(["-t", kind, &device]).arg(&made.root)).ok();
        made
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// How many entries the log has.
    pub fn position(&self) -> usize {
        let mut count = [0; 8];
        self.log.read_exact_at(&mut count, 16).expect("the log can be read");
        u64::from_le_bytes(count) as usize
    }

    /// Takes the disk's power: no call on it succeeds any more.
    pub fn unplug(&self) {
        self.signal(Signal::KILL);
        wait_until("the disk is dead", 20, || common::has_ended(self.server.id()));
    }

    /// Nothing that reaches the disk returns, until [`LoggedFs::resume`]. What memory has of `file`
    /// and of the disk is dropped before that.
    #[track_caller]
    pub fn hang(&self, file: &Path) {
        run(Command::new("sync").arg("-f").arg(&self.root)).ok();
        for cached in [file, &self.scratch.path().join("disk")] {
            let cached = File::open(cached).expect("it can be opened");
            cached.sync_all().expect("it can be synced");
            rustix::fs::fadvise(cached, 0, None, Advice::DontNeed).expect("it can be dropped");
        }
        self.signal(Signal::STOP);
    }

    /// Lets all that waits for the disk go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.server.id()).ok().and_then(Pid::from_raw);
        // It may be dead already.
        let _ = kill_process(pid.expect("a server has a process id"), signal);
    }

    /// Takes the disk out of use; what remains is its log.
    pub fn into_log(mut self) -> BlockLog {
        self.end();
        let scratch = std::mem::replace(&mut self.scratch, common::scratch());
        let log = File::open(scratch.path().join("log")).expect("the log is there");
        let entries = entries(&log);
        BlockLog { scratch, kind: self.kind, entries, log }
    }

    fn end(&mut self) {
        self.resume();
        if !mounts_at(&self.root).is_empty() {
            let done = run(Command::new("umount").arg(&self.root));
            if done.code != 0 {
                run(Command::new("umount").arg("-l").arg(&self.root));
                eprintln!("{}", done.told());
            }
        }
        if let Some(device) = self.device.take() {
            run(Command::new("losetup").args(["-d", &device]));
        }
        // It notices a signal only with the next event if that comes just before it waits for one.
        wait_until("the server of the logged disk ends", 60, || {
            let runs = matches!(self.server.try_wait(), Ok(None));
            runs.then(|| self.signal(Signal::TERM));
            !runs
        });
        let disk = self.scratch.path().join("disk");
        if !mounts_at(&disk).is_empty() {
            run(Command::new("umount").arg("-l").arg(&disk));
        }
    }
}

impl Drop for LoggedFs {
    fn drop(&mut self) {
        self.end();
    }
}

/// The smallest sizes that the mkfs programs take without a word.
fn size_mebibytes(kind: &str) -> u64 {
    match kind {
        "xfs" => 300,
        "btrfs" => 128,
        _ => 64,
    }
}

fn entries(log: &File) -> Vec<Entry> {
    let number = |at: u64| {
        let mut bytes = [0; 8];
        log.read_exact_at(&mut bytes, at).expect("the log can be read");
        u64::from_le_bytes(bytes)
    };
    assert_eq!(number(0), MAGIC, "this is no block log");
    let count = number(16);
    let mut at = SECTOR;
    let mut found = Vec::new();
    for _ in 0..count {
        let entry = Entry {
            sector: number(at),
            sectors: number(at + 8),
            flags: number(at + 16),
            data_at: at + SECTOR,
        };
        at += SECTOR;
        if entry.flags & DISCARD == 0 {
            at += entry.sectors * SECTOR;
        }
        found.push(entry);
    }
    found
}

impl BlockLog {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Mounts the disk as it was after `until` entries. With `dice`, what was written after the
    /// last flush is there or not, and the last write may be torn, on btrfs between two of its
    /// blocks: it relies on a disk that writes its superblock, 4 KiB, wholly or not at all.
    #[track_caller]
    pub fn mount_as_of(&self, until: usize, mut dice: Option<&mut Dice>) -> LoopFs {
        let scratch = common::scratch();
        let image = scratch.path().join("image");
        let base = self.scratch.path().join("base");
        run(Command::new("cp").arg("--sparse=always").args([&base, &image])).ok();
        let file = File::options().write(true).open(&image).expect("the image can be written");
        let own = &self.entries[..until];
        let flushed = own.iter().rposition(|entry| entry.flags & FLUSH != 0).unwrap_or(0);
        for (index, entry) in own.iter().enumerate() {
            if entry.flags & DISCARD != 0 || entry.sectors == 0 {
                continue;
            }
            let mut sectors = entry.sectors;
            if let Some(dice) = dice.as_mut().filter(|_| index > flushed && entry.flags & FUA == 0)
            {
                if dice.percent(50) {
                    continue;
                }
                if index + 1 == until {
                    let whole = if self.kind == "btrfs" { BTRFS_BLOCK / SECTOR } else { 1 };
                    let torn = dice.between(1, sectors as usize) as u64;
                    sectors = torn.next_multiple_of(whole).min(sectors);
                }
            }
            let mut bytes = vec![0; (sectors * SECTOR) as usize];
            self.log.read_exact_at(&mut bytes, entry.data_at).expect("the log can be read");
            file.write_all_at(&bytes, entry.sector * SECTOR).expect("the image can be written");
        }
        drop(file);
        LoopFs::over(self.kind, scratch)
    }
}

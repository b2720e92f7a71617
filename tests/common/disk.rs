//! Small real filesystems in files: ext4, XFS and btrfs on loop devices, in memory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::mounts_at;
use super::run::{Done, run};

/// What `umount` ends with where the mount is busy (umount(8)).
const UMOUNT_FAILED: i32 = 32;
/// What `rearview umount` ends with then.
pub const IN_USE: i32 = 11;

/// A filesystem of its own, unmounted and detached when dropped.
pub struct LoopFs {
    scratch: tempfile::TempDir,
    device: String,
    root: PathBuf,
}

impl LoopFs {
    /// An ext4 of `mebibytes`.
    #[track_caller]
    pub fn ext4(mebibytes: u64) -> LoopFs {
        LoopFs::make("ext4", mebibytes)
    }

    /// An ext4 of `mebibytes` that has room for so many files and directories.
    #[track_caller]
    pub fn ext4_of_inodes(mebibytes: u64, inodes: u64) -> LoopFs {
        let scratch = super::scratch();
        let more = ["-N".to_owned(), inodes.to_string()];
        LoopFs::format_with("ext4", &scratch.path().join("image"), mebibytes, &more);
        LoopFs::over("ext4", scratch)
    }

    /// An XFS of `mebibytes` (at least 300).
    #[track_caller]
    pub fn xfs(mebibytes: u64) -> LoopFs {
        LoopFs::make("xfs", mebibytes)
    }

    /// A btrfs of `mebibytes` (at least 110).
    #[track_caller]
    pub fn btrfs(mebibytes: u64) -> LoopFs {
        LoopFs::make("btrfs", mebibytes)
    }

    #[track_caller]
    fn make(kind: &str, mebibytes: u64) -> LoopFs {
        let scratch = super::scratch();
        LoopFs::format(kind, &scratch.path().join("image"), mebibytes);
        LoopFs::over(kind, scratch)
    }

    /// Makes an empty filesystem in a file.
    #[track_caller]
    pub fn format(kind: &str, image: &Path, mebibytes: u64) {
        LoopFs::format_with(kind, image, mebibytes, &[]);
    }

    #[track_caller]
    fn format_with(kind: &str, image: &Path, mebibytes: u64, more: &[String]) {
        super::need(&[&format!("mkfs.{kind}")]);
        let file = std::fs::File::create(image).expect("an image can be made");
        file.set_len(mebibytes << 20).expect("an image can be sized");
        let options = if kind == "ext4" { &["-q", "-F", "-m", "0"][..] } else { &["-q", "-f"] };
        // mkfs.btrfs looks at all mounts and gives up at one whose daemon was killed: tests beside
        // this one have such for a moment.
        let mut made = None;
        super::wait_until("a filesystem is made", 60, || {
            let done =
                run(Command::new(format!("mkfs.{kind}")).args(options).args(more).arg(image));
            let again = done.code != 0 && done.stderr.contains("not connected");
            made = Some(done);
            !again
        });
        made.expect("it ran").ok();
    }

    /// Mounts the file `image` in a scratch folder.
    #[track_caller]
    pub fn over(kind: &str, scratch: tempfile::TempDir) -> LoopFs {
        super::need(&["losetup"]);
        let image = scratch.path().join("image");
        let device = run(Command::new("losetup").args(["-f", "--show"]).arg(&image)).ok();
        let device = device.trim().to_owned();
        let root = scratch.path().join("root");
        std::fs::create_dir(&root).expect("a mountpoint can be made");
        // Dropped also where the mount fails, so that the device is given back.
        let made = LoopFs { scratch, device, root };
        run(Command::new("mount").args(["-t", kind, &made.device]).arg(&made.root)).ok();
        made
    }

    /// Where it is mounted.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes it away, as pulling the plug of a disk nobody uses does.
    #[track_caller]
    pub fn unmount(&self) {
        self.try_unmount().unwrap_or_else(|why| panic!("{why}"));
    }

    fn try_unmount(&self) -> Result<(), String> {
        let unmount = || run(Command::new("umount").arg(&self.root));
        let done = unmount_unused(&self.root, UMOUNT_FAILED, unmount)?;
        if done.code == 0 { Ok(()) } else { Err(done.told()) }
    }

    /// Brings it back after [`LoopFs::unmount`].
    #[track_caller]
    pub fn mount(&self) {
        run(Command::new("mount").arg(&self.device).arg(&self.root)).ok();
    }

    /// Bytes that were written to its device
    /// ([statistics](https://docs.kernel.org/block/stat.html)).
    pub fn written(&self) -> u64 {
        let name = self.device.rsplit('/').next().expect("a name");
        let text = std::fs::read_to_string(format!("/sys/block/{name}/stat")).expect("statistics");
        let sectors = text.split_whitespace().nth(6).and_then(|word| word.parse::<u64>().ok());
        512 * sectors.expect("sectors written")
    }

    /// Remounts it read-only: the next write to it fails.
    #[track_caller]
    pub fn read_only(&self) {
        run(Command::new("mount").args(["-o", "remount,ro"]).arg(&self.root)).ok();
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        let mut left = None;
        if !mounts_at(&self.root).is_empty() {
            left = self.try_unmount().err();
            if left.is_some() {
                run(Command::new("umount").arg("-l").arg(&self.root));
            }
        }
        run(Command::new("losetup").args(["-d", &self.device]));
        if let (Some(text), false) = (left, std::thread::panicking()) {
            panic!("{:?} could not be unmounted: {text}", self.scratch.path());
        }
    }
}

/// Does `unmount` until it does not end with the code `busy`. Who looks at a path below at that
/// moment, as what lists mounts does, a child of ours that has yet to become its command, or one of
/// a program that was just killed makes the mount busy for a moment. Told is one that stays so.
pub fn unmount_unused(mnt: &Path, busy: i32, unmount: impl Fn() -> Done) -> Result<Done, String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let done = unmount();
        if done.code != busy {
            return Ok(done);
        }
        if Instant::now() > deadline {
            let users = run(Command::new("fuser").arg("-vm").arg(mnt));
            return Err(format!("{}\nusers: {}", done.told(), users.told()));
        }
    }
}

//! A store mounted by the real binary, taken down again whatever happens.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use rearviewfs::check::{CheckOptions, check};
use rearviewfs::progress::Progress;

use super::disk::{IN_USE, unmount_unused};
use super::run::{Done, binary, rearview, run, run_within};
use super::{daemon_of, has_ended, mounts_at, tree, wait_until};

/// A mounted store with its backings.
pub struct Mounted {
    scratch: tempfile::TempDir,
    /// The backings, in the order of the command line.
    pub backings: Vec<PathBuf>,
    /// Where the store is mounted.
    pub mnt: PathBuf,
    options: Vec<OsString>,
    mounted: bool,
}

impl Mounted {
    /// Two empty backings in memory, mounted for all users.
    #[track_caller]
    pub fn new() -> Mounted {
        Mounted::with_replicas(2)
    }

    /// As many empty backings, mounted.
    #[track_caller]
    pub fn with_replicas(count: usize) -> Mounted {
        let mut store = Mounted::unmounted(count);
        store.mount().ok();
        store
    }

    /// Two empty backings, mounted with `-o options`.
    #[track_caller]
    pub fn with_options(options: &str) -> Mounted {
        let mut store = Mounted::unmounted(2);
        store.options = vec!["-o".into(), options.into()];
        store.mount().ok();
        store
    }

    /// A store on the given backings, mounted.
    #[track_caller]
    pub fn over(backings: Vec<PathBuf>) -> Mounted {
        let mut store = Mounted::unmounted(0);
        store.backings = backings;
        store.mount().ok();
        store
    }

    /// As many empty backings and a mountpoint, nothing mounted yet.
    #[track_caller]
    pub fn unmounted(count: usize) -> Mounted {
        super::need(&["fusermount3", "fuser"]);
        let scratch = super::scratch();
        let backings: Vec<PathBuf> =
            (0..count).map(|i| scratch.path().join(format!("backing{i}"))).collect();
        for backing in &backings {
            std::fs::create_dir(backing).expect("a backing can be made");
        }
        let mnt = scratch.path().join("mnt");
        std::fs::create_dir(&mnt).expect("a mountpoint can be made");
        let options = vec!["-o".into(), "allow_other,dev,suid,snapshot_every=0".into()];
        Mounted { scratch, backings, mnt, options, mounted: false }
    }

    /// The options of the next mount, in place of `-o allow_other,dev,suid,snapshot_every=0`.
    pub fn set_options(&mut self, words: &[&str]) {
        self.options = words.iter().map(OsString::from).collect();
    }

    /// A path in the mount.
    pub fn path(&self, below: &str) -> PathBuf {
        self.mnt.join(below)
    }

    /// A folder beside the mount and the backings, for what a test keeps elsewhere.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Mounts with all backings.
    #[track_caller]
    pub fn mount(&mut self) -> Done {
        let backings = self.backings.clone();
        self.mount_only(&backings)
    }

    /// Mounts with some of the backings.
    #[track_caller]
    pub fn mount_only(&mut self, backings: &[PathBuf]) -> Done {
        let mut command = Command::new(binary());
        command.arg("mount").args(&self.options).args(backings).arg(&self.mnt);
        let done = run_within(&mut command, 120);
        self.mounted = done.code == 0;
        if self.mounted {
            assert!(self.is_mounted(), "mount said 0 but nothing is mounted: {}", done.told());
        }
        done
    }

    /// Whether the kernel has our mount.
    pub fn is_mounted(&self) -> bool {
        mounts_at(&self.mnt).iter().any(|(_, kind)| kind.starts_with("fuse"))
    }

    /// Unmounts with `rearview umount`; when it returns, the daemon has closed the store.
    #[track_caller]
    pub fn unmount(&mut self) {
        let daemon = daemon_of(&self.mnt);
        let unmount = || rearview([OsString::from("umount"), self.mnt.clone().into()]);
        let done = unmount_unused(&self.mnt, IN_USE, unmount);
        done.unwrap_or_else(|why| panic!("{why}")).ok();
        self.assert_gone();
        // The disks below can be unmounted only when it has let go of them.
        wait_until("the daemon has ended", 20, || daemon.is_none_or(has_ended));
        self.mounted = false;
    }

    /// Notes that something else than [`Mounted::unmount`] ended the mount, waits until the daemon
    /// is gone, and fails on leftovers.
    #[track_caller]
    pub fn ended_elsewhere(&mut self) {
        wait_until("the daemon ends after its unmount", 60, || daemon_of(&self.mnt).is_none());
        self.assert_gone();
        self.mounted = false;
    }

    /// Unmounts and mounts again.
    #[track_caller]
    pub fn remount(&mut self) {
        self.unmount();
        self.mount().ok();
    }

    #[track_caller]
    fn assert_gone(&self) {
        assert!(mounts_at(&self.mnt).is_empty(), "still mounted: {:?}", mounts_at(&self.mnt));
        // The store is closed; the process itself may take a moment to be gone.
        wait_until("the daemon ends", 20, || daemon_of(&self.mnt).is_none());
    }

    /// The process serving the mount.
    #[track_caller]
    pub fn daemon(&self) -> u32 {
        daemon_of(&self.mnt).expect("a daemon serves the mount")
    }

    /// Kills the daemon, as by `kill -9`, and waits until it has nothing open any more.
    #[track_caller]
    pub fn kill(&self) {
        let daemon = self.kill_at_once();
        wait_until("the daemon is gone", 20, || has_ended(daemon));
    }

    /// Kills the daemon, one of whose threads may be where not even that ends it.
    #[track_caller]
    pub fn kill_at_once(&self) -> u32 {
        let daemon = self.daemon();
        let pid = i32::try_from(daemon).ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.expect("a daemon has a process id");
        let killed = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        killed.expect("it can be killed");
        daemon
    }

    /// Gives the store a policy, in the form of `[policy]` in `store.toml`; mounts anew.
    #[track_caller]
    pub fn set_policy(&mut self, text: &str) {
        use rearviewfs::{history::History, progress::Progress, store, volume};
        self.unmount();
        let recover = |replicas: &_, catalog: &_, from| History::recover(replicas, catalog, from);
        let options = store::OpenOptions::default();
        let opened = store::open(&self.backings, &options, &recover, &Progress::silent())
            .expect("the store opens");
        let volume = volume::Volume::open(opened, volume::VolumeOptions::default())
            .expect("the volume opens");
        let policy = toml::from_str(text).expect("a policy");
        volume.set_policy(&policy).expect("the policy is accepted");
        volume.close().expect("the volume closes");
        drop(volume);
        self.set_options(&["-o", "allow_other,dev,suid"]);
        self.mount().ok();
    }

    /// Takes a snapshot by the command.
    #[track_caller]
    pub fn snapshot(&self, name: &str) {
        let words: [OsString; 4] =
            ["snapshot".into(), "create".into(), self.mnt.clone().into(), name.into()];
        rearview(words).ok();
    }

    /// The path of a snapshot.
    pub fn past(&self, name: &str) -> PathBuf {
        self.mnt.join(".snapshots").join(name)
    }

    /// Runs `rearview` with `words` from the root of the mount.
    #[track_caller]
    pub fn rearview(&self, words: &[&str]) -> Done {
        super::run::rearview_in(&self.mnt, words)
    }

    /// Fails unless all backings hold the same tree.
    #[track_caller]
    pub fn assert_replicas_identical(&self) {
        let first = tree::read_tree(&self.backings[0]);
        for other in &self.backings[1..] {
            let second = tree::read_tree(other);
            tree::assert_trees("the replicas", &first, &second);
        }
    }

    /// Fails unless the unmounted store holds what it promises: see `rearviewfs::check`.
    #[track_caller]
    pub fn assert_sound(&self) {
        let options = CheckOptions { read_data: true, ..CheckOptions::default() };
        let report = check(&self.backings, options, &Progress::silent()).expect("can be checked");
        assert!(report.damage.is_empty(), "damage: {:#?}", report.damage);
        assert!(report.leftovers.is_empty(), "left over: {:#?}", report.leftovers);
    }

    /// Fails unless the mount shows what the first backing holds, then unmounts and compares all.
    #[track_caller]
    pub fn finish(mut self) {
        let live = tree::read_tree(&self.mnt);
        self.unmount();
        tree::assert_trees("mount and backing", &live, &tree::read_tree(&self.backings[0]));
        self.assert_replicas_identical();
        self.assert_sound();
    }

    /// Fails if the daemon has more files open each time `work` is done. The first time warms
    /// caches of a fixed size; a leak grows with the work.
    #[track_caller]
    pub fn assert_no_open_file_leak(&self, mut work: impl FnMut(usize)) {
        let daemon = self.daemon();
        work(0);
        let before = super::open_files(daemon);
        work(1);
        let _ = std::fs::write("/proc/sys/vm/drop_caches", "2");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while super::open_files(daemon) > before + 24 {
            assert!(
                std::time::Instant::now() < deadline,
                "{before} files open before, {} after: {:?}",
                super::open_files(daemon),
                super::open_file_names(daemon)
            );
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if mounts_at(&self.mnt).is_empty() && daemon_of(&self.mnt).is_none() {
            return;
        }
        let done = run_within(Command::new(binary()).arg("umount").arg(&self.mnt), 60);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while mounts_at(&self.mnt).is_empty() && std::time::Instant::now() < deadline {
            if daemon_of(&self.mnt).is_none() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let users = run(Command::new("fuser").arg("-vm").arg(&self.mnt));
        run(Command::new("umount").arg("-l").arg(&self.mnt));
        let pid = daemon_of(&self.mnt).and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let text = format!("left behind: {}\nusers: {}", done.told(), users.told());
        assert!(std::thread::panicking(), "{text}");
        eprintln!("{text}");
    }
}

/// The path of `mnt` as words for a command line.
pub fn word(path: &Path) -> String {
    path.to_str().expect("paths of tests are UTF-8").to_owned()
}

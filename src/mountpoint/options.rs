//! The options of `-o`: ours, and the generic ones that mount(8) and fstab hand to every helper.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::fs::SnapDir;
use crate::retention::store::Limit;
use crate::retention::{Span, StorePolicy};
use crate::types::{EntryName, REPLICAS_MAX, escape};

/// How many threads serve the kernel at most.
const THREADS_MAX: usize = 64;

/// The longest that a call on a backing may be given, in seconds.
const TIMEOUT_SECS_MAX: u64 = 3600;

/// How a store is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Users other than the mounter may use the mount.
    pub allow_other: bool,
    /// Whether and where `.snapshots` shows.
    pub snapdir: SnapDir,
    /// What `.snapshots` is called.
    pub snapdir_name: EntryName,
    /// What the mount table shows as the source instead of the backings.
    pub fs_name: Option<String>,
    /// Threads that serve the kernel; 0 = by the number of processors.
    pub threads: usize,
    /// The kernel's requests may come over io_uring, where it offers that.
    pub io_uring: bool,
    /// Device nodes work.
    pub dev: bool,
    /// Set-user-id bits work.
    pub suid: bool,
    /// Programs may be executed.
    pub exec: bool,
    /// The live tree may not be changed through this mount.
    pub read_only: bool,
    /// The type in the mount table has our subtype.
    pub subtype: bool,
    /// The mountpoint may have entries; they are hidden by the mount.
    pub nonempty: bool,
    /// Patterns of what is to have no history, counted from the root.
    pub exclude: Vec<String>,
    /// The fewest replicas in use with which anything is changed.
    pub replicas_min: usize,
    /// How long a call on a backing may take.
    pub timeout: Duration,
    /// How much is to stay free on each backing from now on, instead of what the store has noted.
    pub free_limit: Option<Limit>,
    /// How much history may take on each backing from now on.
    pub history_limit: Option<Limit>,
    /// How often an automatic snapshot is made from now on; zero for never.
    pub snapshot_every: Option<Span>,
    /// How often the store scrubs a part of itself, if that is to change.
    pub scrub_every: Option<Span>,
}

impl Default for MountOptions {
    fn default() -> MountOptions {
        MountOptions {
            allow_other: false,
            snapdir: SnapDir::Hidden,
            snapdir_name: EntryName::new(".snapshots").expect("a valid name"),
            fs_name: None,
            threads: 0,
            io_uring: true,
            dev: false,
            suid: false,
            exec: true,
            read_only: false,
            subtype: true,
            nonempty: false,
            exclude: Vec::new(),
            replicas_min: 1,
            timeout: Duration::from_secs(30),
            free_limit: None,
            history_limit: None,
            snapshot_every: None,
            scrub_every: None,
        }
    }
}

impl MountOptions {
    /// Takes the texts of all `-o` in their order; the last word on a matter counts, but of
    /// `exclude` all do.
    pub fn parse<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<MountOptions> {
        let mut options = MountOptions::default();
        for text in texts {
            for option in text.split(',').filter(|option| !option.is_empty()) {
                options.apply(option)?;
            }
        }
        Ok(options)
    }

    fn apply(&mut self, option: &str) -> Result<()> {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option, None),
        };
        match (key, value) {
            ("allow_other", None) => self.allow_other = true,
            ("dev", None) => self.dev = true,
            ("nodev", None) => self.dev = false,
            ("suid", None) => self.suid = true,
            ("nosuid", None) => self.suid = false,
            ("exec", None) => self.exec = true,
            ("noexec", None) => self.exec = false,
            ("ro", None) => self.read_only = true,
            ("rw", None) => self.read_only = false,
            ("nosubtype", None) => self.subtype = false,
            ("nonempty", None) => self.nonempty = true,
            ("snapdir", Some(value)) => self.snapdir = parse_snapdir(value)?,
            ("snapdirname", Some(value)) => self.snapdir_name = parse_snapdir_name(value)?,
            ("fsname", Some(value)) => self.fs_name = Some(value.to_string()),
            ("exclude", Some(value)) => self.exclude.push(value.to_string()),
            ("free_limit", Some(value)) => self.free_limit = Some(value.parse()?),
            ("history_limit", Some(value)) => self.history_limit = Some(value.parse()?),
            ("snapshot_every", Some(value)) => self.snapshot_every = Some(value.parse()?),
            ("min_replicas", Some(value)) => self.replicas_min = parse_replicas_min(value)?,
            ("timeout", Some(value)) => self.timeout = parse_timeout(value)?,
            ("scrub_every", Some(value)) => self.scrub_every = Some(value.parse()?),
            ("threads", Some(value)) => self.threads = parse_threads(value)?,
            ("io_uring", Some(value)) => self.io_uring = parse_io_uring(value)?,
            ("remount", None) => {
                return Err(Error::Refused(
                    "a mount cannot be changed while it stands: unmount, then mount anew".into(),
                ));
            }
            _ if is_generic(key) => {}
            _ => {
                return Err(Error::Refused(format!(
                    "unknown mount option '{}'; see 'rearview mount --help'",
                    escape(option.as_bytes())
                )));
            }
        }
        Ok(())
    }

    /// The store's own policy with what these options change of it.
    pub fn policy(&self, mut policy: StorePolicy) -> StorePolicy {
        policy.free_limit = self.free_limit.unwrap_or(policy.free_limit);
        policy.history_limit = self.history_limit.or(policy.history_limit);
        policy.every = self.snapshot_every.unwrap_or(policy.every);
        policy.scrub = self.scrub_every.unwrap_or(policy.scrub);
        policy
    }

    /// The options as one `-o` text that [`MountOptions::parse`] takes, but for the patterns of
    /// `exclude`, which may have commas.
    pub fn to_text(&self) -> String {
        let mut parts = vec![
            format!("snapdir={}", snapdir_word(self.snapdir)),
            format!("snapdirname={}", self.snapdir_name.as_os_str().to_string_lossy()),
            format!("threads={}", self.threads),
            format!("min_replicas={}", self.replicas_min),
            format!("timeout={}", self.timeout.as_secs()),
        ];
        let flags = [
            (self.allow_other, "allow_other"),
            (self.dev, "dev"),
            (self.suid, "suid"),
            (!self.exec, "noexec"),
            (self.read_only, "ro"),
            (!self.subtype, "nosubtype"),
            (self.nonempty, "nonempty"),
            (!self.io_uring, "io_uring=off"),
        ];
        parts.extend(flags.iter().filter(|(set, _)| *set).map(|(_, word)| word.to_string()));
        if let Some(name) = &self.fs_name {
            parts.push(format!("fsname={name}"));
        }
        let limits = [("free_limit", self.free_limit), ("history_limit", self.history_limit)];
        parts.extend(limits.iter().filter_map(|(key, limit)| Some(format!("{key}={}", (*limit)?))));
        if let Some(every) = self.snapshot_every {
            parts.push(format!("snapshot_every={every}"));
        }
        if let Some(every) = self.scrub_every {
            parts.push(format!("scrub_every={every}"));
        }
        parts.join(",")
    }
}

/// The word of an option for each way of showing the past.
pub fn snapdir_word(snapdir: SnapDir) -> &'static str {
    match snapdir {
        SnapDir::Hidden => "hidden",
        SnapDir::Root => "root",
        SnapDir::Visible => "visible",
        SnapDir::Disabled => "disabled",
    }
}

fn parse_snapdir(value: &str) -> Result<SnapDir> {
    Ok(match value {
        "hidden" => SnapDir::Hidden,
        "root" => SnapDir::Root,
        "visible" => SnapDir::Visible,
        "disabled" => SnapDir::Disabled,
        _ => {
            return Err(Error::Refused(format!(
                "snapdir={} is not known: hidden, root, visible or disabled",
                escape(value.as_bytes())
            )));
        }
    })
}

fn parse_snapdir_name(value: &str) -> Result<EntryName> {
    match EntryName::new(value) {
        Ok(name) if value != crate::types::PRIVATE_DIR => Ok(name),
        _ => Err(Error::Refused(format!(
            "snapdirname={} cannot be the name of a directory of ours",
            escape(value.as_bytes())
        ))),
    }
}

/// Reads how many replicas must be in use for a change.
pub fn parse_replicas_min(value: &str) -> Result<usize> {
    match value.parse() {
        Ok(count) if (1..=REPLICAS_MAX).contains(&count) => Ok(count),
        _ => Err(Error::Refused(format!("min_replicas= takes a number from 1 to {REPLICAS_MAX}"))),
    }
}

fn parse_timeout(value: &str) -> Result<Duration> {
    match value.parse() {
        Ok(secs) if (1..=TIMEOUT_SECS_MAX).contains(&secs) => Ok(Duration::from_secs(secs)),
        _ => Err(Error::Refused(format!("timeout= takes 1 to {TIMEOUT_SECS_MAX} seconds"))),
    }
}

fn parse_threads(value: &str) -> Result<usize> {
    match value.parse() {
        Ok(count) if count <= THREADS_MAX => Ok(count),
        _ => Err(Error::Refused(format!("threads= takes a number from 0 to {THREADS_MAX}"))),
    }
}

fn parse_io_uring(value: &str) -> Result<bool> {
    match value {
        "auto" => Ok(true),
        "off" => Ok(false),
        _ => Err(Error::Refused(format!(
            "io_uring={} is not known: auto or off",
            escape(value.as_bytes())
        ))),
    }
}

/// Options that mount(8), systemd and fstab use among themselves and that mean nothing to us.
fn is_generic(key: &str) -> bool {
    const WORDS: &[&str] = &[
        "_netdev",
        "async",
        "atime",
        "auto",
        "comment",
        "default_permissions",
        "defaults",
        "diratime",
        "dirsync",
        "group",
        "iversion",
        "lazytime",
        "mand",
        "noatime",
        "noauto",
        "nodiratime",
        "nofail",
        "nogroup",
        "nolazytime",
        "nomand",
        "noowner",
        "norelatime",
        "nostrictatime",
        "nouser",
        "nousers",
        "owner",
        "relatime",
        "strictatime",
        "sync",
        "user",
        "users",
    ];
    WORDS.contains(&key) || key.starts_with("x-") || key.starts_with("X-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generic_options_of_fstab_are_swallowed() {
        let texts =
            ["rw,nosuid,nodev,noatime,_netdev,nofail,user=me,defaults,noauto,x-systemd.a=b"];
        assert_eq!(MountOptions::parse(texts).unwrap(), MountOptions::default());
    }

    #[test]
    fn our_options_are_taken_and_the_last_word_counts() {
        let options = MountOptions::parse([
            "allow_other,snapdir=visible,snapdirname=.past",
            "io_uring=off,ro,rw,dev,suid,threads=3,snapdir=root,fsname=x,exclude=*.o,exclude=/tmp/",
        ])
        .unwrap();
        assert!(options.allow_other && options.dev && options.suid && !options.read_only);
        assert!(!options.io_uring && MountOptions::parse(["io_uring=auto"]).unwrap().io_uring);
        assert_eq!(options.snapdir, SnapDir::Root);
        assert_eq!(options.snapdir_name.as_bytes(), b".past");
        assert_eq!((options.threads, options.fs_name.as_deref()), (3, Some("x")));
        assert_eq!(options.exclude, ["*.o", "/tmp/"]);
        let text = options.to_text();
        let back = MountOptions::parse([text.as_str(), "exclude=*.o", "exclude=/tmp/"]).unwrap();
        assert_eq!(back, options);
    }

    #[test]
    fn unknown_and_bad_options_are_refused_by_name() {
        for bad in [
            "frobnicate",
            "snapdir=x",
            "snapdirname=a/b",
            "snapdirname=.rearview",
            "threads=-1",
            "io_uring=yes",
        ] {
            let error = MountOptions::parse([bad]).unwrap_err().to_string();
            let key = bad.split('=').next().unwrap();
            assert!(error.contains(key), "{error}");
        }
        assert!(MountOptions::parse(["remount,ro"]).is_err());
    }
}

//! One mount from its beginning to its end.
//!
//! The beginning: mountpoint, store (filled where a replica is new or behind), volume, control
//! socket, mount. The end, in this order: the kernel lets go of the mount; requests on the control
//! socket are answered and it closes; the volume seals and commits everything and marks the store
//! clean. If we die before that last step, the next mount recovers.

use std::path::PathBuf;
use std::sync::Arc;

use crate::control::DaemonInfo;
use crate::control::server::Server;
use crate::control::service::Service;
use crate::error::Result;
use crate::excludes::Patterns;
use crate::fs::{Filesystem, FsOptions, SnapDir};
use crate::fuse::{self, ServeOptions, Session};
use crate::history::History;
use crate::mountpoint::options::MountOptions;
use crate::mountpoint::{self, device, show, table};
use crate::progress::Progress;
use crate::report::PathText;
use crate::store::{self, Between};
use crate::volume::{Volume, VolumeOptions};
use signals::SignalWatch;

pub mod background;
pub mod log;
mod signals;

/// Threads that serve the kernel, unless asked for, two for each processor: so many requests can
/// wait for a disk at once. On two, with 4 instead of 2, eight programs that read at random places
/// of a virtual disk took half as long, as many that sync their writes two thirds, and what is all
/// in memory the same; with 8 nothing took less, and what is in memory up to a fifth more.
const THREADS_DEFAULT: std::ops::RangeInclusive<usize> = 4..=16;

/// Pools of memory that the threads share. A list of a hundred thousand snapshots takes 20 MiB of
/// one, and whoever asks next may be answered from another.
const MEMORY_POOLS: u16 = 4;

/// What is to be mounted where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPlan {
    /// The backing directories, absolute.
    pub backings: Vec<PathBuf>,
    /// Backings that are known not to answer.
    pub silent: Vec<PathBuf>,
    /// The mountpoint, absolute.
    pub mountpoint: PathBuf,
    /// How.
    pub options: MountOptions,
    /// Make a new store.
    pub init: bool,
    /// Make no store where there is none.
    pub existing_only: bool,
    /// The label of replicas that are made.
    pub label: Option<String>,
}

/// Serves a mount until it ends. `ready` is called once it answers, with the backings that do;
/// `progress` makes the reporter of long work from the flag that stops it.
pub fn serve(
    plan: &MountPlan,
    progress: impl FnOnce(Arc<std::sync::atomic::AtomicBool>) -> Progress,
    ready: impl FnOnce(&DaemonInfo, &[PathBuf]) -> Result<()>,
) -> Result<()> {
    log_panics();
    raise_descriptor_limit();
    crate::sys::limit_memory_pools(MEMORY_POOLS);
    let signals = SignalWatch::start()?;
    device::check(&plan.options)?;
    let place = mountpoint::prepare(&plan.mountpoint, &plan.backings, plan.options.nonempty)?;
    let progress = progress(signals.stop_flag());
    let volume = open_volume(plan, &place.target, &progress).inspect_err(|_| place.undo())?;
    // Nobody is to ask for the daemon where nothing answers.
    let silent = volume.silent();
    let answer = |path: &&PathBuf| !silent.contains(path);
    let plan = &MountPlan {
        backings: plan.backings.iter().filter(answer).cloned().collect(),
        ..plan.clone()
    };
    let ready = |info: &DaemonInfo| {
        ready(info, &plan.backings)?;
        // What was said before went to the terminal only.
        for path in &silent {
            ::log::warn!(
                "{} was left out of this mount: it is taken in when it answers",
                show(path)
            );
        }
        Ok(())
    };
    let served = serve_volume(plan, &place.target, &volume, &signals, ready);
    if served.is_err() {
        place.undo();
    }
    // Whatever went wrong, what the volume holds must reach the backings.
    signals.ending();
    let closed = volume.close();
    if closed.is_ok() {
        ::log::info!("closed");
        notify("STOPPING=1");
    }
    served.and(closed)
}

fn open_volume(
    plan: &MountPlan,
    target: &std::path::Path,
    progress: &Progress,
) -> Result<Arc<Volume>> {
    let exclude = Arc::new(Patterns::of_globs(&plan.options.exclude)?);
    let options = store::OpenOptions {
        init: plan.init,
        existing_only: plan.existing_only,
        label: plan.label.clone(),
        mountpoint: Some(target.to_path_buf()),
        exclude: exclude.clone(),
        resync_later: true,
        between: Between::default().with_timeout(plan.options.timeout),
        silent: plan.silent.clone(),
    };
    let recover = |replicas: &_, catalog: &_, from| History::recover(replicas, catalog, from);
    let paths = [&plan.backings[..], &plan.silent].concat();
    let store = store::open(&paths, &options, &recover, progress)?;
    let volume = Volume::open(
        store,
        VolumeOptions {
            exclude,
            replicas_min: plan.options.replicas_min,
            call_timeout: plan.options.timeout,
            mounted: true,
            ..VolumeOptions::default()
        },
    )?;
    let (known, policy) = (volume.policy(), plan.options.policy(volume.policy()));
    if policy != known
        && let Err(error) = volume.set_policy(&policy)
    {
        volume.close()?;
        return Err(error);
    }
    Ok(volume)
}

fn serve_volume(
    plan: &MountPlan,
    target: &std::path::Path,
    volume: &Arc<Volume>,
    signals: &SignalWatch,
    ready: impl FnOnce(&DaemonInfo) -> Result<()>,
) -> Result<()> {
    let options = FsOptions {
        snapdir: plan.options.snapdir,
        snapdir_name: plan.options.snapdir_name.clone(),
        mountpoint: target.to_path_buf(),
    };
    let fs = Arc::new(Filesystem::new(volume.clone(), options));
    let serving = || volume.serving_at(target.to_path_buf());
    let info = info(plan, target);
    let service = Arc::new(Service::new(fs.clone(), info.clone(), plan.options.read_only));
    let control = Server::start(&plan.backings, service)?;
    let ready = || {
        serving();
        ready(&info)
    };
    let served = mount_and_wait(plan, target, fs, signals, ready);
    control.stop();
    served
}

fn mount_and_wait(
    plan: &MountPlan,
    target: &std::path::Path,
    fs: Arc<Filesystem>,
    signals: &SignalWatch,
    ready: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let source = match &plan.options.fs_name {
        Some(name) => name.clone().into_bytes(),
        None => table::join_backings(&plan.backings),
    };
    let device = device::mount(target, &source, &plan.options)?;
    let threads = thread_count(plan.options.threads);
    let options = ServeOptions { threads, over_rings: plan.options.io_uring };
    let session = fuse::serve(fs, device, &options).inspect_err(|_| take_away(target))?;
    // The handshake is done: from here on requests are answered. We must not ask for an answer
    // ourselves: killed while the kernel waits for it, this process could never end, for its
    // descriptor of the mount would stay open.
    let begun = signals.serving(target).and_then(|()| ready());
    match begun {
        Ok(()) => {
            ::log::info!("mounted {plan}");
            notify("READY=1");
            join(session)
        }
        Err(error) => {
            take_away(target);
            join(session)?;
            Err(error)
        }
    }
}

fn take_away(target: &std::path::Path) {
    if let Err(error) = device::unmount(target, true) {
        ::log::error!("{error}");
    }
}

fn join(session: Session) -> Result<()> {
    let ended = session.join();
    ::log::info!("unmounted");
    ended
}

fn thread_count(asked: usize) -> usize {
    if asked > 0 {
        return asked;
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    (2 * processors).clamp(*THREADS_DEFAULT.start(), *THREADS_DEFAULT.end())
}

fn info(plan: &MountPlan, target: &std::path::Path) -> DaemonInfo {
    use std::os::unix::ffi::OsStrExt;
    DaemonInfo {
        pid: std::process::id(),
        mountpoint: PathText::new(target.as_os_str().as_bytes()),
        snapdir_name: PathText::new(plan.options.snapdir_name.as_bytes()),
        snapdir_enabled: plan.options.snapdir != SnapDir::Disabled,
    }
}

impl std::fmt::Display for MountPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let backings = crate::types::escape(&table::join_backings(&self.backings));
        write!(f, "{backings} on {}", show(&self.mountpoint))
    }
}

/// A panic of any thread must leave a trace where people look.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| ::log::error!("internal error: {panic}")));
}

/// Every open file of the mount is one of ours on each backing.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, limit) {
        ::log::warn!("cannot raise the number of files that may be open: {errno}");
    }
}

/// Tells systemd (`Type=notify`), if it listens.
fn notify(state: &str) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    }
    .and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
    if let Err(error) = sent {
        ::log::warn!("cannot tell {} of {state}: {error}", show(path.as_ref()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_threads_is_bounded() {
        assert_eq!(thread_count(3), 3);
        assert!(THREADS_DEFAULT.contains(&thread_count(0)));
    }
}

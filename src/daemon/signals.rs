//! What SIGTERM, SIGINT and SIGHUP do: stop a fill cleanly, or unmount. The closing itself is never
//! interrupted: it is what makes the backings complete.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

use crate::error::{Error, IoContext, Result};
use crate::mountpoint::{device, show, table};

/// The signals that end a mount.
const ENDING: [i32; 3] = [SIGTERM, SIGINT, SIGHUP];

/// What the daemon is at, and so what a signal has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Starting,
    Serving(PathBuf),
    Ending,
}

/// Handles the process's signals in a thread of its own.
pub struct SignalWatch {
    stop: Arc<AtomicBool>,
    phase: Arc<Mutex<Phase>>,
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalWatch {
    /// Begins to handle signals; while starting they set [`SignalWatch::stop_flag`].
    pub fn start() -> Result<SignalWatch> {
        let mut signals = Signals::new(ENDING).context("watch for", "signals")?;
        let handle = signals.handle();
        let stop = Arc::new(AtomicBool::new(false));
        let phase = Arc::new(Mutex::new(Phase::Starting));
        let (stopped, watched) = (stop.clone(), phase.clone());
        let thread = std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for signal in signals.forever() {
                    react(signal, &stopped, &watched);
                }
            })
            .context("start a thread for", "signals")?;
        Ok(SignalWatch { stop, phase, handle, thread: Some(thread) })
    }

    /// Set once the user wants the start to stop.
    pub fn stop_flag(&self) -> Arc<AtomicBool> {
        self.stop.clone()
    }

    /// From here on a signal unmounts `target`. Fails if one came before.
    pub fn serving(&self, target: &Path) -> Result<()> {
        *self.phase.lock() = Phase::Serving(target.to_path_buf());
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        Ok(())
    }

    /// From here on signals do nothing.
    pub fn ending(&self) {
        *self.phase.lock() = Phase::Ending;
    }
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            // A panic was logged by the panic hook.
            let _ = thread.join();
        }
    }
}

fn react(signal: i32, stop: &AtomicBool, phase: &Mutex<Phase>) {
    let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
    let at = phase.lock().clone();
    match at {
        Phase::Starting => {
            log::info!("{name}: stopping");
            stop.store(true, Ordering::Relaxed);
        }
        Phase::Serving(target) => {
            log::info!("{name}: unmounting {}", show(&target));
            stop.store(true, Ordering::Relaxed);
            unmount(&target);
        }
        Phase::Ending => log::info!("{name}: already closing; the backings are being completed"),
    }
}

fn unmount(target: &Path) {
    // Somebody else may have unmounted us and mounted something of theirs.
    let ours = table::read().is_ok_and(|table| {
        table::mounted_at(&table, target).is_some_and(table::MountEntry::is_rearview)
    });
    if !ours {
        return;
    }
    match device::unmount(target, false) {
        Ok(()) => {}
        Err(error) if error.is(Errno::BUSY) => {
            log::warn!(
                "{} is in use ({}): it goes away, and the daemon ends when the last file is closed",
                show(target),
                device::holders(target).join(", ")
            );
            if let Err(error) = device::unmount(target, true) {
                log::error!("{error}");
            }
        }
        Err(error) => log::error!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_while_starting_only_asks_to_stop() {
        let stop = AtomicBool::new(false);
        react(SIGINT, &stop, &Mutex::new(Phase::Ending));
        assert!(!stop.load(Ordering::Relaxed));
        // Nothing of ours is mounted there: nothing is unmounted.
        react(SIGTERM, &AtomicBool::new(false), &Mutex::new(Phase::Serving("/proc".into())));
        assert!(Path::new("/proc/self").exists());
        react(SIGTERM, &stop, &Mutex::new(Phase::Starting));
        assert!(stop.load(Ordering::Relaxed));
    }
}

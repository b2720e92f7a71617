//! A mount in the background: the command starts itself anew in a session of its own and waits
//! until that process says that the mount answers, or why it does not.
//!
//! A new process image instead of fork: threads may run already, and a forked copy of a process
//! with threads is not sound. The child's standard output is the pipe to the parent and carries one
//! frame of the control protocol; its standard error stays the user's until the mount is ready.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{Mode, OFlags};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::log::LOG_NAME;
use super::{MountPlan, log};
use crate::control::{
    DaemonInfo, REQUEST_BYTES_MAX, Response, open_private, read_frame, write_frame,
};
use crate::error::{Error, IoContext, Result};
use crate::progress::Progress;
use crate::types::PRIVATE_DIR;

/// Starts the process that serves the mount, by the words of its command line, and waits until it
/// is ready. Signals are passed on to it meanwhile.
pub fn start(arguments: &[OsString]) -> Result<DaemonInfo> {
    let mut child = Command::new("/proc/self/exe")
        .arg0("rearview")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the mount's process from", "/proc/self/exe")?;
    pass_signals_on(&child)?;
    match child.stdout.take() {
        Some(answer) => await_answer(&mut child, answer),
        None => Err(Error::Refused("the mount's process has no way to answer".into())),
    }
}

fn await_answer(child: &mut Child, mut answer: ChildStdout) -> Result<DaemonInfo> {
    match read_frame(&mut answer, REQUEST_BYTES_MAX) {
        Ok(Response::Pong(info)) => Ok(info),
        Ok(Response::Failed { kind, text }) => {
            // It has nothing more to do; its end shows that it let go of everything.
            let _ = child.wait();
            Err(kind.into_error(text))
        }
        Ok(_) => Err(Error::Refused("the mount's process answered nonsense".into())),
        Err(_) => {
            let status = child.wait().context("wait for", "the mount's process")?;
            Err(Error::Refused(format!("the mount's process ended before it was ready: {status}")))
        }
    }
}

/// The child is in a session of its own and hears nothing of Ctrl-C.
fn pass_signals_on(child: &Child) -> Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])
        .context("watch for", "signals")?;
    // Not joined: it lives as long as this command, which ends when the mount is ready.
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                if let Some(pid) = pid {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
                }
            }
        })
        .context("start a thread for", "signals")?;
    Ok(())
}

/// The other side: serves the mount, tells the parent when it is ready, and never returns.
pub fn serve(
    plan: &MountPlan,
    verbose: u8,
    progress: impl FnOnce(Arc<AtomicBool>) -> Progress,
) -> ! {
    let handle = log::for_daemon(verbose, false);
    // Else ps, pgrep and fuser show the last name of what was executed: exe, of /proc/self/exe.
    let _ = rustix::thread::set_name(c"rearview");
    // Fails only if we lead a session already, which is as good.
    let _ = rustix::process::setsid();
    let mut told = false;
    let served = super::serve(plan, progress, |info, backings| {
        let opened = backings.first().map(|backing| {
            let dir = open_private(backing)?;
            handle.to_file(dir).context("open", backing.join(PRIVATE_DIR).join(LOG_NAME))
        });
        if let Some(Err(error)) = opened {
            ::log::warn!("no log: {error}");
        }
        tell(&Response::Pong(info.clone()))?;
        told = true;
        let_go_of_terminal()
    });
    let failed = served.is_err();
    if let Err(error) = served {
        if !told {
            let _ = tell(&Response::from(&error));
        } else {
            ::log::error!("{error}");
        }
    }
    handle.finish();
    std::process::exit(i32::from(failed))
}

/// Says the one thing to the parent that it waits for.
fn tell(response: &Response) -> Result<()> {
    let mut out = std::io::stdout().lock();
    write_frame(&mut out, response, REQUEST_BYTES_MAX)?;
    out.flush().context("write to", "the parent process")
}

/// The terminal, and a pipe that somebody reads until its end, must not be kept by a daemon.
fn let_go_of_terminal() -> Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .context("open", "/dev/null")?;
    rustix::stdio::dup2_stdin(null.as_fd()).context("replace", "standard input")?;
    rustix::stdio::dup2_stdout(null.as_fd()).context("replace", "standard output")?;
    rustix::stdio::dup2_stderr(null.as_fd()).context("replace", "standard error")?;
    std::env::set_current_dir("/").context("go to", "/")
}

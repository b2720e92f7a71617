//! Which process asks: its command's name, by its number.
//!
//! The kernel tells of each request the thread that asks. Its process is looked up in `/proc` once,
//! and the file with the command's name is kept open: reading it costs about a microsecond, follows
//! an exec, and fails for a process that is gone, so that one which got its number is never called
//! by the old name.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use super::Caller;
use crate::catalog::Actor;

/// Processes whose files are kept open, two descriptors each at most.
const KEPT_MAX: NonZeroUsize = NonZeroUsize::new(128).expect("not zero");
/// `TASK_COMM_LEN` and a line's end; the kernel's own threads have longer names.
const COMMAND_BYTES_MAX: usize = 64;
/// The longest name that is kept: what `comm` holds of a program.
const NAME_BYTES_MAX: usize = 15;

/// The processes that asked lately.
pub(super) struct Actors {
    kept: Mutex<LruCache<u32, Arc<Process>>>,
}

/// A thread that asked, and its process.
struct Process {
    pid: u32,
    comm: File,
    /// The thread's own, if it is not the first of its process: readable while it lives.
    thread: Option<File>,
}

impl Actors {
    /// Nobody asked yet.
    pub fn new() -> Actors {
        Actors { kept: Mutex::new(LruCache::new(KEPT_MAX)) }
    }

    /// Who asks; `None` where the kernel itself does.
    pub fn of(&self, caller: &Caller) -> Option<Actor> {
        let thread = caller.pid;
        if thread == 0 {
            return None;
        }
        let kept = self.kept.lock().get(&thread).cloned();
        let known = kept.and_then(|process| Some((process.pid, process.command()?)));
        let (pid, command) = known.or_else(|| self.look(thread)).unwrap_or((thread, Vec::new()));
        Some(Actor { uid: caller.creds.uid, pid, command })
    }

    /// Looks a thread up anew.
    fn look(&self, thread: u32) -> Option<(u32, Vec<u8>)> {
        let process = Process::of_thread(thread)?;
        let found = (process.pid, process.command()?);
        self.kept.lock().put(thread, Arc::new(process));
        Some(found)
    }
}

impl Process {
    fn of_thread(thread: u32) -> Option<Process> {
        // As in proc_pid_status(5): "Tgid:" is the process.
        let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
        let pid =
            status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()?;
        let comm = |id: u32| File::open(format!("/proc/{id}/comm")).ok();
        let thread = if thread == pid { None } else { Some(comm(thread)?) };
        Some(Process { pid, comm: comm(pid)?, thread })
    }

    /// The command's name now; `None` if the thread or the process is gone.
    fn command(&self) -> Option<Vec<u8>> {
        if let Some(thread) = &self.thread {
            thread.read_at(&mut [0; COMMAND_BYTES_MAX], 0).ok()?;
        }
        let mut name = [0; COMMAND_BYTES_MAX];
        let length = self.comm.read_at(&mut name, 0).ok()?;
        let name = name[..length].strip_suffix(b"\n").unwrap_or(&name[..length]);
        Some(name[..name.len().min(NAME_BYTES_MAX)].to_vec())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::replica::backing::Creds;

    fn caller(pid: u32) -> Caller {
        Caller { creds: Creds { uid: 3, gid: 4, umask: 0 }, pid }
    }

    #[test]
    fn a_thread_is_called_by_its_process() {
        let actors = Actors::new();
        let own = std::process::id();
        let name = std::fs::read(format!("/proc/{own}/comm")).unwrap();
        let asked = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("another-name".into());
            let asking = || {
                let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
                (actors.of(&caller(thread)), actors.of(&caller(thread)))
            };
            thread.spawn_scoped(scope, asking).unwrap().join().unwrap()
        });
        let own = Actor { uid: 3, pid: own, command: name.strip_suffix(b"\n").unwrap().to_vec() };
        assert_eq!(asked, (Some(own.clone()), Some(own)));
    }

    #[test]
    fn an_exec_is_noticed_and_the_dead_are_not_named() {
        let actors = Actors::new();
        // The shell waits for its standard input before it becomes another command, which waits
        // for the rest of it.
        let mut child = Command::new("sh")
            .args(["-c", "read line; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let name = |pid| actors.of(&caller(pid)).unwrap().command;
        // The spawn may return before the new program has its name.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while name(child.id()) != b"sh" {
            assert!(std::time::Instant::now() < deadline, "{:?}", name(child.id()));
            std::thread::yield_now();
        }
        use std::io::{Read, Write};
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"go\nx").unwrap();
        // The answer comes from after the exec.
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        assert_eq!(name(child.id()), b"cat");
        drop(input);
        child.wait().unwrap();
        assert_eq!(name(child.id()), b"");
        assert_eq!(actors.of(&caller(0)), None);
    }
}

//! Where messages go: standard error while a person is looking, then a file in the first backing.
//!
//! The file is bounded: when it is full it becomes `log.old`, replacing the one before.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};

use crate::replica::backing::Handle;
use crate::types::{Timestamp, printable};

/// The log's name in the private directory, and that of the one before it.
pub const LOG_NAME: &str = "log";
const OLD_LOG_NAME: &str = "log.old";

/// The log's size at which it is put aside.
const LOG_BYTES_MAX: u64 = 4 << 20;

/// So many messages wait for the disk at most.
const LINES_WAITING_MAX: usize = 4096;
/// How long the end waits for the last messages.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// What this module does to the user's folders is told even to those who did not ask for more.
const NOTICES: &str = "rearviewfs::mountpoint";

/// Directs the messages of this process.
#[derive(Clone)]
pub struct LogHandle(Arc<Mutex<Sink>>);

enum Sink {
    /// For a person: no times, no levels.
    Stderr,
    /// For later: with both.
    Stamped,
    File(Writer),
}

/// The thread that writes the file. It lies in a backing, whose disk can hang: whoever has
/// something to say must not hang with it.
struct Writer {
    lines: Option<Sender<Vec<u8>>>,
    ended: Receiver<()>,
}

impl Writer {
    fn start(mut file: CappedFile) -> io::Result<Writer> {
        let (lines, texts) = bounded::<Vec<u8>>(LINES_WAITING_MAX);
        let (end, ended) = bounded(1);
        std::thread::Builder::new().name("rv-log".into()).spawn(move || {
            for text in texts {
                let _ = file.write(&text);
            }
            let _ = end.send(());
        })?;
        Ok(Writer { lines: Some(lines), ended })
    }

    /// What does not fit any more is lost: the disk does not take it.
    fn write(&self, text: &[u8]) {
        if let Some(lines) = &self.lines {
            let _ = lines.try_send(text.to_vec());
        }
    }
}

struct CappedFile {
    dir: Handle,
    file: File,
    bytes: u64,
}

/// Sends messages to standard error: warnings, with `-v` what happens, with `-vv` everything. The
/// environment's `RUST_LOG` overrules that.
pub fn to_stderr(verbose: u8) -> LogHandle {
    let level = match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    init(level, level, Sink::Stderr)
}

/// Sends a daemon's messages to standard error, with times if `stamped`.
pub fn for_daemon(verbose: u8, stamped: bool) -> LogHandle {
    let level = if verbose == 0 { log::LevelFilter::Info } else { log::LevelFilter::Debug };
    // A person at a terminal is told what concerns them; the log file gets the rest later.
    let shown = if verbose == 0 { log::LevelFilter::Warn } else { level };
    init(level, shown, if stamped { Sink::Stamped } else { Sink::Stderr })
}

/// `shown` bounds what a person at standard error gets of it.
fn init(level: log::LevelFilter, shown: log::LevelFilter, sink: Sink) -> LogHandle {
    let handle = LogHandle(Arc::new(Mutex::new(sink)));
    let shared = handle.clone();
    let mut builder = env_logger::Builder::new();
    builder.filter_level(log::LevelFilter::Error).filter_module("rearviewfs", level);
    builder.parse_default_env();
    builder.target(env_logger::Target::Pipe(Box::new(handle.clone())));
    builder.format(move |out, record| {
        if is_no_error(record) {
            return Ok(());
        }
        if matches!(*shared.0.lock(), Sink::Stderr) {
            if record.level() > shown && record.target() != NOTICES {
                return Ok(());
            }
            return writeln!(out, "rearview: {}", printable(&record.args().to_string()));
        }
        let time = crate::report::time_text(Timestamp { nanos: 0, ..Timestamp::now() });
        // One line each: whoever makes a name must not be able to make a line.
        let text = record.args().to_string().replace('\n', "\\n");
        writeln!(out, "{time} {:5} {}", record.level(), printable(&text))
    });
    // In tests several commands share a process; the first one's log serves all.
    let _ = builder.try_init();
    handle
}

/// Whether it is the library's complaint that the kernel took no answer to an interrupt. Of a
/// request that came over io_uring it knows none at the device, each time anew.
fn is_no_error(record: &log::Record<'_>) -> bool {
    record.target() == "fuser::reply"
        && record
            .args()
            .to_string()
            .ends_with(&io::Error::from(rustix::io::Errno::NOENT).to_string())
}

impl LogHandle {
    /// From here on messages go to the end of the log in this directory.
    pub fn to_file(&self, dir: Handle) -> io::Result<()> {
        *self.0.lock() = Sink::File(Writer::start(CappedFile::open(dir)?)?);
        Ok(())
    }

    /// Waits, but not for long, until all is written; later messages are lost. For the end.
    pub fn finish(&self) {
        let ended = match &mut *self.0.lock() {
            Sink::File(writer) => {
                writer.lines = None;
                writer.ended.clone()
            }
            Sink::Stderr | Sink::Stamped => return,
        };
        let _ = ended.recv_timeout(FINISH_TIMEOUT);
    }
}

impl Write for LogHandle {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        match &mut *self.0.lock() {
            Sink::Stderr | Sink::Stamped => io::stderr().write(text),
            Sink::File(writer) => {
                writer.write(text);
                Ok(text.len())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl CappedFile {
    fn open(dir: Handle) -> io::Result<CappedFile> {
        // Opened for waiting, a FIFO in its place would keep us for ever.
        let flags = OFlags::CREATE | OFlags::APPEND | OFlags::WRONLY | OFlags::NONBLOCK;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = File::from(rustix::fs::openat(dir.as_fd(), LOG_NAME, flags, mode)?);
        let bytes = file.metadata()?.len();
        Ok(CappedFile { dir, file, bytes })
    }

    fn write(&mut self, text: &[u8]) -> io::Result<()> {
        if self.bytes > LOG_BYTES_MAX {
            rustix::fs::renameat(self.dir.as_fd(), LOG_NAME, self.dir.as_fd(), OLD_LOG_NAME)?;
            *self = CappedFile::open(self.dir.clone())?;
        }
        self.bytes += text.len() as u64;
        self.file.write_all(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    #[test]
    fn a_full_log_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let open = || CappedFile::open(OwnedFd::from(File::open(dir.path()).unwrap()).into());
        let mut log = open().unwrap();
        log.write(&vec![b'x'; LOG_BYTES_MAX as usize + 1]).unwrap();
        log.write(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert!(std::fs::metadata(dir.path().join("log.old")).unwrap().len() > LOG_BYTES_MAX);
        assert_eq!(open().unwrap().bytes, 3);
        drop(std::fs::remove_file(&path));
        std::os::unix::fs::symlink(dir.path().join("log.old"), &path).unwrap();
        assert!(open().is_err(), "a symlink is not followed");
    }
}

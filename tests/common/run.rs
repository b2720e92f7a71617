//! Running commands with a deadline and keeping what they said.
//!
//! Output goes to files, not pipes: a daemon that wrongly keeps its parent's output open would
//! otherwise hang the test instead of failing it.

use std::ffi::OsStr;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The longest any one command of a test may take.
pub const COMMAND_SECONDS_MAX: u64 = 600;

/// A finished command.
#[derive(Debug)]
pub struct Done {
    /// The command, for messages.
    pub line: String,
    /// Its exit code; 128 + the signal where one ended it.
    pub code: i32,
    /// What it wrote to its output.
    pub stdout: String,
    /// What it wrote to its error output.
    pub stderr: String,
}

impl Done {
    /// Fails unless the command ended with 0; gives what it printed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}", self.told());
        self.stdout
    }

    /// Fails unless it ended with `code` and its error output has all of `words`
    /// (upper and lower case alike).
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) -> Done {
        assert_eq!(self.code, code, "expected exit {code}: {}", self.told());
        let said = self.stderr.to_lowercase();
        for word in words {
            assert!(said.contains(&word.to_lowercase()), "no '{word}' in: {}", self.told());
        }
        assert!(!said.contains("panicked"), "{}", self.told());
        self
    }

    /// Everything about it, for the text of a failure.
    pub fn told(&self) -> String {
        format!(
            "`{}` ended with {}\n--- stdout\n{}\n--- stderr\n{}",
            self.line, self.code, self.stdout, self.stderr
        )
    }
}

/// Runs `command` with nothing on its input and a deadline.
#[track_caller]
pub fn run(command: &mut Command) -> Done {
    run_within(command, COMMAND_SECONDS_MAX)
}

/// [`run`] with a deadline of its own, in seconds.
#[track_caller]
pub fn run_within(command: &mut Command, seconds: u64) -> Done {
    let line = format!("{command:?}");
    let mut stdout = tempfile::tempfile().expect("a scratch file can be made");
    let mut stderr = tempfile::tempfile().expect("a scratch file can be made");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(stdout.try_clone().expect("a file can be cloned"))
        .stderr(stderr.try_clone().expect("a file can be cloned"))
        .spawn()
        .unwrap_or_else(|error| panic!("{line} cannot start: {error}"));
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let status = loop {
        if let Some(status) = child.try_wait().expect("our own child can be waited for") {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let said = text_of(&mut stderr);
            panic!("{line} took more than {seconds} s; it said: {said}");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Done { line, code, stdout: text_of(&mut stdout), stderr: text_of(&mut stderr) }
}

fn text_of(file: &mut std::fs::File) -> String {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).expect("a scratch file can be sought");
    file.read_to_end(&mut bytes).expect("a scratch file can be read");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The binary under test.
pub fn binary() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_rearview"))
}

/// Runs `rearview` with `words`.
#[track_caller]
pub fn rearview<I, S>(words: I) -> Done
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    run(Command::new(binary()).args(words))
}

/// Runs `rearview` with `words` from inside `folder`.
#[track_caller]
pub fn rearview_in<I, S>(folder: &Path, words: I) -> Done
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    run(Command::new(binary()).args(words).current_dir(folder))
}

/// Runs a bash script (stopping at the first failure) in `folder` and fails unless it succeeds.
#[track_caller]
pub fn shell(folder: &Path, script: &str) -> String {
    run_shell(folder, script).ok()
}

/// [`shell`], whatever it ends with.
#[track_caller]
pub fn run_shell(folder: &Path, script: &str) -> Done {
    run(Command::new("bash")
        .args(["-euo", "pipefail", "-c", script])
        .current_dir(folder)
        .env("LC_ALL", "C"))
}

/// Runs a python program in `folder` and fails unless it succeeds.
#[track_caller]
pub fn python(folder: &Path, program: &str) -> String {
    run(Command::new("python3").args(["-c", program]).current_dir(folder)).ok()
}

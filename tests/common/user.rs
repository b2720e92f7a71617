//! Doing things as somebody else.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

use super::{Done, run};

/// An ordinary user of the machine.
#[derive(Clone, Debug)]
pub struct User {
    /// The login name.
    pub name: String,
    /// The user's id.
    pub uid: u32,
    /// The user's own group.
    pub gid: u32,
}

/// Two tests must not edit the user database at once.
static USER_DATABASE: Mutex<()> = Mutex::new(());

/// The ordinary user `name`, made if there is none.
#[track_caller]
pub fn user(name: &str) -> User {
    super::need(&["useradd", "getent"]);
    let _guard = USER_DATABASE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if find(name).is_none() {
        let made = run(Command::new("useradd").args(["--user-group", "--create-home", name]));
        // Another test binary may have been faster; what counts is that the user is there.
        assert!(find(name).is_some(), "{}", made.told());
    }
    find(name).expect("just made")
}

fn find(name: &str) -> Option<User> {
    let done = run(Command::new("getent").args(["passwd", name]));
    let mut fields = done.stdout.trim().split(':').skip(2);
    let uid = fields.next()?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    Some(User { name: name.to_owned(), uid, gid })
}

/// The user most tests use.
#[track_caller]
pub fn ordinary_user() -> User {
    user("rvtest1")
}

/// A second, different user.
#[track_caller]
pub fn other_user() -> User {
    user("rvtest2")
}

impl User {
    /// A command that runs as this user, with no other groups and a plain environment.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .uid(self.uid)
            .gid(self.gid)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .env("HOME", format!("/home/{}", self.name))
            .env("USER", &self.name)
            .env("LC_ALL", "C")
            .current_dir("/");
        command
    }

    /// Runs a bash script as this user.
    #[track_caller]
    pub fn shell(&self, script: &str) -> Done {
        run(self.command("bash").args(["-euo", "pipefail", "-c", script]))
    }
}

/// A copy of the binary that every user can run, and the folder that holds it.
#[track_caller]
pub fn public_binary() -> (tempfile::TempDir, PathBuf) {
    let folder = super::scratch();
    let copy = folder.path().join("rearview");
    std::fs::copy(super::run::binary(), &copy).expect("the binary can be copied");
    (folder, copy)
}

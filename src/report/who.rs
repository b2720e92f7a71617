//! Who made a change, as reports tell it and as people ask for it.

use serde::{Deserialize, Serialize};

use crate::catalog::{Actor, Catalog};
use crate::error::Result;
use crate::types::{Generation, escape};

/// As much of a command's name as the kernel keeps.
const COMMAND_BYTES_MAX: usize = 15;

/// The process that made a change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByReport {
    /// The user as whom it ran.
    pub uid: u32,
    /// Its process id then.
    pub pid: u32,
    /// Its command's name, at most 15 bytes; escaped where it is not text.
    pub command: String,
}

impl From<&Actor> for ByReport {
    fn from(actor: &Actor) -> ByReport {
        let command = match std::str::from_utf8(&actor.command) {
            Ok(text) => text.to_string(),
            Err(_) => escape(&actor.command),
        };
        ByReport { uid: actor.uid, pid: actor.pid, command }
    }
}

/// Who made what began or ended with a generation.
pub fn by(catalog: &Catalog, generation: Generation) -> Result<Option<ByReport>> {
    Ok(catalog.actor_of(generation)?.as_ref().map(ByReport::from))
}

/// The processes that somebody asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Who {
    /// All whose command has this name.
    Command(String),
    /// The ones that had this number.
    Pid(u32),
    /// All of this user.
    Uid(u32),
}

impl Who {
    /// Whether a process is one of those.
    pub fn is(&self, by: &ByReport) -> bool {
        match self {
            Who::Command(name) => {
                // What people type is longer than what the kernel keeps.
                let kept = &name.as_bytes()[..name.len().min(COMMAND_BYTES_MAX)];
                by.command == *name || by.command.as_bytes() == kept
            }
            Who::Pid(pid) => by.pid == *pid,
            Who::Uid(uid) => by.uid == *uid,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_known_by_what_the_kernel_keeps_of_it() {
        let by =
            |command: &[u8]| ByReport::from(&Actor { uid: 1, pid: 2, command: command.to_vec() });
        let who = Who::Command("a-very-long-command".into());
        assert!(who.is(&by(b"a-very-long-com")));
        assert!(!who.is(&by(b"a-very-long")));
        assert!(Who::Command("git".into()).is(&by(b"git")));
        assert!(!Who::Command("git".into()).is(&by(b"gitk")));
        assert!(Who::Command("\\xff".into()).is(&by(b"\xff")));
        assert!(Who::Pid(2).is(&by(b"x")) && !Who::Uid(2).is(&by(b"x")));
    }
}

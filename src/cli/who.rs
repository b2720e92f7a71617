//! Who made a change: shown with the user's name, and understood as people write it.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::report::who::{ByReport, Who};
use crate::types::escape;

/// Where the users of this machine are told (passwd(5)).
const USERS: &str = "/etc/passwd";

/// The users of this machine.
pub struct Users {
    names: HashMap<u32, String>,
}

impl Users {
    /// Reads them; none if they cannot be read.
    pub fn read() -> Users {
        Users::parse(&std::fs::read(USERS).unwrap_or_default())
    }

    fn parse(table: &[u8]) -> Users {
        let mut names = HashMap::new();
        for line in table.split(|&byte| byte == b'\n') {
            let mut fields = line.split(|&byte| byte == b':');
            let name = fields.next().unwrap_or_default();
            let uid = fields.nth(1).and_then(|uid| std::str::from_utf8(uid).ok()?.parse().ok());
            if let (Some(uid), false) = (uid, name.is_empty()) {
                // Of several names of a user the first one counts.
                names.entry(uid).or_insert_with(|| escape(name));
            }
        }
        Users { names }
    }

    /// A user's name, or the number where there is none.
    pub fn name(&self, uid: u32) -> String {
        self.names.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    /// A process for people: `git[1234] alice`, `-` where there is none.
    pub fn show(&self, by: Option<&ByReport>) -> String {
        let Some(by) = by else { return "-".into() };
        let command = if by.command.is_empty() { "?" } else { &by.command };
        format!("{}[{}] {}", escape(command.as_bytes()), by.pid, self.name(by.uid))
    }

    /// What `--by` says: a command's name, `pid:NUMBER`, `uid:NUMBER` or `user:NAME`.
    pub fn who(&self, text: &str) -> Result<Who> {
        let number = |digits: &str| {
            digits.parse().map_err(|_| {
                Error::Refused(format!(
                    "'{}' needs a number after the colon",
                    escape(text.as_bytes())
                ))
            })
        };
        if let Some(pid) = text.strip_prefix("pid:") {
            return number(pid).map(Who::Pid);
        }
        if let Some(uid) = text.strip_prefix("uid:") {
            return number(uid).map(Who::Uid);
        }
        let Some(name) = text.strip_prefix("user:") else { return Ok(Who::Command(text.into())) };
        let found = self.names.iter().find(|(_, known)| *known == name);
        found.map(|(uid, _)| Who::Uid(*uid)).ok_or_else(|| {
            let shown = escape(name.as_bytes());
            Error::NotFound(format!("no user '{shown}' on this machine; uid:NUMBER needs no name"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_shown_and_asked_for_by_name() {
        let users = Users::parse(b"root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/:\nodd\n::\n");
        let by = |uid, command: &str| ByReport { uid, pid: 7, command: command.into() };
        assert_eq!(users.show(Some(&by(1000, "git"))), "git[7] alice");
        assert_eq!(users.show(Some(&by(5, ""))), "?[7] 5");
        assert_eq!(users.show(Some(&by(0, "a\n"))), "a\\n[7] root");
        assert_eq!(users.show(None), "-");
        assert_eq!(users.who("user:alice").unwrap(), Who::Uid(1000));
        assert_eq!(users.who("uid:77").unwrap(), Who::Uid(77));
        assert_eq!(users.who("pid:9").unwrap(), Who::Pid(9));
        assert_eq!(users.who("cp").unwrap(), Who::Command("cp".into()));
        assert!(users.who("user:bob").unwrap_err().to_string().contains("bob"));
        assert!(users.who("pid:x").unwrap_err().to_string().contains("number"));
    }
}

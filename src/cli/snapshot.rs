//! `rearview snapshot …`

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use super::locate::{Located, is_store_path, locate, unexpected};
use super::{Exit, SnapshotCommand, text};
use crate::control::{Request, Response};
use crate::error::{Error, Result};
use crate::report::{
    self, MomentText, SnapshotLine, SnapshotList, SnapshotReport, SnapshotsReport,
};
use crate::types::{escape, escape_text};

/// Does one of the commands on snapshots.
pub fn run(command: SnapshotCommand) -> Result<Exit> {
    match command {
        SnapshotCommand::Create { words, at, tags, automatic, json } => {
            refuse_lone_slash(&words)?;
            let (located, names) = split(&words, 2)?;
            let [name] = take::<1>(&names)?;
            if let Some(name) = &name {
                refuse_time_word(name)?;
            }
            let at = at.as_deref().map(MomentText::new);
            let request = Request::SnapshotCreate { name, at, automatic, tags };
            let snapshot = one(located.ask(&request)?)?;
            tell(&snapshot, "created", json)
        }
        SnapshotCommand::List { path, json } => list(&path, json),
        SnapshotCommand::Delete { words, json } => {
            each(&words, "deleted", json, |name| Request::SnapshotDelete { name })
        }
        SnapshotCommand::Rename { words, json } => {
            let (located, names) = split(&words, 3)?;
            let [Some(from), Some(to)] = take::<2>(&names)? else {
                return Err(Error::Refused("rename takes [PATH] FROM TO".into()));
            };
            refuse_time_word(&to)?;
            let snapshot = one(located.ask(&Request::SnapshotRename { from, to })?)?;
            tell(&snapshot, "renamed to", json)
        }
        SnapshotCommand::Hold { words, json } => {
            each(&words, "holding", json, |name| Request::SnapshotHold { name, held: true })
        }
        SnapshotCommand::Release { words, json } => {
            each(&words, "released", json, |name| Request::SnapshotHold { name, held: false })
        }
    }
}

/// Parts `[PATH] NAME...`. The first word is the path if there are `full` words, or if it can only
/// be meant as one: no snapshot's name has a slash; and outside of any store a bare word that leads
/// into one is no name either.
fn split(words: &[OsString], full: usize) -> Result<(Located, Vec<String>)> {
    let here = locate(Path::new("."));
    let first_is_path = words.first().is_some_and(|first| {
        words.len() == full || looks_like_path(first) || (here.is_err() && is_store_path(first))
    });
    let (located, names) = match words.split_first() {
        Some((first, rest)) if first_is_path => (locate(Path::new(first))?, rest),
        _ => (here?, words),
    };
    Ok((located, names.iter().map(|name| as_name(name)).collect::<Result<_>>()?))
}

/// A sole word with a slash is a path only if it exists: else a name was meant, and a snapshot that
/// is named by its time would surprise.
fn refuse_lone_slash(words: &[OsString]) -> Result<()> {
    match words {
        [word] if looks_like_path(word) && std::fs::symlink_metadata(word).is_err() => {
            Err(Error::Refused(format!(
                "'{}' is neither a path that exists nor a name for a snapshot: names have no '/'",
                escape(word.as_bytes())
            )))
        }
        _ => Ok(()),
    }
}

/// Refuses a name that every command would take for a time.
fn refuse_time_word(name: &str) -> Result<()> {
    if crate::time::is_relative(name) {
        return Err(Error::Refused(format!(
            "'{}' means a time wherever a snapshot can be named; choose another name",
            escape(name.as_bytes())
        )));
    }
    Ok(())
}

fn looks_like_path(word: &OsStr) -> bool {
    let bytes = word.as_bytes();
    bytes.contains(&b'/') || bytes == b"." || bytes == b".."
}

fn as_name(word: &OsStr) -> Result<String> {
    match word.to_str() {
        Some(name) if !name.contains('/') => Ok(name.to_string()),
        _ => Err(Error::Refused(format!(
            "'{}' cannot be a snapshot's name: it has a slash or is not UTF-8",
            escape(word.as_bytes())
        ))),
    }
}

fn take<const N: usize>(names: &[String]) -> Result<[Option<String>; N]> {
    if names.len() > N {
        let extra = escape(names[N].as_bytes());
        return Err(Error::Refused(format!("'{extra}' is one word too many")));
    }
    Ok(std::array::from_fn(|index| names.get(index).cloned()))
}

fn one(response: Response) -> Result<SnapshotReport> {
    match response {
        Response::Snapshot(snapshot) => Ok(snapshot),
        _ => Err(unexpected()),
    }
}

fn tell(snapshot: &SnapshotReport, done: &str, json: bool) -> Result<Exit> {
    if json {
        text::print_json(snapshot)?;
    } else {
        text::print_line(&format!("{done} {}", escape(snapshot.name.as_bytes())))?;
    }
    Ok(Exit::Done)
}

#[derive(serde::Serialize)]
struct Snapshots {
    snapshots: Vec<SnapshotReport>,
}

/// Asks for each name, goes on after a failure, and tells of all.
fn each(
    words: &[OsString],
    done: &str,
    json: bool,
    request: impl Fn(String) -> Request,
) -> Result<Exit> {
    // A path is followed by at least one name.
    let full = if words.len() > 1 && looks_like_path(&words[0]) { words.len() } else { usize::MAX };
    let (located, names) = split(words, full)?;
    if names.is_empty() {
        return Err(Error::Refused("name the snapshot".into()));
    }
    let mut snapshots = Vec::new();
    let mut failure = None;
    for name in &names {
        match located.ask(&request(name.clone())).and_then(one) {
            Ok(snapshot) => snapshots.push(snapshot),
            Err(error) if names.len() == 1 => return Err(error),
            Err(error) => {
                text::complain(&format!("{}: {error}", escape(name.as_bytes())));
                failure = Some(error);
            }
        }
    }
    let partly = failure.is_some() && !snapshots.is_empty();
    if json {
        text::print_json(&Snapshots { snapshots })?;
    } else {
        for snapshot in &snapshots {
            text::print_line(&format!("{done} {}", escape(snapshot.name.as_bytes())))?;
        }
    }
    Ok(match failure {
        None => Exit::Done,
        Some(_) if partly => Exit::Incomplete,
        Some(error) => Exit::from(&error),
    })
}

fn list(path: &Path, json: bool) -> Result<Exit> {
    let located = locate(path)?;
    let response = located.ask_or_look(&Request::SnapshotList, |catalog| {
        Ok(Response::Snapshots(report::snapshots(catalog, LOOK_TIME)?))
    })?;
    let Response::Snapshots(list) = response else { return Err(unexpected()) };
    if json {
        text::print_json(&SnapshotsReport::from(list))?;
        return Ok(Exit::Done);
    }
    text::print(&table(&list))?;
    let totals = &list.totals;
    let (live, history) = (text::size(totals.live_bytes), text::size(totals.history_bytes()));
    text::print_line(&format!("live {live}, history {history}"))?;
    Ok(Exit::Done)
}

/// What deleting a snapshot would free, is counted so long for an unmounted store.
const LOOK_TIME: Duration = Duration::from_secs(10);

/// The lines as [`text::table`] would make them, of which there may be a hundred thousand.
fn table(list: &SnapshotList) -> String {
    let local = text::LocalTimes::new();
    let mut widths = [0; 3];
    let mut count = 0;
    for line in list.lines() {
        for (width, cell) in widths.iter_mut().zip(&cells(&line)) {
            *width = text::columns_of(cell).max(*width);
        }
        count += 1;
    }
    let mut text = String::with_capacity(count * (widths.iter().sum::<usize>() + 48));
    for line in list.lines() {
        local.push(&mut text, line.time);
        for (width, cell) in widths.iter().zip(&cells(&line)) {
            text.push_str("  ");
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', width - text::columns_of(cell)));
        }
        text.push_str("  ");
        match line.freed {
            Some(0) => text.push_str("0 B"),
            Some(bytes) => text.push_str(&text::size(bytes)),
            None => text.push_str("..."),
        }
        text.push('\n');
    }
    text
}

/// Name, marks and tags.
fn cells<'a>(line: &SnapshotLine<'a>) -> [Cow<'a, str>; 3] {
    [escape_text(line.name), marks(line).into(), text::tags(line.tags).into()]
}

fn marks(line: &SnapshotLine<'_>) -> &'static str {
    match (line.held, line.automatic) {
        (true, true) => "held, automatic",
        (true, false) => "held",
        (false, true) => "automatic",
        (false, false) => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_with_a_slash_is_a_path_and_never_a_name() {
        assert!(looks_like_path(OsStr::new("./x")) && looks_like_path(OsStr::new(".")));
        assert!(!looks_like_path(OsStr::new("x")));
        assert!(as_name(OsStr::new("a/b")).is_err());
        assert!(as_name(OsStr::from_bytes(b"\xff")).is_err());
        assert!(take::<1>(&["a".into(), "b".into()]).is_err());
        assert!(refuse_lone_slash(&["no/such".into()]).is_err());
        assert!(refuse_lone_slash(&["/".into()]).is_ok());
        assert!(refuse_lone_slash(&["/no/such".into(), "name".into()]).is_ok());
    }

    #[test]
    fn outside_of_a_store_names_are_refused_with_the_reason() {
        let words = ["no-such".into()];
        assert!(matches!(split(&words, 2), Err(Error::NoStore(_))));
    }
}

//! `rearview log` and `rearview diff`

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::locate::{Located, is_store_path, locate, unexpected};
use super::who::Users;
use super::{DiffArgs, Exit, LogArgs, text};
use crate::catalog::DiffKind;
use crate::control::{Request, Response};
use crate::error::{Error, Result};
use crate::report::log::{Event, LogEntry, LogReport};
use crate::report::{self, DiffReport, MomentText, PathText};
use crate::types::{Kind, escape_text};

/// Snapshots of one version that the log names; `--json` names all.
const SNAPSHOTS_SHOWN_MAX: usize = 8;

/// `rearview log`
pub fn log(args: &LogArgs) -> Result<Exit> {
    let located = locate(&args.path)?;
    let names_max = (!args.json).then_some(SNAPSHOTS_SHOWN_MAX);
    let request = Request::Log { path: PathText::from(&located.path), names_max };
    let response = located.ask_or_look(&request, |catalog| {
        Ok(Response::Log(report::log::log(catalog, &located.path, names_max)?))
    })?;
    let Response::Log(mut report) = response else { return Err(unexpected()) };
    let users = Users::read();
    if let Some(by) = &args.by {
        let who = users.who(by)?;
        report.entries.retain(|entry| entry.by.as_ref().is_some_and(|by| who.is(by)));
    }
    if args.json {
        text::print_json(&report)?;
    } else {
        text::print(&log_text(&report, &users))?;
    }
    Ok(Exit::Done)
}

/// Newest first, as people look for the recent.
fn log_text(report: &LogReport, users: &Users) -> String {
    let newest_first = report.entries.iter().rev();
    let rows: Vec<_> = newest_first.map(|entry| log_row(report, entry, users)).collect();
    let mut shown = text::table(&rows);
    for purge in report.purges.iter().rev() {
        let path = match purge.path == report.path {
            true => String::new(),
            false => format!(" with {}", purge.path.shown()),
        };
        let time = text::local_time(&purge.time);
        shown.push_str(&format!("purged at {time}{path}: {} versions\n", purge.versions));
    }
    if report.excluded {
        shown.insert_str(0, "excluded from history: what it is now is no version\n");
    }
    shown
}

fn log_row(report: &LogReport, entry: &LogEntry, users: &Users) -> Vec<String> {
    let events: Vec<&str> = entry.events.iter().map(|event| event_word(*event)).collect();
    let mut remarks = Vec::new();
    if entry.path != report.path {
        remarks.push(format!("as {}", entry.path.shown()));
    }
    if !entry.snapshots.is_empty() {
        remarks.push(format!("[{}]", snapshot_names(entry)));
    }
    vec![
        text::local_time(&entry.time),
        text::mode(entry.kind, entry.mode),
        format!("{}:{}", entry.uid, entry.gid),
        if entry.kind == Kind::Dir { "-".into() } else { text::size(entry.size) },
        events.join(","),
        users.show(entry.by.as_ref()),
        remarks.join(" "),
    ]
}

/// All names of a few; of many the first, how many follow, and the last.
fn snapshot_names(entry: &LogEntry) -> String {
    let mut names: Vec<_> = entry.snapshots.iter().map(|name| escape_text(name)).collect();
    if entry.snapshots_left_out > 0 {
        names.insert(1, format!("{} more", entry.snapshots_left_out).into());
    }
    names.join(", ")
}

fn event_word(event: Event) -> &'static str {
    match event {
        Event::Created => "created",
        Event::Renamed => "renamed",
        Event::Replaced => "replaced",
        Event::Written => "written",
        Event::Mode => "mode",
        Event::Owner => "owner",
        Event::Xattrs => "attributes",
        Event::Times => "times",
        Event::Removed => "removed",
    }
}

/// `rearview diff`
pub fn diff(args: &DiffArgs) -> Result<Exit> {
    let (b, located) = match args.rest.as_slice() {
        [] => ("now".to_string(), locate(Path::new("."))?),
        [word] => one_word(word)?,
        [b, path, ..] => (moment_word(b)?, locate(Path::new(path))?),
    };
    let (a, b) = (MomentText::new(&args.a), MomentText::new(&b));
    let path = PathText::from(&located.path);
    let request = Request::Diff { a: a.clone(), b: b.clone(), path };
    let response = located.ask_or_look(&request, |catalog| {
        let moment = |wanted: &MomentText| {
            report::resolve_moment(catalog, wanted, || Ok(catalog.generation()))
        };
        Ok(Response::Diff(report::diff(catalog, &moment(&a)?, &moment(&b)?, &located.path)?))
    })?;
    let Response::Diff(report) = response else { return Err(unexpected()) };
    if args.json {
        text::print_json(&report)?;
    } else {
        text::print(&diff_text(&report))?;
    }
    Ok(Exit::Done)
}

/// `diff A WORD`: the word is a moment if it names one, else a path in a store.
fn one_word(word: &OsStr) -> Result<(String, Located)> {
    let as_path = || Ok(("now".to_string(), locate(Path::new(word))?));
    let Ok(here) = locate(Path::new(".")) else { return as_path() };
    let Ok(text) = moment_word(word) else { return as_path() };
    let moment = MomentText::new(&text);
    let known = here.ask_or_look(&Request::Moment { moment: moment.clone() }, |catalog| {
        let moment = report::resolve_moment(catalog, &moment, || Ok(catalog.generation()))?;
        Ok(Response::Moment((&moment).into()))
    });
    match known {
        Err(Error::NotFound(_)) if is_store_path(word) => as_path(),
        // The word may lie in the store as a path that is gone: there only a slash tells.
        Err(Error::NotFound(_)) if text.contains('/') => as_path(),
        // Below which directory one stands does not narrow the look: the whole store is compared.
        Ok(_) => Ok((text, Located { path: Default::default(), ..here })),
        Err(error) => Err(error),
    }
}

fn moment_word(word: &OsStr) -> Result<String> {
    let text = word.to_str().map(str::to_string);
    text.ok_or_else(|| Error::NotFound(format!("no snapshot '{}'", show_word(word))))
}

fn show_word(word: &OsStr) -> String {
    crate::mountpoint::show(&PathBuf::from(word))
}

fn diff_text(report: &DiffReport) -> String {
    let mut text = String::new();
    for difference in &report.differences {
        let letter = match difference.change {
            DiffKind::Added => '+',
            DiffKind::Removed => '-',
            DiffKind::Modified => 'M',
            DiffKind::Renamed => 'R',
        };
        let end = if difference.kind == Kind::Dir { "/" } else { "" };
        text.push_str(&format!("{letter}\t{}{end}", difference.path.shown()));
        if let Some(to) = &difference.to {
            text.push_str(&format!(" -> {}{end}", to.shown()));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{DifferenceReport, MomentReport};

    #[test]
    fn differences_have_their_letters_and_no_raw_escapes() {
        let moment = || MomentReport { name: None, time: String::new(), generation: 1 };
        let difference = |change, kind, path: &[u8], to: Option<&[u8]>| DifferenceReport {
            change,
            kind,
            path: PathText::new(path),
            to: to.map(PathText::new),
        };
        let report = DiffReport {
            from: moment(),
            to: moment(),
            differences: vec![
                difference(DiffKind::Added, Kind::Dir, b"d", None),
                difference(DiffKind::Renamed, Kind::File, b"a\n", Some(b"\xff")),
            ],
        };
        assert_eq!(diff_text(&report), "+\td/\nR\ta\\n -> \\xff\n");
    }
}

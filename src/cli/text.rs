//! How results are written: tables, sizes, local times, JSON.

use std::fmt::Write as _;
use std::io::Write;

use serde::Serialize;

use crate::error::{Error, IoContext, Result};
use crate::report::{OUTPUT_VERSION, time_text};
use crate::types::{Timestamp, printable};

/// Writes to standard output; no control character gets through.
pub fn print(text: &str) -> Result<()> {
    write_out(&printable(text))
}

/// Tells of a failure on standard error, likewise.
pub fn complain(text: &str) {
    // There is nobody else to tell.
    let _ = writeln!(std::io::stderr(), "rearview: {}", printable(text));
}

fn write_out(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("write to", "standard output")
}

/// Writes one line to standard output.
pub fn print_line(text: &str) -> Result<()> {
    print(&format!("{text}\n"))
}

#[derive(Serialize)]
struct OutputVersion {
    major: u32,
    minor: u32,
}

#[derive(Serialize)]
struct Versioned<'a, T> {
    output_version: OutputVersion,
    #[serde(flatten)]
    body: &'a T,
}

/// Writes an object as JSON, with the version of its form.
pub fn print_json<T: Serialize>(body: &T) -> Result<()> {
    let (major, minor) = OUTPUT_VERSION;
    let value = Versioned { output_version: OutputVersion { major, minor }, body };
    let text = serde_json::to_string_pretty(&value)
        .map_err(|error| Error::Refused(format!("cannot write JSON: {error}")))?;
    write_out(&json_on_a_terminal(text))
}

/// JSON that says the same in characters that no terminal obeys. Only strings can hold others.
fn json_on_a_terminal(mut text: String) -> String {
    text.push('\n');
    if printable(&text) == text {
        return text;
    }
    let mut shown = String::with_capacity(text.len() + 16);
    let mut utf8 = [0; 4];
    for c in text.chars() {
        if printable(c.encode_utf8(&mut utf8)) == *c.encode_utf8(&mut [0; 4]) {
            shown.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                // Writing to a string cannot fail.
                let _ = write!(shown, "\\u{unit:04x}");
            }
        }
    }
    shown
}

/// Bytes for people, in powers of 1024.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = "";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// A time of a report (RFC 3339 in UTC) for people: local, to the second.
pub fn local_time(time: &str) -> String {
    match time.parse::<jiff::Timestamp>() {
        Ok(time) => {
            let zoned = time.to_zoned(jiff::tz::TimeZone::system());
            zoned.strftime("%Y-%m-%d %H:%M:%S").to_string()
        }
        Err(_) => time.to_string(),
    }
}

/// Times for people, for many of them: the time zone is looked up once.
pub struct LocalTimes(jiff::tz::TimeZone);

impl LocalTimes {
    /// Times of this computer's zone.
    pub fn new() -> LocalTimes {
        LocalTimes(jiff::tz::TimeZone::system())
    }

    /// Appends a time as [`local_time`] writes it.
    pub fn push(&self, text: &mut String, time: Timestamp) {
        let Ok(instant) = jiff::Timestamp::new(time.secs, time.nanos as i32) else {
            text.push_str(&time_text(time));
            return;
        };
        let civil = self.0.to_datetime(instant);
        let (date, clock) = (civil.date(), civil.time());
        push_digits(text, i32::from(date.year()), 1000);
        for (mark, part) in [
            ('-', date.month()),
            ('-', date.day()),
            (' ', clock.hour()),
            (':', clock.minute()),
            (':', clock.second()),
        ] {
            text.push(mark);
            push_digits(text, i32::from(part), 10);
        }
    }
}

/// Appends a number with as many digits as `place`, the first one's, has.
fn push_digits(text: &mut String, number: i32, place: i32) {
    if !(0..place * 10).contains(&number) {
        // Writing to a string cannot fail.
        let _ = write!(text, "{number:04}");
        return;
    }
    let mut place = place;
    while place > 0 {
        text.push(char::from(b'0' + (number / place % 10) as u8));
        place /= 10;
    }
}

/// Tags for people: `[a, b]`, or nothing.
pub fn tags(tags: &[String]) -> String {
    match tags.is_empty() {
        true => String::new(),
        false => format!("[{}]", crate::types::escape(tags.join(", ").as_bytes())),
    }
}

/// Rows in columns as wide as their widest cell; the last column is not padded.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| columns_of(cell)).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let begin = text.len();
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            text.push_str(cell);
            // The last cell may be wide in one row and the rows many.
            if index + 1 < row.len() {
                text.extend(std::iter::repeat_n(' ', width + 2 - columns_of(cell)));
            }
        }
        text.truncate(begin + text[begin..].trim_end().len());
        text.push('\n');
    }
    text
}

/// How many columns of a terminal a text takes.
pub fn columns_of(text: &str) -> usize {
    if text.is_ascii() { text.len() } else { text.chars().count() }
}

/// Permission bits with the kind as `ls -l` writes them.
pub fn mode(kind: crate::types::Kind, mode: u32) -> String {
    use crate::types::Kind;
    let first = match kind {
        Kind::File => '-',
        Kind::Dir => 'd',
        Kind::Symlink => 'l',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
        Kind::CharDev => 'c',
        Kind::BlockDev => 'b',
    };
    let mut text = String::from(first);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_written_out() {
        let hostile = "a\u{1b}[31m\u{9b}2J\u{7f}\r\u{202e}b\n";
        assert_eq!(printable(hostile), "a\\x1b[31m\\xc2\\x9b2J\\x7f\\r\\xe2\\x80\\xaeb\n");
        let json = json_on_a_terminal(serde_json::to_string(hostile).unwrap());
        assert!(json.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{json}");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), hostile);
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn modes_look_as_in_ls() {
        use crate::types::Kind;
        assert_eq!(mode(Kind::Dir, 0o1777), "drwxrwxrwt");
        assert_eq!(mode(Kind::File, 0o4640), "-rwSr-----");
    }

    #[test]
    fn many_times_look_as_single_ones_do() {
        let times = LocalTimes::new();
        for secs in [-62_135_596_800 * 2, -1, 0, 1_700_000_123, 253_402_207_199, i64::MAX] {
            let time = Timestamp { secs, nanos: 5 };
            let mut text = String::new();
            times.push(&mut text, time);
            assert_eq!(text, local_time(&time_text(time)));
        }
    }

    #[test]
    fn tags_stand_in_brackets() {
        assert_eq!(tags(&["a".into(), "b\n".into()]), "[a, b\\n]");
        assert_eq!(tags(&[]), "");
    }

    #[test]
    fn tables_line_up() {
        let rows = [vec!["a".into(), "bb".into()], vec!["ccc".into(), "d".into()]];
        assert_eq!(table(&rows), "a    bb\nccc  d\n");
    }
}

//! What is excluded from history: the rules of `.rearviewignore` files and of `--exclude`.
//!
//! The rules are gitignore's: in a file the last pattern that matches counts, `!` takes an
//! exclusion back, a slash inside a pattern ties it to its directory, a slash at the end means
//! directories only. Files further down count before those above them, and `--exclude`, whose
//! patterns are read as if they stood in the root, before all files. What lies in an excluded
//! directory is excluded and cannot be taken back.
//!
//! Not here: which file is read when, and what being excluded means (`volume`).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::error::{Error, Result};
use crate::types::{EntryName, escape};

/// The name of the files with rules.
pub const RULES_FILE: &str = ".rearviewignore";
/// What is read of such a file.
pub const RULES_BYTES_MAX: usize = 1 << 20;
/// The setting of a store in which rules were ever met: without it none are looked for.
pub const META_KEY: &str = "excludes";

/// Whether this is the name of a file with rules.
pub fn is_rules_file(name: &EntryName) -> bool {
    name.as_bytes() == RULES_FILE.as_bytes()
}

/// Some patterns that belong to one directory.
#[derive(Clone, Debug)]
pub struct Patterns(Gitignore);

impl Default for Patterns {
    fn default() -> Patterns {
        Patterns(Gitignore::empty())
    }
}

impl Patterns {
    /// Patterns that a person gave; the first bad one is refused by name.
    pub fn of_globs(globs: &[String]) -> Result<Patterns> {
        let mut builder = builder();
        for glob in globs {
            builder.add_line(None, glob).map_err(|error| {
                let why = why(&error);
                Error::Refused(format!("the pattern '{}' {why}", escape(glob.as_bytes())))
            })?;
        }
        built(&builder).map_err(|why| Error::Refused(format!("the patterns to exclude: {why}")))
    }

    /// The patterns of a file and, for each line that is not understood, its number and why: the
    /// others count all the same.
    pub fn of_file(text: &[u8]) -> (Patterns, Vec<(usize, String)>) {
        let mut builder = builder();
        let mut bad = Vec::new();
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let outcome = match std::str::from_utf8(line) {
                Ok(line) => builder.add_line(None, line).map(drop).map_err(|error| why(&error)),
                Err(_) => Err("is not UTF-8".to_string()),
            };
            if let Err(why) = outcome {
                bad.push((index + 1, format!("'{}' {why}", escape(line))));
            }
        }
        match built(&builder) {
            Ok(patterns) => (patterns, bad),
            Err(why) => {
                bad.push((0, why));
                (Patterns::default(), bad)
            }
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What the patterns say of a path below their directory: `None` nothing.
    fn verdict(&self, path: &Path, is_dir: bool) -> Option<bool> {
        match self.0.matched(path, is_dir) {
            Match::None => None,
            Match::Ignore(_) => Some(true),
            Match::Whitelist(_) => Some(false),
        }
    }
}

fn builder() -> GitignoreBuilder {
    let mut builder = GitignoreBuilder::new("");
    // Else an unclosed bracket would be taken for itself, which nobody means.
    builder.allow_unclosed_class(false);
    builder
}

fn built(builder: &GitignoreBuilder) -> std::result::Result<Patterns, String> {
    builder.build().map(Patterns).map_err(|error| why(&error))
}

fn why(error: &ignore::Error) -> String {
    match error {
        ignore::Error::Glob { err, .. } => format!("is no valid pattern: {err}"),
        error => format!("cannot be used: {error}"),
    }
}

/// All rules that count in one directory.
#[derive(Debug)]
pub struct Scope {
    /// The directory itself is excluded.
    excluded: bool,
    own: Option<Patterns>,
    above: Option<(Arc<Scope>, EntryName)>,
    /// Those of `--exclude`.
    given: Arc<Patterns>,
}

impl Scope {
    /// The rules of the root: `given` with the mount, and its own file's.
    pub fn root(given: Arc<Patterns>, own: Option<Patterns>) -> Arc<Scope> {
        Arc::new(Scope { excluded: false, own, above: None, given })
    }

    /// The rules of the directory `name` below this one, `own` being its own file's.
    pub fn enter(self: &Arc<Scope>, name: &EntryName, own: Option<Patterns>) -> Arc<Scope> {
        let excluded = self.excludes(name, true);
        let above = Some((self.clone(), name.clone()));
        Arc::new(Scope { excluded, own, above, given: self.given.clone() })
    }

    /// Whether everything in the directory is excluded, and its own file of no account.
    pub fn is_excluded(&self) -> bool {
        self.excluded
    }

    /// Whether the entry `name` of the directory is excluded.
    pub fn excludes(&self, name: &EntryName, is_dir: bool) -> bool {
        if self.excluded {
            return true;
        }
        let mut path = PathBuf::from(OsStr::from_bytes(name.as_bytes()));
        let mut verdict = None;
        let mut scope = self;
        loop {
            if let (None, Some(own)) = (verdict, &scope.own) {
                verdict = own.verdict(&path, is_dir);
            }
            let Some((above, name)) = &scope.above else { break };
            path = Path::new(OsStr::from_bytes(name.as_bytes())).join(path);
            scope = above;
        }
        self.given.verdict(&path, is_dir).or(verdict).unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> EntryName {
        EntryName::new(text).unwrap()
    }

    fn file(text: &str) -> Option<Patterns> {
        let (patterns, bad) = Patterns::of_file(text.as_bytes());
        assert_eq!(bad, []);
        Some(patterns)
    }

    fn given(globs: &[&str]) -> Arc<Patterns> {
        let globs: Vec<String> = globs.iter().map(ToString::to_string).collect();
        Arc::new(Patterns::of_globs(&globs).unwrap())
    }

    #[test]
    fn the_nearest_file_and_the_last_pattern_count() {
        let root = Scope::root(given(&[]), file("*.o\n!keep.o\n/build/\n# *.c\n\nsrc/gen*.rs\n"));
        assert!(root.excludes(&name("a.o"), false));
        assert!(!root.excludes(&name("keep.o"), false));
        assert!(!root.excludes(&name("a.c"), false));
        assert!(root.excludes(&name("build"), true));
        assert!(!root.excludes(&name("build"), false), "a slash at the end means directories");
        let src = root.enter(&name("src"), file("!a.o\nkeep.o\nbuild\n"));
        assert!(!src.excludes(&name("a.o"), false));
        assert!(src.excludes(&name("keep.o"), false));
        assert!(src.excludes(&name("b.o"), false));
        assert!(src.excludes(&name("gen1.rs"), false), "a slash inside ties to the directory");
        let deeper = src.enter(&name("deeper"), None);
        assert!(!deeper.excludes(&name("gen1.rs"), false));
        assert!(deeper.excludes(&name("build"), false));
        assert!(!deeper.excludes(&name("a.o"), false));
    }

    #[test]
    fn nothing_below_an_excluded_directory_is_taken_back() {
        let root = Scope::root(given(&[]), file("build/\n!build/keep\n"));
        let build = root.enter(&name("build"), file("!*\n"));
        assert!(build.is_excluded());
        assert!(build.excludes(&name("keep"), false));
        assert!(build.enter(&name("x"), None).excludes(&name("y"), false));
    }

    #[test]
    fn what_was_given_with_the_mount_counts_before_all_files() {
        let root = Scope::root(given(&["*.tmp", "!vip.tmp", "/top"]), file("!*.tmp\nvip.tmp\n"));
        assert!(root.excludes(&name("a.tmp"), false));
        assert!(!root.excludes(&name("vip.tmp"), false));
        assert!(root.excludes(&name("top"), true));
        let below = root.enter(&name("x"), None);
        assert!(!below.excludes(&name("top"), true), "anchored in the root");
        assert!(below.excludes(&name("a.tmp"), false));
    }

    #[test]
    fn bad_lines_are_told_and_passed_over() {
        let (patterns, bad) = Patterns::of_file(b"*.o\n[a\n\xff\n*.tmp\r\n");
        let lines: Vec<usize> = bad.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [2, 3]);
        let root = Scope::root(given(&[]), Some(patterns));
        assert!(root.excludes(&name("x.o"), false) && root.excludes(&name("x.tmp"), false));
        let error = Patterns::of_globs(&["ok".into(), "[z".into()]).unwrap_err().to_string();
        assert!(error.contains("[z"), "{error}");
    }

    #[test]
    fn names_that_are_not_text_can_be_matched() {
        let root = Scope::root(given(&[]), file("*.o\n"));
        assert!(root.excludes(&EntryName::new(b"\xff.o").unwrap(), false));
        assert!(!root.excludes(&EntryName::new(b"\xff").unwrap(), false));
    }
}

//! What an import did, in words.

use std::fmt;

use crate::types::RelPath;

/// What an import found and recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImportReport {
    /// Names that are new.
    pub added: u64,
    /// Names that are gone.
    pub removed: u64,
    /// Objects with a new state.
    pub changed: u64,
    /// Files that were recognised under another name.
    pub moved: u64,
    /// Files that are gone and whose last content is nowhere in history.
    pub lost: Vec<RelPath>,
    /// Mountpoints of other filesystems in the tree: left out.
    pub skipped: Vec<RelPath>,
}

impl ImportReport {
    /// Whether no object was touched.
    pub fn is_nothing(&self) -> bool {
        self.added + self.removed + self.changed + self.moved == 0
    }
}

impl fmt::Display for ImportReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (self.added, "added"),
            (self.removed, "removed"),
            (self.changed, "changed"),
            (self.moved, "renamed"),
        ];
        f.write_str(&count_words(&counts))
    }
}

/// "12 files added, 3 changed"; "nothing to do" if all counts are zero.
pub fn count_words(counts: &[(u64, &str)]) -> String {
    let mut words = String::new();
    for (count, word) in counts.iter().filter(|(count, _)| *count > 0) {
        let noun = match (words.is_empty(), count) {
            (true, 1) => " file",
            (true, _) => " files",
            (false, _) => "",
        };
        let lead = if words.is_empty() { "" } else { ", " };
        words.push_str(&format!("{lead}{count}{noun} {word}"));
    }
    match words.is_empty() {
        true => "nothing to do".into(),
        false => words,
    }
}

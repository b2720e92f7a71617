//! The manners of the source that a machine can check: size of files, width of lines, layers,
//! `unsafe` in one module, no shortcuts, nothing unreachable.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The most lines one source file may have.
const LINES_MAX: usize = 600;
/// The most columns one line may have.
const COLUMNS_MAX: usize = 100;

/// The layer of every top-level module. A module uses only lower layers and its own folder.
const LAYERS: [(u32, &[&str]); 10] = [
    (0, &["types", "error", "sys", "progress", "time"]),
    (1, &["replica", "catalog", "retention", "excludes"]),
    (2, &["history"]),
    (3, &["store"]),
    (4, &["volume"]),
    (5, &["past"]),
    (6, &["fs", "report", "check"]),
    (7, &["mountpoint"]),
    (8, &["fuse", "control"]),
    (9, &["daemon", "cli", "main", "lib"]),
];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut waiting = vec![root().join(folder)];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(&folder).expect("source folders are readable").flatten() {
            let path = entry.path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).expect("below the root").display().to_string();
                found.push((name, fs::read_to_string(&path).expect("source is UTF-8")));
            }
        }
    }
    found.sort();
    found
}

/// The text before the unit tests at the end of a file.
fn without_tests(text: &str) -> &str {
    text.split("\n#[cfg(test)]").next().unwrap_or(text)
}

fn is_test_file(name: &str) -> bool {
    name.ends_with("/tests.rs") || name.ends_with("/faulty.rs") || name.contains("/tests/")
}

/// A line without its comment and without what stands in quotes.
fn code_of(line: &str) -> String {
    let mut code = String::new();
    let mut quoted = false;
    let mut previous = ' ';
    let mut characters = line.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '"' if previous != '\\' && previous != '\'' => quoted = !quoted,
            '/' if !quoted && characters.peek() == Some(&'/') => break,
            _ if !quoted => code.push(character),
            _ => {}
        }
        previous = character;
    }
    code
}

fn report(problems: Vec<String>) {
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn files_and_lines_are_short() {
    let mut problems = Vec::new();
    for (name, text) in rust_files("src").into_iter().chain(rust_files("tests")) {
        let count = text.lines().count();
        if count > LINES_MAX {
            problems.push(format!("{name}: {count} lines; the most is {LINES_MAX}"));
        }
        for (index, line) in text.lines().enumerate() {
            if line.chars().count() > COLUMNS_MAX {
                problems.push(format!("{name}:{}: wider than {COLUMNS_MAX}", index + 1));
            }
        }
    }
    report(problems);
}

#[test]
fn every_file_says_what_it_owns() {
    let missing = rust_files("src").into_iter().chain(rust_files("tests"));
    report(
        missing
            .filter(|(_, text)| !text.starts_with("//!"))
            .map(|(name, _)| format!("{name}: no //! at its top"))
            .collect(),
    );
}

fn layer_of(module: &str) -> Option<u32> {
    LAYERS.iter().find(|(_, names)| names.contains(&module)).map(|(layer, _)| *layer)
}

/// The top-level module a source file belongs to.
fn module_of(name: &str) -> &str {
    let below = name.trim_start_matches("src/");
    below.split('/').next().unwrap_or(below).trim_end_matches(".rs")
}

#[test]
fn modules_use_only_lower_layers() {
    let mut problems = Vec::new();
    for (name, text) in rust_files("src") {
        let own = module_of(&name);
        let Some(own_layer) = layer_of(own) else {
            problems.push(format!("{name}: the module {own} is in no layer"));
            continue;
        };
        // Unit tests may build on anything; the rule is about the product.
        if is_test_file(&name) {
            continue;
        }
        for (index, line) in without_tests(&text).lines().enumerate() {
            let code = code_of(line);
            for prefix in ["crate::", "rearviewfs::"] {
                for rest in code.split(prefix).skip(1) {
                    let used: String =
                        rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                    let Some(used_layer) = layer_of(&used) else { continue };
                    // Layer 0 is one family (an error names types), and its members are small.
                    let family = own_layer == 0 && used_layer == 0;
                    let top = own_layer == 9;
                    if used != own && used_layer >= own_layer && !family && !top {
                        let line = index + 1;
                        problems.push(format!("{name}:{line}: {own} may not use {used}"));
                    }
                }
            }
        }
    }
    report(problems);
}

#[test]
fn unsafe_code_is_in_one_module() {
    let mut problems = Vec::new();
    for (name, text) in rust_files("src").into_iter().chain(rust_files("tests")) {
        if name == "src/sys.rs" || name.starts_with("src/sys/") {
            continue;
        }
        for (index, line) in text.lines().enumerate() {
            let code = code_of(line);
            let words: Vec<&str> =
                code.split(|c: char| !(c.is_alphanumeric() || c == '_')).collect();
            if words.contains(&"unsafe") || code.contains("allow(unsafe_code)") {
                problems.push(format!("{name}:{}: unsafe outside src/sys.rs", index + 1));
            }
        }
    }
    report(problems);
}

#[test]
fn no_shortcuts_in_the_product() {
    let banned = ["todo!", "unimplemented!", ".unwrap()", "dbg!", "FIXME", "XXX", "TODO"];
    let mut problems = Vec::new();
    for (name, text) in rust_files("src") {
        if is_test_file(&name) {
            continue;
        }
        for (index, line) in without_tests(&text).lines().enumerate() {
            // Words that mark unfinished work count in comments too; calls only in code.
            let code = code_of(line);
            for word in banned {
                let text = if word.chars().all(char::is_uppercase) { line } else { code.as_str() };
                if text.contains(word) {
                    problems.push(format!("{name}:{}: {word}", index + 1));
                }
            }
        }
    }
    report(problems);
}

#[test]
fn nothing_names_the_machine_it_was_written_on() {
    // Put together from parts, so that this file does not find itself.
    let banned = [["/ro", "ot/"], ["/wo", "rk/"], ["/tmp/", "h/"], ["/tmp/", "spec"]]
        .map(|parts| parts.concat());
    let mut problems = Vec::new();
    let others = ["README.md", "Cargo.toml", "scripts/run", "scripts/test", ".ci/run"];
    let texts = others
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), fs::read_to_string(root().join(name)).ok()?)));
    for (name, text) in rust_files("src").into_iter().chain(rust_files("tests")).chain(texts) {
        for (index, line) in text.lines().enumerate() {
            for word in banned.iter().filter(|word| line.contains(word.as_str())) {
                problems.push(format!("{name}:{}: {word}", index + 1));
            }
        }
    }
    report(problems);
}

/// The files that `mod` lines reach from `file`, itself included.
fn reach(file: &Path, known: &BTreeMap<PathBuf, String>, found: &mut BTreeSet<PathBuf>) {
    let Some(text) = known.get(file) else { return };
    if !found.insert(file.to_owned()) {
        return;
    }
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let parent = file.parent().unwrap_or(Path::new(""));
    let folder = match stem {
        "main" | "lib" | "mod" => parent.to_owned(),
        _ => parent.join(stem),
    };
    for line in text.lines() {
        let line = line.trim().trim_start_matches("pub(crate) ").trim_start_matches("pub(super) ");
        let line = line.trim_start_matches("pub ");
        if let Some(name) = line.strip_prefix("mod ").and_then(|rest| rest.strip_suffix(';')) {
            reach(&folder.join(format!("{name}.rs")), known, found);
            reach(&folder.join(name).join("mod.rs"), known, found);
        }
    }
}

#[test]
fn every_source_file_is_part_of_the_build() {
    let known: BTreeMap<PathBuf, String> =
        rust_files("src").into_iter().map(|(name, text)| (PathBuf::from(name), text)).collect();
    let mut found = BTreeSet::new();
    for start in ["src/main.rs", "src/lib.rs"] {
        reach(Path::new(start), &known, &mut found);
    }
    report(
        known
            .keys()
            .filter(|name| !found.contains(*name))
            .map(|name| format!("{}: no `mod` line leads here", name.display()))
            .collect(),
    );
}

#[test]
fn the_usual_files_are_there() {
    for name in ["README.md", "LICENSE", "scripts/run", "scripts/test", ".ci/run", "Cargo.lock"] {
        assert!(root().join(name).is_file(), "{name} is missing");
    }
}

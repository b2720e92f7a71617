//! What the README shows works: every block fenced as ```` ```console ```` is run as one session
//! in a fresh folder, line by line, and its output must contain the lines shown.
//!
//! In such a block `$ ` begins a command; lines after it are output that must appear, in order; a
//! line of `...` stands for anything. `~` is a fresh home.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{need, run, scratch};

fn readme() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    fs::read_to_string(path).expect("README.md is there")
}

/// The blocks fenced with `kind`.
fn blocks(text: &str, kind: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim_end() == format!("```{kind}") {
            let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            found.push(block.join("\n"));
        }
    }
    found
}

/// A command of a block and the output shown for it.
struct Step {
    command: String,
    shown: Vec<String>,
}

fn steps(block: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for line in block.lines() {
        if let Some(command) = line.strip_prefix("$ ") {
            let command = command.split("   #").next().unwrap_or(command).trim().to_owned();
            steps.push(Step { command, shown: Vec::new() });
        } else if let Some(step) = steps.last_mut()
            && !["", "..."].contains(&line.trim())
        {
            step.shown.push(line.to_owned());
        }
    }
    steps
}

/// The marker between the outputs of two commands.
const MARK: &str = "=-=-=";

#[test]
fn the_sessions_in_the_readme_run_as_shown() {
    need(&["fusermount3"]);
    let sessions = blocks(&readme(), "console");
    assert!(!sessions.is_empty(), "the README shows at least one session");
    for session in sessions {
        let home = scratch();
        let steps = steps(&session);
        let mut script = String::new();
        for step in &steps {
            script.push_str(&format!("{}\necho '{MARK}'\n", step.command));
        }
        let binary = PathBuf::from(env!("CARGO_BIN_EXE_rearview"));
        let mut path = binary.parent().expect("in a folder").as_os_str().to_owned();
        path.push(":");
        path.push(std::env::var_os("PATH").expect("a PATH"));
        let done = run(Command::new("bash")
            .args(["-euc", &script])
            .current_dir(home.path())
            .env("HOME", home.path())
            .env("PATH", &path));
        for (point, _) in common::mounts_at(home.path()) {
            run(Command::new(&binary).arg("umount").arg(&point));
            run(Command::new("umount").args(["-q", "-l"]).arg(&point));
        }
        assert_eq!(done.code, 0, "{}", done.told());
        let outputs: Vec<&str> = done.stdout.split(&format!("{MARK}\n")).collect();
        for (step, output) in steps.iter().zip(outputs) {
            let mut rest = output;
            for shown in &step.shown {
                let shown = shown.trim();
                let at = rest.find(shown).unwrap_or_else(|| {
                    panic!("`{}` does not print {shown:?} but:\n{output}", step.command)
                });
                rest = &rest[at + shown.len()..];
            }
        }
    }
}

#[test]
fn the_two_commands_of_the_readme_are_there() {
    let text = readme();
    for script in ["scripts/run", "scripts/test"] {
        assert!(text.contains(script), "the README names {script}");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).unwrap().permissions());
        assert_ne!(mode & 0o111, 0, "{script} can be run");
    }
}

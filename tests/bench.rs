//! The benchmarks run: a tiny one measures every group of works and tells of what it could not.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use common::{mounts_at, need, run, scratch};

/// A run over almost nothing, on the systems that need no package of their own.
fn bench(out: &Path, place: &Path, more: &[&str]) -> Command {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
    let mut command = Command::new("python3");
    command
        .args(["-B", "bench_main.py", "speed", "--rounds", "1", "--files", "21", "--mib", "1"])
        .args(["--systems", "ext4,rearview", "--out"])
        .arg(out)
        .arg("--scratch")
        .arg(place)
        .args(more)
        .env("REARVIEW", env!("CARGO_BIN_EXE_rearview"))
        .current_dir(scripts);
    command
}

#[test]
fn a_tiny_bench_of_speed_has_a_time_for_every_work() {
    need(&["python3", "mkfs.ext4", "tar"]);
    let out = scratch();
    let place = out.path().join("place");
    // The random transfers are fio's, which is no part of what the tests need.
    run(&mut bench(out.path(), &place, &["--work", "tree,stream,past"])).ok();
    let told: Value =
        serde_json::from_str(&fs::read_to_string(out.path().join("speed.json")).unwrap()).unwrap();
    for work in ["untar", "rm -rf", "read, cold", "overwrite, fsync"] {
        for system in ["ext4", "rearview"] {
            let seconds = told["times"][work][system][0].as_f64();
            assert!(seconds.is_some_and(|seconds| seconds > 0.0), "{work} on {system}: {told}");
        }
    }
    assert!(told["times"]["cp -a out of a snapshot"]["rearview"][0].is_f64(), "{told}");
    let text = fs::read_to_string(out.path().join("speed.txt")).unwrap();
    assert!(text.contains("read, warm") && !text.contains("FAILED"), "{text}");
    assert!(fs::read_to_string(out.path().join("speed.svg")).unwrap().ends_with("</svg>\n"));
    assert!(!place.exists() && mounts_at(&place).is_empty());
}

#[test]
fn a_work_that_fails_has_its_reason_and_no_time() {
    need(&["python3", "mkfs.ext4", "tar"]);
    let (out, tools) = (scratch(), scratch());
    // A tar that does nothing is as quick as can be.
    let tar = tools.path().join("tar");
    fs::write(&tar, "#!/bin/sh\ncase $1 in -xf) exit 0;; esac\nexec /usr/bin/tar \"$@\"\n")
        .unwrap();
    fs::set_permissions(&tar, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", tools.path().display(), std::env::var("PATH").unwrap());
    let mut command = bench(out.path(), &out.path().join("place"), &["--work", "tree"]);
    let done = run(command.env("PATH", path)).fails(1, &["the archive did not arrive"]);
    assert!(done.stdout.contains("FAILED untar / rearview"), "{}", done.told());
}

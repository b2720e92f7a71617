//! Real input: the sources that cargo keeps, at least 20,000 files of them, lived with through
//! five snapshots, each compared with a plain copy taken at that moment.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::tree::{assert_trees, read_tree};
use common::{Mounted, shell};

/// How many files the tree must have at least.
const FILES_MIN: usize = 20_000;

/// A small deterministic generator: the same edits in every run.
struct Lottery(u64);

impl Lottery {
    fn draw(&mut self, below: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % below
    }
}

fn files_below(root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(folder) = waiting.pop() {
        let Ok(list) = fs::read_dir(&folder) else { continue };
        for entry in list.flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => waiting.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files.sort();
    files
}

/// Copies cargo's sources to `to`, again and again under other names until there are enough files.
fn gather(to: &Path) -> usize {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("a home")).join(".cargo"));
    let sources = home.join("registry/src");
    let count = files_below(&sources).len();
    assert!(count > 1_000, "{sources:?} has {count} files: build the project first");
    let mut round = 0;
    let mut have = 0;
    while have < FILES_MIN {
        let copy = to.join(format!("sources{round}"));
        shell(Path::new("/"), &format!("mkdir -p {to:?}; cp -a {sources:?} {copy:?}"));
        // A copy with the same bytes would say little: each file of it begins differently.
        if round > 0 {
            for path in files_below(&copy).iter().step_by(2) {
                let mut bytes = format!("// copy {round}\n").into_bytes();
                bytes.extend(fs::read(path).unwrap());
                let _ = fs::write(path, bytes);
            }
        }
        have += count;
        round += 1;
    }
    have
}

/// Edits, moves and deletes about a tenth of all files, by every usual means.
fn live_on(root: &Path, lottery: &mut Lottery) {
    let files = files_below(root);
    for _ in 0..files.len() / 10 {
        let path = &files[lottery.draw(files.len())];
        if !path.exists() {
            continue;
        }
        match lottery.draw(8) {
            0 => fs::write(path, format!("rewritten {}\n", lottery.draw(1_000))).unwrap(),
            1 => {
                let file = fs::OpenOptions::new().append(true).open(path).unwrap();
                std::io::Write::write_all(&mut &file, b"// appended\n").unwrap();
            }
            2 => {
                let file = fs::OpenOptions::new().write(true).open(path).unwrap();
                let len = file.metadata().unwrap().len() as usize;
                file.write_all_at(b"EDITED IN PLACE", lottery.draw(len + 1) as u64).unwrap();
            }
            3 => {
                let file = fs::OpenOptions::new().write(true).open(path).unwrap();
                let len = file.metadata().unwrap().len() as usize;
                file.set_len(lottery.draw(len + 1) as u64).unwrap();
            }
            4 => {
                let new = path.with_extension(format!("moved{}", lottery.draw(1_000)));
                fs::rename(path, new).unwrap();
            }
            5 => {
                // As editors save: a new file renamed over the old.
                let tmp = path.with_extension("tmp~");
                fs::write(&tmp, format!("saved {}\n", lottery.draw(1_000))).unwrap();
                fs::rename(&tmp, path).unwrap();
            }
            6 => {
                let to = &files[lottery.draw(files.len())];
                if to.exists() && to != path {
                    fs::rename(path, to).unwrap();
                }
            }
            _ => fs::remove_file(path).unwrap(),
        }
    }
    // Whole folders move, and one goes.
    let mut folders: Vec<PathBuf> = files.iter().filter_map(|f| Some(f.parent()?.into())).collect();
    folders.dedup();
    for round in 0..20 {
        let folder = &folders[lottery.draw(folders.len())];
        let name = format!("folder-moved-{}-{round}", lottery.draw(1_000_000));
        if folder.exists() && folder != root {
            fs::rename(folder, root.join(name)).unwrap();
        }
    }
    let gone = &folders[lottery.draw(folders.len())];
    if gone.exists() && gone != root {
        fs::remove_dir_all(gone).unwrap();
    }
}

#[test]
fn five_snapshots_of_20_000_real_files_equal_plain_copies() {
    let mut store = Mounted::new();
    let outside = store.beside("outside");
    let count = gather(&outside);
    shell(&store.mnt, &format!("cp -a {outside:?} tree"));
    let live = store.path("tree");
    assert!(count >= FILES_MIN);
    assert_trees("copied in", &read_tree(&outside), &read_tree(&live));
    fs::remove_dir_all(&outside).unwrap();
    let mut lottery = Lottery(2026);
    let mut copies = Vec::new();
    for round in 1..=5 {
        store.snapshot(&format!("s{round}"));
        let copy = store.beside(&format!("copy{round}"));
        shell(&store.mnt, &format!("cp -a tree {copy:?}"));
        copies.push(read_tree(&copy));
        fs::remove_dir_all(&copy).unwrap();
        live_on(&live, &mut lottery);
    }
    // Reading one snapshot takes a while: all of them once, after a remount; samples otherwise.
    let check = |store: &Mounted, rounds: &[usize]| {
        for round in rounds {
            let name = format!("s{round}");
            assert_trees(&name, &copies[round - 1], &read_tree(&store.past(&name).join("tree")));
        }
    };
    check(&store, &[1, 5]);
    store.remount();
    check(&store, &[1, 2, 3, 4, 5]);
    store.unmount();
    store.assert_replicas_identical();
    let last = store.backings[1].clone();
    store.mount_only(&[last]).ok();
    check(&store, &[2]);
    store.unmount();
}

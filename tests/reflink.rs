//! On backings that can share blocks an overwritten content is preserved by a clone, not by a copy.

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::Mounted;
use common::disk::LoopFs;

fn files_below(folder: &Path) -> Vec<(u64, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let data = entry.metadata().unwrap();
        if data.is_dir() {
            found.extend(files_below(&entry.path()));
        } else {
            found.push((data.len(), entry.file_name().to_string_lossy().into_owned()));
        }
    }
    found
}

fn overwritten_content_is_cloned(disks: [LoopFs; 2]) {
    let backings = disks.iter().map(|disk| disk.root().join("backing")).collect();
    let mut store = Mounted::over(backings);
    let old = vec![b'o'; 1 << 20];
    fs::write(store.path("f"), &old).unwrap();
    store.snapshot("before");
    let file = OpenOptions::new().write(true).open(store.path("f")).unwrap();
    file.write_all_at(b"new", 5000).unwrap();
    drop(file);
    for backing in &store.backings {
        let private = backing.join(".rearview");
        let preserved = files_below(&private.join("preserved"));
        assert_eq!(preserved.len(), 1, "{preserved:?}");
        assert_eq!(preserved[0].0, 1 << 20);
        assert!(files_below(&private.join("undo")).is_empty(), "nothing was copied");
    }
    assert!(fs::read(store.past("before").join("f")).unwrap() == old);
    store.remount();
    assert!(fs::read(store.past("before").join("f")).unwrap() == old);
    assert_eq!(&fs::read(store.path("f")).unwrap()[5000..5003], b"new");
    store.finish();
}

#[test]
fn xfs_shares_the_blocks_of_what_is_overwritten() {
    overwritten_content_is_cloned([LoopFs::xfs(320), LoopFs::xfs(320)]);
}

#[test]
fn btrfs_shares_the_blocks_of_what_is_overwritten() {
    overwritten_content_is_cloned([LoopFs::btrfs(256), LoopFs::btrfs(256)]);
}

/// History is the same on every replica: where one cannot clone, all copy.
#[test]
fn unlike_backings_copy_before_images() {
    let (xfs, ext4) = (LoopFs::xfs(320), LoopFs::ext4(64));
    let mut store = Mounted::over(vec![xfs.root().join("backing"), ext4.root().join("backing")]);
    fs::write(store.path("f"), vec![b'o'; 1 << 16]).unwrap();
    store.snapshot("before");
    let file = OpenOptions::new().write(true).open(store.path("f")).unwrap();
    file.write_all_at(b"new", 5000).unwrap();
    drop(file);
    for backing in &store.backings {
        assert_eq!(files_below(&backing.join(".rearview/undo")).len(), 1);
    }
    store.remount();
    assert!(fs::read(store.past("before").join("f")).unwrap() == vec![b'o'; 1 << 16]);
    store.finish();
}

/// A clone takes a transaction for each run of blocks. A file of 40,000 of them, as random writes
/// make it, was cloned for a second and a half after every close, and all its writers waited.
#[test]
fn a_fragmented_file_is_copied_where_it_is_overwritten() {
    let disks = [LoopFs::xfs(320), LoopFs::xfs(320)];
    let mut store = Mounted::over(disks.iter().map(|disk| disk.root().join("backing")).collect());
    let file = fs::File::create_new(store.path("f")).unwrap();
    // With holes between them no two blocks can be one run.
    (0..400).for_each(|number| file.write_all_at(&[b'o'; 4096], number * 8192).unwrap());
    drop(file);
    let old = fs::read(store.path("f")).unwrap();
    store.snapshot("before");
    let file = OpenOptions::new().write(true).open(store.path("f")).unwrap();
    for at in [5000, 16_384] {
        file.write_all_at(b"new", at).unwrap();
    }
    drop(file);
    for backing in &store.backings {
        assert!(files_below(&backing.join(".rearview/preserved")).is_empty(), "no clone was made");
        assert_eq!(files_below(&backing.join(".rearview/undo")).len(), 1);
    }
    assert!(fs::read(store.past("before").join("f")).unwrap() == old);
    store.remount();
    assert!(fs::read(store.past("before").join("f")).unwrap() == old);
    store.finish();
}

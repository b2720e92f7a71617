//! What the daemon holds follows what is in use: not what it knows, nor what ever was.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;

use common::{Mounted, daemon_of, open_files, wait_until};

/// Handles that are kept for later: two for each of the 256 shards of `preserved/`, for each of the
/// directories used last, and for what is done in the background.
fn kept(directories: usize) -> usize {
    2 * 256 + 2 * directories + 64
}

#[test]
fn open_descriptors_follow_open_files_not_known_ones() {
    let store = Mounted::new();
    let daemon = daemon_of(&store.mnt).expect("the mount is served");
    let before = open_files(daemon);
    for number in 0..1500 {
        let folder = store.path(&format!("d{}", number / 100));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join(number.to_string());
        fs::write(&path, b"text").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().size(), 4);
    }
    // The kernel knows all of them now.
    let settled = before + kept(16);
    wait_until("the files are closed", 60, || open_files(daemon) <= settled);
    let files: Vec<_> = (0..200)
        .map(|number| fs::File::open(store.path(&format!("d0/{}", number % 100))))
        .collect();
    assert!(files.iter().all(Result::is_ok));
    assert!(open_files(daemon) <= settled + 2 * 200);
    drop(files);
    for number in 0..1500 {
        fs::remove_file(store.path(&format!("d{}/{number}", number / 100))).unwrap();
    }
    wait_until("what was removed is closed", 60, || open_files(daemon) <= settled);
    store.finish();
}

//! Restores between plain directories: one stands for the past, the other for the live tree.

use super::*;
use crate::progress::Progress;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

struct Trees {
    _dir: tempfile::TempDir,
    past: PathBuf,
    live: PathBuf,
}

fn trees() -> Trees {
    let dir = tempfile::tempdir().unwrap();
    let (past, live) = (dir.path().join("past"), dir.path().join("live"));
    std::fs::create_dir_all(past.join("d/sub")).unwrap();
    std::fs::create_dir(&live).unwrap();
    std::fs::write(past.join("d/a"), "old a").unwrap();
    std::fs::write(past.join("d/sub/b"), "old b").unwrap();
    std::os::unix::fs::symlink("nowhere", past.join("d/link")).unwrap();
    Trees { _dir: dir, past, live }
}

impl Trees {
    fn restore(&self, path: &str, overwrite: Overwrite, dry_run: bool) -> Vec<copy::Item> {
        self.restore_to(path, overwrite, dry_run, None)
    }

    fn restore_to(
        &self,
        path: &str,
        overwrite: Overwrite,
        dry_run: bool,
        to: Option<&Path>,
    ) -> Vec<copy::Item> {
        let progress = Progress::silent();
        let mut copier = Copier::new(overwrite, dry_run, &progress);
        let path = RelPath::parse(path).unwrap();
        let job = Job { past: self.past.clone(), live: self.live.clone(), path };
        let plan = Plan { to, dry_run, overwrite };
        restore_job(&mut copier, &job, &plan).unwrap();
        copier.items
    }

    fn live(&self, path: &str) -> String {
        std::fs::read_to_string(self.live.join(path)).unwrap()
    }
}

#[test]
fn a_tree_comes_back_with_its_attributes() {
    let trees = trees();
    let mode = |mode| std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(trees.past.join("d/a"), mode(0o640)).unwrap();
    std::fs::set_permissions(trees.past.join("d/sub"), mode(0o555)).unwrap();
    let items = trees.restore("d", Overwrite::IfChanged, false);
    assert!(items.iter().all(|item| item.outcome == Ok(Deed::Created)), "{items:?}");
    assert_eq!(trees.live("d/sub/b"), "old b");
    assert_eq!(std::fs::read_link(trees.live.join("d/link")).unwrap(), Path::new("nowhere"));
    for path in ["d", "d/a", "d/sub", "d/link"] {
        let past = std::fs::symlink_metadata(trees.past.join(path)).unwrap();
        let live = std::fs::symlink_metadata(trees.live.join(path)).unwrap();
        assert_eq!(past.mode(), live.mode(), "{path}");
        assert_eq!(past.modified().unwrap(), live.modified().unwrap(), "{path}");
    }
    // A second time there is nothing to do, and no litter.
    assert!(trees.restore("d", Overwrite::IfChanged, false).is_empty());
    assert_eq!(std::fs::read_dir(trees.live.join("d")).unwrap().count(), 3);
}

#[test]
fn a_dry_run_names_all_and_changes_nothing() {
    let trees = trees();
    let items = trees.restore("d/sub", Overwrite::IfChanged, true);
    assert_eq!(items.len(), 2);
    assert_eq!(std::fs::read_dir(&trees.live).unwrap().count(), 0);
}

#[test]
fn missing_directories_above_are_made() {
    let trees = trees();
    trees.restore("d/sub/b", Overwrite::IfChanged, false);
    assert_eq!(trees.live("d/sub/b"), "old b");
    assert!(!trees.live.join("d/a").exists());
}

#[test]
fn each_overwrite_mode_keeps_its_word() {
    let trees = trees();
    std::fs::create_dir(trees.live.join("d")).unwrap();
    let reset = |seconds: i64| {
        std::fs::write(trees.live.join("d/a"), "new").unwrap();
        let past = std::fs::metadata(trees.past.join("d/a")).unwrap();
        let past = past.modified().unwrap();
        let shift = std::time::Duration::from_secs(seconds.unsigned_abs());
        let time = if seconds < 0 { past - shift } else { past + shift };
        let file = std::fs::File::options().write(true).open(trees.live.join("d/a")).unwrap();
        file.set_modified(time).unwrap();
    };
    for (overwrite, seconds, expected) in [
        (Overwrite::Never, -10, "new"),
        (Overwrite::IfNewer, 10, "new"),
        (Overwrite::IfNewer, -10, "old a"),
        (Overwrite::IfChanged, 10, "old a"),
        (Overwrite::Always, 10, "old a"),
    ] {
        reset(seconds);
        trees.restore("d/a", overwrite, false);
        assert_eq!(trees.live("d/a"), expected, "{overwrite:?} {seconds}");
    }
}

#[test]
fn same_content_with_another_time_gets_only_its_time_back() {
    let trees = trees();
    std::fs::create_dir(trees.live.join("d")).unwrap();
    std::fs::write(trees.live.join("d/a"), "old a").unwrap();
    let ino = std::fs::metadata(trees.live.join("d/a")).unwrap().ino();
    let file = std::fs::File::options().write(true).open(trees.live.join("d/a")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    let items = trees.restore("d/a", Overwrite::IfChanged, false);
    assert_eq!(items[0].outcome, Ok(Deed::Adjusted));
    let mtime = |root: &Path| std::fs::metadata(root.join("d/a")).unwrap().modified().unwrap();
    assert_eq!(mtime(&trees.live), mtime(&trees.past));
    assert!(trees.restore("d/a", Overwrite::IfChanged, false).is_empty());
    assert_eq!(std::fs::metadata(trees.live.join("d/a")).unwrap().ino(), ino);
    // Same size, other bytes.
    std::fs::write(trees.live.join("d/a"), "new a").unwrap();
    assert_eq!(trees.restore("d/a", Overwrite::IfChanged, false).len(), 1);
    assert_eq!(trees.live("d/a"), "old a");
}

#[test]
fn hard_links_and_holes_survive() {
    let trees = trees();
    std::fs::hard_link(trees.past.join("d/a"), trees.past.join("d/c")).unwrap();
    let sparse = std::fs::File::create(trees.past.join("d/sparse")).unwrap();
    sparse.set_len(8 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"x", 4 << 20).unwrap();
    drop(sparse);
    trees.restore("d", Overwrite::IfChanged, false);
    let live = |path: &str| std::fs::metadata(trees.live.join(path)).unwrap();
    assert_eq!(live("d/a").ino(), live("d/c").ino());
    assert_eq!(live("d/sparse").len(), 8 << 20);
    assert!(live("d/sparse").blocks() * 512 < 1 << 20);
    let same = std::fs::read(trees.live.join("d/sparse")).unwrap()
        == std::fs::read(trees.past.join("d/sparse")).unwrap();
    assert!(same);
}

#[test]
fn a_directory_in_a_files_place_is_named_and_kept() {
    let trees = trees();
    std::fs::create_dir_all(trees.live.join("d/a/mine")).unwrap();
    let items = trees.restore("d", Overwrite::Always, false);
    let failed: Vec<_> = items.iter().filter(|item| item.outcome.is_err()).collect();
    assert_eq!(failed.len(), 1);
    assert!(failed[0].path.ends_with("d/a"));
    assert!(trees.live.join("d/a/mine").exists());
    // The others were restored all the same.
    assert_eq!(trees.live("d/sub/b"), "old b");
}

#[test]
fn a_swapped_in_symlink_is_not_followed() {
    let trees = trees();
    let outside = trees.live.parent().unwrap().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, trees.live.join("d")).unwrap();
    let items = trees.restore("d", Overwrite::Always, false);
    assert!(items.iter().all(|item| item.outcome.is_err()), "{items:?}");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn a_restore_elsewhere_leaves_the_live_tree_alone() {
    let trees = trees();
    let to = trees.live.parent().unwrap().join("new/there");
    trees.restore_to("d/sub", Overwrite::IfChanged, false, Some(&to));
    assert_eq!(std::fs::read_to_string(to.join("sub/b")).unwrap(), "old b");
    trees.restore_to("/", Overwrite::IfChanged, false, Some(&to));
    assert!(to.join("d/link").symlink_metadata().is_ok());
    assert_eq!(std::fs::read_dir(&trees.live).unwrap().count(), 0);
}

#[test]
fn extended_attributes_come_back_where_there_are_any() {
    let trees = trees();
    let set = |path: &Path, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty())
    };
    if set(&trees.past.join("d/a"), "user.x", b"1").is_err() {
        eprintln!("skipped: no extended attributes here");
        return;
    }
    trees.restore("d", Overwrite::IfChanged, false);
    let mut value = [0u8; 8];
    let length = rustix::fs::lgetxattr(trees.live.join("d/a"), "user.x", &mut value[..]).unwrap();
    assert_eq!(&value[..length], b"1");
    // Only an attribute differs, of a file and of a directory.
    set(&trees.live.join("d/a"), "user.x", b"2").unwrap();
    set(&trees.live.join("d/sub"), "user.y", b"2").unwrap();
    let items = trees.restore("d", Overwrite::IfChanged, false);
    assert_eq!(items.len(), 2, "{items:?}");
    assert!(items.iter().all(|item| item.outcome == Ok(Deed::Adjusted)), "{items:?}");
    assert!(trees.restore("d", Overwrite::IfChanged, false).is_empty());
}

#[test]
fn same_size_and_time_with_other_bytes_is_replaced() {
    let trees = trees();
    trees.restore("d", Overwrite::IfChanged, false);
    let time = std::fs::metadata(trees.past.join("d/a")).unwrap().modified().unwrap();
    std::fs::write(trees.live.join("d/a"), "new a").unwrap();
    let file = std::fs::File::options().write(true).open(trees.live.join("d/a")).unwrap();
    file.set_modified(time).unwrap();
    assert_eq!(trees.restore("d", Overwrite::IfChanged, false).len(), 1);
    assert_eq!(trees.live("d/a"), "old a");
}

#[test]
fn a_lost_name_becomes_a_link_of_the_unchanged_file_again() {
    let trees = trees();
    for name in ["c", "e"] {
        std::fs::hard_link(trees.past.join("d/a"), trees.past.join("d").join(name)).unwrap();
    }
    trees.restore("d", Overwrite::IfChanged, false);
    let ino = |name: &str| std::fs::metadata(trees.live.join("d").join(name)).unwrap().ino();
    let first = ino("a");
    for overwrite in [Overwrite::IfChanged, Overwrite::Never] {
        std::fs::remove_file(trees.live.join("d/c")).unwrap();
        assert_eq!(trees.restore("d", overwrite, true).len(), 1);
        trees.restore("d", overwrite, false);
        assert_eq!([ino("a"), ino("c"), ino("e")], [first; 3]);
    }
    // A copy in a link's place becomes the link; in the first one's place it draws the others.
    for copy in ["c", "a"] {
        std::fs::remove_file(trees.live.join("d").join(copy)).unwrap();
        std::fs::write(trees.live.join("d").join(copy), "old a").unwrap();
        let told = trees.restore("d", Overwrite::IfChanged, true).len();
        assert_eq!(trees.restore("d", Overwrite::IfChanged, false).len(), told);
        assert_eq!(ino("a"), ino("c"));
        assert_eq!(ino("a"), ino("e"));
    }
    assert!(trees.restore("d", Overwrite::IfChanged, false).is_empty());
    assert!(trees.restore("d", Overwrite::Always, false).len() <= 5);
    assert_eq!(ino("a"), ino("c"));
    assert_eq!(trees.live("d/e"), "old a");
}

#[test]
fn instants_are_written_without_loss() {
    for nanos in [1_500_000_000, 0, -1, -1_500_000_000, -2_000_000_000] {
        let time = Timestamp::from_nanos(nanos);
        let text = format!("@{}", unix_text(time));
        assert_eq!(parse_instant(&text, Timestamp::now(), Zone::Utc).unwrap(), time, "{text}");
    }
}

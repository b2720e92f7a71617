//! `rearview check`: a sound store is told to be sound, and each kind of damage is named.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use common::run::rearview;
use common::{Mounted, shell};

/// A store with every kind of history, unmounted.
fn store_with_history() -> Mounted {
    let mut store = Mounted::new();
    let big: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    fs::create_dir(store.path("dir")).unwrap();
    fs::write(store.path("dir/big"), &big).unwrap();
    fs::write(store.path("note"), "one").unwrap();
    fs::write(store.path("empty"), "").unwrap();
    fs::hard_link(store.path("note"), store.path("dir/also")).unwrap();
    symlink("dir/big", store.path("link")).unwrap();
    fs::write(store.path("gone"), "to be deleted").unwrap();
    store.snapshot("one");
    shell(
        &store.mnt,
        "printf XYZ | dd of=dir/big bs=1 seek=70000 conv=notrunc status=none && \
         echo two > note && rm gone && chmod 600 empty && mv dir moved",
    );
    store.snapshot("two");
    store.rearview(&["prune", "--keep-last", "9"]).ok();
    shell(
        &store.mnt,
        "printf ABC | dd of=moved/big bs=1 seek=170000 conv=notrunc status=none && \
         echo three > note && echo new > new && rm new",
    );
    store.unmount();
    store
}

fn checked(store: &Mounted) -> common::Done {
    let mut words = vec!["check".into(), "--read-data".into()];
    words.extend(store.backings.iter().map(|path| path.clone().into_os_string()));
    rearview(words)
}

#[test]
fn a_store_with_every_kind_of_history_is_sound() {
    let store = store_with_history();
    store.assert_sound();
    let said = checked(&store).ok();
    assert!(said.contains("no damage found"), "{said}");
}

#[test]
fn each_kind_of_damage_is_named() {
    let store = store_with_history();
    let backing = &store.backings[1];
    let name_of = |dir: &str| {
        let found = shell(backing, &format!("find .rearview/{dir} -type f"));
        let first = found.lines().next().unwrap_or_else(|| panic!("nothing in {dir}"));
        backing.join(first)
    };
    let cases: [(&str, &dyn Fn()); 9] = [
        ("new", &|| fs::write(backing.join("new"), "foreign").unwrap()),
        ("empty", &|| {
            let mode = fs::Permissions::from_mode(0o777);
            fs::set_permissions(backing.join("empty"), mode).unwrap();
        }),
        ("note", &|| fs::write(backing.join("note"), "other").unwrap()),
        ("link", &|| fs::remove_file(backing.join("link")).unwrap()),
        (".pack", &|| fs::write(name_of("packs"), "garbage").unwrap()),
        (".seg", &|| fs::write(name_of("undo"), "garbage").unwrap()),
        ("preserved", &|| fs::remove_file(name_of("preserved")).unwrap()),
        ("catalog.db", &|| {
            let file = backing.join(".rearview/catalog.db");
            let db = rusqlite::Connection::open(file).unwrap();
            db.execute("DELETE FROM content WHERE id = (SELECT min(id) FROM content)", []).unwrap();
        }),
        ("catalog.db", &|| {
            let file = backing.join(".rearview/catalog.db");
            let mut bytes = fs::read(&file).unwrap();
            bytes[5000..9000].fill(0x55);
            fs::write(&file, bytes).unwrap();
        }),
    ];
    for (word, damage) in cases {
        damage();
        let done = checked(&store);
        assert_eq!(done.code, 21, "{word}: {}", done.told());
        assert!(done.stdout.contains(word), "{word}: {}", done.told());
        assert!(!done.stdout.contains("backing0"), "the other replica is whole: {}", done.told());
    }
}

#[test]
fn damage_on_one_replica_is_repaired() {
    let store = store_with_history();
    let backing = &store.backings[0];
    fs::remove_file(backing.join("link")).unwrap();
    fs::set_permissions(backing.join("empty"), fs::Permissions::from_mode(0o777)).unwrap();
    shell(backing, "for pack in $(find .rearview/packs -type f); do echo x > $pack; done");
    let mut words = vec!["check".into(), "--read-data".into(), "--repair".into()];
    words.extend(store.backings.iter().map(|path| path.clone().into_os_string()));
    let said = rearview(words).ok();
    assert!(said.contains("no damage found"), "{said}");
    store.assert_sound();
}

#[test]
fn a_catalog_that_is_rotten_but_consistent_is_named_and_not_the_sound_one() {
    let store = store_with_history();
    for (rotten, sound) in [(0, 1), (1, 0)] {
        let file = store.backings[rotten].join(".rearview/catalog.db");
        let db = rusqlite::Connection::open(&file).unwrap();
        db.execute("UPDATE node SET uid = uid + 1 WHERE kind = 8", []).unwrap();
        drop(db);
        let done = checked(&store);
        assert_eq!(done.code, 21, "{}", done.told());
        let (bad, good) = (format!("backing{rotten}"), format!("backing{sound}"));
        assert!(done.stdout.contains("not as they were written"), "{}", done.told());
        assert!(done.stdout.contains(&bad) && !done.stdout.contains(&good), "{}", done.told());
        let mut words = vec!["check".into(), "--repair".into()];
        words.extend(store.backings.iter().map(|path| path.clone().into_os_string()));
        assert!(rearview(words).ok().contains("no damage found"));
        store.assert_sound();
    }
}

#[test]
fn of_a_mounted_store_the_catalogs_are_checked() {
    let store = Mounted::new();
    fs::write(store.path("file"), "bytes").unwrap();
    checked(&store).fails(11, &["in use"]);
    let said = store.rearview(&["check", "."]).ok();
    assert!(said.contains("no damage found") && said.contains("scrub"), "{said}");
    store.finish();
}

/// The versions of a file: their names, which are their times, and their bytes.
fn versions(store: &Mounted, path: &str) -> BTreeMap<String, Vec<u8>> {
    let path = Path::new(path);
    let dir = store.mnt.join(path.parent().unwrap()).join(".snapshots/.versions");
    let dir = dir.join(path.file_name().unwrap());
    fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}

fn lose_catalogs(store: &Mounted) {
    for backing in &store.backings {
        shell(backing, "rm .rearview/catalog.db*");
    }
}

#[test]
fn a_lost_catalog_is_made_anew_with_the_packed_past() {
    let mut store = Mounted::new();
    fs::create_dir(store.path("dir")).unwrap();
    fs::create_dir(store.path("gone")).unwrap();
    let write = |store: &Mounted, round: u32| {
        for name in ["note", "dir/book", "gone/paper"] {
            let line = format!("{name} {round}\n").repeat(1 + round as usize * 3000);
            fs::write(store.path(name), line).unwrap();
        }
        store.snapshot(&format!("s{round}"));
    };
    (0..4).for_each(|round| write(&store, round));
    shell(&store.mnt, "ln note dir/link && ln -s note sym && chmod 640 note && rm -r gone");
    fs::write(store.path("untouched"), "never changed").unwrap();
    store.rearview(&["prune", "--keep-last", "9"]).ok();
    // Deleted and not packed yet.
    fs::write(store.path("last"), "preserved bytes").unwrap();
    store.snapshot("end");
    fs::remove_file(store.path("last")).unwrap();
    let names = ["note", "dir/book", "gone/paper"];
    let mut before = Vec::new();
    for name in names {
        before.push(match name {
            // Its directory is gone: it is looked at through a snapshot.
            "gone/paper" => BTreeMap::new(),
            name => versions(&store, name),
        });
    }
    let live = common::tree::read_tree(&store.mnt);
    store.unmount();
    lose_catalogs(&store);
    assert_eq!(checked(&store).code, 21);
    store.mount().fails(21, &["--rebuild-catalog"]);
    let mut words = vec!["check".into(), "--rebuild-catalog".into()];
    words.extend(store.backings.iter().map(|path| path.clone().into_os_string()));
    let said = rearview(words).ok();
    assert!(said.contains("past versions, from"), "{said}");
    store.mount().ok();
    common::tree::assert_trees("live", &live, &common::tree::read_tree(&store.mnt));
    for (name, before) in names.iter().zip(&before) {
        if before.is_empty() {
            continue;
        }
        let after = versions(&store, name);
        assert_eq!(before.len(), 4, "{name}: {:?}", before.keys());
        // The live version is born by the rebuilding, all others at their times.
        for (time, bytes) in before.iter().take(3) {
            assert_eq!(after.get(time), Some(bytes), "{name} of {time}: {:?}", after.keys());
        }
        assert_eq!(after.values().last(), before.values().last(), "{name}");
    }
    // The directory is gone with what was in it; the last state of that is shown as deleted.
    let gone = shell(&store.mnt, "ls -R .snapshots/.deleted && cat .snapshots/.deleted/gone/paper");
    assert!(gone.contains("gone/paper 3"), "{gone}");
    let log = store.rearview(&["log", "gone/paper"]).ok();
    assert_eq!(log.matches("written").count() + log.matches("created").count(), 4, "{log}");
    // Only what was preserved and in no pack yet has no path.
    let unnamed = format!(".snapshots/.deleted/{}/*", rearviewfs::check::UNNAMED);
    assert_eq!(shell(&store.mnt, &format!("cat {unnamed}")), "preserved bytes");
    store.finish();
}

/// The file in which its last version is preserved is the one that was written to.
#[test]
fn what_a_deleted_file_had_before_it_was_written_to_is_told_as_unknown() {
    let mut store = Mounted::new();
    fs::write(store.path("held"), "the version").unwrap();
    store.snapshot("s");
    let mut file = fs::OpenOptions::new().write(true).open(store.path("held")).unwrap();
    fs::remove_file(store.path("held")).unwrap();
    file.write_all(b"XXX").unwrap();
    drop(file);
    store.unmount();
    lose_catalogs(&store);
    let mut words = vec!["check".into(), "--rebuild-catalog".into()];
    words.extend(store.backings.iter().map(|path| path.clone().into_os_string()));
    let said = rearview(words).ok();
    let written_to = |line: &&str| line.contains("where it was overwritten later");
    let told: Vec<&str> = said.lines().filter(written_to).collect();
    assert_eq!(told.len(), 1, "{said}");
    store.mount().ok();
    let unnamed = format!(".snapshots/.deleted/{}", rearviewfs::check::UNNAMED);
    let name = Path::new(told[0].split("it is shown as ").nth(1).unwrap().trim());
    let name = name.file_name().unwrap().to_str().unwrap();
    assert_eq!(shell(&store.path(&unnamed), &format!("cat {name}")), "XXX version");
    store.finish();
}

#[test]
fn a_catalog_that_is_lost_or_damaged_on_one_replica_is_replaced_at_mount() {
    let mut store = store_with_history();
    let stranger = Mounted::new();
    let foreign = stranger.backings[0].join(".rearview/catalog.db");
    let file = store.backings[1].join(".rearview/catalog.db");
    let spoil = |from: usize, to: usize| {
        let mut bytes = fs::read(&file).unwrap();
        let end = to.min(bytes.len());
        bytes[from..end].iter_mut().for_each(|byte| *byte ^= 0x5a);
        fs::write(&file, bytes).unwrap();
    };
    let truncate = |size: u64| {
        fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(size).unwrap();
    };
    let cases: [(&str, &dyn Fn()); 8] = [
        ("missing", &|| fs::remove_file(&file).unwrap()),
        ("empty", &|| truncate(0)),
        ("cut short", &|| truncate(fs::metadata(&file).unwrap().len() / 2 / 4096 * 4096)),
        ("its header spoilt", &|| spoil(0, 64)),
        ("a page spoilt", &|| spoil(3 * 4096, 4 * 4096)),
        ("many pages spoilt", &|| spoil(8192, usize::MAX)),
        ("another store's", &|| _ = fs::copy(&foreign, &file).unwrap()),
        ("text", &|| fs::write(&file, "this is no catalog").unwrap()),
    ];
    store.mount().ok();
    let live = common::tree::read_tree(&store.mnt);
    let past = ["one", "two"].map(|name| common::tree::read_tree(&store.past(name)));
    store.unmount();
    for (what, damage) in cases {
        damage();
        store.mount().ok();
        common::tree::assert_trees(what, &live, &common::tree::read_tree(&store.mnt));
        for (name, past) in ["one", "two"].iter().zip(&past) {
            common::tree::assert_trees(what, past, &common::tree::read_tree(&store.past(name)));
        }
        store.unmount();
        store.assert_sound();
    }
    stranger.finish();
}

#[test]
fn a_log_of_the_catalog_that_is_lost_with_a_crash_is_made_good() {
    let mut store = store_with_history();
    store.mount().ok();
    fs::write(store.path("late"), "written before the end").unwrap();
    store.snapshot("late");
    let daemon = store.daemon();
    shell(store.mnt.parent().unwrap(), &format!("kill -9 {daemon} && fusermount3 -uz mnt"));
    store.ended_elsewhere();
    fs::remove_file(store.backings[1].join(".rearview/catalog.db-wal")).unwrap();
    store.mount().ok();
    assert_eq!(fs::read(store.past("late").join("late")).unwrap(), b"written before the end");
    store.finish();
}

#[test]
fn what_writes_to_a_store_is_refused_while_it_is_mounted() {
    let mut store = store_with_history();
    store.mount().ok();
    for option in ["--repair", "--rebuild-catalog"] {
        let words = [option, "rearview umount", &store.backings[1].to_string_lossy()];
        store.rearview(&["check", option, "."]).fails(11, &words);
    }
    store.rearview(&["check", "."]).ok();
    store.finish();
}

/// The names in the private directory of a backing.
fn private_names(backing: &Path) -> Vec<std::ffi::OsString> {
    common::tree::names_in(&backing.join(".rearview"))
}

#[test]
fn a_backing_is_left_as_it_was_found() {
    let mut store = store_with_history();
    let found = store.backings.iter().map(|path| private_names(path)).collect::<Vec<_>>();
    assert!(!format!("{found:?}").contains("catalog.db-"), "{found:?}");
    let catalog = fs::read(store.backings[0].join(".rearview/catalog.db")).unwrap();
    checked(&store).ok();
    for (backing, found) in store.backings.iter().zip(&found) {
        assert_eq!(&private_names(backing), found);
    }
    assert_eq!(fs::read(store.backings[0].join(".rearview/catalog.db")).unwrap(), catalog);
    // What others left there is not the check's.
    let log = store.backings[0].join(".rearview/catalog.db-wal");
    fs::write(&log, "").unwrap();
    checked(&store).ok();
    assert!(log.exists());
    store.mount().ok();
    store.finish();
}

#[test]
fn a_backing_on_a_disk_that_is_read_only_can_be_looked_at() {
    let disk = common::disk::LoopFs::ext4(64);
    let backing = disk.root().join("b");
    let mut store = Mounted::over(vec![backing.clone()]);
    fs::write(store.path("file"), "kept").unwrap();
    store.snapshot("one");
    store.unmount();
    let found = private_names(&backing);
    disk.read_only();
    let said = checked(&store).ok();
    assert!(said.contains("no damage found"), "{said}");
    let own = backing.to_str().unwrap();
    assert!(rearview(["snapshot", "list", own]).ok().contains("one"));
    assert!(rearview(["status", own]).ok().contains("NOT MOUNTED"));
    assert_eq!(private_names(&backing), found);
    // After an unclean end somebody has to take in the log first.
    let writable = || {
        let mut remount = std::process::Command::new("mount");
        common::run(remount.args(["-o", "remount,rw"]).arg(disk.root())).ok();
    };
    writable();
    store.mount().ok();
    fs::write(store.path("late"), "before the end").unwrap();
    store.snapshot("late");
    store.kill();
    disk.read_only();
    rearview(["snapshot", "list", own]).fails(1, &["remount it read-write"]);
    writable();
    store.mount().ok();
    store.unmount();
}

//! `rearview check`: a sound store is told to be sound, and each kind of damage is named.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

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
fn a_mounted_store_is_not_checked() {
    let store = Mounted::new();
    checked(&store).fails(11, &["in use"]);
    store.finish();
}

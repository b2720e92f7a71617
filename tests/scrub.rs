//! `scrub`: random damage of every kind is found and healed, and never healed wrongly.
//!
//! The damage is done to the backings of an open volume, behind its back. `SCRUB_DAMAGES` sets how
//! many times.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use common::run::rearview;
use common::scrub::{Damage, Damager};
use common::{Mounted, shell, wait_until};
use rearviewfs::catalog::{Catalog, Change};
use rearviewfs::history::History;
use rearviewfs::progress::Progress;
use rearviewfs::store::{self, OpenOptions};
use rearviewfs::types::{ContentId, NodeId};
use rearviewfs::volume::scrub::{Outcome, ScrubOptions, ScrubRun};
use rearviewfs::volume::{Volume, VolumeOptions};

/// Damages in a run without `SCRUB_DAMAGES`.
const DAMAGES_DEFAULT: usize = 60;

/// A store without a mount.
struct Opened {
    volume: Arc<Volume>,
}

impl Opened {
    fn new(backings: &[PathBuf]) -> Opened {
        let recover = |replicas: &_, catalog: &_, from| History::recover(replicas, catalog, from);
        let progress = Progress::silent();
        let store = store::open(backings, &OpenOptions::default(), &recover, &progress);
        let hour = Duration::from_secs(3600);
        let options = VolumeOptions {
            housekeeping: Duration::from_millis(10),
            digest_after: Duration::ZERO,
            pack_after: hour,
            policy_every: hour,
            ..VolumeOptions::default()
        };
        let volume = Volume::open(store.expect("the store opens"), options).expect("it is served");
        let mut policy = volume.policy();
        policy.every = "0".parse().expect("a span");
        volume.set_policy(&policy).expect("it is noted");
        Opened { volume }
    }

    /// Waits until every file has a digest.
    fn digested(&self) {
        wait_until("all files have digests", 60, || {
            self.volume.catalog().flush(rearviewfs::catalog::Durability::Written).unwrap();
            self.volume.catalog().undigested(NodeId(0), 1).unwrap().is_empty()
        });
    }

    /// Looks at everything and tells what was found.
    #[track_caller]
    fn scrub(&self) -> ScrubRun {
        self.volume.scrub_start(ScrubOptions { all: true, ..Default::default() }, false).unwrap();
        assert!(self.volume.scrub_wait(Duration::from_secs(120)).unwrap(), "it does not end");
        let status = self.volume.scrub_status().unwrap();
        assert!(status.run.is_none(), "{status:?}");
        status.last.expect("a run ended")
    }

    /// The hash of every version of every file.
    fn versions(&self, backing: &Path) -> BTreeMap<(NodeId, ContentId), blake3::Hash> {
        let file = rusqlite::Connection::open(backing.join(".rearview/catalog.db")).unwrap();
        let mut shown = file
            .prepare("SELECT DISTINCT id, content, size FROM node_h WHERE content > 0")
            .unwrap();
        let rows = shown
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get::<_, i64>(2)?)))
            .unwrap();
        rows.map(|row| {
            let (node, content, size) = row.unwrap();
            let mut bytes = vec![0; size as usize];
            let got = self.volume.read_content(node, content, 0, &mut bytes).unwrap();
            assert_eq!(got, bytes.len());
            ((node, content), blake3::hash(&bytes))
        })
        .collect()
    }

    fn close(self) {
        self.volume.close().expect("it closes");
    }
}

/// Files of every kind with history of every kind: preserved, in undo segments and in packs, all
/// with digests.
fn store_with_history() -> Mounted {
    let mut store = Mounted::new();
    let mnt = store.mnt.clone();
    for dir in 0..4 {
        fs::create_dir(mnt.join(format!("d{dir}"))).unwrap();
        for file in 0..8u32 {
            let bytes: Vec<u8> = (0..(file * 5000 + 10)).map(|i| (i * 31 % 251) as u8).collect();
            fs::write(mnt.join(format!("d{dir}/f{file}")), bytes).unwrap();
        }
        fs::hard_link(mnt.join(format!("d{dir}/f3")), mnt.join(format!("d{dir}/link"))).unwrap();
        symlink("f1", mnt.join(format!("d{dir}/sym"))).unwrap();
    }
    fs::create_dir(mnt.join("d0/deep")).unwrap();
    fs::write(mnt.join("d0/deep/file"), vec![7; 70_000]).unwrap();
    shell(&mnt, "setfattr -n user.colour -v blue d0/f1 && setfattr -n user.x -v y d1 || true");
    digest(&mut store);
    let overwrite = |from: u32| {
        let script = format!(
            "for d in 0 1 2 3; do for f in 4 5 6; do printf '{from}%d' $f | \
             dd of=d$d/f$f bs=1 seek={}000 conv=notrunc status=none; done; \
             echo new{from} > d$d/f2; done",
            5 + from
        );
        shell(&mnt, &script);
    };
    store.snapshot("one");
    overwrite(1);
    store.snapshot("two");
    store.rearview(&["prune", "--keep-last", "9"]).ok();
    digest(&mut store);
    overwrite(2);
    store.snapshot("three");
    shell(&mnt, "rm d3/f7 d2/f7 d1/f7");
    digest(&mut store);
    store.unmount();
    store
}

/// Gives every file its digest.
fn digest(store: &mut Mounted) {
    store.unmount();
    let opened = Opened::new(&store.backings);
    opened.digested();
    opened.close();
    store.mount().ok();
}

/// What history holds on a backing, by path below `.rearview`.
fn kept(backing: &Path) -> BTreeMap<PathBuf, blake3::Hash> {
    let private = backing.join(".rearview");
    let found = shell(&private, "find preserved undo packs -type f");
    let hash = |path: &str| blake3::hash(&fs::read(private.join(path)).unwrap());
    found.lines().map(|path| (PathBuf::from(path), hash(path))).collect()
}

#[track_caller]
fn assert_equal(backings: &[PathBuf], what: &str) {
    let differences = store::compare::compare(&backings[0], &backings[1]).unwrap();
    assert!(differences.is_empty(), "{what}: {differences:?}");
    assert_eq!(kept(&backings[0]), kept(&backings[1]), "{what}");
    let hashes = |backing: &Path| Catalog::table_hashes(&backing.join(".rearview/catalog.db"));
    // One is committed after the other.
    let mut differing: Vec<String> = Vec::new();
    for _ in 0..100 {
        let both = [hashes(&backings[0]).unwrap(), hashes(&backings[1]).unwrap()];
        differing = both[0]
            .iter()
            .zip(&both[1])
            .filter(|(a, b)| a != b)
            .map(|(a, _)| a.0.clone())
            .collect();
        if differing.is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{what}: the catalogs differ in {differing:?}");
}

#[test]
fn random_damage_on_one_replica_is_found_and_healed() {
    let count = std::env::var("SCRUB_DAMAGES").ok().and_then(|text| text.parse().ok());
    let count: usize = count.unwrap_or(DAMAGES_DEFAULT);
    let store = store_with_history();
    let opened = Opened::new(&store.backings);
    let clean = opened.scrub();
    assert_eq!(clean.found, 0, "{:#?}", clean.findings);
    assert!(clean.objects >= 40 && clean.history_files >= 8, "{clean:?}");
    let versions = opened.versions(&store.backings[0]);
    let mut damager = Damager::new(20_261_125);
    let mut by_kind: BTreeMap<Damage, usize> = BTreeMap::new();
    let mut overwritten = 0;
    let mut number = 0;
    while number - overwritten < count {
        number += 1;
        opened.digested();
        let sound = common::tree::read_tree(&store.backings[0]);
        let on = &store.backings[number % 2];
        let (damage, what) = damager.damage(on);
        let what = format!("damage {number}: {what}");
        let run = opened.scrub();
        if run.found == 0 && damage == Damage::Catalog {
            // A commit wrote the page anew, from memory, before anybody read it.
            let audit = Catalog::audit(&on.join(".rearview/catalog.db")).unwrap();
            assert_eq!(audit.flaws, Vec::<String>::new(), "{what}: not found");
            assert_equal(&store.backings, &what);
            overwritten += 1;
            continue;
        }
        *by_kind.entry(damage).or_default() += 1;
        assert!(run.found > 0, "{what}: not found");
        assert_eq!(run.unhealed, 0, "{what}: {:#?}", run.findings);
        opened.volume.settle().unwrap();
        opened.volume.catalog().flush(rearviewfs::catalog::Durability::Written).unwrap();
        assert_equal(&store.backings, &what);
        if damage != Damage::Edit {
            let healed = common::tree::read_tree(&store.backings[0]);
            common::tree::assert_trees(&what, &sound, &healed);
        }
        let again = opened.scrub();
        assert_eq!(again.found, 0, "{what}: {:#?}", again.findings);
    }
    let after = opened.versions(&store.backings[0]);
    for (version, hash) in &versions {
        assert_eq!(after.get(version), Some(hash), "{version:?}");
    }
    opened.close();
    store.assert_sound();
    println!("{count} found and healed: {by_kind:?}");
}

#[test]
fn the_same_damage_on_all_replicas_is_told_and_left_alone() {
    let store = store_with_history();
    let opened = Opened::new(&store.backings);
    let mut damager = Damager::new(77);
    let kinds = [
        Damage::Flip,
        Damage::ZeroBlock,
        Damage::Truncate,
        Damage::Extend,
        Damage::Mode,
        Damage::Owner,
        Damage::Time,
        Damage::Xattr,
        Damage::Pack,
        Damage::Preserved,
        Damage::Undo,
    ];
    for kind in kinds {
        let (target, what) = damager.damage_as(&store.backings[0], kind);
        // The same bytes and attributes on the other one.
        let below = target.strip_prefix(&store.backings[0]).unwrap();
        let other = store.backings[1].join(below);
        if target.exists() {
            shell(
                &store.backings[0],
                &format!(
                    "cp --preserve=mode,ownership,timestamps,xattr '{}' '{}'",
                    target.display(),
                    other.display()
                ),
            );
        } else {
            fs::remove_file(&other).unwrap();
        }
        let before: Vec<_> = [&target, &other].map(|path| seen(path)).into();
        let run = opened.scrub();
        assert!(run.unhealed > 0, "{what}: {:#?}", run.findings);
        let own = |place: &str| place.ends_with(&below.display().to_string());
        let wrong = run.findings.iter().find(|f| own(&f.place) && f.outcome == Outcome::Healed);
        assert_eq!(wrong, None, "{what}");
        let after: Vec<_> = [&target, &other].map(|path| seen(path)).into();
        assert_eq!(before, after, "{what}");
        let damage = opened.volume.status().unwrap().scrub.damage;
        assert!(damage.iter().any(|finding| own(&finding.place)), "{what}: {damage:#?}");
    }
    // What is rotten everywhere is known until all was seen sound, also while nothing is mounted.
    let known = opened.volume.status().unwrap().scrub.damage.len();
    let part = ScrubOptions { percent: Some(1), ..Default::default() };
    opened.volume.scrub_start(part, false).unwrap();
    assert!(opened.volume.scrub_wait(Duration::from_secs(120)).unwrap());
    assert!(opened.volume.status().unwrap().scrub.damage.len() >= known);
    opened.close();
    let mut store = store;
    for mounted in [false, true] {
        if mounted {
            store.mount().ok();
        }
        let path = store.backings[0].display().to_string();
        let status = store.rearview(&["status", &path]);
        assert_eq!(status.code, 21, "{}", status.stdout);
        for words in ["could not heal", "NOT HEALED", "scrub start --all", "scan: scrub begun"] {
            assert!(status.stdout.contains(words), "{words}: {}", status.stdout);
        }
    }
    store.unmount();
}

#[test]
fn damage_that_is_gone_is_told_no_more() {
    let mut store = Mounted::new();
    fs::write(store.path("file"), vec![1; 10_000]).unwrap();
    fs::write(store.path("other"), vec![2; 10_000]).unwrap();
    digest(&mut store);
    store.unmount();
    let put = |backing: &Path, byte: u8| {
        let path = backing.join("file");
        let mtime = fs::metadata(&path).unwrap().modified().unwrap();
        fs::write(&path, vec![byte; 10_000]).unwrap();
        fs::File::open(&path).unwrap().set_modified(mtime).unwrap();
    };
    store.backings.iter().for_each(|backing| put(backing, 3));
    store.mount().ok();
    let scrub = ["scrub", "start", "--all", "--wait"];
    let done = store.rearview(&scrub);
    assert!(done.code == 21 && done.stdout.contains("2 NOT healed"), "{}", done.told());
    let done = store.rearview(&["status"]);
    assert!(done.code == 21 && done.stdout.contains("/file: damaged bytes"), "{}", done.told());
    // From a backup of that disk.
    put(&store.backings[0], 1);
    assert!(store.rearview(&scrub).ok().contains("1 found, all healed"));
    assert!(!store.rearview(&["status"]).ok().contains("NOT HEALED"));
    store.finish();
}

/// What a program sees of a file.
fn seen(path: &Path) -> Option<(u32, u32, Duration, Vec<u8>)> {
    let meta = fs::symlink_metadata(path).ok()?;
    let mtime = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some((meta.permissions().mode(), meta.uid(), mtime, fs::read(path).ok()?))
}

#[test]
fn of_two_files_that_differ_without_a_digest_neither_is_touched() {
    let mut store = Mounted::with_options("allow_other,exclude=*.tmp,snapshot_every=0");
    fs::write(store.path("x.tmp"), "what is excluded has no digest").unwrap();
    store.unmount();
    let opened = Opened::new(&store.backings);
    let mut damager = Damager::new(3);
    let (target, what) = damager.flip_in(&store.backings[1].join("x.tmp"));
    let before = seen(&target);
    let run = opened.scrub();
    assert_eq!((run.found, run.unhealed), (2, 2), "{what}: {:#?}", run.findings);
    assert_eq!(seen(&target), before);
    opened.close();
}

#[test]
fn a_run_goes_on_after_a_remount_and_can_be_paused() {
    let mut store = Mounted::new();
    for file in 0..50 {
        fs::write(store.path(&format!("f{file}")), vec![file; 10_000]).unwrap();
    }
    let start = ["scrub", "start", "--all", "--rate", "20000", "--json"];
    assert!(store.rearview(&start).ok().contains("\"run\""));
    store.rearview(&["scrub", "start"]).fails(1 + 10, &["under way"]);
    store.rearview(&["scrub", "pause"]).ok();
    store.remount();
    let said = store.rearview(&["scrub", "status"]).ok();
    assert!(said.contains("paused"), "{said}");
    let said = store.rearview(&["scrub", "start", "--all", "--wait"]).ok();
    assert!(said.contains("no damage found"), "{said}");
    store.rearview(&["scrub", "stop"]).fails(1, &["no scrub"]);
    store.finish();
}

#[test]
fn history_is_looked_at_in_parts_and_a_run_goes_on_where_it_was() {
    let store = store_with_history();
    let opened = Opened::new(&store.backings);
    let all = opened.scrub();
    assert!(all.found == 0 && all.history_files >= 8, "{all:?}");
    let mut damager = Damager::new(5);
    for kind in [Damage::Preserved, Damage::Pack] {
        damager.damage_as(&store.backings[0], kind);
    }
    let part = |options: ScrubOptions| {
        opened.volume.scrub_start(options, false).unwrap();
        assert!(opened.volume.scrub_wait(Duration::from_secs(120)).unwrap(), "it does not end");
        opened.volume.scrub_status().unwrap().last.expect("a run ended")
    };
    let mut healed = 0;
    for _ in 0..30 {
        let run = part(ScrubOptions { percent: Some(8), ..Default::default() });
        assert!(run.history_files < all.history_files, "{run:?}");
        assert_eq!(run.unhealed, 0, "{run:?}");
        healed += run.found;
    }
    assert_eq!(healed, 2);
    // Ended by the end of the mount in the middle of the preserved files.
    let slow = ScrubOptions { all: true, rate: Some(200_000), ..Default::default() };
    opened.volume.scrub_start(slow, false).unwrap();
    let mut before = 0;
    wait_until("it looks at history", 60, || {
        let run = opened.volume.scrub_status().unwrap().run.expect("it is under way");
        before = run.history_files;
        before >= 3 && before < all.history_files
    });
    opened.close();
    let opened = Opened::new(&store.backings);
    let run = opened.volume.scrub_status().unwrap().run.expect("it goes on");
    assert!(run.history_files >= before, "{run:?}");
    assert!(opened.volume.scrub_wait(Duration::from_secs(120)).unwrap(), "it does not end");
    let run = opened.volume.scrub_status().unwrap().last.expect("it ended");
    assert_eq!((run.history_files, run.objects), (all.history_files, all.objects), "{run:?}");
    opened.close();
}

#[test]
fn what_was_healed_is_read_through_the_mount_though_the_kernel_knew_the_rotten_bytes() {
    let mut store = Mounted::new();
    let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    fs::write(store.path("file"), &bytes).unwrap();
    digest(&mut store);
    store.unmount();
    for backing in store.backings.clone() {
        let path = backing.join("file");
        let mtime = fs::metadata(&path).unwrap().modified().unwrap();
        let mut rotten = bytes.clone();
        rotten[50_000] ^= 4;
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &rotten, 0).unwrap();
        file.set_modified(mtime).unwrap();
        drop(file);
        store.mount().ok();
        let open = fs::File::open(store.path("file")).unwrap();
        let read = || {
            let mut seen = vec![0; bytes.len()];
            std::os::unix::fs::FileExt::read_exact_at(&open, &mut seen, 0).unwrap();
            seen
        };
        let before = read();
        let said = store.rearview(&["scrub", "start", "--all", "--wait"]).ok();
        assert!(said.contains("1 found, all healed"), "{said}");
        assert!(read() == bytes, "{}: read before: {}", path.display(), before == bytes);
        drop(open);
        store.unmount();
    }
}

#[test]
fn a_run_that_is_begun_while_the_last_one_ends_looks_at_everything() {
    let store = store_with_history();
    let opened = Opened::new(&store.backings);
    let all = opened.scrub();
    for round in 0..40u64 {
        let options = ScrubOptions { all: true, ..Default::default() };
        opened.volume.scrub_start(options.clone(), false).unwrap();
        // Stopped somewhere else each time.
        wait_until("it is somewhere", 60, || {
            let run = opened.volume.scrub_status().unwrap().run;
            run.is_none_or(|run| run.history_files + run.objects >= round)
        });
        let _ = opened.volume.scrub_stop();
        opened.volume.scrub_start(options, false).unwrap();
        assert!(opened.volume.scrub_wait(Duration::from_secs(120)).unwrap(), "it does not end");
        let run = opened.volume.scrub_status().unwrap().last.expect("it ended");
        let seen = (run.history_files, run.objects, run.found, run.stopped);
        assert_eq!(seen, (all.history_files, all.objects, 0, false), "{round}: {run:?}");
    }
    opened.close();
}

#[test]
fn a_catalog_that_stands_alone_against_two_is_replaced_while_changes_go_on() {
    let mut store = Mounted::new();
    fs::write(store.path("file"), "bytes").unwrap();
    let third = store.beside("third");
    fs::create_dir(&third).unwrap();
    store.rearview(&["replica", "add", &third.display().to_string(), "--wait"]).ok();
    store.unmount();
    let mut backings = store.backings.clone();
    backings.push(third);
    let odd = backings[1].join(".rearview/catalog.db");
    let altered = rusqlite::Connection::open(&odd).unwrap();
    altered.execute("UPDATE node SET uid = uid + 1 WHERE kind = 8", []).unwrap();
    drop(altered);
    let opened = Opened::new(&backings);
    let catalog = opened.volume.catalog();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let run = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let value = format!("{:?}", std::time::Instant::now());
                catalog.push(vec![Change::MetaPut { key: "busy", value }]).unwrap();
                catalog.flush(rearviewfs::catalog::Durability::Written).unwrap();
            }
        });
        let run = opened.scrub();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        run
    });
    assert_eq!((run.found, run.unhealed, run.busy), (1, 0, 0), "{:#?}", run.findings);
    assert!(run.findings[0].place.ends_with("backing1/.rearview/catalog.db"), "{run:#?}");
    assert_eq!(opened.scrub().found, 0);
    opened.close();
}

#[test]
fn a_scrub_beside_busy_programs_finds_nothing_and_disturbs_nobody() {
    let store = Mounted::new();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for worker in 0..3u32 {
            let (root, stop) = (store.path(&format!("w{worker}")), &stop);
            scope.spawn(move || busy(&root, worker, stop));
        }
        for _ in 0..3 {
            let done = store.rearview(&["scrub", "start", "--all", "--wait"]);
            stop.store(done.code != 0, std::sync::atomic::Ordering::Relaxed);
            let said = done.ok();
            assert!(said.contains("no damage found"), "{said}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    store.finish();
}

/// Makes, overwrites, truncates, renames, links, re-moded and removes files and directories.
fn busy(root: &Path, seed: u32, stop: &std::sync::atomic::AtomicBool) {
    use std::os::unix::fs::FileExt;
    fs::create_dir(root).unwrap();
    let mut round = seed;
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        round = round.wrapping_mul(1_103_515_245).wrapping_add(12345);
        let number = (round >> 16) % 12;
        let (dir, file) = (root.join(format!("d{}", number % 3)), format!("f{number}"));
        let _ = fs::create_dir(&dir);
        let path = dir.join(file);
        match (round >> 8) % 8 {
            0 | 1 => fs::write(&path, vec![round as u8; (round % 20_000) as usize]).unwrap(),
            2 => {
                if let Ok(open) = fs::OpenOptions::new().write(true).open(&path) {
                    open.write_all_at(b"overwritten in place", u64::from(number) * 100).unwrap();
                    if round.is_multiple_of(2) {
                        open.set_len(500).unwrap();
                    }
                }
            }
            3 => drop(fs::rename(&path, dir.join("renamed"))),
            4 => drop(fs::hard_link(&path, dir.join(format!("l{number}")))),
            5 => drop(fs::set_permissions(&path, fs::Permissions::from_mode(0o600 + number))),
            6 => drop(fs::remove_file(&path)),
            _ => drop(fs::remove_dir_all(&dir)),
        }
    }
}

/// What a power cut leaves of such a file is on one disk what was written to it, and on another
/// not.
#[test]
fn what_was_written_to_a_deleted_file_is_no_damage() {
    let mut store = Mounted::new();
    fs::write(store.path("gone"), [b'a'; 40_000]).unwrap();
    store.snapshot("one");
    let file = fs::OpenOptions::new().write(true).open(store.path("gone")).unwrap();
    fs::remove_file(store.path("gone")).unwrap();
    file.write_all_at(&[b'b'; 100], 20_000).unwrap();
    file.write_all_at(&[b'c'; 100], 50_000).unwrap();
    file.sync_all().unwrap();
    drop(file);
    store.unmount();
    let backings = store.backings.clone();
    let spoil = |at: u64| {
        let found = shell(&backings[1], "find $PWD/.rearview/preserved -type f");
        let kept = fs::OpenOptions::new().write(true).open(found.trim()).unwrap();
        kept.write_all_at(b"spoilt", at).unwrap();
    };
    let check = || {
        let mut words = vec!["check".into(), "--read-data".into()];
        words.extend(backings.iter().map(|path| path.clone().into_os_string()));
        rearview(words)
    };
    // What the content has there is in a before-image; the other lies behind it.
    spoil(20_010);
    spoil(50_010);
    let said = check().ok();
    assert!(said.contains("no damage found"), "{said}");
    store.mount().ok();
    let said = store.rearview(&["scrub", "start", "--all", "--wait"]).ok();
    assert!(said.contains("no damage"), "{said}");
    assert!(fs::read(store.past("one").join("gone")).unwrap() == [b'a'; 40_000]);
    store.unmount();
    // What no before-image has is the content's.
    spoil(30_000);
    let said = check().fails(21, &[]).stdout;
    assert!(said.contains("its bytes are not those of another replica"), "{said}");
    store.mount().ok();
    let said = store.rearview(&["scrub", "start", "--all", "--wait"]).fails(21, &[]).stdout;
    assert!(said.contains("no copy is proven good"), "{said}");
    store.unmount();
}

//! Replicas that leave, come back, are replaced, added and removed while the mount is in use.

mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::disk::LoopFs;
use common::mounted::word;
use common::{Mounted, run, wait_until};

/// A tree with a bit of everything, made by a shell in the current directory.
const BEFORE: &str = r#"
mkdir -p keep/deep/er old/a/b old/c swap/one swap/two links gone
for i in $(seq 40); do echo "file $i" > keep/deep/f$i; echo "old $i" > old/a/b/f$i; done
for i in $(seq 10); do echo "one $i" > swap/one/f$i; echo "two $i" > swap/two/f$i; done
head -c 3000000 /dev/urandom > keep/large
head -c 2000000 /dev/urandom > old/c/large
echo linked > links/a; ln links/a links/b; echo apart > links/c
echo gone > gone/x; ln -s target keep/symlink; mkfifo keep/fifo
touch keep/attributes; echo '*.tmp' > .rearviewignore; echo scratch > keep/x.tmp
"#;

/// Hours of work while a replica is away.
const WORK: &str = r#"
echo changed > keep/deep/f1; echo more >> keep/deep/f2; rm keep/deep/f3
mkdir new new/below; for i in $(seq 30); do echo "new $i" > new/below/n$i; done
mv old/a new/moved; echo inside > new/moved/b/f1
mv swap/one swap/tmp; mv swap/two swap/one; mv swap/tmp swap/two
mv keep/deep/er new/below/er; mv keep/deep/f4 new/f4; mv new/below/n1 new/below/N1
rm -r gone; rm old/c/large; rmdir old/c
ln links/a new/hard; rm links/b; ln links/c links/d; cp -p links/a links/e
dd if=/dev/urandom of=keep/large bs=4096 seek=17 count=3 conv=notrunc status=none
truncate -s 5000000 new/sparse
dd if=/dev/urandom of=new/sparse bs=4096 seek=900 count=1 conv=notrunc status=none
chmod 600 keep/attributes; chown 1234:5678 keep/attributes; setfattr -n user.x -v y keep/attributes
touch -d '2001-02-03 04:05:06' keep/deep/f5; ln -sfn elsewhere keep/symlink
echo scratch2 > keep/x.tmp; echo other > new/y.tmp
"#;

#[track_caller]
fn sh(store: &Mounted, script: &str) {
    let script = format!("set -e; {script}");
    run(Command::new("bash").arg("-c").arg(script).current_dir(&store.mnt)).ok();
}

/// The word for a replica by its backing.
fn backing(store: &Mounted, index: usize) -> String {
    word(&store.backings[index])
}

#[track_caller]
fn online(store: &Mounted, index: usize) -> String {
    let done = store.rearview(&["replica", "online", "--wait", &backing(store, index)]);
    if done.code != 0 {
        let log = fs::read_to_string(store.backings[0].join(".rearview/log")).unwrap_or_default();
        eprintln!("the log ends with\n{}", &log[log.len().saturating_sub(3000)..]);
    }
    done.ok()
}

#[track_caller]
fn offline(store: &Mounted, index: usize) {
    store.rearview(&["replica", "offline", &backing(store, index)]).ok();
}

/// The history files of a backing: names and sizes.
fn history_files(backing: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for dir in ["preserved", "undo", "packs"] {
        let root = backing.join(".rearview").join(dir);
        let mut waiting = vec![root];
        while let Some(dir) = waiting.pop() {
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let meta = entry.metadata().unwrap();
                match meta.is_dir() {
                    true => waiting.push(entry.path()),
                    false => {
                        let path = entry.path();
                        let path = path.strip_prefix(backing).unwrap().display().to_string();
                        all.push(format!("{path} {}", meta.len()));
                    }
                }
            }
        }
    }
    all.sort();
    all
}

/// Unmounts; then all backings have the same tree, the same history and the same catalog.
#[track_caller]
fn finish_equal(mut store: Mounted) {
    store.unmount();
    store.assert_replicas_identical();
    let catalog = |path: &Path| {
        rearviewfs::catalog::Catalog::inspect(&path.join(".rearview/catalog.db")).unwrap()
    };
    let (first, files) = (&store.backings[0], history_files(&store.backings[0]));
    for other in &store.backings[1..] {
        assert_eq!(catalog(first), catalog(other));
        assert_eq!(files, history_files(other));
        assert_eq!(rearviewfs::store::compare::compare(first, other).unwrap(), []);
    }
    // The next mount finds nothing to do, and each alone shows all.
    store.mount().ok();
    let list = store.rearview(&["status"]).ok();
    assert!(list.contains("state: ONLINE"), "{list}");
    store.unmount();
}

#[test]
fn a_replica_that_was_away_gets_what_it_missed() {
    let store = Mounted::with_replicas(3);
    sh(&store, BEFORE);
    store.snapshot("before");
    offline(&store, 1);
    assert_eq!(store.rearview(&["status"]).code, 20);
    sh(&store, WORK);
    store.snapshot("after");
    let said = online(&store, 1);
    assert!(!said.contains("OFFLINE"), "{said}");
    // It is written again, and what was open stays right.
    sh(&store, "echo later > new/later; echo more >> keep/large");
    assert_eq!(fs::read_to_string(store.backings[1].join("new/later")).unwrap(), "later\n");
    assert!(!store.backings[1].join(".rearview/quarantine").read_dir().unwrap().any(|_| true));
    finish_equal(store);
}

/// Starts writers that do not stop until the answer is dropped; each checks what it reads.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Duration>>,
}

impl Load {
    fn on(store: &Mounted) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..3)
            .map(|number| {
                let (stop, root) = (stop.clone(), store.path(&format!("load{number}")));
                std::thread::spawn(move || work(&root, number, &stop))
            })
            .collect();
        Load { stop, threads }
    }

    /// Ends the load; tells the longest that one operation took.
    #[track_caller]
    fn end(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let longest = |thread: JoinHandle<Duration>| thread.join().expect("the load went well");
        self.threads.into_iter().map(longest).max().unwrap_or_default()
    }
}

/// Makes, overwrites, renames and removes files with known contents, in an order by `seed`.
fn work(root: &Path, seed: u64, stop: &AtomicBool) -> Duration {
    fs::create_dir_all(root.join("a/b")).unwrap();
    let mut random = seed + 1;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) % below
    };
    let mut known: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut open = fs::File::create(root.join("open")).unwrap();
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let dir = ["", "a/", "a/b/"][next(3) as usize];
        let name = format!("{dir}f{}", next(20));
        let path = root.join(&name);
        let begun = Instant::now();
        match next(8) {
            0..=2 => {
                let bytes = vec![next(256) as u8; next(60_000) as usize];
                fs::write(&path, &bytes).unwrap();
                known.insert(name, bytes);
            }
            3 => {
                let to = format!("f{}", next(20));
                if known.contains_key(&name) && to != name {
                    fs::rename(&path, root.join(&to)).unwrap();
                    let bytes = known.remove(&name).unwrap();
                    known.insert(to, bytes);
                }
            }
            4 => {
                if known.remove(&name).is_some() {
                    fs::remove_file(&path).unwrap();
                }
            }
            5 => {
                if let Some(bytes) = known.get_mut(&name).filter(|bytes| bytes.len() > 100) {
                    let at = next(bytes.len() as u64 - 50);
                    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
                    file.write_all_at(&[7; 50], at).unwrap();
                    bytes[at as usize..at as usize + 50].fill(7);
                }
            }
            6 => {
                open.write_all(b"appended to a file that stays open\n").unwrap();
                if next(4) == 0 {
                    open.sync_all().unwrap();
                }
            }
            _ => {
                let (from, to) = (root.join("a/b"), root.join("moved"));
                fs::rename(&from, &to).unwrap();
                fs::rename(&to, &from).unwrap();
            }
        }
        longest = longest.max(begun.elapsed());
    }
    for (name, bytes) in known {
        assert!(fs::read(root.join(&name)).unwrap() == bytes, "{name} is not as it was written");
    }
    longest
}

/// Its own catalog and the store's said the same of it, so that the old bytes of the one that
/// returned were taken for somebody's edit, and written over the new ones.
#[test]
fn what_is_being_written_when_a_replica_returns_is_no_edit_of_others() {
    let store = Mounted::with_replicas(2);
    for (name, index) in [("f", 0), ("g", 1)] {
        fs::write(store.path(name), "old old old").unwrap();
        offline(&store, index);
        // In a process of its own: a descriptor that is closed in a child of ours makes a version.
        let script = "import sys; f = open(sys.argv[1], 'r+b', 0); f.seek(4); f.write(b'new'); \
                      print('written', flush=True); input(); f.write(b' end')";
        let mut writer = Command::new("python3")
            .args(["-c", script])
            .arg(store.path(name))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut told = [0; 8];
        writer.stdout.as_mut().unwrap().read_exact(&mut told).unwrap();
        online(&store, index);
        let read = |path: PathBuf| fs::read_to_string(path).unwrap();
        assert_eq!(read(store.path(name)), "old new old");
        for backing in &store.backings {
            assert_eq!(read(backing.join(name)), "old new old");
        }
        writer.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert!(writer.wait().unwrap().success());
        assert_eq!(read(store.path(name)), "old new end");
    }
    finish_equal(store);
}

#[test]
fn a_replica_returns_under_load() {
    let store = Mounted::with_replicas(2);
    sh(&store, BEFORE);
    let load = Load::on(&store);
    for _ in 0..3 {
        offline(&store, 0);
        sh(&store, "date +%N > stamp; mkdir -p more; cp -r keep more/k$RANDOM");
        online(&store, 0);
    }
    let longest = load.end();
    let log = fs::read_to_string(store.backings[0].join(".rearview/log")).unwrap();
    let waited: Vec<&str> = log.lines().filter(|line| line.contains("operations waited")).collect();
    eprintln!("the longest operation under load took {longest:?}; {waited:#?}");
    finish_equal(store);
}

#[test]
fn a_killed_resync_goes_on_where_it_was() {
    let mut store = Mounted::with_replicas(1);
    sh(&store, "mkdir many; for i in $(seq 3000); do echo $i > many/f$i; done");
    let new = store.beside("new");
    store.rearview(&["replica", "add", &word(&new)]).ok();
    let many = new.join("many");
    let copied = || fs::read_dir(&many).map(Iterator::count).unwrap_or(0);
    wait_until("a part is copied", 60, || copied() >= 300);
    store.kill();
    let inodes = |dir: &Path| -> BTreeMap<OsString, u64> {
        let entries = fs::read_dir(dir).unwrap().flatten();
        entries.map(|entry| (entry.file_name(), entry.metadata().unwrap().ino())).collect()
    };
    let before = inodes(&many);
    assert!(before.len() < 3000, "it was over before it was killed");
    store.backings.push(new);
    store.mount().ok();
    store.rearview(&["resync", "--wait"]).ok();
    let after = inodes(&many);
    let again = before.iter().filter(|(name, ino)| after.get(*name) != Some(ino)).count();
    assert_eq!(again, 0, "of {} files were copied again", before.len());
    finish_equal(store);
}

/// How many objects the last resync compared, and how many bytes it copied, as the log tells.
fn looked_at(store: &Mounted) -> (u64, u64) {
    let log = fs::read_to_string(store.backings[0].join(".rearview/log")).unwrap();
    let line = log.lines().rfind(|line| line.contains("bytes copied")).expect("a resync ended");
    let words: Vec<&str> = line.split(' ').collect();
    let before = |what| {
        let at = words.iter().position(|word| *word == what).unwrap();
        words[at - 1].parse().unwrap()
    };
    (before("objects"), before("bytes"))
}

#[test]
fn only_what_changed_is_copied() {
    let store = Mounted::with_replicas(2);
    sh(&store, "mkdir big d; for i in 1 2 3 4; do head -c 8000000 /dev/urandom > big/$i; done");
    offline(&store, 1);
    sh(&store, "mv big renamed; head -c 100000 /dev/urandom > d/new; chmod 700 renamed/1");
    online(&store, 1);
    let (compared, copied) = looked_at(&store);
    assert!((100_000..1_000_000).contains(&copied), "{copied} bytes were copied");
    assert!((1..40).contains(&compared), "{compared} objects were compared");
    finish_equal(store);
}

#[test]
fn a_replica_is_replaced_added_and_removed_in_use() {
    let mut store = Mounted::with_replicas(2);
    sh(&store, BEFORE);
    let (new, third) = (store.beside("new"), store.beside("third"));
    let old = backing(&store, 1);
    store.rearview(&["replica", "replace", "--wait", &old, &word(&new)]).ok();
    sh(&store, WORK);
    store.rearview(&["replica", "add", "--wait", &word(&third)]).ok();
    // The last current one cannot go, and who was given up cannot simply come back.
    store.rearview(&["replica", "remove", "backing0"]).ok();
    store.rearview(&["replica", "remove", "third"]).ok();
    store.rearview(&["replica", "remove", "new"]).fails(1, &["last current replica"]);
    store.rearview(&["replica", "online", &old]).fails(1, &["was given up"]);
    store.rearview(&["replica", "add", "--wait", &word(&store.beside("fourth"))]).ok();
    let list = store.rearview(&["replica", "list"]).ok();
    assert!(list.contains("new") && list.contains("fourth") && !list.contains("third"), "{list}");
    store.backings = vec![new, store.beside("fourth")];
    finish_equal(store);
}

#[test]
fn what_is_not_the_replica_is_refused_by_name() {
    let store = Mounted::with_replicas(2);
    sh(&store, BEFORE);
    let (own, aside) = (store.backings[1].clone(), store.beside("aside"));
    let other = Mounted::with_replicas(1);
    offline(&store, 1);
    sh(&store, "echo missed > missed");
    fs::rename(&own, &aside).unwrap();
    let try_it = || store.rearview(&["replica", "online", &word(&own)]);
    fs::create_dir(&own).unwrap();
    try_it().fails(1, &["no store marker", "is its disk mounted"]);
    fs::remove_dir(&own).unwrap();
    let copy = |from: &Path| {
        run(Command::new("cp").arg("-a").arg(from).arg(&own)).ok();
    };
    copy(&other.backings[0]);
    try_it().fails(1, &["belongs to another store"]);
    fs::remove_dir_all(&own).unwrap();
    copy(&store.backings[0]);
    try_it().fails(1, &["plain copy", "same identity"]);
    fs::remove_dir_all(&own).unwrap();
    let add = |path: &Path| store.rearview(&["replica", "add", &word(path)]);
    add(&store.path("keep")).fails(1, &["would wait for itself"]);
    add(&store.backings[0]).fails(1, &[]);
    add(&store.backings[0].join("keep")).fails(1, &["lies inside"]);
    let files = store.beside("files");
    fs::create_dir(&files).unwrap();
    fs::write(files.join("x"), "x").unwrap();
    add(&files).fails(1, &["has files"]);
    // The right one is taken, wherever it is.
    fs::rename(&aside, &own).unwrap();
    try_it().ok();
    store.rearview(&["resync", "--wait"]).ok();
    other.finish();
    finish_equal(store);
}

#[test]
fn a_lagging_and_a_new_replica_do_not_keep_the_mount_waiting() {
    let mut store = Mounted::with_replicas(2);
    sh(&store, "mkdir many; for i in $(seq 2000); do echo $i > many/f$i; done");
    store.unmount();
    let all = store.backings.clone();
    store.mount_only(&all[..1]).ok();
    sh(&store, "for i in $(seq 500); do echo new > many/n$i; done; rm many/f7");
    store.unmount();
    store.backings.push(store.beside("third"));
    store.mount().ok();
    store.rearview(&["resync", "--wait"]).ok();
    finish_equal(store);
}

#[test]
fn a_replica_that_is_lost_again_during_its_resync_comes_back() {
    let store = Mounted::with_replicas(2);
    sh(&store, "mkdir many; for i in $(seq 1500); do echo $i > many/f$i; done");
    offline(&store, 1);
    sh(&store, "for i in $(seq 1500); do echo again $i > many/f$i; done; mv many moved");
    store.rearview(&["replica", "online", &backing(&store, 1)]).ok();
    offline(&store, 1);
    sh(&store, "mv moved elsewhere; echo new > elsewhere/f9; rm elsewhere/f8");
    online(&store, 1);
    finish_equal(store);
}

/// Files that a person edits on the disk itself, by a shell in the backing.
#[track_caller]
fn edit(backing: &Path, script: &str) {
    let script = format!("set -e; {script}");
    run(Command::new("bash").arg("-c").arg(script).current_dir(backing)).ok();
}

/// The contents of all versions of a path, in order.
fn versions(store: &Mounted, dir: &str, name: &str) -> Vec<String> {
    let dir = store.path(dir).join(".snapshots/.versions").join(name);
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().flatten().map(|one| one.path()).collect();
    names.sort();
    names.iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

#[test]
fn what_others_changed_on_a_disk_that_was_away_is_never_lost() {
    let mut store = Mounted::with_replicas(2);
    sh(
        &store,
        "mkdir d gone moved; echo 1 > d/edited; echo 1 > d/both; echo 1 > d/older; echo 1 > d/rm
         echo 1 > d/rmboth; echo 1 > gone/x; echo 1 > moved/inside; echo 1 > mode; echo 1 > kind",
    );
    store.unmount();
    let all = store.backings.clone();
    store.mount_only(&all[..1]).ok();
    sh(
        &store,
        "sleep 0.05; echo here > d/both; touch -d '2001-01-01' d/both; echo here > d/older
         touch -d '2099-01-01' d/older; echo here > d/rmboth; echo here > samename
         touch -d '2099-01-01' samename; mv moved moved2",
    );
    edit(
        &all[1],
        "echo there > d/edited; echo there > d/both; echo there > d/older; rm d/rm d/rmboth
         rm -r gone; echo there > moved/inside; echo new > d/new; mkdir -p made/below
         echo new > made/below/f; chmod 600 mode; echo there > samename; rm kind; mkdir kind
         ln -s to made/link",
    );
    let said = store.rearview(&["replica", "online", "--wait", &word(&all[1])]).ok();
    let read = |path: &str| fs::read_to_string(store.path(path)).unwrap();
    assert_eq!(read("d/edited"), "there\n");
    assert_eq!(versions(&store, "d", "edited"), ["1\n", "there\n"]);
    // The newer is live, the other a version.
    assert_eq!(read("d/both"), "there\n");
    assert!(versions(&store, "d", "both").contains(&"here\n".to_owned()));
    assert_eq!(read("d/older"), "here\n");
    assert!(versions(&store, "d", "older").contains(&"there\n".to_owned()), "{said}");
    assert_eq!(read("samename"), "here\n");
    assert!(versions(&store, "", "samename").contains(&"there\n".to_owned()));
    assert_eq!(read("moved2/inside"), "there\n");
    assert_eq!((read("d/new"), read("made/below/f")), ("new\n".into(), "new\n".into()));
    assert_eq!(fs::metadata(store.path("mode")).unwrap().mode() & 0o777, 0o600);
    assert!(store.path("kind").is_dir());
    assert_eq!(read("d/rmboth"), "here\n");
    assert!(!store.path("d/rm").exists() && !store.path("gone").exists());
    assert_eq!(fs::read_to_string(store.path("d/.snapshots/.deleted/rm")).unwrap(), "1\n");
    let status = store.rearview(&["status"]).ok();
    for told in ["d/edited: changed there", "d/older: changed there and here", "d/rm: removed"] {
        assert!(status.contains(told), "no '{told}' in {status}");
    }
    finish_equal(store);
}

#[test]
fn two_that_were_used_apart_are_joined_only_on_request() {
    let mut store = Mounted::with_replicas(2);
    sh(&store, "mkdir d; echo 1 > d/a; echo 1 > d/b; echo 1 > c");
    store.unmount();
    let all = store.backings.clone();
    store.mount_only(&all[1..]).ok();
    sh(&store, "echo there > d/a; echo there > d/new; rm c; mkdir sub; echo there > sub/x");
    store.snapshot("apart");
    store.unmount();
    store.mount_only(&all[..1]).ok();
    sh(&store, "echo here > d/b");
    let online = |words: &[&str]| {
        let mut all_words = vec!["replica", "online", "--wait"];
        all_words.extend(words);
        let path = word(&all[1]);
        all_words.push(&path);
        store.rearview(&all_words)
    };
    online(&[]).fails(1, &["used separately", "--take"]);
    online(&["--take"]).ok();
    let read = |path: &str| fs::read_to_string(store.path(path)).unwrap();
    assert_eq!(
        (read("d/a"), read("d/b"), read("c")),
        ("1\n".into(), "here\n".into(), "1\n".into())
    );
    assert!(versions(&store, "d", "a").contains(&"there\n".to_owned()));
    assert!(!store.path("d/new").exists() && !store.path("sub").exists());
    assert_eq!(fs::read_to_string(store.path("d/.snapshots/.deleted/new")).unwrap(), "there\n");
    finish_equal(store);
}

/// A store of which the second backing lies on a disk of its own.
struct Flaky {
    // Taken down first.
    store: Mounted,
    dir: PathBuf,
    _disk: LoopFs,
    _scratch: tempfile::TempDir,
}

impl Flaky {
    fn new() -> Flaky {
        let (disk, scratch) = (LoopFs::ext4(64), common::scratch());
        let steady = scratch.path().join("steady");
        fs::create_dir(&steady).unwrap();
        let dir = disk.root().join("flaky");
        let store = Mounted::over(vec![steady, dir.clone()]);
        Flaky { store, dir, _disk: disk, _scratch: scratch }
    }

    /// Makes the disk refuse changes of the directory `gone`, or take them again.
    fn immutable(&self, how: &str) {
        run(Command::new("chattr").arg(how).arg(self.dir.join("gone"))).ok();
    }
}

#[test]
fn a_disk_that_failed_is_brought_back_once_it_takes_changes_again() {
    let flaky = Flaky::new();
    let store = &flaky.store;
    sh(store, BEFORE.replace("3000000", "300000").replace("2000000", "200000").as_str());
    flaky.immutable("+i");
    sh(store, "echo missed > missed; mv keep kept; rm -r gone");
    let status = store.rearview(&["status"]);
    assert_eq!(status.code, 20, "{}", status.told());
    assert!(status.stdout.contains("OFFLINE"), "{}", status.told());
    // The disk answers, but takes no change yet.
    assert_eq!(store.rearview(&["resync", "--wait"]).code, 20);
    flaky.immutable("-i");
    let done = store.rearview(&["resync", "--wait"]);
    assert_eq!(done.code, 0, "{}", done.told());
    finish_equal(flaky.store);
}

/// A disk that failed just after changes that are doubtful because of it. `None` if that took so
/// long that a checkpoint may have come between: what was changed before one is not doubtful.
fn failed_just_after_changes() -> Option<Flaky> {
    let mut flaky = Flaky::new();
    sh(&flaky.store, "mkdir -p gone/x; mkdir d{1..20}; for d in d*; do touch $d/f{1..100}; done");
    // A checkpoint: what is changed from here on is doubtful when the disk fails, and no more.
    flaky.store.remount();
    let (store, begun) = (&flaky.store, Instant::now());
    sh(store, "echo just before > d1/f1; mv d2 moved; mkdir made; echo new > made/x; rm d5/f5");
    flaky.immutable("+i");
    sh(store, "rmdir gone/x; echo after > d3/f3; mv moved/f1 made; rm moved/f2");
    // One is made where nothing was changed for five seconds.
    let in_time = begun.elapsed() < Duration::from_secs(4);
    if !in_time {
        flaky.immutable("-i");
    }
    in_time.then_some(flaky)
}

#[test]
fn of_a_replica_that_failed_only_what_is_doubtful_is_compared() {
    let mut flaky = (0..10).find_map(|_| failed_just_after_changes()).expect("a machine with time");
    let store = &flaky.store;
    assert_eq!(store.rearview(&["status"]).code, 20);
    flaky.immutable("-i");
    let done = store.rearview(&["resync", "--wait"]);
    assert_eq!(done.code, 0, "{}", done.told());
    let (compared, _) = looked_at(store);
    // Three of twenty directories with a hundred files each are looked at, some of them twice.
    assert!((300..1000).contains(&compared), "{compared} objects were compared");
    // The same where the store was not in use meanwhile.
    flaky.immutable("+i");
    sh(store, "mkdir gone/y; echo after > d4/f4");
    flaky.store.unmount();
    flaky.immutable("-i");
    flaky.store.mount().ok();
    let store = &flaky.store;
    let done = store.rearview(&["resync", "--wait"]);
    assert_eq!(done.code, 0, "{}", done.told());
    let (compared, _) = looked_at(store);
    assert!((1..1000).contains(&compared), "{compared} objects were compared");
    finish_equal(flaky.store);
}

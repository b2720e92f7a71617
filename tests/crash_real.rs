//! Crashes of the real binary on real mounts under a mixed load: killed, its disks shut down, its
//! disks cut off in the midst of their writes. What was acknowledged is there after.
//!
//! `REARVIEW_CRASHES` sets how many crashes each method makes (default: a few), `REARVIEW_SEED` the
//! seed.

mod common;
mod crash;
#[allow(dead_code)] // The driver is used in part.
mod model {
    pub mod compare;
    pub mod drive;
    pub mod exclude;
    pub mod names;
    pub mod open;
    pub mod ops;
    pub mod reference;
}

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;

use common::disk::{IN_USE, LoopFs, unmount_unused};
use common::{Mounted, run, tree, wait_until};
use crash::dice::{Dice, number};
use crash::load::{Shared, Worker, dump, seeds};
use crash::rig::{BlockLog, LoggedFs};
use crash::story::{DISKS, Names, Story};
use model::reference::{Dump, Shown};
use rearviewfs::catalog::Catalog;

const WORKERS: usize = 3;
/// A mark that was never acknowledged has the position after this one.
const ACKNOWLEDGED: [usize; DISKS] = [usize::MAX - 1; DISKS];

/// What was known before a crash.
struct Before {
    stories: BTreeMap<String, Story>,
    /// Snapshots with what they showed, and when they were acknowledged.
    snapshots: Vec<(String, Dump, [usize; DISKS])>,
}

impl Before {
    /// How far the disks had come at least when the last thing was made durable before `cut`.
    fn durable(&self, cut: [usize; DISKS]) -> [usize; DISKS] {
        let taken = self.snapshots.iter().map(|(_, _, position)| *position);
        let taken = taken.filter(|at| (0..DISKS).all(|disk| at[disk] <= cut[disk]));
        let synced = self.stories.values().map(|story| story.last_durable(cut));
        let least = |disk| move |all: usize, own: [usize; DISKS]| all.max(own[disk]);
        let all: Vec<_> = taken.chain(synced).collect();
        std::array::from_fn(|disk| all.iter().copied().fold(0, least(disk)).min(cut[disk]))
    }
}

/// A process of its own that makes, changes and removes what nobody checks but the replicas' being
/// equal.
fn noise(at: &Path) -> Child {
    std::fs::create_dir(at).expect("a folder can be made");
    let script = "for i in $(seq 1000000); do mkdir d$i && seq $i 900 > d$i/a && mv d$i/a d$i/b && \
                  cp d$i/b c && echo more >> c && ln -f c d$i/l && rm -r d$i || exit; done";
    Command::new("bash")
        .args(["-c", script])
        .current_dir(at)
        .stderr(Stdio::null())
        .spawn()
        .expect("bash starts")
}

/// Works on a mount until so many operations were acknowledged, and then crashes it: with `alone`
/// so that it goes on, and so many more are acknowledged after it.
fn under_load(
    mnt: &Path,
    seed: u64,
    operations: usize,
    alone: Option<usize>,
    position: &(dyn Fn() -> [usize; DISKS] + Sync),
    crash: impl FnOnce(),
) -> Before {
    let shared = Shared::default();
    let mut before = Before { stories: BTreeMap::new(), snapshots: Vec::new() };
    let mut noise = noise(&mnt.join(format!("noise{seed}")));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|index| {
                let name = format!("w{seed}-{index}");
                let (root, shared) = (mnt.join(&name), &shared);
                let seeds = seeds(seed << 8 | index as u64);
                (name, scope.spawn(move || Worker::work(&root, seeds, shared, position)))
            })
            .collect();
        let reached = |part: usize| {
            wait_until("the workers work", 120, || {
                let ended = workers.iter().any(|(_, worker)| worker.is_finished());
                ended || shared.done.load(Ordering::Relaxed) >= part
            });
        };
        for part in 1..3 {
            reached(operations * part / 3);
            let name = format!("s{seed}-{part}");
            let at = mnt.join(".snapshots").join(&name);
            std::fs::create_dir(&at).expect("a snapshot can be taken");
            let position = position();
            let shown = dump(&at).expect("a snapshot can be read");
            before.snapshots.push((name, shown, position));
        }
        reached(operations);
        for (name, shown, _) in &before.snapshots {
            unchanged(mnt, name, shown)
                .unwrap_or_else(|why| panic!("seed {seed}: before the crash: {why}"));
        }
        match alone {
            None => {
                shared.dying.store(true, Ordering::SeqCst);
                crash();
            }
            Some(more) => {
                crash();
                reached(shared.done.load(Ordering::Relaxed) + more);
                shared.ending.store(true, Ordering::SeqCst);
            }
        }
        for (name, worker) in workers {
            let story = worker.join().expect("a worker does not panic");
            before
                .stories
                .insert(name, story.unwrap_or_else(|error| panic!("seed {seed}: {error}")));
        }
    });
    let _ = noise.kill();
    let _ = noise.wait();
    before
}

/// Whether a snapshot shows what it showed before.
fn unchanged(mnt: &Path, name: &str, shown: &Dump) -> Result<(), String> {
    let found = dump(&mnt.join(".snapshots").join(name))?;
    for (path, was) in shown {
        let Some(is) = found.get(path) else {
            return Err(format!("snapshot {name}: {path} is gone"));
        };
        if is != was {
            let at = was.content.iter().zip(&is.content).position(|(a, b)| a != b);
            // What a file is filled with tells which write it is of.
            let brief = |of: &Shown| {
                let rest = &of.content[at.unwrap_or(0).min(of.content.len())..];
                Shown { content: rest[..rest.len().min(8)].to_vec(), ..of.clone() }
            };
            let sizes = (was.content.len(), is.content.len());
            let (was, is) = (brief(was), brief(is));
            return Err(format!(
                "snapshot {name}: {path} differs at {at:?} of {sizes:?}, was {was:?}, is {is:?}"
            ));
        }
    }
    match found.keys().find(|path| !shown.contains_key(*path)) {
        Some(path) => Err(format!("snapshot {name}: {path} is too much")),
        None => Ok(()),
    }
}

/// Looks at everything on a mount that was recovered.
fn judge(mnt: &Path, before: &Before, names: Names, cut: [usize; DISKS]) -> Result<(), String> {
    for (name, story) in &before.stories {
        let window = story.window(cut);
        if story.marks[0].position.iter().zip(cut).any(|(own, cut)| *own > cut) {
            continue;
        }
        let found = dump(&mnt.join(name)).map_err(|error| format!("{name}: {error}"))?;
        story
            .judge_live(&found, names, window)
            .map_err(|why| format!("{name}: {why}\n{}", story.tell(window)))?;
    }
    for (name, shown, position) in &before.snapshots {
        if position.iter().zip(cut).all(|(own, cut)| *own <= cut) {
            unchanged(mnt, name, shown)?;
        }
    }
    Ok(())
}

/// Whether both replicas hold the same, catalogs included.
fn sound(store: &Mounted) -> Result<(), String> {
    let trees: Vec<_> = store.backings.iter().map(|backing| tree::read_tree(backing)).collect();
    let differences = tree::differences(&trees[0], &trees[1]);
    if !differences.is_empty() {
        return Err(format!("the replicas differ (left / right):\n{differences}"));
    }
    let heads = store.backings.iter().map(|backing| {
        let file = backing.join(".rearview").join(rearviewfs::store::CATALOG_FILE);
        Catalog::verify(&file, true).map_err(|error| error.to_string())
    });
    let heads = heads.collect::<Result<Vec<_>, _>>()?;
    match heads[0] == heads[1] {
        true => Ok(()),
        false => Err(format!("the catalogs differ: {heads:?}")),
    }
}

/// Unmounts once every replica is current again, and compares them.
fn finish(store: &mut Mounted) -> Result<(), String> {
    wait_until("the replicas are current", 120, || store.rearview(&["status"]).code == 0);
    store.unmount();
    sound(store)
}

/// What is in a backing: inode, links, size, time and name of everything but the packs.
fn listing(backing: &Path) -> String {
    let script = "find . -path ./.rearview/packs -prune -o \
                  -printf '%i %n %s %T@ %p\\n' | sort -k5";
    let log = std::fs::read_to_string(backing.join(".rearview/log")).unwrap_or_default();
    format!("{}\n{}{log}", backing.display(), common::shell(backing, script))
}

fn rounds(default: u64) -> u64 {
    number("REARVIEW_CRASHES", default)
}

#[test]
fn a_killed_daemon_loses_nothing_that_was_acknowledged() {
    let (rounds, first) = (rounds(4), number("REARVIEW_SEED", 1));
    let mut store = Mounted::new();
    for seed in first..first + rounds {
        let operations = Dice::new(seed).between(30, 400);
        let before =
            under_load(&store.mnt, seed, operations, None, &|| [0; DISKS], || store.kill());
        store.mount().ok();
        judge(&store.mnt, &before, Names::Acknowledged, ACKNOWLEDGED).unwrap_or_else(|why| {
            let found: String = store.backings.iter().map(|backing| listing(backing)).collect();
            panic!("seed {seed}: {why}\n--- after recovery\n{found}")
        });
        finish(&mut store).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        store.mount().ok();
        common::shell(&store.mnt, "rm -rf w* noise*");
    }
    store.unmount();
    println!("{rounds} kills of the daemon under load");
}

/// Ends a filesystem as a power cut does: with all flushed (0), with its log alone flushed (1), or
/// with nothing (2).
fn shut_down(root: &Path, how: usize) {
    let program = format!(
        "import fcntl, os, struct\nfd = os.open('.', os.O_RDONLY)\n\
         fcntl.ioctl(fd, 0x8004587d, struct.pack('I', {how}))"
    );
    common::run::python(root, &program);
}

/// A store on an XFS and an ext4.
fn over_two() -> ([LoopFs; DISKS], Mounted) {
    let disks = [LoopFs::xfs(300), LoopFs::ext4(128)];
    let backings: Vec<PathBuf> = disks.iter().map(|disk| disk.root().join("backing")).collect();
    backings.iter().for_each(|backing| std::fs::create_dir(backing).expect("a backing"));
    let store = Mounted::over(backings);
    (disks, store)
}

/// Both disks go down in some order, with the daemon killed before, between or after.
#[test]
fn what_was_synced_survives_disks_that_are_shut_down() {
    let (rounds, first) = (rounds(4), number("REARVIEW_SEED", 1));
    let (disks, mut store) = over_two();
    for seed in first..first + rounds {
        let mut dice = Dice::new(seed);
        let operations = dice.between(30, 300);
        let (first, kill_after) = (dice.below(2), dice.below(3));
        let how = [dice.below(3), dice.below(3)];
        let told =
            format!("seed {seed}: disk {first} first, by {how:?}, killed after {kill_after}");
        let before = under_load(&store.mnt, seed, operations, None, &|| [0; DISKS], || {
            for step in 0..=DISKS {
                if step == kill_after {
                    store.kill();
                } else {
                    let disk =
                        if step == 0 || kill_after == 0 && step == 1 { first } else { 1 - first };
                    shut_down(disks[disk].root(), how[disk]);
                }
            }
        });
        for disk in &disks {
            disk.unmount();
            disk.mount();
        }
        store.mount().ok();
        judge(&store.mnt, &before, Names::OneMoment, ACKNOWLEDGED).unwrap_or_else(|why| {
            let found: String = store.backings.iter().map(|backing| listing(backing)).collect();
            panic!("{told}: {why}\n--- after recovery\n{found}")
        });
        finish(&mut store).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        store.mount().ok();
        common::shell(&store.mnt, "rm -rf w* noise*");
    }
    store.unmount();
    println!("{rounds} shutdowns of an XFS and an ext4 backing under load");
}

/// One disk goes down and the mount goes on with the other: nobody is told of an error, and when it
/// is back it is made equal.
#[test]
fn a_disk_that_is_shut_down_alone_costs_nothing() {
    let (rounds, first) = (rounds(2), number("REARVIEW_SEED", 1));
    let (disks, mut store) = over_two();
    for seed in first..first + rounds {
        let mut dice = Dice::new(seed);
        let (disk, how) = ((seed % 2) as usize, dice.below(3));
        let (operations, more) = (dice.between(30, 300), dice.between(10, 200));
        let told = format!("seed {seed}: disk {disk} alone, by {how}");
        let wrong = |why| panic!("{told}: {why}");
        let down = || shut_down(disks[disk].root(), how);
        let before = under_load(&store.mnt, seed, operations, Some(more), &|| [0; DISKS], down);
        judge(&store.mnt, &before, Names::Acknowledged, ACKNOWLEDGED).unwrap_or_else(wrong);
        end_somehow(&mut store, &mut dice);
        disks[disk].unmount();
        disks[disk].mount();
        store.mount().ok();
        judge(&store.mnt, &before, Names::Acknowledged, ACKNOWLEDGED).unwrap_or_else(wrong);
        finish(&mut store).unwrap_or_else(wrong);
        store.mount().ok();
        common::shell(&store.mnt, "rm -rf w* noise*");
    }
    store.unmount();
    println!("{rounds} shutdowns of one backing of two alone");
}

/// Ends a mount one of whose disks is dead: well, or by killing it.
fn end_somehow(store: &mut Mounted, dice: &mut Dice) {
    if dice.percent(50) {
        store.kill();
        return;
    }
    let unmount = || run(Command::new(common::run::binary()).arg("umount").arg(&store.mnt));
    let done = unmount_unused(&store.mnt, IN_USE, unmount).unwrap_or_else(|why| panic!("{why}"));
    assert!(matches!(done.code, 0 | 3), "{}", done.told());
    store.ended_elsewhere();
}

/// Cuts of disks of these kinds, at the same and at different points.
fn block_cuts(kinds: [&'static str; DISKS], cuts: u64, seed: u64) -> u64 {
    let (disks, mut store) = over_logged(kinds);
    let position = || -> [usize; DISKS] { std::array::from_fn(|index| disks[index].position()) };
    let begin = position();
    let before = under_load(&store.mnt, seed, 150, None, &position, || store.kill());
    run(Command::new("umount").arg("-l").arg(&store.mnt)).ok();
    store.ended_elsewhere();
    drop(store);
    let end = position();
    let logs: Vec<BlockLog> = disks.into_iter().map(LoggedFs::into_log).collect();
    let marks: Vec<[usize; DISKS]> = {
        let all = before.stories.values().flat_map(|story| &story.marks);
        let mut all: Vec<_> = all.map(|mark| mark.position).filter(|at| at[0] <= end[0]).collect();
        all.sort_unstable();
        all
    };
    for index in 0..cuts {
        let mut dice = Dice::new(seed << 16 | index);
        let at = dice.below(marks.len());
        let (from, to) = (marks[at], marks.get(at + 1).copied().unwrap_or(end));
        let mut cut: [usize; DISKS] = std::array::from_fn(|d| dice.between(from[d], to[d]));
        if dice.percent(40) {
            // One went earlier, but not before what was acknowledged as durable on both.
            let early = dice.below(DISKS);
            cut[early] = dice.between(before.durable(cut)[early], cut[early]);
        }
        cut = std::array::from_fn(|d| cut[d].clamp(begin[d], logs[d].len()));
        let volatile = dice.percent(50);
        let mounted: Vec<LoopFs> = logs
            .iter()
            .zip(cut)
            .map(|(log, cut)| log.mount_as_of(cut, volatile.then_some(&mut dice)))
            .collect();
        let names = if kinds.contains(&"btrfs") { Names::Each } else { Names::OneMoment };
        let told = format!("{kinds:?}, seed {seed}, cut {index} at {cut:?}, volatile: {volatile}");
        recovers(&mounted, &before, names, cut, &told);
    }
    cuts
}

/// A store on two disks that log what is written to them.
fn over_logged(kinds: [&'static str; DISKS]) -> ([LoggedFs; DISKS], Mounted) {
    let disks = kinds.map(LoggedFs::new);
    let backings: Vec<PathBuf> = disks.iter().map(|disk| disk.root().join("backing")).collect();
    backings.iter().for_each(|backing| std::fs::create_dir(backing).expect("a backing"));
    let store = Mounted::over(backings);
    // From here on something is promised.
    for disk in &disks {
        run(Command::new("sync").arg("-f").arg(disk.root())).ok();
    }
    (disks, store)
}

/// Mounts what a cut left, and looks at everything.
fn recovers(disks: &[LoopFs], before: &Before, names: Names, cut: [usize; DISKS], told: &str) {
    let backings: Vec<PathBuf> = disks.iter().map(|disk| disk.root().join("backing")).collect();
    let raw: String = backings.iter().map(|backing| listing(backing)).collect();
    let mut store = Mounted::over(backings);
    let verdict = judge(&store.mnt, before, names, cut).and_then(|()| finish(&mut store));
    if let Err(why) = verdict {
        let after: String = store.backings.iter().map(|backing| listing(backing)).collect();
        panic!("{told}: {why}\n--- after the cut\n{raw}--- after recovery\n{after}");
    }
}

/// One disk loses its power, and the mount goes on with the other. What the disk has of what was
/// not flushed is tried in several ways; in each it is made equal, and nothing is missing.
fn unplugged(kinds: [&'static str; DISKS], cuts: u64, seed: u64) -> u64 {
    let mut dice = Dice::new(seed);
    let (disks, mut store) = over_logged(kinds);
    let dead = (seed % 2) as usize;
    let (operations, more) = (dice.between(30, 150), dice.between(10, 100));
    let unplug = || disks[dead].unplug();
    let before = under_load(&store.mnt, seed, operations, Some(more), &|| [0; DISKS], unplug);
    judge(&store.mnt, &before, Names::Acknowledged, ACKNOWLEDGED)
        .unwrap_or_else(|why| panic!("{kinds:?}, seed {seed}, while {dead} is dead: {why}"));
    end_somehow(&mut store, &mut dice);
    run(Command::new("umount").arg("-l").arg(&store.mnt));
    drop(store);
    // What was killed with the process alone is still in the kernel.
    run(Command::new("sync").arg("-f").arg(disks[1 - dead].root())).ok();
    let logs: Vec<BlockLog> = disks.into_iter().map(LoggedFs::into_log).collect();
    for index in 0..cuts {
        let mut dice = Dice::new(seed << 16 | index);
        let disks: [LoopFs; DISKS] = std::array::from_fn(|disk| {
            logs[disk].mount_as_of(logs[disk].len(), (disk == dead).then_some(&mut dice))
        });
        let told = format!("{kinds:?}, seed {seed}, cut {index} of disk {dead} alone");
        recovers(&disks, &before, Names::Acknowledged, ACKNOWLEDGED, &told);
    }
    cuts
}

#[test]
fn a_disk_that_is_unplugged_alone_costs_nothing() {
    let (cuts, seed) = (rounds(3), number("REARVIEW_SEED", 1));
    for (index, kinds) in [["ext4", "xfs"], ["btrfs", "ext4"], ["xfs", "btrfs"]].iter().enumerate()
    {
        let done = unplugged(*kinds, cuts.div_ceil(3), seed + index as u64);
        println!("{done} cuts of one of {kinds:?} alone");
    }
}

#[test]
fn what_was_synced_survives_disks_cut_off_between_two_writes() {
    let (cuts, seed) = (rounds(6), number("REARVIEW_SEED", 1));
    let kinds = [["ext4", "ext4"], ["xfs", "ext4"], ["xfs", "xfs"]];
    for kinds in kinds {
        let done = block_cuts(kinds, cuts.div_ceil(kinds.len() as u64 + 1), seed);
        println!("{done} cuts of {kinds:?} between two writes");
    }
}

/// btrfs makes the catalog durable without the renames before it: recovery looks for a preserved
/// file under the names that its node had.
#[test]
fn what_was_synced_survives_btrfs_cut_off_between_two_writes() {
    let (cuts, seed) = (rounds(6), number("REARVIEW_SEED", 1));
    for kinds in [["btrfs", "btrfs"], ["xfs", "btrfs"]] {
        let done = block_cuts(kinds, cuts.div_ceil(2), seed);
        println!("{done} cuts of {kinds:?} between two writes");
    }
}

/// A file was emptied, written, made a version and overwritten, and both disks went down: the
/// before-images of that version were on them, and that the older one had been moved aside was not.
/// They are not the older one's.
#[test]
fn before_images_of_an_emptied_file_are_not_those_of_what_it_was() {
    let (disks, mut store) = over_two();
    let write = |name: &str, truncate: bool, at: u64, byte: u8, length: usize| {
        let mut options = std::fs::File::options();
        let file = options.write(true).create(true).truncate(truncate).open(store.mnt.join(name));
        file.and_then(|file| file.write_all_at(&vec![byte; length], at)).expect("it is written");
    };
    // The undo log is begun: a record of it takes nothing else to the disk.
    write("other", true, 0, 1, 100);
    write("other", false, 0, 2, 100);
    write("file", true, 0, 3, 30_000);
    std::fs::create_dir(store.mnt.join(".snapshots/then")).expect("a snapshot can be taken");
    common::shell(&store.mnt, "sync -f .");
    write("file", true, 8253, 4, 10_000);
    write("file", false, 8220, 5, 4000);
    let is_written = |backing: &PathBuf| {
        std::fs::read(backing.join("file")).is_ok_and(|bytes| bytes.get(8220) == Some(&5))
    };
    wait_until("what was deferred is carried out", 20, || store.backings.iter().all(is_written));
    disks.iter().for_each(|disk| shut_down(disk.root(), 2));
    store.kill();
    for disk in &disks {
        disk.unmount();
        disk.mount();
    }
    store.mount().ok();
    let found = std::fs::read(store.mnt.join(".snapshots/then/file")).expect("it can be read");
    let foreign = found.iter().position(|&byte| byte != 3);
    assert_eq!((found.len(), foreign), (30_000, None), "the past changed");
    finish(&mut store).unwrap_or_else(|why| panic!("{why}"));
}

//! One experiment: operations on a store whose disks remember, a cut, recovery, and the verdict.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rearviewfs::catalog::Catalog;
use rearviewfs::replica::backing::Backing;
use rearviewfs::replica::faulty::Faulty;
use rearviewfs::store::Between;
use rearviewfs::types::Generation;

use super::cut::{Policy, persisted};
use super::dice::Dice;
use super::disk::{Disk, Recorder};
use super::story::{DISKS, Mark, Names, Past, Story, Verdict, Window};
use super::tree::{Change, Event, Tree};
use crate::common;
use crate::model::drive::Driver;
use crate::model::ops::Op;

/// What was done to a store, in the two ways in which it can be told.
pub struct Recording {
    recorder: Arc<Recorder>,
    pub story: Story,
}

/// Where the disks are cut, and by which rules.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    pub at: [usize; DISKS],
    pub policies: [Policy; DISKS],
}

/// Handles of the backings that tell the recorder of what the kernel does not pass on to a disk.
fn between(paths: &[PathBuf], recorder: &Arc<Recorder>) -> Between {
    let (paths, recorder) = (paths.to_vec(), recorder.clone());
    Between::new(move |path: &Path, inner: Box<dyn Backing>| {
        let disk = paths.iter().position(|own| own == path).expect("a backing of ours");
        let recorder = recorder.clone();
        let plan = move |call: rearviewfs::replica::faulty::Call<'_>| {
            if call.op == "sync_all" {
                recorder.note(disk, Event::now(Change::SyncAll));
            }
            None
        };
        Box::new(Faulty::new(inner, Arc::new(plan)))
    })
}

/// A store on two simulated disks.
struct Bench {
    driver: Option<Driver>,
    _disks: Vec<Disk>,
    recorder: Arc<Recorder>,
    _scratch: tempfile::TempDir,
}

impl Bench {
    fn new(trees: [Tree; DISKS]) -> Result<Bench, String> {
        let scratch = common::scratch();
        let recorder = Arc::new(Recorder::default());
        let root = scratch.path().canonicalize().expect("a scratch folder has a path");
        let paths: Vec<PathBuf> = ["a", "b"].iter().map(|name| root.join(name)).collect();
        let disks: Vec<Disk> = trees
            .into_iter()
            .enumerate()
            .map(|(number, tree)| {
                std::fs::create_dir(&paths[number]).expect("a mountpoint can be made");
                Disk::mount(&paths[number], number, tree, recorder.clone())
            })
            .collect();
        let between = between(&paths, &recorder);
        let driver = Driver::over(paths, false, between);
        let mut bench = Bench { driver: None, _disks: disks, recorder, _scratch: scratch };
        bench.driver = Some(driver?);
        Ok(bench)
    }
}

impl Recording {
    /// Does the operations.
    pub fn of(operations: &[Op]) -> Result<Recording, String> {
        let mut bench = Bench::new([Tree::new(), Tree::new()])?;
        let recorder = bench.recorder.clone();
        let mut story = Story::default();
        let driver = bench.driver.as_mut().expect("opened");
        note(&mut story, driver, &recorder, "creation".into(), None, (false, true));
        for op in operations {
            let synced = match op {
                Op::Fsync { handle } => {
                    let at = handle.checked_rem(driver.handles.len());
                    at.map(|at| driver.handles[at].1)
                }
                _ => None,
            };
            driver.step(op).map_err(|error| format!("{op:?}: {error}"))?;
            let all = matches!(op, Op::Remount | Op::Snapshot);
            let barrier = synced.is_some() || all;
            note(&mut story, driver, &recorder, format!("{op:?}"), synced, (all, barrier));
        }
        Ok(Recording { recorder, story })
    }

    /// A cut that a seed picks: of both disks at once, at different points, or of one alone.
    pub fn cut(&self, dice: &mut Dice) -> Cut {
        let [first, _] = self.story.marks[0].position;
        let [last, _] = self.story.marks.last().expect("the creation is one").position;
        let at = dice.between(first, last);
        let policies = [Policy::Ext4, Policy::Xfs, Policy::Btrfs];
        let mut pick = || policies[dice.below(policies.len())];
        let (one, other) = (pick(), pick());
        match dice.below(6) {
            0 => Cut { at: [at, at], policies: [Policy::Kept, Policy::Kept] },
            1 => Cut { at: [at, at], policies: [one, Policy::Kept] },
            2 => Cut { at: [at, at], policies: [Policy::Kept, one] },
            3 => {
                // The other one went earlier, but not before anything was durable on both.
                let earlier = dice.between(self.story.last_durable([at, at])[0], at);
                let mut at = [at, earlier];
                if dice.percent(50) {
                    at.reverse();
                }
                Cut { at, policies: [one, other] }
            }
            _ => Cut { at: [at, at], policies: [one, other] },
        }
    }

    /// What the cut leaves on the disks.
    pub fn disks_after(&self, cut: &Cut, dice: &mut Dice) -> [Tree; DISKS] {
        let before = Tree::new();
        std::array::from_fn(|disk| {
            let log = self.recorder.changes_of(disk, cut.at[disk]);
            persisted(&before, &log, cut.policies[disk], dice)
        })
    }

    pub fn window(&self, cut: &Cut) -> Window {
        self.story.window(cut.at)
    }

    /// Recovers what a cut left, and judges it.
    pub fn judge(&self, disks: &[Tree; DISKS], cut: &Cut) -> Verdict {
        judge(&self.story, disks, names(cut), self.window(cut))
    }

    /// Recovers what a cut left on disks that remember, cuts the recovery too, and judges what the
    /// next one makes of that. Tells how often that was done.
    pub fn judge_cut_recovery(
        &self,
        disks: &[Tree; DISKS],
        cut: &Cut,
        times: usize,
        dice: &mut Dice,
    ) -> Result<usize, String> {
        let bench = Bench::new(disks.clone())?;
        let recorder = bench.recorder.clone();
        let end = recorder.position();
        drop(bench);
        for _ in 0..times {
            let at = dice.between(0, end);
            let again: [Tree; DISKS] = std::array::from_fn(|disk| {
                let log = recorder.changes_of(disk, at);
                persisted(&disks[disk], &log, cut.policies[disk], dice)
            });
            judge(&self.story, &again, names(cut), self.window(cut))
                .map_err(|error| format!("recovery cut at {at} of {end}: {error}"))?;
        }
        Ok(times)
    }
}

fn names(cut: &Cut) -> Names {
    match cut.policies {
        [Policy::Kept, Policy::Kept] => Names::Acknowledged,
        policies if policies.contains(&Policy::Btrfs) => Names::Each,
        _ => Names::OneMoment,
    }
}

fn note(
    story: &mut Story,
    driver: &Driver,
    recorder: &Recorder,
    what: String,
    synced: Option<usize>,
    (synced_all, barrier): (bool, bool),
) {
    let mark = story.marks.len();
    let mut past: Vec<(String, _)> =
        driver.snapshots.iter().map(|(name, dump)| (name.clone(), dump)).collect();
    for moment in &driver.moments {
        past.push((format!("@{}", moment.generation.0), &moment.dump));
    }
    for (name, dump) in &past {
        let own = Past { dump: (*dump).clone(), mark };
        story.past.entry(name.clone()).or_insert(own);
    }
    story.marks.push(Mark {
        position: [recorder.position(); DISKS],
        reference: driver.reference.clone(),
        synced,
        synced_all,
        barrier,
        past: past.into_iter().map(|(name, _)| name).collect(),
        what,
    });
}

/// Opens the store on what the disks hold, and looks at everything.
fn judge(story: &Story, disks: &[Tree; DISKS], names: Names, window: Window) -> Verdict {
    let scratch = common::scratch();
    let paths: Vec<PathBuf> = ["a", "b"].iter().map(|name| scratch.path().join(name)).collect();
    for (path, disk) in paths.iter().zip(disks) {
        std::fs::create_dir(path).expect("a folder can be made");
        disk.materialise(path);
    }
    let verdict = judge_store(story, &paths, names, window);
    if verdict.is_err()
        && let Some(keep) = std::env::var_os("REARVIEW_KEEP")
    {
        let keep = PathBuf::from(keep);
        let _ = std::fs::remove_dir_all(&keep);
        std::fs::create_dir_all(&keep).expect("a folder can be made");
        for (name, disk) in ["a", "b"].iter().zip(disks) {
            std::fs::create_dir(keep.join(name)).expect("a folder can be made");
            disk.materialise(&keep.join(name));
        }
    }
    verdict
}

fn judge_store(story: &Story, paths: &[PathBuf], names: Names, window: Window) -> Verdict {
    let driver = Driver::over(paths.to_vec(), false, Between::default())?;
    let live = driver.dump(1)?;
    story.judge_live(&live, names, window)?;
    for name in story.durable_past(window) {
        let generation = match name.strip_prefix('@') {
            Some(number) => Generation(number.parse().expect("we wrote a number")),
            None => {
                let found = driver.catalog().snapshot(name).map_err(|error| error.to_string())?;
                found.ok_or_else(|| format!("snapshot {name} is gone"))?.generation
            }
        };
        story.judge_past(name, &driver.dump_moment(generation)?, window)?;
    }
    // Not closed: recovery begins once more, and must have nothing to do.
    drop(driver);
    let mut driver = Driver::over(paths.to_vec(), false, Between::default())?;
    if driver.dump(1)? != live {
        return Err("recovered twice, the live tree is another".into());
    }
    driver.unmount()?;
    let heads = paths.iter().map(|path| {
        let file = path.join(".rearview").join(rearviewfs::store::CATALOG_FILE);
        Catalog::verify(&file, true).map_err(|error| error.to_string())
    });
    let heads = heads.collect::<Result<Vec<_>, _>>()?;
    if heads[0] != heads[1] {
        return Err(format!("the catalogs differ: {heads:?}"));
    }
    Ok(())
}

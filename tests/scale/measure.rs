//! Times and their table: minimum, median, 99th percentile, target.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{Mounted, run::binary};

/// Beyond this many samples a target is one of the 99th percentile, else of the median.
const PERCENTILE_MIN: usize = 100;

/// What was measured, by name.
pub struct Table {
    rows: BTreeMap<&'static str, (Vec<Duration>, Option<Duration>)>,
}

impl Table {
    /// An empty table.
    pub fn new() -> Table {
        Table { rows: BTreeMap::new() }
    }

    /// Adds a time.
    pub fn add(&mut self, what: &'static str, took: Duration, target: Option<Duration>) {
        let row = self.rows.entry(what).or_insert((Vec::new(), target));
        let at = row.0.partition_point(|other| *other < took);
        row.0.insert(at, took);
    }

    /// Fails with the rows that are beyond their targets.
    #[track_caller]
    pub fn assert_met(&self) {
        let missed: Vec<String> = self
            .rows
            .iter()
            .filter(|(_, (times, target))| target.is_some_and(|target| judged(times) > target))
            .map(|(what, (times, _))| format!("{what}: {:?}", judged(times)))
            .collect();
        assert!(missed.is_empty(), "beyond their targets: {missed:#?}");
    }
}

/// What a target is about.
fn judged(times: &[Duration]) -> Duration {
    if times.len() >= PERCENTILE_MIN { part(times, 99) } else { part(times, 50) }
}

/// The time below which so many percent are.
fn part(times: &[Duration], percent: usize) -> Duration {
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let titles = ["ms", "minimum", "median", "99 %", "target", "samples"];
        let [what, minimum, median, most, target, samples] = titles;
        writeln!(f, "{what:40} {minimum:>9} {median:>9} {most:>9} {target:>9} {samples:>8}")?;
        let ms = |time: Duration| format!("{:.3}", time.as_secs_f64() * 1e3);
        for (what, (times, target)) in &self.rows {
            let (minimum, median, most) = (ms(times[0]), ms(part(times, 50)), ms(part(times, 99)));
            let target = target.map(ms).unwrap_or_default();
            let samples = times.len();
            writeln!(f, "{what:40} {minimum:>9} {median:>9} {most:>9} {target:>9} {samples:>8}")?;
        }
        Ok(())
    }
}

/// Does something and tells how long it took.
pub fn timed<T>(f: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let value = f();
    (start.elapsed(), value)
}

/// Runs `rearview` in the root of the mount; returns what it printed. It is not polled for, as
/// [`crate::common::run`] does, so that the time is its own.
#[track_caller]
pub fn command(store: &Mounted, word: &str, words: &[&Path]) -> String {
    let output = Command::new(binary())
        .arg(word)
        .args(words)
        .current_dir(&store.mnt)
        .stdin(Stdio::null())
        .output()
        .expect("the binary can be run");
    assert!(output.status.success(), "{word} {words:?}: {output:?}");
    String::from_utf8(output.stdout).expect("its output is text")
}

/// Has the kernel forget names and inodes that nobody uses, but not what it holds of files. Where
/// a test may not, as in a container, the times are those of names that it knows.
pub fn drop_names() {
    if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "2") {
        println!("the kernel keeps the names: {error}");
    }
}

/// Has the kernel forget what it holds of files, directories and inodes.
pub fn drop_page_cache() {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").expect("we are root");
}

/// The most memory that a process ever had resident, in bytes.
pub fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).expect("the kernel tells it");
    kib.trim().parse::<u64>().expect("a number") << 10
}

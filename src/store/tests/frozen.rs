//! A filesystem that takes no writes, and answers none, below a catalog: SQLite reaches its files
//! by no seam of ours. As root only.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use super::space::Image;
use rustix::io::Errno;

use super::*;
use crate::check::{CheckOptions, check};
use crate::store::site::Site;

/// Short enough to wait for, long enough for a busy machine to do what does not hang.
const TIMEOUT: Duration = Duration::from_millis(500);
/// What meets one that hangs has ended by then.
const BOUND: Duration = Duration::from_secs(10);

/// A frozen filesystem, which goes on when this is dropped.
struct Frozen {
    dir: PathBuf,
    /// Goes on without us, so that a test that is killed leaves nothing that cannot be ended.
    thaws: Child,
}

impl Frozen {
    fn new(dir: &Path) -> Frozen {
        let thaw = "sleep 30; exec fsfreeze -u \"$0\"";
        let mut thaws = Command::new("sh");
        let thaws = thaws.args(["-c", thaw]).arg(dir).process_group(0).spawn().unwrap();
        let frozen = Frozen { dir: dir.to_path_buf(), thaws };
        assert!(Command::new("fsfreeze").arg("-f").arg(dir).status().unwrap().success());
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.dir).status();
        let group = rustix::process::Pid::from_child(&self.thaws);
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        let _ = self.thaws.wait();
    }
}

/// Fails in time, and names what hangs.
fn hangs_at<T>(path: &Path, work: impl FnOnce() -> Result<T>) {
    let begun = Instant::now();
    let error = work().err().expect("it hangs");
    assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
    assert_eq!(error.to_errno(), Errno::TIMEDOUT, "{error}");
    assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
}

#[test]
fn a_catalog_that_hangs_while_it_is_opened_or_copied_to_is_named_in_time() {
    let bench = Bench::new();
    let Some(_image) = Image::new(&bench, 24) else { return };
    write(&bench.path("a/f"), b"x");
    bench.settle(&["a", "small"]);
    let between = Between::default().with_timeout(TIMEOUT);
    let [well, hung] = ["a", "small"].map(|name| bench.path(name));
    let sites = [&well, &hung].map(|path| Site::open_between(path, &between).unwrap());
    let file = |path: &Path| path.join(".rearview").join(CATALOG_FILE);
    let frozen = Frozen::new(&hung);
    hangs_at(&hung, || sites[1].copy_catalog(&sites[0]));
    hangs_at(&hung, || {
        let files = ReplicaMap::new(vec![Some(file(&well)), Some(file(&hung))]);
        Catalog::open_within(files, true, TIMEOUT)
    });
    // The other one is free.
    let catalog = Catalog::open_within(ReplicaMap::new(vec![Some(file(&well))]), true, TIMEOUT);
    let catalog = catalog.unwrap();
    let comparing = catalog.comparing(&file(&hung)).unwrap();
    let site = Site::open_between(&hung, &between).unwrap();
    // Its WAL is made where there is none.
    hangs_at(&hung, || site.within_alive("compare", move |alive| comparing.run(alive)));
    drop(frozen);
    catalog.close().unwrap();
    let until = Instant::now() + BOUND;
    let store = loop {
        match bench.open(&["a", "small"]) {
            Ok(store) => break store,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
        std::thread::yield_now();
    };
    store.close().unwrap();
    drop(store);
    bench.assert_equal(&["a", "small"]);
}

#[test]
fn a_check_goes_on_without_a_backing_that_hangs() {
    let bench = Bench::new();
    let Some(_image) = Image::new(&bench, 24) else { return };
    write(&bench.path("a/f"), b"x");
    bench.settle(&["a", "small"]);
    let options = CheckOptions { call_timeout: Some(TIMEOUT), ..CheckOptions::default() };
    let checked = |names: &[&str]| check(&bench.paths(names), options, &Progress::silent());
    let hung = bench.path("small");
    let frozen = Frozen::new(&hung);
    hangs_at(&hung, || checked(&["small"]));
    let begun = Instant::now();
    let report = checked(&["a", "small"]).unwrap();
    assert!(begun.elapsed() < BOUND, "{:?}", begun.elapsed());
    assert_eq!(report.silent.len(), 1, "{report:#?}");
    assert_eq!(report.silent[0].place, hung.to_string_lossy());
    assert_eq!((report.damage.len(), report.objects), (0, 2), "{report:#?}");
    drop(frozen);
    let until = Instant::now() + BOUND;
    let report = loop {
        match checked(&["a", "small"]) {
            Ok(report) if report.silent.is_empty() => break report,
            other => assert!(Instant::now() < until, "{other:?}"),
        }
        std::thread::yield_now();
    };
    assert_eq!((report.damage.len(), report.objects), (0, 4), "{report:#?}");
}

//! The rule of answers, ejection, kept handles and room, on backings that fail as told.

use std::process::Command;
use std::sync::atomic::AtomicUsize;

use parking_lot::Mutex;
use tempfile::TempDir;

use super::backing::{Access, Creds, Handle};
use super::dir_backing::DirBacking;
use super::faulty::{Faulty, Injected};
use super::*;
use crate::types::EntryName;

/// What each replica does in a test of the rule: `None` succeeds.
type Outcomes<'a> = &'a [Option<Errno>];

/// What to inject into which method from now on.
type Next = Arc<Mutex<Option<(&'static str, Injected)>>>;

struct Rig {
    set: ReplicaSet,
    dirs: Vec<TempDir>,
    plans: Vec<Next>,
}

fn rig(count: usize) -> Rig {
    let dirs: Vec<_> = (0..count).map(|_| TempDir::new().expect("a directory")).collect();
    let plans: Vec<Next> = (0..count).map(|_| Arc::default()).collect();
    let replicas = dirs.iter().zip(&plans).enumerate().map(|(index, (dir, plan))| {
        let inner = Box::new(DirBacking::open(dir.path()).expect("open"));
        let plan = plan.clone();
        let faulty = Faulty::new(
            inner,
            Arc::new(move |call| {
                plan.lock().filter(|(op, _)| *op == call.op).map(|(_, injected)| injected)
            }),
        );
        Replica::new(uuid::Uuid::new_v4(), format!("r{index}"), dir.path(), Box::new(faulty))
    });
    let set = ReplicaSet::new(replicas.collect());
    Rig { set, dirs, plans }
}

fn name(text: &str) -> EntryName {
    EntryName::new(text).expect("a valid name")
}

impl Rig {
    fn inject(&self, index: usize, op: &'static str, injected: Injected) {
        *self.plans[index].lock() = Some((op, injected));
    }

    fn online(&self) -> Vec<usize> {
        self.set.online().map(ReplicaId::index).collect()
    }

    fn root(&self) -> Arc<Handles> {
        self.set.dir(NodeId::ROOT, || Ok(RelPath::root())).expect("open the root")
    }

    fn create(&self, text: &str) -> Result<Answers<Handle>> {
        let root = self.root();
        self.set.apply("create", |id, backing| {
            backing.create(root.get(id)?, &name(text), 0o644, Creds::DAEMON)
        })
    }
}

/// Runs one operation on a fresh set; tells the answer, who was asked, and who is left.
fn judge(outcomes: Outcomes<'_>) -> (Result<usize, Errno>, usize, Vec<usize>) {
    let rig = rig(outcomes.len());
    let mut asked = 0;
    let answer = rig.set.apply("test", |id, _| {
        asked += 1;
        match outcomes[id.index()] {
            None => Ok(id.index()),
            Some(errno) => Err(errno.into()),
        }
    });
    (answer.map(Answers::primary).map_err(|error| error.to_errno()), asked, rig.online())
}

#[test]
fn the_rule_of_answers() {
    const IO: Option<Errno> = Some(Errno::IO);
    const RO: Option<Errno> = Some(Errno::ROFS);
    const NOENT: Option<Errno> = Some(Errno::NOENT);
    const NOSPC: Option<Errno> = Some(Errno::NOSPC);
    const UNKNOWN: Option<Errno> = Some(Errno::XFULL);
    const MFILE: Option<Errno> = Some(Errno::MFILE);
    type Case<'a> = (Outcomes<'a>, Result<usize, Errno>, usize, &'a [usize]);
    let cases: &[Case<'_>] = &[
        (&[None, None], Ok(0), 2, &[0, 1]),
        (&[NOENT, None], Err(Errno::NOENT), 1, &[0, 1]),
        (&[NOSPC, None], Err(Errno::NOSPC), 1, &[0, 1]),
        (&[MFILE, None], Err(Errno::MFILE), 2, &[0, 1]),
        (&[None, NOENT], Ok(0), 2, &[0]),
        (&[None, NOSPC, None], Ok(0), 3, &[0, 2]),
        (&[IO, None, None], Ok(1), 3, &[1, 2]),
        (&[UNKNOWN, None], Ok(1), 2, &[1]),
        (&[RO, IO, None], Ok(2), 3, &[2]),
        (&[IO, None, NOENT], Ok(1), 3, &[1]),
        (&[IO, NOENT, None], Err(Errno::NOENT), 2, &[0, 1, 2]),
        (&[IO, RO], Err(Errno::IO), 2, &[0, 1]),
        (&[RO], Err(Errno::IO), 1, &[0]),
    ];
    for (outcomes, answer, asked, left) in cases {
        let expected = (*answer, *asked, left.to_vec());
        assert_eq!(judge(outcomes), expected, "{outcomes:?}");
    }
}

#[test]
fn a_shortage_while_opening_ejects_nobody() {
    let rig = rig(2);
    let answer = rig.set.open("open", |id, _| match id.index() {
        0 => Ok(()),
        _ => Err(Errno::MFILE.into()),
    });
    assert!(answer.is_err_and(|error| error.is(Errno::MFILE)));
    assert_eq!(rig.online(), [0, 1]);
}

#[test]
fn running_out_of_files_is_tried_again_before_a_replica_is_lost() {
    let rig = rig(2);
    let mut refusals = 1;
    let answer = rig.set.apply("open", |id, _| match id.index() {
        1 if refusals > 0 => {
            refusals -= 1;
            Err(Errno::MFILE.into())
        }
        _ => Ok(()),
    });
    assert_eq!(answer.expect("it works the second time").iter().count(), 2);
    assert_eq!(rig.online(), [0, 1]);
}

#[test]
fn a_read_passes_over_replicas_on_which_the_file_is_not_open() {
    let rig = rig(2);
    let second = rig.set.ids().nth(1).expect("two replicas");
    let mut file = rig.create("f").expect("create").into_map()[second].take();
    let files = Handles::new(rig.set.map_ids(|id| if id == second { file.take() } else { None }));
    let stat = rig.set.read("stat", |id, backing| backing.stat(files.get(id)?));
    assert_eq!(stat.expect("from the second").size, 0);
    assert_eq!(rig.set.health(rig.set.primary().expect("online")).read_errors, 0);
}

#[test]
fn a_short_write_ejects_its_replica_and_tells_the_hook_once() {
    let rig = rig(2);
    let told: Arc<Mutex<Vec<(usize, Fault)>>> = Arc::default();
    let ears = told.clone();
    rig.set.on_fault(Box::new(move |id, fault| ears.lock().push((id.index(), fault.clone()))));
    let files = Handles::from(rig.create("f").expect("create"));
    rig.inject(1, "write_at", Injected::ShortWrite(2, Errno::IO));
    for _ in 0..2 {
        let write = |id, backing: &dyn Backing| backing.write_at(files.get(id)?, b"hello", 0);
        rig.set.apply("write", write).expect("one replica is enough");
    }
    assert_eq!(std::fs::read(rig.dirs[0].path().join("f")).expect("read"), b"hello");
    assert_eq!(std::fs::read(rig.dirs[1].path().join("f")).expect("read"), b"he");
    let told = told.lock();
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].0, told[0].1.op, told[0].1.errno), (1, "write", Errno::IO));
    let ejected = rig.set.ids().nth(1).expect("two replicas");
    let health = rig.set.health(ejected);
    assert!(matches!(health.state, State::Offline { fault, .. } if fault == told[0].1));
    assert_eq!(health.write_errors, 1);
}

#[test]
fn an_operation_is_not_acknowledged_before_the_loss_is_recorded() {
    let rig = rig(2);
    let recorded = Arc::new(AtomicUsize::new(0));
    let (begun, begin) = crossbeam_channel::bounded::<()>(0);
    let (go_on, resume) = crossbeam_channel::bounded::<()>(0);
    let record = recorded.clone();
    rig.set.on_fault(Box::new(move |_, _| {
        begun.send(()).expect("the test listens");
        resume.recv().expect("the test answers");
        record.store(1, Ordering::SeqCst);
    }));
    let second = rig.set.ids().nth(1).expect("two replicas");
    std::thread::scope(|scope| {
        scope.spawn(|| rig.set.eject(second, Fault::new("test", Errno::IO)));
        begin.recv().expect("the hook runs");
        let other = scope.spawn(|| {
            rig.set.apply("other", |_, _| Ok(())).expect("it works");
            recorded.load(Ordering::SeqCst)
        });
        go_on.send(()).expect("the hook waits");
        assert_eq!(other.join().expect("no panic"), 1);
    });
}

#[test]
fn the_last_replica_is_never_ejected() {
    let rig = rig(2);
    for id in rig.set.ids() {
        rig.set.eject(id, Fault::new("test", Errno::IO));
    }
    assert_eq!(rig.online(), [1]);
    rig.set.admit(rig.set.ids().next().expect("two replicas"));
    assert_eq!(rig.online(), [0, 1]);
    assert_eq!(rig.set.health(rig.set.primary().expect("online")).state, State::Online);
}

#[test]
fn a_replica_joins_and_leaves_while_the_set_is_in_use() {
    let rig = rig(2);
    let before = Handles::from(rig.create("f").expect("create"));
    let dir = TempDir::new().expect("a directory");
    let newcomer = || {
        let backing = Box::new(DirBacking::open(dir.path()).expect("open"));
        Replica::new(uuid::Uuid::new_v4(), "new", dir.path(), backing)
    };
    let id = rig.set.add(newcomer()).expect("there is a place");
    assert_eq!((rig.set.ids().count(), rig.online()), (3, vec![0, 1]));
    assert!(matches!(rig.set.health(id).state, State::Resyncing { .. }));
    rig.set.admit(id);
    assert!(before.get(id).is_err(), "it was not there when the file was opened");
    assert_eq!(rig.create("g").expect("create").iter().count(), 3);
    assert!(!rig.set.remove(id) && !rig.set.replace(id, newcomer()), "it is in use");
    rig.set.eject(id, Fault::new("test", Errno::IO));
    assert!(rig.set.replace(id, newcomer()));
    assert!(rig.set.remove(id));
    assert_eq!(rig.set.ids().count(), 2);
    assert_eq!(rig.set.add(newcomer()), Some(id));
    assert_eq!(rig.online(), [0, 1]);
}

#[test]
fn a_change_that_no_online_replica_holds_is_not_acknowledged() {
    let rig = rig(2);
    let answer = rig.set.apply("change", |id, _| match id.index() {
        0 => Err(Errno::IO.into()),
        // It succeeds here, while another thread's operation costs us this very replica.
        _ => {
            rig.set.eject(id, Fault::new("other", Errno::IO));
            Ok(())
        }
    });
    assert!(answer.is_err_and(|error| error.is(Errno::IO)));
    assert_eq!(rig.online(), [0]);
}

#[test]
fn a_read_goes_on_to_the_next_replica_and_is_counted() {
    let rig = rig(2);
    let files = Handles::from(rig.create("f").expect("create"));
    rig.inject(0, "read_at", Injected::Error(Errno::IO));
    let read = |id, backing: &dyn Backing| backing.read_at(files.get(id)?, &mut [0; 4], 0);
    assert_eq!(rig.set.read("read", read).expect("from the second"), 0);
    assert_eq!(rig.online(), [0, 1]);
    assert_eq!(rig.set.health(rig.set.primary().expect("online")).read_errors, 1);
    rig.inject(0, "read_at", Injected::Error(Errno::ISDIR));
    assert!(rig.set.read("read", read).is_err_and(|error| error.is(Errno::ISDIR)));
    rig.inject(0, "read_at", Injected::Error(Errno::IO));
    rig.inject(1, "read_at", Injected::Error(Errno::STALE));
    assert!(rig.set.read("read", read).is_err_and(|error| error.is(Errno::IO)));
}

#[test]
fn handles_of_directories_are_kept_until_forgotten() {
    let rig = rig(2);
    rig.set
        .apply("mkdir", |_, backing| {
            let root = backing.open_dir(&RelPath::root())?;
            backing.mkdir(&root, &name("d"), 0o755, Creds::DAEMON)
        })
        .expect("mkdir");
    let path = || Ok(RelPath::parse("d").expect("a valid path"));
    let node = NodeId(7);
    let first = rig.set.dir(node, path).expect("open");
    let again = rig.set.dir(node, || unreachable!("it is kept")).expect("kept");
    assert!(Arc::ptr_eq(&first, &again));
    rig.set.forget_dir(node);
    assert!(!Arc::ptr_eq(&first, &rig.set.dir(node, path).expect("open")));
    let missing = rig.set.dir(NodeId(8), || Ok(RelPath::parse("none").expect("valid")));
    assert!(missing.is_err_and(|error| error.is(Errno::NOENT)));
}

#[test]
fn private_directories_are_made_where_missing() {
    use std::os::unix::fs::PermissionsExt;
    let rig = rig(2);
    for dir in [PrivateDir::Preserved(0xab), PrivateDir::Undo, PrivateDir::Tmp, PrivateDir::Root] {
        let handles = rig.set.private(dir).expect("open");
        assert!(Arc::ptr_eq(&handles, &rig.set.private(dir).expect("kept")));
    }
    for dir in &rig.dirs {
        let made = std::fs::metadata(dir.path().join(".rearview/preserved/ab")).expect("stat");
        assert_eq!(made.permissions().mode() & 0o7777, 0o700);
    }
}

#[test]
fn an_offline_replica_has_no_handles_of_what_was_opened_since() {
    let rig = rig(2);
    let second = rig.set.ids().nth(1).expect("two replicas");
    rig.set.eject(second, Fault::new("test", Errno::IO));
    let files = Handles::from(rig.create("f").expect("create"));
    assert!(!files.has(second));
    assert!(files.get(second).is_err());
    let root = rig.root();
    let open = rig
        .set
        .open("open", |id, backing| backing.open_file(root.get(id)?, &name("f"), Access::Read));
    assert_eq!(open.expect("open").iter().count(), 1);
}

/// A small ext4 on a loop device, unmounted when dropped; `None` where that cannot be had.
struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    fn new() -> Option<SmallDisk> {
        let run = |program: &str, args: &[&str]| {
            let done = Command::new(program).args(args).output();
            done.is_ok_and(|output| output.status.success()).then_some(())
        };
        let dir = TempDir::new().ok()?;
        let image = dir.path().join("image");
        let mounted = dir.path().join("mnt");
        std::fs::create_dir(&mounted).ok()?;
        std::fs::File::create(&image).ok()?.set_len(32 << 20).ok()?;
        let (image, mounted) = (image.to_str()?, mounted.to_str()?);
        run("mkfs.ext4", &["-q", "-F", "-m", "0", image])?;
        run("mount", &["-o", "loop", image, mounted])?;
        Some(SmallDisk { dir })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[test]
fn room_is_refused_before_the_tightest_replica_is_full() {
    if !crate::sys::is_root() {
        return;
    }
    let Some(disk) = SmallDisk::new() else { return };
    let wide = TempDir::new().expect("a directory");
    let replica = |path: &std::path::Path| {
        let backing = Box::new(DirBacking::open(path).expect("open"));
        Replica::new(uuid::Uuid::new_v4(), "r", path, backing)
    };
    let set = ReplicaSet::new(vec![replica(wide.path()), replica(&disk.path())]);
    let space = set.space().expect("space");
    assert_eq!(space.block_bytes, 4096);
    assert!(space.blocks * 4096 < 33 << 20);
    let root = set.dir(NodeId::ROOT, || Ok(RelPath::root())).expect("open");
    let file = set.apply("create", |id, backing| {
        backing.create(root.get(id)?, &name("f"), 0o644, Creds::DAEMON)
    });
    let file = Handles::from(file.expect("create"));
    let block = vec![1; 256 * 1024];
    let mut written = 0;
    while set.ensure_room(block.len() as u64).is_ok() {
        set.apply("write", |id, backing| backing.write_at(file.get(id)?, &block, written))
            .expect("there is room");
        written += block.len() as u64;
    }
    assert!(written > 16 << 20, "{written}");
    assert_eq!(set.online().count(), 2);
    assert!(set.ensure_room(1 << 40).is_err_and(|error| error.is(Errno::NOSPC)));
    assert!(set.space().expect("space").available > 0);
    drop((file, root, set));
}

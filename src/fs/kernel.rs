//! What the kernel keeps of the past and may yet change, and how it is made to forget that.
//!
//! Of the past it keeps what cannot change, and beside that the root's `.snapshots` with the names
//! of the snapshots in it ([`ROOT_SNAPSHOTS`]): else each step below would be asked for along the
//! whole path again. A name that `rmdir` and `mv` of that very directory take away the kernel
//! drops by itself. All others are told to it, before whoever removed or renamed the snapshot by a
//! command hears that it is done.
//!
//! To drop a name the kernel takes the lock of its directory, which it also holds while it waits
//! for us to make or remove something there. So neither a thread that serves it nor one that holds
//! a lock which serving takes may tell it: one thread that has no other work does.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use parking_lot::Mutex;
use rustix::io::Errno;

use super::Filesystem;
use crate::catalog::Snapshot;
use crate::error::{IoContext, Result};
use crate::past::ino::ROOT_SNAPSHOTS;
use crate::types::EntryName;

/// The kernel's memory of a mount.
pub trait KernelCache: Send + Sync {
    /// Drops a name in a directory, and all that is known below it. Waits for what is being done
    /// in the directory.
    fn forget_name(&self, dir: u64, name: &OsStr);
    /// Drops the attributes of an inode. Waits for nothing.
    fn forget_attributes(&self, ino: u64);
    /// Drops the attributes and the content of an inode. Waits for what is being read of it.
    fn forget_object(&self, ino: u64);
}

/// How long a command waits for the kernel to forget: who reads `.snapshots` into memory that he
/// provides himself can hold the directory's lock as long as he likes.
const WAIT: Duration = Duration::from_secs(5);

enum Order {
    Forget(String),
    Tell(Sender<()>),
}

/// Has the kernel forget names of snapshots.
pub(super) struct Forgetting {
    pub(super) cache: Arc<dyn KernelCache>,
    orders: Sender<Order>,
    /// Names that are not forgotten yet.
    waiting: Arc<AtomicUsize>,
    /// Names that the kernel itself is taking away in the root's `.snapshots`.
    own: Mutex<HashSet<EntryName>>,
}

impl Forgetting {
    fn begin(cache: Arc<dyn KernelCache>) -> Result<Forgetting> {
        let (orders, todo) = unbounded();
        let waiting = Arc::new(AtomicUsize::new(0));
        let (teller, left) = (cache.clone(), waiting.clone());
        std::thread::Builder::new()
            .name("rv-forget".into())
            .spawn(move || carry_out(&*teller, &todo, &left))
            .context("start a thread for", "what the kernel is to forget")?;
        Ok(Forgetting { cache, orders, waiting, own: Mutex::default() })
    }

    fn forget(&self, name: &str) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        // The thread lives as long as there is somebody to send.
        let _ = self.orders.send(Order::Forget(name.into()));
    }

    /// Snapshots changed, and these lost their names.
    fn changed(&self, nameless: &[&Snapshot]) {
        for snapshot in nameless {
            let own = EntryName::new(&snapshot.name).is_ok_and(|n| self.own.lock().contains(&n));
            if !own {
                self.forget(&snapshot.name);
            }
        }
        self.cache.forget_attributes(ROOT_SNAPSHOTS.encode());
    }

    /// In the root's `.snapshots` the kernel notes by itself what became of the name.
    fn by_kernel(
        &self,
        parent: u64,
        name: &EntryName,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if parent != ROOT_SNAPSHOTS.encode() {
            let outcome = change();
            self.wait();
            return outcome;
        }
        self.own.lock().insert(name.clone());
        let outcome = change();
        self.own.lock().remove(name);
        // Somebody else took the name away, perhaps in the belief that the kernel does.
        if let (Err(error), Ok(text)) = (&outcome, std::str::from_utf8(name.as_bytes()))
            && error.to_errno() == Errno::NOENT
        {
            self.forget(text);
        }
        outcome
    }

    fn wait(&self) {
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return;
        }
        let (tell, told) = bounded(1);
        let sent = self.orders.send(Order::Tell(tell));
        if sent.is_ok() && told.recv_timeout(WAIT) == Err(RecvTimeoutError::Timeout) {
            log::warn!("the kernel may still show names of snapshots that are gone: it is busy");
        }
    }
}

fn carry_out(cache: &dyn KernelCache, orders: &Receiver<Order>, waiting: &AtomicUsize) {
    for order in orders {
        match order {
            Order::Forget(name) => {
                cache.forget_name(ROOT_SNAPSHOTS.encode(), name.as_ref());
                waiting.fetch_sub(1, Ordering::SeqCst);
            }
            Order::Tell(to) => _ = to.send(()),
        }
    }
}

impl Filesystem {
    /// Says how the kernel is made to forget; once, when it begins to ask.
    pub fn on_forget(&self, cache: Arc<dyn KernelCache>) -> Result<()> {
        let forgetting = Arc::new(Forgetting::begin(cache.clone())?);
        if self.forgetting.set(forgetting.clone()).is_ok() {
            let watch = move |nameless: &[&Snapshot]| forgetting.changed(nameless);
            self.volume.catalog().watch_snapshots(Box::new(watch));
            // The scrub's thread serves nobody, and holds no lock then.
            self.volume.on_healed(Box::new(move |node| cache.forget_object(node.0)));
        }
        Ok(())
    }

    /// Waits until the kernel shows no snapshot by a name that was taken from it before the call.
    /// Not to be called by a thread that serves the kernel.
    pub fn await_forgotten(&self) {
        if let Some(forgetting) = self.forgetting.get() {
            forgetting.wait();
        }
    }

    /// Changes the name of a snapshot as the kernel asks in the directory `parent`.
    pub(super) fn by_kernel(
        &self,
        parent: u64,
        name: &EntryName,
        change: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        match self.forgetting.get() {
            Some(forgetting) => forgetting.by_kernel(parent, name, change),
            None => change(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Generation, NodeId, SnapshotId, Timestamp};

    /// What the kernel was told.
    #[derive(Default)]
    struct Told {
        names: Mutex<Vec<String>>,
        attributes: AtomicUsize,
    }

    impl KernelCache for Told {
        fn forget_name(&self, dir: u64, name: &OsStr) {
            assert_eq!(dir, ROOT_SNAPSHOTS.encode());
            self.names.lock().push(name.to_str().unwrap().into());
        }

        fn forget_attributes(&self, ino: u64) {
            assert_eq!(ino, ROOT_SNAPSHOTS.encode());
            self.attributes.fetch_add(1, Ordering::SeqCst);
        }

        fn forget_object(&self, _: u64) {
            unreachable!("nothing is healed here");
        }
    }

    fn snapshot(name: &str) -> Snapshot {
        Snapshot {
            id: SnapshotId(1),
            name: name.into(),
            generation: Generation(1),
            time: Timestamp::default(),
            automatic: false,
            held: false,
            tags: Vec::new(),
        }
    }

    #[test]
    fn the_kernel_forgets_every_name_but_those_that_it_takes_away_itself() {
        let told = Arc::new(Told::default());
        let forgetting = Forgetting::begin(told.clone()).unwrap();
        let told_of = |names: &[&str]| {
            forgetting.wait();
            assert_eq!(std::mem::take(&mut *told.names.lock()), names);
        };
        let root = ROOT_SNAPSHOTS.encode();
        let below = crate::past::ino::Target::Snapshots(NodeId(9)).encode();
        let name = EntryName::new("a").unwrap();
        let gone = || {
            forgetting.changed(&[&snapshot("a"), &snapshot("b")]);
            Ok(())
        };
        gone().unwrap();
        told_of(&["a", "b"]);
        let by_kernel = |parent| forgetting.by_kernel(parent, &name, gone);
        by_kernel(root).unwrap();
        told_of(&["b"]);
        by_kernel(below).unwrap();
        told_of(&["a", "b"]);
        // Somebody else was first.
        let late = || {
            forgetting.changed(&[&snapshot("a")]);
            Err(Errno::NOENT.into())
        };
        forgetting.by_kernel(root, &name, late).unwrap_err();
        told_of(&["a"]);
        let refused = || Err(Errno::BUSY.into());
        forgetting.by_kernel(root, &name, refused).unwrap_err();
        forgetting.changed(&[]);
        told_of(&[]);
        assert_eq!(told.attributes.load(Ordering::SeqCst), 5);
    }
}

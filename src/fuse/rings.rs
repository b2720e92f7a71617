//! The threads that serve the kernel's queues, where it offers requests over io_uring.
//!
//! An administrator has to allow that (`/sys/module/fuse/parameters/enable_uring`); without it, and
//! for what the kernel sends by its device only (`FORGET`), the library's threads serve all.
//!
//! With two processors (`scripts/bench speed`) an untar took 1,397 ms instead of 1,949, `git clone`
//! 3,937 instead of 6,239, `rm -rf` 1,278 instead of 1,725: one system call for each request
//! instead of two, and who asks and who answers take turns on one processor. Where the threads may
//! go anywhere the last takes a fifth longer, and listings twice as long.
//!
//! A request waits in the queue of the processor it was made on, for nobody else to take. So each
//! queue has threads of its own, and always [`FREE_HANDS`] that are not long away.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};
use parking_lot::Mutex;

use super::convert::errno;
use super::ring_requests::{is_long, serve};
use super::session::guarded;
use crate::fs::Filesystem;
use crate::mountpoint;
use crate::sys::affinity;
use crate::sys::fuse_ring::{Ring, Slot, is_possible};

/// Threads that each queue has at least.
const HANDS_MIN: usize = 4;
/// Of them those that are left for other requests while some wait for what may need these.
const FREE_HANDS: usize = 2;
/// The most processors that we keep threads and memory for; with more the device serves.
const PROCESSORS_MAX: usize = 64;

/// The kernel's queues and who serves them.
pub(super) struct Rings {
    queues: Vec<Arc<Queue>>,
}

struct Queue {
    number: u16,
    fs: Arc<Filesystem>,
    device: Arc<OwnedFd>,
    hands: Mutex<Hands>,
}

#[derive(Default)]
struct Hands {
    /// All that were ever hired.
    threads: Vec<JoinHandle<()>>,
    at_work: usize,
    /// Those of them that are long away.
    away: usize,
}

/// Whether rings can be served here, if the kernel offers them: one queue for each processor that
/// there may ever be.
pub(super) fn can_serve() -> bool {
    processors().is_some_and(|count| count <= PROCESSORS_MAX) && is_possible()
}

/// How many processors there may be, if they are numbered without gaps; `None` where the kernel
/// does not say.
fn processors() -> Option<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible").ok()?;
    let last = text.trim().rsplit(['-', ',']).next()?;
    last.parse::<usize>().ok().map(|last| last + 1)
}

impl Rings {
    /// Serves all queues with some `threads` in all. The kernel holds back every request until each
    /// queue has one; where one could not be had it uses the device.
    pub(super) fn start(
        fs: &Arc<Filesystem>,
        device: OwnedFd,
        threads: usize,
    ) -> std::io::Result<Rings> {
        let device = Arc::new(device);
        let queue = |number| {
            let (fs, device) = (fs.clone(), device.clone());
            Arc::new(Queue { number, fs, device, hands: Mutex::default() })
        };
        // The last one first: if the kernel has fewer, it says so before it has one of each.
        let queues: Vec<_> = (0..processors().unwrap_or(1) as u16).rev().map(queue).collect();
        if let Err(error) = queues.iter().try_for_each(Queue::hire) {
            log::warn!("requests come over /dev/fuse instead of io_uring: {error}");
            refuse(&device)?;
            return Ok(Rings { queues });
        }
        // Twice as many as for the device, for none takes the requests of another queue.
        let more = (2 * threads / queues.len()).max(HANDS_MIN) - 1;
        for queue in queues.iter().flat_map(|queue| std::iter::repeat_n(queue, more)) {
            if let Err(error) = queue.hire() {
                log::warn!("cannot start a thread to serve requests: {error}");
            }
        }
        log::info!("requests come over io_uring");
        Ok(Rings { queues })
    }

    /// Waits until the kernel has ended all of them.
    pub(super) fn join(self) {
        for queue in self.queues {
            loop {
                let Some(thread) = queue.hands.lock().threads.pop() else { break };
                let _ = thread.join();
            }
        }
    }
}

/// Has the kernel use the device: after the first entry that it does not take it waits for no
/// others.
fn refuse(device: &Arc<OwnedFd>) -> std::io::Result<()> {
    let no_queue = u16::MAX;
    match Ring::new(device.clone(), no_queue)?.register() {
        Err(_) => Ok(()),
        Ok(()) => Err(std::io::Error::other("the kernel waits for a queue that nobody serves")),
    }
}

impl Queue {
    /// One thread more, when it is at work.
    fn hire(self: &Arc<Queue>) -> std::io::Result<()> {
        let (begun, at_work) = bounded(1);
        let queue = self.clone();
        let name = format!("rv-ring-{}", self.number);
        let thread = std::thread::Builder::new().name(name).spawn(move || queue.work(&begun))?;
        self.hands.lock().threads.push(thread);
        at_work.recv().unwrap_or_else(|_| Err(std::io::ErrorKind::BrokenPipe.into()))
    }

    fn work(self: &Arc<Self>, begun: &Sender<std::io::Result<()>>) {
        // Where its requests are made: who asks and who answers then take turns on one processor,
        // and neither waits for another to wake up.
        affinity::stay_on(usize::from(self.number));
        let ring = Ring::new(self.device.clone(), self.number);
        let registered = ring.and_then(|mut ring| ring.register().map(|()| ring));
        let mut ring = match registered {
            Ok(ring) => ring,
            Err(error) => return drop(begun.send(Err(error))),
        };
        self.hands.lock().at_work += 1;
        let _ = begun.send(Ok(()));
        let ended = loop {
            let outcome = match ring.wait() {
                Ok(mut slot) => self.answer(&mut slot),
                Err(error) => break error,
            };
            if let Err(error) = ring.answer(outcome) {
                break error;
            }
        };
        self.hands.lock().at_work -= 1;
        // So it is at an unmount.
        let is_unmounted =
            matches!(ended.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED));
        if !is_unmounted {
            // Who waits for its answer, or comes to a queue without threads, would wait for ever.
            log::error!("the mount ends, for a thread that serves requests did: {ended}");
            mountpoint::end_connection(self.fs.mountpoint());
        }
    }

    fn answer(self: &Arc<Self>, slot: &mut Slot<'_>) -> Result<usize, i32> {
        let is_long = is_long(slot);
        if is_long && let Err(error) = self.leave() {
            log::error!("cannot start a thread to serve requests during a snapshot: {error}");
            return Err(libc::EAGAIN);
        }
        let served = guarded(|| serve(&self.fs, slot));
        if is_long {
            self.hands.lock().away -= 1;
        }
        served.map_or(Err(libc::EIO), |served| served.map_err(|error| errno(&error).code()))
    }

    /// A thread is going to be away for long: sees to it that enough are left.
    fn leave(self: &Arc<Self>) -> std::io::Result<()> {
        let are_enough = {
            let mut hands = self.hands.lock();
            hands.away += 1;
            hands.at_work >= hands.away + FREE_HANDS
        };
        if !are_enough {
            self.hire().inspect_err(|_| self.hands.lock().away -= 1)?;
            // A new thread is given what comes from then on; what waits in the queue already is
            // taken by who has answered something.
            self.fs.knock();
        }
        Ok(())
    }
}

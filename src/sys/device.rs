//! Block devices, and whether one goes on working: what it has completed, as the kernel counts it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How many times longer than a call may something takes at most that only its device speaks for.
pub const TURNS: u32 = 20;
/// What ends so soon needs no look at its device, which costs as much as a sync in memory does.
pub const SOON: Duration = Duration::from_millis(10);

/// A block device, as the kernel numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    major: u32,
    minor: u32,
}

impl Device {
    /// The device that an open file's filesystem is on; `None` where that has none of its own.
    pub fn of(file: impl AsFd) -> Option<Device> {
        let dev = rustix::fs::fstat(file).ok()?.st_dev;
        let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
        // Numbers of major 0 are made up.
        (major != 0).then_some(Device { major, minor })
    }

    /// Requests for reading, writing, discarding and flushing that it has completed
    /// (`/sys/dev/block/*/stat`).
    fn completed(self) -> Option<u64> {
        let path = format!("/sys/dev/block/{}:{}/stat", self.major, self.minor);
        let text = std::fs::read_to_string(path).ok()?;
        let fields: Vec<u64> = text.split_whitespace().filter_map(|f| f.parse().ok()).collect();
        let counts = [0, 4, 11, 15].iter().filter_map(|&index| fields.get(index)).copied();
        counts.reduce(u64::wrapping_add)
    }
}

/// Looks at a device now and then.
pub struct Watch {
    device: Option<Device>,
    completed: Option<u64>,
}

impl Watch {
    /// Begins to watch.
    pub fn new(device: Option<Device>) -> Watch {
        Watch { device, completed: device.and_then(Device::completed) }
    }

    /// Whether it has completed anything since the last look; `false` where that cannot be known.
    pub fn has_moved(&mut self) -> bool {
        let before = self.completed;
        self.completed = self.device.and_then(Device::completed);
        self.completed.is_some() && self.completed != before
    }
}

/// By it work that takes long shows that it goes on, and is told not to. Clones are the same.
#[derive(Clone, Default)]
pub struct Alive(Arc<AliveFlags>);

#[derive(Default)]
struct AliveFlags {
    goes_on: AtomicBool,
    is_ended: AtomicBool,
}

impl Alive {
    /// It goes on.
    pub fn tell(&self) {
        self.0.goes_on.store(true, Ordering::Relaxed);
    }

    /// It is to end: what it answers then is of no meaning.
    pub fn end(&self) {
        self.0.is_ended.store(true, Ordering::Relaxed);
    }

    /// Whether it is to.
    pub fn is_ended(&self) -> bool {
        self.0.is_ended.load(Ordering::Relaxed)
    }
}

/// Whether something that takes longer than a call may goes on all the same.
pub struct Signs {
    watch: Watch,
    alive: Alive,
    turns: u32,
}

impl Signs {
    /// Begins to look at the device, and at what the work shows by `alive`.
    pub fn new(device: Option<Device>, alive: Alive) -> Signs {
        Signs { watch: Watch::new(device), alive, turns: 1 }
    }

    /// Whether there was a sign since the last look, each time after as long as a call may take.
    /// What the work itself shows counts for ever, its device for [`TURNS`] times in a row.
    pub fn goes_on(&mut self) -> bool {
        let has_moved = self.watch.has_moved();
        let was_told = self.alive.0.goes_on.swap(false, Ordering::Relaxed);
        self.turns = if was_told { 1 } else { self.turns + 1 };
        was_told || has_moved && self.turns <= TURNS
    }
}

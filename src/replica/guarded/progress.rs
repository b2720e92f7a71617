//! Whether a device goes on working: what it has completed, as the kernel counts it.

use crate::replica::backing::{Backing, DeviceNumber};

/// Looks at one backing's device now and then.
pub(super) struct Watch {
    device: Option<DeviceNumber>,
    completed: Option<u64>,
}

impl Watch {
    /// Begins to watch.
    pub(super) fn new(backing: &dyn Backing) -> Watch {
        let device = backing.device();
        Watch { device, completed: device.and_then(completed) }
    }

    /// Whether it has completed anything since the last look; `false` where that cannot be known.
    pub(super) fn has_moved(&mut self) -> bool {
        let before = self.completed;
        self.completed = self.device.and_then(completed);
        self.completed.is_some() && self.completed != before
    }
}

/// Requests for reading, writing, discarding and flushing that a device or partition has completed
/// (`/sys/dev/block/*/stat`).
fn completed(device: DeviceNumber) -> Option<u64> {
    let path = format!("/sys/dev/block/{}:{}/stat", device.major, device.minor);
    let text = std::fs::read_to_string(path).ok()?;
    let fields: Vec<u64> = text.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    [0, 4, 11, 15].iter().filter_map(|&index| fields.get(index)).copied().reduce(u64::wrapping_add)
}

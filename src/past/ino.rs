//! The inode numbers of the past: what each bit means.
//!
//! ```text
//! live      63..62 = 00   the NodeId (below 2^43)
//! virtual   63..62 = 01   58..61 kind of directory, 0..57 payload (a live directory or a table's
//! id) object    63     = 1    43..62 view slot, 0..42 NodeId
//! ```
//!
//! Slots below [`STABLE_SLOTS`] are the ids of snapshots entered from the mount's root, so their
//! inode numbers survive remounts. The other slots are given out at run time. Two names of one file
//! in one view share their number; no directory has two paths, for the kernel keeps one path for
//! each directory.

use crate::types::NodeId;

const NODE_BITS: u32 = 43;
const KIND_SHIFT: u32 = 58;
const OBJECT: u64 = 1 << 63;
const VIRTUAL: u64 = 1 << 62;

/// Slots below this bound belong to the snapshot of the same id, as seen from the root.
pub const STABLE_SLOTS: u64 = 1 << 19;
/// How many slots there are to give out at run time, from [`STABLE_SLOTS`] on.
pub const DYNAMIC_SLOTS: u64 = 1 << 19;
/// The number of a listed entry whose real one is only made when it is looked up. The kernel and
/// the C library know it as "unknown".
pub const UNKNOWN: u64 = 0xffff_ffff;

/// The `.snapshots` of the mount's root. The kernel keeps it and the names in it that snapshots
/// have; whoever changes one of those by another way than this very directory has the kernel forget
/// the name, and whoever changes any snapshot the directory's attributes.
pub const ROOT_SNAPSHOTS: Target = Target::Snapshots(NodeId::ROOT);

/// What an inode number of the past means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `.snapshots` of a live directory.
    Snapshots(NodeId),
    /// `.snapshots/latest`.
    Latest(NodeId),
    /// `.snapshots/.at`.
    At(NodeId),
    /// `.snapshots/.versions`.
    Versions(NodeId),
    /// `.snapshots/.deleted`.
    Deleted(NodeId),
    /// `.snapshots/.versions/<name>`, by its id in the table of such directories.
    VersionsOf(u64),
    /// One state of one node outside of any view, by its id in the table of moments.
    Moment(u64),
    /// A node as a view shows it.
    Object {
        /// The view's slot.
        slot: u64,
        /// The node.
        node: NodeId,
    },
}

/// Whether `ino` is one of ours and not a live node's.
pub fn is_past(ino: u64) -> bool {
    ino >> 62 != 0
}

/// Whether the directory `ino` shows one generation: what it has in it, and what not, is so for
/// ever.
pub fn is_settled(ino: u64) -> bool {
    matches!(Target::decode(ino), Some(Target::Object { .. }))
}

impl Target {
    /// What `ino` means; `None` for a live node's number and for bits that no number of ours has.
    pub fn decode(ino: u64) -> Option<Target> {
        if ino & OBJECT != 0 {
            let node = NodeId(ino & (NodeId::LIMIT - 1));
            return Some(Target::Object { slot: (ino & !OBJECT) >> NODE_BITS, node });
        }
        if ino & VIRTUAL == 0 {
            return None;
        }
        let payload = ino & ((1 << KIND_SHIFT) - 1);
        Some(match (ino & !VIRTUAL) >> KIND_SHIFT {
            0 => Target::Snapshots(NodeId(payload)),
            1 => Target::Latest(NodeId(payload)),
            2 => Target::At(NodeId(payload)),
            3 => Target::Versions(NodeId(payload)),
            4 => Target::Deleted(NodeId(payload)),
            5 => Target::VersionsOf(payload),
            6 => Target::Moment(payload),
            _ => return None,
        })
    }

    /// The inode number.
    pub fn encode(self) -> u64 {
        let (kind, payload) = match self {
            Target::Snapshots(dir) => (0, dir.0),
            Target::Latest(dir) => (1, dir.0),
            Target::At(dir) => (2, dir.0),
            Target::Versions(dir) => (3, dir.0),
            Target::Deleted(dir) => (4, dir.0),
            Target::VersionsOf(id) => (5, id),
            Target::Moment(id) => (6, id),
            Target::Object { slot, node } => {
                assert!(slot < STABLE_SLOTS + DYNAMIC_SLOTS, "a slot has 20 bits");
                assert!(node.0 < NodeId::LIMIT, "a node id has 43 bits");
                return OBJECT | slot << NODE_BITS | node.0;
            }
        };
        assert!(payload < 1 << KIND_SHIFT, "a payload has 58 bits");
        VIRTUAL | kind << KIND_SHIFT | payload
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_decode_to_what_they_encode_and_never_meet_live_ones() {
        let dir = NodeId(NodeId::LIMIT - 1);
        let last = STABLE_SLOTS + DYNAMIC_SLOTS - 1;
        for target in [
            Target::Snapshots(NodeId::ROOT),
            Target::Snapshots(dir),
            Target::Latest(dir),
            Target::At(dir),
            Target::Versions(dir),
            Target::Deleted(dir),
            Target::VersionsOf(0),
            Target::Moment((1 << KIND_SHIFT) - 1),
            Target::Object { slot: 0, node: NodeId::ROOT },
            Target::Object { slot: last, node: dir },
        ] {
            assert_eq!(Target::decode(target.encode()), Some(target));
            assert!(is_past(target.encode()));
        }
        assert!(is_settled(Target::Object { slot: last, node: dir }.encode()));
        assert!(!is_settled(Target::Snapshots(dir).encode()) && !is_settled(dir.0));
        assert!(!is_past(dir.0) && Target::decode(dir.0).is_none());
        assert!(!is_past(UNKNOWN));
    }
}

//! The operations of the model test, with indices that pick among what exists.

use proptest::prelude::*;

/// One operation. `usize` picks an existing object modulo their count; names come from a small
/// pool, so that they meet.
#[derive(Clone, Debug)]
pub enum Op {
    Create {
        dir: usize,
        name: u8,
        keep_open: bool,
    },
    Mkdir {
        dir: usize,
        name: u8,
    },
    Symlink {
        dir: usize,
        name: u8,
    },
    Fifo {
        dir: usize,
        name: u8,
    },
    Write {
        file: usize,
        offset: u32,
        length: u32,
        fill: u8,
    },
    Truncate {
        file: usize,
        size: u32,
    },
    OpenTruncate {
        file: usize,
    },
    Punch {
        file: usize,
        offset: u32,
        length: u32,
        zero: bool,
    },
    Copy {
        from: usize,
        to: usize,
        from_offset: u32,
        to_offset: u32,
        length: u32,
    },
    Open {
        file: usize,
    },
    WriteOpen {
        handle: usize,
        offset: u32,
        length: u32,
        fill: u8,
    },
    Flush {
        handle: usize,
    },
    Fsync {
        handle: usize,
    },
    Close {
        handle: usize,
    },
    Unlink {
        dir: usize,
        name: u8,
    },
    Rmdir {
        dir: usize,
        name: u8,
    },
    Rename {
        dir: usize,
        name: u8,
        to_dir: usize,
        to_name: u8,
        mode: u8,
    },
    Link {
        file: usize,
        dir: usize,
        name: u8,
    },
    Chmod {
        node: usize,
        mode: u16,
    },
    SetXattr {
        node: usize,
        name: u8,
        value: u8,
    },
    RemoveXattr {
        node: usize,
        name: u8,
    },
    SetTimes {
        node: usize,
        secs: i32,
    },
    /// Makes or overwrites a file that has no history.
    Scratch {
        dir: usize,
        name: u8,
        fill: u8,
        length: u32,
    },
    /// Renames such a file to a plain name, as editors save: it has history from then on.
    Save {
        dir: usize,
        name: u8,
        to: u8,
    },
    /// Renames a plain file so that it has no history from then on.
    Hide {
        dir: usize,
        name: u8,
        to: u8,
    },
    Snapshot,
    RenameSnapshot {
        snapshot: usize,
    },
    DeleteSnapshot {
        snapshot: usize,
    },
    /// Remembers the present generation.
    Freeze,
    /// Lets pending changes be committed.
    Commit,
    Remount,
    /// Packs and sweeps all there is to.
    Tidy,
    /// Forgets every moment but one in `every`; snapshots stay.
    Thin {
        every: usize,
    },
    /// Packs, and dies after so many steps of it.
    DieWhilePacking {
        steps: usize,
    },
    /// Compares everything now.
    Compare,
}

/// Offsets meet block boundaries, the middle of blocks, and holes.
fn offset() -> impl Strategy<Value = u32> {
    prop_oneof![0..200u32, 4000..4200u32, 8000..8300u32, 0..40_000u32]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![1..64u32, 4090..4100u32, 1..20_000u32]
}

/// What is done with files that have no history.
fn excluded() -> impl Strategy<Value = Op> {
    let (at, name, to) = (0..64usize, 0..6u8, 0..3u8);
    prop_oneof![
        3 => (at.clone(), to.clone(), any::<u8>(), length())
            .prop_map(|(dir, name, fill, length)| Op::Scratch { dir, name, fill, length }),
        3 => (at.clone(), to.clone(), name.clone())
            .prop_map(|(dir, name, to)| Op::Save { dir, name, to }),
        1 => (at, name, to).prop_map(|(dir, name, to)| Op::Hide { dir, name, to }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let at = 0..64usize;
    let name = 0..6u8;
    prop_oneof![
        6 => (at.clone(), name.clone(), any::<bool>())
            .prop_map(|(dir, name, keep_open)| Op::Create { dir, name, keep_open }),
        3 => (at.clone(), name.clone()).prop_map(|(dir, name)| Op::Mkdir { dir, name }),
        1 => (at.clone(), name.clone()).prop_map(|(dir, name)| Op::Symlink { dir, name }),
        1 => (at.clone(), name.clone()).prop_map(|(dir, name)| Op::Fifo { dir, name }),
        8 => (at.clone(), offset(), length(), any::<u8>())
            .prop_map(|(file, offset, length, fill)| Op::Write { file, offset, length, fill }),
        3 => (at.clone(), prop_oneof![Just(0), offset()])
            .prop_map(|(file, size)| Op::Truncate { file, size }),
        2 => at.clone().prop_map(|file| Op::OpenTruncate { file }),
        2 => (at.clone(), offset(), length(), any::<bool>())
            .prop_map(|(file, offset, length, zero)| Op::Punch { file, offset, length, zero }),
        2 => (at.clone(), at.clone(), offset(), offset(), length()).prop_map(
            |(from, to, from_offset, to_offset, length)| Op::Copy {
                from, to, from_offset, to_offset, length
            }
        ),
        4 => at.clone().prop_map(|file| Op::Open { file }),
        8 => (at.clone(), offset(), length(), any::<u8>())
            .prop_map(|(handle, offset, length, fill)| {
                Op::WriteOpen { handle, offset, length, fill }
            }),
        2 => at.clone().prop_map(|handle| Op::Flush { handle }),
        1 => at.clone().prop_map(|handle| Op::Fsync { handle }),
        3 => at.clone().prop_map(|handle| Op::Close { handle }),
        4 => (at.clone(), name.clone()).prop_map(|(dir, name)| Op::Unlink { dir, name }),
        2 => (at.clone(), name.clone()).prop_map(|(dir, name)| Op::Rmdir { dir, name }),
        6 => (at.clone(), name.clone(), at.clone(), name.clone(), 0..6u8).prop_map(
            |(dir, name, to_dir, to_name, mode)| Op::Rename { dir, name, to_dir, to_name, mode }
        ),
        3 => (at.clone(), at.clone(), name.clone())
            .prop_map(|(file, dir, name)| Op::Link { file, dir, name }),
        2 => (at.clone(), 0..0o1000u16).prop_map(|(node, mode)| Op::Chmod { node, mode }),
        2 => (at.clone(), 0..3u8, any::<u8>())
            .prop_map(|(node, name, value)| Op::SetXattr { node, name, value }),
        1 => (at.clone(), 0..3u8).prop_map(|(node, name)| Op::RemoveXattr { node, name }),
        1 => (at.clone(), any::<i32>()).prop_map(|(node, secs)| Op::SetTimes { node, secs }),
        5 => Just(Op::Snapshot),
        3 => Just(Op::Tidy),
        1 => (1..4usize).prop_map(|every| Op::Thin { every }),
        1 => (0..12usize).prop_map(|steps| Op::DieWhilePacking { steps }),
        1 => at.clone().prop_map(|snapshot| Op::RenameSnapshot { snapshot }),
        1 => at.clone().prop_map(|snapshot| Op::DeleteSnapshot { snapshot }),
        4 => Just(Op::Freeze),
        2 => Just(Op::Commit),
        1 => Just(Op::Remount),
        1 => Just(Op::Compare),
    ]
}

/// A sequence of operations, every second one on a store with excluded files.
pub fn ops() -> impl Strategy<Value = Vec<Op>> {
    prop_oneof![
        proptest::collection::vec(op(), 1..80),
        proptest::collection::vec(prop_oneof![5 => op(), 1 => excluded()], 1..80),
    ]
}

impl Op {
    /// Whether it needs a store that excludes something.
    pub fn wants_excludes(&self) -> bool {
        matches!(self, Op::Scratch { .. } | Op::Save { .. } | Op::Hide { .. })
    }
}

//! What a power cut may leave on a disk.
//!
//! | filesystem | names and attributes | data |
//! |--|--|--|
//! | `Ordered` (XFS) | the changes up to some point, past every sync | not synced: any pages |
//! | `Ordered` (ext4) | the same; an append within the last page is one, its bytes are not | same |
//! | `Copying` (btrfs) | up to some point; after it, what was synced and its names alone | same |
//! | `Kept` | all: only the process died | all |
//!
//! A page that was not synced is kept, lost, or torn between two sectors. Measured on the real
//! ones: ext4 and XFS keep the order of names whatever is synced; btrfs' log makes a synced file
//! durable without what came before it.

use std::collections::BTreeMap;

use super::dice::Dice;
use super::tree::{Body, Change, Event, Ino, PAGE, Place, ROOT, Tree, put};

/// The unit that a disk writes whole.
const SECTOR: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    Kept,
    Ext4,
    Xfs,
    Btrfs,
}

/// How much of what was not synced is on the disk.
#[derive(Clone, Copy, Debug)]
struct Luck {
    page: usize,
    torn: usize,
}

/// The disk after a cut: `log` holds all that was asked of it since it held `before`.
pub fn persisted(before: &Tree, log: &[Event], policy: Policy, dice: &mut Dice) -> Tree {
    if policy == Policy::Kept {
        let mut tree = before.clone();
        log.iter().for_each(|event| tree.apply(event));
        return tree;
    }
    let luck = Luck {
        page: [0, 0, 50, 80, 100][dice.below(5)],
        torn: if dice.percent(30) { 20 } else { 0 },
    };
    match policy {
        Policy::Btrfs => copying(before, log, luck, dice),
        _ => {
            let ext4 = policy == Policy::Ext4;
            let least = ordered_least(before, log);
            ordered(before, log, pick(least, log.len(), dice), ext4, luck, dice)
        }
    }
}

/// A point between two: often one of the ends, which are what differs most from the rest.
fn pick(least: usize, most: usize, dice: &mut Dice) -> usize {
    match dice.below(4) {
        0 => least,
        1 => most,
        _ => dice.between(least, most),
    }
}

/// The objects whose own record a change writes anew.
fn touched(tree: &Tree, change: &Change) -> Vec<Ino> {
    match change {
        Change::Make { ino, at, .. } | Change::Link { ino, at } => vec![*ino, at.dir],
        Change::Remove { at } => tree.find(at).into_iter().chain([at.dir]).collect(),
        Change::Rename { from, to, .. } => {
            let named = [tree.find(from), tree.find(to)].into_iter().flatten();
            named.chain([from.dir, to.dir]).collect()
        }
        Change::Attributes { ino, .. }
        | Change::Xattr { ino, .. }
        | Change::Size { ino, .. }
        | Change::Write { ino, .. }
        | Change::Zero { ino, .. } => vec![*ino],
        Change::Sync { .. } | Change::SyncAll => Vec::new(),
    }
}

/// Whether `fdatasync` must write the object's record: without it the data could not be read.
fn data_needs_record(tree: &mut Tree, change: &Change) -> bool {
    match change {
        Change::Make { .. } | Change::Size { .. } | Change::Zero { .. } => true,
        Change::Write { ino, at, bytes } => {
            tree.file(*ino).is_none_or(|content| content.len() < at + bytes.len())
        }
        _ => false,
    }
}

/// How many changes are durable at least: a sync takes along all up to its object's last change.
fn ordered_least(before: &Tree, log: &[Event]) -> usize {
    let mut live = before.clone();
    let mut least = 0;
    let mut last: BTreeMap<Ino, usize> = BTreeMap::new();
    let mut last_data: BTreeMap<Ino, usize> = BTreeMap::new();
    for (index, event) in log.iter().enumerate() {
        match &event.change {
            Change::Sync { ino, data_only } => {
                let needed = if *data_only { last_data.get(ino) } else { last.get(ino) };
                least = least.max(needed.map_or(0, |index| index + 1));
            }
            Change::SyncAll => least = index + 1,
            change => {
                let data = data_needs_record(&mut live, change);
                for ino in touched(&live, change) {
                    last.insert(ino, index);
                    if data {
                        last_data.insert(ino, index);
                    }
                }
            }
        }
        live.apply(event);
    }
    least
}

/// Up to where each file's data is durable.
fn data_durable(log: &[Event]) -> (BTreeMap<Ino, usize>, usize) {
    let mut own = BTreeMap::new();
    let mut all = 0;
    for (index, event) in log.iter().enumerate() {
        match event.change {
            Change::Sync { ino, .. } => {
                own.insert(ino, index);
            }
            Change::SyncAll => all = index,
            _ => {}
        }
    }
    (own, all)
}

/// Names and attributes up to `until`, and of the data what was synced and what was lucky.
fn ordered(
    before: &Tree,
    log: &[Event],
    until: usize,
    ext4: bool,
    luck: Luck,
    dice: &mut Dice,
) -> Tree {
    let (own, all) = data_durable(log);
    let mut tree = before.clone();
    // Where a file was cut short, but not on the disk: no later write reaches what lies behind.
    let mut cut_short: BTreeMap<Ino, usize> = BTreeMap::new();
    for (index, event) in log.iter().enumerate() {
        match &event.change {
            Change::Write { ino, at, bytes } => {
                let durable = own.get(ino).copied().unwrap_or(0).max(all);
                if index < durable {
                    tree.apply(event);
                    continue;
                }
                if index < until {
                    tree.touch(*ino, true, event.when);
                }
                let Some(content) = tree.file(*ino) else { continue };
                let size = content.len();
                let limit = match index < until {
                    true => usize::MAX,
                    false => cut_short.get(ino).copied().unwrap_or(size).min(size),
                };
                let tail = size.next_multiple_of(PAGE);
                if ext4 && index < until && size < at + bytes.len() && *at < tail && size > 0 {
                    content.resize((at + bytes.len()).min(tail), 0);
                }
                lucky(content, *at, bytes, limit, luck, dice);
            }
            Change::Size { ino, size } if index >= until => {
                let least = cut_short.entry(*ino).or_insert(usize::MAX);
                *least = (*least).min(*size);
            }
            _ if index < until => tree.apply(event),
            _ => {}
        }
    }
    tree
}

/// Applies each page of a write or does not; nothing at or behind `limit`.
fn lucky(
    content: &mut Vec<u8>,
    at: usize,
    bytes: &[u8],
    limit: usize,
    luck: Luck,
    dice: &mut Dice,
) {
    let mut start = at;
    let end = at + bytes.len();
    while start < end {
        let page_end = ((start / PAGE + 1) * PAGE).min(end);
        if dice.percent(luck.page) {
            let torn = dice.percent(luck.torn);
            let sector_end = (start / SECTOR + 1 + dice.below(PAGE / SECTOR)) * SECTOR;
            let stop = if torn { page_end.min(sector_end) } else { page_end }.min(limit);
            if start < stop {
                put(content, start, &bytes[start - at..stop - at]);
            }
        }
        start = page_end;
    }
}

/// A transaction, and after it the log of what was synced.
fn copying(before: &Tree, log: &[Event], luck: Luck, dice: &mut Dice) -> Tree {
    let committed = log.iter().rposition(|event| matches!(event.change, Change::SyncAll));
    let mut base = pick(committed.map_or(0, |index| index + 1), log.len(), dice);
    loop {
        let mut tree = ordered(before, &log[..base], base, false, luck, dice);
        let mut live = before.clone();
        log[..base].iter().for_each(|event| live.apply(event));
        let mut again = None;
        for (index, event) in log.iter().enumerate().skip(base) {
            live.apply(event);
            if let Change::Sync { ino, .. } = event.change
                && !log_synced(&mut tree, &live, ino)
            {
                again = Some(index + 1);
                break;
            }
        }
        match again {
            // What the log cannot say makes a whole transaction of it.
            Some(index) => base = index,
            None => return tree,
        }
    }
}

/// Brings one object, as it is, and its names to the disk; `false` if the log cannot say that.
fn log_synced(tree: &mut Tree, live: &Tree, ino: Ino) -> bool {
    let Some(inode) = live.inodes.get(&ino) else { return true };
    if matches!(inode.body, Body::Dir(_)) {
        return false;
    }
    let places = live.places(ino);
    let taken = |place: &Place| tree.find(place).is_some_and(|other| other != ino);
    if places.iter().any(taken) {
        return false;
    }
    for place in tree.places(ino) {
        if !places.contains(&place) {
            tree.leave(&place);
        }
    }
    tree.inodes.insert(ino, inode.clone());
    places.iter().all(|place| {
        let there = log_parent(tree, live, place.dir);
        tree.enter(place, ino);
        there
    })
}

/// Brings a directory to the disk that is not there yet, without what is in it.
fn log_parent(tree: &mut Tree, live: &Tree, dir: Ino) -> bool {
    if dir == ROOT || tree.inodes.contains_key(&dir) {
        return true;
    }
    let (Some(inode), [place]) = (live.inodes.get(&dir), &live.places(dir)[..]) else {
        return false;
    };
    let mut inode = inode.clone();
    inode.body = Body::Dir(BTreeMap::new());
    tree.inodes.insert(dir, inode);
    if tree.find(place).is_some() {
        return false;
    }
    let there = log_parent(tree, live, place.dir);
    tree.enter(place, dir);
    there
}

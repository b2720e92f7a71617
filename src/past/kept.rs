//! What is kept at hand of the past, for us and by the kernel, and what becomes of it in a purge.

use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::ino::Target;
use super::{Known, Past, target};
use crate::error::Result;
use crate::types::NodeId;

impl Past {
    /// Has the states of these entries of the directory `dir` at hand, which shows one generation
    /// ([`super::ino::is_settled`]): one question instead of one for each.
    pub fn expect(&self, dir: u64, entries: &[u64]) -> Result<()> {
        let Target::Object { slot, .. } = target(dir)? else { return Err(Errno::NOTDIR.into()) };
        let missing: Vec<(u64, NodeId)> = {
            let mut tables = self.tables.lock();
            let unknown = entries.iter().filter(|ino| tables.known.get(ino).is_none());
            let node_of = |&ino: &u64| match Target::decode(ino) {
                Some(Target::Object { node, .. }) => Some((ino, node)),
                _ => None,
            };
            unknown.filter_map(node_of).collect()
        };
        if missing.is_empty() {
            return Ok(());
        }
        let at = self.view(slot)?.generation;
        let nodes: Vec<NodeId> = missing.iter().map(|(_, node)| *node).collect();
        let states = self.catalog().states_at(at, &nodes)?;
        let mut tables = self.tables.lock();
        for ((ino, _), state) in missing.into_iter().zip(states) {
            if let Some((row, links)) = state {
                tables.known.put(ino, Known { row, nlink: links.max(1) });
            }
        }
        Ok(())
    }

    /// Whether nothing was taken out of what the kernel may have in memory of a directory of one
    /// generation.
    pub fn is_whole(&self) -> bool {
        !self.was_purged.load(Ordering::Acquire)
    }

    /// Forgets what is kept at hand of the past, for a part of it was removed, and gives the live
    /// directories below which the kernel may have kept some of it.
    pub fn forget(&self) -> Vec<NodeId> {
        // First: what the kernel asks for from here on it may not keep.
        self.was_purged.store(true, Ordering::Release);
        let mut tables = self.tables.lock();
        tables.known.clear();
        tables.births.clear();
        tables.swept.clear();
        // The kernel, which knows the root's `.snapshots`, enters there without asking.
        let others = tables.entered.iter().map(|(dir, ())| *dir).filter(|dir| *dir != NodeId::ROOT);
        let entered = others.chain([NodeId::ROOT]).collect();
        tables.entered.clear();
        entered
    }
}

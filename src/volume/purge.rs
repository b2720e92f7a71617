//! Removing objects from all history, on request.
//!
//! What is live stays: its present state begins anew, and all that was before it goes. If we die on
//! the way, a part has gone; asked for again, the rest does. What is then to be emptied of bytes
//! that history has forgotten is on record before that, so that the background work does it if we
//! cannot.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::catalog::{Change, Durability, ForgetChange, PurgeRow};
use crate::error::{Error, Result};
use crate::types::{ContentId, Generation, NodeId, PackId};

use super::Volume;

/// Objects whose present states begin anew in one push.
const NODES_MAX: usize = 512;
/// Removals between two durable commits, after which files are removed.
const STEPS_MAX: usize = 256;
/// The place in the catalog of what is to be emptied; an empty text where nothing is.
const META_KEY: &str = "purge";
/// How long it is waited until nobody changes anything.
const CUT_WAIT: Duration = Duration::from_secs(2);

impl Volume {
    /// Removes all past states and names of these nodes, and records `rows` when that is done. When
    /// it returns, the bytes that only they had have left the disks in use.
    pub fn purge(&self, nodes: &[NodeId], rows: Vec<PurgeRow>) -> Result<()> {
        // What history may have to yield for is done while it can.
        self.carry_out_all();
        // Whoever packs or forgets does so alone.
        let _alone = self.maintenance.lock();
        self.settle()?;
        for nodes in nodes.chunks(NODES_MAX) {
            self.begin_anew(nodes)?;
        }
        self.note_before(nodes)?;
        let last = self.forget_nodes(nodes)?;
        // What is known of the times and actors of what went goes with the sweep.
        self.catalog().sweep_again(Generation(0), last)?;
        let told: Vec<String> = rows
            .iter()
            .map(|row| format!("{} ({} versions, {} bytes)", row.path, row.versions, row.bytes))
            .collect();
        let rows = rows.into_iter().map(|row| Change::Forget(ForgetChange::Purged(row)));
        self.catalog().push(rows.collect())?;
        self.remove_useless()?;
        self.catalog().flush(Durability::Durable)?;
        self.history.forget_maps();
        log::warn!("purged from all history: {}", told.join(", "));
        let emptied = self.finish_purges();
        // Whoever purges must not believe that the bytes are gone while they are not.
        let left = self.history.useless_count();
        if left > 0 {
            return Err(Error::Refused(format!(
                "{left} preserved files cannot be removed: the log names them; see to the \
                 backings, unmount and run `rearview check`"
            )));
        }
        emptied.map_err(|error| {
            Error::Refused(format!(
                "history shows it no more, but overwritten bytes of it are still on the disks, \
                 until what lies beside them is packed: {error}; see to it that there is room: it \
                 is tried again in the background, and by `rearview prune`"
            ))
        })
    }

    /// Puts on record what is in use of packs, and of streams with before-images of these nodes; of
    /// what an earlier purge could not empty it stays what that said. Durable with what follows.
    fn note_before(&self, nodes: &[NodeId]) -> Result<()> {
        let mut before = self.purges_begun()?.unwrap_or_default();
        for pack in self.catalog().packs()? {
            before.packs.entry(pack.id).or_insert(pack.live);
        }
        for (stream, bytes) in self.catalog().streams_of(nodes)? {
            before.streams.entry(stream).or_insert(bytes);
        }
        let value = serde_json::to_string(&before)
            .map_err(|error| Error::Refused(format!("cannot write what is purged: {error}")))?;
        self.catalog().push(vec![Change::MetaPut { key: META_KEY, value }])?;
        Ok(())
    }

    /// What purges that are not finished left on record.
    fn purges_begun(&self) -> Result<Option<Before>> {
        let text = self.catalog().meta(META_KEY)?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    /// Gets the bytes that purges made useless off the disks, if some are left. The caller keeps
    /// others from packing.
    pub(super) fn finish_purges(&self) -> Result<()> {
        let Some(before) = self.purges_begun()? else { return Ok(()) };
        self.empty_segments_and_packs(&before)?;
        self.catalog().push(vec![Change::MetaPut { key: META_KEY, value: String::new() }])?;
        Ok(())
    }

    /// Gets what was forgotten out of undo segments, and out of packs that have less in use than
    /// `before` says. What others need of them is copied, and what takes no room comes first. If we
    /// die on the way, each file is there as long as the catalog may need it.
    fn empty_segments_and_packs(&self, before: &Before) -> Result<()> {
        let undo = self.history.undo();
        let until = {
            // Nobody appends, so no row is on its way: all segments up to here are complete. Not
            // waited for long: whoever changes something may wait for room, and that for us.
            self.carry_out_all();
            let cut = self.cut.try_write_for(CUT_WAIT);
            let _cut = cut.ok_or_else(|| Error::InUse("changes are going on".into()))?;
            self.carry_out_all();
            undo.rotate(self.replicas())?;
            undo.first_open()
        };
        self.remove_segments()?;
        let is_over = || self.check_stop().is_err();
        let step = |step: &str| self.check_stop_after(step);
        self.packer(&|_| Ok(())).repack(0)?;
        self.packer(&step).until(&is_over).segments()?;
        self.packer(&step).until(&is_over).restream(&before.streams)?;
        self.packer(&step).until(&is_over).repack_since(&before.packs)?;
        let left = undo.complete(self.replicas())?.into_iter().filter(|&one| one < until).count();
        match left {
            0 => Ok(()),
            _ => Err(Error::Refused(format!("{left} undo segments cannot be packed"))),
        }
    }

    /// Takes all past states and names of these nodes out of history. Files that this makes useless
    /// are left to the caller, but those of many nodes are removed on the way. Returns the last
    /// generation in which any of it ended.
    pub(super) fn forget_nodes(&self, nodes: &[NodeId]) -> Result<Generation> {
        let mut last = Generation(0);
        for (index, &node) in nodes.iter().enumerate() {
            loop {
                let step = self.catalog().plan_purge(node)?;
                last = step.changes.iter().filter_map(ended).fold(last, Generation::max);
                if !step.changes.is_empty() {
                    self.catalog().push(step.changes)?;
                }
                self.history.note_useless(step.unpreserved);
                if step.done {
                    break;
                }
            }
            if index % STEPS_MAX == STEPS_MAX - 1 {
                self.remove_useless()?;
            }
        }
        Ok(last)
    }

    /// Lets the present states and names of live nodes begin now: those before end with them.
    fn begin_anew(&self, nodes: &[NodeId]) -> Result<()> {
        let _cut = self.stop_changes();
        // Else the new state would be taken for the old one's burst.
        self.catalog().freeze();
        let mut changes = Vec::new();
        for &node in nodes {
            if !self.catalog().is_versioned(node)? {
                continue;
            }
            changes.extend(self.catalog().node(node)?.map(Change::NodePut));
            for (parent, name) in self.catalog().names(node)? {
                if self.catalog().entry_is_versioned(parent, &name)? == Some(true) {
                    changes.push(Change::EntryRemove { parent, name: name.clone() });
                    changes.push(Change::EntryAdd { parent, name, node });
                }
            }
        }
        if !changes.is_empty() {
            self.catalog().push(changes)?;
        }
        Ok(())
    }
}

/// What was in use before a purge, in bytes.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Before {
    packs: HashMap<PackId, u64>,
    /// Streams that have before-images of what is purged, with all that they have.
    streams: HashMap<ContentId, u64>,
}

/// Where what a change takes out ended.
fn ended(change: &Change) -> Option<Generation> {
    match change {
        Change::Forget(ForgetChange::State { died, .. } | ForgetChange::Entry { died, .. }) => {
            Some(*died)
        }
        _ => None,
    }
}

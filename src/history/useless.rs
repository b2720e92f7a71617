//! Preserved files that nothing needs any more, from when the catalog says so until they are gone.
//!
//! Whoever forgets or packs a content puts its file here at once. Stopped before the file went, it
//! goes with the next ones, or at the latest when the volume is closed. If we die, recovery finds
//! the file by what the catalog says of its content.

use std::collections::VecDeque;

use super::packer::Step;
use super::{History, preserved_dir, preserved_name, remove_leftover};
use crate::catalog::{Catalog, Durability};
use crate::error::Result;
use crate::replica::ReplicaSet;
use crate::types::{ContentId, NodeId};

/// When so many could not be removed, no more are tried for now: it is not the files.
const FAILED_MAX: usize = 3;

impl History {
    /// The files of these contents are of no use: changes that say so were pushed to the catalog.
    pub fn note_useless(&self, contents: impl IntoIterator<Item = (NodeId, ContentId)>) {
        self.useless.lock().extend(contents);
    }

    /// How many such files are left.
    pub fn useless_count(&self) -> usize {
        self.useless.lock().len()
    }

    /// Removes the files that are of no use, once the catalog says so durably, with a call of
    /// `step` after each. One that cannot be removed keeps nobody from anything: it stays on the
    /// list, as all do that are left when a step fails.
    pub fn remove_useless(
        &self,
        replicas: &ReplicaSet,
        catalog: &Catalog,
        step: Step<'_>,
    ) -> Result<()> {
        let mut going = std::mem::take(&mut *self.useless.lock());
        if going.is_empty() {
            return Ok(());
        }
        let outcome = self.remove_all(replicas, catalog, &mut going, step);
        self.useless.lock().extend(going);
        outcome
    }

    fn remove_all(
        &self,
        replicas: &ReplicaSet,
        catalog: &Catalog,
        going: &mut VecDeque<(NodeId, ContentId)>,
        step: Step<'_>,
    ) -> Result<()> {
        catalog.flush(Durability::Durable)?;
        self.forget_maps();
        let mut failed = 0;
        for _ in 0..going.len() {
            let Some((node, content)) = going.pop_front() else { break };
            let dir = replicas.private(preserved_dir(node));
            let name = preserved_name(node, content);
            if let Err(error) = dir.and_then(|dir| remove_leftover(replicas, &dir, &name)) {
                log::warn!("the file of content {content} of node {node} stays: {error}");
                going.push_back((node, content));
                failed += 1;
                if failed == FAILED_MAX {
                    break;
                }
                continue;
            }
            step("an original was removed")?;
        }
        Ok(())
    }
}

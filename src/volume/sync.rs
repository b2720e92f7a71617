//! Making one object durable on all replicas.

use crate::error::Result;
use crate::replica::{Handles, PrivateDir, SyncAll};
use crate::types::NodeId;

use super::Volume;
use super::nodes::replaced::{Moment, Replaced};

/// A sync that is under way.
#[must_use]
pub(super) struct Syncing<'a> {
    all: SyncAll<'a>,
    whole: Option<(&'a Replaced, Moment)>,
}

impl Syncing<'_> {
    /// Waits until the object is durable.
    pub fn wait(self) -> Result<()> {
        self.all.wait()?;
        if let Some((replaced, begun)) = self.whole {
            replaced.settle(begun);
        }
        Ok(())
    }
}

impl Volume {
    /// Begins to make an object durable on every replica, by its handles.
    pub(super) fn begin_sync_of(
        &self,
        node: NodeId,
        object: &Handles,
        data_only: bool,
    ) -> Syncing<'_> {
        let replaced = &self.nodes.replaced;
        match replaced.concerns(node) {
            None => Syncing { all: self.replicas().begin_sync(object, data_only), whole: None },
            Some(begun) => {
                let all = self.replicas().begin_sync_whole(object, data_only);
                Syncing { all, whole: Some((replaced, begun)) }
            }
        }
    }

    /// A rename or a link gave one of these a name: see [`Replaced`]. To be called with the locks
    /// that it was done under.
    pub(super) fn note_replaced(&self, nodes: &[NodeId]) {
        if !self.replicas().order_names() {
            self.nodes.replaced.note(nodes);
        }
    }

    /// Makes durable, if it is not yet, that the file of a node that was emptied was moved aside:
    /// to be called before anything of a content that is sealed since then is preserved.
    ///
    /// To sync that alone takes nothing else to the disk. After a power cut its bytes would be
    /// found as those of a later content of a file that was overwritten and never moved, and shown
    /// for bytes of the older ones.
    pub(super) fn settle_emptied(&self, node: NodeId) -> Result<()> {
        let emptied = &self.nodes.emptied;
        if emptied.concerns(node).is_none() {
            return Ok(());
        }
        // Who waits for another's sync mostly needs none of its own.
        let _settling = self.nodes.settling.lock();
        let Some(begun) = emptied.concerns(node) else { return Ok(()) };
        // From there all of these took their names.
        let tmp = self.replicas().private(PrivateDir::Tmp)?;
        self.replicas().begin_sync_whole(&tmp, false).wait()?;
        emptied.settle(begun);
        Ok(())
    }
}

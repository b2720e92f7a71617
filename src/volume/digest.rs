//! Digests of settled files, taken in the background once a file has been quiet for a while.
//!
//! What was written last is read first: it is still in the kernel's cache. After a mount, and
//! whenever nothing newer waits, the files that have none yet follow. So no more than some of those
//! that were written are remembered: a million, looked through once a second under a lock that
//! every close takes, held up all else.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::catalog::digest::{Digest, digest_of};
use crate::catalog::{Change, Durability};
use crate::error::Result;
use crate::replica::backing::{Access, Backing, Handle};
use crate::types::{ContentId, NodeId};

use super::Volume;
use super::nodes::{Node, State};

/// Files are read in pieces of this size.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// Files without a digest that one look into the catalog finds.
const FOUND_MAX: usize = 256;
/// Files of this mount that are remembered.
const FRESH_MAX: usize = 4096;

/// The files that wait for a digest.
pub(super) struct Waiting {
    /// Sealed in this mount, and when.
    fresh: HashMap<NodeId, Instant>,
    /// Up to where the catalog was looked through; `None` when it was to its end.
    after: Option<NodeId>,
}

impl Default for Waiting {
    fn default() -> Waiting {
        Waiting { fresh: HashMap::new(), after: Some(NodeId(0)) }
    }
}

impl Waiting {
    /// Whether no file of this mount waits.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.fresh.is_empty()
    }

    fn add(&mut self, node: NodeId) {
        if self.fresh.len() < FRESH_MAX || self.fresh.contains_key(&node) {
            self.fresh.insert(node, Instant::now());
            return;
        }
        // It is found in the catalog.
        let before = NodeId(node.0.saturating_sub(1));
        self.after = Some(self.after.map_or(before, |after| after.min(before)));
    }

    /// The catalog was looked through from `since` on up to `after`; `false` if meanwhile somebody
    /// asked for a look at what is before that.
    fn looked(&mut self, since: NodeId, after: Option<NodeId>) -> bool {
        let goes_on = self.after == Some(since);
        if goes_on {
            self.after = after;
        }
        goes_on
    }
}

impl Volume {
    /// A file is gone: nobody asks for its digest any more.
    pub(super) fn forget_digest(&self, node: NodeId) {
        self.undigested.lock().fresh.remove(&node);
    }

    /// A file got a content that has no digest.
    pub(super) fn want_digest(&self, node: NodeId) {
        self.undigested.lock().add(node);
    }

    /// Takes the digests of files that have been quiet, for about as long as `time` allows.
    pub(super) fn take_digests(&self, time: Duration, stop: &dyn Fn() -> Result<()>) -> Result<()> {
        let mut taken = Vec::new();
        let outcome = self.take_until(Instant::now() + time, stop, &mut taken);
        // All at once: a generation for each would be waste.
        if !taken.is_empty() {
            self.catalog().push(taken)?;
        }
        outcome
    }

    fn take_until(
        &self,
        end: Instant,
        stop: &dyn Fn() -> Result<()>,
        taken: &mut Vec<Change>,
    ) -> Result<()> {
        let mut due = self.quiet_files().into_iter();
        while let Some(node) = due.next() {
            let outcome = self.take_digest(node, stop, taken);
            if outcome.is_err() {
                self.want_digest(node);
            }
            if outcome.is_err() || Instant::now() >= end {
                // What was not come to waits on, as if it were sealed just now.
                due.for_each(|node| self.want_digest(node));
                return outcome;
            }
        }
        let after = self.undigested.lock().after;
        let Some(mut after) = after else { return Ok(()) };
        loop {
            // A file that was not remembered may wait to be committed.
            self.catalog().flush(Durability::Written)?;
            let found = self.catalog().undigested(after, FOUND_MAX)?;
            for file in &found {
                self.take_digest(file.node, stop, taken)?;
                let since = std::mem::replace(&mut after, file.node);
                let goes_on = self.undigested.lock().looked(since, Some(after));
                if !goes_on || Instant::now() >= end {
                    return Ok(());
                }
            }
            if found.len() < FOUND_MAX {
                self.undigested.lock().looked(after, None);
                return Ok(());
            }
        }
    }

    /// The files of this mount that have been quiet, those that were sealed last first.
    fn quiet_files(&self) -> Vec<NodeId> {
        let (quiet, now) = (self.options.digest_after, Instant::now());
        let mut waiting = self.undigested.lock();
        let mut due: Vec<(NodeId, Instant)> = waiting
            .fresh
            .iter()
            .filter(|(_, at)| now.saturating_duration_since(**at) >= quiet)
            .map(|(node, at)| (*node, *at))
            .collect();
        due.sort_by_key(|(_, at)| std::cmp::Reverse(*at));
        due.iter().for_each(|(node, _)| _ = waiting.fresh.remove(node));
        due.into_iter().map(|(node, _)| node).collect()
    }

    /// Takes the digest of a file unless it is being changed: then its next seal asks again.
    fn take_digest(
        &self,
        id: NodeId,
        stop: &dyn Fn() -> Result<()>,
        taken: &mut Vec<Change>,
    ) -> Result<()> {
        stop()?;
        let Ok(node) = self.node(id) else { return Ok(()) };
        let found = self.read_digest(&node, stop);
        self.nodes.let_go(node);
        if let Some((content, digest)) = found? {
            taken.push(Change::DigestAdd { content, digest });
        }
        Ok(())
    }

    fn read_digest(
        &self,
        node: &Arc<Node>,
        stop: &dyn Fn() -> Result<()>,
    ) -> Result<Option<(ContentId, Digest)>> {
        let id = node.id;
        let (dir, name, content, stamp) = {
            // What is deferred makes it unsealed.
            let state = node.lock_as_is();
            let Some(content) = self.settled_content(id, &state)? else { return Ok(None) };
            if self.catalog().digest(content)?.is_some() {
                return Ok(None);
            }
            let Ok((dir, name)) = self.location(node, &state) else { return Ok(None) };
            (dir, name, content, state.stamp)
        };
        let row = self.catalog().node(id)?;
        let read = self.replicas().read("read", |replica, b| {
            let file = b.open_file(dir.get(replica)?, &name, Access::Read)?;
            let before = b.stat(&file)?;
            let hasher = hash(b, &file, before.size, stop)?;
            let after = b.stat(&file)?;
            let still =
                (before.size, before.mtime, before.ctime) == (after.size, after.mtime, after.ctime);
            let recorded =
                row.as_ref().is_some_and(|row| (row.size, row.mtime) == (after.size, after.mtime));
            Ok((still && recorded).then(|| digest_of(&hasher)))
        });
        stop()?;
        let Ok(Some(digest)) = read else { return Ok(None) };
        let state = node.lock_as_is();
        let same = state.stamp == stamp && self.settled_content(id, &state)? == Some(content);
        Ok(same.then_some((content, digest)))
    }

    /// Records the digest of a content.
    pub(super) fn record_digest(&self, content: ContentId, digest: Digest) -> Result<()> {
        self.catalog().push(vec![Change::DigestAdd { content, digest }])?;
        Ok(())
    }

    /// The content of a file that is as it was sealed; `None` for one that is being changed, has no
    /// content, or is gone.
    pub(super) fn settled_content(&self, id: NodeId, state: &State) -> Result<Option<ContentId>> {
        if state.orphan || state.open.as_ref().is_some_and(|open| open.dirty) {
            return Ok(None);
        }
        let content = self.catalog().node(id)?.map(|row| row.content);
        Ok(content.filter(|content| *content != ContentId::EMPTY))
    }
}

/// Hashes an open file; `EINTR` once the work is to stop.
fn hash(
    b: &dyn Backing,
    file: &Handle,
    size: u64,
    stop: &dyn Fn() -> Result<()>,
) -> std::io::Result<blake3::Hasher> {
    let mut hasher = blake3::Hasher::new();
    // One more than there should be, so that a small file ends with its first piece.
    let mut buffer = vec![0; PIECE_BYTES.min(usize::try_from(size).unwrap_or(PIECE_BYTES)) + 1];
    let mut at = 0;
    loop {
        let count = b.read_at(file, &mut buffer, at)?;
        hasher.update(&buffer[..count]);
        if count < buffer.len() {
            return Ok(hasher);
        }
        at += count as u64;
        if stop().is_err() {
            return Err(std::io::Error::from_raw_os_error(libc::EINTR));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_too_many_to_be_remembered_are_looked_for_in_the_catalog() {
        let mut waiting = Waiting { after: None, ..Waiting::default() };
        let first = 10 + FRESH_MAX as u64;
        (10..first).for_each(|id| waiting.add(NodeId(id)));
        assert_eq!(waiting.after, None, "all of them are remembered");
        waiting.add(NodeId(10));
        waiting.add(NodeId(first + 5));
        assert_eq!((waiting.fresh.len(), waiting.after), (FRESH_MAX, Some(NodeId(first + 4))));
        waiting.add(NodeId(first + 9));
        assert_eq!(waiting.after, Some(NodeId(first + 4)), "it is behind that");
        assert!(waiting.looked(NodeId(first + 4), Some(NodeId(first + 5))));
        // While the catalog is looked through one that is before that is written.
        waiting.add(NodeId(5));
        assert!(!waiting.looked(NodeId(first + 5), None));
        assert_eq!(waiting.after, Some(NodeId(4)));
        assert!(waiting.looked(NodeId(4), None) && waiting.after.is_none());
    }
}

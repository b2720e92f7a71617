//! Digests of settled files, taken in the background once a file has been quiet for a while.
//!
//! What was written last is read first: it is still in the kernel's cache. After a mount, and
//! whenever nothing newer waits, the files that have none yet follow.
//!
//! A million files may wait, and every close takes the lock under which they do. So each is touched
//! once when it comes and once when it goes: nothing looks through all of them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::catalog::Change;
use crate::catalog::digest::{Digest, digest_of};
use crate::error::Result;
use crate::replica::backing::{Access, Backing, Handle};
use crate::types::{ContentId, NodeId};

use super::Volume;
use super::nodes::{Node, State};

/// Files are read in pieces of this size.
pub(super) const PIECE_BYTES: usize = 1 << 20;
/// Files without a digest that one look into the catalog finds.
const FOUND_MAX: usize = 256;

/// The files that wait for a digest.
pub(super) struct Waiting {
    /// Sealed in this mount, and when; the last one last. A file is in here once as long as its
    /// node is in the table, which knows when it was sealed last.
    fresh: VecDeque<(NodeId, Instant)>,
    /// Those that were not changed for long enough, the last one last.
    quiet: Vec<NodeId>,
    /// Up to where the catalog was looked through; `None` when it was to its end.
    after: Option<NodeId>,
}

impl Default for Waiting {
    fn default() -> Waiting {
        Waiting { fresh: VecDeque::new(), quiet: Vec::new(), after: Some(NodeId(0)) }
    }
}

impl Waiting {
    /// Whether no file of this mount waits.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.quiet.is_empty()
    }
}

impl Volume {
    /// A file is gone: nobody asks for its digest any more. What is made and removed at once does
    /// not wait; all else is found to be gone.
    pub(super) fn forget_digest(&self, node: NodeId) {
        let fresh = &mut self.undigested.lock().fresh;
        if fresh.back().is_some_and(|(last, _)| *last == node) {
            fresh.pop_back();
        }
    }

    /// A file got a content that has no digest.
    pub(super) fn want_digest(&self, id: NodeId) {
        let now = Instant::now();
        let waits = |node: Arc<Node>| node.undigested.lock().replace(now).is_some();
        // One that waits already does so from now on.
        if !self.nodes.get(id).is_some_and(waits) {
            self.undigested.lock().fresh.push_back((id, now));
        }
    }

    /// The file of this mount that was sealed last of those that were not changed for a while.
    fn next_quiet(&self) -> Option<NodeId> {
        let (after, now) = (self.options.digest_after, Instant::now());
        let is_quiet = |at: Instant| now.saturating_duration_since(at) >= after;
        loop {
            let (id, at) = {
                let waiting = &mut *self.undigested.lock();
                match waiting.fresh.front() {
                    Some((_, at)) if is_quiet(*at) => waiting.fresh.pop_front()?,
                    _ => return waiting.quiet.pop(),
                }
            };
            let last = self.nodes.get(id).and_then(|node| *node.undigested.lock());
            let last = last.unwrap_or(at);
            let waiting = &mut *self.undigested.lock();
            match is_quiet(last) {
                true => waiting.quiet.push(id),
                false => waiting.fresh.push_back((id, last)),
            }
        }
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
        while let Some(node) = self.next_quiet() {
            let outcome = self.take_digest(node, stop, taken);
            if outcome.is_err() {
                self.undigested.lock().quiet.push(node);
            }
            if outcome.is_err() || Instant::now() >= end {
                return outcome;
            }
        }
        let after = self.undigested.lock().after;
        let Some(mut after) = after else { return Ok(()) };
        loop {
            let found = self.catalog().undigested(after, FOUND_MAX)?;
            for file in &found {
                self.take_digest(file.node, stop, taken)?;
                after = file.node;
                self.undigested.lock().after = Some(after);
                if Instant::now() >= end {
                    return Ok(());
                }
            }
            if found.len() < FOUND_MAX {
                self.undigested.lock().after = None;
                return Ok(());
            }
        }
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
        // What is sealed from here on waits anew.
        *node.undigested.lock() = None;
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

//! Preserved contents whose bytes are live again: re-saved unchanged, copied back, checked out.
//!
//! Such a content needs no bytes of its own. It relies on the live file's content, which is
//! preserved in its turn before it changes.

use std::sync::Arc;

use crate::catalog::{Change, PackChange, WaitingContent};
use crate::error::Result;
use crate::history;
use crate::replica::backing::{Access, Backing, Handle};
use crate::types::ContentId;

use super::Volume;
use super::nodes::{Node, State};

/// Files are compared in pieces of this size.
const PIECE_BYTES: usize = 256 << 10;

impl Volume {
    /// Whether the live file at a content's place has the same bytes; if so the catalog knows it
    /// when this returns, and the preserved file is of no use once that is durable.
    pub(super) fn same_as_live(&self, content: &WaitingContent) -> Result<bool> {
        let Some((id, live)) = self.catalog().successor(content)? else { return Ok(false) };
        let Ok(node) = self.node(id) else { return Ok(false) };
        let same = self.compare_with_live(content, &node, live);
        self.nodes.let_go(node);
        same
    }

    fn compare_with_live(
        &self,
        content: &WaitingContent,
        node: &Arc<Node>,
        live: ContentId,
    ) -> Result<bool> {
        // Nobody waits while the files are compared: a change in between changes the stamp, or the
        // file is unsealed, or has another content.
        let (dir, name, stamp) = {
            // Not waited for: whoever has it may wait for what runs here.
            let Some(state) = node.try_lock() else { return Ok(false) };
            if !is_settled(&state, live) {
                return Ok(false);
            }
            let Ok((dir, name)) = self.location(node, &state) else { return Ok(false) };
            (dir, name, state.stamp)
        };
        let replicas = self.replicas();
        let equal = replicas.read("compare", |id, b| {
            let file = b.open_file(dir.get(id)?, &name, Access::Read)?;
            let kept = history::open_whole_on(replicas, id, content.node, content.id)?;
            same_bytes(b, &file, &kept, content.size)
        });
        if !equal.unwrap_or(false) {
            return Ok(false);
        }
        // What is relied on must be as durable as what goes. The file may be renamed meanwhile,
        // which is no replica's fault.
        for id in replicas.online() {
            let replica = replicas.get(id);
            let b = replica.backing();
            let file = dir.get(id).and_then(|dir| b.open_file(dir, &name, Access::Read));
            if file.and_then(|file| b.sync(&file, false)).is_err() {
                return Ok(false);
            }
        }
        let Some(state) = node.try_lock() else { return Ok(false) };
        let known = self.catalog().node(node.id)?.is_some_and(|row| row.content == live);
        if state.stamp != stamp || !is_settled(&state, live) || !known {
            return Ok(false);
        }
        let change = PackChange::ContentSame { id: content.id, to: live };
        self.catalog().push(vec![Change::Pack(change)])?;
        Ok(true)
    }
}

/// Whether a file is as it was sealed.
fn is_settled(state: &State, content: ContentId) -> bool {
    let open = state.open.as_ref();
    !state.orphan && open.is_none_or(|open| !open.dirty && open.sealed.content == content)
}

fn same_bytes(b: &dyn Backing, one: &Handle, other: &Handle, size: u64) -> std::io::Result<bool> {
    if b.stat(one)?.size != size || b.stat(other)?.size != size {
        return Ok(false);
    }
    let mut pieces = [vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]];
    let mut at = 0;
    while at < size {
        let length = (size - at).min(PIECE_BYTES as u64) as usize;
        let [first, second] = &mut pieces;
        let got = b.read_at(one, &mut first[..length], at)?;
        let other_got = b.read_at(other, &mut second[..length], at)?;
        if got != length || other_got != length || first[..length] != second[..length] {
            return Ok(false);
        }
        at += length as u64;
    }
    Ok(true)
}

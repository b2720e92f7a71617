//! Finding again, after an unclean end, what of history is not recorded: before-images whose rows,
//! and whole contents whose marks, were not committed yet.
//!
//! The rows that are made of it go to the catalogs of several replicas at once, of which any can be
//! ahead when we die. So what they tell of is brought to each of these replicas first
//! ([`undo::complete`] and, for whole contents, [`unrecorded`] and who asks for it).

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::packs::PackStore;
use super::{
    History, parse_preserved_name, preserved_dir, preserved_shards, remove_leftover, shared, undo,
};
use crate::catalog::{Catalog, Change, Whereabouts};
use crate::error::Result;
use crate::replica::backing::{Backing, DirEntry};
use crate::replica::{Handles, PrivateDir, ReplicaSet};
use crate::types::{ContentId, EntryName, NodeId};

/// What the catalog has of a preserved file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// That its content lies there.
    Recorded,
    /// Not that its content lies there; `known` tells whether it has the content.
    Missing { known: bool },
    /// The content lies elsewhere, or was forgotten: we died before the original was removed.
    Useless,
    /// Nothing, and nobody needs it ([`remove_strays`]).
    Stray,
}

fn mark_of(catalog: &Catalog, node: NodeId, content: ContentId) -> Result<Mark> {
    let uncommitted = || is_uncommitted(catalog, node, content);
    Ok(match catalog.whereabouts(content)? {
        Whereabouts::Chained => Mark::Missing { known: true },
        Whereabouts::Preserved => Mark::Recorded,
        Whereabouts::Elsewhere => Mark::Useless,
        Whereabouts::Unknown if uncommitted()? => Mark::Missing { known: false },
        Whereabouts::Unknown => Mark::Stray,
        Whereabouts::Forgotten if uncommitted()? => Mark::Missing { known: false },
        Whereabouts::Forgotten => Mark::Useless,
    })
}

/// The whole contents that [`History::recover`] will record as preserved. Not links of live files,
/// which it drops.
pub fn unrecorded(replicas: &ReplicaSet, catalog: &Catalog) -> Result<Vec<(NodeId, ContentId)>> {
    let mut found = Vec::new();
    for shard in preserved_shards(replicas)? {
        found.extend(unrecorded_in(shard, replicas, catalog, |_, _| true)?);
    }
    Ok(found)
}

/// Those of nodes of which a later content was overwritten; `newest` tells these
/// ([`undo::newest`]).
///
/// That later content lay in another file. Where the older one was not moved away, as the power of
/// that replica was gone before, its before-images would be taken for those of older ones.
pub fn overwritten_since(
    replicas: &ReplicaSet,
    catalog: &Catalog,
    newest: &BTreeMap<NodeId, ContentId>,
) -> Result<Vec<(NodeId, ContentId)>> {
    if newest.is_empty() {
        return Ok(Vec::new());
    }
    let is_older = |node, content| newest.get(&node).is_some_and(|&newest| newest > content);
    let of_these: HashSet<_> = newest.keys().map(|&node| preserved_dir(node)).collect();
    let mut found = Vec::new();
    for shard in preserved_shards(replicas)? {
        if of_these.contains(&PrivateDir::Preserved(shard)) {
            found.extend(unrecorded_in(shard, replicas, catalog, is_older)?);
        }
    }
    Ok(found)
}

fn unrecorded_in(
    shard: u8,
    replicas: &ReplicaSet,
    catalog: &Catalog,
    is_asked_for: impl Fn(NodeId, ContentId) -> bool,
) -> Result<Vec<(NodeId, ContentId)>> {
    let mut found = Vec::new();
    let (dir, files) = preserved_in(shard, replicas)?;
    for (name, of) in files {
        let (node, content) = of;
        if is_asked_for(node, content)
            && matches!(mark_of(catalog, node, content)?, Mark::Missing { .. })
            && !shared::is_only_link(replicas, catalog, of, (&*dir, &name))?
        {
            found.push(of);
        }
    }
    Ok(found)
}

/// The directory of a shard, and its files.
type Preserved = (Arc<Handles>, Vec<(EntryName, (NodeId, ContentId))>);

/// The preserved files of a shard, each with the node and the content that its name tells.
fn preserved_in(shard: u8, replicas: &ReplicaSet) -> Result<Preserved> {
    let dir = replicas.private(PrivateDir::Preserved(shard))?;
    let entries = replicas.read("list", |id, b| b.list(dir.get(id)?))?;
    let parsed = |entry: DirEntry| parse_preserved_name(&entry.name).map(|of| (entry.name, of));
    let files = entries.into_iter().filter_map(parsed).collect();
    Ok((dir, files))
}

/// Whether a preserved file is of a node of which the catalog has nothing.
///
/// Mostly that was born, written and overwritten or deleted again after the last commit: nothing
/// tells what it was called, and what has its name now was taken in as a node of its own. Or all
/// of it was forgotten, and we died before its file went. Either way no version can show it.
pub fn is_stray(catalog: &Catalog, node: NodeId, content: ContentId) -> Result<bool> {
    Ok(!catalog.knows_node(node)? && catalog.whereabouts(content)? == Whereabouts::Unknown)
}

/// Removes the preserved files of nodes of which the catalog has nothing: what their contents take
/// would never be free again. Only to be called where the catalog lacks nothing that was durable:
/// of one that does, another can be rebuilt, with what lies in these files.
pub fn remove_strays(replicas: &ReplicaSet, catalog: &Catalog) -> Result<()> {
    let mut count = 0;
    for shard in preserved_shards(replicas)? {
        let (dir, files) = preserved_in(shard, replicas)?;
        for (name, (node, content)) in files {
            if is_stray(catalog, node, content)? {
                // Where it has another name too, that one stays.
                remove_leftover(replicas, &dir, &name)?;
                count += 1;
            }
        }
    }
    if count > 0 {
        log::info!("history: removed {count} preserved files that belong to no version");
    }
    Ok(())
}

impl History {
    /// Finds again what an unclean end left unrecorded: before-images whose rows and whole contents
    /// whose marks were not committed yet. To be called before the live tree is compared. All rows
    /// of undo segments before `undo_from` are known to be committed.
    pub fn recover(replicas: &ReplicaSet, catalog: &Catalog, undo_from: u64) -> Result<()> {
        undo::recover(replicas, catalog, undo_from)?;
        remove_orphan_packs(replicas, catalog)?;
        for shard in preserved_shards(replicas)? {
            let (dir, files) = preserved_in(shard, replicas)?;
            let mut found = Vec::new();
            for (name, of) in files {
                let (node, content) = of;
                let mark = mark_of(catalog, node, content)?;
                if mark == Mark::Useless {
                    remove_leftover(replicas, &dir, &name)?;
                    continue;
                }
                let place = (&*dir, &name);
                let preserved = mark == Mark::Recorded;
                if shared::settle(replicas, catalog, of, preserved, place)? {
                    continue;
                }
                let Mark::Missing { known } = mark else { continue };
                if !known {
                    let stat = |id, b: &dyn Backing| b.stat_at(dir.get(id)?, &name);
                    let size = replicas.read("stat", stat)?.size;
                    found.push(Change::ContentAdd { id: content, node, size });
                }
                found.push(Change::ContentPreserved { id: content, cloned: false });
            }
            if !found.is_empty() {
                log::info!("history: found {} preserved files not yet recorded", found.len());
                catalog.push(found)?;
            }
        }
        Ok(())
    }
}

/// Removes packs that were written and never recorded.
fn remove_orphan_packs(replicas: &ReplicaSet, catalog: &Catalog) -> Result<()> {
    let packs = PackStore::new(uuid::Uuid::nil());
    let known: std::collections::HashSet<_> =
        catalog.packs()?.into_iter().map(|pack| pack.id).collect();
    for id in packs.list(replicas)?.into_iter().filter(|id| !known.contains(id)) {
        packs.remove(replicas, id)?;
        log::info!("history: removed the pack {id}, which was never recorded");
    }
    Ok(())
}

/// Whether a content that the catalog does not know was sealed just before the end: its seal was
/// pushed and not committed any more. Its bytes are what the node's older contents chain to. Ids
/// grow, so it is greater than the newest content that the catalog knows of that node; a smaller
/// unknown one was forgotten on purpose.
pub(super) fn is_uncommitted(catalog: &Catalog, node: NodeId, content: ContentId) -> Result<bool> {
    Ok(catalog.node(node)?.is_some_and(|row| content > row.content))
}

//! Interned sets of extended attributes: equal sets have one id.
//!
//! A set's body is its count, then each name and value as a length and its bytes (little-endian
//! u32).

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;
use rusqlite::{OptionalExtension, params};

use super::{Catalog, Change, ForgetChange};
use crate::error::{Error, Result};
use crate::types::{XattrSetId, Xattrs};

/// Sets kept in memory: a tree has few distinct ones.
const CACHED_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// A set that is kept in memory has no more bytes.
const CACHED_BYTES_MAX: usize = 16 << 10;

/// Sets that were used lately, and the ids of those that no database has yet.
pub(super) struct Interned {
    by_id: Mutex<LruCache<XattrSetId, Arc<Xattrs>>>,
    /// Held while a set gets its id, so that equal sets get one.
    by_hash: Mutex<LruCache<[u8; 32], XattrSetId>>,
    /// Sets of this mount by hash: the database may not have them yet. Few, for all of them are
    /// new.
    made: Mutex<HashMap<[u8; 32], XattrSetId>>,
    /// The ids that this mount gave out, and those that it removed.
    given: Mutex<Given>,
}

/// An id that was given out may come to be in a row at any time, so it stays. One that was removed
/// is still in the database until that is committed, and must not be given out again.
#[derive(Default)]
struct Given {
    out: HashSet<XattrSetId>,
    removed: HashSet<XattrSetId>,
}

impl Interned {
    /// Nothing cached.
    pub fn new() -> Interned {
        Interned {
            by_id: Mutex::new(LruCache::new(CACHED_MAX)),
            by_hash: Mutex::new(LruCache::new(CACHED_MAX)),
            made: Mutex::new(HashMap::new()),
            given: Mutex::new(Given::default()),
        }
    }
}

impl Interned {
    /// Keeps a set at hand, unless it is so large that many of them would fill the memory.
    fn keep(&self, id: XattrSetId, set: &Arc<Xattrs>) {
        let bytes: usize = set.0.iter().map(|(name, value)| name.len() + value.len()).sum();
        if bytes <= CACHED_BYTES_MAX {
            self.by_id.lock().put(id, set.clone());
        }
    }

    /// Notes that an id is given out; `false` for one that was removed.
    fn give(&self, id: XattrSetId) -> bool {
        let mut given = self.given.lock();
        if given.removed.contains(&id) {
            return false;
        }
        given.out.insert(id);
        true
    }
}

impl Catalog {
    /// The id of a set of extended attributes; a new one is pushed.
    pub fn intern_xattrs(&self, set: &Xattrs) -> Result<XattrSetId> {
        if set.0.is_empty() {
            return Ok(XattrSetId::NONE);
        }
        let hash = *blake3::hash(&encode(set)).as_bytes();
        let interned = &self.shared.xattrs;
        let mut by_hash = interned.by_hash.lock();
        if let Some(&id) = by_hash.get(&hash) {
            return Ok(id);
        }
        let made = interned.made.lock().get(&hash).copied();
        let known = match made {
            Some(id) => Some(id),
            None => self.shared.read(|db| {
                db.prepare_cached("SELECT id FROM xattr_set WHERE hash = ?1 ORDER BY id LIMIT 1")?
                    .query_row(params![hash], |row| row.get(0))
                    .optional()
            })?,
        };
        let id = match known.filter(|id| interned.give(*id)) {
            Some(id) => id,
            None => {
                let id = self.shared.next_xattrs();
                let set = Arc::new(set.clone());
                self.push(vec![Change::XattrSetAdd { id, set: set.clone() }])?;
                interned.keep(id, &set);
                interned.made.lock().insert(hash, id);
                interned.give(id);
                id
            }
        };
        by_hash.put(hash, id);
        Ok(id)
    }

    /// Removes sets that no committed state has, unless they were given out meanwhile.
    pub(super) fn forget_sets(&self, mut sets: Vec<XattrSetId>) -> Result<()> {
        let mut given = self.shared.xattrs.given.lock();
        sets.retain(|id| !given.out.contains(id));
        if sets.is_empty() {
            return Ok(());
        }
        given.removed.extend(&sets);
        let changes = sets.into_iter().map(|id| Change::Forget(ForgetChange::XattrSet(id)));
        self.push(changes.collect())?;
        Ok(())
    }

    /// A set of extended attributes.
    pub fn xattrs(&self, id: XattrSetId) -> Result<Arc<Xattrs>> {
        if id == XattrSetId::NONE {
            return Ok(Arc::default());
        }
        if let Some(set) = self.shared.xattrs.by_id.lock().get(&id) {
            return Ok(set.clone());
        }
        let pending = self.shared.overlay(|batch| batch.xattrs.get(&id).cloned());
        let set = match pending {
            Some(set) => set,
            None => Arc::new(self.stored_xattrs(id)?),
        };
        self.shared.xattrs.keep(id, &set);
        Ok(set)
    }

    fn stored_xattrs(&self, id: XattrSetId) -> Result<Xattrs> {
        let body: Option<Vec<u8>> = self.shared.read(|db| {
            db.prepare_cached("SELECT body FROM xattr_set WHERE id = ?1")?
                .query_row(params![id], |row| row.get(0))
                .optional()
        })?;
        body.as_deref().and_then(decode).ok_or_else(|| Error::Damaged {
            what: "the catalog".into(),
            detail: format!("its set {id} of extended attributes is missing or not whole"),
            remedy: super::schema::REMEDY,
        })
    }
}

/// The body of a set, see the module.
pub(super) fn encode(set: &Xattrs) -> Vec<u8> {
    let mut body = (set.0.len() as u32).to_le_bytes().to_vec();
    for part in set.0.iter().flat_map(|(name, value)| [name, value]) {
        body.extend((part.len() as u32).to_le_bytes());
        body.extend(part);
    }
    body
}

/// The inverse of [`encode`]; `None` for what it cannot have written.
pub(super) fn decode(body: &[u8]) -> Option<Xattrs> {
    let mut rest = body;
    let count = take_u32(&mut rest)?;
    let mut set = Xattrs::default();
    for _ in 0..count {
        let name = take_part(&mut rest)?;
        let value = take_part(&mut rest)?;
        set.0.insert(name, value);
    }
    (rest.is_empty() && set.0.len() as u64 == u64::from(count)).then_some(set)
}

fn take_u32(rest: &mut &[u8]) -> Option<u32> {
    let (head, tail) = rest.split_at_checked(4)?;
    *rest = tail;
    Some(u32::from_le_bytes(head.try_into().ok()?))
}

fn take_part(rest: &mut &[u8]) -> Option<Vec<u8>> {
    let length = take_u32(rest)? as usize;
    let (part, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(part.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_set_survives_the_round_trip_and_no_prefix_of_it_is_accepted() {
        let mut set = Xattrs::default();
        set.0.insert(b"user.a".to_vec(), vec![]);
        set.0.insert(b"user.b".to_vec(), vec![1, 2, 3]);
        let body = encode(&set);
        assert_eq!(decode(&body), Some(set));
        for length in 0..body.len() {
            assert_eq!(decode(&body[..length]), None);
        }
    }

    proptest! {
        #[test]
        fn a_changed_set_is_none_or_a_whole_one(
            parts in proptest::collection::btree_map(
                proptest::collection::vec(any::<u8>(), 0..9),
                proptest::collection::vec(any::<u8>(), 0..9),
                0..5,
            ),
            at in any::<prop::sample::Index>(), flips in any::<[u8; 4]>(), cut in 0usize..9,
        ) {
            let mut body = encode(&Xattrs(parts));
            let at = at.index(body.len());
            body[at..].iter_mut().zip(flips).for_each(|(byte, flip)| *byte ^= flip);
            body.truncate(body.len() - cut.min(body.len()));
            if let Some(set) = decode(&body) {
                prop_assert_eq!(encode(&set).len(), body.len());
            }
        }
    }
}

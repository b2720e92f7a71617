//! Where states and names begin and end, and whose: the table `touched`, by generation.
//!
//! A difference between two generations and the sweep of what lies between them look at nothing
//! else. There are more touches than versions, so they are packed: a row has the key of the last
//! touch of a block, and its `body` holds the others, from there backwards, each as how far its
//! generation and its node are from those of the one after it (LEB128, the node's zigzag). No block
//! reaches into another, so the blocks are in the order of their touches. A row without a body is
//! one touch: so version 3 wrote all of them.
//!
//! A commit fills up the last block, however little it brings: a store in which one file changes a
//! second is packed like one that is filled. What is taken out of a block makes it smaller, and
//! small blocks that follow each other become one. All of that depends on the touches alone, so
//! replicas stay equal.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::leb128;
use crate::types::{Generation, NodeId};

/// Where a row of a node begins or ends, and of which.
pub(super) type Touch = (Generation, NodeId);

/// Touches in a block: some 400 bytes, of which a page holds ten, read in a few microseconds.
const BLOCK_TOUCHES: usize = 128;
/// Blocks that hold no more than this together become one.
const SMALL_TOUCHES: usize = BLOCK_TOUCHES / 2;
/// After all generations.
const ALL_TIMES: Generation = Generation(i64::MAX as u64);
/// After all nodes of a generation.
const ALL_NODES: NodeId = NodeId(i64::MAX as u64);

/// Adds touches, which must be in order. Those that are known stay.
pub(super) fn add_all(db: &Connection, touches: &[Touch]) -> rusqlite::Result<()> {
    let Some(&first) = touches.first() else { return Ok(()) };
    let last = block_before(db, (ALL_TIMES, ALL_NODES))?;
    if last.as_ref().and_then(|block| block.last()).is_some_and(|last| *last >= first) {
        return touches.iter().try_for_each(|touch| add(db, *touch));
    }
    match last.filter(|block| block.len() < BLOCK_TOUCHES) {
        Some(block) => {
            delete(db, &block)?;
            write(db, &[&block, touches].concat())
        }
        None => write(db, touches),
    }
}

/// Adds a touch, wherever it belongs.
pub(super) fn add(db: &Connection, touch: Touch) -> rusqlite::Result<()> {
    match block_of(db, touch)? {
        Some(block) if block[0] > touch => write(db, &[touch]),
        Some(mut block) => match block.binary_search(&touch) {
            Ok(_) => Ok(()),
            Err(index) => {
                delete(db, &block)?;
                block.insert(index, touch);
                write(db, &block)
            }
        },
        None => write(db, &[touch]),
    }
}

/// Takes a touch away, if it is there.
pub(super) fn remove(db: &Connection, touch: Touch) -> rusqlite::Result<()> {
    let Some(mut block) = block_of(db, touch)? else { return Ok(()) };
    let Ok(index) = block.binary_search(&touch) else { return Ok(()) };
    delete(db, &block)?;
    let before = block_before(db, block[0])?;
    block.remove(index);
    match before.filter(|before| before.len() + block.len() <= SMALL_TOUCHES) {
        Some(before) => {
            delete(db, &before)?;
            write(db, &[before, block].concat())
        }
        None => write(db, &block),
    }
}

/// Whether a node is touched in a generation.
pub(super) fn has(db: &Connection, touch: Touch) -> rusqlite::Result<bool> {
    Ok(block_of(db, touch)?.is_some_and(|block| block.binary_search(&touch).is_ok()))
}

/// The first generation after `after` in which anything is touched.
pub(super) fn next(db: &Connection, after: Generation) -> rusqlite::Result<Option<Generation>> {
    Ok(following(db, (after, ALL_NODES), ALL_TIMES, 1)?.first().map(|(g, _)| *g))
}

/// The touches after `after`, up to the generation `until`, in order; at most `count_max`.
pub(super) fn following(
    db: &Connection,
    after: Touch,
    until: Generation,
    count_max: usize,
) -> rusqlite::Result<Vec<Touch>> {
    let mut found = Vec::new();
    each(db, after, |touch| {
        if touch.0 > until || found.len() == count_max {
            return ControlFlow::Break(());
        }
        found.push(touch);
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

/// The nodes that are touched after `after`, up to the generation `until`.
pub(super) fn nodes(
    db: &Connection,
    after: Generation,
    until: Generation,
) -> rusqlite::Result<BTreeSet<NodeId>> {
    let mut found = BTreeSet::new();
    each(db, (after, ALL_NODES), |(g, node)| {
        if g > until {
            return ControlFlow::Break(());
        }
        found.insert(node);
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

/// Shows each touch after `after`, in order, until it breaks.
fn each(
    db: &Connection,
    after: Touch,
    mut show: impl FnMut(Touch) -> ControlFlow<()>,
) -> rusqlite::Result<()> {
    let mut statement = db.prepare_cached(
        "SELECT g, node, body FROM touched WHERE (g, node) > (?1, ?2) ORDER BY g, node",
    )?;
    let mut rows = statement.query(params![after.0, after.1])?;
    while let Some(row) = rows.next()? {
        for touch in block(row)?.into_iter().filter(|touch| *touch > after) {
            if show(touch).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The block that a touch lies in, or else the one after it.
fn block_of(db: &Connection, touch: Touch) -> rusqlite::Result<Option<Vec<Touch>>> {
    db.prepare_cached(
        "SELECT g, node, body FROM touched WHERE (g, node) >= (?1, ?2) ORDER BY g, node LIMIT 1",
    )?
    .query_row(params![touch.0, touch.1], block)
    .optional()
}

/// The block that ends before a touch.
fn block_before(db: &Connection, touch: Touch) -> rusqlite::Result<Option<Vec<Touch>>> {
    db.prepare_cached(
        "SELECT g, node, body FROM touched WHERE (g, node) < (?1, ?2) \
         ORDER BY g DESC, node DESC LIMIT 1",
    )?
    .query_row(params![touch.0, touch.1], block)
    .optional()
}

fn delete(db: &Connection, block: &[Touch]) -> rusqlite::Result<()> {
    let Some((g, node)) = block.last() else { return Ok(()) };
    db.prepare_cached("DELETE FROM touched WHERE g = ?1 AND node = ?2")?
        .execute(params![g, node])?;
    Ok(())
}

/// Writes touches that follow each other, where none lie.
fn write(db: &Connection, touches: &[Touch]) -> rusqlite::Result<()> {
    let mut insert = db.prepare_cached("INSERT INTO touched(g, node, body) VALUES(?1, ?2, ?3)")?;
    for block in touches.chunks(BLOCK_TOUCHES) {
        let Some((g, node)) = block.last() else { continue };
        insert.execute(params![g, node, pack(block)])?;
    }
    Ok(())
}

/// The touches of a row `g, node, body`, ascending. Never empty.
fn block(row: &Row<'_>) -> rusqlite::Result<Vec<Touch>> {
    let last = (row.get(0)?, row.get(1)?);
    let body: Option<Vec<u8>> = row.get(2)?;
    unpack(last, &body.unwrap_or_default()).ok_or_else(|| {
        rusqlite::Error::FromSqlConversionFailure(
            2,
            rusqlite::types::Type::Blob,
            format!("the touches up to generation {} are malformed", last.0).into(),
        )
    })
}

/// The body of a block.
fn pack(block: &[Touch]) -> Option<Vec<u8>> {
    let mut body = Vec::with_capacity(block.len() * 4);
    for pair in block.windows(2).rev() {
        let [(g, node), (next_g, next_node)] = [pair[0], pair[1]];
        let step = node.0 as i64 - next_node.0 as i64;
        leb128::push(&mut body, next_g.0 - g.0);
        leb128::push(&mut body, (step << 1 ^ step >> 63) as u64);
    }
    (!body.is_empty()).then_some(body)
}

/// The inverse of [`pack`]; nothing where the bytes are not its work.
fn unpack(last: Touch, body: &[u8]) -> Option<Vec<Touch>> {
    let mut block = vec![last];
    let mut bytes = body.iter();
    let mut at = last;
    while !bytes.as_slice().is_empty() {
        let back = leb128::next(&mut bytes)?;
        let step = leb128::next(&mut bytes)?;
        let step = (step >> 1) as i64 ^ -((step & 1) as i64);
        let g = Generation(at.0.0.checked_sub(back)?);
        let node = NodeId(u64::try_from((at.1.0 as i64).checked_add(step)?).ok()?);
        if (g, node) >= at {
            return None;
        }
        at = (g, node);
        block.push(at);
    }
    block.reverse();
    Some(block)
}

/// All touches, in order.
#[cfg(test)]
pub(super) fn all(db: &Connection) -> rusqlite::Result<Vec<Touch>> {
    following(db, (Generation(0), NodeId(0)), ALL_TIMES, usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::schema::{FORMAT, make_all};
    use proptest::prelude::*;

    fn database() -> Connection {
        let db = Connection::open_in_memory().unwrap();
        make_all(&db, FORMAT).unwrap();
        db
    }

    fn all(db: &Connection) -> Vec<Touch> {
        super::all(db).unwrap()
    }

    fn rows(db: &Connection) -> usize {
        let count = db.query_row("SELECT count(*) FROM touched", [], |row| row.get::<_, i64>(0));
        count.unwrap() as usize
    }

    /// What may be asked and done, in any order.
    #[derive(Clone, Debug)]
    enum Step {
        /// A commit: so many generations further, so many touches by this stride.
        Commit(u64, u64, u64),
        /// As version 3 wrote them.
        Single(u64, u64),
        Add(u64, u64),
        Remove(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..3u64, 1..300u64, 0..9u64).prop_map(|(g, n, by)| Step::Commit(g, n, by)),
            (1..3u64, 1..1u64 << 42).prop_map(|(g, node)| Step::Single(g, node)),
            (1..40u64, 1..400u64).prop_map(|(g, node)| Step::Add(g, node)),
            any::<usize>().prop_map(Step::Remove),
            any::<usize>().prop_map(Step::Remove),
        ]
    }

    proptest! {
        #[test]
        fn blocks_hold_what_a_plain_set_holds(steps in proptest::collection::vec(step(), 1..40)) {
            let db = database();
            let mut set = BTreeSet::new();
            for step in steps {
                let newest = set.last().map_or(0, |(g, _): &Touch| g.0);
                match step {
                    Step::Commit(further, count, stride) => {
                        let from = newest + further;
                        let at = |i: u64| (Generation(from + i * stride / 8), NodeId(i));
                        let touches: Vec<Touch> = (1..=count).map(at).collect();
                        add_all(&db, &touches).unwrap();
                        set.extend(touches);
                    }
                    Step::Single(further, node) => {
                        let touch = (Generation(newest + further), NodeId(node));
                        write(&db, &[touch]).unwrap();
                        set.insert(touch);
                    }
                    Step::Add(g, node) => {
                        add(&db, (Generation(g), NodeId(node))).unwrap();
                        set.insert((Generation(g), NodeId(node)));
                    }
                    Step::Remove(which) => {
                        let some = set.iter().nth(which % set.len().max(1)).copied();
                        let touch = some.unwrap_or((Generation(1), NodeId(1)));
                        remove(&db, touch).unwrap();
                        set.remove(&touch);
                        prop_assert!(!has(&db, touch).unwrap());
                    }
                }
                prop_assert_eq!(all(&db), set.iter().copied().collect::<Vec<_>>());
            }
            for g in (0..60).map(Generation) {
                let after = (g, ALL_NODES);
                prop_assert_eq!(next(&db, g).unwrap(), set.range(after..).next().map(|t| t.0));
                let until = Generation(g.0 + 2);
                let within = set.range(after..(until, ALL_NODES)).copied();
                let found: Vec<Touch> = within.clone().take(3).collect();
                prop_assert_eq!(following(&db, after, until, 3).unwrap(), found);
                let found: BTreeSet<NodeId> = within.map(|touch| touch.1).collect();
                prop_assert_eq!(nodes(&db, g, until).unwrap(), found);
            }
            prop_assert!(set.iter().take(50).all(|touch| has(&db, *touch).unwrap()));
        }

        #[test]
        fn garbage_is_no_block_or_one_in_order(
            body in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            if let Some(block) = unpack((Generation(9), NodeId(9)), &body) {
                prop_assert!(block.is_sorted_by(|one, next| one < next));
            }
        }
    }

    #[test]
    fn small_commits_fill_blocks_and_what_is_left_of_them_is_joined() {
        let db = database();
        let touches: Vec<Touch> = (1..=1000).map(|i| (Generation(i), NodeId(i % 7))).collect();
        touches.iter().for_each(|touch| add_all(&db, &[*touch]).unwrap());
        assert_eq!(rows(&db), touches.len().div_ceil(BLOCK_TOUCHES));
        let bytes: i64 =
            db.query_row("SELECT sum(length(body)) FROM touched", [], |row| row.get(0)).unwrap();
        assert!(bytes <= 2 * touches.len() as i64, "{bytes}");
        for touch in touches.iter().filter(|touch| touch.0.0 % 10 > 0) {
            remove(&db, *touch).unwrap();
        }
        assert_eq!(all(&db).len(), 100);
        assert!(rows(&db) <= 4, "{}", rows(&db));
    }

    #[test]
    fn a_malformed_block_is_an_error() {
        let db = database();
        db.execute("INSERT INTO touched VALUES(7, 7, x'ff')", []).unwrap();
        assert!(has(&db, (Generation(3), NodeId(3))).is_err());
        assert!(next(&db, Generation(0)).is_err());
    }
}

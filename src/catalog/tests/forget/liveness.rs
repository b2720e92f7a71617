//! What must be left of a history, computed from all of it.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::Connection;

use super::world::World;
use super::*;

type Id = u64;

fn rows<T: Ord>(
    db: &Connection,
    sql: &str,
    row: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> BTreeSet<T> {
    db.prepare(sql).unwrap().query_map([], row).unwrap().map(Result::unwrap).collect()
}

fn ids(db: &Connection, sql: &str) -> BTreeSet<i64> {
    rows(db, sql, |row| row.get(0))
}

/// Node, end and beginning of all past states.
pub fn states(db: &Connection) -> BTreeSet<(Id, Generation, Generation)> {
    rows(db, "SELECT id, died, born FROM node_h", |row| {
        Ok((row.get::<_, i64>(0)? as u64, row.get(1)?, row.get(2)?))
    })
}

/// All past entries.
pub fn entries(db: &Connection) -> BTreeSet<(Id, Generation, String, Generation, Id)> {
    rows(db, "SELECT parent, died, name, born, node FROM entry_h", |row| {
        let name: EntryName = row.get(2)?;
        let (parent, node): (i64, i64) = (row.get(0)?, row.get(4)?);
        Ok((parent as u64, row.get(1)?, name.to_string(), row.get(3)?, node as u64))
    })
}

/// The process that made a generation.
pub fn actor_at(db: &Connection, at: Generation) -> Option<i64> {
    db.query_row(
        "SELECT pid FROM actor WHERE id = (SELECT actor FROM act WHERE g <= ?1 \
         ORDER BY g DESC LIMIT 1)",
        [at],
        |row| row.get(0),
    )
    .ok()
}

/// The bytes that history takes, of packs what is in use.
pub fn history_bytes(catalog: &Catalog) -> u64 {
    let totals = catalog.totals().unwrap();
    let packs = catalog.packs().unwrap();
    totals.undo_bytes + totals.preserved_bytes + packs.iter().map(|pack| pack.live).sum::<u64>()
}

/// Compares all rows with what is needed.
pub fn check(world: &World) {
    let db = world.db();
    let points = world.catalog.kept_points().unwrap();
    let horizon = world.catalog.horizon().unwrap();
    let is_visible = |born: Generation, died: Generation| {
        died > horizon || points.range(born..died).next().is_some()
    };

    // States: what is visible, and the last of what was deleted after a life.
    let mut last: BTreeMap<Id, Generation> = BTreeMap::new();
    for (node, died) in world.states.keys() {
        last.insert(*node, *died);
    }
    let is_kept = |node: Id, died: Generation| {
        let lived = || world.times[&died] - world.births[&node];
        !world.live.contains_key(&node)
            && last.get(&node) == Some(&died)
            && died >= world.since
            && lived() >= 30_000_000_000
    };
    let is_needed = |node, born, died| is_visible(born, died) || is_kept(node, died);
    // Whether the last version of an excluded file that was deleted later is still there depends
    // on what was swept first.
    let is_open = |node, born, died| {
        !is_visible(born, died) && is_kept(node, died) && world.turned.contains(&(node, died))
    };
    let left = states(&db);
    for (&(node, died), &(born, begun_by, ended_by)) in &world.states {
        if is_open(node, born, died) {
            continue;
        }
        let needed = is_needed(node, born, died);
        assert_eq!(left.contains(&(node, died, born)), needed, "state {node}: {born}..{died}");
        if needed {
            assert_eq!(actor_at(&db, born), begun_by, "who began {node} at {born}");
            assert_eq!(actor_at(&db, died), ended_by, "who ended {node} at {died}");
        }
    }
    assert!(left.iter().all(|(node, died, _)| world.states.contains_key(&(*node, *died))));
    let left = entries(&db);
    for entry in &world.entries {
        let (_, died, _, born, node) = entry;
        if !is_open(*node, *born, *died) {
            let needed = is_needed(*node, *born, *died);
            assert_eq!(left.contains(entry), needed, "entry {entry:?}");
        }
    }
    assert!(left.is_subset(&world.entries), "entries");

    check_contents(world, &db);
    check_packs(&db);
    check_times(&db, horizon, &points);
    let used = ids(&db, "SELECT xattrs FROM node_h UNION SELECT xattrs FROM node");
    let sets = ids(&db, "SELECT id FROM xattr_set");
    assert!(sets.iter().all(|set| used.contains(set)), "sets of attributes {sets:?} of {used:?}");
    let nodes = ids(&db, "SELECT id FROM node_h UNION SELECT id FROM node");
    let links = ids(&db, "SELECT node FROM symlink");
    assert!(links.iter().all(|link| nodes.contains(link)), "symlinks {links:?} of {nodes:?}");
    let acting = ids(&db, "SELECT actor FROM act");
    let actors = ids(&db, "SELECT id FROM actor");
    assert!(actors.iter().all(|actor| acting.contains(actor)), "actors");
}

/// Contents: those that states show, what those rely on, and so on.
fn check_contents(world: &World, db: &Connection) {
    let contents: BTreeMap<i64, (i64, i64, Option<i64>)> =
        rows(db, "SELECT id, node, state, same FROM content", |row| {
            Ok((row.get(0)?, (row.get(1)?, row.get(2)?, row.get(3)?)))
        })
        .into_iter()
        .collect();
    let mut open: Vec<i64> =
        ids(db, "SELECT content FROM node_h UNION SELECT content FROM node").into_iter().collect();
    let mut needed = BTreeSet::new();
    while let Some(id) = open.pop() {
        if id == 0 || !needed.insert(id) {
            continue;
        }
        let (node, state, same) = contents[&id];
        open.extend(same);
        if state == 0 {
            let whole = contents.range(id + 1..).find(|(_, of)| of.0 == node && of.1 != 0);
            open.extend(whole.map(|(id, _)| *id));
        }
    }
    assert_eq!(contents.keys().copied().collect::<BTreeSet<_>>(), needed, "contents");
    let imaged = ids(db, "SELECT content FROM undo");
    assert!(imaged.is_subset(&needed), "before-images of {imaged:?} in {needed:?}");
    let files: BTreeSet<_> = world.preserved.keys().map(|(_, id)| id.0 as i64).collect();
    assert_eq!(files, ids(db, "SELECT id FROM content WHERE state IN (1, 3)"), "preserved files");
    let recipes = ids(db, "SELECT id FROM recipe");
    let packed = "SELECT id FROM content WHERE state = 2 \
                  UNION SELECT -segment FROM undo WHERE segment < 0";
    assert_eq!(recipes, ids(db, packed), "recipes");
    let count = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    for (total, counted) in [
        ("past_versions FROM head", "count(*) FROM node_h"),
        ("undo_bytes FROM head", "coalesce(sum(length), 0) FROM undo WHERE segment > 0"),
        ("preserved_bytes FROM head", "coalesce(sum(size), 0) FROM content WHERE state = 1"),
        ("cloned_bytes FROM tally", "coalesce(sum(size), 0) FROM content WHERE state = 3"),
        ("packed_bytes FROM tally", "coalesce(sum(bytes), 0) FROM pack"),
    ] {
        let both = [total, counted].map(|what| count(&format!("SELECT {what}")));
        assert_eq!(both[0], both[1], "{total}");
    }
}

/// Uses of chunks, and what of packs is in use.
fn check_packs(db: &Connection) {
    let mut uses: BTreeMap<u64, i64> = BTreeMap::new();
    for id in ids(db, "SELECT id FROM recipe") {
        for (chunk, _) in packed::recipe_parts(db, ContentId(id as u64)).unwrap().unwrap() {
            *uses.entry(chunk.0).or_default() += 1;
        }
    }
    let chunks = rows(db, "SELECT id, refs, pack, stored FROM chunk", |row| {
        Ok((row.get::<_, i64>(0)? as u64, row.get(1)?, row.get(2)?, row.get(3)?))
    });
    let mut live: BTreeMap<i64, i64> = BTreeMap::new();
    for (id, refs, pack, stored) in chunks {
        let (refs, pack, stored): (i64, i64, i64) = (refs, pack, stored);
        assert_eq!(refs, uses.remove(&id).unwrap_or(0), "uses of chunk {id}");
        *live.entry(pack).or_default() += if refs > 0 { stored } else { 0 };
    }
    uses.remove(&0);
    assert!(uses.is_empty(), "chunks without rows: {uses:?}");
    for (id, found) in rows(db, "SELECT id, live FROM pack", |row| Ok((row.get(0)?, row.get(1)?))) {
        let (id, found): (i64, i64) = (id, found);
        assert_eq!(found, live.remove(&id).unwrap_or(0), "live bytes of pack {id}");
    }
}

/// Touches, ticks and acts: where rows that are left begin and end.
fn check_times(db: &Connection, horizon: Generation, points: &BTreeSet<Generation>) {
    let pair = |row: &rusqlite::Row<'_>| Ok((row.get::<_, Generation>(0)?, row.get(1)?));
    let ends: BTreeSet<(Generation, i64)> = rows(
        db,
        "SELECT born, id FROM node_h UNION SELECT died, id FROM node_h UNION \
         SELECT born, id FROM node UNION SELECT born, node FROM entry UNION \
         SELECT born, node FROM entry_h UNION SELECT died, node FROM entry_h",
        pair,
    );
    let touched = touched::all(db).unwrap().into_iter().map(|(g, node)| (g, node.0 as i64));
    let touched: BTreeSet<(Generation, i64)> = touched.collect();
    let known = |all: &BTreeSet<(Generation, i64)>| -> BTreeSet<_> {
        all.iter().copied().filter(|(g, _)| *g <= horizon).collect()
    };
    assert_eq!(known(&touched), known(&ends), "touched");
    for table in ["tick", "act"] {
        let starts = ids(db, &format!("SELECT g FROM {table} WHERE g > 0"));
        for pair in starts.iter().collect::<Vec<_>>().windows(2) {
            let (from, to) = (Generation(*pair[0] as u64), Generation(*pair[1] as u64));
            let used = ends.range((from, i64::MIN)..(to, i64::MIN)).next().is_some();
            let visible = points.range(from..to).next().is_some();
            assert!(used || visible || to > horizon, "{table} {from}");
        }
    }
}

//! Whether one replica's catalog agrees with itself: every invariant that its tables alone can
//! show, each by a query of its own, or by counting anew what is kept as a count.
//!
//! All of it reads one state of the file, so it may be in use meanwhile.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use rusqlite::{Connection, params};

use super::packed::recipe_parts;
use super::query::sources;
use super::schema::{
    Use, connect, name_damage, read_head, refuse_old, undo_row, unsigned, while_alive,
};
use super::{Base, Catalog, NEVER};
use crate::error::Result;
use crate::sys::device::Alive;
use crate::types::{ChunkId, ContentId, NodeId};

/// The most findings of one kind that are told one by one.
const TOLD_MAX: usize = 20;

/// What an audit found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// What contradicts something: damage.
    pub flaws: Vec<String>,
    /// What nothing uses and nothing removed: harmless.
    pub leftovers: Vec<String>,
}

/// Rows that contradict an invariant: what is wrong with them, and the query that finds them as
/// one text each. `?1` is [`NEVER`].
const CONTRADICTIONS: [(&str, &str); 24] = [
    (
        "a name means no node",
        "SELECT parent || '/' || quote(name) FROM entry e \
         WHERE NOT EXISTS(SELECT 1 FROM node WHERE id = e.node)",
    ),
    (
        "a name lies in no directory",
        "SELECT parent || '/' || quote(name) FROM entry e \
         WHERE NOT EXISTS(SELECT 1 FROM node WHERE id = e.parent AND kind = 4)",
    ),
    (
        "an entry says something else of its node than the node",
        "SELECT e.parent || '/' || quote(e.name) FROM entry e JOIN node n ON n.id = e.node \
         WHERE coalesce(e.kind, 8) <> n.kind",
    ),
    (
        "a past name says something else of its node than the node",
        "SELECT e.parent || '/' || quote(e.name) FROM entry_h e \
         LEFT JOIN node n ON n.id = e.node WHERE coalesce(e.kind, 8) <> coalesce(n.kind, \
         (SELECT kind FROM node_h WHERE id = e.node LIMIT 1))",
    ),
    (
        "a live node has no name",
        "SELECT id FROM node n WHERE id <> 1 AND NOT EXISTS(SELECT 1 FROM entry WHERE node = n.id)",
    ),
    (
        "a directory has several names",
        "SELECT e.node FROM entry e JOIN node n ON n.id = e.node WHERE n.kind = 4 \
         GROUP BY e.node HAVING count(*) > 1",
    ),
    (
        "a past name means nothing that is known",
        "SELECT parent || '/' || quote(name) FROM entry_h e \
         WHERE NOT EXISTS(SELECT 1 FROM node_h WHERE id = e.node) \
         AND NOT EXISTS(SELECT 1 FROM node WHERE id = e.node)",
    ),
    (
        "a past name ends before it begins",
        "SELECT parent || '/' || quote(name) FROM entry_h WHERE born >= died",
    ),
    (
        "two meanings of a name overlap",
        "SELECT parent || '/' || quote(name) FROM (SELECT parent, name, born, lag(died) \
         OVER (PARTITION BY parent, name ORDER BY died, born) AS before FROM entry_h) \
         WHERE born < before",
    ),
    (
        "a name's present meaning overlaps a past one",
        "SELECT e.parent || '/' || quote(e.name) FROM entry e WHERE e.born < ?1 AND \
         e.born < (SELECT max(died) FROM entry_h h WHERE h.parent = e.parent AND h.name = e.name)",
    ),
    ("a past state ends before it begins", "SELECT id FROM node_h WHERE born >= died"),
    (
        "two states of a node overlap",
        "SELECT id FROM (SELECT id, born, lag(died) OVER (PARTITION BY id ORDER BY died) AS before \
         FROM node_h) WHERE born < before",
    ),
    (
        "a node's present state overlaps a past one",
        "SELECT n.id FROM node n WHERE n.born < ?1 \
         AND n.born < (SELECT max(died) FROM node_h h WHERE h.id = n.id)",
    ),
    (
        "a file's content is not known",
        "SELECT n.id FROM (SELECT id, content FROM node UNION SELECT id, content FROM node_h) n \
         WHERE n.content > 0 AND NOT EXISTS(SELECT 1 FROM content WHERE id = n.content)",
    ),
    (
        "a state's size is not its content's",
        "SELECT n.id FROM (SELECT id, content, size FROM node UNION ALL \
         SELECT id, content, size FROM node_h) n JOIN content c ON c.id = n.content \
         WHERE c.size <> n.size",
    ),
    (
        "a node's extended attributes are not known",
        "SELECT n.id FROM (SELECT id, xattrs FROM node UNION SELECT id, xattrs FROM node_h) n \
         WHERE n.xattrs > 0 AND NOT EXISTS(SELECT 1 FROM xattr_set WHERE id = n.xattrs)",
    ),
    (
        "a symlink has no target",
        "SELECT n.id FROM (SELECT id, kind FROM node UNION SELECT id, kind FROM node_h) n \
         WHERE n.kind = 10 AND NOT EXISTS(SELECT 1 FROM symlink WHERE node = n.id)",
    ),
    (
        "a packed content has no recipe",
        "SELECT id FROM content c WHERE state = 2 \
         AND NOT EXISTS(SELECT 1 FROM recipe WHERE id = c.id)",
    ),
    (
        "a content has the bytes of one that is not known",
        "SELECT id FROM content c WHERE state = 4 \
         AND NOT EXISTS(SELECT 1 FROM content WHERE id = c.same AND size = c.size)",
    ),
    (
        "a before-image is of no content",
        "SELECT u.node || '.' || u.content FROM undo u \
         WHERE NOT EXISTS(SELECT 1 FROM content WHERE id = u.content AND node = u.node)",
    ),
    (
        "a before-image lies in no recipe",
        "SELECT u.node || '.' || u.content FROM undo u WHERE segment < 0 \
         AND NOT EXISTS(SELECT 1 FROM recipe WHERE id = -u.segment)",
    ),
    (
        "a chunk lies in no pack",
        "SELECT id FROM chunk c WHERE NOT EXISTS(SELECT 1 FROM pack WHERE id = c.pack)",
    ),
    (
        "a generation has a time before an earlier one's",
        "SELECT g FROM (SELECT g, t, lag(t) OVER (ORDER BY g) AS before FROM tick) \
         WHERE t <= before",
    ),
    (
        "what is known is younger than the newest generation",
        "SELECT max(g) FROM (SELECT max(g) AS g FROM snapshot UNION SELECT max(died) FROM entry_h \
         UNION SELECT max(died) FROM node_h UNION SELECT max(born) FROM node WHERE born < ?1 \
         UNION SELECT max(born) FROM entry WHERE born < ?1) \
         HAVING max(g) > (SELECT generation FROM head)",
    ),
];

/// Counts that are kept, and how they are counted anew.
const COUNTS: [(&str, &str, &str); 10] = [
    ("live nodes", "SELECT live_nodes FROM head", "SELECT count(*) FROM node"),
    (
        "bytes of live files",
        "SELECT live_bytes FROM head",
        "SELECT coalesce(sum(size), 0) FROM node WHERE kind = 8",
    ),
    ("past versions", "SELECT past_versions FROM head", "SELECT count(*) FROM node_h"),
    (
        "bytes of before-images",
        "SELECT undo_bytes FROM head",
        "SELECT coalesce(sum(length), 0) FROM undo WHERE segment > 0",
    ),
    (
        "bytes of preserved contents",
        "SELECT preserved_bytes FROM head",
        "SELECT coalesce(sum(size), 0) FROM content WHERE state = 1",
    ),
    (
        "bytes of cloned contents",
        "SELECT cloned_bytes FROM tally",
        "SELECT coalesce(sum(size), 0) FROM content WHERE state = 3",
    ),
    (
        "bytes of packs",
        "SELECT packed_bytes FROM tally",
        "SELECT coalesce(sum(bytes), 0) FROM pack",
    ),
    (
        "packs whose bytes in use are counted wrong",
        "SELECT 0",
        "SELECT count(*) FROM pack p WHERE live <> (SELECT coalesce(sum(stored), 0) FROM chunk c \
         WHERE c.pack = p.id AND c.refs > 0)",
    ),
    (
        "ids that were handed out twice",
        "SELECT 0",
        "SELECT (SELECT count(*) FROM node, head WHERE id >= next_node) + \
         (SELECT count(*) FROM content, head WHERE id >= next_content) + \
         (SELECT count(*) FROM recipe, head WHERE id >= next_content) + \
         (SELECT count(*) FROM chunk, tally WHERE id >= next_chunk) + \
         (SELECT count(*) FROM pack, tally WHERE id >= next_pack)",
    ),
    ("root directories", "SELECT 1", "SELECT count(*) FROM node WHERE id = 1 AND kind = 4"),
];

/// Rows that nothing uses.
const LEFTOVERS: [(&str, &str); 3] = [
    (
        "a recipe is of nothing",
        "SELECT id FROM recipe r WHERE NOT EXISTS(SELECT 1 FROM content WHERE id = r.id \
         AND state = 2) AND NOT EXISTS(SELECT 1 FROM undo WHERE segment = -r.id)",
    ),
    (
        "a digest is of no content",
        "SELECT content FROM digest d WHERE NOT EXISTS(SELECT 1 FROM content WHERE id = d.content)",
    ),
    (
        "a target is of no symlink",
        "SELECT node FROM symlink s WHERE NOT EXISTS(SELECT 1 FROM node WHERE id = s.node) \
         AND NOT EXISTS(SELECT 1 FROM node_h WHERE id = s.node)",
    ),
];

impl Catalog {
    /// Checks the catalog in `file`. Fails only if it cannot be read at all.
    pub fn audit(file: &Path) -> Result<Audit> {
        Catalog::audit_alive(file, &Alive::default())
    }

    /// As [`Catalog::audit`], which takes long.
    pub fn audit_alive(file: &Path, alive: &Alive) -> Result<Audit> {
        let mut db = connect(file, Use::Read)?;
        refuse_old(&db, file)?;
        let mut audit = Audit::default();
        let found = while_alive(&mut db, alive, |db| {
            db.execute_batch("BEGIN")?;
            audit.pages(db)?;
            // What is built on damaged pages says nothing.
            if audit.flaws.is_empty() {
                audit.tables(db)?;
            }
            Ok(())
        });
        match found {
            Ok(()) => Ok(audit),
            Err(error) if audit.flaws.is_empty() => Err(name_damage(file, error)),
            Err(error) => {
                audit.flaws.push(error.to_string());
                Ok(audit)
            }
        }
    }
}

/// The rows of a query of one column, as texts.
fn texts(db: &Connection, query: &str) -> rusqlite::Result<Vec<String>> {
    let mut statement = db.prepare(query)?;
    let count = statement.parameter_count();
    let never = [NEVER];
    let bound = &never[..count.min(1)];
    let rows = statement.query_map(rusqlite::params_from_iter(bound), |row| {
        Ok(match row.get_ref(0)? {
            rusqlite::types::ValueRef::Integer(number) => number.to_string(),
            rusqlite::types::ValueRef::Text(text) => String::from_utf8_lossy(text).into_owned(),
            other => format!("{other:?}"),
        })
    })?;
    rows.collect()
}

/// Tells the first of many.
fn tell(into: &mut Vec<String>, what: &str, found: &[String]) {
    into.extend(found.iter().take(TOLD_MAX).map(|one| format!("{what}: {one}")));
    if found.len() > TOLD_MAX {
        into.push(format!("{what}: {} more", found.len() - TOLD_MAX));
    }
}

impl Audit {
    fn pages(&mut self, db: &Connection) -> rusqlite::Result<()> {
        let found = texts(db, "PRAGMA integrity_check(20)")?;
        self.flaws.extend(found.into_iter().filter(|line| line != "ok"));
        Ok(())
    }

    fn tables(&mut self, db: &Connection) -> rusqlite::Result<()> {
        for (what, query) in CONTRADICTIONS {
            tell(&mut self.flaws, what, &texts(db, query)?);
        }
        for (what, kept, counted) in COUNTS {
            let number = |query: &str| db.query_row(query, [], |row| row.get::<_, i64>(0));
            let (kept, counted) = (number(kept)?, number(counted)?);
            if kept != counted {
                self.flaws.push(format!("{what}: {kept} on record, {counted} counted"));
            }
        }
        for (what, query) in LEFTOVERS {
            tell(&mut self.leftovers, what, &texts(db, query)?);
        }
        read_head(db)?;
        self.recipes(db)?;
        self.contents(db)
    }

    /// Lengths and uses of chunks, counted anew from the recipes.
    fn recipes(&mut self, db: &Connection) -> rusqlite::Result<()> {
        let mut uses: HashMap<ChunkId, (i64, i64, u32)> = HashMap::new();
        let mut chunks = db.prepare("SELECT id, refs, length FROM chunk")?;
        let rows = chunks.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        for row in rows {
            let (id, refs, length) = row?;
            uses.insert(id, (refs, 0, length));
        }
        let mut recipes = db.prepare(
            "SELECT r.id, c.size, (SELECT max(segment_offset + length) FROM undo \
             WHERE segment = -r.id) FROM recipe r \
             LEFT JOIN content c ON c.id = r.id AND c.state = 2",
        )?;
        let rows = recipes.query_map([], |row| {
            Ok((row.get(0)?, row.get::<_, Option<i64>>(1)?, row.get::<_, Option<i64>>(2)?))
        })?;
        let mut found = Vec::new();
        for row in rows {
            let (id, size, end): (ContentId, _, _) = row?;
            let Some(parts) = recipe_parts(db, id)? else { continue };
            let mut total = 0i64;
            for (chunk, length) in parts {
                total += i64::from(length);
                if chunk == ChunkId::HOLE {
                    continue;
                }
                match uses.get_mut(&chunk) {
                    Some((_, count, known)) if *known == length => *count += 1,
                    Some(_) => found.push(format!("{id}: a length of chunk {chunk}")),
                    None => found.push(format!("{id}: chunk {chunk} is not known")),
                }
            }
            let fits = size.is_none_or(|size| size == total) && end.is_none_or(|end| end <= total);
            if !fits {
                found.push(format!("{id}: it makes {total} bytes"));
            }
        }
        tell(&mut self.flaws, "a recipe is wrong", &found);
        let wrong: Vec<String> = uses
            .iter()
            .filter(|(_, (refs, count, _))| refs != count)
            .map(|(id, (refs, count, _))| format!("{id}: {refs} on record, {count} counted"))
            .collect();
        tell(&mut self.flaws, "the uses of a chunk", &wrong);
        Ok(())
    }

    /// Whether the bytes of every content that a state shows are somewhere.
    fn contents(&mut self, db: &Connection) -> rusqlite::Result<()> {
        let live: HashSet<(NodeId, ContentId)> = db
            .prepare("SELECT id, content FROM node WHERE content > 0")?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect::<rusqlite::Result<_>>()?;
        let nodes: HashSet<NodeId> = live.iter().map(|(node, _)| *node).collect();
        let mut statement = db.prepare(
            "SELECT DISTINCT c.node, c.id, c.size FROM content c \
             JOIN node_h h ON h.id = c.node AND h.content = c.id WHERE c.state IN (0, 4)",
        )?;
        let rows =
            statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, unsigned(row, 2)?)))?;
        let mut lost = Vec::new();
        for row in rows {
            let (node, content, size): (NodeId, ContentId, u64) = row?;
            if live.contains(&(node, content)) {
                continue;
            }
            let mut seen = Vec::new();
            let found = sources(db, node, content, &mut seen)?;
            if let Base::Live(base) = found.base
                && !nodes.contains(&base)
                && !found.covers(0, size)
            {
                lost.push(format!("content {content} of node {node}"));
            }
        }
        tell(&mut self.flaws, "the bytes of a version are nowhere", &lost);
        let mut beyond = Vec::new();
        let mut images = db.prepare(
            "SELECT u.content, u.offset, u.length, u.segment, u.segment_offset, u.node, c.size \
             FROM undo u JOIN content c ON c.id = u.content \
             WHERE u.length <= 0 OR u.offset < 0 OR u.offset + u.length > c.size",
        )?;
        let rows = images.query_map(params![], |row| undo_row(row, row.get(5)?))?;
        for row in rows {
            let row = row?;
            beyond.push(format!("content {} at byte {}", row.content, row.offset));
        }
        tell(&mut self.flaws, "a before-image reaches beyond its content", &beyond);
        Ok(())
    }
}

//! What was done and acknowledged before a crash, and what may be found after it.
//!
//! Each file may be in any state between its last acknowledged `fsync` and the crash, its bytes
//! mixed from them; its names are those of one moment. No byte comes from elsewhere.

use std::collections::{BTreeMap, BTreeSet};

use super::dice::number;
use crate::model::compare::UNREADABLE;
use crate::model::reference::{Body, Dump, Object, Reference, Shown};

/// Disks of an experiment.
pub const DISKS: usize = 2;

pub type Verdict = Result<(), String>;

/// The state after one acknowledged operation.
#[derive(Clone)]
pub struct Mark {
    /// How far each disk had come when it was acknowledged.
    pub position: [usize; DISKS],
    pub reference: Reference,
    /// The node that was made durable by it.
    pub synced: Option<usize>,
    /// All that was done is durable.
    pub synced_all: bool,
    /// All that the catalog was told is durable.
    pub barrier: bool,
    /// What could be seen of the past: names of snapshots, numbers of generations.
    pub past: BTreeSet<String>,
    pub what: String,
}

/// A state of the past with the mark at which it was the present.
#[derive(Clone)]
pub struct Past {
    pub dump: Dump,
    pub mark: usize,
}

#[derive(Clone, Default)]
pub struct Story {
    pub marks: Vec<Mark>,
    pub past: BTreeMap<String, Past>,
}

/// Which rule the names follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// All that was acknowledged is there.
    Acknowledged,
    /// They are those of one moment.
    OneMoment,
    /// Each is one that the object had.
    Each,
}

/// Where a story was cut.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// The last mark that was acknowledged before any disk was cut.
    pub acknowledged: usize,
    /// The mark that would have come after the last cut: it may be there in whole.
    pub end: usize,
}

impl Story {
    /// The window of a cut at these positions of the disks.
    pub fn window(&self, cut: [usize; DISKS]) -> Window {
        let reached = |mark: &Mark| (0..DISKS).all(|disk| mark.position[disk] <= cut[disk]);
        let passed = |mark: &Mark| (0..DISKS).all(|disk| mark.position[disk] >= cut[disk]);
        let acknowledged = self.marks.iter().rposition(reached).unwrap_or(0);
        let end = self.marks.iter().position(passed).unwrap_or(self.marks.len() - 1);
        Window { acknowledged, end: end.max(acknowledged) }
    }

    /// The last point at which something was acknowledged as durable before `position`.
    pub fn last_durable(&self, position: [usize; DISKS]) -> [usize; DISKS] {
        let window = self.window(position);
        let durable = |mark: &&Mark| mark.synced.is_some() || mark.synced_all || mark.barrier;
        let mark = self.marks[..=window.acknowledged].iter().rfind(durable);
        mark.map_or(self.marks[0].position, |mark| mark.position)
    }

    /// The operations around a window, for the text of a failure.
    pub fn tell(&self, window: Window) -> String {
        let from = window.acknowledged.saturating_sub(number("REARVIEW_TELL", 12) as usize);
        let lines = self.marks[from..=window.end].iter().enumerate().map(|(index, mark)| {
            let number = from + index;
            let seen = if number <= window.acknowledged { "" } else { " (in flight)" };
            format!("  {number} until {:?}: {}{seen}", mark.position, mark.what)
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    /// The mark from which on a node's state may be found.
    fn floor(&self, node: usize, window: Window) -> usize {
        let synced = |mark: &Mark| mark.synced_all || mark.synced == Some(node);
        let floor = self.marks[..=window.acknowledged].iter().rposition(synced);
        let born = self.marks.iter().position(|mark| mark.reference.nodes.len() > node);
        floor.unwrap_or(0).max(born.unwrap_or(0))
    }

    /// The states in which a node may be found.
    fn states(&self, node: usize, window: Window) -> impl Iterator<Item = &Object> {
        let marks = &self.marks[self.floor(node, window)..=window.end];
        marks.iter().filter_map(move |mark| Some(&mark.reference.nodes.get(node)?.now))
    }

    /// Whether the live tree may be what is found after a crash.
    pub fn judge_live(&self, found: &Dump, names: Names, window: Window) -> Verdict {
        if names == Names::Each {
            return self.judge_each(found, window);
        }
        let least = match names {
            Names::Acknowledged => window.acknowledged,
            _ => 0,
        };
        let mut reasons = Vec::new();
        for moment in (least..=window.end).rev() {
            match self.judge_moment(found, moment, window) {
                Ok(()) => return Ok(()),
                Err(reason) => reasons.push(format!("  as of {moment}: {reason}")),
            }
        }
        reasons.truncate(12);
        Err(format!("the live tree is that of no moment:\n{}", reasons.join("\n")))
    }

    fn judge_moment(&self, found: &Dump, moment: usize, window: Window) -> Verdict {
        let reference = &self.marks[moment].reference;
        let paths = reference.paths();
        if let Some(path) = found.keys().find(|path| !paths.contains_key(*path)) {
            return Err(format!("{path:?} is too much"));
        }
        let expected = reference.dump(false);
        for (path, node) in &paths {
            let Some(shown) = found.get(path) else { return Err(format!("{path:?} is missing")) };
            if shown.first_link != expected[path].first_link {
                return Err(format!("{path:?} is linked to {:?}", shown.first_link));
            }
            self.may_be(shown, *node, window).map_err(|why| format!("{path:?} {why}"))?;
        }
        // What was made durable has a name of its time.
        for node in 0..reference.nodes.len() {
            self.named_in_time(node, &reference.places(node), window)?;
        }
        Ok(())
    }

    fn named_in_time(
        &self,
        node: usize,
        places: &BTreeSet<(usize, String)>,
        window: Window,
    ) -> Verdict {
        let floor = self.floor(node, window);
        let synced = self.marks[floor].synced_all || self.marks[floor].synced == Some(node);
        let in_time = |mark: &Mark| mark.reference.places(node) == *places;
        if synced && !self.marks[floor..=window.end].iter().any(in_time) {
            let wanted = self.marks[floor].reference.places(node);
            return Err(format!("node {node} was synced at {floor} as {wanted:?}, is {places:?}"));
        }
        Ok(())
    }

    /// Each object has a name and a state that it once had, and what was synced is there.
    fn judge_each(&self, found: &Dump, window: Window) -> Verdict {
        let marks = &self.marks[..=window.end];
        let mut nodes: BTreeMap<&str, BTreeSet<usize>> =
            BTreeMap::from([("", BTreeSet::from([0]))]);
        for (path, shown) in found {
            let (dir, name) = path.rsplit_once('/').expect("paths begin with a slash");
            let Some(parents) = nodes.get(dir) else { continue };
            let mut candidates = BTreeSet::new();
            for mark in marks {
                for parent in parents.iter().filter(|p| **p < mark.reference.nodes.len()) {
                    if let Body::Dir(entries) = &mark.reference.nodes[*parent].now.body {
                        candidates.extend(entries.get(name));
                    }
                }
            }
            let mut reasons = Vec::new();
            candidates.retain(|node| match self.may_be(shown, *node, window) {
                Ok(()) => true,
                Err(why) => {
                    let floor = self.floor(*node, window);
                    reasons.push(format!("not node {node} since {floor}: it {why}"));
                    false
                }
            });
            if candidates.is_empty() {
                return Err(format!("{path:?} was never there so: {}", reasons.join("; ")));
            }
            nodes.insert(path, candidates);
        }
        let claimed: BTreeSet<usize> = nodes.values().flatten().copied().collect();
        for node in 0..marks[window.end].reference.nodes.len() {
            let floor = self.floor(node, window);
            let synced = marks[floor].synced_all || marks[floor].synced == Some(node);
            let named = |mark: &Mark| !mark.reference.places(node).is_empty();
            if synced && marks[floor..].iter().all(named) && !claimed.contains(&node) {
                let places = marks[floor].reference.places(node);
                return Err(format!("node {node} was synced at {floor} as {places:?} and is gone"));
            }
        }
        Ok(())
    }

    /// Whether an object may be this node.
    fn may_be(&self, shown: &Shown, node: usize, window: Window) -> Verdict {
        let states: Vec<&Object> = self.states(node, window).collect();
        let Some(first) = states.first() else { return Err("is a node of the future".into()) };
        match (&first.body, shown.kind) {
            (Body::File(_), 'f') | (Body::Dir(_), 'd') | (Body::Fifo, 'p') => {}
            (Body::Symlink(target), 'l') if *target == shown.content => {}
            _ => return Err(format!("is of kind {}", shown.kind)),
        }
        if !states.iter().any(|state| state.mode == shown.mode) {
            return Err(format!("has the mode {:o}", shown.mode));
        }
        let keys: BTreeSet<&String> = states
            .iter()
            .flat_map(|state| state.xattrs.keys())
            .chain(shown.xattrs.keys())
            .collect();
        for key in keys {
            let own = shown.xattrs.get(key);
            if !states.iter().any(|state| state.xattrs.get(key) == own) {
                return Err(format!("has the attribute {key} = {own:?}"));
            }
        }
        if shown.kind == 'f' {
            let contents: Vec<&[u8]> = states.iter().filter_map(|state| content(state)).collect();
            return mixed(&shown.content, &contents);
        }
        Ok(())
    }

    /// Whether a state of the past that was seen before is what it was.
    pub fn judge_past(&self, name: &str, found: &Dump, window: Window) -> Verdict {
        let past = &self.past[name];
        let paths = self.marks[past.mark].reference.paths();
        for (path, want) in &past.dump {
            let Some(have) = found.get(path) else {
                return Err(format!("{name}: {path:?} is missing"));
            };
            let mut bare = Shown { content: Vec::new(), ..have.clone() };
            let mut wanted = Shown { content: Vec::new(), ..want.clone() };
            wanted.mtime.is_none().then(|| bare.mtime = None);
            if bare.kind == UNREADABLE {
                wanted.kind = UNREADABLE;
            }
            if bare != wanted {
                return Err(format!("{name}: {path:?} was {wanted:?} and is {bare:?}"));
            }
            if have.content == want.content && have.kind == want.kind {
                continue;
            }
            let node = paths[path];
            if self.was_durable(node, past.mark, &want.content, window) {
                let at = want.content.iter().zip(&have.content).position(|(a, b)| a != b);
                let said = match have.kind {
                    UNREADABLE => String::from_utf8_lossy(&have.content).into_owned(),
                    _ => format!("differs at {at:?}"),
                };
                return Err(format!("{name}: {path:?} (node {node}) was durable and {said}"));
            }
            if have.kind != UNREADABLE {
                let marks = self.marks[..=window.end].iter();
                let all: Vec<&[u8]> = marks
                    .filter_map(|mark| content(&mark.reference.nodes.get(node)?.now))
                    .chain([&[][..]])
                    .collect();
                mixed(&have.content, &all).map_err(|why| format!("{name}: {path:?} {why}"))?;
            }
        }
        match found.keys().find(|path| !past.dump.contains_key(*path)) {
            Some(path) => Err(format!("{name}: {path:?} is too much")),
            None => Ok(()),
        }
    }

    /// Whether the content that a node's version at `mark` had was made durable, before the version
    /// was or while it stood.
    fn was_durable(&self, node: usize, mark: usize, version: &[u8], window: Window) -> bool {
        let is = |mark: &Mark| {
            mark.reference.nodes.get(node).and_then(|node| content(&node.now)) == Some(version)
        };
        let sealed = |mark: &Mark| {
            mark.reference.nodes.get(node).and_then(|node| content(&node.sealed)) == Some(version)
        };
        let syncs = (0..=window.acknowledged).filter(|&at| {
            let own = &self.marks[at];
            (own.synced_all || own.synced == Some(node)) && is(own)
        });
        for at in syncs {
            let between = match at < mark {
                true => self.marks[at + 1..=mark].iter().all(sealed),
                false => self.marks[mark..=at].iter().all(is),
            };
            if between {
                return true;
            }
        }
        false
    }

    /// The states of the past that must be there after a crash: committed durably, and not removed
    /// by what may have come after.
    pub fn durable_past(&self, window: Window) -> Vec<&str> {
        let barrier = self.marks[..=window.acknowledged].iter().rposition(|mark| mark.barrier);
        let Some(barrier) = barrier else { return Vec::new() };
        let kept = |name: &&String| {
            self.marks[barrier..=window.end].iter().all(|mark| mark.past.contains(*name))
        };
        self.marks[barrier].past.iter().filter(kept).map(String::as_str).collect()
    }
}

impl Reference {
    /// Which node each path means.
    pub fn paths(&self) -> BTreeMap<String, usize> {
        let mut found = BTreeMap::new();
        let mut waiting = vec![(0, String::new())];
        while let Some((dir, path)) = waiting.pop() {
            for (name, &node) in self.entries(dir) {
                let path = format!("{path}/{name}");
                if matches!(self.nodes[node].now.body, Body::Dir(_)) {
                    waiting.push((node, path.clone()));
                }
                found.insert(path, node);
            }
        }
        found
    }

    /// The directories and names by which a node is reached.
    pub fn places(&self, node: usize) -> BTreeSet<(usize, String)> {
        let dirs = self.dirs().into_iter();
        let own = dirs.flat_map(|dir| self.entries(dir).iter().map(move |entry| (dir, entry)));
        own.filter(|(_, (_, child))| **child == node)
            .map(|(dir, (name, _))| (dir, name.clone()))
            .collect()
    }
}

fn content(object: &Object) -> Option<&[u8]> {
    match &object.body {
        Body::File(content) => Some(content),
        _ => None,
    }
}

/// Whether `found` is a mix of `versions`: its size between theirs, each byte one of theirs or,
/// past the end of one of them, zero.
fn mixed(found: &[u8], versions: &[&[u8]]) -> Verdict {
    let least = versions.iter().map(|version| version.len()).min().unwrap_or(0);
    let most = versions.iter().map(|version| version.len()).max().unwrap_or(0);
    if !(least..=most).contains(&found.len()) {
        return Err(format!("has {} bytes, not {least} to {most}", found.len()));
    }
    for (at, byte) in found.iter().enumerate() {
        let own = versions.iter().any(|version| version.get(at) == Some(byte));
        let hole = *byte == 0 && at >= least;
        if !own && !hole {
            return Err(format!("has a foreign byte {byte:#x} at {at} of {}", found.len()));
        }
    }
    Ok(())
}

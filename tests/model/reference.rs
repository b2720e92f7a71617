//! The reference: a filesystem in memory, simple enough to be right at a glance.

use std::collections::BTreeMap;

/// What kind of object, with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    File(Vec<u8>),
    Dir(BTreeMap<String, usize>),
    Symlink(Vec<u8>),
    Fifo,
}

/// The state of an object that history keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub body: Body,
    pub mode: u32,
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Set by `SetTimes` and not changed since.
    pub mtime: Option<i64>,
}

/// One object with what is sealed of it.
#[derive(Clone, Debug)]
pub struct Node {
    pub now: Object,
    /// What an instant shows of it: for a file with unsealed changes not the present.
    pub sealed: Object,
    pub dirty: bool,
    /// The last change of its content was to empty it: closing a descriptor does not seal that.
    pub emptied: bool,
    pub links: u32,
    pub ino: u64,
    pub opens: u32,
    /// It is live and has no history.
    pub excluded: bool,
}

/// The whole reference.
#[derive(Clone, Debug)]
pub struct Reference {
    pub nodes: Vec<Node>,
}

/// One line of a comparable dump of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    pub kind: char,
    pub content: Vec<u8>,
    pub mode: u32,
    pub xattrs: BTreeMap<String, Vec<u8>>,
    pub links: u32,
    pub mtime: Option<i64>,
    /// The path that sorts first among its hard links.
    pub first_link: String,
}

/// A tree by path.
pub type Dump = BTreeMap<String, Shown>;

impl Object {
    fn new(body: Body, mode: u32) -> Object {
        Object { body, mode, xattrs: BTreeMap::new(), mtime: None }
    }
}

impl Reference {
    pub fn new() -> Reference {
        let root = Object::new(Body::Dir(BTreeMap::new()), 0o755);
        Reference {
            nodes: vec![Node {
                now: root.clone(),
                sealed: root,
                dirty: false,
                emptied: false,
                links: 1,
                ino: 1,
                opens: 0,
                excluded: false,
            }],
        }
    }

    pub fn add(&mut self, dir: usize, name: &str, body: Body, mode: u32, ino: u64) -> usize {
        let object = Object::new(body, mode);
        let index = self.nodes.len();
        self.nodes.push(Node {
            now: object.clone(),
            sealed: object,
            dirty: false,
            emptied: false,
            links: 1,
            ino,
            opens: 0,
            excluded: false,
        });
        self.enter(dir, name, index);
        index
    }

    pub fn entries(&self, dir: usize) -> &BTreeMap<String, usize> {
        match &self.nodes[dir].now.body {
            Body::Dir(entries) => entries,
            _ => panic!("not a directory"),
        }
    }

    pub fn enter(&mut self, dir: usize, name: &str, node: usize) {
        self.dir_changed(dir, |entries| {
            entries.insert(name.to_string(), node);
        });
    }

    pub fn leave(&mut self, dir: usize, name: &str) {
        self.dir_changed(dir, |entries| {
            entries.remove(name);
        });
    }

    fn dir_changed(&mut self, dir: usize, f: impl FnOnce(&mut BTreeMap<String, usize>)) {
        let node = &mut self.nodes[dir];
        if let Body::Dir(entries) = &mut node.now.body {
            f(entries);
        }
        node.now.mtime = None;
        node.sealed = node.now.clone();
    }

    /// A file's content changed.
    pub fn content(&mut self, node: usize, f: impl FnOnce(&mut Vec<u8>)) {
        let node = &mut self.nodes[node];
        if let Body::File(content) = &mut node.now.body {
            f(content);
        }
        node.now.mtime = None;
        node.dirty = true;
        node.emptied = false;
    }

    /// A file's size was set.
    pub fn truncated(&mut self, node: usize, size: usize) {
        self.content(node, |content| content.resize(size, 0));
        self.nodes[node].emptied = size == 0;
    }

    /// A descriptor of a file was closed that is still open otherwise.
    pub fn flushed(&mut self, node: usize) {
        if !self.nodes[node].emptied {
            self.seal(node);
        }
    }

    /// An attribute changed: part of history at once, unless the file has unsealed changes.
    pub fn attribute(&mut self, node: usize, f: impl FnOnce(&mut Object)) {
        let node = &mut self.nodes[node];
        f(&mut node.now);
        if !node.dirty {
            node.sealed = node.now.clone();
        }
    }

    pub fn seal(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        node.sealed = node.now.clone();
        node.dirty = false;
        node.emptied = false;
    }

    pub fn seal_all(&mut self) {
        (0..self.nodes.len()).for_each(|node| self.seal(node));
    }

    /// All directories that can be reached.
    pub fn dirs(&self) -> Vec<usize> {
        let mut found = vec![0];
        let mut at = 0;
        while at < found.len() {
            for &node in self.entries(found[at]).values() {
                if matches!(self.nodes[node].now.body, Body::Dir(_)) {
                    found.push(node);
                }
            }
            at += 1;
        }
        found
    }

    /// All objects that can be reached and have history, each once.
    pub fn reachable(&self) -> Vec<usize> {
        let mut found: Vec<usize> =
            self.dirs().iter().flat_map(|&dir| self.entries(dir).values().copied()).collect();
        found.retain(|&node| !self.nodes[node].excluded);
        found.sort_unstable();
        found.dedup();
        found
    }

    pub fn files(&self) -> Vec<usize> {
        let is_file = |&node: &usize| matches!(self.nodes[node].now.body, Body::File(_));
        self.reachable().into_iter().filter(is_file).collect()
    }

    /// Whether `dir` is `below` or lies in it.
    pub fn contains(&self, dir: usize, below: usize) -> bool {
        dir == below
            || match &self.nodes[dir].now.body {
                Body::Dir(entries) => entries.values().any(|&node| self.contains(node, below)),
                _ => false,
            }
    }

    /// The tree as it is, or as history has it.
    pub fn dump(&self, sealed: bool) -> Dump {
        let mut dump = Dump::new();
        let mut first = BTreeMap::new();
        self.dump_dir(0, "", sealed, &mut dump, &mut first);
        dump
    }

    fn dump_dir(
        &self,
        dir: usize,
        path: &str,
        sealed: bool,
        dump: &mut Dump,
        first: &mut BTreeMap<usize, String>,
    ) {
        for (name, &index) in self.entries(dir) {
            let path = format!("{path}/{name}");
            let node = &self.nodes[index];
            if sealed && node.excluded {
                continue;
            }
            let object = if sealed { &node.sealed } else { &node.now };
            let (kind, content) = match &object.body {
                Body::File(content) => ('f', content.clone()),
                Body::Dir(_) => ('d', Vec::new()),
                Body::Symlink(target) => ('l', target.clone()),
                Body::Fifo => ('p', Vec::new()),
            };
            let first_link = first.entry(index).or_insert_with(|| path.clone()).clone();
            dump.insert(
                path.clone(),
                Shown {
                    kind,
                    content,
                    mode: object.mode,
                    xattrs: object.xattrs.clone(),
                    links: if kind == 'd' { 0 } else { node.links },
                    mtime: object.mtime,
                    first_link,
                },
            );
            if kind == 'd' {
                self.dump_dir(index, &path, sealed, dump, first);
            }
        }
    }
}

/// Writes into a content, which grows.
pub fn put(content: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if content.len() < offset + bytes.len() {
        content.resize(offset + bytes.len(), 0);
    }
    content[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// Bytes that tell where they belong, so that misplaced ones are noticed.
pub fn pattern(fill: u8, length: usize) -> Vec<u8> {
    (0..length).map(|at| fill.wrapping_add((at / 7) as u8)).collect()
}

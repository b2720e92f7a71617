//! An object on a backing against what the catalog has of it.
//!
//! Where they differ is told in the words of [`Aspect`]. Content is judged by size alone here; who
//! has read the bytes compares digests.

use crate::catalog::NodeRow;
use crate::store::compare::Aspect;
use crate::store::fill::kept_xattrs;
use crate::store::site::Object;
use crate::types::{Kind, Xattrs};

/// What the catalog has of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its newest state.
    pub row: NodeRow,
    /// Its extended attributes.
    pub xattrs: Xattrs,
    /// A symlink's target, else empty.
    pub target: Vec<u8>,
    /// How many names it has.
    pub names: u32,
}

impl Record {
    /// The object as it should be on a backing, with what no record tells taken from `other`.
    pub fn as_object(&self, other: &Object) -> Object {
        let mut stat = other.stat;
        stat.kind = self.row.kind;
        stat.mode = self.row.mode;
        stat.uid = self.row.uid;
        stat.gid = self.row.gid;
        stat.rdev = self.row.rdev;
        stat.mtime = self.row.mtime;
        let mut object = Object { stat, xattrs: self.xattrs.clone(), target: self.target.clone() };
        // Labels that the host gives by itself are nobody's record: they stay as they are.
        let own = kept_xattrs(other);
        let labels = other.xattrs.0.iter().filter(|(name, _)| !own.contains_key(name.as_slice()));
        object.xattrs.0.extend(labels.map(|(name, value)| (name.clone(), value.clone())));
        object
    }

    /// In what an object differs from the record.
    pub fn differences(&self, object: &Object) -> Vec<Aspect> {
        let (row, stat) = (&self.row, &object.stat);
        if row.kind != stat.kind {
            return vec![Aspect::Kind];
        }
        let mut found = Vec::new();
        let mut check = |differs: bool, aspect| {
            if differs {
                found.push(aspect);
            }
        };
        check(row.kind == Kind::File && row.size != stat.size, Aspect::Content);
        check(row.kind == Kind::Symlink && self.target != object.target, Aspect::Target);
        // No filesystem of Linux keeps a mode of its own for symlinks.
        check(row.kind != Kind::Symlink && row.mode != stat.mode, Aspect::Mode);
        check((row.uid, row.gid) != (stat.uid, stat.gid), Aspect::Owner);
        check(row.mtime != stat.mtime, Aspect::ModificationTime);
        check(row.rdev != stat.rdev, Aspect::Device);
        let as_recorded = Object { stat: *stat, xattrs: self.xattrs.clone(), target: Vec::new() };
        check(kept_xattrs(&as_recorded) != kept_xattrs(object), Aspect::Xattrs);
        check(row.kind != Kind::Dir && self.names != stat.nlink, Aspect::HardLinks);
        found
    }
}

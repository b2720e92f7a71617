//! RearviewFS: a filesystem that mirrors every file to several directories and keeps every version.
//!
//! # Layers
//! A module uses only modules of lower layers; `tests/tidy.rs` checks it.
//!
//! | layer | modules | what |
//! |--|--|--|
//! | 9 | [`cli`], [`daemon`] | arguments, texts, exit codes; one mount from beginning to end |
//! | 8 | [`fuse`], [`control`] | the edge: translates, never decides |
//! | 7 | [`mountpoint`] | mounting and unmounting |
//! | 6 | [`fs`], [`report`] | live tree and past as one filesystem; what commands show |
//! | 6 | [`check`] | whether an unmounted store holds what it promises; a catalog made anew |
//! | 5 | [`past`] | the past as folders |
//! | 4 | [`volume`] | the live tree: every operation mirrored, preserved, recorded |
//! | 3 | [`store`] | opening, adopting and filling a store |
//! | 2 | [`history`] | what was overwritten or deleted, kept and read back |
//! | 1 | [`replica`], [`catalog`] | the backings and their common answer; what every path was |
//! | 1 | [`retention`] | which snapshots and versions are kept, decided without I/O |
//! | 1 | [`excludes`] | what has no history |
//! | 0 | [`types`], [`error`], [`sys`], [`time`], [`progress`] | words of the domain |
//!
//! # Five walks
//! **A write.** [`fuse`] unpacks the request → [`fs::Filesystem::write`] finds the node of the
//! handle → [`volume::Volume::write`] locks the node, asks [`history`] to preserve the sealed bytes
//! in the range (durable before anything is overwritten), applies the write to every replica
//! ([`replica::ReplicaSet::apply`]) and marks the file unsealed. When a descriptor is closed, the
//! file is *sealed*: its attributes are made equal on all replicas and its new state is pushed to
//! the [`catalog`].
//!
//! **An unlink.** `fuse` → `fs` → [`volume::Volume::unlink`] locks directory and node, seals the
//! file, and renames it into `.rearview/preserved/` on every replica: no byte is copied. The
//! catalog learns that the entry ended, that the node is gone, and where its last content lies.
//!
//! **A read of the past.** `fuse` → `fs` sees by the inode number that it is past →
//! [`past::Past::lookup`] asks the catalog what the name meant at that generation;
//! [`volume::Volume::read_content`] resolves the content's extents ([`history::Extents`]) and reads
//! each from an undo segment, a preserved file, a pack, or the live file where it was not changed
//! since. In the background [`history::packer`] turns the first two into packs, and what retention
//! ([`retention`]) makes invisible is swept out of the catalog.
//!
//! **A bit flips.** The background work takes a digest of every settled file
//! ([`catalog::digest`]). [`volume::scrub`] reads every copy past the page cache, finds that one
//! has not the recorded digest, looks again under the file's lock, keeps the bad bytes in
//! quarantine and writes the good ones in their place.
//!
//! **A backing dies.** A [`replica::backing::Backing`] call fails → the verdict in
//! [`replica::ReplicaSet::apply`] ejects that replica and the operation succeeds on the others →
//! the survivors' markers and `status` say so.
//!
//! **A backing returns.** It is recognised by its marker ([`store::Store::returned`]); what others
//! changed on it is taken in; then [`volume`] makes it equal in rounds, while the mount is in use:
//! first where the catalogs differ, or everything, then what was dirtied meanwhile
//! ([`replica::intent`]), and at last, with operations stopped for an instant, the rest. Its
//! catalog joins the others ([`catalog::Joining`]), and it is admitted. A mount does not wait for
//! replicas that are behind: they are resynced the same way.

pub mod catalog;
pub mod check;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod error;
pub mod excludes;
pub mod fs;
pub mod fuse;
pub mod history;
pub mod mountpoint;
pub mod past;
pub mod progress;
pub mod replica;
pub mod report;
pub mod retention;
pub mod store;
pub mod sys;
pub mod time;
pub mod types;
pub mod volume;

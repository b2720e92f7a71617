//! The words of the domain as types: ids, names, times and attributes.
//!
//! Validate once, in a constructor; after that the type is the proof. Names are bytes, not UTF-8.
//! Nothing here does I/O.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest name of one directory entry, in bytes (`NAME_MAX`, limits.h).
pub const NAME_BYTES_MAX: usize = 255;
/// The most backings one store can have.
pub const REPLICAS_MAX: usize = 8;
/// The name of our private directory in the root of every backing.
pub const PRIVATE_DIR: &str = ".rearview";

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
        #[derive(serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl rusqlite::ToSql for $name {
            fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
                // SQLite integers are signed: ids stay below 2^63 by construction.
                Ok((self.0 as i64).into())
            }
        }

        impl rusqlite::types::FromSql for $name {
            fn column_result(
                value: rusqlite::types::ValueRef<'_>,
            ) -> rusqlite::types::FromSqlResult<Self> {
                u64::try_from(value.as_i64()?)
                    .map($name)
                    .map_err(|_| rusqlite::types::FromSqlError::OutOfRange(-1))
            }
        }
    };
}

id_type! {
    /// Identifies one file, directory or special file for ever, through renames and remounts.
    /// It is also the inode number that the live tree shows. Below 2^43 (see `fs::ino`).
    NodeId
}
id_type! {
    /// The clock of history: grows by one with every recorded change of the store.
    Generation
}
id_type! {
    /// Identifies one sealed state of one file's content; unique in the store.
    ContentId
}
id_type! {
    /// Identifies a stored chunk.
    ChunkId
}
id_type! {
    /// Identifies a pack file; never reused.
    PackId
}
id_type! {
    /// Identifies a snapshot through renames; never reused.
    SnapshotId
}
id_type! {
    /// Identifies an interned set of extended attributes.
    XattrSetId
}

impl NodeId {
    /// The root directory of the live tree.
    pub const ROOT: NodeId = NodeId(1);
    /// Ids stay below this bound so that the inode numbers of snapshots have room for them.
    pub const LIMIT: u64 = 1 << 43;
}

impl ContentId {
    /// The content of a file that was never written: no bytes, nothing stored.
    pub const EMPTY: ContentId = ContentId(0);
}

impl ChunkId {
    /// In a recipe: no chunk, but a hole.
    pub const HOLE: ChunkId = ChunkId(0);
}

impl XattrSetId {
    /// No extended attributes.
    pub const NONE: XattrSetId = XattrSetId(0);
}

/// The kind of a node, fixed at its birth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A unix socket.
    Socket,
    /// A character device.
    CharDev,
    /// A block device.
    BlockDev,
}

impl Kind {
    /// The kind in the `S_IFMT` bits of a mode; `None` for bits no file has.
    pub fn from_mode(mode: u32) -> Option<Kind> {
        Some(match mode & libc::S_IFMT {
            libc::S_IFREG => Kind::File,
            libc::S_IFDIR => Kind::Dir,
            libc::S_IFLNK => Kind::Symlink,
            libc::S_IFIFO => Kind::Fifo,
            libc::S_IFSOCK => Kind::Socket,
            libc::S_IFCHR => Kind::CharDev,
            libc::S_IFBLK => Kind::BlockDev,
            _ => return None,
        })
    }

    /// The `S_IFMT` bits of this kind.
    pub fn mode_bits(self) -> u32 {
        match self {
            Kind::File => libc::S_IFREG,
            Kind::Dir => libc::S_IFDIR,
            Kind::Symlink => libc::S_IFLNK,
            Kind::Fifo => libc::S_IFIFO,
            Kind::Socket => libc::S_IFSOCK,
            Kind::CharDev => libc::S_IFCHR,
            Kind::BlockDev => libc::S_IFBLK,
        }
    }
}

impl rusqlite::ToSql for Kind {
    fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
        Ok((self.mode_bits() >> 12).into())
    }
}

impl rusqlite::types::FromSql for Kind {
    fn column_result(value: rusqlite::types::ValueRef<'_>) -> rusqlite::types::FromSqlResult<Self> {
        let bits = value.as_i64()?;
        u32::try_from(bits)
            .ok()
            .and_then(|bits| Kind::from_mode(bits.checked_shl(12)?))
            .ok_or(rusqlite::types::FromSqlError::OutOfRange(bits))
    }
}

/// A wall-clock time in UTC with nanoseconds, as `struct timespec` has it. May lie before 1970.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Default,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct Timestamp {
    /// Whole seconds since 1970, rounded down.
    pub secs: i64,
    /// Nanoseconds past `secs`, below 1,000,000,000.
    pub nanos: u32,
}

impl Timestamp {
    /// The system clock's time.
    pub fn now() -> Timestamp {
        Timestamp::from(SystemTime::now())
    }

    /// Nanoseconds since 1970; saturates beyond the years 1677 to 2262.
    pub fn as_nanos(self) -> i64 {
        self.secs.saturating_mul(1_000_000_000).saturating_add(i64::from(self.nanos))
    }

    /// The inverse of [`Timestamp::as_nanos`].
    pub fn from_nanos(nanos: i64) -> Timestamp {
        Timestamp {
            secs: nanos.div_euclid(1_000_000_000),
            nanos: nanos.rem_euclid(1_000_000_000) as u32,
        }
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Timestamp {
        match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Timestamp { secs: since.as_secs() as i64, nanos: since.subsec_nanos() },
            Err(before) => {
                let before = before.duration();
                let secs = -(before.as_secs() as i64);
                match before.subsec_nanos() {
                    0 => Timestamp { secs, nanos: 0 },
                    nanos => Timestamp { secs: secs - 1, nanos: 1_000_000_000 - nanos },
                }
            }
        }
    }
}

impl From<Timestamp> for SystemTime {
    fn from(time: Timestamp) -> SystemTime {
        let nanos = Duration::from_nanos(u64::from(time.nanos));
        if time.secs >= 0 {
            UNIX_EPOCH + Duration::from_secs(time.secs as u64) + nanos
        } else {
            UNIX_EPOCH - Duration::from_secs(time.secs.unsigned_abs()) + nanos
        }
    }
}

/// The name of one directory entry: 1 to 255 bytes, no slash, no NUL, neither `.` nor `..`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryName(Box<[u8]>);

/// Why a name cannot be an entry's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// Longer than [`NAME_BYTES_MAX`].
    #[error("the name is longer than 255 bytes")]
    TooLong,
    /// Empty, `.`, `..`, or with a slash or NUL in it.
    #[error("the name is empty, '.', '..', or has a slash or NUL byte in it")]
    Invalid,
}

impl EntryName {
    /// Checks and takes a name.
    pub fn new(name: impl AsRef<[u8]>) -> Result<EntryName, BadName> {
        let name = name.as_ref();
        if name.len() > NAME_BYTES_MAX {
            return Err(BadName::TooLong);
        }
        if name.is_empty() || name == b"." || name == b".." {
            return Err(BadName::Invalid);
        }
        if name.iter().any(|&byte| byte == b'/' || byte == 0) {
            return Err(BadName::Invalid);
        }
        Ok(EntryName(name.into()))
    }

    /// The name's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The name as the standard library's paths want it.
    pub fn as_os_str(&self) -> &OsStr {
        OsStr::from_bytes(&self.0)
    }
}

impl fmt::Debug for EntryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Shown escaped: control characters and bytes that are not UTF-8 never reach a terminal raw.
impl fmt::Display for EntryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escape(&self.0))
    }
}

impl rusqlite::ToSql for EntryName {
    fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
        Ok(rusqlite::types::ToSqlOutput::Borrowed(rusqlite::types::ValueRef::Blob(&self.0)))
    }
}

impl rusqlite::types::FromSql for EntryName {
    fn column_result(value: rusqlite::types::ValueRef<'_>) -> rusqlite::types::FromSqlResult<Self> {
        EntryName::new(value.as_blob()?)
            .map_err(|bad| rusqlite::types::FromSqlError::Other(Box::new(bad)))
    }
}

/// Makes bytes printable: valid, printable UTF-8 as it is, all else as `\n`, `\t` or `\xNN`.
pub fn escape(bytes: &[u8]) -> String {
    if bytes.iter().all(|byte| is_plain(*byte)) {
        return String::from_utf8_lossy(bytes).into_owned();
    }
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => text.push_str("\\\\"),
                '\n' => text.push_str("\\n"),
                '\t' => text.push_str("\\t"),
                '\r' => text.push_str("\\r"),
                c if c.is_control() || is_format_control(c) => {
                    let mut utf8 = [0; 4];
                    for byte in c.encode_utf8(&mut utf8).bytes() {
                        text.push_str(&format!("\\x{byte:02x}"));
                    }
                }
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    text
}

/// [`escape`] of what is nearly always plain text.
pub fn escape_text(text: &str) -> std::borrow::Cow<'_, str> {
    match text.bytes().all(is_plain) {
        true => text.into(),
        false => escape(text.as_bytes()).into(),
    }
}

/// Whether a byte stands for itself in [`escape`], whatever is beside it.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~') && byte != b'\\'
}

/// The last door before a terminal, behind [`escape`]: text that is made for people, with what no
/// such text has, control characters other than tabs and the ends of lines, written as `\xNN`.
pub fn printable(text: &str) -> std::borrow::Cow<'_, str> {
    let harmless = |c: char| matches!(c, '\n' | '\t') || !(c.is_control() || is_format_control(c));
    // First what is quick to see of many lines.
    if text.bytes().all(|byte| matches!(byte, b'\n' | b'\t' | b' '..=b'~'))
        || text.chars().all(harmless)
    {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 16);
    let mut utf8 = [0; 4];
    for c in text.chars() {
        match harmless(c) {
            true => shown.push(c),
            false => shown.push_str(&escape(c.encode_utf8(&mut utf8).as_bytes())),
        }
    }
    shown.into()
}

/// Bidirectional overrides and line separators: printable to Unicode, harmful to a terminal's
/// reader.
fn is_format_control(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A path below a tree's root: names only, no `.` or `..`, empty for the root itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct RelPath(Vec<EntryName>);

impl RelPath {
    /// The root.
    pub fn root() -> RelPath {
        RelPath::default()
    }

    /// Splits `path` at its slashes; leading, doubled and trailing ones and `.` are passed over.
    pub fn parse(path: impl AsRef<[u8]>) -> Result<RelPath, BadName> {
        path.as_ref()
            .split(|&byte| byte == b'/')
            .filter(|part| !part.is_empty() && *part != b".")
            .map(EntryName::new)
            .collect::<Result<Vec<_>, _>>()
            .map(RelPath)
    }

    /// The path of `name` in this directory.
    pub fn join(&self, name: &EntryName) -> RelPath {
        let mut names = self.0.clone();
        names.push(name.clone());
        RelPath(names)
    }

    /// The names from the root down.
    pub fn names(&self) -> &[EntryName] {
        &self.0
    }

    /// Whether this is the root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The directory this path lies in and its last name; `None` for the root.
    pub fn split_last(&self) -> Option<(RelPath, &EntryName)> {
        self.0.split_last().map(|(last, parents)| (RelPath(parents.to_vec()), last))
    }

    /// The path as the operating system takes it; `.` for the root.
    pub fn to_bytes(&self) -> Vec<u8> {
        if self.0.is_empty() {
            return b".".to_vec();
        }
        self.0.iter().map(EntryName::as_bytes).collect::<Vec<_>>().join(&b'/')
    }
}

impl From<Vec<EntryName>> for RelPath {
    fn from(names: Vec<EntryName>) -> RelPath {
        RelPath(names)
    }
}

/// Shown escaped, with a leading slash.
impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("/");
        }
        self.0.iter().try_for_each(|name| write!(f, "/{name}"))
    }
}

/// Which of the store's mounted replicas, as an index into a [`ReplicaMap`]. Not stored on disk:
/// there a replica is known by its UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplicaId(u8);

impl ReplicaId {
    /// Every id that a store can ever give out, in order.
    pub fn all() -> impl Iterator<Item = ReplicaId> + use<> {
        (0..REPLICAS_MAX as u8).map(ReplicaId)
    }

    /// The index as a number, for display.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// One value for each mounted replica, indexed by [`ReplicaId`] alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaMap<T>(Vec<T>);

impl<T> ReplicaMap<T> {
    /// Takes the replicas' values in their order; at most [`REPLICAS_MAX`].
    pub fn new(values: Vec<T>) -> ReplicaMap<T> {
        assert!(values.len() <= REPLICAS_MAX, "a store has at most {REPLICAS_MAX} replicas");
        ReplicaMap(values)
    }

    /// A value for every id that a store can ever have, also for those that join later.
    pub fn for_all(f: impl FnMut(ReplicaId) -> T) -> ReplicaMap<T> {
        ReplicaMap(ReplicaId::all().map(f).collect())
    }

    /// The value of one replica; `None` for one that joined after the map was made.
    pub fn get(&self, id: ReplicaId) -> Option<&T> {
        self.0.get(usize::from(id.0))
    }

    /// All ids and values.
    pub fn iter(&self) -> impl Iterator<Item = (ReplicaId, &T)> {
        self.0.iter().enumerate().map(|(index, value)| (ReplicaId(index as u8), value))
    }

    /// All ids.
    pub fn ids(&self) -> impl Iterator<Item = ReplicaId> + use<T> {
        (0..self.0.len() as u8).map(ReplicaId)
    }

    /// How many replicas there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// A map of the same replicas made from each value.
    pub fn map<U>(&self, mut f: impl FnMut(ReplicaId, &T) -> U) -> ReplicaMap<U> {
        ReplicaMap(self.iter().map(|(id, value)| f(id, value)).collect())
    }
}

impl<T> std::ops::Index<ReplicaId> for ReplicaMap<T> {
    type Output = T;
    fn index(&self, id: ReplicaId) -> &T {
        &self.0[usize::from(id.0)]
    }
}

impl<T> std::ops::IndexMut<ReplicaId> for ReplicaMap<T> {
    fn index_mut(&mut self, id: ReplicaId) -> &mut T {
        &mut self.0[usize::from(id.0)]
    }
}

/// Who a new object belongs to: the caller's filesystem ids and umask, applied by the backing's own
/// filesystem together with setgid directories and default ACLs. As an ordinary user the ids are
/// ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Creds {
    /// Caller's fsuid.
    pub uid: u32,
    /// Caller's fsgid.
    pub gid: u32,
    /// Caller's umask, 0777.
    pub umask: u32,
}

impl Creds {
    /// The daemon itself, for its own files: root, and modes are taken as they are.
    pub const DAEMON: Creds = Creds { uid: 0, gid: 0, umask: 0 };
}

/// Extended attributes by name, sorted; the names carry their namespace (`user.x`).
#[derive(Clone, Debug, PartialEq, Eq, Default, PartialOrd, Ord, Hash)]
pub struct Xattrs(pub std::collections::BTreeMap<Vec<u8>, Vec<u8>>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_survive_the_round_trip() {
        for nanos in [-1, -1_500_000_000, -2_000_000_000, 0, 1, 1_500_000_000] {
            let time = Timestamp::from_nanos(nanos);
            assert_eq!(time.as_nanos(), nanos);
            assert_eq!(Timestamp::from(SystemTime::from(time)), time);
        }
    }

    #[test]
    fn names_that_no_directory_can_hold_are_refused() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
            assert_eq!(EntryName::new(bad), Err(BadName::Invalid));
        }
        assert_eq!(EntryName::new([b'x'; 256]), Err(BadName::TooLong));
        assert!(EntryName::new([b'x'; 255]).is_ok());
    }

    #[test]
    fn escapes_never_reach_the_terminal_raw() {
        assert_eq!(escape(b"a\x1b[31m\n\xff\xc2\x9b"), "a\\x1b[31m\\n\\xff\\xc2\\x9b");
        assert_eq!(escape("h\u{e9} \u{202e}x".as_bytes()), "h\u{e9} \\xe2\\x80\\xaex");
    }
}

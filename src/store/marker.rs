//! The marker of a backing: `.rearview/store.toml`, by which a replica is known wherever it is
//! mounted.
//!
//! TOML, followed by one last line `# checksum <32 hex digits>`: the first half of the BLAKE3 hash
//! of all that stands before it, so that a torn or edited marker is told apart from a whole one.
//! ```toml
//! magic = "rearview-store"
//! format = 1
//! store = "<uuid>"            # the same in every backing of one store
//! replica = "<uuid>"          # this backing's own
//! label = "work"
//! created = "<RFC 3339>"      # when the store was made
//! phase = "ok"                # adopting | filling | ok
//! opened = "<nanoseconds>"    # only while mounted, or after an unclean end: since when
//! policy_changed = 7          # only if the policy ever was: nanoseconds since 1970
//! [features]                  # names of what a reader must know, as ext4 has them
//! compat = []                 # may be ignored
//! ro_compat = []              # may be ignored for looking
//! incompat = []               # must be known
//! [clean]                     # only after a clean end: the catalog's head at that moment
//! sequence = 7
//! chain = "<64 hex digits>"
//! [policy]                    # what is kept, where it is not the default: crate::retention::store
//! [[peers]]                   # the other replicas as this one knows them
//! replica = "<uuid>"
//! label = "copy"
//! path = "/media/copy"        # last seen there; escaped where it is not printable
//! state = "ok"                # ok | stale | filling
//! reason = ""                 # why it is stale
//! ```
//! A marker comes from a disk that anybody may have written: it is bounded, checked, and never
//! trusted for more than it says.

use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::catalog::Head;
use crate::error::{Error, Result};
use crate::retention::StorePolicy;
use crate::store::site::Site;

/// The marker's file name in the private directory.
pub const MARKER_FILE: &str = "store.toml";
const MAGIC: &str = "rearview-store";
/// The format that this program writes.
pub const FORMAT: u32 = 1;
/// A marker of eight replicas takes 3 KiB; beyond this it is not one of ours.
const MARKER_BYTES_MAX: usize = 64 * 1024;
/// Replicas that a store remembers, the long gone ones included.
const PEERS_MAX: usize = 64;
const TEXT_BYTES_MAX: usize = 8 * 1024;
const CHECKSUM_LEAD: &str = "# checksum ";

/// How far a replica's making is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its files are being taken into a new catalog.
    Adopting,
    /// It is being made equal to another replica and is no whole copy until then.
    Filling,
    /// It was whole at the last clean mark.
    Ok,
}

/// What a replica knows of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerState {
    /// It took part in all that this replica has.
    Ok,
    /// The store moved on without it.
    Stale,
    /// It was being filled.
    Filling,
}

/// Another replica of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its identity.
    pub replica: Uuid,
    /// Its name for people.
    pub label: String,
    /// Where it was last seen, escaped: for recognising and for display, never opened.
    pub path: String,
    /// How it stands.
    pub state: PeerState,
    /// Why it is stale.
    #[serde(default)]
    pub reason: String,
}

/// The catalog's head at a clean end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CleanMark {
    /// Committed batches.
    pub sequence: u64,
    /// Their chain, in hex.
    pub chain: String,
}

impl CleanMark {
    /// The mark for a head.
    pub fn of(head: &Head) -> CleanMark {
        CleanMark { sequence: head.sequence, chain: hex(&head.chain) }
    }

    /// Whether the catalog still has the head that was marked.
    pub fn fits(&self, head: &Head) -> bool {
        *self == CleanMark::of(head)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Names of what a reader of the store must know.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Features {
    /// May be ignored.
    pub compat: Vec<String>,
    /// May be ignored by who only looks.
    pub ro_compat: Vec<String>,
    /// Must be known.
    pub incompat: Vec<String>,
}

/// The marker. See the module for its form on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    magic: String,
    format: u32,
    /// Identity of the store.
    pub store: Uuid,
    /// Identity of this replica.
    pub replica: Uuid,
    /// Name of this replica for people.
    pub label: String,
    /// When the store was made, RFC 3339.
    pub created: String,
    /// How far this replica's making is.
    pub phase: Phase,
    /// Nanoseconds since 1970 at which the mount began that has not ended cleanly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opened: Option<i64>,
    /// Nanoseconds since 1970 at which the policy was changed, if it ever was: of two replicas the
    /// later one is right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_changed: Option<i64>,
    /// What a reader must know.
    #[serde(default)]
    pub features: Features,
    /// The catalog's head at the last clean end; absent while mounted and after a crash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clean: Option<CleanMark>,
    /// What the store keeps; the same in every backing.
    #[serde(default, skip_serializing_if = "StorePolicy::is_default")]
    pub policy: StorePolicy,
    /// The other replicas.
    #[serde(default)]
    pub peers: Vec<Peer>,
}

/// What every format must have, read before the rest is believed.
#[derive(Deserialize)]
struct Preamble {
    magic: String,
    format: u32,
    #[serde(default)]
    features: Features,
}

impl Marker {
    /// The marker of a new replica without peers.
    pub fn new(store: Uuid, label: String, created: String, phase: Phase) -> Marker {
        Marker {
            magic: MAGIC.into(),
            format: FORMAT,
            store,
            replica: Uuid::new_v4(),
            label,
            created,
            phase,
            opened: None,
            policy_changed: None,
            features: Features::default(),
            clean: None,
            policy: StorePolicy::default(),
            peers: Vec::new(),
        }
    }

    /// Reads the marker of a backing; `None` where there is none.
    pub fn read(site: &Site) -> Result<Option<Marker>> {
        match site.read_private(MARKER_FILE, MARKER_BYTES_MAX + 1)? {
            Some(bytes) => Marker::parse(&bytes, &site.private_path(MARKER_FILE)).map(Some),
            None => Ok(None),
        }
    }

    /// Replaces the marker of a backing, durably. A crash leaves the old or the new one.
    pub fn write(&self, site: &Site) -> Result<()> {
        site.write_private(MARKER_FILE, self.to_text().as_bytes())
    }

    /// The peer of this identity.
    pub fn peer(&self, replica: Uuid) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.replica == replica)
    }

    fn to_text(&self) -> String {
        let body = toml::to_string(self).expect("strings, numbers and tables of them are TOML");
        format!("{body}{CHECKSUM_LEAD}{}\n", checksum(body.as_bytes()))
    }

    /// Checks and takes a marker's bytes; `path` is for the texts.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Marker> {
        let damaged = |detail: String| Error::Damaged {
            what: format!("the marker {}", path.display()),
            detail,
            remedy: "If another backing of the store is whole, move all that is in this one, \
                     .rearview too, elsewhere and mount both with --init: the empty directory is \
                     filled from the other",
        };
        if bytes.len() > MARKER_BYTES_MAX {
            return Err(damaged("it is far too large".into()));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is not text".into()))?;
        // The preamble goes first: a newer format is refused as such even where the rest of it,
        // the checksum included, has another form.
        let preamble: Preamble =
            toml::from_str(text).map_err(|error| damaged(error.message().to_string()))?;
        if preamble.magic != MAGIC {
            return Err(damaged("it does not begin as a marker does".into()));
        }
        if preamble.format > FORMAT {
            return Err(Error::Refused(format!(
                "{} has the newer format {}; this program knows up to {FORMAT}: use a newer \
                 rearview",
                path.display(),
                preamble.format
            )));
        }
        let unknown = [&preamble.features.incompat, &preamble.features.ro_compat];
        if let Some(feature) = unknown.into_iter().flatten().next() {
            return Err(Error::Refused(format!(
                "{} has the newer format feature '{}', which this program does not know: \
                 use a newer rearview",
                path.display(),
                crate::types::escape(feature.as_bytes())
            )));
        }
        let body = checked_body(text).ok_or_else(|| {
            damaged("its checksum does not fit: it is torn, or was edited".into())
        })?;
        let marker: Marker =
            toml::from_str(body).map_err(|error| damaged(error.message().to_string()))?;
        marker.check().map_err(damaged)?;
        Ok(marker)
    }

    fn check(&self) -> Result<(), String> {
        if self.format == 0 {
            return Err("format 0 does not exist".into());
        }
        if self.peers.len() > PEERS_MAX {
            return Err(format!("it names more than {PEERS_MAX} replicas"));
        }
        let texts = self.peers.iter().flat_map(|peer| [&peer.label, &peer.path, &peer.reason]);
        if texts.chain([&self.label, &self.created]).any(|text| text.len() > TEXT_BYTES_MAX) {
            return Err("a text in it is too long".into());
        }
        let mut ids: Vec<Uuid> = self.peers.iter().map(|peer| peer.replica).collect();
        ids.push(self.replica);
        ids.sort_unstable();
        if ids.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("it names one replica twice".into());
        }
        self.policy.check().map_err(|error| format!("policy: {error}"))
    }
}

fn checksum(body: &[u8]) -> String {
    hex(&blake3::hash(body).as_bytes()[..16])
}

fn checked_body(text: &str) -> Option<&str> {
    let at = text.rfind(CHECKSUM_LEAD)?;
    let (body, last) = text.split_at(at);
    let sum = last.strip_prefix(CHECKSUM_LEAD)?.strip_suffix('\n')?;
    (sum == checksum(body.as_bytes())).then_some(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Marker {
        let mut marker =
            Marker::new(Uuid::new_v4(), "work".into(), "2026-11-22T20:00:00Z".into(), Phase::Ok);
        marker.clean = Some(CleanMark { sequence: 7, chain: hex(&[0xab; 32]) });
        marker.peers.push(Peer {
            replica: Uuid::new_v4(),
            label: "copy # checksum 12\n\u{1b}".into(),
            path: "/media/copy".into(),
            state: PeerState::Stale,
            reason: "write: Input/output error".into(),
        });
        marker
    }

    fn parse(bytes: &[u8]) -> Result<Marker> {
        Marker::parse(bytes, Path::new("/b/.rearview/store.toml"))
    }

    fn resealed(body: &str) -> String {
        format!("{body}{CHECKSUM_LEAD}{}\n", checksum(body.as_bytes()))
    }

    proptest! {
        /// Whoever can write a marker can also write its checksum.
        #[test]
        fn a_changed_marker_with_a_right_checksum_never_panics(
            at in any::<prop::sample::Index>(), text in "[\\PC\n]{0,12}", gone in 0usize..12,
        ) {
            let whole = sample().to_text();
            let body = checked_body(&whole).unwrap();
            let at = at.index(body.len());
            let rest = body.get(at + gone..).unwrap_or_default();
            if let Some(begin) = body.get(..at) {
                let _ = parse(resealed(&format!("{begin}{text}{rest}")).as_bytes());
            }
        }
    }

    #[test]
    fn a_marker_survives_the_round_trip() {
        let marker = sample();
        assert_eq!(parse(marker.to_text().as_bytes()).unwrap(), marker);
    }

    #[test]
    fn a_policy_is_written_only_where_it_is_not_the_default() {
        let mut marker = sample();
        assert!(!marker.to_text().contains("policy"));
        marker.policy.every = crate::retention::Span::hours(6);
        marker.policy.snapshots.tags.push("a,b".parse().unwrap());
        let text = marker.to_text();
        assert!(text.contains("[policy]\nevery = \"6h\"\n"), "{text}");
        assert_eq!(parse(text.as_bytes()).unwrap(), marker);
        let body = checked_body(&text).unwrap();
        for (good, bad) in [("\"6h\"", "\"6m\""), ("\"6h\"", "6"), ("every", "evary")] {
            let error = parse(resealed(&body.replace(good, bad)).as_bytes()).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{error}");
        }
    }

    #[test]
    fn every_truncation_and_every_flipped_byte_is_found() {
        let text = sample().to_text().into_bytes();
        for length in 0..text.len() {
            assert!(parse(&text[..length]).is_err(), "cut at {length}");
        }
        for at in 0..text.len() {
            let mut bad = text.clone();
            bad[at] ^= 1;
            assert!(parse(&bad).is_err(), "flipped at {at}");
        }
    }

    #[test]
    fn garbage_huge_and_mistyped_markers_are_damaged() {
        let text = sample().to_text();
        let body = checked_body(&text).unwrap();
        let mistyped = [
            body.replace("sequence = 7", "sequence = -7"),
            body.replace("sequence = 7", "sequence = \"x\""),
            body.replace("phase = \"ok\"", "phase = \"new\""),
            body.replace("format = 1", "format = 0"),
            body.replace("rearview-store", "else"),
            body.replace("label = \"work\"", &format!("label = \"{}\"", "x".repeat(9000))),
        ];
        for bad in mistyped {
            assert_ne!(bad, body);
            let error = parse(resealed(&bad).as_bytes()).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{error}");
        }
        for bad in [vec![0xff; 100], vec![b'a'; 1 << 20], Vec::new(), b"[[[[".to_vec()] {
            assert!(matches!(parse(&bad).unwrap_err(), Error::Damaged { .. }));
        }
    }

    #[test]
    fn a_newer_format_is_refused_by_name() {
        let newer = "magic = \"rearview-store\"\nformat = 2\nstore = 5\n";
        let error = parse(newer.as_bytes()).unwrap_err();
        assert!(
            matches!(&error, Error::Refused(text) if text.contains("newer format 2")),
            "{error}"
        );
        let mut marker = sample();
        marker.features.incompat.push("zstd".into());
        let error = parse(marker.to_text().as_bytes()).unwrap_err();
        assert!(error.to_string().contains("'zstd'"), "{error}");
        let mut marker = sample();
        marker.features.compat.push("hints".into());
        assert!(parse(marker.to_text().as_bytes()).is_ok());
    }

    #[test]
    fn a_replica_named_twice_is_damaged() {
        let mut marker = sample();
        marker.peers[0].replica = marker.replica;
        assert!(parse(marker.to_text().as_bytes()).is_err());
    }
}

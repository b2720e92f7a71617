//! What is kept of a scrub in the catalog, and what it tells.

use serde::{Deserialize, Serialize};

use super::META_KEY;
use crate::catalog::Catalog;
use crate::error::Result;
use crate::types::{ContentId, NodeId, PackId, Timestamp};

/// Findings of one run that are kept one by one; all of them are in the log.
const FINDINGS_MAX: usize = 100;

/// What a run is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScrubOptions {
    /// Look at everything.
    pub all: bool,
    /// How much to look at otherwise, of the live tree and of history.
    pub percent: Option<u8>,
    /// Bytes a second that are read at most.
    pub rate: Option<u64>,
}

/// What is wrong with an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// Its bytes are others although nothing says that they were changed.
    Rot,
    /// It was changed behind our back.
    Edited,
    /// It is not there.
    Missing,
    /// It should not be there.
    Extra,
    /// It is another kind of object.
    Kind,
    /// Mode, owner, time or extended attributes are not as recorded.
    Attributes,
    /// Its names are not those of one file.
    Links,
    /// It cannot be read.
    Unreadable,
    /// Replicas differ, and nothing tells which is right.
    Conflict,
}

/// What was done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is as it was recorded again.
    Healed,
    /// It is live now, and what it replaced is in history.
    Version,
    /// It was set aside.
    Quarantined,
    /// Nothing was done.
    Unhealed,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubFinding {
    /// The path on the backing, escaped.
    pub place: String,
    /// What is wrong.
    pub trouble: Trouble,
    /// What was done.
    pub outcome: Outcome,
    /// More about it: in what it differs, where the replaced bytes are.
    pub detail: String,
}

impl std::fmt::Display for ScrubFinding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let trouble = match self.trouble {
            Trouble::Rot => "damaged bytes",
            Trouble::Edited => "edited behind our back",
            Trouble::Missing => "missing",
            Trouble::Extra => "unknown",
            Trouble::Kind => "another kind of object",
            Trouble::Attributes => "wrong attributes",
            Trouble::Links => "wrong hard links",
            Trouble::Unreadable => "unreadable",
            Trouble::Conflict => "replicas differ",
        };
        let outcome = match self.outcome {
            Outcome::Healed => "healed",
            Outcome::Version => "taken as a new version",
            Outcome::Quarantined => "set aside",
            Outcome::Unhealed => "NOT HEALED",
        };
        write!(f, "{}: {trouble}, {outcome}", self.place)?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        Ok(())
    }
}

/// Which part of a run is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Catalogs, markers, intent logs and undo segments: all of them in every run.
    #[default]
    Own,
    /// Preserved contents.
    Preserved,
    /// Packs.
    Packs,
    /// Live objects.
    Live,
}

/// What was looked at last, of each of the three of which a run looks at a part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Position {
    #[serde(rename = "position")]
    pub node: NodeId,
    pub content: ContentId,
    pub pack: PackId,
}

/// A run, under way or over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScrubRun {
    /// What it is to do.
    pub options: ScrubOptions,
    /// The store began it by itself.
    pub automatic: bool,
    /// When it began, in nanoseconds since 1970.
    pub began: i64,
    /// When it ended.
    pub ended: Option<i64>,
    /// A person ended it.
    pub stopped: bool,
    /// A person paused it.
    pub paused: bool,
    /// Which part is under way.
    pub stage: Stage,
    /// What it has to look at, in bytes, and how far it is.
    pub goal: u64,
    /// See `goal`.
    pub units: u64,
    /// Those of the part that is under way.
    pub stage_units: u64,
    /// Live objects that were looked at.
    pub objects: u64,
    /// Files of history that were looked at.
    pub history_files: u64,
    /// Bytes that were read, on all replicas.
    pub bytes: u64,
    /// Objects that were being changed all the time.
    pub busy: u64,
    /// How much was found.
    pub found: u64,
    /// How much of it could not be healed.
    pub unhealed: u64,
    /// The first findings.
    pub findings: Vec<ScrubFinding>,
}

impl ScrubRun {
    /// A run that begins now.
    pub(super) fn new(options: ScrubOptions, automatic: bool, goal: u64) -> ScrubRun {
        let began = Timestamp::now().as_nanos();
        ScrubRun { options, automatic, began, goal, ..ScrubRun::default() }
    }

    /// Adds a finding.
    pub(super) fn note(&mut self, finding: ScrubFinding) {
        self.found += 1;
        if finding.outcome == Outcome::Unhealed {
            self.unhealed += 1;
            log::error!("scrub: {finding}");
        } else {
            log::warn!("scrub: {finding}");
        }
        // What was not healed is what a person has to know.
        let healed = |one: &ScrubFinding| one.outcome != Outcome::Unhealed;
        if self.findings.len() >= FINDINGS_MAX
            && finding.outcome == Outcome::Unhealed
            && let Some(at) = self.findings.iter().rposition(healed)
        {
            self.findings.remove(at);
        }
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        }
    }
}

/// What the catalog keeps.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Plan {
    /// The next run goes on after these.
    #[serde(flatten)]
    pub at: Position,
    /// When the nodes before it were begun with, in nanoseconds since 1970.
    pub lap_began: i64,
    /// Since when the store looks whether a run is due, in nanoseconds since 1970.
    pub since: i64,
    /// The run that is under way, or paused.
    pub run: Option<ScrubRun>,
    /// The last one that ended.
    pub last: Option<ScrubRun>,
    /// What could not be healed and was not seen sound since.
    pub damage: Vec<ScrubFinding>,
}

impl Plan {
    /// When the last run began; if there was none, since when one could.
    pub fn last_began(&self) -> i64 {
        self.last.as_ref().map_or(self.since, |run| run.began)
    }

    /// Ends the run. `partly` tells that it did not look at all replicas.
    pub fn end_run(&mut self, stopped: bool, partly: bool) {
        if let Some(run) = self.run.take() {
            if run.options.all && !stopped && run.busy == 0 && !partly {
                // It looked at everything.
                self.damage.clear();
            }
            self.note_damage(&run);
            let ended = Some(Timestamp::now().as_nanos());
            self.last = Some(ScrubRun { ended, stopped, paused: false, ..run });
        }
    }

    /// Takes over what a run could not heal. Whether anything is known anew.
    pub fn note_damage(&mut self, run: &ScrubRun) -> bool {
        let known = self.damage.clone();
        self.damage.retain(|old| run.findings.iter().all(|new| new.place != old.place));
        let unhealed = |one: &&ScrubFinding| one.outcome == Outcome::Unhealed;
        self.damage.extend(run.findings.iter().filter(unhealed).cloned());
        self.damage.truncate(FINDINGS_MAX);
        self.damage != known
    }

    pub fn status(&self) -> ScrubStatus {
        let mut now = self.clone();
        if let Some(run) = &self.run {
            now.note_damage(run);
        }
        ScrubStatus { run: now.run, last: now.last, damage: now.damage }
    }
}

/// How the scrub of a store stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// The run that is under way, or paused.
    pub run: Option<ScrubRun>,
    /// The last one that ended.
    pub last: Option<ScrubRun>,
    /// What could not be healed, by whichever run, and was not seen sound since: the first hundred.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub damage: Vec<ScrubFinding>,
}

impl ScrubStatus {
    /// What the catalog of an unmounted store tells.
    pub fn of(catalog: &Catalog) -> Result<ScrubStatus> {
        let stored = catalog.meta(META_KEY)?;
        let plan: Option<Plan> = stored.and_then(|text| serde_json::from_str(&text).ok());
        Ok(plan.unwrap_or_default().status())
    }
}

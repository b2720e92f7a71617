//! How a replica is, beyond its state: how far behind, and what failed on it.

use serde::{Deserialize, Serialize};

use super::{PathText, time_text};
use crate::replica::Fault;

/// How far a replica is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LagReport {
    /// Generations that it lacks.
    pub generations: u64,
    /// Seconds since the first change that it lacks.
    pub seconds: u64,
}

/// A call on a backing that failed by its fault: the last one on each path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AffectedReport {
    /// On what, from the root of the backing; where that is known.
    #[serde(flatten)]
    pub path: Option<PathText>,
    /// The call.
    pub op: String,
    /// How it failed.
    pub error: String,
    /// When.
    pub time: String,
}

impl From<&Fault> for AffectedReport {
    fn from(fault: &Fault) -> AffectedReport {
        AffectedReport {
            path: fault.path.as_ref().map(PathText::from),
            op: fault.op.into(),
            error: std::io::Error::from(fault.errno).to_string(),
            time: time_text(fault.at),
        }
    }
}

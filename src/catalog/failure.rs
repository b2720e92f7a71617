//! Why a replica's catalog is written and read no more.

use rusqlite::ErrorCode;

use crate::error::Error;

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It did not answer in time.
    #[error("it does not answer")]
    Hangs,
    /// What its file holds is no sound database.
    #[error("{0}")]
    Corrupt(String),
    /// Anything else, of the disk most likely.
    #[error("{0}")]
    Other(String),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Failure {
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Failure::Corrupt(error.to_string())
            }
            _ => Failure::Other(error.to_string()),
        }
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Failure {
        match error {
            Error::Damaged { .. } => Failure::Corrupt(error.to_string()),
            _ => Failure::Other(error.to_string()),
        }
    }
}

//! RearviewFS.

pub mod catalog;
pub mod error;
pub mod progress;
pub mod replica;
pub mod time;
pub mod types;
pub mod volume;

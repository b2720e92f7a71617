//! RearviewFS.

pub mod catalog;
pub mod error;
pub mod past;
pub mod progress;
pub mod replica;
pub mod time;
pub mod types;
pub mod volume;

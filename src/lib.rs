//! RearviewFS.

pub mod catalog;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod error;
pub mod fs;
pub mod fuse;
pub mod history;
pub mod mountpoint;
pub mod past;
pub mod progress;
pub mod replica;
pub mod report;
pub mod store;
pub mod sys;
pub mod time;
pub mod types;
pub mod volume;

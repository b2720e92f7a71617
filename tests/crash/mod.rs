//! Crashes, simulated and real: what is done before, what is left, and what may be found after.

#![allow(dead_code)] // Every test crate uses its own part of this module.

pub mod answers;
pub mod cut;
pub mod dice;
pub mod disk;
pub mod experiment;
pub mod load;
pub mod rig;
pub mod sequence;
pub mod story;
pub mod tree;

//! The replicas of a store and the rule by which their answers become one answer.

pub mod backing;
pub mod dir_backing;

//! A replica's backing, held by whoever works on it alone.

use std::ops::Deref;
use std::sync::Arc;

use super::backing::Backing;
use super::{Replica, ReplicaSet};
use crate::types::ReplicaId;

/// A backing that stays while this lives, also if its replica is replaced.
pub struct Held(Arc<Replica>);

impl Deref for Held {
    type Target = dyn Backing;

    fn deref(&self) -> &Self::Target {
        &*self.0.backing
    }
}

impl ReplicaSet {
    /// The backing of a replica, for work on this one alone.
    pub fn backing(&self, id: ReplicaId) -> Held {
        Held(self.get(id))
    }
}

//! stub
use crate::catalog::Catalog;
use crate::error::Result;
use crate::replica::ReplicaSet;
use crate::types::*;
/// stub
pub struct Store {
    /// x
    pub uuid: uuid::Uuid,
    /// x
    pub replicas: ReplicaSet,
    /// x
    pub catalog: Catalog,
}
impl Store {
    /// x
    pub fn close(&self) -> Result<()> {
        todo!()
    }
    /// x
    pub fn mark_stale(&self, _r: ReplicaId, _s: &str) -> Result<()> {
        todo!()
    }
}

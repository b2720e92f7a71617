//! stub
use super::*;
pub fn restore(_: &RestoreArgs) -> Result<Exit> {
    todo!()
}
pub fn undelete(_: &UndeleteArgs) -> Result<Exit> {
    todo!()
}

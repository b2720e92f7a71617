//! Requests about replicas.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::{DaemonInfo, Request};
use crate::error::{Error, Result};
use crate::mountpoint;
use crate::report::PathText;
use crate::store::Fork;
use crate::volume::Volume;

/// Does what is asked. A resync that follows from it goes on when this returns.
pub(super) fn change(volume: &Volume, request: &Request, info: &DaemonInfo) -> Result<()> {
    match request {
        Request::ReplicaOnline { replica, take } => {
            let fork = if *take { Fork::Take } else { Fork::Refuse };
            volume.replica_online(&name(replica)?, fork).map(|_| ())
        }
        Request::ReplicaOffline { replica } => volume.replica_offline(&name(replica)?).map(|_| ()),
        Request::ReplicaReplace { old, new } => {
            let new = apart(new, info)?;
            volume.replica_replace(&name(old)?, &new).map(|_| ())
        }
        Request::ReplicaAdd { new } => volume.replica_add(&apart(new, info)?).map(|_| ()),
        Request::ReplicaRemove { replica } => volume.replica_remove(&name(replica)?),
        _ => {
            volume.resync_now();
            Ok(())
        }
    }
}

fn name(text: &PathText) -> Result<String> {
    let bytes = text.bytes().ok_or_else(|| Error::Refused("the name is malformed".into()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A directory that neither lies in the mount nor has it within.
fn apart(text: &PathText, info: &DaemonInfo) -> Result<PathBuf> {
    let path = |text: &PathText| {
        let bytes = text.bytes().ok_or_else(|| Error::Refused("the path is malformed".into()))?;
        Ok::<_, Error>(PathBuf::from(OsStr::from_bytes(&bytes)))
    };
    let new = path(text)?;
    mountpoint::refuse_overlap(&path(&info.mountpoint)?, &new)?;
    Ok(new)
}

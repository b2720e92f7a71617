//! Getting a frame from the replicas: kept files, failover, and the note of what was bad.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::{PackStore, Trouble, damaged, pack_dir, pack_name};
use crate::catalog::{ChunkPlace, ChunkRow};
use crate::error::Result;
use crate::history::pack::{Flaw, Frame, frame_bytes};
use crate::replica::ReplicaSet;
use crate::replica::backing::{Access, Handle};
use crate::types::{PackId, ReplicaId};

/// Read of a frame at first, before its length is known: most end within.
const FIRST_READ_BYTES: usize = 64 << 10;

impl PackStore {
    /// Reads and decodes the frame of a chunk from the first replica that has it whole. Replicas on
    /// which the pack is known to be damaged are asked last.
    pub(super) fn load(&self, replicas: &ReplicaSet, row: &ChunkRow) -> Result<Frame> {
        let pack = row.place.pack;
        let mut tried = Vec::new();
        let mut troubles = Vec::new();
        for avoid_damaged in [true, false] {
            let answer = replicas.read("read a pack", |id, _| {
                if tried.contains(&id) || (avoid_damaged && self.is_damaged(id, pack)) {
                    // Without an errno: passed over.
                    return Err(io::Error::other("not to be asked"));
                }
                tried.push(id);
                let trouble = match self.load_from(replicas, id, row) {
                    Ok(frame) => return Ok(frame),
                    // We lack something; that says nothing of the pack.
                    Err(Trouble::Io(error)) if is_shortage(&error) => return Err(error),
                    Err(trouble) => trouble,
                };
                self.close(|kept, of| (kept, of) == (id, pack));
                troubles.push(format!("{}: {trouble}", replicas.get(id).path.display()));
                self.note_damage(replicas, id, pack, &trouble, Some(row));
                // Whatever it is, the next replica may have the chunk.
                match trouble {
                    Trouble::Io(error) if error.kind() != io::ErrorKind::NotFound => {
                        Err(Errno::IO.into())
                    }
                    // Its device has answered: no failed read, but other bytes than ours.
                    _ => {
                        replicas.count_checksum_error(id);
                        Err(io::Error::other("damaged"))
                    }
                }
            });
            match answer {
                Err(error) if error.is(Errno::IO) => {}
                answer => return answer,
            }
        }
        Err(damaged(pack, troubles.join("; ")))
    }

    fn load_from(
        &self,
        replicas: &ReplicaSet,
        id: ReplicaId,
        row: &ChunkRow,
    ) -> Result<Frame, Trouble> {
        let bytes = self.fetch(replicas, id, row.place)?;
        let frame = Frame::decode(&bytes)?;
        frame.chunk(row)?;
        Ok(frame)
    }

    /// The stored bytes of a frame on one replica, unchecked.
    pub(super) fn fetch(
        &self,
        replicas: &ReplicaSet,
        id: ReplicaId,
        place: ChunkPlace,
    ) -> Result<Vec<u8>, Trouble> {
        let replica = replicas.get(id);
        let b = replica.backing();
        let file = self.open(replicas, id, place.pack)?;
        let mut bytes = vec![0; FIRST_READ_BYTES];
        let got = b.read_at(&file, &mut bytes, place.frame)?;
        bytes.truncate(got);
        let length = frame_bytes(&bytes)?;
        bytes.resize(length, 0);
        if length > got
            && b.read_at(&file, &mut bytes[got..], place.frame + got as u64)? < length - got
        {
            return Err(Flaw::Short.into());
        }
        Ok(bytes)
    }

    /// A pack's file on one replica, kept open.
    fn open(&self, replicas: &ReplicaSet, id: ReplicaId, pack: PackId) -> io::Result<Arc<Handle>> {
        if let Some(file) = self.files.lock().get(&(id, pack)) {
            return Ok(file.clone());
        }
        // A replica that is out of use may be about to be unmounted.
        self.close(|id, _| !replicas.is_online(id));
        let file = match self.open_anew(replicas, id, pack) {
            Err(error) if is_shortage(&error) => {
                // Before a read fails for want of descriptors, we give back what is only kept.
                self.close(|_, _| true);
                self.open_anew(replicas, id, pack)?
            }
            file => file?,
        };
        let file = Arc::new(file);
        // The one that leaves is closed after the lock is released.
        let _left = self.files.lock().push((id, pack), file.clone());
        Ok(file)
    }

    /// Opens a pack's file by its name. The directory is looked up each time: it is made by writing
    /// only, and a replica without it is damaged, not out of use.
    pub(super) fn open_anew(
        &self,
        replicas: &ReplicaSet,
        id: ReplicaId,
        pack: PackId,
    ) -> io::Result<Handle> {
        let replica = replicas.get(id);
        let b = replica.backing();
        let dir = b.open_dir(&pack_dir(pack).path())?;
        b.open_file(&dir, &pack_name(pack), Access::Read)
    }
}

/// Whether the process lacks descriptors or memory.
pub(super) fn is_shortage(error: &io::Error) -> bool {
    let short = [Errno::MFILE, Errno::NFILE, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| short.contains(&errno))
}

//! Finding damaged packs and replacing them by another replica's.

use std::io;

use super::load::is_shortage;
use super::{PackStore, Trouble, pack_dir, pack_name, pack_path, put_file};
use crate::catalog::ChunkRow;
use crate::error::{Error, Result};
use crate::history::pack::{Flaw, PACK_BYTES_MAX, scan};
use crate::replica::backing::RenameMode;
use crate::replica::{PrivateDir, ReplicaSet};
use crate::types::{EntryName, PackId, ReplicaId, Timestamp};

/// What is known of a pack that is damaged on one replica.
#[derive(Default)]
pub struct Damage {
    /// The chunk that could not be read; `None` if the whole pack was looked at.
    wanted: Option<ChunkRow>,
}

impl PackStore {
    /// Checks a pack on every online replica, every byte, and notes the damage that it finds for
    /// [`PackStore::heal`]. Tells on how many replicas it is damaged or missing. Fails only if we
    /// are short of descriptors or memory.
    pub fn verify(&self, replicas: &ReplicaSet, pack: PackId) -> Result<usize> {
        let mut damaged = 0;
        for id in replicas.online() {
            match self.check_on(replicas, id, pack, None) {
                Ok(_) => {}
                Err(Trouble::Io(error)) if is_shortage(&error) => {
                    return Err(Error::from_io(error));
                }
                Err(trouble) => {
                    self.note_damage(replicas, id, pack, &trouble, None);
                    damaged += 1;
                }
            }
        }
        Ok(damaged)
    }

    /// The bytes of a pack, from a replica that has it whole.
    pub fn bytes(&self, replicas: &ReplicaSet, pack: PackId) -> Result<Vec<u8>> {
        let whole = replicas.online().find_map(|id| self.check_on(replicas, id, pack, None).ok());
        whole.ok_or(Error::Posix(rustix::io::Errno::IO))
    }

    /// Replaces the packs that were found damaged by another online replica's, and tells how many.
    /// What cannot be healed now is kept for the next call. The damaged file goes to `quarantine/`.
    /// If we die in between, the pack is missing there, and the next read notes it again.
    pub fn heal(&self, replicas: &ReplicaSet) -> Result<usize> {
        let noted: Vec<_> = self.damages.lock().keys().copied().collect();
        let mut healed = 0;
        for (id, pack) in noted {
            let _alone = self.changes.lock();
            let wanted = match self.damages.lock().get(&(id, pack)) {
                Some(damage) => damage.wanted.clone(),
                // Removed meanwhile.
                None => continue,
            };
            let place = place_of(replicas, id, pack);
            if !replicas.is_online(id) {
                // Before it is in use again, it is made equal to the others.
                self.damages.lock().remove(&(id, pack));
                continue;
            }
            if self.check_on(replicas, id, pack, wanted.as_ref()).is_ok() {
                log::info!("{place}: it reads well again");
                self.damages.lock().remove(&(id, pack));
                continue;
            }
            let check = |other| self.check_on(replicas, other, pack, wanted.as_ref()).ok();
            let source = replicas.online().filter(|&other| other != id);
            let source = source.filter_map(|other| Some((other, check(other)?))).next();
            let Some((source, bytes)) = source else {
                log::error!("{place}: no replica in use has a good copy of this pack");
                continue;
            };
            match self.replace(replicas, id, pack, &bytes) {
                Ok(()) => {
                    let from = replicas.get(source);
                    let from = from.path.display();
                    log::info!("{place}: replaced by the copy of {from}");
                    self.close(|kept, of| (kept, of) == (id, pack));
                    self.damages.lock().remove(&(id, pack));
                    healed += 1;
                }
                Err(error) => log::warn!("{place}: cannot be replaced: {error}"),
            }
        }
        Ok(healed)
    }

    /// Puts a pack in the place of a replica's own, which goes to quarantine if it is there.
    fn replace(
        &self,
        replicas: &ReplicaSet,
        id: ReplicaId,
        pack: PackId,
        bytes: &[u8],
    ) -> Result<()> {
        let tmp = replicas.private(PrivateDir::Tmp)?;
        let dir = replicas.private(pack_dir(pack))?;
        let quarantine = replicas.private(PrivateDir::Quarantine)?;
        let replica = replicas.get(id);
        let b = replica.backing();
        let replaced = || -> io::Result<()> {
            let (dir, quarantine) = (dir.get(id)?, quarantine.get(id)?);
            let aside = format!("pack-{:016x}-{}", pack.0, Timestamp::now().as_nanos());
            let aside = EntryName::new(aside).expect("a plain name");
            match b.rename(dir, &pack_name(pack), quarantine, &aside, RenameMode::NoReplace) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                moved => moved?,
            }
            put_file(b, tmp.get(id)?, dir, pack, bytes)
        };
        replaced().map_err(Error::from_io)
    }

    /// A replica's pack, if it is whole: ours, every byte right, and with the wanted chunk in it.
    fn check_on(
        &self,
        replicas: &ReplicaSet,
        id: ReplicaId,
        pack: PackId,
        wanted: Option<&ChunkRow>,
    ) -> Result<Vec<u8>, Trouble> {
        let replica = replicas.get(id);
        let b = replica.backing();
        // By its name: a kept file would be there even if the name is gone.
        let file = self.open_anew(replicas, id, pack)?;
        let size = b.stat(&file)?.size;
        if size > PACK_BYTES_MAX {
            return Err(Flaw::Long.into());
        }
        let mut bytes = vec![0; size as usize];
        if b.read_at(&file, &mut bytes, 0)? < bytes.len() {
            return Err(Flaw::Short.into());
        }
        let scanned = scan(&bytes)?;
        if (scanned.store, scanned.id) != (self.store, pack) {
            return Err(Flaw::Other.into());
        }
        let has = |row: &ChunkRow| {
            scanned.chunks.iter().any(|chunk| {
                (chunk.place, chunk.hash, chunk.length) == (row.place, row.hash, row.length)
            })
        };
        if wanted.is_some_and(|row| !has(row)) {
            return Err(Flaw::OtherChunk.into());
        }
        Ok(bytes)
    }

    /// Remembers that a replica's pack is damaged; the log hears of it once.
    pub(super) fn note_damage(
        &self,
        replicas: &ReplicaSet,
        id: ReplicaId,
        pack: PackId,
        trouble: &Trouble,
        wanted: Option<&ChunkRow>,
    ) {
        let mut damages = self.damages.lock();
        let known = damages.contains_key(&(id, pack));
        let damage = damages.entry((id, pack)).or_default();
        damage.wanted = damage.wanted.take().or_else(|| wanted.cloned());
        drop(damages);
        if !known {
            log::warn!("{}: {trouble}", place_of(replicas, id, pack));
        }
    }

    /// Whether a replica's pack is known to be damaged.
    pub(super) fn is_damaged(&self, id: ReplicaId, pack: PackId) -> bool {
        self.damages.lock().contains_key(&(id, pack))
    }
}

/// The file of a pack on one replica, for the log.
fn place_of(replicas: &ReplicaSet, id: ReplicaId, pack: PackId) -> String {
    replicas.get(id).path.join(pack_path(pack)).display().to_string()
}

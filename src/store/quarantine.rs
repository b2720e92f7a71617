//! `.rearview/quarantine/<UTC time>/`: where a fill moves what it replaces, under its own path.

use std::io;
use std::path::PathBuf;

use crate::error::{IoContext, Result};
use crate::replica::backing::{Handle, RenameMode};
use crate::store::site::{Site, own_creds, own_name, private};
use crate::types::{EntryName, Kind, RelPath};

/// Names tried for one fill's directory; two fills within a second differ in the number.
const DIR_TRIES: u32 = 1000;

/// The quarantine of one fill; its directory is made when the first object comes.
pub struct Quarantine<'a> {
    site: &'a Site,
    dir: Option<RelPath>,
    count: u64,
}

impl<'a> Quarantine<'a> {
    /// An empty one.
    pub fn new(site: &'a Site) -> Quarantine<'a> {
        Quarantine { site, dir: None, count: 0 }
    }

    /// How many objects were moved here.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Where they are, if there are any.
    pub fn place(&self) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| self.site.at(dir))
    }

    /// Moves an entry here, with all below it. One of several names of an object is just taken
    /// away: the object stays, and would show a name too many.
    pub fn take(&mut self, from: &Handle, dir: &RelPath, name: &EntryName) -> Result<()> {
        let shown = || self.site.at(&dir.join(name));
        let stat = self.site.backing.stat_at(from, name).context("look at", shown())?;
        if stat.kind != Kind::Dir && stat.nlink > 1 {
            return self.site.backing.unlink(from, name).context("remove a name", shown());
        }
        if stat.kind == Kind::Dir {
            self.drop_links_below(dir.join(name))?;
        }
        let place = self.make_place(dir)?;
        let to = self.site.dir(&place)?;
        self.site
            .backing
            .rename(from, name, &to, name, RenameMode::NoReplace)
            .context("move to quarantine", self.site.at(&dir.join(name)))?;
        self.count += 1;
        log::debug!("{}: moved to quarantine", self.site.at(&dir.join(name)).display());
        Ok(())
    }

    /// Takes away every name below a directory whose object has others. The last name of an object
    /// stays, wherever it is.
    fn drop_links_below(&self, dir: RelPath) -> Result<()> {
        let mut waiting = vec![dir];
        while let Some(path) = waiting.pop() {
            let dir = self.site.dir(&path)?;
            for entry in self.site.backing.list(&dir).context("list", self.site.at(&path))? {
                let at = path.join(&entry.name);
                if entry.kind == Kind::Dir {
                    waiting.push(at);
                    continue;
                }
                let shown = || self.site.at(&at);
                let stat =
                    self.site.backing.stat_at(&dir, &entry.name).context("look at", shown())?;
                if stat.nlink > 1 {
                    let removed = self.site.backing.unlink(&dir, &entry.name);
                    removed.context("remove a name", shown())?;
                }
            }
        }
        Ok(())
    }

    /// The directory that stands for `dir` in here.
    fn make_place(&mut self, dir: &RelPath) -> Result<RelPath> {
        let mut place = match &self.dir {
            Some(own) => own.clone(),
            None => self.make_own()?,
        };
        for name in dir.names() {
            let parent = self.site.dir(&place)?;
            place = place.join(name);
            match self.site.backing.mkdir(&parent, name, 0o700, own_creds()) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).context("make the directory", self.site.at(&place));
                }
                _ => {}
            }
        }
        Ok(place)
    }

    fn make_own(&mut self) -> Result<RelPath> {
        let above = private("quarantine");
        let parent = self.site.dir(&above)?;
        let time = jiff::Timestamp::now().strftime("%Y-%m-%d_%H-%M-%S").to_string();
        for number in 1..=DIR_TRIES {
            let name = match number {
                1 => own_name(&time),
                _ => own_name(&format!("{time}_{number}")),
            };
            match self.site.backing.mkdir(&parent, &name, 0o700, own_creds()) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error).context("make a directory in", self.site.at(&above));
                }
                Ok(()) => {
                    let own = above.join(&name);
                    self.dir = Some(own.clone());
                    return Ok(own);
                }
            }
        }
        Err(io::Error::from(io::ErrorKind::AlreadyExists))
            .context("make a directory in", self.site.at(&above))
    }
}

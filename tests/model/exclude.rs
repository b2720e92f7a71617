//! The operations on files that have no history.

use rearviewfs::fs::Writing;
use rearviewfs::replica::backing::RenameMode;

use super::drive::{Driver, Outcome, READ_WRITE, caller, entry, fail};
use super::reference::Body;

/// A name that is excluded.
fn excluded(number: u8) -> String {
    format!("n{number}.tmp")
}

impl Driver {
    pub(super) fn scratch(&mut self, dir: usize, name: u8, bytes: &[u8]) -> Outcome {
        let name = &excluded(name);
        let at = self.dir(dir);
        if self.child(at, name).is_none() {
            self.create(dir, name, false)?;
        }
        let Some(node) = self.child(at, name) else { return Err(format!("{name} was not made")) };
        self.reference.nodes[node].excluded = true;
        let wish = rearviewfs::fs::Wish { truncate: true, ..READ_WRITE };
        self.with_open(node, wish, |fs, fh| fs.write(fh, 0, bytes, Writing::default(), &caller()))?;
        self.reference.content(node, |content| *content = bytes.to_vec());
        self.reference.seal(node);
        Ok(())
    }

    pub(super) fn save(&mut self, dir: usize, name: u8, to: &str) -> Outcome {
        let name = &excluded(name);
        let at = self.dir(dir);
        let Some(node) = self.child(at, name) else { return Ok(()) };
        if self.child(at, to).is_some_and(|target| self.is_dir(target)) {
            return Ok(());
        }
        self.rename_within(at, name, to)?;
        self.reference.nodes[node].excluded = false;
        self.reference.seal(node);
        Ok(())
    }

    pub(super) fn hide(&mut self, dir: usize, name: &str, to: u8) -> Outcome {
        let to = &excluded(to);
        let at = self.dir(dir);
        let Some(node) = self.child(at, name) else { return Ok(()) };
        let one = &self.reference.nodes[node];
        // With another name, or unsealed changes, it has history for longer.
        if !matches!(one.now.body, Body::File(_)) || one.links > 1 || one.opens > 0 || one.dirty {
            return Ok(());
        }
        self.rename_within(at, name, to)?;
        self.reference.nodes[node].excluded = true;
        Ok(())
    }

    fn rename_within(&mut self, dir: usize, name: &str, to: &str) -> Outcome {
        let (source, target) = (self.child(dir, name), self.child(dir, to));
        let Some(source) = source else { return Ok(()) };
        let ino = self.ino(dir);
        self.fs()
            .rename(ino, &entry(name), ino, &entry(to), RenameMode::Replace, &caller())
            .or_else(fail("rename"))?;
        self.renamed((dir, name, source), (dir, to, target), RenameMode::Replace);
        Ok(())
    }
}

//! The operations on names.

use rearviewfs::replica::backing::RenameMode;

use super::drive::{Driver, Outcome, caller, entry, fail};

impl Driver {
    pub(super) fn unlink(&mut self, dir: usize, name: &str) -> Outcome {
        let dir = self.dir(dir);
        let answer = self.fs().unlink(self.ino(dir), &entry(name), &caller());
        match self.child(dir, name) {
            None if answer.as_ref().is_err_and(|e| e.is(rustix::io::Errno::NOENT)) => Ok(()),
            Some(node) if self.is_dir(node) => match answer {
                Err(error) if error.is(rustix::io::Errno::ISDIR) => Ok(()),
                other => Err(format!("unlink of a directory answered {other:?}")),
            },
            Some(node) => {
                answer.or_else(fail("unlink"))?;
                self.lost_name(dir, name, node);
                Ok(())
            }
            None => Err(format!("unlink of nothing answered {answer:?}")),
        }
    }

    fn lost_name(&mut self, dir: usize, name: &str, node: usize) {
        self.reference.leave(dir, name);
        self.reference.nodes[node].links -= 1;
    }

    pub(super) fn rmdir(&mut self, dir: usize, name: &str) -> Outcome {
        let dir = self.dir(dir);
        let answer = self.fs().rmdir(self.ino(dir), &entry(name), &caller());
        match self.child(dir, name) {
            Some(node) if self.is_dir(node) && self.reference.entries(node).is_empty() => {
                answer.or_else(fail("rmdir"))?;
                self.reference.leave(dir, name);
                Ok(())
            }
            _ if answer.is_err() => Ok(()),
            _ => Err("rmdir removed what it must not".into()),
        }
    }

    pub(super) fn rename(&mut self, from: (usize, &str), to: (usize, &str), mode: u8) -> Outcome {
        let (dir, to_dir) = (self.dir(from.0), self.dir(to.0));
        let mode = match mode {
            0 => RenameMode::NoReplace,
            1 => RenameMode::Exchange,
            _ => RenameMode::Replace,
        };
        let source = self.child(dir, from.1);
        let target = self.child(to_dir, to.1);
        let loops = |node: Option<usize>, into: usize| {
            node.is_some_and(|node| self.is_dir(node) && self.reference.contains(node, into))
        };
        // The kernel refuses these before it asks the filesystem.
        if loops(source, to_dir) || loops(target, dir) {
            return Ok(());
        }
        let kinds = (source.map(|n| self.is_dir(n)), target.map(|n| self.is_dir(n)));
        if mode == RenameMode::Replace && matches!(kinds, (Some(a), Some(b)) if a != b) {
            return Ok(());
        }
        let answer = self.fs().rename(
            self.ino(dir),
            &entry(from.1),
            self.ino(to_dir),
            &entry(to.1),
            mode,
            &caller(),
        );
        match (source, target, mode) {
            (None, ..) | (_, Some(_), RenameMode::NoReplace) | (_, None, RenameMode::Exchange) => {
                if answer.is_ok() {
                    Err("a rename that must fail succeeded".into())
                } else {
                    Ok(())
                }
            }
            (Some(source), Some(target), RenameMode::Replace)
                if target != source
                    && self.is_dir(target)
                    && !self.reference.entries(target).is_empty() =>
            {
                if answer.is_ok() {
                    Err("a full directory was replaced".into())
                } else {
                    Ok(())
                }
            }
            (Some(source), target, mode) => {
                answer.or_else(fail("rename"))?;
                self.renamed((dir, from.1, source), (to_dir, to.1, target), mode);
                Ok(())
            }
        }
    }

    pub(super) fn renamed(
        &mut self,
        (dir, name, source): (usize, &str, usize),
        (to_dir, to_name, target): (usize, &str, Option<usize>),
        mode: RenameMode,
    ) {
        if target == Some(source) {
            return;
        }
        self.reference.leave(dir, name);
        if let Some(target) = target {
            self.reference.leave(to_dir, to_name);
            if mode == RenameMode::Exchange {
                self.reference.enter(dir, name, target);
            } else {
                self.reference.nodes[target].links -= 1;
            }
        }
        self.reference.enter(to_dir, to_name, source);
    }

    pub(super) fn link(&mut self, file: usize, dir: usize, name: &str) -> Outcome {
        let Some(node) = self.pick(&self.reference.files(), file) else { return Ok(()) };
        let dir = self.dir(dir);
        let answer = self.fs().link(self.ino(node), self.ino(dir), &entry(name), &caller());
        if self.child(dir, name).is_some() {
            return if answer.is_ok() { Err("a link over a name".into()) } else { Ok(()) };
        }
        answer.or_else(fail("link"))?;
        self.reference.enter(dir, name, node);
        self.reference.nodes[node].links += 1;
        Ok(())
    }
}

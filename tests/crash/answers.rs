//! What a simulated disk answers to the kernel.

use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileType, Generation, INodeNo, ReplyEmpty, ReplyEntry, ReplyXattr, TimeOrNow,
};

use super::tree::{Body, Ino, Tree};

/// The kernel asks each time: nothing may be remembered that a change made stale.
pub const TTL: Duration = Duration::ZERO;

pub type Answer<T> = Result<T, Errno>;

pub fn kind(body: &Body) -> FileType {
    match body {
        Body::File(_) => FileType::RegularFile,
        Body::Dir(_) => FileType::Directory,
        Body::Symlink(_) => FileType::Symlink,
        Body::Other(rustix::fs::FileType::Fifo) => FileType::NamedPipe,
        Body::Other(rustix::fs::FileType::CharacterDevice) => FileType::CharDevice,
        Body::Other(rustix::fs::FileType::BlockDevice) => FileType::BlockDevice,
        Body::Other(_) => FileType::Socket,
    }
}

pub fn attr(tree: &Tree, ino: Ino) -> Answer<FileAttr> {
    let inode = tree.inodes.get(&ino).ok_or(Errno::ENOENT)?;
    let (size, nlink) = match &inode.body {
        Body::File(content) => (content.len(), tree.places(ino).len()),
        Body::Dir(_) => (4096, 2),
        Body::Symlink(target) => (target.len(), 1),
        Body::Other(_) => (0, tree.places(ino).len()),
    };
    Ok(FileAttr {
        ino: INodeNo(ino),
        size: size as u64,
        blocks: size.div_ceil(512) as u64,
        atime: inode.atime,
        mtime: inode.mtime,
        ctime: inode.ctime,
        crtime: SystemTime::UNIX_EPOCH,
        kind: kind(&inode.body),
        perm: inode.mode as u16,
        nlink: nlink as u32,
        uid: inode.uid,
        gid: inode.gid,
        rdev: inode.rdev,
        blksize: 4096,
        flags: 0,
    })
}

pub fn time(given: Option<TimeOrNow>) -> Option<SystemTime> {
    given.map(|time| match time {
        TimeOrNow::SpecificTime(time) => match SystemTime::UNIX_EPOCH.duration_since(time) {
            // The crate takes the nanoseconds of a time before 1970 off where they must be added.
            Ok(before) if before.subsec_nanos() > 0 => {
                let nanos = Duration::from_nanos(before.subsec_nanos().into());
                SystemTime::UNIX_EPOCH - Duration::from_secs(before.as_secs()) + nanos
            }
            _ => time,
        },
        TimeOrNow::Now => SystemTime::now(),
    })
}

pub fn end(reply: ReplyEmpty, answer: Answer<()>) {
    match answer {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

pub fn entered(reply: ReplyEntry, answer: Answer<FileAttr>) {
    match answer {
        Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
        Err(errno) => reply.error(errno),
    }
}

pub fn value(reply: ReplyXattr, size: u32, bytes: &[u8]) {
    match size {
        0 => reply.size(bytes.len() as u32),
        size if (size as usize) < bytes.len() => reply.error(Errno::ERANGE),
        _ => reply.data(bytes),
    }
}

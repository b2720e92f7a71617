//! A filesystem that takes `O_DIRECT` when a file is opened and refuses every write to it, also
//! after the flag was taken off again: so does one that passes calls on to another (mergerfs).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, SessionACL,
    WriteFlags,
};

use super::*;
use crate::mountpoint::device;
use crate::mountpoint::options::MountOptions;

const FILE: INodeNo = INodeNo(2);
/// Handles of files that were opened with `O_DIRECT`.
const DIRECT: FileHandle = FileHandle(1);

/// One file, `f`, in memory.
#[derive(Clone, Default)]
struct Refusing {
    bytes: Arc<Mutex<Vec<u8>>>,
    refused: Arc<AtomicU64>,
}

impl Refusing {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let is_file = ino == FILE;
        let epoch = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino,
            size: if is_file { self.bytes.lock().len() as u64 } else { 0 },
            blocks: 0,
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            crtime: epoch,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: 0o700,
            nlink: 1,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl fuser::Filesystem for Refusing {
    fn lookup(&self, _: &Request, _: INodeNo, entry: &OsStr, reply: ReplyEntry) {
        match entry == "f" {
            true => reply.entry(&Duration::ZERO, &self.attr(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&Duration::ZERO, &self.attr(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let is_direct = flags.0 & libc::O_DIRECT != 0;
        reply.opened(FileHandle(is_direct.into()), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let bytes = self.bytes.lock();
        let end = bytes.len().min(offset as usize + size as usize);
        reply.data(bytes.get(offset as usize..end).unwrap_or_default());
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if handle == DIRECT {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return reply.error(Errno::EINVAL);
        }
        let mut bytes = self.bytes.lock();
        let end = offset as usize + data.len();
        let length = bytes.len().max(end);
        bytes.resize(length, 0);
        bytes[offset as usize..end].copy_from_slice(data);
        reply.written(data.len() as u32);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// Unmounts when dropped.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        device::unmount(self.0, true).expect("unmounted");
    }
}

/// Every overwrite of a file failed with such a backing: its before-image could not be kept.
#[test]
fn what_takes_no_direct_write_is_written_to_through_the_page_cache() {
    let dir = TempDir::new().expect("a directory");
    let fs = Refusing::default();
    let Ok(fuse) = device::mount(dir.path(), b"refusing", &MountOptions::default()) else { return };
    let mounted = Mounted(dir.path());
    let (acl, config) = (SessionACL::All, fuser::Config::default());
    let session = fuser::Session::from_fd(fs.clone(), fuse, acl, config).expect("a handshake");
    let session = session.spawn().expect("it is served");
    let backing = DirBacking::open(dir.path()).expect("open");
    let root = backing.open_dir(&RelPath::root()).expect("open");
    let block = crate::replica::backing::BLOCK_BYTES;
    let mut pieces = crate::replica::Buffer::aligned(4 * block);
    (1..=4).for_each(|piece| pieces.extend(&[piece; 4096]));
    let open = || backing.open_file(&root, &name("f"), Access::Direct).expect("open");
    let file = open();
    let clone = file.clone();
    for at in [0, block, 0, 2 * block] {
        backing.write_at(&file, &pieces[at..][..block], at as u64).expect("write");
        backing.sync(&clone, true).expect("sync");
    }
    let refused = fs.refused.load(Ordering::SeqCst);
    // The next file is not even tried so.
    let next = open();
    backing.write_at(&next, &pieces[3 * block..], 3 * block as u64).expect("write");
    assert_eq!((refused, fs.refused.load(Ordering::SeqCst)), (1, 1));
    let mut read = vec![0; 5 * block];
    assert_eq!(backing.read_at(&clone, &mut read, 0).expect("read"), 4 * block);
    assert!(read[..4 * block] == pieces[..] && *fs.bytes.lock() == pieces[..]);
    drop((file, clone, next, root, backing, mounted));
    session.join().expect("it ends");
}

//! FUSE's requests over io_uring: one command both answers a request and fetches the next
//! (`Documentation/filesystems/fuse-io-uring.rst`, Linux 6.14; the structures are those of
//! `include/uapi/linux/fuse.h`).
//!
//! The kernel has a queue for each processor, and fills the memory of an entry of the queue of the
//! processor that a request is made on. A [`Ring`] has one such entry, so that whoever is long in
//! answering holds up nobody but itself.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;

use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// The most bytes of a request's or an answer's data. What the kernel asks for depends on the
/// longest write that was agreed on, and is not more where that is this.
pub const PAYLOAD_BYTES: usize = 1 << 20;
/// Where the payload begins in a ring's memory: on a page of its own.
const PAYLOAD_AT: usize = 4096;

/// `FUSE_IO_URING_CMD_REGISTER`: here is an entry's memory.
const REGISTER: u32 = 1;
/// `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`: here is an answer; the next request, please.
const COMMIT_AND_FETCH: u32 = 2;
/// Where `struct io_uring_sqe` has its `len`, in bytes.
const SQE_LEN_AT: usize = 24;

/// `struct fuse_uring_req_header`.
#[repr(C)]
struct Headers {
    /// `struct fuse_in_header`, or `fuse_out_header`.
    in_out: [u8; 128],
    /// The structure that the operation has, if any.
    operation: [u8; 128],
    flags: u64,
    commit_id: u64,
    payload_bytes: u32,
    padding: u32,
    reserved: u64,
}

/// `struct fuse_out_header`.
#[repr(C)]
struct OutHeader {
    len: u32,
    error: i32,
    unique: u64,
}

/// One request, and the room for its answer's data.
pub struct Slot<'a> {
    /// `struct fuse_in_header`.
    pub head: &'a [u8; 128],
    /// The structure that the operation has.
    pub operation: &'a [u8; 128],
    /// What came besides, in its first [`received`](Slot::received) bytes; the answer goes here.
    pub payload: &'a mut [u8],
    /// Bytes that came.
    pub received: usize,
}

/// An entry of the kernel's queue of one processor. Only for the thread that made it.
pub struct Ring {
    // Dropped first: the kernel lets go of the memory when the ring is closed.
    uring: IoUring<squeue::Entry128, cqueue::Entry>,
    memory: Memory,
    device: Arc<OwnedFd>,
    queue: u16,
    how_to_wait: EnterFlags,
    /// A completion that came with the registration.
    done: Option<i32>,
}

/// Headers and payload, which the kernel writes to while a ring waits.
struct Memory(NonNull<u8>);

impl Memory {
    const BYTES: usize = PAYLOAD_AT + PAYLOAD_BYTES;

    fn new() -> io::Result<Memory> {
        let (access, how) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), Memory::BYTES, access, how)? };
        NonNull::new(base.cast()).map(Memory).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn headers(&self) -> NonNull<Headers> {
        self.0.cast()
    }

    fn payload(&self) -> *mut u8 {
        // SAFETY: within the mapping.
        unsafe { self.0.as_ptr().add(PAYLOAD_AT) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, of this length, and borrowed by nobody any more.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), Memory::BYTES) };
    }
}

/// Whether io_uring can be used at all: it may be switched off
/// (`/proc/sys/kernel/io_uring_disabled`) or kept from us by a container.
pub fn is_possible() -> bool {
    new_uring().is_ok()
}

fn new_uring() -> io::Result<IoUring<squeue::Entry128, cqueue::Entry>> {
    // The kernel's part of a completion runs in this thread when it waits, not by an interrupt.
    IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(2)
}

impl Ring {
    /// Makes a ring for the queue of one processor, with memory that is taken as it is used.
    pub fn new(device: Arc<OwnedFd>, queue: u16) -> io::Result<Ring> {
        let uring = new_uring()?;
        // Who waits for requests waits for no disk: else an idle mount would look like one that is
        // overloaded (`/proc/pressure/io`). Since Linux 6.15.
        let how_to_wait = match uring.params().is_feature_no_iowait() {
            true => EnterFlags::NO_IOWAIT,
            false => EnterFlags::empty(),
        };
        Ok(Ring { uring, memory: Memory::new()?, device, queue, how_to_wait, done: None })
    }

    /// Gives the memory to the kernel: from now on requests can come. `EINVAL`: there is no such
    /// queue, or the memory is not enough.
    pub fn register(&mut self) -> io::Result<()> {
        let parts = [
            libc::iovec {
                iov_base: self.memory.headers().as_ptr().cast(),
                iov_len: size_of::<Headers>(),
            },
            libc::iovec { iov_base: self.memory.payload().cast(), iov_len: PAYLOAD_BYTES },
        ];
        let mut entry = self.command(REGISTER, 0).addr(Some(parts.as_ptr() as u64)).build();
        // SAFETY: the entry is `repr(C)` over the kernel's structure, 128 bytes long.
        unsafe {
            let len = (&raw mut entry).cast::<u8>().add(SQE_LEN_AT).cast::<u32>();
            len.write(parts.len() as u32);
        }
        self.push(&entry)?;
        // The kernel reads `parts` before this returns, and knows the memory until the ring is
        // closed.
        self.uring.submit()?;
        // It answers at once if it does not take it, else with the first request.
        self.done = self.uring.completion().next().map(|done| done.result());
        match self.done {
            Some(error) if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            _ => Ok(()),
        }
    }

    /// Waits for a request.
    pub fn wait(&mut self) -> io::Result<Slot<'_>> {
        let result = loop {
            let done = self.done.take();
            if let Some(result) = done.or_else(|| Some(self.uring.completion().next()?.result())) {
                break result;
            }
            let waited = self.uring.submitter().submit_with_args_and_flags(
                1,
                &types::SubmitArgs::new(),
                self.how_to_wait,
            );
            match waited.map_err(|error| (Errno::from_io_error(&error), error)) {
                // What was not submitted still is to be; what came meanwhile is there.
                Err((Some(Errno::INTR | Errno::AGAIN | Errno::BUSY | Errno::NOMEM), _)) => {}
                Err((_, error)) => return Err(error),
                Ok(_) => {}
            }
        };
        if result < 0 {
            return Err(io::Error::from_raw_os_error(-result));
        }
        // SAFETY: the memory is the kernel's only between the submission of an answer and its
        // completion. That has come, and nothing is submitted while the slot borrows the ring.
        unsafe {
            let headers = self.memory.headers().as_ref();
            let payload = slice::from_raw_parts_mut(self.memory.payload(), PAYLOAD_BYTES);
            let received = (headers.payload_bytes as usize).min(PAYLOAD_BYTES);
            Ok(Slot { head: &headers.in_out, operation: &headers.operation, payload, received })
        }
    }

    /// Answers the request that [`wait`](Ring::wait) returned: with the first so many bytes of the
    /// payload, or an error. It goes to the kernel with the next wait.
    pub fn answer(&mut self, outcome: Result<usize, i32>) -> io::Result<()> {
        let (bytes, error) = match outcome {
            Ok(bytes) => (bytes.min(PAYLOAD_BYTES) as u32, 0),
            Err(errno) => (0, -errno),
        };
        // SAFETY: as in `wait`: the memory is ours until the push below is submitted.
        let commit_id = unsafe {
            let headers = self.memory.headers().as_mut();
            let len = size_of::<OutHeader>() as u32 + bytes;
            let answer = OutHeader { len, error, unique: headers.commit_id };
            headers.in_out.as_mut_ptr().cast::<OutHeader>().write_unaligned(answer);
            headers.payload_bytes = bytes;
            headers.commit_id
        };
        let entry = self.command(COMMIT_AND_FETCH, commit_id).build();
        self.push(&entry)
    }

    /// `struct fuse_uring_cmd_req` in a command for the device.
    fn command(&self, operation: u32, commit_id: u64) -> opcode::UringCmd80 {
        #[repr(C)]
        struct Command {
            flags: u64,
            commit_id: u64,
            queue: u16,
            padding: [u8; 6],
        }
        let mut words = [0; 80];
        words[offset_of!(Command, commit_id)..][..8].copy_from_slice(&commit_id.to_ne_bytes());
        words[offset_of!(Command, queue)..][..2].copy_from_slice(&self.queue.to_ne_bytes());
        opcode::UringCmd80::new(types::Fd(self.device.as_raw_fd()), operation).cmd(words)
    }

    fn push(&mut self, entry: &squeue::Entry128) -> io::Result<()> {
        // SAFETY: all that the entry names lives as long as the ring, or until it is submitted.
        let pushed = unsafe { self.uring.submission().push(entry) };
        pushed.map_err(io::Error::other)
    }
}

//! What the kernel is told of an open descriptor, and the files it serves itself.

use std::num::NonZeroI32;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use fuser::{FileAttr, FileHandle, FopenFlags, Generation, ReplyCreate, ReplyOpen};
use rustix::io::Errno;

use crate::fs::{Opened, Passthrough};
use crate::sys::creds::without_fsetid;
use crate::sys::fuse;

/// Registers backing files with the connection behind a descriptor of /dev/fuse.
#[derive(Debug)]
pub struct Device(pub OwnedFd);

impl Passthrough for Device {
    fn register(&self, file: BorrowedFd<'_>) -> Result<NonZeroI32, Errno> {
        // A program's write would otherwise keep set-user-ID, since the daemon may.
        without_fsetid(|| fuse::backing_open(&self.0, file))?
    }

    fn unregister(&self, id: NonZeroI32) -> Result<(), Errno> {
        fuse::backing_close(&self.0, id)
    }
}

/// Answers OPEN and OPENDIR.
pub(super) fn answer(reply: ReplyOpen, o: &Opened) {
    let (fh, flags) = (FileHandle(o.fh), FopenFlags::from_bits_retain(o.flags()));
    match o.backing() {
        Some(id) => {
            // SAFETY: the operation core registered this number with this session's connection, and takes it back
            // when the descriptor that is answered here was released; `into_raw` leaves that to it.
            let backing = unsafe { reply.wrap_backing(id.get().cast_unsigned()) };
            reply.opened_passthrough(fh, flags, &backing);
            backing.into_raw();
        }
        None => reply.opened(fh, flags),
    }
}

/// Answers CREATE.
pub(super) fn answer_create(reply: ReplyCreate, ttl: Duration, attr: &FileAttr, o: &Opened) {
    let (fh, flags) = (FileHandle(o.fh), FopenFlags::from_bits_retain(o.flags()));
    match o.backing() {
        Some(id) => {
            // SAFETY: as above.
            let backing = unsafe { reply.wrap_backing(id.get().cast_unsigned()) };
            reply.created_passthrough(&ttl, attr, Generation(0), fh, flags, &backing);
            backing.into_raw();
        }
        None => reply.created(&ttl, attr, Generation(0), fh, flags),
    }
}

//! Calls on an open /dev/fuse that concern the connection, whatever transport carries its requests.

use std::num::NonZeroI32;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

use super::{check, last_errno};

/// `struct fuse_backing_map` of linux/fuse.h.
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// `FUSE_DEV_IOC_BACKING_OPEN` and `_CLOSE`: `_IOW(229, 1, struct fuse_backing_map)`, `_IOW(229, 2, uint32_t)`.
const BACKING_OPEN: libc::c_ulong = 0x4010_e501;
const BACKING_CLOSE: libc::c_ulong = 0x4004_e502;

/// Registers the regular file of `fd` (also an `O_PATH` one) as a backing file; gives its number. Descriptors served
/// from it have the caller's present credentials.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` or where passthrough was not agreed on; `ELOOP` on a stacked file system;
/// `EOPNOTSUPP` for what is no regular file; `ENOTTY` before Linux 6.9.
pub fn backing_open(dev: impl AsFd, fd: impl AsFd) -> Result<NonZeroI32, Errno> {
    let map = BackingMap { fd: fd.as_fd().as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: the kernel reads one `struct fuse_backing_map` (16 bytes) from the address of `map`, which is one.
    let id = unsafe { libc::ioctl(dev.as_fd().as_raw_fd(), BACKING_OPEN, &raw const map) };
    NonZeroI32::new(id).filter(|id| id.get() > 0).ok_or_else(last_errno)
}

/// Takes the registration back.
///
/// # Errors
/// `ENOENT`: there is none.
pub fn backing_close(dev: impl AsFd, id: NonZeroI32) -> Result<(), Errno> {
    let id = id.get();
    // SAFETY: the kernel reads 4 bytes from the address of `id`.
    check(unsafe { libc::ioctl(dev.as_fd().as_raw_fd(), BACKING_CLOSE, &raw const id) })
}

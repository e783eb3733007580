//! The ioctls that a file system of its own would serve: inode flags, project id, generation.

use rustix::fs as rfs;
use rustix::io::Errno;

use super::Fs;
use crate::sys;

/// linux/fs.h; the argument of the first three is an `int`, whatever their number says.
const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
const FS_IOC_GETVERSION: u32 = 0x8008_7601;
const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;

impl Fs {
    /// An ioctl on an open file or directory: the result and up to `out_size` bytes of answer.
    ///
    /// # Errors
    /// `ENOTTY` for every command that is not listed here.
    pub fn ioctl(&self, node: u64, cmd: u32, input: &[u8], out_size: usize) -> Result<(i32, Vec<u8>), Errno> {
        let sets = match cmd {
            FS_IOC_GETFLAGS | FS_IOC_GETVERSION | FS_IOC_FSGETXATTR => false,
            FS_IOC_SETFLAGS | FS_IOC_FSSETXATTR => true,
            _ => return Err(Errno::NOTTY),
        };
        let node = self.node(node)?;
        let done = self.with_node(&node, sets, |fd| {
            // O_PATH descriptors take no ioctl.
            let flags = if rfs::fcntl_getfl(fd)?.contains(rfs::OFlags::PATH) { Some(libc::O_RDONLY) } else { None };
            let reopened = flags.map(|f| self.backing().reopen(fd, f)).transpose()?;
            let fd = reopened.as_ref().map_or(fd, std::os::fd::AsFd::as_fd);
            let mut buf = [0_u8; 64];
            let n = input.len().min(buf.len());
            buf[..n].copy_from_slice(&input[..n]);
            let rc = sys::ioctl_buf(fd, cmd, &mut buf)?;
            Ok((rc, buf[..out_size.min(buf.len())].to_vec()))
        });
        match done {
            crate::engine::io::Access::Done(r) => r,
            // Flags of a version that is just being committed; the program may ask again.
            crate::engine::io::Access::Wait => Err(Errno::BUSY),
        }
    }
}

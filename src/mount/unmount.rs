//! Taking a mount away: umount2(2), or fusermount3 where only that may.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::mount::UnmountFlags;

use crate::error::Errno;

/// Unmounts `mountpoint`; `lazy` detaches it now and lets open files go on until they are closed.
///
/// # Errors
/// `EBUSY` when it is in use and not `lazy`; `EINVAL` when nothing is mounted there; what the system says.
pub fn unmount(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let detach = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    match rustix::mount::unmount(mountpoint, detach | UnmountFlags::NOFOLLOW) {
        Err(Errno::PERM) => fusermount(mountpoint, lazy),
        r => Ok(r?),
    }
}

fn fusermount(mountpoint: &Path, lazy: bool) -> io::Result<()> {
    let output = Command::new("fusermount3")
        .args(if lazy { &["-u", "-z", "--"][..] } else { &["-u", "--"][..] })
        .arg(mountpoint)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("busy") { Err(Errno::BUSY.into()) } else { Err(io::Error::other(said.trim().to_owned())) }
}

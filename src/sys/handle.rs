//! File handles (name_to_handle_at(2), open_by_handle_at(2)): a name for an inode that needs no descriptor, that
//! no rename makes stale, and that a reused inode number does not fool, since it holds the generation.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use super::last_errno;

/// `MAX_HANDLE_SZ` of linux/exportfs.h.
const MAX: usize = 128;

/// `struct file_handle` with room for the largest handle.
#[repr(C)]
struct Raw {
    bytes: u32,
    kind: i32,
    data: [u8; MAX],
}

/// Enough for the handles of ext4 (8 bytes), XFS (12) and btrfs (20).
const SHORT: usize = 20;

/// An owned file handle. Each node has one, so the usual ones are kept without an allocation of their own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FileHandle {
    kind: i32,
    data: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Bytes {
    Short(u8, [u8; SHORT]),
    Long(Box<[u8]>),
}

impl Bytes {
    fn of(data: &[u8]) -> Self {
        let mut short = [0; SHORT];
        match short.get_mut(..data.len()) {
            Some(room) => {
                room.copy_from_slice(data);
                Self::Short(data.len() as u8, short)
            }
            None => Self::Long(data.into()),
        }
    }

    fn get(&self) -> &[u8] {
        match self {
            Self::Short(n, data) => &data[..usize::from(*n)],
            Self::Long(data) => data,
        }
    }
}

impl FileHandle {
    /// From type and bytes, as the kernel gives them.
    pub fn from_parts(kind: i32, data: &[u8]) -> Self {
        Self { kind, data: Bytes::of(data) }
    }

    /// Its type and bytes, to be kept on disk.
    pub fn parts(&self) -> (i32, &[u8]) {
        (self.kind, self.data.get())
    }
}

/// The handle of the inode that `fd` (also an `O_PATH` one) refers to.
///
/// # Errors
/// `EOPNOTSUPP` where the file system has no handles.
pub fn handle_of(fd: impl AsFd) -> Result<FileHandle, Errno> {
    let mut raw = Raw { bytes: MAX as u32, kind: 0, data: [0; MAX] };
    let mut mount_id: libc::c_int = 0;
    // SAFETY: `raw` has the layout of `struct file_handle` followed by `bytes` bytes, the path is a C string.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            &raw mut raw,
            &raw mut mount_id,
            libc::AT_EMPTY_PATH,
        )
    };
    if rc != 0 {
        return Err(last_errno());
    }
    Ok(FileHandle { kind: raw.kind, data: Bytes::of(&raw.data[..(raw.bytes as usize).min(MAX)]) })
}

/// Opens the inode of a handle. `mount` is any descriptor on the same file system. Needs `CAP_DAC_READ_SEARCH`.
///
/// # Errors
/// `ESTALE` when the inode is gone, `EPERM` without the capability.
pub fn open_handle(mount: impl AsFd, h: &FileHandle, flags: i32) -> Result<OwnedFd, Errno> {
    let data = h.data.get();
    let mut raw = Raw { bytes: data.len() as u32, kind: h.kind, data: [0; MAX] };
    // One that was read from the disk may be of any length.
    raw.data.get_mut(..data.len()).ok_or(Errno::INVAL)?.copy_from_slice(data);
    // SAFETY: `raw` has the layout of `struct file_handle` followed by `bytes` bytes.
    let fd = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, mount.as_fd().as_raw_fd(), &raw mut raw, flags | libc::O_CLOEXEC)
    };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel just made this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_of_every_length_are_kept() {
        for n in [0, 8, SHORT, SHORT + 1, MAX] {
            let data: Vec<u8> = (0..n).map(|i| i as u8).collect();
            assert_eq!(Bytes::of(&data).get(), data);
        }
        // With what the kernel knows beside it, a node costs this much less than with a box.
        assert!(size_of::<FileHandle>() <= 32);
    }

    #[test]
    fn a_handle_leads_back_to_its_inode() {
        let Ok(file) = tempfile::tempfile() else { panic!("a temporary file") };
        let Ok(h) = handle_of(&file) else { return };
        match open_handle(&file, &h, libc::O_RDONLY) {
            Ok(again) => assert_eq!(handle_of(&again), Ok(h)),
            Err(e) => assert_eq!(e, Errno::PERM),
        }
    }
}

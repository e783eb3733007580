//! System calls that the libraries lack, each as one safe function. Owns no state; calls nobody else here.

pub mod creds;
pub mod fanotify;
pub mod fuse;
pub mod handle;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Errno;

fn check(rc: libc::c_int) -> Result<(), Errno> {
    if rc == 0 { Ok(()) } else { Err(last_errno()) }
}

/// The error of the system call that just failed on this thread.
fn last_errno() -> Errno {
    std::io::Error::last_os_error().raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error)
}

/// Starts the write-back of all dirty pages of a file and does not wait (sync_file_range(2)).
pub fn write_out_start(fd: impl AsFd) -> Result<(), Errno> {
    // SAFETY: plain integers and a descriptor that lives through the call.
    check(unsafe { libc::sync_file_range(fd.as_fd().as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) })
}

/// Writes all dirty pages of a file to the device and waits for them. They may then still sit in the device's
/// cache: this is no flush. Reports **and consumes** a write-back error.
pub fn write_out_wait(fd: impl AsFd) -> Result<(), Errno> {
    write_out_range(fd, 0, 0)
}

/// The same of a range; without a length, to the end.
pub fn write_out_range(fd: impl AsFd, off: u64, len: u64) -> Result<(), Errno> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let (off, len) = (i64::try_from(off).unwrap_or(i64::MAX), i64::try_from(len).unwrap_or(i64::MAX));
    // SAFETY: plain integers and a descriptor that lives through the call.
    check(unsafe { libc::sync_file_range(fd.as_fd().as_raw_fd(), off, len, flags) })
}

/// syncfs(2): everything dirty in the file system that holds `fd`, strangers' data too.
pub fn syncfs(fd: impl AsFd) -> Result<(), Errno> {
    // SAFETY: a descriptor that lives through the call.
    check(unsafe { libc::syncfs(fd.as_fd().as_raw_fd()) })
}

/// close(2) with its error, which a drop hides.
pub fn close(fd: std::os::fd::OwnedFd) -> Result<(), Errno> {
    // SAFETY: the descriptor is owned and given up here.
    check(unsafe { libc::close(std::os::fd::IntoRawFd::into_raw_fd(fd)) })
}

/// A random number that nobody can guess.
pub fn random() -> Result<u64, Errno> {
    let mut bytes = [0_u8; 8];
    // SAFETY: the kernel writes at most 8 bytes to `bytes`, which has them.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    // Up to 256 bytes come whole (getrandom(2)).
    if n == bytes.len() as isize { Ok(u64::from_ne_bytes(bytes)) } else { Err(last_errno()) }
}

/// Closes every descriptor from `first` on. For the start of a process, while it has opened nothing itself.
pub fn close_from(first: u32) -> Result<(), Errno> {
    // SAFETY: plain integers; descriptors that an object of this process owned would be closed under it, and there
    // are none yet.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) as libc::c_int })
}

/// `struct fsxattr` of linux/fs.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FsXattr {
    /// `FS_XFLAG_*`.
    pub xflags: u32,
    extsize: u32,
    nextents: u32,
    /// Project id for quotas.
    pub project: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801c_581f;
const FS_IOC_FSSETXATTR: libc::c_ulong = 0x401c_5820;

/// Inode flags and project id (ioctl `FS_IOC_FSGETXATTR`).
pub fn get_fsxattr(fd: BorrowedFd<'_>) -> Result<FsXattr, Errno> {
    let mut x = FsXattr::default();
    // SAFETY: the kernel writes one `struct fsxattr` (28 bytes) to the address of `x`, which is one.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut x) })?;
    Ok(x)
}

/// Sets inode flags and project id (ioctl `FS_IOC_FSSETXATTR`).
pub fn set_fsxattr(fd: BorrowedFd<'_>, x: &FsXattr) -> Result<(), Errno> {
    // SAFETY: the kernel reads one `struct fsxattr` (28 bytes) from the address of `x`, which is one.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const *x) })
}

/// An ioctl whose argument is a buffer of the size that its number encodes (`_IOR`, `_IOW`, `_IOWR`).
///
/// # Errors
/// The kernel's, or `EINVAL` when `buf` is smaller than the number says.
pub fn ioctl_buf(fd: BorrowedFd<'_>, cmd: u32, buf: &mut [u8]) -> Result<i32, Errno> {
    let size = ((cmd >> 16) & 0x3fff) as usize;
    if buf.len() < size {
        return Err(Errno::INVAL);
    }
    // SAFETY: the command number bounds what the kernel reads and writes to `size` bytes, which `buf` has; only
    // commands from the caller's allow-list get here.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), cmd.into(), buf.as_mut_ptr()) };
    if rc < 0 { Err(last_errno()) } else { Ok(rc) }
}

/// Gives free memory back to the system. The allocator does so by itself only for what lies on top of its heaps.
pub fn release_memory() {
    // SAFETY: no preconditions; free memory is all that it touches.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Whether two threads belong to one process. A thread that has ended may have belonged to it.
pub fn same_process(a: u32, b: u32) -> bool {
    let group = |tid: u32| -> Option<String> {
        let status = std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
        status.lines().find_map(|l| l.strip_prefix("Tgid:")).map(|t| t.trim().to_owned())
    };
    match (group(a), group(b)) {
        (Some(a), Some(b)) => a == b,
        _ => true,
    }
}

/// Memory aligned to 4096 bytes, for `O_DIRECT`.
#[derive(Debug)]
pub struct AlignedBuf {
    ptr: std::ptr::NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: the buffer owns its memory alone, like a `Box<[u8]>`.
unsafe impl Send for AlignedBuf {}

impl AlignedBuf {
    /// A buffer that holds a copy of `data`; `None` when `data` is empty.
    pub fn from_slice(data: &[u8]) -> Option<Self> {
        let layout = std::alloc::Layout::from_size_align(data.len(), 4096).ok().filter(|l| l.size() > 0)?;
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { std::alloc::alloc(layout) };
        let Some(ptr) = std::ptr::NonNull::new(raw) else { std::alloc::handle_alloc_error(layout) };
        // SAFETY: `ptr` owns at least `data.len()` fresh bytes that overlap nothing.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), ptr.as_ptr(), data.len()) };
        Some(Self { ptr, layout })
    }

    /// So many zero bytes, of which there is at least one.
    pub fn zeroed(len: usize) -> Self {
        Self::from_slice(&vec![0; len.max(1)]).unwrap_or_else(|| unreachable!("it is not empty"))
    }

    /// Where it begins.
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }

    /// Begins with these bytes, as many as there is room for.
    pub fn fill_from(&mut self, data: &[u8]) {
        let n = data.len().min(self.layout.size());
        // SAFETY: `ptr` owns `layout.size()` bytes, and `&mut self` says that nobody else looks at them.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.ptr.as_ptr(), n) };
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `from_slice` initialised all `layout.size()` bytes.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `from_slice` with this very layout.
        unsafe { std::alloc::dealloc(self.ptr.as_ptr(), self.layout) };
    }
}

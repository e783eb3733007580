//! Acting as the caller for the length of one system call: file system user, group and umask of this thread only.
//!
//! The kernel has checked the caller's permissions before the request came (`default_permissions`), with all their
//! supplementary groups; so `CAP_DAC_OVERRIDE` stays on, and the identity decides only what a *new* inode gets:
//! owner, group, set-group-ID inheritance, umask or default ACL, quota.

use std::cell::Cell;

/// Who made the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id.
    pub pid: u32,
    /// umask of the process, for creating operations; 0 elsewhere.
    pub umask: u32,
}

impl Caller {
    /// The daemon itself.
    pub const DAEMON: Self = Self { uid: 0, gid: 0, pid: 0, umask: 0 };
}

/// Bits of `_LINUX_CAPABILITY_VERSION_3` for the effective set that [`As`] keeps.
const CAP_DAC: u32 = (1 << 1) | (1 << 2); // CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
const CAP_V3: u32 = 0x2008_0522;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

thread_local! {
    /// Whether this thread has an umask of its own (`unshare(CLONE_FS)`), which is per process otherwise.
    static OWN_FS: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, this thread creates inodes as the caller. Restores the daemon's identity when dropped.
#[derive(Debug)]
pub struct As {
    switched: bool,
}

impl As {
    /// Takes the caller's identity. Without privileges (an ordinary user's own mount) only the umask changes.
    pub fn caller(c: &Caller) -> Self {
        own_umask(c.umask);
        // SAFETY: geteuid has no preconditions.
        let root = unsafe { libc::geteuid() } == 0;
        let switched = root && (c.uid != 0 || c.gid != 0);
        if switched {
            // SAFETY: setfsgid and setfsuid change this thread alone and take plain integers.
            unsafe {
                libc::setfsgid(c.gid);
                libc::setfsuid(c.uid);
            }
            raise_dac();
        }
        Self { switched }
    }
}

impl Drop for As {
    fn drop(&mut self) {
        own_umask(0);
        if self.switched {
            // SAFETY: as above; going back to user 0 restores the file system capabilities from the permitted set.
            unsafe {
                libc::setfsuid(0);
                libc::setfsgid(0);
            }
        }
    }
}

/// Sets the umask of this thread alone.
fn own_umask(mask: u32) {
    OWN_FS.with(|own| {
        if !own.get() {
            // SAFETY: gives this thread a private copy of umask, working and root directory; no memory is involved.
            own.set(unsafe { libc::unshare(libc::CLONE_FS) } == 0);
        }
    });
    // SAFETY: umask cannot fail.
    unsafe { libc::umask(mask) };
}

/// Leaving user 0 drops the file system capabilities from the effective set; the two that override permission
/// checks come back, `CAP_FSETID` and `CAP_CHOWN` do not: the kernel then clears S_ISGID as it would for the caller.
fn raise_dac() {
    let mut head = CapHeader { version: CAP_V3, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 reads and writes one header and two data records, which these are.
    unsafe {
        if libc::syscall(libc::SYS_capget, &raw mut head, data.as_mut_ptr()) == 0 {
            data[0].effective |= CAP_DAC & data[0].permitted;
            libc::syscall(libc::SYS_capset, &raw mut head, data.as_ptr());
        }
    }
}

//! Acting as the caller for the length of one system call: file system user, group and umask of this thread only.
//!
//! The kernel has checked the caller's permissions before the request came (`default_permissions`), with all their
//! supplementary groups; so `CAP_DAC_OVERRIDE` stays on, and the identity decides only what a *new* inode gets:
//! owner, group, set-group-ID inheritance, umask or default ACL, quota. The supplementary groups, which the protocol
//! does not carry, come from `/proc` in the few cases where they decide something: whether set-group-ID stays.

use std::cell::Cell;

use rustix::io::Errno;

use super::last_errno;

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

    /// Whether set-group-ID on a file of group `gid` survives what this caller does to it (kernel
    /// `in_group_or_capable`): members may keep it, and who has `CAP_FSETID`.
    pub fn keeps_sgid(&self, gid: u32) -> bool {
        self.uid == 0 || self.gid == gid || self.groups().contains(&gid)
    }

    /// Supplementary groups; none when the thread is gone or is not to be seen.
    fn groups(&self) -> Vec<u32> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("Groups:")).unwrap_or_default();
        line.split_ascii_whitespace().filter_map(|g| g.parse().ok()).collect()
    }
}

/// Bits of `_LINUX_CAPABILITY_VERSION_3` for the effective set that [`As`] keeps: `CAP_DAC_OVERRIDE`,
/// `CAP_DAC_READ_SEARCH`, and `CAP_MKNOD`, which the kernel has asked of the caller.
const KEPT: u32 = (1 << 1) | (1 << 2) | (1 << 27);
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
    groups: Option<Vec<libc::gid_t>>,
}

impl As {
    /// Takes the caller's identity, to make an inode with `mode`. Without privileges (an ordinary user's own mount)
    /// only the umask changes.
    pub fn caller(c: &Caller, mode: u32) -> Self {
        own_umask(c.umask);
        // SAFETY: geteuid has no preconditions.
        let root = unsafe { libc::geteuid() } == 0;
        let switched = root && (c.uid != 0 || c.gid != 0);
        // In a set-group-ID directory the new inode keeps set-group-ID only for a member of that group.
        let groups = (switched && c.uid != 0 && mode & libc::S_ISGID != 0).then(|| swap_groups(&c.groups()));
        if switched {
            // SAFETY: setfsgid and setfsuid change this thread alone and take plain integers.
            unsafe {
                libc::setfsgid(c.gid);
                libc::setfsuid(c.uid);
            }
            raise_kept();
        }
        Self { switched, groups: groups.flatten() }
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
        if let Some(groups) = &self.groups {
            swap_groups(groups);
        }
    }
}

/// Sets the supplementary groups of this thread alone (the C library would set them for all); gives the former ones,
/// or `None` when nothing was changed.
fn swap_groups(new: &[libc::gid_t]) -> Option<Vec<libc::gid_t>> {
    // SAFETY: with size 0 nothing is written.
    let n = unsafe { libc::getgroups(0, std::ptr::null_mut()) };
    let mut old: Vec<libc::gid_t> = vec![0; usize::try_from(n).ok()?];
    // SAFETY: `old` has room for `n` groups, `new` holds as many as is said.
    unsafe {
        let got = libc::getgroups(n, old.as_mut_ptr());
        old.truncate(usize::try_from(got).ok()?);
        (libc::syscall(libc::SYS_setgroups, new.len(), new.as_ptr()) == 0).then_some(old)
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

/// The capabilities that the daemon of a mount keeps, with what for. `CAP_SYS_RESOURCE`, for one, is not among them: with
/// it, no quota would hold for anybody.
const NEEDED: [u32; 12] = [
    0,  // CAP_CHOWN: a new version gets the owner of the old one
    1,  // CAP_DAC_OVERRIDE: the kernel has checked the caller's permissions
    2,  // CAP_DAC_READ_SEARCH: files by handle, not by path
    3,  // CAP_FOWNER: modes and times of others' files
    4,  // CAP_FSETID: a chmod may leave set-group-ID where it is
    6,  // CAP_SETGID: creating as the caller
    7,  // CAP_SETUID: the same
    9,  // CAP_LINUX_IMMUTABLE: chattr +i and +a
    21, // CAP_SYS_ADMIN: mount, unmount, `trusted.` and `security.` attributes
    27, // CAP_MKNOD: device nodes
    31, // CAP_SETFCAP: file capabilities
    33, // CAP_MAC_ADMIN: security labels
];

/// Gives up all capabilities but those that are needed, for this thread and those that it starts, for good.
///
/// # Errors
/// What the kernel says.
pub fn keep_needed_capabilities() -> Result<(), Errno> {
    let mut head = CapHeader { version: CAP_V3, pid: 0 };
    let mut data = [CapData::default(); 2];
    let keep = NEEDED.iter().fold([0_u32; 2], |mut k, cap| {
        k[(cap / 32) as usize] |= 1 << (cap % 32);
        k
    });
    // SAFETY: the bounding set takes plain integers; version 3 reads and writes one header and two data records.
    unsafe {
        for cap in (0..64_u32).filter(|c| keep[(c / 32) as usize] & (1 << (c % 32)) == 0) {
            // Refused to ordinary users, who have none to lose, and for numbers that the kernel does not know.
            libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(cap), 0, 0, 0);
        }
        if libc::syscall(libc::SYS_capget, &raw mut head, data.as_mut_ptr()) != 0 {
            return Err(last_errno());
        }
        for (d, keep) in data.iter_mut().zip(keep) {
            *d = CapData { effective: d.effective & keep, permitted: d.permitted & keep, inheritable: 0 };
        }
        if libc::syscall(libc::SYS_capset, &raw mut head, data.as_ptr()) != 0 {
            return Err(last_errno());
        }
    }
    Ok(())
}

/// Leaving user 0 drops the file system capabilities from the effective set; those whose checks the kernel has made
/// come back, `CAP_FSETID` and `CAP_CHOWN` do not: the kernel then clears S_ISGID as it would for the caller.
fn raise_kept() {
    // What cannot be raised is missed by the call that needs it, which says so.
    let _ = effective(|e, permitted| e | (KEPT & permitted));
}

/// Runs `f` without `CAP_FSETID` in force on this thread: what keeps this thread's credentials (a file registered for
/// passthrough) loses set-user-ID and set-group-ID when it is written, as with any program that has no such privilege.
///
/// # Errors
/// What the kernel says; `f` did not run then.
pub fn without_fsetid<T>(f: impl FnOnce() -> T) -> Result<T, Errno> {
    const FSETID: u32 = 1 << 4;
    let had = effective(|e, _| e & !FSETID)?;
    let r = f();
    effective(|_, _| had)?;
    Ok(r)
}

/// Changes the first 32 effective capabilities of this thread, given them and the permitted ones; gives the former ones.
fn effective(change: impl FnOnce(u32, u32) -> u32) -> Result<u32, Errno> {
    let mut head = CapHeader { version: CAP_V3, pid: 0 };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 reads and writes one header and two data records, which these are.
    unsafe {
        if libc::syscall(libc::SYS_capget, &raw mut head, data.as_mut_ptr()) != 0 {
            return Err(last_errno());
        }
        let had = data[0].effective;
        data[0].effective = change(had, data[0].permitted);
        if data[0].effective != had && libc::syscall(libc::SYS_capset, &raw mut head, data.as_ptr()) != 0 {
            return Err(last_errno());
        }
        Ok(had)
    }
}

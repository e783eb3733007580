//! fanotify(7) on single directories: who changed a name in one of them, or what a name there leads to.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;

use super::handle::FileHandle;
use super::{check, last_errno};

/// A name came, went, or leads to something else.
pub const NAMES: u64 = libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_MOVED_FROM | libc::FAN_MOVED_TO;
/// Content or attributes changed. A memory map is written without an event; a close of its descriptor is one.
const CONTENT: u64 = libc::FAN_MODIFY | libc::FAN_ATTRIB | libc::FAN_CLOSE_WRITE;
/// `FAN_EVENT_INFO_TYPE_DFID_NAME` of linux/fanotify.h.
const DFID_NAME: u8 = 2;
/// Size of `struct fanotify_event_metadata`.
const HEAD: usize = 24;

/// A group of marks, and the queue of their events.
#[derive(Debug)]
pub struct Group(OwnedFd);

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event<'a> {
    /// What happened, `FAN_*`.
    pub mask: u64,
    /// Process that did it; 0: another one, for a group without privileges.
    pub pid: u32,
    /// The directory.
    pub dir: FileHandle,
    /// The name in it; `.` for the directory itself.
    pub name: &'a OsStr,
}

/// What was read of the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told<'a> {
    /// An event.
    Event(Event<'a>),
    /// The queue was full: anything may have changed.
    Overflow,
}

impl Group {
    /// An empty group.
    ///
    /// # Errors
    /// `EINVAL`, `EPERM` before Linux 5.13; `EMFILE`.
    pub fn new() -> Result<Self, Errno> {
        let plain = libc::FAN_CLASS_NOTIF | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK | libc::FAN_REPORT_DFID_NAME;
        let open = |flags| {
            // SAFETY: plain integers.
            let fd = unsafe { libc::fanotify_init(flags, libc::O_RDONLY as libc::c_uint) };
            if fd < 0 { Err(last_errno()) } else { Ok(fd) }
        };
        // The number of marks is that of directories the kernel knows; their bound is for the unprivileged.
        let fd = open(plain | libc::FAN_UNLIMITED_MARKS).or_else(|_| open(plain))?;
        // SAFETY: the kernel just made this descriptor, nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Watches a directory and what its names lead to.
    ///
    /// # Errors
    /// `ENODEV`, `EOPNOTSUPP`, `EXDEV` where the file system has no handles; `ENOSPC` at the bound on marks.
    pub fn watch(&self, dir: impl AsFd) -> Result<(), Errno> {
        let mask = NAMES | CONTENT | libc::FAN_EVENT_ON_CHILD | libc::FAN_ONDIR;
        self.mark(dir.as_fd(), libc::FAN_MARK_ADD | libc::FAN_MARK_ONLYDIR, mask)
    }

    /// Watches it no more.
    ///
    /// # Errors
    /// `ENOENT`: it was not watched.
    pub fn forget(&self, dir: impl AsFd) -> Result<(), Errno> {
        let mask = NAMES | CONTENT | libc::FAN_EVENT_ON_CHILD | libc::FAN_ONDIR;
        self.mark(dir.as_fd(), libc::FAN_MARK_REMOVE, mask)
    }

    /// Tells nothing of content that is written to this file, whatever is watched: an event costs the writer as much as a
    /// small write.
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.0.
    pub fn ignore(&self, file: impl AsFd) -> Result<(), Errno> {
        let flags = libc::FAN_MARK_ADD | libc::FAN_MARK_IGNORE | libc::FAN_MARK_IGNORED_SURV_MODIFY;
        self.mark(file.as_fd(), flags, libc::FAN_MODIFY)
    }

    /// Tells of it again.
    ///
    /// # Errors
    /// `ENOENT`: it was not ignored.
    pub fn heed(&self, file: impl AsFd) -> Result<(), Errno> {
        self.mark(file.as_fd(), libc::FAN_MARK_REMOVE | libc::FAN_MARK_IGNORE, libc::FAN_MODIFY)
    }

    fn mark(&self, fd: BorrowedFd<'_>, flags: libc::c_uint, mask: u64) -> Result<(), Errno> {
        // SAFETY: descriptors that live through the call; without a path the mark is on the object of `fd`.
        check(unsafe { libc::fanotify_mark(self.0.as_raw_fd(), flags, mask, fd.as_raw_fd(), std::ptr::null()) })
    }

    /// Takes events from the queue and calls `each`; false when there are none.
    ///
    /// # Errors
    /// What read(2) says.
    pub fn read(&self, buf: &mut [u8], mut each: impl FnMut(Told<'_>)) -> Result<bool, Errno> {
        match rustix::io::read(&self.0, &mut *buf) {
            Ok(0) | Err(Errno::AGAIN) => Ok(false),
            Ok(n) => {
                parse(&buf[..n], &mut each);
                Ok(true)
            }
            Err(Errno::INTR) => Ok(true),
            Err(e) => Err(e),
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// What cannot be understood counts as an overflow: nothing is lost by it.
fn parse<'a>(mut bytes: &'a [u8], each: &mut impl FnMut(Told<'a>)) {
    while !bytes.is_empty() {
        let Some((told, rest)) = one(bytes) else { return each(Told::Overflow) };
        each(told);
        bytes = rest;
    }
}

/// `struct fanotify_event_metadata`, then `struct fanotify_event_info_fid` with a file handle and a name.
fn one(bytes: &[u8]) -> Option<(Told<'_>, &[u8])> {
    let len = u32::from_ne_bytes(number(bytes, 0)?) as usize;
    let mask = u64::from_ne_bytes(number(bytes, 8)?);
    let pid = i32::from_ne_bytes(number(bytes, 20)?).cast_unsigned();
    if len < HEAD || len > bytes.len() {
        return None;
    }
    let (event, rest) = bytes.split_at(len);
    if mask & libc::FAN_Q_OVERFLOW != 0 {
        return Some((Told::Overflow, rest));
    }
    let info = event.get(HEAD..)?;
    let info_len = u16::from_ne_bytes(number(info, 2)?) as usize;
    if *info.first()? != DFID_NAME {
        return None;
    }
    // Header (4 bytes), file system id (8), size and type of the handle (4 each), the handle, the name.
    let size = u32::from_ne_bytes(number(info, 12)?) as usize;
    let kind = i32::from_ne_bytes(number(info, 16)?);
    let handle = info.get(20..20 + size)?;
    let name = info.get(20 + size..info_len)?.split(|b| *b == 0).next()?;
    let dir = FileHandle::from_parts(kind, handle);
    Some((Told::Event(Event { mask, pid, dir, name: OsStr::from_bytes(name) }), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::handle::handle_of;

    fn told(group: &Group) -> Vec<(u64, u32, FileHandle, String)> {
        let mut all = Vec::new();
        let mut buf = vec![0; 8192];
        while group
            .read(&mut buf, |t| match t {
                Told::Event(e) => all.push((e.mask, e.pid, e.dir, e.name.to_string_lossy().into_owned())),
                Told::Overflow => panic!("overflow"),
            })
            .unwrap()
        {}
        all
    }

    #[test]
    fn names_content_and_who() {
        let dir = tempfile::tempdir().unwrap();
        let fd = std::fs::File::open(dir.path()).unwrap();
        let group = Group::new().unwrap();
        group.watch(&fd).unwrap();
        std::fs::write(dir.path().join("a"), "x").unwrap();
        let mine = told(&group);
        assert!(mine.iter().all(|e| e.1 == std::process::id() && e.2 == handle_of(&fd).unwrap()), "{mine:?}");
        assert!(mine.iter().any(|e| e.0 & libc::FAN_CREATE != 0 && e.3 == "a"), "{mine:?}");
        assert!(mine.iter().any(|e| e.0 & libc::FAN_MODIFY != 0 && e.3 == "a"), "{mine:?}");
        let moved = std::process::Command::new("mv").args(["a", "b"]).current_dir(dir.path()).status().unwrap();
        assert!(moved.success());
        let theirs = told(&group);
        assert!(theirs.iter().all(|e| e.1 != std::process::id()), "{theirs:?}");
        assert!(theirs.iter().any(|e| e.0 & libc::FAN_MOVED_TO != 0 && e.3 == "b"), "{theirs:?}");
        let touch =
            || std::process::Command::new("sh").args(["-c", "echo >> b"]).current_dir(dir.path()).status().unwrap();
        let file = std::fs::File::open(dir.path().join("b")).unwrap();
        let modified = || told(&group).iter().any(|e| e.0 & libc::FAN_MODIFY != 0);
        group.ignore(&file).unwrap();
        assert!(touch().success() && !modified());
        group.heed(&file).unwrap();
        assert!(touch().success() && modified());
        group.forget(&fd).unwrap();
        std::fs::write(dir.path().join("c"), "x").unwrap();
        assert!(told(&group).is_empty());
    }

    #[test]
    fn what_is_cut_short_counts_as_an_overflow() {
        let mut event = vec![0_u8; 48];
        event[0] = 48;
        for cut in [0, 3, 23, 24, 40] {
            let mut all = Vec::new();
            parse(&event[..cut], &mut |t| all.push(matches!(t, Told::Overflow)));
            assert_eq!(all, vec![true; usize::from(cut > 0)], "{cut}");
        }
        let mut all = 0;
        parse(&event, &mut |t| all += usize::from(t == Told::Overflow));
        assert_eq!(all, 1, "no info record of the kind that was asked for");
    }
}

//! Attributes: stat, chmod, chown, truncate, times, readlink, statfs.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::{
    self as rfs, AtFlags, CWD, FileType, Gid, Mode, Stat, StatVfs, StatVfsMountFlags, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, Uid,
};
use rustix::io::Errno;

use super::{Attr, Caller, Fs, Kind, Node, Reply};
use crate::backend::Backing;
use crate::engine::io::Access;

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The current time.
    Now,
    /// This time: seconds since 1970, negative before, and nanoseconds that count forward from them.
    At(i64, u32),
}

/// Attributes to change; `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
}

impl SetAttr {
    fn only_size(&self) -> bool {
        Self { size: None, ..*self } == Self::default()
    }
}

impl Fs {
    /// stat(2).
    pub fn getattr(&self, node: u64) -> Result<Attr, Errno> {
        self.attr_of(&*self.node(node)?)
    }

    /// chmod, chown, truncate, utimensat.
    pub fn setattr(self: &Arc<Self>, caller: Caller, id: u64, fh: Option<u64>, set: SetAttr, reply: Reply<Attr>) {
        let node = match self.node(id) {
            Ok(n) => n,
            Err(e) => return reply.send(Err(e)),
        };
        // No close waits for what this leaves to be committed.
        let open = || node.file().is_ok_and(|f| f.state.read().version.is_some());
        let leaves_some = fh.is_none() && (set.size.is_some() || open());
        let me = self.clone();
        let work = move || me.setattr_now(caller, &node, fh, set, reply);
        if leaves_some { self.engine.after_backlog(work) } else { work() }
    }

    fn setattr_now(
        self: &Arc<Self>,
        caller: Caller,
        node: &Arc<Node>,
        fh: Option<u64>,
        set: SetAttr,
        reply: Reply<Attr>,
    ) {
        if let Kind::Dir(dir) = &node.kind {
            // Saves that were acknowledged before come first: publishing them later would move the times set here.
            let (me, at) = (self.clone(), node.clone());
            let work = move || reply.send(me.set_dir(caller, &at, &set));
            return self.after_saves(&[dir], work);
        }
        let sized = match set.size {
            Some(size) => self.resize(node, fh, size, caller.uid != 0),
            None => Access::Done(Ok(())),
        };
        let done = match sized {
            Access::Done(Ok(())) if set.only_size() => Access::Done(Ok(())),
            Access::Done(Ok(())) => self.with_node(node, true, |fd| apply(fd, &set, &caller)),
            other => other,
        };
        match done {
            Access::Done(r) => reply.send(r.and_then(|()| self.attr_of(node))),
            Access::Wait => {
                let (me, at) = (self.clone(), node.clone());
                if let Ok(file) = node.file() {
                    self.engine.park(file, Box::new(move || me.setattr_now(caller, &at, fh, set, reply)));
                }
            }
        }
    }

    /// What another file system under the backing directory is mounted without has no power through this mount
    /// either, whose own flags are those of the backing directory.
    pub(super) fn restrict(&self, node: &Node, st: &mut Stat) -> Result<(), Errno> {
        let flags = match self.with_node(node, false, |fd| rfs::fstatvfs(fd)) {
            Access::Done(r) => r?.f_flag,
            Access::Wait => return Err(Errno::IO),
        };
        match FileType::from_raw_mode(st.st_mode) {
            FileType::RegularFile if flags.contains(StatVfsMountFlags::NOSUID) => st.st_mode &= !0o6000,
            FileType::BlockDevice | FileType::CharacterDevice if flags.contains(StatVfsMountFlags::NODEV) => {
                // Even root opens no device of number 0.
                (st.st_mode, st.st_rdev) = (st.st_mode & !0o777, 0);
            }
            _ => {}
        }
        Ok(())
    }

    fn set_dir(&self, caller: Caller, node: &Node, set: &SetAttr) -> Result<Attr, Errno> {
        if set.size.is_some() {
            return Err(Errno::ISDIR);
        }
        match self.with_node(node, true, |fd| apply(fd, set, &caller)) {
            Access::Done(r) => r.and_then(|()| self.attr_of(node)),
            Access::Wait => Err(Errno::IO),
        }
    }

    fn resize(&self, node: &Node, fh: Option<u64>, size: u64, kill: bool) -> Access<()> {
        let file = match node.file() {
            Ok(f) => f,
            Err(e) => return Access::Done(Err(e)),
        };
        let handle = fh.and_then(|fh| self.handle(fh).ok()).filter(|h| h.writes() && Arc::ptr_eq(&h.file, file));
        let policy = handle.as_ref().map_or_else(|| self.policy_of(node), |h| h.policy);
        self.engine.set_size(file, handle.as_deref(), size, policy, kill)
    }

    /// Runs `f` on a descriptor of a node, perhaps an `O_PATH` one.
    pub(super) fn with_node<T>(
        &self,
        node: &Node,
        changes: bool,
        f: impl FnOnce(BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> Access<T> {
        if let Kind::File(file) = &node.kind {
            return self.engine.with_inode(file, changes, f);
        }
        Access::Done((|| {
            if changes {
                self.engine.writable()?;
            }
            match &node.kind {
                Kind::Dir(d) => {
                    let r = f(self.engine.dir_fd(d)?.as_fd())?;
                    if changes {
                        self.engine.dir_changed(d);
                    }
                    Ok(r)
                }
                Kind::Other(o) => f(o.open(self.backing())?.as_fd()),
                Kind::File(_) => Err(Errno::INVAL),
            }
        })())
    }

    /// readlink(2).
    pub fn readlink(&self, node: u64) -> Result<Vec<u8>, Errno> {
        let node = self.node(node)?;
        let Kind::Other(o) = &node.kind else { return Err(Errno::INVAL) };
        let fd = o.open(self.backing())?;
        rfs::readlinkat(&fd, "", Vec::new()).map(std::ffi::CString::into_bytes)
    }

    /// statfs(2): of the file system that holds the node, which may be another one under the backing directory.
    pub fn statfs(&self, id: u64) -> Result<StatVfs, Errno> {
        let root = || rfs::fstatvfs(self.backing().root());
        match self.node(id).and_then(|n| match self.with_node(&n, false, |fd| rfs::fstatvfs(fd)) {
            Access::Done(r) => r,
            Access::Wait => root(),
        }) {
            Err(Errno::STALE) => root(),
            r => r,
        }
    }
}

/// Owner first: a change of owner clears the bits that a change of mode may set.
fn apply(fd: BorrowedFd<'_>, set: &SetAttr, caller: &Caller) -> Result<(), Errno> {
    let path = Backing::proc_path(fd);
    if set.uid.is_some() || set.gid.is_some() {
        let old = rfs::fstat(fd)?;
        rfs::chownat(fd, "", set.uid.map(Uid::from_raw), set.gid.map(Gid::from_raw), AtFlags::EMPTY_PATH)?;
        if FileType::from_raw_mode(old.st_mode) == FileType::RegularFile {
            drop_sgid(path.as_str(), &old, caller)?;
        }
    }
    if let Some(mode) = set.mode {
        rfs::chmodat(CWD, path.as_str(), Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())?;
    }
    if set.atime.is_some() || set.mtime.is_some() {
        let times = Timestamps { last_access: timespec(set.atime), last_modification: timespec(set.mtime) };
        rfs::utimensat(CWD, path.as_str(), &times, AtFlags::empty())?;
    }
    Ok(())
}

/// Takes set-group-ID away where the kernel would, were the caller here and not a daemon that may keep it.
pub(super) fn drop_sgid(path: &str, before: &Stat, caller: &Caller) -> Result<(), Errno> {
    if before.st_mode & libc::S_ISGID == 0 || caller.keeps_sgid(before.st_gid) {
        return Ok(());
    }
    let mode = rfs::stat(path)?.st_mode & 0o7777;
    if mode & libc::S_ISGID == 0 {
        return Ok(());
    }
    rfs::chmodat(CWD, path, Mode::from_raw_mode(mode & !libc::S_ISGID), AtFlags::empty())
}

fn timespec(t: Option<SetTime>) -> Timespec {
    match t {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(SetTime::At(secs, nanos)) => Timespec { tv_sec: secs, tv_nsec: nanos.into() },
    }
}

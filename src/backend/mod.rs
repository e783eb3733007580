//! The backing file system as typed calls. Owns the descriptors of the backing root and of `.fsys/`; may call `sys`.
//!
//! Every call that moves data or names passes a [`Gate`] first: tests record the calls there, fail them, shorten
//! writes and panic, on the very code that runs in production. Names are always relative to a directory descriptor
//! and never followed, so no symlink leads out.

pub mod failure;
pub mod flush;
pub mod probe;
mod stall;
pub mod uring;

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{self as rfs, AtFlags, FallocateFlags, FileType, Mode, OFlags, RenameFlags, Stat, XattrFlags};
use rustix::io::Errno;

use crate::sys;
use crate::sys::handle::{FileHandle, handle_of, open_handle};
use probe::Probe;
use uring::writes::Writes;

/// Descriptors that stay free for what is open already, of `limit`.
pub const fn reserve(limit: u64) -> u64 {
    let eighth = limit / 8;
    if eighth < 256 { eighth } else { 256 }
}

/// A call that passes the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// Open of a file or directory by handle or descriptor.
    Open,
    /// `O_TMPFILE` open of a new staged version.
    OpenStage,
    /// pwrite of file content.
    Write,
    /// The end of a write that was said to be made when it began.
    Land,
    /// ftruncate.
    Truncate,
    /// fallocate.
    Allocate,
    /// Copy or clone of content between files.
    CopyRange,
    /// Owner, mode and attributes onto a staged version.
    CopyMeta,
    /// sync_file_range with wait of a piece of a large version that is still being written.
    WritePiece,
    /// sync_file_range with wait.
    WriteOut,
    /// fsync or fdatasync of a file.
    SyncFile,
    /// syncfs.
    SyncFs,
    /// linkat of a staged version.
    LinkStage,
    /// renameat over the published name.
    Publish,
    /// fsync of a directory.
    SyncDir,
    /// unlinkat.
    Unlink,
    /// renameat2 by a program.
    Rename,
    /// linkat by a program.
    Link,
    /// A failed version is moved or linked into `.fsys/failed`.
    Keep,
    /// pwrite to the log of the journal.
    Journal,
    /// A step of writing a record of the journal into its file.
    Apply,
    /// The answer to a program; cannot be failed, is only seen.
    Answer,
}

/// What the gate says to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Do it.
    Go,
    /// Fail with this error instead.
    Fail(Errno),
    /// A write: accept only this many bytes. A flush of a file or directory: say it is done and do nothing, for tests
    /// of the tests.
    Short(usize),
}

/// Why a call of a group did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The system's error.
    #[error("{0}")]
    Os(Errno),
    /// It panicked; the panic was contained.
    #[error("panic: {0}")]
    Panic(String),
}

impl Fault {
    /// What a program is told.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Os(e) => *e,
            Self::Panic(_) => Errno::IO,
        }
    }
}

impl From<Errno> for Fault {
    fn from(e: Errno) -> Self {
        Self::Os(e)
    }
}

/// Runs one call so that a panic in it is its own failure and nobody else's.
pub fn contain<T>(f: impl FnOnce() -> Result<T, Errno>) -> Result<T, Fault> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)) {
        Ok(r) => r.map_err(Fault::Os),
        Err(p) => Err(Fault::Panic(
            p.downcast_ref::<&str>()
                .map(ToString::to_string)
                .or_else(|| p.downcast_ref::<String>().cloned())
                .unwrap_or_default(),
        )),
    }
}

/// The seam for tests.
pub trait Gate: Send + Sync {
    /// Before the call; may panic.
    fn before(&self, call: Call) -> Verdict;
}

/// Identity of an inode: device and number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
}

impl FileId {
    /// From a stat buffer.
    pub fn of(st: &Stat) -> Self {
        Self { dev: st.st_dev, ino: st.st_ino }
    }
}

/// What keeps hold of a backing inode: a file handle where possible, an `O_PATH` descriptor otherwise.
#[derive(Debug)]
pub enum Anchor {
    /// Costs no descriptor.
    Handle(FileHandle),
    /// For other file systems under the root, and without `CAP_DAC_READ_SEARCH`.
    Fd(OwnedFd),
}

impl Anchor {
    /// Whether both hold the same inode, given equal [`FileId`]s (a reused number has another handle).
    pub fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Handle(a), Self::Handle(b)) => a == b,
            _ => true,
        }
    }
}

/// The backing directory.
pub struct Backing {
    root: OwnedFd,
    staging: OwnedFd,
    failed: OwnedFd,
    journal: Option<OwnedFd>,
    proc_fd: OwnedFd,
    dev: u64,
    handles: bool,
    probe: Probe,
    ring: uring::Flusher,
    writes: Arc<Writes>,
    gate: Option<Arc<dyn Gate>>,
    stall: stall::Stall,
    stage_seq: AtomicU64,
    refuses: AtomicBool,
}

impl std::fmt::Debug for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backing").field("dev", &self.dev).field("probe", &self.probe).finish_non_exhaustive()
    }
}

impl Backing {
    /// Opens the backing directory, given descriptors of its root and of `.fsys/staging` and `.fsys/failed`.
    pub fn open(root: OwnedFd, staging: OwnedFd, failed: OwnedFd, gate: Option<Arc<dyn Gate>>) -> Result<Self, Errno> {
        let proc_fd = rfs::open("/proc/self/fd", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let dev = rfs::fstat(&root)?.st_dev;
        let handles = handle_of(&root).and_then(|h| open_handle(&root, &h, libc::O_PATH)).is_ok();
        let probe = Probe::of(&root, &staging)?;
        let ring = uring::Flusher::new();
        Ok(Self {
            root,
            staging,
            failed,
            journal: None,
            proc_fd,
            dev,
            handles,
            probe,
            ring,
            writes: Arc::new(Writes::new(gate.clone())),
            gate,
            stall: stall::Stall::new(),
            stage_seq: AtomicU64::new(stage_seed()),
            refuses: AtomicBool::new(false),
        })
    }

    /// With a journal in this directory, `.fsys/journal`.
    #[must_use]
    pub fn with_journal(self, dir: OwnedFd) -> Self {
        Self { journal: Some(dir), ..self }
    }

    /// With another strategy than the probe found: for tests, on file systems that lose nothing.
    #[must_use]
    pub fn with_strategy(mut self, strategy: probe::Strategy) -> Self {
        self.probe.strategy = strategy;
        self
    }

    /// Asks the gate.
    pub fn pass(&self, call: Call) -> Result<Option<usize>, Errno> {
        match self.gate.as_ref().map_or(Verdict::Go, |g| g.before(call)) {
            Verdict::Go => Ok(None),
            Verdict::Short(n) => Ok(Some(n)),
            Verdict::Fail(e) => Err(e),
        }
    }

    /// What was found out about the file system.
    pub fn probe(&self) -> &Probe {
        &self.probe
    }

    /// Whether the file system refused the last open for writing because it is read-only. What its mount flags say is
    /// not enough: ext4 turns read-only after an error without a word there.
    pub fn refuses(&self) -> bool {
        self.refuses.load(Ordering::Relaxed)
    }

    fn note_refusal<T>(&self, r: Result<T, Errno>) -> Result<T, Errno> {
        match &r {
            Ok(_) => self.refuses.store(false, Ordering::Relaxed),
            Err(Errno::ROFS) => self.refuses.store(true, Ordering::Relaxed),
            Err(_) => {}
        }
        r
    }

    /// Whether a program may be given one more open file: `EMFILE` when only the reserve is left. That is for what is
    /// open already: its commits, its next version, looking up names. A new descriptor has the lowest number that is
    /// free (open(2)), so its number tells how many are taken at least.
    pub fn admit(&self) -> Result<(), Errno> {
        let next = rustix::io::fcntl_dupfd_cloexec(&self.root, 0)?.as_raw_fd() as u64;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        if next < limit - reserve(limit) { Ok(()) } else { Err(Errno::MFILE) }
    }

    /// The root directory.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Device number of the root: only files on it can be replaced.
    pub fn dev(&self) -> u64 {
        self.dev
    }

    /// `.fsys/journal`, where there is one and inodes can be found again by file handle, which records rely on.
    pub fn journal(&self) -> Option<BorrowedFd<'_>> {
        self.journal.as_ref().filter(|_| self.handles).map(AsFd::as_fd)
    }

    /// The log of the journal, made when it is not there.
    pub fn open_log(&self, name: &str) -> Result<OwnedFd, Errno> {
        self.pass(Call::Open)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let dir = self.journal().ok_or(Errno::OPNOTSUPP)?;
        let fd = self.note_refusal(rfs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR))?;
        if file_type(&rfs::fstat(&fd)?) == FileType::RegularFile { Ok(fd) } else { Err(Errno::INVAL) }
    }

    /// A new unnamed inode in `.fsys/staging`.
    pub fn open_side(&self) -> Result<OwnedFd, Errno> {
        self.open_stage(&self.staging, 0o600)
    }

    /// Keeps hold of the inode of an `O_PATH` (or any) descriptor.
    pub fn anchor(&self, fd: OwnedFd, id: FileId) -> Result<Anchor, Errno> {
        if self.handles && id.dev == self.dev {
            handle_of(&fd).map(Anchor::Handle)
        } else {
            self.admit()?;
            Ok(Anchor::Fd(fd))
        }
    }

    /// As [`Backing::anchor`], for a descriptor that goes on being used.
    pub fn anchor_of(&self, fd: BorrowedFd<'_>, id: FileId) -> Result<Anchor, Errno> {
        if self.handles && id.dev == self.dev {
            handle_of(fd).map(Anchor::Handle)
        } else {
            self.open_fd(fd, libc::O_PATH).map(Anchor::Fd)
        }
    }

    /// Opens an anchored inode with open(2) flags.
    pub fn open_anchor(&self, a: &Anchor, flags: i32) -> Result<OwnedFd, Errno> {
        self.pass(Call::Open)?;
        let opened = match a {
            Anchor::Handle(h) => open_handle(&self.root, h, flags),
            Anchor::Fd(fd) => self.open_fd(fd.as_fd(), flags),
        };
        if flags & libc::O_ACCMODE == libc::O_RDONLY { opened } else { self.note_refusal(opened) }
    }

    /// Opens the inode of a descriptor anew, with other flags.
    pub fn reopen(&self, fd: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd, Errno> {
        self.pass(Call::Open)?;
        self.open_fd(fd, flags)
    }

    fn open_fd(&self, fd: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd, Errno> {
        // The name there is a link to the inode: it is followed, to a symlink too, and that no further.
        let flags = (OFlags::from_bits_retain(flags as u32) - OFlags::NOFOLLOW) | OFlags::CLOEXEC;
        rfs::openat(&self.proc_fd, fd_name(fd).as_str(), flags, Mode::empty())
    }

    /// The inode of a name, not followed: an `O_PATH` descriptor and its attributes.
    pub fn lookup(&self, dir: impl AsFd, name: &OsStr) -> Result<(OwnedFd, Stat), Errno> {
        let fd = rfs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let st = rfs::fstat(&fd)?;
        Ok((fd, st))
    }

    /// Attributes of a name, not followed.
    pub fn stat_at(&self, dir: impl AsFd, name: &OsStr) -> Result<Stat, Errno> {
        rfs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// A new unnamed inode in `dir`: group, ACL, label, project and placement come from that directory.
    pub fn open_stage(&self, dir: impl AsFd, mode: u32) -> Result<OwnedFd, Errno> {
        self.pass(Call::OpenStage)?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        self.note_refusal(rfs::openat(dir, ".", flags, Mode::from_raw_mode(mode)))
    }

    /// pwrite(2); may write less.
    pub fn write(&self, fd: impl AsFd, off: u64, data: &[u8]) -> Result<usize, Errno> {
        let data = self.admitted(data)?;
        self.stall.watch(|| rustix::io::pwrite(fd, data, off))
    }

    fn admitted<'a>(&self, data: &'a [u8]) -> Result<&'a [u8], Errno> {
        Ok(self.pass(Call::Write)?.and_then(|n| data.get(..n)).unwrap_or(data))
    }

    /// Whether writes wait for the device at the moment.
    pub fn writes_wait(&self) -> bool {
        self.stall.is_on()
    }

    /// ftruncate(2).
    pub fn truncate(&self, fd: impl AsFd, size: u64) -> Result<(), Errno> {
        self.pass(Call::Truncate)?;
        rfs::ftruncate(fd, size)
    }

    /// fallocate(2).
    pub fn allocate(&self, fd: impl AsFd, how: FallocateFlags, off: u64, len: u64) -> Result<(), Errno> {
        self.pass(Call::Allocate)?;
        rfs::fallocate(fd, how, off, len)
    }

    /// copy_file_range(2): clones where the file system can; may copy less.
    pub fn copy_range(
        &self,
        src: impl AsFd,
        src_off: u64,
        dst: impl AsFd,
        dst_off: u64,
        len: usize,
    ) -> Result<usize, Errno> {
        self.pass(Call::CopyRange)?;
        let (mut from, mut to) = (src_off, dst_off);
        rfs::copy_file_range(src, Some(&mut from), dst, Some(&mut to), len)
    }

    /// Makes `dst` a clone of `src` (ioctl `FICLONE`).
    pub fn clone_file(&self, src: impl AsFd, dst: impl AsFd) -> Result<(), Errno> {
        self.pass(Call::CopyRange)?;
        rfs::ioctl_ficlone(dst, src)
    }

    /// Copies `len` bytes from the start of `src` to `dst`.
    pub fn copy_all(&self, src: impl AsFd, dst: impl AsFd, len: u64) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let want = usize::try_from(len - done).unwrap_or(usize::MAX);
            match self.copy_range(src.as_fd(), done, dst.as_fd(), done, want)? {
                0 => return Ok(()),
                n => done += n as u64,
            }
        }
        Ok(())
    }

    /// Gives `dst` the owner, mode, extended attributes (ACL and label among them) and project of `src`.
    /// In this order, since a change of owner clears set-user-ID and capabilities. Times are not copied: the
    /// content is new; nor are file capabilities, which every write takes away.
    pub fn copy_meta(&self, src: BorrowedFd<'_>, st: &Stat, dst: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
        self.pass(Call::CopyMeta)?;
        let new = rfs::fstat(dst)?;
        if (new.st_uid, new.st_gid) != (st.st_uid, st.st_gid) {
            let owner = Some(rfs::Uid::from_raw(st.st_uid));
            rfs::fchown(dst, owner, Some(rfs::Gid::from_raw(st.st_gid)))?;
        }
        self.copy_xattrs(src, dst)?;
        if rfs::fstat(dst)?.st_mode & 0o7777 != mode & 0o7777 {
            rfs::fchmod(dst, Mode::from_raw_mode(mode & 0o7777))?;
        }
        copy_project(src, dst)
    }

    fn copy_xattrs(&self, src: BorrowedFd<'_>, dst: BorrowedFd<'_>) -> Result<(), Errno> {
        const ACL: &str = "system.posix_acl_access";
        let names = list_xattrs(src)?;
        if !names.split(|b| *b == 0).any(|n| n == ACL.as_bytes()) && self.probe.acl {
            // The directory's default ACL gave the new inode one that the old file does not have.
            ignore(rfs::fremovexattr(dst, ACL), &[Errno::NODATA, Errno::OPNOTSUPP])?;
        }
        for name in names.split(|b| *b == 0).filter(|n| !n.is_empty() && *n != b"security.capability") {
            let mut value = vec![0; 64 << 10];
            let n = match rfs::fgetxattr(src, name, &mut value[..]) {
                Ok(n) => n,
                Err(Errno::NODATA) => continue,
                Err(e) => return Err(e),
            };
            rfs::fsetxattr(dst, name, &value[..n], XattrFlags::empty())?;
        }
        Ok(())
    }

    /// Publishes a new name: links the unnamed inode. `EEXIST` when the name is taken.
    pub fn link_new(&self, stage: BorrowedFd<'_>, dir: impl AsFd, name: &OsStr) -> Result<(), Errno> {
        self.pass(Call::LinkStage)?;
        self.link_fd(stage, dir, name)
    }

    /// A name in `.fsys/staging` that was never used.
    pub fn temp_name(&self) -> String {
        format!("{:016x}.stage", self.stage_seq.fetch_add(1, Ordering::Relaxed))
    }

    /// Publishes over an existing name: links the unnamed inode as `temp` into `.fsys/staging`, renames it over the
    /// name. On an error `temp` may stay; [`Backing::keep`] takes it from there, or the next recovery removes it.
    pub fn replace(&self, stage: BorrowedFd<'_>, temp: &str, dir: impl AsFd, name: &OsStr) -> Result<(), Errno> {
        self.pass(Call::LinkStage)?;
        self.link_fd(stage, &self.staging, temp.as_ref())?;
        self.pass(Call::Publish)?;
        rfs::renameat(&self.staging, temp, dir, name)
    }

    /// Keeps a version that will not be published as `name` in `.fsys/failed`: moved there when it was linked as
    /// `temp` already (an inode that lost its only name cannot get another), linked there otherwise.
    pub fn keep(&self, stage: BorrowedFd<'_>, temp: Option<&str>, name: &str) -> Result<(), Errno> {
        self.pass(Call::Keep)?;
        if let Some(temp) = temp {
            match rfs::renameat(&self.staging, temp, &self.failed, name) {
                Err(Errno::NOENT) => {}
                r => return r,
            }
        }
        self.link_fd(stage, &self.failed, name.as_ref())
    }

    /// linkat(2) of an inode by descriptor.
    pub fn link(&self, fd: BorrowedFd<'_>, dir: impl AsFd, name: &OsStr) -> Result<(), Errno> {
        self.pass(Call::Link)?;
        self.link_fd(fd, dir, name)
    }

    /// renameat2(2).
    pub fn rename(&self, from: (impl AsFd, &OsStr), to: (impl AsFd, &OsStr), flags: RenameFlags) -> Result<(), Errno> {
        self.pass(Call::Rename)?;
        rfs::renameat_with(from.0, from.1, to.0, to.1, flags)
    }

    fn link_fd(&self, fd: BorrowedFd<'_>, dir: impl AsFd, name: &OsStr) -> Result<(), Errno> {
        if self.handles {
            return rfs::linkat(fd, "", dir, name, AtFlags::EMPTY_PATH);
        }
        rfs::linkat(&self.proc_fd, fd_name(fd).as_str(), dir, name, AtFlags::SYMLINK_FOLLOW)
    }

    /// unlinkat(2).
    pub fn unlink(&self, dir: impl AsFd, name: &OsStr, rmdir: bool) -> Result<(), Errno> {
        self.pass(Call::Unlink)?;
        rfs::unlinkat(dir, name, if rmdir { AtFlags::REMOVEDIR } else { AtFlags::empty() })
    }

    /// The path `/proc/self/fd/N`, for calls that take only paths (xattrs of what is not open).
    pub fn proc_path(fd: BorrowedFd<'_>) -> String {
        format!("/proc/self/fd/{}", fd.as_raw_fd())
    }
}

fn fd_name(fd: BorrowedFd<'_>) -> String {
    fd.as_raw_fd().to_string()
}

/// Names in `.fsys/staging` never repeat: not within a run (a counter), not between runs (its start is the clock).
fn stage_seed() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

fn ignore(r: Result<(), Errno>, which: &[Errno]) -> Result<(), Errno> {
    match r {
        Err(e) if which.contains(&e) => Ok(()),
        r => r,
    }
}

/// All attribute names, NUL-separated.
fn list_xattrs(fd: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let mut buf = vec![0; 1024];
    loop {
        match rfs::flistxattr(fd, &mut buf[..]) {
            Ok(n) => {
                buf.truncate(n);
                return Ok(buf);
            }
            Err(Errno::RANGE) if buf.len() < (64 << 10) => buf.resize(64 << 10, 0),
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(e) => return Err(e),
        }
    }
}

/// Project id and the inode flags that concern content, where the file system has them and they differ.
fn copy_project(src: BorrowedFd<'_>, dst: BorrowedFd<'_>) -> Result<(), Errno> {
    /// `FS_XFLAG_SYNC`, `_NOATIME`, `_NODUMP` of linux/fs.h; the others do not occur on a file open for writing, or
    /// belong to the extents.
    const FLAGS: u32 = 0x20 | 0x40 | 0x80;
    /// `FS_XFLAG_IMMUTABLE`, `_APPEND`: such a file is not replaced.
    const PROTECTED: u32 = 0x8 | 0x10;
    let (Ok(old), Ok(mut new)) = (sys::get_fsxattr(src), sys::get_fsxattr(dst)) else { return Ok(()) };
    if old.xflags & PROTECTED != 0 {
        return Err(Errno::PERM);
    }
    if (old.project, old.xflags & FLAGS) == (new.project, new.xflags & FLAGS) {
        return Ok(());
    }
    new.project = old.project;
    new.xflags = (new.xflags & !FLAGS) | (old.xflags & FLAGS);
    ignore(sys::set_fsxattr(dst, &new), &[Errno::INVAL, Errno::OPNOTSUPP, Errno::NOTTY])
}

/// File type of a stat buffer.
pub fn file_type(st: &Stat) -> FileType {
    FileType::from_raw_mode(st.st_mode)
}

/// Opens the root of a backing directory.
pub fn open_root(path: &Path) -> Result<OwnedFd, Errno> {
    rfs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

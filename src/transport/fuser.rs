//! The transport over /dev/fuse with the crate `fuser`: decode, call, reply. No logic of its own.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo,
    InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, SessionACL, TimeOrNow, WriteFlags,
};
use rustix::fs::{FileType as Kind, Stat};

use super::contained::Contained;
use super::device::MAX_WRITE;
use super::dispatch::{decode_dev, encode_dev};
use super::mounting::{self, Access, Options};
use super::opened::{Device, answer, answer_create};
use crate::fs::{Attr, Caller, Entry, Fs, Opened, Reply, SetAttr, SetTime};

type Result<T> = std::result::Result<T, rustix::io::Errno>;

/// What is asked of the kernel, where it offers it. fuser accepts everything that is offered, also what it cannot
/// honour (`SETXATTR_EXT` makes it panic), so nothing outside this list is asked for.
pub(super) const WANTED: [InitFlags; 14] = [
    InitFlags::FUSE_ASYNC_READ,
    InitFlags::FUSE_ATOMIC_O_TRUNC,
    InitFlags::FUSE_BIG_WRITES,
    InitFlags::FUSE_DONT_MASK,
    InitFlags::FUSE_AUTO_INVAL_DATA,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_POSIX_ACL,
    InitFlags::FUSE_MAX_PAGES,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    InitFlags::FUSE_PASSTHROUGH,
];

thread_local! {
    /// Read replies are built here: no allocation for each request.
    static READ_BUF: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// [`Fs`] as fuser calls it.
#[derive(Debug)]
struct Adapter {
    fs: Arc<Fs>,
}

/// A mounted session and the thread that tells the kernel of stale caches.
#[derive(Debug)]
pub struct Mounted {
    session: fuser::BackgroundSession,
    notifier: std::thread::JoinHandle<()>,
    fs: Arc<Fs>,
}

impl Mounted {
    /// Mounts and starts to serve with this number of threads.
    ///
    /// # Errors
    /// What the kernel or fusermount3 answers.
    pub fn start(fs: Arc<Fs>, mountpoint: &Path, options: &Options, threads: usize) -> io::Result<Self> {
        let fd = mounting::mount(mountpoint, options)?;
        let started = Self::serve(fs, fd, options.access, threads);
        if started.is_err() {
            // Dead by now, since its device is closed.
            mounting::unmount(mountpoint, true)?;
        }
        started
    }

    fn serve(fs: Arc<Fs>, fd: OwnedFd, access: Access, threads: usize) -> io::Result<Self> {
        let mut config = Config::default();
        config.n_threads = Some(threads.max(1));
        let acl = match access {
            Access::All => SessionACL::All,
            Access::RootAndOwner => SessionACL::RootAndOwner,
            Access::Owner => SessionACL::Owner,
        };
        let session = fuser::Session::from_fd(Contained(Adapter { fs: fs.clone() }), fd, acl, config)?;
        let tell = session.notifier();
        let device = Device(session.as_fd().try_clone_to_owned()?);
        let session = session.spawn()?;
        fs.begin_passthrough(Box::new(device));
        let me = fs.clone();
        let notifier = std::thread::Builder::new().name("notifier".into()).spawn(move || {
            me.notify_stale(|s| {
                // ENOENT: the kernel did not have it. Anything else: the session is over and so are its caches.
                let inode = tell.inval_inode(INodeNo(s.node), 0, 0);
                let entry = s.name.as_ref().map_or(Ok(()), |(dir, name)| tell.inval_entry(INodeNo(*dir), name));
                [inode, entry].into_iter().all(|r| r.map_or_else(|e| e.kind() == io::ErrorKind::NotFound, |()| true))
            });
        })?;
        Ok(Self { session, notifier, fs })
    }

    /// Returns when the file system was unmounted.
    ///
    /// # Errors
    /// The session ended by a failure of the device.
    pub fn wait(self) -> io::Result<()> {
        let ended = self.session.join();
        // Its descriptor would keep the connection open.
        self.fs.end_passthrough("the session ended");
        self.fs.stop_notifying();
        if self.notifier.join().is_err() {
            tracing::error!("the notifier thread panicked");
        }
        ended
    }
}

fn errno(e: rustix::io::Errno) -> Errno {
    Errno::from_i32(e.raw_os_error())
}

fn caller(req: &Request, umask: u32) -> Caller {
    Caller { uid: req.uid(), gid: req.gid(), pid: req.pid(), umask }
}

fn time(secs: i64, nanos: u64) -> SystemTime {
    let part = Duration::from_nanos(nanos);
    match u64::try_from(secs) {
        Ok(s) => UNIX_EPOCH + Duration::from_secs(s) + part,
        Err(_) => UNIX_EPOCH - Duration::from_secs(secs.unsigned_abs()) + part,
    }
}

/// fuser decodes a time before 1970 with nanoseconds as that much earlier, not later; taken back here.
fn set_time(t: TimeOrNow) -> SetTime {
    match t {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(t) => match t.duration_since(UNIX_EPOCH) {
            Ok(d) => SetTime::At(d.as_secs() as i64, d.subsec_nanos()),
            Err(e) => SetTime::At(-(e.duration().as_secs() as i64), e.duration().subsec_nanos()),
        },
    }
}

fn kind(k: Kind) -> FileType {
    match k {
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharacterDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::RegularFile | Kind::Unknown => FileType::RegularFile,
    }
}

fn file_attr(ino: u64, st: &Stat) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: st.st_size as u64,
        blocks: st.st_blocks as u64,
        atime: time(st.st_atime, st.st_atime_nsec as u64),
        mtime: time(st.st_mtime, st.st_mtime_nsec as u64),
        ctime: time(st.st_ctime, st.st_ctime_nsec as u64),
        crtime: UNIX_EPOCH,
        kind: kind(Kind::from_raw_mode(st.st_mode)),
        perm: (st.st_mode & 0o7777) as u16,
        nlink: st.st_nlink as u32,
        uid: st.st_uid,
        gid: st.st_gid,
        rdev: encode_dev(st.st_rdev),
        blksize: st.st_blksize as u32,
        flags: 0,
    }
}

fn empty(reply: ReplyEmpty) -> Reply<()> {
    Reply::new(move |r: Result<()>| match r {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    })
}

fn entry(reply: ReplyEntry) -> Reply<Entry> {
    Reply::new(move |r: Result<Entry>| match r {
        Ok(e) => reply.entry_with_ttls(&e.attr.ttl, &e.ttl, &file_attr(e.node, &e.attr.stat), Generation(0)),
        Err(e) => reply.error(errno(e)),
    })
}

fn attr(reply: ReplyAttr) -> Reply<Attr> {
    Reply::new(move |r: Result<Attr>| match r {
        Ok(a) => reply.attr(&a.ttl, &file_attr(a.ino, &a.stat)),
        Err(e) => reply.error(errno(e)),
    })
}

fn opened(reply: ReplyOpen) -> Reply<Opened> {
    Reply::new(move |r: Result<Opened>| match r {
        Ok(o) => answer(reply, &o),
        Err(e) => reply.error(errno(e)),
    })
}

fn content(reply: ReplyData) -> Reply<Vec<u8>> {
    Reply::new(move |r: Result<Vec<u8>>| match r {
        Ok(c) => reply.data(&c),
        Err(e) => reply.error(errno(e)),
    })
}

fn written(reply: ReplyWrite) -> Reply<u32> {
    Reply::new(move |r: Result<u32>| match r {
        Ok(n) => reply.written(n),
        Err(e) => reply.error(errno(e)),
    })
}

/// The value or only its size, as getxattr(2) and listxattr(2) are asked.
fn xattr(reply: ReplyXattr, size: u32, r: Result<Vec<u8>>) {
    match r {
        Ok(v) if size == 0 => reply.size(v.len() as u32),
        Ok(v) if v.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(v) => reply.data(&v),
        Err(e) => reply.error(errno(e)),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in WANTED {
            if config.add_capabilities(flag).is_err() {
                tracing::info!(?flag, "the kernel does not offer this");
            }
        }
        // The backing directory is on no stacked file system; a stacked one may be put on this mount.
        if let Err(nearest) = config.set_max_stack_depth(1) {
            tracing::info!(nearest, "no passthrough");
        }
        if let Err(nearest) = config.set_max_write(MAX_WRITE) {
            tracing::info!(nearest, "largest write");
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        entry(reply).send(self.fs.lookup(parent.0, name));
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.fs.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        attr(reply).send(self.fs.getattr(ino.0));
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr { mode, uid, gid, size, atime: atime.map(set_time), mtime: mtime.map(set_time) };
        self.fs.setattr(caller(req, 0), ino.0, fh.map(|f| f.0), set, attr(reply));
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.fs.readlink(ino.0) {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn mknod(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, rdev: u32, reply: ReplyEntry) {
        self.fs.mknod(caller(req, umask), parent.0, name, mode, decode_dev(rdev), entry(reply));
    }

    fn mkdir(&self, req: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        self.fs.mkdir(caller(req, umask), parent.0, name, mode, entry(reply));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.fs.unlink(parent.0, name, empty(reply));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.fs.rmdir(parent.0, name, empty(reply));
    }

    fn symlink(&self, req: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        self.fs.symlink(caller(req, 0), parent.0, name, target.as_os_str(), entry(reply));
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.fs.rename(parent.0, name, newparent.0, newname, flags.bits(), empty(reply));
    }

    fn link(&self, _req: &Request, ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        self.fs.link(ino.0, newparent.0, newname, entry(reply));
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.fs.open(caller(req, 0), ino.0, flags.0, opened(reply));
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        READ_BUF.with_borrow_mut(|buf| {
            if buf.len() < size as usize {
                buf.resize(size as usize, 0);
            }
            match self.fs.read_cached(fh.0, offset, &mut buf[..size as usize]) {
                Ok(Some(n)) => reply.data(&buf[..n]),
                Ok(None) => self.fs.read_later(fh.0, offset, size as usize, content(reply)),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn write(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let tid = if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) { 0 } else { req.pid() };
        self.fs.write(tid, fh.0, offset, data, kill, written(reply));
    }

    fn flush(&self, req: &Request, _ino: INodeNo, fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        self.fs.flush(req.pid(), fh.0, empty(reply));
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.fs.release(ino.0, fh.0);
        reply.ok();
    }

    fn fsync(&self, req: &Request, _ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        self.fs.fsync(req.pid(), fh.0, datasync, empty(reply));
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        opened(reply).send(self.fs.opendir(ino.0));
    }

    fn readdir(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed =
            self.fs.readdir(fh.0, offset, false, &mut |e| !reply.add(INodeNo(e.ino), e.next, kind(e.kind), e.name));
        match listed {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn readdirplus(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let listed = self.fs.readdir(fh.0, offset, true, &mut |e| match &e.entry {
            Some(n) => {
                let attr = file_attr(n.node, &n.attr.stat);
                !reply.add(INodeNo(n.node), e.next, e.name, &n.ttl.min(n.attr.ttl), &attr, Generation(0))
            }
            None => {
                // The kernel links neither `.` nor `..`; number 0 tells it not to link what could not be looked up.
                let ino = if e.name == "." || e.name == ".." { e.ino } else { 0 };
                !reply.add(INodeNo(ino), e.next, e.name, &Duration::ZERO, &name_only(ino, kind(e.kind)), Generation(0))
            }
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn releasedir(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.fs.releasedir(fh.0);
        reply.ok();
    }

    fn fsyncdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.fs.fsyncdir(req.pid(), ino.0, empty(reply));
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        match self.fs.statfs(ino.0) {
            Ok(s) => reply.statfs(
                s.f_blocks,
                s.f_bfree,
                s.f_bavail,
                s.f_files,
                s.f_ffree,
                s.f_bsize as u32,
                s.f_namemax as u32,
                s.f_frsize as u32,
            ),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.fs.setxattr(caller(req, 0), ino.0, name, value, flags, empty(reply));
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        xattr(reply, size, self.fs.getxattr(ino.0, name));
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        xattr(reply, size, self.fs.listxattr(caller(req, 0), ino.0));
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.fs.removexattr(ino.0, name, empty(reply));
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let reply = Reply::new(move |r: Result<(Entry, Opened)>| match r {
            // One time-out for name and attributes: the shorter.
            Ok((e, o)) => {
                let attr = file_attr(e.node, &e.attr.stat);
                answer_create(reply, e.ttl.min(e.attr.ttl), &attr, &o);
            }
            Err(e) => reply.error(errno(e)),
        });
        self.fs.create(caller(req, umask), parent.0, name, mode, flags, reply);
    }

    fn ioctl(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        cmd: u32,
        in_data: &[u8],
        out_size: u32,
        reply: ReplyIoctl,
    ) {
        match self.fs.ioctl(ino.0, cmd, in_data, out_size as usize) {
            Ok((rc, data)) => reply.ioctl(rc, &data),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn fallocate(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.fs.fallocate(caller(req, 0), fh.0, offset, length, mode, empty(reply));
    }

    fn lseek(&self, _req: &Request, _ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        match self.fs.lseek(fh.0, offset, whence) {
            Ok(at) => reply.offset(at),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn copy_file_range(
        &self,
        req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.fs.copy(caller(req, 0), (fh_in.0, offset_in), (fh_out.0, offset_out), len, written(reply));
    }
}

fn name_only(ino: u64, kind: FileType) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970() {
        let t = time(-2, 500_000_000);
        assert_eq!(UNIX_EPOCH.duration_since(t).unwrap(), Duration::from_millis(1500));
        // As fuser decodes the kernel's (-2 s, 0.5 s).
        let fusers = UNIX_EPOCH - Duration::new(2, 500_000_000);
        assert_eq!(set_time(TimeOrNow::SpecificTime(fusers)), SetTime::At(-2, 500_000_000));
    }
}

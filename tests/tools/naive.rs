//! A passthrough file system without protection, as a first version is written: it remembers paths, and opens them by
//! name. The control of the attack in tests/attack.rs, which must lead it out of its directory.
//! `naive BACKING MOUNTPOINT` says `ready` and serves until it is unmounted.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, SessionACL, TimeOrNow, WriteFlags,
};

/// The kernel asks for each name anew.
const TTL: Duration = Duration::ZERO;

struct Naive {
    root: PathBuf,
    paths: Mutex<HashMap<u64, PathBuf>>,
    files: Mutex<HashMap<u64, File>>,
    next: AtomicU64,
}

fn errno(e: &io::Error) -> Errno {
    Errno::from_i32(e.raw_os_error().unwrap_or(libc::EIO))
}

fn done(reply: ReplyEmpty, r: io::Result<()>) {
    match r {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(&e)),
    }
}

fn gone() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

impl Naive {
    fn path(&self, node: INodeNo) -> io::Result<PathBuf> {
        if node.0 == 1 {
            return Ok(self.root.clone());
        }
        self.paths.lock().expect("paths").get(&node.0).cloned().ok_or_else(gone)
    }

    fn below(&self, parent: INodeNo, name: &OsStr) -> io::Result<PathBuf> {
        Ok(self.path(parent)?.join(name))
    }

    fn attr(node: u64, path: &Path) -> io::Result<FileAttr> {
        let m = fs::symlink_metadata(path)?;
        let kind = match m.mode() & libc::S_IFMT {
            libc::S_IFDIR => FileType::Directory,
            libc::S_IFLNK => FileType::Symlink,
            _ => FileType::RegularFile,
        };
        Ok(FileAttr {
            ino: INodeNo(node),
            size: m.len(),
            blocks: m.blocks(),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: (m.mode() & 0o7777) as u16,
            nlink: m.nlink() as u32,
            uid: m.uid(),
            gid: m.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn entry(&self, path: PathBuf) -> io::Result<FileAttr> {
        let node = self.next.fetch_add(1, Ordering::Relaxed);
        let attr = Self::attr(node, &path)?;
        self.paths.lock().expect("paths").insert(node, path);
        Ok(attr)
    }

    fn answer(&self, reply: ReplyEntry, made: io::Result<PathBuf>) {
        match made.and_then(|path| self.entry(path)) {
            Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn keep(&self, file: File) -> FileHandle {
        let fh = self.next.fetch_add(1, Ordering::Relaxed);
        self.files.lock().expect("files").insert(fh, file);
        FileHandle(fh)
    }

    fn file(&self, fh: FileHandle) -> io::Result<File> {
        self.files.lock().expect("files").get(&fh.0).ok_or_else(gone)?.try_clone()
    }

    /// The paths of what is below move with it.
    fn moved(&self, from: &Path, to: &Path) {
        for path in self.paths.lock().expect("paths").values_mut() {
            if let Ok(rest) = path.strip_prefix(from) {
                *path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            }
        }
    }
}

impl Filesystem for Naive {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.answer(reply, self.below(parent, name));
    }

    fn forget(&self, _: &Request, node: INodeNo, _: u64) {
        self.paths.lock().expect("paths").remove(&node.0);
    }

    fn getattr(&self, _: &Request, node: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.path(node).and_then(|p| Self::attr(node.0, &p)) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        node: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = || {
            let path = self.path(node)?;
            if let Some(mode) = mode {
                fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777))?;
            }
            if let Some(size) = size {
                OpenOptions::new().write(true).open(&path)?.set_len(size)?;
            }
            Self::attr(node.0, &path)
        };
        match set() {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn readlink(&self, _: &Request, node: INodeNo, reply: ReplyData) {
        match self.path(node).and_then(fs::read_link) {
            Ok(target) => reply.data(target.as_os_str().as_encoded_bytes()),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        let made = self.below(parent, name).and_then(|p| fs::create_dir(&p).map(|()| p));
        self.answer(reply, made);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.below(parent, name).and_then(fs::remove_file));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.below(parent, name).and_then(fs::remove_dir));
    }

    fn symlink(&self, _: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let made = self.below(parent, name).and_then(|p| std::os::unix::fs::symlink(target, &p).map(|()| p));
        self.answer(reply, made);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let rename = || {
            let (from, to) = (self.below(parent, name)?, self.below(newparent, newname)?);
            let how = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
            rustix::fs::renameat_with(rustix::fs::CWD, &from, rustix::fs::CWD, &to, how)?;
            let aside = self.root.join("\u{1}moving");
            if how.contains(rustix::fs::RenameFlags::EXCHANGE) {
                self.moved(&to, &aside);
            }
            self.moved(&from, &to);
            self.moved(&aside, &from);
            Ok(())
        };
        done(reply, rename());
    }

    fn link(&self, _: &Request, node: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry) {
        let link = || {
            let (from, to) = (self.path(node)?, self.below(newparent, newname)?);
            fs::hard_link(from, &to).map(|()| to)
        };
        self.answer(reply, link());
    }

    fn open(&self, _: &Request, node: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let writes = flags.0 & libc::O_ACCMODE != libc::O_RDONLY;
        match self.path(node).and_then(|p| OpenOptions::new().read(true).write(writes).open(p)) {
            Ok(file) => reply.opened(self.keep(file), FopenFlags::empty()),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn create(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, _: i32, reply: ReplyCreate) {
        let create = || {
            let path = self.below(parent, name)?;
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(mode).open(&path)?;
            Ok((self.entry(path)?, file))
        };
        match create() {
            Ok((attr, file)) => reply.created(&TTL, &attr, Generation(0), self.keep(file), FopenFlags::empty()),
            Err::<_, io::Error>(e) => reply.error(errno(&e)),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buf = vec![0; size as usize];
        match self.file(fh).and_then(|f| f.read_at(&mut buf, offset)) {
            Ok(n) => reply.data(&buf[..n]),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.file(fh).and_then(|f| f.write_at(data, offset)) {
            Ok(n) => reply.written(n as u32),
            Err(e) => reply.error(errno(&e)),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files.lock().expect("files").remove(&fh.0);
        reply.ok();
    }
}

fn main() {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [backing, mountpoint] = &args[..] else { panic!("naive BACKING MOUNTPOINT") };
    let paths = Mutex::default();
    let naive = Naive { root: backing.clone(), paths, files: Mutex::default(), next: AtomicU64::new(2) };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::DefaultPermissions];
    config.acl = SessionACL::All;
    config.n_threads = Some(2);
    let session = fuser::Session::new(naive, mountpoint, &config).expect("mount").spawn().expect("serve");
    println!("ready");
    io::stdout().flush().expect("standard output");
    session.join().expect("the session");
}

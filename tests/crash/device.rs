//! A block device that the test controls: a [`Disk`] served as one file by FUSE, with a loop device over it.
//!
//! Owns the FUSE session and the loop device, and gives both back on drop, in that order. A loop device turns the
//! block layer's flush into an fsync of its file, so every flush arrives here as `FUSE_FSYNC`; direct I/O on the served
//! file keeps any page cache out of the way. The loop driver handles one request after the other, hence a write is
//! either answered before a flush is sent, and covered by it, or comes after it.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, Session, WriteFlags,
};

use crate::disk::Disk;

const NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::from_secs(3600);

struct Served(Disk);

impl Served {
    fn attr(&self, ino: INodeNo) -> FileAttr {
        let file = ino == FILE;
        let size = if file { self.0.len() } else { 0 };
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if file { FileType::RegularFile } else { FileType::Directory },
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Served {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(1 << 20);
        Ok(())
    }

    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&TTL, &self.attr(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(ino));
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.0.read(offset, size as usize) {
            Ok(data) => reply.data(&data),
            Err(errno) => reply.error(Errno::from_i32(errno)),
        }
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.0.write(offset, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => reply.error(Errno::from_i32(errno)),
        }
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.0.flush() {
            Ok(Duration::ZERO) => reply.ok(),
            Ok(delay) => {
                // The device is slow, the server is not: reads go on meanwhile.
                std::thread::spawn(move || {
                    std::thread::sleep(delay);
                    reply.ok();
                });
            }
            Err(errno) => reply.error(Errno::from_i32(errno)),
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// A loop device over a [`Disk`].
pub struct Device {
    // Dropped in this order: the loop device lets go of the file before its server goes.
    loop_dev: LoopDevice,
    server: Option<Server>,
}

impl Device {
    /// `dir` is an empty directory to serve the file in.
    pub fn new(disk: &Disk, dir: &Path) -> io::Result<Self> {
        let server = Server::start(disk.clone(), dir.to_path_buf())?;
        let file = OpenOptions::new().read(true).write(true).open(dir.join(NAME))?;
        let loop_dev = LoopDevice::attach(&file)?;
        Ok(Self { loop_dev, server: Some(server) })
    }

    pub fn path(&self) -> &Path {
        &self.loop_dev.path
    }

    /// Drops what the kernel's block cache holds: needed whenever the disk changed behind its back.
    pub fn invalidate(&self) -> io::Result<()> {
        const BLKFLSBUF: libc::Ioctl = 0x1261;
        ioctl(self.loop_dev.file.as_raw_fd(), BLKFLSBUF, 0).map(drop)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.loop_dev.detach();
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

/// The FUSE session in a thread with a descriptor table of its own. When the test is killed in the middle of I/O on
/// the device, the connection ends with this thread; in a shared table it would stay open as long as any thread waits
/// for that I/O, which is for ever.
struct Server {
    stop: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

impl Server {
    fn start(disk: Disk, dir: PathBuf) -> io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let (tell, started) = mpsc::channel();
        let thread = std::thread::spawn(move || match serve(disk, &dir) {
            Ok(session) => {
                tell.send(Ok(())).unwrap();
                // Also when the sender is gone.
                let _ = stopped.recv();
                let _ = session.umount_and_join();
            }
            Err(e) => tell.send(Err(e)).unwrap(),
        });
        started.recv().unwrap()?;
        Ok(Self { stop, thread })
    }

    fn stop(self) {
        drop(self.stop);
        let _ = self.thread.join();
    }
}

fn serve(disk: Disk, dir: &Path) -> io::Result<BackgroundSession> {
    // SAFETY: nothing in this thread has or uses a descriptor yet but the standard ones, which it keeps.
    unsafe {
        if libc::unshare(libc::CLONE_FILES) != 0 || libc::close_range(3, libc::c_uint::MAX, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("crash-disk".into())];
    Session::new(Served(disk), dir, &config)?.spawn()
}

struct LoopDevice {
    path: PathBuf,
    file: File,
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo64 {
    numbers: [u64; 5],
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopDevice {
    fn attach(file: &File) -> io::Result<Self> {
        const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
        const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
        const LO_FLAGS_AUTOCLEAR: u32 = 4;
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        loop {
            let number = ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE, 0)?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let dev = OpenOptions::new().read(true).write(true).open(&path)?;
            let config = LoopConfig {
                fd: file.as_raw_fd() as u32,
                block_size: 512,
                info: LoopInfo64 {
                    numbers: [0; 5],
                    number: 0,
                    encrypt_type: 0,
                    encrypt_key_size: 0,
                    // A test that is killed leaves no loop device behind.
                    flags: LO_FLAGS_AUTOCLEAR,
                    file_name: [0; 64],
                    crypt_name: [0; 64],
                    encrypt_key: [0; 32],
                    init: [0; 2],
                },
                reserved: [0; 8],
            };
            match ioctl(dev.as_raw_fd(), LOOP_CONFIGURE, &raw const config as usize) {
                Ok(_) => return Ok(Self { path, file: dev }),
                // Another test took this one between the two calls.
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) => return Err(e),
            }
        }
    }

    fn detach(&self) {
        const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
        let _ = ioctl(self.file.as_raw_fd(), LOOP_CLR_FD, 0);
    }
}

fn ioctl(fd: RawFd, request: libc::Ioctl, arg: usize) -> io::Result<i32> {
    // SAFETY: the three requests used here take an integer or a pointer to a struct that outlives the call.
    let rc = unsafe { libc::ioctl(fd, request, arg) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

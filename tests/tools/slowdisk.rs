//! A disk whose flushes take a given time: serves an image as one file, to be attached as a loop device.
//!
//! A flush of the loop device is an fsync of the file, and is answered after the delay. Reads and writes go through kernel
//! passthrough to the image and never get here, unless the disk has a rate: then they come here one after the other,
//! and each takes the time of its bytes.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, UNIX_EPOCH};

use clap::Parser;
use fuser::{
    BackingId, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, Session, WriteFlags,
};

#[derive(Parser)]
struct Args {
    /// The image
    #[arg(long)]
    image: PathBuf,
    /// An empty directory; the disk appears as `disk` in it
    #[arg(long)]
    dir: PathBuf,
    /// How long a flush takes, in microseconds
    #[arg(long)]
    flush_us: u64,
    /// How much it reads or writes in a second, in MiB; without: as much as the machine can
    #[arg(long)]
    rate: Option<u64>,
}

struct SlowDisk {
    image: File,
    size: u64,
    delay: Duration,
    rate: Option<u64>,
    backing: OnceLock<BackingId>,
}

const ROOT: u64 = 1;
const DISK: u64 = 2;
const FOREVER: Duration = Duration::from_secs(86_400);

impl SlowDisk {
    fn pass_time_for(&self, bytes: usize) {
        if let Some(rate) = self.rate {
            std::thread::sleep(Duration::from_nanos(bytes as u64 * 1_000_000_000 / (rate << 20)));
        }
    }

    fn attr(&self, ino: u64) -> FileAttr {
        let dir = ino == ROOT;
        FileAttr {
            ino: INodeNo(ino),
            size: if dir { 0 } else { self.size },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if dir { FileType::Directory } else { FileType::RegularFile },
            perm: if dir { 0o755 } else { 0o600 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for SlowDisk {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let unsupported = |_| std::io::Error::other("this kernel has no FUSE passthrough");
        config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).map_err(unsupported)?;
        config.set_max_stack_depth(1).map_err(|n| std::io::Error::other(format!("stack depth {n}")))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == "disk" {
            true => reply.entry(&FOREVER, &self.attr(DISK), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOREVER, &self.attr(ino.0));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.rate.is_some() {
            return reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
        }
        if self.backing.get().is_none() {
            match reply.open_backing(&self.image) {
                Ok(id) => drop(self.backing.set(id)),
                Err(e) => return reply.error(e.into()),
            }
        }
        match self.backing.get() {
            Some(id) => reply.opened_passthrough(FileHandle(0), FopenFlags::empty(), id),
            None => reply.error(Errno::EIO),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buf = vec![0; size as usize];
        self.pass_time_for(buf.len());
        match self.image.read_exact_at(&mut buf, offset) {
            Ok(()) => reply.data(&buf),
            Err(e) => reply.error(e.into()),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.pass_time_for(data.len());
        match self.image.write_all_at(data, offset) {
            Ok(()) => reply.written(data.len() as u32),
            Err(e) => reply.error(e.into()),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // The device is busy for that long; it serves nothing else meanwhile, like the one it stands for.
        std::thread::sleep(self.delay);
        reply.ok();
    }
}

fn main() -> std::io::Result<()> {
    let args = Args::parse();
    let image = File::options().read(true).write(true).open(&args.image)?;
    let size = image.metadata()?.len();
    let (delay, rate) = (Duration::from_micros(args.flush_us), args.rate);
    let disk = SlowDisk { image, size, delay, rate, backing: OnceLock::new() };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("slowdisk".into()), MountOption::DefaultPermissions];
    let session = Session::new(disk, &args.dir, &config)?;
    println!("ready");
    std::io::stdout().flush()?;
    session.run()
}

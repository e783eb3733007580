//! A disk whose flushes take a given time: serves an image as one file, to be attached as a loop device.
//!
//! Reads and writes go through kernel passthrough to the image and never get here; a flush of the loop device is an
//! fsync of the file, which does, and is answered after the delay.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, UNIX_EPOCH};

use clap::Parser;
use fuser::{
    BackingId, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyOpen, Request, Session,
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
}

struct SlowDisk {
    image: File,
    size: u64,
    delay: Duration,
    backing: OnceLock<BackingId>,
}

const ROOT: u64 = 1;
const DISK: u64 = 2;
const FOREVER: Duration = Duration::from_secs(86_400);

impl SlowDisk {
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
    let disk = SlowDisk { image, size, delay: Duration::from_micros(args.flush_us), backing: OnceLock::new() };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("slowdisk".into()), MountOption::DefaultPermissions];
    let session = Session::new(disk, &args.dir, &config)?;
    println!("ready");
    std::io::stdout().flush()?;
    session.run()
}

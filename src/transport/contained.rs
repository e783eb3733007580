//! A panic in a request is that request's failure: its reply is dropped, which answers EIO, and the thread that serves
//! the others goes on. The library itself would end that thread.

use std::ffi::OsStr;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, INodeNo, IoctlFlags, KernelConfig, LockOwner, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

/// The same file system, each call contained.
#[derive(Debug)]
pub(super) struct Contained<F>(pub F);

/// Runs one call.
pub(super) fn contained(call: &str, f: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(f)).is_err() {
        tracing::error!(call, "a request made the daemon panic; it was answered EIO");
    }
}

macro_rules! contain {
    ($($name:ident($($arg:ident: $ty:ty),* $(,)?);)*) => {
        $(fn $name(&self, req: &Request, $($arg: $ty),*) {
            contained(stringify!($name), || self.0.$name(req, $($arg),*));
        })*
    };
}

impl<F: Filesystem> Filesystem for Contained<F> {
    fn init(&mut self, req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.0.init(req, config)
    }

    contain! {
        lookup(parent: INodeNo, name: &OsStr, reply: ReplyEntry);
        forget(ino: INodeNo, nlookup: u64);
        getattr(ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr);
        setattr(
            ino: INodeNo, mode: Option<u32>, uid: Option<u32>, gid: Option<u32>, size: Option<u64>,
            atime: Option<TimeOrNow>, mtime: Option<TimeOrNow>, ctime: Option<SystemTime>, fh: Option<FileHandle>,
            crtime: Option<SystemTime>, chgtime: Option<SystemTime>, bkuptime: Option<SystemTime>,
            flags: Option<BsdFileFlags>, reply: ReplyAttr,
        );
        readlink(ino: INodeNo, reply: ReplyData);
        mknod(parent: INodeNo, name: &OsStr, mode: u32, umask: u32, rdev: u32, reply: ReplyEntry);
        mkdir(parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry);
        unlink(parent: INodeNo, name: &OsStr, reply: ReplyEmpty);
        rmdir(parent: INodeNo, name: &OsStr, reply: ReplyEmpty);
        symlink(parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry);
        rename(
            parent: INodeNo, name: &OsStr, newparent: INodeNo, newname: &OsStr, flags: RenameFlags, reply: ReplyEmpty,
        );
        link(ino: INodeNo, newparent: INodeNo, newname: &OsStr, reply: ReplyEntry);
        open(ino: INodeNo, flags: OpenFlags, reply: ReplyOpen);
        read(
            ino: INodeNo, fh: FileHandle, offset: u64, size: u32, flags: OpenFlags, owner: Option<LockOwner>,
            reply: ReplyData,
        );
        write(
            ino: INodeNo, fh: FileHandle, offset: u64, data: &[u8], how: WriteFlags, flags: OpenFlags,
            owner: Option<LockOwner>, reply: ReplyWrite,
        );
        flush(ino: INodeNo, fh: FileHandle, owner: LockOwner, reply: ReplyEmpty);
        release(
            ino: INodeNo, fh: FileHandle, flags: OpenFlags, owner: Option<LockOwner>, flush: bool, reply: ReplyEmpty,
        );
        fsync(ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty);
        opendir(ino: INodeNo, flags: OpenFlags, reply: ReplyOpen);
        readdir(ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectory);
        readdirplus(ino: INodeNo, fh: FileHandle, offset: u64, reply: ReplyDirectoryPlus);
        releasedir(ino: INodeNo, fh: FileHandle, flags: OpenFlags, reply: ReplyEmpty);
        fsyncdir(ino: INodeNo, fh: FileHandle, datasync: bool, reply: ReplyEmpty);
        statfs(ino: INodeNo, reply: ReplyStatfs);
        setxattr(ino: INodeNo, name: &OsStr, value: &[u8], flags: i32, position: u32, reply: ReplyEmpty);
        getxattr(ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr);
        listxattr(ino: INodeNo, size: u32, reply: ReplyXattr);
        removexattr(ino: INodeNo, name: &OsStr, reply: ReplyEmpty);
        create(parent: INodeNo, name: &OsStr, mode: u32, umask: u32, flags: i32, reply: ReplyCreate);
        ioctl(
            ino: INodeNo, fh: FileHandle, flags: IoctlFlags, cmd: u32, data: &[u8], out_size: u32, reply: ReplyIoctl,
        );
        fallocate(ino: INodeNo, fh: FileHandle, offset: u64, length: u64, mode: i32, reply: ReplyEmpty);
        lseek(ino: INodeNo, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek);
        copy_file_range(
            ino_in: INodeNo, fh_in: FileHandle, offset_in: u64, ino_out: INodeNo, fh_out: FileHandle, offset_out: u64,
            len: u64, flags: CopyFileRangeFlags, reply: ReplyWrite,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A call that is not on the list above would be the library's own, which refuses.
    #[test]
    fn every_call_is_contained() {
        let code = include_str!("fuser.rs");
        let body = code.split_once("impl Filesystem for Adapter {").expect("the adapter").1;
        let body = body.split_once("\n}\n").expect("its end").0;
        let names = body.lines().filter_map(|l| l.strip_prefix("    fn ")?.split_once('(').map(|(name, _)| name));
        let names: Vec<_> = names.filter(|n| *n != "init").collect();
        let table = include_str!("contained.rs").split_once("contain! {").expect("the table").1;
        assert!(names.len() > 30, "{names:?}");
        for name in names {
            assert!(table.lines().any(|l| l.trim_start().starts_with(&format!("{name}("))), "{name} is not contained");
        }
    }

    #[test]
    fn the_thread_goes_on() {
        let mut done = false;
        contained("a", || panic!("injected by the test"));
        contained("b", || done = true);
        assert!(done);
    }
}

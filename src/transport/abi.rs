//! The kernel's protocol: messages as they lie in memory (linux/fuse.h, version 7.45).
//!
//! Only what is served. Sizes are asserted: a field that is missing does not compile.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version that is spoken.
pub const MAJOR: u32 = 7;
/// The newest minor version whose messages are known here.
pub const MINOR: u32 = 45;

/// Flag of INIT: the upper 32 flags are meant too.
pub const INIT_EXT: u64 = 1 << 30;
/// Flag of INIT: requests may come through io_uring.
pub const OVER_IO_URING: u64 = 1 << 41;

/// Opcodes.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const COPY_FILE_RANGE_64: u32 = 53;
}

/// `SetattrIn::valid`.
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// `WriteIn::write_flags`: from the page cache, so the process id of the header is not the writer's.
pub const WRITE_CACHE: u32 = 1 << 0;
/// `WriteIn::write_flags`: takes set-user-ID and set-group-ID away.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FsyncIn::fsync_flags`.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;

/// Codes of notifications.
pub const NOTIFY_INVAL_INODE: i32 = 2;
/// See above.
pub const NOTIFY_INVAL_ENTRY: i32 = 3;

/// `IORING_OP_URING_CMD`: offers a buffer for requests.
pub const URING_REGISTER: u32 = 1;
/// `IORING_OP_URING_CMD`: answers a request and offers its buffer for the next.
pub const URING_COMMIT_AND_FETCH: u32 = 2;

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident $size:literal { $($field:ident: $ty:ty),* $(,)? })*) => { $(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
        pub struct $name { $(pub $field: $ty),* }
        const _: () = assert!(size_of::<$name>() == $size);
    )* };
}

wire! {
    /// Before every request. `total_extlen`: length of what is appended after the arguments, in 8 bytes.
    InHeader 40 {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, total_extlen: u16, padding: u16,
    }
    /// Before every answer and notification.
    OutHeader 16 { len: u32, error: i32, unique: u64 }
    Attr 88 {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    EntryOut 128 {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32,
        attr: Attr,
    }
    AttrOut 104 { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }
    ForgetIn 8 { nlookup: u64 }
    ForgetOne 16 { nodeid: u64, nlookup: u64 }
    BatchForgetIn 8 { count: u32, dummy: u32 }
    GetattrIn 16 { getattr_flags: u32, dummy: u32, fh: u64 }
    SetattrIn 88 {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    MknodIn 16 { mode: u32, rdev: u32, umask: u32, padding: u32 }
    MkdirIn 8 { mode: u32, umask: u32 }
    RenameIn 8 { newdir: u64 }
    Rename2In 16 { newdir: u64, flags: u32, padding: u32 }
    LinkIn 8 { oldnodeid: u64 }
    OpenIn 8 { flags: u32, open_flags: u32 }
    OpenOut 16 { fh: u64, open_flags: u32, backing_id: i32 }
    CreateIn 16 { flags: u32, mode: u32, umask: u32, open_flags: u32 }
    /// Of READ, READDIR and READDIRPLUS.
    ReadIn 40 { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    WriteIn 40 { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    WriteOut 8 { size: u32, padding: u32 }
    StatfsOut 80 {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    }
    ReleaseIn 24 { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    FlushIn 24 { fh: u64, unused: u32, padding: u32, lock_owner: u64 }
    FsyncIn 16 { fh: u64, fsync_flags: u32, padding: u32 }
    /// Without the two fields that only FUSE_SETXATTR_EXT adds.
    SetxattrIn 8 { size: u32, flags: u32 }
    /// Of GETXATTR and LISTXATTR.
    GetxattrIn 8 { size: u32, padding: u32 }
    GetxattrOut 8 { size: u32, padding: u32 }
    IoctlIn 32 { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32 }
    IoctlOut 16 { result: i32, flags: u32, in_iovs: u32, out_iovs: u32 }
    FallocateIn 32 { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    LseekIn 24 { fh: u64, offset: u64, whence: u32, padding: u32 }
    LseekOut 8 { offset: u64 }
    CopyFileRangeIn 56 {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
    CopyFileRangeOut 8 { bytes_copied: u64 }
    /// A name follows, then zeros up to a multiple of 8 bytes.
    Dirent 24 { ino: u64, off: u64, namelen: u32, kind: u32 }
    InitIn 64 { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11] }
    InitOut 64 {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    }
    InvalInode 24 { ino: u64, off: i64, len: i64 }
    /// The name follows, with a NUL that `namelen` does not count.
    InvalEntry 16 { parent: u64, namelen: u32, flags: u32 }
    /// In the command area of an io_uring entry.
    UringCmd 24 { flags: u64, commit_id: u64, qid: u16, padding: [u16; 3] }
    /// Where kernel and daemon meet in an io_uring entry: the header of the request, later of the answer; the first
    /// argument of the request; what is in the payload.
    UringHeader 288 { in_out: Area, op_in: Area, entry: UringEntry }
    UringEntry 32 { flags: u64, commit_id: u64, payload_size: u32, padding: u32, reserved: u64 }
    Area 128 { words: [u64; 16] }
}

/// Length of the first argument of a request; `None` for what is not served. Names and data follow it.
pub fn argument_size(opcode: u32) -> Option<usize> {
    Some(match opcode {
        op::LOOKUP | op::READLINK | op::SYMLINK | op::UNLINK | op::RMDIR => 0,
        op::STATFS | op::REMOVEXATTR | op::DESTROY => 0,
        op::FORGET => size_of::<ForgetIn>(),
        op::GETATTR => size_of::<GetattrIn>(),
        op::SETATTR => size_of::<SetattrIn>(),
        op::MKNOD => size_of::<MknodIn>(),
        op::MKDIR => size_of::<MkdirIn>(),
        op::RENAME => size_of::<RenameIn>(),
        op::RENAME2 => size_of::<Rename2In>(),
        op::LINK => size_of::<LinkIn>(),
        op::OPEN | op::OPENDIR => size_of::<OpenIn>(),
        op::READ | op::READDIR | op::READDIRPLUS => size_of::<ReadIn>(),
        op::WRITE => size_of::<WriteIn>(),
        op::RELEASE | op::RELEASEDIR => size_of::<ReleaseIn>(),
        op::FSYNC | op::FSYNCDIR => size_of::<FsyncIn>(),
        op::SETXATTR => size_of::<SetxattrIn>(),
        op::GETXATTR | op::LISTXATTR => size_of::<GetxattrIn>(),
        op::FLUSH => size_of::<FlushIn>(),
        op::CREATE => size_of::<CreateIn>(),
        op::INTERRUPT => 8,
        op::IOCTL => size_of::<IoctlIn>(),
        op::BATCH_FORGET => size_of::<BatchForgetIn>(),
        op::FALLOCATE => size_of::<FallocateIn>(),
        op::LSEEK => size_of::<LseekIn>(),
        op::COPY_FILE_RANGE | op::COPY_FILE_RANGE_64 => size_of::<CopyFileRangeIn>(),
        _ => return None,
    })
}

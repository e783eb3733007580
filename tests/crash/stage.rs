//! Staged versions by our own system calls: all the ways in which a program's writes may have reached one.
//!
//! Owns the unnamed inode and what is written to it. The style matters to the filesystem (delayed allocation, unwritten
//! extents, shared extents, direct I/O), not to what must be there after a crash.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fastrand::Rng;
use rustix::fs::{FallocateFlags, Gid, Mode, OFlags, Uid, XattrFlags};

use crate::model::{Meta, Node, XATTR};

/// How the content gets into the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// `write` in pieces.
    Plain,
    /// `O_DIRECT` for the whole blocks, then the tail through the page cache.
    Direct,
    /// `fallocate` first: unwritten extents.
    Preallocated,
    /// Holes, and a size set by `ftruncate`.
    Sparse,
    /// Through a shared mapping.
    Mapped,
    /// Longer at first, then cut.
    Shrunk,
    /// Other content first, on its way to the disk already when the right one comes.
    Rewritten,
    /// A clone of another file, where the filesystem has that, then overwritten.
    Cloned,
}

const STYLES: [Style; 8] = [
    Style::Plain,
    Style::Direct,
    Style::Preallocated,
    Style::Sparse,
    Style::Mapped,
    Style::Shrunk,
    Style::Rewritten,
    Style::Cloned,
];

/// A new version that has no name yet, or that of a temporary file.
pub struct Stage {
    pub fd: OwnedFd,
    pub path: Option<PathBuf>,
}

impl Stage {
    /// An unnamed inode in `parent`.
    pub fn unnamed(parent: &Path) -> Self {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        Self { fd: rustix::fs::open(parent, flags, Mode::from_raw_mode(0o600)).unwrap(), path: None }
    }

    /// A temporary file in `parent`, as careful programs make it.
    pub fn named(parent: &Path, rng: &mut Rng) -> Self {
        let path = parent.join(format!(".tmp{:08x}", rng.u32(..)));
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        Self { fd: rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600)).unwrap(), path: Some(path) }
    }

    /// Content in some style, metadata before or after. `other` may serve as a source to clone.
    pub fn fill(&self, node: &Node, all_styles: bool, other: &Path, rng: &mut Rng) {
        let Node::File { content, meta } = node else { unreachable!() };
        let meta_first = rng.bool();
        if meta_first {
            set_meta(self.fd.as_fd(), meta);
        }
        let style = if all_styles { STYLES[rng.usize(..STYLES.len())] } else { Style::Plain };
        self.write(content, style, other, rng);
        if !meta_first {
            set_meta(self.fd.as_fd(), meta);
        }
    }

    fn write(&self, content: &[u8], style: Style, other: &Path, rng: &mut Rng) {
        let fd = self.fd.as_fd();
        let len = content.len() as u64;
        match style {
            Style::Plain => write_pieces(fd, content, 0, rng),
            Style::Direct => {
                let whole = content.len() / 4096 * 4096;
                self.write_direct(&content[..whole]);
                write_pieces(fd, &content[whole..], whole as u64, rng);
            }
            Style::Preallocated => {
                rustix::fs::fallocate(fd, FallocateFlags::KEEP_SIZE, 0, len.max(1)).unwrap();
                write_pieces(fd, content, 0, rng);
            }
            Style::Sparse => {
                rustix::fs::ftruncate(fd, len).unwrap();
                for (i, block) in content.chunks(4096).enumerate().filter(|(_, b)| b.iter().any(|b| *b != 0)) {
                    write_all_at(fd, block, i as u64 * 4096);
                }
            }
            Style::Mapped => {
                rustix::fs::ftruncate(fd, len).unwrap();
                write_mapped(fd, content);
            }
            Style::Shrunk => {
                write_pieces(fd, content, 0, rng);
                write_all_at(fd, &vec![0x55; rng.usize(1..20_000)], len);
                start_writeback(fd);
                rustix::fs::ftruncate(fd, len).unwrap();
            }
            Style::Rewritten => {
                write_all_at(fd, &vec![0xaa; content.len()], 0);
                start_writeback(fd);
                write_pieces(fd, content, 0, rng);
            }
            Style::Cloned => {
                if let Ok(source) = File::open(other) {
                    // Not every filesystem can; then this is the plain style.
                    let _ = rustix::fs::ioctl_ficlone(fd, &source);
                }
                write_pieces(fd, content, 0, rng);
                rustix::fs::ftruncate(fd, len).unwrap();
            }
        }
    }

    fn write_direct(&self, content: &[u8]) {
        if content.is_empty() {
            return;
        }
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
        let mut buffer = vec![0_u8; content.len() + 4096];
        let from = buffer.as_ptr().align_offset(4096);
        buffer[from..from + content.len()].copy_from_slice(content);
        write_all_at(file.as_fd(), &buffer[from..from + content.len()], 0);
    }

    /// Out of the page cache: the result says whether it got to the device, though not through the device's cache.
    pub fn sync_range(&self) {
        let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        sync_file_range(self.fd.as_fd(), all);
    }
}

fn start_writeback(fd: BorrowedFd<'_>) {
    sync_file_range(fd, libc::SYNC_FILE_RANGE_WRITE);
}

fn sync_file_range(fd: BorrowedFd<'_>, flags: libc::c_uint) {
    // SAFETY: no memory is passed; the descriptor is open.
    let rc = unsafe { libc::sync_file_range(fd.as_raw_fd(), 0, 0, flags) };
    assert_eq!(rc, 0, "sync_file_range: {}", io::Error::last_os_error());
}

fn write_mapped(fd: BorrowedFd<'_>, content: &[u8]) {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    if content.is_empty() {
        return;
    }
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
    // SAFETY: a fresh mapping of exactly the length that is written and unmapped; nobody else knows it.
    unsafe {
        let at = mmap(std::ptr::null_mut(), content.len(), prot, flags, fd, 0).unwrap();
        std::ptr::copy_nonoverlapping(content.as_ptr(), at.cast(), content.len());
        munmap(at, content.len()).unwrap();
    }
}

fn write_pieces(fd: BorrowedFd<'_>, content: &[u8], from: u64, rng: &mut Rng) {
    let (mut rest, mut at) = (content, from);
    while !rest.is_empty() {
        let n = rng.usize(1..=rest.len());
        write_all_at(fd, &rest[..n], at);
        (rest, at) = (&rest[n..], at + n as u64);
    }
}

fn write_all_at(fd: BorrowedFd<'_>, content: &[u8], from: u64) {
    let (mut rest, mut at) = (content, from);
    while !rest.is_empty() {
        let n = rustix::io::pwrite(fd, rest, at).unwrap();
        (rest, at) = (&rest[n..], at + n as u64);
    }
}

/// In the order in which the kernel does not undo it: owner, mode, extended attributes.
pub fn set_meta(fd: BorrowedFd<'_>, meta: &Meta) {
    let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
    rustix::fs::fchown(fd, Some(uid), Some(gid)).unwrap();
    rustix::fs::fchmod(fd, Mode::from_raw_mode(meta.mode)).unwrap();
    if let Some(tag) = &meta.tag {
        rustix::fs::fsetxattr(fd, XATTR, tag, XattrFlags::empty()).unwrap();
    }
}

/// A file with random content and random metadata. No byte is zero, except for whole blocks if it may be `sparse`.
pub fn random_file(size_max: usize, sparse: bool, rng: &mut Rng) -> Node {
    let len = match rng.u8(..8) {
        0 => 0,
        1 => rng.usize(1..512),
        2 => 4096,
        3..=5 => rng.usize(1..=size_max.min(24 << 10)),
        _ => rng.usize(1..=size_max),
    };
    let mut content = vec![0; len];
    let sparse = sparse && rng.u8(..4) == 0;
    for block in content.chunks_mut(4096) {
        if !(sparse && rng.bool()) {
            rng.fill(block);
            for byte in block {
                *byte = (*byte).max(1);
            }
        }
    }
    let mode = [0o644, 0o600, 0o755, 0o640, 0o400][rng.usize(..5)];
    let owner = [0, 1000, 65_534];
    let tag = match rng.u8(..4) {
        0 => Some((0..rng.usize(1..64)).map(|_| rng.u8(..)).collect()),
        1 => Some((0..rng.usize(200..800)).map(|_| rng.u8(..)).collect()),
        _ => None,
    };
    let meta = Meta { mode, uid: owner[rng.usize(..3)], gid: owner[rng.usize(..3)], tag };
    Node::File { content: Arc::from(content), meta }
}

//! /dev/fuse: the handshake, requests that are read from it, answers and notifications that are written to it.
//!
//! With io_uring the kernel still sends FORGET and INTERRUPT here, and everything until the rings are ready.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, InHeader, InitIn, InitOut, InvalEntry, InvalInode, OutHeader, op};
use super::dispatch::{Body, Guard, Line, Post, Request, Served, serve};
use crate::fs::{Fs, StaleCache};

/// Largest write request, bytes; the kernel's own limit (fs.fuse.max_pages_limit) may be lower.
pub const MAX_WRITE: u32 = 1 << 20;
/// Requests that nobody waits for, read-ahead and RELEASE, under way at the same time; and from how many on the kernel
/// takes the mount for congested. As the other transport has them.
const MAX_BACKGROUND: u16 = 16;
const CONGESTED: u16 = 12;
/// First versions whose INIT is as long as ours (linux/fuse.h 7.23).
const OLDEST_MINOR: u32 = 23;

/// An open connection to the kernel.
#[derive(Debug)]
pub struct Device(OwnedFd);

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Device {
    /// Of a fresh mount.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The handshake: takes what the kernel offers of `wanted`, and gives that.
    ///
    /// # Errors
    /// The device fails, or the kernel speaks another protocol.
    pub fn init(&self, wanted: u64) -> io::Result<u64> {
        let mut buf = vec![0; super::buffer_size()];
        loop {
            let n = self.read(&mut buf)?.ok_or_else(|| io::Error::other("unmounted before it was ready"))?;
            let (h, rest) = InHeader::read_from_prefix(&buf[..n]).map_err(|_| strange("a request without header"))?;
            if h.opcode != op::INIT {
                return Err(strange("the kernel begins with another request than INIT"));
            }
            // Older kernels send less; what they do not know is 0.
            let mut all = [0; size_of::<InitIn>()];
            let given = rest.len().min(all.len());
            all[..given].copy_from_slice(&rest[..given]);
            let offer = InitIn::read_from_bytes(&all).map_err(|_| strange("INIT"))?;
            if offer.major > abi::MAJOR {
                // It asks again, with ours.
                self.answer(h.unique, Ok(InitOut { major: abi::MAJOR, ..Default::default() }.as_bytes()));
                continue;
            }
            if offer.major < abi::MAJOR || offer.minor < OLDEST_MINOR {
                self.answer(h.unique, Err(Errno::PROTO));
                return Err(strange(&format!("protocol {}.{} is too old", offer.major, offer.minor)));
            }
            let (granted, answer) = agree(&offer, wanted);
            self.answer(h.unique, Ok(answer.as_bytes()));
            return Ok(granted);
        }
    }

    /// Serves what comes, until the mount is gone.
    ///
    /// # Errors
    /// The device fails.
    pub fn run(self: &Arc<Self>, fs: &Arc<Fs>, guard: Guard) -> io::Result<()> {
        let post: Arc<dyn Post> = self.clone();
        let mut buf = vec![0; super::buffer_size()];
        while let Some(n) = self.read(&mut buf)? {
            self.serve_one(fs, guard, &post, &mut buf, n);
        }
        Ok(())
    }

    fn serve_one(&self, fs: &Arc<Fs>, guard: Guard, post: &Arc<dyn Post>, buf: &mut [u8], n: usize) {
        let Ok((header, _)) = InHeader::read_from_prefix(&buf[..n]) else {
            tracing::error!(n, "a request without header");
            return;
        };
        let rest = &mut buf[size_of::<InHeader>()..];
        let whole = n - size_of::<InHeader>();
        let Some(size) = abi::argument_size(header.opcode) else {
            return self.answer(header.unique, Err(Errno::NOSYS));
        };
        let Some(len) = whole.checked_sub(size) else {
            return self.answer(header.unique, Err(Errno::INVAL));
        };
        let (argument, payload) = rest.split_at_mut(size);
        let mut request = Request { header, argument, payload, len };
        let line = Line::new(post, header.unique);
        if let Served::Now(r) = serve(fs, guard, &mut request, &line) {
            self.answer(header.unique, r.map(|n| &request.payload[..n]));
        }
    }

    /// `None` when the mount is gone.
    fn read(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match rustix::io::read(&self.0, &mut *buf) {
                Ok(n) => return Ok(Some(n)),
                // ENOENT: the request was taken back while it was read.
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
                Err(Errno::NODEV) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn answer(&self, unique: u64, r: Result<&[u8], Errno>) {
        let (error, data) = r.map_or_else(|e| (-e.raw_os_error(), &[][..]), |data| (0, data));
        match self.send(unique, error, &[data]) {
            // The program was killed, or the mount is gone.
            Ok(()) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(e) => tracing::error!("the kernel does not take an answer: {e}"),
        }
    }

    fn send(&self, unique: u64, error: i32, parts: &[&[u8]]) -> Result<(), Errno> {
        let len = size_of::<OutHeader>() + parts.iter().map(|p| p.len()).sum::<usize>();
        let header = OutHeader { len: len as u32, error, unique };
        let mut all = vec![IoSlice::new(header.as_bytes())];
        all.extend(parts.iter().filter(|p| !p.is_empty()).map(|p| IoSlice::new(p)));
        // The kernel takes a message whole or not at all.
        rustix::io::writev(&self.0, &all).map(|_| ())
    }

    /// Tells the kernel what it must not believe any more. False: the session is over and so are its caches.
    pub fn tell(&self, stale: &StaleCache) -> bool {
        let inode = InvalInode { ino: stale.node, off: 0, len: 0 };
        let inode = self.send(0, abi::NOTIFY_INVAL_INODE, &[inode.as_bytes()]);
        let entry = stale.name.as_ref().map_or(Ok(()), |(dir, name)| self.inval_entry(*dir, name));
        // ENOENT: the kernel did not have it.
        [inode, entry].into_iter().all(|r| matches!(r, Ok(()) | Err(Errno::NOENT)))
    }

    fn inval_entry(&self, parent: u64, name: &OsStr) -> Result<(), Errno> {
        let head = InvalEntry { parent, namelen: name.len() as u32, flags: 0 };
        self.send(0, abi::NOTIFY_INVAL_ENTRY, &[head.as_bytes(), name.as_bytes(), &[0]])
    }
}

impl Post for Device {
    fn post(&self, tag: u64, answer: Result<Body, Errno>) {
        self.answer(tag, answer.as_ref().map(Body::bytes).map_err(|e| *e));
    }
}

fn agree(offer: &InitIn, wanted: u64) -> (u64, InitOut) {
    let offered = u64::from(offer.flags) | u64::from(offer.flags2) << 32;
    // The upper half counts only when this bit says so, on both sides.
    let offered = if offered & abi::INIT_EXT == 0 { offered & u64::from(u32::MAX) } else { offered };
    let granted = offered & (wanted | abi::INIT_EXT);
    let answer = InitOut {
        major: abi::MAJOR,
        minor: abi::MINOR.min(offer.minor),
        max_readahead: offer.max_readahead,
        flags: granted as u32,
        flags2: (granted >> 32) as u32,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTED,
        max_write: MAX_WRITE,
        time_gran: 1,
        // The backing directory is on no stacked file system; a stacked one may be put on this mount.
        max_stack_depth: 1,
        max_pages: (MAX_WRITE as usize).div_ceil(rustix::param::page_size()) as u16,
        ..Default::default()
    };
    (granted, answer)
}

fn strange(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_is_offered_and_wanted() {
        let mut offer = InitIn { major: 7, minor: 50, flags: abi::INIT_EXT as u32 | 0b110, ..Default::default() };
        offer.flags2 = (abi::OVER_IO_URING >> 32) as u32;
        let (granted, out) = agree(&offer, 0b11 | abi::OVER_IO_URING);
        assert_eq!(granted, 0b10 | abi::INIT_EXT | abi::OVER_IO_URING);
        assert_eq!((out.minor, out.flags2), (45, 1 << 9));
        // An old kernel has no upper half, whatever lies there.
        offer.flags = 0b110;
        assert_eq!(agree(&offer, 0b11 | abi::OVER_IO_URING).0, 0b10);
    }
}

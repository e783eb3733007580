//! Uncommitted changes of a file in write mode `journal`: what programs see and the file does not have yet.
//!
//! Data lies in a sparse unnamed file, the side file, at the offsets where it belongs; a map says which ranges of the
//! file it covers. What programs read is put together from both. The file itself is changed by the commit alone, from
//! its record in the log ([`super::journal`]); its attributes are its own at all times.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use parking_lot::RwLock;
use rangemap::RangeMap;
use rustix::fs::{self as rfs, FallocateFlags, SeekFrom, Stat};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::time::{ClockId, clock_gettime};

use super::file::Version;
use super::record::{Extent, Kind};
use crate::backend::Backing;

/// Ranges of one file that may be changed at a time, so that memory has a bound: some 16 MiB.
const RANGES_MAX: usize = 1 << 17;

/// The overlay of one open version, used again and again.
#[derive(Debug)]
pub struct Overlay {
    side: OwnedFd,
    changes: RwLock<Option<Changes>>,
}

/// What changed.
#[derive(Debug)]
struct Changes {
    ranges: RangeMap<u64, Kind>,
    /// The file's own bytes are seen up to here, where no range covers them.
    kept: u64,
    /// Size in bytes.
    size: u64,
    /// Bytes in the side file that count.
    bytes: u64,
    /// Changes since the beginning.
    count: u64,
    /// Modification time, when it is not that of the file.
    mtime: Option<(i64, i64)>,
    ctime: (i64, i64),
}

/// Where the bytes of a range are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    File,
    Side,
    /// Nowhere: they are zero.
    Nowhere,
}

/// What a commit writes.
#[derive(Debug)]
pub struct Update {
    /// Size afterwards, bytes.
    pub size: u64,
    /// Modification time, when it is not that of the file.
    pub mtime: Option<(i64, i64)>,
    /// Change time that programs saw.
    pub ctime: (i64, i64),
    /// Every byte that is not the file's own.
    pub extents: Vec<Extent>,
}

fn now() -> (i64, i64) {
    // The clock of the kernel's own time stamps.
    let t = clock_gettime(ClockId::RealtimeCoarse);
    (t.tv_sec, t.tv_nsec as i64)
}

impl Changes {
    fn new(size: u64) -> Self {
        Self { ranges: RangeMap::new(), kept: size, size, bytes: 0, count: 0, mtime: None, ctime: (0, 0) }
    }

    /// Where the byte at `pos` is, and up to where the next ones are there too.
    fn at(&self, pos: u64) -> (At, u64) {
        if let Some((range, kind)) = self.ranges.get_key_value(&pos) {
            return (if *kind == Kind::Data { At::Side } else { At::Nowhere }, range.end.min(self.size));
        }
        let next = self.ranges.overlapping(pos..u64::MAX).next().map_or(self.size, |(r, _)| r.start.min(self.size));
        if pos < self.kept { (At::File, next.min(self.kept)) } else { (At::Nowhere, next) }
    }

    fn data_in(&self, off: u64, end: u64) -> u64 {
        let covered = |r: &std::ops::Range<u64>| r.end.min(end) - r.start.max(off);
        self.ranges.overlapping(off..end).filter(|(_, k)| **k == Kind::Data).map(|(r, _)| covered(r)).sum()
    }

    fn put(&mut self, off: u64, end: u64, kind: Kind) {
        if off < end {
            let covered = self.data_in(off, end);
            self.bytes = self.bytes - covered + if kind == Kind::Data { end - off } else { 0 };
            self.ranges.insert(off..end, kind);
        }
        self.size = self.size.max(end);
        self.changed();
    }

    fn cut(&mut self, size: u64) {
        if size < self.size {
            self.bytes -= self.data_in(size, u64::MAX);
            self.ranges.remove(size..u64::MAX);
        }
        self.kept = self.kept.min(size);
        self.size = size;
        self.changed();
    }

    fn changed(&mut self) {
        let now = now();
        (self.mtime, self.ctime) = (Some(now), now);
        self.count += 1;
    }

    fn room(&self) -> Result<(), Errno> {
        if self.ranges.len() < RANGES_MAX { Ok(()) } else { Err(Errno::NOSPC) }
    }

    fn read(&self, file: BorrowedFd<'_>, side: BorrowedFd<'_>, off: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let want = (buf.len() as u64).min(self.size.saturating_sub(off)) as usize;
        let mut done = 0;
        while done < want {
            let pos = off + done as u64;
            let (at, end) = self.at(pos);
            let part = &mut buf[done..want.min((end - off) as usize)];
            let n = match at {
                At::File => pread(file, pos, part)?,
                At::Side => pread(side, pos, part)?,
                At::Nowhere => 0,
            };
            part[n..].fill(0);
            done += part.len();
        }
        Ok(done)
    }

    fn seek(&self, file: BorrowedFd<'_>, off: u64, data: bool) -> Result<u64, Errno> {
        if off >= self.size {
            return Err(Errno::NXIO);
        }
        let mut pos = off;
        while pos < self.size {
            let (at, end) = self.at(pos);
            let found = match at {
                At::Side => data.then_some(pos),
                At::Nowhere => (!data).then_some(pos),
                At::File => match rfs::seek(file, if data { SeekFrom::Data(pos) } else { SeekFrom::Hole(pos) }) {
                    Ok(n) => (n < end).then_some(n),
                    Err(Errno::NXIO) => None,
                    Err(e) => return Err(e),
                },
            };
            if let Some(found) = found {
                return Ok(found);
            }
            pos = end;
        }
        if data { Err(Errno::NXIO) } else { Ok(self.size) }
    }
}

/// pread(2) until the end of the buffer or of the file.
fn pread(fd: BorrowedFd<'_>, off: u64, buf: &mut [u8]) -> Result<usize, Errno> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::retry_on_intr(|| rustix::io::pread(fd, &mut buf[done..], off + done as u64)) {
            Ok(0) => break,
            Ok(n) => done += n,
            // Less than asked for says that the file ends there.
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

impl Overlay {
    /// One that changes nothing yet.
    pub fn new(side: OwnedFd) -> Self {
        Self { side, changes: RwLock::new(None) }
    }

    /// The side file.
    pub fn side(&self) -> BorrowedFd<'_> {
        self.side.as_fd()
    }

    /// Reads changed data.
    pub fn read_side(&self, off: u64, buf: &mut [u8]) -> Result<(), Errno> {
        if pread(self.side(), off, buf)? == buf.len() { Ok(()) } else { Err(Errno::IO) }
    }

    /// Changes of a file of this size begin.
    pub fn begin(&self, size: u64) {
        *self.changes.write() = Some(Changes::new(size));
    }

    /// The file has the changes now.
    pub fn end(&self) {
        *self.changes.write() = None;
        // Space only: what it holds counts no more.
        if let Err(e) = rfs::ftruncate(&self.side, 0) {
            tracing::debug!(error = %e, "the side file keeps its space");
        }
    }

    fn active(&self) -> bool {
        self.changes.read().is_some()
    }

    /// What a commit has to write.
    pub fn update(&self) -> Option<Update> {
        let changes = self.changes.read();
        let c = changes.as_ref()?;
        let extent =
            |(r, kind): (&std::ops::Range<u64>, &Kind)| Extent { off: r.start, len: r.end - r.start, kind: *kind };
        let mut ranges = c.ranges.clone();
        if c.kept < c.size {
            let cut: Vec<_> = c.ranges.gaps(&(c.kept..c.size)).collect();
            cut.into_iter().for_each(|gap| ranges.insert(gap, Kind::Zero));
        }
        let extents = ranges.iter().map(extent).collect();
        Some(Update { size: c.size, mtime: c.mtime, ctime: c.ctime, extents })
    }

    /// Bytes that a write of this range would add.
    pub fn growth(&self, off: u64, len: u64) -> u64 {
        let end = off.saturating_add(len);
        self.changes.read().as_ref().map_or(0, |c| if len == 0 { 0 } else { len - c.data_in(off, end) })
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> u64 {
        self.changes.read().as_ref().map_or(0, |c| c.bytes)
    }

    /// pwrite(2); may write less.
    pub fn write(&self, backing: &Backing, off: u64, data: &[u8]) -> Result<usize, Errno> {
        let mut changes = self.changes.write();
        let c = changes.as_mut().ok_or(Errno::IO)?;
        c.room()?;
        let n = backing.write(&self.side, off, data)?;
        c.put(off, off + n as u64, Kind::Data);
        Ok(n)
    }

    /// ftruncate(2).
    pub fn cut(&self, backing: &Backing, size: u64) -> Result<(), Errno> {
        let mut changes = self.changes.write();
        let c = changes.as_mut().ok_or(Errno::IO)?;
        // Also what says that no file can be so large.
        backing.truncate(&self.side, size)?;
        c.cut(size);
        Ok(())
    }

    /// fallocate(2): preallocation, holes, zeros. Ranges cannot be taken out or put in.
    pub fn allocate(
        &self,
        backing: &Backing,
        file: BorrowedFd<'_>,
        how: FallocateFlags,
        off: u64,
        len: u64,
    ) -> Result<(), Errno> {
        let (keep, end) = (how.contains(FallocateFlags::KEEP_SIZE), off.checked_add(len).ok_or(Errno::FBIG)?);
        let how = how - FallocateFlags::KEEP_SIZE;
        let mut changes = self.changes.write();
        let c = changes.as_mut().ok_or(Errno::IO)?;
        let size = if keep { c.size } else { c.size.max(end) };
        if how.is_empty() {
            // Space for the file itself; no byte of it changes.
            backing.allocate(file, FallocateFlags::KEEP_SIZE, off, len)?;
        } else if (how == FallocateFlags::PUNCH_HOLE && keep) || how == FallocateFlags::ZERO_RANGE {
            c.room()?;
        } else {
            return Err(Errno::OPNOTSUPP);
        }
        if size > c.size {
            backing.truncate(&self.side, size)?;
            c.size = size;
        }
        match end.min(size) {
            end if !how.is_empty() && off < end => c.put(off, end, Kind::Zero),
            _ => c.changed(),
        }
        Ok(())
    }

    /// What was changed until now is how the update begins, not a change of it.
    pub fn forget_count(&self) {
        self.changes.write().as_mut().into_iter().for_each(|c| c.count = 0);
    }

    /// The file is about to carry its attributes again: the time that it does not have yet.
    pub fn take_mtime(&self) -> Option<(i64, i64)> {
        self.changes.write().as_mut().and_then(|c| c.mtime.take())
    }

    /// Fills what no range covers from the file, so that the side file is the version that a program wrote.
    pub fn complete(&self, backing: &Backing, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let changes = self.changes.read();
        let Some(c) = changes.as_ref() else { return Ok(()) };
        backing.truncate(&self.side, c.size)?;
        let (mut pos, mut piece) = (0, vec![0; 1 << 20]);
        while pos < c.size {
            let (at, end) = c.at(pos);
            let n = (end - pos).min(piece.len() as u64) as usize;
            if at != At::Side {
                let part = &mut piece[..n];
                let there = if at == At::File { pread(file, pos, part)? } else { 0 };
                part[there..].fill(0);
                let mut done = 0;
                while done < n {
                    done += backing.write(&self.side, pos + done as u64, &part[done..])?;
                }
            }
            pos += n as u64;
        }
        Ok(())
    }
}

impl Version {
    /// The changes that wait for their commit, if there are any.
    pub fn overlaid(&self) -> Option<&Overlay> {
        self.overlay.get().filter(|o| o.active())
    }

    /// Whether no program changed it since it began.
    pub fn is_untouched(&self) -> bool {
        let count = self.overlay.get().and_then(|o| o.changes.read().as_ref().map(|c| c.count));
        count.map_or_else(|| self.changes.load(std::sync::atomic::Ordering::Relaxed) == 1, |n| n == 0)
    }

    /// Content at an offset, as programs see it; fewer bytes only at the end of the file.
    pub fn read_at(&self, off: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let changes = self.overlay.get().map(|o| (o, o.changes.read()));
        let fd = self.fd();
        if let Some(e) = self.failed.late() {
            // What was said to be written may not be there.
            return Err(e);
        }
        match &changes {
            Some((o, c)) if c.is_some() => c.as_ref().map_or(Ok(0), |c| c.read(fd, o.side(), off, buf)),
            _ => pread(fd, off, buf),
        }
    }

    /// As [`Version::read_at`], of what is in memory; `None` when it would wait for the device.
    pub fn read_cached_at(&self, off: u64, buf: &mut [u8]) -> Result<Option<usize>, Errno> {
        if self.in_flight() || self.failed.late().is_some() {
            return Ok(None);
        }
        match preadv2(self.fd(), &mut [IoSliceMut::new(buf)], off, ReadWriteFlags::NOWAIT) {
            Ok(n) if n == buf.len() || off + n as u64 >= rfs::fstat(self.fd())?.st_size as u64 => {
                // What an overlay puts over it was written a moment ago.
                if self.overlaid().is_some() { self.read_at(off, buf).map(Some) } else { Ok(Some(n)) }
            }
            Ok(_) | Err(Errno::AGAIN) => Ok(None),
            // Not every file system can tell.
            Err(Errno::OPNOTSUPP) => self.read_at(off, buf).map(Some),
            Err(e) => Err(e),
        }
    }

    /// lseek(2) for data, or for a hole.
    pub fn seek(&self, off: u64, data: bool) -> Result<u64, Errno> {
        let changes = self.overlay.get().map(|o| o.changes.read());
        match changes.as_ref().and_then(|c| c.as_ref()) {
            Some(c) => c.seek(self.fd(), off, data),
            None => rfs::seek(self.fd(), if data { SeekFrom::Data(off) } else { SeekFrom::Hole(off) }),
        }
    }

    /// Attributes, as programs see them.
    pub fn stat(&self) -> Result<Stat, Errno> {
        let changes = self.overlay.get().map(|o| (o, o.changes.read()));
        let mut st = rfs::fstat(self.fd())?;
        if let Some((o, c)) = &changes
            && let Some(c) = c.as_ref()
        {
            st.st_size = c.size as i64;
            st.st_blocks += rfs::fstat(o.side())?.st_blocks;
            if let Some((s, ns)) = c.mtime {
                (st.st_mtime, st.st_mtime_nsec) = (s, ns as _);
            }
            let (s, ns) = c.ctime.max((st.st_ctime, st.st_ctime_nsec as i64));
            (st.st_ctime, st.st_ctime_nsec) = (s, ns as _);
        }
        Ok(st)
    }
}

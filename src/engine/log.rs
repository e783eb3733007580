//! The log file of the journal: appending records, finding them again, writing them into their files.
//!
//! Owns `.fsys/journal/log`. What a commit writes into a file comes from its record in the log, here and in recovery by
//! the same function. Invariant: a log that is in use begins with the head whose salt its records bear; one that is
//! empty, or is not there, holds nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self as rfs, FallocateFlags, Timespec, Timestamps, UTIME_OMIT, XattrFlags};
use rustix::io::Errno;

use super::record::{self, BLOCK, Extent, HEADER, Header, Kind, Redo};
use crate::backend::uring::SyncJob;
use crate::backend::{Backing, Call};
use crate::sys;

/// Name under `.fsys/journal/`.
pub const NAME: &str = "log";
/// The log grows by so much at once, bytes, filled with zeros: a flush after writes into it concerns data alone.
const STEP_BYTES: usize = 1 << 20;
/// Records, bytes, after which the files are flushed and the log begins anew.
pub const FULL_BYTES: u64 = 32 << 20;
/// Data is moved in pieces of this size, bytes.
const PIECE: usize = 256 << 10;
const CAPS: &str = "security.capability";

/// A record in the log.
#[derive(Debug, Clone)]
pub struct Placed {
    /// What it says.
    pub redo: Redo,
    /// Where its data begins.
    data_at: u64,
}

/// A log in use.
#[derive(Debug)]
pub struct Log {
    file: OwnedFd,
    salt: u64,
    /// Number of the next record.
    next: u64,
    /// Where it goes.
    end: u64,
    /// Up to here the file has its space, bytes.
    filled: u64,
    /// There was no space for a step; none is tried before the log begins anew.
    crowded: bool,
    /// Not flushed since it was begun: its name is not durable either.
    fresh: bool,
}

/// A position to go back to.
#[derive(Debug, Clone, Copy)]
pub struct Position {
    next: u64,
    end: u64,
}

impl Log {
    /// Begins a log. Recovery has run: what the file holds is not needed any more.
    pub fn begin(backing: &Backing) -> Result<Self, Errno> {
        let file = backing.open_log(NAME)?;
        let salt = sys::random()?;
        let mut first = record::head(salt);
        first.resize(STEP_BYTES, 0);
        backing.truncate(&file, 0)?;
        write_all(backing, &file, 0, &first)?;
        Ok(Self { file, salt, next: 0, end: BLOCK, filled: STEP_BYTES as u64, crowded: false, fresh: true })
    }

    /// What has to be flushed so that the records are durable.
    pub fn flush<'a>(&'a self, backing: &'a Backing) -> Vec<SyncJob<'a>> {
        let file = SyncJob { fd: self.file.as_fd(), data_only: !self.fresh };
        let name = backing.journal().filter(|_| self.fresh).map(|fd| SyncJob { fd, data_only: false });
        std::iter::once(file).chain(name).collect()
    }

    /// The flush succeeded.
    pub fn flushed(&mut self) {
        self.fresh = false;
    }

    /// Bytes of records.
    pub fn used(&self) -> u64 {
        self.end - BLOCK
    }

    /// Where the next record goes.
    pub fn position(&self) -> Position {
        Position { next: self.next, end: self.end }
    }

    /// Appends a record; `read` gives the data of the file. On an error the record is as if it were not there.
    pub fn append(
        &mut self,
        backing: &Backing,
        redo: Redo,
        read: impl Fn(u64, &mut [u8]) -> Result<(), Errno>,
    ) -> Result<Placed, Errno> {
        let (length, filled) = (redo.length(), self.filled);
        self.fill(backing, self.end + length);
        let placed = self.write(backing, redo, read);
        if placed.is_err() && self.filled > filled {
            // The space that it took is wanted elsewhere.
            self.shrink(backing, filled);
        }
        placed
    }

    fn write(
        &mut self,
        backing: &Backing,
        redo: Redo,
        read: impl Fn(u64, &mut [u8]) -> Result<(), Errno>,
    ) -> Result<Placed, Errno> {
        let length = redo.length();
        let mut body =
            Body { backing, file: self.file.as_fd(), at: self.end + HEADER as u64, sum: 0, held: Vec::new() };
        body.push(&redo.table())?;
        let data_at = body.position();
        let mut piece = vec![0; piece_len(redo.data())];
        for e in redo.data() {
            for (off, len) in pieces(e) {
                read(off, &mut piece[..len])?;
                body.push(&piece[..len])?;
            }
        }
        body.push(&vec![0; (self.end + length - body.position()) as usize])?;
        let sum = body.end()?;
        // Last: without it there is no record.
        write_all(backing, &self.file, self.end, &redo.header(self.salt, self.next, sum))?;
        self.end += length;
        self.next += 1;
        Ok(Placed { redo, data_at })
    }

    /// Makes room up to `end`, if there is some. A record of more than a step brings its own space, and so does any on a
    /// disk that is nearly full: whether it fits is found out when it is written.
    fn fill(&mut self, backing: &Backing, end: u64) {
        let (filled, step) = (self.filled, self.filled + STEP_BYTES as u64);
        if end <= filled {
            return;
        }
        if end <= step && !self.crowded {
            if write_all(backing, &self.file, filled, &vec![0; STEP_BYTES]).is_ok() {
                self.filled = step;
                return;
            }
            self.crowded = true;
            self.shrink(backing, filled);
        }
        self.filled = end;
    }

    /// Gives space back that no record has.
    fn shrink(&mut self, backing: &Backing, to: u64) {
        self.filled = to;
        if let Err(e) = backing.truncate(&self.file, to) {
            tracing::debug!(error = %e, "the log keeps its space");
        }
    }

    /// Takes back all records since a position, each of them: behind the one that comes in place of the first, the
    /// second would count again. Not durable before the next flush of the log.
    pub fn take_back(&mut self, backing: &Backing, to: Position) -> Result<(), Errno> {
        let (mut at, mut number) = (to.end, to.next);
        while at < self.end {
            let mut bytes = [0; HEADER];
            read_exact(&self.file, at, &mut bytes)?.ok_or(Errno::IO)?;
            let length = Header::parse(&bytes, self.salt, number).ok_or(Errno::IO)?.length();
            write_all(backing, &self.file, at, &[0; HEADER])?;
            (at, number) = (at + length, number + 1);
        }
        (self.next, self.end) = (to.next, to.end);
        Ok(())
    }

    /// Begins anew: no record counts any more. Not durable before the next flush of the log.
    pub fn restart(&mut self, backing: &Backing) -> Result<(), Errno> {
        let salt = sys::random()?;
        write_all(backing, &self.file, 0, &record::head(salt))?;
        let used = self.end;
        (self.salt, self.next, self.end, self.crowded) = (salt, 0, BLOCK, false);
        if used > BLOCK + FULL_BYTES {
            // It grew for one large update: the space goes back.
            self.shrink(backing, BLOCK + FULL_BYTES);
        }
        Ok(())
    }

    /// Writes a record into its file.
    pub fn apply(&self, backing: &Backing, placed: &Placed, target: BorrowedFd<'_>) -> Result<(), Errno> {
        apply(self.file.as_fd(), placed, target, &|want| Ok(backing.pass(Call::Apply)?.map_or(want, |n| n.min(want))))
    }
}

/// Writes the body of a record in whole pieces and sums it up.
struct Body<'a> {
    backing: &'a Backing,
    file: BorrowedFd<'a>,
    at: u64,
    sum: u32,
    held: Vec<u8>,
}

impl Body<'_> {
    fn position(&self) -> u64 {
        self.at + self.held.len() as u64
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), Errno> {
        self.sum = crc32c::crc32c_append(self.sum, bytes);
        self.held.extend_from_slice(bytes);
        if self.held.len() >= PIECE { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<(), Errno> {
        write_all(self.backing, self.file, self.at, &self.held)?;
        self.at += self.held.len() as u64;
        self.held.clear();
        Ok(())
    }

    fn end(mut self) -> Result<u32, Errno> {
        self.write()?;
        Ok(self.sum)
    }
}

fn write_all(backing: &Backing, file: impl AsFd, at: u64, bytes: &[u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        let n = backing.pass(Call::Journal)?.map_or(bytes.len() - done, |n| n.clamp(1, bytes.len() - done));
        done += rustix::io::retry_on_intr(|| rustix::io::pwrite(&file, &bytes[done..done + n], at + done as u64))?;
    }
    Ok(())
}

/// An extent in pieces: offset and length of each.
fn pieces(e: &Extent) -> impl Iterator<Item = (u64, usize)> {
    (e.off..e.off + e.len).step_by(PIECE).map(|off| (off, (e.off + e.len - off).min(PIECE as u64) as usize))
}

/// The longest of these pieces.
fn piece_len<'a>(extents: impl IntoIterator<Item = &'a Extent>) -> usize {
    extents.into_iter().map(|e| e.len.min(PIECE as u64) as usize).max().unwrap_or(0)
}

/// Fills `buf` from `at` on; `None` when the file ends before.
fn read_exact(file: impl AsFd, at: u64, buf: &mut [u8]) -> Result<Option<()>, Errno> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::retry_on_intr(|| rustix::io::pread(&file, &mut buf[done..], at + done as u64))? {
            0 => return Ok(None),
            n => done += n,
        }
    }
    Ok(Some(()))
}

/// What a log file holds.
#[derive(Debug)]
pub enum Found {
    /// These records, in order; none when it is empty.
    Records(Vec<Placed>),
    /// It begins with no head of ours.
    Strange,
}

/// Finds the records that count.
pub fn scan(log: BorrowedFd<'_>) -> Result<Found, Errno> {
    let mut head = vec![0; BLOCK as usize];
    let there = read_exact(log, 0, &mut head)?.is_some();
    let Some(salt) = record::salt_of(&head).filter(|_| there) else {
        // Begun and not flushed: no record was acknowledged.
        return Ok(if head.iter().all(|b| *b == 0) { Found::Records(Vec::new()) } else { Found::Strange });
    };
    let (mut at, mut records) = (BLOCK, Vec::new());
    while let Some((placed, length)) = read_record(log, at, salt, records.len() as u64)? {
        at += length;
        records.push(placed);
    }
    Ok(Found::Records(records))
}

fn read_record(log: BorrowedFd<'_>, at: u64, salt: u64, number: u64) -> Result<Option<(Placed, u64)>, Errno> {
    let mut bytes = [0; HEADER];
    if read_exact(log, at, &mut bytes)?.is_none() {
        return Ok(None);
    }
    let size = rfs::fstat(log)?.st_size as u64;
    let Some(header) = Header::parse(&bytes, salt, number).filter(|h| h.length() <= size - at) else { return Ok(None) };
    let mut table = vec![0; header.table_len()];
    let body = at + HEADER as u64;
    if read_exact(log, body, &mut table)?.is_none() || sum(log, body, at + header.length())? != Some(header.body_sum())
    {
        return Ok(None);
    }
    let placed = header.redo(&table).map(|redo| Placed { redo, data_at: body + table.len() as u64 });
    Ok(placed.map(|p| (p, header.length())))
}

fn sum(log: BorrowedFd<'_>, from: u64, to: u64) -> Result<Option<u32>, Errno> {
    let (mut sum, mut piece) = (0, vec![0; PIECE]);
    for (off, len) in pieces(&Extent { off: from, len: to - from, kind: Kind::Data }) {
        if read_exact(log, off, &mut piece[..len])?.is_none() {
            return Ok(None);
        }
        sum = crc32c::crc32c_append(sum, &piece[..len]);
    }
    Ok(Some(sum))
}

/// Writes a record into its file. Before each change it asks `pass`, which may fail or shorten it. To do it again, or
/// again from the first of several records, ends the same.
pub fn apply(
    log: BorrowedFd<'_>,
    placed: &Placed,
    target: BorrowedFd<'_>,
    pass: &dyn Fn(usize) -> Result<usize, Errno>,
) -> Result<(), Errno> {
    let redo = &placed.redo;
    // The program removed them, or set them since: our writes are not to remove them once more.
    let caps = capabilities(target)?;
    // Beyond it all is zero already.
    let old_size = rfs::fstat(target)?.st_size as u64;
    let (mut at, mut piece) = (placed.data_at, vec![0; piece_len(&redo.extents)]);
    for e in &redo.extents {
        let mut e = *e;
        if e.kind == Kind::Zero {
            e.len = e.len.min(old_size.saturating_sub(e.off));
            if e.len == 0 || punch(target, &e, pass)? {
                continue;
            }
        }
        for (off, len) in pieces(&e) {
            if e.kind == Kind::Data {
                read_exact(log, at, &mut piece[..len])?.ok_or(Errno::IO)?;
                at += len as u64;
            } else {
                piece[..len].fill(0);
            }
            put(target, off, &piece[..len], pass)?;
        }
    }
    pass(0)?;
    if rfs::fstat(target)?.st_size as u64 != redo.size {
        rfs::ftruncate(target, redo.size)?;
    }
    if let Some(caps) = caps {
        rfs::fsetxattr(target, CAPS, &caps, XattrFlags::empty())?;
    }
    let last_modification = Timespec { tv_sec: redo.mtime.0, tv_nsec: redo.mtime.1.into() };
    let last_access = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    rfs::futimens(target, &Timestamps { last_access, last_modification })
}

fn put(
    target: BorrowedFd<'_>,
    off: u64,
    bytes: &[u8],
    pass: &dyn Fn(usize) -> Result<usize, Errno>,
) -> Result<(), Errno> {
    let mut done = 0;
    while done < bytes.len() {
        let n = pass(bytes.len() - done)?.max(1);
        done += rustix::io::retry_on_intr(|| rustix::io::pwrite(target, &bytes[done..done + n], off + done as u64))?;
    }
    Ok(())
}

/// False where the file system has no holes.
fn punch(target: BorrowedFd<'_>, e: &Extent, pass: &dyn Fn(usize) -> Result<usize, Errno>) -> Result<bool, Errno> {
    pass(0)?;
    match rfs::fallocate(target, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, e.off, e.len) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(false),
        Err(e) => Err(e),
    }
}

fn capabilities(target: BorrowedFd<'_>) -> Result<Option<Vec<u8>>, Errno> {
    let mut value = [0; 64];
    match rfs::fgetxattr(target, CAPS, &mut value[..]) {
        Ok(n) => Ok(Some(value[..n].to_vec())),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e),
    }
}

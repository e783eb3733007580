//! Writes past the page cache that go on while their program does. A large aligned write to a version that nobody else
//! can see yet is copied into a buffer registered with io_uring, handed to the thread that owns the ring, and counts as
//! made; several of a file are on their way at a time. So a program fills the next piece while the device takes the
//! last ones. Nothing else touches the file before they have landed ([`DirectFile::settle`]); what fails on the way is
//! noted with the file ([`Failures`]).

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};
use io_uring::{IoUring, opcode, squeue, types};
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::backend::failure::Failures;
use crate::backend::{Backing, Call, Gate, Verdict, contain};
use crate::sys::AlignedBuf;

/// Alignment of offsets and lengths, bytes: the largest logical block of common devices.
pub const ALIGN: u64 = 4096;
/// Writes on their way, of all files together, and the buffers for them.
const BUFFERS: usize = 16;
/// Bytes of a buffer: the most that the kernel asks for in one request.
const BUFFER_BYTES: usize = 1 << 20;
/// Writes on their way of one file: two keep a device busy, more make others wait longer that want to see the file.
const OF_A_FILE: usize = 4;
/// Smallest write, bytes, that is worth the way through the ring.
const LEAST_BYTES: usize = 128 << 10;
/// Marks the completion that says that there is more to do.
const WOKEN: u64 = u64::MAX;

/// The ring and its thread, made when they are needed first.
pub struct Writes {
    line: OnceLock<Option<Line>>,
    gate: Option<Arc<dyn Gate>>,
}

/// The way to the thread that owns the ring.
struct Line {
    jobs: Option<Sender<Job>>,
    wake: Arc<OwnedFd>,
    room: Arc<Room>,
}

/// Who may write.
struct Room {
    state: Mutex<State>,
    /// Something landed.
    landed: Condvar,
}

struct State {
    /// By number; those that are free.
    free: Vec<(u16, AlignedBuf)>,
    flying: Vec<Flight>,
    /// Flights so far.
    begun: u64,
    /// The ring is of no use any more.
    broken: bool,
}

/// A write on its way: its number, whose it is, and of which bytes.
struct Flight {
    nth: u64,
    /// The address of the file, which its job holds.
    file: usize,
    bytes: Range<u64>,
}

struct Job {
    nth: u64,
    file: Arc<DirectFile>,
    off: u64,
    len: usize,
    buffer: u16,
    buf: AlignedBuf,
}

/// A file written with `O_DIRECT`.
pub struct DirectFile {
    direct: OwnedFd,
    /// The same inode, through the page cache.
    plain: Arc<OwnedFd>,
    writes: Arc<Writes>,
    flying: AtomicUsize,
    failed: Arc<Failures>,
    /// The file system takes no such writes.
    refused: AtomicBool,
    /// The end of the furthest write.
    reach: AtomicU64,
}

impl std::fmt::Debug for DirectFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirectFile").field("direct", &self.direct).field("flying", &self.flying).finish_non_exhaustive()
    }
}

/// Whether offset and length are those of a write with `O_DIRECT`.
pub fn is_aligned(off: u64, len: usize) -> bool {
    off.is_multiple_of(ALIGN) && (len as u64).is_multiple_of(ALIGN) && len > 0
}

impl Backing {
    /// The inode of `fd`, which is open for writing, to be written with `O_DIRECT`; what fails late goes to `failed`.
    pub fn open_direct(&self, fd: &Arc<OwnedFd>, failed: Arc<Failures>) -> Result<DirectFile, Errno> {
        let direct = self.reopen(fd.as_fd(), libc::O_WRONLY | libc::O_DIRECT)?;
        let (plain, writes) = (fd.clone(), self.writes.clone());
        Ok(DirectFile { direct, plain, writes, flying: 0.into(), failed, refused: false.into(), reach: 0.into() })
    }

    /// pwrite(2) of aligned data through a descriptor opened with `O_DIRECT`.
    pub fn write_direct(&self, fd: impl AsFd, off: u64, data: &[u8]) -> Result<usize, Errno> {
        write_aligned(fd, off, self.admitted(data)?)
    }

    /// The same to a file that nobody else sees: may return before the data is written.
    pub fn write_behind(&self, file: &Arc<DirectFile>, off: u64, data: &[u8]) -> Result<usize, Errno> {
        let data = self.admitted(data)?;
        if file.start(off, data) {
            return Ok(data.len());
        }
        file.settle();
        let n = write_aligned(file.fd(), off, data)?;
        file.failed.heal(off..off + n as u64);
        Ok(n)
    }
}

fn write_aligned(fd: impl AsFd, off: u64, data: &[u8]) -> Result<usize, Errno> {
    let Some(buf) = AlignedBuf::from_slice(data) else { return Ok(0) };
    rustix::io::pwrite(fd, buf.as_slice(), off)
}

impl Writes {
    /// Nothing is on its way.
    pub fn new(gate: Option<Arc<dyn Gate>>) -> Self {
        Self { line: OnceLock::new(), gate }
    }

    fn line(&self) -> Option<&Line> {
        self.line.get_or_init(|| Line::new().inspect_err(|e| tracing::debug!(error = %e, "no ring")).ok()).as_ref()
    }

    /// What became of a write, as a test wants it.
    fn landed(&self, result: i32) -> Result<usize, Errno> {
        let verdict = self.gate.as_ref().map_or(Ok(Verdict::Go), |g| contain(|| Ok(g.before(Call::Land))));
        match verdict.map_err(|f| f.errno())? {
            Verdict::Fail(e) => Err(e),
            Verdict::Short(n) => Ok(n),
            Verdict::Go => usize::try_from(result).map_err(|_| Errno::from_raw_os_error(-result)),
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // The thread ends when it hears that there is nobody left.
        self.jobs = None;
        ring_the_bell(&self.wake);
    }
}

fn ring_the_bell(wake: &OwnedFd) {
    // It cannot fail but for a count that is full, and then the thread is awake.
    let _rung = rustix::io::write(wake, &1_u64.to_ne_bytes());
}

impl DirectFile {
    /// The descriptor with `O_DIRECT`.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.direct.as_fd()
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Whether writes are on their way.
    pub fn in_flight(&self) -> bool {
        self.flying.load(Ordering::Acquire) > 0
    }

    /// Whether a write is one that [`DirectFile::start`] takes. Not one that begins behind the end of the file: no file may
    /// be so large, and that is to be told at once.
    fn suits(&self, off: u64, len: usize) -> bool {
        let end = || rustix::fs::fstat(&self.plain).map_or(0, |st| st.st_size as u64);
        (LEAST_BYTES..=BUFFER_BYTES).contains(&len)
            && is_aligned(off, len)
            && !self.refused.load(Ordering::Relaxed)
            && (off <= self.reach.load(Ordering::Relaxed) || off <= end())
    }

    /// Whether too many writes are on their way, or one of the same bytes.
    fn must_wait(&self, state: &State, bytes: &Range<u64>) -> bool {
        let overlaps = |f: &Flight| f.file == self.address() && f.bytes.start < bytes.end && bytes.start < f.bytes.end;
        self.flying.load(Ordering::Acquire) >= OF_A_FILE || state.flying.iter().any(overlaps)
    }

    /// Whether a write would wait for no other, nor for the ring to be made.
    pub fn has_room(&self, off: u64, len: usize) -> bool {
        let line = self.writes.line.get().and_then(Option::as_ref).filter(|_| self.suits(off, len));
        line.is_some_and(|line| {
            let (state, bytes) = (line.room.state.lock(), off..off + len as u64);
            !state.broken && !state.free.is_empty() && !self.must_wait(&state, &bytes)
        })
    }

    /// pwrite(2) that may return before the device has the data; waits while too many are on their way, or one of the same
    /// bytes. False when it is no such write, or the kernel offers no ring.
    fn start(self: &Arc<Self>, off: u64, data: &[u8]) -> bool {
        let line = if self.suits(off, data.len()) { self.writes.line() } else { None };
        let Some(line) = line else { return false };
        let bytes = off..off + data.len() as u64;
        let mut state = line.room.state.lock();
        let (buffer, mut buf, nth) = loop {
            if state.broken {
                return false;
            }
            match if self.must_wait(&state, &bytes) { None } else { state.free.pop() } {
                Some((buffer, buf)) => break (buffer, buf, state.begun),
                None => line.room.landed.wait(&mut state),
            }
        };
        state.begun += 1;
        state.flying.push(Flight { nth, file: self.address(), bytes: bytes.clone() });
        self.flying.fetch_add(1, Ordering::AcqRel);
        drop(state);
        self.reach.fetch_max(bytes.end, Ordering::Relaxed);
        // Written anew; what fails of this one comes later.
        self.failed.heal(bytes);
        buf.fill_from(data);
        let job = Job { nth, file: self.clone(), off, len: data.len(), buffer, buf };
        match line.jobs.as_ref().map(|jobs| jobs.send(job)) {
            Some(Ok(())) => ring_the_bell(&line.wake),
            // The thread has ended, and said so, or the job would be gone with it.
            Some(Err(e)) => line.room.land(e.into_inner(), Err(Errno::IO)),
            None => {}
        }
        true
    }

    /// Waits until the writes that are on their way have landed.
    pub fn settle(&self) {
        let Some(line) = self.writes.line.get().and_then(Option::as_ref).filter(|_| self.in_flight()) else { return };
        let mut state = line.room.state.lock();
        let upto = state.begun;
        while state.flying.iter().any(|f| f.file == self.address() && f.nth < upto) {
            line.room.landed.wait(&mut state);
        }
    }

    /// Makes sure that all of a write is made; `result` as io_uring tells it.
    fn complete(&self, off: u64, data: &[u8], result: i32) -> Result<(), Errno> {
        let rest = |done: usize| {
            let mut done = done.min(data.len());
            while done < data.len() {
                match rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.plain, &data[done..], off + done as u64))? {
                    0 => return Err(Errno::NOSPC),
                    n => done += n,
                }
            }
            Ok(())
        };
        match self.writes.landed(result) {
            Ok(n) => rest(n),
            // It was not tried.
            Err(e @ (Errno::INVAL | Errno::AGAIN | Errno::CANCELED | Errno::INTR)) => {
                self.refused.fetch_or(e == Errno::INVAL, Ordering::Relaxed);
                rest(0)
            }
            Err(e) => Err(e),
        }
    }
}

impl Room {
    fn land(&self, job: Job, result: Result<(), Errno>) {
        if let Err(e) = result {
            job.file.failed.add_late(job.off..job.off + job.len as u64, e);
        }
        let mut state = self.state.lock();
        state.flying.retain(|f| f.nth != job.nth);
        state.free.push((job.buffer, job.buf));
        job.file.flying.fetch_sub(1, Ordering::AcqRel);
        drop(state);
        self.landed.notify_all();
    }
}

impl Line {
    fn new() -> std::io::Result<Self> {
        let uring = IoUring::new(2 * BUFFERS as u32)?;
        let mut probe = io_uring::Probe::new();
        uring.submitter().register_probe(&mut probe)?;
        if ![opcode::Read::CODE, opcode::Write::CODE, opcode::WriteFixed::CODE].iter().all(|c| probe.is_supported(*c)) {
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        let bufs: Vec<_> = (0..BUFFERS).map(|_| AlignedBuf::zeroed(BUFFER_BYTES)).collect();
        let vecs: Vec<_> = bufs
            .iter()
            .map(|b| libc::iovec { iov_base: b.as_ptr().cast_mut().cast(), iov_len: BUFFER_BYTES })
            .collect();
        // SAFETY: the kernel holds on to the pages itself, and a buffer that it may still read is never freed.
        let registered = unsafe { uring.submitter().register_buffers(&vecs) };
        if let Err(e) = &registered {
            // The bound on locked memory; the kernel then finds the pages anew for each write.
            tracing::debug!(error = %e, "buffers are not registered");
        }
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let state = State { free: (0..).zip(bufs).collect(), flying: Vec::new(), begun: 0, broken: false };
        let room = Arc::new(Room { state: Mutex::new(state), landed: Condvar::new() });
        let (jobs, todo) = unbounded();
        let mut ring = Ring {
            uring,
            registered: registered.is_ok(),
            wake: wake.clone(),
            count: Box::new([0; 8]),
            room: room.clone(),
            todo,
            flying: (0..BUFFERS).map(|_| None).collect(),
        };
        std::thread::Builder::new().name("direct".into()).spawn(move || {
            if !matches!(contain(|| Ok(ring.run())), Ok(true)) {
                tracing::error!("the ring of writes is given up; writes go on without it");
                ring.give_up();
            }
        })?;
        Ok(Self { jobs: Some(jobs), wake, room })
    }
}

/// What the thread has.
struct Ring {
    uring: IoUring,
    registered: bool,
    wake: Arc<OwnedFd>,
    /// Where the kernel writes how often it was woken.
    count: Box<[u8; 8]>,
    room: Arc<Room>,
    todo: Receiver<Job>,
    /// By number of their buffer.
    flying: Vec<Option<Job>>,
}

impl Ring {
    /// True when there is nobody left; false when the ring is of no use.
    fn run(&mut self) -> bool {
        self.listen();
        let mut over = false;
        while !over || self.flying.iter().any(Option::is_some) {
            match self.uring.submit_and_wait(1).map_err(|e| e.raw_os_error()) {
                Ok(_) | Err(Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(e) => {
                    tracing::error!(error = ?e, "io_uring: submit failed");
                    return false;
                }
            }
            while let Some(c) = { self.uring.completion().next() } {
                if c.user_data() == WOKEN {
                    let again = [-libc::EINTR, -libc::EAGAIN, -libc::ECANCELED];
                    if c.result() < 0 && !again.contains(&c.result()) {
                        return false;
                    }
                    over = self.take();
                    self.listen();
                } else if let Some(job) = self.flying.get_mut(c.user_data() as usize).and_then(Option::take) {
                    let data = &job.buf.as_slice()[..job.len];
                    let result = contain(|| job.file.complete(job.off, data, c.result()));
                    self.room.land(job, result.map_err(|fault| fault.errno()));
                }
            }
        }
        true
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: what an entry points to is in `count`, or in `flying` until its completion. As many entries as jobs and the
        // bell: there is always room.
        if unsafe { self.uring.submission().push(entry) }.is_err() {
            unreachable!("a ring of twice as many");
        }
    }

    fn listen(&mut self) {
        let (fd, to) = (types::Fd(self.wake.as_raw_fd()), self.count.as_mut_ptr());
        self.push(&opcode::Read::new(fd, to, 8).build().user_data(WOKEN));
    }

    /// Takes what there is to do; whether that was the last.
    fn take(&mut self) -> bool {
        loop {
            match self.todo.try_recv() {
                Ok(job) => {
                    let (fd, at) = (types::Fd(job.file.direct.as_raw_fd()), job.buf.as_ptr());
                    let entry = match self.registered {
                        true => opcode::WriteFixed::new(fd, at, job.len as u32, job.buffer).offset(job.off).build(),
                        false => opcode::Write::new(fd, at, job.len as u32).offset(job.off).build(),
                    };
                    let i = usize::from(job.buffer);
                    self.flying[i] = Some(job);
                    self.push(&entry.user_data(i as u64));
                }
                Err(TryRecvError::Empty) => return false,
                Err(TryRecvError::Disconnected) => return true,
            }
        }
    }

    /// Nothing is known of what is on its way: it failed. Its buffers are never used again, since the kernel may still read
    /// them.
    fn give_up(&mut self) {
        self.room.state.lock().broken = true;
        let lost = |mut job: Job| {
            std::mem::forget(std::mem::replace(&mut job.buf, AlignedBuf::zeroed(1)));
            self.room.land(job, Err(Errno::IO));
        };
        self.flying.iter_mut().filter_map(Option::take).for_each(lost);
        // Those that began before the word was out.
        while !self.room.state.lock().flying.is_empty() {
            let Ok(job) = self.todo.recv() else { break };
            self.room.land(job, Err(Errno::IO));
        }
        self.room.landed.notify_all();
    }
}

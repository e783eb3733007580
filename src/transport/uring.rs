//! Requests and answers through io_uring (Documentation/filesystems/fuse/fuse-io-uring.rst; kernel 6.14).
//!
//! The kernel has one queue for each possible processor, and puts a request into the queue of the processor that its
//! program runs on. Each queue is served by a thread on that same processor: no other has to be woken up. A queue has
//! a number of entries, each a header and memory for data; an entry is the kernel's, until a request is in it, and
//! ours, until it is answered. Who answers later thus holds an entry; when none is free, further requests of that
//! processor wait in the kernel. No answer may therefore depend on another request: the dispatcher's do not.
//!
//! Only the thread that made a ring may use it (`IORING_SETUP_SINGLE_ISSUER`): the kernel copies the next request in the
//! context of the thread that answered the one before, which must not be a thread that waits for a device. So others
//! hand their answers over by a [`Mailbox`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, InHeader, OutHeader, UringCmd, UringEntry, UringHeader};
use super::device::{Device, MAX_WRITE};
use super::dispatch::{Body, Guard, Line, Post, Request, Served, serve};
use crate::fs::Fs;

/// Where the kernel says whether it may.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";
/// Entries of all queues together, and bounds for one. More than programs can wait at the same time on most machines;
/// an entry costs a page until more data than that passes through it.
const ENTRIES: usize = 2048;
const DEPTH_MAX: usize = 256;
const DEPTH_MIN: usize = 16;
/// Entries of the queue of a processor that is not there, should it ever come.
const DEPTH_ABSENT: usize = 4;
/// Memory of an entry that is given back when more than [`LARGE_MAX`] entries of a ring keep more.
const SMALL: usize = 64 << 10;
const LARGE_MAX: usize = 32;
/// `user_data` of the entry that a mailbox wakes the ring by; others are numbers of slots.
const WAKE: u64 = u64::MAX;

/// Why io_uring cannot be used.
pub type Reason = String;

/// Whether the kernel may.
///
/// # Errors
/// Why not, and what to do.
pub fn available() -> Result<(), Reason> {
    match std::fs::read_to_string(SWITCH) {
        Ok(text) if text.trim() == "Y" => Ok(()),
        Ok(_) => Err(format!("{SWITCH} is N (root turns it on: `echo Y > {SWITCH}`, or fuse.enable_uring=1 at boot)")),
        Err(_) => Err("this kernel has no FUSE over io_uring (Linux 6.14 and later, CONFIG_FUSE_IO_URING)".into()),
    }
}

/// Answers on their way to the thread of a ring.
struct Mailbox {
    answers: Mutex<Vec<(u64, Result<Body, Errno>)>>,
    bell: OwnedFd,
    /// The thread waits, or is about to: who puts something in rings the bell.
    sleeps: AtomicBool,
    stop: AtomicBool,
}

impl Mailbox {
    fn new() -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { answers: Mutex::default(), bell, sleeps: AtomicBool::new(false), stop: AtomicBool::new(false) })
    }

    fn ring(&self) {
        // Many answers of one batch, one wake-up. EAGAIN of a full counter: it rings already.
        if self.sleeps.swap(false, Ordering::SeqCst)
            && let Err(e) = rustix::io::write(&self.bell, &1_u64.to_ne_bytes())
            && e != Errno::AGAIN
        {
            tracing::error!("cannot wake a ring: {e}");
        }
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// True when the thread may wait: nothing is there, and from now on who comes rings.
    fn may_sleep(&self) -> bool {
        self.sleeps.store(true, Ordering::SeqCst);
        let empty = self.answers.lock().is_empty() && !self.stop.load(Ordering::SeqCst);
        if !empty {
            self.sleeps.store(false, Ordering::SeqCst);
        }
        empty
    }
}

impl Post for Mailbox {
    fn post(&self, tag: u64, answer: Result<Body, Errno>) {
        self.answers.lock().push((tag, answer));
        self.ring();
    }
}

/// The memory of the entries of a ring: headers, then payloads, each on pages of its own. It is touched by use only.
struct Memory {
    base: NonNull<u8>,
    slots: usize,
    /// Bytes before the first payload.
    headers: usize,
    /// Bytes of a payload: what the kernel asks for is the largest write (fuse_uring_create).
    payload: usize,
}

// SAFETY: the mapping belongs to this object alone, like a `Box<[u8]>`.
unsafe impl Send for Memory {}

impl Memory {
    fn map(slots: usize) -> io::Result<Self> {
        let page = rustix::param::page_size();
        let headers = (slots * size_of::<UringHeader>()).next_multiple_of(page);
        let payload = (MAX_WRITE as usize).next_multiple_of(page);
        let (size, flags) = (headers + slots * payload, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a fresh anonymous mapping, wherever the kernel likes.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, slots, headers, payload })
    }

    #[allow(clippy::cast_ptr_alignment, reason = "a mapping begins at a page")]
    fn header_at(&self, slot: usize) -> *mut UringHeader {
        assert!(slot < self.slots);
        // SAFETY: within the mapping, which begins with `slots` headers; a page is aligned for them.
        unsafe { self.base.as_ptr().cast::<UringHeader>().add(slot) }
    }

    fn payload_at(&self, slot: usize) -> *mut u8 {
        assert!(slot < self.slots);
        // SAFETY: within the mapping, in which `slots` payloads follow the headers.
        unsafe { self.base.as_ptr().add(self.headers + slot * self.payload) }
    }

    /// Header and payload of an entry that is ours.
    fn entry(&mut self, slot: usize) -> (&mut UringHeader, &mut [u8]) {
        // SAFETY: both lie in the mapping, apart from each other and from those of other slots; all bytes are valid
        // for both types; `&mut self` makes this the only reference on our side, and the kernel writes to an entry
        // only in a system call of this thread, and not while the entry is ours.
        unsafe { (&mut *self.header_at(slot), std::slice::from_raw_parts_mut(self.payload_at(slot), self.payload)) }
    }

    /// Gives memory back: what lies beyond [`SMALL`] bytes of a payload that is ours reads as zeros from now on.
    fn shrink(&mut self, slot: usize) {
        // SAFETY: the range lies in the mapping, on page boundaries, and no reference to it is held (`&mut self`).
        let rc = unsafe {
            libc::madvise(self.payload_at(slot).add(SMALL).cast(), self.payload - SMALL, libc::MADV_DONTNEED)
        };
        if rc != 0 {
            tracing::debug!("madvise: {}", io::Error::last_os_error());
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this size; references into it do not outlive `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.headers + self.slots * self.payload) };
    }
}

/// What a request needs to be served.
#[derive(Clone)]
pub struct Serving {
    /// The operation core.
    pub fs: Arc<Fs>,
    /// Who may ask.
    pub guard: Guard,
    /// The mount.
    pub device: Arc<Device>,
}

/// An entry as this side knows it.
#[derive(Clone, Copy)]
struct Slot {
    queue: u16,
    /// Of the request in it, while it is ours.
    unique: u64,
    /// Its memory beyond [`SMALL`] was used.
    large: bool,
}

/// A ring, on its own thread.
struct Ring {
    // Before the memory: it goes first.
    io: IoUring<Entry128, cqueue::Entry>,
    memory: Memory,
    slots: Vec<Slot>,
    large: usize,
    mailbox: Arc<Mailbox>,
}

impl Ring {
    /// With `queues`: number in the kernel and entries.
    fn new(queues: &[(u16, usize)], mailbox: Arc<Mailbox>) -> io::Result<Self> {
        let of = |(queue, depth): &(u16, usize)| vec![Slot { queue: *queue, unique: 0, large: false }; *depth];
        let slots: Vec<Slot> = queues.iter().flat_map(of).collect();
        // One more to be woken up by.
        let size = (slots.len() + 1).next_power_of_two() as u32;
        let io = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(size)?;
        Ok(Self { io, memory: Memory::map(slots.len())?, slots, large: 0, mailbox })
    }

    fn push(&mut self, entry: &Entry128) -> io::Result<()> {
        loop {
            // SAFETY: what an entry points to, the memory of the slots and the bell, lives as long as the ring; the
            // vectors that `register` gives live until the entry was submitted there.
            if unsafe { self.io.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.io.submit()?;
        }
    }

    /// Offers all entries to the kernel.
    fn register(&mut self, device: &Device) -> io::Result<()> {
        self.io.submitter().register_files(&[device.as_fd().as_raw_fd()])?;
        let vectors: Vec<[libc::iovec; 2]> = (0..self.slots.len())
            .map(|i| {
                let header =
                    libc::iovec { iov_base: self.memory.header_at(i).cast(), iov_len: size_of::<UringHeader>() };
                [header, libc::iovec { iov_base: self.memory.payload_at(i).cast(), iov_len: self.memory.payload }]
            })
            .collect();
        for (i, vector) in vectors.iter().enumerate() {
            let cmd = UringCmd { qid: self.slots[i].queue, ..Default::default() };
            let mut entry = command(abi::URING_REGISTER, &cmd, Some(vector.as_ptr() as u64), i);
            set_len(&mut entry, vector.len() as u32);
            self.push(&entry)?;
        }
        self.push(&wake_by(&self.mailbox.bell))?;
        self.io.submit()?;
        // What is taken completes with its first request, what is refused at once.
        let refused = self.io.completion().find(|c| c.user_data() != WAKE && c.result() < 0);
        refused.map_or(Ok(()), |c| Err(io::Error::from_raw_os_error(-c.result())))
    }

    /// Serves until the mount is gone.
    fn run(&mut self, s: &Serving) -> io::Result<()> {
        let post: Arc<dyn Post> = self.mailbox.clone();
        let (mut came, mut answers) = (Vec::new(), Vec::new());
        while !self.mailbox.stop.load(Ordering::SeqCst) {
            std::mem::swap(&mut answers, &mut *self.mailbox.answers.lock());
            for (slot, answer) in answers.drain(..) {
                self.answer_later(slot as usize, &answer)?;
            }
            let wait = usize::from(self.mailbox.may_sleep());
            match self.io.submit_and_wait(wait) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(e) => return Err(e),
            }
            self.mailbox.sleeps.store(false, Ordering::SeqCst);
            came.extend(self.io.completion().map(|c| (c.user_data(), c.result(), cqueue::more(c.flags()))));
            for (slot, result, more) in came.drain(..) {
                match (slot, result) {
                    (WAKE, _) if more => {}
                    (WAKE, _) => self.push(&wake_by(&self.mailbox.bell))?,
                    (slot, 0) => self.serve(slot as usize, s, &post)?,
                    // The mount is gone; the thread that reads the device learns it, too.
                    (_, r) if -r == libc::ENOTCONN || -r == libc::ECONNABORTED => {}
                    (slot, r) => tracing::error!(slot, "io_uring lost an entry: {}", io::Error::from_raw_os_error(-r)),
                }
            }
        }
        Ok(())
    }

    fn serve(&mut self, slot: usize, s: &Serving, post: &Arc<dyn Post>) -> io::Result<()> {
        let (head, payload) = self.memory.entry(slot);
        let Ok((header, _)) = InHeader::read_from_prefix(head.in_out.as_bytes()) else { return Ok(()) };
        self.slots[slot].unique = header.unique;
        let len = head.entry.payload_size as usize;
        let served = match abi::argument_size(header.opcode) {
            Some(size) => {
                let argument = &head.op_in.as_bytes()[..size];
                let mut request = Request { header, argument, payload, len };
                serve(&s.fs, s.guard, &mut request, &Line::new(post, slot as u64))
            }
            None => Served::Now(Err(Errno::NOSYS)),
        };
        self.note_use(slot, len);
        match served {
            Served::Now(r) => self.commit(slot, r),
            Served::Silent => self.commit(slot, Ok(0)),
            Served::Later => Ok(()),
        }
    }

    fn answer_later(&mut self, slot: usize, answer: &Result<Body, Errno>) -> io::Result<()> {
        let len = answer.as_ref().map_err(|e| *e).map(|body| {
            let bytes = body.bytes();
            self.memory.entry(slot).1[..bytes.len()].copy_from_slice(bytes);
            bytes.len()
        });
        self.commit(slot, len)
    }

    /// Answers the request in an entry and offers the entry for the next; goes out with the next system call.
    fn commit(&mut self, slot: usize, r: Result<usize, Errno>) -> io::Result<()> {
        let (error, size) = r.map_or_else(|e| (-e.raw_os_error(), 0), |n| (0, n));
        self.note_use(slot, size);
        if size <= SMALL && self.slots[slot].large && self.large > LARGE_MAX {
            self.memory.shrink(slot);
            self.slots[slot].large = false;
            self.large -= 1;
        }
        let Slot { queue, unique, .. } = self.slots[slot];
        let (head, _) = self.memory.entry(slot);
        let out = OutHeader { len: (size_of::<OutHeader>() + size) as u32, error, unique };
        head.in_out.as_mut_bytes()[..size_of::<OutHeader>()].copy_from_slice(out.as_bytes());
        head.entry = UringEntry { commit_id: unique, payload_size: size as u32, ..Default::default() };
        let cmd = UringCmd { commit_id: unique, qid: queue, ..Default::default() };
        self.push(&command(abi::URING_COMMIT_AND_FETCH, &cmd, None, slot))
    }

    /// That many bytes of a payload were used.
    fn note_use(&mut self, slot: usize, size: usize) {
        if size > SMALL && !self.slots[slot].large {
            self.slots[slot].large = true;
            self.large += 1;
        }
    }
}

/// A command to the first registered file.
fn command(op: u32, cmd: &UringCmd, addr: Option<u64>, slot: usize) -> Entry128 {
    let mut area = [0; 80];
    area[..size_of::<UringCmd>()].copy_from_slice(cmd.as_bytes());
    opcode::UringCmd80::new(types::Fixed(0), op).cmd(area).addr(addr).build().user_data(slot as u64)
}

/// Sets `len` of an entry (`struct io_uring_sqe`), for which the library has no setter with this opcode.
#[allow(clippy::cast_ptr_alignment, reason = "asserted; 24 is a multiple of 4")]
fn set_len(entry: &mut Entry128, len: u32) {
    const AT: usize = 24;
    const { assert!(size_of::<Entry128>() == 128 && align_of::<Entry128>() >= align_of::<u32>()) };
    // SAFETY: an entry is the kernel's `struct io_uring_sqe` of 128 bytes, with `u32 len` at 24 (linux/io_uring.h).
    unsafe { std::ptr::from_mut(entry).cast::<u8>().add(AT).cast::<u32>().write(len) };
}

/// Completes each time that the bell is rung.
fn wake_by(bell: &OwnedFd) -> Entry128 {
    let poll = opcode::PollAdd::new(types::Fd(bell.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
    Entry128::from(poll.user_data(WAKE))
}

/// The threads of all rings.
pub struct Rings {
    threads: Vec<Thread>,
    /// What `fsys status` says of them.
    pub description: String,
}

struct Thread {
    handle: JoinHandle<()>,
    mailbox: Arc<Mailbox>,
    start: Sender<(Serving, Sender<io::Result<()>>, Sender<io::Result<()>>)>,
}

impl Rings {
    /// Makes the rings and their threads, before anything is mounted.
    ///
    /// # Errors
    /// Why there are none.
    pub fn prepare() -> Result<Self, Reason> {
        let list = |name: &str| {
            let path = format!("/sys/devices/system/cpu/{name}");
            std::fs::read_to_string(&path).map(|text| cpus(&text)).map_err(|e| format!("{path}: {e}"))
        };
        let plan = plan(list("possible")?.len(), &list("online")?);
        let (queues, depth) = (plan.iter().map(|(_, q)| q.len()).sum::<usize>(), plan[0].1[0].1);
        let description = format!("{queues} queue(s), {depth} entries each, {} thread(s)", plan.len());
        let (ready, made) = channel();
        let start = |(cpu, queues)| spawn(cpu, queues, ready.clone());
        let threads = plan.into_iter().map(start).collect::<io::Result<Vec<_>>>().map_err(|e| e.to_string())?;
        let rings = Self { threads, description };
        for _ in &rings.threads {
            let refused = |e: &dyn std::fmt::Display| format!("io_uring cannot be set up: {e}");
            made.recv().map_err(|e| refused(&e))?.map_err(|e| refused(&e))?;
        }
        Ok(rings)
    }

    /// Offers the entries to the kernel and begins to serve; `ended` hears of a ring that cannot go on.
    ///
    /// # Errors
    /// Why the kernel does not take them; the mount cannot be used then.
    pub fn start(&self, serving: &Serving, ended: &Sender<io::Result<()>>) -> Result<(), Reason> {
        let (ready, registered) = channel();
        for t in &self.threads {
            t.start.send((serving.clone(), ready.clone(), ended.clone())).map_err(|_| "a ring's thread ended")?;
        }
        for _ in &self.threads {
            let refused = |e: &dyn std::fmt::Display| format!("the kernel does not take the rings: {e}");
            registered.recv().map_err(|e| refused(&e))?.map_err(|e| refused(&e))?;
        }
        Ok(())
    }

    /// Ends the threads. What is not answered never will be: the mount is gone.
    pub fn stop(self) {
        for Thread { handle, mailbox, start } in self.threads {
            drop(start);
            mailbox.stop();
            if handle.join().is_err() {
                tracing::error!("the thread of a ring panicked");
            }
        }
    }
}

fn spawn(cpu: usize, queues: Vec<(u16, usize)>, ready: Sender<io::Result<()>>) -> io::Result<Thread> {
    let mailbox = Arc::new(Mailbox::new()?);
    let mine = mailbox.clone();
    let (start, go): (Sender<_>, Receiver<(Serving, Sender<io::Result<()>>, Sender<io::Result<()>>)>) = channel();
    let body = move || {
        pin(cpu);
        let mut ring = match Ring::new(&queues, mine) {
            Ok(ring) => ring,
            Err(e) => return ready.send(Err(e)).unwrap_or_default(),
        };
        ready.send(Ok(())).unwrap_or_default();
        let Ok((serving, registered, ended)) = go.recv() else { return };
        let done = ring.register(&serving.device);
        let failed = done.is_err();
        registered.send(done).unwrap_or_default();
        if failed {
            return;
        }
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ring.run(&serving)));
        match run.unwrap_or_else(|_| Err(io::Error::other("the thread of a ring panicked"))) {
            Ok(()) => {}
            // The session ends then; it may have ended already.
            Err(e) => ended.send(Err(e)).unwrap_or_default(),
        }
    };
    let handle = std::thread::Builder::new().name(format!("ring-{cpu}")).spawn(body)?;
    Ok(Thread { handle, mailbox, start })
}

/// Binds this thread to a processor. Where the daemon may not run there (taskset, a container), it serves the queue
/// from elsewhere.
fn pin(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    let allowed = rustix::thread::sched_getaffinity(None).is_ok_and(|all| all.is_set(cpu));
    if !allowed || rustix::thread::sched_setaffinity(None, &set).is_err() {
        tracing::info!(cpu, "the thread of this processor's queue may not be bound to it");
    }
}

/// Processors by number, of a list like `0-3,5`.
fn cpus(list: &str) -> Vec<usize> {
    let range = |part: &str| -> Option<std::ops::RangeInclusive<usize>> {
        let (a, b) = part.split_once('-').unwrap_or((part, part));
        Some(a.parse().ok()?..=b.parse().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

/// For each thread, its processor and its queues: number and entries. The kernel wants a queue for every possible
/// processor; the first thread serves those of processors that are not there.
fn plan(possible: usize, online: &[usize]) -> Vec<(usize, Vec<(u16, usize)>)> {
    let depth = (ENTRIES / possible.max(1)).clamp(DEPTH_MIN, DEPTH_MAX);
    let mut threads: Vec<_> =
        online.iter().filter(|c| **c < possible).map(|c| (*c, vec![(*c as u16, depth)])).collect();
    if threads.is_empty() {
        threads.push((0, vec![(0, depth)]));
    }
    for queue in 0..possible {
        if !threads.iter().any(|(_, q)| q[0].0 == queue as u16) {
            threads[0].1.push((queue as u16, DEPTH_ABSENT));
        }
    }
    threads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_possible_processor_has_a_queue() {
        assert_eq!(cpus("0-2,5\n"), [0, 1, 2, 5]);
        let p = plan(4, &[0, 2]);
        assert_eq!(p, [(0, vec![(0, 256), (1, 4), (3, 4)]), (2, vec![(2, 256)])]);
        assert_eq!(plan(64, &cpus("0-63"))[63], (63, vec![(63, 32)]));
        assert_eq!(plan(1024, &[0])[0].1[0], (0, 16));
    }

    #[test]
    fn the_length_lies_where_the_kernel_reads_it() {
        let mut entry = command(abi::URING_REGISTER, &UringCmd { qid: 7, ..Default::default() }, Some(0x1234), 9);
        set_len(&mut entry, 0xdead_beef);
        // SAFETY: 128 bytes of an initialised entry.
        let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&entry).cast::<u8>(), 128) };
        // Source: struct io_uring_sqe of linux/io_uring.h.
        assert_eq!((bytes[0], &bytes[8..10]), (46, &[1, 0][..]), "opcode and cmd_op");
        assert_eq!(bytes[16..24], 0x1234_u64.to_ne_bytes());
        assert_eq!(bytes[24..28], 0xdead_beef_u32.to_ne_bytes());
        assert_eq!(bytes[32..40], 9_u64.to_ne_bytes());
        assert_eq!(bytes[48 + 16..48 + 18], [7, 0]);
    }

    #[test]
    fn answers_while_the_thread_works_ring_no_bell() {
        let m = Mailbox::new().unwrap();
        let rung = || rustix::io::read(&m.bell, &mut [0; 8]).is_ok();
        m.post(1, Err(Errno::IO));
        assert!(!rung() && !m.may_sleep(), "it looks before it waits");
        m.answers.lock().clear();
        assert!(m.may_sleep());
        m.post(2, Err(Errno::IO));
        m.post(3, Err(Errno::IO));
        assert!(rung() && !rung(), "one bell for both");
        m.answers.lock().clear();
        m.stop();
        assert!(!m.may_sleep());
    }

    #[test]
    fn memory_is_apart_and_can_be_given_back() {
        let mut m = Memory::map(3).unwrap();
        for i in 0..3 {
            let (head, payload) = m.entry(i);
            head.entry.commit_id = i as u64;
            payload.fill(i as u8 + 1);
        }
        m.shrink(1);
        for i in 0..3 {
            let (head, payload) = m.entry(i);
            assert_eq!((head.entry.commit_id, payload[SMALL - 1]), (i as u64, i as u8 + 1));
            assert_eq!(payload[payload.len() - 1], if i == 1 { 0 } else { i as u8 + 1 });
        }
    }
}

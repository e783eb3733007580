//! A disk in memory that remembers what happened to it.
//!
//! Owns the bytes, the record of writes, flushes and marks, and the fault rules. Knows nothing of FUSE, loop
//! devices or filesystems. Three layers, the upper one wins: `base` (what mkfs wrote), `durable` (everything that a
//! crash cannot take), `top` (everything since). A crash state is made by filling `top`; forgetting it is one clear.
//!
//! Invariant: one lock around everything, so the record is the order in which things really happened.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// Unit in which layers are kept.
pub const BLOCK: usize = 4096;

type Layer = HashMap<u64, Box<[u8]>>;

/// One thing that happened, in order.
#[derive(Debug, Clone)]
pub enum Event {
    /// The device took these bytes; they are volatile until the next [`Event::Flush`].
    Write { offset: u64, data: Arc<[u8]> },
    /// The device made everything before this durable.
    Flush,
    /// The test said something: an operation began or a program received its answer.
    Mark,
}

/// Which requests a [`Fault`] applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Read,
    Write,
    Flush,
}

/// Fails the requests of one kind, counted from when the rule was set.
#[derive(Debug, Clone)]
pub struct Fault {
    pub on: Request,
    /// How many requests of this kind pass before the first failure.
    pub skip: u64,
    /// How many fail then; `u64::MAX` for a device that stays broken.
    pub count: u64,
    /// Of the requests in that range, one in this many fails (1 = all), by `seed`.
    pub one_in: u64,
    pub seed: u64,
    pub errno: i32,
}

#[derive(Default)]
struct State {
    base: Vec<u8>,
    durable: Layer,
    top: Layer,
    recording: bool,
    record: Vec<Event>,
    flushes: u64,
    flush_delay: Duration,
    faults: Vec<(Fault, u64)>,
    /// Requests that met a fault: reads, writes, flushes.
    injected: [usize; 3],
}

/// See the module. Cheap to clone: all clones are the same disk.
#[derive(Clone, Default)]
pub struct Disk(Arc<Mutex<State>>);

impl Disk {
    pub fn new(image: Vec<u8>) -> Self {
        assert_eq!(image.len() % BLOCK, 0, "an image is whole blocks");
        Self(Arc::new(Mutex::new(State { base: image, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub fn len(&self) -> u64 {
        self.state().base.len() as u64
    }

    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
        let mut s = self.state();
        s.fault(Request::Read)?;
        let end = (offset + len as u64).min(s.base.len() as u64);
        let mut out = Vec::with_capacity(len);
        let mut at = offset;
        while at < end {
            let (block, from) = (at / BLOCK as u64, (at % BLOCK as u64) as usize);
            let n = (BLOCK - from).min((end - at) as usize);
            out.extend_from_slice(&s.block(block)[from..from + n]);
            at += n as u64;
        }
        Ok(out)
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), i32> {
        let mut s = self.state();
        s.fault(Request::Write)?;
        s.put(offset, data);
        if s.recording {
            s.record.push(Event::Write { offset, data: data.into() });
        }
        Ok(())
    }

    /// Answers how long the device takes for it.
    pub fn flush(&self) -> Result<Duration, i32> {
        let mut s = self.state();
        s.fault(Request::Flush)?;
        s.flushes += 1;
        if s.recording {
            s.record.push(Event::Flush);
        }
        Ok(s.flush_delay)
    }

    /// Requests that met a fault so far: reads, writes, flushes.
    pub fn injected(&self) -> [usize; 3] {
        self.state().injected
    }

    pub fn flushes(&self) -> u64 {
        self.state().flushes
    }

    pub fn set_flush_delay(&self, delay: Duration) {
        self.state().flush_delay = delay;
    }

    pub fn set_faults(&self, faults: Vec<Fault>) {
        self.state().faults = faults.into_iter().map(|f| (f, 0)).collect();
    }

    /// Puts a mark into the record and answers its position.
    pub fn mark(&self) -> usize {
        let mut s = self.state();
        s.record.push(Event::Mark);
        s.record.len() - 1
    }

    /// Everything so far becomes durable, and the record starts here.
    pub fn start_recording(&self) {
        let mut s = self.state();
        s.settle();
        s.record.clear();
        s.recording = true;
    }

    /// The record since [`Disk::start_recording`]; the writes since then are undone.
    pub fn stop_recording(&self) -> Vec<Event> {
        let mut s = self.state();
        s.recording = false;
        std::mem::take(&mut s.record)
    }

    /// Forgets everything that is not durable.
    pub fn forget_volatile(&self) {
        self.state().top.clear();
    }

    /// Back to what mkfs wrote.
    pub fn reset(&self) {
        let mut s = self.state();
        s.top.clear();
        s.durable.clear();
        s.record.clear();
        s.recording = false;
        s.faults.clear();
        s.flush_delay = Duration::ZERO;
    }

    /// Applies a write of the record below the volatile layer, which must be empty.
    pub fn apply_durable(&self, offset: u64, data: &[u8]) {
        let mut s = self.state();
        assert!(s.top.is_empty(), "forget_volatile first");
        s.put(offset, data);
        s.settle();
    }

    /// Applies a write of the record, or a part of it, to the volatile layer.
    pub fn apply_volatile(&self, offset: u64, data: &[u8]) {
        self.state().put(offset, data);
    }

    /// The whole image as it is now, to be kept for a look by hand.
    pub fn image(&self) -> Vec<u8> {
        let s = self.state();
        let mut out = s.base.clone();
        for (n, block) in s.durable.iter().chain(&s.top) {
            let at = *n as usize * BLOCK;
            out[at..at + BLOCK].copy_from_slice(block);
        }
        out
    }
}

impl State {
    fn block(&self, n: u64) -> &[u8] {
        let at = n as usize * BLOCK;
        self.top.get(&n).or_else(|| self.durable.get(&n)).map_or(&self.base[at..at + BLOCK], |b| b)
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let (n, from) = (at / BLOCK as u64, (at % BLOCK as u64) as usize);
            let len = (BLOCK - from).min(rest.len());
            if !self.top.contains_key(&n) {
                let below = self.block(n).into();
                self.top.insert(n, below);
            }
            self.top.get_mut(&n).unwrap()[from..from + len].copy_from_slice(&rest[..len]);
            at += len as u64;
            rest = &rest[len..];
        }
    }

    fn settle(&mut self) {
        let top = std::mem::take(&mut self.top);
        self.durable.extend(top);
    }

    fn fault(&mut self, on: Request) -> Result<(), i32> {
        for (fault, seen) in self.faults.iter_mut().filter(|(f, _)| f.on == on) {
            let n = *seen;
            *seen += 1;
            let due = n >= fault.skip && n - fault.skip < fault.count;
            if due && fastrand::Rng::with_seed(fault.seed ^ n).u64(..fault.one_in.max(1)) == 0 {
                let errno = fault.errno;
                self.injected[on as usize] += 1;
                return Err(errno);
            }
        }
        Ok(())
    }
}

#[test]
fn layers_hide_each_other_and_a_fault_counts() {
    let disk = Disk::new(vec![1; 4 * BLOCK]);
    disk.apply_durable(4000, &[2; 200]);
    disk.apply_volatile(4100, &[3; 10]);
    let seen = disk.read(3999, 300).unwrap();
    assert_eq!((seen[0], seen[1], seen[101], seen[111], seen[201]), (1, 2, 3, 2, 1));
    disk.forget_volatile();
    assert_eq!(disk.read(4100, 1).unwrap(), [2]);
    disk.set_faults(vec![Fault { on: Request::Flush, skip: 1, count: 1, one_in: 1, seed: 0, errno: libc::EIO }]);
    assert_eq!([disk.flush().is_ok(), disk.flush().is_ok(), disk.flush().is_ok()], [true, false, true]);
}

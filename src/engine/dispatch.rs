//! The group dispatcher: a bounded queue of tickets, run in batches, in the order of submission.
//!
//! ```text
//! FUSE threads --ticket--> [queue, bounded] --batch--> dispatcher thread --> flush, publish, sync, answer
//! ```
//!
//! A lone commit runs at once. While a batch runs, others queue up and make the next batch: that alone is group
//! commit. A window opens only when the batch before was shared: those it answered are likely to come back, and a
//! short wait for them saves flushes. It lasts no longer than a barrier did of late, which is what it can save, nor
//! than `window_us`, and ends early when as many are there as last time.
//!
//! An fsync of a directory runs at once: the kernel locks the directory for it, so nobody else can get on there. For the
//! same reason commits of new files wait for one that is likely to come ([`super::turns`]): a barrier that began just
//! before it would hold the lock for the length of two.

use std::collections::VecDeque;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use parking_lot::Mutex;
use rustix::io::Errno;

use super::dir::{Dir, Place};
use super::file::{File, Version};
use crate::backend::Fault;
use crate::config::policy::Method;
use crate::telemetry::Counters;

/// The steps of a commit, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Waiting in the queue.
    Queue,
    /// The data is made durable, or written out ahead of the barrier.
    Data,
    /// The atomic rename, the removal of a name, the copy.
    Publish,
    /// The barrier that makes the names durable.
    SyncParent,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queue => "queue",
            Self::Data => "data flush",
            Self::Publish => "publish",
            Self::SyncParent => "parent sync",
        })
    }
}

/// Why a commit failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// A call failed or panicked.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The dispatcher ended before it could run.
    #[error("the mount is shutting down")]
    Shutdown,
}

/// The failure of one operation of a batch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{failed_at}: {source}")]
pub struct CommitError {
    /// The step that failed.
    pub failed_at: Step,
    /// The last step that was done.
    pub completed: Option<Step>,
    /// Why.
    #[source]
    pub source: Cause,
}

impl CommitError {
    /// A failure of a step whose predecessors are done.
    pub fn at(step: Step, source: impl Into<Cause>) -> Self {
        let completed = match step {
            Step::Queue => None,
            Step::Data => Some(Step::Queue),
            Step::Publish => Some(Step::Data),
            Step::SyncParent => Some(Step::Publish),
        };
        Self { failed_at: step, completed, source: source.into() }
    }

    /// What the waiting system call returns.
    pub fn errno(&self) -> Errno {
        match &self.source {
            Cause::Fault(fault) => fault.errno(),
            Cause::Shutdown => Errno::IO,
        }
    }
}

/// The result of an operation.
pub type Outcome = Result<(), CommitError>;

/// Who waits for an operation. Answered exactly once: a `Done` that is lost answers with a shutdown error.
pub struct Done {
    answer: Option<Box<dyn FnOnce(Outcome) + Send>>,
    /// The thread of the program whose fsync this is.
    by: Option<NonZeroU32>,
}

impl Done {
    /// Calls `f` with the result.
    pub fn new(f: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self { answer: Some(Box::new(f)), by: None }
    }

    /// It is the fsync of a program, by this thread.
    #[must_use]
    pub fn by(mut self, tid: Option<NonZeroU32>) -> Self {
        self.by = tid;
        self
    }

    /// The thread whose fsync it is.
    pub fn whose(&self) -> Option<NonZeroU32> {
        self.by
    }

    /// Nobody waits; failures are logged where they are settled.
    pub fn nobody() -> Self {
        Self { answer: None, by: None }
    }

    /// Whether somebody waits.
    pub fn is_awaited(&self) -> bool {
        self.answer.is_some()
    }

    /// Answers.
    pub fn answer(mut self, r: Outcome) {
        if let Some(f) = self.answer.take() {
            f(r);
        }
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(f) = self.answer.take() {
            f(Err(CommitError::at(Step::Queue, Cause::Shutdown)));
        }
    }
}

/// An operation of the dispatcher.
pub enum Work {
    /// Flush a staged version, publish it, sync its parent.
    Publish {
        /// The file, in phase `Committing`.
        file: Arc<File>,
        /// Its staged version.
        version: Arc<Version>,
        /// Where it is published.
        place: Place,
        /// A committed version exists under that name.
        replaces: bool,
        /// How its data is flushed.
        method: Method,
    },
    /// Write the changes of a file to the journal, flush that, write them into the file.
    Journal {
        /// The file, in phase `Committing`.
        file: Arc<File>,
        /// Its version, with an overlay.
        version: Arc<Version>,
        /// The names that are known.
        names: Vec<Place>,
    },
    /// Make the writes in place of a file durable.
    SyncFile {
        /// The file.
        file: Arc<File>,
        /// Its open version.
        version: Arc<Version>,
        /// fdatasync is enough.
        data_only: bool,
    },
    /// Make the files durable that were written from the journal, and begin it anew.
    Checkpoint,
    /// Make the names of a directory durable.
    SyncDir(Arc<Dir>),
    /// Remove a name and make that durable.
    Unlink {
        /// The name.
        place: Place,
        /// It is a directory's.
        rmdir: bool,
    },
    /// Copy a range between open files, off the FUSE threads.
    Copy(Copy),
}

/// A range to copy.
pub struct Copy {
    /// Source.
    pub src: Arc<Version>,
    /// Offset in the source, bytes.
    pub src_off: u64,
    /// Destination.
    pub dst: Arc<Version>,
    /// Offset in the destination, bytes.
    pub dst_off: u64,
    /// Length, bytes.
    pub len: usize,
    /// Receives the number of bytes copied.
    pub copied: Arc<std::sync::atomic::AtomicUsize>,
}

/// A queued operation and who waits for it.
pub struct Ticket {
    /// What to do.
    pub work: Work,
    /// Who waits.
    pub done: Done,
    /// When it was submitted.
    pub at: Instant,
}

impl Ticket {
    /// Whether it must not be held back for others: for an fsync of a directory the kernel locks that directory, and
    /// those who would share the batch wait for the lock.
    fn is_urgent(&self) -> bool {
        matches!(self.work, Work::SyncDir(_))
    }

    /// The directory and the thread of a program that fsyncs a new file: it may be about to rename that and to sync the
    /// directory.
    pub(super) fn saves_new(&self) -> Option<(&Arc<Dir>, NonZeroU32)> {
        match &self.work {
            Work::Publish { place, replaces: false, .. } => self.done.whose().map(|tid| (&place.dir, tid)),
            _ => None,
        }
    }

    /// Whether another program is probably about to sync the directory of this one.
    fn is_sync_due(&self) -> bool {
        self.saves_new().is_some_and(|(dir, tid)| dir.is_sync_due(tid))
    }
}

/// The way to the dispatcher: a channel of `queue_max` tickets, and behind it, in their order, those that wait for a
/// place there. Each of them is a program that waits for its answer, or an acknowledged save (at most `pending_max`).
pub struct Queue(Mutex<Line>);

struct Line {
    /// `None` once the queue is closed and nothing waits.
    tx: Option<Sender<Ticket>>,
    late: VecDeque<Ticket>,
    closed: bool,
}

/// Makes the queue and the end that [`run`] takes from.
pub fn queue(max: usize) -> (Queue, Receiver<Ticket>) {
    let (tx, rx) = bounded(max.max(1));
    (Queue(Mutex::new(Line { tx: Some(tx), late: VecDeque::new(), closed: false })), rx)
}

impl Queue {
    /// Submits a ticket. `false` when the queue was full and it has to wait. A closed queue answers it.
    pub fn submit(&self, t: Ticket) -> bool {
        let mut line = self.0.lock();
        let sent = match &line.tx {
            Some(tx) if !line.closed && line.late.is_empty() => tx.try_send(t),
            Some(_) if !line.closed => Err(TrySendError::Full(t)),
            _ => Err(TrySendError::Disconnected(t)),
        };
        match sent {
            Ok(()) => true,
            Err(TrySendError::Full(t)) => {
                line.late.push_back(t);
                false
            }
            Err(TrySendError::Disconnected(t)) => {
                // Its answer may submit again.
                drop(line);
                drop(t);
                true
            }
        }
    }

    /// Lets those that wait have the places that became free. Called by the dispatcher after it took a ticket: a ticket
    /// waits only while the channel is full, so none is forgotten.
    fn refill(&self) {
        let mut line = self.0.lock();
        while let Some(t) = line.late.pop_front() {
            match line.tx.as_ref().map(|tx| tx.try_send(t)) {
                Some(Err(TrySendError::Full(t))) => {
                    line.late.push_front(t);
                    break;
                }
                Some(Ok(())) => {}
                // Not while the dispatcher runs.
                Some(Err(TrySendError::Disconnected(_))) | None => {}
            }
        }
        line.end_when_empty();
    }

    /// Takes no more tickets; [`run`] ends after the last one.
    pub fn close(&self) {
        let mut line = self.0.lock();
        line.closed = true;
        line.end_when_empty();
    }
}

impl Line {
    fn end_when_empty(&mut self) {
        if self.closed && self.late.is_empty() {
            self.tx = None;
        }
    }
}

/// The dispatcher thread: takes tickets until the queue is closed and empty, at most `batch_max` at a time. `window`
/// tells how long to wait for others at the moment, once several commit at the same time. Between batches `idle` is
/// called, and again after the time that it gives.
pub fn run(
    queue: &Queue,
    rx: &Receiver<Ticket>,
    batch_max: usize,
    window: impl Fn() -> Duration,
    idle: impl Fn() -> Option<Duration>,
    counters: &Counters,
    mut execute: impl FnMut(Vec<Ticket>),
) {
    let mut shared = 1;
    loop {
        let first = match idle() {
            Some(again) => rx.recv_timeout(again),
            None => rx.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        let first = match first {
            Ok(first) => first,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let mut batch = Vec::with_capacity(shared.max(8));
        batch.push(first);
        scoop(queue, rx, &mut batch, batch_max);
        let urgent = batch.iter().any(Ticket::is_urgent);
        let sync_due = batch.iter().any(Ticket::is_sync_due);
        let target = if sync_due { batch_max } else { shared.min(batch_max) };
        let wait = if !urgent && batch.len() < target { window() } else { Duration::ZERO };
        if !wait.is_zero() {
            Counters::add(&counters.windows, 1);
            if sync_due {
                wait_for_sync(queue, rx, &mut batch, target, wait);
            } else {
                wait_for(queue, rx, &mut batch, target, Instant::now() + wait);
            }
            scoop(queue, rx, &mut batch, batch_max);
        }
        // Who syncs directories between two saves does not change how many save together.
        shared = match batch.iter().filter(|t| !t.is_urgent()).count() {
            0 => shared,
            n => n,
        };
        let n = batch.len() as u64;
        Counters::add(&counters.batches, 1);
        Counters::add(&counters.batched_ops, n);
        Counters::peak(&counters.batch_peak, n);
        execute(batch);
    }
}

/// Takes what is there.
fn scoop(queue: &Queue, rx: &Receiver<Ticket>, batch: &mut Vec<Ticket>, max: usize) {
    loop {
        queue.refill();
        let before = batch.len();
        batch.extend(rx.try_iter().take(max.saturating_sub(before)));
        if batch.len() == before {
            return;
        }
    }
}

/// Waits for the sync of a directory, as long as one is due: it can also come and find nothing to do.
fn wait_for_sync(queue: &Queue, rx: &Receiver<Ticket>, batch: &mut Vec<Ticket>, max: usize, window: Duration) {
    let deadline = Instant::now() + window;
    let look_every = (window / 16).clamp(Duration::from_micros(100), Duration::from_millis(1));
    while batch.len() < max && !batch.iter().any(Ticket::is_urgent) {
        let now = Instant::now();
        if now >= deadline || !batch.iter().any(Ticket::is_sync_due) {
            return;
        }
        wait_for(queue, rx, batch, max, deadline.min(now + look_every));
    }
}

fn wait_for(queue: &Queue, rx: &Receiver<Ticket>, batch: &mut Vec<Ticket>, target: usize, deadline: Instant) {
    while batch.len() < target {
        match rx.recv_deadline(deadline) {
            Ok(t) => {
                let urgent = t.is_urgent();
                batch.push(t);
                if urgent {
                    return;
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
        }
        queue.refill();
    }
}

/// Answers once when a number of results are in.
pub(super) struct Countdown {
    left: AtomicUsize,
    first: Mutex<Outcome>,
    then: Mutex<Option<Box<dyn FnOnce(Outcome) + Send>>>,
}

impl Countdown {
    /// Calls `then` with the first error, if any, after `n` results.
    pub(super) fn new(n: usize, then: impl FnOnce(Outcome) + Send + 'static) -> Arc<Self> {
        Arc::new(Self { left: AtomicUsize::new(n), first: Mutex::new(Ok(())), then: Mutex::new(Some(Box::new(then))) })
    }

    /// One more result.
    pub(super) fn one(&self, r: Outcome) {
        if r.is_err() {
            let mut first = self.first.lock();
            if first.is_ok() {
                *first = r;
            }
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            let then = self.then.lock().take();
            let result = self.first.lock().clone();
            if let Some(then) = then {
                then(result);
            }
        }
    }
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;

//! The product: knows files, versions and commits, nothing of FUSE; can be tested without a mount.
//!
//! ```text
//! Clean --open(O_TRUNC)/create--> Staged --close/fsync/...--> Committing --published--> Clean
//!                                    |                            `--failed--> Clean (old) or Orphan (new)
//!                                    `--unlinked--> Orphan
//! ```
//!
//! In write mode `journal` the uncommitted content lies over the committed inode, which stays: `Staged` is then an
//! overlay ([`overlay`]), and what publishes it is a record in the log.
//!
//! [`Engine`] is all that the layer above may call. It calls `backend` only, and the layer above through
//! [`Observer`].

mod activity;
mod backlog;
mod batch;
mod behind;
mod commit;
pub mod dir;
pub mod dispatch;
mod early;
pub mod file;
pub mod io;
mod journal;
pub mod layout;
mod log;
pub mod names;
pub mod overlay;
mod record;
pub mod recover;
mod replay;
pub mod served;
pub mod stage;
pub mod state;
mod ticker;
mod turns;
mod view;
mod workers;
mod write;

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::io as stdio;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use parking_lot::{Condvar, Mutex, RwLock};
use rustix::io::Errno;

use crate::backend::{Backing, FileId};
use crate::config::Config;
use crate::telemetry::{Counters, FailedVersion, Latency};
use dir::{Dir, DirFds};
use dispatch::Queue;
use file::File;

/// Directory descriptors kept open.
const DIR_FDS: usize = 512;
/// Calls that wait for the device side by side: enough that it can put them in order, or do them at once.
const DEVICE_THREADS: usize = 32;
/// Threads that write large versions to the device.
const PIECE_THREADS: usize = 4;
/// Bytes that wait to be written so; what comes then is written by the thread that serves it, and holds up the others.
const DEFERRED_MAX: u64 = 64 << 20;
/// What eight programs need to come back on two cores, measured; a shorter window splits their batches.
const WINDOW_MIN_US: u64 = 2000;
/// How long a turn lasts at most, in windows: who syncs the directory may find a barrier running and need another, and
/// some dozen programs rename and sync one after the other.
const TURN_WINDOWS: u32 = 8;

/// How long a batch waits for others after barriers of `recent_us`, both in microseconds; `max_us` is the bound.
pub fn window_us(recent_us: u64, max_us: u64) -> u64 {
    recent_us.max(WINDOW_MIN_US).min(max_us)
}
/// Failed versions that status remembers.
const FAILED_KEPT: usize = 100;

/// What the kernel still believes after a commit failed.
#[derive(Debug, Clone)]
pub struct Behind {
    /// The file whose content and attributes went back.
    pub tag: u64,
    /// The name that is gone: directory and name.
    pub name: Option<(u64, OsString)>,
}

/// What the layer above is told. Called with the file's state locked, so it must not call the engine.
pub trait Observer: Send + Sync {
    /// The file now also is the inode `id`.
    fn staged(&self, file: &Arc<File>, id: FileId);
    /// The file is the inode `new` and no more the inode `old`.
    fn published(&self, file: &Arc<File>, old: Option<FileId>, new: FileId);
    /// The file is no more the inode `id`, which is gone.
    fn discarded(&self, file: &Arc<File>, id: FileId);
    /// Nothing of the file or directory with this number is uncommitted.
    fn settled(&self, tag: u64);
    /// Caches of the kernel are stale.
    fn behind(&self, what: Behind);
}

/// The engine of one mount.
pub struct Engine {
    /// The backing directory.
    pub backing: Backing,
    /// What is counted.
    pub counters: Arc<Counters>,
    /// From submission to answer.
    pub commit_latency: Latency,
    /// One barrier.
    pub flush_latency: Latency,
    accounts: activity::Accounts,
    /// A running mean of the barriers, microseconds.
    recent_flush_us: AtomicU64,
    config: RwLock<Arc<Config>>,
    queue: Arc<Queue>,
    workers: workers::Workers,
    /// For reads that wait for the device.
    readers: workers::Workers,
    /// For writes that do.
    writers: workers::Workers,
    /// Large versions are written to the device by these.
    pieces: workers::Workers,
    /// Bytes that those hold.
    deferred: AtomicU64,
    dir_fds: DirFds,
    unsettled: Mutex<HashMap<u64, Arc<File>>>,
    /// The backlog is being worked off, with nobody waiting.
    relieving: AtomicBool,
    /// Files with uncommitted changes that were open when that was last looked at.
    in_use: AtomicUsize,
    /// Held while versions are published, by the dispatcher or early: each of them finishes what it began.
    publishing: Mutex<()>,
    /// Files with descriptors through which the kernel writes unseen.
    unseen: Mutex<HashMap<u64, Arc<File>>>,
    dirty_dirs: Mutex<HashMap<u64, Arc<Dir>>>,
    /// Those of them whose sync is on its way; changed with those locked.
    names_in_flight: AtomicU64,
    observer: OnceLock<Arc<dyn Observer>>,
    read_only: RwLock<Option<String>>,
    failed: Mutex<VecDeque<FailedVersion>>,
    journal: journal::Journal,
    idle_lock: Mutex<()>,
    idle: Condvar,
    turns: turns::Turns,
    started: Instant,
    threads: Mutex<Vec<JoinHandle<()>>>,
    stop: Mutex<Option<Sender<()>>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("backing", &self.backing).finish_non_exhaustive()
    }
}

struct Nobody;
impl Observer for Nobody {
    fn staged(&self, _: &Arc<File>, _: FileId) {}
    fn published(&self, _: &Arc<File>, _: Option<FileId>, _: FileId) {}
    fn discarded(&self, _: &Arc<File>, _: FileId) {}
    fn settled(&self, _: u64) {}
    fn behind(&self, _: Behind) {}
}

impl Engine {
    /// Starts dispatcher, workers and ticker.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(backing: Backing, config: Config) -> stdio::Result<Arc<Self>> {
        let limits = config.limits;
        let (queue, rx) = dispatch::queue(limits.queue_max);
        let queue = Arc::new(queue);
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let engine = Arc::new(Self {
            backing,
            counters: Arc::default(),
            commit_latency: Latency::default(),
            flush_latency: Latency::default(),
            accounts: activity::Accounts::default(),
            recent_flush_us: AtomicU64::new(0),
            config: RwLock::new(Arc::new(config)),
            queue: queue.clone(),
            workers: workers::Workers::start("worker", 2, 2)?,
            readers: workers::Workers::start("reader", 1, DEVICE_THREADS)?,
            writers: workers::Workers::start("writer", 1, DEVICE_THREADS)?,
            pieces: workers::Workers::start("piece", 1, PIECE_THREADS)?,
            deferred: AtomicU64::new(0),
            dir_fds: DirFds::new(DIR_FDS),
            unsettled: Mutex::default(),
            relieving: AtomicBool::new(false),
            in_use: AtomicUsize::new(0),
            publishing: Mutex::default(),
            unseen: Mutex::default(),
            dirty_dirs: Mutex::default(),
            names_in_flight: AtomicU64::new(0),
            observer: OnceLock::new(),
            read_only: RwLock::new(None),
            failed: Mutex::default(),
            journal: journal::Journal::default(),
            idle_lock: Mutex::new(()),
            idle: Condvar::new(),
            turns: turns::Turns::default(),
            started: Instant::now(),
            threads: Mutex::default(),
            stop: Mutex::new(Some(stop)),
        });
        let me = engine.clone();
        let dispatcher = std::thread::Builder::new().name("dispatcher".into()).spawn(move || {
            let batch_max = limits.batch_max.max(1);
            let turns = || me.turns.end_overdue(me.turn_length());
            dispatch::run(&queue, &rx, batch_max, || me.window(), turns, &me.counters, |batch| me.run_batch(batch));
            me.turns.end_all();
        })?;
        let me = engine.clone();
        let ticker = std::thread::Builder::new().name("ticker".into()).spawn(move || me.tick_until(&stopped))?;
        engine.threads.lock().extend([dispatcher, ticker]);
        Ok(engine)
    }

    /// Sets who is told of changes; once.
    pub fn observe(&self, who: Arc<dyn Observer>) {
        if self.observer.set(who).is_err() {
            tracing::error!("the engine has an observer already");
        }
    }

    fn observer(&self) -> &dyn Observer {
        self.observer.get().map_or(&Nobody, |o| o.as_ref())
    }

    /// How long a batch may wait for others at the moment: as long as a barrier took of late, but long enough for a
    /// few programs to be scheduled, and at most `window_us`.
    fn window(&self) -> Duration {
        let recent = self.recent_flush_us.load(Ordering::Relaxed);
        Duration::from_micros(window_us(recent, self.config().limits.window_us))
    }

    /// How long a turn ([`turns`]) lasts at most.
    fn turn_length(&self) -> Duration {
        self.window() * TURN_WINDOWS
    }

    /// Records one barrier.
    fn flushed(&self, took: Duration) {
        self.flush_latency.record(took);
        let (old, new) = (self.recent_flush_us.load(Ordering::Relaxed), took.as_micros() as u64);
        // Only the dispatcher writes it. One eighth of the newest: a single slow flush does not set the pace.
        self.recent_flush_us.store(if old == 0 { new } else { (7 * old + new) / 8 }, Ordering::Relaxed);
    }

    /// The configuration that holds now.
    pub fn config(&self) -> Arc<Config> {
        self.config.read().clone()
    }

    /// Takes another configuration. What is open keeps the policy of its open; `batch_max` and `queue_max` stay.
    pub fn configure(&self, config: Config) {
        *self.config.write() = Arc::new(config);
    }

    /// A descriptor of a directory.
    pub fn dir_fd(&self, dir: &Arc<Dir>) -> Result<Arc<OwnedFd>, Errno> {
        self.dir_fds.get(&self.backing, dir)
    }

    /// Milliseconds since the start, at least 1.
    pub fn now_ms(&self) -> u64 {
        (self.started.elapsed().as_millis() as u64).max(1)
    }

    /// `EROFS` once the device failed a flush.
    pub fn writable(&self) -> Result<(), Errno> {
        if self.read_only.read().is_some() { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// Why the mount is read-only, if it is.
    pub fn read_only_reason(&self) -> Option<String> {
        self.read_only.read().clone()
    }

    /// Turns the mount read-only for good: the device does not keep what it acknowledges.
    pub fn poison(&self, why: &str) {
        let mut reason = self.read_only.write();
        if reason.is_none() {
            tracing::error!(
                cause = why,
                "the mount is read-only now; everything acknowledged before is as durable as the device kept it, \
                 nothing is acknowledged from here on; check the device and its file system, then mount again"
            );
            *reason = Some(why.to_owned());
        }
    }

    /// Remembers a failed version for the status.
    fn note_failed(&self, path: String, kept_as: String, e: &dispatch::CommitError) {
        let (failed_at, error) = (e.failed_at.to_string(), e.source.to_string());
        let mut failed = self.failed.lock();
        if failed.len() == FAILED_KEPT {
            failed.pop_front();
        }
        failed.push_back(FailedVersion { path, kept_as, failed_at, error });
    }

    /// A version is in place under its name, but the sync of its directory failed.
    fn published_not_durable(&self, place: &dir::Place, e: &dispatch::CommitError) {
        Counters::add(&self.counters.commit_failures, 1);
        let path = place.path().display().to_string();
        tracing::error!(
            %path, step = %e.failed_at, cause = %e.source,
            "saved but not known to be durable: after a crash the file is old or new; save again"
        );
        self.note_failed(path, String::new(), e);
    }

    /// The failed versions, newest last.
    pub fn failed_versions(&self) -> Vec<FailedVersion> {
        self.failed.lock().iter().cloned().collect()
    }

    /// Runs a call again on a worker thread.
    pub fn run_later(&self, work: file::Parked) {
        self.workers.run(work);
    }

    /// Runs a read that waits for the device on a thread that may.
    pub fn read_later(&self, work: file::Parked) {
        self.readers.run(work);
    }

    /// Runs `write` with a copy of the data on a thread that may wait for the device. Gives it back when too much waits.
    pub fn write_later<F>(self: &Arc<Self>, data: &[u8], write: F) -> Option<F>
    where
        F: FnOnce(&[u8]) + Send + 'static,
    {
        let len = data.len() as u64;
        if self.deferred.fetch_add(len, Ordering::AcqRel) + len > DEFERRED_MAX {
            self.deferred.fetch_sub(len, Ordering::AcqRel);
            return Some(write);
        }
        let (me, data) = (self.clone(), data.to_vec());
        self.writers.run(Box::new(move || {
            write(&data);
            me.deferred.fetch_sub(len, Ordering::AcqRel);
        }));
        None
    }
}

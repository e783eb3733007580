//! What the daemon counts, and the status that it shows. A leaf: everything may count.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Monotonic counters since the mount, and a few gauges.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: AtomicU64,)* }
        /// The counters at one moment.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct CounterValues { $($(#[$doc])* pub $name: u64,)* }
        impl Counters {
            /// A copy of all values (each one atomic, not all together).
            pub fn values(&self) -> CounterValues { CounterValues { $($name: self.$name.load(Relaxed),)* } }
        }
    };
}

counters! {
    /// Versions published by an atomic replace.
    commits,
    /// Commits that failed; the previous version stands.
    commit_failures,
    /// fsyncs of files written in place.
    in_place_syncs,
    /// Directory syncs asked for by programs (fsync of a directory, level `always`).
    dir_sync_requests,
    /// Batches that the dispatcher ran.
    batches,
    /// Operations in those batches.
    batched_ops,
    /// Largest batch so far.
    batch_peak,
    /// Times that a window was opened to wait for others.
    windows,
    /// Barrier calls issued to the kernel: fsync, fdatasync, syncfs.
    flush_calls,
    /// Times that a submission found the queue full and had to wait.
    queue_full_waits,
    /// Staged versions begun.
    stages,
    /// Bytes now held by uncommitted staged versions (gauge).
    staged_bytes,
    /// Staged versions now uncommitted (gauge).
    staged_now,
    /// Commits now queued or running (gauge).
    in_flight,
    /// Versions that could not be staged cheaply and went on in place.
    in_place_fallbacks,
    /// Writes of method `direct` that went through the page cache: unaligned, or `O_DIRECT` was refused.
    direct_fallbacks,
    /// Writes made with `O_DIRECT`.
    direct_writes,
    /// Opens of files that the kernel serves itself (passthrough).
    passthrough_opens,
    /// Files that it could have served by policy, and did not.
    passthrough_fallbacks,
    /// Changes behind the mount that the watch told of.
    outside_changes,
    /// Directories that could not be watched: names in them are kept for `cache_ms`.
    unwatched_dirs,
    /// Times that the watch lost events, and all caches were taken back.
    watch_overflows,
    /// Panics contained in an operation.
    panics,
}

impl Counters {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Relaxed);
    }
    /// Takes from a gauge.
    pub fn sub(counter: &AtomicU64, n: u64) {
        counter.fetch_sub(n, Relaxed);
    }
    /// Raises a peak.
    pub fn peak(counter: &AtomicU64, n: u64) {
        counter.fetch_max(n, Relaxed);
    }
}

/// A latency histogram in microseconds, 1 us to 1 h with two significant digits.
#[derive(Debug)]
pub struct Latency(Mutex<Histogram<u64>>);

/// Summary of a [`Latency`], in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Samples.
    pub count: u64,
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Largest.
    pub max_us: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Self(Mutex::new(
            Histogram::new_with_bounds(1, 3_600_000_000, 2)
                .unwrap_or_else(|_| unreachable!("constant bounds are valid")),
        ))
    }
}

impl Latency {
    /// Records one duration; longer than an hour counts as an hour.
    pub fn record(&self, d: std::time::Duration) {
        self.0.lock().saturating_record(u64::try_from(d.as_micros()).unwrap_or(u64::MAX).max(1));
    }
    /// Median, tail and extremes so far.
    pub fn summary(&self) -> LatencySummary {
        let h = self.0.lock();
        LatencySummary {
            count: h.len(),
            p50_us: h.value_at_quantile(0.5),
            p99_us: h.value_at_quantile(0.99),
            max_us: h.max(),
        }
    }
}

/// A version whose commit failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedVersion {
    /// Path in the mount.
    pub path: String,
    /// Name under `.fsys/failed/`, empty when it could not be kept (the log says why).
    pub kept_as: String,
    /// The step that failed.
    pub failed_at: String,
    /// The system's words.
    pub error: String,
}

/// What `fsys status` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// `healthy`, `degraded` (versions failed) or `read-only` (a device flush failed).
    pub health: String,
    /// Why it is not healthy, in words for people; empty when it is.
    pub reason: String,
    /// The backing directory.
    pub backing: String,
    /// The mount point.
    pub mountpoint: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Version of the program.
    pub version: String,
    /// File system type of the backing directory.
    pub filesystem: String,
    /// Which barriers commits use there, and why.
    pub flush_strategy: String,
    /// True where files can be cloned (reflink).
    pub reflink: bool,
    /// Policy outside all rules.
    pub policy: crate::config::policy::Policy,
    /// Number of policy rules.
    pub rules: usize,
    /// Limits and base policy, with the source of each value (`Config::settings`).
    #[serde(default)]
    pub settings: Vec<crate::config::keys::Setting>,
    /// Age of the oldest uncommitted write, in milliseconds; 0 when all is committed.
    pub oldest_uncommitted_ms: u64,
    /// Coalescing: operations per batch since the mount, times 100.
    pub ops_per_batch_x100: u64,
    /// From submission to answer.
    pub commit_latency: LatencySummary,
    /// Time of one barrier (last step of a batch).
    pub flush_latency: LatencySummary,
    /// Why the kernel serves no file itself; empty when it serves those that are always written in place.
    #[serde(default)]
    pub no_passthrough: String,
    /// Why nobody tells of changes behind the mount; empty when the backing directory is watched.
    #[serde(default)]
    pub no_watch: String,
    /// Counters.
    pub counters: CounterValues,
    /// Failed versions, newest last, at most 100.
    pub failed: Vec<FailedVersion>,
    /// Inodes that the kernel knows.
    pub inodes: u64,
    /// Open file handles.
    pub handles: u64,
}

/// What `fsys get PATH` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathReport {
    /// Path in the mount.
    pub path: String,
    /// The policy that holds.
    pub policy: crate::config::policy::Policy,
    /// For each value of the policy: its name and where it comes from.
    pub origin: Vec<(String, String)>,
    /// `clean`, `staged`, `committing`, `orphan` or, for what is no regular file, `not a file`.
    pub state: String,
    /// Size in bytes, as programs see it.
    pub size: u64,
    /// Age of the oldest uncommitted write, in milliseconds; 0 when committed.
    pub uncommitted_ms: u64,
}

//! What the daemon counts, and the status that it shows. A leaf: everything may count.

pub mod activity;
pub mod prometheus;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident),* $(,)?) => {
        /// Monotonic counters since the mount, and a few gauges.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[doc = $doc])* pub $name: AtomicU64,)* }
        /// The counters at one moment.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct CounterValues { $($(#[doc = $doc])* pub $name: u64,)* }
        impl Counters {
            /// A copy of all values (each one atomic, not all together).
            pub fn values(&self) -> CounterValues { CounterValues { $($name: self.$name.load(Relaxed),)* } }
        }
        impl CounterValues {
            /// Each value with its name and what it counts.
            pub fn named(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((stringify!($name), concat!($($doc),*).trim_ascii(), self.$name),)*]
            }
        }
    };
}

counters! {
    /// Versions published by an atomic replace.
    commits,
    /// Of these, published ahead of the directory's sync, since nobody waited (levels fsync and relaxed).
    early_publications,
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
    /// Reads that waited for the device, on threads of their own.
    device_reads,
    /// Writes made on threads of their own, because writes waited for the device.
    device_writes,
    /// Pieces of large new versions written to the device before these were flushed.
    pieces,
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
    /// Writes refused with ENOSPC at the bound on staged bytes.
    staging_full,
    /// Commits that took longer than slow_commit_ms.
    slow_commits,
    /// Updates committed through the journal, write mode `journal`.
    journal_commits,
    /// Bytes now in the journal, which a recovery would read (gauge).
    journal_bytes,
    /// Times that the files in the journal were flushed and it began anew.
    checkpoints,
}

/// The counters that can fall.
pub const GAUGES: [&str; 5] = ["batch_peak", "staged_bytes", "staged_now", "in_flight", "journal_bytes"];

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

/// A histogram, of latencies in microseconds: 1 us to 1 h with two significant digits.
#[derive(Debug)]
pub struct Latency(Mutex<Samples>);

#[derive(Debug)]
struct Samples {
    histogram: Histogram<u64>,
    sum: u64,
}

/// How many samples were at most each of some bounds, in the unit of the samples.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buckets {
    /// Bound, and samples up to it, those of the lower bounds included.
    pub upto: Vec<(u64, u64)>,
    /// All samples.
    pub count: u64,
    /// Their sum.
    pub sum: u64,
}

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
        let histogram = Histogram::new_with_bounds(1, 3_600_000_000, 2)
            .unwrap_or_else(|_| unreachable!("constant bounds are valid"));
        Self(Mutex::new(Samples { histogram, sum: 0 }))
    }
}

impl Latency {
    /// Records one duration; longer than an hour counts as an hour.
    pub fn record(&self, d: std::time::Duration) {
        self.record_value(u64::try_from(d.as_micros()).unwrap_or(u64::MAX));
    }
    /// Records one sample.
    pub fn record_value(&self, value: u64) {
        let mut s = self.0.lock();
        s.histogram.saturating_record(value.max(1));
        s.sum = s.sum.saturating_add(value);
    }
    /// The samples by `bounds`, which ascend. Exact to two significant digits; a sample near a bound counts above it.
    pub fn buckets(&self, bounds: &[u64]) -> Buckets {
        let s = self.0.lock();
        let mut upto: Vec<_> = bounds.iter().map(|b| (*b, 0)).collect();
        for step in s.histogram.iter_recorded() {
            let n = step.count_since_last_iteration();
            let first = upto.partition_point(|(bound, _)| *bound < step.value_iterated_to());
            upto[first..].iter_mut().for_each(|(_, count)| *count += n);
        }
        Buckets { upto, count: s.histogram.len(), sum: s.sum }
    }
    /// Median, tail and extremes so far.
    pub fn summary(&self) -> LatencySummary {
        let h = &self.0.lock().histogram;
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

/// Where the configuration comes from, and what was changed since the mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// The configuration file, if the mount has one.
    pub file: Option<String>,
    /// When it was read last, in seconds since 1970.
    pub read_at: u64,
    /// Why the last attempt to read it again changed nothing.
    pub error: Option<String>,
    /// Values in the file that take effect with the next mount.
    pub next_mount: Vec<crate::config::keys::Setting>,
    /// Changes at run time, oldest first.
    pub changes: Vec<crate::config::runtime::Change>,
}

/// A file with changes that are not durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uncommitted {
    /// Path in the mount; empty when no name is known.
    pub path: String,
    /// As in [`PathReport::state`].
    pub state: String,
    /// Size of the staged version; 0 for what is written in place.
    pub bytes: u64,
    /// Age of the oldest change, in milliseconds.
    pub age_ms: u64,
    /// Since the last write, in milliseconds.
    pub idle_ms: u64,
    /// Descriptors that may write.
    pub writers: u32,
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
    /// How requests come from the kernel; with the reason when it is not the fastest way.
    pub transport: String,
    /// File system type of the backing directory.
    pub filesystem: String,
    /// Its device, as mountinfo names it, and its number.
    #[serde(default)]
    pub device: String,
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
    /// Its file and what was changed at run time.
    #[serde(default)]
    pub config: ConfigState,
    /// Age of the oldest uncommitted write, in milliseconds; 0 when all is committed.
    pub oldest_uncommitted_ms: u64,
    /// Files with changes that are not durable, the oldest first, at most 20.
    #[serde(default)]
    pub uncommitted: Vec<Uncommitted>,
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
    /// When the daemon started, in seconds since 1970.
    #[serde(default)]
    pub started_at: u64,
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
    /// `committed`, `written in place, not synced`, `staged`, `committing`, `orphan` (no name leads to it) or, for what
    /// is no regular file, `not a file`.
    pub state: String,
    /// Size in bytes, as programs see it.
    pub size: u64,
    /// What is not durable.
    pub uncommitted: Option<Uncommitted>,
    /// When this mount published it last, in seconds since 1970; `None`: not since the mount.
    pub committed_at: Option<i64>,
    /// Descriptors that programs have open.
    pub opens: u32,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn buckets_count_each_sample_once_and_never_too_low() {
        let l = Latency::default();
        [1, 10, 11, 999, 1000, 5_000_000].iter().for_each(|us| l.record(Duration::from_micros(*us)));
        let b = l.buckets(&[10, 1000, 1_000_000]);
        assert_eq!((b.count, b.sum), (6, 5_002_021));
        assert_eq!(b.upto[0], (10, 2));
        // 1000 lies in a step of the histogram that ends at 1003.
        assert_eq!((b.upto[1].1, b.upto[2].1), (4, 5));
    }

    #[test]
    fn every_counter_has_a_name_and_words() {
        let all = Counters::default().values().named();
        assert!(all.iter().all(|(name, help, _)| !name.is_empty() && help.ends_with('.')), "{all:?}");
        assert!(GAUGES.iter().all(|g| all.iter().any(|(name, _, _)| name == g)));
    }
}

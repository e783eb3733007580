//! The configuration: plain data, handed down.
//!
//! Values come from, later wins: the built-in defaults, the configuration file ([`mod@file`]), the command line
//! ([`options`]), changes at run time ([`runtime`]). All set a value by its name ([`keys`]), and [`Config::sources`]
//! remembers where it came from.

pub mod doc;
pub mod file;
pub mod keys;
pub mod options;
pub mod policy;
pub mod runtime;
pub mod service;

use std::collections::BTreeMap;
use std::time::Duration;

use policy::Policies;
use service::Service;

/// Bounds and times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bound, in microseconds, on how long a batch waits for further commits once several come at the same time; it
    /// never waits longer than a flush took of late.
    pub window_us: u64,
    /// Largest number of operations in a batch.
    pub batch_max: usize,
    /// Commits that may be queued; at the bound, writers wait.
    pub queue_max: usize,
    /// Bound on the age, in milliseconds, of acknowledged work that is not yet durable.
    pub commit_interval_ms: u64,
    /// Staged versions that may be closed and not yet committed (levels `fsync`, `relaxed`); at the bound
    /// they are committed at once.
    pub pending_max: usize,
    /// Bytes that uncommitted versions may hold together; writes beyond get ENOSPC. 0: the file system's own limit.
    pub staging_max_bytes: u64,
    /// How long the kernel may keep names and attributes, in milliseconds, where no watch tells of changes by others.
    pub cache_ms: u64,
    /// Threads that serve the kernel's requests.
    pub threads: usize,
    /// A commit that takes longer, in milliseconds, is logged with the step that took the time; 0: none is.
    pub slow_commit_ms: u64,
    /// Whether the kernel may serve files that are always written in place itself.
    pub passthrough: bool,
    /// Whether the backing directory is watched for changes by others, so that the kernel may keep names and
    /// attributes longer than [`Limits::cache_ms`].
    pub watch_backing: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            window_us: 10_000,
            batch_max: 256,
            queue_max: 1024,
            commit_interval_ms: 5000,
            pending_max: 512,
            staging_max_bytes: 0,
            cache_ms: 1000,
            threads: default_threads(),
            slow_commit_ms: 1000,
            passthrough: true,
            watch_backing: true,
        }
    }
}

/// Half of the processors: the programs need the other half, and on two a single thread, which stays on its core with
/// its caches, served eight writers 25 % faster than two (they take turns). No thread ever waits for a flush.
fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| (n.get() / 2).clamp(1, 8))
}

impl Limits {
    /// [`Limits::commit_interval_ms`] as a duration.
    pub fn commit_interval(&self) -> Duration {
        Duration::from_millis(self.commit_interval_ms)
    }
}

/// Everything that file and command line decide about how the mount behaves.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Policies by path.
    pub policies: Policies,
    /// Bounds and times.
    pub limits: Limits,
    /// What concerns the daemon itself.
    pub service: Service,
    /// Where the limits and the values of the base policy come from, by name; what is not here is a built-in
    /// default. A rule carries its own source.
    pub sources: BTreeMap<&'static str, String>,
}

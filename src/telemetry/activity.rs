//! What happened of late: plain data for `fsys top`.

use serde::{Deserialize, Serialize};

use super::{Buckets, Status};

/// The histograms, since the mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histograms {
    /// One barrier, microseconds.
    pub flush: Buckets,
    /// A save, from submission to answer, by durability, microseconds.
    pub commit: Vec<(String, Buckets)>,
    /// Operations in a batch.
    pub batch: Buckets,
}

/// A file that was committed of late.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileActivity {
    /// Path in the mount.
    pub path: String,
    /// Commits.
    pub commits: u64,
    /// Mean time from submission to answer, microseconds.
    pub mean_us: u64,
    /// Longest.
    pub max_us: u64,
    /// The process that wrote last.
    pub process: Process,
}

/// A process whose files were committed of late.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessActivity {
    /// Which.
    pub process: Process,
    /// Commits.
    pub commits: u64,
    /// Mean time from submission to answer, microseconds.
    pub mean_us: u64,
    /// Longest.
    pub max_us: u64,
}

/// One of the slowest commits of late.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlowCommit {
    /// Path in the mount.
    pub path: String,
    /// From submission to answer, microseconds.
    pub took_us: u64,
    /// The step that took most of it.
    pub step: String,
    /// How long that step took, microseconds.
    pub step_us: u64,
    /// How long ago, milliseconds.
    pub ago_ms: u64,
    /// The process that wrote last.
    pub process: Process,
}

/// A process as it was when it was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Process {
    /// Process id; 0: the kernel's write-back, or not known.
    pub pid: u32,
    /// Its name (`/proc/PID/comm`); empty when it was gone before it could be looked at.
    pub command: String,
}

/// The busiest and slowest of late. Counts of rare ones can be too low where more are active than are remembered.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// How far back it reaches, milliseconds.
    pub window_ms: u64,
    /// Busiest first.
    pub files: Vec<FileActivity>,
    /// Busiest first.
    pub processes: Vec<ProcessActivity>,
    /// Slowest first.
    pub slow: Vec<SlowCommit>,
}

/// What `fsys top` asks for again and again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// When, in milliseconds since the daemon started.
    pub at_ms: u64,
    /// The status.
    pub status: Status,
    /// The histograms.
    pub histograms: Histograms,
    /// The busiest and slowest.
    pub activity: Activity,
}

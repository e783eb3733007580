//! A volume without a file system, for the tests of the life cycle.

use std::path::Path;
use std::time::Duration;

use super::volume::{DrainError, Volume};
use crate::config::policy::Policy;
use crate::error::Errno;
use crate::telemetry::{CounterValues, LatencySummary, PathReport, Status};

/// Healthy; a drain of less than 10 ms times out; `no` does not exist.
pub struct Fake;

/// A status with nothing in it.
pub fn status() -> Status {
    Status {
        health: "healthy".into(),
        reason: String::new(),
        backing: "/data".into(),
        mountpoint: "/mnt".into(),
        pid: 1,
        version: "0".into(),
        filesystem: "ext4".into(),
        flush_strategy: String::new(),
        reflink: false,
        policy: Policy::default(),
        rules: 0,
        settings: Vec::new(),
        oldest_uncommitted_ms: 0,
        ops_per_batch_x100: 0,
        commit_latency: LatencySummary::default(),
        flush_latency: LatencySummary::default(),
        no_passthrough: String::new(),
        no_watch: String::new(),
        counters: CounterValues::default(),
        failed: Vec::new(),
        inodes: 0,
        handles: 0,
    }
}

impl Volume for Fake {
    fn status(&self) -> Status {
        status()
    }
    fn report(&self, relative: &Path) -> Result<PathReport, Errno> {
        if relative == Path::new("no") {
            return Err(Errno::NOENT);
        }
        Ok(PathReport {
            path: relative.to_string_lossy().into_owned(),
            policy: Policy::default(),
            origin: Vec::new(),
            state: "clean".into(),
            size: 0,
            uncommitted_ms: 0,
        })
    }
    fn drain(&self, timeout: Duration) -> Result<(), DrainError> {
        if timeout < Duration::from_millis(10) { Err(DrainError::TimedOut { left: 3 }) } else { Ok(()) }
    }
    fn shutdown(&self) {}
}

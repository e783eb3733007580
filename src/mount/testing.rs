//! A volume without a file system, for the tests of the life cycle.

use std::path::Path;
use std::time::Duration;

use super::volume::{DrainError, Volume};
use crate::config::Config;
use crate::config::policy::Policy;
use crate::error::Errno;
use crate::telemetry::activity::{Activity, Histograms};
use crate::telemetry::{ConfigState, CounterValues, LatencySummary, PathReport, Status};

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
        transport: "fuser".into(),
        filesystem: "ext4".into(),
        flush_strategy: String::new(),
        reflink: false,
        policy: Policy::default(),
        rules: 0,
        settings: Vec::new(),
        config: ConfigState::default(),
        device: String::new(),
        oldest_uncommitted_ms: 0,
        uncommitted: Vec::new(),
        ops_per_batch_x100: 0,
        commit_latency: LatencySummary::default(),
        flush_latency: LatencySummary::default(),
        no_passthrough: String::new(),
        no_watch: String::new(),
        counters: CounterValues::default(),
        failed: Vec::new(),
        inodes: 0,
        handles: 0,
        started_at: 0,
    }
}

impl Volume for Fake {
    fn status(&self) -> Status {
        status()
    }
    fn histograms(&self) -> Histograms {
        Histograms::default()
    }
    fn activity(&self) -> Activity {
        Activity::default()
    }
    fn configure(&self, _: Config) {}
    fn report(&self, relative: &Path) -> Result<PathReport, Errno> {
        if relative == Path::new("no") {
            return Err(Errno::NOENT);
        }
        Ok(PathReport {
            path: relative.to_string_lossy().into_owned(),
            policy: Policy::default(),
            origin: Vec::new(),
            state: "committed".into(),
            size: 0,
            uncommitted: None,
            committed_at: None,
            opens: 0,
        })
    }
    fn drain(&self, timeout: Duration, left: &mut dyn FnMut(u64) -> bool) -> Result<(), DrainError> {
        left(3);
        if timeout < Duration::from_millis(10) { Err(DrainError::TimedOut { left: 3 }) } else { Ok(()) }
    }
    fn shutdown(&self) {}
}

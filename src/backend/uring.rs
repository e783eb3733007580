//! Many fsyncs at once: through io_uring, whose kernel workers run them side by side, or through threads where the
//! kernel offers no ring. Side by side matters: the kernel lets all of them share one journal commit and its flushes,
//! which one after another they would each pay.

pub mod writes;

use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, opcode, types};
use parking_lot::Mutex;
use rustix::io::Errno;

/// Entries of the ring: a larger group goes in slices.
const DEPTH: usize = 64;

/// One sync to do.
#[derive(Debug, Clone, Copy)]
pub struct SyncJob<'a> {
    /// The file or directory.
    pub fd: BorrowedFd<'a>,
    /// fdatasync instead of fsync.
    pub data_only: bool,
}

impl SyncJob<'_> {
    fn run(&self) -> Result<(), Errno> {
        if self.data_only { rustix::fs::fdatasync(self.fd) } else { rustix::fs::fsync(self.fd) }
    }
}

/// Runs groups of syncs in parallel.
pub struct Flusher {
    ring: Mutex<Option<IoUring>>,
}

impl Flusher {
    /// With a ring where the kernel allows it.
    pub fn new() -> Self {
        let ring = IoUring::new(DEPTH as u32).ok().filter(|r| {
            let mut probe = io_uring::Probe::new();
            let known = r.submitter().register_probe(&mut probe).is_ok() && probe.is_supported(opcode::Fsync::CODE);
            // Regular files are served by the bounded workers, four per CPU unless raised.
            known && r.submitter().register_iowq_max_workers(&mut [DEPTH as u32, DEPTH as u32]).is_ok()
        });
        Self { ring: Mutex::new(ring) }
    }

    /// Without a ring, whatever the kernel offers.
    pub fn threads_only() -> Self {
        Self { ring: Mutex::new(None) }
    }

    /// Whether a ring is in use.
    pub fn has_ring(&self) -> bool {
        self.ring.lock().is_some()
    }

    /// Runs all jobs side by side; result `i` belongs to job `i`.
    pub fn sync_all(&self, jobs: &[SyncJob<'_>]) -> Vec<Result<(), Errno>> {
        match (jobs, self.ring.lock().as_mut()) {
            ([], _) => Vec::new(),
            ([one], _) => vec![one.run()],
            (_, Some(ring)) => jobs.chunks(DEPTH).flat_map(|c| ring_sync(ring, c)).collect(),
            (_, None) => jobs.chunks(DEPTH).flat_map(thread_sync).collect(),
        }
    }
}

impl Default for Flusher {
    fn default() -> Self {
        Self::new()
    }
}

fn thread_sync(jobs: &[SyncJob<'_>]) -> Vec<Result<(), Errno>> {
    std::thread::scope(|s| {
        let running: Vec<_> = jobs.iter().map(|j| s.spawn(|| j.run())).collect();
        running.into_iter().map(|t| t.join().unwrap_or(Err(Errno::IO))).collect()
    })
}

/// At most [`DEPTH`] jobs. Waits for every one of them, whatever fails, since each borrows a descriptor.
fn ring_sync(ring: &mut IoUring, jobs: &[SyncJob<'_>]) -> Vec<Result<(), Errno>> {
    let mut results: Vec<Option<Result<(), Errno>>> = vec![None; jobs.len()];
    let mut queued = 0;
    for (i, job) in jobs.iter().enumerate() {
        let flags = if job.data_only { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
        let entry = opcode::Fsync::new(types::Fd(job.fd.as_raw_fd())).flags(flags).build().user_data(i as u64);
        // SAFETY: the entry holds no pointer, and its descriptor is borrowed until all completions are in.
        if unsafe { ring.submission().push(&entry) }.is_ok() {
            queued += 1;
        }
    }
    let mut done = 0;
    while done < queued {
        if let Err(e) = ring.submit_and_wait(queued - done)
            && e.raw_os_error() != Some(libc::EINTR)
            && e.raw_os_error() != Some(libc::EAGAIN)
            && e.raw_os_error() != Some(libc::EBUSY)
        {
            // Nothing else can be waited for: what has no answer is not durable (`unwrap_or` below).
            tracing::error!(error = %e, "io_uring: submit failed");
            break;
        }
        for c in ring.completion() {
            if let Some(slot) = results.get_mut(c.user_data() as usize) {
                *slot = Some(if c.result() < 0 { Err(Errno::from_raw_os_error(-c.result())) } else { Ok(()) });
                done += 1;
            }
        }
    }
    results.into_iter().map(|r| r.unwrap_or(Err(Errno::IO))).collect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn each_job_gets_its_own_result() {
        let good = tempfile::tempfile().unwrap();
        let (pipe, _w) = rustix::pipe::pipe().unwrap();
        let jobs: Vec<_> = (0..150)
            .map(|i| SyncJob { fd: if i % 7 == 0 { pipe.as_fd() } else { good.as_fd() }, data_only: i % 2 == 0 })
            .collect();
        let flusher = Flusher::new();
        for results in [flusher.sync_all(&jobs), jobs.chunks(DEPTH).flat_map(thread_sync).collect()] {
            assert_eq!(results.len(), 150);
            for (i, r) in results.iter().enumerate() {
                assert_eq!(r.is_err(), i % 7 == 0, "job {i}: {r:?} (a pipe cannot be synced)");
            }
        }
    }
}

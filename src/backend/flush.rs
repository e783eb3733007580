//! The barriers of a batch. Each takes a group and answers for every member, so that one failure fails one commit.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::uring::SyncJob;
use super::{Backing, Call, Fault, contain};
use crate::sys;

impl Backing {
    /// Writes the dirty pages of all files to the device, all started before the first is waited for. No flush.
    pub fn write_out(&self, files: &[BorrowedFd<'_>]) -> Vec<Result<(), Fault>> {
        for fd in files.iter().filter(|_| files.len() > 1) {
            // An error stays with the file and is reported by the wait below.
            let _started = sys::write_out_start(fd);
        }
        files.iter().map(|fd| contain(|| self.pass(Call::WriteOut).and_then(|_| sys::write_out_wait(fd)))).collect()
    }

    /// Writes the dirty pages of a range to the device and waits for them. No flush.
    pub fn write_piece(&self, file: BorrowedFd<'_>, off: u64, len: u64) -> Result<(), Fault> {
        contain(|| self.pass(Call::WritePiece).and_then(|_| sys::write_out_range(file, off, len)))
    }

    /// fsync or fdatasync of all files, side by side.
    pub fn sync_files(&self, jobs: &[SyncJob<'_>]) -> Vec<Result<(), Fault>> {
        self.sync_gated(|_| Call::SyncFile, jobs)
    }

    /// fsync of all directories, and of all files, side by side. A directory that cannot be opened for reading is
    /// covered by syncfs.
    pub fn sync_both(
        &self,
        dirs: &[BorrowedFd<'_>],
        files: &[SyncJob<'_>],
    ) -> (Vec<Result<(), Fault>>, Vec<Result<(), Fault>>) {
        let jobs = dirs.iter().map(|fd| SyncJob { fd: *fd, data_only: false }).chain(files.iter().copied());
        let jobs: Vec<_> = jobs.collect();
        let mut dir_results = self.sync_gated(|i| if i < dirs.len() { Call::SyncDir } else { Call::SyncFile }, &jobs);
        let file_results = dir_results.split_off(dirs.len());
        let unreadable = Err(Fault::Os(Errno::BADF));
        if dir_results.contains(&unreadable) {
            let all = self.syncfs();
            dir_results.iter_mut().filter(|r| **r == unreadable).for_each(|r| r.clone_from(&all));
        }
        (dir_results, file_results)
    }

    /// syncfs of the backing file system.
    pub fn syncfs(&self) -> Result<(), Fault> {
        contain(|| self.pass(Call::SyncFs).and_then(|_| sys::syncfs(&self.root)))
    }

    /// How groups of syncs run, for people.
    pub fn parallel_by(&self) -> &'static str {
        if self.ring.has_ring() { "io_uring" } else { "threads" }
    }

    fn sync_gated(&self, call: impl Fn(usize) -> Call, jobs: &[SyncJob<'_>]) -> Vec<Result<(), Fault>> {
        let passed: Vec<_> = (0..jobs.len()).map(|i| contain(|| self.pass(call(i)))).collect();
        let open: Vec<_> = passed.iter().enumerate().filter(|(_, r)| **r == Ok(None)).map(|(i, _)| i).collect();
        let mut results: Vec<_> = passed.into_iter().map(|r| r.map(drop)).collect();
        let run: Vec<_> = open.iter().map(|i| jobs[*i]).collect();
        for (i, r) in open.into_iter().zip(self.ring.sync_all(&run)) {
            results[i] = r.map_err(Fault::Os);
        }
        results
    }
}

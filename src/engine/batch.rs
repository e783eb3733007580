//! The pipeline: what happens to a batch.
//!
//! 1. the data of all staged versions is made durable together (or, where the file system's order allows it, written
//!    out together ahead of the barrier), and so are the records of the journal;
//! 2. the versions are published in the order of submission, each by one atomic rename, or written from the journal;
//! 3. one barrier: every distinct parent directory once, and the files written in place, side by side;
//! 4. everybody is answered, each with the result of their own operation.
//!
//! A failure in a step fails that operation alone; a panic is such a failure. A barrier that fails with EIO means
//! that the device does not keep what it acknowledged: the mount turns read-only.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::io::Errno;

use super::Engine;
use super::activity::StepTimes;
use super::commit::answer_all;
use super::dir::{Dir, Place};
use super::dispatch::{Cause, CommitError, Copy, Outcome, Step, Ticket, Work};
use super::file::{Ctime, File, Version};
use super::io::ctime_of;
use super::journal::Logged;
use super::turns::Waiting;
use crate::backend::probe::Strategy;
use crate::backend::uring::SyncJob;
use crate::backend::{Anchor, Call, Fault, contain};
use crate::config::policy::Method;
use crate::telemetry::Counters;

/// An operation on its way through the pipeline.
pub(super) struct Op {
    pub ticket: Ticket,
    error: Option<CommitError>,
    /// What a publication brought.
    published: Option<Published>,
    /// Its record in the journal, once that is durable.
    pub logged: Option<Logged>,
}

/// The committed inode that a version became.
pub(super) struct Published {
    /// Its new hold.
    pub anchor: Anchor,
    /// What its publication did to its change time.
    pub ctime: Option<Ctime>,
}

impl Op {
    pub fn fail(&mut self, step: Step, source: impl Into<Cause>) {
        if self.error.is_none() {
            self.error = Some(CommitError::at(step, source));
        }
    }

    /// The version that this one replaced, to be let go after the answers.
    fn take_replaced(&self) -> Option<Arc<Version>> {
        match &self.ticket.work {
            Work::Publish { version, .. } => version.before.lock().take(),
            _ => None,
        }
    }

    pub fn alive(&self) -> bool {
        self.error.is_none()
    }

    /// The directory whose names this operation changed or wants durable.
    fn parent(&self) -> Option<&Arc<Dir>> {
        match &self.ticket.work {
            Work::Publish { place, .. } | Work::Unlink { place, .. } => Some(&place.dir),
            Work::SyncDir(dir) => Some(dir),
            Work::SyncFile { .. } | Work::Journal { .. } | Work::Checkpoint | Work::Copy(_) => None,
        }
    }
}

/// How many operations from the first on can run as one batch. Records are durable before names are published, so one
/// that was submitted after a change of names in its directory waits for the next.
fn part_len(ops: &[Op]) -> usize {
    let mut named = HashSet::new();
    let is_late = |op: &Op| match &op.ticket.work {
        Work::Journal { names, .. } => names.iter().any(|p| named.contains(&Arc::as_ptr(&p.dir))),
        Work::Publish { place, .. } | Work::Unlink { place, .. } => {
            named.insert(Arc::as_ptr(&place.dir));
            false
        }
        _ => false,
    };
    ops.iter().position(is_late).unwrap_or(ops.len())
}

/// How a version's data is flushed ahead of its publication.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flush {
    WriteOut,
    Syncfs,
    Each { data_only: bool },
}

impl Engine {
    /// Runs a batch. Every ticket is answered, whatever happens.
    pub(super) fn run_batch(&self, batch: Vec<Ticket>) {
        self.accounts.batch_sizes.record_value(batch.len() as u64);
        let op = |ticket| Op { ticket, error: None, published: None, logged: None };
        let mut part: Vec<_> = batch.into_iter().map(op).collect();
        while !part.is_empty() {
            let rest = part.split_off(part_len(&part));
            self.run_part(std::mem::replace(&mut part, rest));
        }
        self.checkpoint_when_full();
    }

    fn run_part(&self, mut ops: Vec<Op>) {
        let mut times = StepTimes::begin();
        let steps: [(Step, fn(&Self, &mut [Op])); 3] =
            [(Step::Data, Self::flush_data), (Step::Publish, Self::publish_all), (Step::SyncParent, Self::barrier)];
        for (step, run) in steps {
            if self.writable().is_err() {
                // Once the device failed a flush, a later one that succeeds proves nothing: so nothing succeeds.
                ops.iter_mut().for_each(|op| op.fail(step, Fault::Os(Errno::IO)));
            }
            if let Err(fault) = contain(|| {
                run(self, &mut ops);
                Ok(())
            }) {
                // Calls contain their own panics; one that gets here has no owner, so nobody may believe in success.
                Counters::add(&self.counters.panics, 1);
                ops.iter_mut().for_each(|op| op.fail(step, fault.clone()));
            }
            times.end(step);
        }
        let replaced: Vec<_> = ops.iter().filter_map(Op::take_replaced).collect();
        for op in ops {
            // The last line: whoever waits is answered by the ticket's end, and the next are not held up.
            if let Err(fault) = contain(|| {
                self.finish(op, &times);
                Ok(())
            }) {
                self.count_panic(&fault);
            }
        }
        drop(replaced);
    }

    fn flush_of(&self, method: Method) -> Flush {
        match (method, self.backing.probe().strategy) {
            (Method::Sync, _) => Flush::Each { data_only: false },
            (Method::Data | Method::Direct, _) | (_, Strategy::EachFile) => Flush::Each { data_only: true },
            (_, Strategy::OneBarrier) => Flush::WriteOut,
            (_, Strategy::Syncfs) => Flush::Syncfs,
        }
    }

    /// Whether data that is flushed by this method only has to be written out before its publication.
    pub(super) fn is_written_out(&self, method: Method) -> bool {
        self.flush_of(method) == Flush::WriteOut
    }

    /// Step 1. Copies come first, so that a commit of their target in the same batch flushes them too.
    fn flush_data(&self, ops: &mut [Op]) {
        for op in ops.iter_mut() {
            if op.alive()
                && let Work::Copy(c) = &op.ticket.work
                && let Err(fault) = contain(|| self.copy_now(c))
            {
                self.count_panic(&fault);
                op.fail(Step::Data, fault);
            }
        }
        self.log_all(ops);
        let mut plan: Vec<(usize, Arc<Version>, Flush)> = ops
            .iter()
            .enumerate()
            .filter(|(_, op)| op.alive())
            .filter_map(|(i, op)| match &op.ticket.work {
                Work::Publish { version, method, .. } => Some((i, version.clone(), self.flush_of(*method))),
                _ => None,
            })
            .collect();
        plan.retain(|(i, version, _)| {
            let settled = version.settled();
            note(&mut ops[*i], Step::Data, settled.map_err(Fault::Os));
            settled.is_ok()
        });
        let of = |want: fn(Flush) -> bool| plan.iter().filter(move |p| want(p.2)).collect::<Vec<_>>();
        // Before syncfs too: what it writes for one batch may be another's, and the error is told to the file alone.
        let outs = of(|f| matches!(f, Flush::WriteOut | Flush::Syncfs));
        let fds: Vec<_> = outs.iter().map(|p| p.1.fd()).collect();
        // Not a flush: EIO here is that file's own write-back error, which no later call would report again.
        for (p, r) in outs.iter().zip(self.backing.write_out(&fds)) {
            note(&mut ops[p.0], Step::Data, r);
        }
        let each = of(|f| matches!(f, Flush::Each { .. }));
        let jobs: Vec<_> =
            each.iter().map(|p| SyncJob { fd: p.1.fd(), data_only: p.2 == Flush::Each { data_only: true } }).collect();
        Counters::add(&self.counters.flush_calls, jobs.len() as u64);
        for (p, r) in each.iter().zip(self.backing.sync_files(&jobs)) {
            self.watch_device(&r, "flush of a file");
            note(&mut ops[p.0], Step::Data, r);
        }
        let whole: Vec<_> = of(|f| f == Flush::Syncfs).into_iter().filter(|p| ops[p.0].alive()).collect();
        if !whole.is_empty() {
            Counters::add(&self.counters.flush_calls, 1);
            let r = self.backing.syncfs();
            self.watch_device(&r, "syncfs");
            whole.iter().for_each(|p| note(&mut ops[p.0], Step::Data, r.clone()));
        }
    }

    /// Step 2.
    fn publish_all(&self, ops: &mut [Op]) {
        let _order = self.publishing.lock();
        for op in ops.iter_mut().filter(|op| op.alive()) {
            let r = match &op.ticket.work {
                Work::Publish { version, place, replaces, .. } => {
                    contain(|| self.publish(version, place, *replaces)).map(Some)
                }
                Work::Unlink { place, rmdir } => contain(|| self.unlink_now(place, *rmdir)).map(|()| None),
                Work::Journal { version, .. } => self.apply(version, op.logged.as_ref()).map(|()| None),
                Work::SyncFile { .. } | Work::SyncDir(_) | Work::Checkpoint | Work::Copy(_) => Ok(None),
            };
            match r {
                Ok(published) => op.published = published,
                Err(fault) => {
                    self.count_panic(&fault);
                    op.fail(Step::Publish, fault);
                }
            }
        }
    }

    pub(super) fn publish(&self, version: &Version, place: &Place, replaces: bool) -> Result<Published, Errno> {
        let dir = self.dir_fd(&place.dir)?;
        let ctime = || rustix::fs::fstat(version.fd()).map(|st| ctime_of(&st));
        let shown = ctime()?;
        let anchor = self.backing.anchor_of(version.fd(), version.id)?;
        place.dir.publish(&dir, || {
            let new = if replaces { Err(Errno::EXIST) } else { self.backing.link_new(version.fd(), &dir, &place.name) };
            match new {
                // Also when somebody made the name behind the mount: the last save wins, as with any rename.
                Err(Errno::EXIST) => {
                    let temp = self.backing.temp_name();
                    *version.temp.lock() = Some(temp.clone());
                    self.backing.replace(version.fd(), &temp, &dir, &place.name)
                }
                r => r,
            }
        })?;
        // From here on nothing may fail: the version is in place.
        Ok(Published { anchor, ctime: ctime().ok().map(|real| Ctime { real, shown }) })
    }

    fn unlink_now(&self, place: &Place, rmdir: bool) -> Result<(), Errno> {
        let dir = self.dir_fd(&place.dir)?;
        self.backing.unlink(&dir, &place.name, rmdir)?;
        place.dir.show_real_times();
        place.dir.mark_changed();
        Ok(())
    }

    fn copy_now(&self, c: &Copy) -> Result<(), Errno> {
        c.src.settle();
        if let Some(e) = c.src.failed.late() {
            return Err(e);
        }
        let n = if c.src.overlaid().is_some() || c.dst.overlaid().is_some() {
            self.copy_through(c)?
        } else {
            self.backing.copy_range(c.src.fd(), c.src_off, c.dst.fd(), c.dst_off, c.len)?
        };
        c.copied.store(n, Ordering::Release);
        Ok(())
    }

    /// Step 3.
    fn barrier(&self, ops: &mut [Op]) {
        let started = Instant::now();
        let dirs = self.distinct_parents(ops);
        let files = in_place(ops);
        let checkpoints = ops.iter().any(|op| matches!(op.ticket.work, Work::Checkpoint));
        if dirs.is_empty() && files.is_empty() {
            if checkpoints {
                self.checkpoint_for(ops);
            }
            return;
        }
        let jobs: Vec<_> = files.iter().map(|f| SyncJob { fd: f.version.fd(), data_only: f.data_only }).collect();
        let (dir_results, file_results) = self.sync_group(&dirs, &jobs);
        self.flushed(started.elapsed());
        let mut by_dir = HashMap::new();
        for ((dir, _, changes), r) in dirs.iter().zip(dir_results) {
            self.watch_device(&r, "sync of a directory");
            match r {
                Ok(()) => dir.mark_synced(*changes),
                // Its names changed, and whoever waits is told that they are not durable: that stays to be done.
                Err(_) => self.owe_sync(dir),
            }
            by_dir.insert(Arc::as_ptr(dir), r);
        }
        for op in ops.iter_mut().filter(|op| op.alive()) {
            if let Some(r) = op.parent().and_then(|d| by_dir.get(&Arc::as_ptr(d))) {
                note(op, Step::SyncParent, r.clone());
            }
        }
        for (f, r) in files.iter().zip(file_results) {
            self.watch_device(&r, "flush of a file written in place");
            self.watch_records(&f.version, &r);
            f.ops.iter().for_each(|i| note(&mut ops[*i], Step::Data, r.clone()));
        }
        if checkpoints || files.iter().any(|f| self.journal.wrote(f.version.id)) {
            // What was just made durable must not be undone by an older record.
            self.checkpoint_for(ops);
        }
        for f in files {
            self.file_synced(&f, &outcome(&ops[f.ops[0]]));
        }
    }

    /// The directories that need a sync, each once, with the number of its changes before that sync. An operation
    /// whose directory cannot be opened fails.
    fn distinct_parents(&self, ops: &mut [Op]) -> Vec<(Arc<Dir>, Arc<OwnedFd>, u64)> {
        let mut dirs: Vec<(Arc<Dir>, Arc<OwnedFd>, u64)> = Vec::new();
        for op in ops.iter_mut().filter(|op| op.alive()) {
            let Some(dir) = op.parent().cloned() else { continue };
            // A barrier that ran while this waited in the queue did it.
            if matches!(op.ticket.work, Work::SyncDir(_)) && dir.is_synced() {
                continue;
            }
            if dirs.iter().any(|d| Arc::ptr_eq(&d.0, &dir)) {
                continue;
            }
            match self.dir_fd(&dir) {
                Ok(fd) => dirs.push((dir.clone(), fd, dir.changes())),
                // Removed, and its names with it: the directory that it was in holds what is to be made durable.
                Err(Errno::STALE) => dir.mark_synced(dir.changes()),
                Err(e) => op.fail(Step::SyncParent, Fault::Os(e)),
            }
        }
        dirs
    }

    /// All barriers of a batch side by side: they share the file system's journal commit.
    pub(super) fn sync_group(
        &self,
        dirs: &[(Arc<Dir>, Arc<OwnedFd>, u64)],
        files: &[SyncJob<'_>],
    ) -> (Vec<Result<(), Fault>>, Vec<Result<(), Fault>>) {
        // btrfs keeps a log of its own per fsync: with changes of names that are not durable yet, a crash after it could
        // leave a renamed file under neither name. A full commit has no such log.
        let whole = self.backing.probe().strategy == Strategy::Syncfs && (!dirs.is_empty() || self.names_pending());
        Counters::add(&self.counters.flush_calls, if whole { 1 } else { files.len() + dirs.len() } as u64);
        if whole {
            let r = self.backing.syncfs();
            return (vec![r.clone(); dirs.len()], vec![r; files.len()]);
        }
        let dir_fds: Vec<BorrowedFd<'_>> = dirs.iter().map(|d| d.1.as_fd()).collect();
        self.backing.sync_both(&dir_fds, files)
    }

    /// Whether a change of names waits for its sync, or is on its way to it.
    fn names_pending(&self) -> bool {
        let dirty = self.dirty_dirs.lock();
        dirty.values().any(|d| !d.is_synced()) || self.names_in_flight.load(Ordering::Acquire) > 0
    }

    /// Step 4 for one operation.
    fn finish(&self, op: Op, times: &StepTimes) {
        let result = outcome(&op);
        self.note_ticket(&op.ticket, times, result.is_ok());
        match &op.ticket.work {
            Work::Publish { file, version, place, .. } => match (op.published, &result) {
                (Some(published), r) => {
                    if let Err(e) = r {
                        // Whatever kept the barrier from its directory: the name there is still to be made durable.
                        self.owe_sync(&place.dir);
                        self.published_not_durable(place, e);
                    }
                    Counters::add(&self.counters.commits, 1);
                    answer_all(self.published(file, version, place, published, result.is_ok()), r);
                }
                (None, Err(e)) => self.commit_failed(file, version, e),
                (None, Ok(())) => {
                    self.commit_failed(file, version, &CommitError::at(Step::Publish, Fault::Os(Errno::IO)));
                }
            },
            Work::Journal { file, version, names } => match (&op.logged, &result) {
                (Some(logged), r) => self.journaled(file, version, names, logged, r),
                (None, Err(e)) => self.commit_failed(file, version, e),
                (None, Ok(())) => self.commit_failed(file, version, &CommitError::at(Step::Data, Fault::Os(Errno::IO))),
            },
            Work::SyncFile { .. } => Counters::add(&self.counters.in_place_syncs, 1),
            Work::SyncDir(_) => Counters::add(&self.counters.dir_sync_requests, 1),
            Work::Unlink { place, .. } if result.is_err() => self.owe_sync(&place.dir),
            Work::Unlink { .. } | Work::Checkpoint | Work::Copy(_) => {}
        }
        // The gate only sees an answer; its verdict does not change it.
        drop(contain(|| self.backing.pass(Call::Answer)));
        match op.ticket.saves_new().map(|(dir, tid)| (dir.clone(), tid)) {
            Some((dir, tid)) if result.is_ok() => {
                self.turns.saved(&dir, Waiting { tid, done: op.ticket.done, outcome: result }, self.turn_length());
            }
            _ => op.ticket.done.answer(result),
        }
    }

    pub(super) fn count_panic(&self, fault: &Fault) {
        if let Fault::Panic(what) = fault {
            Counters::add(&self.counters.panics, 1);
            tracing::error!(panic = %what, "an operation panicked; it failed with EIO, the others of its batch go on");
        }
    }

    /// A barrier that fails with EIO: what the device acknowledges is not to be believed any more.
    pub(super) fn watch_device(&self, r: &Result<(), Fault>, what: &str) {
        match r {
            Err(Fault::Os(Errno::IO)) => self.poison(&format!("{what} failed with EIO")),
            Err(fault) => self.count_panic(fault),
            Ok(()) => {}
        }
    }
}

/// A version that is written in place, for all operations of a batch that flush it: by one call, since the kernel tells a
/// write-back error once for each descriptor, and this is one.
pub(super) struct InPlace {
    pub(super) file: Arc<File>,
    pub(super) version: Arc<Version>,
    pub(super) data_only: bool,
    /// Its changes before the flush.
    pub(super) upto: u64,
    ops: Vec<usize>,
}

fn in_place(ops: &[Op]) -> Vec<InPlace> {
    let mut all: Vec<InPlace> = Vec::new();
    let mut known = HashMap::new();
    for (i, op) in ops.iter().enumerate().filter(|(_, op)| op.alive()) {
        let Work::SyncFile { file, version, data_only } = &op.ticket.work else { continue };
        let at = *known.entry(Arc::as_ptr(version)).or_insert(all.len());
        if let Some(f) = all.get_mut(at) {
            f.data_only &= data_only;
            f.ops.push(i);
        } else {
            let (file, version, upto) = (file.clone(), version.clone(), version.changes.load(Ordering::Acquire));
            all.push(InPlace { file, version, data_only: *data_only, upto, ops: vec![i] });
        }
    }
    all
}

pub(super) fn note(op: &mut Op, step: Step, r: Result<(), Fault>) {
    if let Err(fault) = r {
        op.fail(step, fault);
    }
}

fn outcome(op: &Op) -> Outcome {
    op.error.clone().map_or(Ok(()), Err)
}

//! Write mode `journal`: updates of any part of a file are atomic, and the file stays the same inode.
//!
//! ```text
//! write -> overlay | commit: record to the log, one flush for all of a batch, then the file itself | answer
//!                  | checkpoint, later: flush the files, begin the log anew
//! ```
//!
//! Between its record's flush and the checkpoint a file may be on the disk in part; recovery writes it from the log
//! again. A record names its inode by handle, so changes of names need no record: an inode that is gone is skipped.
//! Only the dispatcher takes the log, so its order is the order of the commits.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use rustix::fs::{self as rfs, FallocateFlags};
use rustix::io::Errno;

use super::Engine;
use super::batch::{Op, note};
use super::commit::{answer_all, path_of};
use super::dir::{Dir, Place};
use super::dispatch::{Copy, Done, Outcome, Step, Work};
use super::file::{Ctime, File, Handle, State, Version};
use super::io::ctime_of;
use super::log::{FULL_BYTES, Log, Placed};
use super::overlay::Overlay;
use super::record::Redo;
use super::state::{Event, Phase};
use crate::backend::uring::SyncJob;
use crate::backend::{Anchor, Fault, FileId, contain};
use crate::config::policy::{Policy, WriteMode};
use crate::telemetry::Counters;

/// Files with records in the log, after which it is begun anew: each is held open.
const FILES_MAX: usize = 256;
/// A failed update of a file up to this size, bytes, is kept as the whole file; of a larger one the changes are.
const KEPT_WHOLE_BYTES: u64 = 16 << 20;
/// Largest piece, bytes, that a copy takes to or from a file with changes.
const COPY_BYTES: usize = 1 << 20;
/// Where writes take new space even over old data, so much is to be free beyond an update, bytes.
const COW_RESERVE_BYTES: u64 = 4 << 20;

/// The journal of one mount.
#[derive(Debug, Default)]
pub(super) struct Journal {
    log: Mutex<Option<Log>>,
    /// Files that have records in the log.
    files: Mutex<HashMap<FileId, Arc<Version>>>,
    /// Whether there is anything to checkpoint.
    holds: AtomicBool,
    /// A checkpoint is queued.
    asked: AtomicBool,
}

impl Journal {
    /// Whether the log has records.
    pub fn holds(&self) -> bool {
        self.holds.load(Ordering::Acquire)
    }

    /// Whether the log has records of this file.
    pub fn wrote(&self, id: FileId) -> bool {
        self.holds() && self.files.lock().contains_key(&id)
    }

    /// The open inode of a file that has records in the log. What is not durable of it is known, so another update need
    /// not flush it first.
    pub fn open_version(&self, id: FileId) -> Option<Arc<Version>> {
        // After a commit that failed its changes still lie over the inode.
        let usable = |v: &&Arc<Version>| v.overlaid().is_none() && v.failed.errno().is_none();
        if self.holds() { self.files.lock().get(&id).filter(usable).cloned() } else { None }
    }
}

/// A durable record and what its file showed before.
pub(super) struct Logged {
    placed: Placed,
    ctime: (i64, i64),
}

impl Engine {
    /// Whether writes through `h` are to go to a new overlay.
    pub(super) fn wants_overlay(h: &Handle, st: &State) -> bool {
        let journal = h.policy.mode == WriteMode::Journal && h.replace.load(Ordering::Relaxed);
        st.phase == Phase::Clean && journal
    }

    /// Begins an overlay over a committed file, in phase `Clean`. False when it has to go on in place: it is served by the
    /// kernel, lies on another file system, or takes appends only.
    pub(super) fn begin_overlay(
        self: &Arc<Self>,
        file: &Arc<File>,
        st: &mut State,
        policy: Policy,
    ) -> Result<bool, Errno> {
        if st.kernel.is_some() {
            // Descriptors that the kernel serves would go on without the overlay.
            return Ok(false);
        }
        self.ensure_version(st, true)?;
        let v = st.open_version()?.clone();
        let found_again = self.backing.journal().is_some() && matches!(st.anchor, Some(Anchor::Handle(_)));
        if !found_again || v.append_only {
            Counters::add(&self.counters.in_place_fallbacks, 1);
            return Ok(false);
        }
        let overlay = match v.overlay.get() {
            Some(overlay) => overlay,
            None => {
                let side = Overlay::new(self.backing.open_side()?);
                v.overlay.get_or_init(|| side)
            }
        };
        let size = rfs::fstat(v.fd())?.st_size as u64;
        st.go(Event::Stage)?;
        st.lost = None;
        self.sync_what_is_owed(file, st);
        overlay.begin(size);
        for place in &st.names {
            // A name that another file took keeps that one; this file then goes without.
            Self::claim(place, file);
        }
        st.policy = policy;
        v.mark_written(self.now_ms());
        Counters::add(&self.counters.stages, 1);
        Counters::add(&self.counters.staged_now, 1);
        self.unsettled.lock().insert(file.tag, file.clone());
        Ok(true)
    }

    /// The journal's part of step 1: the records of all its operations, made durable by one flush.
    pub(super) fn log_all(&self, ops: &mut [Op]) {
        let is_journal = |op: &Op| op.alive() && matches!(op.ticket.work, Work::Journal { .. });
        if !ops.iter().any(is_journal) {
            return;
        }
        // What is being published early was acknowledged before: then its directory is one of those that need a sync.
        drop(self.publishing.lock());
        self.before_records(ops);
        if self.writable().is_err() {
            // What is told to have failed must not come back with the next mount.
            return;
        }
        let mut log = self.journal.log.lock();
        let back = log.as_ref().map(Log::position);
        let mut written = Vec::new();
        for op in ops.iter_mut().filter(|op| is_journal(op)) {
            match contain(|| self.log_one(&mut log, op)) {
                Ok(logged) => written.push((op, logged)),
                Err(fault) => {
                    self.count_panic(&fault);
                    op.fail(Step::Data, fault);
                }
            }
        }
        let (Some(log), false) = (log.as_mut(), written.is_empty()) else { return };
        self.journal.holds.store(true, Ordering::Release);
        let flushed = self.flush_log(log);
        if flushed.is_err() {
            self.take_back(log, back);
        }
        self.counters.journal_bytes.store(log.used(), Ordering::Relaxed);
        for (op, logged) in written {
            match &flushed {
                Ok(()) => op.logged = Some(logged),
                Err(fault) => op.fail(Step::Data, fault.clone()),
            }
        }
    }

    /// What the records stand on has to be durable first: the inode itself with its attributes, and changes of names
    /// that were acknowledged before in its directories.
    fn before_records(&self, ops: &mut [Op]) {
        let mut dirs: Vec<Arc<Dir>> = Vec::new();
        let mut files: Vec<(usize, Arc<Version>, u64)> = Vec::new();
        for (i, op) in ops.iter().enumerate().filter(|(_, op)| op.alive()) {
            let Work::Journal { version, names, .. } = &op.ticket.work else { continue };
            for place in names.iter().filter(|p| !p.dir.is_synced()) {
                if !dirs.iter().any(|d| Arc::ptr_eq(d, &place.dir)) {
                    dirs.push(place.dir.clone());
                }
            }
            if !version.is_durable() {
                files.push((i, version.clone(), version.changes.load(Ordering::Acquire)));
            }
        }
        if dirs.is_empty() && files.is_empty() {
            return;
        }
        let dirs = self.open_dirs(dirs, ops);
        let jobs: Vec<_> = files.iter().map(|f| SyncJob { fd: f.1.fd(), data_only: false }).collect();
        let (dir_results, file_results) = self.sync_group(&dirs, &jobs);
        for ((dir, _, changes), r) in dirs.iter().zip(dir_results) {
            self.watch_device(&r, "sync of a directory");
            match r {
                Ok(()) => dir.mark_synced(*changes),
                Err(fault) => fail_in(ops, dir, &fault),
            }
        }
        for ((i, version, upto), r) in files.iter().zip(file_results) {
            self.watch_device(&r, "flush of a file ahead of the journal");
            self.watch_records(version, &r);
            if r.is_ok() {
                version.mark_synced(*upto);
                version.data_only.store(false, Ordering::Release);
            }
            note(&mut ops[*i], Step::Data, r);
        }
    }

    /// The flush of a file failed: the kernel tells the error of a write once, and a checkpoint would not hear of it. So
    /// where the file was written from records, those must stay.
    pub(super) fn watch_records(&self, version: &Version, r: &Result<(), Fault>) {
        if let Err(fault) = r
            && self.journal.wrote(version.id)
        {
            self.poison(&format!("a file with updates in the journal could not be flushed: {fault}"));
        }
    }

    fn open_dirs(&self, dirs: Vec<Arc<Dir>>, ops: &mut [Op]) -> Vec<(Arc<Dir>, Arc<std::os::fd::OwnedFd>, u64)> {
        let mut open = Vec::new();
        for dir in dirs {
            match contain(|| self.dir_fd(&dir)) {
                Ok(fd) => open.push((dir.clone(), fd, dir.changes())),
                Err(Fault::Os(Errno::STALE)) => dir.mark_synced(dir.changes()),
                Err(fault) => fail_in(ops, &dir, &fault),
            }
        }
        open
    }

    /// Appends the record of one operation.
    fn log_one(&self, log: &mut Option<Log>, op: &Op) -> Result<Logged, Errno> {
        let Work::Journal { file, version, names } = &op.ticket.work else { return Err(Errno::INVAL) };
        let overlay = version.overlaid().ok_or(Errno::IO)?;
        let update = overlay.update().ok_or(Errno::IO)?;
        let st = rfs::fstat(version.fd())?;
        let (handle_kind, handle) = match &file.state.read().anchor {
            Some(Anchor::Handle(h)) => (h.parts().0, h.parts().1.to_vec()),
            _ => return Err(Errno::STALE),
        };
        let mtime = update.mtime.unwrap_or((st.st_mtime, st.st_mtime_nsec as i64));
        let redo = Redo {
            handle_kind,
            handle,
            ino: version.id.ino,
            path: path_of(names.first()).into_bytes(),
            size: update.size,
            mtime: (mtime.0, mtime.1 as u32),
            extents: update.extents,
        };
        self.reserve(version, &redo, &st)?;
        if log.is_none() {
            *log = Some(Log::begin(&self.backing)?);
        }
        let log = log.as_mut().ok_or(Errno::IO)?;
        let placed = log.append(&self.backing, redo, |off, buf| overlay.read_side(off, buf))?;
        Ok(Logged { placed, ctime: update.ctime.max(ctime_of(&st)) })
    }

    /// Space for what the record writes: once it is durable, writing it must not fail.
    fn reserve(&self, version: &Version, redo: &Redo, st: &rfs::Stat) -> Result<(), Errno> {
        if self.backing.probe().reflink {
            let fs = rfs::fstatvfs(version.fd())?;
            if fs.f_bavail.saturating_mul(fs.f_frsize) < redo.data_len() + COW_RESERVE_BYTES {
                return Err(Errno::NOSPC);
            }
        }
        let sparse = (st.st_blocks as u64) < (st.st_size as u64).div_ceil(512);
        for e in redo.data().filter(|e| sparse || e.off + e.len > st.st_size as u64) {
            match self.backing.allocate(version.fd(), FallocateFlags::KEEP_SIZE, e.off, e.len) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn flush_log(&self, log: &mut Log) -> Result<(), Fault> {
        let started = Instant::now();
        let (_, results) = self.sync_group(&[], &log.flush(&self.backing));
        self.flushed(started.elapsed());
        results.iter().for_each(|r| self.watch_device(r, "flush of the journal"));
        let flushed: Result<(), Fault> = results.into_iter().collect();
        if flushed.is_ok() {
            log.flushed();
        }
        flushed
    }

    /// Commits that are told to have failed must not come back after a crash.
    fn take_back(&self, log: &mut Log, to: Option<super::log::Position>) {
        let taken = contain(|| match to {
            Some(to) => log.take_back(&self.backing, to),
            None => log.restart(&self.backing),
        });
        if let Err(fault) = taken.and_then(|()| self.flush_log(log)) {
            self.poison(&format!("commits that failed could not be taken back from the journal ({fault})"));
        }
    }

    /// The journal's part of step 2: writes a record into its file.
    pub(super) fn apply(&self, version: &Arc<Version>, logged: Option<&Logged>) -> Result<(), Fault> {
        let Some(logged) = logged else { return Err(Fault::Os(Errno::IO)) };
        self.journal.files.lock().entry(version.id).or_insert_with(|| version.clone());
        let log = self.journal.log.lock();
        let once = || {
            contain(|| log.as_ref().ok_or(Errno::IO)?.apply(&self.backing, &logged.placed, version.fd()))
                .inspect_err(|fault| self.count_panic(fault))
        };
        // To do it again ends the same, so what failed in passing is tried once more.
        once().or_else(|_| once()).inspect_err(|fault| {
            self.poison(&format!(
                "an update that is safe in the journal could not be written into its file ({fault}); the next mount does it"
            ));
        })
    }

    /// The record is durable: programs go on with the file itself. Where it could not be written, they go on seeing it
    /// with the changes over it.
    pub(super) fn journaled(
        &self,
        file: &Arc<File>,
        version: &Arc<Version>,
        names: &[Place],
        logged: &Logged,
        r: &Outcome,
    ) {
        let mut st = file.state.write();
        if st.go(Event::Published).is_err() {
            return;
        }
        st.paid();
        self.end_stage(version);
        names.iter().for_each(|place| self.unclaim(file, place));
        match r {
            Ok(()) => {
                Counters::add(&self.counters.journal_commits, 1);
                version.overlaid().into_iter().for_each(Overlay::end);
                let real = rfs::fstat(version.fd()).map(|st| ctime_of(&st)).ok();
                st.ctime = real.map(|real| Box::new(Ctime { real, shown: logged.ctime }));
                if version.is_synced() {
                    version.dirty_ms.store(0, Ordering::Release);
                }
                Self::close_if_idle(&mut st);
            }
            Err(e) => {
                // Nothing may follow on the file, or begin the log anew, before a recovery has written it.
                self.poison("an update that is safe in the journal is not in its file; the next mount writes it");
                Counters::add(&self.counters.commit_failures, 1);
                let path = path_of(names.first());
                tracing::error!(%path, step = %e.failed_at, cause = %e.source, "in the journal, not yet in its file");
                self.note_failed(path, String::new(), e);
            }
        }
        answer_all(self.settled(file, st), r);
    }

    /// Flushes every file that was written from the journal and begins that anew.
    ///
    /// # Errors
    /// The records stay, and a later checkpoint or a recovery does it.
    pub(super) fn checkpoint(&self) -> Result<(), Fault> {
        if !self.journal.holds() {
            return Ok(());
        }
        self.writable().map_err(|_| Fault::Os(Errno::IO))?;
        let mut log = self.journal.log.lock();
        let Some(log) = log.as_mut() else { return Ok(()) };
        let files: Vec<_> = self.journal.files.lock().values().cloned().collect();
        let jobs: Vec<_> = files.iter().map(|v| SyncJob { fd: v.fd(), data_only: false }).collect();
        // All the data first: then the first flush is for all, and the next find little to do.
        let written: Result<(), Fault> =
            self.backing.write_out(&files.iter().map(|v| v.fd()).collect::<Vec<_>>()).into_iter().collect();
        let (_, results) = self.sync_group(&[], &jobs);
        results.iter().for_each(|r| self.watch_device(r, "flush of a file written from the journal"));
        let all: Result<(), Fault> = results.into_iter().collect();
        let all = written.and(all);
        // Whatever the error: the next flush would not repeat it, and the records are all that is left of those writes.
        all.inspect_err(|e| self.poison(&format!("a file written from the journal could not be flushed: {e}")))?;
        contain(|| log.restart(&self.backing)).inspect_err(|fault| self.count_panic(fault))?;
        self.flush_log(log)?;
        self.journal.files.lock().clear();
        self.journal.holds.store(false, Ordering::Release);
        self.counters.journal_bytes.store(log.used(), Ordering::Relaxed);
        Counters::add(&self.counters.checkpoints, 1);
        Ok(())
    }

    /// For those of a batch that asked for a checkpoint, and those whose flush relies on one.
    pub(super) fn checkpoint_for(&self, ops: &mut [Op]) {
        let r = self.checkpoint();
        let relies = |op: &&mut Op| matches!(op.ticket.work, Work::Checkpoint | Work::SyncFile { .. });
        ops.iter_mut().filter(relies).for_each(|op| note(op, Step::SyncParent, r.clone()));
    }

    /// After a batch, when everybody is answered.
    pub(super) fn checkpoint_when_full(&self) {
        let bytes = self.journal.log.lock().as_ref().map_or(0, Log::used);
        if (bytes > FULL_BYTES || self.journal.files.lock().len() > FILES_MAX)
            && let Err(fault) = self.checkpoint()
        {
            tracing::warn!(%fault, "the journal could not be begun anew; it goes on growing until it can");
        }
    }

    /// Queues a checkpoint when there is something to do.
    pub(super) fn checkpoint_soon(self: &Arc<Self>) {
        if !self.journal.holds() || self.writable().is_err() || self.journal.asked.swap(true, Ordering::AcqRel) {
            return;
        }
        let me = self.clone();
        let done = Done::new(move |_| {
            me.journal.asked.store(false, Ordering::Release);
            me.idle.notify_all();
        });
        self.send(Work::Checkpoint, done);
    }

    /// Copies a range from or to a file with changes.
    pub(super) fn copy_through(&self, c: &Copy) -> Result<usize, Errno> {
        let mut buf = vec![0; c.len.min(COPY_BYTES)];
        let n = c.src.read_at(c.src_off, &mut buf)?;
        let mut done = 0;
        while done < n {
            let (off, rest) = (c.dst_off + done as u64, &buf[done..n]);
            done += match c.dst.overlaid() {
                Some(overlay) => overlay.write(&self.backing, off, rest)?,
                None => self.backing.write(c.dst.fd(), off, rest)?,
            };
        }
        Ok(n)
    }

    /// Keeps an update that failed, as `name` in `.fsys/failed`.
    pub(super) fn keep_overlay(&self, version: &Version, overlay: &Overlay, name: &mut String) -> Result<(), Errno> {
        let small = version.stat()?.st_size as u64 <= KEPT_WHOLE_BYTES;
        if !(small && overlay.complete(&self.backing, version.fd()).is_ok()) {
            name.push_str(".changes");
        }
        self.backing.keep(overlay.side(), None, name)
    }
}

/// Fails the operations of the journal on files of a directory.
fn fail_in(ops: &mut [Op], dir: &Arc<Dir>, fault: &Fault) {
    for op in ops.iter_mut() {
        if let Work::Journal { names, .. } = &op.ticket.work
            && names.iter().any(|p| Arc::ptr_eq(&p.dir, dir))
        {
            op.fail(Step::Data, fault.clone());
        }
    }
}

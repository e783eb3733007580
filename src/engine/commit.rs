//! From a program's close or fsync to a ticket, and from the dispatcher's result back to the file's state.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroI32;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use parking_lot::RwLockWriteGuard;
use rustix::io::Errno;

use super::batch::{InPlace, Published};
use super::dir::{Dir, Place};
use super::dispatch::{Cause, CommitError, Countdown, Done, Outcome, Step, Ticket, Work};
use super::file::{File, Handle, Parked, State, Version, owed_so_far};
use super::state::{Event, Phase};
use super::write::waits_at_close;
use super::{Behind, Engine};
use crate::backend::{Fault, contain};
use crate::config::policy::Durability;
use crate::telemetry::Counters;

/// An answer to give once no lock is held.
pub(super) type Answer = Option<(Done, Outcome)>;

pub(super) fn give(a: Answer) {
    if let Some((done, r)) = a {
        done.answer(r);
    }
}

/// Acknowledged saves whose commit is still to come, in the order of the acknowledgements.
///
/// Each is looked at again when its turn comes: meanwhile it may have been committed and owe its next version, which
/// comes after others that are not among these.
#[derive(Debug)]
pub struct Debts {
    pub(super) files: VecDeque<Arc<File>>,
    /// All are older than the debt with this number ([`State::owed_nth`]).
    pub(super) so_far: u64,
}

impl Debts {
    /// Whether nothing is owed.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }
}

/// Answers all that waited for one operation.
pub(super) fn answer_all(all: Vec<Done>, r: &Outcome) {
    all.into_iter().for_each(|d| d.answer(r.clone()));
}

/// Room for so many staged names stays with a directory that has none.
const STAGED_KEPT: usize = 64;

impl Engine {
    /// close(2) of a descriptor by thread `tid` (FUSE FLUSH; one for each of its duplicates and inherited copies).
    /// Commits what was written through it.
    pub fn close(self: &Arc<Self>, h: &Handle, tid: u32, done: Done) {
        self.look(h);
        let waits = matches!(h.policy.durability, Durability::Always | Durability::Close);
        if !h.dirty.load(Ordering::Acquire) {
            // Another process may have submitted what this one wrote through its copy of the descriptor.
            return if waits && h.submitted(tid) { self.join(h, done) } else { done.answer(Ok(())) };
        }
        if !h.ends_save(tid) {
            return done.answer(Ok(()));
        }
        h.file.note_use(tid, h.policy.durability);
        self.commit_handle(h, waits, false, done);
    }

    /// Answers when the commit that runs has ended; at once when none does.
    fn join(self: &Arc<Self>, h: &Handle, done: Done) {
        let mut st = h.file.state.write();
        let running = st.phase == Phase::Committing;
        let answer = if running { self.submit(&h.file, &mut st, false, done) } else { Some((done, Ok(()))) };
        drop(st);
        give(answer);
    }

    /// fsync(2) or fdatasync(2).
    pub fn fsync(self: &Arc<Self>, h: &Handle, data_only: bool, done: Done) {
        if h.file.state.read().lost.is_some()
            && let Some(e) = h.file.state.write().lost.take()
        {
            return done.answer(Err(CommitError::at(Step::Publish, Fault::Os(e))));
        }
        let waits = h.policy.durability != Durability::Relaxed;
        self.commit_handle(h, waits, data_only && waits, if waits { done } else { done.by(None) });
    }

    fn commit_handle(self: &Arc<Self>, h: &Handle, waits: bool, data_only: bool, done: Done) {
        let submits = waits || self.backlog_full();
        let mut st = if submits { self.write_in_order(&h.file) } else { h.file.state.write() };
        if let Err(e) = self.check_handle(h, &st) {
            drop(st);
            return done.answer(Err(CommitError::at(Step::Queue, Fault::Os(e))));
        }
        Self::unmark(h, &mut st);
        self.expect_unseen(&h.file, &st);
        let failed = st.phase == Phase::Staged && st.version.as_ref().is_some_and(|v| v.failed.errno().is_some());
        // On its way to the queue, and not in its place among the debts yet.
        let delayed = st.phase == Phase::Committing && st.version.as_ref().is_some_and(|v| v.behind.is_awaited());
        let answer = if submits || failed || delayed {
            self.submit(&h.file, &mut st, data_only, done)
        } else {
            // Only what is there to commit: a debt without one would publish the next version half-written.
            let dirty = |v: &Arc<Version>| v.dirty_ms.load(Ordering::Acquire) != 0;
            if st.is_staged() || st.version.as_ref().is_some_and(dirty) {
                st.owe();
            }
            Some((done, Ok(())))
        };
        drop(st);
        give(answer);
    }

    /// A descriptor whose version failed stays failed; so does everything when the mount is read-only.
    fn check_handle(&self, h: &Handle, st: &State) -> Result<(), Errno> {
        if st.failures != h.failures {
            return Err(Errno::IO);
        }
        if h.dirty.load(Ordering::Acquire) { self.writable() } else { Ok(()) }
    }

    fn unmark(h: &Handle, st: &mut State) {
        if h.dirty.swap(false, Ordering::AcqRel) {
            st.unflushed = st.unflushed.saturating_sub(1);
            let writers = std::mem::take(&mut *h.writers.lock());
            *h.submitters.lock() = writers;
        }
    }

    /// The last close of a descriptor (FUSE RELEASE; nobody waits for it). Commits a version that stayed empty, and
    /// what came through a memory map. Gives the number that the file was registered with the kernel under when nothing
    /// needs that any more.
    pub fn release(self: &Arc<Self>, h: &Handle) -> Option<NonZeroI32> {
        let mut st = h.file.state.write();
        self.forget_unseen(h, &mut st);
        // Not committed by a close: written through a memory map, or its last copy was closed by another process.
        let written = h.dirty.load(Ordering::Acquire);
        Self::unmark(h, &mut st);
        st.opens = st.opens.saturating_sub(1);
        if h.writes() {
            st.writers = st.writers.saturating_sub(1);
        }
        let registered = if st.opens == 0 { st.kernel.take() } else { None };
        let mut commits = false;
        match st.phase {
            Phase::Staged if st.writers == 0 || written => {
                st.owe();
                commits = matches!(h.policy.durability, Durability::Always | Durability::Close);
            }
            Phase::Clean if st.opens == 0 => Self::close_if_idle(&mut st),
            Phase::Orphan if st.opens == 0 => self.drop_orphan(&h.file, &mut st),
            _ => {}
        }
        drop(st);
        if commits {
            self.commit_quietly(&h.file, State::owes);
        }
        registered
    }

    /// Lets go of the open version when nothing needs it.
    pub(super) fn close_if_idle(st: &mut State) {
        let idle = st.version.as_ref().is_none_or(|v| v.dirty_ms.load(Ordering::Acquire) == 0);
        if st.opens == 0 && idle {
            st.version = None;
        }
    }

    fn drop_orphan(&self, file: &Arc<File>, st: &mut State) {
        self.unsettled.lock().remove(&file.tag);
        if st.pin.is_some() || st.anchor.is_none() {
            st.version = None;
        }
    }

    /// Locks a file that is to be submitted, once the acknowledged saves of its directories are, in their order: so it
    /// does not overtake them. They share its batch, so they cost no flush. The file itself keeps its place among them.
    /// Called without any state locked.
    pub(super) fn write_in_order<'a>(self: &Arc<Self>, file: &'a File) -> RwLockWriteGuard<'a, State> {
        loop {
            let dirs: Vec<_> = file.state.read().names.iter().map(|p| p.dir.clone()).collect();
            let same = |st: &State| st.names.iter().map(|p| Arc::as_ptr(&p.dir)).eq(dirs.iter().map(Arc::as_ptr));
            let debts = self.acknowledged_in(&dirs.iter().collect::<Vec<_>>());
            let so_far = debts.so_far;
            for other in &debts.files {
                self.commit_if(other, |st| st.owes_before(so_far), Done::nobody());
            }
            let st = file.state.write();
            // Acknowledged only now, it may come after others that were not looked for; so it may where it was moved to.
            if same(&st) && (!st.owes() || st.owed_nth < so_far) {
                return st;
            }
        }
    }

    /// Submits what is not durable of the file, if `still` holds: since the caller looked, the file may have been committed
    /// and a program be in the middle of its next version. Joins a commit that runs.
    pub(super) fn commit_if(self: &Arc<Self>, file: &Arc<File>, still: impl Fn(&State) -> bool, done: Done) {
        self.submit_if(file, file.state.write(), still, done);
    }

    fn submit_if(
        self: &Arc<Self>,
        file: &Arc<File>,
        mut st: RwLockWriteGuard<'_, State>,
        still: impl Fn(&State) -> bool,
        done: Done,
    ) {
        let answer = if st.phase == Phase::Committing || still(&st) {
            self.submit(file, &mut st, false, done)
        } else {
            Some((done, Ok(())))
        };
        drop(st);
        give(answer);
    }

    /// Submits whatever of the file is not durable. Returns an answer to give at once when nothing is.
    /// Called with the state locked; the caller gives the answer after unlocking.
    pub(super) fn submit(self: &Arc<Self>, file: &Arc<File>, st: &mut State, data_only: bool, done: Done) -> Answer {
        match st.phase {
            Phase::Committing => {
                st.waiting.get_mut().get_or_insert_default().joined.push(done);
                None
            }
            Phase::Orphan => {
                let lost = st.version.as_ref().and_then(|v| v.failed.late());
                let lost = lost.map(|e| CommitError::at(Step::Data, Fault::Os(e)));
                Some((done, lost.map_or(Ok(()), Err)))
            }
            Phase::Staged => self.submit_stage(file, st, done),
            Phase::Clean => {
                st.unsynced.take_if(|u| u.0.is_synced_upto(u.1));
                let dir = st.unsynced.as_ref().map(|u| Work::SyncDir(u.0.clone()));
                let done_already = |v: &&Arc<Version>| if data_only { v.is_synced() } else { v.is_durable() };
                let version = st.version.as_ref().filter(|v| !done_already(v)).cloned();
                let content = version.map(|version| Work::SyncFile { file: file.clone(), version, data_only });
                let names = if content.is_none() && !data_only { st.names.as_slice() } else { &[] };
                // An fsync of the inode takes a rename of it along; where there is none, its names are still to be durable.
                let names = names.iter().filter(|p| !p.dir.is_synced()).map(|p| Work::SyncDir(p.dir.clone()));
                self.send_all([dir, content].into_iter().flatten().chain(names).collect(), done)
            }
        }
    }

    fn submit_stage(self: &Arc<Self>, file: &Arc<File>, st: &mut State, done: Done) -> Answer {
        let unusable = || Err(CommitError::at(Step::Queue, Fault::Os(Errno::IO)));
        let Ok(version) = st.open_version().cloned() else { return Some((done, unusable())) };
        let place = st.names.first().cloned();
        if place.is_none() && version.overlaid().is_none() {
            return Some((done, unusable()));
        }
        if let Err(e) = st.go(Event::Submit) {
            return Some((done, Err(CommitError::at(Step::Queue, Fault::Os(e)))));
        }
        if let Some(e) = version.failed.errno() {
            // A write failed and the program closed regardless: what there is would be a prefix.
            let error = CommitError::at(Step::Data, Fault::Os(e));
            self.fail(file, st, &version, &error);
            return Some((done, Err(error)));
        }
        let (file, method) = (file.clone(), st.policy.method);
        let work = match place {
            Some(place) if version.overlaid().is_none() => {
                Work::Publish { file, version: version.clone(), place, replaces: st.id.is_some(), method }
            }
            _ => Work::Journal { file, version: version.clone(), names: st.names.clone() },
        };
        let ticket = self.ticket(work, done);
        if st.owes() || !waits_at_close(st.policy) {
            // In the order of the debts, that there are or may be.
            self.enqueue(ticket);
        } else {
            let me = self.clone();
            self.when_written_out(&version, move || me.enqueue(ticket));
        }
        None
    }

    /// Queues operations that are answered together; gives the answer back when there are none.
    fn send_all(self: &Arc<Self>, work: Vec<Work>, done: Done) -> Answer {
        if work.is_empty() {
            return Some((done, Ok(())));
        }
        let all = Countdown::new(work.len(), move |r| done.answer(r));
        for work in work {
            let all = all.clone();
            self.send(work, Done::new(move |r| all.one(r)));
        }
        None
    }

    /// Queues an operation. When the queue is full, the program that waits for the answer waits for a place too; the
    /// thread that serves the kernel goes on.
    pub fn send(self: &Arc<Self>, work: Work, done: Done) {
        self.enqueue(self.ticket(work, done));
    }

    fn ticket(self: &Arc<Self>, work: Work, done: Done) -> Ticket {
        Counters::add(&self.counters.in_flight, 1);
        let at = Instant::now();
        let me = self.clone();
        let whose = done.whose();
        let done = Done::new(move |r| {
            Counters::sub(&me.counters.in_flight, 1);
            me.commit_latency.record(at.elapsed());
            done.answer(r);
        })
        .by(whose);
        Ticket { work, done, at }
    }

    fn enqueue(&self, ticket: Ticket) {
        if !self.queue.submit(ticket) {
            Counters::add(&self.counters.queue_full_waits, 1);
        }
    }

    /// Runs `work` when the commit of the file that runs now has ended, and a version that was acknowledged is in its
    /// place; at once when there is neither.
    pub fn park(self: &Arc<Self>, file: &File, work: Parked) {
        let mut st = file.state.write();
        if st.phase == Phase::Committing {
            st.waiting.get_mut().get_or_insert_default().parked.push(work);
            return;
        }
        let dirs = if st.owes_version() { st.owed_in.to_vec() } else { Vec::new() };
        drop(st);
        self.settle_names(self.acknowledged_in(&dirs.iter().collect::<Vec<_>>()), work);
    }

    /// Commits a file, after what was acknowledged before in its directory: `done` gets the result.
    pub fn commit(self: &Arc<Self>, file: &Arc<File>, done: Done) {
        self.submit_if(file, self.write_in_order(file), |_| true, done);
    }

    /// As [`Engine::commit`], if the file is `still` to be committed then; nobody waits.
    pub(super) fn commit_quietly(self: &Arc<Self>, file: &Arc<File>, still: impl Fn(&State) -> bool) {
        self.submit_if(file, self.write_in_order(file), still, Done::nobody());
    }

    /// Commits what is owed and then calls `then` with the first error, if any.
    pub fn pay_all(self: &Arc<Self>, debts: Debts, then: impl FnOnce(Outcome) + Send + 'static) {
        self.commit_all(debts.files, |st| st.owes_before(debts.so_far), then);
    }

    /// Commits those files that are `still` to be committed then, and calls `then` with the first error, if any.
    pub(super) fn commit_all(
        self: &Arc<Self>,
        files: VecDeque<Arc<File>>,
        still: impl Fn(&State) -> bool,
        then: impl FnOnce(Outcome) + Send + 'static,
    ) {
        let all = Countdown::new(files.len() + 1, then);
        for file in files {
            let all = all.clone();
            self.commit_if(&file, &still, Done::new(move |r| all.one(r)));
        }
        all.one(Ok(()));
    }

    /// The acknowledged saves in these directories whose commit is still to come: they come before any operation on
    /// names there. A file with links elsewhere brings along what comes before it there.
    pub fn acknowledged_in(&self, dirs: &[&Arc<Dir>]) -> Debts {
        let so_far = owed_so_far();
        if dirs.iter().all(|d| d.owed.load(Ordering::Acquire) == 0) {
            return Debts { files: VecDeque::new(), so_far };
        }
        let mut dirs: Vec<Arc<Dir>> = dirs.iter().map(|d| (*d).clone()).collect();
        let mut found: BTreeMap<u64, Arc<File>> = BTreeMap::new();
        let mut next = 0;
        while let Some(dir) = dirs.get(next).cloned() {
            next += 1;
            if dir.owed.load(Ordering::Acquire) == 0 {
                continue;
            }
            let staged: Vec<_> = dir.staged.lock().values().cloned().collect();
            for file in staged {
                let st = file.state.read();
                if st.owes_before(so_far) {
                    let more = st.owed_in.iter().filter(|d| !dirs.iter().any(|known| Arc::ptr_eq(d, known)));
                    let more: Vec<_> = more.cloned().collect();
                    dirs.extend(more);
                    found.insert(st.owed_nth, file.clone());
                }
            }
        }
        Debts { files: found.into_values().collect(), so_far }
    }

    /// The version was published: it is the committed one now. `synced`: and its directory was synced since. Gives those who
    /// joined the commit, who are still to be answered.
    #[must_use]
    pub(super) fn published(
        &self,
        file: &Arc<File>,
        version: &Arc<Version>,
        place: &Place,
        new: Published,
        synced: bool,
    ) -> Vec<Done> {
        let mut st = file.state.write();
        let old = st.id.replace(version.id);
        st.anchor = Some(new.anchor);
        // It held the inode that is replaced, since a removal or rename that failed or took another of its names.
        st.pin = None;
        st.ctime = new.ctime.map(Box::new);
        if st.go(Event::Published).is_err() {
            return Vec::new();
        }
        st.paid();
        st.unsynced = (!synced).then(|| Box::new((place.dir.clone(), place.dir.changes())));
        version.mark_synced(version.changes.load(Ordering::Acquire));
        self.end_stage(version);
        // In this order: a lookup that read the old identity sees the new count and starts again.
        place.dir.published.fetch_add(1, Ordering::AcqRel);
        self.observer().published(file, old, version.id);
        self.unclaim(file, place);
        Self::close_if_idle(&mut st);
        self.settled(file, st)
    }

    /// The commit failed before it was published.
    pub(super) fn commit_failed(&self, file: &Arc<File>, version: &Arc<Version>, error: &CommitError) {
        let mut st = file.state.write();
        self.fail(file, &mut st, version, error);
        answer_all(self.settled(file, st), &Err(error.clone()));
    }

    /// Ends a commit: what was parked goes on. Gives those who joined it, who are still to be answered.
    #[must_use]
    pub(super) fn settled(&self, file: &Arc<File>, mut st: RwLockWriteGuard<'_, State>) -> Vec<Done> {
        let waiting = st.waiting.get_mut().take().unwrap_or_default();
        if st.version.as_ref().is_none_or(|v| v.dirty_ms.load(Ordering::Acquire) == 0) {
            self.unsettled.lock().remove(&file.tag);
            self.observer().settled(file.tag);
        }
        drop(st);
        for parked in waiting.parked {
            self.workers.run(parked);
        }
        self.idle.notify_all();
        waiting.joined
    }

    pub(super) fn unclaim(&self, file: &Arc<File>, place: &Place) {
        let mut staged = place.dir.staged.lock();
        if staged.get(&place.name).is_some_and(|f| Arc::ptr_eq(f, file)) {
            staged.remove(&place.name);
        }
        if staged.is_empty() {
            if staged.capacity() > STAGED_KEPT {
                staged.shrink_to_fit();
            }
            drop(staged);
            self.observer().settled(place.dir.tag);
        }
    }

    /// In phase `Committing`: the previous version stands, the failed one is kept and named.
    fn fail(&self, file: &Arc<File>, st: &mut State, version: &Arc<Version>, error: &CommitError) {
        let (had_old, new_inode, names) = (st.id.is_some(), st.is_new_inode(), st.names.clone());
        if st.go(if had_old { Event::FailedOld } else { Event::FailedNew }).is_err() {
            return;
        }
        st.failures += 1;
        st.owed_in.iter().for_each(|dir| *dir.lost.lock() = Some(error.errno()));
        st.lost = st.owes().then(|| error.errno());
        st.paid();
        self.unsettled.lock().remove(&file.tag);
        st.unflushed = 0;
        self.end_stage(version);
        self.keep_failed(version, names.first(), error);
        version.dirty_ms.store(0, Ordering::Release);
        names.iter().for_each(|place| self.unclaim(file, place));
        if new_inode {
            self.observer().discarded(file, version.id);
        }
        if had_old {
            st.version = None;
            let writable = st.writers > 0;
            if st.opens > 0
                && let Err(e) = contain(|| self.ensure_version(st, writable))
            {
                tracing::error!(path = %path_of(names.first()), error = %e, "the previous version cannot be opened");
            }
        } else {
            st.names.clear();
        }
        let name = names.first().filter(|_| !had_old).map(|p| (p.dir.tag, p.name.clone()));
        self.observer().behind(Behind { tag: file.tag, name });
    }

    /// Links the failed version into `.fsys/failed` and names it in log, status and metrics.
    fn keep_failed(&self, version: &Version, place: Option<&Place>, error: &CommitError) {
        let path = path_of(place);
        let base = place.map(|p| p.name.to_string_lossy().into_owned()).unwrap_or_default();
        let base: String = base.chars().filter(|c| !c.is_control()).take(48).collect();
        let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        let mut name = format!("{stamp}-{base}");
        let kept = match version.overlaid() {
            Some(overlay) => contain(|| self.keep_overlay(version, overlay, &mut name)),
            None => contain(|| self.backing.keep(version.fd(), version.temp.lock().as_deref(), &name)),
        };
        Counters::add(&self.counters.commit_failures, 1);
        let kept_as = match &kept {
            Ok(()) => name,
            Err(_) => String::new(),
        };
        tracing::error!(
            %path, step = %error.failed_at, cause = %error.source, kept = %kept_as,
            keep_error = kept.err().map(|e| e.to_string()),
            "commit failed: the previous version stands; free space or check the device, then save again"
        );
        self.note_failed(path, kept_as, error);
    }

    /// At the end of the mount: a version that a program was still writing is kept, not published.
    pub(super) fn keep_unfinished_version(&self, version: &Version, place: Option<&Place>) {
        let error = CommitError::at(Step::Queue, Cause::Shutdown);
        self.keep_failed(version, place, &error);
    }

    /// The result of a sync of writes in place. What the kernel could not write it forgets, and says so once: so nobody who
    /// had the file open is ever told that it is durable.
    pub(super) fn file_synced(&self, f: &InPlace, r: &Outcome) {
        let mut st = f.file.state.write();
        match r {
            Ok(()) if f.version.mark_synced(f.upto) => {
                f.version.data_only.store(f.data_only, Ordering::Release);
                let current = st.version.as_ref().is_some_and(|v| v.id == f.version.id && v.is_synced());
                if current && !st.is_staged() {
                    st.paid();
                    self.unsettled.lock().remove(&f.file.tag);
                    Self::close_if_idle(&mut st);
                    self.observer().settled(f.file.tag);
                }
            }
            Ok(()) => {}
            Err(e) => {
                st.failures += 1;
                let place = st.names.first().cloned();
                drop(st);
                self.lost_in_place(place.as_ref(), e);
            }
        }
        self.idle.notify_all();
    }

    /// Counts and names a failed sync of writes in place.
    fn lost_in_place(&self, place: Option<&Place>, e: &CommitError) {
        Counters::add(&self.counters.commit_failures, 1);
        let path = path_of(place);
        tracing::error!(
            %path, step = %e.failed_at, cause = %e.source,
            "writes in place may not have reached the device: programs that have the file open get EIO; check it"
        );
        self.note_failed(path, String::new(), e);
    }
}

/// A name for people.
pub(super) fn path_of(place: Option<&Place>) -> String {
    place.map_or_else(|| "a file without a known name".into(), |p| p.path().display().to_string())
}

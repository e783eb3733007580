//! Time: what has to become durable within the commit interval, waiting for all of it, and the end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::Engine;
use super::dispatch::{Done, Work};
use super::file::{File, State};
use super::state::Phase;

/// A version whose program keeps it open is committed when it was quiet for one interval, or after this many
/// intervals even if it is written all the time: a log must reach the disk, a long copy should stay whole.
const OPEN_INTERVALS: u64 = 12;

impl Engine {
    /// The ticker thread.
    pub(super) fn tick_until(self: &Arc<Self>, stop: &Receiver<()>) {
        let interval = || self.config().limits.commit_interval();
        let period = || (interval() / 5).clamp(Duration::from_millis(5), Duration::from_secs(1));
        // What is published early waited for a part of the interval already.
        let names_interval = || if self.publishes_early() { interval() / 2 } else { interval() };
        let mut names_due = Instant::now() + names_interval();
        while stop.recv_timeout(period()) == Err(RecvTimeoutError::Timeout) {
            // It can have changed meanwhile.
            let interval = interval();
            names_due = names_due.min(Instant::now() + names_interval());
            self.look_at_unseen(false);
            let now = self.now_ms();
            let due = |st: &State| is_due(st, now, interval.as_millis() as u64);
            for file in self.unsettled_files().iter().filter(|f| due(&f.state.read())) {
                self.commit_quietly(file, due);
            }
            if Instant::now() >= names_due {
                names_due = Instant::now() + names_interval();
                self.sync_names();
                self.checkpoint_soon();
            }
        }
    }

    /// Submits a sync of every directory with names that are not durable yet.
    fn sync_names(self: &Arc<Self>) {
        let dirs: Vec<_> = {
            let mut dirty = self.dirty_dirs.lock();
            dirty.retain(|_, d| !d.is_synced());
            // Until they are synced or dirty again, they are counted here: a drain must not miss them in between.
            self.names_in_flight.fetch_add(dirty.len() as u64, Ordering::AcqRel);
            dirty.drain().map(|(_, d)| d).collect()
        };
        for dir in dirs {
            let me = self.clone();
            let again = dir.clone();
            let done = Done::new(move |r| {
                let mut dirty = me.dirty_dirs.lock();
                if r.is_err() || !again.is_synced() {
                    dirty.insert(again.tag, again.clone());
                }
                me.names_in_flight.fetch_sub(1, Ordering::AcqRel);
                drop(dirty);
                me.idle.notify_all();
            });
            self.send(Work::SyncDir(dir), done);
        }
    }

    /// Directories with names that are not durable.
    fn names_left(&self) -> u64 {
        let dirty = self.dirty_dirs.lock();
        dirty.len() as u64 + self.names_in_flight.load(Ordering::Acquire)
    }

    /// Makes everything durable that a program was told is done; `Err` with the number of files and directories left
    /// when that takes longer than `limit` or the mount is read-only.
    pub fn drain(self: &Arc<Self>, limit: Duration) -> Result<(), u64> {
        let deadline = Instant::now() + limit;
        self.look_at_unseen(true);
        // One checkpoint from here on, not an empty journal: others may fill it all the time.
        let before = self.counters.checkpoints.load(Ordering::Relaxed);
        let journal = || self.journal.holds() && self.counters.checkpoints.load(Ordering::Relaxed) == before;
        loop {
            self.unsettled_files().iter().filter(|f| owes(&f.state.read())).for_each(|f| self.commit_quietly(f, owes));
            self.sync_names();
            if journal() {
                self.checkpoint_soon();
            }
            let left = || {
                let files = self.unsettled_files().iter().filter(|f| owes(&f.state.read())).count();
                files as u64
                    + u64::from(journal())
                    + self.names_left()
                    + self.counters.in_flight.load(Ordering::Relaxed)
            };
            if left() == 0 {
                return Ok(());
            }
            let mut guard = self.idle_lock.lock();
            self.idle.wait_until(&mut guard, deadline.min(Instant::now() + Duration::from_millis(20)));
            drop(guard);
            if Instant::now() >= deadline || self.writable().is_err() {
                return match left() {
                    0 => Ok(()),
                    n => Err(n),
                };
            }
        }
    }

    /// The end of the mount: commits what programs finished, keeps in `.fsys/failed` what one was in the middle of,
    /// and stops all threads. Returns what could not be made durable in time.
    pub fn shutdown(self: &Arc<Self>, limit: Duration) -> Result<(), u64> {
        self.stop.lock().take();
        let files = self.unsettled_files();
        let closed = |st: &State| st.unflushed == 0 && !is_begun(st);
        files.iter().filter(|f| closed(&f.state.read())).for_each(|f| self.commit_quietly(f, closed));
        let drained = self.drain(limit);
        self.keep_unfinished();
        self.readers.stop();
        self.writers.stop();
        self.workers.stop();
        self.pieces.stop();
        self.queue.close();
        for t in self.threads.lock().drain(..) {
            if t.join().is_err() {
                tracing::error!("an engine thread panicked");
            }
        }
        match drained {
            // Nothing may depend on `.fsys` once it is unmounted.
            Ok(()) if self.checkpoint().is_err() => Err(1),
            r => r,
        }
    }

    fn keep_unfinished(&self) {
        for file in self.unsettled_files() {
            let st = file.state.read();
            if let (Phase::Staged, Some(v)) = (st.phase, &st.version) {
                self.keep_unfinished_version(v, st.names.first());
            }
        }
    }

    /// A copy, so that no state is looked at while the set is locked: everywhere else the state comes first.
    pub(super) fn unsettled_files(&self) -> Vec<Arc<File>> {
        self.unsettled.lock().values().cloned().collect()
    }
}

/// Whether a program was told that its change is done, and it is not durable yet.
fn owes(st: &State) -> bool {
    match st.phase {
        Phase::Committing => true,
        Phase::Staged => st.owes() || st.writers == 0,
        Phase::Clean => st.version.as_ref().is_some_and(|v| v.dirty_ms.load(Ordering::Acquire) != 0),
        Phase::Orphan => false,
    }
}

/// A program emptied the file to rewrite it and has not written yet: that is no version, the old one stands.
fn is_begun(st: &State) -> bool {
    let empty = || st.version.as_ref().is_some_and(|v| v.stat().is_ok_and(|st| st.st_size == 0));
    st.phase == Phase::Staged && st.id.is_some() && st.writers > 0 && !st.owes() && empty()
}

fn is_due(st: &State, now: u64, interval: u64) -> bool {
    let Some(v) = &st.version else { return false };
    let since = v.dirty_ms.load(Ordering::Relaxed);
    if since == 0 {
        return false;
    }
    let age = now.saturating_sub(since);
    let quiet = now.saturating_sub(v.last_write_ms.load(Ordering::Relaxed));
    match st.phase {
        // Ahead of the bound by the time that a commit may take.
        Phase::Clean => age >= interval * 4 / 5,
        Phase::Staged if st.owes() => age >= interval * 4 / 5,
        // Nothing was written yet: the program is still at it, however long that takes.
        Phase::Staged if v.is_untouched() => false,
        Phase::Staged => quiet >= interval || age >= interval * OPEN_INTERVALS,
        Phase::Committing | Phase::Orphan => false,
    }
}

//! Publication ahead of the barrier, for saves that nobody waits for.
//!
//! At the levels `fsync` and `relaxed` a program was told that its save is done, and the commit is still to come. An
//! operation on names in that directory has to come after it (P4), but not after its flush: where the file system keeps
//! the order of names and of data that was written out before them (strategy [`Strategy::OneBarrier`]), it is enough to
//! write the data out and publish. The next sync of the directory makes it durable, within the commit interval, like
//! any other change of a name. So nobody holds the kernel's lock of a directory for the length of a barrier, and a
//! program that saves very much waits for none.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::io::Errno;

use super::Engine;
use super::activity::StepTimes;
use super::commit::Debts;
use super::dir::Place;
use super::dispatch::{CommitError, Done, Step, Work};
use super::file::{File, Parked, Version};
use super::state::{Event, Phase};
use crate::backend::probe::Strategy;
use crate::backend::{Fault, contain};
use crate::telemetry::Counters;

/// A version on its way.
struct Early {
    file: Arc<File>,
    version: Arc<Version>,
    place: Place,
    replaces: bool,
}

/// What a file that owes a commit has to do with an early publication.
enum Taken {
    /// It is in phase `Committing` now, and to be published here.
    Here(Early),
    /// It owes nothing any more.
    Paid,
    /// It needs the dispatcher, or is with it.
    Elsewhere,
}

impl Engine {
    /// Whether the file system keeps the order that an early publication needs.
    pub(super) fn publishes_early(&self) -> bool {
        self.backing.probe().strategy == Strategy::OneBarrier
    }

    /// Brings acknowledged saves into their place, in their order, and then runs `then` on a worker. They are published
    /// where that is enough, and committed otherwise.
    pub fn settle_names(self: &Arc<Self>, debts: Debts, then: Parked) {
        let me = self.clone();
        if self.publishes_early() {
            self.workers.run(Box::new(move || me.publish_early(debts, then)));
        } else {
            // A failed save is reported where it belongs; it does not stop an operation on another name.
            self.pay_all(debts, move |_| me.run_later(then));
        }
    }

    fn publish_early(self: Arc<Self>, mut debts: Debts, then: Parked) {
        let stopped_at = {
            // The dispatcher publishes nothing meanwhile: what was submitted since comes later.
            let _order = self.publishing.lock();
            let mut group = Vec::new();
            let mut stopped_at = None;
            while let Some(file) = debts.files.pop_front() {
                match self.take_early(&file, debts.so_far) {
                    Taken::Here(e) => group.push(e),
                    Taken::Paid => {}
                    Taken::Elsewhere => {
                        stopped_at = Some(file);
                        break;
                    }
                }
            }
            self.publish_group(&group);
            stopped_at
        };
        let Some(file) = stopped_at else { return then() };
        let (me, so_far) = (self.clone(), debts.so_far);
        let rest = move |_| {
            let again = me.clone();
            me.run_later(Box::new(move || again.publish_early(debts, then)));
        };
        self.commit_if(&file, |st| st.owes_before(so_far), Done::new(rest));
    }

    fn take_early(&self, file: &Arc<File>, so_far: u64) -> Taken {
        let mut st = file.state.write();
        if !st.owes_before(so_far) {
            return Taken::Paid;
        }
        let (Phase::Staged, Some(version), Some(place)) = (st.phase, st.version.clone(), st.names.first().cloned())
        else {
            return Taken::Elsewhere;
        };
        // The directory is synced within half an interval: an older version would be durable too late.
        let age = self.now_ms().saturating_sub(version.dirty_ms.load(Ordering::Relaxed));
        let late = u128::from(age) > self.config().limits.commit_interval().as_millis() * 3 / 10;
        let special = version.overlaid().is_some() || version.failed.errno().is_some() || self.writable().is_err();
        if late || special || !self.is_written_out(st.policy.method) || st.go(Event::Submit).is_err() {
            return Taken::Elsewhere;
        }
        Taken::Here(Early { file: file.clone(), version, place, replaces: st.id.is_some() })
    }

    fn publish_group(self: &Arc<Self>, group: &[Early]) {
        let (began, mut times) = (Instant::now(), StepTimes::begin());
        let fds: Vec<_> = group.iter().map(|e| e.version.fd()).collect();
        let written = self.backing.write_out(&fds);
        times.end(Step::Data);
        for (e, written) in group.iter().zip(written) {
            let failed = |step, fault: Fault| {
                self.count_panic(&fault);
                self.commit_failed(&e.file, &e.version, &CommitError::at(step, fault));
            };
            let data = written.and_then(|()| Ok(e.version.settled()?));
            if let Err(fault) = data {
                failed(Step::Data, fault);
                continue;
            }
            let publish = || {
                // Once the device failed a flush nothing is published any more.
                self.writable().map_err(|_| Errno::IO)?;
                self.publish(&e.version, &e.place, e.replaces)
            };
            match contain(publish) {
                Ok(new) => {
                    Counters::add(&self.counters.commits, 1);
                    Counters::add(&self.counters.early_publications, 1);
                    self.owe_sync(&e.place.dir);
                    times.end(Step::Publish);
                    self.note_commit(&e.file, Some(&e.place), began, &times, true);
                    let replaced = e.version.before.lock().take();
                    let joined = self.published(&e.file, &e.version, &e.place, new, false);
                    drop(replaced);
                    // Whoever waits for this save waits for a durable one.
                    let waiting = joined.into_iter().filter(Done::is_awaited);
                    waiting.for_each(|done| self.send(Work::SyncDir(e.place.dir.clone()), done));
                }
                Err(fault) => failed(Step::Publish, fault),
            }
        }
    }
}

//! The bound of what is not committed and nobody waits for (`pending_max`): each such version holds a descriptor.
//!
//! From half of the bound on, acknowledged saves are committed in the background, so that it is reached only by programs that
//! save faster than the device takes it. At the bound a close waits for its own commit; and what leaves a version behind
//! that no close waits for (a file that stays empty, or whose attributes alone changed) waits for those before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Engine;
use super::commit::Debts;
use super::dispatch::{Countdown, Done};
use super::file::{File, nothing_is_owed, owed_so_far};

impl Engine {
    /// Whether as many versions are uncommitted as may be.
    pub(super) fn backlog_full(self: &Arc<Self>) -> bool {
        let (now, max) = (self.unsettled.lock().len(), self.config().limits.pending_max);
        if now >= max.div_ceil(2) && !nothing_is_owed() && !self.relieving.swap(true, Ordering::AcqRel) {
            let me = self.clone();
            self.workers.run(Box::new(move || me.relieve()));
        }
        now >= max
    }

    /// Brings all acknowledged saves into their place, in their order.
    fn relieve(self: Arc<Self>) {
        let so_far = owed_so_far();
        let owed = |f: Arc<File>| {
            let st = f.state.read();
            let nth = st.owes_before(so_far).then_some(st.owed_nth);
            drop(st);
            nth.map(|nth| (nth, f))
        };
        let files: BTreeMap<_, _> = self.unsettled_files().into_iter().filter_map(owed).collect();
        let debts = Debts { files: files.into_values().collect(), so_far };
        let me = self.clone();
        self.settle_names(debts, Box::new(move || me.relieving.store(false, Ordering::Release)));
    }

    /// Runs `again` on a worker when the versions that nobody has open are committed, if there are as many as there may be.
    /// Gives it back when there is room.
    pub fn after_backlog<F: FnOnce() + Send + 'static>(self: &Arc<Self>, again: F) -> Option<F> {
        let (now, max) = (self.unsettled.lock().len(), self.config().limits.pending_max);
        // Files that programs have open are not counted, as far as the last look found them.
        let in_use = self.in_use.fetch_min(now, Ordering::AcqRel).min(now);
        if !self.backlog_full() || now < in_use + max {
            return Some(again);
        }
        let (so_far, all) = (owed_so_far(), self.unsettled_files());
        let total = all.len();
        let idle = |f: Arc<File>| {
            let st = f.state.read();
            let nth = if st.owes_before(so_far) { Some(st.owed_nth) } else { (st.opens == 0).then_some(so_far) };
            drop(st);
            nth.map(|nth| (nth, f))
        };
        let mut idle: Vec<_> = all.into_iter().filter_map(idle).collect();
        self.in_use.store(total - idle.len(), Ordering::Release);
        if idle.is_empty() {
            return Some(again);
        }
        idle.sort_by_key(|(nth, _)| *nth);
        let engine = self.clone();
        let left = Countdown::new(idle.len() + 1, move |_| engine.run_later(Box::new(again)));
        for (_, file) in idle {
            let left = left.clone();
            let done = Done::new(move |r| left.one(r));
            self.commit_if(&file, |st| st.owes_before(so_far) || st.opens == 0, done);
        }
        left.one(Ok(()));
        None
    }
}

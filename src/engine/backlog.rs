//! The bound of what is not committed and nobody waits for (`pending_max`): each such version holds a descriptor.
//!
//! From half of the bound on, acknowledged saves are committed in the background, so that it is reached only by programs that
//! save faster than the device takes it. At the bound a close waits for its own commit; and what leaves a version behind
//! that no close waits for (a file that stays empty, or whose attributes alone changed) waits for those before.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Engine;
use super::commit::Debts;
use super::file::{File, State, nothing_is_owed, owed_so_far};

impl Engine {
    /// How many versions are uncommitted, and how many may be.
    fn backlog(self: &Arc<Self>) -> (usize, usize) {
        let (now, max) = (self.unsettled.lock().len(), self.config().limits.pending_max);
        if now >= max.div_ceil(2) && !nothing_is_owed() && !self.relieving.swap(true, Ordering::AcqRel) {
            let me = self.clone();
            self.workers.run(Box::new(move || me.relieve()));
        }
        (now, max)
    }

    /// Whether as many versions are uncommitted as may be.
    pub(super) fn backlog_full(self: &Arc<Self>) -> bool {
        let (now, max) = self.backlog();
        now >= max
    }

    /// The files of these that have a number, in that order.
    fn in_order(files: Vec<Arc<File>>, number: impl Fn(&State) -> Option<u64>) -> VecDeque<Arc<File>> {
        let numbered = |f: Arc<File>| {
            let nth = number(&f.state.read());
            nth.map(|nth| (nth, f))
        };
        let mut files: Vec<_> = files.into_iter().filter_map(numbered).collect();
        files.sort_by_key(|(nth, _)| *nth);
        files.into_iter().map(|(_, f)| f).collect()
    }

    /// Brings all acknowledged saves into their place, in their order.
    fn relieve(self: Arc<Self>) {
        let so_far = owed_so_far();
        let files = Self::in_order(self.unsettled_files(), |st| st.owes_before(so_far).then_some(st.owed_nth));
        let me = self.clone();
        self.settle_names(Debts { files, so_far }, Box::new(move || me.relieving.store(false, Ordering::Release)));
    }

    /// Runs `work` when there is room for another version: at once, or on a worker when those that nobody has open are
    /// committed.
    pub fn after_backlog(self: &Arc<Self>, work: impl FnOnce() + Send + 'static) {
        let (now, max) = self.backlog();
        // Files that programs have open are not counted, as far as the last look found them.
        let in_use = self.in_use.fetch_min(now, Ordering::AcqRel).min(now);
        if now < in_use + max {
            return work();
        }
        let (so_far, all) = (owed_so_far(), self.unsettled_files());
        let total = all.len();
        let idle = Self::in_order(all, |st| {
            if st.owes_before(so_far) { Some(st.owed_nth) } else { (st.opens == 0).then_some(so_far) }
        });
        self.in_use.store(total - idle.len(), Ordering::Release);
        if idle.is_empty() {
            return work();
        }
        let engine = self.clone();
        let still = move |st: &State| st.owes_before(so_far) || st.opens == 0;
        self.commit_all(idle, still, move |_| engine.run_later(Box::new(work)));
    }
}

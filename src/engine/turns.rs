//! Turns of the programs that save properly: write a temporary file, fsync it, rename it, fsync the directory.
//!
//! The kernel locks a directory for the length of its fsync, so nobody creates or renames there meanwhile; and that fsync
//! finds nothing to do only when no name changed since the last barrier. Left alone, the renames of some programs and the
//! syncs of others mix, and nearly every sync pays a barrier of its own while all the others wait. So programs whose files
//! were saved together are told so together, and the next ones when all of those have come to sync the directory:
//! their syncs follow one another and share one barrier, and so do the next saves.
//!
//! Nobody says that a program will sync the directory. It is expected where programs do. A turn lasts eight windows at
//! most (and the batch that runs then), and where one did not come within that, it is given up for a while.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::dir::Dir;
use super::dispatch::{Done, Outcome};
use crate::backend::contain;

/// Bounds of the trust that an fsync of a new file is followed by one of its directory: above 0 it is expected. One that
/// came gains 1, and a turn in which one did not come costs [`TRUST_LOST`].
const TRUST_LEAST: i8 = -16;
const TRUST_MOST: i8 = 8;
const TRUST_LOST: i8 = 4;
/// So many threads are remembered where nobody waits for them.
const DUE_MOST: usize = 256;

/// A thread that waits for its turn, and what it is to be told.
pub(super) struct Waiting {
    /// The thread.
    pub tid: NonZeroU32,
    /// Its fsync.
    pub done: Done,
    /// What became of that.
    pub outcome: Outcome,
}

/// Whose turn it is in one directory.
#[derive(Default)]
pub(super) struct Turn {
    trust: i8,
    /// The threads that were told that their new file is saved and have not synced the directory since; they are waited
    /// for only with trust.
    due: HashSet<NonZeroU32>,
    /// When their turn ends, whoever came.
    ends: Option<Instant>,
    /// Those whose turn is next.
    next: Vec<Waiting>,
}

impl std::fmt::Debug for Turn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Turn").field("trust", &self.trust).field("due", &self.due).finish_non_exhaustive()
    }
}

impl Turn {
    /// A thread comes to sync the directory.
    fn came(&mut self, tid: u32, now: Instant) {
        self.end_when_over(now);
        // Who only syncs says nothing about those who save.
        if NonZeroU32::new(tid).is_some_and(|tid| self.due.remove(&tid)) {
            self.trust = (self.trust + 1).min(TRUST_MOST);
        }
    }

    fn lose_trust(&mut self, by: i8) {
        self.trust = (self.trust - by).max(TRUST_LEAST);
    }

    fn is_due(&self) -> bool {
        self.trust > 0 && !self.due.is_empty()
    }

    fn end_when_over(&mut self, now: Instant) {
        if self.ends.is_some_and(|ends| now >= ends) {
            if self.is_due() {
                self.lose_trust(TRUST_LOST);
            }
            self.due.clear();
            self.ends = None;
        }
    }

    /// A thread saved a file. Gives those that are to be told now.
    fn saved(&mut self, who: Waiting, now: Instant, length: Duration) -> Vec<Waiting> {
        if self.due.remove(&who.tid) {
            // Another file, and no sync in between.
            self.lose_trust(1);
        }
        self.next.push(who);
        self.take_next(now, length)
    }

    /// Those whose turn begins now, when the one before is over.
    fn take_next(&mut self, now: Instant, length: Duration) -> Vec<Waiting> {
        self.end_when_over(now);
        if self.is_due() || self.next.is_empty() {
            return Vec::new();
        }
        if self.due.len() >= DUE_MOST {
            self.due.clear();
        }
        self.due.extend(self.next.iter().map(|w| w.tid));
        self.ends = Some(now + length);
        std::mem::take(&mut self.next)
    }
}

/// A panic in one answer is that one's.
fn tell(all: Vec<Waiting>) {
    for w in all {
        if let Err(fault) = contain(|| {
            w.done.answer(w.outcome);
            Ok(())
        }) {
            tracing::error!(%fault, "an answer panicked; the others go on");
        }
    }
}

impl Dir {
    /// Whether a thread other than `tid` is probably about to sync it.
    pub(super) fn is_sync_due(&self, tid: NonZeroU32) -> bool {
        let mut turn = self.turn.lock();
        turn.end_when_over(Instant::now());
        turn.is_due() && turn.due.iter().any(|t| *t != tid)
    }

    /// A thread comes to sync it.
    pub(super) fn sync_came(&self, tid: u32) {
        self.turn.lock().came(tid, Instant::now());
    }

    /// Tells those whose turn it is; it ends after `length`.
    pub(super) fn next_turn(&self, length: Duration) {
        let next = self.turn.lock().take_next(Instant::now(), length);
        tell(next);
    }
}

/// The directories where somebody waits for a turn.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<Vec<Arc<Dir>>>);

impl Turns {
    /// A new file in `dir` is saved: tells the thread that waits for it, now or when it is its turn. A turn that begins
    /// now ends after `length`.
    pub fn saved(&self, dir: &Arc<Dir>, who: Waiting, length: Duration) {
        let now = dir.turn.lock().saved(who, Instant::now(), length);
        if !now.is_empty() {
            return tell(now);
        }
        let mut waiting = self.0.lock();
        if !waiting.iter().any(|d| Arc::ptr_eq(d, dir)) {
            waiting.push(dir.clone());
        }
    }

    /// Ends the turns that are over. `None` when nobody waits for one, else when to look again.
    pub fn end_overdue(&self, length: Duration) -> Option<Duration> {
        let now = Instant::now();
        let (mut again, mut told) = (None, Vec::new());
        self.0.lock().retain(|dir| {
            let mut turn = dir.turn.lock();
            told.extend(turn.take_next(now, length));
            if let Some(ends) = turn.ends.filter(|_| !turn.next.is_empty()) {
                again = again.min(Some(ends)).or(Some(ends));
            }
            !turn.next.is_empty()
        });
        tell(told);
        again.map(|at: Instant| at.saturating_duration_since(now))
    }

    /// Tells all that wait.
    pub fn end_all(&self) {
        let all = std::mem::take(&mut *self.0.lock());
        for dir in all {
            let next = std::mem::take(&mut dir.turn.lock().next);
            tell(next);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::backend::{Anchor, FileId};

    const LENGTH: Duration = Duration::from_secs(10);

    /// A directory's turns, at a time that the test sets.
    struct At(Turn, Instant);

    impl At {
        /// In which thread 9 synced just now.
        fn trusted() -> Self {
            let mut at = Self(Turn::default(), Instant::now());
            assert_eq!((at.saved(9), at.came(9)), (vec![9], vec![]));
            at
        }

        /// Who is told when this thread saved.
        fn saved(&mut self, tid: u32) -> Vec<u32> {
            let who = Waiting { tid: NonZeroU32::new(tid).unwrap(), done: Done::nobody(), outcome: Ok(()) };
            tids(&self.0.saved(who, self.1, LENGTH))
        }

        /// Who is told when this thread syncs.
        fn came(&mut self, tid: u32) -> Vec<u32> {
            self.0.came(tid, self.1);
            self.next()
        }

        fn next(&mut self) -> Vec<u32> {
            tids(&self.0.take_next(self.1, LENGTH))
        }
    }

    fn tids(all: &[Waiting]) -> Vec<u32> {
        all.iter().map(|w| w.tid.get()).collect()
    }

    #[test]
    fn nobody_waits_where_nobody_syncs() {
        let mut at = At(Turn::default(), Instant::now());
        for tid in 1..100 {
            assert_eq!(at.saved(tid), [tid]);
        }
        (1..1000).for_each(|tid| assert_eq!(at.saved(tid), [tid]));
        assert!(at.0.due.len() <= DUE_MOST);
    }

    #[test]
    fn who_saves_is_not_who_syncs() {
        let (mut at, mut held) = (At::trusted(), 0);
        for round in 0..100 {
            for worker in 1..5 {
                held += usize::from(at.saved(worker).is_empty());
            }
            at.1 += LENGTH * (round % 2);
            at.next();
            at.came(8);
        }
        assert!(held <= 4, "{held}");
    }

    #[test]
    fn the_next_are_told_together_when_the_last_of_the_turn_has_come() {
        let mut at = At::trusted();
        assert_eq!(at.saved(1), [1]);
        assert!(at.saved(2).is_empty() && at.saved(3).is_empty());
        assert_eq!(at.came(1), [2, 3]);
        assert!(at.saved(4).is_empty());
        assert!(at.came(3).is_empty(), "2 is still to come");
        assert!(at.came(7).is_empty(), "nobody waits for it");
        assert_eq!(at.came(2), [4]);
    }

    #[test]
    fn who_saves_again_without_a_sync_is_not_waited_for() {
        let mut at = At::trusted();
        assert_eq!(at.saved(1), [1]);
        assert_eq!(at.saved(1), [1], "least of all by itself");
        let mut at = At::trusted();
        at.0.trust = TRUST_MOST;
        assert_eq!(at.saved(1), [1]);
        assert!(at.saved(2).is_empty());
        assert_eq!(at.saved(1), [2, 1]);
        for _ in 0..TRUST_MOST {
            at.saved(1);
            at.saved(2);
        }
        assert_eq!((at.saved(1), at.saved(2)), (vec![1], vec![2]), "trust is used up");
    }

    #[test]
    fn a_turn_ends_though_others_sync_all_the_time() {
        let mut at = At::trusted();
        at.0.trust = TRUST_MOST;
        assert_eq!(at.saved(1), [1]);
        assert!(at.saved(2).is_empty());
        for _ in 0..9 {
            at.1 += LENGTH / 10;
            assert!(at.came(9).is_empty());
        }
        assert_eq!(at.0.trust, TRUST_MOST, "who is not due gains nothing");
        at.1 += LENGTH / 10;
        assert_eq!((at.came(9), at.0.trust), (vec![2], TRUST_MOST - TRUST_LOST));
        at.1 += LENGTH;
        at.0.end_when_over(at.1);
        assert!(at.0.due.is_empty(), "nobody is waited for longer, though nobody saved since");
        assert_eq!((at.saved(3), at.saved(4)), (vec![3], vec![4]), "it is given up");
    }

    #[test]
    fn all_who_wait_are_told_by_the_dispatcher() {
        let anchor = Anchor::Fd(tempfile::tempfile().unwrap().into());
        let dir = Arc::new(Dir::new(1, FileId { dev: 0, ino: 1 }, anchor, None));
        let (turns, (tx, rx)) = (Turns::default(), mpsc::channel());
        let save = |tid, length| {
            let tx = tx.clone();
            let done = Done::new(move |r: Outcome| {
                tx.send((tid, r)).unwrap();
                assert_ne!(tid, 3, "a panic in an answer");
            });
            turns.saved(&dir, Waiting { tid: NonZeroU32::new(tid).unwrap(), done, outcome: Ok(()) }, length);
        };
        let told = || rx.try_iter().collect::<Vec<_>>();
        dir.turn.lock().trust = TRUST_MOST;
        save(1, LENGTH);
        (2..5).for_each(|tid| save(tid, LENGTH));
        assert_eq!(told(), [(1, Ok(()))]);
        let again = turns.end_overdue(LENGTH).unwrap();
        assert!(again <= LENGTH && !again.is_zero(), "not over");
        assert!(told().is_empty());
        dir.turn.lock().ends = Some(Instant::now());
        assert_eq!(turns.end_overdue(LENGTH), None, "nobody waits any more");
        assert_eq!(told(), [(2, Ok(())), (3, Ok(())), (4, Ok(()))]);
        save(5, LENGTH);
        assert!(told().is_empty());
        turns.end_all();
        assert_eq!(told(), [(5, Ok(()))], "at the end");
    }
}

//! Turns of the programs that save properly: write a temporary file, fsync it, rename it, fsync the directory.
//!
//! The kernel locks a directory for the length of its fsync, so nobody creates or renames there meanwhile; and that fsync
//! finds nothing to do only when no name changed since the last barrier. Left alone, the renames of some programs and the
//! syncs of others mix, and nearly every sync pays a barrier of its own while all the others wait. So programs whose files
//! were saved together are told so together, and the next ones when all of those have come to sync the directory:
//! their syncs follow one another and share one barrier, and so do the next saves.
//!
//! Nobody says that a program will sync the directory. It is expected where programs do, and given up for a while where
//! one did not within a few barriers.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::dir::Dir;
use super::dispatch::{Done, Outcome};

/// Bounds of the trust that a saved file is followed by a sync of its directory: above 0 it is expected. A sync gains 1,
/// and one that did not come costs [`TRUST_LOST`].
const TRUST_LEAST: i8 = -16;
const TRUST_MOST: i8 = 8;
const TRUST_LOST: i8 = 4;

/// A thread that waits for its turn, and what it is to be told.
struct Waiting {
    tid: u32,
    done: Done,
    outcome: Outcome,
}

/// Whose turn it is in one directory.
#[derive(Default)]
pub(super) struct Turn {
    trust: i8,
    /// The threads that were told that their new file is saved and have not synced the directory since.
    due: HashSet<u32>,
    /// Since when nobody came.
    since: Option<Instant>,
    /// Those whose turn is next.
    next: Vec<Waiting>,
}

impl std::fmt::Debug for Turn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Turn").field("trust", &self.trust).field("due", &self.due).finish_non_exhaustive()
    }
}

impl Turn {
    fn is_due(&self) -> bool {
        self.trust > 0 && !self.due.is_empty()
    }

    /// A thread comes to sync the directory.
    fn came(&mut self, tid: u32) {
        self.due.remove(&tid);
        self.trust = (self.trust + 1).min(TRUST_MOST);
        self.since = Some(Instant::now());
    }

    fn lose_trust(&mut self, by: i8) {
        self.trust = (self.trust - by).max(TRUST_LEAST);
        if self.trust <= 0 {
            self.due.clear();
        }
    }

    /// A thread saved a file. Gives those that are to be told now.
    fn saved(&mut self, who: Waiting) -> Vec<Waiting> {
        if self.due.remove(&who.tid) {
            // Another file, and no sync in between.
            self.lose_trust(1);
        }
        self.next.push(who);
        self.take_next()
    }

    fn missed(&mut self) -> Vec<Waiting> {
        self.lose_trust(TRUST_LOST);
        self.due.clear();
        self.take_next()
    }

    fn take_next(&mut self) -> Vec<Waiting> {
        if self.is_due() {
            return Vec::new();
        }
        if self.trust > 0 && !self.next.is_empty() {
            self.due.extend(self.next.iter().map(|w| w.tid));
            self.since = Some(Instant::now());
        }
        std::mem::take(&mut self.next)
    }
}

fn tell(all: Vec<Waiting>) {
    all.into_iter().for_each(|w| w.done.answer(w.outcome));
}

impl Dir {
    /// Whether a thread other than `tid` is probably about to sync it.
    pub(super) fn is_sync_due(&self, tid: u32) -> bool {
        let turn = self.turn.lock();
        turn.trust > 0 && turn.due.iter().any(|t| *t != tid)
    }

    /// A thread comes to sync it.
    pub(super) fn sync_came(&self, tid: u32) {
        self.turn.lock().came(tid);
    }

    /// Tells those whose turn it is now.
    pub(super) fn next_turn(&self) {
        let next = self.turn.lock().take_next();
        tell(next);
    }
}

/// The directories where somebody waits for a turn.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<Vec<Arc<Dir>>>);

impl Turns {
    /// A new file in `dir` is saved: tells the thread that waits for it, now or when it is its turn.
    pub fn saved(&self, dir: &Arc<Dir>, tid: u32, done: Done, outcome: Outcome) {
        let now = dir.turn.lock().saved(Waiting { tid, done, outcome });
        if !now.is_empty() {
            return tell(now);
        }
        let mut waiting = self.0.lock();
        if !waiting.iter().any(|d| Arc::ptr_eq(d, dir)) {
            waiting.push(dir.clone());
        }
    }

    /// Ends the turns in which nobody came for so long. `None` when nobody waits for a turn, else when to look again.
    pub fn end_overdue(&self, limit: Duration) -> Option<Duration> {
        let mut again = None;
        let overdue = |d: &Arc<Dir>| {
            let mut turn = d.turn.lock();
            let age = turn.since.map_or(limit, |since| since.elapsed());
            let next = if age >= limit && !turn.next.is_empty() { turn.missed() } else { Vec::new() };
            if !turn.next.is_empty() {
                again = Some(limit.saturating_sub(age).min(again.unwrap_or(limit)));
            }
            (!turn.next.is_empty(), next)
        };
        let mut waiting = self.0.lock();
        let (still, next): (Vec<_>, Vec<_>) = waiting.iter().map(overdue).unzip();
        let mut still = still.into_iter();
        waiting.retain(|_| still.next().unwrap_or(false));
        drop(waiting);
        next.into_iter().for_each(tell);
        again
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::backend::{Anchor, FileId};

    fn saved(turn: &mut Turn, tid: u32) -> Vec<u32> {
        tids(&turn.saved(Waiting { tid, done: Done::nobody(), outcome: Ok(()) }))
    }

    fn tids(all: &[Waiting]) -> Vec<u32> {
        all.iter().map(|w| w.tid).collect()
    }

    fn came(turn: &mut Turn, tid: u32) -> Vec<u32> {
        turn.came(tid);
        tids(&turn.take_next())
    }

    /// A directory in which thread 9 synced just now.
    fn trusted() -> Turn {
        let mut turn = Turn::default();
        assert!(came(&mut turn, 9).is_empty());
        turn
    }

    #[test]
    fn nobody_waits_where_nobody_syncs() {
        let mut turn = Turn::default();
        for tid in 0..100 {
            assert_eq!(saved(&mut turn, tid), [tid]);
        }
        assert!(turn.due.is_empty(), "nothing is kept of them");
    }

    #[test]
    fn the_next_are_told_together_when_the_last_of_the_turn_has_come() {
        let mut turn = trusted();
        assert_eq!(saved(&mut turn, 1), [1]);
        assert!(saved(&mut turn, 2).is_empty() && saved(&mut turn, 3).is_empty());
        assert_eq!(came(&mut turn, 1), [2, 3]);
        assert!(saved(&mut turn, 4).is_empty());
        assert!(came(&mut turn, 3).is_empty(), "2 is still to come");
        assert!(came(&mut turn, 7).is_empty(), "nobody waits for it");
        assert_eq!(came(&mut turn, 2), [4]);
    }

    #[test]
    fn who_saves_again_without_a_sync_is_not_waited_for() {
        let mut turn = trusted();
        assert_eq!(saved(&mut turn, 1), [1]);
        assert_eq!(saved(&mut turn, 1), [1], "least of all by itself");
        let mut turn = trusted();
        turn.trust = TRUST_MOST;
        assert_eq!(saved(&mut turn, 1), [1]);
        assert!(saved(&mut turn, 2).is_empty());
        assert_eq!(saved(&mut turn, 1), [2, 1]);
        for _ in 0..TRUST_MOST {
            saved(&mut turn, 1);
            saved(&mut turn, 2);
        }
        assert_eq!((saved(&mut turn, 1), saved(&mut turn, 2)), (vec![1], vec![2]), "trust is used up");
    }

    #[test]
    fn a_turn_ends_when_nobody_comes_and_is_not_tried_again_at_once() {
        let dir =
            Arc::new(Dir::new(1, FileId { dev: 0, ino: 1 }, Anchor::Fd(tempfile::tempfile().unwrap().into()), None));
        dir.turn.lock().came(9);
        let (turns, (tx, rx)) = (Turns::default(), mpsc::channel());
        let done = |tid: u32| {
            let tx = tx.clone();
            Done::new(move |r: Outcome| tx.send((tid, r)).unwrap())
        };
        turns.saved(&dir, 1, done(1), Ok(()));
        turns.saved(&dir, 2, done(2), Ok(()));
        assert_eq!(rx.try_iter().collect::<Vec<_>>(), [(1, Ok(()))]);
        let limit = Duration::from_secs(3600);
        assert!(turns.end_overdue(limit).is_some_and(|again| again <= limit && !again.is_zero()));
        assert!(rx.try_recv().is_err(), "not overdue");
        assert_eq!(turns.end_overdue(Duration::ZERO), None);
        assert_eq!(rx.try_iter().collect::<Vec<_>>(), [(2, Ok(()))]);
        for tid in [1, 2] {
            turns.saved(&dir, tid, done(tid), Ok(()));
            dir.sync_came(9);
        }
        assert_eq!(rx.try_iter().count(), 2, "two syncs do not make up for it");
    }
}

//! Large new versions are written to the device behind the program that writes them, and the rest of them before their
//! save joins a batch: so neither waits that program for all of it at its close, nor anybody else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Engine;
use super::file::{Parked, Version};
use crate::telemetry::Counters;

/// A new version of which more bytes than this are to be written to the device is large.
const LARGE_BYTES: u64 = 4 << 20;
/// Smallest piece of a large version, bytes, that is written to the device at a time.
const PIECE_BYTES: u64 = 1 << 20;
/// How long a piece is to take, about: flushes of others wait for it.
const PIECE_TIME: std::ops::Range<Duration> = Duration::from_millis(5)..Duration::from_millis(20);

/// How far a version was written to the device.
#[derive(Debug, Default)]
pub struct Behind {
    state: Mutex<State>,
    /// No piece is being written.
    idle: Condvar,
}

#[derive(Default)]
struct State {
    /// Programs wrote bytes from here...
    from: u64,
    /// ...to here since they were last written to the device.
    to: u64,
    /// Bytes before these that were written again: their first, and how many. The flush of the commit takes a few.
    again: (u64, u64),
    /// Bytes of the next piece.
    piece: u64,
    job: Job,
    /// It is being flushed: no more pieces.
    sealed: bool,
    /// What comes when little is left.
    then: Option<Parked>,
    /// There was such, and it has not returned.
    pending: bool,
}

/// What goes on with it.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Job {
    #[default]
    Nothing,
    /// A piece is to be written.
    Queued,
    /// A piece is being written.
    Writing,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("from", &self.from).field("to", &self.to).finish_non_exhaustive()
    }
}

impl State {
    /// True when a job is to be queued.
    fn begin(&mut self) -> bool {
        let idle = self.job == Job::Nothing;
        if idle {
            self.job = Job::Queued;
        }
        idle
    }

    /// The next piece, if there is more than little.
    fn next(&self) -> Option<(u64, u64)> {
        let left = self.to - self.from;
        (!self.sealed && left >= PIECE_BYTES).then(|| (self.from, self.piece.clamp(PIECE_BYTES, left)))
    }

    /// A piece was written, in so much time.
    fn wrote(&mut self, (from, len): (u64, u64), took: Duration) {
        // Unless a program wrote there meanwhile.
        if self.from == from {
            self.from += len;
        }
        if took < PIECE_TIME.start {
            // No larger than a part of what is left: it may be a hole, and then bytes.
            self.piece = (len * 2).min(((self.to - self.from) / 64).max(8 * PIECE_BYTES));
        } else if took > PIECE_TIME.end {
            self.piece = len / 2;
        }
    }
}

impl Behind {
    /// A program wrote these bytes. True when so many are to be written to the device that it should begin.
    pub fn note(&self, off: u64, len: u64) -> bool {
        let (mut st, end) = (self.state.lock(), off.saturating_add(len));
        if st.to == 0 {
            st.from = off;
        }
        if off < st.from {
            let first = if st.again.1 == 0 { off } else { st.again.0.min(off) };
            st.again = (first, st.again.1 + end.min(st.from) - off);
            if st.again.1 >= LARGE_BYTES {
                st.from = first;
                st.again = (0, 0);
            }
        }
        st.to = st.to.max(end);
        st.to - st.from >= LARGE_BYTES && !st.sealed && st.begin()
    }

    /// The version is given up: no piece begins any more.
    pub fn give_up(&self) {
        self.state.lock().sealed = true;
    }

    /// No piece is written any more, and none begins.
    pub fn seal(&self) {
        let mut st = self.state.lock();
        st.sealed = true;
        while st.job == Job::Writing {
            self.idle.wait(&mut st);
        }
    }

    /// Whether something waits until little is left.
    pub fn is_awaited(&self) -> bool {
        self.state.lock().pending
    }
}

impl Engine {
    /// Begins to write a version to the device.
    pub(super) fn write_behind(self: &Arc<Self>, v: &Arc<Version>) {
        let (me, version) = (self.clone(), v.clone());
        if !self.pieces.run(Box::new(move || me.write_piece(&version))) {
            // The mount ends: the flush of the commit takes what is left.
            Self::end_pieces(v);
        }
    }

    /// Runs `then` when of a version little is left to be written to the device; at once when it is small.
    pub(super) fn when_written_out(self: &Arc<Self>, v: &Arc<Version>, then: impl FnOnce() + Send + 'static) {
        let mut st = v.behind.state.lock();
        if st.job == Job::Nothing && st.to - st.from < LARGE_BYTES {
            drop(st);
            return then();
        }
        st.then = Some(Box::new(then));
        st.pending = true;
        let begins = st.begin();
        drop(st);
        if begins {
            self.write_behind(v);
        }
    }

    /// One piece, so that flushes of others come in between, and pieces of others.
    fn write_piece(self: &Arc<Self>, v: &Arc<Version>) {
        let mut st = v.behind.state.lock();
        let next = st.next().filter(|_| self.writable().is_ok());
        if let Some((off, len)) = next {
            st.job = Job::Writing;
            drop(st);
            let began = Instant::now();
            let written = self.backing.write_piece(v.fd_unsettled(), off, len);
            if let Err(fault) = &written {
                self.count_panic(fault);
                // The kernel says so once, and not of which bytes.
                v.failed.add_late(0..u64::MAX, fault.errno());
            }
            st = v.behind.state.lock();
            st.job = Job::Queued;
            st.sealed |= written.is_err();
            st.wrote((off, len), began.elapsed());
            v.behind.idle.notify_all();
            drop(st);
            Counters::add(&self.counters.pieces, 1);
            return self.write_behind(v);
        }
        drop(st);
        Self::end_pieces(v);
    }

    fn end_pieces(v: &Version) {
        let mut st = v.behind.state.lock();
        st.job = Job::Nothing;
        let then = st.then.take();
        drop(st);
        if let Some(then) = then {
            then();
            v.behind.state.lock().pending = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn all(b: &Behind, took: Duration) -> Vec<(u64, u64)> {
        let mut pieces = Vec::new();
        let mut st = b.state.lock();
        while let Some(piece) = st.next() {
            st.wrote(piece, took);
            pieces.push(piece);
        }
        pieces
    }

    #[test]
    fn pieces_cover_what_was_written_and_take_about_so_long() {
        let b = Behind::default();
        assert!(!b.note(0, 3 * MIB) && b.note(3 * MIB, 97 * MIB) && !b.note(100 * MIB, MIB), "one job");
        let slow = all(&b, Duration::from_millis(30));
        assert!(slow.iter().all(|p| p.1 == MIB) && slow.len() == 101, "{slow:?}");
        b.note(0, 100 * MIB);
        let fast = all(&b, Duration::from_millis(1));
        assert!(fast.iter().all(|p| p.1 <= 8 * MIB) && fast.len() < 20, "{fast:?}");
        assert_eq!(fast.iter().map(|p| p.1).sum::<u64>(), 101 * MIB, "from the first byte to the last");
    }

    #[test]
    fn what_is_written_again_counts_when_it_is_much() {
        let b = Behind::default();
        b.note(8 * MIB, 4 * MIB);
        assert_eq!(all(&b, Duration::from_millis(10)).first(), Some(&(8 * MIB, MIB)), "not what was there before");
        for n in 0..20 {
            b.note(0, 4096);
            b.note((12 + n) * MIB, MIB);
            let next = all(&b, Duration::from_millis(10));
            assert_eq!(next, [((12 + n) * MIB, MIB)], "the head of the file does not hold up its tail");
        }
        b.note(2 * MIB, 4 * MIB);
        assert_eq!(all(&b, Duration::from_millis(10)).first(), Some(&(0, MIB)), "much");
    }

    #[test]
    fn holes_cost_little_and_a_sealed_version_nothing() {
        let b = Behind::default();
        b.note(0, 4096);
        b.note(1 << 60, MIB);
        let pieces = all(&b, Duration::ZERO);
        assert!(pieces.len() < 5000, "{}", pieces.len());
        b.note(0, 100 * MIB);
        b.seal();
        assert!(b.state.lock().next().is_none() && !b.note(0, 100 * MIB));
    }
}

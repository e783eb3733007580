//! Whether writes wait for the device at the moment.
//!
//! A write to a file goes to memory, until more of it is dirty than the kernel likes: then it holds up who writes
//! (`balance_dirty_pages` in mm/page-writeback.c, up to 200 ms at a time). Here that is the thread that serves all
//! programs. So a write that took long is taken for the first of several, and those that follow are made elsewhere.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A write that takes so long did not only copy: a mebibyte takes a tenth of a millisecond, and a thread that has to give up
/// its processor to others is back sooner.
const LONG: Duration = Duration::from_millis(10);
/// For how long after it writes are expected to wait, too.
const EXPECTED: Duration = Duration::from_secs(1);

/// Keeps the time of writes.
#[derive(Debug)]
pub struct Stall {
    began: Instant,
    /// Milliseconds since `began`.
    until: AtomicU64,
}

impl Stall {
    /// Nothing waits.
    pub fn new() -> Self {
        Self { began: Instant::now(), until: AtomicU64::new(0) }
    }

    /// Whether a write waited a moment ago.
    pub fn is_on(&self) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until != 0 && self.began.elapsed().as_millis() < u128::from(until)
    }

    /// Makes a write.
    pub fn watch<T>(&self, write: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let r = write();
        self.took(began.elapsed());
        r
    }

    fn took(&self, time: Duration) {
        if time >= LONG {
            self.until.fetch_max((self.began.elapsed() + EXPECTED).as_millis() as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_write_is_expected_to_be_followed_by_others() {
        let s = Stall::new();
        s.took(LONG / 2);
        assert!(!s.is_on());
        s.took(LONG);
        assert!(s.is_on());
    }
}

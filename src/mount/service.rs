//! The service manager (`sd_notify(3)`): ready, what it does, that it is alive, that it stops. Without one nothing is
//! sent.
//!
//! The watchdog is fed only while the dispatcher makes progress: it is idle, or has begun a batch since the last look.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

use super::live::Live;
use super::log;
use super::volume::DrainError;
use crate::telemetry::Status;

/// How often the status is told.
const BEAT: Duration = Duration::from_secs(5);
/// How often a drain at the end asks for more time, and for how much.
const EXTEND_EVERY: Duration = Duration::from_secs(1);
const EXTEND_BY: Duration = Duration::from_secs(30);

/// Tells the service manager something.
pub fn notify(states: &[NotifyState]) {
    if let Err(e) = sd_notify::notify(false, states) {
        tracing::warn!("cannot tell the service manager: {e}");
    }
}

/// The thread that tells the state now and then; ends when dropped.
#[derive(Debug)]
pub struct Beat {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Beat {
    /// Starts it.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(live: Arc<Live>) -> std::io::Result<Self> {
        let (end, ended) = channel();
        let thread = std::thread::Builder::new().name("service".into()).spawn(move || beat(&live, &ended))?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Beat {
    fn drop(&mut self) {
        self.end.take();
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            tracing::error!("the service thread panicked");
        }
    }
}

fn beat(live: &Live, ended: &Receiver<()>) {
    let mut watchdog_usec = 0;
    let watched = sd_notify::watchdog_enabled(false, &mut watchdog_usec);
    // A third: one that comes late does no harm.
    let period = if watched { BEAT.min(Duration::from_micros(watchdog_usec / 3)) } else { BEAT };
    let mut alive = Alive::default();
    while ended.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
        let status = live.status();
        let line = line(&status);
        let mut states = vec![NotifyState::Status(&line)];
        if alive.makes_progress(&status) {
            states.push(NotifyState::Watchdog);
        } else {
            tracing::warn!("the dispatcher has not begun a batch for {} ms, and commits wait", period.as_millis());
        }
        notify(&states);
        log::tell_repeats();
    }
}

/// Whether the dispatcher lives, or a large save is on its way to it.
#[derive(Debug, Default)]
struct Alive {
    done: u64,
}

impl Alive {
    fn makes_progress(&mut self, s: &Status) -> bool {
        let done = s.counters.batches + s.counters.pieces;
        let before = std::mem::replace(&mut self.done, done);
        s.counters.in_flight == 0 || done != before
    }
}

/// One line for `systemctl status`.
pub fn line(s: &Status) -> String {
    let c = &s.counters;
    let reason = if s.reason.is_empty() { String::new() } else { format!(" ({})", s.reason) };
    let uncommitted = match s.oldest_uncommitted_ms {
        0 => "nothing uncommitted".to_owned(),
        ms => format!("{} staged, the oldest change {}.{} s old", c.staged_now, ms / 1000, ms % 1000 / 100),
    };
    format!("{}{reason}: {} commits, {} failed; {uncommitted}", s.health, c.commits, c.commit_failures)
}

/// The patience of a drain at the end: as long as it makes progress, and `limit` without any. Asks the service
/// manager for the time.
#[derive(Debug)]
pub struct Patience {
    limit: Duration,
    least: u64,
    pieces: u64,
    since: Instant,
    told: Option<Instant>,
}

impl Patience {
    /// Begins.
    pub fn new(limit: Duration) -> Self {
        Self { limit, least: u64::MAX, pieces: 0, since: Instant::now(), told: None }
    }

    /// So much is left, and so many pieces of large versions were written so far; whether to go on.
    pub fn left(&mut self, left: u64, pieces: u64) -> bool {
        let now = Instant::now();
        if left < self.least || pieces != self.pieces {
            (self.least, self.pieces, self.since) = (left.min(self.least), pieces, now);
        }
        if self.told.is_none_or(|t| now - t >= EXTEND_EVERY) {
            self.told = Some(now);
            let line = format!("stopping: {left} not durable yet");
            notify(&[NotifyState::Status(&line), NotifyState::ExtendTimeoutUsec(EXTEND_BY.as_micros() as u32)]);
        }
        now - self.since < self.limit
    }
}

/// Drains at the end, with patience; `tell` is told how much is left.
///
/// # Errors
/// As [`super::volume::Volume::drain`].
pub fn drain_at_end(live: &Live, patience: Duration, tell: &mut dyn FnMut(u64)) -> Result<(), DrainError> {
    const NO_END: Duration = Duration::from_secs(24 * 3600);
    let mut p = Patience::new(patience);
    live.volume().drain(NO_END, &mut |left| {
        tell(left);
        p.left(left, live.volume().status().counters.pieces)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::testing::status;

    #[test]
    fn a_dispatcher_that_stands_still_is_not_alive() {
        let (mut alive, mut s) = (Alive::default(), status());
        assert!(alive.makes_progress(&s), "idle");
        (s.counters.in_flight, s.counters.batches) = (3, 1);
        assert!(alive.makes_progress(&s), "the first batch");
        assert!(!alive.makes_progress(&s), "the same batch, and commits wait");
        s.counters.batches = 2;
        assert!(alive.makes_progress(&s));
        s.counters.pieces = 1;
        assert!(alive.makes_progress(&s), "a large version is on its way");
        s.counters.in_flight = 0;
        assert!(alive.makes_progress(&s));
    }

    #[test]
    fn patience_ends_without_progress_only() {
        let mut p = Patience::new(Duration::ZERO);
        assert!(!p.left(5, 0));
        let mut p = Patience::new(Duration::from_secs(3600));
        assert!(p.left(5, 0) && p.left(5, 0) && p.left(9, 0));
        let hour_ago = Instant::now().checked_sub(Duration::from_secs(3601)).unwrap();
        p.since = hour_ago;
        assert!(!p.left(5, 0), "an hour without progress");
        assert!(p.left(4, 0), "progress begins it anew");
        p.since = hour_ago;
        assert!(p.left(4, 1), "a piece of a large version is progress");
    }

    #[test]
    fn the_line_tells_the_state() {
        let mut s = status();
        assert_eq!(line(&s), "healthy: 0 commits, 0 failed; nothing uncommitted");
        (s.oldest_uncommitted_ms, s.counters.staged_now) = (1250, 2);
        assert!(line(&s).ends_with("2 staged, the oldest change 1.2 s old"));
    }
}

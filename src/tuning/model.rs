//! What a mount would do: the dispatcher's own rule, played over times that were measured here.
//!
//! ```text
//! writer --save--> [daemon: one server] --commit--> [queue] --batch--> barrier --answer--> writer saves again
//! ```
//!
//! Every writer saves without a pause. A save costs the daemon `serial_us`, one at a time, and its program
//! `apart_us` and `handover_us` besides; a batch of n commits takes what batches of n took. Nothing is random: what
//! varies on a real machine is in the means.

#![allow(clippy::cast_precision_loss)] // counts of a simulation

use std::collections::BinaryHeap;
use std::collections::VecDeque;

use serde::Serialize;

use super::measure::BatchCost;
use crate::engine::window_us;

/// Simulated saves of each writer, the first fifth of them not counted.
const SAVES_EACH: usize = 200;

/// What a save costs outside of its commit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Front {
    /// Microseconds of the daemon, one save at a time.
    pub serial_us: f64,
    /// Microseconds of the program and the kernel besides, side by side with others.
    pub apart_us: f64,
    /// Microseconds more for a save that waits: to the dispatcher and back. Less than nothing where the mount commits
    /// faster than the same calls did by themselves.
    pub handover_us: f64,
}

impl Front {
    /// From rates, per second: of one writer and of many, where nothing waits, and of one that waits, whose batches
    /// take `lone_us`.
    pub fn from_rates(one: f64, many: f64, waiting: f64, lone_us: f64) -> Self {
        let (serial_us, one_us) = (1e6 / many, 1e6 / one);
        let apart_us = (one_us - serial_us).max(0.0);
        Self { serial_us, apart_us, handover_us: 1e6 / waiting - serial_us - apart_us - lone_us }
    }
}

/// What is predicted for one number of writers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Forecast {
    /// Writers.
    pub writers: usize,
    /// Saves in a second, of all together.
    pub per_s: f64,
    /// Mean time of a save, microseconds.
    pub latency_us: f64,
    /// Saves per batch, by the model.
    pub coalescing: Option<f64>,
}

impl Forecast {
    /// Where nothing but the rate is known.
    pub fn of_rate(writers: usize, per_s: f64) -> Self {
        Self { writers, per_s, latency_us: writers as f64 / per_s * 1e6, coalescing: None }
    }

    /// With the rate that was measured, where one was: every writer saves without a pause, so the time of a save follows.
    #[must_use]
    pub fn calibrated(self, per_s: Option<f64>) -> Self {
        per_s.map_or(self, |per_s| Self { coalescing: self.coalescing, ..Self::of_rate(self.writers, per_s) })
    }
}

/// Saves that wait for their commit, with a window of at most `window_max_us` and batches of at most `batch_max`.
pub fn waiting(front: Front, cost: &BatchCost, writers: usize, window_max_us: u64, batch_max: usize) -> Forecast {
    let mut run = Run::new(front, cost, writers, window_max_us, batch_max);
    run.play(writers * SAVES_EACH / 5);
    let (from, saves, batches, waited) = (run.now, run.saves, run.batches, run.waited);
    run.play(writers * SAVES_EACH);
    let (time, saves) = (run.now - from, run.saves - saves);
    Forecast {
        writers,
        per_s: saves as f64 / time * 1e6,
        latency_us: (run.waited - waited) / saves as f64,
        coalescing: Some(saves as f64 / (run.batches - batches) as f64),
    }
}

/// A writer whose commit comes to the dispatcher at `at`; the heap gives the earliest.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Arrival {
    at: f64,
    begun: f64,
}

impl Eq for Arrival {}
impl PartialOrd for Arrival {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Arrival {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        other.at.total_cmp(&self.at)
    }
}

struct Run<'a> {
    front: Front,
    cost: &'a BatchCost,
    window_max_us: u64,
    batch_max: usize,
    now: f64,
    /// When the daemon is done with what it was given so far.
    daemon_free: f64,
    coming: BinaryHeap<Arrival>,
    queue: VecDeque<Arrival>,
    /// Size of the batch before.
    shared: usize,
    /// Mean of recent barriers.
    recent_us: f64,
    saves: usize,
    batches: usize,
    waited: f64,
}

impl<'a> Run<'a> {
    fn new(front: Front, cost: &'a BatchCost, writers: usize, window_max_us: u64, batch_max: usize) -> Self {
        let mut run = Self {
            front,
            cost,
            window_max_us,
            batch_max,
            now: 0.0,
            daemon_free: 0.0,
            coming: BinaryHeap::new(),
            queue: VecDeque::new(),
            shared: 1,
            recent_us: cost.us(1),
            saves: 0,
            batches: 0,
            waited: 0.0,
        };
        (0..writers).for_each(|_| run.save(0.0));
        run
    }

    /// A writer begins a save at `begun`.
    fn save(&mut self, begun: f64) {
        let ready = begun + self.front.apart_us + self.front.handover_us.max(0.0);
        self.daemon_free = self.daemon_free.max(ready) + self.front.serial_us;
        self.coming.push(Arrival { at: self.daemon_free, begun });
    }

    /// Takes into the queue who has come until `until`.
    fn admit(&mut self, until: f64) {
        while let Some(next) = self.coming.peek().copied().filter(|a| a.at <= until) {
            self.coming.pop();
            self.queue.push_back(next);
        }
    }

    /// Batch after batch, until so many more saves are done.
    fn play(&mut self, saves: usize) {
        let goal = self.saves + saves;
        while self.saves < goal {
            self.wait_for_batch();
            let n = self.queue.len().min(self.batch_max);
            let took = (self.cost.us(n) + self.front.handover_us.min(0.0)).max(0.0);
            self.now += took;
            self.recent_us = (7.0 * self.recent_us + took) / 8.0;
            self.shared = n;
            self.saves += n;
            self.batches += 1;
            let answered: Vec<Arrival> = self.queue.drain(..n).collect();
            for a in answered {
                self.waited += self.now - a.begun;
                self.save(self.now);
            }
        }
    }

    /// As `dispatch::run`: the first, who else is there, and a window for those that are likely to come back.
    fn wait_for_batch(&mut self) {
        self.admit(self.now);
        if self.queue.is_empty() {
            self.now = self.coming.peek().map_or(self.now, |a| a.at);
            self.admit(self.now);
        }
        let target = self.shared.min(self.batch_max);
        let end = self.now + window_us(self.recent_us as u64, self.window_max_us) as f64;
        let mut waited = false;
        while self.queue.len() < target {
            waited = true;
            match self.coming.peek().map(|a| a.at).filter(|at| *at <= end) {
                Some(at) => {
                    self.now = self.now.max(at);
                    self.admit(self.now);
                }
                None => {
                    self.now = end;
                    break;
                }
            }
        }
        // A thread that waited needs a moment to wake: about the time in which the daemon brings the next one.
        if waited {
            self.now += self.front.serial_us;
        }
        self.admit(self.now);
    }
}

/// Windows that are compared, microseconds.
pub const WINDOWS: [u64; 7] = [0, 500, 1000, 2000, 5000, 10_000, 20_000];

/// The smallest window that is within 2 % of the best for all of these numbers of writers.
pub fn good_window_us(front: Front, cost: &BatchCost, writers: &[usize], batch_max: usize) -> u64 {
    let rates = |window: u64| writers.iter().map(move |n| waiting(front, cost, *n, window, batch_max).per_s);
    let best = writers
        .iter()
        .enumerate()
        .map(|(i, _)| WINDOWS.iter().filter_map(|w| rates(*w).nth(i)).fold(0.0_f64, f64::max));
    let best: Vec<f64> = best.collect();
    let good = |window: &u64| rates(*window).zip(&best).all(|(rate, best)| rate >= 0.98 * best);
    WINDOWS.into_iter().find(good).unwrap_or(WINDOWS[WINDOWS.len() - 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) {
        assert!((a / b - 1.0).abs() < 0.05, "{a} is not near {b}");
    }

    #[test]
    fn a_lone_writer_pays_all_by_itself() {
        let (front, cost) =
            (Front { serial_us: 100.0, apart_us: 20.0, handover_us: 30.0 }, BatchCost(vec![(1, 850.0), (64, 850.0)]));
        let one = waiting(front, &cost, 1, 10_000, 256);
        near(one.per_s, 1000.0);
        near(one.latency_us, 1000.0);
        near(one.coalescing.unwrap(), 1.0);
    }

    #[test]
    fn many_share_a_slow_flush_and_the_daemon_is_the_bound_of_a_fast_one() {
        let front = Front { serial_us: 10.0, apart_us: 0.0, handover_us: 0.0 };
        let slow = BatchCost(vec![(1, 10_000.0), (64, 10_000.0)]);
        let eight = waiting(front, &slow, 8, 10_000, 256);
        near(eight.coalescing.unwrap(), 8.0);
        let seen = eight.calibrated(Some(400.0));
        near(seen.latency_us, 20_000.0);
        assert_eq!((seen.per_s, seen.coalescing), (400.0, eight.coalescing));
        assert_eq!(eight.calibrated(None), eight);
        near(eight.per_s, 8.0 / 10_080.0 * 1e6);
        let fast = BatchCost(vec![(1, 1.0), (64, 1.0)]);
        assert!(waiting(front, &fast, 64, 0, 256).per_s > 80_000.0);
        assert!(waiting(front, &fast, 64, 0, 256).per_s <= 100_000.0 * 1.05);
    }

    #[test]
    fn rates_give_back_the_front() {
        let front = Front::from_rates(4000.0, 10_000.0, 800.0, 900.0);
        near(front.handover_us, 100.0);
        let odd = Front::from_rates(100.0, 90.0, 100.0, 20_000.0);
        assert!(odd.apart_us.abs() < 1e-9, "noise is no negative time: {odd:?}");
        // A mount that is faster than the batch by itself: the forecast is what was measured.
        let faster = Front::from_rates(4000.0, 10_000.0, 100.0, 20_000.0);
        near(waiting(faster, &BatchCost(vec![(1, 20_000.0), (64, 20_000.0)]), 1, 10_000, 256).per_s, 100.0);
    }

    #[test]
    fn without_a_cost_of_waiting_the_window_is_wide_enough_to_gather() {
        let front = Front { serial_us: 100.0, apart_us: 0.0, handover_us: 0.0 };
        let slow = BatchCost(vec![(1, 10_000.0), (64, 10_000.0)]);
        let window = good_window_us(front, &slow, &[8], 256);
        assert!((500..=10_000).contains(&window), "{window}");
        let rate = |w| waiting(front, &slow, 8, w, 256).per_s;
        assert!(rate(window) > rate(0), "{} {}", rate(window), rate(0));
    }
}

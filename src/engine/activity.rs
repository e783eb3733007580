//! Who commits what, and how long it takes: always on, bounded in memory and in work for each commit.
//!
//! Busiest files and processes are counted by the space-saving scheme (Metwally, Agrawal, El Abbadi 2005): a table of
//! fixed size in which a newcomer takes the place of the least busy. Two tables, of the present and the past ten
//! seconds, make it forget.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Engine;
use super::dir::Place;
use super::dispatch::{Step, Ticket, Work};
use super::file::File;
use crate::config::keys::name_of;
use crate::config::policy::Durability;
use crate::telemetry::activity::{Activity, FileActivity, Histograms, Process, ProcessActivity, SlowCommit};
use crate::telemetry::prometheus::{BATCH_BOUNDS, TIME_BOUNDS_US};
use crate::telemetry::{Counters, Latency};

/// How long a table counts before it becomes the past one.
const WINDOW: Duration = Duration::from_secs(10);
/// Files and processes that a table remembers.
const TABLE_MAX: usize = 64;
/// Slowest commits that a table remembers.
const SLOW_MAX: usize = 16;
/// Threads whose process is looked up in one window.
const LOOKUPS_MAX: usize = 1024;
/// A slow commit is logged at most this often; those in between are counted.
const SLOW_PAUSE: Duration = Duration::from_secs(1);

const LEVELS: [Durability; 4] = [Durability::Always, Durability::Close, Durability::Fsync, Durability::Relaxed];

/// How long the steps of a batch took.
#[derive(Debug, Clone)]
pub(super) struct StepTimes {
    began: Instant,
    last: Instant,
    steps: [(Step, Duration); 3],
}

impl StepTimes {
    pub(super) fn begin() -> Self {
        let now = Instant::now();
        let steps = [Step::Data, Step::Publish, Step::SyncParent].map(|s| (s, Duration::ZERO));
        Self { began: now, last: now, steps }
    }

    /// A step ends.
    pub(super) fn end(&mut self, step: Step) {
        let now = Instant::now();
        let took = now - std::mem::replace(&mut self.last, now);
        self.steps.iter_mut().filter(|s| s.0 == step).for_each(|s| s.1 = took);
    }

    fn of(&self, step: Step) -> Duration {
        self.steps.iter().find(|s| s.0 == step).map_or(Duration::ZERO, |s| s.1)
    }

    /// The step that took a ticket of that time longest, the queue included.
    fn longest(&self, submitted: Instant) -> (Step, Duration) {
        let queue = (Step::Queue, self.began.saturating_duration_since(submitted));
        self.steps.iter().copied().chain([queue]).max_by_key(|s| s.1).unwrap_or(queue)
    }
}

/// What is counted of commits.
pub(super) struct Accounts {
    by_durability: [Latency; 4],
    pub(super) batch_sizes: Latency,
    tables: Mutex<Tables>,
    slow_log: Mutex<(Option<Instant>, u64)>,
}

impl Default for Accounts {
    fn default() -> Self {
        let tables = Tables { now: Table::new(Instant::now()), past: None };
        Self {
            by_durability: Default::default(),
            batch_sizes: Latency::default(),
            tables: Mutex::new(tables),
            slow_log: Mutex::default(),
        }
    }
}

struct Tables {
    now: Table,
    past: Option<Table>,
}

struct Table {
    since: Instant,
    files: Top<u64, FileRow>,
    processes: Top<Process, ()>,
    slow: Vec<Slow>,
    /// By thread, as found once in this window: ids are used again.
    threads: HashMap<u32, Process>,
}

#[derive(Clone)]
struct FileRow {
    place: Option<Place>,
    process: Process,
}

struct Slow {
    place: Option<Place>,
    took: Duration,
    step: (Step, Duration),
    at: Instant,
    process: Process,
}

/// The space-saving table.
struct Top<K, V>(HashMap<K, Row<V>>);

struct Row<V> {
    /// Decides who has to go; too high, by up to the count of the row whose place it took.
    count: u64,
    /// Seen since the row is there, with their times.
    seen: u64,
    total: Duration,
    max: Duration,
    value: V,
}

impl<K: Hash + Eq + Clone, V> Top<K, V> {
    fn count(&mut self, key: &K, took: Duration, value: impl FnOnce() -> V) -> &mut V {
        if !self.0.contains_key(key) {
            let count = if self.0.len() < TABLE_MAX { 0 } else { self.drop_least() };
            let (seen, total, max) = (0, Duration::ZERO, Duration::ZERO);
            self.0.insert(key.clone(), Row { count, seen, total, max, value: value() });
        }
        let row = self.0.get_mut(key).unwrap_or_else(|| unreachable!("it was put there"));
        row.count += 1;
        row.seen += 1;
        row.total += took;
        row.max = row.max.max(took);
        &mut row.value
    }

    fn drop_least(&mut self) -> u64 {
        let least = self.0.iter().min_by_key(|(_, row)| row.count).map(|(key, row)| (key.clone(), row.count));
        least.map_or(0, |(key, count)| {
            self.0.remove(&key);
            count
        })
    }
}

impl Table {
    fn new(since: Instant) -> Self {
        let (files, processes) = (Top(HashMap::new()), Top(HashMap::new()));
        Self { since, files, processes, slow: Vec::new(), threads: HashMap::new() }
    }

    fn process(&mut self, tid: u32) -> Process {
        if let Some(known) = self.threads.get(&tid) {
            return known.clone();
        }
        if tid == 0 || self.threads.len() >= LOOKUPS_MAX {
            return Process { pid: tid, command: String::new() };
        }
        let found = look_up(tid);
        self.threads.insert(tid, found.clone());
        found
    }

    fn note_slow(&mut self, slow: impl FnOnce() -> Slow, took: Duration) {
        if self.slow.len() == SLOW_MAX {
            let least = self.slow.iter().enumerate().min_by_key(|(_, s)| s.took).map(|(i, s)| (i, s.took));
            match least {
                Some((i, t)) if t < took => drop(self.slow.swap_remove(i)),
                _ => return,
            }
        }
        self.slow.push(slow());
    }
}

/// The process of a thread, while it is there: it waits for the commit, unless its policy lets it go on.
fn look_up(tid: u32) -> Process {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
    let pid = field("Tgid:").and_then(|t| t.parse().ok()).unwrap_or(tid);
    let command = if pid == tid {
        field("Name:").unwrap_or_default().to_owned()
    } else {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
    };
    Process { pid, command }
}

impl Engine {
    /// Counts one commit that is about to be answered; `done` when it did not fail.
    pub(super) fn note_ticket(&self, ticket: &Ticket, times: &StepTimes, done: bool) {
        let (file, place) = match &ticket.work {
            Work::Publish { file, place, .. } => (file, Some(place)),
            Work::Journal { file, names, .. } => (file, names.first()),
            Work::SyncFile { file, .. } => (file, None),
            Work::SyncDir(_) | Work::Unlink { .. } | Work::Checkpoint | Work::Copy(_) => return,
        };
        self.note_commit(file, place, ticket.at, times, done);
    }

    /// Counts the commit of a file that began at `at`.
    pub(super) fn note_commit(
        &self,
        file: &Arc<File>,
        place: Option<&Place>,
        at: Instant,
        times: &StepTimes,
        done: bool,
    ) {
        let took = at.elapsed();
        let (tid, level) = file.last_use();
        if let Some(i) = LEVELS.iter().position(|l| *l == level) {
            self.accounts.by_durability[i].record(took);
        }
        let place = || place.cloned().or_else(|| file.any_name());
        let process = self.accounts.enter(file, took, times.longest(at), tid, &place);
        let limit = self.config().limits.slow_commit_ms;
        if done && limit > 0 && took >= Duration::from_millis(limit) {
            Counters::add(&self.counters.slow_commits, 1);
            self.accounts.log_slow(&place, took, at, times, &process);
        }
    }

    /// The histograms.
    pub fn histograms(&self) -> Histograms {
        let commit = LEVELS.iter().zip(&self.accounts.by_durability);
        Histograms {
            flush: self.flush_latency.buckets(&TIME_BOUNDS_US),
            commit: commit.map(|(level, h)| (name_of(level), h.buckets(&TIME_BOUNDS_US))).collect(),
            batch: self.accounts.batch_sizes.buckets(&BATCH_BOUNDS),
        }
    }

    /// The busiest and slowest of late.
    pub fn activity(&self) -> Activity {
        let mut tables = self.accounts.tables.lock();
        tables.turn(Instant::now());
        tables.report()
    }
}

impl Accounts {
    fn enter(
        &self,
        file: &Arc<File>,
        took: Duration,
        step: (Step, Duration),
        tid: u32,
        place: &dyn Fn() -> Option<Place>,
    ) -> Process {
        let now = Instant::now();
        let mut tables = self.tables.lock();
        tables.turn(now);
        let table = &mut tables.now;
        let process = table.process(tid);
        let row = table.files.count(&file.tag, took, || FileRow { place: place(), process: Process::default() });
        if row.process != process {
            row.process = process.clone();
        }
        table.processes.count(&process, took, || ());
        table.note_slow(|| Slow { place: place(), took, step, at: now, process: process.clone() }, took);
        process
    }

    fn log_slow(
        &self,
        place: &dyn Fn() -> Option<Place>,
        took: Duration,
        at: Instant,
        times: &StepTimes,
        process: &Process,
    ) {
        let others = {
            let mut log = self.slow_log.lock();
            if log.0.is_some_and(|last| last.elapsed() < SLOW_PAUSE) {
                log.1 += 1;
                return;
            }
            log.0 = Some(Instant::now());
            std::mem::take(&mut log.1)
        };
        let ms = |d: Duration| d.as_millis() as u64;
        let (step, step_took) = times.longest(at);
        let path = place().map(|p| p.path().display().to_string()).unwrap_or_default();
        tracing::warn!(
            %path,
            %step,
            step_ms = ms(step_took),
            total_ms = ms(took),
            device_ms = ms(times.of(Step::Data) + times.of(Step::SyncParent)),
            queue_ms = ms(times.began.saturating_duration_since(at)),
            pid = process.pid,
            command = %process.command,
            others,
            "slow commit: the save is durable, but came late; see what else uses the device (`iostat -x 1`), or raise \
             slow_commit_ms"
        );
    }
}

impl Tables {
    /// Begins a new table when the present one is old.
    fn turn(&mut self, now: Instant) {
        let age = now - self.now.since;
        if age < WINDOW {
            return;
        }
        let past = std::mem::replace(&mut self.now, Table::new(now));
        self.past = (age < 2 * WINDOW).then_some(past);
    }

    fn report(&self) -> Activity {
        let both = || [Some(&self.now), self.past.as_ref()].into_iter().flatten();
        let since = self.past.as_ref().map_or(self.now.since, |t| t.since);
        let path = |p: &Option<Place>| p.as_ref().map(|p| p.path().display().to_string()).unwrap_or_default();
        let files = merge(both().map(|t| &t.files)).into_iter().map(|(_, s)| FileActivity {
            path: path(&s.value.place),
            commits: s.commits,
            mean_us: s.mean_us,
            max_us: s.max_us,
            process: s.value.process.clone(),
        });
        let processes = merge(both().map(|t| &t.processes)).into_iter().map(|(process, s)| ProcessActivity {
            process: process.clone(),
            commits: s.commits,
            mean_us: s.mean_us,
            max_us: s.max_us,
        });
        let mut slow: Vec<&Slow> = both().flat_map(|t| &t.slow).collect();
        slow.sort_by_key(|s| std::cmp::Reverse(s.took));
        let slow = slow.into_iter().take(SLOW_MAX).map(|s| SlowCommit {
            path: path(&s.place),
            took_us: s.took.as_micros() as u64,
            step: s.step.0.to_string(),
            step_us: s.step.1.as_micros() as u64,
            ago_ms: s.at.elapsed().as_millis() as u64,
            process: s.process.clone(),
        });
        Activity {
            window_ms: since.elapsed().as_millis() as u64,
            files: files.collect(),
            processes: processes.collect(),
            slow: slow.collect(),
        }
    }
}

struct Sum<'a, V> {
    commits: u64,
    mean_us: u64,
    max_us: u64,
    value: &'a V,
}

/// The rows of both tables, busiest first.
fn merge<'a, K: Hash + Eq + Ord, V>(tops: impl Iterator<Item = &'a Top<K, V>>) -> Vec<(&'a K, Sum<'a, V>)> {
    let mut all: HashMap<&K, Vec<&Row<V>>> = HashMap::new();
    tops.flat_map(|t| &t.0).for_each(|(key, row)| all.entry(key).or_default().push(row));
    let sum = |rows: Vec<&'a Row<V>>| {
        let seen: u64 = rows.iter().map(|r| r.seen).sum();
        let total: Duration = rows.iter().map(|r| r.total).sum();
        let max = rows.iter().map(|r| r.max).max().unwrap_or_default();
        Sum {
            commits: seen,
            mean_us: total.as_micros() as u64 / seen.max(1),
            max_us: max.as_micros() as u64,
            value: &rows[0].value,
        }
    };
    let mut rows: Vec<_> = all.into_iter().map(|(key, rows)| (key, sum(rows))).collect();
    rows.sort_by(|a, b| b.1.commits.cmp(&a.1.commits).then_with(|| a.0.cmp(b.0)));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_busiest_stay_however_many_come() {
        let mut top = Top(HashMap::new());
        for round in 0..1000_u64 {
            top.count(&7_u64, 2 * MS, || "busy");
            top.count(&(1000 + round), MS, || "rare");
        }
        assert_eq!(top.0.len(), TABLE_MAX);
        let rows = merge([&top].into_iter());
        assert_eq!((*rows[0].0, rows[0].1.commits, rows[0].1.mean_us), (7, 1000, 2000));
        assert_eq!(rows[1].1.commits, 1, "a rare one is not made busy by the scheme");
    }

    #[test]
    fn forgets_what_is_past() {
        let start = Instant::now();
        let mut tables = Tables { now: Table::new(start), past: None };
        tables.now.processes.count(&Process { pid: 1, command: "a".into() }, MS, || ());
        tables.turn(start + WINDOW);
        tables.now.processes.count(&Process { pid: 1, command: "a".into() }, MS, || ());
        assert_eq!(tables.report().processes[0].commits, 2, "both windows count");
        tables.turn(start + 2 * WINDOW);
        assert_eq!(tables.report().processes[0].commits, 1);
        tables.turn(start + 9 * WINDOW);
        assert!(tables.report().processes.is_empty());
    }

    #[test]
    fn remembers_the_slowest() {
        let mut table = Table::new(Instant::now());
        for ms in 1..=100_u32 {
            let took = MS * (ms * 37 % 101);
            let slow = || Slow {
                place: None,
                took,
                step: (Step::Data, took),
                at: Instant::now(),
                process: Process::default(),
            };
            table.note_slow(slow, took);
        }
        let mut kept: Vec<_> = table.slow.iter().map(|s| s.took.as_millis()).collect();
        kept.sort_unstable();
        assert_eq!(kept, (85..=100).collect::<Vec<_>>());
    }

    #[test]
    fn knows_this_process() {
        let mut table = Table::new(Instant::now());
        let me = table.process(std::process::id());
        assert!(me.pid == std::process::id() && !me.command.is_empty(), "{me:?}");
        assert_eq!(table.process(u32::MAX).command, "", "gone");
    }

    #[test]
    fn names_the_step_that_took_longest() {
        let mut times = StepTimes::begin();
        times.steps[2].1 = 5 * MS;
        assert_eq!(times.longest(times.began), (Step::SyncParent, 5 * MS));
        assert_eq!(times.longest(times.began.checked_sub(9 * MS).expect("up for 9 ms")).0, Step::Queue);
    }
}

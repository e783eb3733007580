//! What happened between two samples, and how it looks on a screen of any size. Pure.

use serde::Serialize;

use crate::telemetry::Buckets;
use crate::telemetry::activity::{Activity, Process, Sample};

/// Longest bar of the histogram, in characters.
const BAR: usize = 40;

/// What `fsys top` shows.
#[derive(Debug, Clone, Serialize)]
pub struct View {
    health: String,
    reason: String,
    mountpoint: String,
    /// Between the samples.
    interval_ms: u64,
    commits_per_s: f64,
    in_place_syncs_per_s: f64,
    flush_calls_per_s: f64,
    batches_per_s: f64,
    /// Operations that shared one flush call; 0 without any.
    coalescing: f64,
    /// Commits that failed in the interval.
    failed: u64,
    /// Commits queued or running.
    queue: u64,
    staged: u64,
    staged_bytes: u64,
    oldest_uncommitted_ms: u64,
    /// Time of a save, from submission to answer.
    commit: Histogram,
    /// Time of a flush.
    flush: Histogram,
    #[serde(flatten)]
    activity: Activity,
}

/// Samples of the interval by time.
#[derive(Debug, Clone, Default, Serialize)]
struct Histogram {
    /// Upper bound of half of the samples, microseconds; 0 without samples.
    p50_us: u64,
    /// Upper bound of 99 %.
    p99_us: u64,
    /// Bound in microseconds, and the samples above the bound before it; a last one without a bound.
    buckets: Vec<(Option<u64>, u64)>,
}

impl Histogram {
    fn between(pairs: &[(&Buckets, &Buckets)]) -> Self {
        let bounds = pairs.first().map_or(&[][..], |p| &p.1.upto);
        let upto = |i: usize, b: &Buckets| b.upto.get(i).map_or(0, |u| u.1);
        let gain = |f: &dyn Fn(&Buckets) -> u64| pairs.iter().map(|p| f(p.1).saturating_sub(f(p.0))).sum::<u64>();
        let mut buckets = Vec::new();
        let mut below = 0;
        for (i, (bound, _)) in bounds.iter().enumerate() {
            let all = gain(&|b| upto(i, b));
            buckets.push((Some(*bound), all.saturating_sub(below)));
            below = all;
        }
        buckets.push((None, gain(&|b| b.count).saturating_sub(below)));
        let mut h = Self { p50_us: 0, p99_us: 0, buckets };
        (h.p50_us, h.p99_us) = (h.quantile(50), h.quantile(99));
        h
    }

    fn count(&self) -> u64 {
        self.buckets.iter().map(|b| b.1).sum()
    }

    /// The bound that `percent` of the samples do not exceed; what has no bound counts as the last one.
    fn quantile(&self, percent: u64) -> u64 {
        let wanted = (self.count() * percent).div_ceil(100);
        let (mut seen, mut last) = (0, 0);
        for (bound, n) in &self.buckets {
            last = bound.unwrap_or(last);
            seen += n;
            if seen >= wanted && wanted > 0 {
                return last;
            }
        }
        0
    }
}

impl View {
    /// What happened from `a` to `b`, samples of the same mount.
    pub fn between(a: &Sample, b: &Sample) -> Self {
        let interval_ms = b.at_ms.saturating_sub(a.at_ms);
        let (was, is) = (&a.status.counters, &b.status.counters);
        let rate = |was: u64, is: u64| per(is.saturating_sub(was) * 1000, interval_ms);
        let gain = |was: u64, is: u64| is.saturating_sub(was);
        let (ops, flushes) = (gain(was.batched_ops, is.batched_ops), gain(was.flush_calls, is.flush_calls));
        let commits: Vec<_> = a.histograms.commit.iter().zip(&b.histograms.commit).map(|(a, b)| (&a.1, &b.1)).collect();
        Self {
            health: b.status.health.clone(),
            reason: b.status.reason.clone(),
            mountpoint: b.status.mountpoint.clone(),
            interval_ms,
            commits_per_s: rate(was.commits, is.commits),
            in_place_syncs_per_s: rate(was.in_place_syncs, is.in_place_syncs),
            flush_calls_per_s: rate(was.flush_calls, is.flush_calls),
            batches_per_s: rate(was.batches, is.batches),
            coalescing: per(ops, flushes),
            failed: gain(was.commit_failures, is.commit_failures),
            queue: is.in_flight,
            staged: is.staged_now,
            staged_bytes: is.staged_bytes,
            oldest_uncommitted_ms: b.status.oldest_uncommitted_ms,
            commit: Histogram::between(&commits),
            flush: Histogram::between(&[(&a.histograms.flush, &b.histograms.flush)]),
            activity: b.activity.clone(),
        }
    }

    /// The screen, at most `height` lines of at most `width` characters.
    pub fn lines(&self, width: usize, height: usize) -> Vec<String> {
        let mut lines = self.head();
        let histogram = self.histogram();
        let rest = height.saturating_sub(lines.len() + histogram.len() + 1);
        lines.push(String::new());
        lines.extend(histogram);
        // Half of what is left for the files, a quarter each for processes and slow saves, with their heads.
        let of = |share: usize| (rest * share / 4).saturating_sub(2);
        lines.extend(self.files(of(2)));
        lines.extend(self.processes(of(1)));
        lines.extend(self.slow(of(1)));
        lines.truncate(height);
        lines.iter().map(|l| fit(l, width)).collect()
    }

    fn head(&self) -> Vec<String> {
        let reason = if self.reason.is_empty() { String::new() } else { format!(": {}", self.reason) };
        let failed = if self.failed == 0 { String::new() } else { format!("   {} FAILED", self.failed) };
        let age = ms(self.oldest_uncommitted_ms * 1000);
        vec![
            format!("fsys top   {}   {}{reason}", self.mountpoint, self.health),
            format!(
                "saves {:.0}/s   synced in place {:.0}/s   flushes {:.0}/s   {:.1} operations a flush{failed}",
                self.commits_per_s, self.in_place_syncs_per_s, self.flush_calls_per_s, self.coalescing
            ),
            format!("queue {}   staged {} ({} bytes), the oldest {age} ms", self.queue, self.staged, self.staged_bytes),
            format!(
                "save half within {} ms, 99 % {} ms   flush half within {} ms, 99 % {} ms",
                ms(self.commit.p50_us),
                ms(self.commit.p99_us),
                ms(self.flush.p50_us),
                ms(self.flush.p99_us)
            ),
        ]
    }

    /// The buckets from the first to the last that has samples.
    fn histogram(&self) -> Vec<String> {
        let h = &self.commit.buckets;
        let used = |b: &(Option<u64>, u64)| b.1 > 0;
        let (Some(first), Some(last)) = (h.iter().position(used), h.iter().rposition(used)) else {
            return vec!["no saves in this interval".into()];
        };
        let most = h.iter().map(|b| b.1).max().unwrap_or(1).max(1);
        let mut lines = vec![format!("saves by time, {:.1} s", per(self.interval_ms, 1000))];
        for (bound, n) in &h[first..=last] {
            let bound = bound.map_or_else(|| "     longer".to_owned(), |b| format!("{:>8} ms", ms(b)));
            let bar = "#".repeat((*n as usize * BAR).div_ceil(most as usize));
            lines.push(format!("{bound} {bar:<BAR$} {n}"));
        }
        lines
    }

    fn files(&self, max: usize) -> Vec<String> {
        let rows = self
            .activity
            .files
            .iter()
            .map(|f| row(f.commits, f.mean_us, f.max_us, &format!("{}   {}", path(&f.path), process(&f.process))));
        self.section("busiest files", rows.take(max).collect())
    }

    fn processes(&self, max: usize) -> Vec<String> {
        let rows = self.activity.processes.iter().map(|p| row(p.commits, p.mean_us, p.max_us, &process(&p.process)));
        self.section("busiest processes", rows.take(max).collect())
    }

    fn section(&self, title: &str, rows: Vec<String>) -> Vec<String> {
        if rows.is_empty() {
            return rows;
        }
        let head = format!("{:>8} {:>9} {:>9}  {title}, last {} s", "saves", "mean ms", "max ms", self.seconds());
        [String::new(), head].into_iter().chain(rows).collect()
    }

    fn slow(&self, max: usize) -> Vec<String> {
        let rows: Vec<_> = self
            .activity
            .slow
            .iter()
            .take(max)
            .map(|s| {
                let step = format!("{} {}", s.step, ms(s.step_us));
                format!(
                    "{:>9} {step:>22} {:>7.1} s  {}   {}",
                    ms(s.took_us),
                    per(s.ago_ms, 1000),
                    path(&s.path),
                    process(&s.process)
                )
            })
            .collect();
        if rows.is_empty() {
            return rows;
        }
        let head = format!("{:>9} {:>22} {:>9}  slowest saves, last {} s", "ms", "longest step", "ago", self.seconds());
        [String::new(), head].into_iter().chain(rows).collect()
    }

    fn seconds(&self) -> u64 {
        self.activity.window_ms.div_ceil(1000)
    }
}

fn row(commits: u64, mean_us: u64, max_us: u64, what: &str) -> String {
    format!("{commits:>8} {:>9} {:>9}  {what}", ms(mean_us), ms(max_us))
}

fn path(path: &str) -> &str {
    if path.is_empty() { "(no name)" } else { path }
}

fn process(p: &Process) -> String {
    match (p.pid, p.command.as_str()) {
        (0, _) => "unknown".into(),
        (pid, "") => format!("{pid} (ended)"),
        (pid, command) => format!("{pid} {command}"),
    }
}

/// Microseconds as milliseconds, with as many places as tell something.
fn ms(us: u64) -> String {
    let places = match us {
        0 => 0,
        1..1000 => 2,
        1000..100_000 => 1,
        _ => 0,
    };
    format!("{:.places$}", per(us, 1000))
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people")]
fn per(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// At most `width` characters; names may hold anything, so what would move the cursor is shown as `?`.
fn fit(line: &str, width: usize) -> String {
    line.chars().take(width).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::testing::status;
    use crate::telemetry::Latency;
    use crate::telemetry::activity::{FileActivity, Histograms, SlowCommit};

    const BOUNDS: [u64; 3] = [1000, 10_000, 100_000];

    fn sample(at_ms: u64, commits: &[u64]) -> Sample {
        let l = Latency::default();
        commits.iter().for_each(|us| l.record_value(*us));
        let mut status = status();
        let n = commits.len() as u64;
        (status.counters.commits, status.counters.batched_ops, status.counters.flush_calls) = (n, n, n / 2);
        let histograms = Histograms {
            commit: vec![("close".into(), l.buckets(&BOUNDS))],
            flush: l.buckets(&BOUNDS),
            ..Histograms::default()
        };
        let process = Process { pid: 7, command: "cp".into() };
        let file = |i: u64| FileActivity {
            path: format!("f\u{1b}{i}"),
            commits: i,
            mean_us: 1500,
            max_us: 2500,
            process: process.clone(),
        };
        let slow = SlowCommit {
            path: "s".into(),
            took_us: 2500,
            step: "parent sync".into(),
            step_us: 2400,
            ago_ms: 300,
            process: process.clone(),
        };
        let activity =
            Activity { window_ms: 9500, files: (0..50).map(file).collect(), processes: vec![], slow: vec![slow] };
        Sample { at_ms, status, histograms, activity }
    }

    #[test]
    fn rates_and_times_are_of_the_interval() {
        let before = [500; 10];
        let after: Vec<u64> = before.iter().copied().chain([5000; 98]).chain([500_000; 2]).collect();
        let v = View::between(&sample(1000, &before), &sample(3000, &after));
        assert_eq!((v.commits_per_s, v.coalescing), (50.0, 2.0));
        assert_eq!(v.commit.buckets, [(Some(1000), 0), (Some(10_000), 98), (Some(100_000), 0), (None, 2)]);
        assert_eq!((v.commit.p50_us, v.commit.p99_us), (10_000, 100_000));
        let text = v.lines(100, 60).join("\n");
        for part in
            ["saves 50/s", "2.0 operations a flush", "10.0 ms ####", "longer", "7 cp", "parent sync 2.4", "last 10 s"]
        {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn fits_every_screen_and_shows_no_control_characters() {
        let v = View::between(&sample(0, &[]), &sample(1000, &[500, 50_000]));
        for (width, height) in [(0, 0), (1, 1), (20, 5), (80, 24), (200, 100)] {
            let lines = v.lines(width, height);
            assert!(lines.len() <= height && lines.iter().all(|l| l.chars().count() <= width), "{width}x{height}");
            assert!(lines.iter().all(|l| !l.contains('\u{1b}')));
        }
        assert!(View::between(&sample(5, &[]), &sample(5, &[])).lines(80, 24).join("").contains("no saves"));
    }
}

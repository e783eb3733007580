//! `fsys bench`: a workload through the mount against its backing directory, side by side, with a verdict.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::Output;
use super::chart::{Chart, figure};
use super::client::{Daemon, find_path, path_bytes, strange};
use super::progress::Progress;
use crate::config::policy::{Durability, Policy};
use crate::error::{Error, Exit, Result};
use crate::mount::control::{Answer, Request};
use crate::telemetry::Status;
use crate::tuning::load::{self, Sample, Shape, Style};
use crate::tuning::scratch::Scratch;

const EXAMPLE: &str = "Examples:
  fsys bench /mnt/fsys
  fsys bench --writers 32 --size 16384 --style fsync --svg bench.svg /mnt/fsys/mail

Saves for about half a minute through the mount and in its backing directory, by turns, in directories
that are removed at the end. The level is the policy of that path: `fsys get` shows it. Try another:
`fsys set durability=LEVEL`, measure, `fsys set --unset durability`.";

/// Measure your own workload through the mount against its backing directory, with a verdict
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// Programs that save at the same time
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=1024))]
    writers: u16,
    /// Bytes of a save
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=67_108_864))]
    size: u32,
    /// How the programs save
    #[arg(long, value_enum, default_value_t = Style::Rewrite)]
    style: Style,
    /// Rounds; in each, every way gets its turn
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=100))]
    rounds: u8,
    /// Milliseconds of each turn
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    time: u32,
    /// Draw the result into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// For programs
    #[arg(long)]
    json: bool,
    /// The mount, or a directory in it
    directory: PathBuf,
}

/// A way to save, and what it gave.
#[derive(Debug, Serialize)]
struct Way {
    name: &'static str,
    /// Whether a save is on stable storage when its last call returns.
    durable: bool,
    /// Median of the rounds, saves per second.
    per_s: f64,
    /// Slowest and fastest round.
    min_per_s: f64,
    max_per_s: f64,
    /// Medians of the rounds.
    p50_us: u64,
    p99_us: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    directory: PathBuf,
    filesystem: String,
    policy: Policy,
    shape: Shape,
    rounds: u8,
    /// The mount first.
    ways: Vec<Way>,
    /// Operations per batch in the mount's turns.
    coalescing: f64,
    verdict: String,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let report = measure(args)?;
    let chart = Chart {
        title: format!("saves per second, {} writer(s), {} bytes", report.shape.writers, report.shape.size),
        series: vec!["median".into()],
        rows: report
            .ways
            .iter()
            .map(|w| (w.name.to_owned(), vec![Some(w.per_s).filter(|r| *r > 0.0).map(Into::into)]))
            .collect(),
    };
    if let Some(file) = &args.svg {
        std::fs::write(file, chart.svg()).map_err(|e| failed(file, &e))?;
    }
    Output::new(args.json, &report, || words(&report, &chart))
}

fn failed(path: &Path, why: &dyn std::fmt::Display) -> Error {
    Error::new(
        Exit::System,
        format!("cannot measure with {}", path.display()),
        why,
        "no file of yours was touched",
        "see that you may write in the mount and in its backing directory, and that there is room",
    )
}

fn measure(args: &Args) -> Result<Report> {
    let directory = std::fs::canonicalize(&args.directory).map_err(|e| failed(&args.directory, &e))?;
    let (mount, relative) = find_path(&directory)?;
    let before = status(&mount)?;
    let raw_dir = Path::new(&before.backing).join(&relative);
    let through = Scratch::new(&directory, "fsys-bench").map_err(|e| failed(&directory, &e))?;
    let raw = Scratch::new(&raw_dir, "fsys-bench-raw").map_err(|e| failed(&raw_dir, &e))?;
    let shape = Shape { writers: usize::from(args.writers), size: args.size as usize, style: args.style };
    let mut ways = vec![("through the mount", shape.style, through.path())];
    if shape.style != Style::Rename {
        ways.push(("bare, the same calls", shape.style, raw.path()));
    }
    ways.push(("bare, safe (rename)", Style::Rename, raw.path()));

    let mut progress = Progress::new(usize::from(args.rounds) + 1);
    let turn = |style: Style, dir: &Path, ms: u32| -> Result<Sample> {
        // What the turn before left in memory must not be flushed in this one.
        File::open(&raw_dir).and_then(|d| Ok(rustix::fs::syncfs(d)?)).map_err(|e| failed(&raw_dir, &e))?;
        load::run(dir, &Shape { style, ..shape }, Duration::from_millis(ms.into()), u64::MAX)
            .map_err(|e| failed(dir, &e))
    };
    progress.step("warming up")?;
    for (_, style, dir) in &ways {
        turn(*style, dir, args.time / 5)?;
    }
    let counted = status(&mount)?;
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); ways.len()];
    for round in 0..usize::from(args.rounds) {
        progress.step(&format!("round {}", round + 1))?;
        for step in 0..ways.len() {
            let i = (step + round) % ways.len();
            samples[i].push(turn(ways[i].1, ways[i].2, args.time)?);
        }
    }
    drop(progress);
    let after = status(&mount)?;
    // Of a file that the mount has: rules match files.
    let probe = through.path().join("probe");
    std::fs::write(&probe, "").map_err(|e| failed(&probe, &e))?;
    let policy = policy(&mount, &relative.join(through.path().file_name().unwrap_or_default()).join("probe"))?;
    let durable =
        |dir: &Path, style| if dir == raw.path() { style == Style::Rename } else { waits(policy.durability, style) };
    let ways: Vec<Way> =
        ways.iter().zip(samples).map(|((name, style, dir), s)| way(name, durable(dir, *style), &s)).collect();
    let verdict = verdict(&ways);
    let coalescing = per(
        after.counters.batched_ops - counted.counters.batched_ops,
        after.counters.batches - counted.counters.batches,
    );
    Ok(Report {
        directory,
        filesystem: before.filesystem,
        policy,
        shape,
        rounds: args.rounds,
        ways,
        coalescing,
        verdict,
    })
}

/// Whether a save waits until it is durable.
fn waits(level: Durability, style: Style) -> bool {
    match level {
        Durability::Always | Durability::Close => true,
        Durability::Fsync => matches!(style, Style::Fsync | Style::Rename),
        Durability::Relaxed => false,
    }
}

fn status(mount: &crate::mount::table::Mounted) -> Result<Box<Status>> {
    match Daemon::of(mount)?.ask(&Request::Status, Duration::ZERO)? {
        Answer::Status(status) => Ok(status),
        other => Err(strange(&other)),
    }
}

fn policy(mount: &crate::mount::table::Mounted, relative: &Path) -> Result<Policy> {
    match Daemon::of(mount)?.ask(&Request::Get { path: path_bytes(relative) }, Duration::ZERO)? {
        Answer::Path(report) => Ok(report.policy),
        other => Err(strange(&other)),
    }
}

fn way(name: &'static str, durable: bool, samples: &[Sample]) -> Way {
    let mut rates: Vec<_> = samples.iter().map(|s| s.per_s).collect();
    rates.sort_by(f64::total_cmp);
    let middle = |value: fn(&Sample) -> u64| {
        let mut all: Vec<_> = samples.iter().map(value).collect();
        all.sort_unstable();
        all[all.len() / 2]
    };
    Way {
        name,
        durable,
        per_s: rates[rates.len() / 2],
        min_per_s: rates[0],
        max_per_s: rates[rates.len() - 1],
        p50_us: middle(|s| s.p50_us),
        p99_us: middle(|s| s.p99_us),
    }
}

#[allow(clippy::cast_precision_loss)] // counts
fn per(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// What the figures say. Differences within the spread of the rounds are none.
fn verdict(ways: &[Way]) -> String {
    let mount = &ways[0];
    let against = |other: &Way| {
        let ratio = mount.per_s / other.per_s;
        match ratio {
            _ if mount.min_per_s <= other.max_per_s && other.min_per_s <= mount.max_per_s => "as fast as".to_owned(),
            r if r >= 1.0 => format!("{r:.1} times as fast as"),
            r => format!("{:.1} times slower than", 1.0 / r),
        }
    };
    let Some(safe) = ways.iter().skip(1).find(|w| w.durable) else { return String::new() };
    let unsafe_way = ways.iter().skip(1).find(|w| !w.durable);
    let kind =
        if mount.durable { "durable when the call returns" } else { "whole, and durable within commit_interval_ms" };
    let mut text = format!("saves through the mount are {kind}: {} saving safely by hand", against(safe));
    if let Some(bare) = unsafe_way {
        write!(text, ", {} the same calls without any safety", against(bare)).unwrap_or_default();
    }
    text
}

fn words(r: &Report, chart: &Chart) -> String {
    let policy: Vec<_> = r.policy.values().iter().take(3).map(|(key, value)| format!("{key} {value}")).collect();
    let mut text = format!("{}: {}; {}\n\n", r.directory.display(), r.filesystem, policy.join(", "));
    let mut put = |line: String| writeln!(text, "{line}").unwrap_or_default();
    put(format!("{:<22}{:>10}{:>22}{:>11}{:>11}  durable", "", "saves/s", "(min - max)", "p50 ms", "p99 ms"));
    let ms = |us: u64| format!("{}.{:03}", us / 1000, us % 1000);
    for w in &r.ways {
        let spread = format!("({} - {})", figure(w.min_per_s), figure(w.max_per_s));
        let durable = if w.durable { "yes" } else { "no" };
        put(format!(
            "{:<22}{:>10}{spread:>22}{:>11}{:>11}  {durable}",
            w.name,
            figure(w.per_s),
            ms(w.p50_us),
            ms(w.p99_us)
        ));
    }
    put(format!("\n{}\n\n{:.1} operations per batch of the mount\nverdict: {}", chart.text(), r.coalescing, r.verdict));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way_of(name: &'static str, durable: bool, rate: f64) -> Way {
        let sample = |per_s| Sample { saves: 1, per_s, p50_us: 10, p99_us: 20 };
        way(name, durable, &[sample(rate * 0.9), sample(rate), sample(rate * 1.1)])
    }

    #[test]
    fn the_verdict_knows_noise() {
        let ways = |mount: f64| [way_of("m", true, mount), way_of("same", false, 1000.0), way_of("safe", true, 100.0)];
        let text = verdict(&ways(300.0));
        assert!(
            text.contains("3.0 times as fast as saving safely") && text.contains("3.3 times slower than the same"),
            "{text}"
        );
        assert!(verdict(&ways(105.0)).contains("as fast as saving safely"));
        assert!(
            verdict(&[way_of("m", false, 50.0), way_of("safe", true, 100.0)]).contains("within commit_interval_ms")
        );
    }

    #[test]
    fn who_waits() {
        assert!(waits(Durability::Close, Style::Rewrite) && waits(Durability::Fsync, Style::Fsync));
        assert!(!waits(Durability::Fsync, Style::Rewrite) && !waits(Durability::Relaxed, Style::Rename));
    }
}

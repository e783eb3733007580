//! `fsys tune`: what the device under a directory can do, what each level would give there, and a configuration.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use super::Output;
use super::chart::{Chart, figure};
use super::client::Daemon;
use super::progress::Progress;
use crate::config::Limits;
use crate::config::keys::name_of;
use crate::config::policy::Method;
use crate::error::{Error, Exit, Result};
use crate::mount::table;
use crate::tuning::load::{self, Sample, Shape, Style};
use crate::tuning::measure::{BatchCost, Bed, SIZES, Timing};
use crate::tuning::model::{self, Forecast, Front, WINDOWS};
use crate::tuning::scratch::Scratch;

/// A run of a trial: long enough for what waits for the commit interval or `pending_max` to come into play.
const TRIAL: Duration = Duration::from_secs(1);
/// The median of so many runs is the forecast.
const TRIAL_ROUNDS: usize = 5;
/// Files of the groups whose flushes are compared.
const GROUP: usize = 16;
/// Writers that keep the daemon busy.
const MANY: usize = 8;
/// New files of one run of the measurement of a mount, and their bytes, at most: they all wait in memory or on the disk.
const FRONT_SAVES: usize = 4000;
const FRONT_BYTES: usize = 64 << 20;
/// Another method must be so much faster than `auto` to be recommended, in proportion and by microseconds a batch: less
/// is noise, or not worth to give up what `auto` learns.
const CLEARLY: (f64, f64) = (0.8, 500.0);

const EXAMPLE: &str = "Examples:
  fsys tune /data
  fsys tune --writers 1,16 --size 65536 --svg tune.svg --write /etc/fsys/data.toml /data

Measures in a temporary directory in BACKING, which is removed at the end; takes about a minute.
Run it while the device is as busy as it usually is. `fsys bench` shows what a mount then gives.";

/// Measure the device under a directory, predict what each level gives there, recommend a configuration
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub struct Args {
    /// Numbers of programs that save at the same time
    #[arg(long, value_delimiter = ',', default_value = "1,8,64", value_parser = clap::value_parser!(u16).range(1..=1024))]
    writers: Vec<u16>,
    /// Bytes of a save
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=67_108_864))]
    size: u32,
    /// Draw the forecast into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Write the recommended configuration to this new file
    #[arg(long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// For programs
    #[arg(long)]
    json: bool,
    /// The backing directory
    backing: PathBuf,
}

/// What was measured and what follows from it.
#[derive(Debug, Serialize)]
struct Report {
    backing: PathBuf,
    filesystem: String,
    strategy: String,
    size: usize,
    flushes: Vec<Timing>,
    /// Microseconds of a whole batch, by its size.
    batch: BatchCost,
    /// What a save costs without its flush; none when nothing can be mounted here.
    front: Option<Front>,
    /// Why not.
    no_front: String,
    rows: Vec<Row>,
    recommended: Recommended,
}

/// One number of writers.
#[derive(Debug, Serialize)]
struct Row {
    writers: usize,
    /// The proper sequence on the bare directory, measured.
    raw: Sample,
    /// Saves that wait: levels `always` and `close`, and `fsync` for programs that call fsync. As a trial mount gave it;
    /// without one, by the model alone.
    waiting: Forecast,
    /// The same with other windows, microseconds and saves per second: by the model, which the trial calibrated.
    windows: Vec<(u64, f64)>,
    /// Saves of new files that do not: levels `fsync` and `relaxed`.
    at_once: Option<Forecast>,
}

#[derive(Debug, Serialize)]
struct Recommended {
    method: String,
    window_us: u64,
    config: String,
}

/// Runs the verb.
pub fn run(args: &Args) -> Result<Output> {
    let backing = crate::mount::check::canonical("backing directory", &args.backing)?;
    if let Some(file) = args.write.as_ref().filter(|f| f.exists()) {
        return Err(not_written(file, &"it exists"));
    }
    let report = measure(&backing, args)?;
    let chart = chart(&report);
    if let Some(file) = &args.svg {
        std::fs::write(file, chart.svg()).map_err(|e| not_written(file, &e))?;
    }
    if let Some(file) = &args.write {
        std::fs::write(file, &report.recommended.config).map_err(|e| not_written(file, &e))?;
    }
    Output::new(args.json, &report, || words(&report, &chart))
}

fn not_written(file: &Path, why: &dyn std::fmt::Display) -> Error {
    let what = format!("cannot write {}", file.display());
    Error::new(Exit::Usage, what, why, "no file was changed", "name a new file in a directory that you may write")
}

fn not_measured(dir: &Path, why: &dyn std::fmt::Display) -> Error {
    Error::new(
        Exit::System,
        format!("cannot measure in {}", dir.display()),
        why,
        "no file of yours was touched",
        "see that you may write there and that there is room; `fsys doctor` looks closer",
    )
}

fn measure(backing: &Path, args: &Args) -> Result<Report> {
    let failed = |e: std::io::Error| not_measured(backing, &e);
    let methods = [Method::Sync, Method::Data, Method::Direct];
    let mut progress = Progress::new(5 + methods.len() + args.writers.len());
    let scratch = Scratch::new(backing, "fsys-tune").map_err(failed)?;
    let made = |name: &str| -> Result<PathBuf> {
        let dir = scratch.path().join(name);
        std::fs::create_dir(&dir).map(|()| dir).map_err(failed)
    };
    let size = args.size as usize;
    let bed = Bed::new(&made("bed")?, size).map_err(failed)?;

    progress.step(&format!("ways to flush {GROUP} files"))?;
    let flushes = bed.flushes(GROUP).map_err(failed)?;
    progress.step("batches as a mount commits them")?;
    let auto = bed.batches(Method::Auto, &SIZES).map_err(failed)?;
    let mut best = (Method::Auto, auto.clone());
    for method in methods {
        progress.step(&format!("batches with method {}", name_of(&method)))?;
        // Some file systems have no O_DIRECT, and then no method `direct`.
        let Ok(cost) = bed.batches(method, &[1, 4, GROUP]) else { continue };
        let faster = |n: &usize| {
            let than = best.1.us(*n);
            cost.us(*n) < (CLEARLY.0 * than).min(than - CLEARLY.1)
        };
        if [1, GROUP].iter().all(faster) {
            best = (method, cost);
        }
    }
    progress.step("a save through a mount, without its flush")?;
    let (data, mnt) = (made("data")?, made("mnt")?);
    let (front, no_front) = match front(&data, &mnt, size, auto.us(1)) {
        Ok(front) => (Some(front), String::new()),
        Err(e) => (None, format!("{}: {}", e.what, e.why)),
    };
    let Limits { batch_max, .. } = Limits::default();
    let writers: Vec<usize> = args.writers.iter().map(|w| usize::from(*w)).collect();
    let assumed = front.unwrap_or(Front { serial_us: 0.0, apart_us: 0.0, handover_us: 0.0 });
    let window_us = model::good_window_us(assumed, &best.1, &writers, batch_max);
    // What the model cannot know (how programs and daemon share the processors) a mount with these very settings shows.
    let mut trial = |durability: &str, style: Style| -> Result<Vec<Option<f64>>> {
        progress.step(&format!("a trial mount with durability={durability}"))?;
        if front.is_none() {
            return Ok(vec![None; writers.len()]);
        }
        let options = format!("durability={durability},method={},window_us={window_us}", name_of(&best.0));
        mounted(&data, &mnt, &options, || {
            // By turns, so that what disturbs the machine for a few seconds does not meet all runs of one number.
            let run =
                |n: &usize| load::run(&mnt, &Shape { writers: *n, size, style }, TRIAL, u64::MAX).map(|s| s.per_s);
            let round = |_| writers.iter().map(run).collect::<std::io::Result<Vec<_>>>();
            let rounds = (0..TRIAL_ROUNDS).map(round).collect::<std::io::Result<Vec<_>>>();
            let rounds = rounds.map_err(|e| not_measured(&mnt, &e))?;
            Ok((0..writers.len()).map(|i| Some(middle(rounds.iter().map(|r| r[i]).collect()))).collect())
        })
    };
    let waiting = trial("close", Style::Rewrite)?;
    let at_once = trial("relaxed", Style::Create)?;
    let raw = made("raw")?;
    let mut rows = Vec::new();
    for ((writers, waiting), at_once) in writers.into_iter().zip(waiting).zip(at_once) {
        progress.step(&format!("the proper sequence on the bare directory, {writers} writer(s)"))?;
        let shape = Shape { writers, size, style: Style::Rename };
        let model = |window| model::waiting(assumed, &best.1, writers, window, batch_max);
        let scale = waiting.map_or(1.0, |per_s| per_s / model(window_us).per_s);
        rows.push(Row {
            writers,
            windows: WINDOWS.map(|w| (w, model(w).per_s * scale)).into(),
            raw: load::run(&raw, &shape, Duration::from_secs(1), u64::MAX).map_err(failed)?,
            waiting: model(window_us).calibrated(waiting),
            at_once: at_once.map(|per_s| Forecast::of_rate(writers, per_s)),
        });
    }
    drop(progress);
    let config = config(backing, bed.probe().fs.as_str(), best.0, window_us, &rows);
    Ok(Report {
        backing: backing.into(),
        filesystem: bed.probe().fs.clone(),
        strategy: bed.probe().to_string(),
        size,
        flushes,
        batch: best.1,
        front,
        no_front,
        rows,
        recommended: Recommended { method: name_of(&best.0), window_us, config },
    })
}

/// What a save costs through a real mount besides its flush; `lone_us` is what a batch of one takes here.
fn front(data: &Path, mnt: &Path, size: usize, lone_us: f64) -> Result<Front> {
    let rate = |writers: usize, style| {
        let most = (FRONT_SAVES.min(FRONT_BYTES / size) / writers).max(8) as u64;
        rate(mnt, &Shape { writers, size, style }, Duration::from_millis(400), most)
    };
    // Nobody waits, and nothing is committed meanwhile: new files, since one that is saved again has to be committed
    // first. The first run warms the code.
    let at_once = "durability=relaxed,commit_interval_ms=3600000,pending_max=1048576";
    let (one, many) = mounted(data, mnt, at_once, || {
        rate(MANY, Style::Create).and_then(|_| Ok((rate(1, Style::Create)?, rate(MANY, Style::Create)?)))
    })?;
    let waiting = mounted(data, mnt, "durability=close", || rate(1, Style::Rewrite))?;
    Ok(Front::from_rates(one, many, waiting, lone_us))
}

/// Saves per second. The median of three runs: something else on the machine spoils one.
fn rate(dir: &Path, shape: &Shape, time: Duration, most: u64) -> Result<f64> {
    let run = |_| load::run(dir, shape, time, most).map(|s| s.per_s);
    Ok(middle((0..3).map(run).collect::<std::io::Result<Vec<_>>>().map_err(|e| not_measured(dir, &e))?))
}

/// The median of an odd number.
fn middle(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Does something with a mount, and unmounts.
fn mounted<T>(data: &Path, mnt: &Path, options: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let beside =
        std::env::current_exe().ok().and_then(|me| Some(me.parent()?.join("fsys-mount"))).filter(|p| p.exists());
    let options = format!("{options},log_file={}", data.with_extension("log").display());
    let mut command = Command::new(beside.unwrap_or_else(|| "fsys-mount".into()));
    let output = command.args(["-o", &options]).args([data, mnt]).output().map_err(|e| not_measured(mnt, &e))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(not_measured(mnt, &text.lines().map(str::trim).collect::<Vec<_>>().join("; ")));
    }
    let result = run();
    let mounts = table::read().map_err(|e| not_measured(mnt, &e))?;
    if let Some(mount) = table::at(&mounts, mnt) {
        Daemon::of(mount)?.stop(true, Duration::from_secs(90), |_| {})?;
    }
    result
}

fn config(backing: &Path, fs: &str, method: Method, window_us: u64, rows: &[Row]) -> String {
    let list = |rate: &dyn Fn(&Row) -> Option<f64>| {
        let words = rows.iter().filter_map(|r| Some(format!("{} writer(s) {}", r.writers, figure(rate(r)?))));
        words.collect::<Vec<_>>().join(", ")
    };
    format!(
        "# Recommended by `fsys tune` for {} ({fs}).\n\
         # Saves per second, predicted: {}\n\
         durability = \"close\"\n\
         # New files at once, and durable within commit_interval_ms: {}\n\
         # durability = \"fsync\"\n\
         method = \"{}\"\n\n\
         [limits]\n\
         window_us = {window_us}\n",
        backing.display(),
        list(&|r| Some(r.waiting.per_s)),
        list(&|r| r.at_once.map(|f| f.per_s)),
        name_of(&method),
    )
}

fn chart(report: &Report) -> Chart {
    Chart {
        title: format!("saves per second of {} bytes in {}, predicted", report.size, report.backing.display()),
        series: ["always, close", "fsync, relaxed (new files)", "bare: rename"].map(str::to_owned).to_vec(),
        rows: report
            .rows
            .iter()
            .map(|r| {
                let values = vec![Some(r.waiting.per_s), r.at_once.map(|f| f.per_s), Some(r.raw.per_s)];
                (
                    format!("{} writer(s)", r.writers),
                    values.into_iter().map(|v| v.filter(|v| *v > 0.0).map(Into::into)).collect(),
                )
            })
            .collect(),
    }
}

fn words(r: &Report, chart: &Chart) -> String {
    let mut text = format!("{}: {}, {}\n", r.backing.display(), r.filesystem, r.strategy);
    let mut put = |line: String| writeln!(text, "{line}").unwrap_or_default();
    let ms = |us: f64| format!("{:.3} ms", us / 1000.0);
    put(format!("\nways to flush {GROUP} files of {} bytes{:>22}{:>15}", r.size, "mean", "slowest"));
    for t in &r.flushes {
        put(format!("  {:<45}{:>15}{:>15}", t.what, ms(t.us), ms(t.max_us)));
    }
    let batch: Vec<_> = r.batch.0.iter().map(|(n, us)| format!("{n}: {}", ms(*us))).collect();
    put(format!("\na batch as a mount commits it, by its size\n  {}", batch.join(", ")));
    match r.front {
        Some(f) => put(format!(
            "a save through a mount, without its flush\n  {} for a lone program, {:+.3} ms when it waits; at most {} saves/s of many",
            ms(f.serial_us + f.apart_us),
            f.handover_us / 1000.0,
            figure(1e6 / f.serial_us)
        )),
        None => {
            put(format!("NOT measured: what a mount itself costs ({}); the forecast is an upper bound", r.no_front));
        }
    }
    put(format!("\n{}\n", chart.text()));
    put(format!("{:>8}{:>26}{:>26}{:>22}", "writers", "always, close", "fsync, relaxed", "bare: rename"));
    for row in &r.rows {
        let cell = |f: &Forecast| format!("{}/s, {}", figure(f.per_s), ms(f.latency_us));
        let at_once = row.at_once.as_ref().map_or_else(|| "-".into(), cell);
        let raw = format!("{}/s", figure(row.raw.per_s));
        put(format!("{:>8}{:>26}{at_once:>26}{raw:>22}", row.writers, cell(&row.waiting)));
    }
    put(format!(
        "\nalways, close: saves/s by window_us\n{:>8}{}",
        "writers",
        WINDOWS.map(|w| format!("{w:>10}")).concat()
    ));
    for row in &r.rows {
        let rates: String = row.windows.iter().map(|(_, rate)| format!("{:>10}", figure(*rate))).collect();
        put(format!("{:>8}{rates}", row.writers));
    }
    put(format!("\nrecommended:\n\n{}", r.recommended.config));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recommended_configuration_is_valid() {
        let forecast = Forecast { writers: 8, per_s: 1234.5, latency_us: 810.0, coalescing: Some(8.0) };
        let raw = Sample { saves: 10, per_s: 100.0, p50_us: 1, p99_us: 2 };
        let rows = [Row { writers: 8, raw, waiting: forecast, windows: vec![], at_once: None }];
        let text = config(Path::new("/data"), "ext4", Method::Data, 500, &rows);
        let mut parsed = crate::config::Config::default();
        crate::config::file::parse(&text, "recommended", &mut parsed).unwrap();
        assert_eq!((parsed.limits.window_us, parsed.policies.base.method), (500, Method::Data));
        assert!(text.contains("8 writer(s) 1,234"), "{text}");
    }
}

//! Whole programs through the mount against the raw file system, at the levels `close`, `fsync` and `relaxed`.
//!
//! Every round runs each row on the raw file system, through three mounts and on the raw file system again, in an
//! order that rotates, each in a fresh directory that is prepared outside the timed part. Reported are the medians of
//! the ratios of their times with the smallest and the largest, and the ratio of raw to raw, which is the noise.
//! `scripts/bench --programs` is the way to run it.

#[path = "../../tests/common/mod.rs"]
mod common;
mod databases;
mod inputs;
mod trees;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use common::mount::fsys;
use common::{Kind, LoopFs, Mount, can_mount, run};
use inputs::Inputs;

#[derive(Parser)]
struct Args {
    /// Filesystem
    #[arg(long, default_value = "ext4")]
    fs: String,
    /// Device: `plain`, or the time that a flush takes, in microseconds
    #[arg(long, default_value = "plain")]
    device: String,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only rows whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Size of the inputs: 1 is 20,000 files to unpack, 0.1 a tenth of everything
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// A tar file with a source tree, made by `scripts/tree`
    #[arg(long)]
    tree: Option<PathBuf>,
    /// `-o` list for the mounts, after the level and the rules that databases are in place
    #[arg(long, default_value = "")]
    options: String,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// Called when all is prepared: nothing is left to do then but what is timed.
type Settle<'a> = &'a dyn Fn();

/// A row of the table.
struct Row {
    name: &'static str,
    /// What is counted per second; none: the program runs once, and its time is shown.
    unit: Option<&'static str>,
    /// Makes what all its runs share, outside the file system under test. An error says why the row is left out.
    input: fn(&Inputs) -> Result<(), String>,
    /// Runs it in an empty directory; gives the seconds that the program took, or one of what is counted.
    run: fn(&Inputs, &Path, Settle) -> f64,
}

const LEVELS: [&str; 3] = ["close", "fsync", "relaxed"];

/// Databases are in place, as `contrib/examples/database.toml` recommends; their level is the one of the mount.
const RULES: &str = "rule=*.db*:mode=in-place,rule=**/pgdata/**:mode=in-place";

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if !can_mount("bench") {
        return std::process::ExitCode::FAILURE;
    }
    let inputs = Inputs::new(args.tree.clone(), args.scale);
    let kind = Kind::named(&args.fs);
    let fs = match args.device.as_str() {
        "plain" => LoopFs::new(kind, 12_000),
        us => LoopFs::slow(kind, 12_000, us.parse().expect("microseconds of --device")),
    };
    let raw = fs.subdir("raw");
    let mounts = LEVELS.map(|level| {
        let options = format!("durability={level},{RULES},{}", args.options);
        Mount::start(&fs.subdir(level), options.trim_end_matches(','))
    });
    let mut targets = vec![raw.as_path()];
    targets.extend(mounts.iter().map(Mount::path));
    targets.push(&raw);
    let settle = || {
        mounts.iter().for_each(|m| _ = run(fsys().arg("drain").arg(m.path())));
        run(Command::new("sync").arg("-f").arg(fs.path()));
    };
    header(&args);
    for row in trees::ROWS.iter().chain(&databases::ROWS).filter(|r| r.name.contains(&args.only)) {
        match (row.input)(&inputs) {
            Ok(()) => print(row, &measure(row, &inputs, &targets, args.rounds, &settle)),
            Err(why) => println!("| {} | left out: {} | | | | |", row.name, why.trim().replace('\n', " ")),
        }
    }
    std::process::ExitCode::SUCCESS
}

fn header(args: &Args) {
    let device = match args.device.as_str() {
        "plain" => "plain loop device".to_owned(),
        us => format!("flushes take {us} us"),
    };
    println!("\n### {}, {device}, scale {}, {} rounds\n", args.fs, args.scale, args.rounds);
    println!(
        "Time through the mount / raw, median (min-max): less than 1 is faster than raw. Nothing is durable when a"
    );
    println!(
        "program ends on raw or at `relaxed`, unless it calls fsync on raw; at `close` every file is that was closed."
    );
    println!("Databases are in place; `contrib/examples/database.toml` recommends `fsync` for them.\n");
    println!("| program | raw | close | fsync | relaxed | raw again |\n|---|---|---|---|---|---|");
}

/// The seconds of each target, for each round.
fn measure(row: &Row, inputs: &Inputs, targets: &[&Path], rounds: usize, settle: Settle) -> Vec<Vec<f64>> {
    let once = |target: &Path| {
        let dir = target.join("work");
        fs::create_dir(&dir).expect("a fresh directory");
        let seconds = (row.run)(inputs, &dir, settle);
        run(Command::new("rm").arg("-rf").arg(&dir));
        seconds
    };
    // The program itself is in memory from then on.
    once(targets[0]);
    let mut all = Vec::new();
    for round in 0..rounds {
        let mut seconds = vec![0.0; targets.len()];
        for step in 0..targets.len() {
            let i = (step + round) % targets.len();
            seconds[i] = once(targets[i]);
        }
        all.push(seconds);
    }
    all
}

fn print(row: &Row, rounds: &[Vec<f64>]) {
    let last = LEVELS.len() + 1;
    let raw = |r: &[f64]| f64::midpoint(r[0], r[last]);
    let ratios = (1..last).map(|i| {
        let (ratio, low, high) = middle(rounds.iter().map(|r| r[i] / raw(r)).collect());
        format!("{ratio:.2} ({low:.2}-{high:.2}) | ")
    });
    let ratios: String = ratios.collect();
    let seconds = middle(rounds.iter().map(|r| raw(r)).collect()).0;
    let shown = match row.unit {
        Some(unit) => format!("{:.0} {unit}/s", 1.0 / seconds),
        None => format!("{seconds:.2} s"),
    };
    let (noise, low, high) = middle(rounds.iter().map(|r| r[last] / r[0]).collect());
    println!("| {} | {shown} | {ratios}{noise:.2} ({low:.2}-{high:.2}) |", row.name);
}

/// Median, smallest, largest.
fn middle(mut all: Vec<f64>) -> (f64, f64, f64) {
    all.sort_by(f64::total_cmp);
    (all[all.len() / 2], all[0], all[all.len() - 1])
}

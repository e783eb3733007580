//! Durable saves end to end: the proper sequence on the raw filesystem against saves through the mount.
//!
//! Every round runs all variants one after the other on the same filesystem, in an order that rotates, and
//! gives one ratio for each; reported are medians with the smallest and the largest. The raw variant runs twice
//! a round: the ratio of raw to raw shows the noise. `scripts/bench` is the way to run it.

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};

use clap::Parser;
use common::tools::run_tool;
use common::{Kind, LoopFs, Mount, can_mount};

#[derive(Parser)]
struct Args {
    /// Filesystems
    #[arg(long, value_delimiter = ',', default_value = "ext4,xfs,btrfs")]
    fs: Vec<String>,
    /// Numbers of concurrent programs
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    writers: Vec<u32>,
    /// Rounds per cell
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds per variant and round
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Bytes per save
    #[arg(long, default_value_t = 4096)]
    size: usize,
    /// `-o` list for the mount
    #[arg(long, default_value = "")]
    options: String,
    /// Devices: `plain`, or the time that a flush takes, in microseconds
    #[arg(long, value_delimiter = ',', default_value = "plain,1000")]
    device: Vec<String>,
    /// Exit 1 when a bar is missed
    #[arg(long)]
    check: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// One way of saving.
#[derive(Clone, Copy, PartialEq)]
enum Variant {
    Raw,
    RawAgain,
    Naive,
    Dance,
}

const VARIANTS: [Variant; 4] = [Variant::Raw, Variant::RawAgain, Variant::Naive, Variant::Dance];

/// What one variant did in one round.
#[derive(Clone, Copy)]
struct Sample {
    rate: f64,
    flushes: f64,
    p50_us: f64,
    p99_us: f64,
}

/// The bars of the project for ext4: (writers, at least this ratio, at most this many flushes per save).
const BARS: [(u32, f64, f64); 3] = [(1, 1.0, f64::INFINITY), (8, 1.5, 0.25), (64, 1.5, 0.1)];

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if !can_mount("bench") {
        return std::process::ExitCode::FAILURE;
    }
    let mut missed = 0;
    for name in &args.fs {
        for device in &args.device {
            missed += bench(Kind::named(name), device, &args);
        }
    }
    std::process::ExitCode::from(u8::from(args.check && missed > 0))
}

fn bench(kind: Kind, device: &str, args: &Args) -> u32 {
    let fs = match device {
        "plain" => LoopFs::new(kind, 4096),
        us => LoopFs::slow(kind, 4096, us.parse().expect("microseconds of --device")),
    };
    let device = if device == "plain" { "plain loop device".to_owned() } else { format!("flushes take {device} us") };
    let raw = fs.subdir("raw");
    let mount = Mount::start(&fs.subdir("data"), &args.options);
    println!("\n### {}, {device}, {} bytes, {} rounds of {} s\n", kind.name(), args.size, args.rounds, args.seconds);
    println!("| writers | variant | saves/s | ratio to raw (min-max) | flushes per save | p50 us | p99 us | bar |");
    println!("|---|---|---|---|---|---|---|---|");
    let mut missed = 0;
    for &writers in &args.writers {
        let dirs: Vec<PathBuf> = VARIANTS
            .iter()
            .map(|v| {
                let root = if matches!(v, Variant::Raw | Variant::RawAgain) { &raw } else { mount.path() };
                let dir = root.join(format!("{writers}-{}", *v as u8));
                std::fs::create_dir(&dir).expect("directory for a variant");
                dir
            })
            .collect();
        // One short run of each that is thrown away: files exist and code is warm from the first round on.
        for (variant, dir) in VARIANTS.iter().zip(&dirs) {
            measure(&fs, *variant, dir, writers, args, 0.2);
        }
        let mut rounds: Vec<[Sample; 4]> = Vec::new();
        for round in 0..args.rounds {
            let mut samples = [None; 4];
            for step in 0..VARIANTS.len() {
                let i = (step + round) % VARIANTS.len();
                samples[i] = Some(measure(&fs, VARIANTS[i], &dirs[i], writers, args, args.seconds));
            }
            rounds.push(samples.map(|s| s.expect("every variant ran")));
        }
        for (i, variant) in VARIANTS.iter().enumerate() {
            missed += print_row(kind, writers, *variant, i, &rounds);
        }
    }
    missed
}

fn measure(fs: &LoopFs, variant: Variant, dir: &Path, writers: u32, args: &Args, seconds: f64) -> Sample {
    let style = if variant == Variant::Naive { "naive" } else { "dance" };
    let before = fs.flushes();
    let (count, time, size) = (writers.to_string(), seconds.to_string(), args.size.to_string());
    let options = ["--writers", &count, "--seconds", &time, "--size", &size, "--style", style];
    let ended = run_tool("saver", dir, writers * 4, &options);
    assert_eq!(ended.code, 0, "{}\n{}", ended.summary, ended.complaint);
    let flushes = common::per(fs.flushes() - before, ended.count("saves"));
    Sample {
        rate: ended.figure("saves_per_s"),
        flushes,
        p50_us: ended.figure("p50_us"),
        p99_us: ended.figure("p99_us"),
    }
}

/// Prints one variant; gives 1 when it misses the project's bar.
fn print_row(kind: Kind, writers: u32, variant: Variant, index: usize, rounds: &[[Sample; 4]]) -> u32 {
    let middle = |value: &dyn Fn(&[Sample; 4]) -> f64| {
        let mut all: Vec<f64> = rounds.iter().map(value).collect();
        all.sort_by(f64::total_cmp);
        (all[all.len() / 2], all[0], all[all.len() - 1])
    };
    let (ratio, low, high) = middle(&|r| r[index].rate / r[0].rate);
    let flushes = middle(&|r| r[index].flushes).0;
    let name = match variant {
        Variant::Raw => "raw: temp, fsync, rename, fsync dir",
        Variant::RawAgain => "raw again (noise)",
        Variant::Naive => "mount: open, write, close",
        Variant::Dance => "mount: temp, fsync, rename, fsync dir",
    };
    let shown = if variant == Variant::Raw { "1".to_owned() } else { format!("{ratio:.2} ({low:.2}-{high:.2})") };
    let bar = BARS.iter().find(|(w, ..)| *w == writers && kind == Kind::Ext4 && variant == Variant::Naive);
    // No more saves than there are writers can wait for one flush: with fewer flushes they were not durable.
    let durable = flushes * f64::from(writers) > 0.9;
    let verdict = bar.map(|(_, at_least, at_most)| ratio >= *at_least && flushes <= *at_most);
    println!(
        "| {writers} | {name} | {:.0} | {shown} | {flushes:.3} | {:.0} | {:.0} | {} |",
        middle(&|r| r[index].rate).0,
        middle(&|r| r[index].p50_us).0,
        middle(&|r| r[index].p99_us).0,
        match verdict {
            _ if !durable => "NOT DURABLE",
            None => "",
            Some(true) => "met",
            Some(false) => "missed",
        }
    );
    u32::from(verdict == Some(false) || !durable)
}

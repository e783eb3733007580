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
    /// Transports, each with a mount of its own, compared in the same rounds
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    transport: Vec<String>,
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

/// One way of saving, and where.
struct Variant {
    name: String,
    style: &'static str,
    dir: PathBuf,
    raw: bool,
}

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
    let mounts: Vec<(&str, Mount)> = args
        .transport
        .iter()
        .map(|t| (t.as_str(), Mount::start(&fs.subdir(&format!("data-{t}")), &options(args, t))))
        .collect();
    println!("\n### {}, {device}, {} bytes, {} rounds of {} s\n", kind.name(), args.size, args.rounds, args.seconds);
    println!("| writers | variant | saves/s | ratio to raw (min-max) | flushes per save | p50 us | p99 us | bar |");
    println!("|---|---|---|---|---|---|---|---|");
    let mut missed = 0;
    for &writers in &args.writers {
        let variants = variants(&raw, &mounts, writers);
        // One short run of each that is thrown away: files exist and code is warm from the first round on.
        for variant in &variants {
            measure(&fs, variant, writers, args, 0.2);
        }
        let mut rounds: Vec<Vec<Sample>> = Vec::new();
        for round in 0..args.rounds {
            let mut samples = vec![None; variants.len()];
            for step in 0..variants.len() {
                let i = (step + round) % variants.len();
                samples[i] = Some(measure(&fs, &variants[i], writers, args, args.seconds));
            }
            rounds.push(samples.into_iter().map(|s| s.expect("every variant ran")).collect());
        }
        for (i, variant) in variants.iter().enumerate() {
            missed += print_row(kind, writers, variant, i, &rounds);
        }
        print_transports(writers, &args.transport, &rounds);
    }
    missed
}

fn options(args: &Args, transport: &str) -> String {
    let transport = format!("transport={transport}");
    if args.options.is_empty() { transport } else { format!("{},{transport}", args.options) }
}

/// Raw, raw again for the noise, then per mount the naive save and the proper sequence.
fn variants(raw: &Path, mounts: &[(&str, Mount)], writers: u32) -> Vec<Variant> {
    let made = |root: &Path, name: &str, style: &'static str, raw: bool, n: usize| {
        let dir = root.join(format!("{writers}-{n}"));
        std::fs::create_dir(&dir).expect("directory for a variant");
        Variant { name: name.to_owned(), style, dir, raw }
    };
    let mut all = vec![
        made(raw, "raw: temp, fsync, rename, fsync dir", "dance", true, 0),
        made(raw, "raw again (noise)", "dance", true, 1),
    ];
    for (transport, mount) in mounts {
        all.push(made(mount.path(), &format!("{transport}: open, write, close"), "naive", false, 0));
        all.push(made(mount.path(), &format!("{transport}: temp, fsync, rename, fsync dir"), "dance", false, 1));
    }
    all
}

fn measure(fs: &LoopFs, variant: &Variant, writers: u32, args: &Args, seconds: f64) -> Sample {
    let before = fs.flushes();
    let (count, time, size) = (writers.to_string(), seconds.to_string(), args.size.to_string());
    let options = ["--writers", &count, "--seconds", &time, "--size", &size, "--style", variant.style];
    let ended = run_tool("saver", &variant.dir, writers * 4, &options);
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
fn print_row(kind: Kind, writers: u32, variant: &Variant, index: usize, rounds: &[Vec<Sample>]) -> u32 {
    let middle = |value: &dyn Fn(&Vec<Sample>) -> f64| middle(rounds.iter().map(value).collect());
    let (ratio, low, high) = middle(&|r| r[index].rate / r[0].rate);
    let flushes = middle(&|r| r[index].flushes).0;
    let shown = if index == 0 { "1".to_owned() } else { format!("{ratio:.2} ({low:.2}-{high:.2})") };
    let bar =
        BARS.iter().find(|(w, ..)| *w == writers && kind == Kind::Ext4 && variant.style == "naive" && !variant.raw);
    // No more saves than there are writers can wait for one flush: with fewer flushes they were not durable.
    let durable = flushes * f64::from(writers) > 0.9;
    let verdict = bar.map(|(_, at_least, at_most)| ratio >= *at_least && flushes <= *at_most);
    println!(
        "| {writers} | {} | {:.0} | {shown} | {flushes:.3} | {:.0} | {:.0} | {} |",
        variant.name,
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

/// The transports against the first of them.
fn print_transports(writers: u32, transports: &[String], rounds: &[Vec<Sample>]) {
    for (t, name) in transports.iter().enumerate().skip(1) {
        for (style, at) in [("open, write, close", 2), ("temp, fsync, rename, fsync dir", 3)] {
            let (ratio, low, high) = middle(rounds.iter().map(|r| r[at + 2 * t].rate / r[at].rate).collect());
            println!(
                "| {writers} | {name} to {}: {style} | | {ratio:.2} ({low:.2}-{high:.2}) | | | | |",
                transports[0]
            );
        }
    }
}

/// Median, smallest, largest.
fn middle(mut all: Vec<f64>) -> (f64, f64, f64) {
    all.sort_by(f64::total_cmp);
    (all[all.len() / 2], all[0], all[all.len() - 1])
}

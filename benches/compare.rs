//! Ways to save, side by side on ext4: bare, the proper sequence, mount option `sync`, `data=journal`, libeatmydata,
//! and through the mount. The table of `contrib/doc/COMPARISON.md`. `scripts/compare` is the way to run it.

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use common::tools::tool;
use common::{Kind, LoopFs, Mount, can_mount, per, run_text};
use serde_json::Value;

#[derive(Parser)]
struct Args {
    /// Concurrent programs
    #[arg(long, default_value_t = 8)]
    writers: u32,
    /// Bytes per save
    #[arg(long, default_value_t = 4096)]
    size: usize,
    /// Seconds of each turn
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long a flush of the device takes, in microseconds
    #[arg(long, default_value_t = 1000)]
    flush_us: u64,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// A way to save.
struct Way {
    name: &'static str,
    /// Options of ext4.
    ext4: &'static [&'static str],
    /// Options of the mount; none: the bare file system.
    mount: Option<&'static str>,
    style: &'static str,
    /// A library that is loaded before.
    preload: Option<&'static str>,
}

const fn bare(name: &'static str, ext4: &'static [&'static str], style: &'static str) -> Way {
    Way { name, ext4, mount: None, style, preload: None }
}

const fn through(name: &'static str, options: &'static str) -> Way {
    Way { name, ext4: &[], mount: Some(options), style: "naive", preload: None }
}

const EATMYDATA: &str = "libeatmydata.so";

const WAYS: [Way; 9] = [
    bare("nothing: open, write, close", &[], "naive"),
    bare("temp, fsync, rename, fsync of the directory", &[], "dance"),
    bare("ext4 `sync`: open, write, close", &["sync"], "naive"),
    bare("ext4 `data=journal`: open, write, close", &["data=journal"], "naive"),
    bare("ext4 `data=journal`: temp, fsync, rename, fsync", &["data=journal"], "dance"),
    Way { preload: Some(EATMYDATA), ..bare("libeatmydata: temp, fsync, rename, fsync", &[], "dance") },
    through("**fsys-mount**, `close`: open, write, close", "durability=close"),
    through("**fsys-mount**, `fsync`: open, write, close", "durability=fsync"),
    through("**fsys-mount**, `relaxed`: open, write, close", "durability=relaxed"),
];

/// A way with its file system, ready to run.
struct Ready {
    way: &'static Way,
    // Before its file system: the order in which they end.
    _mount: Option<Mount>,
    dir: PathBuf,
    fs: LoopFs,
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if !can_mount("compare") {
        return std::process::ExitCode::FAILURE;
    }
    let ready: Vec<Ready> =
        WAYS.iter().filter(|w| w.preload.is_none_or(has_library)).map(|w| prepare(w, &args)).collect();
    let mut figures: Vec<Vec<(f64, f64)>> = vec![Vec::new(); ready.len()];
    for round in 0..=args.rounds {
        for step in 0..ready.len() {
            let i = (step + round) % ready.len();
            let figure = measure(&ready[i], &args);
            // The first round makes the files.
            if round > 0 {
                figures[i].push(figure);
            }
        }
    }
    println!(
        "ext4 on a loop device in memory whose flushes take {} us; {} programs, {} bytes, medians of {} rounds\n",
        args.flush_us, args.writers, args.size, args.rounds
    );
    println!("| way | saves/s | p99 ms | flushes of the device per save |");
    println!("|---|---|---|---|");
    for (r, mut f) in ready.iter().zip(figures) {
        f.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (rate, p99) = f[f.len() / 2];
        println!("| {} | {rate:.0} | {p99:.1} | {:.3} |", r.way.name, flushes(r, &args));
    }
    std::process::ExitCode::SUCCESS
}

fn has_library(name: &str) -> bool {
    let list = Command::new("ldconfig").arg("-p").output().map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let found = list.is_ok_and(|l| l.contains(name)) || Path::new("/usr/lib/x86_64-linux-gnu").join(name).exists();
    if !found {
        eprintln!("{name} is not installed (Debian: eatmydata): left out");
    }
    found
}

fn prepare(way: &'static Way, args: &Args) -> Ready {
    let fs = LoopFs::slow_with(Kind::Ext4, 1024, args.flush_us, way.ext4);
    let data = fs.subdir("data");
    let mount = way.mount.map(|options| Mount::start(&data, options));
    let dir = mount.as_ref().map_or(data, |m| m.path().to_owned());
    Ready { way, fs, dir, _mount: mount }
}

/// Saves per second and p99 in milliseconds.
fn measure(r: &Ready, args: &Args) -> (f64, f64) {
    let ended = run(r, args);
    (ended["saves_per_s"].as_f64().expect("a rate"), ended["p99_us"].as_f64().expect("a time") / 1000.0)
}

fn flushes(r: &Ready, args: &Args) -> f64 {
    let before = r.fs.flushes();
    let ended = run(r, args);
    per(r.fs.flushes() - before, ended["saves"].as_u64().expect("a count"))
}

fn run(r: &Ready, args: &Args) -> Value {
    // What the turn before left in memory is not flushed in this one.
    rustix::fs::syncfs(std::fs::File::open(r.fs.path()).expect("open")).expect("syncfs");
    let mut command = Command::new(tool("saver"));
    command.arg("--dir").arg(&r.dir).args(["--files", &(args.writers * 4).to_string()]);
    command.args(["--writers", &args.writers.to_string(), "--seconds", &args.seconds.to_string()]);
    command.args(["--size", &args.size.to_string(), "--style", r.way.style]);
    if let Some(library) = r.way.preload {
        command.env("LD_PRELOAD", library);
    }
    let text = run_text(&mut command);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

//! What things cost as work grows: writers, files in a directory, bytes in a file.
//!
//! Each point of a curve runs on the raw file system, through the mount and on the raw file system again, in an order
//! that rotates; reported are medians and the ratio of times, mount / raw, with the smallest and the largest. A knee is
//! a step at which that ratio rises: the largest is named. `scripts/bench --growth` is the way to run it.

#[path = "../../tests/common/mod.rs"]
mod common;
mod curve;
mod directory;
mod sizes;
mod writers;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use common::can_mount;

#[derive(Parser)]
struct Args {
    /// Filesystem
    #[arg(long, default_value = "ext4")]
    fs: String,
    /// Rounds
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only curves whose name contains this, or all of `writers:`, `directory:` or `size:`
    #[arg(long, default_value = "")]
    only: String,
    /// Most concurrent programs
    #[arg(long, default_value_t = 256)]
    writers: u64,
    /// Seconds of a turn of the writers
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Device of the writers: `plain`, or the time that a flush takes, in microseconds
    #[arg(long, default_value = "plain")]
    device: String,
    /// Most files in a directory
    #[arg(long, default_value_t = 1_000_000)]
    files: u64,
    /// Largest file, in MiB; the images need three times as much memory
    #[arg(long, default_value_t = 1024)]
    largest: u64,
    /// `-o` list for the mounts, after what the curves need
    #[arg(long, default_value = "")]
    options: String,
    /// Draw the curves into this directory
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    /// Whether a curve is asked for.
    fn wants(&self, grows: &str, name: &str) -> bool {
        format!("{grows}: {name}").contains(&self.only)
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !can_mount("bench") {
        return ExitCode::FAILURE;
    }
    if let Some(dir) = &args.svg {
        std::fs::create_dir_all(dir).expect("directory of the curves");
    }
    println!("\n### Growth on {}, {} rounds; ratios of times, mount / raw\n", args.fs, args.rounds);
    writers::run(&args);
    directory::run(&args);
    sizes::run(&args);
    ExitCode::SUCCESS
}

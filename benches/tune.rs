//! The forecast of `fsys tune` against what `fsys bench` then measures on the same device: plain, and with flushes
//! that take a given time. `scripts/bench-tune` is the way to run it.

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;

use clap::Parser;
use common::mount::fsys;
use common::{Kind, LoopFs, Mount, can_mount, run_text};
use serde_json::Value;

#[derive(Parser)]
struct Args {
    /// Filesystems
    #[arg(long, value_delimiter = ',', default_value = "ext4")]
    fs: Vec<String>,
    /// Numbers of concurrent programs
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    writers: Vec<u32>,
    /// Devices: `plain`, or the time that a flush takes, in microseconds
    #[arg(long, value_delimiter = ',', default_value = "plain,2000,10000")]
    device: Vec<String>,
    /// Largest part by which a forecast may be wrong
    #[arg(long, default_value_t = 0.25)]
    within: f64,
    /// Rounds of `fsys bench`
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// A level, which forecast of the report is for it, and how programs save for it.
const LEVELS: [(&str, &str, &str); 2] = [("close", "waiting", "rewrite"), ("relaxed", "at_once", "create")];

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if !can_mount("bench tune") {
        return std::process::ExitCode::FAILURE;
    }
    println!("| filesystem | flush of the device | level | writers | predicted/s | measured/s | off | |");
    println!("|---|---|---|---|---|---|---|---|");
    let mut wrong = 0;
    for name in &args.fs {
        for device in &args.device {
            wrong += device_of(Kind::named(name), device, &args);
        }
    }
    println!("\n{wrong} forecast(s) further off than {:.0} %", args.within * 100.0);
    std::process::ExitCode::from(u8::from(wrong > 0))
}

fn device_of(kind: Kind, device: &str, args: &Args) -> u32 {
    let fs = match device {
        "plain" => LoopFs::new(kind, 2048),
        us => LoopFs::slow(kind, 2048, us.parse().expect("microseconds of --device")),
    };
    let data = fs.subdir("data");
    let writers: Vec<String> = args.writers.iter().map(u32::to_string).collect();
    let report: Value = json(&["tune", "--json", "--writers", &writers.join(",")], &data);
    let config = fs.path().join("tuned.toml");
    let text = report["recommended"]["config"].as_str().expect("a configuration");
    std::fs::write(&config, text).expect("write the configuration");
    let mut wrong = 0;
    for (level, forecast, style) in LEVELS {
        let options = format!("config={},durability={level}", config.display());
        let mount = Mount::start(&data, &options);
        for row in report["rows"].as_array().expect("rows") {
            let writers = row["writers"].as_u64().expect("writers").to_string();
            let rounds = args.rounds.to_string();
            let shape = ["bench", "--json", "--writers", &writers, "--rounds", &rounds, "--style", style];
            let measured = json(&shape, mount.path());
            let predicted = row[forecast]["per_s"].as_f64().expect("a forecast");
            let measured = measured["ways"][0]["per_s"].as_f64().expect("a figure");
            let off = predicted / measured - 1.0;
            let bad = off.abs() > args.within;
            wrong += u32::from(bad);
            let word = if bad { "WRONG" } else { "" };
            let name = kind.name();
            println!(
                "| {name} | {device} | {level} | {writers} | {predicted:.0} | {measured:.0} | {:+.0} % | {word} |",
                off * 100.0
            );
        }
    }
    wrong
}

fn json(args: &[&str], dir: &Path) -> Value {
    let text = run_text(fsys().args(args).arg(dir));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("fsys {args:?}: {e}\n{text}"))
}

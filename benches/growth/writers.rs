//! Durable saves by 1 to 256 programs at a time.

use crate::Args;
use crate::common::tools::run_tool;
use crate::common::{Kind, LoopFs};
use crate::curve::{Bed, Curve, Target, Unit};

/// A curve, and how its programs save through the mount; on raw they always do the proper sequence.
const CURVES: [(&str, &str); 2] = [
    ("durable saves: open, write, close to the proper sequence on raw", "naive"),
    ("durable saves: the proper sequence on both", "dance"),
];

/// Both curves.
pub fn run(args: &Args) {
    let wanted: Vec<_> = CURVES.iter().filter(|c| args.wants("writers", c.0)).collect();
    if wanted.is_empty() {
        return;
    }
    let kind = Kind::named(&args.fs);
    let fs = match args.device.as_str() {
        "plain" => LoopFs::new(kind, 4096),
        us => LoopFs::slow(kind, 4096, us.parse().expect("microseconds of --device")),
    };
    println!("4 KiB; device: {}\n", if args.device == "plain" { "plain loop" } else { args.device.as_str() });
    let bed = Bed::new(fs, &args.options, |_| ());
    for (name, style) in wanted {
        let mut curve = Curve::new(name, "writers", Unit::PerSecond("saves"));
        let mut writers = 1;
        while writers <= args.writers {
            let dir = format!("{style}-{writers}");
            bed.subdir(&dir);
            curve.add(writers.to_string(), bed.turns(args.rounds, |t| save(t, &dir, style, writers, args.seconds)));
            writers *= 2;
        }
        curve.finish(args);
    }
}

/// Microseconds of a save of all together.
fn save(target: &Target, dir: &str, style: &str, writers: u64, seconds: f64) -> f64 {
    let style = if target.raw { "dance" } else { style };
    let (writers, files, seconds) = (writers.to_string(), writers as u32 * 4, seconds.to_string());
    let options = ["--writers", &writers, "--seconds", &seconds, "--size", "4096", "--style", style];
    let ended = run_tool("saver", &target.dir.join(dir), files, &options);
    assert_eq!(ended.code, 0, "{}\n{}", ended.summary, ended.complaint);
    1e6 / ended.figure("saves_per_s")
}

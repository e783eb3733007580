//! Single operations of one program: what a request costs, since nothing here waits for a device.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use super::middle;

/// An operation: its name, how often it is done for a figure, and what is done the n-th time with a directory.
type Op = (&'static str, u32, fn(&Path, u32));

const OPS: [Op; 5] = [
    ("create, write 4 KiB, close", 400, |d, n| fs::write(d.join(format!("f{n}")), [7; 4096]).expect("write")),
    ("open, close", 1000, |d, _| drop(File::open(d.join("f0")).expect("open"))),
    ("stat", 2000, |d, _| drop(fs::metadata(d.join("f0")).expect("stat"))),
    ("open, append 100 times 128 bytes, close", 20, |d, _| {
        let mut f = File::options().append(true).create(true).open(d.join("log")).expect("open");
        (0..100).for_each(|_| f.write_all(&[7; 128]).expect("append"));
    }),
    ("write 1 MiB", 50, |d, _| {
        File::create(d.join("big")).and_then(|f| f.write_all_at(&vec![7; 1 << 20], 0)).expect("write");
    }),
];

/// Prints time per operation, and its ratio to raw, for the raw directory and each mount.
pub fn table(raw: &Path, mounts: &[(&str, &Path)], rounds: usize) {
    let places: Vec<(&str, &Path)> = std::iter::once(("raw", raw)).chain(mounts.iter().copied()).collect();
    println!("| operation | place | us | ratio to raw (min-max) | to the first mount (min-max) |");
    println!("|---|---|---|---|---|");
    for (name, times, op) in OPS {
        let mut samples = Vec::new();
        for round in 0..=rounds {
            let mut us = vec![0.0; places.len()];
            for step in 0..places.len() {
                let i = (step + round) % places.len();
                us[i] = time(places[i].1, times, op);
            }
            // The first round is thrown away.
            samples.extend((round > 0).then_some(us));
        }
        for (i, (place, _)) in places.iter().enumerate() {
            let figure = |value: &dyn Fn(&Vec<f64>) -> f64| middle(samples.iter().map(value).collect());
            let show = |(m, low, high): (f64, f64, f64)| format!("{m:.2} ({low:.2}-{high:.2})");
            let to_raw = show(figure(&|s| s[i] / s[0]));
            let to_first = if i > 1 { show(figure(&|s| s[i] / s[1])) } else { String::new() };
            println!("| {name} | {place} | {:.1} | {to_raw} | {to_first} |", figure(&|s| s[i]).0);
        }
    }
}

/// Microseconds per operation.
fn time(dir: &Path, times: u32, op: fn(&Path, u32)) -> f64 {
    let start = Instant::now();
    (0..times).for_each(|n| op(dir, n));
    start.elapsed().as_secs_f64() * 1e6 / f64::from(times)
}

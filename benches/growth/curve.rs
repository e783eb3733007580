//! A file system with a raw directory and a mount, the turns on it, and the curves that they give.

use std::path::{Path, PathBuf};
use std::process::Command;

use fsys_mount::cli::chart::{Chart, figure};

use crate::Args;
use crate::common::mount::fsys;
use crate::common::{LoopFs, Mount, run};

/// Where a turn works.
pub struct Target<'a> {
    pub dir: &'a Path,
    /// Not through the mount.
    pub raw: bool,
}

/// A raw directory and a mount on one file system.
pub struct Bed {
    // Before its file system: the order in which they end.
    mount: Mount,
    raw: PathBuf,
    fs: LoopFs,
}

impl Bed {
    /// `fill` puts into both directories what is there before the mount.
    pub fn new(fs: LoopFs, options: &str, fill: impl Fn(&Path)) -> Bed {
        let (raw, data) = (fs.subdir("raw"), fs.subdir("data"));
        [&raw, &data].iter().for_each(|d| fill(d));
        let mount = Mount::start(&data, options.trim_matches(','));
        Bed { mount, raw, fs }
    }

    /// Nothing of one turn is left to do in the next.
    pub fn settle(&self) {
        run(fsys().arg("drain").arg(self.mount.path()));
        run(Command::new("sync").arg("-f").arg(self.fs.path()));
    }

    /// Makes a directory in both.
    pub fn subdir(&self, name: &str) {
        [self.raw.as_path(), self.mount.path()].iter().for_each(|d| std::fs::create_dir(d.join(name)).expect("mkdir"));
    }

    /// Microseconds of an operation: raw, mount, raw again, for each round. The first round is thrown away.
    pub fn turns(&self, rounds: usize, turn: impl Fn(&Target) -> f64) -> Vec<[f64; 3]> {
        let targets = [(self.raw.as_path(), true), (self.mount.path(), false), (self.raw.as_path(), true)];
        let round = |round: usize| {
            let mut us = [0.0; 3];
            for step in 0..3 {
                let i = (step + round) % 3;
                self.settle();
                us[i] = turn(&Target { dir: targets[i].0, raw: targets[i].1 });
            }
            us
        };
        (0..=rounds).map(round).skip(1).collect()
    }
}

/// A step, and the microseconds of raw, mount and raw again in each round.
type Point = (String, Vec<[f64; 3]>);

/// What grows, and what an operation costs then.
pub struct Curve {
    name: &'static str,
    /// What is counted at the foot.
    steps: &'static str,
    /// What the values are.
    unit: Unit,
    points: Vec<Point>,
}

/// How the times are shown.
#[derive(Clone, Copy, PartialEq)]
pub enum Unit {
    /// Microseconds of one.
    Us(&'static str),
    /// So many per second.
    PerSecond(&'static str),
}

impl Unit {
    fn value(self, us: f64) -> f64 {
        match self {
            Unit::Us(_) => us,
            Unit::PerSecond(_) => 1e6 / us,
        }
    }

    fn name(self) -> String {
        match self {
            Unit::Us(of) => format!("us per {of}"),
            Unit::PerSecond(of) => format!("{of}/s"),
        }
    }
}

impl Curve {
    /// None yet.
    pub fn new(name: &'static str, steps: &'static str, unit: Unit) -> Curve {
        Curve { name, steps, unit, points: Vec::new() }
    }

    /// The next step.
    pub fn add(&mut self, step: String, rounds: Vec<[f64; 3]>) {
        self.points.push((step, rounds));
    }

    /// Prints the table and the largest rise, and draws.
    pub fn finish(&self, args: &Args) {
        println!("**{}**, {}\n", self.name, self.unit.name());
        println!("| {} | raw | mount | ratio (min-max) | raw again |\n|---|---|---|---|---|", self.steps);
        for (step, rounds) in &self.points {
            let (ratio, low, high) = ratio(rounds);
            let value = |of: fn(&[f64; 3]) -> f64| figure(self.unit.value(median(rounds, of)));
            println!(
                "| {step} | {} | {} | {ratio:.2} ({low:.2}-{high:.2}) | {:.2} |",
                value(raw),
                value(|r| r[1]),
                median(rounds, |r| r[2] / r[0]),
            );
        }
        println!("\n{}\n", self.knee());
        if let Some(dir) = &args.svg {
            let words: Vec<&str> = self.name.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect();
            let file = dir.join(format!("growth-{}.svg", words.join("-")));
            std::fs::write(&file, self.chart().svg()).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        }
    }

    /// Where the ratio, and where the mount's own cost rises most from one step to the next.
    fn knee(&self) -> String {
        let steps = || self.points.windows(2);
        let at = |pair: &[Point]| format!("between {} and {} {}", pair[0].0, pair[1].0, self.steps);
        let by = |pair: &[Point], of: fn(&[[f64; 3]]) -> f64| of(&pair[1].1) / of(&pair[0].1);
        let most = |of: fn(&[[f64; 3]]) -> f64| {
            steps().max_by(|a, b| by(a, of).total_cmp(&by(b, of))).filter(|pair| by(pair, of) > 1.0)
        };
        let ratio = most(|r| ratio(r).0).map_or("none, the ratio never rises".to_owned(), |pair| {
            format!("x{:.2} {}", by(pair, |r| ratio(r).0), at(pair))
        });
        let cost = most(|r| median(r, |r| r[1])).map_or("never rises".to_owned(), |pair| {
            let (mount, raw) = (by(pair, |r| median(r, |r| r[1])), by(pair, |r| median(r, raw)));
            format!("rises most x{mount:.2} {}, where raw changes x{raw:.2}", at(pair))
        });
        format!("knee: {ratio}; the time of the mount {cost}")
    }

    fn chart(&self) -> Chart {
        let shown = |rounds: &[[f64; 3]], of| Some(self.unit.value(median(rounds, of)).into());
        Chart {
            title: format!("{}, {}, by {}", self.name, self.unit.name(), self.steps),
            series: vec!["raw".into(), "mount".into()],
            rows: self.points.iter().map(|(s, r)| (s.clone(), vec![shown(r, raw), shown(r, |r| r[1])])).collect(),
        }
    }
}

fn raw(round: &[f64; 3]) -> f64 {
    f64::midpoint(round[0], round[2])
}

/// Of the times, mount to raw.
fn ratio(rounds: &[[f64; 3]]) -> (f64, f64, f64) {
    middle(rounds.iter().map(|r| r[1] / raw(r)).collect())
}

fn median(rounds: &[[f64; 3]], of: fn(&[f64; 3]) -> f64) -> f64 {
    middle(rounds.iter().map(of).collect()).0
}

/// Median, smallest, largest.
fn middle(mut all: Vec<f64>) -> (f64, f64, f64) {
    all.sort_by(f64::total_cmp);
    (all[all.len() / 2], all[0], all[all.len() - 1])
}

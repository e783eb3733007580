//! Every crash state: what is on the disk after a power cut, explored on the block level.
//!
//! Needs root (mounts, loop devices); the module `rig` says what it touches. `scripts/crash` runs the large campaign.

mod device;
mod disk;
mod explore;
mod fsys;
mod model;
mod programs;
mod raw;
mod rig;
mod stage;
mod states;
mod workload;

use explore::{Budget, Report, explore};
use programs::{Level, Programs, Through};
use raw::{DataStep, NameStep, Protocol, Raw, Shape};
use rig::{Kind, Rig};

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().unwrap())
}

fn budget(states: usize) -> Budget {
    Budget {
        states: env("FSYS_CRASH_STATES", states as u64) as usize,
        per_run: env("FSYS_CRASH_PER_RUN", 60) as usize,
        seed: env("FSYS_CRASH_SEED", 1),
        stop_after: env("FSYS_CRASH_STOP", 1000) as usize,
    }
}

fn say(kind: Kind, name: &str, report: &Report) {
    println!("{:5} {name}: {report}", kind.name());
    for (seed, v) in report.violations.iter().take(env("FSYS_CRASH_SHOW", 1) as usize) {
        println!("  seed {seed}: {:?}: {}", v.kind, v.text);
    }
}

#[test]
#[ignore = "exploration by hand"]
fn goal_a() {
    let pick = std::env::var("FSYS_CRASH_FS").unwrap_or_default();
    let what = std::env::var("FSYS_CRASH_WHAT").unwrap_or_default();
    let shape = Shape::DEFAULT;
    let protocols = [
        ("range", Protocol::new(DataStep::Range, NameStep::FsyncDirs)),
        ("fsync-each", Protocol::new(DataStep::Fsync, NameStep::FsyncDirs)),
        ("two-syncfs", Protocol::new(DataStep::Syncfs, NameStep::Syncfs)),
        ("no-data", Protocol::new(DataStep::Nothing, NameStep::FsyncDirs)),
        ("no-dirsync", Protocol::new(DataStep::Range, NameStep::Nothing)),
        ("early", Protocol { answer_early: true, ..Protocol::new(DataStep::Range, NameStep::FsyncDirs) }),
        ("naive", Protocol { naive: true, ..Protocol::new(DataStep::Nothing, NameStep::Nothing) }),
    ];
    let shapes = [
        ("single", Shape { batch_max: 1, ..shape }),
        ("batch", shape),
        ("batch+stranger", Shape { stranger: true, ..shape }),
        ("batch+names", Shape { names_change: true, ..shape }),
        ("batch+names+stranger", Shape { names_change: true, stranger: true, ..shape }),
        ("styles", Shape { styles: true, stranger: true, ..shape }),
        ("tight", Shape { tight: true, stranger: true, styles: true, size_max: 100 << 10, batches: 12, ..shape }),
        ("per-dir", Shape { order_per_dir: true, names_change: true, stranger: true, ..shape }),
    ];
    for kind in Kind::ALL.into_iter().filter(|k| pick.is_empty() || pick.split(',').any(|p| p == k.name())) {
        let extra = std::env::var("FSYS_CRASH_MKFS").unwrap_or_default();
        let options = std::env::var("FSYS_CRASH_OPTIONS").unwrap_or_default();
        let rig = Rig::with(kind, &extra.split_whitespace().collect::<Vec<_>>(), &options);
        for (pname, protocol) in protocols {
            for (sname, shape) in shapes {
                let name = format!("{pname} {sname}");
                if !what.is_empty() && !what.split(',').any(|w| w == name || w == pname || w == sname) {
                    continue;
                }
                let report = explore(&rig, budget(300), |_| Raw::new(protocol, shape));
                say(kind, &name, &report);
            }
        }
    }
}

#[test]
#[ignore = "exploration by hand"]
fn goal_b() {
    let pick = std::env::var("FSYS_CRASH_FS").unwrap_or_default();
    let what = std::env::var("FSYS_CRASH_WHAT").unwrap_or_default();
    for kind in Kind::ALL.into_iter().filter(|k| pick.is_empty() || pick.split(',').any(|p| p == k.name())) {
        let rig = Rig::new(kind);
        for level in Level::ALL {
            for through in [Through::Mount, Through::Raw] {
                let name = format!("{through:?} {}", level.name());
                if !what.is_empty() && !what.split(',').any(|w| name.split(' ').any(|n| n == w)) {
                    continue;
                }
                let report = explore(&rig, budget(300), |_| Programs::new(through, level));
                say(kind, &name, &report);
            }
        }
    }
}

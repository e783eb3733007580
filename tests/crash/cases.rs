//! What is explored, by name: cases that must hold, and negative controls that the same checker must catch.

use crate::commands::{Commands, Program};
use crate::explore::{Budget, Report, explore};
use crate::programs::{Level, Mode, Order, Programs, Through};
use crate::raw::{DataStep, NameStep, Protocol, Raw, Shape};
use crate::rig::{Kind, Rig};
use crate::workload::Workload;

/// What must come of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// No violation.
    Sound,
    /// At least one: a step was left out.
    Caught,
}

/// One row.
pub struct Case {
    pub name: String,
    pub expect: Expect,
    make: Box<dyn Fn(u64) -> Box<dyn Workload>>,
}

impl Case {
    fn new<W: Workload + 'static>(name: &str, expect: Expect, make: impl Fn(u64) -> W + 'static) -> Self {
        Self { name: name.into(), expect, make: Box::new(move |seed| Box::new(make(seed))) }
    }

    /// Explores and says what came of it. Answers whether that is what it should be.
    pub fn run(&self, rig: &Rig, budget: &Budget) -> bool {
        let budget = match self.expect {
            Expect::Sound => budget.clone(),
            Expect::Caught => Budget { stop_after: 1, keep: None, ..budget.clone() },
        };
        let report = explore(rig, &budget, &self.make);
        let good = self.good(&report);
        let word = match (self.expect, good) {
            (Expect::Sound, true) => "sound",
            (Expect::Sound, false) => "BROKEN",
            (Expect::Caught, true) => "caught",
            (Expect::Caught, false) => "NOT CAUGHT",
        };
        println!("{:5} {:28} {word}: {report}", rig.kind.name(), self.name);
        if !good {
            self.explain(rig.kind, &budget, &report);
        }
        good
    }

    fn good(&self, report: &Report) -> bool {
        (self.expect == Expect::Caught) == (report.bad() > 0)
    }

    fn explain(&self, kind: Kind, budget: &Budget, report: &Report) {
        // One of each kind.
        let mut seen = Vec::new();
        for (seed, v) in &report.violations {
            if seen.contains(&v.kind) {
                continue;
            }
            seen.push(v.kind);
            println!("  seed {seed}: {:?}: {}", v.kind, v.text);
            println!(
                "  again: scripts/crash --fs {} --case '{}' --seed {seed} --states {}",
                kind.name(),
                self.name,
                budget.per_run
            );
        }
    }
}

/// A shape for every seed, so that a campaign sees all combinations.
fn shape(seed: u64) -> Shape {
    let mut rng = fastrand::Rng::with_seed(seed);
    Shape {
        batch_max: [1, 2, 4, 8][rng.usize(..4)],
        dirs: rng.usize(1..=4),
        files: 6,
        batches: rng.usize(3..=8),
        size_max: [8 << 10, 60 << 10, 200 << 10][rng.usize(..3)],
        stranger: rng.bool(),
        styles: rng.bool(),
        names_change: rng.bool(),
        tight: rng.u8(..4) == 0,
        order_per_dir: false,
    }
}

/// What the engine does on this filesystem.
fn publish(kind: Kind) -> Protocol {
    match kind {
        Kind::Ext4 | Kind::Xfs => Protocol::new(DataStep::Range, NameStep::FsyncDirs),
        Kind::Btrfs => Protocol::new(DataStep::Syncfs, NameStep::Syncfs),
    }
}

fn raw(name: &str, expect: Expect, protocol: Protocol, shape: impl Fn(u64) -> Shape + 'static) -> Case {
    Case::new(name, expect, move |seed| Raw::new(protocol, shape(seed)))
}

const COMMANDS: [(&str, Program); 3] =
    [("sqlite-delete", Program::SqliteDelete), ("sqlite-wal", Program::SqliteWal), ("git", Program::Git)];

/// All cases for a filesystem.
pub fn all(kind: Kind) -> Vec<Case> {
    use Expect::{Caught, Sound};
    let used = publish(kind);
    // On a filesystem that fills up, btrfs answers ENOSPC long before it is full.
    let tight = kind != Kind::Btrfs;
    let any = move |seed| Shape { tight: tight && shape(seed).tight, ..shape(seed) };
    let plain = |_| Shape::DEFAULT;
    let saves_per_dir = move |seed| Shape { order_per_dir: true, names_change: false, dirs: 3, ..any(seed) };
    let mut cases = vec![
        raw("publish", Sound, used, any),
        raw("publish fsync-each", Sound, Protocol::new(DataStep::Fsync, NameStep::FsyncDirs), saves_per_dir),
        raw("publish two-syncfs", Sound, Protocol::new(DataStep::Syncfs, NameStep::Syncfs), any),
        raw("control no-data-flush", Caught, Protocol::new(DataStep::Nothing, NameStep::FsyncDirs), plain),
        raw("control no-parent-sync", Caught, Protocol { names: NameStep::Nothing, ..used }, plain),
        raw("control early-answer", Caught, Protocol { answer_early: true, ..used }, plain),
        raw(
            "control naive-saver",
            Caught,
            Protocol { naive: true, ..Protocol::new(DataStep::Nothing, NameStep::Nothing) },
            plain,
        ),
        raw(
            "control rename-only",
            Caught,
            Protocol { named_stage: true, ..Protocol::new(DataStep::Nothing, NameStep::FsyncDirs) },
            plain,
        ),
    ];
    if kind == Kind::Btrfs {
        let one_barrier = Protocol::new(DataStep::Range, NameStep::FsyncDirs);
        cases.push(raw("control one-barrier", Caught, one_barrier, plain));
    }
    cases.push(Case::new("programs first-mount", Sound, |_| Programs {
        first_mount: true,
        operations: 2,
        ..Programs::new(Through::Mount, Level::Close)
    }));
    for level in Level::ALL {
        let name = |what: &str| format!("{what} {}", level.name());
        for (what, program) in COMMANDS {
            // A database relies on its fsyncs as barriers between files that it writes in place; `relaxed` has none.
            if level == Level::Relaxed && program != Program::Git {
                continue;
            }
            cases.push(Case::new(&name(what), Sound, move |_| Commands::new(program, level)));
        }
        for (what, order) in [("programs", Order::Name), ("ordered", Order::Directory)] {
            let make = move |_| Programs { order, ..Programs::new(Through::Mount, level) };
            cases.push(Case::new(&name(what), Sound, make));
        }
        let replace = move |_| Programs { mode: Mode::Replace, ..Programs::new(Through::Mount, level) };
        cases.push(Case::new(&name("replace"), Sound, replace));
        // In place only names keep an order: of content, nothing is promised before the answer.
        let in_place =
            move |_| Programs { mode: Mode::InPlace, order: Order::Name, ..Programs::new(Through::Mount, level) };
        cases.push(Case::new(&name("in-place"), Sound, in_place));
        cases.push(Case::new(&name("control bare"), Caught, move |_| Programs::new(Through::Raw, level)));
    }
    cases
}

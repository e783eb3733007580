//! What is explored, by name: cases that must hold, and negative controls that the same checker must catch.

use crate::ace::{self, Ace};
use crate::commands::{Commands, Program};
use crate::delivery::{Delivery, What};
use crate::explore::{Budget, Report, explore};
use crate::fsys;
use crate::instant::Instant;
use crate::journal::{Journal, Without};
use crate::programs::{Level, Mode, Order, Programs, Through};
use crate::raw::{DataStep, NameStep, Protocol, Raw, Shape};
use crate::rig::{Kind, Rig};
use crate::sabotage::{CLEANUP, DATA_FLUSH, EVERY_SYNC};
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
    /// Write mode and level of the mount; `-` where there is none.
    pub mode: &'static str,
    pub level: &'static str,
    pub expect: Expect,
    /// How many runs it takes until all of it was run, if that can be said.
    pub runs: Option<usize>,
    make: Box<dyn Fn(u64) -> Box<dyn Workload>>,
}

impl Case {
    fn new<W: Workload + 'static>(name: &str, expect: Expect, make: impl Fn(u64) -> W + 'static) -> Self {
        Self {
            name: name.into(),
            mode: "-",
            level: "-",
            expect,
            runs: None,
            make: Box::new(move |seed| Box::new(make(seed))),
        }
    }

    /// On a mount.
    fn mounted<W: Workload + 'static>(
        what: &str,
        mode: Mode,
        level: Level,
        expect: Expect,
        make: impl Fn(u64) -> W + 'static,
    ) -> Self {
        let name = format!("{what} {} {}", mode.name(), level.name());
        Self { mode: mode.name(), level: level.name(), ..Self::new(&name, expect, make) }
    }

    /// Whether it runs on a mount, not on the bare filesystem.
    pub fn is_mounted(&self) -> bool {
        self.mode != "-"
    }

    /// Explores and says what came of it. Answers that, and whether it is what it should be.
    pub fn run(&self, rig: &Rig, budget: &Budget) -> (Report, bool) {
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
        println!("{:5} {:32} {word}: {report}", rig.kind.name(), self.name);
        if !good {
            self.explain(rig.kind, &budget, &report);
        }
        (report, good)
    }

    fn good(&self, report: &Report) -> bool {
        (self.expect == Expect::Caught) == (report.bad() > 0) && report.came_up()
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
    let mut cases = protocols(kind);
    cases.push(Case::mounted("first-mount", Mode::Auto, Level::Close, Expect::Sound, |_| Programs {
        first_mount: true,
        operations: 2,
        ..Programs::new(Through::Mount, Level::Close)
    }));
    cases.push(Case::mounted("instant", Mode::Auto, Level::Close, Expect::Sound, |_| Instant::new(&[])));
    let levels = || Level::ALL.into_iter();
    cases.extend(levels().flat_map(commands));
    cases.extend(levels().flat_map(|level| modes().into_iter().flat_map(move |mode| programs(mode, level))));
    cases.extend(levels().flat_map(deliveries));
    cases.extend(levels().flat_map(|level| modes().into_iter().flat_map(move |mode| sequences(mode, level))));
    cases.extend(controls(kind));
    cases
}

/// The engine's protocol by our own system calls, and without each of its steps.
fn protocols(kind: Kind) -> Vec<Case> {
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
    for (name, expect, without) in [
        ("log", Sound, Without::Nothing),
        ("control log no-flush", Caught, Without::Flush),
        ("control log no-recovery", Caught, Without::Recovery),
        ("control log no-sums", Caught, Without::Sums),
    ] {
        // btrfs shows no torn write: what was not flushed is not there at all.
        if kind != Kind::Btrfs || without != Without::Sums {
            cases.push(Case::new(name, expect, move |_| Journal::new(without)));
        }
    }
    cases
}

/// Databases and version control.
fn commands(level: Level) -> Vec<Case> {
    // A database relies on its fsyncs as barriers between files that it writes in place; `relaxed` has none.
    let wanted = |p: Program| level != Level::Relaxed || p == Program::Git;
    let case = |(what, program): (&str, Program)| {
        Case::mounted(what, Mode::Auto, level, Expect::Sound, move |_| Commands::new(program, level))
    };
    COMMANDS.into_iter().filter(|c| wanted(c.1)).map(case).collect()
}

/// Several programs at once.
fn programs(mode: Mode, level: Level) -> Vec<Case> {
    let base = Programs { mode, ..Programs::new(Through::Mount, level) };
    if mode == Mode::InPlace {
        // In place only names keep an order: of content, nothing is promised before the answer.
        let make = move |_| Programs { order: Order::Name, ..base.clone() };
        return vec![Case::mounted("programs", mode, level, Expect::Sound, make)];
    }
    let alone = base.clone();
    vec![
        Case::mounted("programs", mode, level, Expect::Sound, move |_| alone.clone()),
        Case::mounted("shared", mode, level, Expect::Sound, move |_| Programs { shared: true, ..base.clone() }),
    ]
}

/// A mail spool, a package manager.
fn deliveries(level: Level) -> Vec<Case> {
    let case = |(name, what): (&str, What)| {
        Case::mounted(name, Mode::Auto, level, Expect::Sound, move |_| Delivery::new(what, level))
    };
    [("mail", What::Mail), ("package", What::Package)].into_iter().map(case).collect()
}

/// All short sequences of operations.
fn sequences(mode: Mode, level: Level) -> Vec<Case> {
    let short = Case::mounted("sequences", mode, level, Expect::Sound, move |seed| Ace::short(level, mode, seed));
    let longer = Case::mounted("sequences3", mode, level, Expect::Sound, move |seed| Ace::longer(level, mode, seed));
    vec![Case { runs: Some(ace::runs()), ..short }, longer]
}

/// The real programs without each of their steps, and programs on the bare filesystem.
fn controls(kind: Kind) -> Vec<Case> {
    use Expect::Caught;
    let close = || Programs::new(Through::Mount, Level::Close);
    let case = |what: &str, programs: Programs| {
        Case::mounted(&format!("control {what}"), Mode::Auto, Level::Close, Caught, move |_| programs.clone())
    };
    let mut cases = vec![
        case("mount no-sync", Programs { daemon_without: EVERY_SYNC, ..close() }),
        case("mount early-answer", Programs { daemon_level: Level::Relaxed, ..close() }),
        Case::mounted("control recovery no-cleanup", Mode::Auto, Level::Close, Caught, |_| Instant::new(CLEANUP)),
    ];
    let journal = Programs { mode: Mode::Journal, daemon_without: EVERY_SYNC, ..close() };
    cases.push(Case::mounted("control mount no-sync", Mode::Journal, Level::Close, Caught, move |_| journal.clone()));
    // btrfs flushes data and names by one call.
    if kind != Kind::Btrfs {
        cases.push(case("mount no-data-flush", Programs { daemon_without: DATA_FLUSH, ..close() }));
    }
    let bare = |level: Level| {
        Case::new(&format!("control bare {}", level.name()), Caught, move |_| Programs::new(Through::Raw, level))
    };
    cases.extend(Level::ALL.map(bare));
    cases
}

/// The write modes that the program has.
fn modes() -> Vec<Mode> {
    [Mode::Auto, Mode::Replace, Mode::InPlace, Mode::Journal].into_iter().filter(|m| fsys::has_mode(m.name())).collect()
}

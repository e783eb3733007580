//! The explorer: run a workload on a recorded device, then look at what crashes would have left.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::disk::{BLOCK, Event};
use crate::model::{History, Kind, Violation};
use crate::rig::Rig;
use crate::states::{CrashState, Kept, choose};
use crate::workload::Workload;

/// How much to explore.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Crash states in all.
    pub states: usize,
    /// Crash states of one run of the workload.
    pub per_run: usize,
    /// The first run's seed; later runs count up.
    pub seed: u64,
    /// Stop after so many violations.
    pub stop_after: usize,
    /// Where to keep the images of the first bad crash states.
    pub keep: Option<PathBuf>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    pub states: usize,
    pub runs: usize,
    pub operations: usize,
    pub flushes: usize,
    pub writes: usize,
    pub elapsed: Duration,
    /// Seed of the run, and what was wrong.
    pub violations: Vec<(u64, Violation)>,
    /// Crash states that the kernel does not mount, with the seed of the run.
    pub unmountable: Vec<(u64, Violation)>,
}

/// More than one crash state in so many that does not mount is no chance: then too little was checked.
const UNMOUNTABLE: usize = 50;

impl Report {
    pub fn bad(&self) -> usize {
        self.violations.len()
    }

    /// Whether enough of the crash states came up. No daemon can make a filesystem unmountable: a torn write to its
    /// metadata can (a block of XFS whose first sector is newer than the rest is skipped by its log recovery, and ext4
    /// with `fast_commit` does it more often). There is nothing to check then, and nothing that a mount could do.
    pub fn came_up(&self) -> bool {
        self.unmountable.len() * UNMOUNTABLE <= self.states
    }

    /// Crash states per second, with all that belongs to them: runs, mounts, recoveries.
    pub fn rate(&self) -> u128 {
        self.states as u128 * 1000 / self.elapsed.as_millis().max(1)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rate = self.rate();
        write!(
            f,
            "{} violations in {} crash states ({rate}/s) of {} runs, {} operations, {} writes, {} flushes",
            self.bad(),
            self.states,
            self.runs,
            self.operations,
            self.writes,
            self.flushes
        )?;
        for kind in [Kind::Dead, Kind::Torn, Kind::Lost, Kind::Leftover, Kind::Metadata, Kind::Order] {
            let n = self.violations.iter().filter(|(_, v)| v.kind == kind).count();
            if n > 0 {
                write!(f, "; {kind:?} {n}")?;
            }
        }
        if let Some((seed, first)) = self.unmountable.first() {
            write!(f, "; {} did not mount, as in seed {seed}: {}", self.unmountable.len(), first.text)?;
        }
        Ok(())
    }
}

/// Runs `make(seed)` for one seed after the other until the budget is used up.
pub fn explore(rig: &Rig, budget: &Budget, make: &dyn Fn(u64) -> Box<dyn Workload>) -> Report {
    let start = Instant::now();
    let mut report = Report::default();
    let mut seed = budget.seed;
    while report.states < budget.states && report.bad() < budget.stop_after {
        let mut workload = make(seed);
        let mut rng = Rng::with_seed(seed);
        let (record, history) = record(rig, &mut *workload, &mut rng);
        report.runs += 1;
        report.operations += history.counts().0;
        report.flushes += record.iter().filter(|e| matches!(e, Event::Flush)).count();
        report.writes += record.iter().filter(|e| matches!(e, Event::Write { .. })).count();
        let want = budget.per_run.min(budget.states - report.states);
        let states = choose(&record, want, &rig.kind.tear(), &mut rng);
        let mut applied = 0;
        for state in &states {
            report.states += 1;
            build(rig, &record, state, &mut applied);
            if let Err(violation) = check(rig, &*workload, &record, &history, state) {
                if violation.kind == Kind::Unmountable {
                    report.unmountable.push((seed, violation));
                    continue;
                }
                if let Some(dir) = budget.keep.as_ref().filter(|_| report.bad() < 3) {
                    build(rig, &record, state, &mut applied);
                    keep(rig, &dir.join(format!("{}-{seed}-{}.img", rig.kind.name(), state.at)));
                    rig.disk.forget_volatile();
                }
                report.violations.push((seed, violation));
                if report.bad() >= budget.stop_after {
                    break;
                }
            }
        }
        seed += 1;
    }
    report.elapsed = start.elapsed();
    report
}

fn record(rig: &Rig, workload: &mut dyn Workload, rng: &mut Rng) -> (Vec<Event>, History) {
    rig.disk.reset();
    {
        let mounted = rig.mount(false).unwrap();
        workload.prepare(rig, mounted.path(), rng);
    }
    let mounted = rig.mount(false).unwrap();
    rig.disk.start_recording();
    let history = workload.run(rig, mounted.path(), &rig.disk, rng);
    let record = rig.disk.stop_recording();
    drop(mounted);
    rig.settle();
    rig.disk.forget_volatile();
    (record, history)
}

/// Puts one crash state on the disk. `applied` is how much of the record is durable there.
fn build(rig: &Rig, record: &[Event], state: &CrashState, applied: &mut usize) {
    for event in &record[*applied..state.durable] {
        if let Event::Write { offset, data } = event {
            rig.disk.apply_durable(*offset, data);
        }
    }
    *applied = (*applied).max(state.durable);
    for (i, ranges) in &state.kept {
        if let Event::Write { offset, data } = &record[*i] {
            for r in ranges {
                rig.disk.apply_volatile(offset + r.start as u64, &data[r.clone()]);
            }
        }
    }
}

/// Mounts the crash state that is on the disk and checks it.
fn check(
    rig: &Rig,
    workload: &dyn Workload,
    record: &[Event],
    history: &History,
    state: &CrashState,
) -> Result<(), Violation> {
    // A checker that panics must not leave the crash state mounted: `Mounted` is dropped either way.
    let result = catch_unwind(AssertUnwindSafe(|| {
        let mounted = rig
            .mount(!workload.recovery_writes())
            .map_err(|e| Violation::new(Kind::Unmountable, format!("the crash state does not mount: {e}")))?;
        workload.recover(mounted.path())?;
        workload.check(mounted.path(), history, state.at)
    }));
    rig.settle();
    rig.disk.forget_volatile();
    let context = |v: Violation| {
        let torn = |(i, ranges): &(usize, Kept)| match &record[*i] {
            Event::Write { offset, data } if ranges.iter().map(Range::len).sum::<usize>() < data.len() => {
                Some(format!(" {}+{}", offset, data.len()))
            }
            _ => None,
        };
        let text = format!(
            "crash at event {} of {}, durable up to {}, {} volatile writes there, torn:{}\n{}",
            state.at,
            record.len(),
            state.durable,
            state.kept.len(),
            state.kept.iter().filter_map(torn).collect::<String>(),
            v.text
        );
        Violation { kind: v.kind, text }
    };
    match result {
        Ok(checked) => checked.map_err(context),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// The image as it is, for a look by hand, sparse.
fn keep(rig: &Rig, path: &Path) {
    let image = rig.disk.image();
    let file = File::create(path).unwrap();
    file.set_len(image.len() as u64).unwrap();
    for (i, block) in image.chunks(BLOCK).enumerate().filter(|(_, b)| b.iter().any(|b| *b != 0)) {
        file.write_all_at(block, (i * BLOCK) as u64).unwrap();
    }
    println!("  kept {}", path.display());
}

//! The dispatcher and the state machine of files under a schedule explorer: programs run at once in one directory, and
//! every backing call of theirs, of the dispatcher and of the workers waits until a seeded scheduler lets it go, one at
//! a time. So calls meet in orders that the clock would hardly ever bring.
//!
//! Looked at: every call is answered (a schedule in which all wait is a deadlock); what programs were told is there, in
//! order, and whole, at the end and when everything is cut off at a random call, as by kill -9.

// Helpers of tests: a panic is the report.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use common::world::{World, still};
use fsys_mount::backend::Call;
use fsys_mount::backend::probe::Strategy;
use fsys_mount::config::policy::{Durability, WriteMode};
use fsys_mount::error::Errno;

const PROGRAMS: usize = 3;
const OPERATIONS: usize = 5;
/// So often in a row all threads are seen asleep, with none that could have a turn, before that is called a deadlock.
const DEADLOCK: usize = 5000;

#[derive(Default)]
struct Turns {
    /// Calls that wait for their turn, and the one that has it.
    waiting: Vec<u64>,
    turn: Option<u64>,
    next: u64,
    /// From here on all calls go.
    over: bool,
}

/// Lets one call go at a time.
#[derive(Default)]
struct Scheduler {
    turns: Mutex<Turns>,
    changed: Condvar,
    decisions: AtomicUsize,
}

impl Scheduler {
    /// A call waits for its turn.
    fn wait(&self) {
        let mut turns = self.turns.lock().unwrap();
        let me = turns.next;
        turns.next += 1;
        turns.waiting.push(me);
        while turns.turn != Some(me) && !turns.over {
            turns = self.changed.wait(turns).unwrap();
        }
        turns.turn = None;
        turns.waiting.retain(|n| *n != me);
    }

    /// Gives turns until all programs ended. `before` is told the number of every decision. `Err`: a deadlock.
    fn run(
        &self,
        rng: &mut fastrand::Rng,
        ended: &AtomicUsize,
        mut before: impl FnMut(usize),
        lose: Option<usize>,
    ) -> Result<(), String> {
        let mut lost = None;
        let mut idle = 0;
        while ended.load(Ordering::Acquire) < PROGRAMS {
            let ready: Vec<u64> = {
                let turns = self.turns.lock().unwrap();
                let waiting = turns.waiting.iter().filter(|n| Some(**n) != lost);
                if turns.turn.is_some() { vec![] } else { waiting.copied().collect() }
            };
            if !all_asleep() || ready.is_empty() {
                idle += usize::from(ready.is_empty() && all_asleep());
                if idle > DEADLOCK {
                    return Err(format!("all wait, after {} decisions", self.decisions.load(Ordering::Relaxed)));
                }
                std::thread::yield_now();
                continue;
            }
            let n = self.decisions.fetch_add(1, Ordering::Relaxed);
            let chosen = ready[rng.usize(..ready.len())];
            if lose == Some(n) {
                lost = Some(chosen);
                continue;
            }
            before(n);
            self.turns.lock().unwrap().turn = Some(chosen);
            self.changed.notify_all();
            idle = 0;
        }
        Ok(())
    }

    fn release_all(&self) {
        self.turns.lock().unwrap().over = true;
        self.changed.notify_all();
    }
}

/// Whether every other thread of this process sleeps: then nothing happens until somebody gets a turn.
fn all_asleep() -> bool {
    let me = rustix::thread::gettid().as_raw_nonzero().get().to_string();
    fs::read_dir("/proc/self/task").unwrap().flatten().filter(|t| *t.file_name() != *me).all(|t| {
        let stat = fs::read_to_string(t.path().join("stat")).unwrap_or_default();
        // After the name in brackets, which may hold anything.
        stat.rsplit(") ").next().is_none_or(|rest| !rest.starts_with(['R', 'D']))
    })
}

type Files = BTreeMap<String, Vec<u8>>;

/// One operation: the files of its program after it, when it began and when it was answered.
struct Step {
    after: Files,
    begun: u64,
    answered: Option<u64>,
    durable: bool,
    label: String,
}

/// One program; its files are its own, the directory is everybody's.
struct Program {
    n: usize,
    level: Durability,
    rng: fastrand::Rng,
    steps: Vec<Step>,
    stamp: u8,
}

impl Program {
    fn now(&self) -> Files {
        self.steps.last().map_or_else(Files::new, |s| s.after.clone())
    }

    fn begin(&mut self, clock: &AtomicU64, label: String, after: Files) {
        let begun = clock.fetch_add(1, Ordering::AcqRel);
        self.steps.push(Step { after, begun, answered: None, durable: false, label });
    }

    /// The last operation was answered; `waits` when that says that it is durable.
    fn answered(&mut self, clock: &AtomicU64, waits: bool) {
        let step = self.steps.last_mut().unwrap();
        step.answered.get_or_insert(clock.fetch_add(1, Ordering::AcqRel));
        step.durable |= waits;
    }

    /// One operation; an error is the cut, and the end.
    fn step(&mut self, w: &World, clock: &AtomicU64) -> Result<(), Errno> {
        self.stamp += 1;
        let name = format!("p{}{}", self.n, ["x", "y"][self.rng.usize(..2)]);
        let names_wait = self.level == Durability::Always;
        let mut after = self.now();
        match self.rng.u8(..10) {
            0..=5 => self.save(w, clock, &name),
            6 if after.contains_key(&name) => {
                after.remove(&name);
                self.begin(clock, format!("unlink {name}"), after);
                w.unlink(&name)?;
                self.answered(clock, names_wait);
                Ok(())
            }
            7 if after.contains_key(&name) => {
                let content = after.remove(&name).unwrap();
                let to = format!("p{}z", self.n);
                after.insert(to.clone(), content);
                self.begin(clock, format!("rename {name} to {to}"), after);
                w.rename(&name, &to)?;
                self.answered(clock, names_wait);
                Ok(())
            }
            8 => {
                w.fsync_dir()?;
                if self.level != Durability::Relaxed && !self.steps.is_empty() {
                    self.steps.last_mut().unwrap().durable = true;
                }
                Ok(())
            }
            _ => self.save(w, clock, &name),
        }
    }

    /// In two writes; sometimes with an fsync between them, which is a commit point too.
    fn save(&mut self, w: &World, clock: &AtomicU64, name: &str) -> Result<(), Errno> {
        let content = vec![self.stamp; 40 + usize::from(self.stamp)];
        let (half, sync) = (20, self.rng.u8(..3) == 0);
        let mut after = self.now();
        let fd =
            if after.contains_key(name) { w.open_with(name, libc::O_RDWR | libc::O_TRUNC)? } else { w.create(name)? };
        if sync {
            after.insert(name.into(), content[..half].to_vec());
            self.begin(clock, format!("first half of {name}"), after.clone());
        }
        w.write_all(fd, 0, &content[..half])?;
        if sync {
            w.fsync(fd)?;
            self.answered(clock, self.level != Durability::Relaxed);
        }
        after.insert(name.into(), content.clone());
        // A commit may come with the write, where an fsync that did not wait left a debt behind.
        self.begin(clock, format!("save {name}"), after);
        w.write_all(fd, half as u64, &content[half..])?;
        w.close(fd)?;
        self.answered(clock, matches!(self.level, Durability::Always | Durability::Close));
        Ok(())
    }

    /// After how many of its operations this may be what is there.
    fn feasible(&self, there: &Files) -> Vec<usize> {
        let least = self.steps.iter().rposition(|s| s.durable).map_or(0, |i| i + 1);
        let mine = |k: &&String| k.starts_with(&format!("p{}", self.n));
        let there: Files = there.iter().filter(|(k, _)| mine(k)).map(|(k, v)| (k.clone(), v.clone())).collect();
        let after = |n: usize| n.checked_sub(1).map_or_else(Files::new, |i| self.steps[i].after.clone());
        (least..=self.steps.len()).filter(|n| after(*n) == there).collect()
    }

    /// With `n` of these operations there, whether of another program there may be `m` only.
    fn goes_with(&self, n: usize, other: &Self, m: usize) -> bool {
        let missing = other.steps.get(m).and_then(|s| s.answered);
        let last = n.checked_sub(1).map(|i| self.steps[i].begun);
        missing.zip(last).is_none_or(|(answered, begun)| answered > begun)
    }

    fn tell(&self) -> String {
        let one = |s: &Step| format!("    {}..{:?} {} durable {}\n", s.begun, s.answered, s.label, s.durable);
        self.steps.iter().map(one).collect()
    }
}

/// Whether what is in the directory is what a kill may leave.
fn check(programs: &[Program], root: &Path) -> Result<(), String> {
    let mut there = Files::new();
    for entry in fs::read_dir(root).unwrap().flatten().filter(|e| e.file_name() != ".fsys") {
        there.insert(entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
    }
    let tell = || programs.iter().map(|p| format!("  program {}\n{}", p.n, p.tell())).collect::<String>();
    let show = there.iter().map(|(k, v)| format!("{k}={}x{:?}", v.len(), v.first())).collect::<Vec<_>>().join(" ");
    let feasible: Vec<Vec<usize>> = programs.iter().map(|p| p.feasible(&there)).collect();
    if let Some(n) = feasible.iter().position(Vec::is_empty) {
        return Err(format!("program {n}: {show}\n{}", tell()));
    }
    let agree = |chosen: &[usize]| {
        let pairs = (0..PROGRAMS).flat_map(|a| (0..PROGRAMS).filter(move |b| *b != a).map(move |b| (a, b)));
        pairs.into_iter().all(|(a, b)| programs[a].goes_with(chosen[a], &programs[b], chosen[b]))
    };
    let any = feasible[0].iter().any(|a| feasible[1].iter().any(|b| feasible[2].iter().any(|c| agree(&[*a, *b, *c]))));
    if any { Ok(()) } else { Err(format!("programs in an order that never was: {feasible:?} {show}\n{}", tell())) }
}

/// What a schedule came to.
struct Ran {
    decisions: usize,
    result: Result<(), String>,
}

fn level(seed: u64) -> Durability {
    [Durability::Always, Durability::Close, Durability::Fsync, Durability::Relaxed][seed as usize % 4]
}

/// One schedule: to its end, or cut off at a random decision. `spoil` sees the directory before it is checked.
fn explore(seed: u64, lose: Option<usize>, spoil: impl FnOnce(&Path)) -> Ran {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut config = still(level(seed), WriteMode::Auto);
    // Queues that fill up, batches of one and of all.
    config.limits.queue_max = [1, 2, 64][rng.usize(..3)];
    config.limits.batch_max = [1, 2, 64][rng.usize(..3)];
    config.limits.pending_max = [1, 2, 512][rng.usize(..3)];
    config.limits.window_us = 0;
    let strategy = [Strategy::EachFile, Strategy::OneBarrier][rng.usize(..2)];
    let w = World::open_as(dir.path(), config, Some(strategy));
    let scheduler = Arc::new(Scheduler::default());
    let (gate, clock, ended) = (scheduler.clone(), AtomicU64::new(0), AtomicUsize::new(0));
    w.seam.hook(move |call: Call| {
        if call != Call::Open {
            gate.wait();
        }
    });
    let cut = seed.is_multiple_of(3).then(|| rng.usize(..60));
    let mut programs: Vec<Program> =
        (0..PROGRAMS).map(|n| Program { n, level: level(seed), rng: rng.fork(), steps: vec![], stamp: 0 }).collect();
    let result = std::thread::scope(|scope| {
        for program in &mut programs {
            let (w, clock, ended) = (&w, &clock, &ended);
            scope.spawn(move || {
                let _ = (0..OPERATIONS).try_for_each(|_| program.step(w, clock));
                ended.fetch_add(1, Ordering::Release);
            });
        }
        let cut_now = |n| {
            if cut == Some(n) {
                w.seam.cut();
            }
        };
        let result = scheduler.run(&mut rng, &ended, cut_now, lose);
        scheduler.release_all();
        result
    });
    let decisions = scheduler.decisions.load(Ordering::Relaxed);
    let result = result.and_then(|()| {
        if cut.is_some_and(|n| n < decisions) {
            w.kill();
            spoil(dir.path());
            return check(&programs, dir.path());
        }
        w.shutdown().map_err(|n| format!("{n} files or directories do not drain"))?;
        programs.iter_mut().filter_map(|p| p.steps.last_mut()).for_each(|s| s.durable = true);
        let c = w.engine().counters.values();
        if (c.staged_now, c.staged_bytes, c.in_flight) != (0, 0, 0) {
            return Err(format!("gauges after the end: {c:?}"));
        }
        spoil(dir.path());
        check(&programs, dir.path())
    });
    Ran { decisions, result }
}

/// A schedule needs the process for itself: it looks at what all threads do.
#[test]
fn every_schedule_keeps_the_promises_and_the_controls_do_not() {
    let (first, count) = (common::env_number("FSYS_SCHEDULE_SEED", 1), common::env_number("FSYS_SCHEDULES", 300));
    let (start, mut decisions) = (Instant::now(), 0);
    for seed in first..first + count {
        let ran = explore(seed, None, |_| ());
        decisions += ran.decisions;
        if let Err(e) = ran.result {
            panic!("seed {seed} at {:?}: {e}\nagain: FSYS_SCHEDULE_SEED={seed} FSYS_SCHEDULES=1", level(seed));
        }
    }
    let rate = u128::from(count) * 1000 / start.elapsed().as_millis().max(1);
    println!("{count} schedules, {decisions} decisions, {rate} schedules/s: every call answered, all in order");
    assert!(decisions as u64 > 20 * count, "the calls pass the scheduler");
    // A wake-up that is lost, a save that is lost, half of one, and an order that never was.
    let lost = explore(2, Some(15), |_| ()).result.unwrap_err();
    assert!(lost.contains("all wait"), "{lost}");
    let some = |root: &Path| {
        let files = fs::read_dir(root).unwrap().flatten().map(|e| e.path());
        files.filter(|p| p.is_file()).min().expect("some file")
    };
    assert!(explore(5, None, |root| fs::remove_file(some(root)).unwrap()).result.is_err());
    assert!(explore(5, None, |root| fs::write(some(root), "half").unwrap()).result.is_err());
    let step = |after: &[(&str, u8)], begun, answered| Step {
        after: after.iter().map(|(k, v)| ((*k).to_owned(), vec![*v])).collect(),
        begun,
        answered: Some(answered),
        durable: false,
        label: String::new(),
    };
    let program = |n, steps| Program { n, level: Durability::Relaxed, rng: fastrand::Rng::new(), steps, stamp: 0 };
    let programs =
        [program(0, vec![step(&[("p0x", 1)], 0, 1)]), program(1, vec![step(&[("p1x", 1)], 2, 3)]), program(2, vec![])];
    let dir = tempfile::tempdir().unwrap();
    assert!(check(&programs, dir.path()).is_ok());
    fs::write(dir.path().join("p1x"), [1]).unwrap();
    assert!(check(&programs, dir.path()).is_err(), "without the save that was answered before it began");
    fs::write(dir.path().join("p0x"), [1]).unwrap();
    assert!(check(&programs, dir.path()).is_ok());
}

//! The campaign of `scripts/crash`: as much of it as one likes, by environment, with a file of results.
//!
//! The file has one line for each case that was explored, with tabs between the columns. A case that is there with the
//! same seed, budget and program is not explored again, so that a campaign that was interrupted goes on.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs::{self, OpenOptions};
use std::hash::Hasher as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::cases::{self, Case, Expect};
use crate::explore::{Budget, Report};
use crate::rig::{Kind, Rig};

const COLUMNS: &str =
    "filesystem\tworkload\tmode\tlevel\truns\tstates\tviolations\tstates/s\tseed\tverdict\tbudget\tprogram";

fn text(name: &str) -> String {
    env::var(format!("FSYS_CRASH_{name}")).unwrap_or_default()
}

fn number(name: &str, default: u64) -> u64 {
    let text = text(name);
    if text.is_empty() { default } else { text.parse().unwrap_or_else(|_| panic!("{name}: {text} is not a number")) }
}

/// The file of results.
struct Results {
    path: Option<PathBuf>,
    /// Which program was tested.
    program: String,
}

impl Results {
    fn open() -> Self {
        let path = Some(text("OUT")).filter(|p| !p.is_empty()).map(PathBuf::from);
        if let Some(path) = path.as_ref().filter(|p| !p.exists()) {
            fs::write(path, format!("{COLUMNS}\n")).unwrap();
        }
        let mut hasher = DefaultHasher::new();
        hasher.write(&fs::read(env!("CARGO_BIN_EXE_fsys-mount")).unwrap());
        Self { path, program: format!("{:016x}", hasher.finish()) }
    }

    /// What tells a case from all others.
    fn key(&self, kind: Kind, case: &Case, budget: &Budget) -> [String; 7] {
        let more = [text("MKFS"), text("OPTIONS")].join(" ");
        let budget_of = format!("{}/{}{}", budget.states, budget.per_run, more.trim_end());
        [
            kind.name().to_owned(),
            case.name.clone(),
            case.mode.to_owned(),
            case.level.to_owned(),
            budget.seed.to_string(),
            budget_of,
            self.program.clone(),
        ]
    }

    /// Whether this was explored already, and with what verdict.
    fn known(&self, kind: Kind, case: &Case, budget: &Budget) -> Option<bool> {
        let all = fs::read_to_string(self.path.as_ref()?).unwrap();
        let key = self.key(kind, case, budget);
        all.lines().find_map(|line| {
            let c: Vec<&str> = line.split('\t').collect();
            let same =
                c.len() == 12 && [c[0], c[1], c[2], c[3], c[8], c[10], c[11]] == key.each_ref().map(String::as_str);
            same.then(|| c[9] == "good")
        })
    }

    fn add(&self, kind: Kind, case: &Case, budget: &Budget, report: &Report, good: bool) {
        let Some(path) = &self.path else { return };
        let [fs, name, mode, level, seed, budget, program] = self.key(kind, case, budget);
        let (runs, states, bad, rate) = (report.runs, report.states, report.bad(), report.rate());
        let verdict = if good { "good" } else { "BAD" };
        let line = format!(
            "{fs}\t{name}\t{mode}\t{level}\t{runs}\t{states}\t{bad}\t{rate}\t{seed}\t{verdict}\t{budget}\t{program}\n"
        );
        // One write: several of us may append.
        OpenOptions::new().append(true).open(path).unwrap().write_all(line.as_bytes()).unwrap();
    }
}

/// Of a case: all its runs when the whole is asked for, else as many states as asked for.
fn budget_of(case: &Case) -> Budget {
    let keep = Some(text("KEEP")).filter(|k| !k.is_empty()).map(PathBuf::from);
    if let Some(dir) = &keep {
        fs::create_dir_all(dir).unwrap();
    }
    let (states, per_run) = (number("STATES", 1000) as usize, number("PER_RUN", 40) as usize);
    let whole = case.runs.filter(|_| text("WHOLE") == "1").map(|runs| runs * per_run);
    let states = match case.expect {
        Expect::Sound => whole.unwrap_or(states),
        // It ends with the first violation.
        Expect::Caught => states.max(4000),
    };
    // Every round of complete runs begins at a multiple of their number.
    let seed = number("SEED", 1) * whole.and(case.runs).unwrap_or(1) as u64;
    Budget { states, per_run, seed, stop_after: number("STOP", 10) as usize, keep }
}

#[test]
#[ignore = "as long as you like: run it by scripts/crash"]
fn campaign() {
    let wanted = |list: &str, name: &str| list.is_empty() || list.split(',').any(|w| name.contains(w.trim()));
    let (mkfs, options, results) = (text("MKFS"), text("OPTIONS"), Results::open());
    let mut failed = Vec::new();
    for kind in Kind::ALL.into_iter().filter(|k| wanted(&text("FS"), k.name())) {
        let rig = Rig::with(kind, &mkfs.split_whitespace().collect::<Vec<_>>(), &options);
        for case in cases::all(kind).into_iter().filter(|c| wanted(&text("CASE"), &c.name)) {
            let budget = budget_of(&case);
            let good = results.known(kind, &case, &budget).unwrap_or_else(|| {
                let (report, good) = case.run(&rig, &budget);
                results.add(kind, &case, &budget, &report, good);
                good
            });
            if !good {
                failed.push(format!("{} {}", kind.name(), case.name));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

/// Prints the table of a file of results, with sums; fails if a line in it is bad.
#[test]
#[ignore = "for scripts/crash"]
fn table() {
    let path = text("OUT");
    let all = fs::read_to_string(Path::new(&path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    let rows: Vec<Vec<&str>> = all.lines().skip(1).map(|l| l.split('\t').collect()).collect();
    println!(
        "{:5} {:24} {:9} {:8} {:>5} {:>7} {:>10} {:>8} {:>6}",
        "fs", "workload", "mode", "level", "runs", "states", "violations", "states/s", "seed"
    );
    for c in rows.iter().filter(|c| c.len() == 12) {
        let what = c[1].trim_end_matches(c[3]).trim_end().trim_end_matches(c[2]).trim_end();
        println!(
            "{:5} {what:24} {:9} {:8} {:>5} {:>7} {:>10} {:>8} {:>6}{}",
            c[0],
            c[2],
            c[3],
            c[4],
            c[5],
            c[6],
            c[7],
            c[8],
            if c[9] == "good" { "" } else { "  BAD" }
        );
    }
    let sum = |fs: &str, control: bool, column: usize| -> u64 {
        let mine = rows.iter().filter(|c| c.len() == 12 && c[0] == fs && c[1].starts_with("control") == control);
        mine.map(|c| c[column].parse::<u64>().unwrap()).sum()
    };
    for kind in Kind::ALL {
        let fs = kind.name();
        println!(
            "{fs}: {} crash states, {} violations; {} controls caught within {} crash states",
            sum(fs, false, 5),
            sum(fs, false, 6),
            sum(fs, true, 6),
            sum(fs, true, 5)
        );
    }
    let bad = rows.iter().filter(|c| c.len() == 12 && c[9] != "good").count();
    assert_eq!(bad, 0, "cases that are not as they should be");
}

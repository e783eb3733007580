//! Whole programs with a recovery of their own: a database and a version control system, on the mount.
//!
//! One transaction is one process. What they find after a crash is asked of the programs themselves: the database and
//! the repository must be intact, and hold every transaction that was answered and none that had not begun.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use fastrand::Rng;

use crate::disk::Disk;
use crate::fsys::{Daemon, recover};
use crate::model::{History, Kind, Violation};
use crate::programs::Level;
use crate::rig::Rig;
use crate::workload::Workload;

/// Which program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Rollback journal, deleted at every commit and its directory synced.
    SqliteDelete,
    /// Write-ahead log, synced at every commit.
    SqliteWal,
    /// `git commit` with fsync of all that it writes; it renames without a sync of the directory.
    Git,
}

/// See the module.
pub struct Commands {
    program: Program,
    level: Level,
    transactions: usize,
    /// Of every transaction: where in the record it began, and where it was answered.
    done: Vec<(usize, usize)>,
}

impl Commands {
    pub fn new(program: Program, level: Level) -> Self {
        Self { program, level, transactions: 6, done: vec![] }
    }

    fn transaction(&self, at: &Path, n: usize, rng: &mut Rng) {
        match self.program {
            Program::SqliteDelete => sqlite(at, &format!("pragma synchronous=extra; {}", insert(n, rng))),
            Program::SqliteWal => sqlite(at, &format!("pragma synchronous=full; {}", insert(n, rng))),
            Program::Git => {
                for _ in 0..rng.usize(1..4) {
                    let text: String = (0..rng.usize(1..9000)).map(|_| rng.alphanumeric()).collect();
                    fs::write(at.join("repo").join(format!("file{}", rng.u8(..5))), text).unwrap();
                }
                git(at, &["add", "-A"]);
                git(at, &["commit", "-q", "--allow-empty", "-m", &format!("number {n}")]);
                String::new()
            }
        };
    }

    /// How many transactions the program finds, or what is wrong.
    fn found(&self, root: &Path) -> Result<usize, String> {
        let text = if self.program == Program::Git {
            let fsck = run(&mut git_command(root, &["fsck", "--full", "--strict"]))?;
            if fsck.contains("missing") || fsck.contains("broken") {
                return Err(fsck);
            }
            run(&mut git_command(root, &["rev-list", "--count", "HEAD"]))?
        } else {
            let text =
                run(&mut sqlite_command(root, "pragma integrity_check; select count(*) from t; select max(n) from t"))?;
            let lines: Vec<&str> = text.lines().collect();
            match lines[..] {
                ["ok", count, max] if count == max => count.to_string(),
                _ => return Err(text),
            }
        };
        // The first one was made before the run.
        text.trim().parse::<usize>().map(|n| n - 1).map_err(|e| format!("{text:?}: {e}"))
    }

    /// Whether the answer of this program means that the transaction is durable.
    fn waits(&self) -> bool {
        match self.program {
            Program::SqliteDelete | Program::SqliteWal => self.level != Level::Relaxed,
            Program::Git => self.level == Level::Always,
        }
    }
}

impl Workload for Commands {
    fn prepare(&mut self, rig: &Rig, root: &Path, _rng: &mut Rng) {
        // The case `programs first-mount` is about a first one.
        Daemon::mount(root, &rig.dir("mnt"), "").unmount();
        match self.program {
            Program::SqliteDelete => drop(sqlite(root, "create table t(n, b); insert into t values(1, 'first')")),
            Program::SqliteWal => {
                drop(sqlite(root, "pragma journal_mode=wal; create table t(n, b); insert into t values(1, 'first')"));
            }
            Program::Git => {
                fs::create_dir(root.join("repo")).unwrap();
                git(root, &["init", "-q"]);
                git(root, &["commit", "-q", "--allow-empty", "-m", "first"]);
            }
        }
    }

    fn run(&mut self, rig: &Rig, root: &Path, disk: &Disk, rng: &mut Rng) -> History {
        let daemon = Daemon::mount(root, &rig.dir("mnt"), &self.level.options(rng));
        for n in 0..self.transactions {
            let begun = disk.mark();
            self.transaction(daemon.path(), n + 2, rng);
            self.done.push((begun, disk.mark()));
        }
        daemon.unmount();
        History::default()
    }

    fn recover(&self, root: &Path) -> Result<(), Violation> {
        recover(root)
    }

    fn recovery_writes(&self) -> bool {
        true
    }

    fn check(&self, root: &Path, _history: &History, at: usize) -> Result<(), Violation> {
        let found = self.found(root).map_err(|text| Violation::new(Kind::Torn, text))?;
        let answered = self.done.iter().filter(|d| self.waits() && d.1 < at).count();
        let begun = self.done.iter().filter(|d| d.0 < at).count();
        let text = format!("{found} transactions found, {answered} answered, {begun} begun");
        if found < answered {
            return Err(Violation::new(Kind::Lost, text));
        }
        if found > begun { Err(Violation::new(Kind::Torn, text)) } else { Ok(()) }
    }
}

fn insert(n: usize, rng: &mut Rng) -> String {
    let rows = format!("insert into t values({n}, randomblob({}));", rng.usize(1..20_000));
    // Pages that are changed twice in a transaction, and a freed one.
    format!("begin; {rows} update t set b = randomblob({}) where n = {}; commit", rng.usize(1..9000), rng.usize(1..=n))
}

fn sqlite_command(at: &Path, sql: &str) -> Command {
    let mut command = Command::new("sqlite3");
    command.args(["-batch", "-bail"]).arg(at.join("db")).arg(sql);
    command
}

fn sqlite(at: &Path, sql: &str) -> String {
    run(&mut sqlite_command(at, sql)).unwrap_or_else(|e| panic!("sqlite3: {e}"))
}

fn git_command(at: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("git");
    command.env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null");
    command.arg("-C").arg(at.join("repo"));
    command.args([
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@t",
        "-c",
        "core.fsync=all",
        "-c",
        "gc.auto=0",
        "-c",
        "maintenance.auto=false",
    ]);
    command.args(["-c", "safe.directory=*"]).args(args);
    command
}

fn git(at: &Path, args: &[&str]) {
    run(&mut git_command(at, args)).unwrap_or_else(|e| panic!("git {args:?}: {e}"));
}

fn run(command: &mut Command) -> Result<String, String> {
    let out: Output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        Ok(text)
    } else {
        Err(format!("{} {text}{}", out.status, String::from_utf8_lossy(&out.stderr)))
    }
}

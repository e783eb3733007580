//! Programs that call fsync: SQLite, PostgreSQL, mail delivery.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::common::tools::run_tool;
use crate::common::{run, run_text};
use crate::inputs::{Inputs, done, has, text};
use crate::{Row, Settle};

const TRANSACTIONS: Option<&str> = Some("transactions");
const MAILS: Option<&str> = Some("mails");

/// The rows, in the order of the table.
pub const ROWS: [Row; 8] = [
    Row {
        name: "sqlite, 1 database",
        unit: TRANSACTIONS,
        input: sqlite_is_there,
        run: |i, d, s| sqlite(i, d, s, 1, "delete"),
    },
    Row {
        name: "sqlite, 8 databases",
        unit: TRANSACTIONS,
        input: sqlite_is_there,
        run: |i, d, s| sqlite(i, d, s, 8, "delete"),
    },
    Row {
        name: "sqlite WAL, 1 database",
        unit: TRANSACTIONS,
        input: sqlite_is_there,
        run: |i, d, s| sqlite(i, d, s, 1, "wal"),
    },
    Row {
        name: "sqlite WAL, 8 databases",
        unit: TRANSACTIONS,
        input: sqlite_is_there,
        run: |i, d, s| sqlite(i, d, s, 8, "wal"),
    },
    Row { name: "pgbench, 1 client", unit: TRANSACTIONS, input: cluster, run: |i, d, s| pgbench(i, d, s, 1) },
    Row { name: "pgbench, 16 clients", unit: TRANSACTIONS, input: cluster, run: |i, d, s| pgbench(i, d, s, 16) },
    Row {
        name: "Maildir, 16 senders: fsync, rename",
        unit: MAILS,
        input: |_| Ok(()),
        run: |i, d, s| mail(i, d, s, "mail"),
    },
    Row {
        name: "Maildir, 16 senders: fsync, rename, fsync of new/",
        unit: MAILS,
        input: |_| Ok(()),
        run: |i, d, s| mail(i, d, s, "mail-synced"),
    },
];

/// Transactions of one database in one run.
const INSERTS: usize = 400;

fn sqlite_is_there(_: &Inputs) -> Result<(), String> {
    has("sqlite3")
}

/// `databases` programs at a time, each with a database of its own: seconds of a transaction of them together.
#[allow(clippy::cast_precision_loss)] // counts
fn sqlite(inputs: &Inputs, dir: &Path, settle: Settle, databases: usize, journal: &str) -> f64 {
    let transactions = inputs.scaled(INSERTS);
    let script = inputs.path("inserts.sql");
    let insert = "INSERT INTO t(v) VALUES(randomblob(400));\n".repeat(transactions);
    fs::write(&script, format!("PRAGMA synchronous=FULL;\n{insert}")).expect("script");
    let paths: Vec<PathBuf> = (0..databases).map(|n| dir.join(format!("{n}.db"))).collect();
    for path in &paths {
        let make = format!("PRAGMA journal_mode={journal}; CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB);");
        run(Command::new("sqlite3").arg(path).arg(make));
    }
    settle();
    let started = Instant::now();
    let start = |path: &PathBuf| -> Child {
        let mut shell = Command::new("sqlite3");
        shell.args(["-bail", "-batch"]).arg(path).stdin(File::open(&script).expect("script"));
        shell.stdout(Stdio::null()).spawn().expect("sqlite3")
    };
    let running: Vec<Child> = paths.iter().map(start).collect();
    running.into_iter().for_each(|mut c| assert!(c.wait().expect("it ends").success(), "sqlite3 failed"));
    let seconds = started.elapsed().as_secs_f64();
    for path in &paths {
        let count = run_text(Command::new("sqlite3").arg(path).arg("SELECT count(*) FROM t"));
        assert_eq!(count.trim(), transactions.to_string(), "every transaction is there");
    }
    seconds / (transactions * databases) as f64
}

/// The newest server of the distribution.
fn server_programs() -> Result<PathBuf, String> {
    let versions = fs::read_dir("/usr/lib/postgresql").map_err(|_| "PostgreSQL is not installed".to_owned())?;
    let found = versions.filter_map(|v| Some(v.ok()?.path().join("bin"))).filter(|b| b.join("pgbench").exists()).max();
    found.ok_or_else(|| "PostgreSQL is not installed".to_owned())
}

/// One of its programs as its user: the server refuses to be root's.
fn as_postgres(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--"]).current_dir("/");
    command.arg(server_programs().expect("looked for before").join(program));
    command
}

/// A server at work on a cluster; stopped at once when dropped.
struct Server {
    data: PathBuf,
    socket: PathBuf,
}

impl Server {
    fn start(data: &Path, socket: &Path) -> Result<Server, String> {
        // Owned from here on: what fails half started is stopped, too.
        let server = Server { data: data.to_owned(), socket: socket.to_owned() };
        let log = socket.join("log");
        done(as_postgres("pg_ctl").args(["-w", "-s", "start", "-D"]).arg(data).arg("-l").arg(log))?;
        Ok(server)
    }

    fn bench(&self, args: &[&str]) -> Result<String, String> {
        text(as_postgres("pgbench").arg("-h").arg(&self.socket).args(["-U", "postgres"]).args(args).arg("postgres"))
    }

    fn stop(&self, how: &str) -> Result<(), String> {
        done(as_postgres("pg_ctl").args(["-w", "-s", "stop", "-m", how, "-D"]).arg(&self.data))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing runs any more after a clean stop.
        if self.data.join("postmaster.pid").exists()
            && let Err(why) = self.stop("immediate")
        {
            eprintln!("{why}");
        }
    }
}

/// Branches of the bank; as many as clients, or these wait for each other.
const BRANCHES: usize = 16;

/// A cluster with the tables of pgbench in it, which every run copies.
fn cluster(inputs: &Inputs) -> Result<(), String> {
    server_programs()?;
    done(Command::new("id").args(["-u", "postgres"])).map_err(|_| "there is no user postgres".to_owned())?;
    let socket = inputs.once("socket", owned)?;
    inputs.once("pgdata", |part| {
        owned(part)?;
        done(
            as_postgres("initdb").args(["-A", "trust", "-U", "postgres", "--no-locale", "-E", "UTF8", "-D"]).arg(part),
        )?;
        let conf = part.join("postgresql.conf");
        let given = fs::read_to_string(&conf).map_err(|e| e.to_string())?;
        let ours = format!("listen_addresses = ''\nunix_socket_directories = '{}'\n", socket.display());
        fs::write(conf, given + &ours).map_err(|e| e.to_string())?;
        let server = Server::start(part, &socket)?;
        server.bench(&["-i", "-q", "-s", &inputs.scaled(BRANCHES).to_string()])?;
        server.stop("fast")
    })?;
    Ok(())
}

/// A directory of the server's user.
fn owned(path: &Path) -> Result<(), String> {
    fs::create_dir(path).map_err(|e| e.to_string())?;
    done(Command::new("chown").arg("postgres:postgres").arg(path))?;
    done(Command::new("chmod").arg("0700").arg(path))
}

/// Seconds of a transaction of all clients together.
fn pgbench(inputs: &Inputs, dir: &Path, settle: Settle, clients: u32) -> f64 {
    let data = dir.join("pgdata");
    run(Command::new("cp").arg("-a").arg(inputs.path("pgdata")).arg(&data));
    let server = Server::start(&data, &inputs.path("socket")).expect("the server starts");
    settle();
    let seconds = inputs.scaled(5).to_string();
    let text = server
        .bench(&["-n", "-c", &clients.to_string(), "-j", &clients.min(2).to_string(), "-T", &seconds])
        .expect("pgbench");
    let rate = text.lines().find_map(|l| l.strip_prefix("tps = ")?.split(' ').next()?.parse::<f64>().ok());
    1.0 / rate.unwrap_or_else(|| panic!("no tps in {text}"))
}

/// Seconds of a delivery by 16 programs together: mails of 4 KiB into tmp/, then by rename into new/.
fn mail(inputs: &Inputs, dir: &Path, settle: Settle, style: &str) -> f64 {
    ["tmp", "new"].iter().for_each(|d| fs::create_dir(dir.join(d)).expect("mkdir"));
    let mails = inputs.scaled(4000).max(16).to_string();
    settle();
    let options = ["--writers", "16", "--saves", &mails, "--size", "4096", "--style", style];
    let ended = run_tool("saver", dir, 16, &options);
    assert_eq!(ended.code, 0, "{}\n{}", ended.summary, ended.complaint);
    let arrived = fs::read_dir(dir.join("new")).expect("new").count();
    assert_eq!(arrived.to_string(), mails, "every mail arrived");
    1.0 / ended.figure("saves_per_s")
}

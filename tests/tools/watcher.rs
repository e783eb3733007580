//! Reads a directory all the time and verifies that each file is exactly one complete version.
//!
//! Pointed at the backing directory while savers work through the mount, it must find nothing. Exit 0: nothing
//! bad in at least one read; 1: something bad, listed on stderr; 2: could not look, or saw nothing at all.
//! One JSON object with the counts goes to stdout.

#[allow(dead_code, reason = "shared by two tools, each uses a part")]
mod table;
#[allow(dead_code, reason = "shared by two tools, each uses a part")]
mod version;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clap::Parser;
use table::{Entry, Table};
use version::{Defect, check, check_appended, file_name};

#[derive(Parser)]
struct Args {
    /// The directory to read
    #[arg(long)]
    dir: PathBuf,
    /// Number of files
    #[arg(long)]
    files: u32,
    /// Table of the savers: what was acknowledged must be there, what was not begun must not
    #[arg(long)]
    ack: Option<PathBuf>,
    /// Read everything once and end; with --ack every acknowledged save must be there
    #[arg(long = "final")]
    once: bool,
    /// The files are appended to, not rewritten
    #[arg(long)]
    append: bool,
    /// End after this many seconds (else at SIGTERM)
    #[arg(long)]
    seconds: Option<f64>,
    /// Offending files to list at most
    #[arg(long, default_value_t = 20)]
    list: usize,
}

/// What was seen so far.
#[derive(Default)]
struct Findings {
    reads: u64,
    rounds: u64,
    versions: u64,
    bad: BTreeMap<&'static str, u64>,
    listed: usize,
    newest: BTreeMap<u32, u64>,
}

fn main() -> ExitCode {
    match watch(&Args::parse()) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("watcher: {e}");
            ExitCode::from(2)
        }
    }
}

fn watch(args: &Args) -> io::Result<ExitCode> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let table = args.ack.as_deref().map(|p| Table::open(p, args.files)).transpose()?;
    let start = Instant::now();
    let mut found = Findings::default();
    loop {
        for id in 0..args.files {
            look(args, table.as_ref(), id, &mut found)?;
        }
        found.rounds += 1;
        look_for_strays(args, &mut found)?;
        let late = args.seconds.is_some_and(|s| start.elapsed().as_secs_f64() >= s);
        if args.once || late || stop.load(Ordering::Relaxed) {
            break;
        }
    }
    let bad: u64 = found.bad.values().sum();
    let summary = serde_json::json!({
        "rounds": found.rounds, "reads": found.reads, "versions": found.versions, "bad": bad, "kinds": found.bad,
    });
    println!("{summary}");
    if found.reads == 0 {
        eprintln!("watcher: no file was read in {}: this proves nothing", args.dir.display());
        return Ok(ExitCode::from(2));
    }
    Ok(if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Reads one file and judges it.
fn look(args: &Args, table: Option<&Table>, id: u32, found: &mut Findings) -> io::Result<()> {
    // The order matters: what was acknowledged before the read must be in the read, and what is in the
    // read must have been begun by the time after it.
    let acked = table.map_or(Ok(0), |t| t.get(id).map(|e| e.acked))?;
    let content = match fs::read(args.dir.join(file_name(id))) {
        Ok(content) => Some(content),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", file_name(id)))),
    };
    let after = table.map_or(Ok(Entry { begun: u64::MAX, acked: 0 }), |t| t.get(id))?;
    let newest = found.newest.get(&id).copied().unwrap_or(0);
    let Some(content) = content else {
        if acked > 0 || newest > 0 {
            report(args, found, "missing", id, &format!("acknowledged {acked}, seen before {newest}"));
        }
        return Ok(());
    };
    found.reads += 1;
    let verdict = if args.append { check_appended(id, &content) } else { check(id, &content) };
    match verdict {
        Err(Defect::Empty) => report(args, found, "empty", id, &format!("acknowledged {acked}")),
        Err(Defect::Torn(why)) => report(args, found, "torn", id, &why),
        Ok(seq) if seq < acked => report(args, found, "lost", id, &format!("save {seq}, acknowledged {acked}")),
        Ok(seq) if seq < newest => report(args, found, "went back", id, &format!("save {seq}, seen before {newest}")),
        Ok(seq) if seq > after.begun => {
            report(args, found, "from nowhere", id, &format!("save {seq}, begun {}", after.begun));
        }
        Ok(seq) => {
            found.versions += u64::from(seq != newest);
            found.newest.insert(id, seq);
        }
    }
    Ok(())
}

/// Nothing but the files themselves, a proper saver's own temps and `.fsys` may be in the directory.
fn look_for_strays(args: &Args, found: &mut Findings) -> io::Result<()> {
    for entry in fs::read_dir(&args.dir)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        let id: Option<u32> = name.strip_prefix('f').and_then(|n| n.parse().ok());
        let temp = Path::new(name.as_ref()).extension().is_some_and(|e| e == "tmp");
        if !temp && name != ".fsys" && id.is_none_or(|id| id >= args.files || file_name(id) != name) {
            *found.bad.entry("stray").or_default() += 1;
            if found.listed < args.list {
                found.listed += 1;
                eprintln!("watcher: stray entry {name}");
            }
        }
    }
    Ok(())
}

fn report(args: &Args, found: &mut Findings, kind: &'static str, id: u32, why: &str) {
    *found.bad.entry(kind).or_default() += 1;
    if found.listed < args.list {
        found.listed += 1;
        eprintln!("watcher: {}: {kind}: {why}", file_name(id));
    }
}

//! Saves files the way unmodified programs do, from many real processes, and notes what was acknowledged.
//!
//! `saver --dir DIR --writers 64 --files 128 --saves 6000 --ack TABLE` prints one JSON object when done.
//! SIGTERM ends it after the saves in progress. Exit 0: no error, or every error was got over (`--on-error retry`).

#[allow(dead_code, reason = "shared by two tools, each uses a part")]
mod table;
#[allow(dead_code, reason = "shared by two tools, each uses a part")]
mod version;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use table::Table;
use version::{MIN_LEN, Version, file_name, mix};

/// How a save is done.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Style {
    /// `open(O_TRUNC)`, write in pieces, close. No fsync: what most programs do.
    Naive,
    /// Temp file, fsync, rename, fsync of the directory: the proper save.
    Dance,
    /// Overwrite an existing file of the same size in pieces, fsync, close.
    InPlace,
    /// `open(O_APPEND)`, write in pieces, close.
    Append,
    /// `Handle::write` of the crate `fsys`, by the method that it chooses.
    FsysAuto,
    /// The same by fsync(2).
    FsysSync,
    /// Delivery into a Maildir: a new file in `tmp`, fsync, rename into `new`.
    Mail,
    /// The same, and an fsync of `new`.
    MailSynced,
}

/// What a writer does when a call fails.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum OnError {
    /// End, with exit code 1.
    Stop,
    /// Go on with the next save; give up when nothing succeeds for `--patience` seconds.
    Retry,
}

#[derive(Parser)]
struct Args {
    /// Directory with the files; must exist
    #[arg(long)]
    dir: PathBuf,
    /// Number of files
    #[arg(long, default_value_t = 64)]
    files: u32,
    /// Number of processes; file i belongs to process i mod writers
    #[arg(long, default_value_t = 1)]
    writers: u32,
    /// Number of saves by all processes together; 0: no limit
    #[arg(long, default_value_t = 0)]
    saves: u64,
    /// End after this many seconds
    #[arg(long)]
    seconds: Option<f64>,
    /// How to save
    #[arg(long, value_enum, default_value_t = Style::Naive)]
    style: Style,
    /// Table of begun and acknowledged saves, outside the filesystem under test
    #[arg(long)]
    ack: Option<PathBuf>,
    /// Bytes per version: N, or MIN-MAX for a random size
    #[arg(long, default_value = "1024-65536", value_parser = parse_size)]
    size: (usize, usize),
    /// In how many writes the content is written
    #[arg(long, default_value_t = 3)]
    pieces: usize,
    /// Each process saves in a directory of its own, in `--dir`
    #[arg(long)]
    separate: bool,
    /// What to do when a call fails
    #[arg(long, value_enum, default_value_t = OnError::Stop)]
    on_error: OnError,
    /// Seconds without a single success after which `--on-error retry` gives up
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// Internal: this process is writer N
    #[arg(long, hide = true)]
    child: Option<u32>,
}

fn parse_size(text: &str) -> Result<(usize, usize), String> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let number = |s: &str| s.parse::<usize>().map_err(|e| format!("{s}: {e}"));
    let (low, high) = (number(low)?, number(high)?);
    if low < MIN_LEN || high < low {
        return Err(format!("want {MIN_LEN} <= MIN <= MAX"));
    }
    Ok((low, high))
}

/// What one writer reports, and all of them together.
#[derive(Default, Serialize, Deserialize)]
struct Report {
    saves: u64,
    errors: u64,
    first_error: Option<String>,
    gave_up: bool,
    /// Latency of the acknowledged saves: (microseconds, count).
    latency_us: Vec<(u64, u64)>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match args.child {
        Some(index) => run_writer(&args, index),
        None => run_parent(&args),
    };
    match outcome {
        Ok(code) => code,
        Err(e) => {
            eprintln!("saver: {e}");
            ExitCode::from(2)
        }
    }
}

/// Starts the writers, lets them go together, waits for them and prints the sum.
fn run_parent(args: &Args) -> io::Result<ExitCode> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    if let Some(path) = &args.ack {
        Table::open(path, args.files)?;
    }
    let mut children: Vec<(Child, Option<ChildStdin>)> = Vec::new();
    for index in 0..args.writers {
        let mut child = Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .args(["--child", &index.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take();
        children.push((child, stdin));
    }
    for (child, _) in &mut children {
        // Each says that it is ready, so that the clock starts with all of them.
        let mut ready = [0u8; 1];
        child.stdout.as_mut().ok_or_else(|| io::Error::other("no pipe"))?.read_exact(&mut ready)?;
    }
    let start = Instant::now();
    for (_, stdin) in &mut children {
        // A writer that has died already is noticed below.
        let _ = stdin.as_mut().map(|pipe| pipe.write_all(b"g"));
    }
    let mut total = Report::default();
    let mut all: Histogram<u64> = Histogram::new(2).map_err(io::Error::other)?;
    let mut failed = false;
    let mut running = children.len();
    let mut wall = start.elapsed();
    while running > 0 {
        if stop.load(Ordering::Relaxed) {
            for (_, stdin) in &mut children {
                *stdin = None;
            }
        }
        running = 0;
        for (child, _) in &mut children {
            running += usize::from(child.try_wait()?.is_none());
        }
        if running > 0 {
            wall = start.elapsed();
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    for (child, _) in &mut children {
        let mut text = String::new();
        child.stdout.as_mut().ok_or_else(|| io::Error::other("no pipe"))?.read_to_string(&mut text)?;
        let report: Report = serde_json::from_str(&text).map_err(|e| io::Error::other(format!("writer died: {e}")))?;
        failed |= !child.wait()?.success();
        total.saves += report.saves;
        total.errors += report.errors;
        total.gave_up |= report.gave_up;
        total.first_error = total.first_error.or(report.first_error);
        for (value, count) in report.latency_us {
            all.record_n(value, count).map_err(io::Error::other)?;
        }
    }
    let seconds = wall.as_secs_f64().max(1e-9);
    #[allow(clippy::cast_precision_loss, reason = "a rate")]
    let rate = total.saves as f64 / seconds;
    let summary = serde_json::json!({
        "style": format!("{:?}", args.style).to_lowercase(), "writers": args.writers, "files": args.files,
        "saves": total.saves, "errors": total.errors, "first_error": total.first_error, "gave_up": total.gave_up,
        "wall_s": seconds, "saves_per_s": rate,
        "p50_us": all.value_at_quantile(0.5), "p99_us": all.value_at_quantile(0.99), "max_us": all.max(),
    });
    println!("{summary}");
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// One writer: saves its files in turn until its share, its time, an error or the end of its input.
fn run_writer(args: &Args, index: u32) -> io::Result<ExitCode> {
    let table = args.ack.as_deref().map(|p| Table::open(p, args.files)).transpose()?;
    let mine: Vec<u32> = (index..args.files).step_by(args.writers as usize).collect();
    let mut seqs: Vec<u64> = Vec::with_capacity(mine.len());
    for id in &mine {
        seqs.push(match &table {
            Some(table) => table.get(*id)?.begun,
            None => 0,
        });
    }
    let mut dir = args.dir.clone();
    if args.separate {
        dir.push(format!("writer-{index}"));
        std::fs::create_dir_all(&dir)?;
    }
    let by_crate = handle(args.style).transpose().map_err(io::Error::other)?;
    io::stdout().write_all(b"r")?;
    io::stdout().flush()?;
    let mut go = [0u8; 1];
    io::stdin().read_exact(&mut go)?;
    let stop = Arc::new(AtomicBool::new(false));
    let on_eof = Arc::clone(&stop);
    std::thread::spawn(move || {
        // The parent closes the pipe to end us, and its own death closes it too.
        let _ = io::stdin().read(&mut [0u8; 1]);
        on_eof.store(true, Ordering::Relaxed);
    });

    let share =
        args.saves / u64::from(args.writers) + u64::from(u64::from(index) < args.saves % u64::from(args.writers));
    let start = Instant::now();
    let mut report = Report::default();
    let mut latency: Histogram<u64> = Histogram::new(2).map_err(io::Error::other)?;
    let mut last_success = start;
    let mut turn = 0usize;
    let enough = |saves: u64| {
        (args.saves > 0 && saves >= share) || args.seconds.is_some_and(|s| start.elapsed().as_secs_f64() >= s)
    };
    while !mine.is_empty() && !stop.load(Ordering::Relaxed) && !enough(report.saves) {
        let slot = turn % mine.len();
        let id = mine[slot];
        // A save that failed may have been committed or not, so its number is never used again. An append
        // that failed left no number that the next one could follow, so that style does not retry.
        seqs[slot] += 1;
        turn += 1;
        let version = Version { id, seq: seqs[slot], len: pick_len(args.size, id, seqs[slot]) };
        let content = version.render();
        if let Some(table) = &table {
            table.begin(id, version.seq)?;
        }
        let before = Instant::now();
        match save(args.style, by_crate.as_ref(), &dir, &version, &content, args.pieces) {
            Ok(()) => {
                if let Some(table) = &table {
                    table.acknowledge(id, version.seq)?;
                }
                last_success = Instant::now();
                report.saves += 1;
                latency.record((last_success - before).as_micros() as u64).map_err(io::Error::other)?;
            }
            Err(e) => {
                report.errors += 1;
                report.first_error.get_or_insert_with(|| format!("{}: {e}", file_name(id)));
                report.gave_up = last_success.elapsed() > Duration::from_secs(args.patience);
                if args.on_error == OnError::Stop || report.gave_up {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    report.latency_us = latency.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect();
    println!("{}", serde_json::to_string(&report)?);
    let bad = report.gave_up || (report.errors > 0 && args.on_error == OnError::Stop);
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn pick_len((low, high): (usize, usize), id: u32, seq: u64) -> usize {
    low + mix(u64::from(id) << 32 | seq) as usize % (high - low + 1)
}

/// What the crate saves through, when the style is its own.
fn handle(style: Style) -> Option<fsys_crate::Result<fsys_crate::Handle>> {
    let method = match style {
        Style::FsysAuto => fsys_crate::Method::Auto,
        Style::FsysSync => fsys_crate::Method::Sync,
        _ => return None,
    };
    Some(fsys_crate::builder().method(method).build())
}

fn save(
    style: Style,
    handle: Option<&fsys_crate::Handle>,
    dir: &Path,
    version: &Version,
    content: &[u8],
    pieces: usize,
) -> io::Result<()> {
    let id = version.id;
    let path = dir.join(file_name(id));
    let pieces = content.chunks(content.len().div_ceil(pieces.max(1)));
    match style {
        Style::Naive => {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
            write_pieces(&mut file, pieces)?;
            close(file)
        }
        Style::Append => {
            let mut file = OpenOptions::new().append(true).create(true).open(path)?;
            write_pieces(&mut file, pieces)?;
            close(file)
        }
        Style::InPlace => {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
            let mut at = 0;
            for piece in pieces {
                file.write_all_at(piece, at)?;
                at += piece.len() as u64;
            }
            file.sync_all()?;
            close(file)
        }
        Style::Dance => {
            let temp = dir.join(format!(".{}.tmp", file_name(id)));
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&temp)?;
            write_pieces(&mut file, pieces)?;
            file.sync_all()?;
            close(file)?;
            std::fs::rename(&temp, &path)?;
            File::open(dir)?.sync_all()
        }
        Style::FsysAuto | Style::FsysSync => {
            let handle = handle.ok_or_else(|| io::Error::other("no handle of the crate"))?;
            handle.write(path, content).map_err(io::Error::other)
        }
        Style::Mail | Style::MailSynced => {
            let (name, new) = (format!("{}.{}", version.seq, file_name(id)), dir.join("new"));
            let temp = dir.join("tmp").join(&name);
            let mut file = OpenOptions::new().write(true).create_new(true).open(&temp)?;
            write_pieces(&mut file, pieces)?;
            file.sync_all()?;
            close(file)?;
            std::fs::rename(&temp, new.join(name))?;
            if matches!(style, Style::MailSynced) { File::open(new)?.sync_all() } else { Ok(()) }
        }
    }
}

fn write_pieces(file: &mut File, mut pieces: std::slice::Chunks<'_, u8>) -> io::Result<()> {
    pieces.try_for_each(|piece| file.write_all(piece))
}

/// close(2) with its result, which dropping a `File` throws away.
fn close(file: File) -> io::Result<()> {
    // SAFETY: the descriptor was just taken out of its owner and is used for nothing else.
    if unsafe { libc::close(file.into_raw_fd()) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

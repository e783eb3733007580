//! Single calls through the mount and, with `--peers`, through file systems of others against the raw file system: what a
//! program pays that is not waiting for a device.
//!
//! Every round runs each row on the raw file system, on every mount in an order that rotates, and on the raw file system
//! again, one right after the other, and gives one ratio for each; reported are medians with the smallest and the largest,
//! and the ratio of raw to raw, which is the noise. `scripts/bench --ops` is the way to run it.

#[path = "../tests/common/mod.rs"]
mod common;
mod peers;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Parser;
use common::{Kind, LoopFs, can_mount, run};
use fsys_mount::cli::chart::{Bar, Chart};
use peers::target::{Target, middle, named_mounts, start_named};
use peers::{PEERS, memory, start_all};

#[derive(Parser)]
#[allow(clippy::struct_excessive_bools)] // flags that are typed
struct Args {
    /// Filesystem
    #[arg(long, default_value = "ext4")]
    fs: String,
    /// Rounds
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Size of the large files, in MiB
    #[arg(long, default_value_t = 1024)]
    large_mb: u64,
    /// Only rows whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// `-o` list for the mount, between `durability=relaxed` and the rule that files `*.db` are in place
    #[arg(long, default_value = "")]
    options: String,
    /// Several mounts instead, `NAME:OPTIONS;NAME:OPTIONS`, each with that rule. The bars and the comparison with the
    /// peers are for the first
    #[arg(long, value_parser = named_mounts, conflicts_with = "options")]
    mounts: Option<Mounts>,
    /// The file systems of others, too
    #[arg(long)]
    peers: bool,
    /// Only the memory of the daemons, with many files
    #[arg(long)]
    memory: bool,
    /// How many files for `--memory`
    #[arg(long, default_value_t = 100_000, requires = "memory")]
    files: u32,
    /// Writes the ratios to raw as a bar chart (SVG) to this file
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Exit 1 when a bar is missed
    #[arg(long)]
    check: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

type Mounts = Vec<(String, String)>;

const CHUNK: usize = 1 << 20;
const ENTRIES: usize = 1000;
/// What the rows that say so write in place.
const IN_PLACE: &str = "rule=*.db:mode=in-place";

/// A row: its name, the largest ratio that the project allows, the large file that is there while it runs, if any, and
/// what it does in a directory (prepared by [`prepare`]); it gives the time per operation.
struct Row {
    name: &'static str,
    bar: f64,
    large: Option<&'static str>,
    run: fn(&Path, u64) -> Duration,
}

const fn row(name: &'static str, bar: f64, run: fn(&Path, u64) -> Duration) -> Row {
    Row { name, bar, large: None, run }
}

const fn large(name: &'static str, bar: f64, file: &'static str, run: fn(&Path, u64) -> Duration) -> Row {
    Row { name, bar, large: Some(file), run }
}

const ROWS: [Row; 13] = [
    row("stat, cached", 1.3, stat),
    row("read 4 KiB, cached", 1.1, read_4k),
    large("read 1 GiB in sequence, in place", 1.1, "large.db", |d, mb| read_large(&d.join("large.db"), mb)),
    large("read 1 GiB in sequence, other files", f64::INFINITY, "large", |d, mb| read_large(&d.join("large"), mb)),
    large("write 1 GiB in place", 1.1, "large.db", write_in_place),
    row("append 128 bytes, in place", 1.3, append),
    large("mmap read, in place", 1.05, "large.db", map_read),
    large("write 1 GiB, staged", 1.5, "staged", write_staged),
    row("create, write 4 KiB, close", 3.0, create),
    row("open, close", 8.0, |d, _| open_close(&d.join("f"))),
    row("open, close, in place", 8.0, |d, _| open_close(&d.join("f.db"))),
    row("readdir and stat, an entry", 1.5, list),
    row("rename", 2.2, rename),
];

fn per(n: u32, f: impl FnOnce()) -> Duration {
    let started = Instant::now();
    f();
    started.elapsed() / n
}

fn stat(dir: &Path, _: u64) -> Duration {
    let path = dir.join("f");
    per(20_000, || (0..20_000).for_each(|_| _ = fs::metadata(&path).expect("stat")))
}

fn read_4k(dir: &Path, _: u64) -> Duration {
    let (file, mut buf) = (File::open(dir.join("cached")).expect("open"), [0; 4096]);
    let mut pass = || (0..4096).for_each(|i| file.read_exact_at(&mut buf, i * 4096 % (4 << 20)).expect("read"));
    pass();
    per(4096 * 4, || (0..4).for_each(|_| pass()))
}

fn read_large(path: &Path, mb: u64) -> Duration {
    let (mut file, mut buf) = (File::open(path).expect("open"), vec![0; CHUNK]);
    per(mb as u32, || (0..mb).for_each(|_| file.read_exact(&mut buf).expect("read")))
}

fn write_new(path: &Path, mb: u64) {
    write_chunks(File::create(path).expect("create"), mb);
}

fn write_chunks(mut file: File, mb: u64) {
    let buf = vec![0x5a; CHUNK];
    (0..mb).for_each(|_| file.write_all(&buf).expect("write"));
}

fn write_in_place(dir: &Path, mb: u64) -> Duration {
    let file = OpenOptions::new().write(true).open(dir.join("large.db")).expect("open");
    per(mb as u32, || write_chunks(file, mb))
}

fn write_staged(dir: &Path, mb: u64) -> Duration {
    per(mb as u32, || write_new(&dir.join("staged"), mb))
}

fn append(dir: &Path, _: u64) -> Duration {
    let mut file = OpenOptions::new().append(true).create(true).open(dir.join("log.db")).expect("open");
    per(20_000, || (0..20_000).for_each(|_| file.write_all(&[b'x'; 128]).expect("append")))
}

/// Through Python's mmap, which needs no unsafe code here: the sum of one byte of each page, timed inside.
fn map_read(dir: &Path, mb: u64) -> Duration {
    let script = "import mmap,sys,time\nf=open(sys.argv[1],'rb'); t=time.perf_counter()\n\
        for _ in range(4):\n m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ); sum(m[::4096]); m.close()\n\
        print((time.perf_counter()-t)/4)";
    let text = common::run_text(Command::new("python3").args(["-c", script]).arg(dir.join("large.db")));
    Duration::from_secs_f64(text.trim().parse().expect("seconds")) / mb as u32
}

fn create(dir: &Path, _: u64) -> Duration {
    let (data, all) = ([b'x'; 4096], dir.join("many"));
    fs::create_dir(&all).expect("mkdir");
    let took = per(1000, || (0..1000).for_each(|i| fs::write(all.join(i.to_string()), data).expect("save")));
    fs::remove_dir_all(&all).expect("remove");
    took
}

fn open_close(path: &Path) -> Duration {
    per(3000, || (0..3000).for_each(|_| drop(File::open(path).expect("open"))))
}

fn list(dir: &Path, _: u64) -> Duration {
    let all = dir.join("entries");
    per(5 * ENTRIES as u32, || {
        for _ in 0..5 {
            let mut seen = 0;
            for entry in fs::read_dir(&all).expect("list") {
                entry.and_then(|e| e.metadata()).expect("stat");
                seen += 1;
            }
            assert_eq!(seen, ENTRIES);
        }
    })
}

fn rename(dir: &Path, _: u64) -> Duration {
    let (a, b) = (dir.join("r1"), dir.join("r2"));
    per(2000, || {
        (0..1000).for_each(|_| [(&a, &b), (&b, &a)].iter().for_each(|(x, y)| fs::rename(x, y).expect("rename")));
    })
}

fn prepare(dir: &Path) {
    ["f", "f.db", "r1"].iter().for_each(|n| fs::write(dir.join(n), "x").expect("write"));
    fs::write(dir.join("cached"), vec![1; 4 << 20]).expect("write");
    fs::create_dir(dir.join("entries")).expect("mkdir");
    (0..ENTRIES).for_each(|i| fs::write(dir.join("entries").join(i.to_string()), "x").expect("write"));
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if !can_mount("bench") {
        return std::process::ExitCode::FAILURE;
    }
    let what = if args.memory {
        "memory".to_owned()
    } else {
        format!("large files of {} MiB, {} rounds", args.large_mb, args.rounds)
    };
    println!("\n### {}, {what}\n", args.fs);
    let mounts = args.mounts.clone().unwrap_or_else(|| {
        vec![("fsys-mount".to_owned(), format!("durability=relaxed,{}", args.options).trim_end_matches(',').to_owned())]
    });
    let mounts: Mounts = mounts.into_iter().map(|(name, options)| (name, format!("{options},{IN_PLACE}"))).collect();
    // At a time there is one large file everywhere, and a version of it that is being written; and room for small ones.
    let places = mounts.len() + 1 + if args.peers { PEERS.len() } else { 0 };
    let fs = LoopFs::new(Kind::named(&args.fs), 2 * places as u64 * args.large_mb + (16 << 10));
    let mut targets = start_named(&fs, &mounts);
    if args.peers {
        targets.extend(start_all(&fs).into_iter().map(Target::Peer));
    }
    if args.memory {
        memory::table(&targets, args.files);
        return std::process::ExitCode::SUCCESS;
    }
    let bench = Bench { raw: fs.subdir("raw"), fs, targets, large_mb: args.large_mb, rounds: args.rounds };
    bench.run_all(&args)
}

/// What is measured, and where.
struct Bench {
    raw: PathBuf,
    targets: Vec<Target>,
    large_mb: u64,
    rounds: usize,
    // Last: what is mounted over it ends first.
    fs: LoopFs,
}

/// One round of a row, microseconds per operation.
struct Round {
    raw: [f64; 2],
    /// In the order of the targets; `None`: the call failed there.
    targets: Vec<Option<f64>>,
}

impl Round {
    fn ratio(&self, target: usize) -> Option<f64> {
        Some(self.targets[target]? * 2.0 / (self.raw[0] + self.raw[1]))
    }
}

/// A target against raw; `None` when a call failed there.
fn ratio(rounds: &[Round], target: usize) -> Option<(f64, f64, f64)> {
    rounds.iter().map(|r| r.ratio(target)).collect::<Option<Vec<f64>>>().map(middle)
}

impl Bench {
    fn run_all(&self, args: &Args) -> std::process::ExitCode {
        let places = || std::iter::once(self.raw.as_path()).chain(self.targets.iter().map(Target::path));
        places().for_each(prepare);
        let names: Vec<String> = self.targets.iter().map(|t| t.name().to_owned()).collect();
        println!("| row | raw us | {} | raw again | bar | | fastest of all mounts? |", names.join(" | "));
        println!("|---|---|{}---|---|---|---|", "---|".repeat(names.len()));
        let mut chart = Chart {
            title: "time of a call, raw file system = 1; median, smallest and largest".into(),
            series: names,
            rows: Vec::new(),
        };
        let mut missed = 0;
        for row in ROWS.iter().filter(|r| r.name.contains(&args.only)) {
            let make = |dir: &Path| row.large.iter().for_each(|n| write_new(&dir.join(n), self.large_mb));
            places().for_each(make);
            // The first is thrown away: what is to be cached is from then on.
            let round = |n| {
                let round = self.round(row, n);
                // What was removed gives its memory back.
                self.settle();
                run(Command::new("fstrim").arg(self.fs.path()));
                round
            };
            let rounds: Vec<Round> = (0..=self.rounds).map(round).skip(1).collect();
            if let Some(name) = row.large {
                places().for_each(|dir| fs::remove_file(dir.join(name)).expect("remove"));
            }
            missed += self.print(row, &rounds);
            let bar = |t: usize| ratio(&rounds, t).map(Bar::from);
            chart.rows.push((row.name.to_owned(), (0..self.targets.len()).map(bar).collect()));
        }
        if let Some(file) = &args.svg {
            fs::write(file, chart.svg()).expect("write the chart");
        }
        std::process::ExitCode::from(u8::from(args.check && missed > 0))
    }

    /// Nothing of one row is left to do while the next is measured.
    fn settle(&self) {
        self.targets.iter().for_each(Target::settle);
        run(Command::new("sync").arg("-f").arg(self.fs.path()));
    }

    fn round(&self, row: &Row, n: usize) -> Round {
        let timed = |dir: &Path| {
            self.settle();
            (row.run)(dir, self.large_mb).as_secs_f64() * 1e6
        };
        let before = timed(&self.raw);
        let mut targets = vec![None; self.targets.len()];
        for step in 0..targets.len() {
            let at = (step + n) % targets.len();
            let target = &self.targets[at];
            targets[at] = if target.is_ours() {
                Some(timed(target.path()))
            } else {
                // What fails on a file system of others is its figure, and no end of the bench.
                catch_unwind(AssertUnwindSafe(|| timed(target.path()))).ok()
            };
        }
        Round { raw: [before, timed(&self.raw)], targets }
    }

    /// Whether the first mount of this project is faster than every peer: its time to that of the fastest, in the same
    /// rounds. `even` where some rounds say one thing and some the other.
    fn fastest(&self, rounds: &[Round]) -> String {
        let against = |t: usize| {
            let times = |r: &Round| Some(r.targets[0]? / r.targets[t]?);
            let all = rounds.iter().map(times).collect::<Option<Vec<f64>>>().map(middle)?;
            Some((all, self.targets[t].name()))
        };
        let peers = (0..self.targets.len()).filter(|t| !self.targets[*t].is_ours()).filter_map(against);
        let Some(((ratio, low, high), name)) = peers.max_by(|a, b| a.0.0.total_cmp(&b.0.0)) else {
            return String::new();
        };
        let verdict = match () {
            () if high < 1.0 => "yes",
            () if low > 1.0 => "no",
            () => "even",
        };
        format!("{verdict}: {ratio:.2} ({low:.2}-{high:.2}) of {name}")
    }

    /// Prints a row; gives 1 when it misses its bar.
    fn print(&self, row: &Row, rounds: &[Round]) -> u32 {
        let shown = |t: usize| match ratio(rounds, t) {
            Some((ratio, low, high)) => format!("{ratio:.2} ({low:.2}-{high:.2})"),
            None => "FAILED".to_owned(),
        };
        let cells: Vec<String> = (0..self.targets.len()).map(shown).collect();
        let ours = ratio(rounds, 0).map_or(f64::INFINITY, |r| r.0);
        let (bar, verdict) = match row.bar {
            bar if bar.is_infinite() => (String::new(), ""),
            bar if ours <= bar => (bar.to_string(), "met"),
            bar => (bar.to_string(), "missed"),
        };
        println!(
            "| {} | {:.2} | {} | {:.2} | {bar} | {verdict} | {} |",
            row.name,
            middle(rounds.iter().map(|r| r.raw[0]).collect()).0,
            cells.join(" | "),
            middle(rounds.iter().map(|r| r.raw[1] / r.raw[0]).collect()).0,
            self.fastest(rounds),
        );
        u32::from(verdict == "missed")
    }
}

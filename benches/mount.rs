//! Durable saves end to end: the proper sequence on the raw filesystem against saves through the mount and, with
//! `--peers`, the proper sequence through file systems of others and the durable write of the crate `fsys`.
//!
//! Every round runs all variants one after the other on the same filesystem, in an order that rotates, and
//! gives one ratio for each; reported are medians with the smallest and the largest. The raw variant runs twice
//! a round: the ratio of raw to raw shows the noise. `scripts/bench` is the way to run it.
//!
//! Two checks see that a save is durable, and what fails one is marked and compared with nothing: the device is flushed
//! often enough for the saves that were told to be done, and for each fsync of a directory after a rename in it.

#[path = "../tests/common/mod.rs"]
mod common;
mod peers;

use std::path::{Path, PathBuf};

use clap::Parser;
use common::tools::run_tool;
use common::{Kind, LoopFs, can_mount};
use fsys_mount::cli::chart::{Bar, Chart};
use peers::control::Volatile;
use peers::target::{Target, middle, named_mounts, start_named};
use peers::{Mounted, start_all, syncs_directories};

#[derive(Parser)]
#[allow(clippy::struct_excessive_bools)] // flags that are typed
struct Args {
    /// Filesystems
    #[arg(long, value_delimiter = ',', default_value = "ext4,xfs,btrfs")]
    fs: Vec<String>,
    /// Numbers of concurrent programs
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    writers: Vec<u32>,
    /// Rounds per cell
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds per variant and round
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Bytes per save
    #[arg(long, default_value_t = 4096)]
    size: usize,
    /// In how many writes: one, as stdio does it, or more
    #[arg(long, default_value_t = 1)]
    pieces: usize,
    /// `-o` list for the mount
    #[arg(long, default_value = "")]
    options: String,
    /// Transports, each with a mount of its own, compared in the same rounds
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    transport: Vec<String>,
    /// Several mounts instead, `NAME:OPTIONS;NAME:OPTIONS`, compared in the same rounds
    #[arg(long, value_parser = named_mounts, conflicts_with_all = ["options", "transport"])]
    mounts: Option<Mounts>,
    /// Devices: `plain`, or the time that a flush takes, in microseconds
    #[arg(long, value_delimiter = ',', default_value = "plain,1000")]
    device: Vec<String>,
    /// The file systems of others and the crate `fsys`, too
    #[arg(long)]
    peers: bool,
    /// Programs that each save in a directory of their own, too
    #[arg(long)]
    separate: bool,
    /// Two ways to save that are not durable, too; exit 1 when one of them is not found out
    #[arg(long)]
    control: bool,
    /// Writes the ratios to raw as a bar chart (SVG) to this file
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Writes every figure of every round to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Exit 1 when a bar is missed
    #[arg(long)]
    check: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

type Mounts = Vec<(String, String)>;

/// Whose way of saving it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    Raw,
    /// The mount of this number.
    Mount(usize),
    Peer,
    Crate,
    /// Not durable, and must be found out.
    Control,
}

/// One way of saving, and where.
struct Variant {
    name: String,
    style: &'static str,
    dir: PathBuf,
    of: Of,
    /// Each program in a directory of its own.
    separate: bool,
    /// What it is compared with.
    base: usize,
    /// Its fsync of a directory is one.
    syncs_directories: bool,
}

/// What one variant did in one round.
#[derive(Clone, Copy, serde::Serialize)]
struct Sample {
    rate: f64,
    flushes: f64,
    p50_us: f64,
    p99_us: f64,
}

/// All variants with one number of writers on one file system.
struct Cell {
    kind: Kind,
    device: String,
    writers: u32,
    variants: Vec<Variant>,
    rounds: Vec<Vec<Sample>>,
}

/// What takes part on one file system.
struct Field {
    mounts: Vec<Target>,
    peers: Vec<Mounted>,
    /// For `--control`.
    volatile: Option<Volatile>,
    // Last: what is mounted over it ends first.
    fs: LoopFs,
}

/// The bars of the project for ext4: (writers, at least this ratio, at most this many flushes per save).
const BARS: [(u32, f64, f64); 3] = [(1, 1.0, f64::INFINITY), (8, 1.5, 0.25), (64, 1.5, 0.1)];

const NAIVE: &str = "open, write, close";
const DANCE: &str = "temp, fsync, rename, fsync dir";

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if !can_mount("bench") {
        return std::process::ExitCode::FAILURE;
    }
    let mut cells = Vec::new();
    for name in &args.fs {
        for device in &args.device {
            cells.extend(bench(Kind::named(name), device, &args));
        }
    }
    if let Some(file) = &args.svg {
        std::fs::write(file, chart(&cells, &args).svg()).expect("write the chart");
    }
    if let Some(file) = &args.json {
        let all: Vec<_> = cells.iter().flat_map(Cell::json).collect();
        std::fs::write(file, format!("{:#}\n", serde_json::Value::from(all))).expect("write the figures");
    }
    let missed = cells.iter().any(|c| (0..c.variants.len()).any(|i| c.misses(i)));
    let unseen: Vec<_> = cells.iter().flat_map(Cell::controls_unseen).collect();
    unseen.iter().for_each(|u| eprintln!("NOT FOUND OUT: {u}"));
    std::process::ExitCode::from(u8::from(args.check && missed || !unseen.is_empty()))
}

fn bench(kind: Kind, device: &str, args: &Args) -> Vec<Cell> {
    let fs = match device {
        "plain" => LoopFs::new(kind, 4096),
        us => LoopFs::slow(kind, 4096, us.parse().expect("microseconds of --device")),
    };
    let device = if device == "plain" { "plain loop device".to_owned() } else { format!("flushes take {device} us") };
    let save = format!("{} bytes in {} writes", args.size, args.pieces);
    println!("\n### {}, {device}, {save}, {} rounds of {} s\n", kind.name(), args.rounds, args.seconds);
    let mounts = args.mounts.clone().unwrap_or_else(|| {
        args.transport
            .iter()
            .map(|t| (t.clone(), format!("{},transport={t}", args.options).trim_start_matches(',').to_owned()))
            .collect()
    });
    let mounts = start_named(&fs, &mounts);
    let volatile = args.control.then(|| Volatile::start(&fs));
    let peers = if args.peers { start_all(&fs) } else { Vec::new() };
    let raw = fs.subdir("raw");
    let field = Field { mounts, peers, volatile, fs };
    println!("| writers | variant | saves/s | ratio to raw (min-max) | flushes per save | p50 us | p99 us | bar |");
    println!("|---|---|---|---|---|---|---|---|");
    let mut cells = Vec::new();
    for &writers in &args.writers {
        let variants = variants(&field, &raw, args, writers);
        let rounds = rounds(&field.fs, &variants, writers, args);
        let cell = Cell { kind, device: device.clone(), writers, variants, rounds };
        cell.print();
        cell.print_mounts(&field.mounts);
        cells.push(cell);
    }
    println!();
    if args.peers {
        cells.iter().for_each(|c| c.print_peers(&field.mounts));
    }
    cells
}

/// Raw, raw again for the noise, then per mount the naive save and the proper sequence, then the others.
fn variants(field: &Field, raw: &Path, args: &Args, writers: u32) -> Vec<Variant> {
    let mut all: Vec<Variant> = Vec::new();
    let mut add = |root: &Path, of: Of, who: &str, style: &'static str, separate: bool, base: Option<usize>| {
        let what = match style {
            "naive" => NAIVE,
            "dance" => DANCE,
            "fsys-auto" => "Handle::write, Method::Auto",
            _ => "Handle::write, Method::Sync",
        };
        let name = format!("{who}: {what}{}", if separate { ", separate directories" } else { "" });
        let dir = root.join(format!("{writers}-{}", all.len()));
        std::fs::create_dir(&dir).expect("directory for a variant");
        let syncs_directories = syncs_directories(&field.fs, &dir).unwrap_or_else(|e| panic!("{name}: {e}"));
        let base = base.unwrap_or(all.len());
        all.push(Variant { name, style, dir, of, separate, base, syncs_directories });
        base
    };
    let first = Some(add(raw, Of::Raw, "raw", "dance", false, None));
    add(raw, Of::Raw, "raw again (noise)", "dance", false, first);
    for separate in [false, true] {
        if separate && !args.separate {
            continue;
        }
        let base = if separate { Some(add(raw, Of::Raw, "raw", "dance", true, None)) } else { first };
        for (n, mount) in field.mounts.iter().enumerate() {
            add(mount.path(), Of::Mount(n), mount.name(), "naive", separate, base);
            add(mount.path(), Of::Mount(n), mount.name(), "dance", separate, base);
        }
    }
    for peer in &field.peers {
        add(peer.path(), Of::Peer, peer.name, "dance", false, first);
    }
    if args.peers {
        add(raw, Of::Crate, "crate fsys", "fsys-auto", false, first);
        add(raw, Of::Crate, "crate fsys", "fsys-sync", false, first);
    }
    if let Some(volatile) = &field.volatile {
        add(raw, Of::Control, "control, raw", "naive", false, first);
        add(volatile.path(), Of::Control, "control, overlay volatile", "dance", false, first);
    }
    assert!(all[0].syncs_directories, "the raw file system must pass the check of fsync of directories");
    all
}

fn rounds(fs: &LoopFs, variants: &[Variant], writers: u32, args: &Args) -> Vec<Vec<Sample>> {
    // One short run of each that is thrown away: files exist and code is warm from the first round on.
    for variant in variants {
        measure(fs, variant, writers, args, 0.2);
    }
    let mut rounds: Vec<Vec<Sample>> = Vec::new();
    for round in 0..args.rounds {
        let mut samples = vec![None; variants.len()];
        for step in 0..variants.len() {
            let i = (step + round) % variants.len();
            samples[i] = Some(measure(fs, &variants[i], writers, args, args.seconds));
        }
        rounds.push(samples.into_iter().map(|s| s.expect("every variant ran")).collect());
    }
    rounds
}

fn measure(fs: &LoopFs, variant: &Variant, writers: u32, args: &Args, seconds: f64) -> Sample {
    let before = fs.flushes();
    let (count, time, size) = (writers.to_string(), seconds.to_string(), args.size.to_string());
    let pieces = args.pieces.to_string();
    let mut options = vec!["--writers", &count, "--seconds", &time, "--size", &size, "--style", variant.style];
    options.extend(["--pieces", &pieces]);
    options.extend(variant.separate.then_some("--separate"));
    let ended = run_tool("saver", &variant.dir, writers * 4, &options);
    assert_eq!(ended.code, 0, "{}: {}\n{}", variant.name, ended.summary, ended.complaint);
    let flushes = common::per(fs.flushes() - before, ended.count("saves"));
    Sample {
        rate: ended.figure("saves_per_s"),
        flushes,
        p50_us: ended.figure("p50_us"),
        p99_us: ended.figure("p99_us"),
    }
}

impl Cell {
    fn middle(&self, value: impl Fn(&Vec<Sample>) -> f64) -> (f64, f64, f64) {
        middle(self.rounds.iter().map(value).collect())
    }

    /// One variant against another, in the same rounds.
    fn ratio(&self, index: usize, to: usize) -> (f64, f64, f64) {
        self.middle(|r| r[index].rate / r[to].rate)
    }

    /// No more saves than there are writers can wait for one flush: with fewer flushes they were not durable.
    fn is_durable(&self, index: usize) -> bool {
        let flushes = self.middle(|r| r[index].flushes).0;
        flushes * f64::from(self.writers) > 0.9 && self.variants[index].syncs_directories
    }

    /// Whether it meets the bar of the project, if there is one.
    fn verdict(&self, index: usize) -> Option<bool> {
        let variant = &self.variants[index];
        let ours = matches!(variant.of, Of::Mount(_)) && variant.style == "naive" && !variant.separate;
        let bar = BARS.iter().find(|(w, ..)| *w == self.writers && self.kind == Kind::Ext4 && ours);
        bar.map(|(_, at_least, at_most)| {
            self.ratio(index, variant.base).0 >= *at_least && self.middle(|r| r[index].flushes).0 <= *at_most
        })
    }

    fn misses(&self, index: usize) -> bool {
        let required = matches!(self.variants[index].of, Of::Raw | Of::Mount(_));
        self.verdict(index) == Some(false) || required && !self.is_durable(index)
    }

    /// The controls that pass for durable.
    fn controls_unseen(&self) -> Vec<String> {
        let seen = |i: usize| self.variants[i].of != Of::Control || !self.is_durable(i);
        (0..self.variants.len()).filter(|i| !seen(*i)).map(|i| self.variants[i].name.clone()).collect()
    }

    fn print(&self) {
        for (i, variant) in self.variants.iter().enumerate() {
            let verdict = match self.verdict(i) {
                _ if !variant.syncs_directories => "NOT DURABLE: fsync of a directory does nothing",
                _ if !self.is_durable(i) => "NOT DURABLE: too few flushes",
                None => "",
                Some(true) => "met",
                Some(false) => "missed",
            };
            println!(
                "| {} | {} | {:.0} | {} | {:.3} | {:.0} | {:.0} | {verdict} |",
                self.writers,
                variant.name,
                self.middle(|r| r[i].rate).0,
                if i == variant.base { "1".to_owned() } else { shown(self.ratio(i, variant.base)) },
                self.middle(|r| r[i].flushes).0,
                self.middle(|r| r[i].p50_us).0,
                self.middle(|r| r[i].p99_us).0,
            );
        }
    }

    /// The number of a mount's variant.
    fn of_mount(&self, n: usize, style: &str) -> usize {
        let is = |v: &Variant| v.of == Of::Mount(n) && v.style == style && !v.separate;
        self.variants.iter().position(is).expect("every mount runs both")
    }

    /// The mounts against the first of them.
    fn print_mounts(&self, mounts: &[Target]) {
        for (n, mount) in mounts.iter().enumerate().skip(1) {
            for (style, words) in [("naive", NAIVE), ("dance", DANCE)] {
                let ratio = shown(self.ratio(self.of_mount(n, style), self.of_mount(0, style)));
                let (name, first) = (mount.name(), mounts[0].name());
                println!("| {} | {name} to {first}: {words} | | {ratio} | | | | |", self.writers);
            }
        }
    }

    /// Each mount against the peer that saves most in a second, and against the crate, if their saves are durable.
    fn print_peers(&self, mounts: &[Target]) {
        let rate = |i: usize| self.middle(|r| r[i].rate).0;
        for (of, what) in [(Of::Peer, "best mount of others"), (Of::Crate, "crate fsys")] {
            let durable = (0..self.variants.len()).filter(|i| self.variants[*i].of == of && self.is_durable(*i));
            let Some(best) = durable.max_by(|a, b| rate(*a).total_cmp(&rate(*b))) else {
                println!("- {} writer(s), {what}: none saves durably", self.writers);
                continue;
            };
            let to = |n: usize, style: &str| shown(self.ratio(self.of_mount(n, style), best));
            println!("- {} writer(s), {what}: {}, {:.0} saves/s", self.writers, self.variants[best].name, rate(best));
            for (n, mount) in mounts.iter().enumerate() {
                println!("  - {} to it: {NAIVE} {}; {DANCE} {}", mount.name(), to(n, "naive"), to(n, "dance"));
            }
        }
    }

    fn json(&self) -> Vec<serde_json::Value> {
        let one = |(i, v): (usize, &Variant)| {
            let rounds: Vec<Sample> = self.rounds.iter().map(|r| r[i]).collect();
            serde_json::json!({
                "filesystem": self.kind.name(), "device": self.device, "writers": self.writers, "variant": v.name,
                "compared_with": self.variants[v.base].name, "durable": self.is_durable(i), "rounds": rounds,
            })
        };
        self.variants.iter().enumerate().map(one).collect()
    }

    /// Its bars: the durable variants, by name.
    fn bars(&self) -> Vec<(&str, Bar)> {
        let durable = (0..self.variants.len()).filter(|i| self.is_durable(*i) && self.variants[*i].base != *i);
        durable.map(|i| (self.variants[i].name.as_str(), Bar::from(self.ratio(i, self.variants[i].base)))).collect()
    }
}

fn shown((ratio, low, high): (f64, f64, f64)) -> String {
    format!("{ratio:.2} ({low:.2}-{high:.2})")
}

fn chart(cells: &[Cell], args: &Args) -> Chart {
    let mut series: Vec<String> = Vec::new();
    for (name, _) in cells.iter().flat_map(Cell::bars) {
        if !series.iter().any(|s| s == name) {
            series.push(name.to_owned());
        }
    }
    let row = |cell: &Cell| {
        let bars = cell.bars();
        let of = |name: &String| bars.iter().find(|(n, _)| n == name).map(|(_, bar)| *bar);
        let label = format!("{}, {}, {} writer(s)", cell.kind.name(), cell.device, cell.writers);
        (label, series.iter().map(of).collect())
    };
    let title =
        format!("durable saves of {} bytes per second, raw file system = 1; median, smallest and largest", args.size);
    Chart { title, rows: cells.iter().map(row).collect(), series }
}

//! What programs feel while another one works the device: the time of a look-up, of an open with a read from memory and
//! of a durable save, alone and beside a cold read, a large save and a copy; on the raw file system, through the mount
//! and, with `--peers`, through file systems of others.
//!
//! The device reads or writes so many MiB a second, one request after the other. Every round runs all places in an order that
//! rotates; reported are medians over the rounds of the median, the 99th percentile and the longest. `scripts/bench --beside`
//! is the way to run it.

#[path = "../tests/common/mod.rs"]
mod common;
mod peers;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use common::{Kind, LoopFs, can_mount};
use peers::start_all;
use peers::target::{Target, middle, named_mounts, start_named};

#[derive(Parser)]
struct Args {
    /// Filesystem
    #[arg(long, default_value = "ext4")]
    fs: String,
    /// Rounds
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// MiB that the device reads or writes in a second
    #[arg(long, default_value_t = 100)]
    rate: u64,
    /// How long a flush takes, in microseconds
    #[arg(long, default_value_t = 1000)]
    flush_us: u64,
    /// Size of what is read, written and copied, in MiB
    #[arg(long, default_value_t = 200)]
    large_mb: u64,
    /// Mounts: `NAME:OPTIONS;NAME:OPTIONS`
    #[arg(long, value_parser = named_mounts, default_value = "fsys-mount:")]
    mounts: Mounts,
    /// The file systems of others, too
    #[arg(long)]
    peers: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

type Mounts = Vec<(String, String)>;

/// Between two calls of a program.
const PAUSE: Duration = Duration::from_millis(2);

/// What works the device: its name, and what it does in a directory.
type Work = (&'static str, fn(&Path, u64));

const WORKS: [Work; 4] = [
    ("nothing", |_, _| std::thread::sleep(Duration::from_secs(2))),
    ("a cold read", |dir, _| {
        let (mut file, mut buf) = (File::open(dir.join("large")).expect("open"), vec![0; 1 << 20]);
        while file.read(&mut buf).expect("read") > 0 {}
    }),
    ("a large save", |dir, mb| {
        let mut file = File::create(dir.join("new")).expect("create");
        let buf = vec![0x5a; 1 << 20];
        (0..mb).for_each(|_| file.write_all(&buf).expect("write"));
        file.sync_all().expect("fsync");
    }),
    ("a copy", |dir, _| {
        // copy_file_range(2), as cp does.
        fs::copy(dir.join("large"), dir.join("copy")).expect("copy");
        File::open(dir.join("copy")).and_then(|f| f.sync_all()).expect("fsync");
    }),
];

/// What programs do meanwhile: its name, and one call; `mount` where a save is durable by itself.
type Call = (&'static str, fn(dir: &Path, n: u64, mount: bool));

const CALLS: [Call; 3] = [
    ("look-up", |dir, n, _| assert!(fs::symlink_metadata(dir.join(format!("absent-{n}"))).is_err())),
    ("open and read", |dir, _, _| drop(fs::read(dir.join("small")).expect("read"))),
    ("durable save", |dir, n, mount| {
        let (to, temp) = (dir.join(format!("s{}", n % 16)), dir.join("s.tmp"));
        if mount {
            return fs::write(to, [b'x'; 4096]).expect("save");
        }
        let mut file = File::create(&temp).expect("create");
        file.write_all(&[b'x'; 4096]).and_then(|()| file.sync_all()).expect("write");
        fs::rename(&temp, &to).expect("rename");
        File::open(dir).and_then(|d| d.sync_all()).expect("fsync of the directory");
    }),
];

/// The times of one call beside one work in one round, milliseconds: median, 99th percentile and longest.
type Times = (f64, f64, f64);

fn percentiles(mut all: Vec<f64>) -> Times {
    all.sort_by(f64::total_cmp);
    let at = |percent: usize| all[(all.len() - 1) * percent / 100];
    (at(50), at(99), at(100))
}

/// Does one call after the other until the work is done.
fn feel(call: Call, dir: &Path, mount: bool, over: &AtomicBool) -> Times {
    let mut all = Vec::new();
    for n in 0.. {
        let began = Instant::now();
        (call.1)(dir, n, mount);
        all.push(began.elapsed().as_secs_f64() * 1e3);
        if over.load(Ordering::Acquire) {
            break;
        }
        std::thread::sleep(PAUSE);
    }
    percentiles(all)
}

/// Ends what goes on until it is set, in a panic too.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A place: its name, its directory, and whether saves are durable by themselves there.
struct Spot {
    name: String,
    dir: PathBuf,
    mount: bool,
}

impl Spot {
    fn prepare(&self, mb: u64) {
        fs::write(self.dir.join("large"), vec![0xa5; (mb as usize) << 20]).expect("write");
        for (name, _) in CALLS {
            fs::create_dir(self.dir.join(name)).expect("mkdir");
            fs::write(self.dir.join(name).join("small"), [1; 4096]).expect("write");
        }
    }

    /// Each call, beside `work`.
    fn round(&self, work: Work, mb: u64, disk: &LoopFs) -> Vec<Times> {
        for old in ["new", "copy"] {
            drop(fs::remove_file(self.dir.join(old)));
        }
        rustix::fs::syncfs(File::open(disk.path()).expect("open")).expect("syncfs");
        fs::write("/proc/sys/vm/drop_caches", "3").expect("drop caches");
        for (name, _) in CALLS {
            fs::read(self.dir.join(name).join("small")).expect("read");
        }
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let felt: Vec<_> = CALLS
                .map(|call| {
                    let over = &over;
                    scope.spawn(move || feel(call, &self.dir.join(call.0), self.mount, over))
                })
                .into();
            {
                let _ends = Ends(&over);
                (work.1)(&self.dir, mb);
            }
            felt.into_iter().map(|f| f.join().expect("a program")).collect()
        })
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if !can_mount("bench") {
        return ExitCode::FAILURE;
    }
    println!(
        "\n### {}, a device of {} MiB/s with a flush of {} us, {} MiB, {} rounds\n",
        args.fs, args.rate, args.flush_us, args.large_mb, args.rounds
    );
    let places = 1 + args.mounts.len() as u64 + if args.peers { peers::PEERS.len() as u64 } else { 0 };
    let disk = LoopFs::rated(Kind::named(&args.fs), 1024 + places * 4 * args.large_mb, args.flush_us, args.rate);
    let mut targets = start_named(&disk, &args.mounts);
    if args.peers {
        targets.extend(start_all(&disk).into_iter().map(Target::Peer));
    }
    let spot = |t: &Target| Spot { name: t.name().to_owned(), dir: t.path().to_owned(), mount: t.is_ours() };
    let mut spots = vec![Spot { name: "raw".into(), dir: disk.subdir("raw"), mount: false }];
    spots.extend(targets.iter().map(spot));
    spots.iter().for_each(|s| s.prepare(args.large_mb));
    println!("Milliseconds: median / 99 of 100 / longest.\n");
    println!("| beside | | {} |", CALLS.map(|c| c.0).join(" | "));
    println!("|---|---|---|---|---|");
    for work in WORKS {
        let mut all: Vec<Vec<Vec<Times>>> = spots.iter().map(|_| Vec::new()).collect();
        for n in 0..args.rounds {
            for step in 0..spots.len() {
                let at = (step + n) % spots.len();
                all[at].push(spots[at].round(work, args.large_mb, &disk));
            }
        }
        for (spot, rounds) in spots.iter().zip(&all) {
            let cell = |call: usize| {
                let of = |pick: fn(&Times) -> f64| middle(rounds.iter().map(|r| pick(&r[call])).collect()).0;
                format!("{:.2} / {:.2} / {:.2}", of(|t| t.0), of(|t| t.1), of(|t| t.2))
            };
            println!("| {} | {} | {} | {} | {} |", work.0, spot.name, cell(0), cell(1), cell(2));
        }
    }
    ExitCode::SUCCESS
}

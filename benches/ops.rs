//! Single calls through the mount against the raw file system: what a program pays that is not waiting for a device.
//!
//! Every round runs each row on the raw file system, on the mount, and on the raw file system again, one right after
//! the other, and gives one ratio; reported are medians with the smallest and the largest, and the ratio of raw to raw,
//! which is the noise. `scripts/bench --ops` is the way to run it.

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Parser;
use common::{Kind, LoopFs, Mount, can_mount, run};

#[derive(Parser)]
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
    /// `-o` list for the mount, after `durability=relaxed` and the rule that files `*.db` are in place
    #[arg(long, default_value = "")]
    options: String,
    /// Exit 1 when a bar is missed
    #[arg(long)]
    check: bool,
    /// Passed by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

const CHUNK: usize = 1 << 20;
const ENTRIES: usize = 1000;

/// A row: its name, the largest ratio that the project allows, and what it does in a directory (prepared by
/// [`prepare`]); it gives the time per operation.
struct Row {
    name: &'static str,
    bar: f64,
    run: fn(&Path, u64) -> Duration,
}

const ROWS: [Row; 13] = [
    Row { name: "stat, cached", bar: 1.3, run: stat },
    Row { name: "read 4 KiB, cached", bar: 1.1, run: read_4k },
    Row { name: "read 1 GiB in sequence, in place", bar: 1.1, run: |d, mb| read_large(&d.join("large.db"), mb) },
    Row {
        name: "read 1 GiB in sequence, other files",
        bar: f64::INFINITY,
        run: |d, mb| read_large(&d.join("large"), mb),
    },
    Row { name: "write 1 GiB in place", bar: 1.1, run: write_in_place },
    Row { name: "append 128 bytes, in place", bar: 1.3, run: append },
    Row { name: "mmap read, in place", bar: 1.05, run: map_read },
    Row { name: "write 1 GiB, staged", bar: 1.5, run: write_staged },
    Row { name: "create, write 4 KiB, close", bar: 3.0, run: create },
    Row { name: "open, close", bar: 8.0, run: |d, _| open_close(&d.join("f")) },
    Row { name: "open, close, in place", bar: 8.0, run: |d, _| open_close(&d.join("f.db")) },
    Row { name: "readdir and stat, an entry", bar: 1.5, run: list },
    Row { name: "rename", bar: 2.2, run: rename },
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

fn write_chunks(mut file: File, mb: u64) {
    let buf = vec![0x5a; CHUNK];
    (0..mb).for_each(|_| file.write_all(&buf).expect("write"));
}

fn write_in_place(dir: &Path, mb: u64) -> Duration {
    let file = OpenOptions::new().write(true).open(dir.join("large.db")).expect("open");
    per(mb as u32, || write_chunks(file, mb))
}

fn write_staged(dir: &Path, mb: u64) -> Duration {
    per(mb as u32, || write_chunks(File::create(dir.join("staged")).expect("create"), mb))
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

fn prepare(dir: &Path, mb: u64) {
    ["f", "f.db", "r1"].iter().for_each(|n| fs::write(dir.join(n), "x").expect("write"));
    fs::write(dir.join("cached"), vec![1; 4 << 20]).expect("write");
    ["large", "large.db"].iter().for_each(|n| write_chunks(File::create(dir.join(n)).expect("create"), mb));
    fs::create_dir(dir.join("entries")).expect("mkdir");
    (0..ENTRIES).for_each(|i| fs::write(dir.join("entries").join(i.to_string()), "x").expect("write"));
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if !can_mount("bench") {
        return std::process::ExitCode::FAILURE;
    }
    let fs = LoopFs::new(Kind::named(&args.fs), 8 * args.large_mb + 2048);
    let raw = fs.subdir("raw");
    let options = format!("durability=relaxed,rule=*.db:mode=in-place,{}", args.options);
    let mount = Mount::start(&fs.subdir("data"), options.trim_end_matches(','));
    // Nothing of one row is left to do while the next is measured.
    let settle = || {
        run(common::mount::fsys().arg("drain").arg(mount.path()));
        run(Command::new("sync").arg("-f").arg(fs.path()));
    };
    [raw.as_path(), mount.path()].iter().for_each(|d| prepare(d, args.large_mb));
    println!("\n### {}, large files of {} MiB, {} rounds\n", args.fs, args.large_mb, args.rounds);
    println!("| row | raw us | mount us | ratio (min-max) | raw again | bar | |\n|---|---|---|---|---|---|---|");
    let mut missed = 0;
    for row in ROWS.iter().filter(|r| r.name.contains(&args.only)) {
        let mut rounds: Vec<[f64; 3]> = Vec::new();
        for round in 0..=args.rounds {
            let measured = [raw.as_path(), mount.path(), raw.as_path()].map(|dir| {
                settle();
                (row.run)(dir, args.large_mb).as_secs_f64() * 1e6
            });
            // The first is thrown away: what is to be cached is from then on.
            if round > 0 {
                rounds.push(measured);
            }
        }
        missed += print(row, &rounds);
    }
    std::process::ExitCode::from(u8::from(args.check && missed > 0))
}

/// Prints a row; gives 1 when it misses its bar.
fn print(row: &Row, rounds: &[[f64; 3]]) -> u32 {
    let middle = |value: &dyn Fn(&[f64; 3]) -> f64| {
        let mut all: Vec<f64> = rounds.iter().map(value).collect();
        all.sort_by(f64::total_cmp);
        (all[all.len() / 2], all[0], all[all.len() - 1])
    };
    let (ratio, low, high) = middle(&|r| r[1] * 2.0 / (r[0] + r[2]));
    let verdict = if row.bar.is_infinite() {
        ""
    } else if ratio <= row.bar {
        "met"
    } else {
        "missed"
    };
    println!(
        "| {} | {:.2} | {:.2} | {ratio:.2} ({low:.2}-{high:.2}) | {:.2} | {} | {verdict} |",
        row.name,
        middle(&|r| r[0]).0,
        middle(&|r| r[1]).0,
        middle(&|r| r[2] / r[0]).0,
        if row.bar.is_infinite() { String::new() } else { row.bar.to_string() },
    );
    u32::from(verdict == "missed")
}

//! Single calls in directories of 1 to 1,000,000 files.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fsys_mount::cli::chart::figure;

use crate::Args;
use crate::common::{Kind, LoopFs};
use crate::curve::{Bed, Curve, Target, Unit};

/// A curve, what it counts, and the microseconds of one in a directory of so many files.
struct Row {
    name: &'static str,
    of: &'static str,
    run: fn(&Bed, &Here, u64) -> f64,
}

const ROWS: [Row; 7] = [
    Row { name: "create, write, close at `relaxed`", of: "file", run: |b, h, n| create(b, h, n, false) },
    Row {
        name: "create, write, close at `close`; fsync of file and directory on raw",
        of: "file",
        run: |b, h, n| create(b, h, n, true),
    },
    Row { name: "stat, not cached", of: "call", run: stat_new },
    Row { name: "stat, cached", of: "call", run: stat_known },
    Row { name: "readdir and stat", of: "entry", run: list },
    Row { name: "rename", of: "call", run: rename },
    Row { name: "unlink", of: "call", run: unlink },
];

/// One directory of one target.
struct Here {
    dir: PathBuf,
    raw: bool,
}

impl Here {
    fn old(&self, i: u64) -> PathBuf {
        self.dir.join(format!("f{i:07}"))
    }

    /// Files with this ending are `relaxed`.
    fn fresh(&self, i: u64, durable: bool) -> PathBuf {
        self.dir.join(format!("new{i}.{}", if durable { "close" } else { "relaxed" }))
    }

    /// Some of the `n` files that are there, far from each other.
    fn some(&self, n: u64) -> Vec<PathBuf> {
        let count = n.min(1000);
        (0..count).map(|i| self.old(i * (n / count))).collect()
    }
}

/// All curves: one directory after the other, all calls in it.
pub fn run(args: &Args) {
    let wanted: Vec<&Row> = ROWS.iter().filter(|r| args.wants("directory", r.name)).collect();
    if wanted.is_empty() {
        return;
    }
    let mut counts: Vec<u64> = Vec::new();
    let mut n = 1;
    while n <= args.files {
        counts.push(n);
        n *= 10;
    }
    let inodes = (3 * args.files + 20_000).to_string();
    let (kind, size) = (Kind::named(&args.fs), 4096 + args.files / 256);
    let fs = match kind {
        Kind::Ext4 => {
            LoopFs::with_mkfs(kind, size, &["-N", &inodes, "-E", "lazy_itable_init=0,lazy_journal_init=0"], &[])
        }
        _ => LoopFs::new(kind, size),
    };
    let options = format!("rule=*.relaxed:durability=relaxed,{}", args.options);
    let bed = Bed::new(fs, &options, |root| counts.iter().for_each(|n| fill(&root.join(n.to_string()), *n)));
    let mut curves: Vec<Curve> =
        wanted.iter().map(|r| Curve::new(r.name, "files in the directory", Unit::Us(r.of))).collect();
    for n in counts {
        for (row, curve) in wanted.iter().zip(&mut curves) {
            // A cache full of names slows every look-up, whose ever: each row starts with an empty one.
            forget();
            let turn = |t: &Target| (row.run)(&bed, &Here { dir: t.dir.join(n.to_string()), raw: t.raw }, n);
            #[allow(clippy::cast_precision_loss)] // a count
            curve.add(
                figure(n as f64).trim_end_matches(".00").trim_end_matches(".0").to_owned(),
                bed.turns(args.rounds, turn),
            );
        }
    }
    curves.iter().for_each(|c| c.finish(args));
}

fn fill(dir: &Path, n: u64) {
    fs::create_dir(dir).expect("mkdir");
    let here = Here { dir: dir.to_owned(), raw: true };
    (0..n).for_each(|i| drop(File::create(here.old(i)).expect("create")));
}

fn timed(f: impl FnOnce()) -> Duration {
    let started = Instant::now();
    f();
    started.elapsed()
}

fn us(took: Duration, count: u64) -> f64 {
    #[allow(clippy::cast_precision_loss)] // a count
    let count = count as f64;
    took.as_secs_f64() * 1e6 / count
}

/// New files come in groups that do not change the size of the directory much; `f` is timed on each group, until
/// there were enough.
fn groups(n: u64, most: u64, mut f: impl FnMut(u64) -> Duration) -> f64 {
    let group = n.clamp(10, most);
    let times = (most / group).clamp(1, 10);
    us((0..times).map(|_| f(group)).sum(), group * times)
}

fn create(bed: &Bed, here: &Here, n: u64, durable: bool) -> f64 {
    groups(n, if durable { 100 } else { 500 }, |group| {
        let took = timed(|| (0..group).for_each(|i| save(here, i, durable)));
        (0..group).for_each(|i| fs::remove_file(here.fresh(i, durable)).expect("unlink"));
        bed.settle();
        took
    })
}

fn save(here: &Here, i: u64, durable: bool) {
    let path = here.fresh(i, durable);
    if here.raw && durable {
        let mut file = File::create(path).expect("create");
        std::io::Write::write_all(&mut file, b"x").expect("write");
        file.sync_all().expect("fsync");
        File::open(&here.dir).and_then(|d| d.sync_all()).expect("fsync of the directory");
    } else {
        fs::write(path, "x").expect("save");
    }
}

fn unlink(bed: &Bed, here: &Here, n: u64) -> f64 {
    groups(n, 500, |group| {
        (0..group).for_each(|i| save(here, i, false));
        bed.settle();
        timed(|| (0..group).for_each(|i| fs::remove_file(here.fresh(i, false)).expect("unlink")))
    })
}

/// The kernel forgets all names and inodes; what the file system reads them from stays in memory.
fn forget() {
    fs::write("/proc/sys/vm/drop_caches", "2").expect("drop_caches");
}

fn stat_new(_: &Bed, here: &Here, n: u64) -> f64 {
    let some = here.some(n);
    let times = (200 / some.len() as u64).clamp(1, 20);
    let pass = || {
        forget();
        timed(|| some.iter().for_each(|p| _ = fs::metadata(p).expect("stat")))
    };
    us((0..times).map(|_| pass()).sum(), times * some.len() as u64)
}

fn stat_known(_: &Bed, here: &Here, n: u64) -> f64 {
    let some = here.some(n);
    let pass = || some.iter().for_each(|p| _ = fs::metadata(p).expect("stat"));
    pass();
    let times = 20_000 / some.len() as u64;
    us(timed(|| (0..times).for_each(|_| pass())), times * some.len() as u64)
}

fn list(_: &Bed, here: &Here, n: u64) -> f64 {
    let times = (1000 / n).max(1);
    let pass = || {
        let mut seen = 0;
        for entry in fs::read_dir(&here.dir).expect("list") {
            entry.and_then(|e| e.metadata()).expect("stat");
            seen += 1;
        }
        assert_eq!(seen, n);
    };
    us(timed(|| (0..times).for_each(|_| pass())), times * n)
}

/// Each to another name and back.
fn rename(_: &Bed, here: &Here, n: u64) -> f64 {
    let some: Vec<(PathBuf, PathBuf)> = here.some(n).into_iter().map(|p| (p.with_extension("moved"), p)).collect();
    let times = (200 / some.len() as u64).max(1);
    let pass = || {
        some.iter().for_each(|(new, old)| fs::rename(old, new).expect("rename"));
        some.iter().for_each(|(new, old)| fs::rename(new, old).expect("rename"));
    };
    us(timed(|| (0..times).for_each(|_| pass())), 2 * times * some.len() as u64)
}

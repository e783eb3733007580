//! Files of 1 KiB to 10 GiB: written anew, written in place, read.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Args;
use crate::common::{Kind, LoopFs};
use crate::curve::{Bed, Curve, Target, Unit};

/// A curve and the microseconds of a MiB.
struct Row {
    name: &'static str,
    run: fn(&Bed, &Path, u64) -> f64,
}

const ROWS: [Row; 4] = [
    Row { name: "write of a new file, staged, at `relaxed`", run: staged },
    Row { name: "write in place", run: in_place },
    Row { name: "read back, the first time", run: |b, d, size| read_back(b, d, size, false) },
    Row { name: "read back, again", run: |b, d, size| read_back(b, d, size, true) },
];

const CHUNK: u64 = 1 << 20;

/// All of them.
pub fn run(args: &Args) {
    let wanted: Vec<&Row> = ROWS.iter().filter(|r| args.wants("size", r.name)).collect();
    if wanted.is_empty() {
        return;
    }
    let largest = args.largest << 20;
    let image = 3 * args.largest + 2048;
    let images = std::env::var_os("FSYS_TEST_IMAGES").map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
    let room = rustix::fs::statvfs(&images).map_or(0, |s| s.f_bavail * s.f_frsize) >> 20;
    if room < image {
        println!(
            "files up to {}: left out, {} has {room} MiB and {image} are needed\n",
            shown(largest),
            images.display()
        );
        return;
    }
    let mut sizes: Vec<u64> = std::iter::successors(Some(1024), |s| Some(s * 8)).take_while(|s| *s < largest).collect();
    sizes.push(largest);
    let options = format!("durability=relaxed,rule=*.db:mode=in-place,{}", args.options);
    let bed = Bed::new(LoopFs::new(Kind::named(&args.fs), image), &options, |_| ());
    bed.subdir("files");
    for row in wanted {
        let mut curve = Curve::new(row.name, "bytes", Unit::Us("MiB"));
        for &size in &sizes {
            let turn = |t: &Target| {
                let dir = t.dir.join("files");
                let us = (row.run)(&bed, &dir, size);
                // The other target needs the room.
                fs::read_dir(&dir)
                    .expect("list")
                    .for_each(|e| fs::remove_file(e.expect("entry").path()).expect("unlink"));
                us
            };
            curve.add(shown(size), bed.turns(args.rounds, turn));
        }
        curve.finish(args);
    }
}

fn shown(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{} GiB", b >> 30),
        b if b >= 1 << 20 => format!("{} MiB", b >> 20),
        b => format!("{} KiB", b >> 10),
    }
}

/// So many files of a size that the time of all can be measured.
fn files(dir: &Path, size: u64, ending: &str) -> Vec<PathBuf> {
    let count = ((16 << 20) / size).clamp(1, 200);
    (0..count).map(|i| dir.join(format!("{i}{ending}"))).collect()
}

/// Microseconds of a MiB of `each` done with all of them.
#[allow(clippy::cast_precision_loss)] // bytes
fn timed(paths: &[PathBuf], size: u64, each: impl Fn(&Path)) -> f64 {
    let started = Instant::now();
    paths.iter().for_each(|p| each(p));
    started.elapsed().as_secs_f64() * 1e6 / (paths.len() as u64 * size) as f64 * (1 << 20) as f64
}

fn write(mut file: File, size: u64) {
    let data = vec![0x5a; size.min(CHUNK) as usize];
    let mut left = size;
    while left > 0 {
        let now = left.min(CHUNK);
        file.write_all(&data[..now as usize]).expect("write");
        left -= now;
    }
}

fn staged(_: &Bed, dir: &Path, size: u64) -> f64 {
    timed(&files(dir, size, ""), size, |p| write(File::create(p).expect("create"), size))
}

/// Over what is there.
fn in_place(bed: &Bed, dir: &Path, size: u64) -> f64 {
    let paths = files(dir, size, ".db");
    paths.iter().for_each(|p| write(File::create(p).expect("create"), size));
    bed.settle();
    timed(&paths, size, |p| write(OpenOptions::new().write(true).open(p).expect("open"), size))
}

/// What was just saved: it is in the memory of the backing file system, as far as it fits.
fn read_back(bed: &Bed, dir: &Path, size: u64, again: bool) -> f64 {
    let paths = files(dir, size, "");
    paths.iter().for_each(|p| write(File::create(p).expect("create"), size));
    bed.settle();
    // Of a file that changed a moment ago the mount lets the kernel keep nothing from one open to the next.
    std::thread::sleep(Duration::from_millis(50));
    if again {
        paths.iter().for_each(|p| read(p, size));
    }
    timed(&paths, size, |p| read(p, size))
}

fn read(path: &Path, size: u64) {
    let (mut file, mut buf, mut seen) = (File::open(path).expect("open"), vec![0; size.min(CHUNK) as usize], 0);
    loop {
        let n = file.read(&mut buf).expect("read");
        if n == 0 {
            break;
        }
        seen += n as u64;
    }
    assert_eq!(seen, size);
}

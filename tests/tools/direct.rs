//! Random operations on one file, `O_DIRECT` among buffered ones, against a copy in memory: what fsx does without
//! `O_DIRECT`. Tells as JSON how many operations of each kind ran; ends with 1 at the first byte that differs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use fastrand::Rng;
use rustix::fs::{self as rfs, FallocateFlags, Mode, OFlags};
use rustix::io::{pread, pwrite};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

#[derive(Parser)]
struct Args {
    /// The file; made anew
    #[arg(long)]
    file: PathBuf,
    /// Operations
    #[arg(long, default_value_t = 10_000)]
    ops: u64,
    /// Seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Control: after this operation the copy in memory is changed by a byte, which must be found
    #[arg(long)]
    lie_after: Option<u64>,
}

/// What `O_DIRECT` asks of offset, length and memory.
const BLOCK: usize = 4096;
/// Largest size of the file, bytes.
const LARGEST: usize = 512 * BLOCK;

/// Memory aligned to a page, for the length of the program.
fn aligned() -> &'static mut [u8] {
    let rights = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new private map that nobody else knows and that is never unmapped.
    unsafe {
        let at = mmap_anonymous(std::ptr::null_mut(), LARGEST, rights, MapFlags::PRIVATE).expect("memory");
        std::slice::from_raw_parts_mut(at.cast::<u8>(), LARGEST)
    }
}

fn open(path: &Path, flags: OFlags) -> OwnedFd {
    rfs::open(path, OFlags::RDWR | OFlags::CLOEXEC | flags, Mode::from_raw_mode(0o644)).expect("open")
}

struct Run {
    path: PathBuf,
    rng: Rng,
    model: Vec<u8>,
    direct: OwnedFd,
    buffered: OwnedFd,
    page: &'static mut [u8],
    ran: BTreeMap<&'static str, u64>,
}

impl Run {
    fn range(&mut self, unit: usize) -> Range<usize> {
        let start = self.rng.usize(..LARGEST / unit);
        // One in four is so large that it may be on its way when the next operation comes.
        let most = if self.rng.u8(..4) == 0 { 256 } else { 8 };
        let len = self.rng.usize(1..=(LARGEST / unit - start).min(most * BLOCK / unit));
        start * unit..(start + len) * unit
    }

    fn write(&mut self, at: Range<usize>, direct: bool) {
        let len = at.len();
        self.rng.fill(&mut self.page[..len]);
        let fd = if direct { &self.direct } else { &self.buffered };
        let mut done = 0;
        while done < len {
            done += pwrite(fd, &self.page[done..len], (at.start + done) as u64).expect("write");
        }
        if self.model.len() < at.end {
            self.model.resize(at.end, 0);
        }
        self.model[at].copy_from_slice(&self.page[..len]);
    }

    /// The first offset that differs.
    fn differs(&mut self, at: Range<usize>, direct: bool) -> Option<usize> {
        let fd = if direct { &self.direct } else { &self.buffered };
        let n = pread(fd, &mut self.page[..at.len()], at.start as u64).expect("read");
        let end = at.end.min(self.model.len()).max(at.start);
        if n != end - at.start {
            return Some(at.start + n.min(end - at.start));
        }
        (0..n).find(|i| self.page[*i] != self.model[at.start + i]).map(|i| at.start + i)
    }

    fn reopen(&mut self, flags: OFlags) {
        // Closed first, so that a commit happens.
        let null = || open(Path::new("/dev/null"), OFlags::empty());
        (self.direct, self.buffered) = (null(), null());
        self.direct = open(&self.path, flags | OFlags::DIRECT);
        self.buffered = open(&self.path, OFlags::empty());
    }

    /// One operation; where the file differs from the copy, if it does.
    fn step(&mut self) -> Option<usize> {
        let (name, differs) = match self.rng.u8(..100) {
            0..25 => {
                let at = self.range(BLOCK);
                self.write(at, true);
                ("direct write", None)
            }
            25..50 => {
                let at = self.range(BLOCK);
                ("direct read", self.differs(at, true))
            }
            50..62 => {
                let at = self.range(1);
                self.write(at, false);
                ("buffered write", None)
            }
            62..77 => {
                let at = self.range(1);
                ("buffered read", self.differs(at, false))
            }
            77..83 => {
                let size = self.rng.usize(..LARGEST);
                rfs::ftruncate(&self.direct, size as u64).expect("truncate");
                self.model.resize(size, 0);
                ("truncate", None)
            }
            83..87 => {
                let at = self.range(BLOCK);
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rfs::fallocate(&self.direct, how, at.start as u64, at.len() as u64).expect("punch");
                let end = at.end.min(self.model.len());
                self.model[at.start.min(end)..end].fill(0);
                ("punch", None)
            }
            87..92 => {
                rfs::fsync(&self.direct).expect("sync");
                ("sync", None)
            }
            92..99 => {
                self.reopen(OFlags::empty());
                ("close and open", self.differs(0..LARGEST, true))
            }
            _ => {
                self.reopen(OFlags::TRUNC);
                self.model.clear();
                ("rewrite", None)
            }
        };
        *self.ran.entry(name).or_default() += 1;
        differs
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let direct = open(&args.file, OFlags::CREATE | OFlags::TRUNC | OFlags::DIRECT);
    let buffered = open(&args.file, OFlags::empty());
    let (rng, page) = (Rng::with_seed(args.seed), aligned());
    let mut run = Run { path: args.file, rng, model: Vec::new(), direct, buffered, page, ran: BTreeMap::new() };
    for n in 0..args.ops {
        if args.lie_after == Some(n) {
            run.model.iter_mut().for_each(|b| *b ^= 1);
        }
        if let Some(at) = run.step() {
            println!("{}", serde_json::json!({ "seed": args.seed, "operation": n, "differs_at": at, "ran": run.ran }));
            return ExitCode::FAILURE;
        }
    }
    run.reopen(OFlags::empty());
    let differs = run.differs(0..LARGEST, false);
    println!("{}", serde_json::json!({ "seed": args.seed, "differs_at": differs, "ran": run.ran }));
    ExitCode::from(u8::from(differs.is_some()))
}

//! The engine alone, without FUSE, on ext4 on a loop device in memory: what a commit costs before the kernel and a
//! program have their share. `scripts/bench --engine` or `cargo bench --bench engine`, as root.

#[path = "../tests/common/mod.rs"]
mod common;

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::{Kind, LoopFs, can_mount};
use criterion::{BenchmarkId, Criterion, Throughput};
use fsys_mount::backend::{Backing, FileId};
use fsys_mount::config::Config;
use fsys_mount::config::policy::{Durability, Policy, WriteMode};
use fsys_mount::engine::dir::Dir;
use fsys_mount::engine::dispatch::{Copy, Done, Outcome, Work};
use fsys_mount::engine::file::Handle;
use fsys_mount::engine::io::Access;
use fsys_mount::engine::layout::Layout;
use fsys_mount::engine::{Engine, recover};
use fsys_mount::fs::Caller;

const CONTENT: [u8; 4096] = [b'x'; 4096];
/// Far longer than anything takes: only what is never answered gets here.
const PATIENCE: Duration = Duration::from_secs(60);

/// An engine at work on a directory.
struct Rig {
    engine: Arc<Engine>,
    root: Arc<Dir>,
    // Held until the end: the lock of the backing directory.
    _layout: Layout,
}

impl Rig {
    fn start(fs: &LoopFs, name: &str) -> Self {
        let dir = fs.subdir(name);
        let layout = Layout::open(&dir).expect("the layout of a new directory");
        recover::recover(&layout, false).expect("nothing to recover");
        let own = |fd: BorrowedFd<'_>| -> OwnedFd { fd.try_clone_to_owned().expect("a descriptor") };
        let backing = Backing::open(own(layout.root()), own(layout.staging()), own(layout.failed()), None);
        let backing = backing.expect("the backing directory").with_journal(own(layout.journal()));
        let id = FileId::of(&rustix::fs::fstat(layout.root()).expect("stat"));
        let root = Dir::new(1, id, backing.anchor_of(layout.root().as_fd(), id).expect("the root"), None);
        let engine = Engine::start(backing, Config::default()).expect("the engine starts");
        Self { engine, root: Arc::new(root), _layout: layout }
    }

    /// A new file that was written and not closed.
    fn create(&self, name: &str, mode: WriteMode) -> Handle {
        let caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0o022 };
        let policy = Policy { mode, durability: Durability::Close, ..Policy::default() };
        let flags = libc::O_RDWR | libc::O_CREAT;
        let made = self.engine.create(&self.root, OsStr::new(name), 0o644, &caller, flags, policy, |id| id.ino);
        self.written(made.expect("create"))
    }

    /// Its next version, written and not closed.
    fn rewrite(&self, h: &Handle) -> Handle {
        self.written(done(self.engine.open(&h.file, libc::O_RDWR | libc::O_TRUNC, h.policy, false)))
    }

    fn written(&self, h: Handle) -> Handle {
        assert_eq!(done(self.engine.write(&h, 0, &CONTENT, false)), CONTENT.len());
        h
    }

    /// Closes all of them at once; gives the time until the last is on stable storage.
    fn close_all(&self, handles: &[Handle]) -> Duration {
        let (tx, rx) = mpsc::channel();
        let started = Instant::now();
        for h in handles {
            let tx = tx.clone();
            self.engine.close(h, 0, answer(tx));
        }
        handles.iter().for_each(|_| wait(&rx));
        let took = started.elapsed();
        for h in handles {
            let _ = self.engine.release(h);
        }
        took
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Nothing is owed that anybody would look at.
        let _ = self.engine.shutdown(PATIENCE);
    }
}

fn done<T>(access: Access<T>) -> T {
    match access {
        Access::Done(r) => r.expect("the call succeeds"),
        Access::Wait => panic!("no commit of this file runs"),
    }
}

fn answer(tx: mpsc::Sender<Outcome>) -> Done {
    Done::new(move |r| drop(tx.send(r)))
}

fn wait(rx: &mpsc::Receiver<Outcome>) {
    rx.recv_timeout(PATIENCE).expect("every call is answered").expect("it succeeds");
}

/// Rewrites `n` files and closes them at once: one commit alone, or `n` in flight. Staging is not timed.
fn commits(c: &mut Criterion, fs: &LoopFs) {
    let mut group = c.benchmark_group("commit, in flight");
    for n in [1, 8, 64] {
        let rig = Rig::start(fs, &format!("commit-{n}"));
        let mut files: Vec<Handle> = (0..n).map(|i| rig.create(&i.to_string(), WriteMode::Auto)).collect();
        rig.close_all(&files);
        let before = fs.flushes();
        let mut rounds = 0;
        group.throughput(Throughput::Elements(n));
        group.bench_function(BenchmarkId::from_parameter(n), |b| {
            b.iter_custom(|iterations| {
                rounds += iterations;
                let one = |_| {
                    files = files.iter().map(|f| rig.rewrite(f)).collect();
                    rig.close_all(&files)
                };
                (0..iterations).map(one).sum()
            });
        });
        let flushes = fs.flushes() - before;
        assert!(flushes >= rounds, "{rounds} times saved, but {flushes} flushes: it was not durable");
        // None when a filter left this one out.
        if rounds > 0 {
            println!("{:24}{:.3} device flushes per commit\n", "", common::per(flushes, rounds * n));
        }
    }
    group.finish();
}

/// fsync(2) of a file that is written in place.
fn fsync_in_place(c: &mut Criterion, fs: &LoopFs) {
    let rig = Rig::start(fs, "in-place");
    let created = rig.create("f", WriteMode::InPlace);
    rig.close_all(std::slice::from_ref(&created));
    let h = done(rig.engine.open(&created.file, libc::O_RDWR, created.policy, false));
    c.bench_function("fsync, in place", |b| {
        b.iter_custom(|iterations| {
            let one = |_| {
                assert_eq!(done(rig.engine.write(&h, 0, &CONTENT, false)), CONTENT.len());
                let (tx, rx) = mpsc::channel();
                let started = Instant::now();
                rig.engine.fsync(&h, false, answer(tx));
                wait(&rx);
                started.elapsed()
            };
            (0..iterations).map(one).sum()
        });
    });
    let _ = rig.engine.release(&h);
}

/// To the dispatcher's thread and back, with nothing to do there: a copy of no bytes.
fn hand_over(c: &mut Criterion, fs: &LoopFs) {
    let rig = Rig::start(fs, "queue");
    let h = rig.create("f", WriteMode::InPlace);
    let version = h.file.state.read().version.clone().expect("an open file has a version");
    c.bench_function("hand-over to the dispatcher", |b| {
        b.iter(|| {
            let (src, dst) = (version.clone(), version.clone());
            let copy = Copy { src, src_off: 0, dst, dst_off: 0, len: 0, copied: Arc::new(AtomicUsize::new(0)) };
            let (tx, rx) = mpsc::channel();
            rig.engine.send(Work::Copy(copy), answer(tx));
            wait(&rx);
        });
    });
    rig.close_all(&[h]);
}

fn main() -> ExitCode {
    if !can_mount("the bench of the engine") {
        return ExitCode::FAILURE;
    }
    let fs = LoopFs::new(Kind::Ext4, 2048);
    let mut c = Criterion::default().configure_from_args();
    commits(&mut c, &fs);
    fsync_in_place(&mut c, &fs);
    hand_over(&mut c, &fs);
    c.final_summary();
    ExitCode::SUCCESS
}

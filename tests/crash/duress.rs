//! A daemon in distress while programs save: stopped and killed, out of memory, out of descriptors, out of space, and
//! with a clock that jumps. Every program gets an answer, with the true error; what was answered is there; everything
//! is whole; the daemon goes on, or is gone and the next one finds all in order.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::IntoRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use fastrand::Rng;
use rustix::process::{Resource, Rlimit, Signal, prlimit};

use crate::ONE_AT_A_TIME;
use crate::fsys::{Daemon, recover};
use crate::rig::{Kind, Rig};

const SAVERS: usize = 4;

fn one() -> std::sync::MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For the sum that `scripts/faults` makes.
fn injected(kind: &str, n: usize) {
    println!("injected: {kind}: {n}");
}

/// Programs that save one file each, again and again.
struct Savers {
    /// Bytes of a version: up to so many times eight.
    words: usize,
    /// The newest version that was answered, and the newest that was begun.
    answered: Vec<AtomicUsize>,
    begun: Vec<AtomicUsize>,
    errors: Mutex<BTreeMap<i32, usize>>,
    stop: AtomicBool,
    ended: AtomicUsize,
}

/// The daemon is not there any more: so says the kernel, `ECANCELED` for a call that was on its way through io_uring.
const GONE: [i32; 6] = [libc::ENOTCONN, libc::ECONNABORTED, libc::ECANCELED, libc::EIO, libc::ENODEV, libc::ENXIO];

impl Savers {
    fn new(words: usize) -> Self {
        let zeros = || (0..SAVERS).map(|_| AtomicUsize::new(0)).collect();
        let (stop, ended) = (AtomicBool::new(false), AtomicUsize::new(0));
        Self { words, answered: zeros(), begun: zeros(), errors: Mutex::default(), stop, ended }
    }

    fn content(&self, version: usize) -> Vec<u8> {
        version.to_le_bytes().repeat(1 + version * 3137 % self.words)
    }

    /// Runs the programs while `act` does its work.
    fn during(&self, mountpoint: &Path, act: impl FnOnce()) {
        self.stop.store(false, Ordering::Relaxed);
        self.ended.store(0, Ordering::Relaxed);
        let dev = fs::metadata(mountpoint).unwrap().dev();
        std::thread::scope(|scope| {
            for n in 0..SAVERS {
                let path = mountpoint.join(format!("f{n}"));
                scope.spawn(move || {
                    self.save_on(n, &path, dev);
                    self.ended.fetch_add(1, Ordering::Relaxed);
                });
            }
            // Programs are stopped also when the test fails.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
            self.stop.store(true, Ordering::Relaxed);
            if let Err(panic) = result {
                std::panic::resume_unwind(panic);
            }
        });
    }

    fn save_on(&self, n: usize, path: &Path, dev: u64) {
        while !self.stop.load(Ordering::Relaxed) {
            let version = self.begun[n].fetch_add(1, Ordering::AcqRel) + 1;
            match self.save(path, dev, version) {
                Ok(true) => self.answered[n].store(version, Ordering::Release),
                // After the unmount the name leads to the directory below, which promises nothing.
                Ok(false) => return,
                Err(e) => {
                    let errno = e.raw_os_error().unwrap();
                    *self.errors.lock().unwrap().entry(errno).or_default() += 1;
                    if GONE.contains(&errno) {
                        return;
                    }
                }
            }
        }
    }

    fn save(&self, path: &Path, dev: u64, version: usize) -> io::Result<bool> {
        let mut file = File::create(path)?;
        if file.metadata()?.dev() != dev {
            return Ok(false);
        }
        let wrote = file.write_all(&self.content(version));
        // SAFETY: the descriptor is this file's own and is not used again.
        let closed = unsafe { libc::close(file.into_raw_fd()) };
        wrote?;
        if closed == 0 { Ok(true) } else { Err(io::Error::last_os_error()) }
    }

    fn sum(&self) -> usize {
        self.answered.iter().map(|a| a.load(Ordering::Acquire)).sum()
    }

    /// Waits for so many more answers, or until no program is left.
    fn more(&self, n: usize) {
        let goal = self.begun.iter().map(|a| a.load(Ordering::Acquire)).sum::<usize>() + n;
        let tried = || self.begun.iter().map(|a| a.load(Ordering::Acquire)).sum::<usize>();
        while tried() < goal && self.ended.load(Ordering::Relaxed) < SAVERS {
            std::thread::yield_now();
        }
    }

    /// The errors that programs were told, and how often.
    fn errors(&self) -> BTreeMap<i32, usize> {
        self.errors.lock().unwrap().clone()
    }

    /// What is there is whole, and not older than what was answered.
    fn check(&self, backing: &Path, what: &str) {
        for n in 0..SAVERS {
            let (answered, begun) = (self.answered[n].load(Ordering::Acquire), self.begun[n].load(Ordering::Acquire));
            let found = fs::read(backing.join(format!("f{n}"))).unwrap_or_default();
            let version = found.first_chunk::<8>().map_or(0, |b| usize::from_le_bytes(*b));
            let whole = found == if version == 0 { vec![] } else { self.content(version) };
            assert!(whole, "{what}: f{n}: version {version} is not whole: {} bytes", found.len());
            assert!((answered..=begun).contains(&version), "{what}: f{n}: {answered} answered, {version} there");
        }
    }
}

/// Recovers, and looks at everything. Failed versions may be kept for people.
fn recover_and_check(savers: &Savers, backing: &Path, what: &str) {
    recover(backing).unwrap_or_else(|v| assert!(v.text.contains(".fsys/failed/"), "{what}: {}", v.text));
    savers.check(backing, what);
}

/// SIGSTOP for a moment, and then the end by SIGTERM or SIGKILL, at random points.
#[test]
fn signals_at_random_points_lose_nothing() {
    let _one = one();
    let rig = Rig::new(Kind::Ext4);
    let backing = rig.dir("backing");
    let rounds = std::env::var("FSYS_CRASH_SIGNALS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let (savers, mut rng) = (Savers::new(700), Rng::with_seed(7));
    for round in 0..rounds {
        let daemon = Daemon::mount(&backing, &rig.dir("mnt"), "");
        let at = daemon.path().to_path_buf();
        savers.during(&at, || {
            savers.more(rng.usize(2..30));
            daemon.signal(Signal::STOP);
            daemon.signal(Signal::CONT);
            savers.more(rng.usize(2..30));
            if round % 2 == 0 {
                drop(daemon);
            } else {
                daemon.signal(Signal::TERM);
                daemon.ended();
            }
        });
        recover_and_check(&savers, &backing, "signals");
    }
    println!("{rounds} daemons ended while programs saved, {} answered saves all there", savers.sum());
    for kind in ["SIGSTOP and SIGCONT", "SIGTERM or SIGKILL"] {
        injected(kind, rounds);
    }
    assert!(savers.sum() > rounds, "programs got to save");
}

/// Opens so many files at once that the daemon, which serves from memory that it has, needs more.
fn need_memory(mountpoint: &Path) {
    let open = |n: usize| File::create(mountpoint.join(format!("more{}", n % 500))).ok();
    let held: Vec<File> = (0..4000).map_while(open).collect();
    println!("{} more files open at once", held.len());
}

/// A memory cgroup (version 1 or 2) of this test's own.
struct Group(PathBuf);

impl Group {
    /// `None` where there is no memory controller for us.
    fn new(n: usize) -> Option<Self> {
        let name = format!("fsys-test-{}-{n}", std::process::id());
        let made = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"].map(|at| Path::new(at).join(&name));
        made.into_iter().find(|dir| fs::create_dir(dir).is_ok()).map(Self).filter(|g| g.limit_file().is_some())
    }

    fn limit_file(&self) -> Option<PathBuf> {
        ["memory.limit_in_bytes", "memory.max"].map(|f| self.0.join(f)).into_iter().find(|f| f.exists())
    }

    fn limit(&self, bytes: u64) {
        fs::write(self.limit_file().unwrap(), bytes.to_string()).unwrap();
    }

    fn add(&self, pid: i32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// A daemon in a cgroup of less and less memory: it is slow, or the kernel kills it.
#[test]
fn a_daemon_out_of_memory_loses_nothing() {
    let _one = one();
    if Group::new(0).is_none() {
        assert!(std::env::var_os("CI").is_none(), "no memory cgroup, and on CI nothing may be skipped");
        println!("SKIPPED: no memory cgroup");
        return;
    }
    let rig = Rig::new(Kind::Ext4);
    let (mut killed, mut survived) = (0, 0);
    let limits: [u64; 6] = [1 << 20, 256 << 10, 64 << 10, 16 << 10, 8192, 4096];
    let disk = rig.mount(false).unwrap();
    let savers = Savers::new(20_000);
    for (n, limit) in limits.into_iter().enumerate() {
        let group = Group::new(n).unwrap();
        let daemon = Daemon::mount(disk.path(), &rig.dir("mnt"), "");
        let at = daemon.path().to_path_buf();
        savers.during(&at, || {
            savers.more(10);
            group.limit(limit);
            group.add(daemon.pid());
            savers.more(60);
            need_memory(&at);
        });
        group.limit(1 << 30);
        if daemon.is_running() && fs::metadata(&at).is_ok() {
            survived += 1;
            savers.during(&at, || savers.more(10));
            daemon.unmount();
        } else {
            killed += 1;
            drop(daemon);
        }
        recover_and_check(&savers, disk.path(), "memory");
    }
    println!("of {} daemons with little memory {killed} were killed, {survived} went on", limits.len());
    println!("programs were told {:?}", savers.errors());
    // Whether the kernel kills depends on what memory the daemon had before it came into the group.
    injected("memory limit (cgroup)", limits.len());
    assert!(savers.errors().keys().all(|e| GONE.contains(e) || *e == libc::ENOMEM), "{:?}", savers.errors());
}

/// No more address space: an allocation or a thread fails, and the daemon goes on or ends at once.
#[test]
fn a_daemon_without_address_space_loses_nothing() {
    let _one = one();
    let rig = Rig::new(Kind::Ext4);
    let backing = rig.dir("backing");
    let savers = Savers::new(100_000);
    let (mut killed, rounds) = (0, 6);
    for round in 0..rounds {
        let daemon = Daemon::mount(&backing, &rig.dir("mnt"), "");
        let at = daemon.path().to_path_buf();
        savers.during(&at, || {
            savers.more(3 * round);
            let pages: u64 = fs::read_to_string(format!("/proc/{}/statm", daemon.pid()))
                .unwrap()
                .split(' ')
                .next()
                .and_then(|n| n.parse().ok())
                .unwrap();
            // What it has, and nothing more.
            let limit = Rlimit { current: Some(pages * 4096), maximum: None };
            prlimit(Some(daemon.raw_pid()), Resource::As, limit).unwrap();
            savers.more(40);
            need_memory(&at);
            savers.more(40);
        });
        killed += usize::from(!daemon.is_running());
        drop(daemon);
        recover_and_check(&savers, &backing, "address space");
    }
    println!("of {rounds} daemons without address space {killed} ended; programs were told {:?}", savers.errors());
    // Whether that is felt depends on what the allocator has in reserve.
    injected("address space limit", rounds);
}

/// No more descriptors: EMFILE is told, and with descriptors again all is well.
#[test]
fn a_daemon_without_descriptors_says_so_and_goes_on() {
    let _one = one();
    let rig = Rig::new(Kind::Ext4);
    let disk = rig.mount(false).unwrap();
    let savers = Savers::new(700);
    let daemon = Daemon::mount(disk.path(), &rig.dir("mnt"), "");
    let at = daemon.path().to_path_buf();
    let mut times = 0;
    savers.during(&at, || {
        for spare in [0, 1, 2, 3, 5] {
            savers.more(20);
            let open = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count() as u64;
            let limit = |n| Rlimit { current: Some(n), maximum: Some(20_000) };
            prlimit(Some(daemon.raw_pid()), Resource::Nofile, limit(open.saturating_sub(2) + spare)).unwrap();
            savers.more(60);
            prlimit(Some(daemon.raw_pid()), Resource::Nofile, limit(20_000)).unwrap();
            times += 1;
        }
        savers.more(20);
    });
    let errors = savers.errors();
    assert!(daemon.is_running(), "it goes on");
    savers.check(&at, "descriptors, as programs see it");
    println!("without descriptors programs were told {errors:?}");
    injected("descriptor limit", times);
    assert!(errors.keys().all(|e| *e == libc::EMFILE) && !errors.is_empty(), "{errors:?}");
    daemon.signal(Signal::TERM);
    daemon.ended();
    recover_and_check(&savers, disk.path(), "descriptors");
}

/// The staging area at its bound, and the disk at its end: ENOSPC and nothing else, and then all is well again.
#[test]
fn no_space_is_told_as_that() {
    let _one = one();
    for (bound, kind) in [(true, Kind::Ext4), (false, Kind::Ext4), (false, Kind::Xfs)] {
        let rig = Rig::new(kind);
        let disk = rig.mount(false).unwrap();
        let savers = Savers::new(30_000);
        let daemon = Daemon::mount(disk.path(), &rig.dir("mnt"), if bound { "staging_max_bytes=150000" } else { "" });
        let at = daemon.path().to_path_buf();
        let filler = disk.path().join("filler");
        savers.during(&at, || {
            savers.more(20);
            if !bound {
                fill(&filler);
            }
            savers.more(150);
        });
        let what = format!("{} {}", kind.name(), if bound { "staging" } else { "disk" });
        let errors = savers.errors();
        println!("{what}: full; programs were told {errors:?}");
        injected(if bound { "staging area full" } else { "disk full" }, errors.values().sum());
        assert!(errors.keys().all(|e| *e == libc::ENOSPC) && !errors.is_empty(), "{what}: {errors:?}");
        assert!(daemon.is_running());
        savers.check(&at, &what);
        let _ = fs::remove_file(&filler);
        // What failed was kept, and takes space until somebody looks.
        let failed = disk.path().join(".fsys/failed");
        fs::read_dir(failed).unwrap().for_each(|e| fs::remove_file(e.unwrap().path()).unwrap());
        fs::write(at.join("after"), "it goes on").unwrap();
        daemon.signal(Signal::TERM);
        daemon.ended();
        recover_and_check(&savers, disk.path(), &what);
        assert_eq!(fs::read(disk.path().join("after")).unwrap(), b"it goes on");
    }
}

fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    for size in [1 << 20, 1 << 12] {
        while file.write_all(&vec![7; size]).is_ok() {}
    }
    let _ = file.sync_all();
}

/// libfaketime, which gives one process another time of day.
fn faketime() -> Option<PathBuf> {
    let dirs = fs::read_dir("/usr/lib").ok()?.flatten().map(|e| e.path());
    let all = std::iter::once(PathBuf::from("/usr/lib")).chain(dirs);
    all.map(|d| d.join("faketime/libfaketimeMT.so.1")).find(|p| p.exists())
}

/// The time of day jumps by hours and days, forward and back, also between two daemons: debts are paid in time,
/// and nothing is lost.
#[test]
fn a_clock_that_jumps_changes_nothing() {
    let _one = one();
    let Some(library) = faketime() else {
        assert!(std::env::var_os("CI").is_none(), "no libfaketime, and on CI nothing may be skipped");
        println!("SKIPPED: no libfaketime");
        return;
    };
    let rig = Rig::new(Kind::Ext4);
    let disk = rig.mount(false).unwrap();
    let (savers, clock) = (Savers::new(700), rig.dir("clock").join("offset"));
    let jump = |to: &str| fs::write(&clock, to).unwrap();
    let set_up = |command: &mut Command| {
        command.env("LD_PRELOAD", &library).env("FAKETIME_TIMESTAMP_FILE", &clock);
        // The other clock never jumps, and waits are by it.
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    };
    let mut jumps = 0;
    for start in ["+0", "-3d"] {
        jump(start);
        let options = "durability=fsync,commit_interval_ms=200";
        let daemon = Daemon::mount_with(disk.path(), &rig.dir("mnt"), options, set_up);
        let maps = fs::read_to_string(format!("/proc/{}/maps", daemon.pid())).unwrap();
        assert!(maps.contains("libfaketime"), "the daemon has the other clock");
        let at = daemon.path().to_path_buf();
        savers.during(&at, || {
            for to in ["+6h", "-6h", "+400d", "-1d", "+1h"] {
                jump(to);
                jumps += 1;
                savers.more(40);
            }
        });
        // Nobody waits for these: the commit interval has to bring them.
        let there = || {
            (0..SAVERS).all(|n| {
                let found = fs::read(disk.path().join(format!("f{n}"))).unwrap_or_default();
                let version = found.first_chunk::<8>().map_or(0, |b| usize::from_le_bytes(*b));
                version >= savers.answered[n].load(Ordering::Acquire)
            })
        };
        while !there() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        // The second starts in the past of what this one leaves.
        drop(daemon);
        recover_and_check(&savers, disk.path(), "clock");
    }
    assert!(savers.errors().is_empty(), "{:?}", savers.errors());
    println!("{jumps} jumps of the clock, {} saves answered, all there", savers.sum());
    injected("clock jump", jumps);
}

/// The negative control of this file.
#[test]
fn the_check_of_savers_can_fail() {
    let dir = tempfile::tempdir().unwrap();
    let savers = Savers::new(700);
    savers.begun[0].store(9, Ordering::Relaxed);
    savers.answered[0].store(5, Ordering::Relaxed);
    let at = dir.path().join("f0");
    let good = |content: &[u8]| {
        fs::write(&at, content).unwrap();
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| savers.check(dir.path(), "control"))).is_ok()
    };
    assert!(good(&savers.content(5)) && good(&savers.content(9)));
    assert!(!good(&savers.content(4)), "lost");
    assert!(!good(&savers.content(10)), "never begun");
    assert!(!good(&savers.content(5)[..100]), "torn");
}

//! Devices and filesystems that break under a mount: the caller is told, the mount says why it stopped, and the versions
//! before stand.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::IntoRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use fastrand::Rng;
use rustix::process::Signal;

use crate::ONE_AT_A_TIME;
use crate::disk::{Fault, Request};
use crate::fsys::{Daemon, recover, said, tool};
use crate::rig::{Kind, Rig};

const OLD: &[u8] = b"the version before";
const NEW: &[u8] = b"and the one that meets the fault";

/// Truncate, write, close, with the answers of all.
fn save(path: &Path, content: &[u8]) -> io::Result<()> {
    write_and_close(File::create(path)?, content)
}

fn write_and_close(mut file: File, content: &[u8]) -> io::Result<()> {
    let wrote = file.write_all(content);
    // SAFETY: the descriptor is this file's own and is not used again.
    let closed = unsafe { libc::close(file.into_raw_fd()) };
    let closed = if closed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    wrote.and(closed)
}

fn errno(r: io::Result<()>) -> Option<i32> {
    r.err().map(|e| e.raw_os_error().unwrap())
}

fn always(on: Request, errno: i32) -> Fault {
    Fault { on, skip: 0, count: u64::MAX, one_in: 1, seed: 0, errno }
}

/// The three things a device can fail, and whether the caller must be told at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Flush,
    Write,
    /// The write of a journal or log only: those that come with the barrier.
    LaterWrites,
}

fn break_it(rig: &Rig, how: Broken) {
    let fault = match how {
        Broken::Flush => always(Request::Flush, libc::EIO),
        Broken::Write => always(Request::Write, libc::EIO),
        Broken::LaterWrites => Fault { skip: 1, ..always(Request::Write, libc::EIO) },
    };
    rig.disk.set_faults(vec![fault]);
}

/// P3: EIO reaches the caller, the mount turns read-only and says why, what was acknowledged can be read and stands.
fn a_broken_device(kind: Kind, how: Broken) {
    let rig = Rig::new(kind);
    let disk = rig.mount(false).unwrap();
    let daemon = Daemon::mount(disk.path(), &rig.dir("mnt"), "");
    let at = |name: &str| daemon.path().join(name);
    save(&at("kept"), OLD).unwrap();
    save(&at("a"), OLD).unwrap();
    break_it(&rig, how);
    let what = format!("{} {how:?}", kind.name());
    assert_eq!(errno(save(&at("a"), NEW)), Some(libc::EIO), "{what}: the save that meets it");
    // The next ones find a device that still fails, or a mount that refuses; none may succeed.
    for n in 0..3 {
        let told = errno(save(&at("b"), NEW));
        assert!(matches!(told, Some(libc::EIO | libc::EROFS)), "{what}: save {n} after it: {told:?}");
    }
    let (health, reason) = daemon.health();
    // A failed write of data is that file's own: the device is asked again for the next.
    let want = if how == Broken::Write { "degraded" } else { "read-only" };
    assert_eq!(health, want, "{what}: {reason}");
    assert!(reason.contains("stand") && reason.len() > 20, "{what}: {reason}");
    // XFS is shut down then, and its own answer, to the lookup, comes first.
    let told = errno(save(&at("c"), NEW));
    let refused = if want == "read-only" && kind == Kind::Ext4 { libc::EROFS } else { libc::EIO };
    assert_eq!(told, Some(refused), "{what}: then it is refused");
    if kind == Kind::Ext4 {
        assert_eq!(fs::read(at("kept")).unwrap(), OLD, "{what}: reading goes on");
    }
    drop(daemon);
    drop(disk);
    rig.settle();
    rig.disk.set_faults(vec![]);
    // The machine is repaired: nothing acknowledged is gone, nothing is torn, nothing that failed appears in part.
    let disk = rig.mount(false).unwrap();
    recover(disk.path()).unwrap_or_else(|v| {
        // What failed is kept for people.
        assert!(v.text.contains(".fsys/failed/"), "{what}: {}", v.text);
    });
    assert_eq!(fs::read(disk.path().join("kept")).unwrap(), OLD, "{what}");
    let a = fs::read(disk.path().join("a")).unwrap();
    assert!(a == OLD || a == NEW, "{what}: {a:?}");
    for name in ["b", "c"] {
        let found = fs::read(disk.path().join(name)).ok();
        assert!(found.is_none() || found.as_deref() == Some(NEW), "{what}: {name} {found:?}");
    }
}

fn one() -> std::sync::MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn a_failed_flush_is_told_and_makes_the_mount_read_only() {
    let _one = one();
    for kind in [Kind::Ext4, Kind::Xfs] {
        a_broken_device(kind, Broken::Flush);
    }
}

#[test]
fn a_failed_write_is_told_and_makes_the_mount_read_only() {
    let _one = one();
    for kind in [Kind::Ext4, Kind::Xfs] {
        a_broken_device(kind, Broken::Write);
        a_broken_device(kind, Broken::LaterWrites);
    }
}

/// A read that fails concerns its caller only; saves go on.
#[test]
fn a_failed_read_is_told_and_nothing_else() {
    let _one = one();
    for kind in [Kind::Ext4, Kind::Xfs] {
        let rig = Rig::new(kind);
        let disk = rig.mount(false).unwrap();
        let big: Vec<u8> = (0..1 << 20).map(|i| i as u8 | 1).collect();
        {
            let daemon = Daemon::mount(disk.path(), &rig.dir("mnt"), "");
            save(&daemon.path().join("a"), &big).unwrap();
            daemon.unmount();
        }
        drop(disk);
        let disk = rig.mount(false).unwrap();
        let daemon = Daemon::mount(disk.path(), &rig.dir("mnt"), "");
        let mut file = File::open(daemon.path().join("a")).unwrap();
        rig.disk.set_faults(vec![always(Request::Read, libc::EIO)]);
        let told = file.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(told.raw_os_error(), Some(libc::EIO), "{}", kind.name());
        rig.disk.set_faults(vec![]);
        drop(file);
        save(&daemon.path().join("b"), NEW).unwrap();
        assert_eq!(fs::read(daemon.path().join("a")).unwrap(), big, "{}", kind.name());
        daemon.unmount();
        assert_eq!(fs::read(disk.path().join("b")).unwrap(), NEW);
    }
}

/// The backing filesystem turns read-only by itself: the caller gets its error, the versions before stand.
#[test]
fn a_backing_filesystem_that_turns_read_only_is_told_as_that() {
    let _one = one();
    let rig = Rig::with(Kind::Ext4, &[], "errors=remount-ro");
    let disk = rig.mount(false).unwrap();
    let daemon = Daemon::mount(disk.path(), &rig.dir("mnt"), "");
    let a = daemon.path().join("a");
    save(&a, OLD).unwrap();
    // ext4's own switch for tests: as if it had found a wrong block.
    fs::write(format!("/sys/fs/ext4/{}/trigger_fs_error", rig.device()), "1").unwrap();
    for _ in 0..3 {
        let told = errno(save(&a, NEW));
        assert!(matches!(told, Some(libc::EROFS | libc::EIO)), "{told:?}");
        assert_eq!(fs::read(&a).unwrap(), OLD);
    }
    let (health, reason) = daemon.health();
    assert_eq!(health, "read-only", "{reason}");
    assert!(reason.contains("backing file system"), "{reason}");
    drop(daemon);
    drop(disk);
    rig.settle();
    let disk = rig.mount(false).unwrap();
    assert_eq!(fs::read(disk.path().join("a")).unwrap(), OLD);
}

/// A full disk: ENOSPC, the old version stands, and with space again all is well.
#[test]
fn a_full_disk_is_told_and_tears_nothing() {
    let _one = one();
    for kind in [Kind::Ext4, Kind::Xfs] {
        let rig = Rig::new(kind);
        let disk = rig.mount(false).unwrap();
        let daemon = Daemon::mount(disk.path(), &rig.dir("mnt"), "");
        let a = daemon.path().join("a");
        let (old, new) = (vec![1; 3 << 20], vec![2; 3 << 20]);
        save(&a, &old).unwrap();
        let filler = disk.path().join("filler");
        fill(&filler);
        let mut told = 0;
        for n in 0..8 {
            match errno(save(&a, &new)) {
                Some(libc::ENOSPC) => told += 1,
                other => assert_eq!(other, None, "{} save {n}", kind.name()),
            }
            let is = fs::read(&a).unwrap();
            assert!(is == old || is == new, "{}: torn, {} bytes", kind.name(), is.len());
        }
        assert!(told > 0, "{}: it was full", kind.name());
        fs::remove_file(&filler).unwrap();
        // What failed was kept, and takes space until somebody looks.
        let failed = disk.path().join(".fsys/failed");
        fs::read_dir(failed).unwrap().for_each(|e| fs::remove_file(e.unwrap().path()).unwrap());
        save(&a, &new).unwrap();
        assert_eq!(fs::read(&a).unwrap(), new);
        // `unmount` would say once more that versions failed.
        daemon.signal(Signal::TERM);
        daemon.ended();
        assert_eq!(fs::read(disk.path().join("a")).unwrap(), new);
    }
}

fn fill(path: &Path) {
    let mut file = File::create(path).unwrap();
    for size in [1 << 20, 1 << 12] {
        while file.write_all(&vec![7; size]).is_ok() {}
    }
    let _ = file.sync_all();
}

/// P7: recovery is killed again and again, and run again.
#[test]
fn recovery_killed_at_any_point_goes_on() {
    let _one = one();
    let rig = Rig::new(Kind::Ext4);
    let disk = rig.mount(false).unwrap();
    Daemon::mount(disk.path(), &rig.dir("mnt"), "").unmount();
    save(&disk.path().join("mine"), OLD).unwrap();
    let staging = disk.path().join(".fsys/staging");
    let made = 3000;
    for n in 0..made {
        fs::write(staging.join(format!("{n:016x}.stage")), b"half").unwrap();
    }
    fs::write(staging.join("not-ours"), b"?").unwrap();
    let left = || fs::read_dir(&staging).unwrap().count();
    let (mut cut, mut rng) = (0, Rng::with_seed(3));
    while left() > made / 4 {
        let goal = left().saturating_sub(rng.usize(1..300));
        let mut child = tool().arg("recover").arg(disk.path()).stdout(std::process::Stdio::null()).spawn().unwrap();
        let ended = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if left() <= goal {
                break None;
            }
        };
        if ended.is_none() {
            child.kill().unwrap();
            cut += usize::from(!child.wait().unwrap().success());
        }
    }
    let out = tool().arg("recover").arg(disk.path()).output().unwrap();
    assert!(out.status.success(), "{}", said(&out));
    assert_eq!(left(), 1, "only what is not understood stays");
    assert_eq!(fs::read(disk.path().join("mine")).unwrap(), OLD);
    println!("injected: SIGKILL of a recovery: {cut}");
    assert!(cut > 0, "it was cut at least once");
}

/// The negative control of this file: on the bare filesystem the same broken device tears or loses a naive save
/// without a word.
#[test]
fn the_bare_filesystem_says_nothing() {
    let _one = one();
    let rig = Rig::new(Kind::Ext4);
    let disk = rig.mount(false).unwrap();
    let a: PathBuf = disk.path().join("a");
    save(&a, OLD).unwrap();
    OpenOptions::new().write(true).open(&a).unwrap().sync_all().unwrap();
    break_it(&rig, Broken::Write);
    assert_eq!(errno(save(&a, NEW)), None, "no error for a save that will never be there");
    drop(disk);
    rig.settle();
    rig.disk.set_faults(vec![]);
    let disk = rig.mount(false).unwrap();
    assert_ne!(fs::read(disk.path().join("a")).unwrap_or_default(), NEW);
}

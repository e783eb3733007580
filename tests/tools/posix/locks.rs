//! Locks between processes: POSIX, of open file descriptions, flock; blocking, and interrupted by a signal.

use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::kit::{Log, ROOT, file, lock, open, run_as, spawn, told};

pub const CHECKS: &[super::Check] = &[("locks", locks), ("blocking_locks", blocking_locks)];

const KINDS: [(&str, i32, i32); 2] =
    [("posix", libc::F_SETLK, libc::F_GETLK), ("ofd", libc::F_OFD_SETLK, libc::F_OFD_GETLK)];

fn locks(d: &Path, log: &mut Log) {
    let path = d.join("f");
    file(&path, b"content", (0, 0), 0o666);
    for (what, set, get) in KINDS {
        let fd = open(&path, OFlags::RDWR, 0).expect("open");
        log.note(format!("{what} shared"), lock(&fd, set, libc::F_RDLCK));
        let other = |kind| run_as(ROOT, || lock(open(&path, OFlags::RDWR, 0).expect("open"), set, kind));
        log.note("another shared", other(libc::F_RDLCK));
        log.note("another exclusive", other(libc::F_WRLCK));
        let seen = run_as(ROOT, || lock(open(&path, OFlags::RDWR, 0).expect("open"), get, libc::F_WRLCK));
        log.note("seen by another", seen);
        log.note("exclusive", lock(&fd, set, libc::F_WRLCK));
        log.note("another shared", other(libc::F_RDLCK));
        // A save that replaces the backing inode meanwhile.
        let saved = run_as(ROOT, || told(std::fs::write(&path, "saved").map_err(|_| Errno::IO)));
        log.note("rewritten meanwhile", (saved, other(libc::F_RDLCK)));
        log.note("unlock", (lock(&fd, set, libc::F_UNLCK), other(libc::F_WRLCK)));
        lock(&fd, set, libc::F_WRLCK);
        drop(open(&path, OFlags::RDONLY, 0));
        log.note("after the close of another descriptor of this process", other(libc::F_RDLCK));
        drop(fd);
        log.note("closed", other(libc::F_WRLCK));
        let reader = open(&path, OFlags::RDONLY, 0).expect("open");
        log.note("exclusive for a reader", lock(&reader, set, libc::F_WRLCK));
    }
    let fd = open(&path, OFlags::RDWR, 0).expect("open");
    let other = |op| run_as(ROOT, || told(flock(open(&path, OFlags::RDWR, 0).expect("open"), op)));
    log.note("flock", told(flock(&fd, FlockOperation::LockShared)));
    log.note("others", [FlockOperation::NonBlockingLockShared, FlockOperation::NonBlockingLockExclusive].map(other));
    log.note("upgrade", told(flock(&fd, FlockOperation::LockExclusive)));
    log.note("others", [FlockOperation::NonBlockingLockShared, FlockOperation::NonBlockingLockExclusive].map(other));
    drop(fd);
    log.note("closed", other(FlockOperation::NonBlockingLockExclusive));
}

/// Runs `wait`, which blocks, in a child; when it blocks, `then` happens.
fn blocked(wait: impl FnOnce() -> String, then: impl FnOnce(&super::kit::Child)) -> String {
    let child = spawn(ROOT, || {
        // SAFETY: a handler that does nothing, without SA_RESTART, so that the call ends.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
            libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
        }
        wait()
    });
    // In the kernel, asleep in the call that locks.
    let at = format!("/proc/{}/syscall", child.pid);
    let calls = [libc::SYS_fcntl, libc::SYS_flock].map(|n| format!("{n} "));
    while !std::fs::read_to_string(&at).is_ok_and(|s| calls.iter().any(|c| s.starts_with(c.as_str()))) {
        std::thread::yield_now();
    }
    then(&child);
    child.wait()
}

extern "C" fn nothing(_: i32) {}

fn blocking_locks(d: &Path, log: &mut Log) {
    let path = d.join("f");
    file(&path, b"content", (0, 0), 0o666);
    let open_it = || open(&path, OFlags::RDWR, 0).expect("open");
    for (what, set, wait) in [("posix", libc::F_SETLK, libc::F_SETLKW), ("ofd", libc::F_OFD_SETLK, libc::F_OFD_SETLKW)]
    {
        let fd = open_it();
        lock(&fd, set, libc::F_WRLCK);
        let got = blocked(|| lock(open_it(), wait, libc::F_WRLCK), |_| drop(lock(&fd, set, libc::F_UNLCK)));
        log.note(format!("{what} waits"), got);
        lock(&fd, set, libc::F_WRLCK);
        let got = blocked(|| lock(open_it(), wait, libc::F_WRLCK), |c| c.signal(libc::SIGUSR1));
        log.note("interrupted", got);
        let got = blocked(|| lock(open_it(), wait, libc::F_WRLCK), |c| c.signal(libc::SIGKILL));
        log.note("killed", got);
        log.note("still held", run_as(ROOT, || lock(open_it(), set, libc::F_RDLCK)));
    }
    let fd = open_it();
    let wait = || {
        let mine = open_it();
        // SAFETY: a descriptor that lives through the call.
        let rc = unsafe { libc::flock(mine.as_raw_fd(), libc::LOCK_EX) };
        if rc == 0 { "got it".to_owned() } else { std::io::Error::last_os_error().to_string() }
    };
    flock(&fd, FlockOperation::LockExclusive).expect("lock");
    log.note("flock waits", blocked(wait, |_| flock(&fd, FlockOperation::Unlock).expect("unlock")));
    flock(&fd, FlockOperation::LockExclusive).expect("lock");
    log.note("interrupted", blocked(wait, |c| c.signal(libc::SIGUSR1)));
}

//! What the checks share: notes, acting as an ordinary user in a process of its own, waiting for the clock.

use std::ffi::CString;
use std::fmt::Debug;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{self as rfs, AtFlags, CWD, Mode, OFlags, Stat};
use rustix::io::Errno;

/// What a check saw, a line each.
#[derive(Default)]
pub struct Log {
    pub lines: Vec<String>,
}

impl Log {
    pub fn note(&mut self, what: impl AsRef<str>, value: impl Debug) {
        self.lines.push(format!("{}: {value:?}", what.as_ref()));
    }
}

/// The value, or the number of the error.
pub fn told<T: Debug>(r: Result<T, Errno>) -> String {
    match r {
        Ok(v) => format!("{v:?}"),
        Err(e) => errno(e),
    }
}

pub fn errno(e: Errno) -> String {
    rustix::io::Errno::from_raw_os_error(e.raw_os_error()).to_string()
}

/// An identity.
#[derive(Clone, Copy, Debug)]
pub struct Who {
    pub name: &'static str,
    pub uid: u32,
    pub gid: u32,
    pub groups: &'static [u32],
}

pub const ROOT: Who = Who { name: "root", uid: 0, gid: 0, groups: &[0] };
/// In no other group.
pub const ANN: Who = Who { name: "ann", uid: 1001, gid: 1001, groups: &[] };
/// Also in the group 1003.
pub const BOB: Who = Who { name: "bob", uid: 1002, gid: 1002, groups: &[1003, 1004] };
pub const TEAM: u32 = 1003;
pub const ALL: [Who; 3] = [ROOT, ANN, BOB];

/// A process that runs `f`; its answer with [`Child::wait`].
pub struct Child {
    pub pid: i32,
    answer: OwnedFd,
}

impl Child {
    pub fn wait(self) -> String {
        let mut text = String::new();
        File::from(self.answer).read_to_string(&mut text).expect("the answer of a child");
        let mut status = 0;
        // SAFETY: `pid` is a child that nobody else waits for.
        unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0 { text } else { format!("ended {status:#x}") }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a child that was not waited for.
        unsafe { libc::kill(self.pid, signal) };
    }
}

/// Starts a process with an identity.
pub fn spawn(who: Who, f: impl FnOnce() -> String) -> Child {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
    // SAFETY: this program has one thread, so the child may run anything.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork");
    if pid > 0 {
        return Child { pid, answer: reader };
    }
    // Run by an ordinary user, the program itself stands for root; others it cannot become.
    // SAFETY: plain integers, and groups that are there.
    let is = (who.uid == 0 && !is_root())
        || unsafe {
            libc::setgroups(who.groups.len(), who.groups.as_ptr()) == 0
                && libc::setresgid(who.gid, who.gid, who.gid) == 0
                && libc::setresuid(who.uid, who.uid, who.uid) == 0
        };
    let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or_else(|_| "panic".into());
    let sent = is && File::from(writer).write_all(answer.as_bytes()).is_ok();
    // SAFETY: ends the child without the parent's exit handlers.
    unsafe { libc::_exit(i32::from(!sent)) }
}

/// Runs `f` with an identity.
pub fn run_as(who: Who, f: impl FnOnce() -> String) -> String {
    spawn(who, f).wait()
}

pub fn open(path: &Path, flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
    rfs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(mode))
}

pub const NEW: OFlags = OFlags::CREATE.union(OFlags::EXCL).union(OFlags::RDWR);

/// A file with content, owner and mode.
pub fn file(path: &Path, content: &[u8], owner: (u32, u32), mode: u32) {
    let fd = open(path, NEW, 0o600).expect("create");
    rustix::io::write(&fd, content).expect("write");
    drop(fd);
    own(path, owner, mode);
}

pub fn dir(path: &Path, owner: (u32, u32), mode: u32) {
    rfs::mkdir(path, Mode::from_raw_mode(0o700)).expect("mkdir");
    own(path, owner, mode);
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Owner and mode; an ordinary user stays the owner.
pub fn own(path: &Path, owner: (u32, u32), mode: u32) {
    let id = (Some(rfs::Uid::from_raw(owner.0)), Some(rfs::Gid::from_raw(owner.1)));
    let owned = rfs::chown(path, id.0, id.1);
    assert!(owned.is_ok() || !is_root(), "chown {}: {owned:?}", path.display());
    rfs::chmod(path, Mode::from_raw_mode(mode)).expect("chmod");
}

/// Mode, owner and links.
pub fn look(path: &Path) -> String {
    told(rfs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).map(|s| {
        let links = if s.st_mode & libc::S_IFMT == libc::S_IFDIR { 0 } else { s.st_nlink };
        format!("{:o} {}:{} links {links}", s.st_mode, s.st_uid, s.st_gid)
    }))
}

pub fn mode(path: &Path) -> String {
    told(rfs::stat(path).map(|s| format!("{:o}", s.st_mode & 0o7777)))
}

pub fn stat(path: &Path) -> Stat {
    rfs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).expect("stat")
}

pub fn content(path: &Path) -> String {
    std::fs::read(path).map_or_else(|e| e.to_string(), |d| d.escape_ascii().to_string())
}

/// Returns when a change now gets a later time than one before: the kernel's clock for files goes in steps.
pub fn tick() {
    let now = || rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    let start = now();
    while (now().tv_sec, now().tv_nsec) <= (start.tv_sec, start.tv_nsec) {
        std::thread::yield_now();
    }
}

/// What a command printed, with the directory's own path left out.
pub fn shell(dir: &Path, script: &str) -> String {
    let out = Command::new("bash").args(["-c", script]).current_dir(dir).env("LC_ALL", "C").output().expect("bash");
    let text = [out.stdout, out.stderr].map(|t| String::from_utf8_lossy(&t).into_owned()).concat();
    format!("{} {}", out.status.code().unwrap_or(-1), text.replace(&dir.display().to_string(), "DIR"))
}

pub fn cstring(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("no NUL")
}

/// `fcntl` with a lock.
pub fn lock(fd: impl AsFd, command: i32, kind: i32) -> String {
    use std::os::fd::AsRawFd;
    // SAFETY: all zeros is a lock of nothing.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    l.l_type = kind as i16;
    l.l_len = 10;
    // SAFETY: the descriptor and the lock live through the call.
    let rc = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, &raw mut l) };
    if rc == 0 {
        format!("ok type {} by {}", l.l_type, l.l_pid > 0)
    } else {
        std::io::Error::last_os_error().to_string()
    }
}

//! Listing: complete, while it changes, from remembered positions; and watching with inotify.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::path::Path;

use rustix::fs as rfs;

use super::kit::{Log, cstring, dir, shell};

pub const CHECKS: &[super::Check] = &[("listing", listing), ("positions", positions), ("inotify", inotify)];

/// `POSIX_ENTRIES`: how many names the listing has.
fn count() -> usize {
    std::env::var("POSIX_ENTRIES").ok().and_then(|n| n.parse().ok()).unwrap_or(2000)
}

/// opendir(3) and friends, as programs use them.
struct List(*mut libc::DIR);

impl List {
    fn open(path: &Path) -> Self {
        // SAFETY: a C string.
        let at = unsafe { libc::opendir(cstring(path).as_ptr()) };
        assert!(!at.is_null());
        Self(at)
    }
    fn next(&mut self) -> Option<String> {
        // SAFETY: an open directory; the entry is copied before the next call.
        unsafe {
            let e = libc::readdir(self.0);
            (!e.is_null()).then(|| CStr::from_ptr((*e).d_name.as_ptr()).to_string_lossy().into_owned())
        }
    }
    fn tell(&self) -> i64 {
        // SAFETY: an open directory.
        unsafe { libc::telldir(self.0) }
    }
    fn seek(&mut self, at: i64) {
        // SAFETY: an open directory, a position of its own.
        unsafe { libc::seekdir(self.0, at) }
    }
    fn rest(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.next()).filter(|n| !n.starts_with('.')).collect()
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: opened by us, closed once.
        unsafe { libc::closedir(self.0) };
    }
}

fn fill(d: &Path, n: usize) {
    for i in 0..n {
        // Hard to sort by accident, and cheap: no content.
        rfs::mknodat(rfs::CWD, d.join(format!("name-{i}")), rfs::FileType::Fifo, 0o644.into(), 0).expect("node");
    }
}

/// Every name that is there all the time is listed once, whatever comes and goes meanwhile.
fn listing(d: &Path, log: &mut Log) {
    let n = count();
    let at = d.join("many");
    dir(&at, (0, 0), 0o755);
    fill(&at, n);
    let mut list = List::open(&at);
    let mut seen: Vec<String> = std::iter::from_fn(|| list.next()).take(n / 3).collect();
    for i in (0..n).filter(|i| i % 10 == 0) {
        rfs::unlink(at.join(format!("name-{i}"))).expect("unlink");
        rfs::symlink("x", at.join(format!("new-{i}"))).expect("symlink");
        rfs::rename(at.join(format!("name-{}", i + 1)), at.join(format!("moved-{i}"))).expect("rename");
    }
    seen.extend(list.rest());
    let kept =
        |name: &str| name.strip_prefix("name-").and_then(|i| i.parse::<usize>().ok()).is_some_and(|i| i % 10 > 1);
    let of: Vec<_> = seen.iter().filter(|s| kept(s)).collect();
    log.note("once each", (of.len(), of.iter().collect::<BTreeSet<_>>().len()));
    log.note("again", shell(&at, "ls -U | wc -l; ls -f | sort | uniq -d | wc -l; find . -type l | wc -l"));
    log.note("removed", shell(d, "rm -r many; ls | wc -l"));
}

fn positions(d: &Path, log: &mut Log) {
    let at = d.join("some");
    dir(&at, (0, 0), 0o755);
    fill(&at, 500);
    let mut list = List::open(&at);
    let mut first = Vec::new();
    let mut marks = Vec::new();
    loop {
        let mark = list.tell();
        let Some(name) = list.next() else { break };
        marks.push(mark);
        first.push(name);
    }
    log.note("all", first.iter().collect::<BTreeSet<_>>().len());
    let wrong = [0, 1, 2, 77, 250, 499, 501].into_iter().filter(|i| {
        list.seek(marks[*i]);
        list.next().as_ref() != first.get(*i)
    });
    log.note("wrong after a seek", wrong.count());
    // SAFETY: an open directory.
    unsafe { libc::rewinddir(list.0) };
    let again: Vec<_> = std::iter::from_fn(|| list.next()).collect();
    log.note("the same again", again == first);
    let _staged = std::fs::File::create(at.join("staged")).expect("create");
    // SAFETY: as above.
    unsafe { libc::rewinddir(list.0) };
    log.note("with a file being written", list.rest().iter().filter(|n| *n == "staged").count());
}

fn inotify(d: &Path, log: &mut Log) {
    // SAFETY: no preconditions.
    let fd = unsafe { libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC) };
    // SAFETY: a C string and a descriptor.
    unsafe { libc::inotify_add_watch(fd, cstring(d).as_ptr(), libc::IN_ALL_EVENTS & !libc::IN_ACCESS) };
    shell(
        d,
        "echo x > f; echo y > f; echo z >> f; chmod 600 f; mv f g; ln g h; mkdir k; rm g; truncate -s 1 h; rmdir k",
    );
    let mut buf = [0_u8; 16384];
    // SAFETY: the kernel writes at most the size of `buf`.
    let n = unsafe { libc::read(fd, buf.as_mut_ptr().cast(), buf.len()) };
    let mut at = 0;
    while at < n as usize {
        let word = |o: usize| u32::from_ne_bytes(buf[at + o..at + o + 4].try_into().expect("four bytes"));
        let (mask, len) = (word(4), word(12) as usize);
        let name = String::from_utf8_lossy(&buf[at + 16..at + 16 + len]).trim_end_matches('\0').to_owned();
        log.note(name, format!("{mask:#x}"));
        at += 16 + len;
    }
    // SAFETY: ours.
    unsafe { libc::close(fd) };
}

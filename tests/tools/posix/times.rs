//! Times: which operation moves which, and what utimensat may set.

use std::path::Path;

use rustix::fs::{self as rfs, AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

use super::kit::{ALL, Log, NEW, dir, file, open, run_as, shell, stat, tick, told};

pub const CHECKS: &[super::Check] =
    &[("times_set", times_set), ("times_moved", times_moved), ("directory_times", directory_times)];

fn at(sec: i64, nsec: i64) -> Timespec {
    Timespec { tv_sec: sec, tv_nsec: nsec as _ }
}

fn set(path: &Path, a: Timespec, m: Timespec) -> String {
    told(rfs::utimensat(CWD, path, &Timestamps { last_access: a, last_modification: m }, AtFlags::empty()))
}

fn times_set(d: &Path, log: &mut Log) {
    let omit = at(0, UTIME_OMIT as i64);
    let shown = |p: &Path| {
        let s = stat(p);
        (s.st_atime, s.st_atime_nsec, s.st_mtime, s.st_mtime_nsec)
    };
    file(&d.join("f"), b"x", (1001, 1001), 0o666);
    dir(&d.join("d"), (1001, 1001), 0o777);
    for path in [d.join("f"), d.join("d")] {
        for (a, m) in [
            (at(1_000_000_000, 123_456_789), at(1_100_000_000, 999_999_999)),
            (omit, at(5, 5)),
            (at(7, 7), omit),
            (omit, omit),
            (at(-1, 0), at(-1, 500_000_000)),
            (at(-1_000_000_000, 1), at(-86_400, 999_999_999)),
            (at(0, 0), at(0, 1)),
            (at(1 << 32, 0), at(1 << 33, 5)),
            (at(0, 2_000_000_000), at(0, 0)),
        ] {
            log.note(format!("{a:?} {m:?}"), (set(&path, a, m), shown(&path)));
        }
        for who in ALL {
            let now = at(0, UTIME_NOW as i64);
            log.note(format!("{} now", who.name), run_as(who, || set(&path, now, now)));
            log.note(format!("{} then", who.name), run_as(who, || set(&path, at(9, 9), at(9, 9))));
            log.note(format!("{} half", who.name), run_as(who, || set(&path, now, omit)));
        }
        rfs::chmod(&path, Mode::from_raw_mode(0o644)).expect("chmod");
        for who in ALL {
            let now = at(0, UTIME_NOW as i64);
            log.note(format!("{} now, without write permission", who.name), run_as(who, || set(&path, now, now)));
        }
    }
    rfs::symlink("f", d.join("l")).expect("symlink");
    let times = Timestamps { last_access: at(3, 3), last_modification: at(4, 4) };
    log.note(
        "symlink",
        (told(rfs::utimensat(CWD, d.join("l"), &times, AtFlags::SYMLINK_NOFOLLOW)), shown(&d.join("l"))),
    );
    let fd = open(&d.join("open"), NEW, 0o644).expect("create");
    rustix::io::write(&fd, b"x").expect("write");
    log.note("of a file being written", (told(rfs::futimens(&fd, &times)), shown(&d.join("open"))));
    drop(fd);
    log.note("after its close", shown(&d.join("open")));
    log.note("cp -p, touch", shell(d, "cp -p open c; stat -c '%x %y' c; touch -d @77 c; stat -c %Y c; mv c e; stat -c %Y e; ln e e2; stat -c %Y e2"));
}

/// Which of the times of `path` `f` moves.
fn moved(path: &Path, f: impl FnOnce()) -> String {
    let before = stat(path);
    tick();
    f();
    let after = stat(path);
    let m = (before.st_mtime, before.st_mtime_nsec) != (after.st_mtime, after.st_mtime_nsec);
    let c = (before.st_ctime, before.st_ctime_nsec) != (after.st_ctime, after.st_ctime_nsec);
    format!("mtime {m} ctime {c}")
}

fn times_moved(d: &Path, log: &mut Log) {
    let (f, g) = (d.join("f"), d.join("g"));
    file(&f, b"content", (0, 0), 0o644);
    log.note("write", moved(&f, || std::fs::write(&f, "other").expect("write")));
    log.note("append", moved(&f, || drop(shell(d, "echo x >> f"))));
    log.note("same size", moved(&f, || drop(shell(d, "truncate -s 7 f; truncate -s 7 f"))));
    log.note("truncate to nothing", moved(&f, || drop(shell(d, ": > f"))));
    log.note("truncate nothing", moved(&f, || drop(shell(d, "truncate -s 0 f"))));
    log.note("open and close", moved(&f, || drop(open(&f, OFlags::RDWR, 0))));
    log.note(
        "write nothing",
        moved(&f, || assert!(open(&f, OFlags::RDWR, 0).and_then(|fd| rustix::io::write(&fd, b"")).is_ok())),
    );
    log.note("chmod", moved(&f, || rfs::chmod(&f, 0o600.into()).expect("chmod")));
    log.note("chown", moved(&f, || rfs::chown(&f, Some(rfs::Uid::from_raw(1)), None).expect("chown")));
    log.note("attribute", moved(&f, || rfs::setxattr(&f, "user.a", b"v", rfs::XattrFlags::empty()).expect("set")));
    log.note("link", moved(&f, || rfs::link(&f, &g).expect("link")));
    log.note("unlink", moved(&f, || rfs::unlink(&g).expect("unlink")));
    let fd = open(&f, OFlags::RDWR, 0).expect("open");
    log.note("rename", moved(&f, || rfs::rename(&f, &g).and_then(|()| rfs::rename(&g, &f)).expect("rename")));
    log.note("rename over", {
        file(&g, b"", (0, 0), 0o644);
        tick();
        let before = rfs::fstat(&fd).expect("stat");
        rfs::rename(&g, &f).expect("rename");
        let after = rfs::fstat(&fd).expect("stat");
        (before.st_ctime, before.st_ctime_nsec) != (after.st_ctime, after.st_ctime_nsec)
    });
    let fd = open(&d.join("n"), NEW, 0o644).expect("create");
    rustix::io::write(&fd, b"x").expect("write");
    log.note("close after a write", moved(&d.join("n"), move || drop(fd)));
    let fd = open(&d.join("n"), OFlags::WRONLY | OFlags::TRUNC, 0).expect("open");
    rustix::io::write(&fd, b"x").expect("write");
    log.note("sync", moved(&d.join("n"), || rfs::fsync(&fd).expect("sync")));
}

fn directory_times(d: &Path, log: &mut Log) {
    let at = d.join("d");
    let (a, b) = (at.join("a"), at.join("b"));
    dir(&at, (0, 0), 0o755);
    log.note("create", moved(&at, || file(&a, b"", (0, 0), 0o644)));
    let mut fd = None;
    log.note("create, still open", moved(&at, || fd = open(&b, NEW, 0o644).ok()));
    let fd = fd.expect("created");
    rustix::io::write(&fd, b"x").expect("write");
    log.note("its sync", moved(&at, || rfs::fsync(&fd).expect("sync")));
    log.note("its close", moved(&at, move || drop(fd)));
    log.note("rewrite", moved(&at, || std::fs::write(&a, "content").expect("write")));
    log.note("append", moved(&at, || drop(shell(&at, "echo x >> a"))));
    log.note("chmod within", moved(&at, || rfs::chmod(&a, 0o600.into()).expect("chmod")));
    log.note("link", moved(&at, || rfs::link(&a, at.join("l")).expect("link")));
    log.note("unlink", moved(&at, || rfs::unlink(at.join("l")).expect("unlink")));
    let open_one = open(&at.join("o"), NEW, 0o644).expect("create");
    log.note("unlink of one being written", moved(&at, || rfs::unlink(at.join("o")).expect("unlink")));
    drop(open_one);
    log.note("rename", moved(&at, || rfs::rename(&a, at.join("c")).expect("rename")));
    log.note("mkdir", moved(&at, || rfs::mkdir(at.join("k"), 0o755.into()).expect("mkdir")));
    log.note("rmdir", moved(&at, || rfs::rmdir(at.join("k")).expect("rmdir")));
    log.note("symlink", moved(&at, || rfs::symlink("x", at.join("s")).expect("symlink")));
    log.note(
        "fifo",
        moved(&at, || rfs::mknodat(CWD, at.join("p"), rfs::FileType::Fifo, 0o644.into(), 0).expect("fifo")),
    );
    log.note("chmod", moved(&at, || rfs::chmod(&at, 0o700.into()).expect("chmod")));
    let fixed = Timestamps {
        last_access: Timespec { tv_sec: 5, tv_nsec: 5 },
        last_modification: Timespec { tv_sec: 6, tv_nsec: 6 },
    };
    rfs::utimensat(CWD, &at, &fixed, AtFlags::empty()).expect("times");
    std::fs::write(at.join("c"), "again").expect("write");
    log.note("set, then a rewrite within", (stat(&at).st_mtime, stat(&at).st_mtime_nsec));
    log.note("and a chmod", (rfs::chmod(&at, 0o755.into()).is_ok(), stat(&at).st_mtime));
}

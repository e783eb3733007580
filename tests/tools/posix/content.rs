//! Content: appends, holes, large files, maps, direct I/O, copies, and what may be done to an open file.

use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{self as rfs, AtFlags, CWD, FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::{pread, pwrite, read, write};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};

use super::kit::{Log, NEW, ROOT, content, file, open, run_as, shell, spawn, told};

pub const CHECKS: &[super::Check] = &[
    ("appends", appends),
    ("holes", holes),
    ("sizes", sizes),
    ("direct", direct),
    ("copies", copies),
    ("removed_files", removed_files),
    ("maps", maps),
    ("edges", edges),
    ("synchronous", synchronous),
    ("limits", limits),
];

fn appends(d: &Path, log: &mut Log) {
    file(&d.join("log"), b"", (0, 0), 0o644);
    let jobs: Vec<_> = (0..8_u8)
        .map(|i| {
            spawn(ROOT, || {
                let fd = open(&d.join("log"), OFlags::WRONLY | OFlags::APPEND, 0).expect("open");
                let line = [vec![b'a' + i; 99], vec![b'\n']].concat();
                (0..100).map(|_| write(&fd, &line).expect("write")).sum::<usize>().to_string()
            })
        })
        .collect();
    log.note("wrote", jobs.into_iter().map(super::kit::Child::wait).collect::<Vec<_>>());
    let all = std::fs::read_to_string(d.join("log")).expect("text");
    let whole = all.lines().filter(|l| l.len() == 99 && l.bytes().all(|b| b == l.as_bytes()[0])).count();
    log.note("whole lines", (whole, all.len()));
    let fd = open(&d.join("log"), OFlags::RDWR | OFlags::APPEND, 0).expect("open");
    log.note("pwrite appends all the same", (told(pwrite(&fd, b"end", 0)), rfs::fstat(&fd).expect("stat").st_size));
}

fn holes(d: &Path, log: &mut Log) {
    let fd = open(&d.join("f"), NEW, 0o644).expect("create");
    let seek = |what| told(rfs::seek(&fd, what));
    pwrite(&fd, &[1; 4096], 1 << 20).expect("write");
    rfs::ftruncate(&fd, 4 << 20).expect("truncate");
    let look = |log: &mut Log, what: &str| {
        let at = [SeekFrom::Data(0), SeekFrom::Hole(0), SeekFrom::Data(1 << 20), SeekFrom::Hole(1 << 20)].map(seek);
        let far = [SeekFrom::Data(3 << 20), SeekFrom::Hole(4 << 20), SeekFrom::Data(5 << 20)].map(seek);
        let st = rfs::fstat(&fd).expect("stat");
        log.note(what, (at, far, st.st_size, st.st_blocks));
    };
    look(log, "sparse");
    let modes = [
        ("allocate", FallocateFlags::empty(), 0, 65536),
        ("allocate beyond", FallocateFlags::empty(), 4 << 20, 65536),
        ("keep size", FallocateFlags::KEEP_SIZE, 5 << 20, 65536),
        ("punch", FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 1 << 20, 4096),
        ("punch in part", FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 100, 50),
        ("punch without keep", FallocateFlags::PUNCH_HOLE, 0, 4096),
        ("zero", FallocateFlags::ZERO_RANGE, 0, 8192),
        ("zero keep", FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 6 << 20, 8192),
        ("nothing", FallocateFlags::empty(), 0, 0),
        ("too far", FallocateFlags::empty(), i64::MAX as u64, 10),
    ];
    for (what, flags, at, len) in modes {
        log.note(what, told(rfs::fallocate(&fd, flags, at, len)));
        look(log, what);
    }
    drop(fd);
    log.note("after the close", shell(d, "stat -c '%s %b' f; md5sum f"));
    // A rewrite that stays sparse.
    log.note("sparse copy", shell(d, "cp --sparse=always f g; cmp f g; stat -c %s g"));
}

fn sizes(d: &Path, log: &mut Log) {
    let fd = open(&d.join("f"), NEW, 0o644).expect("create");
    for at in [(2_u64 << 30) - 1, 2 << 30, 3 << 30, (4 << 30) - 2, 5 << 30, 1 << 40] {
        log.note(format!("write at {at}"), told(pwrite(&fd, b"abc", at)));
        let mut b = [0; 5];
        log.note("read", (told(pread(&fd, &mut b, at - 1)), b, rfs::fstat(&fd).expect("stat").st_size));
    }
    for size in [5_u64 << 30, 100, 0, 4097, 1 << 33] {
        log.note(
            format!("resize to {size}"),
            (told(rfs::ftruncate(&fd, size)), rfs::fstat(&fd).expect("stat").st_size),
        );
    }
    log.note("too large", told(pwrite(&fd, b"x", i64::MAX as u64 - 1).map(|_| ())));
    log.note("resize too large", told(rfs::ftruncate(&fd, i64::MAX as u64)));
    log.note("grown part", {
        let mut b = [1; 10];
        (told(pread(&fd, &mut b, 4090)), b)
    });
    drop(fd);
    log.note("closed", shell(d, "stat -c '%s' f"));
}

#[allow(clippy::naive_bytecount, reason = "a page, once")]
fn direct(d: &Path, log: &mut Log) {
    let fd = open(&d.join("f"), NEW | OFlags::DIRECT, 0o644);
    log.note("open", told(fd.as_ref().map(|_| ()).map_err(|e| *e)));
    let Ok(fd) = fd else { return };
    let size = 64 << 10;
    // SAFETY: a new private map, which nobody else knows.
    let page = unsafe {
        let at = rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            size,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        );
        std::slice::from_raw_parts_mut(at.expect("memory").cast::<u8>(), size)
    };
    page.fill(7);
    log.note("write", told(pwrite(&fd, &*page, 0)));
    log.note("over it", told(pwrite(&fd, &page[..4096], 4096)));
    page.fill(0);
    log.note("read", (told(pread(&fd, &mut *page, 4096)), page.iter().filter(|b| **b == 7).count()));
    let buffered = open(&d.join("f"), OFlags::RDWR, 0).expect("open");
    pwrite(&buffered, b"buffered", 8192).expect("write");
    log.note(
        "sees a buffered write",
        (told(pread(&fd, &mut page[..4096], 8192)), page[..8].escape_ascii().to_string()),
    );
    page.fill(9);
    log.note(
        "is seen by a buffered read",
        (told(pwrite(&fd, &page[..4096], 0)), {
            let mut b = [0; 2];
            (told(pread(&buffered, &mut b, 4095)), b)
        }),
    );
    log.note("past the end", told(pread(&fd, &mut page[..4096], 1 << 20)));
}

fn copies(d: &Path, log: &mut Log) {
    let data: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
    file(&d.join("a"), &data, (0, 0), 0o644);
    let a = open(&d.join("a"), OFlags::RDWR, 0).expect("open");
    let b = open(&d.join("b"), NEW, 0o644).expect("create");
    let copy =
        |from, at, to, until, len| told(rfs::copy_file_range(from, Some(&mut { at }), to, Some(&mut { until }), len));
    log.note("whole", copy(&a, 0, &b, 0, 100_000));
    log.note("past the end", copy(&a, 90_000, &b, 200_000, 50_000));
    log.note("at the end", copy(&a, 100_000, &b, 0, 10));
    log.note("within one file", copy(&a, 0, &a, 150_000, 1000));
    log.note("overlapping", copy(&a, 0, &a, 500, 1000));
    let read_only = open(&d.join("b"), OFlags::RDONLY, 0).expect("open");
    log.note("into one open for reading", copy(&a, 0, &read_only, 0, 10));
    drop((a, b, read_only));
    log.note("result", shell(d, "md5sum a b; stat -c %s a b"));
    log.note(
        "cp, mv, cat",
        shell(d, "cp a c; mv c e; cat e a > g; cmp a e; stat -c %s g; cp --reflink=auto a h; cmp a h"),
    );
    log.note("sendfile", shell(d, "python3 -c \"import os,shutil; shutil.copyfile('a','i')\"; cmp a i"));
}

fn removed_files(d: &Path, log: &mut Log) {
    let path = d.join("f");
    file(&path, b"content", (0, 0), 0o644);
    let fd = open(&path, OFlags::RDWR, 0).expect("open");
    let staged = open(&d.join("s"), NEW, 0o644).expect("create");
    write(&staged, b"staged").expect("write");
    for (what, path, fd) in [("committed", &path, &fd), ("staged", &d.join("s"), &staged)] {
        log.note(format!("{what} unlink"), told(rfs::unlink(path)));
        log.note("links", rfs::fstat(fd).expect("stat").st_nlink);
        log.note("is there", path.exists());
        log.note("write", told(pwrite(fd, b"more", 3)));
        let mut b = [0; 20];
        log.note("read", (told(pread(fd, &mut b, 0)), b.escape_ascii().to_string()));
        log.note("resize", (told(rfs::ftruncate(fd, 2)), rfs::fstat(fd).expect("stat").st_size));
        log.note("mode", (told(rfs::fchmod(fd, Mode::from_raw_mode(0o600))), rfs::fstat(fd).expect("stat").st_mode));
        log.note("sync", told(rfs::fsync(fd)));
        let through = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let linked = rfs::linkat(CWD, through.as_str(), CWD, d.join("again"), AtFlags::SYMLINK_FOLLOW);
        log.note("link", told(linked));
        log.note("attribute", told(rfs::fsetxattr(fd, "user.a", b"v", rfs::XattrFlags::empty())));
        log.note(
            "a new one of that name",
            (told(std::fs::write(path, "new").map_err(|_| rustix::io::Errno::IO)), content(path)),
        );
        log.note("and this one", rfs::fstat(fd).expect("stat").st_size);
    }
    drop((fd, staged));
    log.note("left", shell(d, "ls; cat f s"));
    // Replaced by a rename, and a fifo and a directory that are gone.
    let old = open(&path, OFlags::RDWR, 0).expect("open");
    std::fs::write(d.join("new"), "other").expect("write");
    rfs::rename(d.join("new"), &path).expect("rename");
    let mut b = [0; 3];
    log.note("replaced", (rfs::fstat(&old).expect("stat").st_nlink, told(pread(&old, &mut b, 0)), b, content(&path)));
    rfs::mknodat(CWD, d.join("p"), rfs::FileType::Fifo, 0o666.into(), 0).expect("fifo");
    let fifo = open(&d.join("p"), OFlags::RDWR, 0).expect("open");
    rfs::unlink(d.join("p")).expect("unlink");
    log.note(
        "fifo",
        (told(rfs::fstat(&fifo).map(|s| s.st_nlink)), told(write(&fifo, b"x")), told(read(&fifo, &mut b))),
    );
    rfs::mkdir(d.join("gone"), 0o755.into()).expect("mkdir");
    let at = open(&d.join("gone"), OFlags::RDONLY | OFlags::DIRECTORY, 0).expect("open");
    rfs::rmdir(d.join("gone")).expect("rmdir");
    log.note("directory", told(rfs::fstat(&at).map(|s| s.st_nlink)));
    log.note("create in it", told(rfs::openat(&at, "x", NEW, 0o644.into()).map(drop)));
    log.note("mkdir in it", told(rfs::mkdirat(&at, "x", 0o755.into())));
    log.note("list it", shell(d, "mkdir h; cd h; rmdir ../h; ls -la; stat -c %h .; touch x 2>&1 | sed 's/.*: //'"));
}

fn maps(d: &Path, log: &mut Log) {
    let fd = open(&d.join("f"), NEW, 0o644).expect("create");
    rfs::ftruncate(&fd, 8192).expect("truncate");
    // SAFETY: a shared map of a file that only this check uses; unmapped below.
    let map = unsafe {
        let at = mmap(std::ptr::null_mut(), 8192, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0);
        std::slice::from_raw_parts_mut(at.expect("map").cast::<u8>(), 8192)
    };
    map[..5].copy_from_slice(b"hello");
    let mut b = [0; 5];
    log.note("read sees the map", (told(pread(&fd, &mut b, 0)), b.escape_ascii().to_string()));
    pwrite(&fd, b"world", 4096).expect("write");
    log.note("the map sees a write", map[4096..4101].escape_ascii().to_string());
    let other = run_as(ROOT, || {
        map[100] = 42;
        content(&d.join("f"))[..5].to_owned()
    });
    log.note("another process", (other, map[100]));
    // SAFETY: the range of the map above.
    log.note("msync", told(unsafe { msync(map.as_mut_ptr().cast(), 8192, MsyncFlags::SYNC) }));
    drop(fd);
    map[200] = 43;
    // SAFETY: as above; not used afterwards.
    unsafe { munmap(map.as_mut_ptr().cast(), 8192).expect("unmap") };
    log.note("in the end", shell(d, "md5sum f"));
}

fn edges(d: &Path, log: &mut Log) {
    file(&d.join("f"), b"0123456789", (0, 0), 0o644);
    let fd = open(&d.join("f"), OFlags::RDWR, 0).expect("open");
    log.note("nothing", (told(write(&fd, b"")), told(pread(&fd, &mut [0; 4], 8)), told(pread(&fd, &mut [0; 4], 10))));
    let w = open(&d.join("f"), OFlags::WRONLY, 0).expect("open");
    let r = open(&d.join("f"), OFlags::RDONLY, 0).expect("open");
    log.note("wrong way", (told(read(&w, &mut [0; 4])), told(write(&r, b"x")), told(rfs::ftruncate(&r, 1))));
    let at = open(d, OFlags::RDONLY, 0).expect("open");
    log.note("directory", (told(read(&at, &mut [0; 4])), told(open(d, OFlags::WRONLY, 0).map(drop))));
    log.note("file as directory", told(open(&d.join("f"), OFlags::DIRECTORY, 0).map(drop)));
    log.note("exclusive", told(open(&d.join("f"), NEW, 0o644).map(drop)));
    rfs::symlink("f", d.join("l")).expect("symlink");
    log.note("no follow", told(open(&d.join("l"), OFlags::NOFOLLOW, 0).map(drop)));
    rfs::symlink("new", d.join("dangling")).expect("symlink");
    log.note(
        "create through a link",
        (told(open(&d.join("dangling"), OFlags::CREATE | OFlags::WRONLY, 0o644).map(drop)), d.join("new").exists()),
    );
    log.note("exclusive through a link", told(open(&d.join("dangling"), NEW, 0o644).map(drop)));
    log.note("path only", told(open(&d.join("f"), OFlags::PATH, 0).and_then(|fd| rfs::fstat(&fd)).map(|s| s.st_size)));
    log.note(
        "seek",
        [SeekFrom::End(0), SeekFrom::End(5), SeekFrom::Start(3), SeekFrom::Current(-9)]
            .map(|s| told(rfs::seek(&fd, s))),
    );
    let st = rfs::statvfs(d).expect("statfs");
    log.note("statfs", (st.f_bsize, st.f_namemax, st.f_blocks > 0, st.f_bfree >= st.f_bavail, st.f_files > 0));
    log.note("space is taken", {
        let before = rfs::statvfs(d).expect("statfs").f_bfree;
        std::fs::write(d.join("big"), vec![1; 4 << 20]).expect("write");
        rfs::fsync(open(&d.join("big"), OFlags::RDONLY, 0).expect("open")).expect("sync");
        rfs::statvfs(d).expect("statfs").f_bfree < before
    });
}

fn synchronous(d: &Path, log: &mut Log) {
    for (what, flags) in [("O_SYNC", OFlags::SYNC), ("O_DSYNC", OFlags::DSYNC)] {
        let fd = open(&d.join(what), NEW | flags, 0o644).expect("create");
        log.note(what, (told(write(&fd, b"one")), told(pwrite(&fd, b"two", 10)), told(rfs::fdatasync(&fd))));
        log.note("content", content(&d.join(what)));
    }
    let at = open(d, OFlags::RDONLY | OFlags::DIRECTORY, 0).expect("open");
    log.note("directory", (told(rfs::fsync(&at)), told(rfs::fdatasync(&at))));
    let r = open(&d.join("O_SYNC"), OFlags::RDONLY, 0).expect("open");
    log.note("reader", (told(rfs::fsync(&r)), told(rfs::fdatasync(&r))));
}

/// What the protocol does not carry; see contrib/doc/POSIX.md.
fn limits(d: &Path, log: &mut Log) {
    log.note("O_TMPFILE", told(open(d, OFlags::TMPFILE | OFlags::RDWR, 0o600).map(drop)));
    file(&d.join("f"), &[7; 16384], (0, 0), 0o644);
    let fd = open(&d.join("f"), OFlags::RDWR, 0).expect("open");
    log.note("collapse", told(rfs::fallocate(&fd, FallocateFlags::COLLAPSE_RANGE, 0, 4096)));
    log.note("insert", told(rfs::fallocate(&fd, FallocateFlags::INSERT_RANGE, 0, 4096)));
    let all = rfs::StatxFlags::ALL;
    let st = rfs::statx(CWD, d.join("f"), AtFlags::empty(), all).expect("statx");
    log.note("birth time", rfs::StatxFlags::from_bits_retain(st.stx_mask).contains(rfs::StatxFlags::BTIME));
    log.note("extent map", shell(d, "filefrag f > /dev/null 2>&1; echo $?"));
    log.note("clone", shell(d, "cp --reflink=always f g 2>/dev/null; echo $?"));
}

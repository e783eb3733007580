//! What the kernel keeps and what it serves itself, on real mounts: never stale beyond the bound, never torn, never EIO.

#![allow(clippy::unwrap_used)] // helpers of tests: a failure there is a failure of the test

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::loopfs::{Kind, LoopFs};
use common::mount::{Mount, fsys};
use common::world::{World, still};
use common::{appended, can_mount, kinds, run, run_text, wait_until};
use fsys_mount::config::policy::{Durability, WriteMode};
use fsys_mount::fs::IoMode;

/// Files under `*.db` are always written in place.
const IN_PLACE: &str = r"rule=*.db:mode=in-place";

/// Runs a test on a fresh mount of every kind of file system asked for.
fn on_each(test: &str, options: &str, f: impl Fn(&LoopFs, &Path, &Path, &Mount)) {
    if !can_mount(test) {
        return;
    }
    for kind in kinds(&[Kind::Ext4, Kind::Xfs]) {
        let fs = LoopFs::new(kind, 512);
        let backing = fs.subdir("data");
        let mut mount = Mount::start(&backing, options);
        f(&fs, mount.path(), &backing, &mount);
        mount.stop();
    }
}

fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

fn eventually(what: &str, done: impl FnMut() -> bool) {
    assert!(wait_until(Duration::from_secs(60), done), "{what}");
}

fn open_rw(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// Runs a shell script as an ordinary user.
fn as_user(dir: &Path, script: &str) {
    run(Command::new("sh").args(["-ec", script]).current_dir(dir).uid(1000).gid(1000));
}

/// Section 4, `in-place`. The kernel serves such a file itself: with the daemon dead, open descriptors still read and
/// write the backing file, and nothing else does.
#[test]
fn in_place_files_are_served_by_the_kernel() {
    if !can_mount("in_place_files_are_served_by_the_kernel") {
        return;
    }
    let fs = LoopFs::new(Kind::Ext4, 512);
    let backing = fs.subdir("data");
    let mut mount = Mount::start(&backing, IN_PLACE);
    let (db, txt) = (mount.path().join("f.db"), mount.path().join("f.txt"));
    fs::write(&db, "served by the kernel").unwrap();
    fs::write(&txt, "served by the daemon").unwrap();
    assert_eq!(mount.status()["no_passthrough"], "");
    let (db, txt) = (open_rw(&db), open_rw(&txt));
    assert!(mount.counter("passthrough_opens") >= 2 && mount.counter("passthrough_fallbacks") == 0);
    mount.kill9();
    let mut head = [0; 6];
    db.read_exact_at(&mut head, 0).unwrap();
    assert_eq!(&head, b"served");
    db.write_all_at(b"SERVED", 0).unwrap();
    assert_eq!(text(&backing.join("f.db")).unwrap(), "SERVED by the kernel");
    assert!(txt.write_all_at(b"SERVED", 0).is_err(), "the control: this one is not");
    assert_eq!(
        db.sync_all().unwrap_err().raw_os_error(),
        Some(libc::ENOTCONN),
        "an fsync says that nobody waits for it"
    );
    drop((db, txt));
    mount.restart();
    assert_eq!(text(&mount.path().join("f.db")).unwrap(), "SERVED by the kernel");
    mount.stop();
}

/// P1, P5. In passthrough every descriptor and map sees every write; what still comes to the daemon acts on the same file.
#[test]
fn passthrough_is_one_file() {
    on_each("passthrough_is_one_file", IN_PLACE, |_, mnt, backing, mount| {
        let path = mnt.join("f.db");
        fs::write(&path, "0123456789").unwrap();
        let (a, b) = (open_rw(&path), File::open(&path).unwrap());
        let seen = || {
            let mut s = String::new();
            File::open(&path).unwrap().read_to_string(&mut s).unwrap();
            assert_eq!(Some(&s), text(&backing.join("f.db")).as_ref());
            assert_eq!(b.metadata().unwrap().len(), s.len() as u64);
            s
        };
        a.write_all_at(b"ab", 0).unwrap();
        assert_eq!(seen(), "ab23456789");
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"X").unwrap();
        assert_eq!(seen(), "ab23456789X");
        // truncate(2) and O_TRUNC by others, while it is open.
        run(Command::new("truncate").args(["-s", "5"]).arg(&path));
        assert_eq!(seen(), "ab234");
        fs::write(&path, "new").unwrap();
        assert_eq!(seen(), "new");
        a.write_all_at(b"N", 0).unwrap();
        assert_eq!(seen(), "New");
        rustix::fs::fallocate(&a, rustix::fs::FallocateFlags::empty(), 0, 5).unwrap();
        assert_eq!(seen(), "New\0\0");
        let from = File::open(&path).unwrap();
        assert_eq!(rustix::fs::copy_file_range(&from, Some(&mut 0), &a, Some(&mut 5), 3).unwrap(), 3);
        assert_eq!(seen(), "New\0\0New");
        assert_eq!(rustix::fs::seek(&b, rustix::fs::SeekFrom::Hole(0)).unwrap(), 8);
        // O_SYNC: each write comes to the daemon, beside descriptors that the kernel serves.
        let syncs = mount.counter("in_place_syncs");
        let sync = OpenOptions::new().write(true).custom_flags(libc::O_DSYNC).open(&path).unwrap();
        sync.write_all_at(b"S", 0).unwrap();
        assert_eq!(seen(), "Sew\0\0New");
        assert!(mount.counter("in_place_syncs") > syncs, "its flush is shared");
        // A shared map in another process, and one that outlives its descriptor.
        let py = "import mmap,os\nf=os.open('f.db',os.O_RDWR); m=mmap.mmap(f,8); os.close(f); m[0:1]=b'M'\n\
            assert open('f.db','rb').read(1)==b'M'\nopen('f.db','r+b').write(b'W')\nassert m[0:1]==b'W'\n";
        run(Command::new("python3").args(["-c", py]).current_dir(mnt));
        assert_eq!(seen(), "Wew\0\0New");
        let log = appended(mnt, "log.db", 8, 30);
        assert!((0..8).all(|i| log.lines().filter(|l| *l == i.to_string()).count() == 30), "no append is lost");
    });
}

/// P5. A write by somebody without the privilege takes set-user-ID away, one by root does not; capabilities go always.
/// exec(2) must not find the mode from before the write.
#[test]
fn writes_take_privileges_away() {
    on_each("writes_take_privileges_away", IN_PLACE, |_, mnt, _, _| {
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
        for name in ["f.db", "f.txt"] {
            let path = mnt.join(name);
            fs::write(&path, "x").unwrap();
            let set = |bits| fs::set_permissions(&path, fs::Permissions::from_mode(bits)).unwrap();
            set(0o6777);
            open_rw(&path).write_all(b"root").unwrap();
            assert_eq!(mode(&path), 0o6777, "{name}: root may");
            as_user(mnt, &format!("printf u | dd of={name} conv=notrunc 2>/dev/null"));
            assert_eq!(mode(&path), 0o777, "{name}: a user may not");
            // Set while a user has it open.
            let script =
                format!("exec 3<>{name}; touch ready-{name}; while [ -e ready-{name} ]; do :; done; echo u >&3");
            let mut user = Command::new("sh");
            fs::set_permissions(mnt, fs::Permissions::from_mode(0o777)).unwrap();
            let mut user = user.args(["-ec", &script]).current_dir(mnt).uid(1000).gid(1000).spawn().unwrap();
            let ready = mnt.join(format!("ready-{name}"));
            eventually("the user has it open", || ready.exists());
            set(0o6777);
            fs::remove_file(&ready).unwrap();
            assert!(user.wait().unwrap().success());
            assert_eq!(mode(&path), 0o777, "{name}: set while it was open");
        }
        // A program that is set-user-ID, written by a user, run at once: it has no privilege.
        fs::copy("/usr/bin/id", mnt.join("id")).unwrap();
        fs::set_permissions(mnt.join("id"), fs::Permissions::from_mode(0o4777)).unwrap();
        let whoami = |before: &str| {
            let mut sh = Command::new("sh");
            sh.args(["-ec", &format!("{before}exec ./id -u")]).current_dir(mnt).uid(1000).gid(1000);
            run_text(&mut sh).trim().to_owned()
        };
        assert_eq!(whoami(""), "0", "the control: it has");
        assert_eq!(whoami("head -c1 id | dd of=id conv=notrunc bs=1 2>/dev/null; "), "1000");
    });
}

/// No mix of opens, creations, truncations, renames between policies, removals and maps is ever answered EIO: whoever
/// serves a file's first descriptor serves all of them (mergerfs issue 1487).
#[test]
fn modes_never_mix() {
    on_each("modes_never_mix", &format!("{IN_PLACE},durability=relaxed,threads=4"), |_, mnt, _, mount| {
        let stop = AtomicBool::new(false);
        let bad = |r: &std::io::Result<()>| {
            let expected = [libc::ENOENT, libc::ESTALE, libc::EEXIST];
            r.as_ref().is_err_and(|e| !expected.contains(&e.raw_os_error().unwrap_or(0)))
        };
        let name = |n: usize| mnt.join(["a.db", "a.txt"][n % 2]);
        let work = |seed: u64| {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut kept: Vec<File> = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let path = name(rng.usize(..2));
                let mut options = OpenOptions::new();
                let (what, done) = match rng.usize(..8) {
                    0 => ("read", options.read(true).open(&path).map(|f| kept.push(f))),
                    1 => ("write", options.write(true).open(&path).and_then(|f| f.write_all_at(b"w", 0))),
                    2 => (
                        "rewrite",
                        options.write(true).truncate(true).open(&path).and_then(|f| f.write_all_at(b"t", 0)),
                    ),
                    3 => ("create", options.write(true).create(true).truncate(false).open(&path).map(|f| kept.push(f))),
                    4 => ("rename", fs::rename(&path, name(rng.usize(..2)))),
                    5 => ("unlink", fs::remove_file(&path)),
                    6 => ("dsync", options.write(true).custom_flags(libc::O_DSYNC).open(&path).map(|f| kept.push(f))),
                    _ => ("fstat", kept.last().map_or(Ok(()), |f| f.metadata().map(|_| ()))),
                };
                assert!(!bad(&done), "{what}: {done:?}");
                if let Some(f) = kept.last() {
                    let r = f.read_at(&mut [0; 4], 0).map(|_| ());
                    // Not open for reading.
                    assert!(!bad(&r) || r.as_ref().unwrap_err().raw_os_error() == Some(libc::EBADF), "{r:?}");
                }
                if rng.usize(..4) == 0 {
                    kept.clear();
                }
            }
        };
        std::thread::scope(|s| {
            let jobs: Vec<_> = (0..4).map(|seed| s.spawn(move || work(seed))).collect();
            // Ends early when one of them found something.
            wait_until(Duration::from_secs(10), || jobs.iter().any(std::thread::ScopedJoinHandle::is_finished));
            stop.store(true, Ordering::Relaxed);
            jobs.into_iter().for_each(|j| j.join().unwrap());
        });
        assert!(mount.counter("passthrough_opens") > 10, "both kinds were met");
    });
}

/// P2. What the kernel wrote unseen is flushed by close, fsync, the commit interval and a drain, as the level says; a
/// close after which nothing changed costs no flush.
#[test]
fn passthrough_writes_are_made_durable() {
    let one_at_a_time = format!("{IN_PLACE},commit_interval_ms=3600000");
    on_each("passthrough_writes_are_made_durable", &one_at_a_time, |fs, mnt, _, mount| {
        let path = mnt.join("f.db");
        fs::write(&path, "x").unwrap();
        run(fsys().arg("drain").arg(mnt));
        let syncs = || (mount.counter("in_place_syncs"), fs.flushes());
        let cost = |f: &dyn Fn()| {
            let before = syncs();
            f();
            let after = syncs();
            (after.0 - before.0, after.1 - before.1)
        };
        // Later than the granularity of change times.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(cost(&|| drop(File::open(&path).unwrap())), (0, 0));
        assert_eq!(cost(&|| drop(open_rw(&path))), (0, 0), "opened for writing, not written");
        let (asked, flushes) = cost(&|| open_rw(&path).write_all_at(b"close", 0).unwrap());
        assert!(asked == 1 && flushes >= 1, "close: {asked}, {flushes}");
        let f = open_rw(&path);
        f.write_all_at(b"fsync", 0).unwrap();
        let (asked, flushes) = cost(&|| f.sync_all().unwrap());
        // More than one: `fsys status` is started with a copy of `f`, whose close by exec could be that of a writer.
        assert!(asked >= 1 && flushes >= 1, "fsync: {asked}, {flushes}");
        f.write_all_at(b"drain", 0).unwrap();
        let (asked, flushes) = cost(&|| drop(run(fsys().arg("drain").arg(mnt))));
        assert!(asked >= 1 && flushes >= 1, "drain: {asked}, {flushes}");
        // fsync by another descriptor, which cannot write.
        f.write_all_at(b"other", 0).unwrap();
        let reader = File::open(&path).unwrap();
        assert!(cost(&|| reader.sync_all().unwrap()).1 >= 1);
    });
    let interval = format!("{IN_PLACE},durability=relaxed,commit_interval_ms=100");
    on_each("passthrough_writes_are_made_durable", &interval, |fs, mnt, _, _| {
        fs::write(mnt.join("f.db"), "x").unwrap();
        let f = open_rw(&mnt.join("f.db"));
        run(fsys().arg("drain").arg(mnt));
        let idle = || {
            let before = fs.flushes();
            std::thread::sleep(Duration::from_millis(500));
            fs.flushes() == before
        };
        eventually("nothing is flushed again and again for a file that is only open", idle);
        let before = fs.flushes();
        f.write_all_at(b"interval", 0).unwrap();
        eventually("within the interval, with the file open", || fs.flushes() > before);
    });
}

/// Without passthrough (switched off, or refused) everything is as with it.
#[test]
fn without_passthrough() {
    on_each("without_passthrough", &format!("{IN_PLACE},passthrough=off"), |_, mnt, backing, mount| {
        fs::write(mnt.join("f.db"), "old").unwrap();
        let f = open_rw(&mnt.join("f.db"));
        f.write_all_at(b"new", 0).unwrap();
        assert_eq!(text(&backing.join("f.db")).unwrap(), "new");
        f.sync_all().unwrap();
        assert_eq!(mount.counter("passthrough_opens"), 0);
        assert!(mount.counter("passthrough_fallbacks") > 0);
        assert!(mount.status()["no_passthrough"].as_str().unwrap().contains("switched off"));
    });
}

/// Every kind of change behind the mount is seen within the bound: by the watch, and without it by the time-out.
#[test]
fn changes_behind_the_mount_are_seen() {
    for options in ["", "watch_backing=off,cache_ms=300"] {
        on_each("changes_behind_the_mount_are_seen", options, |_, mnt, backing, mount| {
            fs::create_dir(mnt.join("d")).unwrap();
            let (m, b) = (mnt.join("d"), backing.join("d"));
            ["content", "mode", "moved", "gone", "size", "open"]
                .iter()
                .for_each(|n| fs::write(m.join(n), "old").unwrap());
            let names = |dir: &Path| {
                let mut all: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
                all.sort();
                all
            };
            // All of it is in the kernel's caches.
            std::thread::sleep(Duration::from_millis(50));
            let open = File::open(m.join("open")).unwrap();
            let read_open = || {
                let mut s = [0; 3];
                open.read_exact_at(&mut s, 0).unwrap();
                s
            };
            for _ in 0..2 {
                names(&m).iter().for_each(|n| drop(text(&m.join(n)).unwrap()));
                assert!(!m.join("new").exists() && !m.join("target").exists() && !m.join("sub").exists());
                assert_eq!(&read_open(), b"old");
            }
            // Not in this process, whose number is not the daemon's either, but as anybody else would do it.
            let sh = |script: &str| run(Command::new("sh").args(["-ec", script]).current_dir(&b));
            sh("printf new > content; chmod 600 mode; mv moved target; rm gone; echo more >> size; printf NEW > open");
            sh("printf hello > new; mkdir sub; printf x > sub/inner; ln -s new link");
            eventually("content", || text(&m.join("content")).as_deref() == Some("new"));
            eventually("attributes", || fs::metadata(m.join("mode")).unwrap().mode() & 0o777 == 0o600);
            eventually("rename", || !m.join("moved").exists() && m.join("target").exists());
            eventually("unlink", || !m.join("gone").exists());
            eventually("size", || fs::metadata(m.join("size")).unwrap().len() == 8);
            eventually("content of an open file", || &read_open() == b"NEW");
            eventually("a name that was missing", || text(&m.join("new")).as_deref() == Some("hello"));
            eventually("a directory", || text(&m.join("sub/inner")).as_deref() == Some("x"));
            eventually("the listing", || names(&m) == names(&b));
            // A file replaced by rename, as editors do.
            sh("printf second > t; mv t content");
            eventually("replaced", || text(&m.join("content")).as_deref() == Some("second"));
            sh("rm content");
            eventually("gone for good", || !m.join("content").exists());
            let watched = options.is_empty();
            assert_eq!(mount.counter("outside_changes") > 0, watched);
            assert_eq!(mount.status()["no_watch"] == "", watched);
        });
    }
}

/// The watch is what makes them seen: it is a short time against the time-outs that it allows.
#[test]
fn what_the_watch_allows_to_keep() {
    on_each("what_the_watch_allows_to_keep", "", |_, mnt, _, mount| {
        fs::write(mnt.join("f"), "x").unwrap();
        let look = || {
            fs::metadata(mnt.join("f")).unwrap();
            assert!(!mnt.join("missing").exists());
            assert_eq!(text(&mnt.join("f")).as_deref(), Some("x"));
            fs::read_dir(mnt).unwrap().for_each(|e| drop(e.unwrap()));
        };
        std::thread::sleep(Duration::from_millis(50));
        (0..3).for_each(|_| look());
        let trace = tempfile::NamedTempFile::new().unwrap();
        let mut strace = Command::new("strace")
            .args(["-f", "-e", "trace=read,pread64,newfstatat,openat,getdents64", "-o"])
            .arg(trace.path())
            .args(["-p", &mount.pid().as_raw_nonzero().to_string()])
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let seen = || fs::read_to_string(trace.path()).unwrap();
        eventually("strace is attached", || {
            drop(fs::metadata(mnt.join(format!("probe{}", seen().len()))));
            !seen().is_empty()
        });
        let before = seen().len();
        // Longer than the time-outs without a watch.
        std::thread::sleep(Duration::from_millis(1200));
        (0..5).for_each(|_| look());
        rustix::process::kill_process(rustix::process::Pid::from_child(&strace), rustix::process::Signal::INT).unwrap();
        strace.wait().unwrap();
        let log = seen().split_off(before);
        // Opens come to the daemon; nothing is looked up, read or listed again.
        assert!(!log.contains("pread64(") && !log.contains("getdents64("), "{log}");
        assert!(!log.contains("\"missing\""), "{log}");
    });
}

/// How often a page that was read is older than what was written before the read began, of how many reads; and whether the
/// one that is read after the last write is the last. One program writes through `to`, and this one reads with `read`.
fn older(to: &File, mut read: impl FnMut() -> u64 + Send) -> (u64, u64, bool) {
    const READS: u64 = 200;
    let (written, done, over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|s| {
        let reader = s.spawn(|| {
            let mut old = 0;
            while !over.load(Ordering::Acquire) {
                let least = written.load(Ordering::Acquire);
                old += u64::from(read() < least);
                done.fetch_add(1, Ordering::AcqRel);
            }
            (old, done.load(Ordering::Acquire), read() == written.load(Ordering::Acquire))
        });
        let mut n = 0_u64;
        while n < 2000 || done.load(Ordering::Acquire) < READS && !reader.is_finished() {
            n += 1;
            to.write_all_at(&n.to_le_bytes().repeat(512), 0).unwrap();
            written.store(n, Ordering::Release);
        }
        over.store(true, Ordering::Release);
        reader.join().unwrap()
    })
}

/// What goes past the kernel's cache, through a descriptor that can only write, is seen by all others: by read(2) and in
/// a map, while it is written and after.
#[test]
fn what_only_writes_is_seen_by_all() {
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
    let options = format!("mode=replace,{IN_PLACE},passthrough=off");
    on_each("what_only_writes_is_seen_by_all", &options, |_, dir, backing, _| {
        for name in ["staged", "in place.db"] {
            let path = dir.join(name);
            fs::write(&path, [0; 4096]).unwrap();
            let first = |page: &[u8]| u64::from_le_bytes(page[..8].try_into().unwrap());
            let to = OpenOptions::new().write(true).open(&path).unwrap();
            let reads = |from: File| {
                let mut page = [0; 4096];
                move || from.read_exact_at(&mut page, 0).map(|()| first(&page)).unwrap()
            };
            let (old, all, last) = older(&to, reads(File::open(&path).unwrap()));
            assert!((old, last) == (0, true), "{name}: {old} of {all} reads were old; the last: {last}");
            let from = File::open(&path).unwrap();
            // SAFETY: a fresh map of a file of this length, read within it and unmapped below, after the thread ended.
            let map = unsafe { mmap(std::ptr::null_mut(), 4096, ProtFlags::READ, MapFlags::SHARED, &from, 0) }.unwrap();
            let at = map as usize;
            // SAFETY: as above; the content changes meanwhile, so it is read as volatile.
            let (old, all, last) = older(&to, || unsafe { (at as *const u64).read_volatile() });
            // SAFETY: as above.
            unsafe { munmap(map, 4096) }.unwrap();
            assert!((old, last) == (0, true), "{name}: {old} of {all} looks were old; the last: {last}");
            if name == "staged" {
                let (old, _, last) = older(&to, reads(File::open(backing.join(name)).unwrap()));
                assert!(old > 0 && !last, "control: who reads the version before is found");
            }
        }
    });
}

/// A rewrite of a small file goes through the kernel's cache, so that it asks for capabilities once and not at each
/// truncation; a large one and an append go past it.
#[test]
fn who_serves_what_only_writes() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let w = World::open(dir.path(), still(Durability::Close, WriteMode::Replace));
    w.save("small", &[1; 4096]).unwrap();
    w.save("large", &vec![1; 200 << 10]).unwrap();
    let mode = |name, flags| w.io_mode(name, libc::O_WRONLY | flags).unwrap();
    assert_eq!(mode("small", libc::O_APPEND), IoMode::Uncached);
    assert!(matches!(mode("small", libc::O_TRUNC), IoMode::Cached { .. }));
    assert_eq!(mode("large", libc::O_TRUNC), IoMode::Uncached);
    w.shutdown().unwrap();
}

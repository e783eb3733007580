//! What programs see, on real mounts: a paragraph of the contract over each test.

#![allow(clippy::unwrap_used)] // helpers of tests: a failure there is a failure of the test

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::loopfs::{Kind, LoopFs};
use common::mount::{Mount, fsys};
use common::{appended, can_mount, kinds, run, wait_until};
use rustix::io::Errno;

/// Runs a test on a fresh mount of every kind of file system asked for.
fn on_each(test: &str, options: &str, f: impl Fn(&Path, &Path, &Mount)) {
    if !can_mount(test) {
        return;
    }
    for kind in kinds(&[Kind::Ext4, Kind::Xfs]) {
        let fs = LoopFs::new(kind, 512);
        let backing = fs.subdir("data");
        let mut mount = Mount::start(&backing, options);
        f(mount.path(), &backing, &mount);
        mount.stop();
    }
}

fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

fn errno<T>(r: std::io::Result<T>) -> Option<i32> {
    r.err().and_then(|e| e.raw_os_error())
}

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

fn eventually(what: &str, done: impl FnMut() -> bool) {
    assert!(wait_until(Duration::from_secs(60), done), "{what}");
}

/// P1. Every process sees every write at once; the backing directory holds committed versions only.
#[test]
fn live_view_committed_backing() {
    on_each("live_view_committed_backing", "", |mnt, backing, _| {
        fs::write(mnt.join("f"), "old").unwrap();
        assert_eq!(text(&backing.join("f")).as_deref(), Some("old"), "close returned: it is there");
        let mut f = File::create(mnt.join("f")).unwrap();
        f.write_all(b"ne").unwrap();
        assert_eq!(text(&mnt.join("f")).as_deref(), Some("ne"));
        assert_eq!(text(&backing.join("f")).as_deref(), Some("old"));
        f.write_all(b"w").unwrap();
        drop(f);
        assert_eq!(text(&backing.join("f")).as_deref(), Some("new"));
        assert_eq!(names(backing), [".fsys", "f"]);
        assert_eq!(names(mnt), ["f"]);
    });
}

/// P1. A child that closes its inherited copy on exec, while the parent is in the middle of a save, publishes nothing.
#[test]
fn a_fork_does_not_commit_half_a_save() {
    on_each("a_fork_does_not_commit_half_a_save", "", |mnt, backing, _| {
        fs::write(mnt.join("f"), "old").unwrap();
        let mut f = File::create(mnt.join("f")).unwrap();
        f.write_all(b"first ").unwrap();
        run(&mut Command::new("true"));
        assert_eq!(text(&backing.join("f")).as_deref(), Some("old"));
        f.write_all(b"second").unwrap();
        // From another thread of the same program: that is the program's own close.
        std::thread::spawn(move || drop(f)).join().unwrap();
        assert_eq!(text(&backing.join("f")).as_deref(), Some("first second"));
    });
}

/// Section 4. Shell redirections close a duplicate before anything was written, and write through inherited descriptors.
#[test]
fn redirections() {
    on_each("redirections", "", |mnt, backing, _| {
        let sh = |script: &str| run(Command::new("bash").args(["-ec", script]).current_dir(mnt));
        sh("echo one > f; echo two >> f; cat > g <<E\nhere\nE\n: > empty; { echo a; /bin/echo b; } > h");
        assert_eq!(text(&backing.join("f")).as_deref(), Some("one\ntwo\n"));
        assert_eq!(text(&backing.join("g")).as_deref(), Some("here\n"));
        assert_eq!(text(&backing.join("h")).as_deref(), Some("a\nb\n"));
        eventually("an empty version commits at the last close", || text(&backing.join("empty")).is_some());
        // A background job that keeps the file open, while another program follows it.
        let mut job = Command::new("bash")
            .args(["-c", "echo 1; read; echo 2"])
            .stdin(Stdio::piped())
            .stdout(File::create(mnt.join("log")).unwrap())
            .spawn()
            .unwrap();
        eventually("the first line is seen", || text(&mnt.join("log")).as_deref() == Some("1\n"));
        job.stdin.take().unwrap().write_all(b"go\n").unwrap();
        assert!(job.wait().unwrap().success());
        assert_eq!(text(&mnt.join("log")).as_deref(), Some("1\n2\n"));
        eventually("and committed", || text(&backing.join("log")).as_deref() == Some("1\n2\n"));
    });
}

/// P5. A name that exists only as a staged version is a name like any other.
#[test]
fn staged_names() {
    on_each("staged_names", "", |mnt, backing, _| {
        let open = |name: &str| {
            let mut f = OpenOptions::new().create_new(true).write(true).mode(0o600).open(mnt.join(name)).unwrap();
            f.write_all(b"x").unwrap();
            f
        };
        fs::create_dir(mnt.join("d")).unwrap();
        let _a = open("d/a");
        assert_eq!(names(&mnt.join("d")), ["a"]);
        assert_eq!(names(&backing.join("d")), [""; 0]);
        assert_eq!(errno(fs::remove_dir(mnt.join("d"))), Some(libc::ENOTEMPTY));
        assert_eq!(errno(fs::create_dir(mnt.join("d/a"))), Some(libc::EEXIST));
        assert_eq!(errno(OpenOptions::new().create_new(true).write(true).open(mnt.join("d/a"))), Some(libc::EEXIST));
        fs::set_permissions(mnt.join("d/a"), fs::Permissions::from_mode(0o640)).unwrap();
        rustix::fs::setxattr(mnt.join("d/a"), "user.k", b"v", rustix::fs::XattrFlags::empty()).unwrap();
        let m = fs::metadata(mnt.join("d/a")).unwrap();
        assert_eq!((m.nlink(), m.len(), m.mode() & 0o7777), (1, 1, 0o640));
        // The directory moves with the staged file inside.
        fs::rename(mnt.join("d"), mnt.join("e")).unwrap();
        assert_eq!(names(&mnt.join("e")), ["a"]);
        // Link and rename are commit points.
        fs::hard_link(mnt.join("e/a"), mnt.join("e/b")).unwrap();
        assert_eq!(fs::metadata(backing.join("e/a")).unwrap().nlink(), 2);
        assert_eq!(fs::metadata(backing.join("e/a")).unwrap().mode() & 0o7777, 0o640);
        let mut c = open("c");
        fs::rename(mnt.join("c"), mnt.join("c2")).unwrap();
        assert_eq!(text(&backing.join("c2")).as_deref(), Some("x"));
        c.write_all(b"y").unwrap();
        drop(c);
        assert_eq!((text(&backing.join("c")), text(&backing.join("c2")).as_deref()), (None, Some("xy")));
        // Over a staged name, and a staged name removed.
        let mut gone = open("target");
        fs::rename(mnt.join("c2"), mnt.join("target")).unwrap();
        gone.write_all(b"lost").unwrap();
        drop(gone);
        assert_eq!(text(&mnt.join("target")).as_deref(), Some("xy"));
        let mut removed = open("removed");
        fs::remove_file(mnt.join("removed")).unwrap();
        removed.write_all(b"z").unwrap();
        assert_eq!(removed.metadata().unwrap().nlink(), 0);
        drop(removed);
        assert!(!mnt.join("removed").exists() && !backing.join("removed").exists());
        // NOREPLACE and EXCHANGE.
        let _n = open("n");
        let flags = |from: &str, to: &str, f| {
            rustix::fs::renameat_with(rustix::fs::CWD, mnt.join(from), rustix::fs::CWD, mnt.join(to), f)
        };
        assert_eq!(flags("target", "n", rustix::fs::RenameFlags::NOREPLACE), Err(Errno::EXIST));
        flags("target", "n", rustix::fs::RenameFlags::EXCHANGE).unwrap();
        assert_eq!(text(&mnt.join("n")).as_deref(), Some("xy"));
        assert_eq!(text(&backing.join("target")).as_deref(), Some("x"));
    });
}

/// P5, P6. Number, change time, links and attributes of a file do not move because a commit replaced its inode.
#[test]
fn identity_survives_commits() {
    on_each("identity_survives_commits", "", |mnt, backing, _| {
        let path = mnt.join("f");
        fs::write(&path, "one").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4751)).unwrap();
        std::os::unix::fs::chown(&path, Some(1234), Some(4321)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o751)).unwrap();
        rustix::fs::setxattr(&path, "user.k", b"v", rustix::fs::XattrFlags::empty()).unwrap();
        let (before, below) = (fs::metadata(&path).unwrap(), fs::metadata(backing.join("f")).unwrap());
        let mut f = OpenOptions::new().write(true).truncate(true).open(&path).unwrap();
        f.write_all(b"two").unwrap();
        let written = f.metadata().unwrap();
        drop(f);
        let after = fs::metadata(&path).unwrap();
        assert_ne!(fs::metadata(backing.join("f")).unwrap().ino(), below.ino(), "it was replaced");
        assert_eq!(after.ino(), before.ino());
        assert_eq!((after.mode(), after.uid(), after.gid(), after.nlink()), (before.mode(), 1234, 4321, 1));
        assert_eq!((after.ctime(), after.ctime_nsec()), (written.ctime(), written.ctime_nsec()));
        assert_eq!((after.mtime(), after.mtime_nsec()), (written.mtime(), written.mtime_nsec()));
        let mut v = [0; 4];
        assert_eq!(rustix::fs::getxattr(&path, "user.k", &mut v[..]), Ok(1));
        // The number that became free below goes to nobody else.
        for i in 0..50 {
            fs::write(mnt.join(format!("g{i}")), "x").unwrap();
            assert_ne!(fs::metadata(mnt.join(format!("g{i}"))).unwrap().ino(), after.ino());
        }
        // Hard links are written in place, and stay links; a symlink stays one.
        fs::hard_link(&path, mnt.join("l")).unwrap();
        fs::write(&path, "three").unwrap();
        assert_eq!(text(&backing.join("l")).as_deref(), Some("three"));
        std::os::unix::fs::symlink("f", mnt.join("s")).unwrap();
        fs::write(mnt.join("s"), "four").unwrap();
        assert!(fs::symlink_metadata(backing.join("s")).unwrap().is_symlink());
        assert_eq!(text(&backing.join("f")).as_deref(), Some("four"));
    });
}

/// P5. Files in use: removed ones, mapped ones, appended ones, holes.
#[test]
fn files_in_use() {
    on_each("files_in_use", "", |mnt, backing, _| {
        fs::write(mnt.join("u"), "kept").unwrap();
        let mut u = OpenOptions::new().read(true).write(true).open(mnt.join("u")).unwrap();
        fs::remove_file(mnt.join("u")).unwrap();
        let mut s = String::new();
        u.read_to_string(&mut s).unwrap();
        assert_eq!((s.as_str(), u.metadata().unwrap().nlink()), ("kept", 0));
        // A reader that was there before a rewrite sees it, as on any file system.
        fs::write(mnt.join("r"), "before").unwrap();
        let mut r = File::open(mnt.join("r")).unwrap();
        fs::write(mnt.join("r"), "after").unwrap();
        s.clear();
        r.read_to_string(&mut s).unwrap();
        assert_eq!(s, "after");
        // Sixteen programs append.
        let log = appended(mnt, "log", 16, 20);
        assert!((0..16).all(|i| log.lines().filter(|l| *l == i.to_string()).count() == 20));
        assert_eq!(text(&backing.join("log")).unwrap(), log);
        // Shared maps in two processes, through Python's mmap; then sparse files.
        let py = "import mmap,os,subprocess,sys\n\
            f=os.open('m',os.O_RDWR|os.O_CREAT,0o644); os.ftruncate(f,8192); m=mmap.mmap(f,8192); m[0:5]=b'hello'\n\
            assert os.pread(f,5,0)==b'hello'\n\
            assert subprocess.run(['head','-c5','m'],stdout=subprocess.PIPE).stdout==b'hello'\n\
            m[4096:4101]=b'world'; m.flush(); m.close(); os.close(f)\n\
            assert open('m','rb').read()==b'hello'+bytes(4091)+b'world'+bytes(4091)\n";
        run(Command::new("python3").args(["-c", py]).current_dir(mnt));
        let sparse = File::create(mnt.join("sparse")).unwrap();
        sparse.write_all_at(b"end", 5 << 30).unwrap();
        let mut data = &sparse;
        assert_eq!(data.seek(SeekFrom::End(0)).unwrap(), (5 << 30) + 3, "larger than 4 GiB");
        assert!(rustix::fs::seek(&sparse, rustix::fs::SeekFrom::Data(0)).unwrap() > 1 << 30);
        drop(sparse);
        assert!(fs::metadata(backing.join("sparse")).unwrap().blocks() < 100);
    });
}

/// P8. `.fsys` cannot be seen, reached or made; nothing but committed files is added to the user's tree.
#[test]
fn the_hidden_directory() {
    on_each("the_hidden_directory", "", |mnt, _, _| {
        assert_eq!(errno(fs::metadata(mnt.join(".fsys"))), Some(libc::ENOENT));
        assert_eq!(errno(fs::read_dir(mnt.join(".fsys/failed"))), Some(libc::ENOENT));
        assert_eq!(errno(fs::create_dir(mnt.join(".fsys"))), Some(libc::EPERM));
        fs::write(mnt.join("f"), "x").unwrap();
        assert_eq!(errno(fs::rename(mnt.join("f"), mnt.join(".fsys"))), Some(libc::EPERM));
        assert_eq!(errno(fs::hard_link(mnt.join("f"), mnt.join(".fsys"))), Some(libc::EPERM));
        fs::create_dir(mnt.join("d")).unwrap();
        fs::create_dir(mnt.join("d/.fsys")).unwrap();
        assert!(mnt.join("d/.fsys").is_dir(), "only in the root is the name taken");
    });
}

/// Section 4. Level `fsync`: close returns at once; a drain, an fsync and the order of names make it true.
#[test]
fn level_fsync() {
    on_each("level_fsync", "durability=fsync,commit_interval_ms=3600000", |mnt, backing, _| {
        fs::write(mnt.join("a"), "x").unwrap();
        assert_eq!(text(&mnt.join("a")).as_deref(), Some("x"));
        assert_eq!(text(&backing.join("a")), None);
        // An operation on a name of the same directory comes after what was acknowledged before it.
        fs::create_dir(mnt.join("d")).unwrap();
        assert_eq!(text(&backing.join("a")).as_deref(), Some("x"));
        fs::write(mnt.join("b"), "y").unwrap();
        let c = File::create(mnt.join("c")).unwrap();
        c.write_all_at(b"z", 0).unwrap();
        c.sync_all().unwrap();
        assert_eq!(text(&backing.join("c")).as_deref(), Some("z"));
        assert_eq!(text(&backing.join("b")).as_deref(), Some("y"), "acknowledged before, not overtaken");
        fs::write(mnt.join("b"), "y2").unwrap();
        run(fsys().arg("drain").arg(mnt));
        assert_eq!(text(&backing.join("b")).as_deref(), Some("y2"));
        fs::write(mnt.join("b"), "y3").unwrap();
        File::open(mnt).unwrap().sync_all().unwrap();
        assert_eq!(text(&backing.join("b")).as_deref(), Some("y3"), "fsync of the directory");
    });
}

/// Section 4. The commit interval bounds what a crash may take.
#[test]
fn the_commit_interval() {
    on_each("the_commit_interval", "durability=relaxed,commit_interval_ms=100", |mnt, backing, _| {
        fs::write(mnt.join("a"), "x").unwrap();
        eventually("committed within the interval", || text(&backing.join("a")).as_deref() == Some("x"));
        // A version that its program keeps open, and is quiet.
        let log = File::create(mnt.join("log")).unwrap();
        log.write_all_at(b"line", 0).unwrap();
        eventually("a quiet open version too", || text(&backing.join("log")).as_deref() == Some("line"));
    });
}

/// P3. A full disk: the program gets ENOSPC, the old version stands, the failed one is kept and named.
#[test]
fn a_full_disk() {
    if !can_mount("a_full_disk") {
        return;
    }
    for kind in kinds(&[Kind::Ext4]) {
        let fs = LoopFs::new(kind, 300);
        let backing = fs.subdir("data");
        let mount = Mount::start(&backing, "");
        let path = mount.path().join("f");
        fs::write(&path, "old").unwrap();
        let mut f = File::create(&path).unwrap();
        let chunk = vec![b'x'; 1 << 20];
        let error = (0..1000).find_map(|_| f.write_all(&chunk).err()).expect("the disk is full at some time");
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        // The program closes regardless; std ignores the result, so it is asked here.
        let closed = rustix::fs::fsync(&f);
        assert_eq!(closed, Err(Errno::NOSPC));
        drop(f);
        assert_eq!(text(&path).as_deref(), Some("old"), "through the mount");
        assert_eq!(text(&backing.join("f")).as_deref(), Some("old"));
        let status = mount.status();
        assert_eq!(status["health"], "degraded");
        assert_eq!(status["failed"][0]["path"], "f");
        let kept: PathBuf = backing.join(".fsys/failed").join(status["failed"][0]["kept_as"].as_str().unwrap());
        assert!(fs::metadata(&kept).unwrap().len() > 0);
        fs::remove_file(&kept).unwrap();
        fs::write(&path, "new").unwrap();
        assert_eq!(text(&backing.join("f")).as_deref(), Some("new"), "and it goes on");
        let ended = fsys().arg("umount").arg(mount.path()).output().unwrap();
        assert_eq!(ended.status.code(), Some(64), "the end says that a version is kept: {ended:?}");
    }
}

/// P2, on the wire: what the daemon asks of the kernel for one save, in order, ending with the answer to close().
#[test]
fn order_of_system_calls() {
    on_each("order_of_system_calls", "", |mnt, _, mount| {
        fs::write(mnt.join("f"), "old").unwrap();
        let trace = tempfile::NamedTempFile::new().unwrap();
        let calls = "trace=sync_file_range,linkat,renameat,renameat2,fsync,fdatasync,syncfs,write,writev";
        let mut strace = Command::new("strace")
            .args(["-f", "-e", calls, "-o"])
            .arg(trace.path())
            .args(["-p", &mount.pid().as_raw_nonzero().to_string()])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let seen = || fs::read_to_string(trace.path()).unwrap();
        eventually("strace is attached", || {
            fs::write(mnt.join("probe"), "x").unwrap();
            seen().contains("linkat") || seen().contains("renameat")
        });
        let before = seen().len();
        fs::write(mnt.join("f"), "new").unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_child(&strace), rustix::process::Signal::INT).unwrap();
        strace.wait().unwrap();
        let log = seen().split_off(before);
        let at = |call: &str| log.find(call).unwrap_or_else(|| panic!("no {call} in\n{log}"));
        let rename = log.find("renameat").unwrap_or_else(|| panic!("no rename in\n{log}"));
        let sync = at("fsync(");
        assert!(at("sync_file_range(") < at("linkat(") && at("linkat(") < rename && rename < sync, "{log}");
        let dispatcher = log[..rename].lines().last().unwrap().split_whitespace().next().unwrap().to_owned();
        let answers = log[sync..].lines().filter(|l| l.starts_with(&dispatcher) && l.contains("write"));
        assert!(answers.count() >= 1, "the answer comes after the sync\n{log}");
        let early = log[..sync].lines().filter(|l| l.starts_with(&dispatcher) && l.contains("write"));
        assert_eq!(early.count(), 0, "and not before\n{log}");
    });
}

/// P2, P7. A drain ends also when directories with unsynced names were removed, more than are kept open.
#[test]
fn removed_directories_do_not_hold_up_a_drain() {
    on_each("removed_directories_do_not_hold_up_a_drain", "commit_interval_ms=3600000", |mnt, backing, _| {
        for i in 0..700 {
            let dir = mnt.join(format!("d{i}"));
            fs::create_dir(&dir).unwrap();
            fs::create_dir(dir.join("inner")).unwrap();
            fs::remove_dir(dir.join("inner")).unwrap();
        }
        (0..700).for_each(|i| fs::remove_dir(mnt.join(format!("d{i}"))).unwrap());
        run(fsys().args(["drain", "--timeout", "60"]).arg(mnt));
        assert_eq!(names(backing), [".fsys"]);
    });
}

/// P8. Descriptors of the daemon are bounded: a file that loses one of its names is not held open (git makes every
/// object under two names and removes one).
#[test]
fn names_that_come_and_go_hold_no_descriptors() {
    on_each("names_that_come_and_go_hold_no_descriptors", "durability=relaxed", |mnt, _, mount| {
        let fds = || fs::read_dir(format!("/proc/{}/fd", mount.pid().as_raw_nonzero())).unwrap().count();
        let before = fds();
        for i in 0..300 {
            let (temp, object) = (mnt.join("temp"), mnt.join(format!("object{i}")));
            fs::write(&temp, "x").unwrap();
            fs::hard_link(&temp, &object).unwrap();
            fs::remove_file(&temp).unwrap();
        }
        run(fsys().arg("drain").arg(mnt));
        eventually("all are let go", || fds() <= before + 20);
    });
}

//! P8. At each bound there is a defined answer: open files, staging space, the queue. Memory for inodes is in posix.rs.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::loopfs::{Kind, LoopFs};
use common::mount::{Mount, fsys};
use common::user::{NOBODY, UsersMount, as_user};
use common::{can_mount, full, run, run_text, say, wait_until};

/// Opens files `f0`, `f1`, ... of its directory until that fails, tells how many and the error, and keeps them open
/// until its standard input ends.
const OPENER: &str = "use POSIX (); use Fcntl; my ($d,$max)=@ARGV; my @open; my $e=0; $|=1; \
    for my $i (0..$max-1) { my $f; if (sysopen($f,\"$d/f$i\",O_RDWR|O_CREAT)) { push @open,$f } else { $e=$!+0; last } } \
    print scalar(@open),\" $e\\n\"; <STDIN>; POSIX::_exit(0);";

struct Opener {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Opener {
    fn start(dir: &Path, max: u64) -> Self {
        let mut command = Command::new("/usr/bin/perl");
        command.args(["-e", OPENER]).arg(dir).arg(max.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    /// How many files it has open, and why it has no more.
    fn told(&mut self) -> (u64, i32) {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        let (count, errno) = line.trim().split_once(' ').unwrap();
        (count.parse().unwrap(), errno.parse().unwrap())
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

/// The daemon may open `Max open files` descriptors. At that bound an open fails with EMFILE, as it does where a process
/// has no more; who has a file open goes on, saves are whole and durable, and when files are closed all is as before.
/// At the machine's own limit with `FSYS_TEST_FULL=1`.
#[test]
fn open_files_have_a_bound() {
    if !can_mount("open_files_have_a_bound") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 300);
    let backing = disk.subdir("data");
    let mut mount = Mount::start(&backing, "durability=close");
    let pid = mount.pid().as_raw_nonzero().get();
    let (openers, each) = if full() { (3, 15_000) } else { (2, 1_000) };
    if !full() {
        run(Command::new("prlimit").args(["--pid", &pid.to_string(), "--nofile=500:500"]));
    }
    fs::write(mount.path().join("old"), "old").unwrap();
    let mut writer = File::create(mount.path().join("saved")).unwrap();
    writer.write_all(b"before").unwrap();
    let mut all: Vec<_> = (0..openers)
        .map(|i| {
            let dir = mount.path().join(format!("d{i}"));
            fs::create_dir(&dir).unwrap();
            Opener::start(&dir, each)
        })
        .collect();
    let told: Vec<_> = all.iter_mut().map(Opener::told).collect();
    say(&format!("open files and error, each program: {told:?}"));
    assert!(told.iter().any(|(_, e)| *e == libc::EMFILE), "the bound was not reached: {told:?}");
    assert!(told.iter().all(|(_, e)| [0, libc::EMFILE].contains(e)), "{told:?}");
    let refused = File::open(mount.path().join("old")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EMFILE), "{refused}");
    // What is open goes on, to a durable end, from the reserve.
    for part in ["", " and", " after"] {
        writer.write_all(part.as_bytes()).unwrap();
        writer.sync_all().unwrap();
    }
    drop(writer);
    assert_eq!(fs::read_to_string(backing.join("saved")).unwrap(), "before and after");
    all.drain(..).for_each(Opener::end);
    // The kernel tells of last closes when it comes to it; the empty files are committed then.
    let again = wait_until(Duration::from_secs(60), || match fs::write(mount.path().join("new"), "new") {
        Err(e) if e.raw_os_error() == Some(libc::EMFILE) => false,
        r => r.is_ok(),
    });
    assert!(again, "closing makes no room");
    assert_eq!(fs::read_to_string(mount.path().join("old")).unwrap(), "old");
    assert_eq!(fs::read_to_string(backing.join("new")).unwrap(), "new");
    assert!(wait_until(Duration::from_secs(60), || mount.status()["handles"] == 0), "{}", mount.status());
    assert_eq!(mount.status()["health"], "healthy");
    let held = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert!(wait_until(Duration::from_secs(60), || held() < 100), "{} descriptors are left", held());
    mount.stop();
}

/// Files that are removed while a program writes them: nothing of them stays when it closes them.
#[test]
fn removed_files_are_let_go() {
    if !can_mount("removed_files_are_let_go") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 300);
    for options in ["", "mode=in-place"] {
        let backing = disk.subdir(if options.is_empty() { "data" } else { "in place" });
        let mut mount = Mount::start(&backing, options);
        let pid = mount.pid().as_raw_nonzero();
        let held = || {
            let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
            let links = fds.filter_map(|e| fs::read_link(e.unwrap().path()).ok());
            links.filter(|l| l.to_string_lossy().ends_with("(deleted)")).count()
        };
        for i in 0..40 {
            let path = mount.path().join(format!("f{i}"));
            if i % 4 == 3 {
                fs::write(&path, "old").unwrap();
            }
            let mut file = File::create(&path).unwrap();
            file.write_all(b"before").unwrap();
            if i % 2 == 0 {
                file.sync_all().unwrap();
            }
            fs::remove_file(&path).unwrap();
            assert!(i > 0 || held() > 0, "control: a removed file that is open is seen");
            if i % 3 > 0 {
                file.write_all(b"after").unwrap();
            }
        }
        let gone = wait_until(Duration::from_secs(60), || {
            fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
            held() == 0 && mount.status()["inodes"].as_u64() < Some(5)
        });
        assert!(gone, "{options}: {} descriptors of removed files, {} inodes", held(), mount.status()["inodes"]);
        mount.stop();
    }
}

/// Without the right to open by handle, each inode that the kernel knows holds a descriptor. At the bound a lookup
/// fails with EMFILE; when the kernel forgets, there is room again.
#[test]
fn inodes_of_a_users_own_mount_have_a_bound() {
    if !can_mount("inodes_of_a_users_own_mount_have_a_bound") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 300);
    fs::set_permissions(disk.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let backing = disk.subdir("data");
    chown(&backing, Some(NOBODY), Some(NOBODY)).unwrap();
    (0..1000).for_each(|i| drop(File::create(backing.join(format!("f{i}"))).unwrap()));
    let mount = UsersMount::start(&backing, &[]);
    let status = run_text(as_user(Path::new(fsys().get_program())).args(["status", "--json"]).arg(mount.path()));
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    run(as_user(Path::new("prlimit")).args(["--pid", &status["pid"].to_string(), "--nofile=500:500"]));
    // How many of the files from a number on are there, and the last error.
    let found = |from: u32| {
        let script = "my ($n,$e)=(0,0); for ($ARGV[1]..999) { if (lstat \"$ARGV[0]/f$_\") { $n++ } else { $e=$!+0 } } print \"$n $e\";";
        let mut perl = as_user(Path::new("/usr/bin/perl"));
        run_text(perl.args(["-e", script]).arg(mount.path()).arg(from.to_string()))
    };
    // Again where another test made the kernel forget meanwhile.
    let mut told = String::new();
    let full = wait_until(Duration::from_secs(60), || {
        told = found(0);
        told.ends_with(&format!(" {}", libc::EMFILE))
    });
    say(&format!("of 1000 inodes, with 500 descriptors, are known, and the error: {told}"));
    let (known, _) = told.split_once(' ').unwrap();
    assert!(full && known.parse::<u32>().unwrap() >= 300, "{told}");
    let room = wait_until(Duration::from_secs(60), || {
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        found(999) == "1 0"
    });
    assert!(room, "what the kernel forgot still holds descriptors");
    mount.stop();
}

/// Uncommitted versions hold at most `staging_max_bytes`. A write beyond fails with ENOSPC, and so does the close of
/// that file: the version before stands. Others are not concerned, and what was committed makes room.
#[test]
fn staging_space_has_a_bound() {
    if !can_mount("staging_space_has_a_bound") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 300);
    let backing = disk.subdir("data");
    let mount = Mount::start(&backing, "staging_max_bytes=1000000");
    let at = |name: &str| mount.path().join(name);
    fs::write(at("b"), "old").unwrap();
    let mut a = File::create(at("a")).unwrap();
    a.write_all(&vec![1; 600_000]).unwrap();
    let mut b = File::create(at("b")).unwrap();
    let refused = b.write_all(&vec![2; 600_000]).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC), "{refused}");
    let not_saved = b.sync_all().unwrap_err();
    assert_eq!(not_saved.raw_os_error(), Some(libc::ENOSPC), "{not_saved}");
    drop(b);
    assert_eq!(fs::read_to_string(backing.join("b")).unwrap(), "old");
    a.write_all(&vec![1; 200_000]).unwrap();
    a.sync_all().unwrap();
    drop(a);
    assert_eq!(fs::metadata(backing.join("a")).unwrap().len(), 800_000);
    fs::write(at("b"), vec![3; 900_000]).unwrap();
    assert_eq!(fs::read(backing.join("b")).unwrap(), vec![3; 900_000]);
    let status = mount.status();
    assert_eq!(status["counters"]["staged_bytes"], 0);
    // The one that was not saved is named until someone has looked at it.
    assert_eq!((&status["health"], &status["failed"][0]["path"]), (&"degraded".into(), &"b".into()), "{status}");
}

/// The queue holds `queue_max` commits. Who comes then waits, and is answered like all others.
#[test]
fn the_queue_has_a_bound() {
    const WRITERS: usize = 16;
    const FLUSH_US: u64 = 20_000;
    if !can_mount("the_queue_has_a_bound") {
        return;
    }
    let disk = LoopFs::slow(Kind::Ext4, 300, FLUSH_US);
    let backing = disk.subdir("data");
    let mut mount = Mount::start(&backing, "queue_max=1,batch_max=1,threads=4");
    let start = Instant::now();
    std::thread::scope(|s| {
        for i in 0..WRITERS {
            let path = mount.path().join(format!("f{i}"));
            s.spawn(move || fs::write(path, format!("content {i}")).unwrap());
        }
    });
    let took = start.elapsed();
    let waits = mount.counter("queue_full_waits");
    say(&format!("{WRITERS} saves, one in the queue: {waits} waits, {took:?}"));
    assert!(waits > 0, "the queue was never full: nothing was tested");
    // With one commit for each batch and a flush for each batch, nobody was answered before their own.
    assert!(took >= Duration::from_micros(FLUSH_US) * WRITERS as u32, "{took:?}");
    for i in 0..WRITERS {
        assert_eq!(fs::read_to_string(backing.join(format!("f{i}"))).unwrap(), format!("content {i}"));
    }
    mount.stop();
}

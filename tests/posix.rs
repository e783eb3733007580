//! P5. What the backing filesystem passes, the mount passes: the same program of checks (tests/tools/posix) on both,
//! as root and as two ordinary users, must see the same, but for what FUSE or its library cannot carry.
//! Each such difference is pinned here and explained in contrib/doc/POSIX.md.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use common::loopfs::{Kind, LoopFs};
use common::mount::{Mount, fsys};
use common::tools::tool;
use common::user::{NOBODY, UsersMount, as_user};
use common::{can_mount, env_number, kinds, run, run_text, say, wait_until};

/// Check, what is noted there, and what the mount answers.
const PINNED: [(&str, &str, &str); 9] = [
    ("limits", "O_TMPFILE", "Operation not supported"),
    ("limits", "collapse", "Operation not supported"),
    ("limits", "insert", "Operation not supported"),
    ("limits", "birth time", "false"),
    ("limits", "clone", "1"),
    // FIEMAP is not sent; root's FIBMAP is answered.
    ("limits", "extent map", "1"),
    // POSIX allows both errors; XFS has EEXIST where the child is not only staged.
    ("renames", "over full", "Directory not empty"),
    // chown(path, -1, -1): the kernel has nothing to send.
    ("chown", "to None:None", "()"),
    // The same where the one who should do it cannot: in an ordinary user's run.
    ("chown", "to None:None", "ended 0x100"),
];

fn seen(dir: &Path) -> Vec<String> {
    let mut command = Command::new(tool("posix"));
    command.arg(dir);
    if !common::full() && std::env::var_os("POSIX_ENTRIES").is_none() {
        command.env("POSIX_ENTRIES", "2000");
    }
    run_text(&mut command).lines().map(str::to_owned).collect()
}

/// The lines in which the two differ, those of the mount.
fn differences(raw: &[String], mount: &[String]) -> Vec<String> {
    let mut found: Vec<String> =
        raw.iter().zip(mount).filter(|(a, b)| a != b).map(|(a, b)| format!("{b} | raw {a}")).collect();
    if raw.len() != mount.len() {
        found.push(format!("{} lines, raw {}", mount.len(), raw.len()));
    }
    found
}

fn is_pinned(line: &str) -> bool {
    PINNED.iter().any(|(check, what, value)| {
        let of_mount = line.split(" | raw ").next().unwrap_or_default();
        of_mount.starts_with(check) && of_mount.contains(what) && of_mount.contains(value)
    })
}

fn compare(kind: Kind, options: &str) -> Vec<String> {
    let disk = LoopFs::new(kind, 2048);
    let (raw, backing) = (disk.subdir("raw"), disk.subdir("data"));
    let mut mount = Mount::start(&backing, options);
    let found = differences(&seen(&raw), &seen(mount.path()));
    mount.stop();
    found
}

fn matrix(test: &str, options: &str) {
    if !can_mount(test) {
        return;
    }
    for kind in kinds(&[Kind::Ext4, Kind::Xfs]) {
        let new: Vec<_> = compare(kind, options).into_iter().filter(|l| !is_pinned(l)).collect();
        assert!(new.is_empty(), "{} {options}:\n{}", kind.name(), new.join("\n"));
    }
}

#[test]
fn the_same_as_raw() {
    matrix("the_same_as_raw", "");
}

#[test]
fn the_same_as_raw_in_place() {
    matrix("the_same_as_raw_in_place", "mode=in-place");
}

#[test]
fn the_same_as_raw_replacing() {
    matrix("the_same_as_raw_replacing", "mode=replace");
}

/// A user's own mount, by fusermount3 and without any privilege: what of the checks a user can do.
#[test]
fn the_same_as_raw_for_a_users_own_mount() {
    if !can_mount("the_same_as_raw_for_a_users_own_mount") {
        return;
    }
    for kind in kinds(&[Kind::Ext4, Kind::Xfs]) {
        let disk = LoopFs::new(kind, 2048);
        fs::set_permissions(disk.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (raw, backing) = (disk.subdir("raw"), disk.subdir("data"));
        for dir in [&raw, &backing] {
            std::os::unix::fs::chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let mount = UsersMount::start(&backing, &[]);
        let of = |dir: &Path| -> Vec<String> {
            let mut command = as_user(&tool("posix"));
            run_text(command.arg(dir).env("POSIX_ENTRIES", "2000")).lines().map(str::to_owned).collect()
        };
        let (raw, mounted) = (of(&raw), of(mount.path()));
        let cut = raw.iter().filter(|l| l.contains("ends here")).count();
        say(&format!("{}: {} lines, {cut} checks need another user or a right", kind.name(), raw.len()));
        assert!(raw.len() > 500 && cut < 15, "little was checked");
        let new: Vec<_> = differences(&raw, &mounted).into_iter().filter(|l| !is_pinned(l)).collect();
        assert!(new.is_empty(), "{}:\n{}", kind.name(), new.join("\n"));
        mount.stop();
    }
}

/// Control: a mount that forbids what the backing mount allows is told from it.
#[test]
fn the_comparison_sees_a_difference() {
    if !can_mount("the_comparison_sees_a_difference") {
        return;
    }
    let found = compare(Kind::Ext4, "noexec,nosuid,nodev");
    for check in ["execute", "set_user_id", "owners ann uses it"] {
        assert!(found.iter().any(|l| l.starts_with(check) && !is_pinned(l)), "{check} not found in {found:#?}");
    }
}

/// Set-user-ID, devices and execution are as on the backing mount, also below another one that forbids them.
#[test]
fn mount_flags_are_those_of_the_backing_mount() {
    if !can_mount("mount_flags_are_those_of_the_backing_mount") {
        return;
    }
    let options =
        |path: &Path| run_text(Command::new("findmnt").args(["-n", "-o", "OPTIONS", "--mountpoint"]).arg(path));
    let strict = LoopFs::with_options(Kind::Ext4, 300, &["nosuid", "nodev", "noexec"]);
    let mut mount = Mount::start(&strict.subdir("data"), "");
    let shown = options(mount.path());
    assert!(["nosuid", "nodev", "noexec"].iter().all(|o| shown.contains(o)), "{shown}");
    mount.stop();

    let disk = LoopFs::new(Kind::Ext4, 300);
    let backing = disk.subdir("data");
    let below = disk.subdir("data/below");
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "nosuid,nodev,size=1m", "fsys-test"]).arg(&below));
    let mut mount = Mount::start(&backing, "");
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let shown = options(mount.path());
        assert!(!shown.contains("nosuid") && !shown.contains("nodev"), "{shown}");
        for dir in [&below, &backing] {
            fs::copy("/usr/bin/id", dir.join("id")).or_else(|_| fs::write(dir.join("id"), "x").map(|()| 0)).unwrap();
            fs::set_permissions(dir.join("id"), fs::Permissions::from_mode(0o4755)).unwrap();
        }
        assert_eq!(fs::metadata(mount.path().join("id")).unwrap().mode() & 0o7777, 0o4755);
        assert_eq!(fs::metadata(mount.path().join("below/id")).unwrap().mode() & 0o7777, 0o755);
        run(Command::new("mknod").arg(below.join("null")).args(["c", "1", "3"]));
        assert!(fs::write(mount.path().join("below/null"), "x").is_err());
        // Files of the other file system are used like any; they cannot be moved across.
        fs::write(mount.path().join("below/f"), "content").unwrap();
        assert_eq!(fs::read_to_string(below.join("f")).unwrap(), "content");
        std::os::unix::fs::symlink("f", below.join("link")).unwrap();
        run(Command::new("mkfifo").arg(mount.path().join("below/fifo")));
        assert_eq!(fs::read_link(mount.path().join("below/link")).unwrap(), Path::new("f"));
        assert_eq!(fs::read_to_string(mount.path().join("below/link")).unwrap(), "content");
        assert!(fs::metadata(mount.path().join("below/fifo")).unwrap().file_type().is_fifo());
        let across = fs::rename(mount.path().join("below/f"), mount.path().join("f")).unwrap_err();
        assert_eq!(across.raw_os_error(), Some(libc::EXDEV));
        let (a, b) =
            (rustix::fs::statfs(mount.path()).unwrap(), rustix::fs::statfs(mount.path().join("below")).unwrap());
        assert_ne!(a.f_blocks, b.f_blocks, "statfs is of the file system that holds the file");
        mount.stop();
    }));
    drop(mount);
    run(Command::new("umount").arg(&below));
    result.unwrap_or_else(|e| std::panic::resume_unwind(e));
}

fn rss_kb(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// One at a time: who makes the kernel forget takes what another counts.
static FORGETTING: Mutex<()> = Mutex::new(());

/// P8. An inode that the kernel forgot while a change of it was uncommitted is forgotten here when it is.
#[test]
fn inodes_with_debts_are_forgotten_later() {
    if !can_mount("inodes_with_debts_are_forgotten_later") {
        return;
    }
    let _alone = FORGETTING.lock().unwrap_or_else(PoisonError::into_inner);
    let disk = LoopFs::new(Kind::Ext4, 64);
    for mode in ["in-place", "replace", "journal"] {
        let backing = disk.subdir(mode);
        (0..20).for_each(|n| fs::write(backing.join(format!("f{n}")), "old").unwrap());
        let mut mount = Mount::start(&backing, &format!("durability=relaxed,mode={mode},commit_interval_ms=60000"));
        for n in 0..20 {
            let file = fs::OpenOptions::new().write(true).open(mount.path().join(format!("f{n}"))).unwrap();
            file.write_all_at(b"new", 0).unwrap();
        }
        fs::create_dir(mount.path().join("d")).unwrap();
        fs::write(mount.path().join("d/new"), "new").unwrap();
        // A directory goes after what was in it.
        (0..3).for_each(|_| fs::write("/proc/sys/vm/drop_caches", "2").unwrap());
        let inodes = |mount: &Mount| mount.status()["inodes"].as_u64().unwrap();
        say(&format!("{mode}: {} inodes known, forgotten by the kernel", inodes(&mount)));
        run(fsys().arg("drain").arg(mount.path()));
        let forgotten = wait_until(Duration::from_secs(20), || {
            fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
            inodes(&mount) == 1
        });
        assert!(forgotten, "{mode}: {} inodes are known", inodes(&mount));
        mount.stop();
    }
}

/// P8. Memory for inodes is bounded by what the kernel knows, and given back when it forgets: figures, and no leak of
/// inodes or handles. `FSYS_TEST_INODES` sets how many.
#[test]
fn inodes_are_forgotten() {
    if !can_mount("inodes_are_forgotten") {
        return;
    }
    let _alone = FORGETTING.lock().unwrap_or_else(PoisonError::into_inner);
    let count = env_number("FSYS_TEST_INODES", if common::full() { 1_000_000 } else { 100_000 });
    let kind = kinds(&[Kind::Xfs])[0];
    // ext4 has an inode for 16 KiB.
    let disk = LoopFs::new(kind, 300 + count / if kind == Kind::Ext4 { 50 } else { 500 });
    let backing = disk.subdir("data");
    let script = "use strict; my ($d,$n)=@ARGV; for my $i (0..$n-1) { my $s=int($i/1000); mkdir \"$d/$s\" unless $i%1000; \
        open(my $f,'>',\"$d/$s/$i\") or die; close $f }";
    run(Command::new("perl").args(["-e", script]).arg(&backing).arg(count.to_string()));
    let mut mount = Mount::start(&backing, "");
    let pid = mount.pid().as_raw_nonzero().get();
    let before = rss_kb(pid);
    let found = run_text(Command::new("find").arg(mount.path()).args(["-type", "f", "-size", "0", "-printf", "x"]));
    assert_eq!(found.len() as u64, count);
    let known = mount.status()["inodes"].as_u64().unwrap();
    let full = rss_kb(pid);
    let forgotten = wait_until(Duration::from_secs(60), || {
        // Dentries and inodes that nobody uses; the kernel then tells the daemon to forget them.
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        mount.status()["inodes"].as_u64().unwrap() < 10
    });
    // Given back by a thread that does nothing else.
    wait_until(Duration::from_secs(20), || rss_kb(pid) - before < (full - before) / 4);
    let after = rss_kb(pid);
    say(&format!(
        "{known} inodes known: {} bytes each; daemon {before} kB before, {full} kB with them, {after} kB after",
        (full - before) * 1024 / known.max(1)
    ));
    assert!(forgotten, "inodes known after the kernel forgot: {}", mount.status()["inodes"]);
    assert_eq!(mount.status()["handles"], 0);
    assert!(known >= count / 2, "only {known} were known: nothing was measured");
    assert!((full - before) * 1024 / known < 200, "more memory for an inode than ever");
    // What is left is the allocator's: it gives whole pages back, and some hold one last live object.
    assert!(after - before < (full - before) / 2, "the memory of what was forgotten does not come back");
    mount.stop();
}

//! P1 and P4 at the levels that do not wait: a save that was answered and is not committed yet is a version of its own.
//! The next save of that file neither lets half of itself be published in its stead nor takes its place in the order.

// Helpers of tests: a panic is the report.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::world::{What, World, still};
use fsys_mount::backend::Call;
use fsys_mount::backend::probe::Strategy;
use fsys_mount::config::policy::{Durability, WriteMode};
use fsys_mount::error::Errno;

const LEVELS: [Durability; 2] = [Durability::Fsync, Durability::Relaxed];

fn world(level: Durability, mode: WriteMode) -> (tempfile::TempDir, World) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let world = World::open(dir.path(), still(level, mode));
    (dir, world)
}

#[test]
fn a_debt_never_publishes_half_of_the_next_save() {
    for level in LEVELS {
        for flags in [libc::O_TRUNC, 0] {
            let (_dir, w) = world(level, WriteMode::Replace);
            w.save("x", b"the first version").unwrap();
            let fd = w.open_with("x", libc::O_RDWR | flags).unwrap();
            w.write_all(fd, 0, b"half of").unwrap();
            // Whatever pays debts: the ticker, a sync of the directory, a rename of something else.
            w.drain().unwrap();
            assert_eq!(w.on_disk("x").unwrap(), b"the first version", "{level:?} {flags:o}");
            w.write_all(fd, 7, b" a longer version").unwrap();
            w.close(fd).unwrap();
            w.drain().unwrap();
            assert_eq!(w.on_disk("x").unwrap(), b"half of a longer version", "{level:?} {flags:o}");
            w.shutdown().unwrap();
        }
    }
}

#[test]
fn a_debt_after_an_fsync_that_does_not_wait_is_one_too() {
    let (_dir, w) = world(Durability::Relaxed, WriteMode::Auto);
    let fd = w.create("x").unwrap();
    w.write_all(fd, 0, b"one").unwrap();
    w.fsync(fd).unwrap();
    w.write_all(fd, 3, b", two").unwrap();
    w.drain().unwrap();
    assert_eq!(w.on_disk("x").unwrap(), b"one");
    w.close(fd).unwrap();
    w.drain().unwrap();
    assert_eq!(w.on_disk("x").unwrap(), b"one, two");
    w.shutdown().unwrap();
}

/// `save x; save y; save x`: never the second x without y, never y without the first x.
#[test]
fn saves_of_a_directory_keep_their_order_when_one_is_saved_again() {
    for level in LEVELS {
        let (_dir, w) = world(level, WriteMode::Auto);
        w.save("x", b"1").unwrap();
        w.save("y", b"1").unwrap();
        let fd = w.open_with("x", libc::O_RDWR | libc::O_TRUNC).unwrap();
        w.write_all(fd, 0, b"2").unwrap();
        w.close(fd).unwrap();
        assert_eq!(w.on_disk("x").unwrap(), b"1", "{level:?}: the first x is a commit of its own");
        w.drain().unwrap();
        assert_eq!((w.on_disk("x"), w.on_disk("y")), (Some(b"2".into()), Some(b"1".into())));
        w.shutdown().unwrap();
    }
}

/// A program in the middle of a save is not cut short by another that truncates the file.
#[test]
fn a_truncation_by_name_does_not_publish_what_another_program_writes() {
    for size in [0, 2] {
        let (_dir, w) = world(Durability::Close, WriteMode::Auto);
        w.save("x", b"old").unwrap();
        let fd = w.open_with("x", libc::O_RDWR | libc::O_TRUNC).unwrap();
        w.write_all(fd, 0, b"half").unwrap();
        w.truncate_name("x", size).unwrap();
        w.drain().unwrap();
        assert_eq!(w.on_disk("x").unwrap(), b"old");
        w.close(fd).unwrap();
        w.shutdown().unwrap();
    }
}

/// P8. What nobody waits for is committed from half of `pending_max` on, so that programs wait only where they save
/// faster than the device takes it: not for the commit interval.
#[test]
fn a_backlog_is_committed_before_it_is_full() {
    for level in LEVELS {
        let (dir, mut config) = (tempfile::tempdir_in("/dev/shm").unwrap(), still(level, WriteMode::Auto));
        config.limits.pending_max = 8;
        let w = World::open(dir.path(), config);
        let save = |n: u32| w.save(&format!("f{n}"), b"data").unwrap();
        let committed = || w.engine().counters.commits.load(Ordering::Relaxed);
        (0..3).for_each(save);
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(committed(), 0, "{level:?}: less than half of them wait for the interval");
        save(3);
        let deadline = Instant::now() + Duration::from_secs(60);
        while committed() < 3 {
            assert!(Instant::now() < deadline, "{level:?}: half of them are committed without the interval");
            std::thread::sleep(Duration::from_millis(5));
        }
        w.shutdown().unwrap();
    }
}

/// P8. What is uncommitted and no close waits for begins, at the bound, when what nobody has open is committed.
#[test]
fn what_no_close_waits_for_has_the_same_bound() {
    let modes = [WriteMode::Auto, WriteMode::InPlace, WriteMode::Journal];
    for (level, mode) in LEVELS.iter().flat_map(|l| modes.map(|m| (*l, m))) {
        let (dir, mut config) = (tempfile::tempdir_in("/dev/shm").unwrap(), still(level, mode));
        config.limits.pending_max = 8;
        let w = World::open(dir.path(), config);
        let name = |n: u32| format!("f{n}");
        let ways: [(&str, &dyn Fn(u32)); 5] = [
            ("created", &|n| w.close(w.create(&name(n)).unwrap()).unwrap()),
            // As flock(1) does: the kernel tells of no close.
            ("created for reading", &|n| w.release(w.create_with(&name(n + 100), libc::O_RDONLY).unwrap())),
            ("emptied by name", &|n| w.truncate_name(&name(n), 0).unwrap()),
            ("emptied", &|n| w.close(w.open_with(&name(n), libc::O_WRONLY | libc::O_TRUNC).unwrap()).unwrap()),
            ("touched", &|n| {
                let fd = w.open_with(&name(n), libc::O_WRONLY).unwrap();
                w.chmod_name(&name(n), 0o600).unwrap();
                w.close(fd).unwrap();
            }),
        ];
        for (how, make) in ways {
            for n in 0..100 {
                make(n);
                let pending = w.engine().uncommitted(1000).len();
                assert!(pending <= 9, "{level:?}, {mode:?}, {how}: {pending} after {n}");
            }
        }
        w.shutdown().unwrap();
        assert!((0..200).all(|n| w.on_disk(&name(n)) == Some(Vec::new())), "{level:?}, {mode:?}");
    }
}

/// P8. Files that programs have open are no backlog: nobody waits for them.
#[test]
fn open_files_are_no_backlog() {
    let (dir, mut config) = (tempfile::tempdir_in("/dev/shm").unwrap(), still(Durability::Relaxed, WriteMode::Auto));
    config.limits.pending_max = 8;
    let w = World::open(dir.path(), config);
    let open: Vec<_> = (0..100).map(|n| w.create(&format!("f{n}")).unwrap()).collect();
    for (n, fd) in open.into_iter().enumerate() {
        w.write_all(fd, 0, b"data").unwrap();
        w.close(fd).unwrap();
        assert!(n > 0 || w.on_disk("f1").is_none(), "it was still open");
    }
    w.shutdown().unwrap();
    assert!((0..100).all(|n| w.on_disk(&format!("f{n}")).as_deref() == Some(b"data")));
}

/// P8. A close of what was not written waits for nobody at the bound.
#[test]
fn a_close_of_what_was_not_written_does_not_wait_at_the_bound() {
    let (dir, mut config) = (tempfile::tempdir_in("/dev/shm").unwrap(), still(Durability::Relaxed, WriteMode::Auto));
    config.limits.pending_max = 2;
    let w = World::open(dir.path(), config);
    for name in ["read", "other"] {
        w.save(name, b"data").unwrap();
    }
    w.drain().unwrap();
    let fd = w.open_with("read", libc::O_RDWR).unwrap();
    let stopped = w.seam.stop_at(Call::LinkStage, 0);
    w.save("pending", b"data").unwrap();
    let open = w.create("open").unwrap();
    let removed = w.begin_unlink("other");
    stopped.arrived();
    // There are two now, and the save of the one is stuck.
    w.close(fd).unwrap();
    stopped.go();
    removed.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    w.close(open).unwrap();
    w.shutdown().unwrap();
}

/// P4. Where a sync of one file does not bring earlier changes of names along (btrfs), one that comes while they are on
/// their way to their own sync is of the whole file system, too.
#[test]
fn a_sync_of_a_file_comes_after_names_that_are_on_their_way() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let w = World::open_as(dir.path(), still(Durability::Fsync, WriteMode::InPlace), Some(Strategy::Syncfs));
    let fd = w.create("file").unwrap();
    w.save("0", b"to be renamed").unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                w.drain().unwrap();
            }
        });
        for n in 0..3000 {
            w.seam.watch(&[]);
            w.rename(&n.to_string(), &(n + 1).to_string()).unwrap();
            w.write_all(fd, 0, b"data").unwrap();
            w.fsync(fd).unwrap();
            let calls = w.seam.calls();
            let at = |call: Call| calls.iter().position(|c| *c == call).unwrap();
            // What is synced before the write may have been on its way when the name changed.
            let since_write = &calls[at(Call::Write)..];
            let alone = since_write.iter().position(|c| *c == Call::SyncFile).map(|n| at(Call::Write) + n);
            if alone.is_some_and(|end| !calls[at(Call::Rename)..end].contains(&Call::SyncFs)) {
                over.store(true, Ordering::Release);
                panic!("{n}: {calls:?}");
            }
        }
        over.store(true, Ordering::Release);
    });
    w.close(fd).unwrap();
    w.shutdown().unwrap();
}

/// P2 and P4. An operation on names comes after the saves that were acknowledged in its directory, and waits for no flush
/// of them where the file system keeps that order. Whoever then waits for such a save gets the sync that it still needs.
#[test]
fn names_wait_for_the_place_of_a_save_and_not_for_its_flush() {
    for level in LEVELS {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let w = World::open_as(dir.path(), still(level, WriteMode::Auto), Some(Strategy::OneBarrier));
        w.save("x", b"old").unwrap();
        w.drain().unwrap();
        let before = w.seam.calls().len();
        let since = || w.seam.calls().split_off(before);
        w.save("y", b"first").unwrap();
        w.save("tmp", b"new").unwrap();
        w.rename("tmp", "x").unwrap();
        let data_then_names = [Call::WriteOut, Call::WriteOut, Call::LinkStage, Call::LinkStage, Call::Rename];
        let made: Vec<_> =
            since().into_iter().filter(|c| !matches!(c, Call::Open | Call::OpenStage | Call::Write)).collect();
        assert_eq!(made, data_then_names, "{level:?}");
        assert_eq!(w.on_disk("x").unwrap(), b"new", "{level:?}");
        let fd = w.open_with("x", libc::O_RDONLY).unwrap();
        w.fsync(fd).unwrap();
        assert_eq!(since().contains(&Call::SyncDir), level == Durability::Fsync, "{level:?}: fsync waits there alone");
        w.release(fd);
        w.drain().unwrap();
        assert!(since().contains(&Call::SyncDir), "{level:?}");
        w.shutdown().unwrap();
    }
}

/// P4. What pays a debt finds that the file was committed meanwhile and owes its next version: that one comes after others
/// that were acknowledged in between.
#[test]
fn a_debt_is_not_taken_for_the_one_before_it() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let w = World::open_as(dir.path(), still(Durability::Relaxed, WriteMode::Auto), Some(Strategy::OneBarrier));
    for name in ["one", "two"] {
        w.save(name, b"to be removed").unwrap();
    }
    w.drain().unwrap();
    let stopped = w.seam.stop_at(Call::LinkStage, 1);
    w.save("b", b"first").unwrap();
    w.save("c", b"first").unwrap();
    // Both removals have to pay for `b` and `c`; the first of them stands between the two.
    let removals = [w.begin_unlink("one"), w.begin_unlink("two")];
    stopped.arrived();
    assert_eq!(w.on_disk("b").unwrap(), b"first");
    w.save("a", b"before the second b").unwrap();
    let b = w.open_with("b", libc::O_RDWR | libc::O_TRUNC).unwrap();
    w.write_all(b, 0, b"second").unwrap();
    w.close(b).unwrap();
    stopped.go();
    for removed in removals {
        removed.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    }
    assert!(w.on_disk("a").is_some() || w.on_disk("b").unwrap() == b"first", "the second b is there without a");
    w.shutdown().unwrap();
    assert_eq!(w.on_disk("b").unwrap(), b"second");
}

/// P2. A save that is in its place is not yet durable: who waits for it while it is published early waits for the sync.
#[test]
fn an_fsync_does_not_end_with_an_early_publication() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let w = World::open_as(dir.path(), still(Durability::Fsync, WriteMode::Auto), Some(Strategy::OneBarrier));
    w.save("old", b"to be removed").unwrap();
    w.drain().unwrap();
    let before = w.seam.calls().len();
    let stopped = w.seam.stop_at(Call::LinkStage, 0);
    w.save("new", b"content").unwrap();
    let removed = w.begin_unlink("old");
    stopped.arrived();
    let fd = w.open_with("new", libc::O_RDONLY).unwrap();
    let synced = w.begin_fsync(fd);
    stopped.go();
    synced.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    let made = w.seam.calls().split_off(before);
    let link = made.iter().position(|c| *c == Call::LinkStage).unwrap();
    assert!(made[link..].contains(&Call::SyncDir), "{made:?}");
    removed.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    w.release(fd);
    w.shutdown().unwrap();
}

/// P3. Two wait for one commit, whose directory cannot be synced: both are told.
#[test]
fn who_joins_a_commit_gets_its_result() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let run = |name: &str, fault: Option<usize>| {
        let w = World::open_as(dir.path(), still(Durability::Fsync, WriteMode::Auto), Some(Strategy::OneBarrier));
        let stopped = w.seam.stop_at(Call::SyncDir, 0);
        let fault: Vec<_> = fault.map(|n| (n, What::Fail(Errno::IO))).into_iter().collect();
        w.seam.watch(&fault);
        let fd = w.create(name).unwrap();
        w.write_all(fd, 0, b"content").unwrap();
        let one = w.begin_fsync(fd);
        stopped.arrived();
        let two = w.begin_fsync(fd);
        stopped.go();
        let results = [one, two].map(|r| r.recv_timeout(Duration::from_secs(60)).unwrap());
        let at = w.seam.calls().iter().position(|c| *c == Call::SyncDir);
        w.kill();
        (results, at.unwrap())
    };
    let (results, at) = run("good", None);
    assert_eq!(results, [Ok(()), Ok(())]);
    let (results, _) = run("bad", Some(at));
    assert_eq!(results, [Err(Errno::IO), Err(Errno::IO)]);
}

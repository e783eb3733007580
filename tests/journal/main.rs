//! Write mode `journal`: updates of any part of a file are atomic per commit point, and the file stays the same inode.
//! The mounted file system without a kernel, with every backing call seen. A paragraph of the contract over each test.

// Helpers of tests: a panic is the report.
#![allow(clippy::unwrap_used)]

mod again;
mod changes;
#[path = "../common/mod.rs"]
mod common;
mod mounted;

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use common::world::{Fd, What, World, lock, quiet_panics, recovered, still};
use common::{Kind, LoopFs};
use fsys_mount::backend::Call;
use fsys_mount::backend::probe::Strategy;
use fsys_mount::config::policy::{Durability, WriteMode};
use fsys_mount::engine::recover::recover;
use fsys_mount::error::Errno;
use fsys_mount::fs::Reply;

const OLD: &[u8] = b"the old content, some of which stays";
const LOG: &str = ".fsys/journal/log";

fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn world(root: &Path) -> World {
    World::open(root, still(Durability::Close, WriteMode::Journal))
}

/// A world with files of the old content.
fn with_files(root: &Path, names: &[&str]) -> World {
    names.iter().for_each(|n| fs::write(root.join(n), OLD).unwrap());
    world(root)
}

fn open(w: &World, name: &str) -> Fd {
    w.open_with(name, libc::O_RDWR).unwrap()
}

/// OLD with `data` at `off`.
fn patched(off: usize, data: &[u8]) -> Vec<u8> {
    let mut all = OLD.to_vec();
    all.resize(all.len().max(off + data.len()), 0);
    all[off..off + data.len()].copy_from_slice(data);
    all
}

/// The calls that matter to the order, repetitions left out.
fn steps(w: &World) -> Vec<Call> {
    let kept = [Call::Journal, Call::SyncFile, Call::SyncDir, Call::Apply, Call::Publish, Call::LinkStage];
    let mut calls: Vec<_> = w.seam.calls().into_iter().filter(|c| kept.contains(c)).collect();
    calls.dedup();
    calls
}

/// P1, P6. Programs see every write at once, the backing file none before the commit; then it has all of them, and it
/// is the same inode with the same links.
#[test]
fn the_file_stays_and_changes_at_commit_points_alone() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
    let before = fs::metadata(dir.path().join("a")).unwrap();
    let fd = open(&w, "a");
    w.write_all(fd, 4, b"NEW").unwrap();
    w.write_all(fd, 60, b"far").unwrap();
    let (new, old) = (patched(60, b"far"), Some(OLD.to_vec()));
    let new = [&new[..4], b"NEW", &new[7..]].concat();
    assert_eq!((w.seen("a").unwrap(), w.seen("b").unwrap()), (new.clone(), new.clone()), "under both names");
    assert_eq!((w.on_disk("a"), w.fs.getattr(fd.node).unwrap().stat.st_nlink), (old, 2));
    w.close(fd).unwrap();
    assert_eq!((w.on_disk("a"), w.on_disk("b"), w.seen("a")), (Some(new.clone()), Some(new.clone()), Ok(new)));
    let after = fs::metadata(dir.path().join("b")).unwrap();
    assert_eq!((after.ino(), after.nlink(), after.mode()), (before.ino(), 2, before.mode()));
    w.shutdown().unwrap();
}

/// P2. The record is durable before the file is written, and the answer comes after both. What the record stands on,
/// the inode and the names before it, is durable before it.
#[test]
fn order_of_a_commit() {
    let dir = dir();
    let w = with_files(dir.path(), &["a", "c"]);
    let fd = open(&w, "a");
    w.write_all(fd, 0, b"one").unwrap();
    w.seam.watch(&[]);
    w.fsync(fd).unwrap();
    let all = [Call::SyncDir, Call::SyncFile, Call::Journal, Call::SyncFile, Call::Apply];
    assert_eq!(steps(&w), all, "the inode first, and names that a daemon before may have changed");
    w.write_all(fd, 0, b"two").unwrap();
    w.seam.watch(&[]);
    w.fsync(fd).unwrap();
    assert_eq!(steps(&w), [Call::Journal, Call::SyncFile, Call::Apply], "one flush");
    w.rename("c", "d").unwrap();
    w.write_all(fd, 0, b"three").unwrap();
    w.seam.watch(&[]);
    w.fsync(fd).unwrap();
    assert_eq!(steps(&w), [Call::SyncDir, Call::Journal, Call::SyncFile, Call::Apply], "the rename came before");
    w.close(fd).unwrap();
    w.shutdown().unwrap();
}

/// Commits files together: the first commit blocks in its answer until all are queued. Their results in order.
fn together(w: &World, first: Fd, fds: &[Fd]) -> Vec<Result<(), Errno>> {
    let (go, hold) = mpsc::channel::<()>();
    let (entered, running) = mpsc::channel();
    w.fs.fsync(
        0,
        first.fh,
        false,
        Reply::new(move |_| {
            entered.send(()).unwrap();
            hold.recv().unwrap();
        }),
    );
    running.recv_timeout(Duration::from_secs(60)).expect("the first is answered");
    let answers: Vec<_> = fds
        .iter()
        .map(|fd| {
            let (tx, rx) = mpsc::channel();
            w.fs.fsync(0, fd.fh, false, Reply::new(move |r| tx.send(r).unwrap()));
            rx
        })
        .collect();
    go.send(()).unwrap();
    answers.iter().map(|rx| rx.recv_timeout(Duration::from_secs(60)).expect("an answer")).collect()
}

/// Five files that were committed once, written again and not committed yet; and one to open the batch.
fn five(root: &Path) -> (World, Fd, Vec<Fd>) {
    let names = ["0", "1", "2", "3", "4", "first"];
    let w = with_files(root, &names);
    let mut fds: Vec<_> = names.iter().map(|n| open(&w, n)).collect();
    for text in [b"one", b"two"] {
        fds.iter().for_each(|fd| w.write_all(*fd, 0, text).unwrap());
        if text == b"one" {
            fds.iter().for_each(|fd| w.fsync(*fd).unwrap());
        }
    }
    let first = fds.pop().unwrap();
    (w, first, fds)
}

/// Section 2. The commits of a batch share one flush.
#[test]
fn a_batch_shares_a_flush() {
    let dir = dir();
    let (w, first, fds) = five(dir.path());
    let before = w.engine().counters.values().flush_calls;
    assert!(together(&w, first, &fds).iter().all(Result::is_ok));
    assert_eq!(w.engine().counters.values().flush_calls - before, 2, "that of the first, and one for five");
    assert!((0..5).all(|i| w.on_disk(&i.to_string()).unwrap().starts_with(b"two")));
    w.shutdown().unwrap();
}

/// P4. A record does not overtake a name of its directory that was submitted before it, nor a name the record before it.
#[test]
fn records_and_names_keep_their_order() {
    let dir = dir();
    let w = with_files(dir.path(), &["a", "first"]);
    let (a, first) = (open(&w, "a"), open(&w, "first"));
    let touch = |fd: Fd| w.write_all(fd, 0, b"new").unwrap();
    [a, first].into_iter().for_each(touch);
    [a, first].into_iter().for_each(|fd| w.fsync(fd).unwrap());
    for (name, name_first) in [("x", true), ("y", false)] {
        let new = w.create(name).unwrap();
        [new, a, first].into_iter().for_each(touch);
        w.seam.watch(&[]);
        let order = if name_first { [new, a] } else { [a, new] };
        assert_eq!(together(&w, first, &order), [Ok(()), Ok(())]);
        let calls = w.seam.calls();
        let last = |call| calls.iter().rposition(|c| *c == call).unwrap();
        if name_first {
            assert!(last(Call::SyncDir) < last(Call::Journal), "{calls:?}");
        } else {
            assert!(last(Call::Journal) < last(Call::LinkStage), "{calls:?}");
        }
        w.close(new).unwrap();
    }
    w.shutdown().unwrap();
}

/// P3. Commits whose flush failed are told so, and do not come back: not by a later flush, not after a crash, not
/// behind a record that takes the place of the first of them.
#[test]
fn what_failed_is_taken_back() {
    let dir = dir();
    let (w, first, fds) = five(dir.path());
    w.seam.watch(&[]);
    w.fsync(first).unwrap();
    let own = w.seam.calls().len();
    w.write_all(first, 0, b"three").unwrap();
    // Each record is written in two calls; then comes the flush of all.
    let flush = own + 2 * fds.len();
    w.seam.watch(&[(flush, What::Fail(Errno::NOSPC))]);
    let told = together(&w, first, &fds);
    assert_eq!(w.seam.hits(), [(Call::SyncFile, What::Fail(Errno::NOSPC))]);
    assert_eq!(told, [Err(Errno::NOSPC); 5]);
    assert!(w.engine().writable().is_ok(), "no failure of the device");
    // A failed update is kept, and a later one of the same length takes the first one's place in the log.
    assert_eq!(w.internal("failed").len(), 5);
    w.write_all(first, 0, b"four").unwrap();
    w.fsync(first).unwrap();
    w.kill();
    recovered(dir.path());
    for i in 0..5 {
        assert!(
            fs::read(dir.path().join(i.to_string())).unwrap().starts_with(b"one"),
            "file {i} is what was committed"
        );
    }
    assert!(fs::read(dir.path().join("first")).unwrap().starts_with(b"foure"));
}

/// P1, P2, P7. Cut off before each of its calls: the old content, or the new one, and that when it was answered; and
/// recovery has nothing to do the second time.
#[test]
fn killed_at_every_call() {
    quiet_panics();
    let new = [&patched(10, b"NEW")[..20], b"longer than before, so that the file grows"].concat();
    let (mut answered, mut replayed, mut n) = (false, 0, 0);
    while !answered {
        let dir = dir();
        let w = with_files(dir.path(), &["a"]);
        let fd = open(&w, "a");
        w.write_all(fd, 0, b"the").unwrap();
        w.fsync(fd).unwrap();
        w.truncate(fd, 20).unwrap();
        w.write_all(fd, 10, b"NEW").unwrap();
        w.write_all(fd, 20, b"longer than before, so that the file grows").unwrap();
        let all: Vec<_> = (n..n + 100).map(|i| (i, What::Fail(Errno::IO))).collect();
        w.seam.watch(&all);
        answered = w.fsync(fd).is_ok();
        w.kill();
        let report = recovered(dir.path());
        replayed += usize::from(report.updates.len() == 2);
        let found = fs::read(dir.path().join("a")).unwrap();
        assert!(found == new || (!answered && found == OLD), "cut at {n}: {:?}", String::from_utf8_lossy(&found));
        assert!(recovered(dir.path()).updates.is_empty());
        n += 1;
    }
    assert!(n > 4 && replayed > 2, "{n} calls, {replayed} times both records were there");
}

/// P3. When the update cannot be written into its file though it is safe in the journal, the mount is read-only and
/// says so, programs go on seeing the new content, and the next mount writes it.
#[test]
fn an_update_that_cannot_be_written() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    let fd = open(&w, "a");
    w.write_all(fd, 0, b"one").unwrap();
    w.fsync(fd).unwrap();
    w.write_all(fd, 0, b"two").unwrap();
    w.seam.watch(&[]);
    // Journal twice, its flush, then the first attempt and the second.
    w.seam.watch(&[(3, What::Fail(Errno::IO)), (4, What::Fail(Errno::IO))]);
    assert_eq!(w.fsync(fd), Err(Errno::IO));
    assert_eq!(w.seam.hits().iter().map(|h| h.0).collect::<Vec<_>>(), [Call::Apply; 2]);
    assert!(w.engine().read_only_reason().unwrap().contains("the next mount"));
    assert_eq!((w.seen("a").unwrap(), w.on_disk("a").unwrap()), (patched(0, b"two"), patched(0, b"one")));
    assert_eq!(w.write_all(fd, 0, b"three"), Err(Errno::ROFS));
    w.kill();
    assert_eq!(recovered(dir.path()).updates.len(), 2);
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), patched(0, b"two"));
}

/// Section 5. After a drain, and after a clean unmount, nothing depends on `.fsys`.
#[test]
fn nothing_is_left_in_the_journal() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    let fd = open(&w, "a");
    w.write_all(fd, 0, b"one").unwrap();
    w.fsync(fd).unwrap();
    assert!(w.engine().counters.values().journal_bytes > 0);
    w.drain().unwrap();
    assert_eq!(w.engine().counters.values().journal_bytes, 0);
    w.write_all(fd, 0, b"two").unwrap();
    w.fsync(fd).unwrap();
    w.release(fd);
    w.shutdown().unwrap();
    drop(w);
    assert!(recovered(dir.path()).updates.is_empty());
    fs::remove_dir_all(dir.path().join(".fsys")).unwrap();
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), patched(0, b"two"));
}

/// P4. What is made durable later is not undone by a record before it: an older time, or the file's removal.
#[test]
fn an_older_record_undoes_nothing() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    let fd = open(&w, "a");
    w.write_all(fd, 0, b"one").unwrap();
    w.fsync(fd).unwrap();
    w.set_mtime(fd, 1_000_000).unwrap();
    w.fsync(fd).unwrap();
    w.kill();
    recovered(dir.path());
    let m = fs::metadata(dir.path().join("a")).unwrap();
    assert_eq!((m.mtime(), fs::read(dir.path().join("a")).unwrap()), (1_000_000, patched(0, b"one")));
}

/// The time of an update is that of the last write, or what the program set after it.
#[test]
fn times_are_the_programs() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    let mtime = |w: &World, fd: Fd| w.fs.getattr(fd.node).unwrap().stat.st_mtime;
    let real = || fs::metadata(dir.path().join("a")).unwrap().mtime();
    let fd = open(&w, "a");
    w.set_mtime(fd, 1000).unwrap();
    w.write_all(fd, 0, b"one").unwrap();
    assert!(mtime(&w, fd) > 1_000_000 && real() == 1000, "shown at once, in the file with the commit");
    let shown = w.fs.getattr(fd.node).unwrap().stat;
    w.fsync(fd).unwrap();
    let after = w.fs.getattr(fd.node).unwrap().stat;
    let times = |s: &rustix::fs::Stat| (s.st_mtime, s.st_mtime_nsec, s.st_ctime, s.st_ctime_nsec, s.st_size);
    assert_eq!(times(&after), times(&shown), "a commit changes nothing that programs see");
    assert_eq!(real(), shown.st_mtime);
    w.write_all(fd, 0, b"two").unwrap();
    w.set_mtime(fd, 2000).unwrap();
    assert_eq!(mtime(&w, fd), 2000);
    w.close(fd).unwrap();
    assert_eq!(real(), 2000);
    w.kill();
    recovered(dir.path());
    assert_eq!(real(), 2000);
}

/// P2, P5. A write that takes set-user-ID away: that is durable with it.
#[test]
fn privileges_that_a_write_takes_away() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    let fd = open(&w, "a");
    w.write_all(fd, 0, b"one").unwrap();
    w.fsync(fd).unwrap();
    w.chmod(fd, 0o4755).unwrap();
    w.fsync(fd).unwrap();
    w.write_unprivileged(fd, b"two").unwrap();
    assert_eq!(w.fs.getattr(fd.node).unwrap().stat.st_mode & 0o7777, 0o755);
    w.seam.watch(&[]);
    w.close(fd).unwrap();
    assert_eq!(steps(&w), [Call::SyncFile, Call::Journal, Call::SyncFile, Call::Apply], "the inode first");
    assert_eq!(fs::metadata(dir.path().join("a")).unwrap().mode() & 0o7777, 0o755);
    w.shutdown().unwrap();
}

/// P6, P7. A record of a file that was removed is skipped, also when another file got its inode number.
#[test]
fn a_reused_inode_number_is_another_file() {
    if !common::can_mount("a_reused_inode_number_is_another_file") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 64);
    let w = with_files(disk.path(), &["a"]);
    let ino = fs::metadata(disk.path().join("a")).unwrap().ino();
    let fd = open(&w, "a");
    w.write_all(fd, 0, b"one").unwrap();
    w.close(fd).unwrap();
    w.unlink("a").unwrap();
    w.kill();
    let mine = (0..2000).map(|n| disk.path().join(format!("n{n}"))).find(|path| {
        fs::write(path, b"mine").unwrap();
        fs::metadata(path).unwrap().ino() == ino
    });
    let mine = mine.expect("ext4 gives the number out again");
    let report = recovered(disk.path());
    assert!(report.updates.len() == 1 && report.updates[0].gone, "{report}");
    assert_eq!(fs::read(mine).unwrap(), b"mine");
}

/// P7. A recovery that cannot go on says why and loses nothing; the next one goes on.
#[test]
fn a_recovery_that_is_cut_short_goes_on() {
    if !common::can_mount("a_recovery_that_is_cut_short_goes_on") {
        return;
    }
    let disk = LoopFs::new(Kind::Ext4, 64);
    let w = with_files(disk.path(), &["a", "b"]);
    for name in ["a", "b"] {
        let fd = open(&w, name);
        w.write_all(fd, 0, b"one").unwrap();
        w.close(fd).unwrap();
    }
    w.kill();
    let [a, b] = ["a", "b"].map(|n| disk.path().join(n));
    [&a, &b].into_iter().for_each(|f| fs::write(f, OLD).unwrap());
    let chattr = |how: &str| assert!(std::process::Command::new("chattr").arg(how).arg(&b).status().unwrap().success());
    chattr("+i");
    let layout = lock(disk.path());
    let error = recover(&layout, false).unwrap_err();
    assert!(error.what.contains(": b") && error.action.contains("chattr"), "{error}");
    assert_eq!((fs::read(&a).unwrap(), fs::read(&b).unwrap()), (patched(0, b"one"), OLD.to_vec()));
    chattr("-i");
    assert_eq!(recover(&layout, false).unwrap().updates.len(), 2);
    assert_eq!((fs::read(&a).unwrap(), fs::read(&b).unwrap()), (patched(0, b"one"), patched(0, b"one")));
}

/// P8. An update larger than the journal's bound is as atomic as any; the journal gives the space back.
#[test]
fn an_update_larger_than_the_journal() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    let big: Vec<u8> = (0..40 << 20).map(|i: u32| (i % 251) as u8).collect();
    let fd = open(&w, "a");
    w.write_all(fd, 5, &big).unwrap();
    assert_eq!(w.on_disk("a").as_deref(), Some(OLD));
    w.fsync(fd).unwrap();
    assert_eq!(w.on_disk("a").unwrap(), [&OLD[..5], &big].concat());
    w.write_all(fd, 0, b"small").unwrap();
    w.fsync(fd).unwrap();
    let log = fs::metadata(dir.path().join(LOG)).unwrap().len();
    assert!(log <= 33 << 20, "{log} bytes");
    assert!(w.engine().counters.values().checkpoints > 0);
    w.kill();
    recovered(dir.path());
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), [b"small", &big[..]].concat());
}

/// P7. A torn last record is none, and what comes before it counts; a log that is not ours is left alone, and said.
#[test]
fn a_damaged_log() {
    let records = |root: &Path| {
        let w = with_files(root, &["a"]);
        let fd = open(&w, "a");
        for text in [b"one", b"two", b"tri"] {
            w.write_all(fd, 0, text).unwrap();
            w.fsync(fd).unwrap();
        }
        w.kill();
        fs::write(root.join("a"), OLD).unwrap();
        fs::OpenOptions::new().read(true).write(true).open(root.join(LOG)).unwrap()
    };
    for (at, there) in [(3 * 4096 + 100, 2), (2 * 4096 + 9, 1), (4096, 0)] {
        let dir = dir();
        let log = records(dir.path());
        let mut byte = [0];
        log.read_exact_at(&mut byte, at).unwrap();
        log.write_all_at(&[byte[0] ^ 4], at).unwrap();
        assert_eq!(recovered(dir.path()).updates.len(), there, "a bit at {at}");
        let text: [&[u8]; 3] = [b"the", b"one", b"two"];
        assert!(fs::read(dir.path().join("a")).unwrap().starts_with(text[there]));
    }
    let dir = dir();
    records(dir.path()).write_all_at(b"x", 3).unwrap();
    let layout = lock(dir.path());
    let before = fs::read(dir.path().join(LOG)).unwrap();
    let error = recover(&layout, false).unwrap_err();
    assert!(error.why.contains("damaged"), "{error}");
    assert_eq!(fs::read(dir.path().join(LOG)).unwrap(), before);
}

/// P7. Asked first, recovery says what it would write and changes nothing.
#[test]
fn a_dry_run_lists_the_updates() {
    let dir = dir();
    let w = with_files(dir.path(), &["a"]);
    let fd = open(&w, "a");
    w.write_all(fd, 0, b"one").unwrap();
    w.fsync(fd).unwrap();
    w.kill();
    fs::write(dir.path().join("a"), OLD).unwrap();
    let layout = lock(dir.path());
    let look = recover(&layout, true).unwrap();
    assert!(look.to_string().contains("would write 1 update(s)") && look.to_string().contains("  a (inode"), "{look}");
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), OLD);
    let did = recover(&layout, false).unwrap();
    assert!(did.to_string().contains("wrote 1 update(s)") && did.updates == look.updates, "{did}");
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), patched(0, b"one"));
}

/// P3, P8. At the bound of staging space a write gets ENOSPC and its update fails as a whole; it is kept.
#[test]
fn staging_space_is_bounded() {
    let dir = dir();
    fs::write(dir.path().join("a"), OLD).unwrap();
    let mut config = still(Durability::Close, WriteMode::Journal);
    config.limits.staging_max_bytes = 100;
    let w = World::open(dir.path(), config);
    let fd = open(&w, "a");
    w.write_all(fd, 0, &[b'x'; 60]).unwrap();
    w.write_all(fd, 10, &[b'y'; 90]).unwrap();
    assert_eq!(w.write_all(fd, 100, b"z"), Err(Errno::NOSPC));
    assert_eq!(w.close(fd), Err(Errno::NOSPC));
    assert_eq!((w.on_disk("a").as_deref(), w.seen("a").as_deref()), (Some(OLD), Ok(OLD)));
    let kept = w.internal("failed");
    let kept = fs::read(dir.path().join(".fsys/failed").join(&kept[0])).unwrap();
    assert_eq!(kept, [&[b'x'; 10][..], &[b'y'; 90]].concat(), "what the program had written");
    assert_eq!(w.engine().counters.values().staged_bytes, 0);
    w.shutdown().unwrap();
}

/// P4. A record is durable at once, a save that is being published early only with the next sync of its directory: that
/// comes first.
#[test]
fn a_record_does_not_overtake_what_is_being_published() {
    let dir = dir();
    fs::write(dir.path().join("a"), OLD).unwrap();
    fs::write(dir.path().join("old"), b"to be removed").unwrap();
    let w = World::open_as(dir.path(), still(Durability::Fsync, WriteMode::Journal), Some(Strategy::OneBarrier));
    let stopped = w.seam.stop_at(Call::LinkStage, 0);
    w.save("new", b"acknowledged before").unwrap();
    let removed = w.begin_unlink("old");
    stopped.arrived();
    let fd = open(&w, "a");
    w.write_all(fd, 0, b"one").unwrap();
    std::thread::scope(|scope| {
        let synced = scope.spawn(|| w.fsync(fd));
        std::thread::sleep(Duration::from_millis(100));
        let early = synced.is_finished();
        stopped.go();
        synced.join().unwrap().unwrap();
        assert!(!early, "the record was durable before the save had its name");
    });
    removed.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    let calls = w.seam.calls();
    let link = calls.iter().position(|c| *c == Call::LinkStage).unwrap();
    let next = calls[link..].iter().find(|c| matches!(c, Call::SyncDir | Call::Journal));
    assert_eq!(next, Some(&Call::SyncDir), "{calls:?}");
    w.close(fd).unwrap();
    w.shutdown().unwrap();
}

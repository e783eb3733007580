//! Who waits for a commit, and what they are told.

use std::sync::mpsc;
use std::time::Duration;

use fsys_mount::backend::{Call, Verdict};
use fsys_mount::config::Config;
use fsys_mount::config::policy::Durability;
use fsys_mount::engine::dispatch::{Done, Outcome};
use fsys_mount::error::Errno;

use super::{done, rig, rig_with};

/// P2. fdatasync leaves the attributes to a later fsync, which then has something to do.
#[test]
fn an_fsync_after_fdatasync_is_one() {
    let r = rig();
    let h = r.save("a", b"content");
    let h = done(r.engine.open(&h.file, libc::O_RDWR, h.policy, false)).unwrap();
    r.write(&h, b"in place").unwrap();
    let sync = |data_only| {
        r.rule(|_, _| Verdict::Go);
        let (tx, rx) = mpsc::channel();
        r.engine.fsync(&h, data_only, Done::new(move |res| tx.send(res).unwrap()));
        rx.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
        r.script.seen.lock().unwrap().iter().filter(|c| **c == Call::SyncFile).count()
    };
    assert_eq!([true, true, false, false].map(sync), [1, 0, 1, 0]);
    r.engine.release(&h);
}

/// P3. The kernel tells an error of write-back once: everybody in the batch hears of it, and whoever has the file open is
/// never told later that all is well.
#[test]
fn a_write_back_error_is_everybodys() {
    let r = rig();
    let first = r.save("a", b"content");
    let open = || done(r.engine.open(&first.file, libc::O_RDWR, first.policy, false)).unwrap();
    let (one, two, busy) = (open(), open(), r.create("busy"));
    r.write(&one, b"1").unwrap();
    r.write(&two, b"2").unwrap();
    r.write(&busy, b"keeps the dispatcher busy until both are queued").unwrap();
    let (queued, wait) = mpsc::channel::<()>();
    let mut told = 0;
    r.rule(move |c, _| match c {
        Call::LinkStage => {
            wait.recv_timeout(Duration::from_secs(60)).unwrap();
            Verdict::Go
        }
        // That of `busy`, and then, as the kernel does, to the first alone.
        Call::SyncFile => {
            told += 1;
            if told == 2 { Verdict::Fail(Errno::NOSPC) } else { Verdict::Go }
        }
        _ => Verdict::Go,
    });
    let (tx, rx) = mpsc::channel();
    let answer = || {
        let tx = tx.clone();
        Done::new(move |r: Outcome| tx.send(r.map_err(|e| e.errno())).unwrap())
    };
    r.engine.close(&busy, 0, answer());
    r.engine.fsync(&one, false, answer());
    r.engine.fsync(&two, true, answer());
    queued.send(()).unwrap();
    let mut all: Vec<_> = (0..3).map(|_| rx.recv_timeout(Duration::from_secs(60)).unwrap()).collect();
    all.sort_by_key(Result::is_err);
    assert_eq!(all, [Ok(()), Err(Errno::NOSPC), Err(Errno::NOSPC)]);
    r.rule(|_, _| Verdict::Go);
    r.engine.drain(Duration::from_secs(60)).unwrap();
    for h in [&one, &two] {
        r.engine.fsync(h, false, answer());
        assert_eq!(rx.recv_timeout(Duration::from_secs(60)).unwrap(), Err(Errno::IO));
        r.engine.release(h);
    }
    assert_eq!(r.engine.failed_versions().len(), 1);
}

/// P2. Two processes wrote through one descriptor: the close of each waits for the commit, whoever began it. One that only
/// inherited it waits for nothing: its exec closes the descriptor, and may be what ends the commit (`fsfreeze -u`).
#[test]
fn a_close_waits_for_the_commit_that_another_began() {
    let r = rig();
    let h = r.create("a");
    r.write(&h, b"by both").unwrap();
    let (me, init) = (rustix::thread::gettid().as_raw_nonzero().get() as u32, 1);
    h.note_writer(me);
    let (go, wait) = mpsc::channel::<()>();
    r.rule(move |c, _| {
        if c == Call::SyncDir {
            wait.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        Verdict::Go
    });
    let (tx, rx) = mpsc::channel();
    for _ in 0..2 {
        let tx = tx.clone();
        r.engine.close(&h, me, Done::new(move |r| tx.send(r.is_ok()).unwrap()));
    }
    let (inherited, answer) = mpsc::channel();
    r.engine.close(&h, init, Done::new(move |r| inherited.send(r.is_ok()).unwrap()));
    assert_eq!(answer.try_recv(), Ok(true));
    assert!(rx.try_recv().is_err(), "told before the directory was synced");
    go.send(()).unwrap();
    assert!((0..2).all(|_| rx.recv_timeout(Duration::from_secs(60)).unwrap()));
    r.engine.release(&h);
}

/// P3. An acknowledged save that failed with nobody waiting is told by the next fsync of the file, once.
#[test]
fn a_failure_that_nobody_was_told_of_is_told_by_the_next_fsync() {
    let mut config = Config::default();
    config.policies.base.durability = Durability::Fsync;
    let r = rig_with(config);
    let h = r.save("a", b"old");
    r.engine.drain(Duration::from_secs(60)).unwrap();
    let h = r.rewrite(&h);
    r.write(&h, b"new").unwrap();
    r.close(&h).unwrap();
    r.engine.release(&h);
    r.rule(|c, _| if c == Call::SyncFile { Verdict::Fail(Errno::NOSPC) } else { Verdict::Go });
    r.engine.drain(Duration::from_secs(60)).unwrap();
    assert_eq!(r.on_disk("a").as_deref(), Some("old"));
    r.rule(|_, _| Verdict::Go);
    let again = done(r.engine.open(&h.file, libc::O_RDONLY, h.policy, false)).unwrap();
    let sync = || {
        let (tx, rx) = mpsc::channel();
        r.engine.fsync(&again, false, Done::new(move |r| tx.send(r.map_err(|e| e.errno())).unwrap()));
        rx.recv_timeout(Duration::from_secs(60)).unwrap()
    };
    assert_eq!([sync(), sync()], [Err(Errno::NOSPC), Ok(())]);
    r.engine.release(&again);
}

//! Large new versions: on their way to the device while their program writes them.

use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use fsys_mount::backend::{Call, Verdict};
use fsys_mount::config::Config;
use fsys_mount::config::policy::{Durability, Method, Policy};
use fsys_mount::engine::dispatch::{Done, Outcome, Step};
use fsys_mount::engine::file::Handle;
use fsys_mount::engine::names::Name;
use fsys_mount::error::Errno;

use super::{Rig, done, rig_with};

const MIB: usize = 1 << 20;

/// Method `direct`: writes of a MiB are said to be made when they begin.
fn direct() -> Rig {
    let mut config = Config::default();
    config.policies.base.method = Method::Direct;
    rig_with(config)
}

fn piece(n: usize) -> Vec<u8> {
    (0..MIB).map(|i| (i / 4096 + n) as u8).collect()
}

fn put(r: &Rig, h: &Handle, n: usize) -> Result<usize, Errno> {
    done(r.engine.write(h, (n * MIB) as u64, &piece(n), false))
}

/// The first call of this kind stops: tells of its arrival, and lets it go on.
fn stop_at(r: &Rig, call: Call) -> (mpsc::Receiver<()>, mpsc::Sender<()>) {
    let ((arrived_tx, arrived), (go, going)) = (mpsc::channel(), mpsc::channel());
    *r.script.stop.lock().unwrap() = Some((call, arrived_tx, going));
    (arrived, go)
}

/// A new file of so many MiB whose first piece is stuck on its way to the device, until it is told to go on.
fn stuck(r: &Rig, mib: usize) -> (Handle, mpsc::Sender<()>) {
    let (arrived, go) = stop_at(r, Call::WritePiece);
    let h = r.create("a");
    (0..mib).for_each(|n| assert_eq!(put(r, &h, n), Ok(MIB)));
    arrived.recv_timeout(Duration::from_secs(60)).unwrap();
    (h, go)
}

/// Begins to close; its result comes later.
fn closing(r: &Rig, h: &Handle) -> mpsc::Receiver<Outcome> {
    let (tx, rx) = mpsc::channel();
    r.engine.close(h, 0, Done::new(move |r| tx.send(r).unwrap()));
    rx
}

fn unlink(r: &Rig, h: &Handle) {
    let name = Name { dir: &r.root, name: OsStr::new("a"), file: Some(h.file.clone()) };
    done(r.engine.unlink(&name)).unwrap();
}

fn content(r: &Rig) -> Option<Vec<u8>> {
    std::fs::read(r.dir.path().join("a")).ok()
}

fn count(r: &Rig, call: Call) -> usize {
    r.script.seen.lock().unwrap().iter().filter(|c| **c == call).count()
}

/// P2. Whatever is on its way has landed before the flush, and the flush comes before the name.
#[test]
fn a_commit_is_of_what_has_landed() {
    let r = direct();
    let h = r.create("a");
    r.rule(|_, _| Verdict::Go);
    (0..6).for_each(|n| assert_eq!(put(&r, &h, n), Ok(MIB)));
    r.close(&h).unwrap();
    let seen = r.script.seen.lock().unwrap().clone();
    let at = |call| seen.iter().position(|c| *c == call).unwrap();
    assert_eq!(seen.iter().filter(|c| **c == Call::Land).count(), 6, "no other way was taken: {seen:?}");
    let last = seen.iter().rposition(|c| *c == Call::Land).unwrap();
    assert!(last < at(Call::SyncFile) && at(Call::SyncFile) < at(Call::LinkStage), "{seen:?}");
    assert!(content(&r).unwrap() == (0..6).flat_map(piece).collect::<Vec<_>>());
    r.engine.release(&h);
}

/// P1, P3. A write that failed after it was said to be made: some later call of the program says so, its close at the
/// latest, and what it wrote is never seen in place of the version before.
#[test]
fn what_fails_on_its_way_fails_the_save() {
    for (failing, e) in [(0, Errno::IO), (2, Errno::NOSPC), (5, Errno::DQUOT)] {
        let r = direct();
        let old = r.save("a", b"old");
        let h = r.rewrite(&old);
        r.rule(move |c, n| if (c, n) == (Call::Land, failing) { Verdict::Fail(e) } else { Verdict::Go });
        let told: Vec<_> = (0..6).map(|n| put(&r, &h, n)).collect();
        assert!(told.iter().all(|t| [Ok(MIB), Err(e)].contains(t)), "{told:?}");
        assert!(told.iter().filter(|t| t.is_err()).count() < 2, "once: {told:?}");
        let error = r.close(&h).unwrap_err();
        assert_eq!(error.errno(), e);
        assert!([Step::Data, Step::Queue].contains(&error.failed_at), "{error:?}");
        assert_eq!(r.on_disk("a").as_deref(), Some("old"));
        assert_eq!(r.engine.failed_versions().len(), 1);
        r.rule(|_, _| Verdict::Go);
        r.engine.release(&h);
        r.engine.release(&old);
    }
}

/// Writes again what may be known to have failed: when all has landed, the program is told once, by a write that is not made.
fn put_again(r: &Rig, h: &Handle, off: usize, data: &[u8]) {
    r.engine.stat(&h.file).unwrap();
    let write = || done(r.engine.write(h, off as u64, data, false));
    let told = write();
    assert!([Ok(data.len()), Err(Errno::NOSPC)].contains(&told), "{told:?}");
    assert_eq!(told.or_else(|_| write()), Ok(data.len()));
}

/// What the program writes again whole, or cuts away, is made good.
#[test]
fn what_failed_on_its_way_can_be_made_good() {
    for cuts in [false, true] {
        let r = direct();
        let h = r.create("a");
        r.rule(|c, n| if (c, n) == (Call::Land, 1) { Verdict::Fail(Errno::NOSPC) } else { Verdict::Go });
        (0..2).for_each(|n| assert_eq!(put(&r, &h, n), Ok(MIB)));
        if cuts {
            // One of the two failed, whichever landed second.
            done(r.engine.set_size(&h.file, Some(&h), 0, h.policy, false)).unwrap();
        }
        // They overlap those that are on their way, so they come after their end.
        (0..2).for_each(|n| put_again(&r, &h, n * MIB, &piece(n)));
        r.close(&h).unwrap();
        assert!(content(&r).unwrap() == (0..2).flat_map(piece).collect::<Vec<_>>());
        r.engine.release(&h);
    }
}

/// So are small writes, which wait for the device, when the program repeats them.
#[test]
fn a_small_direct_write_made_good_is_published() {
    let r = direct();
    let h = r.create("a");
    r.rule(|c, n| if (c, n) == (Call::Write, 0) { Verdict::Fail(Errno::NOSPC) } else { Verdict::Go });
    assert_eq!(r.write(&h, &piece(0)[..8192]), Err(Errno::NOSPC));
    assert_eq!(r.write(&h, &piece(0)[..8192]), Ok(8192));
    r.close(&h).unwrap();
    assert!(content(&r).unwrap() == piece(0)[..8192]);
    r.engine.release(&h);
}

/// Control of it: less than the whole is not enough, nor one of two.
#[test]
fn what_failed_is_not_made_good_by_less() {
    type Rewrite = (usize, usize);
    let cases: [(usize, Rewrite); 4] = [(1, (0, 4096)), (1, (0, 100)), (1, (4096, MIB - 4096)), (2, (0, MIB))];
    for (failing, (off, len)) in cases {
        let r = direct();
        let h = r.create("a");
        r.rule(move |c, n| if c == Call::Land && n < failing { Verdict::Fail(Errno::NOSPC) } else { Verdict::Go });
        for n in 0..failing {
            // Told of the one before, it is written all the same.
            let _told = put(&r, &h, n).or_else(|_| put(&r, &h, n)).unwrap();
        }
        put_again(&r, &h, off, &piece(0)[..len]);
        assert_eq!(r.close(&h).unwrap_err().errno(), Errno::NOSPC, "{failing} {off} {len}");
        assert!(content(&r).is_none());
        r.engine.release(&h);
    }
}

/// A write of bytes that are on their way comes after those, in a file whose name went meanwhile, too.
#[test]
fn a_write_waits_for_those_of_the_same_bytes() {
    for unlinked in [false, true] {
        let r = direct();
        let h = r.create("a");
        let (arrived, go) = stop_at(&r, Call::Land);
        assert_eq!(put(&r, &h, 0), Ok(MIB));
        arrived.recv_timeout(Duration::from_secs(60)).unwrap();
        if unlinked {
            unlink(&r, &h);
        }
        std::thread::scope(|scope| {
            let (tx, rx) = mpsc::channel();
            let (engine, h) = (r.engine.clone(), &h);
            scope.spawn(move || tx.send(done(engine.write(h, 4096, &piece(7), false))).unwrap());
            assert!(rx.recv_timeout(Duration::from_millis(100)).is_err(), "it waits");
            go.send(()).unwrap();
            assert_eq!(rx.recv_timeout(Duration::from_secs(60)).unwrap(), Ok(MIB));
        });
        let mut buf = vec![0; MIB];
        assert_eq!(r.engine.read(&h.file, 4096, &mut buf), Ok(MIB));
        assert!(buf == piece(7));
        r.close(&h).unwrap();
        r.engine.release(&h);
    }
}

/// Of two writes of the same bytes the later one counts, though workers of the kernel make them side by side.
#[test]
fn writes_of_the_same_bytes_keep_their_order() {
    let r = direct();
    let h = r.create("a");
    let mut buf = vec![0; MIB];
    for round in 0..100_u8 {
        for n in 0..4 {
            assert_eq!(done(r.engine.write(&h, 0, &vec![round ^ n; MIB >> (n % 2)], false)), Ok(MIB >> (n % 2)));
        }
        assert_eq!(r.engine.read(&h.file, 0, &mut buf), Ok(MIB));
        let whole = |half: &[u8], byte| half.iter().all(|b| *b == byte);
        assert!(whole(&buf[..MIB / 2], round ^ 3) && whole(&buf[MIB / 2..], round ^ 2), "round {round}");
    }
    r.close(&h).unwrap();
    r.engine.release(&h);
}

/// Zeros `at` in the version without a name that is open, whoever writes it.
fn spoil(dir: &std::path::Path, at: std::ops::Range<usize>) {
    for fd in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let unnamed = |to: &std::path::Path| to.starts_with(dir) && to.to_string_lossy().ends_with("(deleted)");
        if std::fs::read_link(fd.path()).is_ok_and(|to| unnamed(&to)) {
            let file = std::fs::OpenOptions::new().write(true).open(fd.path()).unwrap();
            file.write_all_at(&vec![0; at.len()], at.start as u64).unwrap();
        }
    }
}

/// What the kernel took less of, or did not try, is written all the same.
#[test]
fn what_did_not_land_whole_is_written() {
    let r = direct();
    let h = r.create("a");
    let dir = r.dir.path().to_path_buf();
    r.rule(move |c, n| {
        let (done, verdict) = match (c, n) {
            (Call::Land, 0) => (4096, Verdict::Short(4096)),
            (Call::Land, 1) => (0, Verdict::Short(0)),
            (Call::Land, 2) => (0, Verdict::Fail(Errno::CANCELED)),
            (Call::Land, 3) => (0, Verdict::Fail(Errno::INVAL)),
            _ => return Verdict::Go,
        };
        spoil(&dir, n * MIB + done..(n + 1) * MIB);
        verdict
    });
    for n in 0..5 {
        assert_eq!(put(&r, &h, n), Ok(MIB));
        // It has landed.
        assert_eq!(r.engine.stat(&h.file).unwrap().st_size as usize, (n + 1) * MIB);
    }
    r.close(&h).unwrap();
    assert!(content(&r).unwrap() == (0..5).flat_map(piece).collect::<Vec<_>>());
    r.engine.release(&h);
}

/// P5. Programs see what they wrote, wherever it is: size, content, and times that no late write moves.
#[test]
fn programs_see_what_is_on_its_way() {
    let r = direct();
    let h = r.create("a");
    let mut buf = vec![0; MIB];
    for n in 0..8 {
        assert_eq!(put(&r, &h, n), Ok(MIB));
        assert_eq!(r.engine.stat(&h.file).unwrap().st_size as usize, (n + 1) * MIB);
        assert_eq!(r.engine.read(&h.file, (n * MIB) as u64, &mut buf), Ok(MIB));
        assert!(buf == piece(n));
    }
    (8..12).for_each(|n| assert_eq!(put(&r, &h, n), Ok(MIB)));
    let old = rustix::fs::Timespec { tv_sec: 1000, tv_nsec: 7 };
    let times = rustix::fs::Timestamps { last_access: old, last_modification: old };
    done(r.engine.with_inode(&h.file, true, |fd| rustix::fs::futimens(fd, &times))).unwrap();
    r.close(&h).unwrap();
    let st = r.engine.stat(&h.file).unwrap();
    assert_eq!((st.st_mtime, st.st_mtime_nsec), (1000, 7));
    r.engine.release(&h);
}

/// Versions that are given up with writes on their way, unaligned writes among aligned ones, many files at once.
#[test]
fn any_mixture_ends_well() {
    let r = direct();
    let files: Vec<_> = (0..12).map(|i| r.create(&format!("f{i}"))).collect();
    for n in 0..5 {
        for h in &files {
            assert_eq!(put(&r, h, n), Ok(MIB));
        }
    }
    for (i, h) in files.iter().enumerate() {
        assert_eq!(done(r.engine.write(h, 3 * MIB as u64 - 5, b"between", false)), Ok(7));
        assert_eq!(put(&r, h, 4), Ok(MIB));
        if i % 3 == 0 {
            done(r.engine.set_size(&h.file, Some(h), 0, h.policy, false)).unwrap();
        } else {
            r.close(h).unwrap();
        }
    }
    let mut want: Vec<u8> = (0..5).flat_map(piece).collect();
    want[3 * MIB - 5..3 * MIB + 2].copy_from_slice(b"between");
    for (i, h) in files.iter().enumerate() {
        r.engine.release(h);
        let got = || std::fs::read(r.dir.path().join(format!("f{i}")));
        assert!(i % 3 == 0 || got().unwrap() == want, "file {i}");
    }
    drop(r);
}

/// Close waits for all of a version, so a large one is written to the device while its program still writes; where
/// close waits for nothing, the kernel takes its time. An error there fails the save.
#[test]
fn a_large_version_is_written_out_while_it_grows() {
    for (durability, fails) in [(Durability::Close, false), (Durability::Close, true), (Durability::Fsync, false)] {
        let mut config = Config::default();
        config.policies.base.durability = durability;
        let r = rig_with(config);
        let h = r.create("a");
        let verdict = if fails { Verdict::Fail(Errno::IO) } else { Verdict::Go };
        r.rule(move |c, _| if c == Call::WritePiece { verdict } else { Verdict::Go });
        let early = durability == Durability::Close;
        (0..20).for_each(|n| assert!([Ok(MIB), Err(Errno::IO)].contains(&put(&r, &h, n))));
        let patience = Instant::now() + Duration::from_secs(60);
        while early && count(&r, Call::WritePiece) == 0 && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(count(&r, Call::WritePiece) > 0, early);
        let saved = r.close(&h).map_err(|e| e.errno());
        assert_eq!(saved, if fails { Err(Errno::IO) } else { Ok(()) });
        assert_eq!(r.engine.drain(Duration::from_secs(60)), Ok(()));
        assert_eq!(count(&r, Call::WritePiece) > 0, early);
        let all = (0..20).flat_map(piece).collect::<Vec<_>>();
        assert!(content(&r) == (!fails).then_some(all));
        r.engine.release(&h);
    }
}

/// Section 2. Others do not wait for a large save: its bytes are written to the device before it joins a batch.
#[test]
fn a_large_save_joins_a_batch_when_it_is_written_out() {
    let r = rig_with(Config::default());
    let (h, go) = stuck(&r, 20);
    let rx = closing(&r, &h);
    // Its bytes are stuck, and so is it; nobody else is.
    let small = r.save("small", b"small");
    assert!(content(&r).is_none());
    assert!(rx.try_recv().is_err());
    go.send(()).unwrap();
    rx.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    assert!(content(&r).unwrap() == (0..20).flat_map(piece).collect::<Vec<_>>());
    r.engine.release(&small);
    r.engine.release(&h);
}

/// A commit that does not wait for all pieces waits for the one that is being written, which may hear of an error that nobody
/// else would.
#[test]
fn a_piece_that_fails_beside_the_commit_fails_it() {
    let r = rig_with(Config::default());
    r.rule(|c, _| if c == Call::WritePiece { Verdict::Fail(Errno::IO) } else { Verdict::Go });
    let (h, go) = stuck(&r, 20);
    // At this level saves are committed in their order, without delay.
    let policy = Policy { durability: Durability::Fsync, ..h.policy };
    let other = done(r.engine.open(&h.file, libc::O_RDWR, policy, false)).unwrap();
    let rx = closing(&r, &h);
    assert!(rx.recv_timeout(Duration::from_millis(100)).is_err(), "it waits");
    go.send(()).unwrap();
    assert_eq!(rx.recv_timeout(Duration::from_secs(60)).unwrap().unwrap_err().errno(), Errno::IO);
    assert!(content(&r).is_none());
    r.engine.release(&other);
    r.engine.release(&h);
}

/// The mount ends while a large save is on its way: it is saved all the same, and its close is answered.
#[test]
fn a_large_save_outlives_the_end_of_the_mount() {
    let r = rig_with(Config::default());
    let (h, go) = stuck(&r, 20);
    let rx = closing(&r, &h);
    r.engine.release(&h);
    let engine = r.engine.clone();
    let end = std::thread::spawn(move || engine.shutdown(Duration::ZERO));
    assert!(rx.recv_timeout(Duration::from_millis(100)).is_err(), "its piece is stuck");
    go.send(()).unwrap();
    rx.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    assert!(end.join().unwrap().is_err(), "it was not drained in time");
    assert!(content(&r).unwrap() == (0..20).flat_map(piece).collect::<Vec<_>>());
}

/// What is given up is not written to the device any more.
#[test]
fn a_version_whose_name_went_is_not_written_out() {
    let r = rig_with(Config::default());
    let (h, go) = stuck(&r, 40);
    unlink(&r, &h);
    go.send(()).unwrap();
    r.engine.release(&h);
    assert_eq!(r.engine.shutdown(Duration::from_secs(60)), Ok(()));
    assert_eq!(count(&r, Call::WritePiece), 1, "the one that was being written");
}

//! The engine without a mount, on a real directory, with every call seen and faults injected at the seam.
//! A paragraph of the contract over each test.

#![allow(clippy::unwrap_used)] // helpers of tests: a failure there is a failure of the test

mod large;
mod waiters;

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use fsys_mount::backend::{Backing, Call, FileId, Gate, Verdict};
use fsys_mount::config::Config;
use fsys_mount::engine::dir::Dir;
use fsys_mount::engine::dispatch::{Cause, CommitError, Done, Outcome, Step};
use fsys_mount::engine::file::Handle;
use fsys_mount::engine::io::Access;
use fsys_mount::engine::{Engine, layout::Layout};
use fsys_mount::error::Errno;
use fsys_mount::fs::Caller;

/// Records every call, and answers by a rule.
#[derive(Default)]
struct Script {
    seen: Mutex<Vec<Call>>,
    rule: Mutex<Option<Rule>>,
    /// The first call of this kind tells that it is there, and waits to be told to go on.
    stop: Mutex<Option<(Call, mpsc::Sender<()>, mpsc::Receiver<()>)>>,
}

/// Given the call and how many of its kind came before, what happens to it.
type Rule = Box<dyn FnMut(Call, usize) -> Verdict + Send>;

impl Gate for Script {
    fn before(&self, call: Call) -> Verdict {
        let n = {
            let mut seen = self.seen.lock().unwrap();
            seen.push(call);
            seen.iter().filter(|c| **c == call).count() - 1
        };
        let stop = self.stop.lock().unwrap().take_if(|s| s.0 == call);
        if let Some((_, arrived, go)) = stop {
            arrived.send(()).unwrap();
            go.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        let mut rule = self.rule.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        rule.as_mut().map_or(Verdict::Go, |r| r(call, n))
    }
}

struct Rig {
    engine: Arc<Engine>,
    script: Arc<Script>,
    root: Arc<Dir>,
    dir: tempfile::TempDir,
    _layout: Layout,
}

fn rig_with(config: Config) -> Rig {
    // /dev/shm is a tmpfs wherever there is glibc: unnamed files, links and attributes as on a disk.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let layout = Layout::open(dir.path()).unwrap();
    let own = |fd: std::os::fd::BorrowedFd<'_>| -> OwnedFd { fd.try_clone_to_owned().unwrap() };
    let script = Arc::new(Script::default());
    let gate: Arc<dyn Gate> = script.clone();
    let backing = Backing::open(own(layout.root()), own(layout.staging()), own(layout.failed()), Some(gate)).unwrap();
    let st = rustix::fs::fstat(layout.root()).unwrap();
    let id = FileId::of(&st);
    let root = Arc::new(Dir::new(1, id, backing.anchor_of(layout.root().as_fd(), id).unwrap(), None));
    Rig { engine: Engine::start(backing, config).unwrap(), script, root, dir, _layout: layout }
}

fn rig() -> Rig {
    rig_with(Config::default())
}

impl Rig {
    fn rule(&self, f: impl FnMut(Call, usize) -> Verdict + Send + 'static) {
        self.script.seen.lock().unwrap().clear();
        *self.script.rule.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(Box::new(f));
    }
    fn create(&self, name: &str) -> Handle {
        let caller = Caller { uid: 0, gid: 0, pid: 1, umask: 0o022 };
        let policy = self.engine.config().policies.base;
        let flags = libc::O_RDWR | libc::O_CREAT;
        self.engine.create(&self.root, OsStr::new(name), 0o644, &caller, flags, policy, |id| id.ino).unwrap()
    }
    fn rewrite(&self, h: &Handle) -> Handle {
        done(self.engine.open(&h.file, libc::O_RDWR | libc::O_TRUNC, h.policy, false)).unwrap()
    }
    fn write(&self, h: &Handle, data: &[u8]) -> Result<usize, Errno> {
        done(self.engine.write(h, 0, data, false))
    }
    fn close(&self, h: &Handle) -> Outcome {
        let (tx, rx) = mpsc::channel();
        self.engine.close(h, 0, Done::new(move |r| tx.send(r).unwrap()));
        rx.recv_timeout(Duration::from_secs(60)).expect("every close is answered")
    }
    fn save(&self, name: &str, data: &[u8]) -> Handle {
        let h = self.create(name);
        self.write(&h, data).unwrap();
        self.close(&h).unwrap();
        self.engine.release(&h);
        h
    }
    fn on_disk(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.dir.path().join(name)).ok()
    }
    fn failed(&self) -> Vec<String> {
        let dir = self.dir.path().join(".fsys/failed");
        std::fs::read_dir(dir).unwrap().map(|e| std::fs::read_to_string(e.unwrap().path()).unwrap()).collect()
    }
    fn leftovers(&self) -> usize {
        self.dir.path().join(".fsys/staging").read_dir().unwrap().count()
    }
    /// Commits several handles so that they make one batch: the first commit blocks in its answer until all are queued.
    fn commit_together(&self, handles: &[Handle]) -> Vec<Outcome> {
        let first = self.create("opens-the-batch");
        self.write(&first, b"x").unwrap();
        let (go, hold) = mpsc::channel::<()>();
        let (entered, running) = mpsc::channel();
        let (tx, rx) = mpsc::channel();
        let t = tx.clone();
        self.engine.close(
            &first,
            0,
            Done::new(move |_| {
                entered.send(()).unwrap();
                hold.recv().unwrap();
                t.send((usize::MAX, Ok(()))).unwrap();
            }),
        );
        running.recv_timeout(Duration::from_secs(60)).expect("the first is answered");
        for (i, h) in handles.iter().enumerate() {
            let t = tx.clone();
            self.engine.close(h, 0, Done::new(move |r| t.send((i, r)).unwrap()));
        }
        self.script.seen.lock().unwrap().clear();
        go.send(()).unwrap();
        let mut got: Vec<Option<Outcome>> = vec![None; handles.len()];
        for _ in 0..=handles.len() {
            let (i, r) = rx.recv_timeout(Duration::from_secs(60)).expect("every ticket is answered");
            if i != usize::MAX {
                assert!(got[i].replace(r).is_none(), "answered twice");
            }
        }
        got.into_iter().map(Option::unwrap).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let drained = self.engine.shutdown(Duration::from_secs(60));
        if !std::thread::panicking() && self.engine.read_only_reason().is_none() {
            assert_eq!(drained, Ok(()));
        }
    }
}

fn done<T>(a: Access<T>) -> Result<T, Errno> {
    match a {
        Access::Done(r) => r,
        Access::Wait => panic!("nothing commits here"),
    }
}

fn barriers(seen: &[Call]) -> Vec<Call> {
    let kept =
        [Call::WriteOut, Call::SyncFile, Call::SyncFs, Call::LinkStage, Call::Publish, Call::SyncDir, Call::Answer];
    seen.iter().copied().filter(|c| kept.contains(c)).collect()
}

/// P2. Data flushed before the rename, parent directory synced after it, then the answer.
#[test]
fn order_of_a_single_commit() {
    let r = rig();
    let h = r.save("a", b"one");
    let h = r.rewrite(&h);
    r.write(&h, b"two").unwrap();
    r.script.seen.lock().unwrap().clear();
    r.close(&h).unwrap();
    let seen = barriers(&r.script.seen.lock().unwrap());
    assert_eq!(seen, [Call::SyncFile, Call::LinkStage, Call::Publish, Call::SyncDir, Call::Answer]);
    assert_eq!(r.on_disk("a").as_deref(), Some("two"));
    r.engine.release(&h);
}

/// P2 and section 2. A batch: all data of the batch, then the renames, then one sync per distinct parent, then answers.
#[test]
fn order_of_a_batch() {
    let r = rig();
    let handles: Vec<_> = (0..5)
        .map(|i| {
            let h = r.save(&format!("f{i}"), b"old");
            let h = r.rewrite(&h);
            r.write(&h, b"new").unwrap();
            h
        })
        .collect();
    assert!(r.commit_together(&handles).iter().all(Result::is_ok));
    let seen = barriers(&r.script.seen.lock().unwrap());
    let mut want = vec![Call::SyncFile; 5];
    want.extend([Call::LinkStage, Call::Publish].repeat(5));
    want.push(Call::SyncDir);
    want.extend([Call::Answer; 5]);
    assert_eq!(seen, want);
    handles.iter().for_each(|h| {
        r.engine.release(h);
    });
}

/// P1. Nothing of a version is in the backing directory before its commit; the mount sees every write at once.
#[test]
fn live_view_and_committed_backing() {
    let r = rig();
    let h = r.create("a");
    r.write(&h, b"half").unwrap();
    assert_eq!(r.on_disk("a"), None);
    let mut buf = [0; 8];
    assert_eq!(r.engine.read(&h.file, 0, &mut buf).unwrap(), 4);
    r.close(&h).unwrap();
    assert_eq!(r.on_disk("a").as_deref(), Some("half"));
    let h = r.rewrite(&h);
    assert_eq!(r.engine.read(&h.file, 0, &mut buf).unwrap(), 0, "programs see the truncation");
    assert_eq!(r.on_disk("a").as_deref(), Some("half"), "the backing directory does not");
    r.write(&h, b"whole").unwrap();
    r.close(&h).unwrap();
    assert_eq!(r.on_disk("a").as_deref(), Some("whole"));
    assert_eq!(r.leftovers(), 0);
    r.engine.release(&h);
}

/// Section 4. A close before anything was written commits nothing; a version that stayed empty commits at the last close.
#[test]
fn closes_of_duplicates() {
    let r = rig();
    let h = r.create("a");
    r.close(&h).unwrap();
    assert_eq!(r.on_disk("a"), None, "the shell closes a duplicate before the program writes");
    r.engine.release(&h);
    assert_eq!(r.engine.drain(Duration::from_secs(60)), Ok(()));
    assert_eq!(r.on_disk("a").as_deref(), Some(""));
}

/// P3. A failure at any step of the commit reaches the caller with its errno; the old version stands; the failed one is kept.
#[test]
fn a_directory_needs_a_sync_for_what_programs_were_told_of() {
    let r = rig();
    let (engine, root) = (r.engine.clone(), r.root.clone());
    assert!(!root.is_synced(), "a daemon that was killed may have left names that are not durable");
    root.mark_synced(root.changes());
    let (tx, rx) = mpsc::channel();
    r.rule(move |call, nth| {
        // In the barrier of a commit, whose program is told nothing yet.
        if call == Call::SyncDir && nth == 0 {
            let (answer, tx) = (tx.clone(), tx.clone());
            engine.sync_dir(&root, 0, true, Done::new(move |r| answer.send(r).unwrap()));
            // A rename that ends here is too late for that barrier.
            engine.names_changed(&root);
            tx.send(Ok(())).unwrap();
        }
        Verdict::Go
    });
    r.save("a", b"1");
    assert!(rx.iter().take(2).all(|r| r.is_ok()), "answered within the barrier, so without one of its own");
    assert!(!r.root.is_synced(), "the rename is not durable");
    r.engine.drain(Duration::from_secs(60)).unwrap();
    assert!(r.root.is_synced());
    let syncs = r.script.seen.lock().unwrap().iter().filter(|c| **c == Call::SyncDir).count();
    assert_eq!(syncs, 2, "of the commit and of the rename");
}

#[test]
fn each_step_can_fail() {
    for call in [Call::SyncFile, Call::LinkStage, Call::Publish] {
        for e in [Errno::NOSPC, Errno::DQUOT] {
            let r = rig();
            let h = r.save("a", b"old");
            let h = r.rewrite(&h);
            r.write(&h, b"new").unwrap();
            r.rule(move |c, _| if c == call { Verdict::Fail(e) } else { Verdict::Go });
            let error = r.close(&h).unwrap_err();
            assert_eq!(error.errno(), e, "{call:?}");
            assert_eq!(error.failed_at, if call == Call::SyncFile { Step::Data } else { Step::Publish });
            assert_eq!(r.on_disk("a").as_deref(), Some("old"), "{call:?}");
            assert_eq!(r.failed(), ["new"], "{call:?}");
            assert_eq!(r.leftovers(), 0, "{call:?}");
            assert_eq!(r.engine.failed_versions().len(), 1);
            assert!(r.engine.writable().is_ok(), "{e} is no failure of the device");
            // The descriptor stays failed; a new one works.
            assert_eq!(r.write(&h, b"x"), Err(Errno::IO));
            assert!(r.close(&h).is_ok(), "the error was reported; nothing was written since");
            r.rule(|_, _| Verdict::Go);
            let again = r.rewrite(&h);
            r.write(&again, b"newer").unwrap();
            r.close(&again).unwrap();
            assert_eq!(r.on_disk("a").as_deref(), Some("newer"));
            r.engine.release(&again);
            r.engine.release(&h);
        }
    }
}

/// P3. The parent directory's sync included: EIO reaches the caller, and the mount turns read-only and stays so.
#[test]
fn eio_on_the_parent_sync() {
    let r = rig();
    let h = r.save("a", b"old");
    let h = r.rewrite(&h);
    r.write(&h, b"new").unwrap();
    r.rule(|c, _| if c == Call::SyncDir { Verdict::Fail(Errno::IO) } else { Verdict::Go });
    let error = r.close(&h).unwrap_err();
    assert_eq!((error.errno(), error.failed_at, error.completed), (Errno::IO, Step::SyncParent, Some(Step::Publish)));
    r.rule(|_, _| Verdict::Go);
    assert_eq!(r.engine.writable(), Err(Errno::ROFS));
    assert_eq!(r.write(&h, b"more"), Err(Errno::ROFS));
    assert!(r.engine.read_only_reason().unwrap().contains("directory"));
    let text = r.on_disk("a").unwrap();
    assert!(text == "old" || text == "new", "whole, one or the other: {text}");
    r.engine.release(&h);
}

/// P3. A failed device flush makes the mount read-only; what was committed before stands and can be read.
#[test]
fn eio_on_a_data_flush() {
    let r = rig();
    let kept = r.save("kept", b"safe");
    let h = r.create("a");
    r.write(&h, b"new").unwrap();
    r.rule(|c, _| if c == Call::SyncFile { Verdict::Fail(Errno::IO) } else { Verdict::Go });
    assert_eq!(r.close(&h).unwrap_err().errno(), Errno::IO);
    assert_eq!(r.on_disk("a"), None, "never published");
    assert_eq!(r.failed(), ["new"]);
    assert_eq!(r.engine.writable(), Err(Errno::ROFS));
    let k = done(r.engine.open(&kept.file, libc::O_RDONLY, kept.policy, false)).unwrap();
    let mut buf = [0; 4];
    assert_eq!(r.engine.read(&k.file, 0, &mut buf).unwrap(), 4);
    assert_eq!(&buf, b"safe");
    assert!(matches!(r.engine.open(&kept.file, libc::O_RDWR, kept.policy, false), Access::Done(Err(Errno::ROFS))));
    r.engine.release(&k);
    r.engine.release(&h);
}

/// P3. After a failed flush nothing that is queued is reported durable, though the next flush would say so.
#[test]
fn nothing_queued_survives_a_failed_flush() {
    let r = rig();
    let handles: Vec<_> = (0..3)
        .map(|i| {
            let h = r.save(&format!("f{i}"), b"old");
            let h = r.rewrite(&h);
            r.write(&h, b"new").unwrap();
            h
        })
        .collect();
    // Only the very first sync of a directory fails, and not before the others are queued behind it.
    let (entered, running) = mpsc::channel();
    let (go, hold) = mpsc::channel::<()>();
    r.rule(move |c, n| match (c, n) {
        (Call::SyncDir, 0) => {
            entered.send(()).unwrap();
            hold.recv().unwrap();
            Verdict::Fail(Errno::IO)
        }
        _ => Verdict::Go,
    });
    let (tx, rx) = mpsc::channel();
    let close = |h: &Handle| {
        let tx = tx.clone();
        r.engine.close(h, 0, Done::new(move |result| tx.send(result).unwrap()));
    };
    let first = r.create("first");
    r.write(&first, b"x").unwrap();
    close(&first);
    running.recv_timeout(Duration::from_secs(60)).expect("the first sync begins");
    handles.iter().for_each(close);
    go.send(()).unwrap();
    for _ in 0..4 {
        let result = rx.recv_timeout(Duration::from_secs(60)).expect("every close is answered");
        assert_eq!(result.unwrap_err().errno(), Errno::IO);
    }
    r.engine.release(&first);
    assert!((0..3).all(|i| r.on_disk(&format!("f{i}")).as_deref() == Some("old")));
    handles.iter().for_each(|h| {
        r.engine.release(h);
    });
}

/// P3. One commit's failure fails no other commit of its batch; a panic is such a failure.
#[test]
fn a_failure_and_a_panic_are_isolated() {
    for panics in [false, true] {
        for call in [Call::SyncFile, Call::LinkStage, Call::Publish] {
            let r = rig();
            let handles: Vec<_> = (0..5)
                .map(|i| {
                    let h = r.save(&format!("f{i}"), b"old");
                    let h = r.rewrite(&h);
                    r.write(&h, format!("new{i}").as_bytes()).unwrap();
                    h
                })
                .collect();
            // The batch's own calls count from 0: `commit_together` forgets those before.
            r.rule(move |c, n| match (c == call && n == 2, panics) {
                (true, true) => panic!("injected"),
                (true, false) => Verdict::Fail(Errno::NOSPC),
                _ => Verdict::Go,
            });
            let got = r.commit_together(&handles);
            for (i, result) in got.iter().enumerate() {
                let text = r.on_disk(&format!("f{i}")).unwrap();
                if i == 2 {
                    let error = result.as_ref().unwrap_err();
                    assert_eq!(error.errno(), if panics { Errno::IO } else { Errno::NOSPC }, "{call:?}");
                    assert_eq!(matches!(&error.source, Cause::Fault(f) if f.to_string().contains("injected")), panics);
                    assert_eq!(text, "old");
                } else {
                    assert_eq!(*result, Ok(()), "{call:?} {i}");
                    assert_eq!(text, format!("new{i}"));
                }
            }
            r.rule(|_, _| Verdict::Go);
            assert_eq!(r.failed(), ["new2"]);
            assert!(r.engine.writable().is_ok());
            handles.iter().for_each(|h| {
                r.engine.release(h);
            });
        }
    }
}

/// P1, P3. A write that found no space: a program that closes regardless gets the error, never a prefix.
#[test]
fn a_version_with_a_failed_write_is_not_published() {
    let r = rig();
    let h = r.save("a", b"old");
    let h = r.rewrite(&h);
    done(r.engine.write(&h, 0, b"first", false)).unwrap();
    r.rule(|c, _| if c == Call::Write { Verdict::Fail(Errno::NOSPC) } else { Verdict::Go });
    assert_eq!(done(r.engine.write(&h, 5, b"second", false)), Err(Errno::NOSPC));
    r.rule(|_, _| Verdict::Go);
    assert_eq!(r.close(&h).unwrap_err().errno(), Errno::NOSPC);
    assert_eq!(r.on_disk("a").as_deref(), Some("old"));
    assert_eq!(r.failed(), ["first"]);
    r.engine.release(&h);
}

/// The same, but the program makes it good: short write, then the rest at the place that failed.
#[test]
fn a_failed_write_made_good_is_published() {
    let r = rig();
    let h = r.create("a");
    r.rule(|c, n| match (c, n) {
        (Call::Write, 0) => Verdict::Short(3),
        (Call::Write, 1) => Verdict::Fail(Errno::NOSPC),
        _ => Verdict::Go,
    });
    assert_eq!(done(r.engine.write(&h, 0, b"abcdef", false)), Ok(3));
    assert_eq!(done(r.engine.write(&h, 3, b"def", false)), Err(Errno::NOSPC));
    assert_eq!(done(r.engine.write(&h, 3, b"def", false)), Ok(3));
    r.close(&h).unwrap();
    assert_eq!(r.on_disk("a").as_deref(), Some("abcdef"));
    r.engine.release(&h);
}

/// P8. At the bound of staging space a write gets ENOSPC, and the old version stands.
#[test]
fn staging_space_is_bounded() {
    let mut config = Config::default();
    config.limits.staging_max_bytes = 100;
    let r = rig_with(config);
    let h = r.save("a", b"old");
    let h = r.rewrite(&h);
    assert_eq!(r.write(&h, &[b'x'; 101]), Err(Errno::NOSPC));
    assert_eq!(r.close(&h).unwrap_err().errno(), Errno::NOSPC);
    assert_eq!(r.on_disk("a").as_deref(), Some("old"));
    r.engine.release(&h);
    assert_eq!(r.engine.counters.values().staged_bytes, 0, "a failed version gives its space back");
}

/// P8. At the bound of the queue writers wait, nothing is dropped, and the thread that submits does not block.
#[test]
fn a_full_queue_makes_writers_wait() {
    let mut config = Config::default();
    config.limits.queue_max = 2;
    let r = rig_with(config);
    let handles: Vec<_> = (0..20)
        .map(|i| {
            let h = r.create(&format!("f{i}"));
            r.write(&h, b"data").unwrap();
            h
        })
        .collect();
    assert!(r.commit_together(&handles).iter().all(Result::is_ok));
    assert!(r.engine.counters.values().queue_full_waits > 0, "the bound was reached");
    assert!((0..20).all(|i| r.on_disk(&format!("f{i}")).as_deref() == Some("data")));
    handles.iter().for_each(|h| {
        r.engine.release(h);
    });
}

/// Shutdown with a full queue: everything that was submitted is run and answered.
#[test]
fn shutdown_with_a_full_queue() {
    let mut config = Config::default();
    config.limits.queue_max = 4;
    let r = rig_with(config);
    let (tx, rx) = mpsc::channel();
    for i in 0..40 {
        let h = r.create(&format!("f{i}"));
        r.write(&h, b"data").unwrap();
        let tx = tx.clone();
        r.engine.close(&h, 0, Done::new(move |res| tx.send(res).unwrap()));
        r.engine.release(&h);
    }
    assert_eq!(r.engine.shutdown(Duration::from_secs(60)), Ok(()));
    drop(tx);
    let answers: Vec<Result<(), CommitError>> = rx.iter().collect();
    assert_eq!(answers.len(), 40);
    assert!(answers.iter().all(Result::is_ok));
    assert!((0..40).all(|i| r.on_disk(&format!("f{i}")).as_deref() == Some("data")));
}

/// At a forced end a version that a program was still writing is kept, not published.
#[test]
fn an_unfinished_version_is_kept_at_the_end() {
    let r = rig();
    let h = r.save("a", b"old");
    let h = r.rewrite(&h);
    r.write(&h, b"half").unwrap();
    assert!(r.engine.shutdown(Duration::from_millis(10)).is_ok(), "no answer is owed to anyone");
    assert_eq!(r.on_disk("a").as_deref(), Some("old"));
    assert_eq!(r.failed(), ["half"]);
}

/// P1. What was opened to be rewritten, and is not written yet, is no version: the old one stands.
#[test]
fn a_rewrite_that_only_began_is_not_published_at_the_end() {
    let r = rig();
    let h = r.save("a", b"old");
    let _begun = r.rewrite(&h);
    assert!(r.engine.shutdown(Duration::from_millis(10)).is_ok(), "no answer is owed to anyone");
    assert_eq!(r.on_disk("a").as_deref(), Some("old"));
}

/// Section 4. After a commit, a descriptor that is still open goes on in a new staged version.
#[test]
fn a_descriptor_goes_on_after_a_commit() {
    let r = rig();
    let h = r.create("log");
    done(r.engine.write(&h, 0, b"one\n", false)).unwrap();
    r.close(&h).unwrap();
    done(r.engine.write(&h, 4, b"two\n", false)).unwrap();
    assert_eq!(r.on_disk("log").as_deref(), Some("one\n"), "committed bytes only");
    r.close(&h).unwrap();
    assert_eq!(r.on_disk("log").as_deref(), Some("one\ntwo\n"));
    r.engine.release(&h);
}

/// P6. Mode, owner and attributes survive a commit.
#[test]
fn metadata_survives() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let r = rig();
    let h = r.save("a", b"old");
    let path = r.dir.path().join("a");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    let root = rustix::process::geteuid().is_root();
    if root {
        std::os::unix::fs::chown(&path, Some(1234), Some(4321)).unwrap();
    }
    rustix::fs::setxattr(&path, "user.k", b"v", rustix::fs::XattrFlags::empty()).unwrap();
    let h = r.rewrite(&h);
    r.write(&h, b"new").unwrap();
    r.close(&h).unwrap();
    let m = std::fs::metadata(&path).unwrap();
    assert_eq!(m.mode() & 0o7777, 0o640);
    if root {
        assert_eq!((m.uid(), m.gid()), (1234, 4321));
    }
    let mut v = [0; 8];
    assert_eq!(rustix::fs::getxattr(&path, "user.k", &mut v[..]), Ok(1));
    assert_eq!(r.on_disk("a").as_deref(), Some("new"));
    r.engine.release(&h);
}

/// P6. Hard links are never broken.
#[test]
fn hard_links_are_written_in_place() {
    let r = rig();
    let h = r.save("a", b"old");
    std::fs::hard_link(r.dir.path().join("a"), r.dir.path().join("b")).unwrap();
    let h = r.rewrite(&h);
    r.write(&h, b"new").unwrap();
    r.close(&h).unwrap();
    assert_eq!((r.on_disk("a").as_deref(), r.on_disk("b").as_deref()), (Some("new"), Some("new")));
    r.engine.release(&h);
}

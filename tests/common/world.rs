//! The mounted file system without a kernel: the calls of programs go straight to `Fs`, and every backing call passes
//! a seam that counts it, fails it, shortens it, panics, or from one moment on refuses everything, as a kill would.

// Helpers of tests: a panic is the report.
#![allow(clippy::unwrap_used)]

use std::ffi::OsStr;
use std::fs;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use fsys_mount::backend::probe::Strategy;
use fsys_mount::backend::{Backing, Call, Gate, Verdict};
use fsys_mount::config::Config;
use fsys_mount::config::policy::{Durability, WriteMode};
use fsys_mount::engine::layout::Layout;
use fsys_mount::engine::{Engine, recover};
use fsys_mount::error::{Errno, Exit};
use fsys_mount::fs::{Caller, Entry, Fs, IoMode, ROOT, Reply, SetAttr, SetTime};

/// Far longer than anything takes: only a call that is never answered gets here.
const PATIENCE: Duration = Duration::from_secs(60);
const INJECTED: &str = "injected by the test";
const ME: Caller = Caller { uid: 0, gid: 0, pid: 0, umask: 0o022 };

/// What happens to one backing call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Fail(Errno),
    /// A write takes one byte; other calls go on.
    Short,
    Panic,
}

impl What {
    /// What the program must be told.
    pub fn errno(self) -> Errno {
        match self {
            Self::Fail(e) => e,
            Self::Short | Self::Panic => Errno::IO,
        }
    }
}

#[derive(Default)]
struct Seen {
    /// The calls since [`Seam::watch`].
    calls: Vec<Call>,
    at: Vec<(usize, What)>,
    hits: Vec<(Call, What)>,
    cut: bool,
    left_out: Option<Call>,
}

/// See the module.
#[derive(Default)]
pub struct Seam(Mutex<Seen>, OnceLock<Hook>);

/// A call that stops ([`Seam::stop_at`]).
pub struct Stopped {
    arrived: mpsc::Receiver<()>,
    go: mpsc::Sender<()>,
}

impl Stopped {
    /// Returns when it is there.
    pub fn arrived(&self) {
        self.arrived.recv_timeout(PATIENCE).unwrap();
    }

    /// Lets it go on.
    pub fn go(&self) {
        self.go.send(()).unwrap();
    }
}

/// Called before every backing call.
type Hook = Box<dyn Fn(Call) + Send + Sync>;

impl Seam {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets what is done before every call; once.
    pub fn hook(&self, f: impl Fn(Call) + Send + Sync + 'static) {
        assert!(self.1.set(Box::new(f)).is_ok(), "one hook");
    }

    /// The `nth` call of a kind from here on stops until it is told to go on. As [`Seam::hook`], once.
    pub fn stop_at(&self, call: Call, nth: usize) -> Stopped {
        let ((arrived_tx, arrived), (go, going)) = (mpsc::channel(), mpsc::channel());
        let (seen, ends) = (AtomicUsize::new(0), Mutex::new((arrived_tx, going)));
        self.hook(move |c| {
            if c == call && seen.fetch_add(1, Ordering::AcqRel) == nth {
                let (arrived, going) = &*ends.lock().unwrap();
                arrived.send(()).unwrap();
                going.recv_timeout(PATIENCE).unwrap();
            }
        });
        Stopped { arrived, go }
    }

    /// Counts from here; the calls of these numbers meet a fault.
    pub fn watch(&self, at: &[(usize, What)]) {
        *self.seen() = Seen { at: at.to_vec(), ..Seen::default() };
    }

    /// From here on nothing reaches the backing directory: what a killed daemon leaves.
    pub fn cut(&self) {
        self.seen().cut = true;
    }

    /// From here on flushes of this kind are told to be done, and are not.
    pub fn leave_out(&self, call: Call) {
        self.seen().left_out = Some(call);
    }

    /// The calls since [`Seam::watch`].
    pub fn calls(&self) -> Vec<Call> {
        self.seen().calls.clone()
    }

    /// The calls that met a fault.
    pub fn hits(&self) -> Vec<(Call, What)> {
        self.seen().hits.clone()
    }
}

impl Gate for Seam {
    fn before(&self, call: Call) -> Verdict {
        if let Some(hook) = self.1.get() {
            hook(call);
        }
        // An answer cannot be failed.
        if call == Call::Answer {
            return Verdict::Go;
        }
        let what = {
            let mut seen = self.seen();
            if seen.cut {
                return Verdict::Fail(Errno::IO);
            }
            if seen.left_out == Some(call) {
                return Verdict::Short(0);
            }
            seen.calls.push(call);
            let n = seen.calls.len() - 1;
            let what = seen.at.iter().find(|(at, _)| *at == n).map(|(_, what)| *what);
            seen.hits.extend(what.map(|what| (call, what)));
            what
        };
        match what {
            Some(What::Fail(e)) => Verdict::Fail(e),
            Some(What::Short) if call == Call::Write => Verdict::Short(1),
            None | Some(What::Short) => Verdict::Go,
            Some(What::Panic) => std::panic::panic_any(INJECTED),
        }
    }
}

/// Injected panics are no news; others are reported as always.
pub fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if info.payload().downcast_ref::<&str>().is_none_or(|text| *text != INJECTED) {
                usual(info);
            }
        }));
    });
}

/// A configuration in which nothing happens by itself.
pub fn still(durability: Durability, mode: WriteMode) -> Config {
    let mut config = Config::default();
    config.limits.commit_interval_ms = 3_600_000;
    config.policies.base.durability = durability;
    config.policies.base.mode = mode;
    config
}

/// An open descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Fd {
    pub node: u64,
    pub fh: u64,
}

/// See the module.
pub struct World {
    pub fs: Arc<Fs>,
    pub seam: Arc<Seam>,
    root: PathBuf,
    // Held until the end: the lock of the backing directory.
    _layout: Layout,
}

impl World {
    /// Recovers the backing directory and goes to work on it, as a mount does.
    pub fn open(root: &Path, config: Config) -> Self {
        Self::open_as(root, config, None)
    }

    /// As on a file system with this strategy.
    pub fn open_as(root: &Path, config: Config, strategy: Option<Strategy>) -> Self {
        let layout = lock(root);
        recover::recover(&layout, false).unwrap();
        let own = |fd: BorrowedFd<'_>| -> OwnedFd { fd.try_clone_to_owned().unwrap() };
        let seam = Arc::new(Seam::default());
        let gate: Arc<dyn Gate> = seam.clone();
        let backing = Backing::open(own(layout.root()), own(layout.staging()), own(layout.failed()), Some(gate));
        let backing = backing.unwrap().with_journal(own(layout.journal()));
        let backing = match strategy {
            Some(s) => backing.with_strategy(s),
            None => backing,
        };
        let fs = Fs::new(Engine::start(backing, config).unwrap()).unwrap();
        // Whatever nobody uses at the moment is packed at the next opportunity.
        fs.keep_awake(0);
        Self { fs, seam, root: root.into(), _layout: layout }
    }

    pub fn engine(&self) -> &Arc<Engine> {
        self.fs.engine()
    }

    pub fn create(&self, name: &str) -> Result<Fd, Errno> {
        self.create_with(name, libc::O_RDWR | libc::O_TRUNC)
    }

    pub fn create_with(&self, name: &str, flags: i32) -> Result<Fd, Errno> {
        let flags = flags | libc::O_CREAT;
        let made = ask(|reply| self.fs.create(ME, ROOT, OsStr::new(name), 0o644, flags, reply))?;
        Ok(Fd { node: made.0.node, fh: made.1.fh })
    }

    pub fn open_with(&self, name: &str, flags: i32) -> Result<Fd, Errno> {
        let entry = self.lookup(name)?;
        let opened = ask(|reply| self.fs.open(ME, entry.node, flags, reply));
        self.fs.forget(entry.node, 1);
        Ok(Fd { node: entry.node, fh: opened?.fh })
    }

    /// Who would serve a descriptor opened with these flags.
    pub fn io_mode(&self, name: &str, flags: i32) -> Result<IoMode, Errno> {
        let node = self.lookup(name)?.node;
        let opened = ask(|reply| self.fs.open(ME, node, flags, reply))?;
        self.release(Fd { node, fh: opened.fh });
        self.fs.forget(node, 1);
        Ok(opened.io)
    }

    /// write(2) until all is written, as programs do.
    pub fn write_all(&self, fd: Fd, off: u64, data: &[u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < data.len() {
            let rest = &data[done..];
            match ask(|reply| self.fs.write(0, fd.fh, off + done as u64, rest, false, reply))? {
                0 => return Err(Errno::IO),
                n => done += n as usize,
            }
        }
        Ok(())
    }

    /// write(2) at the start, by somebody whose writes take set-user-ID away.
    pub fn write_unprivileged(&self, fd: Fd, data: &[u8]) -> Result<u32, Errno> {
        ask(|reply| self.fs.write(0, fd.fh, 0, data, true, reply))
    }

    pub fn chmod(&self, fd: Fd, mode: u32) -> Result<(), Errno> {
        let set = SetAttr { mode: Some(mode), ..SetAttr::default() };
        ask(|reply| self.fs.setattr(ME, fd.node, None, set, reply)).map(drop)
    }

    /// close(2) of a descriptor that has copies.
    pub fn flush(&self, fd: Fd) -> Result<(), Errno> {
        ask(|reply| self.fs.flush(0, fd.fh, reply))
    }

    /// close(2) of the last one.
    pub fn close(&self, fd: Fd) -> Result<(), Errno> {
        let r = self.flush(fd);
        self.release(fd);
        r
    }

    pub fn release(&self, fd: Fd) {
        // Nobody waits for it.
        let _ = contained(|| {
            self.fs.release(fd.node, fd.fh);
            Ok(())
        });
    }

    pub fn fsync(&self, fd: Fd) -> Result<(), Errno> {
        ask(|reply| self.fs.fsync(0, fd.fh, false, reply))
    }

    pub fn fsync_dir(&self) -> Result<(), Errno> {
        ask(|reply| self.fs.fsyncdir(0, ROOT, reply))
    }

    pub fn allocate(&self, fd: Fd, len: u64) -> Result<(), Errno> {
        self.fallocate(fd, 0, len, 0)
    }

    pub fn fallocate(&self, fd: Fd, off: u64, len: u64, mode: i32) -> Result<(), Errno> {
        ask(|reply| self.fs.fallocate(ME, fd.fh, off, len, mode, reply))
    }

    /// futimens(2), the modification time alone; seconds.
    pub fn set_mtime(&self, fd: Fd, seconds: i64) -> Result<(), Errno> {
        let set = SetAttr { mtime: Some(SetTime::At(seconds, 0)), ..SetAttr::default() };
        ask(|reply| self.fs.setattr(ME, fd.node, Some(fd.fh), set, reply)).map(drop)
    }

    /// ftruncate(2).
    pub fn truncate(&self, fd: Fd, size: u64) -> Result<(), Errno> {
        self.resize(fd.node, Some(fd.fh), size)
    }

    /// chmod(2).
    pub fn chmod_name(&self, name: &str, mode: u32) -> Result<(), Errno> {
        let node = self.lookup(name)?.node;
        let done = self.chmod(Fd { node, fh: 0 }, mode);
        self.fs.forget(node, 1);
        done
    }

    /// truncate(2).
    pub fn truncate_name(&self, name: &str, size: u64) -> Result<(), Errno> {
        let entry = self.lookup(name)?;
        let done = self.resize(entry.node, None, size);
        self.fs.forget(entry.node, 1);
        done
    }

    fn resize(&self, node: u64, fh: Option<u64>, size: u64) -> Result<(), Errno> {
        let set = SetAttr { size: Some(size), ..SetAttr::default() };
        ask(|reply| self.fs.setattr(ME, node, fh, set, reply)).map(drop)
    }

    pub fn copy(&self, from: Fd, to: Fd, len: usize) -> Result<usize, Errno> {
        ask(|reply| self.fs.copy(ME, (from.fh, 0), (to.fh, 0), len, reply)).map(|n| n as usize)
    }

    /// copy_file_range(2) within a file.
    pub fn copy_range(&self, fd: Fd, from: u64, to: u64, len: usize) -> Result<usize, Errno> {
        ask(|reply| self.fs.copy(ME, (fd.fh, from), (fd.fh, to), len, reply)).map(|n| n as usize)
    }

    pub fn rename(&self, from: &str, to: &str) -> Result<(), Errno> {
        ask(|reply| self.fs.rename(ROOT, OsStr::new(from), ROOT, OsStr::new(to), 0, reply))
    }

    pub fn unlink(&self, name: &str) -> Result<(), Errno> {
        ask(|reply| self.fs.unlink(ROOT, OsStr::new(name), reply))
    }

    /// As [`World::fsync`], up to where the call waits.
    pub fn begin_fsync(&self, fd: Fd) -> mpsc::Receiver<Result<(), Errno>> {
        let (tx, rx) = mpsc::channel();
        self.fs.fsync(0, fd.fh, false, Reply::new(move |r| tx.send(r).unwrap()));
        rx
    }

    /// As [`World::unlink`], up to where the call waits for the saves that come before it.
    pub fn begin_unlink(&self, name: &str) -> mpsc::Receiver<Result<(), Errno>> {
        let (tx, rx) = mpsc::channel();
        self.fs.unlink(ROOT, OsStr::new(name), Reply::new(move |r| tx.send(r).unwrap()));
        rx
    }

    pub fn link(&self, from: &str, to: &str) -> Result<(), Errno> {
        let entry = self.lookup(from)?;
        let linked = ask(|reply| self.fs.link(entry.node, ROOT, OsStr::new(to), reply));
        if let Ok(e) = &linked {
            self.fs.forget(e.node, 1);
        }
        self.fs.forget(entry.node, 1);
        linked.map(drop)
    }

    /// Truncate, write, close: the naive save.
    pub fn save(&self, name: &str, data: &[u8]) -> Result<(), Errno> {
        let fd = self.create(name)?;
        let wrote = self.write_all(fd, 0, data);
        let closed = self.close(fd);
        wrote.and(closed)
    }

    /// As the kernel understands the answer: node 0 says that there is no such name.
    fn lookup(&self, name: &str) -> Result<Entry, Errno> {
        let entry = contained(|| self.fs.lookup(ROOT, OsStr::new(name)))?;
        if entry.node == 0 { Err(Errno::NOENT) } else { Ok(entry) }
    }

    /// What programs see under a name.
    pub fn seen(&self, name: &str) -> Result<Vec<u8>, Errno> {
        let fd = self.open_with(name, libc::O_RDONLY)?;
        let content = self.read(fd);
        self.release(fd);
        content
    }

    /// What a descriptor reads from the start.
    pub fn read(&self, fd: Fd) -> Result<Vec<u8>, Errno> {
        let mut buf = vec![0; 1 << 20];
        let n = contained(|| self.fs.read(fd.fh, 0, &mut buf))?;
        buf.truncate(n);
        Ok(buf)
    }

    pub fn drain(&self) -> Result<(), u64> {
        self.engine().drain(PATIENCE)
    }

    pub fn shutdown(&self) -> Result<(), u64> {
        self.engine().shutdown(PATIENCE)
    }

    /// Ends it as kill -9 would, with nothing written any more.
    pub fn kill(self) {
        self.seam.cut();
        let _ = self.engine().shutdown(Duration::ZERO);
    }

    pub fn on_disk(&self, name: &str) -> Option<Vec<u8>> {
        fs::read(self.root.join(name)).ok()
    }

    /// Names under `.fsys/staging` or `.fsys/failed`.
    pub fn internal(&self, dir: &str) -> Vec<String> {
        let list = fs::read_dir(self.root.join(".fsys").join(dir)).unwrap();
        list.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }
}

/// Recovers a backing directory, as a mount does first.
pub fn recovered(root: &Path) -> recover::Report {
    recover::recover(&lock(root), false).unwrap()
}

/// A process that another test starts has the lock of a world that just ended until it runs its program.
pub fn lock(root: &Path) -> Layout {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Layout::open(root) {
            Err(e) if e.exit == Exit::Busy && Instant::now() < deadline => std::thread::yield_now(),
            layout => return layout.unwrap(),
        }
    }
}

/// A call with an answer. A panic in it is the caller's own; the answer must come all the same.
fn ask<T: Send + 'static>(call: impl FnOnce(Reply<T>)) -> Result<T, Errno> {
    let (tx, rx) = mpsc::channel();
    let reply = Reply::new(move |r| tx.send(r).unwrap());
    drop(catch_unwind(AssertUnwindSafe(|| call(reply))));
    rx.recv_timeout(PATIENCE).expect("every call is answered")
}

fn contained<T>(call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or(Err(Errno::IO))
}

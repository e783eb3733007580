//! A regular file: its committed version, its staged one, its names; and a descriptor on it.

use std::ffi::OsStr;
use std::num::NonZeroI32;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use rustix::io::Errno;

use super::behind::Behind;
use super::dir::{Dir, Place};
use super::dispatch::Done;
use super::overlay::Overlay;
use super::state::{Event, Phase};
use crate::backend::failure::Failures;
use crate::backend::uring::writes::DirectFile;
use crate::backend::{Anchor, Backing, FileId};
use crate::config::policy::{Durability, Policy};
use crate::sys;
use crate::sys::handle::FileHandle;

/// An open backing inode that holds the content which programs see.
#[derive(Debug)]
pub struct Version {
    /// Open for reading, and for writing when `writable`.
    fd: Arc<OwnedFd>,
    /// The same inode with `O_DIRECT`, for method `direct`.
    pub direct: Option<Direct>,
    /// Its identity.
    pub id: FileId,
    /// Whether `fd` can be written.
    pub writable: bool,
    /// The file takes appends only (`chattr +a`), and so does `fd`.
    pub append_only: bool,
    /// Changes so far, counted after each is done; starts at 1, since what happened before the open is not known.
    pub changes: AtomicU64,
    /// The count of changes that the last flush covered.
    pub synced: AtomicU64,
    /// That flush was of the content alone (fdatasync): times, mode and owner may not be durable.
    pub data_only: AtomicBool,
    /// Milliseconds since the engine's start (at least 1) of the oldest change that is not durable; 0: none.
    pub dirty_ms: AtomicU64,
    /// The file carries capabilities, which the next write takes away.
    pub caps: AtomicBool,
    /// Milliseconds since the engine's start of the last write.
    pub last_write_ms: AtomicU64,
    /// Change time, nanoseconds since 1970, when writes that the kernel makes itself were last looked for.
    pub looked_ns: AtomicI64,
    /// Highest byte accounted as staged.
    pub accounted: AtomicU64,
    /// How far it was written to the device while it was written.
    pub behind: Behind,
    /// Its name in `.fsys/staging`, from the moment before it is published over another version.
    pub temp: Mutex<Option<String>>,
    /// The version before, kept open until the commit was answered: the file system then frees that inode while the
    /// programs go on, not while they wait.
    pub before: Mutex<Option<Arc<Version>>>,
    /// Writes that failed and were not made good: the version is not what the program wanted.
    pub failed: Arc<Failures>,
    /// In write mode `journal`: changes that wait for their commit.
    pub overlay: OnceLock<Overlay>,
}

impl Version {
    /// A version nobody has written to.
    pub fn new(fd: OwnedFd, id: FileId, writable: bool) -> Self {
        Self {
            fd: Arc::new(fd),
            direct: None,
            id,
            writable,
            append_only: false,
            changes: AtomicU64::new(1),
            synced: AtomicU64::new(0),
            data_only: AtomicBool::new(false),
            dirty_ms: AtomicU64::new(0),
            caps: AtomicBool::new(false),
            last_write_ms: AtomicU64::new(0),
            looked_ns: AtomicI64::new(0),
            accounted: AtomicU64::new(0),
            behind: Behind::default(),
            temp: Mutex::new(None),
            before: Mutex::new(None),
            failed: Arc::default(),
            overlay: OnceLock::new(),
        }
    }

    /// Counts a change of the inode at time `now_ms`. True when everything was durable before it.
    pub fn mark_changed(&self, now_ms: u64) -> bool {
        self.inode_changed();
        self.mark_written(now_ms)
    }

    /// Counts a change of the inode that a write brings with it: also where the write goes to an overlay, it is to be
    /// durable with that.
    pub fn inode_changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// Notes a change at time `now_ms`, of the inode or of what lies over it. True when everything was durable before.
    pub fn mark_written(&self, now_ms: u64) -> bool {
        self.last_write_ms.store(now_ms, Ordering::Relaxed);
        self.dirty_ms.compare_exchange(0, now_ms.max(1), Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// A flush that began after `changes` had this value succeeded. True when nothing is left to do.
    pub fn mark_synced(&self, changes: u64) -> bool {
        self.synced.fetch_max(changes, Ordering::AcqRel);
        let all = self.is_synced();
        if all && self.overlaid().is_none() {
            self.dirty_ms.store(0, Ordering::Release);
        }
        all
    }

    /// Whether every change of the inode is known to be durable.
    pub fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire) >= self.changes.load(Ordering::Acquire)
    }

    /// As [`Version::is_synced`], the attributes included.
    pub fn is_durable(&self) -> bool {
        self.is_synced() && !self.data_only.load(Ordering::Acquire)
    }

    /// The descriptor, when all writes that were said to be made are, or failed.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.settle();
        self.fd.as_fd()
    }

    /// The descriptor, while writes may be on their way: times and size may still change.
    pub fn fd_unsettled(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// From now on it is written with `O_DIRECT`, where writes are so aligned.
    pub fn write_directly(&mut self, backing: &Backing) -> Result<(), Errno> {
        self.direct = Some(Direct(Arc::new(backing.open_direct(&self.fd, self.failed.clone())?)));
        Ok(())
    }

    /// Whether writes are on their way that were said to be made.
    pub fn in_flight(&self) -> bool {
        self.direct.as_ref().is_some_and(|d| d.0.in_flight())
    }

    /// Waits for the writes on their way.
    pub fn settle(&self) {
        if let Some(d) = &self.direct {
            d.0.settle();
        }
    }

    /// As [`Version::settle`], and nothing writes it to the device behind its program any more.
    ///
    /// # Errors
    /// The version is not what the program wanted: a write failed and was not made good.
    pub fn settled(&self) -> Result<(), Errno> {
        self.settle();
        self.behind.seal();
        self.failed.errno().map_or(Ok(()), Err)
    }
}

/// What is written with `O_DIRECT`; at its end no write is on its way.
#[derive(Debug)]
pub struct Direct(pub Arc<DirectFile>);

impl Drop for Direct {
    fn drop(&mut self) {
        self.0.settle();
    }
}

/// A change time (seconds, nanoseconds) and the one to show for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ctime {
    /// What the publication set.
    pub real: (i64, i64),
    /// What the version had before.
    pub shown: (i64, i64),
}

/// Work that waits for a commit of the file to end.
pub type Parked = Box<dyn FnOnce() + Send>;

/// Those who wait for the commit that runs.
#[derive(Default)]
pub struct Waiting {
    /// To be done when it has ended.
    pub parked: Vec<Parked>,
    /// To be answered with its result.
    pub joined: Vec<Done>,
}

/// The changing part of a [`File`]. There is one for each file that the kernel knows, so what few of them have is boxed.
pub struct State {
    /// Where it stands.
    pub phase: Phase,
    /// The content that programs see, when open or staged.
    pub version: Option<Arc<Version>>,
    /// The committed inode; `None` when nothing was committed yet.
    pub anchor: Option<Anchor>,
    /// Identity of the committed inode.
    pub id: Option<FileId>,
    /// Names that are known; a file with several is written in place.
    pub names: Vec<Place>,
    /// Open descriptors.
    pub opens: u32,
    /// Those that may write.
    pub writers: u32,
    /// The kernel serves all open descriptors from the backing file itself, registered with it under this number. `None`
    /// with descriptors open: all of them are served here. The two do not mix (fs/fuse/iomode.c answers EIO).
    pub kernel: Option<NonZeroI32>,
    /// Descriptors that may write and are served by the kernel.
    pub unseen: u32,
    /// Descriptors that wrote and were not closed or synced since.
    pub unflushed: u32,
    /// A close was acknowledged and its commit is still to come: the directories that count it ([`State::owe`]).
    pub owed_in: Box<[Arc<Dir>]>,
    /// How many were owed before it: debts are paid in this order.
    pub owed_nth: u64,
    /// The policy of the newest open.
    pub policy: Policy,
    /// The committed version is in place, and durable once this directory is synced up to this change of it.
    pub unsynced: Option<Box<(Arc<Dir>, u64)>>,
    /// Commits that failed; a descriptor opened before the last failure stays failed.
    pub failures: u32,
    /// A save that was acknowledged failed with nobody waiting: told once, by the next fsync of the file.
    pub lost: Option<Errno>,
    /// Waiting for the commit that runs. The lock is never taken: it makes the state shareable.
    pub waiting: Mutex<Option<Box<Waiting>>>,
    /// Publication moves the change time, which no program asked for.
    pub ctime: Option<Box<Ctime>>,
    /// Keeps the inode reachable after its last name went.
    pub pin: Option<OwnedFd>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("phase", &self.phase).field("id", &self.id).finish_non_exhaustive()
    }
}

/// Changes that were acknowledged so far, of all directories: the order of the debts.
static OWED: AtomicU64 = AtomicU64::new(0);

/// Files that owe a commit, of all mounts of this process.
static OWING: AtomicU64 = AtomicU64::new(0);

/// Whether no commit is owed: then nobody has to look for one.
pub(super) fn nothing_is_owed() -> bool {
    OWING.load(Ordering::Acquire) == 0
}

/// The next number of [`State::owed_nth`]. Who collects debts takes it first and leaves out what came since: looking at
/// one file after the other, a later debt can be found and an earlier one missed.
pub(super) fn owed_so_far() -> u64 {
    OWED.load(Ordering::Acquire)
}

impl State {
    /// Changes the phase, or reports the bug.
    pub fn go(&mut self, e: Event) -> Result<(), Errno> {
        self.phase = self.phase.on(e).map_err(|bug| {
            tracing::error!(%bug, "state machine");
            Errno::IO
        })?;
        Ok(())
    }

    /// Notes that a program was told that its change is done, which a commit is still to make true. It is seen in the
    /// directories of all names that are known (one, but for links), and keeps its place among the changes in each.
    pub fn owe(&mut self) {
        if self.owes() {
            return;
        }
        let mut dirs: Vec<Arc<Dir>> = Vec::with_capacity(self.names.len());
        for p in &self.names {
            if !dirs.iter().any(|d| Arc::ptr_eq(d, &p.dir)) {
                p.dir.owed.fetch_add(1, Ordering::AcqRel);
                dirs.push(p.dir.clone());
            }
        }
        self.owed_nth = OWED.fetch_add(1, Ordering::AcqRel);
        self.owed_in = dirs.into();
        if self.owes() {
            OWING.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The commit came, or there is nothing left to commit.
    pub fn paid(&mut self) {
        if self.owes() {
            OWING.fetch_sub(1, Ordering::AcqRel);
        }
        for dir in std::mem::take(&mut self.owed_in) {
            dir.owed.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Whether a commit is owed.
    pub fn owes(&self) -> bool {
        !self.owed_in.is_empty()
    }

    /// Whether a commit is owed that was acknowledged before the debt with number `so_far`.
    pub(super) fn owes_before(&self, so_far: u64) -> bool {
        self.owes() && self.owed_nth < so_far
    }

    /// Whether what is staged is a version that a program was told is saved.
    pub fn owes_version(&self) -> bool {
        self.phase == Phase::Staged && self.owes()
    }

    /// As [`State::owe`], for a change that comes without a descriptor. Not while a program is in the middle of a save:
    /// that ends with its close, and half of it is no version.
    pub fn owe_unless_written(&mut self) {
        if self.phase != Phase::Staged || self.unflushed == 0 {
            self.owe();
        }
    }

    /// The open version.
    pub fn open_version(&self) -> Result<&Arc<Version>, Errno> {
        self.version.as_ref().ok_or(Errno::BADF)
    }

    /// Whether content is seen that no commit has published.
    pub fn is_staged(&self) -> bool {
        matches!(self.phase, Phase::Staged | Phase::Committing)
    }

    /// Whether that content is an inode of its own, not an overlay over the committed one.
    pub fn is_new_inode(&self) -> bool {
        self.is_staged() && self.version.as_ref().is_none_or(|v| v.overlaid().is_none())
    }
}

/// A committed file that nobody uses.
#[derive(Debug, Clone)]
pub struct Resting {
    /// Its inode.
    pub id: FileId,
    /// Holds it.
    pub handle: FileHandle,
    /// Its only name.
    pub place: Place,
    /// As [`State::unsynced`], of the directory of that name.
    pub unsynced: Option<u64>,
    /// As [`State::ctime`].
    pub ctime: Option<Ctime>,
}

/// One regular file, whatever backing inode holds its content at the moment.
#[derive(Debug)]
pub struct File {
    /// The number that the layer above gave it.
    pub tag: u64,
    /// Readers of content and attributes share it; every change of phase takes it alone.
    pub state: RwLock<State>,
    /// Thread that wrote or closed last, and under which level: only for what people are shown.
    last_tid: AtomicU32,
    last_level: AtomicU8,
}

impl File {
    /// A file that exists in the backing directory.
    pub fn committed(tag: u64, id: FileId, anchor: Anchor) -> Self {
        Self::with(tag, State { anchor: Some(anchor), id: Some(id), ..State::empty() })
    }

    /// A file that exists as a staged version only.
    pub fn created(tag: u64, version: Version, place: Place) -> Self {
        let state =
            State { phase: Phase::Staged, version: Some(Arc::new(version)), names: vec![place], ..State::empty() };
        Self::with(tag, state)
    }

    fn with(tag: u64, state: State) -> Self {
        Self { tag, state: RwLock::new(state), last_tid: AtomicU32::new(0), last_level: AtomicU8::new(0) }
    }

    /// All that there is to keep of a file that nobody uses; `None` when there is more.
    pub fn resting(&mut self) -> Option<Resting> {
        let st = self.state.get_mut();
        st.unsynced.take_if(|u| u.0.is_synced_upto(u.1));
        let unused = st.phase == Phase::Clean && st.opens == 0 && st.version.is_none() && st.kernel.is_none();
        let told = !st.owes() && st.lost.is_none() && st.waiting.get_mut().is_none();
        let (true, true, None, [place]) = (unused, told, &st.pin, &*st.names) else { return None };
        let (id, Some(Anchor::Handle(handle))) = (st.id?, &st.anchor) else { return None };
        if st.unsynced.as_ref().is_some_and(|u| !Arc::ptr_eq(&u.0, &place.dir)) {
            return None;
        }
        let (unsynced, ctime) = (st.unsynced.as_ref().map(|u| u.1), st.ctime.as_deref().copied());
        Some(Resting { id, handle: handle.clone(), place: place.clone(), unsynced, ctime })
    }

    /// The file again.
    pub fn rested(tag: u64, r: Resting) -> Self {
        let (anchor, ctime) = (Some(Anchor::Handle(r.handle)), r.ctime.map(Box::new));
        let unsynced = r.unsynced.map(|upto| Box::new((r.place.dir.clone(), upto)));
        Self::with(tag, State { anchor, id: Some(r.id), names: vec![r.place], unsynced, ctime, ..State::empty() })
    }

    /// Notes who uses the file; thread 0 is not known.
    pub fn note_use(&self, tid: u32, level: Durability) {
        if tid != 0 {
            self.last_tid.store(tid, Ordering::Relaxed);
        }
        self.last_level.store(level as u8, Ordering::Relaxed);
    }

    /// Who used it last: thread, 0 when not known, and level.
    pub fn last_use(&self) -> (u32, Durability) {
        let level = match self.last_level.load(Ordering::Relaxed) {
            l if l == Durability::Close as u8 => Durability::Close,
            l if l == Durability::Fsync as u8 => Durability::Fsync,
            l if l == Durability::Relaxed as u8 => Durability::Relaxed,
            _ => Durability::Always,
        };
        (self.last_tid.load(Ordering::Relaxed), level)
    }

    /// Learns a name by lookup; the `only` one when the inode has a single link.
    pub fn learn_name(self: &Arc<Self>, dir: &Arc<Dir>, name: &OsStr, only: bool) {
        let known = |st: &State| st.names.iter().any(|p| p.is(dir, name)) && (!only || st.names.len() == 1);
        if known(&self.state.read()) {
            return;
        }
        let mut st = self.state.write();
        // A file with a staged version is published under the name that it was staged for; one that is changed from the
        // journal is changed under all its names.
        let overlaid = st.phase == Phase::Staged && !st.is_new_inode();
        if st.phase != Phase::Clean && !overlaid || known(&st) {
            return;
        }
        if overlaid {
            dir.staged.lock().entry(name.to_owned()).or_insert_with(|| self.clone());
            if st.owes() && !st.owed_in.iter().any(|d| Arc::ptr_eq(d, dir)) {
                dir.owed.fetch_add(1, Ordering::AcqRel);
                st.owed_in = st.owed_in.iter().chain([dir]).cloned().collect();
            }
        } else if only {
            st.names.clear();
        }
        // Most files have one name; a vector would make room for four.
        st.names.reserve_exact(1);
        st.names.push(Place { dir: dir.clone(), name: name.to_owned() });
    }

    /// A name that is known, if any.
    pub fn any_name(&self) -> Option<Place> {
        self.state.read().names.first().cloned()
    }
}

impl State {
    fn empty() -> Self {
        Self {
            phase: Phase::Clean,
            version: None,
            anchor: None,
            id: None,
            names: Vec::new(),
            opens: 0,
            writers: 0,
            kernel: None,
            unseen: 0,
            unflushed: 0,
            owed_in: Box::default(),
            owed_nth: 0,
            unsynced: None,
            policy: Policy::default(),
            failures: 0,
            lost: None,
            waiting: Mutex::default(),
            ctime: None,
            pin: None,
        }
    }
}

/// An open descriptor of a program.
#[derive(Debug)]
pub struct Handle {
    /// The file.
    pub file: Arc<File>,
    /// open(2) flags.
    pub flags: i32,
    /// The policy at the time of the open.
    pub policy: Policy,
    /// Writes through it go to a staged version: it created or truncated the file, or the policy says so.
    pub replace: AtomicBool,
    /// It emptied a file that was small.
    pub rewrites_small: bool,
    /// The kernel serves it from the backing file that has this number ([`State::kernel`]).
    pub kernel: Option<NonZeroI32>,
    /// Change time of the file at the open, nanoseconds since 1970; 0: too recent to tell a later change by.
    pub opened_ns: i64,
    /// Wrote since its last close or fsync.
    pub dirty: AtomicBool,
    /// `State::failures` at the time of the open.
    pub failures: u32,
    /// Threads that wrote through it since its last commit.
    pub writers: Mutex<Vec<u32>>,
    /// Those of the commit before.
    pub submitters: Mutex<Vec<u32>>,
}

impl Handle {
    /// Whether it may write.
    pub fn writes(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY
    }

    /// Whether it may write and the kernel does that without a word.
    pub fn is_unseen(&self) -> bool {
        self.kernel.is_some() && self.writes()
    }

    /// Whether each write is a commit point.
    pub fn is_sync(&self) -> bool {
        self.flags & (libc::O_SYNC | libc::O_DSYNC) != 0
    }

    /// Notes who writes; 0: not known.
    pub fn note_writer(&self, tid: u32) {
        self.file.note_use(tid, self.policy.durability);
        let mut writers = self.writers.lock();
        if writers.last() != Some(&tid) && !writers.contains(&tid) {
            writers.push(tid);
        }
    }

    /// Whether a close by thread `tid` ends a save: its process wrote through this descriptor. A process that only
    /// inherited it closes a copy (a child before its exec, while the parent is in the middle of a save), and that
    /// must not publish half of it. What cannot be told counts as a writer.
    pub fn ends_save(&self, tid: u32) -> bool {
        let writers = self.writers.lock();
        writers.is_empty() || tid == 0 || writers.iter().any(|w| *w == 0 || *w == tid || sys::same_process(*w, tid))
    }

    /// Whether the process of thread `tid` wrote what the last close or fsync submitted.
    pub fn submitted(&self, tid: u32) -> bool {
        self.submitters.lock().iter().any(|w| *w == tid || sys::same_process(*w, tid))
    }

    /// Notes a write; true when it is the first since the last close or fsync.
    pub fn mark_dirty(&self) -> bool {
        !self.dirty.swap(true, Ordering::AcqRel)
    }
}

//! A directory as the engine knows it: how to reach it, which names in it are staged, what still needs a sync.

use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rustix::fs::Stat;
use rustix::io::Errno;

use super::file::File;
use super::turns::Turn;
use crate::backend::{Anchor, Backing, FileId};

/// A name in a directory.
#[derive(Debug, Clone)]
pub struct Place {
    /// The directory.
    pub dir: Arc<Dir>,
    /// The name in it.
    pub name: OsString,
}

impl Place {
    /// The path from the root of the mount.
    pub fn path(&self) -> PathBuf {
        let mut parts = vec![self.name.clone()];
        let mut dir = self.dir.clone();
        loop {
            let up = dir.place.lock().clone();
            let Some(p) = up else { break };
            parts.push(p.name);
            dir = p.dir;
        }
        parts.iter().rev().collect()
    }

    /// Whether this is `name` in `dir`.
    pub fn is(&self, dir: &Arc<Dir>, name: &OsStr) -> bool {
        Arc::ptr_eq(&self.dir, dir) && self.name == name
    }
}

/// A publication moves a directory's times, though for programs no name changed: it was there since its creation.
#[derive(Debug, Clone, Copy)]
struct Shown {
    /// Modification and change time that the directory has.
    real: Times,
    /// Those that programs see as long as it has these.
    shown: Times,
}

type Times = [(i64, i64); 2];

fn times_of(st: &Stat) -> Times {
    [(st.st_mtime, st.st_mtime_nsec as i64), (st.st_ctime, st.st_ctime_nsec as i64)]
}

/// How changes by others, behind the mount, come to be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// At once: the directory is watched.
    AtOnce,
    /// Not at all: what is kept of it must expire.
    Never,
    /// Not even changes through the mount: names that are spelled differently are the same (`chattr +F`).
    Folded,
}

/// One directory.
#[derive(Debug)]
pub struct Dir {
    /// The number that the layer above gave it.
    pub tag: u64,
    /// The backing inode; a directory is never replaced.
    pub id: FileId,
    /// Holds it.
    pub anchor: Anchor,
    /// Its own name; `None` for the root.
    pub place: Mutex<Option<Place>>,
    /// Names whose newest version is staged: created ones, absent in the backing directory, and rewritten ones.
    pub staged: Mutex<HashMap<OsString, Arc<File>>>,
    /// Raised when a staged version is published, before the file's old identity is forgotten: a lookup that began
    /// earlier has to be repeated.
    pub published: AtomicU64,
    /// How many files here have a change that was acknowledged and is not committed yet.
    pub owed: AtomicU64,
    /// For the layer above: found out when a name in it is looked at first.
    pub told: OnceLock<Told>,
    shown: Mutex<Option<Shown>>,
    /// The error of an acknowledged save that failed with nobody waiting: told once, by the next fsync of the directory.
    pub lost: Mutex<Option<Errno>>,
    fd: Mutex<Option<Arc<OwnedFd>>>,
    /// Removed: the descriptor is all that leads to it.
    gone: AtomicBool,
    changed: AtomicU64,
    /// The newest change that a program was told is done and whose sync is still to come. A publication is none: it is
    /// acknowledged after its own barrier.
    acknowledged: AtomicU64,
    synced: AtomicU64,
    /// Whose turn it is to save and sync.
    pub(super) turn: Mutex<Turn>,
}

impl Dir {
    /// A directory of which nothing is known: names in it may have changed before, by a daemon that was killed or when the
    /// kernel last knew it. So its first sync is one.
    pub fn new(tag: u64, id: FileId, anchor: Anchor, place: Option<Place>) -> Self {
        Self {
            tag,
            id,
            anchor,
            place: Mutex::new(place),
            staged: Mutex::default(),
            published: AtomicU64::new(0),
            owed: AtomicU64::new(0),
            told: OnceLock::new(),
            shown: Mutex::new(None),
            lost: Mutex::new(None),
            fd: Mutex::new(None),
            gone: AtomicBool::new(false),
            changed: AtomicU64::new(1),
            acknowledged: AtomicU64::new(1),
            synced: AtomicU64::new(0),
            turn: Mutex::default(),
        }
    }

    /// The staged file of a name.
    pub fn staged(&self, name: &OsStr) -> Option<Arc<File>> {
        self.staged.lock().get(name).cloned()
    }

    /// Names changed; whoever did it waits for the sync of the same batch.
    pub fn mark_changed(&self) {
        self.changed.fetch_add(1, Ordering::AcqRel);
    }

    /// Everything up to now has to become durable, though nobody waits for it.
    pub fn mark_acknowledged(&self) {
        self.acknowledged.fetch_max(self.changes(), Ordering::AcqRel);
    }

    /// Attributes as programs see them.
    pub fn stat(&self, fd: &OwnedFd) -> Result<Stat, Errno> {
        let mut st = rustix::fs::fstat(fd)?;
        let [mtime, ctime] = self.times_for(&st);
        (st.st_mtime, st.st_mtime_nsec) = (mtime.0, mtime.1 as _);
        (st.st_ctime, st.st_ctime_nsec) = (ctime.0, ctime.1 as _);
        Ok(st)
    }

    fn times_for(&self, st: &Stat) -> Times {
        let mut times = times_of(st);
        if let Some(s) = &*self.shown.lock() {
            for ((t, real), shown) in times.iter_mut().zip(s.real).zip(s.shown) {
                if *t == real {
                    *t = shown;
                }
            }
        }
        times
    }

    /// A name that is no backing name yet came or went: the times of the directory move now.
    pub fn touch(&self, fd: &OwnedFd) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        let now = (now.tv_sec, now.tv_nsec as i64);
        if let Ok(st) = rustix::fs::fstat(fd) {
            *self.shown.lock() = Some(Shown { real: times_of(&st), shown: [now, now] });
        }
    }

    /// Runs a publication, which changes the backing directory and for programs nothing, and counts the change.
    pub fn publish<T>(&self, fd: &OwnedFd, f: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let (count, before) = (self.changes(), rustix::fs::fstat(fd));
        let r = f()?;
        if let (Ok(before), Ok(after)) = (before, rustix::fs::fstat(fd)) {
            let shown = Shown { real: times_of(&after), shown: self.times_for(&before) };
            let mut slot = self.shown.lock();
            // A change of another name in between has its time in `after`; one that is counted later clears this.
            *slot = (self.changes() == count).then_some(shown);
        }
        self.mark_changed();
        Ok(r)
    }

    /// A backing name changed: its time is the one to show.
    pub fn show_real_times(&self) {
        *self.shown.lock() = None;
    }

    /// The changes so far; pass it to [`Dir::mark_synced`] after the sync.
    pub fn changes(&self) -> u64 {
        self.changed.load(Ordering::Acquire)
    }

    /// All changes up to `upto` are durable.
    pub fn mark_synced(&self, upto: u64) {
        self.synced.fetch_max(upto, Ordering::AcqRel);
    }

    /// Its name went: a program may have it as its working directory. `fd` is its descriptor, from before.
    pub fn hold(&self, fd: Arc<OwnedFd>) {
        self.gone.store(true, Ordering::Release);
        *self.fd.lock() = Some(fd);
    }

    /// Whether the changes up to `upto` are durable.
    pub fn is_synced_upto(&self, upto: u64) -> bool {
        self.synced.load(Ordering::Acquire) >= upto
    }

    /// Whether all name operations that a program was told of are durable.
    pub fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire) >= self.acknowledged.load(Ordering::Acquire)
    }
}

/// Keeps the descriptors of the directories used last: enough for a working set, few enough for any limit.
#[derive(Debug)]
pub struct DirFds {
    recent: Mutex<VecDeque<Arc<Dir>>>,
    max: usize,
}

impl DirFds {
    /// At most `max` descriptors.
    pub fn new(max: usize) -> Self {
        Self { recent: Mutex::default(), max }
    }

    /// A descriptor of the directory, for name operations and for its sync.
    pub fn get(&self, backing: &Backing, dir: &Arc<Dir>) -> Result<Arc<OwnedFd>, Errno> {
        let mut slot = dir.fd.lock();
        if let Some(fd) = &*slot {
            return Ok(fd.clone());
        }
        let fd = match backing.open_anchor(&dir.anchor, libc::O_RDONLY | libc::O_DIRECTORY) {
            // Without read permission (an ordinary user's mount) names still work, and syncs go by syncfs.
            Err(Errno::ACCESS) => backing.open_anchor(&dir.anchor, libc::O_PATH | libc::O_DIRECTORY)?,
            r => r?,
        };
        let fd = Arc::new(fd);
        *slot = Some(fd.clone());
        drop(slot);
        let mut recent = self.recent.lock();
        recent.push_back(dir.clone());
        let old = if recent.len() > self.max { recent.pop_front() } else { None };
        drop(recent);
        if let Some(old) = old.filter(|d| !d.gone.load(Ordering::Acquire)) {
            *old.fd.lock() = None;
        }
        Ok(fd)
    }
}

//! Changes behind the mount: fanotify marks on the directories that the kernel knows names of. The contract asks people
//! not to write there, and they do.
//!
//! Marks are on directories, not on the file system: strangers' files on it cost nothing and are not seen. What this
//! process does itself is told apart by its number. Not told of are writes through memory maps and through hard links
//! that lie outside; files with several links are not kept for long.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::inode::Stale;
use super::{Fs, Kind, Node, StaleCache};
use crate::backend::FileId;
use crate::engine::dir::{Dir, Told as DirTold};
use crate::sys::fanotify::{Event, Group, NAMES, Told};
use crate::sys::handle::{FileHandle, handle_of};
use crate::telemetry::Counters;

/// How long the kernel may keep what the watch tells of. Not for ever: see above what it does not tell of.
pub(super) const TTL: Duration = Duration::from_secs(600);
/// Events gather for this long after the first, so that many changes of one file are one event and one wake-up. Bounds
/// how late a change is seen.
const GATHER: Duration = Duration::from_millis(10);
/// Notifications under way, at most: the kernel's queue of events, which is bounded too, holds the others.
const UNDER_WAY: usize = 4096;
/// `FS_CASEFOLD_FL` of linux/fs.h.
const CASEFOLD: u32 = 0x4000_0000;

/// The watch, if there is one.
#[derive(Debug)]
pub(super) struct Watch {
    group: Option<Group>,
    /// Why there is none, for people.
    why_not: String,
    /// Node of each directory that is watched.
    dirs: Mutex<HashMap<FileHandle, u64>>,
    events: AtomicU64,
    lost: AtomicBool,
    stop: Option<OwnedFd>,
}

impl Watch {
    /// A watch on nothing yet.
    pub fn new(wanted: bool) -> Self {
        let made = if wanted { Group::new().map_err(|e| e.to_string()) } else { Err("switched off".into()) };
        let stop = eventfd(0, EventfdFlags::CLOEXEC).ok();
        let (group, why_not) = match made {
            Ok(g) => (Some(g), String::new()),
            Err(why) => (None, why),
        };
        Self { group, why_not, dirs: Mutex::default(), events: AtomicU64::new(0), lost: AtomicBool::new(false), stop }
    }

    /// Whether changes by others in the directory are told of.
    pub fn covers(&self, dir: &Dir) -> bool {
        dir.told.get() == Some(&DirTold::AtOnce) && !self.lost.load(Ordering::Acquire)
    }

    /// While the kernel serves a descriptor that may write, what it writes there is no change behind the mount.
    pub fn ignore(&self, file: BorrowedFd<'_>) {
        if let Some(group) = &self.group {
            // Without it such writes are told of, and found to be none of others when they are looked at.
            let _ = group.ignore(file);
        }
    }

    /// The last such descriptor is released.
    pub fn heed(&self, file: BorrowedFd<'_>) {
        if let Some(group) = &self.group {
            // ENOENT: it was not ignored.
            let _ = group.heed(file);
        }
    }

    /// How many changes by others were told of.
    pub fn events(&self) -> u64 {
        self.events.load(Ordering::Acquire)
    }
}

impl Fs {
    /// Why nothing is watched; empty when it is.
    pub(super) fn why_no_watch(&self) -> String {
        self.watch.why_not.clone()
    }

    /// Before a name of the directory, or the lack of one, is given to the kernel.
    pub(super) fn watch_dir(&self, dir: &Arc<Dir>) {
        dir.told.get_or_init(|| self.begin_watch(dir).unwrap_or(DirTold::Never));
    }

    fn begin_watch(&self, dir: &Arc<Dir>) -> Result<DirTold, Errno> {
        let fd = self.engine.dir_fd(dir)?;
        if rustix::fs::ioctl_getflags(&fd).is_ok_and(|f| f.bits() & CASEFOLD != 0) {
            return Ok(DirTold::Folded);
        }
        let Some(group) = &self.watch.group else { return Ok(DirTold::Never) };
        let handle = handle_of(&fd)?;
        // First the entry, so that no event finds none.
        self.watch.dirs.lock().insert(handle.clone(), dir.tag);
        if let Err(e) = group.watch(&fd) {
            self.watch.dirs.lock().remove(&handle);
            Counters::add(&self.engine.counters.unwatched_dirs, 1);
            tracing::debug!(error = %e, "a directory is not watched");
            return Err(e);
        }
        Ok(DirTold::AtOnce)
    }

    /// The kernel forgot the node.
    pub(super) fn unwatch(&self, node: &Node) {
        let (Kind::Dir(dir), Some(group)) = (&node.kind, &self.watch.group) else { return };
        if dir.told.get() != Some(&DirTold::AtOnce) {
            return;
        }
        // A removed directory has lost its mark.
        let Ok(fd) = self.engine.dir_fd(dir) else { return };
        if let Ok(handle) = handle_of(&fd) {
            let mut dirs = self.watch.dirs.lock();
            if dirs.get(&handle) != Some(&node.id) {
                // Met again meanwhile, as another node.
                return;
            }
            dirs.remove(&handle);
            // ENOENT: removed, and its mark with it. Still locked: a new node of the same directory would lose its mark.
            let _ = group.forget(&fd);
        }
    }

    /// Follows the changes until [`Fs::stop_watching`]. Runs on a thread of its own.
    pub fn follow_changes(&self) {
        let (Some(group), Some(stop)) = (&self.watch.group, &self.watch.stop) else { return };
        let mut buf = vec![0; 64 << 10];
        loop {
            let mut fds = [PollFd::new(group, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return self.lose_watch(e),
            }
            if !fds[1].revents().is_empty() {
                return;
            }
            std::thread::sleep(GATHER);
            loop {
                while self.stale.len() > UNDER_WAY {
                    std::thread::sleep(GATHER);
                }
                match group.read(&mut buf, |t| self.changed(t)) {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(e) => return self.lose_watch(e),
                }
            }
        }
    }

    /// Ends [`Fs::follow_changes`].
    pub fn stop_watching(&self) {
        if let Some(stop) = &self.watch.stop
            && let Err(e) = rustix::io::write(stop, &1_u64.to_ne_bytes())
        {
            tracing::error!(error = %e, "the watch goes on");
        }
    }

    /// Cannot happen with a descriptor that is ours; from then on it is as without a watch.
    fn lose_watch(&self, e: Errno) {
        self.watch.lost.store(true, Ordering::Release);
        tracing::error!(error = %e, "changes behind the mount are not told of any more; mount again");
        self.take_all_back();
    }

    fn take_all_back(&self) {
        self.watch.events.fetch_add(1, Ordering::AcqRel);
        // The receiver lives as long as `self`.
        drop(self.stale_tx.send(Stale::All));
    }

    fn changed(&self, told: Told<'_>) {
        match told {
            Told::Overflow => {
                Counters::add(&self.engine.counters.watch_overflows, 1);
                self.take_all_back();
            }
            Told::Event(e) if e.pid != std::process::id() => self.changed_by_others(&e),
            Told::Event(_) => {}
        }
    }

    fn changed_by_others(&self, e: &Event<'_>) {
        let Some(tag) = self.watch.dirs.lock().get(&e.dir).copied() else { return };
        let Ok(dir) = self.dir(tag) else { return };
        let own = e.name == ".";
        let name = (e.mask & NAMES != 0 && !own).then(|| (tag, e.name.to_owned()));
        let node = if own || name.is_some() { Some(tag) } else { self.node_at(&dir, e) };
        let Some(node) = node else { return };
        Counters::add(&self.engine.counters.outside_changes, 1);
        self.watch.events.fetch_add(1, Ordering::AcqRel);
        // As above.
        drop(self.stale_tx.send(Stale::Cache(StaleCache { node, name })));
    }

    /// The node whose content or attributes changed, if it is one whose content the kernel keeps.
    fn node_at(&self, dir: &Arc<Dir>, e: &Event<'_>) -> Option<u64> {
        let fd = self.engine.dir_fd(dir).ok()?;
        let st = self.backing().stat_at(fd.as_fd(), e.name).ok()?;
        let node = self.table.find(FileId::of(&st))?;
        match &node.kind {
            // Written by the kernel for a program that has it open through the mount.
            Kind::File(f) if f.state.read().kernel.is_some() => None,
            _ => Some(node.id),
        }
    }
}

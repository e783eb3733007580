//! Descriptors that the kernel serves itself from the backing file (passthrough): reads, writes and memory maps run at
//! the speed of the backing file system, and nothing of them is seen here.
//!
//! Whoever serves a file's first open descriptor serves all of them until the last is released; so a file whose
//! descriptors the kernel serves is never staged. fsync, close, truncation and allocation still come here. What the
//! kernel wrote is found by the change time, which every write moves before it begins: a close flushes when it moved
//! since the open, the ticker when it moved of late, an fsync and a drain always. Who wrote is not known: a close by a
//! process that only inherited the descriptor, a child at its exec, flushes like the writer's own.

use std::num::NonZeroI32;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs as rfs;

use super::Engine;
use super::file::{File, Handle, State, Version};
use super::state::Phase;

/// Registers a backing file with the kernel and gives its number there; `None` when that is not possible.
pub type Register<'a> = &'a dyn Fn(BorrowedFd<'_>) -> Option<NonZeroI32>;

/// A write within this time, in nanoseconds, of another can leave the same change time: the clock that file systems
/// read ticks at least 100 times a second.
const TICK_NS: i64 = 20_000_000;

/// Change time in nanoseconds since 1970; 0 when it cannot be read, which counts as changed.
fn changed_ns(v: &Version) -> i64 {
    rfs::fstat(v.fd()).map_or(0, |st| st.st_ctime.saturating_mul(1_000_000_000).saturating_add(st.st_ctime_nsec as i64))
}

/// The wall clock, in nanoseconds since 1970.
fn now_ns() -> i64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    t.tv_sec.saturating_mul(1_000_000_000).saturating_add(t.tv_nsec as i64)
}

impl Engine {
    /// Who serves the next descriptor: whoever serves those that are open, else the kernel where it can.
    pub(super) fn server(st: &State, register: Option<Register<'_>>) -> Option<NonZeroI32> {
        if st.opens > 0 {
            return st.kernel;
        }
        let version = st.version.as_ref().filter(|_| st.phase == Phase::Clean)?;
        register?(version.fd())
    }

    /// Under the lock of the open: from here on the file may change at any time.
    pub(super) fn note_unseen(&self, h: &mut Handle, st: &mut State) {
        if !h.is_unseen() {
            return;
        }
        if let Some(v) = &st.version {
            let changed = changed_ns(v);
            h.opened_ns = if now_ns().saturating_sub(changed) < TICK_NS { 0 } else { changed };
        }
        st.unseen += 1;
        self.unseen.lock().insert(h.file.tag, h.file.clone());
    }

    /// At a close: whether anything was written since the open.
    pub(super) fn look(&self, h: &Handle) {
        if !h.is_unseen() {
            return;
        }
        let version = h.file.state.read().version.clone();
        let Some(v) = version else { return };
        let changed = changed_ns(&v);
        v.looked_ns.store(changed, Ordering::Relaxed);
        if h.opened_ns == 0 || changed != h.opened_ns {
            self.note_write(h, &v);
        }
    }

    /// At an fsync: what others write into the file is flushed with it.
    pub(super) fn expect_unseen(&self, file: &Arc<File>, st: &State) {
        if st.unseen > 0
            && let Some(v) = &st.version
        {
            self.touched(file, v);
        }
    }

    /// At the release of a descriptor. A write that ran beside the last close, and what is left in a memory map, is
    /// committed within the interval.
    pub(super) fn forget_unseen(&self, h: &Handle, st: &mut State) {
        if !h.is_unseen() {
            return;
        }
        st.unseen = st.unseen.saturating_sub(1);
        if st.unseen == 0 {
            self.unseen.lock().remove(&h.file.tag);
        }
        if let Some(v) = st.version.as_ref().filter(|_| st.phase == Phase::Clean) {
            let changed = changed_ns(v);
            if changed != v.looked_ns.swap(changed, Ordering::Relaxed) {
                self.touched(&h.file, v);
            }
        }
    }

    /// Marks the files that the kernel may have written since the last look, or, for a drain, all that it can write. A
    /// change is looked at for one interval more: a long write moves the change time when it begins.
    pub(super) fn look_at_unseen(&self, all: bool) {
        let files: Vec<_> = self.unseen.lock().values().cloned().collect();
        let interval = i64::try_from(self.config().limits.commit_interval().as_nanos()).unwrap_or(i64::MAX);
        for file in files {
            let st = file.state.read();
            let Some(v) = st.version.as_ref().filter(|_| st.phase == Phase::Clean) else { continue };
            let changed = changed_ns(v);
            let moved = v.looked_ns.swap(changed, Ordering::Relaxed) != changed;
            if all || moved || now_ns().saturating_sub(changed) < interval {
                self.touched(&file, v);
            }
        }
    }
}

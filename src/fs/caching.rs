//! What the kernel may keep, for how long, and who serves an open descriptor: here is decided per file what goes into
//! the answer to an open and to a lookup.
//!
//! Programs that use the mount keep the kernel's caches right by themselves. Time-outs and dropped pages are for those
//! who change the backing directory directly: the watch tells of them at once, without it they are seen within
//! `cache_ms`, and content at the next open.

use std::num::NonZeroI32;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use rustix::fs::Stat;
use rustix::io::Errno;

use super::{Attr, Entry, Fs, Kind, Node};
use crate::config::policy::{Policy, WriteMode};
use crate::engine::dir::{Dir, Told};
use crate::engine::file::{File, Handle};
use crate::telemetry::Counters;

/// The kernel may keep that a name is missing for at most this long: such a name is known to nobody here, so it is left
/// out when everything has to be taken back.
const ABSENT_TTL: Duration = Duration::from_secs(10);

/// `FOPEN_*` of linux/fuse.h.
mod fopen {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const CACHE_DIR: u32 = 1 << 3;
    pub const NOFLUSH: u32 = 1 << 5;
    pub const PASSTHROUGH: u32 = 1 << 7;
}

/// Who serves an open descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoMode {
    /// The kernel's page cache, filled from here; `keep` what it holds of the file already.
    Cached {
        /// The content has not changed since.
        keep: bool,
    },
    /// No cache: a descriptor that can only write. The kernel drops what it holds of the range, and hands the program's
    /// own pages on, where its cache would copy them one by one (half the time for large writes). What cannot read cannot
    /// be mapped either, so nothing is lost. Not for rewrites of small files: a write through the cache notes that there
    /// are no capabilities to take away (`S_NOSEC`), for which each truncation asks otherwise (GETXATTR).
    Uncached,
    /// The backing file, registered under this number.
    Passthrough {
        /// Its number.
        backing: NonZeroI32,
        /// Reads and writes come here all the same, where each write is a commit point or can cost the file its
        /// set-user-ID; maps do not.
        writes_here: bool,
    },
    /// An open directory; the kernel keeps the listing if `cached`.
    Directory {
        /// Whether it may.
        cached: bool,
    },
}

/// A descriptor for the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Opened {
    /// Its number.
    pub fh: u64,
    /// Who serves it.
    pub io: IoMode,
    /// Whether a close is to be told (FUSE FLUSH); it commits nothing of a descriptor that cannot write.
    pub flush: bool,
}

impl Opened {
    /// `FOPEN_*` flags of the protocol.
    pub fn flags(&self) -> u32 {
        let io = match self.io {
            IoMode::Cached { keep: false } | IoMode::Directory { cached: false } => 0,
            IoMode::Cached { keep: true } => fopen::KEEP_CACHE,
            IoMode::Uncached => fopen::DIRECT_IO | fopen::KEEP_CACHE,
            IoMode::Directory { cached: true } => fopen::CACHE_DIR | fopen::KEEP_CACHE,
            IoMode::Passthrough { writes_here: false, .. } => fopen::PASSTHROUGH,
            IoMode::Passthrough { writes_here: true, .. } => fopen::PASSTHROUGH | fopen::DIRECT_IO,
        };
        if self.flush { io } else { io | fopen::NOFLUSH }
    }

    /// The number of the backing file, in passthrough.
    pub fn backing(&self) -> Option<NonZeroI32> {
        match self.io {
            IoMode::Passthrough { backing, .. } => Some(backing),
            IoMode::Cached { .. } | IoMode::Uncached | IoMode::Directory { .. } => None,
        }
    }
}

/// How backing files are registered with the kernel; every transport has it from its descriptor of /dev/fuse.
pub trait Passthrough: Send + Sync {
    /// Registers a regular file and gives its number.
    fn register(&self, file: BorrowedFd<'_>) -> Result<NonZeroI32, Errno>;
    /// Takes it back.
    fn unregister(&self, id: NonZeroI32) -> Result<(), Errno>;
}

/// Whether the kernel can serve files itself, and how.
pub(super) struct Kernel {
    with: RwLock<Option<Box<dyn Passthrough>>>,
    /// Why it does not, for people.
    why_not: Mutex<String>,
}

impl Default for Kernel {
    fn default() -> Self {
        Self { with: RwLock::new(None), why_not: Mutex::new("no session".into()) }
    }
}

impl Fs {
    /// The session runs: from here on the kernel may serve files itself, if a trial succeeds.
    pub fn begin_passthrough(&self, with: Box<dyn Passthrough>) {
        if !self.engine.config().limits.passthrough {
            self.end_passthrough("switched off (passthrough=off)");
            return;
        }
        let trial = || -> Result<(), Errno> {
            let stage = self.backing().open_stage(self.backing().root(), 0o600)?;
            let id = with.register(std::os::fd::AsFd::as_fd(&stage))?;
            with.unregister(id)
        };
        match trial() {
            Ok(()) => {
                self.kernel.why_not.lock().clear();
                *self.kernel.with.write() = Some(with);
            }
            Err(e) => self.end_passthrough(&refusal(e)),
        }
    }

    /// Nothing more is registered; the connection is not held open from here.
    pub fn end_passthrough(&self, why: &str) {
        why.clone_into(&mut self.kernel.why_not.lock());
        if self.kernel.with.write().take().is_some() {
            tracing::info!(why, "no passthrough from here on");
        }
    }

    /// Why no file is served by the kernel; empty when it is done.
    pub(super) fn why_no_passthrough(&self) -> String {
        self.kernel.why_not.lock().clone()
    }

    /// Whether the kernel may serve a file: it is never staged, so what it was at an open it is for good.
    pub(super) fn may_pass(&self, node: &Node, policy: &Policy) -> bool {
        policy.mode == WriteMode::InPlace || node.dev() != self.backing().dev()
    }

    /// Registers a backing file; a failure is counted, and the file is served from here.
    pub(super) fn register(&self, file: BorrowedFd<'_>) -> Option<NonZeroI32> {
        let slot = self.kernel.with.read();
        let id = slot.as_ref().and_then(|with| match with.register(file) {
            Ok(id) => Some(id),
            Err(e) => {
                tracing::debug!(error = %e, "a file is not passed through");
                None
            }
        });
        if id.is_none() {
            Counters::add(&self.engine.counters.passthrough_fallbacks, 1);
        }
        id
    }

    /// The last descriptor that the kernel served is released.
    pub(super) fn unregister(&self, id: NonZeroI32) {
        if let Some(with) = self.kernel.with.read().as_ref()
            && let Err(e) = with.unregister(id)
        {
            tracing::warn!(id, error = %e, "a backing file stays registered with the kernel until the unmount");
        }
    }

    /// Numbers an open descriptor and decides what the kernel is told of it.
    pub(super) fn opened(&self, node: &Node, h: Handle) -> Opened {
        let io = match h.kernel {
            Some(backing) => {
                Counters::add(&self.engine.counters.passthrough_opens, 1);
                // Pages from before are not kept up to date by what the kernel writes beside them.
                node.pages.store(0, Ordering::Relaxed);
                if h.writes()
                    && let Some(v) = &h.file.state.read().version
                {
                    self.watch.ignore(v.fd());
                }
                IoMode::Passthrough {
                    backing,
                    writes_here: h.writes() && (h.is_sync() || self.has_privileges(&h.file)),
                }
            }
            None if h.flags & libc::O_ACCMODE == libc::O_WRONLY && !h.rewrites_small => IoMode::Uncached,
            None => IoMode::Cached { keep: self.keeps_pages(node, &h.file) },
        };
        Opened { flush: h.writes(), io, fh: self.files.add(h) }
    }

    /// Whether the file is set-user-ID or set-group-ID: a write takes that away from some and not from others, which the
    /// kernel tells only in a request.
    fn has_privileges(&self, file: &File) -> bool {
        self.engine.stat(file).is_ok_and(|st| st.st_mode & 0o6000 != 0)
    }

    /// Whether the pages that the kernel may hold of a file are its content: nobody changed it since the last open.
    /// Our own writes count as a change too: the kernel then drops its pages by itself, since the time moved.
    fn keeps_pages(&self, node: &Node, file: &Arc<File>) -> bool {
        let Ok(st) = self.engine.stat(file) else { return false };
        let now = if is_settled_at(&st) { changed_ns(&st) } else { 0 };
        let before = node.pages.swap(now, Ordering::Relaxed);
        before != 0 && before == now
    }

    /// How long the kernel may keep attributes of a node.
    pub(super) fn attr_ttl(&self, node: &Node, st: &Stat) -> Duration {
        let told = match &node.kind {
            // exec(2) goes by the kept mode, from which the kernel does not take set-user-ID away when a write does.
            Kind::File(_) if st.st_mode & 0o6000 != 0 => return Duration::ZERO,
            Kind::File(f) => {
                // Another link may lead out of what is watched; what the kernel writes itself is not told of.
                let state = f.state.read();
                st.st_nlink == 1
                    && state.kernel.is_none()
                    && state.names.first().is_some_and(|p| self.watch.covers(&p.dir))
            }
            // A commit will move times and size of a directory that has staged names.
            Kind::Dir(d) => self.watch.covers(d) && d.staged.lock().is_empty(),
            Kind::Other(_) => false,
        };
        if told { self.watched_ttl } else { self.ttl }
    }

    /// How long the kernel may keep a name of a directory.
    pub(super) fn name_ttl(&self, dir: &Dir) -> Duration {
        match dir.told.get() {
            _ if self.watch.covers(dir) => self.watched_ttl,
            Some(Told::Folded) => Duration::ZERO,
            Some(Told::AtOnce | Told::Never) | None => self.ttl,
        }
    }

    /// The answer for a name that is not there.
    ///
    /// # Errors
    /// `ENOENT` where the kernel may not keep it.
    pub(super) fn absent(&self, dir: &Dir) -> Result<Entry, Errno> {
        let ttl = self.name_ttl(dir).min(ABSENT_TTL);
        if ttl.is_zero() {
            return Err(Errno::NOENT);
        }
        Ok(Entry { node: 0, attr: Attr { ino: 0, stat: self.blank, ttl }, ttl })
    }

    /// Whether the kernel may keep the listing of a directory: as long as the names, or it would look each up again.
    pub(super) fn keeps_listing(&self, dir: &Arc<Dir>, fd: &OwnedFd) -> bool {
        self.watch_dir(dir);
        self.watch.covers(dir) && rustix::fs::fstat(fd).is_ok_and(|st| is_settled_at(&st))
    }
}

/// What a refusal to register a file means.
fn refusal(e: Errno) -> String {
    match e {
        Errno::PERM => "the kernel refuses it: it takes CAP_SYS_ADMIN and a mount by root".into(),
        Errno::LOOP => "the backing directory is on a stacked file system".into(),
        Errno::NOTTY => "it takes Linux 6.9".into(),
        e => format!("the kernel refuses it: {e}"),
    }
}

fn changed_ns(st: &Stat) -> i64 {
    st.st_ctime.saturating_mul(1_000_000_000).saturating_add(st.st_ctime_nsec as i64)
}

/// Whether a change from now on must move the change time: the clock that file systems read ticks at least 100 times
/// a second.
fn is_settled_at(st: &Stat) -> bool {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let now = now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as i64);
    now.saturating_sub(changed_ns(st)) > 20_000_000
}

impl Node {
    /// Device of the backing inode where the node was first met.
    fn dev(&self) -> u64 {
        match &self.kind {
            Kind::Dir(d) => d.id.dev,
            Kind::File(_) | Kind::Other(_) => self.fixed.dev,
        }
    }
}

//! Content: open, read, write, truncate, allocate. Decides per call which version it concerns.
//!
//! Invariant: in phase `Committing` nothing changes the version; such calls answer [`Access::Wait`] and are run
//! again when the commit has ended. A version that a program was told is saved is committed before it changes, at every
//! level: else whatever pays that debt would publish the next version half-written, and in its place in the order of
//! the directory. A write holds the file's state lock (shared) for its length, and a commit takes
//! it alone to begin, so a commit holds every write that was acknowledged before it and no part of a later one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{self as rfs, FallocateFlags, Stat};
use rustix::io::Errno;

use super::Engine;
use super::dispatch::{Copy, Done, Work};
use super::file::{File, Handle, State, Version};
use super::overlay::Overlay;
use super::served::Register;
use super::stage::Content;
use super::state::Phase;
use super::write::drop_privileges;
use crate::config::policy::{Policy, WriteMode};

pub(super) const CAPS: &str = "security.capability";
/// Largest range, in bytes, that is copied in one piece where it cannot be cloned: others wait for it.
const COPY_MAX: usize = 2 << 20;
/// Up to this size, bytes, a file is small ([`Handle::rewrites_small`]): copying it costs less than a request does.
const SMALL_BYTES: i64 = 128 << 10;

/// The answer to a call that changes a file.
#[derive(Debug)]
pub enum Access<T> {
    /// It is done, or failed.
    Done(Result<T, Errno>),
    /// A commit of the file runs; call again when it has ended ([`Engine::park`]).
    Wait,
}

impl Engine {
    /// Opens a file with open(2) flags; `unprivileged` when the caller's truncation takes set-user-ID away.
    pub fn open(self: &Arc<Self>, file: &Arc<File>, flags: i32, policy: Policy, unprivileged: bool) -> Access<Handle> {
        self.open_served(file, flags, policy, unprivileged, None)
    }

    /// The same; `register` when the kernel may serve the content itself.
    pub fn open_served(
        self: &Arc<Self>,
        file: &Arc<File>,
        flags: i32,
        policy: Policy,
        unprivileged: bool,
        register: Option<Register<'_>>,
    ) -> Access<Handle> {
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let truncates = flags & libc::O_TRUNC != 0;
        if (writes || truncates)
            && let Err(e) = self.writable()
        {
            return Access::Done(Err(e));
        }
        let mut st = file.state.write();
        if truncates && st.phase == Phase::Committing {
            return Access::Wait;
        }
        if truncates && st.owes_version() {
            return Access::Wait;
        }
        if let Err(e) = self.ensure_version(&mut st, writes || truncates) {
            return Access::Done(Err(e));
        }
        let appends = flags & libc::O_APPEND != 0 && !truncates;
        if writes && !appends && st.version.as_ref().is_some_and(|v| v.append_only) {
            Self::close_if_idle(&mut st);
            return Access::Done(Err(Errno::PERM));
        }
        st.policy = policy;
        let small = |v: &Arc<Version>| v.stat().is_ok_and(|st| st.st_size <= SMALL_BYTES);
        let rewrites_small = truncates && st.version.as_ref().is_some_and(small);
        let replace = if truncates { self.truncate_all(file, &mut st, policy, unprivileged) } else { Ok(false) };
        let staging = matches!(policy.mode, WriteMode::Replace | WriteMode::Journal);
        Access::Done(replace.map(|r| {
            st.kernel = Self::server(&st, register);
            let mut h = opened(file, &mut st, flags, policy, r || staging);
            h.rewrites_small = rewrites_small;
            self.note_unseen(&mut h, &mut st);
            h
        }))
    }

    /// Makes sure that the content is open, for writing too if asked.
    pub(super) fn ensure_version(&self, st: &mut State, writable: bool) -> Result<(), Errno> {
        if st.version.is_none() {
            st.version = self.open_in_journal(st);
        }
        let open = |flags| -> Result<Version, Errno> {
            let open_as = |flags| match (&st.version, &st.anchor, &st.pin) {
                (Some(v), ..) => self.backing.reopen(v.fd(), flags),
                (None, _, Some(pin)) => self.backing.reopen(std::os::fd::AsFd::as_fd(pin), flags),
                (None, Some(a), None) => self.backing.open_anchor(a, flags),
                (None, None, None) => Err(Errno::STALE),
            };
            let writable = flags & libc::O_ACCMODE != libc::O_RDONLY;
            let (fd, append_only) = match open_as(flags) {
                Err(Errno::PERM) if writable => (open_as(flags | libc::O_APPEND)?, true),
                // The owner of the mount may write and not read.
                Err(Errno::ACCESS) if writable => (open_as(libc::O_WRONLY)?, false),
                fd => (fd?, false),
            };
            let id = st.id.ok_or(Errno::STALE)?;
            let mut v = Version::new(fd, id, writable);
            v.append_only = append_only;
            v.caps.store(has_capabilities(&v), Ordering::Relaxed);
            Ok(v)
        };
        match &st.version {
            Some(v) if v.writable || !writable => Ok(()),
            None if !writable => {
                st.version = Some(Arc::new(open(libc::O_RDONLY)?));
                Ok(())
            }
            _ => {
                st.version = Some(Arc::new(open(libc::O_RDWR)?));
                Ok(())
            }
        }
    }

    /// The version that the journal holds open, unless flags of the inode (`chattr +a`, `+i`) restrict new descriptors.
    fn open_in_journal(&self, st: &State) -> Option<Arc<Version>> {
        let v = self.journal.open_version(st.id?)?;
        let restricted = rfs::StatxAttributes::APPEND | rfs::StatxAttributes::IMMUTABLE;
        let stat = rfs::statx(v.fd(), "", rfs::AtFlags::EMPTY_PATH, rfs::StatxFlags::empty()).ok()?;
        v.caps.store(has_capabilities(&v), Ordering::Relaxed);
        (!stat.stx_attributes.intersects(restricted)).then_some(v)
    }

    /// Truncation to nothing: the start of a rewrite. True when the rewrite is staged.
    fn truncate_all(
        self: &Arc<Self>,
        file: &Arc<File>,
        st: &mut State,
        policy: Policy,
        kill: bool,
    ) -> Result<bool, Errno> {
        let clean = st.phase == Phase::Clean;
        let stageable = clean && !matches!(policy.mode, WriteMode::InPlace | WriteMode::Journal);
        if stageable && self.begin_stage(file, st, Content::Empty, policy, kill)? {
            return Ok(true);
        }
        let begun = clean && policy.mode == WriteMode::Journal && self.begin_overlay(file, st, policy)?;
        self.ensure_version(st, true)?;
        let v = st.open_version()?.clone();
        self.resize(&v, 0)?;
        v.failed.heal(0..u64::MAX);
        drop_privileges(&v, kill)?;
        if begun {
            // As with any rewrite: nothing was written yet.
            v.overlaid().into_iter().for_each(Overlay::forget_count);
        } else {
            self.touched(file, &v);
        }
        Ok(st.is_staged() && policy.mode != WriteMode::InPlace)
    }

    /// Reads at an offset; fewer bytes only at the end of the file.
    pub fn read(&self, file: &File, off: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let version = file.state.read().open_version()?.clone();
        version.read_at(off, buf)
    }

    /// As [`Engine::read`], of what is in memory; `None` when it would wait for the device.
    pub fn read_cached(&self, file: &File, off: u64, buf: &mut [u8]) -> Result<Option<usize>, Errno> {
        let version = file.state.read().open_version()?.clone();
        version.read_cached_at(off, buf)
    }

    /// Makes the content of a version so long.
    fn resize(&self, v: &Version, size: u64) -> Result<(), Errno> {
        match v.overlaid() {
            Some(o) => o.cut(&self.backing, size),
            None => self.backing.truncate(v.fd(), size),
        }
    }

    /// Changes the size. Without a descriptor (truncate(2)) the change is committed within the commit interval.
    pub fn set_size(
        self: &Arc<Self>,
        file: &Arc<File>,
        h: Option<&Handle>,
        size: u64,
        policy: Policy,
        kill: bool,
    ) -> Access<()> {
        if let Err(e) = self.writable() {
            return Access::Done(Err(e));
        }
        if size == 0 {
            let mut st = file.state.write();
            if st.phase == Phase::Committing {
                return Access::Wait;
            }
            if st.owes_version() {
                return Access::Wait;
            }
            let r = self.ensure_version(&mut st, true).and_then(|()| self.truncate_all(file, &mut st, policy, kill));
            if let (Ok(true), Some(h)) = (&r, h) {
                h.replace.store(true, Ordering::Relaxed);
            }
            if h.is_none() && st.is_staged() {
                st.owe_unless_written();
            }
            return Access::Done(r.map(|_| ()));
        }
        let resize = |v: &Arc<Version>, _staged: bool| {
            self.resize(v, size)?;
            v.failed.heal(size..u64::MAX);
            drop_privileges(v, kill)
        };
        if let Some(h) = h {
            return self.change(h, true, resize);
        }
        let mut st = file.state.write();
        if st.phase == Phase::Committing {
            return Access::Wait;
        }
        if st.owes_version() {
            return Access::Wait;
        }
        let overlay = st.phase == Phase::Clean && policy.mode == WriteMode::Journal;
        let ready = self.ensure_version(&mut st, true);
        let ready =
            ready.and_then(|()| if overlay { self.begin_overlay(file, &mut st, policy).map(drop) } else { Ok(()) });
        let staged = st.is_staged();
        Access::Done(ready.and_then(|()| {
            let v = st.open_version()?.clone();
            resize(&v, staged)?;
            self.touched(file, &v);
            st.owe_unless_written();
            Ok(())
        }))
    }

    /// fallocate(2) modes: preallocate, punch, zero, collapse, insert.
    pub fn allocate(self: &Arc<Self>, h: &Handle, off: u64, len: u64, mode: i32, kill: bool) -> Access<()> {
        self.change(h, true, |v, staged| {
            let flags = FallocateFlags::from_bits_retain(mode as u32);
            if let Some(overlay) = v.overlaid() {
                drop_privileges(v, kill)?;
                overlay.allocate(&self.backing, v.fd(), flags, off, len)?;
                // Preallocated is the inode itself, which is to be durable with the change.
                v.inode_changed();
                return Ok(());
            }
            if staged && !flags.contains(FallocateFlags::PUNCH_HOLE) {
                self.account(v, off + len)?;
            }
            drop_privileges(v, kill)?;
            self.backing.allocate(v.fd(), flags, off, len)
        })
    }

    /// copy_file_range(2) by the dispatcher; `done` gets the number of bytes copied, which may be fewer than asked.
    pub fn copy(
        self: &Arc<Self>,
        src: &Handle,
        src_off: u64,
        dst: &Arc<Handle>,
        dst_off: u64,
        len: usize,
        kill: bool,
        done: impl FnOnce(Result<usize, Errno>) + Send + 'static,
    ) -> Access<()> {
        let len = if self.backing.probe().reflink { len } else { len.min(COPY_MAX) };
        let source = match src.file.state.read().open_version() {
            Ok(v) => v.clone(),
            Err(e) => return Access::Done(Err(e)),
        };
        let target = self.change(dst, false, |v, staged| {
            if staged {
                self.account_write(v, dst_off, len as u64)?;
            }
            drop_privileges(v, kill)
        });
        match target {
            Access::Wait => return Access::Wait,
            Access::Done(Err(e)) => return Access::Done(Err(e)),
            Access::Done(Ok(())) => {}
        }
        // Taken again with the lock: the version that the ticket names is the one that a later commit publishes.
        let st = dst.file.state.read();
        let ended = Self::wants_stage(dst, &st) || Self::wants_overlay(dst, &st);
        if st.phase == Phase::Committing || ended {
            return Access::Wait;
        }
        let Some(v) = st.version.clone() else { return Access::Done(Err(Errno::BADF)) };
        let copied = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let (me, handle, version, n) = (self.clone(), dst.clone(), v.clone(), copied.clone());
        let answer = Done::new(move |r| {
            let r = r.map(|()| n.load(Ordering::Acquire)).map_err(|e| e.errno());
            // As a write that failed, unless the error says that these two cannot be copied so.
            let cannot = [Errno::XDEV, Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS, Errno::BADF, Errno::TXTBSY];
            let lost = r.is_err_and(|e| !cannot.contains(&e)) && handle.file.state.read().is_staged();
            if let (true, Err(e)) = (lost, &r) {
                version.failed.add(dst_off, *e);
            }
            if lost || r.is_ok() {
                me.note_write(&handle, &version);
            }
            if let (Ok(n), true) = (&r, handle.file.state.read().is_staged()) {
                me.note_staged_write(&handle, &version, dst_off, *n);
            }
            done(r);
        });
        self.send(Work::Copy(Copy { src: source, src_off, dst: v, dst_off, len, copied }), answer);
        Access::Done(Ok(()))
    }

    /// A write through `h` to `v` is done.
    pub(super) fn note_write(&self, h: &Handle, v: &Version) {
        self.touched(&h.file, v);
        if h.mark_dirty() {
            h.file.state.write().unflushed += 1;
        }
    }

    /// Runs `f` on the version that writes through `h` concern, with a flag that tells whether it is staged.
    pub(super) fn change<T>(
        self: &Arc<Self>,
        h: &Handle,
        wrote: bool,
        f: impl FnOnce(&Arc<Version>, bool) -> Result<T, Errno>,
    ) -> Access<T> {
        if let Err(e) = self.writable() {
            return Access::Done(Err(e));
        }
        loop {
            {
                let st = h.file.state.read();
                if st.failures != h.failures {
                    return Access::Done(Err(Errno::IO));
                }
                if st.phase == Phase::Committing {
                    return Access::Wait;
                }
                if st.owes_version() {
                    return Access::Wait;
                }
                let other = Self::wants_stage(h, &st) || Self::wants_overlay(h, &st);
                if let Some(v) = st.version.as_ref().filter(|v| v.writable && !other) {
                    let staged = st.phase == Phase::Staged;
                    let r = f(v, staged);
                    // A write that failed counts too: the close after it must not say that all is well.
                    let first = (r.is_ok() || staged) && wrote && {
                        self.touched(&h.file, v);
                        h.mark_dirty()
                    };
                    drop(st);
                    if first {
                        h.file.state.write().unflushed += 1;
                    }
                    return Access::Done(r);
                }
            }
            if let Err(e) = self.prepare(h) {
                return Access::Done(Err(e));
            }
        }
    }

    /// Makes the file ready for writes through `h`: a new staged version, an overlay, or the backing file opened for
    /// writing.
    fn prepare(self: &Arc<Self>, h: &Handle) -> Result<(), Errno> {
        let mut st = h.file.state.write();
        if Self::wants_stage(h, &st) && !self.begin_stage(&h.file, &mut st, Content::Same, h.policy, false)? {
            h.replace.store(false, Ordering::Relaxed);
        }
        if Self::wants_overlay(h, &st) && !self.begin_overlay(&h.file, &mut st, h.policy)? {
            h.replace.store(false, Ordering::Relaxed);
        }
        if st.phase == Phase::Committing { Ok(()) } else { self.ensure_version(&mut st, true) }
    }

    /// Notes that the version changed and is to be made durable.
    pub(super) fn touched(&self, file: &Arc<File>, v: &Version) {
        let now = self.now_ms();
        if if v.overlaid().is_some() { v.mark_written(now) } else { v.mark_changed(now) } {
            self.unsettled.lock().insert(file.tag, file.clone());
        }
    }

    /// Attributes as programs see them.
    pub fn stat(&self, file: &File) -> Result<Stat, Errno> {
        let st = file.state.read();
        let mut attr = match (&st.version, &st.anchor, &st.pin) {
            (Some(v), ..) => v.stat()?,
            (None, _, Some(pin)) => rfs::fstat(pin)?,
            (None, Some(a), None) => rfs::fstat(self.backing.open_anchor(a, libc::O_PATH)?)?,
            (None, None, None) => return Err(Errno::STALE),
        };
        if st.is_new_inode() {
            attr.st_nlink = 1;
        }
        if let Some(c) = st.ctime.as_ref().filter(|c| c.real == ctime_of(&attr)) {
            (attr.st_ctime, attr.st_ctime_nsec) = (c.shown.0, c.shown.1 as _);
        }
        Ok(attr)
    }

    /// Runs `f` on a descriptor of the inode that holds the file's attributes: the staged one, else the committed
    /// one. `f` gets an `O_PATH` descriptor when the file is not open. Waits while a commit runs if it `changes`.
    pub fn with_inode<T>(
        &self,
        file: &Arc<File>,
        changes: bool,
        f: impl FnOnce(std::os::fd::BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> Access<T> {
        if changes && let Err(e) = self.writable() {
            return Access::Done(Err(e));
        }
        let st = file.state.read();
        if changes && st.phase == Phase::Committing {
            return Access::Wait;
        }
        let run = || {
            let opened;
            // Not open, but for the journal: the next update has to know that the inode changed.
            let held = if st.version.is_none() { st.id.and_then(|id| self.journal.open_version(id)) } else { None };
            let version = st.version.as_ref().or(held.as_ref());
            let fd = match (version, &st.anchor, &st.pin) {
                (Some(v), ..) => v.fd(),
                (None, _, Some(pin)) => std::os::fd::AsFd::as_fd(pin),
                (None, Some(a), None) => {
                    opened = self.backing.open_anchor(a, libc::O_PATH)?;
                    std::os::fd::AsFd::as_fd(&opened)
                }
                (None, None, None) => return Err(Errno::STALE),
            };
            if let (true, Some(v)) = (changes, &st.version) {
                carry_mtime(v)?;
            }
            let r = f(fd)?;
            if let (true, Some(v)) = (changes, version) {
                if held.is_some() {
                    v.inode_changed();
                } else if v.mark_changed(self.now_ms()) {
                    self.unsettled.lock().insert(file.tag, file.clone());
                }
                v.caps.store(has_capabilities(v), Ordering::Relaxed);
            }
            Ok(r)
        };
        Access::Done(run())
    }
}

/// Attributes are the inode's own at all times: the modification time that it does not have yet becomes its own before
/// a program sets one.
fn carry_mtime(v: &Version) -> Result<(), Errno> {
    let Some((tv_sec, tv_nsec)) = v.overlaid().and_then(Overlay::take_mtime) else { return Ok(()) };
    let last_access = rfs::Timespec { tv_sec: 0, tv_nsec: rfs::UTIME_OMIT };
    rfs::futimens(v.fd(), &rfs::Timestamps { last_access, last_modification: rfs::Timespec { tv_sec, tv_nsec } })
}

/// The change time of a stat buffer.
pub(super) fn ctime_of(st: &Stat) -> (i64, i64) {
    (st.st_ctime, st.st_ctime_nsec as i64)
}

/// Whether a write is to take capabilities away.
fn has_capabilities(v: &Version) -> bool {
    rfs::fgetxattr(v.fd(), CAPS, &mut [0_u8; 0][..]).is_ok_and(|n| n > 0)
}

/// Counts a new descriptor. Under the same lock as the opening of the version: a commit that ended in between would
/// close it again.
pub(super) fn opened(file: &Arc<File>, st: &mut State, flags: i32, policy: Policy, replace: bool) -> Handle {
    st.opens += 1;
    let handle = Handle {
        file: file.clone(),
        flags,
        policy,
        replace: replace.into(),
        rewrites_small: false,
        kernel: st.kernel,
        opened_ns: 0,
        dirty: false.into(),
        failures: st.failures,
        writers: parking_lot::Mutex::default(),
        submitters: parking_lot::Mutex::default(),
    };
    if handle.writes() {
        st.writers += 1;
    }
    handle
}

//! Staged versions: how a new version of a file begins.
//!
//! A staged version is an inode without a name (`O_TMPFILE`) in the very directory where it will be published. So it
//! gets group, default ACL, label, project and disk placement from there, programs that look at the backing directory
//! never see it, and whatever way the daemon ends, the kernel frees it.

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{self as rfs, Stat, Timespec, Timestamps};
use rustix::io::Errno;

use super::Engine;
use super::dir::{Dir, Place};
use super::dispatch::{Done, Work};
use super::file::{File, Handle, State, Version};
use super::state::{Event, Phase};
use crate::backend::FileId;
use crate::config::policy::{Method, Policy, WriteMode};
use crate::sys::creds::{As, Caller};
use crate::telemetry::Counters;

/// How the new version starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Empty: the file is rewritten.
    Empty,
    /// As the committed version, which it goes on from.
    Same,
}

impl Engine {
    /// Creates a file as a staged version; `tag` numbers it. The caller made sure that the name is free.
    ///
    /// # Errors
    /// `EEXIST` when the name was staged meanwhile, or what the file system says.
    pub fn create(
        &self,
        dir: &Arc<Dir>,
        name: &OsStr,
        mode: u32,
        caller: &Caller,
        flags: i32,
        policy: Policy,
        tag: impl FnOnce(FileId) -> u64,
    ) -> Result<Handle, Errno> {
        self.writable()?;
        let dir_fd = self.dir_fd(dir)?;
        let fd = {
            let _as = As::caller(caller, mode);
            self.backing.open_stage(&dir_fd, mode & 0o7777)?
        };
        let id = FileId::of(&rfs::fstat(&fd)?);
        let mut version = Version::new(fd, id, true);
        self.open_direct(&mut version, policy);
        version.dirty_ms.store(self.now_ms(), Ordering::Relaxed);
        let place = Place { dir: dir.clone(), name: name.to_owned() };
        let file = Arc::new(File::created(tag(id), version, place));
        file.state.write().policy = policy;
        {
            let mut staged = dir.staged.lock();
            if staged.contains_key(name) {
                return Err(Errno::EXIST);
            }
            staged.insert(name.to_owned(), file.clone());
        }
        dir.touch(&dir_fd);
        self.note_stage(&file, id);
        let mut st = file.state.write();
        Ok(super::io::opened(&file, &mut st, flags, policy, true))
    }

    /// Whether writes through `h` are to go to a new staged version.
    pub(super) fn wants_stage(h: &Handle, st: &State) -> bool {
        let mode = !matches!(h.policy.mode, WriteMode::InPlace | WriteMode::Journal);
        st.phase == Phase::Clean && h.replace.load(Ordering::Relaxed) && mode
    }

    /// Begins a staged version of a committed file, in phase `Clean`. False when it has to go on in place: it is
    /// served by the kernel, has several links, its name is not known for sure, it lies on another file system, or a copy would not be cheap.
    pub(super) fn begin_stage(
        self: &Arc<Self>,
        file: &Arc<File>,
        st: &mut State,
        content: Content,
        policy: Policy,
        kill: bool,
    ) -> Result<bool, Errno> {
        if st.kernel.is_some() {
            // Descriptors that the kernel serves would go on reading and writing the version before.
            return Ok(false);
        }
        let (Some(id), Some(place)) = (st.id, st.names.first().cloned()) else { return Ok(false) };
        // An appending program goes on in place where only appends are allowed (`chattr +a`).
        let append_only = content == Content::Same && st.version.as_ref().is_some_and(|v| v.append_only);
        if id.dev != self.backing.dev() || append_only {
            return Ok(false);
        }
        let dir_fd = self.dir_fd(&place.dir)?;
        let old = match self.backing.stat_at(&dir_fd, &place.name) {
            Ok(old) if FileId::of(&old) == id && old.st_nlink == 1 => old,
            Ok(_) | Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(e),
        };
        let size = old.st_size as u64;
        let copies = content == Content::Same && size > 0;
        if copies && !self.backing.probe().reflink && size > policy.restage_max_bytes {
            Counters::add(&self.counters.in_place_fallbacks, 1);
            return Ok(false);
        }
        let version = Arc::new(self.stage_of(st, &old, &dir_fd, copies, policy, kill)?);
        if !Self::claim(&place, file) {
            return Ok(false);
        }
        st.go(Event::Stage)?;
        st.lost = None;
        self.sync_what_is_owed(file, st);
        st.policy = policy;
        let now = self.now_ms();
        version.dirty_ms.store(now, Ordering::Relaxed);
        version.last_write_ms.store(now, Ordering::Relaxed);
        let new_id = version.id;
        *version.before.lock() = st.version.take();
        st.version = Some(version);
        self.note_stage(file, new_id);
        Ok(true)
    }

    /// Changes in place that were acknowledged before a new version begins are no debt of that one: whatever pays debts
    /// would publish it half-written.
    pub(super) fn sync_what_is_owed(self: &Arc<Self>, file: &Arc<File>, st: &mut State) {
        if !st.owes() {
            return;
        }
        st.paid();
        if let Some(version) = st.version.clone().filter(|v| !v.is_synced()) {
            self.send(Work::SyncFile { file: file.clone(), version, data_only: false }, Done::nobody());
        }
    }

    /// Takes the name for the file's staged version.
    pub(super) fn claim(place: &Place, file: &Arc<File>) -> bool {
        let mut staged = place.dir.staged.lock();
        if staged.contains_key(&place.name) {
            return false;
        }
        staged.insert(place.name.clone(), file.clone());
        true
    }

    fn stage_of(
        &self,
        st: &State,
        old: &Stat,
        dir_fd: &std::os::fd::OwnedFd,
        copies: bool,
        policy: Policy,
        kill: bool,
    ) -> Result<Version, Errno> {
        let opened;
        let source = match &st.version {
            Some(v) => v.fd(),
            None => {
                let anchor = st.anchor.as_ref().ok_or(Errno::STALE)?;
                opened = self.backing.open_anchor(anchor, libc::O_RDONLY)?;
                std::os::fd::AsFd::as_fd(&opened)
            }
        };
        let fd = self.backing.open_stage(dir_fd, 0o600)?;
        if copies && (!self.backing.probe().reflink || self.backing.clone_file(source, &fd).is_err()) {
            self.backing.copy_all(source, &fd, old.st_size as u64)?;
        }
        let mode = if kill { without_privileges(old.st_mode) } else { old.st_mode };
        self.backing.copy_meta(source, old, std::os::fd::AsFd::as_fd(&fd), mode)?;
        let id = FileId::of(&rfs::fstat(&fd)?);
        if !copies {
            // A truncation is a change. The time of a new inode can be that of the last change of the old one, where the
            // file system hands out times finer than the clock's tick to those alone whose time was seen (XFS).
            let now = Timespec { tv_sec: 0, tv_nsec: rfs::UTIME_NOW };
            let same = Timespec { tv_sec: 0, tv_nsec: rfs::UTIME_OMIT };
            rfs::futimens(&fd, &Timestamps { last_access: same, last_modification: now })?;
        }
        let mut version = Version::new(fd, id, true);
        self.open_direct(&mut version, policy);
        if copies {
            self.account(&version, old.st_size as u64)?;
        }
        Ok(version)
    }

    /// For method `direct`: a second descriptor with `O_DIRECT`, or the page cache where that is refused.
    fn open_direct(&self, v: &mut Version, policy: Policy) {
        if policy.method != Method::Direct {
            return;
        }
        if v.write_directly(&self.backing).is_err() {
            Counters::add(&self.counters.direct_fallbacks, 1);
        }
    }

    fn note_stage(&self, file: &Arc<File>, id: FileId) {
        Counters::add(&self.counters.stages, 1);
        Counters::add(&self.counters.staged_now, 1);
        self.unsettled.lock().insert(file.tag, file.clone());
        self.observer().staged(file, id);
    }

    /// Counts what a write adds to an uncommitted version; at the bound, `ENOSPC`.
    pub(super) fn account_write(&self, v: &Version, off: u64, len: u64) -> Result<(), Errno> {
        self.account(v, v.overlaid().map_or(off.saturating_add(len), |o| o.bytes() + o.growth(off, len)))
    }

    /// Counts the growth of a staged version; at the bound, `ENOSPC`.
    pub(super) fn account(&self, v: &Version, end: u64) -> Result<(), Errno> {
        let before = v.accounted.load(Ordering::Relaxed);
        if end <= before {
            return Ok(());
        }
        let grown = end - before;
        let max = self.config().limits.staging_max_bytes;
        if max > 0 && self.counters.staged_bytes.load(Ordering::Relaxed) + grown > max {
            Counters::add(&self.counters.staging_full, 1);
            return Err(Errno::NOSPC);
        }
        v.accounted.store(end, Ordering::Relaxed);
        Counters::add(&self.counters.staged_bytes, grown);
        Ok(())
    }

    /// A staged version ended, by publication or not.
    pub(super) fn end_stage(&self, v: &Version) {
        v.behind.give_up();
        Counters::sub(&self.counters.staged_bytes, v.accounted.swap(0, Ordering::Relaxed));
        Counters::sub(&self.counters.staged_now, 1);
    }
}

/// The mode bits after a write by an unprivileged program (kernel `setattr_should_drop_suidgid`).
pub fn without_privileges(mode: u32) -> u32 {
    let mut m = mode & !0o4000;
    if mode & 0o010 != 0 {
        m &= !0o2000;
    }
    m
}

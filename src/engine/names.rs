//! Operations on names that know of staged versions: a name may exist in the mount and not yet in the backing
//! directory. The state locks of the files concerned are held while the backing name changes, so no commit of theirs
//! can begin meanwhile and bring an old name back.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::RwLockWriteGuard;
use rustix::fs::{self as rfs, RenameFlags};
use rustix::io::Errno;

use super::Engine;
use super::dir::{Dir, Place};
use super::dispatch::{CommitError, Done, Outcome, Step, Work};
use super::file::{File, State};
use super::io::Access;
use super::state::{Event, Phase};
use crate::backend::Fault;

/// A name and the regular file behind it, if it is one that is known.
#[derive(Debug, Clone)]
pub struct Name<'a> {
    /// Directory.
    pub dir: &'a Arc<Dir>,
    /// Name in it.
    pub name: &'a OsStr,
    /// The regular file, if the layer above knows it.
    pub file: Option<Arc<File>>,
}

/// What a rename needs first.
#[derive(Debug)]
pub enum RenameAccess {
    /// It is done, or failed.
    Done(Result<(), Errno>),
    /// A commit of this file runs; park there and call again.
    Wait(Arc<File>),
    /// This file has to be committed first: a rename is a commit point.
    Commit(Arc<File>),
}

impl Engine {
    /// Removes a name. A version that was never committed is dropped with its last name.
    pub fn unlink(&self, n: &Name<'_>) -> Access<()> {
        if let Err(e) = self.writable() {
            return Access::Done(Err(e));
        }
        let Some(file) = &n.file else {
            return Access::Done(self.unlink_backing(n, false));
        };
        let mut st = file.state.write();
        if st.phase == Phase::Committing {
            return Access::Wait;
        }
        let only_staged = st.phase == Phase::Staged && st.id.is_none();
        let r = if only_staged {
            self.dir_fd(n.dir).map(|fd| n.dir.touch(&fd))
        } else {
            self.pin(&mut st);
            self.unlink_backing(n, false)
        };
        if r.is_ok() {
            self.forget_name(file, &mut st, n);
        } else if st.phase != Phase::Orphan {
            st.pin = None;
        }
        Access::Done(r)
    }

    /// Removes a directory. One with staged files in it is not empty, though the backing directory may be.
    pub fn rmdir(&self, parent: &Arc<Dir>, name: &OsStr, dir: Option<&Arc<Dir>>) -> Result<(), Errno> {
        self.writable()?;
        let staged = dir.map(|d| d.staged.lock());
        if staged.as_ref().is_some_and(|s| !s.is_empty()) {
            return Err(Errno::NOTEMPTY);
        }
        let fd = dir.map(|d| self.dir_fd(d)).transpose()?;
        self.unlink_backing(&Name { dir: parent, name, file: None }, true)?;
        if let (Some(d), Some(fd)) = (dir, fd) {
            d.hold(fd);
        }
        Ok(())
    }

    fn unlink_backing(&self, n: &Name<'_>, rmdir: bool) -> Result<(), Errno> {
        let dir = self.dir_fd(n.dir)?;
        self.backing.unlink(&dir, n.name, rmdir)?;
        self.names_changed(n.dir);
        Ok(())
    }

    /// Keeps the inode reachable for descriptors and for the kernel's own references after its last name went.
    fn pin(&self, st: &mut State) {
        if st.pin.is_none()
            && st.version.is_none()
            && let Some(a) = &st.anchor
        {
            // Without it only calls on the removed file fail (ESTALE), so an error here is no reason to refuse.
            st.pin = self.backing.open_anchor(a, libc::O_PATH).ok();
        }
    }

    /// The file lost a name; with its last one it is an orphan.
    fn forget_name(&self, file: &Arc<File>, st: &mut State, n: &Name<'_>) {
        st.names.retain(|p| !p.is(n.dir, n.name));
        self.unclaim(file, &Place { dir: n.dir.clone(), name: n.name.to_owned() });
        let staged = st.phase == Phase::Staged;
        let new_inode = st.is_new_inode();
        let gone = new_inode || Self::link_count(st) == 0;
        if !gone {
            st.pin = None;
            if let Some(other) = st.names.first().filter(|_| staged) {
                // An overlay is known by one of the names that are left; one that is taken keeps its file.
                Self::claim(other, file);
            }
        }
        if gone && st.go(Event::Unlinked).is_ok() {
            st.paid();
            self.unsettled.lock().remove(&file.tag);
            if staged && let Some(v) = st.version.clone() {
                self.end_stage(&v);
                if new_inode {
                    self.observer().discarded(file, v.id);
                }
            }
            if st.opens == 0 && staged {
                st.version = None;
            }
        }
    }

    fn link_count(st: &State) -> u64 {
        let links = |fd: BorrowedFd<'_>| rfs::fstat(fd).map_or(0, |s| s.st_nlink);
        match (&st.version, &st.pin) {
            (Some(v), _) => links(v.fd_unsettled()),
            (None, Some(pin)) => links(pin.as_fd()),
            (None, None) => 0,
        }
    }

    /// renameat2(2). The source's newest version is committed first; a staged version of the target is dropped with
    /// its name.
    pub fn rename(&self, from: &Name<'_>, to: &Name<'_>, flags: u32) -> RenameAccess {
        if let Err(e) = self.writable() {
            return RenameAccess::Done(Err(e));
        }
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let same = matches!((&from.file, &to.file), (Some(a), Some(b)) if Arc::ptr_eq(a, b));
        let (mut src, mut dst) = lock_both(from.file.as_ref(), to.file.as_ref().filter(|_| !same));
        for (n, st) in [(from, &src), (to, &dst)] {
            let (Some(file), Some(st)) = (&n.file, st) else { continue };
            match st.phase {
                Phase::Committing => return RenameAccess::Wait(file.clone()),
                Phase::Staged if exchange || std::ptr::eq(n, from) => return RenameAccess::Commit(file.clone()),
                _ => {}
            }
        }
        if flags & libc::RENAME_NOREPLACE != 0 && to.dir.staged(to.name).is_some() {
            return RenameAccess::Done(Err(Errno::EXIST));
        }
        if let Some(st) = dst.as_deref_mut() {
            self.pin(st);
        }
        let done = self.rename_backing(from, to, flags);
        if done.is_ok() && !same {
            self.renamed(from, to, src.as_deref_mut(), dst.as_deref_mut(), exchange);
        }
        if let Some(st) = dst.as_deref_mut().filter(|st| st.phase != Phase::Orphan) {
            st.pin = None;
        }
        RenameAccess::Done(done)
    }

    fn rename_backing(&self, from: &Name<'_>, to: &Name<'_>, flags: u32) -> Result<(), Errno> {
        let (a, b) = (self.dir_fd(from.dir)?, self.dir_fd(to.dir)?);
        self.backing.rename((&a, from.name), (&b, to.name), RenameFlags::from_bits_retain(flags))?;
        self.names_changed(from.dir);
        self.names_changed(to.dir);
        Ok(())
    }

    fn renamed(
        &self,
        from: &Name<'_>,
        to: &Name<'_>,
        src: Option<&mut State>,
        dst: Option<&mut State>,
        exchange: bool,
    ) {
        if let (Some(file), Some(st)) = (&to.file, dst) {
            if exchange {
                rename_in(st, to, from);
            } else {
                self.forget_name(file, st, to);
            }
        }
        if let Some(st) = src {
            rename_in(st, from, to);
        }
    }

    /// Links a file under a further name. Its newest version is committed first.
    pub fn link(&self, file: &Arc<File>, dir: &Arc<Dir>, name: &OsStr) -> RenameAccess {
        if let Err(e) = self.writable() {
            return RenameAccess::Done(Err(e));
        }
        let mut st = file.state.write();
        match st.phase {
            Phase::Committing => return RenameAccess::Wait(file.clone()),
            Phase::Staged => return RenameAccess::Commit(file.clone()),
            Phase::Orphan => return RenameAccess::Done(Err(Errno::NOENT)),
            Phase::Clean => {}
        }
        if dir.staged(name).is_some() {
            return RenameAccess::Done(Err(Errno::EXIST));
        }
        let done = (|| {
            let to = self.dir_fd(dir)?;
            let opened;
            let fd = match (&st.version, &st.anchor) {
                (Some(v), _) => v.fd(),
                (None, Some(a)) => {
                    opened = self.backing.open_anchor(a, libc::O_PATH)?;
                    std::os::fd::AsFd::as_fd(&opened)
                }
                (None, None) => return Err(Errno::STALE),
            };
            self.backing.link(fd, &to, name)?;
            self.names_changed(dir);
            Ok(())
        })();
        if done.is_ok() {
            st.names.push(Place { dir: dir.clone(), name: name.to_owned() });
        }
        RenameAccess::Done(done)
    }

    /// Notes that names in a directory changed and are to be made durable within the commit interval.
    pub fn names_changed(&self, dir: &Arc<Dir>) {
        dir.show_real_times();
        self.dir_changed(dir);
    }

    /// Notes that a directory's own attributes changed.
    pub fn dir_changed(&self, dir: &Arc<Dir>) {
        dir.mark_changed();
        self.owe_sync(dir);
    }

    /// A change of a directory is to become durable within the commit interval.
    pub(super) fn owe_sync(&self, dir: &Arc<Dir>) {
        dir.mark_acknowledged();
        self.dirty_dirs.lock().insert(dir.tag, dir.clone());
    }

    /// fsync(2) of a directory: names that programs were told of are committed first. Finds nothing left to do when
    /// a commit synced the directory since the last change that anybody was told of. That matters: the kernel locks the
    /// directory for this call, and everybody else who creates or renames there waits. Without `waits` (level `relaxed`)
    /// only the error of an earlier save is told. `tid` is the thread that asks; 0: not known.
    pub fn sync_dir(self: &Arc<Self>, dir: &Arc<Dir>, tid: u32, waits: bool, done: Done) {
        dir.sync_came(tid);
        let first = waits.then(|| self.acknowledged_in(&[dir])).filter(|debts| !debts.is_empty());
        let (me, dir) = (self.clone(), dir.clone());
        let sync = move |paid: Outcome| {
            let lost = dir.lost.lock().take().map(|e| CommitError::at(Step::Publish, Fault::Os(e)));
            match (paid.err().or(lost), !waits || dir.is_synced()) {
                (Some(e), _) => done.answer(Err(e)),
                (None, true) => done.answer(Ok(())),
                (None, false) => me.send(Work::SyncDir(dir.clone()), done),
            }
            dir.next_turn(me.turn_length());
        };
        match first {
            Some(first) => self.pay_all(first, sync),
            None => sync(Ok(())),
        }
    }

    /// True when nothing of the file is uncommitted or unsynced, or no name leads to it any more.
    pub fn is_settled(file: &File) -> bool {
        let st = file.state.read();
        st.phase == Phase::Orphan
            || !st.is_staged() && st.version.as_ref().is_none_or(|v| v.dirty_ms.load(Ordering::Acquire) == 0)
    }
}

fn rename_in(st: &mut State, from: &Name<'_>, to: &Name<'_>) {
    st.names.retain(|p| !p.is(from.dir, from.name));
    st.names.push(Place { dir: to.dir.clone(), name: to.name.to_owned() });
}

type Guard<'a> = Option<RwLockWriteGuard<'a, State>>;

/// Locks two different files in the order of their numbers, so that two renames cannot wait for each other.
fn lock_both<'a>(a: Option<&'a Arc<File>>, b: Option<&'a Arc<File>>) -> (Guard<'a>, Guard<'a>) {
    match (a, b) {
        (Some(x), Some(y)) if y.tag < x.tag => {
            let y = y.state.write();
            (Some(x.state.write()), Some(y))
        }
        (a, b) => {
            let a = a.map(|f| f.state.write());
            (a, b.map(|f| f.state.write()))
        }
    }
}

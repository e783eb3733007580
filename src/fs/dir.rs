//! Listing directories: what the backing directory holds, without `.fsys`, and with the names that exist only as
//! staged versions.
//!
//! Positions are the backing file system's own, so telldir and seekdir work and a listing of a million entries needs
//! no memory. Staged names come at the end, from a list taken when the listing begins; a name on it that is
//! published meanwhile is left out where the backing directory shows it, so it appears exactly once.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{self as rfs, FileType, RawDir, SeekFrom};
use rustix::io::Errno;

use super::{Entry, Fs, IoMode, Opened, Reply};
use crate::backend::FileId;
use crate::config::policy::Durability;
use crate::engine::dir::Dir;
use crate::engine::dispatch::Done;

/// Positions of staged names start here. ext4 uses no position with this upper half except its end, `2^63 - 1`
/// (fs/ext4/dir.c: a major hash of 0xfffffffe is kept free); XFS, btrfs and tmpfs count up from small numbers.
const STAGED_AT: u64 = 0x7fff_ffff_0000_0000;

/// An open directory.
#[derive(Debug)]
pub(super) struct DirHandle {
    dir: Arc<Dir>,
    list: Mutex<Listing>,
}

#[derive(Debug)]
struct Listing {
    fd: OwnedFd,
    at: u64,
    staged: Vec<OsString>,
    skip: HashSet<OsString>,
}

/// One entry of a listing.
#[derive(Debug)]
pub struct DirEntry<'a> {
    /// Name.
    pub name: &'a OsStr,
    /// `st_ino`.
    pub ino: u64,
    /// Type.
    pub kind: FileType,
    /// Where the listing goes on after it.
    pub next: u64,
    /// With attributes, when asked for them and it is not `.` or `..`.
    pub entry: Option<Entry>,
}

impl Fs {
    /// opendir(3).
    pub fn opendir(&self, node: u64) -> Result<Opened, Errno> {
        let dir = self.dir(node)?;
        self.backing().admit()?;
        let fd = self.backing().open_anchor(&dir.anchor, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let io = IoMode::Directory { cached: self.keeps_listing(&dir, &fd) };
        let list = Mutex::new(Listing { fd, at: 0, staged: Vec::new(), skip: HashSet::new() });
        Ok(Opened { fh: self.dirs.add(DirHandle { dir, list }), io, flush: true })
    }

    /// closedir(3).
    pub fn releasedir(&self, fh: u64) {
        self.dirs.remove(fh);
    }

    /// Lists from position `at`, until the end or until `sink` answers that it is full. With `plus` each entry is
    /// looked up, and counted for the kernel, which takes it as such.
    pub fn readdir(
        &self,
        fh: u64,
        at: u64,
        plus: bool,
        sink: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<(), Errno> {
        let handle = self.dirs.get(fh)?;
        let mut list = handle.list.lock();
        if at == 0 {
            Self::begin_listing(&handle.dir, &mut list);
        }
        if at < STAGED_AT && !self.list_backing(&handle.dir, &mut list, at, plus, sink)? {
            return Ok(());
        }
        self.list_staged(&handle.dir, &list, at, plus, sink);
        Ok(())
    }

    fn begin_listing(dir: &Dir, list: &mut Listing) {
        // Those with a committed version are in the backing directory already.
        let files: Vec<_> = dir.staged.lock().iter().map(|(n, f)| (n.clone(), f.clone())).collect();
        list.staged = files.into_iter().filter(|(_, f)| f.state.read().id.is_none()).map(|(n, _)| n).collect();
        list.staged.sort_unstable();
        list.skip = list.staged.iter().cloned().collect();
    }

    /// False when the sink is full.
    fn list_backing(
        &self,
        dir: &Arc<Dir>,
        list: &mut Listing,
        at: u64,
        plus: bool,
        sink: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> Result<bool, Errno> {
        rfs::seek(&list.fd, SeekFrom::Start(at))?;
        list.at = at;
        let mut buf = vec![MaybeUninit::uninit(); 32 << 10];
        let mut raw = RawDir::new(&list.fd, &mut buf);
        while let Some(e) = raw.next() {
            let e = e?;
            let name = OsStr::from_bytes(e.file_name().to_bytes());
            if Self::reserved(dir, name) || list.skip.contains(name) {
                continue;
            }
            let id = FileId { dev: dir.id.dev, ino: e.ino() };
            if id == self.private {
                continue;
            }
            let item = (name, id, e.file_type(), e.next_entry_cookie());
            if !self.emit(dir, item, plus, sink) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn list_staged(
        &self,
        dir: &Arc<Dir>,
        list: &Listing,
        at: u64,
        plus: bool,
        sink: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) {
        let from = at.saturating_sub(STAGED_AT) as usize;
        for (i, name) in list.staged.iter().enumerate().skip(from) {
            // Removed since the listing began: left out.
            let Ok(node) = self.find(dir, name) else { continue };
            let id = FileId { dev: dir.id.dev, ino: node.id };
            let item = (name.as_os_str(), id, FileType::RegularFile, STAGED_AT + i as u64 + 1);
            let more = self.emit(dir, item, plus, sink);
            self.forget(node.id, 1);
            if !more {
                return;
            }
        }
    }

    fn emit(
        &self,
        dir: &Arc<Dir>,
        (name, id, kind, next): (&OsStr, FileId, FileType, u64),
        plus: bool,
        sink: &mut dyn FnMut(&DirEntry<'_>) -> bool,
    ) -> bool {
        let dots = name == "." || name == "..";
        let entry = if plus && !dots {
            match self.find(dir, name).and_then(|n| self.entry(dir, &n)) {
                Ok(e) => Some(e),
                // Removed since it was read.
                Err(Errno::NOENT) => return true,
                Err(_) => None,
            }
        } else {
            None
        };
        let ino = match &entry {
            Some(e) => e.attr.ino,
            None => self.table.number(id).unwrap_or(id.ino),
        };
        let taken = sink(&DirEntry { name, ino, kind, next, entry });
        if let (false, Some(e)) = (taken, entry) {
            self.forget(e.node, 1);
        }
        taken
    }

    /// fsync(2) of a directory.
    pub fn fsyncdir(&self, tid: u32, node: u64, reply: Reply<()>) {
        match self.node(node).and_then(|at| Ok((self.policy_of(&at).durability, self.dir(node)?))) {
            Ok((level, dir)) => {
                let waits = level != Durability::Relaxed;
                self.engine.sync_dir(&dir, tid, waits, Done::new(move |r| reply.send(r.map_err(|e| e.errno()))));
            }
            Err(e) => reply.send(Err(e)),
        }
    }

    /// Nodes the kernel knows and descriptors that are open.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.table.len() as u64, (self.files.len() + self.dirs.len()) as u64)
    }
}

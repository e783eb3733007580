//! Content of regular files: open, read, write, close, fsync.

use std::num::NonZeroU32;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Caller, Fs, Opened, Reply};
use crate::engine::dispatch::{CommitError, Done};
use crate::engine::file::Handle;
use crate::engine::io::Access;
use crate::engine::served::Register;
use crate::telemetry::Counters;

fn errno(r: Result<(), CommitError>) -> Result<(), Errno> {
    r.map_err(|e| e.errno())
}

impl Fs {
    /// open(2) of an existing file; with `O_TRUNC` the rewrite begins here.
    pub fn open(self: &Arc<Self>, caller: Caller, node: u64, flags: i32, reply: Reply<Opened>) {
        let me = self.clone();
        let work = move || me.open_now(caller, node, flags, reply);
        if flags & libc::O_TRUNC != 0 { self.engine.after_backlog(work) } else { work() }
    }

    fn open_now(self: &Arc<Self>, caller: Caller, node: u64, flags: i32, reply: Reply<Opened>) {
        let admitted = self.backing().admit().and_then(|()| self.node(node));
        let found = admitted.and_then(|n| Ok((self.policy_of(&n), n.file()?.clone(), n)));
        let (policy, file, at) = match found {
            Ok(f) => f,
            Err(e) => return reply.send(Err(e)),
        };
        let register = |fd: BorrowedFd<'_>| self.register(fd);
        let served = self.may_pass(&at, &policy).then_some(&register as Register<'_>);
        match self.engine.open_served(&file, flags, policy, caller.uid != 0, served) {
            Access::Done(h) => reply.send(h.map(|h| self.opened(&at, h))),
            Access::Wait => {
                let me = self.clone();
                self.engine.park(&file, Box::new(move || me.open_now(caller, node, flags, reply)));
            }
        }
    }

    pub(super) fn handle(&self, fh: u64) -> Result<Arc<Handle>, Errno> {
        self.files.get(fh)
    }

    /// pread(2) into `buf`; the number of bytes read, short only at the end of the file. May wait for the device.
    pub fn read(&self, fh: u64, off: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        self.engine.read(&self.handle(fh)?.file, off, buf)
    }

    /// As [`Fs::read`], for a thread that serves others too; `None` when it would wait: [`Fs::read_later`].
    pub fn read_cached(&self, fh: u64, off: u64, buf: &mut [u8]) -> Result<Option<usize>, Errno> {
        self.engine.read_cached(&self.handle(fh)?.file, off, buf)
    }

    /// pread(2) of at most `len` bytes by a thread that may wait for the device.
    pub fn read_later(self: &Arc<Self>, fh: u64, off: u64, len: usize, reply: Reply<Vec<u8>>) {
        Counters::add(&self.engine.counters.device_reads, 1);
        let me = self.clone();
        self.engine.read_later(Box::new(move || {
            let mut buf = vec![0; len];
            reply.send(me.read(fh, off, &mut buf).map(|n| {
                buf.truncate(n);
                buf
            }));
        }));
    }

    /// pwrite(2) by thread `tid` (0: by the kernel's write-back). `kill` when the write takes set-user-ID and set-group-ID away.
    pub fn write(self: &Arc<Self>, tid: u32, fh: u64, off: u64, data: &[u8], kill: bool, reply: Reply<u32>) {
        let h = match self.handle(fh) {
            Ok(h) => h,
            Err(e) => return reply.send(Err(e)),
        };
        // Not what the kernel writes back by itself: it opens the file with `O_TRUNC` meanwhile.
        if tid == 0 || !self.engine.write_waits(&h, off, data.len()) {
            return self.write_now(&h, tid, off, data, kill, reply);
        }
        // Before it is written another process may close its copy of the descriptor.
        h.note_writer(tid);
        Counters::add(&self.engine.counters.device_writes, 1);
        let me = self.clone();
        let write = move |data: &[u8]| me.write_now(&h, tid, off, data, kill, reply);
        if let Some(write) = self.engine.write_later(data, write) {
            write(data);
        }
    }

    fn write_now(self: &Arc<Self>, h: &Arc<Handle>, tid: u32, off: u64, data: &[u8], kill: bool, reply: Reply<u32>) {
        h.note_writer(tid);
        match self.engine.write(h, off, data, kill) {
            Access::Done(Ok(n)) if h.is_sync() => {
                self.engine.fsync(
                    h,
                    h.flags & libc::O_SYNC != libc::O_SYNC,
                    Done::new(move |r| {
                        reply.send(errno(r).map(|()| n as u32));
                    }),
                );
            }
            Access::Done(r) => reply.send(r.map(|n| n as u32)),
            Access::Wait => {
                let (me, to, data) = (self.clone(), h.clone(), data.to_vec());
                self.engine.park(&h.file, Box::new(move || me.write_now(&to, tid, off, &data, kill, reply)));
            }
        }
    }

    /// close(2), by thread `tid`, of a descriptor or of one of its duplicates.
    pub fn flush(&self, tid: u32, fh: u64, reply: Reply<()>) {
        match self.handle(fh) {
            Ok(h) => self.engine.close(&h, tid, Done::new(move |r| reply.send(errno(r)))),
            Err(e) => reply.send(Err(e)),
        }
    }

    /// The last reference to a descriptor is gone.
    pub fn release(&self, node: u64, fh: u64) {
        if let Some(h) = self.files.remove(fh) {
            let written = if h.is_unseen() { h.file.state.read().version.clone() } else { None };
            if let Some(id) = self.engine.release(&h) {
                self.unregister(id);
            }
            if let Some(v) = written
                && h.file.state.read().unseen == 0
            {
                self.watch.heed(v.fd());
            }
            self.reap_if_forgotten(node);
        }
    }

    /// fsync(2), fdatasync(2), by thread `tid`.
    pub fn fsync(&self, tid: u32, fh: u64, data_only: bool, reply: Reply<()>) {
        match self.handle(fh) {
            Ok(h) => {
                self.engine.fsync(&h, data_only, Done::new(move |r| reply.send(errno(r))).by(NonZeroU32::new(tid)));
            }
            Err(e) => reply.send(Err(e)),
        }
    }

    /// fallocate(2).
    pub fn fallocate(self: &Arc<Self>, caller: Caller, fh: u64, off: u64, len: u64, mode: i32, reply: Reply<()>) {
        let h = match self.handle(fh) {
            Ok(h) => h,
            Err(e) => return reply.send(Err(e)),
        };
        match self.engine.allocate(&h, off, len, mode, caller.uid != 0) {
            Access::Done(r) => reply.send(r),
            Access::Wait => {
                let me = self.clone();
                self.engine.park(&h.file, Box::new(move || me.fallocate(caller, fh, off, len, mode, reply)));
            }
        }
    }

    /// lseek(2) with `SEEK_DATA` or `SEEK_HOLE`.
    pub fn lseek(&self, fh: u64, off: i64, whence: i32) -> Result<i64, Errno> {
        let at = u64::try_from(off).map_err(|_| Errno::NXIO)?;
        let data = match whence {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return Err(Errno::INVAL),
        };
        let version = self.handle(fh)?.file.state.read().open_version()?.clone();
        version.seek(at, data).map(|n| n as i64)
    }

    /// copy_file_range(2).
    pub fn copy(self: &Arc<Self>, caller: Caller, from: (u64, u64), to: (u64, u64), len: usize, reply: Reply<u32>) {
        let handles = self.handle(from.0).and_then(|a| Ok((a, self.handle(to.0)?)));
        let (src, dst) = match handles {
            Ok(h) => h,
            Err(e) => return reply.send(Err(e)),
        };
        // The reply may be needed on three ways; only the first that is taken sends it.
        let slot = Arc::new(parking_lot::Mutex::new(Some(reply)));
        let late = slot.clone();
        let answer = move |r: Result<usize, Errno>| {
            if let Some(reply) = late.lock().take() {
                reply.send(r.map(|n| n as u32));
            }
        };
        let len = len.min(u32::MAX as usize / 2);
        match self.engine.copy(&src, from.1, &dst, to.1, len, caller.uid != 0, answer) {
            Access::Done(Ok(())) => {}
            Access::Done(Err(e)) => {
                if let Some(reply) = slot.lock().take() {
                    reply.send(Err(e));
                }
            }
            Access::Wait => {
                let me = self.clone();
                self.engine.park(
                    &dst.file,
                    Box::new(move || {
                        if let Some(reply) = slot.lock().take() {
                            me.copy(caller, from, to, len, reply);
                        }
                    }),
                );
            }
        }
    }

    pub(super) fn reap_if_forgotten(&self, node: u64) {
        if self.table.get(node).is_some_and(|n| super::inode::Table::uncount(&n, 0)) {
            self.reap(node);
        }
    }
}

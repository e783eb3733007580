//! From the bytes of a request to a call of the operation core, and from its result to the bytes of the answer.
//!
//! Does no I/O: a request comes as a [`Request`], and what is not answered at once goes out through a [`Line`]. A panic
//! in a call is that call's failure; its program gets EIO.

use std::cell::Cell;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Stat;
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::abi::{self, InHeader, fattr, op};
use super::mounting::Access;
use crate::fs::{Attr, Caller, DirEntry, Entry, Fs, Opened, Reply, SetAttr, SetTime};

/// A request of the kernel.
#[derive(Debug)]
pub struct Request<'a> {
    /// Its header.
    pub header: InHeader,
    /// The first argument.
    pub argument: &'a [u8],
    /// What follows it, `len` bytes; the answer's data is put over it.
    pub payload: &'a mut [u8],
    /// See above.
    pub len: usize,
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Served {
    /// It is answered: that many bytes of the payload, or an error.
    Now(Result<usize, Errno>),
    /// It is answered through [`Post`], perhaps by another thread, perhaps already.
    Later,
    /// The kernel waits for no answer.
    Silent,
}

/// Takes answers that are not given at once.
pub trait Post: Send + Sync {
    /// Answers the request that `tag` stands for.
    fn post(&self, tag: u64, answer: Result<Body, Errno>);
}

/// Longest answer of fixed size that can be given later: that of CREATE.
const BODY_MAX: usize = size_of::<abi::EntryOut>() + size_of::<abi::OpenOut>();

/// The data of an answer that is given later.
#[derive(Debug, Clone)]
pub enum Body {
    /// Structures of the protocol.
    Fixed(Fixed),
    /// What was read.
    Content(Vec<u8>),
}

/// Structures of the protocol, one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Fixed {
    bytes: [u8; BODY_MAX],
    len: usize,
}

impl Body {
    const EMPTY: Fixed = Fixed { bytes: [0; BODY_MAX], len: 0 };

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Fixed(f) => &f.bytes[..f.len],
            Self::Content(c) => c,
        }
    }
}

impl Fixed {
    fn and(mut self, part: &(impl IntoBytes + Immutable)) -> Self {
        let part = part.as_bytes();
        self.bytes[self.len..self.len + part.len()].copy_from_slice(part);
        self.len += part.len();
        self
    }
}

impl From<Fixed> for Body {
    fn from(f: Fixed) -> Self {
        Self::Fixed(f)
    }
}

/// How one request is answered later.
pub struct Line<'a> {
    post: &'a Arc<dyn Post>,
    tag: u64,
    taken: Cell<bool>,
}

impl<'a> Line<'a> {
    /// Answers go to `post`, with `tag`.
    pub fn new(post: &'a Arc<dyn Post>, tag: u64) -> Self {
        Self { post, tag, taken: Cell::new(false) }
    }

    /// From here on the [`Reply`] answers, with EIO should it be dropped.
    fn reply<T: 'static, B: Into<Body>>(&self, encode: impl FnOnce(T) -> B + Send + 'static) -> Reply<T> {
        let (post, tag) = (self.post.clone(), self.tag);
        let reply = Reply::new(move |r: Result<T, Errno>| post.post(tag, r.map(|t| encode(t).into())));
        self.taken.set(true);
        reply
    }
}

/// Who may ask, where the kernel does not know it: `allow_root`.
#[derive(Debug, Clone, Copy)]
pub struct Guard {
    /// Who may enter the mount.
    pub access: Access,
    /// The user who mounted.
    pub owner: u32,
}

impl Guard {
    /// The kernel sends some requests on nobody's behalf; what they concern was opened by somebody who may.
    fn admits(&self, h: &InHeader) -> bool {
        let may = match self.access {
            Access::All => true,
            Access::RootAndOwner => h.uid == 0 || h.uid == self.owner,
            Access::Owner => h.uid == self.owner,
        };
        may || matches!(h.opcode, op::READ | op::WRITE | op::READDIR | op::READDIRPLUS | op::FSYNC | op::FSYNCDIR)
            || matches!(h.opcode, op::RELEASE | op::RELEASEDIR | op::FORGET | op::BATCH_FORGET | op::DESTROY)
    }
}

/// Serves one request.
pub fn serve(fs: &Arc<Fs>, guard: Guard, request: &mut Request<'_>, line: &Line<'_>) -> Served {
    let h = request.header;
    if !guard.admits(&h) {
        return Served::Now(Err(Errno::ACCESS));
    }
    let silent = matches!(h.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT);
    let served = catch_unwind(AssertUnwindSafe(|| Call { fs, r: request, line }.run()));
    match served {
        _ if silent => Served::Silent,
        Ok(Ok(served)) => served,
        Ok(Err(e)) => Served::Now(Err(e)),
        Err(_) => {
            // The reply that the panic dropped has answered.
            let answered = line.taken.get();
            tracing::error!(opcode = h.opcode, node = h.nodeid, "a request made the daemon panic; it was answered EIO");
            if answered { Served::Later } else { Served::Now(Err(Errno::IO)) }
        }
    }
}

struct Call<'a, 'b> {
    fs: &'a Arc<Fs>,
    r: &'a mut Request<'b>,
    line: &'a Line<'a>,
}

type Answer = Result<Served, Errno>;

impl Call<'_, '_> {
    fn run(mut self) -> Answer {
        match self.r.header.opcode {
            op::LOOKUP => self.lookup(),
            op::FORGET | op::BATCH_FORGET => self.forget(),
            op::INTERRUPT => Ok(Served::Silent),
            op::DESTROY => Ok(Served::Now(Ok(0))),
            op::GETATTR => self.getattr(),
            op::SETATTR => self.setattr(),
            op::READLINK => self.readlink(),
            op::MKNOD | op::MKDIR | op::SYMLINK | op::LINK => self.make(),
            op::UNLINK | op::RMDIR => self.remove(),
            op::RENAME | op::RENAME2 => self.rename(),
            op::OPEN | op::CREATE | op::OPENDIR => self.open(),
            op::READ => self.read(),
            op::WRITE => self.write(),
            op::FLUSH | op::FSYNC | op::FSYNCDIR => self.sync(),
            op::RELEASE | op::RELEASEDIR => self.release(),
            op::READDIR | op::READDIRPLUS => self.readdir(),
            op::STATFS => self.statfs(),
            op::SETXATTR | op::REMOVEXATTR => self.change_xattr(),
            op::GETXATTR | op::LISTXATTR => self.read_xattr(),
            op::IOCTL => self.ioctl(),
            op::FALLOCATE => self.fallocate(),
            op::LSEEK => self.lseek(),
            op::COPY_FILE_RANGE | op::COPY_FILE_RANGE_64 => self.copy(),
            _ => Err(Errno::NOSYS),
        }
    }

    /// The first argument.
    fn arg<T: FromBytes + Immutable>(&self) -> Result<T, Errno> {
        T::read_from_prefix(self.r.argument).map(|(t, _)| t).map_err(|_| Errno::INVAL)
    }

    fn node(&self) -> u64 {
        self.r.header.nodeid
    }

    fn caller(&self, umask: u32) -> Caller {
        let h = &self.r.header;
        Caller { uid: h.uid, gid: h.gid, pid: h.pid, umask }
    }

    /// What follows the first argument, without extensions.
    fn data(&self) -> Result<&[u8], Errno> {
        let end = self.r.len.checked_sub(usize::from(self.r.header.total_extlen) * 8).ok_or(Errno::INVAL)?;
        self.r.payload.get(..end).ok_or(Errno::INVAL)
    }

    /// The name, or target of a symbolic link, at the beginning of `from`, and what follows its NUL.
    fn name(from: &[u8]) -> Result<(&OsStr, &[u8]), Errno> {
        let end = from.iter().position(|b| *b == 0).ok_or(Errno::INVAL)?;
        if end == 0 { Err(Errno::INVAL) } else { Ok((OsStr::from_bytes(&from[..end]), &from[end + 1..])) }
    }

    fn put(&mut self, value: &(impl IntoBytes + Immutable)) -> Answer {
        self.put_bytes(value.as_bytes())
    }

    fn put_bytes(&mut self, bytes: &[u8]) -> Answer {
        self.r.payload.get_mut(..bytes.len()).ok_or(Errno::RANGE)?.copy_from_slice(bytes);
        Ok(Served::Now(Ok(bytes.len())))
    }

    fn empty(&self) -> Reply<()> {
        self.line.reply(|()| Body::EMPTY)
    }

    fn entry(&self) -> Reply<Entry> {
        self.line.reply(|e| Body::EMPTY.and(&entry_out(&e)))
    }

    fn lookup(&mut self) -> Answer {
        let (name, _) = Self::name(self.data()?)?;
        let entry = self.fs.lookup(self.node(), name)?;
        self.put(&entry_out(&entry))
    }

    fn forget(&mut self) -> Answer {
        if self.r.header.opcode == op::FORGET {
            self.fs.forget(self.node(), self.arg::<abi::ForgetIn>()?.nlookup);
            return Ok(Served::Silent);
        }
        let count = self.arg::<abi::BatchForgetIn>()?.count as usize;
        let mut rest = self.data()?;
        for _ in 0..count {
            let (one, after) = abi::ForgetOne::read_from_prefix(rest).map_err(|_| Errno::INVAL)?;
            self.fs.forget(one.nodeid, one.nlookup);
            rest = after;
        }
        Ok(Served::Silent)
    }

    fn getattr(&mut self) -> Answer {
        let attr = self.fs.getattr(self.node())?;
        self.put(&attr_out(&attr))
    }

    fn setattr(&mut self) -> Answer {
        let a: abi::SetattrIn = self.arg()?;
        let given = |bit: u32| a.valid & bit != 0;
        let time = |set: u32, now: u32, secs: u64, nanos: u32| {
            given(set).then_some(if given(now) { SetTime::Now } else { SetTime::At(secs as i64, nanos) })
        };
        let set = SetAttr {
            mode: given(fattr::MODE).then_some(a.mode),
            uid: given(fattr::UID).then_some(a.uid),
            gid: given(fattr::GID).then_some(a.gid),
            size: given(fattr::SIZE).then_some(a.size),
            atime: time(fattr::ATIME, fattr::ATIME_NOW, a.atime, a.atimensec),
            mtime: time(fattr::MTIME, fattr::MTIME_NOW, a.mtime, a.mtimensec),
        };
        let reply = self.line.reply(|attr| Body::EMPTY.and(&attr_out(&attr)));
        self.fs.setattr(self.caller(0), self.node(), given(fattr::FH).then_some(a.fh), set, reply);
        Ok(Served::Later)
    }

    fn readlink(&mut self) -> Answer {
        let target = self.fs.readlink(self.node())?;
        self.put_bytes(&target)
    }

    fn make(&mut self) -> Answer {
        let (name, rest) = Self::name(self.data()?)?;
        let (fs, node) = (self.fs, self.node());
        match self.r.header.opcode {
            op::MKNOD => {
                let a: abi::MknodIn = self.arg()?;
                fs.mknod(self.caller(a.umask), node, name, a.mode, decode_dev(a.rdev), self.entry());
            }
            op::MKDIR => {
                let a: abi::MkdirIn = self.arg()?;
                fs.mkdir(self.caller(a.umask), node, name, a.mode, self.entry());
            }
            op::SYMLINK => fs.symlink(self.caller(0), node, name, Self::name(rest)?.0, self.entry()),
            _ => fs.link(self.arg::<abi::LinkIn>()?.oldnodeid, node, name, self.entry()),
        }
        Ok(Served::Later)
    }

    fn remove(&mut self) -> Answer {
        let (name, _) = Self::name(self.data()?)?;
        match self.r.header.opcode {
            op::UNLINK => self.fs.unlink(self.node(), name, self.empty()),
            _ => self.fs.rmdir(self.node(), name, self.empty()),
        }
        Ok(Served::Later)
    }

    fn rename(&mut self) -> Answer {
        let (newdir, flags) = match self.r.header.opcode {
            op::RENAME => (self.arg::<abi::RenameIn>()?.newdir, 0),
            _ => self.arg::<abi::Rename2In>().map(|a| (a.newdir, a.flags))?,
        };
        let (name, rest) = Self::name(self.data()?)?;
        let (new_name, _) = Self::name(rest)?;
        self.fs.rename(self.node(), name, newdir, new_name, flags, self.empty());
        Ok(Served::Later)
    }

    fn open(&mut self) -> Answer {
        match self.r.header.opcode {
            op::OPENDIR => {
                let opened = self.fs.opendir(self.node())?;
                return self.put(&open_out(&opened));
            }
            op::OPEN => {
                let a: abi::OpenIn = self.arg()?;
                let reply = self.line.reply(|o| Body::EMPTY.and(&open_out(&o)));
                self.fs.open(self.caller(0), self.node(), a.flags as i32, reply);
            }
            _ => {
                let a: abi::CreateIn = self.arg()?;
                let (name, _) = Self::name(self.data()?)?;
                let reply = self.line.reply(|(e, o)| Body::EMPTY.and(&entry_out(&e)).and(&open_out(&o)));
                self.fs.create(self.caller(a.umask), self.node(), name, a.mode, a.flags as i32, reply);
            }
        }
        Ok(Served::Later)
    }

    fn read(&mut self) -> Answer {
        let a: abi::ReadIn = self.arg()?;
        let room = self.r.payload.len().min(a.size as usize);
        if let Some(n) = self.fs.read_cached(a.fh, a.offset, &mut self.r.payload[..room])? {
            return Ok(Served::Now(Ok(n)));
        }
        self.fs.read_later(a.fh, a.offset, room, self.line.reply(Body::Content));
        Ok(Served::Later)
    }

    fn write(&mut self) -> Answer {
        let a: abi::WriteIn = self.arg()?;
        let data = self.data()?.get(..a.size as usize).ok_or(Errno::INVAL)?;
        let tid = if a.write_flags & abi::WRITE_CACHE != 0 { 0 } else { self.r.header.pid };
        let kill = a.write_flags & abi::WRITE_KILL_SUIDGID != 0;
        let reply = self.line.reply(|n| Body::EMPTY.and(&abi::WriteOut { size: n, padding: 0 }));
        self.fs.write(tid, a.fh, a.offset, data, kill, reply);
        Ok(Served::Later)
    }

    fn sync(&mut self) -> Answer {
        match self.r.header.opcode {
            op::FLUSH => self.fs.flush(self.r.header.pid, self.arg::<abi::FlushIn>()?.fh, self.empty()),
            op::FSYNC => {
                let a: abi::FsyncIn = self.arg()?;
                self.fs.fsync(self.r.header.pid, a.fh, a.fsync_flags & abi::FSYNC_FDATASYNC != 0, self.empty());
            }
            _ => self.fs.fsyncdir(self.r.header.pid, self.node(), self.empty()),
        }
        Ok(Served::Later)
    }

    fn release(&mut self) -> Answer {
        let fh = self.arg::<abi::ReleaseIn>()?.fh;
        match self.r.header.opcode {
            op::RELEASE => self.fs.release(self.node(), fh),
            _ => self.fs.releasedir(fh),
        }
        Ok(Served::Now(Ok(0)))
    }

    fn readdir(&mut self) -> Answer {
        let a: abi::ReadIn = self.arg()?;
        let plus = self.r.header.opcode == op::READDIRPLUS;
        let room = self.r.payload.len().min(a.size as usize);
        let mut list = Listing { room: &mut self.r.payload[..room], len: 0 };
        match self.fs.readdir(a.fh, a.offset, plus, &mut |e| list.add(e, plus)) {
            Err(e) if list.len == 0 => Err(e),
            // What was listed stands, and with `plus` is counted; the error comes again where the listing goes on.
            _ => Ok(Served::Now(Ok(list.len))),
        }
    }

    fn statfs(&mut self) -> Answer {
        let s = self.fs.statfs(self.node())?;
        self.put(&abi::StatfsOut {
            blocks: s.f_blocks,
            bfree: s.f_bfree,
            bavail: s.f_bavail,
            files: s.f_files,
            ffree: s.f_ffree,
            bsize: s.f_bsize as u32,
            namelen: s.f_namemax as u32,
            frsize: s.f_frsize as u32,
            ..Default::default()
        })
    }

    fn change_xattr(&mut self) -> Answer {
        let (name, rest) = Self::name(self.data()?)?;
        if self.r.header.opcode == op::REMOVEXATTR {
            self.fs.removexattr(self.node(), name, self.empty());
        } else {
            let a: abi::SetxattrIn = self.arg()?;
            let value = rest.get(..a.size as usize).ok_or(Errno::INVAL)?;
            self.fs.setxattr(self.caller(0), self.node(), name, value, a.flags as i32, self.empty());
        }
        Ok(Served::Later)
    }

    /// The value or only its size, as getxattr(2) and listxattr(2) are asked.
    fn read_xattr(&mut self) -> Answer {
        let size = self.arg::<abi::GetxattrIn>()?.size as usize;
        let value = match self.r.header.opcode {
            op::GETXATTR => self.fs.getxattr(self.node(), Self::name(self.data()?)?.0)?,
            _ => self.fs.listxattr(self.caller(0), self.node())?,
        };
        match size {
            0 => self.put(&abi::GetxattrOut { size: value.len() as u32, padding: 0 }),
            n if value.len() > n => Err(Errno::RANGE),
            _ => self.put_bytes(&value),
        }
    }

    fn ioctl(&mut self) -> Answer {
        let a: abi::IoctlIn = self.arg()?;
        let input = self.data()?.get(..a.in_size as usize).ok_or(Errno::INVAL)?;
        let (result, data) = self.fs.ioctl(self.node(), a.cmd, input, a.out_size as usize)?;
        let head = abi::IoctlOut { result, ..Default::default() };
        self.put_bytes(&[head.as_bytes(), &data].concat())
    }

    fn fallocate(&mut self) -> Answer {
        let a: abi::FallocateIn = self.arg()?;
        self.fs.fallocate(self.caller(0), a.fh, a.offset, a.length, a.mode as i32, self.empty());
        Ok(Served::Later)
    }

    fn lseek(&mut self) -> Answer {
        let a: abi::LseekIn = self.arg()?;
        let at = self.fs.lseek(a.fh, a.offset as i64, a.whence as i32)?;
        self.put(&abi::LseekOut { offset: at as u64 })
    }

    fn copy(&mut self) -> Answer {
        let a: abi::CopyFileRangeIn = self.arg()?;
        let wide = self.r.header.opcode == op::COPY_FILE_RANGE_64;
        let reply = self.line.reply(move |n: u32| match wide {
            true => Body::EMPTY.and(&abi::CopyFileRangeOut { bytes_copied: n.into() }),
            false => Body::EMPTY.and(&abi::WriteOut { size: n, padding: 0 }),
        });
        let len = usize::try_from(a.len).unwrap_or(usize::MAX);
        self.fs.copy(self.caller(0), (a.fh_in, a.off_in), (a.fh_out, a.off_out), len, reply);
        Ok(Served::Later)
    }
}

/// The answer to READDIR or READDIRPLUS while it is filled.
struct Listing<'a> {
    room: &'a mut [u8],
    len: usize,
}

impl Listing<'_> {
    /// False when there is no room.
    fn add(&mut self, e: &DirEntry<'_>, plus: bool) -> bool {
        let name = e.name.as_bytes();
        let kind = (e.kind.as_raw_mode() & libc::S_IFMT) >> 12;
        let record = abi::Dirent { ino: e.ino, off: e.next, namelen: name.len() as u32, kind };
        // Number 0 of a node tells the kernel not to link it: `.`, `..` and what could not be looked up.
        let entry = e.entry.as_ref().map_or_else(Default::default, entry_out);
        let head = if plus { entry.as_bytes() } else { &[] };
        let size = (head.len() + size_of::<abi::Dirent>() + name.len()).next_multiple_of(8);
        let Some(place) = self.room.get_mut(self.len..self.len + size) else { return false };
        let mut at = 0;
        for part in [head, record.as_bytes(), name] {
            place[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        place[at..].fill(0);
        self.len += size;
        true
    }
}

fn ttl(d: Duration) -> (u64, u32) {
    (d.as_secs(), d.subsec_nanos())
}

/// Attributes with the number that programs see.
fn attr(ino: u64, st: &Stat) -> abi::Attr {
    abi::Attr {
        ino,
        size: st.st_size as u64,
        blocks: st.st_blocks as u64,
        atime: st.st_atime as u64,
        mtime: st.st_mtime as u64,
        ctime: st.st_ctime as u64,
        atimensec: st.st_atime_nsec as u32,
        mtimensec: st.st_mtime_nsec as u32,
        ctimensec: st.st_ctime_nsec as u32,
        mode: st.st_mode,
        nlink: st.st_nlink as u32,
        uid: st.st_uid,
        gid: st.st_gid,
        rdev: encode_dev(st.st_rdev),
        blksize: st.st_blksize as u32,
        flags: 0,
    }
}

fn attr_out(a: &Attr) -> abi::AttrOut {
    let (attr_valid, attr_valid_nsec) = ttl(a.ttl);
    abi::AttrOut { attr_valid, attr_valid_nsec, dummy: 0, attr: attr(a.ino, &a.stat) }
}

fn entry_out(e: &Entry) -> abi::EntryOut {
    let ((entry_valid, entry_valid_nsec), (attr_valid, attr_valid_nsec)) = (ttl(e.ttl), ttl(e.attr.ttl));
    abi::EntryOut {
        nodeid: e.node,
        generation: 0,
        entry_valid,
        attr_valid,
        entry_valid_nsec,
        attr_valid_nsec,
        attr: attr(e.node, &e.attr.stat),
    }
}

/// The answer to OPEN, OPENDIR, and the second half of that to CREATE.
fn open_out(o: &Opened) -> abi::OpenOut {
    abi::OpenOut { fh: o.fh, open_flags: o.flags(), backing_id: o.backing().map_or(0, std::num::NonZero::get) }
}

/// The protocol has 32 bits for a device: major in 12 of them, minor in 20 (`new_encode_dev` of linux/kdev_t.h).
pub fn encode_dev(dev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// `new_decode_dev` of linux/kdev_t.h.
pub fn decode_dev(dev: u32) -> u64 {
    rustix::fs::makedev((dev & 0xf_ff00) >> 8, (dev & 0xff) | ((dev >> 12) & 0xf_ff00))
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;

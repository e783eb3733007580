//! Requests as bytes in, answers as bytes out, over a directory in memory.

use std::ffi::OsString;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::*;
use crate::backend::{Backing, Call as BackingCall, Gate, Verdict};
use crate::config::Config;
use crate::engine::Engine;
use crate::engine::layout::Layout;
use crate::fs::ROOT;

const ME: u32 = 0;

struct Rig {
    fs: Arc<Fs>,
    post: Arc<dyn Post>,
    answers: Receiver<(u64, Result<Body, Errno>)>,
    dir: tempfile::TempDir,
    _layout: Layout,
}

struct Chan(Sender<(u64, Result<Body, Errno>)>);

impl Post for Chan {
    fn post(&self, tag: u64, answer: Result<Body, Errno>) {
        self.0.send((tag, answer)).unwrap();
    }
}

fn rig() -> Rig {
    rig_with(None)
}

fn rig_with(gate: Option<Arc<dyn Gate>>) -> Rig {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let layout = Layout::open(dir.path()).unwrap();
    let own = |fd: BorrowedFd<'_>| -> OwnedFd { fd.try_clone_to_owned().unwrap() };
    let backing = Backing::open(own(layout.root()), own(layout.staging()), own(layout.failed()), gate).unwrap();
    let fs = Fs::new(Engine::start(backing, Config::default()).unwrap()).unwrap();
    let (tx, answers) = channel();
    Rig { fs, post: Arc::new(Chan(tx)), answers, dir, _layout: layout }
}

/// The message as the kernel writes it.
fn message(opcode: u32, nodeid: u64, argument: &[u8], rest: &[u8]) -> (InHeader, Vec<u8>) {
    let bytes = [argument, rest].concat();
    let len = (size_of::<InHeader>() + bytes.len()) as u32;
    (InHeader { len, opcode, unique: 9, nodeid, uid: ME, gid: 0, pid: 1, total_extlen: 0, padding: 0 }, bytes)
}

impl Rig {
    fn ask(&self, opcode: u32, nodeid: u64, argument: &impl Bytes, rest: &[u8]) -> Result<Vec<u8>, Errno> {
        let (header, bytes) = message(opcode, nodeid, argument.bytes(), rest);
        self.ask_raw(header, &bytes)
    }

    fn ask_raw(&self, header: InHeader, bytes: &[u8]) -> Result<Vec<u8>, Errno> {
        let guard = Guard { access: Access::RootAndOwner, owner: 1000 };
        let (argument, rest) = bytes.split_at(abi::argument_size(header.opcode).unwrap_or(0).min(bytes.len()));
        let mut payload = vec![0xaa; 1 << 16];
        payload[..rest.len()].copy_from_slice(rest);
        let mut request = Request { header, argument, payload: &mut payload, len: rest.len() };
        match serve(&self.fs, guard, &mut request, &Line::new(&self.post, 77)) {
            Served::Now(r) => r.map(|n| payload[..n].to_vec()),
            Served::Silent => Ok(Vec::new()),
            Served::Later => {
                let (tag, answer) = self.answers.recv_timeout(Duration::from_secs(60)).unwrap();
                assert_eq!(tag, 77);
                answer.map(|b| b.bytes().to_vec())
            }
        }
    }

    fn create(&self, name: &str) -> (abi::EntryOut, abi::OpenOut) {
        let flags = (libc::O_RDWR | libc::O_CREAT) as u32;
        let a = abi::CreateIn { flags, mode: 0o100_644, umask: 0o022, open_flags: 0 };
        let bytes = self.ask(op::CREATE, ROOT, &a, &z(name)).unwrap();
        assert_eq!(bytes.len(), 144);
        (get(&bytes), get(&bytes[128..]))
    }

    fn write(&self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        let a = abi::WriteIn { fh, offset, size: data.len() as u32, ..Default::default() };
        self.ask(op::WRITE, node, &a, data).map(|b| get::<abi::WriteOut>(&b).size)
    }
}

trait Bytes {
    fn bytes(&self) -> &[u8];
}
impl<T: IntoBytes + Immutable> Bytes for T {
    fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }
}
const NONE: [u8; 0] = [];

fn z(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn get<T: FromBytes>(bytes: &[u8]) -> T {
    T::read_from_prefix(bytes).map(|(t, _)| t).expect("long enough")
}

#[test]
fn a_file_is_made_written_closed_and_read() {
    let r = rig();
    let (entry, open) = r.create("a");
    assert_eq!((entry.attr.mode, entry.attr.ino), (0o100_644, entry.nodeid));
    assert_eq!(r.write(entry.nodeid, open.fh, 0, b"hello").unwrap(), 5);
    let flush = abi::FlushIn { fh: open.fh, ..Default::default() };
    assert!(r.ask(op::FLUSH, entry.nodeid, &flush, &[]).unwrap().is_empty());
    assert_eq!(std::fs::read(r.dir.path().join("a")).unwrap(), b"hello", "close is a commit");
    let read = abi::ReadIn { fh: open.fh, offset: 1, size: 100, ..Default::default() };
    assert_eq!(r.ask(op::READ, entry.nodeid, &read, &[]).unwrap(), b"ello");
    let seek = abi::LseekIn { fh: open.fh, offset: 0, whence: libc::SEEK_HOLE as u32, padding: 0 };
    assert_eq!(get::<abi::LseekOut>(&r.ask(op::LSEEK, entry.nodeid, &seek, &[]).unwrap()).offset, 5);
    let release = abi::ReleaseIn { fh: open.fh, ..Default::default() };
    r.ask(op::RELEASE, entry.nodeid, &release, &[]).unwrap();
    assert_eq!(r.ask(op::READ, entry.nodeid, &read, &[]).unwrap_err(), Errno::BADF);
}

#[test]
fn names() {
    let r = rig();
    let made = r.ask(op::MKDIR, ROOT, &abi::MkdirIn { mode: 0o755, umask: 0 }, &z("d")).unwrap();
    let dir: abi::EntryOut = get(&made);
    assert_eq!(dir.attr.mode & libc::S_IFMT, libc::S_IFDIR);
    let link = r.ask(op::SYMLINK, ROOT, &NONE, &[z("l"), z("to/where")].concat()).unwrap();
    assert_eq!(r.ask(op::READLINK, get::<abi::EntryOut>(&link).nodeid, &NONE, &[]).unwrap(), b"to/where");
    let rdev = encode_dev(rustix::fs::makedev(7, 300));
    let node = abi::MknodIn { mode: libc::S_IFBLK | 0o600, rdev, umask: 0, padding: 0 };
    if rustix::process::geteuid().is_root() {
        let e: abi::EntryOut = get(&r.ask(op::MKNOD, ROOT, &node, &z("b")).unwrap());
        assert_eq!(e.attr.rdev, rdev);
    }
    let to = abi::Rename2In { newdir: dir.nodeid, flags: 1, padding: 0 };
    r.ask(op::RENAME2, ROOT, &to, &[z("l"), z("m")].concat()).unwrap();
    let e: abi::EntryOut = get(&r.ask(op::LOOKUP, dir.nodeid, &NONE, &[&z("m")[..], &[0]].concat()).unwrap());
    assert_eq!(e.attr.size, 8);
    // The kernel may keep that there is no such name: node 0.
    assert_eq!(get::<abi::EntryOut>(&r.ask(op::LOOKUP, ROOT, &NONE, &z("l")).unwrap()).nodeid, 0);
    let back = abi::RenameIn { newdir: ROOT };
    r.ask(op::RENAME, dir.nodeid, &back, &[z("m"), z("l")].concat()).unwrap();
    assert_eq!(r.ask(op::UNLINK, ROOT, &NONE, &z("d")).unwrap_err(), Errno::ISDIR);
    r.ask(op::RMDIR, ROOT, &NONE, &z("d")).unwrap();
    r.ask(op::UNLINK, ROOT, &NONE, &z("l")).unwrap();
    let (a, _) = r.create("a");
    let linked: abi::EntryOut = get(&r.ask(op::LINK, ROOT, &abi::LinkIn { oldnodeid: a.nodeid }, &z("hard")).unwrap());
    assert_eq!((linked.nodeid, linked.attr.nlink), (a.nodeid, 2));
    r.ask(op::FORGET, a.nodeid, &abi::ForgetIn { nlookup: 1 }, &[]).unwrap();
    let one = abi::ForgetOne { nodeid: a.nodeid, nlookup: 1 };
    r.ask(op::BATCH_FORGET, 0, &abi::BatchForgetIn { count: 1, dummy: 0 }, one.as_bytes()).unwrap();
}

#[test]
fn attributes() {
    let r = rig();
    let (e, _) = r.create("a");
    let set = abi::SetattrIn {
        valid: fattr::MODE | fattr::SIZE | fattr::ATIME | fattr::MTIME | fattr::MTIME_NOW,
        mode: 0o600,
        size: 1 << 20,
        atime: -2_i64 as u64,
        atimensec: 500_000_000,
        ..Default::default()
    };
    let out: abi::AttrOut = get(&r.ask(op::SETATTR, e.nodeid, &set, &[]).unwrap());
    assert_eq!((out.attr.mode, out.attr.size), (0o100_600, 1 << 20));
    assert_eq!((out.attr.atime as i64, out.attr.atimensec), (-2, 500_000_000), "before 1970");
    assert!(out.attr.mtime > 1_600_000_000);
    let again: abi::AttrOut = get(&r.ask(op::GETATTR, e.nodeid, &abi::GetattrIn::default(), &[]).unwrap());
    assert_eq!(again, out);
    let st: abi::StatfsOut = get(&r.ask(op::STATFS, ROOT, &NONE, &[]).unwrap());
    assert!(st.blocks > 0 && st.namelen == 255);
}

#[test]
fn extended_attributes_and_their_sizes() {
    let r = rig();
    let (e, _) = r.create("a");
    let set = abi::SetxattrIn { size: 3, flags: 0 };
    r.ask(op::SETXATTR, e.nodeid, &set, &[&z("user.k")[..], b"xyz"].concat()).unwrap();
    let read = |size, opcode, rest: &[u8]| r.ask(opcode, e.nodeid, &abi::GetxattrIn { size, padding: 0 }, rest);
    assert_eq!(read(3, op::GETXATTR, &z("user.k")).unwrap(), b"xyz");
    assert_eq!(get::<abi::GetxattrOut>(&read(0, op::GETXATTR, &z("user.k")).unwrap()).size, 3);
    assert_eq!(read(2, op::GETXATTR, &z("user.k")).unwrap_err(), Errno::RANGE);
    assert_eq!(read(100, op::LISTXATTR, &[]).unwrap(), z("user.k"));
    r.ask(op::REMOVEXATTR, e.nodeid, &NONE, &z("user.k")).unwrap();
    assert_eq!(read(3, op::GETXATTR, &z("user.k")).unwrap_err(), Errno::NODATA);
}

/// Names of a listing, each with its type and, with `plus`, node.
fn entries(bytes: &[u8], plus: bool) -> Vec<(OsString, u32, u64, u64)> {
    let (mut at, mut all) = (0, Vec::new());
    while at < bytes.len() {
        let node = if plus { get::<abi::EntryOut>(&bytes[at..]).nodeid } else { 0 };
        let head = at + if plus { 128 } else { 0 };
        let d: abi::Dirent = get(&bytes[head..]);
        let name = &bytes[head + 24..head + 24 + d.namelen as usize];
        all.push((OsStr::from_bytes(name).to_owned(), d.kind, node, d.off));
        at = (head + 24 + name.len()).next_multiple_of(8);
    }
    all
}

#[test]
fn directories() {
    let r = rig();
    let (file, _) = r.create("a-name");
    r.ask(op::MKDIR, ROOT, &abi::MkdirIn { mode: 0o755, umask: 0 }, &z("d")).unwrap();
    let open: abi::OpenOut = get(&r.ask(op::OPENDIR, ROOT, &abi::OpenIn::default(), &[]).unwrap());
    let list = |opcode, offset, size| {
        let a = abi::ReadIn { fh: open.fh, offset, size, ..Default::default() };
        r.ask(opcode, ROOT, &a, &[]).unwrap()
    };
    let mut all = entries(&list(op::READDIR, 0, 4096), false);
    all.sort();
    let shown: Vec<_> = all.iter().map(|e| (e.0.to_str().unwrap(), e.1)).collect();
    let (dir, reg) = (u32::from(libc::DT_DIR), u32::from(libc::DT_REG));
    assert_eq!(shown, [(".", dir), ("..", dir), ("a-name", reg), ("d", dir)]);
    for e in entries(&list(op::READDIRPLUS, 0, 4096), true) {
        let dots = e.0 == "." || e.0 == "..";
        assert_eq!(e.2 == 0, dots, "{e:?}");
        assert!(e.0 != "a-name" || e.2 == file.nodeid);
    }
    // In pieces with room for one name, from where the last ended.
    let (mut at, mut names) = (0, Vec::new());
    loop {
        let one = entries(&list(op::READDIR, at, 32), false);
        let [(name, _, _, next)] = &one[..] else { break };
        names.push(name.clone());
        at = *next;
    }
    names.sort();
    assert_eq!(names, [".", "..", "a-name", "d"]);
    r.ask(op::FSYNCDIR, ROOT, &abi::FsyncIn::default(), &[]).unwrap();
    r.ask(op::RELEASEDIR, ROOT, &abi::ReleaseIn { fh: open.fh, ..Default::default() }, &[]).unwrap();
}

#[test]
fn ranges() {
    let r = rig();
    let ((a, fa), (b, fb)) = (r.create("a"), r.create("b"));
    r.write(a.nodeid, fa.fh, 0, b"0123456789").unwrap();
    let copy = |len| abi::CopyFileRangeIn {
        fh_in: fa.fh,
        off_in: 2,
        nodeid_out: b.nodeid,
        fh_out: fb.fh,
        off_out: 0,
        len,
        flags: 0,
    };
    assert_eq!(get::<abi::WriteOut>(&r.ask(op::COPY_FILE_RANGE, a.nodeid, &copy(3), &[]).unwrap()).size, 3);
    let wide = r.ask(op::COPY_FILE_RANGE_64, a.nodeid, &copy(5), &[]).unwrap();
    assert_eq!((wide.len(), get::<abi::CopyFileRangeOut>(&wide).bytes_copied), (8, 5));
    let more = abi::FallocateIn { fh: fb.fh, offset: 0, length: 4096, mode: 0, padding: 0 };
    r.ask(op::FALLOCATE, b.nodeid, &more, &[]).unwrap();
    let out: abi::AttrOut = get(&r.ask(op::GETATTR, b.nodeid, &abi::GetattrIn::default(), &[]).unwrap());
    assert_eq!(out.attr.size, 4096);
    let sync = abi::FsyncIn { fh: fb.fh, fsync_flags: abi::FSYNC_FDATASYNC, padding: 0 };
    r.ask(op::FSYNC, b.nodeid, &sync, &[]).unwrap();
    assert_eq!(&std::fs::read(r.dir.path().join("b")).unwrap()[..6], b"23456\0");
}

/// No input makes the daemon panic: every prefix of every message, and messages of noise.
#[test]
fn cut_and_random_messages_are_refused() {
    let r = rig();
    let (e, _) = r.create("a");
    fastrand::seed(1);
    for opcode in (0..60).chain([4096, u32::MAX]) {
        for round in 0..200 {
            let n = fastrand::usize(..200);
            let mut bytes: Vec<u8> = (0..n).map(|_| fastrand::u8(..)).collect();
            if round % 2 == 0 {
                // Numbers of descriptors and nodes that exist, so that more is reached.
                bytes.iter_mut().step_by(3).for_each(|b| *b = 0);
            }
            let node = [ROOT, e.nodeid, fastrand::u64(..)][round % 3];
            let (mut header, bytes) = message(opcode, node, &[], &bytes);
            header.total_extlen = [0, 0, fastrand::u16(..)][round % 3];
            if matches!(opcode, op::FORGET | op::BATCH_FORGET | op::FALLOCATE | op::SETATTR) {
                // Would drop the node that the others need, or fill the memory of this machine.
                continue;
            }
            drop(r.ask_raw(header, &bytes));
        }
    }
    // Not refused because everything is.
    r.ask(op::GETATTR, e.nodeid, &abi::GetattrIn::default(), &[]).unwrap();
    assert_eq!(r.ask(op::LOOKUP, ROOT, &NONE, b"no end").unwrap_err(), Errno::INVAL);
    assert_eq!(r.ask(op::LOOKUP, ROOT, &NONE, &[0]).unwrap_err(), Errno::INVAL);
    assert_eq!(r.write(e.nodeid, 12345, 0, b"x").unwrap_err(), Errno::BADF);
    assert_eq!(r.ask(53_000, ROOT, &NONE, &[]).unwrap_err(), Errno::NOSYS);
}

#[test]
fn extensions_are_no_data() {
    let r = rig();
    let (e, _) = r.create("a");
    let set = abi::SetxattrIn { size: 3, flags: 0 };
    let (mut header, bytes) =
        message(op::SETXATTR, e.nodeid, set.as_bytes(), &[&z("user.k")[..], b"xyz", &[7; 16]].concat());
    header.total_extlen = 2;
    r.ask_raw(header, &bytes).unwrap();
    header.total_extlen = 3;
    assert_eq!(r.ask_raw(header, &bytes).unwrap_err(), Errno::INVAL, "the value reaches into the extension");
}

#[test]
fn strangers_are_refused_under_allow_root() {
    let r = rig();
    let ask = |uid, opcode| {
        let (mut header, bytes) = message(opcode, ROOT, abi::GetattrIn::default().as_bytes(), &[]);
        header.uid = uid;
        r.ask_raw(header, &bytes)
    };
    assert!(ask(0, op::GETATTR).is_ok() && ask(1000, op::GETATTR).is_ok());
    assert_eq!(ask(1001, op::GETATTR).unwrap_err(), Errno::ACCESS);
    assert_ne!(ask(1001, op::READ).unwrap_err(), Errno::ACCESS, "sent for nobody, too");
}

/// Panics in every call once it is armed.
struct Panics(std::sync::atomic::AtomicBool);

impl Gate for Panics {
    fn before(&self, _: BackingCall) -> Verdict {
        assert!(!self.0.load(std::sync::atomic::Ordering::Relaxed), "injected by the test");
        Verdict::Go
    }
}

#[test]
fn a_panic_is_the_failure_of_its_request_alone() {
    let gate = Arc::new(Panics(false.into()));
    let r = rig_with(Some(gate.clone()));
    let (e, _) = r.create("a");
    let attempts = || {
        [
            r.ask(op::RMDIR, ROOT, &NONE, &z("b")).unwrap_err(),
            r.ask(op::MKDIR, ROOT, &abi::MkdirIn { mode: 0o755, umask: 0 }, &z("a")).unwrap_err(),
            r.ask(op::UNLINK, ROOT, &NONE, &z("none")).unwrap_err(),
        ]
    };
    gate.0.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(attempts().contains(&Errno::IO));
    gate.0.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(attempts(), [Errno::NOENT, Errno::EXIST, Errno::NOENT]);
    r.ask(op::GETATTR, e.nodeid, &abi::GetattrIn::default(), &[]).unwrap();
}

/// A reply that a panic drops answers, and answers once.
#[test]
fn a_dropped_reply_is_eio() {
    let r = rig();
    let line = Line::new(&r.post, 5);
    let reply: Reply<()> = line.reply(|()| Body::EMPTY);
    assert!(line.taken.get());
    drop(reply);
    let (tag, answer) = r.answers.recv().unwrap();
    assert_eq!((tag, answer.unwrap_err()), (5, Errno::IO));
    assert!(r.answers.try_recv().is_err());
}

#[test]
fn device_numbers_survive() {
    for (major, minor) in [(0, 0), (7, 3), (259, 1), (4095, 0xf_ffff)] {
        let dev = rustix::fs::makedev(major, minor);
        assert_eq!(decode_dev(encode_dev(dev)), dev);
    }
}

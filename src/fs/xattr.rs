//! Extended attributes, ACLs among them.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use rustix::fs::{self as rfs, StatVfsMountFlags, XattrFlags};
use rustix::io::Errno;

use super::meta::drop_sgid;
use super::{Caller, Fs, Reply};
use crate::backend::Backing;
use crate::engine::io::Access;

/// Largest value, bytes (`XATTR_SIZE_MAX`), and largest list (`XATTR_LIST_MAX`) of linux/limits.h.
const MAX: usize = 64 << 10;

impl Fs {
    /// getxattr(2): the whole value.
    pub fn getxattr(&self, node: u64, name: &OsStr) -> Result<Vec<u8>, Errno> {
        let node = self.node(node)?;
        let read = self.with_node(&node, false, |fd| {
            if name == "security.capability" && rfs::fstatvfs(fd)?.f_flag.contains(StatVfsMountFlags::NOSUID) {
                // See `restrict`.
                return Err(Errno::NODATA);
            }
            let path = Backing::proc_path(fd);
            // Most values are small: asked for with a small buffer first.
            let mut buf = vec![0; 512];
            let n = match rfs::getxattr(path.as_str(), name, &mut buf[..]) {
                Err(Errno::RANGE) => {
                    buf.resize(MAX, 0);
                    rfs::getxattr(path.as_str(), name, &mut buf[..])?
                }
                r => r?,
            };
            buf.truncate(n);
            Ok(buf)
        });
        finished(read)
    }

    /// listxattr(2): names, each with a NUL after it. `trusted.` names are shown to the superuser only.
    pub fn listxattr(&self, caller: Caller, node: u64) -> Result<Vec<u8>, Errno> {
        let node = self.node(node)?;
        let list = self.with_node(&node, false, |fd| {
            let mut buf = vec![0; MAX];
            let n = rfs::listxattr(Backing::proc_path(fd).as_str(), &mut buf[..])?;
            buf.truncate(n);
            Ok(buf)
        });
        let mut list = finished(list)?;
        if caller.uid != 0 {
            let names = list.split_inclusive(|b| *b == 0).filter(|n| !n.starts_with(b"trusted."));
            list = names.flatten().copied().collect();
        }
        Ok(list)
    }

    /// setxattr(2). An ACL set by someone outside the file's group takes set-group-ID away, as a chmod does.
    pub fn setxattr(
        self: &Arc<Self>,
        caller: Caller,
        node: u64,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        reply: Reply<()>,
    ) {
        if let Err(e) = self.node(node).and_then(|n| self.check_own(&n, name, value)) {
            return reply.send(Err(e));
        }
        let flags = XattrFlags::from_bits_retain(flags as u32);
        let (n, value) = (name.to_owned(), value.to_vec());
        self.change_xattr(node, name.to_owned(), reply, move |path| {
            let acl = if n == "system.posix_acl_access" { Some(rfs::stat(path)?) } else { None };
            rfs::setxattr(path, &n, &value, flags)?;
            acl.map_or(Ok(()), |before| drop_sgid(path, &before, &caller))
        });
    }

    /// removexattr(2).
    pub fn removexattr(self: &Arc<Self>, node: u64, name: &OsStr, reply: Reply<()>) {
        let n = name.to_owned();
        self.change_xattr(node, name.to_owned(), reply, move |path| rfs::removexattr(path, &n));
    }

    fn change_xattr(
        self: &Arc<Self>,
        id: u64,
        name: OsString,
        reply: Reply<()>,
        change: impl Fn(&str) -> Result<(), Errno> + Send + 'static,
    ) {
        let node = match self.node(id) {
            Ok(n) => n,
            Err(e) => return reply.send(Err(e)),
        };
        match self.with_node(&node, true, |fd| change(&Backing::proc_path(fd))) {
            Access::Done(r) => {
                Self::own_changed(&node, &name);
                reply.send(r);
            }
            Access::Wait => {
                let me = self.clone();
                if let Ok(file) = node.file() {
                    self.engine.park(file, Box::new(move || me.change_xattr(id, name, reply, change)));
                }
            }
        }
    }
}

/// Calls that change nothing never wait.
fn finished<T>(a: Access<T>) -> Result<T, Errno> {
    match a {
        Access::Done(r) => r,
        Access::Wait => Err(Errno::IO),
    }
}
